"""Time and memory of converting a checkpoint to other formats and back.

    python tools/bench/make_checkpoint.py gemma_2b_en /tmp/gemma_2b    # 5.0 GB
    python tools/bench/convert.py /tmp/gemma_2b /tmp/converted         # 10 GB more

The checkpoint goes to a KerasHub preset and from there to Hugging Face, each with
`gemma-keras convert` in a process of its own; every tensor is then compared with the
first, bit for bit. Then it goes to GGUF, in bfloat16, which is compared too, and in
q8_0. What is not needed any more is removed at once. Peak memory is the process's own,
without the mapped files that the system may drop at any time, sampled every 20 ms.
"""

import argparse
import pathlib
import shutil
import sys
import time

import ml_dtypes
import psutil

from gemma_keras.checkpoints import open_checkpoint

PROGRAM = (
    "import sys; sys.argv[0] = 'gemma-keras'; "
    "from gemma_keras import cli; sys.exit(cli.main())"
)


def convert(source, destination, to, *options):
    """Runs the command; prints seconds, processor seconds and peak bytes."""
    command = [sys.executable, "-c", PROGRAM, "convert", source, destination]
    started = time.monotonic()
    child = psutil.Popen([*map(str, command), "--to", to, *options])
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
    print(
        f"--to {' '.join([to, *options])}: {time.monotonic() - started:.1f} s, "
        f"{cpu:.1f} s of processor time, {peak / 1e9:.2f} GB at the peak",
        flush=True,
    )


def same(first, second):
    """Whether two checkpoints hold the same config and the same bits."""
    with open_checkpoint(first) as a, open_checkpoint(second) as b:
        return a.config == b.config and all(
            (bits(a.tensor(path)) == bits(b.tensor(path))).all()
            for path in a.config.weight_shapes()
        )


def bits(array):
    """Of a weight in bfloat16; GGUF holds norms in float32, which lose nothing here."""
    return array.astype(ml_dtypes.bfloat16, copy=False).view("uint16")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=pathlib.Path, help="bfloat16")
    parser.add_argument("scratch", type=pathlib.Path, help="made, and removed again")
    options = parser.parse_args()
    options.scratch.mkdir(parents=True)
    try:
        there, back = options.scratch / "there", options.scratch / "back"
        convert(options.checkpoint, there, "keras")
        convert(there, back, "hf")
        print("bit for bit the same:", same(options.checkpoint, back), flush=True)
        shutil.rmtree(there)
        shutil.rmtree(back)
        file = options.scratch / "model.gguf"
        convert(options.checkpoint, file, "gguf", "--dtype", "bfloat16")
        print("bit for bit the same:", same(options.checkpoint, file), flush=True)
        file.unlink()
        convert(options.checkpoint, file, "gguf", "--dtype", "q8_0")
    finally:
        shutil.rmtree(options.scratch)


if __name__ == "__main__":
    main()
