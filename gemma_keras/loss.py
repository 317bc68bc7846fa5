"""Cross-entropy of the next token, without ever making all the logits.

A vocabulary of 256,000 makes logits [B, T, V] the largest tensor of training, by far,
and most of it is for prompts and padding that nobody learns. Here the positions that
count are brought together, and a tile of the head's rows at a time meets them, a chunk
of positions at a time. Since the gradient of a token's loss with respect to its hidden
state is known in closed form, (softmax - one hot) E, it is made with the loss: as
attention to the rows of E, with a softmax that is corrected from tile to tile (Milakov
and Gimelshein 2018, arXiv:1805.02867). That is two products, as a plain forward and
backward pass need, and nothing is kept but [N, D].
"""

from typing import NamedTuple

from keras import ops

from gemma_keras import backend
from gemma_keras.distribution import parts_of_rows

# Logits that are made at a time where probabilities alone are asked for, in float32.
LOGITS_BYTES = 2**26


# Less than any logit, and finite, so that differences with it are numbers.
LEAST = -1e30


def chunk_sizes():
    """How many positions meet how many rows of the head at a time.

    Of the last positions some may not count, but take as long; torch has none of these.
    On a CPU the logits fit into a cache.
    """
    positions = 1024 if backend.NAME == "torch" else 128 if backend.on_cpu() else 512
    return positions, 2000 if backend.on_cpu() else 4096


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

    [N], [N], [N, D], and [V, D] of the weighted sum if `train_head`; float32.
    """
    head = _Head(backbone)
    counted = _Counted(rows, ids[:, None], weights[:, None])
    sums = head.softmax(counted)
    if train_head:
        gradient = head.gradient(counted, sums)
    # Back to the order of the rows; what was not reached is 0.
    found = {
        "loss": counted.in_order(sums["loss"])[:, 0],
        "right": counted.in_order(sums["right"])[:, 0],
        "gradient": counted.in_order(sums["mixed"]),
    }
    if train_head:
        found["head"] = ops.reshape(gradient, (-1, rows.shape[1]))
    return found


class _Counted:
    """The rows that count, a chunk of them at a time."""

    def __init__(self, rows, ids, weights):
        # They come first, so that a loop over them ends early.
        counts = ops.cast(weights[:, 0] != 0, "int32")
        self.needed = ops.sum(counts)
        after = self.needed + ops.cumsum(1 - counts)
        self.places = ops.where(counts == 1, ops.cumsum(counts), after) - 1
        order = ops.argsort(self.places)
        self.size = chunk_sizes()[0]
        if backend.NAME == "torch":
            # As many in each. A device is asked for their number once.
            self.needed = int(self.needed)
            chunks = max(1, -(-self.needed // self.size))
            self.size = max(1, -(-self.needed // chunks))
        elif rows.shape[0] is not None:
            self.size = min(self.size, rows.shape[0])
        # The last chunk may begin anywhere.
        self.given = [
            ops.pad(ops.take(x, order, axis=0), [[0, self.size], [0, 0]])
            for x in (rows, ids, weights)
        ]

    def column(self, value, dtype="float32"):
        """`value` for each row, [N, 1]."""
        return ops.full_like(self.given[2], value, dtype=dtype)

    def at(self, start):
        """The rows, ids and weights of a chunk: [C, D], [C, 1] and [C, 1]."""
        return [self.cut(x, start) for x in self.given]

    def cut(self, x, start):
        return ops.slice(x, (start, 0), (self.size, x.shape[1]))

    def each(self, step, state):
        """`state = step(start, state)` for the start of each chunk."""

        def turn(now):
            return now[0] + self.size, step(*now)

        begun = backend.counter(0), state
        return backend.loop(lambda now: now[0] < self.needed, turn, begun)[1]

    def update(self, step, state):
        """The same for tensors of rows, of which `step` makes those of a chunk."""

        def write(start, state):
            new = step(start, {name: self.cut(x, start) for name, x in state.items()})
            return state | {
                name: backend.write_slots(state[name], x, start, axis=0)
                for name, x in new.items()
            }

        return self.each(write, state)

    def in_order(self, x):
        return ops.take(x, self.places, axis=0)


def _tile_size(rows, most):
    """How many rows a tile has: a divisor of all, if there is a large one.

    On a CPU not one with which rows of logits lie whole pages apart: they would share
    few places of its cache, and products take up to three times as long.
    """
    if rows <= most:
        return rows
    fits = lambda size: not backend.on_cpu() or size % 1024  # noqa: E731
    choices = range(most, most // 2, -1)
    return next((size for size in choices if rows % size == 0 and fits(size)), most)


class _Tile(NamedTuple):
    """Rows of the head.

    The place of the first in each part, their ids [T], and themselves [T, D]. Of what
    the last tile repeats, the id is -1.
    """

    first: object
    columns: object
    matrix: object


class _Head:
    """The head, a tile of its rows at a time."""

    def __init__(self, backbone):
        self.backbone = backbone
        self.cap = backbone.config.final_logit_soft_cap
        self.embedding = backbone.token_embedding
        # Read here: JAX differentiates what a loop reads from outside.
        stored = list(map(ops.stop_gradient, self.embedding.stored()))
        self.dtypes = [part.dtype for part in stored]
        self.stored = list(map(backend.as_bits, stored))
        # A tile has as many rows of each device's part, where there are several.
        self.parts = parts_of_rows(self.embedding.holder)
        vocabulary = backbone.config.vocab_size
        self.rows = vocabulary // self.parts
        self.size = _tile_size(self.rows, -(-chunk_sizes()[1] // self.parts))
        self.tiles = -(-self.rows // self.size)

    def softmax(self, counted):
        """What all tiles make of the rows that count.

        Returns:
            A dictionary: the loss, rightness and `total`, the logarithm of the sum of
            the exponentials, [N, 1], and `mixed`, the gradient of the rows, [N, D].
        """
        sums = {
            "top": counted.column(LEAST),
            "best": counted.column(0, "int32"),
            "total": counted.column(0.0),  # of exp(logit - top)
            "chosen": counted.column(0.0),  # the label's logit
            "mixed": ops.zeros_like(counted.given[0], dtype="float32"),
        }

        def meet(tile, sums):
            def step(start, sums):
                rows, ids, _ = counted.at(start)
                return self._taken_in(tile, rows, ids, sums)

            return counted.update(step, sums)

        def end(start, sums):
            return self._ended(counted.at(start)[1], sums)

        sums = self._each(meet, sums)
        sums |= {"loss": counted.column(0.0), "right": counted.column(0.0)}
        return counted.update(end, sums)

    def gradient(self, counted, sums):
        """Of the weighted sum of losses: [parts, V / parts, D]."""
        width = counted.given[0].shape[1]

        def learn(tile, gradient):
            def step(start, share):
                total = counted.cut(sums["total"], start)
                return share + self._share(tile, *counted.at(start), total)

            shape = (self.parts, self.size, width)
            share = ops.zeros((self.parts * self.size, width), dtype="float32")
            share = ops.reshape(counted.each(step, share), shape)
            share = share + ops.slice(gradient, (0, tile.first, 0), shape)
            return backend.write_slots(gradient, share, tile.first, axis=1)

        shape = (self.parts, self.rows, width)
        return self._each(learn, ops.zeros(shape, dtype="float32"))

    def _each(self, step, state):
        """`state = step(tile, state)` for each tile."""

        def turn(now):
            return now[0] + 1, step(self._tile(now[0]), now[1])

        begun = backend.counter(0), state
        return backend.loop(lambda now: now[0] < self.tiles, turn, begun)[1]

    def _tile(self, number):
        # The last tile begins early enough to be whole.
        start, excess = number * self.size, self.size * self.tiles - self.rows
        first = start - (number // (self.tiles - 1) * excess if excess else 0)
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
        return _Tile(first, ops.reshape(columns, (-1,)), self._restored(cut))

    def _restored(self, stored):
        pairs = zip(stored, self.dtypes, strict=True)
        return self.embedding.restored([backend.from_bits(*pair) for pair in pairs])

    def _logits(self, tile, rows):
        """Logits [C, T], and their slope with respect to those without a cap."""
        logits = ops.cast(self.backbone.logits(rows, tile.matrix), "float32")
        slope = self._slope(logits)
        if self.size * self.tiles != self.rows:
            logits = ops.where(tile.columns >= 0, logits, LEAST)
        return logits, slope

    def _slope(self, logits):
        return 1.0 if self.cap is None else 1.0 - ops.square(logits / self.cap)

    def _taken_in(self, tile, rows, ids, sums):
        """The sums of rows [C, D], with another tile."""
        logits, slope = self._logits(tile, rows)
        top, best, total, chosen, powers = backend.softmax_of_tile(
            logits, tile.columns, ids, sums["top"]
        )
        if self.cap is not None:
            powers = powers * slope
        mixed = backend.matmul(ops.cast(powers, tile.matrix.dtype), tile.matrix)
        before = ops.exp(sums["top"] - top)
        return {
            "top": top,
            "best": ops.where(top > sums["top"], best, sums["best"]),
            "total": sums["total"] * before + total,
            "chosen": sums["chosen"] + chosen,
            "mixed": sums["mixed"] * before + ops.cast(mixed, "float32"),
        }

    def _ended(self, ids, sums):
        """What the sums of rows come to, when all tiles are in them."""
        total = ops.log(sums["total"]) + sums["top"]
        loss = total - sums["chosen"]
        # The label's own part, in float32: a narrow dtype cannot tell it from 1.
        slope = ops.expm1(-loss) * self._slope(sums["chosen"])
        own = [ops.take(part, ids[:, 0], axis=0) for part in self.stored]
        own = ops.cast(self._restored(own), "float32")
        return {
            "loss": loss,
            "right": ops.cast(sums["best"] == ids, "float32"),
            "total": total,
            "mixed": sums["mixed"] / sums["total"] + slope * own,
        }

    def _share(self, tile, rows, ids, weights, total):
        """What rows make of a tile's own gradient."""
        logits, slope = self._logits(tile, rows)
        own = ops.cast(tile.columns == ids, "float32")
        slope = slope * (ops.exp(logits - total) - own)
        slope = ops.transpose(slope * weights)
        return ops.matmul(slope, ops.cast(rows, "float32"))
