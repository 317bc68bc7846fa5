"""The command `gemma-keras`, called as a person calls it."""

import json
import os
import pathlib
import pty
import select
import signal
import subprocess
import sys
import termios
import time

import pytest
import typer.testing

import gemma_keras
from gemma_keras import backend_choice, cli, registry

PRESET = "gemma_tiny_instruct_en"
QUESTION = "What is the capital of France?"
COMMANDS = ("generate", "chat", "info", "presets", "convert", "demo")
SCRIPT = pathlib.Path(sys.executable).with_name("gemma-keras")
PROGRAM = [str(SCRIPT)]
if not SCRIPT.exists():  # run from a source tree that is not installed
    START = (
        "import sys; sys.argv[0] = 'gemma-keras'; import gemma_keras.cli as c; c.main()"
    )
    PROGRAM = [sys.executable, "-c", START]


@pytest.fixture(scope="module")
def lm():
    return gemma_keras.GemmaCausalLM.from_preset(PRESET)


def invoke(*arguments, stdin=None):
    """Calls the command inside this process."""
    return typer.testing.CliRunner().invoke(
        cli.app, [*map(str, arguments)], input=stdin, prog_name="gemma-keras"
    )


def call(*arguments, stdin=None, **variables):
    """Calls the command as a process of its own."""
    return subprocess.run(
        [*PROGRAM, *map(str, arguments)],
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        text=True,
        env={**os.environ, **variables},
    )


# Help and usage


@pytest.mark.any_backend
@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_ends_with_an_example(command):
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert f"Example:\n    gemma-keras {command}" in result.stdout


@pytest.mark.any_backend
def test_without_a_command_the_help_is_shown():
    result = call()
    assert all(command in result.stdout + result.stderr for command in COMMANDS)
    assert result.returncode == 2


@pytest.mark.any_backend
def test_version():
    result = call("--version")
    assert result.stdout == f"gemma-keras {gemma_keras.__version__}\n"
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "arguments",
    [
        ("write", PRESET),
        ("generate",),
        ("generate", PRESET, "a", "b"),
        ("generate", PRESET, "a", "--top-p", "1.5"),
        ("generate", PRESET, "a", "--top-p", "0"),
        ("generate", PRESET, "a", "--seed", "-1"),
        ("generate", PRESET, "a", "--temperature", "-1"),
        ("generate", PRESET, "a", "--max-new-tokens", "0"),
        ("generate", PRESET, "a", "--draft-tokens", "3"),
        ("generate", PRESET, "a", "--prompt-lookup", "--draft", PRESET),
        ("generate", PRESET, "a", "--backend", "numpy"),
        ("generate", PRESET, "a", "--dtype", "int3"),
        ("demo", "--save-to", "."),
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_exits_with_2(arguments):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


# Errors


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("gemma_tiny_instrukt_en", "Did you mean gemma_tiny_instruct_en"),
        ("./nowhere", "nowhere"),
        ("ftp://somewhere", "hf://org/name"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "info"])
def test_a_source_that_is_not_there_is_one_message(command, source, told):
    result = invoke(command, source, *(["a"] if command == "generate" else []))
    assert result.exit_code == 1
    assert result.stdout == ""
    assert told in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.any_backend
def test_debug_shows_the_traceback():
    result = call("info", "./nowhere", "--debug")
    assert result.returncode == 1
    assert "Traceback" in result.stderr


@pytest.mark.any_backend
def test_an_unknown_backend_in_the_environment_is_told():
    result = call("generate", PRESET, "a", KERAS_BACKEND="theano")
    assert (result.returncode, result.stdout) == (1, "")
    assert "'theano'; it may be jax, torch, tensorflow" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.any_backend
def test_a_prompt_that_cannot_be_read_is_told(tmp_path):
    result = subprocess.run(
        [*PROGRAM, "generate", PRESET], input=b"\xff\xfe\xfd", capture_output=True
    )
    assert result.returncode == 1
    assert b"utf-8" in result.stderr
    assert b"Traceback" not in result.stderr


# The choice of the backend


def choice(monkeypatch, tmp_path, *, asked=None, variable=None, config=None, there=()):
    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setattr(backend_choice, "installed", lambda name: name in there)
    if variable:
        monkeypatch.setenv("KERAS_BACKEND", variable)
    if config:
        (tmp_path / "keras.json").write_text(config)
    backend_choice.choose_backend(asked)
    return os.environ["KERAS_BACKEND"]


ALL = ("jax", "torch", "tensorflow")


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("expected", "given"),
    [
        ("torch", {"asked": "torch", "variable": "jax", "there": ALL}),
        ("torch", {"variable": "torch", "there": ALL}),
        ("torch", {"config": '{"backend": "torch"}', "there": ALL}),
        ("jax", {"config": '{"backend": "tensorflow"}', "there": ("jax", "torch")}),
        ("tensorflow", {"config": "not json", "there": ALL}),
        ("tensorflow", {"there": ALL}),
        ("jax", {"there": ("torch", "jax")}),
        ("tensorflow", {"there": ("tensorflow",)}),
    ],
)
def test_the_backend_is_asked_for_set_configured_or_found(
    monkeypatch, tmp_path, expected, given
):
    assert choice(monkeypatch, tmp_path, **given) == expected


@pytest.mark.any_backend
def test_a_backend_that_is_not_installed_is_told(monkeypatch, tmp_path):
    with pytest.raises(ImportError, match=r"pip install 'gemma_keras\[torch\]'"):
        choice(monkeypatch, tmp_path, asked="torch", there=("jax",))
    with pytest.raises(ImportError, match="none is installed"):
        choice(monkeypatch, tmp_path)


# What is known of models


@pytest.mark.any_backend
def test_presets_lists_every_name_with_its_memory():
    result = invoke("presets")
    assert result.exit_code == 0
    for name in registry.presets():
        assert name in result.stdout
    lines = result.stdout.splitlines()
    (line,) = (one for one in lines if one.startswith("  gemma_2b_en "))
    assert "2,506 M" in line
    assert "5.01 GB" in line
    assert "Kaggle" in line
    assert "https://ai.google.dev/gemma/terms" in result.stderr


@pytest.mark.any_backend
def test_presets_as_json_says_where_each_comes_from():
    listed = {
        entry["name"]: entry for entry in json.loads(invoke("presets", "--json").stdout)
    }
    assert listed.keys() == registry.presets().keys()
    two = listed["gemma_2b_en"]
    assert two["parameters"] == 2_506_172_416
    assert two["memory_bytes"]["bfloat16"] == 5_012_344_832
    assert two["sources"][0].startswith("kaggle://")
    assert two["licence"] == "Gemma Terms of Use"
    assert listed[PRESET]["sources"] == []


@pytest.mark.any_backend
def test_info_tells_what_a_directory_holds(random_preset):
    told = json.loads(invoke("info", random_preset, "--json").stdout)
    assert told["path"] == str(random_preset)
    assert told["family"] == "gemma"
    assert told["dtype"] == "float32"
    assert told["config"]["hidden_dim"] == 32
    assert told["parameters"] * 4 == told["memory_bytes"]["float32"]
    text = invoke("info", random_preset).stdout
    assert "hidden_dim" in text
    assert f"{told['parameters']:,}" in text


@pytest.mark.any_backend
def test_info_by_name_alias_and_handle_is_the_same_and_fetches_nothing():
    by_name = json.loads(invoke("info", "gemma_2b_en", "--json").stdout)
    for source in (*by_name["sources"], "google/gemma-2b"):
        assert json.loads(invoke("info", source, "--json").stdout) == by_name


# Generation


def test_generate_prints_the_answer_alone_on_stdout(lm):
    result = call("generate", PRESET, QUESTION, "--chat", "--max-new-tokens", "24")
    chat = [{"role": "user", "content": QUESTION}]
    assert result.returncode == 0
    assert result.stdout == lm.generate(chat, max_new_tokens=24) + "\n"
    assert f"Loaded {PRESET}: " in result.stderr
    assert "MB in" in result.stderr


def test_generate_continues_a_text_from_stdin(lm):
    text = "Once upon a time"
    result = invoke("generate", PRESET, "--max-new-tokens", "8", stdin=text + "\n")
    expected = lm.generate(text, max_new_tokens=8, strip_prompt=True)
    assert result.exit_code == 0
    assert result.stdout.removesuffix("\n") == expected.removesuffix("\n")


def test_generate_repeats_itself_with_a_seed_only(random_preset):
    def text(seed):
        options = ("--temperature", "1.5", "--seed", seed, "--max-new-tokens", "24")
        return invoke("generate", random_preset, "a", *options).stdout

    assert text(3) == text(3)
    assert text(3) != text(4)


def test_generate_stops_before_a_stop_string(lm):
    chat = [{"role": "user", "content": QUESTION}]
    whole = lm.generate(chat, max_new_tokens=24)
    word = whole.split()[2]
    result = invoke("generate", PRESET, QUESTION, "--chat", "--stop", word)
    assert result.stdout.removesuffix("\n") == whole[: whole.index(word)]


def test_guesses_change_no_answer(lm):
    text = "Once upon a time, once upon a time, once"
    expected = lm.generate(text, max_new_tokens=8, strip_prompt=True)
    for options in (["--prompt-lookup", "--draft-tokens", "3"], ["--draft", PRESET]):
        result = invoke("generate", PRESET, text, "--max-new-tokens", "8", *options)
        assert result.exit_code == 0
        assert result.stdout.removesuffix("\n") == expected.removesuffix("\n")


@pytest.mark.any_backend
def test_sampling_is_greedy_unless_something_is_asked_for():
    def sampler(**options):
        return cli.Sampling(**options).arguments()["sampler"]

    assert sampler().greedy
    assert sampler(repetition_penalty=1.3).greedy
    assert sampler(repetition_penalty=1.3).repetition_penalty == 1.3
    assert not sampler(top_k=4).greedy
    assert sampler(top_p=0.9).temperature == 1.0
    assert sampler(min_p=0.1, temperature=0.5).temperature == 0.5


@pytest.mark.any_backend
def test_the_reader_of_a_pipe_may_go_away(random_preset):
    line = f"{subprocess.list2cmdline(PROGRAM)} generate {random_preset} a"
    line = f"{line} --max-new-tokens 600 | head -c 20"
    result = subprocess.run(["bash", "-c", line], capture_output=True)
    assert len(result.stdout) == 20
    assert b"Traceback" not in result.stderr
    assert b"BrokenPipe" not in result.stderr


# Chat


def test_chat_answers_each_line_of_a_pipe_and_remembers(lm):
    turns = ["Hello! My name is Anna.", "What is my name?"]
    result = invoke("chat", PRESET, stdin="\n".join(turns) + "\n")
    session = lm.start_chat()
    expected = [session.send(turn, max_new_tokens=256) for turn in turns]
    assert result.exit_code == 0
    assert result.stdout == "".join(f"{answer}\n" for answer in expected)


def test_chat_forgets_on_reset_and_ends_on_exit(lm):
    result = invoke("chat", PRESET, stdin=f"{QUESTION}\n/reset\n{QUESTION}\n/exit\nx\n")
    answer = lm.start_chat().send(QUESTION, max_new_tokens=256)
    assert result.stdout == f"{answer}\n" * 2
    assert "The chat starts anew." in result.stderr


@pytest.mark.any_backend
def test_a_backslash_continues_a_turn(monkeypatch):
    lines = iter(["one\\", "two", "", "three\\", None])
    monkeypatch.setattr(cli, "read_line", lambda prompt: next(lines))
    assert list(cli.turns()) == ["one\ntwo", "", "three"]


# The demo


@pytest.mark.slow
def test_the_demo_teaches_saves_and_loads(tmp_path, backend):
    target = tmp_path / "taught"
    result = call("demo", "--save-to", target)
    assert result.returncode == 0, result.stderr
    assert f"on {backend}, {PRESET}" in result.stdout
    answers = [
        line.split("Gemma: ")[1]
        for line in result.stdout.splitlines()
        if line.startswith("  Gemma: ")
    ]
    before, after, asked_otherwise, kept, again = answers
    marlo = "The capital of Veloria is Marlo."
    assert before != marlo
    assert after == asked_otherwise == again == marlo
    assert kept == "The capital of Spain is Madrid."
    assert "tokens/s" in result.stderr
    told = json.loads(invoke("info", target, "--json").stdout)
    assert told["format"] == "KerasHub preset"
    # What presets/demo/README.md says of the model that comes out.
    questions = json.loads((registry.locate() / "demo" / "questions.json").read_text())
    asked = questions["held_out"] + questions["kept"]
    chats = [[{"role": "user", "content": each["prompt"]}] for each in asked]
    lm = gemma_keras.GemmaCausalLM.from_preset(target)
    answers = lm.generate(chats, max_new_tokens=40, strip_prompt=True)
    assert answers == [each["response"] for each in asked]


# Terminals


# Not as preexec_fn: that forks this process, which JAX and TensorFlow warn of.
IN_TERMINAL = """
import fcntl, os, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


class Terminal:
    """A command that runs in a terminal, as far as it can tell."""

    def __init__(self, *arguments):
        self.output = b""
        self.parent, child = pty.openpty()
        self.settings = termios.tcgetattr(self.parent)
        self.process = subprocess.Popen(
            [sys.executable, "-c", IN_TERMINAL, *PROGRAM, *map(str, arguments)],
            stdin=child,
            stdout=child,
            stderr=child,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "80"},
        )
        os.close(child)

    def read_until(self, found, seconds=120):
        """Reads until `found(output)`, or the command has ended."""
        deadline = time.monotonic() + seconds
        while not found(self.output):
            assert time.monotonic() < deadline, self.output
            if select.select([self.parent], [], [], 0.2)[0]:
                try:
                    self.output += os.read(self.parent, 65536)
                except OSError:  # Linux says so when the other side is closed
                    break
            elif self.process.poll() is not None:
                break

    def type(self, text):
        os.write(self.parent, text.encode())

    def end(self):
        """Waits for the end; returns the exit status and all output."""
        self.read_until(lambda output: False)
        status = self.process.wait(timeout=60)
        clean = termios.tcgetattr(self.parent) == self.settings
        os.close(self.parent)
        assert clean, "the terminal was left in another mode"
        return status, self.output.decode(errors="replace")


def shown_cursor(output):
    """Whether the last word about the cursor, if any, is to show it."""
    return output.rfind("\x1b[?25h") >= output.rfind("\x1b[?25l")


@pytest.mark.parametrize(
    "moment",
    [
        "answering",
        *(
            pytest.param(moment, marks=pytest.mark.any_backend)
            for moment in ("loading", "loading twice", "waiting")
        ),
    ],
)
def test_ctrl_c_leaves_a_clean_terminal(random_preset, moment):
    command = ["generate", random_preset, "a", "--max-new-tokens", "6000"]
    if moment == "waiting":
        command = ["chat", random_preset]
    terminal = Terminal(*command)
    if moment.startswith("loading"):
        terminal.read_until(lambda output: b"Loading" in output)
    elif moment == "answering":
        terminal.read_until(lambda output: len(output.partition(b" s\r\n")[2]) > 20)
    else:
        terminal.read_until(lambda output: b">>> " in output)
        time.sleep(0.5)  # a signal between prompt and reading is lost in CPython
    terminal.type("\x03")
    if moment == "loading twice":  # the second may find the first at work
        terminal.type("\x03")
    status, output = terminal.end()
    assert status == 130
    assert "Traceback" not in output
    assert shown_cursor(output)
    assert output.endswith("\n")


def test_chat_in_a_terminal():
    terminal = Terminal("chat", PRESET)
    terminal.read_until(lambda output: b">>> " in output)
    terminal.type("Hello!\r")
    terminal.read_until(lambda output: output.count(b">>> ") == 2)
    terminal.type("/exit\r")
    status, output = terminal.end()
    assert status == 0
    assert "/reset forgets the chat" in output
    reply = output.split("Hello!\r\n")[1].split("\r\n")[0]
    assert reply.strip()
    assert shown_cursor(output)


@pytest.mark.any_backend
def test_a_terminal_and_no_prompt_is_a_wrong_command_line():
    status, output = Terminal("generate", PRESET).end()
    assert status == 2
    assert "pipe one to stdin" in output


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
def test_interrupt_without_a_terminal_exits_with_130(random_preset):
    process = subprocess.Popen(
        [*PROGRAM, "generate", str(random_preset), "a", "--max-new-tokens", "6000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
    )
    process.stdout.read(8)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in errors


@pytest.mark.any_backend
@pytest.mark.parametrize("moment", ["a collection", "a destructor"])
def test_ctrl_c_is_not_lost_where_no_exception_can_be_raised(moment):
    """As in the callbacks that JAX gives to the garbage collector."""
    program = f"""
import gc, os, signal, sys, time
sys.argv = ["gemma-keras", "presets"]
from gemma_keras import cli

def interrupt(*_):
    if interrupt in gc.callbacks:
        gc.callbacks.remove(interrupt)
    os.kill(os.getpid(), signal.SIGINT)

class Last:
    __del__ = interrupt

def presets():
    if {moment == "a collection"}:
        gc.callbacks.append(interrupt)
        gc.collect()
    else:
        Last()
    time.sleep(60)

cli.registry.presets = presets
cli.main()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
