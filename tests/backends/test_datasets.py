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
        np.testing.assert_allclose(found[learned], losses, rtol=0, atol=1e-5)


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
        np.testing.assert_allclose(found[learned], losses, rtol=0, atol=1e-5)


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


ROWS = [
    {"prompt": "the cat sat", "response": " on a mat"},
    {"prompt": "the moon", "response": " looked at the cat"},
    {"prompt": "a mat", "response": " sat"},
]
COLUMNS = {key: [row[key] for row in ROWS] for key in ROWS[0]}
PLURAL = {f"{key}s": column for key, column in COLUMNS.items()}


def assert_same(found, expected):
    for one, two in zip(*map(keras.tree.flatten, (found, expected)), strict=True):
        np.testing.assert_array_equal(one, two)


def prepared(lm, x, **settings):
    return data.prepare(x, None, None, lm.preprocessor, **settings)


def batches_of(lm, x, **settings):
    """What an epoch reads of something that yields batches."""
    dataset = prepared(lm, x, **settings)[0]
    if isinstance(dataset, keras.utils.PyDataset):
        return [dataset[i] for i in range(dataset.num_batches)]
    return list(dataset)


def write_rows(path):
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


class Stream:
    """Rows that can be read again and again, and have no length."""

    def __iter__(self):
        return iter(ROWS)


@pytest.mark.parametrize(
    "x",
    [ROWS, tuple(ROWS), COLUMNS, PLURAL, (row for row in ROWS), Stream()],
    ids=["list", "tuple", "columns", "KerasHub's", "generator", "stream"],
)
def test_rows_and_columns_are_read_whatever_holds_them(lm, x):
    assert_same(prepared(lm, x), lm.preprocessor(PLURAL))


def test_one_row_and_one_chat_are_a_batch_of_one(lm):
    row = {key: column[0] for key, column in PLURAL.items()}
    expected = lm.preprocessor({key: [value] for key, value in row.items()})
    for x in (row, ROWS[0], ROWS[:1]):
        assert_same(prepared(lm, x), expected)
    chat = [
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": "sat"},
    ]
    assert_same(prepared(lm, chat), lm.preprocessor([chat]))


def test_the_name_of_a_file_is_no_text_to_learn(lm, tmp_path, monkeypatch):
    write_rows(tmp_path / "pairs.jsonl")
    monkeypatch.chdir(tmp_path)
    assert_same(prepared(lm, "pairs.jsonl"), lm.preprocessor(PLURAL))
    for x, told in [
        ("pears.jsonl", "pears.jsonl: there is no such file. If this is a text"),
        (str(tmp_path / "data.csv.gz"), "there is no such file"),
        (str(tmp_path), "is a directory"),
        (["pairs.jsonl", "more.jsonl"], r"read_examples\('pairs.jsonl'\) \+ read"),
        ([tmp_path / "pairs.jsonl"], "Files are read one at a time"),
        (["pears.txt"] * 3, r"read_examples\('pears.txt'\) \+ \.\.\."),
    ]:
        with pytest.raises(ValueError, match=told):
            lm.fit(x, verbose=0)
    for text in ("the cat sat", "the cat.\nIt is in pairs.jsonl"):
        assert_same(prepared(lm, text), lm.preprocessor([text]))
    texts = ["pairs.jsonl", "the cat sat"]
    assert_same(prepared(lm, texts), lm.preprocessor(texts))


def test_bad_rows_are_told_before_training(lm):
    rows = [*ROWS, {"prompt": "the cat", "response": " "}]
    with pytest.raises(ValueError, match="row 3: its response is empty"):
        lm.fit(iter(rows), verbose=0)


def test_batches_of_rows_and_columns_are_read_too(lm):
    expected = lm.preprocessor(PLURAL)
    for batch in (ROWS, COLUMNS, PLURAL, {k: np.array(v) for k, v in COLUMNS.items()}):
        for found in batches_of(lm, iter([batch, (batch,)])):
            assert_same(found, expected)


def test_a_dataset_that_yields_rows_where_batches_are_counted_is_refused(lm):
    torch = pytest.importorskip("torch.utils.data", reason="needs torch")
    loader = torch.DataLoader(ROWS, batch_size=None)
    with pytest.raises(ValueError, match=r"got one example: .*batch_size=8"):
        batches_of(lm, loader)
    for settings in ({}, {"collate_fn": list}):
        loader = torch.DataLoader(ROWS, batch_size=3, **settings)
        assert_same(batches_of(lm, loader), [lm.preprocessor(PLURAL)])
    chats = [[{"role": "user", "content": "a"}, {"role": "model", "content": "b"}]] * 2
    loader = torch.DataLoader([{"messages": chat} for chat in chats], batch_size=2)
    with pytest.raises(ValueError, match="collate_fn=list for chats"):
        batches_of(lm, loader)


def test_columns_of_tensors_of_text_are_read(lm):
    tf = pytest.importorskip("tensorflow", reason="needs TensorFlow")
    columns = tf.data.Dataset.from_tensor_slices(COLUMNS)
    assert_same(batches_of(lm, columns.batch(3)), [lm.preprocessor(PLURAL)])
    with pytest.raises(ValueError, match=r"got one example: .*\.batch\(8\)"):
        batches_of(lm, columns)


def test_a_stream_with_steps_is_read_as_it_is_needed(new_lm):
    read = 0

    def rows():
        nonlocal read
        while True:
            read += 1
            yield ROWS[read % 3]

    lm = compiled(new_lm())
    settings = {"batch_size": 2, "verbose": 0}
    history = lm.fit(
        rows(), steps_per_epoch=3, epochs=2, validation_data=Stream(), **settings
    ).history
    assert np.isfinite(history["loss"] + history["val_loss"]).all()
    assert 12 <= read <= 16
    assert np.isfinite(lm.evaluate(rows(), steps=2, **settings)).all()
    # One that can be read again goes on as long as it is asked to.
    history = lm.fit(Stream(), steps_per_epoch=3, epochs=2, **settings).history
    assert len(history["loss"]) == 2


def test_genuine_hugging_face_datasets_are_read_whole(lm):
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    whole = datasets.Dataset.from_list(ROWS)
    streamed = whole.to_iterable_dataset()
    for x in (whole, streamed):
        assert_same(prepared(lm, x), lm.preprocessor(PLURAL))
        assert_same(batches_of(lm, x.batch(3)), [lm.preprocessor(PLURAL)])
    with pytest.raises(ValueError, match="has splits"):
        lm.fit(datasets.DatasetDict(train=whole), verbose=0)


def test_a_data_frame_is_read_by_its_columns(lm):
    pandas = pytest.importorskip("pandas", reason="needs pandas")
    assert_same(prepared(lm, pandas.DataFrame(ROWS)), lm.preprocessor(PLURAL))
