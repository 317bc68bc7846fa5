"""What importing gemma_keras costs beyond importing Keras, on the backend in use.

    KERAS_BACKEND=jax python tools/bench/import_time.py

Starts fresh processes in turn and prints the median of each kind, in seconds. The bound
of the design is `import keras` plus 0.2 s, for the package with every public name.
"""

import statistics
import subprocess
import sys

ROUNDS = 7
EVERY_NAME = (
    "import gemma_keras; [getattr(gemma_keras, n) for n in gemma_keras.__all__]"
)
HELP = (
    "import sys; sys.argv = ['gemma-keras', '--help']; import gemma_keras.cli\n"
    "try: gemma_keras.cli.main()\nexcept SystemExit: pass"
)
KINDS = {
    "import keras": "import keras",
    "import gemma_keras": "import gemma_keras",
    "every public name": EVERY_NAME,
    "gemma-keras --help": HELP,
}


def seconds(statements: str) -> float:
    """Time that a fresh process takes for the statements, without its own start."""
    program = (
        "import time, sys; start = time.perf_counter()\n"
        f"{statements}\nprint(time.perf_counter() - start, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return float(done.stderr.splitlines()[-1])


def main() -> None:
    """Measures and prints."""
    times = {name: [] for name in KINDS}
    for _ in range(ROUNDS):
        for name, statements in KINDS.items():
            times[name].append(seconds(statements))
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, median in medians.items():
        print(f"{name:22s} {median:7.3f}")
    extra = medians["every public name"] - medians["import keras"]
    print(f"{'beyond keras':22s} {extra:7.3f}  (at most 0.2)")


if __name__ == "__main__":
    main()
