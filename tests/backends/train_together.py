"""A training program as a user would write it, run by test_together.py.

    python train_together.py processes|mirrored OUT

`processes` is one of several (torch, JAX); `mirrored` is two logical devices of one
process (TensorFlow). The first process writes losses and trained weights to OUT.
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


def small_model(vocab_size):
    """A random model of one layer, alike in every process."""
    config = GemmaConfig(
        vocab_size=vocab_size,
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

    return GemmaCausalLM(GemmaBackbone(config, init=init))


def lora(scope, shard):
    """LoRA, from packed examples; torch's factors differ until `fit`."""
    with scope():
        preset = GemmaCausalLM.from_preset("gemma_tiny_instruct_en", dtype="float32")
        lm = small_model(preset.config.vocab_size)
        alike = keras.backend.backend() != "torch"
        backend.set_seed(3 if alike else 3 + shard[0])
        lm.enable_lora(4)
        optimizer = make_optimizer(
            "adamw", 0.01, weight_decay=0.1, clip_norm=0.5, lora_plus_ratio=4.0
        )
        lm.compile(optimizer)
    examples = gemma_keras.read_examples(PAIRS)
    encoder = preset.preprocessor.encoder(instruct=True)
    encoded = gemma_keras.encode_examples(examples, encoder, 48)
    dataset = PackedDataset(encoded, 4, shard=shard)
    history = lm.fit(dataset, epochs=2, verbose=0).history
    kernel = keras.ops.convert_to_numpy(
        preset.backbone.blocks[0].attention.query.kernel
    )
    return lm, history | {"loaded": float(keras.ops.sum(kernel**2))}


def accumulated(scope, shard):
    """All weights, from arrays; some rows have few tokens to learn, others many."""
    with scope():
        lm = small_model(128)
        lm.compile(
            make_optimizer("adamw", 0.01, weight_decay=0.1),
            gradient_accumulation_steps=2,
        )
    random = np.random.default_rng(0)
    ids = random.integers(4, 128, (16, 21)).astype("int32")
    # Each process has every second row, each replica of TensorFlow half of a batch:
    # neither has as many tokens to learn as the other.
    row = np.arange(16)
    share = 0.02 + 0.45 * (row % 2) + 0.45 * (row % 8 >= 4)
    weights = (random.random((16, 20)) < share[:, None]).astype("float32")
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


def another_loss(scope, shard):
    """One step by a loss that Keras reduces, over rows that all count the same."""
    with scope():
        lm = small_model(64)
        lm.compile(
            keras.optimizers.SGD(0.1),
            loss=keras.losses.CategoricalCrossentropy(from_logits=True),
            weighted_metrics=[],
        )
    index, count = shard
    ids = np.random.default_rng(1).integers(4, 64, (4, 9))[index::count]
    x = {"token_ids": ids[:, :-1], "padding_mask": np.ones((len(ids), 8), bool)}
    lm.fit(x, np.eye(64)[ids[:, 1:]], batch_size=len(ids), verbose=0)
    return lm, {}


def wrapped(scope, shard):
    """A loop of torch's own, as Keras documents it; as many tokens in each process."""
    import torch

    lm = model = small_model(64)
    if shard[1] > 1:
        model = torch.nn.parallel.DistributedDataParallel(lm)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    index, count = shard
    ids = np.random.default_rng(2).integers(4, 64, (4, 9))[index::count]
    ids = torch.from_numpy(ids)
    x = {"token_ids": ids[:, :-1], "padding_mask": torch.ones(len(ids), 8).bool()}
    losses = []
    for _ in range(3):
        logits = model(x).flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach() / count
        if count > 1:
            torch.distributed.all_reduce(mean)
        losses.append(mean.item())
    return lm, {"loss": losses}


def divided(scope, _):
    """As `accumulated`, with a model whose weights are divided among processes."""
    devices = keras.distribution.list_devices()
    mesh = keras.distribution.DeviceMesh((1, len(devices)), ("batch", "model"))
    layouts = keras.distribution.ModelParallel(
        layout_map=GemmaBackbone.get_layout_map(mesh),
        batch_dim_name="batch",
        auto_shard_dataset=False,
    )
    keras.distribution.set_distribution(layouts)
    lm, found = accumulated(scope, distribution.shard())
    kernel = lm.backbone.blocks[0].ffw_linear.kernel.value
    assert not kernel.is_fully_addressable
    assert kernel.addressable_shards[0].data.nbytes * len(devices) == kernel.nbytes
    return lm, found


def refused(lm, shard):
    """What is said of shares that are not equal, or of what no replica has."""
    if keras.backend.backend() == "tensorflow":
        lm.enable_lora(2)
        lm.compile()
    ids = np.ones((4 + 2 * shard[0], 8), "int32")
    x = {"token_ids": ids, "padding_mask": ids > 0}
    try:
        lm.fit(x, ids, batch_size=2, verbose=0)
    except ValueError as error:
        return str(error)


def brought_together():
    """Numbers of which, on JAX, each process holds a half."""
    numbers = np.arange(8.0, dtype="float32").reshape(4, 2)
    if keras.backend.backend() == "jax":
        mesh = keras.distribution.distribution().device_mesh
        layout = keras.distribution.TensorLayout(("batch", None), mesh)
        numbers = keras.distribution.distribute_tensor(numbers, layout)
        assert not numbers.is_fully_addressable
    return backend.to_numpy(numbers).tolist()


def train(kind, out):
    """Trains in several ways, and writes what came out."""
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
    results, weights = {"shards": shard[1]}, {}
    cases = [lora, accumulated]
    if keras.backend.backend() == "torch":
        cases.append(wrapped)
    if keras.backend.backend() != "jax":  # whose arrays know of no replicas
        cases.append(another_loss)
    for case in cases:
        lm, results[case.__name__] = case(scope, shard)
        for number, variable in enumerate(lm.trainable_variables):
            value = keras.ops.convert_to_numpy(variable)
            weights[f"{case.__name__} {number} {variable.path}"] = value
    if kind != "alone":
        results["refused"] = refused(lm, shard)
        results["brought_together"] = brought_together()
    if kind == "processes" and keras.backend.backend() == "jax":
        results["divided"] = divided(scope, shard)[1]
    if distribution.is_first():
        np.savez(f"{out}.npz", **weights)
        pathlib.Path(f"{out}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    train(*sys.argv[1:])
