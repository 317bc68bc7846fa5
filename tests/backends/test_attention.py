"""Attention against the published formulas, computed here in float64 numpy."""

import keras
import numpy as np
import pytest
from keras import ops
from slopes import gradients, relative

from gemma_keras import GemmaConfig, backend
from gemma_keras.attention import attend, soft_cap, visible, visible_before
from gemma_keras.cache import Codes


def config_of(cap=None):
    """Two key heads for four queries; the scale is not that of the head's size."""
    return GemmaConfig(
        vocab_size=13,
        num_layers=2,
        hidden_dim=8,
        ffn_dim=20,
        num_query_heads=4,
        num_kv_heads=2,
        head_dim=6,
        query_pre_attn_scalar=7.0,
        attn_logit_soft_cap=cap,
    )


def numpy(x):
    return np.asarray(ops.convert_to_numpy(x), "float64")


def formula(query, key, value, mask, cap):
    """[B, T, N, H]; zeros where a query sees nothing."""
    mixed = np.zeros(query.shape)
    for b, t, n in np.ndindex(query.shape[:3]):
        scores = key[b, n // 2] @ query[b, t, n] * 7.0**-0.5
        scores = scores if cap is None else cap * np.tanh(scores / cap)
        weights = np.exp(scores) * mask[b, t]
        if weights.sum():
            mixed[b, t, n] = weights / weights.sum() @ value[b, n // 2]
    return mixed


def example():
    """Queries, keys, values and a mask; the query [0, 1] sees nothing."""
    random = np.random.default_rng(1)
    query = 4 * random.normal(size=(2, 3, 4, 6))
    key, value = 4 * random.normal(size=(2, 2, 2, 5, 6))
    mask = random.random((2, 3, 5)) > 0.4
    mask[0, 1] = False
    mask[..., 0] |= ~mask.any(-1) & (np.arange(3) != 1)
    assert not mask[0, 1].any() and mask.any(-1).sum() == 5
    return (query, key, value), mask


def test_a_window_holds_itself_and_the_tokens_just_before():
    positions = np.arange(5)[None]
    expected = [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 1, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]
    positions = ops.convert_to_tensor(positions)
    found = numpy(visible(positions, positions, window=3))
    np.testing.assert_array_equal(found[0], expected)
    causal = numpy(visible(positions, positions))
    np.testing.assert_array_equal(causal[0], np.tri(5))


def test_missing_keys_are_invisible_and_their_order_does_not_matter():
    query = ops.convert_to_tensor(np.array([[4]]))
    key = ops.convert_to_tensor(np.array([[-1, 4, 2, 5, 3]]))
    found = numpy(visible(query, key, window=2))
    np.testing.assert_array_equal(found[0, 0], [0, 1, 0, 0, 1])


@pytest.mark.parametrize("window", [None, 40], ids=["global", "window"])
def test_long_rows_are_attended_in_blocks_to_the_same_effect(window):
    length, starts = 300, np.array([[0, 130], [0, 299]])
    segments = (np.arange(length) >= starts[:, 1:]).astype("int32")
    positions = np.arange(length) - np.take_along_axis(starts, segments, axis=1)
    # The first row ends in padding.
    keys = np.where(np.arange(length) < [[290], [300]], positions, -1)
    positions, keys, segments = map(ops.convert_to_tensor, (positions, keys, segments))
    blocks = visible_before(positions, keys, window, segments, in_blocks=True)
    assert [(b.start, b.stop) for b in blocks] == [(0, 128), (128, 256), (256, 300)]
    same = ops.equal(segments[:, :, None], segments[:, None, :])
    whole = ops.logical_and(visible(positions, keys, window), same)
    random = np.random.default_rng(3)
    shapes = [(2, length, 4, 6), (2, 2, length, 6), (2, 2, length, 6)]
    arrays = [random.normal(size=shape) for shape in shapes]
    upstream = random.normal(size=(2, length, 24))
    upstream[0, 290:] = 0.0
    upstream = ops.convert_to_tensor(upstream, "float32")

    def found(mask):
        variable = keras.Variable(np.ones(()), dtype="float32")
        tensors = [ops.convert_to_tensor(x, "float32") for x in arrays]
        mixed = attend(*tensors, mask, config_of())
        _, (*slopes, _) = gradients(
            lambda *tensors: (
                variable + ops.sum(attend(*tensors, mask, config_of()) * upstream)
            ),
            [x.astype("float32") for x in arrays],
            variable,
        )
        # What padding sees does not matter.
        return map(numpy, (mixed[0, :290], mixed[1], *slopes))

    for one, other in zip(found(blocks), found(whole), strict=True):
        assert relative(one, other) < 1e-5
    query, *rest = (ops.convert_to_tensor(x, "float32") for x in arrays)
    every = numpy(attend(query, *rest, whole, config_of()))
    for mask in (whole, blocks):
        for t in (0, 127, 128, 289):
            one = attend(query[:, t : t + 1], *rest, mask, config_of(), token=t)
            assert relative(numpy(one)[:, 0], every[:, t]) < 1e-5, t


@pytest.mark.parametrize("cap", [None, 1.5], ids=["plain", "capped"])
def test_attention_is_scaled_by_the_stored_scalar_and_capped_before_the_mask(cap):
    arrays, mask = example()
    expected = formula(*arrays, mask, cap)
    tensors = [ops.convert_to_tensor(x, "float32") for x in arrays]
    found = numpy(attend(*tensors, ops.convert_to_tensor(mask), config_of(cap)))
    found = found.reshape(expected.shape)
    assert np.isfinite(found).all()
    seen = mask.any(-1)
    np.testing.assert_allclose(found[seen], expected[seen], atol=1e-5)


@pytest.mark.parametrize("cap", [None, 1.5], ids=["plain", "capped"])
def test_attention_has_the_slopes_of_its_formula(cap):
    arrays, mask = example()
    upstream = np.random.default_rng(2).normal(size=(2, 3, 4, 6))
    # What a query sees that may see nothing is no part of the formula.
    upstream *= mask.any(-1)[..., None, None]

    def total(*arrays):
        return (formula(*arrays, mask, cap) * upstream).sum()

    def slopes(place, step=1e-6):
        found = np.zeros(arrays[place].shape)
        for index in np.ndindex(found.shape):
            moved = [x.copy() for x in arrays]
            moved[place][index] += step
            more = total(*moved)
            moved[place][index] -= 2 * step
            found[index] = (more - total(*moved)) / (2 * step)
        return found

    variable = keras.Variable(np.ones(()), dtype="float32")
    value, (*found, _) = gradients(
        lambda *tensors: (
            variable
            + ops.sum(
                attend(*tensors, ops.convert_to_tensor(mask), config_of(cap))
                * ops.convert_to_tensor(upstream.reshape(2, 3, 24), "float32")
            )
        ),
        [x.astype("float32") for x in arrays],
        variable,
    )
    assert relative(value, total(*arrays) + 1) < 1e-5
    for place, of_place in enumerate(found):
        assert relative(of_place, slopes(place)) < 1e-5


@pytest.mark.skipif(backend.NAME == "tensorflow", reason="TensorFlow does not tell")
def test_no_scores_are_kept_for_the_backward_pass():
    """Of sixteen layers; those of a few are there while one is computed."""
    random = np.random.default_rng(3)
    length, layers, config = 128, 16, config_of(cap=20.0)
    query = random.normal(size=(1, length, 4, 6)).astype("float32")
    key, value = random.normal(size=(2, 1, 2, length, 6)).astype("float32")
    mask = np.tri(length, dtype=bool)[None]
    scores = 4 * 4 * length * length

    def total(query, key, value, mask):
        for _ in range(layers):
            mixed = attend(query, key, value, mask, config)
            query = query + ops.reshape(mixed, query.shape)
        return ops.sum(query * query)

    if backend.NAME == "torch":
        import torch

        kept = []
        options = {"requires_grad": True, "device": backend.torch_device()}
        tensors = [torch.tensor(x, **options) for x in (query, key, value)]
        hooks = torch.autograd.graph.saved_tensors_hooks
        with hooks(lambda x: kept.append(x.nbytes) or x, lambda x: x):
            total(*tensors, ops.convert_to_tensor(mask))
        kept = sum(kept)
    else:
        import jax

        slopes = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
        program = slopes.lower(query, key, value, mask).compile()
        kept = program.memory_analysis().temp_size_in_bytes
    assert layers * 4 * 2 * length * 12 < kept < layers * scores / 2


def test_soft_caps_bend_and_absent_ones_do_not():
    x = ops.convert_to_tensor([-100.0, 0.1, 30.0])
    expected = 30 * np.tanh(numpy(x) / 30)
    np.testing.assert_allclose(numpy(soft_cap(x, 30.0)), expected, rtol=1e-6)
    np.testing.assert_array_equal(numpy(soft_cap(x, None)), numpy(x))


def in_codes(x):
    """Codes and scales of a vector for each token and head, made in numpy."""
    scales = (np.abs(x).max(-1, keepdims=True) / 127).astype("float32")
    return np.rint(x / scales).astype("int8"), scales


@pytest.mark.parametrize("cap", [None, 1.5], ids=["plain", "capped"])
def test_attention_over_codes_is_that_over_the_numbers_they_stand_for(cap):
    (query, *floats), mask = example()
    pairs = [in_codes(x) for x in floats]
    pairs[1][1][...] *= 1e-6  # weights times such scales are none in float16
    key, value = (codes * scales.astype("float64") for codes, scales in pairs)
    buffers = [Codes(*map(ops.convert_to_tensor, pair)) for pair in pairs]
    seen = mask.any(-1)
    for dtype, bound in (("float32", 2e-6), ("bfloat16", 8e-3), ("float16", 1e-3)):
        tensor = ops.convert_to_tensor(query, dtype=dtype)
        mixed = attend(tensor, *buffers, ops.convert_to_tensor(mask), config_of(cap))
        assert keras.backend.standardize_dtype(mixed.dtype) == dtype
        expected = formula(numpy(tensor), key, value, mask, cap).reshape(2, 3, -1)
        error = np.abs(numpy(mixed) - expected)[seen].max()
        # Nothing but the result is rounded on a CPU; its least step in float16 is 6e-8.
        assert error <= bound * np.abs(expected).max() + 6e-8 * (dtype == "float16")


def test_attention_over_codes_is_as_near_as_their_steps_allow():
    (query, key, value), mask = example()
    buffers = [Codes(*map(ops.convert_to_tensor, in_codes(x))) for x in (key, value)]
    tensor = ops.convert_to_tensor(query.astype("float32"))
    mixed = attend(tensor, *buffers, ops.convert_to_tensor(mask), config_of())
    found = numpy(mixed).reshape(query.shape)
    exact = formula(query, key, value, mask, None)
    # Half a step of a key in every number moves a score by e at the most, and so a
    # weight by a factor of exp(2 e) at the most, before and after normalisation.
    steps = [np.abs(x).max((1, 2, 3)) / 127 for x in (key, value)]
    for b, t, n in np.argwhere(mask.any(-1)[..., None] & np.ones(4, bool)):
        e = np.abs(query[b, t, n]).sum() * 7.0**-0.5 * steps[0][b] / 2
        moved = (np.exp(2 * e) - 1) * np.abs(value[b]).max()
        error = np.abs(found[b, t, n] - exact[b, t, n]).max()
        assert error <= moved + steps[1][b] / 2 + 1e-5


@pytest.mark.skipif(backend.NAME != "jax", reason="JAX tells what XLA keeps")
def test_a_query_is_kept_once_whatever_it_is_made_of():
    """Not the product, its low-rank update and their sum turned by half."""
    import jax

    random = np.random.default_rng(3)
    length, width, config = 256, 32, config_of(cap=None)
    draw = lambda *shape: random.normal(0, 0.1, shape).astype("float32")  # noqa: E731
    kernel, output = draw(width, 24), draw(24, width)
    key, value = draw(2, 1, 2, length, 6)
    table = draw(2, 1, length, 1, 6)
    mask = np.tri(length, dtype=bool)[None]

    def total(factors, x):
        for first, second in factors:
            query = x @ kernel + (x @ first) @ second
            query = backend.rotate(ops.reshape(query, (1, length, 4, 6)), *table)
            mixed = attend(query, key, value, mask, config)
            x = x + ops.reshape(mixed, (1, length, 24)) @ output
        return ops.sum(x * x)

    def kept(layers):
        factors = [(draw(width, 2), draw(2, 24)) for _ in range(layers)]
        program = jax.jit(jax.grad(total)).lower(factors, draw(1, length, width))
        return program.compile().memory_analysis().temp_size_in_bytes

    a_layer = (kept(20) - kept(4)) / 16
    # Inputs, queries, two numbers for each of these, and the update's two.
    needed = 4 * length * (width + 24 + 2 * 4 + 2)
    assert 0.9 * needed < a_layer < 1.2 * needed
