"""Kernels for GPUs against plain operations: on a GPU, or interpreted on a CPU."""

import dataclasses
import importlib.util

import numpy as np
import pytest
from small_model import CONFIG

from gemma_keras import backend
from gemma_keras.attention import MASKED, soft_cap

if backend.NAME == "torch":
    import torch

    DEVICE = backend.torch_device().type

# The interpreter's own, of numpy.
pytestmark = [
    pytest.mark.skipif(backend.NAME != "torch", reason="torch's kernels"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton"),
    pytest.mark.filterwarnings("ignore:overflow encountered"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim"),
]

DTYPES = {"float32": 2.0**-20, "bfloat16": 2.0**-7}


@pytest.fixture(scope="module")
def kernels():
    """The operations, registered."""
    from gemma_keras.backend import triton_kernels  # noqa: F401

    return torch.ops.gemma_keras


@pytest.fixture(params=DTYPES)
def dtype(request):
    return request.param


def drawn(*shape, dtype="float32", seed=0, size=1.0):
    numbers = np.random.default_rng(seed).normal(size=shape) * size
    return torch.tensor(numbers, dtype=getattr(torch, dtype), device=DEVICE)


def check(found, expected, dtype, least=2.0**-6, times=1):
    """Within a rounding, or several; numbers smaller than `least` count as that."""
    assert found.dtype == getattr(torch, dtype)
    found, expected = found.double().cpu(), expected.double().cpu()
    scale = expected.abs().clamp(min=least)
    assert ((found - expected).abs() / scale).max() <= times * DTYPES[dtype]


@pytest.mark.parametrize("width", [24, 640, 2048])
def test_norms(width, dtype, kernels):
    x = drawn(2, 3, width, dtype=dtype, size=30)
    x[0, 0] = 0
    scale = drawn(width, dtype=dtype, seed=1)
    wide = x.double()
    root = (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    expected = wide / root * (1 + scale.double())
    found = kernels.rms_norm(x, scale, 1e-6, getattr(torch, dtype))
    check(found, expected, dtype)


@pytest.mark.parametrize("rows", [1, 2])
def test_rotations(rows, dtype, kernels):
    x = drawn(2, 5, 3, 64, dtype=dtype)
    angles = drawn(rows, 5, 1, 32, seed=1, size=3)
    cos, sin = torch.cos(angles), torch.sin(angles)
    found = kernels.rotate(x, torch.cat([cos] * 2, -1), torch.cat([-sin, sin], -1))
    first, second = x.double().chunk(2, dim=-1)
    cos, sin = cos.double(), sin.double()
    expected = [first * cos - second * sin, second * cos + first * sin]
    # Differences of numbers of about 1.
    check(found, torch.cat(expected, -1), dtype, least=1.0)


def test_gated_gelus(dtype, kernels):
    gate, up = drawn(3, 700, dtype=dtype, size=3), drawn(3, 700, dtype=dtype, seed=1)
    wide = gate.double()
    bend = np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)
    active = (0.5 * wide * (1 + torch.tanh(bend))).to(gate.dtype)
    expected = active.double() * up.double()
    # A GELU between two numbers may be rounded to either.
    check(kernels.gated_gelu(gate, up), expected, dtype, times=2)


@pytest.mark.parametrize("cap", [None, 20.0])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("keys", [40, 300])
def test_softmaxes(keys, rows, cap, dtype, kernels):
    tokens, groups = 3, 4
    products = drawn(2, 2, groups * tokens, keys, dtype=dtype, size=8)
    mask = drawn(rows, 1, tokens, keys, seed=1) > 0
    mask[0, 0, 0] = False  # a query that sees nothing
    scores = soft_cap(products.double(), cap)
    seen = mask.repeat_interleave(groups, dim=2)
    expected = torch.softmax(torch.where(seen, scores, MASKED), dim=-1)
    found = kernels.masked_softmax(products, mask, cap or 0.0, MASKED)
    # A score of 20 is rounded by twenty times what one of 1 is.
    check(found, expected, dtype, times=1 + (cap or 0) / 4)


@pytest.mark.parametrize("shape", [(1, 96, 640), (7, 50, 256), (16, 8200, 96)])
def test_products_with_codes(shape, kernels):
    count, rows, columns = shape
    random = np.random.default_rng(0)
    codes = random.integers(-127, 128, (rows, columns)).astype("int8")
    codes = torch.tensor(codes, device=DEVICE)
    scales = drawn(rows, seed=1, size=0.01)
    # The interpreter multiplies no matrices of bfloat16.
    x = drawn(count, columns, dtype="bfloat16" if DEVICE == "cuda" else "float16")
    found = kernels.int8_mm(x, codes, scales).double()
    matrix = codes.double() * scales.double()[:, None]
    size = x.double().abs() @ matrix.abs().T
    assert ((found - x.double() @ matrix.T).abs() <= 2.0**-8 * size).all()


@pytest.mark.parametrize("heads", [1, 2])
def test_a_model_says_the_same_with_and_without(heads, kernels, monkeypatch):
    """Through generation, recorded steps included; with caps and all norms."""
    import keras

    from gemma_keras import GemmaBackbone, GemmaCausalLM

    # Heads that the rotation's kernel takes.
    caps = {"attn_logit_soft_cap": 5.0, "final_logit_soft_cap": 5.0}
    config = dataclasses.replace(CONFIG, head_dim=16, num_kv_heads=heads, **caps)
    keras.utils.set_random_seed(5)
    lm = GemmaCausalLM(GemmaBackbone(config, dtype="float32"))
    monkeypatch.setattr(backend.Step, "PATIENCE", 3)
    prompt = {"token_ids": np.array([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]], "int32")}
    answers = []
    for there in (False, True):
        monkeypatch.setattr(
            backend.fused, "has_kernels", lambda device, there=there: there
        )
        lm.engine._programs.clear()
        found = lm.generate(prompt, max_new_tokens=12, stop_token_ids=())
        answers.append(np.array(found["token_ids"]).tolist())
    assert answers[0] == answers[1]
