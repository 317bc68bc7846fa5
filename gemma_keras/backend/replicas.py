"""Copies of a model, and processes, that train together."""

import atexit
import contextlib
import functools
import os

import keras
import numpy as np
from keras import ops

from gemma_keras.backend.library import NAME, jax, tf, torch


def join_processes():
    """Makes the processes that were started for one training know each other.

    On torch as `torchrun` tells them in their environment, on JAX as Keras has it.

    Raises:
        ValueError: nothing says that there are several, or the backend is TensorFlow.
    """
    if NAME == "jax":
        keras.distribution.initialize()
        return
    if NAME == "tensorflow":
        raise ValueError(
            "TensorFlow trains on several devices in one process: make the model in "
            "the scope of a tf.distribute.MirroredStrategy instead."
        )
    if _torch_distributed():
        return
    if not torch.distributed.is_torchelastic_launched():
        raise ValueError(
            "This process was started alone. Start one for each device with torchrun, "
            "as in: torchrun --nproc-per-node=2 train.py"
        )
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group()
    # Left to the end of the interpreter, its threads may abort the process.
    atexit.register(_leave_processes)


def _leave_processes():
    if _torch_distributed():
        torch.distributed.destroy_process_group()


def process():
    """`(index, count)`: which of the processes that train together this one is."""
    if NAME == "torch" and _torch_distributed():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    if NAME == "jax":
        return jax.process_index(), jax.process_count()
    return 0, 1


def processes_started():
    """How many processes were started for one training, joined yet or not."""
    told = {"torch": "WORLD_SIZE", "jax": "KERAS_DISTRIBUTION_NUM_PROCESSES"}
    number = os.environ.get(told.get(NAME, ""), "1")
    return max(process()[1], int(number) if number.isdigit() else 1)


def from_all_processes(number):
    """The integer that each of several processes calls this with, in their order."""
    if NAME == "jax":
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(np.array(number)).tolist()
    numbers = [None] * process()[1]
    torch.distributed.all_gather_object(numbers, number)
    return numbers


def make_alike(variables):
    """Gives the variables of all torch processes the values of the first one's."""
    if NAME != "torch" or process()[1] == 1:
        return
    for variable in variables:
        value = variable.value.detach()
        # Not in place: a kernel may be a transposed view.
        copy = value.contiguous()
        torch.distributed.broadcast(copy, src=0)
        value.copy_(copy)


def replicas():
    """Copies of the model that train together, each on its part of a batch.

    Processes on torch, and those of a `tf.distribute` strategy on TensorFlow. On JAX
    there is one, whose arrays lie on all devices.
    """
    if NAME == "tensorflow":
        return tf.distribute.get_strategy().num_replicas_in_sync
    return process()[1] if NAME == "torch" else 1


def _torch_distributed():
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def sum_over_replicas(tensors):
    """Sums of floating-point tensors over all replicas, without gradients.

    Args:
        tensors: a list; None stays None.
    """
    if replicas() == 1:
        return tensors
    there = [ops.convert_to_tensor(x) for x in tensors if x is not None]
    sums = iter(_torch_sums(there) if NAME == "torch" else _tensorflow_sums(there))
    return [None if x is None else next(sums) for x in tensors]


def _torch_sums(tensors):
    """All in one message for each dtype: what costs is their number."""
    sums = [None] * len(tensors)
    for dtype in dict.fromkeys(x.dtype for x in tensors):
        places = [i for i, x in enumerate(tensors) if x.dtype == dtype]
        flat = torch.cat([tensors[i].detach().reshape(-1) for i in places])
        torch.distributed.all_reduce(flat)
        parts = flat.split([tensors[i].numel() for i in places])
        for i, part in zip(places, parts, strict=True):
            sums[i] = part.view(tensors[i].shape)
    return sums


def _tensorflow_sums(tensors):
    context = tf.distribute.get_replica_context()
    # None where Keras only asks for shapes.
    return tensors if context is None else context.all_reduce("SUM", tensors)


@contextlib.contextmanager
def summed_gradients(optimizer, means):
    """Within it, `optimizer` steps by the gradients' sums over all replicas.

    Args:
        optimizer: of Keras, or a `Wrapper` around one.
        means: whether each replica's loss is its own mean, as Keras' losses are: then
            it is the mean of the gradients. TensorFlow's Keras has divided them.
    """
    if replicas() == 1:
        yield
        return
    apply = functools.partial(type(optimizer).apply, optimizer)

    def apply_sums(grads, trainable_variables=None):
        sums = sum_over_replicas(grads)
        if NAME == "torch":
            if means:
                sums = [None if x is None else x / replicas() for x in sums]
            apply(sums, trainable_variables)
        else:
            _apply_across_replicas(optimizer, apply, sums, trainable_variables)

    with _replaced(optimizer, apply=apply_sums):
        yield


@contextlib.contextmanager
def _replaced(thing, **methods):
    """Within it, an object has other methods than its class.

    TensorFlow's replicas are threads that all come by here, and wait for each other
    in the methods.
    """
    for name, method in methods.items():
        setattr(thing, name, method)
    try:
        yield
    finally:
        for name in methods:
            vars(thing).pop(name, None)


def _apply_across_replicas(optimizer, apply, sums, variables):
    """Steps of a `tf.distribute` strategy by gradients that are equal on all replicas.

    Keras' own optimizers step inside each replica, where they would sum once more,
    and clip before that. What is wrapped around them changes variables on all replicas
    at once, perhaps in a branch: it is called from outside of the replicas.
    """
    inner = optimizer
    while hasattr(inner, "inner_optimizer"):
        inner = inner.inner_optimizer

    def from_outside(strategy, sums):
        def on_each(grads, trainable_variables=None):
            step = functools.partial(type(inner).apply, inner)
            strategy.run(step, args=(grads, trainable_variables))

        first = functools.partial(_first_of_replicas, strategy)
        values = [None if x is None else first(x) for x in sums]
        with _replaced(inner, apply=on_each, _all_reduce_sum_gradients=list):
            (on_each if inner is optimizer else apply)(values, variables)

    tf.distribute.get_replica_context().merge_call(from_outside, args=(sums,))


def _first_of_replicas(strategy, value):
    return strategy.experimental_local_results(value)[0]


def outside_of_strategy(model):
    """Paths of variables that the replicas of the model's strategy do not have.

    On TensorFlow, of those that were made outside of the strategy's scope.
    """
    if NAME != "tensorflow" or model.distribute_strategy.num_replicas_in_sync == 1:
        return []
    variables = [*model.variables, *model.metrics_variables, *model.optimizer.variables]
    mirrored = tf.distribute.DistributedValues
    return [v.path for v in variables if not isinstance(v.value, mirrored)]


def first_batch(strategy, batches):
    """The first replica's part of the next of Keras' batches on TensorFlow."""
    first = functools.partial(_first_of_replicas, strategy)
    return keras.tree.map_structure(first, next(batches))
