"""GELU(gate) * up, which keeps two tensors for its gradient.

Left to themselves, the backends keep between three and eight of them, each as wide as
the feed-forward layer: most of the memory that training takes.
"""

import math

from keras import ops

from gemma_keras import backend


def geglu(gate, up):
    """GELU(gate) * up, GELU in its tanh form (Hendrycks and Gimpel 2016).

    Args:
        gate: [..., F].
        up: [..., F], of the same dtype.
    """
    if not backend.may_be_differentiated():
        return backend.gated_gelu(gate, up)
    return backend.with_gradient(_value_and_inputs, _from_inputs, gate, up)


def _value_and_inputs(gate, up):
    return ops.gelu(gate, approximate=True) * up, (gate, up)


def _from_inputs(upstream, gate, up):
    gate, up = (backend.not_before(x, upstream) for x in (gate, up))
    active = ops.gelu(gate, approximate=True)
    if backend.HAS_GELU_GRADIENT:
        return backend.gelu_gradient(upstream * up, gate), upstream * active
    slope = ops.cast(_gelu_slope(ops.cast(gate, "float32")), gate.dtype)
    return upstream * slope * up, upstream * active


def _gelu_slope(x):
    """Derivative of 0.5 x (1 + tanh(c (x + a x^3)))."""
    c, a = math.sqrt(2 / math.pi), 0.044715
    square = ops.square(x)
    tanh = ops.tanh(c * x * (1.0 + a * square))
    inner = c * (1.0 + 3.0 * a * square)
    return 0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - ops.square(tanh)) * inner
