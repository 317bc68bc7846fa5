"""Perplexity of Gemma 3 270M in 8 and 4 bits, rounded to the nearest and calibrated.

    python tools/bench/quantised.py                       # every way
    python tools/bench/quantised.py --ways "gptq 32 int8" # method, group, embedding

The reference is the model of floats that the file of tools/fetch_assets.py is decoded
to, which is quantised already (Q4_K_M): it says what another rounding adds, and nothing
of the genuine floats. Measured are windows of "Alice in Wonderland" (passage.py) and,
with --texts, of "As You Like It"; calibrated is with the start of two other texts, half
of the rows each. What is known is kept in --json, and the same command goes on.
"""

import argparse
import json
import math
import pathlib
import time

import models
import passage

GROUPS = (128, 64, 32)
WAYS = ["float", "int8"]
WAYS += [f"{m} {g} int8" for m in ("nearest", "gptq") for g in GROUPS]
WAYS += [f"{m} 128 int4" for m in ("nearest", "gptq")]
TEXTS = {"alice29": passage.BEGIN, "asyoulik": "ACT II"}
CALIBRATION = ("lcet10", "plrabn12")


def perplexity(lm, text, begin, windows):
    """Of windows of 511 tokens, each after a <bos> of its own."""
    import numpy as np
    from keras import ops

    from gemma_keras import backend

    tokenizer, text = lm.preprocessor.tokenizer, text[text.index(begin) :]
    rows = np.array(passage.windows_of(tokenizer, text, windows))
    total = 0.0
    with backend.no_gradient():
        hidden = lm.backbone({"token_ids": rows})
        # A whole window meets the head: restoring it takes as long for less.
        for row, states in zip(rows, hidden, strict=True):
            logits = ops.cast(lm.backbone.logits(states[:-1]), "float32")
            chosen = ops.take_along_axis(
                logits, ops.convert_to_tensor(row[1:, None]), 1
            )
            losses = ops.logsumexp(logits, axis=1) - chosen[:, 0]
            total += float(ops.convert_to_numpy(losses).sum(dtype="float64"))
    return math.exp(total / rows[:, 1:].size)


def quantise(lm, way, texts, rows):
    """Makes the model what a way says; returns seconds."""
    from gemma_keras import Calibration

    begun = time.monotonic()
    method, *how = way.split()
    if method == "int8":
        lm.quantize("int8")
    elif method != "float":
        options = {"group_size": int(how[0]), "embedding": how[1]}
        if method == "gptq":
            tokenizer, each = lm.preprocessor.tokenizer, rows // len(CALIBRATION)
            starts = [
                window
                for name in CALIBRATION
                for window in passage.windows_of(tokenizer, texts[name], each)
            ]
            options["calibration"] = Calibration(starts, rows, passage.LENGTH)
            options["progress"] = lambda *done: print(*done, end=" ", flush=True)
        lm.quantize("int4", **options)
    return time.monotonic() - begun


def table(known):
    """The results as Markdown."""
    texts = sorted({text for each in known.values() for text in each["perplexity"]})
    lines = [
        f"| way | {' | '.join(texts)} | MB | s |",
        "| --- " * (3 + len(texts)) + "|",
    ]
    for way, each in known.items():
        found = [each["perplexity"].get(text) for text in texts]
        found = ["" if x is None else f"{x:.2f}" for x in found]
        size, seconds = f"{each['bytes'] / 1e6:.0f}", f"{each['seconds']:.0f}"
        lines.append(f"| {way} | {' | '.join([*found, size, seconds])} |")
    return "\n".join(lines)


def main():
    """Measures what is not known yet, and prints everything."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, metavar="WAY")
    parser.add_argument("--texts", nargs="+", choices=TEXTS, default=["alice29"])
    parser.add_argument("--windows", type=int, default=passage.WINDOWS)
    parser.add_argument("--rows", type=int, default=32, help="of 512 tokens, to read")
    parser.add_argument("--json", type=pathlib.Path, default="quantised.json")
    options = parser.parse_args()
    known = json.loads(options.json.read_text()) if options.json.exists() else {}
    texts = passage.fetch(*passage.SHA256)
    source = models.write("real", "float32")
    from gemma_keras import GemmaCausalLM

    for way in options.ways:
        if way in known:
            continue
        lm = GemmaCausalLM.from_preset(source, dtype="float32")
        seconds = quantise(lm, way, texts, options.rows)
        known[way] = {
            "seconds": seconds,
            "bytes": sum(v.value.nbytes for v in lm.backbone.variables),
            "perplexity": {
                name: perplexity(lm, texts[name], TEXTS[name], options.windows)
                for name in options.texts
            },
        }
        options.json.write_text(json.dumps(known, indent=1))
        print(way, known[way], flush=True)
    print(table(known))


if __name__ == "__main__":
    main()
