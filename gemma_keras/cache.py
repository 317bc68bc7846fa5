"""Keys and values of the tokens seen so far, so that decoding reads each token once.

Axes: B batch, S slots, K key/value heads, H head size, T tokens of this call.

Slots fill in order, alike in every row, so a ragged batch is padded on the left. Next
to each slot stands the position of its token in its row, or EMPTY, and the mask is
made of positions alone. A sliding-window layer keeps a ring of its window, or a little
more: the token that falls out of it gives its slot to the newest.
"""

from typing import Any, NamedTuple

import numpy as np
from keras import ops

from gemma_keras import backend

EMPTY = -1


class Cache(NamedTuple):
    """A pytree. `length` counts the slots used; it is the integer 0 while empty."""

    keys: tuple  # one [B, K, S, H] a layer
    values: tuple  # one [B, K, S, H] a layer
    positions: dict  # layer kind -> [B, S] int32
    length: Any

    def next_positions(self):
        """The position [B, 1] that follows the last token of each row."""
        newest = ops.max(next(iter(self.positions.values())), axis=1, keepdims=True)
        return newest + 1


def make_cache(config, batch_size, capacity, dtype, spare=0):
    """An empty `Cache` for `capacity` tokens a row, pads included.

    `spare` is how many slots sliding-window layers have beyond their window: so many of
    the newest tokens can be taken back. With None they keep all tokens too.
    """
    shape = (batch_size, config.num_kv_heads, -1, config.head_dim)
    slots = _slots(config, capacity, spare)
    kinds = config.layer_kinds

    def buffers():
        return tuple(
            ops.zeros((*shape[:2], slots[kind], shape[3]), dtype=dtype)
            for kind in kinds
        )

    positions = {
        kind: ops.full((batch_size, slots[kind]), EMPTY, dtype="int32")
        for kind in sorted(set(kinds))
    }
    return Cache(buffers(), buffers(), positions, 0)


def _slots(config, capacity, spare):
    window = config.sliding_window
    ring = capacity if spare is None or not window else window + spare
    return {"G": capacity, "L": min(capacity, ring)}


def grow_cache(cache, config, capacity, spare=0):
    """The same tokens with room for `capacity`; `spare` is as in `make_cache`."""
    slots = _slots(config, capacity, spare)
    length = int(cache.length)

    def grow(array, axis, kind, empty=None):
        old, new = array.shape[axis], slots[kind]
        if new <= old:
            return array
        # Which token is to lie in each slot, counted from the first of the row: the
        # newest that belongs there, if there is one and the old slots hold it.
        token = length - 1 - (length - 1 - np.arange(new)) % new
        there = token >= max(0, length - old)
        source = ops.convert_to_tensor(np.where(there, token % old, 0), dtype="int32")
        array = ops.take(array, source, axis=axis)
        return array if empty is None else ops.where(there, array, empty)

    kinds = config.layer_kinds
    return Cache(
        tuple(grow(k, 2, kind) for k, kind in zip(cache.keys, kinds, strict=True)),
        tuple(grow(v, 2, kind) for v, kind in zip(cache.values, kinds, strict=True)),
        {kind: grow(p, 1, kind, EMPTY) for kind, p in cache.positions.items()},
        cache.length,
    )


def cut_cache(cache, dropped):
    """The cache of one row without its `dropped` newest tokens.

    None if a ring has wrapped: what these tokens have pushed out is gone.
    """
    firsts = [ops.any(positions == 0) for positions in cache.positions.values()]
    if not all(bool(ops.convert_to_numpy(first)) for first in firsts):
        return None
    return take_back(cache, dropped)


def take_back(cache, dropped):
    """The cache of one row without its `dropped` newest tokens, in a program.

    No more than the `spare` of `make_cache`, counted from the most that there was.
    """

    def cut(positions):
        end = ops.max(positions) - dropped
        return ops.where(positions <= end, positions, EMPTY)

    positions = {kind: cut(p) for kind, p in cache.positions.items()}
    return cache._replace(positions=positions, length=cache.length - dropped)


class LayerCache:
    """One layer's part of a cache while one call goes through it."""

    def __init__(self, keys, values, length, count):
        self.keys, self.values = keys, values
        self.length, self.count = length, count

    def update(self, key, value):
        """Store `key` and `value` [B, K, T, H]; return what the T queries may see."""
        self.keys, seen_keys = write(self.keys, key, self.length, self.count, axis=2)
        self.values, seen_values = write(
            self.values, value, self.length, self.count, axis=2
        )
        return seen_keys, seen_values


class Step:
    """One call's reading and writing of a `Cache`.

    Args:
        cache: the `Cache` before the call.
        layer_kinds: one letter a layer, as `GemmaConfig.layer_kinds`.
        positions: int32 [B, T] of the new tokens, EMPTY where there is padding.
        padding_mask: bool [B, T] or None. The first call of a cache may be padded on
            the left, a later one on the right and alike in every row.

    `layers` holds a `LayerCache` a layer, `seen` the positions [B, S] that go with the
    keys they return, for each layer kind.
    """

    def __init__(self, cache, layer_kinds, positions, padding_mask):
        length, count = cache.length, positions.shape[1]
        fresh = isinstance(length, int) and length == 0
        if padding_mask is not None and count > 1 and not fresh:
            count = ops.max(ops.sum(ops.cast(padding_mask, "int32"), axis=1))
        self.length = length + count
        self.positions, self.seen = {}, {}
        for kind in sorted(set(layer_kinds)):
            self.positions[kind], self.seen[kind] = write(
                cache.positions[kind], positions, length, count, axis=1
            )
        self.layers = [
            LayerCache(keys, values, length, count)
            for keys, values in zip(cache.keys, cache.values, strict=True)
        ]

    def finish(self):
        """The cache after the call."""
        keys = tuple(layer.keys for layer in self.layers)
        values = tuple(layer.values for layer in self.layers)
        return Cache(keys, values, self.positions, self.length)


def write(buffer, new, length, count, axis):
    """Put `new` into the slots that follow `length`, along `axis`.

    Returns `(buffer, seen)`: the buffer for the next call, and the array that the
    tokens of this call may attend to.

    One token is written in place, and sees the buffer. The first tokens of a cache see
    themselves. Later runs of tokens see the old slots and themselves; of these only
    the first `count` stay, the rest is padding to be overwritten.
    """
    tokens, slots = new.shape[axis], buffer.shape[axis]
    if tokens == 1:
        buffer = backend.write_slots(buffer, new, length % slots, axis)
        return buffer, buffer
    if isinstance(length, int) and length == 0:
        return _write_first(buffer, new, axis), new
    seen = ops.concatenate([buffer, new], axis=axis)
    # The last token that lands in slot s is the largest index i with
    # (length + i) % slots == s; a negative i means that the slot keeps what it has.
    last = count - 1
    slot = ops.arange(slots, dtype="int32")
    index = last - (length + last - slot) % slots
    index = ops.where(index >= 0, slots + index, slot)
    return ops.take(seen, index, axis=axis), seen


def _write_first(buffer, new, axis):
    tokens, slots = new.shape[axis], buffer.shape[axis]
    if tokens <= slots:
        return backend.write_slots(buffer, new, 0, axis)
    kept = [slice(None)] * len(new.shape)
    kept[axis] = slice(tokens - slots, tokens)
    return ops.roll(new[tuple(kept)], tokens % slots, axis=axis)


def default_positions(length, padding_mask=None, segment_ids=None):
    """Positions [B, T] counted from 0 in each row, or in each segment of a row."""
    if segment_ids is not None:
        same = segment_ids[:, :, None] == segment_ids[:, None, :]
        earlier = ops.convert_to_tensor(np.tri(length, k=-1, dtype="int32"))
        return ops.sum(ops.cast(same, "int32") * earlier, axis=-1)
    if padding_mask is not None:
        counted = ops.cumsum(ops.cast(padding_mask, "int32"), axis=1)
        return ops.maximum(counted - 1, 0)
    return ops.arange(length, dtype="int32")[None]
