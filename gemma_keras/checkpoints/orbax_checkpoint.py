"""Orbax directories with a Gemma: Google's Flax checkpoints, and MaxText's.

Neither says what it is but by the names and shapes of its arrays. What they leave open
comes from `gemma_config.json`, which our exports have beside them, or else from the
published model of these shapes.
"""

import dataclasses
import json
import math

from gemma_keras import registry
from gemma_keras.checkpoints import orbax_directory, orbax_place
from gemma_keras.checkpoints.checkpoint import (
    Checkpoint,
    CheckpointError,
    build_config,
    check_shape,
    dominant_dtype,
    load_tokenizer,
    read_json,
    some,
)
from gemma_keras.checkpoints.flax_layout import FlaxLayout
from gemma_keras.checkpoints.mapped_file import FLOAT_DTYPES
from gemma_keras.checkpoints.maxtext_layout import MaxTextLayout
from gemma_keras.checkpoints.orbax_directory import OrbaxDirectory
from gemma_keras.config import GemmaConfig

CONFIG = "gemma_config.json"
# Rows of the embedding where they are others than the vocabulary has. Gemma 1 and 2
# have padding; Hugging Face adds 64 to Gemma 3, which stand for no text.
_ROWS = {256000: 256128, 262208: 262144}
_LAYOUTS = (FlaxLayout, MaxTextLayout)
# What a trainer keeps beside the weights, under the same names.
_TRAINING = {"opt_state", "optimizer", "optimizer_state", "collections"}
# Bytes of layers that are kept from reading others in the same chunk.
_AHEAD_BYTES = 2**31


def stored_rows(vocab_size):
    """Rows of the embedding in these formats."""
    return _ROWS.get(vocab_size, vocab_size)


def with_rows(places, config):
    """The places of weights, with the rows that the embedding is to have."""
    path = "token_embedding/embeddings"
    shape = (stored_rows(config.vocab_size), config.hidden_dim)
    return places | {path: dataclasses.replace(places[path], shape=shape)}


def told_of_rows(config):
    """A sentence about rows of the embedding that are added or left out."""
    count = stored_rows(config.vocab_size) - config.vocab_size
    if count > 0:
        return [
            f"{count} rows of zeros were added to the embedding, as is usual there."
        ]
    if count < 0:
        return [f"The last {-count} rows of the embedding, no text's, were left out."]
    return []


def stored_config(config):
    """The config as it is after a way through these formats."""
    rows = stored_rows(config.vocab_size)
    vocab_size = min(config.vocab_size, rows)
    return dataclasses.replace(config, vocab_size=vocab_size)


def write_config(folder, config):
    """Writes `gemma_config.json`, which is as those in `presets/`."""
    text = json.dumps(dataclasses.asdict(config), indent=2)
    (folder / CONFIG).write_text(text + "\n", "utf-8")


def recognises(path):
    """Whether there is an Orbax directory at or below the directory `path`."""
    return orbax_directory.find(path) is not None


def open_checkpoint(path, config=None, dtype=None):
    """Opens an Orbax directory, or the one inside an export, an archive or a run.

    `dtype` is of no consequence: nothing that this reads is quantised.
    """
    return OrbaxCheckpoint(path, config)


class OrbaxCheckpoint(Checkpoint):
    """An Orbax directory that holds a Gemma as Flax or MaxText has it."""

    def __init__(self, path, config=None):
        self.path = path
        self._directory = OrbaxDirectory(orbax_directory.find(path))
        self._where = self._directory.path
        self._ahead = {}
        self._tokenizer = None
        kind, names = self._find()
        self._names = names
        self._arrays = self._directory.open(names.values())
        self._shapes = {name: self._arrays[full].shape for name, full in names.items()}
        layout, fields = kind.read(self._shapes, self._where)
        self.format = f"{kind.format} (Orbax)"
        self._layout = layout
        self.config = config or self._read_config() or self._guess(fields)
        self._check_depth(fields)
        self._places = self._match()
        used = {place.name for place in self._places.values()}
        self.dtype = dominant_dtype(
            (array.dtype, math.prod(array.shape))
            for array in (self._arrays[names[name]] for name in used)
        )

    def _find(self):
        """The kind of layout, and the canonical name of each array to its full one."""
        there = [
            name for name in self._directory.names if not _TRAINING.intersection(name)
        ]
        for kind in _LAYOUTS:
            length = len(kind.embedding)
            found = [name for name in there if name[-length:] == kind.embedding]
            if len(found) > 1:
                called = some(self._directory.called(name) for name in found)
                raise CheckpointError(f"{self._where}: holds several models: {called}.")
            if found:
                prefix = found[0][:-length]
                return kind, self._below(there, prefix, kind)
        raise CheckpointError(
            f"{self._where}: holds no Gemma as Flax or MaxText names it; it holds "
            f"{some(map(self._directory.called, there)) or 'no arrays'}."
        )

    def _below(self, names, prefix, kind):
        start, result = len(prefix), {}
        for name in names:
            inner = name[start:]
            if name[:start] != prefix or not inner or not kind.is_decoder(inner):
                continue
            canonical = kind.canonical(inner)
            # What a trainer counts is no weight.
            if canonical != ("step",):
                result[canonical] = name
        return result

    def _read_config(self):
        for folder in self.homes():
            where = folder / CONFIG
            if where.is_file():
                raw = read_json(where)
                known = {field.name for field in dataclasses.fields(GemmaConfig)}
                if extra := raw.keys() - known:
                    raise CheckpointError(f"{where}: does not know {some(extra)}.")
                return build_config(where, **raw)
        return None

    def homes(self):
        """Folders in which files beside the weights may lie, from the inside out."""
        inside, outside = self._where.absolute(), self.path.absolute()
        folders = [inside, inside.parent]
        # A step has a number; what lies outside belongs to it.
        while folders[-1].name.isdecimal() or outside in folders[-1].parents:
            folders.append(folders[-1].parent)
        return folders

    def _guess(self, fields):
        """The published model of these shapes; of Gemma 1, any."""
        rows = self._shapes[self._layout.embedding][0]
        config = build_config(
            self._where,
            **fields,
            vocab_size=self._vocabulary(rows),
            query_pre_attn_scalar=fields["head_dim"],
        )
        known = registry.architecture_like(config)
        if known is not None:
            return dataclasses.replace(known, vocab_size=config.vocab_size)
        if config.family != "gemma":
            raise CheckpointError(
                f"{self._where}: its shapes are those of no published Gemma, and of "
                f"Gemma 2 and 3 they do not tell all. Put a {CONFIG} beside it with "
                f"the fields of GemmaConfig, as those in presets/ have them."
            )
        return config

    def _vocabulary(self, rows):
        """Rows that stand for a piece, without the padding of Gemma 1 and 2."""
        for vocabulary, padded in _ROWS.items():
            if rows == padded > vocabulary:
                tokenizer = self.tokenizer()
                if tokenizer is None or tokenizer.vocab_size <= vocabulary:
                    return vocabulary
        return rows

    def _check_depth(self, fields):
        # Before the shapes are listed: a hostile depth must not cost memory.
        if self.config.num_layers != fields["num_layers"]:
            raise CheckpointError(
                f"{self._where}: holds {fields['num_layers']} layers, not the "
                f"{self.config.num_layers} of its config."
            )

    def _match(self):
        """Where each weight is; accounts for every array."""
        places = orbax_place.places(self._layout, self.config)
        vocabulary = self.config.vocab_size
        rows = {vocabulary, max(vocabulary, stored_rows(vocabulary))}
        for path, place in places.items():
            found = self._shapes.get(place.name)
            if found is None:
                raise CheckpointError(
                    f"{self._where}: the array {'/'.join(place.name)} is missing."
                )
            expected = place.array_shape
            if path == "token_embedding/embeddings" and found[0] in rows:
                expected = (found[0], *expected[1:])
            check_shape(f"{self._where}: {self._called(place)}", found, expected)
        extra = self._shapes.keys() - {place.name for place in places.values()}
        if extra:
            raise CheckpointError(
                f"{self._where}: holds arrays that are no part of the Gemma which the "
                f"others make: {some('/'.join(name) for name in extra)}."
            )
        return places

    def _called(self, place):
        return self._directory.called(self._names[place.name])

    def tensor(self, path):
        """The weight, read into memory of its own."""
        if not self._arrays:
            raise CheckpointError(f"{self._where}: was closed before {path} was read.")
        array = self._part(self._places[path])
        return self._layout.from_stored(path, array, self.config)

    def _part(self, place):
        if place in self._ahead:
            return self._ahead.pop(place)
        full = self._names[place.name]
        stored = self._arrays[full]
        axis, layer, count = place.stack or (0, 0, 0)
        # Others of its layers are in the same chunks, which hold them all as a rule:
        # to decode these again for each layer would take that many times as long.
        ahead = min(self._layers_ahead(), stored.chunks[axis], count - layer)
        if ahead <= 1:
            return self._directory.read(full, stored, place.index())
        block = self._directory.read(full, stored, place.index(ahead=ahead))
        parts = [block.take(number, axis) for number in range(ahead)]
        for number, part in enumerate(parts[1:], start=1):
            later = dataclasses.replace(place, stack=(axis, layer + number, count))
            self._ahead[later] = part
        return parts[0]

    def _layers_ahead(self):
        width = FLOAT_DTYPES[self.dtype].itemsize
        layer = width * self.config.num_parameters / self.config.num_layers
        return max(1, int(_AHEAD_BYTES / layer))

    def sources(self, path):
        """Directory and array."""
        return f"{self._where.name}: {self._called(self._places[path])}"

    def files(self):
        """All files of the Orbax directory."""
        return self._directory.files()

    def tokenizer(self):
        """The tokenizer beside the weights or around them, or None."""
        if self._tokenizer is None:
            files = [
                folder / name
                for name in ("tokenizer.model", "tokenizer.json")
                for folder in self.homes()
            ]
            self._tokenizer = load_tokenizer(*files)
        return self._tokenizer

    def close(self):
        """Lets go of what was read ahead."""
        self._ahead.clear()
        self._arrays = {}
