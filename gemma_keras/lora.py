"""Projections that can carry a low-rank update: y = x W + (alpha / rank) (x A) B.

The update is a path of its own, never a merged kernel, so that no gradient of the size
of W is ever formed (Hu et al. 2021, arXiv:2106.09685). Factors are 2-D, as in PEFT.
"""

import json
import pathlib

import h5py
import keras
from keras import ops

from gemma_keras import backend

DEFAULT_TARGETS = ("query", "value")


class Projection(keras.layers.Dense):
    """A dense layer without bias, kernel [in, out], and its optional update.

    Args:
        units: size of the output.
        init: function from the path of a weight to its initializer.
    """

    def __init__(self, units, init, **kwargs):
        super().__init__(units, use_bias=False, **kwargs)
        self.init = init
        self.lora_a = self.lora_b = None

    def build(self, input_shape):
        self.kernel_initializer = keras.initializers.get(
            self.init(f"{self.path}/kernel")
        )
        super().build(input_shape)

    def enable_lora(self, rank, alpha=None):
        """Add the factors A [in, rank] and B [rank, out] and freeze the kernel.

        They are float32 whatever the kernel is: small steps vanish in bfloat16.
        """
        self.lora_rank, self.lora_alpha = rank, alpha or rank
        self._tracker.unlock()
        self.lora_a = self.add_weight(
            name="lora_a",
            shape=(self.kernel.shape[0], rank),
            initializer="he_uniform",
            dtype="float32",
        )
        self.lora_b = self.add_weight(
            name="lora_b",
            shape=(rank, self.units),
            initializer="zeros",
            dtype="float32",
        )
        self._tracker.lock()

    def __call__(self, inputs):
        # Where there is nothing to add, Keras' way in costs torch more than a product.
        if self.quantization_mode is None:
            return self.call(inputs)
        return super().__call__(inputs)

    def call(self, inputs, training=None):
        product = ops.cast(backend.matmul(inputs, self.kernel), inputs.dtype)
        return self._add_update(product, inputs)

    def quantized_call(self, *args, **kwargs):
        return self._add_update(super().quantized_call(*args, **kwargs), args[0])

    def _add_update(self, outputs, inputs):
        if self.lora_a is None:
            return outputs
        a = ops.cast(self.lora_a, inputs.dtype)
        b = ops.cast(self.lora_b, inputs.dtype)
        update = ops.matmul(ops.matmul(inputs, a), b)
        return outputs + update * (self.lora_alpha / self.lora_rank)

    def merged_kernel(self):
        """The kernel [in, out] with the update added, in the dtype of the kernel."""
        if self.lora_a is None:
            return self.kernel
        scale = self.lora_alpha / self.lora_rank
        update = ops.matmul(self.lora_a, self.lora_b) * scale
        merged = ops.cast(self.kernel, "float32") + update
        return ops.cast(merged, self.kernel.dtype)

    def save_own_variables(self, store):
        # By name: Dense would leave the factors out.
        for variable in self.weights:
            store[variable.name] = variable

    def load_own_variables(self, store):
        names = set(store.keys())
        known = {variable.name for variable in self.weights}
        if names - known or known - names - {"lora_a", "lora_b"}:
            raise ValueError(
                f"The file holds {sorted(names)} for {self.path}, which has "
                f"{sorted(known)}. If it was saved after enable_lora, call enable_lora "
                "with the same arguments first."
            )
        for variable in self.weights:
            if variable.name in names:
                variable.assign(store[variable.name])
            elif variable is self.lora_b:
                # A file from before enable_lora: it means no update yet.
                variable.assign(ops.zeros(variable.shape, dtype=variable.dtype))


def projections(backbone):
    """Every `Projection` of the backbone."""
    return [
        layer
        for layer in backbone._flatten_layers(include_self=False)
        if isinstance(layer, Projection)
    ]


def enable_lora(backbone, rank, target_layer_names=None, alpha=None):
    """Freeze `backbone` and give the projections of these names a low-rank update.

    Raises `ValueError`, and changes nothing, if an argument makes no update.
    """
    if not isinstance(rank, int) or isinstance(rank, bool) or rank <= 0:
        raise ValueError(f"rank must be a positive integer, got {rank!r}.")
    if alpha is not None and not alpha > 0:
        raise ValueError(f"alpha must be a positive number, got {alpha!r}.")
    targets = tuple(target_layer_names or DEFAULT_TARGETS)
    known = sorted({layer.name for layer in projections(backbone)})
    unknown = sorted(set(targets) - set(known))
    if unknown:
        raise ValueError(
            f"No projection is called {', '.join(unknown)}. "
            f"target_layer_names may hold: {', '.join(known)}."
        )
    chosen = [layer for layer in projections(backbone) if layer.name in targets]
    if any(layer.lora_a is not None for layer in chosen):
        raise ValueError("This backbone already has LoRA enabled on these layers.")
    # Freeze leaf by leaf: a frozen parent would freeze the factors too.
    for layer in backbone._flatten_layers(include_self=False):
        if not layer._layers:
            layer.trainable = False
    for layer in chosen:
        layer.trainable = True
        layer.enable_lora(rank, alpha)
        layer._kernel.trainable = False


def lora_config(backbone):
    """Arguments of `enable_lora` that give `backbone` its updates; None without."""
    adapted = [layer for layer in projections(backbone) if layer.lora_a is not None]
    if not adapted:
        return None
    return {
        "rank": adapted[0].lora_rank,
        "alpha": adapted[0].lora_alpha,
        "target_layer_names": sorted({layer.name for layer in adapted}),
    }


def save_lora_weights(backbone, filepath):
    """Write the factors, and what `enable_lora` was given, to a `.lora.h5` file."""
    path = _checked_path(filepath)
    config = lora_config(backbone)
    if config is None:
        raise ValueError("There is no low-rank update to save: call enable_lora first.")
    partial = path.with_name(f".{path.name}.partial")
    try:
        with h5py.File(partial, "w") as file:
            file.attrs["gemma_keras"] = json.dumps(config)
            for name, variable in _factors(backbone).items():
                file[name] = ops.convert_to_numpy(variable)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_lora_weights(backbone, filepath):
    """Read a file of `save_lora_weights`, enabling LoRA as it was if need be."""
    path = _checked_path(filepath)
    try:
        with h5py.File(path) as file:
            config = json.loads(file.attrs.get("gemma_keras", "null"))
            values = {}
            file.visititems(
                lambda name, item: (
                    values.update({name: item[()]})
                    if isinstance(item, h5py.Dataset)
                    else None
                )
            )
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: is not a whole HDF5 file ({error}).") from error
    if config is None:
        raise ValueError(
            f"{path}: was not written by save_lora_weights of gemma_keras. KerasHub "
            "factorises each head for itself, which this layout cannot hold."
        )
    present = lora_config(backbone)
    if present is not None and present != config:
        raise ValueError(f"{path}: holds LoRA {config}, but the model has {present}.")
    shapes = _expected_shapes(backbone, config)
    found = {name: value.shape for name, value in values.items()}
    if found != shapes:
        wrong = sorted(set(found.items()) ^ set(shapes.items()))[0]
        raise ValueError(f"{path}: does not fit this model, see {wrong[0]}.")
    if present is None:
        enable_lora(backbone, **config)
    for name, variable in _factors(backbone).items():
        variable.assign(values[name])


def _checked_path(filepath):
    path = pathlib.Path(filepath)
    if not path.name.endswith(".lora.h5"):
        raise ValueError(f"The file's name must end in .lora.h5, got {path.name!r}.")
    return path


def _factors(backbone):
    return {
        variable.path: variable
        for layer in projections(backbone)
        if layer.lora_a is not None
        for variable in (layer.lora_a, layer.lora_b)
    }


def _expected_shapes(backbone, config):
    shapes = {}
    for layer in projections(backbone):
        if layer.name in config["target_layer_names"]:
            rows, columns = layer.kernel.shape
            shapes[f"{layer.path}/lora_a"] = (rows, config["rank"])
            shapes[f"{layer.path}/lora_b"] = (config["rank"], columns)
    return shapes
