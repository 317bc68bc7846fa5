"""Writes a file that `torch.load(weights_only=True, mmap=True)` reads, in one pass.

`torch.save` wants all tensors at once. Here the pickle is made of names and shapes, and
the storages follow one at a time, each where torch puts it: as it is, 64 bytes aligned.
"""

import collections
import contextlib
import io
import math
import pickle
import struct
import zipfile

import numpy as np

from gemma_keras.checkpoints.mapped_file import FLOAT_DTYPES
from gemma_keras.checkpoints.pieces import write_array
from gemma_keras.checkpoints.torch_file import torch_library

ALIGNMENT = 64
# torch pads in an extra field of this name.
_PADDING = 0x4246
_LOCAL_HEADER, _ZIP64_FIELD = 30, 20
# Members of this many bytes may need a longer header.
_LONG = 2**31
_FOLDER = "archive"
_STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
}


def nbytes(dtype, shape):
    """Bytes of an array, its dtype in NumPy's words."""
    return math.prod(shape) * (FLOAT_DTYPES.get(dtype) or np.dtype(dtype)).itemsize


def write_archive(file, content, tensors, blocks):
    """Writes one archive.

    Args:
        file: A binary file that can seek, open for writing. The archive begins where
            it stands, and it is left standing at the end.
        content: A function that gives what `torch.load` is to give, dicts of text,
            numbers and `Tensor`s; called when the tensors are written.
        tensors: The `Tensor`s, in the order in which they are written.
        blocks: A function from a `Tensor` to arrays of its dtype whose numbers follow
            one another; each is let go of before the next is asked for.
    """
    torch = torch_library("Writing files of torch.save")
    with zipfile.ZipFile(_Onwards(file), "w", allowZip64=True) as archive:
        names = {id(tensor): str(number) for number, tensor in enumerate(tensors)}
        for tensor in tensors:
            count = nbytes(tensor.dtype, tensor.shape)
            with _member(archive, f"data/{names[id(tensor)]}", count) as member:
                for block in blocks(tensor):
                    write_array(member, block)
        _add(archive, "data.pkl", _pickled(content(), names, torch))
        _add(archive, "byteorder", b"little")
        _add(archive, "version", b"3\n")


class Tensor:
    """A tensor that is to be written: its dtype in NumPy's words, and its shape."""

    def __init__(self, dtype, shape):
        self.dtype = dtype
        self.shape = tuple(shape)


def _pickled(content, names, torch):
    """The pickle of `content`, in which tensors are as torch pickles them."""

    class _Pickler(pickle.Pickler):
        def persistent_id(self, thing):
            return thing.identity if isinstance(thing, _Storage) else None

        def reducer_override(self, thing):
            if not isinstance(thing, Tensor):
                return NotImplemented
            kind = getattr(torch, _STORAGES[thing.dtype])
            count = math.prod(thing.shape)
            storage = _Storage(("storage", kind, names[id(thing)], "cpu", count))
            strides = _strides(thing.shape)
            hooks = collections.OrderedDict()
            arguments = storage, 0, thing.shape, strides, False, hooks
            return torch._utils._rebuild_tensor_v2, arguments

    memory = io.BytesIO()
    _Pickler(memory, protocol=2).dump(content)
    return memory.getvalue()


class _Storage:
    """What torch writes in place of a storage."""

    def __init__(self, identity):
        self.identity = identity


def _strides(shape):
    """Numbers from one index of each axis to the next, in C order."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _add(archive, name, data):
    with _member(archive, name, len(data)) as member:
        member.write(data)


@contextlib.contextmanager
def _member(archive, name, count):
    """A member of `count` bytes that begins on a border of 64 bytes, for writing."""
    info = zipfile.ZipInfo(f"{_FOLDER}/{name}")
    long = count >= _LONG
    start = archive.start_dir + _LOCAL_HEADER + len(info.filename)
    start += 4 + (_ZIP64_FIELD if long else 0)
    padding = -start % ALIGNMENT
    info.extra = struct.pack("<HH", _PADDING, padding) + b"Z" * padding
    with archive.open(info, "w", force_zip64=long) as member:
        yield member


class _Onwards:
    """A file, from where it stands on, as zipfile wants to write one."""

    def __init__(self, file):
        self._file = file
        self._start = file.tell()

    def tell(self):
        return self._file.tell() - self._start

    def seek(self, offset, whence=io.SEEK_SET):
        start = self._start if whence == io.SEEK_SET else 0
        return self._file.seek(start + offset, whence) - self._start

    def seekable(self):
        return True

    def write(self, data):
        return self._file.write(data)

    def flush(self):
        self._file.flush()
