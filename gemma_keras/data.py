"""What `fit()` and `generate()` take: text, pairs and chats, sorted and made arrays."""

import os

import keras
import numpy as np

from gemma_keras.examples import Example
from gemma_keras.packing import EpochDataset
from gemma_keras.readers import read_examples


def is_raw(x):
    """Whether `x` is text, or prompt/response pairs, or chats, not yet token ids."""
    if isinstance(x, dict):
        return "prompts" in x
    if isinstance(x, str | bytes):
        return True
    if hasattr(x, "dtype"):
        # Text in numpy is object, str or bytes; in TensorFlow it is string.
        return getattr(x.dtype, "kind", "") in "OSU" or x.dtype == "string"
    if isinstance(x, list | tuple) and x:
        if isinstance(x[0], dict) and "token_ids" in x[0]:
            return False  # a batch of arrays, with its targets
        chats = isinstance(x[0], list | tuple) and x[0] and isinstance(x[0][0], dict)
        return isinstance(x[0], str | bytes | dict | Example) or bool(chats)
    return False


def is_dataset(x):
    """Whether `x` yields batches by itself: tf.data, a DataLoader, a generator, ..."""
    if isinstance(x, keras.utils.PyDataset):
        return True
    known = str | bytes | dict | list | tuple | os.PathLike
    if isinstance(x, known) or hasattr(x, "shape"):
        return False
    return hasattr(x, "__iter__")


def size(x):
    """Batches of a dataset, or rows of arrays; -1 where nobody knows."""
    if isinstance(x, keras.utils.PyDataset):
        return -1 if x.num_batches is None else x.num_batches
    rows = [len(leaf) for leaf in keras.tree.flatten(x) if hasattr(leaf, "shape")]
    return rows[0] if rows else -1


class EpochSetter(keras.callbacks.Callback):
    """Tells a dataset with an order for each epoch which epoch it is.

    Keras ends an epoch of a dataset more often than it ends one of the training.
    """

    def __init__(self, dataset):
        super().__init__()
        self.dataset = dataset

    def on_epoch_begin(self, epoch, logs=None):
        self.dataset.set_epoch(epoch)


def with_epochs(callbacks, dataset):
    """`callbacks` as `fit` takes them, with one that tells `dataset` the epoch."""
    setter = EpochSetter(dataset)
    if isinstance(callbacks, keras.callbacks.CallbackList):
        callbacks.append(setter)
        return callbacks
    if callbacks is None or isinstance(callbacks, keras.callbacks.Callback):
        callbacks = [] if callbacks is None else [callbacks]
    return [*callbacks, setter]


class PreprocessedDataset(keras.utils.PyDataset):
    """The batches of a dataset of known length, made arrays as they are asked for.

    Batches that hold token ids already pass through unchanged. What has no order of
    its own to be asked in, such as a DataLoader, comes in the order it comes.
    """

    def __init__(self, dataset, preprocessor):
        super().__init__(workers=1)
        self.dataset, self.preprocessor = dataset, preprocessor
        self.indexed = isinstance(dataset, keras.utils.PyDataset)
        self.iterator = iter(())

    @property
    def num_batches(self):
        return self.dataset.num_batches if self.indexed else len(self.dataset)

    def __getitem__(self, index):
        if self.indexed:
            return prepare_batch(self.dataset[index], self.preprocessor)
        if index == 0:
            self.iterator = iter(self.dataset)
        return prepare_batch(next(self.iterator), self.preprocessor)

    def on_epoch_end(self):
        if self.indexed:
            self.dataset.on_epoch_end()


def is_grain_stream(dataset):
    """Whether this is a Grain `IterDataset`; Grain is not imported to find out."""
    return any(
        kind.__name__ == "IterDataset" and kind.__module__.startswith("grain.")
        for kind in type(dataset).__mro__
    )


def prepare_dataset(dataset, preprocessor, endless):
    """`dataset`, its raw batches made arrays.

    One without a length is read once; or again and again if it is `endless`, as it is
    where the caller says how many batches make an epoch.
    """
    if isinstance(dataset, keras.utils.PyDataset) or hasattr(dataset, "__len__"):
        try:
            len(dataset)
        except TypeError:  # tf.data, of unknown or infinite length
            pass
        else:
            return PreprocessedDataset(dataset, preprocessor)
    if is_grain_stream(dataset):
        # Keras reads it anew in each epoch, which it does not do with a generator.
        return dataset.map(lambda batch: prepare_batch(batch, preprocessor))

    def batches():
        again = True
        while again:
            for batch in dataset:
                yield prepare_batch(batch, preprocessor)
            again = endless and iter(dataset) is not dataset

    return batches()


def prepare_batch(batch, preprocessor):
    """One batch of a dataset as `(x, y, sample_weight)` if it is raw, else itself."""
    x = batch[0] if isinstance(batch, tuple) and len(batch) == 1 else batch
    return preprocessor(x) if is_raw(x) else batch


def prepare(x, y, sample_weight, preprocessor, endless=False):
    """`(x, y, sample_weight)` as Keras takes them, from anything that `fit` may get.

    `endless` says that a dataset without a length may be read again and again.
    """
    if preprocessor is None or x is None or isinstance(x, EpochDataset):
        return x, y, sample_weight
    if isinstance(x, os.PathLike):
        x = read_examples(x)
    if is_dataset(x):
        return prepare_dataset(x, preprocessor, endless), y, sample_weight
    if not is_raw(x):
        return x, y, sample_weight
    if y is not None or sample_weight is not None:
        raise ValueError(
            "Targets come from the text itself: pass raw text as x alone, or token "
            "ids as x with y and sample_weight."
        )
    return preprocessor([x] if isinstance(x, str | bytes) else x)


def read_prompts(inputs):
    """`(prompts, single)`: a list of strings or chats, and whether one was given."""
    if isinstance(inputs, dict) and "prompts" in inputs:
        inputs = inputs["prompts"]
    if hasattr(inputs, "numpy"):
        inputs = inputs.numpy()
    if isinstance(inputs, np.ndarray):
        inputs = inputs.tolist()
    if isinstance(inputs, str | bytes):
        return [inputs], True
    if not isinstance(inputs, list | tuple) or not inputs:
        raise ValueError(
            "generate takes a string, a chat (a list of messages with role and "
            f"content), or a list of either that is not empty; got {inputs!r:.80}."
        )
    if isinstance(inputs[0], dict):
        return [inputs], True
    return list(inputs), False


def read_token_arrays(inputs):
    """`token_ids` and `padding_mask` of a dict as numpy, int32 and bool [B, T]."""
    ids = keras.ops.convert_to_numpy(inputs["token_ids"]).astype("int32")
    mask = inputs.get("padding_mask")
    if mask is None:
        mask = np.ones(ids.shape, bool)
    mask = keras.ops.convert_to_numpy(mask).astype(bool)
    if ids.ndim != 2 or mask.shape != ids.shape:
        raise ValueError(
            "token_ids and padding_mask must both have the shape [B, T], got "
            f"{ids.shape} and {mask.shape}."
        )
    return ids, mask


def pad_rows(rows, length=None):
    """Token ids as `{"token_ids", "padding_mask"}` [B, length], padded on the right."""
    length = max(map(len, rows)) if length is None else length
    ids = np.zeros((len(rows), length), "int32")
    mask = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = True
    return {"token_ids": ids, "padding_mask": mask}
