"""Keys and values of the tokens seen so far, so that decoding reads each token once.

Axes: B batch, S slots, K key/value heads, H head size, T tokens of this call.

Slots fill in order, alike in every row, so a ragged batch is padded on the left. Next
to each slot stands the position of its token in its row, or EMPTY, and the mask is
made of positions alone. A sliding-window layer keeps a ring of its window, or a little
more: the token that falls out of it gives its slot to the newest.

The buffers of keys and values are tensors, or `Codes` of 8 bits. Then tokens see the
codes of every key and value, those of their own call included, so that what is computed
does not depend on how a text is divided into calls.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from gemma_keras import backend

EMPTY = -1


class Codes(NamedTuple):
    """Vectors of H numbers that are `codes * scales`. A pytree."""

    codes: Any  # int8 [B, K, S, H], from -127 to 127
    scales: Any  # float32 [B, K, S, 1]


def quantize(x):
    """The `Codes` nearest to floats [B, K, S, H], a scale for each vector of H."""
    x = ops.cast(x, "float32")
    scales = ops.max(ops.abs(x), axis=-1, keepdims=True) / 127
    codes = ops.round(x / ops.where(scales == 0, 1.0, scales))
    return Codes(ops.cast(codes, "int8"), scales)


class Cache(NamedTuple):
    """A pytree. `length` counts the slots used; it is the integer 0 while empty."""

    keys: tuple  # one [B, K, S, H] a layer, or `Codes` of these
    values: tuple  # likewise
    positions: dict  # layer kind -> [B, S] int32
    length: Any

    def next_positions(self):
        """The position [B, 1] that follows the last token of each row."""
        newest = ops.max(next(iter(self.positions.values())), axis=1, keepdims=True)
        return newest + 1


def make_cache(config, batch_size, capacity, dtype, spare=0):
    """An empty `Cache` for `capacity` tokens a row, pads included.

    With the dtype `"int8"` keys and values are `Codes`. `spare` is how many slots
    sliding-window layers have beyond their window: so many of the newest tokens can be
    taken back. With None they keep all tokens too.
    """
    slots = _slots(config, capacity, spare)
    kinds = config.layer_kinds

    def buffer(kind):
        shape = (batch_size, config.num_kv_heads, slots[kind])
        numbers = ops.zeros((*shape, config.head_dim), dtype=dtype)
        if dtype != "int8":
            return numbers
        return Codes(numbers, ops.zeros((*shape, 1), dtype="float32"))

    def buffers():
        return tuple(buffer(kind) for kind in kinds)

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

    def grow_all(buffers):
        return tuple(
            each_part(lambda part, kind=kind: grow(part, 2, kind), buffer)
            for buffer, kind in zip(buffers, kinds, strict=True)
        )

    return Cache(
        grow_all(cache.keys),
        grow_all(cache.values),
        {kind: grow(p, 1, kind, EMPTY) for kind, p in cache.positions.items()},
        cache.length,
    )


def take_rows(cache, rows):
    """The cache that has these rows, integers [R], of another, in this order."""

    def take(array):
        return ops.take(array, rows, axis=0)

    return Cache(
        tuple(each_part(take, keys) for keys in cache.keys),
        tuple(each_part(take, values) for values in cache.values),
        {kind: take(p) for kind, p in cache.positions.items()},
        cache.length,
    )


def each_part(function, buffer):
    """A function of tensors, applied to one or to both tensors of `Codes`."""
    if isinstance(buffer, Codes):
        return Codes(*map(function, buffer))
    return function(buffer)


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


class Place(NamedTuple):
    """Where the tokens of one call go in a buffer, and what they see.

    The first tokens of a cache see themselves. Others see what the buffer has as well:
    in the buffer, once they are in it, or apart from themselves.
    """

    length: Any  # slots used before
    count: Any  # how many of the tokens stay; the rest is padding
    first: bool  # whether they are the first of the cache
    ring: bool  # whether the newest take the place of the oldest
    apart: bool  # whether the old is seen apart from the new, which is written later
    start: Any  # the slot that the first of the tokens takes, for `write_slots`

    def seen(self, buffer, new, axis):
        """`(buffer, parts)`: the buffer, written or not, and what is to be seen."""
        if self.apart:
            return buffer, (buffer, new)
        buffer = write(buffer, new, self, axis)
        if self.first:
            return buffer, (new,)
        tokens = new.shape[axis]
        if tokens > 1 and not self.ring and isinstance(self.length, int):
            # Without the slots that are empty, where shapes may differ.
            return buffer, (backend.read_slots(buffer, 0, axis, self.length + tokens),)
        return buffer, (buffer,)


class LayerCache:
    """One layer's part of a cache while one call goes through it."""

    def __init__(self, keys, values, place):
        self.keys, self.values, self.place = keys, values, place
        self._new = None

    def seen(self, key, value):
        """Parts of keys, and of values, that the queries of the tokens may see.

        Args:
            key: [B, K, T, H] of the tokens.
            value: likewise.

        Returns:
            Tuples of one or two arrays [B, K, S, H], or `Codes`.
        """
        self.keys, keys = self._see(self.keys, key)
        self.values, values = self._see(self.values, value)
        self._new = keys[-1], values[-1]
        return keys, values

    @property
    def used(self):
        """How many slots hold tokens, where these are seen apart; perhaps None."""
        length = self.place.length
        if not self.place.apart or not (backend.COMPILES or isinstance(length, int)):
            # Recorded, what is done may not depend on it.
            return None
        buffer = self.keys[0] if isinstance(self.keys, Codes) else self.keys
        return backend.least(length, buffer.shape[2])

    def store(self, mixed):
        """Write what is not written yet, after `mixed` was made of what was seen.

        XLA would otherwise write first, into a copy, since the old is still read.
        """
        if not self.place.apart:
            return
        key, value = (
            each_part(lambda part: backend.not_before(part, mixed), x)
            for x in self._new
        )
        self.keys = self._write(self.keys, key)
        self.values = self._write(self.values, value)

    def _see(self, buffer, new):
        if not isinstance(buffer, Codes):
            # As it is kept, so that it does not matter when it is seen.
            return self.place.seen(buffer, ops.cast(new, buffer.dtype), axis=2)
        pairs = zip(buffer, quantize(new), strict=True)
        buffers, parts = zip(*(self.place.seen(*p, axis=2) for p in pairs), strict=True)
        return Codes(*buffers), tuple(Codes(*p) for p in zip(*parts, strict=True))

    def _write(self, buffer, new):
        if not isinstance(buffer, Codes):
            return write(buffer, new, self.place, axis=2)
        pairs = zip(buffer, new, strict=True)
        return Codes(*(write(*pair, self.place, axis=2) for pair in pairs))


class Step:
    """One call's reading and writing of a `Cache`.

    Args:
        cache: the `Cache` before the call.
        layer_kinds: one letter a layer, as `GemmaConfig.layer_kinds`.
        positions: int32 [B, T] of the new tokens, EMPTY where there is padding.
        padding_mask: bool [B, T] or None. Rows may be padded on the left where the
            cache has nothing of them yet, and on the right all alike.

    `layers` holds a `LayerCache` a layer, `seen` the positions [B, S] that go with each
    part of the keys they return, for each layer kind; `first` tells whether these are
    the first tokens of the cache, which see themselves alone.
    """

    def __init__(self, cache, layer_kinds, positions, padding_mask):
        length, tokens = cache.length, positions.shape[1]
        # One token alone goes the way of those that follow.
        self.first = first = isinstance(length, int) and length == 0 and tokens > 1
        count = tokens
        if padding_mask is not None and tokens > 1 and not first:
            count = ops.max(ops.sum(ops.cast(padding_mask, "int32"), axis=1))
        self.length = length + count
        slots = {kind: p.shape[1] for kind, p in cache.positions.items()}
        places, self.positions, self.seen = {}, {}, {}
        for kind in sorted(slots):
            ring = slots[kind] < slots.get("G", math.inf)
            # Only a ring would lose what the first of several tokens may still see.
            apart = not first and (backend.COMPILES or (ring and tokens > 1))
            start = length % slots[kind] if ring else length
            start = backend.slots_from(start, tokens)
            place = Place(length, count, first, ring, apart, start)
            places[kind] = place
            old, self.seen[kind] = place.seen(cache.positions[kind], positions, axis=1)
            if apart:
                old = write(old, positions, place, axis=1)
            self.positions[kind] = old
        self.layers = [
            LayerCache(keys, values, places[kind])
            for keys, values, kind in zip(
                cache.keys, cache.values, layer_kinds, strict=True
            )
        ]

    def finish(self):
        """The cache after the call."""
        keys = tuple(layer.keys for layer in self.layers)
        values = tuple(layer.values for layer in self.layers)
        return Cache(keys, values, self.positions, self.length)


def write(buffer, new, place, axis):
    """The buffer with `new` in the slots that follow, along `axis`.

    In place, but for several tokens that go into a ring. Padding is overwritten by what
    comes next.
    """
    tokens, slots = new.shape[axis], buffer.shape[axis]
    length = place.length
    if place.first:
        return _write_first(buffer, new, axis)
    if tokens == 1 or not place.ring:
        return backend.write_slots(buffer, new, place.start, axis)
    # The last token that lands in slot s is the largest index i with
    # (length + i) % slots == s; a negative i means that the slot keeps what it has.
    last = place.count - 1
    slot = ops.arange(slots, dtype="int32")
    index = last - (length + last - slot) % slots
    index = ops.where(index >= 0, slots + index, slot)
    return ops.take(ops.concatenate([buffer, new], axis=axis), index, axis=axis)


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
