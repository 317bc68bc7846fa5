"""The low-rank adapters of one model: several at once, some of them in use."""

import contextlib
import dataclasses
import re

import keras
import numpy as np

from gemma_keras import backend
from gemma_keras.lora import DEFAULT
from gemma_keras.lora_config import LoraConfig, for_layers
from gemma_keras.projection import adapted_layers

# As PEFT, which puts names into the paths of modules, so without dots.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")


class Adapters:
    """Every adapter of a backbone, by name.

    Attributes:
        configs: name to `LoraConfig`.
        active: names of the adapters in use. The model is computed with the sum of
            their updates, and training changes them alone.
        merged: whether the kernels hold the active updates for the time being.
    """

    def __init__(self, backbone):
        self._backbone = backbone
        self._layers = adapted_layers(backbone)
        self.configs, self.active, self.merged = {}, (), False
        self._trained = None
        self._version = 0

    @property
    def state(self):
        """A hashable value; what was compiled under another one is out of date."""
        return self._version, self.active, self.merged

    def layers(self, name):
        """Path to each layer that the adapter `name` updates."""
        self.check_known(name)
        return {
            path: layer
            for path, layer in self._layers.items()
            if name in layer.adapters
        }

    def add(self, name, config, values=None):
        """Add an adapter and use it alone.

        Args:
            name: of the adapter.
            config: a `LoraConfig`.
            values: path of each layer to arrays by the names of `Factors.variables`;
                a new start if None.

        Raises:
            ValueError: it cannot be added, and nothing was changed.
        """
        self.check_unmerged("Adding an adapter")
        self._check_new(name)
        config.check_layers(self._layers)
        if self._trained is None:
            self._freeze()
        self._add_to_layers(name, config, values)
        if config.dropout and self._backbone.seed_generator is None:
            self._backbone.make_seed_generator()
        self.configs[name] = config
        self._version += 1
        self.activate(name)

    def _add_to_layers(self, name, config, values):
        added = []
        try:
            for path, layer in self._layers.items():
                if config.adapts(path):
                    layer.add_adapter(name, config, values and values[path])
                    added.append(layer)
        except BaseException:
            # Memory may have run out.
            for layer in added:
                layer.remove_adapter(name)
            if not self.configs:
                self._unfreeze()
            raise

    def _check_new(self, name):
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(
                "An adapter's name is made of letters, digits, - and _, at most 64, "
                f"got {name!r}."
            )
        if name in self.configs:
            raise ValueError(
                f"This model already has LoRA enabled under the name {name!r}: give "
                f"another name, or call delete_adapter({name!r}) first."
            )

    def _freeze(self):
        # Leaf by leaf: a frozen parent would freeze the factors too.
        self._trained = [
            (layer, [v for v in layer.variables if v.trainable])
            for layer in self._backbone._flatten_layers(include_self=False)
            if not layer._layers and layer.trainable
        ]
        for layer, _ in self._trained:
            layer.trainable = False

    def _unfreeze(self):
        for layer, variables in self._trained:
            layer.trainable = True
            # TensorFlow passes over what the layer is already.
            for variable in variables:
                variable.trainable = True
        self._trained = None

    def remove(self, name):
        """Delete an adapter; without any, the model trains as it did before."""
        self.check_unmerged("Deleting an adapter")
        for layer in self.layers(name).values():
            layer.remove_adapter(name)
        del self.configs[name]
        self._version += 1
        self.activate([n for n in self.active if n != name])
        if not self.configs:
            self._unfreeze()

    def activate(self, names):
        """Use these adapters: a name, several, or None for the model alone."""
        names = self.check_names(names)
        self.check_unmerged("Switching adapters")
        dora = [name for name in names if self.configs[name].dora]
        if dora and len(names) > 1:
            raise ValueError(
                f"{dora[0]} is a DoRA, which rescales the whole weight: it cannot be "
                "used together with another adapter."
            )
        self.active = names
        for layer in self._layers.values():
            layer.activate(names)

    def check_names(self, names):
        """The names as a tuple; `ValueError` for one that is unknown or repeated."""
        if names is None:
            return ()
        names = (names,) if isinstance(names, str) else tuple(names)
        for name in names:
            self.check_known(name)
        if len(set(names)) != len(names):
            raise ValueError(f"An adapter is named twice in {list(names)}.")
        return names

    def check_known(self, name):
        """Raise `ValueError` if there is no adapter of this name."""
        if name not in self.configs:
            there = ", ".join(self.configs) or "none: call enable_lora first"
            raise ValueError(f"There is no adapter called {name!r}; there is {there}.")

    def check_unmerged(self, action):
        """Raise `ValueError` if an adapter is merged; `action` is what that forbids."""
        if self.merged:
            raise ValueError(
                f"{action} is not possible while one is merged: call unmerge_adapter() "
                "first."
            )

    @contextlib.contextmanager
    def disabled(self):
        """Within this context the model is what it is without adapters."""
        before = self.active
        self.activate(None)
        try:
            yield
        finally:
            self.activate(before)

    def combine(self, weights, name):
        """Add the weighted sum of adapters as an adapter of its own, and use it alone.

        The sum is exact: ranks add up. It keeps no link to what it was made of.

        Args:
            weights: name to weight, which may be negative.
            name: of the sum.
        """
        names = self.check_names(tuple(weights))
        if not names:
            raise ValueError("weights must name at least one adapter.")
        for part in names:
            if self.configs[part].dora:
                raise ValueError(f"{part} is a DoRA, which is no summand.")
            if not np.isfinite(weights[part]):
                raise ValueError(f"The weight of {part} is {weights[part]!r}.")
        values = {}
        for path, layer in self._layers.items():
            parts = [layer.adapters[n] for n in names if n in layer.adapters]
            shares = [weights[n] for n in names if n in layer.adapters]
            if parts:
                pairs = list(zip(parts, shares, strict=True))
                values[path] = {
                    "lora_a": np.concatenate([_array(f.a) for f, _ in pairs], axis=1),
                    "lora_b": np.concatenate(
                        [_array(f.b) * (f.scale * share) for f, share in pairs]
                    ),
                }
        ranks = {path: made["lora_b"].shape[0] for path, made in values.items()}
        config = for_layers(ranks, ranks, self._backbone.config)
        self.add(
            name, dataclasses.replace(config, alpha=None, alpha_pattern={}), values
        )

    def merge(self, discard=False):
        """Let the kernels hold the active updates, which then cost nothing more.

        The kernels as they were are kept in the host's memory, so that `unmerge` is
        exact. The embedding's update is left as it is: merged, it would change the
        output head, which is the same table.

        Args:
            discard: keep neither them nor any adapter. This is final.
        """
        self.check_unmerged("Merging")
        if not self.active:
            raise ValueError("No adapter is in use, so there is nothing to merge.")
        self._check_mergeable(discard)
        done = []
        try:
            for layer in self._projections():
                done.append(layer)
                layer.merge()
        except BaseException:
            for layer in done:
                layer.unmerge()
            raise
        if discard:
            for layer in done:
                layer.forget_base()
            for name in tuple(self.configs):
                self.remove(name)
            return
        self.merged = True

    def _check_mergeable(self, discard):
        embedding = self._backbone.token_embedding
        if discard and embedding.active_factors():
            raise ValueError(
                "The embedding's update cannot be merged for good: the output head is "
                "the same table, and gets no update. Keep the adapter (discard=False)."
            )
        for layer in self._projections():
            if layer.active_factors() and layer.packed is not None:
                raise ValueError(
                    f"{layer.path} is quantised, so that a merged kernel would lose "
                    "most of the update to rounding. Keep the adapter; save and export "
                    "write it merged, in floats; or load without quantize, then "
                    "load_adapter and merge."
                )

    def _projections(self):
        embedding = self._backbone.token_embedding
        return [layer for layer in self._layers.values() if layer is not embedding]

    def unmerge(self):
        """Undo `merge`, to the last bit."""
        if not self.merged:
            raise ValueError("No adapter is merged.")
        for layer in self._projections():
            layer.unmerge()
        self.merged = False

    def get_config(self):
        """What `restore` makes the same adapters of, without their weights."""
        if not self.configs:
            return None
        configs = {name: dataclasses.asdict(c) for name, c in self.configs.items()}
        return {"adapters": configs, "active": list(self.active)}

    def restore(self, config):
        """Add the adapters that `get_config` described, with new weights."""
        for name, fields in config["adapters"].items():
            self.add(name, LoraConfig(**fields))
        self.activate(config["active"])

    def weights(self, name):
        """Path of each layer to numpy arrays by the names of `Factors.variables`."""
        return {
            path: {
                key: _array(variable)
                for key, variable in layer.adapters[name].variables.items()
            }
            for path, layer in self.layers(name).items()
        }

    def only_active(self):
        """Name of the one adapter in use; `ValueError` if there is none, or several."""
        if not self.configs:
            raise ValueError(
                "There is no low-rank update to save: call enable_lora first."
            )
        if len(self.active) != 1:
            raise ValueError(
                f"{len(self.active)} adapters are in use: say which of "
                f"{', '.join(self.configs)} is meant."
            )
        return self.active[0]


class Adaptable:
    """What a backbone can do with adapters; a mixin for `GemmaBackbone`."""

    def _prepare_adapters(self):
        self.seed_generator = None
        self.adapters = Adapters(self)

    def make_seed_generator(self):
        """Give dropout a state of its own, which is saved with the weights."""
        self._tracker.unlock()
        self.seed_generator = keras.random.SeedGenerator(name="adapter_dropout")
        self._tracker.lock()

    def draw_noise(self, training):
        """What dropout in this pass draws on; None if nothing is dropped."""
        dropped = any(self.adapters.configs[n].dropout for n in self.adapters.active)
        if not training or not dropped or self.adapters.merged:
            return None
        return backend.noise_seed(self.seed_generator.next())

    def enable_lora(self, rank, target_layer_names=None, alpha=None):
        """Freeze the model and train low-rank updates of some projections.

        This is KerasHub's way in; `GemmaCausalLM.enable_lora` has all the options.

        Args:
            rank: columns of the first factor.
            target_layer_names: names of projections, `("query", "value")` by default;
                also `key`, `attention_output`, `ffw_gating`, `ffw_gating_2`,
                `ffw_linear`, `token_embedding`; or patterns, see `LoraConfig`.
            alpha: the update is multiplied by `alpha / rank`; `rank` by default.
        """
        config = LoraConfig(
            rank=rank, alpha=alpha, targets=target_layer_names, init="he_uniform"
        )
        self.adapters.add(DEFAULT, config)

    def save_lora_weights(self, filepath):
        """Write the adapter in use to a `.lora.h5` file."""
        # A door upstairs, opened when it is called: the model knows no files.
        from gemma_keras.checkpoints import lora_file

        name = self.adapters.only_active()
        lora_file.write(
            filepath, self.adapters.configs[name], self.adapters.weights(name)
        )

    def load_lora_weights(self, filepath):
        """Read a `.lora.h5` file, of this package or KerasHub's, enabling LoRA for it.

        Where LoRA is enabled, it must be as in the file, and its weights are replaced.
        """
        from gemma_keras.checkpoints import lora_file

        config, values = lora_file.read(filepath, self.config)
        of = self.adapters.configs.get(DEFAULT)
        if of is None:
            self.adapters.add(DEFAULT, config, values)
            return
        layers = self.adapters.layers(DEFAULT)

        def layout(lora):
            return lora.dora, {p: (lora.rank_of(p), lora.scale_of(p)) for p in layers}

        if layers.keys() != values.keys() or layout(of) != layout(config):
            raise ValueError(f"{filepath}: holds {config}, but the model has {of}.")
        for path, layer in layers.items():
            for key, variable in layer.adapters[DEFAULT].variables.items():
                variable.assign(values[path][key])

    def load_weights(self, *args, **kwargs):
        """As `keras.Model.load_weights`; not while an adapter is merged."""
        self.adapters.check_unmerged("Loading weights")
        super().load_weights(*args, **kwargs)

    def save_own_variables(self, store):
        super().save_own_variables(store)
        if self.seed_generator is not None:
            store["adapter_dropout"] = self.seed_generator.state

    def load_own_variables(self, store):
        names = set(store.keys())
        rest = {name: store[name] for name in names - {"adapter_dropout"}}
        super().load_own_variables(rest)
        if self.seed_generator is not None and "adapter_dropout" in names:
            self.seed_generator.state.assign(store["adapter_dropout"])


def _array(variable):
    return np.asarray(backend.to_numpy(variable), "float32")
