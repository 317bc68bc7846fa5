"""`GemmaCausalLM`: text in, text out, and `fit()` on text."""

import keras
from keras import ops

from gemma_keras import data, samplers
from gemma_keras.backbone import GemmaBackbone


@keras.saving.register_keras_serializable(package="gemma_keras")
class GemmaCausalLM(keras.Model):
    """A Gemma that predicts the next token, with everything that is done with one.

    Args:
        backbone: a `GemmaBackbone`.
        preprocessor: a `GemmaCausalLMPreprocessor`; without one, every method takes
            and gives token ids.
        logits_dtype: dtype of the logits, `"float32"` or `"compute"` for the compute
            dtype of the model, which halves their memory in bfloat16.

    Calling it on `{"token_ids": [B, T], "padding_mask": [B, T]}` gives logits
    [B, T, V]; `GemmaBackbone.call` lists the other inputs.
    """

    def __init__(self, backbone, preprocessor=None, logits_dtype="float32", **kwargs):
        kwargs.setdefault("dtype", backbone.dtype_policy)
        super().__init__(autocast=False, **kwargs)
        if logits_dtype not in ("float32", "compute"):
            raise ValueError(
                f'logits_dtype must be "float32" or "compute", got {logits_dtype!r}.'
            )
        self.backbone = backbone
        self.preprocessor = preprocessor
        self.logits_dtype = logits_dtype
        self.built = True
        self.compile()

    @property
    def config(self):
        """The `GemmaConfig` of the backbone."""
        return self.backbone.config

    def call(self, inputs):
        logits = self.backbone.logits(self.backbone(inputs))
        compute = self.logits_dtype == "compute"
        return ops.cast(logits, self.compute_dtype if compute else "float32")

    def compile(
        self,
        optimizer="auto",
        loss="auto",
        *,
        weighted_metrics="auto",
        sampler="greedy",
        **kwargs,
    ):
        """Set up training, as `keras.Model.compile`, and the default sampler.

        Args:
            optimizer: `"auto"` is Adam with a learning rate of 2e-5.
            loss: `"auto"` is the cross-entropy of the next token.
            weighted_metrics: `"auto"` is the accuracy of the next token.
            sampler: what `generate` uses if it is not told: a name or a `Sampler`.
            **kwargs: further arguments of `keras.Model.compile`.
        """
        if optimizer == "auto":
            optimizer = keras.optimizers.Adam(2e-5)
        if loss == "auto":
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        if weighted_metrics == "auto":
            weighted_metrics = [keras.metrics.SparseCategoricalAccuracy()]
        super().compile(
            optimizer=optimizer, loss=loss, weighted_metrics=weighted_metrics, **kwargs
        )
        self.sampler = samplers.get(sampler)

    def get_compile_config(self):
        return {
            **super().get_compile_config(),
            "sampler": keras.saving.serialize_keras_object(self.sampler),
        }

    def compile_from_config(self, config):
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.optimizer is not None:
            self.optimizer.build(self.trainable_variables)

    def fit(self, x=None, y=None, *, sample_weight=None, validation_data=None, **kwargs):
        """Train, as `keras.Model.fit`.

        Args:
            x: texts; or `{"prompts": [...], "responses": [...]}`, or chats, each a
                list of messages, whose responses alone are learned; or a dataset of
                batches of these; or anything that Keras takes.
            y: targets, if `x` holds token ids.
            sample_weight: weight of each target, if `x` holds token ids.
            validation_data: in the same forms.
            **kwargs: further arguments of `keras.Model.fit`.
        """
        x, y, sample_weight = data.prepare(x, y, sample_weight, self.preprocessor)
        if validation_data is not None:
            validation_data = self._prepare_validation(validation_data)
        return super().fit(
            x, y, sample_weight=sample_weight, validation_data=validation_data, **kwargs
        )

    def _prepare_validation(self, validation_data):
        if not isinstance(validation_data, tuple):
            validation_data = (validation_data,)
        x, y, weight = (*validation_data, None, None)[:3]
        x, y, weight = data.prepare(x, y, weight, self.preprocessor)
        return x if y is None else (x, y, weight)

    def evaluate(self, x=None, y=None, *, sample_weight=None, **kwargs):
        """Loss and metrics, as `keras.Model.evaluate`; inputs as in `fit`."""
        x, y, sample_weight = data.prepare(x, y, sample_weight, self.preprocessor)
        return super().evaluate(x, y, sample_weight=sample_weight, **kwargs)

    def predict(self, x, **kwargs):
        """Logits, as `keras.Model.predict`; inputs as in `fit`."""
        x, _, _ = data.prepare(x, None, None, self.preprocessor)
        return super().predict(x, **kwargs)

    def get_config(self):
        return {
            "name": self.name,
            "trainable": self.trainable,
            "backbone": keras.saving.serialize_keras_object(self.backbone),
            "preprocessor": keras.saving.serialize_keras_object(self.preprocessor),
            "logits_dtype": self.logits_dtype,
        }

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        for key in ("backbone", "preprocessor"):
            config[key] = keras.saving.deserialize_keras_object(config[key])
        return cls(**config)
