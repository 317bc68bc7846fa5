"""The text whose perplexity is measured: a part of "Alice in Wonderland".

Lewis Carroll, 1865, in the public domain. It lies in the source package of brotli
1.2.1, which compresses it to test itself, and is fetched with pip; nothing is
installed. A model has read it in training, so its perplexity says nothing of how good
the model is; that of two forms of one model can be compared.
"""

import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile

import models

PACKAGE = "brotli==1.2.1"
FOLDER = "brotli-1.2.1/tests/testdata"
# Beside it, "As You Like It"; and what weights are calibrated with: a workshop of the
# Library of Congress in 1992, and "Paradise Lost".
SHA256 = {
    "alice29": "7467306ee0feed4971260f3c87421154a05be571d944e9cb021a5713700c38f0",
    "asyoulik": "eaa3526fe53859f34ecdf255712f9ecf0b2c903451d4755b2edaa2e2599cb0fc",
    "lcet10": "5314ba1dbb03f471df88bec6cd120a938ef60d0fd3511c5c1dce61bf7463245f",
    "plrabn12": "07e2e0b461af78c7c647cb53dab39de560198e16f799b4516eccf0fbd69f764c",
}
# From the fifth chapter on: 8 times 511 tokens, each after a <bos> of its own.
BEGIN = "CHAPTER V"
WINDOWS, LENGTH = 8, 512


def windows_file():
    """Where the token ids lie, a list of windows."""
    return models.folder() / "text.json"


def write():
    """Fetches the text and writes its ids, unless they are there: Gemma 3's.

    Returns:
        The path of the file.
    """
    path = windows_file()
    if path.exists():
        return path
    from gemma_keras import GemmaTokenizer

    tokenizer = GemmaTokenizer(models.assets() / "gemma3" / "tokenizer.model")
    text = fetch("alice29")["alice29"]
    windows = windows_of(tokenizer, text[text.index(BEGIN) :], WINDOWS)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(windows))
    return path


def windows_of(tokenizer, text, count):
    """The ids of the first windows of a text, so many lists of LENGTH."""
    ids, step = tokenizer.encode(text, add_bos=False), LENGTH - 1
    return [
        [tokenizer.bos_token_id, *ids[start : start + step]]
        for start in range(0, count * step, step)
    ]


def fetch(*names):
    """Name to text of some of `SHA256`, checked."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--no-binary=:all:", "--dest", folder, PACKAGE]
        subprocess.run(command, check=True, stdout=sys.stderr)
        with tarfile.open(f"{folder}/{PACKAGE.replace('==', '-')}.tar.gz") as archive:
            found = {
                name: archive.extractfile(f"{FOLDER}/{name}.txt").read()
                for name in names
            }
    for name, text in found.items():
        if hashlib.sha256(text).hexdigest() != SHA256[name]:
            raise SystemExit(f"{name}.txt of {PACKAGE} is not what was expected.")
    return {
        name: text.decode("latin-1").replace("\r\n", "\n")
        for name, text in found.items()
    }
