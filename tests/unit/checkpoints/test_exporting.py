"""Writing checkpoints: what comes back, what is told, what fails without a trace."""

import hashlib
import json
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from gemma_keras.checkpoints import (
    WRITERS,
    CheckpointError,
    exporting,
    open_checkpoint,
    staging,
)
from gemma_keras.checkpoints.contents import Contents, all_finite, shards
from gemma_keras.checkpoints.provenance import NOTICE_TEXT, Provenance
from gemma_keras.checkpoints.staging import replacing
from gemma_keras.config import GemmaConfig

pytestmark = [
    pytest.mark.any_backend,
    # The tiny models are none that KerasHub could hold exactly.
    pytest.mark.filterwarnings("ignore:KerasHub:UserWarning"),
]

# What MaxText makes of other models and types is in test_orbax.py.
FORMATS = [name for name in WRITERS if name != "maxtext"]
# In GGUF norms are stored plus one: most float32 weights lose their last bits there.
SHARDED = ["hf", "keras"]


def contents_of(config, arrays, **fields):
    dtype = next(iter(arrays.values())).dtype.name
    return Contents(config=config, tensors=arrays.__getitem__, dtype=dtype, **fields)


def assert_written(checkpoint, arrays, files, format):
    if format == "maxtext":
        # Factors are folded in that are no powers of two, and one is added to norms.
        for path, expected in arrays.items():
            found = checkpoint.tensor(path)
            np.testing.assert_allclose(found, expected, rtol=1.2e-7, atol=6e-8)
        return
    same = files.assert_same_but_for_norms if format == "gguf" else None
    (same or files.assert_same_weights)(checkpoint, arrays)


def everything_in(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_written_is_read(tmp_path, files, config, dtype, format):
    arrays = files.weights(config, dtype)
    path = exporting.export(contents_of(config, arrays), tmp_path / "a" / "b", format)
    assert path == tmp_path / "a" / "b"
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.config == config
        assert checkpoint.dtype == dtype
        assert_written(checkpoint, arrays, files, format)
        assert checkpoint.tokenizer() is None


@pytest.mark.parametrize("format", FORMATS)
def test_any_source_goes_through_a_format_and_back(tmp_path, files, config, format):
    """As `gemma-keras convert` does it: from file to file, twice."""
    arrays = files.weights(config, "bfloat16")
    for path in arrays:
        # What GGUF's 1 + w in float32 keeps every bit of.
        arrays[path][abs(arrays[path]) < 2**-15] = 0
    files.write_hugging_face(tmp_path / "hf", config, arrays)
    for source, target, to in (("hf", "there", format), ("there", "back", "hf")):
        with open_checkpoint(tmp_path / source) as checkpoint:
            contents = exporting.checkpoint_contents(checkpoint, tmp_path / source)
            exporting.export(contents, tmp_path / target, to)
    with open_checkpoint(tmp_path / "back") as checkpoint:
        files.assert_same_weights(checkpoint, arrays)


@pytest.mark.parametrize("format", SHARDED)
def test_shards_hold_no_more_than_was_asked(tmp_path, files, format):
    config = files.configs["gemma2"]
    arrays = files.weights(config)
    contents = contents_of(config, arrays)
    exporting.export(contents, tmp_path / "many", format, max_shard_size=9000)
    exporting.export(contents, tmp_path / "one", format, max_shard_size=None)
    found = [p for p in (tmp_path / "many").iterdir() if ".index" not in p.name]
    weights = [p for p in found if p.suffix in (".safetensors", ".h5")]
    assert len(weights) > 3
    assert len({p.suffix for p in (tmp_path / "one").iterdir()} & {".h5"}) <= 1
    for name in ("many", "one"):
        with open_checkpoint(tmp_path / name) as checkpoint:
            files.assert_same_weights(checkpoint, arrays)


def test_runs_of_names():
    sizes = {"a": 3, "b": 3, "c": 9, "d": 1, "e": 4}
    assert shards(sizes, 6) == [["a", "b"], ["c"], ["d", "e"]]
    assert shards(sizes, None) == [["a", "b", "c", "d", "e"]]


@pytest.mark.parametrize("format", FORMATS)
def test_casting_is_what_numpy_does_and_is_told(tmp_path, files, format):
    config = files.configs["gemma"]
    arrays = files.weights(config, "float32")
    exporting.export(
        contents_of(config, arrays), tmp_path / "m", format, dtype="bfloat16"
    )
    expected = files.weights(config, "bfloat16")
    if format == "gguf":
        expected |= {path: arrays[path] for path in arrays if path.endswith("scale")}
    with open_checkpoint(tmp_path / "m") as checkpoint:
        assert_written(checkpoint, expected, files, format)
    facts = json.loads((tmp_path / "m" / "provenance.json").read_text())
    assert "They were cast from float32 to bfloat16." in facts["modified"]
    assert facts["written"]["dtype"] == "bfloat16"


@pytest.mark.parametrize("format", FORMATS)
def test_memory_is_that_of_one_tensor(tmp_path, files, format):
    sizes = files.sizes | {"vocab_size": 4000, "hidden_dim": 100, "ffn_dim": 4000}
    config = GemmaConfig(**sizes)
    files.write_hugging_face(tmp_path / "hf", config, files.weights(config))
    with open_checkpoint(tmp_path / "hf") as checkpoint:
        contents = exporting.checkpoint_contents(checkpoint, "hf")
        # What is imported when it is first needed is no part of it.
        exporting.export(contents, tmp_path / "first", format)
        tracemalloc.start()
        exporting.export(contents, tmp_path / "m", format)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    largest = 4 * 4000 * 100
    # The copy that turns a kernel round, and the mask of a piece of it.
    assert peak < 3 * largest < 4 * config.num_parameters / 3


# The papers


def test_provenance_tells_the_source_and_no_path(tmp_path, files):
    config = files.configs["gemma"]
    source = tmp_path / "secret folder" / "my model"
    source.parent.mkdir()
    files.write_hugging_face(source, config, files.weights(config))
    with open_checkpoint(source) as checkpoint:
        contents = exporting.checkpoint_contents(checkpoint, source)
        exporting.export(contents, tmp_path / "one", "keras")
    facts = json.loads((tmp_path / "one" / "provenance.json").read_text())
    data = (source / "model.safetensors").read_bytes()
    assert facts["source"] == {
        "name": "my_model",
        "format": "Hugging Face",
        "files": [
            {
                "name": "model.safetensors",
                "bytes": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
            }
        ],
    }
    assert facts["licence"] == "gemma"
    assert facts["modified"] == [
        "The weights were converted from Hugging Face to KerasHub preset."
    ]
    assert set(facts["files"]) == set(everything_in(tmp_path / "one"))
    with open_checkpoint(tmp_path / "one") as checkpoint:
        contents = exporting.checkpoint_contents(checkpoint, tmp_path / "one")
        exporting.export(contents, tmp_path / "two", "hf")
    again = json.loads((tmp_path / "two" / "provenance.json").read_text())
    del facts["files"]
    assert again["earlier"] == [facts]
    for name in ("one", "two"):
        for file, content in everything_in(tmp_path / name).items():
            assert b"secret" not in content, file


def test_a_source_that_changed_meanwhile_gets_no_hash(tmp_path, files):
    config = files.configs["gemma"]
    files.write_hugging_face(tmp_path / "hf", config, files.weights(config))
    with open_checkpoint(tmp_path / "hf") as checkpoint:
        contents = exporting.checkpoint_contents(checkpoint, "hf")
        with (tmp_path / "hf" / "model.safetensors").open("ab") as file:
            file.write(b"!")
        exporting.export(contents, tmp_path / "m", "hf")
    facts = json.loads((tmp_path / "m" / "provenance.json").read_text())
    assert "sha256" not in facts["source"]["files"][0]


@pytest.mark.parametrize("format", WRITERS)
def test_the_notice_goes_along_with_what_is_under_gemmas_terms(tmp_path, files, format):
    config = files.configs["gemma"]
    contents = contents_of(config, files.weights(config))
    exporting.export(contents, tmp_path / "gemma", format)
    exporting.export(contents, tmp_path / "own", format, licence="apache-2.0")
    assert (tmp_path / "gemma" / "Notice").read_text() == NOTICE_TEXT
    card = (tmp_path / "gemma" / "README.md").read_text()
    assert card.startswith("---\nlicense: gemma\n")
    assert NOTICE_TEXT.strip() in card
    assert not (tmp_path / "own" / "Notice").exists()
    assert "license: apache-2.0\n" in (tmp_path / "own" / "README.md").read_text()
    # And the licence is remembered.
    with open_checkpoint(tmp_path / "own") as checkpoint:
        assert Provenance.of(checkpoint, tmp_path / "own").licence == "apache-2.0"


def test_embedded_presets_keep_their_licence():
    from gemma_keras import registry

    with open_checkpoint(registry.resolve("gemma_tiny_en")) as checkpoint:
        found = Provenance.of(checkpoint, "gemma_tiny_en")
        assert Provenance.of(checkpoint, checkpoint.path).licence == "apache-2.0"
    assert (found.licence, found.source) == ("apache-2.0", "gemma_tiny_en")


@pytest.mark.parametrize(
    "text",
    [
        *("[]", "{", '{"tool": 1}', '{"tool": "other 1", "licence": "mit"}'),
        '{"tool": "gemma_keras 1", "licence": ["mit"], "earlier": {"a": 1}}',
        '{"tool": "gemma_keras 1", "licence": "a: b"}',
    ],
)
def test_a_provenance_of_others_is_not_believed(tmp_path, files, text):
    config = files.configs["gemma"]
    files.write_hugging_face(tmp_path / "hf", config, files.weights(config))
    (tmp_path / "hf" / "provenance.json").write_text(text)
    with open_checkpoint(tmp_path / "hf") as checkpoint:
        found = Provenance.of(checkpoint, tmp_path / "hf")
    assert found.licence == "gemma"
    assert len(found.earlier) <= 1


def carry(source, destination, format, **options):
    """As `gemma-keras convert` does it; gives what the source told of itself."""
    with open_checkpoint(source) as checkpoint:
        contents = exporting.checkpoint_contents(checkpoint, source)
        exporting.export(contents, destination, format, **options)
    return contents.provenance


# A directory of each format, and a file of those that can be one.
PLACES = [(name, "m") for name in WRITERS]
PLACES += [("gguf", "m.gguf"), ("torch", "m.ckpt"), ("nemo", "m.nemo")]


@pytest.mark.parametrize(("format", "name"), PLACES)
@pytest.mark.parametrize("licence", ["gemma", "apache-2.0"])
def test_what_an_export_tells_is_read_again(tmp_path, files, format, name, licence):
    config = files.configs["gemma"]
    contents = contents_of(config, files.weights(config))
    path = exporting.export(contents, tmp_path / name, format, licence=licence)
    (inside,) = {"flax": ["checkpoint"], "maxtext": ["0/items"]}.get(format, ["."])
    if path.is_file():
        # The notice is in the file.
        assert [p.name for p in tmp_path.iterdir()] == [name]
        notice = NOTICE_TEXT.strip().encode() in path.read_bytes()
        assert notice == (licence == "gemma")
    found = carry(path / inside, tmp_path / "two", "hf")
    assert found.licence == licence
    (step,) = found.earlier
    assert step["licence"] == licence
    assert step["modified"][0].startswith("The weights were written as ")
    assert (tmp_path / "two" / "Notice").exists() == (licence == "gemma")
    facts = json.loads((tmp_path / "two" / "provenance.json").read_text())
    assert facts["earlier"] == [step]


@pytest.mark.parametrize(("format", "name"), PLACES)
def test_a_long_history_goes_along(tmp_path, files, format, name):
    config = files.configs["gemma"]
    source = files.write_hugging_face(tmp_path / "hf", config, files.weights(config))
    steps = [
        {"tool": "gemma_keras 0.1", "modified": [f"Step {number}.", "x" * 300]}
        for number in range(500)
    ]
    last = {"tool": "gemma_keras 0.1", "licence": "mit", "files": ["y" * 90] * 10_000}
    told = json.dumps(last | {"earlier": steps})
    assert len(told) > 1_000_000
    (source / "provenance.json").write_text(told)
    found = carry(source, tmp_path / name, format)
    kept = found.earlier[1:]
    assert found.licence == "mit"
    assert found.earlier[0] == {"tool": "gemma_keras 0.1", "licence": "mit"}
    assert list(kept) == steps
    # And on, until it is too long.
    found = carry(tmp_path / name, tmp_path / "two", "hf")
    assert (found.licence, found.earlier[2:]) == ("mit", kept)
    steps += [{"modified": ["z" * 200_000]}]
    (source / "provenance.json").write_text(json.dumps(last | {"earlier": steps}))
    carry(source, tmp_path / name, format, overwrite=True)
    found = carry(tmp_path / name, tmp_path / "two", "hf", overwrite=True)
    assert found.licence == "mit"
    assert list(found.earlier[2:-1]) == steps[:-1]
    assert found.earlier[-1]["modified"][0].startswith("What was done before that is")


def test_a_history_of_absurd_depth_is_left_out(tmp_path, files):
    config = files.configs["gemma"]
    source = files.write_hugging_face(tmp_path / "hf", config, files.weights(config))
    deep = "[" * 800 + "]" * 800
    (source / "provenance.json").write_text(
        '{"tool": "gemma_keras 1", "licence": "mit", "earlier": [{"modified": '
        f'{deep}}}, {{"modified": ["Something."]}}]}}'
    )
    found = carry(source, tmp_path / "m", "hf")
    assert found.licence == "mit"
    assert [step.get("modified") for step in found.earlier] == [None, ["Something."]]


def test_a_provenance_of_absurd_size_is_not_read(tmp_path, files):
    config = files.configs["gemma"]
    files.write_hugging_face(tmp_path / "hf", config, files.weights(config))
    told = {"tool": "gemma_keras 1", "licence": "mit", "x": "x" * 2**24}
    (tmp_path / "hf" / "provenance.json").write_text(json.dumps(told))
    with open_checkpoint(tmp_path / "hf") as checkpoint:
        found = Provenance.of(checkpoint, tmp_path / "hf")
    assert (found.licence, found.earlier) == ("gemma", ())


def test_many_source_files_are_told_by_one_digest(tmp_path, files):
    config = files.configs["gemma3"]
    contents = contents_of(config, files.weights(config))
    source = exporting.export(contents, tmp_path / "hf", "hf", max_shard_size=1)
    carry(source, tmp_path / "m", "hf")
    # What `sha256sum *.safetensors` prints, hashed again.
    shards = sorted(source.glob("*.safetensors"))
    lines = [
        f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n"
        for file in shards
    ]
    facts = json.loads((tmp_path / "m" / "provenance.json").read_text())
    digest = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert len(shards) > 64
    assert facts["source"]["files"] == [
        {
            "name": "hf",
            "count": len(shards),
            "bytes": sum(file.stat().st_size for file in shards),
            "sha256": digest,
        }
    ]
    card = (tmp_path / "m" / "README.md").read_text()
    assert f"- `hf` ({len(shards)} files, of what `sha256sum` prints): {digest}" in card


# Refusals


def refuses(contents, destination, match, format="hf", **options):
    before = sorted(destination.parent.rglob("*"))
    with pytest.raises(CheckpointError, match=match):
        exporting.export(contents, destination, format, **options)
    assert sorted(destination.parent.rglob("*")) == before


@pytest.mark.parametrize("format", WRITERS)
def test_only_an_export_is_overwritten_and_only_if_asked(tmp_path, files, format):
    config = files.configs["gemma"]
    contents = contents_of(config, files.weights(config))
    changed = files.weights(config, seed=1)
    there = tmp_path / "m"
    exporting.export(contents, there, format)
    before = everything_in(there)
    refuses(contents, there, "exists already; pass --force", format)
    assert everything_in(there) == before
    exporting.export(contents_of(config, changed), there, "keras", overwrite=True)
    with open_checkpoint(there) as checkpoint:
        files.assert_same_weights(checkpoint, changed)
    (there / "assets").mkdir()
    (there / "assets" / "notes.txt").write_text("mine")
    match = r"files that no export wrote \(assets/notes.txt\)"
    refuses(contents, there, match, format, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("format", WRITERS)
def test_what_is_no_export_is_left_alone(tmp_path, files, format):
    config = files.configs["gemma"]
    contents = contents_of(config, files.weights(config))
    (tmp_path / "file").write_text("mine")
    refuses(contents, tmp_path / "file", "is a file", format, overwrite=True)
    (tmp_path / "folder").mkdir()
    exporting.export(contents, tmp_path / "folder", format)
    # One that says of itself what it does not hold.
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "provenance.json").write_text("[]")
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    refuses(contents, tmp_path / "other", "thesis.tex", format, overwrite=True)


@pytest.mark.parametrize("format", WRITERS)
def test_a_failure_half_way_leaves_what_was_there(tmp_path, files, format):
    config = files.configs["gemma"]
    arrays = files.weights(config)
    exporting.export(contents_of(config, arrays), tmp_path / "m", format)
    before = everything_in(tmp_path)

    def tensors(path):
        if path == "decoder_block_2/ffw_linear/kernel":
            raise CheckpointError("the disk is gone")
        return arrays[path]

    contents = Contents(config=config, tensors=tensors, dtype="float32")
    for name in ("m", "new"):
        with pytest.raises(CheckpointError, match="the disk is gone"):
            exporting.export(contents, tmp_path / name, format, overwrite=True)
    assert everything_in(tmp_path) == before


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_that_are_no_numbers_are_refused(tmp_path, files, bad, dtype):
    config = files.configs["gemma"]
    arrays = files.weights(config, dtype)
    assert all(map(all_finite, arrays.values()))
    arrays["decoder_block_1/attention/key/kernel"][3, 4] = bad
    match = "decoder_block_1/attention/key/kernel: holds NaN or infinite"
    refuses(contents_of(config, arrays), tmp_path / "m", match)


def test_weights_that_a_dtype_cannot_hold_are_refused(tmp_path, files):
    config = files.configs["gemma"]
    arrays = files.weights(config)
    arrays["final_normalization/scale"][0] = 1e6
    match = "infinite numbers once float32 is cast to float16"
    refuses(contents_of(config, arrays), tmp_path / "m", match, dtype="float16")


def test_weights_of_a_wrong_shape_or_kind_are_refused(tmp_path, files):
    config = files.configs["gemma"]
    arrays = files.weights(config)
    arrays["decoder_block_0/ffw_linear/kernel"] = np.ones((3, 4), np.float32)
    refuses(contents_of(config, arrays), tmp_path / "m", r"has shape \[3, 4\]")
    arrays["decoder_block_0/ffw_linear/kernel"] = np.ones((40, 24), np.int8)
    refuses(contents_of(config, arrays), tmp_path / "m", "holds int8 numbers")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"format": "pickle"}, "must be one of hf, keras, gguf"),
        ({"dtype": "int3"}, "stores weights as float32.*got 'int3'"),
        ({"max_shard_size": 0}, "max_shard_size must be a positive number"),
        ({"licence": "a\nb: c"}, "licence must be an identifier"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, files, options, match):
    config = files.configs["gemma"]
    refuses(
        contents_of(config, files.weights(config)), tmp_path / "m", match, **options
    )


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path, files, small):
    config = files.configs["gemma"]
    contents = contents_of(config, files.weights(config), tokenizer=small)
    refuses(contents, tmp_path / "m", "has 500 pieces, but the model knows only 70")


@pytest.mark.parametrize(
    ("family", "changes", "match"),
    [
        ("gemma", {"final_logit_soft_cap": 3.0}, "gemma cannot have final_logit_"),
        ("gemma", {"query_pre_attn_scalar": 7}, "query_pre_attn_scalar=7"),
        ("gemma", {"layer_pattern": "LG", "sliding_window": 4}, "layer_pattern='LGL'"),
        ("gemma2", {"rope_scaling_factor": 2.0}, "rope scaling is unsupported"),
        ("gemma3", {"use_post_norms": False}, "use_post_norms=False"),
    ],
)
def test_models_that_hugging_face_does_not_have_are_refused(
    tmp_path, files, family, changes, match
):
    import dataclasses

    config = dataclasses.replace(files.configs[family], **changes)
    contents = contents_of(config, files.weights(config))
    refuses(contents, tmp_path / "m", match)


def test_a_full_disk_is_told_before_work_starts(tmp_path, files, monkeypatch):
    config = files.configs["gemma"]
    contents = contents_of(config, files.weights(config))
    usage = staging.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: usage)
    refuses(contents, tmp_path / "m", "needs 0.1 MB, but the disk has 0.0 MB left")


def test_an_error_of_the_disk_is_a_checkpoint_error(tmp_path):
    match = r"cannot be written \(.*No space"
    with (
        pytest.raises(CheckpointError, match=match),
        replacing(tmp_path / "m") as partial,
    ):
        partial.write_text("half")
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())


# A limit on the size of files stands for a disk that fills up in the middle: what
# libraries make of it, not what a patched function does.
FILLING = """
import pathlib, resource, signal, sys
import numpy as np
from gemma_keras.checkpoints import CheckpointError, exporting
from gemma_keras.checkpoints.contents import Contents
from gemma_keras.config import GemmaConfig

config = GemmaConfig(
    vocab_size=900, num_layers=2, hidden_dim=96, ffn_dim=160, num_query_heads=4,
    num_kv_heads=2, head_dim=32, query_pre_attn_scalar=32,
)
contents = Contents(
    config=config, dtype="float32",
    tensors=lambda path: np.ones(config.weight_shapes()[path], "float32"),
)
folder = pathlib.Path(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for format in sys.argv[2:]:
    exporting.export(contents, folder / format, format)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    # The embedding alone is 345,600 bytes; all weights, in some files or one, a MB.
    for limit in (100, 300_000, 700_000)[: 2 if format in ("flax", "maxtext") else 3]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        for place, options in ((format, {"overwrite": True}), ("new", {})):
            try:
                exporting.export(contents, folder / place, format, **options)
            except CheckpointError as error:
                assert "cannot be written (" in str(error), error
            else:
                raise AssertionError(f"{format} fits into {limit} bytes")
        unlimited = resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (unlimited, unlimited))
        after = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        assert after == before
        assert not [p for p in folder.iterdir() if "partial" in p.name]
print("done")
"""


def test_a_disk_that_refuses_in_the_middle(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", FILLING, str(tmp_path), *WRITERS]
    # As the command line: without Keras.
    command[4] = f"import sys; sys.argv[0] = 'gemma-keras'\n{FILLING}"
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "done\n", done.stderr


KILLED = """
import sys
sys.argv[0] = "gemma-keras"
from gemma_keras.checkpoints import exporting, open_checkpoint
source, destination, format = sys.argv[1:]
with open_checkpoint(source) as checkpoint:
    def progress(done, total):
        if done > total / 2:
            print("half", flush=True)
            sys.stdin.read()
    contents = exporting.checkpoint_contents(checkpoint, source, progress)
    exporting.export(contents, destination, format, overwrite=True)
"""


@pytest.mark.parametrize("format", WRITERS)
def test_what_is_killed_half_way_leaves_nothing_that_looks_whole(
    tmp_path, files, format
):
    config = files.configs["gemma"]
    arrays = files.weights(config)
    source = files.write_hugging_face(tmp_path / "source", config, arrays)
    destination = tmp_path / "m"
    command = [sys.executable, "-W", "ignore", "-c", KILLED, source, destination]
    for earlier in (False, True):
        if earlier:
            exporting.export(contents_of(config, arrays), destination, format)
        before = everything_in(destination)
        child = subprocess.Popen(
            [*map(str, command), format],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert child.stdout.readline() == b"half\n"
        child.kill()
        child.communicate()
        assert everything_in(destination) == before
        assert destination.exists() == earlier
    # What is left is hidden, bears its name, and is in nobody's way.
    left = [path.name for path in tmp_path.iterdir() if path.name[0] == "."]
    assert len(left) == 2
    assert all(name.startswith(".m.") and name.endswith(".partial") for name in left)
    again = exporting.export(
        contents_of(config, arrays), destination, format, overwrite=True
    )
    with open_checkpoint(again) as checkpoint:
        assert_written(checkpoint, arrays, files, format)
