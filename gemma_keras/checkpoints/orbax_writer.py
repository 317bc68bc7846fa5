"""Writes a directory of Orbax's PyTree format, weight by weight.

Orbax's own writer wants the whole tree in memory. This one needs a few blocks of it:
arrays are stored as Orbax stores NumPy arrays, in Zarr within OCDBT, and the tree is
described as Orbax describes it, so that Orbax restores it without knowing a device.
They are not compressed: weights hardly can be, and it would take most of the time.
"""

import json
import time

import numpy as np

from gemma_keras.buffers import ordered
from gemma_keras.checkpoints.mapped_file import FLOAT_DTYPES
from gemma_keras.checkpoints.orbax_directory import METADATA, tensorstore

# Bytes of a chunk, which is read at once, and of what is written at once. Chunks of 64
# MiB took several times as long to write: see `pieces.PIECE`.
_CHUNK_BYTES = 2**22
_BATCH_BYTES = 2**26
_HANDLER = (
    "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"
)
# An object store has no renaming: there, this says that all has been written.
_COMMITTED = "commit_success.txt"


class OrbaxWriter:
    """Writes the arrays of one tree.

    Args:
        folder: A directory that does not exist.
        places: Path of each weight to its `Place`.
        keys: A function from the name of an array to its keys in the tree.
        dtype: How weights are stored.
        zarr3: Whether in version 3 of Zarr, as MaxText does, or 2.
    """

    def __init__(self, folder, places, keys, dtype, *, zarr3):
        self._library = tensorstore()
        self._folder = folder
        folder.mkdir(parents=True)
        context = {"cache_pool": {"total_bytes_limit": 0}, "file_io_sync": False}
        self._context = self._library.Context(context)
        self._zarr3 = zarr3
        self._dtype = FLOAT_DTYPES[dtype]
        self._numbers = _CHUNK_BYTES // self._dtype.itemsize
        self._tree, self._arrays = {}, {}
        self._begin()
        for place in places.values():
            if place.name not in self._arrays:
                self._arrays[place.name] = self._create(
                    keys(place.name),
                    place.array_shape,
                    place.chunks(self._numbers),
                    dtype,
                )
        # What was opened inside of a batch cannot be written in another.
        self._commit()

    def _create(self, keys, shape, chunks, dtype, kind="np.ndarray"):
        self._tree[keys] = kind
        base = {"driver": "file", "path": f"{self._folder.absolute()}/"}
        spec = {
            "driver": "zarr3" if self._zarr3 else "zarr",
            "kvstore": {"driver": "ocdbt", "base": base, "path": f"{'.'.join(keys)}/"},
            "metadata": self._metadata(shape, chunks, dtype),
            "store_data_equal_to_fill_value": True,
        }
        return self._library.open(
            spec,
            dtype=self._library.dtype(dtype),
            create=True,
            context=self._context,
            transaction=self._batch,
        ).result()

    def _metadata(self, shape, chunks, dtype):
        shape, chunks = list(shape), list(chunks)
        if not self._zarr3:
            return {"shape": shape, "chunks": chunks, "compressor": None}
        grid = {"name": "regular", "configuration": {"chunk_shape": chunks}}
        codecs = [{"name": "bytes", "configuration": {"endian": "little"}}]
        return {
            "shape": shape,
            "chunk_grid": grid,
            "codecs": codecs,
            "data_type": dtype,
            "fill_value": 0,
        }

    def put(self, place, array, change=lambda block: block):
        """Writes one weight; what its place has more of rows becomes zeros.

        Args:
            place: Its `Place`.
            array: Of the place's shape, but for the number of rows, and of any dtype
                whose numbers the stored one has.
            change: What becomes of the numbers on the way, a block of rows at a time.
        """
        # tensorstore reads what is in another order a number at a time.
        array = ordered(array)
        rows = place.shape[0]
        step = place.rows_of(self._numbers)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            block = change(array[start : min(stop, len(array))])
            block = block.astype(self._dtype, copy=False)
            if len(block) < stop - start:
                padding = [(0, stop - start - len(block))]
                block = np.pad(block, padding + [(0, 0)] * (block.ndim - 1))
            self._write(self._arrays[place.name], place.index(start, stop), block)

    def _write(self, array, index, block):
        array.with_transaction(self._batch)[index].write(block).result()
        self._held += block.nbytes
        if self._held > _BATCH_BYTES:
            self._commit()

    def _begin(self):
        self._batch, self._held = self._library.Transaction(), 0

    def _commit(self):
        try:
            self._batch.commit_sync()
        except ValueError as error:
            # What tensorstore makes of a disk that is full or refuses.
            raise OSError(str(error)) from error
        self._begin()

    def number(self, key, value):
        """Adds a number to the tree, beside its arrays."""
        array = self._create((key,), (), (), "int64", "scalar")
        self._commit()
        self._write(array, (), np.int64(value))

    def empty(self, key):
        """Adds an empty object to the tree."""
        self._tree[key,] = "Dict"

    def finish(self):
        """Writes what is left, and the description of the tree."""
        self._commit()
        entries = {}
        for keys, kind in sorted(self._tree.items()):
            # 2 is Orbax' number for keys of an object.
            levels = [{"key": key, "key_type": 2} for key in keys]
            value = {"value_type": kind, "skip_deserialize": kind == "Dict"}
            entries[str(keys)] = {"key_metadata": levels, "value_metadata": value}
        tree = {
            "tree_metadata": entries,
            "use_ocdbt": True,
            "use_zarr3": self._zarr3,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        }
        (self._folder / METADATA).write_text(json.dumps(tree), "utf-8")
        commit(self._folder)


def describe(folder, item=None):
    """Writes what Orbax keeps of a checkpoint: when, and how it is to be read.

    Args:
        folder: The directory of the checkpoint.
        item: The name of the folder in there that holds the tree; None if it does.
    """
    now = time.time_ns()
    facts = {
        "item_handlers": {item: _HANDLER} if item else _HANDLER,
        "metrics": {},
        "performance_metrics": {},
        "init_timestamp_nsecs": now,
        "commit_timestamp_nsecs": now,
        "custom_metadata": {},
    }
    (folder / "_CHECKPOINT_METADATA").write_text(json.dumps(facts), "utf-8")
    commit(folder)


def commit(folder):
    """Says that a directory is whole."""
    (folder / _COMMITTED).write_text("Checkpoint commit was successful.\n", "utf-8")
