"""What makes Gemma Gemma, quirk by quirk: each test fails if its quirk is lost.

Expected values are computed here in float64 numpy from the published formulas.
"""

import dataclasses
import math

import keras
import numpy as np
import pytest
from keras import ops

from gemma_keras import GemmaBackbone, GemmaCausalLM, GemmaConfig, backend
from gemma_keras.backbone import RMSNorm, rotary_table
from gemma_keras.cache import default_positions

TINY = GemmaConfig(
    vocab_size=13,
    num_layers=2,
    hidden_dim=8,
    ffn_dim=20,
    num_query_heads=4,
    num_kv_heads=2,
    head_dim=6,
    query_pre_attn_scalar=7.0,
)


def numpy(x):
    return np.asarray(ops.convert_to_numpy(x), "float64")


def test_the_weights_are_those_that_the_config_lists():
    config = dataclasses.replace(TINY, use_qk_norm=True, use_post_norms=True)
    backbone = GemmaBackbone(config)
    assert {v.path: tuple(v.shape) for v in backbone.variables} == (
        config.weight_shapes()
    )
    assert backbone.count_params() == config.num_parameters


@pytest.mark.parametrize(
    ("width", "rounded"), [(2048, 45.25), (3072, 55.5), (640, 25.25), (5376, 73.5)]
)
def test_the_embedding_scale_is_rounded_to_bfloat16(width, rounded):
    config = dataclasses.replace(TINY, hidden_dim=width, num_layers=1)
    backbone = GemmaBackbone(config, dtype="bfloat16")
    ones = np.ones((1, 1, width), "float32")
    assert np.all(numpy(backbone.embed({"embeddings": ones})) == rounded)
    exact = GemmaBackbone(config, dtype="float32").embed({"embeddings": ones})
    np.testing.assert_allclose(numpy(exact), math.sqrt(width), rtol=1e-7)


def test_rms_norm_multiplies_by_one_plus_scale_before_it_rounds():
    norm = RMSNorm(1e-3, lambda path: "zeros", dtype="bfloat16")
    norm.build((4,))
    # 1 + 2**-9 is 1 in bfloat16: it survives only if the sum is made in float32.
    scale = np.array([2.0**-9, 0.5, -0.25, 3.0])
    norm.scale.assign(ops.cast(scale, "bfloat16"))
    x = np.array([[3.0, -1.0, 0.5, 100.0]])
    expected = x / np.sqrt((x**2).mean() + 1e-3) * (1 + scale)
    found = numpy(norm(ops.cast(x, "bfloat16")))
    rounded = numpy(ops.cast(ops.convert_to_tensor(expected, "float32"), "bfloat16"))
    np.testing.assert_array_equal(found, rounded)


def test_the_epsilon_of_the_config_reaches_every_norm():
    config = dataclasses.replace(TINY, norm_epsilon=0.5, use_qk_norm=True)
    backbone = GemmaBackbone(config)
    norms = [x for x in backbone._flatten_layers() if isinstance(x, RMSNorm)]
    assert len(norms) == 1 + 2 * (2 + 2)
    assert {norm.epsilon for norm in norms} == {0.5}


def test_rotation_turns_half_split_pairs_by_float32_angles():
    positions = np.array([[0, 1, 257, 8191]])
    x = np.random.default_rng(0).normal(size=(1, 4, 3, 6))
    table = rotary_table(positions, 6, 10_000.0)
    found = numpy(backend.rotate(ops.convert_to_tensor(x, "float32"), *table))
    pairs = x[..., :3] + 1j * x[..., 3:]
    angles = positions[..., None] * 10_000.0 ** (-np.arange(3) / 3)
    turned = pairs * np.exp(1j * angles)[:, :, None]
    expected = np.concatenate([turned.real, turned.imag], -1)
    np.testing.assert_allclose(found, expected, atol=2e-3)
    np.testing.assert_allclose(found[:, :2], expected[:, :2], atol=1e-6)


def test_rotary_angles_are_float32_under_every_policy():
    """Position 257 rounds to 256 in bfloat16, which would make the rows equal."""
    table = rotary_table(np.array([[256, 257]]), 6, 10_000.0)
    for part in table:
        assert keras.backend.standardize_dtype(part.dtype) == "float32"
    assert np.abs(numpy(table[0])[0, 0] - numpy(table[0])[0, 1]).max() > 0.1


def test_linear_scaling_divides_positions():
    scaled = rotary_table(np.array([[80]]), 6, 1e6, scaling_factor=8.0)
    plain = rotary_table(np.array([[10]]), 6, 1e6)
    np.testing.assert_allclose(numpy(scaled[1]), numpy(plain[1]), atol=1e-6)


def test_the_gate_is_the_tanh_form_of_gelu():
    """The two forms differ by up to 5e-4, which float32 sees clearly."""
    backbone = GemmaBackbone(TINY)
    block = backbone.blocks[0]
    x = np.random.default_rng(2).normal(size=(1, 4, 8)).astype("float32") * 3
    gate, up, down = (
        numpy(layer.kernel)
        for layer in (block.ffw_gating, block.ffw_gating_2, block.ffw_linear)
    )

    def feed(gelu):
        return (gelu(x @ gate) * (x @ up)) @ down

    def tanh_form(z):
        return 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    def exact_form(z):
        return 0.5 * z * (1 + np.vectorize(math.erf)(z / math.sqrt(2)))

    found = numpy(block.feed_forward(ops.convert_to_tensor(x), "float32"))
    assert np.abs(found - feed(tanh_form)).max() < 1e-5
    assert np.abs(found - feed(exact_form)).max() > 1e-4


@pytest.mark.parametrize("policy", ["float16", "mixed_float16"])
def test_float16_survives_activations_past_its_range(policy):
    """Real Gemmas pass 65504 in the residual stream and in the gated product."""
    config = dataclasses.replace(TINY, ffn_dim=64)

    def big(path):
        deviation = 0.1 if path.endswith("/scale") else 0.5
        deviation = 40.0 if "/ffw" in path else deviation

        def values(shape, dtype=None):
            random = np.random.default_rng(len(path))
            return ops.cast(deviation * random.normal(size=shape), dtype)

        return values

    ids = np.arange(10)[None] % 13
    peaks = []

    def look(x, i):
        peaks.append(np.abs(numpy(x)).max())
        return x

    exact = GemmaCausalLM(GemmaBackbone(config, dtype="float32", init=big))
    expected = numpy(exact.score(ids, layer_intercept_fn=look))
    assert max(peaks) > 10 * 65504
    half = GemmaCausalLM(GemmaBackbone(config, dtype=policy, init=big))
    found = numpy(half.score(ids))
    assert np.isfinite(found).all()
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error < 0.01


@pytest.mark.parametrize(
    ("policy", "asked", "expected"),
    [
        ("bfloat16", "float32", "float32"),
        ("bfloat16", "compute", "bfloat16"),
        ("mixed_float16", "compute", "float16"),
        ("float32", "compute", "float32"),
    ],
)
def test_logits_come_in_the_dtype_that_was_asked_for(policy, asked, expected):
    lm = GemmaCausalLM(GemmaBackbone(TINY, dtype=policy), logits_dtype=asked)
    mask = np.ones((2, 5), bool)
    logits = lm({"token_ids": np.ones((2, 5), "int32"), "padding_mask": mask})
    assert tuple(logits.shape) == (2, 5, 13)
    assert keras.backend.standardize_dtype(logits.dtype) == expected


def test_positions_count_from_the_start_of_each_row_and_segment():
    mask = np.array([[0, 0, 1, 1], [1, 1, 1, 0]], bool)
    found = numpy(default_positions(4, ops.convert_to_tensor(mask)))
    np.testing.assert_array_equal(found, [[0, 0, 0, 1], [0, 1, 2, 2]])
    segments = ops.convert_to_tensor(np.array([[1, 1, 2, 2, 2, 3]]))
    found = numpy(default_positions(6, segment_ids=segments))
    np.testing.assert_array_equal(found, [[0, 1, 0, 1, 2, 0]])


def test_rows_with_nothing_to_see_give_numbers():
    lm = GemmaCausalLM(GemmaBackbone(TINY))
    ids, mask = np.ones((2, 4), "int32"), np.zeros((2, 4), bool)
    mask[0, :2] = True
    assert np.isfinite(numpy(lm({"token_ids": ids, "padding_mask": mask}))).all()


def test_a_cache_takes_no_packed_rows():
    from gemma_keras.cache import make_cache

    inputs = {"token_ids": np.ones((1, 3), "int32")}
    inputs["segment_ids"] = np.ones((1, 3), "int32")
    with pytest.raises(ValueError, match="segment_ids"):
        GemmaBackbone(TINY)(inputs, cache=make_cache(TINY, 1, 8, "float32"))


def test_the_last_token_alone_is_for_use_beside_a_cache():
    inputs = {"token_ids": np.ones((1, 3), "int32")}
    with pytest.raises(ValueError, match="got no cache"):
        GemmaBackbone(TINY).call(inputs, last=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "num_layers must be a positive integer"),
        ({"num_kv_heads": 3}, "must be a multiple of num_kv_heads"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"layer_pattern": "LX"}, "layer_pattern must be a string of L and G"),
        ({"layer_pattern": "L"}, "sliding_window must be given"),
        ({"query_pre_attn_scalar": 0.0}, "query_pre_attn_scalar must be a positive"),
        ({"norm_epsilon": float("nan")}, "norm_epsilon must be a positive number"),
        ({"use_qk_norm": 1}, "use_qk_norm must be true or false"),
        ({"vocab_size": True}, "vocab_size must be a positive integer"),
    ],
)
def test_configs_that_make_no_model_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_layer_patterns_are_tiled_over_the_depth():
    config = dataclasses.replace(
        TINY, num_layers=7, layer_pattern="LLG", sliding_window=3
    )
    assert config.layer_kinds == "LLGLLGL"
    assert [config.family, TINY.family] == ["gemma", "gemma"]
