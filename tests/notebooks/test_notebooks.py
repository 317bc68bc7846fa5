"""Every notebook runs from its first cell to its last, on the backend in use."""

import pathlib

import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))

pytestmark = [pytest.mark.notebook, pytest.mark.slow]


def run(path, folder):
    """Executes a notebook in a folder; returns what its cells print, in order."""
    book = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(book, timeout=300, resources=resources).execute()
    return [
        "".join(out["text"] for out in cell.outputs if out.get("name") == "stdout")
        for cell in book.cells
        if cell.cell_type == "code"
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_without_outputs(path):
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    for cell in book.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


def test_get_started_teaches_what_it_says(tmp_path, backend):
    printed = run(FOLDER / "01_get_started.ipynb", tmp_path)
    *_, before, fitted, after, loaded = printed
    assert f"on {backend}\n" in "".join(printed)
    assert "The capital of France is Paris." in "".join(printed)
    assert "Marlo" not in before
    assert fitted.startswith("loss ")
    assert after == loaded == "The capital of Veloria is Marlo.\n"
    assert (tmp_path / "my_gemma" / "config.json").is_file()
