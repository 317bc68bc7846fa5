"""What the keys of a GGUF file say of a Gemma, and llama.cpp where they are silent.

`read_config` and `config_fields` are each other's inverse.
"""

import numpy as np

from gemma_keras.checkpoints.checkpoint import (
    NUMBER,
    CheckpointError,
    build_config,
    config_differences,
    shortest_pattern,
    some,
)

_ARCHITECTURES = ("gemma", "gemma2", "gemma3")
# Depth of the 27B models, whose query scale is width / heads: llama.cpp knows them
# by it too, since the file does not say.
_DEPTH_27B = {"gemma2": 46, "gemma3": 62}
# Layers of which the last is global, and rotary bases, where the file is silent.
_PERIOD = {"gemma2": 2, "gemma3": 6}
_THETA = {"gemma": 10_000.0, "gemma2": 10_000.0, "gemma3": 1_000_000.0}
_LOCAL_THETA = 10_000.0
# Key below the architecture's prefix to the field of `GemmaConfig` that says the same.
_FIELDS = {
    "block_count": "num_layers",
    "context_length": "max_position",
    "embedding_length": "hidden_dim",
    "feed_forward_length": "ffn_dim",
    "attention.head_count": "num_query_heads",
    "attention.head_count_kv": "num_kv_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "norm_epsilon",
}


class Fields:
    """The keys of a file, with errors that name it.

    Args:
        values: Key to value.
        path: The file.
    """

    def __init__(self, values, path):
        self.values = values
        self.path = path
        self.arch = None

    def get(self, name, default=None):
        """A number under the architecture's prefix, or an error if there is none."""
        return self.number(f"{self.arch}.{name}", default)

    def number(self, key, default):
        """A number; an error if it is missing and there is no default."""
        value = self.values.get(key, default)
        if value is None:
            raise CheckpointError(f"{self.path}: the key {key} is missing.")
        if type(value) not in NUMBER:
            raise CheckpointError(
                f"{self.path}: {key} must be a number, not a {type(value).__name__}."
            )
        if isinstance(value, float):
            # Stored as float32: 1e-6 and 1000000 as people wrote them.
            with np.errstate(over="ignore"):
                value = float(str(np.float32(value)))
        return value

    def text(self, key, default):
        """A string."""
        value = self.values.get(key, default)
        if not isinstance(value, str):
            raise CheckpointError(
                f"{self.path}: {key} must be text, not a {type(value).__name__}."
            )
        return value


def read_config(fields, vocab_size):
    """The `GemmaConfig` that a file describes.

    Args:
        fields: The `Fields` of the file.
        vocab_size: Function that gives the rows of its embedding, asked once the
            file is known to be a Gemma's.

    Raises:
        CheckpointError: it holds another model, or a part of one.
    """
    path = fields.path
    arch = fields.arch = fields.text("general.architecture", "")
    if arch not in _ARCHITECTURES:
        raise CheckpointError(
            f"{path}: architecture {arch!r} is not supported; supported are "
            f"{', '.join(_ARCHITECTURES)}."
        )
    kind = fields.text("general.type", "model")
    if kind != "model":
        raise CheckpointError(f"{path}: holds no model, but: {kind}.")
    if fields.number("split.count", 0) > 1:
        raise CheckpointError(
            f"{path}: is one part of several; join them first with "
            "llama-gguf-split --merge."
        )
    width, heads = fields.get("embedding_length"), fields.get("attention.head_count")
    defaults = {
        "attention.head_count_kv": heads,
        "attention.key_length": width // max(heads, 1),
    }
    found = {ours: fields.get(key, defaults.get(key)) for key, ours in _FIELDS.items()}
    if fields.get("attention.value_length", found["head_dim"]) != found["head_dim"]:
        raise CheckpointError(
            f"{path}: keys and values of different sizes are not supported."
        )
    found["vocab_size"] = vocab_size()
    found["query_pre_attn_scalar"] = found["head_dim"]
    if found["num_layers"] == _DEPTH_27B.get(arch) and heads > 0:
        found["query_pre_attn_scalar"] = width / heads
    found["rope_theta"] = fields.get("rope.freq_base", _THETA[arch])
    found["rope_scaling_factor"] = _rope_factor(fields)
    if arch != "gemma":
        found |= _later_fields(fields, found["num_layers"])
    return build_config(path, **found)


def _later_fields(fields, layers):
    """What only Gemma 2 and 3 have."""
    found = {"use_post_norms": True}
    found["layer_pattern"] = _layer_pattern(fields, layers)
    if fields.arch == "gemma2":
        found["sliding_window"] = fields.get("attention.sliding_window", 4096)
        found["attn_logit_soft_cap"] = fields.get("attn_logit_softcapping", 50.0)
        found["final_logit_soft_cap"] = fields.get("final_logit_softcapping", 30.0)
        return found
    found["use_qk_norm"] = True
    found["sliding_window"] = fields.get("attention.sliding_window")
    found["final_logit_soft_cap"] = fields.get("final_logit_softcapping", 0) or None
    found["local_rope_theta"] = fields.get("rope.freq_base_swa", _LOCAL_THETA)
    return found


def _layer_pattern(fields, layers):
    key = f"{fields.arch}.attention.sliding_window_pattern"
    value = fields.values.get(key, _PERIOD[fields.arch])
    if isinstance(value, np.ndarray) and len(value) == layers:
        return shortest_pattern("".join("L" if local else "G" for local in value))
    if isinstance(value, int) and 1 <= value <= 1024:
        return "L" * (value - 1) + "G"
    raise CheckpointError(f"{fields.path}: {key} is not understood.")


def _rope_factor(fields):
    kind = fields.text(f"{fields.arch}.rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise CheckpointError(
            f"{fields.path}: rope scaling {kind!r} is not supported; Gemma uses "
            "none and linear."
        )
    factor = fields.get("rope.scaling.factor", 1.0) if kind == "linear" else 1.0
    if fields.arch == "gemma2" and factor != 1.0:
        raise CheckpointError(
            f"{fields.path}: Gemma 2 with rope scaling is unsupported."
        )
    return factor or 1.0


def config_fields(config):
    """The keys that describe a config, as llama.cpp's converter writes them.

    Returns:
        Key to an int, a float, a string or an array of bools.

    Raises:
        CheckpointError: llama.cpp computes no such model; the message names the fields.
    """
    arch = config.family
    found = {key: getattr(config, ours) for key, ours in _FIELDS.items()}
    found["attention.value_length"] = config.head_dim
    found["attention.layer_norm_rms_epsilon"] = float(config.norm_epsilon)
    if arch == "gemma3" or config.rope_theta != _THETA[arch]:
        found["rope.freq_base"] = float(config.rope_theta)
    if config.rope_scaling_factor != 1.0:
        found["rope.scaling.type"] = "linear"
        found["rope.scaling.factor"] = float(config.rope_scaling_factor)
    if arch != "gemma":
        found |= _later_keys(config)
    found = {f"{arch}.{key}": value for key, value in found.items()}
    found = {"general.architecture": arch, **found}
    read = read_config(Fields(found, "gguf"), lambda: config.vocab_size)
    if wrong := config_differences(config, read):
        raise CheckpointError(
            f"A GGUF of the architecture {arch} cannot have {some(wrong)}."
        )
    return found


def _later_keys(config):
    arch, keys = config.family, {}
    # llama.cpp wants a window, though no layer may use it.
    keys["attention.sliding_window"] = config.sliding_window or config.max_position
    for name in ("attn_logit", "final_logit"):
        cap = getattr(config, f"{name}_soft_cap")
        if cap is not None:
            keys[f"{name}_softcapping"] = float(cap)
    usual = "L" * (_PERIOD[arch] - 1) + "G"
    tiled = (usual * config.num_layers)[: config.num_layers]
    if config.layer_kinds != tiled:
        keys["attention.sliding_window_pattern"] = np.array(
            [kind == "L" for kind in config.layer_kinds]
        )
    local = config.local_rope_theta or config.rope_theta
    if arch == "gemma3" and "L" in config.layer_kinds and local != _LOCAL_THETA:
        keys["rope.freq_base_swa"] = float(local)
    return keys
