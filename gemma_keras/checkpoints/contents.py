"""What a writer is given: a model as a config, a tokenizer and a source of arrays."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from gemma_keras.checkpoints.checkpoint import CheckpointError, check_shape
from gemma_keras.checkpoints.mapped_file import FLOAT_DTYPES
from gemma_keras.checkpoints.provenance import Provenance
from gemma_keras.config import GemmaConfig
from gemma_keras.quantization import pack

# The bits of the exponent, all of which are set in infinity and NaN only.
_EXPONENTS = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}
_CHUNK = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contents:
    """One Gemma that is to be written.

    Attributes:
        config: The `GemmaConfig`.
        tensors: A function from a path of `config.weight_shapes()` to a NumPy array of
            that shape. Writers call it once for each path, or once more where a
            format keeps two weights together, and hold one array at a time.
        dtype: How the weights are stored where they come from.
        tokenizer: A `GemmaTokenizer`, or None.
        preprocessor_config: `sequence_length` and its like, for KerasHub's presets.
        provenance: Where the weights come from, and what was done to them.
        packings: Path of each layer that is to be kept in few bits, where the format
            can, to its `quantization.Packing`.
        codes: A function from the path of such a layer's weight to what
            `quantization.pack` made of it; None where it is yet to be rounded.
        progress: Called as `progress(done_bytes, total_bytes)` after each weight.
    """

    config: GemmaConfig
    tensors: Callable[[str], np.ndarray]
    dtype: str
    tokenizer: Any = None
    preprocessor_config: dict = dataclasses.field(default_factory=dict)
    provenance: Provenance = dataclasses.field(default_factory=Provenance)
    packings: dict = dataclasses.field(default_factory=dict)
    codes: Callable[[str], dict] | None = None
    progress: Callable[[int, int], None] | None = None
    _done: list = dataclasses.field(default_factory=lambda: [0], repr=False)

    def stored_bytes(self, dtype: str) -> int:
        """Bytes of all weights in `dtype`."""
        return self.config.num_parameters * FLOAT_DTYPES[dtype].itemsize

    def array(self, path: str, dtype: str | None) -> np.ndarray:
        """One weight in `dtype`, finite and of the right shape; perhaps a strided view.

        None keeps its own dtype.

        Raises:
            CheckpointError: it is neither, or `dtype` cannot hold it.
        """
        array = np.asarray(self.tensors(path))
        check_shape(path, array.shape, self.config.weight_shapes()[path])
        stored = array.dtype.name
        if stored not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{path}: holds {stored} numbers; only models with float weights are "
                "written. Load the model again and do not quantise it."
            )
        dtype = dtype or stored
        with np.errstate(over="ignore"):
            array = array.astype(FLOAT_DTYPES[dtype], copy=False)
        if not all_finite(array):
            cast = "" if stored == dtype else f" once {stored} is cast to {dtype}"
            raise CheckpointError(
                f"{path}: holds NaN or infinite numbers{cast}; a model with such "
                "weights is not written."
            )
        self._tell(array.size)
        return array

    def packed(self, path: str) -> dict[str, np.ndarray]:
        """One weight in few bits, as `quantization.pack` makes it.

        Raises:
            CheckpointError: as `array`.
        """
        if self.codes is not None:
            self._tell(math.prod(self.config.weight_shapes()[path]))
            return self.codes(path)
        layer, _, name = path.rpartition("/")
        array = self.array(path, None)
        return pack(array.T if name == "kernel" else array, self.packings[layer])

    def _tell(self, count):
        if self.progress is not None:
            self._done[0] += count * FLOAT_DTYPES[self.dtype].itemsize
            self.progress(self._done[0], self.stored_bytes(self.dtype))


def all_finite(array: np.ndarray) -> bool:
    """Whether no number is NaN or infinite, found without a copy of the array."""
    ordered = array.T if array.flags.f_contiguous else array
    bits = ordered.reshape(-1).view(f"u{array.itemsize}")
    mask = bits.dtype.type(_EXPONENTS[array.dtype.name])
    return not any(
        ((bits[start : start + _CHUNK] & mask) == mask).any()
        for start in range(0, bits.size, _CHUNK)
    )


def shards(sizes: dict[str, int], limit: float | None) -> list[list[str]]:
    """Names in runs of at most `limit` bytes each; nothing is divided.

    Args:
        sizes: Name to bytes, in the order in which they are to be written.
        limit: None for one run.
    """
    limit = math.inf if limit is None else limit
    runs, held = [[]], 0
    for name, size in sizes.items():
        if runs[-1] and held + size > limit:
            runs.append([])
            held = 0
        runs[-1].append(name)
        held += size
    return runs
