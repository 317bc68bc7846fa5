"""`gemma-keras sft`: a run from a file to an adapter, stopped and killed on its way."""

import csv
import importlib.util
import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest
import typer.testing

from gemma_keras import GemmaCausalLM, cli, registry
from gemma_keras.sft import RunConfig, callbacks, run, snapshots

LESSONS = registry.locate() / "demo" / "lessons.jsonl"
ROOT = pathlib.Path(__file__).resolve().parents[2]

# What a process does at some point of the run, before it goes on or is no more.
START = "import sys; sys.argv[0] = 'gemma-keras'; import os, signal\n"
STOP_AFTER_2 = """
from gemma_keras.sft import callbacks
write = callbacks.MetricsFile.on_step_end
def stop(self, logs):
    write(self, logs)
    if self.step == 2:
        os.kill(os.getpid(), signal.SIGINT)
callbacks.MetricsFile.on_step_end = stop
"""
KILL_IN_A_ROW = """
from gemma_keras.sft import callbacks
write = callbacks.MetricsFile.on_step_end
def die(self, logs):
    if self.step == 5:
        with self.path.open("a") as file:
            file.write("5,1.2")
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, logs)
callbacks.MetricsFile.on_step_end = die
"""
KILL_IN_A_CHECKPOINT = """
from gemma_keras.sft import snapshots
write = snapshots._write_bytes
def die(path, parts):
    parts = list(parts)
    if path.name == snapshots.VARIABLES and "00000006" in path.parent.name:
        write(path, parts[: len(parts) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    return write(path, parts)
snapshots._write_bytes = die
"""
# No room any more, in a line of metrics.csv and within a checkpoint.
FULL_IN_A_ROW = """
import errno
from gemma_keras.sft import callbacks
write = callbacks.MetricsFile.on_step_end
def fill(self, logs):
    if self.step == 5:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    write(self, logs)
callbacks.MetricsFile.on_step_end = fill
"""
FULL_IN_A_CHECKPOINT = """
import errno
from gemma_keras.sft import snapshots
write = snapshots._write_bytes
def fill(path, parts):
    if "00000006" in path.parent.name:
        write(path, list(parts)[:1])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return write(path, parts)
snapshots._write_bytes = fill
"""
# Validation losses that are best after step 2, and a process that is killed where the
# variable DIE_IN says.
BEST_AFTER_2 = """
import pathlib
from gemma_keras.sft import callbacks, snapshots
def die():
    os.kill(os.getpid(), signal.SIGKILL)
def measure(self):
    if self.step == 4 and os.environ["DIE_IN"] == "validation":
        die()
    return {"val_loss": (3.0, 2.5, 2.0, 2.4, 2.2)[self.step], "val_perplexity": 9.0}
prune, replace = snapshots.prune, pathlib.Path.replace
def dying_prune(folder, *args):
    if os.environ["DIE_IN"] == "prune" and (folder / "step-00000003").exists():
        die()
    prune(folder, *args)
def dying_replace(self, target):
    if os.environ["DIE_IN"] == "adapter" and self.name.startswith(".adapter"):
        die()
    return replace(self, target)
callbacks.Validation._measure = measure
snapshots.prune = dying_prune
pathlib.Path.replace = dying_replace
"""
CALL = "import gemma_keras.cli as c; c.main()"


def options(random_preset, out, **changes):
    """The arguments of a run of 9 steps, 4.5 an epoch."""
    given = {
        "preset": str(random_preset),
        "train": [str(LESSONS)],
        "template": "chat",
        "sequence_length": 64,
        "batch_size": 2,
        "accumulation": 2,
        "epochs": 2,
        "learning_rate": 1e-2,
        "lora_dropout": 0.1,
        "save_every": 3,
        "seed": 5,
        "out": str(out),
    }
    return {**given, **changes}


def write_yaml(path, given):
    path.write_text(json.dumps(given))  # JSON is YAML
    return path


def start(config, *flags, code="", **variables):
    """Runs the command in a process of its own, with `code` before it."""
    return subprocess.run(
        [sys.executable, "-c", START + code + CALL, "sft", str(config), *flags],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


def metrics(folder):
    with (pathlib.Path(folder) / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def column(folder, name):
    return [row[name] for row in metrics(folder)]


@pytest.fixture(scope="module")
def whole(random_preset, tmp_path_factory):
    """A run that nothing disturbed, with everything in it."""
    folder = tmp_path_factory.mktemp("runs")
    out, held_out = folder / "whole", folder / "held_out.jsonl"
    held_out.write_text("".join(LESSONS.read_text().splitlines(keepends=True)[:7]))
    more = {"sample_prompts": ["Who are you?"], "sample_tokens": 4}
    more |= {"validation": str(held_out), "exact_match": 3}
    more["tensorboard"] = importlib.util.find_spec("tensorboard") is not None
    assert run(RunConfig(**options(random_preset, out, **more))) is None
    return out


def test_a_run_leaves_what_was_promised(whole, capsys):
    rows = metrics(whole)
    steps = len(rows)
    assert [int(row["step"]) for row in rows] == list(range(1, steps + 1))
    for name in ("loss", "learning_rate", "tokens_per_second", "peak_memory_gb"):
        assert all(float(row[name]) > 0 for row in rows), name
    assert float(rows[-1]["epoch"]) == 2.0
    assert rows[-1]["val_loss"] and rows[-1]["val_perplexity"]
    assert float(rows[0]["loss"]) > float(rows[-1]["loss"])
    seen = [int(row["tokens_seen"]) for row in rows]
    assert seen == sorted(seen)
    assert 0 < int(rows[0]["supervised_tokens"]) < seen[0]
    lines = (whole / "samples.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert [s["step"] for s in samples][:1] == [0]
    assert samples[-1]["step"] == steps
    assert "<svg" in (whole / "report.html").read_text()
    info = json.loads((whole / "run.json").read_text())
    assert info["status"] == "finished"
    assert [each["asked"] for each in info["exact_match"].values()] == [3, 3]
    lessons = [json.loads(line) for line in LESSONS.read_text().splitlines()[:3]]
    for when in ("before", "after"):
        lines = (whole / f"answers_{when}.jsonl").read_text().splitlines()
        answers = [json.loads(line) for line in lines]
        assert [x["reference"] for x in answers] == [x["response"] for x in lessons]
        right = sum(x["text"] == x["reference"] for x in answers)
        assert right == info["exact_match"][when]["right"]
    assert info["versions"]["keras"] == keras.__version__
    assert RunConfig.read(whole / "config.yaml").lora_dropout == 0.1
    assert (whole / "adapter" / "adapter_config.json").is_file()


def test_a_run_draws_its_curves_for_tensorboard(whole):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing import event_accumulator

    read = event_accumulator.EventAccumulator(str(whole / "tensorboard"))
    read.Reload()
    points = [(event.step, event.value) for event in read.Scalars("loss")]
    expected = [float(loss) for loss in column(whole, "loss")]
    assert [step for step, _ in points] == list(range(1, len(expected) + 1))
    assert [value for _, value in points] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("code", [FULL_IN_A_ROW, FULL_IN_A_CHECKPOINT])
def test_a_full_disk_is_told_and_the_run_goes_on_from_its_last_checkpoint(
    whole, random_preset, tmp_path, code
):
    out = tmp_path / "out"
    config = write_yaml(tmp_path / "run.yaml", options(random_preset, out))
    full = start(config, code=code)
    assert full.returncode == 1
    for words in ("full", "step 3", "Make room and run the same command again"):
        assert words in full.stderr.replace("\n", " "), full.stderr
    assert start(config).returncode == 0
    assert column(out, "loss") == column(whole, "loss")


def test_eval_finds_the_perplexity_that_the_run_has_found(whole, random_preset):
    """Its way is another: a pass without training, windows, float64 sums."""
    data = whole.parent / "held_out.jsonl"
    asked = ["eval", random_preset, data, "--template", "chat", "--window", "64"]
    result = invoke(*asked, "--adapter", whole / "adapter", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    last = metrics(whole)[-1]
    assert found["loss"] == pytest.approx(float(last["val_loss"]), rel=1e-5)
    assert found["perplexity"] == pytest.approx(float(last["val_perplexity"]), rel=1e-4)
    assert found["accuracy"] == pytest.approx(float(last["val_accuracy"]))
    assert found["examples"] == 7
    base = json.loads(invoke(*asked, "--json").stdout)
    assert base["tokens"] == found["tokens"]
    assert base["loss"] > found["loss"]
    # It is what was measured before the first step.
    before = json.loads((whole / "run.json").read_text())["before"]
    assert base["loss"] == pytest.approx(before["val_loss"], rel=1e-5)
    assert base["accuracy"] == pytest.approx(before["val_accuracy"])


def test_eval_reads_a_text_file_whole(random_preset, tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("Once upon a time.\n\nThe end. " * 20)
    result = invoke("eval", random_preset, path, "--window", "64", "--stride", "16")
    assert result.exit_code == 0, result.stderr
    for text in ("perplexity", "bits per byte", "in 1 examples", "16 apart"):
        assert text in result.stdout
    assert invoke("eval", random_preset, path, "--format", "book").exit_code == 2
    wrong = invoke("eval", random_preset, tmp_path / "none.txt")
    assert (wrong.exit_code, wrong.stdout) == (1, "")
    assert "none.txt" in wrong.stderr


def test_an_adapter_is_trained_beside_four_bits(random_preset, tmp_path):
    given = options(random_preset, tmp_path / "r", quantize="int4", max_steps=2)
    assert run(RunConfig(**given)) is None
    assert len(metrics(tmp_path / "r")) == 2
    options_of_both = [str(random_preset), "--adapter", tmp_path / "r" / "adapter"]
    result = invoke(
        "generate", *options_of_both, "Who", "--quantize", "int4", "--max-new-tokens", 3
    )
    assert result.exit_code == 0, result.stderr


def test_a_finished_run_says_so_and_another_config_is_refused(whole, random_preset):
    given = RunConfig.read(whole / "config.yaml").as_dict()
    before = (whole / "metrics.csv").read_bytes()
    path = write_yaml(whole.parent / "again.yaml", given)
    result = invoke("sft", path)
    assert result.exit_code == 0
    assert "is finished" in result.stderr
    assert f"gemma-keras chat {random_preset} --adapter {whole}" in result.stderr
    result = invoke("sft", path, "--seed", "6", "--epochs", "1")
    assert result.exit_code == 1
    assert "seed: 6, but the run has 5" in result.stderr
    assert "epochs: 1, but the run has 2" in result.stderr
    assert (whole / "metrics.csv").read_bytes() == before


def test_a_run_without_a_checkpoint_may_begin_anew(
    random_preset, tmp_path, monkeypatch
):
    """Here one that trains every weight of a bfloat16 checkpoint, after NaN."""
    preset, out = tmp_path / "bfloat16", tmp_path / "out"
    lm = GemmaCausalLM.from_preset(random_preset, dtype="bfloat16")
    lm.save_to_preset(preset)
    given = options(preset, out, full=True, max_steps=2)
    config = write_yaml(tmp_path / "run.yaml", given)
    write = callbacks.MetricsFile.on_step_end

    def poison(self, logs):
        logs["loss"] = math.nan
        write(self, logs)

    with monkeypatch.context() as patch:
        patch.setattr(callbacks.MetricsFile, "on_step_end", poison)
        result = invoke("sft", config, "--seed", "6")
    assert result.exit_code == 1
    told = " ".join(result.stderr.split())
    assert "The loss of step 1 is nan." in told
    assert "Nothing was saved, as there was no checkpoint yet" in told
    assert "begins anew in" in told
    assert metrics(out)[0]["loss"] == "nan"
    assert RunConfig.read(out / "config.yaml").dtype == "float32"
    result = invoke("sft", config, "--learning-rate", "1e-3")
    assert result.exit_code == 0, result.stderr
    assert [float(x) > 0 for x in column(out, "loss")] == [True, True]
    assert RunConfig.read(out / "config.yaml").learning_rate == 1e-3
    assert json.loads((out / "run.json").read_text())["status"] == "finished"
    result = invoke("sft", config, "--learning-rate", "1e-4")
    assert "holds a run with other options" in result.stderr


def invoke(*arguments):
    return typer.testing.CliRunner().invoke(
        cli.app, [*map(str, arguments)], prog_name="gemma-keras"
    )


def test_stopped_and_killed_a_run_ends_as_if_it_had_not_been(random_preset, tmp_path):
    """To the last bit: the losses, the adapter, and each step once."""
    given = options(random_preset, tmp_path / "whole")
    assert run(RunConfig(**given)) is None
    config = write_yaml(tmp_path / "run.yaml", given)
    out = tmp_path / "killed"
    flags = ("--out", str(out))
    stopped = start(config, *flags, code=STOP_AFTER_2)
    assert stopped.returncode == 130, stopped.stderr
    assert "saved after step 2" in stopped.stderr
    assert json.loads((out / "run.json").read_text())["status"] == "stopped"
    killed = start(config, *flags, code=KILL_IN_A_ROW)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert "Going on after step 2" in killed.stderr
    assert (out / "metrics.csv").read_text().endswith("\n5,1.2")
    killed = start(config, *flags, code=KILL_IN_A_CHECKPOINT)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert "Going on after step 3" in killed.stderr
    partial = list((out / "checkpoints").glob(".step-00000006.partial"))
    assert len(partial) == 1
    assert run(RunConfig(**given | {"out": str(out)})) is None
    assert not partial[0].exists()
    names = ("step", "loss", "learning_rate", "supervised_tokens", "tokens_seen")
    for name in names:
        assert column(out, name) == column(tmp_path / "whole", name), name
    assert len(metrics(out)) == 9
    one, two = (
        (folder / "adapter" / "adapter_model.safetensors").read_bytes()
        for folder in (out, tmp_path / "whole")
    )
    assert one == two


@pytest.mark.any_backend
def test_a_run_that_stops_early_returns_to_its_best_weights(random_preset, tmp_path):
    """Killed before old checkpoints go, while it measures, and as the adapter comes."""
    out = tmp_path / "out"
    changes = {"validation_split": 0.3, "validate_every": 1, "early_stopping": 2}
    given = options(random_preset, out, save_every=1, keep=1, **changes)
    config = write_yaml(tmp_path / "run.yaml", given)
    for where, done in (("prune", 3), ("validation", 3), ("adapter", 4)):
        killed = start(config, code=BEST_AFTER_2, DIE_IN=where)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        held = snapshots.every(out / "checkpoints")
        assert snapshots.step_of(held[-1]) == done
        assert not (out / "adapter").exists()
    assert [snapshots.step_of(path) for path in held] == [2, 4]
    ended = start(config, code=BEST_AFTER_2, DIE_IN="")
    assert ended.returncode == 0, ended.stderr
    assert "Back to the weights of step 2" in ended.stderr
    assert column(out, "step") == ["1", "2", "3", "4"]
    assert json.loads((out / "run.json").read_text())["status"] == "finished"
    lm = GemmaCausalLM.from_preset(random_preset)
    lm.load_adapter(out / "adapter")
    with snapshots.variables(held[0]) as (_, read):
        for variable in lm.backbone.trainable_variables:
            expected = read(f"weights/{variable.path}")
            found = keras.ops.convert_to_numpy(variable)
            np.testing.assert_array_equal(found, expected)
    left = [path.name for path in out.iterdir() if path.name.endswith(".partial")]
    assert left == []


@pytest.mark.reference
def test_a_run_goes_on_on_another_backend(random_preset, tmp_path, backend):
    others = {"jax": "tensorflow", "torch": "jax", "tensorflow": "torch"}
    if importlib.util.find_spec(others[backend]) is None:
        pytest.skip("no other backend is installed")
    given = options(random_preset, tmp_path / "whole", lora_dropout=0.0, keep=9)
    config = write_yaml(tmp_path / "run.yaml", given)
    there = start(config, KERAS_BACKEND=others[backend])
    assert there.returncode == 0, there.stderr
    here = unfinish(tmp_path / "whole", tmp_path / "here")
    for path in snapshots.every(tmp_path / "here" / "checkpoints")[1:]:
        snapshots.remove(path)
    assert run(here) is None
    first, second = (
        [float(x) for x in column(tmp_path / name, "loss")]
        for name in ("whole", "here")
    )
    assert second == pytest.approx(first, rel=1e-5)
    assert second[:3] == first[:3]
    for name, ran in (("whole", others[backend]), ("here", backend)):
        info = json.loads((tmp_path / name / "run.json").read_text())
        assert ran in info["versions"]


def unfinish(folder, copy):
    """The config of a copy of a run, which is made to look as if it was killed."""
    shutil.copytree(folder, copy)
    given = RunConfig.read(folder / "config.yaml").as_dict() | {"out": str(copy)}
    write_yaml(copy / "config.yaml", given)
    info = json.loads((copy / "run.json").read_text()) | {"status": "running"}
    (copy / "run.json").write_text(json.dumps(info))
    return RunConfig(**given)


def test_a_torn_checkpoint_is_passed_over(whole, tmp_path, capsys):
    out = tmp_path / "torn"
    config = unfinish(whole, out)
    before, newest = snapshots.every(out / "checkpoints")[-2:]
    data = newest / snapshots.VARIABLES
    data.write_bytes(data.read_bytes()[:-9])
    assert run(config) is None
    told = capsys.readouterr().err
    assert f"{data} has" in told
    assert "passed over" in told
    assert f"Going on after step {snapshots.step_of(before)} " in told
    assert column(out, "loss") == column(whole, "loss")


def test_the_example_config_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    example = ROOT / "docs" / "examples" / "sft.yaml"
    result = invoke("sft", example, "--max-steps", "2", "--out", tmp_path / "run")
    assert result.exit_code == 0, result.stderr
    assert len(metrics(tmp_path / "run")) == 2
    again = RunConfig.read(tmp_path / "run" / "config.yaml")
    expected = RunConfig.read(example, {"max_steps": 2, "out": str(tmp_path / "run")})
    assert again == expected.resolved(registry.find(expected.preset).config, "float32")


@pytest.mark.parametrize(
    ("flags", "code", "told"),
    [
        (("--learning-rate", "0"), 2, "learning_rate must be above 0"),
        (("--optimizer", "adan"), 2, "optimizer must be one of adamw"),
        (("--train", "nowhere.jsonl"), 1, "nowhere.jsonl"),
        (("--preset", "gemma_tiny_em"), 1, "Did you mean gemma_tiny_en"),
        (("--sequence-length", "100000"), 1, "sequence_length must be at most"),
        (("--lora-targets", "quary"), 1, "No projection is called quary"),
        (("--full", "--dtype", "bfloat16"), 2, "leave dtype out"),
        (("--out", "."), 1, "something else than a run"),
        (("--save-preset", "."), 1, "save_preset: . exists"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_written(
    random_preset, tmp_path, flags, code, told, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    config = write_yaml(tmp_path / "run.yaml", options(random_preset, "out"))
    result = invoke("sft", config, *flags)
    assert (result.exit_code, result.stdout) == (code, "")
    assert told in result.stderr.replace("│", "")
    assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


@pytest.mark.parametrize("told", ["WORLD_SIZE", "KERAS_DISTRIBUTION_NUM_PROCESSES"])
def test_one_of_several_processes_refuses(random_preset, tmp_path, told, monkeypatch):
    names = {"torch": "WORLD_SIZE", "jax": "KERAS_DISTRIBUTION_NUM_PROCESSES"}
    if names.get(keras.backend.backend()) != told:
        pytest.skip("another backend's way to start processes")
    monkeypatch.setenv(told, "2")
    config = write_yaml(tmp_path / "run.yaml", options(random_preset, tmp_path / "out"))
    result = invoke("sft", config)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "one process, and 2 were started" in result.stderr
    assert not (tmp_path / "out").exists()


def test_all_devices_have_the_losses_of_one(whole, tmp_path):
    if keras.backend.backend() != "jax":
        pytest.skip("divides batches among devices on JAX only")
    given = RunConfig.read(whole / "config.yaml").as_dict()
    given |= {"out": str(tmp_path / "all"), "devices": "all"}
    config = write_yaml(tmp_path / "run.yaml", given)
    done = start(config, XLA_FLAGS="--xla_force_host_platform_device_count=2")
    assert done.returncode == 0, done.stderr
    losses = list(map(float, column(tmp_path / "all", "loss")))
    expected = list(map(float, column(whole, "loss")))
    assert losses == pytest.approx(expected, rel=1e-5)


def test_devices_that_cannot_share_a_batch_are_told(
    random_preset, tmp_path, monkeypatch
):
    monkeypatch.setattr(keras.distribution, "list_devices", lambda: ["a", "b", "c"])
    given = options(random_preset, tmp_path / "out", devices="all")
    result = invoke("sft", write_yaml(tmp_path / "run.yaml", given))
    told = {"jax": "make batch_size a multiple of 3"}
    assert result.exit_code == 1
    assert (
        told.get(keras.backend.backend(), "devices=all works on JAX") in result.stderr
    )
    assert not (tmp_path / "out").exists()


def test_columns_and_bad_rows_of_foreign_data(random_preset, tmp_path):
    """For `sft` and `eval`, as `data preview` has it."""
    path = tmp_path / "rows.jsonl"
    rows = [json.loads(line) for line in LESSONS.read_text().splitlines()[:4]]
    named = [{"ask": row["prompt"], "reply": row["response"]} for row in rows]
    path.write_text("\n".join([*map(json.dumps, named), '{"ask": "nothing"}']))
    chosen = ["--column", "prompt=ask", "--column", "response=reply"]
    asked = ["eval", random_preset, path, "--json"]
    told = invoke(*asked)
    assert told.exit_code == 1
    assert "--column prompt=COLUMN" in told.stderr
    assert "rows.jsonl:5: it has no 'reply'" in invoke(*asked, *chosen).stderr
    assert invoke(*asked, "--column", "ask=prompt").exit_code == 2
    result = invoke(*asked, *chosen, "--skip-bad")
    assert "rows.jsonl:5" in result.stderr
    assert json.loads(result.stdout)["examples"] == 4
    given = options(random_preset, tmp_path / "out", train=str(path), max_steps=1)
    config = write_yaml(tmp_path / "run.yaml", given)
    result = invoke("sft", config, *chosen, "--skip-bad")
    assert result.exit_code == 0, result.stderr
    assert "format pairs (ask, reply)" in result.stderr
    saved = RunConfig.read(tmp_path / "out" / "config.yaml")
    assert saved.column == chosen[1::2]


def test_a_bad_row_stops_before_training_or_is_skipped(random_preset, tmp_path):
    data = tmp_path / "rows.jsonl"
    good = LESSONS.read_text().splitlines()
    data.write_text("\n".join([*good[:6], '{"prompt": "no answer"}', *good[6:]]))
    config = write_yaml(
        tmp_path / "run.yaml",
        options(random_preset, tmp_path / "out", train=str(data), max_steps=1),
    )
    result = invoke("sft", config)
    assert result.exit_code == 1
    assert "rows.jsonl:7" in result.stderr
    assert not (tmp_path / "out" / "config.yaml").exists()
    result = invoke("sft", config, "--skip-bad", "--validation-split", "0.25")
    assert result.exit_code == 0, result.stderr
    assert "1 bad skipped" in result.stderr
    assert "9 of the examples are kept apart" in result.stderr
    assert result.stdout == f"{tmp_path / 'out' / 'adapter'}\n"
    assert metrics(tmp_path / "out")[0]["val_loss"]
