"""Checks that every relative link in the project's Markdown leads to a file.

Prints the broken ones and exits with 1 if there are any.
"""

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def anchors(text: str) -> set[str]:
    """The names that a Markdown file's headings can be linked by."""
    titles = re.findall(r"^#+ +(.+?) *$", FENCE.sub("", text), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", title).lower() for title in titles]
    return {title.replace(" ", "-") for title in plain}


def broken(document: pathlib.Path) -> list[str]:
    """The links of one document that lead nowhere."""
    text = document.read_text()
    wrong = []
    for link in LINK.findall(FENCE.sub("", text)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        if not target.exists():
            wrong.append(f"{document.relative_to(ROOT)}: {link}: no such file")
        elif anchor and anchor not in anchors(target.read_text()):
            wrong.append(f"{document.relative_to(ROOT)}: {link}: no such heading")
    return wrong


def main() -> int:
    """Checks every Markdown file that git knows."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(
        [*command, "*.md"], cwd=ROOT, capture_output=True, check=True, text=True
    )
    documents = [ROOT / name for name in listed.stdout.split("\0") if name]
    wrong = [line for document in documents for line in broken(document)]
    print("\n".join(wrong) or f"All links in {len(documents)} documents resolve.")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
