"""Writing beside the place where something is to be, and renaming it when complete.

What fails in between leaves nothing that looks whole.
"""

import contextlib
import errno
import os
import shutil
import uuid
from pathlib import Path

from gemma_keras.checkpoints.checkpoint import CheckpointError

# A disk with fewer bytes left is full.
_NOTHING = 2**20


def check_space(destination, needed):
    """Raises `CheckpointError` if the disk has less than `needed` bytes left."""
    existing = next(folder for folder in destination.parents if folder.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise CheckpointError(
            f"{destination}: needs {_amount(needed)}, but the disk has "
            f"{_amount(free)} left."
        )


def _amount(count):
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


@contextlib.contextmanager
def replacing(destination):
    """Lets a file or directory take the place of `destination`, if all goes well.

    Args:
        destination: An absolute path. What is there is kept until the new one is
            complete.

    Yields:
        A path in the same directory, where nothing is; the caller makes a file or a
        directory there.

    Raises:
        CheckpointError: the disk refuses.
    """
    tag = uuid.uuid4().hex[:8]
    partial = destination.with_name(f".{destination.name}.{tag}.partial")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        if not destination.is_dir():
            partial.replace(destination)
            return
        old = destination.with_name(f".{destination.name}.{tag}.old")
        destination.rename(old)
        try:
            partial.rename(destination)
        except OSError:
            old.rename(destination)
            raise
        shutil.rmtree(old)
    except OSError as error:
        reason = _reason(error, destination)
        message = f"{destination}: cannot be written ({reason})."
        raise CheckpointError(message) from error
    finally:
        _remove(partial)


def _reason(error, destination):
    """What was wrong; that a disk is full, libraries do not all say."""
    full = error.errno == errno.ENOSPC
    if full or shutil.disk_usage(destination.parent).free < _NOTHING:
        return os.strerror(errno.ENOSPC)
    return error


def _remove(path: Path):
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
