"""Reading and writing Gemma checkpoints, one module a format.

`open_checkpoint(path)` tells the format from the content. Nothing here knows the
model: checkpoints are configs, names and arrays.
"""

import importlib
from pathlib import Path

from gemma_keras.checkpoints.checkpoint import Checkpoint, CheckpointError
from gemma_keras.checkpoints.keras_layout import QUANTIZED

__all__ = ["WRITERS", "Checkpoint", "CheckpointError", "open_checkpoint"]

# What `exporting` writes: a format's name, and the module that knows how.
WRITERS = {
    "hf": "hugging_face_writer",
    "keras": "keras_preset_writer",
    "gguf": "gguf_writer",
    "torch": "gemma_pytorch_writer",
    "nemo": "nemo_writer",
    "flax": "flax_writer",
    "maxtext": "maxtext_writer",
}

# In this order for a directory: some hold a GGUF beside the safetensors.
_FORMATS = (
    "quantized_preset",
    "keras_preset",
    "hugging_face",
    "gguf",
    "nemo",
    "gemma_pytorch",
    "orbax_checkpoint",
)
_SUFFIXES = {
    ".h5": "keras_preset",
    ".weights.json": "keras_preset",
    ".safetensors": "hugging_face",
    ".gguf": "gguf",
    ".nemo": "nemo",
    ".ckpt": "gemma_pytorch",
}
# How files begin, which are told by that alone.
_BEGINNINGS = {
    b"GGUF": "gguf",
    b"\x89HDF\r\n\x1a\n": "keras_preset",
    b"PK\x03\x04": "gemma_pytorch",
    b"\x1f\x8b": "nemo",
}


def open_checkpoint(path, *, config=None, dtype=None):
    """Opens a checkpoint and checks all that its headers can tell.

    Args:
        path: A directory (Hugging Face, a KerasHub preset, gemma_pytorch, or Orbax from
            Flax or MaxText) or a weights file (.gguf, .safetensors, .weights.h5, .ckpt,
            .nemo).
        config: A `GemmaConfig`, for weights that come without one.
        dtype: The float dtype to decode quantised tensors to, `"float32"` if None.
            Tensors stored as floats come back as they are stored.

    Returns:
        An open `Checkpoint`.

    Raises:
        CheckpointError: there is no Gemma checkpoint there, or a broken one.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such file or directory.")
    find = _format_of_file if path.is_file() else _format_of_directory
    module = find(path)
    if module is None:
        raise CheckpointError(_unknown(path))
    return _module(module).open_checkpoint(path, config, dtype)


def _module(name):
    return importlib.import_module(f"gemma_keras.checkpoints.{name}")


def _format_of_file(path):
    """Told by the first bytes; a file that they do not tell, by its name."""
    with path.open("rb") as file:
        head = file.read(512)
    if path.name == QUANTIZED:
        return "quantized_preset"
    # The header of safetensors: its length, which is not huge, and a JSON object.
    if head[4:9] == b"\0\0\0\0{":
        return "hugging_face"
    for beginning, name in _BEGINNINGS.items():
        if head.startswith(beginning):
            return name
    # The header of a tar archive's first member.
    if head[257:262] == b"ustar":
        return "nemo"
    for suffix, name in _SUFFIXES.items():
        if path.name.endswith(suffix):
            return name
    return None


def _format_of_directory(path):
    return next((name for name in _FORMATS if _module(name).recognises(path)), None)


def _unknown(path):
    if path.is_file():
        return (
            f"{path}: is neither a safetensors file nor a GGUF nor a Keras weights "
            "file, nor one of gemma_pytorch or NVIDIA NeMo."
        )
    names = sorted(child.name for child in path.iterdir())
    if not names:
        return f"{path}: the directory is empty."
    if any(name.endswith((".bin", ".ckpt", ".pt", ".pth")) for name in names):
        return (
            f"{path}: holds PyTorch pickles only; convert them to safetensors first "
            "(transformers: model.save_pretrained(directory))."
        )
    return (
        f"{path}: holds no checkpoint. Expected config.json beside *.safetensors "
        "(Hugging Face) or beside model.weights.h5 (KerasHub preset), or an Orbax "
        "directory (Flax, MaxText)."
    )
