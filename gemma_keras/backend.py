"""The few things that Keras cannot ask of every backend in one way.

The only module that knows which backend runs, and the only one that imports it.
"""

import atexit
import contextlib
import contextvars
import ctypes
import functools
import importlib
import importlib.metadata
import math
import os
import pathlib
import random
import re
import resource
import sys

import keras
import numpy as np
from keras import ops

from gemma_keras.buffers import aligned_copy
from gemma_keras.compilation_cache import (
    keep_programs_of_jax,
    keep_programs_of_tensorflow,
)

NAME = keras.backend.backend()

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


def matmul(x, kernel, transposed=False):
    """`x` [..., D] times `kernel` [D, F], or [F, D] if `transposed`.

    In the dtype of `x`, or in float32 where that is what the backend makes anyway.
    """
    kernel = ops.cast(kernel, x.dtype)
    if _xla_would_copy(x):
        return _matmul_bfloat16(x, kernel, transposed)
    if _torch_is_slow_in(x):
        return _matmul_widened(x, kernel.T if transposed else kernel)
    if _onednn_is_faster(x, kernel, transposed):
        return _differentiable(_onednn_product, x, kernel.T if transposed else kernel)
    if _torch_would_use_one_core(x):
        return _matmul_few_rows(x, kernel, transposed)
    if NAME == "tensorflow":
        return _tensorflow_matmul(x, kernel, transposed)
    kernel = ops.transpose(kernel) if transposed else kernel
    if _xla_is_slow_with_one_row(x):
        rows = jnp.broadcast_to(jnp.reshape(x, (1, -1)), (2, x.shape[-1]))
        return jnp.reshape(jnp.matmul(rows, kernel)[:1], (*x.shape[:-1], -1))
    return ops.matmul(x, kernel)


def _xla_is_slow_with_one_row(x):
    """Whether two rows take less time: on a GPU, one has no kernel but a sum.

    Only for narrow floats, whose products round anyway: two rows of float32 may be
    multiplied with less precision than one.
    """
    return (
        NAME == "jax"
        and math.prod(x.shape[:-1]) == 1
        and x.dtype in (jnp.bfloat16, jnp.float16)
        and _in_program.get() is not None
        and jax.default_backend() == "gpu"
    )


def _tensorflow_matmul(x, kernel, transposed):
    # Keras' way for more than two axes makes ten times the operations.
    sizes = x.shape.as_list()[:-1]
    if sizes.count(None) > 1:
        sizes = tf.unstack(tf.shape(x))[:-1]
    sizes = [-1 if size is None else size for size in sizes]
    rows = tf.reshape(x, (-1, x.shape[-1]))
    product = tf.matmul(rows, kernel, transpose_b=transposed)
    return tf.reshape(product, (*sizes, product.shape[-1]))


def _xla_would_copy(x):
    """Whether XLA would make a float32 copy of what `x` is multiplied with.

    On a CPU it does so with bfloat16, for every weight of a program at once, which
    takes three times the memory of the model. Products of more than one row with a
    result in float32 are the exception: they have kernels that read bfloat16.
    """
    if keras.backend.standardize_dtype(x.dtype) != "bfloat16":
        return False
    # TensorFlow knows this kind of product inside XLA only.
    return NAME != "torch" and _in_program.get() and on_cpu()


def on_cpu():
    """Whether the backend computes on a CPU."""
    if NAME == "torch":
        return torch_device().type == "cpu"
    if NAME == "jax":
        return jax.default_backend() == "cpu"
    return not tf.config.list_logical_devices("GPU")


def _matmul_bfloat16(x, kernel, transposed):
    shape = tuple(x.shape)
    rows = ops.reshape(x, (-1, shape[-1]))
    alone = rows.shape[0] == 1
    if alone:
        rows = ops.concatenate([rows, rows], axis=0)
    if NAME == "jax":
        axes = (((1,), (1 if transposed else 0,)), ((), ()))
        product = jax.lax.dot_general(
            rows, kernel, axes, preferred_element_type=jnp.float32
        )
    else:
        product = tf.raw_ops.BatchMatMulV3(
            x=rows, y=kernel, adj_y=transposed, Tout=tf.float32
        )
    product = product[:1] if alone else product
    return ops.reshape(product, (*shape[:-1], product.shape[-1]))


def batch_matmul(x, y):
    """`x` [..., T, D] times `y` [..., D, S], in the dtype of `x`.

    For use where torch is not asked for the gradient, as within `with_gradient`: it
    would keep copies in float32.
    """
    if _torch_is_slow_in(x):
        return torch.matmul(x.float(), y.float()).to(x.dtype)
    return ops.matmul(x, y)


def row_products(x, y):
    """Products of the rows of `x` [..., R, D] and of `y` [..., S, D]: [..., R, S].

    In the dtype of `x`; for use where `batch_matmul` is.
    """
    turned = NAME != "torch" and x.shape[-2] < x.shape[-1]
    if turned and _in_program.get() and on_cpu():
        # XLA copies what it turns there: the result, then, in place of `y`.
        return ops.swapaxes(ops.matmul(y, ops.swapaxes(x, -1, -2)), -1, -2)
    return batch_matmul(x, ops.swapaxes(y, -1, -2))


def torch_attention_serves(query):
    """Whether `torch_attention` is faster than single operations, for few queries."""
    return (
        NAME == "torch"
        and _in_program.get()
        and query.dtype == torch.bfloat16
        and query.device.type == "cpu"
        and _multiplies_on_cpu(query.dtype)
    )


def torch_attention(query, key, value, mask):
    """Softmax(q k^T) v; query [B, K, R, H], the others [B, K, S, H].

    The mask is bool [B, 1, 1, S]: one token, which sees itself at least.
    """
    if query.shape[0] * query.shape[1] == 1:
        # Half the time, for a single pair of matrices.
        scores = torch.mm(query[0, 0], key[0, 0].T)
        scores = torch.where(mask[0, 0], scores, -math.inf)
        return torch.mm(torch.softmax(scores, dim=-1), value[0, 0])[None, None]
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, mask, scale=1.0
    )


def _torch_is_slow_in(x):
    """Whether torch has no fast kernel: narrow floats, and a CPU that lacks them."""
    return (
        NAME == "torch"
        and x.dtype in (torch.bfloat16, torch.float16)
        and x.device.type == "cpu"
        and not _multiplies_on_cpu(x.dtype)
    )


@functools.cache
def _multiplies_on_cpu(dtype):
    name = "bf16" if dtype == torch.bfloat16 else "fp16"
    # Not part of what torch promises.
    there = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)
    return there is None or there()


# Bytes of a kernel in float32 that are made at a time: they should stay in the cache
# where they serve few rows only.
_WIDENED_FEW, _WIDENED_MANY = 2**20, 2**26


def _matmul_widened(x, kernel):
    """The product in float32, rounded once, of a kernel that is widened by parts."""
    rows = x.reshape(-1, x.shape[-1])
    # One row along the kernel's memory is the exception that torch is fast at.
    if len(rows) <= 2 and kernel.stride(0) == 1:
        return torch.matmul(x, kernel)
    return _differentiable(_widened_product, x, kernel)


def _widened_parts(rows, kernel):
    """Slices of the kernel's columns."""
    most = _WIDENED_FEW if len(rows) <= 16 else _WIDENED_MANY
    step = max(1, most // (4 * kernel.shape[0]))
    return [slice(i, i + step) for i in range(0, kernel.shape[1], step)]


def _widened_product(rows, kernel):
    wide = rows.float()
    parts = _widened_parts(rows, kernel)
    made = [(wide @ kernel[:, part].float()).to(rows.dtype) for part in parts]
    return made[0] if len(made) == 1 else torch.cat(made, dim=1)


def _differentiable(multiply, x, kernel):
    """`x` [..., D] times `kernel` [D, F] by a function of two matrices, slopes too."""
    rows = x.reshape(-1, x.shape[-1])
    if torch.is_grad_enabled() and (x.requires_grad or kernel.requires_grad):
        product = _Product.apply(multiply, rows, kernel)
    else:
        product = multiply(rows, kernel)
    return product.reshape(*x.shape[:-1], -1)


if NAME == "torch":

    class _Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, multiply, rows, kernel):
            ctx.multiply = multiply
            ctx.save_for_backward(rows if kernel.requires_grad else None, kernel)
            return multiply(rows, kernel)

        @staticmethod
        def backward(ctx, upstream):
            rows, kernel = ctx.saved_tensors
            slope = slope_of_kernel = None
            if ctx.needs_input_grad[1]:
                slope = ctx.multiply(upstream, kernel.T)
            if ctx.needs_input_grad[2]:
                # Made as the kernel lies in memory, as its optimizer's state does.
                if kernel.stride(0) == 1:
                    slope_of_kernel = ctx.multiply(upstream.T, rows).T
                else:
                    slope_of_kernel = ctx.multiply(rows.T, upstream)
            return None, slope, slope_of_kernel


def _onednn_is_faster(x, kernel, transposed):
    """Whether torch should multiply with oneDNN what it would with MKL, in float32.

    MKL does not use AVX-512 on AMD's processors: oneDNN is twice as fast there, with
    few rows and with many, but for the few rows that decoding brings to the head
    (measured in tools/bench/LOG.md). Not for LoRA's factors, which are narrow.
    """
    if NAME != "torch" or x.dtype != torch.float32 or x.device.type != "cpu":
        return False
    if not _has_onednn() or min(kernel.shape) < 64:
        return False
    return not (transposed and _in_program.get() and x.numel() <= 4 * x.shape[-1])


@functools.cache
def _has_onednn():
    # The operation is not part of what torch promises.
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
    )


def _onednn_product(rows, kernel):
    if torch.jit.is_tracing():
        return _onednn_recorded()(rows, kernel.T)
    multiply = torch.ops.mkldnn._linear_pointwise
    return multiply(rows, kernel.T, None, "none", [], "")


@functools.cache
def _onednn_recorded():
    """The same product as a graph: its empty list is nothing that can be recorded."""
    graph = torch._C.parse_ir("""
        graph(%x : Tensor, %matrix : Tensor):
          %none : NoneType = prim::Constant()
          %kind : str = prim::Constant[value="none"]()
          %numbers : Scalar?[] = prim::ListConstruct()
          %product : Tensor = mkldnn::_linear_pointwise(
              %x, %matrix, %none, %kind, %numbers, %none)
          return (%product)""")
    return torch._C._create_function_from_graph("product", graph)


def _torch_would_use_one_core(x):
    """Whether torch would multiply on one core what several could.

    So it does on a CPU with the few rows of decoding, in float32: it divides rows and
    batches among threads, and not the kernel (measured in tools/bench/LOG.md).
    """
    return (
        NAME == "torch"
        and _in_program.get()
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.numel() <= 16 * x.shape[-1]
    )


# Into how many parts a table of many rows is divided, and a kernel among threads.
_TABLE_PARTS = 16


def _matmul_few_rows(x, kernel, transposed):
    rows = x.reshape(-1, x.shape[-1])
    count = rows.shape[0]
    if transposed:
        outputs, inputs = kernel.shape
        parts = _parts(outputs, _TABLE_PARTS)
        batch = kernel.view(parts, outputs // parts, inputs)
        product = torch.bmm(batch, rows.T.expand(parts, -1, -1))
        # In order, since what reads a row of logits next would go astray otherwise.
        product = product.reshape(outputs, count).T.contiguous()
    else:
        inputs, outputs = kernel.shape
        parts = _parts(outputs, torch.get_num_threads())
        batch = kernel.view(inputs, parts, outputs // parts).transpose(0, 1)
        product = torch.bmm(rows.expand(parts, -1, -1), batch).transpose(0, 1)
    return product.reshape(*x.shape[:-1], -1)


def _parts(outputs, most):
    """Up to so many equal parts of at least 128."""
    parts = max(1, min(most, outputs // 128))
    while outputs % parts:
        parts -= 1
    return parts


def packed_matrix(codes, scales, offsets, group_size):
    """What torch's kernels for weights of few bits read, of a matrix.

    Args:
        codes: int8 [N, K]; or uint8 [N, K / 2], two of 4 bits in a byte, the low one of
            column j and the high one of column j + K / 2.
        scales: [N, 1], or [N, K / group_size] for 4 bits.
        offsets: None, or [N, K / group_size] for 4 bits.
        group_size: columns that share a scale, for 4 bits.

    Returns:
        For `packed_product`; None where there is no kernel. Codes of 8 bits are read as
        they are, those of 4 bits are copied.
    """
    if NAME != "torch" or not _has_packed_kernels(codes.device):
        return None
    rows = codes.shape[0]
    if offsets is None:
        scales = scales.reshape(-1)
        return codes, scales.bfloat16() if codes.device.type == "cpu" else scales
    # The kernels have groups of these sizes, around a code of 8.
    if group_size not in (32, 64, 128, 256) or rows % 16 or codes.shape[1] % 16:
        return None
    scales, offsets = scales.float(), offsets.float()
    pairs = torch.stack([scales, offsets + 8 * scales], dim=-1)
    pairs = pairs.transpose(0, 1).contiguous().bfloat16()
    # Wider for a moment: a few rows at a time, in a multiple of the kernels' blocks.
    parts = [_packed_4_bits(codes[i : i + 4096]) for i in range(0, rows, 4096)]
    return parts[0] if len(parts) == 1 else torch.cat(parts), pairs


def _packed_4_bits(codes):
    wide = torch.cat([codes & 15, codes >> 4], dim=1)
    if codes.device.type == "cpu":
        return torch._convert_weight_to_int4pack_for_cpu(wide.int(), 1)
    return torch._convert_weight_to_int4pack(wide[:, ::2] << 4 | wide[:, 1::2], 2)


def has_packed_kernels(x):
    """Whether products in few bits may have kernels for `x`: bfloat16, in a program."""
    return (
        NAME == "torch"
        and _in_program.get() is not None
        and x.dtype == torch.bfloat16
        and _has_packed_kernels(x.device)
    )


@functools.cache
def _has_packed_kernels(device):
    # torch's are not part of what it promises.
    if device.type == "cpu":
        names = ("int8pack_mm", "int4pack_mm_for_cpu")
        return all(hasattr(torch, f"_weight_{name}") for name in names)
    # AMD's have numbers in another order.
    there = hasattr(torch, "_weight_int4pack_mm") and torch.version.hip is None
    return there and _has_kernels(device)


def packed_product(x, packed, group_size):
    """`x` [C, K], bfloat16, times the transpose of a `packed_matrix` [N, K]: [C, N]."""
    codes, scales = packed
    on_cpu = x.device.type == "cpu"
    if scales.ndim == 1:
        product = torch._weight_int8pack_mm if on_cpu else torch.ops.gemma_keras.int8_mm
        return product(x, codes, scales)
    if on_cpu:
        return torch._weight_int4pack_mm_for_cpu(x, codes, group_size, scales)
    return torch._weight_int4pack_mm(x, codes, group_size, scales)


def rms_norm(x, scale, epsilon, dtype):
    """`x` [..., D] by the root of its mean square, times 1 + `scale` [D].

    `epsilon` is added to the mean square over the last axis. All of it in float32, and
    rounded to `dtype` last.
    """
    scale = ops.convert_to_tensor(scale)
    if _kernels(x):
        return torch.ops.gemma_keras.rms_norm(x, scale, epsilon, getattr(torch, dtype))
    if NAME == "torch" and _in_program.get():
        # Half of the operations, each of which takes a while to say. Not where there is
        # a gradient: a norm of zeros has none.
        x = x.float()
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        root = math.sqrt(x.shape[-1])
        least = torch.full((1,), root * math.sqrt(epsilon), device=x.device)
        gain = (1.0 + ops.cast(scale, "float32")) * root
        return ops.cast((x / norm.hypot_(least)).mul_(gain), dtype)
    x = ops.cast(x, "float32")
    variance = ops.mean(ops.square(x), axis=-1, keepdims=True)
    x = x * ops.rsqrt(variance + epsilon) * (1.0 + ops.cast(scale, "float32"))
    return ops.cast(x, dtype)


def rotate(x, cos, sin):
    """`x` [B, T, heads, H] times `cos`, plus `x` turned by H / 2 times `sin`.

    Both are float32 [B, T, 1, H], B perhaps 1. The result is rounded to the dtype of
    `x` last.
    """
    if _kernels(x) and _is_power_of_two(x.shape[-1]):
        return torch.ops.gemma_keras.rotate(x, cos, sin)
    wide = ops.cast(x, "float32")
    swapped = ops.roll(wide, x.shape[-1] // 2, axis=-1)
    return ops.cast(wide * cos + swapped * sin, x.dtype)


def gated_gelu(gate, up):
    """GELU(gate) * up, of the same shape, GELU in its tanh form and rounded first."""
    if _kernels(gate):
        return torch.ops.gemma_keras.gated_gelu(gate, up)
    return ops.gelu(gate, approximate=True) * up


def argmax(x):
    """The first place [B] of the largest number of each row of `x` [B, V], int32."""
    if NAME == "torch" and x.device.type == "cpu" and x.shape[1] >= _MANY_NUMBERS:
        # torch looks for a place a number at a time, and for a maximum many at once.
        size = math.isqrt(x.shape[1])
        while x.shape[1] % size:
            size -= 1
        parts = x.reshape(len(x), size, -1)
        part = parts.amax(dim=-1).argmax(dim=-1)
        chosen = parts.take_along_dim(part[:, None, None], dim=1)[:, 0]
        place = part * parts.shape[-1] + chosen.argmax(dim=-1)
    else:
        place = ops.argmax(x, axis=-1)
    return ops.cast(place, "int32")


# From so many on it pays to look for them in two steps.
_MANY_NUMBERS = 2**14


# Keys of a row that a kernel holds at once.
_MOST_KEYS = 2**14


def masked_softmax_serves(query, mask):
    """Whether there is `masked_softmax` for queries and a mask [..., S]."""
    return _kernels(query) and mask.shape[-1] <= _MOST_KEYS


def masked_softmax(products, mask, cap, hidden):
    """Softmax over keys, in float32 and rounded last.

    Args:
        products: [B, K, G T, S].
        mask: bool [B, 1, T, S], B perhaps 1: what is not seen counts as `hidden`.
        cap: None, or the bound c of c tanh(products / c).
        hidden: a number.

    Returns:
        [B, K, G T, S], in the dtype of `products`.
    """
    return torch.ops.gemma_keras.masked_softmax(products, mask, cap or 0.0, hidden)


def _is_power_of_two(number):
    return number & (number - 1) == 0


def _kernels(x):
    """Whether there are kernels of ours for `x`, of which nobody asks the gradient."""
    return NAME == "torch" and _in_program.get() is not None and _has_kernels(x.device)


@functools.cache
def _has_kernels(device):
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        importlib.import_module("gemma_keras.triton_kernels")
    except ImportError:
        # As on Windows, where torch comes without Triton.
        return False
    return True


def identities(variables):
    """What tells whether variables are still the same, with the same integers."""
    found = [*map(id, variables)]
    if NAME == "torch":
        values = [v.value for v in variables if not v.value.dtype.is_floating_point]
        found += [value._version for value in values]
    return found


def write_slots(buffer, new, start, axis):
    """`buffer` with `new` at `start` along `axis`: in place wherever that is possible.

    On torch the argument itself is changed, JAX and TensorFlow reuse the memory of a
    donated or loop-carried buffer.
    """
    new = ops.cast(new, buffer.dtype)
    if NAME == "torch":
        with torch.no_grad():
            if isinstance(start, torch.Tensor):
                # In a recorded step, to which the place is an argument.
                places = start + torch.arange(new.shape[axis], device=start.device)
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
            places = start + torch.arange(size, device=start.device)
            return buffer.index_select(axis, places)
        return buffer.narrow(axis, int(start), size)
    if NAME == "tensorflow":
        # To XLA the start of a slice is a constant: it would compile for every one.
        return tf.gather(buffer, start + tf.range(size), axis=axis)
    starts, sizes = [0] * len(buffer.shape), list(buffer.shape)
    starts[axis], sizes[axis] = start, size
    return ops.slice(buffer, starts, sizes)


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


def torch_device():
    """The device that Keras puts torch tensors on."""
    return ops.convert_to_tensor(0).device


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


def may_be_differentiated():
    """Whether somebody may ask for the gradient of what is computed now."""
    return not _in_program.get() and (NAME != "torch" or torch.is_grad_enabled())


def with_gradient(function, gradient, *inputs):
    """The value of a function of tensors, differentiated by another one.

    Args:
        function: takes `inputs`; returns its value and a tuple of tensors to keep.
        gradient: takes the value's slopes and what was kept; returns those of each
            input, None for one that has no slopes.
        *inputs: tensors. Functions that close over others cannot be computed again
            for a backward pass on JAX.
    """
    if NAME == "torch":
        return _WithGradient.apply(function, gradient, *inputs)
    if NAME == "jax":
        run = jax.custom_vjp(lambda *inputs: function(*inputs)[0])
        run.defvjp(function, lambda kept, upstream: tuple(gradient(upstream, *kept)))
        return run(*inputs)

    @ops.custom_gradient
    def run(*inputs):
        value, kept = function(*inputs)
        return value, lambda upstream: tuple(gradient(upstream, *kept))

    return run(*inputs)


if NAME == "torch":

    class _WithGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, function, gradient, *inputs):
            value, kept = function(*inputs)
            ctx.gradient = gradient
            ctx.save_for_backward(*kept)
            return value

        @staticmethod
        def backward(ctx, upstream):
            return None, None, *ctx.gradient(upstream, *ctx.saved_tensors)


HAS_GELU_GRADIENT = NAME == "torch"


def gelu_gradient(upstream, x):
    """Slopes of `x`, given those of GELU(x) in its tanh form, where they are built in.

    That is, on torch: `HAS_GELU_GRADIENT`.
    """
    return torch.ops.aten.gelu_backward(upstream, x, approximate="tanh")


def linear(forward, backward, x):
    """`forward(x)`, differentiated by `backward`, for which nothing is kept.

    Args:
        forward: a linear function of a tensor.
        backward: its transpose: from slopes of the value to slopes of `x`.
        x: the tensor.
    """
    if NAME == "torch":
        return _Linear.apply(forward, backward, x)

    @ops.custom_gradient
    def run(x):
        def gradient(*args, upstream=None):
            return backward(args[0] if upstream is None else upstream)

        return forward(x), gradient

    return run(x)


if NAME == "torch":

    class _Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx, forward, backward, x):
            ctx.transpose = backward
            return forward(x)

        @staticmethod
        def backward(ctx, upstream):
            return None, None, ctx.transpose(upstream)


def not_before(value, x):
    """The tensor `value`, which XLA cannot compute with before it has the floats `x`.

    XLA joins equal computations, and begins as early as it can: what is computed again
    for a backward pass would be kept from the forward pass.
    """
    traced = NAME == "jax" and isinstance(x, jax.core.Tracer)
    if not traced and (NAME != "tensorflow" or tf.executing_eagerly()):
        return value
    # It does not know that this is true, since a float may be NaN.
    corner = ops.reshape(x, (-1,))[0]
    return ops.where(corner == corner, value, ops.zeros_like(value))


def branch(condition, yes, no):
    """`yes()` or `no()`, for what they do to variables."""
    if NAME == "tensorflow":
        tf.cond(condition, lambda: (yes(), ())[1], lambda: (no(), ())[1])
    elif condition:
        yes()
    else:
        no()


# Whether programs are compiled, by XLA, and have to know all shapes beforehand.
# Otherwise operations run as they are written, one after the other.
COMPILES = NAME != "torch"


def few_shapes():
    """Whether what runs again and again should have few shapes, of padded arrays.

    So it should where programs are compiled, or recorded for a device to run alone.
    """
    return COMPILES or _replays(_torch_home())


@functools.cache
def _torch_home():
    return torch_device()


def no_gradient():
    """A context within which torch keeps nothing for a backward pass."""
    return torch.no_grad() if NAME == "torch" else contextlib.nullcontext()


def join_processes():
    """Makes the processes that were started for one training know each other.

    On torch as `torchrun` tells them in their environment, on JAX as Keras has it.

    Raises:
        ValueError: nothing says that there are several, or the backend is TensorFlow.
    """
    if NAME == "jax":
        keras.distribution.initialize()
        return
    if NAME == "tensorflow":
        raise ValueError(
            "TensorFlow trains on several devices in one process: make the model in "
            "the scope of a tf.distribute.MirroredStrategy instead."
        )
    if _torch_distributed():
        return
    if not torch.distributed.is_torchelastic_launched():
        raise ValueError(
            "This process was started alone. Start one for each device with torchrun, "
            "as in: torchrun --nproc-per-node=2 train.py"
        )
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group()
    # Left to the end of the interpreter, its threads may abort the process.
    atexit.register(_leave_processes)


def _leave_processes():
    if _torch_distributed():
        torch.distributed.destroy_process_group()


def process():
    """`(index, count)`: which of the processes that train together this one is."""
    if NAME == "torch" and _torch_distributed():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    if NAME == "jax":
        return jax.process_index(), jax.process_count()
    return 0, 1


def processes_started():
    """How many processes were started for one training, joined yet or not."""
    told = {"torch": "WORLD_SIZE", "jax": "KERAS_DISTRIBUTION_NUM_PROCESSES"}
    number = os.environ.get(told.get(NAME, ""), "1")
    return max(process()[1], int(number) if number.isdigit() else 1)


def from_all_processes(number):
    """The integer that each of several processes calls this with, in their order."""
    if NAME == "jax":
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(np.array(number)).tolist()
    numbers = [None] * process()[1]
    torch.distributed.all_gather_object(numbers, number)
    return numbers


def make_alike(variables):
    """Gives the variables of all torch processes the values of the first one's."""
    if NAME != "torch" or process()[1] == 1:
        return
    for variable in variables:
        value = variable.value.detach()
        # Not in place: a kernel may be a transposed view.
        copy = value.contiguous()
        torch.distributed.broadcast(copy, src=0)
        value.copy_(copy)


def replicas():
    """Copies of the model that train together, each on its part of a batch.

    Processes on torch, and those of a `tf.distribute` strategy on TensorFlow. On JAX
    there is one, whose arrays lie on all devices.
    """
    if NAME == "tensorflow":
        return tf.distribute.get_strategy().num_replicas_in_sync
    return process()[1] if NAME == "torch" else 1


def _torch_distributed():
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def sum_over_replicas(tensors):
    """Sums of floating-point tensors over all replicas, without gradients.

    Args:
        tensors: a list; None stays None.
    """
    if replicas() == 1:
        return tensors
    there = [ops.convert_to_tensor(x) for x in tensors if x is not None]
    sums = iter(_torch_sums(there) if NAME == "torch" else _tensorflow_sums(there))
    return [None if x is None else next(sums) for x in tensors]


def _torch_sums(tensors):
    """All in one message for each dtype: what costs is their number."""
    sums = [None] * len(tensors)
    for dtype in dict.fromkeys(x.dtype for x in tensors):
        places = [i for i, x in enumerate(tensors) if x.dtype == dtype]
        flat = torch.cat([tensors[i].detach().reshape(-1) for i in places])
        torch.distributed.all_reduce(flat)
        parts = flat.split([tensors[i].numel() for i in places])
        for i, part in zip(places, parts, strict=True):
            sums[i] = part.view(tensors[i].shape)
    return sums


def _tensorflow_sums(tensors):
    context = tf.distribute.get_replica_context()
    # None where Keras only asks for shapes.
    return tensors if context is None else context.all_reduce("SUM", tensors)


@contextlib.contextmanager
def summed_gradients(optimizer, means):
    """Within it, `optimizer` steps by the gradients' sums over all replicas.

    Args:
        optimizer: of Keras, or a `Wrapper` around one.
        means: whether each replica's loss is its own mean, as Keras' losses are: then
            it is the mean of the gradients. TensorFlow's Keras has divided them.
    """
    if replicas() == 1:
        yield
        return
    apply = functools.partial(type(optimizer).apply, optimizer)

    def apply_sums(grads, trainable_variables=None):
        sums = sum_over_replicas(grads)
        if NAME == "torch":
            if means:
                sums = [None if x is None else x / replicas() for x in sums]
            apply(sums, trainable_variables)
        else:
            _apply_across_replicas(optimizer, apply, sums, trainable_variables)

    with _replaced(optimizer, apply=apply_sums):
        yield


@contextlib.contextmanager
def _replaced(thing, **methods):
    """Within it, an object has other methods than its class.

    TensorFlow's replicas are threads that all come by here, and wait for each other
    in the methods.
    """
    for name, method in methods.items():
        setattr(thing, name, method)
    try:
        yield
    finally:
        for name in methods:
            vars(thing).pop(name, None)


def _apply_across_replicas(optimizer, apply, sums, variables):
    """Steps of a `tf.distribute` strategy by gradients that are equal on all replicas.

    Keras' own optimizers step inside each replica, where they would sum once more,
    and clip before that. What is wrapped around them changes variables on all replicas
    at once, perhaps in a branch: it is called from outside of the replicas.
    """
    inner = optimizer
    while hasattr(inner, "inner_optimizer"):
        inner = inner.inner_optimizer

    def from_outside(strategy, sums):
        def on_each(grads, trainable_variables=None):
            step = functools.partial(type(inner).apply, inner)
            strategy.run(step, args=(grads, trainable_variables))

        first = functools.partial(_first_of_replicas, strategy)
        values = [None if x is None else first(x) for x in sums]
        with _replaced(inner, apply=on_each, _all_reduce_sum_gradients=list):
            (on_each if inner is optimizer else apply)(values, variables)

    tf.distribute.get_replica_context().merge_call(from_outside, args=(sums,))


def _first_of_replicas(strategy, value):
    return strategy.experimental_local_results(value)[0]


def outside_of_strategy(model):
    """Paths of variables that the replicas of the model's strategy do not have.

    On TensorFlow, of those that were made outside of the strategy's scope.
    """
    if NAME != "tensorflow" or model.distribute_strategy.num_replicas_in_sync == 1:
        return []
    variables = [*model.variables, *model.metrics_variables, *model.optimizer.variables]
    mirrored = tf.distribute.DistributedValues
    return [v.path for v in variables if not isinstance(v.value, mirrored)]


def build_optimizer(model):
    """Makes the optimizer's variables before a step is traced.

    Where tracing makes variables, TensorFlow traces everything once more.
    """
    optimizer = model.optimizer
    if NAME == "tensorflow" and optimizer is not None and not optimizer.built:
        with model.distribute_strategy.scope():
            optimizer.build(model.trainable_variables)


def first_batch(strategy, batches):
    """The first replica's part of the next of Keras' batches on TensorFlow."""
    first = functools.partial(_first_of_replicas, strategy)
    return keras.tree.map_structure(first, next(batches))


def softmax_of_tile(logits, columns, labels, top):
    """What rows of a softmax take from some of their logits.

    Args:
        logits: float32 [C, T]; torch changes them.
        columns: int32 [T], what each of them is the logit of. They follow each other;
            -1 is none.
        labels: int32 [C, 1].
        top: float32 [C, 1], the largest logit of each row so far.

    Returns:
        The largest logit now; the column of these whose logit is the largest; the sum
        of exp(logit - top); and the label's logit, 0 where it is not among these: each
        [C, 1]. And exp(logit - top) [C, T], 0 for the label.
    """
    if NAME == "torch":
        # In place, and the label by its place: a pass over all costs as much as a
        # tenth of the product.
        highest, at = logits.max(-1, keepdim=True)
        place = (labels - columns[-1] + len(columns) - 1).long()
        inside = place.clamp(0, len(columns) - 1)
        there = columns[inside] == labels
        chosen = torch.where(there, logits.gather(1, inside), 0.0)
        top = torch.maximum(top, highest)
        powers = logits.sub_(top).exp_()
        total = powers.sum(-1, keepdim=True)
        rest = torch.where(there, 0.0, powers.gather(1, inside))
        return top, columns[at], total, chosen, powers.scatter_(1, inside, rest)
    best = ops.take(columns, ops.argmax(logits, axis=-1, keepdims=True))
    top = ops.maximum(top, ops.max(logits, axis=-1, keepdims=True))
    powers = ops.exp(logits - top)
    total = ops.sum(powers, axis=-1, keepdims=True)
    there = columns == labels
    chosen = ops.sum(ops.where(there, logits, 0.0), axis=-1, keepdims=True)
    return top, best, total, chosen, ops.where(there, 0.0, powers)


class _Run:
    """One run of a program, or its tracing.

    Attributes:
        kept: what is computed once in it, by who keeps it.
    """

    def __init__(self):
        self.kept = {}


# The run that is going on, or None.
_in_program = contextvars.ContextVar("in_program", default=None)


@contextlib.contextmanager
def _tracing():
    token = _in_program.set(_Run())
    try:
        yield
    finally:
        _in_program.reset(token)


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
            # Loops are written as such: AutoGraph would read all code for nothing.
            self._compiled = tf.function(
                self._traced, jit_compile=True, autograph=False
            )
            self._concrete = {}

    def _with_values(self, values, *arguments):
        # Weights are arguments: closed over, XLA would keep them as constants.
        mapping = list(zip(self.variables, values, strict=True))
        with keras.StatelessScope(state_mapping=mapping):
            return self._traced(*arguments)

    def _traced(self, *arguments):
        with _tracing():
            return self.function(*arguments)

    def __call__(self, *arguments):
        if NAME == "jax":
            values = [variable.value for variable in self.variables]
            return self._compiled(values, *arguments)
        if NAME == "torch":
            arguments = keras.tree.map_structure(_array_to_torch, arguments)
            with torch.no_grad():
                return self._traced(*arguments)
        arguments = tf.nest.map_structure(tf.convert_to_tensor, arguments)
        # Asked for by shape: tf.function itself warns of every few new shapes.
        key = tuple((x.dtype, tuple(x.shape)) for x in tf.nest.flatten(arguments))
        if key not in self._concrete:
            self._concrete[key] = self._compiled.get_concrete_function(*arguments)
        return self._concrete[key](*arguments)


class LayerProgram:
    """A function of a layer and arrays, which nobody asks the gradient of.

    JAX compiles it once for all layers that are alike, such as the blocks of a model;
    torch and TensorFlow run it as it is.

    Args:
        function: takes the layer and nested arrays; returns nested arrays.
    """

    def __init__(self, function):
        self.function = function
        self._compiled = {}

    def __call__(self, layer, *arguments):
        if NAME == "tensorflow":
            # Not as in a program: some of its products are XLA's alone.
            return self.function(layer, *arguments)
        if NAME == "torch":
            with no_gradient(), _tracing():
                return self.function(layer, *arguments)
        variables = layer.variables
        key = tuple(
            (v.path.removeprefix(layer.path or ""), tuple(v.shape), v.dtype)
            for v in variables
        )
        if key not in self._compiled:

            def run(values, *arguments):
                mapping = list(zip(variables, values, strict=True))
                with keras.StatelessScope(state_mapping=mapping), _tracing():
                    return self.function(layer, *arguments)

            self._compiled[key] = jax.jit(run)
        return self._compiled[key]([v.value for v in variables], *arguments)


def _nothing():
    pass


def _replays(device):
    """Whether recorded steps run as graphs of the device."""
    return device.type == "cuda"


class Step:
    """A function of arrays that a loop in a program calls again and again.

    JAX and TensorFlow compile the loop, and this is the function itself. On torch it is
    recorded, once for each set of shapes, and runs without Python from then on
    (torch_steps.py). Integers among the arguments become tensors without dimensions, so
    that they may differ from call to call.

    Args:
        function: takes and returns nested arrays. It may change in place what it then
            returns, but calling it twice with the same arguments must be the same as
            once.
        variables: every Keras variable it reads.
    """

    # Recording takes as long as so many calls save.
    PATIENCE, PATIENCE_REPLAYED = 16, 2

    def __init__(self, function, variables):
        self.function, self.variables = function, list(variables)
        self._calls, self._recorded = {}, {}

    def __call__(self, *arguments, before=_nothing):
        """The function's value; `before` is called before it changes anything."""
        if NAME != "torch":
            return self.function(*arguments)
        leaves, structure = torch.utils._pytree.tree_flatten(arguments)
        device = next(x.device for x in leaves if isinstance(x, torch.Tensor))
        if device.type not in ("cpu", "cuda") or not _can_record():
            before()
            return self.function(*arguments)
        key = (structure, *(getattr(x, "shape", None) for x in leaves))
        if key not in self._recorded:
            before()
            patience = self.PATIENCE_REPLAYED if _replays(device) else self.PATIENCE
            self._calls[key] = self._calls.get(key, 0) + 1
            if self._calls[key] <= patience:
                return self.function(*arguments)
            self._recorded[key] = self._record(leaves, structure, device)
        run, results = self._recorded[key]
        found = run(_in_program.get().kept, self._values, before, leaves)
        return torch.utils._pytree.tree_unflatten(list(found), results)

    def _values(self):
        # Not kept: `fit` and others may put another tensor in a variable.
        return [variable.value.detach() for variable in self.variables]

    def _record(self, leaves, structure, device):
        from gemma_keras import torch_steps

        told = []

        def flat(values, leaves):
            arguments = torch.utils._pytree.tree_unflatten(leaves, structure)
            mapping = list(zip(self.variables, values, strict=True))
            with keras.StatelessScope(state_mapping=mapping):
                results = self.function(*arguments)
            results, form = torch.utils._pytree.tree_flatten(results)
            told.append(form)
            return tuple(results)

        tensors = [torch.as_tensor(x, device=device) for x in leaves]
        graph = torch_steps.record(flat, self._values(), tensors)
        replays = _replays(device)
        kind = torch_steps.Replayed if replays else torch_steps.Recorded
        return kind(graph, len(self.variables)), told[-1]


@functools.cache
def _can_record():
    from gemma_keras import torch_steps

    return torch_steps.can_record()


def _array_to_torch(x):
    return ops.convert_to_tensor(x) if isinstance(x, np.ndarray) else x


def compiled_step(step, fixed, shardings, keep):
    """A step of Keras' trainer on JAX, compiled, that passes by what it never changes.

    Keras gives the program every variable and takes it back. A frozen weight whose
    memory is not JAX's own cannot be given, and would be copied, model and all.

    What is given is no more once the program has begun, so that a Ctrl-C between its
    end and the caller's next line would leave neither the old state nor the new.

    Args:
        step: takes `(state, data)`, returns `(logs, state)`; a state is a tuple of
            lists of arrays.
        fixed: for each of these, the positions whose arrays stay as they are.
        shardings: of a state, or None.
        keep: is called with each new state, Ctrl-C or not.
    """

    def part(state):
        groups = list(zip(state, fixed, strict=True))
        moving = [[v for i, v in enumerate(g) if i not in f] for g, f in groups]
        return moving, [[g[i] for i in sorted(f)] for g, f in groups]

    def join(moving, still):
        state = []
        for more, rest, places in zip(moving, still, fixed, strict=True):
            turns = {True: iter(rest), False: iter(more)}
            count = len(more) + len(rest)
            state.append([next(turns[i in places]) for i in range(count)])
        return tuple(state)

    def run(moving, still, data):
        logs, state = step(join(moving, still), data)
        return logs, part(state)[0]

    shardings = None if shardings is None else (None, part(shardings)[0])
    program = jax.jit(run, donate_argnums=0, out_shardings=shardings)

    def call(state, data):
        moving, still = part(state)
        results = []
        try:
            # The list has the result before Python looks for signals again.
            results.extend(map(program, [moving], [still], [data]))
            logs, moving = results[0]
            state = join(moving, still)
            keep(state)
            return logs, state
        except BaseException:
            if results:
                keep(join(results[0][1], still))
            raise

    return call


def remat(function):
    """`function` of a tensor, of which a backward pass keeps the argument alone."""
    if NAME == "torch":
        return keras.remat(function)
    return _jax_remat(function) if NAME == "jax" else _tensorflow_remat(function)


def _jax_remat(function):
    def call(x):
        flat, values = jax.closure_convert(function, x)
        run = jax.custom_vjp(flat)

        def forward(x, *values):
            return flat(x, *values), (x, values)

        def backward(kept, upstream):
            x, values = kept
            return jax.vjp(flat, not_before(x, upstream), *values)[1](upstream)

        run.defvjp(forward, backward)
        return run(x, *values)

    return call


def _tensorflow_remat(function):
    # That of TensorFlow makes the second pass wait in a way that XLA sees through.
    @tf.custom_gradient
    def call(x):
        def gradient(upstream, variables=()):
            again = not_before(x, upstream)
            with tf.GradientTape() as tape:
                tape.watch(again)
                value = function(again)
            sources = [again, *variables]
            slope, *slopes = tape.gradient(value, sources, output_gradients=upstream)
            return slope, slopes

        return function(x), gradient

    return call


def assign_living(variables, values):
    """Gives variables what JAX computed, but for what a failed program took along.

    Returns:
        How many it took along; their variables are left as they are.
    """
    lost = 0
    for variable, value in zip(variables, values, strict=True):
        if isinstance(value, jax.Array) and value.is_deleted():
            lost += 1
        else:
            variable.assign(value)
    return lost


def sync_training(model):
    """Brings to the model's variables what `fit` has changed so far.

    JAX keeps the state of training outside of them until an epoch ends.
    """
    if NAME == "jax":
        model.jax_state_sync()


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


def peak_memory():
    """Most bytes that were in use at once: the device's, or the process' on a CPU."""
    if NAME == "jax":
        used = jax.local_devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in used:
            return used["peak_bytes_in_use"]
    elif NAME == "torch":
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
    elif tf.config.list_logical_devices("GPU"):
        return tf.config.experimental.get_memory_info("GPU:0")["peak"]
    return _peak_of_process()


# Numbers of settings in glibc's malloc.h: from which size on memory is mapped, and how
# much of what is free at the end of the heap stays there.
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1


_gives_back = contextvars.ContextVar("gives_back", default=False)


@contextlib.contextmanager
def giving_back_memory():
    """Has large tensors that torch frees on a CPU go back to the system at once.

    glibc keeps what lies below something that is still in use, so that a process grows
    over the steps of a training run by half as much again as it uses. Nothing happens
    where another library allocates memory.
    """
    token = _gives_back.set(True)
    _set_malloc(2**22, 2**17)
    try:
        yield
    finally:
        _gives_back.reset(token)


def keep_memory():
    """Has up to 256 MiB of what torch frees on a CPU stay with the process.

    Memory that comes from the system comes page by page, which takes a fifth of the
    time of reading a prompt. Nothing happens within `giving_back_memory`, as when a
    training run makes samples.
    """
    if not _gives_back.get():
        _set_malloc(2**26, 2**28)


def _set_malloc(mapped_from, kept):
    if NAME == "torch" and torch_device().type == "cpu":
        with contextlib.suppress(OSError, AttributeError, TypeError):
            library = ctypes.CDLL(None)
            library.mallopt(_M_MMAP_THRESHOLD, mapped_from)
            library.mallopt(_M_TRIM_THRESHOLD, kept)


def device_memory():
    """Bytes of the accelerator that the backend computes on; None on a CPU."""
    if NAME == "jax":
        return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if NAME == "torch":
        return torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else None
    # What TensorFlow tells of a device has no size, but in this list.
    from tensorflow.python.client import device_lib

    found = [d for d in device_lib.list_local_devices() if d.device_type == "GPU"]
    return found[0].memory_limit if found else None


def _peak_of_process():
    # Not ru_maxrss where it can be helped: it begins with the parent's.
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return 1024 * int(found[1])
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def description():
    """Name to version of the backend, and the device that it computes on."""
    package = "tensorflow" if NAME == "tensorflow" else NAME
    if NAME == "jax":
        device = jax.devices()[0].device_kind
    elif NAME == "torch":
        there = torch.cuda.is_available()
        device = torch.cuda.get_device_name() if there else str(torch_device())
    else:
        gpus = tf.config.list_physical_devices("GPU")
        details = tf.config.experimental.get_device_details(gpus[0]) if gpus else {}
        device = details.get("device_name", "cpu")
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        version = sys.modules[NAME].__version__
    return {NAME: version, "device": device}
