"""How Google's Flax checkpoints of Gemma name their arrays, and turn them.

Projections are einsums: [heads, width, head size], with keys and values in one array,
and queries too where there are as many heads of each. The keys of the tree are paths
(flat, as published), or nested as `model.init` makes them (there, what trains with
Kauldron is inside `params`); or the layers of each kind of attention are stacked.
"""

import collections
import dataclasses
import re

from gemma_keras.checkpoints import keras_layout
from gemma_keras.checkpoints.checkpoint import CheckpointError
from gemma_keras.checkpoints.orbax_place import Place, stored_array

_NAMES = {
    "pre_attention_norm/scale": ("pre_attention_norm", "scale"),
    "attention/query_norm/scale": ("attn", "_query_norm", "scale"),
    "attention/key_norm/scale": ("attn", "_key_norm", "scale"),
    "attention/attention_output/kernel": ("attn", "attn_vec_einsum", "w"),
    "post_attention_norm/scale": ("post_attention_norm", "scale"),
    "pre_ffw_norm/scale": ("pre_ffw_norm", "scale"),
    "ffw_linear/kernel": ("mlp", "linear"),
    "post_ffw_norm/scale": ("post_ffw_norm", "scale"),
}
_GATING = ("mlp", "gating_einsum")
_QUERY, _KEY_VALUE, _ALL = (
    ("attn", f"{name}_einsum", "w") for name in ("q", "kv", "qkv")
)
# Of the multimodal models, what is no part of the decoder.
_VISION = {"vision_encoder", "SigLiPFromPatches_0"}
_LAYER = re.compile(r"layer_(\d{1,5})")
_STACK = re.compile(r"attention_type_(\d{1,5})")


@dataclasses.dataclass(frozen=True)
class FlaxLayout:
    """One way of naming and turning.

    Attributes:
        transposed: Whether the gating einsum is [F, D], as in Gemma 2 9B and 27B and
            in Gemma 3, rather than [D, F].
        pattern: Layers in a pattern of attention kinds, if those of a kind are
            stacked; None if each layer has its own arrays.
    """

    transposed: bool = False
    pattern: int | None = None

    format = "Flax"
    embedding = ("embedder", "input_embedding")
    final_norm = ("final_norm", "scale")

    @classmethod
    def of(cls, config):
        """The layout in which Google publishes such a model."""
        return cls(
            _transposes(config.use_qk_norm, config.use_post_norms, config.hidden_dim)
        )

    @staticmethod
    def canonical(name):
        """The name of an array in the nested tree, given that in any."""
        if name[-1] == "w" and name[:-1][-2:] in (_GATING, _NAMES["ffw_linear/kernel"]):
            return name[:-1]
        return name

    @staticmethod
    def is_decoder(name):
        """Whether an array is a part of the decoder."""
        return name[0] not in _VISION and name[1:2] not in (
            ("mm_input_projection",),
            ("mm_soft_embedding_norm",),
        )

    @classmethod
    def read(cls, shapes, where):
        """The layout, and the fields of a `GemmaConfig`, that shapes tell.

        Args:
            shapes: Canonical name of each array of the decoder to its shape.
            where: The directory, for messages.
        """
        kinds = collections.Counter(
            int(match[1])
            for name in shapes
            if name[0] == "stacked_layers" and (match := _STACK.fullmatch(name[1]))
        )
        pattern = max(kinds) + 1 if kinds else None
        block = ("stacked_layers", "attention_type_0") if kinds else ("layer_0",)

        def shape(name, dims):
            found = stored_array(shapes, (*block, *name), dims + bool(kinds), where)
            return found[1:] if kinds else found

        _, width = stored_array(shapes, cls.embedding, 2, where)
        heads, head, _ = shape(_NAMES["attention/attention_output/kernel"], 3)
        joint = (*block, *_ALL) in shapes
        kv_heads = heads if joint else shape(_KEY_VALUE, 4)[1]
        ffn, _ = shape(_NAMES["ffw_linear/kernel"], 2)
        gating = shape(_GATING, 3)
        fields = {
            "hidden_dim": width,
            "num_layers": cls._depth(shapes, pattern, where),
            "ffn_dim": ffn,
            "num_query_heads": heads,
            "num_kv_heads": kv_heads,
            "head_dim": head,
            "use_post_norms": (*block, "post_ffw_norm", "scale") in shapes,
            "use_qk_norm": (*block, "attn", "_query_norm", "scale") in shapes,
        }
        transposed = gating[1:] == (ffn, width)
        if ffn == width:
            kinds = (fields["use_qk_norm"], fields["use_post_norms"])
            transposed = _transposes(*kinds, width)
        return cls(transposed, pattern), fields

    @staticmethod
    def _depth(shapes, pattern, where):
        if pattern is None:
            matches = (_LAYER.fullmatch(name[0]) for name in shapes)
            return max((int(match[1]) for match in matches if match), default=-1) + 1
        name = _NAMES["pre_attention_norm/scale"]
        return sum(
            stored_array(
                shapes, ("stacked_layers", f"attention_type_{kind}", *name), 2, where
            )[0]
            for kind in range(min(pattern, 1024))
        )

    def in_block(self, path, shape, config):
        """The `Place` of a weight of a block, whose own shape is `shape`."""
        block, role = path.split("/", 1)
        layer = int(block.removeprefix("decoder_block_"))
        name, part = _array(role, config.num_query_heads == config.num_kv_heads)
        stack, prefix = None, (f"layer_{layer}",)
        if self.pattern is not None:
            kind = layer % self.pattern
            count = len(range(kind, config.num_layers, self.pattern))
            stack = (0, layer // self.pattern, count)
            prefix = ("stacked_layers", f"attention_type_{kind}")
        shape = keras_layout.stored_shape(path, shape, config)
        if name == _GATING and self.transposed:
            shape = shape[::-1]
        return Place(name=(*prefix, *name), shape=shape, part=part, stack=stack)

    def to_stored(self, path, array, config):
        """A weight as it is stored; a view."""
        if "ffw_gating" in path and self.transposed:
            return array.T
        return keras_layout.to_stored(path, array, config)

    def from_stored(self, path, array, config):
        """The inverse of `to_stored`."""
        if "ffw_gating" in path and self.transposed:
            return array.T
        return keras_layout.from_stored(path, array, config)


def _transposes(qk_norm, post_norms, width):
    """Whether Google's file has its gating einsum transposed.

    Those of Gemma 3 have, and of Gemma 2 all but the smallest, which is 2,304 wide.
    """
    return qk_norm or (post_norms and width > 2304)


def _array(role, joint):
    """Name of the array with a weight, below its layer, and which part of it that is.

    `joint` says whether there are as many key heads as query heads.
    """
    if role in _NAMES:
        return _NAMES[role], None
    if role.startswith("ffw_gating"):
        return _GATING, (int(role == "ffw_gating_2/kernel"), 2)
    number = ("query", "key", "value").index(role.split("/")[1])
    if joint:
        return _ALL, (number, 3)
    return (_KEY_VALUE, (number - 1, 2)) if number else (_QUERY, None)


def tree_keys(name, nested):
    """The keys of an array in the tree that is written: nested, or paths."""
    if nested:
        return name
    if name[-2] == "mlp":
        name = (*name, "w")
    return f"transformer/{'/'.join(name[:-1])}", name[-1]


def check(config):
    """Raises `CheckpointError` for what Google's library cannot compute."""
    wrong = []
    if config.norm_epsilon != 1e-6:
        wrong.append(f"norm_epsilon={config.norm_epsilon}")
    scalar = config.query_pre_attn_scalar
    if scalar not in (config.head_dim, config.hidden_dim // config.num_query_heads):
        wrong.append(f"query_pre_attn_scalar={scalar}")
    if wrong:
        raise CheckpointError(
            f"Google's Flax library has no Gemma with {', '.join(wrong)}: its norm "
            "epsilon is 1e-06, and its query scalar the size of a head, or width / "
            "heads."
        )
