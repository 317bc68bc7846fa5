"""The few things that Keras cannot ask of every backend in one way.

The only module that knows which backend runs, and the only one that imports it.
"""

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


def tensor_from_array(array, dtype):
    """A tensor of a numpy array, in `dtype`, copied as little as the backend allows.

    A transposed view is transposed on the device, which is many times faster than in
    numpy. On torch and a CPU the tensor shares the array's memory.
    """
    transposed = array.ndim == 2 and not array.flags.c_contiguous
    source = array.T if transposed else array
    if NAME == "torch":
        if source.dtype.name == "bfloat16":
            tensor = torch.from_numpy(source.view("uint16")).view(torch.bfloat16)
        else:
            tensor = torch.from_numpy(source)
        tensor = tensor.T if transposed else tensor
        return tensor.to(torch_device(), dtype=getattr(torch, dtype))
    if NAME == "jax":
        tensor = jnp.asarray(source)
        tensor = tensor.T if transposed else tensor
        return tensor.astype(dtype)
    tensor = tf.convert_to_tensor(source)
    tensor = tf.transpose(tensor) if transposed else tensor
    return tf.cast(tensor, dtype)


def all_finite(tensor):
    """Whether no element is NaN or infinite."""
    if NAME == "torch":
        # One fast pass; a finite sum has finite terms, another sum needs a look.
        total = torch.sum(tensor, dtype=torch.float32)
        return bool(torch.isfinite(total) or torch.isfinite(tensor).all())
    if NAME == "jax":
        return bool(jnp.isfinite(tensor).all())
    return bool(tf.reduce_all(tf.math.is_finite(tensor)))


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


def read_slot(buffer, index, axis):
    """The slice of size 1 of `buffer` at `index` along `axis`."""
    if NAME == "torch":
        return buffer.narrow(axis, int(index), 1)
    starts, sizes = [0] * len(buffer.shape), list(buffer.shape)
    starts[axis], sizes[axis] = index, 1
    return ops.slice(buffer, starts, sizes)


def gumbel(seed, count, shape):
    """Standard Gumbel noise of `shape`, a function of integers `seed` and `count`."""
    if NAME == "jax":
        key = jax.random.fold_in(jax.random.key(seed), count)
        return jax.random.gumbel(key, shape, "float32")
    if NAME == "torch":
        device = torch_device()
        generator = torch.Generator(device)
        generator.manual_seed((int(seed) << 32) + int(count))
        exponential = torch.empty(shape, dtype=torch.float32, device=device)
        return -exponential.exponential_(generator=generator).log()
    uniform = tf.random.stateless_uniform(
        shape, seed=tf.stack([seed, count]), minval=np.finfo("float32").tiny
    )
    return -tf.math.log(-tf.math.log(uniform))


def torch_device():
    """The device that Keras puts torch tensors on."""
    return ops.convert_to_tensor(0).device


def counter(value):
    """An integer that a loop counts up: a Python one on torch, an array elsewhere."""
    return value if NAME == "torch" else ops.convert_to_tensor(value, dtype="int32")


def loop(condition, body, state):
    """Run `state = body(state)` while `condition(state)`, inside a program."""
    if NAME == "torch":
        while condition(state):
            state = body(state)
        return state
    if NAME == "jax":
        return jax.lax.while_loop(condition, body, state)
    return tf.while_loop(condition, lambda state: (body(state),), (state,))[0]


class Program:
    """A function of arrays, compiled the backend's way, that reads a model's weights.

    Args:
        function: takes and returns nested arrays. It is traced anew for arguments of
            new shapes.
        variables: every Keras variable it reads.
        donated: index of an argument that is not used again, whose memory is free for
            the results.
    """

    def __init__(self, function, variables, donated=None):
        self.function, self.variables = function, list(variables)
        if NAME == "jax":
            donate = () if donated is None else (donated + 1,)
            self._compiled = jax.jit(self._with_values, donate_argnums=donate)
        elif NAME == "tensorflow":
            self._compiled = tf.function(function, jit_compile=True)
            self._concrete = {}

    def _with_values(self, values, *arguments):
        # Weights are arguments: closed over, XLA would keep them as constants.
        mapping = list(zip(self.variables, values, strict=True))
        with keras.StatelessScope(state_mapping=mapping):
            return self.function(*arguments)

    def __call__(self, *arguments):
        if NAME == "jax":
            values = [variable.value for variable in self.variables]
            return self._compiled(values, *arguments)
        if NAME == "torch":
            arguments = keras.tree.map_structure(_array_to_torch, arguments)
            with torch.no_grad():
                return self.function(*arguments)
        arguments = tf.nest.map_structure(tf.convert_to_tensor, arguments)
        # Asked for by shape: tf.function itself warns of every few new shapes.
        key = tuple((x.dtype, tuple(x.shape)) for x in tf.nest.flatten(arguments))
        if key not in self._concrete:
            self._concrete[key] = self._compiled.get_concrete_function(*arguments)
        return self._concrete[key](*arguments)


def _array_to_torch(x):
    return ops.convert_to_tensor(x) if isinstance(x, np.ndarray) else x
