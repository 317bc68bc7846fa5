"""What a `GemmaCausalLM` can do with low-rank adapters."""

from gemma_keras import backend
from gemma_keras.checkpoints import peft
from gemma_keras.lora import DEFAULT
from gemma_keras.lora_config import LoraConfig
from gemma_keras.registry import resolve_adapter


class Adaptation:
    """A mixin for `GemmaCausalLM`: adapters by name, their files, and `merge`."""

    def enable_lora(
        self, rank, alpha=None, dropout=0.0, targets=None, *, name=DEFAULT, **options
    ):
        """Freeze the model and train low-rank updates of some layers: a new adapter.

        Args:
            rank: columns of the first factor.
            alpha: updates are multiplied by `alpha / rank`; `rank` by default.
            dropout: share of an update's inputs that training sets to zero.
            targets: what to update: names (`"query"`, or PEFT's `"q_proj"`),
                `"all-linear"`, or regular expressions such as
                `"decoder_block_[0-3]/.*"`, one or a list; queries and values by
                default. `"token_embedding"` updates the rows that are looked up.
            name: of the adapter.
            **options: further fields of `LoraConfig`: `rslora`, `dora`, `init`,
                `rank_pattern`, `alpha_pattern`.

        Raises:
            ValueError: an argument makes no adapter; nothing was changed.
        """
        config = LoraConfig(
            rank=rank, alpha=alpha, dropout=dropout, targets=targets, **options
        )
        self.backbone.adapters.add(name, config)

    @property
    def adapters(self):
        """Name to `LoraConfig` of every adapter."""
        return dict(self.backbone.adapters.configs)

    @property
    def active_adapters(self):
        """Names of the adapters in use."""
        return self.backbone.adapters.active

    def set_adapter(self, names):
        """Use one adapter, or the sum of several, or None; training changes these.

        After training with others, call `compile` again: an optimizer belongs to the
        weights that it has seen.
        """
        self.backbone.adapters.activate(names)

    def disable_adapter(self):
        """A context within which the model is what it is without adapters."""
        return self.backbone.adapters.disabled()

    def combine_adapters(self, weights, *, name):
        """Add the weighted sum of adapters, name to weight, as a new one, and use it.

        The sum is exact: ranks add up.
        """
        self.backbone.adapters.combine(weights, name)

    def delete_adapter(self, name):
        """Delete an adapter; without any, the model trains as it did before."""
        self.backbone.adapters.remove(name)

    def merge_adapter(self, *, discard=False):
        """Let the kernels hold the updates in use, so that these cost nothing.

        Kernels are kept as they were, in the host's memory, for `unmerge_adapter`.
        The update of the embedding stays apart: the output head shares its table.

        Args:
            discard: keep neither them nor any adapter. This is final.
        """
        self.backbone.adapters.merge(discard)

    def unmerge_adapter(self):
        """Undo `merge_adapter`, to the last bit."""
        self.backbone.adapters.unmerge()

    def save_adapter(self, directory, name=None, *, base_model=None, overwrite=False):
        """Write an adapter as PEFT does: `adapter_config.json` and safetensors.

        Args:
            directory: where to; it appears when it is complete.
            name: which one; the adapter in use by default.
            base_model: the model that it belongs to, as Hugging Face calls it, such as
                `"google/gemma-2b"`, for those who load it elsewhere; by default what
                it was loaded as, if that tells.
            overwrite: replace an adapter that is there.
        """
        adapters = self.backbone.adapters
        name = adapters.only_active() if name is None else name
        weights = adapters.weights(name)
        peft.write(
            directory,
            peft.Adapter(adapters.configs[name], weights),
            self.config,
            base_model=base_model or self.provenance.base_model,
            provenance=self.provenance,
            overwrite=overwrite,
        )

    def load_adapter(self, directory, name=DEFAULT):
        """Add an adapter that PEFT or `save_adapter` wrote, and use it alone.

        Args:
            directory: its directory, or a hub's handle such as `"hf://me/my-adapter"`.
            name: what it is called here.

        Raises:
            ValueError: the files are damaged or belong to another model, or there is
                an adapter of this name; nothing was changed.
        """
        adapters = self.backbone.adapters

        def table():
            return backend.to_numpy(self.backbone.token_embedding.matrix())

        found = peft.read(resolve_adapter(directory), self.config, table)
        adapters.add(name, *found)

    def load_weights(self, *args, **kwargs):
        """As `keras.Model.load_weights`; not while an adapter is merged."""
        self.backbone.adapters.check_unmerged("Loading weights")
        super().load_weights(*args, **kwargs)

    def make_train_function(self, force=False):
        """As `keras.Model`'s, but anew where adapters have changed since."""
        return super().make_train_function(force=self._outdated("train") or force)

    def make_test_function(self, force=False):
        """As `keras.Model`'s, but anew where adapters have changed since."""
        return super().make_test_function(force=self._outdated("test") or force)

    def make_predict_function(self, force=False):
        """As `keras.Model`'s, but anew where adapters have changed since."""
        return super().make_predict_function(force=self._outdated("predict") or force)

    def _outdated(self, kind):
        seen = self.__dict__.setdefault("_adapters_compiled_for", {})
        state = self.backbone.adapters.state
        outdated = seen.get(kind, state) != state
        seen[kind] = state
        return outdated
