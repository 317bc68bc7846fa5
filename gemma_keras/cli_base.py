"""What the commands of `gemma-keras` share: how one is declared, and how it ends."""

import dataclasses
import enum
import functools
import inspect
import os
import signal
import sys
import threading
import time
from typing import Annotated

import typer

import gemma_keras
from gemma_keras.backend_choice import Backend, choose_backend
from gemma_keras.console import SHOW_CURSOR, loading, message, say
from gemma_keras.examples import read_columns
from gemma_keras.quantization import MODES

# Exit status of a process that Ctrl-C ended, as shells have it.
INTERRUPTED = 130

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


class KVCacheDtype(enum.StrEnum):
    """How keys and values of what was read are held."""

    AUTO = "auto"
    INT8 = "int8"


Bits = enum.StrEnum("Bits", {mode.upper(): mode for mode in MODES})

Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="Preset name (see `gemma-keras presets`), directory, file (.gguf, .ckpt, "
        ".nemo ...), kaggle://... or hf://... handle.",
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


AdapterOption = Annotated[
    str | None,
    option(
        "Adapter, as PEFT or `gemma-keras sft` writes it: its directory, or a handle."
    ),
]


KVCacheOption = Annotated[
    KVCacheDtype,
    option(
        "How to hold keys and values of long texts and chats: int8 takes a half of "
        "bfloat16's memory, a quarter of float32's; as computed by default.",
        "--kv-cache-dtype",
    ),
]


ColumnOption = Annotated[
    list[str] | None,
    option("ROLE=COLUMN where the names do not tell; may be given several times."),
]


def columns_of(assignments):
    """What `--column` says, as `read_examples` takes it; a wrong command line else."""
    try:
        return read_columns(assignments)
    except ValueError as error:
        raise typer.BadParameter(f"--{error}") from None


@dataclasses.dataclass
class Model:
    """The options that say which model runs, and how."""

    source: Source
    backend: BackendOption = None
    dtype: Annotated[
        Dtype, option("How to hold the weights; as they are stored by default.")
    ] = Dtype.AUTO
    quantize: Annotated[
        Bits | None,
        option("Keep the weights in 8 or 4 bits; as they are held by default."),
    ] = None
    adapter: AdapterOption = None

    def load(self):
        """The `GemmaCausalLM`, with progress on stderr."""
        with loading(self.source) as progress:
            lm = gemma_keras.GemmaCausalLM.from_preset(
                self.source,
                dtype=self.dtype.value,
                quantize=self.quantize and self.quantize.value,
                progress=progress,
            )
        if self.adapter is not None:
            lm.load_adapter(self.adapter)
            # A sum with an update has no codes of few bits.
            if not lm.backbone.packings:
                lm.merge_adapter(discard=True)
        return lm


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


def command(example, group=app):
    """Makes a function a command of `app`, or of a group of commands.

    A parameter whose type is a dataclass stands for one option a field. What the
    function raises becomes one message and exit status 1.

    Args:
        example: command lines for the end of the help text.
        group: the `Typer` that it belongs to.
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
                raise typer.Exit(INTERRUPTED) from None
            except Exception as error:
                if debug:
                    raise
                say(message(error))
                raise typer.Exit(1) from None

        run.__signature__ = inspect.Signature(parameters)
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        lines = "\n".join(f"  {line}" for line in example.splitlines())
        group.command(epilog=f"\b\nExample:\n{lines}")(run)
        return function

    return register


def start_keras_on(backend):
    """Settles the backend, and what it says at its start, before Keras is imported."""
    choose_backend(backend)
    # TensorFlow's own notes at start are not for the reader of an answer.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


interrupted = threading.Event()
lost = threading.Event()


def interrupt(*_):
    """What Ctrl-C does.

    An exception alone is not enough: raised inside a callback of native code, it is
    lost, and the answer would go on. A second Ctrl-C does not wait for what the first
    one ended: raised inside of that, it could leave a lock that is never freed.
    """
    if interrupted.is_set() and not lost.is_set():
        leave()
    interrupted.set()
    lost.clear()
    raise KeyboardInterrupt


def leave():
    """Ends the process as interrupted, at once, with the terminal's cursor shown.

    Threads of the backend may still be computing, and would crash while the interpreter
    takes itself down around them.
    """
    if sys.stderr.isatty():
        # Past Python's own buffers, which a signal may have found in the middle of a
        # write; and so that a thread which draws a display does not have the last word.
        terminal = os.dup(sys.stderr.fileno())
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
        os.write(terminal, f"{SHOW_CURSOR}\n".encode())
    os._exit(INTERRUPTED)


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
