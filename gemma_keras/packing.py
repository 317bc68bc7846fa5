"""Encoded examples as batches of static shapes: packed rows, or buckets of lengths.

Both datasets give batches by number: which examples batch `i` of an epoch holds is a
function of the seed, the epoch and `i` alone, so that a run can be resumed at any of
them. `fit()` of `GemmaCausalLM` tells them the epoch; other loops call `set_epoch`.
"""

import keras
import numpy as np

from gemma_keras import bins
from gemma_keras.encoding import EncodedExamples

# Rows of a bucketed batch have similar lengths, since so many batches are sorted.
_WINDOW = 32


class EpochDataset(keras.utils.PyDataset):
    """Batches in an order of their own for each epoch.

    Subclasses define `_order(rng)`, what an epoch looks like, and `_batch(order, i)`.
    `fit(shuffle=...)` has no effect on them in `GemmaCausalLM`.
    """

    def __init__(self, examples, batch_size, seed, shuffle, shard=(0, 1)):
        super().__init__()
        if not isinstance(examples, EncodedExamples):
            raise TypeError(
                "Expected encoded examples, got "
                f"{type(examples).__name__}: pass what encode_examples returns, as in "
                "encode_examples(read_examples(path), encoder, sequence_length)."
            )
        if isinstance(batch_size, bool) or not isinstance(batch_size, int):
            raise ValueError(f"batch_size must be a whole number, got {batch_size!r}.")
        if batch_size < 1:
            raise ValueError(f"batch_size must be from 1, got {batch_size}.")
        index, count = shard
        if not 0 <= index < count:
            raise ValueError(
                "shard must be (index, count) with an index from 0 to below count, got "
                f"{shard!r}."
            )
        if batch_size % count:
            raise ValueError(
                f"The {batch_size} rows of a batch cannot be divided among {count} "
                "processes: make batch_size, which counts the rows of all, a multiple."
            )
        self.shard = index, count
        self.examples, self.batch_size = examples, batch_size
        self.seed, self.shuffle = seed, shuffle
        self.epoch = 0
        self._planned = (None, None)

    def set_epoch(self, epoch: int):
        """Makes this the dataset of an epoch, counted from 0."""
        self.epoch = epoch

    def on_epoch_end(self):
        self.epoch += 1

    def batch(self, epoch: int, index: int):
        """Batch `index` of `epoch`, whatever the present epoch is; this shard's rows.

        All shards together have the batch that there is without shards.
        """
        return self.share(self.whole_batch(epoch, index))

    def share(self, batch):
        """The rows of a whole batch that are this shard's."""
        shard, count = self.shard
        rows = self.batch_size // count
        part = slice(shard * rows, (shard + 1) * rows)
        return keras.tree.map_structure(lambda array: array[part], batch)

    def whole_batch(self, epoch: int, index: int):
        """Batch `index` of `epoch`, with the rows of all shards."""
        if not 0 <= index < len(self):
            raise IndexError(f"There are {len(self)} batches, got index {index}.")
        # Read once: another thread may be asking for another epoch.
        planned, order = self._planned
        if planned != epoch:
            rng = np.random.default_rng([self.seed, epoch]) if self.shuffle else None
            order = self._order(rng)
            self._planned = (epoch, order)
        return self._batch(order, index)

    def __getitem__(self, index):
        return self.batch(self.epoch, index)

    def __len__(self):
        raise NotImplementedError

    @property
    def num_batches(self):
        return len(self)


class PackedDataset(EpochDataset):
    """Several examples in each row, none of which sees another.

    A batch is `({"token_ids", "padding_mask", "positions", "segment_ids"}, y,
    sample_weight)`, all [B, T]: positions begin at 0 in each example, segment ids at 1
    in each row (0 is padding), and `y` is the next token of the same example.

    Args:
        examples: what `encode_examples` returned.
        batch_size: B, rows of a batch, in all shards together. The last batch is
            filled with empty rows.
        sequence_length: T; that of the examples by default.
        seed: of the order.
        shuffle: pack and order anew for each epoch; or always alike.
        shard: `(index, count)`: give the rows of one of several processes, as
            `distribution.shard()` says; seed and batch_size are the same in all.

    Raises:
        ValueError: T is too short for some example; a bad `batch_size`.
    """

    def __init__(
        self,
        examples: EncodedExamples,
        batch_size: int,
        sequence_length: int | None = None,
        *,
        seed: int = 0,
        shuffle: bool = True,
        shard: tuple[int, int] = (0, 1),
    ):
        super().__init__(examples, batch_size, seed, shuffle, shard)
        self.sequence_length = sequence_length or examples.sequence_length
        longest = int(examples.lengths.max())
        if longest > self.sequence_length:
            raise ValueError(
                f"sequence_length is {self.sequence_length} and an example has "
                f"{longest} tokens: encode with this sequence_length, or raise it."
            )
        # Rows of ranks in the order of lengths: which of equally long examples has a
        # rank changes with each epoch, the number of rows does not.
        lengths = -np.sort(-examples.lengths, kind="stable")
        self._rows = bins.best_fit(lengths, self.sequence_length)
        self.usage = bins.usage(self._rows, lengths, self.sequence_length)

    def __len__(self):
        return -(-len(self._rows) // self.batch_size)

    def rows(self, epoch: int = 0) -> list[list[int]]:
        """Which examples share each row of an epoch, in the order of its batches."""
        rng = np.random.default_rng([self.seed, epoch]) if self.shuffle else None
        ranked, order = self._order(rng)
        return [ranked[self._rows[row]].tolist() for row in order]

    def _order(self, rng):
        lengths = self.examples.lengths
        if rng is None:
            ranked = np.argsort(-lengths, kind="stable")
            return ranked, np.arange(len(self._rows))
        ranked = np.lexsort((rng.random(len(lengths)), -lengths))
        return ranked, rng.permutation(len(self._rows))

    def _batch(self, order, index):
        ranked, rows = order
        shape = (self.batch_size, self.sequence_length)
        arrays = _empty(shape)
        more = ("positions", "segment_ids")
        arrays |= {name: np.zeros(shape, "int32") for name in more}
        chosen = rows[index * self.batch_size : (index + 1) * self.batch_size]
        for i, row in enumerate(chosen):
            start = 0
            for segment, example in enumerate(ranked[self._rows[row]], 1):
                end = _put(arrays, (i, start), self.examples[example])
                arrays["positions"][i, start:end] = np.arange(end - start)
                arrays["segment_ids"][i, start:end] = segment
                start = end
        return _as_batch(arrays)


class BucketedDataset(EpochDataset):
    """One example a row, batches padded to the nearest of a few lengths.

    A batch is `({"token_ids", "padding_mask"}, y, sample_weight)`, all [B, L], where L
    is the first of `lengths` into which all its examples fit. Examples are shuffled,
    then sorted by length within windows of some batches, and the batches shuffled.

    Args:
        examples: what `encode_examples` returned.
        batch_size: B, in all shards together. The last batch is filled with empty
            rows.
        lengths: the lengths of batches; T / 8, T / 4, T / 2 and T by default, where T
            is the examples' `sequence_length`. Each costs a compilation.
        seed: of the order.
        shuffle: order anew for each epoch; or always alike, sorted throughout.
        shard: `(index, count)`: give the rows of one of several processes, as
            `distribution.shard()` says; seed and batch_size are the same in all.

    Raises:
        ValueError: some example is longer than all `lengths`; a bad `batch_size`.
    """

    def __init__(
        self,
        examples: EncodedExamples,
        batch_size: int,
        lengths: tuple[int, ...] | None = None,
        *,
        seed: int = 0,
        shuffle: bool = True,
        shard: tuple[int, int] = (0, 1),
    ):
        super().__init__(examples, batch_size, seed, shuffle, shard)
        if lengths is None:
            longest = examples.sequence_length
            lengths = {-(-longest // part) for part in (8, 4, 2, 1)}
        self.lengths = np.array(sorted(lengths))
        longest = int(examples.lengths.max())
        if not len(self.lengths) or longest > self.lengths[-1]:
            raise ValueError(
                f"An example has {longest} tokens and the longest bucket is "
                f"{max(self.lengths, default=0)}: add a longer one to lengths."
            )

    def __len__(self):
        return -(-len(self.examples) // self.batch_size)

    @property
    def usage(self) -> float:
        """The part of all slots of the present epoch that is used, from 0 to 1."""
        rng = np.random.default_rng([self.seed, self.epoch]) if self.shuffle else None
        order, batches = self._order(rng)
        slots = sum(self._length(self._chosen(order, i)) for i in batches)
        return self.examples.num_tokens / (slots * self.batch_size)

    def _order(self, rng):
        lengths, batches = self.examples.lengths, np.arange(len(self))
        if rng is None:
            return np.argsort(lengths, kind="stable"), batches
        order = rng.permutation(len(lengths))
        window = _WINDOW * self.batch_size
        for start in range(0, len(order), window):
            part = order[start : start + window]
            order[start : start + window] = part[np.argsort(lengths[part])]
        return order, rng.permutation(batches)

    def _chosen(self, order, number):
        return order[number * self.batch_size : (number + 1) * self.batch_size]

    def _length(self, chosen) -> int:
        longest = self.examples.lengths[chosen].max()
        return int(self.lengths[np.searchsorted(self.lengths, longest)])

    def _batch(self, order, index):
        order, batches = order
        chosen = self._chosen(order, batches[index])
        arrays = _empty((self.batch_size, self._length(chosen)))
        for i, example in enumerate(chosen):
            _put(arrays, (i, 0), self.examples[example])
        return _as_batch(arrays)


def _empty(shape) -> dict[str, np.ndarray]:
    dtypes = {"token_ids": "int32", "padding_mask": bool, "y": "int32"}
    return {k: np.zeros(shape, t) for k, t in (dtypes | {"weight": "float32"}).items()}


def _put(arrays, place, example) -> int:
    """Writes one example into a row from a slot on; returns the slot after it."""
    row, start = place
    ids, learn = example
    # Each slot predicts the next token, so the last id takes none.
    end = start + len(ids) - 1
    arrays["token_ids"][row, start:end] = ids[:-1]
    arrays["padding_mask"][row, start:end] = True
    arrays["y"][row, start:end] = ids[1:]
    arrays["weight"][row, start:end] = learn[1:]
    return end


def _as_batch(arrays):
    y, weight = arrays.pop("y"), arrays.pop("weight")
    return arrays, y, weight
