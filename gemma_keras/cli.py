"""The command `gemma-keras`.

Answers go to stdout, everything else to stderr. Keras and its backend are imported when
a command needs them, no sooner: `--help` is quick, and `--backend` comes in time.

Exit status: 0 the work is done; 1 it failed, and stderr says why in one message; 2 the
command line is wrong; 130 interrupted with Ctrl-C.
"""

import contextlib
import dataclasses
import importlib
import json
import pathlib
import signal
import sys
from typing import Annotated

import typer

import gemma_keras
from gemma_keras import (
    checkpoints,
    cli_convert,
    cli_data,
    cli_eval,
    cli_push,
    cli_sft,
    registry,
)
from gemma_keras.cli_base import (
    BackendOption,
    Json,
    Model,
    Source,
    app,
    command,
    interrupt,
    interrupted,
    leave,
    option,
    start_keras_on,
    take_unraisable,
)
from gemma_keras.console import say, size, table

app.add_typer(cli_data.data_app, name="data")


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


@dataclasses.dataclass
class Guesses:
    """The options that have tokens guessed, and several checked at a time."""

    prompt_lookup: Annotated[
        bool,
        option(
            "Guess that text repeats itself: the same answer, sooner where it does.",
            "--prompt-lookup",
        ),
    ] = False
    draft: Annotated[
        str | None,
        option(
            "Smaller Gemma with the same vocabulary that guesses, as SOURCE: the same "
            "answer, sooner where it agrees.",
        ),
    ] = None
    draft_tokens: Annotated[
        int | None,
        option("Guess this many at a time; 7, or 4 by a --draft, by default.", min=1),
    ] = None

    def check(self):
        """Ends with a wrong command line if the options do not go together."""
        if self.prompt_lookup and self.draft is not None:
            raise typer.BadParameter("--prompt-lookup or --draft, not both.")
        if self.draft_tokens and not (self.prompt_lookup or self.draft):
            raise typer.BadParameter("--draft-tokens needs --prompt-lookup or --draft.")

    def load(self, model):
        """What `generate` takes as `speculation`; loads the draft beside `model`."""
        from gemma_keras import DraftModel, PromptLookup

        count = {"num_tokens": self.draft_tokens} if self.draft_tokens else {}
        if self.prompt_lookup:
            return PromptLookup(**count)
        if self.draft is None:
            return None
        draft = dataclasses.replace(model, source=self.draft, adapter=None)
        return DraftModel(draft.load(), **count)


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
    "cat prompt.txt | gemma-keras generate ./my_model --temperature 0.7 --seed 1\n"
    "gemma-keras generate gemma3_instruct_1b --chat --draft gemma3_instruct_270m "
    "Hello"
)
def generate(
    model: Model,
    sampling: Sampling,
    guesses: Guesses,
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
    guesses.check()
    if prompt in (None, "-"):
        if sys.stdin.isatty():
            raise typer.BadParameter("give a PROMPT, or pipe one to stdin.")
        prompt = sys.stdin.read().removesuffix("\n")
    if chat or system is not None:
        turns = [] if system is None else [{"role": "system", "content": system}]
        prompt = [*turns, {"role": "user", "content": prompt}]
    start_keras_on(model.backend)
    arguments = sampling.arguments()
    lm = model.load()
    write(lm.stream(prompt, speculation=guesses.load(model), **arguments))


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
    guesses: Guesses,
    system: Annotated[str | None, option("Instruction for the whole chat.")] = None,
):
    """Talk with an instruction-tuned Gemma; it remembers the turns before.

    A line is a turn; a backslash at its end continues it in the next line. /reset
    forgets the chat, /exit or Ctrl-D ends it. Turns may also be piped to stdin.
    """
    guesses.check()
    start_keras_on(model.backend)
    arguments = sampling.arguments()
    lm = model.load()
    arguments["speculation"] = guesses.load(model)
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
    preset = registry.known_as(source)
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


command(cli_sft.EXAMPLE)(cli_sft.sft)
command(cli_eval.EXAMPLE)(cli_eval.eval)
command(cli_convert.EXAMPLE)(cli_convert.convert)
command(cli_push.EXAMPLE)(cli_push.push)


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
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            sys.stdout.flush()
            leave()
