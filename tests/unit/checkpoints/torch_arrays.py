"""Arrays as torch has them, for tests of files of torch.save."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")


def to_torch(array):
    """The tensor of the same numbers, also of bfloat16, which torch wants as bits."""
    array = np.ascontiguousarray(array)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
