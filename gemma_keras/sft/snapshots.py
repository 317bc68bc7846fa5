"""Snapshots of a run on disk: whole, or not there.

A snapshot is a folder of `variables.safetensors`, `state.json` and `manifest.json`,
which holds the size and the SHA-256 of the others. It is written beside its place,
brought to the disk, and renamed. Nothing in it can run, and nothing depends on the
backend.
"""

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import re
import shutil
import struct

import numpy as np

VARIABLES, STATE, MANIFEST = "variables.safetensors", "state.json", "manifest.json"
_NAME = re.compile(r"step-(\d{8})")
_DTYPES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float64": "F64",
    "int8": "I8",
    "uint8": "U8",
    "int32": "I32",
    "uint32": "U32",
    "int64": "I64",
    "bool": "BOOL",
}


class SnapshotError(ValueError):
    """A snapshot that is not whole; the message says what is wrong with it."""


def name_of(step):
    """Name of the folder of a step."""
    return f"step-{step:08d}"


def step_of(path):
    """The step of a snapshot's folder."""
    return int(_NAME.fullmatch(path.name)[1])


def write(folder, step, variables, state):
    """Writes the snapshot of a step; it appears in `folder` when it is complete.

    Args:
        folder: where snapshots are kept.
        step: names the snapshot.
        variables: dict of a name to `(shape, dtype, read)`, where `read()` gives the
            numpy array: one at a time is held.
        state: what JSON can hold.

    Returns:
        The snapshot's path.

    Raises:
        OSError: the disk is full or refuses. What was there before is untouched.
    """
    folder = pathlib.Path(folder)
    target = folder / name_of(step)
    partial = folder / f".{target.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        manifest = {
            VARIABLES: _write_variables(partial / VARIABLES, variables),
            STATE: _write_bytes(partial / STATE, [_as_json(state)]),
        }
        _write_bytes(partial / MANIFEST, [_as_json(manifest)])
        _bring_to_disk(partial)
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
        _bring_to_disk(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise _explained(error, folder, step, variables) from error
    return target


def _explained(error, folder, step, variables):
    needed = sum(_bytes_of(shape, dtype) for shape, dtype, _ in variables.values())
    reason = "the disk is full" if tells_of_full_disk(error) else str(error)
    explained = OSError(
        f"The checkpoint of step {step} ({needed / 1e6:,.1f} MB) cannot be written to "
        f"{folder}: {reason}. {how_to_go_on(folder)}"
    )
    explained.errno = error.errno
    return explained


def tells_of_full_disk(error):
    """Whether an `OSError` says that there is no room."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def how_to_go_on(folder):
    """What a person is told who has to make room: what `folder` has, and what to do."""
    last = newest(folder, quiet=True)
    kept = "There is no checkpoint yet."
    if last is not None:
        kept = f"The last whole checkpoint is that of step {step_of(last)}."
    return f"{kept} Make room and run the same command again."


def _bytes_of(shape, dtype):
    return int(np.prod(shape)) * np.dtype(dtype).itemsize


def _as_json(value):
    return json.dumps(value, indent=2).encode()


def _write_variables(path, variables):
    header, start = {}, 0
    for name, (shape, dtype, _) in variables.items():
        end = start + _bytes_of(shape, dtype)
        kind = _DTYPES[np.dtype(dtype).name]
        offsets = [start, end]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": offsets}
        start = end
    text = json.dumps(header).encode()
    # Data begin at a multiple of 8, as the format asks.
    text += b" " * (-len(text) % 8)

    def parts():
        yield struct.pack("<Q", len(text)) + text
        for _, dtype, read in variables.values():
            yield np.ascontiguousarray(read(), dtype=dtype).reshape(-1).view("uint8")

    return _write_bytes(path, parts())


def _write_bytes(path, parts):
    """Writes `parts` and brings them to the disk; returns size and SHA-256."""
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for part in parts:
            digest.update(part)
            file.write(part)
            size += len(part)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _bring_to_disk(folder):
    # Not every system can open a folder; where it cannot, renaming is all there is.
    with contextlib.suppress(PermissionError, IsADirectoryError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def every(folder):
    """Paths of the snapshots in `folder`, whole or not, oldest first."""
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of)


def newest(folder, *, say=print, quiet=False):
    """Path of the newest snapshot that is whole, or None.

    Args:
        folder: where snapshots are kept.
        say: is told of each that is passed over because it is not whole.
        quiet: tell nobody.
    """
    for path in reversed(every(folder)):
        try:
            check(path)
        except SnapshotError as error:
            if not quiet:
                say(f"{error} It is passed over.")
        else:
            return path
    return None


def check(path):
    """Raises `SnapshotError` unless every file is what the manifest says."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        files = {name: manifest[name] for name in (VARIABLES, STATE)}
        for name, expected in files.items():
            size = (path / name).stat().st_size
            if size != expected["bytes"]:
                raise SnapshotError(
                    f"{path / name} has {size:,} bytes instead of "
                    f"{expected['bytes']:,}."
                )
            with (path / name).open("rb") as file:
                if (
                    hashlib.file_digest(file, "sha256").hexdigest()
                    != expected["sha256"]
                ):
                    raise SnapshotError(f"{path / name} is damaged (SHA-256 differs).")
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise SnapshotError(f"{path} is not whole ({error}).") from error


def read_state(path):
    """The state of a snapshot."""
    return json.loads((path / STATE).read_text("utf-8"))


@contextlib.contextmanager
def variables(path):
    """Yields `(names, read)`: `read(name)` is one numpy array."""
    from safetensors import safe_open

    with safe_open(path / VARIABLES, "np") as file:
        yield list(file.keys()), file.get_tensor


def remove_partial(folder):
    """Removes what a run that was killed had half written."""
    folder = pathlib.Path(folder)
    for path in folder.glob(".step-*.partial") if folder.is_dir() else ():
        shutil.rmtree(path, ignore_errors=True)


def remove(path):
    """Removes a snapshot."""
    shutil.rmtree(path, ignore_errors=True)


def prune(folder, keep, also=()):
    """Removes all but the newest `keep` snapshots and those named in `also`."""
    for path in every(folder)[:-keep]:
        if path.name not in also:
            remove(path)
