"""Copies of arrays in memory that a backend can take over as it is.

Checkpoints of PyTorch keep a kernel as [out, in], Keras as [in, out], so that most of
a model is transposed while it is loaded. XLA and TensorFlow do this at half a gigabyte
a second on a core; the way below takes a fraction of that time.
"""

import concurrent.futures
import os

import numpy as np

# What XLA and TensorFlow ask of memory that they use without a copy.
ALIGNMENT = 64
# A block of this many rows and columns stays in a core's cache while it is turned.
ROWS, COLUMNS = 1024, 256


def aligned_copy(array):
    """A C-contiguous copy of `array` whose memory begins on a border of 64 bytes.

    Several threads work on a large one. It may be a transposed view.
    """
    size = array.dtype.itemsize
    raw = np.empty(array.nbytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    copy = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    source, target = array, copy
    if size in (2, 4):
        # Numpy copies its own types quicker than those that ml_dtypes adds.
        source, target = array.view(f"u{size}"), copy.view(f"u{size}")
    _fill(target, source)
    return copy


def ordered(array):
    """`array`, or a C-contiguous copy if its numbers lie in another order."""
    return array if array.flags.c_contiguous else aligned_copy(array)


def _fill(target, source):
    if source.ndim == 2 and source.flags.f_contiguous and not source.flags.c_contiguous:
        _in_parallel(_transpose, source.T, target)
    elif source.ndim and source.flags.c_contiguous:
        _in_parallel(_copy, source, target)
    elif source.ndim == 3:
        # Kernels with heads: an axis divided, of a matrix that may be transposed; or
        # heads as the first axis, each of them transposed.
        shape = _shape_of_matrix(source)
        if shape is not None:
            return _fill(target.reshape(shape), source.reshape(shape))
        for part, matrix in zip(target, source, strict=True):
            _fill(part, matrix)
    else:
        np.copyto(target, source)


def _shape_of_matrix(array):
    """The shape in which two of three axes are one, without a copy; None if none is."""
    outer, middle, inner = array.shape
    if array.strides[1] == inner * array.strides[2]:
        return outer, middle * inner
    if array.strides[0] == middle * array.strides[1]:
        return outer * middle, inner
    return None


def _in_parallel(work, source, target):
    """Calls `work(source, target, first, last)` for parts of the rows of `source`."""
    threads = min(os.cpu_count() or 1, 8, 1 + source.nbytes // 2**22)
    # In steps of 64 rows, lest two threads write to one line of a cache.
    step = max(64, -(-len(source) // threads // 64) * 64)
    spans = [(at, min(at + step, len(source))) for at in range(0, len(source), step)]
    if len(spans) <= 1:
        return work(source, target, 0, len(source))
    with concurrent.futures.ThreadPoolExecutor(len(spans)) as pool:
        list(pool.map(lambda span: work(source, target, *span), spans))


def _copy(source, target, first, last):
    target[first:last] = source[first:last]


def _transpose(source, target, first, last):
    """Writes rows of `source` as columns of `target`."""
    space = np.empty((ROWS, COLUMNS), source.dtype)
    for row in range(first, last, ROWS):
        rows = slice(row, min(row + ROWS, last))
        for column in range(0, source.shape[1], COLUMNS):
            columns = slice(column, column + COLUMNS)
            part = source[rows, columns]
            block = space[: part.shape[0], : part.shape[1]]
            np.copyto(block, part)
            target[columns, rows] = block.T
