"""Low-rank updates of layers: y = x W + s (x A) B.

The update is a path of its own, never a merged kernel, so that no gradient of the size
of W is ever formed (Hu et al. 2021, arXiv:2106.09685). Factors are 2-D, as in PEFT.
"""

import math
import zlib

import keras
from keras import ops

from gemma_keras import backend

# The adapter whose factors bear no name but lora_a and lora_b.
DEFAULT = "default"
HINT = (
    "If it was saved after quantize or enable_lora, call these with the same arguments "
    "first."
)


class Factors:
    """The update of one layer by one adapter.

    Attributes:
        a: variable [in, rank].
        b: variable [rank, out].
        magnitude: variable [out], of DoRA; else None.
        rank: columns of `a`.
        scale: what the product is multiplied by.
        dropout: share of the inputs that training sets to zero.
        stream: number that sets its noise apart from that of other updates.
    """

    def __init__(self, a, b, magnitude, *, scale, dropout, stream):
        self.a, self.b, self.magnitude = a, b, magnitude
        self.rank = a.shape[1]
        self.scale, self.dropout, self.stream = scale, dropout, stream

    @property
    def variables(self):
        """The variables by the names that files give them."""
        named = {"lora_a": self.a, "lora_b": self.b, "lora_magnitude": self.magnitude}
        return {name: x for name, x in named.items() if x is not None}

    def update(self, inputs, noise):
        """What is added to the output for `inputs` [..., in], in their dtype."""
        if noise is not None and self.dropout:
            kept = backend.keep_mask(
                noise, self.stream, ops.shape(inputs), 1.0 - self.dropout
            )
            kept = ops.cast(kept, inputs.dtype)
            inputs = inputs * kept / ops.cast(1.0 - self.dropout, inputs.dtype)
        projected = backend.matmul(inputs, self.a)
        return self.finish(ops.cast(projected, inputs.dtype))

    def finish(self, projected):
        """The update, given the inputs times `a`."""
        product = ops.cast(backend.matmul_of_few(projected, self.b), projected.dtype)
        return product * self.scale

    def delta(self):
        """The whole update s A B [in, out]: only merging needs it."""
        return ops.matmul(self.a, self.b) * self.scale


class Adapted:
    """A layer with a weight W [in, out] that can carry low-rank updates.

    A mixin for Keras layers, which call `_prepare_adapters` in their constructor.
    """

    # The factor that begins as zeros, so that a new adapter changes nothing.
    zero_factor = "lora_b"

    def _prepare_adapters(self):
        self.adapters = {}
        self._active = ()
        self._base = None

    @property
    def weight(self):
        """The variable W; None if it is quantised."""
        raise NotImplementedError

    def matrix(self):
        """W [in, out] as numbers, restored if it is quantised."""
        raise NotImplementedError

    def add_adapter(self, name, config, values=None):
        """Add the factors of an adapter, in float32 whatever W is.

        Small steps vanish in bfloat16.

        Args:
            name: of the adapter.
            config: its `LoraConfig`.
            values: arrays by the names of `Factors.variables`, in place of a new start.
        """
        rows, columns = self.weight_shape
        rank = config.rank_of(self.path)
        starts = self._starts(config, rank) if values is None else values
        shapes = {"lora_a": (rows, rank), "lora_b": (rank, columns)}
        if config.dora:
            shapes["lora_magnitude"] = (columns,)
        made = {}
        self._tracker.unlock()
        with self._open_name_scope():
            for key, shape in shapes.items():
                start = starts.get(key, "zeros")
                # A second adapter needs paths of its own.
                if name == DEFAULT:
                    made[key] = _variable(key, shape, start)
                else:
                    with keras.name_scope(name):
                        made[key] = _variable(key, shape, start)
        for variable in made.values():
            self._track_variable(variable)
        self._tracker.lock()
        self.adapters[name] = Factors(
            made["lora_a"],
            made["lora_b"],
            made.get("lora_magnitude"),
            scale=config.scale_of(self.path),
            dropout=config.dropout,
            # The same in a run that resumes, whatever was added before.
            stream=zlib.crc32(f"{self.path}/{name}".encode()) >> 1,
        )
        if config.dora and values is None:
            self.reset_magnitude(name)

    def _starts(self, config, rank):
        """Initializers of the factors; zeros where none is named."""
        if config.init == "gaussian":
            return {"lora_a": keras.initializers.RandomNormal(stddev=1 / rank)}
        if config.init == "he_uniform":
            return {"lora_a": "he_uniform"}
        # Kaiming's with a = sqrt(5), as PEFT: uniform within 1 / sqrt(in).
        bound = 1 / math.sqrt(self.weight_shape[0])
        return {"lora_a": keras.initializers.RandomUniform(-bound, bound)}

    def remove_adapter(self, name):
        """Drop the factors of an adapter."""
        self._active = tuple(n for n in self._active if n != name)
        for variable in self.adapters.pop(name).variables.values():
            self._untrack_variable(variable)

    def activate(self, names):
        """Add the updates of these adapters, and train them alone."""
        self._active = tuple(name for name in names if name in self.adapters)
        if not self.adapters:
            return
        self.trainable = True
        for variable in self.variables:
            variable.trainable = False
        for name in self._active:
            for variable in self.adapters[name].variables.values():
                variable.trainable = True

    def active_factors(self):
        """The `Factors` that are in use."""
        if self._base is not None:
            return []
        return [self.adapters[name] for name in self._active]

    def reset_magnitude(self, name):
        """Let DoRA's magnitude be the norms that the columns have now."""
        factors = self.adapters[name]
        factors.magnitude.assign(self._column_norms(factors))

    def gain(self, factors):
        """DoRA's factor [out] of each column: magnitude / ||W + s A B||.

        The norm counts as a constant, as section 4.3 of the paper has it.
        """
        return factors.magnitude / ops.stop_gradient(self._column_norms(factors))

    def _column_norms(self, factors):
        """||W + s A B|| of each column [out], without forming the sum.

        |w + s A b|^2 = |w|^2 + 2 s (w A) b + s^2 b (A A) b, where A A is [rank, rank].
        """
        a, b = (
            ops.stop_gradient(ops.convert_to_tensor(x)) for x in (factors.a, factors.b)
        )
        across, matrix = ops.transpose(a), self.matrix()
        mixed = ops.sum(ops.matmul(across, ops.cast(matrix, "float32")) * b, axis=0)
        own = ops.sum(ops.matmul(ops.matmul(across, a), b) * b, axis=0)
        squares = backend.column_squares(matrix)
        squares = squares + factors.scale * (2.0 * mixed + factors.scale * own)
        return ops.sqrt(ops.maximum(squares, 1e-30))

    def merged_weight(self):
        """W with the active updates added [in, out], in the dtype of the layer."""
        found, matrix = self.active_factors(), self.matrix()
        if not found:
            return ops.cast(matrix, self.variable_dtype)
        total = ops.cast(matrix, "float32")
        for factors in found:
            total = total + factors.delta()
        # At most one of them is DoRA, and then it is alone.
        if found[0].magnitude is not None:
            total = total * self.gain(found[0])
        return ops.cast(total, self.variable_dtype)

    def merge(self):
        """Let W hold the active updates, and keep what it was in the host's memory."""
        if self.active_factors():
            merged = self.merged_weight()
            self._base = backend.host_copy(self.weight)
            self.weight.assign(merged)

    def unmerge(self):
        """Let W be what it was before `merge`, to the last bit."""
        if self._base is not None:
            self.weight.assign(self._base)
            self._base = None

    def forget_base(self):
        """Make `merge` final."""
        self._base = None

    def _own_weights(self):
        """The weights that are no factors."""
        factors = [x for f in self.adapters.values() for x in f.variables.values()]
        return [v for v in self.weights if not any(v is x for x in factors)]

    def _stored_weights(self):
        """The weights that are no factors, by their keys in a file."""
        return {variable.name: variable for variable in self._own_weights()}

    def save_own_variables(self, store):
        """By name, and the kernel as it is without updates."""
        for key, variable in self._stored_weights().items():
            merged = variable is self.weight and self._base is not None
            store[key] = self._base if merged else variable
        self._save_factors(store)

    def load_own_variables(self, store):
        """What `save_own_variables` stored; factors that the file lacks begin anew."""
        own, found = self._stored_weights(), set(store.keys())
        rest = found - own.keys()
        strange = {key for key in rest if "lora_" not in key}
        if own.keys() - found or strange:
            raise ValueError(
                f"The file holds {', '.join(sorted(found)) or 'nothing'} for "
                f"{self.path}, which has {', '.join(sorted(own))}. {HINT}"
            )
        self._check_factors(rest)
        for key, variable in own.items():
            variable.assign(store[key])
        self._load_factors(store)

    def _stored_factors(self):
        """Adapter to its variables by their keys in a file."""
        return {
            name: {
                key if name == DEFAULT else f"{name}:{key}": variable
                for key, variable in factors.variables.items()
            }
            for name, factors in self.adapters.items()
        }

    def _save_factors(self, store):
        for variables in self._stored_factors().values():
            for key, variable in variables.items():
                store[key] = variable

    def _check_factors(self, found):
        """Refuse a file whose factors, `found` by key, are not those of this layer."""
        groups = [set(variables) for variables in self._stored_factors().values()]
        known = set().union(*groups)
        # An adapter that the file lacks as a whole is one without an update yet.
        torn = any(group & found and group - found for group in groups)
        if torn or found - known:
            raise ValueError(
                f"The file holds {', '.join(sorted(found))} for {self.path}, which has "
                f"{', '.join(sorted(known)) or 'no adapter'}. {HINT}"
            )

    def _load_factors(self, store):
        for name, variables in self._stored_factors().items():
            if set(variables) <= set(store.keys()):
                for key, variable in variables.items():
                    variable.assign(store[key])
                continue
            # One factor alone is zero: without either, nothing could be learned.
            factors = self.adapters[name]
            zero = factors.variables[self.zero_factor]
            zero.assign(ops.zeros(zero.shape, dtype="float32"))
            if factors.magnitude is not None:
                self.reset_magnitude(name)


def _variable(name, shape, start):
    """A float32 variable that begins as an array, or by an initializer."""
    if not isinstance(start, str) and not callable(start):
        start = ops.convert_to_tensor(start, dtype="float32")
    return keras.Variable(
        start if not isinstance(start, str) else keras.initializers.get(start),
        shape=shape,
        dtype="float32",
        name=name,
    )
