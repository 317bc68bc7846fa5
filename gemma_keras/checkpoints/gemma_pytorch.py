"""Checkpoints of Google's gemma_pytorch: Gemma 1, 2 and 3, in floats or in int8.

A `.ckpt` file, or a directory with pytorch_model.bin.index.json and its files. Linear
weights are [out, in], those of queries, keys and values one after the other in one
tensor. In int8 each row has a factor, `weight_scaler`, by which it is multiplied. Such
files come without a config.
"""

import dataclasses
import math

import numpy as np

from gemma_keras import registry
from gemma_keras.checkpoints.checkpoint import (
    Checkpoint,
    CheckpointError,
    build_config,
    check_shape,
    dominant_dtype,
    load_tokenizer,
    only_file,
    open_shards,
    parse_json,
    read_json,
    read_weight_map,
    some,
)
from gemma_keras.checkpoints.hugging_face import stored_shape, weight_name
from gemma_keras.checkpoints.hugging_face_config import read_config
from gemma_keras.checkpoints.mapped_file import FLOAT_DTYPES, decoded_dtype
from gemma_keras.checkpoints.torch_file import TorchFile

INDEX = "pytorch_model.bin.index.json"
# Where we keep the config, in a file and in the index; gemma_pytorch ignores both.
OURS, OUR_TOKENIZER = "gemma_keras", "tokenizer.model"
# The second in the class with a vision tower.
EMBEDDINGS = ("embedder.weight", "text_token_embedder.weight")
_VISION_PARTS = ("siglip_vision_model.", "mm_soft_embedding_norm.", "mm_input_project")
_TABLES = ("freqs_cis", "local_freqs_cis", "global_freqs_cis")
_RENAMED = {"q_norm": "query_norm", "k_norm": "key_norm"}
# Numbers that are multiplied at once: few enough to stay in the processor's cache.
_CHUNK = 2**17


@dataclasses.dataclass(frozen=True)
class Part:
    """Where a weight lies: rows `first` to `last` of the tensor `name`."""

    name: str
    first: int
    last: int


def parts(config, embedding=EMBEDDINGS[0]):
    """Path of `weight_shapes()` to `Part`, in the order of the forward pass.

    Args:
        config: The `GemmaConfig`.
        embedding: Name of the embedding, one of `EMBEDDINGS`.
    """
    found, fused = {}, {}
    for path, shape in config.weight_shapes().items():
        name = f"model.{weight_name(path, config.use_post_norms)}"
        rows = stored_shape(path, shape)[0]
        module, _, leaf = name.removesuffix(".weight").rpartition(".")
        if path == "token_embedding/embeddings":
            name = embedding
        elif leaf in ("q_proj", "k_proj", "v_proj"):
            name = f"{module}.qkv_proj.weight"
        elif leaf in _RENAMED:
            name = f"{module}.{_RENAMED[leaf]}.weight"
        first = fused.get(name, 0)
        fused[name] = first + rows
        found[path] = Part(name, first, first + rows)
    return found


def stored_shapes(config, embedding=EMBEDDINGS[0]):
    """Tensor name to its shape, in the order of the forward pass."""
    shapes = {}
    found = parts(config, embedding)
    for path, shape in config.weight_shapes().items():
        # A later part of a tensor reaches further.
        stored = stored_shape(path, shape)
        shapes[found[path].name] = (found[path].last, *stored[1:])
    return shapes


def scaler_name(name):
    """Name of the factors that belong to the int8 tensor `name`."""
    return f"{name.removesuffix('weight')}weight_scaler"


def published_config(shapes, embedding=EMBEDDINGS[0]):
    """The published Gemma that has tensors of these shapes, or None.

    Args:
        shapes: Tensor name to its shape.
        embedding: Name of the embedding, whose rows may be any number.
    """
    layers = {name.split(".")[2] for name in shapes if ".layers." in name}
    rows = shapes[embedding][:1]
    for known in registry.architectures().values() if rows else ():
        config = dataclasses.replace(known, vocab_size=rows[0])
        expected = stored_shapes(config, embedding)
        if len(layers) == config.num_layers and expected.items() <= shapes.items():
            return config
    return None


def recognises(path):
    """Whether the directory `path` holds such files."""
    return (path / INDEX).is_file() or any(path.glob("*.ckpt"))


def open_checkpoint(path, config=None, dtype=None):
    """Opens a file, the only .ckpt file of a directory, or what its index names."""
    return GemmaPytorchCheckpoint(path, config, dtype)


class GemmaPytorchCheckpoint(Checkpoint):
    """A `.ckpt` file, or a directory of files with an index.

    Tensors stored as floats come back as they are stored, those in int8 multiplied by
    their factors, in `dtype`.
    """

    format = "gemma_pytorch"

    def __init__(self, path, config=None, dtype=None):
        self.path = path
        self.directory = path if path.is_dir() else path.parent
        self._decoded = decoded_dtype(dtype)
        self._files, self._facts, self._proto = [], None, None
        self._told = None
        try:
            self._owners = self._open_files()
            self._embedding = self._find_embedding()
            self.config = config or self._find_config()
            self._parts = self._match()
            self.dtype = dominant_dtype(
                (self._float_dtype(part.name), math.prod(self._shapes[path]))
                for path, part in self._parts.items()
            )
        except BaseException:
            self.close()
            raise

    # Files

    def _open_files(self):
        """Opens every file; returns tensor name to the open file that holds it."""
        if self.path.is_file():
            return self._add(self.path)
        index = self.path / INDEX
        if index.is_file():
            return self._open_shards(index)
        return self._add(only_file(self.path, ".ckpt"))

    def _add(self, path):
        opened = TorchFile(path)
        self._files.append(opened)
        if OURS in opened.extras:
            text = opened.extras[OURS]
            self._told = text.encode() if isinstance(text, str) else b""
            self._facts = parse_json(self._told, f"{path} ({OURS})")
        proto = opened.extras.get(OUR_TOKENIZER)
        if isinstance(proto, np.ndarray) and proto.dtype == np.uint8:
            self._proto = proto
        return dict.fromkeys(opened.shapes, opened)

    def _open_shards(self, index):
        raw, names = read_weight_map(index)
        metadata = raw.get("metadata")
        facts = metadata.get(OURS) if isinstance(metadata, dict) else None
        self._facts = facts if isinstance(facts, dict) else None
        return open_shards(index, names, self._add)

    def _where(self):
        return self._files[0].name if len(self._files) == 1 else self.directory

    # The config

    def _find_embedding(self):
        for name in EMBEDDINGS:
            if name in self._owners:
                return name
        advice = f"it holds {some(self._owners) or 'no tensors'}."
        if any(name.endswith("q_proj.weight") for name in self._owners):
            advice = (
                "its names are those of Hugging Face. Write it again as safetensors, "
                "with transformers: model.save_pretrained(directory)."
            )
        if any(name.endswith("word_embeddings.weight") for name in self._owners):
            advice = (
                "its names are those of NVIDIA NeMo. Name the .nemo file that it is "
                "from, or a directory in which model_config.yaml lies beside it."
            )
        raise CheckpointError(
            f"{self._where()}: is no checkpoint of gemma_pytorch (no {EMBEDDINGS[0]}); "
            f"{advice}"
        )

    def _find_config(self):
        stored = (self._facts or {}).get("config")
        if isinstance(stored, dict):
            return build_config(f"{self._where()} ({OURS})", **stored)
        where = self.directory / "config.json"
        # Google's own archives have a config.json that says nothing of the model.
        if where.is_file() and "model_type" in read_json(where):
            return read_config(self.directory)
        shapes = {name: owner.shapes[name] for name, owner in self._owners.items()}
        config = published_config(shapes, self._embedding)
        if config is not None:
            return config
        raise CheckpointError(
            f"{self._where()}: has no config, and its shapes are not those of a "
            "published Gemma. Put the config.json of the same model beside it, as "
            "Hugging Face writes it; or in Python, open it with "
            "open_checkpoint(path, config=GemmaConfig(...))."
        )

    # Tensors

    def _match(self):
        """Path to `Part` of every weight; accounts for the rest."""
        if self.config.num_layers > len(self._owners):
            raise CheckpointError(
                f"{self._where()}: {len(self._owners)} tensors are too few for "
                f"{self.config.num_layers} layers."
            )
        self._shapes = self.config.weight_shapes()
        expected = stored_shapes(self.config, self._embedding)
        for name, shape in expected.items():
            owner = self._owner(name)
            check_shape(f"{owner.name}: {name}", owner.shapes[name], shape)
            self._check_dtype(name, shape)
        used = expected.keys() | {scaler_name(name) for name in expected}
        extra = [
            name
            for name in self._owners
            if name not in used
            and name not in _TABLES
            and not name.startswith(_VISION_PARTS)
        ]
        if extra:
            raise CheckpointError(
                f"{self._where()}: holds tensors that are no part of the Gemma which "
                f"its config describes: {some(extra)}."
            )
        return parts(self.config, self._embedding)

    def _owner(self, name):
        owner = self._owners.get(name)
        if owner is None:
            reason = self._files[0].missing(name)
            raise CheckpointError(f"{self._where()}: {reason}")
        return owner

    def _check_dtype(self, name, shape):
        owner, scaler = self._owners[name], scaler_name(name)
        found = owner.dtype(name)
        if found in FLOAT_DTYPES and scaler not in self._owners:
            return
        if found != "int8" or len(shape) != 2:
            raise CheckpointError(
                f"{owner.name}: {name} is {found}; weights must be one of "
                f"{', '.join(FLOAT_DTYPES)}, or int8 with a weight_scaler."
            )
        factors = self._owner(scaler)
        check_shape(f"{factors.name}: {scaler}", factors.shapes[scaler], shape[:1])
        if factors.dtype(scaler) not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{factors.name}: {scaler} is {factors.dtype(scaler)}; factors must "
                f"be one of {', '.join(FLOAT_DTYPES)}."
            )

    def _float_dtype(self, name):
        found = self._owners[name].dtype(name)
        return self._decoded if found == "int8" else found

    def tensor(self, path):
        """A view of the mapped file, transposed for kernels; or the decoded tensor."""
        part = self._parts[path]
        rows = part.first, part.last
        array = self._owners[part.name].tensor(part.name, rows)
        if array.dtype == np.int8:
            scaler = scaler_name(part.name)
            factors = self._owners[scaler].tensor(scaler, rows)
            array = _decode(array, factors, FLOAT_DTYPES[self._decoded])
        return array.T if path.endswith("kernel") else array

    def sources(self, path):
        """File, tensor name, and the rows of it."""
        part = self._parts[path]
        owner = self._owners[part.name]
        text = f"{owner.path.name}: {part.name}"
        if part.last - part.first == owner.shapes[part.name][0]:
            return text
        return f"{text} [{part.first}:{part.last}]"

    def files(self):
        """The files."""
        return [opened.path for opened in self._files]

    def tokenizer(self):
        """The tokenizer of tokenizer.model beside the file, or inside; else None."""
        from gemma_keras.tokenizer import GemmaTokenizer

        beside = self.directory / "tokenizer.model"
        if self._proto is None or beside.is_file():
            return load_tokenizer(beside)
        try:
            return GemmaTokenizer(self._proto.tobytes())
        except ValueError as error:
            raise CheckpointError(
                f"{self._where()} ({OUR_TOKENIZER}): {error}"
            ) from error

    def told(self):
        """What an export told of itself, in the file."""
        return self._told

    def close(self):
        """Closes the files; arrays keep their own mappings."""
        for opened in self._files:
            opened.close()


def _decode(array, factors, dtype):
    """Rows of int8 times their factors, computed in float32 as a few rows at a time."""
    result = np.empty(array.shape, dtype)
    factors = factors.astype(np.float32)[:, None]
    step = max(1, _CHUNK // array.shape[1])
    # Hostile factors may overflow; whether weights are finite is asked later.
    with np.errstate(all="ignore"):
        for first in range(0, len(array), step):
            rows = slice(first, first + step)
            result[rows] = array[rows].astype(np.float32) * factors[rows]
    return result
