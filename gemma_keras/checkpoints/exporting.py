"""Writing a Gemma in any of the formats: checks first, then beside, then renamed.

A writer is a module with

- `FORMAT`, the format's name for people, and `DTYPES`, what it can store weights as;
- `SUFFIX`, which the name of a single file ends in, or None if it only makes
  directories, and `MAGIC`, what such a file begins with;
- `check(contents)`, which raises `CheckpointError` if the format cannot hold the model,
  and `check_file(contents)`, if a single file is another matter;
- `stored_bytes(contents, dtype)`, what it will take on the disk;
- `write(path, contents, settings)`, which writes to the empty directory or new file
  `path` and returns a sentence for everything that is not as it was in the source;
- `USE`, Markdown for the model card: what a reader does to run it; or a function
  `use(config, layout, path="PATH")` that returns it, where that depends on the model.
  What such a function tells, `next_steps` tells too;
- `LAYOUTS`, if there are several ways of laying out the arrays, the usual one first.
"""

import dataclasses
import importlib
import os
from pathlib import Path

from gemma_keras.checkpoints import WRITERS, provenance, staging
from gemma_keras.checkpoints.checkpoint import CheckpointError, some
from gemma_keras.checkpoints.contents import Contents
from gemma_keras.quantization import Quantization

FORMATS = tuple(WRITERS)


def checkpoint_contents(checkpoint, source, progress=None, quantize=None):
    """The `Contents` of an open checkpoint.

    Args:
        checkpoint: The open `Checkpoint`, which stays open until all is written.
        source: What the user called it.
        progress: As in `Contents`.
        quantize: A `Quantization`, or what makes one, for formats that can keep it.
    """
    packings, codes = checkpoint.packings, None
    if packings:
        codes = checkpoint.packed
    elif quantize is not None:
        packings = Quantization.get(quantize).packings(checkpoint.config)
    return Contents(
        config=checkpoint.config,
        tensors=checkpoint.tensor,
        dtype=checkpoint.dtype,
        tokenizer=checkpoint.tokenizer(),
        preprocessor_config=checkpoint.preprocessor_config(),
        provenance=provenance.Provenance.of(checkpoint, source),
        packings=packings,
        codes=codes,
        progress=progress,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How to write.

    Attributes:
        dtype: How weights are stored, one of the writer's `DTYPES`.
        max_shard_size: Most bytes of a file, for formats in several; None for one file.
        layout: One of the writer's `LAYOUTS`; None for a format that has none.
        title: The name of what is written.
        facts: What provenance.json says, for formats that keep it inside their file.
    """

    dtype: str
    max_shard_size: float | None
    layout: str | None
    title: str
    facts: dict


def export(
    contents,
    destination,
    format,
    *,
    dtype=None,
    max_shard_size=5e9,
    layout=None,
    overwrite=False,
    licence=None,
    report=None,
):
    """Writes a model, with the papers that belong to it.

    Args:
        contents: The `Contents`.
        destination: A directory; or a file, where the format is one file and the name
            ends as its names do. It appears when it is complete.
        format: One of `FORMATS`.
        dtype: How to store the weights; None for as they are, or for the only way
            that the format has.
        max_shard_size: Most bytes of a file, for formats in several files; None for
            one file.
        layout: How to lay out the arrays, for formats with several ways: `"flat"` or
            `"nested"` for Flax, `"scanned"` or `"unscanned"` for MaxText; None for
            the first.
        overwrite: Whether to replace an earlier export. A directory with files that
            no export wrote is never touched.
        licence: What the weights are under, as Hugging Face writes it (`"gemma"`,
            `"apache-2.0"`); None for what their source says.
        report: Called with a sentence for everything that the format keeps otherwise
            than the source has it.

    Returns:
        The path of what was written.

    Raises:
        CheckpointError: the place is taken, the disk too small, the format cannot hold
            the model, or a tensor is wrong. Then nothing is written.
    """
    writer = _writer(format)
    if dtype is None:
        only = writer.DTYPES[0] if len(writer.DTYPES) == 1 else None
        dtype = only or contents.dtype
    if dtype not in writer.DTYPES:
        raise CheckpointError(
            f"{writer.FORMAT} stores weights as {', '.join(writer.DTYPES)}; got "
            f"{dtype!r}."
        )
    if max_shard_size is not None and not max_shard_size > 0:
        raise CheckpointError(
            f"max_shard_size must be a positive number, got {max_shard_size!r}."
        )
    layout = _layout(writer, layout)
    destination = Path(destination).expanduser().resolve()
    single = writer.SUFFIX is not None and destination.name.endswith(writer.SUFFIX)
    contents = _telling(contents, writer, dtype, licence)
    _check_tokenizer(contents)
    check = getattr(writer, "check_file", writer.check) if single else writer.check
    check(contents)
    _check_place(destination, writer, single, overwrite)
    staging.check_space(destination, writer.stored_bytes(contents, dtype))
    files = contents.provenance.files
    with provenance.hashing(files) as hashes, staging.replacing(destination) as partial:
        facts = contents.provenance.describe(writer.FORMAT, dtype, [])
        settings = Settings(
            dtype=dtype,
            max_shard_size=max_shard_size,
            layout=layout,
            title=destination.name,
            facts=facts,
        )
        if single:
            facts["source"]["files"] = hashes()
            told = writer.write(partial, contents, settings)
        else:
            partial.mkdir()
            told = _write_directory(partial, writer, contents, settings, hashes)
    for sentence in told if report else ():
        report(sentence)
    return destination


def _write_directory(partial, writer, contents, settings, hashes):
    facts = settings.facts
    told = writer.write(partial, contents, settings)
    facts["modified"] += told
    facts["source"]["files"] = hashes()
    use = _use(writer, contents.config, settings.layout)
    card = provenance.model_card(settings.title, contents, facts, use)
    provenance.write_papers(partial, facts, card)
    return told


def _use(writer, config, layout):
    return writer.use(config, layout) if hasattr(writer, "use") else writer.USE


def next_steps(config, path, format, layout=None) -> str:
    """Commands that go on with an export, as Markdown; empty where there are none.

    Args:
        config: The `GemmaConfig` of what was exported.
        path: Where to.
        format: One of `FORMATS`.
        layout: As it was given to `export`.
    """
    writer = _writer(format)
    if not hasattr(writer, "use"):
        return ""
    return writer.use(config, _layout(writer, layout), path)


def _layout(writer, layout):
    """The layout to write, or an error that lists those there are."""
    known = getattr(writer, "LAYOUTS", ())
    if layout is None:
        return next(iter(known), None)
    if layout not in known:
        raise CheckpointError(
            f"{writer.FORMAT} has the layouts {', '.join(known)}; got {layout!r}."
            if known
            else f"{writer.FORMAT} has one layout only; got {layout!r}."
        )
    return layout


def _writer(format):
    if format not in WRITERS:
        raise CheckpointError(
            f"The format must be one of {', '.join(WRITERS)}, got {format!r}."
        )
    return importlib.import_module(f"gemma_keras.checkpoints.{WRITERS[format]}")


def _check_tokenizer(contents):
    tokenizer = contents.tokenizer
    if tokenizer is not None and tokenizer.vocab_size > contents.config.vocab_size:
        raise CheckpointError(
            f"The tokenizer has {tokenizer.vocab_size} pieces, but the model knows "
            f"only {contents.config.vocab_size}."
        )


def _check_place(destination, writer, single, overwrite):
    if not os.path.lexists(destination):
        return
    again = "pass --force (in Python overwrite=True) to replace it."
    if single:
        _check_file(destination, writer)
    elif not destination.is_dir():
        raise CheckpointError(f"{destination}: is a file; name a directory.")
    else:
        present = {
            path.relative_to(destination).as_posix()
            for path in destination.rglob("*")
            if not path.is_dir()
        }
        if not present:
            return
        listed = provenance.read_listing(destination)
        if present - listed:
            raise CheckpointError(
                f"{destination}: holds files that no export wrote "
                f"({some(present - listed)}) and is left alone; name another "
                "directory, or remove it yourself."
            )
    if not overwrite:
        raise CheckpointError(f"{destination}: exists already; {again}")


def _check_file(destination, writer):
    if destination.is_file():
        with destination.open("rb") as file:
            if file.read(len(writer.MAGIC)) == writer.MAGIC:
                return
    raise CheckpointError(
        f"{destination}: is there already, and no {writer.FORMAT} file; name another."
    )


def _telling(contents, writer, dtype, licence):
    """The contents, with what is about to be done to them in their provenance."""
    found = contents.provenance
    origin = f"converted from {found.format} to" if found.format else "written as"
    sentences = [f"The weights were {origin} {writer.FORMAT}."]
    if contents.packings:
        sentences.append(_about_bits(contents, writer))
    if dtype != contents.dtype:
        sentences.append(f"They were cast from {contents.dtype} to {dtype}.")
    found = dataclasses.replace(
        found.adding(*sentences), licence=licence or found.licence
    )
    return dataclasses.replace(contents, provenance=found)


def _about_bits(contents, writer):
    bits = sorted({packing.bits for packing in contents.packings.values()})
    bits = " and ".join(map(str, bits))
    if writer.FORMAT != "KerasHub preset":
        return f"They were restored from codes of {bits} bits."
    if contents.codes is not None:
        return f"They are kept as codes of {bits} bits."
    return f"They were rounded to {bits} bits."
