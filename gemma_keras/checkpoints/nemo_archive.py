"""What lies in a classic `.nemo` archive, a tar, or in the directory it was made of.

Members are found, not unpacked: each is read from where it lies. Only an archive that
is compressed as a whole goes to a temporary file first.
"""

import gzip
import os
import shutil
import tarfile
import tempfile
import zlib
from pathlib import Path, PurePosixPath

from gemma_keras.checkpoints.checkpoint import CheckpointError
from gemma_keras.checkpoints.file_part import MAX_READ, FilePart
from gemma_keras.checkpoints.mapped_file import MappedFile

GZIP = b"\x1f\x8b"
_MAX_MEMBERS = 2**14
# Weights are compressed to half their size at best, a tokenizer to a third.
_MAX_GROWTH = 20
_CHUNK = 2**20


class NemoArchive:
    """The files of a model of NVIDIA NeMo 1.

    Args:
        path: A tar archive, compressed with gzip or not, or a directory.

    Attributes:
        members: The name of each file to where it lies: (path, first byte, bytes).
    """

    def __init__(self, path):
        self.path = path
        self._scratch = None
        try:
            self.members = self._find()
        except BaseException:
            self.close()
            raise

    def _find(self):
        if self.path.is_dir():
            return {
                file.relative_to(self.path).as_posix(): (file, 0, file.stat().st_size)
                for file in sorted(self.path.rglob("*"))
                if file.is_file()
            }
        with self.path.open("rb") as file:
            compressed = file.read(len(GZIP)) == GZIP
        return _members(self._unpacked() if compressed else self.path, self.path)

    def _unpacked(self):
        """The path of the tar inside a compressed archive."""
        limit = os.path.getsize(self.path) * _MAX_GROWTH + MAX_READ
        self._scratch = tempfile.TemporaryDirectory(prefix="gemma_keras-")
        folder = self._scratch.name
        path = Path(folder) / "unpacked.tar"
        limit = min(limit, shutil.disk_usage(folder).free)
        try:
            with gzip.open(self.path) as packed, path.open("wb") as tar:
                done = 0
                while part := packed.read(_CHUNK):
                    done += len(part)
                    if done > limit:
                        raise CheckpointError(
                            f"{self.path}: unpacks to more than {limit:,} bytes, which "
                            f"is more than weights do, or than {folder} has room for. "
                            "Unpack it yourself (gunzip), if you trust it."
                        )
                    tar.write(part)
        except (OSError, EOFError, zlib.error) as error:
            raise CheckpointError(
                f"{self.path}: cannot be unpacked ({error})."
            ) from error
        return path

    def read(self, name, limit=MAX_READ):
        """The bytes of a small member."""
        path, start, size = self.members[name]
        if size > limit:
            raise CheckpointError(
                f"{self.path}: {name}: {size:,} bytes are too many for it."
            )
        file = MappedFile(path)
        try:
            return file.read(start, size)
        finally:
            file.close()

    def close(self):
        """Removes what was unpacked; arrays that were mapped stay valid."""
        if self._scratch is not None:
            self._scratch.cleanup()


def _members(path, called):
    """Name to (path, first byte, bytes) of each file in a tar.

    Args:
        path: The tar.
        called: What the user knows it as, for messages.
    """
    file = MappedFile(path)
    found = {}
    try:
        with tarfile.TarFile(fileobj=FilePart(file), errorlevel=2) as tar:
            for number, member in enumerate(tar):
                if number == _MAX_MEMBERS:
                    raise CheckpointError(f"{called}: has too many members.")
                name = _checked_name(member, called)
                if not member.isfile() or name is None:
                    continue
                if name in found:
                    raise CheckpointError(
                        f"{called}: its member {name} is there twice."
                    )
                start, size = member.offset_data, member.size
                if start + size > file.size:
                    raise CheckpointError(
                        f"{called}: its member {name} lies at bytes {start:,} to "
                        f"{start + size:,} of {file.size:,}; it is cut short or wrong."
                    )
                found[name] = path, start, size
    except CheckpointError:
        raise
    # A damaged archive makes tarfile raise whatever it stumbles over.
    except Exception as error:
        raise CheckpointError(
            f"{called}: is a broken tar archive ({error})."
        ) from error
    finally:
        file.close()
    if not found:
        raise CheckpointError(f"{called}: is an empty archive, or no tar at all.")
    return found


def _checked_name(member, called):
    """The name of a member without a leading `./`; None for the directory itself.

    Nothing is ever unpacked; but a name that leads out of the archive, or a member that
    is no file, is a sign that somebody hopes that it will be.
    """
    where = f"{called}: its member {member.name!r:.80}"
    if not (member.isfile() or member.isdir()) or member.issparse():
        raise CheckpointError(f"{where} is no plain file or directory.")
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts or "\\" in member.name:
        raise CheckpointError(f"{where} has a name that leads elsewhere.")
    return None if name == PurePosixPath(".") else name.as_posix()
