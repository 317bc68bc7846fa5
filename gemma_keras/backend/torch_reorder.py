"""Matrices of weights in the order that oneDNN multiplies by, kept beside the weights.

oneDNN brings a matrix of bfloat16 into its own order for each product. For the few rows
of decoding that takes longer than the product: 180 us of 250 for [640, 2048].
"""

import contextlib
import pathlib

from gemma_keras.backend.device import gives_back_memory, memory_left
from gemma_keras.backend.library import NAME, torch

# Bytes of memory that are to be left to others.
_LEFT = 2**31


def can_reorder():
    """Whether torch can: the operation is not part of what it promises."""
    return hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def reordered(weight, turned):
    """`weight` [F, D], or [D, F] if `turned`, as oneDNN's linear layers take it.

    In oneDNN's order, in memory of its own that is kept until the weight changes or is
    gone; or as it is, where memory is short or `giving_back_memory`.
    """
    matrix = weight.detach().T if turned else weight.detach()
    if gives_back_memory() or weight.is_inference():
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


def forget():
    """Give back all that is kept."""
    _kept.clear()


def _memory_left():
    """Bytes that the system, and the container, have left; 0 if they do not say."""
    left = [memory_left() or 0]
    with contextlib.suppress(OSError, ValueError):
        group = pathlib.Path("/sys/fs/cgroup")
        most, used = ((group / f"memory.{x}").read_text() for x in ("max", "current"))
        left.append(int(most) - int(used))
    return min(left)


if NAME == "torch":
    from torch.utils.weak import WeakIdKeyDictionary

    # Weight to its state, some of its numbers, and its matrix.
    _kept = WeakIdKeyDictionary()
