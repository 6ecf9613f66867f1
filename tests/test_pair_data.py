"""Pairs: which rows are valid, files on disk, held-out pairs, the order of training, batches of token ids."""

import datetime
import gzip
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow.parquet import write_table

from encoder import Encoder
from files.console import InputError
from training import pair_data
from training.pair_data import Pair, PairDataset, PairSampler, hold_out, prefetch, tokenize_pairs, validate_pair

ROOT = Path(__file__).resolve().parent.parent


def many_pairs(path: Path, n: int = 400) -> Path:
    rows = [{"anchor": f"Number {i} of the list", "positive": f"the list has {i}"} for i in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_validating_pairs_loads_neither_torch_nor_a_model():
    code = "import training.pair_data, sys; sys.exit(bool({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_valid_row_becomes_a_pair():
    assert validate_pair({"anchor": "a", "positive": "b", "engine": "crop"}, "here") == Pair("a", "b")
    assert validate_pair({"anchor": "a", "positive": "b", "negative": "c", "negatives": ["d", "e"]}, "") == Pair("a", "b", ("c", "d", "e"))
    assert validate_pair({"anchor": "", "positive": "", "negative": None, "negatives": None}, "") == Pair("", "")


@pytest.mark.parametrize(
    "row, message",
    [
        ({}, r"needs the texts 'anchor' and 'positive', has \{\}"),
        ({"anchor": "a"}, r"needs the texts 'anchor' and 'positive', has \{\"anchor\": \"a\"\}"),
        ({"query": "a", "document": "b"}, r"has \{.*\}: rename the columns of pairs, or make pairs of texts with make_pairs\.py"),
        ({"anchor": "a", "positive": 1}, "needs the texts"),
        ({"anchor": None, "positive": "b"}, "needs the texts"),
        ({"anchor": "\ud800"}, r"needs the texts .*\\ud800"),  # the message can be printed
        ({"anchor": "a", "positive": "b", "negative": 1}, "'negative' must be a text"),
        ({"anchor": "a", "positive": "b", "negatives": "c"}, "'negatives' a list of texts"),
        ({"anchor": "a", "positive": "b", "negatives": 0}, "'negatives' a list of texts"),
        ({"anchor": "a", "positive": "b", "negatives": ["c", None]}, "'negatives' a list of texts"),
        ({"anchor": "a", "positive": "\ud800"}, "half a surrogate pair"),
        ({"anchor": "a", "positive": "b", "negatives": ["\udc00"]}, "half a surrogate pair"),
    ],
)
def test_an_invalid_row_is_refused_with_its_place(row, message):
    with pytest.raises(InputError, match=f"^f.jsonl, line 3: .*{message}") as error:
        validate_pair(row, "f.jsonl, line 3")
    str(error.value).encode()


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is empty"),
        (b'{"anchor": "a", "positive": "b"}\n', "holds 1 pairs"),
        (b'{"anchor": "a"}\n', "line 1: needs the texts 'anchor' and 'positive'"),
        (b'{"anchor": "a", "positive": "b", "x": ' + b"9" * 5000 + b"}\n", "line 1: cannot be read"),
        (b"[" * 200_000, "line 1: cannot be read"),
        (b'{"anchor": "a", "positive": "b"}\nnot json\n', "line 2: not JSON"),
        (b'["a", "b"]\n', "line 1: needs"),
        (b'{"anchor": "\xff", "positive": "b"}\n', "not UTF-8"),
        (b'{"anchor": "c", "positive": "d"}\n\n{"anchor": "\\ud800", "positive": "b"}\n' * 2, "line 3: .*half a surrogate pair"),
        (b'{"anchor": "c", "positive": "d"}\n' * 3 + b'{"anchor": "a"}\n', "line 4: needs"),  # behind the first two
    ],
)
def test_a_file_that_holds_no_pairs_is_refused(tmp_path, content, message):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        PairDataset([path])


def test_rows_are_counted_through_all_files(tmp_path):
    first, second = many_pairs(tmp_path / "many.jsonl", 50), tmp_path / "other.jsonl"
    second.write_text(
        '{"anchor": "x", "positive": "y", "negative": "z"}\n' + '{"anchor": "x", "positive": "w", "negatives": ["u", "v"]}\n' * 2
    )
    pairs = PairDataset([first, second])
    assert (len(pairs), pairs.sizes, pairs.name) == (53, [50, 3], "many.jsonl + other.jsonl")
    assert pairs[[52, 7, 50]] == [
        Pair("x", "w", ("u", "v")),
        Pair("Number 7 of the list", "the list has 7"),
        Pair("x", "y", ("z",)),
    ]
    assert PairDataset([first]).sha256 == hashlib.sha256(first.read_bytes()).hexdigest() != pairs.sha256
    with pytest.raises(InputError, match="the same pairs as another file"):
        PairDataset([first, second, first])
    with pytest.raises(InputError, match=r"no file .*none\.jsonl: make pairs"):
        PairDataset([first, tmp_path / "none.jsonl"])


@pytest.mark.parametrize("name", ["p.csv", "p.tsv.gz", "p.json", "p.parquet"])
def test_pairs_come_in_every_kind_of_file(tmp_path, name):
    """An empty cell `negative` of a csv is none; elsewhere it is an empty text."""
    rows = [{"anchor": "a, b", "positive": "c", "negative": ""}, {"anchor": "007", "positive": "NA", "negative": "d"}]
    path = tmp_path / name
    if name == "p.parquet":
        write_table(pa.Table.from_pylist(rows), path)
    elif name == "p.json":
        path.write_text(json.dumps(rows))
    else:
        separator = "," if name == "p.csv" else "\t"
        text = "\n".join(separator.join(f'"{cell}"' for cell in cells) for cells in [rows[0], *(row.values() for row in rows)])
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    strings_only = name in ("p.csv", "p.tsv.gz")
    assert PairDataset([path])[[0, 1]] == [Pair("a, b", "c", () if strings_only else ("",)), Pair("007", "NA", ("d",))]


def test_what_is_no_file_of_pairs_is_refused(tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "p.docx").write_text("a")
    (tmp_path / "p.csv").write_text("anchor,positive,negatives\na,b,c\n")
    for name, message in (
        ("folder.jsonl", "is a folder without recipe.json, so make_pairs.py auto did not write it: name a file"),
        ("p.docx", "unknown kind of file"),
        ("p.csv", r"line 2: a csv or tsv cannot hold the list 'negatives'"),
    ):
        with pytest.raises(InputError, match=message):
            PairDataset([tmp_path / name])


def test_a_row_that_is_no_json_can_be_shown():
    with pytest.raises(InputError, match="2026-01-02"):
        validate_pair({"anchor": datetime.date(2026, 1, 2)}, "")


def test_a_file_is_read_once_and_again_when_it_changes(tmp_path, monkeypatch):
    path, read, lines = many_pairs(tmp_path / "many.jsonl", 50), pair_data.read_pairs, []
    PairDataset([path])
    monkeypatch.setattr(pair_data, "read_pairs", lambda path: (lines.append(pair) or pair for pair in read(path)))
    PairDataset([path])
    assert len(lines) == 2  # to see that there are two
    many_pairs(path, 40)
    assert PairDataset([path]).sizes == [40] and len(lines) > 40


def test_a_damaged_cache_is_named(tmp_path):
    path = many_pairs(tmp_path / "many.jsonl", 60)
    sha256 = PairDataset([path]).sha256
    (arrow,) = Path(os.environ["HF_DATASETS_CACHE"]).glob(f"generator/*{sha256}*/**/*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:100])
    with pytest.raises(InputError, match=r"the cache of .*many\.jsonl is damaged .*: delete .*generator"):
        PairDataset([path])


# --------------------------------------------------------------------------------------------------------- held-out pairs


def test_a_twentieth_at_most_is_held_out():
    assert len(hold_out(400, 256)) == len(set(hold_out(400, 256).tolist())) == 20
    assert hold_out(400, 256).tolist() == sorted(hold_out(400, 256).tolist())
    assert len(hold_out(10**6, 256)) == 256
    assert not len(hold_out(400, 0)) and not len(hold_out(10**6, 7))  # none, and fewer than 8


@pytest.mark.parametrize(
    ("size", "batch_size", "expected"),
    [(320, 2, 16), (319, 2, 16), (160, 2, 16), (159, 2, 15), (80, 2, 8), (79, 2, 0), (2, 2, 0), (100, 92, 8), (100, 93, 0), (319, 305, 14)],
)
def test_a_small_set_gives_a_tenth_and_keeps_a_batch(size, batch_size, expected):
    assert len(hold_out(size, 256, batch_size)) == expected
    assert len(hold_out(size, 0, batch_size)) == 0


def test_copies_of_a_held_out_pair_are_found(tmp_path):
    path = many_pairs(tmp_path / "many.jsonl", 40)
    path.write_text(path.read_text() * 2 + '{"anchor": "Number 7 of the list", "positive": "another"}\n')
    assert PairDataset([path]).copies(np.array([7, 30])).tolist() == [7, 30, 47, 70]


# -------------------------------------------------------------------------------------------------- the order of training


def sampler(sizes, batch_size=3, steps=40, seed=1, held_out=(), weights=None, one_source=False) -> PairSampler:
    return PairSampler(sizes, np.array(held_out, np.int64), batch_size, steps, seed, weights, one_source)


def test_every_pair_is_taken_once_in_each_pass():
    taken = [row for step in range(40) for row in sampler([10]).rows(step)]
    assert all(sorted(taken[start : start + 10]) == list(range(10)) for start in range(0, 120, 10))
    assert taken[:10] != taken[10:20]


def test_the_rows_of_a_step_depend_on_its_number_and_the_seed_alone():
    first = sampler([10])
    in_order = [first.rows(step) for step in range(40)]
    assert [first.rows(39), first.rows(7)] == [in_order[39], in_order[7]]
    assert [sampler([10]).rows(step) for step in (39, 7)] == [in_order[39], in_order[7]]
    assert sampler([10], seed=2).rows(0) != in_order[0]


def test_held_out_rows_are_never_taken():
    taken = {row for step in range(40) for row in sampler([6, 4], held_out=[2, 7]).rows(step)}
    assert taken == set(range(10)) - {2, 7}


def test_sources_are_mixed_by_their_weights():
    mixed = sampler([1000, 10], 20, 200, weights=[1, 3])
    batches = [mixed.rows(step) for step in range(200)]
    assert {len(rows) for rows in batches} == {20}
    second = [row for rows in batches for row in rows if row >= 1000]
    assert len(second) == pytest.approx(3000, rel=0.05)
    assert all(sorted(second[start : start + 10]) == list(range(1000, 1010)) for start in range(0, 2000, 10))  # permuted by itself
    assert len({sum(row >= 1000 for row in rows) for rows in batches}) > 3  # shares are drawn, not fixed


def test_a_batch_from_one_source_is_from_one_source():
    def batches(weights) -> list[list[int]]:
        single = sampler([300, 100], 20, 200, weights=weights, one_source=True)
        return [single.rows(step) for step in range(200)]

    assert all(len({row >= 300 for row in rows}) == 1 for rows in batches(None))
    assert sum(rows[0] >= 300 for rows in batches(None)) == pytest.approx(50, abs=20)  # in proportion to the files' pairs
    assert sum(rows[0] >= 300 for rows in batches([1, 9])) == pytest.approx(180, abs=15)


# ------------------------------------------------------------------------------------------------------------- token ids


def test_equal_texts_of_a_batch_have_equal_ids(llama):
    encoder = Encoder.load(llama, prompt="retrieve", max_tokens=3)
    batch = tokenize_pairs(encoder, [Pair("the cat", "a bank", ("the mat sat on", "")), Pair("a bank", "the cat"), Pair("", "a", ("a",))])
    assert batch.n_pairs == 3 and [len(texts.ids) for texts in batch.texts] == [3, 3, 3]
    assert batch.negative_rows == [[0, 1], [], [2]]
    (a, b, c, empty), (d, e), (f, g, h) = batch.text_ids
    assert len({a, b, c, empty}) == 4 and (d, e) == (b, a) and f == empty and g == h not in (a, b, c, empty)
    assert batch.anchors.ids == encoder.tokenize(["the cat", "a bank", ""], "query").ids  # each role has its prompt
    assert batch.positives.ids == encoder.tokenize(["a bank", "the cat", "a"], "document").ids
    assert [texts.n_empty for texts in batch.texts] == [1, 0, 1]
    assert sum(texts.n_truncated for texts in batch.texts) == 1


def test_prefetched_batches_are_those_of_the_steps(tmp_path, models_dir):
    encoder, pairs = Encoder.load(models_dir["mistral"]), PairDataset([many_pairs(tmp_path / "many.jsonl", 20)])
    order = sampler([20], 4, steps=10)
    batches = list(prefetch(encoder, pairs, order, range(3, 6)))
    assert batches == [tokenize_pairs(encoder, pairs[order.rows(step)]) for step in (3, 4, 5)]
    assert batches[0] != batches[1] and list(prefetch(encoder, pairs, order, range(5, 5))) == []
