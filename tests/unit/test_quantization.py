"""Rounding to 8 and 4 bits, against what the formulas of the module's page say."""

import dataclasses

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest

from gemma_keras import registry
from gemma_keras.quantization import Packing, Quantization, pack, unpack

pytestmark = pytest.mark.any_backend

MATRICES = hypothesis.extra.numpy.arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.just(64)),
    elements=st.floats(-1000, 1000, width=32),
)


def restored(arrays, packing):
    """Number by number, as the module's page has it."""
    codes, scales = arrays["codes"], arrays["scales"].astype("float64")
    rows, columns = codes.shape[0], codes.shape[1] * (8 // packing.bits)
    found = np.empty((rows, columns))
    for row in range(rows):
        for column in range(columns):
            if packing.bits == 8:
                found[row, column] = float(codes[row, column]) * scales[row, 0]
                continue
            byte = int(codes[row, column % (columns // 2)])
            code = byte % 16 if column < columns // 2 else byte // 16
            group = column // packing.group_size
            offset = float(arrays["offsets"][row, group])
            found[row, column] = code * scales[row, group] + offset
    return found


@hypothesis.given(MATRICES)
@hypothesis.settings(deadline=None, max_examples=60)
def test_int8_is_within_half_a_step(matrix):
    arrays = pack(matrix, Packing(8))
    assert arrays["codes"].dtype == np.int8
    step = np.abs(matrix).max(axis=1, keepdims=True).astype("float64") / 127
    found = restored(arrays, Packing(8))
    assert (np.abs(found - matrix) <= step * 0.5001 + 1e-30).all()
    np.testing.assert_allclose(unpack(arrays, Packing(8)), found, rtol=1e-6)


@hypothesis.given(MATRICES, st.sampled_from([16, 32, 64]))
@hypothesis.settings(deadline=None, max_examples=60)
def test_int4_is_no_worse_than_spreading_codes_over_the_range(matrix, group_size):
    packing = Packing(4, group_size)
    arrays = pack(matrix, packing)
    found = restored(arrays, packing)
    # Sums of numbers that almost cancel are as exact as their parts.
    np.testing.assert_allclose(unpack(arrays, packing), found, rtol=1e-5, atol=1e-2)
    groups = matrix.reshape(len(matrix), -1, group_size).astype("float64")
    low, high = groups.min(axis=2, keepdims=True), groups.max(axis=2, keepdims=True)
    step, low = (
        x.astype(ml_dtypes.bfloat16).astype("float64") for x in ((high - low) / 15, low)
    )
    codes = np.clip(np.rint((groups - low) / np.where(step == 0, 1, step)), 0, 15)
    plain = np.square(codes * step + low - groups).sum(axis=2)
    ours = np.square(found.reshape(groups.shape) - groups).sum(axis=2)
    assert (ours <= plain * 1.001 + 1e-3).all()


def test_sizes_are_those_of_the_shapes():
    matrix = np.random.default_rng(0).normal(size=(300, 384)).astype("float32")
    for packing, bits in ((Packing(8), 8.1), (Packing(4, 128), 4.25)):
        arrays = pack(matrix, packing)
        shapes = {n: (a.shape, a.dtype.name) for n, a in arrays.items()}
        assert shapes == packing.shapes(300, 384)
        assert sum(a.nbytes for a in arrays.values()) * 8 / matrix.size <= bits


@pytest.mark.parametrize("packing", [Packing(8), Packing(4, 32)])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_shows_in_a_scale(packing, value):
    matrix = np.ones((4, 64), "float32")
    matrix[2, 5] = value
    scales = pack(matrix, packing)["scales"].astype("float32")
    assert np.isfinite(scales[[0, 1, 3]]).all()
    assert not np.isfinite(scales[2]).all()


def test_groups_that_do_not_divide_a_row_are_smaller_or_the_row():
    quantization = Quantization("int4", 128)
    assert quantization.packing("a/query", 640) == Packing(4, 128)
    assert quantization.packing("a/query", 96) == Packing(4, 32)
    assert quantization.packing("a/query", 44) == Packing(8)
    assert Quantization("int8").packing("a/query", 640) == Packing(8)


def test_what_stays_as_it_is():
    config = registry.architectures()["gemma_2b"]
    found = Quantization("int4", embedding="int8", layers="ffw|embedding")
    packings = found.packings(config)
    assert packings.pop("token_embedding") == Packing(8)
    assert set(packings.values()) == {Packing(4, 128)}
    assert len(packings) == 3 * config.num_layers
    everything = Quantization("int8").packings(config)
    assert len(everything) == 7 * config.num_layers + 1


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"mode": "int5"}, "mode must be one of int8, int4"),
        ({"mode": "int4", "group_size": 20}, "group_size must be one of 16"),
        ({"mode": "int4", "embedding": "float"}, "embedding must be one of"),
        ({"mode": "int4", "layers": "("}, "regular expression"),
    ],
)
def test_wrong_settings_are_refused(fields, told):
    with pytest.raises(ValueError, match=told):
        Quantization(**fields)
    assert Quantization.get(None) is None
    assert Quantization.get({"mode": "int8"}) == Quantization("int8")
    assert dataclasses.asdict(Quantization.get("int4"))["group_size"] == 128
