"""Files that are broken or malicious: a `CheckpointError`, and no great allocation."""

import contextlib
import json
import os
import struct

import h5py
import numpy as np
import pytest
from hostile import FUZZ, fails, little_memory, read_all, survives
from hypothesis import example, given
from hypothesis import strategies as st

from gemma_keras.checkpoints import CheckpointError, keras_preset, open_checkpoint
from gemma_keras.checkpoints.gguf_file import GGUFFile
from gemma_keras.checkpoints.safetensors_file import SafetensorsFile

pytestmark = pytest.mark.any_backend

# Directories


def test_nothing_there(tmp_path):
    fails(tmp_path / "absent", "no such file or directory")
    fails(tmp_path, "the directory is empty")
    (tmp_path / "notes.txt").write_text("hello")
    fails(tmp_path, r"holds no checkpoint\. Expected config\.json")
    fails(tmp_path / "notes.txt", "neither a safetensors file nor a GGUF")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    fails(tmp_path, "convert them to safetensors")
    (tmp_path / "empty.gguf").write_bytes(b"")
    fails(tmp_path / "empty.gguf", "is not a GGUF file")


def test_adapter_is_no_model(tmp_path, files):
    config = files.configs["gemma"]
    files.write_hugging_face(tmp_path, config, files.weights(config))
    (tmp_path / "config.json").unlink()
    fails(tmp_path, r"config\.json: is missing")
    (tmp_path / "adapter_config.json").write_text("{}")
    fails(tmp_path, "is a PEFT adapter")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe\xfa", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": 1, "a": 2}', "a key is given twice"),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[1, 2]", "must hold a JSON object, not a list"),
        (b"null", "not a NoneType"),
        (b"{}", "model type None is not supported"),
        (b'{"model_type": "gemma3"}', "without a text_config"),
        (b'{"model_type": "gemma3", "text_config": 3}', "without a text_config"),
    ],
)
def test_broken_config_json(tmp_path, files, text, message):
    config = files.configs["gemma"]
    files.write_hugging_face(tmp_path, config, files.weights(config))
    (tmp_path / "config.json").write_bytes(text)
    fails(tmp_path, message, tmp_path / "config.json")


def test_config_json_of_absurd_size(tmp_path, files):
    config = files.configs["gemma"]
    files.write_hugging_face(tmp_path, config, files.weights(config))
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(2**34)
    fails(tmp_path, "too many for JSON", tmp_path / "config.json")


# Safetensors


def test_safetensors_cut_anywhere(tmp_path, files):
    config = files.configs["gemma"]
    files.write_hugging_face(tmp_path, config, files.weights(config))
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    cuts = {0, 1, 7, 8, 9, length - 1, length, length + 1, len(data) - 1}
    cuts |= set(range(0, len(data), len(data) // 40))
    for cut in sorted(cuts):
        path.write_bytes(data[:cut])
        fails(tmp_path, r"cut short|no safetensors file", path)
    path.write_bytes(data + b"\0")
    fails(tmp_path, "the file holds", path)


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 2**40, 100_000_001, 10**6])
def test_safetensors_header_of_absurd_length(tmp_path, files, length):
    config = files.configs["gemma"]
    files.write_hugging_face(tmp_path, config, files.weights(config))
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(struct.pack("<Q", length) + data[8:])
    fails(tmp_path, "states a header of", path)


NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "Q4"}, "unknown dtype 'Q4'"),
        ({"dtype": ["F32"]}, "unknown dtype"),
        ({"dtype": None}, "unknown dtype None"),
        ({"dtype": "I32"}, "is I32; weights must be one of"),
        ({"dtype": "F16"}, "takes 1,920 bytes, but its offsets"),
        ({"shape": [24, 40]}, r"has shape \[24, 40\], but the config asks for"),
        ({"shape": [960]}, r"has shape \[960\]"),
        ({"shape": [40, 24, 1]}, "has shape"),
        ({"shape": [2**62, 2**62]}, "takes"),
        ({"shape": [-40, -24]}, "invalid shape"),
        ({"shape": [40.0, 24]}, "invalid shape"),
        ({"shape": "40"}, "invalid shape"),
        ({"shape": None}, "invalid shape"),
        ({"shape": [True, 960]}, "invalid shape"),
        ({"data_offsets": [0, 3840]}, "begins at byte"),
        ({"data_offsets": [-3840, 0]}, "invalid offsets"),
        ({"data_offsets": [3840, 0]}, "span -3,840"),
        ({"data_offsets": [0]}, "invalid offsets"),
        ({"data_offsets": [2**70, 2**70 + 3840]}, "invalid offsets"),
        ({"data_offsets": [2**50, 2**50 + 3840]}, "begins at byte|the tensors|takes"),
        ({"data_offsets": ["0", "3840"]}, "invalid offsets"),
    ],
)
def test_safetensors_header_entries(tmp_path, files, change, message):
    config = files.configs["gemma"]
    files.write_hugging_face(
        tmp_path,
        config,
        files.weights(config),
        change=lambda entries: entries[NAME].update(change),
    )
    fails(tmp_path, message, tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entries: entries.pop(NAME), "begins at byte"),
        (lambda entries: entries.update({NAME: 3}), "is not an object"),
        (
            lambda entries: entries.update({"x": entries.pop(NAME)}),
            f"{NAME} is missing",
        ),
        (lambda entries: entries.clear(), "but the file holds"),
        (
            lambda entries: entries.update(
                {"x": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}
            ),
            "no part of the Gemma which config.json describes: x",
        ),
    ],
)
def test_safetensors_tensors_that_lack_or_are_too_many(
    tmp_path, files, change, message
):
    config = files.configs["gemma"]
    files.write_hugging_face(tmp_path, config, files.weights(config), change=change)
    fails(tmp_path, message, tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"", "not valid JSON"),
        (b"{}", "but the file holds"),
        (b"[]", "not a list"),
        (b"{" * 50_000, "not valid JSON"),
        (b'{"a":1,"a":1}', "a key is given twice"),
    ],
)
def test_safetensors_headers_that_are_no_header(tmp_path, files, header, message):
    config = files.configs["gemma"]
    files.write_hugging_face(tmp_path, config, files.weights(config), header=header)
    fails(tmp_path, message, tmp_path / "model.safetensors")


def test_mislabelled_formats(tmp_path, files):
    config = files.configs["gemma"]
    arrays = files.weights(config)
    a, b = tmp_path / "a", tmp_path / "b"
    files.write_hugging_face(a, config, arrays)
    keras_preset.save(b, config, "float32", arrays.__getitem__)
    tensors, h5 = a / "model.safetensors", b / "model.weights.h5"
    kept = tensors.read_bytes()
    tensors.write_bytes(h5.read_bytes())
    fails(a, "states a header of", tensors)
    h5.write_bytes(kept)
    fails(b, "is not an HDF5 file", h5)
    # The content counts, not the name.
    (tmp_path / "m.gguf").write_bytes(kept)
    fails(tmp_path / "m.gguf", r"config\.json: is missing", tmp_path)
    (tmp_path / "m.gguf").write_bytes(b"x" + kept)
    fails(tmp_path / "m.gguf", "is not a GGUF file")
    (tmp_path / "m.safetensors").write_bytes(b"GGUF" + kept)
    fails(tmp_path / "m.safetensors", "GGUF version")
    (tmp_path / "nameless").write_bytes(b"\x89HDF\r\n\x1a\n")
    fails(tmp_path / "nameless", "is damaged")


# Indexes of shards


@pytest.mark.parametrize(
    "name",
    [
        "../../x.safetensors",
        "/etc/passwd",
        "..",
        ".",
        "",
        "a/b.safetensors",
        "a\\b.safetensors",
        "C:x.safetensors",
        "x\0.safetensors",
        "absent.safetensors",
    ],
)
@pytest.mark.parametrize("form", ["hugging_face", "keras"])
def test_index_that_leads_elsewhere(tmp_path, files, name, form):
    config = files.configs["gemma"]
    arrays = files.weights(config)
    folder = tmp_path / "in"
    outside = tmp_path / "x.safetensors"
    tensors = files.hugging_face_tensors(config, arrays)
    outside.write_bytes(files.safetensors_bytes(tensors))
    if form == "hugging_face":
        files.write_shards(folder, config, arrays)
        index = folder / "model.safetensors.index.json"
        key = "model.norm.weight"
    else:
        keras_preset.save(
            folder, config, "float32", arrays.__getitem__, max_shard_size=1e-5
        )
        index = folder / "model.weights.json"
        key = "/layers/rms_normalization/vars"
    raw = json.loads(index.read_text())
    raw["weight_map"][key] = name
    index.write_text(json.dumps(raw))
    fails(folder, "names the file", index)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "has no weight_map"),
        ({"weight_map": {}}, "has no weight_map"),
        ({"weight_map": ["a"]}, "has no weight_map"),
        ({"weight_map": {"a": 3}}, "must name files"),
        ({"weight_map": {"a": None}}, "must name files"),
        ({"weight_map": {"a": {"b": "c"}}}, "must name files"),
    ],
)
@pytest.mark.parametrize("form", ["hugging_face", "keras"])
def test_index_that_is_no_index(tmp_path, files, value, message, form):
    config = files.configs["gemma"]
    arrays = files.weights(config)
    folder = tmp_path / "p"
    if form == "hugging_face":
        files.write_shards(folder, config, arrays)
        index = folder / "model.safetensors.index.json"
    else:
        keras_preset.save(
            folder, config, "float32", arrays.__getitem__, max_shard_size=1e-5
        )
        index = folder / "model.weights.json"
    index.write_text(json.dumps(value))
    fails(folder, message, index)


def test_index_and_shards_that_disagree(tmp_path, files):
    config = files.configs["gemma"]
    files.write_shards(tmp_path, config, files.weights(config))
    index = tmp_path / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    names = sorted(set(raw["weight_map"].values()))
    raw["weight_map"]["model.norm.weight"] = names[0]
    index.write_text(json.dumps(raw))
    fails(tmp_path, rf"model.norm.weight is not in {names[0]}", index)
    (tmp_path / names[2]).write_bytes((tmp_path / names[0]).read_bytes())
    fails(tmp_path, "is also in", tmp_path / names[2])
    (tmp_path / names[1]).unlink()
    fails(tmp_path, f"'{names[1]}', which is missing", index)
    index.unlink()
    fails(tmp_path, "2 safetensors files but no model.safetensors.index.json")


def test_file_that_is_cut_while_it_is_open(tmp_path, files):
    config = files.configs["gemma"]
    files.write_hugging_face(tmp_path, config, files.weights(config))
    path = tmp_path / "model.safetensors"
    with open_checkpoint(tmp_path) as checkpoint:
        os.truncate(path, 5000)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: model\.norm"):
            checkpoint.tensor("final_normalization/scale")
    with pytest.raises(CheckpointError, match="was closed"):
        checkpoint.tensor("token_embedding/embeddings")


# GGUF


def text(value):
    value = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(value)) + value


def gguf_bytes(config, tensors, values=(), *, version=3, counts=None, alignment=32):
    """A GGUF file of float32 tensors, with any header.

    Args:
        config: The model whose settings go into the header.
        tensors: Name to array as stored.
        values: More pairs of key and encoded value, type included.
        version: What the file says of its version.
        counts: What it says of its tensors and keys, if not the truth.
        alignment: Of each tensor.
    """
    pairs = {
        "general.architecture": struct.pack("<I", 8) + text(config.family),
        "gemma.attention.layer_norm_rms_epsilon": struct.pack("<If", 6, 1e-6),
    }
    numbers = {
        "context_length": config.max_position,
        "embedding_length": config.hidden_dim,
        "block_count": config.num_layers,
        "feed_forward_length": config.ffn_dim,
        "attention.head_count": config.num_query_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
    }
    for key, value in numbers.items():
        pairs[f"gemma.{key}"] = struct.pack("<II", 4, value)
    pairs |= dict(values)
    infos, data, offset = b"", b"", 0
    for name, array in tensors.items():
        infos += text(name) + struct.pack("<I", array.ndim)
        infos += struct.pack(f"<{array.ndim}Q", *array.shape[::-1])
        infos += struct.pack("<IQ", 0, offset)
        padded = array.tobytes() + b"\0" * (-array.nbytes % alignment)
        data += padded
        offset += len(padded)
    head = b"GGUF" + struct.pack("<I", version)
    head += struct.pack("<QQ", *(counts or (len(tensors), len(pairs))))
    head += b"".join(text(key) + value for key, value in pairs.items()) + infos
    return head + b"\0" * (-len(head) % alignment) + data


@pytest.fixture
def gguf_model(files):
    """(config, tensors as stored) of a tiny Gemma 1."""
    from gemma_keras.checkpoints.gguf import weight_name

    config = files.configs["gemma"]
    tensors = {
        weight_name(path): np.ascontiguousarray(
            array.T if path.endswith("kernel") else array
        )
        for path, array in files.weights(config).items()
    }
    return config, tensors


def test_gguf_as_it_should_be(tmp_path, gguf_model):
    path = tmp_path / "m.gguf"
    for version in (2, 3):
        path.write_bytes(gguf_bytes(*gguf_model, version=version))
        read_all(path)
    path.write_bytes(
        gguf_bytes(
            *gguf_model,
            {"general.alignment": struct.pack("<II", 4, 64)},
            alignment=64,
        )
    )
    read_all(path)


def test_gguf_cut_anywhere(tmp_path, gguf_model):
    path = tmp_path / "m.gguf"
    data = gguf_bytes(*gguf_model).rstrip(b"\0")
    for cut in range(0, len(data), len(data) // 150):
        path.write_bytes(data[:cut])
        fails(path, r"cut short|is not a GGUF file")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": 1}, "GGUF version 1 is not supported"),
        ({"version": 4}, "version 4"),
        ({"version": 3 << 24}, "a big-endian file"),
        ({"counts": (2**64 - 1, 10)}, "cut short|not UTF-8|axes"),
        ({"counts": (29, 2**64 - 1)}, "value type|cut short|not UTF-8|twice"),
        ({"counts": (0, 0)}, "architecture '' is not"),
        ({"counts": (3, 10)}, "attn_.* is missing|too few|overlaps"),
    ],
)
def test_gguf_headers(tmp_path, gguf_model, options, message):
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes(*gguf_model, **options))
    fails(path, message)


HUGE = 2**64 - 1


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (struct.pack("<IQ", 8, HUGE), "x: needs .* bytes"),
        (struct.pack("<IIQ", 9, 8, HUGE), "x: needs 8 bytes|x: needs .* bytes"),
        (struct.pack("<IIQ", 9, 4, HUGE), "x: needs .* bytes"),
        (struct.pack("<IIQ", 9, 0, HUGE), "x: needs .* bytes"),
        (struct.pack("<IIQ", 9, 9, 1), "value type 9"),
        (struct.pack("<I", 13), "value type 13"),
    ],
)
def test_gguf_values(tmp_path, gguf_model, value, message):
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes(*gguf_model, {"x": value}))
    fails(path, message)


@pytest.mark.parametrize("alignment", [0, 1, 3, 4, 48, 2**31])
def test_gguf_alignment(tmp_path, gguf_model, alignment):
    path = tmp_path / "m.gguf"
    value = struct.pack("<II", 4, alignment)
    path.write_bytes(gguf_bytes(*gguf_model, {"general.alignment": value}))
    fails(path, "is not a power of two")


def patched(gguf_model, name, **parts):
    """The file with another shape, type or offset of one tensor."""
    config, tensors = gguf_model
    data = gguf_bytes(config, tensors)
    array = tensors[name]
    at = data.index(text(name)) + 8 + len(name)
    dims = parts.get("dims", array.shape[::-1])
    after = at + 4 + 8 * array.ndim
    kind, offset = struct.unpack_from("<IQ", data, after)
    entry = struct.pack(f"<I{array.ndim}Q", parts.get("count", array.ndim), *dims)
    entry += struct.pack("<IQ", parts.get("kind", kind), parts.get("offset", offset))
    return data[:at] + entry + data[after + 12 :]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"dims": (40, 24)}, "has shape"),
        ({"dims": (2**40, 2**40)}, "cut short or wrong"),
        ({"dims": (2**63, 2**63)}, "cut short or wrong"),
        ({"dims": (0, 24)}, "has shape"),
        ({"count": 5}, "has 5 axes"),
        ({"count": 2**31}, "axes"),
        ({"offset": 2**63}, "cut short or wrong"),
        ({"offset": 0}, "overlaps"),
        ({"kind": 2}, "do not divide into blocks"),
        ({"kind": 4}, "tensor type 4 cannot be decoded"),
        ({"kind": 24}, "tensor type I8 cannot be decoded"),
        ({"kind": 2**32 - 1}, "cannot be decoded"),
    ],
)
def test_gguf_tensor_entries(tmp_path, gguf_model, parts, message):
    pytest.importorskip("gguf")
    path = tmp_path / "m.gguf"
    path.write_bytes(patched(gguf_model, "blk.1.ffn_up.weight", **parts))
    fails(path, message)


def test_gguf_names(tmp_path, gguf_model):
    config, tensors = gguf_model
    path = tmp_path / "m.gguf"
    data = gguf_bytes(config, tensors)
    name = b"blk.1.ffn_up.weight"
    path.write_bytes(data.replace(name, b"\xff" + name[1:]))
    fails(path, "not UTF-8")
    path.write_bytes(data.replace(name, b"blk.2.ffn_up.weight"))
    fails(path, "names a tensor twice")
    path.write_bytes(data.replace(b"gemma.block_count", b"gemma.block_coun_"))
    fails(path, r"gemma\.block_count is missing")
    path.write_bytes(data.replace(b"attention.key_length", b"attention.head_count"))
    fails(path, "twice")


# HDF5


@pytest.fixture
def preset(tmp_path, files):
    """A preset directory of a tiny Gemma 1."""
    config = files.configs["gemma"]
    arrays = files.weights(config)
    return keras_preset.save(tmp_path / "p", config, "float32", arrays.__getitem__)


def test_h5_cut_anywhere(preset):
    path = preset / "model.weights.h5"
    data = path.read_bytes()
    for cut in range(0, len(data), len(data) // 60):
        path.write_bytes(data[:cut])
        fails(preset, r"cut short|is not an HDF5 file", path)


SCALE = "layers/rms_normalization/vars/0"


def replace(path, make):
    with h5py.File(path, "a") as file:
        del file[SCALE]
        make(file)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: None, "rms_normalization/vars/0 is missing"),
        (lambda f: f.create_dataset(SCALE, (25,), "f4"), "has shape"),
        (lambda f: f.create_dataset(SCALE, (), "f4"), "has shape"),
        (lambda f: f.create_dataset(SCALE, data=h5py.Empty("f4")), "has shape"),
        (lambda f: f.create_dataset(SCALE, (24,), "i8"), "is int64; weights must"),
        (lambda f: f.create_dataset(SCALE, (24,), "f8"), "is float64"),
        (lambda f: f.create_dataset(SCALE, (24,), ">f4"), "is big-endian float32"),
        (lambda f: f.create_dataset(SCALE, (24,), "V2"), "weights must be one of"),
        (lambda f: f.create_dataset(SCALE, data=["a"] * 24), "weights must be one of"),
        (lambda f: f.create_dataset(SCALE, (24,), "f4"), "empty"),
        (lambda f: f.create_dataset(SCALE, (24,), "f4", chunks=(8,)), "chunked"),
        (
            lambda f: f.create_dataset(SCALE, (2**40,), "f4", compression="gzip"),
            "has shape",
        ),
        (
            lambda f: f.create_dataset(SCALE, (24,), "f4", compression="gzip"),
            "compressed",
        ),
        (
            lambda f: f.create_dataset(
                SCALE, (24,), "f4", external=[("/etc/passwd", 0, 96)]
            ),
            "kept elsewhere",
        ),
        (
            lambda f: f.create_virtual_dataset(
                SCALE, h5py.VirtualLayout((24,), "f4"), fillvalue=1
            ),
            "kept elsewhere",
        ),
        (
            lambda f: f.__setitem__(SCALE, h5py.ExternalLink("/etc/passwd", "x")),
            "is missing",
        ),
        (
            lambda f: f.__setitem__(SCALE, h5py.SoftLink("/layers")),
            "is missing",
        ),
        (lambda f: f.create_group(SCALE), "is missing"),
    ],
)
def test_h5_datasets(preset, make, message):
    path = preset / "model.weights.h5"
    replace(path, make)
    fails(preset, message, path)


def test_h5_extra_and_ambiguous_datasets(preset):
    path = preset / "model.weights.h5"
    with h5py.File(path, "a") as file:
        file["layers/gemma_decoder_block/ffw_linear/vars/1"] = np.ones(3)
    fails(preset, "no part of the Gemma.*ffw_linear/vars/1", path)
    with h5py.File(path, "a") as file:
        file["copy"] = file["layers"]
    with contextlib.suppress(CheckpointError):
        read_all(preset)
    with h5py.File(path, "w") as file:
        file["x"] = np.ones(3)
    fails(preset, "holds no KerasHub Gemma.*it holds x", path)
    with h5py.File(path, "w"):
        pass
    fails(preset, "it holds nothing", path)


def test_h5_links_in_a_circle(preset):
    path = preset / "model.weights.h5"
    with h5py.File(path, "a") as file:
        file["layers/again"] = file["/"]
        file["layers/soft"] = h5py.SoftLink("/layers")
    read_all(preset)


def test_preset_metadata_that_is_garbage(preset, files):
    good = (preset / "metadata.json").read_text()
    for value in (3, {}, {"config": 3}, None):
        raw = json.loads(good) | {"gemma_keras": value}
        (preset / "metadata.json").write_text(json.dumps(raw))
        read_all(preset)
    raw = json.loads(good)
    raw["gemma_keras"]["config"]["num_layers"] = 10**12
    (preset / "metadata.json").write_text(json.dumps(raw))
    fails(preset, "layers are more", preset / "metadata.json")
    raw["gemma_keras"]["config"] = {"surprise": 1}
    (preset / "metadata.json").write_text(json.dumps(raw))
    fails(preset, "surprise", preset / "metadata.json")
    (preset / "metadata.json").write_text("{")
    fails(preset, "not valid JSON", preset / "metadata.json")


# Random damage. Whatever a file says, the answer is a model or a CheckpointError.


def damage(data, header, edits):
    data = bytearray(data)
    for position, value in edits:
        data[position % min(header, len(data))] = value
    return bytes(data)


EDITS = st.lists(
    st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=6
)


@FUZZ
@given(EDITS)
@example([(0, 0)])
def test_safetensors_with_flipped_bytes(tmp_path, files, edits):
    config = files.configs["gemma"]
    files.write_hugging_face(tmp_path, config, files.weights(config))
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    path.write_bytes(damage(data, header, edits))
    survives(tmp_path)


@FUZZ
@given(EDITS)
def test_gguf_with_flipped_bytes(tmp_path, gguf_model, edits):
    path = tmp_path / "m.gguf"
    data = gguf_bytes(*gguf_model)
    path.write_bytes(damage(data, 2600, edits))
    survives(path)


@FUZZ
@given(st.integers(0, 2**32), st.integers(1, 20))
def test_h5_with_flipped_bytes(preset, seed, count):
    generator = np.random.default_rng(seed)
    path, kept = preset / "model.weights.h5", preset / "kept"
    if not kept.exists():
        path.rename(kept)
    data = np.frombuffer(kept.read_bytes(), np.uint8).copy()
    data[generator.integers(0, data.size, count)] = generator.integers(0, 256, count)
    path.write_bytes(data.tobytes())
    survives(preset)


@FUZZ
@given(st.binary(max_size=400))
def test_random_bytes(tmp_path, data):
    for name, opened in (("a.gguf", GGUFFile), ("a.safetensors", SafetensorsFile)):
        path = tmp_path / name
        magic = b"GGUF\x03\0\0\0" if name == "a.gguf" else b""
        path.write_bytes(magic + data)
        with little_memory(), contextlib.suppress(CheckpointError):
            opened(path).close()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=8,
)


@FUZZ
@given(st.data())
def test_hugging_face_config_of_any_types(tmp_path, files, data):
    family = data.draw(st.sampled_from(["gemma", "gemma2", "gemma3"]))
    config = files.configs[family]
    raw = files.hugging_face_config(config)
    keys = [*raw, "rope_parameters", "layer_types", "hidden_act", "rope_scaling"]
    for key in data.draw(st.lists(st.sampled_from(keys), min_size=1, max_size=3)):
        raw[key] = data.draw(JSON)
    if not (tmp_path / family).exists():
        files.write_hugging_face(tmp_path / family, config, files.weights(config))
    (tmp_path / family / "config.json").write_text(json.dumps(raw))
    survives(tmp_path / family)


@FUZZ
@given(st.data())
def test_keras_config_of_any_types(tmp_path, files, data):
    family = data.draw(st.sampled_from(["gemma", "gemma2", "gemma3"]))
    config = files.configs[family]
    folder = tmp_path / family
    if not folder.exists():
        arrays = files.weights(config)
        keras_preset.save(folder, config, "float32", arrays.__getitem__)
        (folder / "metadata.json").unlink()
        (folder / "config.json").rename(folder / "kept.json")
    raw = json.loads((folder / "kept.json").read_text())
    keys = list(raw["config"])
    for key in data.draw(st.lists(st.sampled_from(keys), min_size=1, max_size=3)):
        raw["config"][key] = data.draw(JSON)
    (folder / "config.json").write_text(json.dumps(raw))
    survives(folder)


@FUZZ
@given(st.data())
def test_gguf_fields_of_any_type(tmp_path, gguf_model, data):
    config, tensors = gguf_model
    kinds = {4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
    values = {}
    for key in data.draw(
        st.lists(
            st.sampled_from(
                [
                    "general.architecture",
                    "general.type",
                    "split.count",
                    "gemma.block_count",
                    "gemma.embedding_length",
                    "gemma.attention.head_count",
                    "gemma.attention.key_length",
                    "gemma.rope.freq_base",
                    "gemma.rope.scaling.type",
                    "gemma.rope.scaling.factor",
                    "tokenizer.ggml.tokens",
                    "tokenizer.ggml.token_type",
                ]
            ),
            min_size=1,
            max_size=3,
        )
    ):
        kind = data.draw(st.sampled_from([*kinds, 8, 9]))
        if kind == 8:
            values[key] = struct.pack("<I", 8) + text(data.draw(st.binary(max_size=9)))
        elif kind == 9:
            inner = data.draw(st.sampled_from([4, 6, 8]))
            count = data.draw(st.integers(0, 3))
            items = [text("a") if inner == 8 else bytes(4)] * count
            values[key] = struct.pack("<IIQ", 9, inner, count) + b"".join(items)
        else:
            size = struct.calcsize("<" + kinds[kind])
            raw = data.draw(st.binary(min_size=size, max_size=size))
            values[key] = struct.pack("<I", kind) + raw
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes(config, tensors, values))
    survives(path)
