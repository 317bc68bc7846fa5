"""Orbax directories of Flax and MaxText: what comes back, and what is refused."""

import dataclasses
import json
import shutil

import ml_dtypes
import numpy as np
import pytest

from gemma_keras.checkpoints import CheckpointError, exporting, open_checkpoint
from gemma_keras.checkpoints.contents import Contents

pytest.importorskip("tensorstore")
pytestmark = pytest.mark.any_backend

LAYOUTS = [
    ("flax", "flat"),
    ("flax", "nested"),
    ("maxtext", "scanned"),
    ("maxtext", "unscanned"),
]


def fitting(config, **changes):
    """A config that both formats can hold: Gemma 2 has pairs of layers in MaxText."""
    layers = 4 if config.family == "gemma2" else config.num_layers
    return dataclasses.replace(config, num_layers=layers, **changes)


def write(folder, config, arrays, format, layout, **options):
    dtype = next(iter(arrays.values())).dtype.name
    contents = Contents(config=config, tensors=arrays.__getitem__, dtype=dtype)
    return exporting.export(contents, folder, format, layout=layout, **options)


@pytest.mark.parametrize("kv_heads", [2, 1, 4])
@pytest.mark.parametrize("layout", ["flat", "nested"])
def test_flax_keeps_every_bit(tmp_path, files, config, dtype, layout, kv_heads):
    config = fitting(config, num_kv_heads=kv_heads)
    arrays = files.weights(config, dtype)
    path = write(tmp_path / "m", config, arrays, "flax", layout)
    with open_checkpoint(path) as checkpoint:
        assert (checkpoint.config, checkpoint.dtype) == (config, dtype)
        files.assert_same_weights(checkpoint, arrays)


@pytest.mark.parametrize("kv_heads", [2, 1, 4])
@pytest.mark.parametrize("layout", ["scanned", "unscanned"])
def test_maxtext_keeps_every_bit_of_16(tmp_path, files, config, layout, kv_heads):
    config = fitting(config, num_kv_heads=kv_heads)
    for dtype in ("bfloat16", "float16"):
        arrays = files.weights(config, dtype)
        for path in arrays:
            if path.endswith("scale"):
                # What 1 + w in float32 keeps every bit of.
                arrays[path][abs(arrays[path]) < 2**-13] = 0
        path = write(tmp_path / dtype, config, arrays, "maxtext", layout)
        with open_checkpoint(path) as checkpoint:
            assert (checkpoint.config, checkpoint.dtype) == (config, "float32")
            for name, expected in arrays.items():
                found = checkpoint.tensor(name)
                assert found.dtype == np.float32
                np.testing.assert_array_equal(found, expected.astype("float32"), name)


@pytest.mark.parametrize("layout", ["scanned", "unscanned"])
def test_maxtext_keeps_float32_within_its_last_bit(tmp_path, files, config, layout):
    config = fitting(config)
    arrays = files.weights(config)
    path = write(tmp_path / "m", config, arrays, "maxtext", layout)
    with open_checkpoint(path) as checkpoint:
        for name, expected in arrays.items():
            bit = np.spacing(np.abs(expected))
            if name.endswith("scale"):
                bit = np.maximum(bit, np.spacing(np.abs(expected) + np.float32(1)))
            assert (np.abs(checkpoint.tensor(name) - expected) <= bit).all(), name


def test_padding_rows_are_added_and_dropped(tmp_path, files):
    config = dataclasses.replace(
        files.configs["gemma"], vocab_size=256_000, hidden_dim=2, num_layers=1
    )
    arrays = files.weights(config, "bfloat16")
    for format, layout in LAYOUTS[::2]:
        told = []
        path = write(
            tmp_path / format, config, arrays, format, layout, report=told.append
        )
        assert "128 rows of zeros were added" in " ".join(told)
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.config.vocab_size == 256_000
            found = checkpoint.tensor("token_embedding/embeddings")
        expected = arrays["token_embedding/embeddings"]
        np.testing.assert_array_equal(
            found.astype("float32"), expected.astype("float32")
        )


@pytest.mark.reference
def test_orbax_restores_the_documented_trees(tmp_path, files):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    config = files.configs["gemma"]
    arrays = files.weights(config, "bfloat16")

    def restore(format, layout, place):
        path = write(tmp_path / layout, config, arrays, format, layout)
        return checkpoint.PyTreeCheckpointer().restore(str(path / place))

    tree = restore("flax", "flat", "checkpoint")
    block = "transformer/layer_2"
    assert tree["transformer/embedder"]["input_embedding"].shape == (70, 24)
    assert tree[f"{block}/attn/q_einsum"]["w"].shape == (4, 24, 10)
    assert tree[f"{block}/attn/kv_einsum"]["w"].shape == (2, 2, 24, 10)
    assert tree[f"{block}/attn/attn_vec_einsum"]["w"].shape == (4, 10, 24)
    assert tree[f"{block}/mlp/gating_einsum"]["w"].shape == (2, 24, 40)
    assert tree[f"{block}/mlp/linear"]["w"].shape == (40, 24)
    query = arrays["decoder_block_2/attention/query/kernel"].astype("float32")
    found = np.asarray(tree[f"{block}/attn/q_einsum"]["w"], "float32")
    np.testing.assert_array_equal(found[3], query[:, 30:])
    params = restore("maxtext", "scanned", "0/items")["params"]["params"]
    layers = params["decoder"]["layers"]
    assert layers["self_attention"]["query"]["kernel"].shape == (24, 3, 4, 10)
    assert layers["self_attention"]["out"]["kernel"].shape == (4, 3, 10, 24)
    assert layers["mlp"]["wo"]["kernel"].shape == (40, 3, 24)
    assert layers["pre_ffw_norm"]["scale"].shape == (24, 3)
    found = layers["self_attention"]["query"]["kernel"][:, 2, 3]
    np.testing.assert_allclose(found, query[:, 30:] * 10**-0.5, rtol=1e-6)
    table = arrays["token_embedding/embeddings"].astype("float32")
    found = params["token_embedder"]["embedding"]
    np.testing.assert_allclose(found, table * 24**0.5, rtol=1e-6)
    one = restore("maxtext", "unscanned", "0/items")["params"]["params"]["decoder"]
    norm = arrays["decoder_block_1/pre_ffw_norm/scale"].astype("float32")
    np.testing.assert_allclose(one["layers_1"]["pre_ffw_norm"]["scale"], 1 + norm)


def test_what_a_format_cannot_hold_is_refused(tmp_path, files):
    odd = files.configs["gemma2"]
    with pytest.raises(CheckpointError, match="layers"):
        write(tmp_path / "m", odd, files.weights(odd), "maxtext", "scanned")
    config = files.configs["gemma"]
    with pytest.raises(CheckpointError, match="layouts flat, nested; got 'scanned'"):
        write(tmp_path / "m", config, files.weights(config), "flax", "scanned")
    with pytest.raises(CheckpointError, match="one layout only"):
        write(tmp_path / "m", config, files.weights(config), "hf", "flat")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    config = files.configs["gemma"]
    folder = tmp_path_factory.mktemp("orbax") / "m"
    arrays = files.weights(config, ml_dtypes.bfloat16)
    return write(folder, config, arrays, "flax", "flat")


def changed(whole, folder, name, value):
    """A copy whose gemma_config.json says something else."""
    shutil.copytree(whole, folder)
    where = folder / "gemma_config.json"
    raw = json.loads(where.read_text())
    where.write_text(json.dumps(raw | {name: value}))
    return folder


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("num_layers", 900, "layers"),
        ("num_layers", 10**9, "layers"),
        ("hidden_dim", 26, "shape"),
        ("ffn_dim", 41, "shape"),
        ("head_dim", "10", "head_dim"),
        ("nonsense", 1, "nonsense"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(whole, tmp_path, name, value, told):
    folder = changed(whole, tmp_path / "m", name, value)
    with pytest.raises(CheckpointError, match=told):
        open_checkpoint(folder)


def test_damaged_directories_are_refused(whole, tmp_path):
    inner = "checkpoint"
    for number, damage in enumerate(
        (
            lambda folder: (folder / "_METADATA").write_text("{"),
            lambda folder: (folder / "_METADATA").write_text('{"tree_metadata": 3}'),
            lambda folder: (folder / "_METADATA").write_text(
                '{"tree_metadata": {"a": {"key_metadata": [{"key": "../../etc"}], '
                '"value_metadata": {"value_type": "np.ndarray"}}}}'
            ),
            lambda folder: (folder / "manifest.ocdbt").write_bytes(b"nothing"),
        )
    ):
        folder = tmp_path / str(number)
        shutil.copytree(whole, folder)
        damage(folder / inner)
        before = sorted(tmp_path.iterdir())
        with pytest.raises(CheckpointError):
            open_checkpoint(folder)
        assert sorted(tmp_path.iterdir()) == before


def test_a_file_cut_short_is_told_on_reading(whole, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(whole, folder)
    largest = max(
        (f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size
    )
    # By half: its end may be an index that a later one has replaced.
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    with pytest.raises(CheckpointError), open_checkpoint(folder) as checkpoint:
        for path in checkpoint.config.weight_shapes():
            checkpoint.tensor(path)
