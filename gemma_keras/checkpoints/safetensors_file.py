"""One safetensors file: an eight-byte length, a JSON header, then the tensors' bytes.

Parsed here because the library's NumPy reader copies every tensor. The
checks are those of the library: the header is bounded and its tensors tile the data
exactly, without overlap, gap or remainder.
"""

import json
import math
import struct

import numpy as np

from gemma_keras.checkpoints.checkpoint import CheckpointError, parse_json
from gemma_keras.checkpoints.mapped_file import FLOAT_DTYPES, MappedFile
from gemma_keras.checkpoints.pieces import write_array

MAX_HEADER_BYTES = 100_000_000
_ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# What weights of few bits are kept in.
_CODES = {"U8": "uint8", "I8": "int8"}
_DTYPES = FLOAT_DTYPES | {name: np.dtype(name) for name in _CODES.values()}


class SafetensorsFile:
    """An open, validated safetensors file.

    Attributes:
        shapes: tensor name to its shape.
        metadata: the header's string-to-string metadata.
    """

    def __init__(self, path):
        self._file = MappedFile(path)
        self.path = self._file.path
        try:
            header = self._read_header()
            metadata = header.pop("__metadata__", {})
            self.metadata = metadata if isinstance(metadata, dict) else {}
            self._entries = {
                name: self._entry(name, entry) for name, entry in header.items()
            }
            self._check_tiling()
        except BaseException:
            self.close()
            raise
        self.shapes = {name: entry[1] for name, entry in self._entries.items()}

    def _read_header(self):
        prefix = self._file.read(0, 8)
        if len(prefix) < 8:
            raise CheckpointError(
                f"{self.path}: {self._file.size} bytes are no safetensors file."
            )
        (length,) = struct.unpack("<Q", prefix)
        if length > MAX_HEADER_BYTES or length > self._file.size - 8:
            raise CheckpointError(
                f"{self.path}: states a header of {length:,} bytes in a file of "
                f"{self._file.size:,}; it is cut short or no safetensors file."
            )
        self._data_start = 8 + length
        return parse_json(self._file.read(8, length), f"{self.path} (header)")

    def _entry(self, name, entry):
        where = f"{self.path}: {name}"
        if not isinstance(entry, dict):
            raise CheckpointError(f"{where}: its header entry is not an object.")
        dtype, shape = entry.get("dtype"), entry.get("shape")
        offsets = entry.get("data_offsets")
        if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
            raise CheckpointError(f"{where}: has the unknown dtype {dtype!r}.")
        if not _counts(shape):
            raise CheckpointError(f"{where}: has the invalid shape {shape!r}.")
        if not _counts(offsets) or len(offsets) != 2:
            raise CheckpointError(f"{where}: has the invalid offsets {offsets!r}.")
        start, stop = offsets
        expected = math.prod(shape) * _ITEM_BYTES[dtype]
        if stop - start != expected:
            raise CheckpointError(
                f"{where}: {dtype} {shape} takes {expected:,} bytes, but its offsets "
                f"{offsets} span {stop - start:,}."
            )
        return dtype, tuple(shape), start, stop

    def _check_tiling(self):
        reached = 0
        spans = sorted(
            (start, stop, name) for name, (_, _, start, stop) in self._entries.items()
        )
        for start, stop, name in spans:
            if start != reached:
                raise CheckpointError(
                    f"{self.path}: {name} begins at byte {start:,} of the data, but "
                    f"the tensor before it ends at {reached:,}."
                )
            reached = stop
        held = self._file.size - self._data_start
        if reached != held:
            raise CheckpointError(
                f"{self.path}: its tensors take {reached:,} bytes, but the file "
                f"holds {held:,}; it is {'cut short' if reached > held else 'wrong'}."
            )

    def float_dtype(self, name):
        """The tensor's dtype in NumPy's words; an error if it is not a float's."""
        dtype = self._entries[name][0]
        if dtype not in _FLOATS:
            raise CheckpointError(
                f"{self.path}: {name} is {dtype}; weights must be one of "
                f"{', '.join(_FLOATS)}. Is this a quantised checkpoint?"
            )
        return _FLOATS[dtype]

    def dtype(self, name):
        """The tensor's dtype in NumPy's words: a float's, int8 or uint8; else None."""
        return (_FLOATS | _CODES).get(self._entries[name][0])

    def tensor(self, name):
        """The tensor of floats as a view of the mapped file."""
        self.float_dtype(name)
        return self.array(name)

    def array(self, name):
        """The tensor, of a dtype that `dtype` knows, as a view of the mapped file."""
        _, shape, start, _ = self._entries[name]
        dtype = _DTYPES[self.dtype(name)]
        return self._file.array(self._data_start + start, dtype, shape, name)

    def same_bytes(self, name, other, other_name):
        """Whether two tensors hold the same numbers in the same dtype and shape."""
        mine, theirs = self._entries[name], other._entries[other_name]
        if mine[:2] != theirs[:2]:
            return False
        step = 2**24
        for done in range(0, mine[3] - mine[2], step):
            count = min(step, mine[3] - mine[2] - done)
            here = self._file.read(self._data_start + mine[2] + done, count)
            there = other._file.read(other._data_start + theirs[2] + done, count)
            if here != there:
                return False
        return True

    def close(self):
        """Closes the file; arrays keep their own mappings."""
        self._file.close()


def write(path, shapes, dtype, tensor, metadata=None):
    """Writes a safetensors file, one tensor at a time.

    Args:
        path: Where to.
        shapes: Tensor name to its shape, in the order in which they are written.
        dtype: The float dtype of all of them, in NumPy's words; or name to dtype,
            floats, int8 or uint8.
        tensor: A function from a name to its array, of that dtype and shape.
        metadata: Strings by name for the header.
    """
    codes = {name: code for code, name in (_FLOATS | _CODES).items()}
    dtypes = dtype if isinstance(dtype, dict) else dict.fromkeys(shapes, dtype)
    entries, offset = {}, 0
    for name, shape in shapes.items():
        stop = offset + math.prod(shape) * _DTYPES[dtypes[name]].itemsize
        entries[name] = {
            "dtype": codes[dtypes[name]],
            "shape": list(shape),
            "data_offsets": [offset, stop],
        }
        offset = stop
    # transformers refuses files that do not say which library's tensors they hold.
    told = {"format": "pt", **(metadata or {})}
    header = json.dumps({"__metadata__": told, **entries}).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for name in shapes:
            write_array(file, tensor(name))


def _counts(values):
    return isinstance(values, list) and all(
        isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
        for value in values
    )
