"""model_config.yaml of classic NeMo archives, which hold Gemma 1 and Gemma 2.

`read_config` and `config_fields` are each other's inverse. NeMo's own keys are those of
MegatronGPTModel; what they do not say, its Gemma fixes.
"""

import math
import re
import reprlib

import yaml

from gemma_keras.checkpoints.checkpoint import (
    CheckpointError,
    build_config,
    config_differences,
    some,
)

TARGET = (
    "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel"
)
GEMMA2 = "megatron_gemma2"
CUSTOM = "mcore_customization_config"
# Key of the yaml to the field of `GemmaConfig` that says the same.
_FIELDS = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_dim",
    "ffn_hidden_size": "ffn_dim",
    "num_attention_heads": "num_query_heads",
    "num_query_groups": "num_kv_heads",
    "kv_channels": "head_dim",
    "layernorm_epsilon": "norm_epsilon",
    "encoder_seq_length": "max_position",
}
_CUSTOM_FIELDS = {
    "query_pre_attn_scalar": "query_pre_attn_scalar",
    "attn_logit_softcapping": "attn_logit_soft_cap",
    "final_logit_softcapping": "final_logit_soft_cap",
}
# What makes a GPT of Megatron a Gemma.
_FIXED = {
    "mcore_gpt": True,
    "apply_embedding_scaling": True,
    "normalization": "rmsnorm",
    "bias": False,
    "activation": "geglu",
    "openai_gelu": True,
    "position_embedding_type": "rope",
    "rotary_percentage": 1.0,
    "share_embeddings_and_output_weights": True,
}
_ALSO = {"activation": ("geglu", "fast-geglu")}
# What NeMo does where a key is absent, and a Gemma is not.
_ABSENT = {"bias": True, "apply_embedding_scaling": False, "openai_gelu": False}
# PyYAML takes the square of their number in time.
_MAX_BRACKETS = 500
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


class _PlainLoader(yaml.SafeLoader):
    """YAML in which nothing is said twice by reference.

    NeMo writes none, and a few lines of references make as many values as they like.
    """

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has aliases")
        return super().compose_node(parent, index)


def parse(data, where):
    """The dict of a model_config.yaml: what NeMo calls the model's subtree.

    Args:
        data: The bytes.
        where: The file, for messages.
    """
    if sum(map(data.count, (b"[", b"{"))) > _MAX_BRACKETS:
        raise CheckpointError(f"{where}: has too many brackets for a config.")
    try:
        found = yaml.load(data, _PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: is not valid YAML ({error}).") from error
    if isinstance(found, dict) and isinstance(found.get("model"), dict):
        found = found["model"]
    if not isinstance(found, dict):
        raise CheckpointError(f"{where}: must hold a mapping.")
    return found


def read_config(raw, vocab_size, where):
    """The `GemmaConfig` that a model_config.yaml describes.

    Args:
        raw: The dict.
        vocab_size: Rows of the embedding that stand for a piece.
        where: The file, for messages.

    Raises:
        CheckpointError: it describes another model.
    """
    _check_fixed(raw, where)
    heads = _number(raw, "num_attention_heads", where)
    width = _number(raw, "hidden_size", where)
    defaults = {
        "num_query_groups": heads,
        "kv_channels": width // heads if heads else 0,
        "encoder_seq_length": raw.get("max_position_embeddings"),
    }
    found = {
        ours: _number(raw, key, where, defaults.get(key))
        for key, ours in _FIELDS.items()
    }
    found["vocab_size"] = vocab_size
    found["query_pre_attn_scalar"] = found["head_dim"]
    found["rope_theta"] = _number(raw, "rotary_base", where, 10_000)
    factor = _number(raw, "seq_len_interpolation_factor", where, 1)
    found["rope_scaling_factor"] = factor
    if is_gemma2(raw):
        found |= _gemma2_fields(raw, where)
    return build_config(where, **found)


def is_gemma2(raw):
    """Whether a model_config.yaml is of Gemma 2."""
    return raw.get("name") == GEMMA2 or isinstance(raw.get(CUSTOM), dict)


def _gemma2_fields(raw, where):
    custom, window = raw.get(CUSTOM), raw.get("window_size")
    if not isinstance(custom, dict):
        raise CheckpointError(f"{where}: has no {CUSTOM}, which Gemma 2 needs.")
    if not isinstance(window, list | tuple) or len(window) != 2:
        raise CheckpointError(f"{where}: window_size must be two numbers.")
    found = {"use_post_norms": True, "layer_pattern": "LG"}
    found["sliding_window"] = _number({"window_size": window[0]}, "window_size", where)
    for key, ours in _CUSTOM_FIELDS.items():
        found[ours] = _number(custom, key, where)
    return found


def _check_fixed(raw, where):
    for key, expected in _FIXED.items():
        value = raw.get(key)
        if value is None:
            value = _ABSENT.get(key, expected)
        if value != expected and value not in _ALSO.get(key, ()):
            raise CheckpointError(
                f"{where}: {key} is {reprlib.repr(value)}; a Gemma of NeMo has "
                f"{expected!r}."
            )


def _number(raw, key, where, default=None):
    """A number of the yaml, where 1e-6 is text."""
    value = raw.get(key)
    value = default if value is None else value
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        value = float(value)
    if value is None:
        raise CheckpointError(f"{where}: the key {key} is missing.")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CheckpointError(
            f"{where}: {key} must be a number, not {reprlib.repr(value)}."
        )
    return value


def config_fields(config, rows_of_pieces):
    """The keys of a model_config.yaml that describe a config.

    Args:
        config: The `GemmaConfig`.
        rows_of_pieces: Pieces of the tokenizer; None without one.

    Raises:
        CheckpointError: classic NeMo has no such model; the message names the fields.
    """
    if config.family == "gemma3":
        raise CheckpointError(
            "Classic .nemo archives hold Gemma 1 and 2; NeMo has Gemma 3 since version "
            "2. Name a directory, for what NeMo 2 and Megatron-Bridge import."
        )
    found = {"name": GEMMA2 if config.use_post_norms else "megatron_gemma"}
    found |= {key: getattr(config, ours) for key, ours in _FIELDS.items()}
    found["max_position_embeddings"] = config.max_position
    found |= _FIXED
    found["rotary_base"] = config.rope_theta
    factor = config.rope_scaling_factor
    found["seq_len_interpolation_factor"] = None if factor == 1.0 else factor
    found["make_vocab_size_divisible_by"] = _divisor(config.vocab_size, rows_of_pieces)
    # Classic NeMo computes Gemma 1 with 1 + w as its weights, Gemma 2 with w.
    found["layernorm_zero_centered_gamma"] = config.use_post_norms
    if config.use_post_norms:
        found["window_size"] = [config.sliding_window, 0]
        found[CUSTOM] = {
            key: getattr(config, ours) for key, ours in _CUSTOM_FIELDS.items()
        }
    _check_inverse(config, found)
    return found


def _check_inverse(config, found):
    try:
        read = read_config(found, config.vocab_size, "model_config.yaml")
    except CheckpointError as error:
        raise CheckpointError(
            f"A .nemo archive cannot hold this {config.family}: {error}"
        ) from error
    if wrong := config_differences(config, read):
        raise CheckpointError(
            f"A .nemo archive of {config.family} cannot have {some(wrong)}."
        )


def _divisor(rows, pieces):
    """What NeMo is to round the number of pieces up to a multiple of, to get `rows`."""
    if pieces is None or pieces == rows:
        return math.gcd(rows, 128)
    return rows
