"""Time and memory of converting a checkpoint to other formats and back.

    python tools/bench/make_checkpoint.py gemma_2b_en /tmp/gemma_2b    # 5.0 GB
    python tools/bench/convert.py /tmp/gemma_2b /tmp/converted         # 15 GB more
    python tools/bench/convert.py /tmp/gemma_7b /tmp/converted --ways keras --one-way

The checkpoint goes to each format and from there back to Hugging Face, each with
`gemma-keras convert` in a process of its own. What comes back, or with `--one-way` what
was written, is compared with the first, tensor by tensor and bit for bit, unless it
went through blocks of few bits. What is not needed any more is removed at once. Times
are until the disk has all, as is that of copying the files. Peak memory is the
process's own, without the mapped files that the system may drop at any time, sampled
every 20 ms.
"""

import argparse
import os
import pathlib
import shutil
import sys
import time

import numpy as np
import psutil

from gemma_keras.checkpoints import open_checkpoint

PROGRAM = (
    "import sys; sys.argv[0] = 'gemma-keras'; "
    "from gemma_keras import cli; sys.exit(cli.main())"
)

WAYS = ["hf", "keras", "torch", "gguf:bfloat16", "gguf:q8_0", "flax", "maxtext"]
SUFFIXES = {"gguf": ".gguf", "torch": ".ckpt"}
ROUNDED = {"q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "int8", "float16"}


def convert(source, destination, to, dtype=None):
    """Runs the command; gives seconds, processor seconds and peak bytes."""
    command = [sys.executable, "-c", PROGRAM, "convert", source, destination]
    command += ["--to", to, *(["--dtype", dtype] if dtype else [])]
    started = time.monotonic()
    child = psutil.Popen([*map(str, command)])
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
    os.sync()
    return time.monotonic() - started, cpu, peak


def copy(source, destination):
    """Seconds of copying a directory."""
    started = time.monotonic()
    shutil.copytree(source, destination)
    os.sync()
    return time.monotonic() - started


def size(path):
    """Bytes of a file, or of all in a directory."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def row(what, written, seconds, cpu=None, peak=None):
    """Prints a line of the table."""
    numbers = [
        f"{written / 1e9:.2f}",
        f"{seconds:.1f}",
        f"{written / seconds / 1e6:.0f}",
    ]
    numbers += ["" if cpu is None else f"{cpu:.1f}"]
    numbers += ["" if peak is None else f"{peak / 1e9:.2f}"]
    print(f"| {what} | {' | '.join(numbers)} |", flush=True)


def remove(path):
    """Removes a file or directory."""
    path.unlink() if path.is_file() else shutil.rmtree(path)


def there_and_back(checkpoint, scratch, way, one_way):
    """Converts both ways, or one, and prints a line for each."""
    to, _, dtype = way.partition(":")
    there, back = scratch / f"there{SUFFIXES.get(to, '')}", scratch / "back"
    measured = convert(checkpoint, there, to, dtype)
    words = f"to {way}"
    if one_way and dtype not in ROUNDED:
        words += f", {compared(checkpoint, there)}"
    row(words, size(there), *measured)
    if not one_way:
        measured = convert(there, back, "hf", "bfloat16")
        words = f"{way} back to hf"
        if dtype not in ROUNDED:
            words += f", {compared(checkpoint, back)}"
        row(words, size(back), *measured)
        remove(back)
    remove(there)


def compared(first, second):
    """Words about whether two checkpoints in bfloat16 hold the same bits."""
    count, largest = 0, 0.0
    with open_checkpoint(first) as a, open_checkpoint(second) as b:
        if a.config != b.config:
            return "another config"
        for path in a.config.weight_shapes():
            array = a.tensor(path)
            found = b.tensor(path).astype(array.dtype, copy=False)
            other = array.view("uint16") != found.view("uint16")
            if other.any():
                count += int(other.sum())
                largest = max(largest, float(np.abs(array[other]).max()))
    # Norms that are stored plus one.
    return f"all but {count}, up to {largest:.1e}" if count else "every bit"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=pathlib.Path, help="bfloat16")
    parser.add_argument("scratch", type=pathlib.Path, help="made, and removed again")
    parser.add_argument(
        "--ways", nargs="+", default=WAYS, help="format or format:dtype"
    )
    parser.add_argument("--one-way", action="store_true", help="takes less room")
    options = parser.parse_args()
    options.scratch.mkdir(parents=True)
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print("| | GB written | s | MB/s | cpu s | peak memory, GB |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    try:
        place = options.scratch / "copy"
        row(
            "copying the files",
            size(options.checkpoint),
            copy(options.checkpoint, place),
        )
        remove(place)
        for way in options.ways:
            there_and_back(options.checkpoint, options.scratch, way, options.one_way)
    finally:
        shutil.rmtree(options.scratch)
    print(f"load {os.getloadavg()[0]:.1f} at the end")


if __name__ == "__main__":
    main()
