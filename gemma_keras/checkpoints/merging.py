"""An adapter merged into a checkpoint while it is read, one weight at a time."""

import dataclasses

import numpy as np

from gemma_keras.checkpoints.checkpoint import CheckpointError
from gemma_keras.lora_config import EMBEDDING


def merge(contents, adapter):
    """The `Contents` of the model that an adapter makes of another.

    Args:
        contents: The `Contents` of the model.
        adapter: A `peft.Adapter` that was read for its config.

    Raises:
        CheckpointError: it updates the embedding. No checkpoint can hold that: the
            output head is the same table, and gets no update.
    """
    lora, weights = adapter
    if EMBEDDING in weights:
        raise CheckpointError(
            "The adapter updates the embedding, which cannot be merged: the output "
            "head is the same table. Pass the adapter on as it is."
        )

    def tensors(path):
        array = contents.tensors(path)
        layer, _, name = path.rpartition("/")
        if name != "kernel" or layer not in weights:
            return array
        return merged_kernel(array, weights[layer], lora.scale_of(layer))

    return dataclasses.replace(
        contents,
        tensors=tensors,
        # Codes of few bits are of the weights as they were.
        packings={} if contents.codes else contents.packings,
        codes=None,
        provenance=contents.provenance.adding(told(lora, next(iter(weights)))),
    )


def merged_kernel(kernel, factors, scale):
    """W + s A B [in, out] in the dtype of W, and DoRA's rescaled columns of it.

    Computed in float32, as the layers do; section 4 of arXiv:2402.09353 has DoRA.
    """
    total = factors["lora_a"] @ factors["lora_b"]
    total *= np.float32(scale)
    total += np.asarray(kernel, "float32")
    magnitude = factors.get("lora_magnitude")
    if magnitude is not None:
        norms = np.sqrt(np.einsum("io,io->o", total, total))
        total *= magnitude / np.maximum(norms, np.float32(1e-15))
    return total.astype(kernel.dtype)


def told(lora, layer):
    """The sentence about a merged adapter, for provenance.

    Args:
        lora: Its `LoraConfig`.
        layer: The path of one of the layers that it updates.
    """
    kind = "DoRA" if lora.dora else "LoRA"
    return (
        f"Low-rank updates ({kind}, rank {lora.rank}, alpha {lora.alpha_of(layer):g}) "
        f"of {', '.join(lora.targets)} were merged into the weights."
    )
