"""Rows of the user's files, read by the same rules in every script; what cannot be read is one InputError.

    csv, tsv       the first line names the columns; cells are strings as they stand, in quotes (") where they hold a separator, a
                   quote or a line break. A csv is separated by commas, or by semicolons where its first line has no comma
    txt            one column `text`, a line each
    jsonl, json    an object a line (also .ndjson); json may also be one array of objects
    parquet

All but parquet may be gzipped (.gz), and are UTF-8 with or without a byte-order mark. Blank lines of csv and jsonl are skipped.
`-` is standard input: JSONL where its first line that is not blank begins with `{`, csv or tsv where that line names a known column,
such as text or label, beside others, else a text a line. Files are read a row at a time (a JSON array at once), so that they may be
larger than memory.
"""

import contextlib
import csv
import gzip
import io
import itertools
import json
import math
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from files.console import InputError

KINDS = ("txt", "csv", "tsv", "jsonl", "ndjson", "json", "parquet")
STDIN = Path("-")
PARQUET_BATCH = 1024  # rows
# a column of one of these names is taken for the text where no other is asked for
TEXT_COLUMNS = ("text", "sentence", "sentences", "content", "document", "body", "abstract", "question", "title", "anchor")
KNOWN_COLUMNS = {*TEXT_COLUMNS, "label", "text1", "positive"}
GUESSED_FROM = 100  # rows that say which columns there are, and which of them is the text
CSV_ERRORS = {
    "unexpected end of data": "a quote in this row is never closed",
    "expected after": "a quoted cell goes on after its closing quote: write quotes inside a cell twice",
}

Row = tuple[str, dict]  # its place, such as "mine.csv, line 3" or "t.parquet, row 3", and its cells by column
Lines = Iterator[tuple[int, str]]


# ---------------------------------------------------------------------------------------------------------------- files


def display_name(path: Path) -> str:
    return "standard input" if path == STDIN else str(path)


def excerpt(value: object, length: int = 80) -> str:
    """The beginning of a value on one line, printable whatever it holds."""
    return " ".join(str(value)[: 2 * length].encode(errors="backslashreplace").decode().split())[:length]


@contextlib.contextmanager
def errors_of(path: Path) -> Iterator[None]:
    """Turns what can go wrong while a file is opened and decompressed into InputError."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"no file {path}") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder: name a file") from None
    except PermissionError:
        raise InputError(f"no permission to read {path}") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path} is damaged, or no gzip file: {error}") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None


def file_kind(path: Path) -> str:
    """One of `KINDS`, by the file's name. Raises InputError for another name, for a folder, and where there is no file."""
    with errors_of(path):
        path.stat()
        if path.is_dir():
            raise IsADirectoryError
    kind = Path(path.name.lower().removesuffix(".gz")).suffix[1:]
    if kind not in KINDS or path.name.lower().endswith(".parquet.gz"):
        raise InputError(f"{path}: unknown kind of file, take one of .{', .'.join(KINDS)} (all but parquet may be gzipped)")
    return kind


def open_text(path: Path, newline: str | None) -> IO[str]:
    """A file or standard input as text; bytes that are not UTF-8 become halves of surrogate pairs."""
    options = {"encoding": "utf-8-sig", "errors": "surrogateescape", "newline": newline}
    if path == STDIN:
        return io.TextIOWrapper(open(sys.stdin.fileno(), "rb", closefd=False), **options)
    return (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rt", **options)


def read_lines(path: Path, newline: str | None = None, opened: list[IO[str]] | None = None) -> Lines:
    """Number and text of every line. Raises InputError for a file that cannot be read, is not UTF-8, or holds a NUL byte.

    opened     receives the open file, whose place says how much of it has been read
    """
    with errors_of(path), open_text(path, newline) as f:
        if opened is not None:
            opened.append(f)
        for number, line in enumerate(f, 1):
            if "\0" in line:
                raise InputError(f"{display_name(path)}, line {number}: holds a NUL byte: is this UTF-16, or no text?")
            if not line.isascii() and not is_encodable(line):
                convert = "convert it first, for example with iconv -t utf-8"
                raise InputError(f"{display_name(path)} is not UTF-8 (line {number}): {convert}")
            yield number, line


def is_encodable(text: str) -> bool:
    """Whether a text can be written as UTF-8: it holds no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_documents(path: Path) -> list[str]:
    """The documents of a text file, separated by blank lines. Raises InputError where the file cannot be read."""
    documents = re.split(r"\n\s*\n", "".join(line for _, line in read_lines(path)))
    return [document.strip() for document in documents if document.strip()]


# ----------------------------------------------------------------------------------------------------------------- rows


def read_rows(path: Path, notes: list[str] | None = None, opened: list[IO[str]] | None = None, start: int = 0) -> Iterator[Row]:
    """Every row of a file or of standard input, see the top of this module.

    notes      receives what was noticed on the way: the semicolons of a csv
    opened     receives the open file where rows are read from it one at a time: not a parquet, not a JSON array
    start      rows to leave out at the beginning; those of a parquet are not even read
    Raises InputError, with the place, for what cannot be read, and for a file without rows.
    """
    kind, name = "stdin" if path == STDIN else file_kind(path), display_name(path)
    if kind == "parquet":
        rows = parquet_rows(path, start)
    else:
        first, lines = peek(read_lines(path, "" if kind in ("csv", "tsv") else None, opened))
        if kind in ("csv", "tsv"):
            unquoted = re.sub(r'"[^"]*"', "", first)
            delimiter = "\t" if kind == "tsv" else ";" if ";" in unquoted and "," not in unquoted else ","
            if delimiter == ";" and notes is not None:
                notes.append("separated by semicolons")
            rows = csv_rows(name, lines, delimiter)
        elif kind == "stdin" and (delimiter := header_delimiter(first)):
            rows = csv_rows(name, lines, delimiter)
        elif kind == "txt" or (kind == "stdin" and not first.startswith("{")):
            rows = ((f"{name}, line {number}", {"text": line.rstrip("\n")}) for number, line in lines)
        elif kind == "json" and first.startswith("["):
            rows = array_rows(name, lines)
            if opened:
                opened.clear()
        else:
            rows = jsonl_rows(name, lines)
        rows = itertools.islice(rows, start, None)
    row = None
    for row in rows:
        yield row
    if row is None and not start:
        raise InputError(f"{name} is empty" + (" below its first line" if kind in ("csv", "tsv") and first else ""))


def peek(lines: Lines) -> tuple[str, Lines]:
    """The first line that is not blank, without the space around it ("" where there is none), and all lines."""
    head = []
    for number, line in lines:
        head.append((number, line))
        if line.strip():
            break
    return head[-1][1].strip() if head else "", itertools.chain(head, lines)


def header_delimiter(first: str) -> str | None:
    """What separates the cells of a first line that names a known column, else None."""
    cells = {delimiter: [cell.strip('" ') for cell in first.split(delimiter)] for delimiter in ",;\t"}
    return next((delimiter for delimiter, names in cells.items() if len(names) > 1 and KNOWN_COLUMNS & set(names)), None)


def csv_rows(name: str, lines: Lines, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader((line for _, line in lines), delimiter=delimiter, strict=True)
    columns = None
    while True:
        place = f"{name}, line {reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            why = next((why for part, why in CSV_ERRORS.items() if part in str(error)), str(error))
            raise InputError(f"{place}: {why}") from None
        if not cells or (len(cells) == 1 and cells[0].isspace()):  # a blank line
            continue
        if columns is None:
            columns = cells
            check_columns(columns, place)
        elif len(cells) != len(columns):
            raise InputError(f"{place}: has {len(cells)} of the header's {len(columns)} cells: is a quote missing, or one too many?")
        else:
            cells = dict(zip(columns, cells, strict=True))
            cells.pop("", None)
            yield place, cells


def check_columns(columns: list[str], place: str) -> None:
    repeated = [column for column, count in Counter(columns).items() if count > 1]
    if "" in columns[1:]:  # a nameless first one is an index that pandas wrote
        raise InputError(f"{place}: column {columns.index('', 1) + 1} has no name: name it, or take it out")
    if repeated:
        raise InputError(f"{place}: two columns are called {excerpt(repeated[0])}: rename one")


def parse_json(text: str, name: str, number: int) -> object:
    """The value of JSON text that begins in line `number`."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{name}, line {number + error.lineno - 1}: not JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:  # thousands of digits or brackets
        raise InputError(f"{name}, line {number}: cannot be read ({excerpt(error)})") from None


def checked_object(value: object, place: str) -> dict:
    if not isinstance(value, dict):
        raise InputError(f"{place}: needs a JSON object, has {excerpt(json.dumps(value))}")
    return value


def jsonl_rows(name: str, lines: Lines) -> Iterator[Row]:
    for number, line in lines:
        if line.strip():
            place = f"{name}, line {number}"
            yield place, checked_object(parse_json(line.rstrip(), name, number), place)


def array_rows(name: str, lines: Lines) -> Iterator[Row]:
    for number, value in enumerate(parse_json("".join(line for _, line in lines), name, 1), 1):
        place = f"{name}, row {number}"
        yield place, checked_object(value, place)


def parquet_length(path: Path) -> int:
    """Rows of a parquet file that can be read, as it says itself."""
    from pyarrow.parquet import read_metadata

    with errors_of(path):
        return read_metadata(path).num_rows


def parquet_rows(path: Path, start: int = 0) -> Iterator[Row]:
    """Rows from number `start` on, counted from 0; groups of rows before it are not read."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    number = 0
    with errors_of(path), open(path, "rb") as f:
        try:
            file = ParquetFile(f)
            check_columns(file.schema_arrow.names, str(path))
            lengths = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            ends = list(itertools.accumulate(lengths))
            groups = [i for i, end in enumerate(ends) if end > start]
            number = ends[groups[0]] - lengths[groups[0]] if groups else 0
            for batch in file.iter_batches(PARQUET_BATCH, row_groups=groups):
                before = min(max(0, start - number), len(batch))
                number += before
                for cells in batch.slice(before).to_pylist():
                    number += 1
                    yield f"{path}, row {number}", cells
        except InputError:
            raise
        except (pa.ArrowException, OSError, ValueError, OverflowError):
            where = f"is damaged after row {number}" if number else "is damaged, or no parquet file"
            raise InputError(f"{path} {where}: write it again") from None


# -------------------------------------------------------------------------------------------------------------- columns


def column_names(rows: list[Row]) -> list[str]:
    """The columns of all rows, in order of appearance: objects of JSONL need not have the same ones."""
    return list(dict.fromkeys(itertools.chain.from_iterable(cells for _, cells in rows)))


def describe(value: object) -> str:
    """What a cell holds that is no string."""
    names = {type(None): "missing", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), f"of type {type(value).__name__}")


def as_text(value: object) -> str:
    """A cell's text, which may be empty. Like the next two, raises ValueError saying what it is instead."""
    if not isinstance(value, str):
        raise ValueError(f"is {describe(value)}, not a string")
    if not is_encodable(value):
        raise ValueError("holds half a surrogate pair, which cannot be written as UTF-8")
    return value


def as_label(value: object) -> str:
    """A label as a string."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"is {value}")
    if value is None or value == "":
        raise ValueError("is empty")
    return str(value) if isinstance(value, (bool, int, float)) else as_text(value)


def as_number(value: object) -> float:
    """A finite number."""
    if value is None or value == "":
        raise ValueError("is empty")
    try:
        number = float(value)
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"is {excerpt(repr(value))}, which is not a number") from None
    if not math.isfinite(number):
        raise ValueError(f"is {value!r}, which is not a finite number")
    return number


def read_column(rows: list[Row], name: str, convert: Callable[[object], str | float]) -> list:
    """One column through `as_text`, `as_label` or `as_number`. Raises InputError with the place and the column."""
    values = []
    for place, cells in rows:
        try:
            values.append(convert(cells.get(name)))
        except ValueError as error:
            raise InputError(f"{place}: {name} {error}") from None
    return values


def left_out(what: str, reasons: Counter[str]) -> str:
    """How many were left out and why: "3 rows left out: 2 without text, 1 whose text is a number"."""
    n = reasons.total()
    return f"{n} {what}{'s' * (n != 1)} left out: " + ", ".join(f"{count} {reason}" for reason, count in reasons.items())


class Table:
    """The rows of a file, read one at a time: iterate once. Its columns are those of the first GUESSED_FROM rows.

    rows       all rows
    head       the first GUESSED_FROM of them
    notes      what was seen while reading, a line each
    reasons    of rows that were left out
    """

    def __init__(self, path: Path):
        self.name, self.reasons, self.notes, self.n_texts = display_name(path), Counter(), [], 0
        self._file, self._opened = "stdin" if path == STDIN else path.name, []
        rows = read_rows(path, self.notes, self._opened)
        self.head = list(itertools.islice(rows, GUESSED_FROM))
        self._length = parquet_length(path) if path != STDIN and file_kind(path) == "parquet" else None
        self.columns = column_names(self.head)
        self.rows = itertools.chain(self.head, rows)

    def check_column(self, column: str | None, flag: str) -> None:
        """Raise InputError where the file has no such column."""
        if column not in self.columns:
            missing = f"no column {column or 'that is plainly the text'}; it has {excerpt(', '.join(self.columns), 200)}"
            raise InputError(f"{self.name}: {missing}: name {flag}")

    def expected_rows(self, n_read: int) -> int | None:
        """About how many rows the file has, when `n_read` of them have been read, by their bytes; a parquet knows exactly.

        None where nobody can tell: a pipe, a JSON array.
        """
        if self._length is not None or not self._opened:
            return self._length
        if (f := self._opened[0]).closed:
            return n_read
        with contextlib.suppress(OSError):  # a pipe has no place
            return n_read * os.fstat(f.fileno()).st_size // max(1, os.lseek(f.fileno(), 0, os.SEEK_CUR))
        return None

    def texts(self, columns: list[str]) -> Iterator[tuple[str, list[str]]]:
        """(source, the texts of these columns) of every row that has them all, source being FILE:ROW.

        Raises InputError for what cannot be read, and at the end where no row has them all.
        """
        for i, (_, cells) in enumerate(self.rows, 1):
            values = [cells.get(column) for column in columns]
            try:
                texts = ["" if value is None else as_text(value).strip() for value in values]
            except ValueError as error:
                self.reasons[f"whose text {str(error).partition(',')[0]}"] += 1
                continue
            if all(texts):
                self.n_texts += 1
                yield f"{self._file}:{i}", texts
            else:
                self.reasons["without text"] += 1
        if not self.n_texts:
            one = len(columns) == 1
            nothing = f"column {excerpt(columns[0])} holds no text" if one else f"no row has a text in {' and '.join(columns)}"
            raise InputError(f"{self.name}: {nothing}; {left_out('row', self.reasons)}")

    def summary(self, what: str) -> str:
        """A line that says what was taken and left out so far."""
        line = ", ".join([f"{self.name}: {self.n_texts} {what}", *self.notes])
        return line + (f"; {left_out('row', self.reasons)}" if self.reasons else "")


class TextStream:
    """(source, text) of every row with a text, as `Table.texts` has them: iterate over it once.

    column     None: the one that is plainly the text, see TEXT_COLUMNS, judged by the first GUESSED_FROM rows
    others     further columns of texts, where the column is guessed
    Raises InputError where no column is plainly the text.
    """

    def __init__(self, path: Path, column: str | None = None):
        self.table = Table(path)
        strings = [c for c in self.table.columns if any(isinstance(cells.get(c), str) for _, cells in self.table.head)]
        guess = next((c for c in TEXT_COLUMNS if c in strings), strings[0] if len(strings) == 1 else None)
        self.column, self.name = column or guess, self.table.name
        self.table.check_column(self.column, "one with --column")
        self.others = [] if column else [c for c in strings if c != guess and (c in TEXT_COLUMNS or self._is_prose(c))]
        self.choice = f"column {self.column!r} ({'as asked' if column else 'guessed'})"
        if path != STDIN and file_kind(path) == "txt":
            self.choice = "its lines"

    def _is_prose(self, column: str) -> bool:
        """Whether most rows of the head have three words or more in this column."""
        values = [cells.get(column) for _, cells in self.table.head]
        return 2 * sum(isinstance(value, str) and len(value.split()) >= 3 for value in values) > len(values)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return ((source, text) for source, (text,) in self.table.texts([self.column]))

    def summary(self) -> str:
        """A line that says what was taken and left out so far."""
        return self.table.summary(f"texts in {self.choice}")


def read_texts(path: Path, column: str | None = None) -> tuple[list[tuple[str, str]], str]:
    """All texts of a `TextStream`, and its line that says what was taken and left out."""
    stream = TextStream(path, column)
    return list(stream), stream.summary()
