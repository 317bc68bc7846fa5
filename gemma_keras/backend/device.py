"""What computes, and its memory."""

import contextlib
import contextvars
import ctypes
import functools
import importlib.metadata
import pathlib
import re
import resource
import sys

from keras import ops

from gemma_keras.backend.library import NAME, jax, tf, torch


def on_cpu():
    """Whether the backend computes on a CPU."""
    if NAME == "torch":
        return torch_device().type == "cpu"
    if NAME == "jax":
        return jax.default_backend() == "cpu"
    return not tf.config.list_logical_devices("GPU")


def torch_device():
    """The device that Keras puts torch tensors on."""
    return ops.convert_to_tensor(0).device


def peak_memory():
    """Most bytes that were in use at once: the device's, or the process' on a CPU."""
    if NAME == "jax":
        used = jax.local_devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in used:
            return used["peak_bytes_in_use"]
    elif NAME == "torch":
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
    elif tf.config.list_logical_devices("GPU"):
        return tf.config.experimental.get_memory_info("GPU:0")["peak"]
    return _peak_of_process()


# Numbers of settings in glibc's malloc.h: from which size on memory is mapped, and how
# much of what is free at the end of the heap stays there.
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1


_gives_back = contextvars.ContextVar("gives_back", default=False)


@contextlib.contextmanager
def giving_back_memory():
    """Has large tensors that are freed on a CPU go back to the system at once.

    On torch, glibc keeps what lies below something that is still in use, so that a
    process grows over the steps of a training run by half as much again as it uses. On
    the others 16 MiB stay: XLA packs a matrix for each product, and asks for memory to
    do so. Nothing happens where another library than glibc allocates memory.
    """
    token = _gives_back.set(True)
    _let_tensorflow_set_malloc()
    if NAME == "torch":
        _set_malloc(2**22, 2**17)
    else:
        _set_malloc(2**25, 2**24)
    if NAME == "torch":
        from gemma_keras.backend import torch_reorder

        torch_reorder.forget()
    try:
        yield
    finally:
        _gives_back.reset(token)


def gives_back_memory():
    """Whether this is within `giving_back_memory`."""
    return _gives_back.get()


def keep_memory(before_dataset=False):
    """Has up to 256 MiB of what is freed on a CPU stay with the process.

    Memory that comes from the system comes page by page, which takes a fifth of the
    time of reading a prompt on torch. Nothing happens within `giving_back_memory`, as
    when a training run makes samples.

    Args:
        before_dataset: whether Keras will make a dataset of what is computed next.
    """
    if _gives_back.get():
        return
    if before_dataset:
        _let_tensorflow_set_malloc()
    _set_malloc(2**26 if NAME == "torch" else 2**25, 2**28)


def _set_malloc(mapped_from, kept):
    if not on_cpu():
        return
    with contextlib.suppress(OSError, AttributeError, TypeError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, mapped_from)
        library.mallopt(_M_TRIM_THRESHOLD, kept)


def _let_tensorflow_set_malloc():
    """Has TensorFlow change glibc's settings now, and not after us.

    With the first dataset of a Python generator, which Keras' `fit` makes, it has glibc
    map whatever has 128 KiB or more anew each time. XLA's steps take half as long again
    for it: a million faults of pages.
    """
    if on_cpu() and "tensorflow" in sys.modules:
        _use_generator_dataset(sys.modules["tensorflow"])


@functools.cache
def _use_generator_dataset(tensorflow):
    spec = tensorflow.TensorSpec((), "int32")
    list(tensorflow.data.Dataset.from_generator(lambda: [0], output_signature=spec))


def device_memory():
    """Bytes of the accelerator that the backend computes on; None on a CPU."""
    if NAME == "jax":
        return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if NAME == "torch":
        return torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else None
    # What TensorFlow tells of a device has no size, but in this list.
    from tensorflow.python.client import device_lib

    found = [d for d in device_lib.list_local_devices() if d.device_type == "GPU"]
    return found[0].memory_limit if found else None


def memory_left():
    """Bytes of memory that the system has left; None where it does not say."""
    path = pathlib.Path("/proc/meminfo")
    if not path.exists():
        return None
    return 1024 * int(re.search(r"MemAvailable:\s+(\d+)", path.read_text())[1])


def _peak_of_process():
    # Not ru_maxrss where it can be helped: it begins with the parent's.
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return 1024 * int(found[1])
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def description():
    """Name to version of the backend, and the device that it computes on."""
    package = "tensorflow" if NAME == "tensorflow" else NAME
    if NAME == "jax":
        device = jax.devices()[0].device_kind
    elif NAME == "torch":
        there = torch.cuda.is_available()
        device = torch.cuda.get_device_name() if there else str(torch_device())
    else:
        gpus = tf.config.list_physical_devices("GPU")
        details = tf.config.experimental.get_device_details(gpus[0]) if gpus else {}
        device = details.get("device_name", "cpu")
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        version = sys.modules[NAME].__version__
    return {NAME: version, "device": device}
