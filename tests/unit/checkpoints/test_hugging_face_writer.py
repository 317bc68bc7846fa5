"""The files of a Hugging Face directory beside the weights, as others read them."""

import json
import random

import numpy as np
import pytest

from gemma_keras import chat
from gemma_keras.checkpoints import exporting, hugging_face_tokenizer
from gemma_keras.checkpoints.contents import Contents
from gemma_keras.checkpoints.hugging_face_config import config_from_json, config_to_json
from gemma_keras.config import GemmaConfig
from gemma_keras.registry import architectures
from gemma_keras.tokenizer import GemmaTokenizer
from gemma_keras.vocabulary import read_pieces

pytestmark = pytest.mark.any_backend

CONTROL_NAMES = ("<pad>", "<eos>", "<bos>", "<unk>")
FRAGMENTS = [
    *("<start_of_turn>", "<end_of_turn>", "<mask>", "<unused1>", "</b>", "<0x41>"),
    *(" ", "   ", "\u2581", "\n", "\n\n\n", "\t", "\r\n", "\u00a0", "é", "e\u0301"),
    *("the", "boats", "keeper", "count", "Hello world", "0", "345,678", "!?!"),
    *("中文", "العربية", "🦊", "👩‍👩‍👧", "\x00", "\ufffd", "\U0010ffff", "<bos>", "<"),
]


def many_texts(count, seed=11):
    """Texts of all sorts, with runs of white space that are longer than any piece."""
    rng = random.Random(seed)
    for _ in range(count):
        parts = rng.choices(FRAGMENTS, k=rng.randint(1, 10))
        parts.append(rng.choice(" \n\t\u2581a") * rng.randint(0, 69))
        parts += (chr(rng.randrange(0xD800)) for _ in range(rng.randint(0, 4)))
        rng.shuffle(parts)
        yield "".join(parts)


def conversations(count, seed=5):
    """Chats with and without a system message, some of them to be answered."""
    rng = random.Random(seed)
    for _ in range(count):
        messages = []
        if rng.random() < 0.4:
            messages.append({"role": "system", "content": "".join(some_text(rng))})
        for number in range(rng.randint(1, 6)):
            role = ("user", rng.choice(["assistant", "model"]))[number % 2]
            messages.append({"role": role, "content": "".join(some_text(rng))})
        yield messages, number % 2 == 0 and rng.random() < 0.7


def some_text(rng):
    return rng.choices(FRAGMENTS, k=rng.randint(0, 6))


@pytest.fixture(scope="module")
def written(tmp_path_factory, small):
    """A directory of a tiny Gemma with the small vocabulary."""
    config = GemmaConfig(
        vocab_size=500,
        num_layers=1,
        hidden_dim=6,
        ffn_dim=10,
        num_query_heads=2,
        num_kv_heads=1,
        head_dim=4,
        query_pre_attn_scalar=4,
    )
    contents = Contents(
        config=config,
        tensors=lambda path: np.ones(config.weight_shapes()[path], np.float32),
        dtype="float32",
        tokenizer=small,
    )
    return exporting.export(contents, tmp_path_factory.mktemp("hf") / "m", "hf")


def read(folder, name):
    return json.loads((folder / name).read_text("utf-8"))


def test_the_config_says_everything_in_the_words_of_both_versions(written):
    config = read(written, "config.json")
    assert config["architectures"] == ["GemmaForCausalLM"]
    assert config["hidden_act"] == config["hidden_activation"] == "gelu_pytorch_tanh"
    assert config["rope_theta"] == 10_000.0
    assert config["torch_dtype"] == "float32"
    assert config["tie_word_embeddings"] is True
    assert (config["bos_token_id"], config["eos_token_id"]) == (2, 1)


@pytest.mark.parametrize("name", sorted(architectures()))
def test_configs_of_published_models_survive(name):
    config = architectures()[name]
    raw = config_to_json(config, "bfloat16")
    assert config_from_json(raw, "config.json") == config
    assert json.loads(json.dumps(raw)) == raw
    # What transformers before 4.53 goes by.
    if config.family == "gemma3":
        assert raw["sliding_window_pattern"] == 6


def test_generation_stops_at_the_end_of_a_turn(written, small):
    config = read(written, "generation_config.json")
    assert config["eos_token_id"] == [small.eos_token_id, small.end_of_turn_id]
    assert (config["bos_token_id"], config["pad_token_id"]) == (2, 0)


def test_the_vocabulary_can_be_read_from_either_file(written, small):
    assert GemmaTokenizer.from_file(written / "tokenizer.model") == small
    again = GemmaTokenizer.from_file(written / "tokenizer.json")
    assert again.get_vocabulary() == small.get_vocabulary()
    assert read_pieces(again.proto)[2] == read_pieces(small.proto)[2]
    for text in many_texts(300):
        assert again.encode(text) == small.encode(text)


def test_pieces_are_the_inverse_of_from_pieces(small):
    pieces, scores, types = small.pieces()
    again = GemmaTokenizer.from_pieces(pieces, scores, types)
    assert again.pieces() == (pieces, scores, types)
    assert pieces == small.get_vocabulary()
    assert scores == [small._processor.get_score(i) for i in range(500)]


def same_ids(document, tokenizer, count):
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer.from_str(json.dumps(document))
    seen = 0
    for text in many_texts(count):
        ids = theirs.encode(text, add_special_tokens=False).ids
        # The one difference: names of control pieces in a text stand for the pieces.
        if any(name in text for name in CONTROL_NAMES):
            seen += 1
            continue
        assert ids == tokenizer.encode(text), ascii(text)
        decoded = theirs.decode(ids, skip_special_tokens=False)
        assert decoded == tokenizer.decode(ids), ascii(text)
    assert 0 < seen < count / 2
    assert theirs.encode("the boats").ids == tokenizer.encode("the boats", add_bos=True)


@pytest.mark.reference
def test_tokenizer_json_gives_sentencepieces_ids(written, small):
    same_ids(read(written, "tokenizer.json"), small, 2000)


@pytest.mark.real
@pytest.mark.reference
@pytest.mark.parametrize("name", ["gemma", "gemma3"])
def test_genuine_vocabularies_give_sentencepieces_ids(name, request):
    file = request.getfixturevalue(f"{name}_tokenizer_file")
    tokenizer = GemmaTokenizer.from_file(file)
    document = hugging_face_tokenizer.tokenizer_json(tokenizer)
    same_ids(document, tokenizer, 2000)


@pytest.fixture(scope="module")
def theirs(written):
    """The tokenizer as transformers loads the directory."""
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(written)


@pytest.mark.reference
def test_the_chat_template_writes_what_the_chat_module_writes(theirs):
    count = 0
    for messages, answer in conversations(200):
        text = theirs.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=answer
        )
        assert text == "<bos>" + chat.format_chat(messages, answer)
        count += answer
    assert 20 < count < 180


@pytest.mark.reference
def test_chats_have_the_ids_of_the_chat_module(theirs, small):
    messages = [
        {"role": "user", "content": "Where have you been?"},
        {"role": "assistant", "content": "I have been counting stars."},
        {"role": "user", "content": "How many?"},
    ]
    found = theirs.apply_chat_template(messages, add_generation_prompt=True)
    ids = found if isinstance(found, list) else found["input_ids"]
    assert ids == chat.encode_chat(small, messages)


@pytest.mark.reference
@pytest.mark.parametrize("roles", ["uu", "au", "uaa", "sau"])
def test_the_chat_template_refuses_turns_out_of_order(theirs, roles):
    names = {"u": "user", "a": "assistant", "s": "system"}
    messages = [{"role": names[letter], "content": "x"} for letter in roles]
    with pytest.raises(Exception, match="must take turns"):
        theirs.apply_chat_template(messages, tokenize=False)


@pytest.mark.reference
def test_transformers_knows_the_special_tokens(theirs, small):
    assert theirs.bos_token_id == small.bos_token_id
    assert theirs.eos_token_id == small.eos_token_id
    assert theirs.pad_token_id == small.pad_token_id
    assert theirs.unk_token_id == small.unk_token_id
    turns = small.encode("<start_of_turn>the boats<end_of_turn>")
    assert theirs("<start_of_turn>the boats<end_of_turn>")["input_ids"] == [2, *turns]
    assert theirs.decode(turns, skip_special_tokens=True) == "the boats"
