"""The documents do what they say: their Python and their cheap commands are run."""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
README = ROOT / "README.md"


def blocks(language, document=README):
    text = document.read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


# What is the same on every backend is run where nothing has to be compiled for it.
on_torch = pytest.mark.skipif(
    os.environ.get("KERAS_BACKEND") != "torch", reason="documents that torch runs"
)


@pytest.mark.parametrize(
    ("document", "made"),
    [
        ("README.md", "my_gemma/config.json"),
        ("docs/lora.md", "my_adapter/README.md"),
        ("docs/training.md", "taught/adapter_config.json"),
        ("docs/quantization.md", "my_floats/config.json"),
        pytest.param("docs/generation.md", "lessons.jsonl", marks=on_torch),
        pytest.param("docs/kv_cache.md", "lessons.jsonl", marks=on_torch),
        pytest.param("docs/data.md", "train.jsonl", marks=on_torch),
        pytest.param("docs/sft.md", "metrics.csv", marks=on_torch),
    ],
)
def test_the_python_runs(tmp_path, document, made):
    rows = [{"prompt": f"What is {i}?", "response": "A number."} for i in range(8)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    for name in ("lessons.jsonl", "train.jsonl"):
        (tmp_path / name).write_text(text)
    found = blocks("python", ROOT / document)
    if document == "docs/sft.md":
        # lm-eval is installed for its own test alone, and has a model to fetch.
        assert "import lm_eval" in found[0]
        found[0] = (
            "from gemma_keras import GemmaCausalLM\n"
            "lm = GemmaCausalLM.from_preset('gemma_tiny_instruct_en')"
        )
    program = "\n".join(found)
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / made).is_file()


def test_the_commands_run(tmp_path):
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    commands = [line for line in lines if "gemma-keras" in line]
    assert len(commands) >= 5
    folder = pathlib.Path(sys.executable).parent
    for command in commands:
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=tmp_path,
            env={**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        if "--to torch" in command and not importlib.util.find_spec("torch"):
            assert "pip install torch" in done.stderr
            continue
        assert done.returncode == 0, (command, done.stderr)
        assert done.stdout.strip(), command


def test_every_module_and_tool_it_names_is_there():
    tree = README.read_text().split("## What lies where")[1].split("```")[1]
    package = pathlib.Path(__file__).resolve().parents[2] / "gemma_keras"
    named = set(re.findall(r"^  ((?:\w+\.py ?)+)", tree, re.MULTILINE))
    names = {name for line in named for name in line.split()}
    there = {path.name for path in package.glob("*.py")} - {"__init__.py", "models.py"}
    assert names == there
