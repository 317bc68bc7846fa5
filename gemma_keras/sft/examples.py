"""From a run's files to batches."""

import dataclasses
import warnings

import numpy as np

from gemma_keras.encoding import encode_examples, encoder_for
from gemma_keras.examples import read_columns
from gemma_keras.packing import BucketedDataset, PackedDataset
from gemma_keras.readers import read_examples


@dataclasses.dataclass
class RunData:
    """What a run learns from and is measured on.

    Attributes:
        train: a dataset for `Steps`.
        validation: a dataset for `evaluate`, or None.
        chat: whether examples are chats.
        files: path to a description of what was found.
    """

    train: object
    validation: object
    chat: bool
    files: dict


def read_data(config, preprocessor, say):
    """Reads, checks and encodes the files of a `RunConfig`.

    Args:
        config: says which files, and how.
        preprocessor: of the model.
        say: is told what was found.

    Raises:
        ValueError: a file cannot be read or used; the message says where and why.
    """
    files = {}
    train = _read(config.train, config, files, say)
    validation = _read(config.validation, config, files, say)
    if config.validation_split:
        train, validation = _split(train, config.validation_split, config.seed)
        say(f"{len(validation):,} of the examples are kept apart for validation.")
    encoder = make_encoder(
        preprocessor, config.preset, config.template, loss_on=config.loss_on
    )
    chat = encoder.as_chat(train[0])
    dataset = _batches(train, encoder, config, "train", say)
    measured = None
    if validation:
        measured = _batches(validation, encoder, config, "validation", say)
    return RunData(dataset, measured, chat, files)


def make_encoder(preprocessor, source, template, **settings):
    """The encoder of `encoding.encoder_for`, with what the preprocessor is set to.

    Args:
        preprocessor: of the model.
        source: preset name or path, which tells whether the model answers.
        template: "chat" or "text", or "auto" to go by that.
        **settings: in place of the encoder's other ones.
    """
    own = {
        "add_start_token": preprocessor.add_start_token,
        "add_end_token": preprocessor.add_end_token,
    }
    return encoder_for(source, preprocessor.tokenizer, template, **{**own, **settings})


def _read(paths, config, files, say):
    found, columns = [], read_columns(config.column)
    for path in paths:
        examples = read_examples(
            path, config.format, columns=columns, skip_bad=config.skip_bad
        )
        files[path] = examples.description.partition(": ")[2] or examples.description
        say(examples.description)
        for fault in examples.faults:
            say(f"  skipped: {fault}")
        found += examples
    return found


def _split(examples, share, seed):
    count = max(1, round(len(examples) * share))
    if count >= len(examples):
        raise ValueError(
            f"validation_split={share:g} of {len(examples)} examples leaves nothing "
            "to learn from."
        )
    order = np.random.default_rng([seed, len(examples)]).permutation(len(examples))
    chosen = set(order[:count].tolist())
    parts = ([], [])
    for number, example in enumerate(examples):
        parts[number in chosen].append(example)
    return parts


def _batches(examples, encoder, config, name, say):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        encoded = encode_examples(
            examples, encoder, config.sequence_length, config.too_long
        )
    for warning in caught:
        say(f"{name}: {warning.message}")
    kind = PackedDataset if config.packing else BucketedDataset
    dataset = kind(
        encoded, config.batch_size, seed=config.seed, shuffle=name == "train"
    )
    say(
        f"{name}: {encoded.description}; {len(dataset):,} batches, of whose slots "
        f"{dataset.usage:.0%} are used."
    )
    return dataset
