"""Noise that is a function of integers, and generators with a state."""

import random

import numpy as np

from gemma_keras.backend.device import torch_device
from gemma_keras.backend.library import NAME, jax, tf, torch


def gumbel(seed, count, shape):
    """Standard Gumbel noise of `shape`, a function of integers `seed` and `count`."""
    if NAME == "jax":
        key = jax.random.fold_in(jax.random.key(seed), count)
        return jax.random.gumbel(key, shape, "float32")
    if NAME == "torch":
        device = torch_device()
        generator = torch.Generator(device)
        # torch's CPU generator looks at 32 bits of its seed only, so mix them first.
        mixed = np.random.SeedSequence((int(seed), int(count))).generate_state(1)
        generator.manual_seed(int(mixed[0]))
        exponential = torch.empty(shape, dtype=torch.float32, device=device)
        return -exponential.exponential_(generator=generator).log()
    uniform = tf.random.stateless_uniform(
        shape, seed=tf.stack([seed, count]), minval=np.finfo("float32").tiny
    )
    return -tf.math.log(-tf.math.log(uniform))


def noise_seed(state):
    """What `keep_mask` takes, of the `next()` of a `keras.random.SeedGenerator`."""
    return tuple(int(x) for x in state) if NAME == "torch" else state


def keep_mask(seed, stream, shape, share):
    """Booleans of `shape`, true with probability `share`.

    A function of `seed` and the integer `stream`, so that a rematerialised layer, which
    is computed twice, drops the same values twice.
    """
    if NAME == "jax":
        key = jax.random.fold_in(jax.random.key(seed[0]), seed[1])
        return jax.random.bernoulli(jax.random.fold_in(key, stream), share, shape)
    if NAME == "torch":
        device = torch_device()
        mixed = np.random.SeedSequence((*seed, stream)).generate_state(1)
        generator = torch.Generator(device).manual_seed(int(mixed[0]))
        return torch.rand(shape, generator=generator, device=device) < share
    seed = tf.random.fold_in(tf.cast(seed, "int32"), stream)
    return tf.random.stateless_uniform(shape, seed=seed) < share


def set_seed(seed):
    """Seeds what initial weights and random operations are drawn with."""
    # keras.utils.set_random_seed would import every backend that is installed.
    random.seed(seed)
    np.random.seed(seed)
    if NAME == "torch":
        torch.manual_seed(seed)
    elif NAME == "tensorflow":
        tf.random.set_seed(seed)


def random_state():
    """State of the backend's own generator, uint8 [n]; None where it has none.

    JAX has none, and Keras keeps TensorFlow's seeds in variables.
    """
    if NAME != "torch":
        return None
    states = [torch.get_rng_state()]
    if torch.cuda.is_available():
        states.append(torch.cuda.get_rng_state())
    return np.concatenate([state.numpy() for state in states])


def set_random_state(state):
    """Sets what `random_state` gave, on the same kind of device; else nothing."""
    if NAME != "torch":
        return
    host = len(torch.get_rng_state())
    torch.set_rng_state(torch.from_numpy(state[:host].copy()))
    if len(state) > host and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.from_numpy(state[host:].copy()))
