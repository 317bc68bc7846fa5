"""gemma_pytorch's files: layout, int8, configs where there is none, shards."""

import dataclasses
import json
import re

import numpy as np
import pytest
from torch_arrays import to_torch

from gemma_keras import registry
from gemma_keras.checkpoints import CheckpointError, exporting, open_checkpoint
from gemma_keras.checkpoints.contents import Contents
from gemma_keras.checkpoints.gemma_pytorch import published_config, stored_shapes
from gemma_keras.config import GemmaConfig
from gemma_keras.tokenizer import GemmaTokenizer

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.any_backend

INDEX = "pytorch_model.bin.index.json"
# gemma_pytorch's names for the weights of a layer, written out.
ONE = {
    "pre_attention_norm/scale": "input_layernorm",
    "attention/attention_output/kernel": "self_attn.o_proj",
    "pre_ffw_norm/scale": "post_attention_layernorm",
    "ffw_gating/kernel": "mlp.gate_proj",
    "ffw_gating_2/kernel": "mlp.up_proj",
    "ffw_linear/kernel": "mlp.down_proj",
}
TWO = ONE | {
    "post_attention_norm/scale": "post_attention_layernorm",
    "pre_ffw_norm/scale": "pre_feedforward_layernorm",
    "post_ffw_norm/scale": "post_feedforward_layernorm",
}
THREE = TWO | {
    "attention/query_norm/scale": "self_attn.query_norm",
    "attention/key_norm/scale": "self_attn.key_norm",
}
NAMES = {"gemma": ONE, "gemma2": TWO, "gemma3": THREE}
ROLES = [f"attention/{role}/kernel" for role in ("query", "key", "value")]
MULTIMODAL = "text_token_embedder.weight"


def state_dict(config, arrays, embedding="embedder.weight"):
    """The weights as gemma_pytorch has them, by a layout that is written out above."""
    state = {
        embedding: arrays["token_embedding/embeddings"],
        "model.norm.weight": arrays["final_normalization/scale"],
    }
    for layer in range(config.num_layers):
        block = f"decoder_block_{layer}"
        for role, name in NAMES[config.family].items():
            array = arrays[f"{block}/{role}"]
            state[f"model.layers.{layer}.{name}.weight"] = array.T
        fused = np.concatenate([arrays[f"{block}/{role}"].T for role in ROLES])
        state[f"model.layers.{layer}.self_attn.qkv_proj.weight"] = fused
    return {name: to_torch(array) for name, array in state.items()}


def quantised(state):
    """The matrices in int8, with random factors for their rows."""
    random = np.random.default_rng(1)
    result = {}
    for name, tensor in state.items():
        if tensor.ndim == 1:
            result[name] = tensor
            continue
        integers = random.integers(-128, 128, tuple(tensor.shape))
        factors = random.random(len(tensor)).astype(np.float32) / 100
        result[name] = torch.from_numpy(integers.astype(np.int8))
        result[f"{name}_scaler"] = torch.from_numpy(factors)
    return result


def expected_embedding(config):
    return MULTIMODAL if config.family == "gemma3" else "embedder.weight"


def contents_of(config, arrays, **fields):
    dtype = next(iter(arrays.values())).dtype.name
    return Contents(config=config, tensors=arrays.__getitem__, dtype=dtype, **fields)


def export(path, config, arrays, **options):
    fields = {"tokenizer": options.pop("tokenizer", None)}
    contents = contents_of(config, arrays, **fields)
    return exporting.export(contents, path, "torch", **options)


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def test_a_file_is_what_gemma_pytorch_loads(tmp_path, files, config, dtype):
    arrays = files.weights(config, dtype)
    path = export(tmp_path / "m.ckpt", config, arrays)
    assert [p.name for p in tmp_path.iterdir()] == ["m.ckpt"]
    # As `load_weights` does it.
    found = torch.load(path, mmap=True, weights_only=True)["model_state_dict"]
    assert_equal(found, state_dict(config, arrays, expected_embedding(config)))
    with open_checkpoint(path) as checkpoint:
        assert (checkpoint.config, checkpoint.dtype) == (config, dtype)
        files.assert_same_weights(checkpoint, arrays)
        assert checkpoint.tokenizer() is None
        source = checkpoint.sources("decoder_block_2/attention/key/kernel")
    assert source == "m.ckpt: model.layers.2.self_attn.qkv_proj.weight [40:60]"


@pytest.mark.parametrize("limit", [9000, None], ids=["many", "one"])
def test_a_directory_is_what_gemma_pytorch_loads(tmp_path, files, config, limit, small):
    config = dataclasses.replace(config, vocab_size=500)
    arrays = files.weights(config)
    folder = export(
        tmp_path / "m", config, arrays, max_shard_size=limit, tokenizer=small
    )
    index = json.loads((folder / INDEX).read_text())
    found = {}
    for shard in sorted(set(index["weight_map"].values())):
        state = torch.load(folder / shard, map_location="cpu", weights_only=True)
        assert {index["weight_map"][name] for name in state} == {shard}
        found |= state
    assert_equal(found, state_dict(config, arrays, expected_embedding(config)))
    assert index["metadata"]["total_size"] == 4 * config.num_parameters
    shards = list(folder.glob("pytorch_model-*.bin"))
    assert len(shards) == 1 if limit is None else len(shards) > 3
    assert (folder / "tokenizer.model").read_bytes() == small.proto
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.config == config
        files.assert_same_weights(checkpoint, arrays)
        assert checkpoint.tokenizer() == small


def test_files_of_others_are_read(tmp_path, files, config, dtype, monkeypatch):
    """As Google published them: no config, tables of rotary positions, other keys."""
    known = dataclasses.replace(config, vocab_size=999)
    monkeypatch.setattr(registry, "architectures", lambda: {"twin": known})
    arrays = files.weights(config, dtype)
    state = state_dict(config, arrays)
    state["freqs_cis"] = torch.ones(16, 5, dtype=torch.complex64)
    path = tmp_path / "gemma.ckpt"
    torch.save({"model_state_dict": state, "config": {"a": 1}}, path)
    for source in (path, tmp_path):
        with open_checkpoint(source) as checkpoint:
            assert checkpoint.config == config
            files.assert_same_weights(checkpoint, arrays)
    vision = {"siglip_vision_model.x.weight": torch.ones(3, 3)}
    vision["mm_input_projection.weight"] = torch.ones(4, 3)
    vision["mm_soft_embedding_norm.weight"] = torch.ones(3)
    torch.save(state_dict(config, arrays, MULTIMODAL) | vision, path)
    with open_checkpoint(path) as checkpoint:
        files.assert_same_weights(checkpoint, arrays)


# int8


def test_int8_is_the_number_times_its_factor(tmp_path, files, config):
    state = quantised(state_dict(config, files.weights(config)))
    torch.save({"model_state_dict": state}, tmp_path / "q.ckpt")
    with open_checkpoint(tmp_path / "q.ckpt", config=config) as checkpoint:
        assert checkpoint.dtype == "float32"
        decoded = {path: checkpoint.tensor(path) for path in config.weight_shapes()}
    with open_checkpoint(
        tmp_path / "q.ckpt", config=config, dtype="bfloat16"
    ) as checkpoint:
        assert checkpoint.dtype == "bfloat16"
        for path, array in decoded.items():
            expected = array if path.endswith("scale") else array.astype("bfloat16")
            assert checkpoint.tensor(path).tobytes() == expected.tobytes()
    # What gemma_pytorch multiplies when it computes.
    expected = {}
    for name, tensor in state.items():
        if tensor.dtype == torch.int8:
            expected[name] = tensor * state[f"{name}_scaler"].unsqueeze(-1)
        elif not name.endswith("_scaler"):
            expected[name] = tensor
    assert_equal(state_dict(config, decoded), expected)


def test_rounding_to_int8_tells_its_error(tmp_path, files, config, monkeypatch):
    # A few rows at a time, the last fewer.
    monkeypatch.setattr("gemma_keras.checkpoints.gemma_pytorch_writer._CHUNK", 200)
    arrays = files.weights(config)
    arrays["decoder_block_1/ffw_gating/kernel"][:, 5] = 0
    arrays["decoder_block_1/ffw_gating/kernel"][:, 6] = 1e-44
    told = []
    path = export(tmp_path / "q.ckpt", config, arrays, dtype="int8", report=told.append)
    found = torch.load(path, weights_only=True)
    state, plain = found["model_state_dict"], state_dict(config, arrays)
    squares = wholes = worst = 0.0
    for name, tensor in state.items():
        exact = plain.get("embedder.weight" if name == MULTIMODAL else name)
        if name.endswith("_scaler"):
            assert tensor.dtype == torch.float32
            # So that bfloat16 has the same numbers.
            assert torch.equal(tensor.bfloat16().float(), tensor)
            continue
        if tensor.ndim == 1:
            assert torch.equal(tensor, exact)
            continue
        assert tensor.dtype == torch.int8
        rows = tensor.abs().amax(1)
        large = exact.abs().amax(1) > 1e-40
        assert (rows[large] == 127).all()
        factors = state[f"{name}_scaler"].double().unsqueeze(-1)
        error = (tensor.double() * factors - exact.double()).abs()
        assert (error <= 0.5001 * factors).all()
        squares += float((error**2).sum())
        wholes += float((exact.double() ** 2).sum())
        largest = exact.double().abs().amax(1, keepdim=True)
        worst = max(worst, float((error / largest.clamp(min=1e-300)).max()))
    mean = (squares / wholes) ** 0.5
    assert f"by {mean:.2%} of the weights, at most by" in told[0]
    facts = json.loads(found["gemma_keras"])
    assert told[0] in facts["modified"]
    stated = float(re.search(r"at most by ([\d.]+)%", told[0])[1]) / 100
    assert stated == pytest.approx(worst, abs=6e-5)


def test_rounding_again_changes_nothing(tmp_path, files):
    config = files.configs["gemma2"]
    export(tmp_path / "1.ckpt", config, files.weights(config), dtype="int8")
    with open_checkpoint(tmp_path / "1.ckpt") as checkpoint:
        contents = exporting.checkpoint_contents(checkpoint, "1.ckpt")
        exporting.export(contents, tmp_path / "2.ckpt", "torch", dtype="int8")
        exporting.export(contents, tmp_path / "hf", "hf")
    one, two = (
        torch.load(tmp_path / f"{number}.ckpt", weights_only=True)["model_state_dict"]
        for number in (1, 2)
    )
    assert_equal(two, one)
    with (
        open_checkpoint(tmp_path / "1.ckpt") as ours,
        open_checkpoint(tmp_path / "hf") as theirs,
    ):
        expected = {path: ours.tensor(path) for path in config.weight_shapes()}
        files.assert_same_weights(theirs, expected)


# Configs


def test_a_config_beside_the_file_is_read(tmp_path, files, config):
    arrays = files.weights(config)
    torch.save(state_dict(config, arrays), tmp_path / "m.ckpt")
    match = r"m\.ckpt: has no config, and its shapes are not those of a published"
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=match):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(files.hugging_face_config(config)))
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.config == config
        files.assert_same_weights(checkpoint, arrays)


@pytest.mark.parametrize("name", sorted(registry.architectures()))
def test_published_shapes_tell_the_config(name):
    config = registry.architectures()[name]
    shapes = stored_shapes(config)
    assert published_config(shapes) == config
    shapes["embedder.weight"] = (77, config.hidden_dim)
    assert published_config(shapes) == dataclasses.replace(config, vocab_size=77)
    shapes["model.norm.weight"] = (config.hidden_dim + 1,)
    assert published_config(shapes) is None


@pytest.mark.parametrize(
    ("family", "changes", "match"),
    [
        ("gemma", {"layer_pattern": "LG", "sliding_window": 4}, "layer_pattern='LGL'"),
        ("gemma", {"rope_theta": 5000.0}, "rope_theta=5000, 5000"),
        ("gemma", {"rope_scaling_factor": 2.0}, "rope_scaling_factor=2"),
        ("gemma2", {"local_rope_theta": 5000.0}, "rope_theta=10000, 5000"),
        ("gemma3", {"use_post_norms": False}, "use_post_norms=False"),
    ],
)
def test_models_that_gemma_pytorch_does_not_compute_are_refused(
    tmp_path, files, family, changes, match
):
    config = dataclasses.replace(files.configs[family], **changes)
    with pytest.raises(CheckpointError, match=match):
        export(tmp_path / "m", config, files.weights(config))
    assert not list(tmp_path.iterdir())


def test_only_one_class_scales_rotary_positions(tmp_path, files):
    config = files.configs["gemma3"]
    told = []
    export(tmp_path / "a", config, files.weights(config), report=told.append)
    assert told[0].startswith("The embedding is named as in Gemma3ForMultimodalLM")
    config = dataclasses.replace(config, rope_scaling_factor=1.0)
    path = export(tmp_path / "b.ckpt", config, files.weights(config))
    state = torch.load(path, weights_only=True)["model_state_dict"]
    assert "embedder.weight" in state
    with open_checkpoint(path) as checkpoint:
        files.assert_same_weights(checkpoint, files.weights(config))


# The tokenizer, and the papers


def test_a_file_has_its_tokenizer_and_papers_inside(tmp_path, files, small):
    config = dataclasses.replace(files.configs["gemma"], vocab_size=500)
    path = export(tmp_path / "m.ckpt", config, files.weights(config), tokenizer=small)
    facts = json.loads(torch.load(path, weights_only=True)["gemma_keras"])
    assert facts["config"] == dataclasses.asdict(config)
    assert facts["licence"] == "gemma"
    assert facts["notice"].startswith("Gemma is provided under")
    assert facts["modified"] == ["The weights were written as gemma_pytorch."]
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.tokenizer() == small
    # One that lies beside the file is the user's choice.
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    with open_checkpoint(path) as checkpoint, pytest.raises(CheckpointError):
        checkpoint.tokenizer()


def test_a_file_replaces_a_file_of_torch_only_and_only_if_asked(tmp_path, files):
    config = files.configs["gemma"]
    arrays = files.weights(config)
    path = export(tmp_path / "m.ckpt", config, arrays)
    with pytest.raises(CheckpointError, match="exists already; pass --force"):
        export(path, config, arrays)
    export(path, config, files.weights(config, seed=1), overwrite=True)
    path.write_text("mine")
    with pytest.raises(CheckpointError, match="is there already, and no gemma_pytorch"):
        export(path, config, arrays, overwrite=True)
    assert path.read_text() == "mine"


@pytest.mark.real
def test_a_genuine_vocabulary_goes_along(tmp_path, files, gemma_tokenizer_file):
    tokenizer = GemmaTokenizer.from_file(gemma_tokenizer_file)
    config = GemmaConfig(
        **files.sizes | {"vocab_size": tokenizer.vocab_size, "hidden_dim": 4}
    )
    path = export(
        tmp_path / "m.ckpt", config, files.weights(config), tokenizer=tokenizer
    )
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.tokenizer() == tokenizer
