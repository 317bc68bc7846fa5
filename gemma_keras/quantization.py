"""Weights in 8 or 4 bits: which, how they are rounded, and how they lie in memory.

A matrix [rows, columns] is divided into groups of columns, within which a number is
`code * scale` (8 bits, codes from -127 to 127, the group is the whole row) or
`code * scale + offset` (4 bits, codes from 0 to 15). Rows are what a product makes: the
outputs of a projection, the tokens of the embedding. So a kernel [in, out] is kept as
[out, in], as Hugging Face has it.

Two codes of 4 bits share a byte: the low one is of column j, the high one of column
j + columns / 2, so that unpacking needs no interleaving.
"""

import concurrent.futures
import dataclasses
import os
import re

import ml_dtypes
import numpy as np

MODES = ("int8", "int4")
GROUP_SIZES = (16, 32, 64, 128, 256)
# What is told of weights whose codes are not the nearest.
CALIBRATED = "Matrices were rounded to 4 bits by what they make of texts (GPTQ)."
# Numbers that one core rounds at a time: what its cache holds.
_CHUNK = 2**18
# Shares of a group's range that 4-bit codes may span: cutting outliers off can make
# the mean error smaller.
_SPANS = (1.0, 0.95, 0.9, 0.85, 0.8)


@dataclasses.dataclass(frozen=True)
class Packing:
    """How one matrix is kept.

    Attributes:
        bits: 8 or 4.
        group_size: columns that share a scale; 0 stands for all of them.
    """

    bits: int
    group_size: int = 0

    def fits(self, columns):
        """Whether rows of so many numbers can be kept so."""
        if self.bits == 8:
            return self.group_size == 0
        sizes = self.bits == 4 and self.group_size in GROUP_SIZES
        return sizes and columns % self.group_size == 0

    def shapes(self, rows, columns):
        """Name to shape and dtype of the arrays that hold a matrix."""
        if self.bits == 8:
            return {
                "codes": ((rows, columns), "int8"),
                "scales": ((rows, 1), "float32"),
            }
        groups = (rows, columns // self.group_size)
        return {
            "codes": ((rows, columns // 2), "uint8"),
            "scales": (groups, "bfloat16"),
            "offsets": (groups, "bfloat16"),
        }


@dataclasses.dataclass(frozen=True)
class Quantization:
    """Which weights of a model are kept in few bits.

    Attributes:
        mode: `"int8"`, a scale a row; or `"int4"`, a scale and an offset a group.
        group_size: columns of an int4 group: 16, 32, 64, 128 or 256. A matrix that it
            does not divide gets the largest smaller one that does, or int8.
        embedding: the mode of the embedding, which is the output head too; `mode` if
            None. `"int8"` beside `mode="int4"` costs memory and keeps more.
        layers: regular expression that the paths of the layers must match, such as
            `"ffw"`; all of them if None.

    Raises:
        ValueError: a value is not one of these.
    """

    mode: str
    group_size: int = 128
    embedding: str | None = None
    layers: str | None = None

    def __post_init__(self):
        for name in ("mode", "embedding"):
            value = getattr(self, name)
            if value not in MODES and not (name == "embedding" and value is None):
                raise ValueError(
                    f"{name} must be one of {', '.join(MODES)}, got {value!r}."
                )
        if self.group_size not in GROUP_SIZES:
            raise ValueError(
                f"group_size must be one of {', '.join(map(str, GROUP_SIZES))}, got "
                f"{self.group_size!r}."
            )
        if self.layers is not None:
            try:
                re.compile(self.layers)
            except (re.error, TypeError) as error:
                raise ValueError(
                    f"layers must be a regular expression, got {self.layers!r}: "
                    f"{error}."
                ) from None

    @classmethod
    def get(cls, value):
        """A `Quantization` of one, of a mode's name, of a dict of fields, or None."""
        if value is None or isinstance(value, cls):
            return value
        if isinstance(value, dict):
            return cls(**value)
        return cls(value)

    def packing(self, path, columns):
        """The `Packing` of the matrix of a layer; None if it stays as it is."""
        if self.layers is not None and not re.search(self.layers, path):
            return None
        mode = self.mode
        if path.endswith("token_embedding"):
            mode = self.embedding or mode
        sizes = [s for s in GROUP_SIZES if s <= self.group_size and columns % s == 0]
        if mode == "int8" or not sizes:
            return Packing(8)
        return Packing(4, sizes[-1])

    def packings(self, config):
        """Path of each layer with a matrix to its `Packing`, for a `GemmaConfig`."""
        found = {}
        for path, shape in config.weight_shapes().items():
            layer, _, name = path.rpartition("/")
            if name in ("kernel", "embeddings"):
                columns = shape[0] if name == "kernel" else shape[1]
                packing = self.packing(layer, columns)
                if packing is not None:
                    found[layer] = packing
        return found


def pack(matrix, packing):
    """The arrays, by the names of `Packing.shapes`, that hold `matrix` best.

    Args:
        matrix: floats [rows, columns]; a group with one that is not finite gets a
            scale that is not.
        packing: a `Packing`.
    """
    rows, columns = matrix.shape
    made = {
        name: np.empty(shape, _numpy(dtype))
        for name, (shape, dtype) in packing.shapes(rows, columns).items()
    }
    round_rows = _round_8 if packing.bits == 8 else _round_4
    step = max(1, _CHUNK // columns)

    def fill(start):
        part = slice(start, start + step)
        chunk = np.asarray(matrix[part]).astype(np.float32)
        # What is not finite makes scales that are not, for the caller to see.
        with np.errstate(invalid="ignore"):
            rounded = round_rows(chunk, packing.group_size)
        for name, values in rounded.items():
            made[name][part] = values

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(fill, range(0, rows, step)):
            pass
    return made


def unpack(arrays, packing):
    """The matrix, float32 [rows, columns], that `pack` made these arrays of."""
    codes = arrays["codes"]
    scales = arrays["scales"].astype(np.float32)
    if packing.bits == 8:
        return codes * scales
    codes = np.concatenate([codes & 15, codes >> 4], axis=1).astype(np.float32)
    groups = codes.reshape(len(codes), -1, packing.group_size)
    offsets = arrays["offsets"].astype(np.float32)
    return (groups * scales[..., None] + offsets[..., None]).reshape(codes.shape)


def _round_8(rows, _):
    scales = np.abs(rows).max(axis=1, keepdims=True) / 127
    codes = np.rint(rows / np.where(scales == 0, 1, scales))
    return {"codes": np.clip(codes, -127, 127).astype(np.int8), "scales": scales}


def _round_4(rows, group_size):
    """The nearest codes, for the span of each group that makes the least error."""
    groups = rows.reshape(len(rows), -1, group_size)
    best = None
    for scales, offsets in spans(groups):
        codes = nearest(groups, scales, offsets)
        error = np.square(codes * scales + offsets - groups).sum(axis=2, keepdims=True)
        if best is None:
            best = [error, codes, scales, offsets]
            continue
        better = error < best[0]
        found = (error, codes, scales, offsets)
        best = [np.where(better, x, y) for x, y in zip(found, best, strict=True)]
    _, codes, scales, offsets = best
    return joined(codes.reshape(rows.shape), scales[..., 0], offsets[..., 0])


def spans(groups):
    """Pairs of scales and offsets that 4-bit codes of groups may have.

    They are rounded as they are stored before codes are chosen, so that codes make up
    for it.

    Args:
        groups: floats [..., group_size].

    Yields:
        Scales and offsets, float32 [..., 1].
    """
    low, high = groups.min(axis=-1, keepdims=True), groups.max(axis=-1, keepdims=True)
    for span in _SPANS:
        scales = _stored((high - low) * (span / 15))
        offsets = _stored(low * span + (1 - span) / 2 * (low + high))
        yield scales, offsets


def nearest(numbers, scales, offsets):
    """The 4-bit codes, as floats, whose `code * scale + offset` is the nearest."""
    codes = np.rint((numbers - offsets) / np.where(scales == 0, 1, scales))
    return np.clip(codes, 0, 15)


def joined(codes, scales, offsets):
    """The arrays of a matrix of 4-bit codes [rows, columns], two of them in a byte."""
    codes = codes.astype(np.uint8)
    half = codes.shape[1] // 2
    packed = codes[:, :half] | (codes[:, half:] << 4)
    return {"codes": packed, "scales": scales, "offsets": offsets}


def _stored(values):
    return values.astype(ml_dtypes.bfloat16).astype(np.float32)


def _numpy(name):
    return ml_dtypes.bfloat16 if name == "bfloat16" else np.dtype(name)
