"""Which backend Keras is to run on, settled before Keras is imported."""

import enum
import importlib.util
import json
import os
import pathlib

# What Keras takes where nobody has chosen.
KERAS_DEFAULT = "tensorflow"


class Backend(enum.StrEnum):
    """What gemma_keras runs on, the preferred one first."""

    JAX = "jax"
    TORCH = "torch"
    TENSORFLOW = "tensorflow"


def choose_backend(asked=None):
    """Sets KERAS_BACKEND to a backend that is installed.

    In this order: what was asked for, KERAS_BACKEND, what Keras would take (the one
    that keras.json names, or TensorFlow), the first of `Backend` that is installed.

    Args:
        asked: a name in `Backend`, or `None`.

    Raises:
        ValueError: KERAS_BACKEND names something else.
        ImportError: the backend that was asked for, or any, is not installed.
    """
    name = asked or os.environ.get("KERAS_BACKEND")
    if not name:
        there = [backend for backend in (configured(), *Backend) if installed(backend)]
        if not there:
            raise ImportError(
                "Keras needs JAX, PyTorch or TensorFlow, and none is installed. "
                "Install one, for example with: pip install 'gemma_keras[jax]'"
            )
        name = there[0]
    elif name not in list(Backend):
        raise ValueError(
            f"KERAS_BACKEND is {name!r}; it may be {', '.join(Backend)}, or absent."
        )
    elif not installed(name):
        raise ImportError(
            f"The backend {name} is not installed. Install it with: "
            f"pip install 'gemma_keras[{name}]'"
        )
    os.environ["KERAS_BACKEND"] = str(name)


def configured():
    """The backend that Keras takes by itself: keras.json's, or its default."""
    home = os.environ.get("KERAS_HOME") or "~/.keras"
    try:
        text = (pathlib.Path(home).expanduser() / "keras.json").read_text()
        return json.loads(text).get("backend") or KERAS_DEFAULT
    except (OSError, ValueError, AttributeError):
        return KERAS_DEFAULT


def installed(backend):
    """Whether a backend can be imported; imports nothing."""
    return backend in list(Backend) and bool(importlib.util.find_spec(backend))
