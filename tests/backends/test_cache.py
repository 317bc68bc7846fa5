"""The cache against a list that remembers everything; hypothesis chooses the runs."""

import dataclasses

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops
from small_model import CONFIG

from gemma_keras.cache import EMPTY, LayerCache, Step, grow_cache, make_cache

# The sizes of successive calls, and how much padding follows all but the first.
RUNS = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 3)), min_size=1, max_size=6)


@settings(max_examples=15, deadline=None)
@given(RUNS, st.integers(2, 7))
def test_slots_hold_the_newest_tokens_and_queries_see_all_they_may(runs, window):
    config = dataclasses.replace(CONFIG, sliding_window=window)
    cache = make_cache(config, 1, 64, "float32")
    written = []
    for size, padding in runs:
        padding = padding if written and size > 1 else 0
        new = np.arange(len(written), len(written) + size)
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
                needed = [p for p in [*written, *new] if query - reach < p <= query]
                assert set(needed) <= set(seen.tolist())
        written.extend(new.tolist())
        cache = step.finish()
        assert int(cache.length) == len(written)
        held = ops.convert_to_numpy(cache.positions["L"])[0]
        kept = sorted(p for p in held.tolist() if p >= 0)
        assert kept == written[-window:]
        assert sorted(
            p for p in ops.convert_to_numpy(cache.positions["G"])[0].tolist() if p >= 0
        ) == (written)
        np.testing.assert_array_equal(
            ops.convert_to_numpy(cache.next_positions()), [[len(written)]]
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
