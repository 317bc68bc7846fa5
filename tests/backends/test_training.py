"""fit, evaluate and predict on text, and the gradients beneath them."""

import contextlib
import gc

import keras
import numpy as np
import pytest
from keras import ops

from gemma_keras import trainer
from gemma_keras.backend import torch_device
from gemma_keras.sft import Checkpoints

PAIRS = {
    "prompts": ["The cat sat on", "A dog came", "Two birds", "They talked of"],
    "responses": [" the mat", " by and asked", " sang 12 songs", " stars, of mice"],
}
CHAT = [
    {"role": "user", "content": "the moon"},
    {"role": "assistant", "content": "a cat"},
]


def compiled(lm, learning_rate=0.01, beta_2=0.999):
    # XLA would spend ten seconds on every model here; one test below lets it.
    jit = False if keras.backend.backend() == "tensorflow" else "auto"
    optimizer = keras.optimizers.Adam(learning_rate, beta_2=beta_2)
    lm.compile(optimizer=optimizer, jit_compile=jit)
    return lm


def stepwise(lm):
    """Compiled so that TensorFlow need not trace, where only the data is tested."""
    eagerly = keras.backend.backend() == "tensorflow"
    lm.compile(optimizer=keras.optimizers.Adam(0.01), run_eagerly=eagerly)
    return lm


def test_training_as_large_models_are_compiled_by_default(new_lm, monkeypatch):
    monkeypatch.setattr(trainer, "XLA_PAYS", 1)  # on TensorFlow's CPU too
    curves = []
    for remat in (False, True):
        lm = new_lm()
        lm.compile(optimizer=keras.optimizers.Adam(0.01), remat=remat)
        assert lm.jit_compile == (keras.backend.backend() != "torch")
        history = lm.fit(PAIRS, batch_size=4, epochs=4, verbose=0).history
        curves.append(history["loss"])
    assert curves[0][-1] < 0.9 * curves[0][0]
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-5)


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="torch keeps tensors")
def test_remat_leaves_no_activations_to_the_garbage_collector(new_lm):
    def left(remat):
        lm = new_lm()
        lm.compile(optimizer=keras.optimizers.Adam(0.01), remat=remat)
        x, y, weights = lm.preprocessor(PAIRS)
        lm.train_on_batch(x, y, weights)
        gc.collect()
        gc.disable()
        try:
            before = tensors()
            lm.train_on_batch(x, y, weights)
            return tensors() - before
        finally:
            gc.enable()

    def tensors():
        kind = type(ops.zeros(()))
        return sum(type(x) is kind for x in gc.get_objects())

    # What Keras passes to layers stays in closures of torch's; a block of torch's own
    # remat leaves some sixty more.
    blocks = len(new_lm().backbone.blocks)
    assert left(remat=True) <= left(remat=False) + 2 * blocks


@pytest.mark.parametrize(
    "x",
    [
        ["The cat sat on the mat", "A dog came by"] * 2,
        np.array(["The cat sat on the mat", "A dog came by"] * 2),
        PAIRS,
        [CHAT] * 4,
    ],
    ids=["texts", "array", "pairs", "chats"],
)
def test_fit_takes_text_and_learns_it(new_lm, x):
    lm = compiled(new_lm())
    history = lm.fit(x, batch_size=2, epochs=4, verbose=0).history
    assert history["loss"][-1] < 0.8 * history["loss"][0]


def test_fit_on_text_is_fit_on_its_arrays(new_lm):
    one, two = compiled(new_lm()), compiled(new_lm())
    texts = one.fit(PAIRS, batch_size=2, epochs=2, shuffle=False, verbose=0)
    x, y, weights = two.preprocessor(PAIRS)
    arrays = two.fit(
        x, y, sample_weight=weights, batch_size=2, epochs=2, shuffle=False, verbose=0
    )
    np.testing.assert_allclose(texts.history["loss"], arrays.history["loss"], rtol=1e-6)


def test_the_loss_is_the_mean_negative_log_probability(new_lm):
    """Over the tokens that count; Keras divides by all B * T positions."""
    lm = compiled(new_lm())
    x, y, weights = lm.preprocessor(PAIRS)
    log_probs = ops.convert_to_numpy(
        lm.score(x["token_ids"], x["padding_mask"], "log_probs", target_ids=y)
    )
    expected = -(log_probs * weights).sum() / weights.sum()
    found = lm.evaluate(PAIRS, batch_size=4, verbose=0)[0]
    assert found == pytest.approx(expected, rel=1e-4)


class Batches(keras.utils.PyDataset):
    """Two batches of pairs, the second shorter."""

    def __init__(self):
        super().__init__()

    def __len__(self):
        return 2

    def __getitem__(self, index):
        rows = slice(0, 3) if index == 0 else slice(3, 4)
        return {key: values[rows] for key, values in PAIRS.items()}


def generator():
    for _ in range(2):
        yield ["The cat sat on the mat", "A dog came by"]


@pytest.mark.parametrize(
    "dataset", [Batches, generator], ids=["pydataset", "generator"]
)
def test_fit_takes_datasets_of_raw_batches(new_lm, dataset):
    lm = compiled(new_lm())
    history = lm.fit(dataset(), epochs=1, steps_per_epoch=2, verbose=0).history
    assert np.isfinite(history["loss"]).all()


class NoLength:
    """Batches that can be iterated again and again, as a Grain dataset can."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


@pytest.mark.parametrize("kind", ["tf.data", "DataLoader", "no length"])
def test_fit_takes_datasets_of_any_library(kind, new_lm):
    """Whatever computes: who has a pipeline keeps it when they switch the backend."""
    texts = ["The cat sat on the mat", "A dog came by"] * 2
    steps = None
    if kind == "tf.data":
        tf = pytest.importorskip("tensorflow", reason="needs TensorFlow")
        dataset = tf.data.Dataset.from_tensor_slices(texts).batch(2)
    elif kind == "DataLoader":
        torch = pytest.importorskip("torch.utils.data", reason="needs torch")
        dataset = torch.DataLoader(texts, batch_size=2)
    else:
        dataset, steps = NoLength([texts[:2], texts[2:]]), 2
    one, two = stepwise(new_lm()), stepwise(new_lm())
    found = one.fit(dataset, epochs=3, steps_per_epoch=steps, verbose=0).history
    expected = two.fit(texts, batch_size=2, epochs=3, shuffle=False, verbose=0).history
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-4)


@pytest.mark.reference
@pytest.mark.parametrize("kind", ["map", "stream", "loader"])
def test_fit_takes_grain_datasets(new_lm, kind):
    grain = pytest.importorskip("grain", reason="needs grain")
    texts = ["The cat sat on the mat", "A dog came by"] * 2
    batches = grain.MapDataset.source(texts).batch(2)
    dataset = {
        "map": batches,
        "stream": batches.to_iter_dataset(),
        "loader": grain.DataLoader(
            data_source=texts,
            sampler=grain.samplers.SequentialSampler(len(texts)),
            operations=[grain.transforms.Batch(2)],
        ),
    }[kind]
    # What a loader without a length has in an epoch, Keras is to be told; where a
    # stream ends, it finds out, and says so.
    steps = 2 if kind == "loader" else None
    told = contextlib.nullcontext()
    if kind == "stream":
        told = pytest.warns(UserWarning, match="ran out of data")
    one, two = stepwise(new_lm()), stepwise(new_lm())
    with told:
        found = one.fit(dataset, epochs=2, steps_per_epoch=steps, verbose=0).history
    expected = two.fit(texts, batch_size=2, epochs=2, shuffle=False, verbose=0).history
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-4)


def test_validation_data_may_be_text(new_lm):
    lm = compiled(new_lm())
    history = lm.fit(
        PAIRS, validation_data=PAIRS, batch_size=4, epochs=2, verbose=0
    ).history
    after = lm.evaluate(PAIRS, batch_size=4, verbose=0)[0]
    assert history["val_loss"][-1] == pytest.approx(after, rel=1e-5)


def test_predict_gives_logits_of_text(new_lm):
    lm = new_lm()
    logits = lm.predict(["The cat"], verbose=0)
    x, _, _ = lm.preprocessor(["The cat"])
    expected = ops.convert_to_numpy(lm(x))
    keep = x["padding_mask"]
    np.testing.assert_allclose(logits[keep], expected[keep], atol=1e-4)


def test_targets_with_text_are_refused(new_lm):
    with pytest.raises(ValueError, match="Targets come from the text"):
        new_lm().fit(["a"], np.zeros((1, 3)))


def test_frozen_weights_do_not_move(new_lm):
    lm = new_lm()
    lm.backbone.enable_lora(2)
    compiled(lm, 0.05)
    frozen = [v for v in lm.variables if "lora" not in v.path and "seed" not in v.path]
    frozen = [v for v in frozen if v.path in lm.config.weight_shapes()]
    before = [np.array(ops.convert_to_numpy(v)) for v in frozen]
    held = [variable.value for variable in frozen]
    history = lm.fit(PAIRS, batch_size=4, epochs=4, verbose=0).history
    assert history["loss"][-1] < history["loss"][0]
    lm.evaluate(PAIRS, batch_size=4, verbose=0)
    for variable, value, was in zip(frozen, before, held, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(variable), value)
        # Nor are they copied, in the memory that they came in.
        assert variable.value is was


def test_an_adam_that_would_not_move_bfloat16_weights_is_refused(new_lm):
    lm = compiled(new_lm(dtype="bfloat16"))
    with pytest.raises(ValueError, match="every step is 0"):
        lm.fit(PAIRS, verbose=0)
    lm.backbone.enable_lora(2)
    history = compiled(lm, 0.05).fit(PAIRS, epochs=4, verbose=0).history
    assert history["loss"][-1] < history["loss"][0]


@pytest.mark.parametrize("policy", ["bfloat16", "mixed_bfloat16", "mixed_float16"])
def test_fit_works_in_every_precision(new_lm, policy):
    lm = compiled(new_lm(dtype=policy), beta_2=0.99)
    history = lm.fit(PAIRS, batch_size=4, epochs=5, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    assert history["loss"][-1] < history["loss"][0]


def test_gradients_reach_the_embeddings_that_are_given(new_lm, backend):
    """d(logit)/d(embedding) against a central difference."""
    lm = new_lm()
    rows = np.random.default_rng(3).normal(size=(1, 5, 24)).astype("float32") * 0.2
    way = np.random.default_rng(4).normal(size=rows.shape).astype("float32")

    def value(x):
        return lm({"embeddings": x})[0, -1, 7]

    if backend == "jax":
        import jax

        gradient = np.asarray(jax.grad(value)(rows))
    elif backend == "torch":
        import torch

        x = torch.tensor(rows, device=torch_device(), requires_grad=True)
        value(x).backward()
        gradient = x.grad.cpu().numpy()
    else:
        import tensorflow as tf

        x = tf.constant(rows)
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = value(x)
        gradient = tape.gradient(y, x).numpy()
    step = 1e-3
    high = float(ops.convert_to_numpy(value(ops.convert_to_tensor(rows + step * way))))
    low = float(ops.convert_to_numpy(value(ops.convert_to_tensor(rows - step * way))))
    assert (gradient * way).sum() == pytest.approx((high - low) / (2 * step), rel=0.02)


def good_and_bad(lm):
    """Two batches that the model can take, and a third whose parts do not fit."""
    x, y, weights = lm.preprocessor(["The cat sat", "A dog"], sequence_length=8)
    yield x, y, weights
    yield x, y, weights
    yield {key: value[:, :5] for key, value in x.items()}, y, weights


def test_a_batch_that_fails_leaves_the_model_as_it_was(new_lm):
    """Keras' JAX trainer keeps the weights outside of the model meanwhile."""
    lm = stepwise(new_lm())
    for work, steps in (("fit", "steps_per_epoch"), ("evaluate", "steps")):
        with pytest.raises(Exception) as failure:
            getattr(lm, work)(good_and_bad(lm), **{steps: 3}, verbose=0)
        assert "deleted" not in str(failure.value)
        assert "NoneType" not in str(failure.value)
        assert int(lm.optimizer.iterations) == 2
        assert lm.generate("The", max_new_tokens=2).startswith("The")
    *_, bad = good_and_bad(lm)
    with pytest.raises(Exception) as failure:
        lm.train_on_batch(*bad)
    assert "deleted" not in str(failure.value)
    assert int(lm.optimizer.iterations) == 2
    losses = [
        lm.fit(good_and_bad(lm), steps_per_epoch=2, verbose=0).history["loss"][0]
        for _ in range(2)
    ]
    assert losses[1] < losses[0]
    assert int(lm.optimizer.iterations) == 6


def test_what_a_failed_program_took_along_is_told_and_restored(
    new_lm, backend, tmp_path
):
    if backend != "jax":
        pytest.skip("only JAX gives the weights away during a step")
    lm = stepwise(new_lm())
    checkpoints = Checkpoints(tmp_path, 1)
    steps = {"steps_per_epoch": 2, "verbose": 0}
    lm.fit(good_and_bad(lm), callbacks=[checkpoints], **steps)
    expected = [np.array(ops.convert_to_numpy(v)) for v in lm.weights]

    class Loss(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            # self.model would bring them to the variables first.
            for value in lm._jax_state["trainable_variables"][::2]:
                value.delete()
            raise InterruptedError

    with pytest.raises(RuntimeError, match="lost with it"):
        lm.fit(good_and_bad(lm), callbacks=[Loss()], **steps)

    def assert_restored():
        assert Checkpoints(tmp_path, 1).restore(lm) == 2
        for variable, value in zip(lm.weights, expected, strict=True):
            np.testing.assert_array_equal(ops.convert_to_numpy(variable), value)

    assert_restored()

    def lose(state, data):
        for value in state[0][::2]:
            value.delete()
        raise InterruptedError

    lm.train_function = lose
    with pytest.raises(RuntimeError, match="lost with it"):
        lm.train_on_batch(*next(good_and_bad(lm)))
    assert_restored()
