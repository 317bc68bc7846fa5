"""A model in memory, exported: every bit of it, and what others compute from it."""

import dataclasses
import importlib.util
import json

import keras
import numpy as np
import pytest
from keras import ops
from random_twin import build

from gemma_keras import GemmaCausalLM, GemmaConfig
from gemma_keras.checkpoints import WRITERS, open_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*KerasHub:UserWarning")

# No two sizes are equal, N H != D, 1 < K < N, and windows of both kinds bite.
SIZES = {
    "vocab_size": 97,
    "num_layers": 3,
    "hidden_dim": 42,
    "ffn_dim": 46,
    "num_query_heads": 6,
    "num_kv_heads": 2,
    "head_dim": 10,
    "query_pre_attn_scalar": 10,
    "max_position": 64,
}
LATER = {"use_post_norms": True, "sliding_window": 5, "query_pre_attn_scalar": 13}
CONFIGS = {
    "gemma": GemmaConfig(**SIZES),
    "gemma2": GemmaConfig(
        **SIZES | LATER,
        layer_pattern="LG",
        attn_logit_soft_cap=1.5,
        final_logit_soft_cap=2.5,
    ),
    "gemma3": GemmaConfig(
        **SIZES | LATER,
        layer_pattern="LG",
        use_qk_norm=True,
        rope_theta=1e6,
        local_rope_theta=1e4,
        rope_scaling_factor=8.0,
    ),
}
# Each as a directory, and as a single file where it has one.
FORMS = {name: (name, "") for name in WRITERS}
FORMS |= {"torch file": ("torch", ".ckpt"), "nemo file": ("nemo", ".nemo")}
# What reads and writes some of them.
NEEDS = {
    form: pytest.mark.skipif(
        importlib.util.find_spec(module) is None, reason=f"{module} is not installed"
    )
    for form, module in {
        "torch": "torch",
        "torch file": "torch",
        "nemo file": "torch",
        "gguf": "gguf",
        "flax": "tensorstore",
        "maxtext": "tensorstore",
    }.items()
}
PAIRS = [
    pytest.param(
        CONFIGS[family],
        form,
        id=f"{form}-{family}",
        marks=[NEEDS[form]] if form in NEEDS else [],
    )
    for form in FORMS
    for family in CONFIGS
    # NeMo has Gemma 3 since version 2, which imports the directory.
    if (form, family) != ("nemo file", "gemma3")
]
IDS = np.random.default_rng(3).integers(3, 97, (2, 19))


@pytest.fixture(params=list(CONFIGS))
def config(request):
    """A tiny Gemma 1, 2 and 3."""
    return CONFIGS[request.param]


def fitting(config, form):
    """The config as the format can hold it."""
    changes = {}
    if form == "gguf":
        # It tells no query scale.
        changes = {"query_pre_attn_scalar": config.head_dim}
    elif form in ("flax", "maxtext") and config.family != "gemma":
        scalar = config.hidden_dim // config.num_query_heads
        changes = {"query_pre_attn_scalar": scalar}
        if form == "maxtext" and config.family == "gemma2":
            changes |= {"num_layers": 4}
        elif form == "maxtext":
            changes |= {"num_layers": 7, "layer_pattern": "LLLLLG"}
    return dataclasses.replace(config, **changes)


def stored(path, array, form):
    """What comes back of an array: norms plus one in float32, if it has them so."""
    # MaxText has all weights in float32; of .nemo files norms are, with every bit.
    if form == "maxtext" or (form == "nemo file" and path.endswith("scale")):
        array = array.astype("float32")
    if form in ("gguf", "maxtext") and path.endswith("scale"):
        return (array.astype("float32") + np.float32(1)) - np.float32(1)
    return array


def export(lm, folder, form, **options):
    format, suffix = FORMS[form]
    return lm.export(folder / f"m{suffix}", format=format, **options)


def held(lm):
    """Path to numpy array of every weight, low-rank updates merged by numpy."""
    arrays, factors = {}, {}
    for variable in lm.backbone.variables:
        kind = factors if "/lora_" in variable.path else arrays
        kind[variable.path] = ops.convert_to_numpy(variable)
    for path in [path for path in arrays if f"{path[:-6]}lora_a" in factors]:
        a, b = factors[f"{path[:-6]}lora_a"], factors[f"{path[:-6]}lora_b"]
        arrays[path] = arrays[path].astype("float64") + 5 / 3 * a.astype("float64") @ b
    return arrays


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("config", "form"), PAIRS)
def test_every_bit_of_a_model_is_written(tmp_path, config, dtype, form):
    config = fitting(config, form)
    lm = build(config, dtype)
    with open_checkpoint(export(lm, tmp_path, form)) as checkpoint:
        assert checkpoint.config == config
        assert checkpoint.dtype == ("float32" if form == "maxtext" else dtype)
        for path, expected in held(lm).items():
            found = checkpoint.tensor(path)
            expected = stored(path, expected, form)
            assert found.dtype == expected.dtype
            if (form, dtype) == ("maxtext", "float32"):
                # Factors are folded in that are no powers of two.
                np.testing.assert_allclose(found, expected, rtol=1.2e-7, atol=0)
            else:
                assert found.tobytes() == expected.tobytes(), path


@pytest.mark.parametrize(("config", "form"), PAIRS)
def test_low_rank_updates_are_merged(tmp_path, config, form):
    lm = build(fitting(config, form), lora=True)
    path = export(lm, tmp_path, form)
    if path.is_dir():
        facts = json.loads((path / "provenance.json").read_text())
        assert "rank 3, alpha 5) of attention_output, ffw_" in facts["modified"][0]
    with open_checkpoint(path) as checkpoint:
        for path, expected in held(lm).items():
            found = checkpoint.tensor(path)
            # float32 rounds numbers of order one at 6e-8, in a few steps.
            np.testing.assert_allclose(found, expected, atol=5e-7, rtol=0)
            if not path.endswith("kernel") and form != "maxtext":
                assert found.tobytes() == stored(path, expected, form).tobytes()


@pytest.mark.reference
@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
def test_transformers_agrees_on_the_logits(tmp_path, config, lora):
    transformers = pytest.importorskip("transformers")
    import torch

    lm = build(config, lora=lora)
    lm.export(tmp_path / "m", format="hf", max_shard_size=20_000)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        expected = theirs(torch.from_numpy(IDS)).logits.numpy()
    found = ops.convert_to_numpy(lm({"token_ids": IDS}))
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


def test_the_tokenizer_goes_along_and_the_origin_is_kept(new_lm, tmp_path):
    lm = new_lm()
    lm.export(tmp_path / "one", format="keras")
    again = GemmaCausalLM.from_preset(tmp_path / "one")
    again.optimizer.iterations.assign(3)
    again.export(tmp_path / "two", format="hf", licence="apache-2.0")
    facts = json.loads((tmp_path / "two" / "provenance.json").read_text())
    assert facts["source"]["name"] == "one"
    assert len(facts["source"]["files"][0]["sha256"]) == 64
    assert "The model was trained for 3 steps with gemma_keras." in facts["modified"]
    third = GemmaCausalLM.from_preset(tmp_path / "two")
    assert third.preprocessor.tokenizer == lm.preprocessor.tokenizer
    assert third.provenance.licence == "apache-2.0"


def test_an_adapter_alone_is_what_save_adapter_writes(tmp_path):
    lm, other = (build(CONFIGS["gemma"], lora=lora) for lora in (True, False))
    assert lm.export(tmp_path / "a", format="peft") == tmp_path / "a"
    lm.save_adapter(tmp_path / "b")
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "Notice"} <= names
    facts = json.loads((tmp_path / "a" / "provenance.json").read_text())
    assert (facts["licence"], set(facts["files"])) == ("gemma", names)
    # The one file with a time of day.
    for name in names - {"provenance.json"}:
        same = (tmp_path / "b" / name).read_bytes()
        assert (tmp_path / "a" / name).read_bytes() == same
    with pytest.raises(ValueError):
        other.export(tmp_path / "c", format="peft")


def test_an_unknown_format_is_refused_with_all_names(lm, tmp_path):
    with pytest.raises(ValueError, match=r"tf_saved_model.*torch, nemo, flax, .*peft"):
        lm.export(tmp_path / "m", format="pickle")


def test_programs_of_torch_are_written_by_keras(lm, tmp_path, monkeypatch):
    """Keras calls its own format "torch", too, and wants a name in .pt2 for it."""
    asked = []
    monkeypatch.setattr(
        keras.Model, "export", lambda self, path, **options: asked.append(options)
    )
    lm.export(tmp_path / "m.pt2", format="torch", verbose=False)
    assert asked == [{"format": "torch", "verbose": False}]
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="a SavedModel is TensorFlow's"
)
def test_formats_of_keras_work_through_the_same_method(lm, tmp_path):
    import tensorflow as tf

    ids = np.random.default_rng(4).integers(3, 300, (2, 8)).astype("int32")
    inputs = {"token_ids": ids, "padding_mask": np.ones((2, 8), bool)}
    lm(inputs)
    spec = {
        "token_ids": keras.InputSpec(shape=(None, 8), dtype="int32"),
        "padding_mask": keras.InputSpec(shape=(None, 8), dtype="bool"),
    }
    lm.export(tmp_path / "saved", verbose=False, input_signature=[spec])
    loaded = tf.saved_model.load(tmp_path / "saved")
    expected = ops.convert_to_numpy(lm(inputs))
    np.testing.assert_allclose(loaded.serve(inputs), expected, atol=1e-5, rtol=0)
