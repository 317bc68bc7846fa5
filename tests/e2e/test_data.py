"""`gemma-keras data preview` in a shell, and the page about data."""

import json
import os
import pathlib
import pty
import re
import shutil
import subprocess
import sys

import pytest

from gemma_keras import GemmaCausalLMPreprocessor
from gemma_keras.examples import FORMATS
from gemma_keras.readers import read_examples
from gemma_keras.registry import resolve
from gemma_keras.sft.config import RunConfig
from gemma_keras.sft.examples import read_data

PRESET = "gemma_tiny_instruct_en"
START = "import sys; sys.argv[0] = 'gemma-keras'; import gemma_keras.cli as c; c.main()"
PROGRAM = [sys.executable, "-c", START]
PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "data.md"

pytestmark = pytest.mark.any_backend


def chat(user, model):
    messages = [
        {"role": "user", "content": user},
        {"role": "assistant", "content": model},
    ]
    return json.dumps({"messages": messages})


GOOD = [chat("What color is the sky?", "Blue."), chat("Who are you?", "A tiny Gemma.")]


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "good.jsonl"
    path.write_text("\n".join(GOOD))
    return path


def preview(*arguments, **variables):
    return subprocess.run(
        [*PROGRAM, "data", "preview", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**os.environ, **variables},
    )


def test_good_data_is_shown_counted_and_approved(good):
    done = preview(good, "--preset", PRESET, "--sequence-length", "64")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "good.jsonl: 2 examples, format chat (messages)"
    shown = done.stdout.split("---")[1]
    assert "\n<bos><start_of_turn>user\nWhat color is the sky?<end_of_turn>\n" in shown
    assert "<start_of_turn>model\n{+Blue.<end_of_turn>+}" in shown
    assert "\x1b" not in done.stdout
    assert re.search(r"packed rows of 64 +\d+, [\d.]+% of slots used", done.stdout)
    assert lines[-1] == "No warnings."


def test_the_number_of_examples_and_the_rest_can_be_chosen(good):
    few = ("--examples", "1", "--no-packing", "--loss-on", "all")
    done = preview(good, "--preset", PRESET, *few)
    assert done.returncode == 0
    assert "good.jsonl:1" in done.stdout and "good.jsonl:2" not in done.stdout
    assert "packed" not in done.stdout
    assert "<bos>{+<start_of_turn>user" in done.stdout


def test_bad_rows_fail_unless_they_are_skipped(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join([GOOD[0], chat("Hello", ""), "{", GOOD[0]]))
    done = preview(path, "--preset", PRESET)
    assert done.returncode == 1
    for told in (
        "bad.jsonl:2: its message 1 (assistant) is empty",
        "bad.jsonl:3: not JSON",
        "duplicate: 1 example (bad.jsonl:4)",
    ):
        assert told in done.stdout
    assert "--skip-bad" in done.stderr and "Traceback" not in done.stderr
    assert preview(path, "--preset", PRESET, "--skip-bad").returncode == 0


def test_pairs_are_text_or_turns_as_the_model_and_the_caller_have_it(tmp_path):
    path = tmp_path / "qa.csv"
    path.write_text("ask,reply\nWhat color is the sky?,Blue.\n")
    columns = ("--column", "prompt=ask", "--column", "response=reply")
    turns = "<start_of_turn>model\n{+Blue.<end_of_turn>+}"
    plain = "<bos>What color is the sky?{+Blue.<eos>+}"
    for more, expected in [
        (("--preset", PRESET), turns),
        (("--preset", PRESET, "--template", "text"), plain),
        (("--preset", "gemma_tiny_en"), plain),
        (("--preset", "gemma_tiny_en", "--template", "chat"), turns),
    ]:
        assert expected in preview(path, *columns, *more).stdout


def test_several_files_are_one_set(good, tmp_path):
    more = tmp_path / "more.jsonl"
    more.write_text("\n".join([GOOD[0], "{"]))
    done = preview(good, more, "--preset", PRESET, "--skip-bad")
    assert done.returncode == 0, done.stderr
    for told in (
        "good.jsonl: 2 examples, format chat (messages)",
        "more.jsonl: 1 examples, 1 bad skipped",
        "--- more.jsonl:1: ",
        "duplicate: 1 example (more.jsonl:1)",
        "  more.jsonl:2: not JSON",
    ):
        assert told in done.stdout


@pytest.mark.parametrize(
    "name", ["it/model", "gemma2it", "instruction-tuned", "chatty"]
)
def test_preview_and_sft_read_pairs_alike_whatever_a_model_is_called(tmp_path, name):
    path = tmp_path / "qa.csv"
    path.write_text("ask,reply\nWhat color is the sky?,Blue.\n")
    shutil.copytree(resolve(PRESET), tmp_path / "runs" / name)
    source = f"runs/{name}"
    columns = ["prompt=ask", "response=reply"]
    config = RunConfig(
        preset=source, train=[str(path)], out="-", column=columns, sequence_length=64
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        preprocessor = GemmaCausalLMPreprocessor.from_preset(source)
        as_chat = read_data(config, preprocessor, lambda line: None).chat
        flags = [word for column in columns for word in ("--column", column)]
        done = preview(path, "--preset", source, *flags)
    assert done.returncode == 0, done.stderr
    assert ("<start_of_turn>" in done.stdout) == as_chat == (name != "chatty")


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        (("absent.jsonl", "--preset", PRESET), 1, "there is no such file"),
        (("FILE", "--preset", "gemma_tinny_en"), 1, "Did you mean"),
        (("FILE", "--preset", PRESET, "--format", "alpaca"), 1, "no known format"),
        (("FILE",), 2, "--preset"),
        (("FILE", "--preset", PRESET, "--column", "prompt"), 2, "ROLE=COLUMN"),
        (("FILE", "--preset", PRESET, "--column", "ask=a"), 2, "'ask' is no role"),
        (("FILE", "--preset", PRESET, "--template", "no"), 2, "auto"),
        (("FILE", "--preset", PRESET, "--format", "xml"), 2, "sharegpt"),
        (("FILE", "--preset", PRESET, "--sequence-length", "0"), 2, "or equal to 1"),
    ],
)
def test_what_cannot_be_done_is_one_message(good, arguments, status, told):
    arguments = [good if word == "FILE" else word for word in arguments]
    done = preview(*arguments)
    assert done.returncode == status
    assert told in done.stderr and "Traceback" not in done.stderr
    assert "---" not in done.stdout


def in_a_terminal(*arguments, **variables):
    """Status and output of the command with a terminal for its stdout."""
    chosen = ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE")
    shell = {name: value for name, value in os.environ.items() if name not in chosen}
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*PROGRAM, "data", "preview", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=subprocess.PIPE,
        env={**shell, "TERM": "xterm", "COLUMNS": "100", **variables},
    )
    os.close(theirs)
    output = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # the other side is closed
            break
        if not piece:
            break
        output += piece
    os.close(ours)
    process.stderr.close()
    return process.wait(), output.decode()


def test_a_terminal_shows_colours_unless_they_are_not_wanted(good):
    status, shown = in_a_terminal(good, "--preset", PRESET)
    assert status == 0
    assert re.search(r"\x1b\[[\d;]*32mBlue\.<end_of_turn>", shown) and "{+" not in shown
    status, shown = in_a_terminal(good, "--preset", PRESET, NO_COLOR="1")
    assert status == 0
    assert "{+Blue.<end_of_turn>+}" in shown and "\x1b[1;32m" not in shown


def test_no_tensor_library_is_imported(good):
    look = (
        f"import sys; sys.argv = ['gemma-keras', 'data', 'preview', {str(good)!r}, "
        f"'--preset', '{PRESET}']\n"
        "import gemma_keras.cli\n"
        "try: gemma_keras.cli.main()\nexcept SystemExit as end: assert not end.code\n"
        "heavy = {'keras', 'jax', 'torch', 'tensorflow'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_each_line_of_the_page_is_of_the_format_that_it_says():
    found = re.findall(r"^```json (\w+)\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    assert tuple(name for name, _ in found) == FORMATS
    for name, line in found:
        assert read_examples([json.loads(line)]).format == name


def test_the_program_of_the_page_runs(tmp_path):
    (program,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    (tmp_path / "train.jsonl").write_text("\n".join(GOOD))
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "train.jsonl: 2 examples, format chat (messages)" in done.stdout
