"""`gemma-keras push`: what lies on this machine goes to Hugging Face or Kaggle."""

import contextlib
import pathlib
from typing import Annotated

import typer

from gemma_keras.cli_base import option
from gemma_keras.console import pushing, say

EXAMPLE = """\
gemma-keras push ./my_gemma hf://me/my-gemma
gemma-keras push ./my_run/adapter hf://me/my-adapter --public
gemma-keras push ./my_gemma kaggle://me/my-gemma/keras/my_gemma_2b"""


def push(
    source: Annotated[
        pathlib.Path,
        typer.Argument(
            metavar="SOURCE",
            help="A KerasHub preset, a Hugging Face directory, a GGUF file, or the "
            "directory of an adapter.",
        ),
    ],
    handle: Annotated[
        str,
        typer.Argument(
            metavar="HANDLE",
            help="hf://organisation/name or kaggle://owner/model/framework/variation.",
        ),
    ],
    private: Annotated[
        bool,
        option(
            "Who may see it; only you by default, or your organisation.",
            "--private/--public",
        ),
    ] = True,
    licence: Annotated[
        str | None,
        option("What it is under, if nothing beside it says so; gemma by default."),
    ] = None,
    force: Annotated[
        bool,
        option("Replace weights on Hugging Face that no push put there.", "--force"),
    ] = False,
):
    """Upload a model or an adapter to Hugging Face or Kaggle.

    Its model card goes along. After an interruption, the same command goes on with what
    has not arrived. What was pushed there before is replaced, and kept in the history.
    """
    from gemma_keras import hubs

    # Hugging Face's library has a display of its own.
    shown = handle.startswith("kaggle://")
    with pushing(source) if shown else contextlib.nullcontext() as progress:
        page = hubs.push(
            source,
            handle,
            private=private,
            licence=licence,
            overwrite=force,
            progress=progress,
            tell=say,
        )
    print(page)
