"""Guessed tokens change when an answer comes, never what it is.

Most tests share a model and its programs: what is dear here is to compile them.
"""

import dataclasses

import numpy as np
import pytest
import random_twin
from keras import ops

import gemma_keras
from gemma_keras import backend, samplers, text_generation

# No stop token, so that a random model says as much as it is asked to.
FREE = {"stop_token_ids": (), "max_new_tokens": 64}
PROMPTS = ["The cat sat on the mat. The cat", "A dog came by and", "Two birds"]
DEAR = pytest.mark.skipif(
    backend.NAME != "torch", reason="compiles much, of what other tests compile less"
)


@pytest.fixture
def lookup():
    """Guesses often, and so often wrongly."""
    return gemma_keras.PromptLookup(num_tokens=7, min_ngram=1)


def answers(lm, prompts=PROMPTS, **options):
    options = {**FREE, "return_log_probs": True, **options}
    return [lm.generate(prompt, **options) for prompt in prompts]


def check(found, plain):
    for one, other in zip(found, plain, strict=True):
        assert one.token_ids == other.token_ids
        assert one.text == other.text
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-5)


def compiled(lm):
    """How many times each program was compiled, as the backend counts it."""
    sizes = {}
    for key, program in lm.engine._programs.items():
        if hasattr(program, "_concrete"):
            sizes[key] = len(program._concrete)
        elif hasattr(program, "_compiled"):
            sizes[key] = program._compiled._cache_size()
    return sizes


def test_greedy_answers_are_those_of_the_plain_path(lm, lookup):
    plain = answers(lm)
    found = answers(lm, PROMPTS[:1], speculation=lookup)
    counts = compiled(lm)
    found += answers(lm, PROMPTS[1:], speculation=lookup)
    assert compiled(lm) == counts
    check(found, plain)
    # Some guesses were right and some wrong, so both have been seen.
    assert lookup.drafted == 7 * lookup.passes
    assert 0 < lookup.accepted < lookup.drafted
    # Prompts of one call are answered one after the other.
    together = lm.generate(PROMPTS, speculation=lookup, return_log_probs=True, **FREE)
    check(together, plain)


def test_sampled_answers_are_those_of_their_seed(lm, lookup):
    """With a penalty, which counts what was guessed before as said."""
    sampler = samplers.RandomSampler(temperature=0.2, repetition_penalty=1.05)
    options = {"sampler": sampler, "seed": 3}
    check(answers(lm, speculation=lookup, **options), answers(lm, **options))
    assert 0 < lookup.accepted < lookup.drafted


@DEAR
def test_a_draft_that_agrees_is_always_right(lm):
    """The model as its own draft, with noise: both draw the same at every place."""
    draft = gemma_keras.DraftModel(lm, num_tokens=7)
    options = {"sampler": samplers.RandomSampler(temperature=0.4), "seed": 3}
    options["max_new_tokens"] = 1 + 5 * 8
    found = answers(lm, PROMPTS[:2], speculation=draft, **options)
    check(found, answers(lm, PROMPTS[:2], **options))
    assert (draft.passes, draft.drafted, draft.accepted) == (10, 70, 70)


def test_a_draft_that_differs_only_costs_time(lm, new_lm):
    other = new_lm()
    kernel = other.backbone.blocks[1].ffw_linear.kernel
    kernel.assign(0.9 * kernel)
    draft = gemma_keras.DraftModel(other, num_tokens=7)
    check(answers(lm, speculation=draft), answers(lm))
    # It knows where it stands after guesses that were wrong.
    assert draft.drafted / 3 < draft.accepted < draft.drafted


def test_answers_end_within_a_run_of_right_guesses(lm, lookup):
    (whole,) = answers(lm, PROMPTS[:1])
    ids, text_of = whole.token_ids, lm.preprocessor.tokenizer.decode
    options = {"speculation": lookup, "strip_prompt": True}
    for count in (1, 2, 9, 14):
        (found,) = answers(lm, PROMPTS[:1], max_new_tokens=count, **options)
        assert found.token_ids == ids[:count]
    for place in (3, 20, 41):
        first = ids.index(ids[place])
        (found,) = answers(lm, PROMPTS[:1], stop_token_ids=ids[place], **options)
        assert found.token_ids == ids[: first + 1]
        assert len(found.log_probs) == first + 1
        assert found.text == text_of(ids[:first])
    text = text_of(ids)
    for start in (2, 30):
        stop = text[start : start + 4]
        (found,) = answers(lm, PROMPTS[:1], stop=stop, **options)
        assert found.text == text[: text.index(stop)]
        pieces = lm.stream(PROMPTS[0], stop=stop, speculation=lookup, **FREE)
        assert "".join(pieces) == found.text


def test_a_stream_gives_what_a_pass_gives(lm, lookup, monkeypatch):
    monkeypatch.setattr(text_generation, "SECONDS_BETWEEN_PIECES", 0.0)
    expected = lm.generate(PROMPTS[0], strip_prompt=True, **FREE)
    pieces = list(lm.stream(PROMPTS[0], speculation="prompt_lookup", **FREE))
    assert "".join(pieces) == expected
    assert len(pieces) < len(list(lm.stream(PROMPTS[0], **FREE)))


def test_a_chat_may_begin_to_guess(lm, lookup):
    """Its rings have wrapped by then, and get the slots that guesses need."""
    chat = lm.start_chat(max_new_tokens=8, stop_token_ids=())
    chat.send("the moon")
    reply = chat.send("the moon", speculation=lookup, max_new_tokens=20)
    options = {"max_new_tokens": 20, "stop_token_ids": ()}
    assert reply == lm.generate(chat.history[:-1], **options)
    assert lookup.passes > 0


@DEAR
def test_a_prompt_cache_goes_on_from_what_was_accepted(lm, lookup):
    cache = gemma_keras.PromptCache()
    ids = lm.preprocessor.encode_prompt(PROMPTS[0])
    given = {"token_ids": np.array([ids]), "padding_mask": np.ones((1, len(ids)), bool)}
    options = {"stop_token_ids": ()}
    for more in (12, 30):
        plain = lm.generate(given, max_new_tokens=more, **options)
        out = lm.generate(
            given,
            max_new_tokens=more,
            prompt_cache=cache,
            speculation=lookup,
            **options,
        )
        np.testing.assert_array_equal(out["token_ids"], plain["token_ids"])
        given = {name: rows[:, : len(ids) + 12] for name, rows in out.items()}
    assert lookup.accepted > 0
    assert cache.reused == len(ids) + 11


@DEAR
@pytest.mark.parametrize(("generation", "window"), [(1, None), (2, 5), (3, 1)])
def test_every_gemma_says_what_one_forward_pass_says(config, generation, window):
    """Also with windows shorter than what is guessed at a time."""
    settings = {"sliding_window": window, "layer_pattern": "LG" if window else "G"}
    if generation == 1:
        settings |= {"use_qk_norm": False, "use_post_norms": False}
    if generation == 2:
        settings |= {"use_qk_norm": False, "attn_logit_soft_cap": 20.0}
        settings |= {"final_logit_soft_cap": 10.0}
    lm = random_twin.build(dataclasses.replace(config, **settings))
    prompt = [2, *range(40, 60), *range(40, 52)]
    guesses = gemma_keras.PromptLookup(6, min_ngram=1)
    for speculation in (guesses, gemma_keras.DraftModel(lm, 3)):
        ids = lm.generate(
            {"token_ids": np.array([prompt]), "padding_mask": np.ones((1, 33), bool)},
            max_new_tokens=40,
            speculation=speculation,
            stop_token_ids=(),
        )["token_ids"]
        likeliest = ops.convert_to_numpy(lm({"token_ids": ids}))[0].argmax(-1)
        assert likeliest[32:-1].tolist() == ids[0, 33:].tolist()
        assert speculation.accepted > 0


def test_what_cannot_be_is_refused(lm, new_lm, config):
    with pytest.raises(ValueError, match='speculation must be "prompt_lookup"'):
        lm.generate("The", speculation="lookup")
    with pytest.raises(ValueError, match="Beam search takes no speculation"):
        lm.stream("The", speculation="prompt_lookup", sampler="beam")
    with pytest.raises(ValueError, match="must be a GemmaCausalLM, got 'gemma'"):
        gemma_keras.DraftModel("gemma")
    with pytest.raises(ValueError, match="num_tokens must be a positive integer"):
        gemma_keras.DraftModel(lm, num_tokens=0)
    tiny = gemma_keras.GemmaCausalLM.from_preset("gemma_tiny_en", load_weights=False)
    with pytest.raises(ValueError, match="must have the vocabulary of the model"):
        lm.generate("The", speculation=tiny)
    # Without a tokenizer their sizes have to do.
    larger = random_twin.build(dataclasses.replace(config, vocab_size=400))
    with pytest.raises(ValueError, match="the model 340, its draft 400"):
        lm.generate("The", speculation=larger)
