"""Writes notebooks/*.ipynb from their sources, notebooks/*.py in Jupytext's form.

python tools/make_notebooks.py            writes them
python tools/make_notebooks.py --check    exits with 1 if one is not what is there
"""

import pathlib
import sys

import jupytext
import nbformat

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "notebooks"


def notebook(source: pathlib.Path) -> str:
    """The notebook of a source file: no outputs, and the same text every time."""
    book = jupytext.read(source)
    for number, cell in enumerate(book.cells):
        cell["id"] = f"cell-{number:02d}"
        cell["metadata"] = {}
    book["metadata"] = {
        "kernelspec": {
            "display_name": "Python 3",
            "language": "python",
            "name": "python3",
        },
        "language_info": {"name": "python"},
    }
    nbformat.validate(book)
    return nbformat.writes(book, version=4) + "\n"


def main() -> int:
    """Writes the notebooks, or checks them."""
    stale = []
    for source in sorted(FOLDER.glob("*.py")):
        target, text = source.with_suffix(".ipynb"), notebook(source)
        if target.is_file() and target.read_text() == text:
            continue
        stale.append(target.name)
        if sys.argv[1:] != ["--check"]:
            target.write_text(text)
    if sys.argv[1:] == ["--check"] and stale:
        print(f"Stale: {', '.join(stale)}. Run python tools/make_notebooks.py")
        return 1
    print("All notebooks match their sources.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
