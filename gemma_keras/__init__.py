"""Gemma on Keras 3: one definition of the model on JAX, PyTorch and TensorFlow."""

import importlib
import pathlib
import sys

__version__ = "0.1.0"

_MODULES = {
    "BucketedDataset": "packing",
    "Calibration": "calibration",
    "ExampleEncoder": "encoding",
    "DraftModel": "speculation",
    "GemmaBackbone": "backbone",
    "GemmaCausalLM": "causal_lm",
    "GemmaCausalLMPreprocessor": "preprocessor",
    "GemmaConfig": "config",
    "GemmaTokenizer": "tokenizer",
    "PackedDataset": "packing",
    "PromptCache": "generation",
    "PromptLookup": "speculation",
    "Quantization": "quantization",
    "encode_examples": "encoding",
    "push": "hubs",
    "read_examples": "readers",
    "upload_preset": "hubs",
}
_NAMESPACES = ("models", "samplers")

__all__ = [*_MODULES, *_NAMESPACES, "__version__"]


def __getattr__(name):
    if name in _NAMESPACES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    return getattr(module, name)


def __dir__():
    return sorted({*globals(), *__all__})


def _is_command():
    """Whether this is the command line, which imports Keras late or not at all.

    It chooses the backend itself, and `--help` and `info` need none.
    """
    return pathlib.Path((getattr(sys, "argv", None) or [""])[0]).stem == "gemma-keras"


if not _is_command():
    if "keras" not in sys.modules:
        importlib.import_module(f"{__name__}.backend_choice").choose_backend()
    # Keras can load a saved model only if its classes were imported and registered.
    importlib.import_module(f"{__name__}.causal_lm")
