"""`gemma-keras convert`: a checkpoint in one format becomes one in another.

No model is made and no backend started: tensors go from file to file. Only to calibrate
weights of few bits, a model is made, which reads.
"""

import dataclasses
import enum
import functools
import pathlib
import re
from typing import Annotated

import typer

from gemma_keras import checkpoints, registry
from gemma_keras.cli_base import AdapterOption, Source, option, start_keras_on
from gemma_keras.console import say, writing
from gemma_keras.quantization import CALIBRATED, MODES

Format = enum.StrEnum("Format", {name: name for name in checkpoints.WRITERS})

EXAMPLE = """\
gemma-keras convert gemma_tiny_en ./tiny-hf --to hf
gemma-keras convert ./model.gguf ./model-hf --to hf --dtype bfloat16
gemma-keras convert ./my_model ./my_model.gguf --to gguf --dtype q8_0
gemma-keras convert gemma_2b_en ./tuned-hf --to hf --adapter ./my_run/adapter
gemma-keras convert ./gemma-2b.ckpt ./gemma-2b.nemo --to nemo
gemma-keras convert ./gemma-2b ./gemma-2b-maxtext --to maxtext --layout unscanned
gemma-keras convert gemma_2b_en ./2b-int4 --to keras --quantize int4 --calibration a.txt
gemma-keras convert hf://google/gemma-2b ./gemma-2b --to keras --force"""

_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}


def read_size(text):
    """Bytes that `text` says: a number, and then B, kB, MB, GB or TB."""
    match = re.fullmatch(r"([0-9]*\.?[0-9]+) *([kmgt]?)b?", text.strip().lower())
    if match is None or not float(match[1]):
        raise typer.BadParameter(f"{text!r} is no size such as 5GB or 500MB.")
    return float(match[1]) * _UNITS[match[2]]


def convert(
    source: Source,
    destination: Annotated[
        pathlib.Path,
        typer.Argument(
            metavar="DEST",
            help="Directory to write; or a file .gguf, .ckpt (torch) or .nemo.",
        ),
    ],
    to: Annotated[Format, option("Format to write.", "--to")],
    dtype: Annotated[
        str | None,
        option(
            "How to store the weights: float32, bfloat16, float16, or for gguf also "
            "q8_0, q5_1, q5_0, q4_1, q4_0, for torch int8; as they are stored by "
            "default."
        ),
    ] = None,
    max_shard_size: Annotated[
        str, option("Largest file, for formats in several; 5GB by default.")
    ] = "5GB",
    layout: Annotated[
        str | None,
        option(
            "For flax, flat (the default) or nested keys; for maxtext, scanned (the "
            "default) or unscanned layers."
        ),
    ] = None,
    licence: Annotated[
        str | None,
        option(
            "What the weights are under, such as gemma or apache-2.0; what their "
            "source says by default, and gemma if it says nothing."
        ),
    ] = None,
    quantize: Annotated[
        str | None,
        option("Keep weights in few bits: int8 or int4, for keras only."),
    ] = None,
    calibration: Annotated[
        pathlib.Path | None,
        option(
            "For int4, a file that the model reads so that its outputs keep (GPTQ), as "
            "for sft; a .txt file is one text. The whole model is held.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    adapter: AdapterOption = None,
    force: Annotated[bool, option("Replace an earlier export.", "--force")] = False,
):
    """Write a model in another format, for other programs.

    Weights are moved one at a time, so that memory holds no model, unless one is
    calibrated; an adapter is merged into them on the way. A model card, the notice that
    Google's terms ask for, and a provenance.json go along.
    """
    limit = read_size(max_shard_size)
    if quantize is not None and (to.value != "keras" or quantize not in MODES):
        raise typer.BadParameter(
            f"--quantize is {' or '.join(MODES)} and goes with --to keras; gguf has "
            "--dtype q8_0, q4_0 and others."
        )
    if calibration is not None and quantize != "int4":
        raise typer.BadParameter("--calibration goes with --quantize int4.")
    from gemma_keras.checkpoints import exporting, merging, peft

    decoded = dtype if dtype in ("float32", "float16", "bfloat16") else None
    path, told = registry.resolve(source), []
    with (
        checkpoints.open_checkpoint(path, dtype=decoded) as checkpoint,
        writing(destination) as progress,
    ):
        contents = exporting.checkpoint_contents(checkpoint, source, progress, quantize)
        if adapter is not None:
            where = registry.resolve_adapter(adapter)
            found = peft.read(
                where,
                checkpoint.config,
                lambda: checkpoint.tensor("token_embedding/embeddings"),
            )
            contents = merging.merge(contents, found)
        if calibration is not None:
            contents = calibrated(contents, path, decoded, adapter, calibration)
        written = exporting.export(
            contents,
            destination,
            to.value,
            dtype=dtype,
            max_shard_size=limit,
            layout=layout,
            overwrite=force,
            licence=licence,
            report=told.append,
        )
        steps = exporting.next_steps(checkpoint.config, written, to.value, layout)
    for sentence in told:
        say(sentence)
    if steps:
        say(f"\n{steps}\n")
    place = "beside them" if written.is_dir() else "in the file"
    say(f"What was done to the weights, and what they are under, is told {place}.")
    print(written)


def calibrated(contents, path, dtype, adapter, file):
    """The `Contents`, with codes that are made when the first of them is asked for.

    By then the writer has checked everything else.
    """
    start_keras_on(None)

    @functools.cache
    def codes():
        from gemma_keras import GemmaCausalLM
        from gemma_keras.loading import codes_reader

        lm = GemmaCausalLM.from_preset(path, dtype=dtype or "auto")
        if adapter is not None:
            lm.load_adapter(adapter)
            lm.merge_adapter(discard=True)
        tell = lambda *done: say("Calibrated {} of {} blocks".format(*done))  # noqa: E731
        lm.quantize("int4", calibration=file, progress=tell)
        return codes_reader(lm.backbone)

    return dataclasses.replace(
        contents,
        codes=lambda path: codes()(path),
        provenance=contents.provenance.adding(CALIBRATED),
    )
