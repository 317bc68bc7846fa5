"""What is measured of one contender, in a process of its own.

compare.py starts it. It says on stdout, in a line of JSON each, what it begins and what
came of it, so that a process that dies has lost one measurement only.
"""

import argparse
import importlib.metadata
import json
import os
import sys
import time
import traceback

import engines
import memory
import models
import passage

PROMPT, NEW = 32, 32
OTHER_PROMPT = 45
# Each kind of call is timed this many times, after a first one that may compile.
CALLS = 2


class Prompts:
    """Token ids that no call was given before, lest a cache knows them."""

    def __init__(self, vocab):
        import numpy as np

        self.rng, self.vocab = np.random.default_rng(os.getpid()), vocab

    def __call__(self, rows, length):
        # Above the special tokens, and what random weights may not have rows for.
        return self.rng.integers(300, self.vocab - 300, (rows, length), "int32")


def seconds(call, *arguments):
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


def start(engine, prompts, load_s):
    """From nothing to an answer; the same again; and a prompt of another length."""
    report = {"load_s": load_s}
    for name, length in (
        ("first_s", PROMPT),
        ("again_s", PROMPT),
        ("other_s", OTHER_PROMPT),
        ("other_again_s", OTHER_PROMPT),
    ):
        report[name] = seconds(engine.generate, prompts(1, length), NEW)
    # How much longer the first prompt of another length took than the second of it.
    report["another_length_s"] = report["other_s"] - report["other_again_s"]
    return report


def decode(engine, prompts, rows):
    """Tokens a second after the first, and the time to the first.

    Two answers to prompts of the same length that differ by `NEW` tokens take times
    that differ by making these.
    """
    # Where prefill reads the whole array, the prompt is longer in place of the answer.
    padded = getattr(engine, "pads", False)
    short = (lambda: prompts(rows, PROMPT + padded * NEW), 1)
    kinds = {"long": (lambda: prompts(rows, PROMPT), 1 + NEW), "short": short}
    if padded:
        kinds["first"] = (lambda: prompts(rows, PROMPT), 1)
    times = {name: [] for name in kinds}
    cpu = []
    for turn in range(1 + CALLS):
        for name, (ids, new) in kinds.items():
            ids, before = ids(), time.process_time()
            spent = seconds(engine.generate, ids, new)
            if name == "long":
                cpu.append(time.process_time() - before)
            if turn:
                times[name].append(spent)
    best = {name: min(values) for name, values in times.items()}
    rate = rows * NEW / (best["long"] - best["short"])
    return {
        "tokens_per_s": rate,
        "first_token_s": best.get("first", best["short"]),
        "call_tokens_per_s": rows * (1 + NEW) / best["long"],
        "cpu_ms_per_token": 1e3 * min(cpu[1:]) / (rows * (1 + NEW)),
        "seconds": times,
    }


def prefill(engine, prompts, length):
    """Seconds from a prompt to its first token."""
    times = [seconds(engine.generate, prompts(1, length), 1) for _ in range(1 + CALLS)]
    best = min(times[1:])
    return {"tokens_per_s": length / best, "seconds": times}


def stream(engine, prompts):
    """Tokens a second of text that is given out piece by piece, against all at once."""
    times = {"stream": [], "generate": []}
    for turn in range(1 + CALLS):
        for name in times:
            call = engine.stream if name == "stream" else engine.generate
            spent = seconds(call, prompts(1, PROMPT), 1 + NEW)
            if turn:
                times[name].append(spent)
    best = {name: min(values) for name, values in times.items()}
    rate = (1 + NEW) / best["stream"]
    return {"tokens_per_s": rate, "of_generate": best["generate"] / best["stream"]}


def limit(engine, what):
    """What the machine allows, in the place of what a contender reaches."""
    kind, number = what.split("-")
    rows, head_rows = int(number), int(number) if kind == "decode" else 1
    spent, ways = engine.seconds(rows, head_rows, NEW, CALLS)
    report = {"tokens_per_s": rows / spent, "seconds": [spent], "ways": ways}
    report["gb_read"] = engine.bytes_read / 1e9
    report["gflop"] = engine.operations(rows, head_rows) / 1e9
    return report


def perplexity(engine, windows):
    """Of the text of passage.py, cut into windows that each begin anew."""
    import numpy as np

    total = count = 0
    for window in windows:
        total += engine.negative_log_likelihood(np.array(window, "int32"))
        count += len(window) - 1
    nats = total / count
    return {"perplexity": float(np.exp(nats)), "nats": nats, "tokens": count}


def imported(contender):
    """Seconds of the import alone, and the frameworks that came along."""
    names = {
        "keras": "import keras",
        "command": (
            "import sys; sys.argv = ['gemma-keras', '--help']; import gemma_keras.cli\n"
            "try: gemma_keras.cli.main()\nexcept SystemExit: pass"
        ),
        "ours": (
            "import gemma_keras\n"
            "for name in gemma_keras.__all__: getattr(gemma_keras, name)"
        ),
        "kerashub": "import keras_hub; keras_hub.models.GemmaCausalLM",
        "zeromodels": "from zeromodels.models.gemma import GemmaTextGenerate",
        "transformers": "import transformers; transformers.GemmaForCausalLM",
        "llama.cpp": "import llama_cpp",
    }
    program = names.get(contender.name, names["ours"])
    spent = seconds(exec, program, {})
    there = [name for name in ("jax", "tensorflow", "torch") if name in sys.modules]
    return {"import_s": spent, "frameworks": there}


def report_of(what, engine, prompts, load_s):
    if hasattr(engine, "seconds"):
        return limit(engine, what)
    if what == "ready":
        spent = seconds(engine.generate, prompts(1, PROMPT), 1)
        return {"load_s": load_s, "ready_s": spent, "of_load": spent / load_s}
    if what == "start":
        return start(engine, prompts, load_s)
    if what == "stream":
        return stream(engine, prompts)
    if what == "perplexity":
        return perplexity(engine, json.loads(passage.windows_file().read_text()))
    kind, number = what.split("-")
    return {"decode": decode, "prefill": prefill}[kind](engine, prompts, int(number))


class Answers:
    """Lines of JSON on stdout, which is stderr for all else that is printed."""

    def __init__(self):
        self.file = os.fdopen(os.dup(1), "w", buffering=1)
        # By number: libraries in C print too.
        os.dup2(2, 1)

    def __call__(self, **fields):
        print(json.dumps(fields), file=self.file)


def versions():
    """What is loaded that decides how fast it goes."""
    names = {"llama_cpp": "llama-cpp-python", "tensorflow": "tensorflow"}
    found = {}
    for name in "keras jax tensorflow torch keras_hub zeromodels transformers".split():
        names.setdefault(name, name.replace("_", "-"))
    for module, package in names.items():
        if module in sys.modules:
            try:
                found[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                found[package] = getattr(sys.modules[module], "__version__", "?")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("backend")
    parser.add_argument("dtype")
    parser.add_argument("model", choices=models.MODELS)
    parser.add_argument("what", nargs="+")
    parser.add_argument("--until", type=float, default=float("inf"))
    given = parser.parse_args()
    contender = engines.Contender(given.name, given.backend, given.dtype)
    say = Answers()
    if given.what == ["import"]:
        say(what="import", **imported(contender), versions=versions())
        return
    say(begin="load")
    engine = engines.make(contender, given.model)
    load_s = seconds(engine.load)
    prompts = Prompts(getattr(engine, "vocab", 1000))
    for what in given.what:
        if time.time() > given.until:
            break
        say(begin=what)
        # From the start of the process on, loading included, or of this alone.
        if what != "start":
            memory.reset()
        try:
            report = report_of(what, engine, prompts, load_s)
        except Exception as error:
            traceback.print_exc()
            say(what=what, failed=f"{type(error).__name__}: {error}"[:300])
            continue
        say(what=what, **report, peak_gb=memory.peak() / 1e9, versions=versions())


if __name__ == "__main__":
    main()
