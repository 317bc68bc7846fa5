"""Classic .nemo archives, and the directory with scripts for what came after."""

import ast
import dataclasses
import gzip
import io
import json
import shutil
import subprocess
import sys
import tarfile
import types
import typing

import numpy as np
import pytest
import yaml
from torch_arrays import to_torch

from gemma_keras.checkpoints import CheckpointError, exporting, open_checkpoint
from gemma_keras.checkpoints.contents import Contents
from gemma_keras.checkpoints.nemo_config import config_fields, read_config
from gemma_keras.registry import architectures

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.any_backend

FAMILIES = ["gemma", "gemma2"]
# Megatron's names of what is no part of another tensor, written out.
NAMES = {
    "pre_attention_norm/scale": "self_attention.linear_qkv.layer_norm_weight",
    "attention/attention_output/kernel": "self_attention.linear_proj.weight",
    "pre_ffw_norm/scale": "mlp.linear_fc1.layer_norm_weight",
    "ffw_linear/kernel": "mlp.linear_fc2.weight",
}
POST_NORMS = {
    "post_attention_norm/scale": "self_attention.linear_proj.post_layernorm.weight",
    "post_ffw_norm/scale": "mlp.linear_fc2.post_layernorm.weight",
}
# Keys that every Gemma of NeMo 1 has, as NVIDIA's own converter writes them.
DOCUMENTED = {
    "mcore_gpt": True,
    "apply_embedding_scaling": True,
    "normalization": "rmsnorm",
    "bias": False,
    "activation": "geglu",
    "openai_gelu": True,
    "position_embedding_type": "rope",
    "rotary_percentage": 1.0,
    "share_embeddings_and_output_weights": True,
    "transformer_engine": True,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
}


def megatron(config, arrays, prefix="model.", norm_dtype=np.float64):
    """The weights as classic NeMo has them: groups by loops, norms plus one."""
    one = 1 if config.family == "gemma" else 0

    def norm(array):
        return (array.astype(np.float64) + one).astype(norm_dtype)

    state = {
        "embedding.word_embeddings.weight": arrays["token_embedding/embeddings"],
        "decoder.final_layernorm.weight": norm(arrays["final_normalization/scale"]),
    }
    names = NAMES | (POST_NORMS if config.use_post_norms else {})
    size, share = config.head_dim, config.num_query_heads // config.num_kv_heads
    for layer in range(config.num_layers):
        block, into = f"decoder_block_{layer}", f"decoder.layers.{layer}"
        for role, name in names.items():
            array = arrays[f"{block}/{role}"]
            state[f"{into}.{name}"] = norm(array) if array.ndim == 1 else array.T
        query, key, value = (
            arrays[f"{block}/attention/{role}/kernel"].T
            for role in ("query", "key", "value")
        )
        rows = []
        for group in range(config.num_kv_heads):
            for head in range(group * share, (group + 1) * share):
                rows.append(query[head * size : (head + 1) * size])
            rows.append(key[group * size : (group + 1) * size])
            rows.append(value[group * size : (group + 1) * size])
        state[f"{into}.self_attention.linear_qkv.weight"] = np.concatenate(rows)
        gates = (arrays[f"{block}/ffw_gating{n}/kernel"].T for n in ("", "_2"))
        state[f"{into}.mlp.linear_fc1.weight"] = np.concatenate(list(gates))
    return {prefix + name: to_torch(array) for name, array in state.items()}


def saved(state):
    memory = io.BytesIO()
    torch.save(state, memory)
    return memory.getvalue()


def nemo_yaml(config, **changes):
    """A model_config.yaml as NeMo 1 writes it, without anything of ours."""
    raw = DOCUMENTED | {
        "encoder_seq_length": config.max_position,
        "max_position_embeddings": config.max_position,
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_dim,
        "ffn_hidden_size": config.ffn_dim,
        "num_attention_heads": config.num_query_heads,
        "num_query_groups": config.num_kv_heads,
        "kv_channels": config.head_dim,
        # As people write it, which YAML takes for text.
        "layernorm_epsilon": "1e-6",
        "make_vocab_size_divisible_by": 128,
        "tokenizer": {"library": "sentencepiece", "model": "nemo:abc_tokenizer.model"},
    }
    if config.use_post_norms:
        raw["layernorm_zero_centered_gamma"] = True
        raw["name"] = "megatron_gemma2"
        raw["window_size"] = [config.sliding_window, 0]
        raw["mcore_customization_config"] = {
            "attn_logit_softcapping": config.attn_logit_soft_cap,
            "final_logit_softcapping": config.final_logit_soft_cap,
            "query_pre_attn_scalar": config.query_pre_attn_scalar,
        }
    return yaml.safe_dump(raw | changes).encode()


def write_tar(path, members):
    """A tar as NeMo makes one: of a folder, its files with `./` in front."""
    with tarfile.open(path, "w") as tar:
        folder = tarfile.TarInfo("./")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, data in members.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def export(path, config, arrays, **options):
    fields = {"tokenizer": options.pop("tokenizer", None)}
    dtype = next(iter(arrays.values())).dtype.name
    contents = Contents(
        config=config, tensors=arrays.__getitem__, dtype=dtype, **fields
    )
    return exporting.export(contents, path, "nemo", **options)


def heads(config, queries, keys):
    return dataclasses.replace(config, num_query_heads=queries, num_kv_heads=keys)


# Archives


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("queries", "keys"), [(4, 1), (4, 2), (3, 3)])
def test_an_archive_holds_what_megatron_expects(
    tmp_path, files, small, family, dtype, queries, keys
):
    config = dataclasses.replace(files.configs[family], vocab_size=500)
    config = heads(config, queries, keys)
    arrays = files.weights(config, dtype)
    path = export(tmp_path / "m.nemo", config, arrays, tokenizer=small)
    assert [p.name for p in tmp_path.iterdir()] == ["m.nemo"]
    with tarfile.open(path) as tar:
        tar.extractall(tmp_path / "out", filter="data")
    out = {p.name: p for p in (tmp_path / "out").iterdir()}
    (vocabulary,) = [name for name in out if name.endswith("_tokenizer.model")]
    papers = {"README.md", "Notice", "provenance.json"}
    assert set(out) == {"model_config.yaml", "model_weights.ckpt", vocabulary, *papers}
    assert out[vocabulary].read_bytes() == small.proto
    raw = yaml.safe_load(out["model_config.yaml"].read_text())
    assert raw.items() >= DOCUMENTED.items()
    assert raw["target"].endswith("megatron_gpt_model.MegatronGPTModel")
    precision = {"float32": 32, "float16": 16, "bfloat16": "bf16"}[dtype]
    assert raw["precision"] == precision
    assert (raw["num_attention_heads"], raw["num_query_groups"]) == (queries, keys)
    assert (raw["kv_channels"], raw["hidden_size"]) == (10, 24)
    assert (raw["ffn_hidden_size"], raw["layernorm_epsilon"]) == (40, 1e-6)
    assert raw["layernorm_zero_centered_gamma"] is (family == "gemma2")
    assert raw["tokenizer"]["model"] == f"nemo:{vocabulary}"
    assert small.vocab_size % raw["make_vocab_size_divisible_by"] == 0
    found = torch.load(out["model_weights.ckpt"], weights_only=True, mmap=True)
    norms = np.float64 if family == "gemma" else dtype
    expected = megatron(config, arrays, norm_dtype=norms)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    facts = json.loads(out["provenance.json"].read_text())
    added = "One was added to the weights of norms, as NeMo 1 expects."
    assert (added in facts["modified"]) is (family == "gemma")
    for source in (path, tmp_path / "out"):
        with open_checkpoint(source) as checkpoint:
            assert (checkpoint.config, checkpoint.dtype) == (config, dtype)
            assert_same(checkpoint, arrays)
            assert checkpoint.tokenizer() == small


def assert_same(checkpoint, arrays):
    """Every bit, though norms come back in float32."""
    for path, expected in arrays.items():
        found = checkpoint.tensor(path)
        if path.endswith("scale"):
            found = found.astype(expected.dtype)
        assert found.dtype == expected.dtype, path
        assert found.tobytes() == expected.tobytes(), path
        assert checkpoint.sources(path)


@pytest.mark.parametrize("norm_dtype", ["float32", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_archives_of_others_are_read(tmp_path, files, small, family, norm_dtype):
    """As NeMo writes them: padded embedding, no word of ours, `_extra_state`s."""
    config = dataclasses.replace(files.configs[family], vocab_size=small.vocab_size)
    arrays = files.weights(config)
    one = 1 if family == "gemma" else 0
    for path in arrays:
        if path.endswith("scale"):
            kept = (arrays[path] + one).astype(norm_dtype).astype(np.float32)
            arrays[path] = kept - one
    state = megatron(config, arrays, norm_dtype=norm_dtype)
    table = state["model.embedding.word_embeddings.weight"]
    padding = torch.zeros(512 - len(table), table.shape[1])
    state["model.embedding.word_embeddings.weight"] = torch.cat([table, padding])
    state["model.decoder.layers.0.mlp.linear_fc1._extra_state"] = None
    state["model.decoder.layers.1.mlp.linear_fc1._extra_state"] = torch.ones(9).byte()
    members = {
        "model_config.yaml": nemo_yaml(config),
        "model_weights.ckpt": saved(state),
        "abc_tokenizer.model": small.proto,
    }
    path = write_tar(tmp_path / "m.nemo", members)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.config == config
        assert_same(checkpoint, arrays)
        assert checkpoint.tokenizer() == small
    # Compressed, as NeMo's first versions did it, and under any name.
    packed = tmp_path / "packed"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    with open_checkpoint(packed) as checkpoint:
        kernel = checkpoint.tensor("decoder_block_0/ffw_linear/kernel")
        assert checkpoint.files() == [packed]
    # What was mapped outlives the temporary file.
    np.testing.assert_array_equal(kernel, arrays["decoder_block_0/ffw_linear/kernel"])
    path.unlink()
    (tmp_path / "one").mkdir()
    write_tar(tmp_path / "one" / "x.nemo", members)
    with open_checkpoint(tmp_path / "one") as checkpoint:
        assert_same(checkpoint, arrays)


@pytest.mark.parametrize("place", ["mp_rank_00", "tp_rank_00_pp_rank_000"])
def test_places_and_prefixes_of_other_versions(tmp_path, files, place):
    config = files.configs["gemma"]
    arrays = files.weights(config)
    state = megatron(config, arrays, prefix="model.module.")
    # Megatron's spec without Transformer Engine; and a head that is the embedding.
    renamed = {
        name.replace(
            "self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"
        ).replace(
            "mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"
        ): tensor
        for name, tensor in state.items()
    }
    table = state["model.module.embedding.word_embeddings.weight"]
    renamed["model.module.output_layer.weight"] = table.clone()
    raw = nemo_yaml(config, num_query_groups=2, max_position_embeddings=None)
    members = {
        "model_config.yaml": b"model:\n  " + raw.replace(b"\n", b"\n  "),
        f"{place}/model_weights.ckpt": saved(renamed),
    }
    path = write_tar(tmp_path / "m.nemo", members)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.config == config
        assert_same(checkpoint, arrays)
        assert checkpoint.tokenizer() is None
    renamed["model.module.output_layer.weight"] = table + 1
    members[f"{place}/model_weights.ckpt"] = saved(renamed)
    with pytest.raises(CheckpointError, match="output head of its own"):
        open_checkpoint(write_tar(path, members))


def test_a_header_of_more_than_8_gb_fits(tmp_path):
    from gemma_keras.checkpoints.nemo_writer import _header

    block = _header("model_weights.ckpt", 17 * 2**30)
    assert len(block) == 512
    info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    assert (info.name, info.size) == ("./model_weights.ckpt", 17 * 2**30)


def test_rows_without_a_piece_are_kept(tmp_path, files, small):
    config = dataclasses.replace(files.configs["gemma"], vocab_size=505)
    arrays = files.weights(config)
    path = export(tmp_path / "m.nemo", config, arrays, tokenizer=small)
    with tarfile.open(path) as tar:
        raw = yaml.safe_load(tar.extractfile("./model_config.yaml"))
    # NeMo rounds its 500 pieces up to a multiple of this.
    divisor = raw["make_vocab_size_divisible_by"]
    assert -(-500 // divisor) * divisor == 505
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.config == config
        assert_same(checkpoint, arrays)


# Configs


@pytest.mark.parametrize(
    "name", sorted(n for n, c in architectures().items() if c.family != "gemma3")
)
def test_published_models_have_a_yaml(name):
    config = architectures()[name]
    raw = yaml.safe_load(yaml.safe_dump(config_fields(config, config.vocab_size)))
    assert raw["num_query_groups"] == config.num_kv_heads
    assert raw["make_vocab_size_divisible_by"] == 128
    assert read_config(raw, config.vocab_size, "x") == config


@pytest.mark.parametrize(
    ("family", "changes", "match"),
    [
        ("gemma", {"final_logit_soft_cap": 3.0}, "cannot have final_logit_soft_cap"),
        ("gemma", {"query_pre_attn_scalar": 7}, "query_pre_attn_scalar=7"),
        ("gemma2", {"layer_pattern": "LLG"}, "layer_pattern='LLG'"),
        ("gemma2", {"attn_logit_soft_cap": None}, "attn_logit_softcapping is missing"),
        ("gemma3", {}, "NeMo has Gemma 3 since version 2. Name a directory"),
    ],
)
def test_models_that_nemo_1_does_not_have_are_refused(
    tmp_path, files, family, changes, match
):
    config = dataclasses.replace(files.configs[family], **changes)
    with pytest.raises(CheckpointError, match=match):
        export(tmp_path / "a" / "m.nemo", config, files.weights(config))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"activation": "swiglu"}, "activation is 'swiglu'; a Gemma of NeMo has 'ge"),
        ({"normalization": "layernorm1p"}, "normalization is 'layernorm1p'"),
        ({"apply_embedding_scaling": None}, "apply_embedding_scaling is False"),
        ({"mcore_gpt": False}, "mcore_gpt is False"),
        ({"rotary_percentage": 0.5}, "rotary_percentage is 0.5"),
        ({"num_layers": None}, "the key num_layers is missing"),
        ({"num_layers": "many"}, "num_layers must be a number, not 'many'"),
        ({"num_layers": 2000}, "2000 layers are more than"),
        ({"num_layers": True}, "num_layers must be a number"),
        ({"num_attention_heads": 0}, "num_query_heads must be a positive"),
        ({"hidden_size": 32}, r"has shape \[70, 24\], but the config asks for"),
        ({"gemma_keras": {"where": 1}}, "unexpected keyword"),
        ({"gemma_keras": {"num_layers": 1}}, "missing .* required"),
    ],
)
def test_yaml_of_other_models_is_refused(tmp_path, files, changes, match):
    config = files.configs["gemma"]
    members = {
        "model_config.yaml": nemo_yaml(config, **changes),
        "model_weights.ckpt": saved(megatron(config, files.weights(config))),
    }
    path = write_tar(tmp_path / "m.nemo", members)
    with pytest.raises(CheckpointError, match=match) as error:
        open_checkpoint(path)
    assert str(path) in str(error.value)


def test_our_config_has_to_agree_with_nemos_keys(tmp_path, files):
    config = files.configs["gemma"]
    ours = dataclasses.asdict(dataclasses.replace(config, rope_theta=5000.0))
    members = {
        "model_config.yaml": nemo_yaml(config, gemma_keras=ours),
        "model_weights.ckpt": saved(megatron(config, files.weights(config))),
    }
    path = write_tar(tmp_path / "m.nemo", members)
    with pytest.raises(CheckpointError, match=r"says rope_theta=5000\.0.*do not"):
        open_checkpoint(path)


# What is not read


def test_distributed_checkpoints_are_refused_with_what_to_do(tmp_path, files):
    config = files.configs["gemma"]
    weights = saved(megatron(config, files.weights(config)))
    raw = nemo_yaml(config)
    parts = {f"mp_rank_0{rank}/model_weights.ckpt": weights for rank in (0, 1)}
    path = write_tar(tmp_path / "tp.nemo", {"model_config.yaml": raw, **parts})
    with pytest.raises(CheckpointError, match=r"2 processes.*change_num_partitions"):
        open_checkpoint(path)
    members = {"model_config.yaml": raw, "model_weights/metadata.json": b"{}"}
    with pytest.raises(
        CheckpointError, match=r"distributed checkpoint \(model_weights/"
    ):
        open_checkpoint(write_tar(path, members))
    for folder in ("context", "weights"):
        (tmp_path / "nemo2" / folder).mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"NeMo 2.*llm\.export_ckpt\(path="):
        open_checkpoint(tmp_path / "nemo2")
    (tmp_path / "bridge").mkdir()
    (tmp_path / "bridge" / "run_config.yaml").write_text("{}")
    with pytest.raises(CheckpointError, match=r"Megatron.*\.export_ckpt\("):
        open_checkpoint(tmp_path / "bridge")


def test_weights_alone_ask_for_their_yaml(tmp_path, files):
    config = files.configs["gemma"]
    path = tmp_path / "model_weights.ckpt"
    path.write_bytes(saved(megatron(config, files.weights(config))))
    with pytest.raises(CheckpointError, match="names are those of NVIDIA NeMo"):
        open_checkpoint(path)
    (tmp_path / "model_config.yaml").write_bytes(nemo_yaml(config))
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.config == config


# Directories


def with_heads_of_256(config, **changes):
    sizes = {"head_dim": 256, "num_query_heads": 2, "num_kv_heads": 1}
    sizes |= {"query_pre_attn_scalar": 256, "vocab_size": 20, "hidden_dim": 6}
    return dataclasses.replace(config, **sizes | changes)


def test_a_directory_is_hugging_faces_with_scripts(tmp_path, files, config, small):
    config = dataclasses.replace(config, vocab_size=500)
    arrays = files.weights(config)
    told = []
    folder = export(tmp_path / "m", config, arrays, tokenizer=small, report=told.append)
    with open_checkpoint(folder) as checkpoint:
        assert (checkpoint.format, checkpoint.config) == ("Hugging Face", config)
        files.assert_same_weights(checkpoint, arrays)
    names = {path.name for path in folder.iterdir()}
    # NeMo insists on the second; it finds tokenizers with AutoTokenizer.
    assert names >= {"config.json", "generation_config.json", "tokenizer.json"}
    assert "finetune_bridge.py" in names and "finetune_nemo2.py" not in names
    assert told == [
        "There is no finetune_nemo2.py: NeMo 2 imports a Gemma with heads of 256 only."
    ]
    card = (folder / "README.md").read_text()
    assert "written for NVIDIA NeMo" in card and "finetune_bridge.py import" in card
    raw = json.loads((folder / "config.json").read_text())
    assert raw["rope_theta"] and raw["torch_dtype"] == "float32"


def test_the_absence_of_a_tokenizer_is_told(tmp_path, files):
    config = files.configs["gemma"]
    told = []
    export(tmp_path / "m", config, files.weights(config), report=told.append)
    assert told[1].startswith("There is no tokenizer, which NVIDIA's programs ask for")


class Recorder(types.ModuleType):
    """A module in which every name exists, and every call is written down."""

    calls: typing.ClassVar = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Recorder(f"{self.__name__}.{name}")

    def __call__(self, *args, **kwargs):
        Recorder.calls.append((self.__name__, args, kwargs))
        return Recorder(f"{self.__name__}()")

    def __iter__(self):
        return iter([Recorder("first"), Recorder("second")])


def run_script(monkeypatch, path, *arguments):
    """What a script calls of NVIDIA's packages, which are not there."""
    source = path.read_text()
    imports = [
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)
    ]
    for node in imports:
        parts = node.module.split(".")
        for count in range(1, len(parts) + 1):
            name = ".".join(parts[:count])
            monkeypatch.setitem(sys.modules, name, Recorder(name))
    monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
    Recorder.calls.clear()
    code = compile(source, str(path), "exec")
    exec(code, {"__name__": "__main__", "__file__": str(path)})
    return {name: (args, kwargs) for name, args, kwargs in Recorder.calls}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_script_for_nemo_2_imports_and_trains(tmp_path, files, monkeypatch, family):
    config = with_heads_of_256(files.configs[family])
    folder = export(tmp_path / "m", config, files.weights(config))
    script, out = folder / "finetune_nemo2.py", tmp_path / "out"
    calls = run_script(monkeypatch, script, "import", out)
    llm = "nemo.collections.llm"
    kind = {"gemma": "Gemma", "gemma2": "Gemma2"}[family]
    assert (
        calls[f"{llm}.{kind}Config"][1].items()
        >= {
            "num_layers": 3,
            "hidden_size": 6,
            "ffn_hidden_size": 40,
            "num_attention_heads": 2,
            "num_query_groups": 1,
        }.items()
    )
    assert f"{llm}.{kind}Model" in calls
    arguments = calls[f"{llm}.import_ckpt"][1]
    assert arguments["source"] == f"hf://{folder}"
    assert arguments["output_path"] == out / "imported"
    assert f"{llm}.finetune" not in calls
    calls = run_script(monkeypatch, script, "finetune", out, "DATA", "--steps", 7)
    assert calls[f"{llm}.FineTuningDataModule"][1]["dataset_root"] == "DATA"
    assert calls["nemo.lightning.Trainer"][1]["max_steps"] == 7
    restored = calls["nemo.lightning.RestoreConfig"][1]["path"]
    assert restored == str(out / "imported")
    assert f"{llm}.finetune" in calls and f"{llm}.import_ckpt" not in calls


def test_the_script_for_megatron_bridge_imports_and_trains(
    tmp_path, files, monkeypatch, config
):
    folder = export(tmp_path / "m", config, files.weights(config))
    script, out = folder / "finetune_bridge.py", tmp_path / "out"
    bridge = "megatron.bridge.AutoBridge"
    calls = run_script(monkeypatch, script, "import", out)
    assert calls[f"{bridge}.import_ckpt"][1] == {
        "hf_model_id": str(folder),
        "megatron_path": str(out / "imported"),
    }
    calls = run_script(monkeypatch, script, "finetune", out, "DATA")
    assert calls[f"{bridge}.from_hf_pretrained"][0] == (str(folder),)
    training = "megatron.bridge.training"
    restored = calls[f"{training}.config.CheckpointConfig"][1]["pretrained_checkpoint"]
    assert restored == str(out / "imported")
    data = calls[f"{training}.config.FinetuningDatasetConfig"][1]
    assert data["dataset_root"] == "DATA"
    assert f"{training}.finetune.finetune" in calls


def test_scripts_say_what_they_want(tmp_path, files):
    config = with_heads_of_256(files.configs["gemma"])
    folder = export(tmp_path / "m", config, files.weights(config))
    for name in ("finetune_nemo2.py", "finetune_bridge.py"):
        command = [sys.executable, "-I", folder / name, "finetune", "out"]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 2 and "finetune needs DATA." in result.stderr
    shutil.rmtree(folder)


def test_of_gemma_3_nemo_2_knows_1b(tmp_path, files):
    from gemma_keras.checkpoints.nemo_scripts import _nemo2_cannot, _nemo2_script

    assert _nemo2_cannot(architectures()["gemma3_1b"]) is None
    script = _nemo2_script(architectures()["gemma3_1b"])
    assert "llm.Gemma3Config1B()" in script and "llm.Gemma3Model(" in script
    ast.parse(script)
    reason = _nemo2_cannot(architectures()["gemma3_270m"])
    assert reason == "of text-only Gemma 3, NeMo 2 imports 1B only"
    for name in ("gemma_2b", "gemma_7b", "gemma2_2b", "gemma2_9b"):
        assert _nemo2_cannot(architectures()[name]) is None
    assert "heads of 256" in _nemo2_cannot(architectures()["gemma2_27b"])
