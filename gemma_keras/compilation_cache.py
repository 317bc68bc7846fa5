"""Compiled programs that are kept on disk, so that the next process need not compile.

XLA takes seconds for each, and longer than a small model takes to answer. JAX can keep
them; torch and TensorFlow, on a CPU, compile nothing that could be kept.
"""

import hashlib
import importlib.util
import os
import pathlib
import platform

SWITCH = "GEMMA_KERAS_COMPILATION_CACHE"
_MOST_BYTES = 2**31


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
