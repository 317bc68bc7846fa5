"""Products, and attention of a token, that torch would make slowly on a CPU."""

import functools
import math

from gemma_keras.backend.library import NAME, torch
from gemma_keras.backend.running import in_program
from gemma_keras.backend.torch_reorder import can_reorder

# Up to so many rows are few: those that decode together.
FEW_ROWS = 16
# A matrix that is narrower, such as LoRA's factors, gains nothing from oneDNN.
_LEAST = 64


def torch_attention_serves(query):
    """Whether `torch_attention` is faster than single operations, for few queries."""
    return (
        NAME == "torch"
        and in_program.get()
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


def torch_is_slow_in(x):
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


def matmul_widened(x, kernel):
    """The product in float32, rounded once, of a kernel that is widened by parts."""
    rows = x.reshape(-1, x.shape[-1])
    # One row along the kernel's memory is the exception that torch is fast at.
    if len(rows) <= 2 and kernel.stride(0) == 1:
        return torch.matmul(x, kernel)
    return differentiable(_widened_product, x, kernel)


def _widened_parts(rows, kernel):
    """Slices of the kernel's columns."""
    most = _WIDENED_FEW if len(rows) <= FEW_ROWS else _WIDENED_MANY
    step = max(1, most // (4 * kernel.shape[0]))
    return [slice(i, i + step) for i in range(0, kernel.shape[1], step)]


def _widened_product(rows, kernel):
    wide = rows.float()
    parts = _widened_parts(rows, kernel)
    made = [(wide @ kernel[:, part].float()).to(rows.dtype) for part in parts]
    return made[0] if len(made) == 1 else torch.cat(made, dim=1)


def differentiable(multiply, x, kernel):
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


def onednn_is_faster(x, kernel, transposed):
    """Whether torch should multiply with oneDNN what it would with MKL, in float32.

    MKL does not use AVX-512 on AMD's processors: oneDNN is twice as fast there, with
    few rows and with many, but for the few rows that decoding brings to the head, and
    for one row where `matmul_few_rows` reads along it (measured in tools/bench/LOG.md).
    """
    if not _onednn_serves(x) or min(kernel.shape) < _LEAST:
        return False
    if torch_would_use_one_core(x) and x.numel() == x.shape[-1]:
        return kernel.stride(1 if transposed else 0) != 1
    return not (transposed and in_program.get() and x.numel() <= 4 * x.shape[-1])


def _onednn_serves(x):
    on_cpu = NAME == "torch" and x.device.type == "cpu"
    return on_cpu and x.dtype == torch.float32 and _has_onednn()


@functools.cache
def _has_onednn():
    # The operation is not part of what torch promises.
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
    )


def onednn_keeps(x, kernel):
    """Whether a step that is recorded multiplies by a matrix in oneDNN's order.

    So it does few rows in bfloat16: see torch_reorder.py.
    """
    return (
        NAME == "torch"
        and in_program.get()
        and x.dtype == kernel.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and x.numel() <= FEW_ROWS * x.shape[-1]
        and min(kernel.shape) >= _LEAST
        and torch.jit.is_tracing()
        and _multiplies_on_cpu(x.dtype)
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and can_reorder()
    )


def onednn_product_kept(x, kernel):
    """`x` [..., D] times `kernel` [D, F], a weight or one that is turned."""
    rows = x.reshape(-1, x.shape[-1])
    product = _onednn_recorded("none", "", reorder=True)(rows, kernel.T)
    return product.reshape(*x.shape[:-1], kernel.shape[-1])


def onednn_product(rows, kernel, gelu=False):
    """`rows` [C, D] times `kernel` [D, F] by oneDNN; with GELU, in its tanh form."""
    kind, form = ("gelu", "tanh") if gelu else ("none", "")
    rows, matrix = _in_order(rows), _in_order(kernel.T)
    if torch.jit.is_tracing():
        return _onednn_recorded(kind, form)(rows, matrix)
    multiply = torch.ops.mkldnn._linear_pointwise
    return multiply(rows, matrix, None, kind, [], form)


def _in_order(matrix):
    """A matrix whose rows or columns follow each other in memory.

    For others, such as some of the heads of a tensor, oneDNN has no kernel: what it
    does in its place takes a hundred times as long.
    """
    if matrix.is_contiguous() or matrix.T.is_contiguous():
        return matrix
    return matrix.contiguous()


@functools.cache
def _onednn_recorded(kind, form, reorder=False):
    """The same product as a graph: its empty list is nothing that can be recorded."""
    order = """
          %rows : int = prim::Constant[value=8]()
          %used : Tensor = mkldnn::_reorder_linear_weight(%matrix, %rows)"""
    graph = torch._C.parse_ir(f"""
        graph(%x : Tensor, %matrix : Tensor):{order if reorder else ""}
          %none : NoneType = prim::Constant()
          %kind : str = prim::Constant[value="{kind}"]()
          %form : str = prim::Constant[value="{form}"]()
          %numbers : Scalar?[] = prim::ListConstruct()
          %product : Tensor = mkldnn::_linear_pointwise(
              %x, {"%used" if reorder else "%matrix"}, %none, %kind, %numbers, %form)
          return (%product)""")
    return torch._C._create_function_from_graph("product", graph)


def onednn_has_batches(x, y):
    """Whether oneDNN multiplies `x` [..., T, D] with `y` [..., D, S] faster than MKL.

    That is, in float32 and with many rows: it is called for one matrix at a time.
    """
    return (
        _onednn_serves(x)
        and x.dtype == y.dtype
        and min(*x.shape[-2:], y.shape[-1]) >= _LEAST
        and x.shape[:-2] == y.shape[:-2]
    )


def onednn_batches(x, y):
    """`x` [..., T, D] times `y` [..., D, S], without a gradient."""
    first, second = (z.reshape(-1, *z.shape[-2:]) for z in (x, y))
    pairs = zip(first.unbind(), second.unbind(), strict=True)
    made = [onednn_product(*pair) for pair in pairs]
    product = made[0][None] if len(made) == 1 else torch.stack(made)
    return product.view(*x.shape[:-1], y.shape[-1])


def torch_would_use_one_core(x):
    """Whether torch would multiply on one core what several could.

    So it does on a CPU with the few rows of decoding, in float32: it divides rows and
    batches among threads, and not the kernel (measured in tools/bench/LOG.md).
    """
    return (
        NAME == "torch"
        and in_program.get()
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.numel() <= FEW_ROWS * x.shape[-1]
    )


# Into how many parts a table of many rows is divided, and a kernel among threads.
_TABLE_PARTS = 16


def matmul_few_rows(x, kernel, transposed):
    """`x` [..., D] times `kernel` [D, F], or [F, D] if `transposed`, on all cores."""
    rows = x.reshape(-1, x.shape[-1])
    count = rows.shape[0]
    if count == 1 and not transposed and kernel.stride(0) == 1:
        # Along its memory.
        kernel, transposed = kernel.T, True
    if transposed:
        outputs, inputs = kernel.shape
        large = outputs >= _TABLE_PARTS * 1024
        most = _TABLE_PARTS if large else torch.get_num_threads()
        parts = equal_parts(outputs, most)
        batch = kernel.view(parts, outputs // parts, inputs)
        product = torch.bmm(batch, rows.T.expand(parts, -1, -1))
        # In order, since what reads a row of logits next would go astray otherwise.
        product = product.reshape(outputs, count).T.contiguous()
    else:
        inputs, outputs = kernel.shape
        parts = equal_parts(outputs, torch.get_num_threads())
        batch = kernel.view(inputs, parts, outputs // parts).transpose(0, 1)
        product = torch.bmm(rows.expand(parts, -1, -1), batch).transpose(0, 1)
    return product.reshape(*x.shape[:-1], -1)


def equal_parts(size, most):
    """Up to so many equal parts of at least 128."""
    parts = max(1, min(most, size // 128))
    while size % parts:
        parts -= 1
    return parts
