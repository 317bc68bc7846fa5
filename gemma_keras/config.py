"""The numbers that make one Gemma differ from another.

Every field below exists because two released checkpoints differ in it. The layer
pattern is a string tiled over the depth, one letter a layer: `L` sees a sliding
window, `G` sees everything. Gemma 1 is `"G"`, Gemma 2 `"LG"`, Gemma 3 `"LLLLLG"`.
"""

import dataclasses
import math


@dataclasses.dataclass(frozen=True, kw_only=True)
class GemmaConfig:
    """Architecture of a Gemma 1, 2 or 3 text decoder.

    Raises `ValueError`, naming the field, if a value makes no model.
    """

    vocab_size: int
    num_layers: int
    hidden_dim: int
    # Width of one branch of the gated feed-forward, as Hugging Face counts it
    # (KerasHub's `intermediate_dim` is twice this for Gemma 1 and 2).
    ffn_dim: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    # Scores are multiplied by query_pre_attn_scalar ** -0.5: the head size, but for
    # the 27B models, which state width / heads (144 in Gemma 2, 168 in Gemma 3).
    query_pre_attn_scalar: float
    # One letter a layer, tiled over the depth: L sliding window, G global.
    layer_pattern: str = "G"
    # A query sees itself and the `sliding_window - 1` tokens before it in L layers.
    sliding_window: int | None = None
    # cap * tanh(x / cap) on attention scores and on logits: Gemma 2.
    attn_logit_soft_cap: float | None = None
    final_logit_soft_cap: float | None = None
    # RMSNorm of each branch before it is added to the residual: Gemma 2 and 3.
    use_post_norms: bool = False
    # RMSNorm of each query and key head before the rotation: Gemma 3.
    use_qk_norm: bool = False
    rope_theta: float = 10_000.0
    # Rotary base of the L layers; None means that they share `rope_theta`.
    local_rope_theta: float | None = None
    # Linear scaling: positions of G layers are divided by this (Gemma 3 4B and up).
    rope_scaling_factor: float = 1.0
    norm_epsilon: float = 1e-6
    # The longest sequence the checkpoint was trained for, in tokens.
    max_position: int = 8192

    def __post_init__(self):
        counts = (
            "vocab_size num_layers hidden_dim ffn_dim num_query_heads num_kv_heads "
            "head_dim max_position"
        )
        for name in counts.split():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
                raise ValueError(f"{name} must be a positive integer, got {value!r}.")
        positive = (
            "query_pre_attn_scalar rope_theta rope_scaling_factor norm_epsilon "
            "local_rope_theta attn_logit_soft_cap final_logit_soft_cap"
        )
        optional = ("local_rope_theta", "attn_logit_soft_cap", "final_logit_soft_cap")
        for name in positive.split():
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value <= 0:
                raise ValueError(f"{name} must be a positive number, got {value!r}.")
        for name in ("use_post_norms", "use_qk_norm"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ValueError(f"{name} must be true or false, got {value!r}.")
        if self.num_query_heads % self.num_kv_heads:
            raise ValueError(
                f"num_query_heads ({self.num_query_heads}) must be a multiple of "
                f"num_kv_heads ({self.num_kv_heads})."
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim must be even for rotary positions, got {self.head_dim}."
            )
        self._check_pattern()

    def _check_pattern(self):
        pattern = self.layer_pattern
        if not isinstance(pattern, str) or not pattern or set(pattern) - set("LG"):
            raise ValueError(
                f'layer_pattern must be a string of L and G such as "LG", got '
                f"{pattern!r}."
            )
        window = self.sliding_window
        if window is not None and (
            not isinstance(window, int) or isinstance(window, bool) or window <= 0
        ):
            raise ValueError(
                f"sliding_window must be None or a positive integer, got {window!r}."
            )
        if "L" in self.layer_kinds and window is None:
            raise ValueError(
                f"layer_pattern {pattern!r} has sliding-window layers (L), so "
                "sliding_window must be given."
            )

    @property
    def layer_kinds(self) -> str:
        """One letter, `L` or `G`, for each of the `num_layers` layers."""
        repeats = -(-self.num_layers // len(self.layer_pattern))
        return (self.layer_pattern * repeats)[: self.num_layers]

    @property
    def family(self) -> str:
        """`"gemma"`, `"gemma2"` or `"gemma3"`: the checkpoints with this shape."""
        if self.use_qk_norm:
            return "gemma3"
        return "gemma2" if self.use_post_norms else "gemma"

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Path and shape of every weight, in the order of the forward pass.

        Paths are KerasHub's variable paths; projections are 2-D, `[in, out]`.
        """
        width, ffn, head = self.hidden_dim, self.ffn_dim, self.head_dim
        query_dim, kv_dim = self.num_query_heads * head, self.num_kv_heads * head
        block = {"pre_attention_norm/scale": (width,)}
        block["attention/query/kernel"] = (width, query_dim)
        block["attention/key/kernel"] = (width, kv_dim)
        block["attention/value/kernel"] = (width, kv_dim)
        if self.use_qk_norm:
            block["attention/query_norm/scale"] = (head,)
            block["attention/key_norm/scale"] = (head,)
        block["attention/attention_output/kernel"] = (query_dim, width)
        if self.use_post_norms:
            block["post_attention_norm/scale"] = (width,)
        block["pre_ffw_norm/scale"] = (width,)
        block["ffw_gating/kernel"] = (width, ffn)
        block["ffw_gating_2/kernel"] = (width, ffn)
        block["ffw_linear/kernel"] = (ffn, width)
        if self.use_post_norms:
            block["post_ffw_norm/scale"] = (width,)
        shapes = {"token_embedding/embeddings": (self.vocab_size, width)}
        for layer in range(self.num_layers):
            for name, shape in block.items():
                shapes[f"decoder_block_{layer}/{name}"] = shape
        shapes["final_normalization/scale"] = (width,)
        return shapes

    @property
    def num_parameters(self) -> int:
        """How many numbers the weights hold (embedding and head are one tensor)."""
        return sum(math.prod(shape) for shape in self.weight_shapes().values())
