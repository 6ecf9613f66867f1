"""Every script with every kind of bad input: one line that names the file, exit status 2, and nothing left behind."""

import gzip
import json
import math
import re
import runpy
import sys
from pathlib import Path

import pytest
from short_runs import word_rows, write_rows

ROOT = Path(__file__).resolve().parent.parent
# what is read, and by which command; FILE is the bad one, OUT must not be there afterwards
COMMANDS = {
    "texts": [
        "make_pairs.py crop --input FILE --out OUT/pairs.jsonl",
        "make_pairs.py columns --input FILE --columns id text --out OUT/pairs.jsonl",
        "make_pairs.py noise --input FILE --out OUT/pairs.jsonl",
        "make_pairs.py llm --input FILE --chat-model MODEL --out OUT/pairs.jsonl",
        "make_pairs.py server --input FILE --url http://127.0.0.1:9/v1 --chat-model any --out OUT/pairs.jsonl",
        "make_pairs.py mine --pairs PAIRS --corpus FILE --model MODEL --out OUT/pairs.jsonl",
        "make_pairs.py auto --input FILE --model none --general none --out OUT",
        "evaluate.py --model MODEL --texts FILE --out OUT/scores.json",
        "attention.py --model MODEL --input FILE --out OUT",
        "search.py --model MODEL --input FILE --query cat",
        "embed.py MODEL FILE --out OUT",
    ],
    "pairs": [
        "train.py --model MODEL --pairs FILE --batch-size 2 --out OUT",
        "train.py --model MODEL --pairs PAIRS FILE --batch-size 2 --out OUT",
        "make_pairs.py mine --pairs FILE --model MODEL --out OUT/pairs.jsonl",
        "make_pairs.py auto --input PAIRS --column anchor --model none --general FILE --out OUT",
    ],
    "labelled": [
        "evaluate.py --model MODEL --data FILE --out OUT/scores.json",
        "evaluate.py --model MODEL --task classification --data FILE --out OUT/scores.json",
        "train.py --model MODEL --pairs PAIRS --validation FILE --batch-size 2 --out OUT",
    ],
}
HEADERS = {"texts": ["id", "text"], "pairs": ["anchor", "positive"], "labelled": ["text", "label"]}


def table(kind: str, *more: str, separator: str = ",") -> str:
    """A good csv of eight rows, and then the lines given."""
    first, second = HEADERS[kind]
    rows = [f"the number {i} of many{separator}the word {i % 2}" for i in range(8)]
    return "\n".join([f"{first}{separator}{second}", *rows, *more]) + "\n"


def objects(kind: str, *more: str) -> str:
    """A good JSONL file of eight rows, and then the lines given."""
    first, second = HEADERS[kind]
    rows = [json.dumps({first: f"the number {i} of many", second: f"the word {i % 2}"}) for i in range(8)]
    return "\n".join([*rows, *more]) + "\n"


def value(kind: str, column: int, cell: object) -> str:
    """A row of JSONL with this cell in the first or second column."""
    first, second = HEADERS[kind]
    return json.dumps({first: "some text", second: "some more", HEADERS[kind][column]: cell})


# name of the file -> its content for a kind of rows, and what the line says
BAD = {
    "missing.csv": (None, "no file"),
    "nothing.jsonl": (lambda kind: "", "empty|holds"),
    "blank.csv": (lambda kind: "\n\n  \n", "empty|holds"),
    "header.csv": (lambda kind: ",".join(HEADERS[kind]) + "\n", "empty|holds"),
    "latin1.csv": (lambda kind: table(kind, "caf\xe9,b").encode("latin-1"), "not UTF-8 .*line 10"),
    "utf16.csv": (lambda kind: table(kind).encode("utf-16"), "NUL|not UTF-8"),
    "nul.csv": (lambda kind: table(kind, "a\0,b"), "line 10: holds a NUL byte"),
    "no-gzip.csv.gz": (lambda kind: table(kind), "damaged"),
    "cut.jsonl.gz": (lambda kind: gzip.compress(objects(kind).encode())[:-20], "damaged"),
    "word.docx": (lambda kind: table(kind), "unknown kind of file"),
    "suffixless": (lambda kind: table(kind), "unknown kind of file"),
    "quote.csv": (lambda kind: table(kind, '"a,b', "c,d"), "line 10: a quote in this row is never closed"),
    "twice.csv": (lambda kind: f"{HEADERS[kind][0]},{HEADERS[kind][0]}\na,b\n", "line 1: two columns are called"),
    "ragged.csv": (lambda kind: table(kind, "a,b,c"), "line 10: has 3 of the header's 2 cells"),
    "short.tsv": (lambda kind: table(kind, "a", separator="\t"), "line 10: has 1 of the header's 2 cells"),
    "broken.jsonl": (lambda kind: objects(kind, '{"a": '), "line 9: not JSON"),
    "list.jsonl": (lambda kind: objects(kind, '["a", "b"]'), "line 9: needs a JSON object"),
    "strings.json": (lambda kind: '["a", "b"]', "row 1: needs a JSON object"),
    "deep.jsonl": (lambda kind: objects(kind, "[" * 100_000), "line 9: "),
    "digits.jsonl": (lambda kind: objects(kind, '{"a": ' + "1" * 10_000 + "}"), "line 9: cannot be read"),
    "damaged.parquet": (lambda kind: table(kind), "damaged, or no parquet file"),
    "columns.csv": (lambda kind: "a,b\nx y,z w\nx z,w w\n", "no column|needs"),
    "folder.csv": (lambda kind: {}, "is a folder|data for|no corpus.jsonl"),
}
BAD_VALUES = {
    "pairs": [(0, 5), (0, None), (1, {"a": 1}), (1, ["a"]), (0, "\ud800")],
    "labelled": [
        *((0, cell) for cell in (5, None, {"a": 1}, ["a"], "\ud800")),
        *((1, cell) for cell in (None, {"a": 1}, ["a"], "", math.nan)),
    ],
}


def make_bad_file(folder: Path, name: str, content) -> Path:
    path = folder / name
    if content == {}:
        path.mkdir()
    elif content is not None:
        path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
    return path


@pytest.fixture
def run_command(llama, tmp_path, monkeypatch, capsys):
    """A function that runs a command of COMMANDS on a file -> the line that it ends with; checks status and what is left behind."""
    pairs = write_rows(tmp_path / "pairs.jsonl", word_rows())

    def run(command: str, path: Path) -> str:
        places = {"FILE": path, "MODEL": llama, "PAIRS": pairs, "OUT": tmp_path / "out"}
        words = command.split()
        argv = [next((word.replace(k, str(v)) for k, v in places.items() if word.partition("/")[0] == k), word) for word in words]
        before = sorted(tmp_path.rglob("*"))
        monkeypatch.setattr(sys, "argv", [str(ROOT / argv[0]), *argv[1:]])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(sys.argv[0], run_name="__main__")
        lines = capsys.readouterr().err.splitlines()
        if ": error: argument" in lines[-1]:  # of argparse, which shows the usage before it
            lines = [f"{argv[0]}: {lines[-1].partition(': error: ')[2]}"]
        assert ended.value.code == 2, lines
        assert sorted(tmp_path.rglob("*")) == before
        assert not [line for line in lines[:-1] if not line.startswith(("warning: ", "training: "))], lines
        assert lines[-1].startswith(f"{argv[0]}: ") and len(lines[-1]) < 500
        return lines[-1]

    return run


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize(("kind", "command"), [(kind, command) for kind, commands in COMMANDS.items() for command in commands])
def test_a_file_that_cannot_be_read_is_one_line(run_command, tmp_path, kind, command, name):
    make, message = BAD[name]
    path = make_bad_file(tmp_path, name, make and make(kind))
    line = run_command(command, path)
    assert str(path) in line
    assert re.search(message, line), line


@pytest.mark.parametrize(("kind", "column", "cell"), [(kind, *values) for kind, all_values in BAD_VALUES.items() for values in all_values])
def test_a_value_of_the_wrong_type_is_one_line_that_names_its_place(run_command, tmp_path, kind, column, cell):
    path = make_bad_file(tmp_path, "values.jsonl", objects(kind, value(kind, column, cell)))
    for command in COMMANDS[kind]:
        line = run_command(command, path)
        assert f"{path}, line 9: " in line and HEADERS[kind][column] in line.replace("a text holds half", HEADERS[kind][column]), line


CROP = "make_pairs.py crop --input FILE --out OUT/pairs.jsonl "
SERVER = "make_pairs.py server --input FILE --chat-model any --out OUT/pairs.jsonl "
# flags of make_pairs.py with a value that cannot be: the command, and what the line says
BAD_FLAGS = [
    (CROP + "--shard 0/2", "argument --shard: 0/2 is not I/N"),
    (CROP + "--shard 3/2", "argument --shard: 3/2 is not I/N"),
    (CROP + "--shard one", "argument --shard: one is not I/N"),
    (CROP + "--review -1", "argument --review: -1 is not 0 or more"),
    (CROP + "--judge-window 0.9 0.4", r"--judge-window 0\.9 0\.4: needs the lowest and then the highest"),
    (CROP + "--judge-window -2 nan", "--judge-window -2 nan: needs the lowest"),
    (CROP + "--judge no-such-model", "no-such-model"),
    (SERVER + "--url localhost:8000", "--url localhost:8000: needs an address"),
    (SERVER + "--url http://host/v1 --concurrency 0", "argument --concurrency: 0 is not 1 or more"),
    (SERVER + "--url http://host/v1 --retries -1", "argument --retries: -1 is not 0 or more"),
    (SERVER + "--url http://host/v1 --timeout 0", "argument --timeout: 0 is not above 0"),
    (SERVER + "--url http://host/v1 --timeout nan", "argument --timeout: nan is not above 0"),
    (SERVER + "--url http://host/v1 --templates haiku", "argument --templates: invalid choice: 'haiku'"),
    (SERVER + "--url http://host/v1 --template-file FILE", r"template texts has no {text} where the text goes"),
    (SERVER + "--url http://host/v1 --template-file OUT/none.txt", r"no file .*none\.txt"),
    (SERVER + "--url http://host/v1 --temperature -1", "argument --temperature: -1 is not 0 or more"),
    (SERVER + "--url http://host/v1 --top-p 2", "argument --top-p: 2 is not between 0 and 1"),
    ("make_pairs.py merge OUT/none.jsonl PAIRS --out OUT/pairs.jsonl", r"no file .*none\.jsonl"),
    ("make_pairs.py merge PAIRS --out OUT/pairs.jsonl", "line 1: needs a 'source' such as"),
]


@pytest.mark.parametrize(("command", "message"), BAD_FLAGS)
def test_a_flag_that_cannot_be_is_one_line(run_command, tmp_path, capsys, command, message):
    path = make_bad_file(tmp_path, "texts.csv", table("texts"))
    line = run_command(command, path)
    assert re.search(message, line), line
