"""What `fit()` and `generate()` take: text, pairs and chats, sorted and made arrays."""

import itertools
import os

import keras
import numpy as np

from gemma_keras.examples import Example
from gemma_keras.packing import EpochDataset
from gemma_keras.readers import read_examples
from gemma_keras.records import DataError, is_frame, is_message, names_file


def is_raw(x):
    """Whether `x` is text, or prompt/response pairs, or chats, not yet token ids."""
    if isinstance(x, dict):
        return "prompts" in x
    if isinstance(x, str | bytes):
        return True
    if hasattr(x, "dtype"):
        return is_text_array(x)
    if isinstance(x, list | tuple) and x:
        if isinstance(x[0], dict) and "token_ids" in x[0]:
            return False  # a batch of arrays, with its targets
        chats = isinstance(x[0], list | tuple) and x[0] and isinstance(x[0][0], dict)
        return isinstance(x[0], str | bytes | dict | Example) or bool(chats)
    return False


def is_text_array(x):
    """Whether an array or a tensor, of one element or many, is of text."""
    # In numpy that is object, str or bytes; in TensorFlow it is string.
    return getattr(x.dtype, "kind", "-") in "OSU" or x.dtype == "string"


def holds_text(x):
    """Whether there is text in `x`: in a cell, or in the first row of a column."""
    if isinstance(x, dict):
        return any(map(holds_text, x.values()))
    if isinstance(x, list | tuple):
        return bool(x) and holds_text(x[0])
    return isinstance(x, str | bytes) or (hasattr(x, "dtype") and is_text_array(x))


def is_row(x):
    """Whether `x` is one example, not a batch: a text, a chat, or a dict of cells."""
    if isinstance(x, dict):
        return any(map(is_row, x.values()))
    if isinstance(x, list | tuple):
        return bool(x) and is_message(x[0])
    if hasattr(x, "dtype"):
        return is_text_array(x) and len(x.shape) == 0
    return isinstance(x, str | bytes | Example)


def is_table(x):
    """Whether `x` is rows or columns of text which the preprocessor does not know."""
    if is_frame(x):
        return any(is_text_array(x[name]) for name in x.columns)
    if isinstance(x, dict):
        known = "prompts" in x and not is_row(x["prompts"])
        if known and (len(x) == 1 or "responses" in x):
            return False
        # Of a dict of splits, the reader says that one must be chosen.
        return any(map(_is_hugging_face, x.values())) or holds_text(x)
    if not isinstance(x, list | tuple) or not x or is_message(x[0]):
        return False
    return all(isinstance(row, dict) for row in x) and holds_text(x[0])


def read_rows(x, batch_rows=None):
    """`x` as checked examples, if it is rows or columns of text; else as it is.

    That is the path of a file, a dict of columns, a list of dicts, a DataFrame, a
    Hugging Face dataset, or whatever else yields rows.

    Args:
        x: anything that `fit` may get.
        batch_rows: have something without a length stay a stream, of batches of so many
            rows, each checked when its turn comes; None reads all of it.

    Raises:
        DataError: there is no such file, several are named, or rows are bad.
    """
    if _is_path(x):
        return _read_file(x)
    if isinstance(x, list | tuple) and x and all(map(_is_path, x)):
        reading = " + ".join(f"read_examples({os.fspath(path)!r})" for path in x[:2])
        raise DataError(
            "Files are read one at a time, and a list of strings is a list of texts: "
            f"pass {reading}{' + ...' if len(x) > 2 else ''}"
        )
    if is_table(x):
        return read_examples(x)
    if not _is_stream(x):
        return x
    first, x = _peek(x)
    if not is_row(first):
        return x
    if batch_rows is None or hasattr(x, "__len__"):
        return read_examples(x)
    return RowBatches(x, batch_rows)


def _is_path(x):
    return isinstance(x, os.PathLike) or (isinstance(x, str) and names_file(x))


def _read_file(path):
    if isinstance(path, str) and not os.path.exists(os.path.expanduser(path)):
        raise DataError(
            f"{path}: there is no such file. If this is a text to learn, pass it in a "
            "list of texts."
        )
    return read_examples(path)


def _is_stream(x):
    """Whether only its first element tells if `x` yields rows or batches."""
    if _is_hugging_face(x):
        return True
    return is_dataset(x) and not hasattr(x, "__len__") and not is_grain_stream(x)


def _is_hugging_face(x):
    """Whether this is a dataset of Hugging Face, in memory or streamed."""
    return hasattr(x, "column_names") and hasattr(x, "__iter__")


def _peek(x):
    """What `x` yields first, or None, and `x` with that still in it."""
    rows = iter(x)
    first = next(rows, None)
    if rows is iter(x):
        return first, x if first is None else itertools.chain([first], rows)
    return first, x


class RowBatches:
    """Lists of so many rows of a stream, which may be read anew if the stream may."""

    def __init__(self, rows, size):
        self.rows, self.size = rows, size

    def __iter__(self):
        rows = iter(self.rows)
        while batch := list(itertools.islice(rows, self.size)):
            yield batch


def is_dataset(x):
    """Whether `x` yields batches by itself: tf.data, a DataLoader, a generator, ..."""
    if isinstance(x, keras.utils.PyDataset) or _is_hugging_face(x):
        return True
    known = str | bytes | dict | list | tuple | os.PathLike
    if isinstance(x, known) or hasattr(x, "shape"):
        return False
    return hasattr(x, "__iter__")


def has_own_order(x):
    """Whether `x`, as `prepare` gives it, comes in one order, whatever Keras asks."""
    if isinstance(x, PreprocessedDataset):
        return not x.indexed
    if isinstance(x, keras.utils.PyDataset):
        return isinstance(x, EpochDataset)
    return is_dataset(x)


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
            again = False
            for batch in dataset:
                yield prepare_batch(batch, preprocessor)
                again = endless
            again = again and iter(dataset) is not dataset

    return batches()


def prepare_batch(batch, preprocessor):
    """One batch of a dataset as `(x, y, sample_weight)` if it is raw, else itself.

    Raises:
        DataError: it is no batch but a row; or rows are bad.
    """
    x = batch[0] if isinstance(batch, tuple) and len(batch) == 1 else batch
    if is_row(x):
        raise DataError(
            f"A dataset has to yield batches, got one example: {x!r:.80}. Have it make "
            "batches: .batch(8) of tf.data or Grain, batch_size=8 of a DataLoader, and "
            "collate_fn=list for chats. Or pass read_examples(dataset)."
        )
    if is_table(x):
        x = read_examples(x)
    return preprocessor(x) if is_raw(x) else batch


def prepare(x, y, sample_weight, preprocessor, endless=False, batch_rows=None):
    """`(x, y, sample_weight)` as Keras takes them, from anything that `fit` may get.

    `endless` says that a dataset without a length may be read again and again, and
    `batch_rows` is as in `read_rows`.
    """
    if preprocessor is None or x is None or isinstance(x, EpochDataset):
        return x, y, sample_weight
    x = read_rows(x, batch_rows)
    if is_dataset(x):
        return prepare_dataset(x, preprocessor, endless), y, sample_weight
    if not is_raw(x):
        return x, y, sample_weight
    if y is not None or sample_weight is not None:
        raise ValueError(
            "Targets come from the text itself: pass raw text as x alone, or token "
            "ids as x with y and sample_weight."
        )
    return preprocessor([x] if is_row(x) else x)


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
