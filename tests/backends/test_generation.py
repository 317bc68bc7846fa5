"""generate, stream, chat and score, as a user calls them."""

import contextlib
import gc
import itertools

import numpy as np
import pytest
from keras import ops

import gemma_keras
from gemma_keras import backend, generation, samplers
from gemma_keras.cache import Codes
from gemma_keras.chat import encode_chat

PROMPT = "The cat"
# No stop token, so that a random model says as much as it is asked to.
FREE = {"stop_token_ids": ()}


def ids_of(lm, prompt=PROMPT, **options):
    options = {**FREE, "max_new_tokens": 12, **options}
    return lm.generate(prompt, return_log_probs=True, **options).token_ids


def naive_greedy(lm, prompt, count):
    """The plain way: a whole forward pass for every token."""
    prompt = lm.preprocessor.encode_prompt(prompt)
    # Padded to one length: JAX compiles every operation for every new shape.
    ids = np.zeros((1, len(prompt) + count), "int32")
    ids[0, : len(prompt)] = prompt
    for end in range(len(prompt), len(prompt) + count):
        logits = ops.convert_to_numpy(lm({"token_ids": ids}))
        ids[0, end] = logits[0, end - 1].argmax()
    return ids[0, len(prompt) :].tolist()


def test_greedy_is_what_the_plain_forward_pass_says(lm):
    assert ids_of(lm, max_new_tokens=30) == naive_greedy(lm, PROMPT, 30)


def test_256_greedy_tokens_are_the_likeliest_of_one_forward_pass(lm):
    prompt = lm.preprocessor.encode_prompt(PROMPT)
    answer = ids_of(lm, max_new_tokens=256)
    ids = np.array([prompt + answer], "int32")
    likeliest = ops.convert_to_numpy(lm({"token_ids": ids}))[0].argmax(-1)
    assert likeliest[len(prompt) - 1 : -1].tolist() == answer


@pytest.mark.skipif(backend.NAME != "torch", reason="torch alone records its steps")
@pytest.mark.parametrize("name", ["kernel", "norm", "norm in place"])
def test_a_recorded_step_sees_what_changes(name, new_lm, monkeypatch):
    """Weights that are trained, and another sampler's settings, in the same record."""
    lm, plain = new_lm(), new_lm()
    monkeypatch.setattr(backend.Step, "PATIENCE", 2)
    options = {"sampler": samplers.TopKSampler(5), "seed": 3, **FREE}
    texts = [lm.generate(PROMPT, max_new_tokens=8, **options)]
    for model in (lm, plain):
        block = model.backbone.blocks[0]
        if name == "kernel":
            block.ffw_gating.kernel.assign(2 * block.ffw_gating.kernel)
        elif name == "norm":
            block.pre_ffw_norm.scale._value = block.pre_ffw_norm.scale.value + 3.0
        else:
            block.pre_ffw_norm.scale.value.data.add_(3.0)
    options["sampler"] = samplers.TopKSampler(3, temperature=0.5)
    texts.append(lm.generate(PROMPT, max_new_tokens=8, **options))
    steps = [p for key, p in lm.engine._programs.items() if key[0] == "step"]
    assert [len(step._recorded) for step in steps] == [1]
    monkeypatch.setattr(backend.Step, "PATIENCE", 10**9)
    assert plain.generate(PROMPT, max_new_tokens=8, **options) == texts[1] != texts[0]


@pytest.fixture
def kept(monkeypatch):
    """What is kept of weights in oneDNN's order, where float32 is as bfloat16 is."""
    from gemma_keras.backend import torch_products, torch_reorder

    def keeps(x, kernel):
        import torch

        few = x.numel() <= torch_products.FEW_ROWS * x.shape[-1]
        return torch.jit.is_tracing() and few and min(kernel.shape) >= 16

    if not torch_reorder.can_reorder():
        pytest.skip("this torch has no matrices in oneDNN's order")
    monkeypatch.setattr(backend.Step, "PATIENCE", 2)
    monkeypatch.setattr(backend.products, "onednn_keeps", keeps)
    torch_reorder._kept.clear()
    return torch_reorder._kept


@pytest.mark.skipif(backend.NAME != "torch", reason="torch alone has oneDNN's order")
@pytest.mark.parametrize("how", ["assigned", "in place", "replaced"])
def test_reordered_weights_are_those_of_the_model(how, new_lm, kept, monkeypatch):
    lm, plain = new_lm(), new_lm()
    sampler = samplers.TopKSampler(5)
    options = {"max_new_tokens": 30, "sampler": sampler, "seed": 3, **FREE}
    texts = [lm.generate(PROMPT, **options)]
    matrices = [*kept.values()]
    # The head, and seven of each block.
    assert len(matrices) == 1 + 7 * lm.config.num_layers
    assert lm.generate(PROMPT, **options) == texts[0]
    assert all(a is b for a, b in zip(matrices, kept.values(), strict=True))
    for model in (lm, plain):
        kernel = model.backbone.blocks[0].ffw_gating.kernel
        if how == "assigned":
            kernel.assign(-2 * kernel)
        elif how == "in place":
            kernel.value.data.mul_(-2)
        else:
            kernel._value = -2 * kernel.value
    texts.append(lm.generate(PROMPT, **options))
    monkeypatch.setattr(backend.Step, "PATIENCE", 10**9)
    assert plain.generate(PROMPT, **options) == texts[1] != texts[0]
    del lm, model, kernel
    gc.collect()
    assert not kept


@pytest.mark.skipif(backend.NAME != "torch", reason="torch alone has oneDNN's order")
def test_nothing_is_reordered_where_memory_is_short(new_lm, kept, monkeypatch):
    from gemma_keras.backend import torch_reorder

    lm = new_lm()
    text = lm.generate(PROMPT, max_new_tokens=20, **FREE)
    assert kept
    # While a model trains, its memory is for that.
    with backend.giving_back_memory():
        assert lm.generate(PROMPT, max_new_tokens=20, **FREE) == text
        assert not kept
    monkeypatch.setattr(torch_reorder, "_memory_left", lambda: 2**31)
    assert lm.generate(PROMPT, max_new_tokens=20, **FREE) == text
    assert not kept


@pytest.mark.skipif(backend.NAME != "torch", reason="torch alone has oneDNN's order")
def test_bfloat16_is_decoded_by_reordered_weights_as_without(new_lm, monkeypatch):
    import torch

    from gemma_keras.backend import torch_products, torch_reorder

    if not torch_products._multiplies_on_cpu(torch.bfloat16):
        pytest.skip("oneDNN multiplies no bfloat16 on this processor")
    monkeypatch.setattr(torch_products, "_LEAST", 16)
    lm = new_lm(dtype="bfloat16")
    scores = []
    for patience in (2, 10**9):
        monkeypatch.setattr(backend.Step, "PATIENCE", patience)
        torch_reorder._kept.clear()
        found = lm.generate(PROMPT, max_new_tokens=8, return_log_probs=True, **FREE)
        lm.engine._programs.clear()
        scores.append((found.token_ids, found.log_probs))
        assert bool(torch_reorder._kept) == (patience == 2)
    assert scores[0][0] == scores[1][0]
    np.testing.assert_allclose(scores[0][1], scores[1][1], atol=0.05)


def test_a_batch_gives_each_prompt_what_it_gets_alone(lm):
    prompts = ["The cat", "A dog came by and asked the cat what it had", "Two"]
    together = lm.generate(prompts, max_new_tokens=20, **FREE)
    alone = [lm.generate(prompt, max_new_tokens=20, **FREE) for prompt in prompts]
    assert together == alone
    assert all(text.startswith(p) for text, p in zip(together, prompts, strict=True))


def test_a_string_gives_a_string_and_a_list_a_list(lm):
    assert isinstance(lm.generate("The", max_new_tokens=2), str)
    assert isinstance(lm.generate(["The"], max_new_tokens=2), list)
    assert lm.generate(np.array(["The"]), max_new_tokens=2) == lm.generate(
        ["The"], max_new_tokens=2
    )


def test_strip_prompt_leaves_the_prompt_out(lm):
    whole = lm.generate(PROMPT, max_new_tokens=8, **FREE)
    assert whole == PROMPT + lm.generate(
        PROMPT, max_new_tokens=8, strip_prompt=True, **FREE
    )


def test_max_length_counts_the_prompt_and_max_new_tokens_does_not(lm):
    prompt_length = len(lm.preprocessor.encode_prompt(PROMPT))
    assert len(ids_of(lm, max_new_tokens=None, max_length=prompt_length + 5)) == 5
    assert len(ids_of(lm, max_new_tokens=5)) == 5
    assert len(ids_of(lm, max_new_tokens=9, max_length=prompt_length + 5)) == 5
    # Neither given: the preprocessor's sequence_length, as in KerasHub.
    whole = ids_of(lm, max_new_tokens=None)
    assert len(whole) == lm.preprocessor.sequence_length - prompt_length


def test_a_stop_token_ends_the_answer_and_is_not_in_the_text(lm):
    answer = ids_of(lm)
    stop = answer[5]
    first = answer.index(stop)
    never = next(i for i in range(lm.config.vocab_size) if i not in answer)
    stopped = ids_of(lm, stop_token_ids=[never, stop])
    assert stopped == answer[: first + 1]
    text = lm.generate(
        PROMPT, max_new_tokens=12, stop_token_ids=[stop], strip_prompt=True
    )
    assert text == lm.preprocessor.tokenizer.decode(answer[:first])


def test_rows_of_a_batch_stop_each_at_its_own_time(lm):
    prompts = ["The cat", "A dog came by and"]
    answers = [ids_of(lm, prompt) for prompt in prompts]
    stop = answers[0][4]
    results = lm.generate(
        prompts, max_new_tokens=12, stop_token_ids=[stop], return_log_probs=True
    )
    for result, answer in zip(results, answers, strict=True):
        expected = answer[: answer.index(stop) + 1] if stop in answer else answer
        assert result.token_ids == expected
        assert len(result.log_probs) == len(expected)


@pytest.mark.parametrize("start", [1, 3, 8])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_stop_string_ends_the_answer_also_across_tokens(lm, start, length):
    options = {"max_new_tokens": 24, "strip_prompt": True, **FREE}
    text = lm.generate(PROMPT, **options)
    stop = text[start : start + length]
    expected = text[: text.index(stop)]
    assert lm.generate(PROMPT, stop=stop, **options) == expected
    assert lm.generate(PROMPT, stop=["never said", stop], **options) == expected
    del options["strip_prompt"]
    assert "".join(lm.stream(PROMPT, stop=stop, **options)) == expected


def test_a_stream_is_the_answer_in_pieces(lm):
    pieces = list(lm.stream(PROMPT, max_new_tokens=20, **FREE))
    expected = lm.generate(PROMPT, max_new_tokens=20, strip_prompt=True, **FREE)
    assert "".join(pieces) == expected
    assert len(pieces) > 3


def test_a_stream_can_be_left_early(lm):
    stream = lm.stream(PROMPT, max_new_tokens=20, **FREE)
    first = list(itertools.islice(stream, 2))
    stream.close()
    again = list(itertools.islice(lm.stream(PROMPT, max_new_tokens=20, **FREE), 2))
    assert first == again


def test_log_probs_are_those_of_score(lm):
    answer = lm.generate(PROMPT, max_new_tokens=9, return_log_probs=True, **FREE)
    prompt = lm.preprocessor.encode_prompt(PROMPT)
    ids = np.array([[*prompt, *answer.token_ids]])
    scored = ops.convert_to_numpy(lm.score(ids, scoring_mode="log_probs"))
    expected = scored[0, len(prompt) - 1 : -1]
    np.testing.assert_allclose(answer.log_probs, expected, atol=1e-5)


@pytest.mark.parametrize(
    "sampler",
    [
        samplers.RandomSampler(),
        samplers.TopKSampler(k=4, temperature=1.5),
        samplers.TopPSampler(p=0.7),
        samplers.MinPSampler(p=0.05),
        samplers.Sampler(top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.2),
    ],
    ids=lambda sampler: type(sampler).__name__,
)
def test_a_seed_makes_random_answers_repeatable(lm, sampler):
    first = ids_of(lm, sampler=sampler, seed=3)
    assert ids_of(lm, sampler=sampler, seed=3) == first
    others = [ids_of(lm, sampler=sampler, seed=seed) for seed in range(4, 8)]
    assert any(other != first for other in others)


def test_settings_change_without_compiling_anew(lm):
    engine = lm.engine
    ids_of(lm, sampler=samplers.TopKSampler(k=4, temperature=1.0), seed=1)
    programs = dict(engine._programs)
    ids_of(lm, sampler=samplers.TopKSampler(k=9, temperature=0.3), seed=2)
    ids_of(lm, "A dog", sampler=samplers.TopKSampler(k=2), seed=2, stop_token_ids=[5])
    assert engine._programs == programs


def test_another_length_temperature_or_seed_compiles_nothing(new_lm):
    lm = new_lm()
    ids = np.arange(200, dtype="int32")[None] % 300 + 10

    def answer(length, temperature, seed):
        sampler = samplers.TopKSampler(k=4, temperature=temperature)
        prompt = {"token_ids": ids[:, :length]}
        lm.generate(prompt, max_new_tokens=9, sampler=sampler, seed=seed, **FREE)

    answer(3, 1.0, 1)
    with backend_compilations() as seen:
        counts = compiled(lm)
        for length, temperature, seed in ((40, 0.3, 2), (190, 2.0, 3), (1, 0.9, 4)):
            answer(length, temperature, seed)
    assert compiled(lm) == counts
    assert not seen
    if backend.NAME != "torch":
        assert counts and all(counts)


@contextlib.contextmanager
def backend_compilations():
    """A list of what JAX compiles within it, in programs of ours or not."""
    seen = []
    if backend.NAME != "jax":
        yield seen
        return
    import jax

    def listen(event, duration, **details):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(details)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.jit(lambda x: x + len(seen))(1.5)
        assert seen, "JAX tells of compilations in another way"
        seen.clear()
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("rings", [True, False])
def test_prompts_of_any_length_are_read_in_chunks(new_lm, monkeypatch, rings):
    """One by one and together, around the sizes of chunks and of the window."""
    monkeypatch.setattr(generation, "LONG", 100)
    lm = new_lm()
    rng = np.random.default_rng(0)
    lengths = [1, 5, 63, 64, 65, 129, 200, 300]
    prompts = [rng.integers(4, 340, length).tolist() for length in lengths]
    plan = generation.make_plan(samplers.get("greedy"), [3] * len(prompts), ())
    engine = lm.engine
    state = engine.advance(engine.start(prompts, plan, rings), plan, 3)
    answers = ops.convert_to_numpy(state.tokens)[:, :3].tolist()
    rows = np.zeros((len(prompts), 303), "int32")
    for row, prompt, answer in zip(rows, prompts, answers, strict=True):
        row[: len(prompt) + 3] = prompt + answer
    likeliest = ops.convert_to_numpy(lm({"token_ids": rows})).argmax(-1)
    for row, length, answer in zip(likeliest, lengths, answers, strict=True):
        assert row[length - 1 : length + 2].tolist() == answer
    plan = generation.make_plan(samplers.get("greedy"), [3], ())
    for prompt, answer in list(zip(prompts, answers, strict=True))[2:6]:
        state = engine.advance(engine.start([prompt], plan, rings), plan, 3)
        assert ops.convert_to_numpy(state.tokens)[0, :3].tolist() == answer


def compiled(lm):
    """How many times each program was compiled, as the backend counts it."""
    sizes = []
    for program in lm.engine._programs.values():
        if hasattr(program, "_concrete"):
            sizes.append(len(program._concrete))
        elif hasattr(program, "_compiled"):
            sizes.append(program._compiled._cache_size())
    return sizes


def test_repetition_penalty_avoids_what_was_said(lm):
    strong = samplers.Sampler(temperature=0.0, repetition_penalty=1e6)
    ids = ids_of(lm, sampler=strong, max_new_tokens=25)
    prompt = lm.preprocessor.encode_prompt(PROMPT)
    assert len(set(ids)) == len(ids)
    assert not set(ids) & set(prompt)


def test_beam_search_of_two_tokens_is_exhaustive_when_wide_enough(lm):
    prompt = lm.preprocessor.encode_prompt(PROMPT)
    logits = ops.convert_to_numpy(lm.score([prompt]))[0, -1].astype("float64")
    vocab = len(logits)
    both = np.array([[*prompt, i] for i in range(vocab)])
    second = ops.convert_to_numpy(lm.score(both))[:, -1].astype("float64")
    totals = log_softmax(logits)[:, None] + log_softmax(second)
    best = np.unravel_index(totals.argmax(), totals.shape)
    found = ids_of(lm, sampler=samplers.BeamSampler(num_beams=vocab), max_new_tokens=2)
    assert found == [int(i) for i in best]


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_one_beam_is_greedy(lm):
    beam = samplers.BeamSampler(num_beams=1)
    assert ids_of(lm, sampler=beam) == ids_of(lm)


def test_as_many_beams_as_tokens_find_the_likeliest_of_all_pairs(lm):
    vocabulary = lm.config.vocab_size
    (found,) = lm.generate(
        [PROMPT],
        max_new_tokens=2,
        sampler=samplers.BeamSampler(num_beams=vocabulary),
        return_log_probs=True,
        **FREE,
    )
    prompt = lm.preprocessor.encode_prompt(PROMPT)
    rows = np.array([[*prompt, first] for first in range(vocabulary)])
    logits = np.asarray(ops.convert_to_numpy(lm({"token_ids": rows})), "float64")
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    pairs = log_probs[0, -2][:, None] + log_probs[:, -1]
    best = np.unravel_index(pairs.argmax(), pairs.shape)
    assert found.token_ids == [*map(int, best)]
    np.testing.assert_allclose(sum(found.log_probs), pairs.max(), rtol=1e-5)


def test_beams_stop_at_stop_tokens(lm):
    beam = samplers.BeamSampler(num_beams=3)
    free = ids_of(lm, sampler=beam, max_new_tokens=8)
    stopped = ids_of(lm, sampler=beam, max_new_tokens=8, stop_token_ids=[free[0]])
    if free[0] in stopped:
        assert stopped.index(free[0]) == len(stopped) - 1
    else:
        assert len(stopped) == 8


def test_compile_sets_the_default_sampler(new_lm):
    lm = new_lm()
    greedy = ids_of(lm)
    lm.compile(sampler=samplers.TopKSampler(k=1))
    assert ids_of(lm) == greedy
    lm.compile(sampler=samplers.RandomSampler(seed=5, temperature=3.0))
    hot = ids_of(lm)
    assert hot == ids_of(lm, seed=5) != greedy
    assert ids_of(lm, sampler="greedy") == greedy


def test_token_ids_in_token_ids_out(lm):
    prompts = [lm.preprocessor.encode_prompt(p) for p in ("The cat", "A dog came by")]
    width = max(map(len, prompts))
    ids, mask = np.zeros((2, width), "int32"), np.zeros((2, width), bool)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
        mask[row, : len(prompt)] = True
    out = lm.generate({"token_ids": ids, "padding_mask": mask}, max_length=20, **FREE)
    assert out["token_ids"].shape == out["padding_mask"].shape == (2, 20)
    for row, prompt in enumerate(prompts):
        kept = out["token_ids"][row][out["padding_mask"][row]].tolist()
        text = ("The cat", "A dog came by")[row]
        assert kept == prompt + ids_of(lm, text, max_new_tokens=20 - len(prompt))


def test_a_chat_goes_on_from_its_cache(lm, monkeypatch):
    """A reply of one token is read back as it was written; longer ones may not be.

    A random model does not spell as the tokenizer does.
    """
    resumed = []
    resume = lm.engine.resume
    monkeypatch.setattr(
        lm.engine, "resume", lambda *args: resumed.append(args[1]) or resume(*args)
    )
    chat = lm.start_chat(max_new_tokens=1)
    chat.send("the moon")
    read = len(chat._cache.token_ids)
    reply = chat.send("and the sea and the stars until the sun came up")
    assert len(resumed) == 1
    assert len(resumed[0]) == len(chat._cache.token_ids) - read
    # Without a cache: the same messages as one prompt.
    assert reply == lm.generate(chat.history[:3], max_new_tokens=1)


def test_a_chat_says_what_a_fresh_one_would(lm):
    chat = lm.start_chat(max_new_tokens=6)
    first = chat.send("the moon")
    second = chat.send("and the sea and the stars until the sun came up")
    assert [message["role"] for message in chat.history] == ["user", "assistant"] * 2
    assert chat.history[1]["content"] == first
    assert lm.generate(chat.history[:3], max_new_tokens=6) == second


def test_prompts_that_begin_alike_are_read_from_where_they_differ(lm):
    cache = gemma_keras.PromptCache()
    start = "The cat sat on the mat and the dog came by and"
    prompts = [start + " slept", start + " sang to the moon", start, "Two birds", start]
    shared = lm.preprocessor.encode_prompt(start)
    reused = []
    for prompt in prompts:
        found = lm.generate(prompt, max_new_tokens=7, prompt_cache=cache, **FREE)
        assert found == lm.generate(prompt, max_new_tokens=7, **FREE)
        reused.append(cache.reused)
        assert len(cache.token_ids) == len(lm.preprocessor.encode_prompt(prompt)) + 6
    # One token at least is read; <bos> is common to all.
    assert reused[:1] + reused[2:] == [0, len(shared) - 1, 1, 1]
    assert len(shared) <= reused[1] < len(lm.preprocessor.encode_prompt(prompts[1]))


def test_an_answer_is_part_of_what_is_kept(lm):
    cache = gemma_keras.PromptCache()
    ids = lm.preprocessor.encode_prompt("The cat")
    width = len(ids)
    given = {"token_ids": np.array([ids]), "padding_mask": np.ones((1, width), bool)}
    for more in (6, 9):
        out = lm.generate(given, max_new_tokens=more, prompt_cache=cache, **FREE)
        expected = lm.generate(given, max_new_tokens=more, **FREE)
        np.testing.assert_array_equal(out["token_ids"], expected["token_ids"])
        given = {k: v[:, : width + more] for k, v in out.items()}
        width += more
    assert cache.reused == len(ids) + 5


def test_several_prompts_and_streams_share_a_cache(lm):
    cache = gemma_keras.PromptCache()
    prompts = ["The cat sat on the mat", "The cat sat on a dog"]
    found = lm.generate(prompts, max_new_tokens=5, prompt_cache=cache, **FREE)
    assert found == [lm.generate(p, max_new_tokens=5, **FREE) for p in prompts]
    assert cache.reused > 1
    pieces = lm.stream(prompts[0], max_new_tokens=5, prompt_cache=cache, **FREE)
    assert prompts[0] + "".join(pieces) == found[0]
    assert cache.reused > 1
    stopped = lm.generate(
        prompts[1], max_new_tokens=30, stop=["e"], prompt_cache=cache, **FREE
    )
    assert stopped == lm.generate(prompts[1], max_new_tokens=30, stop=["e"], **FREE)
    again = lm.generate(prompts[1], max_new_tokens=5, prompt_cache=cache, **FREE)
    assert again == found[1] and cache.reused > 1


def test_a_cache_is_not_used_where_it_would_be_wrong(lm, new_lm):
    prompt = "The cat sat on the mat"
    cache, options = gemma_keras.PromptCache(), {"max_new_tokens": 5, **FREE}
    lm.generate(prompt, prompt_cache=cache, **options)
    other = new_lm()
    assert other.generate(prompt, prompt_cache=cache, **options) == other.generate(
        prompt, **options
    )
    assert cache.reused == 0
    other.enable_lora(2)
    other.generate(prompt, prompt_cache=cache, **options)
    assert cache.reused == 0
    penalty = samplers.GreedySampler(repetition_penalty=1.5)
    found = other.generate(prompt, prompt_cache=cache, sampler=penalty, **options)
    assert cache.reused == 0
    assert found == other.generate(prompt, sampler=penalty, **options)
    with pytest.raises(ValueError, match="Beam search takes no prompt_cache"):
        lm.generate(prompt, prompt_cache=cache, sampler="beam", **options)


def test_a_ring_that_has_let_go_is_read_anew(lm):
    cache = gemma_keras.PromptCache(rings=True)
    start = "The cat sat on the mat and the dog came by"
    assert lm.config.sliding_window < len(lm.preprocessor.encode_prompt(start))
    for prompt in (start + " slept", start + " sang"):
        found = lm.generate(prompt, max_new_tokens=5, prompt_cache=cache, **FREE)
        assert found == lm.generate(prompt, max_new_tokens=5, **FREE)
        assert cache.reused == 0


@pytest.fixture
def lm_in_codes(lm, monkeypatch):
    """The shared model, with keys and values in 8 bits while a test runs."""
    monkeypatch.setattr(lm, "kv_cache_dtype", "int8")
    return lm


def assert_near_score(lm, prompts, answers):
    """Log-probabilities of another model, or of other rows, are off by whole nats.

    Takes two prompts as ids and their two answers.
    """
    # In one shape: JAX compiles every operation for every new one.
    ids = np.zeros((2, 64), "int32")
    for row, prompt, answer in zip(ids, prompts, answers, strict=True):
        both = [*prompt, *answer.token_ids]
        row[: len(both)] = both
    scored = ops.convert_to_numpy(lm.score(ids, scoring_mode="log_probs"))
    for row, prompt, answer in zip(scored, prompts, answers, strict=True):
        expected = row[len(prompt) - 1 :][: len(answer.log_probs)]
        difference = np.abs(np.array(answer.log_probs) - expected).max()
        # Not the same number by number: codes were read.
        assert 1e-5 < difference < 0.2


def test_beams_of_a_ragged_batch_over_keys_and_values_in_8_bits(lm_in_codes):
    prompts = ["The cat", "A dog came by and asked"]
    answers = lm_in_codes.generate(
        prompts,
        max_new_tokens=12,
        sampler=samplers.BeamSampler(num_beams=3),
        return_log_probs=True,
        **FREE,
    )
    ids = [lm_in_codes.preprocessor.encode_prompt(prompt) for prompt in prompts]
    assert_near_score(lm_in_codes, ids, answers)


def test_a_chat_over_keys_and_values_in_8_bits(lm_in_codes):
    lm = lm_in_codes
    chat = lm.start_chat(max_new_tokens=12, **FREE)
    # One token, since more of a random model's may read as others, once they are text.
    chat.send("the moon", max_new_tokens=1)
    reply = chat.send("the sea")
    assert chat._cache.reused > lm.config.sliding_window
    kept = chat._cache._state.cache.keys
    assert all(isinstance(keys, Codes) for keys in kept)
    (answer,) = lm.generate(
        [chat.history[:3]], max_new_tokens=12, return_log_probs=True, **FREE
    )
    assert reply == answer.text
    ids = encode_chat(lm.preprocessor.tokenizer, chat.history[:3])
    assert_near_score(lm, [ids, ids], [answer, answer])


def test_a_switch_of_the_caches_dtype_reads_anew_and_compiles_once(lm, monkeypatch):
    cache, found = gemma_keras.PromptCache(rings=True), {"auto": set(), "int8": set()}
    counts = []
    for dtype in ("auto", "int8", "auto", "int8"):
        monkeypatch.setattr(lm, "kv_cache_dtype", dtype)
        ids = ids_of(lm, prompt_cache=cache, max_new_tokens=12)
        assert cache.reused == 0
        found[dtype].add(tuple(ids))
        counts.append(compiled(lm))
    assert all(len(answers) == 1 for answers in found.values())
    assert counts[1] == counts[2] == counts[3]


@pytest.mark.parametrize("value", ["int4", "float8", None, 8])
def test_other_dtypes_of_the_cache_are_refused(lm, value):
    allowed = 'kv_cache_dtype must be "auto", .*, or "int8"'
    with pytest.raises(ValueError, match=allowed):
        lm.kv_cache_dtype = value
    with pytest.raises(ValueError, match=allowed):
        gemma_keras.GemmaCausalLM(lm.backbone, kv_cache_dtype=value)
    # Before anything is looked for.
    with pytest.raises(ValueError, match=allowed):
        gemma_keras.GemmaCausalLM.from_preset("./nowhere", kv_cache_dtype=value)
    assert lm.kv_cache_dtype == "auto"


def test_the_caches_dtype_is_part_of_a_models_config(lm):
    config = gemma_keras.GemmaCausalLM(lm.backbone, kv_cache_dtype="int8").get_config()
    copy = gemma_keras.GemmaCausalLM.from_config(config)
    assert copy.kv_cache_dtype == "int8"
    del config["kv_cache_dtype"]
    assert gemma_keras.GemmaCausalLM.from_config(config).kv_cache_dtype == "auto"


def test_a_chat_whose_history_is_edited_reads_it_anew(lm):
    chat = lm.start_chat(max_new_tokens=5)
    chat.send("the moon")
    chat.history[1] = {"role": "assistant", "content": "a cat"}
    reply = chat.send("the sea")
    assert reply == lm.generate(chat.history[:3], max_new_tokens=5)
    chat.reset()
    assert chat.history == []


def test_a_system_message_goes_into_the_first_turn(lm):
    chat = lm.start_chat(system="Two birds", max_new_tokens=5)
    reply = chat.send("sang")
    user = {"role": "user", "content": "Two birds\n\nsang"}
    assert reply == lm.generate([user], max_new_tokens=5)


def test_a_chat_that_outgrows_its_first_buffers_goes_on(lm):
    chat = lm.start_chat(max_new_tokens=30, **FREE)
    chat.send("the moon")
    reply = chat.send("the sea and the stars and the mice and the milk")
    messages = chat.history[:3]
    assert reply == lm.generate(messages, max_new_tokens=30, **FREE)


def test_over_long_prompts_are_refused_or_cut_with_a_warning(lm, new_lm):
    long = "the cat " * 40
    with pytest.raises(ValueError, match="at most 9 fit"):
        lm.generate(long, max_length=10)
    other = new_lm()
    other.preprocessor.truncate = "warn"
    with pytest.warns(UserWarning, match="were cut"):
        text = other.generate(long, max_length=10, strip_prompt=True, **FREE)
    assert len(other.preprocessor.tokenizer.encode(text)) >= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be a positive integer"),
        ({"max_length": -1}, "max_length must be a positive integer"),
        ({"max_new_tokens": 1.5}, "max_new_tokens must be a positive integer"),
        ({"stop": ""}, "stop must be a string"),
        ({"stop": [3]}, "stop must be a string"),
        ({"stop_token_ids": "eos"}, "stop_token_ids must be"),
        ({"stop_token_ids": range(40)}, "At most 16 stop_token_ids"),
        ({"sampler": "nucleus"}, "sampler must be one of 'greedy'"),
        ({"seed": -1}, "seed must be an integer"),
        ({"seed": "x"}, "seed must be an integer"),
    ],
)
def test_bad_options_are_refused_with_what_is_allowed(lm, options, message):
    with pytest.raises(ValueError, match=message):
        lm.generate(PROMPT, **options)


@pytest.mark.parametrize("prompt", [[], 3, None, [3], {"x": 1}])
def test_bad_prompts_are_refused(lm, prompt):
    with pytest.raises((ValueError, TypeError)):
        lm.generate(prompt, max_new_tokens=2)


def test_streams_refuse_bad_input_before_the_first_piece(lm):
    with pytest.raises(ValueError, match="at most 9 fit"):
        lm.stream("the cat " * 40, max_length=10)
    with pytest.raises(ValueError, match="Beam search"):
        lm.stream(PROMPT, sampler="beam")
    with pytest.raises(TypeError, match="Unknown option"):
        lm.stream(PROMPT, max_tokens=3)
