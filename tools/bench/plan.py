"""What `gemma-keras sft --plan` foretells beside the memory that runs then take.

    python tools/bench/plan.py --json plan.json
    python tools/bench/plan.py --backends torch --only gemma3
    python tools/bench/plan.py --large      # 17 GB of disk meanwhile, minutes a step

Each line is a real run of `gemma-keras sft`, of three steps, in a process of its own,
on a model of random weights with the genuine tokenizer (`tools/fetch_assets.py`) and on
texts long enough to fill its rows. Told are the peak that it wrote into metrics.csv and
what the planner said before; the last line has the largest difference. Which lines the
planner's figures were fitted to, and which it had never seen, the table says.
"""

import argparse
import csv
import dataclasses
import itertools
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile

from models import folder, random_model

BACKENDS = ("jax", "torch", "tensorflow")
COMMAND = "import sys; sys.argv[0] = 'gemma-keras'; import gemma_keras.cli as c; "
COMMAND += "c.main()"


def models():
    """Name to `GemmaConfig`: shapes that differ in what memory depends on."""
    from contenders import our_config

    from gemma_keras import GemmaConfig, registry

    shared = {"vocab_size": 256_000, "query_pre_attn_scalar": 64.0, "head_dim": 64}
    gemma3 = registry.find("gemma3_270m").config
    return {
        "shape": our_config(),
        # The first layers of it, and of Gemma 3 270M.
        "few": dataclasses.replace(our_config(), num_layers=6),
        "gemma3": dataclasses.replace(gemma3, num_layers=6),
        # Narrow and deep, with all that Gemma 2 has.
        "gemma2": GemmaConfig(
            **shared,
            num_layers=10,
            hidden_dim=384,
            ffn_dim=1536,
            num_query_heads=8,
            num_kv_heads=4,
            layer_pattern="LG",
            sliding_window=256,
            attn_logit_soft_cap=50.0,
            final_logit_soft_cap=30.0,
            use_post_norms=True,
        ),
        # Wide and flat, with a key head for each query head, as Gemma 7B.
        "wide": GemmaConfig(
            **shared,
            num_layers=4,
            hidden_dim=768,
            ffn_dim=6144,
            num_query_heads=12,
            num_kv_heads=12,
        ),
        "7b": registry.find("gemma_7b_en").config,
    }


_ALL, _NARROW = {"lora_targets": ["all-linear"]}, {"dtype": "bfloat16"}
_REMAT = {"remat": True}
# Model, settings: `seen` are those that the planner's figures were fitted to.
SEEN = [
    ("few", {"batch_size": 1, "sequence_length": 32}),
    ("few", {"batch_size": 4, "sequence_length": 512}),
    ("few", {"batch_size": 4, "sequence_length": 512, "remat": True}),
    ("gemma2", {"batch_size": 1, "sequence_length": 32}),
    ("gemma2", {"batch_size": 4, "sequence_length": 256}),
    ("gemma2", {"batch_size": 4, "sequence_length": 256, "remat": True}),
    ("wide", {"batch_size": 2, "sequence_length": 128, "full": True}),
    ("few", {"batch_size": 2, "sequence_length": 1024, "remat": True}),
    ("gemma3", {"batch_size": 2, "sequence_length": 768}),
    ("wide", {"batch_size": 4, "sequence_length": 384}),
    ("gemma2", _ALL | {"batch_size": 3, "sequence_length": 384}),
    ("few", {"batch_size": 4, "sequence_length": 256, "quantize": "int4"}),
    ("few", _NARROW | {"batch_size": 4, "sequence_length": 384}),
    ("shape", {"batch_size": 2, "sequence_length": 512, "lora_rank": 64}),
]
UNSEEN = [
    ("shape", {"batch_size": 4, "sequence_length": 256, "remat": True}),
    ("gemma2", _ALL | {"batch_size": 2, "sequence_length": 512, "remat": True}),
    ("gemma3", {"batch_size": 3, "sequence_length": 256, "quantize": "int8"}),
    ("few", _NARROW | {"batch_size": 2, "sequence_length": 768, "lora_rank": 32}),
    ("few", _NARROW | {"batch_size": 4, "sequence_length": 256, "quantize": "int4"}),
    ("few", _REMAT | {"batch_size": 2, "sequence_length": 1024, "quantize": "int4"}),
    ("wide", _ALL | {"batch_size": 2, "sequence_length": 512}),
]
# What is to fit in 12 GB.
LARGE = [
    (
        "7b",
        _NARROW
        | _REMAT
        | {"batch_size": 1, "sequence_length": 1024, "quantize": "int4"},
    ),
]


def write_model(name, config, stored):
    """A Hugging Face directory of random weights, written once."""
    from gemma_keras.checkpoints import exporting

    path = folder() / f"plan-{name}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        exporting.export(random_model(config, stored), path, "hf", dtype=stored)
    return path


def measure(backend, path, config, stored, data, settings):
    """GB that were predicted and measured, or why there are none."""
    from gemma_keras.sft import RunConfig, planning

    with tempfile.TemporaryDirectory() as out:
        given = {"preset": str(path), "train": [str(data)], "out": f"{out}/run"}
        given |= {"max_steps": 3, "epochs": 1, "backend": backend, **settings}
        run = RunConfig.read(None, given).resolved(config, stored)
        predicted = planning.predict(config, run, stored, backend).total
        flags = [part for pair in given.items() for part in _flag(*pair)]
        done = subprocess.run(
            [sys.executable, "-c", COMMAND, "sft", *flags],
            capture_output=True,
            text=True,
            env={**os.environ, "KERAS_BACKEND": backend},
        )
        if done.returncode:
            return {"failed": done.stderr.strip()[-300:]}
        with open(f"{out}/run/metrics.csv") as file:
            peaks = [float(row["peak_memory_gb"]) for row in csv.DictReader(file)]
    return {"predicted": predicted / 1e9, "measured": max(peaks)}


def _flag(name, value):
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [flag] if value else []
    values = value if isinstance(value, list) else [value]
    return [part for each in values for part in (flag, str(each))]


def write_texts(path, words=1100):
    """Enough texts, of about `words` random words each, for every line."""
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    with open(path, "w") as file:
        for _ in range(16):
            text = " ".join("".join(draw.choices(letters, k=4)) for _ in range(words))
            file.write(json.dumps({"prompt": "Say it.", "completion": text}) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", nargs="+", default=BACKENDS, choices=BACKENDS)
    parser.add_argument("--only", nargs="+", help="models, by name")
    parser.add_argument("--unseen", action="store_true", help="not the fitted ones")
    parser.add_argument("--large", action="store_true", help="Gemma 7B, and no other")
    parser.add_argument("--json", type=pathlib.Path, help="file for every figure")
    arguments = parser.parse_args()
    found = models()
    cells = [] if arguments.unseen else [(True, *cell) for cell in SEEN]
    cells += [(False, *cell) for cell in UNSEEN]
    if arguments.large:
        cells = [(False, *cell) for cell in LARGE]
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.large:
            # Not to stay in the folder of the others.
            os.environ["GEMMA_KERAS_BENCH"] = scratch
        data = pathlib.Path(scratch) / "texts.jsonl"
        write_texts(data)
        for (seen, name, settings), backend in itertools.product(
            cells, arguments.backends
        ):
            if name not in (arguments.only or found):
                continue
            stored = "bfloat16" if arguments.large else "float32"
            path = write_model(name, found[name], stored)
            result = {"backend": backend, "model": name, "settings": settings}
            result |= {"seen": seen}
            result |= measure(backend, path, found[name], stored, data, settings)
            results.append(result)
            print(_line(result), flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(results, indent=1))
    differences = [abs(_difference(r)) for r in results if "failed" not in r]
    if differences:
        print(f"largest difference {max(differences):.1%}, of {len(differences)}")


def _difference(result):
    return result["predicted"] / result["measured"] - 1


def _line(result):
    told = ", ".join(f"{k} {v}" for k, v in result["settings"].items())
    start = f"{result['backend']:10} {result['model']:7} {told:60}"
    if "failed" in result:
        return f"{start} failed: {result['failed']}"
    seen = "fitted" if result["seen"] else "unseen"
    return (
        f"{start} {result['predicted']:6.2f} of {result['measured']:6.2f} GB "
        f"{_difference(result):+6.1%} {seen}"
    )


if __name__ == "__main__":
    main()
