"""Functions of arrays, compiled or recorded the way of the backend."""

import functools

import keras
import numpy as np
from keras import ops

from gemma_keras.backend.device import torch_device
from gemma_keras.backend.gradients import no_gradient
from gemma_keras.backend.library import NAME, jax, tf, torch
from gemma_keras.backend.running import in_program, tracing

# Whether programs are compiled, by XLA, and have to know all shapes beforehand.
# Otherwise operations run as they are written, one after the other.
COMPILES = NAME != "torch"


def few_shapes():
    """Whether what runs again and again should have few shapes, of padded arrays.

    So it should where programs are compiled, or recorded for a device to run alone.
    """
    return COMPILES or _replays(_torch_home())


@functools.cache
def _torch_home():
    return torch_device()


class Program:
    """A function of arrays, compiled the backend's way, that reads a model's weights.

    Args:
        function: takes and returns nested arrays. It is traced anew for arguments of
            new shapes.
        variables: every Keras variable it reads.
        donated: index of an argument that is not used again, whose memory is free for
            the results.
    """

    def __init__(self, function, variables, donated=None):
        self.function, self.variables = function, list(variables)
        if NAME == "jax":
            donate = () if donated is None else (donated + 1,)
            self._compiled = jax.jit(self._with_values, donate_argnums=donate)
        elif NAME == "tensorflow":
            # Loops are written as such: AutoGraph would read all code for nothing.
            self._compiled = tf.function(
                self._traced, jit_compile=True, autograph=False
            )
            self._concrete = {}

    def _with_values(self, values, *arguments):
        # Weights are arguments: closed over, XLA would keep them as constants.
        mapping = list(zip(self.variables, values, strict=True))
        with keras.StatelessScope(state_mapping=mapping):
            return self._traced(*arguments)

    def _traced(self, *arguments):
        with tracing():
            return self.function(*arguments)

    def __call__(self, *arguments):
        if NAME == "jax":
            values = [variable.value for variable in self.variables]
            return self._compiled(values, *arguments)
        if NAME == "torch":
            arguments = keras.tree.map_structure(_array_to_torch, arguments)
            with torch.no_grad():
                return self._traced(*arguments)
        arguments = tf.nest.map_structure(tf.convert_to_tensor, arguments)
        # Asked for by shape: tf.function itself warns of every few new shapes.
        key = tuple((x.dtype, tuple(x.shape)) for x in tf.nest.flatten(arguments))
        if key not in self._concrete:
            self._concrete[key] = self._compiled.get_concrete_function(*arguments)
        return self._concrete[key](*arguments)


class LayerProgram:
    """A function of a layer and arrays, which nobody asks the gradient of.

    JAX compiles it once for all layers that are alike, such as the blocks of a model;
    torch and TensorFlow run it as it is.

    Args:
        function: takes the layer and nested arrays; returns nested arrays.
    """

    def __init__(self, function):
        self.function = function
        self._compiled = {}

    def __call__(self, layer, *arguments):
        if NAME == "tensorflow":
            # Not as in a program: some of its products are XLA's alone.
            return self.function(layer, *arguments)
        if NAME == "torch":
            with no_gradient(), tracing():
                return self.function(layer, *arguments)
        variables = layer.variables
        key = tuple(
            (v.path.removeprefix(layer.path or ""), tuple(v.shape), v.dtype)
            for v in variables
        )
        if key not in self._compiled:

            def run(values, *arguments):
                mapping = list(zip(variables, values, strict=True))
                with keras.StatelessScope(state_mapping=mapping), tracing():
                    return self.function(layer, *arguments)

            self._compiled[key] = jax.jit(run)
        return self._compiled[key]([v.value for v in variables], *arguments)


def _nothing():
    pass


def _replays(device):
    """Whether recorded steps run as graphs of the device."""
    return device.type == "cuda"


class Step:
    """A function of arrays that a loop in a program calls again and again.

    JAX and TensorFlow compile the loop, and this is the function itself. On torch it is
    recorded, once for each set of shapes, and runs without Python from then on
    (torch_steps.py). Integers among the arguments become tensors without dimensions, so
    that they may differ from call to call.

    Args:
        function: takes and returns nested arrays. It may change in place what it then
            returns, but calling it twice with the same arguments must be the same as
            once.
        variables: every Keras variable it reads.
    """

    # Recording takes as long as so many calls save.
    PATIENCE, PATIENCE_REPLAYED = 16, 2

    def __init__(self, function, variables):
        self.function, self.variables = function, list(variables)
        self._calls, self._recorded = {}, {}

    def __call__(self, *arguments, before=_nothing):
        """The function's value; `before` is called before it changes anything."""
        if NAME != "torch":
            return self.function(*arguments)
        leaves, structure = torch.utils._pytree.tree_flatten(arguments)
        device = next(x.device for x in leaves if isinstance(x, torch.Tensor))
        if device.type not in ("cpu", "cuda") or not _can_record():
            before()
            return self.function(*arguments)
        key = (structure, *(getattr(x, "shape", None) for x in leaves))
        if key not in self._recorded:
            before()
            patience = self.PATIENCE_REPLAYED if _replays(device) else self.PATIENCE
            self._calls[key] = self._calls.get(key, 0) + 1
            if self._calls[key] <= patience:
                return self.function(*arguments)
            self._recorded[key] = self._record(leaves, structure, device)
        run, results = self._recorded[key]
        found = run(in_program.get().kept, self._values, before, leaves)
        return torch.utils._pytree.tree_unflatten(list(found), results)

    def _values(self):
        # Not kept: `fit` and others may put another tensor in a variable.
        return [variable.value for variable in self.variables]

    def _record(self, leaves, structure, device):
        from gemma_keras.backend import torch_steps

        told = []

        def flat(values, leaves):
            arguments = torch.utils._pytree.tree_unflatten(leaves, structure)
            mapping = list(zip(self.variables, values, strict=True))
            with keras.StatelessScope(state_mapping=mapping):
                results = self.function(*arguments)
            results, form = torch.utils._pytree.tree_flatten(results)
            told.append(form)
            return tuple(results)

        tensors = [torch.as_tensor(x, device=device) for x in leaves]
        graph = torch_steps.record(flat, self._values(), tensors)
        replays = _replays(device)
        kind = torch_steps.Replayed if replays else torch_steps.Recorded
        return kind(graph, len(self.variables)), told[-1]


@functools.cache
def _can_record():
    from gemma_keras.backend import torch_steps

    return torch_steps.can_record()


def _array_to_torch(x):
    return ops.convert_to_tensor(x) if isinstance(x, np.ndarray) else x
