"""Which program runs now, if any."""

import contextlib
import contextvars


class _Run:
    """One run of a program, or its tracing.

    Attributes:
        kept: what is computed once in it, by who keeps it.
    """

    def __init__(self):
        self.kept = {}


# The run that is going on, or None.
in_program = contextvars.ContextVar("in_program", default=None)


@contextlib.contextmanager
def tracing():
    """A context within which a program runs, or is traced."""
    token = in_program.set(_Run())
    try:
        yield
    finally:
        in_program.reset(token)
