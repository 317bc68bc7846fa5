"""What all tests share: the backend in use, seeds, fetched files, and why tests skip.

The suite runs once for each value of KERAS_BACKEND; tools/test does all three.
"""

import collections
import importlib.util
import os
import pathlib
import signal
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Comparisons with a reference in float32 mean float32 on accelerators too.
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

# Triton decides when it is imported, by torch at times.
if not os.path.exists("/proc/driver/nvidia"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell starts what it sends to the background with Ctrl-C ignored, and everything
# that this starts inherits that: tests that interrupt a command would wait forever.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests make the same small models again and again: compile each program once, for this
# run, for the commands that it starts, and for the next run. Apart for each process of
# pytest-xdist: JAX does not mind one that reads what another has half written.
_CACHE = ROOT / ".cache" / "jax" / os.environ.get("PYTEST_XDIST_WORKER", "alone")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# TensorFlow would find none: it looks for a program by what was done before.
os.environ.setdefault("GEMMA_KERAS_COMPILATION_CACHE", "off")

# TensorFlow and torch bring copies of the same native libraries; where both get loaded
# (transformers is the reference on every backend), torch has to come first.
if importlib.util.find_spec("torch"):
    import torch  # noqa: F401

import keras

sys.path.insert(0, str(ROOT / "tools"))
import fetch_assets


def pytest_report_header():
    backend = keras.backend.backend()
    module = sys.modules.get(backend)
    version = getattr(module, "__version__", "?")
    found = [path for path in _assets().values() if path.is_file()]
    return [
        f"KERAS_BACKEND: {backend} {version}, keras {keras.__version__}",
        f"assets: {len(found)} of {len(_assets())} in {fetch_assets.assets_dir()}",
    ]


def _assets():
    folder = fetch_assets.assets_dir()
    return {asset.path: folder / asset.path for asset in fetch_assets.ASSETS}


@pytest.fixture(autouse=True)
def _seeds():
    keras.utils.set_random_seed(20240221)


@pytest.fixture(scope="session")
def backend() -> str:
    """Name of the Keras backend that this run is about."""
    return keras.backend.backend()


@pytest.fixture(scope="session")
def asset():
    """A function from the name of a fetched file to its path; skips where absent."""

    def find(name: str) -> pathlib.Path:
        path = _assets()[name]
        if not path.is_file():
            pytest.skip(f"{name} is not fetched: run python tools/fetch_assets.py")
        return path

    return find


@pytest.fixture(scope="session")
def gemma_tokenizer_file(asset) -> pathlib.Path:
    """The genuine SentencePiece model of Gemma 1."""
    return asset("gemma/tokenizer.model")


@pytest.fixture(scope="session")
def gemma3_tokenizer_file(asset) -> pathlib.Path:
    """The genuine SentencePiece model of Gemma 3."""
    return asset("gemma3/tokenizer.model")


@pytest.fixture(scope="session")
def gemma3_270m_file(asset) -> pathlib.Path:
    """The genuine Gemma 3 270M, quantised, as GGUF."""
    return asset("gemma3_270m/gemma-3-270m-q4_k_m.gguf")


def pytest_terminal_summary(terminalreporter):
    reasons = collections.Counter()
    for report in terminalreporter.stats.get("skipped", ()):
        reason = report.longrepr[2] if report.longrepr else ""
        reasons[reason.removeprefix("Skipped: ")] += 1
    if not reasons:
        return
    terminalreporter.section("skipped, and why")
    for reason, count in reasons.most_common():
        terminalreporter.line(f"{count:5d}  {reason}")
