"""Messages, progress, reading, writing, and docstrings: what every script shares."""

import gzip
import io
import json
import sys
import sysconfig
from pathlib import Path

import pytest

from files import console
from files.console import InputError, Progress, run_script, say, warn
from files.docstrings import (
    Excluded,
    LibraryModule,
    contains_excluded,
    library_modules,
    normalized_key,
    read_allowed_docstrings,
    read_docstrings,
    read_excluded,
    read_library,
    split_docstring,
)
from files.reading import as_number, as_text, read_column, read_documents, read_rows, read_texts
from files.writing import check_absent, write_atomic, write_json, write_new, write_text


def fail_with(error: BaseException):
    raise error


# ------------------------------------------------------------------------------------------------------------- messages


@pytest.mark.parametrize(
    ("error", "rank", "status", "message"),
    [
        (InputError("no file x"), "0", 2, "script.py: no file x\n"),
        (OSError(28, "No space left on device"), "0", 2, "script.py: [Errno 28] No space left on device\n"),
        (InputError("in two\n  lines"), "0", 2, "script.py: in two lines\n"),
        (InputError("no file x"), "3", 2, "script.py, process 3: no file x\n"),
        (KeyboardInterrupt(), "0", 130, ""),
    ],
)
def test_an_error_of_the_user_is_one_line_and_an_exit_status(monkeypatch, capsys, error, rank, status, message):
    monkeypatch.setattr(sys, "argv", ["some/script.py", "--flag"])
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as exit_error:
        run_script(lambda: fail_with(error))
    assert (exit_error.value.code, *capsys.readouterr()) == (status, "", message)


def test_an_error_of_the_program_keeps_its_traceback():
    with pytest.raises(ValueError, match="a bug"):
        run_script(lambda: fail_with(ValueError("a bug")))
    run_script(lambda: None)


def test_only_the_first_process_prints(monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    say("a")
    warn("b")
    monkeypatch.setenv("RANK", "0")
    say("c", error=True)
    monkeypatch.setenv("RANK", "1")
    say("d")
    warn("e")
    assert capsys.readouterr() == ("a\n", "warning: b\nc\n")


def test_progress_is_lines_where_there_is_no_terminal(monkeypatch, capsys):
    monkeypatch.setattr(console, "PROGRESS_SECONDS", 0)
    with Progress(3000, "encoding", "text", initial=500) as progress:
        progress.update(1000)
        progress.update(note="loss 0.5")
    assert capsys.readouterr() == ("", "encoding: 1,500 of 3,000 texts\nencoding: 1,501 of 3,000 texts, loss 0.5\n")


def test_progress_waits_between_two_lines(monkeypatch, capsys):
    monkeypatch.setattr(console, "PROGRESS_SECONDS", 3600)
    with Progress(3, "encoding", "text") as progress:
        progress.update()
    assert capsys.readouterr() == ("", "")


def test_progress_is_shown_by_the_first_process_and_unless_it_is_disabled(monkeypatch, capsys):
    monkeypatch.setattr(console, "PROGRESS_SECONDS", 0)
    with Progress(3, "encoding", "text", disable=True) as progress:
        progress.update()
    monkeypatch.setenv("RANK", "1")
    with Progress(3, "encoding", "text") as progress:
        progress.update()
    assert capsys.readouterr() == ("", "")


def test_progress_is_a_bar_in_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def show() -> str:
        monkeypatch.setattr(sys, "stderr", terminal := Terminal())
        with Progress(4, "encoding", "text") as progress:
            progress.update(4)
        return terminal.getvalue()

    monkeypatch.setattr(console, "PROGRESS_SECONDS", 0)
    assert "encoding" in show() and "\n" not in show()
    monkeypatch.setenv("RANK", "1")
    assert show() == ""


# -------------------------------------------------------------------------------------------------------------- reading


def write_table(path: Path, texts: list[str]) -> Path:
    """A table with the columns `id` and `text`; a txt file has a text a line."""
    kind = path.name.removesuffix(".gz").split(".")[1]
    if kind == "parquet":
        import datasets

        datasets.Dataset.from_dict({"id": range(len(texts)), "text": texts}).to_parquet(str(path))
        return path
    separator = {"csv": ",", "tsv": "\t"}.get(kind)
    if kind == "txt":
        body = "\n".join(texts)
    elif kind == "jsonl":
        body = "\n".join(json.dumps({"id": i, "text": text}) for i, text in enumerate(texts))
    else:
        body = f"id{separator}text\n" + "\n".join(f'{i}{separator}"{text}"' for i, text in enumerate(texts))
    path.write_bytes(gzip.compress(body.encode()) if path.suffix == ".gz" else body.encode())
    return path


@pytest.mark.parametrize("name", ["t.txt", "t.txt.gz", "t.csv", "t.csv.gz", "t.tsv", "t.jsonl", "t.jsonl.gz", "t.parquet"])
def test_texts_are_read_from_every_kind_of_table(tmp_path, name):
    texts = [f"The number {i} has a text, quite long, with commas and all that." for i in range(5)]
    rows, summary = read_texts(write_table(tmp_path / name, texts))
    assert rows == [(f"{name}:{i}", text) for i, text in enumerate(texts, 1)]
    assert summary == f"{tmp_path / name}: 5 texts in column 'text' (guessed), 0 empty rows left out"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"", r"t\.csv.*(is empty|No columns)"),
        ("t.csv", b"text\n", "is empty"),
        ("t.txt", b"", "is empty"),
        ("t.txt", b"\n\n", "holds no text"),
        ("t.csv", b"a,b\nx y,z w\n", "it has a, b: name one with --column"),
        ("t.txt", b"caf\xe9 \xff\n", "not UTF-8"),
        ("t.csv", b"text\ncaf\xe9 \xff\n", "not UTF-8"),
        ("t.docx", b"x", "unknown kind of file"),
        ("t", b"x", "unknown kind of file"),
        ("t.jsonl", b'{"text": "a"}\nnot json\n', "cannot read"),
        ("t.txt.gz", b"no gzip", "cannot read"),
        ("t.csv.gz", gzip.compress(b"text\n" + b"some text\n" * 5000)[:60], "cannot read"),
        ("t.parquet", b"no parquet", "cannot read"),
    ],
)
def test_a_table_that_cannot_be_read_is_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_texts(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_a_missing_table_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no file .*none\.csv"):
        read_table(tmp_path / "none.csv")


def test_a_column_that_is_asked_for_is_taken_and_rows_without_text_are_counted(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("text,other\na,b\nc,\nd, e \n")
    rows, summary = read_texts(path, "other")
    assert rows == [("t.csv:1", "b"), ("t.csv:3", "e")] and summary.endswith("2 texts in column 'other' (as asked), 1 empty rows left out")
    with pytest.raises(InputError, match="no column body; it has text, other"):
        read_texts(path, "body")


def test_cells_and_lines_are_read_as_they_stand(tmp_path):
    """No cell is taken for a number or a missing value, and a byte-order mark is no part of the text."""
    content = b"\xef\xbb\xbftext\r\nNA\r\n007\r\n"
    for name in ("t.csv", "t.txt"):
        (tmp_path / name).write_bytes(content)
    assert read_table(tmp_path / "t.csv") == [{"text": "NA"}, {"text": "007"}]
    assert [text for _, text in read_texts(tmp_path / "t.txt")[0]] == ["text", "NA", "007"]


def test_a_column_of_numbers_or_texts_names_the_row_that_is_wrong():
    path = Path("t.csv")
    rows = [{"score": "1", "text": "a"}, {"score": "2.5", "text": None}]
    assert read_column(rows, "score", path, float) == [1.0, 2.5] and read_column(rows, "text", path, str) == ["a", ""]
    for value, message in (("", "score is empty"), (None, "score is empty"), ("x", "not a number"), ("nan", "not a finite number")):
        with pytest.raises(InputError, match=rf"t\.csv, row 3: .*{message}"):
            read_column([*rows, {"score": value}], "score", path, float)


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz"])
def test_jsonl_gives_line_numbers_and_objects(tmp_path, name):
    body = '\ufeff{"a": 1}\n\n  \n{"a": "naïve"}'.encode()
    (tmp_path / name).write_bytes(gzip.compress(body) if name.endswith(".gz") else body)
    assert list(read_jsonl(tmp_path / name)) == [(1, {"a": 1}), (4, {"a": "naïve"})]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.jsonl", b'{"a": 1}\n{"a": \n', r"t\.jsonl, line 2: not JSON \(Expecting value\)"),
        ("t.jsonl", b'{"a": 1}\n\n[1]\n', r"t\.jsonl, line 3: needs a JSON object, has \[1\]"),
        ("t.jsonl", b'{"a": "\xff"}\n', r"t\.jsonl is not UTF-8 .*: convert it first"),
        ("t.jsonl", b"[" * 100_000, r"t\.jsonl, line 1: (cannot be read|not JSON)"),
        ("t.jsonl", b'{"a": ' + b"1" * 10_000 + b"}", r"t\.jsonl, line 1: cannot be read"),
        ("t.jsonl.gz", b"no gzip", r"t\.jsonl\.gz is damaged"),
        ("t.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 5000)[:40], r"t\.jsonl\.gz is damaged"),
        ("t.jsonl", None, r"no file .*t\.jsonl"),
    ],
)
def test_jsonl_that_cannot_be_read_is_one_line_that_names_the_place(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        list(read_jsonl(tmp_path / name))
    assert "\n" not in str(error.value)


def test_documents_are_separated_by_blank_lines(tmp_path):
    for name, content in (("t.txt", b"\xef\xbb\xbfa\nb\n \n\nc\n"), ("t.txt.gz", gzip.compress(b"a\nb\n\n\n\nc"))):
        (tmp_path / name).write_bytes(content)
        assert read_documents(tmp_path / name) == ["a\nb", "c"]
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9 \xff")
    with pytest.raises(InputError, match=r"bad\.txt is not UTF-8"):
        read_documents(tmp_path / "bad.txt")
    (tmp_path / "bad.txt.gz").write_bytes(gzip.compress(b"some text " * 5000)[:40])
    with pytest.raises(InputError, match=r"bad\.txt\.gz is damaged"):
        read_documents(tmp_path / "bad.txt.gz")


# -------------------------------------------------------------------------------------------------------------- writing


def test_a_write_that_fails_leaves_the_old_file_and_nothing_half_written(tmp_path):
    path = tmp_path / "f.txt"
    write_text(path, "old")

    def write_half(temporary: Path) -> None:
        temporary.write_text("ne")
        raise OSError(28, "No space left on device")

    for error in (OSError, KeyboardInterrupt):
        with pytest.raises(error):
            write_atomic(path, write_half if error is OSError else lambda temporary: fail_with(KeyboardInterrupt()))
        assert [p.name for p in tmp_path.iterdir()] == ["f.txt"] and path.read_text() == "old"


def test_a_write_is_complete_before_the_file_has_its_name(tmp_path):
    path = tmp_path / "f.txt"

    def write(temporary: Path) -> None:
        temporary.write_text("new")
        assert not path.exists() and temporary.parent == path.parent  # a rename is atomic within one folder

    write_atomic(path, write)
    with open(path) as reader:  # one who has the old file open keeps reading it
        write_text(path, "newer")
        assert reader.read() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["f.txt"] and path.read_text() == "newer"


def test_json_is_written_as_utf8(tmp_path):
    write_json(tmp_path / "f.json", {"a": "naïve"})
    assert (tmp_path / "f.json").read_bytes() == '{\n  "a": "naïve"\n}\n'.encode()


def test_a_new_file_never_replaces_another(tmp_path):
    path = tmp_path / "new" / "f.txt"
    write_new(path, b"first")
    with pytest.raises(InputError, match="exists already: choose another --out"):
        write_new(path, b"second")
    with pytest.raises(InputError, match="exists already"):
        check_absent(path)
    assert path.read_bytes() == b"first" and [p.name for p in path.parent.iterdir()] == ["f.txt"]
    check_absent(tmp_path / "new" / "other")


def test_a_new_file_named_gz_is_gzipped_without_the_time(tmp_path):
    write_new(tmp_path / "a.gz", b"text")
    data = (tmp_path / "a.gz").read_bytes()
    assert gzip.decompress(data) == b"text" and data[4:8] == bytes(4)  # the same text gives the same bytes at any time


# ----------------------------------------------------------------------------------------------------------- docstrings


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A function that writes source files; they are then the only library that there is."""
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"purelib": str(tmp_path), "stdlib": str(tmp_path / "none")})

    def write(sources: dict[str, str]) -> None:
        for name, source in sources.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(source)

    return write


def test_a_docstring_gives_its_first_sentence_and_the_prose_after_it():
    docstring = """Return the :class:`~house.Cat` that ``sat`` on the mat when the door was opened. It may be asleep.

    It is found by walking the whole house, one room after another, until it turns up.

    Parameters
    ----------
    x : int
    """
    sentence, prose = split_docstring(docstring)
    assert sentence == "Return the house.Cat that sat on the mat when the door was opened."
    assert prose == "It may be asleep. It is found by walking the whole house, one room after another, until it turns up."


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("", None),
        (">>> f(1)\n2", None),
        ("Only one sentence.", ("Only one sentence.", "")),
        ("A sentence.\n\nArgs:\n    x: what it is", ("A sentence.", "")),
        ("A sentence.\n\nA Heading\n---------\n\nProse that comes too late.", ("A sentence.", "")),
        ("A sentence.\n\n    >>> code()\n\nProse after code is taken.", ("A sentence.", "Prose after code is taken.")),
        ("A sentence. " + "word " * 100, None),
        ("A sentence. And " + "word " * 100, ("A sentence.", "And " + " ".join(["word"] * 63))),
    ],
)
def test_what_is_no_prose_is_passed_over(docstring, expected):
    if expected is None and docstring.startswith("A sentence"):
        expected = (docstring.strip(), "")  # a sentence begins with a capital letter
    assert split_docstring(docstring) == expected


def test_source_is_parsed_and_never_run(tmp_path):
    path = tmp_path / "module.py"
    path.write_text('"""A module."""\nraise SystemExit\nclass A:\n    """A class."""\n    def f(self):\n        """  """\n')
    assert read_docstrings(path) == ["A module.", "A class."]
    for content in (b"\xff\xfe not python", b"def (", b"print 'Python 2'"):
        path.write_bytes(content)
        assert read_docstrings(path) == []


def test_tests_and_tools_are_no_library(library):
    names = ("pkg/__init__.py", "pkg/a.py", "pkg/sub/b.py", "single.py")
    others = ("pkg/tests/a.py", "pkg/test_a.py", "pip/a.py", "hypothesis/a.py", "sortedcontainers/a.py", "not-a-name/a.py", "pkg/data.txt")
    library(dict.fromkeys((*names, *others, "_hypothesis_globals.py", "pkg/pip/a.py"), '"""A text of a few words. And a second one."""'))
    assert [module.name for module in library_modules()] == ["single", "pkg", "pkg.a", "pkg.sub.b"]
    assert read_library() == [(name, "A text of a few words.", "And a second one.") for name in ("single", "pkg", "pkg.a", "pkg.sub.b")]


def test_excluded_texts_and_modules_are_read_from_jsonl(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "The CAT, 7 times!"}\n{"text": "7", "module": "pkg.a"}\n')
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as f:
        f.write('{"text": "A dog.", "module": "pkg.b"}\n')
    assert read_excluded([tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"]) == Excluded({"pkg.a", "pkg.b"}, {"the cat times", "a dog"})
    (tmp_path / "c.jsonl").write_text('{"text": "a"}\n{"label": "a"}\n')
    with pytest.raises(InputError, match=r"c\.jsonl, line 2: needs a column 'text'"):
        read_excluded([tmp_path / "c.jsonl"])


def test_an_excluded_text_is_recognized_as_a_line_a_sentence_two_sentences_or_the_whole():
    keys = {normalized_key(t) for t in ("Return the mean of x.", "one two three", "Is it? Yes it is.", "One. Two. Four.")}
    for document in (
        "return the mean of X",
        "First. Return the mean of x. Last.",
        "a\nOne, two - three!\nb",
        "a\nOne. Two. Four.\nb",
        "No.\nIs it? Yes it is. More.",
        "one\ntwo\nthree",
    ):
        assert contains_excluded(document, keys), document
    for document in ("Return the mean of x and y.", "one two", "", "Yes it is."):
        assert not contains_excluded(document, keys), document


def test_docstrings_of_excluded_modules_and_with_excluded_sentences_are_left_out(tmp_path):
    excluded = Excluded({"pkg.task"}, {"the sentence of a task"})
    for name, docstring, expected in (
        ("pkg.kept", "Kept as it is.", ["Kept as it is."]),
        ("pkg.task", "In a module of a task.", []),
        ("pkg.quotes", "First. The sentence of a task. Last.", []),
        ("pkg.wraps", "First. The sentence\nof a task. Last.", []),
        ("pkg.parts", "The sentence\n\nof a task. Last.", ["The sentence\n\nof a task. Last."]),
    ):
        path = tmp_path / f"{name}.py"
        path.write_text(f'"""{docstring}"""\n')
        assert read_allowed_docstrings(LibraryModule(name, path), excluded) == expected, name
