"""Products with weights of few bits, by kernels that read them as they are."""

import functools

from gemma_keras.backend.fused import has_kernels
from gemma_keras.backend.library import NAME, torch
from gemma_keras.backend.running import in_program


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


# Rows up to which torch's kernels take less time than restoring a matrix, by its bits:
# on a CPU they take as long for each row (measured in tools/bench/LOG.md), on a GPU
# they have 16.
_MOST_ROWS = {4: 96, 8: 32}
_MOST_ROWS_CUDA = 16


def has_packed_kernels(x, bits):
    """Whether products of `x` [..., K] in few bits may have kernels.

    That is, in a program, for bfloat16, and for as many rows as they are fast with.
    """
    if not (NAME == "torch" and in_program.get() and x.dtype == torch.bfloat16):
        return False
    most = _MOST_ROWS[bits] if x.device.type == "cpu" else _MOST_ROWS_CUDA
    return x.numel() <= most * x.shape[-1] and _has_packed_kernels(x.device)


@functools.cache
def _has_packed_kernels(device):
    # torch's are not part of what it promises.
    if device.type == "cpu":
        names = ("int8pack_mm", "int4pack_mm_for_cpu")
        return all(hasattr(torch, f"_weight_{name}") for name in names)
    # AMD's have numbers in another order.
    there = hasattr(torch, "_weight_int4pack_mm") and torch.version.hip is None
    return there and has_kernels(device)


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
