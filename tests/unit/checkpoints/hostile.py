"""How tests of broken and malicious files read them, and what must not happen then."""

import contextlib
import tracemalloc

import pytest
from hypothesis import HealthCheck, settings

from gemma_keras.checkpoints import CheckpointError, open_checkpoint

MEGABYTE = 2**20
FUZZ = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@contextlib.contextmanager
def little_memory(limit=8 * MEGABYTE):
    """Fails if Python and NumPy allocate more than `limit` at once."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


def read_all(path):
    """Opens a checkpoint and reads every tensor."""
    with open_checkpoint(path) as checkpoint:
        for name in checkpoint.config.weight_shapes():
            checkpoint.tensor(name)


def fails(path, match, named=None):
    """Reading fails with an error that names the file and says `match`."""
    with little_memory(), pytest.raises(CheckpointError, match=match) as error:
        read_all(path)
    assert str(named or path) in str(error.value)


def survives(path):
    with little_memory(), contextlib.suppress(CheckpointError):
        read_all(path)
