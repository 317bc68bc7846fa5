"""What `fit()` and its kin take: text, pairs and chats become arrays on the way in."""

import keras
import numpy as np


def is_raw(x):
    """Whether `x` is text, or prompt/response pairs, or chats, not yet token ids."""
    if isinstance(x, dict):
        return "prompts" in x
    if isinstance(x, str | bytes):
        return True
    if hasattr(x, "dtype"):
        # Arrays and tensors of text: numpy's object, str and bytes, TensorFlow's string.
        return getattr(x.dtype, "kind", "") in "OSU" or x.dtype == "string"
    if isinstance(x, list | tuple) and x:
        return isinstance(x[0], str | bytes | dict | list)
    return False


def to_python(x):
    """Text in tensors or arrays as Python strings; everything else as it is."""
    if isinstance(x, dict):
        return {key: to_python(value) for key, value in x.items()}
    if hasattr(x, "numpy"):
        x = x.numpy()
    if isinstance(x, np.ndarray):
        x = x.tolist()
    if isinstance(x, bytes):
        return x.decode("utf-8")
    if isinstance(x, list | tuple):
        return [to_python(item) for item in x]
    return x


def is_dataset(x):
    """Whether `x` yields batches by itself: tf.data, a DataLoader, a generator, ..."""
    if isinstance(x, keras.utils.PyDataset):
        return True
    if isinstance(x, str | bytes | dict | list | tuple) or hasattr(x, "shape"):
        return False
    return hasattr(x, "__iter__")


class PreprocessedDataset(keras.utils.PyDataset):
    """The batches of a dataset of raw text, turned to arrays as they are asked for.

    Batches that hold token ids already pass through unchanged. The dataset is iterated
    anew in each epoch; a generator can be iterated only once, as in Keras.
    """

    def __init__(self, dataset, preprocessor):
        super().__init__(workers=1)
        self.dataset, self.preprocessor = dataset, preprocessor
        self.iterator = None
        indexed = isinstance(dataset, keras.utils.PyDataset)
        self.batches = _size(dataset) if not indexed else dataset.num_batches
        self.indexed = indexed

    @property
    def num_batches(self):
        return self.batches

    def __getitem__(self, index):
        if self.indexed:
            return prepare_batch(self.dataset[index], self.preprocessor)
        if self.iterator is None or index == 0:
            self.iterator = iter(self.dataset)
        try:
            batch = next(self.iterator)
        except StopIteration:
            self.iterator = iter(self.dataset)
            batch = next(self.iterator)
        return prepare_batch(batch, self.preprocessor)

    def on_epoch_end(self):
        if self.indexed:
            self.dataset.on_epoch_end()


def _size(dataset):
    try:
        return len(dataset)
    except TypeError:
        return None


def prepare_batch(batch, preprocessor):
    """One batch of a dataset as `(x, y, sample_weight)` if it is raw, else itself."""
    x = batch[0] if isinstance(batch, tuple) and len(batch) == 1 else batch
    return preprocessor(to_python(x)) if is_raw(x) else batch


def prepare(x, y, sample_weight, preprocessor):
    """`(x, y, sample_weight)` as Keras takes them, from anything that `fit` may get."""
    if preprocessor is None or x is None:
        return x, y, sample_weight
    if is_dataset(x):
        return PreprocessedDataset(x, preprocessor), y, sample_weight
    if not is_raw(x):
        return x, y, sample_weight
    if y is not None or sample_weight is not None:
        raise ValueError(
            "Targets come from the text itself: pass raw text as x alone, or token "
            "ids as x with y and sample_weight."
        )
    return preprocessor(to_python([x] if isinstance(x, str | bytes) else x))
