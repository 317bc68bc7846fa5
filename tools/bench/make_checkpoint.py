"""Write a random Hugging Face checkpoint of a real Gemma's shape and size.

    python tools/bench/make_checkpoint.py gemma_2b_en DIRECTORY

Sharded bfloat16 safetensors with values of about N(0, 0.02), written a tensor at a
time: 5.0 GB for gemma_2b_en, 17.1 GB for gemma_7b_en. All weights are cut from one
random block, so that a disk is filled as fast as it takes it. There is no tokenizer,
since loading weights is what is measured.
"""

import argparse
import itertools
import math
from pathlib import Path

import ml_dtypes
import numpy as np

from gemma_keras import registry
from gemma_keras.checkpoints import exporting
from gemma_keras.checkpoints.contents import Contents
from gemma_keras.checkpoints.provenance import Provenance

BLOCK_VALUES = 2**25


def random_contents(config, dtype, tokenizer=None):
    """A model of random weights, as the writers of checkpoints take one."""
    numbers = np.random.default_rng(0).standard_normal(BLOCK_VALUES, "float32") * 0.02
    block = numbers.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    shapes = config.weight_shapes()
    # From another place in each tensor, or all layers would be alike.
    starts = {path: 7919 * number for path, number in zip(shapes, itertools.count())}

    def tensor(path):
        shape, start = shapes[path], starts[path]
        if math.prod(shape) <= BLOCK_VALUES - start:
            return block[start : start + math.prod(shape)].reshape(shape)
        return np.resize(np.roll(block, -start), shape)

    return Contents(
        config=config,
        tensors=tensor,
        dtype=dtype,
        tokenizer=tokenizer,
        provenance=Provenance(licence="apache-2.0"),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("preset", help="such as gemma_2b_en or gemma_7b_en")
    parser.add_argument("directory", type=Path, help="made; must not be there yet")
    arguments = parser.parse_args()
    config = registry.find(arguments.preset).config
    contents = random_contents(config, "bfloat16")
    print(exporting.export(contents, arguments.directory, "hf"))


if __name__ == "__main__":
    main()
