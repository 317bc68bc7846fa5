"""KerasHub presets, read and written by KerasHub itself."""

import dataclasses
import json

import h5py
import keras
import numpy as np
import pytest

from gemma_keras import GemmaCausalLM
from gemma_keras.checkpoints import (
    CheckpointError,
    keras_layout,
    open_checkpoint,
)


@pytest.fixture
def keras_hub():
    return pytest.importorskip("keras_hub")


def keras_hub_backbone(keras_hub, config, dtype="float32"):
    raw = keras_layout.backbone_config(config)
    kind = "Gemma3" if config.use_qk_norm else "Gemma"
    backbone = getattr(keras_hub.models, f"{kind}Backbone")(**raw, dtype=dtype)
    generator = np.random.default_rng(5)
    for variable in backbone.weights:
        variable.assign(generator.normal(size=variable.shape) * 0.3)
    return backbone


def as_ours(variable, config):
    """A KerasHub variable in our shape, told by its path, without keras_layout."""
    array = keras.ops.convert_to_numpy(keras.ops.cast(variable.value, "float32"))
    name = variable.path.rsplit("/", 2)[-2]
    if name in ("query", "key", "value"):
        return np.einsum("hdk->dhk", array).reshape(config.hidden_dim, -1)
    if name == "attention_output":
        return array.reshape(-1, config.hidden_dim)
    return array


@pytest.mark.any_backend
@pytest.mark.reference
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kept", ["float32", "bfloat16"])
@pytest.mark.parametrize("shard", [10, 30e-6])
def test_presets_that_keras_hub_writes(tmp_path, files, keras_hub, config, kept, shard):
    backbone = keras_hub_backbone(keras_hub, config, kept)
    backbone.save_to_preset(str(tmp_path), max_shard_size=shard)
    assert (tmp_path / "model.weights.json").exists() == (shard < 1)
    with open_checkpoint(tmp_path) as checkpoint:
        expected = config
        if not config.use_qk_norm:
            expected = dataclasses.replace(config, max_position=8192)
        assert checkpoint.config == expected
        assert checkpoint.dtype == kept
        variables = {variable.path: variable for variable in backbone.weights}
        assert variables.keys() == config.weight_shapes().keys()
        for path, variable in variables.items():
            found = checkpoint.tensor(path).astype(np.float32)
            assert np.array_equal(found, as_ours(variable, config)), path


@pytest.mark.any_backend
@pytest.mark.reference
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shard", [10.0, 30e-6])
def test_presets_that_keras_hub_reads(
    tmp_path, files, small, keras_hub, config, dtype, shard
):
    """KerasHub's own from_preset gives the weights and settings that were saved."""
    arrays = files.weights(config, dtype)
    folder = files.write_preset(
        tmp_path / "p",
        config,
        arrays,
        tokenizer=small,
        preprocessor_config={"sequence_length": 33},
        max_shard_size=shard,
    )
    kind = "Gemma3" if config.use_qk_norm else "Gemma"
    task = getattr(keras_hub.models, f"{kind}CausalLM").from_preset(
        str(folder), dtype=dtype
    )
    assert task.preprocessor.sequence_length == 33
    assert task.preprocessor.tokenizer.vocabulary_size() == small.vocab_size
    text = "The capital of the island"
    assert list(np.asarray(task.preprocessor.tokenizer(text))) == small.encode(text)
    variables = {variable.path: variable for variable in task.backbone.weights}
    assert variables.keys() == arrays.keys()
    for path, variable in variables.items():
        expected = arrays[path].astype(np.float32)
        assert np.array_equal(as_ours(variable, config), expected), path
    again = tmp_path / "again"
    task.save_to_preset(str(again))
    for name in ("config.json", "tokenizer.json", "preprocessor.json", "task.json"):
        ours = json.loads((folder / name).read_text())
        theirs = json.loads((again / name).read_text())
        assert _sorted(ours) == _sorted(theirs), name
    _assert_same_types(folder, again)


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore")
def test_keras_hub_computes_the_same_logits(tmp_path, files, keras_hub, config):
    """Of a preset that we write, and of the one that KerasHub makes of it."""
    arrays = {path: array * 0.3 for path, array in files.weights(config).items()}
    folder = files.write_preset(tmp_path / "ours", config, arrays)
    kind = "Gemma3" if config.use_qk_norm else "Gemma"
    backbone = getattr(keras_hub.models, f"{kind}Backbone").from_preset(
        str(folder), dtype="float32"
    )
    ids = np.random.default_rng(2).integers(0, config.vocab_size, (2, 17))
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    hidden = backbone(inputs)
    expected = backbone.token_embedding(hidden, reverse=True)
    expected = keras.ops.convert_to_numpy(expected)
    backbone.save_to_preset(str(tmp_path / "theirs"))
    for preset in (folder, tmp_path / "theirs"):
        lm = GemmaCausalLM.from_preset(preset)
        found = keras.ops.convert_to_numpy(lm(inputs))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def _sorted(value):
    return json.dumps(value, sort_keys=True)


def _assert_same_types(ours, theirs):
    """Both write the same datasets, with the same HDF5 types and attributes."""
    assert _datasets(ours) == _datasets(theirs)


def _datasets(folder):
    found = {}

    def visit(name, item):
        if isinstance(item, h5py.Dataset):
            found[name] = (item.shape, item.dtype, dict(item.attrs))

    for path in folder.glob("*.weights.h5"):
        with h5py.File(path) as file:
            file.visititems(visit)
    return found


@pytest.mark.any_backend
@pytest.mark.reference
@pytest.mark.filterwarnings("ignore")
def test_task_weights_that_keras_hub_writes(tmp_path, files, small, keras_hub, config):
    """`save_weights` after training with LoRA: merged, compiled, without config."""
    backbone = keras_hub_backbone(keras_hub, config)
    kind = "Gemma3" if config.use_qk_norm else "Gemma"
    task = getattr(keras_hub.models, f"{kind}CausalLM")(
        backbone=backbone, preprocessor=None
    )
    backbone.enable_lora(2)
    for variable in backbone.trainable_weights:
        variable.assign(np.random.default_rng(3).normal(size=variable.shape) * 0.3)
    task.compile(optimizer=keras.optimizers.Adam(1e-3), loss="mse")
    task.optimizer.build(task.trainable_variables)
    path = tmp_path / "tuned.weights.h5"
    task.save_weights(str(path))
    with open_checkpoint(path, config=config) as checkpoint:
        layer = backbone.get_layer("decoder_block_1").attention.query_dense
        merged = keras.ops.convert_to_numpy(layer.kernel)
        merged = np.einsum("hdk->dhk", merged).reshape(config.hidden_dim, -1)
        found = checkpoint.tensor("decoder_block_1/attention/query/kernel")
        np.testing.assert_allclose(found, merged, rtol=1e-6, atol=1e-6)


@pytest.mark.any_backend
@pytest.mark.reference
@pytest.mark.filterwarnings("ignore")
def test_quantised_presets_of_keras_hub_are_refused(tmp_path, files, keras_hub):
    backbone = keras_hub_backbone(keras_hub, files.configs["gemma"])
    backbone.quantize("int8")
    backbone.save_to_preset(str(tmp_path))
    with pytest.raises(CheckpointError, match="quantised"):
        open_checkpoint(tmp_path)


@pytest.mark.any_backend
@pytest.mark.reference
@pytest.mark.filterwarnings("ignore")
def test_text_part_of_a_multimodal_preset(tmp_path, files, keras_hub):
    config = files.configs["gemma3"]
    encoder = keras_hub.models.Gemma3VisionEncoder(
        image_size=16,
        patch_size=4,
        num_heads=2,
        hidden_dim=8,
        num_layers=1,
        intermediate_dim=12,
        output_dim=config.hidden_dim,
        pool_size=2,
    )
    raw = keras_layout.backbone_config(config)
    raw |= {"image_size": 16, "vision_encoder": encoder}
    backbone = keras_hub.models.Gemma3Backbone(**raw)
    backbone.save_to_preset(str(tmp_path))
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.config == config
        expected = as_ours(backbone.token_embedding.embeddings, config)
        assert np.array_equal(checkpoint.tensor("token_embedding/embeddings"), expected)
