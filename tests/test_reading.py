"""Rows of every kind of file, what is said about files that cannot be read, and columns of texts, labels and numbers."""

import gzip
import itertools
import json
import math
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from files.console import InputError
from files.reading import Table, TextStream, as_label, as_number, as_text, errors_of, read_column, read_documents, read_rows, read_texts
from tasks import mteb_tasks
from training.pair_data import read_pairs
from training.validation import read_labelled

KINDS = ("txt", "txt.gz", "csv", "csv.gz", "tsv", "jsonl", "jsonl.gz", "json", "parquet")


def encode_rows(rows: list[dict], kind: str) -> bytes:
    """Rows as the bytes of a file; cells of csv and tsv are quoted, txt has a text a line."""
    kind, _, gz = kind.partition(".")
    if kind == "parquet":
        import pyarrow as pa
        from pyarrow.parquet import write_table

        write_table(pa.Table.from_pylist(rows), sink := pa.BufferOutputStream())
        return sink.getvalue().to_pybytes()
    if kind == "txt":
        body = "\n".join(row["text"] for row in rows)
    elif kind == "json":
        body = json.dumps(rows, indent=1)
    elif kind == "jsonl":
        body = "".join(json.dumps(row) + "\n" for row in rows)
    else:
        separator = {"csv": ",", "tsv": "\t"}[kind]
        body = separator.join(rows[0]) + "\n" + "".join(separator.join(f'"{cell}"' for cell in row.values()) + "\n" for row in rows)
    return gzip.compress(body.encode(), mtime=0) if gz else body.encode()


def write(path: Path, content: bytes | str) -> Path:
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def only_line(error: pytest.ExceptionInfo, path: Path) -> bool:
    return len(str(error.value).splitlines()) == 1 and str(path) in str(error.value)


# ---------------------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_read_from_every_kind_of_file(tmp_path, kind):
    texts = [f"The number {i} has a text, quite long, with commas and all that: naïve 犬." for i in range(5)]
    (path := tmp_path / f"t.{kind}").write_bytes(encode_rows([{"id": i, "text": text} for i, text in enumerate(texts)], kind))
    rows, summary = read_texts(path)
    assert rows == [(f"t.{kind}:{i}", text) for i, text in enumerate(texts, 1)]
    where = "its lines" if kind.startswith("txt") else "column 'text' (guessed)"
    assert summary == f"{path}: 5 texts in {where}"


def test_a_row_comes_with_its_place(tmp_path):
    for name, content, expected in (
        ("t.csv", 'a,b\r\n\r\n1,"x\r\ny"\r\n   \r\n2,"say ""hi"""\r\n', [(3, {"a": "1", "b": "x\r\ny"}), (6, {"a": "2", "b": 'say "hi"'})]),
        ("t.csv.gz", "a;b\n1;x, y\n", [(2, {"a": "1", "b": "x, y"})]),
        ("u.csv", '"a;b",c\n1,2\n', [(2, {"a;b": "1", "c": "2"})]),
        ("v.csv", 'text\n""\nNA\n007\n', [(2, {"text": ""}), (3, {"text": "NA"}), (4, {"text": "007"})]),
        ("pandas.csv", ",text\n0,a\n", [(2, {"text": "a"})]),
        ("t.tsv", "a\tb\n\t\n1\tx;y\n", [(2, {"a": "", "b": ""}), (3, {"a": "1", "b": "x;y"})]),
        ("t.txt", "a\r\n\r\n b ", [(1, {"text": "a"}), (2, {"text": ""}), (3, {"text": " b "})]),
        ("t.jsonl", '\n{"a": 1}\n  \n{"b": [null]}', [(2, {"a": 1}), (4, {"b": [None]})]),
        ("t.JSON.GZ", '\n{"a": 1}\n{"a": 2}\n', [(2, {"a": 1}), (3, {"a": 2})]),
    ):
        for mark in ("", "\ufeff"):
            path = write(tmp_path / name.replace("GZ", "gz"), mark + content)
            path = path.rename(tmp_path / name)
            assert list(read_rows(path)) == [(f"{path}, line {number}", cells) for number, cells in expected], name
    path = write(tmp_path / "array.json", '[\n{"a": 1},\n{"a": 2}]')
    assert list(read_rows(path)) == [(f"{path}, row 1", {"a": 1}), (f"{path}, row 2", {"a": 2})]


def test_parquet_is_read_in_batches(tmp_path, monkeypatch):
    monkeypatch.setattr("files.reading.PARQUET_BATCH", 2)
    (path := tmp_path / "t.parquet").write_bytes(encode_rows([{"a": i, "b": [str(i)]} for i in range(5)], "parquet"))
    assert list(read_rows(path)) == [(f"{path}, row {i + 1}", {"a": i, "b": [str(i)]}) for i in range(5)]


def test_rows_are_read_one_at_a_time(tmp_path):
    """What is wrong at the end of a file is noticed at its end."""
    for name, content in (("t.csv", "a\n1\n2,3\n"), ("t.jsonl", '{"a": "1"}\n{'), ("t.csv.gz", "a\n1\n2,3\n")):
        rows = read_rows(write(tmp_path / name, content))
        assert next(rows)[1] == {"a": "1"}
        with pytest.raises(InputError):
            next(rows)


def test_standard_input_is_jsonl_or_a_text_a_line(tmp_path, monkeypatch):
    def read(content: bytes) -> list:
        with open(write(tmp_path / "stdin", content), encoding="ascii") as f:
            monkeypatch.setattr(sys, "stdin", f)
            return list(read_rows(Path("-")))

    assert read(b'\xef\xbb\xbf\n {"a": 1}\n') == [("standard input, line 2", {"a": 1})]
    assert read(b'id;text\n1;"a\nb"\n') == [("standard input, line 2", {"id": "1", "text": "a\nb"})]
    assert read("naïve\n[1]\n".encode()) == [("standard input, line 1", {"text": "naïve"}), ("standard input, line 2", {"text": "[1]"})]
    with open(tmp_path / "stdin", "rb") as f:
        monkeypatch.setattr(sys, "stdin", f)
        texts, summary = read_texts(Path("-"))
    assert texts == [("stdin:1", "naïve"), ("stdin:2", "[1]")] and summary.startswith("standard input: 2 texts")
    for content, message in (
        (b"", "standard input is empty"),
        (b"\xff", "standard input is not UTF-8"),
        (b"{", "standard input, line 1: not"),
    ):
        with pytest.raises(InputError, match=message):
            read(content)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "", "is empty$"),
        ("t.csv", "\n\n", "is empty$"),
        ("t.csv", "text\n", "is empty below its first line"),
        ("t.txt", "", "is empty$"),
        ("t.jsonl.gz", "\n", "is empty$"),
        ("t.json", "[]", "is empty$"),
        ("t.csv", "text,label\na,b\nc,d,e\n", r"t\.csv, line 3: has 3 of the header's 2 cells"),
        ("t.csv", "text,label\na,b\n\nc\n", r"t\.csv, line 4: has 1 of the header's 2 cells"),
        ("t.csv", 'text,label\na,b\n"c,d\ne,f\ng,h\n', r"t\.csv, line 3: a quote in this row is never closed"),
        ("t.csv", 'text\n"x\ny"\n"b" c\n', r"t\.csv, line 4: a quoted cell goes on after its closing quote"),
        ("t.tsv", 'text\n"b\n', r"t\.tsv, line 2: a quote"),
        ("t.csv", "text,text\na,b\n", r"t\.csv, line 1: two columns are called text"),
        ("t.csv", "\ntext,\n0,b\n", r"t\.csv, line 2: column 2 has no name"),
        ("t.csv", "text\na\nb\0\n", r"t\.csv, line 3: holds a NUL byte"),
        ("t.txt", "text\0", r"t\.txt, line 1: holds a NUL byte"),
        ("t.csv", b"text\nna\xc3\xafve\ncaf\xe9\n", r"t\.csv is not UTF-8 \(line 3\): convert it first"),
        ("t.txt", b"\xff\xfea\0b\0", r"t\.txt(, line 1: holds a NUL| is not UTF-8 \(line 1\))"),
        ("t.jsonl.gz", b'{"a": "\xff"}\n', r"t\.jsonl\.gz is not UTF-8 \(line 1\): convert it first"),
        ("t.jsonl", '{"a": 1}\n{"a": \n', r"t\.jsonl, line 2: not JSON \(Expecting value\)"),
        ("t.jsonl", '{"a": 1}\n\n[1]\n', r"t\.jsonl, line 3: needs a JSON object, has \[1\]"),
        ("t.json", '[{"a": 1},\n{"a" 1}]', r"t\.json, line 2: not JSON"),
        ("t.json", '[{"a": 1}, "b"]', r't\.json, row 2: needs a JSON object, has "b"'),
        ("t.jsonl", "[" * 100_000, r"t\.jsonl, line 1: (cannot be read|not JSON)"),
        ("t.jsonl", '{"a": ' + "1" * 10_000 + "}", r"t\.jsonl, line 1: cannot be read"),
        ("t.parquet", "no parquet", r"t\.parquet is damaged, or no parquet file"),
        ("t.docx", "x", "unknown kind of file, take one of .txt"),
        ("t", "x", "unknown kind of file"),
        ("t.parquet.gz", "x", "unknown kind of file"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line_that_names_the_place(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(InputError, match=message) as error:
        list(read_rows(path))
    assert only_line(error, path)


def test_what_is_no_file_is_named(tmp_path):
    (tmp_path / "t.txt.gz").write_bytes(b"no gzip")
    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 5000)[:60])
    (tmp_path / "folder.csv").mkdir()
    for name, message in (
        ("none.csv", r"no file .*none\.csv$"),
        ("none.docx", r"no file .*none\.docx$"),
        ("t.txt.gz/a.csv", r"no file .*a\.csv$"),
        ("folder.csv", "is a folder: name a file"),
        ("t.txt.gz", "is damaged, or no gzip file: Not a gzipped file"),
        ("t.jsonl.gz", "is damaged, or no gzip file: Compressed file ended"),
        ("a" * 300 + ".csv", "cannot read .*: File name too long"),
    ):
        with pytest.raises(InputError, match=message) as error:
            list(read_rows(tmp_path / name))
        assert only_line(error, tmp_path / name)
    with pytest.raises(InputError, match="no permission to read a"), errors_of(Path("a")):
        raise PermissionError(13, "Permission denied")


def test_a_cell_may_be_long(tmp_path):
    text = "word " * 100_000
    assert [row for _, row in read_rows(write(tmp_path / "t.csv", f"text,label\n{text},a\n"))] == [{"text": text, "label": "a"}]


def test_documents_are_separated_by_blank_lines(tmp_path):
    for name, content in (("t.txt", b"\xef\xbb\xbfa\nb\n \n\nc\n"), ("t.txt.gz", b"a\r\nb\n\n\n\nc")):
        assert read_documents(write(tmp_path / name, content)) == ["a\nb", "c"]
    with pytest.raises(InputError, match=r"bad\.txt is not UTF-8"):
        read_documents(write(tmp_path / "bad.txt", b"caf\xe9 \xff"))
    (tmp_path / "bad.txt.gz").write_bytes(gzip.compress(b"some text " * 5000)[:40])
    with pytest.raises(InputError, match=r"bad\.txt\.gz is damaged"):
        read_documents(tmp_path / "bad.txt.gz")


# -------------------------------------------------------------------------------------------------------------- columns


def test_texts_that_are_left_out_are_counted_with_the_reason(tmp_path):
    values = ["a", None, " ", 7, 7.5, True, ["b"], {"c": 1}, "\ud800", "d"]
    rows = [{"text": value} for value in values] + [{"other": "x"}]
    path = write(tmp_path / "t.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    texts, summary = read_texts(path)
    assert texts == [("t.jsonl:1", "a"), ("t.jsonl:10", "d")]
    kept, reasons = summary.split("; ")
    assert kept == f"{path}: 2 texts in column 'text' (guessed)"
    kinds = ["is a boolean", "is a list", "is an object", "holds half a surrogate pair"]
    assert reasons == ", 1 whose text ".join(["9 rows left out: 3 without text, 2 whose text is a number", *kinds])
    with pytest.raises(InputError, match="column other holds no text; 1 row left out: 1 whose text is a number"):
        read_texts(write(path, '{"other": 1}'), "other")


def test_other_columns_that_hold_texts_are_named(tmp_path):
    """By their names, or by what they hold; not those of ids and labels."""
    rows = [f"{i},About the {i}th of them,The text is this.,kind {i % 2}" for i in range(9)]
    path = write(tmp_path / "t.csv", "\n".join(["id,subject,text,label", *rows]))
    assert TextStream(path).others == ["subject"]
    assert TextStream(write(path, "id,title,text\n1,Yes,No\n")).others == ["title"]
    assert TextStream(path, "title").others == []


def test_a_column_is_guessed_or_taken_as_asked(tmp_path):
    path = write(tmp_path / "t.csv", "text;other\na;b\nc;\nd; e \n")
    rows, summary = read_texts(path, "other")
    assert rows == [("t.csv:1", "b"), ("t.csv:3", "e")]
    assert summary.endswith("2 texts in column 'other' (as asked), separated by semicolons; 1 row left out: 1 without text")
    assert read_texts(path)[0][0] == ("t.csv:1", "a")
    with pytest.raises(InputError, match="no column body; it has text, other: name one with --column"):
        read_texts(path, "body")
    with pytest.raises(InputError, match="no column that is plainly the text; it has a, b: name one"):
        read_texts(write(path, "a,b\nx y,z w\n"))
    assert read_texts(write(tmp_path / "t.jsonl", '{"n": 1}\n{"n": 2, "body": "b"}\n'))[0] == [("t.jsonl:2", "b")]
    with pytest.raises(InputError, match="holds no text; 2 rows left out: 2 without text"):
        read_texts(write(tmp_path / "t.txt", "\n \n"))


@pytest.mark.parametrize(
    ("convert", "values", "expected"),
    [
        (as_text, ["", "7", "naïve"], ["", "7", "naïve"]),
        (as_label, ["007", 7, True, 1.5, " "], ["007", "7", "True", "1.5", " "]),
        (as_number, ["2.5", 3, True, "1e3"], [2.5, 3.0, 1.0, 1000.0]),
    ],
)
def test_columns_are_texts_labels_or_numbers(convert, values, expected):
    column = read_column([("", {"column": value}) for value in values], "column", convert)
    assert column == expected and list(map(type, column)) == list(map(type, expected))


@pytest.mark.parametrize(
    ("convert", "value", "message"),
    [
        (as_text, None, "is missing, not a string"),
        (as_text, 7, "is a number, not a string"),
        (as_text, True, "is a boolean, not a string"),
        (as_text, b"a", "is of type bytes, not a string"),
        (as_text, "\ud800", "holds half a surrogate pair"),
        (as_label, math.nan, "is nan"),
        (as_label, "", "is empty"),
        (as_label, None, "is empty"),
        (as_label, {}, "is an object, not a string"),
        (as_label, ["a"], "is a list, not a string"),
        (as_number, "", "is empty"),
        (as_number, None, "is empty"),
        (as_number, "x", "is 'x', which is not a number"),
        (as_number, [1], r"is \[1\], which is not a number"),
        (as_number, 10**400, "is 1000.*, which is not a number"),
        (as_number, "nan", "is 'nan', which is not a finite number"),
    ],
)
def test_a_cell_that_does_not_fit_its_column_is_named_with_its_place(convert, value, message):
    with pytest.raises(InputError, match=rf"^t\.csv, line 3: column {message}"):
        read_column([("t.csv, line 2", {"column": "1"}), ("t.csv, line 3", {"column": value})], "column", convert)


# ---------------------------------------------------------------------------------------------------------- damaged files

READERS = {
    "texts": (read_texts, {"id": "1", "text": "some text"}),
    "data": (lambda path: mteb_tasks.tasks_of(path, [None, "Classification"]), {"text": "some text", "label": "x"}),
    "scores": (lambda path: mteb_tasks.tasks_of(path, [None]), {"text1": "some", "text2": "text", "score": "2"}),
    "validation": (read_labelled, {"text": "some text", "label": "x"}),
    "pairs": (lambda path: list(read_pairs(path)), {"anchor": "a", "positive": "b", "negative": "c"}),
}
ODD_CELLS = [None, 7, 10**400, math.nan, True, [], ["a"], {"a": {}}, "", "\ud800", "\0", "naïve 犬"]
ODD_BYTES = [b"", b'"', b"\n", b"\r", b"\0", b",", b"{", b"]", b"\xff", b"\xc3", b"\\ud800", b"\xe2\x80\xa8", b"\x0b", b"[" * 2000]


@pytest.mark.parametrize(
    ("reader", "kind"),
    [("texts", "txt"), *itertools.product(READERS, ["csv", "tsv", "jsonl", "json", "csv.gz", "jsonl.gz", "parquet"])],
)
def test_whatever_is_damaged_gives_rows_or_one_line(reader, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(mteb_tasks, "make_task", lambda name, task_type, data: data)  # mteb's part is slow, and not in question
    (read, row), outcomes, path = READERS[reader], Counter(), tmp_path / f"t.{kind}"
    first = {column: "y" if column == "label" else "1" if column == "score" else cell for column, cell in row.items()}
    rows = [first, row, row, first, row]
    cells = st.tuples(st.integers(0, 4), st.sampled_from(list(row)), st.sampled_from(ODD_CELLS), st.booleans())
    cuts = st.tuples(st.floats(0, 1), st.sampled_from([0, 0, 1, 5, 40]), st.sampled_from(ODD_BYTES) | st.binary(max_size=2))

    @settings(max_examples=160, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
    @given(st.lists(cells, max_size=2), st.lists(cuts, max_size=3))
    def check(cells, cuts):
        damaged = [dict(row) for row in rows]
        for number, column, cell, dropped in cells if kind.startswith("json") else ():
            damaged[number].pop(column, None) if dropped else damaged[number].update({column: cell})
        content = encode_rows(damaged, kind)
        for share, n_removed, inserted in cuts:
            at = int(share * len(content))
            content = content[:at] + inserted + content[at + n_removed :]
        path.write_bytes(content)
        try:
            assert read(path)
            outcomes["rows"] += 1
        except InputError as error:
            assert len(str(error).splitlines()) == 1 and path.name in str(error)
            outcomes["error"] += 1

    check()
    assert outcomes["rows"] and outcomes["error"]


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz", "t.csv", "t.txt", "t.parquet", "t.json"])
def test_rows_from_a_number_on_and_how_many_there_will_be(tmp_path, name):
    """By the bytes that have been read: within what is read ahead; exactly of a parquet and at the end; an array is read at once."""
    import pyarrow as pa
    from pyarrow.parquet import write_table

    path, texts = tmp_path / name, [f"the text of row number {i:05d}" for i in range(5000)]
    if name == "t.parquet":
        write_table(pa.table({"text": texts}), path, row_group_size=1100)
    else:
        lines = texts if name.endswith(("csv", "txt")) else [json.dumps({"text": text}) for text in texts]
        whole = "[" + ",".join(lines) + "]" if name == "t.json" else "\n".join(["text"] * name.endswith("csv") + lines)
        (gzip.open if name.endswith("gz") else open)(path, "wt").write(whole)
    for start in (0, 1, 1100, 2500, 4999, 5000, 6000):
        assert [cells["text"] for _, cells in read_rows(path, start=start)] == texts[start:]
    table = Table(path)
    next(itertools.islice(table.rows, 1999, None))
    expected = table.expected_rows(2000)
    assert expected == {"t.parquet": 5000, "t.json": None}.get(name, pytest.approx(5000, rel=0.6 if name.endswith("gz") else 0.15))
    assert len(list(table.rows)) == 3000 and table.expected_rows(5000) == (None if name == "t.json" else 5000)
