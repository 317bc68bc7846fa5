"""One file of `torch.save`: a zip archive of a pickle, and the bytes of each storage.

A pickle is a program. It is run by `torch.load(weights_only=True, mmap=True)`, which
makes tensors and plain values, and calls nothing; and only if the names in it are those
that tensors need. What torch loads is a stand-in for the file, in which each storage is
its own number: so it sees no weights, and nothing is as large as the pickle says. What
the pickle says of shapes and types is then held against the archive, and tensors are
mapped one at a time from where the archive says that they lie.

(torch would map the whole file at once, which Linux refuses for a file that is larger
than the memory.)
"""

import io
import pickletools
import re
import stat
import tempfile
import warnings
import zipfile
from pathlib import Path

import numpy as np

from gemma_keras.checkpoints.checkpoint import CheckpointError
from gemma_keras.checkpoints.file_part import FilePart
from gemma_keras.checkpoints.mapped_file import FLOAT_DTYPES, MappedFile

MAGIC = b"PK\x03\x04"
# Keys under which programs keep the weights, if not on top.
_STATES = ("model_state_dict", "state_dict")
_DTYPES = FLOAT_DTYPES | {
    "float64": np.dtype(np.float64),
    "int8": np.dtype(np.int8),
    "uint8": np.dtype(np.uint8),
}
# What the pickle of a dict of tensors may name. weights_only=True allows more, such as
# a bytearray of any size.
_GLOBALS = re.compile(
    r"collections OrderedDict"
    r"|torch\._utils _rebuild_(tensor_v2|parameter)"
    r"|torch (Float|Double|Half|BFloat16|ComplexFloat|ComplexDouble)Storage"
    r"|torch (Bool|Byte|Char|Short|Int|Long)Storage"
)
_MEMBER = re.compile(r"[\w .+-]+(/[\w .+-]+)+")
_LOCAL_HEADER = 30
# 400 bytes a tensor are usual, and a thousand tensors.
_MAX_PICKLE = 2**20
# The number of a storage has to fit into it.
_SMALLEST = 4


def torch_library(where):
    """The module torch, whatever the backend; `where` is what needs it."""
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(
            f"{where}: needs PyTorch as a library, on any backend: pip install torch"
        ) from error
    return torch


class TorchFile:
    """An open, validated file of `torch.save`.

    Args:
        path: The file.
        start: Where in it the archive begins.
        size: Bytes of the archive; None for all that is left.
        name: What to call it in messages, if not by its path.

    Attributes:
        shapes: tensor name to its shape, of the dict of weights.
        aliases: name of a tensor to the earlier one that is the same memory.
        extras: what lies beside the dict of weights, by its key: text, numbers, arrays.
    """

    def __init__(self, path, start=0, size=None, name=None):
        self._file = MappedFile(path)
        self.path = self._file.path
        self.name = str(name or self.path)
        self._start = start
        try:
            part = FilePart(self._file, start, size)
            data, self._records = _Archive(part, self.name).contents()
            _check_pickle(data, self.name)
            state, extras = self._split(_load(data, self._records, self.name))
            self._reasons = {}
            self._entries = self._find_tensors(state)
            self.aliases = self._find_aliases()
            self.extras = {key: self._extra(key, extras[key]) for key in extras}
        except BaseException:
            self.close()
            raise
        self.shapes = {name: entry[1] for name, entry in self._entries.items()}

    def _split(self, found):
        """The dict of weights, and what lies beside it."""
        if not isinstance(found, dict) or not all(isinstance(k, str) for k in found):
            raise CheckpointError(f"{self.name}: holds no dict of tensors.")
        for key in _STATES:
            if isinstance(found.get(key), dict):
                extras = {name: found[name] for name in found if name != key}
                return found[key], extras
        return found, {}

    def _find_tensors(self, state):
        torch = torch_library(self.name)
        entries = {}
        for name, tensor in state.items():
            if not isinstance(name, str):
                raise CheckpointError(f"{self.name}: names a tensor {name!r:.80}.")
            if isinstance(tensor, torch.Tensor):
                entry = self._entry(name, tensor)
                if isinstance(entry, str):
                    self._reasons[name] = entry
                else:
                    entries[name] = entry
        return entries

    def _entry(self, name, tensor):
        """(dtype, shape, first byte, bytes) of a tensor, or why it cannot be read."""
        record = getattr(tensor.untyped_storage(), "record", None)
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in _DTYPES:
            return f"is {dtype}"
        if record is None or not tensor.numel():
            return "is empty, or too small to be a weight"
        if not tensor.is_contiguous():
            return "is not contiguous; save it again after .contiguous()"
        item = _DTYPES[dtype].itemsize
        first, count = tensor.storage_offset() * item, tensor.numel() * item
        start, held = self._records[record]
        if first + count > held:
            raise CheckpointError(
                f"{self.name}: {name}: needs bytes {first:,} to {first + count:,} of a "
                f"storage that has {held:,}; the file is cut short or wrong."
            )
        return dtype, tuple(tensor.shape), self._start + start + first, count

    def _find_aliases(self):
        """Takes out tensors that are others again; any other overlap is an error."""
        aliases, before, reached = {}, None, 0
        ordered = sorted(self._entries, key=lambda name: self._entries[name][2:])
        for name in ordered:
            start, count = self._entries[name][2:]
            if start >= reached:
                before, reached = name, start + count
            elif self._entries[name] == self._entries[before]:
                aliases[name] = before
            else:
                raise CheckpointError(f"{self.name}: {name} overlaps {before}.")
        for name in aliases:
            del self._entries[name]
        return aliases

    def _extra(self, key, value):
        """A value beside the weights; a tensor as an array, or None."""
        torch = torch_library(self.name)
        if not isinstance(value, torch.Tensor):
            return value
        entry = self._entry(key, value)
        return None if isinstance(entry, str) else self._map(key, entry)

    def dtype(self, name):
        """The tensor's dtype in NumPy's words."""
        return self._entries[name][0]

    def missing(self, name):
        """Why there is no tensor `name` in `shapes`, for messages."""
        if name in self.aliases:
            return f"{name} is the same memory as {self.aliases[name]}."
        if name in self._reasons:
            return f"{name} {self._reasons[name]}."
        return f"the tensor {name} is missing."

    def tensor(self, name, rows=None):
        """The tensor, or a slice of its rows, as a view of the mapped file.

        Args:
            name: A key of `shapes`.
            rows: `(first, last)`, the last not among them; None for all.
        """
        dtype, shape, start, count = self._entries[name]
        if rows is not None:
            width = count // shape[0]
            start += rows[0] * width
            shape = (rows[1] - rows[0], *shape[1:])
        return self._map(name, (dtype, shape, start, None))

    def _map(self, name, entry):
        dtype, shape, start, _ = entry
        return self._file.array(start, _DTYPES[dtype], shape, name)

    def same_bytes(self, name, other):
        """Whether two tensors hold the same numbers in the same dtype and shape."""
        if self.aliases.get(name) == other:
            return True
        mine, theirs = self._entries.get(name), self._entries.get(other)
        if mine is None or theirs is None or mine[:2] != theirs[:2]:
            return False
        step = 2**24
        for done in range(0, mine[3], step):
            count = min(step, mine[3] - done)
            here = self._file.read(mine[2] + done, count)
            if here != self._file.read(theirs[2] + done, count):
                return False
        return True

    def close(self):
        """Closes the file; arrays keep their own mappings."""
        self._file.close()


class _Archive:
    """The zip archive: members, each stored as it is and in its own place."""

    def __init__(self, part, name):
        self._part = part
        self._name = name

    def contents(self):
        """The pickle, and name to (first byte, bytes) of each storage."""
        if self._bytes(0, 4) != MAGIC:
            raise CheckpointError(
                f"{self._name}: is no zip archive. Files that torch.save wrote before "
                "version 1.6 are not read: load them with torch, and save them again."
            )
        try:
            with zipfile.ZipFile(self._part) as archive:
                members = archive.infolist()
                pickled = self._find_pickle([member.filename for member in members])
                spans = self._spans(members, archive.start_dir)
                data = (
                    archive.read(pickled) if spans[pickled][1] <= _MAX_PICKLE else None
                )
        except CheckpointError:
            raise
        # A damaged archive makes zipfile raise whatever it stumbles over.
        except Exception as error:
            raise CheckpointError(
                f"{self._name}: is a broken zip archive ({error})."
            ) from error
        if data is None:
            raise CheckpointError(
                f"{self._name}: a pickle of {spans[pickled][1]:,} bytes is too large "
                "for a list of tensors."
            )
        folder = pickled.removesuffix("data.pkl")
        self._check_byte_order(spans.get(f"{folder}byteorder"))
        storages = f"{folder}data/"
        records = {
            member.removeprefix(storages): span
            for member, span in spans.items()
            if member.startswith(storages)
        }
        return data, records

    def _find_pickle(self, members):
        found = [name for name in members if name.endswith("/data.pkl")]
        if any(name.endswith("/constants.pkl") for name in members):
            raise CheckpointError(
                f"{self._name}: is a TorchScript program, not a dict of tensors."
            )
        if len(found) != 1 or found[0].count("/") != 1:
            raise CheckpointError(
                f"{self._name}: is a zip archive, but not one of torch.save (no "
                "data.pkl)."
            )
        return found[0]

    def _spans(self, members, end):
        """Name to (first byte, bytes) of every member; an error unless all is plain."""
        spans, reached = {}, 0
        for member in sorted(members, key=lambda member: member.header_offset):
            name = member.filename
            where = f"{self._name}: its member {name!r:.80}"
            if not _MEMBER.fullmatch(name) or ".." in name.split("/"):
                raise CheckpointError(f"{where} has a name that torch does not give.")
            if name in spans:
                raise CheckpointError(f"{where} is there twice.")
            if not _is_plain(member):
                raise CheckpointError(f"{where} is a link, compressed or encrypted.")
            start = self._data_start(member, where)
            if member.header_offset < reached or start + member.file_size > end:
                raise CheckpointError(
                    f"{where} states bytes {start:,} to {start + member.file_size:,}, "
                    "which are not its own; the file is cut short or wrong."
                )
            reached = start + member.file_size
            spans[name] = start, member.file_size
        return spans

    def _data_start(self, member, where):
        header = self._bytes(member.header_offset, _LOCAL_HEADER)
        if len(header) < _LOCAL_HEADER or header[:4] != MAGIC:
            raise CheckpointError(f"{where} is not where the archive says.")
        lengths = [int.from_bytes(header[at : at + 2], "little") for at in (26, 28)]
        start = member.header_offset + _LOCAL_HEADER
        if self._bytes(start, lengths[0]) != member.filename.encode():
            raise CheckpointError(f"{where} has another name where it lies.")
        return start + sum(lengths)

    def _check_byte_order(self, span):
        if span is not None and self._bytes(*span) != b"little":
            raise CheckpointError(f"{self._name}: is from a big-endian machine.")

    def _bytes(self, start, count):
        self._part.seek(start)
        return self._part.read(count)


def _is_plain(member):
    """Whether the bytes of a member lie in the archive as they are."""
    return (
        member.compress_type == zipfile.ZIP_STORED
        and not member.flag_bits & 1
        and member.compress_size == member.file_size
        and not stat.S_ISLNK(member.external_attr >> 16)
    )


def _check_pickle(data, where):
    """Raises `CheckpointError` if the pickle names what a dict of tensors needs not.

    torch refuses most of these too; here they are told, before anything is run.
    """
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "GLOBAL" and not _GLOBALS.fullmatch(argument):
                raise CheckpointError(
                    f"{where}: asks Python to run {argument.replace(' ', '.')}, which "
                    "no list of tensors needs; it is not loaded."
                )
            if opcode.name in ("INST", "OBJ", "NEWOBJ_EX", "STACK_GLOBAL"):
                raise CheckpointError(
                    f"{where}: asks Python to make objects ({opcode.name}); it is not "
                    "loaded."
                )
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{where}: its pickle cannot be read ({error})."
        ) from error


def _load(data, records, where):
    """What the pickle makes, its tensors empty ones that know their record.

    Args:
        data: The pickle.
        records: Names of the storages.
        where: The file, for messages.
    """
    torch = torch_library(where)
    numbered = list(records)

    def locate(storage, _):
        number = int.from_bytes(bytes(storage[:8]), "little")
        found = torch.UntypedStorage(0, device="meta")
        if storage.nbytes() >= _SMALLEST and number < len(numbered):
            found.record = numbered[number]
        return found

    try:
        with tempfile.TemporaryDirectory(prefix="gemma_keras-") as folder:
            path = Path(folder) / "stand-in"
            path.write_bytes(_stand_in(data, numbered))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return torch.load(
                    path, weights_only=True, mmap=True, map_location=locate
                )
    # A hostile pickle makes torch raise whatever it stumbles over.
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"{where}: torch cannot load its list of tensors ({reason[0]:.200})."
        ) from error


def _stand_in(data, names):
    """The archive as torch expects it, with a number for each storage."""
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", b"3\n")
        archive.writestr("archive/byteorder", b"little")
        for number, name in enumerate(names):
            archive.writestr(f"archive/data/{name}", number.to_bytes(8, "little"))
    return memory.getvalue()
