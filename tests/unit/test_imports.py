"""What importing the package may bring with it (design, rule 8)."""

import json
import os
import subprocess
import sys

import pytest

BACKENDS = ("jax", "torch", "tensorflow")
# Imported only by what needs them: a hub's handle, a reference, the command line.
ON_DEMAND = ("kagglehub", "transformers", "keras_hub", "gguf", "typer", "peft")


def modules_after(statements: str) -> set[str]:
    """Top-level modules that a fresh process has imported after some statements."""
    program = f"import json, sys\n{statements}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return {name.split(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


def test_the_package_registers_its_classes_with_keras():
    """Or keras.models.load_model would not know them."""
    registered = (
        "import gemma_keras, keras\n"
        "assert keras.saving.get_registered_object('gemma_keras>GemmaCausalLM')"
    )
    loaded = modules_after(registered) - modules_after("import keras")
    assert loaded.isdisjoint({*BACKENDS, *ON_DEMAND})


@pytest.mark.parametrize("variables", [{}, {"KERAS_BACKEND": ""}])
def test_importing_the_package_finds_a_backend_that_is_installed(tmp_path, variables):
    """Keras alone would take TensorFlow, and fail where it is absent."""
    hide = (
        "import importlib.util, os, sys\n"
        "class Absent:\n"
        "    def find_spec(name, *_):\n"
        "        if name == 'tensorflow': raise ModuleNotFoundError(name=name)\n"
        "found = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: (\n"
        "    None if name == 'tensorflow' else found(name, *rest))\n"
        "sys.meta_path.insert(0, Absent)\n"
        "import gemma_keras, keras\n"
        "assert keras.backend.backend() in ('jax', 'torch')"
    )
    environment = {k: v for k, v in os.environ.items() if k != "KERAS_BACKEND"}
    environment |= {"KERAS_HOME": str(tmp_path), **variables}
    subprocess.run([sys.executable, "-c", hide], env=environment, check=True)


def test_the_command_line_imports_no_tensor_library():
    command = "sys.argv = ['gemma-keras']\nimport gemma_keras.cli"
    assert modules_after(command).isdisjoint({*BACKENDS, "keras"})


def test_no_public_name_imports_a_backend_that_keras_did_not():
    everything = (
        "import gemma_keras\n"
        "for name in gemma_keras.__all__: getattr(gemma_keras, name)"
    )
    # Keras looks for other backends itself, so it is the measure.
    added = modules_after(everything) - modules_after("import keras")
    assert "gemma_keras" in added
    assert added.isdisjoint(BACKENDS)
    assert added.isdisjoint(ON_DEMAND)


def test_public_names_are_listed_and_unknown_ones_refused():
    import gemma_keras

    assert set(gemma_keras.__all__) <= set(dir(gemma_keras))
    with pytest.raises(AttributeError, match="has no attribute 'GemmaCausalML'"):
        gemma_keras.GemmaCausalML  # noqa: B018


def test_looking_at_a_model_imports_no_tensor_library():
    look = (
        "sys.argv = ['gemma-keras', 'info', 'gemma_tiny_en', '--json']\n"
        "import gemma_keras.cli\n"
        "sys.stdout, out = sys.stderr, sys.stdout\n"
        "try: gemma_keras.cli.main()\nexcept SystemExit as end: assert not end.code\n"
        "sys.stdout = out"
    )
    assert modules_after(look).isdisjoint({*BACKENDS, "keras"})
