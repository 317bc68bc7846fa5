"""Classic `.nemo` archives of NVIDIA NeMo, and directories unpacked from one.

An archive holds model_config.yaml, model_weights.ckpt (a file of torch.save) and the
SentencePiece model of the tokenizer. Checkpoints of NeMo 2 and of Megatron-Bridge are
known, and refused: their list of contents is a pickle that only `pickle.load` reads.
"""

import math

import numpy as np

from gemma_keras.checkpoints import megatron_layout, nemo_config
from gemma_keras.checkpoints.checkpoint import (
    MAX_JSON_BYTES,
    Checkpoint,
    CheckpointError,
    build_config,
    check_shape,
    config_differences,
    dominant_dtype,
    only_file,
    some,
)
from gemma_keras.checkpoints.mapped_file import FLOAT_DTYPES
from gemma_keras.checkpoints.nemo_archive import NemoArchive
from gemma_keras.checkpoints.provenance import PROVENANCE
from gemma_keras.checkpoints.torch_file import TorchFile

CONFIG, WEIGHTS = "model_config.yaml", "model_weights.ckpt"
# Where a checkpoint of one process lies, as NeMo's versions had it.
_PLACES = (
    WEIGHTS,
    f"mp_rank_00/{WEIGHTS}",
    f"tp_rank_00_pp_rank_000/{WEIGHTS}",
)
# The key under which we keep the exact config; NeMo ignores it.
OURS = "gemma_keras"
_PREFIXES = ("model.", "model.module.", "module.", "")
_ARTIFACT = "nemo:"
_MAX_YAML, _MAX_TOKENIZER = 2**18, 2**26
# Norms as NeMo writes them, and as we do: in float64, for every bit of 1 + w.
_NORM_DTYPES = (*FLOAT_DTYPES, "float64")
_NEMO2 = ("context", "weights")
_BRIDGE = ("latest_checkpointed_iteration.txt", "run_config.yaml", ".metadata")
_EXPORT_NEMO2 = (
    "from nemo.collections import llm; "
    "llm.export_ckpt(path={path!r}, target='hf', output_path='...')"
)
_EXPORT_BRIDGE = (
    "from megatron.bridge import AutoBridge; "
    "AutoBridge.from_hf_pretrained(HF_MODEL).export_ckpt({path!r}, '...')"
)


def recognises(path):
    """Whether the directory `path` is NeMo's or Megatron-Bridge's."""
    unpacked = (path / CONFIG).is_file()
    return unpacked or any(path.glob("*.nemo")) or _refusal(path) is not None


def open_checkpoint(path, config=None, dtype=None):
    """Opens an archive, the only one of a directory, or what was unpacked from one.

    `dtype` is of no consequence: nothing that this reads is quantised.
    """
    if path.is_dir() and not (path / CONFIG).is_file():
        archive = only_file(path, ".nemo")
        if archive is None:
            raise CheckpointError(_refusal(path))
        path = archive
    return NemoCheckpoint(path, config)


def _refusal(path):
    """Why a directory of a later format is not read, and what to do; or None."""
    if all((path / name).is_dir() for name in _NEMO2):
        name, command = "NeMo 2", _EXPORT_NEMO2
    elif any((path / name).is_file() for name in _BRIDGE):
        name, command = "Megatron", _EXPORT_BRIDGE
    else:
        return None
    return (
        f"{path}: is a distributed checkpoint of {name}, whose list of contents is a "
        "pickle that would have to be run. Export it to Hugging Face where that is "
        f"installed: {command.format(path=str(path))}"
    )


def _text_keys(values):
    return {str(key): value for key, value in values.items()}


class NemoCheckpoint(Checkpoint):
    """A `.nemo` archive of one process.

    Tensors come back as they are stored; norms in float32, because the one is taken
    off that Gemma 1's have there.
    """

    format = "NVIDIA NeMo"

    def __init__(self, path, config=None):
        self.path = path
        self._file = None
        self._archive = NemoArchive(path)
        try:
            self._raw = self._read_yaml()
            self._file = self._open_weights()
            self._prefix = self._find_prefix()
            self.config = config or self._read_config()
            self._names = self._match()
            self.dtype = dominant_dtype(
                (self._file.dtype(name), math.prod(self._file.shapes[name]))
                for path, name in self._names.items()
                if not path.endswith("scale")
            )
        except BaseException:
            self.close()
            raise

    def _read_yaml(self):
        if CONFIG not in self._archive.members:
            raise CheckpointError(
                f"{self.path}: has no {CONFIG}; it is no .nemo archive. It holds "
                f"{some(self._archive.members)}."
            )
        data = self._archive.read(CONFIG, _MAX_YAML)
        return nemo_config.parse(data, self._where())

    def _where(self):
        return f"{self.path} ({CONFIG})"

    def _open_weights(self):
        members = self._archive.members
        found = [name for name in members if name.split("/")[-1] == WEIGHTS]
        if len(found) > 1:
            raise CheckpointError(
                f"{self.path}: holds the parts of {len(found)} processes. Join them "
                "first, with NeMo's megatron_change_num_partitions.py and "
                "--target_tensor_model_parallel_size=1."
            )
        if any(name.startswith("model_weights/") for name in members):
            raise CheckpointError(
                f"{self.path}: holds a distributed checkpoint (model_weights/), which "
                "is not read. Export it to Hugging Face with NeMo's "
                "convert_gemma_nemo_to_hf.py."
            )
        if not found or found[0] not in _PLACES:
            raise CheckpointError(f"{self.path}: has no {WEIGHTS}.")
        path, start, size = members[found[0]]
        return TorchFile(path, start, size, name=f"{self.path} ({found[0]})")

    def _find_prefix(self):
        for prefix in _PREFIXES:
            if prefix + megatron_layout.EMBEDDING in self._file.shapes:
                return prefix
        raise CheckpointError(
            f"{self._file.name}: is no Gemma of Megatron Core (no "
            f"model.{megatron_layout.EMBEDDING}); it holds "
            f"{some(self._file.shapes) or 'no tensors'}."
        )

    def _read_config(self):
        """The config: ours if there is one, else what NeMo's keys say."""
        where = self._where()
        stored = self._raw.get(OURS)
        if not isinstance(stored, dict):
            return nemo_config.read_config(self._raw, self._pieces(), where)
        config = build_config(f"{where}: {OURS}", **_text_keys(stored))
        read = nemo_config.read_config(self._raw, config.vocab_size, where)
        if wrong := config_differences(config, read):
            raise CheckpointError(
                f"{where}: {OURS} says {some(wrong)}, and NeMo's keys do not. If they "
                f"are right, take {OURS} out."
            )
        return config

    def _pieces(self):
        """Rows of the embedding, without those that NeMo pads it with."""
        shape = self._file.shapes[self._prefix + megatron_layout.EMBEDDING]
        rows = shape[0] if shape else 0
        divisor = self._raw.get("make_vocab_size_divisible_by")
        tokenizer = self.tokenizer()
        if tokenizer is not None and type(divisor) is int and divisor > 0:
            padded = -(-tokenizer.vocab_size // divisor) * divisor
            rows = tokenizer.vocab_size if padded == rows else rows
        return rows

    def _match(self):
        """Maps every weight path to its tensor, and accounts for the rest."""
        if self.config.num_layers > len(self._file.shapes):
            raise CheckpointError(
                f"{self._file.name}: {len(self._file.shapes)} tensors are too few for "
                f"{self.config.num_layers} layers."
            )
        if self.config.family == "gemma3":
            raise CheckpointError(f"{self.path}: no .nemo archive is a Gemma 3's.")
        found = {
            name: self._find_tensor(name, shape)
            for name, shape in megatron_layout.stored_shapes(self.config).items()
        }
        self._check_rest(set(found.values()))
        paths = self.config.weight_shapes()
        return {path: found[megatron_layout.weight_name(path)] for path in paths}

    def _find_tensor(self, name, shape):
        """The tensor's full name, its shape and dtype being right."""
        file, full = self._file, self._prefix + name
        if full not in file.shapes:
            for ours, theirs in megatron_layout.LOCAL_NAMES.items():
                other = full.replace(ours, theirs)
                full = other if other in file.shapes else full
        if full not in file.shapes:
            raise CheckpointError(f"{file.name}: {file.missing(full)}")
        stored = file.shapes[full]
        if name == megatron_layout.EMBEDDING and stored[:1] > shape[:1]:
            stored = (shape[0], *stored[1:])
        check_shape(f"{file.name}: {full}", stored, shape)
        allowed = _NORM_DTYPES if len(shape) == 1 else tuple(FLOAT_DTYPES)
        if file.dtype(full) not in allowed:
            raise CheckpointError(
                f"{file.name}: {full} is {file.dtype(full)}; weights must be one of "
                f"{', '.join(FLOAT_DTYPES)}."
            )
        return full

    def _check_rest(self, used):
        head = self._prefix + megatron_layout.HEAD
        embedding = self._prefix + megatron_layout.EMBEDDING
        known = {head, *used}
        if head in self._file.shapes and not self._file.same_bytes(head, embedding):
            raise CheckpointError(
                f"{self._file.name}: {head} differs from {embedding}; a Gemma with an "
                "output head of its own is not supported."
            )
        extra = [
            name
            for name in self._file.shapes
            if name not in known and not name.endswith("_extra_state")
        ]
        if extra:
            raise CheckpointError(
                f"{self._file.name}: holds tensors that are no part of the Gemma which "
                f"{CONFIG} describes: {some(extra)}."
            )

    def tensor(self, path):
        """A view of the mapped file, transposed for kernels; or a copy, of groups."""
        name, config = self._names[path], self.config
        array = self._file.tensor(name, megatron_layout.rows(path, config))
        if path.endswith("scale"):
            return self._norm(array)
        if path == "token_embedding/embeddings":
            return array[: config.vocab_size]
        heads = megatron_layout.heads(path, config)
        if heads is not None:
            groups = array.reshape(megatron_layout.fused_shape(config))
            groups = groups[:, heads.first : heads.last]
            array = groups.reshape(-1, config.hidden_dim)
        return array.T

    def _norm(self, array):
        if self._raw.get("layernorm_zero_centered_gamma"):
            return array.astype(np.float32)
        return (array.astype(np.float64) - 1).astype(np.float32)

    def sources(self, path):
        """Archive and tensor name."""
        return f"{self.path.name}: {self._names[path]}"

    def files(self):
        """The archive; of a directory, its file of weights."""
        return [self.path if self.path.is_file() else self._file.path]

    def tokenizer(self):
        """The tokenizer that model_config.yaml names, or None."""
        from gemma_keras.tokenizer import GemmaTokenizer

        stated = self._raw.get("tokenizer")
        stated = stated if isinstance(stated, dict) else {}
        name = str(stated.get("model") or "").removeprefix(_ARTIFACT)
        if name not in self._archive.members:
            found = [
                member
                for member in self._archive.members
                if member.endswith("tokenizer.model")
            ]
            if len(found) != 1:
                return None
            name = found[0]
        try:
            return GemmaTokenizer(self._archive.read(name, _MAX_TOKENIZER))
        except ValueError as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{self.path} ({name}): {error}") from error

    def told(self):
        """What an export told of itself, in the archive."""
        _, _, size = self._archive.members.get(PROVENANCE, (None, 0, 0))
        known = 0 < size <= MAX_JSON_BYTES
        return self._archive.read(PROVENANCE, size) if known else None

    def close(self):
        """Closes the file; arrays keep their own mappings."""
        if self._file is not None:
            self._file.close()
        self._archive.close()
