"""Perplexity and the harness, against `score` on whole sequences."""

import importlib
import importlib.util
import json
import math
import sys
import types

import keras
import numpy as np
import pytest

from gemma_keras import backend
from gemma_keras.data import pad_rows
from gemma_keras.evaluation import Scorer, exact_match, perplexity

INSTALLED = importlib.util.find_spec("lm_eval") is not None
TEXT = "The cat sat on the mat. Two birds sang 12 songs; the owl counted none."


def log_probs(lm, ids):
    """Of each token but the first, by one forward pass over all."""
    # Padded to one length, which costs one compilation.
    row, mask = np.zeros((1, 64), "int32"), np.zeros((1, 64), bool)
    row[0, : len(ids)], mask[0, : len(ids)] = ids, True
    found = lm.score(row, mask, scoring_mode="log_probs")
    return keras.ops.convert_to_numpy(found)[0, : len(ids) - 1]


@pytest.fixture(scope="module")
def ids(lm):
    ids = lm.preprocessor.tokenizer.encode(TEXT, add_bos=True)
    assert len(ids) > 35
    return ids


def test_scores_are_those_of_a_forward_pass_over_each_sequence(lm, ids):
    sequences = [ids, ids[:7], ids[:30], ids[:1]]
    every = [(each, np.ones(len(each), bool)) for each in sequences]
    scores, windows = Scorer(lm, window=64, batch_size=2).score(every)
    assert windows == 3
    logits = keras.ops.convert_to_numpy(lm.score(np.array([ids])))[0]
    np.testing.assert_array_equal(scores[0].right, logits[:-1].argmax(-1) == ids[1:])
    for each, score in zip(sequences[:3], scores, strict=False):
        np.testing.assert_allclose(score.log_probs, log_probs(lm, each), atol=2e-5)
    assert len(scores[3].log_probs) == 0


def test_only_what_is_wanted_is_scored(lm, ids):
    wanted = np.zeros(len(ids), bool)
    wanted[[5, 6, 20]] = True
    ((score,), _) = Scorer(lm, window=64, batch_size=2).score([(ids, wanted)])
    expected = log_probs(lm, ids)[[4, 5, 19]]
    np.testing.assert_allclose(score.log_probs, expected, atol=2e-5)


def test_a_long_text_is_read_in_windows_that_begin_with_bos(lm, ids):
    """Each token once, with at least window - stride tokens before it."""
    window, stride = 16, 6
    scorer = Scorer(lm, window=window, stride=stride, batch_size=4)
    ((score,), windows) = scorer.score([(ids, np.ones(len(ids), bool))])
    expected, end = list(log_probs(lm, ids[: window + 1])), window + 1
    count = 1
    while end < len(ids):
        start, end = end, min(end + stride, len(ids))
        row = [ids[0], *ids[end - window : end]]
        expected += list(log_probs(lm, row)[start - end :])
        count += 1
    assert windows == count
    assert count > 3
    np.testing.assert_allclose(score.log_probs, expected, atol=2e-5)


def test_perplexity_counts_each_token_the_same(lm, ids):
    scorer = Scorer(lm, window=64, batch_size=2)
    samples = [(each, np.ones(len(each), bool)) for each in (ids, ids[:6])]
    result = perplexity(scorer, samples, [TEXT, "ab"])
    both = np.concatenate([log_probs(lm, each) for each, _ in samples])
    assert result.tokens == len(both)
    assert result.loss == pytest.approx(-both.mean(), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(-both.mean()), rel=1e-4)
    bits = -both.sum() / math.log(2) / (len(TEXT) + 2)
    assert result.bits_per_byte == pytest.approx(bits, rel=1e-5)
    with pytest.raises(ValueError, match="no token to score"):
        perplexity(scorer, [(ids[:1], [True])])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"window": 1}, "window must be from 2 to 512"),
        ({"window": 513}, "window must be from 2 to 512"),
        ({"window": 8, "stride": 8}, "stride must be from 1 to 7"),
        ({"batch_size": 0}, "batch_size must be from 1"),
    ],
)
def test_a_number_out_of_range_is_told(lm, settings, told):
    with pytest.raises(ValueError, match=told):
        Scorer(lm, **settings)


# The harness


@pytest.fixture(scope="module")
def harness(lm):
    """A `GemmaLM`, of a stand-in for the harness' base class if there is no other."""
    with pytest.MonkeyPatch.context() as patch:
        if not INSTALLED:
            base = types.ModuleType("lm_eval.api.model")
            base.LM = type("LM", (), {"__init__": lambda self: None})
            for name in ("lm_eval", "lm_eval.api"):
                patch.setitem(sys.modules, name, types.ModuleType(name))
            patch.setitem(sys.modules, "lm_eval.api.model", base)
        from gemma_keras.harness import GemmaLM

        yield GemmaLM(lm, batch_size=2, max_length=48, max_gen_toks=5)


def test_without_the_harness_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "gemma_keras.harness", raising=False)
    with pytest.raises(ImportError, match=r"gemma_keras\[eval\]"):
        importlib.import_module("gemma_keras.harness")


def ask(*arguments):
    return [types.SimpleNamespace(args=each) for each in arguments]


def test_loglikelihood_is_that_of_the_continuation(lm, harness):
    tokenizer = lm.preprocessor.tokenizer
    asked = [("The cat", " sat on"), ("The cat ", "sat on"), ("", "The owl")]
    found = harness.loglikelihood(ask(*asked))
    for (context, continuation), (total, greedy) in zip(asked, found, strict=True):
        ids = tokenizer.encode(context + continuation, add_bos=True)
        count = len(ids) - len(tokenizer.encode(context.rstrip(), add_bos=True))
        assert total == pytest.approx(log_probs(lm, ids)[-count:].sum(), abs=1e-4)
        logits = keras.ops.convert_to_numpy(lm.score(np.array([ids])))[0]
        likeliest = logits[-count - 1 : -1].argmax(-1)
        assert greedy == (likeliest.tolist() == ids[-count:])
    assert found[0] == pytest.approx(found[1])


def test_what_is_too_long_loses_its_beginning(lm, harness):
    ids = lm.preprocessor.tokenizer.encode(TEXT + TEXT)
    assert len(ids) > 48
    ((total, _),) = harness.loglikelihood(ask((TEXT, TEXT)))
    kept = [lm.preprocessor.tokenizer.bos_token_id, *ids[-48:]]
    count = len(ids) - len(lm.preprocessor.tokenizer.encode(TEXT))
    expected = log_probs(lm, kept)[-min(count, 48) :].sum()
    assert total == pytest.approx(expected, abs=1e-3)


def test_rolling_is_the_whole_text(lm, harness, ids):
    short = "The cat sat on the mat."
    whole = lm.preprocessor.tokenizer.encode(short, add_bos=True)
    (total,) = harness.loglikelihood_rolling(ask((short,)))
    assert total == pytest.approx(log_probs(lm, whole).sum(), abs=1e-4)


def test_generate_until_stops_before_what_it_is_told(lm, harness):
    free, limited = harness.generate_until(
        ask(("The cat", {}), ("The cat", {"max_gen_toks": 2}))
    )
    assert free == lm.generate("The cat", max_new_tokens=5, strip_prompt=True)
    assert limited == lm.generate("The cat", max_new_tokens=2, strip_prompt=True)
    stop = free[2:4]
    (cut,) = harness.generate_until(ask(("The cat", {"until": [stop]})))
    assert cut == free[: free.index(stop)]


def test_a_chat_is_written_as_gemma_reads_it(harness):
    text = harness.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert text == "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"


@pytest.mark.reference
def test_a_local_task_of_the_harness(lm, tmp_path):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    from gemma_keras.harness import GemmaLM

    rows = [{"q": "The cat", "choices": ["sat", "345"], "gold": i} for i in (0, 1)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    answer = lm.generate("The cat", max_new_tokens=3, strip_prompt=True)
    kinds = {
        "local": "output_type: multiple_choice\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_text: '{{q}}'\ndoc_to_target: '{{gold}}'\n"
        "metric_list: [{metric: acc}]\n",
        "rolling": "output_type: loglikelihood_rolling\n"
        "doc_to_text: ''\ndoc_to_target: '{{q}}'\n"
        "metric_list: [{metric: byte_perplexity}]\n",
        "until": "output_type: generate_until\n"
        f"doc_to_text: '{{{{q}}}}'\ndoc_to_target: {json.dumps(answer)}\n"
        "generation_kwargs: {until: ['never'], max_gen_toks: 3}\n"
        "metric_list: [{metric: exact_match}]\n",
    }
    for name, kind in kinds.items():
        (tmp_path / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\n"
            f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n"
            f"test_split: test\n{kind}"
        )
    found = lm_eval.simple_evaluate(
        model=GemmaLM(lm, batch_size=2, max_length=48),
        tasks=list(kinds),
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    # Either answer is right once, so that one of the two is found.
    assert found["results"]["local"]["acc,none"] == 0.5
    whole = lm.preprocessor.tokenizer.encode("The cat", add_bos=True)
    expected = math.exp(-log_probs(lm, whole).sum() / len("The cat"))
    perplexity = found["results"]["rolling"]["byte_perplexity,none"]
    assert perplexity == pytest.approx(expected, rel=1e-4)
    assert found["results"]["until"]["exact_match,none"] == 1.0


def test_an_answer_is_right_to_the_letter_or_not(lm):
    tokenizer = lm.preprocessor.tokenizer
    stop = tokenizer.stop_token_ids[0]
    prompts = ["The cat", "Two birds sang"]
    examples = []
    for prompt in prompts:
        first = tokenizer.encode(prompt, add_bos=True)
        said = lm.generate(prompt, max_new_tokens=4, strip_prompt=True)
        second = [*tokenizer.encode(said), stop]
        learn = [False] * len(first) + [True] * len(second)
        examples.append((first + second, learn))
    # A text is asked for from its first token on.
    ids = tokenizer.encode(TEXT, add_bos=True)
    examples.append((ids, [True] * len(ids)))
    found = exact_match(lm, examples, batch_size=2)
    assert found["asked"] == 3
    texts = [answer["text"] for answer in found["answers"]]
    for prompt, answer in zip(prompts, found["answers"], strict=False):
        assert prompt in answer["prompt"]
        # The model may go on, which the reference does not.
        assert answer["text"].startswith(answer["reference"])
    assert texts[2] and found["answers"][2]["reference"] == TEXT
    assert found["right"] == sum(x["text"] == x["reference"] for x in found["answers"])


def test_the_last_questions_need_no_programs_of_their_own(lm, monkeypatch):
    tokenizer = lm.preprocessor.tokenizer
    texts = ["The cat sat", "A dog came by", "Two birds sang"]
    examples = []
    for text in texts:
        ids = tokenizer.encode(text, add_bos=True)
        examples.append((ids, [False] * (len(ids) - 2) + [True] * 2))
    alone = [exact_match(lm, [example])["answers"][0] for example in examples]
    rows, generate = [], lm.generate

    def spy(prompts, **options):
        rows.append(len(prompts["token_ids"]))
        return generate(prompts, **options)

    monkeypatch.setattr(lm, "generate", spy)
    found = exact_match(lm, examples, batch_size=2)
    assert rows == ([2, 2] if backend.few_shapes() else [2, 1])
    assert found["asked"] == 3 and found["answers"] == alone


def test_of_three_answers_the_two_that_are_the_reference_are_right(lm, monkeypatch):
    tokenizer = lm.preprocessor.tokenizer
    stop = tokenizer.stop_token_ids[0]
    question, answer = (tokenizer.encode(text) for text in ("The cat", " sat"))
    example = (
        [*question, *answer, stop],
        [False] * len(question) + [True] * (len(answer) + 1),
    )
    said = [answer, [*answer, stop], [*answer, *answer]]
    monkeypatch.setattr(lm, "generate", lambda *args, **options: pad_rows(said))
    found = exact_match(lm, [example] * 3)
    assert (found["right"], found["asked"]) == (2, 3)
    assert {each["prompt"] for each in found["answers"]} == {"The cat"}
    assert {each["reference"] for each in found["answers"]} == {"sat"}
