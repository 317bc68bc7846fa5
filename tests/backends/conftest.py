"""A small random model with a vocabulary of its own, and numpy in and out."""

import pathlib
import sys

import keras
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from small_model import CONFIG, build_model, train_vocabulary


@pytest.fixture(scope="session")
def vocabulary() -> bytes:
    """A SentencePiece model of 300 pieces with Gemma's settings."""
    return train_vocabulary()


@pytest.fixture(scope="session")
def config():
    """The `GemmaConfig` of the small model."""
    return CONFIG


@pytest.fixture(scope="session")
def lm(vocabulary):
    """A small random model for tests that only ask it; never train this one."""
    keras.utils.set_random_seed(7)
    return build_model(vocabulary)


@pytest.fixture
def new_lm(vocabulary):
    """A function that builds the small random model anew."""

    def build(**settings):
        keras.utils.set_random_seed(7)
        return build_model(vocabulary, **settings)

    return build
