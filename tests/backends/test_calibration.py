"""Weights that are rounded by what a model reads, beside those that are not."""

import dataclasses

import keras
import numpy as np
import pytest
from keras import ops
from small_model import CONFIG, TEXT, build_model

from gemma_keras import Calibration, GemmaBackbone, GemmaCausalLM, calibration
from gemma_keras.quantization import Packing

# 128 columns for the outputs of attention, 48 for those of the feed-forward, 32 for the
# rest: groups of 32 or 16 divide them.
WIDE = dataclasses.replace(CONFIG, hidden_dim=32, ffn_dim=48, head_dim=16)
SENTENCES = TEXT.splitlines()


@pytest.fixture
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


def hidden(lm, ids):
    found = lm.backbone({"token_ids": ids})
    return ops.convert_to_numpy(ops.cast(found, "float32"))


def errors_of(lms, floats, rows):
    wanted = hidden(floats, rows)
    return [float(np.square(hidden(lm, rows) - wanted).mean()) for lm in lms]


@pytest.fixture
def rows():
    """Rows of few different tokens, whose inputs are as correlated as those of text."""
    return np.random.default_rng(5).choice(np.arange(3, 43, 4), size=(48, 24))


def test_what_a_model_computes_changes_less(build, rows):
    floats, nearest, calibrated = build(), build(), build()
    how = {"group_size": 32, "embedding": "int8"}
    nearest.quantize("int4", **how)
    told = []
    calibrated.quantize(
        "int4",
        calibration=Calibration(list(rows[:40])),
        progress=lambda *so_far: told.append(so_far),
        **how,
    )
    assert told == [(1, 2), (2, 2)]
    assert calibrated.backbone.packings == nearest.backbone.packings
    errors = errors_of([nearest, calibrated], floats, rows[40:])
    print(errors)
    assert errors[1] < 0.5 * errors[0]
