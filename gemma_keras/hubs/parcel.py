"""What is to be pushed: which files of a directory, and the papers that go along."""

import fnmatch
import re
from pathlib import Path
from typing import NamedTuple

from gemma_keras.checkpoints import (
    CheckpointError,
    exporting,
    gguf_writer,
    hugging_face_writer,
    keras_preset_writer,
    open_checkpoint,
    peft,
    provenance,
)
from gemma_keras.checkpoints.checkpoint import some
from gemma_keras.checkpoints.provenance import CARD, GEMMA, NOTICE, PROVENANCE


class PushError(ValueError):
    """Something that is not pushed; the message says what to do."""


class Kind(NamedTuple):
    """One kind of what can be pushed.

    Attributes:
        name: For people.
        frameworks: What Kaggle calls those who can use it, the most fitting first.
        files: Patterns of the names of its files.
        use: What a reader does to run it, for a model card.
    """

    name: str
    frameworks: tuple[str, ...]
    files: tuple[str, ...]
    use: str = ""


class Parcel(NamedTuple):
    """What is pushed.

    Attributes:
        kind: The `Kind`.
        files: Name on the hub to a path, or to the contents themselves.
        licence: As Hugging Face writes it.
        left_out: Names of files that lie beside it and are no part of it.
        single: Whether it is one file, which is at home beside others of its kind.
    """

    kind: Kind
    files: dict[str, Path | bytes]
    licence: str
    left_out: tuple[str, ...] = ()
    single: bool = False

    @property
    def card(self) -> str:
        """The text of the model card."""
        card = self.files[CARD]
        data = card if isinstance(card, bytes) else card.read_bytes()
        return data.decode("utf-8", errors="replace")

    def naming(self, handle, repository=None) -> "Parcel":
        """The same, with a card that says where it lies instead of PATH.

        Args:
            handle: For this package and KerasHub.
            repository: For transformers and PEFT, if they find it there.
        """
        text = self.card
        for call in ("from_preset", "load_adapter"):
            text = text.replace(f'{call}("PATH")', f'{call}("{handle}")')
        if repository is not None:
            text = text.replace('"PATH"', f'"{repository}"')
        return self._replace(files={**self.files, CARD: text.encode()})


_TOKENIZER = (
    "tokenizer.model tokenizer.json tokenizer_config.json special_tokens_map.json "
    "added_tokens.json chat_template.jinja chat_template.json"
).split()
# By what their readers call themselves.
KINDS = {
    keras_preset_writer.FORMAT: Kind(
        "a KerasHub preset",
        ("keras",),
        (
            *("config.json", "metadata.json", "task.json", "tokenizer.json"),
            *("preprocessor.json", "assets/*", "model.weights.h5"),
            *("model.weights.json", "model_*.weights.h5"),
        ),
        keras_preset_writer.USE,
    ),
    hugging_face_writer.FORMAT: Kind(
        "a Hugging Face directory",
        ("transformers", "pyTorch"),
        (
            *("config.json", "generation_config.json", "model.safetensors"),
            *("model-*-of-*.safetensors", "model.safetensors.index.json"),
            *_TOKENIZER,
        ),
        hugging_face_writer.USE,
    ),
    gguf_writer.FORMAT: Kind("a GGUF file", ("gguf",), ("*.gguf",), gguf_writer.USE),
}
ADAPTER = Kind(
    "a PEFT adapter",
    ("transformers", "pyTorch"),
    (peft.CONFIG, peft.WEIGHTS, *_TOKENIZER),
)
_PAPERS = (CARD, PROVENANCE, "[Nn][Oo][Tt][Ii][Cc][Ee]*", "LICEN[CS]E*", "USE_POLICY*")
# What `staging` calls what is not complete.
_UNFINISHED = re.compile(r"\..*\.[0-9a-f]{8}\.(partial|old)")
_LICENCE_LINE = re.compile(r"^license: *['\"]?([a-z0-9][a-z0-9.+-]*)", re.MULTILINE)


def pack(source, licence=None) -> Parcel:
    """Looks what lies at `source`, and whether it is complete.

    Args:
        source: A directory or a GGUF file.
        licence: What it is under, if nothing there says so.

    Raises:
        PushError: it is nothing that can be pushed.
    """
    source = Path(source).expanduser()
    if not source.exists():
        raise PushError(
            f"{source}: there is no such file or directory; a push takes what lies on "
            "this machine."
        )
    if any(_UNFINISHED.fullmatch(part) for part in source.absolute().parts):
        raise PushError(
            f"{source}: was left by an export that did not end. Export again."
        )
    listed = provenance.read_listing(source) if source.is_dir() else ()
    absent = {name for name in listed if not (source / name).is_file()}
    if absent:
        raise PushError(
            f"{source}: is not complete: {PROVENANCE} lists {some(absent)}, which is "
            "missing. Export again."
        )
    try:
        if source.is_dir() and (source / peft.CONFIG).exists():
            return _pack_adapter(source, licence)
        with open_checkpoint(source) as checkpoint:
            return _pack_checkpoint(source, checkpoint, licence)
    except CheckpointError as error:
        hint = ""
        if (source / "adapter" / peft.CONFIG).is_file():
            hint = f" There is an adapter in {source / 'adapter'}."
        raise PushError(f"{error}{hint}") from error


def _pack_adapter(source, licence):
    peft.check(source)
    files, left_out = _files(source, ADAPTER.files)
    if CARD not in files:
        raise PushError(
            f"{source}: has no model card ({CARD}), so that nobody would know which "
            "model it belongs to. save_adapter writes one; or write it yourself."
        )
    licence = _licence(source, licence, provenance.read_own(source))
    return _parcel(ADAPTER, files, licence, left_out)


def _pack_checkpoint(source, checkpoint, licence):
    kind = KINDS.get(checkpoint.format)
    if kind is None:
        known = ", ".join(known.name for known in (*KINDS.values(), ADAPTER))
        raise PushError(
            f"{source}: holds a checkpoint for {checkpoint.format}; what is pushed is "
            f"{known}. Convert it first."
        )
    single = source.is_file()
    if single and source.suffix != gguf_writer.SUFFIX:
        raise PushError(f"{source}: is one file of a checkpoint; push its directory.")
    files, left_out = {source.name: source}, ()
    if not single:
        files, left_out = _files(source, kind.files)
    lacking = {path.name for path in checkpoint.files()} - files.keys()
    if lacking:
        raise PushError(
            f"{source}: {some(lacking)} is no name that weights have there."
        )
    contents = exporting.checkpoint_contents(checkpoint, source)
    told = contents.provenance.earlier[:1]
    licence = _licence(source, licence, told[0] if told else None)
    if CARD not in files:
        files[CARD] = _card(source.stem, contents, kind, licence).encode()
    return _parcel(kind, files, licence, left_out, single)


def _parcel(kind, files, licence, left_out, single=False):
    told = any(name.lower().startswith("notice") for name in files)
    if licence == GEMMA and not told:
        files[NOTICE] = provenance.NOTICE_TEXT.encode()
    return Parcel(kind, files, licence, left_out, single)


def _files(directory, patterns):
    """(name to path of what goes along, names of the rest) of a directory."""
    listed = provenance.read_listing(directory)
    inside, files, rest = directory.resolve(), {}, []
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if not path.is_file() or any(part[0] == "." for part in name.split("/")):
            continue
        belongs = name in listed or any(
            fnmatch.fnmatchcase(name, pattern) for pattern in (*patterns, *_PAPERS)
        )
        if not belongs:
            rest.append(name)
        elif path.resolve().is_relative_to(inside):
            files[name] = path
        else:
            raise PushError(
                f"{path}: is a link to a file elsewhere, and is not followed. Push a "
                "directory that holds the files themselves."
            )
    return files, tuple(rest)


def _licence(source, given, earlier):
    """What the files are under, by the best of what tells it."""
    told, card = (earlier or {}).get("licence"), source / CARD
    if told is None and card.is_file():
        match = _LICENCE_LINE.search(card.read_text("utf-8", errors="replace"))
        told = match and match[1]
    if None not in (told, given) and told != given:
        raise PushError(
            f"{source}: is under {told}, as the files there say, not under {given}."
        )
    # Refuses what is no identifier.
    return provenance.Provenance(licence=given or told or GEMMA).licence


def _card(title, contents, kind, licence):
    """A model card for what came without one."""
    found = contents.provenance
    if not found.earlier:
        found = found.adding("What was done to the weights before is not known.")
    facts = found.describe(found.format, contents.dtype, [])
    for step in found.earlier:
        if isinstance(step.get("modified"), list):
            facts["modified"] += [str(sentence) for sentence in step["modified"]]
    facts |= {"licence": licence, "written": None}
    use = kind.use.replace(gguf_writer.FILE, contents.provenance.files[0].path.name)
    return provenance.model_card(title, contents, facts, use)
