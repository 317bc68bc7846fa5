"""config.json of Hugging Face checkpoints, as transformers 4 and 5 write it.

Model types gemma, gemma2 and gemma3_text, and the text part of gemma3. Version 4 says
`rope_theta`, `rope_scaling` and `sliding_window_pattern`, version 5 `rope_parameters`
and `layer_types`.
"""

import warnings

from gemma_keras.checkpoints.checkpoint import (
    INTEGER,
    NUMBER,
    CheckpointError,
    build_config,
    check_types,
    config_differences,
    read_json,
    shortest_pattern,
    some,
)

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
# Key of config.json to the field of `GemmaConfig` that says the same in every family.
_FIELDS = {
    "vocab_size": "vocab_size",
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_dim",
    "intermediate_size": "ffn_dim",
    "num_attention_heads": "num_query_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "norm_epsilon",
    "max_position_embeddings": "max_position",
}
# And in Gemma 2 and 3 only.
_LATER_FIELDS = {
    "sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_soft_cap",
    "final_logit_softcapping": "final_logit_soft_cap",
}
_MODEL_TYPES = {"gemma": "gemma", "gemma2": "gemma2", "gemma3": "gemma3_text"}
_CLASSES = {
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
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


def read_config(directory):
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
    fields = {ours: values[key] for key, ours in _FIELDS.items()}
    fields["query_pre_attn_scalar"] = values["head_dim"] if scalar is None else scalar
    fields["layer_pattern"] = _layer_pattern(values, where)
    if model_type != "gemma":
        fields["use_post_norms"] = True
        fields |= {ours: values[key] for key, ours in _LATER_FIELDS.items()}
    if model_type == "gemma3_text":
        fields["use_qk_norm"] = True
    fields |= _rope_fields(model_type, values, where)
    return build_config(where, **fields)


def config_to_json(config, dtype, tokenizer=None):
    """Translates a `GemmaConfig` to config.json, with the keys of transformers 4.

    Version 5 reads these too; vLLM, NeMo, llama.cpp's converter and version 4 do not
    read those of version 5.

    Args:
        config: The `GemmaConfig`.
        dtype: The dtype of the weights, as `torch_dtype`.
        tokenizer: A `GemmaTokenizer` for the special ids; Gemma's own if None.

    Returns:
        The dict.

    Raises:
        CheckpointError: no model type computes this; the message names the fields.
    """
    model_type = _MODEL_TYPES[config.family]
    raw = {
        "architectures": [_CLASSES[config.family]],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": tokenizer.bos_token_id if tokenizer else 2,
        "eos_token_id": tokenizer.eos_token_id if tokenizer else 1,
        "pad_token_id": tokenizer.pad_token_id if tokenizer else 0,
        # Tools and versions differ in which of the two they read.
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "initializer_range": 0.02,
        "model_type": model_type,
        "rope_scaling": None,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": True,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    raw |= {key: getattr(config, ours) for key, ours in _FIELDS.items()}
    if config.rope_scaling_factor != 1.0:
        factor = config.rope_scaling_factor
        raw["rope_scaling"] = {"factor": factor, "rope_type": "linear"}
    if config.family != "gemma":
        raw |= _later_json(config)
    found = config_from_json(raw, "config.json")
    if wrong := config_differences(config, found):
        raise CheckpointError(
            f"A Hugging Face model of type {model_type} cannot have {some(wrong)}."
        )
    return raw


def _later_json(config):
    """What only Gemma 2 and 3 have."""
    raw = {key: getattr(config, ours) for key, ours in _LATER_FIELDS.items()}
    scalar = config.query_pre_attn_scalar
    raw["query_pre_attn_scalar"] = int(scalar) if scalar == int(scalar) else scalar
    words = {letter: word for word, letter in _LAYER_LETTERS.items()}
    raw["layer_types"] = [words[kind] for kind in config.layer_kinds]
    if config.family == "gemma3":
        raw["rope_local_base_freq"] = config.local_rope_theta or config.rope_theta
        # What transformers before 4.53 and llama.cpp's converter read instead.
        if set(config.layer_pattern[:-1]) <= {"L"} and config.layer_pattern[-1] == "G":
            raw["sliding_window_pattern"] = len(config.layer_pattern)
    return raw


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
