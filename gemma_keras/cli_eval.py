"""`gemma-keras eval`: the perplexity of a model on data."""

import contextlib
import json
import pathlib
from typing import Annotated

import typer

from gemma_keras.chat import LOSS_ON
from gemma_keras.cli_base import (
    ColumnOption,
    Json,
    Model,
    columns_of,
    option,
    start_keras_on,
)
from gemma_keras.console import bars, say, table
from gemma_keras.encoding import TEMPLATES
from gemma_keras.examples import FORMATS, Example
from gemma_keras.readers import read_examples

EXAMPLE = (
    "gemma-keras eval gemma_tiny_en book.txt\n"
    "gemma-keras eval gemma_tiny_instruct_en lessons.jsonl --json\n"
    "gemma-keras eval gemma_2b_en test.jsonl --window 4096 --stride 1024"
)


def eval(
    model: Model,
    file: Annotated[
        pathlib.Path,
        typer.Argument(
            metavar="FILE",
            help="A .txt file, read as one text; or examples, as for sft.",
        ),
    ],
    format: Annotated[
        str, option("What the rows are.", metavar=f"<auto|{'|'.join(FORMATS)}>")
    ] = "auto",
    column: ColumnOption = None,
    template: Annotated[
        str,
        option(
            "Write pairs as turns of a chat or as plain text; auto goes by the model.",
            metavar="<auto|chat|text>",
        ),
    ] = "auto",
    loss_on: Annotated[
        str,
        option(
            "What of pairs and chats is scored; response by default.",
            metavar=f"<{'|'.join(LOSS_ON)}>",
        ),
    ] = "response",
    window: Annotated[
        int | None,
        option("Tokens read at once; at most 2,048 by default.", min=2),
    ] = None,
    stride: Annotated[
        int | None,
        option(
            "Tokens by which windows of a long text move on; half of one by default.",
            min=1,
        ),
    ] = None,
    batch_size: Annotated[int, option("Windows at a time; 8 by default.", min=1)] = 8,
    skip_bad: Annotated[
        bool, option("Leave bad rows out and count them.", "--skip-bad")
    ] = False,
    as_json: Json = False,
):
    """Measure how well a model predicts a text, or the answers of examples.

    Prints the perplexity, each token counting the same, and bits per byte of a text.
    """
    for name, value, allowed in (
        ("--format", format, ("auto", *FORMATS)),
        ("--template", template, TEMPLATES),
        ("--loss-on", loss_on, LOSS_ON),
    ):
        if value not in allowed:
            raise typer.BadParameter(f"{name} must be one of {', '.join(allowed)}.")
    reading = {"columns": columns_of(column), "skip_bad": skip_bad}
    start_keras_on(model.backend)
    from gemma_keras import evaluation
    from gemma_keras.loading import load_preprocessor, open_source
    from gemma_keras.sft import examples as data

    with open_source(model.source) as checkpoint:
        preprocessor = load_preprocessor(checkpoint)
    if preprocessor is None:
        raise ValueError(f"{model.source} holds no tokenizer.")

    def encoder_of(**settings):
        return data.make_encoder(
            preprocessor, model.source, template, loss_on=loss_on, **settings
        )

    samples, texts = read_samples(file, encoder_of, format, **reading)
    lm = model.load()
    scorer = evaluation.Scorer(lm, window=window, stride=stride, batch_size=batch_size)
    with display_of_windows() as progress:
        found = evaluation.perplexity(scorer, samples, texts, progress)
    facts = {"source": model.source, "adapter": model.adapter}
    facts |= {"file": str(file), **found.as_dict()}
    facts |= {"window": scorer.window, "stride": scorer.stride}
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    table(["", ""], rows(facts), header=False)


def read_samples(file, encoder_of, format, **settings):
    """What is scored of a file: encoded samples, and their texts if they are texts."""
    if format in ("auto", "text") and file.suffix == ".txt":
        texts = [file.read_text("utf-8")]
        examples = [Example("text", text=texts[0])]
    else:
        examples = read_examples(file, format, **settings)
        say(examples.description)
        for fault in examples.faults:
            say(f"  skipped: {fault}")
        whole = all(example.text is not None for example in examples)
        texts = [example.text for example in examples] if whole else None
    encoder = encoder_of(add_end_token=texts is None)
    return [encoder(example) for example in examples], texts


@contextlib.contextmanager
def display_of_windows():
    """Shows how far the scoring is; yields a function of windows done and in all."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("Reading"), BarColumn(), MofNCompleteColumn())
    with bars(*columns, TimeRemainingColumn()) as display:
        task = display.add_task("", total=None)
        yield lambda done, total: display.update(task, completed=done, total=total)


def rows(facts):
    """Rows of a table for people."""
    shown = {
        "perplexity": f"{facts['perplexity']:.4f}",
        "loss": f"{facts['loss']:.5f} nats a token",
        "bits per byte": None,
        "accuracy": f"{facts['accuracy']:.2%} of the tokens were the likeliest",
        "tokens": f"{facts['tokens']:,} scored, in {facts['examples']:,} examples",
        "windows": f"{facts['windows']:,} of at most {facts['window']:,} tokens, "
        f"{facts['stride']:,} apart",
    }
    if facts["bits_per_byte"] is not None:
        shown["bits per byte"] = f"{facts['bits_per_byte']:.4f}"
    return [(name, value) for name, value in shown.items() if value is not None]
