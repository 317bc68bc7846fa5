"""Snapshots: whole, or not there; also where the disk is full or a file is torn."""

import errno
import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from gemma_keras.sft import snapshots

pytestmark = pytest.mark.any_backend
ARRAYS = {
    "a": np.arange(6, dtype="float32").reshape(2, 3),
    "b": np.array(7, "int64"),
    "c": np.arange(4).astype(ml_dtypes.bfloat16),
    "d": np.array([1, 2**32 - 1], "uint32"),
    "e": np.zeros((0, 3), "float32"),
}


def entries(arrays=None):
    arrays = ARRAYS if arrays is None else arrays
    return {k: (v.shape, v.dtype, lambda v=v: v) for k, v in arrays.items()}


def write(folder, step, **state):
    return snapshots.write(folder, step, entries(), state)


def test_what_is_written_is_a_safetensors_file_and_comes_back(tmp_path):
    path = write(tmp_path, 3, note="ü")
    snapshots.check(path)
    # The library is the reference of the format.
    loaded = load_file(path / snapshots.VARIABLES)
    with snapshots.variables(path) as (names, read):
        assert set(names) == set(ARRAYS)
        for name, array in ARRAYS.items():
            for value in (loaded[name], read(name)):
                assert value.dtype == array.dtype
                np.testing.assert_array_equal(value, array)
    assert snapshots.read_state(path) == {"note": "ü"}


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / snapshots.VARIABLES).write_bytes(b"short"),
        lambda path: (path / snapshots.STATE).write_text('{"note": 2}'),
        lambda path: (path / snapshots.MANIFEST).unlink(),
        lambda path: (path / snapshots.MANIFEST).write_text("{}"),
        lambda path: (path / snapshots.VARIABLES).unlink(),
    ],
)
def test_the_newest_whole_one_is_found_and_a_torn_one_told(tmp_path, damage):
    whole = write(tmp_path, 9, note=1)
    torn = write(tmp_path, 10, note=1)
    assert snapshots.newest(tmp_path) == torn
    damage(torn)
    told = []
    assert snapshots.newest(tmp_path, say=told.append) == whole
    assert len(told) == 1
    assert str(torn) in told[0]


def test_one_changed_bit_is_noticed(tmp_path):
    path = write(tmp_path, 1)
    data = bytearray((path / snapshots.VARIABLES).read_bytes())
    data[-1] ^= 1
    (path / snapshots.VARIABLES).write_bytes(data)
    with pytest.raises(snapshots.SnapshotError, match="SHA-256"):
        snapshots.check(path)


def test_a_full_disk_is_told_and_leaves_what_was_there(tmp_path, monkeypatch):
    last = write(tmp_path, 5)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(snapshots.os, "fsync", full)
    with pytest.raises(OSError, match="step 6") as caught:
        write(tmp_path, 6)
    assert "disk is full" in str(caught.value)
    assert "checkpoint is that of step 5" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [last.name]
    snapshots.check(last)


def test_the_newest_are_kept_and_those_that_are_named(tmp_path):
    for step in range(1, 6):
        write(tmp_path, step)
    snapshots.prune(tmp_path, 2, also=(snapshots.name_of(1),))
    steps = [snapshots.step_of(path) for path in snapshots.every(tmp_path)]
    assert steps == [1, 4, 5]


def test_what_was_half_written_is_removed_and_never_taken(tmp_path):
    half = tmp_path / f".{snapshots.name_of(2)}.partial"
    half.mkdir()
    (half / snapshots.STATE).write_text(json.dumps({}))
    assert snapshots.newest(tmp_path) is None
    snapshots.remove_partial(tmp_path)
    assert not half.exists()
