"""Writes docs/cli.md from the help texts, and the options in docs/sft.md.

python tools/make_cli_docs.py            writes the pages
python tools/make_cli_docs.py --check    exits with 1 if they are not what is there
"""

import dataclasses
import itertools
import pathlib
import sys

import typer.testing

from gemma_keras import cli
from gemma_keras.sft import config

SFT = pathlib.Path(__file__).resolve().parent.parent / "docs" / "sft.md"
BEGIN, END = "<!-- options -->\n", "<!-- end of options -->\n"
PAGE = pathlib.Path(__file__).resolve().parent.parent / "docs" / "cli.md"
INTRODUCTION = """\
# The command `gemma-keras`

Answers go to stdout, everything else to stderr. The exit status is 0 if the work is
done, 1 if it failed (one message on stderr says why; `--debug` shows the traceback
instead), 2 if the command line is wrong, and 130 after Ctrl-C.

This page is made by `python tools/make_cli_docs.py` from the help texts.
"""


def help_text(*words: str) -> str:
    """What `gemma-keras WORDS --help` prints, 80 columns wide."""
    result = typer.testing.CliRunner().invoke(
        cli.app, [*words, "--help"], prog_name="gemma-keras", terminal_width=80
    )
    if result.exit_code:
        raise RuntimeError(f"gemma-keras {' '.join(words)} --help: {result.output}")
    return "\n".join(line.rstrip() for line in result.output.strip().splitlines())


def commands() -> list[tuple[str, ...]]:
    """The words of each command, those of groups behind the others."""
    groups = [
        ((group.name,), group.typer_instance) for group in cli.app.registered_groups
    ]
    return [
        (*words, command.callback.__name__)
        for words, typer_app in [((), cli.app), *groups]
        for command in typer_app.registered_commands
    ]


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION, f"```text\n{help_text()}\n```\n"]
    for words in commands():
        text = help_text(*words)
        parts.append(f"## `gemma-keras {' '.join(words)}`\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


def options() -> str:
    """Tables of the fields of `RunConfig`."""
    fields = dataclasses.fields(config.RunConfig)
    parts = []
    for group, each in itertools.groupby(fields, lambda f: f.metadata["group"]):
        rows = [
            "| option | default | allowed | what it is |",
            "| --- | --- | --- | --- |",
        ]
        rows += [f"| {' | '.join(cells(field))} |" for field in each]
        parts.append(f"**{group}**\n\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def cells(field) -> tuple[str, ...]:
    """What the table says of one field."""
    wanted, many, _ = config.kind(field)
    default = field.default
    if default in (None, dataclasses.MISSING):
        default = ""
    default = str(default).lower() if isinstance(default, bool) else str(default)
    names = {str: "text", int: "whole number", float: "number", bool: "true or false"}
    allowed = config.allowed_range(field)
    if not field.metadata["choices"]:
        allowed = f"{names[wanted]} {allowed}".strip() + ", or several" * many
    return (
        f"`{field.name}`",
        default and f"`{default}`",
        allowed,
        field.metadata["help"],
    )


def sft_page() -> str:
    """docs/sft.md with the options as they are."""
    before, _, rest = SFT.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{options()}\n{END}{after}"


def main() -> int:
    """Writes the pages, or checks them."""
    pages = {PAGE: page(), SFT: sft_page()}
    if sys.argv[1:] == ["--check"]:
        old = [p.name for p, text in pages.items() if p.read_text() != text]
        print(
            f"{', '.join(old)}: run python tools/make_cli_docs.py" if old else "Fine."
        )
        return len(old) > 0
    for path, text in pages.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
