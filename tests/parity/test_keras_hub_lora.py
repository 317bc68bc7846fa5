"""KerasHub's LoRA, whose factors belong to single heads, here: the same logits."""

import dataclasses

import numpy as np
import pytest
from keras import ops

from gemma_keras import GemmaBackbone, GemmaCausalLM

pytestmark = [pytest.mark.reference, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def lm(load_twin):
    """The twin with what KerasHub fixes: rotary base and epsilon."""
    twin = load_twin()
    weights = {variable.path: variable.value for variable in twin.variables}
    config = dataclasses.replace(
        twin.config, rope_theta=10_000.0, norm_epsilon=1e-6, query_pre_attn_scalar=10
    )
    backbone = GemmaBackbone(
        config,
        dtype="float32",
        init=lambda path: lambda shape, dtype=None: ops.copy(weights[path]),
    )
    return GemmaCausalLM(backbone)


@pytest.mark.parametrize("family", ["gemma"], indirect=True)
def test_an_adapter_that_keras_hub_saved(lm, golden, tmp_path):
    keras_hub = pytest.importorskip("keras_hub")
    lm.save_to_preset(tmp_path / "preset")
    theirs = keras_hub.models.GemmaBackbone.from_preset(
        str(tmp_path / "preset"), dtype="float32"
    )
    theirs.enable_lora(3)
    random = np.random.default_rng(0)
    for variable in theirs.trainable_variables:
        variable.assign(0.2 * random.normal(size=variable.shape))
    theirs.save_lora_weights(str(tmp_path / "hub.lora.h5"))
    ids = golden["token_ids"]
    hidden = theirs({"token_ids": ids, "padding_mask": np.ones_like(ids)})
    logits = theirs.token_embedding(hidden, reverse=True)
    before = ops.convert_to_numpy(lm({"token_ids": ids}))
    lm.backbone.load_lora_weights(tmp_path / "hub.lora.h5")
    found = ops.convert_to_numpy(lm({"token_ids": ids}))
    assert np.abs(found - before).max() > 0.1
    assert np.abs(found - ops.convert_to_numpy(logits)).max() <= 1e-5
