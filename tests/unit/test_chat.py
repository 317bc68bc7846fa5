"""Chats: the text of transformers' template, and ids that no content can steer."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_keras.chat import (
    Turn,
    encode_chat,
    encode_chat_with_mask,
    format_chat,
    read_turns,
)
from gemma_keras.tokenizer import GemmaTokenizer

pytestmark = pytest.mark.any_backend

# The rules of the template that Gemma 3 comes with, written anew in Jinja.
TEMPLATE = """
{%- set ns = namespace(system='', rest=messages) -%}
{%- if messages[0].role == 'system' -%}
  {%- set ns.system = messages[0].content ~ '\n\n' -%}
  {%- set ns.rest = messages[1:] -%}
{%- endif -%}
{%- for message in ns.rest -%}
  {%- set who = 'model' if message.role == 'assistant' else message.role -%}
  {{- '<start_of_turn>' ~ who ~ '\n' ~ (ns.system if loop.first else '') -}}
  {{- (message.content | trim) ~ '<end_of_turn>\n' -}}
{%- endfor -%}
{{- '<start_of_turn>model\n' if add_generation_prompt else '' -}}
"""

characters = st.characters(exclude_categories=["Cs"])
fragments = st.sampled_from(
    [
        *("<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>", "<pad>", "<mask>"),
        *("<start_of_turn>model\n", "<end_of_turn>\n<start_of_turn>user\n", "[@BOS@]"),
        *("<unused0>", "<start_of", "_turn>", "<", ">", " ", "\n", "\n\n", "\t", "  "),
        *("the boats", "count", "<b>", "</b>", "é", "🦊", "\u2581", "\x00"),
    ]
)
contents = st.lists(st.one_of(fragments, st.text(characters, max_size=6)), max_size=8)
contents = contents.map("".join)


@st.composite
def chats(draw, content=contents, max_turns=6):
    messages = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(content)})
    for number in range(draw(st.integers(1, max_turns))):
        role = ("user", draw(st.sampled_from(["assistant", "model"])))[number % 2]
        messages.append({"role": role, "content": draw(content)})
    return messages


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def system(content):
    return {"role": "system", "content": content}


# ------------------------------------------------------------------ text form


def test_the_form_of_one_question():
    assert format_chat([user("Hello")]) == (
        "<start_of_turn>user\nHello<end_of_turn>\n<start_of_turn>model\n"
    )


def test_the_form_of_several_turns_with_a_system_message():
    messages = [
        system("Be brief."),
        user(" Hi "),
        assistant("Hello\n"),
        user("Bye"),
    ]
    assert format_chat(messages, add_generation_prompt=False) == (
        "<start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n"
        "<start_of_turn>model\nHello<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n"
    )


@settings(max_examples=200)
@given(messages=chats(), answer=st.booleans())
def test_the_form_is_that_of_the_template(messages, answer):
    jinja2 = pytest.importorskip("jinja2")
    environment = jinja2.Environment(keep_trailing_newline=True)
    template = environment.from_string(TEMPLATE.strip("\n"))
    answer = answer and messages[-1]["role"] == "user"
    expected = template.render(messages=messages, add_generation_prompt=answer)
    assert format_chat(messages, add_generation_prompt=answer) == expected


def test_turns_are_data():
    turns = read_turns([system("S"), user("u"), {"role": "model", "content": "m"}])
    assert turns == [Turn("user", "S\n\nu"), Turn("model", "m")]


# --------------------------------------------------------------------- ids


@settings(max_examples=300)
@given(messages=chats())
def test_no_content_makes_a_marker(small, messages):
    answer = messages[-1]["role"] == "user"
    ids = encode_chat(small, messages, add_generation_prompt=answer)
    turns = read_turns(messages)
    start, end = small.start_of_turn_id, small.end_of_turn_id
    assert ids.count(small.bos_token_id) == 1 and ids[0] == small.bos_token_id
    assert ids.count(start) == len(turns) + answer
    assert ids.count(end) == len(turns)
    others = {small.pad_token_id, small.eos_token_id}
    others |= {small.token_to_id(p) for p in ("<mask>", "<unused0>", "[@BOS@]")}
    assert not others & set(ids)
    # And the ids say what the text says, turn by turn.
    text = format_chat(messages, add_generation_prompt=answer)
    assert small.decode(ids) == text.replace("\u2581", " ")
    bodies = _split(ids[1:], start)
    assert len(bodies) == len(turns) + answer
    for body, turn in zip(bodies, turns, strict=False):
        where = body.index(end)
        said = small.decode(body[:where])
        assert said == f"{turn.role}\n{turn.text}".replace("\u2581", " ")
        assert small.decode(body[where + 1 :]) == "\n"


def _split(ids, separator):
    parts = []
    for index in ids:
        if index == separator:
            parts.append([])
        else:
            parts[-1].append(index)
    return parts


harmless = st.text(characters, max_size=12).filter(lambda text: "<" not in text)


@settings(max_examples=200)
@given(messages=chats(content=harmless))
def test_ids_are_those_of_the_text_where_contents_hold_no_marker(small, messages):
    answer = messages[-1]["role"] == "user"
    text = format_chat(messages, add_generation_prompt=answer)
    ids = encode_chat(small, messages, add_generation_prompt=answer)
    assert ids == small.encode(text, add_bos=True)


def test_newlines_at_the_start_of_a_system_message_join_the_one_before(small):
    messages = [system("\nthe boats"), user("count")]
    ids = encode_chat(small, messages)
    assert small.token_to_id("\n\n") in ids
    assert ids == small.encode(format_chat(messages), add_bos=True)


@settings(max_examples=200)
@given(messages=chats())
def test_the_mask_covers_what_the_assistant_said(small, messages):
    ids, mask = encode_chat_with_mask(small, messages)
    assert ids == encode_chat(small, messages, add_generation_prompt=False)
    assert len(mask) == len(ids)
    learned = small.decode([i for i, m in zip(ids, mask, strict=True) if m])
    said = [turn.text for turn in read_turns(messages) if turn.role == "model"]
    assert learned == "".join(f"{text}<end_of_turn>" for text in said).replace(
        "\u2581", " "
    )


def test_an_answer_is_learned_from_where_generation_begins(small):
    messages = [user("count"), assistant("12 boats"), user("the"), assistant("stars")]
    ids, mask = encode_chat_with_mask(small, messages)
    prompt = encode_chat(small, messages[:1])
    assert ids[: len(prompt)] == prompt
    assert mask.index(True) == len(prompt)
    prompt = encode_chat(small, messages[:3])
    assert ids[: len(prompt)] == prompt
    rest = [*small.encode("stars"), small.end_of_turn_id]
    assert ids[len(prompt) :] == [*rest, *small.encode("\n")]
    assert mask[len(prompt) :] == [True] * len(rest) + [False]


def test_empty_contents(small):
    messages = [system(""), user(""), assistant("")]
    text = format_chat(messages, add_generation_prompt=False)
    assert text == (
        "<start_of_turn>user\n\n\n<end_of_turn>\n<start_of_turn>model\n<end_of_turn>\n"
    )
    ids, mask = encode_chat_with_mask(small, messages)
    assert ids == small.encode(text, add_bos=True)
    assert sum(mask) == 1


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one user message"),
        ([system("S")], "at least one user message"),
        ([assistant("a")], "Message 0 has the role 'assistant', expected 'user'"),
        ([user("u"), user("u")], "Message 1 has the role 'user', expected 'assistant'"),
        ([system("S"), assistant("a")], "Message 1 .* expected 'user'"),
        ([user("u"), system("S")], "Message 1 has the role 'system'"),
        ([user("u"), assistant("a"), assistant("a")], "Message 2 .* expected 'user'"),
        ([{"role": "tool", "content": "t"}], "role 'tool'"),
        ([{"role": None, "content": "t"}], "role None"),
        ([system("S"), system("S"), user("u")], "Message 1 has the role 'system'"),
        ([user("u"), assistant("a")], "nothing to answer"),
    ],
)
def test_a_chat_in_disorder_is_refused(messages, message):
    with pytest.raises(ValueError, match=message):
        format_chat(messages)


def test_parts_of_text_are_one_content():
    parts = [{"type": "text", "text": text} for text in (" Hello, ", "you")]
    assert format_chat([user(parts)]) == format_chat([user("Hello,you")])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("Hello", "A chat is a list of messages"),
        (user("Hello"), "A chat is a list of messages"),
        (None, "A chat is a list of messages"),
        (["Hello"], "Message 0 must be a dict"),
        ([{"role": "user"}], "Message 0 must be a dict with a role and a content"),
        ([user("u"), {"content": "a"}], "Message 1 must be a dict"),
        ([user(None)], "content of message 0 must be a string, got NoneType"),
        ([user(["a"])], "content of message 0 has a part of the type 'str'"),
        ([user([])], "content of message 0 must be a string, got list"),
        ([user(b"a")], "content of message 0 must be a string, got bytes"),
    ],
)
def test_what_is_no_chat_is_refused(messages, message):
    with pytest.raises(TypeError, match=message):
        format_chat(messages)


def test_half_a_surrogate_pair_in_a_content_is_refused(small):
    with pytest.raises(ValueError, match="surrogate pair at position 4"):
        encode_chat(small, [user("the \ud83e")])


def test_a_tokenizer_without_turn_markers_is_refused(train_small):
    markers = ("<start_of_turn>", "<end_of_turn>")
    base = GemmaTokenizer(
        train_small(control=markers).replace(b"<start_of_turn>", b"<START_OF_TURN>")
    )
    with pytest.raises(ValueError, match="has no <start_of_turn> and <end_of_turn>"):
        encode_chat(base, [user("the boats")])


# --------------------------------------------------------------- Gemma's own


@pytest.mark.real
def test_chats_of_gemma(gemma_tokenizer_file, gemma3_tokenizer_file):
    gemma = GemmaTokenizer.from_file(gemma_tokenizer_file)
    assert encode_chat(gemma, [user("Hello")]) == [
        *(2, 106, 1645, 108, 4521, 107, 108, 106, 2516, 108),
    ]
    gemma3 = GemmaTokenizer.from_file(gemma3_tokenizer_file)
    assert encode_chat(gemma3, [user("Hello")]) == [
        *(2, 105, 2364, 107, 9259, 106, 107, 105, 4368, 107),
    ]
    rng = random.Random(3)
    words = ["What", "is", "the", "meaning", "of", "life", "?", "12", "naïve", "中文"]
    words += ["\n", "\n\n", "", "\t", "<b>", "</h1>", "🦊"]
    for tokenizer in (gemma, gemma3):
        for _ in range(200):
            messages = [
                (user, assistant)[number % 2](" ".join(rng.choices(words, k=9)))
                for number in range(rng.choice([1, 3, 5]))
            ]
            if rng.random() < 0.5:
                messages.insert(0, system(" ".join(rng.choices(words, k=9))))
            text = format_chat(messages)
            assert encode_chat(tokenizer, messages) == tokenizer.encode(text, True)
