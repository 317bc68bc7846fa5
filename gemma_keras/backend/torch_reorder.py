"""Matrices of weights in the order that oneDNN multiplies by, kept beside the weights.

oneDNN brings a matrix of bfloat16 into its own order for each product. For the few rows
of decoding that takes longer than the product: 180 us of 250 for [640, 2048].
"""

import contextlib
import contextvars
import pathlib
import re

from gemma_keras.backend.library import NAME, torch

# Bytes of memory that are to be left to others.
_LEFT = 2**31

_may_keep = contextvars.ContextVar("may_keep", default=True)


def can_reorder():
    """Whether torch can: the operation is not part of what it promises."""
    return hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def reordered(weight, turned):
    """`weight` [F, D], or [D, F] if `turned`, as oneDNN's linear layers take it.

    In oneDNN's order, in memory of its own that is kept until the weight changes or is
    gone; or as it is, where memory is short.
    """
    matrix = weight.detach().T if turned else weight.detach()
    if not _may_keep.get() or weight.is_inference():
        return matrix
    # What is written through `data` counts no version: some of its numbers tell.
    state = weight.data_ptr(), weight._version, turned
    rows, columns = (size // 16 + 1 for size in weight.shape)
    some = weight.detach()[::rows, ::columns]
    found = _kept.get(weight)
    if found is None or found[0] != state or not torch.equal(found[1], some):
        _kept.pop(weight, None)
        if _memory_left() < _LEFT + 2 * weight.nbytes:
            return matrix
        # The order for several rows is as good for one.
        made = torch.ops.mkldnn._reorder_linear_weight(matrix, 8)
        _kept[weight] = found = state, some.clone(), made
    return found[2]


@contextlib.contextmanager
def weights_alone():
    """A context within which nothing is kept, and what was kept is given back."""
    if NAME == "torch":
        _kept.clear()
    token = _may_keep.set(False)
    try:
        yield
    finally:
        _may_keep.reset(token)


def _memory_left():
    """Bytes that the system, and the container, have left; 0 if they do not say."""
    left = []
    with contextlib.suppress(OSError, ValueError, TypeError):
        system = pathlib.Path("/proc/meminfo").read_text()
        left.append(1024 * int(re.search(r"MemAvailable:\s+(\d+) kB", system)[1]))
        group = pathlib.Path("/sys/fs/cgroup")
        most, used = ((group / f"memory.{x}").read_text() for x in ("max", "current"))
        left.append(int(most) - int(used))
    return min(left, default=0)


if NAME == "torch":
    from torch.utils.weak import WeakIdKeyDictionary

    # Weight to its state, some of its numbers, and its matrix.
    _kept = WeakIdKeyDictionary()
