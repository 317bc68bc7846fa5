"""Time and memory of converting a checkpoint to Hugging Face's format and back.

    python tools/bench/make_checkpoint.py gemma_2b_en /tmp/gemma_2b    # 5.0 GB
    python tools/bench/convert.py /tmp/gemma_2b /tmp/converted         # 10 GB more

The checkpoint goes to a KerasHub preset and from there to Hugging Face, each with
`gemma-keras convert` in a process of its own; every tensor is then compared with the
first, bit for bit. Peak memory is the process's own, without the mapped files that the
system may drop at any time, sampled every 20 ms.
"""

import argparse
import pathlib
import shutil
import sys
import time

import psutil

from gemma_keras.checkpoints import open_checkpoint

PROGRAM = (
    "import sys; sys.argv[0] = 'gemma-keras'; "
    "from gemma_keras import cli; sys.exit(cli.main())"
)


def convert(source, destination, to):
    """Runs the command; returns seconds, processor seconds and peak bytes."""
    command = [sys.executable, "-c", PROGRAM, "convert", source, destination]
    started = time.monotonic()
    child = psutil.Popen([*map(str, command), "--to", to])
    peak = cpu = 0
    while child.poll() is None:
        try:
            memory, times = child.memory_info(), child.cpu_times()
        except psutil.NoSuchProcess:
            break
        peak = max(peak, memory.rss - memory.shared)
        cpu = times.user + times.system
        time.sleep(0.02)
    if child.wait():
        raise SystemExit(f"convert --to {to} failed.")
    return time.monotonic() - started, cpu, peak


def same(first, second):
    """Whether two checkpoints hold the same config and the same bits."""
    with open_checkpoint(first) as a, open_checkpoint(second) as b:
        return a.config == b.config and all(
            (a.tensor(path).view("uint16") == b.tensor(path).view("uint16")).all()
            for path in a.config.weight_shapes()
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=pathlib.Path, help="bfloat16")
    parser.add_argument("scratch", type=pathlib.Path, help="made, and removed again")
    options = parser.parse_args()
    options.scratch.mkdir(parents=True)
    try:
        there, back = options.scratch / "there", options.scratch / "back"
        for source, target, to in (
            (options.checkpoint, there, "keras"),
            (there, back, "hf"),
        ):
            seconds, cpu, peak = convert(source, target, to)
            print(
                f"--to {to}: {seconds:.1f} s, {cpu:.1f} s of processor time, "
                f"{peak / 1e9:.2f} GB at the peak"
            )
        print("bit for bit the same:", same(options.checkpoint, back))
    finally:
        shutil.rmtree(options.scratch)


if __name__ == "__main__":
    main()
