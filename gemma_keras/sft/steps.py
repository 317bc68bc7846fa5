"""`Steps`: the batches of a whole run, from any of them on, as one epoch of Keras.

Keras begins every epoch at its first batch and takes all epochs for as long as the
first. A run that goes on in the middle of an epoch needs neither to be so.
"""

import keras
import numpy as np

from gemma_keras.packing import EpochDataset


class Steps(keras.utils.PyDataset):
    """Batches of all epochs of a dataset, one after the other.

    Pass it to `fit(steps, shuffle=False)` with the default of one epoch.

    Args:
        dataset: a `PackedDataset` or `BucketedDataset`.
        epochs: times to go through it.
        accumulation: batches that make one step. If fewer are left for the last, it is
            filled up with batches of which nothing is learned: a step is the mean over
            its tokens, so it is that of those left.
        max_steps: end after so many steps in any case.
        start: steps that are done already.

    Attributes:
        total: steps of the run, those before `start` included.

    Raises:
        TypeError: `dataset` is another kind, whose batches have no numbers.
        ValueError: there are too few batches for one step.
    """

    def __init__(self, dataset, epochs=1, *, accumulation=1, max_steps=None, start=0):
        super().__init__(workers=1)
        if not isinstance(dataset, EpochDataset):
            raise TypeError(
                "Steps takes a PackedDataset or a BucketedDataset, which know each of "
                f"their batches by number; got {type(dataset).__name__}."
            )
        self.dataset, self.accumulation, self.start = dataset, accumulation, start
        batches = len(dataset) * epochs
        self.epochs, self._batches = epochs, batches
        self.total = min(-(-batches // accumulation), max_steps or batches)
        if batches < accumulation:
            raise ValueError(
                f"{batches} batches are too few for a step of {accumulation}: lower "
                "batch_size or accumulation, or raise epochs."
            )
        self._counts = {}

    def __len__(self):
        return (self.total - self.start) * self.accumulation

    @property
    def num_batches(self):
        return len(self)

    @property
    def steps_per_epoch(self):
        """Steps that one epoch takes, a fraction perhaps."""
        return len(self.dataset) / self.accumulation

    def __getitem__(self, index):
        number = self.start * self.accumulation + index
        if number >= self._batches:
            x, y, weight = self.dataset.whole_batch(*self._place(self._batches - 1))
            return self.dataset.share((x, y, np.zeros_like(weight)))
        batch = self.dataset.whole_batch(*self._place(number))
        x, _, weight = batch
        # Read ahead by another thread, and asked for when the step is done.
        tokens = int(np.sum(x["padding_mask"]))
        self._counts[number] = (tokens, int(np.count_nonzero(weight)))
        return self.dataset.share(batch)

    def _place(self, number):
        """Epoch and number within it of a batch of the run."""
        return divmod(number, len(self.dataset))

    def counts(self, step):
        """Tokens of a step, counted from 1, and how many of them were learned."""
        last = step * self.accumulation
        numbers = range(last - self.accumulation, last)
        pairs = [self._counts.get(number, (0, 0)) for number in numbers]
        for number in [number for number in self._counts if number < last]:
            del self._counts[number]
        return tuple(map(sum, zip(*pairs, strict=True)))
