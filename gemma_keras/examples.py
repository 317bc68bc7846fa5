"""Training examples, and the layouts in which people keep them.

| format   | a row                                                          |
| -------- | -------------------------------------------------------------- |
| text     | a string; or a column `text`                                   |
| pairs    | `prompt` and `response`, or their other names: texts, or       |
|          | lists of messages, of which the response's alone are learned   |
| alpaca   | `instruction`, `output`, and perhaps `input`                   |
| chat     | `messages`: dicts of `role` and `content`                      |
| sharegpt | `conversations`: dicts of `from` and `value`                   |

All but the first may have a column `system`.
"""

import dataclasses
import json
import math

from gemma_keras.chat import read_content, read_turns
from gemma_keras.records import DataError, is_broken, is_message

FORMATS = ("text", "pairs", "alpaca", "chat", "sharegpt")

# Each role of a column, and the names under which it is found, in lower case.
_NAMES = {
    "text": ("text", "document"),
    "prompt": ("prompt", "prompts", "question", "query", "input", "inputs"),
    "response": (
        *("response", "responses", "completion", "completions"),
        *("answer", "answers", "output", "outputs", "target"),
    ),
    "instruction": ("instruction",),
    "input": ("input", "context"),
    "messages": ("messages", "conversations", "conversation"),
    "system": ("system", "system_prompt"),
}
# What each format cannot do without, and what it may have.
_NEEDED = {
    "text": ("text",),
    "pairs": ("prompt", "response"),
    "alpaca": ("instruction", "response"),
    "chat": ("messages",),
    "sharegpt": ("messages",),
}
_OPTIONAL = {
    "text": (),
    "pairs": ("system",),
    "alpaca": ("input", "system"),
    "chat": ("system",),
    "sharegpt": ("system",),
}
_ROLES = {
    **{"system": "system", "user": "user", "human": "user"},
    **dict.fromkeys(("assistant", "model", "gpt", "chatgpt"), "assistant"),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
    """One thing to learn: a text, or a prompt and its response, or a chat.

    Of `text`, `prompt` with `response`, and `messages`, one is set. Of the messages the
    first `given` are a prompt.
    """

    format: str  # one of FORMATS
    text: str | None = None
    prompt: str | None = None
    response: str | None = None
    messages: tuple[dict, ...] | None = None
    given: int = 0
    number: int | None = None  # its row, as `Examples.place` takes it

    @property
    def strings(self) -> tuple[str, ...]:
        """All of its texts, in order."""
        if self.messages is not None:
            return tuple(message["content"] for message in self.messages)
        parts = (self.text, self.prompt, self.response)
        return tuple(part for part in parts if part is not None)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A format, and the column of each of its roles; none for rows without columns."""

    format: str
    columns: dict[str, str] | None
    unused: tuple[str, ...] = ()

    @property
    def description(self) -> str:
        """The format and the columns, for people."""
        if self.columns is None:
            return self.format
        used = ", ".join(self.columns.values())
        unused = f"; not used: {', '.join(self.unused)}" if self.unused else ""
        return f"{self.format} ({used}{unused})"

    def read(self, value, number: int | None = None) -> Example:
        """Makes an example of a row.

        Raises:
            ValueError, TypeError: it is none of this layout; the message says why.
        """
        system = None
        if self.columns is None:
            main = value
        else:
            cells = self._cells(value)
            system = cells.get("system")
            main = cells.get("text", cells.get("messages"))
        if self.format == "text":
            return Example("text", text=_checked(main, "text"), number=number)
        if self.format in ("chat", "sharegpt"):
            messages = _read_messages(main, system)
            return Example(self.format, messages=messages, number=number)
        if self.format == "pairs" and _has_messages(cells["prompt"]):
            return _read_prompted(cells["prompt"], cells["response"], system, number)
        role = _NEEDED[self.format][0]
        prompt = _checked(_as_text(cells[role]), role)
        for extra, joined in (("input", "{0}\n\n{1}"), ("system", "{1}\n\n{0}")):
            if _filled(cells.get(extra)):
                prompt = joined.format(prompt, _checked(_as_text(cells[extra]), extra))
        response = _checked(_as_text(cells["response"]), "response")
        return Example(self.format, prompt=prompt, response=response, number=number)

    def _cells(self, row) -> dict:
        """The values of a row by role."""
        if not isinstance(row, dict):
            raise ValueError(
                f"expected columns {', '.join(self.columns.values())}, got "
                f"{type(row).__name__}"
            )
        cells = {role: row.get(column) for role, column in self.columns.items()}
        for role in _NEEDED[self.format]:
            if self.columns[role] not in row:
                raise ValueError(
                    f"it has no {self.columns[role]!r}, only {_listed(row)}"
                )
        for role in _OPTIONAL[self.format]:
            if role not in cells:
                # The first row may have lacked what a later one has.
                names = [name for name in _NAMES[role] if name in row]
                if names and names[0] not in self.columns.values():
                    cells[role] = row[names[0]]
        return cells


def detect(row, format: str = "auto", columns: dict[str, str] | None = None) -> Layout:
    """Finds out how a row is laid out.

    Args:
        row: a string, a list of messages, or a dict of columns.
        format: one of `FORMATS` to be told apart by the columns alone, or `"auto"`.
        columns: the columns of some roles, in place of finding them by name:
            `{"prompt": "my_question", "response": "my_answer"}`.

    Raises:
        DataError: the row is of no known layout, or of several.
    """
    if format not in ("auto", *FORMATS):
        raise DataError(f"format must be auto, {', '.join(FORMATS)}, got {format!r}.")
    if isinstance(row, dict):
        return _detect_columns(row, format, columns or {})
    found = None
    if isinstance(row, str):
        found = "text"
    elif isinstance(row, list | tuple) and row and isinstance(row[0], dict):
        found = _format_of_messages(row)
    if found is None or columns or format not in ("auto", found):
        wanted = "" if format == "auto" else f" of the format {format}"
        raise DataError(
            f"expected a row{wanted} with columns, got {type(row).__name__}: "
            f"{row!r:.60}."
        )
    return Layout(found, None)


def read_columns(assignments) -> dict[str, str] | None:
    """`["prompt=question"]` as `{"prompt": "question"}`, None if there are none.

    Raises:
        DataError: one of them is of another form, or names no role, or a role twice.
    """
    columns = {}
    for assignment in assignments or ():
        role, _, column = assignment.partition("=")
        if not role or not column:
            raise DataError(
                "column: expected ROLE=COLUMN such as prompt=question, got "
                f"{assignment!r}."
            )
        if role in columns:
            raise DataError(f"column: {role} is given twice.")
        columns[role] = column
    _check_roles(columns)
    return columns or None


def _detect_columns(row, format, given) -> Layout:
    _check_given(row, given)
    possible = {}
    for name in FORMATS if format == "auto" else (format,):
        roles = (*_NEEDED[name], *_OPTIONAL[name])
        if set(given) <= set(roles):
            found = {role: _find(row, role, given) for role in roles}
            if all(found[role] for role in _NEEDED[name]):
                possible[name] = found
    possible = _most_telling(row, possible, format)
    if len(possible) != 1:
        what = f"no known format has the columns {_listed(row)}"
        if possible:
            kinds = " and as ".join(possible)
            what = f"the columns {_listed(row)} can be read as {kinds}"
        raise DataError(
            f"{what}. Say which is which with format (one of {', '.join(FORMATS)}) "
            "and with columns such as prompt=COLUMN response=COLUMN, text=COLUMN or "
            "messages=COLUMN (--column prompt=COLUMN --column response=COLUMN)."
        )
    (name, found), *_ = possible.items()
    doubtful = [role for role, names in found.items() if len(names) > 1]
    if doubtful:
        role = doubtful[0]
        raise DataError(
            f"each of the columns {' and '.join(found[role])} may be the {role}: say "
            f"which one is, with columns such as {role}={found[role][0]}."
        )
    columns = {role: names[0] for role, names in found.items() if names}
    unused = tuple(str(key) for key in row if key not in columns.values())
    return Layout(name, columns, unused)


def _check_roles(given):
    unknown = [role for role in given if role not in _NAMES]
    if unknown:
        raise DataError(
            f"column: {unknown[0]!r} is no role; the roles are {', '.join(_NAMES)}."
        )


def _check_given(row, given):
    _check_roles(given)
    absent = [column for column in given.values() if column not in row]
    if absent:
        raise DataError(f"there is no column {absent[0]!r} among {_listed(row)}.")


def _find(row, role, given) -> list[str]:
    """The columns of a row that may play a role."""
    if role in given:
        return [given[role]]
    taken = set(given.values())
    return [
        key
        for key in row
        if isinstance(key, str)
        and key.strip().lower() in _NAMES[role]
        and key not in taken
    ]


def _most_telling(row, possible, format) -> dict:
    """Leaves of the possible formats those that another does not explain better."""
    possible = dict(possible)
    if "alpaca" in possible:
        # `input` and `output` alone would be a pair; Alpaca's own files have a `text`
        # made of the other columns.
        possible.pop("pairs", None)
        possible.pop("text", None)
    if "chat" in possible and format == "auto":
        messages = _as_list(row[possible["chat"]["messages"][0]])
        kind = _format_of_messages(messages) if isinstance(messages, list) else None
        for name in {"chat", "sharegpt"} - {kind}:
            possible.pop(name)
    return possible


def _format_of_messages(messages) -> str | None:
    first = messages[0] if messages else None
    if not isinstance(first, dict):
        return None
    if "from" in first:
        return "sharegpt"
    return "chat" if "role" in first else None


def _as_list(value):
    """Messages as a list; in a CSV file they are JSON."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"its messages are not JSON: {error.msg}") from None
    return value.tolist() if hasattr(value, "tolist") else value


def _has_messages(value) -> bool:
    """Whether a column holds messages in place of text."""
    return isinstance(value, list | tuple) and bool(value) and is_message(value[0])


def _read_prompted(prompt, response, system, number) -> Example:
    """An example of a chat so far, and of the messages that are to follow it."""
    if not _has_messages(response):
        raise TypeError(
            "its prompt is a list of messages and its response is not: both must be "
            'lists, the response such as [{"role": "assistant", "content": ...}]'
        )
    messages = _read_messages([*prompt, *response], system)
    given = len(messages) - len(response)
    if not any(message["role"] == "assistant" for message in messages[given:]):
        raise ValueError("no message of its response is the assistant's")
    return Example("pairs", messages=messages, given=given, number=number)


def _as_text(value):
    """A number as its text, as Python writes it; anything else as it is."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if is_number and math.isfinite(value) else value


def _read_messages(value, system) -> tuple[dict, ...]:
    value = _as_list(value)
    if not isinstance(value, list | tuple):
        raise TypeError(f"its messages are no list but {type(value).__name__}")
    messages = [_read_message(i, message) for i, message in enumerate(value)]
    if messages and messages[0]["role"] == "system" and not messages[0]["content"]:
        del messages[0]
    if _filled(system):
        content = _checked(system, "system")
        messages.insert(0, {"role": "system", "content": content})
    opening = next((m for m in messages if m["role"] != "system"), None)
    if opening is not None and opening["role"] == "assistant":
        raise ValueError(
            "its first message is the assistant's, and Gemma was taught chats that the "
            "user begins: take that message out, or leave the row out"
        )
    read_turns(messages)
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("no message is the assistant's: there is nothing to learn")
    return tuple(messages)


def _read_message(index, message) -> dict:
    if not isinstance(message, dict):
        raise TypeError(f"message {index} is no dict but {type(message).__name__}")
    keys = ("from", "value") if "from" in message else ("role", "content")
    role, content = (message.get(key) for key in keys)
    if role not in _ROLES:
        raise ValueError(
            f"message {index} has the role {role!r}; known are {', '.join(_ROLES)}"
        )
    role, content = _ROLES[role], read_content(content, index)
    if role != "system" or content:
        content = _checked(content, f"message {index} ({role})")
    return {"role": role, "content": content}


def _filled(value) -> bool:
    return value is not None and not (isinstance(value, str) and not value.strip())


def _checked(value, name: str) -> str:
    if not isinstance(value, str):
        kind = "missing" if value is None else f"no text but {type(value).__name__}"
        raise TypeError(f"its {name} is {kind}")
    if not value.strip():
        raise ValueError(f"its {name} is empty")
    if is_broken(value):
        raise ValueError(f"its {name} is no valid Unicode (was the file UTF-8?)")
    return value


def _listed(row: dict) -> str:
    names = ", ".join(map(str, row))
    return names if len(names) < 300 else names[:300] + "..."
