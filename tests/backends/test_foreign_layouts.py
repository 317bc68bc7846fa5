"""Plain numpy that follows the documented layouts of programs that do not run here.

What gemma_pytorch, Megatron, Google's Flax library and MaxText would compute of our
files is written out: it opens them with torch or Orbax, knows nothing of this
package, and agrees with its logits.
"""

import dataclasses
import functools
import tarfile

import keras
import numpy as np
import pytest
import yaml
from keras import ops
from random_twin import build

from gemma_keras import GemmaCausalLM, GemmaConfig

torch = pytest.importorskip("torch")

# Widths are no multiples of anything, and heads times their size is not the width.
SIZES = {
    "vocab_size": 97,
    "hidden_dim": 42,
    "ffn_dim": 46,
    "head_dim": 10,
    "query_pre_attn_scalar": 10,
    "max_position": 64,
}
LATER = {
    "num_layers": 3,
    "use_post_norms": True,
    "sliding_window": 5,
    "query_pre_attn_scalar": 13,
    "layer_pattern": "LG",
}
FAMILIES = {
    "gemma": {"num_layers": 2},
    "gemma2": LATER | {"attn_logit_soft_cap": 1.5, "final_logit_soft_cap": 2.5},
    "gemma3": LATER
    | {
        "use_qk_norm": True,
        "rope_theta": 1e6,
        "local_rope_theta": 1e4,
        "rope_scaling_factor": 8.0,
    },
}
HEADS = [(6, 2), (6, 1), (4, 4)]
# The last says whether the model has low-rank updates.
CASES = [(family, heads, False) for family in FAMILIES for heads in HEADS]
CASES += [(family, HEADS[0], True) for family in FAMILIES]
IDS = np.random.default_rng(3).integers(3, 97, (2, 17))


def config_of(family, heads):
    queries, keys = heads
    return GemmaConfig(
        **SIZES | FAMILIES[family], num_query_heads=queries, num_kv_heads=keys
    )


@functools.cache
def logits_of(config, lora=False):
    return ops.convert_to_numpy(build(config, lora=lora)({"token_ids": IDS}))


# The decoder, in float64. `weights` has what the two layouts have of a layer.


def rms(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def rotate(x, theta, factor):
    """x: [B, T, heads, H]; pairs are the two halves of a head."""
    half = x.shape[-1] // 2
    frequency = theta ** (-np.arange(half) / half) / factor
    angle = np.arange(x.shape[1])[:, None, None] * frequency
    one, two = x[..., :half], x[..., half:]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([one * cos - two * sin, two * cos + one * sin], -1)


def capped(x, cap):
    return x if cap is None else cap * np.tanh(x / cap)


def attend(config, q, k, v, local):
    """q: [B, T, N, H], k and v: [B, T, K, H]; gives [B, T, N H]."""
    theta, factor = config.rope_theta, config.rope_scaling_factor
    if local and config.local_rope_theta:
        theta, factor = config.local_rope_theta, 1.0
    q, k = rotate(q, theta, factor), rotate(k, theta, factor)
    share = q.shape[2] // k.shape[2]
    k, v = np.repeat(k, share, 2), np.repeat(v, share, 2)
    scores = np.einsum("btnh,bsnh->bnts", q, k) * config.query_pre_attn_scalar**-0.5
    scores = capped(scores, config.attn_logit_soft_cap)
    distance = np.arange(q.shape[1])[:, None] - np.arange(q.shape[1])
    seen = (distance >= 0) & (distance < (config.sliding_window if local else 10**9))
    scores = np.where(seen, scores, -np.inf)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    return np.einsum("bnts,bsnh->btnh", shares, v).reshape(*q.shape[:2], -1)


def forward(config, table, layer_of, final):
    """Logits [B, T, V]; `layer_of(i)` has the weights of layer i as functions."""
    x = table[IDS] * np.sqrt(config.hidden_dim)
    for number, kind in enumerate(config.layer_kinds):
        layer = layer_of(number)
        q, k, v = layer["qkv"](rms(x, layer["before_attention"]))
        if config.use_qk_norm:
            q, k = rms(q, layer["query_norm"]), rms(k, layer["key_norm"])
        branch = attend(config, q, k, v, kind == "L") @ layer["out"].T
        if config.use_post_norms:
            branch = rms(branch, layer["after_attention"])
        x = x + branch
        gate, up = layer["gates"](rms(x, layer["before_ffw"]))
        branch = (gelu(gate) * up) @ layer["down"].T
        if config.use_post_norms:
            branch = rms(branch, layer["after_ffw"])
        x = x + branch
    return capped(rms(x, final) @ table.T, config.final_logit_soft_cap)


def heads_of(x, size):
    return x.reshape(*x.shape[:2], -1, size)


def in_float64(state):
    return {name: tensor.double().numpy() for name, tensor in state.items()}


# gemma_pytorch: one after the other; a norm is 1 + w; int8 times its factor


def of_gemma_pytorch(config, state):
    found = {}
    for name, tensor in state.items():
        scaler = state.get(f"{name}_scaler")
        found[name] = tensor if scaler is None else tensor * scaler.unsqueeze(-1)
    found = in_float64(found)
    size = config.head_dim
    queries, keys = config.num_query_heads * size, config.num_kv_heads * size

    def layer(number):
        def get(name):
            return found[f"model.layers.{number}.{name}.weight"]

        def qkv(x):
            fused = x @ get("self_attn.qkv_proj").T
            parts = np.split(fused, [queries, queries + keys], -1)
            return [heads_of(part, size) for part in parts]

        def gates(x):
            return x @ get("mlp.gate_proj").T, x @ get("mlp.up_proj").T

        weights = {
            "qkv": qkv,
            "gates": gates,
            "before_attention": 1 + get("input_layernorm"),
            "out": get("self_attn.o_proj"),
            "down": get("mlp.down_proj"),
        }
        if not config.use_post_norms:
            return weights | {"before_ffw": 1 + get("post_attention_layernorm")}
        weights["after_attention"] = 1 + get("post_attention_layernorm")
        weights["before_ffw"] = 1 + get("pre_feedforward_layernorm")
        weights["after_ffw"] = 1 + get("post_feedforward_layernorm")
        if config.use_qk_norm:
            weights["query_norm"] = 1 + get("self_attn.query_norm")
            weights["key_norm"] = 1 + get("self_attn.key_norm")
        return weights

    names = ("embedder.weight", "text_token_embedder.weight")
    table = next(found[name] for name in names if name in found)
    return forward(config, table, layer, 1 + found["model.norm.weight"])


@pytest.mark.parametrize(("family", "heads", "lora"), CASES)
def test_gemma_pytorch_would_give_our_logits(tmp_path, family, heads, lora):
    lm = build(config_of(family, heads), lora=lora)
    path = lm.export(tmp_path / "m.ckpt", format="torch")
    state = torch.load(path, weights_only=True, mmap=True)["model_state_dict"]
    expected = of_gemma_pytorch(lm.config, state)
    found = logits_of(lm.config, lora)
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_gemma_pytorch_would_give_the_logits_of_int8(tmp_path, family):
    lm = build(config_of(family, HEADS[0]))
    path = lm.export(tmp_path / "m.ckpt", format="torch", dtype="int8")
    state = torch.load(path, weights_only=True, mmap=True)["model_state_dict"]
    expected = of_gemma_pytorch(lm.config, state)
    rounded = GemmaCausalLM.from_preset(path)
    found = ops.convert_to_numpy(rounded({"token_ids": IDS}))
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
    # And they are no longer those of the model that was rounded.
    assert np.abs(found - logits_of(lm.config)).max() > 1e-3


# Megatron: groups of heads; gate and up in one; norms inside of the layer behind them


def of_megatron(raw, state, rotary):
    """From model_config.yaml and its weights.

    Args:
        raw: The yaml.
        state: The weights.
        rotary: A config for what NeMo's code fixes: which layers have a window.
    """
    found = in_float64(state)
    size, groups = raw["kv_channels"], raw["num_query_groups"]
    one = 0 if not raw["layernorm_zero_centered_gamma"] else 1
    custom = raw.get("mcore_customization_config", {})
    config = dataclasses.replace(
        rotary,
        rope_theta=raw["rotary_base"],
        num_query_heads=raw["num_attention_heads"],
        query_pre_attn_scalar=custom.get("query_pre_attn_scalar", size),
        attn_logit_soft_cap=custom.get("attn_logit_softcapping"),
        final_logit_soft_cap=custom.get("final_logit_softcapping"),
        sliding_window=raw["window_size"][0] if custom else None,
    )

    def layer(number):
        def get(name):
            return found[f"model.decoder.layers.{number}.{name}"]

        def qkv(x):
            fused = x @ get("self_attention.linear_qkv.weight").T
            fused = fused.reshape(*x.shape[:2], groups, -1, size)
            q, k, v = fused[..., :-2, :], fused[..., -2, :], fused[..., -1, :]
            return q.reshape(*x.shape[:2], -1, size), k, v

        def gates(x):
            return np.split(x @ get("mlp.linear_fc1.weight").T, 2, -1)

        def norm(name):
            return one + get(name)

        weights = {
            "qkv": qkv,
            "gates": gates,
            "before_attention": norm("self_attention.linear_qkv.layer_norm_weight"),
            "before_ffw": norm("mlp.linear_fc1.layer_norm_weight"),
            "out": get("self_attention.linear_proj.weight"),
            "down": get("mlp.linear_fc2.weight"),
        }
        if config.use_post_norms:
            after = norm("self_attention.linear_proj.post_layernorm.weight")
            weights["after_attention"] = after
            weights["after_ffw"] = norm("mlp.linear_fc2.post_layernorm.weight")
        return weights

    assert raw["apply_embedding_scaling"] and raw["openai_gelu"]
    table = found["model.embedding.word_embeddings.weight"]
    final = one + found["model.decoder.final_layernorm.weight"]
    return forward(config, table, layer, final)


@pytest.mark.parametrize(
    ("family", "heads", "lora"), [case for case in CASES if case[0] != "gemma3"]
)
def test_nemo_would_give_our_logits(tmp_path, family, heads, lora):
    lm = build(config_of(family, heads), lora=lora)
    path = lm.export(tmp_path / "m.nemo", format="nemo")
    with tarfile.open(path) as tar:
        tar.extractall(tmp_path, filter="data")
    raw = yaml.safe_load((tmp_path / "model_config.yaml").read_text())
    weights = tmp_path / "model_weights.ckpt"
    state = torch.load(weights, weights_only=True, mmap=True)
    expected = of_megatron(raw, state, lm.config)
    found = logits_of(lm.config, lora)
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
    again = GemmaCausalLM.from_preset(path)
    same = ops.convert_to_numpy(again({"token_ids": IDS}))
    np.testing.assert_allclose(same, expected, atol=1e-5, rtol=0)


# Orbax: trees of arrays, restored by Orbax itself


def restored(path):
    """The tree of an Orbax directory, in float64."""
    checkpoint = pytest.importorskip("orbax.checkpoint")
    tree = checkpoint.PyTreeCheckpointer().restore(str(path))
    return keras.tree.map_structure(lambda x: np.asarray(x, "float64"), tree)


def of_flax(config, tree):
    """Google's Flax files: einsums, and keys that are paths."""

    def layer(number):
        start = f"transformer/layer_{number}/"
        found = {
            name.removeprefix(start): leaf
            for name, leaf in tree.items()
            if name.startswith(start)
        }
        if "attn/qkv_einsum" in found:
            kernels = found["attn/qkv_einsum"]["w"]
        else:
            kernels = found["attn/q_einsum"]["w"], *found["attn/kv_einsum"]["w"]
        out = found["attn/attn_vec_einsum"]["w"]
        gating = found["mlp/gating_einsum"]["w"]
        # Gemma 3 has it turned.
        gating = gating.swapaxes(1, 2) if config.use_qk_norm else gating
        weights = {
            "qkv": lambda x: [np.einsum("btd,ndh->btnh", x, w) for w in kernels],
            "gates": lambda x: (x @ gating[0], x @ gating[1]),
            "before_attention": 1 + found["pre_attention_norm"]["scale"],
            "before_ffw": 1 + found["pre_ffw_norm"]["scale"],
            "out": out.reshape(-1, out.shape[-1]).T,
            "down": found["mlp/linear"]["w"].T,
        }
        if config.use_post_norms:
            weights["after_attention"] = 1 + found["post_attention_norm"]["scale"]
            weights["after_ffw"] = 1 + found["post_ffw_norm"]["scale"]
        if config.use_qk_norm:
            weights["query_norm"] = 1 + found["attn/_query_norm"]["scale"]
            weights["key_norm"] = 1 + found["attn/_key_norm"]["scale"]
        return weights

    table = tree["transformer/embedder"]["input_embedding"]
    return forward(config, table, layer, 1 + tree["transformer/final_norm"]["scale"])


def agree(found, expected):
    """Within rounding of float32, which grows with the largest number."""
    largest = np.abs(expected).max()
    assert largest > 0.5
    np.testing.assert_allclose(found, expected, atol=1e-5 * max(1, largest), rtol=0)


def orbax_config(family, heads):
    """As Google's library and MaxText can have it, in depth and query scale."""
    config = config_of(family, heads)
    if family == "gemma":
        return config
    depth, pattern = {"gemma2": (4, "LG"), "gemma3": (13, "LLLLLG")}[family]
    return dataclasses.replace(
        config,
        num_layers=depth,
        layer_pattern=pattern,
        query_pre_attn_scalar=config.hidden_dim // config.num_query_heads,
    )


@pytest.mark.reference
@pytest.mark.parametrize(("family", "heads", "lora"), CASES)
def test_flax_would_give_our_logits(tmp_path, family, heads, lora):
    lm = build(orbax_config(family, heads), lora=lora)
    path = lm.export(tmp_path / "m", format="flax")
    expected = of_flax(lm.config, restored(path / "checkpoint"))
    agree(logits_of(lm.config, lora), expected)


def of_maxtext(config, tree):
    """MaxText: factors folded into weights; layers stacked on the second axis, or not.

    Of Gemma 2 a local and a global layer make one; of Gemma 3, those at each of six
    places are stacked, and the last few are on their own.
    """
    decoder, pairs = tree["params"]["params"]["decoder"], config.family == "gemma2"

    def block(number):
        """The arrays that a layer is in, and its place in their stack, or None."""
        if pairs:
            number //= 2
        if f"layers_{number}" in decoder:
            return decoder[f"layers_{number}"], None
        if config.family != "gemma3":
            return decoder["layers"], number
        stack, place = divmod(number, 6)
        if stack == config.num_layers // 6:
            return decoder["layers_remainder"][f"layers_{place}"], None
        return decoder["layers"][f"layers_{place}"], stack

    def layer(number):
        suffix = ("_local", "_global")[number % 2] if pairs else ""
        arrays, place = block(number)

        def get(*names):
            found = arrays[names[0] + suffix]
            for name in names[1:]:
                found = found[name]
            return found if place is None else found.take(place, 1)

        def qkv(x):
            q, k, v = (
                np.einsum("btd,dnh->btnh", x, get("self_attention", name, "kernel"))
                for name in ("query", "key", "value")
            )
            scale = 1 if config.use_qk_norm else config.query_pre_attn_scalar**0.5
            return q * scale, k, v

        def gates(x):
            return [x @ get("mlp", name, "kernel") for name in ("wi_0", "wi_1")]

        out = get("self_attention", "out", "kernel")
        weights = {
            "qkv": qkv,
            "gates": gates,
            "before_attention": get("pre_self_attention_norm", "scale"),
            "before_ffw": get("pre_ffw_norm", "scale"),
            "out": out.reshape(-1, out.shape[-1]).T,
            "down": get("mlp", "wo", "kernel").T,
        }
        if config.use_post_norms:
            weights["after_attention"] = get("post_self_attention_norm", "scale")
            weights["after_ffw"] = get("post_ffw_norm", "scale")
        if config.use_qk_norm:
            for name in ("query_norm", "key_norm"):
                weights[name] = get("self_attention", name, "scale")
        return weights

    embedder = tree["params"]["params"]["token_embedder"]["embedding"]
    table = embedder / np.sqrt(config.hidden_dim)
    return forward(config, table, layer, decoder["decoder_norm"]["scale"])


@pytest.mark.reference
@pytest.mark.parametrize("layout", ["scanned", "unscanned"])
@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_maxtext_would_give_our_logits(tmp_path, family, lora, layout):
    lm = build(orbax_config(family, HEADS[0]), lora=lora)
    path = lm.export(tmp_path / "m", format="maxtext", layout=layout)
    expected = of_maxtext(lm.config, restored(path / "0" / "items"))
    agree(logits_of(lm.config, lora), expected)
    again = GemmaCausalLM.from_preset(path)
    agree(ops.convert_to_numpy(again({"token_ids": IDS})), expected)
