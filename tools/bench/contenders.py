"""One model of random weights, as this package, KerasHub and transformers build it.

264M parameters: Gemma 1 with 18 layers, width 640, 4 query heads, 1 key head of 256,
feed-forward 2048, vocabulary 256000.
"""

SHAPE = {
    "vocab": 256_000,
    "layers": 18,
    "width": 640,
    "ffn": 2048,
    "heads": 4,
    "kv_heads": 1,
    "head_dim": 256,
}


def our_config():
    """The shape as a `gemma_keras.GemmaConfig`."""
    from gemma_keras import GemmaConfig

    return GemmaConfig(
        vocab_size=SHAPE["vocab"],
        num_layers=SHAPE["layers"],
        hidden_dim=SHAPE["width"],
        ffn_dim=SHAPE["ffn"],
        num_query_heads=SHAPE["heads"],
        num_kv_heads=SHAPE["kv_heads"],
        head_dim=SHAPE["head_dim"],
        query_pre_attn_scalar=SHAPE["head_dim"],
    )


def our_model(dtype):
    """A `gemma_keras.GemmaCausalLM` without a preprocessor.

    Its weights come as those of a checkpoint do, one array at a time.
    """
    import numpy as np

    from gemma_keras import GemmaBackbone, GemmaCausalLM
    from gemma_keras.backend import tensor_from_array

    random = np.random.default_rng(0)

    def fill(shape, dtype):
        array = random.standard_normal(shape, "float32")
        array *= 0.02
        return tensor_from_array(array, dtype)

    return GemmaCausalLM(
        GemmaBackbone(our_config(), dtype=dtype, init=lambda path: fill)
    )


def keras_hub_model(dtype):
    """A `keras_hub.models.GemmaCausalLM` without a preprocessor."""
    import keras_hub

    backbone = keras_hub.models.GemmaBackbone(
        vocabulary_size=SHAPE["vocab"],
        num_layers=SHAPE["layers"],
        num_query_heads=SHAPE["heads"],
        num_key_value_heads=SHAPE["kv_heads"],
        hidden_dim=SHAPE["width"],
        # Its intermediate_dim counts both branches.
        intermediate_dim=2 * SHAPE["ffn"],
        head_dim=SHAPE["head_dim"],
        dtype=dtype,
    )
    return keras_hub.models.GemmaCausalLM(backbone, preprocessor=None)


def transformers_model(dtype):
    """A `transformers.GemmaForCausalLM`."""
    import torch
    import transformers

    config = transformers.GemmaConfig(
        vocab_size=SHAPE["vocab"],
        hidden_size=SHAPE["width"],
        intermediate_size=SHAPE["ffn"],
        num_hidden_layers=SHAPE["layers"],
        num_attention_heads=SHAPE["heads"],
        num_key_value_heads=SHAPE["kv_heads"],
        head_dim=SHAPE["head_dim"],
    )
    return transformers.GemmaForCausalLM(config).to(getattr(torch, dtype))
