"""`gemma-keras sft`: a run of fine-tuning, whose options are those of `RunConfig`."""

import dataclasses
import pathlib
from typing import Annotated

import typer

from gemma_keras.cli_base import option, start_keras_on
from gemma_keras.console import size, table
from gemma_keras.sft import config as settings

EXAMPLE = (
    "gemma-keras sft run.yaml\n"
    "gemma-keras sft --preset gemma_tiny_instruct_en --train lessons.jsonl "
    "--epochs 12 --learning-rate 5e-3 --out my_run\n"
    "gemma-keras sft run.yaml --seed 2 --out second_run\n"
    "gemma-keras sft --plan --preset gemma_2b_en --quantize int4 --memory 12"
)


def flags():
    """A dataclass of one option for each field of `RunConfig`, None where not given."""
    fields = []
    for field in dataclasses.fields(settings.RunConfig):
        wanted, many, _ = settings.kind(field)
        name = f"--{field.name.replace('_', '-')}"
        limits = field.metadata
        more = {"rich_help_panel": limits["group"]}
        names = [name]
        if wanted is bool:
            names = [f"{name}/--no-{name[2:]}"]
        elif limits["choices"]:
            more["metavar"] = f"<{'|'.join(limits['choices'])}>"
        annotation = list[wanted] if many else wanted
        told = option(_help(field), *names, **more)
        fields.append((field.name, Annotated[annotation | None, told], None))
    return dataclasses.make_dataclass("Flags", fields)


def _help(field):
    default, told = field.default, field.metadata["help"]
    if default in (None, False, dataclasses.MISSING):
        return told
    return f"{told} {'On' if default is True else default} by default."


Flags = flags()


def sft(
    flags: Flags,
    config: Annotated[
        pathlib.Path | None,
        typer.Argument(
            metavar="CONFIG",
            help="YAML file of these options, spelt with underscores.",
        ),
    ] = None,
    plan: Annotated[
        bool,
        option(
            "Only say what memory the run takes, and what would fit; needs no data.",
            "--plan",
        ),
    ] = False,
    memory: Annotated[
        float | None,
        option(
            "With --plan: GB that there are; the accelerator's, or what the machine "
            "has left, if not given.",
            min=0.1,
        ),
    ] = None,
):
    """Fine-tune a model on your data; the same command goes on with an unfinished run.

    Flags count for more than the file. Ctrl-C saves after the step and stops.
    """
    if memory is not None and not plan:
        raise typer.BadParameter("--memory says what there is for --plan.")
    given = {
        field.name: value
        for field in dataclasses.fields(flags)
        if (value := getattr(flags, field.name)) not in (None, [])
    }
    # Memory does not depend on these.
    defaults = {"train": ["-"], "out": "-"} if plan else {}
    try:
        wanted = settings.RunConfig.read(config, given, defaults)
    except settings.ConfigError as error:
        raise typer.BadParameter(str(error)) from None
    start_keras_on(wanted.backend)
    if plan:
        _tell_plan(wanted, memory and memory * 1e9)
        return
    from gemma_keras.sft import runs

    stopped = runs.run(wanted)
    if stopped is not None:
        raise typer.Exit(128 + stopped)
    print(runs.result_of(wanted))


def _tell_plan(config, memory):
    from gemma_keras.sft.planning import plan

    found, memory, proposals = plan(config, memory)
    rows = [[name, size(count)] for name, count in found.parts.items()]
    rows += [["at the peak of a step", size(sum(found.parts.values()))]]
    rows += [["while loading", size(found.loading)], ["there are", size(memory)]]
    table(["", "memory"], rows)
    fits = found.total <= memory
    print("It fits." if fits else "It does not fit.")
    if proposals:
        print("So would:" if fits else "What would:")
    for changes, other in proposals:
        options = " ".join(
            f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
            for name, value in changes.items()
        )
        print(f"  {options}  ({size(other.total)})")
    if not fits and not proposals:
        print("Nor would fewer rows, fewer bits or shorter rows: take a smaller model.")
