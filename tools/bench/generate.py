"""Greedy generation beside KerasHub's on each backend, and transformers'.

    python tools/bench/generate.py --rounds 3 --json figures.json

The model is that of contenders.py: 264M parameters, random weights. A prompt of
32 tokens is continued by 32, in batches of 1 and of 8. Every contender runs in its own
process, one after the other, round after round; ratios within a run are what compares,
since a machine that others use is slower at one time than at another. The first call,
which compiles, is told apart; of the following calls in a process the fastest counts,
and over the rounds the median, with the slowest and fastest beside it. Processor time a
token counts all threads and no waiting for a turn: the steadier measure on a machine
that has no time to spare.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from contenders import SHAPE, keras_hub_model, our_model, transformers_model

BACKENDS = ("jax", "tensorflow", "torch")
PROMPT_TOKENS = NEW_TOKENS = 32
TIMED_CALLS = 2


def prompts(batch_size):
    """Token ids [B, PROMPT_TOKENS] that hold no special token."""
    import numpy as np

    rng = np.random.default_rng(0)
    return rng.integers(10, SHAPE["vocab"], (batch_size, PROMPT_TOKENS), "int32")


def make_ours(dtype):
    """A function that continues the prompts of a batch."""
    import numpy as np

    lm = our_model(dtype)

    def generate(ids):
        inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
        lm.generate(inputs, max_new_tokens=NEW_TOKENS, stop_token_ids=())

    return generate


def make_keras_hub(dtype):
    """The same of KerasHub, given a cache of exactly the length that is needed."""
    import numpy as np

    lm = keras_hub_model(dtype)
    lm.compile(sampler="greedy")

    def generate(ids):
        room = np.zeros((len(ids), NEW_TOKENS), "int32")
        inputs = {
            "token_ids": np.concatenate([ids, room], axis=1),
            "padding_mask": np.concatenate([np.ones_like(ids), room], axis=1),
        }
        lm.generate(inputs, stop_token_ids=None)

    return generate


def make_transformers(dtype):
    """The same of transformers, on torch."""
    import torch

    model = transformers_model(dtype).eval()

    def generate(ids):
        ids = torch.from_numpy(ids).long()
        with torch.no_grad():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
            )

    return generate


MAKERS = {"ours": make_ours, "kerashub": make_keras_hub}


def run_worker(contender, dtype, batches):
    """Time the calls of one contender: a line of JSON on stdout."""
    generate = MAKERS.get(contender, make_transformers)(dtype)
    result = {}
    for batch_size in batches:
        ids = prompts(batch_size)
        times, cpu = [], []
        for _ in range(1 + TIMED_CALLS):
            start, cpu_start = time.perf_counter(), time.process_time()
            generate(ids)
            times.append(time.perf_counter() - start)
            cpu.append(time.process_time() - cpu_start)
        result[batch_size] = {
            "first_s": times[0],
            "later_s": times[1:],
            "later_cpu_s": cpu[1:],
        }
    print(json.dumps(result), flush=True)


def run(contender, backend, arguments):
    """One run in a fresh process: what it reported, or why it did not."""
    environment = dict(os.environ, KERAS_BACKEND=backend)
    environment.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    batches = [str(batch_size) for batch_size in arguments.batches]
    command = [sys.executable, __file__, "--worker", contender]
    command += ["--dtype", arguments.dtype, "--batches", *batches]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        reason = done.stderr.strip()[-400:]
        print(f"{contender} {backend} failed: {reason}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def tokens_per_second(runs, batch_size):
    """The best call of each run, as tokens a second, sorted."""
    made = batch_size * NEW_TOKENS
    return sorted(made / min(run[str(batch_size)]["later_s"]) for run in runs)


def print_table(results, batches):
    """Medians over the rounds, slowest to fastest, and ratios to KerasHub's."""
    for batch_size in batches:
        print(f"\nbatch {batch_size}: tokens/s, prompt and answer in one call")
        print(
            f"{'':24}{'median':>8}{'slowest':>9}{'fastest':>9}{'first call s':>14}"
            f"{'of KerasHub':>13}{'cpu ms/token':>14}"
        )
        medians = {}
        for (contender, backend), runs in results.items():
            if not runs:
                continue
            rates = tokens_per_second(runs, batch_size)
            medians[contender, backend] = statistics.median(rates)
        for (contender, backend), median in medians.items():
            runs = results[contender, backend]
            rates = tokens_per_second(runs, batch_size)
            first = statistics.median(r[str(batch_size)]["first_s"] for r in runs)
            rival = medians.get(("kerashub", backend))
            ratio = f"{median / rival:.2f}" if rival else ""
            cpu = statistics.median(
                min(r[str(batch_size)]["later_cpu_s"]) for r in runs
            )
            cpu_ms = 1e3 * cpu / (batch_size * NEW_TOKENS)
            print(
                f"{contender + ' ' + backend:24}{median:8.1f}{rates[0]:9.1f}"
                f"{rates[-1]:9.1f}{first:14.1f}{ratio:>13}{cpu_ms:14.1f}"
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--backends", nargs="+", default=BACKENDS, choices=BACKENDS)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--contenders",
        nargs="+",
        default=[*MAKERS, "transformers"],
        choices=[*MAKERS, "transformers"],
    )
    parser.add_argument("--json", type=Path, help="file for every figure of every run")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        run_worker(arguments.worker, arguments.dtype, arguments.batches)
        return
    cells = [
        (contender, backend)
        for backend in arguments.backends
        for contender in arguments.contenders
        if contender != "transformers" or backend == "torch"
    ]
    results = {cell: [] for cell in cells}
    for number in range(arguments.rounds):
        for contender, backend in cells:
            result = run(contender, backend, arguments)
            if result is None:
                continue
            results[contender, backend].append(result)
            rates = {
                batch_size: round(tokens_per_second([result], batch_size)[0], 1)
                for batch_size in arguments.batches
            }
            print(f"round {number}: {contender} {backend}: {rates}", flush=True)
    print_table(results, arguments.batches)
    if arguments.json:
        named = {" ".join(cell): runs for cell, runs in results.items()}
        arguments.json.write_text(json.dumps({"shape": SHAPE, "runs": named}, indent=1))


if __name__ == "__main__":
    main()
