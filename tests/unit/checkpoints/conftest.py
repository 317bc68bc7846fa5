"""Tiny models with random weights, and checkpoints of them written byte by byte."""

import json
import math
import pathlib
import struct
import sys
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from gemma_keras.checkpoints import hugging_face, keras_preset
from gemma_keras.config import GemmaConfig

# For `hostile`, which two files of tests share.
sys.path.insert(0, str(pathlib.Path(__file__).parent))

# No two sizes are equal, and heads times their size is not the width, so that no
# transposition goes unseen. Three layers have both kinds in Gemma 2.
SIZES = {
    "vocab_size": 70,
    "num_layers": 3,
    "hidden_dim": 24,
    "ffn_dim": 40,
    "num_query_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 10,
    "query_pre_attn_scalar": 10,
}
CONFIGS = {
    "gemma": GemmaConfig(**SIZES),
    "gemma2": GemmaConfig(
        **SIZES,
        layer_pattern="LG",
        sliding_window=5,
        attn_logit_soft_cap=7.0,
        final_logit_soft_cap=3.0,
        use_post_norms=True,
    ),
    "gemma3": GemmaConfig(
        **SIZES | {"num_layers": 7},
        layer_pattern="LLLLLG",
        sliding_window=5,
        use_post_norms=True,
        use_qk_norm=True,
        rope_theta=1_000_000.0,
        local_rope_theta=10_000.0,
        rope_scaling_factor=8.0,
        max_position=32768,
    ),
}
CODES = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16"}
CODES[np.dtype(ml_dtypes.bfloat16)] = "BF16"


def weights(config, dtype="float32", seed=0):
    """Random weights, norms among them, by the paths of `weight_shapes()`."""
    generator = np.random.default_rng(seed)
    return {
        path: generator.normal(size=shape).astype(np.dtype(dtype))
        for path, shape in config.weight_shapes().items()
    }


def hugging_face_tensors(config, arrays, prefix="model."):
    """The same weights as the tensors of a Hugging Face checkpoint."""
    return {
        prefix
        + hugging_face.weight_name(path, config.use_post_norms): np.ascontiguousarray(
            array.T if path.endswith("kernel") else array
        )
        for path, array in arrays.items()
    }


def hugging_face_config(config):
    """config.json of the model, with the keys of transformers 4."""
    types = {"gemma": "gemma", "gemma2": "gemma2", "gemma3": "gemma3_text"}
    raw = {
        "model_type": types[config.family],
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_dim,
        "intermediate_size": config.ffn_dim,
        "num_attention_heads": config.num_query_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_epsilon,
        "max_position_embeddings": config.max_position,
        "rope_theta": config.rope_theta,
        "torch_dtype": "float32",
    }
    if config.family != "gemma":
        raw["query_pre_attn_scalar"] = config.query_pre_attn_scalar
        raw["sliding_window"] = config.sliding_window
        raw["hidden_activation"] = "gelu_pytorch_tanh"
    if config.family == "gemma2":
        raw["attn_logit_softcapping"] = config.attn_logit_soft_cap
        raw["final_logit_softcapping"] = config.final_logit_soft_cap
    if config.family == "gemma3":
        raw["rope_local_base_freq"] = config.local_rope_theta
        raw["sliding_window_pattern"] = 6
        if config.rope_scaling_factor != 1:
            factor = config.rope_scaling_factor
            raw["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    return raw


def safetensors_bytes(tensors, header=None, change=None):
    """A safetensors file.

    Args:
        tensors: Name to array.
        header: What to write as the header instead of what is right, in bytes.
        change: A function that changes the header's dict in place.
    """
    entries, offset = {}, 0
    for name, array in tensors.items():
        entries[name] = {
            "dtype": CODES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    if change:
        change(entries)
    if header is None:
        header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
        header += b" " * (-len(header) % 8)
    data = b"".join(array.tobytes() for array in tensors.values())
    return struct.pack("<Q", len(header)) + header + data


def write_hugging_face(folder, config, arrays, **options):
    """Writes config.json and model.safetensors."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hugging_face_config(config)))
    data = safetensors_bytes(hugging_face_tensors(config, arrays), **options)
    (folder / "model.safetensors").write_bytes(data)
    return folder


def write_shards(folder, config, arrays, count=3):
    """Writes config.json, an index and `count` shards."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hugging_face_config(config)))
    tensors = hugging_face_tensors(config, arrays)
    size = math.ceil(len(tensors) / count)
    weight_map = {}
    for number in range(count):
        names = list(tensors)[number * size : (number + 1) * size]
        file = f"model-{number + 1:05}-of-{count:05}.safetensors"
        part = {name: tensors[name] for name in names}
        (folder / file).write_bytes(safetensors_bytes(part))
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def assert_same_weights(checkpoint, arrays):
    """Every weight equals `arrays`, bit for bit and in dtype."""
    assert list(arrays) == list(checkpoint.config.weight_shapes())
    for path, expected in arrays.items():
        found = checkpoint.tensor(path)
        assert type(found) is np.ndarray
        assert found.dtype == expected.dtype, path
        assert found.shape == expected.shape, path
        assert found.tobytes() == expected.tobytes(), path
        assert checkpoint.sources(path)


def assert_same_but_for_norms(checkpoint, arrays):
    """As above, of a format that keeps norms plus one in float32."""
    for path, expected in arrays.items():
        if path.endswith("scale"):
            one = np.float32(1)
            expected = (expected.astype(np.float32) + one) - one
        found = checkpoint.tensor(path)
        assert found.dtype == expected.dtype, path
        assert found.tobytes() == expected.tobytes(), path


def write_preset(folder, config, arrays, **options):
    """A KerasHub preset of `arrays`; its folder."""
    dtype = options.pop("dtype", None) or next(iter(arrays.values())).dtype.name
    return keras_preset.save(folder, config, dtype, arrays.__getitem__, **options)


@pytest.fixture(scope="session")
def files():
    """The functions above, for tests in this folder."""
    return SimpleNamespace(
        configs=CONFIGS,
        sizes=SIZES,
        weights=weights,
        hugging_face_tensors=hugging_face_tensors,
        hugging_face_config=hugging_face_config,
        safetensors_bytes=safetensors_bytes,
        write_hugging_face=write_hugging_face,
        write_shards=write_shards,
        write_preset=write_preset,
        assert_same_weights=assert_same_weights,
        assert_same_but_for_norms=assert_same_but_for_norms,
    )


@pytest.fixture(params=list(CONFIGS))
def config(request) -> GemmaConfig:
    """A tiny Gemma 1, 2 and 3."""
    return CONFIGS[request.param]


@pytest.fixture(params=["float32", "bfloat16", "float16"])
def dtype(request) -> str:
    """Each float type that a checkpoint may have."""
    return request.param
