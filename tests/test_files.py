"""Messages, progress, writing, and docstrings: what every script shares. Reading: test_reading.py."""

import gzip
import io
import os
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from files import console
from files.console import InputError, Progress, run_script, say, short_path, warn
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
from files.writing import WriteError, append_line, check_absent, write_atomic, write_json, write_new, write_text


def fail_with(error: BaseException):
    raise error


# ------------------------------------------------------------------------------------------------------------- messages


@pytest.mark.parametrize(
    ("error", "rank", "status", "message"),
    [
        (InputError("no file x"), "0", 2, "script.py: no file x\n"),
        (OSError(28, "No space left on device"), "0", 2, "script.py: No space left on device\n"),
        (OSError(13, "Permission denied", "x.csv"), "0", 2, "script.py: x.csv: Permission denied\n"),
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


def test_a_closed_pipe_ends_no_work(monkeypatch):
    """As after `| head -1`: what is said from then on goes nowhere, also what is flushed at the end."""
    reader, writer = os.pipe()
    with open(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        say("a")
        os.close(reader)
        say("b")
        say("c")


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time in seconds, as Progress sees it."""
    now = [0.0]
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(console, "PROGRESS_SECONDS", 0)
    return now


def test_progress_is_lines_where_there_is_no_terminal(clock, capsys):
    """What was done before says nothing of the time that is left."""
    with Progress(3000, "encoding", "text", initial=400) as progress:
        progress.skip(100)
        clock[0] = 60
        progress.update(1000)
        progress.update(note="loss 0.5")
        progress.expect(61501)
        progress.update(0)
        progress.expect(1501)
        progress.update(0)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["encoding: 1,500 of 3,000 texts, about 90 s left", "encoding: 1,501 of 3,000 texts, about 90 s left, loss 0.5"]
    assert lines[2:] == ["encoding: 1,501 of about 61,501 texts, about 60 min left", "encoding: 1,501 of about 1,501 texts"]


def test_progress_without_an_end_says_how_fast_it_goes(clock, capsys):
    with Progress(None, "embedded", "row") as progress:
        progress.update(10)  # no time has gone by
        clock[0] = 4
        progress.update(0)
        progress.update(39990)
    assert capsys.readouterr().err.splitlines() == [
        "embedded: 10 rows",
        "embedded: 10 rows, 2.5 a second",
        "embedded: 40,000 rows, 10,000 a second",
    ]


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.4, "0 s"), (119, "119 s"), (150, "2 min"), (9000, "2.5 h"), (90000, "25 h"), (864000, "10 days")]
)
def test_a_time_is_said_in_its_unit(seconds, said):
    assert console.duration(seconds) == said


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


# -------------------------------------------------------------------------------------------------------------- writing


def test_a_write_that_fails_leaves_the_old_file_and_nothing_half_written(tmp_path):
    path = tmp_path / "f.txt"
    write_text(path, "old")

    def write_half(temporary: Path) -> None:
        temporary.write_text("ne")
        raise OSError(28, "No space left on device")

    for error in (WriteError, KeyboardInterrupt):
        with pytest.raises(error) as raised:
            write_atomic(path, write_half if error is WriteError else lambda temporary: fail_with(KeyboardInterrupt()))
        assert [p.name for p in tmp_path.iterdir()] == ["f.txt"] and path.read_text() == "old"
        assert str(raised.value) == (f"{path} cannot be written: No space left on device" if error is WriteError else "")
    with pytest.raises(WriteError, match=r"none/f\.txt cannot be written: No such file or directory$"):
        append_line(tmp_path / "none" / "f.txt", "a line")


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_a_new_file_has_the_permissions_of_any_other(tmp_path, umask):
    """Also where the writer puts a private file of its own in place, as safetensors does."""
    before = os.umask(umask)
    try:
        write_atomic(tmp_path / "f", lambda temporary: os.replace(tempfile.mkstemp(dir=tmp_path)[1], temporary))
    finally:
        os.umask(before)
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o666 & ~umask


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


def test_a_path_is_shown_as_one_would_type_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert short_path(tmp_path / "runs" / "mine") == "runs/mine" and short_path("runs/mine") == "runs/mine"
    assert short_path(tmp_path.parent / "other") == str(tmp_path.parent / "other")
