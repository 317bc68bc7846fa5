"""From prompts to tokens: prefill, decoding, streaming, and beam search.

A prompt is read in chunks, with logits for its last position only; decoding then reads
one token a call. Both are loops that are compiled as a whole on JAX and TensorFlow.
Programs are kept, so that another prompt, whatever its length, other settings or a
longer answer compile nothing, as long as they fit into the same room.
"""

from typing import Any, NamedTuple

import numpy as np
from keras import ops

from gemma_keras import backend, samplers
from gemma_keras import cache as kv_cache

MAX_STOP_IDS = 16
# What keys and values are kept in: the dtype that the model computes in, or 8 bits.
KV_CACHE_DTYPES = ("auto", "int8")


class State(NamedTuple):
    """Everything that decoding carries on, as arrays."""

    cache: kv_cache.Cache
    tokens: Any  # int32 [B, capacity]: the answer so far
    log_probs: Any  # float32 [B, capacity], of each of them, or zeros
    emitted: Any  # int32 [B]: how many of them count, stop token included
    done: Any  # bool [B]
    position: Any  # int32 [B]: of the last token, counted in its row
    seen: Any  # bool [B, V], tokens that a repetition penalty hits; or [B, 1]
    count: Any  # how many tokens every row has been given
    last_hidden: Any  # [B, D]: what the newest token was chosen from


class Plan(NamedTuple):
    """A request, as arrays that go into the programs."""

    features: samplers.Features
    controls: dict
    stop_ids: np.ndarray  # int32 [MAX_STOP_IDS], padded with -1
    limits: np.ndarray  # int32 [B]: most tokens that each row may get
    ahead: int  # how many tokens are read on trial, and perhaps taken back

    @property
    def arrays(self):
        """What of it goes into programs."""
        return self.controls, self.stop_ids, self.limits


def make_plan(sampler, limits, stop_token_ids, seed=None, ahead=0, log_probs=False):
    """The `Plan` for a sampler, limits for each row, and ids that end an answer."""
    stop_token_ids = sorted({int(i) for i in stop_token_ids})
    if len(stop_token_ids) > MAX_STOP_IDS:
        raise ValueError(
            f"At most {MAX_STOP_IDS} stop_token_ids, got {len(stop_token_ids)}."
        )
    stop_ids = np.full(MAX_STOP_IDS, -1, "int32")
    stop_ids[: len(stop_token_ids)] = stop_token_ids
    if seed is None:
        seed = sampler.seed
    if seed is None:
        seed = np.random.randint(2**31 - 1)
    if not isinstance(seed, int | np.integer) or not 0 <= seed < 2**31:
        raise ValueError(f"seed must be an integer from 0 to 2**31 - 1, got {seed!r}.")
    return Plan(
        samplers.features(sampler, log_probs),
        samplers.controls(sampler, seed),
        stop_ids,
        np.asarray(limits, "int32"),
        ahead,
    )


def check_kv_cache_dtype(value):
    """`value`, if it is one of `KV_CACHE_DTYPES`; raises ValueError."""
    if value not in KV_CACHE_DTYPES:
        raise ValueError(
            'kv_cache_dtype must be "auto", the dtype that the model computes in, or '
            f'"int8", got {value!r}.'
        )
    return value


# Where shapes are to be few, prompts are read in chunks of two sizes, whatever their
# length: large ones while more than half of one is left, then small ones. Elsewhere as
# they are, but for long ones, whose scores of attention would take much memory.
LARGE_CHUNK, SMALL_CHUNK, LONG = 256, 64, 1024


def _chunks(width):
    """`(size, least)`: sizes of chunks, each while at least so much is left to read."""
    if not backend.few_shapes():
        return ((LONG, LONG), (width % LONG, 1)) if width % LONG else ((LONG, LONG),)
    small = (SMALL_CHUNK, 1)
    if width <= LARGE_CHUNK:
        return (small,)
    return (LARGE_CHUNK, LARGE_CHUNK // 2 + 1), small


def _capacity(used, length, plan):
    """Slots for so many tokens before a prompt, the prompt, and the answer."""
    room = used + length + int(max(plan.limits)) + plan.ahead
    if backend.few_shapes():
        # The last chunk may reach past the prompt.
        size = LARGE_CHUNK if length % LARGE_CHUNK > LARGE_CHUNK // 2 else SMALL_CHUNK
        room = max(room, used + -(-length // size) * size)
    return _bucket(room)


def _bucket(length):
    """The next length that programs are compiled for: 256, 384, 512, 768, 1024, ..."""
    size = 256
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


class PromptCache:
    """What was read for one prompt, from which another that begins alike goes on.

    Given to `GemmaCausalLM.generate` or `stream` again and again, it spares reading
    what prompts have in common: instructions, examples, a document. Keys and values of
    all tokens stay in memory with it. It starts over for a prompt that begins
    otherwise, another model or other adapters, and with a repetition penalty, which
    counts all of a prompt. Training changes weights without its notice: use a new one
    then.

    Args:
        rings: keep no more of sliding-window layers than their window. That takes less
            memory in long chats, but then a prompt has to go on from the last one's
            end, or is read from its beginning.

    Attributes:
        token_ids: what is held: the last prompt, and the answer as far as it was read.
        reused: how many tokens the last call took from it.
    """

    def __init__(self, rings=False):
        self.rings = rings
        self.clear()

    def clear(self):
        """Forget everything."""
        self.token_ids, self.reused = [], 0
        self._state = self._of = None

    def start(self, engine, prompt, plan):
        """What `Engine.start` gives for a prompt, a list of token ids."""
        state, known, of = self._state, self.token_ids, self._of
        # The state is used up by the call, whether it succeeds or not.
        self.clear()
        # At least one token has to be read, for what follows it.
        shared = _shared(known, prompt[:-1])
        same = of == engine.identity() and not plan.features.penalty
        if shared and same:
            state = _cut(state, len(known) - shared)
            if state is not None:
                self.reused = shared
                return engine.resume(state, prompt[shared:], plan, self.rings)
        return engine.start([prompt], plan, self.rings)

    def keep(self, engine, prompt, state):
        """Hold what was read for `prompt`: `state`, which nobody else may use."""
        try:
            read = int(ops.convert_to_numpy(state.position)[0]) + 1
        except RuntimeError:
            # JAX has given it to a step that was interrupted.
            return self.clear()
        # The newest token was chosen but not read.
        answer = read - len(prompt)
        tokens = ops.convert_to_numpy(state.tokens)[0, :answer]
        self.token_ids = [*prompt, *tokens.tolist()]
        self._state, self._of = state, engine.identity()


def _shared(one, other):
    """How many elements two lists begin with alike."""
    for i, pair in enumerate(zip(one, other, strict=False)):
        if pair[0] != pair[1]:
            return i
    return min(len(one), len(other))


def _cut(state, dropped):
    """The state of one row without its newest tokens, or None if that cannot be."""
    if not dropped:
        return state
    cache = kv_cache.cut_cache(state.cache, dropped)
    if cache is None:
        return None
    return state._replace(cache=cache, position=state.position - dropped)


class Engine:
    """The programs of one backbone, compiled when first needed.

    Attributes:
        kv_cache_dtype: one of `KV_CACHE_DTYPES`, for the prompts that are read next.
    """

    def __init__(self, backbone):
        self.backbone = backbone
        self.kv_cache_dtype = "auto"
        self._programs = {}
        self._variables = None

    def start(self, prompts, plan, rings=True):
        """Read `prompts`, lists of token ids, and choose each row's first token.

        Without `rings` all of them can be taken back.
        """
        length = max(len(prompt) for prompt in prompts)
        spare = plan.ahead if rings else None
        state = self._blank(len(prompts), _capacity(0, length, plan), spare)
        return self._feed(state, prompts, plan)

    def resume(self, state, prompt, plan, rings=True):
        """Read more of a conversation of one row into the cache that `state` holds."""
        capacity = _capacity(int(state.cache.length), len(prompt), plan)
        cache = kv_cache.grow_cache(
            state.cache,
            self.backbone.config,
            max(capacity, state.tokens.shape[1]),
            plan.ahead if rings else None,
        )
        state = state._replace(cache=cache)
        if capacity > state.tokens.shape[1]:
            blank = _blank_answer(1, capacity)
            state = state._replace(tokens=blank[0], log_probs=blank[1])
        return self._feed(state, [prompt], plan)

    def _feed(self, state, prompts, plan):
        """Read prompts that follow what the rows of `state` have."""
        backend.keep_memory()
        length = max(len(prompt) for prompt in prompts)
        width = state.tokens.shape[1] if backend.few_shapes() else length
        shape = len(prompts), width
        tokens, mask = np.zeros(shape, "int32"), np.zeros(shape, bool)
        for row, prompt in enumerate(prompts):
            tokens[row, length - len(prompt) : length] = prompt
            mask[row, length - len(prompt) : length] = True
        program = self._program("read", plan.features)
        length = backend.counter(length)
        return program(state, tokens, mask, length, *plan.arrays)

    def _blank(self, rows, capacity, spare):
        """The `State` of rows that have nothing; `spare` is as in `make_cache`."""
        dtype = self._cache_dtype()
        if not backend.COMPILES:
            return self._blank_state(rows, capacity, dtype, spare)
        # At once: one after the other, the arrays of a cache take longer than a token.
        size = rows, capacity, dtype, spare
        make = lambda: self._blank_state(*size)  # noqa: E731
        return self.program("blank", None, size, make, variables=())()

    def _blank_state(self, rows, capacity, dtype, spare):
        backbone = self.backbone
        cache = kv_cache.make_cache(backbone.config, rows, capacity, dtype, spare)
        if backend.COMPILES:
            cache = cache._replace(length=backend.counter(0))
        tokens, log_probs = _blank_answer(rows, capacity)
        shape = (rows, backbone.config.hidden_dim)
        return State(
            cache,
            tokens,
            log_probs,
            emitted=ops.zeros((rows,), dtype="int32"),
            done=ops.zeros((rows,), dtype="bool"),
            position=ops.full((rows,), -1, dtype="int32"),
            seen=ops.zeros((rows, 1), dtype="bool"),
            count=backend.counter(0),
            last_hidden=ops.zeros(shape, dtype=backbone.compute_dtype),
        )

    def advance(self, state, plan, limit):
        """Decode until every row is done or has been given `limit` tokens."""
        limit = backend.counter(limit)
        return self._program("decode", plan.features)(state, limit, *plan.arrays)

    def beam_search(self, prompts, plan, sampler):
        """Continue each prompt by beam search.

        Returns:
            A `State` of len(prompts) * num_beams rows, the beams of a prompt together
            and the best first, and their log-probabilities [prompts, num_beams].
        """
        width = sampler.num_beams
        state = self.start(prompts, plan)
        limit = backend.counter(int(max(plan.limits)))
        plan = plan._replace(limits=np.repeat(plan.limits, width))
        program = self._program("beams", plan.features, width)
        state, scores = program(state, limit, *plan.arrays)
        scores = ops.convert_to_numpy(scores)
        lengths = ops.convert_to_numpy(state.emitted).reshape(scores.shape)
        ranks = np.argsort(
            -scores / np.maximum(lengths, 1) ** sampler.length_penalty,
            axis=1,
            kind="stable",
        )
        rows = (ranks + np.arange(len(ranks))[:, None] * width).ravel()
        tokens = ops.convert_to_numpy(state.tokens)[rows]
        log_probs = ops.convert_to_numpy(state.log_probs)[rows]
        emitted = lengths.ravel()[rows]
        state = state._replace(tokens=tokens, log_probs=log_probs, emitted=emitted)
        return state, np.take_along_axis(scores, ranks, axis=1)

    def identity(self):
        """What tells whose state it is: model, weights, adapters, and cache's dtype."""
        weights = backend.identities(self.backbone.variables)
        return id(self), self.backbone.adapters.state, weights, self._cache_dtype()

    def _cache_dtype(self):
        auto = self.kv_cache_dtype == "auto"
        return self.backbone.compute_dtype if auto else self.kv_cache_dtype

    def program(self, kind, features, size, function, donated=None, variables=None):
        """The `backend.Program` that is kept under these names; made if there is none.

        Args:
            kind: what it does.
            features: `samplers.Features`.
            size: what else it was made for, hashable.
            function: what it is made of.
            donated: as in `backend.Program`.
            variables: likewise; all of the backbone's if None.
        """
        weights = self.backbone.variables
        now = backend.identities(weights)
        if now != self._variables:
            # Adapters or quantisation gave the model other weights.
            self._variables = now
            self._programs.clear()
        variables = weights if variables is None else variables
        return self._kept(
            (kind, features, size),
            lambda: backend.Program(function, variables, donated),
        )

    def step(self, kind, features, function):
        """The `backend.Step` that is kept under these names, for use in a program."""
        return self._kept(
            (kind, features, None),
            lambda: backend.Step(function, self.backbone.variables),
        )

    def _kept(self, key, make):
        key = (*key, self.backbone.adapters.state)
        if key not in self._programs:
            self._programs[key] = make()
        return self._programs[key]

    def _program(self, kind, features, size=None):
        functions = {
            "read": lambda *a: self._read(features, *a),
            "decode": lambda *a: self.decode(features, *a),
            "beams": lambda *a: self._beams(size, *a),
        }
        donated = 0 if kind in ("read", "decode") else None
        return self.program(kind, features, size, functions[kind], donated)

    # What follows is traced into programs.

    def _read(self, features, state, tokens, mask, length, controls, stop_ids, limits):
        """Read columns up to `length` of `tokens`; choose the token that follows."""
        counted = ops.cumsum(ops.cast(mask, "int32"), axis=1)
        positions = ops.maximum(state.position[:, None] + counted, 0)
        inputs = {"token_ids": tokens, "padding_mask": mask, "positions": positions}
        carried = state.cache, state.last_hidden, backend.counter(0)
        for size, least in _chunks(tokens.shape[1]):

            def more(carried, least=least):
                return length - carried[2] >= least

            def step(carried, size=size):
                return self._read_chunk(inputs, length, size, *carried)

            carried = backend.loop(more, step, carried)
        cache, hidden, _ = carried
        seen = ops.zeros((tokens.shape[0], 1), dtype="bool")
        if features.penalty:
            shape = (tokens.shape[0], self.backbone.config.vocab_size)
            seen = self.mark(ops.zeros(shape, dtype="bool"), tokens, mask)
        state = state._replace(
            cache=cache,
            emitted=ops.zeros_like(state.emitted),
            done=limits <= 0,
            position=state.position + counted[:, -1],
            seen=seen,
            count=backend.counter(0),
        )
        return self.emit(state, hidden, features, controls, stop_ids, limits)

    def _read_chunk(self, inputs, length, size, cache, hidden, start):
        """Read `size` columns from `start`; those past `length` are padding."""
        part = {
            name: backend.read_slots(x, start, axis=1, size=size)
            for name, x in inputs.items()
        }
        count = backend.least(length - start, size)
        read, old = self._read_part, cache
        if backend.few_shapes():
            read = self.step("chunk", None, read)
            # No Python's 0, which says that all columns are the first, and no padding.
            length = ops.convert_to_tensor(cache.length, dtype="int32")
            old = cache._replace(length=length)
        new, hidden = read(old, part, count - 1)
        # Counted here, since they are Python's integers on torch.
        return new._replace(length=cache.length + count), hidden, start + size

    def _read_part(self, cache, inputs, last):
        """The cache after some columns, and hidden states [B, D] of the `last`."""
        hidden, cache = self.backbone(inputs, cache=cache, last=last)
        return cache, hidden[:, 0]

    def decode(self, features, state, limit, *plan):
        """The state when every row is done or has been given `limit` tokens."""

        def unfinished(state):
            return backend.both(state.count < limit, ops.any(~state.done))

        traced = self._step(features)

        def step(state, **options):
            noise = self.noise(state, plan[0]) if features.random else ()
            new = traced(state, noise, *plan, **options)
            # Counted here, since they are Python's integers on torch.
            cache = new.cache._replace(length=state.cache.length + 1)
            return new._replace(cache=cache, count=state.count + 1)

        return backend.loop(unfinished, step, state, early=True)

    def _step(self, features):
        """One token for each row: a function of the state, noise and the plan."""

        def step(state, noise, *plan):
            state, hidden = self._read_last(state)
            return self.emit(state, hidden, features, *plan, noise=noise)

        return self.step("step", features, step)

    def noise(self, state, controls, later=0):
        """Noise [B, V] for the token that is chosen next, or so many later."""
        shape = (state.done.shape[0], self.backbone.config.vocab_size)
        return backend.gumbel(controls["seed"], state.count + later, shape)

    def _read_last(self, state):
        """Feed each row its newest token: the state, and hidden states [B, D]."""
        position = state.position + 1
        token = backend.read_slots(state.tokens, state.count - 1, axis=1)
        hidden, cache = self.backbone(
            {"token_ids": token, "positions": position[:, None]}, cache=state.cache
        )
        return state._replace(cache=cache, position=position), hidden[:, 0]

    def emit(self, state, hidden, features, controls, stop_ids, limits, noise=None):
        """Choose the next token of each row from its last hidden state [B, D]."""
        logits = ops.cast(self.backbone.logits(hidden), "float32")
        if features.random and noise is None:
            noise = self.noise(state, controls)
        token = samplers.choose(logits, controls, features, state.seen, noise)
        log_prob = samplers.log_probs(logits, token, features)
        if features.penalty:
            fresh = ops.logical_not(state.done)[:, None]
            seen = self.mark(state.seen, token[:, None], fresh)
            state = state._replace(seen=seen)
        state = self._append(state, token, log_prob, stop_ids, limits)
        return state._replace(last_hidden=hidden)

    def _append(self, state, token, log_prob, stop_ids, limits):
        """The state with one more token [B] in each row that is not done."""
        token = ops.where(state.done, 0, token)
        emitted = state.emitted + ops.cast(ops.logical_not(state.done), "int32")
        stopped = ops.any(token[:, None] == stop_ids[None], axis=1)
        stopped = ops.logical_or(stopped, emitted >= limits)
        write = backend.write_slots
        return state._replace(
            tokens=write(state.tokens, token[:, None], state.count, axis=1),
            log_probs=write(state.log_probs, log_prob[:, None], state.count, axis=1),
            emitted=emitted,
            done=ops.logical_or(state.done, stopped),
            count=state.count + 1,
        )

    def _beams(self, width, state, limit, controls, stop_ids, limits):
        """Beam search from the state after prefill, whose token is chosen anew."""
        prompts = state.done.shape[0]
        rows = ops.repeat(ops.arange(prompts, dtype="int32"), width)
        scores = np.full((prompts, width), samplers.DROPPED, "float32")
        scores[:, 0] = 0.0
        scores = ops.convert_to_tensor(scores)
        first = state.last_hidden
        state = _take_rows(state, rows)
        state = state._replace(
            emitted=ops.zeros_like(state.emitted),
            done=limits <= 0,
            count=backend.counter(0),
        )
        hidden = ops.take(first, rows, axis=0)
        carried = self._grow_beams(state, scores, hidden, stop_ids, limits)

        def unfinished(carried):
            state, _ = carried
            return backend.both(state.count < limit, ops.any(~state.done))

        def step(carried):
            state, scores = carried
            state, hidden = self._read_last(state)
            return self._grow_beams(state, scores, hidden, stop_ids, limits)

        return backend.loop(unfinished, step, carried)

    def _grow_beams(self, state, scores, hidden, stop_ids, limits):
        """Keep the best of all one-token continuations of the beams of each prompt."""
        prompts, width = scores.shape
        logits = ops.cast(self.backbone.logits(hidden), "float32")
        log_probs = ops.log_softmax(logits, axis=-1)
        vocab = log_probs.shape[1]
        # A finished beam has one continuation, padding, at no cost.
        idle = np.full((1, vocab), samplers.DROPPED, "float32")
        idle[0, 0] = 0.0
        steps = ops.where(state.done[:, None], ops.convert_to_tensor(idle), log_probs)
        totals = ops.reshape(scores, (-1, 1)) + steps
        scores, best = ops.top_k(ops.reshape(totals, (prompts, -1)), width)
        best = ops.cast(best, "int32")
        rows = best // vocab + ops.arange(prompts, dtype="int32")[:, None] * width
        rows, token = ops.reshape(rows, -1), ops.reshape(best % vocab, -1)
        log_prob = ops.take(ops.reshape(steps, -1), rows * vocab + token)
        state = self._append(_take_rows(state, rows), token, log_prob, stop_ids, limits)
        return state, scores

    def mark(self, seen, tokens, mask):
        """`seen` [B, V] with `tokens` [B, T] marked where `mask` is true."""
        rows = ops.arange(tokens.shape[0], dtype="int32")[:, None]
        rows = ops.broadcast_to(rows, tokens.shape)
        # Padding is sent to one column past the end, which is then cut off.
        width = seen.shape[1]
        columns = ops.where(mask, tokens, width)
        places = ops.stack([ops.reshape(rows, -1), ops.reshape(columns, -1)], axis=1)
        wide = ops.pad(ops.cast(seen, "int32"), [[0, 0], [0, 1]])
        wide = ops.scatter_update(wide, places, ops.ones_like(places[:, 0]))
        return ops.cast(wide[:, :width], "bool")


def _blank_answer(batch, capacity):
    shape = (batch, capacity)
    return ops.zeros(shape, dtype="int32"), ops.zeros(shape, dtype="float32")


def _take_rows(state, rows):
    """Every array of `state` that has rows, with these rows instead."""

    def take(array):
        return ops.take(array, rows, axis=0)

    cache = kv_cache.take_rows(state.cache, rows)
    rest = {
        name: take(array)
        for name, array in state._asdict().items()
        if name not in ("cache", "count")
    }
    return State(cache=cache, count=state.count, **rest)
