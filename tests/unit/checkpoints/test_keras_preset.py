"""KerasHub presets: round trips, and KerasHub itself reading and writing them."""

import dataclasses
import json
import os
import tracemalloc
from types import SimpleNamespace

import h5py
import keras
import ml_dtypes
import numpy as np
import pytest

from gemma_keras import registry
from gemma_keras.checkpoints import CheckpointError, keras_preset, open_checkpoint


def save(folder, config, arrays, **options):
    dtype = options.pop("dtype", None) or next(iter(arrays.values())).dtype.name
    return keras_preset.save(folder, config, dtype, arrays.__getitem__, **options)


@pytest.mark.parametrize("shard", [None, 10.0, 20e-6, 1e-9])
def test_round_trip(tmp_path, files, config, dtype, shard):
    arrays = files.weights(config, dtype)
    folder = save(tmp_path / "a" / "preset", config, arrays, max_shard_size=shard)
    assert folder == tmp_path / "a" / "preset"
    assert (folder / "model.weights.h5").exists() == (shard in (None, 10.0))
    assert os.listdir(tmp_path / "a") == ["preset"]
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.config == config
        assert checkpoint.dtype == dtype
        assert checkpoint.tokenizer() is None
        files.assert_same_weights(checkpoint, arrays)


def test_shards_keep_to_their_size(tmp_path, files):
    config = files.configs["gemma3"]
    arrays = files.weights(config)
    folder = save(tmp_path / "p", config, arrays, max_shard_size=30_000 / 2**30)
    index = json.loads((folder / "model.weights.json").read_text())
    total = sum(array.nbytes for array in arrays.values())
    assert index["metadata"]["total_size"] == total
    held = {}
    for group, file in index["weight_map"].items():
        with h5py.File(folder / file) as opened:
            held[file] = held.get(file, 0) + opened[f"{group}/0"].nbytes
    assert sum(held.values()) == total
    assert max(held.values()) <= 30_000
    assert len(held) == len(list(folder.glob("model_*.weights.h5"))) > 1


def test_tokenizer_and_preprocessor(tmp_path, files, small, config):
    arrays = files.weights(config)
    settings = {"sequence_length": 77, "add_end_token": False}
    folder = save(
        tmp_path / "p", config, arrays, tokenizer=small, preprocessor_config=settings
    )
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.tokenizer() == small
        assert checkpoint.preprocessor_config() == {
            "sequence_length": 77,
            "add_start_token": True,
            "add_end_token": False,
        }


def test_one_tensor_is_held_at_a_time(tmp_path, files):
    """Saving makes no more than a copy of the tensor in hand."""
    sizes = files.sizes | {"hidden_dim": 256, "ffn_dim": 1000, "num_layers": 20}
    config = dataclasses.replace(files.configs["gemma"], **sizes)
    largest = 256 * 1000 * 4
    asked = []

    def tensor(path):
        asked.append(path)
        return np.zeros(config.weight_shapes()[path], np.float32)

    tracemalloc.start()
    folder = keras_preset.save(tmp_path / "p", config, "float32", tensor)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert asked == list(config.weight_shapes())
    assert peak < 2 * largest + 2_000_000 < config.num_parameters * 4 / 10
    size = (folder / "model.weights.h5").stat().st_size
    assert config.num_parameters * 4 < size < config.num_parameters * 4 + 1_000_000


def test_dtype_is_cast_on_request(tmp_path, files):
    config = files.configs["gemma"]
    arrays = files.weights(config)
    folder = save(tmp_path / "p", config, arrays, dtype="bfloat16")
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.dtype == "bfloat16"
        cast = {
            path: array.astype(ml_dtypes.bfloat16) for path, array in arrays.items()
        }
        files.assert_same_weights(checkpoint, cast)
    with pytest.raises(CheckpointError, match="dtype must be one of"):
        save(tmp_path / "q", config, arrays, dtype="int8")


def test_files_that_are_views(tmp_path, files):
    config = files.configs["gemma"]
    folder = save(tmp_path / "p", config, files.weights(config, "bfloat16"))
    before = (folder / "model.weights.h5").read_bytes()
    with open_checkpoint(folder) as checkpoint:
        for path in ("token_embedding/embeddings", "decoder_block_1/ffw_linear/kernel"):
            array = checkpoint.tensor(path)
            assert not array.flags.owndata
            assert array.flags.writeable
            array[:] = 0
    assert (folder / "model.weights.h5").read_bytes() == before


def test_nothing_is_overwritten_unasked(tmp_path, files):
    config = files.configs["gemma"]
    old, new = files.weights(config, seed=1), files.weights(config, seed=2)
    folder = tmp_path / "preset"
    folder.mkdir()
    save(folder, config, old)
    with pytest.raises(CheckpointError, match="overwrite=True"):
        save(folder, config, new)
    with open_checkpoint(folder) as checkpoint:
        files.assert_same_weights(checkpoint, old)
    save(folder, config, new, overwrite=True)
    with open_checkpoint(folder) as checkpoint:
        files.assert_same_weights(checkpoint, new)
    (folder / "diary.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"diary\.txt"):
        save(folder, config, old, overwrite=True)
    assert (folder / "diary.txt").read_text() == "mine"
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(CheckpointError, match="is a file"):
        save(file, config, old, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["file", "preset"]


def test_a_preset_can_replace_itself_while_it_is_mapped(tmp_path, files):
    config = files.configs["gemma"]
    arrays = files.weights(config)
    folder = save(tmp_path / "p", config, arrays)
    checkpoint = open_checkpoint(folder)
    keras_preset.save(folder, config, "float32", checkpoint.tensor, overwrite=True)
    checkpoint.close()
    with open_checkpoint(folder) as again:
        files.assert_same_weights(again, arrays)


def test_an_error_leaves_what_was_there(tmp_path, files):
    config = files.configs["gemma"]
    arrays = files.weights(config)
    folder = save(tmp_path / "p", config, arrays)

    def broken(path):
        if path.startswith("decoder_block_1"):
            raise RuntimeError("no more")
        return arrays[path]

    for target in (folder, tmp_path / "q"):
        with pytest.raises(RuntimeError, match="no more"):
            keras_preset.save(target, config, "float32", broken, overwrite=True)
    wrong = dict(arrays)
    wrong["final_normalization/scale"] = np.zeros(3, np.float32)
    with pytest.raises(CheckpointError, match=r"final_normalization/scale: has shape"):
        save(tmp_path / "q", config, wrong)
    assert os.listdir(tmp_path) == ["p"]
    with open_checkpoint(folder) as checkpoint:
        files.assert_same_weights(checkpoint, arrays)


def test_a_full_disk_is_told_before_writing(tmp_path, files, monkeypatch):
    config = files.configs["gemma"]
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    expected = r"needs 0\.1 MB, but the disk has 0\.0 MB left"
    with pytest.raises(CheckpointError, match=expected):
        save(tmp_path / "p", config, files.weights(config))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gemma", {"rope_theta": 5e5}, "rotary base is 10000, this 500000"),
        ("gemma", {"rope_scaling_factor": 2.0}, "no rope scaling"),
        ("gemma2", {"layer_pattern": "GL"}, "sliding layers follow 'LG'"),
        ("gemma2", {"query_pre_attn_scalar": 7}, r"scale queries by 7 \*\* -0.5"),
        ("gemma3", {"layer_pattern": "LG"}, "sliding layers follow 'LLLLLG'"),
        ("gemma3", {"rope_theta": 1e4}, "rotary base is 1e\\+06"),
        ("gemma3", {"local_rope_theta": None}, "base of sliding layers is 10000"),
    ],
)
def test_what_keras_hub_cannot_express(tmp_path, files, family, changes, message):
    config = dataclasses.replace(files.configs[family], **changes)
    arrays = files.weights(config)
    with pytest.raises(CheckpointError, match=message):
        save(tmp_path / "p", config, arrays)
    with pytest.warns(UserWarning, match=message):
        save(tmp_path / "p", config, arrays, strict=False)
    with open_checkpoint(tmp_path / "p") as checkpoint:
        assert checkpoint.config == config
        files.assert_same_weights(checkpoint, arrays)


def test_what_keras_hub_computes_otherwise_is_said(tmp_path, files):
    config = dataclasses.replace(
        files.configs["gemma2"], query_pre_attn_scalar=6.0, norm_epsilon=1e-5
    )
    with pytest.warns(UserWarning, match=r"by 6 \*\* -0.5.*epsilon 1e-06"):
        save(tmp_path / "p", config, files.weights(config))
    stored = json.loads((tmp_path / "p" / "config.json").read_text())["config"]
    assert stored["query_head_dim_normalize"] is False
    with open_checkpoint(tmp_path / "p") as checkpoint:
        assert checkpoint.config == config
    # Without our own record, as after KerasHub has saved it again.
    (tmp_path / "p" / "metadata.json").unlink()
    with open_checkpoint(tmp_path / "p") as checkpoint:
        assert checkpoint.config == config


def edit(file, change):
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def test_configs_that_disagree(tmp_path, files, config):
    folder = save(tmp_path / "p", config, files.weights(config))
    edit(
        folder / "config.json",
        lambda raw: raw["config"].update(final_logit_soft_cap=9.0),
    )
    with pytest.raises(CheckpointError, match=r"metadata\.json.*final_logit_soft_cap"):
        open_checkpoint(folder)
    edit(folder / "metadata.json", lambda raw: raw.pop("gemma_keras"))
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.config.final_logit_soft_cap == 9.0


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gemma", {"hidden_dim": 25}, "has shape"),
        ("gemma", {"num_layers": 4}, "gemma_decoder_block_3/.* is missing"),
        ("gemma", {"num_layers": 2}, "no part of the Gemma"),
        ("gemma", {"num_layers": 10**9}, "layers are more"),
        ("gemma", {"num_layers": 900}, "too few"),
        ("gemma", {"intermediate_dim": "x"}, "intermediate_dim must be"),
        ("gemma", {"use_post_ffw_norm": True}, "must be equal"),
        ("gemma3", {"is_embedding_model": True}, "embedding models"),
        ("gemma3", {"use_bidirectional_attention": True}, "bidirectional"),
        ("gemma3", {"use_query_key_norm": False}, "use_query_key_norm"),
        ("gemma3", {"local_rope_scaling_factor": 2.0}, "local_rope_scaling_factor"),
        ("gemma3", {"global_rope_scaling_factor": None}, "rope_scaling_factor"),
        (
            "gemma2",
            {"query_head_dim_normalize": False, "hidden_dim": "a"},
            "hidden_dim must be",
        ),
    ],
)
def test_configs_that_are_refused(tmp_path, files, family, changes, message):
    config = files.configs[family]
    folder = save(tmp_path / "p", config, files.weights(config))
    (folder / "metadata.json").unlink()
    edit(folder / "config.json", lambda raw: raw["config"].update(changes))
    with pytest.raises(CheckpointError, match=message) as error:
        open_checkpoint(folder)
    assert str(folder) in str(error.value)


def test_backbones_that_are_not_gemma(tmp_path, files):
    config = files.configs["gemma"]
    folder = save(tmp_path / "p", config, files.weights(config))
    edit(folder / "config.json", lambda raw: raw.update(class_name="PaliGemmaBackbone"))
    with pytest.raises(CheckpointError, match=r"PaliGemmaBackbone.*not supported"):
        open_checkpoint(folder)
    edit(folder / "config.json", lambda raw: raw.pop("class_name"))
    with pytest.raises(CheckpointError, match=r"None.*not supported"):
        open_checkpoint(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: is missing"):
        open_checkpoint(folder)


def test_preset_of_keras_nlp(tmp_path, files):
    """Old class names, no late config keys, and Keras 3.0's name of the top group."""
    config = files.configs["gemma"]
    arrays = files.weights(config, "float16")
    folder = save(tmp_path / "p", config, arrays)

    def age(raw):
        raw["module"] = "keras_nlp.src.models.gemma.gemma_backbone"
        raw["registered_name"] = "keras_nlp>GemmaBackbone"
        for key in list(raw["config"]):
            if key.startswith(("query_", "use_", "final_", "attention_", "sliding_")):
                del raw["config"][key]

    edit(folder / "config.json", age)
    edit(folder / "metadata.json", lambda raw: raw.pop("gemma_keras"))
    with h5py.File(folder / "model.weights.h5", "a") as file:
        file.move("layers", "_layer_checkpoint_dependencies")
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.config == config
        files.assert_same_weights(checkpoint, arrays)


def test_weights_of_a_whole_task(tmp_path, files, config):
    """What `save_weights` of a compiled GemmaCausalLM writes, beside a config.json."""
    arrays = files.weights(config)
    folder = save(tmp_path / "p", config, arrays)
    with h5py.File(folder / "model.weights.h5", "a") as file:
        file.move("layers", "moved")
        file.move("moved", f"layers/{config.family[:6]}_backbone/layers")
        for number in range(4):
            file[f"optimizer/vars/{number}"] = np.zeros((3, number), np.float32)
    with open_checkpoint(folder) as checkpoint:
        files.assert_same_weights(checkpoint, arrays)


def test_bare_weights_of_a_published_architecture(tmp_path, files, monkeypatch):
    """The shapes name the model; what they cannot tell comes from the registry."""
    known = dataclasses.replace(files.configs["gemma2"], query_pre_attn_scalar=6.0)
    config = dataclasses.replace(known, vocab_size=71)
    arrays = files.weights(config)
    with pytest.warns(UserWarning):
        folder = save(tmp_path / "p", config, arrays)
    bare = tmp_path / "tuned.weights.h5"
    (folder / "model.weights.h5").rename(bare)
    with pytest.raises(
        CheckpointError, match=r"tuned\.weights\.h5.*config=GemmaConfig"
    ):
        open_checkpoint(bare)
    with open_checkpoint(bare, config=config) as checkpoint:
        files.assert_same_weights(checkpoint, arrays)
    monkeypatch.setattr(registry, "architectures", lambda: {"gemma2_tiny": known})
    with open_checkpoint(bare) as checkpoint:
        assert checkpoint.config == config
        files.assert_same_weights(checkpoint, arrays)


def test_rope_scaling_that_old_presets_lack(files, monkeypatch):
    from gemma_keras.checkpoints import keras_layout

    known = registry.architectures()["gemma3_4b_text"]
    raw = keras_layout.backbone_config(known)
    assert keras_layout.gemma_config("gemma3", raw, "x") == known
    del raw["global_rope_scaling_factor"]
    assert keras_layout.gemma_config("gemma3", raw, "x") == known
    raw["hidden_dim"] += 2
    assert keras_layout.gemma_config("gemma3", raw, "x").rope_scaling_factor == 1.0


@pytest.mark.parametrize("name", list(registry.architectures()))
def test_published_configs_survive_keras_hub(name):
    from gemma_keras.checkpoints import keras_layout

    config = registry.architectures()[name]
    raw = keras_layout.backbone_config(config)
    assert keras_layout.gemma_config(keras_layout.family(config), raw, name) == config
    errors, warnings = keras_layout.shortcomings(config)
    assert not errors
    assert bool(warnings) == name.endswith(("27b", "27b_text"))


# What follows needs KerasHub itself.


@pytest.fixture
def keras_hub():
    return pytest.importorskip("keras_hub")


def keras_hub_backbone(keras_hub, config, dtype="float32"):
    from gemma_keras.checkpoints import keras_layout

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


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shard", [10.0, 30e-6])
def test_presets_that_keras_hub_reads(
    tmp_path, files, small, keras_hub, config, dtype, shard
):
    """KerasHub's own from_preset gives the weights and settings that were saved."""
    arrays = files.weights(config, dtype)
    folder = save(
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
    from gemma_keras.causal_lm import GemmaCausalLM

    arrays = {path: array * 0.3 for path, array in files.weights(config).items()}
    folder = save(tmp_path / "ours", config, arrays)
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


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore")
def test_quantised_presets_of_keras_hub_are_refused(tmp_path, files, keras_hub):
    backbone = keras_hub_backbone(keras_hub, files.configs["gemma"])
    backbone.quantize("int8")
    backbone.save_to_preset(str(tmp_path))
    with pytest.raises(CheckpointError, match="quantised"):
        open_checkpoint(tmp_path)


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore")
def test_text_part_of_a_multimodal_preset(tmp_path, files, keras_hub):
    from gemma_keras.checkpoints import keras_layout

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
