"""Factors kept inside weights: multiplied into float32, and taken out again.

A product is computed in float64 and rounded once. That is undone without a trace if
the weight has at most 11 significant bits, as those of bfloat16 (8) and float16 (11)
have: among the numbers that give the stored product, theirs is the only one so short.
A weight of float32 comes back within its last bit, unless the factor is a power of two,
with which nothing is lost: the products lie closer together than the weights in some
places, and further apart in others.
"""

import numpy as np

# Numbers that are computed at once.
_CHUNK = 2**22
# A float32 has 23 bits after its first; ten of them are kept, and so 11 in all.
_HALF, _KEPT = np.uint32(2**12), np.uint32(2**32 - 2**13)


def multiplied(array, factor):
    """`array * factor` in float32."""
    return (array.astype(np.float64) * factor).astype(np.float32)


def divided(array, factor):
    """What `multiplied` made `array` of, as float32.

    Args:
        array: Numbers of any float dtype; those in float32 are overwritten.
        factor: The factor. What was stored with less than float32 has lost its last
            bits then, and gets the quotient.
    """
    whole = array.dtype == np.float32
    result = array if whole else np.empty(array.shape, np.float32)
    rows = max(1, _CHUNK // max(1, array.size // max(1, len(array))))
    for start in range(0, len(array), rows):
        block = slice(start, start + rows)
        result[block] = _divided(array[block], factor)
    return result


def _divided(array, factor):
    with np.errstate(over="ignore", invalid="ignore"):
        quotient = (array.astype(np.float64) / factor).astype(np.float32)
        if array.dtype != np.float32:
            return quotient
        short = ((quotient.view(np.uint32) + _HALF) & _KEPT).view(np.float32)
        return np.where(multiplied(short, factor) == array, short, quotient)
