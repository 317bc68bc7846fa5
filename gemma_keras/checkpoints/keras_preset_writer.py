"""Writes a directory that `from_preset` of KerasHub 0.32 loads, and of this package.

Tensor by tensor, beside the place where it is to be, and renamed when complete.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import math
import re
import warnings
from pathlib import Path

from gemma_keras.buffers import ordered
from gemma_keras.checkpoints import h5_file, keras_layout, quantized_preset, staging
from gemma_keras.checkpoints.checkpoint import CheckpointError, some
from gemma_keras.checkpoints.contents import Contents, shards
from gemma_keras.checkpoints.keras_layout import (
    CONFIG,
    METADATA,
    OURS,
    PREPROCESSOR,
    QUANTIZED,
    SHARDS,
    TASK,
    TOKENIZER,
    VOCABULARY,
    WEIGHTS,
)
from gemma_keras.checkpoints.mapped_file import FLOAT_DTYPES
from gemma_keras.checkpoints.provenance import (
    CARD,
    NOTICE,
    PROVENANCE,
    Provenance,
    hashing,
    model_card,
    write_papers,
)

FORMAT = "KerasHub preset"
DTYPES = tuple(FLOAT_DTYPES)
SUFFIX = None
USE = """\
```python
import gemma_keras  # or keras_hub

lm = gemma_keras.models.GemmaCausalLM.from_preset("PATH")
```
"""
KERAS_HUB_VERSION = "0.32.0"
_NAMES = {CONFIG, METADATA, WEIGHTS, SHARDS, TOKENIZER, PREPROCESSOR, TASK, "assets"}
_NAMES |= {QUANTIZED, PROVENANCE, CARD, NOTICE}
_SHARD = re.compile(r"model_\d{5}\.weights\.h5")


def save(
    directory,
    config,
    dtype,
    tensors,
    *,
    tokenizer=None,
    preprocessor_config=None,
    packings=None,
    codes=None,
    provenance=None,
    max_shard_size=10.0,
    overwrite=False,
    strict=True,
):
    """Writes a KerasHub preset.

    KerasHub reads it as its Gemma 1, 2 or 3; the exact `GemmaConfig` goes along where
    KerasHub does not look. What KerasHub would compute otherwise is said in a warning.

    Args:
        directory: Where to write. Must not exist, or be empty.
        config: The `GemmaConfig`.
        dtype: `"bfloat16"`, `"float16"` or `"float32"`: how weights are stored.
        tensors: A function from a path of `config.weight_shapes()` to a NumPy array of
            that shape. Called once for each path, in order; one array is held.
        tokenizer: A `GemmaTokenizer`; without one, only the backbone is written.
        preprocessor_config: A dict with `sequence_length`, `add_start_token` and
            `add_end_token`, each with KerasHub's default.
        packings: Path of each layer that is kept in few bits to its `Packing`. Such a
            preset is for this package alone.
        codes: As in `Contents`.
        provenance: The `Provenance`, for the papers that go along; None for no papers.
        max_shard_size: GiB above which the weights are cut into files of that size;
            None for never.
        overwrite: Whether a preset that is there may be replaced. A directory that
            holds anything else is never touched.
        strict: Whether to refuse a model that KerasHub's configs cannot express.
            Otherwise it is written with a warning, for this package alone.

    Returns:
        The path of the directory.

    Raises:
        CheckpointError: the place is taken, the disk too small, or a tensor wrong.
    """
    if dtype not in FLOAT_DTYPES:
        raise CheckpointError(
            f"dtype must be one of {', '.join(FLOAT_DTYPES)}, got {dtype!r}."
        )
    directory = Path(directory).expanduser().absolute()
    contents = Contents(
        config=config,
        tensors=tensors,
        dtype=dtype,
        tokenizer=tokenizer,
        preprocessor_config=preprocessor_config or {},
        packings=packings or {},
        codes=codes,
        provenance=provenance or Provenance(),
    )
    if not packings:
        _check_config(f"{directory}: ", config, strict)
    _check_place(directory, overwrite)
    staging.check_space(directory, stored_bytes(contents, dtype))
    limit = None if max_shard_size is None else max_shard_size * 2**30
    files = contents.provenance.files
    with hashing(files) as hashes, staging.replacing(directory) as partial:
        partial.mkdir()
        _write_weights(partial, contents, dtype, limit)
        _write_configs(partial, contents, dtype)
        if provenance is not None:
            facts = provenance.describe(FORMAT, dtype, hashes())
            card = model_card(directory.name, contents, facts, USE)
            write_papers(partial, facts, card)
    return directory


def check(contents):
    """Says in a warning what KerasHub will not compute as this package does."""
    if not contents.packings:
        _check_config("", contents.config, strict=False)


def stored_bytes(contents, dtype):
    """Bytes of the weights."""
    if contents.packings:
        return quantized_preset.stored_bytes(contents, dtype)
    return contents.stored_bytes(dtype)


def write(folder, contents, settings):
    """Writes the preset to the empty directory `folder`; see `exporting`."""
    _write_weights(folder, contents, settings.dtype, settings.max_shard_size)
    _write_configs(folder, contents, settings.dtype)
    return []


def _check_config(where, config, strict):
    errors, remarks = keras_layout.shortcomings(config)
    if errors and strict:
        raise CheckpointError(
            f"{where}KerasHub cannot express this model: {'; '.join(errors)}."
        )
    if errors + remarks:
        warnings.warn(
            f"{where}KerasHub {KERAS_HUB_VERSION} will not compute this model "
            f"exactly: {'; '.join(errors + remarks)}. gemma_keras does.",
            stacklevel=3,
        )


def _check_place(directory, overwrite):
    if not directory.exists():
        return
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: is a file; name a directory.")
    present = {child.name for child in directory.iterdir()}
    foreign = {name for name in present - _NAMES if not _SHARD.fullmatch(name)}
    if foreign:
        raise CheckpointError(
            f"{directory}: holds files that are no preset's ({some(foreign)}) and is "
            "left alone; name another directory."
        )
    if present and not overwrite:
        raise CheckpointError(
            f"{directory}: exists already; pass overwrite=True to replace the preset."
        )


def _write_weights(folder, contents, dtype, limit):
    if contents.packings:
        quantized_preset.write_weights(folder, contents, dtype)
    else:
        _write_floats(folder, contents, dtype, limit)


def _write_floats(folder, contents, dtype, limit):
    config, item_bytes = contents.config, FLOAT_DTYPES[dtype].itemsize
    runs = shards(
        {p: math.prod(s) * item_bytes for p, s in config.weight_shapes().items()}, limit
    )
    weight_map, total = {}, 0
    for number, paths in enumerate(runs):
        name = WEIGHTS if len(runs) == 1 else f"model_{number:05}.weights.h5"
        with h5_file.writing(folder / name) as (file, check):
            for path in paths:
                array = contents.array(path, dtype)
                array = ordered(keras_layout.to_stored(path, array, config))
                group = file.create_group(
                    f"layers/{keras_layout.group(path, config)}/vars"
                )
                dataset = group.create_dataset("0", data=array)
                if dtype == "bfloat16":
                    dataset.attrs["dtype"] = dtype
                check()
                weight_map[group.name] = name
                total += array.nbytes
    if len(runs) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / SHARDS, index)


def _write_configs(folder, contents, dtype):
    config, tokenizer = contents.config, contents.tokenizer
    backbone = _backbone(config, dtype)
    _write_json(folder / CONFIG, backbone)
    metadata = {
        "keras_version": importlib.metadata.version("keras"),
        "keras_hub_version": KERAS_HUB_VERSION,
        "parameter_count": config.num_parameters,
        "date_saved": datetime.datetime.now().strftime("%Y-%m-%d@%H:%M:%S"),
        "tasks": ["CausalLM"],
        OURS: {"config": dataclasses.asdict(config)},
    }
    _write_json(folder / METADATA, metadata)
    if tokenizer is None:
        return
    vocabulary = folder / VOCABULARY
    vocabulary.parent.mkdir(parents=True)
    vocabulary.write_bytes(tokenizer.proto)
    tokenizer_json = _tokenizer(config)
    preprocessor = _preprocessor(config, tokenizer_json, contents.preprocessor_config)
    _write_json(folder / TOKENIZER, tokenizer_json)
    _write_json(folder / PREPROCESSOR, preprocessor)
    task = {
        "backbone": backbone,
        "preprocessor": preprocessor,
        "name": f"{keras_layout.family(config)}_causal_lm",
    }
    _write_json(folder / TASK, _object(config, "causal_lm", "CausalLM", task))


def _backbone(config, dtype):
    fields = {"name": f"{keras_layout.family(config)}_backbone", "trainable": True}
    fields["dtype"] = _policy(dtype)
    fields |= keras_layout.backbone_config(config)
    return _object(config, "backbone", "Backbone", fields)


def _tokenizer(config):
    fields = {
        "name": f"{keras_layout.family(config)}_tokenizer",
        "trainable": True,
        "dtype": _policy("int32"),
        "config_file": TOKENIZER,
        "proto": None,
        "sequence_length": None,
        "add_bos": False,
        "add_eos": False,
    }
    if keras_layout.family(config) == "gemma3":
        fields["has_vision_tokens"] = False
    return _object(config, "tokenizer", "Tokenizer", fields)


def _preprocessor(config, tokenizer, given):
    fields = {
        "name": f"{keras_layout.family(config)}_causal_lm_preprocessor",
        "trainable": True,
        "dtype": _policy("float32"),
        "tokenizer": tokenizer,
        "config_file": PREPROCESSOR,
        "sequence_length": given.get("sequence_length", 1024),
        "add_start_token": given.get("add_start_token", True),
        "add_end_token": given.get("add_end_token", True),
    }
    if keras_layout.family(config) == "gemma3":
        fields |= {"num_vision_tokens_per_image": 256, "max_images_per_prompt": 2}
    return _object(config, "causal_lm_preprocessor", "CausalLMPreprocessor", fields)


def _object(config, module, class_name, fields):
    """An object in Keras' serialized form."""
    family = keras_layout.family(config)
    class_name = f"{family.capitalize()}{class_name}"
    return {
        "module": f"keras_hub.src.models.{family}.{family}_{module}",
        "class_name": class_name,
        "config": fields,
        "registered_name": f"keras_hub>{class_name}",
    }


def _policy(dtype):
    return {
        "module": "keras",
        "class_name": "DTypePolicy",
        "config": {"name": dtype},
        "registered_name": None,
    }


def _write_json(path, value):
    path.write_text(json.dumps(value, indent=4) + "\n", "utf-8")
