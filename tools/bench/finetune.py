"""LoRA fine-tuning beside TRL + PEFT, and KerasHub on each backend.

    python tools/bench/finetune.py --steps 4 --json figures.json

The model is that of contenders.py: 264M parameters, random weights, float32. LoRA of
rank 8 on queries and values, AdamW, 8 examples a step, loss on the responses only.
Lengths are drawn log-normal: prompts of about 27 tokens, responses of about 75 with a
long tail, cut at 512. Ours packs rows of 512, TRL pads each batch to its longest
example, KerasHub has rows of 512. Every contender runs in a process of its own. Told
are supervised tokens a second, from the end of the first step on, and the largest
resident memory of the process. TRL recomputes activations by default; it runs without,
too.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from contenders import SHAPE, keras_hub_model, our_model, transformers_model

BACKENDS = ("jax", "tensorflow", "torch")
LENGTH, BATCH, RANK = 512, 8, 8


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
    """When each step ended."""

    def __init__(self):
        self.ends = []

    def tick(self):
        self.ends.append(time.perf_counter())

    def rate(self, tokens):
        """Of `tokens`, those of each step, a second, but for the first step's."""
        spent = self.ends[len(tokens) - 1] - self.ends[0]
        return sum(tokens[1:]) / spent


def fit(lm, dataset, tokens):
    """Supervised tokens a second of a Keras model."""
    import keras

    clock = Clock()
    lm.backbone.enable_lora(RANK)
    lm.compile(
        optimizer=keras.optimizers.AdamW(1e-4),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=[],
    )
    told = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda *_, **__: clock.tick()
    )
    lm.fit(dataset, verbose=0, shuffle=False, callbacks=[told])
    return clock.rate(tokens)


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


def train_ours(steps, remat):
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
    rate = fit(our_model("float32"), Batches(batches), tokens)
    return {"rate": rate, "tokens": tokens, "rows": rows, "usage": dataset.usage}


def train_keras_hub(steps, remat):
    import numpy as np

    batches = []
    chosen = examples(steps * BATCH)
    for start in range(0, len(chosen), BATCH):
        ids = np.zeros((BATCH, LENGTH + 1), "int32")
        mask, learn = np.zeros(ids.shape, "int32"), np.zeros(ids.shape, "float32")
        for row, (prompt, response) in enumerate(chosen[start : start + BATCH]):
            end = len(prompt) + len(response)
            ids[row, :end], mask[row, :end] = prompt + response, 1
            learn[row, len(prompt) : end] = 1
        x = {"token_ids": ids[:, :-1], "padding_mask": mask[:, :-1]}
        batches.append((x, ids[:, 1:], learn[:, 1:]))
    tokens = [int(batch[2].sum()) for batch in batches]
    rate = fit(keras_hub_model("float32"), Batches(batches), tokens)
    return {"rate": rate, "tokens": tokens}


def train_trl(steps, remat):
    import datasets
    import peft
    import tokenizers
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
        "completion_mask": [[0] * len(p) + [1] * len(r) for p, r in chosen],
    }
    clock = Clock()

    class Told(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            clock.tick()

    settings = trl.SFTConfig(
        output_dir="unused",
        per_device_train_batch_size=BATCH,
        max_length=LENGTH,
        completion_only_loss=True,
        learning_rate=1e-4,
        num_train_epochs=1,
        gradient_checkpointing=remat,
        bf16=False,
        use_cpu=not __import__("torch").cuda.is_available(),
        save_strategy="no",
        report_to=[],
        logging_strategy="no",
        disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True},
        train_sampling_strategy="sequential",
    )
    trainer = trl.SFTTrainer(
        transformers_model("float32"),
        args=settings,
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(
            r=RANK, lora_alpha=RANK, target_modules=["q_proj", "v_proj"]
        ),
        callbacks=[Told()],
    )
    trainer.train()
    tokens = [
        sum(len(r) for _, r in chosen[i : i + BATCH])
        for i in range(0, len(chosen), BATCH)
    ]
    return {"rate": clock.rate(tokens), "tokens": tokens}


TRAINERS = {"ours": train_ours, "kerashub": train_keras_hub, "trl": train_trl}


def peak_memory():
    """Largest resident memory of this process, in GB."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def run(contender, backend, remat, arguments):
    """One run in a fresh process: what it reported, or why it did not."""
    environment = dict(os.environ, KERAS_BACKEND=backend)
    environment.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    command = [sys.executable, __file__, "--worker", contender]
    command += ["--steps", str(arguments.steps)] + ["--remat"] * remat
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        return {"failed": f"exit {done.returncode}: {done.stderr.strip()[-400:]}"}
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4, help="of 8 examples")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--backends", nargs="+", default=BACKENDS, choices=BACKENDS)
    parser.add_argument(
        "--contenders", nargs="+", default=list(TRAINERS), choices=list(TRAINERS)
    )
    parser.add_argument("--json", type=Path, help="file for every figure of every run")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--remat", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        report = TRAINERS[arguments.worker](arguments.steps, arguments.remat)
        print(json.dumps({**report, "peak_gb": peak_memory()}), flush=True)
        return
    cells = []
    for contender in arguments.contenders:
        if contender == "trl":
            cells += [("trl", "torch", False), ("trl", "torch", True)]
        else:
            cells += [(contender, backend, False) for backend in arguments.backends]
    print(f"{'':28}{'supervised tokens/s':>20}{'peak GB':>9}")
    results = []
    for number in range(arguments.rounds):
        for cell in cells:
            report = run(*cell, arguments)
            results.append({"cell": cell, "round": number, **report})
            name = " ".join(cell[:2]) + " recomputing" * cell[2]
            if "failed" in report:
                print(f"{name:28} failed: {report['failed']}", flush=True)
            else:
                rate, peak = report["rate"], report["peak_gb"]
                print(f"{name:28}{rate:20.1f}{peak:9.2f}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"shape": SHAPE, "runs": results}))


if __name__ == "__main__":
    main()
