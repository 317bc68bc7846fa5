"""Cross-entropy of the next token, without ever making all the logits.

A vocabulary of 256,000 makes logits [B, T, V] the largest tensor of training, by far,
and most of it is for prompts and padding that nobody learns. Here the positions that
count are brought together, and a chunk of them at a time meets the head, a tile of its
rows at a time. Since the gradient of a token's loss with respect to its hidden state is
known in closed form, (softmax - one hot) E, it is made with the loss: as attention to
the rows of E, with a softmax that is corrected from tile to tile (Milakov and
Gimelshein 2018, arXiv:1805.02867). That is two products, as a plain forward and
backward pass need, and nothing is kept but [N, D].
"""

from typing import NamedTuple

import keras
from keras import ops

from gemma_keras import backend
from gemma_keras.distribution import parts_of_rows

# Positions that meet the head at a time, and rows of the head that they meet at a time.
# Of the last chunk's positions some may not count, but take as long; torch has none.
MOST_ROWS = 1024 if backend.NAME == "torch" else 256
TILE = 4096
# Logits that are made at a time where probabilities alone are asked for, in float32.
LOGITS_BYTES = 2**26


# Less than any logit, and finite, so that differences with it are numbers.
LEAST = -1e30


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
    chunk = max(1, LOGITS_BYTES // (4 * rows * backbone.config.vocab_size))
    parts = []
    for start in range(0, length, chunk):
        part = slice(start, start + chunk)
        logits = ops.cast(backbone.logits(hidden[:, part]), "float32")
        chosen = ops.take_along_axis(logits, labels[:, part, None], axis=-1)
        parts.append(chosen[..., 0] - ops.logsumexp(logits, axis=-1))
    return ops.concatenate(parts, axis=1)


def _known_gradient(x, gradient):
    """Zeros of the shape of `x`, in float32, whose gradient is `gradient`."""
    product = ops.cast(x, "float32") * gradient
    return product - ops.stop_gradient(product)


def _in_chunks(rows, ids, weights, backbone, train_head):
    """Loss, rightness and gradient of each row, and the head's gradient.

    [N], [N], [N, D], and [V, D] of the weighted sum if `train_head`.
    """
    # Those that count come first, so that the loop ends early.
    counts = ops.cast(weights != 0, "int32")
    needed = ops.sum(counts)
    after = needed + ops.cumsum(1 - counts)
    places = ops.where(counts == 1, ops.cumsum(counts), after) - 1
    order = ops.argsort(places)
    chunk = MOST_ROWS
    if backend.NAME == "torch":
        # As many in each.
        chunk = max(1, -(-int(needed) // max(1, -(-int(needed) // chunk))))
    elif rows.shape[0] is not None:
        chunk = min(chunk, rows.shape[0])
    given = [ops.take(x, order, axis=0) for x in (rows, ids, weights)]
    # The last chunk may begin anywhere.
    given = [ops.pad(x, [[0, chunk]] + [[0, 0]] * (len(x.shape) - 1)) for x in given]
    head = _Head(backbone, train_head)

    def step(state):
        start = state["start"]
        part = [
            ops.slice(x, (start, *[0] * (len(x.shape) - 1)), (chunk, *x.shape[1:]))
            for x in given
        ]
        new = head.meet(*part, state.get("head"))
        for name in ("loss", "right", "gradient"):
            new[name] = backend.write_slots(state[name], new[name], start, 0)
        return {"start": start + chunk, **new}

    state = {
        "start": backend.counter(0),
        "loss": ops.zeros_like(given[2]),
        "right": ops.zeros_like(given[2]),
        # float16 has no room for gradients that nobody has scaled yet.
        "gradient": ops.zeros_like(given[0], dtype=_without_float16(rows.dtype)),
    }
    if train_head:
        shape = (head.parts, head.rows, rows.shape[1])
        state["head"] = ops.zeros(shape, dtype="float32")
    state = backend.loop(lambda s: s["start"] < needed, step, state)
    # Back to the order of the rows; what the loop did not reach is 0.
    found = {
        name: ops.take(state[name], places, axis=0)
        for name in ("loss", "right", "gradient")
    }
    if train_head:
        found["head"] = ops.reshape(state["head"], (-1, rows.shape[1]))
    return found


def _without_float16(dtype):
    dtype = keras.backend.standardize_dtype(dtype)
    return "float32" if dtype == "float16" else dtype


def _tile_size(rows, most):
    """How many rows a tile has: a divisor of all, if there is a large one."""
    if rows <= most:
        return rows
    found = next(size for size in range(most, 0, -1) if rows % size == 0)
    return found if 2 * found >= most else -(-rows // -(-rows // most))


class _Head:
    """The head, a tile of its rows at a time."""

    def __init__(self, backbone, trained):
        self.backbone, self.trained = backbone, trained
        self.cap = backbone.config.final_logit_soft_cap
        self.embedding = backbone.token_embedding
        # Read here: JAX differentiates what a loop reads from outside.
        self.stored = list(map(ops.stop_gradient, self.embedding.stored()))
        # A tile has as many rows of each device's part, where there are several.
        self.parts = parts_of_rows(self.embedding.holder)
        vocabulary = backbone.config.vocab_size
        self.rows = vocabulary // self.parts
        self.size = _tile_size(self.rows, -(-TILE // self.parts))
        self.tiles = -(-self.rows // self.size)

    def meet(self, rows, ids, weights, gradient=None):
        """Loss [C], rightness [C] and gradient [C, D] of rows, float32.

        And the head's `gradient` [parts, V / parts, D] with their share, weighted, if
        it is trained.
        """
        ids = ids[:, None]
        column = ops.zeros(ids.shape, dtype="float32")
        state = {
            "tile": backend.counter(0),
            "top": column + LEAST,
            "best": ops.zeros_like(ids),
            "total": column,  # of exp(logit - top)
            "chosen": column,  # the label's logit
            "mixed": ops.zeros(rows.shape, dtype="float32"),
        }
        more = lambda s: s["tile"] < self.tiles  # noqa: E731
        found = backend.loop(more, lambda s: self._turn(s, rows, ids), state)
        total = ops.log(found["total"]) + found["top"]
        loss = total - found["chosen"]
        # The label's own part, in float32: a narrow dtype cannot tell it from 1.
        slope = ops.expm1(-loss) * self._slope(found["chosen"])
        own = [ops.take(part, ids[:, 0], axis=0) for part in self.stored]
        own = ops.cast(self.embedding.restored(own), "float32")
        new = {
            "loss": loss[:, 0],
            "right": ops.cast(found["best"] == ids, "float32")[:, 0],
            "gradient": found["mixed"] / found["total"] + slope * own,
        }
        if self.trained:
            state = {"tile": backend.counter(0), "gradient": gradient}
            turn = lambda s: self._learn(s, rows, ids, weights, total)  # noqa: E731
            new["head"] = backend.loop(more, turn, state)["gradient"]
        return new

    def _tile(self, tile):
        """`(first, columns, matrix)` of a tile.

        The place of its rows in each part, their ids [T], and themselves [T, D]. The
        last tile begins early enough to be whole; what it repeats has the id -1.
        """
        start, excess = tile * self.size, self.size * self.tiles - self.rows
        first = start - (tile // (self.tiles - 1) * excess if excess else 0)
        places = first + ops.arange(self.size, dtype="int32")
        columns = ops.arange(self.parts, dtype="int32")[:, None] * self.rows + places
        if excess:
            columns = ops.where(places >= start, columns, -1)
        cut = []
        for part in self.stored:
            shape = (self.parts, self.size, part.shape[1])
            divided = ops.reshape(part, (self.parts, self.rows, part.shape[1]))
            divided = ops.slice(divided, (0, first, 0), shape)
            cut.append(ops.reshape(divided, (-1, part.shape[1])))
        return first, ops.reshape(columns, (-1,)), self.embedding.restored(cut)

    def _logits(self, rows, columns, matrix):
        """Logits [C, T], and their slope with respect to those without a cap."""
        logits = ops.cast(self.backbone.logits(rows, matrix), "float32")
        slope = self._slope(logits)
        if self.size * self.tiles != self.rows:
            logits = ops.where(columns >= 0, logits, LEAST)
        return logits, slope

    def _slope(self, logits):
        return 1.0 if self.cap is None else 1.0 - ops.square(logits / self.cap)

    def _turn(self, state, rows, ids):
        """Another tile, which every row's softmax takes in."""
        _, columns, matrix = self._tile(state["tile"])
        logits, slope = self._logits(rows, columns, matrix)
        top, best, total, chosen, powers = backend.softmax_of_tile(
            logits, columns, ids, state["top"]
        )
        if self.cap is not None:
            powers = powers * slope
        mixed = backend.matmul(ops.cast(powers, matrix.dtype), matrix)
        before = ops.exp(state["top"] - top)
        return {
            "tile": state["tile"] + 1,
            "top": top,
            "best": ops.where(top > state["top"], best, state["best"]),
            "total": state["total"] * before + total,
            "chosen": state["chosen"] + chosen,
            "mixed": state["mixed"] * before + ops.cast(mixed, "float32"),
        }

    def _learn(self, state, rows, ids, weights, total):
        """Another tile's own gradient."""
        first, columns, matrix = self._tile(state["tile"])
        logits, slope = self._logits(rows, columns, matrix)
        slope = slope * (ops.exp(logits - total) - ops.cast(columns == ids, "float32"))
        slope = ops.transpose(slope * weights[:, None])
        share = ops.matmul(slope, ops.cast(rows, "float32"))
        shape = (self.parts, self.size, rows.shape[1])
        share = ops.reshape(share, shape)
        share = share + ops.slice(state["gradient"], (0, first, 0), shape)
        gradient = backend.write_slots(state["gradient"], share, first, axis=1)
        return {"tile": state["tile"] + 1, "gradient": gradient}
