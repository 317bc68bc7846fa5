"""A training program as a user would write it, run by test_together.py.

    python train_together.py alone|processes|mirrored OUT

`alone` is one process and device; `processes` is one of several (torch, JAX);
`mirrored` is two logical devices of one process (TensorFlow). The first process writes
losses and trained weights to OUT.
"""

import contextlib
import json
import pathlib
import sys

import keras
import numpy as np

import gemma_keras
from gemma_keras import (
    GemmaBackbone,
    GemmaCausalLM,
    GemmaConfig,
    PackedDataset,
    backend,
    distribution,
)
from gemma_keras.optimizers import make_optimizer

PAIRS = [
    {"prompt": f"Count to {n}.", "response": " ".join(map(str, range(n)))}
    for n in (1, 2, 9, 3, 12, 1, 7, 2, 10, 4, 1, 6)
]


def lora(scope, shard):
    """LoRA on a preset, from packed examples; the factors differ until `fit`."""
    with scope():
        lm = GemmaCausalLM.from_preset("gemma_tiny_instruct_en", dtype="float32")
        alike = keras.backend.backend() != "torch"
        backend.set_seed(3 if alike else 3 + shard[0])
        lm.enable_lora(4)
        optimizer = make_optimizer(
            "adamw", 0.01, weight_decay=0.1, clip_norm=0.5, lora_plus_ratio=4.0
        )
        lm.compile(optimizer)
    encoder = lm.preprocessor.encoder(instruct=True)
    examples = gemma_keras.read_examples(PAIRS)
    encoded = gemma_keras.encode_examples(examples, encoder, 48)
    dataset = PackedDataset(encoded, 4, shard=shard)
    history = lm.fit(dataset, validation_data=dataset, epochs=2, verbose=0).history
    lm.save_adapter(pathlib.Path(sys.argv[2]).with_suffix(f".{shard[0]}"))
    return lm, history


def accumulated(scope, shard):
    """All weights, from arrays with few tokens to learn in some rows, many in others."""
    config = GemmaConfig(
        vocab_size=128,
        num_layers=1,
        hidden_dim=32,
        ffn_dim=64,
        num_query_heads=4,
        num_kv_heads=1,
        head_dim=16,
        query_pre_attn_scalar=16.0,
        max_position=64,
    )

    def init(path):
        return keras.initializers.RandomNormal(0.0, 0.3, sum(map(ord, path)))

    with scope():
        lm = GemmaCausalLM(GemmaBackbone(config, init=init))
        lm.compile(
            make_optimizer("adamw", 0.01, weight_decay=0.1),
            gradient_accumulation_steps=2,
        )
    random = np.random.default_rng(0)
    ids = random.integers(4, 128, (16, 21)).astype("int32")
    share = np.linspace(0.05, 0.95, 16)[:, None]
    weights = (random.random((16, 20)) < share).astype("float32")
    # Each process has every second row; alone, batches hold the same rows together.
    index, count = shard
    ids, weights = ids[index::count], weights[index::count]
    x = {"token_ids": ids[:, :-1], "padding_mask": np.ones(weights.shape, bool)}
    data = {"x": x, "y": ids[:, 1:], "sample_weight": weights}
    rows = 8 // count
    history = lm.fit(
        **data, batch_size=rows, epochs=2, shuffle=False, verbose=0
    ).history
    found = lm.evaluate(**data, batch_size=rows, verbose=0, return_dict=True)
    return lm, history | {f"then_{name}": value for name, value in found.items()}


def main():
    """Trains twice, and writes what came out."""
    kind, out = sys.argv[1:]
    scope = contextlib.nullcontext
    if kind == "mirrored":
        import tensorflow as tf

        (cpu,) = tf.config.list_physical_devices("CPU")
        two = [tf.config.LogicalDeviceConfiguration()] * 2
        tf.config.set_logical_device_configuration(cpu, two)
        scope = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope
    elif kind == "processes":
        distribution.initialize()
        if keras.backend.backend() == "jax":
            data = keras.distribution.DataParallel(auto_shard_dataset=False)
            keras.distribution.set_distribution(data)
    shard = distribution.shard()
    results, weights = {}, {}
    for case in (lora, accumulated):
        lm, results[case.__name__] = case(scope, shard)
        for number, variable in enumerate(lm.trainable_variables):
            value = keras.ops.convert_to_numpy(variable)
            weights[f"{case.__name__} {number} {variable.path}"] = value
    if shard[0] == 0:
        np.savez(f"{out}.npz", **weights)
        pathlib.Path(f"{out}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
