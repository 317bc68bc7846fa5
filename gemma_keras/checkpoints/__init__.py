"""Reading and writing Gemma checkpoints, one module a format.

`open_checkpoint(path)` tells the format from the content. Nothing here knows the
model: checkpoints are configs, names and arrays.
"""

import importlib
from pathlib import Path

from gemma_keras.checkpoints.checkpoint import Checkpoint, CheckpointError

__all__ = ["Checkpoint", "CheckpointError", "open_checkpoint"]

_FORMATS = ("keras_preset", "gguf", "hugging_face")


def open_checkpoint(path, *, config=None, dtype=None):
    """Opens a checkpoint and checks all that its headers can tell.

    Args:
        path: A directory (Hugging Face, or a KerasHub preset) or a weights file
            (.gguf, .safetensors, .weights.h5).
        config: A `GemmaConfig`, for weights that come without one.
        dtype: The float dtype to decode quantised (GGUF) tensors to, `"float32"` if
            None. Tensors stored as floats come back as they are stored.

    Returns:
        An open `Checkpoint`.

    Raises:
        CheckpointError: there is no Gemma checkpoint there, or a broken one.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such file or directory.")
    for name in _FORMATS:
        module = importlib.import_module(f"gemma_keras.checkpoints.{name}")
        if module.recognises(path):
            return module.open_checkpoint(path, config, dtype)
    raise CheckpointError(_unknown(path))


def _unknown(path):
    if path.is_file():
        return (
            f"{path}: is neither a safetensors file nor a GGUF nor a Keras weights "
            "file."
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
        "(Hugging Face) or beside model.weights.h5 (KerasHub preset)."
    )
