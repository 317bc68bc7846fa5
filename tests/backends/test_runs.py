"""The callbacks of a run with any `fit()`, and what they tell, keep and stop."""

import csv
import json
import math
import pathlib

import keras
import numpy as np
import pytest

from gemma_keras import PackedDataset, backend, encode_examples, read_examples
from gemma_keras.optimizers import make_optimizer
from gemma_keras.sft import (
    Checkpoints,
    DivergenceError,
    MetricsFile,
    Samples,
    StepMetrics,
    Steps,
    StopOnDivergence,
    TensorBoard,
    Validation,
    snapshots,
    state,
)
from gemma_keras.sft.state import StateError

TEXTS = [
    "The cat sat on the mat and looked at the moon.",
    "A dog came by and asked the cat what it had seen.",
    "They talked of stars, of mice, of milk and of the sea.",
    "Two birds sang 12 songs; the fox counted 345 leaves.",
    "The owl counted none.",
    "The sun came up.",
]
LENGTH = 24


@pytest.fixture
def dataset(new_lm):
    encoder = new_lm().preprocessor.encoder()
    with pytest.warns(UserWarning, match="cut"):
        encoded = encode_examples(read_examples(TEXTS), encoder, LENGTH)
    return PackedDataset(encoded, 2, seed=3)


@pytest.fixture
def learner(new_lm):
    """A function that builds the small model, ready to be trained."""

    def build(rate=1e-2, rank=2, **settings):
        lm = new_lm()
        lm.enable_lora(rank)
        lm.compile(optimizer=make_optimizer("adamw", rate), **settings)
        return lm

    return build


def rows(path):
    with pathlib.Path(path).open() as file:
        return list(csv.DictReader(file))


def test_steps_are_the_batches_of_all_epochs_from_any_of_them_on(dataset):
    count = len(dataset)
    steps = Steps(dataset, epochs=3)
    assert steps.total == len(steps) == 3 * count
    for number in range(3 * count):
        expected = dataset.batch(*divmod(number, count))
        for batch in (steps[number], Steps(dataset, 3, start=number)[0]):
            np.testing.assert_array_equal(batch[1], expected[1])
            np.testing.assert_array_equal(batch[2], expected[2])
    x, _, weight = steps[0]
    assert steps.counts(1) == (x["padding_mask"].sum(), (weight > 0).sum())
    two = Steps(dataset, 3, accumulation=2, max_steps=2, start=1)
    assert (two.total, len(two)) == (2, 2)
    np.testing.assert_array_equal(two[0][1], steps[2][1])


def test_the_last_step_is_of_the_batches_that_are_left(dataset):
    count = len(dataset)
    steps = Steps(dataset, epochs=2, accumulation=count + 1)
    assert (steps.total, len(steps)) == (2, 2 * count + 2)
    last = dataset.batch(1, count - 1)
    for number in range(2 * count - 1, len(steps)):
        x, y, weight = steps[number]
        np.testing.assert_array_equal(x["token_ids"], last[0]["token_ids"])
        np.testing.assert_array_equal(y, last[1])
        learned = number < 2 * count
        np.testing.assert_array_equal(weight, last[2] * learned)
        assert weight.dtype == last[2].dtype
    assert steps.counts(2) == (last[0]["padding_mask"].sum(), (last[2] > 0).sum())


def test_steps_refuse_what_has_no_numbers_and_what_makes_no_step(dataset):
    with pytest.raises(TypeError, match="PackedDataset or a BucketedDataset"):
        Steps([1, 2])
    with pytest.raises(ValueError, match="too few for a step of 99"):
        Steps(dataset, accumulation=99)


def test_a_run_in_a_notebook_tells_and_keeps_each_step(learner, dataset, tmp_path):
    """The loss of a row is the mean over the tokens of that step, and no other."""
    lm = learner(gradient_accumulation_steps=2)
    steps = Steps(dataset, epochs=4, accumulation=2)
    batches = [steps[i] for i in range(2)]
    expected = sum(
        float(np.sum(batch_losses(lm, x, y) * weight)) for x, y, weight in batches
    ) / sum(weight.sum() for _, _, weight in batches)
    measured = StepMetrics(steps)
    callbacks = [
        measured,
        Validation(dataset, 2, last=steps.total),
        Samples(tmp_path / "s.jsonl", ["The cat"], 3, max_new_tokens=3),
        MetricsFile(tmp_path / "m.csv"),
        StopOnDivergence(),
    ]
    checkpoints = Checkpoints(tmp_path / "c", 5, callbacks=callbacks, last=steps.total)
    lm.fit(steps, shuffle=False, verbose=0, callbacks=[*callbacks, checkpoints])
    found = rows(tmp_path / "m.csv")
    assert [int(row["step"]) for row in found] == list(range(1, steps.total + 1))
    assert float(found[0]["loss"]) == pytest.approx(expected, rel=1e-5)
    assert float(found[-1]["epoch"]) == steps.total / steps.steps_per_epoch
    seen = sum(int(steps[i][0]["padding_mask"].sum()) for i in range(len(steps)))
    assert int(found[-1]["tokens_seen"]) == measured.tokens_seen == seen
    assert [bool(row["val_loss"]) for row in found[:4]] == [False, True, False, True]
    last = [row for row in found if row["val_loss"]][-1]
    assert math.log(float(last["val_perplexity"])) == pytest.approx(
        float(last["val_loss"])
    )
    lines = (tmp_path / "s.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines[:2]] == [0, 3]
    # Another model goes on from there: the same weights, optimizer and counts.
    other = learner(gradient_accumulation_steps=2)
    again = StepMetrics()
    done = Checkpoints(tmp_path / "c", 2, callbacks=[again]).restore(other)
    assert done == again.start == steps.total
    for mine, theirs in (
        (other.trainable_variables, lm.trainable_variables),
        (other.optimizer.variables, lm.optimizer.variables),
    ):
        for one, two in zip(mine, theirs, strict=True):
            one, two = map(keras.ops.convert_to_numpy, (one, two))
            np.testing.assert_array_equal(one, two)
    # What belongs to another model is refused, and changes nothing.
    wrong = learner(rank=3)
    with pytest.raises(StateError, match="another model"):
        Checkpoints(tmp_path / "c", 2).restore(wrong)


def batch_losses(lm, x, y):
    """Losses [B, T] of a batch by way of all the logits, in numpy."""
    logits = keras.ops.convert_to_numpy(lm(x)).astype("float64")
    shifted = logits - logits.max(-1, keepdims=True)
    chosen = np.take_along_axis(shifted, y[..., None], -1)[..., 0]
    return np.log(np.exp(shifted).sum(-1)) - chosen


def test_nan_stops_with_advice_and_the_last_good_checkpoint(learner, dataset, tmp_path):
    class Poison(keras.callbacks.Callback):
        """Makes a weight NaN after the third step."""

        def on_train_batch_end(self, batch, logs=None):
            if batch == 2:
                logs["loss"] = float("nan")

    lm = learner()
    steps = Steps(dataset, epochs=4)
    checkpoints = Checkpoints(tmp_path / "c", 1)
    callbacks = [StepMetrics(steps), Poison(), MetricsFile(tmp_path / "m.csv")]
    with pytest.raises(
        DivergenceError, match=r"step 3 is nan.\nWhat helps.*learning rate"
    ):
        lm.fit(
            steps,
            shuffle=False,
            verbose=0,
            callbacks=[*callbacks, StopOnDivergence(), checkpoints],
        )
    newest = snapshots.newest(tmp_path / "c")
    assert snapshots.step_of(newest) == 2
    assert rows(tmp_path / "m.csv")[-1]["loss"] == "nan"
    # Weights that have gone bad are never kept, even if the loss has not told yet.
    bad = lm.trainable_variables[0]
    bad.assign(np.full(bad.shape, np.nan, "float32"))
    checkpoints.step = 9
    with pytest.raises(DivergenceError, match="holds NaN"):
        checkpoints.save()
    assert snapshots.newest(tmp_path / "c") == newest


def follow(callback, losses):
    """Gives a callback the losses of the steps; returns how many it stood."""
    for done, loss in enumerate(losses):
        callback.step = done + 1
        try:
            callback.on_step_end({"loss": loss})
        except DivergenceError:
            return done
    return len(losses)


@pytest.mark.any_backend
def test_only_a_loss_that_runs_away_stops():
    noisy = [2.0, 3.5] * 20
    assert follow(StopOnDivergence(), noisy) == 40
    assert follow(StopOnDivergence(), [0.1] * 20 + [0.9] * 20) == 40
    rising = [2.0] * 10 + [8.0] * 10
    assert 10 < follow(StopOnDivergence(), rising) < 20
    assert follow(StopOnDivergence(), [1.0, math.inf]) == 1
    first, second = StopOnDivergence(), StopOnDivergence()
    follow(first, rising[:12])
    second.set_state(json.loads(json.dumps(first.get_state())))
    assert second.losses == first.losses
    assert second.best == first.best


@pytest.mark.any_backend
def test_the_validation_stops_after_its_patience_and_the_best_is_kept(tmp_path):
    losses = iter([3.0, 2.0, 2.5, 2.1, 9.0])

    class Model:
        stop_training = False

        def evaluate(self, dataset, **_):
            return {"loss": next(losses)}

        def jax_state_sync(self):
            pass

    validation = Validation(None, 2, patience=2)
    validation.set_model(Model())
    kept = []
    checkpoints = Checkpoints(tmp_path, 100)
    checkpoints.set_model(validation.model)
    checkpoints.save = lambda: kept.append(checkpoints.step)
    for step in range(1, 11):
        validation.step = checkpoints.step = step
        logs = {"loss": 1.0}
        validation.on_step_end(logs)
        checkpoints.on_step_end(logs)
        assert ("val_loss" in logs) == (step % 2 == 0)
        if validation.model.stop_training:
            break
    assert step == 8
    assert validation.has_stopped
    assert checkpoints.best == {"name": snapshots.name_of(4), "val_loss": 2.0}
    assert kept == [2, 4, 8]


@pytest.mark.any_backend
def test_callbacks_of_one_class_keep_their_own_states(tmp_path, monkeypatch):
    monkeypatch.setattr(state, "first_bad", lambda lm: None)
    monkeypatch.setattr(state, "collect", lambda lm: {})
    monkeypatch.setattr(state, "restore", lambda lm, names, read: None)
    monkeypatch.setattr(backend, "sync_training", lambda lm: None)

    def make():
        found = [Validation([], 1), StepMetrics(), Validation([], 2)]
        return found, Checkpoints(tmp_path, 1, callbacks=found)

    (one, _, two), checkpoints = make()
    one.best, two.best = 1.5, 2.5
    checkpoints.step = 4
    checkpoints.save()
    (one, _, two), checkpoints = make()
    assert checkpoints.restore(None) == 4
    assert (one.best, two.best, one.start, two.start) == (1.5, 2.5, 4, 4)


@pytest.mark.any_backend
def test_a_run_whose_checkpoints_are_all_torn_begins_anew_and_keeps_its_own(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(state, "first_bad", lambda lm: None)
    monkeypatch.setattr(state, "collect", lambda lm: {})
    monkeypatch.setattr(backend, "sync_training", lambda lm: None)
    for step in (100, 200):
        torn = snapshots.write(tmp_path, step, {}, {"step": step})
        (torn / snapshots.STATE).write_bytes(b"")
    told = []
    checkpoints = Checkpoints(tmp_path, 1, keep=2, say=told.append)
    assert checkpoints.restore(None) == 0
    assert [line.endswith("It is passed over.") for line in told] == [True, True, False]
    assert str(tmp_path) in told[-1] and "anew" in told[-1]
    # Those of later steps would count as the newest, and push out what is whole.
    for checkpoints.step in (1, 2, 3):
        checkpoints.save()
    kept = [snapshots.step_of(path) for path in snapshots.every(tmp_path)]
    assert kept == [2, 3]
    assert snapshots.step_of(snapshots.newest(tmp_path)) == 3


@pytest.mark.any_backend
def test_tensorboard_reads_the_curves(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing import event_accumulator

    for start, losses in ((0, [3.0, 2.0, 9.0]), (2, [1.5])):
        board = TensorBoard(tmp_path)
        board.start = start
        board.set_model(type("Model", (), {"optimizer": None})())
        board.on_train_begin()
        for loss in losses:
            board.step += 1
            board.on_step_end({"step": board.step, "loss": loss})
        board.close()
    read = event_accumulator.EventAccumulator(str(tmp_path))
    read.Reload()
    points = [(event.step, event.value) for event in read.Scalars("loss")]
    assert points == [(1, 3.0), (2, 2.0), (3, 1.5)]


@pytest.mark.any_backend
def test_without_tensorboard_it_says_what_to_install(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ImportError, match=r"gemma_keras\[train\]"):
        TensorBoard(tmp_path)
