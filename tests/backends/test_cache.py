"""The cache against a list that remembers everything; hypothesis chooses the runs."""

import dataclasses

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops
from small_model import CONFIG

from gemma_keras import backend
from gemma_keras.cache import (
    EMPTY,
    Codes,
    LayerCache,
    Step,
    cut_cache,
    grow_cache,
    make_cache,
    quantize,
    take_back,
    take_rows,
)


def look(layer, key, value):
    """What tokens see of keys and of values, in one piece, once they are stored."""
    parts = layer.seen(key, value)
    layer.store(key)
    return [
        Codes(*map(joined, zip(*pieces, strict=True)))
        if isinstance(pieces[0], Codes)
        else joined(pieces)
        for pieces in parts
    ]


def joined(pieces, axis=2):
    return np.concatenate([ops.convert_to_numpy(x) for x in pieces], axis=axis)


def positions_seen(step, kind):
    return joined(step.seen[kind], axis=1)[0]


# The sizes of successive calls, and how much padding follows all but the first.
RUNS = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 3)), min_size=1, max_size=6)


@settings(max_examples=15, deadline=None)
@given(RUNS, st.integers(2, 7))
def test_slots_hold_the_newest_tokens_and_queries_see_all_they_may(runs, window):
    config = dataclasses.replace(CONFIG, sliding_window=window)
    cache = make_cache(config, 1, 64, "float32")
    known = []
    for size, padding in runs:
        padding = padding if known and size > 1 else 0
        new = np.arange(len(known), len(known) + size)
        positions = np.pad(new, (0, padding), constant_values=EMPTY)[None]
        mask = ops.convert_to_tensor(positions != EMPTY) if padding else None
        tensor = ops.convert_to_tensor(positions.astype("int32"))
        step = Step(cache, config.layer_kinds, tensor, mask)
        # Keys and values carry their token's position, so that they can be told.
        carried = np.broadcast_to(
            positions[:, None, :, None].astype("float32"),
            (1, config.num_kv_heads, size + padding, config.head_dim),
        )
        for layer, kind in zip(step.layers, config.layer_kinds, strict=True):
            assert isinstance(layer, LayerCache)
            both = ops.convert_to_tensor(carried)
            keys, values = look(layer, both, both)
            seen = positions_seen(step, kind)
            for array in (keys, values):
                array = ops.convert_to_numpy(array)[0, 0, :, 0]
                np.testing.assert_array_equal(array[seen >= 0], seen[seen >= 0])
            reach = window if kind == "L" else 64
            for query in new:
                needed = [p for p in [*known, *new] if query - reach < p <= query]
                assert set(needed) <= set(seen.tolist())
        known.extend(new.tolist())
        cache = step.finish()
        assert int(cache.length) == len(known)
        held = ops.convert_to_numpy(cache.positions["L"])[0]
        kept = sorted(p for p in held.tolist() if p >= 0)
        assert kept == known[-window:]
        assert sorted(
            p for p in ops.convert_to_numpy(cache.positions["G"])[0].tolist() if p >= 0
        ) == (known)
        np.testing.assert_array_equal(
            ops.convert_to_numpy(cache.next_positions()), [[len(known)]]
        )


def test_sliding_layers_keep_no_more_than_their_window():
    cache = make_cache(CONFIG, 3, 64, "bfloat16")
    shapes = [tuple(keys.shape) for keys in cache.keys]
    heads, size = CONFIG.num_kv_heads, CONFIG.head_dim
    slots = {"L": CONFIG.sliding_window, "G": 64}
    assert shapes == [(3, heads, slots[kind], size) for kind in CONFIG.layer_kinds]
    grown = grow_cache(cache, CONFIG, 96)
    slots["G"] = 96
    shapes = [tuple(values.shape) for values in grown.values]
    assert shapes == [(3, heads, slots[kind], size) for kind in CONFIG.layer_kinds]


def written(cache, config, new):
    """The cache with tokens at these positions, and what they saw, by layer kind."""
    tensor = ops.convert_to_tensor(np.array([new], "int32"))
    step = Step(cache, config.layer_kinds, tensor, None)
    # Keys and values carry their token's position.
    shape = (1, config.num_kv_heads, len(new), config.head_dim)
    carried = np.array(new, "float32")[None, None, :, None] * np.ones(shape, "float32")
    saw = {}
    for layer, kind in zip(step.layers, config.layer_kinds, strict=True):
        both = ops.convert_to_tensor(carried)
        keys, _ = look(layer, both, both)
        positions = positions_seen(step, kind)
        held = ops.convert_to_numpy(keys)[0, 0, :, 0]
        np.testing.assert_array_equal(held[positions >= 0], positions[positions >= 0])
        saw[kind] = [p for p in positions.tolist() if p >= 0]
    return step.finish(), saw


# How many tokens are read on trial, and how many of them are taken back.
TRIALS = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 5)), max_size=7)


@settings(max_examples=12, deadline=None)
@given(TRIALS, st.integers(2, 7), st.integers(1, 12), st.integers(0, 7))
def test_tokens_taken_back_have_pushed_nothing_out(trials, window, first, grown_at):
    config = dataclasses.replace(CONFIG, sliding_window=window)
    # A conversation that begins without spare slots gets some when it needs them.
    cache, _ = written(make_cache(config, 1, 64, "float32"), config, range(first))
    length = first
    for i, (size, dropped) in enumerate(trials):
        if i == grown_at:
            cache = grow_cache(cache, config, 80, spare=5)
        dropped = min(dropped, size - 1) if i >= grown_at else 0
        cache, saw = written(cache, config, range(length, length + size))
        for query in range(length, length + size):
            assert set(range(max(0, query - window + 1), query + 1)) <= set(saw["L"])
            assert set(range(query + 1)) <= set(saw["G"])
        cache = take_back(cache, dropped)
        length += size - dropped
        assert int(cache.length) == length
        slots = cache.positions["L"].shape[1]
        assert slots == (window + 5 if i >= grown_at else window)


def test_a_ring_cannot_be_cut_once_it_has_let_go():
    for spare, cuts in ((0, False), (4, True), (None, True)):
        cache = make_cache(CONFIG, 1, 64, "float32", spare)
        cache, _ = written(cache, CONFIG, range(9))
        # Slots that are added afterwards do not bring it back.
        for held in (cache, grow_cache(cache, CONFIG, 80, 8)):
            cut = cut_cache(held, 3)
            assert (cut is not None) == cuts
            assert not cuts or int(cut.next_positions()[0, 0]) == 6


def restored(codes):
    assert isinstance(codes, Codes)
    numbers, scales = (ops.convert_to_numpy(part) for part in codes)
    assert (numbers.dtype, scales.dtype) == ("int8", "float32")
    return numbers * scales.astype("float64")


def test_codes_are_the_nearest_of_a_grid_for_each_token_and_head():
    random = np.random.default_rng(3)
    vectors = random.normal(size=(2, 3, 4, 10)) * 10.0 ** random.integers(-6, 6, (4, 1))
    vectors[1, 2, 3] = 0
    vectors = vectors.astype("float32")
    codes = quantize(ops.convert_to_tensor(vectors))
    found, steps = restored(codes), np.abs(vectors).max(-1, keepdims=True) / 127
    np.testing.assert_allclose(ops.convert_to_numpy(codes.scales), steps, rtol=1e-6)
    assert (np.abs(found - vectors) <= steps * (0.5 + 1e-4)).all()
    assert not found[1, 2, 3].any()
    # The ends of the grid are used, and 128 is not among them.
    assert set(np.abs(ops.convert_to_numpy(codes.codes)).max(-1).flat) == {0, 127}


def test_a_cache_of_codes_holds_the_codes_of_what_a_cache_of_floats_holds():
    """Through first tokens, growth, later runs, single ones, and rows taken apart."""
    config = dataclasses.replace(CONFIG, layer_pattern="L", sliding_window=6)
    random, seen = np.random.default_rng(4), 0
    caches = {dtype: make_cache(config, 2, 4, dtype) for dtype in ("float32", "int8")}
    for size in (3, 4, 1):
        shape = (2, config.num_kv_heads, size, config.head_dim)
        pair = [
            ops.convert_to_tensor(random.normal(size=shape).astype("float32"))
            for _ in range(2)
        ]
        positions = np.tile(np.arange(seen, seen + size, dtype="int32"), (2, 1))
        answers = []
        for dtype, cache in caches.items():
            tensor = ops.convert_to_tensor(positions)
            step = Step(cache, config.layer_kinds, tensor, None)
            answers.append([look(layer, *pair) for layer in step.layers])
            caches[dtype] = grow_cache(step.finish(), config, 24)
        for floats, codes in zip(*answers, strict=True):
            for each, other in zip(floats, codes, strict=True):
                np.testing.assert_array_equal(restored(quantize(each)), restored(other))
        seen += size
    assert seen > config.sliding_window
    rows = ops.convert_to_tensor([1, 1, 0])
    floats, codes = (take_rows(cache, rows) for cache in caches.values())
    for each, other in ((floats.keys, codes.keys), (floats.values, codes.values)):
        for one, same in zip(each, other, strict=True):
            assert tuple(same.codes.shape[::2]) == (3, config.sliding_window)
            np.testing.assert_array_equal(restored(quantize(one)), restored(same))


def test_codes_take_a_quarter_of_float32_and_half_of_bfloat16():
    config = dataclasses.replace(CONFIG, head_dim=256)

    def bytes_of(dtype):
        arrays = keras.tree.flatten(
            make_cache(config, 2, 100, dtype)._replace(length=())
        )
        kinds = [keras.backend.standardize_dtype(x.dtype) for x in arrays]
        sizes = {"int8": 1, "bfloat16": 2, "int32": 4, "float32": 4}
        return sum(
            sizes[kind] * int(np.prod(x.shape))
            for kind, x in zip(kinds, arrays, strict=True)
        )

    assert bytes_of("int8") <= 0.30 * bytes_of("float32")
    assert bytes_of("int8") <= 0.55 * bytes_of("bfloat16")


@pytest.mark.parametrize("before", [0, 3])
def test_tokens_see_keys_and_values_as_they_are_kept(before):
    """Products of codes may be float32 in a model that computes in bfloat16."""
    cache, shape = make_cache(CONFIG, 1, 24, "bfloat16"), (1, CONFIG.num_kv_heads)
    if before:
        cache = cache._replace(length=backend.counter(before))
    step = Step(cache, CONFIG.layer_kinds, ops.ones((1, 2), dtype="int32"), None)
    wide = ops.ones((*shape, 2, CONFIG.head_dim), dtype="float32") / 3
    for layer in step.layers:
        for parts in layer.seen(wide, wide):
            kinds = {keras.backend.standardize_dtype(part.dtype) for part in parts}
            assert kinds == {"bfloat16"}
