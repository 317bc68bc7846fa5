"""GGUF checkpoints, written by the `gguf` package and decoded by it for comparison."""

import dataclasses
import sys

import ml_dtypes
import numpy as np
import pytest

from gemma_keras import registry
from gemma_keras.checkpoints import CheckpointError, open_checkpoint

pytestmark = pytest.mark.any_backend

gguf = pytest.importorskip("gguf")
Type = gguf.GGMLQuantizationType

# Names as llama.cpp has them, and not taken from the package.
NAMES = {
    "pre_attention_norm/scale": "attn_norm",
    "attention/query/kernel": "attn_q",
    "attention/key/kernel": "attn_k",
    "attention/value/kernel": "attn_v",
    "attention/query_norm/scale": "attn_q_norm",
    "attention/key_norm/scale": "attn_k_norm",
    "attention/attention_output/kernel": "attn_output",
    "post_attention_norm/scale": "post_attention_norm",
    "pre_ffw_norm/scale": "ffn_norm",
    "ffw_gating/kernel": "ffn_gate",
    "ffw_gating_2/kernel": "ffn_up",
    "ffw_linear/kernel": "ffn_down",
    "post_ffw_norm/scale": "post_ffw_norm",
}
# Types that exist, and that the package cannot decode.
UNDECODED = ("Q8_1", "Q8_K", "Q1_0")
QUANTISED = [
    name
    for name, (block, _) in ((t.name, gguf.GGML_QUANT_SIZES[t]) for t in Type)
    if block > 1 and name not in UNDECODED
]


def name_of(path):
    if path == "token_embedding/embeddings":
        return "token_embd.weight"
    if path == "final_normalization/scale":
        return "output_norm.weight"
    block, role = path.split("/", 1)
    return f"blk.{block.rsplit('_', 1)[1]}.{NAMES[role]}.weight"


def wide(config, block):
    """The same model, one layer deep, with rows that divide into blocks."""
    return dataclasses.replace(
        config,
        num_layers=1,
        hidden_dim=3 * block,
        ffn_dim=5 * block,
        head_dim=block // 2,
        query_pre_attn_scalar=block // 2,
    )


def fields(config, arch=None):
    """Key-value pairs as the converter of llama.cpp writes them."""
    arch = arch or config.family
    found = {
        "general.architecture": arch,
        f"{arch}.context_length": config.max_position,
        f"{arch}.embedding_length": config.hidden_dim,
        f"{arch}.block_count": config.num_layers,
        f"{arch}.feed_forward_length": config.ffn_dim,
        f"{arch}.attention.head_count": config.num_query_heads,
        f"{arch}.attention.head_count_kv": config.num_kv_heads,
        f"{arch}.attention.key_length": config.head_dim,
        f"{arch}.attention.value_length": config.head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": config.norm_epsilon,
    }
    if arch != "gemma":
        found[f"{arch}.attention.sliding_window"] = config.sliding_window
    if arch == "gemma2":
        found[f"{arch}.attn_logit_softcapping"] = config.attn_logit_soft_cap
        found[f"{arch}.final_logit_softcapping"] = config.final_logit_soft_cap
    if arch == "gemma3":
        found[f"{arch}.rope.freq_base"] = config.rope_theta
        if config.rope_scaling_factor != 1:
            found[f"{arch}.rope.scaling.type"] = "linear"
            found[f"{arch}.rope.scaling.factor"] = config.rope_scaling_factor
    return found


def write(path, tensors, values, kinds=None):
    """Writes a GGUF file.

    Args:
        path: The file.
        tensors: Name to array, [out, in] as stored; or bytes of shape [out, row bytes].
        values: Key to value.
        kinds: Name to the type of tensors that are given as bytes.
    """
    writer = gguf.GGUFWriter(path, values["general.architecture"])
    for key, value in values.items():
        if key == "general.architecture":
            continue
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_array(key, value)
    for name, array in tensors.items():
        kind = (kinds or {}).get(name)
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def stored(config, arrays):
    """Our weights as llama.cpp stores them: [out, in], norms plus one."""
    return {
        name_of(path): array.astype(np.float32) + 1
        if array.ndim == 1
        else np.ascontiguousarray(array.T if path.endswith("kernel") else array)
        for path, array in arrays.items()
    }


def write_floats(path, files, config, dtype="float32", values=None):
    """Writes a model and returns the arrays that should be read back."""
    arrays = files.weights(config, dtype)
    tensors = stored(config, arrays)
    kinds = {}
    if dtype == "bfloat16":
        for name, array in tensors.items():
            if array.ndim > 1:
                tensors[name] = array.view(np.uint8)
                kinds[name] = Type.BF16
    write(path, tensors, values or fields(config), kinds)
    for name, array in arrays.items():
        if array.ndim == 1:
            # What is left of the numbers after adding one in float32.
            arrays[name] = (array.astype(np.float32) + 1) - np.float32(1)
    return arrays


def test_floats(tmp_path, files, config, dtype):
    arrays = write_floats(tmp_path / "m.gguf", files, config, dtype)
    with open_checkpoint(tmp_path / "m.gguf") as checkpoint:
        assert checkpoint.config == config
        assert checkpoint.dtype == dtype
        assert checkpoint.tokenizer() is None
        files.assert_same_weights(checkpoint, arrays)
        embedding = checkpoint.tensor("token_embedding/embeddings")
        assert not embedding.flags.owndata
        kind = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
        assert checkpoint.sources("token_embedding/embeddings") == (
            f"m.gguf: token_embd.weight ({kind})"
        )
    # A directory with just one GGUF file stands for it.
    with open_checkpoint(tmp_path) as checkpoint:
        files.assert_same_weights(checkpoint, arrays)


@pytest.mark.parametrize("kind", QUANTISED)
def test_every_quantised_type(tmp_path, files, kind):
    """Blocks of random bytes, which all types can be made of, scales included."""
    kind = Type[kind]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    config = wide(files.configs["gemma3"], block)
    generator = np.random.default_rng(1)
    tensors, kinds, expected = {}, {}, {}
    for path, shape in config.weight_shapes().items():
        name = name_of(path)
        if len(shape) == 1:
            tensors[name] = generator.normal(size=shape).astype(np.float32)
            expected[path] = tensors[name] - np.float32(1)
            continue
        rows, columns = shape[::-1] if path.endswith("kernel") else shape
        raw = generator.integers(0, 256, (rows, columns // block * size), np.uint8)
        tensors[name], kinds[name] = raw, kind
        with np.errstate(all="ignore"):
            decoded = gguf.quants.dequantize(raw, kind)
        expected[path] = decoded.T if path.endswith("kernel") else decoded
    write(tmp_path / "m.gguf", tensors, fields(config), kinds)
    with open_checkpoint(tmp_path / "m.gguf") as checkpoint:
        assert checkpoint.config == config
        assert checkpoint.dtype == "float32"
        for path, array in expected.items():
            found = checkpoint.tensor(path)
            assert found.dtype == np.float32
            np.testing.assert_array_equal(found, array, path)
        assert kind.name in checkpoint.sources("token_embedding/embeddings")


@pytest.mark.parametrize("kind", UNDECODED)
def test_types_that_cannot_be_decoded(tmp_path, files, kind):
    kind = Type[kind]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    config = wide(files.configs["gemma"], block)
    tensors = stored(config, files.weights(config))
    name = "blk.0.ffn_up.weight"
    rows, columns = tensors[name].shape
    tensors[name] = np.zeros((rows, columns // block * size), np.uint8)
    write(tmp_path / "m.gguf", tensors, fields(config), {name: kind})
    with pytest.raises(CheckpointError, match=rf"{name}: tensor type {kind.name}"):
        open_checkpoint(tmp_path / "m.gguf")


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantised_weights_are_near_the_weights(tmp_path, files, kind):
    kind = Type[kind]
    config = wide(files.configs["gemma"], 32)
    arrays = files.weights(config)
    tensors = stored(config, arrays)
    kinds = {}
    for name, array in tensors.items():
        if array.ndim > 1:
            tensors[name] = gguf.quants.quantize(array, kind)
            kinds[name] = kind
    write(tmp_path / "m.gguf", tensors, fields(config), kinds)
    bits = int(kind.name[1])
    with open_checkpoint(tmp_path / "m.gguf") as checkpoint:
        for path, array in arrays.items():
            error = np.abs(checkpoint.tensor(path) - array).max()
            assert error < 8 / 2**bits, path
    for dtype in ("bfloat16", "float16"):
        with open_checkpoint(tmp_path / "m.gguf", dtype=dtype) as checkpoint:
            assert checkpoint.dtype == dtype
            array = checkpoint.tensor("decoder_block_0/ffw_linear/kernel")
            assert array.dtype.name == dtype
            assert checkpoint.tensor("final_normalization/scale").dtype == np.float32
    with pytest.raises(ValueError, match="dtype must be one of"):
        open_checkpoint(tmp_path / "m.gguf", dtype="int4")


def test_large_tensors_are_decoded_in_parts(tmp_path, files):
    config = dataclasses.replace(wide(files.configs["gemma"], 32), vocab_size=5003)
    tensors = stored(config, files.weights(config))
    raw = gguf.quants.quantize(tensors["token_embd.weight"], Type.Q8_0)
    tensors["token_embd.weight"] = raw
    write(
        tmp_path / "m.gguf", tensors, fields(config), {"token_embd.weight": Type.Q8_0}
    )
    with open_checkpoint(tmp_path / "m.gguf") as checkpoint:
        found = checkpoint.tensor("token_embedding/embeddings")
        assert np.array_equal(found, gguf.quants.dequantize(raw, Type.Q8_0))


def test_gguf_package_is_needed_for_quantised_files_only(tmp_path, files, monkeypatch):
    config = wide(files.configs["gemma"], 32)
    arrays = write_floats(tmp_path / "floats.gguf", files, config)
    tensors = stored(config, arrays)
    name = "blk.0.ffn_up.weight"
    tensors[name] = gguf.quants.quantize(tensors[name], Type.Q8_0)
    write(tmp_path / "q8.gguf", tensors, fields(config), {name: Type.Q8_0})
    monkeypatch.setitem(sys.modules, "gguf", None)
    with open_checkpoint(tmp_path / "floats.gguf") as checkpoint:
        files.assert_same_weights(checkpoint, arrays)
    with pytest.raises(CheckpointError, match=r"q8\.gguf.*pip install gguf"):
        open_checkpoint(tmp_path / "q8.gguf")


VOCABULARY = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.bos_token_id": 2,
}


def vocabulary(small, extra=0):
    """The three arrays of a GGUF vocabulary, and padding after them."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(small.proto)
    pieces = [piece.piece for piece in model.pieces]
    padding = [f"[PAD{len(pieces) + index}]" for index in range(extra)]
    return VOCABULARY | {
        "tokenizer.ggml.tokens": pieces + padding,
        "tokenizer.ggml.scores": [piece.score for piece in model.pieces]
        + [-10000.0] * extra,
        "tokenizer.ggml.token_type": [piece.type for piece in model.pieces]
        + [5] * extra,
    }


@pytest.mark.parametrize(("rows", "padding"), [(0, 0), (12, 0), (12, 12)])
def test_vocabulary_and_padding_rows(tmp_path, files, small, rows, padding):
    """Embeddings of 256128 rows for 256000 pieces, with and without [PADn] pieces."""
    config = dataclasses.replace(files.configs["gemma"], vocab_size=small.vocab_size)
    padded = dataclasses.replace(config, vocab_size=small.vocab_size + rows)
    values = fields(config) | vocabulary(small, padding)
    arrays = write_floats(tmp_path / "m.gguf", files, padded, values=values)
    path = "token_embedding/embeddings"
    arrays[path] = arrays[path][: small.vocab_size]
    with open_checkpoint(tmp_path / "m.gguf") as checkpoint:
        assert checkpoint.config == config
        files.assert_same_weights(checkpoint, arrays)
        tokenizer = checkpoint.tokenizer()
        assert tokenizer.vocab_size == small.vocab_size
        for text in ("The capital of the island\n\n  1234", "<end_of_turn>é🙂"):
            assert tokenizer.encode(text) == small.encode(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.model": "gpt2"}, "'gpt2'; Gemma's is 'llama'"),
        ({"tokenizer.ggml.scores": None}, "scores is missing"),
        ({"tokenizer.ggml.token_type": [1, 2]}, "token_type is missing or too short"),
        ({"tokenizer.ggml.tokens": ["a"] * 70}, r"m\.gguf: "),
    ],
)
def test_vocabularies_that_are_refused(tmp_path, files, changes, message):
    config = files.configs["gemma"]
    values = fields(config) | VOCABULARY
    values |= {
        "tokenizer.ggml.tokens": [f"t{index}" for index in range(70)],
        "tokenizer.ggml.scores": [0.0] * 70,
        "tokenizer.ggml.token_type": [1] * 70,
    }
    values = {k: v for k, v in (values | changes).items() if v is not None}
    write_floats(tmp_path / "m.gguf", files, config, values=values)
    with (
        open_checkpoint(tmp_path / "m.gguf") as checkpoint,
        pytest.raises(CheckpointError, match=message),
    ):
        checkpoint.tokenizer()


def read_config(path, files, config, values):
    tensors = stored(config, files.weights(config))
    write(path, tensors, {k: v for k, v in values.items() if v is not None})
    with open_checkpoint(path) as checkpoint:
        return checkpoint.config


def test_defaults_of_llama_cpp(tmp_path, files):
    """What converters left out at one time or another."""
    path = tmp_path / "m.gguf"
    config = files.configs["gemma2"]
    values = fields(config)
    for key in ("sliding_window", "softcapping"):
        values = {name: v for name, v in values.items() if not name.endswith(key)}
    found = read_config(path, files, config, values)
    assert found == dataclasses.replace(
        config, sliding_window=4096, attn_logit_soft_cap=50.0, final_logit_soft_cap=30.0
    )
    config = files.configs["gemma3"]
    values = fields(config) | {
        "gemma3.rope.freq_base_swa": 500.0,
        "gemma3.attention.sliding_window_pattern": 2,
    }
    found = read_config(path, files, config, values)
    assert (found.local_rope_theta, found.layer_kinds) == (500.0, "LGLGLGL")
    pattern = [True, False, False, True, False, False, True]
    values["gemma3.attention.sliding_window_pattern"] = pattern
    assert read_config(path, files, config, values).layer_pattern == "LGG"


@pytest.mark.parametrize(("family", "depth"), [("gemma2", 46), ("gemma3", 62)])
def test_query_scale_of_27b_goes_by_depth(tmp_path, files, family, depth):
    config = dataclasses.replace(files.configs[family], num_layers=depth)
    found = read_config(tmp_path / "m.gguf", files, config, fields(config))
    assert found == dataclasses.replace(config, query_pre_attn_scalar=6.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "llama"}, "architecture 'llama' is not supported"),
        ({"general.type": "adapter"}, "holds no model, but: adapter"),
        ({"split.count": 2}, "llama-gguf-split --merge"),
        ({"gemma3.block_count": 10**9}, "layers are more"),
        ({"gemma3.block_count": 900}, "too few"),
        ({"gemma3.block_count": 8}, "blk.7.attn_norm.weight is missing"),
        ({"gemma3.block_count": 6}, r"no part of Gemma: blk\.6"),
        ({"gemma3.block_count": "7"}, "block_count must be a number, not a str"),
        ({"gemma3.block_count": None}, "block_count is missing"),
        ({"gemma3.embedding_length": 25}, r"has shape \[70, 24\]"),
        ({"gemma3.attention.head_count": 0}, "num_query_heads"),
        ({"gemma3.attention.value_length": 5}, "different sizes"),
        ({"gemma3.attention.sliding_window": None}, "sliding_window is missing"),
        ({"gemma3.attention.sliding_window_pattern": 0}, "is not understood"),
        ({"gemma3.rope.scaling.type": "yarn"}, "rope scaling 'yarn'"),
        ({"gemma3.rope.scaling.factor": float("nan")}, "rope_scaling_factor"),
        ({"gemma3.attention.layer_norm_rms_epsilon": True}, "must be a number"),
    ],
)
def test_files_that_are_refused(tmp_path, files, changes, message):
    config = files.configs["gemma3"]
    values = fields(config) | changes
    with pytest.raises(CheckpointError, match=message) as error:
        read_config(tmp_path / "m.gguf", files, config, values)
    assert str(tmp_path / "m.gguf") in str(error.value)


def test_rope_scaling_that_gemma_2_lacks(tmp_path, files):
    config = files.configs["gemma2"]
    values = fields(config)
    values |= {"gemma2.rope.scaling.type": "linear", "gemma2.rope.scaling.factor": 2.0}
    with pytest.raises(CheckpointError, match="Gemma 2 with rope scaling"):
        read_config(tmp_path / "m.gguf", files, config, values)


def test_heads_quantised_norms_and_extra_tensors(tmp_path, files):
    config = wide(files.configs["gemma"], 32)
    tensors = stored(config, files.weights(config))
    path = tmp_path / "m.gguf"
    tensors["output.weight"] = tensors["token_embd.weight"].copy()
    write(path, tensors, fields(config))
    open_checkpoint(path).close()
    tensors["output.weight"][5, 5] += 1
    write(path, tensors, fields(config))
    with pytest.raises(CheckpointError, match=r"output\.weight differs"):
        open_checkpoint(path)
    tensors["output.weight"] = tensors["token_embd.weight"].astype(np.float16)
    write(path, tensors, fields(config))
    with pytest.raises(CheckpointError, match=r"output\.weight differs"):
        open_checkpoint(path)
    del tensors["output.weight"]
    norm = tensors["output_norm.weight"][None]
    tensors["output_norm.weight"] = gguf.quants.quantize(norm, Type.Q8_0)[0]
    write(path, tensors, fields(config), {"output_norm.weight": Type.Q8_0})
    with pytest.raises(CheckpointError, match=r"output_norm\.weight is a quantised"):
        open_checkpoint(path)


def test_several_files_in_a_directory(tmp_path, files):
    for name in ("a.gguf", "b.gguf"):
        write_floats(tmp_path / name, files, files.configs["gemma"])
    with pytest.raises(CheckpointError, match=r"2 \.gguf files.*a\.gguf, b\.gguf"):
        open_checkpoint(tmp_path)


def test_directory_with_safetensors_beside_a_gguf(tmp_path, files):
    """As in the repository of Gemma 2B: the safetensors are the model."""
    config = files.configs["gemma"]
    arrays = files.weights(config, seed=9)
    write_floats(tmp_path / "m.gguf", files, config)
    files.write_hugging_face(tmp_path, config, arrays)
    with open_checkpoint(tmp_path) as checkpoint:
        files.assert_same_weights(checkpoint, arrays)


@pytest.mark.real
@pytest.mark.slow
def test_gemma_3_270m(gemma3_270m_file, gemma3_tokenizer_file):
    """Every tensor of the genuine file as the package decodes it, and its tokenizer."""
    reader = gguf.GGUFReader(gemma3_270m_file)
    known = {tensor.name: tensor for tensor in reader.tensors}
    with open_checkpoint(gemma3_270m_file) as checkpoint:
        config = checkpoint.config
        assert config == registry.architectures()["gemma3_270m"]
        assert config.num_parameters == 268_098_176
        paths = list(config.weight_shapes())
        assert {name_of(path) for path in paths} == known.keys()
        # All kinds of blocks occur in these layers; the rest is alike.
        for path in paths:
            if path.startswith("decoder_block") and not path.startswith(
                ("decoder_block_0/", "decoder_block_2/")
            ):
                continue
            tensor = known[name_of(path)]
            data = tensor.data[:5000]
            expected = gguf.quants.dequantize(data, tensor.tensor_type)
            if expected.ndim == 1:
                expected = expected - 1
            elif path.endswith("kernel"):
                expected = expected.T
            found = checkpoint.tensor(path)
            if path == "token_embedding/embeddings":
                found = found[:5000]
            assert np.array_equal(found, expected), path
        tokenizer = checkpoint.tokenizer()
    assert tokenizer.vocab_size == 262144
    text = "The capital of France is\n\n  Paris\t1234 <start_of_turn>user é🙂"
    genuine = type(tokenizer)(gemma3_tokenizer_file)
    assert tokenizer.encode(text) == genuine.encode(text)
    assert tokenizer.stop_token_ids == (1, 106)


def test_bfloat16_bits_survive(tmp_path, files):
    """All 65,536 bfloat16 numbers, NaN among them, come back bit for bit."""
    config = dataclasses.replace(files.configs["gemma"], vocab_size=4096, hidden_dim=16)
    tensors = stored(config, files.weights(config))
    bits = np.arange(65536, dtype=np.uint16).reshape(4096, 16)
    tensors["token_embd.weight"] = bits.view(np.uint8)
    write(
        tmp_path / "m.gguf", tensors, fields(config), {"token_embd.weight": Type.BF16}
    )
    with open_checkpoint(tmp_path / "m.gguf") as checkpoint:
        found = checkpoint.tensor("token_embedding/embeddings")
    assert found.dtype == ml_dtypes.bfloat16
    assert np.array_equal(found.view(np.uint16), bits)
