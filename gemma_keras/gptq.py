"""Rounding to 4 bits that minds what the numbers are multiplied by.

Of a projection, it is the outputs X W^T that should stay, not the weights W: the loss
is trace((W - Q) H (W - Q)^T) with H = X^T X, the second moments of its inputs. GPTQ
(Frantar et al. 2022, arXiv:2210.17323) makes up for the error of each column in those
that come after it.

Written with a factor H = R R^T, R upper triangular, as here, the loss is the sum of
squares of (W - Q) R, whose column j depends on columns up to j of the codes alone: each
code in turn is the one that makes it smallest. That is the same rounding (Chee et al.
2023, arXiv:2307.13304, theorem 6), without an inverse.
"""

import concurrent.futures
import os

import ml_dtypes
import numpy as np

from gemma_keras.quantization import joined, nearest, spans

# Rows that one core rounds at a time.
_ROWS = 512


def round_to_outputs(matrix, moments, group_size, damping=0.01):
    """The arrays of `quantization.pack`, for the least error of the outputs.

    Args:
        matrix: floats [rows, columns].
        moments: X^T X [columns, columns] of inputs X [tokens, columns].
        group_size: columns that share a scale and an offset.
        damping: what is added to the diagonal of `moments`, in its means: inputs that
            were never seen count as much.

    Raises:
        ValueError: `moments` has numbers that are not finite; or too little damping
            leaves it without a factor.
    """
    factor = _factor(moments, damping)
    rows, columns = matrix.shape
    codes = np.empty((rows, columns), np.uint8)
    scales = np.empty((rows, columns // group_size), ml_dtypes.bfloat16)
    offsets = np.empty_like(scales)

    def fill(start):
        part = slice(start, start + _ROWS)
        chunk = np.asarray(matrix[part]).astype(np.float32)
        with np.errstate(invalid="ignore"):
            found = _round(chunk.T, factor, group_size)
        codes[part], scales[part], offsets[part] = (x.T for x in found)

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(fill, range(0, rows, _ROWS)):
            pass
    return joined(codes, scales, offsets)


def _factor(moments, damping):
    """R, float32, of `moments` = R R^T, upper triangular."""
    moments = np.array(moments, np.float64)
    if not np.isfinite(moments).all():
        raise ValueError("The inputs of a projection are not finite numbers.")
    diagonal = np.einsum("ii->i", moments)
    mean = diagonal.mean()
    # Without any input, as good as with inputs of one size.
    diagonal += damping * mean if mean else 1.0
    # Cholesky's factors are lower triangular: that of the reversed order, reversed.
    try:
        lower = np.linalg.cholesky(moments[::-1, ::-1])
    except np.linalg.LinAlgError:
        raise ValueError(
            f"damping={damping:g} is too little for what was read: raise it."
        ) from None
    return np.ascontiguousarray(lower[::-1, ::-1], np.float32)


def _round(weights, factor, group_size):
    """Codes [columns, rows], and scales and offsets [groups, rows], of `weights`.

    Args:
        weights: float32 [columns, rows].
        factor: R.
        group_size: columns that share a scale and an offset.
    """
    columns, rows = weights.shape
    errors = np.empty_like(weights)
    codes = np.empty(weights.shape, np.uint8)
    scales = np.empty((columns // group_size, rows), np.float32)
    offsets = np.empty_like(scales)
    for number, start in enumerate(range(0, columns, group_size)):
        group = slice(start, start + group_size)
        inner = factor[group, group]
        carried = factor[:start, group].T @ errors[:start]
        # What would undo all that is carried over from the columns before.
        wanted = weights[group] + np.linalg.solve(inner.T, carried).astype(np.float32)
        choices = [np.stack(x)[..., 0] for x in zip(*spans(wanted.T), strict=True)]
        found = _round_group(weights[group], carried, inner, *choices)
        best = found[0].argmin(axis=0), np.arange(rows)
        codes[group], errors[group] = (x[:, *best] for x in found[1:])
        scales[number], offsets[number] = (x[best] for x in choices)
    return codes, scales, offsets


def _round_group(weights, carried, inner, scales, offsets):
    """Losses [choices, rows], codes and errors [columns, choices, rows] of a group.

    Args:
        weights: [columns, rows].
        carried: what columns before add to those of (W - Q) R, likewise.
        inner: R's rows and columns of this group.
        scales: [choices, rows].
        offsets: [choices, rows].
    """
    columns, size = len(weights), scales.size
    codes = np.empty((columns, *scales.shape), np.uint8)
    errors = np.empty((columns, size), np.float32)
    losses = np.zeros_like(scales)
    for j in range(columns):
        before = carried[j] + (inner[:j, j] @ errors[:j]).reshape(scales.shape)
        code = nearest(weights[j] + before / inner[j, j], scales, offsets)
        error = weights[j] - (code * scales + offsets)
        losses += np.square(before + error * inner[j, j])
        codes[j], errors[j] = code, error.reshape(size)
    return losses, codes, errors.reshape(codes.shape)
