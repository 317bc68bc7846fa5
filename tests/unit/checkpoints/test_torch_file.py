"""Files of torch.save: what torch reads of ours, and what we read of torch's."""

import collections
import io
import zipfile

import ml_dtypes
import numpy as np
import pytest

from gemma_keras.checkpoints import CheckpointError, torch_file_writer
from gemma_keras.checkpoints.torch_file import TorchFile
from gemma_keras.checkpoints.torch_file_writer import Tensor, write_archive

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.any_backend

SHAPES = {
    "float32": (30, 7),
    "float16": (5,),
    "bfloat16": (3, 4, 5),
    "float64": (9,),
    "int8": (6, 3),
    "uint8": (1,),
}


def arrays():
    random = np.random.default_rng(0)
    found = {}
    for name, shape in SHAPES.items():
        dtype = ml_dtypes.bfloat16 if name == "bfloat16" else name
        found[name] = (50 * random.random(shape)).astype(dtype)
    return found


def bits(tensor):
    """The bytes of a torch tensor, also of one that numpy has no type for."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def write(path, before=b""):
    """Writes the arrays, each in two blocks, behind some other bytes."""
    given = arrays()
    tensors = {name: Tensor(name, array.shape) for name, array in given.items()}
    names = {id(tensor): name for name, tensor in tensors.items()}

    def blocks(tensor):
        array = given[names[id(tensor)]]
        yield array[:1]
        # As a strided view, too.
        yield np.asfortranarray(array[1:])

    content = {"model_state_dict": tensors, "note": "hello", "steps": 300, "none": None}
    with path.open("wb") as file:
        file.write(before)
        write_archive(file, content.copy, list(tensors.values()), blocks)
    return given


@pytest.mark.parametrize("long", [False, True], ids=["short", "zip64"])
@pytest.mark.parametrize("mmap", [False, True], ids=["read", "mapped"])
def test_torch_reads_what_is_written(tmp_path, monkeypatch, long, mmap):
    if long:
        # The header that members of more than 2 GB get.
        monkeypatch.setattr(torch_file_writer, "_LONG", 1)
    path = tmp_path / "m.ckpt"
    given = write(path)
    found = torch.load(path, weights_only=True, mmap=mmap)
    assert (found["note"], found["steps"], found["none"]) == ("hello", 300, None)
    for name, array in given.items():
        tensor = found["model_state_dict"][name]
        assert (str(tensor.dtype), tuple(tensor.shape)) == (
            f"torch.{name}",
            array.shape,
        )
        assert bits(tensor) == array.tobytes()
        if mmap:
            assert tensor.data_ptr() % 64 == 0
    with zipfile.ZipFile(path) as archive:
        # All checksums are right, and nothing is compressed.
        assert archive.testzip() is None
        assert {member.compress_type for member in archive.infolist()} == {0}


def test_an_archive_inside_of_a_file_is_read_there(tmp_path):
    path = tmp_path / "m.bin"
    given = write(path, before=b"x" * 1536)
    size = path.stat().st_size - 1536
    with path.open("ab") as file:
        file.write(b"y" * 100)
    inside = path.read_bytes()[1536 : 1536 + size]
    assert torch.load(io.BytesIO(inside), weights_only=True)["note"] == "hello"
    opened = TorchFile(path, 1536, size, name="that one")
    assert opened.extras == {"note": "hello", "steps": 300, "none": None}
    for name, array in given.items():
        if array.nbytes < 4:
            assert opened.missing(name).endswith("too small to be a weight.")
            continue
        assert (opened.dtype(name), opened.shapes[name]) == (name, array.shape)
        assert opened.tensor(name).tobytes() == array.tobytes()
    half = opened.tensor("float32", (10, 13))
    assert half.tobytes() == given["float32"][10:13].tobytes()
    opened.close()


@pytest.mark.parametrize("key", ["model_state_dict", "state_dict", None])
def test_what_torch_writes_is_read(tmp_path, key):
    given = arrays()
    state = collections.OrderedDict(
        (name, torch.from_numpy(array.astype(np.float32)))
        for name, array in given.items()
    )
    state["parameter"] = torch.nn.Parameter(torch.arange(12.0).half().reshape(4, 3))
    state["table"] = torch.ones(7, 2, dtype=torch.complex64)
    state["count"] = torch.tensor(3)
    state["nothing"] = None
    torch.save({key: state, "epoch": 4} if key else state, tmp_path / "m.bin")
    opened = TorchFile(tmp_path / "m.bin")
    assert opened.extras == ({"epoch": 4} if key else {})
    for name, array in given.items():
        assert opened.tensor(name).tobytes() == array.astype(np.float32).tobytes()
    assert opened.dtype("parameter") == "float16"
    np.testing.assert_array_equal(
        opened.tensor("parameter"), np.arange(12).reshape(4, 3)
    )
    assert opened.missing("table") == "table is complex64."
    assert opened.missing("count") == "count is int64."
    assert opened.missing("absent") == "the tensor absent is missing."
    opened.close()


def test_views_of_one_memory(tmp_path):
    whole = torch.arange(40.0).reshape(10, 4)
    state = {"first": whole[:4], "second": whole[4:], "again": whole[4:]}
    torch.save(state | {"turned": torch.ones(3, 4).T}, tmp_path / "m.pt")
    opened = TorchFile(tmp_path / "m.pt")
    np.testing.assert_array_equal(opened.tensor("first"), whole[:4])
    np.testing.assert_array_equal(opened.tensor("second"), whole[4:])
    assert opened.aliases == {"again": "second"}
    assert opened.same_bytes("again", "second")
    assert not opened.same_bytes("first", "second")
    assert not opened.same_bytes("first", "absent")
    assert opened.missing("turned").startswith("turned is not contiguous; save it")
    opened.close()
    torch.save({"all": whole, "part": whole[4:]}, tmp_path / "o.pt")
    with pytest.raises(CheckpointError, match=r"o\.pt: part overlaps all"):
        TorchFile(tmp_path / "o.pt")


def test_a_file_without_torch_names_what_to_install(tmp_path, monkeypatch):
    write(tmp_path / "m.ckpt")
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(CheckpointError, match=r"m\.ckpt: needs .*pip install torch"):
        TorchFile(tmp_path / "m.ckpt")
    with pytest.raises(CheckpointError, match="pip install torch"):
        write(tmp_path / "n.ckpt")
