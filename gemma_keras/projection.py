"""The layers with a matrix, which low-rank updates can be added to."""

import keras
from keras import ops

from gemma_keras import backend
from gemma_keras.geglu import geglu
from gemma_keras.lora import Adapted
from gemma_keras.packed import Packable, PackedStart, products_together
from gemma_keras.quantization import pack


class Projection(Adapted, Packable, keras.layers.Dense):
    """A dense layer without bias, kernel [in, out], and its updates.

    Args:
        units: size of the output.
        init: function from the path of a weight to its initializer.
    """

    def __init__(self, units, init, **kwargs):
        super().__init__(units, use_bias=False, **kwargs)
        self.init = init
        self.watch = None  # called with the inputs of each product, by who asks for it
        self._prepare_adapters()

    def build(self, input_shape):
        start = self.init(f"{self.path}/kernel")
        self.weight_shape = (input_shape[-1], self.units)
        self.bias = self._kernel = None
        if isinstance(start, PackedStart):
            self._start_packed("kernel", start, self.weight_shape[::-1])
        else:
            self._kernel = self.add_weight(
                name="kernel", shape=self.weight_shape, initializer=start
            )
        self.built = True

    @property
    def weight(self):
        """The variable of the kernel; None if it is quantised."""
        return self._kernel

    def matrix(self):
        """The kernel [in, out]."""
        if self.packed is not None:
            return ops.transpose(self.packed.whole())
        return self._kernel

    @property
    def columns(self):
        """Size of the input, within which quantised groups lie."""
        return self.weight_shape[0]

    def pack(self, packing, arrays=None):
        """Keep the kernel in few bits from now on, as rows of outputs.

        `arrays` are its codes and scales, if it is not to be rounded to the nearest.
        """
        kernel, self._kernel = self._kernel, None
        if arrays is None:
            arrays = pack(backend.to_numpy(kernel).T, packing)
        self._pack("kernel", kernel, packing, arrays)

    def __call__(self, inputs, noise=None):
        # Where it can be helped, not Keras' way in: it costs torch more than a product.
        return self.call(inputs, noise)

    def call(self, inputs, noise=None):
        """`inputs` [..., in] to [..., out]; `noise` is for dropout, None without."""
        return self._updated(self.multiply(inputs), inputs, noise)

    def _updated(self, outputs, inputs, noise):
        """`outputs` of the kernel alone, with what adapters add."""
        for factors in self.active_factors():
            outputs = outputs + factors.update(inputs, noise)
            if factors.magnitude is not None:
                outputs = outputs * ops.cast(self.gain(factors), outputs.dtype)
        return outputs

    def multiply(self, inputs):
        """`inputs` [..., in] times the kernel alone, which may be quantised."""
        if self.watch is not None:
            self.watch(inputs)
        if self.packed is not None:
            product = self.packed.to_rows(inputs)
        else:
            product = backend.matmul(inputs, self.kernel)
        return ops.cast(product, inputs.dtype)


def project_together(projections, inputs, noise=None):
    """What several `Projection`s make of the same `inputs`, a list.

    At once where they are quantised and the backend has a kernel for that.
    """
    products = None
    if all(p.packed is not None and p.watch is None for p in projections):
        products = products_together([p.packed for p in projections], inputs)
    if products is None:
        return [projection(inputs, noise) for projection in projections]
    return [
        projection._updated(product, inputs, noise)
        for projection, product in zip(projections, products, strict=True)
    ]


def project_gated(gating, up, inputs, noise=None):
    """GELU of what one `Projection` makes of `inputs`, times what another does."""
    bare = gating.packed is None and gating.watch is None
    if bare and not gating.active_factors():
        kernel = gating.kernel
        if backend.makes_gelu(inputs, kernel):
            return backend.matmul_gelu(inputs, kernel) * up(inputs, noise)
    return geglu(*project_together([gating, up], inputs, noise))


class TokenEmbedding(Adapted, Packable, keras.layers.ReversibleEmbedding):
    """Rows for tokens [V, D], which are the output head as well, and their updates.

    An update is added to the rows that are looked up, and not to the head: so PEFT
    does it where the two are tied.
    """

    zero_factor = "lora_a"

    def __init__(self, tokens, columns, init, **kwargs):
        super().__init__(tokens, columns, **kwargs)
        self.init = init
        self._prepare_adapters()

    def build(self, input_shape=None):
        start = self.init(f"{self.path}/embeddings")
        self.weight_shape = (self.input_dim, self.output_dim)
        self._embeddings = None
        if isinstance(start, PackedStart):
            self._start_packed("embeddings", start, self.weight_shape)
        else:
            self._embeddings = self.add_weight(
                name="embeddings", shape=self.weight_shape, initializer=start
            )
        self.built = True

    @property
    def weight(self):
        """The variable of the table; None if it is quantised."""
        return self._embeddings

    def matrix(self):
        """The table [V, D]."""
        return self._embeddings if self.packed is None else self.packed.whole()

    @property
    def holder(self):
        """The variable of the table, or of its codes if it is quantised."""
        return self._embeddings if self.packed is None else self.packed.codes

    def stored(self):
        """Tensors [V, ...] that hold the table, its codes first if it is quantised."""
        if self.packed is None:
            return (ops.convert_to_tensor(self._embeddings),)
        return self.packed.stored()

    def restored(self, stored):
        """The rows [r, D] that are held by rows of `stored`, to compute with."""
        if self.packed is None:
            return ops.cast(stored[0], self.compute_dtype)
        return self.packed.restored(stored, self.compute_dtype)

    @property
    def columns(self):
        """Size of a row, within which quantised groups lie."""
        return self.output_dim

    def pack(self, packing):
        """Keep the table in few bits from now on."""
        table, self._embeddings = self._embeddings, None
        arrays = pack(backend.to_numpy(table), packing)
        self._pack("embeddings", table, packing, arrays)

    def call(self, inputs, reverse=False):
        """Rows of token ids; or, in reverse, the products of `inputs` with all rows."""
        if self.packed is None:
            return super().call(inputs, reverse=reverse)
        if reverse:
            return self.packed.to_rows(ops.cast(inputs, self.compute_dtype))
        return self.packed.rows(ops.cast(inputs, "int32"), self.compute_dtype)

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

    def _stored_weights(self):
        # Keras numbers what it keeps of an embedding.
        if self.packed is None:
            return {"0": self._embeddings}
        return super()._stored_weights()


def adapted_layers(backbone):
    """Path to each `Projection`, and the `TokenEmbedding`, of the backbone."""
    return {
        layer.path: layer
        for layer in backbone._flatten_layers(include_self=False)
        if isinstance(layer, Adapted)
    }
