"""Packed and bucketed rows give each example the loss that it has alone."""

import json

import keras
import numpy as np
import pytest
from keras import ops

from gemma_keras import data
from gemma_keras.encoding import encode_examples
from gemma_keras.packing import BucketedDataset, PackedDataset
from gemma_keras.readers import read_examples

WORDS = "the cat sat on a mat and looked at the moon for a long while".split()
LENGTH = 64


@pytest.fixture(scope="module")
def examples():
    """Chats of one and two turns, pairs and texts of many lengths."""
    rng = np.random.default_rng(4)

    def words(most):
        return " ".join(rng.choice(WORDS, rng.integers(1, most)))

    chats = []
    for turns in (1, 2, 1, 2, 1):
        roles = ["user", "assistant"] * turns
        chats.append([{"role": role, "content": words(6)} for role in roles])
    pairs = [{"prompt": words(9), "response": " " + words(12)} for _ in range(7)]
    return read_examples(chats) + read_examples(pairs) + read_examples([words(20)] * 2)


@pytest.fixture(scope="module")
def encoded(lm, examples):
    return encode_examples(examples, lm.preprocessor.encoder(), LENGTH, "error")


def token_losses(lm, batch):
    """Negative log-probabilities [B, T] of the labels, by the model's own logits."""
    x, y, _ = batch
    logits = ops.convert_to_numpy(lm(x)).astype("float64")
    logits -= logits.max(-1, keepdims=True)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(log_probs, y[..., None], -1)[..., 0]


@pytest.fixture(scope="module")
def alone(lm, examples):
    """What is learned of each example, and the loss of it in a row of its own."""
    batch = lm.preprocessor(list(examples), sequence_length=LENGTH)
    losses, (_, y, weight) = token_losses(lm, batch), batch
    return {
        tuple(y[i][weight[i] > 0].tolist()): losses[i][weight[i] > 0]
        for i in range(len(y))
    }


def test_packed_examples_have_the_losses_that_they_have_alone(lm, encoded, alone):
    """Most examples are longer than the sliding window, rows are far longer."""
    dataset, found = PackedDataset(encoded, 2, seed=1), {}
    assert max(map(len, dataset.rows())) >= 3
    for i in range(len(dataset)):
        losses, (x, y, weight) = token_losses(lm, dataset[i]), dataset[i]
        for row, segments in enumerate(x["segment_ids"]):
            for segment in range(1, segments.max() + 1):
                here = (segments == segment) & (weight[row] > 0)
                found[tuple(y[row][here].tolist())] = losses[row][here]
    assert found.keys() == alone.keys()
    for learned, losses in alone.items():
        np.testing.assert_allclose(found[learned], losses, rtol=1e-5, atol=1e-5)


def test_bucketed_examples_have_the_losses_that_they_have_alone(lm, encoded, alone):
    dataset, found = BucketedDataset(encoded, 4, (32, LENGTH), seed=1), {}
    for i in range(len(dataset)):
        losses, (_, y, weight) = token_losses(lm, dataset[i]), dataset[i]
        for row in range(len(y)):
            learned = weight[row] > 0
            if learned.any():
                found[tuple(y[row][learned].tolist())] = losses[row][learned]
    assert found.keys() == alone.keys()
    for learned, losses in alone.items():
        np.testing.assert_allclose(found[learned], losses, rtol=1e-5, atol=1e-5)


def test_a_row_sees_nothing_of_the_examples_beside_it(lm, encoded):
    """Another token in one example changes the logits of that example alone."""
    x, _, _ = PackedDataset(encoded, 2, seed=1)[0]
    changed = dict(x, token_ids=x["token_ids"].copy())
    changed["token_ids"][0, 1] += 1
    before, after = (ops.convert_to_numpy(lm(inputs)) for inputs in (x, changed))
    differ = (before != after).any(-1)
    assert differ[0][x["segment_ids"][0] == 1][1:].all()
    np.testing.assert_allclose(
        before[0][x["segment_ids"][0] > 1], after[0][x["segment_ids"][0] > 1], atol=1e-5
    )


def compiled(lm):
    # Tracing would take TensorFlow longer than the steps; the data comes the same way.
    eagerly = keras.backend.backend() == "tensorflow"
    lm.compile(optimizer=keras.optimizers.Adam(0.01), run_eagerly=eagerly)
    return lm


def test_fit_trains_on_each_batch_of_each_epoch_in_order(new_lm, encoded):
    """The same steps, one by one, have the same losses, also from a later epoch on."""
    dataset = PackedDataset(encoded, 2, seed=2)
    lm, by_hand = compiled(new_lm()), compiled(new_lm())
    history = lm.fit(dataset, initial_epoch=1, epochs=3, verbose=0).history["loss"]
    expected = []
    for epoch in (1, 2):
        losses, tokens = [], []
        for i in range(len(dataset)):
            by_hand.reset_metrics()
            batch = dataset.batch(epoch, i)
            losses.append(by_hand.train_on_batch(*batch)[0])
            tokens.append(batch[2].sum())
        expected.append(np.average(losses, weights=tokens))
    np.testing.assert_allclose(history, expected, rtol=1e-5)


def test_fit_and_evaluate_take_examples_and_the_path_of_a_file(
    new_lm, examples, tmp_path
):
    pairs = [e for e in examples if e.format == "pairs"]
    rows = {
        "prompts": [e.prompt for e in pairs],
        "responses": [e.response for e in pairs],
    }
    path = tmp_path / "data.jsonl"
    lines = zip(*rows.values(), strict=True)
    path.write_text(
        "".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in lines)
    )
    lm = compiled(new_lm())
    expected = lm.preprocessor(rows)
    for x in (pairs, read_examples(path), path):
        found = data.prepare(x, None, None, lm.preprocessor)
        for one, two in zip(*map(keras.tree.flatten, (found, expected)), strict=True):
            np.testing.assert_array_equal(one, two)
    history = lm.fit(path, validation_data=path, batch_size=8, verbose=0).history
    assert np.isfinite(history["loss"] + history["val_loss"]).all()
