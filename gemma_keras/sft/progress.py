"""What a person sees of a run as it goes on."""

import time

from gemma_keras.console import bars, say
from gemma_keras.sft.callbacks import StepCallback, described

# Seconds between two lines where stderr is no terminal.
_PAUSE = 10.0


class Progress(StepCallback):
    """A bar with loss, tokens/s, tokens seen, time left and memory; lines in a file.

    Args:
        total: steps of the run.
    """

    def __init__(self, total):
        super().__init__()
        self.total, self._display = total, None

    def on_train_begin(self, logs=None):
        from rich import progress

        super().on_train_begin(logs)
        columns = (
            progress.TextColumn("Training"),
            progress.BarColumn(bar_width=20),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.description}"),
        )
        self._display = bars(*columns)
        self._display.start()
        self._task = self._display.add_task("starting", total=self.total)
        self._display.update(self._task, completed=self.step)
        self._said = self._first = None
        self._tokens = self._seconds = 0

    def on_step_end(self, logs):
        text = self._describe(logs)
        self._display.update(self._task, completed=self.step, description=text)
        now = time.monotonic()
        lines = self._display.disable
        if "val_loss" in logs:
            self._line(f"step {self.step:,}: {described(logs)}")
        ends = self.step == self.total
        if lines and (self._said is None or now - self._said > _PAUSE or ends):
            self._said = now
            self._line(f"step {self.step:,} of {self.total:,}: {text}")

    def _describe(self, logs):
        parts = [f"loss {logs['loss']:.3f}"]
        if "tokens_seen" in logs:
            # The first step compiles, so that its time says nothing of the others.
            if self._first is None:
                self._first = (self.step, logs["tokens_seen"], logs["seconds"])
            step, tokens, seconds = self._first
            took = logs["seconds"] - seconds
            if self.step > step and took > 0:
                rate = (logs["tokens_seen"] - tokens) / took
                parts.append(f"{rate:,.0f} tokens/s")
                each = took / (self.step - step)
                parts.append(f"{clock(each * (self.total - self.step))} left")
            parts.insert(1, f"{logs['tokens_seen']:,} tokens")
        parts.append(f"{logs['peak_memory_gb']:.2f} GB")
        return ", ".join(parts)

    def _line(self, text):
        if self._display.disable:
            say(text)
        else:
            self._display.console.print(text, highlight=False, markup=False)

    def close(self):
        if self._display is not None:
            self._display.stop()


def clock(seconds):
    """`h:mm:ss` of a number of seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
