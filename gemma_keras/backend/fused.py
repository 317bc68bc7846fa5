"""Operations that belong together, in one kernel where there is one."""

import functools
import importlib
import math

import keras
import numpy as np
from keras import ops

from gemma_keras.backend.library import NAME, torch
from gemma_keras.backend.running import in_program


def rms_norm(x, scale, epsilon, dtype):
    """`x` [..., D] by the root of its mean square, times 1 + `scale` [D].

    `epsilon` is added to the mean square over the last axis. All of it in float32, and
    rounded to `dtype` last.
    """
    scale = ops.convert_to_tensor(scale)
    if _kernels(x):
        return torch.ops.gemma_keras.rms_norm(x, scale, epsilon, getattr(torch, dtype))
    if NAME == "torch" and in_program.get():
        return _torch_norm(x.float(), scale, epsilon, x).to(getattr(torch, dtype))
    x = ops.cast(x, "float32")
    variance = ops.mean(ops.square(x), axis=-1, keepdims=True)
    x = x * ops.rsqrt(variance + epsilon) * (1.0 + ops.cast(scale, "float32"))
    return ops.cast(x, dtype)


def _torch_norm(wide, scale, epsilon, kept):
    """`rms_norm` in half of the operations, each of which takes a while to say.

    Not where there is a gradient: a norm of zeros has none. `wide` is in float32, and
    is changed unless it is `kept`.
    """
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    root = math.sqrt(wide.shape[-1])
    least = torch.full((1,), root * math.sqrt(epsilon), device=wide.device)
    norm = norm.hypot_(least)
    normalised = wide / norm if wide is kept else wide.div_(norm)
    return normalised.mul_((1.0 + scale.float()) * root)


def rotate(x, cos, sin):
    """`x` [B, T, heads, H] times `cos`, plus `x` turned by H / 2 times `sin`.

    So pairs (j, j + H / 2) are rotated. Both are float32 [B, T, 1, H], B perhaps 1. The
    result is rounded to the dtype of `x` last.
    """
    if _kernels(x) and _is_power_of_two(x.shape[-1]):
        return torch.ops.gemma_keras.rotate(x, cos, sin)
    wide = ops.cast(x, "float32")
    swapped = ops.roll(wide, x.shape[-1] // 2, axis=-1)
    if NAME == "torch":
        # In one operation less, each of which takes a while to say.
        return ops.cast(torch.addcmul(wide * cos, swapped, sin), x.dtype)
    return ops.cast(wide * cos + swapped * sin, x.dtype)


def norm_and_rotate(parts, scales, epsilon, cos, sin):
    """Each of several [B, T, heads, H], normalised if there are scales, and rotated.

    Args:
        parts: a list of arrays, of the same dtype.
        scales: for `rms_norm`, one [H] for each of them; or empty.
        epsilon: likewise.
        cos: for `rotate`.
        sin: likewise.
    """
    first = parts[0]
    if not (NAME == "torch" and in_program.get() and first.device.type == "cpu"):
        if scales:
            dtype = keras.backend.standardize_dtype(first.dtype)
            parts = [
                rms_norm(x, scale, epsilon, dtype)
                for x, scale in zip(parts, scales, strict=True)
            ]
        return [rotate(x, cos, sin) for x in parts]
    # All heads at once: an operation takes a while to say, whatever its size.
    heads = [x.shape[2] for x in parts]
    wide = torch.cat(parts, dim=2).float()
    if scales:
        each = zip(map(ops.convert_to_tensor, scales), heads, strict=True)
        scale = torch.cat([scale.expand(count, -1) for scale, count in each])
        wide = _torch_norm(wide, scale, epsilon, None)
    return rotate(wide, cos, sin).to(first.dtype).split(heads, dim=2)


def gated_gelu(gate, up):
    """GELU(gate) * up, of the same shape, GELU in its tanh form and rounded first."""
    if _kernels(gate):
        return torch.ops.gemma_keras.gated_gelu(gate, up)
    return ops.gelu(gate, approximate=True) * up


# Keys of a row that a kernel holds at once.
_MOST_KEYS = 2**14


def masked_softmax_serves(query, mask):
    """Whether there is `masked_softmax` for queries and a mask [..., S]."""
    return _kernels(query) and mask.shape[-1] <= _MOST_KEYS


def masked_softmax(products, mask, cap, hidden):
    """Softmax over keys, in float32 and rounded last.

    Args:
        products: [B, K, T G, S].
        mask: bool [B, 1, T, S], B perhaps 1: what is not seen counts as `hidden`.
        cap: None, or the bound c of c tanh(products / c).
        hidden: a number.

    Returns:
        [B, K, T G, S], in the dtype of `products`.
    """
    return torch.ops.gemma_keras.masked_softmax(products, mask, cap or 0.0, hidden)


def _is_power_of_two(number):
    return number & (number - 1) == 0


def _kernels(x):
    """Whether there are kernels of ours for `x`, of which nobody asks the gradient."""
    return NAME == "torch" and in_program.get() is not None and has_kernels(x.device)


@functools.cache
def has_kernels(device):
    """Whether a torch device can run the kernels of ours."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        importlib.import_module("gemma_keras.backend.triton_kernels")
    except ImportError:
        # As on Windows, where torch comes without Triton.
        return False
    return True


def softmax_of_tile(logits, columns, labels, top):
    """What rows of a softmax take from some of their logits.

    Args:
        logits: float32 [C, T]; torch changes them.
        columns: int32 [T], what each of them is the logit of. They follow each other;
            -1 is none.
        labels: int32 [C, 1].
        top: float32 [C, 1], the largest logit of each row so far.

    Returns:
        The largest logit now; the column of these whose logit is the largest; the sum
        of exp(logit - top); and the label's logit, 0 where it is not among these: each
        [C, 1]. And exp(logit - top) [C, T], 0 for the label.
    """
    if NAME == "torch":
        # In place, and the label by its place: a pass over all costs as much as a
        # tenth of the product.
        highest, at = logits.max(-1, keepdim=True)
        place = (labels - columns[-1] + len(columns) - 1).long()
        inside = place.clamp(0, len(columns) - 1)
        there = columns[inside] == labels
        chosen = torch.where(there, logits.gather(1, inside), 0.0)
        top = torch.maximum(top, highest)
        powers = logits.sub_(top).exp_()
        total = powers.sum(-1, keepdim=True)
        rest = torch.where(there, 0.0, powers.gather(1, inside))
        return top, columns[at], total, chosen, powers.scatter_(1, inside, rest)
    highest = ops.max(logits, axis=-1, keepdims=True)
    # XLA's own way to find a place takes a quarter of what the products take.
    best = ops.where(logits == highest, columns, np.iinfo("int32").max)
    best = ops.min(best, axis=-1, keepdims=True)
    top = ops.maximum(top, highest)
    powers = ops.exp(logits - top)
    total = ops.sum(powers, axis=-1, keepdims=True)
    there = columns == labels
    chosen = ops.sum(ops.where(there, logits, 0.0), axis=-1, keepdims=True)
    return top, best, total, chosen, ops.where(there, 0.0, powers)
