"""`fit()` for language models: what Keras' trainer has to know of tokens.

Three things are not as Keras has them:

- The loss is the mean over the tokens that count, and so is what is reported; Keras
  divides by all B * T positions, so that padding dilutes both.
- The logits of all positions are never made (see `loss.py`), unless the model is
  compiled with a loss or metric that needs them.
- Accumulated gradients are weighted by their tokens (see `optimizers.py`).
"""

import contextlib
import functools

import keras
import ml_dtypes
from keras import ops

from gemma_keras import backend, data, optimizers
from gemma_keras import loss as token_loss
from gemma_keras.packing import EpochDataset

# Parameters from which on TensorFlow trains with XLA on a CPU too. Keras does without
# there: a step takes a third more time, but a small model is trained before XLA has
# compiled it.
XLA_PAYS = 50_000_000
# What Keras' JAX trainer takes out of a model for its loops, in its order.
_GROUPS = (
    "trainable_variables",
    "non_trainable_variables",
    "optimizer_variables",
    "metrics_variables",
)


class TokenMean(keras.metrics.Mean):
    """A mean over tokens, of sums that it is told."""

    def add(self, total, weight):
        """Take in a sum over tokens that weigh `weight` together."""
        self.total.assign_add(ops.cast(total, self.dtype))
        self.count.assign_add(ops.cast(weight, self.dtype))


class TokenMetrics:
    """The loss and the accuracy that come out of one pass.

    Not a Keras object, so that the model does not track the metrics of every
    `compile` that it has ever seen.
    """

    def __init__(self, accuracy_names):
        self.loss = TokenMean("loss")
        self.accuracies = [TokenMean(name) for name in accuracy_names]

    def add(self, totals):
        """Take in the `loss.Totals` of a batch."""
        self.loss.add(ops.stop_gradient(totals.loss), totals.weight)
        for accuracy in self.accuracies:
            accuracy.add(totals.right, totals.weight)


class TokenTrainer(keras.Model):
    """A `keras.Model` with a `backbone`, a `preprocessor` and a loss by tokens."""

    _gives_hidden = False
    _token_metrics = None

    def compile(
        self,
        optimizer="auto",
        loss="auto",
        *,
        weighted_metrics="auto",
        gradient_accumulation_steps=None,
        remat=False,
        **kwargs,
    ):
        """Set up training, as `keras.Model.compile`.

        Args:
            optimizer: `"auto"` is Adam with a learning rate of 2e-5. If it has
                `gradient_accumulation_steps`, they are taken over.
            loss: `"auto"` is the cross-entropy of the next token. It, and
                `SparseCategoricalCrossentropy(from_logits=True)`, is the mean over
                the tokens that count and makes the logits of those alone. Any other
                loss gets logits [B, T, V], and is reduced as Keras does.
            weighted_metrics: `"auto"` is the accuracy of the next token, which comes
                with the loss. Any other metric gets logits [B, T, V].
            gradient_accumulation_steps: batches whose gradients make one step, each
                weighted by its tokens.
            remat: keep only the inputs of each block for the backward pass, and
                compute the rest again: a third more work, for a fraction of the
                memory.
            **kwargs: further arguments of `keras.Model.compile`.
        """
        if optimizer == "auto":
            optimizer = keras.optimizers.Adam(2e-5)
        if loss == "auto":
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        if weighted_metrics == "auto":
            weighted_metrics = [keras.metrics.SparseCategoricalAccuracy()]
        names = _names_of_accuracies(weighted_metrics)
        others = kwargs.get("metrics") or kwargs.get("loss_weights")
        by_token = _is_cross_entropy(loss) and names is not None and not others
        self.backbone.remat = bool(remat)
        self._compile_loss = self._compile_metrics = None
        super().compile(
            optimizer=_accumulating(optimizer, gradient_accumulation_steps),
            loss=None if by_token else loss,
            weighted_metrics=None if by_token else weighted_metrics,
            **kwargs,
        )
        self._token_metrics = TokenMetrics(names) if by_token else None
        # Not serialised yet, for which Keras would import TensorFlow; and in a
        # function, or the metrics would be tracked.
        self._compiled_with = functools.partial(
            dict, loss=loss, weighted_metrics=weighted_metrics, remat=remat
        )

    def _resolve_auto_jit_compile(self):
        chosen = super()._resolve_auto_jit_compile()
        if backend.NAME != "tensorflow" or self._distribute_strategy is not None:
            return chosen
        return chosen or self.backbone.count_params() >= XLA_PAYS

    def get_compile_config(self):
        return {
            **super().get_compile_config(),
            **keras.saving.serialize_keras_object(self._compiled_with()),
            "optimizer_has_state": bool(self.optimizer and self.optimizer.built),
        }

    def compile_from_config(self, config):
        config = keras.saving.deserialize_keras_object(config)
        has_state = config.pop("optimizer_has_state")
        self.compile(**config)
        if has_state:
            self.optimizer.build(self.trainable_variables)

    @property
    def metrics(self):
        if self._token_metrics is None:
            return super().metrics
        return [self._token_metrics.loss, *self._token_metrics.accuracies]

    def get_metrics_result(self):
        results = super().get_metrics_result()
        if self._token_metrics is not None:
            results["perplexity"] = ops.exp(results["loss"])
        return results

    def make_train_function(self, force=False):
        """As Keras; on JAX, what is frozen is not passed around."""
        if not self._compiles_for_jax():
            super().make_train_function(force)
        elif force or self.train_function is None:
            self.train_function = self._compiled_for_jax(self.train_step)

    def make_test_function(self, force=False):
        """As Keras; on JAX, the weights are not passed around."""
        if not self._compiles_for_jax():
            super().make_test_function(force)
        elif force or self.test_function is None:
            self.test_function = self._compiled_for_jax(self.test_step)

    def _compiles_for_jax(self):
        return backend.NAME == "jax" and self.jit_compile and not self.run_eagerly

    def _compiled_for_jax(self, step):
        learns = step == self.train_step
        frozen = {id(v) for v in self.backbone.weights if not (learns and v.trainable)}
        names = [name for name in _GROUPS if learns or name != "optimizer_variables"]
        groups = [self._group(name) for name in names]
        fixed = [{i for i, v in enumerate(g) if id(v) in frozen} for g in groups]
        shardings = None
        if keras.distribution.distribution() is not None:
            shardings = [[v.value.sharding for v in group] for group in groups]

        def keep(state):
            # Past Keras, which would look at every array for layers to track.
            vars(self)["_jax_state"] = dict(zip(names, state, strict=True))

        return self._make_function(backend.compiled_step(step, fixed, shardings, keep))

    def _group(self, name):
        """The variables that Keras' JAX trainer calls by a name of `_GROUPS`."""
        if name == "optimizer_variables":
            return self.optimizer.variables
        return getattr(self, name)

    def _get_jax_state(self, purge_model_variables=False, **wanted):
        # Keras empties the variables and keeps their values in `fit` alone, where an
        # exception before the first step is done would lose them.
        state = super()._get_jax_state(**wanted)
        names = [name for name in _GROUPS if wanted.get(name)]
        vars(self)["_jax_state"] = dict(zip(names, state, strict=True))
        if purge_model_variables:
            self._jax_state_synced = False
            self._purge_model_variables(**wanted)
        return state

    def jax_state_sync(self):
        """As Keras, also with what is left after a step that failed.

        Raises:
            RuntimeError: weights or the optimizer's state are lost.
        """
        if not getattr(self, "_jax_state", None) or self._jax_state_synced:
            return
        lost = sum(
            backend.assign_living(self._group(name), values)
            for name, values in self._jax_state.items()
        )
        self._jax_state_synced = True
        if lost:
            raise RuntimeError(
                f"JAX failed or was interrupted within a step, and {lost} variables "
                "of the model and its optimizer are lost with it. Load the model "
                "again and call compile, or give it a checkpoint with "
                "sft.Checkpoints.restore."
            )

    @contextlib.contextmanager
    def _whole_after_failure(self):
        """On JAX, brings the weights back that Keras leaves away when a step fails.

        `fit` does so itself; the others do not.
        """
        try:
            yield
        except BaseException:
            backend.sync_training(self)
            raise

    def train_step(self, *args):
        """One batch, as Keras has it: `(data)`, or `(state, data)` on JAX."""
        accumulation = _accumulation_of(self.optimizer)
        if accumulation is not None:
            _, y, weight = keras.utils.unpack_x_y_sample_weight(args[-1])
            tokens = [ops.sum(_weights(y, weight))]
            (accumulation.tokens,) = backend.sum_over_replicas(tokens)
        summed = backend.summed_gradients(
            self.optimizer, means=self._token_metrics is None
        )
        with self._giving_hidden(), summed:
            return super().train_step(*args)

    def test_step(self, *args):
        """One batch without learning; arguments as in `train_step`."""
        with self._giving_hidden():
            return super().test_step(*args)

    @contextlib.contextmanager
    def _giving_hidden(self):
        """Have `call` stop before the head, which the loss brings itself."""
        self._gives_hidden = self._token_metrics is not None
        try:
            yield
        finally:
            self._gives_hidden = False

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        if not self._gives_hidden:
            return super().compute_loss(x, y, y_pred, sample_weight, training)
        if y is None:
            raise ValueError(
                "There is nothing to learn: pass text, or token ids as x with y, the "
                "token that follows each position."
            )
        embeddings = self.backbone.token_embedding.weight
        train_head = training and embeddings is not None and embeddings.trainable
        totals = token_loss.cross_entropy(
            y_pred,
            y,
            _weights(y, sample_weight),
            self.backbone,
            train_head=train_head,
        )
        # The mean is over the tokens of all replicas, whose gradients are summed.
        sums = backend.sum_over_replicas(list(map(ops.stop_gradient, totals)))
        everywhere = token_loss.Totals(*sums)
        self._token_metrics.add(everywhere)
        loss = totals.loss / ops.maximum(everywhere.weight, 1e-9)
        others = sum(map(ops.sum, self.losses), start=0.0)
        return loss + others / backend.replicas()

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        # On TensorFlow Keras builds for the mean of the replicas' first batches, and
        # booleans, as masks are, have none.
        if iterator is not None and self._distribute_strategy is not None:
            batches = next(iter(iterator))[-1]
            data_batch = backend.first_batch(self._distribute_strategy, batches)
        super()._maybe_symbolic_build(data_batch=data_batch)

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        if self._gives_hidden:
            return self.get_metrics_result()
        return super().compute_metrics(x, y, y_pred, sample_weight)

    def fit(
        self, x=None, y=None, *, sample_weight=None, validation_data=None, **kwargs
    ):
        """Train, as `keras.Model.fit`.

        Args:
            x: texts; or `{"prompts": [...], "responses": [...]}`, or chats, each a
                list of messages, whose responses alone are learned; or the path of a
                file, rows, columns or a dataset of rows, all that `read_examples`
                takes, or what it gives; or a dataset of batches of these; or a
                `PackedDataset` or `BucketedDataset`; or anything that Keras takes.
                A stream of rows is read whole before the first step, but with
                `steps_per_epoch` as it is needed, `batch_size` rows at a time.
            y: targets, if `x` holds token ids.
            sample_weight: weight of each target, if `x` holds token ids.
            validation_data: in the same forms.
            **kwargs: further arguments of `keras.Model.fit`.
        """
        self._check_trainable()
        self._check_optimizer()
        self._check_scope()
        if isinstance(x, EpochDataset):
            kwargs["callbacks"] = data.with_epochs(kwargs.get("callbacks"), x)
        steps, size = kwargs.get("steps_per_epoch"), kwargs.get("batch_size")
        x, y, sample_weight = data.prepare(
            x, y, sample_weight, self.preprocessor, bool(steps), _streamed(steps, size)
        )
        if data.has_own_order(x):
            kwargs["shuffle"] = False
        if validation_data is not None:
            size = kwargs.get("validation_batch_size") or size
            rows = _streamed(kwargs.get("validation_steps"), size)
            validation_data = self._prepare_validation(validation_data, rows)
        _check_shares(x)
        backend.make_alike(self.trainable_variables)
        backend.build_optimizer(self)
        kwargs |= {"sample_weight": sample_weight, "validation_data": validation_data}
        with backend.giving_back_memory():
            return super().fit(x, y, **kwargs)

    def _check_trainable(self):
        """Refuse to train what the optimizer, or the forward pass, does not see."""
        self.backbone.adapters.check_unmerged("Training")
        if self.backbone.packings and not self.backbone.adapters.active:
            raise ValueError(
                "The weights are quantised, and codes cannot be trained: call "
                "enable_lora first, or load the model without quantize."
            )
        if self.optimizer is None or not self.optimizer.built:
            return
        seen = {id(variable) for variable in self.optimizer._trainable_variables}
        if seen != {id(variable) for variable in self.trainable_variables}:
            raise ValueError(
                "Other weights are to be trained than those that the optimizer has "
                "seen, since adapters were added or switched: call compile again."
            )

    def _check_scope(self):
        """Refuse what TensorFlow's replicas would each change, or not know."""
        outside = backend.outside_of_strategy(self)
        if outside:
            raise ValueError(
                f"{len(outside)} variables, such as {outside[0]}, were made outside of "
                "the scope of the tf.distribute strategy: load the model, call "
                "enable_lora and make the optimizer inside `with strategy.scope():`, "
                "and compile there."
            )

    def _check_optimizer(self):
        """Refuse an Adam that would silently change nothing.

        Keras computes in the dtype of the weight. In bfloat16 a beta_2 of 0.999 is 1,
        the bias correction 1 - beta_2 ** t is 0, and so is every step.
        """
        optimizer = self.optimizer
        while hasattr(optimizer, "inner_optimizer"):
            optimizer = optimizer.inner_optimizer
        # Muon gives Adam the embeddings and the vectors.
        beta = getattr(optimizer, "adam_beta_2", getattr(optimizer, "beta_2", None))
        if beta is None or float(ml_dtypes.bfloat16(beta)) < 1:
            return
        if any(
            keras.backend.standardize_dtype(variable.dtype) == "bfloat16"
            for variable in self.trainable_variables
        ):
            raise ValueError(
                f"{type(optimizer).__name__} with beta_2={beta} cannot train "
                "bfloat16 weights: rounded to bfloat16 it is 1, and every step is 0. "
                "Call backbone.enable_lora(rank), whose factors are float32; or load "
                'with dtype="mixed_bfloat16", which keeps float32 weights; or lower '
                "beta_2 to 0.99."
            )

    def _prepare_validation(self, validation_data, batch_rows):
        if not isinstance(validation_data, tuple):
            validation_data = (validation_data,)
        x, y, weight = (*validation_data, None, None)[:3]
        x, y, weight = data.prepare(
            x, y, weight, self.preprocessor, batch_rows=batch_rows
        )
        return x if y is None else (x, y, weight)

    def train_on_batch(self, *args, **kwargs):
        """One step, as `keras.Model.train_on_batch`."""
        with self._whole_after_failure():
            return super().train_on_batch(*args, **kwargs)

    def evaluate(self, x=None, y=None, *, sample_weight=None, **kwargs):
        """Loss and metrics, as `keras.Model.evaluate`; inputs as in `fit`."""
        rows = _streamed(kwargs.get("steps"), kwargs.get("batch_size"))
        x, y, sample_weight = data.prepare(
            x, y, sample_weight, self.preprocessor, batch_rows=rows
        )
        _check_shares(x)
        backend.keep_memory(before_dataset=True)
        with self._whole_after_failure():
            return super().evaluate(x, y, sample_weight=sample_weight, **kwargs)

    def predict(self, x, **kwargs):
        """Logits, as `keras.Model.predict`; inputs as in `fit`."""
        rows = _streamed(kwargs.get("steps"), kwargs.get("batch_size"))
        x, _, _ = data.prepare(x, None, None, self.preprocessor, batch_rows=rows)
        backend.keep_memory(before_dataset=True)
        with self._whole_after_failure():
            return super().predict(x, **kwargs)


def _streamed(steps, batch_size):
    """Rows of a batch of a stream, of which `steps` are wanted; None if all are."""
    # Keras' own batches are of 32.
    return (batch_size or 32) if steps else None


def _check_shares(x):
    """Refuse to train where one process would wait for the others forever."""
    if backend.process()[1] == 1:
        return
    counts = backend.from_all_processes(data.size(x))
    if len(set(counts)) > 1:
        raise ValueError(
            f"The processes have {counts} rows or batches to read, and all must have "
            "as many: pass shard=gemma_keras.distribution.shard() to "
            "PackedDataset or BucketedDataset, or cut what you divide yourself."
        )


def _weights(y, sample_weight):
    if sample_weight is None:
        return ops.ones(ops.shape(y), dtype="float32")
    # A weight for each row holds for each token of it.
    weight = ops.cast(sample_weight, "float32")
    missing = len(ops.shape(y)) - len(ops.shape(weight))
    weight = ops.reshape(weight, (*ops.shape(weight), *[1] * missing))
    return ops.broadcast_to(weight, ops.shape(y))


def _is_cross_entropy(loss):
    """Whether `loss` is the mean cross-entropy of logits, and nothing more."""
    if not isinstance(loss, keras.losses.SparseCategoricalCrossentropy):
        return False
    config = loss.get_config()
    means = ("sum_over_batch_size", "mean", "mean_with_sample_weight")
    return (
        config["from_logits"]
        and config.get("ignore_class") is None
        and config["reduction"] in means
    )


def _names_of_accuracies(weighted_metrics):
    """Names of the metrics, if all of them are the accuracy of the next token."""
    names = []
    for metric in weighted_metrics or ():
        if isinstance(metric, keras.metrics.SparseCategoricalAccuracy):
            names.append(metric.name)
        elif metric in ("accuracy", "acc", "sparse_categorical_accuracy"):
            names.append(metric)
        else:
            return None
    return names


def _accumulating(optimizer, steps):
    """`optimizer`, made to accumulate if it or the caller asks for it."""
    optimizer = keras.optimizers.get(optimizer)
    own = getattr(optimizer, "gradient_accumulation_steps", None)
    if steps and own and steps != own:
        raise ValueError(
            f"gradient_accumulation_steps is {steps} here and {own} in the optimizer: "
            "give it once."
        )
    steps = steps or own
    if not steps or steps == 1 or _accumulation_of(optimizer) is not None:
        return optimizer
    optimizer.gradient_accumulation_steps = None
    return optimizers.TokenAccumulation(optimizer, steps)


def _accumulation_of(optimizer):
    while optimizer is not None:
        if isinstance(optimizer, optimizers.TokenAccumulation):
            return optimizer
        optimizer = getattr(optimizer, "inner_optimizer", None)
    return None
