"""Us and others on the same work, side by side: speed, start, memory, perplexity.

    python tools/bench/compare.py                          # everything, three rounds
    python tools/bench/compare.py --model real             # Gemma 3 270M, quantised
    python tools/bench/compare.py --who ours "limit jax" --what decode-1 --rounds 1

Contenders (KerasHub, ZeroModels, transformers, llama.cpp) are measured if they are
installed; README.md says how. Each runs in a process of its own, one after the other,
round after round: what compares is the ratio of medians in one run. Everything is
written to --json as soon as it is known, and the same command goes on with an
unfinished run; `--rounds 0` only prints it, and --picture draws it.

What can be measured (--what):

    import       seconds of the import alone, in a process of its own
    start        seconds to load; to the first answer (which compiles); the same again;
                 what the first prompt of another length costs more; peak memory so far
    ready        seconds from loaded to the first token, in a process of its own, which
                 finds what the round before left in a cache of compiled programs
    decode-N     tokens/s of N answers at once, without the prompt; time to first token
    prefill-N    tokens/s of a prompt of N tokens, to the first new token
    stream       tokens/s of the answer in pieces (ours only)
    lora         supervised tokens/s of finetune.py
    perplexity   of a passage of a novel (--model real)

"limit" is what the machine allows in each framework: see limits.py.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import signal
import subprocess
import sys
import tempfile
import time

import engines
import models
import passage
import picture
import report
from process import Process, python_for

HERE = pathlib.Path(__file__).parent
SPEED = ("decode-1", "decode-8", "prefill-128", "prefill-512", "prefill-2048")
WHAT = {
    "shape": ("import", "ready", "start", *SPEED, "stream", "lora"),
    "2b": ("ready", "start", *SPEED),
    "real": ("ready", "start", *SPEED, "stream", "perplexity"),
}
# Who can do what not everybody can.
ABLE = {
    "stream": lambda who: who.name in engines.VARIANTS,
    "perplexity": lambda who: (
        who.name in (*engines.VARIANTS, "transformers", "llama.cpp")
    ),
    "lora": lambda who: who.name in ("ours", "kerashub", "transformers"),
}
LORA_STEPS = 3


class Results:
    """What is known, kept in a file."""

    def __init__(self, path, settings):
        self.path = path
        self.known = {"settings": settings, "machine": machine(), "runs": []}
        if path.exists():
            self.known = json.loads(path.read_text())
            if self.known["settings"] != settings:
                raise SystemExit(
                    f"{path} holds a run of {self.known['settings']}; name another "
                    "file with --json, or remove it."
                )

    def add(self, who, round, **result):
        key = {"who": str(who), "round": round, "what": result["what"]}
        kept = [r for r in self.known["runs"] if {**r, **key} != r]
        self.known["runs"] = [*kept, {**key, **result}]
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.known, indent=1))
        partial.replace(self.path)
        told = report.in_words(result)
        print(f"round {round}  {who!s:30}{result['what']:13}{told}", flush=True)

    def missing(self, who, round, whats, again):
        """Of `whats`, those that this contender has not done in this round."""
        done = {
            run["what"]
            for run in self.known["runs"]
            if (run["who"], run["round"]) == (str(who), round)
            and not (again and "failed" in run)
        }
        return [what for what in whats if what not in done]


def machine():
    """The computer, as far as it decides how fast it goes."""
    name = platform.processor() or platform.machine()
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        lines = [x for x in info.read_text().splitlines() if "model name" in x]
        name = lines[0].split(":")[1].strip() if lines else name
    try:
        gpu = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
        ).stdout.strip()
    except OSError:
        gpu = ""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "memory_gib": round(memory),
        "gpu": gpu or None,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def list_of_work(options):
    """Pairs of a contender and what is measured of it."""
    everyone = engines.contenders(options.model, options.dtype)
    if "import" in options.what:
        for backend in engines.BACKENDS:
            everyone.append(engines.Contender("keras", backend, options.dtype[0]))
        everyone.append(engines.Contender("command", "jax", options.dtype[0]))
    work = []
    for who in everyone:
        if options.who and not any(
            set(each.split()) <= set(who.words) for each in options.who
        ):
            continue
        whats = [what for what in options.what if can(who, what, options.dtype[0])]
        if whats:
            work.append((who, whats))
    return work


def can(who, what, dtype):
    """Whether it makes sense to ask for it."""
    if who.name in ("keras", "command"):
        return what == "import"
    if who.name == "limit":
        return what in SPEED
    if what == "import" and who.dtype not in (dtype, "f32", models.REAL_TYPE):
        # It does not depend on the dtype.
        return False
    if what == "lora" and who.dtype != "float32":
        # finetune.py has no other.
        return False
    return ABLE.get(what, lambda who: True)(who)


class Bench:
    """The run: who is asked what, and what they answer."""

    def __init__(self, options, results):
        self.options, self.results = options, results
        minutes = options.minutes or float("inf")
        self.until = time.time() + 60 * minutes
        self.process = None
        signal.signal(signal.SIGTERM, self._stop)

    def _stop(self, *_):
        if self.process is not None:
            self.process.end("stopped")
        sys.exit("stopped; the same command goes on")

    def all(self):
        """Every round; returns whether there was time for everything."""
        for round in range(self.options.rounds):
            for who, whats in list_of_work(self.options):
                left = self.results.missing(who, round, whats, self.options.again)
                for group in groups(left):
                    while group:
                        if time.time() > self.until:
                            return False
                        self._ask(who, group, round)
                        group = self.results.missing(who, round, group, False)
        return True

    def _ask(self, who, whats, round):
        """One process; something is known of the first of `whats` afterwards."""
        environment = {"TF_CPP_MIN_LOG_LEVEL": "2", **os.environ}
        # A device given whole to who asks first would say nothing of what is needed.
        environment |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        environment |= {"TF_FORCE_GPU_ALLOW_GROWTH": "true"}
        environment["KERAS_BACKEND"] = who.backend or "none"
        python = python_for(who.words, self.options.python)
        if whats == ["lora"]:
            self._ask_for_lora(who, round, python, environment)
            return
        command = [python, str(HERE / "measure.py"), who.name, who.backend or "none"]
        command += [who.dtype, self.options.model, *whats, "--until", str(self.until)]
        self.process = process = Process(command, environment, self.options)
        begun = None
        for line in process.lines():
            said = json.loads(line)
            if "begin" in said:
                begun = said["begin"]
                process.more_time()
            else:
                begun = None
                self.results.add(who, round, **said)
        if process.reason:
            # Who cannot load can do nothing.
            failed = whats if begun in (None, "load") else [begun]
            for what in self.results.missing(who, round, failed, False):
                self.results.add(who, round, what=what, failed=process.reason)

    def _ask_for_lora(self, who, round, python, environment):
        names = {"transformers": "trl"}
        with tempfile.TemporaryDirectory() as folder:
            file = pathlib.Path(folder) / "figures.json"
            command = [python, str(HERE / "finetune.py"), "--backends", who.backend]
            command += ["--contenders", names.get(who.name, who.name)]
            command += ["--steps", str(LORA_STEPS), "--json", str(file)]
            self.process = process = Process(command, environment, self.options)
            for _ in process.lines():
                process.more_time()
            if process.reason:
                self.results.add(who, round, what="lora", failed=process.reason)
                return
            runs = json.loads(file.read_text())["runs"]
        self.results.add(who, round, what="lora", **best_of(runs))


def best_of(runs):
    """The fastest of a contender's ways to train: finetune.py has several of TRL's."""
    whole = [run for run in runs if "failed" not in run]
    if not whole:
        return {"failed": runs[-1]["failed"].splitlines()[-1][:200]}
    best = max(whole, key=lambda run: run["rate"])
    return {
        "tokens_per_s": best["rate"],
        "peak_gb": best["peak_gb"],
        "ways": {str(run["cell"]): [run["rate"], run["peak_gb"]] for run in whole},
    }


def groups(whats):
    """The same in runs that share a process."""
    alone = [[what] for what in whats if what in ("import", "ready", "lora")]
    together = [what for what in whats if [what] not in alone]
    return [*alone, *([together] if together else [])]


def prepare(options):
    """Writes the files that are missing, in a process that ends again."""
    wanted = {engines.source_of(who, options.model) for who, _ in list_of_work(options)}
    wanted -= {None}
    missing = [
        each for each in wanted if not models.file_of(options.model, each).exists()
    ]
    program = "import models, passage, sys\n"
    program += "for each in sys.argv[2:]: print(models.write(sys.argv[1], each))\n"
    if "perplexity" in options.what:
        program += "print(passage.write())"
        missing += [] if passage.windows_file().exists() else [models.REAL_TYPE]
    if missing:
        command = [sys.executable, "-c", program, options.model, *missing]
        if subprocess.run(command, cwd=HERE).returncode:
            raise SystemExit("A model or the text could not be written.")


def read_options():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=models.MODELS, default="shape")
    parser.add_argument(
        "--dtype", nargs="+", choices=models.FLOATS, default=["float32"]
    )
    parser.add_argument(
        "--who", nargs="+", help='words of names, such as ours, "ours torch", llama.cpp'
    )
    parser.add_argument("--what", nargs="+", help="see above; all by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=pathlib.Path, default="compare.json")
    parser.add_argument("--minutes", type=float, help="begin nothing more after these")
    parser.add_argument("--limit", type=float, default=300, help="s for a measurement")
    parser.add_argument("--memory", type=float, default=1e9, help="GB, of a process")
    parser.add_argument("--again", action="store_true", help="try again what failed")
    parser.add_argument(
        "--python",
        nargs="+",
        default=[],
        metavar="WORDS=PATH",
        help="another Python for some, such as zeromodels=/path/to/venv/bin/python",
    )
    parser.add_argument("--picture", type=pathlib.Path, help="an SVG to draw")
    options = parser.parse_args()
    options.what = options.what or WHAT[options.model]
    unknown = set(options.what) - set(WHAT["shape"]) - {"perplexity"}
    if unknown:
        parser.error(f"--what knows no {', '.join(sorted(unknown))}")
    return options


def main():
    """Measures, and tells."""
    options = read_options()
    results = Results(options.json, {"model": options.model})
    if options.rounds:
        prepare(options)
    whole = Bench(options, results).all()
    print(report.table(results.known))
    if options.picture:
        options.picture.write_text(picture.picture(results.known))
    if not whole:
        print("Not all of it is measured: the same command goes on.", file=sys.stderr)
        sys.exit(3)


if __name__ == "__main__":
    main()
