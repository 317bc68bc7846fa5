"""Steps of torch that a CUDA device replays, here by graphs that compute again.

What stands in for a CUDA graph runs the function once more, from and to the places that
the graph was made for: all that is different on a device is who computes.
"""

import concurrent.futures
import time

import numpy as np
import pytest

from gemma_keras import PromptCache, PromptLookup, backend, samplers

pytestmark = pytest.mark.skipif(
    backend.NAME != "torch" or not backend.on_cpu(), reason="torch's CUDA graphs"
)

PROMPTS = ["The cat", "A dog came by and asked the cat what it had", "Two"]
FREE = {"stop_token_ids": ()}


@pytest.fixture
def captured(monkeypatch):
    """How many graphs were made, in a list of one number."""
    import torch

    from gemma_keras.backend import torch_steps

    count = [0]

    def capture(function, inputs, pool):
        results = [x.clone() for x in function(inputs)]
        count[0] += 1

        def replay():
            time.sleep(1e-4)  # as a device takes a while: other threads go on
            for place, x in zip(results, function(inputs), strict=True):
                place.copy_(x)

        return replay, results

    monkeypatch.setattr(torch_steps, "capture", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(backend.programs, "_replays", lambda device: True)
    return count


def asked(lm, **options):
    """Answers to one, to several, with chance, and with a penalty."""
    options = {"max_new_tokens": 20, **FREE, **options}
    yield lm.generate(PROMPTS[0], **options)
    yield lm.generate(PROMPTS, **options)
    yield lm.generate(PROMPTS, sampler=samplers.TopKSampler(5), seed=3, **options)
    yield lm.generate(
        PROMPTS[1], sampler=samplers.GreedySampler(repetition_penalty=1.5), **options
    )


def test_answers_are_those_of_the_plain_path(new_lm, captured, monkeypatch):
    monkeypatch.setattr(backend.programs, "_replays", lambda device: False)
    monkeypatch.setattr(backend.Step, "PATIENCE", 10**9)
    expected = list(asked(new_lm()))
    monkeypatch.setattr(backend.programs, "_replays", lambda device: True)
    lm = new_lm()
    for _ in range(4):
        assert list(asked(lm)) == expected
    assert captured[0]


def test_256_tokens_are_those_of_the_plain_path(new_lm, captured, monkeypatch):
    replayed = new_lm().generate(PROMPTS[1], max_new_tokens=256, **FREE)
    assert captured[0]
    monkeypatch.setattr(backend.Step, "PATIENCE_REPLAYED", 10**9)
    assert new_lm().generate(PROMPTS[1], max_new_tokens=256, **FREE) == replayed


def test_another_prompt_makes_no_graph(new_lm, captured):
    lm = new_lm()
    for _ in range(3):
        lm.generate(PROMPTS[0], max_new_tokens=8, **FREE)
    made = captured[0]
    for prompt in PROMPTS:
        lm.generate(prompt, max_new_tokens=30, **FREE)
    assert captured[0] == made > 0


def test_what_somebody_holds_is_not_overwritten(new_lm, captured):
    """A stream on its way, and a prompt's cache, while others generate."""
    lm, plain = new_lm(), new_lm()
    expected = plain.generate(PROMPTS[1], max_new_tokens=60, strip_prompt=True, **FREE)
    for _ in range(4):
        lm.generate(PROMPTS[2], max_new_tokens=9, **FREE)
    pieces = []
    for piece in lm.stream(PROMPTS[1], max_new_tokens=60, **FREE):
        pieces.append(piece)
        lm.generate(PROMPTS[2], max_new_tokens=5, **FREE)
    assert "".join(pieces) == expected
    cache = PromptCache()
    for more in ("", " and then", " and then it slept"):
        prompt = PROMPTS[1] + more
        found = lm.generate(prompt, max_new_tokens=9, prompt_cache=cache, **FREE)
        lm.generate(PROMPTS[2], max_new_tokens=40, **FREE)
        assert found == plain.generate(prompt, max_new_tokens=9, **FREE)
    assert cache.reused


@pytest.mark.parametrize("most", [2**27, 0])
def test_what_is_large_is_known_by_its_place_alone(most, new_lm, captured, monkeypatch):
    from gemma_keras.backend import torch_steps

    monkeypatch.setattr(torch_steps._Graph, "MOST_OWNED", most)
    lm, answers = new_lm(), set()
    for _ in range(8):
        answers.add(lm.generate(PROMPTS[1], max_new_tokens=20, **FREE))
    assert len(answers) == 1
    graphs = [
        graph
        for step in lm.engine._programs.values()
        if isinstance(step, backend.Step)
        for run, _ in step._recorded.values()
        for graph in run._graphs
    ]
    assert graphs and all(bool(graph._own) == bool(most) for graph in graphs)
    assert len(graphs) <= 2 * torch_steps.Replayed.MOST


@pytest.mark.parametrize("how", ["assigned", "replaced", "in place"])
def test_weights_may_change(how, new_lm, captured, monkeypatch):
    lm, plain = new_lm(), new_lm()
    texts = [lm.generate(PROMPTS[1], max_new_tokens=9, **FREE) for _ in range(4)]
    for model in (lm, plain):
        scale = model.backbone.blocks[0].pre_ffw_norm.scale
        if how == "assigned":
            scale.assign(scale + 3.0)
        elif how == "replaced":
            scale._value = scale.value + 3.0
        else:
            scale.value.data.add_(3.0)
    found = lm.generate(PROMPTS[1], max_new_tokens=9, **FREE)
    monkeypatch.setattr(backend.programs, "_replays", lambda device: False)
    assert found == plain.generate(PROMPTS[1], max_new_tokens=9, **FREE) != texts[0]


def test_threads_may_generate_at_once(new_lm, captured):
    """As in a server: graphs are shared, and what they work on."""
    lm, plain = new_lm(), new_lm()
    prompts = PROMPTS * 3
    options = {"max_new_tokens": 25, **FREE}
    expected = [plain.generate(prompt, **options) for prompt in prompts]
    for _ in range(3):
        lm.generate(PROMPTS[0], **options)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda prompt: lm.generate(prompt, **options), prompts))
    assert found == expected


def test_guesses_and_drafts_are_replayed_too(new_lm, captured):
    lm, draft = new_lm(), new_lm()
    repeated = "the cat sat on the mat and the cat sat on the mat and the cat"
    expected = lm.generate(repeated, max_new_tokens=40, **FREE)
    for speculation in (PromptLookup(), draft):
        for _ in range(3):
            options = {"speculation": speculation, "max_new_tokens": 40, **FREE}
            assert lm.generate(repeated, **options) == expected


def test_a_device_that_makes_no_graph_is_told_of(new_lm, captured, monkeypatch):
    from gemma_keras.backend import torch_steps

    def capture(function, inputs, pool):
        raise RuntimeError("no graphs today")

    monkeypatch.setattr(torch_steps, "capture", capture)
    lm = new_lm()
    with pytest.warns(UserWarning, match="without CUDA graphs: no graphs today"):
        texts = [lm.generate(PROMPTS[1], max_new_tokens=30, **FREE) for _ in range(4)]
    monkeypatch.setattr(backend.programs, "_replays", lambda device: False)
    assert set(texts) == {new_lm().generate(PROMPTS[1], max_new_tokens=30, **FREE)}


def test_prompts_are_read_in_the_same_few_shapes(new_lm, captured):
    lm = new_lm()
    ids = np.arange(700, dtype="int32")[None] % 290 + 5
    for length in (1, 63, 64, 65, 130, 260, 700):
        prompt = {"token_ids": ids[:, :length]}
        lm.generate(prompt, max_new_tokens=2, **FREE)
    steps = [step for key, step in lm.engine._programs.items() if key[0] == "chunk"]
    # Of the arguments: shapes [1, T] of ids, masks and positions.
    shapes = {shape for step in steps for key in step._calls for shape in key[-4:-1]}
    assert shapes == {(1, 64), (1, 256)}
