"""How Megatron names and orders the weights of a Gemma, as classic NeMo keeps them.

The rows of queries, keys and values are one tensor, group by group: the query heads of
a group, its key head, its value head. Gate and up are one tensor, one after the other.
Norms are part of the layer behind them.
"""

import dataclasses

from gemma_keras.checkpoints.hugging_face import stored_shape

EMBEDDING = "embedding.word_embeddings.weight"
HEAD = "output_layer.weight"
_ATTENTION, _MLP = "self_attention", "mlp"
_QKV = f"{_ATTENTION}.linear_qkv.weight"
_FC1 = f"{_MLP}.linear_fc1.weight"
_BLOCK_NAMES = {
    "pre_attention_norm/scale": f"{_ATTENTION}.linear_qkv.layer_norm_weight",
    "attention/query/kernel": _QKV,
    "attention/key/kernel": _QKV,
    "attention/value/kernel": _QKV,
    "attention/attention_output/kernel": f"{_ATTENTION}.linear_proj.weight",
    "post_attention_norm/scale": f"{_ATTENTION}.linear_proj.post_layernorm.weight",
    "pre_ffw_norm/scale": f"{_MLP}.linear_fc1.layer_norm_weight",
    "ffw_gating/kernel": _FC1,
    "ffw_gating_2/kernel": _FC1,
    "ffw_linear/kernel": f"{_MLP}.linear_fc2.weight",
    "post_ffw_norm/scale": f"{_MLP}.linear_fc2.post_layernorm.weight",
}
# The same norms in Megatron's spec without Transformer Engine.
LOCAL_NAMES = {
    f"{_ATTENTION}.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    f"{_MLP}.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


@dataclasses.dataclass(frozen=True)
class Heads:
    """Which of the heads in a fused tensor [groups, heads of a group, H, D]."""

    first: int
    last: int


def weight_name(path):
    """Name of the tensor that holds a weight, without a prefix."""
    if path == "token_embedding/embeddings":
        return EMBEDDING
    if path == "final_normalization/scale":
        return "decoder.final_layernorm.weight"
    block, role = path.split("/", 1)
    layer = block.removeprefix("decoder_block_")
    return f"decoder.layers.{layer}.{_BLOCK_NAMES[role]}"


def heads(path, config):
    """The `Heads` of a weight in its fused tensor; None if it is in no such tensor."""
    group = config.num_query_heads // config.num_kv_heads
    if path.endswith("attention/query/kernel"):
        return Heads(0, group)
    if path.endswith("attention/key/kernel"):
        return Heads(group, group + 1)
    if path.endswith("attention/value/kernel"):
        return Heads(group + 1, group + 2)
    return None


def fused_shape(config):
    """The tensor of queries, keys and values as [groups, heads of a group, H, D]."""
    group = config.num_query_heads // config.num_kv_heads
    return config.num_kv_heads, group + 2, config.head_dim, config.hidden_dim


def stored_shapes(config):
    """Tensor name to its shape, in the order of the forward pass."""
    shapes = {}
    for path, shape in config.weight_shapes().items():
        name, stored = weight_name(path), stored_shape(path, shape)
        rows = stored[0] + shapes.get(name, (0,))[0]
        shapes[name] = (rows, *stored[1:])
    return shapes


def rows(path, config):
    """First and last row of a gate or up kernel in its tensor; None for all others."""
    if path.endswith("ffw_gating/kernel"):
        return 0, config.ffn_dim
    if path.endswith("ffw_gating_2/kernel"):
        return config.ffn_dim, 2 * config.ffn_dim
    return None
