"""Writes docs/cli.md from the help texts of `gemma-keras`.

python tools/make_cli_docs.py            writes the page
python tools/make_cli_docs.py --check    exits with 1 if it is not what is there
"""

import pathlib
import sys

import typer.testing

from gemma_keras import cli

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


def main() -> int:
    """Writes the page, or checks it."""
    if sys.argv[1:] == ["--check"]:
        if PAGE.is_file() and PAGE.read_text() == page():
            print(f"{PAGE.name} is up to date.")
            return 0
        print(f"{PAGE.name} is not: run python tools/make_cli_docs.py")
        return 1
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
