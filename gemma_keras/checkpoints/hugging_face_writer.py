"""Writes a directory that Hugging Face's transformers, 4 and 5, and its kin load.

The tensors' names and their order of axes are those of the reader beside this module.
"""

import json
import math

from gemma_keras.checkpoints import hugging_face_tokenizer, safetensors_file
from gemma_keras.checkpoints.contents import shards
from gemma_keras.checkpoints.hugging_face import INDEX, stored_shape, weight_name
from gemma_keras.checkpoints.hugging_face_config import config_to_json
from gemma_keras.checkpoints.mapped_file import FLOAT_DTYPES

FORMAT = "Hugging Face"
DTYPES = tuple(FLOAT_DTYPES)
SUFFIX = None
USE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
model = AutoModelForCausalLM.from_pretrained("PATH", torch_dtype="auto")
```

The text of a chat has its `<bos>` from the chat template: tokenize it with
`add_special_tokens=False`, or let `apply_chat_template` do so.
"""


def check(contents):
    """Raises `CheckpointError` for a Gemma that transformers has no model type for."""
    config_to_json(contents.config, contents.dtype, contents.tokenizer)


def stored_bytes(contents, dtype):
    """Bytes of the weights, and some for the tokenizer."""
    return contents.stored_bytes(dtype) + (2**26 if contents.tokenizer else 0)


def write(folder, contents, settings):
    """Writes the files to the empty directory `folder`; see `exporting`."""
    config, tokenizer = contents.config, contents.tokenizer
    _write_weights(folder, contents, settings)
    raw = config_to_json(config, settings.dtype, tokenizer)
    _write_json(folder / "config.json", raw)
    # NeMo insists on this file; the ids that end an answer are told nowhere else.
    stop = list(tokenizer.stop_token_ids) if tokenizer else raw["eos_token_id"]
    generation = {"_from_model_config": True, "bos_token_id": raw["bos_token_id"]}
    generation |= {"eos_token_id": stop, "pad_token_id": raw["pad_token_id"]}
    _write_json(folder / "generation_config.json", generation)
    if tokenizer is not None:
        hugging_face_tokenizer.write(folder, tokenizer)
    return []


def _write_weights(folder, contents, settings):
    config, dtype = contents.config, settings.dtype
    names, shapes = {}, {}
    for path, shape in config.weight_shapes().items():
        name = "model." + weight_name(path, config.use_post_norms)
        names[name], shapes[name] = path, stored_shape(path, shape)
    item_bytes = FLOAT_DTYPES[dtype].itemsize
    sizes = {name: math.prod(shape) * item_bytes for name, shape in shapes.items()}

    def tensor(name):
        array = contents.array(names[name], dtype)
        return array.T if names[name].endswith("kernel") else array

    runs = shards(sizes, settings.max_shard_size)
    weight_map = {}
    for number, run in enumerate(runs, start=1):
        file = f"model-{number:05}-of-{len(runs):05}.safetensors"
        if len(runs) == 1:
            file = "model.safetensors"
        part = {name: shapes[name] for name in run}
        safetensors_file.write(folder / file, part, dtype, tensor)
        weight_map |= dict.fromkeys(run, file)
    if len(runs) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}}
        _write_json(folder / INDEX, index | {"weight_map": weight_map})


def _write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")
