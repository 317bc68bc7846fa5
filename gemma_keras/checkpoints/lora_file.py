"""Files of one adapter that end in `.lora.h5`: this package's, and KerasHub's.

KerasHub factorises each head of a query, key or value for itself, with one B for all:
A is [N, D, r], B [r, H]. Side by side, the A of the heads are [D, N r], and N copies of
B along the diagonal are [N r, N H]: the same update, of rank N r.
"""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np

from gemma_keras.checkpoints import keras_layout, staging
from gemma_keras.checkpoints.checkpoint import CheckpointError, parse_json, some
from gemma_keras.checkpoints.h5_file import H5File, writing
from gemma_keras.lora_config import LoraConfig, for_layers, layer_shapes

_CONFIG = "gemma_keras"
_FACTOR = re.compile(r"lora/(\d{1,6})/vars/lora_kernel_([ab])")
# KerasHub numbers the layers that have weights in this order, block by block, after
# the embedding. Where a norm is missing, the rest moves up.
_ORDER = (
    "",
    "ffw_linear",
    "ffw_gating_2",
    "ffw_gating",
    "post_ffw_norm",
    "pre_ffw_norm",
    "attention",
    "attention/attention_output",
    "attention/key_norm",
    "attention/query_norm",
    "attention/value",
    "attention/key",
    "attention/query",
    "post_attention_norm",
    "pre_attention_norm",
)


def write(filepath, lora, weights):
    """Writes an adapter.

    Args:
        filepath: Where to; its name must end in `.lora.h5`.
        lora: The `LoraConfig`.
        weights: Path of each layer to its arrays, `lora_a` [in, r] and so on.
    """
    path = _checked(filepath).expanduser().absolute()
    with staging.replacing(path) as partial, writing(partial) as (file, _):
        file.attrs[_CONFIG] = json.dumps(dataclasses.asdict(lora))
        for layer, arrays in weights.items():
            for name, array in arrays.items():
                file[f"{layer}/{name}"] = array


def read(filepath, config):
    """Reads an adapter for the model of a `GemmaConfig`.

    Returns:
        Its `LoraConfig`, and the path of each layer to its arrays, as in `write`.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is damaged, or made for another model.
    """
    path = _checked(filepath).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file.")
    file = H5File(path)
    try:
        attribute = _attribute(path)
        if attribute is None:
            lora, weights = _read_keras_hub(file, config)
        else:
            lora, weights = _read_own(file, config, attribute)
    finally:
        file.close()
    for layer, arrays in weights.items():
        for name, array in arrays.items():
            if not np.isfinite(array).all():
                raise CheckpointError(f"{path}: {layer}/{name} holds NaN or infinity.")
    return lora, weights


def _checked(filepath):
    path = Path(filepath)
    if not path.name.endswith(".lora.h5"):
        raise ValueError(f"The file's name must end in .lora.h5, got {path.name!r}.")
    return path


def _attribute(path):
    import h5py

    with h5py.File(path, "r") as file:
        value = file.attrs.get(_CONFIG)
    return None if value is None else str(value)


def _array(file, name):
    file.check(name)
    return np.array(file.tensor(name), "float32")


def _read_own(file, config, attribute):
    fields = parse_json(attribute, f"{file.path} (its {_CONFIG})")
    try:
        lora = LoraConfig(**fields)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{file.path}: {error}") from error
    expected = {}
    for path, (rows, columns) in layer_shapes(config).items():
        if lora.adapts(path):
            rank = lora.rank_of(path)
            expected[f"{path}/lora_a"] = (rows, rank)
            expected[f"{path}/lora_b"] = (rank, columns)
            if lora.dora:
                expected[f"{path}/lora_magnitude"] = (columns,)
    wrong = sorted(
        name
        for name in expected.keys() | file.shapes.keys()
        if expected.get(name) != file.shapes.get(name)
    )
    if wrong:
        raise CheckpointError(
            f"{file.path}: does not fit this model, see {some(wrong)}."
        )
    weights = {}
    for name in expected:
        path, key = name.rsplit("/", 1)
        weights.setdefault(path, {})[key] = _array(file, name)
    return lora, weights


def _read_keras_hub(file, config):
    pairs = {}
    for name in file.shapes:
        match = _FACTOR.fullmatch(name)
        if match:
            pairs.setdefault(int(match[1]), {})[match[2]] = name
        elif name != "lora/vars/rank":
            raise CheckpointError(
                f"{file.path}: {name} belongs to no adapter of this package or of "
                "KerasHub."
            )
    if not pairs:
        raise CheckpointError(f"{file.path}: holds no low-rank factors.")
    numbered, weights = _keras_hub_layers(config), {}
    for number, names in sorted(pairs.items()):
        path = numbered.get(number)
        if path is None or set(names) != {"a", "b"}:
            raise CheckpointError(
                f"{file.path}: lora/{number} is no pair of factors of a projection in "
                "KerasHub's numbering of this model."
            )
        a, b = (_array(file, names[factor]) for factor in "ab")
        weights[path] = _as_matrices(file, names["a"], path, (a, b), config)
    ranks = {path: arrays["lora_a"].shape[1] for path, arrays in weights.items()}
    return for_layers(ranks, ranks, config), weights


def _keras_hub_layers(config):
    """KerasHub's number of a layer to the path of a projection."""
    shapes = layer_shapes(config)
    weights = {path.rsplit("/", 1)[0] for path in config.weight_shapes()}
    numbered, count = {}, 1
    for block in range(config.num_layers):
        for role in _ORDER:
            path = f"decoder_block_{block}/{role}"
            if path in shapes:
                numbered[count] = path
            count += path in weights or role in ("", "attention")
    return numbered


def _as_matrices(file, name, path, factors, config):
    """The 2-D factors of an update, as the module's docstring has them."""
    (a, b), shape = factors, layer_shapes(config)[path]
    stored = keras_layout.stored_shape(f"{path}/kernel", shape, config)
    rank = a.shape[-1] if a.ndim else 0
    if (a.shape, b.shape) != ((*stored[:-1], rank), (rank, stored[-1])) or not rank:
        raise CheckpointError(
            f"{file.path}: {name} has the shape {list(a.shape)} and its partner "
            f"{list(b.shape)}, which do not factorise a kernel {list(stored)}, as "
            f"KerasHub has {path} in this model."
        )
    if len(stored) == 3 and not path.endswith("attention_output"):
        a = a.transpose(1, 0, 2)
        b = np.kron(np.eye(stored[0], dtype="float32"), b)
    return {"lora_a": a.reshape(shape[0], -1), "lora_b": b}
