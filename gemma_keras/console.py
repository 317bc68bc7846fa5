"""What a person sees on stderr: messages, and work as it goes on."""

import contextlib
import sys
import time

SHOW_CURSOR = "\x1b[?25h"
EXPECTED = (ImportError, LookupError, OSError, ValueError)


def say(text):
    """Prints a line to stderr."""
    print(text, file=sys.stderr, flush=True)


def message(error):
    """One message for a person about an exception."""
    text = str(error).strip()
    if isinstance(error, KeyError) and error.args:
        text = str(error.args[0])
    if isinstance(error, MemoryError):
        text = f"there is not enough memory. {text}".strip()
    elif not isinstance(error, EXPECTED) or not text:
        text = f"{type(error).__name__}: {text}. --debug shows where."
    return f"gemma-keras: {text}"


def size(count):
    """Bytes for people: `size(5_012_000_000)` is `"5.01 GB"`."""
    units = iter(("B", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while count >= 1000 and unit != "TB":
        count, unit = count / 1000, next(units)
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"


def bars(*columns):
    """A `rich` progress display on stderr, which shows nothing if that is a file."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    return Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    )


def loading(source):
    """Shows the bytes and the time of loading; one line remains when it is done.

    Yields:
        A function of the bytes that are loaded and of all bytes, for `from_preset`.
    """
    return _moving("Loading", "Loaded", source)


def writing(destination):
    """The same of writing, for `export`."""
    return _moving("Writing", "Wrote", destination)


def pushing(source):
    """The same of pushing, for `hubs.push`."""
    return _moving("Pushing", "Pushed", source)


@contextlib.contextmanager
def _moving(doing, done, name):
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        TextColumn,
        TimeElapsedColumn,
        TransferSpeedColumn,
    )

    started = time.monotonic()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
    )
    moved = 0
    with bars(*columns) as display:
        task = display.add_task(f"{doing} {name}", total=None)

        def show(count, total):
            nonlocal moved
            moved = count
            display.update(task, completed=count, total=total)

        yield show
    seconds = time.monotonic() - started
    say(f"{done} {name}: {size(moved)} in {seconds:.1f} s")


def table(columns, rows, header=True):
    """Prints a table to stdout, as wide as the terminal, or as it needs in a file."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 200)
    shown = Table(box=box.SIMPLE_HEAD if header else None, show_header=header)
    for number, column in enumerate(columns):
        numbers = header and all(row[number][:1].isdigit() for row in rows)
        shown.add_column(
            column, justify="right" if numbers else "left", overflow="fold"
        )
    for row in rows:
        shown.add_row(*row)
    console.print(shown, markup=False, highlight=False)
