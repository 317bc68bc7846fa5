"""Files that Keras writes of a model, and low-rank updates in them."""

import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import ops

from gemma_keras import GemmaBackbone, samplers
from gemma_keras.projection import adapted_layers


def logits(lm):
    ids = np.arange(3, 33).reshape(2, 15)
    return ops.convert_to_numpy(lm({"token_ids": ids}))


def shake(lm):
    """Give every trainable weight, and so every low-rank factor, a new value."""
    random = np.random.default_rng(5)
    for variable in lm.trainable_variables:
        variable.assign(0.1 * random.normal(size=variable.shape))


def test_a_keras_file_holds_everything(new_lm, tmp_path):
    lm = new_lm()
    lm.compile(optimizer=keras.optimizers.Adam(0.01), sampler="top_k")
    lm.fit(["The cat sat"], verbose=0)
    lm.save(tmp_path / "lm.keras")
    again = keras.models.load_model(tmp_path / "lm.keras")
    np.testing.assert_array_equal(logits(again), logits(lm))
    assert again.config == lm.config
    assert again.preprocessor.tokenizer == lm.preprocessor.tokenizer
    assert again.preprocessor.sequence_length == lm.preprocessor.sequence_length
    assert again.sampler == samplers.TopKSampler()
    assert float(again.optimizer.learning_rate) == pytest.approx(0.01)
    assert len(again.optimizer.variables) == len(lm.optimizer.variables)
    for new, old in zip(again.optimizer.variables, lm.optimizer.variables, strict=True):
        np.testing.assert_array_equal(
            ops.convert_to_numpy(new), ops.convert_to_numpy(old)
        )
    text = again.generate("The cat", max_new_tokens=5, sampler="greedy")
    assert text == lm.generate("The cat", max_new_tokens=5, sampler="greedy")


@pytest.mark.slow
def test_a_keras_file_loads_where_only_the_package_is_imported(new_lm, tmp_path):
    lm = new_lm()
    lm.save(tmp_path / "lm.keras")
    np.save(tmp_path / "logits.npy", logits(lm))
    code = (
        "import gemma_keras, keras, numpy as np\n"
        "lm = keras.models.load_model('lm.keras')\n"
        "ids = np.arange(3, 33).reshape(2, 15)\n"
        "found = keras.ops.convert_to_numpy(lm({'token_ids': ids}))\n"
        "np.testing.assert_allclose(found, np.load('logits.npy'), atol=1e-6)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_weights_go_to_a_file_and_back(new_lm, tmp_path):
    lm, other = new_lm(), new_lm()
    shake(other)
    assert np.abs(logits(other) - logits(lm)).max() > 0.1
    lm.save_weights(tmp_path / "lm.weights.h5")
    other.load_weights(tmp_path / "lm.weights.h5")
    np.testing.assert_array_equal(logits(other), logits(lm))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed_bfloat16"])
def test_configs_rebuild_the_backbone(new_lm, dtype):
    backbone = new_lm(dtype=dtype).backbone
    again = GemmaBackbone.from_config(backbone.get_config())
    assert again.config == backbone.config
    assert again.dtype_policy == backbone.dtype_policy
    assert [v.path for v in again.variables] == [v.path for v in backbone.variables]


def test_clones_have_the_shape_and_not_the_weights(new_lm):
    lm = new_lm()
    clone = keras.models.clone_model(lm)
    assert clone.config == lm.config
    assert np.abs(logits(clone) - logits(lm)).max() > 1e-3
    clone.set_weights(lm.get_weights())
    np.testing.assert_array_equal(logits(clone), logits(lm))


def test_lora_starts_as_nothing_and_trains_nothing_else(new_lm):
    lm = new_lm()
    before = logits(lm)
    lm.backbone.enable_lora(3)
    np.testing.assert_array_equal(logits(lm), before)
    paths = {variable.path for variable in lm.trainable_variables}
    assert paths == {
        f"decoder_block_{i}/attention/{name}/lora_{factor}"
        for i in range(lm.config.num_layers)
        for name in ("query", "value")
        for factor in "ab"
    }
    shake(lm)
    assert np.abs(logits(lm) - before).max() > 0.01


def test_the_update_is_the_merged_kernel(new_lm):
    lm = new_lm()
    every = [*("query", "key", "value", "attention_output"), "ffw_gating", "ffw_linear"]
    lm.backbone.enable_lora(2, target_layer_names=every, alpha=5)
    shake(lm)
    for layer in adapted_layers(lm.backbone).values():
        if not layer.adapters:
            assert layer.name in ("ffw_gating_2", "token_embedding")
            continue
        factors = layer.adapters["default"]
        a, b = (ops.convert_to_numpy(x) for x in (factors.a, factors.b))
        kernel = ops.convert_to_numpy(layer.kernel)
        x = np.random.default_rng(0).normal(size=(3, len(kernel))).astype("float32")
        expected = x @ kernel + 5 / 2 * (x @ a) @ b
        found = ops.convert_to_numpy(layer(ops.convert_to_tensor(x)))
        np.testing.assert_allclose(found, expected, atol=1e-4)
        merged = ops.convert_to_numpy(layer.merged_weight())
        np.testing.assert_allclose(x @ merged, expected, atol=1e-4)


def test_low_rank_factors_survive_a_keras_file(new_lm, tmp_path):
    lm = new_lm()
    lm.backbone.enable_lora(3, alpha=6)
    shake(lm)
    lm.save(tmp_path / "lm.keras")
    again = keras.models.load_model(tmp_path / "lm.keras")
    np.testing.assert_array_equal(logits(again), logits(lm))
    assert len(again.trainable_variables) == len(lm.trainable_variables)
    assert again.adapters == lm.adapters
    assert again.adapters["default"].alpha == 6


def test_weights_without_factors_load_into_a_model_with_them(new_lm, tmp_path):
    plain, adapted = new_lm(), new_lm()
    plain.save_weights(tmp_path / "plain.weights.h5")
    adapted.backbone.enable_lora(3)
    shake(adapted)
    adapted.load_weights(tmp_path / "plain.weights.h5")
    np.testing.assert_array_equal(logits(adapted), logits(plain))
    # Not both factors at zero: such a model could never learn.
    first = adapted.backbone.blocks[0].attention.query
    assert np.abs(ops.convert_to_numpy(first.adapters["default"].a)).max() > 0


def test_factors_are_not_dropped_silently(new_lm, tmp_path):
    adapted = new_lm()
    adapted.backbone.enable_lora(3)
    adapted.save_weights(tmp_path / "adapted.weights.h5")
    with pytest.raises(ValueError, match="enable_lora"):
        new_lm().load_weights(tmp_path / "adapted.weights.h5")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank must be a positive integer"),
        ({"rank": 2, "alpha": -1}, "alpha must be a positive number"),
        ({"rank": 2, "target_layer_names": ["quary"]}, "No projection is called quary"),
    ],
)
def test_lora_refuses_what_makes_no_update(new_lm, arguments, message):
    lm = new_lm()
    with pytest.raises(ValueError, match=message):
        lm.backbone.enable_lora(**arguments)
    assert len(lm.trainable_variables) == len(lm.variables)


def test_lora_is_enabled_once(new_lm):
    lm = new_lm()
    lm.backbone.enable_lora(2)
    with pytest.raises(ValueError, match="already has LoRA"):
        lm.backbone.enable_lora(2)


def test_generate_follows_the_weights(new_lm):
    """Programs compiled before LoRA, or before training, must not be used after."""
    lm = new_lm()
    before = lm.generate("The cat", max_new_tokens=8, stop_token_ids=())
    lm.backbone.enable_lora(4)
    assert lm.generate("The cat", max_new_tokens=8, stop_token_ids=()) == before
    for variable in lm.trainable_variables:
        noise = np.random.default_rng(1).normal(size=variable.shape)
        variable.assign(noise)
    after = lm.generate("The cat", max_new_tokens=8, stop_token_ids=())
    assert after != before


def test_presets_are_written_with_updates_merged(new_lm, tmp_path):
    from gemma_keras import GemmaCausalLM

    lm = new_lm()
    lm.backbone.enable_lora(3)
    shake(lm)
    # Its pattern of layers is one that KerasHub does not have.
    with pytest.warns(UserWarning, match="KerasHub"):
        lm.save_to_preset(tmp_path / "preset")
    again = GemmaCausalLM.from_preset(tmp_path / "preset")
    np.testing.assert_allclose(logits(again), logits(lm), atol=2e-5)
    assert again.config == lm.config
    assert len(again.variables) < len(lm.variables)


def test_lora_weights_have_a_file_of_their_own(new_lm, tmp_path):
    lm, other = new_lm(), new_lm()
    lm.backbone.enable_lora(3, target_layer_names=["query", "ffw_linear"], alpha=7)
    shake(lm)
    lm.backbone.save_lora_weights(tmp_path / "a.lora.h5")
    other.backbone.load_lora_weights(tmp_path / "a.lora.h5")
    np.testing.assert_array_equal(logits(other), logits(lm))
    assert [p.name for p in tmp_path.iterdir()] == ["a.lora.h5"]


def test_lora_files_that_do_not_fit_are_refused_and_change_nothing(new_lm, tmp_path):
    lm, plain = new_lm(), new_lm()
    lm.backbone.enable_lora(3)
    path = tmp_path / "a.lora.h5"
    lm.backbone.save_lora_weights(path)
    with pytest.raises(ValueError, match="no low-rank update to save"):
        plain.backbone.save_lora_weights(path)
    with pytest.raises(ValueError, match=r"must end in \.lora\.h5"):
        lm.backbone.save_lora_weights(tmp_path / "a.h5")
    with pytest.raises(FileNotFoundError):
        plain.backbone.load_lora_weights(tmp_path / "b.lora.h5")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is damaged or cut short"):
        plain.backbone.load_lora_weights(path)
    path.write_bytes(whole)
    other = new_lm()
    other.backbone.enable_lora(2)
    with pytest.raises(ValueError, match="but the model has"):
        other.backbone.load_lora_weights(path)
    assert len(plain.trainable_variables) == len(plain.variables)
