"""Weights of 8 and 4 bits: the model that they make, and adapters beside them.

What is compared with is a model of floats that holds the restored weights.
"""

import dataclasses
import warnings

import keras
import numpy as np
import pytest
from keras import ops
from small_model import CONFIG, build_model

from gemma_keras import GemmaBackbone, GemmaCausalLM, backend, packed
from gemma_keras.checkpoints import CheckpointError
from gemma_keras.checkpoints.safetensors_file import SafetensorsFile
from gemma_keras.projection import Projection, project_together
from gemma_keras.quantization import Packing, Quantization, pack, unpack

# Rows that int4 groups divide: 128 columns for the outputs of attention, 48 for those
# of the feed-forward, 32 for the rest. Few layers: every restoring of every matrix is
# a loop of its own to compile.
WIDE = dataclasses.replace(CONFIG, hidden_dim=32, ffn_dim=48, head_dim=16)
# XLA takes long to compile what TensorFlow traces; one test lets it.
JIT = keras.backend.backend() == "jax"
TORCH = keras.backend.backend() == "torch"
IDS = np.arange(3, 43).reshape(2, 20)
INPUTS = {"token_ids": IDS, "padding_mask": np.ones_like(IDS)}
MODES = {
    "int8": Quantization("int8"),
    "int4": Quantization("int4"),
    "mixed": Quantization("int4", 16, embedding="int8", layers="embedding|ffw|query"),
}


@pytest.fixture(scope="module")
def floats(vocabulary):
    """The model before it is quantised, and a function that makes it anew."""

    def build(config=WIDE, dtype=None):
        keras.utils.set_random_seed(7)
        lm = build_model(vocabulary)
        backbone = GemmaBackbone(config, init=initial, dtype=dtype)
        return GemmaCausalLM(backbone, lm.preprocessor)

    def initial(path):
        deviations = {"scale": 0.4, "kernel": 0.2, "embeddings": 0.12}
        return keras.initializers.RandomNormal(stddev=deviations[path.split("/")[-1]])

    return build


def quantised(build, quantization, **settings):
    """The quantised model, and the one of floats that holds what it restores."""
    lm, twin = build(**settings), build(**settings)
    lm.backbone.pack(quantization)
    theirs = {layer.path: layer for layer in twin.backbone._packable().values()}
    for path, layer in lm.backbone._packable().items():
        if layer.packed is None:
            continue
        arrays = {
            name: np.asarray(ops.convert_to_numpy(variable))
            for name, variable in layer.packed.variables.items()
        }
        matrix = unpack(arrays, layer.packed.packing)
        kernel = theirs[path].weight.path.endswith("kernel")
        theirs[path].weight.assign(matrix.T if kernel else matrix)
    return lm, twin


def logits(lm):
    return ops.convert_to_numpy(lm(INPUTS))


@pytest.fixture
def small_runs(monkeypatch):
    """Matrices restored a few rows at a time, as large ones are."""
    monkeypatch.setattr(packed, "FEW_BYTES", 2048)
    monkeypatch.setattr(packed, "MANY_BYTES", 2560)


@pytest.mark.parametrize("mode", MODES)
def test_logits_are_those_of_the_restored_weights(floats, mode):
    lm, twin = quantised(floats, MODES[mode])
    assert len(lm.backbone.packings) == {"mixed": 9}.get(mode, 15)
    np.testing.assert_allclose(logits(lm), logits(twin), rtol=1e-5, atol=1e-5)


def test_restored_in_runs_they_are_the_same(floats, small_runs):
    assert packed._divisor(340, 20) == 20
    lm, twin = quantised(floats, MODES["int4"])
    np.testing.assert_allclose(logits(lm), logits(twin), rtol=1e-5, atol=1e-5)


tells_buffers = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="JAX alone tells XLA's buffers"
)


def buffers_of_gradient(rows):
    """Bytes of XLA's own that the gradient of 12 layers takes, for `rows` of 256."""
    import jax

    layers = []
    for i in range(12):
        init = lambda path: keras.initializers.RandomNormal(stddev=0.05)  # noqa: E731
        layers.append(Projection(256, init, name=f"layer_{i}"))
        layers[-1].build((None, 256))
        layers[-1].pack(Packing(8))
    variables = [variable for layer in layers for variable in layer.variables]

    def total(x, values):
        mapping = list(zip(variables, values, strict=True))
        with keras.StatelessScope(state_mapping=mapping):
            for layer in layers:
                x = ops.tanh(layer(x))
            return ops.sum(x)

    values = [variable.value for variable in variables]
    x = np.ones((rows, 256), "float32")
    program = jax.jit(jax.grad(total)).lower(x, values).compile()
    return program.memory_analysis().temp_size_in_bytes


@tells_buffers
def test_xla_keeps_no_restored_matrix_for_the_backward_pass():
    # A restored matrix takes 0.26 MB, what tanh keeps 0.2 MB in all.
    assert buffers_of_gradient(16) < 4 * 256 * 256 * 4


@tells_buffers
def test_xla_begins_no_loop_over_a_matrix_early(monkeypatch):
    monkeypatch.setattr(packed, "MANY_BYTES", 4 * 256 * 64)
    # What tanh keeps, and a few more of the same size.
    assert buffers_of_gradient(2048) < (12 + 4) * 4 * 256 * 2048


def test_a_prime_number_of_rows_is_restored_as_a_whole():
    assert packed._divisor(256_000, 8192) == 8000
    assert packed._divisor(262_208, 6553) == 4097
    assert packed._divisor(250_007, 8192) == 250_007


def test_greedy_answers_are_those_of_the_restored_weights(floats):
    lm, twin = quantised(floats, MODES["int4"])
    prompts = ["The cat sat", "A dog came by and asked the cat"]
    answers = lm.generate(prompts, max_new_tokens=24, stop_token_ids=[])
    assert answers == twin.generate(prompts, max_new_tokens=24, stop_token_ids=[])


def train(lm, remat=False):
    """Losses and factors of some steps of all adapters."""
    keras.utils.set_random_seed(3)
    lm.enable_lora(3, targets=["all-linear", "token_embedding"])
    lm.compile(
        optimizer=keras.optimizers.SGD(0.05),
        remat=remat,
        jit_compile=JIT,
    )
    lm.preprocessor.sequence_length = 24
    texts = ["The cat sat on the mat", "A dog came by and asked", "Two birds sang"] * 2
    losses = lm.fit(texts, batch_size=3, epochs=3, verbose=0, shuffle=False)
    factors = lm.backbone.adapters.weights("default")
    return losses.history["loss"], factors


@pytest.mark.parametrize(("mode", "remat"), [("int8", False), ("int4", True)])
def test_adapters_learn_as_beside_the_restored_weights(floats, mode, remat):
    lm, twin = quantised(floats, MODES[mode])
    losses, factors = train(lm, remat)
    expected, others = train(twin, remat)
    assert losses[-1] < losses[0]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    for path, arrays in others.items():
        for name, array in arrays.items():
            # Three steps amplify what is rounded in another order, to 1e-4 or so; a
            # gradient that is wrong anywhere is off by a share of its own size.
            difference = np.linalg.norm(factors[path][name] - array)
            assert difference <= 1e-3 * np.linalg.norm(array), (path, name)


def test_gradients_in_runs_are_the_same(floats, small_runs):
    lm, twin = quantised(floats, MODES["int4"])
    np.testing.assert_allclose(train(lm)[0], train(twin)[0], rtol=1e-5)


def slopes_of_factors(lm, remat):
    """What one step of plain descent takes from each factor, none of which is zero."""
    lm.enable_lora(3, targets=["all-linear", "token_embedding"])
    random = np.random.default_rng(11)
    before = {}
    for variable in lm.trainable_variables:
        before[variable.path] = 0.1 * random.normal(size=variable.shape)
        variable.assign(before[variable.path])
    # So large a step that what it starts from does not round it away.
    lm.compile(optimizer=keras.optimizers.SGD(1e3), remat=remat, jit_compile=JIT)
    lm.preprocessor.sequence_length = 24
    lm.fit(["The cat sat on the mat", "A dog came by"], batch_size=2, verbose=0)
    return {
        variable.path: before[variable.path] - ops.convert_to_numpy(variable)
        for variable in lm.trainable_variables
    }


@pytest.mark.parametrize("mode", ["int8", "int4"])
@pytest.mark.parametrize("remat", [False, True], ids=["kept", "remat"])
@pytest.mark.parametrize("runs", [False, True], ids=["at-once", "in-runs"])
def test_slopes_are_those_beside_the_restored_weights(
    floats, mode, remat, runs, request
):
    if runs:
        request.getfixturevalue("small_runs")
    lm, twin = quantised(floats, MODES[mode])
    found, expected = slopes_of_factors(lm, remat), slopes_of_factors(twin, remat)
    assert len(found) == len(expected) == 2 * 15
    pairs = zip(found.values(), expected.items(), strict=True)
    for slopes, (path, others) in pairs:
        size = np.linalg.norm(others)
        assert size > 0, path
        assert np.linalg.norm(slopes - others) <= 1e-4 * size, path


def test_adapters_learn_in_a_compiled_program(floats):
    lm, twin = quantised(floats, MODES["int4"])
    losses = []
    for model in (lm, twin):
        keras.utils.set_random_seed(3)
        model.enable_lora(2)
        # With XLA on TensorFlow too, as it trains large models.
        model.compile(optimizer=keras.optimizers.SGD(0.05), jit_compile=not TORCH)
        texts = ["The cat sat on the mat"] * 2
        losses.append(model.fit(texts, epochs=2, verbose=0).history["loss"])
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_dora_sees_the_restored_columns(floats):
    lm, twin = quantised(floats, MODES["int4"])
    for model in (lm, twin):
        keras.utils.set_random_seed(3)
        model.enable_lora(2, dora=True)
        model.compile(optimizer=keras.optimizers.SGD(0.1), jit_compile=JIT)
    one, other = (
        m.fit(["The cat sat on the mat"] * 2, epochs=2, verbose=0).history["loss"]
        for m in (lm, twin)
    )
    np.testing.assert_allclose(one, other, rtol=1e-5)


def test_bfloat16_is_rounded_once_after_restoring(floats):
    lm, twin = quantised(floats, MODES["int8"], dtype="bfloat16")
    found, expected = logits(lm), logits(twin)
    np.testing.assert_allclose(found, expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("group_size", [0, 128, 32, 16])
def test_few_rows_are_multiplied_as_many_are(group_size):
    """Where a backend has kernels for few bits, as torch on a CPU, by these."""
    random = np.random.default_rng(3)
    matrix = random.normal(size=(96, 256)).astype("float32") * 0.1
    packing = Packing(4 if group_size else 8, group_size)
    arrays = pack(matrix, packing)
    whole = unpack(arrays, packing).astype("float64")
    kept = packed.PackedMatrix(keras.layers.Layer(), "m", packing, whole.shape, arrays)
    for count in (1, 3, 16, 40):
        x = ops.cast(random.normal(size=(count, 256)), "bfloat16")
        program = backend.Program(kept.to_rows, kept.variables.values())
        found = ops.convert_to_numpy(ops.cast(program(x), "float32"))
        expected = ops.convert_to_numpy(ops.cast(x, "float32")) @ whole.T
        # Weights, their scales and the result are rounded to 8 bits.
        size = np.abs(ops.convert_to_numpy(ops.cast(x, "float32"))) @ np.abs(whole.T)
        assert np.all(np.abs(found - expected) <= 2**-8 * size + 2**-8)
    if backend.NAME == "torch":
        assert (kept._for_kernels[1] is None) == (group_size == 16)


@pytest.mark.parametrize("count", [1, 5, 40])
@pytest.mark.parametrize("mode", MODES)
def test_projections_of_the_same_are_made_together(mode, count, floats):
    """As one by one, adapters included; in one product where there is a kernel."""
    lm = floats(dtype="bfloat16")
    lm.backbone.pack(MODES[mode])
    lm.enable_lora(2, targets=["query", "value"])
    attention = lm.backbone.blocks[0].attention
    layers = [attention.query, attention.key, attention.value]
    for layer in (attention.query, attention.value):
        factors = layer.adapters["default"]
        factors.b.assign(np.random.default_rng(1).normal(size=factors.b.shape))
    x = np.random.default_rng(2).normal(size=(1, count, layers[0].columns))
    x = ops.cast(x, "bfloat16")
    program = backend.Program(lambda x: project_together(layers, x), lm.variables)
    alone = backend.Program(lambda x: [layer(x) for layer in layers], lm.variables)
    for one, other in zip(program(x), alone(x), strict=True):
        one, other = (
            ops.convert_to_numpy(ops.cast(y, "float32")) for y in (one, other)
        )
        np.testing.assert_allclose(one, other, rtol=2**-7, atol=2**-7)


def test_what_cannot_be_is_refused(floats):
    lm, _ = quantised(floats, MODES["int4"])
    lm.compile("sgd")
    with pytest.raises(ValueError, match="codes cannot be trained: call enable_lora"):
        lm.fit(["The cat sat"], verbose=0)
    with pytest.raises(ValueError, match="quantised already"):
        lm.quantize("int8")
    lm.enable_lora(2)
    with pytest.raises(ValueError, match="would lose most of the update"):
        lm.merge_adapter()
    with pytest.raises(ValueError, match="mode must be one of int8, int4"):
        floats().quantize("float8")
    with pytest.raises(ValueError, match="No layer's path matches"):
        floats().quantize("int8", filters="nothing")


def test_keras_configs_and_filters_say_how(floats):
    lm = floats()
    config = keras.quantizers.Int4QuantizationConfig(block_size=16)
    lm.quantize(config=config, filters=["ffw_linear", "query"])
    found = lm.backbone.packings
    assert {p.rsplit("/", 1)[-1] for p in found} == {"ffw_linear", "query"}
    assert {p.group_size for p in found.values()} == {16}
    lm.generate("The cat", max_new_tokens=3)


def same_weights(lm, other):
    for mine, theirs in zip(lm.weights, other.weights, strict=True):
        assert mine.path == theirs.path
        mine, theirs = map(ops.convert_to_numpy, (mine, theirs))
        np.testing.assert_array_equal(mine.view("uint8"), theirs.view("uint8"))


@pytest.mark.parametrize("mode", MODES)
def test_presets_keep_every_bit(floats, tmp_path, mode):
    lm, _ = quantised(floats, MODES[mode])
    lm.save_to_preset(tmp_path / "p")
    again = GemmaCausalLM.from_preset(tmp_path / "p")
    same_weights(lm, again)
    np.testing.assert_allclose(logits(again), logits(lm), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="is quantised already"):
        GemmaCausalLM.from_preset(tmp_path / "p", quantize="int8")


def test_quantising_while_loading_is_the_same(floats, tmp_path):
    lm = floats()
    with warnings.catch_warnings():
        # KerasHub has no model with all that the small one has.
        warnings.simplefilter("ignore")
        lm.save_to_preset(tmp_path / "p")
    lm.quantize("int4", embedding="int8")
    quantize = Quantization("int4", embedding="int8")
    again = GemmaCausalLM.from_preset(tmp_path / "p", quantize=quantize)
    same_weights(lm, again)


def test_keras_files_and_weights_keep_every_bit(floats, tmp_path):
    lm, _ = quantised(floats, MODES["mixed"])
    lm.enable_lora(2)
    lm.save(tmp_path / "m.keras")
    same_weights(lm, keras.models.load_model(tmp_path / "m.keras"))
    lm.save_weights(tmp_path / "m.weights.h5")
    other = floats()
    other.backbone.pack(MODES["mixed"])
    other.enable_lora(2)
    other.load_weights(tmp_path / "m.weights.h5")
    same_weights(lm, other)
    with pytest.raises(ValueError, match="saved after quantize or enable_lora"):
        floats().load_weights(tmp_path / "m.weights.h5")


def test_an_adapter_in_use_is_written_merged_in_floats(floats, tmp_path):
    lm, twin = quantised(floats, MODES["int4"])
    for model in (lm, twin):
        keras.utils.set_random_seed(3)
        model.enable_lora(2, init="gaussian")
        for layer in model.backbone.adapters.layers("default").values():
            b = layer.adapters["default"].b
            b.assign(0.1 * np.random.default_rng(1).normal(size=b.shape))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lm.save_to_preset(tmp_path / "p")
    again = GemmaCausalLM.from_preset(tmp_path / "p")
    assert not again.backbone.packings
    np.testing.assert_allclose(logits(again), logits(lm), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(logits(twin), logits(lm), rtol=1e-5, atol=1e-5)


def test_an_export_holds_the_restored_floats(floats, tmp_path):
    lm, twin = quantised(floats, MODES["mixed"])
    lm.export(tmp_path / "m", format="hf")
    twin.export(tmp_path / "t", format="hf")
    mine, theirs = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in "mt"
    )
    assert mine == theirs
    told = (tmp_path / "m" / "provenance.json").read_text()
    assert "restored from codes of 4 and 8 bits" in told


def rewrite(path, change):
    """A safetensors file again, its header changed."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = change(raw[8 : 8 + size])
    assert len(header) == size
    path.write_bytes(raw[:8] + header + raw[8 + size :])


@pytest.mark.any_backend
def test_damaged_presets_are_refused(floats, tmp_path):
    lm, _ = quantised(floats, MODES["int4"])
    lm.save_to_preset(tmp_path / "p")
    file = tmp_path / "p" / "model.quantized.safetensors"
    whole = file.read_bytes()
    changes = {
        "other arrays": (b"key/kernel_codes", b"kex/kernel_codes"),
        "cannot be kept": (rb"{\"bits\": 4", rb"{\"bits\": 9"),
        "unexpected keyword": (rb"{\"bits\": 4", rb"{\"bitz\": 4"),
        "does not say its dtype": (b'"float32"', b'"float99"'),
        "not valid JSON": (rb'"{\"token', rb'"[\"token'),
    }
    for told, (old, new) in changes.items():
        file.write_bytes(whole)
        rewrite(file, lambda header, old=old, new=new: header.replace(old, new, 1))
        with pytest.raises(CheckpointError, match=told):
            GemmaCausalLM.from_preset(tmp_path / "p")
    file.write_bytes(whole)
    opened = SafetensorsFile(file)
    scales = opened._entries["token_embedding/embeddings_scales"]
    opened.close()
    start = 8 + int.from_bytes(whole[:8], "little") + scales[2]
    file.write_bytes(whole[:start] + b"\xff\x7f" + whole[start + 2 :])
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        GemmaCausalLM.from_preset(tmp_path / "p")
    file.write_bytes(whole[:-3])
    with pytest.raises(CheckpointError, match="cut short"):
        GemmaCausalLM.from_preset(tmp_path / "p")
