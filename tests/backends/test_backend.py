"""Arrays of a checkpoint as tensors: values, dtype, order, and who owns the memory."""

import importlib.util
import os
import pathlib
import platform
import subprocess
import sys
import warnings
import weakref

import keras
import ml_dtypes
import numpy as np
import pytest

from gemma_keras import backend

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from slopes import gradients

DTYPES = ("float32", "float16", "bfloat16")


def made(dtype):
    values = np.linspace(-3, 3, 70 * 36, dtype="float32").reshape(70, 36)
    return values.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("wanted", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
def test_a_tensor_is_the_array_in_the_wanted_dtype(stored, wanted, transposed):
    array = made(stored)
    array = array.T if transposed else array
    tensor = backend.tensor_from_array(array, wanted)
    assert keras.backend.standardize_dtype(tensor.dtype) == wanted
    expected = array.astype("float32").astype(made(wanted).dtype).astype("float32")
    found = keras.ops.convert_to_numpy(keras.ops.cast(tensor, "float32"))
    np.testing.assert_array_equal(found, expected)


def test_a_variable_made_of_an_array_can_be_changed():
    """The memory that was taken over is not the checkpoint's."""
    array = made("float32").T
    before = array.copy()

    def init(shape, dtype=None):
        return backend.tensor_from_array(array, dtype)

    variable = keras.Variable(init, shape=array.shape, dtype="float32")
    variable.assign_add(keras.ops.ones(array.shape))
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), before + 1)
    if keras.backend.backend() != "torch":  # shared there, but files map privately
        np.testing.assert_array_equal(array, before)


@pytest.mark.parametrize("shape", [(1, 64), (3, 5, 96), (2, 1, 70), (40, 128)])
@pytest.mark.parametrize("outputs", [64, 100])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("in_order", [False, True])
def test_products_and_their_slopes_are_numpys_by_every_kernel(
    shape, outputs, transposed, in_order, monkeypatch
):
    """Of torch, oneDNN's too, which serve some processors alone."""
    rng = np.random.default_rng(7)
    size = (shape[-1], outputs)
    x, weights = rng.normal(size=shape), rng.normal(size=(*shape[:-1], outputs))
    kernel = rng.normal(size=size[::-1] if transposed else size).astype("float32")
    if not in_order:
        kernel = np.ascontiguousarray(kernel.T).T
    matrix = kernel.T if transposed else kernel
    expected = x @ matrix, weights @ matrix.T
    rows = x.reshape(-1, shape[-1]), weights.reshape(-1, outputs)
    expected_of_kernel = rows[0].T @ rows[1]
    kinds = [False, True] if backend.NAME == "torch" and backend.on_cpu() else [False]
    for onednn in kinds:
        monkeypatch.setattr(
            backend.torch_products, "_has_onednn", lambda onednn=onednn: onednn
        )
        a, w = (keras.ops.convert_to_tensor(v, "float32") for v in (x, weights))
        k = backend.tensor_from_array(kernel, "float32")
        found = keras.ops.convert_to_numpy(backend.matmul(a, k, transposed))
        np.testing.assert_allclose(found, expected[0], atol=1e-4)
        variable = keras.Variable(lambda shape, dtype, k=k: k, kernel.shape, "float32")

        def loss(x, w=w, variable=variable):
            return keras.ops.sum(backend.matmul(x, variable, transposed) * w)

        _, slopes = gradients(loss, [x.astype("float32")], variable)
        slopes = [keras.ops.convert_to_numpy(slope) for slope in slopes]
        np.testing.assert_allclose(slopes[0], expected[1], atol=1e-4)
        of_kernel = slopes[1].T if transposed else slopes[1]
        np.testing.assert_allclose(of_kernel, expected_of_kernel, atol=1e-4)


by_onednn = pytest.mark.skipif(
    backend.NAME != "torch" or not backend.on_cpu(), reason="oneDNN, through torch"
)


@by_onednn
@pytest.mark.parametrize("recorded", [False, True])
def test_a_product_comes_with_gelu(recorded, monkeypatch):
    import torch

    monkeypatch.setattr(backend.torch_products, "_has_onednn", lambda: True)
    rng = np.random.default_rng(5)
    x, kernel = rng.normal(size=(2, 3, 96)), rng.normal(size=(96, 80)) / 4
    x, kernel = (torch.as_tensor(v, dtype=torch.float32) for v in (x, kernel))
    assert not backend.makes_gelu(x, kernel)  # somebody may ask for the gradient
    found = []

    def multiply(x):
        assert backend.makes_gelu(x, kernel)
        return backend.matmul_gelu(x, kernel)

    def run(x):
        call = multiply
        if recorded:
            with warnings.catch_warnings(action="ignore"):  # torch gives it up
                # With other numbers than those that it is called with.
                call = torch.jit.trace(multiply, x.flip(0))
        found.append(call(x))
        return found[-1]

    backend.Program(run, [])(x)
    z = x.double() @ kernel.double()
    expected = torch.nn.functional.gelu(z, approximate="tanh")
    np.testing.assert_allclose(found[0].numpy(), expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("pairs", [(1, 1), (2, 3)])
def test_products_of_many_rows_are_numpys_by_every_kernel(pairs, monkeypatch):
    rng = np.random.default_rng(6)
    x = rng.normal(size=(*pairs, 70, 96)).astype("float32")
    # As keys are read: the first of a buffer that holds more.
    buffer = rng.normal(size=(*pairs, 128, 96)).astype("float32")
    expected = x @ np.swapaxes(buffer[:, :, :80], 2, 3)
    for onednn in (False, True) if backend.NAME == "torch" else (False,):
        monkeypatch.setattr(
            backend.torch_products, "_has_onednn", lambda onednn=onednn: onednn
        )
        query, held = (keras.ops.convert_to_tensor(v) for v in (x, buffer))
        rows = backend.row_products(query, held[:, :, :80])
        np.testing.assert_allclose(backend.to_numpy(rows), expected, atol=1e-4)
        mixed = backend.batch_matmul(rows, held[:, :, :80])
        np.testing.assert_allclose(
            backend.to_numpy(mixed), expected @ buffer[:, :, :80], rtol=1e-4, atol=1e-2
        )


PROMPT = """
import numpy as np
import gemma_keras
config = gemma_keras.GemmaConfig(
    vocab_size=320, num_layers=2, num_query_heads=2, num_kv_heads=1, hidden_dim=64,
    ffn_dim=128, head_dim=64, query_pre_attn_scalar=64.0
)
lm = gemma_keras.GemmaCausalLM(gemma_keras.GemmaBackbone(config, dtype="float32"))
prompt = {"token_ids": np.arange(3, 203, dtype="int32")[None]}
lm.generate(prompt, max_new_tokens=24, stop_token_ids=())
"""


@by_onednn
@pytest.mark.skipif(
    backend.NAME == "torch" and not backend.torch_products._has_onednn(),
    reason="a processor on which float32 is left to MKL",
)
def test_onednn_has_a_kernel_for_all_that_a_prompt_asks_of_it():
    """What it computes without one takes a hundred times as long."""
    done = subprocess.run(
        [sys.executable, "-c", PROMPT],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "ONEDNN_VERBOSE": "1",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line for line in done.stdout.splitlines() if "inner_product" in line]
    assert len(lines) > 20
    assert not [line for line in lines if "ref:" in line]


@pytest.mark.skipif(backend.NAME != "tensorflow", reason="TensorFlow's constants")
def test_what_waits_adds_nothing_of_its_size_but_itself():
    """What does not depend on numbers, TensorFlow would write out for XLA."""
    import tensorflow as tf

    given = tf.ones((300, 700)), tf.ones(3)
    graph = tf.function(backend.not_before).get_concrete_function(*given).graph
    large = [
        operation.type
        for operation in graph.get_operations()
        for output in operation.outputs
        if output.shape.num_elements() == 300 * 700
    ]
    assert sorted(set(large)) == ["Identity", "Placeholder", "SelectV2"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_found(dtype):
    array = made(dtype)
    assert backend.all_finite(backend.tensor_from_array(array, dtype))
    for wrong in (np.nan, np.inf, -np.inf):
        array[13, 7] = wrong
        assert not backend.all_finite(backend.tensor_from_array(array, dtype))


def check_product_in_program(x, kernel, transposed, atol):
    given = np.ascontiguousarray(kernel.T) if transposed else kernel
    variable = keras.Variable(given)
    program = backend.Program(
        lambda x: backend.matmul(x, variable, transposed), [variable]
    )
    product = keras.ops.convert_to_numpy(program(x))
    expected = x.astype("float64") @ kernel.astype("float64")
    assert product.shape == expected.shape
    np.testing.assert_allclose(product, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 24), (1, 24), (3, 1, 24), (16, 24), (40, 24)])
@pytest.mark.parametrize("outputs", [128, 384, 391, 1024])
def test_products_in_programs_are_products(shape, outputs, transposed):
    """Decoding divides them among threads in its own way on some backends."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape).astype("float32")
    kernel = rng.normal(size=(24, outputs)).astype("float32")
    check_product_in_program(x, kernel, transposed, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 16])
@pytest.mark.parametrize(
    "sizes", [(640, 1024), (2048, 640), (1025, 514), (514, 1026), (100, 8192)]
)
def test_products_with_large_kernels_are_products(sizes, rows, transposed):
    """XLA gets them in parts, where their sizes have a divisor."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, 1, sizes[0])).astype("float32")
    kernel = rng.normal(size=sizes).astype("float32")
    check_product_in_program(x, kernel, transposed, atol=2e-4)


@pytest.mark.parametrize("size", [7, 2**14, 2**14 + 27, 256_000])
def test_the_first_of_the_largest_is_found(size):
    rng = np.random.default_rng(size)
    x = rng.integers(0, 50, (3, size)).astype("float32")
    x[1] = -np.inf
    x[2, size // 2 :] = 60.0
    found = keras.ops.convert_to_numpy(backend.argmax(keras.ops.convert_to_tensor(x)))
    assert found.dtype == "int32"
    assert found.tolist() == x.argmax(-1).tolist()


NARROW = [("bfloat16", 2.0**-8), ("float16", 2.0**-11)]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("rows", "outputs"), [(1, 65), (3, 1000), (40, 64)])
@pytest.mark.parametrize(("dtype", "half_ulp"), NARROW)
@pytest.mark.skipif(
    backend.NAME != "torch" or not backend.on_cpu(),
    reason="others multiply by themselves",
)
def test_narrow_products_and_slopes_round_once(
    dtype, half_ulp, rows, outputs, transposed, monkeypatch
):
    """Where the processor has no instructions for them, and a kernel has parts."""
    monkeypatch.setattr(
        backend.torch_products, "_multiplies_on_cpu", lambda dtype: False
    )
    monkeypatch.setattr(backend.torch_products, "_WIDENED_FEW", 2**14)
    monkeypatch.setattr(backend.torch_products, "_WIDENED_MANY", 2**12)
    rng = np.random.default_rng(1)

    def drawn(*shape):
        return rng.normal(size=shape).astype(made(dtype).dtype)

    x, kernel, weights = drawn(2, rows, 24), drawn(24, outputs), drawn(2, rows, outputs)
    given = np.ascontiguousarray(kernel.T) if transposed else kernel
    variable = keras.Variable(given, dtype=dtype)
    inputs = [x.astype("float32"), weights.astype("float32")]

    def total(x, weights):
        product = backend.matmul(keras.ops.cast(x, dtype), variable, transposed)
        return keras.ops.sum(keras.ops.cast(product, "float32") * weights)

    with backend.no_gradient():
        product = backend.matmul(keras.ops.convert_to_tensor(x), variable, transposed)
    product = keras.ops.convert_to_numpy(keras.ops.cast(product, "float32"))
    _, (slope_x, _, slope_kernel) = gradients(total, inputs, variable)
    wide = [array.astype("float64") for array in (x, kernel, weights)]
    expected = wide[0] @ wide[1]
    np.testing.assert_allclose(product, expected, rtol=half_ulp, atol=1e-5)
    expected = wide[2] @ wide[1].T
    found = keras.ops.convert_to_numpy(slope_x)
    np.testing.assert_allclose(found, expected, rtol=half_ulp, atol=1e-4)
    expected = np.einsum("brd,bro->do", wide[0], wide[2])
    found = keras.ops.convert_to_numpy(keras.ops.cast(slope_kernel, "float32"))
    found = found.T if transposed else found
    np.testing.assert_allclose(found, expected, rtol=half_ulp, atol=1e-4)


GROWING = """
import pathlib, re
import torch
from gemma_keras import backend

def megabytes():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"VmRSS:\\s+(\\d+)", status)[1]) / 1024

backend.keep_memory()  # as `generate` does, before `fit`
context = backend.giving_back_memory()
context.__enter__()
backend.keep_memory()  # and within, for samples
torch.ones(2**22)  # glibc learns from what is freed, unless it is told
before = megabytes()
tensors = [torch.ones(2**21) for _ in range(40)]
kept = tensors[-1]
print(megabytes() - before)
del tensors
print(megabytes() - before)
"""


@pytest.mark.skipif(
    backend.NAME != "torch"
    or not backend.on_cpu()
    or platform.libc_ver()[0] != "glibc",
    reason="torch alone leaves memory to glibc",
)
def test_freed_tensors_leave_the_process():
    done = subprocess.run(
        [sys.executable, "-P", "-c", GROWING], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    most, least = map(float, done.stdout.split())
    assert most > 300  # 40 tensors of 8 MiB
    assert least < 50


PACKING = """
import resource

import numpy as np
import tensorflow
from keras import ops

from gemma_keras import backend

x, kernel = np.ones((128, 2000), "float32"), np.ones((2000, 640), "float32")

def products(x, kernel):
    def turn(state):
        count, total = state
        return count + 1, total + ops.matmul(x + total[0, 0], kernel)
    begun = backend.counter(0), ops.zeros((128, 640))
    return backend.loop(lambda state: state[0] < 50, turn, begun)[1]

if backend.NAME == "jax":
    import jax
    products = jax.jit(products)
else:
    products = tensorflow.function(products, jit_compile=True)

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

with backend.giving_back_memory():
    # As `fit` begins, and glibc is told something new.
    spec = tensorflow.TensorSpec((), "int32")
    list(tensorflow.data.Dataset.from_generator(lambda: [0], output_signature=spec))
    given = [ops.convert_to_tensor(array) for array in (x, kernel)]
    for _ in range(3):
        before = faults()
        ops.convert_to_numpy(products(*given))
    print(faults() - before)
"""


@pytest.mark.skipif(
    backend.NAME == "torch"
    or not backend.on_cpu()
    or platform.libc_ver()[0] != "glibc"
    or not importlib.util.find_spec("tensorflow"),
    reason="XLA on a CPU, beside TensorFlow",
)
def test_memory_for_packing_stays_in_training():
    done = subprocess.run(
        [sys.executable, "-P", "-c", PACKING], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    # Each of 50 products packs a kernel of 1,250 pages.
    assert int(done.stdout) < 50 * 250


@pytest.mark.skipif(backend.NAME != "torch", reason="a remat of torch's own")
def test_what_is_computed_twice_is_gone_after_the_backward_pass():
    variable = keras.Variable(np.arange(1.0, 5.0), dtype="float32")
    other = keras.Variable(np.ones(4), dtype="float32")
    seen = []

    def block(x):
        made = keras.ops.tanh(x * variable)
        seen.append(weakref.ref(made))
        return made * made

    def slopes(wrap):
        x = variable * 2.0
        for _ in range(3):
            x = wrap(block)(x)
        alive = sum(each() is not None for each in seen)
        keras.ops.sum(x).backward()
        found = variable.value.grad.numpy().copy()
        variable.value.grad = None
        return found, alive

    # One that the block does not read has no slope.
    found, alive = slopes(lambda block: backend.remat(block, [variable, other]))
    assert other.value.grad is None
    assert (alive, len(seen)) == (0, 6)
    expected, alive = slopes(lambda block: block)
    assert alive == 3
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.skipif(backend.NAME != "jax", reason="a remat of JAX' own")
def test_what_is_computed_twice_is_not_kept_by_xla():
    import jax

    rng = np.random.default_rng(0)
    kernels = rng.normal(0, 0.1, (8, 32, 512)).astype("float32")
    x = rng.normal(size=(256, 32)).astype("float32")

    def gradients(wrap):
        def total(kernels, x):
            for kernel in kernels:
                # The kernel is closed over, as a layer's is.
                block = lambda x, w=kernel: x + jax.numpy.tanh(x @ w) @ w.T  # noqa: E731
                x = wrap(block)(x)
            return jax.numpy.sum(x * x)

        program = jax.jit(jax.grad(total, argnums=(0, 1))).lower(kernels, x).compile()
        return program(kernels, x), program.memory_analysis().temp_size_in_bytes

    expected, kept = gradients(lambda block: block)
    found, recomputed = gradients(lambda block: backend.remat(block, []))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-4)
    # Eight blocks of [256, 512] are kept without it, one or two of them with it.
    assert kept > 8 * 256 * 512 * 4
    assert recomputed < kept / 2
