"""Processes of contenders: with which Python, and ended in time."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time

import psutil


def python_for(words, given):
    """The Python that runs a contender: this one, or what `--python` says.

    Args:
        words: of the contender's name.
        given: `NAME=PATH` each; words of a name, and the path of a Python.
    """
    python = sys.executable
    for pair in given:
        name, _, path = pair.partition("=")
        python = path if set(name.split()) <= set(words) else python
    return python


class Process:
    """A program that is ended when it takes too long, or too much memory.

    Args:
        command: what to run, in a session of its own.
        options: the command line's, for the limits.
    """

    def __init__(self, command, environment, options):
        self.options, self.reason = options, None
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.child = psutil.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=environment,
            start_new_session=True,
        )
        self.more_time()
        threading.Thread(target=self._watch, daemon=True).start()

    def more_time(self):
        """The time limit begins anew."""
        self.deadline = time.monotonic() + self.options.limit

    def lines(self):
        """What it says on stdout, until it ends."""
        yield from self.child.stdout
        self.child.wait()
        if self.child.returncode and self.reason is None:
            self.errors.seek(0)
            last = self.errors.read().strip().splitlines()[-1:] or ["nothing"]
            self.reason = f"exit {self.child.returncode}, saying: {last[0][:200]}"

    def end(self, reason):
        self.reason = reason
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.child.pid, signal.SIGKILL)

    def _watch(self):
        while self.child.poll() is None:
            if time.monotonic() > self.deadline:
                self.end(f"took longer than {self.options.limit:.0f} s")
            elif self._gigabytes() > self.options.memory:
                self.end(f"took more than {self.options.memory:.0f} GB")
            time.sleep(0.1)

    def _gigabytes(self):
        with contextlib.suppress(psutil.NoSuchProcess):
            family = [self.child, *self.child.children(recursive=True)]
            return sum(each.memory_info().rss for each in family) / 1e9
        return 0.0
