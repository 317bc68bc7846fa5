"""Where weights come from, what was done to them, and the papers that say so.

Google's terms ask of whoever passes on a Gemma that modified files say that they were
modified, and that a `Notice` goes along. Every export brings a provenance.json, a
model card (README.md) and, under those terms, the notice.
"""

import concurrent.futures
import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import re
from pathlib import Path

import gemma_keras
from gemma_keras import registry
from gemma_keras.checkpoints.checkpoint import (
    MAX_JSON_BYTES,
    Checkpoint,
    CheckpointError,
    parse_json,
)

PROVENANCE, CARD, NOTICE = "provenance.json", "README.md", "Notice"
GEMMA = "gemma"
NOTICE_TEXT = (
    "Gemma is provided under and subject to the Gemma Terms of Use found at "
    "ai.google.dev/gemma/terms\n"
)
_TERMS = """\
{notice}
Whoever passes these files on has to pass on that notice, which lies in `Notice`, and
the [terms](https://ai.google.dev/gemma/terms), and to bind others to the
[Prohibited Use Policy](https://ai.google.dev/gemma/prohibited_use_policy). The files
were modified as said above.
"""
_FAMILIES = {"gemma": "Gemma 1", "gemma2": "Gemma 2", "gemma3": "Gemma 3"}
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
# What an export tells of itself that those after it pass on.
_STEP = ("tool", "date", "source", "written", "modified", "licence")
# Bytes of all that is passed on: a .ckpt file has it in a pickle, which is bounded.
_MOST_EARLIER = 2**18
_LEFT_OUT = "What was done before that is left out: it would have been too long."
# Files that are told one by one; Orbax directories have hundreds.
_MOST_FILES = 64


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """A file that weights were read from, as it was then."""

    path: Path
    size: int
    modified: int

    @classmethod
    def at(cls, path):
        """The file as it is now."""
        status = path.stat()
        return cls(path, status.st_size, status.st_mtime_ns)

    def describe(self) -> dict:
        """Name, bytes and sha256; without the last if the file has changed since."""
        facts = {"name": self.path.name, "bytes": self.size}
        try:
            if SourceFile.at(self.path) == self:
                with self.path.open("rb") as file:
                    facts["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            pass
        return facts


@contextlib.contextmanager
def hashing(files):
    """Hashes `SourceFile`s beside other work.

    Yields:
        A function that waits for it and gives what `describe` of each file gave, or
        of many files one dict for all.
    """
    pool = concurrent.futures.ThreadPoolExecutor(1)
    jobs = [pool.submit(file.describe) for file in files]
    try:
        yield lambda: _together(files, [job.result() for job in jobs])
    finally:
        pool.shutdown(cancel_futures=True)


def _together(files, told):
    """What is told of files: of many, one digest of what `sha256sum` would print."""
    if len(files) <= _MOST_FILES:
        return told
    folder = Path(os.path.commonpath([file.path.parent for file in files]))
    facts = {"name": folder.name, "count": len(files)}
    facts["bytes"] = sum(file.size for file in files)
    if all("sha256" in each for each in told):
        sums = {
            os.fsencode(file.path.relative_to(folder).as_posix()): each["sha256"]
            for file, each in zip(files, told, strict=True)
        }
        lines = [sums[name].encode() + b"  " + name + b"\n" for name in sorted(sums)]
        facts["sha256"] = hashlib.sha256(b"".join(lines)).hexdigest()
    return [facts]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Provenance:
    """The origin of a model and its way here.

    Attributes:
        source: A hub's handle, a preset's name, or the last part of a path: what may
            be told to others. None for a model that was made in memory.
        format: What the source was.
        licence: `"gemma"`, or another identifier as Hugging Face writes them.
        base_model: The model's name on Hugging Face, if it is known.
        files: The files that were read.
        modified: What was done to the weights, a sentence each.
        earlier: What the exports before told, the latest first.
    """

    source: str | None = None
    format: str | None = None
    licence: str = GEMMA
    base_model: str | None = None
    files: tuple[SourceFile, ...] = ()
    modified: tuple[str, ...] = ()
    earlier: tuple[dict, ...] = ()

    def __post_init__(self):
        if not isinstance(self.licence, str) or not _LICENCE.fullmatch(self.licence):
            raise CheckpointError(
                f"The licence must be an identifier such as gemma or apache-2.0, got "
                f"{self.licence!r}."
            )

    @classmethod
    def of(cls, checkpoint: Checkpoint, source) -> "Provenance":
        """The provenance of what was just opened.

        Args:
            checkpoint: The open checkpoint.
            source: What the user called it.
        """
        preset = registry.known_as(str(source))
        told = _papers_of(checkpoint) or {}
        licence = str(told.get("licence", GEMMA))
        facts = {"licence": licence if _LICENCE.fullmatch(licence) else GEMMA}
        if preset is not None:
            hub = [name for name in preset.sources if name.startswith("hf://")]
            facts["licence"] = preset.licence_id
            facts["base_model"] = hub[0].removeprefix("hf://") if hub else None
        return cls(
            source=_name_for_others(source, preset),
            format=checkpoint.format,
            files=tuple(map(SourceFile.at, checkpoint.files())),
            earlier=_steps(told),
            **facts,
        )

    def adding(self, *sentences: str) -> "Provenance":
        """The same, with more that was done."""
        return dataclasses.replace(self, modified=(*self.modified, *sentences))

    def describe(self, format: str, dtype: str, files: list[dict]) -> dict:
        """The contents of provenance.json, without the list of files written.

        Args:
            format: What was written.
            dtype: How the weights are stored in it.
            files: What `hashing` gave of `self.files`.
        """
        now = datetime.datetime.now(datetime.UTC)
        facts = {
            "tool": f"gemma_keras {gemma_keras.__version__}",
            "date": now.isoformat(timespec="seconds"),
            "source": {
                "name": self.source,
                "format": self.format,
                "files": files,
            },
            "written": {"format": format, "dtype": dtype},
            "modified": list(self.modified),
            "licence": self.licence,
        }
        return facts | ({"earlier": list(self.earlier)} if self.earlier else {})


def _name_for_others(source, preset):
    """Paths of this machine are nobody else's business."""
    text = str(source)
    if preset is None and "://" not in text:
        text = Path(source).expanduser().absolute().name
    return re.sub(r"[^\w./:@+-]", "_", text)


def read_own(directory) -> dict | None:
    """The provenance.json of an export in `directory`, or None."""
    where = directory / PROVENANCE
    try:
        if where.stat().st_size > MAX_JSON_BYTES:
            return None
        return _read(where.read_bytes(), where)
    except OSError:
        return None


def _papers_of(checkpoint):
    """The provenance.json of a checkpoint, or None.

    That of the folder, unless a file has its own and the folder's does not list it.
    """
    path = checkpoint.path
    beside = next(filter(None, map(read_own, checkpoint.homes())), None)
    inside = checkpoint.told()
    inside = inside and _read(inside, path)
    if beside and (path.is_dir() or path.name in _listed(beside)):
        return beside
    return inside or beside


def _steps(told):
    """What an export told of itself and of those before it, the latest first."""
    before = told.get("earlier")
    steps = [told, *(before if isinstance(before, list) else [])]
    found, size = [], 0
    for step in filter(None, map(_kept, steps)):
        size += len(json.dumps(step))
        if size > _MOST_EARLIER:
            found.append({"modified": [_LEFT_OUT]})
            break
        found.append(step)
    return tuple(found)


def _kept(step):
    """What is passed on of a step; nothing of what no export wrote."""
    if not isinstance(step, dict):
        return {}
    kept = {key: step[key] for key in _STEP if key in step}
    return kept if _levels_within(kept, 4) else {}


def _levels_within(value, count):
    """Whether a value of JSON is nested at most so deep: others cannot be written."""
    inside = list(value.values()) if isinstance(value, dict) else value
    return not isinstance(inside, list) or (
        count > 0 and all(_levels_within(each, count - 1) for each in inside)
    )


def _read(data, where):
    """What an export told, parsed; None for what is none of ours."""
    if len(data) > MAX_JSON_BYTES:
        return None
    try:
        found = parse_json(data, where)
    except CheckpointError:
        return None
    return found if str(found.get("tool")).startswith("gemma_keras ") else None


def read_listing(directory) -> set[str]:
    """Names of the files that an export wrote to `directory`; empty without one."""
    return _listed(read_own(directory) or {})


def _listed(told):
    files = told.get("files")
    return {str(name) for name in files} if isinstance(files, list) else set()


def write_papers(folder, facts, card):
    """Writes the notice, the model card and provenance.json, which comes last.

    Args:
        folder: The directory that holds the export.
        facts: From `Provenance.describe`.
        card: The text of the model card.
    """
    (folder / CARD).write_text(card, "utf-8")
    if facts["licence"] == GEMMA:
        (folder / NOTICE).write_text(NOTICE_TEXT, "utf-8")
    names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    facts = facts | {"files": sorted([*names, PROVENANCE])}
    (folder / PROVENANCE).write_text(json.dumps(facts, indent=2) + "\n", "utf-8")


def model_card(title, contents, facts, use) -> str:
    """The text of a README.md as Hugging Face shows it.

    Args:
        title: The name of the model.
        contents: The `Contents` that were written.
        facts: From `Provenance.describe`; `written` is None where files are passed on
            as they were found.
        use: What a reader has to do to run it, as Markdown.
    """
    licence, base = facts["licence"], contents.provenance.base_model
    head = [f"license: {licence}", "pipeline_tag: text-generation"]
    head += [f"base_model: {base}"] if base else []
    head += ["tags:", f"- {contents.config.family}", "- gemma_keras"]
    source = facts["source"]
    hashes = [_hash_line(file) for file in source["files"] if "sha256" in file]
    parts = ["---", *head, "---", "", f"# {title}", ""]
    parts += [
        f"A {_FAMILIES[contents.config.family]} of {contents.config.num_parameters:,} "
        f"parameters, {_how_made(facts)}.",
        *("", "## Use", "", use.strip(), "", "## What was modified", ""),
        *(f"- {sentence}" for sentence in facts["modified"]),
    ]
    if hashes:
        parts += ["", "The source files, and their sha256:", "", *hashes]
    parts += ["", licence_section(licence)]
    return "\n".join(parts) + "\n"


def _hash_line(file):
    count = file.get("count")
    many = "" if count is None else f" ({count} files, of what `sha256sum` prints)"
    return f"- `{file['name']}`{many}: {file['sha256']}"


def _how_made(facts):
    source, written = facts["source"], facts["written"]
    origin = f"`{source['name']}` ({source['format']})" if source["name"] else "memory"
    by = f"by {facts['tool']} on {facts['date'][:10]}"
    if written is None:
        return f"passed on {by} as it was found in {origin}"
    return f"written for {written['format']} in {written['dtype']} {by} from {origin}"


def licence_section(licence) -> str:
    """The part of a model card that says what the files are under."""
    text = f"{licence}, as its source."
    if licence == GEMMA:
        text = _TERMS.format(notice=NOTICE_TEXT).strip()
    return f"## Licence\n\n{text}"
