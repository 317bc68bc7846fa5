"""Functions with gradients of their own, and what a backward pass keeps."""

import contextlib

from keras import ops

from gemma_keras.backend.library import NAME, jax, tf, torch
from gemma_keras.backend.running import in_program


def may_be_differentiated():
    """Whether somebody may ask for the gradient of what is computed now."""
    return not in_program.get() and (NAME != "torch" or torch.is_grad_enabled())


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


def not_before(value, x):
    """The tensor `value`, which XLA cannot compute with before it has the floats `x`.

    XLA joins equal computations, and begins as early as it can: what is computed again
    for a backward pass would be kept from the forward pass.
    """
    if not _in_graph(x):
        return value
    # It does not know that this is true, since a float may be NaN.
    corner = ops.reshape(x, (-1,))[0]
    # One zero, and not as many as numbers: TensorFlow would write them out, several
    # times for each value, before it gives its program to XLA.
    return ops.where(corner == corner, value, ops.zeros((), value.dtype))


def _in_graph(x):
    """Whether the tensor `x` is one of a program that XLA may compile."""
    if NAME == "jax":
        return isinstance(x, jax.core.Tracer)
    return NAME == "tensorflow" and not tf.executing_eagerly()


def zeros_not_before(x, shape):
    """Zeros in float32, which XLA cannot make before it has the floats `x`.

    What a loop begins with it would copy for all loops of a program, at its beginning.
    """
    if not _in_graph(x):
        return ops.zeros(shape, dtype="float32")
    # Not 0, or it would see that `x` does not matter.
    smallest = not_before(ops.convert_to_tensor(1e-37, "float32"), x) - 1e-37
    return ops.broadcast_to(smallest, shape)


def no_gradient():
    """A context within which torch keeps nothing for a backward pass."""
    return torch.no_grad() if NAME == "torch" else contextlib.nullcontext()


def remat(function, variables):
    """`function` of a tensor, of which a backward pass keeps the argument alone.

    Args:
        function: of one tensor, to one.
        variables: the Keras variables that it reads and that are trained.
    """
    # Not Keras' way: XLA computes again what it can before the backward pass begins,
    # and then keeps it.
    if NAME == "torch":
        return lambda x: _Remat.apply(function, x, *[v.value for v in variables])
    return _jax_remat(function) if NAME == "jax" else _tensorflow_remat(function)


if NAME == "torch":

    class _Remat(torch.autograd.Function):
        # torch's own leaves its tensors in cycles, until Python collects garbage.
        @staticmethod
        def forward(ctx, function, x, *trained):
            ctx.function = function
            ctx.save_for_backward(x, *trained)
            return function(x)

        @staticmethod
        def backward(ctx, upstream):
            x, *trained = ctx.saved_tensors
            with torch.enable_grad():
                again = x.detach().requires_grad_(x.requires_grad)
                value = ctx.function(again)
            needed = ctx.needs_input_grad[1:]
            inputs = [v for v, n in zip([again, *trained], needed, strict=True) if n]
            slopes = torch.autograd.grad(value, inputs, upstream, allow_unused=True)
            slopes = iter(slopes)
            return None, *[next(slopes) if n else None for n in needed]


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
