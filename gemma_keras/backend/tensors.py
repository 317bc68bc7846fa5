"""Tensors: made of arrays, written to, read and looked at."""

import math

import keras
import numpy as np
from keras import ops

from gemma_keras.backend.device import on_cpu, torch_device
from gemma_keras.backend.library import NAME, jax, jnp, tf, torch
from gemma_keras.buffers import aligned_copy


def tensor_from_array(array, dtype):
    """A tensor of a numpy array, in `dtype`, copied as little as the backend allows.

    On torch and a CPU the tensor shares the array's memory, also that of a transposed
    view. JAX and TensorFlow want it in order: they take over one copy.
    """
    bfloat16 = array.dtype.name == "bfloat16"
    if NAME == "torch":
        if bfloat16:
            tensor = torch.from_numpy(array.view("uint16")).view(torch.bfloat16)
        else:
            tensor = torch.from_numpy(array)
        return tensor.to(torch_device(), dtype=getattr(torch, dtype))
    copy = aligned_copy(array)
    if NAME == "jax":
        return jax.device_put(copy, may_alias=True).astype(dtype)
    # DLPack of numpy knows no bfloat16.
    capsule = (copy.view("int16") if bfloat16 else copy).__dlpack__()
    tensor = tf.experimental.dlpack.from_dlpack(capsule)
    return tf.cast(tf.bitcast(tensor, tf.bfloat16) if bfloat16 else tensor, dtype)


def tensor_in_parts(array, dtype, layout):
    """A tensor of a numpy array, each device's part copied onto it alone (JAX).

    Args:
        array: may be a view.
        dtype: of the tensor.
        layout: a `keras.distribution.TensorLayout`.
    """
    parts = jax.make_array_from_callback(
        # XLA may take over memory that it is given, and a file's would not stay.
        array.shape,
        layout.backend_layout,
        lambda part: np.array(array[part]),
    )
    return parts.astype(dtype)


def all_finite(tensor):
    """Whether no element is NaN or infinite, found without a copy of the tensor."""
    if NAME == "torch":
        # aminmax copies what is not in order, as a transposed kernel is.
        ordered = tensor if tensor.is_contiguous() else tensor.T
        ends = torch.stack(torch.aminmax(ordered))
        return bool(torch.isfinite(ends).all())
    if NAME == "jax":
        return bool(_jax_all_finite(tensor))
    return bool(tf.reduce_all(tf.math.is_finite(tensor)))


if NAME == "jax":

    @jax.jit
    def _jax_all_finite(tensor):
        return jnp.isfinite(jnp.max(jnp.abs(tensor)))


def argmax(x):
    """The first place [B] of the largest number of each row of `x` [B, V], int32."""
    host = x.device.type == "cpu" if NAME == "torch" else on_cpu()
    if not host or x.shape[1] < _MANY_NUMBERS:
        place = ops.argmax(x, axis=-1)
    elif NAME == "torch":
        place = _place_in_parts(x, torch.amax, torch.argmax, torch.take_along_dim)
    else:
        place = _place_in_parts(x, ops.max, ops.argmax, ops.take_along_axis)
    return ops.cast(place, "int32")


def _place_in_parts(x, most, place, take):
    # A place is looked for a number at a time, and a maximum many at once.
    size = math.isqrt(x.shape[1])
    while x.shape[1] % size:
        size -= 1
    parts = ops.reshape(x, (-1, size, x.shape[1] // size))
    part = place(most(parts, -1), -1)
    chosen = take(parts, part[:, None, None], 1)[:, 0]
    return part * parts.shape[-1] + place(chosen, -1)


# From so many on it pays to look for them in two steps.
_MANY_NUMBERS = 2**14


def reshape(x, shape):
    """`ops.reshape`, which takes torch 18 us in place of one: it looks into shapes."""
    return x.reshape(shape) if NAME == "torch" else ops.reshape(x, shape)


def identities(variables):
    """What tells whether variables are still the same, with the same integers."""
    found = [*map(id, variables)]
    if NAME == "torch":
        values = [v.value for v in variables if not v.value.dtype.is_floating_point]
        found += [value._version for value in values]
    return found


def as_bits(x):
    """`x`, or its bits as integers: XLA on a CPU widens narrow floats before it cuts.

    It would do so with the whole of what a loop cuts from, once, and keep it.
    """
    narrow = keras.backend.standardize_dtype(x.dtype) in ("bfloat16", "float16")
    if NAME == "torch" or not narrow or not on_cpu():
        return x
    if NAME == "jax":
        return jax.lax.bitcast_convert_type(x, jnp.uint16)
    return tf.bitcast(x, tf.uint16)


def from_bits(x, dtype):
    """What `as_bits` was given, or a part of that; `dtype` is what it was of."""
    if x.dtype == dtype:
        return x
    bitcast = jax.lax.bitcast_convert_type if NAME == "jax" else tf.bitcast
    return bitcast(x, dtype)


def slots_from(start, count):
    """What `write_slots` may be given as the `start` of `count`, to make it only once.

    It is another in a recorded step of torch, to which the place is an argument.
    """
    if NAME != "torch" or not isinstance(start, torch.Tensor) or start.ndim:
        return start
    if count == 1:
        return start.reshape(1).long()
    return start + torch.arange(count, device=start.device)


def write_slots(buffer, new, start, axis):
    """`buffer` with `new` at `start` along `axis`: in place wherever that is possible.

    On torch the argument itself is changed, JAX and TensorFlow reuse the memory of a
    donated or loop-carried buffer.
    """
    new = ops.cast(new, buffer.dtype)
    if NAME == "torch":
        with torch.no_grad():
            if isinstance(start, torch.Tensor):
                places = slots_from(start, new.shape[axis])
                return buffer.index_copy_(axis, places, new)
            buffer.narrow(axis, int(start), new.shape[axis]).copy_(new)
        return buffer
    starts = [0] * len(buffer.shape)
    starts[axis] = start
    if NAME == "jax":
        return jax.lax.dynamic_update_slice(buffer, new, starts)
    return ops.slice_update(buffer, starts, new)


def read_slots(buffer, start, axis, size=1):
    """The slice of `size` of `buffer` from `start` along `axis`."""
    if NAME == "torch":
        if isinstance(start, torch.Tensor):
            return buffer.index_select(axis, slots_from(start, size))
        return buffer.narrow(axis, int(start), size)
    if NAME == "tensorflow":
        # To XLA the start of a slice is a constant: it would compile for every one.
        return tf.gather(buffer, start + tf.range(size), axis=axis)
    starts, sizes = [0] * len(buffer.shape), list(buffer.shape)
    starts[axis], sizes[axis] = start, size
    return ops.slice(buffer, starts, sizes)


def column_squares(kernel):
    """Sum of the squares of each column of `kernel` [in, out], float32 [out]."""
    if NAME == "torch":
        # A sum of squares would first make a tensor of them.
        value = ops.convert_to_tensor(kernel)
        return torch.linalg.vector_norm(value, dim=0, dtype=torch.float32).square()
    return ops.sum(ops.square(ops.cast(kernel, "float32")), axis=0)


def to_numpy(value):
    """A tensor or a Keras variable as a numpy array.

    On JAX processes may each hold a part of it: it is brought together then, for which
    all of them have to call this.
    """
    if NAME == "jax":
        array = ops.convert_to_tensor(value)
        if not (array.is_fully_addressable or array.is_fully_replicated):
            from jax.experimental import multihost_utils

            return multihost_utils.process_allgather(array, tiled=True)
    return ops.convert_to_numpy(value)


def host_copy(variable):
    """The value of a Keras variable, copied to the host's memory, in its own dtype."""
    if NAME == "torch":
        return variable.value.detach().to("cpu", copy=True)
    return np.array(to_numpy(variable))
