"""The folder of a run: whose it is, how far it came, and who is at it."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import sys

import gemma_keras
from gemma_keras.sft import snapshots
from gemma_keras.sft.config import RunConfig

CONFIG, RUN, LOCK = "config.yaml", "run.json", ".lock"
CHECKPOINTS = "checkpoints"
# What a run leaves along the way that one begun anew would not write over at once.
_LEFT = ("metrics.csv", "samples.jsonl", "answers_before.jsonl", "report.html")


class RunFolder:
    """The folder of a run with a config, new or to be gone on with.

    A run that ended before its first checkpoint has nothing to go on from: the folder
    counts as new, whatever its config was.

    Args:
        config: a `RunConfig`.

    Attributes:
        path: of the folder.
        info: what `run.json` holds: `status` ("new", "running", "stopped", "finished"
            or "failed: ..."), `title`, `data`, `versions` and more.

    Raises:
        ValueError: the folder is no run's, or that of a run with another config.
    """

    def __init__(self, config):
        self.config = config
        self.path = pathlib.Path(config.out)
        self.info = {"status": "new", "title": self.path.resolve().name}
        if not self.path.exists() or {x.name for x in self.path.iterdir()} <= {LOCK}:
            return
        if not (self.path / CONFIG).exists():
            raise ValueError(
                f"{self.path} holds something else than a run: name a new folder "
                "with out."
            )
        info = self.info
        if (self.path / RUN).exists():
            info = json.loads((self.path / RUN).read_text("utf-8"))
        if info["status"] != "finished" and not self.has_checkpoint:
            return
        self.info = info
        there = RunConfig.read(self.path / CONFIG)
        different = there.differences(config)
        if different:
            lines = "".join(f"\n  {line}" for line in different)
            raise ValueError(
                f"{self.path} holds a run with other options, so it cannot go on:"
                f"{lines}\nGive the same, or name a new folder with out."
            )

    @property
    def status(self):
        """How far the run came."""
        return self.info["status"]

    @property
    def has_checkpoint(self):
        """Whether there is something to go on from."""
        return bool(snapshots.every(self.path / CHECKPOINTS))

    @contextlib.contextmanager
    def locked(self):
        """Keeps other processes out; the system lets go if this one is killed."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / LOCK).open("w") as file:
            try:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except ImportError:  # Windows
                pass
            except OSError:
                raise ValueError(
                    f"Another process is training in {self.path}: wait for it, or "
                    "name another folder with out."
                ) from None
            yield

    def start(self, files):
        """Notes that the run begins or goes on, with which data.

        Args:
            files: path to a description of what was found in it.

        Raises:
            ValueError: a file is not what it was when the run began.
        """
        data = [
            {"path": path, "sha256": _sha256(path), "found": found}
            for path, found in files.items()
        ]
        for before, now in zip(self.info.get("data", data), data, strict=True):
            if before["sha256"] != now["sha256"]:
                raise ValueError(
                    f"{now['path']} has changed since the run in {self.path} began, "
                    "so it cannot go on: put the file back as it was, or name a new "
                    "folder with out."
                )
        if self.status == "new":
            for name in _LEFT:
                (self.path / name).unlink(missing_ok=True)
            shutil.rmtree(self.path / "tensorboard", ignore_errors=True)
            replace(self.path / CONFIG, self.config.as_yaml())
        self.update(status="running", data=data)

    def update(self, **values):
        """Writes values to `run.json`, on a full disk too where that can be.

        Raises:
            OSError: it cannot; the file is as it was.
        """
        self.info |= values
        text = json.dumps(self.info, indent=2, ensure_ascii=False)
        try:
            replace(self.path / RUN, text)
        except OSError:
            if not _written_over(self.path / RUN, text):
                raise


def replace(path, text):
    """Writes a text file that appears when it is complete, or leaves what is there."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _written_over(path, text):
    """Writes a file over where it is, if the disk has given it room; whether it did."""
    data = text.encode()
    try:
        with path.open("r+b") as file:
            # Of 512 bytes each; Windows does not tell.
            room = 512 * getattr(os.fstat(file.fileno()), "st_blocks", 0)
            if len(data) <= room:
                file.write(data)
                file.truncate()
            return len(data) <= room
    except OSError:
        return False


def _sha256(path):
    with pathlib.Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def versions(backend):
    """Name to version of what a run's numbers depend on.

    Args:
        backend: what `backend.description()` gives.
    """
    found = {"gemma_keras": gemma_keras.__version__}
    found["keras"] = importlib.metadata.version("keras")
    found |= backend
    found["python"] = platform.python_version()
    found["numpy"] = importlib.metadata.version("numpy")
    found["system"] = f"{platform.system()} {platform.machine()}"
    found["command"] = " ".join([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]])
    return found
