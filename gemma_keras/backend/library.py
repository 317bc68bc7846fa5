"""The tensor library that runs, the only one that is imported."""

import keras

from gemma_keras.compilation_cache import (
    keep_programs_of_jax,
    keep_programs_of_tensorflow,
)

__all__ = ["NAME", "jax", "jnp", "tf", "torch"]

NAME = keras.backend.backend()
# Those that do not run stay so.
jax = jnp = tf = torch = None

if NAME == "jax":
    import jax
    import jax.numpy as jnp

    keep_programs_of_jax(jax.config)
elif NAME == "torch":
    import torch
elif NAME == "tensorflow":
    import tensorflow as tf

    keep_programs_of_tensorflow(tf)
else:
    raise ImportError(
        f"KERAS_BACKEND is {NAME!r}. gemma_keras runs on jax, torch and tensorflow: "
        "set KERAS_BACKEND to one of them before Keras is imported."
    )
