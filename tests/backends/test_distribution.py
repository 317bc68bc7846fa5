"""Training over eight simulated devices gives the losses of one.

On JAX alone: Keras distributes layouts nowhere else. In a process of its own, since the
number of devices is settled when JAX starts.
"""

import json
import os
import subprocess
import sys

import keras
import pytest

from gemma_keras import GemmaBackbone

PROGRAM = """
import json

import keras
import numpy as np

from gemma_keras import GemmaBackbone, GemmaCausalLM, GemmaConfig


def fit(num_kv_heads, lora=False, steps=None):
    config = GemmaConfig(
        vocab_size=128, num_layers=1, hidden_dim=32, ffn_dim=64, num_query_heads=4,
        num_kv_heads=num_kv_heads, head_dim=16, query_pre_attn_scalar=16.0,
        max_position=64,
    )
    distribute(config)
    init = lambda path: keras.initializers.RandomNormal(0.0, 0.3, sum(map(ord, path)))
    lm = GemmaCausalLM(GemmaBackbone(config, init=init))
    if lora:
        keras.utils.set_random_seed(3)
        lm.backbone.enable_lora(4, ["query", "ffw_gating", "ffw_linear"])
    lm.compile(keras.optimizers.AdamW(0.01), gradient_accumulation_steps=steps)
    random = np.random.default_rng(0)
    ids = random.integers(4, 128, (16, 21)).astype("int32")
    weights = (random.random((16, 20)) < 0.6).astype("float32")
    x = {"token_ids": ids[:, :-1], "padding_mask": np.ones((16, 20), bool)}
    losses = lm.fit(
        x, ids[:, 1:], sample_weight=weights, batch_size=8, epochs=2, shuffle=False,
        verbose=0,
    ).history["loss"]
    attention = lm.backbone.blocks[0].attention
    layers = (attention.query, attention.key)
    return losses, [str(layer.kernel.value.sharding) for layer in layers]


def continue_text():
    distribute(None)
    lm = GemmaCausalLM.from_preset("gemma_tiny_en")
    text = lm.generate("The sea", max_new_tokens=12)
    return text, str(lm.backbone.blocks[0].ffw_gating.kernel.value.sharding)


def distribute(config):
    if KIND == "data":
        new = keras.distribution.DataParallel(auto_shard_dataset=False)
    elif KIND == "model":
        mesh = keras.distribution.DeviceMesh((2, 4), ("batch", "model"))
        layouts = GemmaBackbone.get_layout_map(mesh, config=config)
        new = keras.distribution.ModelParallel(
            layout_map=layouts, batch_dim_name="batch"
        )
    else:
        new = None
    keras.distribution.set_distribution(new)


found = {}
for KIND in ("one", "data", "model"):
    found[KIND] = {
        "2B": fit(1, lora=True),
        "7B": fit(4, steps=2),
        "text": continue_text() if KIND != "data" else None,
    }
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found():
    """Losses, layouts and text on one device and on eight."""
    if keras.backend.backend() != "jax":
        pytest.skip("Keras lays models out over devices on JAX only")
    environment = dict(os.environ, KERAS_BACKEND="jax")
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", ["data", "model"])
@pytest.mark.parametrize("case", ["2B", "7B"])
def test_eight_devices_have_the_losses_of_one(found, kind, case):
    expected = found["one"][case][0]
    assert found[kind][case][0] == pytest.approx(expected, rel=1e-5)
    assert expected[1] < expected[0]


def test_weights_are_divided_and_one_key_head_is_whole(found):
    query, key = found["model"]["2B"][1]
    assert "'batch', 'model'" in query and "'batch', None" in key
    query, key = found["model"]["7B"][1]
    assert "'batch', 'model'" in query and "'batch', 'model'" in key


def test_a_preset_is_loaded_into_shards_and_generates(found):
    text, layout = found["model"]["text"]
    assert text == found["one"]["text"][0]
    assert "'batch', 'model'" in layout


def test_a_mesh_without_the_axes_is_refused():
    class Mesh:
        axis_names, shape = ("data", "model"), (2, 4)

    with pytest.raises(ValueError, match="no axis 'batch'"):
        GemmaBackbone.get_layout_map(Mesh())
