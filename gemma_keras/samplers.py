"""How the next token is chosen from the logits.

Settings are data, not code: a compiled program takes them as arrays, so that changing a
temperature compiles nothing. Only whether a kind of setting is used at all shapes the
program.
"""

import dataclasses
import math
from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from gemma_keras import backend

# Far below any logit, and finite, so that differences with it are numbers.
DROPPED = -1e30


@keras.saving.register_keras_serializable(package="gemma_keras")
@dataclasses.dataclass(frozen=True)
class Sampler:
    """Random choice, filtered in this order: penalty, temperature, k, p, min-p.

    Args:
        temperature: logits are divided by it; 0 means the most likely token.
        top_k: keep the k most likely tokens.
        top_p: keep the fewest most likely tokens that hold this much probability.
        min_p: keep tokens at least this fraction as likely as the most likely one.
        repetition_penalty: above 1, makes tokens of the prompt and of the answer less
            likely (Keskar et al. 2019, arXiv:1909.05858, section 4.1).
        seed: makes the choice repeatable on a backend; `generate(seed=)` overrides it.

    Raises `ValueError`, naming the setting, if a value is out of its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None

    def __post_init__(self):
        self._check("temperature", lambda t: t >= 0, "a number of at least 0")
        self._check("top_p", lambda p: 0 < p <= 1, "between 0 (excluded) and 1")
        self._check("min_p", lambda p: 0 <= p <= 1, "between 0 and 1")
        self._check("repetition_penalty", lambda p: p > 0, "a positive number")
        if self.top_k is not None and (
            not isinstance(self.top_k, int)
            or isinstance(self.top_k, bool)
            or self.top_k < 1
        ):
            raise ValueError(
                f"top_k must be None or a positive integer, got {self.top_k!r}."
            )

    def _check(self, name, allowed, description):
        value = getattr(self, name)
        if value is None and name != "temperature":
            return
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or not allowed(value):
            raise ValueError(f"{name} must be {description}, got {value!r}.")

    @property
    def greedy(self):
        """Whether the most likely token is always taken."""
        return self.temperature == 0 or self.top_k == 1

    def get_config(self):
        """The settings, for Keras' serialization."""
        return {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self)
        }

    @classmethod
    def from_config(cls, config):
        """The sampler with these settings."""
        return cls(**config)


def _register(cls):
    return keras.saving.register_keras_serializable(package="gemma_keras")(
        dataclasses.dataclass(frozen=True)(cls)
    )


@_register
class GreedySampler(Sampler):
    """Always the most likely token."""

    temperature: float = 0.0


@_register
class RandomSampler(Sampler):
    """A random token, as likely as the model says."""


@_register
class TopKSampler(Sampler):
    """A random token among the `k` most likely, 5 as in KerasHub."""

    top_k: int | None = 5

    def __init__(self, k=5, **settings):
        Sampler.__init__(self, top_k=settings.pop("top_k", k), **settings)


@_register
class TopPSampler(Sampler):
    """A random token among the fewest that hold probability `p`."""

    top_p: float | None = 0.9

    def __init__(self, p=0.9, k=None, **settings):
        settings = {"top_p": p, "top_k": k, **settings}
        Sampler.__init__(self, **settings)


@_register
class MinPSampler(Sampler):
    """A random token among those at least `p` times as likely as the most likely."""

    min_p: float | None = 0.1

    def __init__(self, p=0.1, **settings):
        Sampler.__init__(self, **{"min_p": p, **settings})


@_register
class BeamSampler(Sampler):
    """Beam search: the likeliest continuation among `num_beams` kept at each token.

    Args:
        num_beams: continuations kept.
        length_penalty: finished continuations are compared by log-probability divided
            by length ** length_penalty; 0 compares plain log-probabilities.
    """

    temperature: float = 0.0
    num_beams: int = 5
    length_penalty: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        if (
            not isinstance(self.num_beams, int)
            or isinstance(self.num_beams, bool)
            or self.num_beams < 1
        ):
            raise ValueError(
                f"num_beams must be a positive integer, got {self.num_beams!r}."
            )
        self._check("length_penalty", lambda p: True, "a number")


NAMES = {
    "greedy": GreedySampler,
    "random": RandomSampler,
    "top_k": TopKSampler,
    "top_p": TopPSampler,
    "min_p": MinPSampler,
    "beam": BeamSampler,
}


def get(sampler):
    """A `Sampler` from one, from a name such as `"top_k"`, or from its config."""
    if isinstance(sampler, Sampler):
        return sampler
    if isinstance(sampler, dict):
        return keras.saving.deserialize_keras_object(sampler)
    if isinstance(sampler, str) and sampler in NAMES:
        return NAMES[sampler]()
    raise ValueError(
        f"sampler must be one of {', '.join(map(repr, NAMES))}, or a "
        f"gemma_keras.samplers.Sampler, got {sampler!r}."
    )


class Features(NamedTuple):
    """What a program must be able to do; everything else that is asked for is data."""

    random: bool = False
    top_k: bool = False
    top_p: bool = False
    min_p: bool = False
    penalty: bool = False
    log_probs: bool = False


def features(sampler, log_probs=False):
    """The `Features` that this sampler needs, with log-probabilities or without."""
    penalty = sampler.repetition_penalty not in (None, 1.0)
    if sampler.greedy:
        return Features(penalty=penalty, log_probs=log_probs)
    return Features(
        random=True,
        top_k=sampler.top_k is not None,
        top_p=sampler.top_p not in (None, 1.0),
        min_p=bool(sampler.min_p),
        penalty=penalty,
        log_probs=log_probs,
    )


def controls(sampler, seed):
    """The settings as arrays, the same names and shapes for every sampler."""
    return {
        "temperature": np.float32(sampler.temperature or 1.0),
        "top_k": np.int32(sampler.top_k or 0),
        "top_p": np.float32(sampler.top_p or 1.0),
        "min_p": np.float32(sampler.min_p or 0.0),
        "penalty": np.float32(sampler.repetition_penalty or 1.0),
        "seed": np.int32(seed),
    }


def filtered_logits(logits, controls, features, seen=None):
    """Logits [B, V] after the settings; dropped tokens are at most `DROPPED`.

    `seen` is a bool [B, V], true for tokens of the prompt and of the answer so far.
    """
    if features.penalty:
        penalty = controls["penalty"]
        penalised = ops.where(logits > 0, logits / penalty, logits * penalty)
        logits = ops.where(seen, penalised, logits)
    if not features.random:
        return logits
    logits = logits / controls["temperature"]
    if features.top_k:
        wanted = ops.cast(controls["top_k"], "float32")
        logits = _keep_top(logits, ops.ones_like(logits), wanted)
    if features.top_p:
        mass = ops.softmax(logits, axis=-1)
        logits = _keep_top(logits, mass, controls["top_p"] * ops.sum(mass, -1)[:, None])
    if features.min_p:
        least = ops.max(logits, -1, keepdims=True) + ops.log(controls["min_p"])
        logits = ops.where(logits >= least, logits, DROPPED)
    return logits


def _keep_top(logits, weights, wanted):
    """Drop all but the highest logits whose `weights` add up to at least `wanted`.

    The lowest logit to keep is found by halving an interval 32 times, which is cheaper
    than to sort a vocabulary of 256,000. Tokens that tie with it, to 2 ** -32 of the
    range of the logits, stay.
    """
    high = ops.max(logits, axis=-1, keepdims=True)
    # A logit 120 below the highest weighs under 2 ** -149: zero in float32.
    low = ops.maximum(ops.min(logits, axis=-1, keepdims=True), high - 120.0)
    enough = ops.sum(ops.where(logits >= high, weights, 0.0), -1, keepdims=True)
    # With the highest alone there may be enough, and then `low` must not be used.
    low = ops.where(enough >= wanted, high, low)
    for _ in range(32):
        middle = low + (high - low) / 2
        kept = ops.sum(ops.where(logits >= middle, weights, 0.0), -1, keepdims=True)
        low = ops.where(kept >= wanted, middle, low)
        high = ops.where(kept >= wanted, high, middle)
    return ops.where(logits >= low, logits, DROPPED)


def choose(logits, controls, features, seen=None, noise=None):
    """Next token [B] int32 for logits [B, V]; `noise` is Gumbel [B, V] if random.

    The largest of logit plus Gumbel noise is a sample of the softmax (Gumbel 1954).
    """
    logits = filtered_logits(logits, controls, features, seen)
    if features.random:
        logits = logits + noise
    return backend.argmax(logits)


def log_probs(logits, tokens, features):
    """Log-probabilities of tokens [R] under logits [R, V]; zeros if nobody asks.

    They take longer than the choice of a token: a pass over the whole vocabulary.
    """
    if not features.log_probs:
        return ops.zeros(tokens.shape, dtype="float32")
    chosen = ops.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]
    return chosen - ops.logsumexp(logits, axis=-1)
