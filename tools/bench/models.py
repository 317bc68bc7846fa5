"""The models that are compared, as files in the formats that the contenders read.

    python tools/bench/models.py shape bfloat16 q8_0      # writes what is not there yet

They lie in $GEMMA_KERAS_BENCH, or in ~/.cache/gemma_keras/bench: a Hugging Face
directory for float32 and bfloat16, a GGUF file for everything else and for `f32`. The
random ones have the genuine Gemma 1 tokenizer, which `tools/fetch_assets.py` fetches,
and so does the file of Gemma 3 270M.
"""

import argparse
import os
import pathlib

FLOATS = ("float32", "bfloat16")
# The names of llama.cpp's types, and what our exporter calls them.
GGUF = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "q8_0": "q8_0"}
GGUF["q4_0"] = "q4_0"
# 264M parameters, the shape of contenders.py; a real Gemma 2B's; Gemma 3 270M itself.
MODELS = ("shape", "2b", "real")
REAL_TYPE = "q4_k_m"


def file_of(model, stored):
    """Where a model lies, stored in one of `FLOATS`, of `GGUF`, or as `REAL_TYPE`."""
    if stored == REAL_TYPE:
        return assets() / "gemma3_270m" / "gemma-3-270m-q4_k_m.gguf"
    return folder() / (f"{model}-{stored}" + ("" if stored in FLOATS else ".gguf"))


def folder():
    """Where they are kept."""
    given = os.environ.get("GEMMA_KERAS_BENCH", "~/.cache/gemma_keras/bench")
    return pathlib.Path(given).expanduser()


def assets():
    """The folder that tools/fetch_assets.py fills."""
    given = os.environ.get("GEMMA_KERAS_ASSETS", "~/.cache/gemma_keras/assets")
    return pathlib.Path(given).expanduser()


def config_of(model):
    """The `GemmaConfig`."""
    from contenders import our_config

    from gemma_keras import registry

    names = {"2b": "gemma_2b_en", "real": "gemma3_270m"}
    return registry.find(names[model]).config if model in names else our_config()


def write(model, stored):
    """Writes the model unless it is there; returns its path."""
    path = file_of(model, stored)
    if path.exists():
        return path
    if stored == REAL_TYPE or model == "real":
        source = file_of("real", REAL_TYPE)
        if not source.exists():
            raise SystemExit(f"{source} is missing: run tools/fetch_assets.py first.")
    from gemma_keras.checkpoints import exporting, open_checkpoint

    dtype = GGUF.get(stored, stored)
    to = "hf" if stored in FLOATS else "gguf"
    path.parent.mkdir(parents=True, exist_ok=True)
    if model == "real":
        decoded = dtype if dtype in FLOATS else "float32"
        with open_checkpoint(source, dtype=decoded) as checkpoint:
            contents = exporting.checkpoint_contents(checkpoint, source)
            return exporting.export(contents, path, to, dtype=dtype)
    return exporting.export(
        random_model(config_of(model), dtype), path, to, dtype=dtype
    )


def random_model(config, dtype):
    """Random weights of a `GemmaConfig`, with the genuine tokenizer of Gemma 1."""
    from make_checkpoint import random_contents

    from gemma_keras import GemmaTokenizer

    file = assets() / "gemma" / "tokenizer.model"
    if not file.exists():
        raise SystemExit(f"{file} is missing: run tools/fetch_assets.py first.")
    drawn = "bfloat16" if dtype == "bfloat16" else "float32"
    return random_contents(config, drawn, GemmaTokenizer(file))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("stored", nargs="+", choices=(*FLOATS, *GGUF))
    arguments = parser.parse_args()
    for stored in arguments.stored:
        print(write(arguments.model, stored))


if __name__ == "__main__":
    main()
