"""The registry of models, and fetching them from stand-ins of the two hubs.

The hubs' own libraries talk to a server on this machine, each time in a process of its
own: they read where the hub is, and who the user is, when they are imported.
"""

import dataclasses
import hashlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from stand_in_hubs import COMMIT, REPOSITORY, Repository, client_environment

from gemma_keras import registry
from gemma_keras.checkpoints import exporting, open_checkpoint
from gemma_keras.checkpoints.provenance import Provenance
from gemma_keras.config import GemmaConfig
from gemma_keras.registry import SourceError

pytestmark = pytest.mark.any_backend

PACKAGE = Path(registry.__file__).resolve().parent
CHECKOUT = Path(__file__).resolve().parents[2]

# As published with the checkpoints.
PARAMETERS = {
    "gemma_2b": 2_506_172_416,
    "gemma_7b": 8_537_680_896,
    "gemma2_2b": 2_614_341_888,
    "gemma2_9b": 9_241_705_984,
    "gemma2_27b": 27_227_128_320,
    "gemma3_270m": 268_098_176,
    "gemma3_1b": 999_885_952,
    "gemma3_4b_text": 3_880_099_328,
    "gemma3_12b_text": 11_765_788_416,
    "gemma3_27b_text": 27_009_002_240,
}


# What the registry knows


def test_parameter_counts():
    known = registry.architectures()
    published = {name: config for name, config in known.items() if name in PARAMETERS}
    assert {
        name: config.num_parameters for name, config in published.items()
    } == PARAMETERS


def test_every_entry_is_complete():
    presets = registry.presets()
    assert len(presets) == 29
    for name, preset in presets.items():
        assert preset.name == name
        assert preset.variant in ("base", "instruct", "code")
        assert preset.description.endswith(".")
        assert preset.licence_url.startswith("https://")
        for source in preset.sources:
            assert source.startswith(("kaggle://keras/", "hf://google/"))
        if preset.directory is None:
            assert isinstance(preset.config, GemmaConfig)
            assert len(preset.sources) == 2
            assert preset.licence == "Gemma Terms of Use"
            assert not preset.available
        for digest in preset.sha256.values():
            assert re.fullmatch("[0-9a-f]{64}", digest)


def test_names_that_users_know():
    names = [
        *("gemma_2b_en", "gemma_instruct_2b_en", "gemma_7b_en", "gemma_instruct_7b_en"),
        *("gemma_1.1_instruct_2b_en", "gemma_1.1_instruct_7b_en", "code_gemma_2b_en"),
        *("code_gemma_7b_en", "code_gemma_instruct_7b_en", "gemma2_2b_en"),
        *("gemma2_instruct_9b_en", "gemma3_270m", "gemma3_instruct_1b"),
        *("gemma3_4b_text", "gemma_tiny_en", "gemma_tiny_instruct_en"),
    ]
    for name in names:
        assert registry.find(name).name == name
    aliases = {
        "gemma-2b-it": "gemma_instruct_2b_en",
        "google/gemma-7b": "gemma_7b_en",
        "google/gemma-3-1b-pt": "gemma3_1b",
        "gemma-2-27b-it": "gemma2_instruct_27b_en",
        "gemma3_4b": "gemma3_4b_text",
        "codegemma-1.1-7b-it": "code_gemma_1.1_instruct_7b_en",
    }
    for alias, name in aliases.items():
        assert registry.find(alias).name == name


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore")
def test_handles_are_those_of_keras_hub():
    keras_hub = pytest.importorskip("keras_hub")
    theirs = keras_hub.models.GemmaBackbone.presets
    theirs = theirs | keras_hub.models.Gemma3Backbone.presets
    for name, preset in registry.presets().items():
        if preset.directory is None:
            entry = theirs[name]
            assert entry["kaggle_handle"] == preset.sources[0]
            assert entry["metadata"]["params"] == preset.config.num_parameters


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("gemma_2b", None),
        ("gemma_2b_eng", "gemma_2b_en"),
        ("Gemma_2B_EN", "gemma_2b_en"),
        ("gemma3_270", "gemma3_270m"),
        ("gemma_instruct_9b_en", "gemma2_instruct_9b_en"),
    ],
)
def test_misspelt_names(wrong, right):
    if right is None:
        assert registry.find(wrong)
        return
    with pytest.raises(SourceError, match=f"Did you mean .*{right}") as error:
        registry.resolve(wrong)
    assert f"{wrong!r} is neither a file" in str(error.value)
    assert "gemma-keras presets" in str(error.value)


def test_names_without_likeness():
    with pytest.raises(SourceError) as error:
        registry.resolve("zebra")
    assert "Did you mean" not in str(error.value)


def test_architecture_like():
    config = registry.architectures()["gemma3_4b_text"]
    assert (
        registry.architecture_like(dataclasses.replace(config, vocab_size=9)) == config
    )
    assert registry.architecture_like(dataclasses.replace(config, ffn_dim=9)) is None


def test_memory_needed():
    config = registry.architectures()["gemma_2b"]
    count = config.num_parameters
    assert registry.memory_needed(config, "float32") == 4 * count
    assert registry.memory_needed(config, "bfloat16") == 2 * count == 5_012_344_832
    assert registry.memory_needed(config, "float16") == 2 * count
    assert count < registry.memory_needed(config, "int8") < 1.002 * count
    # 18 layers of one key head of 256 in bfloat16: 18 KiB for each token.
    cache = registry.memory_needed(config, "bfloat16", tokens=100) - 2 * count
    assert cache == 18 * 1024 * 100
    config = registry.architectures()["gemma3_270m"]
    weights = registry.memory_needed(config, "int8")
    cache = registry.memory_needed(config, "int8", tokens=10_000) - weights
    assert cache == 1024 * (15 * 512 + 3 * 10_000)
    with pytest.raises(ValueError, match="dtype must be one of float32"):
        registry.memory_needed(config, "int4")


def test_locate_in_a_checkout_and_in_a_wheel(tmp_path, monkeypatch):
    beside = CHECKOUT if PACKAGE.parent == CHECKOUT else PACKAGE
    assert registry.locate() == beside / "presets"
    package = tmp_path / "site-packages" / "gemma_keras"
    (package / "presets").mkdir(parents=True)
    monkeypatch.setattr(registry, "__file__", str(package / "registry.py"))
    with pytest.raises(SourceError, match="install gemma_keras again"):
        registry.locate()
    (package / "presets" / "registry.json").write_text("{}")
    assert registry.locate() == package / "presets"


def test_embedded_presets(monkeypatch, tmp_path):
    for name in ("gemma_tiny_en", "gemma_tiny_instruct_en"):
        preset = registry.presets()[name]
        assert preset.sources == ()
        assert preset.directory == registry.locate() / name
    absent = dataclasses.replace(preset, directory=tmp_path / "x")
    monkeypatch.setattr(registry, "_names", lambda: {"gemma_tiny_en": absent})
    assert not absent.available
    with pytest.raises(SourceError, match=r"missing from .*install gemma_keras again"):
        registry.resolve("gemma_tiny_en")


def test_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "google" / "gemma-2b").mkdir(parents=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "m.gguf").touch()
    assert registry.resolve("mine") == Path("mine")
    assert registry.resolve("./mine") == Path("mine")
    assert registry.resolve(tmp_path / "mine") == tmp_path / "mine"
    assert registry.resolve("~/mine") == tmp_path / "mine"
    assert registry.resolve("m.gguf") == Path("m.gguf")
    # A clone of the repository under its own name is meant, not a download.
    assert registry.resolve("google/gemma-2b") == Path("google/gemma-2b")
    for absent in ("other.gguf", "./other", "a/b", tmp_path / "gemma_2b_en"):
        with pytest.raises(SourceError, match="no such file or directory"):
            registry.resolve(absent)


@pytest.mark.parametrize(
    "handle",
    [
        "kaggle://google/gemma",
        "kaggle://a/b/c/d/e",
        "kaggle://a/b/c/d/1/2",
        "kaggle://../../../..//x",
        "hf://gemma-2b",
        "hf://a/b@",
        "hf://a b/c",
        "http://example.com/gemma",
        "s3://bucket/gemma",
    ],
)
def test_handles_that_are_not_understood(handle):
    with pytest.raises(SourceError, match="is not a handle that is understood"):
        registry.resolve(handle)


@pytest.mark.parametrize(
    ("names", "needed"),
    [
        (
            "config.json tokenizer.json tokenizer.model model.safetensors "
            "gemma-2b.gguf README.md .gitattributes generation_config.json",
            "config.json tokenizer.model model.safetensors",
        ),
        (
            "config.json tokenizer.json model.safetensors.index.json "
            "model-00001-of-00002.safetensors model-00002-of-00002.safetensors "
            "consolidated.safetensors pytorch_model.bin original/model.safetensors",
            "config.json tokenizer.json model.safetensors.index.json "
            "model-00001-of-00002.safetensors model-00002-of-00002.safetensors",
        ),
        (
            "config.json metadata.json tokenizer.json task.json preprocessor.json "
            "assets/tokenizer/vocabulary.spm model.weights.h5 README.md",
            "config.json metadata.json preprocessor.json tokenizer.json "
            "assets/tokenizer/vocabulary.spm model.weights.h5",
        ),
        (
            "config.json model.weights.json model_00000.weights.h5 "
            "model_00001.weights.h5",
            "config.json model.weights.json model_00000.weights.h5 "
            "model_00001.weights.h5",
        ),
        ("README.md gemma-q4.gguf", "gemma-q4.gguf"),
        (
            "README.md config.json gemma-2b.ckpt tokenizer.model",
            "config.json tokenizer.model gemma-2b.ckpt",
        ),
        ("README.md gemma-2b.nemo", "gemma-2b.nemo"),
        (
            "README.md provenance.json config.json model.safetensors",
            "config.json provenance.json model.safetensors",
        ),
        # Google's, an export for MaxText, and Orbax as it was in 2024.
        (
            "README.md .gitattributes tokenizer.model 2b/_METADATA 2b/checkpoint "
            "2b/manifest.ocdbt 2b/d/00ff 2b/ocdbt.process_0/manifest.ocdbt "
            "2b/ocdbt.process_0/d/12ab notes/tokenizer.model",
            "tokenizer.model 2b/_METADATA 2b/checkpoint 2b/manifest.ocdbt 2b/d/00ff "
            "2b/ocdbt.process_0/manifest.ocdbt 2b/ocdbt.process_0/d/12ab",
        ),
        (
            "Notice README.md config.json gemma_config.json provenance.json "
            "tokenizer.json 0/_CHECKPOINT_METADATA 0/items/_METADATA "
            "0/items/manifest.ocdbt 0/items/d/34cd 0/train_state/notes.bin",
            "gemma_config.json provenance.json tokenizer.json 0/items/_METADATA "
            "0/items/manifest.ocdbt 0/items/d/34cd",
        ),
        (
            "README.md x/tokenizer.model x/2b/checkpoint x/2b/a.w/.zarray x/2b/a.w/0.0",
            "x/tokenizer.model x/2b/checkpoint x/2b/a.w/.zarray x/2b/a.w/0.0",
        ),
    ],
)
def test_needed_files(names, needed):
    assert registry.needed_files(names.split()) == needed.split()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("README.md", "neither safetensors nor"),
        ("config.json pytorch_model.bin", "neither safetensors nor"),
        ("a.gguf b.gguf", "several GGUF files.*a.gguf, b.gguf"),
        ("a.ckpt b.ckpt", "nor one GGUF, .ckpt or .nemo file"),
        ("model.safetensors", "no config.json"),
        ("checkpoint README.md", "nor an Orbax directory"),
        ("1/a/_METADATA 2/a/_METADATA", r"several Orbax directories \(1/a/, 2/a/\)"),
    ],
)
def test_repositories_without_a_checkpoint(names, message):
    with pytest.raises(SourceError, match=message):
        registry.needed_files(names.split())


# Stand-ins of the hubs

SCRIPT = """
import sys, warnings
warnings.simplefilter("ignore")
source, url = sys.argv[1:3]
# As the command line does, which fetches without importing Keras.
sys.argv[0] = "gemma-keras"
import kagglesdk.kaggle_env as env
env._env_to_endpoint[env.KaggleEnv.LOCAL] = url
from gemma_keras import registry
try:
    print(registry.resolve(source))
except registry.SourceError as error:
    print(error)
    sys.exit(3)
assert "keras" not in sys.modules
"""


@pytest.fixture
def fetch(hub, tmp_path):
    """Resolves a source in another process; gives what it prints and whether it can."""

    def run(source, **variables):
        environment = client_environment(hub, tmp_path, **variables)
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, source, variables.get("URL", hub.url)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode in (0, 3), done.stderr
        return done.returncode == 0, done.stdout.strip()

    return run


pytest.importorskip("kagglehub")
KAGGLE = "kaggle://keras/gemma/keras/gemma_2b_en"
HF = "hf://google/gemma-2b"
LOGGED_IN = {"HF_TOKEN": "hf_x", "KAGGLE_USERNAME": "me", "KAGGLE_KEY": "key"}


@pytest.mark.parametrize("revision", ["", "@main", "@v1", f"@{COMMIT}"])
def test_hugging_face_fetches_what_is_needed(fetch, hub, revision):
    ok, path = fetch(HF + revision)
    assert ok, path
    found = {file.name: file.read_bytes() for file in Path(path).iterdir()}
    needed = ("config.json", "tokenizer.model", "model.safetensors")
    assert found == {name: REPOSITORY[name] for name in needed}
    if revision:
        return
    # What is there already needs no hub.
    assert fetch(HF, HF_ENDPOINT="http://127.0.0.1:9") == (True, path)
    assert fetch(HF, HF_HUB_OFFLINE="1") == (True, path)
    # So it is by name, when the first of its sources fails too.
    assert fetch("gemma-2b", HF_HUB_OFFLINE="1", URL="http://127.0.0.1:9") == (
        True,
        path,
    )


def test_hugging_face_fetches_an_orbax_directory(fetch, hub, tmp_path):
    pytest.importorskip("tensorstore")
    with open_checkpoint(registry.resolve("gemma_tiny_en")) as checkpoint:
        contents = exporting.checkpoint_contents(checkpoint, "gemma_tiny_en")
        exporting.export(contents, tmp_path / "m", "flax")
        expected = {p: checkpoint.tensor(p) for p in checkpoint.config.weight_shapes()}
    files = {
        file.relative_to(tmp_path / "m").as_posix(): (file.read_bytes(), "first")
        for file in (tmp_path / "m").rglob("*")
        if file.is_file()
    }
    files["1.zip"] = b"not needed", "first"
    hub.repositories["me/flax"] = Repository(private=False, files=files)
    ok, path = fetch("hf://me/flax")
    assert ok, path
    assert not (Path(path) / "1.zip").exists()
    assert not (Path(path) / "README.md").exists()
    with open_checkpoint(path) as checkpoint:
        assert Provenance.of(checkpoint, path).licence == "apache-2.0"
        assert checkpoint.tokenizer() is not None
        for name, array in expected.items():
            np.testing.assert_array_equal(checkpoint.tensor(name), array)
    assert fetch("hf://me/flax", HF_HUB_OFFLINE="1") == (True, path)


def test_hugging_face_fetches_one_file(fetch):
    ok, path = fetch(f"{HF}/gemma-2b.gguf")
    assert ok, path
    assert Path(path).read_bytes() == REPOSITORY["gemma-2b.gguf"]
    ok, text = fetch(f"{HF}@v1/other.gguf")
    assert not ok
    assert "no such model, version or file" in text


@pytest.mark.parametrize("version", ["", "/3"])
def test_kaggle_fetches_a_model(fetch, hub, version):
    ok, path = fetch(KAGGLE + version)
    assert ok, path
    assert path.endswith("keras/gemma/keras/gemma_2b_en/3")
    assert (Path(path) / "model.safetensors").read_bytes() == b"x" * 5000
    if version:
        assert fetch(KAGGLE + version, URL="http://127.0.0.1:9") == (True, path)


@pytest.mark.parametrize("source", [HF, KAGGLE])
@pytest.mark.parametrize(
    ("status", "login", "expected"),
    [
        (
            401,
            {},
            ["asks who you are (401)", "Create a token at", "Accept the licence"],
        ),
        (
            403,
            {},
            ["asks who you are (403)", "Create a token at", "Accept the licence"],
        ),
        (401, LOGGED_IN, ["does not accept your credentials (401)", "Create a token"]),
        (403, LOGGED_IN, ["licence is not accepted", "Accept the licence at https://"]),
        (404, LOGGED_IN, ["no such model, version or file", "see https://"]),
        (410, LOGGED_IN, ["answered 410", "Try again later"]),
    ],
)
def test_refusals(fetch, hub, source, status, login, expected):
    hub.status = status
    if source == HF and status in (401, 403):
        hub.code = "GatedRepo"
    ok, text = fetch(source, **login)
    assert not ok
    assert text.startswith(f"{source}: ")
    for words in expected:
        assert words in text
    page = "huggingface.co/google/gemma-2b" if source == HF else "models/keras/gemma"
    assert status in (401, 410) or page in text


def test_repository_that_is_private_or_absent(fetch, hub):
    """Hugging Face answers 401 for a name that does not exist, to strangers."""
    hub.status, hub.code = 401, "RepoNotFound"
    ok, text = fetch(HF)
    assert not ok
    assert "asks who you are (401)" in text
    assert "Or the name is wrong" in text
    ok, text = fetch(HF, **LOGGED_IN)
    assert not ok
    assert "no such model, version or file" in text


def test_names_and_revisions_that_do_not_exist(fetch):
    ok, text = fetch(f"{HF}@v9")
    assert not ok
    assert "no such model, version or file" in text
    ok, text = fetch("kaggle://keras/gemma/keras/gemma_3b_en", **LOGGED_IN)
    assert not ok
    assert "no such model, version or file" in text
    ok, text = fetch("kaggle://keras/gemma/nonsense/gemma_2b_en", **LOGGED_IN)
    assert not ok


@pytest.mark.parametrize("source", [HF, KAGGLE])
def test_no_network(fetch, source):
    nobody = "http://127.0.0.1:9"
    ok, text = fetch(source, HF_ENDPOINT=nobody, URL=nobody)
    assert not ok
    assert "could not be reached, or the download broke off" in text
    assert "Check the network" in text


@pytest.mark.slow
@pytest.mark.parametrize("source", [HF, KAGGLE])
def test_download_that_breaks_off(fetch, hub, source):
    hub.truncate = True
    ok, text = fetch(source)
    assert not ok
    assert "the download broke off" in text
    # The next attempt succeeds, and leaves nothing of the broken one.
    hub.truncate = False
    ok, path = fetch(source)
    assert ok, path
    assert (Path(path) / "model.safetensors").read_bytes() == b"x" * 5000


def test_presets_try_each_source_and_report_all(fetch, hub):
    hub.status = 403
    ok, text = fetch("gemma_2b_en")
    assert not ok
    assert text.startswith("gemma_2b_en could not be fetched.")
    assert f"- {KAGGLE}/3: Kaggle asks who you are" in text
    assert f"- {HF}: Hugging Face asks who you are" in text
    hub.status = 200
    ok, path = fetch("gemma_2b_en", URL="http://127.0.0.1:9")
    assert ok
    assert "models--google--gemma-2b" in path
    ok, path = fetch("gemma-2b")
    assert ok
    assert "gemma_2b_en" in path


def test_files_that_the_registry_does_not_know(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(b"another")
    monkeypatch.setattr(registry, "_fetch", lambda source: tmp_path)
    with pytest.warns(UserWarning, match=r"tokenizer\.model is not the file"):
        assert registry.resolve("gemma_2b_en") == tmp_path
    monkeypatch.setattr(
        registry,
        "_names",
        lambda: {
            "x": dataclasses.replace(
                registry.presets()["gemma_2b_en"],
                sha256={"tokenizer.model": hashlib.sha256(b"another").hexdigest()},
            )
        },
    )
    assert registry.resolve("x") == tmp_path


@pytest.mark.parametrize("name", ["kagglehub", "huggingface_hub"])
def test_libraries_that_are_not_installed(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    source = KAGGLE if name == "kagglehub" else HF
    with pytest.raises(SourceError, match=f"pip install {name}"):
        registry.resolve(source)
