"""Pickles, zips, tars, broken or malicious: nothing is run and nothing written.

Each is read as a `.ckpt` file, as a shard of a directory, or inside of a `.nemo`.
"""

import builtins
import gzip
import io
import json
import os
import pathlib
import pickle
import stat
import struct
import tarfile
import tempfile
import zipfile

import numpy as np
import pytest
from hostile import FUZZ, fails, survives
from hypothesis import given
from hypothesis import strategies as st

from gemma_keras.checkpoints import CheckpointError, exporting, open_checkpoint
from gemma_keras.checkpoints.contents import Contents
from gemma_keras.config import GemmaConfig

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.any_backend

CONFIG = GemmaConfig(
    vocab_size=70,
    num_layers=1,
    hidden_dim=24,
    ffn_dim=40,
    num_query_heads=4,
    num_kv_heads=2,
    head_dim=10,
    query_pre_attn_scalar=10,
)
NAME = "model.norm.weight"


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    """Where temporary files go; nothing of them is left at the end."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert not list(folder.iterdir())


@pytest.fixture(scope="module")
def good(files, tmp_path_factory):
    """Whole files of a model: a .ckpt and a .nemo, as bytes."""
    folder = tmp_path_factory.mktemp("good")
    contents = Contents(
        config=CONFIG, tensors=files.weights(CONFIG).__getitem__, dtype="float32"
    )
    paths = {
        "torch": exporting.export(contents, folder / "m.ckpt", "torch"),
        "nemo": exporting.export(contents, folder / "m.nemo", "nemo"),
    }
    found = {name: path.read_bytes() for name, path in paths.items()}
    found["state"] = torch.load(paths["torch"], weights_only=True)["model_state_dict"]
    with tarfile.open(paths["nemo"]) as tar:
        found["members"] = {
            member.name.removeprefix("./"): tar.extractfile(member).read()
            for member in tar
        }
    return found


def zip_bytes(members, change=None, **options):
    """A zip; `change` may edit the `ZipInfo` of a member."""
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", **options) as archive:
        for name, data in members.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = archive.compression
            if change:
                change(info)
            archive.writestr(info, data)
    return memory.getvalue()


def unzip(data):
    """Name to bytes of the members of a zip, the pickle first."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = sorted(archive.namelist(), key=lambda name: "data.pkl" not in name)
        return {name: archive.read(name) for name in names}


def torch_zip(pickled, storages=(b"",)):
    members = {"archive/data.pkl": pickled, "archive/byteorder": b"little"}
    members |= {f"archive/data/{key}": data for key, data in enumerate(storages)}
    return zip_bytes(members | {"archive/version": b"3\n"})


def tar_bytes(members, change=None):
    """A tar of (name, bytes) pairs; `change` may edit each `TarInfo`."""
    memory = io.BytesIO()
    with tarfile.open(fileobj=memory, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if change:
                change(info)
            tar.addfile(info, io.BytesIO(data) if info.isreg() else None)
    return memory.getvalue()


class Evil:
    """What calls a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def evil_pickles(marker):
    """Pickles that would create `marker`, or take much memory, if they were run."""
    touch = f"open({str(marker)!r}, 'w').close()"
    found = {
        f"{name}, protocol {protocol}": pickle.dumps({"x": evil}, protocol)
        for name, evil in {
            "os.system": Evil(os.system, f"touch {marker}"),
            "exec": Evil(builtins.exec, touch),
            "Path.touch": Evil(pathlib.Path.touch, pathlib.Path(marker)),
            "bytearray": Evil(bytearray, 2**40),
        }.items()
        for protocol in (0, 2, 4)
    }
    # The oldest way, which is one instruction.
    found["INST"] = b"(S'touch " + str(marker).encode() + b"'\nios\nsystem\n."
    found["OBJ"] = b"(cos\nsystem\nS'touch " + str(marker).encode() + b"'\no."
    # Behind names that are allowed.
    head = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n0"
    found["after torch"] = head + found["os.system, protocol 2"][2:]
    return found


EVIL = list(evil_pickles("x"))


@pytest.mark.parametrize("form", ["ckpt", "bare", "shard", "nemo"])
@pytest.mark.parametrize("name", EVIL)
def test_pickles_that_run_code(tmp_path, good, form, name):
    marker = tmp_path / "was here"
    pickled = evil_pickles(marker)[name]
    data, path = torch_zip(pickled), tmp_path / "m.ckpt"
    if form == "bare":
        path.write_bytes(pickled)
        fails(path, "is no zip archive")
    elif form == "ckpt":
        path.write_bytes(data)
        fails(path, "asks Python to (run|make)|its pickle cannot be read")
    elif form == "shard":
        index = {"weight_map": {NAME: "a.bin", "embedder.weight": "b.bin"}}
        (tmp_path / "m").mkdir()
        (tmp_path / "m" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        (tmp_path / "m" / "a.bin").write_bytes(good["torch"])
        (tmp_path / "m" / "b.bin").write_bytes(data)
        fails(tmp_path / "m", "asks Python|cannot be read", tmp_path / "m" / "b.bin")
    else:
        path = tmp_path / "m.nemo"
        members = good["members"] | {"model_weights.ckpt": data}
        path.write_bytes(tar_bytes(members.items()))
        fails(path, "asks Python|cannot be read")
    assert not marker.exists()


def test_what_the_check_lets_through_torch_refuses(tmp_path, monkeypatch):
    """The second lock: without ours, `weights_only=True` holds too."""
    from gemma_keras.checkpoints import torch_file

    monkeypatch.setattr(torch_file, "_check_pickle", lambda *_: None)
    marker = tmp_path / "was here"
    for name, pickled in evil_pickles(marker).items():
        if "bytearray" in name:
            continue
        path = tmp_path / "m.ckpt"
        path.write_bytes(torch_zip(pickled))
        fails(path, "torch cannot load its list of tensors")
        assert not marker.exists()


# Pickles that lie


def as_strided(size, stride, offset=0):
    """A state dict in which one tensor has this geometry over 24 floats."""

    class Odd:
        def __reduce__(self):
            storage = torch.ones(24).untyped_storage()
            typed = torch.storage.TypedStorage(
                wrap_storage=storage, dtype=torch.float32, _internal=True
            )
            arguments = typed, offset, size, stride, False, {}
            return torch._utils._rebuild_tensor_v2, arguments

    memory = io.BytesIO()
    torch.save({NAME: Odd(), "embedder.weight": torch.ones(70, 24)}, memory)
    return memory.getvalue()


@pytest.mark.parametrize(
    ("geometry", "match"),
    [
        (((25,), (1,)), "needs bytes 0 to 100 of a storage that has 96"),
        (((24,), (1,), 1), "needs bytes 4 to 100 of a storage that has 96"),
        (((2**40,), (1,)), "of a storage that has 96"),
        (((2**40, 2**10), (0, 0)), "not contiguous|cannot load|too few"),
        (((24,), (0,)), "not contiguous"),
        (((24,), (2,)), "not contiguous"),
        (((-24,), (1,)), "cannot load its list"),
        (((24,), (-1,)), "cannot load its list"),
        (((24,), (1,), -4), "cannot load its list"),
        (((2**62, 2**62), (2**62, 1)), "cannot load its list|of a storage"),
        (((24,), (1, 1)), "cannot load its list"),
        (((), ()), r"has shape \[\]"),
    ],
)
def test_tensors_that_are_larger_than_their_storage(tmp_path, files, geometry, match):
    path = tmp_path / "m.ckpt"
    path.write_bytes(as_strided(*geometry))
    (tmp_path / "config.json").write_text(json.dumps(files.hugging_face_config(CONFIG)))
    match += "|tensors are too few|tensor .* is missing"
    fails(path, match)


def test_storages_that_lie_about_their_size(tmp_path, good):
    """The pickle states more than the archive has; torch would read on."""
    members = unzip(good["torch"])
    (name,) = [name for name, data in members.items() if len(data) == 70 * 24 * 4]
    members[name] = members[name][:-4]
    path = tmp_path / "m.ckpt"
    path.write_bytes(zip_bytes(members))
    fails(path, "needs bytes 0 to 6,720 of a storage that has 6,716")
    del members[name]
    path.write_bytes(zip_bytes(members))
    fails(path, "torch cannot load its list of tensors")


def test_tensors_that_share_their_memory(tmp_path, good):
    """A small file that would be a large model."""
    state = dict(good["state"])
    state[NAME] = state["model.layers.0.input_layernorm.weight"]
    path = tmp_path / "m.ckpt"
    whole = torch.load(io.BytesIO(good["torch"]), weights_only=True)
    torch.save(whole | {"model_state_dict": state}, path)
    fails(path, f"{NAME} is the same memory as model.layers.0.input_layernorm.weight")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ([1, 2], "holds no dict of tensors"),
        ({1: 2}, "holds no dict of tensors"),
        ({}, "it holds no tensors"),
        ({"model_state_dict": {1: torch.ones(3)}}, "names a tensor 1"),
        ({"model_state_dict": {"a": [torch.ones(3)]}}, "it holds no tensors"),
        ({"embedder.weight": torch.ones(9)}, "has no config"),
        ({"state_dict": {}, "gemma_keras": 3}, "not valid JSON"),
        ({"state_dict": {}, "gemma_keras": "["}, "not valid JSON"),
        ({"state_dict": {}, "gemma_keras": "[" * 10**5}, "not valid JSON"),
        ({"a": torch.ones(2).to_sparse()}, "asks Python to run torch._utils._reb"),
        ({"a": torch.ones(2, device="meta")}, "asks Python to run torch._utils._reb"),
        ({"a": np.ones(3)}, "asks Python to run numpy"),
        ({"a": pathlib.Path("x")}, "asks Python to run pathlib"),
    ],
)
def test_contents_that_are_no_weights(tmp_path, content, match):
    path = tmp_path / "m.ckpt"
    torch.save(content, path)
    fails(path, match)


@pytest.mark.parametrize(
    ("pickled", "match"),
    [
        (b"", "pickle cannot be read|cannot load"),
        (b"\x80\x02", "pickle cannot be read"),
        (b"\x80\x02.", "cannot load its list"),
        (b"\x80\x02}.", "it holds no tensors"),
        (b"(" * 10**4 + b".", "cannot load its list"),
        (b"\x80\x02" + b"]" * 10**4 + b"a" * 10**4, "cannot be read|cannot load"),
        (b"\x80\x02X\xff\xff\xff\x7fabc.", "pickle cannot be read"),
        (b"\x80\x02\x8a\xff" + b"\xff" * 255 + b".", "cannot load|holds no dict"),
        (b"\x80\x02U\x07storageQ.", "cannot load its list"),
        (b"\x80\x02(U\x07storageK\x01K\x01K\x01K\x01tQ.", "cannot load its list"),
        (b"x" * (2**20 + 1), "too large for a list of tensors"),
    ],
)
def test_pickles_that_are_none(tmp_path, pickled, match):
    path = tmp_path / "m.ckpt"
    path.write_bytes(torch_zip(pickled))
    fails(path, match)


# Zips


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../../outside",
        "archive/../../outside",
        "archive/data/../0",
        "C:/x",
        "archive\\data\\9",
        "data.pkl/",
        "outside",
        "archive/data/a\nb",
    ],
)
def test_zip_members_that_lead_elsewhere(tmp_path, good, name):
    path = tmp_path / "in" / "m.ckpt"
    path.parent.mkdir()
    path.write_bytes(zip_bytes(unzip(good["torch"]) | {name: b"x" * 8}))
    before = sorted(tmp_path.rglob("*"))
    fails(path, "has a name that torch does not give|no data.pkl")
    assert sorted(tmp_path.rglob("*")) == before


def test_zip_members_that_are_links_or_there_twice(tmp_path, good):
    path = tmp_path / "m.ckpt"
    members = unzip(good["torch"])

    def link(info):
        if info.filename == "archive/data/0":
            info.external_attr = (stat.S_IFLNK | 0o777) << 16

    path.write_bytes(zip_bytes(members, link))
    fails(path, "'archive/data/0' is a link, compressed or encrypted")
    memory = io.BytesIO(good["torch"])
    with pytest.warns(UserWarning), zipfile.ZipFile(memory, "a") as archive:
        archive.writestr("archive/data/0", b"x" * 8)
    path.write_bytes(memory.getvalue())
    fails(path, "'archive/data/0' is there twice")


def test_zips_that_are_compressed(tmp_path, good):
    path = tmp_path / "m.ckpt"
    members = unzip(good["torch"]) | {"archive/data/0": bytes(2**26)}
    path.write_bytes(zip_bytes(members, compression=zipfile.ZIP_DEFLATED))
    fails(path, "is a link, compressed or encrypted")


def patched(data, name, field, value):
    """A zip in whose list of contents one number of a member is another."""
    offset, code = {
        "flags": (8, "<H"),
        "method": (10, "<H"),
        "packed": (20, "<L"),
        "size": (24, "<L"),
        "place": (42, "<L"),
    }[field]
    data = bytearray(data)
    at = data.index(b"PK\x01\x02")
    while data[at + 46 : at + 46 + len(name)] != name.encode():
        at = data.index(b"PK\x01\x02", at + 1)
    struct.pack_into(code, data, at + offset, value)
    return bytes(data)


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("flags", 1, "compressed or encrypted"),
        ("method", 8, "compressed or encrypted"),
        ("packed", 7, "compressed or encrypted"),
        ("size", 2**31, "compressed or encrypted"),
        ("place", 2**31, "is not where the archive says"),
        ("place", 1, "is not where the archive says"),
        ("place", 0, "has another name where it lies|which are not its own"),
    ],
)
def test_zips_whose_list_of_contents_lies(tmp_path, good, field, value, match):
    path = tmp_path / "m.ckpt"
    path.write_bytes(patched(good["torch"], "archive/data/3", field, value))
    fails(path, match)
    # The same of both sizes: a member of absurd size.
    both = patched(good["torch"], "archive/data/3", "packed", 2**31)
    path.write_bytes(patched(both, "archive/data/3", "size", 2**31))
    fails(path, "states bytes .* which are not its own")


def test_zips_with_absurd_lists_of_contents(tmp_path, good):
    path = tmp_path / "m.ckpt"
    # 50,000 members; and lists that are longer than the file.
    members = {f"archive/data/{n}": b"" for n in range(50_000)}
    path.write_bytes(zip_bytes(members))
    fails(path, r"broken zip archive \(.* are too many")
    data = bytearray(good["torch"])
    end = data.rindex(b"PK\x05\x06")
    for value in (2**32 - 2, 2**31):
        struct.pack_into("<L", data, end + 12, value)
        path.write_bytes(bytes(data))
        fails(path, "broken zip archive")


@pytest.mark.parametrize(
    ("members", "match"),
    [
        ({"word/document.xml": b"<x/>"}, "not one of torch.save"),
        ({"archive/data.pkl": b".", "b/data.pkl": b"."}, "not one of torch.save"),
        ({"a/b/data.pkl": b"."}, "not one of torch.save"),
        ({"a/data.pkl": b"\x80\x02}.", "a/constants.pkl": b""}, "TorchScript"),
        ({"a/data.pkl": b"\x80\x02}.", "a/byteorder": b"big"}, "big-endian"),
    ],
)
def test_zips_that_torch_save_did_not_write(tmp_path, members, match):
    path = tmp_path / "m.ckpt"
    path.write_bytes(zip_bytes(members))
    fails(path, match)


@pytest.mark.parametrize("form", ["torch", "nemo"])
def test_files_cut_anywhere(tmp_path, good, form):
    path = tmp_path / "m"
    data = good[form]
    cuts = {len(data) - 1, len(data) - 30, *range(600, len(data), len(data) // 25)}
    for cut in sorted(cuts):
        path.write_bytes(data[:cut])
        if form == "torch" or cut < len(data) - 1024:
            fails(path, "broken|cut short|no zip archive|is no .nemo")
        else:
            # What ends a tar may be lost.
            survives(path)


# Tars


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../outside", "./a/../../outside", "..", "a\\..\\b"]
)
def test_tar_members_that_lead_elsewhere(tmp_path, good, name):
    path = tmp_path / "in" / "m.nemo"
    path.parent.mkdir()
    path.write_bytes(tar_bytes([*good["members"].items(), (name, b"x")]))
    before = sorted(tmp_path.rglob("*"))
    fails(path, "has a name that leads elsewhere")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "kind",
    [
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.CHRTYPE,
        tarfile.BLKTYPE,
        tarfile.FIFOTYPE,
        tarfile.GNUTYPE_SPARSE,
    ],
)
def test_tar_members_that_are_no_files(tmp_path, good, kind):
    def change(info):
        if info.name == "model_weights.ckpt":
            info.type, info.linkname, info.size = kind, "/etc/passwd", 0

    path = tmp_path / "m.nemo"
    path.write_bytes(tar_bytes(good["members"].items(), change))
    before = sorted(tmp_path.rglob("*"))
    fails(path, "is no plain file or directory|broken tar archive")
    assert sorted(tmp_path.rglob("*")) == before


def test_tar_members_that_are_there_twice(tmp_path, good):
    path = tmp_path / "m.nemo"
    again = ("./model_weights.ckpt", good["members"]["model_weights.ckpt"])
    path.write_bytes(tar_bytes([*good["members"].items(), again]))
    fails(path, "its member model_weights.ckpt is there twice")


@pytest.mark.parametrize("size", [2**33, 2**62, 2**20])
def test_tar_members_of_absurd_size(tmp_path, good, size):
    path = tmp_path / "m.nemo"
    info = tarfile.TarInfo("./model_weights.ckpt")
    info.size = size
    head = tar_bytes([("model_config.yaml", good["members"]["model_config.yaml"])])
    head = head[: head.index(bytes(1024))]
    head += bytes(-len(head) % 512)
    path.write_bytes(head + info.tobuf(tarfile.GNU_FORMAT) + b"x" * 4096)
    fails(path, "cut short or wrong|broken tar archive")


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K"])
def test_tar_headers_that_want_much_memory(tmp_path, kind):
    """A header whose text is as long as the file, which is mostly a hole."""
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, 2**34
    path = tmp_path / "m.nemo"
    with path.open("wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.truncate(2**34 + 2048)
    fails(path, "broken tar archive .*are too many")


def test_tars_without_what_nemo_needs(tmp_path, good, monkeypatch):
    path = tmp_path / "m.nemo"
    members = good["members"]
    path.write_bytes(bytes(4096))
    fails(path, "is an empty archive, or no tar at all")
    path.write_bytes(tar_bytes([("notes.txt", b"hello")]))
    fails(path, "has no model_config.yaml; it is no .nemo archive. It holds notes.txt")
    path.write_bytes(tar_bytes([("model_config.yaml", members["model_config.yaml"])]))
    fails(path, "has no model_weights.ckpt")
    monkeypatch.setattr("gemma_keras.checkpoints.nemo_archive._MAX_MEMBERS", 20)
    path.write_bytes(tar_bytes((f"a{n}", b"") for n in range(21)))
    fails(path, "has too many members")
    path.write_bytes(tar_bytes((members | {"x_tokenizer.model": b"no"}).items()))
    with (
        open_checkpoint(path) as checkpoint,
        pytest.raises(CheckpointError, match=r"x_tokenizer\.model"),
    ):
        checkpoint.tokenizer()


def test_compressed_tars_that_are_bombs_or_broken(tmp_path, good, scratch):
    path = tmp_path / "m.nemo"
    whole = gzip.compress(good["nemo"], compresslevel=1)
    for cut in (10, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:cut])
        fails(path, "cannot be unpacked")
    path.write_bytes(whole[:100] + b"x" * 50 + whole[150:])
    fails(path, "cannot be unpacked|broken|cut short|wrong")
    bomb = gzip.compress(bytes(2**26), compresslevel=9)
    path.write_bytes(bomb)
    fails(path, "unpacks to more than .* bytes, which is more than weights do")
    assert not list(scratch.iterdir())


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"", "must hold a mapping"),
        (b"[1, 2]", "must hold a mapping"),
        (b"a: [", "not valid YAML"),
        (b"\xff\xfe\xfa", "not valid YAML"),
        (b"[" * 500, "not valid YAML|must hold"),
        (b"[" * 501, "has too many brackets"),
        (b"- " * 10_000, "not valid YAML"),
        (b"? " * 10_000, "not valid YAML"),
        (b"a: !!python/object/apply:os.system ['touch here']", "not valid YAML"),
        (b"a: !!python/name:os.system", "not valid YAML"),
        (b"a: &x [1]\nb: *x", "it has aliases"),
        (
            b"a0: &a0 {k: 1}\n"
            + b"".join(
                b"a%d: &a%d {<<: [%s]}\n" % (n, n, b", ".join([b"*a%d" % (n - 1)] * 9))
                for n in range(1, 12)
            ),
            "it has aliases",
        ),
        (b"num_layers: " + b"9" * 5000, "not valid YAML|must be"),
        (b"mcore_gpt: 2024-01-01", r"mcore_gpt is datetime\.date\(2024, 1, 1\)"),
        (b"x" * (2**18 + 1), "are too many for it"),
    ],
)
def test_yaml_that_is_hostile(tmp_path, monkeypatch, good, text, match):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "m.nemo"
    members = good["members"] | {"model_config.yaml": text}
    path.write_bytes(tar_bytes(members.items()))
    fails(path, match)
    assert not (tmp_path / "here").exists()


# Anything


@FUZZ
@given(
    form=st.sampled_from(["torch", "nemo"]),
    edits=st.lists(
        st.tuples(st.integers(0, 2**20), st.integers(0, 255)), min_size=1, max_size=6
    ),
)
def test_edited_bytes(tmp_path, good, form, edits):
    """Where the lists of contents and the pickles lie, and anywhere else."""
    data = bytearray(good[form])
    for number, (position, value) in enumerate(edits):
        # Half of them near the end, where zips keep their lists.
        span = len(data) if number % 2 else min(3000, len(data))
        data[len(data) - 1 - position % span] = value
    path = tmp_path / "m"
    path.write_bytes(bytes(data))
    survives(path)


@FUZZ
@given(st.binary(max_size=300))
def test_random_pickles(tmp_path, data):
    path = tmp_path / "m.ckpt"
    path.write_bytes(torch_zip(b"\x80\x02" + data))
    survives(path)
