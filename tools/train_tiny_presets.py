"""Train `gemma_tiny_en` and `gemma_tiny_instruct_en` from nothing, on a CPU.

    KERAS_BACKEND=jax python tools/train_tiny_presets.py

Stages: the vocabulary and the rows (a minute), the base model, the instruct model
from it, and the evaluation. A checkpoint is written every few minutes; the same command
goes on from it, after a SIGKILL too. `--quick` runs all of it in a minute or two on a
toy size, to see that it works; what it writes is no model.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import random
import sys
import time

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(pathlib.Path(__file__).parent)]
os.environ.setdefault("KERAS_BACKEND", "jax")

import keras  # noqa: E402
import numpy as np  # noqa: E402
import tiny_corpus  # noqa: E402
from tiny_corpus_chat import Chats, evaluation_set  # noqa: E402

from gemma_keras.backbone import GemmaBackbone  # noqa: E402
from gemma_keras.causal_lm import GemmaCausalLM  # noqa: E402
from gemma_keras.config import GemmaConfig  # noqa: E402
from gemma_keras.preprocessor import GemmaCausalLMPreprocessor  # noqa: E402
from gemma_keras.tokenizer import GemmaTokenizer  # noqa: E402

SEED = 20261123


@dataclasses.dataclass(frozen=True)
class Stage:
    """Sizes of one stage: rows of `length` tokens, `batch` of them a step."""

    steps: int
    batch: int
    length: int
    rate: float


@dataclasses.dataclass(frozen=True)
class Run:
    """Sizes of a training run."""

    config: GemmaConfig
    stages: dict[str, Stage]
    # Steps between two checkpoints.
    chunk: int = 100
    held_out_rows: int = 48
    # Held-out chats of each kind.
    evaluation: int = 8


FULL = Run(
    GemmaConfig(
        vocab_size=3072,
        num_layers=4,
        hidden_dim=256,
        ffn_dim=512,
        num_query_heads=4,
        num_kv_heads=1,
        head_dim=64,
        query_pre_attn_scalar=64,
        max_position=256,
    ),
    {
        "base": Stage(steps=1100, batch=8, length=256, rate=3e-3),
        "chat": Stage(steps=6200, batch=8, length=128, rate=1.5e-3),
    },
)
QUICK = Run(
    dataclasses.replace(FULL.config, num_layers=1, hidden_dim=64, ffn_dim=64),
    {
        "base": Stage(steps=10, batch=2, length=128, rate=3e-3),
        "chat": Stage(steps=10, batch=2, length=128, rate=1.5e-3),
    },
    chunk=5,
    held_out_rows=4,
    evaluation=1,
)


def log(message: str):
    print(time.strftime("%H:%M:%S"), message, flush=True)


def make_tokenizer(run: Run, work: pathlib.Path, real: list[str]):
    """The vocabulary, learned from a sample of both corpora, or the one in `work`."""
    path = work / "tokenizer.model"
    if not path.exists():
        rng = random.Random(SEED)
        documents = list(tiny_corpus.base_documents(rng, real, 40_000))
        chats = Chats(rng)
        drawn = [chats.chat() for _ in range(20_000)]
        tokenizer = tiny_corpus.train_tokenizer(documents, drawn, run.config.vocab_size)
        partial = path.with_suffix(".partial")
        partial.write_bytes(tokenizer.proto)
        partial.replace(path)
    return GemmaTokenizer(str(path))


def make_rows(run: Run, stage: str, work: pathlib.Path, tokenizer, real: list[str]):
    """Rows for the training and the held-out loss of a stage, or those in `work`."""
    path = work / f"{stage}_rows.npz"
    sizes = run.stages[stage]
    count = sizes.steps * sizes.batch + run.held_out_rows
    if not path.exists():
        if stage == "base":
            documents = tiny_corpus.base_documents(random.Random(SEED + 1), real, 10**9)
            rows = tiny_corpus.packed_documents(
                tokenizer, documents, sizes.length, count
            )
        else:
            chats = Chats(random.Random(SEED + 2))
            rows = tiny_corpus.packed_chats(tokenizer, chats, real, sizes.length, count)
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, **rows)
        partial.replace(path)
    with np.load(path) as rows:
        return dict(rows)


def select(rows: dict, part: slice) -> dict:
    """Arguments of `fit` and `evaluate` for a part of the rows."""
    names = [name for name in ("token_ids", "segment_ids") if name in rows]
    weights = rows.get("weights", np.ones_like(rows["y"], "float32"))
    return {
        "x": {name: rows[name][part] for name in names},
        "y": rows["y"][part],
        "sample_weight": weights[part],
    }


def build(run: Run, sizes: Stage):
    """A new model with its optimiser: AdamW, warm-up, then a cosine to a twentieth."""
    keras.utils.set_random_seed(SEED)
    model = GemmaCausalLM(GemmaBackbone(run.config))
    rate = sizes.rate
    warm = max(1, sizes.steps // 30)
    schedule = keras.optimizers.schedules.CosineDecay(
        rate / 50, sizes.steps - warm, alpha=0.03, warmup_target=rate, warmup_steps=warm
    )
    optimizer = keras.optimizers.AdamW(
        schedule, weight_decay=0.05, beta_2=0.98, global_clipnorm=1.0
    )
    optimizer.exclude_from_weight_decay(var_names=["scale"])
    # A mean over the learned tokens, whatever part of a row they are.
    model.compile(
        optimizer=optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, reduction="mean_with_sample_weight"
        ),
        weighted_metrics=[],
    )
    return model


def train(run: Run, stage: str, rows: dict, work: pathlib.Path, start=None):
    """Train a stage with `fit`, a chunk at a time, going on from its checkpoint.

    Args:
        run: the sizes.
        stage: "base" or "chat".
        rows: what `make_rows` gave.
        work: folder of the checkpoints.
        start: model whose weights the new one begins with.
    """
    sizes = run.stages[stage]
    steps, batch = sizes.steps, sizes.batch
    checkpoint = work / f"{stage}.keras"
    if checkpoint.exists():
        model = keras.saving.load_model(checkpoint)
    else:
        model = build(run, sizes)
        if start is not None:
            model.set_weights(start.get_weights())
    done = int(model.optimizer.iterations)
    log(f"{stage}: {model.count_params():,} parameters, {done} of {steps} steps done")
    while done < steps:
        began = time.perf_counter()
        todo = min(run.chunk, steps - done)
        part = slice(done * batch, (done + todo) * batch)
        history = model.fit(
            **select(rows, part),
            batch_size=batch,
            shuffle=False,
            verbose=0,
        )
        done += todo
        partial = work / f"{stage}.partial.keras"
        model.save(partial)
        os.replace(partial, checkpoint)
        speed = todo * batch * sizes.length / (time.perf_counter() - began)
        loss = history.history["loss"][-1]
        log(f"{stage}: step {done} loss {loss:.4f}, {speed:.0f} tokens/s")
    first = steps * batch
    held_out = slice(first, first + run.held_out_rows)
    loss = model.evaluate(**select(rows, held_out), batch_size=batch, verbose=0)
    log(f"{stage}: held-out loss {loss:.4f}")
    return model


def save(model, tokenizer, directory: pathlib.Path):
    """Write the preset in bfloat16."""
    backbone = GemmaBackbone(model.config, dtype="bfloat16")
    backbone.set_weights(model.get_weights())
    preprocessor = GemmaCausalLMPreprocessor(
        tokenizer, sequence_length=model.config.max_position
    )
    lm = GemmaCausalLM(backbone, preprocessor)
    lm.save_to_preset(str(directory), overwrite=True)
    return lm


def answer_chats(lm, chats: list[dict], limit: int = 120) -> list[list[str]]:
    """The model's own answers to the user turns of each chat, in batches.

    An answer that did not stop by itself comes back with "..." after it.
    """
    histories: list[list[dict]] = [[] for _ in chats]
    for turn in range(max(len(chat["turns"]) for chat in chats)):
        asked = [i for i, chat in enumerate(chats) if turn < len(chat["turns"])]
        for i in asked:
            content = chats[i]["turns"][turn]
            histories[i].append({"role": "user", "content": content})
        prompts = [histories[i] for i in asked]
        texts = []
        for begin in range(0, len(prompts), 64):
            texts += lm.generate(
                prompts[begin : begin + 64], max_new_tokens=limit, strip_prompt=True
            )
        for i, text in zip(asked, texts, strict=True):
            end = "" if len(lm.preprocessor.tokenizer.encode(text)) < limit else "..."
            histories[i].append({"role": "model", "content": text + end})
    return [
        [turn["content"] for turn in history if turn["role"] == "model"]
        for history in histories
    ]


def evaluate(lm, chats: list[dict]):
    """Print the share of right last answers by kind, and every wrong one."""
    right: dict[str, list[bool]] = {}
    for chat, answers in zip(chats, answer_chats(lm, chats), strict=True):
        good = answers == chat["answers"]
        right.setdefault(chat["kind"], []).append(good)
        if not good:
            log(f"wrong: {chat['turns']} -> {answers}, not {chat['answers']}")
    for kind, marks in right.items():
        log(f"{kind}: {sum(marks)} of {len(marks)}")
    marks = [mark for each in right.values() for mark in each]
    log(f"right: {sum(marks)} of {len(marks)} = {sum(marks) / len(marks):.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--work",
        type=pathlib.Path,
        default=pathlib.Path.home() / ".cache/gemma_keras/tiny",
        help="folder for the corpus and the checkpoints",
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=REPOSITORY / "presets",
        help="folder that the presets are written into",
    )
    parser.add_argument("--quick", action="store_true", help="a toy run of everything")
    args = parser.parse_args()
    run, work, out = FULL, args.work, args.out
    if args.quick:
        run, work, out = QUICK, args.work / "quick", args.work / "quick/presets"
    work.mkdir(parents=True, exist_ok=True)
    real = tiny_corpus.wordnet_sentences(args.work)
    log(f"{len(real)} sentences of WordNet, Keras on {keras.config.backend()}")
    tokenizer = make_tokenizer(run, work, real)
    rows = make_rows(run, "base", work, tokenizer, real)
    base = train(run, "base", rows, work)
    rows = make_rows(run, "chat", work, tokenizer, real)
    chat = train(run, "chat", rows, work, start=base)
    save(base, tokenizer, out / "gemma_tiny_en")
    lm = save(chat, tokenizer, out / "gemma_tiny_instruct_en")
    chats = evaluation_set(random.Random(SEED), run.evaluation)
    lines = [json.dumps(chat) + "\n" for chat in chats]
    (out / "gemma_tiny_instruct_en_eval.jsonl").write_text("".join(lines))
    evaluate(lm, chats)


if __name__ == "__main__":
    main()
