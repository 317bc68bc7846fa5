"""Writes what NVIDIA's programs take: a directory to import, or a `.nemo` archive.

The directory is Hugging Face's, with scripts that import it into NeMo 2 and into
Megatron-Bridge and start a fine-tuning there. The archive is that of NeMo 1, as the
reader beside this module knows it.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import tarfile
import time

import numpy as np
import yaml

from gemma_keras.checkpoints import (
    hugging_face_writer,
    megatron_layout,
    nemo_config,
    nemo_scripts,
    provenance,
)
from gemma_keras.checkpoints.mapped_file import FLOAT_DTYPES
from gemma_keras.checkpoints.nemo import CONFIG, OURS, WEIGHTS
from gemma_keras.checkpoints.torch_file import torch_library
from gemma_keras.checkpoints.torch_file_writer import Tensor, write_archive

FORMAT = "NVIDIA NeMo"
DTYPES = tuple(FLOAT_DTYPES)
SUFFIX, MAGIC = ".nemo", b"./"
USE = nemo_scripts.USE
_USE_ARCHIVE = """\
With NeMo 1, whose last version is in NVIDIA's container `nvcr.io/nvidia/nemo:24.07`:

```bash
python examples/nlp/language_modeling/tuning/megatron_gpt_finetuning.py \\
    model.restore_from_path=PATH model.peft.peft_scheme=lora \\
    model.data.train_ds.file_names=[train.jsonl] \\
    model.data.validation_ds.file_names=[validation.jsonl]
```

Later programs import a directory: `gemma-keras convert PATH DEST --to nemo` makes one.
"""
_PRECISION = {"float32": 32, "float16": 16, "bfloat16": "bf16"}
_BLOCK = 512


def check(contents):
    """Raises `CheckpointError` for a Gemma that Hugging Face has no model type for."""
    hugging_face_writer.check(contents)


def check_file(contents):
    """Raises `CheckpointError` for a Gemma that NeMo 1 has not, or without torch."""
    nemo_config.config_fields(contents.config, _pieces(contents))
    torch_library("Writing .nemo archives")


def stored_bytes(contents, dtype):
    """Bytes of the weights, and some for the tokenizer."""
    return hugging_face_writer.stored_bytes(contents, dtype)


def write(path, contents, settings):
    """Writes the archive `path`, or files to the directory `path`; see `exporting`."""
    if path.is_dir():
        told = hugging_face_writer.write(path, contents, settings)
        return told + nemo_scripts.write(path, contents)
    return _write_archive(path, contents, settings)


def _pieces(contents):
    return contents.tokenizer and contents.tokenizer.vocab_size


def _write_archive(path, contents, settings):
    told = []
    if contents.config.family == "gemma":
        told.append("One was added to the weights of norms, as NeMo 1 expects.")
    facts = settings.facts | {"modified": [*settings.facts["modified"], *told]}
    card = provenance.model_card(settings.title, contents, facts, _USE_ARCHIVE)
    proto = contents.tokenizer and contents.tokenizer.proto
    name = proto and f"{_md5(proto)}_tokenizer.model"
    with path.open("wb") as file:
        _add(file, CONFIG, _yaml(contents, settings, name))
        _add(file, provenance.CARD, card.encode())
        _add(file, provenance.PROVENANCE, json.dumps(facts, indent=2).encode())
        if facts["licence"] == provenance.GEMMA:
            _add(file, provenance.NOTICE, provenance.NOTICE_TEXT.encode())
        if proto:
            _add(file, name, proto)
        with _growing(file, WEIGHTS):
            _write_weights(file, contents, settings.dtype)
        # Two empty blocks end a tar.
        file.write(bytes(2 * _BLOCK))
    return told


def _md5(data):
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def _yaml(contents, settings, tokenizer):
    """model_config.yaml: NeMo's keys, then our own."""
    raw = {"target": nemo_config.TARGET, "nemo_version": "1.23.0"}
    raw |= nemo_config.config_fields(contents.config, _pieces(contents))
    raw |= {
        "precision": _PRECISION[settings.dtype],
        "micro_batch_size": 1,
        "global_batch_size": 8,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "pre_process": True,
        "post_process": True,
        "transformer_block_type": "pre_ln",
        "attention_type": "multihead",
        "init_method_std": 0.02,
        "use_scaled_init_method": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "ffn_dropout": 0.0,
        "apply_query_key_layer_scaling": False,
        "normalize_attention_scores": True,
        "persist_layer_norm": True,
        "do_layer_norm_weight_decay": False,
        "bias_activation_fusion": False,
        "bias_dropout_add_fusion": False,
        "masked_softmax_fusion": True,
        "megatron_amp_O2": False,
        "transformer_engine": True,
        "seed": 1234,
        "tokenizer": {
            "library": "sentencepiece",
            "type": None,
            "model": tokenizer and f"nemo:{tokenizer}",
            "vocab_file": None,
            "merge_file": None,
            "delimiter": None,
            "sentencepiece_legacy": False,
        },
    }
    raw[OURS] = dataclasses.asdict(contents.config)
    return yaml.safe_dump(raw, sort_keys=False).encode()


def _write_weights(file, contents, dtype):
    """Writes the file of torch.save; its tensors are Megatron's."""
    config = contents.config
    paths = {}
    for path in config.weight_shapes():
        paths.setdefault(megatron_layout.weight_name(path), []).append(path)
    # Norms plus one: in float64, no bit of a weight is lost.
    norms = "float64" if config.family == "gemma" else dtype
    state, sources = {}, {}
    for name, shape in megatron_layout.stored_shapes(config).items():
        tensor = Tensor(norms if len(shape) == 1 else dtype, shape)
        state[f"model.{name}"] = tensor
        sources[id(tensor)] = paths[name]

    def blocks(tensor):
        return _blocks(contents, sources[id(tensor)], tensor.dtype)

    write_archive(file, state.copy, list(state.values()), blocks)


def _blocks(contents, paths, dtype):
    """The numbers of one tensor of Megatron, as arrays that follow one another."""
    if dtype == "float64":
        yield contents.array(paths[0], None).astype(np.float64) + 1
        return
    if megatron_layout.heads(paths[0], contents.config) is None:
        for path in paths:
            array = contents.array(path, dtype)
            yield array.T if path.endswith("kernel") else array
        return
    yield _interleaved(contents, paths, dtype)


def _interleaved(contents, paths, dtype):
    """Queries, keys and values, group by group."""
    config = contents.config
    shape = megatron_layout.fused_shape(config)
    fused = np.empty(shape, FLOAT_DTYPES[dtype])
    for path in paths:
        heads = megatron_layout.heads(path, config)
        turned = contents.array(path, dtype).T
        parted = turned.reshape(shape[0], heads.last - heads.first, *shape[2:])
        fused[:, heads.first : heads.last] = parted
    return fused


def _header(name, size):
    """A member's first block. Sizes beyond 8 GB have the same number of bytes."""
    info = tarfile.TarInfo(f"./{name}")
    info.size, info.mtime, info.mode = size, int(time.time()), 0o644
    return info.tobuf(tarfile.GNU_FORMAT)


def _add(file, name, data):
    file.write(_header(name, len(data)) + data + bytes(-len(data) % _BLOCK))


@contextlib.contextmanager
def _growing(file, name):
    """A member whose size is known when it has been written to `file`."""
    place = file.tell()
    file.write(_header(name, 0))
    start = file.tell()
    yield
    end = file.seek(0, io.SEEK_END)
    file.write(bytes((start - end) % _BLOCK))
    file.seek(place)
    file.write(_header(name, end - start))
    file.seek(0, io.SEEK_END)
