"""The real Gemma 3 270M against transformers, with the same dequantised weights.

tools/make_goldens.py made the reference values; they are checked anew on torch alone,
since the reference is the same whichever backend is compared with it.
"""

import json
import pathlib

import numpy as np
import pytest
from keras import ops

from gemma_keras import GemmaCausalLM

GOLDENS = pathlib.Path(__file__).parent / "goldens" / "gemma3_270m"

pytestmark = [pytest.mark.real, pytest.mark.slow]


@pytest.fixture(scope="module")
def model(gemma3_270m_file):
    """Gemma 3 270M in float32."""
    return GemmaCausalLM.from_preset(gemma3_270m_file, dtype="float32")


@pytest.fixture(scope="module")
def golden():
    """`token_ids` [1, 2304] of the licence's text, `log_probs` [1, 2303]."""
    return dict(np.load(GOLDENS / "log_probs.npz"))


def test_the_licence_is_tokenised_as_by_the_reference(model, golden):
    text = (pathlib.Path(__file__).parents[2] / "LICENSE").read_text()
    ids = model.preprocessor.encode_prompt(text)
    assert ids[: golden["token_ids"].shape[1]] == golden["token_ids"][0].tolist()


def test_log_probabilities_of_real_text(model, golden):
    assert golden["log_probs"].size >= 2000
    found = model.score(golden["token_ids"], scoring_mode="log_probs")
    found = ops.convert_to_numpy(found)[:, :-1]
    difference = np.abs(found - golden["log_probs"])
    assert difference.max() <= 1e-3, f"worst {difference.max():.1e}"


def test_greedy_continuations_are_identical(model):
    continuations = json.loads((GOLDENS / "greedy.json").read_text())
    assert len(continuations) == 10
    answers = model.generate(
        list(continuations),
        max_new_tokens=48,
        stop_token_ids=(),
        return_log_probs=True,
    )
    for answer, (prompt, ids) in zip(answers, continuations.items(), strict=True):
        assert len(ids) == 48
        assert answer.token_ids == ids, f"{prompt!r} went on otherwise: {answer.text!r}"
        assert answer.text.startswith(prompt)


@pytest.mark.reference
def test_the_committed_reference_is_what_transformers_says(
    backend, golden, gemma3_270m_file
):
    if backend != "torch":
        pytest.skip("the reference is the same on every backend: checked on torch")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        gemma3_270m_file.parent,
        gguf_file=gemma3_270m_file.name,
        dtype="float32",
        attn_implementation="eager",
    ).eval()
    ids = torch.from_numpy(golden["token_ids"][:, :640])
    with torch.no_grad():
        log_probs = torch.log_softmax(reference(ids).logits, -1)[:, :-1]
    found = log_probs.gather(-1, ids[:, 1:, None])[..., 0].numpy()
    assert np.abs(found - golden["log_probs"][:, :639]).max() <= 1e-4
