"""Adapters of PEFT here, and ours in PEFT: the same logits, in float32 within 1e-5.

tools/make_goldens.py adapters wrote the committed ones; the rest runs PEFT itself.
"""

import json
import pathlib

import numpy as np
import pytest
from keras import ops

from gemma_keras import GemmaCausalLM
from gemma_keras.checkpoints import exporting, merging, open_checkpoint, peft

# PEFT's own, about transformers and about embeddings that are tied to a head.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing"),
    pytest.mark.filterwarnings("ignore:.*(ensure_weight_tying|save_embedding_layers)"),
]

GOLDENS = pathlib.Path(__file__).parent / "goldens"
# Sums of some hundred products of order one, in another order: a few 1e-6, which is
# also how far PEFT is from itself in float64. Larger updates than below, and Gemma 1,
# which has no norms after its branches, would make more of it.
TOLERANCE = 1e-5
CASES = {
    "plain": {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {"r": 4, "lora_alpha": 3, "target_modules": "all-linear"}
    | {"use_rslora": True},
    "dora": {"r": 2, "lora_alpha": 3, "target_modules": "all-linear"}
    | {"use_dora": True, "use_rslora": True},
    "patterns": {
        "r": 3,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "down_proj", "embed_tokens"],
        "rank_pattern": {"layers.0.self_attn.q_proj": 5, "embed_tokens": 2},
        "alpha_pattern": {r"layers\.[01]\.mlp\.down_proj": 9},
    },
    "embeddings": {"r": 3, "target_modules": ["embed_tokens", "o_proj"]}
    | {"use_dora": True},
    "pattern targets": {
        "r": 2,
        "target_modules": r".*\.layers\.[12]\.mlp\.(up|gate)_proj",
    },
    "some layers": {
        "r": 2,
        "target_modules": ["k_proj"],
        "layers_to_transform": [0, 2],
    },
}


def assert_close(found, expected):
    difference = np.abs(np.asarray(ops.convert_to_numpy(found)) - expected)
    assert difference.max() <= TOLERANCE, f"off by up to {difference.max():.1e}"


def test_committed_adapters_give_what_peft_made_of_them(load_twin, family, golden):
    lm = load_twin()
    lm.load_adapter(GOLDENS / family / "adapter")
    expected = np.load(GOLDENS / family / "adapter_logits.npy")
    assert np.abs(expected - golden["logits"]).max() > 0.1
    inputs = {"token_ids": golden["token_ids"]}
    assert_close(lm(inputs), expected)
    with lm.disable_adapter():
        assert_close(lm(inputs), golden["logits"])


# That of Gemma 1 updates the embedding, which cannot be merged.
@pytest.mark.parametrize("family", ["gemma2", "gemma3"], indirect=True)
def test_committed_adapters_merged_while_converting(family, golden, tmp_path):
    """PEFT's logits come from the merged files, whoever loads these."""
    folder = GOLDENS / family
    with open_checkpoint(folder) as checkpoint:
        contents = exporting.checkpoint_contents(checkpoint, folder)
        adapter = peft.read(folder / "adapter", checkpoint.config)
        merged = merging.merge(contents, adapter)
        exporting.export(merged, tmp_path / "merged", "hf")
    lm = GemmaCausalLM.from_preset(tmp_path / "merged")
    expected = np.load(folder / "adapter_logits.npy")
    assert_close(lm({"token_ids": golden["token_ids"]}), expected)


@pytest.fixture
def reference(family):
    """The twin as transformers loads it, anew for each test: PEFT changes it."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    return transformers.AutoModelForCausalLM.from_pretrained(
        GOLDENS / family, attn_implementation="eager"
    ).eval()


def reference_logits(model, token_ids):
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(token_ids)).logits.numpy()


def random_adapter(model, settings):
    """`model` with an adapter of PEFT that has random numbers."""
    import peft
    import torch

    torch.manual_seed(0)  # DoRA's magnitudes are those of what PEFT begins with
    config = peft.LoraConfig(**settings, init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "magnitude" in name:
                weight.mul_(1 + 0.3 * noise)
            elif "lora_" in name:
                weight.copy_(0.1 * noise)
    return adapted


@pytest.mark.reference
@pytest.mark.parametrize(
    ("family", "case"),
    [
        ("gemma", "patterns"),
        ("gemma", "some layers"),
        ("gemma", "dora"),
        ("gemma2", "rslora"),
        ("gemma2", "embeddings"),
        ("gemma3", "plain"),
        ("gemma3", "pattern targets"),
    ],
    indirect=["family"],
)
def test_adapters_of_peft(load_twin, reference, golden, tmp_path, case):
    adapted = random_adapter(reference, CASES[case])
    expected = reference_logits(adapted, golden["token_ids"])
    assert np.abs(expected - golden["logits"]).max() > 0.01
    adapted.save_pretrained(tmp_path)
    lm = load_twin()
    lm.load_adapter(tmp_path, name=case.replace(" ", "_"))
    assert_close(lm({"token_ids": golden["token_ids"]}), expected)


OURS = {
    "plain": {"alpha": 5},
    "rslora": {"targets": "all-linear", "rslora": True, "alpha": 3},
    "dora": {"targets": ["key", "attention_output", "ffw_gating"], "dora": True},
    "patterns": {
        "targets": ["query", "decoder_block_1/ffw_.*", "token_embedding"],
        "rank_pattern": {"decoder_block_0/.*": 2, "embed_tokens": 4},
        "alpha_pattern": {"ffw_linear": 7.5},
    },
    "embeddings": {"targets": ["embed_tokens", "value"], "dora": True, "rslora": True},
}


def shake(lm):
    random = np.random.default_rng(3)
    for variable in lm.trainable_variables:
        noise = random.normal(size=variable.shape).astype("float32")
        if "magnitude" in variable.path:
            variable.assign(ops.convert_to_numpy(variable) * (1 + 0.3 * noise))
        else:
            variable.assign(0.1 * noise)


def in_peft(model, folder):
    """`model` with the adapter in `folder`, every tensor of which was found."""
    import peft
    from safetensors.numpy import load_file

    adapted = peft.PeftModel.from_pretrained(model, folder).eval()
    own = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    assert own.keys() == load_file(folder / "adapter_model.safetensors").keys()
    return adapted


@pytest.mark.reference
@pytest.mark.parametrize(
    ("family", "case"),
    [
        ("gemma", "plain"),
        ("gemma", "patterns"),
        ("gemma2", "dora"),
        ("gemma2", "embeddings"),
        ("gemma3", "rslora"),
    ],
    indirect=["family"],
)
def test_our_adapters_in_peft(load_twin, reference, golden, tmp_path, case):
    lm = load_twin()
    lm.enable_lora(3, **OURS[case])
    shake(lm)
    found = ops.convert_to_numpy(lm({"token_ids": golden["token_ids"]}))
    assert np.abs(found - golden["logits"]).max() > 0.01
    lm.save_adapter(tmp_path / "adapter", base_model="google/gemma-2b")
    adapted = in_peft(reference, tmp_path / "adapter")
    assert_close(reference_logits(adapted, golden["token_ids"]), found)
    again = load_twin()
    again.load_adapter(tmp_path / "adapter")
    np.testing.assert_array_equal(
        ops.convert_to_numpy(again({"token_ids": golden["token_ids"]})), found
    )


@pytest.mark.reference
@pytest.mark.parametrize("family", ["gemma3"], indirect=True)
def test_a_combination_in_peft(load_twin, reference, golden, tmp_path):
    lm = load_twin()
    lm.enable_lora(2, name="one", targets="all-linear")
    shake(lm)
    lm.enable_lora(3, name="two", alpha=5)
    shake(lm)
    lm.combine_adapters({"one": 0.5, "two": -1.5}, name="mix")
    lm.save_adapter(tmp_path / "mix")
    adapted = in_peft(reference, tmp_path / "mix")
    found = ops.convert_to_numpy(lm({"token_ids": golden["token_ids"]}))
    assert_close(reference_logits(adapted, golden["token_ids"]), found)


@pytest.mark.reference
def test_one_key_head(tmp_path):
    """Multi-query attention, as Gemma 2B has it, both ways."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    raw = json.loads((GOLDENS / "gemma" / "config.json").read_text())
    torch.manual_seed(0)
    config = transformers.GemmaConfig(**raw | {"num_key_value_heads": 1})
    transformers.GemmaForCausalLM(config).save_pretrained(tmp_path / "model")

    def reference():
        return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")

    ids = np.random.default_rng(0).integers(0, 97, (2, 11))
    adapted = random_adapter(reference(), CASES["rslora"])
    adapted.save_pretrained(tmp_path / "theirs")
    lm = GemmaCausalLM.from_preset(tmp_path / "model")
    assert lm.config.num_kv_heads == 1
    lm.load_adapter(tmp_path / "theirs")
    assert_close(lm({"token_ids": ids}), reference_logits(adapted, ids))
    lm.save_adapter(tmp_path / "ours")
    again = in_peft(reference(), tmp_path / "ours")
    assert_close(lm({"token_ids": ids}), reference_logits(again, ids))
