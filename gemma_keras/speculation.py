"""Speculative decoding: tokens are guessed, and one pass of the model checks them all.

A pass over the newest token and K guesses costs little more than one over the newest
token alone, where the time goes into reading the weights. The model chooses a token
after each of them, just as it would otherwise: the likeliest, or the one that the
seed's noise for this place gives. Guesses stay as long as they are what it chose, and
the first other choice comes with them; what was read of the rest is taken back. So the
answer is the one without speculation, token for token, sampled or not.

Guesses come from the text so far (`PromptLookup`), or from a smaller model
(`DraftModel`). Leviathan et al. 2023 (arXiv:2211.17192) and Saxena 2023
(github.com/apoorvumang/prompt-lookup-decoding) have the ideas.
"""

import keras
import numpy as np
from keras import ops

from gemma_keras import backend, samplers
from gemma_keras import cache as kv_cache

NO_LIMIT = np.array([2**31 - 1], "int32")


class Speculation:
    """Where guesses come from, and what has become of them.

    Attributes:
        num_tokens: how many tokens are guessed for a pass of the model.
        passes: passes of the model that checked guesses, since this was made.
        drafted: tokens guessed for them.
        accepted: tokens that these passes gave beyond the one that each gives anyway.
    """

    def __init__(self, num_tokens):
        _check_count("num_tokens", num_tokens)
        self.num_tokens = num_tokens
        self.passes = self.drafted = self.accepted = 0

    def check(self, lm):
        """Raises ValueError if it cannot be used with this `GemmaCausalLM`."""

    def begin(self, prompt, plan):
        """What guesses for one prompt, a list of ids: has `learn` and `propose`."""
        raise NotImplementedError


class PromptLookup(Speculation):
    """Guesses that what follows the newest tokens is what followed them before.

    For answers that repeat much of the prompt or of themselves: summaries, corrections,
    code that is changed, quotations. Where nothing is found, nothing is spent.

    Args:
        num_tokens: tokens guessed for a pass of the model.
        max_ngram: most of the newest tokens that are looked for.
        min_ngram: fewest of them that are enough.
    """

    def __init__(self, num_tokens=7, max_ngram=3, min_ngram=2):
        super().__init__(num_tokens)
        _check_count("max_ngram", max_ngram)
        _check_count("min_ngram", min_ngram)
        if min_ngram > max_ngram:
            raise ValueError(
                f"min_ngram must be at most max_ngram, {max_ngram}, got {min_ngram}."
            )
        self.max_ngram, self.min_ngram = max_ngram, min_ngram

    def begin(self, prompt, plan):
        """A `Lookup` that knows the prompt."""
        lookup = Lookup(self.num_tokens, self.max_ngram, self.min_ngram)
        lookup.learn(prompt)
        return lookup


class DraftModel(Speculation):
    """Guesses what a smaller model says.

    It reads the prompt as well, and makes each token with the same sampler and noise.

    Args:
        lm: a `GemmaCausalLM` with the same vocabulary.
        num_tokens: tokens guessed for a pass of the model.
    """

    def __init__(self, lm, num_tokens=4):
        super().__init__(num_tokens)
        if not _is_model(lm):
            raise ValueError(f"A draft model must be a GemmaCausalLM, got {lm!r}.")
        self.lm = lm
        self._fits = None  # a tokenizer that was compared

    def check(self, lm):
        """Raises ValueError if the vocabularies differ."""
        models = {"the model": lm, "its draft": self.lm}
        tokenizers = {
            name: each.preprocessor.tokenizer
            for name, each in models.items()
            if each.preprocessor is not None
        }
        if len(tokenizers) == 2:
            if tokenizers["the model"] is self._fits:
                return
            # Files of several formats may hold one vocabulary.
            one, other = tokenizers.values()
            same = one == other or one.get_vocabulary() == other.get_vocabulary()
            self._fits = one if same else None
            sizes = {name: each.vocab_size for name, each in tokenizers.items()}
        else:
            sizes = {name: each.config.vocab_size for name, each in models.items()}
            same = len(set(sizes.values())) == 1
        if not same:
            found = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
            raise ValueError(
                "A draft model must have the vocabulary of the model whose tokens it "
                f"guesses, and these differ (tokens: {found}). Take a draft of the "
                "same Gemma generation."
            )

    def begin(self, prompt, plan):
        """A `Draft`; the draft model reads the prompt when a guess is asked for."""
        return Draft(self.lm.engine, self.num_tokens, prompt, plan)


NAMES = {"prompt_lookup": PromptLookup}


def get(speculation, lm):
    """A `Speculation` for `lm` from what users give; None for None.

    Raises:
        ValueError: it is none, or does not go with the model.
    """
    if speculation is None:
        return None
    if isinstance(speculation, str) and speculation in NAMES:
        speculation = NAMES[speculation]()
    elif _is_model(speculation):
        speculation = DraftModel(speculation)
    if not isinstance(speculation, Speculation):
        raise ValueError(
            'speculation must be "prompt_lookup", a PromptLookup, a DraftModel, or a '
            f"GemmaCausalLM that drafts, got {speculation!r}."
        )
    speculation.check(lm)
    return speculation


def _is_model(value):
    # `causal_lm` is a layer above.
    return isinstance(value, keras.Model) and hasattr(value, "engine")


def _check_count(name, value):
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}.")


class Lookup:
    """The tokens so far, and where each n-gram among them was seen last."""

    def __init__(self, num_tokens, max_ngram, min_ngram):
        self.num_tokens = num_tokens
        self.sizes = range(max_ngram, min_ngram - 1, -1)
        self.tokens = []
        self._followers = {}  # n-gram -> the place after it

    def learn(self, tokens):
        """Take note of tokens that follow."""
        for token in tokens:
            # Only once something follows them: the newest are what is looked for.
            place = len(self.tokens)
            for gram in self._newest():
                self._followers[gram] = place
            self.tokens.append(token)

    def propose(self):
        """Tokens that may follow, as many as wanted; None if nothing is known."""
        places = (self._followers.get(gram) for gram in self._newest())
        start = next((place for place in places if place is not None), None)
        if start is None:
            return None
        # What follows the newest token repeats, too, if it comes to that.
        known = self.tokens[start : start + self.num_tokens]
        return [known[i % len(known)] for i in range(self.num_tokens)]

    def _newest(self):
        """The n-grams at the end, the longest first."""
        for size in self.sizes:
            if size <= len(self.tokens):
                yield tuple(self.tokens[-size:])


class Draft:
    """A draft model on its way along an answer, one step behind."""

    def __init__(self, engine, num_tokens, prompt, plan):
        self.engine, self.num_tokens = engine, num_tokens
        self.prompt, self.answer = list(prompt), []
        # Guesses that a repetition penalty would change are wrong, not harmful.
        features = plan.features._replace(penalty=False, log_probs=False)
        stop_ids = np.full_like(plan.stop_ids, -1)
        self.plan = plan._replace(features=features, stop_ids=stop_ids)
        self._state = None
        self._read = len(prompt)

    def learn(self, tokens):
        """Take note of tokens of the answer."""
        self.answer += tokens

    def propose(self):
        """Tokens [1, num_tokens] that the draft model would say next."""
        plan = self.plan
        if self._state is None:
            self._state = self.engine.start([self.prompt], plan)
        # The last two: after a pass in which all was right, it has read neither.
        pair = [*self.prompt[-1:], *self.answer][-2:]
        known = len(self.prompt) + len(self.answer)
        dropped = self._read - (known - 2)
        program = self.engine.program(
            "draft",
            plan.features,
            self.num_tokens,
            lambda *a: _draft(self.engine, plan.features, self.num_tokens, *a),
            donated=0,
        )
        self._state, drafts = program(
            self._state,
            np.array([pair], "int32"),
            backend.counter(dropped),
            backend.counter(len(self.answer)),
            plan.controls,
            plan.stop_ids,
            NO_LIMIT,
        )
        self._read = known + self.num_tokens - 1
        return drafts


class SpeculativeDecoder:
    """`Engine.advance` for one prompt, with guesses.

    Args:
        engine: the `Engine` of the model.
        speculation: a `Speculation`.
        prompt: the ids that were read.
        plan: a `Plan` of one row, with room for `num_tokens` ahead.
    """

    def __init__(self, engine, speculation, prompt, plan):
        self.engine, self.speculation = engine, speculation
        self.drafter = speculation.begin(prompt, plan)
        self._known = 0

    def advance(self, state, plan, limit):
        """Decode until the row is done or has `limit` tokens, perhaps a few more."""
        limit = min(limit, int(plan.limits[0]))
        while True:
            count = int(ops.convert_to_numpy(state.emitted)[0])
            tokens = ops.convert_to_numpy(state.tokens)[0, self._known : count]
            self.drafter.learn(tokens.tolist())
            self._known = count
            if count >= limit or bool(ops.convert_to_numpy(state.done)[0]):
                return state
            # For the last token there is nothing to save.
            last = count + 1 == plan.limits[0]
            drafts = None if last else self.drafter.propose()
            if drafts is None:
                state = self.engine.advance(state, plan, count + 1)
            else:
                state = self._verify(state, drafts, plan)

    def _verify(self, state, drafts, plan):
        width = self.speculation.num_tokens
        if isinstance(drafts, list):
            drafts = np.array([drafts], "int32")
        program = self.engine.program(
            "verify",
            plan.features,
            width,
            lambda *a: _verify(self.engine, plan.features, *a),
            donated=0,
        )
        state, given = program(state, drafts, *plan.arrays)
        self.speculation.passes += 1
        self.speculation.drafted += width
        self.speculation.accepted += int(given) - 1
        return state


# What follows is traced into programs. What it calls through a `backend.Step` gets
# integers as tensors on torch, so they are counted outside of it.


def _draft(engine, features, width, state, pair, dropped, count, *plan):
    """The draft model's state after `width` tokens more, and these [1, width].

    It first forgets the `dropped` newest tokens, and reads the last two of the answer,
    which has `count` tokens.
    """

    def read(state, pair, dropped, count, noise, *plan):
        cache = kv_cache.take_back(state.cache, dropped)
        first = state.position + 1 - dropped
        positions = first[:, None] + ops.arange(2, dtype="int32")
        hidden, cache = engine.backbone(
            {"token_ids": pair, "positions": positions}, cache=cache
        )
        state = state._replace(
            cache=cache,
            emitted=ops.zeros_like(state.emitted),
            done=ops.zeros_like(state.done),
            position=first + 1,
            count=count,
        )
        return engine.emit(state, hidden[:, -1], features, *plan, noise=noise)

    length = state.cache.length - dropped + 2
    counted = state._replace(count=count)
    noise = engine.noise(counted, plan[0]) if features.random else ()
    read = engine.step("draft pair", features, read)
    state = read(state, pair, dropped, count, noise, *plan)
    cache = state.cache._replace(length=length)
    state = state._replace(cache=cache, count=count + 1)
    state = engine.decode(features, state, count + width, *plan)
    return state, backend.read_slots(state.tokens, count, axis=1, size=width)


def _verify(engine, features, state, drafts, *plan):
    """The state with the drafts [1, K] that are right and one token, and their number.

    That number, at least 1, is smaller where the answer ends.
    """
    step = engine.step("verify step", features, _verifier(engine, features))
    noise = ()
    if features.random:
        later = range(drafts.shape[1] + 1)
        noise = [engine.noise(state, plan[0], i) for i in later]
        noise = ops.concatenate(noise, axis=0)
    length, count = state.cache.length, state.count
    state, given = step(state, drafts, noise, *plan)
    given = backend.counter(given)
    cache = state.cache._replace(length=length + given)
    return state._replace(cache=cache, count=count + given), given


def _verifier(engine, features):
    """A function of the state, drafts [1, K], noise [K + 1, V] and the plan."""

    def step(state, drafts, noise, controls, stop_ids, limits):
        drafts = ops.minimum(drafts, engine.backbone.config.vocab_size - 1)
        newest = backend.read_slots(state.tokens, state.count - 1, axis=1)
        read = ops.concatenate([newest, drafts], axis=1)
        width = read.shape[1]
        positions = ops.arange(1, width + 1, dtype="int32") + state.position[:, None]
        hidden, cache = engine.backbone(
            {"token_ids": read, "positions": positions}, cache=state.cache
        )
        logits = ops.cast(engine.backbone.logits(hidden[0]), "float32")
        seen = state.seen
        if features.penalty:
            # What comes before a token: all the drafts before it, if it counts.
            before = ops.convert_to_tensor(np.tri(width, width - 1, -1, dtype=bool))
            seen = ops.broadcast_to(seen, (width, seen.shape[1]))
            drafted = ops.broadcast_to(drafts, (width, width - 1))
            seen = engine.mark(seen, drafted, before)
        tokens = samplers.choose(logits, controls, features, seen, noise)
        log_probs = samplers.log_probs(logits, tokens, features)
        ends = ops.any(tokens[:, None] == stop_ids[None], axis=1)
        fails = ops.logical_or(tokens[:-1] != drafts[0], ends[:-1])
        passed = ops.cumsum(ops.cast(fails, "int32")) == 0
        given = 1 + ops.sum(ops.cast(passed, "int32"))
        given = ops.minimum(ops.cast(given, "int32"), limits[0] - state.emitted[0])
        last = given - 1
        if features.penalty:
            newest = ops.take(tokens, last[None])[:, None]
            seen = ops.take(seen, last[None], axis=0)
            seen = engine.mark(seen, newest, ops.ones_like(newest, dtype="bool"))
        emitted = state.emitted + given
        write = backend.write_slots
        state = state._replace(
            cache=kv_cache.take_back(cache, width - given),
            tokens=write(state.tokens, tokens[None], state.count, axis=1),
            log_probs=write(state.log_probs, log_probs[None], state.count, axis=1),
            emitted=emitted,
            done=ops.logical_or(ops.take(ends, last[None]), emitted >= limits),
            position=state.position + given,
            seen=seen,
            last_hidden=ops.take(hidden, last[None], axis=1)[:, 0],
        )
        return state, given

    return step
