"""`gemma-keras data`: looks at training data before a model is trained on it.

Only the tokenizer of a model is loaded, and no tensor library.
"""

import enum
import itertools
import sys
from typing import Annotated

import typer

from gemma_keras import checkpoints, registry
from gemma_keras.chat import LOSS_ON
from gemma_keras.cli_base import ColumnOption, columns_of, command, option
from gemma_keras.console import say, table
from gemma_keras.encoding import TEMPLATES, encoder_for
from gemma_keras.examples import FORMATS

data_app = typer.Typer(
    help="Look at training data.", no_args_is_help=True, rich_markup_mode=None
)

Format = enum.StrEnum("Format", {name.upper(): name for name in ("auto", *FORMATS)})
Template = enum.StrEnum("Template", {name.upper(): name for name in TEMPLATES})
LossOn = enum.StrEnum("LossOn", {name.upper(): name for name in LOSS_ON})

DEFAULT_LENGTH = 1024
# What is learned, where there is no colour: as `git diff --word-diff` marks it.
MARKS = ("{+", "+}")


@command(
    "gemma-keras data preview train.jsonl --preset gemma_tiny_instruct_en\n"
    "gemma-keras data preview qa.csv more.csv --preset gemma_2b_en "
    "--column prompt=ask --column response=reply",
    group=data_app,
)
def preview(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE...",
            help="Training data: .jsonl, .json, .csv, .tsv, .txt (also .gz), .parquet.",
        ),
    ],
    preset: Annotated[
        str, option("Model whose tokenizer is used: preset's name, directory, ...")
    ],
    format: Annotated[
        Format, option("How the rows are laid out; told by the columns by default.")
    ] = Format.AUTO,
    column: ColumnOption = None,
    sequence_length: Annotated[
        int | None, option("Longest example in tokens; the model's, or 1024.", min=1)
    ] = None,
    loss_on: Annotated[
        LossOn,
        option("Learn every response (default), the last of a chat, or all tokens."),
    ] = LossOn.RESPONSE,
    template: Annotated[
        Template,
        option(
            "Write pairs as turns of a chat or as plain text; auto goes by the model."
        ),
    ] = Template.AUTO,
    examples: Annotated[int, option("Show so many; 3 by default.", min=0)] = 3,
    packing: Annotated[
        bool, option("Count packed rows (default), or not.", "--packing/--no-packing")
    ] = True,
    skip_bad: Annotated[
        bool, option("Leave bad rows out, and do not fail on them.", "--skip-bad")
    ] = False,
):
    """Show what is learned of training data, count tokens, warn of what is wrong.

    What is learned is coloured, or stands in {+ +} where there are no colours. The
    exit status is 1 if a run would stop at bad rows.
    """
    # Here, since numpy costs every start of every command.
    from gemma_keras.data_report import DataReport
    from gemma_keras.readers import read_examples

    # The whole files are looked at, also where a run would stop.
    reading = {"columns": columns_of(column), "skip_bad": True}
    found = [read_examples(file, format.value, **reading) for file in files]
    print("\n".join(each.description for each in found))
    tokenizer, settings = read_tokenizer(preset)
    encoder = encoder_for(
        preset,
        tokenizer,
        template.value,
        add_start_token=settings.get("add_start_token", True),
        add_end_token=settings.get("add_end_token", True),
        loss_on=loss_on.value,
    )
    length = sequence_length or settings.get("sequence_length") or DEFAULT_LENGTH
    report = DataReport(found, encoder, length)
    show_examples(report, examples)
    if len(report.encoded):
        table(["", ""], report.facts(packing), header=False)
        print("Lengths in tokens, and how many examples have them:")
        print("\n".join(report.histogram()))
    show_warnings(report, skip_bad)


def read_tokenizer(source):
    """`(tokenizer, settings)` of a model: its preprocessor's, as far as they are kept.

    Raises:
        ValueError: there is no such model, or it has no tokenizer.
    """
    with checkpoints.open_checkpoint(registry.resolve(source)) as checkpoint:
        tokenizer = checkpoint.tokenizer()
        if tokenizer is None:
            raise ValueError(f"{source} holds no tokenizer.")
        return tokenizer, checkpoint.preprocessor_config()


def show_examples(report, count):
    """Prints the first examples, with what is learned of them coloured or marked."""
    from rich.console import Console
    from rich.text import Text

    from gemma_keras.data_report import runs

    console = Console(soft_wrap=True, highlight=False)
    coloured = console.is_terminal and not console.no_color
    tokenizer, encoded = report.encoder.tokenizer, report.encoded
    for i in range(min(count, len(encoded))):
        ids, learn = encoded[i]
        source = encoded.sources[i]
        whole = report.encoder(report.examples[source])
        place = report.place(source)
        cut = f", cut from {len(whole.ids)}" if any(whole.learn[len(ids) :]) else ""
        # The first is never predicted, whatever the mask says.
        learn = [False, *learn[1:]]
        text = Text()
        for part, on in runs(tokenizer, ids, learn):
            opening, closing = MARKS if on and not coloured else ("", "")
            text.append(opening + part + closing, "bold green" if on else "dim")
        print(f"\n--- {place}: {len(ids)} tokens{cut}, {sum(learn)} learned")
        console.print(text)


def show_warnings(report, skip_bad):
    """Prints what is wrong; ends with status 1 if a run would stop at it."""
    skipped = sum(each.num_skipped for each in report.sources)
    for line in report.warnings:
        print(f"Warning: {line}")
    if skipped:
        print(f"Warning: bad rows: {skipped:,}, the first of them:")
        faults = itertools.chain(*(each.faults for each in report.sources))
        print("\n".join(f"  {fault}" for fault in faults))
    if not len(report.encoded):
        raise ValueError("No example has anything to learn.")
    if skipped and not skip_bad:
        sys.stdout.flush()
        say("Training would stop at the bad rows; --skip-bad leaves them out.")
        raise typer.Exit(1)
    if not report.warnings and not skipped:
        print("No warnings.")
