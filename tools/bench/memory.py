"""The most memory that this process has had at once, on a CPU or a GPU."""

import contextlib
import os
import pathlib
import re
import resource
import subprocess
import sys


def reset():
    """Forgets the peak so far, where the system can; where not, it only grows."""
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak():
    """Bytes: of the device's memory, or the process's resident ones on a CPU.

    Pages of mapped files count among the latter, as the weights of who maps them do.
    """
    device = {"jax": _jax, "torch": _torch, "tensorflow": _tensorflow}.get(
        os.environ.get("KERAS_BACKEND"), _driver
    )()
    return device or _resident()


def _jax():
    return (sys.modules["jax"].local_devices()[0].memory_stats() or {}).get(
        "peak_bytes_in_use"
    )


def _torch():
    cuda = sys.modules["torch"].cuda
    return cuda.max_memory_allocated() if cuda.is_available() else None


def _tensorflow():
    config = sys.modules["tensorflow"].config
    if config.list_logical_devices("GPU"):
        return config.experimental.get_memory_info("GPU:0")["peak"]
    return None


def _driver():
    """What the driver says that the process holds now, which is its most."""
    command = ["nvidia-smi", "--query-compute-apps=pid,used_memory"]
    try:
        told = subprocess.run(
            [*command, "--format=csv,noheader,nounits"], capture_output=True, text=True
        ).stdout
    except OSError:
        return None
    found = [line.split(",") for line in told.splitlines()]
    return sum(2**20 * int(used) for pid, used in found if int(pid) == os.getpid())


def _resident():
    status = pathlib.Path("/proc/self/status")
    found = status.exists() and re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
    if found:
        return 1024 * int(found[1])
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
