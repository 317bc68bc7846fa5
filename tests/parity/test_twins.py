"""Every number of the tiny twins against transformers, in float32 within 1e-5."""

import pathlib

import keras
import numpy as np
import pytest
from keras import ops

from gemma_keras import backend
from gemma_keras.cache import make_cache
from gemma_keras.generation import Engine, make_plan
from gemma_keras.samplers import GreedySampler

# Sums of some hundred products of order one, in another order: a few 1e-6.
TOLERANCE = 1e-5


def numpy(tensor):
    return np.asarray(ops.convert_to_numpy(tensor), dtype="float32")


def assert_close(found, expected, what, scale=1.0):
    difference = np.abs(numpy(found) - expected)
    assert difference.max() <= TOLERANCE * scale, (
        f"{what}: off by up to {difference.max():.2e}, {difference.mean():.2e} on "
        f"average, worst at {np.unravel_index(difference.argmax(), difference.shape)}"
    )


def test_every_block_and_the_logits(twin, golden):
    seen = {}

    def look(x, i):
        seen[i] = x
        return x

    logits = twin.score(golden["token_ids"], layer_intercept_fn=look)
    # In order, so that a failure names the first block that goes wrong.
    for i in range(twin.config.num_layers):
        # The residual stream grows, and float32's rounding with it.
        expected = golden[f"block_{i}"]
        assert_close(seen[i], expected, f"block {i}", scale=np.abs(expected).max())
    assert_close(logits, golden["logits"], "logits")


def test_calling_the_model_gives_the_logits(twin, golden):
    inputs = {
        "token_ids": golden["token_ids"],
        "padding_mask": np.ones_like(golden["token_ids"]),
    }
    assert_close(twin(inputs), golden["logits"], "logits")


def test_embeddings_may_stand_in_for_tokens(twin, golden):
    rows = ops.take(twin.backbone.token_embedding.embeddings, golden["token_ids"], 0)
    assert_close(twin({"embeddings": rows}), golden["logits"], "logits")


@pytest.mark.parametrize("prefill", [1, 12])
def test_decoding_token_by_token_past_the_window(twin, golden, prefill):
    backbone, ids = twin.backbone, golden["token_ids"]
    cache = make_cache(twin.config, len(ids), ids.shape[1], "float32")
    hidden, cache = backbone({"token_ids": ids[:, :prefill]}, cache=cache)
    logits = backbone.logits(hidden)
    assert_close(logits, golden["logits"][:, :prefill], "prefill")
    for t in range(prefill, ids.shape[1]):
        hidden, cache = backbone({"token_ids": ids[:, t : t + 1]}, cache=cache)
        logits = backbone.logits(hidden)
        assert_close(logits, golden["logits"][:, t : t + 1], f"token {t}")


@pytest.mark.parametrize("alone", [False, True], ids=["all", "last-alone"])
@pytest.mark.parametrize("split", [(9, 3, 11)])
def test_reading_in_runs_of_several_tokens(twin, golden, split, alone):
    backbone, ids = twin.backbone, golden["token_ids"]
    cache = make_cache(twin.config, len(ids), ids.shape[1] + 8, "float32")
    start = 0
    for size in split:
        # Padding on the right of every run but the first is overwritten by the next.
        padding = 0 if start == 0 else 3
        run = np.pad(ids[:, start : start + size], [[0, 0], [0, padding]])
        mask = np.arange(size + padding)[None] < [[size]] * len(ids)
        inputs = {"token_ids": run, "padding_mask": mask}
        inputs["positions"] = np.tile(start + np.arange(size + padding), (len(ids), 1))
        last = backend.counter(size - 1) if alone else None
        hidden, cache = backbone(inputs, cache=cache, last=last)
        expected = golden["logits"][:, start : start + size][:, -1 if alone else 0 :]
        hidden = hidden if alone else hidden[:, :size]
        assert_close(backbone.logits(hidden), expected, f"run at {start}")
        start += size


def test_keys_and_values_of_8_bits_stay_near(twin, golden):
    """Relative error of the logits.

    A code is off by half a step at the most, 1 / 254 of the largest number of its
    vector, and by 0.3 of that on average.
    """
    backbone, ids = twin.backbone, golden["token_ids"]
    cache, start, logits = make_cache(twin.config, len(ids), 23, "int8"), 0, []
    for size in (12, *[1] * 11):
        hidden, cache = backbone({"token_ids": ids[:, start:][:, :size]}, cache=cache)
        logits.append(numpy(backbone.logits(hidden)))
        start += size
    assert start == ids.shape[1]
    error = np.linalg.norm(np.concatenate(logits, axis=1) - golden["logits"])
    assert 1e-4 < error / np.linalg.norm(golden["logits"]) < 0.02


def test_a_cache_that_grows_keeps_what_it_holds(twin, golden):
    from gemma_keras.cache import grow_cache

    backbone, ids = twin.backbone, golden["token_ids"]
    cache = make_cache(twin.config, len(ids), 4, "float32")
    _, cache = backbone({"token_ids": ids[:, :3]}, cache=cache)
    cache = grow_cache(cache, twin.config, ids.shape[1])
    for t in range(3, ids.shape[1]):
        hidden, cache = backbone({"token_ids": ids[:, t : t + 1]}, cache=cache)
        logits = backbone.logits(hidden)
        assert_close(logits, golden["logits"][:, t : t + 1], f"token {t}")


def test_ragged_rows_are_what_they_are_alone(twin, golden):
    ids, lengths = golden["token_ids"], (23, 8)
    tokens, mask = np.zeros((2, 23), "int32"), np.zeros((2, 23), bool)
    for row, length in enumerate(lengths):
        tokens[row, 23 - length :] = ids[row, :length]
        mask[row, 23 - length :] = True
    cache = make_cache(twin.config, 2, 40, "float32")
    inputs = {"token_ids": tokens, "padding_mask": mask}
    hidden, cache = twin.backbone(inputs, cache=cache)
    logits = numpy(twin.backbone.logits(hidden))
    for row, length in enumerate(lengths):
        expected = golden["logits"][row, :length]
        assert_close(logits[row, 23 - length :], expected, f"row {row}")
    # The short row goes on where its reference does, past the window.
    for t in range(8, 20):
        step = {"token_ids": np.stack([ids[0, -1:], ids[1, t : t + 1]])}
        hidden, cache = twin.backbone(step, cache=cache)
        logits = numpy(twin.backbone.logits(hidden))
        assert_close(logits[1, 0], golden["logits"][1, t], f"token {t}")


def test_padding_on_the_right_changes_nothing(twin, golden):
    ids = np.pad(golden["token_ids"], [[0, 0], [0, 6]])
    mask = np.arange(29)[None] < [[23], [23]]
    logits = numpy(twin({"token_ids": ids, "padding_mask": mask}))
    assert_close(logits[:, :23], golden["logits"], "logits")


@pytest.mark.parametrize("with_positions", [True, False])
def test_packed_segments_do_not_see_each_other(twin, golden, with_positions):
    ids = golden["token_ids"]
    lengths = (13, 10)
    row = np.concatenate([ids[0, :13], ids[1, :10], [0, 0]])[None]
    segments = np.repeat([1, 2, 0], [*lengths, 2])[None]
    inputs = {"token_ids": row, "segment_ids": segments, "padding_mask": segments > 0}
    if with_positions:
        inputs["positions"] = np.concatenate([np.arange(n) for n in (*lengths, 2)])[
            None
        ]
    logits = numpy(twin(inputs))
    assert_close(logits[0, :13], golden["logits"][0, :13], "first segment")
    assert_close(logits[0, 13:23], golden["logits"][1, :10], "second segment")


def test_scores_are_log_probabilities_of_the_next_token(twin, golden):
    ids, logits = golden["token_ids"], golden["logits"].astype("float64")
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = np.take_along_axis(log_probs[:, :-1], ids[:, 1:, None], -1)[..., 0]
    found = numpy(twin.score(ids, scoring_mode="log_probs"))
    assert_close(found[:, :-1], expected, "log_probs")
    assert np.all(found[:, -1] == 0)
    assert_close(-found, numpy(twin.score(ids, scoring_mode="loss")), "loss")
    masked = twin.score(ids, np.arange(23)[None] < [[23], [9]], "log_probs")
    assert_close(numpy(masked)[1, :8], expected[1, :8], "masked row")
    assert np.all(numpy(masked)[1, 8:] == 0)


def test_an_intercept_can_replace_the_embeddings(twin, golden):
    def without_embeddings(x, i):
        return x * 0 if i == -1 else x

    scored = twin.score(golden["token_ids"], layer_intercept_fn=without_embeddings)
    zeros = np.zeros((*golden["token_ids"].shape, twin.config.hidden_dim), "float32")
    assert_close(scored, numpy(twin({"embeddings": zeros})), "logits")
    assert np.abs(numpy(scored) - golden["logits"]).max() > 0.1


def reference_greedy(golden_model, prompt, count):
    import torch

    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            logits = golden_model(torch.tensor([ids])).logits[0, -1]
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def reference(family):
    """The twin as transformers loads it."""
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(
        pathlib.Path(__file__).parent / "goldens" / family, attn_implementation="eager"
    ).eval()


@pytest.mark.reference
def test_the_committed_reference_is_what_transformers_says(reference, golden):
    import torch

    with torch.no_grad():
        logits = reference(torch.from_numpy(golden["token_ids"])).logits.numpy()
    assert np.abs(logits - golden["logits"]).max() <= TOLERANCE


@pytest.mark.reference
def test_greedy_text_of_ragged_prompts_is_the_references(twin, reference, golden):
    prompts = [golden["token_ids"][0, :n].tolist() for n in (3, 11, 6)]
    engine = Engine(twin.backbone)
    plan = make_plan(GreedySampler(), [30, 30, 12], [], 0)
    state = engine.advance(engine.start(prompts, plan), plan, 30)
    tokens = ops.convert_to_numpy(state.tokens)
    for row, (prompt, count) in enumerate(zip(prompts, (30, 30, 12), strict=True)):
        assert tokens[row, :count].tolist() == reference_greedy(
            reference, prompt, count
        )
    assert ops.convert_to_numpy(state.emitted).tolist() == [30, 30, 12]


@pytest.mark.parametrize(
    ("policy", "limit"),
    [("bfloat16", 0.06), ("mixed_bfloat16", 0.06), ("float16", 0.01)],
)
def test_half_precision_stays_near_float32(load_twin, golden, policy, limit):
    """Relative error of the logits: bfloat16 keeps 8 bits, float16 keeps 11."""
    model = load_twin(dtype=policy)
    logits = numpy(model({"token_ids": golden["token_ids"]}))
    error = np.linalg.norm(logits - golden["logits"])
    assert error / np.linalg.norm(golden["logits"]) < limit
    expected = "float32" if policy.startswith("mixed") else policy
    assert {keras.backend.standardize_dtype(w.dtype) for w in model.weights} == {
        expected
    }
