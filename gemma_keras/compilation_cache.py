"""Compiled programs that are kept on disk, so that the next process need not compile.

XLA takes seconds for each, and longer than a small model takes to answer. JAX can keep
them, and so can TensorFlow what it compiles for a CPU; torch compiles nothing there.

TensorFlow looks for a program by a name that counts what the process did before it was
traced: one that does the same in the same order finds them, whatever the prompts.
"""

import atexit
import contextlib
import hashlib
import importlib.util
import os
import pathlib
import platform
import shutil
import tempfile
import time

from gemma_keras import xla_entries

SWITCH = "GEMMA_KERAS_COMPILATION_CACHE"
_MOST_BYTES = 2**31
# TensorFlow ends the process over a flag that it does not know: those seen to work.
_TENSORFLOWS = ("2.21.",)
_FLAGS_OF_TENSORFLOW = "TF_XLA_FLAGS"
# It fails a computation whose program it cannot write.
_LEAST_BYTES_FREE, _BYTES_TRIED = 2**30, 2**22
_DAY = 24 * 60 * 60
# Drivers of GPUs: of NVIDIA, of AMD, of Windows.
_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")


def folder():
    """Where programs are kept; None if the switch is off.

    The environment variable `GEMMA_KERAS_COMPILATION_CACHE` names another folder than
    `~/.cache/gemma_keras/compiled`, or is `off`.
    """
    given = os.environ.get(SWITCH, "")
    if given.lower() in ("off", "0", "false", "no"):
        return None
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    path = pathlib.Path(given or pathlib.Path(cache) / "gemma_keras" / "compiled")
    # A home may be shared by computers with other instructions.
    return path.expanduser() / _instructions()


def _instructions():
    """A short name for what this computer's processor can do."""
    known = [platform.machine(), platform.processor()]
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(errors="replace").splitlines()
        known += sorted({x for x in lines if x.startswith(("flags", "Features"))})
    return hashlib.sha256("\n".join(known).encode()).hexdigest()[:12]


def keep_programs_of_jax(config):
    """Has JAX keep what took a second to compile, unless it was told where already.

    Args:
        config: `jax.config`.
    """
    if config.jax_compilation_cache_dir is not None:
        return
    try:
        path = folder()
        if path is None:
            return
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        # No home, or one that cannot be written to, is no reason not to compute.
        return
    config.update("jax_compilation_cache_dir", str(path))
    # Without it JAX cannot count what lies there.
    if importlib.util.find_spec("filelock") is not None:
        config.update("jax_compilation_cache_max_size", _MOST_BYTES)


def keep_programs_of_tensorflow(tensorflow):
    """Has TensorFlow keep what XLA compiles for a CPU, unless it was told where.

    Nothing happens where it has used XLA already; nor where there is a GPU, which is
    what it would compile for, and which it would begin to use here.

    Args:
        tensorflow: the module.
    """
    flags = os.environ.get(_FLAGS_OF_TENSORFLOW, "").strip()
    # Without a dash it names a file of flags.
    told = "tf_xla_persistent_cache_directory" in flags or flags[:1] not in ("", "-")
    version = tensorflow.__version__
    if told or has_gpu_driver() or not version.startswith(_TENSORFLOWS):
        return
    try:
        path = _folder_of_tensorflow(version, flags)
        if path is None or not _has_room(path):
            return
        _tidy(path)
    except (OSError, RuntimeError):
        return
    atexit.register(_settle_at_exit, path)
    ours = [
        "--tf_xla_persistent_cache_prefix=gemma_keras",
        f"--tf_xla_persistent_cache_directory={path}",
        "--tf_xla_persistent_cache_device_types=CPU",
        "--tf_xla_disable_strict_signature_checks=true",
    ]
    with _environment(_FLAGS_OF_TENSORFLOW, " ".join([flags, *ours]).strip()):
        # It reads them once, when it is first asked about XLA.
        tensorflow.config.optimizer.get_jit()


def has_gpu_driver():
    """Whether TensorFlow might find a GPU, told without asking it."""
    return any(map(os.path.exists, _DRIVERS))


@contextlib.contextmanager
def _environment(name, value):
    """Sets a variable for a while: processes started later do not inherit it."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _folder_of_tensorflow(version, flags):
    """Where programs lie that were compiled under the same conditions; may be None."""
    path = folder()
    # Flags are divided at spaces, and quotes taken away.
    if path is None or any(x.isspace() or x in "'\"" for x in str(path)):
        return None
    others = [os.environ.get(x, "") for x in ("XLA_FLAGS", "TF_ENABLE_ONEDNN_OPTS")]
    conditions = "\n".join([flags, *others, str(os.cpu_count())])
    digest = hashlib.sha256(conditions.encode()).hexdigest()[:12]
    return path.resolve() / f"tensorflow-{version}-{digest}"


def _has_room(path):
    path.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(path).free < _LEAST_BYTES_FREE:
        return False
    # A quota shows only when something is written.
    with tempfile.TemporaryFile(dir=path) as file:
        file.write(bytes(_BYTES_TRIED))
    return True


def _tidy(path):
    """Removes what is over the limit or left behind, and settles what is in `path`."""
    found, used, now = [], 0, time.time()
    for file in path.parent.glob("tensorflow-*/*"):
        # Another process may do the same.
        with contextlib.suppress(FileNotFoundError):
            known = file.stat()
            found.append((known.st_mtime, known.st_size, file))
    for changed, size, file in sorted(found, reverse=True):
        used += size
        forgotten = file.suffix == ".tmp" and now - changed > _DAY
        if used > _MOST_BYTES or forgotten:
            file.unlink(missing_ok=True)
    _settle(path)


def _settle(path):
    for entry in path.glob("*.pb"):
        xla_entries.settle(entry)


def _settle_at_exit(path):
    with contextlib.suppress(OSError):
        _settle(path)
