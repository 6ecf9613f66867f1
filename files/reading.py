"""Tables and JSONL files of the user, read by the same rules in every script; what cannot be read is one InputError.

Tables (csv, tsv, jsonl, txt, each also gzipped, and parquet) are read whole, through `datasets`; JSONL is read a line at a time,
so that it may be larger than memory. All are UTF-8, with or without a byte-order mark.
"""

import csv
import gzip
import json
import math
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from files.console import InputError

TABLE_KINDS = {"txt": "text", "csv": "csv", "tsv": "csv", "json": "json", "jsonl": "json", "parquet": "parquet"}
# a column of one of these names is taken for the text where no other is asked for
TEXT_COLUMNS = ("text", "sentence", "sentences", "content", "document", "body", "abstract", "question", "title", "anchor")
NOT_UTF8 = "convert it first, for example with iconv -t utf-8"


def open_text(path: Path, newline: str | None = None) -> IO[str]:
    """A UTF-8 file for reading, decompressed where its name ends in .gz."""
    return (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig", newline=newline)


@contextmanager
def errors_of(path: Path) -> Iterator[None]:
    """Turns what can go wrong while a text file is read into InputError."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 ({error.reason}): {NOT_UTF8}") from None
    except FileNotFoundError:
        raise InputError(f"no file {path}") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path} is damaged: {error}") from None


def read_jsonl(path: Path) -> Iterator[tuple[int, dict]]:
    """Line number and object of every line of a JSONL file that is not blank.

    Raises InputError, with the line, for what is no JSON object.
    """
    with errors_of(path), open_text(path) as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{path}, line {number}: not JSON ({error.msg})") from None
            except (ValueError, RecursionError) as error:  # thousands of digits or brackets
                raise InputError(f"{path}, line {number}: cannot be read ({str(error)[:80]})") from None
            if not isinstance(row, dict):
                raise InputError(f"{path}, line {number}: needs a JSON object, has {line.strip()[:80]}")
            yield number, row


def read_documents(path: Path) -> list[str]:
    """The documents of a text file, separated by blank lines. Raises InputError where the file cannot be read."""
    with errors_of(path), open_text(path) as f:
        documents = [document.strip() for document in re.split(r"\n\s*\n", f.read())]
    return [document for document in documents if document]


def read_table(path: Path) -> list[dict]:
    """Rows of a txt, csv, tsv, jsonl (each also .gz) or parquet file; cells of csv and tsv are strings as they stand.

    A txt file has the one column `text`, a line each. Raises InputError for what cannot be read, and for a file without rows.
    """
    from datasets import Features, Value, load_dataset
    from datasets.exceptions import DatasetGenerationError
    from datasets.utils.logging import set_verbosity_error

    set_verbosity_error()
    if not path.is_file():
        raise InputError(f"no file {path}")
    suffix = "".join(s for s in path.suffixes[-2:] if s != ".gz").lower().rpartition(".")[2]
    if suffix not in TABLE_KINDS:
        raise InputError(f"{path}: unknown kind of file, take one of .{', .'.join(TABLE_KINDS)} (all but parquet may be gzipped)")
    kind = TABLE_KINDS[suffix]
    options = {"encoding": "utf-8-sig"} if kind in ("text", "csv") else {}
    try:
        if kind == "csv":  # "NA" is a text and "007" a label: no type is guessed
            options |= {"sep": "\t" if suffix == "tsv" else ",", "keep_default_na": False}
            with open_text(path, newline="") as f:
                header = next(csv.reader(f, delimiter=options["sep"]), [])
            options["features"] = Features({name: Value("string") for name in header})
        rows = list(load_dataset(kind, data_files=str(path), split="train", streaming=True, **options))
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.start}): {NOT_UTF8}") from None
    except (DatasetGenerationError, ValueError, OSError, EOFError, StopIteration, zlib.error) as error:
        raise InputError(f"cannot read {path}: {' '.join(str(error).split())[:200] or 'it is empty'}") from None
    if not rows:
        raise InputError(f"{path} is empty")
    return rows


def read_column(rows: list[dict], name: str, path: Path, kind: type) -> list:
    """One column of a table as str or float. Only a text or title may be empty. Raises InputError naming the row."""
    values = []
    for i, cells in enumerate(rows, 1):
        value = "" if cells.get(name) is None else cells[name]
        if value == "" and not name.startswith(("text", "title")):
            raise InputError(f"{path}, row {i}: {name} is empty")
        try:
            values.append(kind(value))
        except (ValueError, TypeError):
            raise InputError(f"{path}, row {i}: {name} is {value!r}, which is not a number") from None
        if kind is float and not math.isfinite(values[-1]):
            raise InputError(f"{path}, row {i}: {name} is {value!r}, which is not a finite number")
    return values


def read_texts(path: Path, column: str | None = None) -> tuple[list[tuple[str, str]], str]:
    """(source, text) of every row with a text, source being FILE:ROW; and a line that says which column was taken.

    column     None: the one that is plainly the text, see TEXT_COLUMNS
    Raises InputError for what cannot be read and where no column is plainly the text.
    """
    rows = read_table(path)
    columns = list(rows[0])
    strings = [name for name in columns if any(isinstance(row.get(name), str) for row in rows[:100])]
    guess = next((name for name in TEXT_COLUMNS if name in strings), strings[0] if len(strings) == 1 else None)
    chosen = column or guess
    if chosen not in columns:
        raise InputError(f"{path}: no column {column or 'that is plainly the text'}; it has {', '.join(columns)}: name one with --column")
    texts = [
        (f"{path.name}:{i}", row[chosen].strip())
        for i, row in enumerate(rows, 1)
        if isinstance(row.get(chosen), str) and row[chosen].strip()
    ]
    if not texts:
        raise InputError(f"{path}: column {chosen} holds no text")
    how = "as asked" if column else "guessed"
    return texts, f"{path}: {len(texts)} texts in column {chosen!r} ({how}), {len(rows) - len(texts)} empty rows left out"
