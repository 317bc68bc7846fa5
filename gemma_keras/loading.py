"""From a preset's name or a checkpoint on disk to a model, one tensor at a time."""

import math
import warnings

import keras
import numpy as np

from gemma_keras import backend, distribution, registry
from gemma_keras.backbone import GemmaBackbone, random_init
from gemma_keras.checkpoints import CheckpointError, open_checkpoint
from gemma_keras.packed import PackedStart, packed_init
from gemma_keras.preprocessor import GemmaCausalLMPreprocessor
from gemma_keras.projection import adapted_layers
from gemma_keras.quantization import Quantization, pack


def open_source(source, dtype="auto"):
    """The open `Checkpoint` behind a preset's name, a path or a hub's handle."""
    quantised_to = None if dtype == "auto" else _variable_dtype(dtype)
    return open_checkpoint(registry.resolve(source), dtype=quantised_to)


def backbone_from_source(source, dtype="auto", load_weights=True, quantize=None):
    """The `GemmaBackbone` of a preset, path or handle."""
    with open_source(source, dtype) as checkpoint:
        return make_backbone(checkpoint, dtype, load_weights, quantize)


def make_backbone(
    checkpoint, dtype="auto", load_weights=True, quantize=None, progress=None
):
    """A backbone with the checkpoint's weights, or random ones of the same shapes."""
    packings = _packings(checkpoint, quantize)
    if load_weights:
        return load_backbone(checkpoint, dtype, packings, progress)
    policy = checkpoint.dtype if dtype == "auto" else dtype
    init = packed_init(random_init, packings)
    return GemmaBackbone(checkpoint.config, dtype=policy, init=init)


def _packings(checkpoint, quantize):
    """Path of each layer that is to be quantised to its `Packing`."""
    quantization = Quantization.get(quantize)
    if checkpoint.packings:
        if quantization is not None:
            raise ValueError(
                f"{checkpoint.path}: is quantised already; load it without quantize, "
                "or quantise the model that it was made of."
            )
        return checkpoint.packings
    if quantization is None:
        return {}
    packings = quantization.packings(checkpoint.config)
    if not packings:
        raise ValueError(f"No layer's path matches {quantization.layers!r}.")
    return packings


def load_tokenizer(source):
    """The `GemmaTokenizer` of a preset, path or handle; None if it has none."""
    with open_source(source) as checkpoint:
        return checkpoint.tokenizer()


def load_preprocessor(checkpoint, **settings):
    """The checkpoint's `GemmaCausalLMPreprocessor`; None if it has no tokenizer."""
    tokenizer = checkpoint.tokenizer()
    if tokenizer is None:
        return None
    settings = {**checkpoint.preprocessor_config(), **settings}
    return GemmaCausalLMPreprocessor(tokenizer, **settings)


def _variable_dtype(dtype):
    policy = keras.dtype_policies.get(dtype)
    return keras.backend.standardize_dtype(policy.variable_dtype)


def load_backbone(checkpoint, dtype="auto", packings=None, progress=None):
    """A `GemmaBackbone` whose variables are made of the checkpoint's tensors.

    No weight is first filled with something else, so that memory peaks at the model
    plus one tensor. Only where weights are laid out over devices they begin as zeros,
    and each device then reads its part of one tensor after the other.

    Args:
        checkpoint: an open `Checkpoint`.
        dtype: a Keras dtype or policy; `"auto"` is the dtype of the checkpoint.
        packings: path of each layer that is kept in few bits to its `Packing`.
        progress: called as `progress(done_bytes, total_bytes)` after each tensor.

    Raises:
        CheckpointError: a tensor cannot be read, or holds NaN or infinity.
    """
    config = checkpoint.config
    policy = keras.dtype_policies.get(checkpoint.dtype if dtype == "auto" else dtype)
    width = 4 if _variable_dtype(policy) == "float32" else 2
    total = width * config.num_parameters
    done = 0

    def tell(shape):
        nonlocal done
        done += width * math.prod(shape)
        if progress is not None:
            progress(done, total)

    def check(path, tensor, array, dtype):
        if not backend.all_finite(tensor):
            raise _not_finite(checkpoint, path, _after_cast(array, dtype))
        tell(tensor.shape)

    def init(path):
        def read(shape, dtype=None):
            array = _array(checkpoint, path, shape)
            tensor = backend.tensor_from_array(array, dtype)
            check(path, tensor, array, dtype)
            return tensor

        def read_packed(shape):
            arrays = _packed_arrays(checkpoint, path, shape, packing)
            tell(shape)
            return arrays

        layer, _, name = path.rpartition("/")
        packing = (packings or {}).get(layer)
        if packing is None or name not in ("kernel", "embeddings"):
            return "zeros" if divided else read
        return PackedStart(packing, read_packed)

    divided = distribution.is_set()
    backbone = GemmaBackbone(config, dtype=policy, init=init)
    paths = config.weight_shapes()
    for variable in backbone.variables if divided else ():
        if variable.path in paths:
            array = _array(checkpoint, variable.path, variable.shape)
            distribution.fill(variable, array)
            check(variable.path, variable.value, array, variable.dtype)
    return backbone


def _array(checkpoint, path, shape):
    array = checkpoint.tensor(path)
    if tuple(array.shape) != tuple(shape):
        raise CheckpointError(
            f"{checkpoint.sources(path)}: has shape {list(array.shape)}, but the model "
            f"asks for {list(shape)}."
        )
    return array


def _packed_arrays(checkpoint, path, shape, packing):
    """Codes and scales of a matrix [rows, columns]: as stored, or rounded now."""
    if checkpoint.packings:
        return checkpoint.packed(path)
    kernel = path.endswith("kernel")
    array = _array(checkpoint, path, shape[::-1] if kernel else shape)
    arrays = pack(array.T if kernel else array, packing)
    # A NaN or an infinity in a group is one in its scale.
    if not np.isfinite(arrays["scales"].astype("float32")).all():
        raise _not_finite(checkpoint, path, "")
    return arrays


def _not_finite(checkpoint, path, when):
    return CheckpointError(
        f"{checkpoint.sources(path)}: holds NaN or infinite numbers{when}. The file is "
        "damaged, or was saved from a training run that had diverged."
    )


def _after_cast(array, dtype):
    stored = str(array.dtype)
    return "" if stored == dtype else f" once {stored} is cast to {dtype}"


def weight_reader(backbone):
    """A function from the path of a weight to its numpy array.

    The updates of the adapters in use are merged in; a warning names those left out.

    Raises:
        ValueError: one of them updates the embedding. No checkpoint can hold that:
            the output head is the same table, and gets no update.
    """
    adapters = backbone.adapters
    if backbone.token_embedding.active_factors():
        raise ValueError(
            f"The adapter {', '.join(adapters.active)} updates the embedding, which "
            "cannot be merged: the output head is the same table. Save the adapter "
            "with save_adapter, and the model within `with lm.disable_adapter():`."
        )
    left_out = [name for name in adapters.configs if name not in adapters.active]
    if left_out:
        warnings.warn(
            f"Adapters that are not in use are left out: {', '.join(left_out)}.",
            stacklevel=4,
        )
    layers = adapted_layers(backbone)
    variables = {variable.path: variable for variable in backbone.variables}

    def read(path):
        layer = layers.get(path.rsplit("/", 1)[0])
        value = variables[path] if layer is None else layer.merged_weight()
        return backend.to_numpy(value)

    return read


def codes_reader(backbone):
    """A function from the path of a quantised weight to its arrays, by their names."""
    layers = adapted_layers(backbone)

    def read(path):
        packed = layers[path.rpartition("/")[0]].packed
        return {name: backend.to_numpy(v) for name, v in packed.variables.items()}

    return read
