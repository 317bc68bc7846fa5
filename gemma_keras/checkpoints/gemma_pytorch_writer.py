"""Writes what `load_weights` of gemma_pytorch reads: a .ckpt file, or a directory.

Names and the order of axes are those of the reader beside this module. The config and,
in a single file, the tokenizer go along where gemma_pytorch does not look.
"""

import dataclasses
import json

import numpy as np

from gemma_keras.checkpoints import torch_file
from gemma_keras.checkpoints.checkpoint import CheckpointError, some
from gemma_keras.checkpoints.contents import shards
from gemma_keras.checkpoints.gemma_pytorch import (
    EMBEDDINGS,
    INDEX,
    OUR_TOKENIZER,
    OURS,
    parts,
    scaler_name,
    stored_shapes,
)
from gemma_keras.checkpoints.mapped_file import FLOAT_DTYPES
from gemma_keras.checkpoints.provenance import GEMMA, NOTICE_TEXT
from gemma_keras.checkpoints.torch_file_writer import Tensor, nbytes, write_archive

FORMAT = "gemma_pytorch"
INT8 = "int8"
DTYPES = (*FLOAT_DTYPES, INT8)
SUFFIX, MAGIC = ".ckpt", torch_file.MAGIC
USE = """\
With [gemma_pytorch](https://github.com/google/gemma_pytorch), and the variant that this
model is (`2b`, `7b`, `2b-v2`, `9b`, `27b`, `1b`):

```python
import torch
from gemma.config import get_model_config
from gemma.model import GemmaForCausalLM

config = get_model_config("2b")
config.tokenizer = "PATH/tokenizer.model"
config.quant = False  # True if the weights are in int8
torch.set_default_dtype(config.get_dtype())
model = GemmaForCausalLM(config)
model.load_weights("PATH")
```
"""
_THETA = 10_000.0
# Numbers that are rounded at once.
_CHUNK = 2**20


def check(contents):
    """Raises `CheckpointError` for a Gemma that gemma_pytorch does not compute."""
    if wrong := _shortcomings(contents.config):
        raise CheckpointError(
            f"gemma_pytorch computes no {contents.config.family} that has "
            f"{some(wrong)}."
        )
    torch_file.torch_library("Writing gemma_pytorch's files")


def stored_bytes(contents, dtype):
    """Bytes of the weights, and of the factors that belong to int8."""
    return sum(
        nbytes(tensor.dtype, tensor.shape)
        for _, tensor in _plan(contents, dtype).values()
    )


def write(path, contents, settings):
    """Writes the file `path`, or files and an index to the directory `path`."""
    source = _Source(contents, _plan(contents, settings.dtype))
    if path.is_dir():
        _write_directory(path, contents, settings, source)
    else:
        _write_file(path, contents, settings, source)
    return _told(contents, source)


def _told(contents, source):
    told = source.errors.sentences()
    if _embedding(contents.config) != EMBEDDINGS[0]:
        told.append(
            "The embedding is named as in Gemma3ForMultimodalLM, the class that scales "
            "rotary positions; there is no vision tower."
        )
    return told


def _shortcomings(config):
    """What gemma_pytorch takes for granted, and this config says otherwise."""
    wrong = []
    if config.family != "gemma3":
        local = config.local_rope_theta or config.rope_theta
        if {config.rope_theta, local} != {_THETA}:
            wrong.append(f"rope_theta={config.rope_theta:g}, {local:g}")
        if config.rope_scaling_factor != 1.0:
            wrong.append(f"rope_scaling_factor={config.rope_scaling_factor:g}")
    if config.family == "gemma" and "L" in config.layer_kinds:
        wrong.append(f"layer_pattern={config.layer_kinds!r}")
    if config.family == "gemma3" and not config.use_post_norms:
        wrong.append("use_post_norms=False")
    return wrong


def _embedding(config):
    """Its name; only the class with a vision tower scales rotary positions."""
    return EMBEDDINGS[config.rope_scaling_factor != 1.0]


def _plan(contents, dtype):
    """Tensor name to (paths of the weights in it, `Tensor`), factors after theirs."""
    embedding = _embedding(contents.config)
    paths = {}
    for path, part in parts(contents.config, embedding).items():
        paths.setdefault(part.name, []).append(path)
    plan = {}
    for name, shape in stored_shapes(contents.config, embedding).items():
        kept = dtype if dtype != INT8 else (contents.dtype, INT8)[len(shape) - 1]
        plan[name] = paths[name], Tensor(kept, shape)
        if kept == INT8:
            plan[scaler_name(name)] = paths[name], Tensor("float32", shape[:1])
    return plan


def _write_file(path, contents, settings, source):
    state, beside = source.tensors(), {}
    tensors = list(state.values())
    if contents.tokenizer is not None:
        beside[OUR_TOKENIZER] = source.add(contents.tokenizer.proto)
        tensors.append(beside[OUR_TOKENIZER])

    def content():
        facts = settings.facts | {"config": dataclasses.asdict(contents.config)}
        facts["modified"] = [*facts["modified"], *_told(contents, source)]
        if facts["licence"] == GEMMA:
            facts["notice"] = NOTICE_TEXT.strip()
        return {"model_state_dict": state, OURS: json.dumps(facts), **beside}

    with path.open("wb") as file:
        write_archive(file, content, tensors, source.blocks)


def _write_directory(folder, contents, settings, source):
    tensors = source.tensors()
    sizes = {name: nbytes(each.dtype, each.shape) for name, each in tensors.items()}
    runs = shards(sizes, settings.max_shard_size)
    weight_map = {}
    for number, run in enumerate(runs, start=1):
        file = f"pytorch_model-{number:05}-of-{len(runs):05}.bin"
        state = {name: tensors[name] for name in run}
        with (folder / file).open("wb") as opened:
            write_archive(opened, state.copy, list(state.values()), source.blocks)
        weight_map |= dict.fromkeys(run, file)
    ours = {"config": dataclasses.asdict(contents.config)}
    metadata = {"total_size": sum(sizes.values()), OURS: ours}
    index = {"metadata": metadata, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
    if contents.tokenizer is not None:
        (folder / "tokenizer.model").write_bytes(contents.tokenizer.proto)


class _Source:
    """The tensors to write, and their numbers, a weight at a time.

    Args:
        contents: The `Contents`.
        plan: What `_plan` gives.
    """

    def __init__(self, contents, plan):
        self.errors = _Errors()
        self._contents = contents
        self._plan = plan
        self._paths = {id(tensor): paths for paths, tensor in plan.values()}
        self._bytes = {}
        self._factors = {}

    def tensors(self):
        """Name to `Tensor`."""
        return {name: tensor for name, (_, tensor) in self._plan.items()}

    def add(self, data):
        """A `Tensor` of bytes, beside those of the plan."""
        tensor = Tensor("uint8", (len(data),))
        self._bytes[id(tensor)] = np.frombuffer(data, np.uint8)
        return tensor

    def blocks(self, tensor):
        """The arrays of a `Tensor`, which follow one another in it."""
        if id(tensor) in self._bytes:
            yield self._bytes[id(tensor)]
            return
        for path in self._paths[id(tensor)]:
            yield self._block(path, tensor)

    def _block(self, path, tensor):
        if len(tensor.shape) == 1 and path in self._factors:
            return self._factors.pop(path)
        kept = None if tensor.dtype == INT8 else tensor.dtype
        array = self._contents.array(path, kept)
        array = array.T if path.endswith("kernel") else array
        if tensor.dtype != INT8:
            return array
        rounded, self._factors[path] = _rounded(array, self.errors)
        return rounded


def _rounded(array, errors):
    """A matrix as int8, and the float32 factor of each of its rows.

    A factor makes the largest number of its row 127. It is rounded to bfloat16, so that
    it is the same in whatever type gemma_pytorch computes, and its products with int8
    are exact in float32: to quantise them again changes nothing. (Rounding moves 127 by
    less than a half: 127 * 2 ** -8.)
    """
    result = np.empty(array.shape, np.int8)
    factors = np.empty(len(array), np.float32)
    step = max(1, _CHUNK // array.shape[1])
    for first in range(0, len(array), step):
        rows = slice(first, first + step)
        part = array[rows].astype(np.float32)
        largest = np.abs(part).max(axis=1)
        factor = np.where(largest > 0, largest, 127) / np.float32(127)
        factor = np.maximum(factor, np.finfo(np.float32).tiny)
        factor = factor.astype(FLOAT_DTYPES["bfloat16"]).astype(np.float32)
        result[rows] = np.rint(part / factor[:, None])
        factors[rows] = factor
        errors.add(part, result[rows] * factor[:, None], largest)
    return result, factors


class _Errors:
    """What rounding did to the matrices, all in all."""

    def __init__(self):
        self._squares = self._wholes = self._worst = 0.0

    def add(self, before, after, largest):
        """Takes some rows, as they were and are, and the largest number of each."""
        error = after - before
        self._squares += float(np.vdot(error, error))
        self._wholes += float(np.vdot(before, before))
        share = np.abs(error).max(axis=1) / np.where(largest > 0, largest, 1)
        self._worst = max(self._worst, float(share.max()))

    def sentences(self):
        """For provenance; none if nothing was rounded."""
        if not self._wholes:
            return []
        mean = (self._squares / self._wholes) ** 0.5
        return [
            "Matrices were rounded to int8 with a factor for each row: on average "
            f"(root mean square) by {mean:.2%} of the weights, at most by "
            f"{self._worst:.2%} of the largest weight in the row."
        ]
