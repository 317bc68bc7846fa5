"""One GGUF file: typed key-value pairs, a list of tensors, then their bytes.

The header is parsed here and not by the `gguf` package, whose reader trusts every
length it meets; that package decodes the quantised blocks.
"""

import math
import struct

import numpy as np

from gemma_keras.checkpoints.checkpoint import CheckpointError
from gemma_keras.checkpoints.mapped_file import FLOAT_DTYPES, MappedFile

_STRING, _ARRAY = 8, 9
# GGUF value type to the struct code of its one scalar.
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_FLOAT_TYPES = {0: "float32", 1: "float16", 30: "bfloat16"}
_MAX_DIMS = 4
# Numbers decoded at once: small enough to stay in the processor's cache.
_CHUNK = 2**17


class GGUFFile:
    """An open, validated GGUF file.

    Attributes:
        fields: key to value; arrays are NumPy arrays, or lists of bytes for strings.
        shapes: tensor name to its shape as NumPy sees it (slowest axis first).
    """

    def __init__(self, path):
        self._file = MappedFile(path)
        self.path = self._file.path
        self._blocks = {}
        try:
            if self._file.read(0, 4) != b"GGUF":
                raise CheckpointError(f"{self.path}: is not a GGUF file.")
            with self._file.view() as header:
                self.fields, infos, end = _parse(header, self.path)
            start = self._data_start(end)
            self._tensors = {
                name: self._tensor_entry(name, *info, start) for name, info in infos
            }
            if len(self._tensors) != len(infos):
                raise CheckpointError(f"{self.path}: names a tensor twice.")
            self._check_overlaps()
        except BaseException:
            self.close()
            raise
        self.shapes = {name: entry[1] for name, entry in self._tensors.items()}

    def _data_start(self, end):
        alignment = self.fields.get("general.alignment", 32)
        power = isinstance(alignment, int) and 8 <= alignment <= 2**16
        if not power or alignment & (alignment - 1):
            raise CheckpointError(
                f"{self.path}: general.alignment {alignment!r} is not a power of two "
                "from 8 to 65536."
            )
        return -(-end // alignment) * alignment

    def _tensor_entry(self, name, shape, kind, offset, start):
        where = f"{self.path}: {name}"
        if kind not in self._blocks:
            self._blocks[kind] = _block_size(kind, where)
        block, size = self._blocks[kind]
        if not shape or shape[-1] % block:
            raise CheckpointError(
                f"{where}: rows of {shape[-1:]} numbers do not divide into blocks of "
                f"{block}."
            )
        count = math.prod(shape) // block * size
        if start + offset + count > self._file.size:
            raise CheckpointError(
                f"{where}: lies at bytes {start + offset:,} to "
                f"{start + offset + count:,} of a file of {self._file.size:,}; it is "
                "cut short or wrong."
            )
        return kind, shape, start + offset, count

    def _check_overlaps(self):
        reached, before = 0, None
        for name, (_, _, start, count) in sorted(
            self._tensors.items(), key=lambda item: item[1][2:]
        ):
            if start < reached:
                raise CheckpointError(f"{self.path}: {name} overlaps {before}.")
            reached, before = start + count, name

    def float_dtype(self, name):
        """The tensor's float dtype, or None if it is quantised."""
        return _FLOAT_TYPES.get(self._tensors[name][0])

    def type_name(self, name):
        """The tensor's type in GGUF's words, such as `Q4_K`."""
        kind = self._tensors[name][0]
        plain = {0: "F32", 1: "F16", 30: "BF16"}
        return plain.get(kind) or _gguf(self.path).GGMLQuantizationType(kind).name

    def tensor(self, name, dtype):
        """The tensor: a view where it is stored as floats, else decoded.

        Args:
            name: A key of `shapes`.
            dtype: Name of the float dtype that quantised tensors are decoded to.
        """
        kind, shape, start, count = self._tensors[name]
        if kind in _FLOAT_TYPES:
            stored = FLOAT_DTYPES[_FLOAT_TYPES[kind]]
            return self._file.array(start, stored, shape, name)
        raw = self._file.array(start, np.dtype(np.uint8), (count,), name)
        block, size = self._blocks[kind]
        result = np.empty(shape, FLOAT_DTYPES[dtype])
        flat = result.reshape(-1)
        step = max(_CHUNK // block, 1)
        # Hostile scales may overflow; whether weights are finite is asked later.
        with np.errstate(all="ignore"):
            for first in range(0, count // size, step):
                chunk = raw[first * size : (first + step) * size]
                part = _decode(chunk, kind, self.path)
                flat[first * block : first * block + part.size] = part
        return result

    def same_bytes(self, name, other):
        """Whether two tensors of this file hold the same stored numbers."""
        kind, shape, start, count = self._tensors[name]
        other_kind, other_shape, other_start, _ = self._tensors[other]
        if (kind, shape) != (other_kind, other_shape):
            return False
        with self._file.view() as view:
            step = 2**24
            return all(
                view[start + done : start + min(done + step, count)]
                == view[other_start + done : other_start + min(done + step, count)]
                for done in range(0, count, step)
            )

    def close(self):
        """Closes the file; arrays keep their own mappings."""
        self._file.close()


def _gguf(path):
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(
            f"{path}: is quantised, and decoding it needs the gguf package: "
            "pip install gguf"
        ) from error
    return gguf


def _block_size(kind, where):
    """(numbers, bytes) of one block of a tensor type that can be decoded."""
    if kind in _FLOAT_TYPES:
        return 1, FLOAT_DTYPES[_FLOAT_TYPES[kind]].itemsize
    gguf = _gguf(where)
    try:
        kind = gguf.GGMLQuantizationType(kind)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        gguf.quants.dequantize(np.zeros((1, size), np.uint8), kind)
    except (ValueError, KeyError, NotImplementedError) as error:
        name = getattr(kind, "name", kind)
        raise CheckpointError(
            f"{where}: tensor type {name} cannot be decoded by the installed gguf "
            "package."
        ) from error
    return block, size


def _decode(raw, kind, path):
    """Decodes whole blocks to a flat float32 array."""
    gguf = _gguf(path)
    # As one row, which the package decodes in one step.
    rows = raw.reshape(1, -1)
    return gguf.quants.dequantize(rows, gguf.GGMLQuantizationType(kind)).reshape(-1)


def _parse(header, path):
    """(fields, [(name, (shape, type, offset))], end of the header)."""
    cursor = _Cursor(header, path)
    cursor.skip(4)
    version = cursor.scalar("I")
    if version not in (2, 3):
        swapped = struct.unpack(">I", struct.pack("<I", version))[0]
        reason = " (a big-endian file)" if swapped in (2, 3) else ""
        raise CheckpointError(
            f"{path}: GGUF version {version}{reason} is not supported; 2 and 3 are."
        )
    num_tensors, num_fields = cursor.scalar("Q"), cursor.scalar("Q")
    fields = {}
    for _ in range(num_fields):
        key = cursor.text()
        if key in fields:
            raise CheckpointError(f"{path}: gives the key {key!r} twice.")
        cursor.where = key
        fields[key] = cursor.value(cursor.scalar("I"))
    infos = []
    for _ in range(num_tensors):
        name = cursor.text()
        cursor.where = name
        dims = cursor.scalar("I")
        if dims > _MAX_DIMS:
            raise CheckpointError(f"{path}: {name}: has {dims} axes.")
        shape = tuple(cursor.scalar("Q") for _ in range(dims))[::-1]
        infos.append((name, (shape, cursor.scalar("I"), cursor.scalar("Q"))))
    return fields, infos, cursor.position


class _Cursor:
    """Reads the header in order, never beyond its end."""

    def __init__(self, data, path):
        self.data = data
        self.path = path
        self.position = 0
        self.where = "header"

    def skip(self, count):
        start = self.position
        if count > len(self.data) - start:
            raise CheckpointError(
                f"{self.path}: {self.where}: needs {count:,} bytes at byte {start:,} "
                f"of {len(self.data):,}; the file is cut short or wrong."
            )
        self.position = start + count
        return start

    def scalar(self, code):
        start = self.skip(struct.calcsize("<" + code))
        return struct.unpack_from("<" + code, self.data, start)[0]

    def string(self):
        count = self.scalar("Q")
        start = self.skip(count)
        return self.data[start : start + count]

    def text(self):
        try:
            return self.string().decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(
                f"{self.path}: {self.where}: is followed by a name that is not UTF-8."
            ) from error

    def value(self, kind):
        if kind == _STRING:
            return self.string().decode(errors="replace")
        if kind == _ARRAY:
            return self.array(self.scalar("I"), self.scalar("Q"))
        return self.scalar(self.code(kind))

    def array(self, kind, count):
        if kind == _STRING:
            return [self.string() for _ in range(count)]
        code = self.code(kind)
        start = self.skip(struct.calcsize("<" + code) * count)
        return np.frombuffer(self.data, "<" + code, count, start).copy()

    def code(self, kind):
        if kind not in _SCALARS:
            raise CheckpointError(
                f"{self.path}: {self.where}: has the value type {kind}, which is not "
                "supported."
            )
        return _SCALARS[kind]
