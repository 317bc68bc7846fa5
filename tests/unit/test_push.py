"""Pushing to a server on this machine that stands in for both hubs."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import typer.testing
from stand_in_hubs import KAGGLE_KEY, ME, OURS, TOKEN, Repository, client_environment

import gemma_keras
from gemma_keras import cli, hubs, lora_config
from gemma_keras.checkpoints import exporting, open_checkpoint, peft
from gemma_keras.checkpoints.contents import Contents
from gemma_keras.checkpoints.provenance import Provenance
from gemma_keras.config import GemmaConfig
from gemma_keras.hubs import PushError
from gemma_keras.hubs import kaggle as kaggle_hub

pytestmark = [
    pytest.mark.any_backend,
    # The tiny model is none that KerasHub could hold exactly.
    pytest.mark.filterwarnings("ignore:KerasHub:UserWarning"),
    # How huggingface_hub uses its own HTTP library.
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
]
pytest.importorskip("kagglehub")

CONFIG = GemmaConfig(
    vocab_size=500,
    num_layers=2,
    hidden_dim=24,
    ffn_dim=40,
    num_query_heads=4,
    num_kv_heads=2,
    head_dim=10,
    query_pre_attn_scalar=10,
)
HF = f"hf://{ME}/tiny"
KAGGLE = {
    "keras": f"kaggle://{ME}/tiny/keras/tiny_en",
    "hf": f"kaggle://{ME}/tiny/transformers/tiny_en",
    "gguf": f"kaggle://{ME}/tiny/gguf/tiny_en",
    "adapter": f"kaggle://{ME}/tiny/transformers/tiny_adapter",
}
KINDS = list(KAGGLE)


@pytest.fixture(scope="module")
def written(tmp_path_factory, small):
    """A directory with an export of each kind, and one GGUF file."""
    folder = tmp_path_factory.mktemp("exports")
    random = np.random.default_rng(0)
    arrays = {
        path: random.normal(size=shape).astype("float32")
        for path, shape in CONFIG.weight_shapes().items()
    }
    contents = Contents(
        config=CONFIG, tensors=arrays.__getitem__, dtype="float32", tokenizer=small
    )
    for kind in ("keras", "hf", "gguf"):
        exporting.export(contents, folder / kind, kind, max_shard_size=40_000)
    exporting.export(contents, folder / "tiny.gguf", "gguf", licence="apache-2.0")
    lora = lora_config.LoraConfig(rank=2)
    weights = {
        path: {
            "lora_a": random.normal(size=(rows, 2)).astype("float32"),
            "lora_b": random.normal(size=(2, columns)).astype("float32"),
        }
        for path, (rows, columns) in lora_config.layer_shapes(CONFIG).items()
        if lora.adapts(path)
    }
    adapter = peft.Adapter(lora, weights)
    peft.write(folder / "adapter", adapter, CONFIG, provenance=Provenance())
    return folder


@pytest.fixture
def copy(written, tmp_path):
    """A function that copies one of the exports, to be changed."""

    def copy(kind):
        return shutil.copytree(written / kind, tmp_path / "copies" / kind)

    return copy


@pytest.fixture
def client(hub, tmp_path, monkeypatch):
    """Lets the hubs' libraries talk to the stand-in, with the right credentials."""
    from kagglesdk import kaggle_env

    for name, value in {
        "ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": True,
        "HF_TOKEN_PATH": str(tmp_path / "no-token"),
    }.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    endpoints = kaggle_env._env_to_endpoint
    monkeypatch.setitem(endpoints, kaggle_env.KaggleEnv.LOCAL, hub.url)
    monkeypatch.setattr(kaggle_hub, "WAITS", (0, 0))
    for name, value in {
        "HOME": str(tmp_path / "home"),
        "HF_TOKEN": TOKEN,
        "KAGGLE_API_ENVIRONMENT": "LOCALHOST",
        "KAGGLE_USERNAME": ME,
        "KAGGLE_KEY": KAGGLE_KEY,
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    said = []

    def push(source, handle, **options):
        return hubs.push(source, handle, tell=said.append, **options)

    return types.SimpleNamespace(push=push, said=said)


def everything_in(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def contents_of(repository):
    return {name: data for name, (data, _) in repository.files.items()}


# What is pushed


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_is_packed_whole(written, kind):
    parcel = hubs.pack(written / kind)
    names = {p.relative_to(written / kind).as_posix() for p in parcel.files.values()}
    assert names == parcel.files.keys() == everything_in(written / kind).keys()
    assert {"README.md", "Notice", "provenance.json"} <= names
    assert (parcel.licence, parcel.left_out, parcel.single) == ("gemma", (), False)


def test_a_gguf_file_is_packed_with_papers(written):
    parcel = hubs.pack(written / "tiny.gguf")
    assert parcel.files.keys() == {"tiny.gguf", "README.md"}
    # As the file's own keys say.
    assert parcel.licence == "apache-2.0"
    assert "license: apache-2.0" in parcel.card
    assert "llama-cli -m PATH/tiny.gguf" in parcel.card
    assert "passed on by gemma_keras" in parcel.card


def test_what_is_no_part_of_it_stays_here(copy):
    folder = copy("hf")
    (folder / "optimizer.pt").write_bytes(b"large")
    (folder / ".env").write_text("SECRET=1")
    (folder / "logs").mkdir()
    (folder / "logs" / "events").write_bytes(b"private")
    (folder / "LICENSE.txt").write_text("Mine.")
    parcel = hubs.pack(folder)
    assert parcel.left_out == ("logs/events", "optimizer.pt")
    assert "LICENSE.txt" in parcel.files and ".env" not in parcel.files


@pytest.mark.parametrize("kind", ["keras", "hf", "gguf"])
def test_what_came_without_a_card_gets_one(copy, kind):
    folder = copy(kind)
    for name in ("README.md", "Notice", "provenance.json"):
        (folder / name).unlink()
    if kind == "gguf":
        (folder / "model.gguf").rename(folder / "mine.gguf")
    parcel = hubs.pack(folder, licence=None if kind == "gguf" else "mit")
    told = "gemma" if kind == "gguf" else "mit"
    assert parcel.licence == told
    assert parcel.card.startswith(f"---\nlicense: {told}\n")
    assert f"A Gemma 1 of {CONFIG.num_parameters:,} parameters" in parcel.card
    known = "What was done to the weights before is not known."
    assert (known in parcel.card) == (kind != "gguf")
    assert ("Notice" in parcel.files) == (told == "gemma")
    assert not (folder / "README.md").exists()


def test_a_card_of_ones_own_tells_the_licence(copy):
    folder = copy("hf")
    (folder / "provenance.json").unlink()
    (folder / "README.md").write_text("---\nlicense: 'cc-by-4.0'\n---\nMine.\n")
    assert hubs.pack(folder).licence == "cc-by-4.0"
    assert hubs.pack(folder).card.endswith("Mine.\n")
    with pytest.raises(PushError, match=r"is under cc-by-4\.0, as the files there"):
        hubs.pack(folder, licence="mit")


def remove(name):
    return lambda folder: next(folder.glob(name)).unlink()


def cut(name):
    return lambda folder: os.truncate(next(folder.glob(name)), 1000)


def rename(name):
    return lambda folder: folder.rename(folder.with_name(name))


def half(folder):
    from safetensors.numpy import load_file, save_file

    factors = load_file(folder / peft.WEIGHTS)
    del factors[next(name for name in factors if "lora_B" in name)]
    save_file(factors, folder / peft.WEIGHTS)


def link(folder):
    (folder / "Notice").unlink()
    secret = folder.parent / "secret"
    secret.write_text("mine")
    (folder / "Notice").symlink_to(secret)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("hf", remove("tokenizer.json"), "provenance.json lists tokenizer.json"),
        ("hf", cut("model-00002-*"), "model-00002-of-"),
        ("hf", remove("config.json"), r"provenance.json lists config.json"),
        ("keras", cut("model_00001.weights.h5"), "model_00001.weights.h5"),
        ("keras", remove("model_00001.weights.h5"), "model_00001.weights.h5"),
        ("gguf", cut("model.gguf"), "model.gguf"),
        ("adapter", cut(peft.WEIGHTS), peft.WEIGHTS),
        ("adapter", half, "half of an update is missing"),
        ("adapter", remove(peft.WEIGHTS), "provenance.json lists adapter_model"),
        ("hf", link, "is a link to a file elsewhere"),
    ],
)
def test_what_is_not_complete_is_refused(copy, kind, change, message):
    folder = copy(kind)
    change(folder)
    with pytest.raises(PushError, match=message):
        hubs.pack(folder)


def test_what_is_no_export_is_refused(copy, written, tmp_path):
    with pytest.raises(PushError, match="no such file or directory; a push takes"):
        hubs.pack("gemma_tiny_en")
    with pytest.raises(PushError, match="the directory is empty"):
        (tmp_path / "empty").mkdir()
        hubs.pack(tmp_path / "empty")
    folder = copy("hf")
    with pytest.raises(PushError, match="one file of a checkpoint; push its direct"):
        hubs.pack(copy("keras") / "model.weights.json")
    left = folder.rename(tmp_path / ".hf.0123abcd.partial")
    with pytest.raises(PushError, match="left by an export that did not end"):
        hubs.pack(left)
    run = tmp_path / "run"
    run.mkdir()
    copy("adapter").rename(run / "adapter")
    (run / "metrics.csv").touch()
    with pytest.raises(PushError, match=r"There is an adapter in .*run/adapter"):
        hubs.pack(run)
    (run / "adapter" / "provenance.json").unlink()
    (run / "adapter" / "README.md").unlink()
    with pytest.raises(PushError, match=r"has no model card \(README.md\)"):
        hubs.pack(run / "adapter")


@pytest.mark.parametrize(
    ("handle", "message"),
    [
        ("me/tiny", "which hub.*Write hf://me/tiny for"),
        ("hf://tiny", "says no organisation or user"),
        ("hf://me/tiny@v1", "leave the revision away"),
        ("hf://me/tiny/model.gguf", "no handle that can be pushed to"),
        ("hf://me/a--b", "'a--b' is no name that a hub takes"),
        ("hf://me/a.", "is no name that a hub takes"),
        ("hf://me/" + "a" * 97, "at most 96 characters"),
        ("kaggle://me/tiny", "write hf://organisation/name or kaggle://owner/model"),
        ("kaggle://me/tiny/keras/tiny_en/3", "leave the version away"),
        ("kaggle://me/tiny/caffe/tiny_en", "no framework 'caffe'; it knows coral"),
        ("kaggle://me/tiny/gguf/tiny", "preset.*Write kaggle://me/tiny/keras/tiny."),
        ("s3://bucket/tiny", "no handle that can be pushed to"),
    ],
)
def test_handles_that_lead_nowhere(client, hub, written, handle, message):
    with pytest.raises(PushError, match=message):
        client.push(written / "keras", handle)
    assert not hub.requests


# Hugging Face


@pytest.mark.parametrize("kind", KINDS)
def test_hugging_face_gets_every_file(client, hub, written, kind):
    page = client.push(written / kind, HF)
    assert page == "https://huggingface.co/me/tiny"
    repository = hub.repositories["me/tiny"]
    assert repository.private
    found, expected = contents_of(repository), everything_in(written / kind)
    card = found.pop("README.md").decode()
    original = expected.pop("README.md").decode()
    assert found == expected
    place = {"keras": '"hf://me/tiny"', "hf": '"me/tiny"', "gguf": "PATH/model.gguf"}
    assert place.get(kind, 'load_adapter("hf://me/tiny")') in card
    assert original.splitlines()[:3] == card.splitlines()[:3]
    assert '"PATH"' not in card
    title = f"Push with gemma_keras {gemma_keras.__version__}"
    assert repository.commits == ["initial commit", title]
    # Again: nothing is sent, nothing is committed.
    sent = len([r for r in hub.requests if r.startswith("PUT")])
    client.push(written / kind, HF)
    assert len([r for r in hub.requests if r.startswith("PUT")]) == sent > 0
    assert repository.commits == ["initial commit", title]


def test_a_later_push_replaces_the_earlier(client, hub, written, copy):
    client.push(written / "hf", HF)
    repository = hub.repositories["me/tiny"]
    repository.files["picture.png"] = b"mine", "Add a picture"
    client.push(written / "keras", HF)
    names = repository.files.keys()
    assert names == everything_in(written / "keras").keys() | {"picture.png"}
    assert not client.said
    # What somebody else wrote into the card stays.
    repository.files["README.md"] = b"# Edited", "Update README.md"
    client.push(written / "hf", HF)
    assert repository.files["README.md"][0] == b"# Edited"
    assert client.said == ["The README.md there was edited and is kept."]
    assert "model.weights.json" not in repository.files


def test_gguf_files_come_beside_one_another(client, hub, written, tmp_path):
    client.push(written / "hf", HF)
    before = contents_of(hub.repositories["me/tiny"])
    client.push(written / "tiny.gguf", HF)
    other = shutil.copy(written / "tiny.gguf", tmp_path / "other.gguf")
    client.push(other, HF)
    new = {"tiny.gguf": other.read_bytes(), "other.gguf": other.read_bytes()}
    assert contents_of(hub.repositories["me/tiny"]) == before | new


def test_another_model_is_replaced_only_if_asked(client, hub, written):
    theirs = {"model.safetensors": (b"theirs", "Upload model")}
    theirs |= {"README.md": (b"---\nlicense: mit\n---\n", "initial commit")}
    hub.repositories["me/tiny"] = Repository(True, dict(theirs))
    with pytest.raises(PushError, match=r"no push put there \(model.safetensors\)"):
        client.push(written / "hf", HF)
    assert hub.repositories["me/tiny"].files == theirs
    client.push(written / "hf", HF, overwrite=True)
    names = hub.repositories["me/tiny"].files.keys()
    assert names == everything_in(written / "hf").keys()


def test_hugging_face_is_told_who_may_see_it(client, hub, written):
    client.push(written / "adapter", f"hf://{OURS}/open", private=False)
    repository = hub.repositories[f"{OURS}/open"]
    assert not repository.private
    with pytest.raises(PushError, match=r"is public. Pass --public .*open/settings"):
        client.push(written / "hf", f"hf://{OURS}/open")
    assert "config.json" not in repository.files
    client.push(written / "adapter", HF)
    assert hub.repositories["me/tiny"].private
    client.push(written / "adapter", HF, private=False)
    assert not hub.repositories["me/tiny"].private


def stop_waiting(monkeypatch):
    """The library waits between attempts for half a minute altogether."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)


@pytest.mark.parametrize(
    ("refusals", "handle", "message"),
    [
        ({}, "hf://strangers/tiny", "strangers is neither you nor an organisation of"),
        ({}, "hf://strangers/tiny", "you are me, and your organisations are our-lab"),
        ({"commit/main": 403}, HF, r"refuses \(403\): not now\..*right to write"),
        ({"/create": 403}, HF, r"refuses \(403\): not now\..*right to write"),
        ({"commit/main": 412}, HF, "answered 412.*changed by somebody else"),
        ({"/create": 429}, HF, r"asks to slow down \(429\)"),
        ({"commit/main": 410}, HF, "answered 410: not now. Run the same command"),
    ],
)
def test_hugging_face_refuses(
    client, hub, written, monkeypatch, refusals, handle, message
):
    stop_waiting(monkeypatch)
    hub.refusals = refusals
    with pytest.raises(PushError, match=message) as caught:
        client.push(written / "adapter", handle)
    assert str(caught.value).startswith(f"{handle}: Hugging Face ")
    assert not any(repository.files for repository in hub.repositories.values())


@pytest.mark.parametrize("handle", [HF, KAGGLE["adapter"]])
def test_who_is_not_logged_in_is_told_how(client, hub, written, monkeypatch, handle):
    name = "Hugging Face" if handle == HF else "Kaggle"
    wrong = {"HF_TOKEN": "hf_wrong", "KAGGLE_KEY": "wrong"}
    for variable, value in wrong.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(PushError, match=r"does not accept your.*Create a token"):
        client.push(written / "adapter", handle)
    for variable in wrong:
        monkeypatch.delenv(variable)
    hub.requests.clear()
    with pytest.raises(PushError, match=f"not logged in to {name}. Create a token"):
        client.push(written / "adapter", handle)
    assert not hub.requests


@pytest.mark.parametrize("handle", [HF, KAGGLE["adapter"]])
def test_no_network(client, hub, written, monkeypatch, handle):
    from kagglesdk import kaggle_env

    stop_waiting(monkeypatch)
    nobody = "http://127.0.0.1:9"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", nobody)
    endpoints = kaggle_env._env_to_endpoint
    monkeypatch.setitem(endpoints, kaggle_env.KaggleEnv.LOCAL, nobody)
    with pytest.raises(PushError, match="could not be reached, or the connection"):
        client.push(written / "adapter", handle)


# Kaggle


@pytest.mark.parametrize("kind", KINDS)
def test_kaggle_gets_every_file(client, hub, written, kind):
    page = client.push(written / kind, KAGGLE[kind])
    assert page == "https://www.kaggle.com/models/me/tiny"
    model = hub.models[ME, "tiny"]
    assert model.private
    (files,) = next(iter(model.versions.values()))
    expected = everything_in(written / kind)
    card, original = files.pop("README.md"), expected.pop("README.md")
    assert files == expected
    assert card.splitlines()[:2] == original.splitlines()[:2]
    # Kaggle's pages know no front matter.
    assert model.description.startswith("# ")
    assert model.description in card.decode()
    (body,) = model.bodies.values()
    assert body["licenseName"] == "Gemma"
    assert body["usage"] == model.description
    loads = {"keras": "from_preset", "adapter": "load_adapter"}
    if kind in loads:
        assert f'{loads[kind]}("{KAGGLE[kind]}")' in model.description


def test_kaggle_keeps_versions(client, hub, written):
    client.push(written / "keras", KAGGLE["keras"])
    client.push(written / "hf", f"kaggle://{ME}/tiny/OTHER/tiny_en")
    client.push(written / "keras", KAGGLE["keras"])
    model = hub.models[ME, "tiny"]
    counts = {key: len(versions) for key, versions in model.versions.items()}
    assert counts == {
        ("MODEL_FRAMEWORK_KERAS", "tiny_en"): 2,
        ("MODEL_FRAMEWORK_OTHER", "tiny_en"): 1,
    }
    first, second = model.versions["MODEL_FRAMEWORK_KERAS", "tiny_en"]
    assert first == second


def test_kaggle_is_told_who_may_see_it(client, hub, written):
    client.push(written / "adapter", KAGGLE["adapter"], private=False)
    assert not hub.models[ME, "tiny"].private
    with pytest.raises(PushError, match=r"is public. Pass --public"):
        client.push(written / "hf", KAGGLE["hf"])
    assert len(hub.models[ME, "tiny"].versions) == 1
    client.push(written / "hf", KAGGLE["hf"], private=False)
    assert len(hub.models[ME, "tiny"].versions) == 2


def test_kaggle_may_not_know_a_licence(client, hub, written):
    hub.unknown_licences = ("Gemma",)
    client.push(written / "adapter", KAGGLE["adapter"])
    assert "Kaggle does not take 'Gemma' as a licence" in client.said[0]
    assert "Notice" in next(iter(hub.models[ME, "tiny"].versions.values()))[0]


@pytest.mark.parametrize(
    ("refusals", "handle", "message"),
    [
        (
            {},
            "kaggle://strangers/t/gguf/t",
            r"refuses: Permission .* Is strangers",
        ),
        ({"GetModel": 500}, KAGGLE["gguf"], "answered 500: not now. Run the same"),
        (
            {"CreateModel": 403},
            KAGGLE["gguf"],
            r"refuses \(403\): not now\. Is me",
        ),
        ({"StartBlobUpload": 429}, KAGGLE["gguf"], "asks to slow down"),
        ({"CreateModelInstance": 404}, KAGGLE["gguf"], r"refuses \(404\): not now\."),
    ],
)
def test_kaggle_refuses(client, hub, written, refusals, handle, message):
    hub.refusals = refusals
    with pytest.raises(PushError, match=message):
        client.push(written / "gguf", handle)
    assert not any(model.versions for model in hub.models.values())


def test_too_many_files_for_kaggle(client, hub, copy, written):
    folder = copy("hf")
    for number in range(50):
        (folder / f"LICENSE-{number}").touch()
    with pytest.raises(PushError, match=r"takes 50 files.*larger max_shard"):
        client.push(folder, KAGGLE["hf"])
    assert not hub.requests


# What breaks off goes on


def starts(hub):
    return hub.requests.count("StartBlobUpload")


def test_an_upload_goes_on_where_the_connection_broke(client, hub, written):
    hub.breaks_after = 30_000
    seen = []
    client.push(
        written / "gguf", KAGGLE["gguf"], progress=lambda *counts: seen.append(counts)
    )
    assert hub.broken.is_set()
    # The stand-in itself sees to it that no byte comes twice.
    assert starts(hub) == len(everything_in(written / "gguf"))
    done, totals = zip(*seen, strict=True)
    assert done[-1] == totals[-1] and len(set(totals)) == 1


def test_an_upload_goes_on_in_another_run(client, hub, written):
    hub.breaks_after, hub.breaks_once = 30_000, False
    with pytest.raises(PushError, match="goes on with what has not arrived"):
        client.push(written / "gguf", KAGGLE["gguf"])
    before = starts(hub)
    arrived = sum(len(upload.data) for upload in hub.uploads.values())
    assert arrived == 30_000
    hub.breaks_after = None
    client.push(written / "gguf", KAGGLE["gguf"])
    files = everything_in(written / "gguf")
    assert starts(hub) == len(files) and before >= 1
    # Nothing is remembered of what is done.
    client.push(written / "gguf", KAGGLE["gguf"])
    assert starts(hub) == 2 * len(files)


@pytest.mark.parametrize("reason", ["unknown", "old", "damaged", "changed"])
def test_an_upload_that_cannot_go_on_begins_anew(
    client, hub, copy, tmp_path, monkeypatch, reason
):
    folder = copy("gguf")
    hub.breaks_after, hub.breaks_once = 30_000, False
    with pytest.raises(PushError):
        client.push(folder, KAGGLE["gguf"])
    hub.breaks_after = None
    before = starts(hub)
    if reason == "unknown":
        hub.uploads.clear()
    if reason == "old":
        now = time.time
        monkeypatch.setattr(kaggle_hub.time, "time", lambda: now() + 7 * 3600)
    if reason == "damaged":
        for note in (tmp_path / "cache").rglob("*.json"):
            note.write_text("{")
    if reason == "changed":
        for path in folder.iterdir():
            os.utime(path, (0, 0))
    client.push(folder, KAGGLE["gguf"])
    files = everything_in(folder)
    # The card is made here, so that it is the same file again.
    expected = len(files) - (reason == "changed")
    assert starts(hub) - before in (expected, len(files))
    (version,) = hub.models[ME, "tiny"].versions["MODEL_FRAMEWORK_GGUF", "tiny_en"]
    assert version["model.gguf"] == files["model.gguf"]


PROGRAM = """
import sys
sys.argv[0] = "gemma-keras"
import kagglesdk.kaggle_env as env
env._env_to_endpoint[env.KaggleEnv.LOCAL] = sys.argv.pop(1)
from gemma_keras import cli
cli.main()
"""


@pytest.mark.parametrize("handle", [HF, KAGGLE["keras"]])
def test_a_push_that_was_killed_goes_on(hub, written, tmp_path, handle):
    variables = client_environment(
        hub, tmp_path, HF_TOKEN=TOKEN, KAGGLE_USERNAME=ME, KAGGLE_KEY=KAGGLE_KEY
    )
    command = [sys.executable, "-c", PROGRAM, hub.url, "push"]
    command += [str(written / "keras"), handle]
    sizes = sum(map(len, everything_in(written / "keras").values()))
    hub.breaks_after, hub.hangs = sizes * 2 // 3, True
    child = subprocess.Popen(command, env=variables, stderr=subprocess.PIPE)
    try:
        assert hub.broken.wait(60), "nothing was sent"
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    hub.released.set()
    hub.breaks_after = None
    stored = set(hub.lfs)
    first = len(hub.requests)
    again = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    expected = everything_in(written / "keras")
    if handle == HF:
        found = contents_of(hub.repositories["me/tiny"])
        sent = {r.split("/")[-1] for r in hub.requests[first:] if "PUT /lfs/" in r}
        assert stored and not sent & stored
    else:
        ((found,),) = hub.models[ME, "tiny"].versions.values()
        assert starts(hub) == len(expected)
    assert found.keys() == expected.keys()
    for name in expected.keys() - {"README.md"}:
        assert found[name] == expected[name]


# The ways in


def test_the_command(client, hub, copy):
    folder = copy("hf")
    (folder / "optimizer.pt").touch()
    run = typer.testing.CliRunner().invoke
    result = run(cli.app, ["push", str(folder), HF, "--public"])
    assert (result.exit_code, result.stdout) == (0, "https://huggingface.co/me/tiny\n")
    assert "Left out, being no part of it: optimizer.pt." in result.stderr
    assert not hub.repositories["me/tiny"].private
    result = run(cli.app, ["push", str(folder), KAGGLE["hf"]])
    assert result.exit_code == 0 and "Pushed" in result.stderr
    result = run(cli.app, ["push", str(folder), HF])
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith(f"gemma-keras: {HF}: is public.")


def test_a_model_in_memory_is_pushed(client, hub, tmp_path):
    lm = gemma_keras.GemmaCausalLM.from_preset("gemma_tiny_instruct_en")
    assert lm.push_to_hub(HF).endswith("huggingface.co/me/tiny")
    files = hub.repositories["me/tiny"].files
    assert {"model.safetensors", "tokenizer.json", "README.md"} <= files.keys()
    facts = json.loads(files["provenance.json"][0])
    assert facts["source"]["name"] == "gemma_tiny_instruct_en"
    assert facts["licence"] == "apache-2.0" and "Notice" not in files
    lm.enable_lora(2)
    lm.push_to_hub("hf://me/adapter", "peft", directory=tmp_path / "kept")
    assert "adapter_model.safetensors" in hub.repositories["me/adapter"].files
    assert (tmp_path / "kept" / "adapter_config.json").is_file()
    lm.push_to_hub(f"kaggle://{ME}/tiny/gguf/q8", dtype="q8_0", private=False)
    assert not hub.models[ME, "tiny"].private
    with pytest.raises(ValueError, match="say in which format, one of hf, keras, gguf"):
        lm.push_to_hub(f"kaggle://{ME}/tiny/other/tiny")


def test_kerashubs_name(client, hub, written):
    lm = gemma_keras.GemmaCausalLM.from_preset("gemma_tiny_en")
    folder = written.parent / "saved"
    lm.save_to_preset(folder)
    gemma_keras.upload_preset(HF, str(folder))
    repository = hub.repositories["me/tiny"]
    assert repository.private
    assert {"README.md", "provenance.json", "config.json"} <= repository.files.keys()
    assert b"written from memory" in repository.files["README.md"][0]


def test_an_adapter_comes_back(hub, client, written, tmp_path):
    client.push(written / "adapter", HF)
    client.push(written / "adapter", KAGGLE["adapter"])
    program = (
        "import sys; sys.argv[0] = 'gemma-keras'\n"
        "import kagglesdk.kaggle_env as env\n"
        "env._env_to_endpoint[env.KaggleEnv.LOCAL] = sys.argv[1]\n"
        "from gemma_keras import registry\n"
        "for handle in sys.argv[2:]: print(registry.resolve_adapter(handle))"
    )
    variables = client_environment(hub, tmp_path, HF_TOKEN=TOKEN)
    variables |= {"KAGGLE_USERNAME": ME, "KAGGLE_KEY": KAGGLE_KEY}
    command = [sys.executable, "-c", program, hub.url, HF, KAGGLE["adapter"]]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for folder in done.stdout.split():
        for name in (peft.CONFIG, peft.WEIGHTS):
            expected = (written / "adapter" / name).read_bytes()
            with open(f"{folder}/{name}", "rb") as file:
                assert file.read() == expected
        assert len(peft.read(folder, CONFIG).weights) == 4


def test_what_was_pushed_as_a_model_is_a_model(client, hub, written, tmp_path):
    client.push(written / "hf", HF)
    for name, (data, _) in hub.repositories["me/tiny"].files.items():
        (tmp_path / name).write_bytes(data)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.config == CONFIG
    assert re.search("from_pretrained..me/tiny", (tmp_path / "README.md").read_text())
