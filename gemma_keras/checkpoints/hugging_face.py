"""Hugging Face checkpoints: config.json beside one or more safetensors files.

Linear weights are stored [out, in] and come back transposed, as views.
"""

import math

from gemma_keras.checkpoints.checkpoint import (
    Checkpoint,
    CheckpointError,
    check_shape,
    dominant_dtype,
    load_tokenizer,
    open_shards,
    read_weight_map,
    some,
)
from gemma_keras.checkpoints.hugging_face_config import read_config
from gemma_keras.checkpoints.safetensors_file import SafetensorsFile

INDEX = "model.safetensors.index.json"

_BLOCK_NAMES = {
    "pre_attention_norm/scale": "input_layernorm",
    "attention/query/kernel": "self_attn.q_proj",
    "attention/key/kernel": "self_attn.k_proj",
    "attention/value/kernel": "self_attn.v_proj",
    "attention/query_norm/scale": "self_attn.q_norm",
    "attention/key_norm/scale": "self_attn.k_norm",
    "attention/attention_output/kernel": "self_attn.o_proj",
    "ffw_gating/kernel": "mlp.gate_proj",
    "ffw_gating_2/kernel": "mlp.up_proj",
    "ffw_linear/kernel": "mlp.down_proj",
}
# "post_attention_layernorm" is the norm before the feed-forward in Gemma 1, and the
# norm after the attention in Gemma 2 and 3.
_TWO_NORMS = {"pre_ffw_norm/scale": "post_attention_layernorm"}
_FOUR_NORMS = {
    "post_attention_norm/scale": "post_attention_layernorm",
    "pre_ffw_norm/scale": "pre_feedforward_layernorm",
    "post_ffw_norm/scale": "post_feedforward_layernorm",
}
# Where the decoder lies: alone, without its head, and inside the multimodal model as
# published and as transformers 5 saves it. The first that matches is the one.
PREFIXES = (
    "model.",
    "language_model.model.",
    "model.language_model.",
    "language_model.",
    "",
)
_VISION_PARTS = (
    "vision_tower.",
    "multi_modal_projector.",
    "model.vision_tower.",
    "model.multi_modal_projector.",
)
_HEADS = ("lm_head.weight", "language_model.lm_head.weight")


def recognises(path):
    """Whether the directory `path` holds safetensors."""
    return (path / INDEX).is_file() or any(path.glob("*.safetensors"))


def open_checkpoint(path, config=None, dtype=None):
    """Opens a directory, or one safetensors file with its config.json beside it.

    `dtype` is of no consequence: nothing that this reads is quantised.
    """
    return HuggingFaceCheckpoint(path, config)


def weight_name(path, four_norms):
    """Name of a weight in the checkpoint, without its prefix.

    Args:
        path: A key of `GemmaConfig.weight_shapes()`.
        four_norms: Whether the model is Gemma 2 or 3.
    """
    if path == "token_embedding/embeddings":
        return "embed_tokens.weight"
    if path == "final_normalization/scale":
        return "norm.weight"
    block, role = path.split("/", 1)
    layer = block.removeprefix("decoder_block_")
    norms = _FOUR_NORMS if four_norms else _TWO_NORMS
    name = _BLOCK_NAMES.get(role) or norms[role]
    return f"layers.{layer}.{name}.weight"


def stored_shape(path, shape):
    """The shape that a weight of our `shape` has there: kernels are [out, in]."""
    return tuple(reversed(shape)) if path.endswith("kernel") else shape


class HuggingFaceCheckpoint(Checkpoint):
    """A directory as `save_pretrained` writes it."""

    format = "Hugging Face"

    def __init__(self, path, config=None):
        self.path = path
        self.directory = path if path.is_dir() else path.parent
        self._files = []
        try:
            self.config = config or read_config(self.directory)
            self._owners = self._open_files()
            self._names = self._match()
            self.dtype = dominant_dtype(
                (owner.float_dtype(name), math.prod(owner.shapes[name]))
                for owner, name in self._names.values()
            )
        except BaseException:
            self.close()
            raise

    def _open_files(self):
        """Opens every shard; returns tensor name to the open file that holds it."""
        index = self.directory / INDEX
        if self.path.is_file():
            return self._add(self.path)
        if (self.directory / "model.safetensors").is_file():
            return self._add(self.directory / "model.safetensors")
        if index.is_file():
            return self._open_shards(index)
        found = sorted(self.directory.glob("*.safetensors"))
        if len(found) > 1:
            raise CheckpointError(
                f"{self.directory}: holds {len(found)} safetensors files but no "
                f"{INDEX} that says how they belong together."
            )
        return self._add(found[0])

    def _add(self, path):
        opened = SafetensorsFile(path)
        self._files.append(opened)
        return dict.fromkeys(opened.shapes, opened)

    def _open_shards(self, index):
        raw, names = read_weight_map(index)
        owners = open_shards(index, names, self._add)
        for name, shard in raw["weight_map"].items():
            if name not in owners or owners[name].path.name != shard:
                raise CheckpointError(f"{index}: {name} is not in {shard}.")
        return owners

    def _match(self):
        """Maps every weight path to (file, tensor name), and accounts for the rest."""
        prefix = self._find_prefix()
        # Before the shapes are listed: a hostile depth must not cost memory.
        if self.config.num_layers > len(self._owners):
            raise CheckpointError(
                f"{self.directory}: {len(self._owners)} tensors are too few for the "
                f"{self.config.num_layers} layers that config.json states."
            )
        names = {}
        for path, shape in self.config.weight_shapes().items():
            name = prefix + weight_name(path, self.config.use_post_norms)
            owner = self._owners.get(name)
            if owner is None:
                raise CheckpointError(f"{self._where()}: the tensor {name} is missing.")
            stored = stored_shape(path, shape)
            check_shape(f"{owner.path}: {name}", owner.shapes[name], stored)
            owner.float_dtype(name)
            names[path] = (owner, name)
        self._check_rest({name for _, name in names.values()})
        return names

    def _find_prefix(self):
        for prefix in PREFIXES:
            if f"{prefix}embed_tokens.weight" in self._owners:
                return prefix
        raise CheckpointError(
            f"{self._where()}: holds no Gemma text decoder (no "
            f"model.embed_tokens.weight); it holds {some(self._owners)}."
        )

    def _check_rest(self, used):
        rest = [
            name
            for name in self._owners
            if name not in used
            and not name.startswith(_VISION_PARTS)
            and not name.endswith("rotary_emb.inv_freq")
        ]
        embedding = next(name for name in used if name.endswith("embed_tokens.weight"))
        for name in rest:
            if name not in _HEADS:
                continue
            tied = self._owners[embedding]
            if not self._owners[name].same_bytes(name, tied, embedding):
                raise CheckpointError(
                    f"{self._owners[name].path}: {name} differs from {embedding}; a "
                    "Gemma with an output head of its own is not supported."
                )
        extra = [name for name in rest if name not in _HEADS]
        if extra:
            raise CheckpointError(
                f"{self._where()}: holds tensors that are no part of the Gemma which "
                f"config.json describes: {some(extra)}."
            )

    def _where(self):
        return self._files[0].path if len(self._files) == 1 else self.directory

    def tensor(self, path):
        """A view of the mapped file, transposed for kernels."""
        owner, name = self._names[path]
        array = owner.tensor(name)
        return array.T if path.endswith("kernel") else array

    def sources(self, path):
        """Shard and tensor name."""
        owner, name = self._names[path]
        return f"{owner.path.name}: {name}"

    def files(self):
        """The shards."""
        return [opened.path for opened in self._files]

    def tokenizer(self):
        """The tokenizer from tokenizer.model, else from tokenizer.json, else None."""
        return load_tokenizer(
            self.directory / "tokenizer.model", self.directory / "tokenizer.json"
        )

    def close(self):
        """Closes the shards; arrays keep their own mappings."""
        for opened in self._files:
            opened.close()
