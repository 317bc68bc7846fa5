"""Encoding, packing and buckets: nothing is lost, mixed or left to chance."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_keras import bins
from gemma_keras.chat import encode_chat
from gemma_keras.encoding import EncodedExamples, ExampleEncoder, Sample
from gemma_keras.encoding import encode_examples as encode
from gemma_keras.packing import BucketedDataset, PackedDataset
from gemma_keras.preprocessor import GemmaCausalLMPreprocessor
from gemma_keras.readers import read_examples
from gemma_keras.tokenizer import GemmaTokenizer

pytestmark = pytest.mark.any_backend

CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "count"},
    {"role": "assistant", "content": "12 boats"},
    {"role": "user", "content": "the <end_of_turn> stars"},
    {"role": "assistant", "content": "no"},
]
PAIR = {"prompt": "the keeper", "response": "boats"}
ALPACA = {"instruction": "count", "output": "12 boats"}


def sample(length, learned=1, start=0):
    """A sample of ids that are found nowhere else, the last `learned` of them."""
    ids = list(range(start, start + length))
    return Sample(ids, [False] * (length - learned) + [True] * learned, False)


def samples_of(lengths):
    ends = np.cumsum(lengths)
    return [
        sample(n, max(1, n // 2), end - n)
        for n, end in zip(lengths, ends.tolist(), strict=True)
    ]


def encoded_of(lengths, sequence_length=None):
    sequence_length = sequence_length or max(lengths) - 1
    return EncodedExamples(samples_of(lengths), sequence_length, "error")


# ---------------------------------------------------------------- encoding


def learned_text(tokenizer, given):
    return tokenizer.decode([i for i, on in zip(*given[:2], strict=True) if on])


@pytest.mark.parametrize(
    ("loss_on", "learned"),
    [
        ("response", "12 boats<end_of_turn>no<end_of_turn>"),
        ("last", "no<end_of_turn>"),
    ],
)
def test_what_is_learned_of_a_chat(small, loss_on, learned):
    (example,) = read_examples([CHAT])
    found = ExampleEncoder(small, loss_on=loss_on)(example)
    assert found.ids == encode_chat(small, CHAT, add_generation_prompt=False)
    assert learned_text(small, found) == learned
    assert all(ExampleEncoder(small, loss_on="all")(example).learn)


def test_a_text_is_learned_whole_and_a_pair_in_its_response(small):
    text, pair = read_examples(["the boats"]), read_examples([PAIR])
    encoder = ExampleEncoder(small)
    found = encoder(text[0])
    assert found.ids == [2, *small.encode("the boats"), 1] and all(found.learn)
    found = encoder(pair[0])
    assert found.ids == [2, *small.encode("the keeper"), *small.encode("boats"), 1]
    assert learned_text(small, found) == "boats" and found.learn[-1]
    whole = ExampleEncoder(small, loss_on="all")(pair[0])
    assert all(whole.learn) and whole.ids == found.ids


@pytest.mark.parametrize(
    ("row", "settings", "chat"),
    [
        (PAIR, {}, False),
        (PAIR, {"instruct": True}, True),
        (PAIR, {"chat_template": True}, True),
        (PAIR, {"chat_template": False, "instruct": True}, False),
        (ALPACA, {}, True),
        (ALPACA, {"chat_template": False}, False),
        ({**PAIR, "prompt": "<start_of_turn>user"}, {"instruct": True}, False),
        (CHAT, {"chat_template": False}, True),
        ("the boats", {"chat_template": True}, False),
    ],
)
def test_what_is_written_as_a_chat(small, row, settings, chat):
    (example,) = read_examples([row])
    encoder = ExampleEncoder(small, **settings)
    assert encoder.as_chat(example) == chat
    found = encoder(example)
    assert found.ids[0] == 2 and 2 not in found.ids[1:]
    stop = small.end_of_turn_id if chat else 1
    last = max(i for i, learn in enumerate(found.learn) if learn)
    assert found.ids[last] == stop
    # Nothing but the line end of the last turn follows what is learned.
    assert small.decode(found.ids[last + 1 :]).strip() == ""


def test_an_instruction_without_turns_is_set_apart_from_its_answer(small):
    (example,) = read_examples([{**ALPACA, "input": "the boats"}])
    found = ExampleEncoder(small, chat_template=False)(example)
    assert small.decode(found.ids) == (
        "Instruction:\ncount\n\nthe boats\n\nResponse:\n12 boats"
    )
    assert learned_text(small, found) == "12 boats"


def test_without_turn_markers_instructions_are_text_and_chats_refused(train_small):
    pieces = ("<start_of_turn>", "<end_of_turn>")
    bare = GemmaTokenizer(train_small(control=pieces))
    bare.start_of_turn_id = bare.end_of_turn_id = None
    alpaca, chat = read_examples([ALPACA]), read_examples([CHAT])
    assert "Response" in bare.decode(ExampleEncoder(bare)(alpaca[0]).ids)
    with pytest.raises(ValueError, match="it cannot write chats"):
        ExampleEncoder(bare)(chat[0])
    with pytest.raises(ValueError, match="chat_template=False"):
        ExampleEncoder(bare, chat_template=True)


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ({"loss_on": "prompt"}, "loss_on must be response, last, all"),
        ({"chat_template": "yes"}, "chat_template must be True, False"),
    ],
)
def test_bad_settings_of_an_encoder_are_refused(small, bad, told):
    with pytest.raises(ValueError, match=told):
        ExampleEncoder(small, **bad)


def test_the_preprocessor_encodes_examples_as_the_encoder_does(small):
    preprocessor = GemmaCausalLMPreprocessor(small, sequence_length=80)
    rows = read_examples([PAIR]) + read_examples([CHAT]) + read_examples(["the boats"])
    x, y, weight = preprocessor(rows)
    for i, example in enumerate(rows):
        found = preprocessor.encoder()(example)
        assert x["token_ids"][i][x["padding_mask"][i]].tolist() == found.ids
        learned = [i for i, on in zip(*found[:2], strict=True) if on]
        # The first token of a text is never predicted.
        assert y[i][weight[i] > 0].tolist() == learned[example.text is not None :]


# --------------------------------------------------------- long and useless


def test_examples_come_back_as_they_were_given():
    samples = [sample(5, 2, 10), sample(3, 1, 50)]
    encoded = EncodedExamples(samples, 8, "error")
    assert len(encoded) == 2
    for found, given_ in zip(encoded, samples, strict=False):
        assert found[0].tolist() == given_.ids and found[1].tolist() == given_.learn
    assert encoded.lengths.tolist() == [4, 2]
    assert (encoded.num_tokens, encoded.num_supervised) == (6, 3)


def test_what_follows_the_last_learned_token_takes_no_place():
    learn = [False, True, False, True, False, False]
    encoded = EncodedExamples([Sample(list(range(6)), learn, False)], 8, "error")
    assert encoded[0][0].tolist() == [0, 1, 2, 3]


def test_what_is_cut_is_counted_and_said():
    fits, cut, gone, prompt = sample(5), sample(9, 6), sample(9, 1), sample(4, 0)
    with pytest.warns(UserWarning) as caught:
        encoded = encode([fits, cut, gone, prompt], lambda one: one, 4)
    assert str(caught[0].message) == (
        "Of 4 examples 2 were longer than sequence_length=4 and cut, 2 of them in what "
        "is to be learned; 2 were left out."
    )
    assert encoded.sources.tolist() == [0, 1]
    assert encoded[1][0].tolist() == cut.ids[:5]
    assert (encoded.num_cut, encoded.num_answers_cut, encoded.num_dropped) == (2, 2, 2)


def test_an_example_cut_behind_its_answer_loses_nothing():
    """Here all but the last turn is learned, and only that turn is too long."""
    learn = [False, True, True, *[False] * 9]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoded = encode([Sample(list(range(12)), learn, False)], lambda one: one, 4)
    assert encoded.num_cut == 0


def test_long_examples_can_be_dropped_or_refused():
    long, short = sample(9, 6), sample(5)
    with pytest.warns(UserWarning, match="1 were left out"):
        assert len(encode([long, short], lambda one: one, 4, "drop")) == 1
    with pytest.raises(ValueError, match="Example 1 has 8 tokens to read"):
        encode([short, long], lambda one: one, 4, "error")
    with pytest.raises(ValueError, match="too_long must be cut, drop, error"):
        encode([short], lambda one: one, 4, "squeeze")
    with pytest.raises(ValueError, match="No example has a token to learn"):
        encode([sample(9, 1)], lambda one: one, 4)


# ----------------------------------------------------------------- packing

LENGTHS = st.lists(st.integers(2, 17), min_size=1, max_size=60)


def examples_in(batches):
    """Ids of every example in packed batches, read by segment."""
    found = []
    for x, y, weight in batches:
        for row in range(len(y)):
            segments = x["segment_ids"][row]
            assert ((segments > 0) == x["padding_mask"][row]).all()
            for segment in range(1, segments.max() + 1):
                here = np.flatnonzero(segments == segment)
                assert (np.diff(here) == 1).all()
                assert x["positions"][row, here].tolist() == list(range(len(here)))
                inputs, labels = x["token_ids"][row, here], y[row, here]
                # A label is the next input, and the last one that of no other.
                assert (inputs[1:] == labels[:-1]).all()
                ids = [*inputs.tolist(), int(labels[-1])]
                found.append((ids, (weight[row, here] > 0).tolist()))
            assert not weight[row, segments == 0].any()
    return found


@settings(max_examples=60)
@given(lengths=LENGTHS, batch_size=st.integers(1, 5), room=st.integers(0, 20))
def test_packing_holds_every_token_once_and_mixes_nothing(lengths, batch_size, room):
    encoded = encoded_of(lengths, max(lengths) - 1 + room)
    dataset = PackedDataset(encoded, batch_size, seed=3)
    for epoch in (0, 1):
        batches = [dataset.batch(epoch, i) for i in range(len(dataset))]
        found = sorted(examples_in(batches))
        assert [ids for ids, _ in found] == [s.ids for s in samples_of(lengths)]
        assert [on for _, on in found] == [s.learn[1:] for s in samples_of(lengths)]
        shape = (batch_size, encoded.sequence_length)
        for x, y, weight in batches:
            assert {a.shape for a in (*x.values(), y, weight)} == {shape}
        rows = dataset.rows(epoch)
        assert sorted(i for row in rows for i in row) == list(range(len(lengths)))


@settings(max_examples=60)
@given(lengths=LENGTHS, batch_size=st.integers(1, 5))
def test_buckets_hold_every_token_once(lengths, batch_size):
    dataset = BucketedDataset(encoded_of(lengths), batch_size, seed=3)
    for epoch in (0, 1):
        found = []
        for i in range(len(dataset)):
            x, y, weight = dataset.batch(epoch, i)
            assert x["token_ids"].shape[1] in dataset.lengths
            assert {a.shape for a in (*x.values(), y, weight)} == {y.shape}
            # No shorter bucket would have done.
            longest = x["padding_mask"].sum(1).max()
            assert longest > max([0, *dataset.lengths[dataset.lengths < y.shape[1]]])
            for row in range(batch_size):
                n = x["padding_mask"][row].sum()
                assert (
                    not x["padding_mask"][row, n:].any() and not weight[row, n:].any()
                )
                if n:
                    ids = [*x["token_ids"][row, :n].tolist(), int(y[row, n - 1])]
                    found.append((ids, (weight[row, :n] > 0).tolist()))
        found.sort()
        assert [ids for ids, _ in found] == [s.ids for s in samples_of(lengths)]
        assert [on for _, on in found] == [s.learn[1:] for s in samples_of(lengths)]


@given(lengths=st.lists(st.integers(1, 30), max_size=60), room=st.integers(0, 30))
def test_best_fit_is_what_its_name_says(lengths, room):
    """Against the definition, spelt out: the row with the least room that fits."""
    size = max([1, *lengths]) + room
    rows, left = [], []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [r for r in left if r >= lengths[index]]
        if fitting:
            left[left.index(min(fitting))] -= lengths[index]
        else:
            left.append(size - lengths[index])
    rows = bins.best_fit(np.array(lengths, int), size)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    found = sorted(size - sum(lengths[i] for i in row) for row in rows)
    assert found == sorted(left)


@pytest.mark.parametrize("lengths", [[0, 3], [9]])
def test_lengths_that_fit_in_no_row_are_refused(lengths):
    with pytest.raises(ValueError, match="from 1 to 8"):
        bins.best_fit(np.array(lengths), 8)


def alpaca_like(count, seed=0):
    """Lengths as Alpaca's: log-normal prompts and responses, cut at 512."""
    rng = np.random.default_rng(seed)
    prompts = rng.lognormal(np.log(27), 0.45, count)
    responses = rng.lognormal(np.log(75), 0.85, count)
    return np.minimum((prompts + responses).astype(int), 512)


@pytest.mark.parametrize("size", [512, 1024])
@pytest.mark.parametrize("count", [1000, 20_000])
def test_at_least_95_percent_of_the_slots_are_used(size, count):
    lengths = alpaca_like(count)
    rows = bins.best_fit(lengths, size)
    slots = sum(lengths[i] for row in rows for i in row)
    assert slots == lengths.sum()
    assert slots / (len(rows) * size) >= 0.95
    assert bins.usage(rows, lengths, size) == pytest.approx(slots / len(rows) / size)


@pytest.mark.parametrize("size", [512, 1024])
def test_batches_use_as_many_slots_as_was_promised(size):
    lengths = alpaca_like(1000) + 1
    dataset = PackedDataset(encoded_of(lengths.tolist()), 1, size)
    filled = sum(dataset[i][0]["padding_mask"].sum() for i in range(len(dataset)))
    assert filled == (lengths - 1).sum()
    assert filled / (len(dataset) * size) == pytest.approx(dataset.usage)
    assert dataset.usage >= 0.95


def test_buckets_waste_less_than_padding_to_the_longest():
    lengths = alpaca_like(2000) + 1
    dataset = BucketedDataset(encoded_of(lengths.tolist(), 512), 8)
    slots = sum(dataset[i][1].size for i in range(len(dataset)))
    assert dataset.usage == pytest.approx((lengths - 1).sum() / slots)
    assert dataset.usage > 2 * (lengths - 1).mean() / 512


# ----------------------------------------------------------- order and epochs


def same(left, right):
    left, right = ([*x.values(), y, w] for x, y, w in (left, right))
    return all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.fixture(params=[PackedDataset, BucketedDataset])
def make(request):
    encoded = encoded_of((alpaca_like(200) // 8 + 2).tolist())
    return lambda **settings: request.param(encoded, 4, **settings)


def test_a_batch_depends_on_seed_epoch_and_number_alone(make):
    one, two = make(seed=5), make(seed=5)
    for _ in range(3):
        one.on_epoch_end()
    for i in range(len(one)):
        two.batch(i, 0)
    two.set_epoch(3)
    for i in reversed(range(len(one))):
        assert same(one[i], two[i]) and same(one[i], two.batch(3, i))
    assert not all(same(make(seed=6).batch(3, i), one[i]) for i in range(len(one)))


def test_each_epoch_has_another_order_unless_it_is_not_to(make):
    shuffled, fixed = make(), make(shuffle=False)
    numbers = range(len(shuffled))
    assert not all(same(shuffled.batch(0, i), shuffled.batch(1, i)) for i in numbers)
    assert all(same(fixed.batch(0, i), fixed.batch(1, i)) for i in numbers)
    assert len(shuffled) == len(fixed)


def test_rows_are_packed_anew_in_each_epoch():
    lengths = (alpaca_like(400) // 8 + 2).tolist()
    dataset = PackedDataset(encoded_of(lengths), 4)
    first, second = ({frozenset(r) for r in dataset.rows(e)} for e in (0, 1))
    assert len(first & second) < 0.5 * len(first)
    assert len(first) == len(second)


def test_there_is_no_batch_behind_the_last(make):
    dataset = make()
    assert len(list(dataset)) == len(dataset) == dataset.num_batches
    for index in (-1, len(dataset)):
        with pytest.raises(IndexError, match="batches, got index"):
            dataset[index]


@pytest.mark.parametrize("batch_size", [0, 2.5, True])
@pytest.mark.parametrize("kind", [PackedDataset, BucketedDataset])
def test_a_bad_batch_size_is_refused(kind, batch_size):
    with pytest.raises(ValueError, match="batch_size must be"):
        kind(encoded_of([3, 4]), batch_size)


def test_what_is_not_encoded_or_does_not_fit_is_refused():
    with pytest.raises(TypeError, match="what encode_examples returns"):
        PackedDataset(["a text"], 4)
    with pytest.raises(ValueError, match="sequence_length is 5 and an example has 8"):
        PackedDataset(encoded_of([9]), 4, 5)
    with pytest.raises(ValueError, match="the longest bucket is 5"):
        BucketedDataset(encoded_of([9]), 4, (3, 5))


# ---------------------------------------------------------------- shards


@pytest.mark.parametrize("kind", [PackedDataset, BucketedDataset])
def test_shards_together_are_the_whole_batches(kind):
    examples = encoded_of([9, 3, 4, 8, 2, 5, 7, 6, 3, 2, 9])
    whole = kind(examples, 4, seed=2)
    shards = [kind(examples, 4, seed=2, shard=(i, 2)) for i in range(2)]
    assert {len(shard) for shard in shards} == {len(whole)}
    for epoch in range(2):
        for number in range(len(whole)):
            expected = whole.batch(epoch, number)
            parts = [shard.batch(epoch, number) for shard in shards]
            for name in expected[0]:
                together = np.concatenate([x[name] for x, _, _ in parts])
                np.testing.assert_array_equal(together, expected[0][name])
            for place in (1, 2):
                together = np.concatenate([part[place] for part in parts])
                np.testing.assert_array_equal(together, expected[place])


@pytest.mark.parametrize(
    ("shard", "told"),
    [((2, 2), "index from 0"), ((-1, 2), "index from 0"), ((0, 3), "a multiple")],
)
def test_a_shard_that_cannot_be_is_refused(shard, told):
    with pytest.raises(ValueError, match=told):
        PackedDataset(encoded_of([4, 5]), 4, shard=shard)
