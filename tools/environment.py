"""Virtual environments for tools/test and tools/demo, made from pinned versions.

Needs Python 3.11 and pip, nothing else. An environment is made anew when what it was
asked to hold changes, and used again otherwise.
"""

import hashlib
import os
import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "tools" / "constraints-ci.txt"

# What to ask pip for, so that each backend runs on the CPU of any machine. torch is
# pinned to the very version: a newer one brings gigabytes of CUDA.
BACKENDS = {
    "jax": "jax",
    "torch": "torch==2.13.0",
    "tensorflow": "tensorflow-cpu",
}


class NoEnvironment(RuntimeError):
    """An environment could not be made; says what to look at."""


def interpreter() -> str:
    """The Python to make environments with: 3.11 if it is there, as the pins are."""
    if sys.version_info[:2] != (3, 11) and (found := shutil.which("python3.11")):
        return found
    # Here the version is not known yet to be one that the package allows.
    if sys.version_info < (3, 11):  # noqa: UP036
        raise NoEnvironment(
            f"Python 3.11 is needed; this is {sys.version.split()[0]}, and there is no "
            "python3.11 on the PATH."
        )
    return sys.executable


def ensure(folder: pathlib.Path, requirements: list[str], bare=()) -> str:
    """Makes sure that `folder` is an environment that holds what is asked for.

    Args:
        folder: where the environment lies.
        requirements: arguments for one `pip install` under the pinned versions.
        bare: requirements to install without what they depend on.

    Returns:
        The path of the environment's Python.
    """
    python = folder / "bin" / "python"
    files = [CONSTRAINTS.read_text(), (ROOT / "pyproject.toml").read_text()]
    recipe = [interpreter(), *requirements, *bare, *files]
    stamp = hashlib.sha256("\n".join(recipe).encode()).hexdigest()
    mark = folder / "gemma_keras_environment"
    if mark.is_file() and mark.read_text() == stamp and python.is_file():
        return str(python)
    if folder.exists() and not (folder / "pyvenv.cfg").is_file():
        raise NoEnvironment(
            f"{folder} exists and is no virtual environment: name another folder."
        )
    shutil.rmtree(folder, ignore_errors=True)
    _run([interpreter(), "-m", "venv", str(folder)])
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    install = [*pip, "install", "--quiet", "--constraint", str(CONSTRAINTS)]
    _run([*install, "pip"])
    # What builds the package is pinned too; only the pip just installed knows how.
    install += ["--build-constraint", str(CONSTRAINTS)]
    # Alone and first, so that nothing else can pull in another build of it.
    torch = [each for each in requirements if each == BACKENDS["torch"]]
    if torch:
        _run([*install, *torch])
    _run([*install, *requirements])
    if bare:
        _run([*install, "--no-deps", *bare])
    mark.write_text(stamp)
    return str(python)


def clean_variables(**changes: str) -> dict[str, str]:
    """The process's variables without what would leak other packages in."""
    variables = dict(os.environ)
    for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "KERAS_BACKEND"):
        variables.pop(name, None)
    # Else a log file shows nothing of a step before the step has ended.
    return {**variables, "PYTHONUNBUFFERED": "1", **changes}


def _run(command: list[str]) -> None:
    print("$", " ".join(command), file=sys.stderr, flush=True)
    if subprocess.run(command, cwd=ROOT, env=clean_variables()).returncode:
        raise NoEnvironment(f"This failed: {' '.join(command)}")
