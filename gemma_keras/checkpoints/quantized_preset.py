"""Presets of this package with weights in 8 or 4 bits.

The directory is a KerasHub preset's but for the weights, which KerasHub has no form
for: codes, scales and offsets, as `gemma_keras.quantization` makes them, in one
safetensors file. They are mapped, so that loading moves no more than they are.
"""

import dataclasses
import json
import math

import numpy as np

from gemma_keras.checkpoints import keras_layout, safetensors_file
from gemma_keras.checkpoints.checkpoint import (
    Checkpoint,
    CheckpointError,
    build_config,
    check_shape,
    load_tokenizer,
    parse_json,
    read_json,
    some,
)
from gemma_keras.checkpoints.mapped_file import FLOAT_DTYPES
from gemma_keras.quantization import Packing, unpack

WEIGHTS = keras_layout.QUANTIZED
_PACKINGS, _DTYPE = "gemma_keras.packings", "gemma_keras.dtype"


def recognises(path):
    """Whether the directory `path` holds weights as this module writes them."""
    return (path / WEIGHTS).is_file()


def open_checkpoint(path, config=None, dtype=None):
    """Opens the directory, or the weights file in it."""
    return QuantizedPreset(path, config)


class QuantizedPreset(Checkpoint):
    """A preset with weights of few bits."""

    format = "quantised preset"

    def __init__(self, path, config=None):
        self.path = path
        self.directory = path if path.is_dir() else path.parent
        where = path / WEIGHTS if path.is_dir() else path
        self._file = safetensors_file.SafetensorsFile(where)
        try:
            self.config = config or self._read_config()
            self.dtype = self._file.metadata.get(_DTYPE)
            if self.dtype not in FLOAT_DTYPES:
                raise CheckpointError(f"{where}: does not say its dtype.")
            self.packings = self._read_packings()
            self._check()
        except BaseException:
            self.close()
            raise

    def _read_config(self):
        where = self.directory / keras_layout.METADATA
        if not where.is_file():
            raise CheckpointError(f"{where}: is missing.")
        stored = read_json(where).get(keras_layout.OURS)
        if not isinstance(stored, dict) or not isinstance(stored.get("config"), dict):
            raise CheckpointError(f"{where}: has no {keras_layout.OURS}.config.")
        return build_config(where, **stored["config"])

    def _read_packings(self):
        where = f"{self._file.path} ({_PACKINGS})"
        raw = parse_json(self._file.metadata.get(_PACKINGS, "").encode(), where)
        shapes = self.config.weight_shapes()
        try:
            packings = {path: Packing(**fields) for path, fields in raw.items()}
        except TypeError as error:
            raise CheckpointError(f"{where}: {error}.") from error
        for path, packing in packings.items():
            rows_columns = _matrix_shape(shapes, path)
            if rows_columns is None or not packing.fits(rows_columns[1]):
                raise CheckpointError(f"{where}: {path} cannot be kept in {packing}.")
        return packings

    def _check(self):
        """Every array is there, in its shape and dtype, and no other."""
        expected = dict(array_shapes(self.config, self.packings, self.dtype))
        found = self._file.shapes
        if expected.keys() != found.keys():
            wrong = some(expected.keys() ^ found.keys())
            raise CheckpointError(
                f"{self._file.path}: the model has other arrays: {wrong}."
            )
        for name, (shape, dtype) in expected.items():
            check_shape(f"{self._file.path}: {name}", found[name], shape)
            if self._file.dtype(name) != dtype:
                raise CheckpointError(
                    f"{self._file.path}: {name} is {self._file.dtype(name)}, expected "
                    f"{dtype}."
                )

    def tensor(self, path):
        """A weight of floats as it is stored; one of few bits restored."""
        layer = path.rpartition("/")[0]
        if path not in self._file.shapes:
            matrix = unpack(self.packed(path), self.packings[layer])
            matrix = matrix.astype(FLOAT_DTYPES[self.dtype])
            return matrix.T if path.endswith("kernel") else matrix
        return self._file.tensor(path)

    def packed(self, path):
        """Views of the mapped file, by the names of `Packing.shapes`."""
        packing = self.packings[path.rpartition("/")[0]]
        names = packing.shapes(1, 2 * packing.group_size)
        arrays = {name: self._file.array(f"{path}_{name}") for name in names}
        if not np.isfinite(arrays["scales"].astype("float32")).all():
            raise CheckpointError(
                f"{self.sources(path)}: its scales hold NaN or infinite numbers. The "
                "file is damaged."
            )
        return arrays

    def sources(self, path):
        """File and array."""
        return f"{self._file.path.name}: {path}"

    def files(self):
        """The weights file."""
        return [self._file.path]

    def tokenizer(self):
        """The tokenizer from assets/tokenizer/vocabulary.spm, or None."""
        return load_tokenizer(self.directory / keras_layout.VOCABULARY)

    def preprocessor_config(self):
        """`sequence_length` and its like, as preprocessor.json has them."""
        return keras_layout.read_preprocessor(self.directory)

    def close(self):
        """Closes the file; arrays keep their own mappings."""
        self._file.close()


def _matrix_shape(shapes, layer):
    """Rows and columns of the matrix of a layer; None if it has none."""
    if f"{layer}/embeddings" in shapes:
        return shapes[f"{layer}/embeddings"]
    return shapes.get(f"{layer}/kernel", ())[::-1] or None


def array_shapes(config, packings, dtype):
    """Name, and shape and dtype, of each array of a file."""
    shapes = config.weight_shapes()
    for path, shape in shapes.items():
        layer, _, name = path.rpartition("/")
        packing = packings.get(layer) if name in ("kernel", "embeddings") else None
        if packing is None:
            yield path, (shape, dtype)
            continue
        for part, facts in packing.shapes(*_matrix_shape(shapes, layer)).items():
            yield f"{path}_{part}", facts


def stored_bytes(contents, dtype):
    """Bytes of the arrays, those that stay floats in `dtype`."""
    arrays = array_shapes(contents.config, contents.packings, dtype)
    sizes = {"bfloat16": 2, "float16": 2, "float32": 4, "int8": 1, "uint8": 1}
    return sum(math.prod(shape) * sizes[dtype] for _, (shape, dtype) in arrays)


def write_weights(folder, contents, dtype):
    """Writes the weights of `Contents` with packings to a directory."""
    arrays = dict(array_shapes(contents.config, contents.packings, dtype))
    held = {}

    def array(name):
        if name in contents.config.weight_shapes():
            return contents.array(name, dtype)
        path, _, part = name.rpartition("_")
        if path not in held:
            held.clear()
            held[path] = contents.packed(path)
        return held[path][part]

    packings = {path: dataclasses.asdict(p) for path, p in contents.packings.items()}
    safetensors_file.write(
        folder / WEIGHTS,
        {name: shape for name, (shape, _) in arrays.items()},
        {name: kind for name, (_, kind) in arrays.items()},
        array,
        {_DTYPE: dtype, _PACKINGS: json.dumps(packings)},
    )
