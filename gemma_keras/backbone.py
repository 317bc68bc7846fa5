"""Gemma 1, 2 and 3 (text): the model, from token ids to hidden states.

Axes, as in `keras.ops.dot_product_attention`: B batch, T query tokens, S key tokens,
D width, F feed-forward width, N query heads, K key/value heads, G = N / K query heads
that share one of them, H head size, V vocabulary.

What differs from Llama:
- token embeddings are multiplied by sqrt(D), rounded to the compute dtype;
- RMSNorm multiplies by 1 + scale, in float32, and rounds last;
- the gate is GELU (tanh form), not SiLU, and the head is the embedding, transposed;
- Gemma 2: norms after each branch too, soft caps on scores and logits, every other
  layer sees a sliding window, and the query scale is a number of the checkpoint;
- Gemma 3: queries and keys are normalised in place of soft caps, five of six layers
  see a sliding window, and those rotate with a base of their own.

One `call` serves training, packed training, prefill, decoding and scoring. This file
knows no tokenizer, file, sampler or optimiser.
"""

import dataclasses
import math

import keras
import numpy as np
from keras import ops

from gemma_keras import backend
from gemma_keras import cache as kv_cache
from gemma_keras.adapters import Adaptable
from gemma_keras.attention import attend, soft_cap, visible, visible_before
from gemma_keras.config import GemmaConfig
from gemma_keras.distribution import layout_map
from gemma_keras.geglu import geglu
from gemma_keras.packed import Quantizable, packed_init
from gemma_keras.projection import (
    Projection,
    TokenEmbedding,
    project_gated,
    project_together,
)
from gemma_keras.quantization import Packing


class RMSNorm(keras.layers.Layer):
    """x / rms(x) * (1 + scale) over the last axis, in float32 throughout."""

    def __init__(self, epsilon, init, **kwargs):
        super().__init__(autocast=False, **kwargs)
        self.epsilon = epsilon
        self.init = init

    def build(self, input_shape):
        self.scale = self.add_weight(
            name="scale",
            shape=(input_shape[-1],),
            initializer=self.init(f"{self.path}/scale"),
        )

    def call(self, x):
        # The product with 1 + scale before the downcast: Llama rounds first.
        return backend.rms_norm(x, self.scale, self.epsilon, self.compute_dtype)


def rotary_table(positions, head_dim, theta, scaling_factor=1.0):
    """What `backend.rotate` takes for integer `positions` [B, T], two of [B, T, 1, H].

    They are the cosines of the angles, twice, and their sines, negative and positive.
    Always float32: bfloat16 cannot tell position 257 from 256.
    """
    exponents = np.arange(0, head_dim, 2, dtype="float64") / head_dim
    frequencies = (1.0 / (theta**exponents * scaling_factor)).astype("float32")
    frequencies = ops.convert_to_tensor(frequencies)
    angles = ops.cast(positions, "float32")[..., None, None] * frequencies
    cos, sin = ops.cos(angles), ops.sin(angles)
    return ops.concatenate([cos, cos], axis=-1), ops.concatenate([-sin, sin], axis=-1)


class Attention(keras.layers.Layer):
    """Multi-query or grouped-query attention with rotary positions."""

    def __init__(self, config, init, **kwargs):
        super().__init__(autocast=False, **kwargs)
        self.config = config
        query_dim = config.num_query_heads * config.head_dim
        kv_dim = config.num_kv_heads * config.head_dim
        shared = {"init": init, "dtype": self.dtype_policy}
        self.query = Projection(query_dim, name="query", **shared)
        self.key = Projection(kv_dim, name="key", **shared)
        self.value = Projection(kv_dim, name="value", **shared)
        self.attention_output = Projection(
            config.hidden_dim, name="attention_output", **shared
        )
        if config.use_qk_norm:
            shared["epsilon"] = config.norm_epsilon
            self.query_norm = RMSNorm(name="query_norm", **shared)
            self.key_norm = RMSNorm(name="key_norm", **shared)

    def build(self, input_shape):
        config = self.config
        for layer in (self.query, self.key, self.value):
            layer.build(input_shape)
        if config.use_qk_norm:
            self.query_norm.build((config.head_dim,))
            self.key_norm.build((config.head_dim,))
        self.attention_output.build((config.num_query_heads * config.head_dim,))

    def call(self, x, table, mask, cache=None, noise=None, last=None):
        config = self.config
        heads = (config.num_query_heads, config.head_dim)
        kv_heads = (-1, x.shape[1], config.num_kv_heads, config.head_dim)
        if last is None:
            query, key, value = project_together(
                [self.query, self.key, self.value], x, noise
            )
        else:
            query = self.query(backend.read_slots(x, last, axis=1), noise)
            key, value = project_together([self.key, self.value], x, noise)
        query = backend.reshape(query, (-1, query.shape[1], *heads))
        key, value = backend.reshape(key, kv_heads), backend.reshape(value, kv_heads)
        query, key = self._placed(query, key, table, last)
        key, value = ops.swapaxes(key, 1, 2), ops.swapaxes(value, 1, 2)
        if cache is not None:
            key, value = cache.seen(key, value)
        used = None if cache is None else cache.used
        mixed = attend(query, key, value, mask, config, used, last)
        if cache is not None:
            cache.store(mixed)
        return self.attention_output(mixed, noise)

    def _placed(self, query, key, table, last):
        """Queries, of one token if `last` is its number, and keys, both rotated."""
        config = self.config
        norms = [self.query_norm, self.key_norm] if config.use_qk_norm else []
        scales, epsilon = [norm.scale for norm in norms], config.norm_epsilon
        if last is None:
            return backend.norm_and_rotate([query, key], scales, epsilon, *table)
        (key,) = backend.norm_and_rotate([key], scales[1:], epsilon, *table)
        table = [backend.read_slots(part, last, axis=1) for part in table]
        (query,) = backend.norm_and_rotate([query], scales[:1], epsilon, *table)
        return query, key


class DecoderBlock(keras.layers.Layer):
    """Attention and gated feed-forward, each added to the residual stream."""

    def __init__(self, config, init, **kwargs):
        super().__init__(autocast=False, **kwargs)
        self.config = config
        shared = {"init": init, "dtype": self.dtype_policy}
        norm = {"epsilon": config.norm_epsilon, **shared}
        self.pre_attention_norm = RMSNorm(name="pre_attention_norm", **norm)
        self.attention = Attention(config, name="attention", **shared)
        self.pre_ffw_norm = RMSNorm(name="pre_ffw_norm", **norm)
        self.ffw_gating = Projection(config.ffn_dim, name="ffw_gating", **shared)
        self.ffw_gating_2 = Projection(config.ffn_dim, name="ffw_gating_2", **shared)
        self.ffw_linear = Projection(config.hidden_dim, name="ffw_linear", **shared)
        if config.use_post_norms:
            self.post_attention_norm = RMSNorm(name="post_attention_norm", **norm)
            self.post_ffw_norm = RMSNorm(name="post_ffw_norm", **norm)

    def build(self, input_shape):
        self.pre_attention_norm.build(input_shape)
        self.attention.build(input_shape)
        self.pre_ffw_norm.build(input_shape)
        self.ffw_gating.build(input_shape)
        self.ffw_gating_2.build(input_shape)
        self.ffw_linear.build((self.config.ffn_dim,))
        if self.config.use_post_norms:
            self.post_attention_norm.build(input_shape)
            self.post_ffw_norm.build(input_shape)

    def call(self, x, table, attention_mask, cache=None, noise=None, last=None):
        """`x` [B, T, D] after this block, or [B, 1, D] of its token `last` alone.

        `cache` is this layer's `LayerCache`, `noise` what dropout in adapters draws on.
        """
        # Layers of this file are entered through `call`: they cast by themselves, and
        # what Keras does around it costs torch more than the arithmetic.
        mixed = self.attention.call(
            self.pre_attention_norm.call(x), table, attention_mask, cache, noise, last
        )
        if last is not None:
            x = backend.read_slots(x, last, axis=1)
        if self.config.use_post_norms:
            mixed = self.post_attention_norm.call(mixed)
        x = x + ops.cast(mixed, x.dtype)
        fed = self.feed_forward(self.pre_ffw_norm.call(x), x.dtype, noise)
        if self.config.use_post_norms:
            fed = self.post_ffw_norm.call(fed)
        return x + ops.cast(fed, x.dtype)

    def projections(self):
        """Lists of projections that read the same, in the order in which they do."""
        # No property: Keras would save what one returns as something of its own.
        attention = self.attention
        return [
            [attention.query, attention.key, attention.value],
            [attention.attention_output],
            [self.ffw_gating, self.ffw_gating_2],
            [self.ffw_linear],
        ]

    def feed_forward(self, x, residual_dtype, noise=None):
        """Down-project GELU(gate) * up."""
        projections = self.ffw_gating, self.ffw_gating_2
        if self.compute_dtype != "float16":
            return self.ffw_linear(project_gated(*projections, x, noise), noise)
        # The product, and the sum over F, pass 65504 on real Gemmas. Scale each token
        # down to fit and back up in the residual's float32: rounding is unchanged.
        gate, up = project_together(projections, x, noise)
        gate, up = ops.cast(gate, "float32"), ops.cast(up, "float32")
        product = geglu(gate, up)
        peak = ops.max(ops.abs(product), axis=-1, keepdims=True)
        factor = ops.maximum(peak, 1.0)
        fed = self.ffw_linear(ops.cast(product / factor, "float16"), noise)
        return ops.cast(fed, residual_dtype) * factor


def random_init(path):
    """The initializer of a weight that is trained from scratch."""
    if path.endswith("/scale"):
        return "zeros"
    if path.endswith("/embeddings"):
        return keras.initializers.RandomNormal(stddev=0.02)
    return "glorot_uniform"


@keras.saving.register_keras_serializable(package="gemma_keras")
class GemmaBackbone(Adaptable, Quantizable, keras.Model):
    """Token ids in, hidden states [B, T, D] out.

    Args:
        config: a `GemmaConfig`.
        dtype: a Keras dtype or policy, such as `"bfloat16"` or `"mixed_float16"`.
            Under float16 the residual stream stays in float32, where Gemma's
            activations fit.
        init: function from the path of a weight to its initializer; random by
            default. A checkpoint is loaded by answering with its tensors, so that
            no weight is filled twice; or with a `PackedStart`.
    """

    def __init__(self, config, dtype=None, init=None, **kwargs):
        super().__init__(dtype=dtype, autocast=False, **kwargs)
        if not isinstance(config, GemmaConfig):
            raise TypeError(f"config must be a GemmaConfig, got {config!r}.")
        self.config = config
        self.remat = False  # keep only the inputs of blocks for a backward pass
        shared = {"init": init or random_init, "dtype": self.dtype_policy}
        self.token_embedding = TokenEmbedding(
            config.vocab_size, config.hidden_dim, name="token_embedding", **shared
        )
        self.token_embedding.build()
        self.blocks = [
            DecoderBlock(config, name=f"decoder_block_{i}", **shared)
            for i in range(config.num_layers)
        ]
        for block in self.blocks:
            block.build((None, None, config.hidden_dim))
        self.final_normalization = RMSNorm(
            config.norm_epsilon, name="final_normalization", **shared
        )
        self.final_normalization.build((None, None, config.hidden_dim))
        self._prepare_adapters()
        self.built = True

    def __call__(self, inputs, cache=None, **kwargs):
        # Keras takes no argument that mixes tensors with integers, as a cache does.
        if cache is None:
            return super().__call__(inputs, **kwargs)
        return self.call(inputs, cache=cache, **kwargs)

    def call(
        self, inputs, cache=None, layer_intercept_fn=None, training=None, last=None
    ):
        """Run every layer.

        Args:
            inputs: a dict of
                `token_ids`: integers [B, T]; or `embeddings`: floats [B, T, D], rows
                    of the embedding table, not yet scaled;
                `padding_mask`: optional [B, T], true where there is a token;
                `positions`: optional integers [B, T], which increase along each row
                    or segment; counted from the padding mask or the segments if absent;
                `segment_ids`: optional integers [B, T]: tokens see only their own
                    segment, so several examples can share a row.
            cache: optional `Cache` of the tokens before these.
            layer_intercept_fn: optional `fn(x, i)` that may replace the embeddings
                (i = -1) and the output of each block (i = 0, 1, ...).
            training: whether adapters with dropout drop anything.
            last: beside a cache, the one of the T tokens whose hidden states are
                wanted. The last block computes keys and values of the others alone.

        Returns:
            Hidden states [B, T, D], or [B, 1, D], in the compute dtype, and the new
            cache with them if one was given.

        Raises:
            ValueError: `last` without a cache, or segments beside one.
        """
        if last is not None and cache is None:
            raise ValueError(
                "last picks a token beside a cache, got no cache: take hidden[:, last]."
            )
        x = self.embed(inputs, layer_intercept_fn)
        positions, masks, step = self._positions_and_masks(inputs, x.shape[1], cache)
        tables, noise = self._rotary_tables(positions), self.draw_noise(training)
        if x.shape[1] == 1:
            last = None  # it is all there is
        for i, (block, kind) in enumerate(
            zip(self.blocks, self.config.layer_kinds, strict=True)
        ):
            if step is None:
                x = self._train_block(block, x, tables[kind], masks[kind], noise)
            else:
                one = last if block is self.blocks[-1] else None
                x = block.call(
                    x, tables[kind], masks[kind], cache=step.layers[i], last=one
                )
            if layer_intercept_fn is not None:
                x = layer_intercept_fn(x, i)
        x = self.final_normalization.call(x)
        return x if step is None else (x, step.finish())

    def _train_block(self, block, x, table, mask, noise):
        # A closure: TensorFlow's remat takes numbers only, which masks are not.
        run = lambda x: block(x, table, attention_mask=mask, noise=noise)  # noqa: E731
        if not self.remat:
            return run(x)
        return backend.remat(run, block.trainable_variables)(x)

    def embed(self, inputs, layer_intercept_fn=None):
        """Scaled embeddings [B, T, D], in the dtype of the residual stream."""
        x = inputs.get("embeddings")
        if x is None:
            x = self.token_embedding.lookup(inputs["token_ids"])
        if layer_intercept_fn is not None:
            x = layer_intercept_fn(x, -1)
        x = ops.cast(x, self.compute_dtype)
        # sqrt(D) is rounded to the compute dtype first: bfloat16(sqrt(3072)) = 55.5.
        x = x * ops.cast(math.sqrt(self.config.hidden_dim), self.compute_dtype)
        return ops.cast(x, "float32") if self.compute_dtype == "float16" else x

    def logits(self, hidden, table=None):
        """Logits [..., V], capped; of the rows `table` [T, D] alone, if given."""
        packed = self.token_embedding.packed
        if table is not None:
            logits = backend.matmul(hidden, table, True)
        elif packed is None:
            logits = backend.matmul(hidden, self.token_embedding.embeddings, True)
        else:
            logits = packed.to_rows(hidden)
        cap = self.config.final_logit_soft_cap
        return logits if cap is None else soft_cap(ops.cast(logits, "float32"), cap)

    def _rotary_tables(self, positions):
        config = self.config
        bases = {"G": (config.rope_theta, config.rope_scaling_factor)}
        bases["L"] = (config.local_rope_theta, 1.0)
        if config.local_rope_theta is None:
            bases["L"] = bases["G"]
        return {
            kind: rotary_table(positions, config.head_dim, *bases[kind])
            for kind in sorted(set(config.layer_kinds))
        }

    def surroundings(self, inputs, length):
        """Rotary tables and masks that blocks take, each a dict by kind of layer.

        Args:
            inputs: as `call` takes them, of tensors.
            length: T.
        """
        positions, masks, _ = self._positions_and_masks(inputs, length, None)
        return self._rotary_tables(positions), masks

    def _positions_and_masks(self, inputs, length, cache):
        """Positions [B, T], a mask for each layer kind, and the cache's next step."""
        padding, segments = inputs.get("padding_mask"), inputs.get("segment_ids")
        if cache is not None and segments is not None:
            raise ValueError("segment_ids pack training rows; a cache holds one each.")
        positions = inputs.get("positions")
        if positions is None:
            positions = kv_cache.default_positions(length, padding, segments)
            if cache is not None:
                positions = positions + cache.next_positions()
        positions = ops.cast(positions, "int32")
        keys = positions
        if padding is not None:
            padding = ops.cast(padding, "bool")
            keys = ops.where(padding, positions, kv_cache.EMPTY)
        kinds = sorted(set(self.config.layer_kinds))
        windows = {"G": None, "L": self.config.sliding_window}
        if cache is not None:
            step = kv_cache.Step(cache, self.config.layer_kinds, keys, padding)
            see = visible_before if step.first else visible
            masks = {
                k: tuple(see(positions, seen, windows[k]) for seen in step.seen[k])
                for k in kinds
            }
            return positions, masks, step
        masks = {
            k: visible_before(positions, keys, windows[k], segments) for k in kinds
        }
        return positions, masks, None

    get_layout_map = staticmethod(layout_map)

    @classmethod
    def from_preset(cls, source, dtype="auto", load_weights=True, quantize=None):
        """The backbone alone of what `GemmaCausalLM.from_preset` loads."""
        # A door upstairs, opened when it is called: the model knows no files.
        from gemma_keras.loading import backbone_from_source

        return backbone_from_source(source, dtype, load_weights, quantize)

    def get_config(self):
        return {
            "name": self.name,
            "trainable": self.trainable,
            "dtype": keras.dtype_policies.serialize(self.dtype_policy),
            "config": dataclasses.asdict(self.config),
            "lora": self.adapters.get_config(),
            "packings": {p: dataclasses.astuple(x) for p, x in self.packings.items()},
        }

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        adapters, packings = config.pop("lora", None), config.pop("packings", {})
        packings = {path: Packing(*fields) for path, fields in packings.items()}
        config["init"] = packed_init(random_init, packings)
        config["config"] = GemmaConfig(**config["config"])
        backbone = cls(**config)
        if adapters:
            backbone.adapters.restore(adapters)
        return backbone
