"""Files and objects of all layouts to examples; bad rows with file, line and reason."""

import csv
import gzip
import json
import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_keras import records
from gemma_keras.encoding import ExampleEncoder
from gemma_keras.examples import Example, read_columns
from gemma_keras.readers import LISTED, read_examples
from gemma_keras.records import DataError

pytestmark = pytest.mark.any_backend

PAIR = {"prompt": "What is red?", "response": "A color."}
CHAT = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Good day."},
]
PARTS = [
    {
        "role": "user",
        "content": [{"type": "text", "text": text} for text in ("Hello, ", "you")],
    },
    {"role": "assistant", "content": [{"type": "text", "text": "Good day."}]},
]
TURNS = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Good day."}]
ALPACA = {"instruction": "Add.", "input": "1 and 2", "output": "3"}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def pairs(examples):
    return [(example.prompt, example.response) for example in examples]


# ----------------------------------------------------------------- layouts


@pytest.mark.parametrize(
    ("row", "format", "strings"),
    [
        ("Once upon a time.", "text", ("Once upon a time.",)),
        ({"text": "Once.", "id": 3}, "text", ("Once.",)),
        (PAIR, "pairs", ("What is red?", "A color.")),
        ({"prompts": "a", "responses": "b"}, "pairs", ("a", "b")),
        ({"prompt": "a", "completion": "b"}, "pairs", ("a", "b")),
        ({"Question": "a", "Answer": "b"}, "pairs", ("a", "b")),
        ({"input": "a", "output": "b"}, "pairs", ("a", "b")),
        ({**PAIR, "system": "s"}, "pairs", ("s\n\nWhat is red?", "A color.")),
        (ALPACA, "alpaca", ("Add.\n\n1 and 2", "3")),
        ({**ALPACA, "input": ""}, "alpaca", ("Add.", "3")),
        ({**ALPACA, "text": "Below ..."}, "alpaca", ("Add.\n\n1 and 2", "3")),
        ({"instruction": "a", "context": "", "response": "b"}, "alpaca", ("a", "b")),
        (CHAT, "chat", ("Hello", "Good day.")),
        ({"messages": CHAT}, "chat", ("Hello", "Good day.")),
        ({"messages": json.dumps(CHAT)}, "chat", ("Hello", "Good day.")),
        ({"system": "s", "messages": CHAT}, "chat", ("s", "Hello", "Good day.")),
        ({"conversations": TURNS}, "sharegpt", ("Hello", "Good day.")),
        (TURNS, "sharegpt", ("Hello", "Good day.")),
        ({"prompt": "Hello", "messages": CHAT}, "chat", ("Hello", "Good day.")),
        ({"prompt": "1 + 1", "response": 2}, "pairs", ("1 + 1", "2")),
        ({"question": 7, "answer": 0.5}, "pairs", ("7", "0.5")),
        ({**ALPACA, "input": 12, "output": 3}, "alpaca", ("Add.\n\n12", "3")),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, "pairs", ("Hello", "Good day.")),
        ({"messages": PARTS}, "chat", ("Hello,you", "Good day.")),
    ],
    ids=repr,
)
def test_each_layout_is_told_by_its_columns(tmp_path, row, format, strings):
    examples = read_examples(write(tmp_path / "data.jsonl", row, row))
    assert examples.format == format
    assert [example.strings for example in examples] == [strings] * 2
    assert format in examples.description and "2 examples" in examples.description
    assert read_examples([row], format=format)[0].strings == strings


def test_roles_of_a_chat_get_the_names_that_the_package_knows():
    system = {"from": "system", "value": "Be brief."}
    (example,) = read_examples([{"conversations": [system, *TURNS]}])
    roles = [message["role"] for message in example.messages]
    assert roles == ["system", "user", "assistant"]


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_of_a_chat_that_is_a_prompt_no_answer_is_learned(small, system):
    again = [{"role": "user", "content": "count"}]
    row = {"prompt": CHAT + again, "completion": CHAT[1:], "system": system}
    (example,) = read_examples([row])
    assert example.given == 3 + bool(system)
    for loss_on, expected in [("response", "last"), ("last", "last"), ("all", "all")]:
        found = ExampleEncoder(small, loss_on=loss_on)(example)
        whole = ExampleEncoder(small, loss_on=expected).chat(example.messages)
        assert found == whole


def test_what_is_not_used_is_said():
    examples = read_examples([{**PAIR, "id": 1, "source": "x"}])
    assert examples.description == (
        "the list: 1 examples, format pairs (prompt, response; not used: id, source)"
    )


def test_a_column_that_only_later_rows_have_is_read():
    rows = [{k: v for k, v in ALPACA.items() if k != "input"}, ALPACA]
    assert pairs(read_examples(rows)) == [("Add.", "3"), ("Add.\n\n1 and 2", "3")]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"title": "a", "body": "b"}, "no known format has the columns title, body"),
        ({**PAIR, "messages": CHAT}, "as pairs and as chat"),
        ({**PAIR, "text": "x"}, "as text and as pairs"),
        ({**PAIR, "answer": "x"}, "response and answer may be the response"),
        (3, "expected a row with columns, got int: 3"),
        ([3], "expected a row with columns, got list"),
    ],
)
def test_what_cannot_be_told_names_the_columns_and_what_to_do(tmp_path, row, told):
    path = write(tmp_path / "data.jsonl", row)
    with pytest.raises(DataError, match=f"data.jsonl:1: .*{told}") as error:
        read_examples(path)
    if isinstance(row, dict):
        assert "columns such as" in str(error.value)


def test_the_caller_can_say_which_is_which():
    row = {**PAIR, "text": "x", "messages": CHAT, "reply": "Blood."}
    assert read_examples([row], "text")[0].text == "x"
    assert read_examples([row], "chat")[0].messages is not None
    assert read_examples([row], "pairs")[0].response == "A color."
    chosen = {"prompt": "text", "response": "reply"}
    assert pairs(read_examples([row], columns=chosen)) == [("x", "Blood.")]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"format": "xml"}, "format must be auto, text, pairs"),
        ({"format": "alpaca"}, "no known format has the columns prompt, response"),
        ({"columns": {"prompt": "q"}}, "no column 'q' among prompt, response"),
        ({"columns": {"question": "prompt"}}, "'question' is no role"),
    ],
)
def test_a_choice_that_does_not_fit_is_refused(settings, told):
    with pytest.raises(DataError, match=told):
        read_examples([PAIR], **settings)


def test_columns_are_chosen_in_words_too():
    assert read_columns(["prompt=my=q", "response=a b"]) == {
        "prompt": "my=q",
        "response": "a b",
    }
    assert read_columns([]) is read_columns(None) is None


# ------------------------------------------------------------------- files


def write_csv(path, rows, delimiter=",", encoding="utf-8"):
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, rows[0].keys(), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path, rows):
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
    import pyarrow

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


ROWS = [PAIR, {"prompt": 'Größe, "x"?\nYes', "response": "日本\u2028語 \U0001f600"}]


def as_columns(path):
    columns = {key: [row[key] for row in ROWS] for key in ROWS[0]}
    path.write_text(json.dumps(columns))
    return path


def as_gzip(path):
    path.write_bytes(gzip.compress(json.dumps(ROWS).encode()))
    return path


WRITERS = {
    "a.jsonl": lambda path: write(path, *ROWS),
    "b.ndjson": lambda path: write(path, *ROWS),
    "c.JSON": lambda path: path.write_text(json.dumps(ROWS, indent=2)) and path,
    "d.json": lambda path: path.write_text(json.dumps(ROWS)) and path,
    "e.json": lambda path: write(path, *ROWS),
    "f.json": as_columns,
    "g.json": lambda path: path.write_text(json.dumps({"data": ROWS})) and path,
    "h.csv": lambda path: write_csv(path, ROWS),
    "i.csv": lambda path: write_csv(path, ROWS, ";", "utf-8-sig"),
    "j.tsv": lambda path: write_csv(path, ROWS, "\t"),
    "k.parquet": lambda path: write_parquet(path, ROWS),
    "l.json.gz": as_gzip,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same(tmp_path, name):
    examples = read_examples(WRITERS[name](tmp_path / name))
    assert pairs(examples) == [tuple(row.values()) for row in ROWS]
    assert examples.description.startswith(f"{name}: 2 examples, format pairs")


def test_mark_and_line_ends_of_windows_are_no_trouble(tmp_path):
    path = tmp_path / "data.jsonl"
    lines = [json.dumps(PAIR), "", json.dumps(PAIR)]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert [example.number for example in read_examples(path)] == [1, 3]


def test_a_blank_line_ends_a_document_of_a_text_file(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_text("\nOne.\nStill one.\n\n \n\nTwo.\n")
    examples = read_examples(path)
    assert [example.text for example in examples] == ["One.\nStill one.", "Two."]
    assert [examples.place(e) for e in examples] == ["stories.txt:2", "stories.txt:7"]


def test_chats_in_parquet_and_csv(tmp_path):
    files = [
        write_csv(tmp_path / "a.csv", [{"messages": json.dumps(CHAT)}]),
        write_parquet(tmp_path / "b.parquet", [{"messages": CHAT}]),
    ]
    for path in files:
        assert read_examples(path)[0].messages == tuple(CHAT)


def test_one_object_in_a_json_file_is_one_example(tmp_path):
    path = tmp_path / "one.json"
    for row in (PAIR, {"messages": CHAT}):
        path.write_text(json.dumps(row, indent=1))
        assert len(read_examples(path)) == 1


@given(
    rows=st.lists(
        st.text(st.characters(exclude_categories=["Cs"])).filter(str.strip), min_size=1
    ),
    indent=st.sampled_from([None, 1]),
    size=st.integers(1, 40),
)
def test_arrays_may_be_cut_anywhere_while_they_are_read(
    tmp_path_factory, rows, indent, size
):
    """The chunk in which a file is read has no part in what is read."""
    path = tmp_path_factory.mktemp("arrays") / "data.json"
    text = json.dumps([{"text": row} for row in rows], indent=indent)
    path.write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "_CHUNK", size)
        examples = read_examples(path)
    assert [example.text for example in examples] == rows
    # Each begins in the line where its brace is.
    braces = [n for n, line in enumerate(text.splitlines(), 1) if line.strip() == "{"]
    expected = braces if indent else [1] * len(rows)
    assert [example.number for example in examples] == expected


# ------------------------------------------------------- objects in memory


class Dataset:
    """What is used of a Hugging Face dataset."""

    column_names = ("prompt", "response")

    def __iter__(self):
        return iter(ROWS)


@pytest.mark.parametrize(
    "source",
    [
        ROWS,
        tuple(ROWS),
        {key: [row[key] for row in ROWS] for key in ROWS[0]},
        Dataset(),
        [Example("pairs", prompt=r["prompt"], response=r["response"]) for r in ROWS],
    ],
    ids=["list", "tuple", "columns", "dataset", "examples"],
)
def test_objects_in_memory_give_the_same(source):
    assert pairs(read_examples(source)) == [tuple(row.values()) for row in ROWS]
    assert len(read_examples(row for row in ROWS)) == 2


def test_a_genuine_hugging_face_dataset():
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    whole = datasets.Dataset.from_list(ROWS)
    streamed = whole.to_iterable_dataset()
    chats = datasets.Dataset.from_list([{"messages": CHAT}])
    for source in (whole, streamed):
        assert pairs(read_examples(source)) == [tuple(row.values()) for row in ROWS]
    assert read_examples(chats)[0].messages == tuple(CHAT)
    with pytest.raises(DataError, match=r"splits \(train\): pass one of them"):
        read_examples(datasets.DatasetDict(train=whole))


def test_a_place_in_memory_is_an_index():
    with pytest.raises(DataError, match="the list, row 1: its response is empty"):
        read_examples([PAIR, {**PAIR, "response": " "}])


@pytest.mark.parametrize("source", [3, b"text", None, object()])
def test_what_has_no_rows_is_refused(source):
    with pytest.raises(TypeError, match="Examples come from"):
        read_examples(source)


def test_columns_must_be_equally_long():
    with pytest.raises(DataError, match="prompt: 1, response: 2"):
        read_examples({"prompt": ["a"], "response": ["b", "c"]})


# ---------------------------------------------------------------- bad rows

BAD = [
    ('{"prompt": "a", "response": ', "not JSON: Expecting value at column 29"),
    ('{"prompt": "a"}', "it has no 'response', only prompt"),
    ('{"prompt": "a", "response": " "}', "its response is empty"),
    ('{"prompt": "", "response": "b"}', "its prompt is empty"),
    ('{"prompt": "a", "response": null}', "its response is missing"),
    ('{"prompt": "a", "response": true}', "its response is no text but bool"),
    ('{"prompt": "a", "response": NaN}', "its response is no text but float"),
    ('{"prompt": "a", "response": [3]}', "its response is no text but list"),
    (
        '{"prompt": [{"role": "user", "content": "a"}], "response": "b"}',
        "its prompt is a list of messages and its response is not",
    ),
    (
        '{"prompt": [{"role": "user", "content": "a"}, '
        '{"role": "assistant", "content": "b"}], '
        '"response": [{"role": "user", "content": "c"}]}',
        "no message of its response is the assistant's",
    ),
    ('{"prompt": "a", "response": "\\ud800"}', "its response is no valid Unicode"),
    ('"a text"', "expected columns prompt, response, got str"),
    ("[" * 100_000, "its JSON is nested too deeply"),
]


@pytest.mark.parametrize(("line", "reason"), BAD, ids=[reason for _, reason in BAD])
def test_a_bad_line_is_told_with_file_line_and_reason(tmp_path, line, reason):
    path = write(tmp_path / "data.jsonl", PAIR)
    path.write_text(f"{path.read_text()}\n{line}\n{json.dumps(PAIR)}")
    with pytest.raises(DataError) as error:
        read_examples(path)
    (told,) = re.findall(r"- data.jsonl:3: (.*)", str(error.value))
    assert told.startswith(reason)
    assert "--skip-bad" in str(error.value)
    examples = read_examples(path, skip_bad=True)
    assert (len(examples), examples.num_skipped) == (2, 1)
    assert examples.faults == [f"data.jsonl:3: {told}"]
    assert "1 bad skipped" in examples.description


USER, MODEL = CHAT
BAD_CHATS = [
    ([], "at least one user message"),
    ([USER], "no message is the assistant's"),
    ([MODEL, *CHAT], "its first message is the assistant's, and Gemma was taught"),
    ([{"from": "gpt", "value": "Hello"}], "its first message is the assistant's"),
    (
        [{"role": "user", "content": [{"type": "image", "url": "x"}]}, MODEL],
        "The content of message 0 has a part of the type 'image': it must be",
    ),
    ([{"role": "user", "content": ["Hello"]}, MODEL], "part of the type 'str'"),
    ([USER, USER, MODEL], "Message 1 has the role 'user', expected 'assistant'"),
    ([*CHAT, MODEL], "Message 2 has the role 'assistant', expected 'user'"),
    ([USER, {"role": "tool", "content": "x"}], "message 1 has the role 'tool'"),
    ([USER, {"role": "assistant", "content": ""}], r"message 1 \(assistant\) is empty"),
    ([USER, {"role": "assistant"}], r"message 1 \(assistant\) is missing"),
    ([USER, "Hello"], "message 1 is no dict but str"),
    ("Hello", "its messages are no list but str"),
    ("[1", "its messages are not JSON"),
]


@pytest.mark.parametrize(("chat", "reason"), BAD_CHATS, ids=[r for _, r in BAD_CHATS])
def test_a_chat_in_disorder_is_told_likewise(tmp_path, chat, reason):
    path = write(tmp_path / "c.jsonl", {"messages": CHAT}, {"messages": chat})
    with pytest.raises(DataError, match=f"c.jsonl:2: .*{reason}"):
        read_examples(path)


def test_bytes_that_are_not_utf_8_are_told(tmp_path):
    good, latin = json.dumps(PAIR).encode(), b'{"prompt": "caf\xe9", "response": "b"}'
    path = tmp_path / "data.jsonl"
    path.write_bytes(good + b"\n" + latin)
    with pytest.raises(DataError, match=r"data.jsonl:2: it is not UTF-8"):
        read_examples(path)
    for name, content, line in [
        ("data.csv", b"prompt,response\na,b\ncaf\xe9,b\n", 3),
        ("data.txt", b"one\n\ncaf\xe9\n", 3),
        ("data.json", b"[" + good + b",\n" + latin + b"]", 2),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name}:{line}.*no valid Unicode"):
            read_examples(tmp_path / name)


def test_a_row_of_a_csv_file_with_fields_too_many(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text('prompt,response\n"a\nb",c\nd,e,f\n')
    with pytest.raises(DataError, match=r"csv:4: it has 3 fields, the header 2"):
        read_examples(path)


BROKEN = [
    (
        "data.csv",
        'prompt,response\na,b\n"a"b,c\n"d\ne"f,g\nc,d\n',
        ["data.csv:3: not CSV: ", "data.csv:4: not CSV: .* in line 5 "],
    ),
    (
        "data.json",
        """[{"prompt": "a", "response": "b"},
        {"prompt": "a, ]} and [", "response": },
        oops, {"prompt": "c",
        "response": "d" "e"},
        {"prompt": "c", "response": "d"}]""",
        [
            r"data.json:2 \(item 1\): not JSON: Expecting value",
            r"data.json:3 \(item 2\): not JSON: Expecting value",
            r"data.json:3 \(item 3\): not JSON: Expecting ',' delimiter in line 4",
        ],
    ),
    (
        "commas.json",
        """[{"prompt": "a", "response": "b"}
        {"prompt": "x", "response": "y"}, ,
        {"prompt": "c", "response": "d"},
        ]""",
        [
            r"commas.json:2 \(item 1\): there is no comma in front of it",
            r"commas.json:2 \(item 2\): not JSON: Expecting value",
            r"commas.json:4 \(item 4\): a comma with nothing behind it",
        ],
    ),
]


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
@pytest.mark.parametrize(("name", "text", "told"), BROKEN, ids=[b[0] for b in BROKEN])
def test_a_broken_row_is_told_or_skipped_and_the_next_is_read(
    tmp_path, monkeypatch, name, text, told, size
):
    monkeypatch.setattr(records, "_CHUNK", size)
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(DataError) as error:
        read_examples(path)
    examples = read_examples(path, skip_bad=True)
    assert pairs(examples) == [("a", "b"), ("c", "d")]
    assert examples.num_skipped == len(told)
    for fault, expected in zip(examples.faults, told, strict=True):
        assert re.match(expected, fault), fault
        assert fault in str(error.value)


@pytest.mark.parametrize("size", [1, 2, 1 << 20])
def test_numbers_in_an_array_are_read_whole(tmp_path, monkeypatch, size):
    monkeypatch.setattr(records, "_CHUNK", size)
    path = tmp_path / "data.json"
    path.write_text("[12, 345]")
    assert [row.value for row in records.open_rows(path).rows] == [12, 345]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("data.csv", 'prompt,response\na,b\n"c,d\ne,f\n'),
        ("data.json", '[{"prompt": "a"},\n\n{"prompt": "b, "response": "c"}]'),
        ("more.json", '[{"prompt": "a"},\n\n{"prompt": ["b"}]'),
    ],
)
def test_a_row_without_an_end_cannot_be_skipped(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=rf"{name}:3: .*--skip-bad\) cannot leave it"):
        read_examples(tmp_path / name, skip_bad=True)


def test_many_bad_rows_make_one_message_and_reading_stops(tmp_path):
    path = write(tmp_path / "data.jsonl", PAIR, *[{"prompt": "a"}] * 50)
    with pytest.raises(DataError, match=f"The first {LISTED} bad rows") as error:
        read_examples(path)
    assert str(error.value).count("\n- ") == LISTED
    examples = read_examples(path, skip_bad=True)
    assert (examples.num_skipped, len(examples.faults)) == (50, LISTED)


def test_a_bad_first_row_does_not_hide_the_layout_of_the_others(tmp_path):
    path = write(tmp_path / "data.jsonl", {"prompt": "a"}, PAIR)
    with pytest.raises(DataError, match=r"data.jsonl:1: no known format"):
        read_examples(path)
    assert len(read_examples(path, skip_bad=True)) == 1


def test_nothing_but_bad_rows_is_an_error_whatever_is_skipped(tmp_path):
    path = write(tmp_path / "data.jsonl", *[{"prompt": "a", "response": ""}] * 3)
    with pytest.raises(DataError, match="All rows are bad"):
        read_examples(path, skip_bad=True)


def broken_gzip(path):
    path.write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-20])


BAD_FILES = {
    "absent.jsonl": (None, "there is no such file"),
    "empty.jsonl": (b"", "is empty"),
    "blank.jsonl": (b"\n \n", "holds no examples"),
    "no_rows.csv": (b"prompt,response\n", "holds no examples"),
    "wide.jsonl": ('{"text": "a"}'.encode("utf-16"), "is UTF-16: save it as UTF-8"),
    "data.docx": (b"PK", "read from files whose names end with .jsonl"),
    "data": (b"{}", "read from files whose names end with .jsonl"),
    "cut.json": (b'[{"text": "a"},\n{"text": "b"', "cut.json:2: not JSON"),
    "end.json": (b'[{"text": "a"}\n', "end.json:2: not JSON.*never closed"),
    "nested.json": (b'[{"text": ["a"}, {"text": "b"}]', "'}' in it closes nothing"),
    "two.json": (b'[{"text": "a"}]\n[{"text": "b"}]', "two.json:2: there is more"),
    "head.csv": (b'"prompt"x,response\na,b', "head.csv:1: not CSV"),
    "cut2.json": (b'{"text": ["a",\n', "cut2.json:2: not JSON"),
    "number.json": (b"3", "expected a list of rows, got 3"),
    "bad.csv": (
        b'prompt,response\na,"b\n',
        "bad.csv:2: a quote .* never closed",
    ),
    "twice.csv": (b"a,a\n1,2\n", "two columns are called 'a'"),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "a"}\n' * 999)[:-20], "is damaged"),
    "no.jsonl.gz": (b"hello", "is damaged"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_cannot_be_used_says_why(tmp_path, name):
    content, told = BAD_FILES[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=told):
        read_examples(tmp_path / name)


def test_a_file_that_is_no_parquet(tmp_path):
    pytest.importorskip("pyarrow", reason="needs pyarrow")
    (tmp_path / "data.parquet").write_bytes(b"hello")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read_examples(tmp_path / "data.parquet")


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "data.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"gemma_keras\[parquet\]"):
        read_examples(tmp_path / "data.parquet")


def test_a_directory_and_a_text_in_place_of_a_path_are_told_apart(tmp_path):
    with pytest.raises(DataError, match="is a directory: name a file"):
        read_examples(tmp_path)
    with pytest.raises(DataError, match="pass texts as a list"):
        read_examples("Once upon a time\nthere was a cat")
