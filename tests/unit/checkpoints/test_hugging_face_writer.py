"""The files of a Hugging Face directory beside the weights, as others read them."""

import json

import numpy as np
import pytest
from check_export import conversations, many_texts, stands_for_a_piece

from gemma_keras import chat
from gemma_keras.checkpoints import exporting
from gemma_keras.checkpoints.contents import Contents
from gemma_keras.checkpoints.hugging_face_config import config_from_json, config_to_json
from gemma_keras.config import GemmaConfig
from gemma_keras.registry import architectures
from gemma_keras.tokenizer import GemmaTokenizer
from gemma_keras.vocabulary import read_pieces

pytestmark = pytest.mark.any_backend


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


@pytest.mark.reference
def test_tokenizer_json_gives_sentencepieces_ids(written, small):
    tokenizers = pytest.importorskip("tokenizers")
    text = (written / "tokenizer.json").read_text("utf-8")
    theirs = tokenizers.Tokenizer.from_str(text)
    seen = 0
    for text in many_texts(2000):
        ids = theirs.encode(text, add_special_tokens=False).ids
        # The one difference: names of control pieces in a text stand for the pieces.
        if stands_for_a_piece(text):
            seen += 1
            continue
        assert ids == small.encode(text), ascii(text)
        decoded = theirs.decode(ids, skip_special_tokens=False)
        assert decoded == small.decode(ids), ascii(text)
    assert 0 < seen < 1000
    assert theirs.encode("the boats").ids == small.encode("the boats", add_bos=True)


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
