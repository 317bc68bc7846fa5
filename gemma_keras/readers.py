"""`read_examples`: any data that people fine-tune on, as checked examples.

    examples = read_examples("train.jsonl")
    print(examples.description)

Everything is checked before training starts: each row that is bad is told with its
file, line and reason, or skipped and counted.
"""

import dataclasses

from gemma_keras.examples import Example, Layout, detect
from gemma_keras.records import DataError, Row, Rows, open_rows

# Bad rows that one message lists; reading stops there unless they are skipped.
LISTED = 20


class Examples(list):
    """A list of `Example`, and what was found while reading it.

    Attributes:
        name: the file's name, or what kind of object it was.
        format: one of `examples.FORMATS`, or None if it is mixed.
        description: the source, the number of examples, the format and the columns.
        num_skipped: rows that were left out because they are bad.
        faults: why, for the first of them, each with its place.
    """

    def __init__(self, examples, rows: Rows, layout: Layout | None):
        super().__init__(examples)
        self.name = rows.name
        self.format = layout and layout.format
        self._place, self._layout = rows.place, layout
        self.num_skipped: int = 0
        self.faults: list[str] = []

    @property
    def description(self) -> str:
        """What was read, in a line."""
        kind = "examples" if self._layout is None else self._layout.description
        skipped = f", {self.num_skipped:,} bad skipped" if self.num_skipped else ""
        return f"{self.name}: {len(self):,} examples{skipped}, format {kind}"

    def place(self, example: Example) -> str:
        """Where an example comes from, such as `train.jsonl:7`."""
        return self._place(example.number)


def read_examples(
    source, format: str = "auto", *, columns=None, skip_bad: bool = False
) -> Examples:
    """Reads and checks training examples.

    Args:
        source: the path of a .jsonl, .json, .csv, .tsv, .parquet or .txt file (text
            files also gzipped); a list, or any iterable, of texts, of chats or of
            dicts; a dict of columns; a Hugging Face dataset. In a .txt file a blank
            line ends a document.
        format: one of `examples.FORMATS`, if the columns do not tell.
        columns: which column is what, if their names do not tell, for example
            `{"prompt": "my_question", "response": "my_answer"}`.
        skip_bad: leave out rows that are bad, and count them.

    Returns:
        `Examples`, a list whose `description` says what was found.

    Raises:
        DataError: there is no such file, or it is of no known kind; there is nothing
            in it; the format cannot be told; or rows are bad and not to be skipped,
            of which the first `LISTED` are listed with their reasons.
        TypeError: `source` is nothing that has rows.
        ImportError: pyarrow, which reads Parquet, is missing.
    """
    rows = open_rows(source)
    reader = _Reader(rows, format, columns, skip_bad)
    found = [example for row in rows.rows if (example := reader.take(row)) is not None]
    if reader.faults and not skip_bad:
        raise reader.error()
    if not found:
        if reader.faults:
            raise reader.error("All rows are bad")
        raise DataError(f"{rows.name} holds no examples.")
    examples = Examples(found, rows, reader.layout)
    examples.num_skipped, examples.faults = reader.num_bad, reader.faults
    return examples


class _Reader:
    """Makes examples of rows, and keeps account of those that are bad."""

    def __init__(self, rows, format, columns, skip_bad):
        self.rows, self.format, self.columns = rows, format, columns
        self.skip_bad = skip_bad
        self.layout: Layout | None = None
        self.num_bad = 0
        self.faults: list[str] = []

    def take(self, row: Row) -> Example | None:
        """The example of a row, or None if it is bad."""
        if row.fault is not None:
            return self._bad(row, row.fault)
        if isinstance(row.value, Example):
            return dataclasses.replace(row.value, number=row.number)
        try:
            if self.layout is None:
                self.layout = detect(row.value, self.format, self.columns)
            return self.layout.read(row.value, row.number)
        except DataError as error:
            # Of the layout: it would be the same for every row.
            if not self.skip_bad or self.num_bad == LISTED:
                raise DataError(f"{self._place(row)}: {error}") from None
            return self._bad(row, str(error))
        except (TypeError, ValueError) as error:
            return self._bad(row, str(error))

    def _bad(self, row, reason):
        self.num_bad += 1
        if len(self.faults) < LISTED:
            self.faults.append(f"{self._place(row)}: {reason.rstrip('.')}")
        if self.num_bad == LISTED and not self.skip_bad:
            raise self.error(f"The first {LISTED} bad rows")

    def _place(self, row):
        item = "" if row.item is None else f" (item {row.item})"
        return self.rows.place(row.number) + item

    def error(self, title="Bad rows") -> DataError:
        """What is wrong with all of them."""
        listed = "\n".join(f"- {fault}" for fault in self.faults)
        return DataError(
            f"{title} of {self.rows.name}:\n{listed}\n"
            "Correct them, or leave them out with skip_bad (--skip-bad)."
        )
