"""GGUF files that are written, read by the gguf package: names, numbers, vocabulary."""

import dataclasses
import json
import warnings

import numpy as np
import pytest

from gemma_keras.checkpoints import CheckpointError, exporting, open_checkpoint
from gemma_keras.checkpoints.contents import Contents
from gemma_keras.checkpoints.gguf_config import config_fields
from gemma_keras.checkpoints.provenance import NOTICE_TEXT
from gemma_keras.config import GemmaConfig
from gemma_keras.registry import architectures
from gemma_keras.tokenizer import GemmaTokenizer

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.any_backend

QUANTISED = ["q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]
# Rows of 64 and 96 divide into blocks of 32, those of 40 do not.
CONFIG = GemmaConfig(
    vocab_size=500,
    num_layers=2,
    hidden_dim=64,
    ffn_dim=96,
    num_query_heads=4,
    num_kv_heads=2,
    head_dim=10,
    query_pre_attn_scalar=10,
)
# llama.cpp's names, written out.
NAMES = {
    "token_embedding/embeddings": "token_embd.weight",
    "decoder_block_1/pre_attention_norm/scale": "blk.1.attn_norm.weight",
    "decoder_block_1/attention/query/kernel": "blk.1.attn_q.weight",
    "decoder_block_1/attention/key/kernel": "blk.1.attn_k.weight",
    "decoder_block_1/attention/value/kernel": "blk.1.attn_v.weight",
    "decoder_block_1/attention/attention_output/kernel": "blk.1.attn_output.weight",
    "decoder_block_1/pre_ffw_norm/scale": "blk.1.ffn_norm.weight",
    "decoder_block_1/ffw_gating/kernel": "blk.1.ffn_gate.weight",
    "decoder_block_1/ffw_gating_2/kernel": "blk.1.ffn_up.weight",
    "decoder_block_1/ffw_linear/kernel": "blk.1.ffn_down.weight",
    "final_normalization/scale": "output_norm.weight",
}


def export(path, config, arrays, **options):
    fields = {key: options.pop(key) for key in ("tokenizer",) if key in options}
    contents = Contents(
        config=config, tensors=arrays.__getitem__, dtype="float32", **fields
    )
    return exporting.export(contents, path, "gguf", **options)


def read(path):
    """Tensor name to tensor, and key to value, as the gguf package reads them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    return tensors, {key: f.contents() for key, f in reader.fields.items()}


def decoded(tensor):
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_floats_are_those_of_the_model(tmp_path, files, dtype):
    arrays = files.weights(CONFIG)
    tensors, _ = read(export(tmp_path / "m.gguf", CONFIG, arrays, dtype=dtype))
    assert len(tensors) == len(arrays)
    for path, name in NAMES.items():
        found = decoded(tensors[name])
        expected = arrays[path]
        if path.endswith("scale"):
            np.testing.assert_array_equal(found, np.float32(1) + expected)
            continue
        expected = expected.astype(np.dtype(dtype)).astype(np.float32)
        expected = expected.T if path.endswith("kernel") else expected
        np.testing.assert_array_equal(found, expected, path)


@pytest.mark.parametrize("dtype", QUANTISED)
def test_blocks_are_those_of_the_gguf_package(tmp_path, files, dtype, monkeypatch):
    # Some rows at a time, the last a few only.
    monkeypatch.setattr("gemma_keras.checkpoints.gguf_writer._CHUNK", 64 * 7)
    arrays = files.weights(CONFIG)
    tensors, fields = read(export(tmp_path / "m.gguf", CONFIG, arrays, dtype=dtype))
    for path, name in NAMES.items():
        tensor, expected = tensors[name], arrays[path]
        kind = tensor.tensor_type
        if path.endswith("scale"):
            assert kind.name == "F32"
            continue
        expected = expected.T if path.endswith("kernel") else expected
        if expected.shape[1] % 32:
            assert kind.name == "F16" and name.endswith("attn_output.weight")
            continue
        wanted = "Q8_0" if path.startswith("token") else dtype.upper()
        assert kind.name == wanted
        whole = gguf.quants.quantize(np.ascontiguousarray(expected), kind)
        np.testing.assert_array_equal(tensor.data, whole)
        # Half a step of the blocks' own scale: 2 ** -8 and 2 ** -4 of the largest.
        bits = int(wanted[1])
        blocks = expected.reshape(-1, 32)
        step = 1.02 * np.ptp(blocks, axis=1, keepdims=True) / 2 ** (bits - 1)
        error = np.abs(decoded(tensor).reshape(-1, 32) - blocks)
        assert (error <= step).all()
    assert fields["general.file_type"] == gguf.LlamaFileType[f"MOSTLY_{dtype.upper()}"]
    assert fields["general.quantization_version"] == 2
    with open_checkpoint(tmp_path / "m.gguf") as checkpoint:
        assert checkpoint.config == CONFIG
        found = checkpoint.tensor("decoder_block_1/ffw_gating/kernel")
        expected = decoded(tensors["blk.1.ffn_gate.weight"]).T
        np.testing.assert_array_equal(found, expected)


def test_the_vocabulary_and_the_chat_template_go_along(tmp_path, files, small):
    path = export(tmp_path / "m.gguf", CONFIG, files.weights(CONFIG), tokenizer=small)
    _, fields = read(path)
    pieces = fields["tokenizer.ggml.tokens"]
    types = fields["tokenizer.ggml.token_type"]
    assert (fields["tokenizer.ggml.model"], len(pieces)) == ("llama", 500)
    kinds = dict(zip(pieces, types, strict=True))
    assert [kinds[p] for p in ("<pad>", "<eos>", "<bos>", "<unk>")] == [3, 3, 3, 2]
    assert (kinds["<start_of_turn>"], kinds["<end_of_turn>"]) == (3, 3)
    # Runs of spaces are looked for in the text as it comes.
    assert kinds["    "] == kinds["\n\n"] == kinds["<mask>"] == 4
    assert kinds["<0x41>"] == 6
    ids = [fields[f"tokenizer.ggml.{role}_token_id"] for role in ("bos", "eos", "eot")]
    assert ids == [2, 1, small.end_of_turn_id]
    assert fields["tokenizer.ggml.add_space_prefix"] is False
    assert "<start_of_turn>model" in fields["tokenizer.chat_template"]
    with open_checkpoint(path) as checkpoint:
        again = checkpoint.tokenizer()
    assert again.pieces() == small.pieces()


@pytest.mark.real
@pytest.mark.parametrize("name", ["gemma", "gemma3"])
def test_genuine_vocabularies_come_back(tmp_path, files, name, request):
    tokenizer = GemmaTokenizer.from_file(
        request.getfixturevalue(f"{name}_tokenizer_file")
    )
    # Gemma 3 has rows without a piece behind its vocabulary.
    rows = tokenizer.vocab_size + (64 if name == "gemma3" else 0)
    config = dataclasses.replace(CONFIG, vocab_size=rows, hidden_dim=4, num_layers=1)
    path = export(
        tmp_path / "m.gguf", config, files.weights(config), tokenizer=tokenizer
    )
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.config.vocab_size == tokenizer.vocab_size
        assert checkpoint.tokenizer().pieces() == tokenizer.pieces()


def test_a_file_tells_its_origin_and_licence(tmp_path, files):
    path = export(tmp_path / "my.gguf", CONFIG, files.weights(CONFIG), dtype="q4_0")
    assert path == tmp_path / "my.gguf"
    assert [p.name for p in tmp_path.iterdir()] == ["my.gguf"]
    _, fields = read(path)
    facts = json.loads(fields["gemma_keras.provenance"])
    assert "They were cast from float32 to q4_0." in facts["modified"]
    assert "The embedding, which is the head too, is in q8_0." in facts["modified"]
    assert fields["gemma_keras.notice"] == NOTICE_TEXT.strip()
    assert (fields["general.name"], fields["general.license"]) == ("my", "gemma")


def test_the_origin_in_a_file_is_read_again(tmp_path, files):
    path = tmp_path / "one.gguf"
    export(path, CONFIG, files.weights(CONFIG), licence="apache-2.0")
    with open_checkpoint(path) as checkpoint:
        again = exporting.checkpoint_contents(checkpoint, path)
        exporting.export(again, tmp_path / "two", "hf")
    facts = json.loads((tmp_path / "two" / "provenance.json").read_text())
    assert facts["licence"] == "apache-2.0"
    assert facts["earlier"][0]["written"]["format"] == "GGUF"


def test_a_file_replaces_a_gguf_only_and_only_if_asked(tmp_path, files):
    arrays = files.weights(CONFIG)
    path = export(tmp_path / "m.gguf", CONFIG, arrays)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="exists already; pass --force"):
        export(path, CONFIG, arrays, dtype="q4_0")
    assert path.read_bytes() == before
    export(path, CONFIG, arrays, dtype="q4_0", overwrite=True)
    assert len(path.read_bytes()) < len(before)
    path.write_text("mine")
    with pytest.raises(CheckpointError, match="is there already, and no GGUF"):
        export(path, CONFIG, arrays, overwrite=True)
    assert path.read_text() == "mine"


@pytest.mark.parametrize("name", sorted(architectures()))
def test_keys_of_published_models_are_those_of_llama_cpp(name):
    config = architectures()[name]
    fields = config_fields(config)
    arch = config.family
    assert fields["general.architecture"] == arch
    assert fields[f"{arch}.attention.key_length"] == config.head_dim
    assert fields[f"{arch}.feed_forward_length"] == config.ffn_dim
    # What llama.cpp takes for granted is not said.
    assert f"{arch}.attention.sliding_window_pattern" not in fields
    assert f"{arch}.rope.freq_base_swa" not in fields
    assert (f"{arch}.rope.freq_base" in fields) == (arch == "gemma3")


@pytest.mark.parametrize(
    ("family", "changes", "match"),
    [
        ("gemma", {"query_pre_attn_scalar": 7}, "query_pre_attn_scalar=7"),
        ("gemma", {"final_logit_soft_cap": 3.0}, "final_logit_soft_cap=3.0"),
        ("gemma2", {"attn_logit_soft_cap": None}, "attn_logit_soft_cap=None"),
        ("gemma3", {"use_post_norms": False}, "use_post_norms=False"),
    ],
)
def test_models_that_llama_cpp_does_not_have_are_refused(
    tmp_path, files, family, changes, match
):
    config = dataclasses.replace(files.configs[family], **changes)
    with pytest.raises(CheckpointError, match=match):
        export(tmp_path / "m.gguf", config, files.weights(config))
    assert not list(tmp_path.iterdir())


def test_another_pattern_and_base_are_told(tmp_path, files):
    config = dataclasses.replace(
        files.configs["gemma3"], layer_pattern="LLG", local_rope_theta=5000.0
    )
    path = export(tmp_path / "m.gguf", config, files.weights(config))
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.config == config


def test_without_the_gguf_package_the_extra_is_named(tmp_path, files, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"pip install 'gemma_keras\[gguf\]'"):
        export(tmp_path / "m.gguf", CONFIG, files.weights(CONFIG))
