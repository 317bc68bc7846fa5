"""Filters against the textbook definition, which sorts, on logits from hypothesis."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from gemma_keras import samplers

# Multiples of 1/1024: what is nearer than 2**-32 of the range counts as a tie.
LOGITS = st.lists(
    st.integers(-30_000, 30_000), min_size=2, max_size=40, unique=True
).map(lambda values: np.array([values], "float32") / 1024)


def kept(logits, sampler):
    features = samplers.features(sampler)
    settings = samplers.controls(sampler, 0)
    tensor = ops.convert_to_tensor(logits)
    filtered = samplers.filtered_logits(tensor, settings, features)
    return ops.convert_to_numpy(filtered)[0] > samplers.DROPPED / 2


def softmax(x):
    weights = np.exp(x.astype("float64") - x.max())
    return weights / weights.sum()


@settings(max_examples=60, deadline=None)
@given(LOGITS, st.integers(1, 50))
def test_top_k_keeps_the_k_highest(logits, k):
    order = np.argsort(-logits[0])
    expected = np.zeros(logits.shape[1], bool)
    expected[order[:k]] = True
    if k == 1:
        return  # greedy: nothing is filtered
    found = kept(logits, samplers.TopKSampler(k=k))
    # Tokens less likely than e**-120 have probability zero in float32.
    possible = logits[0] >= logits.max() - 120
    np.testing.assert_array_equal(found & possible, expected & possible)


@settings(max_examples=60, deadline=None)
@given(LOGITS, st.floats(0.05, 0.99))
def test_top_p_keeps_the_fewest_that_hold_p(logits, p):
    probabilities = softmax(logits[0])
    order = np.argsort(-probabilities)
    before = np.cumsum(probabilities[order]) - probabilities[order]
    expected = np.zeros(len(order), bool)
    expected[order] = before < p
    # Where the sum meets p to within float32's rounding, either set is right.
    if np.abs(np.cumsum(probabilities[order]) - p).min() < 1e-5:
        return
    np.testing.assert_array_equal(kept(logits, samplers.TopPSampler(p=p)), expected)


@settings(max_examples=40, deadline=None)
@given(LOGITS, st.floats(0.01, 1.0))
def test_min_p_keeps_what_is_likely_enough(logits, p):
    ratio = softmax(logits[0]) / softmax(logits[0]).max()
    if np.abs(ratio - p).min() < 1e-5 * p:
        return
    found = kept(logits, samplers.MinPSampler(p=p))
    np.testing.assert_array_equal(found, ratio >= p)


def test_filters_apply_in_order_temperature_first():
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], "float32"))
    cold = samplers.Sampler(temperature=0.5, top_p=0.7)
    # Squared and normalised: 0.68, 0.25, 0.06, 0.01.
    assert kept(logits, cold).tolist() == [True, True, False, False]
    assert kept(logits, samplers.Sampler(top_k=3, top_p=0.9)).tolist() == [
        *[True, True, True],
        False,
    ]


def test_the_repetition_penalty_is_that_of_ctrl():
    logits = ops.convert_to_tensor(np.array([[2.0, -2.0, 1.0]], "float32"))
    sampler = samplers.Sampler(temperature=0.0, repetition_penalty=1.25)
    seen = ops.convert_to_tensor(np.array([[True, True, False]]))
    filtered = samplers.filtered_logits(
        logits, samplers.controls(sampler, 0), samplers.features(sampler), seen
    )
    np.testing.assert_allclose(ops.convert_to_numpy(filtered), [[1.6, -2.5, 1.0]])


def test_random_choice_follows_the_softmax():
    """A chi-squared test of 4,000 draws; the bound is passed once in 10,000 runs."""
    from gemma_keras import backend

    logits = np.array([1.0, 0.0, -1.0, 2.0, -30.0], "float32")
    rows = np.tile(logits, (4000, 1))
    sampler = samplers.RandomSampler()
    noise = backend.gumbel(np.int32(11), np.int32(3), rows.shape)
    tokens = samplers.choose(
        ops.convert_to_tensor(rows),
        samplers.controls(sampler, 11),
        samplers.features(sampler),
        noise=noise,
    )
    counts = np.bincount(ops.convert_to_numpy(tokens), minlength=5)
    assert counts[4] == 0
    expected = 4000 * softmax(logits)[:4]
    assert ((counts[:4] - expected) ** 2 / expected).sum() < 21.1


def test_noise_depends_on_the_seed_and_on_the_step():
    from gemma_keras import backend

    def noise(seed, count):
        values = backend.gumbel(np.int32(seed), np.int32(count), (1, 8))
        return ops.convert_to_numpy(values)

    np.testing.assert_array_equal(noise(1, 2), noise(1, 2))
    assert np.abs(noise(1, 2) - noise(1, 3)).max() > 0.01
    assert np.abs(noise(1, 2) - noise(2, 2)).max() > 0.01


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, "temperature must be a number of at least 0"),
        ({"temperature": None}, "temperature must be"),
        ({"top_k": 0}, "top_k must be None or a positive integer"),
        ({"top_p": 0}, "top_p must be between 0"),
        ({"top_p": 1.5}, "top_p must be between 0"),
        ({"min_p": -0.1}, "min_p must be between 0 and 1"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a positive number"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        samplers.Sampler(**settings)


@pytest.mark.parametrize("name", samplers.NAMES)
def test_samplers_survive_their_config(name):
    sampler = samplers.get(name)
    assert type(sampler).from_config(sampler.get_config()) == sampler
    assert samplers.get(sampler) is sampler


def test_beams_are_refused_if_none():
    with pytest.raises(ValueError, match="num_beams must be a positive integer"):
        samplers.BeamSampler(num_beams=0)
