"""Two processes, or two replicas, train as one does: the same losses and weights.

torch by `torchrun` and gloo, JAX by `jax.distributed` with two devices each, TensorFlow
by a `MirroredStrategy` on two logical devices; all on one CPU. The replicas do not have
as many tokens to learn as each other, so that a mean of means would be another number.
"""

import json
import os
import pathlib
import socket
import subprocess
import sys

import keras
import numpy as np
import pytest
import train_together

PROGRAM = pathlib.Path(train_together.__file__)


def _free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def _commands(out):
    """A command line and further environment for each process to start."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        return [([str(PROGRAM), "mirrored", out], {})]
    arguments = [str(PROGRAM), "processes", out]
    if backend == "torch":
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2"]
        address = f"--rdzv-endpoint=localhost:{_free_port()}"
        return [([*torchrun, "--rdzv-backend=c10d", address, *arguments], {})]
    there = {
        "KERAS_DISTRIBUTION_JOB_ADDRESSES": f"localhost:{_free_port()}",
        "KERAS_DISTRIBUTION_NUM_PROCESSES": "2",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        # Nobody minds that another process may read what one has half written.
        "JAX_ENABLE_COMPILATION_CACHE": "0",
    }
    return [
        (arguments, there | {"KERAS_DISTRIBUTION_PROCESS_ID": number})
        for number in "01"
    ]


def _read(out):
    weights = np.load(f"{out}.npz")
    return json.loads(pathlib.Path(f"{out}.json").read_text()), dict(weights)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Results and weights of one device, and those of two."""
    folder = tmp_path_factory.mktemp("together")
    logs = [folder / "0.log", folder / "1.log"]
    commands, running = _commands(str(folder / "two")), []
    try:
        for (command, more), log in zip(commands, logs, strict=False):
            with log.open("wb") as file:
                process = subprocess.Popen(
                    [sys.executable, *command],
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=os.environ | {"KERAS_BACKEND": keras.backend.backend()} | more,
                )
            running.append(process)
        train_together.train("alone", folder / "one")
        for process, log in zip(running, logs, strict=False):
            assert process.wait(300) == 0, log.read_text()[-2000:]
    finally:
        for process in running:
            process.terminate()
            process.wait()
    return _read(folder / "one"), _read(folder / "two")


@pytest.mark.parametrize("case", ["lora", "accumulated"])
def test_two_have_the_losses_of_one(found, case):
    (one, _), (two, _) = found
    assert two[case].keys() == one[case].keys()
    for name, expected in one[case].items():
        assert two[case][name] == pytest.approx(expected, rel=1e-5), name
    assert one[case]["loss"][1] < one[case]["loss"][0]


def test_a_loop_around_distributed_data_parallel_has_the_losses_of_one(found):
    if keras.backend.backend() != "torch":
        pytest.skip("torch's own")
    (one, _), (two, _) = found
    assert two["wrapped"]["loss"] == pytest.approx(one["wrapped"]["loss"], rel=1e-5)
    assert one["wrapped"]["loss"][2] < one["wrapped"]["loss"][0]


def test_a_model_divided_among_processes_has_the_losses_of_one(found):
    if keras.backend.backend() != "jax":
        pytest.skip("Keras lays models out over devices on JAX only")
    (one, _), (two, _) = found
    for name, expected in one["accumulated"].items():
        assert two["divided"][name] == pytest.approx(expected, rel=1e-5), name


def test_two_have_the_weights_of_one(found):
    (_, one), (_, two) = found
    assert one.keys() == two.keys()
    for name, expected in one.items():
        # Gradients are added in another order, and Adam divides each by its own size:
        # where one is a thousandth of the largest, a rounding of 1e-7 of that shows in
        # the fourth digit of the step.
        bound = 3e-4 * np.abs(expected).max()
        np.testing.assert_allclose(two[name], expected, atol=bound, err_msg=name)


def test_what_cannot_be_trained_together_is_refused(found):
    two = found[1][0]
    if keras.backend.backend() == "tensorflow":
        assert two["shards"] == 1
        assert "outside of the scope" in two["refused"]
    else:
        assert two["shards"] == 2
        assert "[4, 6] rows or batches" in two["refused"]


def test_what_processes_hold_in_parts_is_brought_together(found):
    assert found[1][0]["brought_together"] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_a_process_that_was_started_alone_is_told_so(monkeypatch):
    if keras.backend.backend() == "jax":
        pytest.skip("asks the cluster, which JAX itself does")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    known = {"torch": "torchrun", "tensorflow": "MirroredStrategy"}
    with pytest.raises(ValueError, match=known[keras.backend.backend()]):
        train_together.distribution.initialize()
