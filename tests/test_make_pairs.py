import gzip
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import make_model

import make_pairs
from encoder import Encoder
from prompts import InputError

HERE = Path(__file__).resolve().parent.parent


def run(*flags) -> None:
    make_pairs.main(make_pairs.build_parser().parse_args([str(f) for f in flags]))


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --------------------------------------------------------------------------------------------------------- docstrings


def test_a_docstring_gives_its_first_sentence_and_the_prose_after_it():
    doc = """Return the :class:`~house.Cat` that ``sat`` on the mat when the door was opened. It may be asleep.

    It is found by walking the whole house, one room after another, until it turns up.

    Parameters
    ----------
    x : int
    """
    sentence, prose = make_pairs.split_docstring(doc)
    assert sentence == "Return the house.Cat that sat on the mat when the door was opened."
    assert prose == "It may be asleep. It is found by walking the whole house, one room after another, until it turns up."


@pytest.mark.parametrize(
    "doc, expected",
    [
        ("", None),
        (">>> f(1)\n2", None),
        ("Only one sentence.", ("Only one sentence.", "")),
        ("A sentence.\n\nArgs:\n    x: what it is", ("A sentence.", "")),
        ("A sentence.\n\nA Heading\n---------\n\nProse that comes too late.", ("A sentence.", "")),
        ("A sentence.\n\n    >>> code()\n\nProse after code is taken.", ("A sentence.", "Prose after code is taken.")),
    ],
)
def test_what_is_no_prose_is_passed_over(doc, expected):
    assert make_pairs.split_docstring(doc) == expected


def test_source_is_read_and_never_run(tmp_path):
    (tmp_path / "pack").mkdir()
    module = tmp_path / "pack" / "mod.py"
    module.write_text('"""A module that does harm. It must not be imported here."""\nraise SystemExit\n')
    assert make_pairs.read_module((tmp_path, module)) == [("pack.mod", "A module that does harm.", "It must not be imported here.")]
    module.write_bytes(b"\xff\xfe not python")
    assert make_pairs.read_module((tmp_path, module)) == []


def test_docstring_pairs_share_nothing_with_the_embedded_tasks(tmp_path, monkeypatch, capsys):
    """On one installed package, two modules of which stand in the tasks (the whole environment takes half a minute)."""
    jobs = [job for job in make_pairs.source_files() if job[1].relative_to(job[0]).parts[0] in ("sympy", "rich")]
    assert len(jobs) > 500
    monkeypatch.setattr(make_pairs, "source_files", lambda: jobs)
    run("docstrings", "--out", tmp_path / "a.jsonl")
    run("docstrings", "--out", tmp_path / "b.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    pairs = rows(tmp_path / "a.jsonl")
    assert len(pairs) > 500 and set(pairs[0]) == {"anchor", "positive", "engine", "source"}
    modules, keys = make_pairs.held_out()
    assert "sympy.crypto.crypto" in modules and len(keys) > 2000
    assert not {p["source"] for p in pairs} & modules
    texts = [make_pairs.key(t) for p in pairs for t in (p["anchor"], p["positive"])]
    assert len(set(texts)) == len(texts) and not set(texts) & keys


def test_embedded_tasks_are_frozen():
    """20 clusters at least, of equal size, and the very rows that were drawn before anything was tuned."""
    import hashlib

    digests = {}
    for path in sorted(make_pairs.TASKS.glob("*.jsonl.gz")):
        found = [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]
        labels = [r["label"] for r in found]
        assert len(set(labels)) >= 20 and len({labels.count(x) for x in set(labels)}) == 1
        assert len({r["text"] for r in found}) == len(found)
        digests[path.name] = hashlib.sha256("".join(r["label"] + "\t" + r["text"] + "\n" for r in found).encode()).hexdigest()[:16]
    assert digests == FROZEN


FROZEN = {"docstrings-by-module.jsonl.gz": "00c46fd82a5c8721", "docstrings-by-package.jsonl.gz": "5e2101c6a71d45d3"}


# ------------------------------------------------------------------------------------------------------ texts of one's own


@pytest.mark.parametrize("name", ["t.txt", "t.txt.gz", "t.csv", "t.csv.gz", "t.tsv", "t.jsonl", "t.jsonl.gz", "t.parquet"])
def test_every_kind_of_input(tmp_path, name, capsys):
    texts = [f"The number {i} has a text, quite long, with commas and all that." for i in range(5)]
    path = tmp_path / name
    kind = name.removesuffix(".gz").split(".")[1]
    if kind == "parquet":
        import datasets

        datasets.Dataset.from_dict({"id": range(5), "text": texts}).to_parquet(str(path))
    else:
        sep = {"csv": ",", "tsv": "\t"}.get(kind)
        body = {
            "txt": "\n".join(texts),
            "jsonl": "\n".join(json.dumps({"id": i, "text": t}) for i, t in enumerate(texts)),
        }.get(kind) or f"id{sep}text\n" + "\n".join(f'{i}{sep}"{t}"' for i, t in enumerate(texts))
        path.write_bytes(gzip.compress(body.encode()) if name.endswith(".gz") else body.encode())
    run("crop", "--input", path, "--out", tmp_path / "out.jsonl")
    pairs = rows(tmp_path / "out.jsonl")
    assert "5 texts in column 'text' (guessed)" in capsys.readouterr().out
    assert 4 <= len(pairs) <= 5
    for pair in pairs:
        source, number = pair["source"].split(":")
        text = texts[int(number) - 1]
        assert source == name and pair["engine"] == "crop"
        assert pair["anchor"] in text and pair["positive"] in text and pair["anchor"] != pair["positive"]


def test_noise_damages_and_keeps_the_words(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("one two three four five six seven eight nine ten\n" * 3)
    run("noise", "--input", path, "--out", tmp_path / "out.jsonl", "--delete", 0, "--chars", 0, "--swap", 0.5)
    for pair in rows(tmp_path / "out.jsonl"):
        assert sorted(pair["positive"].split()) == sorted(pair["anchor"].split()) and pair["positive"] != pair["anchor"]
    rng = random.Random(0)
    assert make_pairs.damage("one two three", rng, 1, 0, 0) == "one"
    assert (
        sorted(make_pairs.damage("abcdefgh", rng, 0, 0, 1)) == sorted("abcdefgh")
        and make_pairs.damage("abcdefgh", rng, 0, 0, 1) != "abcdefgh"
    )


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("t.csv", b"", r"t\.csv.*(is empty|No columns)"),
        ("t.txt", b"", "is empty"),
        ("t.txt", b"\n\n", "holds no text"),
        ("t.csv", b"a,b\nx y,z w\n", "it has a, b: name one with --column"),
        ("t.txt", b"caf\xe9 \xff\n", "not UTF-8"),
        ("t.csv", b"text\ncaf\xe9 \xff\n", "not UTF-8"),
        ("t.docx", b"x", "unknown kind of file"),
        ("t.jsonl", b'{"text": "a"}\nnot json\n', "cannot read"),
        ("t.txt", b"short\n", "no pair came out"),
        ("t.txt.gz", b"no gzip", "cannot read"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        run("crop", "--input", path, "--out", tmp_path / "out.jsonl")
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_cells_and_lines_are_taken_as_they_stand(tmp_path):
    texts = [
        make_pairs.read_texts(tmp_path / name, None)
        for name in ("t.csv", "t.txt")
        if (tmp_path / name).write_bytes(b"\xef\xbb\xbftext\r\nNA\r\n007\r\n")
    ]
    assert [t for _, t in texts[0]] == ["NA", "007"] and [t for _, t in texts[1]] == ["text", "NA", "007"]


def test_a_gz_name_makes_a_gz_file(tmp_path):
    (tmp_path / "t.txt").write_text("one two three four five six seven eight nine ten\n")
    run("crop", "--input", tmp_path / "t.txt", "--out", tmp_path / "new" / "out.jsonl.gz")
    assert json.loads(gzip.decompress((tmp_path / "new" / "out.jsonl.gz").read_bytes()))["engine"] == "crop"


def test_nothing_is_overwritten_and_columns_are_checked(tmp_path):
    (tmp_path / "t.csv").write_text("text,label\none two three four five six seven eight nine,x\n")
    (tmp_path / "out.jsonl").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        run("crop", "--input", tmp_path / "t.csv", "--out", tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == "mine"
    with pytest.raises(InputError, match="no column body; it has text, label"):
        run("crop", "--input", tmp_path / "t.csv", "--column", "body", "--out", tmp_path / "new.jsonl")
    done = subprocess.run(
        [sys.executable, HERE / "make_pairs.py", "crop", "--input", "no.txt", "--out", "x"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (2, "make_pairs.py: no file no.txt\n")


# ------------------------------------------------------------------------------------------------------------ the writer


@pytest.fixture
def writer(tmp_path) -> str:
    from transformers import AutoTokenizer

    folder = make_model(tmp_path / "writer", "qwen3")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    tokenizer.save_pretrained(folder)
    return folder


def test_an_interrupted_writer_goes_on_where_it_was(tmp_path, writer, monkeypatch, capsys):
    (tmp_path / "t.txt").write_text("".join(f"The cat number {i} sat on the mat.\n" for i in range(7)))
    flags = ("llm", "--input", tmp_path / "t.txt", "--writer", writer, "--batch-size", 2, "--max-new-tokens", 5)
    run(*flags, "--out", tmp_path / "whole.jsonl")
    whole = rows(tmp_path / "whole.jsonl")
    assert len(whole) >= 5 and {r["template"] for r in whole} <= set(make_pairs.TEMPLATES) and len({r["template"] for r in whole}) > 1

    load, calls = make_pairs.load_writer, []

    def load_and_fail(args):
        write = load(args)

        def failing(jobs, seed):
            calls.append(len(jobs))
            if len(calls) == 3:
                raise KeyboardInterrupt
            return write(jobs, seed)

        return failing

    monkeypatch.setattr(make_pairs, "load_writer", load_and_fail)
    with pytest.raises(KeyboardInterrupt):
        run(*flags, "--out", tmp_path / "parts.jsonl")
    partial = tmp_path / "parts.jsonl.partial"
    with open(partial, "a") as f:
        f.write('{"anchor": "cut sho')
    assert not (tmp_path / "parts.jsonl").exists()
    with pytest.raises(InputError, match="other texts or settings"):
        run(*flags, "--seed", 3, "--out", tmp_path / "parts.jsonl")
    run(*flags, "--out", tmp_path / "parts.jsonl")
    assert "4 of 7 texts are written already" in capsys.readouterr().out
    assert rows(tmp_path / "parts.jsonl") == whole
    assert not partial.exists()


def test_a_writer_that_is_not_there(tmp_path):
    (tmp_path / "t.txt").write_text("A text.\n")
    with pytest.raises(InputError, match="cannot load the writer"):
        run("llm", "--input", tmp_path / "t.txt", "--writer", "org/none", "--out", tmp_path / "out.jsonl")
    assert [p.name for p in tmp_path.iterdir()] == ["t.txt"]


# ------------------------------------------------------------------------------------------------------ hard negatives


def test_mined_negatives_are_the_nearest_that_may_be_wrong(tmp_path, capsys):
    topics = ["cat", "dog", "bank", "river", "loan", "tree"]
    pairs = [{"anchor": f"The {t} is here.", "positive": f"About a {t}.", "engine": "crop"} for t in topics]
    pairs += [{"anchor": "The cat is here.", "positive": "A small cat.", "engine": "crop"}]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(p) + "\n" for p in pairs))
    run("mine", "--pairs", path, "--out", tmp_path / "hard.jsonl", "--negatives", 3, "--below", 0.9, "--dtype", "float32")
    found = rows(tmp_path / "hard.jsonl")
    assert [{k: r[k] for k in ("anchor", "positive", "engine")} for r in found] == pairs
    encoder = Encoder.load("tiny")
    corpus = [p["positive"] for p in pairs]
    anchors, candidates = encoder.encode([p["anchor"] for p in pairs], "query"), encoder.encode(corpus)
    some = 0
    for i, row in enumerate(found):
        cosines = candidates @ anchors[i]
        own = {p["positive"] for p in pairs if p["anchor"] == row["anchor"]}
        expected = [j for j in np.argsort(-cosines) if corpus[j] not in own and cosines[j] <= 0.9 * cosines[i]][:3]
        assert row["negatives"] == [corpus[j] for j in expected]
        assert row["scores"] == pytest.approx([cosines[i], *cosines[expected]], abs=1e-3)
        some += len(expected)
    assert some > 0 and "7 candidates" in capsys.readouterr().out
    texts = tmp_path / "corpus.txt"
    texts.write_text("A mountain.\nThe cat is here.\nSnow.\n")
    run("mine", "--pairs", path, "--corpus", texts, "--out", tmp_path / "other.jsonl", "--negatives", 9, "--below", 1, "--limit", 1)
    assert set(rows(tmp_path / "other.jsonl")[0]["negatives"]) <= {"A mountain.", "Snow."}  # the anchor itself is none


@pytest.mark.parametrize(
    ("content", "message"), [("", "holds no pairs"), ('{"anchor": "a"}', "line 1: needs"), ("{", "line 1: "), ("[1]", "line 1")]
)
def test_pairs_that_cannot_be_mined(tmp_path, content, message):
    path = tmp_path / "pairs.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        run("mine", "--pairs", path, "--out", tmp_path / "hard.jsonl")
    with pytest.raises(InputError, match="no file"):
        run("mine", "--pairs", tmp_path / "none.jsonl", "--out", tmp_path / "hard.jsonl")
