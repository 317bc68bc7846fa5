"""The layers with a matrix, which low-rank updates can be added to."""

import keras
from keras import ops

from gemma_keras import backend
from gemma_keras.lora import HINT, Adapted


class Projection(Adapted, keras.layers.Dense):
    """A dense layer without bias, kernel [in, out], and its updates.

    Args:
        units: size of the output.
        init: function from the path of a weight to its initializer.
    """

    def __init__(self, units, init, **kwargs):
        super().__init__(units, use_bias=False, **kwargs)
        self.init = init
        self._prepare_adapters()

    def build(self, input_shape):
        self.kernel_initializer = keras.initializers.get(
            self.init(f"{self.path}/kernel")
        )
        super().build(input_shape)

    @property
    def weight(self):
        """The variable of the kernel."""
        return self._kernel

    def __call__(self, inputs, noise=None):
        # Where it can be helped, not Keras' way in: it costs torch more than a product.
        return self.call(inputs, noise)

    def call(self, inputs, noise=None):
        """`inputs` [..., in] to [..., out]; `noise` is for dropout, None without."""
        outputs = self.multiply(inputs)
        for factors in self.active_factors():
            outputs = outputs + factors.update(inputs, noise)
            if factors.magnitude is not None:
                outputs = outputs * ops.cast(self.gain(factors), outputs.dtype)
        return outputs

    def multiply(self, inputs):
        """`inputs` [..., in] times the kernel alone, which may be quantised."""
        if self.quantization_mode is not None:
            return super().__call__(inputs)
        return ops.cast(backend.matmul(inputs, self.kernel), inputs.dtype)

    def save_own_variables(self, store):
        # By name, which Dense does not do, and the kernel as it is without updates.
        for variable in self._own_weights():
            merged = variable is self._kernel and self._base is not None
            store[variable.name] = self._base if merged else variable
        self._save_factors(store)

    def load_own_variables(self, store):
        own, found = self._own_weights(), set(store.keys())
        names = {variable.name for variable in own}
        if names - found:
            raise ValueError(
                f"The file holds {sorted(found)} for {self.path}, which has "
                f"{sorted(names)}. {HINT}"
            )
        self._check_factors(found - names)
        for variable in own:
            variable.assign(store[variable.name])
        self._load_factors(store)


class TokenEmbedding(Adapted, keras.layers.ReversibleEmbedding):
    """Rows for tokens [V, D], which are the output head as well, and their updates.

    An update is added to the rows that are looked up, and not to the head: so PEFT
    does it where the two are tied.
    """

    zero_factor = "lora_a"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._prepare_adapters()

    @property
    def weight(self):
        """The variable of the table."""
        return self._embeddings

    def _starts(self, config, rank):
        # As PEFT, whatever `init` is.
        return {"lora_b": keras.initializers.RandomNormal(stddev=1.0)}

    def lookup(self, token_ids):
        """Rows [..., D] of integers [...], updates included."""
        rows = self(token_ids)
        for factors in self.active_factors():
            found = ops.take(ops.cast(factors.a, rows.dtype), token_ids, axis=0)
            rows = rows + factors.finish(found)
            if factors.magnitude is not None:
                rows = rows * ops.cast(self.gain(factors), rows.dtype)
        return rows

    def quantize(self, mode=None, type_check=True, config=None):
        """As Keras' class, which checks that it is not a subclass."""
        super().quantize(mode, type_check=False, config=config)

    def save_own_variables(self, store):
        super().save_own_variables(store)
        self._save_factors(store)

    def load_own_variables(self, store):
        factors = {key for key in store.keys() if "lora_" in key}  # noqa: SIM118
        self._check_factors(factors)
        super().load_own_variables(store)
        self._load_factors(store)

    def _check_load_own_variables(self, store):
        # Keras expects each weight there, by number; the factors have names, and may
        # be missing.
        found = [key for key in store.keys() if "lora_" not in key]  # noqa: SIM118
        own = self._own_weights()
        if len(found) != len(own):
            names = ", ".join(variable.name for variable in own)
            raise ValueError(
                f"The file holds {len(found)} weights for {self.path}, which has "
                f"{names}. {HINT}"
            )


def adapted_layers(backbone):
    """Path to each `Projection`, and the `TokenEmbedding`, of the backbone."""
    return {
        layer.path: layer
        for layer in backbone._flatten_layers(include_self=False)
        if isinstance(layer, Adapted)
    }
