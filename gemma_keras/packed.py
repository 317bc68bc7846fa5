"""A frozen matrix in 8 or 4 bits, and its products.

Numbers are restored where they are used, a run of rows at a time that fits the cache,
so that memory and bandwidth are those of the codes; and again for the backward pass,
for which nothing is kept.
"""

import dataclasses
import math
import re
from collections.abc import Callable

import numpy as np
from keras import ops

from gemma_keras import backend, distribution
from gemma_keras.quantization import Packing, Quantization

# Restored numbers at a time, in bytes of float32: what decoding reads again at once
# should still be in the cache, and what many rows of activations share may be larger.
FEW_BYTES, MANY_BYTES = 2**22, 2**26
FEW_ROWS = 16


@dataclasses.dataclass(frozen=True)
class PackedStart:
    """What an `init` answers for a weight that is to be kept in few bits.

    Attributes:
        packing: a `Packing`.
        read: makes the arrays of `pack`, given the matrix's shape; None for zeros.
    """

    packing: Packing
    read: Callable | None = None


class PackedMatrix:
    """A matrix [rows, columns] in few bits, as Keras variables of a layer.

    Attributes:
        packing: a `Packing`.
        variables: names, such as `codes`, to variables, as `Packing.shapes` has them.
        shape: `(rows, columns)`.
    """

    def __init__(self, layer, prefix, packing, shape, arrays=None):
        """Adds the variables to a layer.

        Args:
            layer: a Keras layer, whose path they get.
            prefix: what their names begin with, such as `kernel`.
            packing: a `Packing`.
            shape: `(rows, columns)`.
            arrays: what `pack` made; zeros if None.
        """
        self.packing, self.shape = packing, tuple(shape)
        self.variables = {}
        self._for_kernels = None
        divided = arrays is not None and distribution.is_set()
        begin_empty = arrays is None or divided
        layer._tracker.unlock()
        for name, (size, dtype) in packing.shapes(*shape).items():
            self.variables[name] = layer.add_weight(
                name=f"{prefix}_{name}",
                shape=size,
                dtype=dtype,
                initializer="zeros" if begin_empty else _reader(arrays[name]),
                trainable=False,
                autocast=False,
            )
            if divided:
                distribution.fill(self.variables[name], arrays[name])
        layer._tracker.lock()

    @property
    def codes(self):
        """The variable of the codes."""
        return next(iter(self.variables.values()))

    def stored(self):
        """The tensors, codes first."""
        return tuple(ops.convert_to_tensor(v) for v in self.variables.values())

    def whole(self):
        """The matrix, float32 [rows, columns]."""
        return self.restored(self.stored(), "float32")

    def rows(self, indices, dtype):
        """Rows [..., columns] of integers [...]."""
        parts = [ops.take(part, indices, axis=0) for part in self.stored()]
        flat = [backend.reshape(part, (-1, part.shape[-1])) for part in parts]
        found = self.restored(flat, dtype)
        return backend.reshape(found, (*ops.shape(indices), self.shape[1]))

    def restored(self, parts, dtype):
        """Numbers [r, columns] of rows of what is stored, rounded to `dtype` last."""
        codes, scales = parts[0], ops.cast(parts[1], "float32")
        if self.packing.bits == 8:
            return ops.cast(ops.cast(codes, "float32") * scales, dtype)
        low, high = ops.bitwise_and(codes, 15), ops.right_shift(codes, 4)
        codes = ops.cast(ops.concatenate([low, high], axis=1), "float32")
        numbers = backend.reshape(codes, (-1, scales.shape[1], self.packing.group_size))
        # On torch in place.
        numbers *= scales[..., None]
        numbers += ops.cast(parts[2], "float32")[..., None]
        return ops.cast(backend.reshape(numbers, (-1, self.shape[1])), dtype)

    def to_rows(self, x):
        """`x` [..., columns] times the transposed matrix: [..., rows]."""
        return self._product(x, transposed=True)

    def to_columns(self, x):
        """`x` [..., rows] times the matrix: [..., columns]."""
        return self._product(x, transposed=False)

    def _product(self, x, transposed):
        shape = ops.shape(x)
        flat = backend.reshape(x, (-1, x.shape[-1]))
        parts = self.stored()

        def forward(x, *parts):
            return self._multiply(x, parts, transposed), parts

        def backward(slopes, *parts):
            return self._multiply(slopes, parts, not transposed), *[None] * len(parts)

        if backend.may_be_differentiated():
            product = backend.with_gradient(forward, backward, flat, *parts)
        else:
            product = self._multiply(flat, parts, transposed)
        width = self.shape[0] if transposed else self.shape[1]
        return backend.reshape(product, (*shape[:-1], width))

    def _multiply(self, x, parts, transposed):
        """As `_product`, for `x` [n, ...], without a gradient."""
        rows, columns = self.shape
        few = x.shape[0] is not None and x.shape[0] <= FEW_ROWS
        if transposed and backend.has_packed_kernels(x, self.packing.bits):
            packed = self._packed_for_kernels(parts)
            if packed is not None:
                return backend.packed_product(x, packed, self.packing.group_size)
        # A run has as many rows of each device's part, where there are several.
        devices = distribution.parts_of_rows(self.codes)
        most = (FEW_BYTES if few else MANY_BYTES) // (4 * columns)
        step = _divisor(rows // devices, most)
        if step * devices < rows:
            return self._multiply_in_runs(x, parts, transposed, step, devices)
        # XLA would restore what does not depend on `x` at the beginning of a program,
        # all matrices at once, and keep it for the backward pass.
        parts = (backend.not_before(parts[0], x), *parts[1:])
        return backend.matmul(x, self.restored(parts, x.dtype), transposed)

    def _packed_for_kernels(self, parts):
        """The matrix as the backend's own kernels read it; None if there are none."""
        return self._kept_for_kernels([self], lambda: parts)

    def _kept_for_kernels(self, matrices, parts):
        """What `backend.packed_matrix` made of `parts()`, which are of `matrices`."""
        now = backend.identities([v for m in matrices for v in m.variables.values()])
        if self._for_kernels is None or self._for_kernels[0] != now:
            codes, scales, offsets = (*parts(), None)[:3]
            packed = backend.packed_matrix(
                codes, scales, offsets, self.packing.group_size
            )
            self._for_kernels = now, packed
        return self._for_kernels[1]

    def _multiply_in_runs(self, x, parts, transposed, step, devices):
        """As `_multiply`, `step` rows of each device's part of the matrix at a time."""
        count, rows = ops.shape(x)[0], self.shape[0] // devices
        parts = [backend.reshape(p, (devices, rows, p.shape[1])) for p in parts]
        if transposed:
            made = backend.zeros_not_before(x, (count, devices, rows))
        else:
            made = backend.zeros_not_before(x, (count, self.shape[1]))
            x = backend.reshape(x, (count, devices, rows))

        def turn(state):
            start, made = state
            run = [
                ops.slice(p, (0, start, 0), (devices, step, p.shape[2])) for p in parts
            ]
            run = [backend.reshape(p, (devices * step, p.shape[2])) for p in run]
            matrix = self.restored(run, x.dtype)
            if transposed:
                product = backend.reshape(
                    backend.matmul(x, matrix, True), (count, devices, step)
                )
                made = backend.write_slots(made, product, start, axis=2)
            else:
                share = ops.slice(x, (0, 0, start), (count, devices, step))
                share = backend.reshape(share, (count, devices * step))
                made = made + ops.cast(backend.matmul(share, matrix), "float32")
            return start + step, made

        _, made = backend.loop(lambda s: s[0] < rows, turn, (backend.counter(0), made))
        made = backend.reshape(made, (count, -1))
        return ops.cast(made, x.dtype)


def products_together(matrices, x):
    """`to_rows` of several `PackedMatrix`es, for the same `x` [..., columns], at once.

    Returns:
        A list; None where the backend has no kernel that serves.
    """
    first = matrices[0]
    alike = first.packing.bits == 4 and len({m.packing for m in matrices}) == 1
    # Only where there are kernels are all sizes known.
    if not (alike and backend.has_packed_kernels(x, first.packing.bits)):
        return None
    count = math.prod(x.shape[:-1])

    def parts():
        together = zip(*(matrix.stored() for matrix in matrices), strict=True)
        return [ops.concatenate(part, axis=0) for part in together]

    packed = first._kept_for_kernels(matrices, parts)
    if packed is None:
        return None
    flat = backend.reshape(x, (count, x.shape[-1]))
    product = backend.packed_product(flat, packed, first.packing.group_size)
    ends = np.cumsum([matrix.shape[0] for matrix in matrices])
    return [
        backend.reshape(part, (*x.shape[:-1], part.shape[-1]))
        for part in ops.split(product, ends[:-1].tolist(), axis=1)
    ]


def _divisor(rows, most):
    """The most rows that divide `rows`, up to `most`; `rows` if they would be few.

    Gemma's vocabularies have many divisors; a prime one is restored as a whole.
    """
    if rows <= most:
        return rows
    found = next(d for d in range(max(most, 1), 0, -1) if rows % d == 0)
    return found if 16 * found >= most else rows


def _reader(array):
    return lambda shape, dtype: backend.tensor_from_array(array, dtype)


class Packable:
    """A layer with a matrix that may be packed; a mixin for Keras layers.

    Attributes:
        packed: the `PackedMatrix`, or None while it is a variable of floats.
    """

    packed = None

    def _start_packed(self, prefix, start, shape):
        """Build the layer around a matrix [rows, columns] that is packed already."""
        arrays = None if start.read is None else start.read(shape)
        self.packed = PackedMatrix(self, prefix, start.packing, shape, arrays)

    def _pack(self, prefix, variable, packing, arrays):
        """Replace `variable` by what `quantization.pack` made of it."""
        shape = variable.shape[::-1] if prefix == "kernel" else variable.shape
        self._untrack_variable(variable)
        self.packed = PackedMatrix(self, prefix, packing, shape, arrays)


class Quantizable:
    """What a backbone with `Packable` layers can do; a mixin for `GemmaBackbone`."""

    def _packable(self):
        """Path to each layer with a matrix."""
        return {
            layer.path: layer
            for layer in self._flatten_layers(include_self=False)
            if isinstance(layer, Packable)
        }

    @property
    def packings(self):
        """Path of each quantised layer to its `Packing`."""
        layers = self._packable().items()
        return {path: layer.packed.packing for path, layer in layers if layer.packed}

    def quantize(
        self,
        mode=None,
        config=None,
        filters=None,
        group_size=None,
        embedding=None,
        type_check=True,
    ):
        """Keep matrices in 8 or 4 bits from now on; activations stay floats.

        The weights are rounded to the nearest code and frozen: what can be trained
        then are low-rank adapters.

        Args:
            mode: `"int8"` or `"int4"`.
            config: in its place, `keras.quantizers.Int8QuantizationConfig` or
                `Int4QuantizationConfig`, whose `block_size` is taken.
            filters: regular expression, or a list of them, for the paths of the layers
                to quantise; all by default.
            group_size: columns that share a scale in int4, 128 by default.
            embedding: mode of the embedding, if it is another.
            type_check: not used; Keras passes it.

        Raises:
            ValueError: another mode, or the model is quantised already, or has adapters
                whose updates are merged.
        """
        self.pack(quantization_of(mode, config, filters, group_size, embedding))

    def pack(self, quantization):
        """Keep matrices as a `Quantization` says, rounded to the nearest."""
        chosen = self.choose(quantization)
        for path, layer in self._packable().items():
            if path in chosen:
                layer.pack(chosen[path])

    def choose(self, quantization):
        """Path of each layer that is to be quantised to its `Packing`.

        Raises:
            ValueError: there is none, or the model is quantised already, or has
                adapters whose updates are merged.
        """
        if self.packings:
            raise ValueError(
                "This model is quantised already: load it again to quantise it in "
                "another way."
            )
        self.adapters.check_unmerged("Quantising")
        chosen = {
            path: quantization.packing(path, layer.columns)
            for path, layer in self._packable().items()
        }
        if not any(chosen.values()):
            raise ValueError(
                f"No layer's path matches {quantization.layers!r}; paths are such as "
                f"{', '.join(list(chosen)[:2])}."
            )
        return {path: packing for path, packing in chosen.items() if packing}


def quantization_of(mode, config, filters=None, group_size=None, embedding=None):
    """The `Quantization` that arguments of `Quantizable.quantize` say."""
    if isinstance(filters, list | tuple):
        filters = "|".join(f"(?:{pattern})" for pattern in filters)
    if group_size is None:
        group_size = getattr(config, "block_size", None) or 128
    return Quantization(mode, group_size, embedding, filters)


def packed_init(init, packings):
    """An `init` that answers for some weights that they are packed, with zeros.

    Args:
        init: for the others.
        packings: path of a layer to its `Packing`.
    """

    def start(path):
        packing = packings.get(path.rsplit("/", 1)[0])
        named = re.search("/(kernel|embeddings)$", path)
        return init(path) if packing is None or not named else PackedStart(packing)

    return start
