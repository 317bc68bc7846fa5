"""Files that end in .lora.h5: damaged ones, and KerasHub's."""

import h5py
import numpy as np
import pytest

from gemma_keras.checkpoints import CheckpointError, keras_layout, lora_file
from gemma_keras.lora_config import LoraConfig, layer_shapes

pytestmark = pytest.mark.any_backend


@pytest.fixture
def config(files):
    """A tiny Gemma 2: width 24, three layers, four heads of 10, two for keys."""
    return files.configs["gemma2"]


def adapter(config, **fields):
    lora, random = LoraConfig(rank=2, **fields), np.random.default_rng(0)
    weights = {}
    for path, (rows, columns) in layer_shapes(config).items():
        if lora.adapts(path):
            shapes = {"lora_a": (rows, 2), "lora_b": (2, columns)}
            if lora.dora:
                shapes["lora_magnitude"] = (columns,)
            weights[path] = {
                key: random.normal(size=shape).astype("float32")
                for key, shape in shapes.items()
            }
    return lora, weights


@pytest.mark.parametrize("dora", [False, True])
def test_what_is_written_is_read_again(config, tmp_path, dora):
    lora, weights = adapter(config, targets=["token_embedding", "key"], dora=dora)
    lora_file.write(tmp_path / "a.lora.h5", lora, weights)
    found, arrays = lora_file.read(tmp_path / "a.lora.h5", config)
    assert found == lora
    for path, expected in weights.items():
        assert arrays[path].keys() == expected.keys()
        for key, array in expected.items():
            np.testing.assert_array_equal(arrays[path][key], array)


def test_wrong_files_are_refused(config, tmp_path, files):
    path = tmp_path / "a.lora.h5"
    lora, weights = adapter(config)
    weights["decoder_block_1/attention/query"]["lora_a"][3, 1] = np.inf
    lora_file.write(path, lora, weights)
    with pytest.raises(CheckpointError, match="decoder_block_1/attention/query/lora_a"):
        lora_file.read(path, config)
    lora_file.write(path, *adapter(config))
    with pytest.raises(CheckpointError, match="does not fit this model"):
        lora_file.read(path, files.configs["gemma3"])
    with h5py.File(path, "r+") as file:
        file.attrs["gemma_keras"] = '{"rank": "2"}'
    with pytest.raises(CheckpointError, match="rank must be a positive integer"):
        lora_file.read(path, config)


def keras_hub_file(path, number, a, b):
    with h5py.File(path, "w") as file:
        file["lora/vars/rank"] = 3
        file[f"lora/{number}/vars/lora_kernel_a"] = a.astype("float32")
        file[f"lora/{number}/vars/lora_kernel_b"] = b.astype("float32")


def test_factors_of_each_head_become_blocks(config, tmp_path):
    random = np.random.default_rng(0)
    a, b = random.normal(size=(4, 24, 3)), random.normal(size=(3, 10))
    # KerasHub's numbers of a Gemma 2: embedding 0, block 1, ..., query 11.
    keras_hub_file(tmp_path / "a.lora.h5", 11, a, b)
    lora, weights = lora_file.read(tmp_path / "a.lora.h5", config)
    assert lora.targets == ("decoder_block_0/attention/query",)
    assert (lora.rank, lora.scale_of(lora.targets[0])) == (12, 1)
    (found,) = weights.values()
    # KerasHub's kernel is [N, D, H], ours [D, N H].
    kernel = np.einsum("ndr,rh->dnh", a, b).reshape(24, 40)
    np.testing.assert_allclose(found["lora_a"] @ found["lora_b"], kernel, atol=1e-5)


@pytest.mark.parametrize(
    ("number", "a", "b"),
    [
        (11, (4, 24, 3), (3, 11)),
        (11, (4, 24, 3), (2, 10)),
        (11, (2, 24, 3), (3, 10)),
        (12, (4, 24, 3), (3, 10)),
        (99, (4, 24, 3), (3, 10)),
    ],
)
def test_factors_of_another_model_are_refused(config, tmp_path, number, a, b):
    keras_hub_file(tmp_path / "a.lora.h5", number, np.ones(a), np.ones(b))
    with pytest.raises(CheckpointError, match=f"lora/{number}") as error:
        lora_file.read(tmp_path / "a.lora.h5", config)
    assert "a.lora.h5" in str(error.value)


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
def test_files_that_keras_hub_writes(files, tmp_path, family):
    keras_hub = pytest.importorskip("keras_hub")
    config = files.configs[family]
    raw = keras_layout.backbone_config(config)
    kind = "Gemma3" if family == "gemma3" else "Gemma"
    backbone = getattr(keras_hub.models, f"{kind}Backbone")(**raw)
    names = {path.rsplit("/", 1)[-1] for path in layer_shapes(config)}
    backbone.enable_lora(2, target_layer_names=sorted(names - {"token_embedding"}))
    random = np.random.default_rng(0)
    expected = {}
    for layer in backbone._flatten_layers(include_self=False):
        if getattr(layer, "lora_enabled", False):
            a = random.normal(size=layer.lora_kernel_a.shape)
            b = random.normal(size=layer.lora_kernel_b.shape)
            layer.lora_kernel_a.assign(a)
            layer.lora_kernel_b.assign(b)
            update = keras_layout.from_stored(f"{layer.path}/kernel", a @ b, config)
            expected[layer.path] = update
    backbone.save_lora_weights(str(tmp_path / "hub.lora.h5"))
    lora, weights = lora_file.read(tmp_path / "hub.lora.h5", config)
    assert weights.keys() == expected.keys()
    assert set(lora.targets) == names - {"token_embedding"}
    for path, arrays in weights.items():
        found = arrays["lora_a"] @ arrays["lora_b"]
        np.testing.assert_allclose(found, expected[path], atol=1e-5)
        assert lora.scale_of(path) == 1
        assert lora.rank_of(path) == arrays["lora_a"].shape[1]
