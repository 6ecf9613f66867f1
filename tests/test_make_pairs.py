import gzip
import hashlib
import json
import math
import random
import runpy
import shutil
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_run

import make_pairs
from files.console import InputError
from files.docstrings import DocstringText, bundled_task_files, normalized_key, read_excluded
from pair_engines import mining, spans
from tasks.draw import BY_MODULE, BY_PACKAGE, draw_tasks

HERE = Path(__file__).resolve().parent.parent
TEN_WORDS = "one two three four five six seven eight nine ten\n"


def run(*flags) -> None:
    make_pairs.main(make_pairs.build_parser().parse_args([str(f) for f in flags]))


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ------------------------------------------------------------------------------------------------------------ docstrings


@pytest.fixture
def library(tmp_path, monkeypatch) -> Path:
    """A folder that stands for the installed packages; the standard library is empty."""
    folder = tmp_path / "library"
    (folder / "pkg").mkdir(parents=True)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"purelib": str(folder), "stdlib": str(tmp_path / "none")})
    return folder


def test_docstring_pairs_share_no_text_and_no_module_with_the_bundled_tasks(tmp_path, library):
    with gzip.open(bundled_task_files()[0], "rt", encoding="utf-8") as f:
        of_task = next(row for row in map(json.loads, f) if row["text"][0].isupper() and row["text"].endswith("."))
    module, sentence = of_task["module"], of_task["text"]
    prose = "This is what comes after it, and it has more than eight words."
    sources = {
        module.replace(".", "/"): f"This module belongs to a bundled task. {prose}",
        "pkg/anchor": f"{sentence} {prose}",
        "pkg/prose": f"This one quotes a sentence of a task. Some words that come first. {sentence} Last words.",
        "pkg/short": "Too short. Too short as well.",
        "pkg/short_prose": "Only this first sentence is long enough. Seven words are too few to learn.",
        "pkg/long": f"{'word ' * 41}ends. {prose}",
        "pkg/good": "This one is free to be used. It has eight words or more in its second part.",
        "pkg/same_anchor": f"This ONE is free, to be used! {prose}",
        "pkg/same_positive": "This has another first sentence. It has eight words or more in its second part, 7.",
        "datasketch/later": f"A package that was added when the figures stood. {prose} It is not read.",
        "rapidfuzz/later": f"Another package that was added when the figures stood. {prose} Nor is this.",
        "pkg/other": "This one may be used, too. Its second part has nothing in common with others.",
    }
    for name, docstring in sources.items():
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / f"{name}.py").write_text(f'r"""{docstring}"""\n', encoding="utf-8")
    run("docstrings", "--out", tmp_path / "pairs.jsonl")
    pairs = {row["source"]: row for row in read_rows(tmp_path / "pairs.jsonl")}
    assert set(pairs) == {"pkg.good", "pkg.other"}
    assert pairs["pkg.good"] == {
        "anchor": "This one is free to be used.",
        "positive": "It has eight words or more in its second part.",
        "engine": "docstrings",
        "source": "pkg.good",
    }


def test_docstring_pairs_of_a_real_package_are_distinct_and_follow_from_the_seed(tmp_path, library):
    shutil.copytree(Path(pytest.__file__).parent.parent / "rich", library / "rich")  # some of its sentences stand in the tasks
    run("docstrings", "--out", tmp_path / "pairs.jsonl")
    run("docstrings", "--out", tmp_path / "few.jsonl", "--limit", 3)
    run("docstrings", "--out", tmp_path / "other.jsonl", "--seed", 1)
    pairs, few, other = (read_rows(tmp_path / f"{name}.jsonl") for name in ("pairs", "few", "other"))
    assert len(pairs) > 20 and few == pairs[:3]
    assert pairs != other and sorted(map(str, pairs)) == sorted(map(str, other))
    excluded = read_excluded(bundled_task_files())
    assert any(module.startswith("rich.") for module in excluded.modules) and not {row["source"] for row in pairs} & excluded.modules
    keys = [normalized_key(text) for row in pairs for text in (row["anchor"], row["positive"])]
    assert len(set(keys)) == len(keys) and not set(keys) & excluded.keys


# --------------------------------------------------------------------------------------------------------- bundled tasks

FROZEN = {"docstrings-by-module.jsonl.gz": "00c46fd82a5c8721", "docstrings-by-package.jsonl.gz": "5e2101c6a71d45d3"}


def test_the_bundled_tasks_are_those_that_were_drawn_before_anything_was_tuned():
    """They have 20 clusters or more, all of the same size, and every row is as it was."""
    digests = {}
    for path in bundled_task_files():
        rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]
        labels = [row["label"] for row in rows]
        assert len(set(labels)) >= 20 and len({labels.count(label) for label in set(labels)}) == 1
        assert len({row["text"] for row in rows}) == len(rows)
        digests[path.name] = hashlib.sha256("".join(row["label"] + "\t" + row["text"] + "\n" for row in rows).encode()).hexdigest()[:16]
    assert digests == FROZEN


def test_tasks_are_drawn_by_module_and_by_package_without_sharing_a_sentence():
    letters = "abcdefghijklmnopqrstuvwxyz"
    texts = [
        DocstringText(f"{package}.{letters[m]}", f"The {package} part {letters[m]} says {a}{b} here.", "")
        for package, n_modules in (("large", 26), ("small", 4), ("_private", 26), ("narwhals", 26))
        for m in range(n_modules)
        for a in "abcdefg"
        for b in "abcdefg"
    ]
    texts += [DocstringText(f"large.{letters[m]}", "This sentence stands in every module.", "") for m in range(26)]
    texts += [DocstringText("large.a", "Too short it is.", "")]
    assert draw_tasks(texts, random.Random(0)) == draw_tasks(texts, random.Random(0)) != draw_tasks(texts, random.Random(1))
    for seed in range(6):
        drawn = draw_tasks(texts, random.Random(seed))
        by_module, by_package = drawn[BY_MODULE], drawn[BY_PACKAGE]
        assert {label for _, label, _ in by_package} == {"large"} and len(by_package) == 60
        modules = {module for _, _, module in by_module}
        assert len(modules) == 2 and len(by_module) == 2 * 40 and all(m.startswith("large.") for m in modules)  # at most two of a package
        assert all(label == module for _, label, module in by_module) and not modules & {module for _, _, module in by_package}
        sentences = [sentence for sentence, _, _ in (*by_module, *by_package)]
        assert len(set(sentences)) == len(sentences) and "This sentence stands in every module." not in sentences


# ---------------------------------------------------------------------------------- columns, copies, crops and noise


def test_columns_are_the_pairs_that_a_table_holds(tmp_path, capsys):
    path = tmp_path / "faq.csv"
    path.write_text("id,question,answer\n1,How?,So.\n2,Why?,\n3,When?,Now and then.\n4,How?,So.\n5,Copy,copy\n6,Who?,I.\n")
    run("columns", "--input", path, "--columns", "question", "answer", "--out", tmp_path / "out.jsonl")
    rows = [(pair["anchor"], pair["positive"], pair["source"]) for pair in read_rows(tmp_path / "out.jsonl")]
    assert rows == [("How?", "So.", "faq.csv:1"), ("When?", "Now and then.", "faq.csv:3"), ("Who?", "I.", "faq.csv:6")]
    said = capsys.readouterr().out
    assert "5 rows with question and answer; 1 row left out: 1 without text" in said and "1 copy of its anchor" in said
    run("columns", "--input", path, "--columns", "question", "answer", "--limit", 2, "--out", tmp_path / "two.jsonl")
    assert "faq.csv: 2 rows with question and answer; 1 row left out" in capsys.readouterr().out
    for shard in (1, 2):
        run("columns", "--input", path, "--columns", "question", "answer", "--shard", f"{shard}/2", "--out", tmp_path / f"{shard}.jsonl")
    run("merge", tmp_path / "1.jsonl", tmp_path / "2.jsonl", "--out", tmp_path / "all.jsonl")
    assert (tmp_path / "all.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()


def test_columns_that_are_not_there_or_equal_are_named(tmp_path):
    path = tmp_path / "faq.csv"
    path.write_text("question,answer\nHow?,\n")
    for columns, message in (
        (("question", "reply"), r"no column reply; it has question, answer: name two with --columns"),
        (("answer", "answer"), "--columns names answer twice"),
        (("question", "answer"), r"faq\.csv: no row has a text in question and answer; 1 row left out"),
    ):
        with pytest.raises(InputError, match=message):
            run("columns", "--input", path, "--columns", *columns, "--out", tmp_path / "out.jsonl")
    assert sorted(tmp_path.iterdir()) == [path]


def test_same_gives_every_text_twice(tmp_path, capsys):
    (tmp_path / "t.txt").write_text("One text.\nTwo texts.\nOne text.\n")
    run("same", "--input", tmp_path / "t.txt", "--out", tmp_path / "out.jsonl")
    assert [(pair["anchor"], pair["positive"]) for pair in read_rows(tmp_path / "out.jsonl")] == [("One text.",) * 2, ("Two texts.",) * 2]
    assert "train with --lora-dropout" in capsys.readouterr().out


def test_a_crop_is_two_different_spans_of_one_document(tmp_path, capsys):
    texts = [f"The number {i} has a text, quite long, with commas and all that." for i in range(5)]
    path = tmp_path / "t.csv"
    path.write_text("id,text\n" + "\n".join(f'{i},"{text}"' for i, text in enumerate([*texts, "Too few words for two spans."])))
    run("crop", "--input", path, "--out", tmp_path / "out.jsonl")
    pairs = read_rows(tmp_path / "out.jsonl")
    assert "6 texts in column 'text' (guessed)" in capsys.readouterr().out
    assert 4 <= len(pairs) <= 5
    for pair in pairs:
        source, number = pair["source"].split(":")
        text = texts[int(number) - 1]
        assert source == "t.csv" and pair["engine"] == "crop"
        assert pair["anchor"] in text and pair["positive"] in text and pair["anchor"] != pair["positive"]
        assert all(0.25 < len(pair[name].split()) / len(text.split()) < 0.75 for name in ("anchor", "positive"))


def test_noise_damages_a_text_and_keeps_its_words(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text(TEN_WORDS * 3)
    run("noise", "--input", path, "--out", tmp_path / "out.jsonl", "--delete", 0, "--chars", 0, "--swap", 0.5)
    pairs = read_rows(tmp_path / "out.jsonl")
    assert pairs
    for pair in pairs:
        assert sorted(pair["positive"].split()) == sorted(pair["anchor"].split()) and pair["positive"] != pair["anchor"]
    with pytest.raises(InputError, match="no pairs were made"):  # a copy without damage is no pair
        run("noise", "--input", path, "--out", tmp_path / "none.jsonl", "--delete", 0, "--chars", 0, "--swap", 0)
    rng = random.Random(0)
    assert spans.damage("one two three", rng, 1, 0, 0) == "one"
    damaged = spans.damage("abcdefgh", rng, 0, 0, 1)
    assert sorted(damaged) == sorted("abcdefgh") and damaged != "abcdefgh" and (damaged[0], damaged[-1]) == ("a", "h")
    assert {spans.damage("我很喜欢这个词 abcd 和那个 xyz", random.Random(i), 0, 0, 1) for i in range(9)} == {
        "我很喜欢这个词 acbd 和那个 xyz"
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The cat  sat — on the mat 👍👍.", ["The", "cat", "sat", "—", "on", "the", "mat", "👍👍."]),
        ("كيف حالك اليوم", ["كيف", "حالك", "اليوم"]),
        ("한국어 문장은 띄어쓰기", ["한국어", "문장은", "띄어쓰기"]),
        ("我喜欢 GPT-4 模型。", ["我", "喜", "欢", " GPT-4", " 模", "型", "。"]),
        ("你 好a的", ["你", " 好", "a", "的"]),
        ("❤️❤️", ["❤️", "❤️"]),
        ("カ\u3099ラスa1、", ["カ\u3099", "ラ", "ス", "a1", "、"]),
        ("ที่นี่", ["ที่", "นี่"]),
        ("ຢູ່ນີ້", ["ຢູ່", "ນີ້"]),
        ("ខ្ញុំ", ["ខ្ញុំ"]),
        ("မြန်မာ", ["မြ", "န်", "မာ"]),
        ("👨‍👩‍👧👍🏽🇩🇪🇫🇷❤️", ["👨‍👩‍👧", "👍🏽", "🇩🇪", "🇫🇷", "❤️"]),
    ],
)
def test_words_are_those_of_the_script(text, words):
    split, space = spans.split_words(text)
    assert split == words and space.join(words) == " ".join(text.split())


@pytest.mark.parametrize(
    "text",
    [
        "今天天气很好,我们一起去 Beijing 公园散步吧。",
        "ฉันกำลังเรียนภาษาไทยอยู่ที่บ้าน",
        "👍🏽👨‍👩‍👧🎉🇩🇪❤️😀😃😄🐱🚗",
        "القطة جلست على السجادة أمام باب البيت الكبير",
    ],
)
def test_every_script_can_be_cropped_and_damaged(tmp_path, text):
    (tmp_path / "t.txt").write_text(f"{text}\n" * 8, encoding="utf-8")
    run("crop", "--input", tmp_path / "t.txt", "--out", tmp_path / "crop.jsonl")
    pairs = read_rows(tmp_path / "crop.jsonl")
    assert len(pairs) >= 6 and all(pair[name] in text for pair in pairs for name in ("anchor", "positive"))
    run("noise", "--input", tmp_path / "t.txt", "--out", tmp_path / "noise.jsonl", "--delete", 0, "--swap", 0.5, "--chars", 0.5)
    pairs, units = read_rows(tmp_path / "noise.jsonl"), sorted(word.strip() for word in spans.split_words(text)[0])
    assert len(pairs) == 8
    if not text.startswith("ا"):  # characters move, and none is taken apart
        damaged = [sorted(word.strip() for word in spans.split_words(pair["positive"])[0] if word.strip()) for pair in pairs]
        assert all([u for u in words if not u.isascii()] == [u for u in units if not u.isascii()] for words in damaged)


def test_what_is_left_out_is_counted_with_the_reason(tmp_path, capsys):
    path = tmp_path / "t.jsonl"
    texts = ["one two three", "same " * 8, TEN_WORDS, "", 7]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    run("crop", "--input", path, "--out", tmp_path / "crop.jsonl", "--seed", 1)
    out = capsys.readouterr().out.splitlines()
    assert out[0].endswith("; 2 rows left out: 1 without text, 1 whose text is a number")
    assert out[1] == "2 texts left out: 1 of fewer than 8 words (--min-words), 1 whose two spans are equal"
    assert [pair["source"] for pair in read_rows(tmp_path / "crop.jsonl")] == ["t.jsonl:3"]
    run("noise", "--input", path, "--out", tmp_path / "noise.jsonl", "--delete", 0, "--swap", 1, "--chars", 0)
    assert "1 text left out: 1 that the damage did not change" in capsys.readouterr().out
    for engine, flags, message in (
        ("crop", ("--min-words", 50), r"t\.jsonl: no pairs were made, 3 texts left out: 3 of fewer than 50 words \(--min-words\)"),
        ("noise", ("--delete", 0, "--swap", 0, "--chars", 0), "no pairs were made, 3 texts left out: 3 that the damage did not change"),
    ):
        with pytest.raises(InputError, match=message):
            run(engine, "--input", path, "--out", tmp_path / "none.jsonl", *flags)


@pytest.mark.parametrize("text", ["word " * 100_000, "字" * 100_000])
def test_of_a_long_text_the_beginning_is_taken(tmp_path, capsys, text):
    (tmp_path / "t.txt").write_text(f"{text}\n{TEN_WORDS}", encoding="utf-8")
    for engine, n_words in (("crop", 0.7 * spans.MAX_WORDS + 1), ("noise", spans.MAX_WORDS)):
        run(engine, "--input", tmp_path / "t.txt", "--out", tmp_path / f"{engine}.jsonl", "--seed", 1)
        assert "1 of 2 texts cut to their first 2,048 words" in capsys.readouterr().out
        pair = read_rows(tmp_path / f"{engine}.jsonl")[0]
        lengths = [len(spans.split_words(pair[name])[0]) for name in ("anchor", "positive")]
        assert pair["source"] == "t.txt:1" and n_words / 3 < max(lengths) <= n_words


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"a,b\nx y,z w\n", "it has a, b: name one with --column"),
        ("t.txt", b"caf\xe9 \xff\n", "not UTF-8"),
        ("t.txt", b"short\n", "no pairs were made"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        run("crop", "--input", tmp_path / name, "--out", tmp_path / "out.jsonl")
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_gz_name_makes_a_gz_file(tmp_path):
    (tmp_path / "t.txt").write_text(TEN_WORDS)
    run("crop", "--input", tmp_path / "t.txt", "--out", tmp_path / "new" / "out.jsonl.gz")
    assert json.loads(gzip.decompress((tmp_path / "new" / "out.jsonl.gz").read_bytes()))["engine"] == "crop"


def test_nothing_is_overwritten_and_columns_are_checked(tmp_path):
    (tmp_path / "t.csv").write_text(f"text,label\n{TEN_WORDS.strip()},x\n")
    (tmp_path / "out.jsonl").write_text("mine")
    for name in ("t.csv", "missing.csv"):  # noticed before anything is read
        with pytest.raises(InputError, match="exists already"):
            run("crop", "--input", tmp_path / name, "--out", tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == "mine"
    with pytest.raises(InputError, match="no column body; it has text, label"):
        run("crop", "--input", tmp_path / "t.csv", "--column", "body", "--out", tmp_path / "new.jsonl")


def test_the_script_ends_with_one_line_and_status_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(HERE / "make_pairs.py"), "crop", "--input", "no.txt", "--out", str(tmp_path / "x.jsonl")])
    with pytest.raises(SystemExit) as exit_error:
        runpy.run_path(sys.argv[0], run_name="__main__")
    assert (exit_error.value.code, *capsys.readouterr()) == (2, "", "make_pairs.py: no file no.txt\n")


def test_pairs_are_written_under_a_name_that_can_be_read_again(tmp_path):
    for name in ("pairs.parquet", "pairs.csv", "pairs"):
        with pytest.raises(InputError, match="are written as JSONL, take a name that ends in"):
            make_pairs.main(make_pairs.build_parser().parse_args(["crop", "--input", "no.txt", "--out", str(tmp_path / name)]))


# --------------------------------------------------------------------------------------------------------- hard negatives


def test_mined_negatives_are_the_most_similar_texts_that_are_probably_wrong(tmp_path, llama, monkeypatch, capsys):
    from encoder import Encoder

    monkeypatch.setattr(mining, "SIMILARITIES_AT_ONCE", 20)  # two pairs at a time
    topics = ["cat", "dog", "bank", "river", "loan", "tree"]
    pairs = [{"anchor": f"The {t} is here.", "positive": f"About a {t}.", "engine": "crop"} for t in topics]
    pairs += [{"anchor": "The cat is here.", "positive": "A small cat.", "engine": "crop"}]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(p) + "\n" for p in pairs))
    model = make_run(llama, tmp_path / "run", prompt="retrieve", max_tokens=40)  # a prompt for each role
    run("mine", "--pairs", path, "--out", tmp_path / "hard.jsonl", "--negatives", 3, "--below", 0.9, "--model", model, "--dtype", "float32")
    mined = read_rows(tmp_path / "hard.jsonl")
    assert [{k: row[k] for k in ("anchor", "positive", "engine")} for row in mined] == pairs
    encoder = Encoder.load(model, dtype="float32")
    corpus = [p["positive"] for p in pairs]
    anchors, candidates = encoder.encode([p["anchor"] for p in pairs], "query"), encoder.encode(corpus)
    anchors, candidates = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (anchors, candidates))
    counts = []
    for i, row in enumerate(mined):
        cosines = candidates @ anchors[i]
        right = {p["positive"] for p in pairs if p["anchor"] == row["anchor"]}
        expected = [j for j in np.argsort(-cosines) if corpus[j] not in right and cosines[j] <= 0.9 * cosines[i]][:3]
        assert row["negatives"] == [corpus[j] for j in expected]
        assert row["scores"] == pytest.approx([cosines[i], *cosines[expected]], abs=1e-3)
        counts.append(len(expected))
    assert max(counts) > 0 and "7 candidates" in capsys.readouterr().out

    texts = tmp_path / "corpus.txt"
    texts.write_text("A mountain.\nThe cat is here.\nSnow.\nSnow.\n")
    flags = ("--pairs", path, "--corpus", texts, "--negatives", 9, "--below", 1, "--limit", 1, "--model", llama)
    run("mine", "--out", tmp_path / "other.jsonl", *flags)
    (row,) = read_rows(tmp_path / "other.jsonl")
    assert set(row["negatives"]) <= {"A mountain.", "Snow."} and len(set(row["negatives"])) == len(row["negatives"])
    assert "3 candidates" in capsys.readouterr().out


def test_pairs_are_mined_from_every_kind_of_file(tmp_path, llama):
    """All fields of a row are kept, as JSON allows it; half a surrogate pair in one of them does no harm."""
    import datetime

    import pyarrow as pa
    from pyarrow.parquet import write_table

    (tmp_path / "a.csv").write_text("anchor;positive;negative;id\nThe cat.;A cat.;;007\nThe dog.;A dog.;A log.;008\n")
    (tmp_path / "b.jsonl").write_text(r'{"anchor": "The cat.", "positive": "A cat.", "id": "\ud800"}' + "\n")
    rows = [{"anchor": "The cat.", "positive": "A cat.", "id": datetime.date(2026, 1, 2)}]
    write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    for name, ids in (("a.csv", ["007", "008"]), ("b.jsonl", ["\ud800"]), ("c.parquet", ["2026-01-02"])):
        run("mine", "--pairs", tmp_path / name, "--out", tmp_path / f"{name}.jsonl", "--model", llama)
        mined = read_rows(tmp_path / f"{name}.jsonl")
        assert [row["id"] for row in mined] == ids and [row.get("negative") for row in mined] == [None, "A log."][: len(ids)]


def test_neither_the_anchor_itself_nor_a_positive_of_an_equal_anchor_is_a_negative():
    """Unit vectors in the plane; cosines to the anchor: positive 0.8, candidates 0.6, 0.5, 0.79, 0.4."""
    plane = lambda *cosines: torch.tensor([[c, math.sqrt(1 - c * c)] for c in cosines])  # noqa: E731
    pairs = [{"anchor": "question", "positive": "right"}, {"anchor": "question", "positive": "right, too"}]
    corpus = ["question", "right, too", "nearly right", "wrong"]
    mining.add_negatives(pairs, plane(1, 1), plane(0.8, 0.5), corpus, plane(0.6, 0.5, 0.79, 0.4), 4, 0.95)
    assert [(pair["negatives"], pair["scores"]) for pair in pairs] == [(["wrong"], [0.8, 0.4]), (["wrong"], [0.5, 0.4])]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ('{"anchor": "a", "positive": "b"}\n{"anchor": "a"}', "line 2: needs the texts 'anchor' and 'positive'"),
        ("{", "line 1: "),
        ("[1]", "line 1"),
        ('{"anchor": "a", "positive": "b", "prompt": "cluster"}', "pairs with prompts of their own are not mined"),
    ],
)
def test_pairs_that_cannot_be_mined(tmp_path, content, message):
    path = tmp_path / "pairs.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        run("mine", "--pairs", path, "--out", tmp_path / "hard.jsonl")
    with pytest.raises(InputError, match="no file"):
        run("mine", "--pairs", tmp_path / "none.jsonl", "--out", tmp_path / "hard.jsonl")
    assert [p.name for p in tmp_path.iterdir()] == ["pairs.jsonl"]
