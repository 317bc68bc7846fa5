"""Copies that a backend can take over: the same values, in order, aligned."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_keras import buffers

pytestmark = pytest.mark.any_backend

DTYPES = ("float16", "float32", "float64", "uint8", ml_dtypes.bfloat16)


def numbered(shape, dtype):
    """An array without two neighbours alike, as bytes."""
    size = np.dtype(dtype).itemsize
    count = int(np.prod(shape))
    kind = f"u{size}"
    return (np.arange(count) * 40503).astype(kind).view(dtype).reshape(shape)


def same(copy, array):
    assert copy.shape == array.shape
    assert copy.dtype == array.dtype
    kind = f"u{array.dtype.itemsize}"
    np.testing.assert_array_equal(copy.view(kind), np.array(array).view(kind))
    assert copy.flags.c_contiguous
    assert copy.ctypes.data % buffers.ALIGNMENT == 0
    assert not np.shares_memory(copy, array)


def _halves(number):
    return (2, number // 2) if number % 2 == 0 else (1, number)


@settings(max_examples=150)
@given(
    rows=st.integers(1, 300),
    columns=st.integers(1, 80),
    dtype=st.sampled_from(DTYPES),
    form=st.sampled_from(["plain", "transposed", "strided", "misaligned", "heads"]),
)
def test_a_copy_is_the_array(rows, columns, dtype, form):
    array = numbered((rows, columns), dtype)
    if form == "transposed":
        array = array.T
    elif form == "strided":
        array = array[:, ::2]
    elif form == "heads":
        # [out, heads, size], as [heads, out, size] and as [heads, size, out].
        split = numbered((rows, columns, 2), dtype)
        same(buffers.aligned_copy(split.transpose(1, 0, 2)), split.transpose(1, 0, 2))
        # [in, heads, size] and [heads, size, in] of a matrix that is transposed.
        turned = array.T.reshape(columns, *_halves(rows))
        same(buffers.aligned_copy(turned), turned)
        turned = array.T.reshape(*_halves(columns), rows)
        same(buffers.aligned_copy(turned), turned)
        array = split.transpose(1, 2, 0)
    elif form == "misaligned":
        held = np.empty(array.nbytes + 1, np.uint8)
        held[1:] = array.view(np.uint8).ravel()
        array = held[1:].view(dtype).reshape(array.shape).T
    same(buffers.aligned_copy(array), array)


@pytest.mark.parametrize("dtype", ["float32", ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(3001, 1500), (1500, 3002)])
def test_a_large_one_is_divided_among_threads(monkeypatch, shape, dtype):
    monkeypatch.setattr(buffers.os, "cpu_count", lambda: 3)
    array = numbered(shape, dtype)
    same(buffers.aligned_copy(array), array)
    same(buffers.aligned_copy(array.T), array.T)


@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (5,), (3, 4, 5)])
def test_other_shapes(shape):
    array = numbered(shape, "float32")
    copy = buffers.aligned_copy(array)
    assert copy.shape == shape
    np.testing.assert_array_equal(copy, array)
