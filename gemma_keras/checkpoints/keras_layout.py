"""How KerasHub words a Gemma: files, backbone configs, dataset names, kernel shapes.

KerasHub keeps the heads as an axis of the attention kernels, [N, D, H] and [N, H, D],
and counts the feed-forward of Gemma 1 and 2 twice (`intermediate_dim` = 2 F).
"""

import dataclasses

from gemma_keras import registry
from gemma_keras.checkpoints.checkpoint import (
    FLAG,
    INTEGER,
    NUMBER,
    CheckpointError,
    build_config,
    check_types,
    read_json,
)

CONFIG = "config.json"
METADATA = "metadata.json"
WEIGHTS = "model.weights.h5"
SHARDS = "model.weights.json"
# In place of these, where weights are kept in few bits: ours, not KerasHub's.
QUANTIZED = "model.quantized.safetensors"
TOKENIZER = "tokenizer.json"
VOCABULARY = "assets/tokenizer/vocabulary.spm"
PREPROCESSOR = "preprocessor.json"
TASK = "task.json"
# The key of metadata.json under which we keep the exact config. KerasHub ignores it.
OURS = "gemma_keras"

BACKBONES = {"GemmaBackbone": "gemma", "Gemma3Backbone": "gemma3"}
# What KerasHub fixes and its configs do not say.
_EPSILON = 1e-6
_LOCAL_THETA, _GLOBAL_THETA = 10_000.0, 1_000_000.0
_PATTERNS = {"gemma": "LG", "gemma3": "LLLLLG"}

_REQUIRED = dict.fromkeys(
    (
        "vocabulary_size",
        "num_layers",
        "num_query_heads",
        "num_key_value_heads",
        "hidden_dim",
        "intermediate_dim",
        "head_dim",
    ),
    INTEGER,
)
_FLAGS = (
    "query_head_dim_normalize",
    "use_post_ffw_norm",
    "use_post_attention_norm",
    "use_sliding_window_attention",
    "use_query_key_norm",
    "use_bidirectional_attention",
    "is_embedding_model",
)
_OPTIONAL = (*NUMBER, type(None))
_TYPES = (
    _REQUIRED
    | dict.fromkeys(_FLAGS, FLAG)
    | {
        "sliding_window_size": INTEGER,
        "layer_norm_epsilon": NUMBER,
        "attention_logit_soft_cap": _OPTIONAL,
        "final_logit_soft_cap": _OPTIONAL,
        "local_rope_scaling_factor": NUMBER,
        "global_rope_scaling_factor": NUMBER,
    }
)

_GROUPS = {
    "pre_attention_norm/scale": "pre_attention_norm",
    "attention/query/kernel": "attention/query_dense",
    "attention/key/kernel": "attention/key_dense",
    "attention/value/kernel": "attention/value_dense",
    "attention/query_norm/scale": "attention/query_norm",
    "attention/key_norm/scale": "attention/key_norm",
    "attention/attention_output/kernel": "attention/output_dense",
    "post_attention_norm/scale": "post_attention_norm",
    "pre_ffw_norm/scale": "pre_ffw_norm",
    "ffw_gating/kernel": "gating_ffw",
    "ffw_gating_2/kernel": "gating_ffw_2",
    "ffw_linear/kernel": "ffw_linear",
    "post_ffw_norm/scale": "post_ffw_norm",
}


def family(config):
    """`"gemma"` or `"gemma3"`: the KerasHub backbone that a config needs."""
    return "gemma3" if config.use_qk_norm else "gemma"


def group(path, config):
    """Group of a weight below `layers/`; its dataset is `vars/0` in there."""
    if path == "token_embedding/embeddings":
        return "reversible_embedding"
    if path == "final_normalization/scale":
        return "rms_normalization"
    block, role = path.split("/", 1)
    number = int(block.removeprefix("decoder_block_"))
    suffix = f"_{number}" if number else ""
    return f"{family(config)}_decoder_block{suffix}/{_GROUPS[role]}"


def head_count(path, config):
    """Query heads, key heads, or None for a weight without a heads axis."""
    if path.endswith(("attention/query/kernel", "attention_output/kernel")):
        return config.num_query_heads
    if path.endswith(("attention/key/kernel", "attention/value/kernel")):
        return config.num_kv_heads
    return None


def stored_shape(path, shape, config):
    """The shape that KerasHub gives a weight of our shape."""
    heads = head_count(path, config)
    if heads is None:
        return shape
    if path.endswith("attention_output/kernel"):
        return heads, config.head_dim, config.hidden_dim
    return heads, config.hidden_dim, config.head_dim


def to_stored(path, array, config):
    """Our [D, N H] or [N H, D] kernel with the heads as KerasHub's axis."""
    heads = head_count(path, config)
    if heads is None:
        return array
    if path.endswith("attention_output/kernel"):
        return array.reshape(heads, config.head_dim, config.hidden_dim)
    split = array.reshape(config.hidden_dim, heads, config.head_dim)
    return split.transpose(1, 0, 2)


def from_stored(path, array, config):
    """The inverse of `to_stored`."""
    heads = head_count(path, config)
    if heads is None:
        return array
    if path.endswith("attention_output/kernel"):
        return array.reshape(heads * config.head_dim, config.hidden_dim)
    return array.transpose(1, 0, 2).reshape(config.hidden_dim, heads * config.head_dim)


def backbone_config(config):
    """The arguments of KerasHub's backbone that describe a `GemmaConfig`.

    What KerasHub cannot say is left out; `shortcomings` lists it.
    """
    three = family(config) == "gemma3"
    common = {
        "vocabulary_size": config.vocab_size,
        "num_layers": config.num_layers,
        "num_query_heads": config.num_query_heads,
        "num_key_value_heads": config.num_kv_heads,
        "hidden_dim": config.hidden_dim,
        "intermediate_dim": config.ffn_dim * (1 if three else 2),
        "head_dim": config.head_dim,
        "layer_norm_epsilon": config.norm_epsilon,
        "dropout": 0,
        "query_head_dim_normalize": config.query_pre_attn_scalar == config.head_dim,
        "use_post_ffw_norm": config.use_post_norms,
        "use_post_attention_norm": config.use_post_norms,
        "final_logit_soft_cap": config.final_logit_soft_cap,
        "attention_logit_soft_cap": config.attn_logit_soft_cap,
        "use_sliding_window_attention": "L" in config.layer_kinds,
        "sliding_window_size": config.sliding_window or 4096,
    }
    if not three:
        return common
    return common | {
        "image_size": None,
        "vision_encoder": None,
        "use_query_key_norm": True,
        "local_rope_scaling_factor": 1.0,
        "global_rope_scaling_factor": config.rope_scaling_factor,
        "use_bidirectional_attention": False,
        "is_embedding_model": False,
        "pooling_intermediate_dim": None,
        "embedding_dim": None,
    }


def shortcomings(config):
    """What KerasHub 0.32 would compute otherwise, as (errors, warnings).

    Errors are what its configs cannot express, warnings what they express and its
    code ignores; each is a sentence for people.
    """
    errors, warnings = [], []
    kinds, pattern = config.layer_kinds, _PATTERNS[family(config)]
    tiled = (pattern * config.num_layers)[: config.num_layers]
    if "L" in kinds and kinds != tiled:
        errors.append(f"its sliding layers follow {pattern!r}, these {kinds!r}")
    three = family(config) == "gemma3"
    theta = _GLOBAL_THETA if three else _LOCAL_THETA
    if "G" in kinds and config.rope_theta != theta:
        errors.append(f"its rotary base is {theta:g}, this {config.rope_theta:g}")
    local = config.local_rope_theta or config.rope_theta
    if "L" in kinds and local != _LOCAL_THETA:
        errors.append(
            f"its rotary base of sliding layers is {_LOCAL_THETA:g}, this {local:g}"
        )
    if not three and config.rope_scaling_factor != 1.0:
        errors.append("its GemmaBackbone has no rope scaling")
    scalar = config.query_pre_attn_scalar
    if scalar == config.head_dim:
        pass
    elif scalar == config.hidden_dim / config.num_query_heads:
        warnings.append(
            f"it ignores query_head_dim_normalize=False and scales queries by "
            f"{config.head_dim} ** -0.5, not by {scalar:g} ** -0.5"
        )
    else:
        errors.append(f"it cannot scale queries by {scalar:g} ** -0.5")
    if config.norm_epsilon != _EPSILON:
        warnings.append(
            f"it uses the norm epsilon {_EPSILON:g} inside its blocks, not "
            f"{config.norm_epsilon:g}"
        )
    return errors, warnings


def gemma_config(kind, raw, where):
    """The `GemmaConfig` behind the config of a KerasHub backbone.

    Args:
        kind: `"gemma"` or `"gemma3"`.
        raw: The backbone's arguments, as in config.json.
        where: The file, for error messages.

    Raises:
        CheckpointError: an argument is missing or of a model that is not supported.
    """
    missing = [name for name in _REQUIRED if name not in raw]
    if missing:
        raise CheckpointError(f"{where}: the config lacks {', '.join(missing)}.")
    check_types(where, raw, _TYPES)
    three = kind == "gemma3"
    _refuse_variants(three, raw, where)
    width, heads = raw["hidden_dim"], raw["num_query_heads"]
    ffn = raw["intermediate_dim"]
    scalar = raw["head_dim"]
    if not raw.get("query_head_dim_normalize", True) and heads > 0:
        scalar = width / heads
    sliding = raw.get("use_sliding_window_attention", False)
    fields = {
        "vocab_size": raw["vocabulary_size"],
        "num_layers": raw["num_layers"],
        "hidden_dim": width,
        "ffn_dim": ffn if three else ffn // 2,
        "num_query_heads": heads,
        "num_kv_heads": raw["num_key_value_heads"],
        "head_dim": raw["head_dim"],
        "query_pre_attn_scalar": scalar,
        "layer_pattern": _PATTERNS[kind] if sliding else "G",
        "attn_logit_soft_cap": raw.get("attention_logit_soft_cap"),
        "final_logit_soft_cap": raw.get("final_logit_soft_cap"),
        "use_post_norms": raw.get("use_post_ffw_norm", False),
        "use_qk_norm": three,
        "norm_epsilon": raw.get("layer_norm_epsilon", _EPSILON),
    }
    if sliding:
        default = 1024 if three else 4096
        fields["sliding_window"] = raw.get("sliding_window_size", default)
    if three:
        fields["rope_theta"] = _GLOBAL_THETA
        fields["local_rope_theta"] = _LOCAL_THETA
        fields["rope_scaling_factor"] = raw.get("global_rope_scaling_factor", 1.0)
        fields["max_position"] = 32768
    config = build_config(where, **fields)
    return _recall(config, "global_rope_scaling_factor" not in raw)


def _recall(config, factor_unknown):
    """Adds what the config of a published model cannot say in KerasHub's words."""
    known = registry.architecture_like(config)
    if known is None:
        return config
    fields = {"max_position": known.max_position}
    # Presets from before KerasHub had the argument: Gemma 3 4B and up need it.
    if config.use_qk_norm and factor_unknown:
        fields["rope_scaling_factor"] = known.rope_scaling_factor
    return dataclasses.replace(config, **fields)


def _refuse_variants(three, raw, where):
    reasons = {
        "is_embedding_model": "embedding models",
        "use_bidirectional_attention": "bidirectional attention",
    }
    for key, words in reasons.items():
        if raw.get(key):
            raise CheckpointError(f"{where}: {words} are not supported ({key}).")
    if three and not raw.get("use_query_key_norm", True):
        raise CheckpointError(f"{where}: Gemma 3 without use_query_key_norm.")
    if three and raw.get("local_rope_scaling_factor", 1.0) != 1.0:
        raise CheckpointError(f"{where}: local_rope_scaling_factor is not supported.")
    if raw.get("use_post_ffw_norm", False) != raw.get("use_post_attention_norm", False):
        raise CheckpointError(
            f"{where}: use_post_ffw_norm and use_post_attention_norm must be equal."
        )


def read_preprocessor(directory):
    """The settings in preprocessor.json, or an empty dict."""
    where = directory / PREPROCESSOR
    if not where.is_file():
        return {}
    config = read_json(where).get("config")
    if not isinstance(config, dict):
        raise CheckpointError(f"{where}: has no config.")
    wanted = ("sequence_length", "add_start_token", "add_end_token")
    return {key: config[key] for key in wanted if key in config}
