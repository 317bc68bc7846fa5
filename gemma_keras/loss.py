"""Cross-entropy of the next token, without ever making all the logits.

A vocabulary of 256,000 makes logits [B, T, V] the largest tensor of training, by far,
and most of it is for prompts and padding that nobody learns. Here the positions that
count are brought together, and a chunk of them at a time meets the head. Since the
gradient of a token's loss with respect to its hidden state is known in closed form,
(softmax - one hot) E, it is made with the loss, while the chunk is there: two products
a chunk, as a plain forward and backward pass need, and nothing kept but [N, D].
"""

from typing import NamedTuple

import keras
from keras import ops

from gemma_keras import backend

# Logits of one chunk, in float32. Two or three tensors of this size live at a time.
CHUNK_BYTES = 2**26
MOST_ROWS = 1024


class Totals(NamedTuple):
    """Sums over the positions that count: float32 scalars.

    `loss` can be differentiated, with respect to `hidden` and to a trainable head.
    """

    loss: object
    right: object  # weight of the tokens that were the likeliest
    weight: object


def cross_entropy(hidden, labels, weights, backbone, train_head=False):
    """Weighted sums of the loss and of right tokens.

    Args:
        hidden: [..., D], hidden states of `backbone`.
        labels: integers [...], the token that follows each position.
        weights: floats [...]; positions of weight 0 cost nothing.
        backbone: whose head makes the logits, soft cap included.
        train_head: whether the head's own gradient is wanted too.
    """
    width = hidden.shape[-1]
    hidden = ops.reshape(hidden, (-1, width))
    labels = ops.cast(ops.reshape(labels, (-1,)), "int32")
    weights = ops.cast(ops.reshape(weights, (-1,)), "float32")
    head = backbone.token_embedding.embeddings if train_head else None
    with backend.no_gradient():
        fixed = map(ops.stop_gradient, (hidden, labels, weights))
        found = _in_chunks(*fixed, backbone, train_head)
        found = {name: ops.stop_gradient(value) for name, value in found.items()}
    loss = ops.sum(found["loss"] * weights)
    paths = ops.sum(
        _known_gradient(hidden, ops.cast(found["gradient"], "float32"))
        * weights[:, None]
    )
    if train_head:
        paths = paths + ops.sum(_known_gradient(head, found["head"]))
    return Totals(loss + paths, ops.sum(found["right"] * weights), ops.sum(weights))


def token_log_probs(hidden, labels, backbone):
    """Natural logarithms of the probabilities of `labels` [B, T], float32 [B, T].

    For use outside a compiled program: the loop over the positions of `hidden`
    [B, T, D] is Python's.
    """
    rows, length = labels.shape
    chunk = max(1, CHUNK_BYTES // (4 * rows * backbone.config.vocab_size))
    parts = []
    for start in range(0, length, chunk):
        part = slice(start, start + chunk)
        logits = ops.cast(backbone.logits(hidden[:, part]), "float32")
        chosen = ops.take_along_axis(logits, labels[:, part, None], axis=-1)
        parts.append(chosen[..., 0] - ops.logsumexp(logits, axis=-1))
    return ops.concatenate(parts, axis=1)


def chunk_rows(vocabulary):
    """How many positions meet a head of so many tokens at a time."""
    return min(MOST_ROWS, max(8, CHUNK_BYTES // (4 * vocabulary)))


def _known_gradient(x, gradient):
    """Zeros of the shape of `x`, in float32, whose gradient is `gradient`."""
    product = ops.cast(x, "float32") * gradient
    return product - ops.stop_gradient(product)


def _in_chunks(rows, ids, weights, backbone, train_head):
    """Loss, rightness and gradient of each row, and the head's gradient.

    [N], [N], [N, D], and [V, D] of the weighted sum if `train_head`.
    """
    width, vocabulary = rows.shape[1], backbone.config.vocab_size
    chunk = chunk_rows(vocabulary)
    if rows.shape[0] is not None:
        chunk = min(chunk, rows.shape[0])
    # The last chunk may begin anywhere.
    rows = ops.pad(rows, [[0, chunk], [0, 0]])
    ids, weights = (ops.pad(x, [[0, chunk]]) for x in (ids, weights))
    # Those that count come first, so that the loop ends early.
    counts = ops.cast(weights != 0, "int32")
    needed = ops.sum(counts)
    after = needed + ops.cumsum(1 - counts)
    places = ops.where(counts == 1, ops.cumsum(counts), after) - 1
    order = ops.argsort(places)
    step = _ChunkStep(*(ops.take(x, order, axis=0) for x in (rows, ids, weights)))
    step.backbone, step.chunk = backbone, chunk
    step.table = None
    if train_head:
        step.table = ops.stop_gradient(backbone.token_embedding.embeddings)
    state = {
        "start": backend.counter(0),
        "loss": ops.zeros_like(weights),
        "right": ops.zeros_like(weights),
        # float16 has no room for gradients that nobody has scaled yet.
        "gradient": ops.zeros_like(rows, dtype=_without_float16(rows.dtype)),
    }
    if train_head:
        state["head"] = ops.zeros((vocabulary, width), dtype="float32")
    state = backend.loop(lambda s: s["start"] < needed, step, state)
    # Back to the order of the rows; what the loop did not reach is 0.
    return {
        name: value if name == "head" else ops.take(value, places, axis=0)[:-chunk]
        for name, value in state.items()
        if name != "start"
    }


def _without_float16(dtype):
    dtype = keras.backend.standardize_dtype(dtype)
    return "float32" if dtype == "float16" else dtype


class _ChunkStep:
    """One turn of the loop: a chunk of rows meets the head."""

    def __init__(self, rows, ids, weights):
        self.rows, self.ids, self.weights = rows, ids, weights

    def __call__(self, state):
        start, cap = state["start"], self.backbone.config.final_logit_soft_cap
        width = self.rows.shape[1]
        rows = ops.slice(self.rows, (start, 0), (self.chunk, width))
        ids = ops.slice(self.ids, (start,), (self.chunk,))
        logits = ops.cast(self.backbone.logits(rows, self.table), "float32")
        loss, right, slope = backend.softmax_cross_entropy(logits, ids)
        if cap is not None:
            slope = slope * (1.0 - ops.square(logits / cap))
        # The gradient must not lose what the loss scale would have saved.
        narrow = ops.cast(slope, _without_float16(rows.dtype))
        gradient = self.backbone.head_transpose(narrow, self.table)
        new = {"loss": loss, "right": right, "gradient": gradient}
        state = dict(state)
        for name, value in new.items():
            state[name] = backend.write_slots(state[name], value, start, 0)
        if "head" in state:
            weights = ops.slice(self.weights, (start,), (self.chunk,))
            shares = ops.transpose(slope * weights[:, None])
            share = ops.matmul(shares, ops.cast(rows, "float32"))
            state["head"] = state["head"] + share
        state["start"] = start + self.chunk
        return state
