"""Tensors as views of a mapped file.

Each tensor is mapped on its own and released with its array, so that what a process
holds is what it still uses and not the whole file. The mapping is private and
writable (copy on write): torch wraps such an array without a copy, and nothing
written to it reaches the file.
"""

import contextlib
import math
import mmap
import os
from pathlib import Path

import ml_dtypes
import numpy as np

from gemma_keras.checkpoints.checkpoint import CheckpointError

FLOAT_DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def decoded_dtype(dtype):
    """What quantised tensors are decoded to: `dtype`, or float32 if it is None.

    Raises:
        ValueError: it is no float type.
    """
    if dtype not in (None, *FLOAT_DTYPES):
        raise ValueError(
            f"dtype must be one of {', '.join(FLOAT_DTYPES)}, got {dtype!r}."
        )
    return dtype or "float32"


class MappedFile:
    """A file open for reading, from which arrays are mapped."""

    def __init__(self, path):
        self.path = Path(path)
        try:
            self._file = self.path.open("rb")
            self.size = os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: cannot be opened ({error})."
            ) from error

    def read(self, offset, count):
        """`count` bytes from `offset`; fewer if the file ends before."""
        try:
            self._file.seek(offset)
            return self._file.read(count)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path}: cannot be read ({error}).") from error

    @contextlib.contextmanager
    def view(self):
        """The whole file as one read-only buffer, while the context lasts."""
        try:
            view = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.path}: cannot be mapped ({error})."
            ) from error
        with view:
            yield view

    def array(self, offset, dtype, shape, name):
        """Maps an array; the caller has checked that it lies inside the file.

        Args:
            offset: Where the array begins, in bytes.
            dtype: A NumPy dtype.
            shape: Its shape.
            name: The tensor, for the error that a file cut short meanwhile gives.
        """
        if self._file.closed:
            raise CheckpointError(f"{self.path}: was closed before {name} was read.")
        count = math.prod(shape) * dtype.itemsize
        try:
            raw = np.memmap(
                self._file, dtype=np.uint8, mode="c", offset=offset, shape=(count,)
            )
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.path}: {name} cannot be mapped ({error})."
            ) from error
        raw = np.asarray(raw)
        if offset % dtype.itemsize:
            raw = raw.copy()
        return raw.view(dtype).reshape(shape)

    def close(self):
        """Closes the file; arrays keep their own mappings."""
        self._file.close()
