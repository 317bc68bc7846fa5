"""The command `gemma-keras`.

Answers go to stdout, everything else to stderr. Keras and its backend are imported when
a command needs them, no sooner: `--help` is quick, and `--backend` comes in time.

Exit status: 0 the work is done; 1 it failed, and stderr says why in one message; 2 the
command line is wrong; 130 interrupted with Ctrl-C.
"""

import contextlib
import dataclasses
import enum
import functools
import importlib
import inspect
import json
import os
import pathlib
import signal
import sys
import threading
import time
from typing import Annotated

import typer

import gemma_keras
from gemma_keras import checkpoints, registry
from gemma_keras.backend_choice import Backend, choose_backend
from gemma_keras.console import loading, message, say, size, table

app = typer.Typer(
    help="Run Gemma on JAX, PyTorch or TensorFlow.",
    epilog="Exit status: 0 done, 1 failed, 2 wrong command line, 130 interrupted.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class Dtype(enum.StrEnum):
    """How the weights are held."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="Preset name (see `gemma-keras presets`), directory, .gguf file, "
        "kaggle://... or hf://... handle.",
    ),
]
Debug = Annotated[
    bool, typer.Option("--debug", help="Show the traceback of what goes wrong.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def option(help, *names, **settings):
    """A Typer option that is told apart by its help text."""
    return typer.Option(*names, help=help, show_default=False, **settings)


BackendOption = Annotated[
    Backend | None,
    option(
        "Backend of Keras; KERAS_BACKEND, keras.json or what is installed by default.",
        "--backend",
    ),
]


@dataclasses.dataclass
class Model:
    """The options that say which model runs, and how."""

    source: Source
    backend: BackendOption = None
    dtype: Annotated[
        Dtype, option("How to hold the weights; as they are stored by default.")
    ] = Dtype.AUTO

    def load(self):
        """The `GemmaCausalLM`, with progress on stderr."""
        with loading(self.source) as progress:
            return gemma_keras.GemmaCausalLM.from_preset(
                self.source, dtype=self.dtype.value, progress=progress
            )


@dataclasses.dataclass
class Sampling:
    """The options that say how text is chosen."""

    max_new_tokens: Annotated[
        int, option("Stop after this many tokens; 256 by default.", min=1)
    ] = 256
    temperature: Annotated[
        float | None,
        option("Logits are divided by it; 0, the default, is greedy.", min=0.0),
    ] = None
    top_k: Annotated[int | None, option("Sample among the K likeliest.", min=1)] = None
    top_p: Annotated[
        float | None,
        option("Sample among the fewest with this probability.", min=0.0, max=1.0),
    ] = None
    min_p: Annotated[
        float | None,
        option("Sample among those this likely, the best being 1.", min=0.0, max=1.0),
    ] = None
    repetition_penalty: Annotated[
        float | None, option("Above 1: repeat less.", min=0.0)
    ] = None
    seed: Annotated[
        int | None, option("Make the choice repeatable.", min=0, max=2**31 - 1)
    ] = None
    stop: Annotated[
        list[str] | None,
        option("Stop before this text; may be given several times."),
    ] = None

    def arguments(self):
        """The same as keyword arguments of `generate` and `stream`."""
        from gemma_keras import samplers

        filters = {"top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}
        filters = {name: value for name, value in filters.items() if value is not None}
        temperature = self.temperature
        if temperature is None:
            temperature = 1.0 if filters else 0.0
        try:
            sampler = samplers.Sampler(
                temperature=temperature,
                repetition_penalty=self.repetition_penalty,
                **filters,
            )
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
        return {
            "max_new_tokens": self.max_new_tokens,
            "stop": self.stop or None,
            "sampler": sampler,
            "seed": self.seed,
        }


def read_signature(function):
    """The parameters of a command, and those of them that stand for several.

    Returns:
        A list of parameters, in which a dataclass is replaced by its fields, and a dict
        from the name of a replaced parameter to the dataclass.
    """
    groups, parameters = {}, []
    for parameter in inspect.signature(function).parameters.values():
        if dataclasses.is_dataclass(parameter.annotation):
            groups[parameter.name] = parameter.annotation
            parameters += inspect.signature(parameter.annotation).parameters.values()
        else:
            parameters.append(parameter)
    # By keyword only: then one without a default may follow one with it.
    kind = inspect.Parameter.KEYWORD_ONLY
    debug = inspect.Parameter("debug", kind, default=False, annotation=Debug)
    return [*(each.replace(kind=kind) for each in parameters), debug], groups


def command(example):
    """Makes a function a command of `app`.

    A parameter whose type is a dataclass stands for one option a field. What the
    function raises becomes one message and exit status 1.

    Args:
        example: command lines for the end of the help text.
    """

    def register(function):
        parameters, groups = read_signature(function)

        @functools.wraps(function)
        def run(debug, **options):
            for name, group in groups.items():
                fields = [field.name for field in dataclasses.fields(group)]
                options[name] = group(**{field: options.pop(field) for field in fields})
            try:
                function(**options)
            # What Typer ends by itself: quietly if the reader of a pipe has gone.
            except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
                raise
            except KeyboardInterrupt:
                say("")
                raise typer.Exit(130) from None
            except Exception as error:
                if debug:
                    raise
                say(message(error))
                raise typer.Exit(1) from None

        run.__signature__ = inspect.Signature(parameters)
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        lines = "\n".join(f"  {line}" for line in example.splitlines())
        app.command(epilog=f"\b\nExample:\n{lines}")(run)
        return function

    return register


def start_keras_on(backend):
    """Settles the backend, and what it says at its start, before Keras is imported."""
    choose_backend(backend)
    # TensorFlow's own notes at start are not for the reader of an answer.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def show_version(wanted: bool):
    """Prints the version and ends, if that was asked for."""
    if wanted:
        print(f"gemma-keras {gemma_keras.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        option("Print the version.", "--version", callback=show_version, is_eager=True),
    ] = False,
):
    """Run Gemma on JAX, PyTorch or TensorFlow."""


@command(
    "gemma-keras generate gemma_tiny_en 'Once upon a time' --max-new-tokens 40\n"
    "gemma-keras generate gemma_tiny_instruct_en 'What is the capital of France?' "
    "--chat\n"
    "cat prompt.txt | gemma-keras generate ./my_model --temperature 0.7 --seed 1"
)
def generate(
    model: Model,
    sampling: Sampling,
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", help="Text; stdin if absent or -."),
    ] = None,
    chat: Annotated[
        bool, option("Take the text as a user's turn of a chat.", "--chat")
    ] = False,
    system: Annotated[
        str | None, option("Instruction before the user's turn; implies --chat.")
    ] = None,
):
    """Print what comes after a text, as it is made."""
    if prompt in (None, "-"):
        if sys.stdin.isatty():
            raise typer.BadParameter("give a PROMPT, or pipe one to stdin.")
        prompt = sys.stdin.read().removesuffix("\n")
    if chat or system is not None:
        turns = [] if system is None else [{"role": "system", "content": system}]
        prompt = [*turns, {"role": "user", "content": prompt}]
    start_keras_on(model.backend)
    arguments = sampling.arguments()
    write(model.load().stream(prompt, **arguments))


def write(pieces):
    """Prints an answer to stdout, piece by piece, and a line break after it."""
    last = ""
    for piece in pieces:
        if interrupted.is_set():
            raise KeyboardInterrupt
        print(piece, end="", flush=True)
        last = piece or last
    if not last.endswith("\n"):
        print(flush=True)


@command(
    "gemma-keras chat gemma_tiny_instruct_en\n"
    "printf 'Hello!\\nWho are you?\\n' | gemma-keras chat gemma_tiny_instruct_en"
)
def chat(
    model: Model,
    sampling: Sampling,
    system: Annotated[str | None, option("Instruction for the whole chat.")] = None,
):
    """Talk with an instruction-tuned Gemma; it remembers the turns before.

    A line is a turn; a backslash at its end continues it in the next line. /reset
    forgets the chat, /exit or Ctrl-D ends it. Turns may also be piped to stdin.
    """
    start_keras_on(model.backend)
    arguments = sampling.arguments()
    lm = model.load()
    if sys.stdin.isatty():
        say("/reset forgets the chat, /exit ends it, a \\ at its end continues a line.")
    session = lm.start_chat(system=system)
    for turn in turns():
        if turn == "/exit":
            break
        if turn == "/reset":
            session = lm.start_chat(system=system)
            say("The chat starts anew.")
        elif turn:
            write(session.stream(turn, **arguments))


def turns():
    """What the user says, turn by turn, from a terminal or a pipe."""
    lines = []
    while (line := read_line("... " if lines else ">>> ")) is not None:
        lines.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            yield "\n".join(lines).strip()
            lines = []
    if lines:
        yield "\n".join(lines).strip()


def read_line(prompt):
    """A line of stdin without its end, or None after the last."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        # Gives `input` editing and a history, where Python has it.
        with contextlib.suppress(ImportError):
            importlib.import_module("readline")
        with contextlib.suppress(EOFError):
            return input(prompt)
        say("")
        return None
    if sys.stdin.isatty():
        print(prompt, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    return line.removesuffix("\n") if line else None


@command("gemma-keras info gemma_2b_en\ngemma-keras info ./my_model --json")
def info(source: Source, as_json: Json = False):
    """Tell what a model is, without loading its weights."""
    facts = describe(source)
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    table(["", ""], flatten(facts), header=False)


def describe(source):
    """What is known of a model, as JSON has it; fetches only what is no preset."""
    known = {name: p for p in registry.presets().values() for name in p.sources}
    known |= registry.presets()
    known |= {alias: p for p in registry.presets().values() for alias in p.aliases}
    preset = known.get(source)
    facts = {"name": source}
    if preset is not None:
        facts = {"name": preset.name, "description": preset.description}
        facts |= {"variant": preset.variant, "licence": preset.licence}
        facts |= {"licence_url": preset.licence_url, "sources": list(preset.sources)}
    if preset is None or preset.available:
        with checkpoints.open_checkpoint(registry.resolve(source)) as checkpoint:
            config, tokenizer = checkpoint.config, checkpoint.tokenizer()
            facts["path"] = str(checkpoint.path)
            facts |= {"format": checkpoint.format, "dtype": checkpoint.dtype}
            facts["tokenizer"] = tokenizer and f"{tokenizer.vocab_size:,} pieces"
    else:
        config = preset.config
    facts |= {"family": config.family, "parameters": config.num_parameters}
    facts["memory_bytes"] = {
        dtype: registry.memory_needed(config, dtype) for dtype in registry.DTYPE_BYTES
    }
    facts["config"] = dataclasses.asdict(config)
    return facts


def flatten(facts):
    """Rows of a table for people from `describe`."""
    rows = []
    for key, value in facts.items():
        name = key.replace("_", " ")
        if key == "memory_bytes":
            value = ", ".join(
                f"{size(count)} in {dtype}" for dtype, count in value.items()
            )
            name = "memory"
        elif isinstance(value, dict):
            rows += [(inner, str(each)) for inner, each in value.items()]
            continue
        elif isinstance(value, list):
            value = "\n".join(value) or "inside the package"
        elif isinstance(value, int):
            value = f"{value:,}"
        rows.append((name, str(value)))
    return rows


@command("gemma-keras presets\ngemma-keras presets --json")
def presets(as_json: Json = False):
    """List the models that can be named, with the memory that each needs."""
    if as_json:
        names = list(registry.presets())
        print(json.dumps([describe(name) for name in names], indent=2))
        return
    dtypes = ("float32", "bfloat16", "int8")
    rows = []
    for preset in registry.presets().values():
        memory = [size(registry.memory_needed(preset.config, d)) for d in dtypes]
        hubs = {"kaggle": "Kaggle", "hf": "Hugging Face"}
        origin = [hubs[source.partition(":")[0]] for source in preset.sources]
        parameters = f"{preset.config.num_parameters / 1e6:,.0f} M"
        where = ", ".join(dict.fromkeys(origin)) or "the package"
        rows.append((preset.name, preset.variant, parameters, *memory, where))
    table(["Name", "Kind", "Parameters", *dtypes, "From"], rows)
    say("Memory is that of the weights. `gemma-keras info NAME` tells more. Google's")
    say("models are under the Gemma Terms of Use: https://ai.google.dev/gemma/terms")


@command("gemma-keras demo\ngemma-keras demo --backend torch --save-to ./my_model")
def demo(
    backend: BackendOption = None,
    save_to: Annotated[
        pathlib.Path | None,
        option("Keep the fine-tuned model in this directory."),
    ] = None,
):
    """Ask a tiny Gemma, teach it with LoRA, ask it again: no network needed."""
    if save_to and save_to.exists():
        raise typer.BadParameter(f"--save-to: {save_to} exists; name a new directory.")
    start_keras_on(backend)
    from gemma_keras import demo as show

    if not show.run(save_to):
        raise typer.Exit(1)


interrupted = threading.Event()
lost = threading.Event()


def interrupt(*_):
    """What Ctrl-C does.

    An exception alone is not enough: raised inside a callback of native code, it is
    lost, and the answer would go on.
    """
    interrupted.set()
    lost.clear()
    raise KeyboardInterrupt


def interrupt_again():
    """Sends Ctrl-C to the main thread until it takes note, however deep it sleeps."""
    time.sleep(0.02)
    while lost.is_set():
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.02)


def take_unraisable(unraisable):
    """What becomes of an exception where none can be raised, as in such a callback.

    Python would print it and go on.
    """
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        lost.set()
        threading.Thread(target=interrupt_again, daemon=True).start()
    else:
        sys.__unraisablehook__(unraisable)


def main():
    """Runs the command line of this process."""
    # Not where the parent process asked for interrupts to be ignored, as nohup does.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
        sys.unraisablehook = take_unraisable
    # What a terminal cannot show is shown as `?`; it must not end the answer.
    sys.stdout.reconfigure(errors="replace")
    try:
        app(prog_name="gemma-keras")
    finally:
        if interrupted.is_set():
            # At once: threads of the backend may still be computing, and would crash
            # while the interpreter takes itself down around them.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(130)
