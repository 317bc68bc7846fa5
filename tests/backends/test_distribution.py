"""Training over eight simulated devices gives the losses of one.

On JAX alone: Keras distributes layouts nowhere else. In a process of its own, since the
number of devices is settled when JAX starts.
"""

import json
import os
import re
import subprocess
import sys

import keras
import pytest

from gemma_keras import GemmaBackbone

PROGRAM = """
import json
import types

import jax
import keras
import numpy as np

from gemma_keras import GemmaBackbone, GemmaCausalLM, GemmaConfig, packed
from gemma_keras.loading import load_backbone

# So that products with quantised matrices go by runs of rows, as large ones do.
packed.FEW_BYTES = packed.MANY_BYTES = 2048


def small(num_kv_heads, **changes):
    fields = dict(
        vocab_size=128, num_layers=1, hidden_dim=32, ffn_dim=64, num_query_heads=4,
        num_kv_heads=num_kv_heads, head_dim=16, query_pre_attn_scalar=16.0,
        max_position=64,
    )
    return GemmaConfig(**fields | changes)


def fit(config, adapt=None, steps=None, told=True):
    distribute(config if told else None)
    init = lambda path: keras.initializers.RandomNormal(0.0, 0.3, sum(map(ord, path)))
    lm = GemmaCausalLM(GemmaBackbone(config, init=init))
    keras.utils.set_random_seed(3)
    if adapt is not None:
        adapt(lm)
    lm.compile(keras.optimizers.AdamW(0.01), gradient_accumulation_steps=steps)
    random = np.random.default_rng(0)
    ids = random.integers(4, 128, (16, 21)).astype("int32")
    weights = (random.random((16, 20)) < 0.6).astype("float32")
    x = {"token_ids": ids[:, :-1], "padding_mask": np.ones((16, 20), bool)}
    losses = lm.fit(
        x, ids[:, 1:], sample_weight=weights, batch_size=8, epochs=2, shuffle=False,
        verbose=0,
    ).history["loss"]
    return losses, layouts(lm) | layouts(lm.optimizer)


def lora(lm):
    lm.backbone.enable_lora(4, ["query", "ffw_gating", "ffw_linear"])


def qlora(lm):
    lm.quantize("int4", group_size=16, embedding="int8")
    lm.enable_lora(4, targets="all-linear", name="second", dora=True)


def layouts(thing):
    # Path to the axes by which a variable is divided, and its shares of bytes.
    return {
        v.path: [str(tuple(getattr(v.value.sharding, "spec", ""))), *share(v.value)]
        for v in thing.variables
    }


def share(array):
    return [max(x.data.nbytes for x in array.addressable_shards), array.nbytes]


def load(**settings):
    distribute(None)
    before = {id(array) for array in jax.live_arrays()}
    largest = []

    def look(done, total):
        new = [array for array in jax.live_arrays() if id(array) not in before]
        largest.append(max((share(array)[0] for array in new), default=0))

    lm = GemmaCausalLM.from_preset("gemma_tiny_en", progress=look, **settings)
    return lm, {"layouts": layouts(lm.backbone), "largest": max(largest)}


def continue_text():
    lm, found = load()
    return found | {"text": lm.generate("The sea", max_new_tokens=12)}


def load_large():
    # More than Keras would put onto one device first.
    config = small(1, vocab_size=2**18)
    distribute(config)
    tensors = {
        path: np.full(shape, 0.5, "float32")
        for path, shape in config.weight_shapes().items()
    }
    checkpoint = types.SimpleNamespace(
        config=config, dtype="float32", packings={}, tensor=tensors.get
    )
    table = load_backbone(checkpoint).token_embedding.embeddings
    return share(table.value), float(keras.ops.max(table))


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
    found[KIND] = {"7B": fit(small(4), steps=2), "large": load_large()}
    if KIND != "data":
        found[KIND]["2B"] = fit(small(1), lora)
        found[KIND]["int4"] = fit(small(1, num_layers=2), qlora, told=False)
        found[KIND]["text"] = continue_text()
        found[KIND]["loaded in int4"] = load(quantize="int4")[1]
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


@pytest.mark.parametrize(
    ("kind", "case"),
    [("data", "7B"), ("model", "7B"), ("model", "2B"), ("model", "int4")],
)
def test_eight_devices_have_the_losses_of_one(found, kind, case):
    expected = found["one"][case][0]
    assert found[kind][case][0] == pytest.approx(expected, rel=1e-5)
    assert expected[1] < expected[0]


def test_key_heads_are_divided_or_left_whole_but_never_cut(found):
    places = {
        "7B": "('batch', 'model')",  # by outputs: four heads, four devices
        "2B": "('batch', None)",
        "int4": "('batch', 'model')",  # by inputs, kept as columns: none was told
    }
    for case, place in places.items():
        name = "kernel_codes" if case == "int4" else "kernel"
        layouts = found["model"][case][1]
        for layer in ("key", "value"):
            path = f"decoder_block_0/attention/{layer}/{name}"
            assert layouts[path][0] == place, case


def test_adapters_of_any_name_are_divided_where_their_layers_are(found):
    layouts = found["model"]["int4"][1]
    for path, place in {
        "token_embedding/embeddings_codes": "('model', 'batch')",
        "decoder_block_1/attention/query/kernel_codes": "('model', 'batch')",
        "decoder_block_1/attention/query/kernel_offsets": "('model', None)",
        "decoder_block_1/attention/query/second/lora_b": "(None, 'model')",
        "decoder_block_1/attention/query/second/lora_magnitude": "('model',)",
        "decoder_block_1/attention/key/second/lora_a": "('model', None)",
        "decoder_block_1/ffw_linear/second/lora_a": "('model', None)",
    }.items():
        assert layouts[path][0] == place, path


@pytest.mark.parametrize("case", ["7B", "int4", "text", "loaded in int4"])
def test_each_device_holds_its_share_alone(found, case):
    layouts = found["model"][case]
    layouts = layouts["layouts"] if isinstance(layouts, dict) else layouts[1]
    # What is not divided among all is small beside the rest in a model of any width.
    small = "scale|scales|offsets|lora_[ab]|lora_magnitude"
    checked = []
    for path, (_, share, whole) in layouts.items():
        if not re.search(rf"({small})(_[a-z]+)*$", path) and whole > 8:
            checked.append(path)
            assert share * 8 == whole, path
    assert len(checked) >= 7


@pytest.mark.parametrize("case", ["text", "loaded in int4"])
def test_no_device_ever_holds_a_whole_matrix_while_it_loads(found, case):
    shares = [share for _, share, _ in found["model"][case]["layouts"].values()]
    assert found["model"][case]["largest"] == max(shares)
    assert found["one"][case]["largest"] > 7 * max(shares)


def test_a_table_that_keras_would_compile_into_a_program_is_loaded(found):
    for kind, parts in {"one": 1, "data": 1, "model": 8}.items():
        (share, whole), value = found[kind]["large"]
        assert (share * parts, value) == (whole, 0.5)


def test_a_divided_model_continues_a_text_as_a_whole_one(found):
    assert found["model"]["text"]["text"] == found["one"]["text"]["text"]


def test_a_mesh_without_the_axes_is_refused():
    class Mesh:
        axis_names, shape = ("data", "model"), (2, 4)

    with pytest.raises(ValueError, match="no axis 'batch'"):
        GemmaBackbone.get_layout_map(Mesh())
