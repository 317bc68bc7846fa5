"""The folder of a run, where the disk is full."""

import errno
import json
import os

import pytest

from gemma_keras.sft import folder
from gemma_keras.sft.config import RunConfig

pytestmark = pytest.mark.any_backend


@pytest.fixture
def begun(tmp_path):
    """The folder of a run that has begun."""
    found = folder.RunFolder(RunConfig(preset="p", train="t", out=str(tmp_path / "r")))
    with found.locked():
        found.start({})
    return found


def fill_the_disk(monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folder.os, "fsync", full)


def test_how_a_run_ended_is_told_on_a_full_disk_too(begun, monkeypatch):
    fill_the_disk(monkeypatch)
    if not hasattr(os.stat_result, "st_blocks"):
        pytest.skip("the system does not tell what room a file has")
    begun.update(status="failed: the disk is full")
    held = json.loads((begun.path / folder.RUN).read_text())
    assert held["status"] == "failed: the disk is full"
    begun.update(status="stopped")  # shorter
    assert json.loads((begun.path / folder.RUN).read_text())["status"] == "stopped"
    names = {path.name for path in begun.path.iterdir()}
    assert names == {folder.CONFIG, folder.RUN, folder.LOCK}


def test_what_has_no_room_leaves_the_file_as_it_was(begun, monkeypatch):
    before = (begun.path / folder.RUN).read_bytes()
    fill_the_disk(monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        begun.update(status="x" * 100_000)
    with pytest.raises(OSError, match="No space left"):
        folder.replace(begun.path / "new.json", "{}")
    assert (begun.path / folder.RUN).read_bytes() == before
    names = {path.name for path in begun.path.iterdir()}
    assert names == {folder.CONFIG, folder.RUN, folder.LOCK}
