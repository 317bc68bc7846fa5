"""Callbacks of a run, for any `fit()`: what a step was, what is kept, when to stop.

A step is one update of the weights, of one batch or of several. The callbacks tell each
other what they found through `logs`, so their order is that of this list:

    StepMetrics, Validation, Samples, MetricsFile, TensorBoard, StopOnDivergence,
    Checkpoints
"""

import collections
import csv
import json
import math
import pathlib
import time

import keras

from gemma_keras import backend, optimizers
from gemma_keras.sft import snapshots, state
from gemma_keras.sft.folder import replace

COLUMNS = (
    *("step", "epoch", "loss", "accuracy", "learning_rate", "tokens_per_second"),
    *("supervised_tokens", "tokens_seen", "seconds", "peak_memory_gb"),
    *("val_loss", "val_perplexity", "val_accuracy"),
)


class DivergenceError(ValueError):
    """The loss is no number any more, or far above what it was."""


def accumulation_of(optimizer):
    """Batches that make one step of an optimizer."""
    found = 1
    for each in _layers_of(optimizer):
        if isinstance(each, optimizers.TokenAccumulation):
            found = each.steps
    return found


def _layers_of(optimizer):
    """An optimizer and those that it is wrapped around, the innermost last."""
    found = [optimizer]
    while hasattr(found[-1], "inner_optimizer"):
        found.append(found[-1].inner_optimizer)
    return found


class StepCallback(keras.callbacks.Callback):
    """A callback that is asked once a step: subclasses define `on_step_end`.

    Attributes:
        start: steps that were done before `fit`; `Checkpoints.restore` sets it.
        step: steps done so far, those before included.
    """

    start = step = 0

    def on_train_begin(self, logs=None):
        self.accumulation = accumulation_of(self.model.optimizer)
        self.step, self._batches = self.start, 0

    def on_train_batch_end(self, batch, logs=None):
        self._batches += 1
        if self._batches % self.accumulation == 0:
            self.step += 1
            self.on_step_end(logs)

    def on_step_end(self, logs):
        """What to do after step `self.step`; `logs` may be added to."""
        raise NotImplementedError

    def on_train_end(self, logs=None):
        self.start = self.step
        self.close()

    def close(self):
        """Lets go of what it holds, after `fit` has ended in whatever way."""

    def get_state(self):
        """What a checkpoint has to hold of this callback, as JSON can."""
        return {}

    def set_state(self, values):
        """Go on from what `get_state` gave."""


class StepMetrics(StepCallback):
    """Makes `logs` those of the step alone, and adds what Keras does not measure.

    Keras reports the mean since the epoch began. This adds `step`, `epoch`,
    `learning_rate`, `tokens_per_second` (padding not counted), `supervised_tokens` of
    the step, `tokens_seen` and `seconds` since the run began, `peak_memory_gb`.

    Args:
        steps: the `Steps` that `fit` is given; without it, what it would know is
            left out.
    """

    def __init__(self, steps=None):
        super().__init__()
        self.steps = steps
        self.tokens_seen, self.seconds = 0, 0.0

    def on_train_batch_begin(self, batch, logs=None):
        if self._batches % self.accumulation == 0:
            self._began = time.perf_counter()
            backend.sync_training(self.model)
            self.model.reset_metrics()

    def on_step_end(self, logs):
        if "sparse_categorical_accuracy" in logs:
            logs["accuracy"] = logs["sparse_categorical_accuracy"]
        seconds = time.perf_counter() - self._began
        self.seconds += seconds
        logs |= {"step": self.step, "seconds": self.seconds}
        logs["learning_rate"] = self._learning_rate()
        logs["peak_memory_gb"] = backend.peak_memory() / 1e9
        if self.steps is None:
            return
        tokens, supervised = self.steps.counts(self.step)
        self.tokens_seen += tokens
        # The last step may be of fewer batches.
        epoch = self.step / self.steps.steps_per_epoch
        logs["epoch"] = min(epoch, float(self.steps.epochs))
        logs["tokens_per_second"] = tokens / seconds
        logs |= {"supervised_tokens": supervised, "tokens_seen": self.tokens_seen}

    def _learning_rate(self):
        rate = _layers_of(self.model.optimizer)[-1]._learning_rate
        if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
            # The rate that this step was taken with.
            return float(keras.ops.convert_to_numpy(rate(self.step - 1)))
        backend.sync_training(self.model)
        return float(keras.ops.convert_to_numpy(rate))

    def get_state(self):
        return {"tokens_seen": self.tokens_seen, "seconds": self.seconds}

    def set_state(self, values):
        self.tokens_seen = values.get("tokens_seen", 0)
        self.seconds = values.get("seconds", 0.0)


class Validation(StepCallback):
    """Measures the loss on other data every so many steps, and stops if it stays worse.

    Adds `val_loss`, `val_perplexity` and, where there is one, `val_accuracy` to `logs`.

    Args:
        dataset: anything that `evaluate` takes.
        every: steps between measurements.
        patience: stop after so many without a loss below the best; 0 never stops.
        last: the last step of the run, which is measured in any case.
        tell: is called with `before` once it is known.

    Attributes:
        before: what would be added to `logs`, measured before the first step.
    """

    def __init__(self, dataset, every, *, patience=0, last=None, tell=None):
        super().__init__()
        self.dataset, self.every = dataset, every
        self.patience, self.last = patience, last
        self.best, self.waited = None, 0
        self.before, self.tell = None, tell

    @property
    def has_stopped(self):
        """Whether the run has ended early."""
        return bool(self.patience) and self.waited >= self.patience

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        if self.step == 0:
            self.before = self._measure()
            if self.tell is not None:
                self.tell(self.before)

    def on_step_end(self, logs):
        if self.step % self.every and self.step != self.last:
            return
        if not math.isfinite(logs["loss"]):
            return
        logs |= self._measure()
        if self.best is None or logs["val_loss"] < self.best:
            self.best, self.waited = logs["val_loss"], 0
        else:
            self.waited += 1
        if self.has_stopped:
            self.model.stop_training = True

    def _measure(self):
        backend.sync_training(self.model)
        found = self.model.evaluate(self.dataset, verbose=0, return_dict=True)
        measured = {"val_loss": found["loss"]}
        measured["val_perplexity"] = perplexity(found["loss"])
        if "sparse_categorical_accuracy" in found:
            measured["val_accuracy"] = found["sparse_categorical_accuracy"]
        return measured

    def get_state(self):
        return {"best": self.best, "waited": self.waited, "before": self.before}

    def set_state(self, values):
        self.best, self.waited = values.get("best"), values.get("waited", 0)
        self.before = values.get("before")


def described(measured):
    """What `Validation` measured, in words."""
    loss = measured["val_loss"]
    return f"validation loss {loss:.4f}, perplexity {perplexity(loss):.2f}"


def perplexity(loss):
    """E to the loss, infinite where that is too large for a number."""
    return math.exp(loss) if loss < 700 else math.inf


class Samples(StepCallback):
    """Lets the model answer prompts along the way, and keeps the answers in a file.

    Each line of the file is `{"step", "prompt", "text"}`. Answers are greedy.

    Args:
        path: of the .jsonl file.
        prompts: strings, or chats.
        every: steps between two rounds.
        max_new_tokens: longest answer.
        last: the last step of the run, after which they are asked in any case.
    """

    def __init__(self, path, prompts, every, *, max_new_tokens=64, last=None):
        super().__init__()
        self.path, self.prompts, self.every = pathlib.Path(path), prompts, every
        self.max_new_tokens, self.last = max_new_tokens, last

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        lines = _lines(self.path)
        kept = [x for x in lines if _step_of_sample(x) <= self.step]
        replace(self.path, "".join(kept))
        if self.step == 0:
            self._ask()

    def on_step_end(self, logs):
        due = self.step % self.every == 0 or self.step == self.last
        if due and math.isfinite(logs["loss"]):
            self._ask()

    def _ask(self):
        backend.sync_training(self.model)
        texts = self.model.generate(
            self.prompts,
            max_new_tokens=self.max_new_tokens,
            strip_prompt=True,
            sampler="greedy",
        )
        with self.path.open("a", encoding="utf-8") as file:
            for prompt, text in zip(self.prompts, texts, strict=True):
                shown = prompt if isinstance(prompt, str) else prompt[-1]["content"]
                line = {"step": self.step, "prompt": shown, "text": text}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _step_of_sample(line):
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return math.inf


def _lines(path):
    """Whole lines of a file; none if it is not there."""
    if not path.exists():
        return []
    lines = path.read_text("utf-8", errors="replace").splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n")]


class MetricsFile(StepCallback):
    """Writes `COLUMNS` of each step to a CSV file; what was not measured is empty.

    Goes on with a file that is there, without the steps that are done again.
    """

    def __init__(self, path):
        super().__init__()
        self.path = pathlib.Path(path)

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        kept = [
            line
            for line in _lines(self.path)
            if line.split(",")[0].isdigit() and int(line.split(",")[0]) <= self.step
        ]
        replace(self.path, "".join([",".join(COLUMNS) + "\n", *kept]))

    def on_step_end(self, logs):
        row = [_cell(name, logs.get(name, "")) for name in COLUMNS]
        with self.path.open("a", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(row)


def _cell(name, value):
    rounded = {"epoch": 4, "seconds": 3, "peak_memory_gb": 3, "tokens_per_second": 1}
    # The loss to the last bit.
    return round(value, rounded[name]) if value != "" and name in rounded else value


class StopOnDivergence(StepCallback):
    """Raises `DivergenceError` when the loss is NaN or infinite, or has run away.

    It has run away when its mean over the last `window` steps is more than twice the
    best such mean, plus one.
    """

    def __init__(self, window=10):
        super().__init__()
        self.window = window
        self.losses = collections.deque(maxlen=window)
        self.best = math.inf

    def on_step_end(self, logs):
        loss = logs["loss"]
        if not math.isfinite(loss):
            raise DivergenceError(_advice(f"The loss of step {self.step} is {loss}."))
        self.losses.append(loss)
        if len(self.losses) < self.window:
            return
        mean = sum(self.losses) / self.window
        if mean > 2 * self.best + 1:
            raise DivergenceError(
                _advice(
                    f"The loss diverges: its mean over the last {self.window} steps is "
                    f"{mean:.2f} at step {self.step}, and was {self.best:.2f}."
                )
            )
        self.best = min(self.best, mean)

    def get_state(self):
        best = None if math.isinf(self.best) else self.best
        return {"losses": list(self.losses), "best": best}

    def set_state(self, values):
        self.losses = collections.deque(values.get("losses", ()), self.window)
        best = values.get("best")
        self.best = math.inf if best is None else best


def _advice(what):
    return (
        f"{what}\nWhat helps, likeliest first: a learning rate three to ten times "
        "lower; a longer warmup; clip_norm of 1 or less; dtype bfloat16 or float32 "
        "instead of float16, whose range is small; a look at the data for rows that "
        "are garbage or hold almost nothing to learn."
    )


class Checkpoints(StepCallback):
    """Keeps snapshots from which a run goes on as if it had never stopped.

    Args:
        folder: of the snapshots.
        every: steps between two of them.
        keep: how many to keep, besides the one with the best `val_loss`.
        callbacks: all others of the run, whose states belong to a snapshot.
        last: the last step of the run, which is kept in any case.
        say: is told of snapshots that are not whole.
    """

    def __init__(self, folder, every, *, keep=2, callbacks=(), last=None, say=print):
        super().__init__()
        self.folder, self.every, self.keep = pathlib.Path(folder), every, keep
        self.callbacks, self.last, self.say = tuple(callbacks), last, say
        self.best, self.saved = None, None

    def restore(self, lm, *, best=False):
        """Gives `lm`, compiled, and the callbacks the newest snapshot that is whole.

        Args:
            lm: the model, with the same trainable weights and optimizer.
            best: the snapshot with the best validation loss instead, of which the
                model alone is taken.

        Returns:
            Steps that are done: 0 where there is no snapshot.

        Raises:
            StateError: the snapshot belongs to another model.
        """
        snapshots.remove_partial(self.folder)
        if best:
            path = self.folder / self.best["name"]
            snapshots.check(path)
        else:
            path = snapshots.newest(self.folder, say=self.say)
        if path is None:
            self._remove_after(0)
            return 0
        done = snapshots.step_of(path)
        with snapshots.variables(path) as (names, read):
            state.restore(lm, names, read)
        if best:
            return done
        held = snapshots.read_state(path)
        self.best, self.saved, self.start = held["best"], done, done
        for name, callback in self._by_name().items():
            callback.start = done
            callback.set_state(held["callbacks"].get(name, {}))
        self._remove_after(done)
        return done

    def _remove_after(self, done):
        """Removes the snapshots of later steps, none of which is whole."""
        later = [x for x in snapshots.every(self.folder) if snapshots.step_of(x) > done]
        for path in later:
            snapshots.remove(path)
        if later and not done:
            self.say(f"No checkpoint in {self.folder} is whole: this begins anew.")

    def _by_name(self):
        """The callbacks by what a snapshot calls them: their class, and which of it."""
        found = {}
        for callback in self.callbacks:
            name, number = type(callback).__name__, 1
            while name in found:
                number += 1
                name = f"{type(callback).__name__}#{number}"
            found[name] = callback
        return found

    def on_step_end(self, logs):
        better = "val_loss" in logs and (
            self.best is None or logs["val_loss"] < self.best["val_loss"]
        )
        if better:
            name = snapshots.name_of(self.step)
            self.best = {"name": name, "val_loss": logs["val_loss"]}
        due = self.step % self.every == 0 or self.step == self.last
        if better or due or self.model.stop_training:
            self.save()

    def save(self):
        """Writes a snapshot of the step that was just done, if there is none.

        Raises:
            DivergenceError: the weights hold NaN; nothing was written.
            OSError: the disk is full or refuses; the snapshots before are kept.
        """
        if self.saved == self.step:
            return
        backend.sync_training(self.model)
        bad = state.first_bad(self.model)
        if bad is not None:
            raise DivergenceError(
                _advice(f"After step {self.step}, {bad} holds NaN or infinity.")
            )
        held = {
            "step": self.step,
            "best": self.best,
            "callbacks": {n: c.get_state() for n, c in self._by_name().items()},
            "backend": backend.NAME,
        }
        snapshots.write(self.folder, self.step, state.collect(self.model), held)
        self.saved = self.step
        also = () if self.best is None else (self.best["name"],)
        snapshots.prune(self.folder, self.keep, also)
