"""LoRA on Gemma 3 270M and a real set of instructions, by us and by TRL + PEFT.

    python tools/bench/instruct.py /tmp/instruct            # data, runs, table
    python tools/bench/instruct.py /tmp/instruct --who jax trl

The instructions ask for the names of countries, languages and currencies in other
languages, as the Unicode Common Locale Data Repository has them (Unicode License v3,
which allows it), by way of the package Babel: 1,200 to learn from and 300 that are kept
apart. Only names that are not as in English are asked for.

Every contender starts from the same weights (the Q4_K_M file, restored to float32), and
with LoRA as PEFT begins it. Batches differ: ours packs rows of 384 tokens, some 25
examples, TRL takes 25 examples, in an order of its own. All adapters, TRL's too, are
measured by the same program: the loss on what was kept apart, and how many of its
answers are right to the letter. Ours runs as `gemma-keras sft`, whose report is in the
folder of its run.
"""

import argparse
import json
import os
import pathlib
import random
import subprocess
import sys
import time

import models
from plan import COMMAND

LANGUAGES = {"de": "German", "fr": "French", "es": "Spanish", "it": "Italian"}
KINDS = {"territories": "country", "languages": "language", "currencies": "currency"}
LEARNED, KEPT = 1200, 300
SETTINGS = {
    "lora_rank": 8,
    "lora_alpha": 16.0,
    "lora_targets": ["query", "key", "value", "attention_output"],
    "learning_rate": 1e-3,
    "schedule": "linear",
    "warmup": 0.05,
    "weight_decay": 0.0,
    "clip_norm": 1.0,
    "epochs": 2,
    "seed": 0,
}
EXAMPLES, LENGTH = 25, 384
CONTENDERS = ("jax", "torch", "tensorflow", "trl")


def write_data(folder):
    """Writes `learned.jsonl` and `kept.jsonl`."""
    from babel import Locale

    english, rows = Locale("en"), []
    for code, language in LANGUAGES.items():
        locale = Locale(code)
        for kind, word in KINDS.items():
            theirs = getattr(locale, kind)
            for key, name in getattr(english, kind).items():
                other = theirs.get(key)
                # Codes without a name, and regions such as the whole world, are left.
                if (
                    not other
                    or other == name
                    or (kind == "territories" and len(key) > 2)
                ):
                    continue
                prompt = f"The {word} {name} is called in {language}:"
                rows.append({"prompt": prompt, "response": f" {other}"})
    random.Random(0).shuffle(rows)
    parts = {"learned": rows[:LEARNED], "kept": rows[LEARNED : LEARNED + KEPT]}
    for name, part in parts.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def config_of(folder, name):
    """The `RunConfig` of one of our runs."""
    from gemma_keras.sft.config import RunConfig

    return RunConfig(
        preset=str(models.file_of("real", "float32")),
        train=[str(folder / "learned.jsonl")],
        validation=[str(folder / "kept.jsonl")],
        template="text",
        sequence_length=LENGTH,
        batch_size=1,
        out=str(folder / name),
        exact_match=KEPT,
        **SETTINGS,
    )


def train_ours(folder, name):
    """`gemma-keras sft`, in a process of its own."""
    from gemma_keras.sft.report import read_metrics

    config = folder / f"{name}.yaml"
    config.write_text(config_of(folder, name).as_yaml(), encoding="utf-8")
    command = [sys.executable, "-c", COMMAND, "sft", str(config)]
    start = time.perf_counter()
    environment = {**os.environ, "KERAS_BACKEND": name, "TF_CPP_MIN_LOG_LEVEL": "2"}
    subprocess.run(command, env=environment, check=True)
    info = json.loads((folder / name / "run.json").read_text())
    last = read_metrics(folder / name / "metrics.csv")[-1]
    return {
        "adapter": str(folder / name / "adapter"),
        "wall_s": time.perf_counter() - start,
        "train_s": last["seconds"],
        "steps": int(last["step"]),
        "peak_gb": last["peak_memory_gb"],
        "before": info["before"],
    }


def train_trl(folder):
    """TRL's SFTTrainer with the same rows, tokens, settings and number of epochs."""
    import datasets
    import peft
    import torch
    import transformers
    import trl

    transformers.set_seed(SETTINGS["seed"])
    rows = json.loads((folder / "tokens.json").read_text())
    path = str(models.file_of("real", "float32"))
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    targets = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
    targets["attention_output"] = "o_proj"
    steps = SETTINGS["epochs"] * -(-len(rows) // EXAMPLES)
    trainer = trl.SFTTrainer(
        model,
        args=trl.SFTConfig(
            output_dir=str(folder / "trl"),
            per_device_train_batch_size=EXAMPLES,
            max_length=LENGTH,
            learning_rate=SETTINGS["learning_rate"],
            lr_scheduler_type=SETTINGS["schedule"],
            warmup_steps=round(SETTINGS["warmup"] * steps),
            weight_decay=SETTINGS["weight_decay"],
            max_grad_norm=SETTINGS["clip_norm"],
            num_train_epochs=SETTINGS["epochs"],
            seed=SETTINGS["seed"],
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            report_to=[],
            logging_steps=10,
            disable_tqdm=True,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(
            r=SETTINGS["lora_rank"],
            lora_alpha=SETTINGS["lora_alpha"],
            target_modules=[targets[name] for name in SETTINGS["lora_targets"]],
        ),
    )
    start = time.perf_counter()
    trainer.train()
    spent = time.perf_counter() - start
    trainer.model.save_pretrained(str(folder / "trl" / "adapter"))
    return {
        "adapter": str(folder / "trl" / "adapter"),
        "train_s": spent,
        "steps": trainer.state.global_step,
    }


def write_tokens(folder):
    """The rows as tokens, for TRL: what it would make of them is no matter here."""
    from gemma_keras import read_examples
    from gemma_keras.loading import load_preprocessor, open_source

    with open_source(str(models.file_of("real", "float32"))) as checkpoint:
        encode = load_preprocessor(checkpoint).encoder(chat_template=False)
    rows = []
    for example in read_examples(folder / "learned.jsonl"):
        ids, learn, _ = encode(example)
        labels = [i if wanted else -100 for i, wanted in zip(ids, learn, strict=True)]
        rows.append({"input_ids": ids, "labels": labels})
    (folder / "tokens.json").write_text(json.dumps(rows))


def measure(folder, adapter):
    """Loss on what was kept apart, and the answers that are right, of an adapter."""
    from gemma_keras import GemmaCausalLM, evaluation, read_examples
    from gemma_keras.encoding import encode_examples

    lm = GemmaCausalLM.from_preset(str(models.file_of("real", "float32")))
    if adapter:
        lm.load_adapter(adapter)
    encoder = lm.preprocessor.encoder(chat_template=False)
    examples = list(read_examples(folder / "kept.jsonl"))
    kept = encode_examples(examples, encoder, LENGTH)
    pairs = [kept[i] for i in range(len(kept))]
    found = evaluation.perplexity(evaluation.Scorer(lm), pairs)
    match = evaluation.exact_match(lm, pairs)
    return {
        "loss": found.loss,
        "perplexity": found.perplexity,
        "accuracy": found.accuracy,
        "right": match["right"],
        "asked": match["asked"],
    }


def worker(folder, task, *arguments):
    """Does something in a process of its own; returns what it found."""
    target = folder / f"{task}.result.json"
    command = [sys.executable, __file__, str(folder), "--task", task, *arguments]
    environment = {**os.environ, "KERAS_BACKEND": "torch"}
    subprocess.run(command, env=environment, check=True)
    return json.loads(target.read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--who", nargs="+", default=CONTENDERS, choices=CONTENDERS)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    parser.add_argument("--adapter", help=argparse.SUPPRESS)
    given = parser.parse_args()
    folder = given.folder.resolve()
    if given.task:
        tasks = {
            "tokens": lambda: write_tokens(folder),
            "trl": lambda: train_trl(folder),
            "measure": lambda: measure(folder, given.adapter),
        }
        found = tasks[given.task]()
        (folder / f"{given.task}.result.json").write_text(json.dumps(found))
        return
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "kept.jsonl").exists():
        write_data(folder)
    models.write("real", "float32")
    worker(folder, "tokens")
    table = folder / "instruct.json"
    known = json.loads(table.read_text()) if table.exists() else {}
    if "before" not in known:
        known["before"] = worker(folder, "measure")
        table.write_text(json.dumps(known, indent=1))
    for who in given.who:
        if who not in known:
            run = train_ours(folder, who) if who != "trl" else worker(folder, "trl")
            measured = worker(folder, "measure", "--adapter", run["adapter"])
            known[who] = {**run, **measured}
            table.write_text(json.dumps(known, indent=1))
    print(f"\n{'':12}{'loss':>9}{'perplexity':>12}{'right':>12}{'steps':>7}{'s':>8}")
    for who, found in known.items():
        right = f"{found['right']} of {found['asked']}"
        more = f"{found.get('steps', 0):7}{found.get('train_s', 0):8.0f}"
        figures = f"{found['loss']:9.4f}{found['perplexity']:12.3f}{right:>12}"
        print(f"{who:12}{figures}{more}")


if __name__ == "__main__":
    main()
