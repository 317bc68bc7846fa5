"""What a token needs beside matrix products, one kernel each, for torch on CUDA.

A token of a small model is a thousand short kernels otherwise, each of which takes
longer to begin than to run. They are operations of torch (`torch.ops.gemma_keras`), so
that a recorded step has them too, and have no gradients. What each computes is told in
fused.py and packed_products.py. Imported where there is Triton.
"""

import math
import os

import torch
import triton
import triton.language as tl

_OPERATIONS = torch.library.Library("gemma_keras", "DEF")
# Triton's interpreter, for tests, computes on a CPU.
_DEVICE = "CPU" if os.environ.get("TRITON_INTERPRET") == "1" else "CUDA"


def _operation(schema):
    """Registers a function as the operation of a schema."""
    _OPERATIONS.define(schema)

    def register(function):
        _OPERATIONS.impl(schema.partition("(")[0], function, _DEVICE)
        return function

    return register


@triton.jit
def _rms_norm(x, scale, out, width, epsilon, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * width
    column = tl.arange(0, BLOCK)
    inside = column < width
    numbers = tl.load(x + start + column, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(numbers * numbers, axis=0) / width
    gain = 1.0 + tl.load(scale + column, mask=inside, other=0.0).to(tl.float32)
    normal = numbers * tl.rsqrt(mean + epsilon) * gain
    tl.store(out + start + column, normal.to(out.dtype.element_ty), mask=inside)


@_operation("rms_norm(Tensor x, Tensor scale, float epsilon, ScalarType t) -> Tensor")
def rms_norm(x, scale, epsilon, dtype):
    """`backend.rms_norm`."""
    x = x.contiguous()
    out = torch.empty_like(x, dtype=dtype)
    width = x.shape[-1]
    block = triton.next_power_of_2(width)
    warps = min(8, max(1, block // 256))
    grid = (x.numel() // width,)
    _rms_norm[grid](x, scale, out, width, epsilon, BLOCK=block, num_warps=warps)
    return out


@triton.jit
def _rotate(x, cos, sin, out, heads, tokens, ALIKE: tl.constexpr, HALF: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    token = row // heads
    # One table for all rows of a batch, or one for each.
    place = (token % tokens if ALIKE else token) * 2 * HALF
    start = row * 2 * HALF
    column = tl.arange(0, HALF)
    first = tl.load(x + start + column).to(tl.float32)
    second = tl.load(x + start + HALF + column).to(tl.float32)
    low = first * tl.load(cos + place + column)
    low += second * tl.load(sin + place + column)
    high = second * tl.load(cos + place + HALF + column)
    high += first * tl.load(sin + place + HALF + column)
    tl.store(out + start + column, low.to(out.dtype.element_ty))
    tl.store(out + start + HALF + column, high.to(out.dtype.element_ty))


@_operation("rotate(Tensor x, Tensor cos, Tensor sin) -> Tensor")
def rotate(x, cos, sin):
    """`backend.rotate`, H a power of two."""
    x = x.contiguous()
    out = torch.empty_like(x)
    batch, tokens, heads, size = x.shape
    _rotate[(batch * tokens * heads,)](
        x,
        cos.contiguous(),
        sin.contiguous(),
        out,
        heads,
        tokens,
        ALIKE=cos.shape[0] != batch,
        HALF=size // 2,
        num_warps=1,
    )
    return out


# 2 sqrt(2 / pi), and the same times 0.044715.
_LINEAR = tl.constexpr(2 * math.sqrt(2 / math.pi))
_CUBIC = tl.constexpr(2 * math.sqrt(2 / math.pi) * 0.044715)


@triton.jit
def _gated_gelu(gate, up, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    x = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    # (1 + tanh(u)) / 2 is the logistic function of 2 u.
    active = x * tl.sigmoid(x * (_LINEAR + _CUBIC * x * x))
    kind = out.dtype.element_ty
    other = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    product = active.to(kind).to(tl.float32) * other
    tl.store(out + at, product.to(kind), mask=inside)


@_operation("gated_gelu(Tensor gate, Tensor up) -> Tensor")
def gated_gelu(gate, up):
    """`backend.gated_gelu`."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    block = 1024
    grid = (triton.cdiv(gate.numel(), block),)
    _gated_gelu[grid](gate, up, out, gate.numel(), BLOCK=block, num_warps=4)
    return out


@triton.jit
def _masked_softmax(
    x, mask, out, heads, tokens, groups, keys, cap, hidden,
    ALIKE: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token = row // groups
    seen = token % tokens
    if not ALIKE:
        seen += token // (heads * tokens) * tokens
    key = tl.arange(0, BLOCK)
    inside = key < keys
    score = tl.load(x + row * keys + key, mask=inside, other=0.0).to(tl.float32)
    if CAPPED:
        score = cap * (2.0 * tl.sigmoid(2.0 * score / cap) - 1.0)
    visible = tl.load(mask + seen * keys + key, mask=inside, other=0)
    score = tl.where(visible != 0, score, hidden)
    score = tl.where(inside, score, -float("inf"))
    power = tl.exp(score - tl.max(score, axis=0))
    weight = power / tl.sum(power, axis=0)
    tl.store(out + row * keys + key, weight.to(out.dtype.element_ty), mask=inside)


@_operation("masked_softmax(Tensor x, Tensor mask, float cap, float hidden) -> Tensor")
def masked_softmax(products, mask, cap, hidden):
    """`backend.masked_softmax`; a `cap` of 0 is none."""
    products = products.contiguous()
    out = torch.empty_like(products)
    batch, heads, rows, keys = products.shape
    mask = mask.contiguous().view(torch.uint8)
    block = triton.next_power_of_2(keys)
    _masked_softmax[(batch * heads * rows,)](
        products,
        mask,
        out,
        heads,
        mask.shape[2],
        rows // mask.shape[2],
        keys,
        cap,
        hidden,
        ALIKE=mask.shape[0] != batch,
        CAPPED=cap != 0,
        BLOCK=block,
        num_warps=min(16, max(1, block // 512)),
    )
    return out


@triton.jit
def _int8_mm(
    x, codes, scales, out, count, rows,
    columns: tl.constexpr, COUNT: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    which = tl.arange(0, COUNT)
    total = tl.zeros([COUNT, ROWS], tl.float32)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < columns
        numbers = tl.load(
            x + which[:, None] * columns + column[None, :],
            mask=(which < count)[:, None] & inside[None, :],
            other=0.0,
        )
        matrix = tl.load(
            codes + row[None, :] * columns + column[:, None],
            mask=(row < rows)[None, :] & inside[:, None],
            other=0,
        )
        total += tl.dot(numbers, matrix.to(numbers.dtype))
    total *= tl.load(scales + row, mask=row < rows, other=0.0)[None, :]
    tl.store(
        out + which[:, None] * rows + row[None, :],
        total.to(out.dtype.element_ty),
        mask=(which < count)[:, None] & (row < rows)[None, :],
    )


@_operation("int8_mm(Tensor x, Tensor codes, Tensor scales) -> Tensor")
def int8_mm(x, codes, scales):
    """`x` [C, K] times the transpose of codes * scales, [N, K] and float32 [N].

    C is up to 16: what a product of matrix units has.
    """
    x, codes = x.contiguous(), codes.contiguous()
    count, columns = x.shape
    rows = len(codes)
    out = torch.empty((count, rows), dtype=x.dtype, device=x.device)
    # A small matrix is divided among as many units as there are.
    block = 32 if rows >= 8192 else 16
    _int8_mm[(triton.cdiv(rows, block),)](
        x, codes, scales, out, count, rows, columns,
        COUNT=16, ROWS=block, COLUMNS=256, num_warps=4, num_stages=4,
    )  # fmt: skip
    return out
