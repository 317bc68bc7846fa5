"""Adapters of PEFT on disk: what is read, what is refused, how they are written."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gemma_keras.checkpoints import CheckpointError, peft
from gemma_keras.lora_config import LoraConfig, layer_shapes

pytestmark = pytest.mark.any_backend

ROOT = "base_model.model.model."
QUERY = f"{ROOT}layers.1.self_attn.q_proj.lora_A.weight"
FULL = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["q_proj"]}


@pytest.fixture
def config(files):
    """A tiny Gemma 1: width 24, three layers, four heads of 10, two for keys."""
    return files.configs["gemma"]


@pytest.fixture
def write(tmp_path, config):
    """A function that writes an adapter on the queries, with changes, and its path."""

    def write(tensors=None, without=(), described=None):
        random = np.random.default_rng(0)
        arrays = {}
        for i in range(config.num_layers):
            name = f"{ROOT}layers.{i}.self_attn.q_proj"
            arrays[f"{name}.lora_A.weight"] = random.normal(size=(3, 24))
            arrays[f"{name}.lora_B.weight"] = random.normal(size=(40, 3))
        arrays = {name: a.astype("float32") for name, a in arrays.items()}
        arrays |= tensors or {}
        kept = {name: a for name, a in arrays.items() if name not in without}
        save_file(kept, tmp_path / "adapter_model.safetensors")
        text = json.dumps(FULL | (described or {}))
        (tmp_path / "adapter_config.json").write_text(text)
        return tmp_path

    return write


def test_factors_come_as_matrices_of_the_kernels(write, config):
    folder = write()
    lora, weights = peft.read(folder, config)
    assert lora == LoraConfig(rank=3, alpha=6, targets=["query"])
    stored = load_file(folder / "adapter_model.safetensors")
    found = weights["decoder_block_1/attention/query"]["lora_a"]
    np.testing.assert_array_equal(found, stored[QUERY].T)
    assert {a["lora_b"].shape for a in weights.values()} == {(3, 40)}


@pytest.mark.parametrize(
    "prefix",
    [
        "base_model.model.",
        "base_model.model.model.language_model.",
        "base_model.model.language_model.model.",
    ],
)
def test_adapters_of_a_bare_or_multimodal_model(write, config, prefix):
    folder = write()
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({n.replace(ROOT, prefix): a for n, a in tensors.items()}, path)
    lora, weights = peft.read(folder, config)
    assert lora.targets == ("query",)
    assert len(weights) == 3


def test_half_precision_is_read_as_float32(write, config):
    folder = write({QUERY: np.full((3, 24), 0.1, "float16")})
    found = peft.read(folder, config).weights["decoder_block_1/attention/query"]
    assert found["lora_a"].dtype == "float32"
    assert (found["lora_a"] == np.float32(np.float16(0.1))).all()


VALUE = f"{ROOT}layers.0.self_attn.v_proj.lora_A.weight"
NAN = np.full((3, 24), np.nan, "float32")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"without": [QUERY]}, rf"safetensors: the tensor {QUERY} is missing"),
        (
            {"described": {"target_modules": ["q_proj", "v_proj"]}},
            rf"{VALUE} is missing",
        ),
        ({"described": {"target_modules": "all-linear"}}, "is missing"),
        ({"tensors": {QUERY: NAN}}, rf"{QUERY} holds NaN"),
        (
            {"tensors": {QUERY: np.zeros((3, 23), "float32")}},
            r"\[3, 23\].* ask for \[3, 24\]",
        ),
        ({"tensors": {QUERY: np.zeros((3, 24), "int32")}}, "I32"),
        ({"tensors": {QUERY: np.zeros(24, "float32")}}, "has the shape"),
        ({"described": {"r": 4}}, r"\[3, 24\].* ask for \[4, 24\]"),
        ({"tensors": {VALUE: NAN}}, "v_proj.lora_B.weight is missing"),
        (
            {"tensors": {f"{ROOT}layers.7.self_attn.q_proj.lora_A.weight": NAN}},
            "no update",
        ),
        (
            {"tensors": {f"{ROOT}norm.modules_to_save.weight": NAN}},
            "no update of a projection",
        ),
        ({"tensors": {"base_model.model.lm_head.lora_A.weight": NAN}}, "lm_head"),
        ({"described": {"use_dora": True}}, "lora_magnitude_vector is missing"),
        ({"described": {"peft_type": "IA3"}}, "peft_type 'IA3' is not supported"),
        ({"described": {"peft_type": None}}, "peft_type None"),
        ({"described": {"bias": "all"}}, "bias 'all'"),
        ({"described": {"modules_to_save": ["lm_head"]}}, "modules_to_save is not"),
        ({"described": {"trainable_token_indices": [1]}}, "trainable_token_indices"),
        (
            {"described": {"init_lora_weights": "pissa"}},
            "path_initial_model_for_weight",
        ),
        ({"described": {"r": "3"}}, "r must be integer"),
        ({"described": {"lora_alpha": True}}, "lora_alpha must be"),
        ({"described": {"lora_alpha": -1}}, "alpha must be a positive number"),
        ({"described": {"lora_dropout": 2}}, "dropout must be"),
        ({"described": {"rank_pattern": ["q_proj"]}}, "rank_pattern must be an object"),
        ({"described": {"alpha_pattern": {"q_proj": "x"}}}, "q_proj must be"),
        ({"described": {"alpha_pattern": {"(a+)+$": 1}}}, "too involved"),
        ({"described": {"alpha_pattern": {".*" * 9: 1}}}, "too involved"),
        ({"described": {"alpha_pattern": {"(q": 1}}}, "no regular expression"),
    ],
)
def test_wrong_adapters_are_refused(write, config, changes, message):
    folder = write(**changes)
    with pytest.raises(CheckpointError, match=message) as error:
        peft.read(folder, config)
    assert str(folder) in str(error.value)


def test_an_adapter_for_a_table_that_differs_is_refused(write, config):
    table = np.random.default_rng(1).normal(size=(70, 24)).astype("float32")
    folder = write({f"{ROOT}embed_tokens.base_layer.weight": table})
    assert len(peft.read(folder, config, lambda: table).weights) == 3
    with pytest.raises(CheckpointError, match=r"embed_tokens.*another embedding table"):
        peft.read(folder, config, lambda: table + 1)
    with pytest.raises(CheckpointError, match="another embedding table"):
        peft.read(folder, config, lambda: table[:-1])


def test_an_update_of_the_head_is_refused(write, config):
    factors = {
        f"{ROOT}embed_tokens.lora_embedding_A": np.ones((3, 70), "float32"),
        f"{ROOT}embed_tokens.lora_embedding_B": np.ones((24, 3), "float32"),
    }
    assert len(peft.read(write(factors), config).weights) == 4
    with pytest.raises(CheckpointError, match="ensure_weight_tying"):
        peft.read(write(factors, described={"ensure_weight_tying": True}), config)


def test_pickles_are_not_opened(write, config):
    folder = write()
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin: is a pickle"):
        peft.read(folder, config)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(
        CheckpointError, match=r"adapter_model\.safetensors: is missing"
    ):
        peft.read(folder, config)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match="no PEFT adapter"):
        peft.read(folder, config)
    with pytest.raises(CheckpointError, match="no PEFT adapter"):
        peft.read(folder / "absent", config)


def test_files_that_are_cut_short_are_refused(write, config):
    folder = write()
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="cut short"):
        peft.read(folder, config)
    write()
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        peft.read(folder, config)


def adapter(config, **fields):
    """A random `Adapter` for a model."""
    lora, random = LoraConfig(**{"rank": 2, **fields}), np.random.default_rng(0)
    weights = {}
    for path, (rows, columns) in layer_shapes(config).items():
        if lora.adapts(path):
            rank = lora.rank_of(path)
            weights[path] = {
                "lora_a": random.normal(size=(rows, rank)).astype("float32"),
                "lora_b": random.normal(size=(rank, columns)).astype("float32"),
            }
    return peft.Adapter(lora, weights)


def test_what_is_written_is_read_again(files, tmp_path):
    config = files.configs["gemma3"]
    fields = {"targets": ["query", "decoder_block_2/.*", "token_embedding"]}
    fields |= {"rank_pattern": {"decoder_block_2/.*": 4}, "alpha_pattern": {"query": 9}}
    lora, weights = written = adapter(config, dropout=0.1, rslora=True, **fields)
    peft.write(tmp_path / "a", written, config, base_model="google/gemma-3-270m")
    found = peft.read(tmp_path / "a", config)
    assert found.weights.keys() == weights.keys()
    for path, arrays in weights.items():
        for key, array in arrays.items():
            np.testing.assert_array_equal(found.weights[path][key], array)
        assert found.lora.scale_of(path) == pytest.approx(lora.scale_of(path))
    assert (found.lora.dropout, found.lora.rslora) == (0.1, True)
    described = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == "google/gemma-3-270m"
    card = (tmp_path / "a" / "README.md").read_text()
    assert card.startswith('---\nlibrary_name: peft\nbase_model: "google/gemma-3-270m"')


def test_nothing_is_overwritten_unasked(tmp_path, config):
    folder = tmp_path / "a"
    peft.write(folder, adapter(config), config)
    with pytest.raises(CheckpointError, match="overwrite=True"):
        peft.write(folder, adapter(config), config)
    peft.write(folder, adapter(config, rank=3), config, overwrite=True)
    assert peft.read(folder, config).lora.rank == 3
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"notes\.txt"):
        peft.write(folder, adapter(config), config, overwrite=True)
    (tmp_path / "b").write_text("mine")
    with pytest.raises(CheckpointError, match="is a file"):
        peft.write(tmp_path / "b", adapter(config), config)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_a_failure_leaves_the_adapter_that_was_there(tmp_path, config, monkeypatch):
    peft.write(tmp_path / "a", adapter(config), config)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(peft, "_card", full)
    with pytest.raises(CheckpointError, match="No space left"):
        peft.write(tmp_path / "a", adapter(config, rank=3), config, overwrite=True)
    assert peft.read(tmp_path / "a", config).lora.rank == 2
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
