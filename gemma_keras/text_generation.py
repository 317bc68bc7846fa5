"""Text in, text out: stop strings, streaming and conversations over the `Engine`."""

import dataclasses
import time

import keras
import numpy as np

from gemma_keras import chat, generation, samplers, speculation

# Between two looks for a stop string; what is decoded past it is thrown away.
TOKENS_BETWEEN_CHECKS = 8
# How far apart pieces of a stream may be: a program that runs for one token at a time
# costs a tenth more, and nobody reads faster.
SECONDS_BETWEEN_PIECES = 0.15


@dataclasses.dataclass(frozen=True)
class Generation:
    """An answer with its details, as `generate(return_log_probs=True)` gives it.

    Attributes:
        text: what `generate` returns otherwise.
        token_ids: ids of the new tokens, a stop token included.
        log_probs: natural logarithm of the probability that the model gave each of
            them, before the sampler's settings.
    """

    text: str
    token_ids: list
    log_probs: list


@dataclasses.dataclass(frozen=True)
class Settings:
    """What one call asks for, checked."""

    sampler: samplers.Sampler
    max_length: int | None
    max_new_tokens: int | None
    stop: tuple
    stop_token_ids: tuple
    seed: int | None
    speculation: speculation.Speculation | None
    return_log_probs: bool = False

    def plan(self, limits):
        """The `Plan` for prompts with these limits."""
        ahead = self.speculation.num_tokens if self.speculation else 0
        return generation.make_plan(
            self.sampler,
            limits,
            self.stop_token_ids,
            self.seed,
            ahead,
            self.return_log_probs,
        )

    def decoder(self, engine, prompt, plan):
        """What has `Engine.advance` for one prompt, a list of ids."""
        if self.speculation is None:
            return engine
        return speculation.SpeculativeDecoder(engine, self.speculation, prompt, plan)

    def limit(self, prompt_length):
        """How many tokens may follow a prompt of this many."""
        limits = [self.max_new_tokens] if self.max_new_tokens is not None else []
        if self.max_length is not None:
            limits.append(self.max_length - prompt_length)
        return min(limits)

    @property
    def longest_prompt(self):
        """Tokens of the longest prompt that leaves room for one more, or None."""
        return None if self.max_length is None else self.max_length - 1


def read_settings(
    lm, max_length, max_new_tokens, stop, stop_token_ids, **choice
) -> Settings:
    """`Settings` from the arguments of `GemmaCausalLM.generate`; raises ValueError.

    `choice` has `sampler`, `seed` and `speculation`.
    """
    for name, value in (("max_length", max_length), ("max_new_tokens", max_new_tokens)):
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int) or value < 1
        ):
            raise ValueError(f"{name} must be a positive integer, got {value!r}.")
    if max_length is None and max_new_tokens is None:
        max_length = (
            1024 if lm.preprocessor is None else lm.preprocessor.sequence_length
        )
    stop = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if not all(isinstance(text, str) and text for text in stop):
        raise ValueError(f"stop must be a string, or several, not empty; got {stop!r}.")
    if stop and lm.preprocessor is None:
        raise ValueError("stop strings need a preprocessor; use stop_token_ids.")
    if isinstance(stop_token_ids, str) and stop_token_ids == "auto":
        tokens = () if lm.preprocessor is None else lm.preprocessor.tokenizer
        stop_token_ids = tokens.stop_token_ids if tokens else ()
    elif isinstance(stop_token_ids, int):
        stop_token_ids = (stop_token_ids,)
    try:
        stop_token_ids = tuple(int(i) for i in stop_token_ids or ())
    except (TypeError, ValueError):
        raise ValueError(
            'stop_token_ids must be "auto", an id or a list of ids, got '
            f"{stop_token_ids!r}."
        ) from None
    sampler = choice["sampler"]
    sampler = lm.sampler if sampler is None else samplers.get(sampler)
    guesses = speculation.get(choice["speculation"], lm)
    if guesses is not None and isinstance(sampler, samplers.BeamSampler):
        raise ValueError("Beam search takes no speculation; use another sampler.")
    return Settings(
        sampler,
        max_length,
        max_new_tokens,
        stop,
        stop_token_ids,
        choice["seed"],
        guesses,
    )


def generate_ids(engine, prompts, settings, text_of=None, prompt_cache=None):
    """New token ids and their log-probabilities for each of `prompts`.

    With a `PromptCache` or speculation prompts are answered one after the other.

    Args:
        engine: an `Engine`.
        prompts: lists of token ids.
        settings: `Settings`.
        text_of: function from ids to text; needed for stop strings.
        prompt_cache: a `PromptCache`, or None.

    Returns:
        One `(ids, log_probs)` for each prompt, lists of the same length.
    """
    alone = prompt_cache is not None or settings.speculation is not None
    if alone and len(prompts) > 1:
        each = ([prompt] for prompt in prompts)
        found = (generate_ids(engine, p, settings, text_of, prompt_cache) for p in each)
        return [answer for (answer,) in found]
    plan = settings.plan([settings.limit(len(prompt)) for prompt in prompts])
    if isinstance(settings.sampler, samplers.BeamSampler):
        state, _ = engine.beam_search(prompts, plan, settings.sampler)
        return _rows(state)[:: settings.sampler.num_beams]
    if prompt_cache is None:
        state = engine.start(prompts, plan)
    else:
        state = prompt_cache.start(engine, prompts[0], plan)
    decoder = settings.decoder(engine, prompts[0], plan)
    state, answers = _answers(decoder, state, plan, settings, text_of)
    if prompt_cache is not None:
        prompt_cache.keep(engine, prompts[0], state)
    return answers


def _answers(decoder, state, plan, settings, text_of):
    """The state after decoding, and what `generate_ids` returns."""
    most = int(max(plan.limits))
    if not settings.stop:
        state = decoder.advance(state, plan, most)
        return state, _rows(state)
    cuts = [None] * len(plan.limits)
    for limit in range(1, most + TOKENS_BETWEEN_CHECKS, TOKENS_BETWEEN_CHECKS):
        state = decoder.advance(state, plan, min(limit, most))
        rows = _rows(state)
        for i, (ids, _) in enumerate(rows):
            if cuts[i] is None:
                cuts[i] = find_stop(ids, settings.stop, text_of)
        done = keras.ops.convert_to_numpy(state.done)
        stopped = np.array([cut is not None for cut in cuts])
        if np.all(done | stopped):
            break
        state = state._replace(done=keras.ops.convert_to_tensor(done | stopped))
    return state, [
        (ids[:cut], log_probs[:cut])
        for (ids, log_probs), cut in zip(rows, cuts, strict=True)
    ]


def _rows(state):
    tokens = keras.ops.convert_to_numpy(state.tokens)
    log_probs = keras.ops.convert_to_numpy(state.log_probs)
    return [
        (row[:count].tolist(), values[:count].tolist())
        for row, values, count in zip(
            tokens, log_probs, keras.ops.convert_to_numpy(state.emitted), strict=True
        )
    ]


def find_stop(ids, stop, text_of):
    """How many of `ids` it takes to complete one of the stop strings, or None."""
    text = text_of(ids)
    if not any(string in text for string in stop):
        return None
    low, high = 1, len(ids)
    while low < high:
        middle = (low + high) // 2
        text = text_of(ids[:middle])
        if any(string in text for string in stop):
            high = middle
        else:
            low = middle + 1
    return low


def cut_at_stop(text, stop):
    """`text` before the first of the stop strings in it."""
    ends = [text.find(string) for string in stop if string in text]
    return text[: min(ends)] if ends else text


class TextGenerator:
    """The text side of `GemmaCausalLM.generate`, `stream` and `start_chat`."""

    def __init__(self, engine, preprocessor):
        self.engine = engine
        self.preprocessor = preprocessor
        self.tokenizer = preprocessor.tokenizer

    def encode(self, prompt, settings):
        """Ids of a prompt, refused or cut if no token could follow it."""
        return self.preprocessor.encode_prompt(prompt, settings.longest_prompt)

    def generate(self, prompts, settings, strip_prompt, prompt_cache=None):
        """A `Generation` for each prompt, a string or a chat.

        A chat gets the reply alone, since its prompt was not text.
        """
        encoded = [self.encode(prompt, settings) for prompt in prompts]
        answers = generate_ids(
            self.engine, encoded, settings, self.tokenizer.decode, prompt_cache
        )
        results = []
        for prompt, ids, (new, log_probs) in zip(
            prompts, encoded, answers, strict=True
        ):
            kept = [i for i in new if i not in settings.stop_token_ids]
            text = cut_at_stop(self.tokenizer.decode(kept), settings.stop)
            if isinstance(prompt, str | bytes) and not strip_prompt:
                text = self._join(ids, kept, text, settings.stop)
            results.append(Generation(text, new, log_probs))
        return results

    def _join(self, prompt_ids, new_ids, text, stop):
        if prompt_ids[:1] == [self.tokenizer.bos_token_id]:
            prompt_ids = prompt_ids[1:]
        if stop:
            return self.tokenizer.decode(prompt_ids) + text
        # Together, since a character may span the border.
        return self.tokenizer.decode([*prompt_ids, *new_ids])

    def stream(self, prompt, settings, prompt_cache=None):
        """Yield the answer to one prompt in pieces, as they are made."""
        if isinstance(settings.sampler, samplers.BeamSampler):
            raise ValueError(
                "Beam search knows its answer only at the end, so it cannot stream. "
                "Use generate, or another sampler."
            )
        ids = self.encode(prompt, settings)
        plan = settings.plan([settings.limit(len(ids))])
        # Not a generator itself, so that bad input is refused at once.
        if prompt_cache is None:
            state = self.engine.start([ids], plan)
            return self.pieces(ids, state, plan, settings)
        state = prompt_cache.start(self.engine, ids, plan)
        return self.pieces(
            ids, state, plan, settings, lambda s: prompt_cache.keep(self.engine, ids, s)
        )

    def pieces(self, prompt, state, plan, settings, on_finish=None):
        """Text of the tokens of `state`, and of those still to be decoded.

        `on_finish(state)` is called at the end, also of an abandoned stream.
        """
        decoder = settings.decoder(self.engine, prompt, plan)
        characters = self.tokenizer.decode_stream()
        held, pace = HeldText(settings.stop), Pace()
        told = 0
        try:
            while not held.stopped:
                emitted = int(keras.ops.convert_to_numpy(state.emitted)[0])
                pace.stop(emitted - told)
                tokens = keras.ops.convert_to_numpy(state.tokens)[0, told:emitted]
                told = emitted
                kept = [i for i in tokens.tolist() if i not in settings.stop_token_ids]
                text = "".join([held.push(characters.push(i)) for i in kept])
                if text:
                    yield text
                if keras.ops.convert_to_numpy(state.done)[0] or held.stopped:
                    break
                state = decoder.advance(state, plan, emitted + pace.start())
            text = held.push(characters.flush()) + held.flush()
            if text:
                yield text
        finally:
            if on_finish is not None:
                on_finish(state)


class Pace:
    """How many tokens of a stream are decoded at once: as many as nobody waits for."""

    def __init__(self):
        self._tokens, self._begun = 1, None

    def start(self):
        """So many now, and their time is taken."""
        self._begun = time.perf_counter()
        return self._tokens

    def stop(self, tokens):
        """So many came."""
        if self._begun is None:
            return
        each = (time.perf_counter() - self._begun) / max(tokens, 1)
        # Never many more at once: the next ones may be slower.
        most = min(2 * self._tokens, int(SECONDS_BETWEEN_PIECES / max(each, 1e-6)))
        self._tokens = max(1, most)


class HeldText:
    """Text on its way out, held back while it may be the start of a stop string."""

    def __init__(self, stop):
        self.stop = stop
        self.text = ""
        self.stopped = False

    def push(self, text):
        """Add `text`; return what can go out."""
        if self.stopped:
            return ""
        self.text += text
        cut = cut_at_stop(self.text, self.stop)
        if cut != self.text:
            self.stopped = True
            self.text = ""
            return cut
        held = max(
            (
                size
                for string in self.stop
                for size in range(min(len(string) - 1, len(self.text)), 0, -1)
                if self.text.endswith(string[:size])
            ),
            default=0,
        )
        out = self.text[: len(self.text) - held]
        self.text = self.text[len(out) :]
        return out

    def flush(self):
        """What was held back, at the end."""
        text, self.text = self.text, ""
        return text


class ChatSession:
    """A conversation that keeps its cache, so that each turn reads new text only.

    Attributes:
        history: the messages so far, `{"role": ..., "content": ...}`, which may be
            edited; what no longer matches the cache is then read again.
    """

    def __init__(self, generator, settings_of, system=None):
        self._generator = generator
        self._settings_of = settings_of
        self._cache = generation.PromptCache(rings=True)
        self._system = system
        self.reset()

    def reset(self):
        """Forget every turn but the system message."""
        self.history = []
        if self._system:
            self.history.append({"role": "system", "content": self._system})
        self._cache.clear()

    def send(self, message, **options):
        """The reply to a user's message; options as in `GemmaCausalLM.generate`."""
        return "".join(self.stream(message, **options))

    def stream(self, message, **options):
        """The reply in pieces. It enters the history when the stream ends."""
        settings = self._settings_of(**options)
        messages = [*self.history, {"role": "user", "content": message}]
        tokenizer = self._generator.tokenizer
        ids = chat.encode_chat(tokenizer, messages)
        longest = self._generator.engine.backbone.config.max_position
        room = longest if settings.max_length is None else settings.max_length
        if len(ids) >= room:
            raise ValueError(
                f"The conversation has {len(ids)} tokens and at most {room - 1} leave "
                "room for a reply. Raise max_length, shorten history, or call reset()."
            )
        plan = settings.plan([min(settings.limit(len(ids)), longest - len(ids))])
        state = self._cache.start(self._generator.engine, ids, plan)
        return self._pieces(state, plan, settings, ids, messages)

    def _pieces(self, state, plan, settings, ids, messages):
        reply = []

        def remember(state):
            self._cache.keep(self._generator.engine, ids, state)
            message = {"role": "assistant", "content": "".join(reply)}
            self.history = [*messages, message]

        for text in self._generator.pieces(ids, state, plan, settings, remember):
            reply.append(text)
            yield text
