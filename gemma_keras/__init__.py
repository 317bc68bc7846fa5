"""Gemma on Keras 3: one definition of the model on JAX, PyTorch and TensorFlow.

Names are imported when they are first used, so that the command line can choose the
backend, and answer `--help`, before Keras is imported.
"""

import importlib

__version__ = "0.1.0"

_MODULES = {
    "GemmaBackbone": "backbone",
    "GemmaCausalLM": "causal_lm",
    "GemmaCausalLMPreprocessor": "preprocessor",
    "GemmaConfig": "config",
    "GemmaTokenizer": "tokenizer",
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
