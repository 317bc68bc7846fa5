"""KerasHub preset directories: reading them, and writing ones that KerasHub loads.

A preset is config.json, metadata.json and model.weights.h5 (or model.weights.json and
shards), with the vocabulary in assets/tokenizer. Presets of Gemma 1, 2 and 3 are read,
those of KerasNLP too, and the text part of multimodal Gemma 3.
"""

import dataclasses
import math
import re

from gemma_keras import registry
from gemma_keras.checkpoints import keras_layout
from gemma_keras.checkpoints.checkpoint import (
    Checkpoint,
    CheckpointError,
    build_config,
    check_shape,
    dominant_dtype,
    load_tokenizer,
    open_shards,
    read_json,
    read_weight_map,
    some,
)
from gemma_keras.checkpoints.h5_file import H5File
from gemma_keras.checkpoints.keras_layout import (
    CONFIG,
    METADATA,
    OURS,
    SHARDS,
    VOCABULARY,
    WEIGHTS,
)
from gemma_keras.checkpoints.keras_preset_writer import save

__all__ = ["KerasPresetCheckpoint", "open_checkpoint", "recognises", "save"]

_EMBEDDING = "reversible_embedding/vars/0"
# Parts of a multimodal Gemma 3 that are no part of its decoder.
_VISION_PARTS = re.compile(r"gemma3_(vision_encoder|interleave_embeddings|.*converter)")
_BLOCK = re.compile(r"(gemma3?)_decoder_block(?:_(\d+))?/attention/query_dense/vars/0")


def recognises(path):
    """Whether the directory `path` holds weights as KerasHub names them."""
    return any((path / name).is_file() for name in (WEIGHTS, SHARDS))


def open_checkpoint(path, config=None, dtype=None):
    """Opens a preset directory or the weights file of one.

    `dtype` is of no consequence: nothing that this reads is quantised.
    """
    return KerasPresetCheckpoint(path, config)


class KerasPresetCheckpoint(Checkpoint):
    """A KerasHub preset, or a file that `save_weights` of a KerasHub Gemma wrote.

    Such a file needs no config.json beside it if its shapes are a published model's.
    """

    format = "KerasHub preset"

    def __init__(self, path, config=None):
        self.path = path
        self.directory = path if path.is_dir() else path.parent
        self._files = []
        try:
            owners = self._open_files()
            self._prefix = self._find_prefix(owners)
            self.config = config or self._read_config(owners)
            self._datasets = self._match(owners)
            self.dtype = dominant_dtype(
                (owner.float_dtype(name), math.prod(owner.shapes[name]))
                for owner, name in self._datasets.values()
            )
        except BaseException:
            self.close()
            raise

    def _open_files(self):
        """Opens every shard; returns dataset name to the open file that holds it."""
        if self.path.is_file():
            weights = self.path
        else:
            names = (WEIGHTS, SHARDS)
            weights = next(
                self.path / name for name in names if (self.path / name).is_file()
            )
        if weights.suffix == ".json":
            return open_shards(weights, read_weight_map(weights)[1], self._add)
        return self._add(weights)

    def _add(self, path):
        opened = H5File(path)
        self._files.append(opened)
        return dict.fromkeys(opened.shapes, opened)

    def _find_prefix(self, owners):
        """What comes before `reversible_embedding`, wherever the backbone is nested."""
        found = [name for name in owners if name.endswith(_EMBEDDING)]
        # An optimizer's slots may bear the names of the weights.
        found = [name for name in found if not name.startswith("optimizer/")]
        if len(found) != 1:
            raise CheckpointError(
                f"{self._where()}: holds no KerasHub Gemma (no {_EMBEDDING}); it holds "
                f"{some(owners) or 'nothing'}."
            )
        return found[0].removesuffix(_EMBEDDING)

    def _read_config(self, owners):
        where = self.directory / CONFIG
        if not where.is_file():
            if self.path.is_dir():
                raise CheckpointError(f"{where}: is missing.")
            return self._guess_config(owners)
        raw = read_json(where)
        kind = keras_layout.BACKBONES.get(str(raw.get("class_name")))
        if kind is None:
            raise CheckpointError(
                f"{where}: the class {raw.get('class_name')!r} is not supported; "
                f"supported are {', '.join(keras_layout.BACKBONES)}."
            )
        if not isinstance(raw.get("config"), dict):
            raise CheckpointError(f"{where}: has no config.")
        config = keras_layout.gemma_config(kind, raw["config"], where)
        return self._exact_config(kind, raw["config"]) or config

    def _exact_config(self, kind, raw):
        """The config that we stored, if it agrees with the one that KerasHub reads."""
        where = self.directory / METADATA
        if not where.is_file():
            return None
        stored = read_json(where).get(OURS)
        if not isinstance(stored, dict) or not isinstance(stored.get("config"), dict):
            return None
        config = build_config(where, **stored["config"])
        expected = keras_layout.backbone_config(config)
        wrong = [
            key for key in expected if raw.get(key, expected[key]) != expected[key]
        ]
        if keras_layout.family(config) != kind or wrong:
            raise CheckpointError(
                f"{where}: its {OURS}.config does not agree with {CONFIG} about "
                f"{some(wrong) or 'the class'}. If {CONFIG} is right, take {OURS} out."
            )
        return config

    def _guess_config(self, owners):
        """The published architecture that has the shapes of a bare weights file."""
        shapes = {
            name.removeprefix(self._prefix): owner.shapes[name]
            for name, owner in owners.items()
            if name.startswith(self._prefix)
        }
        blocks = [_BLOCK.fullmatch(name) for name in shapes]
        blocks = [match for match in blocks if match]
        vocab = shapes[_EMBEDDING][:1]
        for known in registry.architectures().values() if vocab and blocks else ():
            config = dataclasses.replace(known, vocab_size=vocab[0])
            if len(blocks) == config.num_layers and all(
                shapes.get(f"{keras_layout.group(path, config)}/vars/0")
                == keras_layout.stored_shape(path, shape, config)
                for path, shape in config.weight_shapes().items()
            ):
                return config
        raise CheckpointError(
            f"{self.path}: has no {CONFIG} beside it, and its shapes are not those of "
            "a published Gemma. Load it with config=GemmaConfig(...), or put the "
            f"{CONFIG} of its preset beside it."
        )

    def _match(self, owners):
        """Maps every weight path to (file, dataset), and accounts for the rest."""
        if self.config.num_layers > len(owners):
            raise CheckpointError(
                f"{self._where()}: {len(owners)} datasets are too few for "
                f"{self.config.num_layers} layers."
            )
        datasets = {}
        for path, shape in self.config.weight_shapes().items():
            name = f"{self._prefix}{keras_layout.group(path, self.config)}/vars/0"
            owner = owners.get(name)
            if owner is None:
                raise CheckpointError(
                    f"{self._where()}: the dataset {name} is missing."
                )
            stored = keras_layout.stored_shape(path, shape, self.config)
            check_shape(f"{owner.path}: {name}", owner.shapes[name], stored)
            owner.check(name)
            datasets[path] = (owner, name)
        used = {name for _, name in datasets.values()}
        extra = [
            name
            for name in owners
            if name not in used
            and name.startswith(self._prefix)
            and not _VISION_PARTS.match(name.removeprefix(self._prefix))
        ]
        if extra:
            raise CheckpointError(
                f"{self._where()}: holds datasets that are no part of the Gemma which "
                f"{CONFIG} describes: {some(extra)}. Is it a quantised model?"
            )
        return datasets

    def _where(self):
        return self._files[0].path if len(self._files) == 1 else self.directory

    def tensor(self, path):
        """A view of the mapped file; attention kernels of several heads are copied."""
        owner, name = self._datasets[path]
        return keras_layout.from_stored(path, owner.tensor(name), self.config)

    def sources(self, path):
        """Shard and dataset name."""
        owner, name = self._datasets[path]
        return f"{owner.path.name}: {name}"

    def files(self):
        """The shards."""
        return [opened.path for opened in self._files]

    def tokenizer(self):
        """The tokenizer from assets/tokenizer/vocabulary.spm, or None."""
        return load_tokenizer(self.directory / VOCABULARY)

    def preprocessor_config(self):
        """`sequence_length` and its like, as preprocessor.json has them."""
        return keras_layout.read_preprocessor(self.directory)

    def close(self):
        """Closes the shards; arrays keep their own mappings."""
        for opened in self._files:
            opened.close()
