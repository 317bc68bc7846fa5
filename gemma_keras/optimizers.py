"""What training a language model asks of an optimizer beyond what Keras' own do.

`make_optimizer` sets up one of Keras' optimizers with a schedule. Two wrappers add what
none of them has: gradients accumulated by tokens, in float32, and LoRA+.
"""

import inspect

import keras
from keras import ops

from gemma_keras import backend

OPTIMIZERS = {
    "adamw": "AdamW",
    "adam": "Adam",
    "adafactor": "Adafactor",
    "lion": "Lion",
    "muon": "Muon",
    "sgd": "SGD",
}
SCHEDULES = ("cosine", "linear", "constant")

# Norms and biases: pulled to zero, they change what the model computes.
UNDECAYED = ("scale", "bias", "magnitude")


def make_schedule(kind, peak, steps, warmup=0):
    """A learning rate that rises linearly and then falls.

    Args:
        kind: `"cosine"` or `"linear"`, which end at 0; or `"constant"`.
        peak: the highest rate.
        steps: updates in all.
        warmup: updates until the peak; below 1, a share of `steps`.

    Returns:
        A number if nothing changes with time, else a
        `keras.optimizers.schedules.LearningRateSchedule`.

    Raises:
        ValueError: an unknown kind, or numbers out of range.
    """
    if kind not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}: {kind!r}.")
    if not peak > 0:
        raise ValueError(f"The learning rate must be above 0, got {peak!r}.")
    if warmup < 0:
        raise ValueError(f"warmup must not be negative, got {warmup!r}.")
    rise = round(warmup * steps) if warmup < 1 else int(warmup)
    if steps < 1 or rise >= steps > 1:
        raise ValueError(
            f"warmup takes {rise} of {steps} steps: nothing would be left."
        )
    if kind == "constant" and not rise:
        return peak
    return WarmupSchedule(kind, peak, steps, rise)


@keras.saving.register_keras_serializable(package="gemma_keras")
class WarmupSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """Linear rise to `peak` over `warmup` steps, then what `kind` says until `steps`.

    The first step already moves: step i of the rise has peak * (i + 1) / warmup.
    """

    def __init__(self, kind, peak, steps, warmup):
        self.kind, self.peak, self.steps, self.warmup = kind, peak, steps, warmup

    def __call__(self, step):
        step = ops.cast(step, "float32")
        rising = (step + 1.0) / max(self.warmup, 1)
        left = max(self.steps - self.warmup, 1)
        done = ops.clip((step - self.warmup) / left, 0.0, 1.0)
        if self.kind == "cosine":
            falling = 0.5 * (1.0 + ops.cos(3.141592653589793 * done))
        else:
            falling = 1.0 - done if self.kind == "linear" else ops.ones_like(done)
        return self.peak * ops.where(step < self.warmup, rising, falling)

    def get_config(self):
        return {
            "kind": self.kind,
            "peak": self.peak,
            "steps": self.steps,
            "warmup": self.warmup,
        }


def make_optimizer(
    name="adamw",
    learning_rate=2e-4,
    *,
    weight_decay=0.0,
    clip_norm=1.0,
    lora_plus_ratio=None,
    **settings,
):
    """One of Keras' optimizers, set up as fine-tuning wants it.

    Args:
        name: `adamw`, `adam`, `adafactor`, `lion`, `muon` or `sgd`.
        learning_rate: a number or a schedule, as `make_schedule` gives.
        weight_decay: share of each weight that a step of rate 1 takes off; norms and
            biases are left alone.
        clip_norm: largest norm of all gradients together; None clips nothing.
        lora_plus_ratio: learning rate of the factors B over that of the factors A
            (LoRA+, Hayou et al. 2024, arXiv:2402.12354); their paper takes 16.
        **settings: further arguments of the optimizer.

    Raises:
        ValueError: there is no such optimizer, or it knows no such setting.
    """
    if name not in OPTIMIZERS:
        known = ", ".join(OPTIMIZERS)
        raise ValueError(f"optimizer must be one of {known}, got {name!r}.")
    make = Muon if name == "muon" else getattr(keras.optimizers, OPTIMIZERS[name])
    known = set(inspect.signature(make.__init__).parameters)
    if set(settings) - known:
        unknown = ", ".join(sorted(set(settings) - known))
        raise ValueError(f"{OPTIMIZERS[name]} of Keras takes no {unknown}.")
    if name == "muon":
        # For the vectors and embeddings, which Muon gives to AdamW.
        settings.setdefault("adam_weight_decay", float(weight_decay))
    if name == "adafactor":
        # The rate is what it is said to be, not at most 1 / sqrt(step).
        settings.setdefault("relative_step", False)
    optimizer = make(
        learning_rate,
        weight_decay=float(weight_decay),
        global_clipnorm=clip_norm,
        **settings,
    )
    if weight_decay:
        optimizer.exclude_from_weight_decay(var_names=list(UNDECAYED))
    if lora_plus_ratio is not None:
        optimizer = LoraPlus(optimizer, lora_plus_ratio)
    return optimizer


@keras.saving.register_keras_serializable(package="gemma_keras")
class Muon(keras.optimizers.Muon):
    """Keras' Muon, which on TensorFlow multiplies float32 by float64 and fails."""

    def lr_adjust(self, x):
        return x * (max(x.shape) ** 0.5 * self.rms_rate)


class Wrapper(keras.optimizers.Optimizer):
    """An optimizer around another, which keeps rate, steps and state of its own."""

    def __init__(self, inner_optimizer, name=None):
        super().__init__(learning_rate=0.0, name=name)
        self.inner_optimizer = inner_optimizer

    def build(self, variables):
        if not self.built:
            self.add_own_variables(variables)
            self.inner_optimizer.build(variables)
            super().build(variables)

    def add_own_variables(self, variables):
        """Create what this wrapper keeps beside the inner optimizer's state."""

    @property
    def variables(self):
        return self._variables + self.inner_optimizer.variables

    @property
    def learning_rate(self):
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate):
        self.inner_optimizer.learning_rate = learning_rate

    @property
    def iterations(self):
        return self.inner_optimizer.iterations

    def finalize_variable_values(self, variables):
        self.inner_optimizer.finalize_variable_values(variables)

    def get_config(self):
        inner = keras.saving.serialize_keras_object(self.inner_optimizer)
        return {"name": self.name, "inner_optimizer": inner}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        inner = keras.saving.deserialize_keras_object(
            config.pop("inner_optimizer"), custom_objects=custom_objects
        )
        return cls(inner, **config)


@keras.saving.register_keras_serializable(package="gemma_keras")
class LoraPlus(Wrapper):
    """Gives the factors B of low-rank updates a learning rate of their own.

    Args:
        inner_optimizer: any optimizer whose step is proportional to its rate.
        ratio: rate of B over that of all else.
    """

    def __init__(self, inner_optimizer, ratio=16.0, name="lora_plus"):
        super().__init__(inner_optimizer, name)
        if not ratio > 0:
            raise ValueError(f"ratio must be above 0, got {ratio!r}.")
        self.ratio = ratio

    def _lengthened(self, variables, before):
        """What each B is after a step, the step taken `ratio` times as far."""
        return [
            old + self.ratio * (variable - old)
            for variable, old in zip(variables, before, strict=True)
        ]

    def apply(self, grads, trainable_variables=None):
        if not self.built:
            self.build(trainable_variables)
        chosen = [v for v in self._trainable_variables if v.name == "lora_b"]
        before = [ops.copy(v.value) for v in chosen]
        self.inner_optimizer.apply(grads, trainable_variables)
        for variable, value in zip(
            chosen, self._lengthened(chosen, before), strict=True
        ):
            variable.assign(value)

    def get_config(self):
        return {**super().get_config(), "ratio": self.ratio}


@keras.saving.register_keras_serializable(package="gemma_keras")
class TokenAccumulation(Wrapper):
    """Steps once in `steps` batches, by the mean gradient over all their tokens.

    Keras' own `gradient_accumulation_steps` takes the mean of the batches' means, so
    that a token in a short batch counts for more, and adds up in the dtype of the
    weight. Here each batch counts by its tokens, and sums are float32.

    Args:
        inner_optimizer: what takes the steps.
        steps: batches in a step.

    `tokens` is set, before each call, to the weight of the tokens of the batch.
    """

    def __init__(self, inner_optimizer, steps, name="token_accumulation"):
        super().__init__(inner_optimizer, name)
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 2:
            raise ValueError(
                "gradient_accumulation_steps must be a whole number from 2, "
                f"got {steps!r}."
            )
        self.steps = steps
        self.tokens = None

    def add_own_variables(self, variables):
        """Sums of gradients, in float32, and how much has gone into them."""
        self._batches = self.add_variable((), dtype="int32", name="batches")
        self._weight = self.add_variable((), dtype="float32", name="weight")
        self._sums = [
            self.add_variable(
                variable.shape,
                dtype="float32",
                name="sum_" + variable.path.replace("/", "_"),
                layout=getattr(variable, "_layout", None),
            )
            for variable in variables
        ]

    def _sum_up(self, grads):
        """Sums over this batch and those before it: batches, weight, gradients."""
        tokens = 1.0 if self.tokens is None else self.tokens
        tokens = ops.cast(tokens, "float32")
        sums = [
            total
            if gradient is None
            else total + ops.cast(gradient, "float32") * tokens
            for total, gradient in zip(self._sums, map(_dense, grads), strict=True)
        ]
        return self._batches + 1, self._weight + tokens, sums

    def _means(self, weight, sums, variables):
        return [
            ops.cast(total / ops.maximum(weight, 1e-9), variable.dtype)
            for total, variable in zip(sums, variables, strict=True)
        ]

    def apply(self, grads, trainable_variables=None):
        if not self.built:
            self.build(trainable_variables)
        batches, weight, sums = self._sum_up(grads)
        variables = self._trainable_variables

        def step():
            self.inner_optimizer.apply(self._means(weight, sums, variables), variables)
            self._keep(0, 0.0, [ops.zeros_like(total) for total in sums])

        backend.branch(
            ops.equal(batches, self.steps),
            step,
            lambda: self._keep(batches, weight, sums),
        )

    def _keep(self, batches, weight, sums):
        self._batches.assign(batches)
        self._weight.assign(weight)
        for variable, total in zip(self._sums, sums, strict=True):
            variable.assign(total)

    def stateless_apply(self, optimizer_variables, grads, trainable_variables):
        # What is assigned in a branch of JAX' cond would not leave it.
        count = len(self._variables)
        own, inner = optimizer_variables[:count], list(optimizer_variables[count:])
        mapping = list(zip(self._variables, own, strict=True))
        with keras.StatelessScope(state_mapping=mapping):
            batches, weight, sums = self._sum_up(grads)
        others = list(own[: count - 2 - len(sums)])

        def step():
            means = self._means(weight, sums, self._trainable_variables)
            values, state = self.inner_optimizer.stateless_apply(
                inner, means, trainable_variables
            )
            cleared = [ops.zeros_like(x) for x in (batches, weight, *sums)]
            return list(values), [*others, *cleared, *state]

        def wait():
            state = [*others, batches, weight, *sums, *inner]
            return list(trainable_variables), state

        return ops.cond(ops.equal(batches, self.steps), step, wait)

    def get_config(self):
        return {**super().get_config(), "steps": self.steps}


def _dense(gradient):
    """TensorFlow's gradient of a lookup lists its rows."""
    return gradient if gradient is None else ops.convert_to_tensor(gradient)
