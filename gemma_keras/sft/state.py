"""What of a model a run has to remember: trained weights, optimizer, random numbers.

Names do not depend on the backend, nor on what else the process has made.
"""

import keras
import ml_dtypes  # noqa: F401  np.dtype("bfloat16") needs it
import numpy as np

from gemma_keras import backend

_RANDOM = "random/backend"


class StateError(ValueError):
    """A state that does not belong to this model."""


def _named(lm):
    """Name to Keras variable of all that training changes."""
    found = {f"weights/{v.path}": v for v in lm.trainable_variables}
    if not lm.optimizer.built:
        lm.optimizer.build(lm.trainable_variables)
    for variable in lm.optimizer.variables:
        # The first part is the optimizer's own name, which counts up in a process.
        rest = variable.path.partition("/")[2] or variable.path
        found[_unused(f"optimizer/{rest}", found)] = variable
    seen = set(map(id, found.values()))
    for layer in lm._flatten_layers():
        for generator in getattr(layer, "_seed_generators", ()):
            if id(generator.state) not in seen:
                seen.add(id(generator.state))
                # By number: a model's own name counts up in a process, too.
                found[_unused("random/seed_generator", found)] = generator.state
    return found


def _unused(name, taken):
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name}#{number}"
    return free


def collect(lm):
    """What `snapshots.write` takes: name to `(shape, dtype, read)`.

    Call `backend.sync_training(lm)` before, inside `fit`.
    """
    entries = {}
    for name, variable in _named(lm).items():
        dtype = keras.backend.standardize_dtype(variable.dtype)
        kind = np.dtype(dtype)
        entries[name] = (tuple(variable.shape), kind, _reader(variable))
    generator = backend.random_state()
    if generator is not None:
        entries[_RANDOM] = (generator.shape, generator.dtype, lambda: generator)
    return entries


def _reader(variable):
    return lambda: keras.ops.convert_to_numpy(variable)


def first_bad(lm):
    """Name of a trained weight that holds NaN or infinity, or None."""
    for variable in lm.trainable_variables:
        if not backend.all_finite(variable.value):
            return variable.path
    return None


def restore(lm, names, read):
    """Gives a model the state that `names` and `read` hold.

    Raises:
        StateError: they are not those of this model; it was not changed.
    """
    variables = _named(lm)
    held = set(names) - {_RANDOM}
    missing, extra = sorted(set(variables) - held), sorted(held - set(variables))
    if missing or extra:
        one = (missing or extra)[0]
        where = "the checkpoint lacks" if missing else "only the checkpoint has"
        raise StateError(
            f"The checkpoint belongs to another model or optimizer: {where} {one}"
            f" and {len(missing) + len(extra) - 1} others."
        )
    for name, variable in variables.items():
        value = read(name)
        if tuple(value.shape) != tuple(variable.shape):
            raise StateError(
                f"The checkpoint belongs to another model: {name} has the shape "
                f"{tuple(value.shape)} there and {tuple(variable.shape)} here."
            )
    for name, variable in variables.items():
        dtype = keras.backend.standardize_dtype(variable.dtype)
        variable.assign(np.asarray(read(name)).astype(np.dtype(dtype)))
    if _RANDOM in names:
        backend.set_random_state(read(_RANDOM))
