"""Rows of data files, and of what is in memory already, each with its place.

Files are read once, row by row, and never held whole, but for a `.json` that is one
object. What is wrong with a single row comes as that row's fault, so that a reader can
collect or skip it; what is wrong with a whole file is a `DataError`.
"""

import contextlib
import csv
import gzip
import json
import os
import pathlib
import re
import zlib
from collections.abc import Iterable, Iterator
from typing import ClassVar, NamedTuple

FILES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
# What is read of a JSON array at a time, in characters.
_CHUNK = 1 << 20
_LONGEST_FIELD = 2**31 - 1
# Bytes that are no UTF-8 come out of `open` so; JSON can write halves of a pair itself.
_BROKEN = re.compile("[\ud800-\udfff]")


class DataError(ValueError):
    """Data that cannot be used; the message says where, why and what to do."""


class Row(NamedTuple):
    """One row of a source, or what is wrong with it."""

    number: int  # line from 1 in a text file, index from 0 elsewhere
    value: object = None
    fault: str | None = None
    item: int | None = None  # index in a JSON array, which may be all in one line


class Rows(NamedTuple):
    """A source of rows: its name, and where a row of it is."""

    name: str
    rows: Iterable[Row]
    lines: bool  # whether numbers are lines of a file

    def place(self, number: int) -> str:
        """Where a row is: `data.jsonl:7`, or `data.parquet, row 7`."""
        return f"{self.name}:{number}" if self.lines else f"{self.name}, row {number}"


def open_rows(source) -> Rows:
    """The rows of a file, or of an object in memory.

    Args:
        source: the path of a file with one of the suffixes in `FILES` (all but
            `.parquet` may be followed by `.gz`); a dict of columns, or of one row; a
            DataFrame; an iterable of rows, such as a list or a Hugging Face dataset.

    Raises:
        DataError: there is no such file, or it is of no kind that is read.
        TypeError: `source` is nothing that has rows.
        ImportError: a `.parquet` file, and pyarrow is not installed.
    """
    if isinstance(source, str | os.PathLike):
        return _open_file(pathlib.Path(source).expanduser(), source)
    name = f"the {type(source).__name__}"
    if is_frame(source):
        source = {column: list(source[column]) for column in source.columns}
    if isinstance(source, dict):
        return Rows(name, _dict_rows(source, name), False)
    if isinstance(source, bytes) or not isinstance(source, Iterable):
        raise TypeError(
            "Examples come from the path of a file, a list, a dict of columns or a "
            f"dataset, got {type(source).__name__}: {source!r:.80}."
        )
    return Rows(name, (Row(*pair) for pair in enumerate(source)), False)


def is_frame(value) -> bool:
    """Whether this is a DataFrame, which iterates over the names of its columns."""
    return hasattr(value, "columns") and hasattr(value, "to_dict")


def names_file(text: str) -> bool:
    """Whether a string is the path of a file rather than a text to learn.

    It is if there is such a file, or if it ends as the names of `FILES` do.
    """
    if "\n" in text:
        return False
    ending = text.lower().removesuffix(".gz")
    return ending.endswith(FILES) or os.path.exists(os.path.expanduser(text))


def is_broken(text: str) -> bool:
    """Whether text holds what is no Unicode, such as bytes that are not UTF-8."""
    return not text.isascii() and _BROKEN.search(text) is not None


def _dict_rows(columns: dict, name: str) -> Iterator[Row]:
    """Rows of a dict of columns; one row if it is a row itself."""
    values = list(columns.values())
    if columns and all(_has_rows(value) for value in values):
        first = next(iter(columns))
        raise DataError(
            f"{name} has splits ({', '.join(map(str, columns))}): pass one of them, "
            f"such as data[{first!r}]."
        )
    columns = {key: _plain(value) for key, value in columns.items()}
    values = list(columns.values())
    rows = _rows_inside(values)
    if rows is not None:
        return (Row(*pair) for pair in enumerate(rows))
    if not values or not all(isinstance(value, list | tuple) for value in values):
        return iter([Row(0, columns)])
    if any(value and is_message(value[0]) for value in values):
        return iter([Row(0, columns)])
    lengths = {key: len(v) for key, v in zip(columns, values, strict=True)}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{key}: {length}" for key, length in lengths.items())
        raise DataError(f"{name}: its columns differ in length ({listed}).")
    rows = zip(*values, strict=True)
    return (Row(i, dict(zip(columns, row, strict=True))) for i, row in enumerate(rows))


def _plain(value):
    """A column without arrays, tensors and bytes, which TensorFlow has for text."""
    if hasattr(value, "numpy"):
        value = value.numpy()
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list) and value and isinstance(value[0], bytes):
        return [cell.decode("utf-8", "surrogateescape") for cell in value]
    return value


def _has_rows(value) -> bool:
    """Whether this is a dataset by itself, as the splits of a `DatasetDict` are."""
    return hasattr(value, "column_names") and hasattr(value, "__iter__")


def _rows_inside(values: list) -> list | None:
    """The list of rows that is all there is in a dict, as in `{"data": [...]}`."""
    if len(values) != 1 or not isinstance(values[0], list) or not values[0]:
        return None
    first = values[0][0]
    return values[0] if isinstance(first, dict) and not is_message(first) else None


def is_message(value) -> bool:
    """Whether this is a message of a chat, rather than a row with columns."""
    return isinstance(value, dict) and bool({"role", "from"} & value.keys())


def _open_file(path: pathlib.Path, given) -> Rows:
    if len(str(path)) > 1000 or "\n" in str(path):
        raise DataError(
            f"A string is the path of a file, got {str(given)!r:.60}: pass texts as a "
            "list of strings."
        )
    if path.is_dir():
        raise DataError(f"{path} is a directory: name a file in it.")
    if not path.exists():
        raise DataError(f"{path}: there is no such file.")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes[-1:] == [".gz"]
    kind = (suffixes[:-1] if packed else suffixes)[-1:]
    if kind == [".parquet"] and not packed:
        return Rows(path.name, _parquet_rows(path), False)
    readers = {
        ".jsonl": _json_lines,
        ".ndjson": _json_lines,
        ".json": _json_rows,
        ".csv": _csv_rows,
        ".tsv": _csv_rows,
        ".txt": _text_blocks,
    }
    if not kind or kind[0] not in readers:
        raise DataError(
            f"{path}: data is read from files whose names end with "
            f"{', '.join(FILES)}, or these with .gz; rename or convert it."
        )
    return Rows(path.name, _text_rows(path, packed, readers[kind[0]]), True)


def _text_rows(path, packed, reader) -> Iterator[Row]:
    """The rows that `reader` finds in a text file, once it is known to be one."""
    opener = gzip.open if packed else open
    try:
        with opener(path, "rb") as file:
            head = file.read(4)
        if head.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise DataError(f"{path} is UTF-16: save it as UTF-8.")
        if not head:
            raise DataError(f"{path} is empty.")
        settings = {"encoding": "utf-8-sig", "errors": "surrogateescape"}
        if reader is _csv_rows:
            settings["newline"] = ""
        with opener(path, "rt", **settings) as file:
            yield from reader(file, path)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged: {error}.") from error


def _json_lines(file, path) -> Iterator[Row]:
    del path
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        if is_broken(line):
            yield Row(number, fault="it is not UTF-8")
            continue
        try:
            yield Row(number, json.loads(line.rstrip("\n")))
        except json.JSONDecodeError as error:
            yield Row(number, fault=f"not JSON: {error.msg} at column {error.colno}")
        except RecursionError:
            yield Row(number, fault="its JSON is nested too deeply")


def _json_rows(file, path) -> Iterator[Row]:
    """Rows of an array, of a dict of columns, or of lines that are JSON each."""
    # Not the first line: an array may be all in one.
    start = file.read(_CHUNK).lstrip()
    file.seek(0)
    if start.startswith("["):
        yield from _array_rows(file, path)
        return
    lines = (line for line in file if line.strip())
    first, more = next(lines, ""), next(lines, None)
    file.seek(0)
    whole = more is None
    if not whole:
        # A whole object in the first line: there is one in each.
        try:
            json.loads(first)
        except (json.JSONDecodeError, RecursionError):
            whole = True
    yield from (_object_rows if whole else _json_lines)(file, path)


def _object_rows(file, path) -> Iterator[Row]:
    try:
        whole = json.load(file)
    except (json.JSONDecodeError, RecursionError) as error:
        place = getattr(error, "lineno", 1)
        reason = getattr(error, "msg", "nested too deeply")
        raise DataError(f"{path.name}:{place}: not JSON: {reason}.") from None
    if not isinstance(whole, dict):
        raise DataError(f"{path.name}: expected a list of rows, got {whole!r:.60}.")
    for row in _dict_rows(whole, path.name):
        yield row._replace(number=row.number + 1)


def _array_rows(file, path) -> Iterator[Row]:
    """Elements of a JSON array, each as soon as it has been read."""
    decoder = json.JSONDecoder()
    text = _Window(file, path.name)
    text.skip("[")
    item = 0
    while True:
        comma = text.skip(",") if item else None
        if text.skip("]"):
            if comma:
                yield Row(text.line, fault="a comma with nothing behind it", item=item)
            break
        line, fault, value = text.line, None, None
        try:
            value, size = text.decode(decoder)
        except (json.JSONDecodeError, RecursionError) as error:
            size = text.end_of_element()
            fault = f"not JSON: {getattr(error, 'msg', 'nested too deeply')}"
            at = line + text.lines_before(getattr(error, "pos", 0))
            fault += f" in line {at}" * (at > line)
        if comma is False:
            fault = "there is no comma in front of it"
        yield Row(line, value, fault, item)
        text.drop(size)
        item += 1
    if not text.at_end():
        raise DataError(
            f"{path.name}:{text.line}: there is more behind the end of the list: keep "
            "one list, or one value a line and the name .jsonl."
        )


class _Window:
    """A stretch of a text file that grows as far as it has to.

    Attributes:
        buffer: what is in view.
        position: where in it is what is to be read next.
        line: the line which that is in, from 1.
    """

    # A string, as far as it goes, or a bracket or comma outside of strings.
    _MARK = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*("?)|[\[\]{},]', re.DOTALL)
    _SPACE = re.compile(r"\s*")
    _PAIRS: ClassVar = {"]": "[", "}": "{"}

    def __init__(self, file, name):
        self.file, self.name = file, name
        self.buffer, self.position, self.line = file.read(_CHUNK), 0, 1

    def lines_before(self, position) -> int:
        """Ends of lines between what is to be read next and a position."""
        return self.buffer.count("\n", self.position, position)

    def drop(self, size):
        """Go on behind the next `size` characters."""
        self.line += self.lines_before(self.position + size)
        self.position += size

    def grow(self) -> bool:
        """Read more of the file; whether there was any. Doubling keeps this linear."""
        more = self.file.read(max(_CHUNK, len(self.buffer) - self.position))
        if more:
            self.buffer, self.position = self.buffer[self.position :] + more, 0
        return bool(more)

    def at_end(self) -> bool:
        """Whether nothing but white space follows, which is dropped."""
        while True:
            end = self._SPACE.match(self.buffer, self.position).end()
            self.drop(end - self.position)
            if self.position < len(self.buffer):
                return False
            if not self.grow():
                return True

    def skip(self, mark) -> bool:
        """Whether `mark` is what comes next, behind white space; both are dropped."""
        if self.at_end() or self.buffer[self.position] != mark:
            return False
        self.drop(1)
        return True

    def decode(self, decoder):
        """`(value, size)` of the JSON value that comes next.

        Raises:
            JSONDecodeError, RecursionError: it is none, and is in view as a whole or
                as far as the file goes.
        """
        while True:
            try:
                value, end = decoder.raw_decode(self.buffer, self.position)
            except (json.JSONDecodeError, RecursionError):
                # Perhaps it goes on where the buffer ends.
                if self._scan() is not None or not self.grow():
                    raise
                continue
            # A number may go on, too.
            if end < len(self.buffer) or not self.grow():
                return value, end - self.position

    def end_of_element(self) -> int:
        """The length of the broken element that comes next.

        Raises:
            DataError: its brackets or quotes do not say where it ends.
        """
        size = self._scan()
        if size is None:
            raise self._endless("it is never closed")
        return size

    def _scan(self) -> int | None:
        """Length of the element that comes next, None if it goes on out of view."""
        open_brackets = []
        for mark in self._MARK.finditer(self.buffer, self.position):
            sign = mark[0]
            if sign[0] == '"':
                if not mark[1]:
                    return None
            elif sign in "[{":
                open_brackets.append(sign)
            elif not open_brackets:
                return mark.start() - self.position
            elif sign in self._PAIRS:
                if open_brackets.pop() != self._PAIRS[sign]:
                    raise self._endless(f"a {sign!r} in it closes nothing")
                if not open_brackets:
                    return mark.end() - self.position
        return None

    def _endless(self, reason) -> DataError:
        return DataError(
            f"{self.name}:{self.line}: not JSON: of the element that begins here, "
            f"{reason}, so that nobody can say where it ends. Correct it; skip_bad "
            "(--skip-bad) cannot leave it out."
        )


def _csv_rows(file, path) -> Iterator[Row]:
    first = file.readline()
    file.seek(0)
    delimiter = "\t" if ".tsv" in path.name.lower() else ","
    if delimiter not in first and ";" in first:
        delimiter = ";"  # as spreadsheets write it where the comma is decimal
    with _long_fields():
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        header, before = None, 0
        while True:
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                fault = _csv_fault(error, before + 1, reader.line_num, path)
                if header is None:
                    raise DataError(f"{path.name}:{before + 1}: {fault}.") from None
                # The reader goes on in the next line.
                yield Row(before + 1, fault=fault)
                before = reader.line_num
                continue
            number, before = before + 1, reader.line_num
            if header is None:
                header = _checked_header(fields, path)
            elif fields and len(fields) != len(header):
                fault = f"it has {len(fields)} fields, the header {len(header)}"
                yield Row(number, fault=fault)
            elif fields:
                yield Row(number, dict(zip(header, fields, strict=True)))


def _csv_fault(error, first, last, path) -> str:
    """What is wrong with a row that begins in line `first`, found in line `last`.

    Raises:
        DataError: a quote has taken all the rest for its own.
    """
    if "unexpected end" in str(error):
        raise DataError(
            f"{path.name}:{first}: a quote is opened in the row that begins here, and "
            f"never closed: all to the end, in line {last}, would be one field. Close "
            "it, or write each quote inside a field twice; skip_bad (--skip-bad) "
            "cannot leave it out."
        ) from None
    where = f" in line {last}" * (last > first)
    return f"not CSV: {error}{where} (a quote inside a field is written twice)"


@contextlib.contextmanager
def _long_fields():
    """The csv module's limit of 131,072 characters lifted."""
    limit = csv.field_size_limit(_LONGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _checked_header(fields, path):
    names = [field.strip() for field in fields]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise DataError(
            f"{path.name}:1: two columns are called {', '.join(sorted(twice))!r}: the "
            "first line must name the columns."
        )
    return names


def _text_blocks(file, path) -> Iterator[Row]:
    """Documents: blocks of lines, with at least one blank line between them."""
    del path
    block, start = [], 1
    for number, line in enumerate(file, 1):
        if line.strip():
            start = start if block else number
            block.append(line)
        elif block:
            yield Row(start, "".join(block).rstrip("\n"))
            block = []
    if block:
        yield Row(start, "".join(block).rstrip("\n"))


def _parquet_rows(path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            f'{path}: Parquet is read with pyarrow: pip install "gemma_keras[parquet]"'
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for value in batch.to_pylist():
                    yield Row(number, value)
                    number += 1
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from error
