"""`sft --plan`: what is counted, and what is proposed. How near it comes to measured
memory, tools/bench/plan.py tells.
"""

import dataclasses
import math

import keras
import pytest
import typer.testing

from gemma_keras import GemmaBackbone, backend, cli, quantization, registry
from gemma_keras.config import GemmaConfig
from gemma_keras.packed import packed_init
from gemma_keras.sft import RunConfig, planning

pytestmark = pytest.mark.any_backend

MODEL = GemmaConfig(
    vocab_size=512,
    num_layers=3,
    hidden_dim=64,
    ffn_dim=160,
    num_query_heads=4,
    num_kv_heads=2,
    head_dim=32,
    query_pre_attn_scalar=32,
)


def run(**settings):
    given = {"preset": "p", "train": ["t"], "out": "o", "sequence_length": 64}
    return RunConfig(**{**given, **settings})


def parts(stored="float32", name="torch", model=MODEL, **settings):
    return planning.predict(model, run(**settings), stored, name).parts


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_those_of_the_model(quantize, dtype):
    packings = {}
    if quantize:
        packings = quantization.Quantization(quantize).packings(MODEL)
    init = packed_init(lambda path: "zeros", packings)
    backbone = GemmaBackbone(MODEL, dtype=dtype, init=init)
    sizes = {"float32": 4, "bfloat16": 2, "int8": 1, "uint8": 1}
    held = sum(
        math.prod(v.shape) * sizes[keras.backend.standardize_dtype(v.dtype)]
        for v in backbone.variables
    )
    assert parts(dtype, quantize=quantize)["weights"] == held


def test_the_adapter_is_its_numbers_gradients_and_moments():
    two = registry.find("gemma_2b_en").config
    count = 460_800  # Gemma 2B at rank 4 on queries and values
    found = parts("bfloat16", model=two, lora_rank=4)["adapter and optimizer"]
    assert found == count * 4 * 4
    settings = {"lora_rank": 4, "optimizer": "sgd", "accumulation": 2}
    found = parts("bfloat16", model=two, **settings)["adapter and optimizer"]
    assert found == count * 4 * 3
    everything = parts(full=True)
    assert everything["adapter and optimizer"] == MODEL.num_parameters * 4 * 3


@pytest.mark.parametrize("name", planning.PROGRAMS)
def test_blocks_keep_more_of_more_tokens_and_less_with_remat(name):
    one, two = (parts(name=name, batch_size=n)["kept by blocks"] for n in (4, 8))
    assert two == 2 * one
    again = parts(name=name, batch_size=8, remat=True)["kept by blocks"]
    assert again == 8 * 64 * 4 * MODEL.hidden_dim * (MODEL.num_layers + 2) < two


def test_xla_keeps_the_terms_of_sums_and_widens_what_is_narrow():
    """On a CPU: measured, see tools/bench/LOG.md."""

    def kept(name, **options):
        return parts(name=name, **options)["kept by blocks"]

    def of_all(name):
        return kept(name, lora_targets=["all-linear"]) - kept(name)

    # torch keeps half as much again of everything.
    assert of_all("jax") == of_all("tensorflow") > 1.25 * of_all("torch")
    assert kept("jax", dtype="bfloat16") == kept("jax")
    assert kept("torch", dtype="bfloat16") < kept("torch")
    head = 4 * MODEL.vocab_size * MODEL.hidden_dim
    wide, narrow = (parts(name="jax", dtype=d) for d in ("float32", "bfloat16"))
    assert narrow["weights"] == wide["weights"] / 2 + head / 2


def test_an_accelerator_holds_no_program():
    on_cpu = planning.predict(MODEL, run(), "float32", "jax")
    on_gpu = planning.predict(MODEL, run(), "float32", "jax", "gpu")
    assert on_cpu.total - on_gpu.total == on_cpu.parts["program"]


def plan(memory, **settings):
    given = {"preset": "gemma_2b_en", "train": ["t"], "out": "o", **settings}
    return planning.plan(RunConfig(**given), memory)


def test_all_weights_of_a_bfloat16_preset_are_planned_in_float32():
    config = registry.find("gemma_2b_en").config
    assert plan(10e9, full=True)[0].parts["weights"] == 4 * config.num_parameters
    widened = 2 * config.vocab_size * config.hidden_dim
    widened = widened if backend.COMPILES and backend.on_cpu() else 0
    weights = plan(10e9)[0].parts["weights"]
    assert weights == 2 * config.num_parameters + widened


def test_what_fits_may_grow():
    found, there, proposals = plan(200e9)
    assert found.total <= there == 200e9
    sizes = [changes["batch_size"] for changes, _ in proposals]
    assert sizes == sorted(sizes, reverse=True)
    assert min(sizes) > RunConfig.batch_size
    assert all(other.total <= there for _, other in proposals)


def test_what_does_not_fit_shrinks_by_what_learns_the_same_first():
    totals = [plan(1e15, remat=remat)[0].total for remat in (False, True)]
    found, there, proposals = plan(sum(totals) / 2)
    assert found.total > there
    changes, other = proposals[0]
    assert other.total <= there
    assert changes["remat"] is True
    rows = changes.get("batch_size", 8) * changes.get("accumulation", 1)
    assert rows == RunConfig.batch_size
    assert "quantize" not in changes
    assert "sequence_length" not in changes
    least = {"remat": True, "batch_size": 1, "accumulation": RunConfig.batch_size}
    coded = plan(1e15, quantize="int8", **least)[0].total
    assert coded < plan(1e15, **least)[0].total
    _, _, proposals = plan(coded)
    assert proposals[0][0]["quantize"] == "int8"
    assert plan(0.5e9)[2] == []
    # Rows so short that a quarter of one would be none.
    assert plan(0.5e9, sequence_length=4)[2] == []


def test_a_proposal_is_what_a_run_with_it_takes():
    for changes, other in plan(10e9)[2]:
        assert plan(10e9, **changes)[0] == other


def test_seven_billion_in_four_bits_fit_into_12_gb():
    settings = {"quantize": "int4", "batch_size": 1, "sequence_length": 1024}
    model = registry.find("gemma_7b_en").config
    for name in planning.PROGRAMS:
        config = run(**settings, remat=True)
        assert planning.predict(model, config, "bfloat16", name).total < 12e9


def invoke(*arguments):
    return typer.testing.CliRunner().invoke(cli.app, ["sft", *arguments])


def test_the_command_needs_no_data_and_fetches_nothing():
    told = invoke("--plan", "--preset", "gemma_7b_en", "--memory", "12")
    assert told.exit_code == 0, told.output
    assert "It does not fit." in told.stdout
    assert "--remat" in told.stdout
    told = invoke("--plan", "--preset", "gemma_tiny_en")
    assert told.exit_code == 0, told.output
    assert "It fits." in told.stdout


def test_what_makes_no_plan_is_refused():
    told = invoke("--memory", "12", "--preset", "gemma_2b_en")
    assert told.exit_code == 2
    assert "--plan" in told.stderr
    told = invoke("--plan")
    assert told.exit_code == 2
    assert "preset must be given" in told.stderr
    told = invoke("--plan", "--preset", "gemma_2b_en", "--sequence-length", "9000")
    assert told.exit_code == 1
    assert "must be at most 8,192" in told.stderr


def test_every_optimizer_is_counted():
    choices = {f.name: f for f in dataclasses.fields(RunConfig)}
    known = choices["optimizer"].metadata["choices"]
    assert set(planning.MOMENTS) == set(known)
