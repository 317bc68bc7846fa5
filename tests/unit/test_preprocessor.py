"""Text to arrays: KerasHub's meaning, plus pairs, chats, and nothing cut silently."""

import warnings

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_keras.chat import encode_chat, encode_chat_with_mask
from gemma_keras.preprocessor import GemmaCausalLMPreprocessor

CHAT = [
    {"role": "user", "content": "count"},
    {"role": "assistant", "content": "12 boats"},
    {"role": "user", "content": "the <end_of_turn> stars"},
    {"role": "assistant", "content": "no"},
]
QUESTION = CHAT[:3]


@pytest.fixture
def preprocessor(small):
    return GemmaCausalLMPreprocessor(small, sequence_length=12)


def padded(ids, length=12, value=0):
    return [*ids, *[value] * (length - len(ids))]


# ------------------------------------------------------------- training text


def test_each_position_predicts_the_token_after_it(preprocessor, small):
    ids = [2, *small.encode("the boats"), 1]
    x, y, sample_weight = preprocessor(["the boats"])
    assert x["token_ids"].tolist() == [padded(ids)]
    assert x["padding_mask"].tolist() == [padded([True] * len(ids), value=False)]
    assert y.tolist() == [padded(ids[1:])]
    assert sample_weight.tolist() == [padded([1.0] * (len(ids) - 1))]
    assert x["token_ids"].dtype == y.dtype == "int32"
    assert x["padding_mask"].dtype == bool
    assert sample_weight.dtype == "float32"


def test_one_text_gives_arrays_without_a_batch_axis(preprocessor):
    many, one = preprocessor(["the boats"]), preprocessor("the boats")
    assert one[0]["token_ids"].shape == (12,)
    for left, right in zip(
        keras.tree.flatten(many), keras.tree.flatten(one), strict=True
    ):
        np.testing.assert_array_equal(left[0], right)


@pytest.mark.parametrize(
    "texts",
    [
        ["the boats", "count"],
        ("the boats", "count"),
        np.array(["the boats", "count"]),
        np.array([b"the boats", b"count"]),
        np.array(["the boats", "count"], dtype=object),
        iter(["the boats", "count"]),
    ],
)
def test_texts_come_in_any_sequence(preprocessor, texts):
    x, y, _ = preprocessor(texts)
    expected, _, _ = preprocessor(["the boats", "count"])
    np.testing.assert_array_equal(x["token_ids"], expected["token_ids"])
    assert y.shape == (2, 12)


def test_turn_markers_in_text_are_markers_and_bos_is_not_doubled(preprocessor, small):
    text = "<start_of_turn>user\nno<end_of_turn>"
    plain, marked = preprocessor(text), preprocessor(f"<bos>{text}<eos>")
    np.testing.assert_array_equal(plain[0]["token_ids"], marked[0]["token_ids"])
    ids = marked[0]["token_ids"].tolist()
    assert ids.count(2) == ids.count(1) == 1
    assert small.start_of_turn_id in ids


def test_start_and_end_tokens_can_be_left_out(small):
    preprocessor = GemmaCausalLMPreprocessor(
        small, sequence_length=12, add_start_token=False, add_end_token=False
    )
    x, _, _ = preprocessor("the boats")
    assert x["token_ids"].tolist() == padded(small.encode("the boats"))
    pair, _, weight = preprocessor({"prompts": "the", "responses": " boats"})
    assert pair["token_ids"].tolist() == padded(small.encode("the boats"))
    assert sum(weight) == len(small.encode(" boats"))
    assert preprocessor.encode_prompt("the") == small.encode("the")


def test_the_length_can_be_changed_for_good_and_for_one_call(preprocessor):
    assert preprocessor("the", sequence_length=5)[1].shape == (5,)
    preprocessor.sequence_length = 7
    assert preprocessor("the")[1].shape == (7,)


@pytest.mark.parametrize("bad", [-1, 2.5, True, "12"])
def test_a_bad_length_is_refused(preprocessor, small, bad):
    with pytest.raises(ValueError, match="sequence_length must be a whole number"):
        preprocessor.sequence_length = bad
    with pytest.raises(ValueError, match="sequence_length must be a whole number"):
        preprocessor("the", sequence_length=bad)
    with pytest.raises(ValueError, match="sequence_length must be a whole number"):
        GemmaCausalLMPreprocessor(small, sequence_length=bad)


def test_labels_are_made_here_and_not_taken(preprocessor):
    with pytest.raises(ValueError, match="pass x only"):
        preprocessor(["the"], y=["boats"])
    with pytest.raises(ValueError, match="pass x only"):
        preprocessor(["the"], sample_weight=[1.0])


# ---------------------------------------------------------- pairs and chats


def test_only_the_response_of_a_pair_is_learned(preprocessor, small):
    prompt, response = [2, *small.encode("the keeper")], [*small.encode("boats"), 1]
    x, y, weight = preprocessor({"prompts": ["the keeper"], "responses": ["boats"]})
    assert x["token_ids"].tolist() == [padded(prompt + response)]
    learned = y[weight > 0].tolist()
    assert learned == response
    first = np.flatnonzero(weight[0])[0]
    assert first == len(prompt) - 1


def test_one_pair_gives_arrays_without_a_batch_axis(preprocessor):
    x, y, weight = preprocessor({"prompts": "the", "responses": "boats"})
    assert x["token_ids"].shape == y.shape == weight.shape == (12,)


def test_only_the_assistants_turns_of_a_chat_are_learned(small):
    preprocessor = GemmaCausalLMPreprocessor(small, sequence_length=80)
    ids, mask = encode_chat_with_mask(small, CHAT)
    one, many = preprocessor(CHAT), preprocessor([CHAT, CHAT[:2]])
    assert one[0]["token_ids"].tolist() == padded(ids, 80)
    assert many[0]["token_ids"][0].tolist() == padded(ids, 80)
    assert many[1].shape == (2, 80)
    expected = [i for i, m in zip(ids, mask, strict=True) if m]
    assert one[1][one[2] > 0].tolist() == expected
    assert small.decode(expected) == "12 boats<end_of_turn>no<end_of_turn>"
    # The form of a chat has its <bos>, and ends without <eos>, whatever is set.
    assert one[0]["token_ids"][0] == 2 and 1 not in one[0]["token_ids"]


def test_texts_and_chats_may_be_mixed(small):
    preprocessor = GemmaCausalLMPreprocessor(small, sequence_length=40)
    x, _, _ = preprocessor(["the boats", CHAT[:2]])
    assert x["token_ids"][0].tolist() == padded([2, *small.encode("the boats"), 1], 40)
    assert x["token_ids"][1].tolist() == padded(
        encode_chat_with_mask(small, CHAT[:2])[0], 40
    )


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ({"prompts": ["a", "b"], "responses": ["c"]}, ValueError, "2 prompts and 1"),
        ({"prompts": ["a", "b"], "responses": "cd"}, ValueError, "2 prompts and 1"),
        ({"prompts": "a", "responses": ["c"]}, TypeError, "Text must be a str"),
        ({"prompts": ["a"]}, ValueError, "responses is missing"),
        ({"text": ["a"]}, ValueError, r"the keys \['text'\]: prompts is missing"),
        ([], TypeError, "Expected text, pairs or chats"),
        (None, TypeError, "Expected text, pairs or chats"),
        (3, TypeError, "Expected text, pairs or chats"),
        ([3], TypeError, "got int: 3"),
        (["a", None], TypeError, "got NoneType"),
        ([["a"]], TypeError, "got list"),
        ([{"role": "user"}], TypeError, "role and a content"),
        (["the \ud83e"], ValueError, "surrogate pair"),
        ([b"\xff"], ValueError, "not UTF-8"),
    ],
)
def test_what_cannot_be_learned_is_refused(preprocessor, x, error, message):
    with pytest.raises(error, match=message):
        preprocessor(x)


# ------------------------------------------------------------- samples too long


def test_long_texts_are_cut_counted_and_warned_of_once(preprocessor, small):
    long = "the boats " * 20
    with pytest.warns(UserWarning) as caught:
        x, y, weight = preprocessor([long, "the", long])
    assert len(caught) == 1
    assert "2 of 3 samples are longer than sequence_length=12" in str(caught[0].message)
    ids = [2, *small.encode(long)]
    assert x["token_ids"][0].tolist() == ids[:12]
    # As in KerasHub <eos> is last, but the text does not end there: no weight.
    assert y[0].tolist() == [*ids[1:12], 1]
    assert weight[0].tolist() == [1.0] * 11 + [0.0]
    assert weight[1].sum() == len(small.encode("the")) + 1


def test_a_text_that_just_fits_is_not_cut(preprocessor, small):
    piece = "aaaa"
    ids = small.encode(piece * 4)
    text = small.decode(ids[:11])
    assert len(small.encode(text)) == 11
    x, y, weight = preprocessor(text)  # 13 tokens: 12 inputs, and the last predicted
    assert x["token_ids"].tolist() == [2, *ids[:11]]
    assert y.tolist() == [*ids[:11], 1]
    assert weight.all()


def test_a_cut_response_and_one_of_which_nothing_is_left(preprocessor):
    pairs = {"prompts": ["the", "boats " * 20], "responses": ["boats " * 20, "no"]}
    with pytest.warns(UserWarning, match=r"2 of 2 .* In 1 samples nothing is left"):
        _, _, weight = preprocessor(pairs)
    assert weight[0].sum() > 0
    assert weight[1].sum() == 0


def test_a_cut_chat_has_no_eos(preprocessor, small):
    ids, mask = encode_chat_with_mask(small, CHAT)
    with pytest.warns(UserWarning, match="1 of 1 samples"):
        x, y, weight = preprocessor(CHAT)
    assert x["token_ids"].tolist() == ids[:12]
    assert y.tolist() == ids[1:13]
    assert weight.tolist() == [float(m) for m in mask[1:13]]


# ------------------------------------------------------------------ generation


def test_prompts_have_bos_and_no_eos(preprocessor, small):
    ids = [2, *small.encode("the boats")]
    assert preprocessor.encode_prompt("the boats") == ids
    assert preprocessor.encode_prompt("<bos>the boats") == ids
    for prompts in (["the boats"], {"prompts": ["the boats"]}):
        x = preprocessor.generate_preprocess(prompts)
        assert x["token_ids"].tolist() == [padded(ids)]
        mask = [True] * len(ids)
        assert x["padding_mask"].tolist() == [padded(mask, value=False)]
    assert preprocessor.generate_preprocess("the boats", 5)["token_ids"].shape == (5,)


def test_prompts_may_be_chats(small):
    preprocessor = GemmaCausalLMPreprocessor(small, sequence_length=80)
    ids = encode_chat(small, QUESTION)
    assert preprocessor.encode_prompt(QUESTION) == ids
    one = preprocessor.generate_preprocess(QUESTION)
    many = preprocessor.generate_preprocess([QUESTION, "the boats"])
    assert one["token_ids"].tolist() == padded(ids, 80)
    assert many["token_ids"][0].tolist() == padded(ids, 80)
    with pytest.raises(ValueError, match="nothing to answer"):
        preprocessor.encode_prompt(CHAT)


@pytest.mark.parametrize("bad", [None, 3, [], ["the"], {"prompts": "the"}])
def test_what_is_no_prompt_is_refused(preprocessor, bad):
    with pytest.raises(TypeError, match="A prompt is a string or a chat"):
        preprocessor.encode_prompt(bad)


def test_a_long_prompt_is_refused(preprocessor, small):
    prompt = "the boats " * 20
    count = len(small.encode(prompt)) + 1
    message = f"has {count} tokens and at most 12 fit"
    with pytest.raises(ValueError, match=message):
        preprocessor.generate_preprocess(prompt)
    with pytest.raises(ValueError, match=message):
        preprocessor.encode_prompt(prompt, max_tokens=12)
    assert len(preprocessor.encode_prompt(prompt)) == count
    assert len(preprocessor.encode_prompt(prompt, max_tokens=count)) == count


@pytest.mark.parametrize("limit", [1, 2, 12])
def test_a_long_prompt_is_cut_with_a_warning_if_asked(small, limit):
    preprocessor = GemmaCausalLMPreprocessor(small, truncate="warn")
    ids = small.encode("the boats " * 20)
    with pytest.warns(UserWarning, match=f"at most {limit} fit: .* from its beginning"):
        cut = preprocessor.encode_prompt("the boats " * 20, max_tokens=limit)
    assert cut == [2, *ids[len(ids) - limit + 1 :]]
    preprocessor.add_start_token = False
    with pytest.warns(UserWarning, match=f"at most {limit} fit"):
        cut = preprocessor.encode_prompt("the boats " * 20, max_tokens=limit)
    assert cut == ids[-limit:]


def test_an_unknown_way_to_cut_is_refused(small):
    with pytest.raises(ValueError, match="truncate must be"):
        GemmaCausalLMPreprocessor(small, truncate="silent")


def test_an_empty_prompt_is_bos_alone(preprocessor):
    assert preprocessor.encode_prompt("") == [2]
    x = preprocessor.generate_preprocess("")
    assert x["padding_mask"].sum() == 1


def test_text_comes_back_without_padding_bos_and_eos(preprocessor, small):
    texts = ["  the boats", "<start_of_turn>no<end_of_turn>", ""]
    x = preprocessor.generate_preprocess(texts)
    assert preprocessor.generate_postprocess(x) == texts
    tensors = {key: keras.ops.convert_to_tensor(value) for key, value in x.items()}
    assert preprocessor.generate_postprocess(tensors) == texts
    one = preprocessor.generate_preprocess("the boats")
    assert preprocessor.generate_postprocess(one) == "the boats"
    # What is masked, and <eos>, is no text.
    ids = np.array([[2, *small.encode("the"), 1, *small.encode(" boats")]])
    mask = np.ones_like(ids)
    assert preprocessor.generate_postprocess(
        {"token_ids": ids, "padding_mask": mask}
    ) == ["the boats"]
    mask[:, -1] = 0
    assert preprocessor.generate_postprocess(
        {"token_ids": ids, "padding_mask": mask}
    ) == [small.decode(ids[0, :-1])]


# ------------------------------------------------------------------- Keras


def test_serialization(small):
    preprocessor = GemmaCausalLMPreprocessor(small, 77, False, False, "warn")
    config = keras.saving.serialize_keras_object(preprocessor)
    assert config["registered_name"] == "gemma_keras>GemmaCausalLMPreprocessor"
    again = keras.saving.deserialize_keras_object(config)
    assert isinstance(again, GemmaCausalLMPreprocessor)
    assert again.tokenizer == small
    assert (again.sequence_length, again.truncate) == (77, "warn")
    assert not again.add_start_token and not again.add_end_token


# ------------------------------------------------------------- against KerasHub


@pytest.fixture(scope="module")
def hub(small_proto, tmp_path_factory):
    """KerasHub's preprocessors on the same vocabulary."""
    path = tmp_path_factory.mktemp("hub") / "vocabulary.spm"
    path.write_bytes(small_proto)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models = pytest.importorskip("keras_hub").models
        gemma = models.GemmaCausalLMPreprocessor(
            models.GemmaTokenizer(str(path)), sequence_length=24
        )
        gemma3 = models.Gemma3CausalLMPreprocessor(
            models.Gemma3Tokenizer(str(path), has_vision_tokens=False),
            sequence_length=24,
        )
    return gemma, gemma3


def assert_equal(ours, theirs):
    ours, theirs = keras.tree.flatten(ours), keras.tree.flatten(theirs)
    for left, right in zip(ours, theirs, strict=True):
        right = keras.ops.convert_to_numpy(right)
        np.testing.assert_array_equal(left, right.astype(left.dtype))


words = st.lists(
    st.sampled_from(
        ["the", " boats", "  ", "\n", "count", "é", "🦊", "<b>", "12", "zq"]
    ),
    max_size=9,
).map("".join)
batches = st.lists(words, min_size=1, max_size=4)


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore")
@settings(max_examples=40)
@given(texts=batches)
def test_text_becomes_what_it_becomes_in_kerashub(small, hub, texts):
    ours = GemmaCausalLMPreprocessor(small, sequence_length=24)
    theirs, _ = hub
    for x in (texts, texts[0]):
        found, expected = ours(x), theirs(x)
        assert_equal(found[:2], expected[:2])
        whole = np.asarray(found[0]["padding_mask"]).sum(-1).max() < 24
        if whole:
            assert_equal(found[2], expected[2])
        assert_equal(
            ours.generate_preprocess(x, 64),
            theirs.generate_preprocess(x, sequence_length=64),
        )
    x = ours.generate_preprocess(texts, 64)
    assert ours.generate_postprocess(x) == theirs.generate_postprocess(x)


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore")
@settings(max_examples=40)
@given(prompts=batches, data=st.data())
def test_pairs_become_what_they_become_in_kerashub(small, hub, prompts, data):
    responses = [data.draw(words) for _ in prompts]
    fits = [
        len(small.encode(p)) + len(small.encode(r)) <= 22
        for p, r in zip(prompts, responses, strict=True)
    ]
    ours = GemmaCausalLMPreprocessor(small, sequence_length=24)
    pairs = {"prompts": prompts, "responses": responses}
    if all(fits):
        assert_equal(ours(pairs), hub[1](pairs))


# --------------------------------------------------------------- Gemma's own


@pytest.mark.real
@pytest.mark.slow
def test_the_preprocessor_of_a_model_file(gemma3_270m_file):
    preprocessor = GemmaCausalLMPreprocessor.from_preset(
        gemma3_270m_file, sequence_length=16
    )
    assert preprocessor.sequence_length == 16
    assert preprocessor.encode_prompt("Hello") == [2, 9259]
