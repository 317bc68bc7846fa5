"""Loops and branches inside of programs."""

from keras import ops

from gemma_keras.backend.library import NAME, jax, tf


def counter(value):
    """An integer that a loop counts up: a Python one on torch, an array elsewhere."""
    return (
        int(value) if NAME == "torch" else ops.convert_to_tensor(value, dtype="int32")
    )


def least(one, other):
    """The smaller of two integers, as `counter` has them."""
    return min(one, other) if NAME == "torch" else ops.minimum(one, other)


def both(number, tensor):
    """Whether both are true, as a condition of `loop`.

    `number` is what comparing integers gave that `counter` made, a bool on torch.
    """
    # On torch no tensor of it, for which one would have to wait.
    return number and tensor if NAME == "torch" else ops.logical_and(number, tensor)


class _Over(Exception):
    """A loop has come to its end."""


def loop(condition, body, state, early=False):
    """Run `state = body(state)` while `condition(state)`, inside a program.

    With `early`, torch calls `body` without waiting for the condition: with the keyword
    `before`, a function that it has to call before it changes anything. An accelerator
    would do nothing while Python prepares what follows.
    """
    if NAME == "torch" and early:
        return _early_loop(condition, body, state)
    if NAME == "torch":
        while condition(state):
            state = body(state)
        return state
    if NAME == "jax":
        return jax.lax.while_loop(condition, body, state)
    return tf.while_loop(condition, lambda state: (body(state),), (state,))[0]


def _early_loop(condition, body, state):
    while True:
        go = condition(state)

        def before(go=go):
            if not go:
                raise _Over

        try:
            state = body(state, before=before)
        except _Over:
            return state


def branch(condition, yes, no):
    """`yes()` or `no()`, for what they do to variables."""
    if NAME == "tensorflow":
        tf.cond(condition, lambda: (yes(), ())[1], lambda: (no(), ())[1])
    elif condition:
        yes()
    else:
        no()
