"""Slopes of a function, as each backend differentiates it."""

import keras
import numpy as np
from keras import ops

from gemma_keras import backend


def gradients(function, arrays, variable):
    """Value of `function(*arrays)`, its slopes, and that for a Keras variable."""
    if backend.NAME == "jax":
        import jax

        def pure(arrays, value):
            with keras.StatelessScope(state_mapping=[(variable, value)]):
                return function(*arrays)

        found = jax.jit(jax.value_and_grad(pure, argnums=(0, 1)))
        value, (slopes, slope) = found(arrays, variable.value)
        return value, [*slopes, slope]
    if backend.NAME == "torch":
        import torch

        device = backend.torch_device()
        tensors = [torch.tensor(x, requires_grad=True, device=device) for x in arrays]
        variable.value.grad = None
        value = function(*tensors)
        value.backward()
        return value.detach(), [x.grad for x in (*tensors, variable.value)]
    import tensorflow as tf

    @tf.function(jit_compile=True, autograph=False)
    def run(*tensors):
        with tf.GradientTape() as tape:
            tape.watch([*tensors, variable.value])
            value = function(*tensors)
        return value, tape.gradient(value, [*tensors, variable.value])

    return run(*map(tf.constant, arrays))


def relative(found, expected):
    """The largest difference, in parts of the largest number expected."""
    found = np.asarray(ops.convert_to_numpy(found), "float64")
    return np.abs(found - expected).max() / np.abs(expected).max()
