"""Products with matrices, each in the way that its backend is fastest at."""

import math
import os

import keras
from keras import ops

from gemma_keras.backend.device import on_cpu
from gemma_keras.backend.gradients import with_gradient
from gemma_keras.backend.library import NAME, jax, jnp, tf, torch
from gemma_keras.backend.running import in_program
from gemma_keras.backend.torch_products import (
    FEW_ROWS,
    differentiable,
    equal_parts,
    matmul_few_rows,
    matmul_widened,
    onednn_batches,
    onednn_has_batches,
    onednn_is_faster,
    onednn_keeps,
    onednn_product,
    onednn_product_kept,
    torch_is_slow_in,
    torch_would_use_one_core,
)


def matmul(x, kernel, transposed=False):
    """`x` [..., D] times `kernel` [D, F], or [F, D] if `transposed`.

    In the dtype of `x`, or in float32 where that is what the backend makes anyway.
    """
    kernel = ops.cast(kernel, x.dtype)
    if _xla_would_copy(x):
        return _matmul_bfloat16(x, kernel, transposed)
    if torch_is_slow_in(x):
        return matmul_widened(x, kernel.T if transposed else kernel)
    if onednn_keeps(x, kernel):
        return onednn_product_kept(x, kernel.T if transposed else kernel)
    if onednn_is_faster(x, kernel, transposed):
        return differentiable(onednn_product, x, kernel.T if transposed else kernel)
    if torch_would_use_one_core(x):
        return matmul_few_rows(x, kernel, transposed)
    parts = _parts_for_xla(x, kernel, transposed)
    if parts > 1:
        return _matmul_in_parts(x, kernel, transposed, parts)
    if NAME == "tensorflow":
        return _tensorflow_matmul(x, kernel, transposed)
    kernel = ops.transpose(kernel) if transposed else kernel
    if _xla_is_slow_with_one_row(x):
        rows = jnp.broadcast_to(jnp.reshape(x, (1, -1)), (2, x.shape[-1]))
        return jnp.reshape(jnp.matmul(rows, kernel)[:1], (*x.shape[:-1], -1))
    return _plain_matmul(x, kernel)


def _plain_matmul(x, y):
    """`ops.matmul` of two of a dtype, which takes torch 9 us in place of one to say."""
    return torch.matmul(x, y) if NAME == "torch" else ops.matmul(x, y)


def makes_gelu(x, kernel):
    """Whether there is `matmul_gelu`, which takes no more time than the product."""
    if NAME != "torch" or not in_program.get():
        return False
    return onednn_is_faster(x, ops.convert_to_tensor(kernel), False)


def matmul_gelu(x, kernel):
    """GELU, in its tanh form, of `matmul(x, kernel)`, without a gradient."""
    rows, kernel = x.reshape(-1, x.shape[-1]), ops.cast(kernel, x.dtype)
    made = onednn_product(rows, kernel, gelu=True)
    return made.reshape(*x.shape[:-1], -1)


def matmul_of_few(x, kernel):
    """`matmul` of an `x` [..., D] with few columns, whose kernel [D, F] is trained.

    For the slopes of a kernel JAX turns those of the product, unless it is told
    otherwise; XLA takes as long for that as for many products with D columns.
    """
    if NAME != "jax" or in_program.get():
        return matmul(x, kernel)
    rows = jnp.reshape(x, (-1, x.shape[-1]))
    kernel = ops.convert_to_tensor(kernel)
    product = with_gradient(_product_and_kept, _product_slopes, rows, kernel)
    return jnp.reshape(product, (*x.shape[:-1], -1))


def _product_and_kept(rows, kernel):
    return matmul(rows, kernel), (rows, kernel)


def _product_slopes(upstream, rows, kernel):
    of_rows = jnp.matmul(upstream, kernel.T.astype(upstream.dtype))
    of_kernel = jnp.matmul(rows.T, upstream, preferred_element_type=jnp.float32)
    return of_rows.astype(rows.dtype), of_kernel.astype(kernel.dtype)


def _xla_is_slow_with_one_row(x):
    """Whether two rows take less time: on a GPU, one has no kernel but a sum.

    Only for narrow floats, whose products round anyway: two rows of float32 may be
    multiplied with less precision than one.
    """
    return (
        NAME == "jax"
        and math.prod(x.shape[:-1]) == 1
        and x.dtype in (jnp.bfloat16, jnp.float16)
        and in_program.get() is not None
        and jax.default_backend() == "gpu"
    )


# From so many numbers on it pays XLA to divide a kernel: no cache holds it.
_DIVIDED_FROM = 2**19


def _parts_for_xla(x, kernel, transposed):
    """In how many parts XLA multiplies with a kernel faster than at once.

    On a CPU it reads one for a few rows at half to two thirds of the memory's speed,
    and a batch of several at nearly all of it.
    """
    rows = x.shape[:-1]
    if NAME == "torch" or not in_program.get() or None in rows:
        return 1
    if math.prod(rows) > FEW_ROWS or math.prod(kernel.shape) < _DIVIDED_FROM:
        return 1
    narrow = keras.backend.standardize_dtype(x.dtype) != "float32"
    if narrow or not on_cpu() or keras.distribution.distribution() is not None:
        return 1
    if not transposed and math.prod(rows) > 1:
        return 1
    return equal_parts(kernel.shape[0], 2 * (os.cpu_count() or 1))


def _matmul_in_parts(x, kernel, transposed, parts):
    multiply = jnp.matmul if NAME == "jax" else tf.matmul
    rows = ops.reshape(x, (-1, x.shape[-1]))
    divided = ops.reshape(kernel, (parts, -1, kernel.shape[1]))
    if transposed:
        shape = (parts, rows.shape[1], rows.shape[0])
        turned = ops.broadcast_to(ops.transpose(rows)[None], shape)
        product = ops.transpose(multiply(divided, turned), (2, 0, 1))
    else:
        product = ops.sum(multiply(ops.reshape(rows, (parts, 1, -1)), divided), axis=0)
    return ops.reshape(product, (*x.shape[:-1], -1))


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
    return NAME != "torch" and in_program.get() and on_cpu()


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
    if torch_is_slow_in(x):
        return torch.matmul(x.float(), y.float()).to(x.dtype)
    if onednn_has_batches(x, y):
        return onednn_batches(x, y)
    return _plain_matmul(x, y)


def row_products(x, y):
    """Products of the rows of `x` [..., R, D] and of `y` [..., S, D]: [..., R, S].

    In the dtype of `x`; for use where `batch_matmul` is.
    """
    turned = NAME != "torch" and x.shape[-2] < x.shape[-1]
    if turned and in_program.get() and on_cpu():
        # XLA copies what it turns there: the result, then, in place of `y`.
        return ops.swapaxes(ops.matmul(y, ops.swapaxes(x, -1, -2)), -1, -2)
    return batch_matmul(x, ops.swapaxes(y, -1, -2))
