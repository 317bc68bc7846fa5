"""Ctrl-C, and a polite request to end, taken after the step: saved, then stopped."""

import signal

from gemma_keras.sft.callbacks import StepCallback

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopWhenAsked(StepCallback):
    """Saves and stops after the step in which SIGINT or SIGTERM came.

    A context, within which the signals mean this; a second one ends at once, as it
    would without. Only the main thread may enter it.

    Args:
        checkpoints: the `Checkpoints` of the same `fit`.
        say: is told what happens.

    Attributes:
        signal: the number of the signal, or None.
    """

    def __init__(self, checkpoints, say=print):
        super().__init__()
        self.checkpoints, self.say, self.signal = checkpoints, say, None
        self._before = {}

    def __enter__(self):
        for number in SIGNALS:
            # Not where the parent process asked for it to be ignored, as nohup does.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _ask(self, number, frame):
        if self.signal is None:
            self.signal = number
            self.say("\nStopping after this step, to save it; Ctrl-C again: at once.")
            return
        handler = self._before[number]
        if callable(handler):
            handler(number, frame)
        else:
            signal.signal(number, handler)
            signal.raise_signal(number)

    def on_step_end(self, logs):
        if self.signal is not None:
            self.checkpoints.save()
            self.model.stop_training = True
