"""Write a random Hugging Face checkpoint of a real Gemma's shape and size.

    python tools/bench/make_checkpoint.py gemma_2b_en DIRECTORY

Sharded bfloat16 safetensors with values of about N(0, 0.02), written a piece at a time:
5.0 GB for gemma_2b_en, 17.1 GB for gemma_7b_en. All weights are cut from one random
block, so that a disk is filled as fast as it takes it. There is no tokenizer, since
loading weights is what is measured. Needs neither a tensor library nor the network.
"""

import argparse
import itertools
import json
import math
import shutil
import struct
from pathlib import Path

import ml_dtypes
import numpy as np

from gemma_keras import registry
from gemma_keras.checkpoints.hugging_face import weight_name

BLOCK_VALUES = 2**25
SHARD_BYTES = 5_000_000_000


def tensor_shapes(config):
    """Name and shape of each tensor, as Hugging Face stores them: Linear [out, in]."""
    four_norms = config.use_post_norms
    return {
        "model." + weight_name(path, four_norms): shape[::-1]
        if path.endswith("/kernel")
        else shape
        for path, shape in config.weight_shapes().items()
    }


def shards_of(shapes):
    """The tensors in runs of at most `SHARD_BYTES`."""
    shards, size = [{}], 0
    for name, shape in shapes.items():
        count = 2 * math.prod(shape)
        if shards[-1] and size + count > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += count
    return shards


def write_shard(path, shapes, block):
    """One safetensors file whose data is `block`, over and over."""
    entries, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 2 * math.prod(shape)
        entries[name] = {
            "dtype": "BF16",
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        # From another place in each tensor, or all layers would be alike.
        for number, entry in enumerate(entries.values()):
            left = entry["data_offsets"][1] - entry["data_offsets"][0]
            start = 2 * 7919 * number % len(block)
            while left:
                piece = block[start : start + left]
                file.write(piece)
                left -= len(piece)
                start = 0


def config_json(config):
    """What `transformers` needs to build the same model."""
    if config.family != "gemma":
        raise SystemExit("Only shapes of Gemma 1 are written.")
    return {
        "architectures": ["GemmaForCausalLM"],
        "model_type": "gemma",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_query_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }


def write_checkpoint(config, directory):
    """Write the shards, their index and config.json into a new directory."""
    needed = 2 * config.num_parameters
    directory.mkdir(parents=True)
    free = shutil.disk_usage(directory).free
    if free < needed * 1.05:
        raise SystemExit(f"Needs {needed:,} bytes, the disk has {free:,} left.")
    numbers = np.random.default_rng(0).standard_normal(BLOCK_VALUES, "float32") * 0.02
    block = memoryview(numbers.astype(ml_dtypes.bfloat16).view("uint8").data)
    shards = shards_of(tensor_shapes(config))
    where = {}
    for number, shapes in zip(itertools.count(1), shards):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_shard(directory / name, shapes, block)
        where.update(dict.fromkeys(shapes, name))
        print(f"{name}: {(directory / name).stat().st_size:,} bytes")
    index = {"metadata": {"total_size": needed}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(config_json(config), indent=1))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("preset", help="such as gemma_2b_en or gemma_7b_en")
    parser.add_argument("directory", type=Path, help="made; must not be there yet")
    arguments = parser.parse_args()
    config = registry.find(arguments.preset).config
    write_checkpoint(config, arguments.directory)


if __name__ == "__main__":
    main()
