"""Weights that are rounded by what a model reads, beside those that are not."""

import dataclasses

import keras
import numpy as np
import pytest
from keras import ops
from small_model import CONFIG, TEXT, build_model

from gemma_keras import (
    Calibration,
    GemmaBackbone,
    GemmaCausalLM,
    backend,
    distribution,
)

# 96 columns for the outputs of attention, 48 for those of the feed-forward, which
# groups of 32 do not divide, and 32 for the rest.
WIDE = dataclasses.replace(CONFIG, hidden_dim=32, ffn_dim=48, head_dim=16)
SENTENCES = TEXT.splitlines()
HOW = {"group_size": 32, "embedding": "int8"}
# Few different tokens, whose inputs are as correlated as those of text.
ROWS = np.random.default_rng(5).choice(np.arange(3, 43, 4), size=(48, 24))
SEEN = list(ROWS[:40])


@pytest.fixture(scope="module")
def build(vocabulary):
    """A function that makes the same model of floats anew."""

    def initial(path):
        deviations = {"scale": 0.4, "kernel": 0.2, "embeddings": 0.12}
        return keras.initializers.RandomNormal(stddev=deviations[path.split("/")[-1]])

    def make(**settings):
        keras.utils.set_random_seed(7)
        backbone = GemmaBackbone(WIDE, init=initial, **settings)
        return GemmaCausalLM(backbone, build_model(vocabulary).preprocessor)

    return make


@pytest.fixture(scope="module")
def calibrated(build):
    """A calibrated model, and what was told meanwhile."""
    lm, told = build(), []
    lm.quantize(
        "int4",
        calibration=Calibration(SEEN, sequence_length=24),
        progress=lambda *done: told.append(done),
        **HOW,
    )
    return lm, told


RUN = backend.LayerProgram(lambda backbone, ids: backbone({"token_ids": ids}))


def hidden(lm, ids):
    return ops.convert_to_numpy(RUN(lm.backbone, ids))


def same_weights(lm, other):
    for mine, theirs in zip(lm.weights, other.weights, strict=True):
        assert mine.path == theirs.path
        mine, theirs = map(ops.convert_to_numpy, (mine, theirs))
        np.testing.assert_array_equal(mine.view("uint8"), theirs.view("uint8"))


def test_what_a_model_computes_changes_less(build, calibrated):
    lm, told = calibrated
    assert told == [(1, 2), (2, 2)]
    nearest = build()
    nearest.quantize("int4", **HOW)
    assert lm.backbone.packings == nearest.backbone.packings
    wanted = hidden(build(), ROWS[40:])
    errors = [
        np.square(hidden(each, ROWS[40:]) - wanted).mean() for each in (nearest, lm)
    ]
    assert errors[1] < 0.5 * errors[0]


def test_presets_keep_every_bit(calibrated, tmp_path):
    lm, _ = calibrated
    lm.save_to_preset(tmp_path / "p")
    told = (tmp_path / "p" / "provenance.json").read_text()
    assert "rounded to 4 bits by what they make of texts" in told
    again = GemmaCausalLM.from_preset(tmp_path / "p")
    same_weights(lm, again)
    np.testing.assert_allclose(
        hidden(again, ROWS[40:]), hidden(lm, ROWS[40:]), rtol=1e-6, atol=1e-6
    )


def test_a_config_of_keras_says_the_same(build, calibrated):
    lm = build()
    config = keras.quantizers.GPTQConfig(
        (row[None] for row in SEEN),
        lm.preprocessor.tokenizer,
        sequence_length=24,
        group_size=32,
    )
    lm.quantize("gptq", config=config, embedding="int8")
    same_weights(lm, calibrated[0])


def test_only_what_is_asked_for_is_rounded(build):
    lm = build()
    lm.quantize(
        "int4",
        calibration=Calibration(SEEN, sequence_length=24),
        filters="block_1.*(ffw_linear|key)",
        group_size=16,
    )
    found = {path.rsplit("/", 1)[-1] for path in lm.backbone.packings}
    assert found == {"ffw_linear", "key"}
    assert np.isfinite(hidden(lm, ROWS[:2])).all()


def test_what_cannot_be_is_refused_before_anything_changes(
    build, calibrated, monkeypatch
):
    lm = build()
    with monkeypatch.context() as patched:
        patched.setattr(distribution, "is_set", lambda: True)
        with pytest.raises(ValueError, match="without a distribution"):
            lm.quantize("int4", calibration=SENTENCES)
    with pytest.raises(ValueError, match="Calibration is for int4"):
        lm.quantize("int8", calibration=SENTENCES)
    with pytest.raises(ValueError, match="nothing to calibrate with"):
        lm.quantize("int4", calibration=[np.array([5])])
    with pytest.raises(ValueError, match="No layer's path matches"):
        lm.quantize("int4", calibration=SENTENCES, filters="nothing")
    config = keras.quantizers.GPTQConfig
    for settings, told in (
        ({"weight_bits": 8}, "weight_bits must be 4 here, got 8"),
        ({"symmetric": True}, "symmetric must be False"),
        ({"activation_order": True}, "activation_order must be False"),
        ({"group_size": -1}, "group_size must be one of 16"),
        ({"hessian_damping": 0}, "damping must be above 0"),
        ({"tokenizer": str.split}, "tokenizer must be the model's own"),
    ):
        settings = {"tokenizer": None, **settings}
        with pytest.raises(ValueError, match=told):
            lm.quantize("gptq", config=config(SENTENCES, **settings))
    kernel = lm.backbone.blocks[1].ffw_linear.weight
    kernel.assign(np.where(np.eye(*kernel.shape), np.nan, kernel))
    with pytest.raises(ValueError, match="ffw_linear: holds NaN or infinite"):
        lm.quantize("int4", calibration=SENTENCES)
    assert not lm.backbone.packings
    with pytest.raises(ValueError, match="quantised already"):
        calibrated[0].quantize("int4", calibration=SENTENCES)


def test_a_model_in_bfloat16_is_calibrated_in_it(build):
    lm = build(dtype="bfloat16")
    with pytest.warns(UserWarning, match="tokens are few to calibrate with"):
        lm.quantize("int4", calibration=SEEN[:1], **HOW)
    assert lm.backbone.packings
    assert np.isfinite(hidden(lm, ROWS[40:]).astype("float32")).all()


def test_inputs_that_are_not_finite_are_told(build):
    lm = build()
    norm = lm.backbone.blocks[1].pre_ffw_norm.scale
    norm.assign(np.full(norm.shape, np.inf))
    with (
        pytest.warns(UserWarning, match="24 tokens are few to calibrate with"),
        pytest.raises(ValueError, match="block_1/ffw_gating: its inputs are NaN"),
    ):
        lm.quantize("int4", calibration=SEEN[:1], filters="ffw")
    assert lm.backbone.blocks[1].ffw_gating.watch is None


@pytest.mark.any_backend
def test_texts_fill_rows_without_seeing_each_other(build, tmp_path):
    preprocessor = build().preprocessor
    encode = preprocessor.tokenizer.encode
    long = encode(TEXT, add_bos=True, add_eos=True)
    short = encode("The cat sat", add_bos=True, add_eos=True)
    found = Calibration([TEXT, "The cat sat"], sequence_length=32)
    batches = found.batches(preprocessor, longest=512)
    rows = {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
    pieces = {
        tuple(rows["token_ids"][i][rows["segment_ids"][i] == segment].tolist())
        for i in range(len(rows["token_ids"]))
        for segment in range(1, rows["segment_ids"][i].max() + 1)
    }
    runs = [(2, *long[i : i + 31]) for i in range(1, len(long), 31)]
    assert pieces == {*runs, tuple(short)}
    assert (rows["padding_mask"] == (rows["segment_ids"] > 0)).all()
    starts = rows["token_ids"] == 2
    assert (rows["positions"][starts] == 0).all()
    fewer = dataclasses.replace(found, num_samples=3).batches(preprocessor, 512)
    assert fewer[0]["token_ids"].shape == (3, 32)
    assert found.batches(preprocessor, longest=16)[0]["token_ids"].shape[1] == 16
    (tmp_path / "book.txt").write_text(TEXT.replace("\n", "\n\n"))
    whole = Calibration(str(tmp_path / "book.txt")).batches(preprocessor, 512)
    assert whole[0]["segment_ids"].max() == 1
    pairs = Calibration({"prompts": ["The cat"], "responses": ["sat"]})
    assert pairs.batches(preprocessor, 512)[0]["padding_mask"].sum() > 4
    with pytest.raises(ValueError, match="reads no text"):
        found.batches(None, 512)
    with pytest.raises(ValueError, match="no such file"):
        Calibration("nowhere.jsonl").batches(preprocessor, 512)


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"num_samples": 0}, "num_samples must be a whole number from 1"),
        ({"sequence_length": 1.5}, "sequence_length must be a whole number from 2"),
        ({"damping": 2}, "damping must be above 0 and at most 1"),
    ],
)
def test_wrong_numbers_are_refused(settings, told):
    with pytest.raises(ValueError, match=told):
        Calibration(SENTENCES, **settings)
