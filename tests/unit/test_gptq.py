"""Rounding by second moments, against GPTQ as its paper has it, column by column."""

import numpy as np
import pytest

from gemma_keras.gptq import round_to_outputs
from gemma_keras.quantization import Packing, pack, unpack

pytestmark = pytest.mark.any_backend


def example(seed, rows=24, columns=64, tokens=400):
    """Weights, and moments of inputs that are mixtures of a few."""
    random = np.random.default_rng(seed)
    mixed = random.normal(size=(tokens, 12)) @ random.normal(size=(12, columns))
    inputs = mixed + 0.3 * random.normal(size=(tokens, columns))
    weights = random.standard_t(5, size=(rows, columns)).astype("float32")
    return weights, (inputs.T @ inputs).astype("float32")


def outputs_error(weights, found, moments):
    difference = (weights - found).astype("float64")
    return np.einsum("rc,cd,rd->r", difference, moments.astype("float64"), difference)


def reference(weights, moments, packing, choices, damping=0.01):
    """Numbers that Algorithm 1 of arXiv:2210.17323 makes, one column after the other.

    The inverse of what is left of the moments is made anew for each column, as optimal
    brain quantisation has it; `choices` [rows, groups] are scales and offsets.
    """
    left = weights.astype("float64").copy()
    moments = moments.astype("float64")
    moments = moments + damping * np.diag(moments).mean() * np.eye(len(moments))
    found = np.zeros_like(left)
    for column in range(left.shape[1]):
        scale, offset = (x[:, column // packing.group_size] for x in choices)
        code = np.clip(np.rint((left[:, column] - offset) / scale), 0, 15)
        found[:, column] = code * scale + offset
        inverse = np.linalg.inv(moments[column:, column:])
        error = (left[:, column] - found[:, column]) / inverse[0, 0]
        left[:, column:] -= np.outer(error, inverse[0])
    return found


@pytest.mark.parametrize("group_size", [16, 32, 64])
def test_codes_are_those_of_the_paper(group_size):
    weights, moments = example(3)
    packing = Packing(4, group_size)
    arrays = round_to_outputs(weights, moments, group_size)
    shapes = {name: (a.shape, a.dtype.name) for name, a in arrays.items()}
    assert shapes == packing.shapes(*weights.shape)
    choices = [arrays[name].astype("float64") for name in ("scales", "offsets")]
    expected = reference(weights, moments, packing, choices)
    # Where a number lies in the middle of two codes, rounding errors decide, and what
    # comes after it in its row differs too.
    same = np.isclose(unpack(arrays, packing), expected, atol=1e-4).all(axis=1)
    assert same.mean() > 0.9


def test_ranges_are_of_weights_that_make_up_for_what_came_before():
    weights, moments = example(4)
    arrays = round_to_outputs(weights, moments, 32)
    found = unpack(arrays, Packing(4, 32)).astype("float64")
    damped = moments + 0.01 * np.diag(moments).mean() * np.eye(64)
    # Least squares: what the second half should be, given the codes of the first.
    error = weights[:, :32] - found[:, :32]
    wanted = (
        weights[:, 32:]
        + np.linalg.solve(damped[32:, 32:], damped[32:, :32] @ error.T).T
    )
    width = wanted.max(axis=1) - wanted.min(axis=1)
    spans = arrays["scales"][:, 1].astype("float64") * 15 / width
    known = np.array([0.8, 0.85, 0.9, 0.95, 1])
    closest = known[np.abs(spans[:, None] - known).argmin(axis=1)]
    # Scales are stored in bfloat16.
    np.testing.assert_allclose(spans, closest, rtol=2**-8)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("group_size", [16, 64])
def test_outputs_of_correlated_inputs_change_less(seed, group_size):
    weights, moments = example(seed)
    packing = Packing(4, group_size)
    nearest = unpack(pack(weights, packing), packing)
    found = unpack(round_to_outputs(weights, moments, group_size), packing)
    errors = [outputs_error(weights, x, moments) for x in (nearest, found)]
    # Not of every row by theory, but of each of these by a wide margin in sum.
    assert errors[1].sum() < 0.5 * errors[0].sum()
    assert (errors[1] < errors[0]).all()


def test_inputs_without_correlation_leave_the_nearest_codes():
    weights, _ = example(0)
    arrays = round_to_outputs(weights, np.eye(64, dtype="float32"), 32)
    expected = pack(weights, Packing(4, 32))
    for name, array in expected.items():
        np.testing.assert_array_equal(
            arrays[name].astype("float32"), array.astype("float32")
        )


def test_inputs_that_never_came_and_rows_in_chunks_do_not_matter():
    weights, moments = example(1, rows=1100)
    moments[:, 5] = moments[5] = 0
    packing = Packing(4, 32)
    whole = unpack(round_to_outputs(weights, moments, 32), packing)
    part = unpack(round_to_outputs(weights[600:700], moments, 32), packing)
    assert np.isclose(whole[600:700], part, atol=1e-4).all(axis=1).mean() > 0.9
    nothing = round_to_outputs(weights, np.zeros_like(moments), 32)
    nearest = pack(weights, packing)
    np.testing.assert_array_equal(nothing["codes"], nearest["codes"])


def test_moments_without_a_factor_are_told():
    weights, moments = example(2)
    # Of more than what they are moments of: no inputs have these.
    moments[0, 1] = moments[1, 0] = 9 * moments[0, 0]
    with pytest.raises(ValueError, match=r"damping=0\.001 is too little"):
        round_to_outputs(weights, moments, 32, damping=0.001)
    moments[3, 3] = np.inf
    with pytest.raises(ValueError, match="not finite"):
        round_to_outputs(weights, moments, 32)


def test_what_is_not_finite_shows_in_a_scale():
    weights, moments = example(2)
    weights[3, 40] = np.nan
    scales = round_to_outputs(weights, moments, 32)["scales"].astype("float32")
    assert np.isfinite(np.delete(scales, 3, axis=0)).all()
    assert not np.isfinite(scales[3]).all()
