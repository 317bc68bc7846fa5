"""The few things that Keras cannot ask of every backend in one way.

The only module that knows which backend runs, and the only one that imports it.
"""

import functools

import keras
import numpy as np
from keras import ops

NAME = keras.backend.backend()

if NAME == "jax":
    import jax
    import jax.numpy as jnp
elif NAME == "torch":
    import torch
elif NAME == "tensorflow":
    import tensorflow as tf
else:
    raise ImportError(
        f"KERAS_BACKEND is {NAME!r}. gemma_keras runs on jax, torch and tensorflow: "
        "set KERAS_BACKEND to one of them before Keras is imported."
    )


def write_slots(buffer, new, start, axis):
    """`buffer` with `new` at `start` along `axis`: in place wherever that is possible.

    On torch the argument itself is changed, JAX and TensorFlow reuse the memory of a
    donated or loop-carried buffer.
    """
    new = ops.cast(new, buffer.dtype)
    if NAME == "torch":
        with torch.no_grad():
            buffer.narrow(axis, int(start), new.shape[axis]).copy_(new)
        return buffer
    starts = [0] * len(buffer.shape)
    starts[axis] = start
    if NAME == "jax":
        return jax.lax.dynamic_update_slice(buffer, new, starts)
    return ops.slice_update(buffer, starts, new)
