"""Curves for TensorBoard, written without TensorFlow."""

import pathlib
import time

from gemma_keras.sft.callbacks import COLUMNS, StepCallback


class TensorBoard(StepCallback):
    """Writes the numbers of each step where `tensorboard --logdir` finds them.

    Args:
        folder: of the event files.

    Raises:
        ImportError: TensorBoard is not installed.
    """

    def __init__(self, folder):
        super().__init__()
        self.folder, self._writer = pathlib.Path(folder), None
        check_installed()

    def on_train_begin(self, logs=None):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        super().on_train_begin(logs)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventFileWriter(str(self.folder))
        if self.step:
            # Tells TensorBoard to forget the steps that are done again.
            restart = SessionLog(status=SessionLog.START)
            self._writer.add_event(Event(step=self.step + 1, session_log=restart))

    def on_step_end(self, logs):
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        names = [name for name in COLUMNS if name != "step" and name in logs]
        values = [Summary.Value(tag=name, simple_value=logs[name]) for name in names]
        summary = Summary(value=values)
        event = Event(step=self.step, wall_time=time.time(), summary=summary)
        self._writer.add_event(event)

    def close(self):
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def check_installed():
    """Raises `ImportError` with what to install."""
    try:
        import tensorboard.summary.writer.event_file_writer  # noqa: F401
    except ImportError:
        raise ImportError(
            "TensorBoard's curves need the package tensorboard: "
            "pip install 'gemma_keras[train]'."
        ) from None
