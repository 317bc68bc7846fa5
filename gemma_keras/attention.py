"""Softmax attention, whose backward pass computes the scores once more.

Left to themselves, the backends keep numbers in float32 for every pair of a query and a
key: what grows with the square of the length. Here only queries, keys, values and two
numbers a query are kept.
"""

import functools
from typing import Any, NamedTuple

import keras
from keras import ops

from gemma_keras import backend
from gemma_keras.cache import Codes, each_part

# Finite, so that a query with nothing to see yields numbers, not NaN.
MASKED = -2.3819763e38


def visible(query_positions, key_positions, window=None):
    """Mask [B, T, S]: may the query at one position see the key at another?

    Args:
        query_positions: integers [B, T].
        key_positions: integers [B, S]; negative means that there is no key.
        window: a query sees itself and the `window - 1` positions before it.
    """
    query, key = query_positions[:, :, None], key_positions[:, None, :]
    mask = ops.logical_and(key >= 0, key <= query)
    if window is not None:
        mask = ops.logical_and(mask, query - key < window)
    return mask


class Block(NamedTuple):
    """Queries that follow each other, and what they see of the keys up to their last.

    Attributes:
        start: the first query.
        stop: one past the last query, and past the last key.
        mask: bool [B, stop - start, stop].
    """

    start: int
    stop: int
    mask: Any


class Blocks(list):
    """A mask of tokens that see what comes before them, as `Block`s of all queries.

    Half of a whole mask is false, and the scores of that half are made for nothing.
    """


# Each block costs operations of its own: a few large ones.
_MOST_BLOCKS, _LEAST_QUERIES = 4, 128


def visible_before(
    positions,
    key_positions,
    window=None,
    segment_ids=None,
    in_blocks=not backend.COMPILES,
):
    """What tokens see of each other, if none sees what comes after it in its row.

    Args:
        positions: integers [B, T], increasing in each row or segment, padding aside.
        key_positions: the same, negative where there is padding.
        window: as in `visible`.
        segment_ids: optional integers [B, T]: tokens see only their own segment.
        in_blocks: whether long rows are divided. XLA computes several blocks at once,
            and keeps what each of them sees: that takes more memory and saves no time.

    Returns:
        A mask [B, T, T], or `Blocks`.
    """

    def mask(rows, keys):
        seen = visible(positions[:, rows], key_positions[:, keys], window)
        if segment_ids is None:
            return seen
        same = segment_ids[:, rows, None] == segment_ids[:, None, keys]
        return ops.logical_and(seen, same)

    length = positions.shape[1]
    if not in_blocks or length <= _LEAST_QUERIES:
        return mask(slice(None), slice(None))
    size = max(-(-length // _MOST_BLOCKS), _LEAST_QUERIES)
    stops = [min(start + size, length) for start in range(0, length, size)]
    starts = [0, *stops[:-1]]
    return Blocks(
        Block(start, stop, mask(slice(start, stop), slice(stop)))
        for start, stop in zip(starts, stops, strict=True)
    )


def soft_cap(x, cap):
    """Cap * tanh(x / cap): Gemma 2's bound on scores and logits."""
    return x if cap is None else cap * ops.tanh(x / cap)


def attend(query, key, value, mask, config, used=None, token=None):
    """Softmax attention with K key heads, each shared by G query heads.

    Args:
        query: [B, T, N, H], rotated.
        key: [B, K, S, H], rotated; or `Codes` of these.
        value: [B, K, S, H], or `Codes`.
        mask: bool, broadcastable to [B, T, S], or `Blocks` of it. Where keys are in
            several parts, these three are tuples.
        config: a `GemmaConfig`, for the head counts, the scale and the soft cap.
        used: how many keys of the first of two parts there are; what comes after them
            is hidden by the mask, and need not be looked at. None: perhaps all.
        token: which of the mask's T tokens the one query is of, if there is one.

    Returns:
        [B, T, N * H], in the dtype of `value`, or of `query` beside `Codes`.
    """
    parts = key, value, mask
    if not isinstance(mask, tuple):
        parts = (key,), (value,), (mask,)
    if token is not None:
        seen = [_seen_by(token, *part) for part in zip(*parts, strict=True)]
        return _attend(query, *zip(*seen, strict=True), config)
    if isinstance(parts[2][0], Blocks):
        return _attend_in_blocks(query, *(part[0] for part in parts), config)
    return _attend(query, *parts, config, used)


def _seen_by(token, key, value, mask):
    """Keys and values that one token may see, and its row of their mask."""
    if isinstance(mask, Blocks):
        start, stop, mask = next(block for block in mask if token < block.stop)
        key, value, token = _first(key, stop), _first(value, stop), token - start
    return key, value, backend.read_slots(mask, token, axis=1)


def _attend_in_blocks(query, key, value, blocks, config):
    mixed = []
    for start, stop, mask in blocks:
        parts = [(x,) for x in (_first(key, stop), _first(value, stop), mask)]
        mixed.append(_attend(query[:, start:stop], *parts, config))
    return ops.concatenate(mixed, axis=1)


def _first(buffer, stop):
    return each_part(lambda part: part[:, :, :stop], buffer)


def _attend(query, keys, values, masks, config, used=None):
    length, heads, size = query.shape[1:]
    groups = heads // config.num_kv_heads
    coded, dtype = isinstance(keys[0], Codes), query.dtype
    if coded and backend.on_cpu():
        # Codes have to be cast anyway, and a CPU multiplies float32 the fastest.
        query = ops.cast(query, "float32")
    elif keras.backend.standardize_dtype(dtype) == "float16":
        # A product of unnormalised queries and keys can pass 65504.
        query = ops.cast(query, "float32")
        keys = keys if coded else [ops.cast(key, "float32") for key in keys]
    query = query * config.query_pre_attn_scalar**-0.5
    # Fold the G queries of a key head into rows: one matrix product a key head. Those
    # of a token follow each other, so that with one key head nothing moves.
    query = backend.reshape(query, (-1, length, config.num_kv_heads, groups, size))
    query = ops.transpose(query, (0, 2, 1, 3, 4))
    query = backend.reshape(query, (-1, config.num_kv_heads, length * groups, size))
    core = _Core(groups, config.attn_logit_soft_cap)
    if coded:
        core = _CodesCore(groups, config.attn_logit_soft_cap, query.dtype)
    masks = [mask[:, None] for mask in masks]
    if len(keys) == 1 and not coded and backend.may_be_differentiated():
        mixed = backend.with_gradient(
            core.value_and_kept, core.gradient, query, keys[0], values[0], masks[0]
        )
    elif _torch_attends(query, keys, length, config):
        mixed = backend.torch_attention(query, keys[0], values[0], masks[0])
    elif used is not None and length >= _MANY_QUERIES and _key_block(masks[0]):
        mixed = core.value_of_used(query, keys, values, masks, used)
    else:
        mixed = core.value(query, keys, values, masks)
    mixed = ops.cast(mixed, dtype) if coded else mixed
    mixed = backend.reshape(mixed, (-1, config.num_kv_heads, length, groups, size))
    mixed = ops.transpose(mixed, (0, 2, 1, 3, 4))
    return backend.reshape(mixed, (-1, length, heads * size))


# From so many on queries look at keys block by block, as far as there are any.
_MANY_QUERIES = 32


def _key_block(mask):
    """Keys in a block of a buffer, for its mask; 0 where it has no equal blocks."""
    # An accelerator waits for its host between two blocks.
    sizes = (256, 128) if backend.on_cpu() else (1024,)
    return next((size for size in sizes if mask.shape[-1] % size == 0), 0)


def _torch_attends(query, keys, length, config):
    """Whether torch's own attention is the one to call: for a token in bfloat16.

    It is slower where there are many queries, or key heads.
    """
    return (
        length == 1
        and len(keys) == 1
        and not isinstance(keys[0], Codes)
        and config.num_kv_heads <= 4
        and config.attn_logit_soft_cap is None
        and backend.torch_attention_serves(query)
    )


class _Core:
    """Softmax(cap(q k^T)) v over the heads [B, K], with its gradient in closed form.

    Queries are [B, K, T G, H], scaled; keys and values [B, K, S, H]; masks
    [B, 1, T, S]. Scores are float32.
    """

    def __init__(self, groups, cap):
        self.groups, self.cap = groups, cap

    def value(self, query, keys, values, masks):
        """Of keys and values in one or more parts, without a gradient."""
        if len(keys) == 1 and backend.masked_softmax_serves(query, masks[0]):
            products = self._narrow(query, keys[0])
            weights = backend.masked_softmax(products, masks[0], self.cap, MASKED)
            return self._mix(weights, values[0])
        scores = [
            self._scores(query, key, mask)
            for key, mask in zip(keys, masks, strict=True)
        ]
        if len(scores) == 1:
            weights = [ops.softmax(scores[0], axis=-1)]
        else:
            tops = [ops.max(part, axis=-1, keepdims=True) for part in scores]
            top = functools.reduce(ops.maximum, tops)
            powers = [ops.exp(part - top) for part in scores]
            total = sum(ops.sum(part, axis=-1, keepdims=True) for part in powers)
            weights = [part / total for part in powers]
        parts = zip(weights, values, strict=True)
        return sum(self._mix(part, value) for part, value in parts)

    def value_of_used(self, query, keys, values, masks, used):
        """The same of two parts, without what follows the first `used` of the first.

        One block of keys after the other, with sums that are corrected when a larger
        score is found (Milakov and Gimelshein 2018).
        """
        size = _key_block(masks[0])
        scores = self._scores(query, keys[1], masks[1])
        top = ops.max(scores, axis=-1, keepdims=True)
        powers = ops.exp(scores - top)
        total = ops.sum(powers, axis=-1, keepdims=True)
        mixed = ops.cast(self._mix(powers, values[1]), "float32")

        def block(part, start, axis=2):
            return backend.read_slots(part, start, axis, size)

        def more(state):
            start, top, total, mixed = state
            key, value = (
                each_part(lambda part: block(part, start), x)
                for x in (keys[0], values[0])
            )
            scores = self._scores(query, key, block(masks[0], start, axis=3))
            higher = ops.maximum(top, ops.max(scores, axis=-1, keepdims=True))
            powers, share = ops.exp(scores - higher), ops.exp(top - higher)
            total = total * share + ops.sum(powers, axis=-1, keepdims=True)
            mixed = mixed * share + ops.cast(self._mix(powers, value), "float32")
            return start + size, higher, total, mixed

        state = backend.counter(0), top, total, mixed
        *_, total, mixed = backend.loop(lambda state: state[0] < used, more, state)
        return ops.cast(mixed / total, query.dtype)

    def _mix(self, weights, value):
        return backend.batch_matmul(ops.cast(weights, value.dtype), value)

    def value_and_kept(self, query, key, value, mask):
        scores = self._scores(query, key, mask)
        top = ops.max(scores, axis=-1, keepdims=True)
        weights = ops.exp(scores - top)
        total = ops.sum(weights, axis=-1, keepdims=True)
        weights = ops.cast(weights / total, value.dtype)
        kept = query, key, value, mask, top, total
        return backend.batch_matmul(weights, value), kept

    def gradient(self, upstream, query, key, value, mask, top, total):
        # Of two factors of the scores the one that nobody makes wait stays as it is: of
        # the other, which has fewer heads, XLA keeps what it was made of. The last two
        # it would keep as wide as the scores.
        key, top, total = (backend.not_before(x, upstream) for x in (key, top, total))
        products = self._products(query, key)
        if self.cap is not None:
            bent = ops.tanh(products / self.cap)
            products = self.cap * bent
        weights = ops.exp(self._masked(products, mask) - top) / total
        slopes = backend.batch_matmul(upstream, ops.swapaxes(value, 2, 3))
        slopes = weights * ops.cast(slopes, "float32")
        slopes = slopes - weights * ops.sum(slopes, axis=-1, keepdims=True)
        if self.cap is not None:
            slopes = slopes * (1.0 - ops.square(bent))
        slopes = ops.cast(self._masked(slopes, mask, 0.0), query.dtype)
        weights = ops.cast(weights, value.dtype)
        return (
            backend.batch_matmul(slopes, key),
            backend.batch_matmul(ops.swapaxes(slopes, 2, 3), query),
            backend.batch_matmul(ops.swapaxes(weights, 2, 3), upstream),
            None,
        )

    def _scores(self, query, key, mask):
        return self._masked(soft_cap(self._products(query, key), self.cap), mask)

    def _products(self, query, key):
        return ops.cast(self._narrow(query, key), "float32")

    def _narrow(self, query, key):
        """The products in the dtype that they are made in."""
        return backend.row_products(query, key)

    def _masked(self, scores, mask, hidden=MASKED):
        heads, rows, keys = scores.shape[1:]
        apart = (-1, heads, rows // self.groups, self.groups, keys)
        scores = ops.where(mask[:, :, :, None], backend.reshape(scores, apart), hidden)
        return backend.reshape(scores, (-1, heads, rows, keys))


class _CodesCore(_Core):
    """The same value, of keys and values that are `Codes`.

    A scale is common to a key's products, and to a value's numbers: what is multiplied
    with it is the scores and the weights, and numbers are never restored.
    """

    def __init__(self, groups, cap, dtype):
        super().__init__(groups, cap)
        self.dtype = dtype  # to multiply in

    def _mix(self, weights, value):
        weights = weights * ops.swapaxes(value.scales, 2, 3)
        codes = ops.cast(value.codes, self.dtype)
        return backend.batch_matmul(ops.cast(weights, self.dtype), codes)

    def _narrow(self, query, key):
        products = super()._narrow(query, ops.cast(key.codes, self.dtype))
        return ops.cast(products, "float32") * ops.swapaxes(key.scales, 2, 3)
