"""The cache against a list that remembers everything; hypothesis chooses the runs."""

import dataclasses

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops
from small_model import CONFIG

from gemma_keras.cache import (
    EMPTY,
    LayerCache,
    Step,
    cut_cache,
    grow_cache,
    make_cache,
    take_back,
)

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
            keys, values = layer.update(both, both)
            seen = ops.convert_to_numpy(step.seen[kind])[0]
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
        keys, _ = layer.update(both, both)
        positions = ops.convert_to_numpy(step.seen[kind])[0]
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
