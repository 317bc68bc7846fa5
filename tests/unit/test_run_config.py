"""`RunConfig`: what a run can be told, and what it says to what it cannot."""

import dataclasses

import pytest

from gemma_keras import registry
from gemma_keras.sft.config import ConfigError, RunConfig

pytestmark = pytest.mark.any_backend
NEEDED = {"preset": "gemma_tiny_en", "train": "a.jsonl", "out": "run"}


def read(tmp_path, text, **changes):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return RunConfig.read(path, {**NEEDED, **changes})


def test_what_is_given_counts_and_the_rest_is_default(tmp_path):
    config = read(tmp_path, "lora-rank: 4\nepochs: 2\nlearning_rate: 2e-4", epochs=7)
    assert (config.lora_rank, config.epochs) == (4, 7)
    # YAML 1.1 takes 2e-4 for text.
    assert config.learning_rate == 2e-4
    assert config.train == ["a.jsonl"]
    assert config.packing is True


def test_its_yaml_gives_the_same_config(tmp_path):
    config = read(tmp_path, "", sample_prompts=["Wie heißt du?", "a: b"], warmup=3)
    path = tmp_path / "again.yaml"
    path.write_text(config.as_yaml(), "utf-8")
    assert RunConfig.read(path) == config
    assert config.differences(RunConfig.read(path)) == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("lerning_rate: 1", "no option 'lerning_rate'. Did you mean learning_rate?"),
        ("zzz: 1", "The options are preset, dtype"),
        ("epochs: 0", "epochs must be from 1, got 0"),
        ("epochs: 1.5", "epochs must be a whole number, got 1.5"),
        ("epochs: true", "epochs must be a whole number, got True"),
        ("learning_rate: fast", "learning_rate must be a number, got 'fast'"),
        ("learning_rate: .nan", "learning_rate must be a number, got nan"),
        ("learning_rate: 0", "learning_rate must be above 0 to 10, got 0"),
        ("packing: 1", "packing must be true or false, got 1"),
        ("optimizer: adan", "optimizer must be one of adamw, adam,"),
        ("seed: null", "seed must be a whole number, got None"),
        ("sample_prompts: [1]", "sample_prompts must be text, got 1"),
        ("validation_split: 0.1\nvalidation: b", "exclude each other"),
        ("early_stopping: 2", "early_stopping needs validation"),
        ("column: [prompt]", "expected ROLE=COLUMN such as prompt=question"),
        ("column: ask=prompt", "'ask' is no role; the roles are text, prompt"),
        ("column: [prompt=a, prompt=b]", "prompt is given twice"),
        ("full: true\ndora: true", "full trains every weight"),
        ("full: true\ndtype: bfloat16", "leave dtype out, for float32"),
        ("epochs: 1\nepochs: 2", "epochs is given twice"),
        ("a: [", "is not YAML"),
        ("just text", "must hold lines of `option: value`"),
    ],
)
def test_what_cannot_be_is_told(tmp_path, text, told):
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    assert told in str(caught.value)


def test_every_wrong_value_is_told_at_once_and_what_is_missing():
    with pytest.raises(ConfigError) as caught:
        RunConfig(**NEEDED, epochs=0, batch_size=-1)
    assert "epochs" in str(caught.value)
    assert "batch_size" in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        RunConfig()
    for name in NEEDED:
        assert f"{name} must be given" in str(caught.value)


def test_differences_name_the_options_and_leave_the_backend_free():
    config = RunConfig(**NEEDED, backend="jax")
    other = dataclasses.replace(config, backend="torch", seed=3, lora_rank=4)
    assert config.differences(other) == [
        "lora_rank: 4, but the run has 8",
        "seed: 3, but the run has 0",
    ]


def test_what_goes_by_the_model_is_filled_in():
    tiny, large = (registry.find(n).config for n in ("gemma_tiny_en", "gemma_2b_en"))
    config = RunConfig(**NEEDED, lora_rank=4).resolved(tiny, "float32")
    assert (config.sequence_length, config.lora_alpha) == (256, 4.0)
    assert RunConfig(**NEEDED).resolved(large, "bfloat16").sequence_length == 1024
    with pytest.raises(ConfigError, match="at most 256, which gemma_tiny_en"):
        RunConfig(**NEEDED, sequence_length=512).resolved(tiny, "float32")
    with pytest.raises(ValueError, match="No projection is called quary"):
        RunConfig(**NEEDED, lora_targets="quary").resolved(tiny, "float32")


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_every_weight_is_trained_in_float32_unless_another_dtype_is_given(stored):
    model = registry.find("gemma_tiny_en").config

    def dtype(**given):
        return RunConfig(**NEEDED, **given).resolved(model, stored).dtype

    assert dtype() == "auto"
    assert dtype(full=True) == ("auto" if stored == "float32" else "float32")
    assert dtype(full=True, dtype="mixed_bfloat16") == "mixed_bfloat16"
    with pytest.raises(ConfigError, match="in few bits"):
        RunConfig(**NEEDED, full=True).resolved(model, stored, ["some/layer"])


def test_the_choices_are_those_of_what_takes_them():
    from gemma_keras import optimizers
    from gemma_keras.sft import config

    assert set(config.OPTIMIZERS) == set(optimizers.OPTIMIZERS)
    assert set(config.SCHEDULES) == set(optimizers.SCHEDULES)
