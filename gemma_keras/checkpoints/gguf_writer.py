"""Writes a GGUF file that llama.cpp and its kin load: floats, or blocks of few bits.

Names and keys are those of the reader beside this module. Norms are stored plus one, in
float32, as llama.cpp computes with them. Blocks are made by the `gguf` package.
"""

import concurrent.futures
import json
import math
import os

import numpy as np

from gemma_keras import vocabulary
from gemma_keras.buffers import ordered
from gemma_keras.chat import JINJA_TEMPLATE
from gemma_keras.checkpoints.checkpoint import CheckpointError
from gemma_keras.checkpoints.gguf import PROVENANCE_KEY, weight_name
from gemma_keras.checkpoints.gguf_config import config_fields
from gemma_keras.checkpoints.hugging_face import stored_shape
from gemma_keras.checkpoints.pieces import write_array
from gemma_keras.checkpoints.provenance import GEMMA, NOTICE_TEXT
from gemma_keras.tokenizer import END_OF_TURN, START_OF_TURN

FORMAT = "GGUF"
_FLOATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_BLOCKS = {name.lower(): name for name in ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")}
DTYPES = (*_FLOATS, *_BLOCKS)
SUFFIX, MAGIC = ".gguf", b"GGUF"
FILE = "model.gguf"
USE = """\
```bash
llama-cli -m PATH/model.gguf
```
"""
# What llama.cpp's converter gives pieces that are not to be merged from others.
_LAST = -1000.0
# Numbers that are turned to blocks at once.
_CHUNK = 2**22


def check(contents):
    """Raises `CheckpointError` for a Gemma that llama.cpp does not compute."""
    config_fields(contents.config)
    _gguf()


def stored_bytes(contents, dtype):
    """Bytes of the weights."""
    return sum(size for _, _, size in _plan(contents.config, dtype).values())


def write(path, contents, settings):
    """Writes the file `path`, or `model.gguf` in the directory; see `exporting`."""
    path = path / FILE if path.is_dir() else path
    gguf = _gguf()
    config, tokenizer = contents.config, contents.tokenizer
    plan = _plan(config, settings.dtype)
    told = _told(plan, settings.dtype)
    if config.vocab_size > (tokenizer.vocab_size if tokenizer else math.inf):
        told.append("Pieces without a name were added for the last embeddings.")
    writer = gguf.GGUFWriter(path, config.family)
    try:
        for key, value in config_fields(config).items():
            if key != "general.architecture":
                _add(writer, key, value)
        _add_facts(gguf, writer, settings, told)
        if tokenizer is not None:
            _add_tokenizer(writer, tokenizer, config.vocab_size)
        for name, (kind, shape, size) in plan.items():
            kind = gguf.GGMLQuantizationType[kind]
            writer.add_tensor_info(name, shape, np.dtype("float32"), size, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for weight in config.weight_shapes():
            kind = plan[weight_name(weight)][0]
            array = _stored(gguf, contents, weight, kind)
            writer.write_tensor_data(array.view(_InPieces))
    finally:
        writer.close()
    return told


class _InPieces(np.ndarray):
    """An array whose bytes go to a file a piece at a time."""

    def tofile(self, file):
        write_array(file, self.view(np.ndarray))


def _gguf():
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(
            "Writing GGUF needs the gguf package: pip install 'gemma_keras[gguf]'"
        ) from error
    return gguf


def _plan(config, dtype):
    """Tensor name to its type, shape and bytes, in the order of the file."""
    gguf = _gguf()
    plan = {}
    for path, shape in config.weight_shapes().items():
        shape = stored_shape(path, shape)
        kind = _kind(path, shape, dtype)
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        plan[weight_name(path)] = kind, shape, math.prod(shape) // block * size
    return plan


def _kind(path, shape, dtype):
    """How one weight is stored."""
    if len(shape) == 1:
        return "F32"
    if dtype in _FLOATS:
        return _FLOATS[dtype]
    # Rows are cut into blocks of 32; as llama.cpp's converter does if they cannot be.
    if shape[-1] % 32:
        return "F16"
    # The embedding is the head too, where few bits cost the most.
    return "Q8_0" if path == "token_embedding/embeddings" else _BLOCKS[dtype]


def _stored(gguf, contents, path, kind):
    """The array that is written: norms plus one, kernels turned, blocks as bytes."""
    if path.endswith("scale"):
        return contents.array(path, "float32") + np.float32(1)
    names = {name: dtype for dtype, name in _FLOATS.items()}
    array = contents.array(path, names.get(kind))
    array = array.T if path.endswith("kernel") else array
    if kind in names:
        return ordered(array)
    return _blocks(gguf, array, gguf.GGMLQuantizationType[kind])


def _blocks(gguf, array, kind):
    """The rows of `array` as blocks, made of a few rows at a time."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows, columns = array.shape
    result = np.empty((rows, columns // block * size), np.uint8)
    step = max(1, _CHUNK // columns)

    def fill(first):
        part = np.ascontiguousarray(array[first : first + step], np.float32)
        result[first : first + step] = gguf.quants.quantize(part, kind)

    with concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        list(pool.map(fill, range(0, rows, step)))
    return result


def _told(plan, dtype):
    """Sentences about what is not stored in `dtype`, or not as it was."""
    told = ["One was added to the weights of norms, as llama.cpp expects."]
    kinds = {kind for kind, shape, _ in plan.values() if len(shape) > 1}
    if dtype in _BLOCKS and "F16" in kinds:
        told.append(
            "Matrices whose rows do not divide into blocks of 32 are in float16."
        )
    if dtype in _BLOCKS and plan["token_embd.weight"][0] == "Q8_0" != _BLOCKS[dtype]:
        told.append("The embedding, which is the head too, is in q8_0.")
    return told


def _add(writer, key, value):
    if isinstance(value, np.ndarray):
        writer.add_array(key, value.tolist())
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)


def _add_facts(gguf, writer, settings, told):
    facts = settings.facts | {"modified": [*settings.facts["modified"], *told]}
    writer.add_type("model")
    writer.add_name(settings.title.removesuffix(SUFFIX))
    writer.add_license(facts["licence"])
    if facts["licence"] == GEMMA:
        writer.add_license_link("https://ai.google.dev/gemma/terms")
        writer.add_string("gemma_keras.notice", NOTICE_TEXT.strip())
    writer.add_string(PROVENANCE_KEY, json.dumps(facts))
    kind = _FLOATS.get(settings.dtype) or _BLOCKS[settings.dtype]
    name = "ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"
    writer.add_file_type(gguf.LlamaFileType[name])
    if settings.dtype in _BLOCKS:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_tokenizer(writer, tokenizer, rows):
    pieces, scores, types = tokenizer.pieces()
    for index, (piece, kind) in enumerate(zip(pieces, types, strict=True)):
        if kind == vocabulary.USER_DEFINED:
            # llama.cpp looks for them in the text, where spaces are spaces.
            pieces[index] = piece.replace(vocabulary.SPACE, " ")
            scores[index] = _LAST
        if piece in (START_OF_TURN, END_OF_TURN):
            types[index] = vocabulary.CONTROL
    for index in range(len(pieces), rows):
        pieces.append(f"[PAD{index}]")
        scores.append(_LAST)
        types.append(vocabulary.UNUSED)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(pieces)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_unk_token_id(tokenizer.unk_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    if tokenizer.end_of_turn_id is not None:
        writer.add_eot_token_id(tokenizer.end_of_turn_id)
        writer.add_chat_template(JINJA_TEMPLATE)
