"""LoRA fine-tuning beside TRL + PEFT, and KerasHub on each backend.

    python tools/bench/finetune.py --steps 4 --json figures.json

The model is that of contenders.py: 264M parameters, random weights, float32. LoRA of
rank 8 on queries and values, AdamW, 8 examples a step, loss on the responses only.
Lengths are drawn log-normal: prompts of about 27 tokens, responses of about 75 with a
long tail, cut at 512. Ours packs rows of 512, TRL pads each batch to its longest
example, KerasHub has rows of 512. Every contender runs in a process of its own, which
is killed when it needs more than `--memory-limit`. Told are supervised tokens a second,
from the end of the first step on; the same by the processor's seconds, all threads
together, which other work on the machine disturbs less; and the largest memory: that of
the device on a GPU, else the resident one of the process.

TRL runs as it comes ("default": it computes activations twice); keeping activations
("keeping"); and, besides, with examples of like lengths in a batch ("grouped"). Its
packing is left out: TRL supports it with FlashAttention only. Ours keeps activations,
or computes them twice ("remat"). KerasHub makes the logits of all rows at once, for
which 24 GiB are too few on some backends: it also runs with fewer examples a step ("2
rows").

A process holds what its backend imports. TensorFlow imports JAX, pandas and SciPy where
they are installed, 0.2 GB in all: `--python tensorflow=PATH` gives a backend, or a
contender, an environment of its own.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import memory
from contenders import SHAPE, keras_hub_model, our_model, transformers_model
from process import python_for

BACKENDS = ("jax", "tensorflow", "torch")
LENGTH, BATCH, RANK = 512, 8, 8
# What each way of running TRL sets beyond what all of them have in common.
_IN_ORDER = {
    "dataset_kwargs": {"skip_prepare_dataset": True},
    "train_sampling_strategy": "sequential",
}
TRL = {
    "default": _IN_ORDER,
    "keeping": {**_IN_ORDER, "gradient_checkpointing": False},
    "grouped": {
        **_IN_ORDER,
        "gradient_checkpointing": False,
        "train_sampling_strategy": "group_by_length",
    },
}
# How ours runs: what it passes to `compile`.
OURS = {"keeping": {}, "remat": {"remat": True}}
# Examples that KerasHub has in a step.
KERAS_HUB = {"8 rows": 8, "2 rows": 2}


def examples(count):
    """Token ids of prompts and responses, lists of lists."""
    import numpy as np

    rng = np.random.default_rng(0)
    prompts = rng.lognormal(np.log(27), 0.5, count).astype(int).clip(4, 256)
    responses = rng.lognormal(np.log(75), 0.8, count).astype(int).clip(2, None)
    responses = np.minimum(responses, LENGTH - prompts)
    draw = lambda n: rng.integers(10, SHAPE["vocab"], n).tolist()  # noqa: E731
    return [(draw(p), draw(r)) for p, r in zip(prompts, responses, strict=True)]


class Clock:
    """When each step ended, in seconds and in processor seconds of all threads."""

    def __init__(self):
        self.ends = []

    def tick(self):
        self.ends.append((time.perf_counter(), time.process_time()))

    def report(self, tokens):
        """Of `tokens`, those of each step, a second; the first step does not count."""
        ends = self.ends[: len(tokens)]
        seconds, cpu = (
            last - first for first, last in zip(ends[0], ends[-1], strict=True)
        )
        learned = sum(tokens[1:])
        return {"rate": learned / seconds, "cpu_rate": learned / cpu, "tokens": tokens}


def fit(lm, compiled_with, tokens, *given, **options):
    """Supervised tokens a second of a Keras model; what is given is `fit`'s."""
    import keras

    clock = Clock()
    lm.backbone.enable_lora(RANK)
    lm.compile(
        optimizer=keras.optimizers.AdamW(1e-4),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=[],
        **compiled_with,
    )
    told = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda *_, **__: clock.tick()
    )
    lm.fit(*given, verbose=0, shuffle=False, callbacks=[told], **options)
    return clock.report(tokens)


class Batches:
    """A list of batches as a `keras.utils.PyDataset`."""

    def __new__(cls, batches):
        import keras

        class Dataset(keras.utils.PyDataset):
            def __len__(self):
                return len(batches)

            def __getitem__(self, index):
                return batches[index]

        return Dataset()


def train_ours(steps, settings):
    from gemma_keras.encoding import Sample, encode_examples
    from gemma_keras.packing import PackedDataset

    def encoder(pair):
        prompt, response = pair
        learn = [False] * len(prompt) + [True] * len(response)
        return Sample(prompt + response, learn, ends=False)

    chosen = examples(steps * BATCH)
    encoded = encode_examples(chosen, encoder, LENGTH)
    # As many rows as hold 8 examples or so.
    tokens = sum(encoded.lengths) / len(chosen)
    rows = max(1, round(BATCH * tokens / LENGTH))
    dataset = PackedDataset(encoded, rows, LENGTH, shuffle=False)
    batches = [dataset[i] for i in range(len(dataset))]
    tokens = [int(batch[2].sum()) for batch in batches]
    report = fit(our_model("float32"), OURS[settings], tokens, Batches(batches))
    return {**report, "rows": rows, "usage": dataset.usage}


def train_keras_hub(steps, settings):
    """KerasHub with as many examples a step as a name of `KERAS_HUB` stands for."""
    import numpy as np

    batch = KERAS_HUB[settings]
    chosen = examples(steps * BATCH)[: steps * batch]
    ids = np.zeros((len(chosen), LENGTH + 1), "int32")
    mask, learn = np.zeros(ids.shape, "int32"), np.zeros(ids.shape, "float32")
    for row, (prompt, response) in enumerate(chosen):
        end = len(prompt) + len(response)
        ids[row, :end], mask[row, :end] = prompt + response, 1
        learn[row, len(prompt) : end] = 1
    x = {"token_ids": ids[:, :-1], "padding_mask": mask[:, :-1]}
    y, weight = ids[:, 1:], learn[:, 1:]
    tokens = weight.reshape(steps, -1).sum(axis=1).astype(int).tolist()
    lm = keras_hub_model("float32")
    return fit(lm, {}, tokens, x, y, sample_weight=weight, batch_size=batch)


def train_trl(steps, settings):
    """TRL with the settings that a name of `TRL` stands for."""
    import datasets
    import peft
    import tokenizers
    import torch
    import transformers
    import trl

    words = tokenizers.models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<eos>")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words),
        pad_token="<pad>",
        eos_token="<eos>",
    )
    chosen = examples(steps * BATCH)
    rows = {
        "input_ids": [p + r for p, r in chosen],
        "labels": [[-100] * len(p) + r for p, r in chosen],
    }
    clock, tokens = Clock(), []

    class Told(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            clock.tick()

    class Trainer(trl.SFTTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            # The first token of a row is nobody's next.
            tokens.append(int((inputs["labels"][:, 1:] != -100).sum()))
            return super().compute_loss(model, inputs, *args, **kwargs)

    trainer = Trainer(
        transformers_model("float32"),
        args=trl.SFTConfig(
            output_dir="unused",
            per_device_train_batch_size=BATCH,
            max_length=LENGTH,
            learning_rate=1e-4,
            num_train_epochs=1,
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            report_to=[],
            logging_strategy="no",
            disable_tqdm=True,
            **TRL[settings],
        ),
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(
            r=RANK, lora_alpha=RANK, target_modules=["q_proj", "v_proj"]
        ),
        callbacks=[Told()],
    )
    trainer.train()
    return clock.report(tokens)


TRAINERS = {"ours": train_ours, "kerashub": train_keras_hub, "trl": train_trl}


def memory_of(process):
    """Resident bytes that Linux tells of a process; 0 if it has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    found = [line.split()[1] for line in status.splitlines() if line[:5] == "VmRSS"]
    return 1024 * int(found[0]) if found else 0


def run(contender, backend, settings, arguments):
    """One run in a fresh process: what it reported, or why it did not."""
    environment = dict(os.environ, KERAS_BACKEND=backend)
    environment.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    python = python_for({contender, backend}, arguments.python)
    command = [python, __file__, "--worker", contender, "--settings", settings]
    command += ["--steps", str(arguments.steps)]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        worker = subprocess.Popen(command, stdout=out, stderr=errors, env=environment)
        most = 0
        while worker.poll() is None:
            most = max(most, memory_of(worker.pid) / 1e9)
            if most > arguments.memory_limit:
                worker.kill()
                worker.wait()
                return {"failed": f"killed at {most:.1f} GB of memory"}
            time.sleep(0.02)
        out.seek(0), errors.seek(0)
        if worker.returncode:
            why = errors.read().strip()[-400:]
            return {"failed": f"exit {worker.returncode} at {most:.1f} GB: {why}"}
        return json.loads(out.read().splitlines()[-1])


def cells_of(arguments):
    """Contender, backend and settings of each run of a round."""
    cells = []
    for contender in arguments.contenders:
        settings = {"ours": arguments.ours, "trl": arguments.trl}
        settings = settings.get(contender, KERAS_HUB)
        backends = ["torch"] if contender == "trl" else arguments.backends
        cells += itertools.product([contender], backends, settings)
    return cells


def print_medians(results):
    """A line for each contender, backend and settings."""
    print(f"\nmedians{'':32}{'supervised tokens/s':>20}{'a cpu s':>9}{'peak GB':>9}")
    for cell in dict.fromkeys(tuple(result["cell"]) for result in results):
        runs = [r for r in results if tuple(r["cell"]) == cell and "failed" not in r]
        if runs:
            rate, cpu, peak = (
                statistics.median(r[name] for r in runs)
                for name in ("rate", "cpu_rate", "peak_gb")
            )
            print(f"{' '.join(cell):39}{rate:20.1f}{cpu:9.1f}{peak:9.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4, help="of 8 examples")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--backends", nargs="+", default=BACKENDS, choices=BACKENDS)
    parser.add_argument(
        "--contenders", nargs="+", default=list(TRAINERS), choices=list(TRAINERS)
    )
    parser.add_argument("--ours", nargs="+", default=list(OURS), choices=list(OURS))
    parser.add_argument("--trl", nargs="+", default=list(TRL), choices=list(TRL))
    parser.add_argument(
        "--python",
        nargs="+",
        default=[],
        metavar="NAME=PATH",
        help="another Python for some, such as tensorflow=/path/to/venv/bin/python",
    )
    parser.add_argument("--memory-limit", type=float, default=16, metavar="GB")
    parser.add_argument("--json", type=Path, help="file for every figure of every run")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--settings", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        report = TRAINERS[arguments.worker](arguments.steps, arguments.settings)
        print(json.dumps({**report, "peak_gb": memory.peak() / 1e9}), flush=True)
        return
    results = []
    for number in range(arguments.rounds):
        for cell in cells_of(arguments):
            report = run(*cell, arguments)
            results.append({"cell": cell, "round": number, **report})
            figures = ("failed", "rate", "cpu_rate", "peak_gb")
            told = {name: report[name] for name in figures if name in report}
            print(number, *cell, told, flush=True)
            if arguments.json:
                text = json.dumps({"shape": SHAPE, "runs": results})
                arguments.json.write_text(text)
    print_medians(results)


if __name__ == "__main__":
    main()
