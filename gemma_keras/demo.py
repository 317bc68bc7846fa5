"""The demo: a tiny Gemma is asked, taught with LoRA, and asked again.

Model and lessons come with the package; nothing is fetched.
"""

import json
import math
import pathlib
import random
import tempfile
import time

import keras
from rich import progress

from gemma_keras import registry
from gemma_keras.causal_lm import GemmaCausalLM
from gemma_keras.chat import encode_chat
from gemma_keras.console import bars, loading, say

PRESET = "gemma_tiny_instruct_en"
RANK = 8
TARGETS = ("query", "value", "ffw_gating", "ffw_gating_2", "ffw_linear")
LEARNING_RATE = 5e-3
EPOCHS = 12
# So that every batch is full: JAX compiles a step anew for one that is not.
BATCH_SIZE = 9


class TrainingProgress(keras.callbacks.Callback):
    """Shows a bar with loss and tokens a second; a line for the whole remains.

    Args:
        tokens: how many tokens an epoch has, padding not counted.
    """

    def __init__(self, tokens):
        super().__init__()
        self.tokens = tokens

    def on_train_begin(self, logs=None):
        columns = (
            progress.TextColumn("Training"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.description}"),
            progress.TimeElapsedColumn(),
        )
        self.steps = 0
        self.first_loss = self.started = self.rate = None
        self.display = bars(*columns)
        self.display.start()
        total = self.params["steps"] * self.params["epochs"]
        self.task = self.display.add_task("starting", total=total)

    def on_train_batch_end(self, batch, logs=None):
        self.steps += 1
        if self.started is None:
            # The first step compiles, so that the clock starts after it.
            self.first_loss, self.started = logs["loss"], time.monotonic()
            return
        each = self.tokens / self.params["steps"]
        self.rate = each * (self.steps - 1) / (time.monotonic() - self.started)
        text = f"loss {logs['loss']:.3f}, {self.rate:,.0f} tokens/s"
        self.display.update(self.task, completed=self.steps, description=text)

    def on_train_end(self, logs=None):
        self.display.stop()
        line = f"{self.steps} steps: loss {self.first_loss:.3f} to {logs['loss']:.3f}"
        say(line if self.rate is None else f"{line}, {self.rate:,.0f} tokens/s")


def read_lessons(folder):
    """The chats to learn from, and the questions to ask, as `presets/demo` has them."""
    lines = (folder / "lessons.jsonl").read_text("utf-8").splitlines()
    chats = [
        [
            {"role": "user", "content": lesson["prompt"]},
            {"role": "assistant", "content": lesson["response"]},
        ]
        for lesson in map(json.loads, lines)
    ]
    return chats, json.loads((folder / "questions.json").read_text("utf-8"))


def load(source):
    """The model of a preset, with progress on stderr."""
    with loading(source) as show:
        return GemmaCausalLM.from_preset(source, progress=show)


def ask(lm, question):
    """Prints a question and the answer; returns the answer."""
    print(f"  You:   {question}", flush=True)
    answer = lm.start_chat().send(question, max_new_tokens=64).strip()
    print(f"  Gemma: {answer}", flush=True)
    return answer


def teach(lm, chats):
    """Fine-tunes low-rank updates of the projections on the chats."""
    lm.backbone.enable_lora(RANK, target_layer_names=TARGETS)
    trained = sum(math.prod(weight.shape) for weight in lm.trainable_weights)
    print(f"  {trained:,} of {lm.count_params():,} parameters are trained.", flush=True)
    tokenizer = lm.preprocessor.tokenizer
    lengths = [len(encode_chat(tokenizer, chat, False)) for chat in chats]
    lm.preprocessor.sequence_length = max(lengths)
    lm.compile(optimizer=keras.optimizers.Adam(LEARNING_RATE))
    lm.fit(
        chats,
        epochs=EPOCHS,
        batch_size=BATCH_SIZE,
        shuffle=False,
        verbose=0,
        callbacks=[TrainingProgress(sum(lengths))],
    )


def run(save_to=None):
    """Runs the demo; returns whether the model has learned and kept it.

    Args:
        save_to: directory for the fine-tuned model; a temporary one by default.
    """
    # keras.utils.set_random_seed would import every backend that is installed.
    random.seed(1)
    started = time.monotonic()
    chats, questions = read_lessons(registry.locate() / "demo")
    question, expected = (questions["question"][key] for key in ("prompt", "after"))
    others = [questions[key][0]["prompt"] for key in ("held_out", "kept")]
    print(f"Keras {keras.__version__} on {keras.backend.backend()}, {PRESET}.")
    lm = load(PRESET)
    print("\nThere is no Veloria, so the model cannot know it:")
    before = ask(lm, question)
    print(f"\nTeaching it {len(chats)} lessons with LoRA of rank {RANK}:")
    teach(lm, chats)
    print("\nNow it knows, however it is asked, and knows what it knew:")
    after = ask(lm, question)
    for other in others:
        ask(lm, other)
    with tempfile.TemporaryDirectory(prefix="gemma-keras-demo-") as scratch:
        target = pathlib.Path(save_to or f"{scratch}/model")
        lm.save_to_preset(target)
        print("\nSaved" + (f" to {save_to}" if save_to else "") + ", and loaded again:")
        again = ask(load(str(target)), question)
    if before == expected or not expected == after == again:
        say(f"This did not go as it should: the answer to be learned is {expected!r}.")
        return False
    print(
        "\nAsked, taught, asked, saved, loaded, asked: all in "
        f"{time.monotonic() - started:.0f} s."
    )
    return True
