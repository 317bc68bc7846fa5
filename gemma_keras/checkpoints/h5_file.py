"""HDF5 files: their float datasets as views of the mapped file; and written ones.

h5py reads the structure, once, while the file is opened; the numbers are then mapped
from where it says they lie. Links out of the file and compressed or virtual datasets,
which Keras never writes, are refused: they are how a small file asks for much memory.
"""

import contextlib
import io
import math

import numpy as np

from gemma_keras.checkpoints.checkpoint import CheckpointError
from gemma_keras.checkpoints.mapped_file import FLOAT_DTYPES, MappedFile
from gemma_keras.checkpoints.pieces import PIECE

_SIGNATURE = b"\x89HDF\r\n\x1a\n"


@contextlib.contextmanager
def writing(path):
    """Makes a new HDF5 file.

    HDF5 cannot close a file that the disk refused to take, and tries until it takes the
    process with it. So it writes to a `_Sink`, which keeps refusals to itself.

    Yields:
        The open `h5py.File`, and a function that raises the `OSError` of what was
        written so far, if there was one. It is raised at the end, too.
    """
    import h5py

    with _Sink(path, "w+b") as sink:
        with h5py.File(sink, "w") as file:
            yield file, sink.check
        sink.check()


class _Sink(io.FileIO):
    """A new file that takes everything, and says later that it could not."""

    error = None

    def write(self, data):
        """Writes bytes, none after a failure; gives their count in any case."""
        data = memoryview(data).cast("B")
        rest = data
        while len(rest) and self.error is None:
            try:
                rest = rest[super().write(rest[:PIECE]) :]
            except OSError as error:
                self.error = error
        return len(data)

    def truncate(self, size=None):
        """Sets the size of the file, or does not."""
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = self.error or error
            return size

    def check(self):
        """Raises the first failure."""
        if self.error is not None:
            raise self.error


class H5File:
    """An HDF5 file whose structure has been read.

    Attributes:
        shapes: dataset name, such as `layers/rms_normalization/vars/0`, to its shape.
    """

    def __init__(self, path):
        self._file = MappedFile(path)
        self.path = self._file.path
        self._entries = {}
        try:
            if self._file.read(0, 8) != _SIGNATURE:
                raise CheckpointError(f"{self.path}: is not an HDF5 file.")
            self._read_structure()
        except BaseException:
            self.close()
            raise
        self.shapes = {name: entry[1] for name, entry in self._entries.items()}

    def _read_structure(self):
        import h5py

        name = "its structure"

        def visit(found, item):
            nonlocal name
            name = found
            if not isinstance(found, str):
                raise ValueError("a name is not UTF-8")
            if isinstance(item, h5py.Dataset):
                plain = item.id.get_create_plist().get_layout() == h5py.h5d.CONTIGUOUS
                self._entries[found] = _entry(item, plain)

        try:
            with h5py.File(self.path, "r") as file:
                file.visititems(visit)
        # A damaged file makes h5py raise whatever it stumbles over.
        except Exception as error:
            raise CheckpointError(
                f"{self.path}: {name} cannot be read ({error}); the file is damaged "
                "or cut short."
            ) from error

    def check(self, name):
        """Raises `CheckpointError` unless the dataset can be mapped."""
        where = f"{self.path}: {name}"
        dtype, shape, start, held = self._entries[name]
        if dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{where}: is {dtype}; weights must be one of "
                f"{', '.join(FLOAT_DTYPES)}. Is this a quantised model?"
            )
        count = math.prod(shape) * FLOAT_DTYPES[dtype].itemsize
        if start is None:
            raise CheckpointError(
                f"{where}: is compressed, chunked, empty or kept elsewhere; Keras "
                "writes plain datasets. `h5repack -f NONE -l CONTI` makes one."
            )
        if held != count or start + count > self._file.size:
            raise CheckpointError(
                f"{where}: needs {count:,} bytes at byte {start:,}; the file of "
                f"{self._file.size:,} holds {held:,}."
            )

    def float_dtype(self, name):
        """Name of the dataset's dtype."""
        return self._entries[name][0]

    def tensor(self, name):
        """The dataset as a view of the mapped file; `check` it first."""
        dtype, shape, start, _ = self._entries[name]
        return self._file.array(start, FLOAT_DTYPES[dtype], shape, name)

    def close(self):
        """Closes the file; arrays keep their own mappings."""
        self._file.close()


def _entry(dataset, plain):
    """(dtype name, shape, first byte or None, bytes held) of a dataset.

    `plain` says whether its numbers lie in one piece.
    """
    dtype = dataset.dtype
    name = dtype.name
    # Keras stores bfloat16, which HDF5 does not know, as two opaque bytes.
    if dtype == np.dtype("V2") and dataset.attrs.get("dtype") == "bfloat16":
        name = "bfloat16"
    elif dtype.newbyteorder("<") != dtype:
        name = f"big-endian {name}"
    start = None
    if plain and not dataset.external and not dataset.file.userblock_size:
        start = dataset.id.get_offset()
    return name, dataset.shape or (), start, dataset.id.get_storage_size()
