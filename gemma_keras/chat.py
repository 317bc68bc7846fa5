"""Chats as data, and the form in which Gemma was taught to read them.

A chat is a list of messages, each a dict with a `role` ("system", "user", and
"assistant" or "model") and a `content`: a string, or a list of parts such as
`{"type": "text", "text": "Hello"}`. Gemma knows two roles:

    <bos><start_of_turn>user
    {content}<end_of_turn>
    <start_of_turn>model
    {content}<end_of_turn>

There is no system role: a system message goes in front of the first user turn, with an
empty line between them, as Gemma 3's own template does it. The template strips the
white space around each content.
"""

from collections.abc import Sequence
from typing import NamedTuple

from gemma_keras.tokenizer import END_OF_TURN, START_OF_TURN, GemmaTokenizer

# The same for programs that render Jinja, with the <bos> that `encode_chat` gives.
# Transformers, vLLM and llama.cpp take it from a tokenizer's files.
JINJA_TEMPLATE = """\
{{ bos_token }}\
{%- if messages[0]['role'] == 'system' -%}\
{%- set prefix = messages[0]['content'] + '\n\n' -%}\
{%- set turns = messages[1:] -%}\
{%- else -%}\
{%- set prefix = '' -%}\
{%- set turns = messages -%}\
{%- endif -%}\
{%- for message in turns -%}\
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}\
{{ raise_exception('User and assistant must take turns, and the user begins.') }}\
{%- endif -%}\
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}\
{{ '<start_of_turn>' + role + '\n' + (prefix if loop.first else '') }}\
{{- message['content'] | trim + '<end_of_turn>\n' }}\
{%- endfor -%}\
{%- if add_generation_prompt -%}\
{{ '<start_of_turn>model\n' }}\
{%- endif -%}"""

_ROLES = {"user": "user", "assistant": "model", "model": "model"}
# What of an example is learned: all that the assistant says, its last turn, or all.
LOSS_ON = ("response", "last", "all")


class Turn(NamedTuple):
    """One turn as Gemma sees it."""

    role: str  # "user" or "model"
    text: str


def read_turns(
    messages: Sequence[dict], add_generation_prompt: bool = False
) -> list[Turn]:
    """Checks a chat and gives its turns, the system message folded into the first.

    Args:
        messages: the chat: at most one system message, first; then user and assistant
            in turn, beginning with the user.
        add_generation_prompt: the chat is to be answered, so the user must be last.

    Raises:
        TypeError: something is not of the kind described above.
        ValueError: the order of roles, or an unknown role.
    """
    if isinstance(messages, str | dict) or not isinstance(messages, Sequence):
        raise TypeError(
            "A chat is a list of messages such as "
            f'{{"role": "user", "content": "Hello"}}, got {messages!r:.80}.'
        )
    pairs = [_role_and_content(i, message) for i, message in enumerate(messages)]
    prefix = ""
    if pairs and pairs[0][0] == "system":
        prefix = pairs.pop(0)[1] + "\n\n"
    if not pairs:
        raise ValueError("A chat needs at least one user message, got none.")
    turns = []
    for number, (role, content) in enumerate(pairs):
        expected = ("user", "model")[number % 2]
        if _ROLES.get(role) != expected:
            place = number + bool(prefix)
            raise ValueError(
                f"Message {place} has the role {role!r}, expected "
                f"{'assistant' if number % 2 else 'user'!r}: after an optional system "
                "message, user and assistant take turns, and the user begins."
            )
        turns.append(Turn(expected, (prefix if not number else "") + content.strip()))
    if add_generation_prompt and turns[-1].role == "model":
        raise ValueError(
            "The chat ends with the assistant's message: there is nothing to answer. "
            "Add a user message, or pass add_generation_prompt=False."
        )
    return turns


def format_chat(messages: Sequence[dict], add_generation_prompt: bool = True) -> str:
    """Writes a chat as text, without <bos>, as `transformers`' template does.

    In the text nothing tells a marker inside a content from a real one: to run a model
    on contents that come from outside, use `encode_chat`.

    Args:
        messages: the chat.
        add_generation_prompt: end with the opening of the model's turn.

    Raises:
        TypeError, ValueError: as `read_turns`.
    """
    turns = read_turns(messages, add_generation_prompt)
    text = "".join(
        f"{START_OF_TURN}{turn.role}\n{turn.text}{END_OF_TURN}\n" for turn in turns
    )
    return text + f"{START_OF_TURN}model\n" * add_generation_prompt


def encode_chat(
    tokenizer: GemmaTokenizer,
    messages: Sequence[dict],
    add_generation_prompt: bool = True,
) -> list[int]:
    """Ids of a chat, <bos> first; markers inside contents stay text.

    Args:
        tokenizer: one with turn markers, as Gemma's is.
        messages: the chat.
        add_generation_prompt: end with the opening of the model's turn.

    Raises:
        TypeError, ValueError: as `read_turns`; the tokenizer has no turn markers; a
            content is not valid Unicode.
    """
    turns = read_turns(messages, add_generation_prompt)
    ids, _ = _encode_turns(tokenizer, turns)
    if add_generation_prompt:
        ids += [tokenizer.start_of_turn_id, *tokenizer.encode_plain("model\n")]
    return ids


def encode_chat_with_mask(
    tokenizer: GemmaTokenizer,
    messages: Sequence[dict],
    loss_on: str = "response",
    given: int = 0,
) -> tuple[list[int], list[bool]]:
    """Ids of a whole chat for training, and which of them the model is to learn.

    Args:
        tokenizer: one with turn markers, as Gemma's is.
        messages: the chat.
        loss_on: `"response"` for all of the assistant's turns, `"last"` for the last
            of them, `"all"` for every token.
        given: so many messages at the beginning are the prompt, whose answers are not
            learned but with `"all"`.

    Returns:
        `ids` as from `encode_chat` without a generation prompt, and `mask`, as long,
        true on the assistant's texts and on the <end_of_turn> that ends each.

    Raises:
        TypeError, ValueError: as `encode_chat`; an unknown `loss_on`.
    """
    check_loss_on(loss_on)
    turns = read_turns(messages)
    # A system message is no turn of its own.
    first = given - (len(messages) - len(turns))
    learned = [i for i, t in enumerate(turns) if t.role == "model" and i >= first]
    if loss_on == "last":
        learned = learned[-1:]
    ids, mask = _encode_turns(tokenizer, turns, learned)
    return ids, [True] * len(ids) if loss_on == "all" else mask


def check_loss_on(loss_on: str):
    """Refuses what is not in `LOSS_ON`.

    Raises:
        ValueError: it is not.
    """
    if loss_on not in LOSS_ON:
        raise ValueError(f"loss_on must be {', '.join(LOSS_ON)}, got {loss_on!r}.")


def _role_and_content(index: int, message: dict) -> tuple[str, str]:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise TypeError(
            f"Message {index} must be a dict with a role and a content, got "
            f"{message!r:.80}."
        )
    content = read_content(message["content"], index)
    if not isinstance(content, str):
        raise TypeError(
            f"The content of message {index} must be a string, got "
            f"{type(content).__name__}: {content!r:.80}."
        )
    return message["role"], content


def read_content(content, index: int):
    """A content given as parts of text as one string; any other as it is.

    As in Gemma 3's own template, white space around each part is dropped, and nothing
    is put between them.

    Args:
        content: of a message.
        index: the message's, for what is told of it.

    Raises:
        TypeError: a part is no text, such as an image.
    """
    if not isinstance(content, list | tuple) or not content:
        return content
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise TypeError(
                f"The content of message {index} has a part of the type {kind!r}: it "
                'must be a string, or parts such as {"type": "text", "text": "Hello"}.'
            )
    return "".join(part["text"].strip() for part in content)


def _encode_turns(
    tokenizer: GemmaTokenizer, turns: Sequence[Turn], learned: Sequence[int] = ()
) -> tuple[list[int], list[bool]]:
    start, end = tokenizer.start_of_turn_id, tokenizer.end_of_turn_id
    if start is None or end is None:
        raise ValueError(
            f"{tokenizer} has no {START_OF_TURN} and {END_OF_TURN}: it cannot write "
            "chats. Give the model plain text, or use a preset of an instruct model."
        )
    newline = tokenizer.encode_plain("\n")
    ids, mask = [tokenizer.bos_token_id], [False]
    for number, turn in enumerate(turns):
        head = [start, *tokenizer.encode_plain(f"{turn.role}\n")]
        body = tokenizer.encode_plain(turn.text)
        if turn.role == "user" and turn.text.startswith("\n"):
            # Only a system message can begin so. Its newlines join the one before them
            # in one piece, as they do where the whole chat is cut as one text.
            head, body = [start], tokenizer.encode_plain(f"user\n{turn.text}")
        learn = number in learned
        ids += [*head, *body, end, *newline]
        mask += [False] * len(head) + [learn] * (len(body) + 1) + [False] * len(newline)
    return ids, mask
