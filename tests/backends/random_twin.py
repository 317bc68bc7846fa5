"""A random model of any config, with or without low-rank updates."""

import functools

import keras
import numpy as np

from gemma_keras import GemmaBackbone, GemmaCausalLM
from gemma_keras.projection import adapted_layers


@functools.cache
def build(config, dtype="float32", lora=False):
    """A random model, its norms too, with or without updates of every projection."""

    def init(path):
        deviations = {"scale": 0.4, "kernel": 0.12, "embeddings": 0.12}
        return keras.initializers.RandomNormal(stddev=deviations[path.split("/")[-1]])

    keras.utils.set_random_seed(11)
    lm = GemmaCausalLM(GemmaBackbone(config, init=init, dtype=dtype))
    if lora:
        layers = adapted_layers(lm.backbone).values()
        names = sorted({layer.name for layer in layers} - {"token_embedding"})
        lm.backbone.enable_lora(3, target_layer_names=names, alpha=5)
        random = np.random.default_rng(5)
        for variable in lm.trainable_variables:
            variable.assign(0.2 * random.normal(size=variable.shape))
    return lm
