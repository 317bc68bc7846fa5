"""The tokenizer against SentencePiece, Hugging Face's tokenizers and known ids.

Most tests run on a small vocabulary of Gemma's layout (see conftest). Those marked
`real` run on Gemma's own: `python tools/fetch_assets.py --only tokenizer`.
"""

import argparse
import copy
import inspect
import io
import json
import pickle
import random
import textwrap
import time

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_keras import vocabulary
from gemma_keras.checkpoints import hugging_face_tokenizer
from gemma_keras.tokenizer import GemmaTokenizer

pytestmark = pytest.mark.any_backend

MARKERS = ["<start_of_turn>", "<end_of_turn>", "<mask>", "<unused1>", "[@BOS@]"]
FRAGMENTS = [
    *MARKERS,
    *("<bos>", "<eos>", "<pad>", "<unk>", "<0x41>", "<", ">", "</", "_of_turn>"),
    *("<b>", "</b>", "<table>", "<h1>", "<p>", "[toxicity=0]", "<|fim_middle|>"),
    *(" ", "  ", "   ", "\u2581", "\n", "\n\n\n", "\t", "\t\t", "\r\n", "\u00a0"),
    *("the", "boats", "keeper", "Where", "count", "Hello world", "don't", "a", "zq"),
    *("0", "12", "345,678", "3.14", "x = y**2", "https://a.example/b?c=d", "!?!"),
    *("é", "e\u0301", "ß", "中文", "日本語", "한국어", "हिन्दी", "العربية", "Ελληνικά"),
    *("🦊", "👩‍👩‍👧", "🏳️‍🌈", "\U0001fae8", "\U0001f9ff", "\ufeff", "\u200b", "\ue000"),
    *("\x00", "\x07", "\x7f", "\ufffd", "\uffff", "\U0010ffff"),
]

characters = st.characters(exclude_categories=["Cs"])
texts = st.lists(
    st.one_of(st.sampled_from(FRAGMENTS), st.text(characters, max_size=8)), max_size=12
).map("".join)


def many_texts(count: int, seed: int = 7) -> list[str]:
    """Texts of all sorts, the same for the same seed."""
    rng = random.Random(seed)
    out = []
    for _ in range(count):
        parts = []
        for _ in range(rng.randint(1, 12)):
            kind = rng.random()
            if kind < 0.65:
                parts.append(rng.choice(FRAGMENTS))
            elif kind < 0.8:
                parts.append(rng.choice(" \n\t\u2581a") * rng.randint(1, 69))
            else:
                # Any character but surrogates, mostly of the low planes.
                top = rng.choice([0x80, 0x500, 0x3000, 0xD800])
                parts += (chr(rng.randrange(top)) for _ in range(rng.randint(1, 5)))
            parts.append(rng.choice(["", "", " "]))
        out.append("".join(parts))
    return out


def real_texts() -> list[str]:
    """Lines and paragraphs that people wrote, found wherever Python is."""
    source = "\n".join(inspect.getsource(m) for m in (argparse, textwrap, inspect))
    lines = [line for line in source.split("\n") if line]
    return lines + source.split("\n\n")[:200] + [source[:20_000]]


def reference(proto: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=proto)


def pieces_of(proto: bytes) -> tuple[list[str], list[float], list[int]]:
    """Pieces, scores and types, through the library alone."""
    sp = reference(proto)
    pieces, scores, types = [], [], []
    user_defined = vocabulary.user_defined_pieces(proto)
    for index in range(sp.vocab_size()):
        pieces.append(sp.id_to_piece(index))
        scores.append(sp.get_score(index))
        kind = vocabulary.NORMAL
        if sp.is_control(index):
            kind = vocabulary.CONTROL
        elif sp.is_unknown(index):
            kind = vocabulary.UNKNOWN
        elif sp.is_byte(index):
            kind = vocabulary.BYTE
        elif pieces[-1] in user_defined:
            kind = vocabulary.USER_DEFINED
        types.append(kind)
    return pieces, scores, types


def stream(tokenizer, ids, **kwargs) -> list[str]:
    decoder = tokenizer.decode_stream(**kwargs)
    return [*(decoder.push(index) for index in ids), decoder.flush()]


# ---------------------------------------------------------------- ids and text


@settings(max_examples=300)
@given(text=texts)
def test_ids_are_those_of_sentencepiece(small, text):
    assert small.encode(text) == reference_of(small).encode(text)


@settings(max_examples=300)
@given(text=texts.filter(lambda text: "\u2581" not in text))
def test_text_survives_a_round_trip(small, text):
    assert small.decode(small.encode(text)) == text
    assert small.decode(small.encode_plain(text)) == text


@settings(max_examples=300)
@given(ids=st.lists(st.integers(0, 499), max_size=30))
def test_any_ids_decode_as_sentencepiece_decodes_them(small, ids):
    assert small.decode(ids) == reference_of(small).decode(ids)


@settings(max_examples=300)
@given(
    ids=st.lists(st.one_of(st.integers(0, 499), st.integers(25, 280)), max_size=30),
    skip_special=st.booleans(),
)
def test_a_stream_gives_the_text_of_decode(small, ids, skip_special):
    whole = small.decode(ids, skip_special=skip_special)
    assert "".join(stream(small, ids, skip_special=skip_special)) == whole


@settings(max_examples=200)
@given(text=texts.filter(lambda text: "\ufffd" not in text))
def test_a_stream_never_gives_half_a_character(small, text):
    parts = stream(small, small.encode(text))
    assert not any("\ufffd" in part for part in parts)
    assert parts[-1] == ""


@pytest.fixture(scope="module")
def prefixing(train_small):
    """A tokenizer that drops the space which text begins with, unlike Gemma's."""
    return GemmaTokenizer(train_small(prefix=True))


@settings(max_examples=200)
@given(text=texts, data=st.data())
def test_a_stream_of_a_vocabulary_with_a_dummy_prefix(prefixing, text, data):
    ids = prefixing.encode(text)
    assert ids == reference_of(prefixing).encode(text)
    some = data.draw(st.lists(st.sampled_from([0, 2, 3, *range(499)]), max_size=4))
    for row in (ids, some + ids, ids + some):
        assert "".join(stream(prefixing, row)) == prefixing.decode(row)


def test_a_stream_holds_bytes_back_until_the_character_is_whole(small):
    ids = small.encode("a🦊b")
    assert len(ids) == 6
    assert stream(small, ids) == ["a", "", "", "", "🦊", "b", ""]
    assert stream(small, ids[:3]) == ["a", "", "", "\ufffd\ufffd"]


def reference_of(tokenizer):
    """SentencePiece on the same vocabulary, loaded once."""
    if tokenizer.proto not in _REFERENCES:
        _REFERENCES[tokenizer.proto] = reference(tokenizer.proto)
    return _REFERENCES[tokenizer.proto]


_REFERENCES: dict = {}


def test_decoding_leaves_out_control_pieces_and_markers_if_asked(small):
    ids = small.encode("<start_of_turn>user\n<b>hi</b><end_of_turn>", True, True)
    assert small.decode(ids) == "<start_of_turn>user\n<b>hi</b><end_of_turn>"
    assert small.decode(ids, skip_special=True) == "user\n<b>hi</b>"


def test_decoding_takes_arrays_and_keeps_leading_spaces(small):
    ids = small.encode("  the boats")
    assert small.decode(np.array(ids, "int32")) == "  the boats"
    assert small.decode(iter(ids)) == "  the boats"


@pytest.mark.parametrize("bad", [-1, 500, 2**40])
def test_an_id_outside_the_vocabulary_is_refused(small, bad):
    with pytest.raises(ValueError, match=rf"{bad} is outside .* 0 to 499"):
        small.decode([5, bad])
    with pytest.raises(ValueError, match="outside the vocabulary"):
        small.decode_stream().push(bad)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        small.id_to_token(bad)


@pytest.mark.parametrize("bad", [[1.5], ["a"], [[1, 2]], [None]])
def test_ids_that_are_no_whole_numbers_are_refused(small, bad):
    with pytest.raises(TypeError, match="flat list of whole numbers"):
        small.decode(bad)


# ------------------------------------------------------------- <bos> and <eos>


def test_bos_and_eos_are_added_if_asked(small):
    plain = small.encode("the boats")
    assert small.encode("the boats", add_bos=True) == [2, *plain]
    assert small.encode("the boats", add_eos=True) == [*plain, 1]
    assert small.encode("", add_bos=True, add_eos=True) == [2, 1]


def test_a_literal_bos_is_not_doubled(small):
    chat = "<start_of_turn>user\nhi<end_of_turn>\n"
    assert small.encode(f"<bos>{chat}", add_bos=True) == [2, *small.encode(chat)]
    assert small.encode(f"{chat}<eos>", add_eos=True) == [*small.encode(chat), 1]
    # Where nobody asks for <bos> it is text, as SentencePiece has it, and inside too.
    assert 2 not in small.encode("<bos>the boats")
    assert small.encode("the <bos>", add_bos=True)[1:] == small.encode("the <bos>")
    twice = small.encode("<bos><bos>the", add_bos=True)
    assert twice == [2, *small.encode("<bos>the")]
    assert twice.count(2) == 1


@given(text=texts)
def test_no_text_makes_a_control_id(small, text):
    assert not {0, 1, 2} & set(small.encode(text))
    assert small.encode(text, add_bos=True).count(2) == 1


# ------------------------------------------------------------------ plain text


@settings(max_examples=300)
@given(text=texts)
def test_plain_text_holds_no_marker_and_decodes_to_itself(small, text):
    ids = small.encode_plain(text)
    pieces = [small.id_to_token(index) for index in ids]
    markers = {"<pad>", "<eos>", "<bos>", *MARKERS, "<2mass>", "<unused0>"}
    assert not markers & set(pieces)
    assert small.decode(ids) == text.replace("\u2581", " ")
    if not any(marker in text for marker in markers):
        assert ids == small.encode(text)


def test_plain_text_keeps_whitespace_runs_and_html(small):
    text = "<b>the</b>\n\n   boats<h1>"
    pieces = [small.id_to_token(index) for index in small.encode_plain(text)]
    assert {"<b>", "</b>", "\n\n", "<h1>"} <= set(pieces)
    assert small.encode_plain(text) == small.encode(text)


def test_plain_text_is_cut_as_where_markers_are_control_pieces(small, train_small):
    expected = reference(train_small(control=(*MARKERS, "<2mass>", "<unused0>")))
    for text in many_texts(500):
        pieces = [small.id_to_token(index) for index in small.encode_plain(text)]
        assert pieces == [expected.id_to_piece(i) for i in expected.encode(text)]


# ------------------------------------------------------------------- bad input


def test_empty_text(small):
    assert small.encode("") == []
    assert small.encode_plain("") == []
    assert small.decode([]) == ""
    assert stream(small, []) == [""]


def test_nul_is_text(small):
    assert small.decode(small.encode("a\x00b")) == "a\x00b"


@pytest.mark.parametrize("method", ["encode", "encode_plain"])
@pytest.mark.parametrize("bad", [None, 3, 2.5, ["a"], {"a": 1}, object()])
def test_what_is_not_text_is_refused(small, method, bad):
    with pytest.raises(TypeError, match="Text must be a str"):
        getattr(small, method)(bad)


@pytest.mark.parametrize("method", ["encode", "encode_plain"])
def test_bytes_are_taken_if_they_are_utf8(small, method):
    encode = getattr(small, method)
    assert encode("the größer".encode()) == encode("the größer")
    with pytest.raises(ValueError, match="byte 3 is 0xff"):
        encode(b"the\xff")
    with pytest.raises(ValueError, match="unexpected end of data"):
        encode("größer".encode()[:3])


@pytest.mark.parametrize("method", ["encode", "encode_plain"])
@pytest.mark.parametrize("bad", ["the \ud83e", "the \udd8a boats", "the \udcff"])
def test_half_a_surrogate_pair_is_refused(small, method, bad):
    with pytest.raises(ValueError, match=r"surrogate pair at position 4 \(U\+D"):
        getattr(small, method)(bad)


@pytest.mark.parametrize("unit", ["a", "the boats ", " ", "\n", "🦊", "<end_of_turn>"])
def test_a_million_characters(small, unit):
    text = (unit * (1_000_000 // len(unit) + 1))[:1_000_000]
    ids = small.encode(text)
    assert small.decode(ids) == text
    assert len(small.encode_plain(text)) >= len(ids)


# -------------------------------------------------------------- names and types


def test_ids_of_special_pieces_are_found_by_piece(small):
    assert (small.pad_token_id, small.eos_token_id) == (0, 1)
    assert (small.bos_token_id, small.unk_token_id) == (2, 3)
    assert (small.start_token_id, small.end_token_id) == (2, 1)
    assert small.id_to_token(small.start_of_turn_id) == "<start_of_turn>"
    assert small.id_to_token(small.end_of_turn_id) == "<end_of_turn>"
    assert small.stop_token_ids == (1, small.token_to_id("<end_of_turn>"))
    assert small.token_to_id("no such piece") == small.unk_token_id


def test_a_vocabulary_without_turn_markers(small):
    pieces, scores, types = pieces_of(small.proto)
    keep = [i for i, piece in enumerate(pieces) if not piece.endswith("_turn>")]
    lists = [[values[i] for i in keep] for values in (pieces, scores, types)]
    tokenizer = GemmaTokenizer.from_pieces(*lists)
    assert tokenizer.start_of_turn_id is None
    assert tokenizer.end_of_turn_id is None
    assert tokenizer.stop_token_ids == (1,)


def test_kerashub_names(small):
    assert small.vocabulary_size() == small.vocab_size == len(small.get_vocabulary())
    assert (
        small("the boats") == small.tokenize("the boats") == small.encode("the boats")
    )
    both = ["the boats", "counted"]
    assert small(both) == [small.encode(text) for text in both]
    assert small.detokenize(small(both)) == both
    assert small.detokenize(small("the boats")) == "the boats"
    assert small.detokenize(np.array([small("boats")])) == ["boats"]
    assert small.detokenize(np.array(small("boats"))) == "boats"


def test_equality_copies_and_configs(small, small_proto):
    other = GemmaTokenizer(small_proto)
    assert other == small and hash(other) == hash(small)
    assert small != "tokenizer"
    for made in (
        pickle.loads(pickle.dumps(small)),
        copy.deepcopy(small),
        GemmaTokenizer.from_config(json.loads(json.dumps(small.get_config()))),
    ):
        assert made == small
        assert made.encode("the boats") == small.encode("the boats")
    assert repr(small) == "<GemmaTokenizer of 500 pieces>"


# ------------------------------------------------------------------------ files


def test_files_are_told_apart_by_their_content(small, tmp_path):
    (tmp_path / "vocabulary.spm").write_bytes(small.proto)
    (tmp_path / "renamed.json").write_bytes(small.proto)
    (tmp_path / "renamed.spm").write_text(json.dumps(tokenizer_json(small.proto)))
    assert GemmaTokenizer(str(tmp_path / "vocabulary.spm")) == small
    assert GemmaTokenizer.from_file(tmp_path / "vocabulary.spm") == small
    assert GemmaTokenizer.from_file(tmp_path / "renamed.json") == small
    from_json = GemmaTokenizer.from_file(tmp_path / "renamed.spm")
    assert from_json.get_vocabulary() == small.get_vocabulary()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\x00" * 100, "not a SentencePiece model"),
        (b"<!DOCTYPE html><html>Access denied</html>", "not a SentencePiece model"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
        (b"GGUF\x03\x00\x00\x00", "is a GGUF file"),
        (b"\x80\x04\x95pickle", "not a SentencePiece model"),
        (b'{"model": ', "cannot be used: Expecting value"),
        (b'{"config": {"proto": null}}', "vocabulary.spm"),
        (b'{"model": "bpe"}', "no tokenizer model"),
        (b'{"model": {"type": "BPE", "vocab": 3}}', "byte_fallback"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, content, message):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        GemmaTokenizer.from_file(path)
    assert str(path) in str(caught.value)


def test_a_file_cut_anywhere_is_refused(small_proto, tmp_path):
    path = tmp_path / "tokenizer.model"
    for size in {*range(0, len(small_proto), 37), *range(6000, len(small_proto))}:
        path.write_bytes(small_proto[:size])
        with pytest.raises(ValueError, match=r"tokenizer\.model"):
            GemmaTokenizer.from_file(path)


@settings(max_examples=300)
@given(data=st.data())
def test_damaged_bytes_load_or_are_refused(small_proto, data):
    damaged = bytearray(small_proto)
    for _ in range(data.draw(st.integers(1, 20))):
        place = data.draw(st.integers(0, len(damaged) - 1))
        damaged[place] = data.draw(st.integers(0, 255))
    try:
        tokenizer = GemmaTokenizer(bytes(damaged))
    except ValueError:
        return
    assert isinstance(tokenizer.decode(tokenizer.encode("the boats")), str)


def test_a_model_of_another_family_is_refused(small):
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words to train on", "and some more of them"]),
        model_writer=out,
        vocab_size=20,
        minloglevel=2,
    )
    with pytest.raises(ValueError, match="without <pad>"):
        GemmaTokenizer(out.getvalue())


# --------------------------------------------------------- vocabularies of GGUF


def assert_same_tokenizer(found, expected, count=300):
    """Equal pieces, and equal ids both ways on many texts."""
    assert found.get_vocabulary() == expected.get_vocabulary()
    for text in many_texts(count):
        ids = expected.encode(text)
        assert found.encode(text) == ids
        assert found.encode_plain(text) == expected.encode_plain(text)
        assert found.decode(ids) == expected.decode(ids)


def test_pieces_make_the_same_tokenizer(small):
    pieces, scores, types = pieces_of(small.proto)
    assert_same_tokenizer(GemmaTokenizer.from_pieces(pieces, scores, types), small)
    encoded = [piece.encode() for piece in pieces]
    made = GemmaTokenizer.from_pieces(encoded, np.array(scores), np.array(types))
    assert_same_tokenizer(made, small, count=20)


def test_the_quirks_of_gguf_writers_are_undone(small):
    """What llama.cpp's converter writes for a file with all added tokens listed."""
    pieces, scores, types = pieces_of(small.proto)
    for index, (piece, kind) in enumerate(zip(pieces, types, strict=True)):
        if kind in (vocabulary.CONTROL, vocabulary.USER_DEFINED):
            scores[index] = -1000.0
            pieces[index] = piece.replace("\u2581", " ")
            if piece.startswith(("<start", "<end", "<unused", "<mask", "<2mass", "[@")):
                types[index] = vocabulary.CONTROL
    assert_same_tokenizer(GemmaTokenizer.from_pieces(pieces, scores, types), small)


def test_old_gguf_files_list_user_defined_pieces_as_normal(small):
    pieces, scores, types = pieces_of(small.proto)
    for index, kind in enumerate(types):
        if kind == vocabulary.USER_DEFINED:
            types[index] = vocabulary.NORMAL
    assert 0.0 in [s for s, t in zip(scores, types, strict=True) if t == 1]
    assert_same_tokenizer(GemmaTokenizer.from_pieces(pieces, scores, types), small)


def test_scores_of_normal_pieces_are_kept(small):
    """A genuine Gemma 3 piece has the score -1000, which others have by mistake."""
    pieces, scores, types = pieces_of(small.proto)
    sp = reference(GemmaTokenizer.from_pieces(pieces, scores, types).proto)
    assert [sp.get_score(i) for i in range(len(pieces))] == scores


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, s, t: p.pop(), "one score and one type for each piece"),
        (lambda p, s, t: p.__setitem__(300, p[301]), "more than once"),
        (lambda p, s, t: p.__setitem__(2, "<s>"), "no <bos>"),
        (lambda p, s, t: p.__setitem__(300, b"\xff"), "piece 300 is not UTF-8"),
        (lambda p, s, t: p.__setitem__(300, ""), "piece 300 must be text"),
        (lambda p, s, t: s.__setitem__(300, float("nan")), "piece 300 has the score"),
        (lambda p, s, t: t.__setitem__(300, 9), "unknown type 9"),
        (lambda p, s, t: t.__setitem__(50, 1), "all 256 or none, got 255"),
    ],
)
def test_arrays_that_make_no_vocabulary_are_refused(small, change, message):
    arrays = pieces_of(small.proto)
    change(*arrays)
    with pytest.raises(ValueError, match=f"vocabulary cannot be used: .*{message}"):
        GemmaTokenizer.from_pieces(*arrays)


# --------------------------------------------------------------- tokenizer.json


def tokenizer_json(proto: bytes) -> dict:
    """What Hugging Face's converter writes for a SentencePiece model, in short."""
    pieces, scores, types = pieces_of(proto)
    rank = dict(zip(pieces, scores, strict=True))
    merges = []
    for piece in pieces:
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in rank and right in rank:
                merges.append((rank[piece], len(left), len(right), left, right))
    merges.sort(key=lambda merge: merge[:3], reverse=True)
    special = (vocabulary.CONTROL, vocabulary.UNKNOWN, vocabulary.USER_DEFINED)
    return {
        "added_tokens": [
            {"id": index, "content": piece, "special": kind != special[2]}
            for index, (piece, kind) in enumerate(zip(pieces, types, strict=True))
            if kind in special
        ],
        "normalizer": {
            "type": "Replace",
            "pattern": {"String": " "},
            "content": "\u2581",
        },
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {piece: index for index, piece in enumerate(pieces)},
            "merges": [list(merge[3:]) for merge in merges],
        },
    }


def test_tokenizer_json_makes_the_same_tokenizer(small):
    document = tokenizer_json(small.proto)
    assert_same_tokenizer(GemmaTokenizer.from_tokenizer_json(document), small)


def test_tokenizer_json_with_merges_as_strings(small):
    document = tokenizer_json(small.proto)
    merges = document["model"]["merges"]
    document["model"]["merges"] = [" ".join(merge) for merge in merges]
    assert_same_tokenizer(GemmaTokenizer.from_tokenizer_json(document), small, count=50)


def test_tokenizer_json_of_2024_names_the_tab_byte_and_lists_few_tokens(small):
    document = tokenizer_json(small.proto)
    vocab = document["model"]["vocab"]
    vocab["\t"] = vocab.pop("<0x09>")
    few = {"<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"}
    document["added_tokens"] = [
        token for token in document["added_tokens"] if token["content"] in few
    ]
    assert_same_tokenizer(GemmaTokenizer.from_tokenizer_json(document), small)


def test_tokens_added_after_training_are_user_defined(small):
    document = tokenizer_json(small.proto)
    document["added_tokens"] += [
        {"id": 500, "content": "<tool call>", "special": True},
        {"id": 501, "content": "<image_soft_token>", "special": True},
    ]
    tokenizer = GemmaTokenizer.from_tokenizer_json(document)
    # No text model has a row for <image_soft_token>.
    assert tokenizer.vocab_size == 501
    ids = tokenizer.encode("the <tool call> boats")
    assert 500 in ids and tokenizer.decode(ids) == "the <tool call> boats"
    assert 500 not in tokenizer.encode_plain("the <tool call> boats")


def _set(path: str, value):
    def change(document):
        *parents, last = path.split(".")
        for key in parents:
            document = document[key]
        document[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("model.type", "Unigram"), "Unigram model"),
        (_set("model.byte_fallback", False), "byte_fallback False"),
        (_set("normalizer", None), r"normalises text by \[None\]"),
        (_set("normalizer", {"type": "Prepend"}), "Prepend"),
        (
            lambda d: d.update(
                normalizer={
                    "type": "Sequence",
                    "normalizers": [{"type": "Prepend"}, d["normalizer"]],
                }
            ),
            "Prepend",
        ),
        (lambda d: d["model"]["vocab"].pop("<0x41>"), "ids 0 to 498"),
        (lambda d: d["model"]["vocab"].update(extra=700), "ids 0 to 500"),
        (lambda d: d["model"]["merges"].sort(key=str), "different ranks"),
        (lambda d: d["model"].update(merges=[["a"]]), "not a tokenizer.json|cannot be"),
        (lambda d: d.update(added_tokens=[{"id": 3}]), "not a tokenizer.json"),
    ],
)
def test_a_tokenizer_json_of_another_kind_is_refused(small, change, message):
    document = tokenizer_json(small.proto)
    change(document)
    with pytest.raises(ValueError, match=message):
        GemmaTokenizer.from_tokenizer_json(document)


@pytest.mark.reference
def test_the_json_that_is_read_here_runs_in_hugging_face(small):
    """Keeps `tokenizer_json` above honest: it is the reference of the tests around."""
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer.from_str(json.dumps(full_json(small.proto)))
    for text in many_texts(500):
        if not differs_in_hugging_face(text):
            assert theirs.encode(text, add_special_tokens=False).ids == (
                small.encode(text)
            )


def full_json(proto: bytes) -> dict:
    document = tokenizer_json(proto)
    for token in document["added_tokens"]:
        token |= {
            "normalized": False,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
        }
    return {"version": "1.0", **document}


def differs_in_hugging_face(text: str) -> bool:
    """Texts that Hugging Face cuts otherwise than SentencePiece, known and documented.

    It takes the names of control pieces for the pieces, does not tell a written U+2581
    from a space, and halves runs of more than 31 spaces (32 are 16 + 16 there, 31 + 1
    in SentencePiece).
    """
    names = ("<pad>", "<eos>", "<bos>", "<unk>", "\u2581", " " * 32)
    return any(name in text for name in names)


# ------------------------------------------------------------- Gemma's own files

GOLDEN = {
    "Hello world": [4521, 2134],
    "Hello world\n\n  x\t1234": [
        *(4521, 2134, 109, 139, 235297, 226, 235274, 235284, 235304, 235310),
    ],
    "The capital of France is": [651, 6037, 576, 6081, 603],
    "What is the meaning of life?": [1841, 603, 573, 6996, 576, 1913, 235336],
    " lead": [2389],
    "I love to": [235285, 2182, 577],
    " " * 32: [168, 235248],
    " " * 33: [168, 139],
    "\n" * 32: [138, 108],
}
CHAT = "<start_of_turn>user\nHello<end_of_turn>\n<start_of_turn>model\n"


@pytest.fixture(scope="module")
def gemma(gemma_tokenizer_file):
    return GemmaTokenizer.from_file(gemma_tokenizer_file)


@pytest.fixture(scope="module")
def gemma3(gemma3_tokenizer_file):
    return GemmaTokenizer.from_file(gemma3_tokenizer_file)


@pytest.mark.real
def test_golden_ids_of_gemma(gemma):
    for text, ids in GOLDEN.items():
        assert gemma.encode(text) == ids
        assert gemma.decode(ids) == text
    ids = [2, 106, 1645, 108, 4521, 107, 108, 106, 2516, 108]
    assert gemma.encode(CHAT, add_bos=True) == ids
    assert gemma.encode(f"<bos>{CHAT}", add_bos=True) == ids
    assert gemma.stop_token_ids == (1, 107)
    assert gemma.vocab_size == 256_000


@pytest.mark.real
def test_turn_markers_of_gemma3(gemma3):
    assert gemma3.stop_token_ids == (1, 106)
    assert gemma3.start_of_turn_id == 105
    assert gemma3.encode("\n") == [107]
    assert gemma3.vocab_size == 262_144


@pytest.mark.real
@pytest.mark.parametrize("name", ["gemma", "gemma3"])
def test_genuine_ids_on_thousands_of_texts(name, request):
    tokenizer = request.getfixturevalue(name)
    sp = reference(tokenizer.proto)
    texts = many_texts(5000) + real_texts()
    assert len(texts) > 8000
    for text in texts:
        ids = sp.encode(text)
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == sp.decode(ids)
        assert tokenizer.decode(ids) == text.replace("\u2581", " ")
        assert "".join(stream(tokenizer, ids)) == text.replace("\u2581", " ")
        plain = tokenizer.encode_plain(text)
        assert not tokenizer._marker_ids & set(plain)
        assert tokenizer.decode(plain) == text.replace("\u2581", " ")


@pytest.mark.real
def test_genuine_plain_text_makes_no_marker(gemma, gemma3):
    """Every user-defined piece but whitespace and HTML, written out."""
    for tokenizer, count in ((gemma, 106), (gemma3, 6248)):
        defined = vocabulary.user_defined_pieces(tokenizer.proto)
        markers = [
            piece
            for piece in defined
            if piece[0] in "<[" and not piece.strip("</>").isalnum()
        ]
        markers += [p for p in defined if p.startswith(("<unused", "<mask", "<2mass"))]
        markers = sorted(set(markers))
        text = " ".join(markers)
        assert set(tokenizer.encode(text)) >= {defined[piece][0] for piece in markers}
        plain = tokenizer.encode_plain(text)
        assert not {defined[piece][0] for piece in markers} & set(plain)
        assert tokenizer.decode(plain) == text
        assert len(markers) == count


@pytest.mark.real
def test_a_million_genuine_characters_take_seconds(gemma):
    letters = random.Random(0).choices("abcdefghijklmnop", k=1_000_000)
    for text in ("a" * 1_000_000, "".join(letters), "the quick fox " * 71_429):
        begin = time.perf_counter()
        ids = gemma.encode(text)
        plain = gemma.encode_plain(text)
        # An order above what it takes, far below what quadratic work would.
        assert time.perf_counter() - begin < 60
        assert ids == plain and gemma.decode(ids) == text


@pytest.mark.real
@pytest.mark.reference
@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma", "gemma3"])
def test_the_tokenizer_json_that_transformers_writes(name, request, tmp_path):
    transformers = pytest.importorskip("transformers")
    genuine = request.getfixturevalue(name)
    (tmp_path / "tokenizer.model").write_bytes(genuine.proto)
    theirs = transformers.GemmaTokenizer.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "tokenizer.json"
    loaded = GemmaTokenizer.from_file(path)
    assert loaded.get_vocabulary() == genuine.get_vocabulary()
    found = vocabulary.user_defined_pieces(loaded.proto)
    expected = vocabulary.user_defined_pieces(genuine.proto)
    assert {p: i for p, (i, _) in found.items()} == {
        p: i for p, (i, _) in expected.items()
    }
    for text in many_texts(5000) + real_texts():
        ids = genuine.encode(text)
        assert loaded.encode(text) == ids
        assert loaded.decode(ids) == genuine.decode(ids)
        if not differs_in_hugging_face(text):
            assert theirs(text, add_special_tokens=False)["input_ids"] == ids
    # The file of 2024: six added tokens.
    document = json.loads(path.read_text("utf-8"))
    document["added_tokens"] = [
        token
        for token in document["added_tokens"]
        if token["id"] < 4 or "_of_turn>" in token["content"]
    ]
    sparse = GemmaTokenizer.from_tokenizer_json(document)
    for text in many_texts(1000, seed=8):
        assert sparse.encode(text) == genuine.encode(text)


@pytest.mark.real
@pytest.mark.reference
@pytest.mark.parametrize("name", ["gemma", "gemma3"])
def test_the_tokenizer_json_of_an_export(name, request):
    """SentencePiece's ids on all texts of this file, but for what docs/export.md says.

    In contents, the names of control pieces stand for these.
    """
    tokenizers = pytest.importorskip("tokenizers")
    genuine = request.getfixturevalue(name)
    document = hugging_face_tokenizer.tokenizer_json(genuine)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(document))
    control = ("<pad>", "<eos>", "<bos>", "<unk>")
    texts = [*GOLDEN, CHAT, *FRAGMENTS, *many_texts(3000), *real_texts()]
    texts = [text for text in texts if not any(piece in text for piece in control)]
    assert len(texts) > 6000
    sp = reference(genuine.proto)
    found = theirs.encode_batch(texts, add_special_tokens=False)
    for text, encoding in zip(texts, found, strict=True):
        assert encoding.ids == sp.encode(text), ascii(text)
        decoded = theirs.decode(encoding.ids, skip_special_tokens=False)
        assert decoded == sp.decode(encoding.ids), ascii(text)


@pytest.mark.real
@pytest.mark.slow
def test_the_vocabulary_of_a_gguf_file(gemma3, gemma3_270m_file):
    tokenizer = GemmaTokenizer.from_preset(gemma3_270m_file)
    ours, theirs = tokenizer.get_vocabulary(), gemma3.get_vocabulary()
    # MaxText's copy lacks <end_of_image>, so that what follows has moved by one.
    assert ours[:256_000] == theirs[:256_000]
    assert ours[256_000] == "<end_of_image>"
    assert ours[256_001:] == theirs[256_000:-1]
    for text in many_texts(5000) + real_texts():
        assert tokenizer.encode(text) == gemma3.encode(text)
        assert tokenizer.encode_plain(text) == gemma3.encode_plain(text)
