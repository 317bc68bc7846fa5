"""GGUF checkpoints of llama.cpp: architectures gemma, gemma2 and gemma3 (text).

Tensors are stored [out, in] under llama.cpp's names. Norm weights are stored plus
one, and the embedding of some files has padding rows after the vocabulary; both are
undone here.
"""

import re

import numpy as np

from gemma_keras.checkpoints.checkpoint import (
    Checkpoint,
    CheckpointError,
    check_shape,
    dominant_dtype,
    only_file,
    some,
)
from gemma_keras.checkpoints.gguf_config import Fields, read_config
from gemma_keras.checkpoints.gguf_file import GGUFFile
from gemma_keras.checkpoints.mapped_file import decoded_dtype

_BLOCK_NAMES = {
    "pre_attention_norm/scale": "attn_norm",
    "attention/query/kernel": "attn_q",
    "attention/key/kernel": "attn_k",
    "attention/value/kernel": "attn_v",
    "attention/query_norm/scale": "attn_q_norm",
    "attention/key_norm/scale": "attn_k_norm",
    "attention/attention_output/kernel": "attn_output",
    "post_attention_norm/scale": "post_attention_norm",
    "pre_ffw_norm/scale": "ffn_norm",
    "ffw_gating/kernel": "ffn_gate",
    "ffw_gating_2/kernel": "ffn_up",
    "ffw_linear/kernel": "ffn_down",
    "post_ffw_norm/scale": "post_ffw_norm",
}
# Where an export keeps what it would put into provenance.json.
PROVENANCE_KEY = "gemma_keras.provenance"
_EMBEDDING = "token_embd.weight"
_UNUSED = 5


def recognises(path):
    """Whether the directory `path` holds GGUF files."""
    return any(path.glob("*.gguf"))


def open_checkpoint(path, config=None, dtype=None):
    """Opens a GGUF file, or the only one in a directory."""
    if path.is_dir():
        path = only_file(path, ".gguf")
    return GGUFCheckpoint(path, config, dtype)


def weight_name(path):
    """Name of a weight in the file; `path` is a key of `weight_shapes()`."""
    if path == "token_embedding/embeddings":
        return _EMBEDDING
    if path == "final_normalization/scale":
        return "output_norm.weight"
    block, role = path.split("/", 1)
    layer = block.removeprefix("decoder_block_")
    return f"blk.{layer}.{_BLOCK_NAMES[role]}.weight"


class GGUFCheckpoint(Checkpoint):
    """A GGUF file.

    Tensors stored as floats come back as they are stored, quantised ones decoded to
    `dtype`; norms in float32, because the one is taken off.
    """

    format = "GGUF"

    def __init__(self, path, config=None, dtype=None):
        self.path = path
        self._decoded = decoded_dtype(dtype)
        self._file = GGUFFile(path)
        try:
            self._fields = Fields(self._file.fields, path)
            self.config = config or read_config(self._fields, self._vocab_size)
            self._names = self._match()
            self.dtype = dominant_dtype(
                (
                    self._file.float_dtype(name) or self._decoded,
                    int(np.prod(self._file.shapes[name])),
                )
                for name in self._names.values()
            )
        except BaseException:
            self.close()
            raise

    def _vocab_size(self):
        """Rows of the embedding that stand for a piece of the vocabulary."""
        shape = self._file.shapes.get(_EMBEDDING)
        if shape is None or len(shape) != 2:
            raise CheckpointError(f"{self.path}: the tensor {_EMBEDDING} is missing.")
        pieces = self._pieces()
        if not pieces:
            return shape[0]
        if len(pieces) > shape[0]:
            raise CheckpointError(
                f"{self.path}: {_EMBEDDING} has {shape[0]} rows for the "
                f"{len(pieces)} pieces of the vocabulary."
            )
        return len(pieces)

    def _pieces(self):
        """The vocabulary without the padding that converters append to it."""
        pieces = self._file.fields.get("tokenizer.ggml.tokens", [])
        types = self._file.fields.get("tokenizer.ggml.token_type", [])
        if not isinstance(pieces, list):
            raise CheckpointError(
                f"{self.path}: tokenizer.ggml.tokens must be strings."
            )
        if not isinstance(types, np.ndarray):
            return pieces
        count = len(pieces)
        while (
            count
            and count <= len(types)
            and types[count - 1] == _UNUSED
            and re.fullmatch(rb"\[PAD\d+\]", pieces[count - 1])
        ):
            count -= 1
        return pieces[:count]

    def _match(self):
        """Maps every weight path to its tensor, and accounts for the rest."""
        if self.config.num_layers > len(self._file.shapes):
            raise CheckpointError(
                f"{self.path}: {len(self._file.shapes)} tensors are too few for "
                f"{self.config.num_layers} layers."
            )
        self._shapes = self.config.weight_shapes()
        names = {}
        for path, shape in self._shapes.items():
            name = weight_name(path)
            found = self._file.shapes.get(name)
            if found is None:
                raise CheckpointError(f"{self.path}: the tensor {name} is missing.")
            stored = tuple(reversed(shape)) if path.endswith("kernel") else shape
            if name == _EMBEDDING and len(found) == 2 and found[0] > shape[0]:
                found = (shape[0], *found[1:])
            check_shape(f"{self.path}: {name}", found, stored)
            if len(shape) == 1 and self._file.float_dtype(name) is None:
                raise CheckpointError(f"{self.path}: {name} is a quantised norm.")
            names[path] = name
        self._check_rest(set(names.values()))
        return names

    def _check_rest(self, used):
        extra = set(self._file.shapes) - used
        if "output.weight" in extra:
            extra.remove("output.weight")
            if not self._file.same_bytes("output.weight", _EMBEDDING):
                raise CheckpointError(
                    f"{self.path}: output.weight differs from {_EMBEDDING}; a Gemma "
                    "with an output head of its own is not supported."
                )
        if extra:
            raise CheckpointError(
                f"{self.path}: holds tensors that are no part of Gemma: {some(extra)}."
            )

    def tensor(self, path):
        """A view of the mapped file, or the decoded tensor."""
        array = self._file.tensor(self._names[path], self._decoded)
        shape = self._shapes[path]
        if len(shape) == 1:
            return array.astype(np.float32) - np.float32(1)
        return array.T if path.endswith("kernel") else array[: shape[0]]

    def sources(self, path):
        """File, tensor name and stored type."""
        name = self._names[path]
        return f"{self.path.name}: {name} ({self._file.type_name(name)})"

    def files(self):
        """The one file."""
        return [self.path]

    def tokenizer(self):
        """The tokenizer of the vocabulary in the file, or None without one."""
        from gemma_keras.tokenizer import GemmaTokenizer

        pieces = self._pieces()
        if not pieces:
            return None
        model = self._fields.text("tokenizer.ggml.model", "llama")
        if model != "llama":
            raise CheckpointError(
                f"{self.path}: its vocabulary is of the kind {model!r}; Gemma's is "
                "'llama' (SentencePiece)."
            )
        lists = []
        for key in ("scores", "token_type"):
            values = self._file.fields.get(f"tokenizer.ggml.{key}")
            if not isinstance(values, np.ndarray) or len(values) < len(pieces):
                raise CheckpointError(
                    f"{self.path}: tokenizer.ggml.{key} is missing or too short."
                )
            lists.append(values[: len(pieces)].tolist())
        try:
            return GemmaTokenizer.from_pieces(pieces, *lists)
        except ValueError as error:
            raise CheckpointError(f"{self.path}: {error}") from error

    def told(self):
        """What an export told of itself, in the file's own keys."""
        text = self._file.fields.get(PROVENANCE_KEY)
        return text.encode() if isinstance(text, str) else None

    def close(self):
        """Closes the file; arrays keep their own mappings."""
        self._file.close()
