"""Hugging Face checkpoints: config.json beside one or more safetensors files.

Reads model types gemma, gemma2 and gemma3_text, and the text part of multimodal
gemma3, with the config keys of transformers 4 (`rope_theta`, `rope_scaling`,
`sliding_window_pattern`) and of 5 (`rope_parameters`, `layer_types`). Linear weights
are stored [out, in] and come back transposed, as views.
"""

import math
import warnings

from gemma_keras.checkpoints.checkpoint import (
    INTEGER,
    NUMBER,
    Checkpoint,
    CheckpointError,
    build_config,
    check_shape,
    check_types,
    dominant_dtype,
    file_inside,
    load_tokenizer,
    read_json,
    shortest_pattern,
    some,
)
from gemma_keras.checkpoints.safetensors_file import SafetensorsFile

INDEX = "model.safetensors.index.json"

# What the class of each model type assumes where config.json is silent; multimodal
# Gemma 3 checkpoints state little more than their width and depth.
_COMMON = {
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "rope_local_base_freq": None,
    "query_pre_attn_scalar": None,
    "sliding_window": None,
    "sliding_window_pattern": 1,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}
_DEFAULTS = {
    "gemma": _COMMON
    | {
        "vocab_size": 256000,
        "hidden_size": 3072,
        "intermediate_size": 24576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_position_embeddings": 8192,
    },
    "gemma2": _COMMON
    | {
        "vocab_size": 256000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 8192,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 2,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3_text": _COMMON
    | {
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
    },
}
_OPTIONAL = (*NUMBER, type(None))
_TYPES = dict.fromkeys(
    (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "sliding_window_pattern",
        "_sliding_window_pattern",
    ),
    INTEGER,
) | {
    "sliding_window": (*INTEGER, type(None)),
    "rms_norm_eps": NUMBER,
    "rope_theta": NUMBER,
    "rope_local_base_freq": _OPTIONAL,
    "query_pre_attn_scalar": _OPTIONAL,
    "attn_logit_softcapping": _OPTIONAL,
    "final_logit_softcapping": _OPTIONAL,
}
_TANH_GELU = {"gelu_pytorch_tanh", "gelu_new"}
_LAYER_LETTERS = {"sliding_attention": "L", "full_attention": "G"}

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
_PREFIXES = (
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


class HuggingFaceCheckpoint(Checkpoint):
    """A directory as `save_pretrained` writes it."""

    format = "Hugging Face"

    def __init__(self, path, config=None):
        self.path = path
        self.directory = path if path.is_dir() else path.parent
        self._files = []
        try:
            self.config = config or _read_config(self.directory)
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
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index}: has no weight_map.")
        if not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(f"{index}: its weight_map must name files.")
        owners = {}
        for shard in sorted(set(weight_map.values())):
            added = self._add(file_inside(self.directory, shard, index))
            twice = owners.keys() & added.keys()
            if twice:
                raise CheckpointError(
                    f"{added[min(twice)].path}: {min(twice)} is also in "
                    f"{owners[min(twice)].path.name}."
                )
            owners |= added
        for name, shard in weight_map.items():
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
            stored = tuple(reversed(shape)) if path.endswith("kernel") else shape
            check_shape(f"{owner.path}: {name}", owner.shapes[name], stored)
            owner.float_dtype(name)
            names[path] = (owner, name)
        self._check_rest({name for _, name in names.values()})
        return names

    def _find_prefix(self):
        for prefix in _PREFIXES:
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

    def tokenizer(self):
        """The tokenizer from tokenizer.model, else from tokenizer.json, else None."""
        return load_tokenizer(
            self.directory / "tokenizer.model", self.directory / "tokenizer.json"
        )

    def close(self):
        """Closes the shards; arrays keep their own mappings."""
        for opened in self._files:
            opened.close()


def _read_config(directory):
    """The `GemmaConfig` that config.json describes, or the reason why there is none."""
    where = directory / "config.json"
    if not where.is_file():
        if (directory / "adapter_config.json").is_file():
            raise CheckpointError(
                f"{directory}: is a PEFT adapter, not a model; load the base model "
                "and then the adapter."
            )
        raise CheckpointError(f"{where}: is missing.")
    raw = read_json(where)
    if raw.get("quantization_config"):
        raise CheckpointError(
            f"{where}: the checkpoint is quantised (quantization_config); load the "
            "unquantised one or a GGUF."
        )
    if raw.get("model_type") == "gemma3":
        raw = raw.get("text_config")
        if not isinstance(raw, dict):
            raise CheckpointError(f"{where}: model type gemma3 without a text_config.")
        raw = {"model_type": "gemma3_text"} | raw
    return config_from_json(raw, where)


def config_from_json(raw, where):
    """Translates the dict of a Hugging Face config.json.

    Args:
        raw: The parsed JSON of model type gemma, gemma2 or gemma3_text.
        where: The file, for error messages.

    Returns:
        A `GemmaConfig`.

    Raises:
        CheckpointError: the config is not of a Gemma that this package runs.
    """
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in _DEFAULTS:
        raise CheckpointError(
            f"{where}: model type {model_type!r} is not supported; supported are "
            f"{', '.join(_DEFAULTS)} and the text part of gemma3."
        )
    # An explicit null means "absent" for what may be absent, else the default.
    nullable = {"sliding_window", "attn_logit_softcapping", "final_logit_softcapping"}
    given = {k: v for k, v in raw.items() if v is not None or k in nullable}
    values = _DEFAULTS[model_type] | given
    check_types(where, values, _TYPES)
    _refuse_variants(model_type, values, where)
    scalar = values["query_pre_attn_scalar"]
    if _is_early_9b(model_type, values):
        warnings.warn(
            f"{where}: query_pre_attn_scalar 224 is an error of the first Gemma 2 9B "
            "release; 256 is used.",
            stacklevel=2,
        )
        scalar = 256
    fields = {
        "vocab_size": values["vocab_size"],
        "num_layers": values["num_hidden_layers"],
        "hidden_dim": values["hidden_size"],
        "ffn_dim": values["intermediate_size"],
        "num_query_heads": values["num_attention_heads"],
        "num_kv_heads": values["num_key_value_heads"],
        "head_dim": values["head_dim"],
        "query_pre_attn_scalar": values["head_dim"] if scalar is None else scalar,
        "norm_epsilon": values["rms_norm_eps"],
        "max_position": values["max_position_embeddings"],
        "layer_pattern": _layer_pattern(values, where),
    }
    if model_type != "gemma":
        fields |= {
            "use_post_norms": True,
            "sliding_window": values["sliding_window"],
            "attn_logit_soft_cap": values["attn_logit_softcapping"],
            "final_logit_soft_cap": values["final_logit_softcapping"],
        }
    if model_type == "gemma3_text":
        fields["use_qk_norm"] = True
    fields |= _rope_fields(model_type, values, where)
    return build_config(where, **fields)


def _refuse_variants(model_type, values, where):
    if values.get("attention_bias"):
        raise CheckpointError(f"{where}: attention_bias is not supported.")
    if values.get("use_bidirectional_attention"):
        raise CheckpointError(
            f"{where}: use_bidirectional_attention makes an embedding model, which is "
            "not supported."
        )
    # The first Gemma 1 configs say "gelu" and mean the tanh approximation, as the
    # models were trained; transformers 4.48 to 5.0 took the word literally.
    keys = (
        ("hidden_act", "hidden_activation")
        if model_type == "gemma"
        else ("hidden_activation",)
    )
    allowed = _TANH_GELU | ({"gelu"} if model_type == "gemma" else set())
    for key in keys:
        activation = values.get(key, "gelu_pytorch_tanh")
        if not isinstance(activation, str) or activation not in allowed:
            raise CheckpointError(
                f"{where}: {key} {activation!r} is not supported; Gemma uses "
                "gelu_pytorch_tanh."
            )


def _is_early_9b(model_type, values):
    return (
        model_type == "gemma2"
        and values["query_pre_attn_scalar"] == 224
        and (values["hidden_size"], values["num_hidden_layers"]) == (3584, 42)
        and (values["num_attention_heads"], values["head_dim"]) == (16, 256)
    )


def _layer_pattern(values, where):
    types = values.get("layer_types")
    layers = values["num_hidden_layers"]
    if types is None:
        if values["model_type"] == "gemma":
            return "G"
        every = values.get("_sliding_window_pattern", values["sliding_window_pattern"])
        if not 1 <= every <= 1024:
            raise CheckpointError(
                f"{where}: sliding_window_pattern must be from 1 to 1024, not {every}."
            )
        return "L" * (every - 1) + "G"
    letters = [
        _LAYER_LETTERS.get(kind) if isinstance(kind, str) else None
        for kind in (types if isinstance(types, list) else [None])
    ]
    if None in letters or len(letters) != layers:
        raise CheckpointError(
            f"{where}: layer_types must name sliding_attention or full_attention for "
            f"each of the {layers} layers."
        )
    return shortest_pattern("".join(letters))


def _rope_fields(model_type, values, where):
    """Rotary bases and scaling from the keys of transformers 4 or 5."""
    if model_type != "gemma3_text":
        rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
        theta, factor = _rope(rope, values["rope_theta"], where)
        if model_type == "gemma2" and factor != 1.0:
            raise CheckpointError(f"{where}: Gemma 2 with rope scaling is unsupported.")
        return {"rope_theta": theta, "rope_scaling_factor": factor}
    both = values.get("rope_parameters") or {}
    if not isinstance(both, dict):
        raise CheckpointError(f"{where}: rope_parameters must be an object.")
    overall = both.get("full_attention") or values.get("rope_scaling") or {}
    theta, factor = _rope(overall, values["rope_theta"], where)
    local = both.get("sliding_attention") or {}
    local_theta, local_factor = _rope(local, values["rope_local_base_freq"], where)
    if local_factor != 1.0:
        raise CheckpointError(
            f"{where}: rope scaling of sliding_attention layers is not supported."
        )
    return {
        "rope_theta": theta,
        "rope_scaling_factor": factor,
        "local_rope_theta": local_theta,
    }


def _rope(rope, theta, where):
    """(theta, factor) of one rope dict, in which theta may be missing."""
    if not isinstance(rope, dict):
        raise CheckpointError(f"{where}: rope parameters must be an object.")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear"):
        raise CheckpointError(
            f"{where}: rope type {kind!r} is not supported; Gemma uses default and "
            "linear."
        )
    factor = rope.get("factor") if kind == "linear" else 1.0
    return rope.get("rope_theta", theta), factor
