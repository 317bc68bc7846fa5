"""Fine-tuning runs: the callbacks that a run is made of, and the run itself.

What is here works with every `fit()`; `gemma-keras sft` is the same put together.
"""

import importlib

_MODULES = {
    "Checkpoints": "callbacks",
    "DivergenceError": "callbacks",
    "MetricsFile": "callbacks",
    "Plan": "planning",
    "RunConfig": "config",
    "Samples": "callbacks",
    "StepMetrics": "callbacks",
    "Steps": "steps",
    "StopOnDivergence": "callbacks",
    "TensorBoard": "tensorboard",
    "Validation": "callbacks",
    "plan": "planning",
    "run": "runs",
    "write_report": "report",
}

__all__ = [*_MODULES]


def __getattr__(name):
    # Late, as in the package above: --help reads the config and needs no Keras.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    return getattr(module, name)


def __dir__():
    return sorted({*globals(), *__all__})
