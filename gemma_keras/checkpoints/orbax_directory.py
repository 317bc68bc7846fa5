"""A directory of Orbax's PyTree format: which arrays it holds, and parts of them.

Orbax keeps a tree of arrays as Zarr arrays, one for each leaf, named after the keys of
the tree with a point between them; all inside an OCDBT database, or each in a directory
of its own. `tensorstore`, which Orbax itself reads them with, reads them here, part by
part. Orbax is not needed, nor JAX.
"""

import contextlib
import dataclasses
import math
import re
from pathlib import Path
from typing import Any

from gemma_keras.checkpoints.checkpoint import CheckpointError, read_json, some
from gemma_keras.checkpoints.mapped_file import FLOAT_DTYPES

METADATA = "_METADATA"
MANIFEST = "manifest.ocdbt"
# What tells that a leaf is an array: its Zarr metadata, of version 2 and 3.
DRIVERS = {".zarray": "zarr", "zarr.json": "zarr3"}
_ARRAYS = ("jax.Array", "np.ndarray")
# Names of the parts of a step that hold a model, as trainers call them.
_ITEMS = ("model_params", "params", "items", "default", "checkpoint", "model", "state")
_DEPTH, _BREADTH = 3, 256
# Chunks that were decoded and are not asked for yet: keys beside values, for one.
_CACHE_BYTES = 2**29
# Zeros compress to nothing, weights hardly: nobody stores a model this small.
_MOST_COMPRESSION, _FREE_BYTES = 256, 2**28


def tensorstore():
    """The library, or an error that says how to install it."""
    try:
        import tensorstore
    except ImportError as error:
        raise CheckpointError(
            "Orbax directories (Flax, MaxText) need the tensorstore package: pip "
            "install 'gemma_keras[maxtext]'"
        ) from error
    return tensorstore


def find(path: Path) -> Path | None:
    """The Orbax directory at or below `path`, or None.

    Of the numbered steps of a training run it is that of the last, and of several
    parts of a step the one with the weights.

    Raises:
        CheckpointError: there are several, and none is the obvious one.
    """
    return _find(path, _DEPTH)


def _find(path, depth):
    if _is_one(path):
        return path
    if not depth:
        return None
    folders = _folders(path)
    steps = [folder for folder in folders if folder.name.isdecimal()]
    for step in sorted(steps, key=lambda folder: int(folder.name), reverse=True):
        if found := _find(step, depth - 1):
            return found
    found = {
        folder.name: inner
        for folder in folders
        if folder not in steps and (inner := _find(folder, depth - 1))
    }
    for name in _ITEMS:
        if name in found:
            return found[name]
    if len(found) > 1:
        raise CheckpointError(
            f"{path}: holds several Orbax checkpoints; name the one to load: "
            f"{some(found)}."
        )
    return next(iter(found.values()), None)


def _folders(path):
    """Folders inside, hidden and half-written ones left out."""
    with contextlib.suppress(OSError):
        folders = [child for child in path.iterdir() if child.is_dir()]
        if len(folders) <= _BREADTH:
            return [
                folder
                for folder in sorted(folders)
                if not folder.name.startswith(".")
                and ".orbax-checkpoint-tmp" not in folder.name
            ]
    return []


def _is_one(path):
    if (path / MANIFEST).is_file() or (path / METADATA).is_file():
        return True
    # As Orbax wrote them in 2024 and before: a file `checkpoint` with the tree, which
    # is not needed, beside the arrays.
    return (path / "checkpoint").is_file() and any(path.glob("**/.zarray"))


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """An array in the store.

    Attributes:
        shape: Its shape.
        dtype: The name of its dtype.
        chunks: The shape of what has to be read and decoded at once.
        handle: What reads it.
    """

    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[int, ...]
    handle: Any = dataclasses.field(repr=False)


class OrbaxDirectory:
    """An Orbax directory, open for reading. Nothing in it is written to.

    Attributes:
        path: The directory.
        names: The keys of every array: tuples, cut at slashes and points, for trees
            that are nested and those whose keys are paths are named alike.
    """

    def __init__(self, path):
        self.path = path
        self._library = tensorstore()
        self._database = (path / MANIFEST).is_file()
        context = {"cache_pool": {"total_bytes_limit": _CACHE_BYTES}}
        self._context = self._library.Context(context)
        self._fills = True
        self._keys = self._read_keys()
        self.names = frozenset(self._keys)

    def _read_keys(self):
        """The keys of each array, and how it is called in the store."""
        stored, claimed = self._list(), self._read_metadata()
        missing = [key for key in claimed or () if key not in stored]
        if missing:
            raise CheckpointError(
                f"{self.path / METADATA}: names arrays that are missing: "
                f"{some(missing)}."
            )
        keys = {}
        for key in stored if claimed is None else claimed:
            name = tuple(re.split(r"[./]", key))
            # Flax keeps some variables as an object with a value.
            name = name[:-1] if name[-1] == "value" else name
            if name in keys:
                raise CheckpointError(
                    f"{self.path}: holds {key} and {keys[name]}, which are the same."
                )
            keys[name] = key
        self._drivers = stored
        return keys

    def _list(self):
        """Name of each array in the store, and the driver that reads it."""
        found = {}
        for text in self._listing():
            key, _, file = text.rpartition("/")
            if key and file in DRIVERS:
                found[key] = DRIVERS[file]
        return found

    def _listing(self):
        if not self._database:
            for pattern in DRIVERS:
                for file in self.path.glob(f"**/{pattern}"):
                    yield file.relative_to(self.path).as_posix()
            return
        with self._told("its database"):
            store = self._library.KvStore.open(self._store(""), context=self._context)
            keys = store.result().list().result()
        for key in keys:
            with contextlib.suppress(UnicodeDecodeError):
                yield key.decode()

    def _read_metadata(self):
        """Keys of the arrays that the metadata name; None without metadata."""
        where = self.path / METADATA
        if not where.is_file():
            return None
        raw = read_json(where)
        tree = raw.get("tree_metadata")
        if not isinstance(tree, dict):
            raise CheckpointError(f"{where}: has no tree_metadata.")
        # Whoever stores zeros too has no holes for the reader to fill with them.
        self._fills = raw.get("store_array_data_equal_to_fill_value") is not True
        claimed = []
        for entry in tree.values():
            try:
                keys = [str(key["key"]) for key in entry["key_metadata"]]
                value = entry["value_metadata"]
                kept = not value.get("skip_deserialize")
                if kept and value["value_type"] in _ARRAYS:
                    claimed.append(".".join(keys))
            except (TypeError, KeyError, AttributeError) as error:
                raise CheckpointError(
                    f"{where}: an entry of its tree_metadata is not one of Orbax' "
                    f"({str(entry)[:80]})."
                ) from error
        return claimed

    def _store(self, key):
        folder = f"{self.path.absolute()}/"
        if not self._database:
            return {"driver": "file", "path": folder + key}
        base = {"driver": "file", "path": folder}
        return {"driver": "ocdbt", "base": base, "path": key}

    def open(self, names) -> dict[tuple[str, ...], StoredArray]:
        """Opens arrays and reads their headers.

        Raises:
            CheckpointError: a header is broken, or states what cannot be.
        """
        pending = {name: self._open(name) for name in names}
        arrays = {}
        for name, future in pending.items():
            with self._told(self._keys[name]):
                arrays[name] = self._checked(name, future.result())
        stated = sum(
            math.prod(array.shape) * FLOAT_DTYPES[array.dtype].itemsize
            for array in arrays.values()
        )
        held = sum(file.stat().st_size for file in self.files())
        if stated > _MOST_COMPRESSION * held + _FREE_BYTES:
            raise CheckpointError(
                f"{self.path}: states {stated:,} bytes of weights, but holds {held:,}; "
                "no model can be compressed so much."
            )
        return arrays

    def _open(self, name):
        key = self._keys[name]
        spec = {"driver": self._drivers[key], "kvstore": self._store(f"{key}/")}
        if not self._fills:
            spec["fill_missing_data_reads"] = False
        with self._told(key):
            return self._library.open(spec, open=True, read=True, context=self._context)

    def _checked(self, name, handle):
        where = f"{self.path}: {self._keys[name]}"
        shape, layout = tuple(handle.shape), handle.chunk_layout
        chunks = tuple(layout.read_chunk.shape or shape)
        dtype = handle.dtype.name
        if dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{where}: is {dtype}; weights must be one of "
                f"{', '.join(FLOAT_DTYPES)}. Is this a quantised checkpoint?"
            )
        for chunk in (chunks, tuple(layout.write_chunk.shape or shape)):
            if math.prod(chunk) > math.prod(shape):
                raise CheckpointError(
                    f"{where}: is an array of shape {list(shape)} in chunks of "
                    f"{list(chunk)}, which are larger."
                )
        return StoredArray(shape, dtype, chunks, handle)

    def read(self, name, array, index):
        """Reads a part of an array.

        Args:
            name: Its keys.
            array: The `StoredArray`.
            index: The part: a tuple of integers and slices, as NumPy takes them.

        Returns:
            A NumPy array that nobody else holds.
        """
        with self._told(self._keys[name]):
            return array.handle[index].read().result()

    def called(self, name):
        """What an array is called in the store, for messages to people."""
        return self._keys[name]

    def files(self):
        """Paths of all files, in the order of their names."""
        return sorted(file for file in self.path.rglob("*") if file.is_file())

    @contextlib.contextmanager
    def _told(self, what):
        try:
            yield
        except (CheckpointError, MemoryError):
            raise
        # tensorstore raises several kinds for what is damaged.
        except Exception as error:
            text = " ".join(str(error).split())[:300]
            raise CheckpointError(
                f"{self.path}: {what} cannot be read ({text}); the directory is "
                "damaged or incomplete."
            ) from error
