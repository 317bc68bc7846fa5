"""The twins: tiny random Gemmas that hide nothing, and what transformers made of them.

tools/make_goldens.py wrote tests/parity/goldens; models are loaded from it through the
same reader that users' checkpoints go through.
"""

import pathlib

import numpy as np
import pytest

from gemma_keras import GemmaCausalLM

GOLDENS = pathlib.Path(__file__).parent / "goldens"
FAMILIES = ["gemma", "gemma2", "gemma3"]


@pytest.fixture(scope="session", params=FAMILIES)
def family(request) -> str:
    """Each of the three families in turn."""
    return request.param


@pytest.fixture(scope="session")
def golden(family) -> dict:
    """The reference's `token_ids`, `logits` and `block_0`, `block_1`, ..."""
    return dict(np.load(GOLDENS / family / "outputs.npz"))


@pytest.fixture(scope="session")
def twin(family):
    """The twin of this family, in float32."""
    return GemmaCausalLM.from_preset(GOLDENS / family)


@pytest.fixture(scope="session")
def load_twin(family):
    """A function that loads the twin of this family anew, with other settings."""

    def load(**settings):
        return GemmaCausalLM.from_preset(GOLDENS / family, **settings)

    return load
