"""The loss by tokens against closed forms, and steps that know no batches."""

import keras
import numpy as np
import pytest
from keras import ops
from slopes import gradients, relative

from gemma_keras import GemmaBackbone, GemmaCausalLM, GemmaConfig, backend, loss
from gemma_keras.geglu import geglu
from gemma_keras.optimizers import (
    OPTIMIZERS,
    LoraPlus,
    TokenAccumulation,
    make_optimizer,
    make_schedule,
)

CONFIG = {
    "vocab_size": 131,
    "num_layers": 2,
    "hidden_dim": 12,
    "ffn_dim": 20,
    "num_query_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 8,
    "query_pre_attn_scalar": 8.0,
    "max_position": 64,
}


def make(dtype="float32", **changes):
    def init(path):
        seed = sum(map(ord, path))
        return keras.initializers.RandomNormal(stddev=0.4, seed=seed)

    config = GemmaConfig(**{**CONFIG, **changes})
    return GemmaCausalLM(GemmaBackbone(config, dtype=dtype, init=init))


def closed_form(hidden, table, labels, weights, cap):
    """Loss, its slopes and the weight of right tokens, in float64."""
    hidden, table = hidden.astype("float64"), table.astype("float64")
    raw = hidden @ table.T
    logits = raw if cap is None else cap * np.tanh(raw / cap)
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities = powers / powers.sum(-1, keepdims=True)
    rows = np.arange(len(labels))
    share = weights.astype("float64") / weights.sum()
    value = -(np.log(probabilities[rows, labels]) * share).sum()
    slope = probabilities.copy()
    slope[rows, labels] -= 1
    slope *= share[:, None]
    if cap is not None:
        slope *= 1 - np.tanh(raw / cap) ** 2
    right = (weights * (logits.argmax(-1) == labels)).sum()
    return value, slope @ table, slope.T @ hidden, right


@pytest.mark.parametrize("tile", [131, 50], ids=["whole", "tiles"])
@pytest.mark.parametrize("cap", [None, 3.0], ids=["plain", "capped"])
def test_loss_and_gradients_are_the_closed_form(monkeypatch, cap, tile):
    # Several chunks; 50: three tiles, of which two overlap.
    monkeypatch.setattr(loss, "chunk_sizes", lambda: (16, tile))
    backbone = make(final_logit_soft_cap=cap).backbone
    random = np.random.default_rng(0)
    hidden = random.normal(size=(57, 12)).astype("float32")
    labels = random.integers(0, 131, 57)
    table = ops.convert_to_numpy(backbone.token_embedding.embeddings)
    labels[::3] = (hidden @ table.T).argmax(-1)[::3]
    weights = (random.random(57) * (random.random(57) < 0.6)).astype("float32")

    def mean(hidden):
        found = loss.cross_entropy(hidden, labels, weights, backbone, train_head=True)
        return found.loss / found.weight

    variable = backbone.token_embedding.embeddings
    value, slopes = gradients(mean, [hidden], variable)
    expected = closed_form(hidden, table, labels, weights, cap)
    assert relative(value, expected[0]) < 1e-6
    assert relative(slopes[0], expected[1]) < 1e-6
    assert relative(slopes[1], expected[2]) < 1e-6
    found = loss.cross_entropy(hidden, labels, weights, backbone)
    assert relative(found.right, expected[3]) < 1e-6


@pytest.mark.parametrize("other", [9, 100], ids=["same tile", "another"])
def test_of_equal_logits_the_first_is_the_likeliest(monkeypatch, other):
    monkeypatch.setattr(loss, "chunk_sizes", lambda: (16, 50))
    backbone = make().backbone
    table = np.random.default_rng(0).normal(size=(131, 12)).astype("float32")
    table[[5, other]] = 10.0
    backbone.token_embedding.embeddings.assign(table)
    hidden = np.ones((2, 12), "float32")
    for weights in ([1.0, 0.0], [0.0, 1.0]):
        found = loss.cross_entropy(hidden, [5, other], weights, backbone)
        assert float(found.right) == weights[0]


@pytest.mark.skipif(backend.NAME != "jax", reason="shows the program")
@pytest.mark.skipif(not backend.on_cpu(), reason="XLA multiplies bfloat16 elsewhere")
def test_no_whole_head_is_widened(monkeypatch):
    monkeypatch.setattr(loss, "chunk_sizes", lambda: (16, 50))
    backbone = make("bfloat16").backbone
    labels, weights = np.arange(57), np.ones(57)

    def program():
        def total(hidden):
            return loss.cross_entropy(hidden, labels, weights, backbone).loss

        hidden = ops.zeros((57, 12), "bfloat16")
        jax = backend.library.jax
        return jax.jit(jax.grad(total)).lower(hidden).compile().as_text()

    assert "f32[131,12]" not in program()
    monkeypatch.setattr(backend, "as_bits", lambda x: x)
    assert "f32[131,12]" in program()


def test_the_gated_gelu_has_the_slopes_of_its_formula():
    random = np.random.default_rng(1)
    gate, up = random.normal(size=(2, 5, 7)) * 2
    c = np.sqrt(2 / np.pi)

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(c * (x + 0.044715 * x**3)))

    variable = keras.Variable(np.ones(()), dtype="float32")
    value, (of_gate, of_up, _) = gradients(
        lambda gate, up: ops.sum(geglu(gate, up)) + variable,
        [gate.astype("float32"), up.astype("float32")],
        variable,
    )
    step = 1e-6
    difference = (gelu(gate + step) - gelu(gate - step)) / (2 * step)
    assert relative(value, (gelu(gate) * up).sum() + 1) < 1e-6
    assert relative(of_gate, difference * up) < 1e-6
    assert relative(of_up, gelu(gate)) < 1e-6


def test_nothing_that_counts_is_no_loss(monkeypatch):
    backbone = make().backbone
    hidden = np.ones((2, 3, 12), "float32")
    found = loss.cross_entropy(
        hidden, np.zeros((2, 3), int), np.zeros((2, 3)), backbone
    )
    assert float(found.loss) == 0 == float(found.weight)


def batch(rows=8, length=14):
    """Rows of different lengths, prompts unlearned, as the preprocessor makes them."""
    random = np.random.default_rng(7)
    lengths = random.integers(4, length + 1, rows)
    ids = random.integers(4, 131, (rows, length + 1)).astype("int32")
    places = np.arange(length)
    mask = places < lengths[:, None]
    weights = (mask & (places >= lengths[:, None] // 3)).astype("float32")
    x = {"token_ids": ids[:, :-1] * mask, "padding_mask": mask}
    return x, ids[:, 1:] * mask, weights


def packed(x, y, weights, slots):
    """The same examples, two by two in rows of `slots`."""
    found = {
        name: np.zeros((len(y) // 2, slots), "int32")
        for name in ("token_ids", "padding_mask", "positions", "segment_ids", "y", "w")
    }
    for i, mask in enumerate(x["padding_mask"]):
        row, used = i // 2, found["padding_mask"][i // 2].sum()
        part = slice(used, used + mask.sum())
        found["token_ids"][row, part] = x["token_ids"][i][mask]
        found["padding_mask"][row, part] = 1
        found["positions"][row, part] = np.arange(mask.sum())
        found["segment_ids"][row, part] = i % 2 + 1
        found["y"][row, part] = y[i][mask]
        found["w"][row, part] = weights[i][mask]
    y, weights = found.pop("y"), found.pop("w").astype("float32")
    return found, y, weights


def padded(x, y, weights, more):
    grow = lambda a: np.pad(a, [[0, 0], [0, more]])  # noqa: E731
    return {k: grow(v) for k, v in x.items()}, grow(y), grow(weights)


def curve(batch_size, arrays, steps=None, repeat=3, xla=False, **settings):
    """Losses of updates on one batch, and the weights at the end.

    JAX compiles in any case, TensorFlow with `xla`: it takes ten seconds.
    """
    lm = make()
    x, y, weights = arrays
    jit = xla if backend.NAME == "tensorflow" else "auto"
    lm.compile(
        keras.optimizers.AdamW(0.01, global_clipnorm=0.5),
        gradient_accumulation_steps=steps,
        jit_compile=jit,
        **settings,
    )
    history = lm.fit(
        x,
        y,
        sample_weight=weights,
        batch_size=batch_size,
        epochs=repeat,
        shuffle=False,
        verbose=0,
    ).history
    kernel = lm.backbone.blocks[0].ffw_gating.kernel
    return history["loss"], ops.convert_to_numpy(kernel)


def test_the_curve_knows_no_batches_packing_or_padding():
    arrays = batch()
    expected, kernel = curve(8, arrays)
    variants = {
        "2 x 4": curve(4, arrays, 2),
        "8 x 1": curve(1, arrays, 8),
        "packed": curve(4, packed(*arrays, 30)),
        "packed 2 x 2": curve(2, packed(*arrays, 30), 2),
        "padded": curve(8, padded(*arrays, 9)),
        "remat": curve(8, arrays, remat=True),
    }
    if backend.NAME == "tensorflow":
        variants["by XLA"] = curve(2, packed(*arrays, 30), 2, xla=True, remat=True)
    for name, (losses, weights) in variants.items():
        np.testing.assert_allclose(losses, expected, rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(weights, kernel, atol=1e-5, err_msg=name)
    start = ops.convert_to_numpy(make().backbone.blocks[0].ffw_gating.kernel)
    assert np.abs(kernel - start).max() > 0.01


def test_an_optimizer_that_accumulates_is_taken_over():
    lm = make()
    lm.compile(keras.optimizers.SGD(0.1, gradient_accumulation_steps=4))
    assert isinstance(lm.optimizer, TokenAccumulation)
    assert lm.optimizer.inner_optimizer.gradient_accumulation_steps is None
    with pytest.raises(ValueError, match="give it once"):
        lm.compile(
            keras.optimizers.SGD(0.1, gradient_accumulation_steps=4),
            gradient_accumulation_steps=2,
        )


def test_gradients_of_bfloat16_weights_add_up_in_float32():
    """256 + 1 is 256 in bfloat16."""
    variable = keras.Variable(np.zeros(2), dtype="bfloat16")
    optimizer = TokenAccumulation(keras.optimizers.SGD(1.0), 65)
    optimizer.build([variable])
    for gradient in [256.0] + [1.0] * 64:
        gradient = ops.cast(ops.convert_to_tensor([gradient] * 2), "bfloat16")
        optimizer.apply([gradient], [variable])
    found = ops.convert_to_numpy(ops.cast(variable, "float32"))
    np.testing.assert_allclose(found, -(256 + 64) / 65, rtol=2**-8)


def test_the_loss_that_notebooks_compile_is_the_same_one():
    x, y, weights = batch()
    lm = make()
    auto = lm.evaluate(x, y, sample_weight=weights, batch_size=8, verbose=0)
    lm.compile(
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        optimizer="adam",
        weighted_metrics=[keras.metrics.SparseCategoricalAccuracy()],
    )
    found = lm.evaluate(
        x, y, sample_weight=weights, batch_size=8, verbose=0, return_dict=True
    )
    names = ["loss", "sparse_categorical_accuracy", "perplexity"]
    assert set(found) == set(names)
    np.testing.assert_allclose([found[name] for name in names], auto, rtol=1e-6)
    assert found["perplexity"] == pytest.approx(np.exp(found["loss"]), rel=1e-5)


def test_a_loss_that_needs_logits_gets_them():
    """Keras' own path, which divides by every position."""
    x, y, weights = batch()
    lm = make()
    expected = lm.evaluate(x, y, sample_weight=weights, batch_size=8, verbose=0)[0]

    def plain(y, logits):
        assert logits.shape[-1] == 131
        return keras.losses.sparse_categorical_crossentropy(y, logits, from_logits=True)

    lm.compile(loss=plain, weighted_metrics=None, optimizer="adam")
    found = lm.evaluate(x, y, sample_weight=weights, batch_size=8, verbose=0)
    assert found == pytest.approx(expected * weights.sum() / weights.size, rel=1e-5)


def test_only_supervised_positions_meet_the_head(monkeypatch):
    x, y, weights = batch()
    monkeypatch.setattr(loss, "chunk_sizes", lambda: (8, 4096))
    seen, head = [], []
    chunk = GemmaBackbone.logits

    def logits(self, rows, *args):
        seen.append(tuple(rows.shape))
        return chunk(self, rows, *args)

    monkeypatch.setattr(GemmaBackbone, "logits", logits)
    monkeypatch.setattr(loss._Head, "gradient", lambda *_: head.append("made"))
    lm = make()
    lm.backbone.enable_lora(2)
    lm.compile(keras.optimizers.SGD(0.1), run_eagerly=backend.NAME == "tensorflow")
    lm.fit(x, y, sample_weight=weights, batch_size=8, verbose=0)
    assert not head
    if backend.NAME == "torch":
        # In chunks of one size; elsewhere the loop's body is traced, not run.
        chunks = -(-int(weights.sum()) // 8)
        assert seen == [(-(-int(weights.sum()) // chunks), 12)] * chunks
    else:
        assert set(seen) == {(8, 12)}


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon"])
def test_optimizers_leave_norms_to_the_gradient(name):
    """Weight decay alone, on a gradient of zero, must not move a norm."""
    scale = keras.Variable(np.ones(4), name="scale")
    kernel = keras.Variable(np.ones((4, 4)), name="kernel")
    optimizer = make_optimizer(name, 0.1, weight_decay=0.5)
    optimizer.build([scale, kernel])
    optimizer.apply([ops.zeros(4), ops.zeros((4, 4))], [scale, kernel])
    np.testing.assert_array_equal(ops.convert_to_numpy(scale), np.ones(4))
    np.testing.assert_allclose(ops.convert_to_numpy(kernel), 0.95, rtol=1e-5)


def test_weight_decay_spares_the_norms_and_magnitudes_of_a_model():
    lm = make(num_layers=1)
    lm.backbone.enable_lora(2)
    variables = [v for layer in lm._flatten_layers() for v in layer.variables]
    variables = list({id(v): v for v in variables}.values())
    magnitude = keras.Variable(np.ones(4), name="lora_magnitude")
    variables = [*(v for v in variables if "float" in str(v.dtype)), magnitude]
    for variable in variables:
        variable.assign(ops.ones(variable.shape))
    optimizer = make_optimizer("adamw", 0.1, weight_decay=0.5)
    optimizer.build(variables)
    optimizer.apply([ops.zeros(v.shape) for v in variables], variables)
    moved = {v.path: ops.convert_to_numpy(v).min() < 1 for v in variables}
    spared = {path for path, changed in moved.items() if not changed}
    assert spared == {
        path for path in moved if path.endswith(("/scale", "lora_magnitude"))
    }
    assert len(spared) > 3


# Large ones, so that few steps show what each does.
RATES = {"adam": 0.1, "adafactor": 10.0, "lion": 0.1, "muon": 0.3, "sgd": 1.0}


@pytest.mark.parametrize("name", RATES)
def test_every_optimizer_learns_with_lora_accumulation_and_remat(name):
    """On torch also compared with Keras' own, alone and on all rows at once."""
    x, y, weights = batch()

    def losses(optimizer, batch_size, **settings):
        lm = make(num_layers=1)
        keras.utils.set_random_seed(3)
        lm.backbone.enable_lora(2)
        # TensorFlow would trace and compile each for ten seconds.
        eagerly = backend.NAME == "tensorflow"
        lm.compile(optimizer, run_eagerly=eagerly, **settings)
        data = {"sample_weight": weights, "batch_size": batch_size, "shuffle": False}
        return lm.fit(x, y, epochs=3, verbose=0, **data).history["loss"]

    accumulated = {"gradient_accumulation_steps": 2, "remat": True}
    ours = make_optimizer(name, RATES[name], clip_norm=None)
    found = losses(ours, 4, **accumulated)
    assert found[2] < found[1] < found[0]
    if backend.NAME == "torch":
        plain = {"weight_decay": 0.0}
        plain |= {"relative_step": False} if name == "adafactor" else {}
        make_theirs = getattr(keras.optimizers, OPTIMIZERS[name])
        expected = losses(make_theirs(RATES[name], **plain), 8)
        np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_the_gradient_of_a_step_is_clipped_by_its_norm():
    """All variables together, after the mean over the tokens of its batches."""
    rng = np.random.default_rng(5)
    first, second = ([rng.normal(size=s) for s in ((3, 2), (4,))] for _ in range(2))
    tokens = (3.0, 1.0, 0.0)
    none = [np.zeros_like(gradient) for gradient in first]
    variables = [keras.Variable(np.zeros_like(g), dtype="float32") for g in first]
    sgd = make_optimizer("sgd", 1.0, clip_norm=0.5)
    optimizer = TokenAccumulation(sgd, 3)
    optimizer.build(variables)
    for weight, slopes in zip(tokens, (first, second, none), strict=True):
        optimizer.tokens = weight
        slopes = [ops.convert_to_tensor(slope, "float32") for slope in slopes]
        optimizer.apply(slopes, variables)
    means = [(3 * one + two) / 4 for one, two in zip(first, second, strict=True)]
    norm = np.sqrt(sum(np.sum(np.square(mean)) for mean in means))
    assert norm > 1
    for variable, mean in zip(variables, means, strict=True):
        found = ops.convert_to_numpy(variable)
        np.testing.assert_allclose(found, -mean * 0.5 / norm, rtol=1e-5)


def test_lora_plus_takes_longer_steps_with_b():
    a = keras.Variable(np.ones(3), name="lora_a")
    b = keras.Variable(np.ones(3), name="lora_b")
    optimizer = make_optimizer("adamw", 0.01, clip_norm=None, lora_plus_ratio=16.0)
    optimizer.build([a, b])
    slope = ops.convert_to_tensor(np.array([1.0, 2.0, -3.0], "float32"))
    optimizer.apply([slope, slope], [a, b])
    moved = [ops.convert_to_numpy(v) - 1 for v in (a, b)]
    np.testing.assert_allclose(moved[0], [-0.01, -0.01, 0.01], rtol=1e-3)
    np.testing.assert_allclose(moved[1], 16 * moved[0], rtol=1e-4)


def test_fit_with_every_wrapper_and_a_schedule(tmp_path):
    """Also saved and loaded, with the state of the optimizer."""
    x, y, weights = batch()
    lm = make()
    lm.backbone.enable_lora(2)
    schedule = make_schedule("cosine", 0.05, steps=4, warmup=1)
    optimizer = make_optimizer("adamw", schedule, lora_plus_ratio=4.0)
    lm.compile(optimizer, gradient_accumulation_steps=2)
    settings = {"sample_weight": weights, "batch_size": 4, "verbose": 0}
    losses = lm.fit(x, y, epochs=4, **settings).history["loss"]
    assert losses[-1] < losses[0]
    assert int(lm.optimizer.iterations) == 4
    lm.save(tmp_path / "lm.keras")
    again = keras.models.load_model(tmp_path / "lm.keras")
    assert isinstance(again.optimizer, TokenAccumulation)
    assert isinstance(again.optimizer.inner_optimizer, LoraPlus)
    assert int(again.optimizer.iterations) == 4
    for one, two in zip(lm.optimizer.variables, again.optimizer.variables, strict=True):
        found, expected = (ops.convert_to_numpy(v) for v in (two, one))
        np.testing.assert_array_equal(found, expected)


def test_schedules_follow_their_formulas():
    cosine = make_schedule("cosine", 2.0, steps=11, warmup=1)
    found = [float(cosine(i)) for i in (0, 1, 6, 11, 20)]
    np.testing.assert_allclose(found, [2.0, 2.0, 1.0, 0.0, 0.0], atol=1e-6)
    linear = make_schedule("linear", 1.0, steps=100, warmup=0.2)
    found = [float(linear(i)) for i in (0, 9, 19, 20, 60, 100)]
    np.testing.assert_allclose(found, [0.05, 0.5, 1.0, 1.0, 0.5, 0.0], atol=1e-6)
    assert make_schedule("constant", 0.1, steps=5) == 0.1


@pytest.mark.parametrize(
    ("make_it", "reason"),
    [
        (lambda: make_schedule("step", 0.1, 5), "cosine, linear, constant"),
        (lambda: make_schedule("cosine", 0.0, 5), "above 0"),
        (lambda: make_schedule("cosine", 0.1, 5, 5), "nothing would be left"),
        (lambda: make_schedule("cosine", 0.1, 5, -1), "negative"),
        (lambda: make_optimizer("adamm"), "adamw, adam, adafactor"),
        (lambda: make_optimizer("lion", beta_3=1), "takes no beta_3"),
        (lambda: TokenAccumulation(keras.optimizers.SGD(), 1), "from 2"),
        (lambda: LoraPlus(keras.optimizers.SGD(), 0), "above 0"),
    ],
)
def test_bad_settings_are_refused(make_it, reason):
    with pytest.raises(ValueError, match=reason):
        make_it()
