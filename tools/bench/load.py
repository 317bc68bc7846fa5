"""Time and memory to load a checkpoint, and to generate from it, against transformers.

    python tools/bench/make_checkpoint.py gemma_2b_en /tmp/gemma_2b
    python tools/bench/load.py /tmp/gemma_2b

Each contender loads the directory in a fresh process, in the checkpoint's dtype, with
the files in the page cache, round after round in turn; then it generates 8 tokens. One
line a run, a table of medians at the end, JSON with --json.

Which number means what:

- anonymous (RssAnon): memory that is the process's alone. This is what must fit.
- file (RssFile): pages of mapped files, weights or libraries, which lie in the page
  cache anyway; the kernel takes clean ones back when memory runs short.
- RSS: their sum, and what `ru_maxrss` counts. A weight that was copied out of a mapped
  file counts twice while both are mapped.
- PSS: RSS with shared pages divided by the processes that share them.

"Of the model" divides by the bytes of the weights; the base is what the process held
before it loaded: the interpreter and the libraries.

Last comes what it costs to get the memory of the model from the system, and nothing
else, after five seconds in which a host may take idle memory back from a virtual
machine: some give it out again at 0.5 GB/s. Who maps files does not pay that; JAX and
TensorFlow need memory of their own. `--at-hand` loads with memory that the process got
before (glibc's allocator keeps it), which leaves only the work of loading.

transformers only maps the files; the first product reads them. We read every weight
while loading, to refuse NaN. "Ready" is therefore the fair time: loading, and for
transformers one pass over the weights. CPU seconds tell more on a busy machine.
"""

import argparse
import json
import mmap
import os
import resource
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

BACKENDS = ("jax", "tensorflow", "torch")
NEW_TOKENS = 8
PROMPT = [2, 651, 6996, 576, 573, 2134, 603, 476]
# A run that leaves the machine less than this ends itself before the kernel picks one.
LEAST_AVAILABLE = 700 * 2**20
TOO_LITTLE_MEMORY = 75
# One heap for all threads, which gives nothing back.
KEEP_MEMORY = ":".join(
    f"glibc.malloc.{name}"
    for name in ("mmap_max=0", "trim_threshold=1000000000000", "arena_max=1")
)


def memory():
    """Bytes of anonymous and file-backed resident memory of this process."""
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("RssAnon", "RssFile", "RssShmem"):
            found[name] = int(value.split()[0]) * 1024
    return found["RssAnon"] + found["RssShmem"], found["RssFile"]


def pss():
    """Bytes of proportional set size of this process."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no Pss in /proc/self/smaps_rollup")


def available():
    """Bytes that the machine can still give."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no MemAvailable in /proc/meminfo")


class Watch(threading.Thread):
    """Samples this process's memory, and ends it rather than let the machine choke."""

    def __init__(self, interval=0.02):
        super().__init__(daemon=True)
        self.interval = interval
        self.reset()

    def reset(self):
        self.peak = {"anonymous": 0, "file": 0, "rss": 0}

    def run(self):
        while True:
            anonymous, file = memory()
            now = {"anonymous": anonymous, "file": file, "rss": anonymous + file}
            self.peak = {name: max(now[name], self.peak[name]) for name in now}
            if available() < LEAST_AVAILABLE:
                print(f"stopped at {anonymous / 1e9:.2f} GB", file=sys.stderr)
                os._exit(TOO_LITTLE_MEMORY)
            time.sleep(self.interval)


def load_ours(directory):
    """Functions that load a model of ours, read it once, and continue `PROMPT`."""
    import numpy as np

    from gemma_keras import GemmaCausalLM

    def generate(lm):
        ids = np.array([PROMPT])
        inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
        return lm.generate(inputs, max_new_tokens=NEW_TOKENS, stop_token_ids=())

    def read(lm):
        """Nothing: loading has read every weight."""

    return lambda: GemmaCausalLM.from_preset(directory), read, generate


def load_transformers(directory):
    """The same with transformers."""
    import torch
    import transformers

    def load():
        return transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.bfloat16
        )

    def read(model):
        for weight in model.parameters():
            torch.aminmax(weight.detach())

    def generate(model):
        with torch.no_grad():
            return model.generate(
                torch.tensor([PROMPT]),
                attention_mask=torch.ones((1, len(PROMPT)), dtype=torch.long),
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
            )

    return load, read, generate


def run_worker(contender, directory, generate, at_hand):
    """Load, report; generate, report again: lines of JSON on stdout."""
    maker = load_transformers if contender == "transformers" else load_ours
    load, read, continue_prompt = maker(directory)
    # By a process of its own, so that this one's peak is that of loading.
    subprocess.run([sys.executable, __file__, "--warm", directory], check=True)
    if at_hand:
        import numpy as np

        np.empty(int(1.2 * weights(directory)[1]), np.uint8)[:: mmap.PAGESIZE] = 1
    base = memory()
    watch = Watch()
    watch.start()
    start, cpu_start = time.perf_counter(), time.process_time()
    model = load()
    seconds = time.perf_counter() - start
    read(model)
    ready, cpu = time.perf_counter() - start, time.process_time() - cpu_start
    anonymous, file = memory()
    peak = watch.peak
    result = {
        "load_s": seconds,
        "ready_s": ready,
        "ready_cpu_s": cpu,
        "base_anonymous": base[0],
        "base_rss": sum(base),
        "loaded_anonymous": anonymous,
        "loaded_rss": anonymous + file,
        "loaded_pss": pss(),
        "peak_anonymous": peak["anonymous"],
        "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    print(json.dumps(result), flush=True)
    if not generate:
        return
    watch.reset()
    for name in ("first_generate_s", "second_generate_s"):
        start = time.perf_counter()
        continue_prompt(model)
        result[name] = time.perf_counter() - start
    result["generating_anonymous"] = watch.peak["anonymous"]
    result["generating_rss"] = watch.peak["rss"]
    result["generated_pss"] = pss()
    print(json.dumps(result), flush=True)


def run(contender, arguments):
    """One run in a fresh process; what it reported, and how it ended."""
    environment = dict(os.environ)
    environment.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if contender != "transformers":
        environment["KERAS_BACKEND"] = contender
    command = [sys.executable, __file__, "--worker", contender, arguments.directory]
    if not arguments.generate:
        command.append("--no-generate")
    if arguments.at_hand:
        command.append("--at-hand")
        environment["GLIBC_TUNABLES"] = KEEP_MEMORY
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    reports = [x for x in done.stdout.splitlines() if x.startswith("{")]
    result = json.loads(reports[-1]) if reports else {}
    if done.returncode:
        result["failed"] = f"exit {done.returncode}: {done.stderr.strip()[-400:]}"
    return result


def weights(directory):
    """The files of a checkpoint, and their bytes."""
    files = sorted(Path(directory).glob("*.safetensors"))
    return files, sum(path.stat().st_size for path in files)


def warm(directory):
    """Read the files, so that no run pays for the disk; then touch free memory."""
    files, size = weights(directory)
    for path in files:
        with path.open("rb") as file:
            while file.read(2**26):
                pass
    touch(size)


def touch(size):
    """Seconds to get this many bytes from the system."""
    start = time.perf_counter()
    with mmap.mmap(-1, size) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        for at in range(0, size, mmap.PAGESIZE):
            memory[at] = 1
        return time.perf_counter() - start


def print_table(results, size):
    """Medians, in seconds, GB, and parts of the bytes of the weights."""
    print(f"\nweights: {size / 1e9:.2f} GB; medians")
    print(
        f"{'':13}{'load s':>8}{'ready s':>8}{'cpu s':>7}{'loaded':>8}{'peak':>7}"
        f"{'of model':>9}{'RSS of model':>13}{'gen. 8 s':>9}{'gen. anon':>10}"
        f"{'gen. RSS':>9}"
    )
    for contender, runs in results.items():
        names = {name for result in runs for name in result} - {"failed"}

        def median(name, names=names, runs=runs):
            if name not in names:
                return float("nan")
            return statistics.median(r[name] for r in runs if name in r)

        peak, base = median("peak_anonymous"), median("base_anonymous")
        # Weights that stay in their mapped file are no anonymous memory: count them.
        loaded = median("loaded_rss") - median("base_rss")
        over = max(peak - base, loaded)
        rss = median("peak_rss") - median("base_rss")
        print(
            f"{contender:13}{median('load_s'):8.2f}{median('ready_s'):8.2f}"
            f"{median('ready_cpu_s'):7.1f}{loaded / 1e9:8.2f}{peak / 1e9:7.2f}"
            f"{over / size:9.3f}{rss / size:13.3f}{median('second_generate_s'):9.2f}"
            f"{median('generating_anonymous') / 1e9:10.2f}"
            f"{median('generating_rss') / 1e9:9.2f}"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", help="a Hugging Face checkpoint")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--only", nargs="+", choices=(*BACKENDS, "transformers"), metavar="CONTENDER"
    )
    parser.add_argument("--no-generate", dest="generate", action="store_false")
    parser.add_argument(
        "--at-hand", action="store_true", help="memory that the process got before"
    )
    parser.add_argument("--json", type=Path, help="file for every figure of every run")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--warm", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.warm:
        warm(arguments.directory)
        return
    if arguments.worker:
        run_worker(
            arguments.worker,
            arguments.directory,
            arguments.generate,
            arguments.at_hand,
        )
        return
    contenders = arguments.only or (*BACKENDS, "transformers")
    _, size = weights(arguments.directory)
    results = {contender: [] for contender in contenders}
    for number in range(arguments.rounds):
        for contender in contenders:
            result = run(contender, arguments)
            results[contender].append(result)
            shown = {
                name: value
                if isinstance(value, str)
                else round(value if name.endswith("_s") else value / 1e9, 3)
                for name, value in result.items()
            }
            print(number, contender, shown, flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"bytes": size, "runs": results}))
    print_table(results, size)
    time.sleep(5)
    print(f"getting {size / 1e9:.2f} GB of memory alone: {touch(size):.2f} s")


if __name__ == "__main__":
    main()
