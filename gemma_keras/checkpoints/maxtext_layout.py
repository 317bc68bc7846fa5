"""How MaxText names the arrays of a Gemma, turns them, and what it folds into them.

Norms are stored plus one, the embedding times the root of the width, and queries, but
for Gemma 3, times their scale. Layers are scanned: stacked on the second axis. Two of
Gemma 2, a local and a global one, count as one layer; of Gemma 3, the layers at each of
six places in the pattern are stacked, and the last few are on their own. Or they are
not scanned, and each layer has its own arrays.
"""

import dataclasses
import math
import re

import numpy as np

from gemma_keras.checkpoints import folding, keras_layout
from gemma_keras.checkpoints.checkpoint import CheckpointError
from gemma_keras.checkpoints.orbax_place import Place, stored_array

PATTERNS = {"gemma": "G", "gemma2": "LG", "gemma3": "LLLLLG"}
_SUFFIXES = {"L": "_local", "G": "_global"}
_NAMES = {
    "pre_attention_norm/scale": ("pre_self_attention_norm", "scale"),
    "attention/query/kernel": ("self_attention", "query", "kernel"),
    "attention/key/kernel": ("self_attention", "key", "kernel"),
    "attention/value/kernel": ("self_attention", "value", "kernel"),
    "attention/query_norm/scale": ("self_attention", "query_norm", "scale"),
    "attention/key_norm/scale": ("self_attention", "key_norm", "scale"),
    "attention/attention_output/kernel": ("self_attention", "out", "kernel"),
    "post_attention_norm/scale": ("post_self_attention_norm", "scale"),
    "pre_ffw_norm/scale": ("pre_ffw_norm", "scale"),
    "ffw_gating/kernel": ("mlp", "wi_0", "kernel"),
    "ffw_gating_2/kernel": ("mlp", "wi_1", "kernel"),
    "ffw_linear/kernel": ("mlp", "wo", "kernel"),
    "post_ffw_norm/scale": ("post_ffw_norm", "scale"),
}
_LAYERS = ("decoder", "layers")
_REMAINDER = ("decoder", "layers_remainder")
_LAYER = re.compile(r"layers_(\d{1,5})")
# The axis on which layers are stacked (`param_scan_axis`).
_AXIS = 1


@dataclasses.dataclass(frozen=True)
class MaxTextLayout:
    """One way of laying out the layers.

    Attributes:
        kind: `"scanned"`, `"unscanned"`, or `"stacked"`: the layers of a Gemma 3 in
            one stack, as MaxText's first converter has them.
    """

    kind: str = "scanned"

    format = "MaxText"
    embedding = ("token_embedder", "embedding")
    final_norm = ("decoder", "decoder_norm", "scale")

    @staticmethod
    def canonical(name):
        """The name of an array."""
        return name

    @staticmethod
    def is_decoder(name):
        """Whether an array is a part of the decoder."""
        return name[0] != "vision_encoder"

    @classmethod
    def read(cls, shapes, where):
        """The layout, and the fields of a `GemmaConfig`, that shapes tell.

        Args:
            shapes: Name of each array of the decoder to its shape.
            where: The directory, for messages.
        """
        pair = any(name[2:3] == ("self_attention_local",) for name in shapes)
        kind, block = cls._find(shapes, where)
        stacked = kind != "unscanned" and block[:2] != _REMAINDER

        def name_of(role):
            first, *rest = _NAMES[role]
            return (*block, first + _SUFFIXES["L"] * pair, *rest)

        def shape(role, dims):
            found = stored_array(shapes, name_of(role), dims + stacked, where)
            return found[:_AXIS] + found[_AXIS + 1 :] if stacked else found

        width, heads, head = shape("attention/query/kernel", 3)
        fields = {
            "hidden_dim": width,
            "ffn_dim": shape("ffw_gating/kernel", 2)[1],
            "num_query_heads": heads,
            "num_kv_heads": shape("attention/key/kernel", 3)[1],
            "head_dim": head,
            "use_post_norms": name_of("post_ffw_norm/scale") in shapes,
            "use_qk_norm": name_of("attention/query_norm/scale") in shapes,
        }
        norm = name_of("pre_attention_norm/scale")
        count = stored_array(shapes, norm, 2, where)[_AXIS] if stacked else 0
        each = 2 if pair else len(PATTERNS["gemma3"]) if block[2:] else 1
        if kind == "unscanned":
            fields["num_layers"] = each * cls._counted(shapes, ("decoder",))
        else:
            fields["num_layers"] = each * count + cls._counted(shapes, _REMAINDER)
        return cls(kind), fields

    @staticmethod
    def _counted(shapes, prefix):
        """How many layers of their own there are below a prefix."""
        place = len(prefix)
        matches = (
            _LAYER.fullmatch(name[place])
            for name in shapes
            if name[:place] == prefix and len(name) > place
        )
        return max((int(match[1]) for match in matches if match), default=-1) + 1

    @staticmethod
    def _find(shapes, where):
        """The kind of layout, and what the names of its first layer begin with."""
        query = _NAMES["attention/query/kernel"]
        local = (query[0] + _SUFFIXES["L"], *query[1:])
        for kind, block in (
            ("unscanned", ("decoder", "layers_0")),
            ("scanned", (*_LAYERS, "layers_0")),
            ("scanned", (*_REMAINDER, "layers_0")),
            ("scanned", _LAYERS),
        ):
            if (*block, *query) in shapes or (*block, *local) in shapes:
                norm = _NAMES["attention/query_norm/scale"]
                if block == _LAYERS and (*block, *norm) in shapes:
                    kind = "stacked"
                return kind, block
        raise CheckpointError(
            f"{where}: the array decoder/layers/{'/'.join(query)} is missing."
        )

    def in_block(self, path, shape, config):
        """The `Place` of a weight of a block, whose own shape is `shape`."""
        block, role = path.split("/", 1)
        layer = int(block.removeprefix("decoder_block_"))
        prefix, stack = self._of_layer(layer, config)
        first, *rest = _NAMES[role]
        if config.family == "gemma2":
            first += _SUFFIXES[config.layer_kinds[layer]]
        name = (*prefix, first, *rest)
        return Place(name=name, shape=_stored_shape(path, shape, config), stack=stack)

    def _of_layer(self, layer, config):
        """What the names of a layer begin with, and its place in a stack."""
        period = len(PATTERNS[config.family])
        if config.family == "gemma3" and self.kind == "scanned":
            count, rest = divmod(config.num_layers, period)
            if layer >= config.num_layers - rest:
                return (*_REMAINDER, f"layers_{layer - count * period}"), None
            place = (*_LAYERS, f"layers_{layer % period}")
            return place, (_AXIS, layer // period, count)
        number, count = layer, config.num_layers
        if config.family == "gemma2":
            number, count = layer // period, count // period
        if self.kind == "unscanned":
            return ("decoder", f"layers_{number}"), None
        return _LAYERS, (_AXIS, number, count)

    def to_stored(self, path, array, config):
        """A weight with MaxText's axes, not yet folded; a view."""
        return array.reshape(_stored_shape(path, array.shape, config))

    def from_stored(self, path, array, config):
        """A weight as it was before it was turned and folded."""
        if path.endswith("scale"):
            return array.astype(np.float32) - np.float32(1)
        if path.endswith("attention_output/kernel"):
            array = array.reshape(-1, config.hidden_dim)
        elif keras_layout.head_count(path, config) is not None:
            array = array.reshape(config.hidden_dim, -1)
        factor = fold_factor(path, config)
        return array if factor is None else folding.divided(array, factor)

    @staticmethod
    def folded(path, config):
        """A function that makes a block of numbers what is stored of them."""
        if path.endswith("scale"):
            return lambda block: block + np.float32(1)
        factor = fold_factor(path, config)
        if factor is None:
            return lambda block: block
        return lambda block: folding.multiplied(block, factor)


def _stored_shape(path, shape, config):
    """[D, N, H] of queries, keys and values, [N, H, D] of the output."""
    heads = keras_layout.head_count(path, config)
    if heads is None:
        return shape
    if path.endswith("attention_output/kernel"):
        return heads, config.head_dim, config.hidden_dim
    return config.hidden_dim, heads, config.head_dim


def fold_factor(path, config):
    """The factor that MaxText keeps in a matrix, or None."""
    if path == "token_embedding/embeddings":
        return math.sqrt(config.hidden_dim)
    if path.endswith("attention/query/kernel") and not config.use_qk_norm:
        return config.query_pre_attn_scalar**-0.5
    return None
