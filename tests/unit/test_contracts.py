"""Promises about the source itself: what a reader will find where, and how long."""

import ast
import pathlib

import pytest

import gemma_keras

pytestmark = pytest.mark.any_backend

# The source tree where there is one, the installed package otherwise.
PACKAGE = pathlib.Path(gemma_keras.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))


def functions(path):
    tree = ast.parse(path.read_text())
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    return [node for node in ast.walk(tree) if isinstance(node, kinds)]


def parameters(function):
    arguments = function.args
    count = len(arguments.posonlyargs + arguments.args + arguments.kwonlyargs)
    return count + bool(arguments.vararg) + bool(arguments.kwarg)


def test_the_model_file_can_be_read_in_one_sitting():
    path = PACKAGE / "backbone.py"
    assert len(path.read_text().splitlines()) <= 450
    for function in functions(path):
        length = function.end_lineno - function.lineno + 1
        assert length <= 60, f"{function.name} has {length} lines"
        own = [a for a in function.args.args if a.arg in ("self", "cls")]
        count = parameters(function) - len(own)
        assert count <= 6, f"{function.name} has {count} parameters"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_every_module_is_named_after_one_concept_and_says_what_it_is(path):
    assert not {"util", "utils", "helpers", "misc", "common"} & {path.stem}
    assert ast.get_docstring(ast.parse(path.read_text()))


# What these do is told by Keras, or by the class that they build.
OVERRIDES = {
    *("build", "call", "quantized_call", "get_config", "from_config"),
    *("get_compile_config", "compile_from_config"),
    *("compute_loss", "compute_metrics", "get_metrics_result", "metrics", "variables"),
    *("apply", "stateless_apply", "learning_rate", "iterations", "lr_adjust"),
    "finalize_variable_values",
    *("save_own_variables", "load_own_variables"),
    *("on_train_begin", "on_train_batch_end", "on_train_end"),
    *("on_epoch_begin", "on_epoch_end", "on_train_batch_begin"),
    # Of this package's StepCallback.
    *("on_step_end", "get_state", "set_state", "close"),
    "num_batches",
}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_public_methods_say_what_they_do(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ClassDef) or node.name.startswith("_"):
            continue
        for method in node.body:
            if not isinstance(method, ast.FunctionDef) or method.name in OVERRIDES:
                continue
            setter = any(isinstance(d, ast.Attribute) for d in method.decorator_list)
            if method.name.startswith("_") or setter:
                continue
            assert ast.get_docstring(method), f"{node.name}.{method.name}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_only_the_backend_package_knows_a_tensor_library(path):
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    libraries = {"jax", "torch", "tensorflow"}
    # What torch.save wrote is read with torch, whatever the backend.
    allowed = {"torch_file": {"torch"}}.get(path.stem, set())
    if path.parent.name == "backend":
        allowed = libraries
    assert imported.isdisjoint(libraries - allowed)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_nothing_is_left_to_be_done(path):
    text = path.read_text()
    for word in ("TODO", "FIXME", "XXX"):
        assert word not in text
