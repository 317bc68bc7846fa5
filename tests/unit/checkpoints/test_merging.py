"""An adapter merged while a checkpoint is converted."""

import ml_dtypes
import numpy as np
import pytest

from gemma_keras import lora_config
from gemma_keras.checkpoints import (
    CheckpointError,
    exporting,
    merging,
    open_checkpoint,
    peft,
)
from gemma_keras.checkpoints.contents import Contents

pytestmark = pytest.mark.any_backend


def adapter(config, **fields):
    """A random adapter, with the magnitudes that DoRA begins with, shaken."""
    lora = lora_config.LoraConfig(rank=3, **fields)
    random = np.random.default_rng(7)
    weights = {}
    for path, (rows, columns) in lora_config.layer_shapes(config).items():
        if lora.adapts(path):
            weights[path] = {
                "lora_a": random.normal(size=(rows, 3)).astype("float32"),
                "lora_b": random.normal(size=(3, columns)).astype("float32"),
            }
            if lora.dora:
                sizes = random.uniform(1, 3, columns).astype("float32")
                weights[path]["lora_magnitude"] = sizes
    return peft.Adapter(lora, weights)


def expected_kernel(kernel, factors, scale):
    """The formulas of the papers, in float64."""
    wide = {name: array.astype("float64") for name, array in factors.items()}
    total = kernel.astype("float64") + scale * wide["lora_a"] @ wide["lora_b"]
    if "lora_magnitude" in wide:
        total *= wide["lora_magnitude"] / np.linalg.norm(total, axis=0)
    return total


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "fields",
    [
        {"alpha": 5},
        {"targets": "all-linear", "rslora": True, "alpha": 4},
        {"targets": ["key", "ffw_linear"], "dora": True},
    ],
    ids=["lora", "rslora", "dora"],
)
def test_kernels_are_what_the_formulas_say(tmp_path, files, config, fields, dtype):
    arrays = files.weights(config, dtype)
    contents = Contents(config=config, tensors=arrays.__getitem__, dtype=dtype)
    lora, weights = found = adapter(config, **fields)
    merged = merging.merge(contents, found)
    exporting.export(merged, tmp_path / "m", "hf")
    # Half a unit in the last place, and the rounding of float32 before it.
    tolerance = {"float32": 1e-6, "bfloat16": 2.0**-8 + 1e-6}[dtype]
    with open_checkpoint(tmp_path / "m") as checkpoint:
        for path, array in arrays.items():
            stored, layer = checkpoint.tensor(path), path.rsplit("/", 1)[0]
            assert stored.dtype == array.dtype
            if layer not in weights:
                assert stored.tobytes() == array.tobytes()
                continue
            exact = expected_kernel(array, weights[layer], lora.scale_of(layer))
            assert np.abs(exact - array.astype("float64")).max() > 0.1
            error = np.abs(stored.astype("float64") - exact)
            assert (error <= tolerance * (1 + np.abs(exact))).all(), path
    kind = "DoRA" if lora.dora else "LoRA"
    sentence = f"Low-rank updates ({kind}, rank 3, alpha "
    assert merged.provenance.modified[0].startswith(sentence)
    assert not contents.provenance.modified


def test_the_source_is_left_as_it_is(files, config):
    arrays = files.weights(config)
    before = {path: array.copy() for path, array in arrays.items()}
    contents = Contents(config=config, tensors=arrays.__getitem__, dtype="float32")
    merged = merging.merge(contents, adapter(config))
    for path in arrays:
        merged.tensors(path)
        np.testing.assert_array_equal(arrays[path], before[path])


def test_an_update_of_the_embedding_is_refused(files, config):
    arrays = files.weights(config)
    contents = Contents(config=config, tensors=arrays.__getitem__, dtype="float32")
    with pytest.raises(CheckpointError, match="updates the embedding, which cannot"):
        merging.merge(contents, adapter(config, targets=["query", "token_embedding"]))


def test_a_column_of_nothing_stays_nothing():
    """DoRA divides by the norm of a column, which may be zero."""
    kernel = np.zeros((4, 2), ml_dtypes.bfloat16)
    factors = {"lora_a": np.zeros((4, 1)), "lora_b": np.zeros((1, 2))}
    factors = {name: array.astype("float32") for name, array in factors.items()}
    factors["lora_magnitude"] = np.ones(2, "float32")
    merged = merging.merged_kernel(kernel, factors, 1.0)
    assert merged.dtype == kernel.dtype and not merged.astype("float32").any()
