"""Hugging Face checkpoints: what was written is read, and nothing else is."""

import json
import tracemalloc

import numpy as np
import pytest

from gemma_keras.checkpoints import CheckpointError, open_checkpoint

pytestmark = pytest.mark.any_backend


def test_single_file(tmp_path, files, config, dtype):
    arrays = files.weights(config, dtype)
    files.write_hugging_face(tmp_path, config, arrays)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.config == config
        assert checkpoint.dtype == dtype
        files.assert_same_weights(checkpoint, arrays)
        assert checkpoint.tokenizer() is None
        assert checkpoint.preprocessor_config() == {}


def test_shards(tmp_path, files, config, dtype):
    arrays = files.weights(config, dtype)
    files.write_shards(tmp_path, config, arrays)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.config == config
        files.assert_same_weights(checkpoint, arrays)
        assert checkpoint.sources("token_embedding/embeddings").startswith(
            "model-00001-of-00003.safetensors: model.embed_tokens.weight"
        )


def test_path_of_the_file_itself(tmp_path, files, config):
    arrays = files.weights(config)
    files.write_hugging_face(tmp_path, config, arrays)
    with open_checkpoint(tmp_path / "model.safetensors") as checkpoint:
        files.assert_same_weights(checkpoint, arrays)
    (tmp_path / "model.safetensors").rename(tmp_path / "nameless")
    with open_checkpoint(tmp_path / "nameless") as checkpoint:
        files.assert_same_weights(checkpoint, arrays)


@pytest.mark.parametrize(
    "prefix", ["model.", "", "language_model.model.", "model.language_model."]
)
def test_prefixes_and_parts_that_are_not_text(tmp_path, files, prefix):
    config = files.configs["gemma3"]
    arrays = files.weights(config, "bfloat16")
    tensors = files.hugging_face_tensors(config, arrays, prefix)
    vision = "model.vision_tower." if prefix.startswith("model.l") else "vision_tower."
    tensors[f"{vision}x.weight"] = np.ones((3, 4), np.float32)
    tensors["multi_modal_projector.mm_input_projection_weight"] = np.ones(2, np.float16)
    text = files.hugging_face_config(config)
    raw = {"model_type": "gemma3", "text_config": text, "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "model.safetensors").write_bytes(files.safetensors_bytes(tensors))
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.config == config
        assert checkpoint.dtype == "bfloat16"
        files.assert_same_weights(checkpoint, arrays)


def test_tensors_are_views_of_the_file(tmp_path, files):
    config = files.configs["gemma"]
    arrays = files.weights(config, "bfloat16")
    files.write_hugging_face(tmp_path, config, arrays)
    before = (tmp_path / "model.safetensors").read_bytes()
    checkpoint = open_checkpoint(tmp_path)
    tracemalloc.start()
    found = {path: checkpoint.tensor(path) for path in arrays}
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000
    checkpoint.close()
    kernel = found["decoder_block_0/ffw_gating/kernel"]
    assert not kernel.flags.owndata
    assert kernel.flags.f_contiguous
    # Arrays outlive the checkpoint, and what is written to them stays in the process.
    assert kernel.flags.writeable
    kernel[:] = 0
    assert found["decoder_block_0/ffw_linear/kernel"].any()
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_misaligned_tensors_are_copied(tmp_path, files):
    config = files.configs["gemma"]
    arrays = files.weights(config)
    tensors = files.hugging_face_tensors(config, arrays)
    data = files.safetensors_bytes(tensors)
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip() + b" " * 3
    while len(header) % 4 != 1:
        header += b" "
    (tmp_path / "config.json").write_text(json.dumps(files.hugging_face_config(config)))
    (tmp_path / "model.safetensors").write_bytes(
        files.safetensors_bytes(tensors, header=header)
    )
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.tensor("final_normalization/scale").flags.aligned
        files.assert_same_weights(checkpoint, arrays)


def test_head_that_equals_the_embedding_is_ignored(tmp_path, files):
    config = files.configs["gemma"]
    arrays = files.weights(config)
    tensors = files.hugging_face_tensors(config, arrays)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(5, np.float32)
    (tmp_path / "config.json").write_text(json.dumps(files.hugging_face_config(config)))
    path = tmp_path / "model.safetensors"
    path.write_bytes(files.safetensors_bytes(tensors))
    with open_checkpoint(tmp_path) as checkpoint:
        files.assert_same_weights(checkpoint, arrays)
    tensors["lm_head.weight"][3, 5] += 1
    path.write_bytes(files.safetensors_bytes(tensors))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: lm_head.*differs"):
        open_checkpoint(tmp_path)


def read_config(files, tmp_path, config, **changes):
    """The config that is read when config.json is changed; None takes a key out."""
    raw = files.hugging_face_config(config)
    for key, value in changes.items():
        raw[key] = value
    raw = {key: value for key, value in raw.items() if value is not ...}
    files.write_hugging_face(tmp_path, config, files.weights(config))
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with open_checkpoint(tmp_path) as checkpoint:
        return checkpoint.config


@pytest.mark.parametrize("word", ["gelu", "gelu_pytorch_tanh", "gelu_new", None, ...])
@pytest.mark.parametrize("key", ["hidden_act", "hidden_activation"])
def test_gemma_1_means_tanh_gelu_whatever_it_says(tmp_path, files, key, word):
    config = files.configs["gemma"]
    assert read_config(files, tmp_path, config, **{key: word}) == config


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
def test_other_activations_are_refused(tmp_path, files, family):
    config = files.configs[family]
    word = "silu" if family == "gemma" else "gelu"
    with pytest.raises(
        CheckpointError, match=rf"config\.json: hidden_activation '{word}'"
    ):
        read_config(files, tmp_path, config, hidden_activation=word)


def test_keys_of_transformers_5(tmp_path, files):
    config = files.configs["gemma"]
    rope = {"rope_type": "default", "rope_theta": 5000.0}
    found = read_config(
        files, tmp_path, config, rope_theta=..., rope_parameters=rope, dtype="float32"
    )
    assert found.rope_theta == 5000.0
    config = files.configs["gemma3"]
    found = read_config(
        files,
        tmp_path,
        config,
        rope_theta=...,
        rope_local_base_freq=...,
        rope_scaling=...,
        sliding_window_pattern=...,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            "full_attention": {
                "rope_type": "linear",
                "factor": 4.0,
                "rope_theta": 7000.0,
            },
        },
        layer_types=["full_attention"] + ["sliding_attention"] * 6,
    )
    assert (found.rope_theta, found.local_rope_theta) == (7000.0, 300.0)
    assert found.rope_scaling_factor == 4.0
    assert found.layer_kinds == "GLLLLLL"


def test_gemma_3_says_little_and_means_the_class_defaults(tmp_path):
    """The text_config of google/gemma-3-4b-it as published."""
    from gemma_keras import registry
    from gemma_keras.checkpoints.hugging_face_config import config_from_json

    raw = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    config = config_from_json(raw, "config.json")
    known = registry.architectures()["gemma3_4b_text"]
    assert config.vocab_size == 262208
    assert registry.architecture_like(config) == known


def test_first_gemma_2_9b_config(tmp_path):
    from gemma_keras import registry
    from gemma_keras.checkpoints.hugging_face_config import config_from_json

    raw = {
        "model_type": "gemma2",
        "hidden_size": 3584,
        "intermediate_size": 14336,
        "num_hidden_layers": 42,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "query_pre_attn_scalar": 224,
    }
    with pytest.warns(UserWarning, match="query_pre_attn_scalar 224"):
        config = config_from_json(raw, "config.json")
    assert config == registry.architectures()["gemma2_9b"]


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gemma", {"model_type": "llama"}, "model type 'llama' is not supported"),
        ("gemma", {"model_type": ["gemma"]}, "is not supported"),
        ("gemma", {"attention_bias": True}, "attention_bias"),
        ("gemma", {"quantization_config": {"bits": 4}}, "quantised"),
        ("gemma", {"num_key_value_heads": 3}, "num_query_heads"),
        ("gemma", {"num_hidden_layers": 10**9}, "layers are more"),
        ("gemma", {"num_hidden_layers": "3"}, "num_hidden_layers must be integer"),
        ("gemma", {"num_hidden_layers": 900}, "too few"),
        (
            "gemma",
            {"num_hidden_layers": 4},
            "layers.3.input_layernorm.weight is missing",
        ),
        ("gemma", {"num_hidden_layers": 2}, "no part of the Gemma.*layers.2"),
        ("gemma", {"hidden_size": 10**400}, "has shape"),
        ("gemma", {"rms_norm_eps": 10**400}, "too large"),
        ("gemma", {"rms_norm_eps": float("nan")}, "norm_epsilon"),
        ("gemma", {"vocab_size": 71}, r"embed_tokens.weight: has shape \[70, 24\]"),
        ("gemma", {"rope_scaling": {"rope_type": "yarn"}}, "rope type 'yarn'"),
        ("gemma", {"rope_scaling": 7}, "must be an object"),
        ("gemma2", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope scaling"),
        ("gemma3", {"use_bidirectional_attention": True}, "embedding model"),
        ("gemma3", {"layer_types": ["full_attention"]}, "each of the 7 layers"),
        ("gemma3", {"layer_types": ["chunked"] * 7}, "layer_types must name"),
        ("gemma3", {"layer_types": 7}, "layer_types must name"),
        ("gemma3", {"sliding_window_pattern": 0}, "sliding_window_pattern"),
        ("gemma3", {"sliding_window": None}, "sliding_window must be given"),
        ("gemma3", {"rope_parameters": []}, None),
        (
            "gemma3",
            {"rope_parameters": {"sliding_attention": {"type": "linear", "factor": 2}}},
            "sliding_attention layers",
        ),
    ],
)
def test_configs_that_are_refused(tmp_path, files, family, changes, message):
    config = files.configs[family]
    if message is None:
        assert read_config(files, tmp_path, config, **changes) == config
        return
    with pytest.raises(CheckpointError, match=message) as error:
        read_config(files, tmp_path, config, **changes)
    assert str(tmp_path) in str(error.value)


def test_tokenizer_beside_the_weights(tmp_path, files, small_proto):
    config = files.configs["gemma"]
    files.write_hugging_face(tmp_path, config, files.weights(config))
    (tmp_path / "tokenizer.model").write_bytes(small_proto)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.tokenizer().proto == small_proto
    (tmp_path / "tokenizer.model").write_bytes(small_proto[:1000])
    with (
        open_checkpoint(tmp_path) as checkpoint,
        pytest.raises(CheckpointError, match=r"tokenizer\.model"),
    ):
        checkpoint.tokenizer()


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shard", ["20KB", "1GB"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_checkpoints_that_transformers_writes(tmp_path, files, config, dtype, shard):
    """Both names and numbers come from transformers, not from this package."""
    transformers = pytest.importorskip("transformers")
    import torch

    kind = {"gemma": "Gemma", "gemma2": "Gemma2", "gemma3": "Gemma3Text"}[config.family]
    raw = files.hugging_face_config(config)
    raw.pop("model_type")
    built = getattr(transformers, f"{kind}Config")(**raw)
    model = transformers.AutoModelForCausalLM.from_config(built).to(
        getattr(torch, dtype)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors").exists() == (shard == "1GB")
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.config == config
        assert checkpoint.dtype == dtype
        for path, expected in _as_ours(model, config).items():
            found = torch.from_numpy(checkpoint.tensor(path).astype(np.float32))
            assert torch.equal(found, expected.float()), path


def _as_ours(model, config):
    """Weights of a transformers model by our paths, through its modules."""
    decoder = model.model
    result = {"token_embedding/embeddings": decoder.embed_tokens.weight}
    for number, layer in enumerate(decoder.layers):
        attention, mlp = layer.self_attn, layer.mlp
        names = {
            "pre_attention_norm/scale": layer.input_layernorm.weight,
            "attention/query/kernel": attention.q_proj.weight.T,
            "attention/key/kernel": attention.k_proj.weight.T,
            "attention/value/kernel": attention.v_proj.weight.T,
            "attention/attention_output/kernel": attention.o_proj.weight.T,
            "ffw_gating/kernel": mlp.gate_proj.weight.T,
            "ffw_gating_2/kernel": mlp.up_proj.weight.T,
            "ffw_linear/kernel": mlp.down_proj.weight.T,
        }
        if config.use_post_norms:
            names["post_attention_norm/scale"] = layer.post_attention_layernorm.weight
            names["pre_ffw_norm/scale"] = layer.pre_feedforward_layernorm.weight
            names["post_ffw_norm/scale"] = layer.post_feedforward_layernorm.weight
        else:
            names["pre_ffw_norm/scale"] = layer.post_attention_layernorm.weight
        if config.use_qk_norm:
            names["attention/query_norm/scale"] = attention.q_norm.weight
            names["attention/key_norm/scale"] = attention.k_norm.weight
        result |= {f"decoder_block_{number}/{name}": w for name, w in names.items()}
    result["final_normalization/scale"] = decoder.norm.weight
    assert result.keys() == config.weight_shapes().keys()
    return {path: weight.detach() for path, weight in result.items()}


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore")
def test_multimodal_checkpoint_that_transformers_writes(tmp_path, files):
    transformers = pytest.importorskip("transformers")
    import torch

    config = files.configs["gemma3"]
    raw = files.hugging_face_config(config)
    vision = {
        "hidden_size": 12,
        "intermediate_size": 20,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    built = transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**raw),
        vision_config=vision,
        mm_tokens_per_image=4,
    )
    model = transformers.Gemma3ForConditionalGeneration(built)
    model.save_pretrained(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.config == config
        weight = model.model.language_model.layers[6].mlp.down_proj.weight
        found = checkpoint.tensor("decoder_block_6/ffw_linear/kernel")
        assert torch.equal(torch.from_numpy(found), weight.detach().T)
