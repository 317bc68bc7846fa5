"""`gemma-keras convert`, called as a person calls it."""

import json
import subprocess
import sys

import keras
import numpy as np
import pytest
import typer.testing

import gemma_keras
from gemma_keras import checkpoints, cli, registry
from gemma_keras.cli_convert import read_size

pytestmark = pytest.mark.any_backend

PRESET = "gemma_tiny_instruct_en"


def convert(*arguments):
    """Calls the command inside this process."""
    return typer.testing.CliRunner().invoke(
        cli.app, ["convert", *map(str, arguments)], prog_name="gemma-keras"
    )


@pytest.mark.parametrize("to", list(checkpoints.WRITERS))
def test_a_preset_goes_to_a_format_and_answers_as_before(tmp_path, to):
    result = convert(PRESET, tmp_path / "m", "--to", to)
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path / 'm'}\n")
    assert "Wrote" in result.stderr
    question = [{"role": "user", "content": "What color is the sky?"}]
    answers = {
        gemma_keras.GemmaCausalLM.from_preset(source).generate(
            question, max_new_tokens=12
        )
        for source in (PRESET, tmp_path / "m")
    }
    assert len(answers) == 1
    facts = json.loads((tmp_path / "m" / "provenance.json").read_text())
    assert facts["source"]["name"] == PRESET
    assert facts["licence"] == "apache-2.0"


@pytest.mark.parametrize("layout", ["scanned", "unscanned"])
def test_what_trains_in_maxtext_is_printed_and_in_the_card(tmp_path, layout):
    options = ("--to", "maxtext", "--layout", layout)
    told = convert(PRESET, tmp_path / "m", *options).stderr
    card = (tmp_path / "m" / "README.md").read_text()
    for text, path in ((told, str(tmp_path / "m")), (card, "PATH")):
        assert "python3 -m maxtext.trainers.pre_train.train " in text
        assert "python3 -m maxtext.trainers.post_train.sft.train_sft " in text
        assert text.count(f"load_parameters_path={path}/0/items") == 2
        assert text.count("scan_layers=false") == 2 * (layout == "unscanned")


@pytest.mark.parametrize("form", ["gguf", "ckpt", "nemo", "int8"])
def test_a_file_answers_too(tmp_path, form):
    suffix = "ckpt" if form == "int8" else form
    to = {"ckpt": "torch", "int8": "torch"}.get(form, form)
    options = ["--dtype", "int8"] if form == "int8" else []
    result = convert(PRESET, tmp_path / f"m.{suffix}", "--to", to, *options)
    assert result.exit_code == 0, result.stderr
    assert [path.name for path in tmp_path.iterdir()] == [f"m.{suffix}"]
    # The content tells the format, and not the name.
    path = (tmp_path / f"m.{suffix}").rename(tmp_path / "nameless")
    question = [{"role": "user", "content": "What color is the sky?"}]
    lm = gemma_keras.GemmaCausalLM.from_preset(path)
    assert "blue" in lm.generate(question, max_new_tokens=12)
    told = [line for line in result.stderr.splitlines() if "rounded to int8" in line]
    assert len(told) == (form == "int8")
    info = typer.testing.CliRunner().invoke(cli.app, ["info", str(path), "--json"])
    expected = {"torch": "gemma_pytorch", "nemo": "NVIDIA NeMo", "gguf": "GGUF"}[to]
    assert json.loads(info.stdout)["format"] == expected


def test_dtype_shards_licence_and_force(tmp_path):
    options = ("--to", "hf", "--dtype", "float32", "--max-shard-size", "4MB")
    assert convert(PRESET, tmp_path / "m", *options).exit_code == 0
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 2
    result = convert(PRESET, tmp_path / "m", *options)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith(
        f"gemma-keras: {tmp_path / 'm'}: exists already; pass --force"
    )
    options = ("--to", "keras", "--licence", "gemma", "--force")
    assert convert(tmp_path / "m", tmp_path / "m", *options).exit_code == 0
    names = {path.name for path in (tmp_path / "m").iterdir()}
    assert {"Notice", "model.weights.h5"} <= names
    assert not [name for name in names if name.endswith(".safetensors")]
    with checkpoints.open_checkpoint(tmp_path / "m") as checkpoint:
        assert checkpoint.dtype == "float32"


def test_an_adapter_is_merged_on_the_way(tmp_path):
    lm = gemma_keras.GemmaCausalLM.from_preset(PRESET)
    lm.enable_lora(2, alpha=3)
    random = np.random.default_rng(0)
    for variable in lm.trainable_variables:
        variable.assign(0.3 * random.normal(size=variable.shape))
    lm.save_adapter(tmp_path / "adapter")
    options = ("--to", "hf", "--adapter", tmp_path / "adapter")
    result = convert(PRESET, tmp_path / "m", *options)
    assert result.exit_code == 0, result.stderr
    facts = json.loads((tmp_path / "m" / "provenance.json").read_text())
    assert "(LoRA, rank 2, alpha 3) of query, value were merged" in facts["modified"][0]
    lm.merge_adapter(discard=True)
    expected = {v.path: v.numpy().astype("float32") for v in lm.backbone.variables}
    with checkpoints.open_checkpoint(tmp_path / "m") as checkpoint:
        for path, array in expected.items():
            found = checkpoint.tensor(path).astype("float32")
            # One unit in the last place of bfloat16, where roundings differ.
            np.testing.assert_allclose(found, array, rtol=2**-7, atol=1e-6)
    result = convert(tmp_path / "adapter", tmp_path / "n", "--to", "hf")
    assert result.exit_code == 1
    assert "is a PEFT adapter, not a model" in result.stderr
    result = convert("gemma_tiny_en", tmp_path / "n", "--to", "hf", "--adapter", "m")
    assert result.exit_code == 1 and "is missing, so this is no PEFT" in result.stderr
    assert not (tmp_path / "n").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        (PRESET,),
        (PRESET, "m"),
        (PRESET, "m", "--to", "pickle"),
        (PRESET, "m", "--to", "hf", "--max-shard-size", "many"),
        (PRESET, "m", "--to", "hf", "--max-shard-size", "0GB"),
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_exits_with_2(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    assert convert(*arguments).exit_code == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere", "m", "--to", "hf"), "neither a file or directory nor a model"),
        ((PRESET, "m", "--to", "hf", "--dtype", "int3"), "stores weights as float32"),
        ((PRESET, "m", "--to", "hf", "--licence", "My Own"), "must be an identifier"),
    ],
)
def test_what_cannot_be_done_is_one_message(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = convert(*arguments)
    assert result.exit_code == 1
    assert message in result.stderr and "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_no_backend_is_started(tmp_path):
    code = (
        "import sys; sys.argv[:] = ['gemma-keras', 'convert', *sys.argv[1:]]\n"
        "from gemma_keras import cli\n"
        "try: cli.main()\n"
        "finally: print(sorted({'jax', 'torch', 'tensorflow'} & set(sys.modules)))\n"
    )
    command = [sys.executable, "-c", code, PRESET, str(tmp_path / "m"), "--to", "hf"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.stdout.endswith("[]\n"), result.stderr


def test_sizes_are_read_as_people_write_them():
    assert read_size("5GB") == 5e9
    assert read_size("500 mb") == read_size("0.5g") == 5e8
    assert read_size("1234") == read_size("1234B") == 1234


def test_few_bits_go_to_a_preset_and_back_to_floats(tmp_path):
    options = ("--to", "keras", "--quantize", "int4")
    result = convert(PRESET, tmp_path / "q", *options)
    assert result.exit_code == 0, result.stderr
    sizes = [
        sum(file.stat().st_size for file in folder.glob("model.*"))
        for folder in (registry.resolve(PRESET), tmp_path / "q")
    ]
    # bfloat16 to 4.25 bits, and the norms.
    assert sizes[1] < 0.3 * sizes[0]
    facts = json.loads((tmp_path / "q" / "provenance.json").read_text())
    assert "They were rounded to 4 bits." in facts["modified"]
    assert convert(tmp_path / "q", tmp_path / "hf", "--to", "hf").exit_code == 0
    question = [{"role": "user", "content": "What is the capital of France?"}]
    answers = {
        gemma_keras.GemmaCausalLM.from_preset(tmp_path / name, dtype="float32")
        .generate(question, max_new_tokens=12)
        .strip()
        for name in ("q", "hf")
    }
    assert len(answers) == 1
    assert convert(tmp_path / "q", tmp_path / "again", "--to", "keras").exit_code == 0
    name = "model.quantized.safetensors"
    again = (tmp_path / "again" / name).read_bytes()
    assert again == (tmp_path / "q" / name).read_bytes()


def test_few_bits_may_be_calibrated(tmp_path):
    lessons = tmp_path / "lessons.txt"
    lessons.write_text("The sky is blue, and the sea is deep, they say. " * 100)
    few = ("--to", "keras", "--quantize", "int4", "--calibration")
    result = convert(PRESET, tmp_path / "q", *few, lessons)
    assert result.exit_code == 0, result.stderr
    assert "Calibrated 4 of 4 blocks" in result.stderr
    facts = json.loads((tmp_path / "q" / "provenance.json").read_text())
    assert any("GPTQ" in sentence for sentence in facts["modified"])
    lm = gemma_keras.GemmaCausalLM.from_preset(PRESET)
    lm.quantize("int4", calibration=str(lessons))
    again = gemma_keras.GemmaCausalLM.from_preset(tmp_path / "q")
    for mine, theirs in zip(lm.weights, again.weights, strict=True):
        mine, theirs = map(keras.ops.convert_to_numpy, (mine, theirs))
        np.testing.assert_array_equal(mine.view("uint8"), theirs.view("uint8"))


def test_calibration_that_cannot_be_is_refused(tmp_path):
    options = (PRESET, tmp_path / "m", "--to", "keras", "--calibration")
    result = convert(*options, __file__, "--quantize", "int8")
    assert result.exit_code == 2
    assert "goes with --quantize int4" in result.stderr
    result = convert(*options, tmp_path / "none.txt", "--quantize", "int4")
    assert result.exit_code == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options", [("hf", "int4"), ("gguf", "int8"), ("keras", "int3")]
)
def test_few_bits_that_a_format_cannot_keep_are_refused(tmp_path, options):
    to, quantize = options
    result = convert(PRESET, tmp_path / "m", "--to", to, "--quantize", quantize)
    assert result.exit_code == 2
    assert "goes with --to keras" in result.stderr
    assert not list(tmp_path.iterdir())
