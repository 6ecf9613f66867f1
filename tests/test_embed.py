"""`embed.py`: every row once, in parts that are complete or absent, and the nearest of them."""

import contextlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import make_run
from embed_jobs import numbered_texts, rows_of, run_with_kills
from launch import torchrun
from short_runs import write_rows

import embed
from encoder import Encoder
from files.console import InputError
from files.reading import Table, TextStream
from serving.vectors import STORES, VectorFolder, quantize, read_parts, restore

PHRASES = ["the cat", "a mat", "rates rose", "this month", "the bank", "raised fees", "every account", "overdrawn", "to be", "a question"]
KILLS = int(os.environ.get("KILLS", 3))


def run(*arguments) -> None:
    embed.main([str(argument) for argument in arguments])


@pytest.fixture
def texts(tmp_path) -> Path:
    """Ten rows, the fourth of which has no text and the eighth no string."""
    rows = [{"id": f"r{i}", "text": phrase} for i, phrase in enumerate(PHRASES)]
    rows[3]["text"], rows[7]["text"] = "  ", [1]
    return write_rows(tmp_path / "t.jsonl", rows)


@pytest.mark.parametrize("format_", ["parquet", "npy"])
@pytest.mark.parametrize("store", STORES)
def test_every_row_has_its_vector_or_a_reason(llama, texts, tmp_path, capsys, store, format_):
    source = make_run(llama, tmp_path / "run", prompt="cluster")
    run(source, texts, "--out", tmp_path / "v", "--rows-per-part", 4, "--store", store, "--format", format_, "--keep-text")
    rows = rows_of(tmp_path / "v")
    assert list(rows) == [f"r{i}" for i in range(10) if i not in (3, 7)]
    own = Encoder.load(source)
    own.merge()
    vectors = own.encode([PHRASES[int(id_[1:])] for id_ in rows])
    cosines = (vectors * np.stack(list(rows.values()))).sum(1) / np.linalg.norm(np.stack(list(rows.values())), axis=1)
    assert cosines.min() > {"float32": 1 - 1e-6, "float16": 1 - 1e-5, "int8": 0.999, "binary": 0.6}[store]
    failed = [json.loads(line) for path in sorted((tmp_path / "v").glob("*.failed.jsonl")) for line in path.read_text().splitlines()]
    assert [(row["row"], row["id"]) for row in failed] == [(4, "r3"), (8, "r7")] and failed[0]["error"] == "no text"
    assert "2 of 10 rows have no vector" in capsys.readouterr().err
    run("search", tmp_path / "v", "raised fees", "-k", 1)
    assert "r5  raised fees" in capsys.readouterr().out


def test_the_same_command_goes_on_and_another_one_does_not(llama, texts, tmp_path, capsys, monkeypatch):
    flags = (llama, texts, "--out", tmp_path / "v", "--rows-per-part", 3)
    run(*flags)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "v").iterdir()}
    (tmp_path / "v" / "part-00001.parquet").unlink()
    (tmp_path / "v" / ".part-00001.parquet.77.tmp").write_text("of a killed job")
    encoded = []
    stream = Encoder.stream
    monkeypatch.setattr(Encoder, "stream", lambda self, texts, *a, **k: encoded.extend(texts) or stream(self, texts, *a, **k))
    run(*flags)
    assert encoded == PHRASES[4:6]
    assert {path.name: path.read_bytes() for path in (tmp_path / "v").iterdir()} == whole
    assert "10 rows in 4 parts, 7 of them before" in capsys.readouterr().out
    more = write_rows(tmp_path / "u.jsonl", [{"text": "a"}])
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "job.json").write_text('{"store": "float32", "width": 32}')
    for other, message in (
        ((*flags, "--store", "int8"), r"was begun with store float32, not int8: choose another --out"),
        ((*flags, "--role", "query"), "was begun with role document, not query"),
        ((llama, more, *flags[2:]), r"was begun with input t\.jsonl, not u\.jsonl"),
        ((make_run(llama, tmp_path / "run"), *flags[1:]), "was begun with fingerprint"),
        ((*flags[:2], "--out", tmp_path), "exists already and holds no vectors"),
        ((*flags, "--id", "no"), "no column no; it has id, text: name one with --id"),
        (("search", tmp_path, "a"), "holds no vectors: job.json is missing"),
        (("search", tmp_path / "cut", "a"), "holds no vectors: job.json is missing or damaged"),
        (("search", tmp_path / "v", "a", "--model", tmp_path / "run"), "was made by fingerprint"),
    ):
        with pytest.raises(InputError, match=message):
            run(*other)
    assert {path.name: path.read_bytes() for path in (tmp_path / "v").iterdir()} == whole
    (tmp_path / "v" / "part-00002.parquet").write_bytes(whole["part-00002.parquet"][:-20])
    with pytest.raises(InputError, match=r"part-00002\.parquet is damaged .*delete it and run the same command again"):
        run("search", tmp_path / "v", "a")


def test_another_file_of_the_same_name_and_size_is_not_gone_on_with(llama, tmp_path, monkeypatch):
    flags = (llama, write_rows(tmp_path / "t.jsonl", [{"text": "a cat"}]), "--out", tmp_path / "v")
    run(*flags)
    write_rows(tmp_path / "t.jsonl", [{"text": "a dog"}])
    with pytest.raises(InputError, match=r"v was begun with content \w{16}, not \w{16}: choose another --out"):
        run(*flags)
    for text in ("a cat\n", "a dog\n"):  # of standard input nothing else is known
        path = tmp_path / "stdin.txt"
        path.write_text(text)
        with path.open() as stdin:
            monkeypatch.setattr(sys, "stdin", stdin)
            with pytest.raises(InputError, match="was begun with content") if "dog" in text else contextlib.nullcontext():
                run(llama, "-", "--out", tmp_path / "piped")


def test_shards_share_a_folder(llama, texts, tmp_path):
    flags = (llama, texts, "--rows-per-part", 2, "--out")
    run(*flags, tmp_path / "whole")
    other = tmp_path / "v" / ".part-00003.parquet.77.tmp"
    for i in (3, 1, 2):
        run(*flags, tmp_path / "v", "--shard", f"{i}/3")
        if i == 1:
            other.touch()  # as if shard 1 were still writing it
    assert other.exists()  # shard 2 has left it alone
    other.unlink()
    assert {path.name: path.read_bytes() for path in (tmp_path / "v").iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()
    }


def test_a_text_that_cannot_be_embedded_costs_no_other(llama, texts, tmp_path, monkeypatch):
    stream = Encoder.stream

    def failing(self, texts, *args, **options):
        if PHRASES[6] in texts:
            raise InputError("the vector of a text is not finite")
        return stream(self, texts, *args, **options)

    monkeypatch.setattr(Encoder, "stream", failing)
    run(llama, texts, "--out", tmp_path / "v")
    assert list(rows_of(tmp_path / "v")) == [f"r{i}" for i in range(10) if i not in (3, 6, 7)]
    failed = [json.loads(line) for line in (tmp_path / "v" / "part-00000.failed.jsonl").read_text().splitlines()]
    assert failed[-1] == {"row": 7, "id": "r6", "error": "the vector of a text is not finite"}


def test_rows_without_a_column_of_ids_are_numbered(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("a\n\nb\nc\n")
    parts = list(read_parts(Table(path).rows, "text", None, 2))
    assert [(part.number, part.ids, part.texts) for part in parts] == [(0, [1], ["a"]), (1, [3, 4], ["b", "c"])]


def test_stored_vectors_keep_their_directions():
    vectors = np.random.default_rng(0).normal(size=(50, 40)).astype(np.float32)
    vectors[0] = 0
    for store, least in (("float32", 1), ("float16", 0.99999), ("int8", 0.9999), ("binary", 0.7)):
        stored, scales = quantize(vectors, store)
        back = restore(stored, scales, store, 40)
        cosines = (back * vectors).sum(1)[1:] / np.linalg.norm(back, axis=1)[1:] / np.linalg.norm(vectors, axis=1)[1:]
        assert cosines.min() >= least - 1e-6
        assert store == "binary" or not back[0].any()
    assert quantize(vectors, "binary")[0].shape == (50, 5) and quantize(vectors, "int8")[0].dtype == np.int8


def test_a_text_has_the_same_vector_in_every_script(llama, tmp_path, monkeypatch, capsys):
    """Space around a text is no part of it: not here, and not in search.py, evaluate.py --texts and attention.py."""
    path = tmp_path / "t.jsonl"
    write_rows(path, [{"text": f"  {phrase} \n"} for phrase in PHRASES])
    run(llama, path, "--out", tmp_path / "v", "--keep-text")
    part = VectorFolder.open(tmp_path / "v").read(0)
    assert part.texts == PHRASES == [text for _, text in TextStream(path)]
    np.testing.assert_allclose(part.vectors, Encoder.load(llama).encode(PHRASES), atol=1e-5)
    asked = []
    encode = Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda self, texts, *a, **k: asked.extend(texts) or encode(self, texts, *a, **k))
    run("search", tmp_path / "v", " the bank ")
    assert asked[-1] == "the bank"
    with pytest.raises(InputError, match="nothing to look for"):
        run("search", tmp_path / "v", " ")


def test_what_several_processes_cannot_do_is_one_line(llama, texts, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="several processes cannot share standard input"):
        run(llama, "-", "--out", tmp_path / "v")
    with pytest.raises(InputError, match="leave torchrun out"):
        run(llama, texts, "--out", tmp_path / "v", "--engine", "ray")
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(InputError, match="--workers is for --engine ray"):
        run(llama, texts, "--out", tmp_path / "v", "--workers", 2)
    assert not (tmp_path / "v").exists()


@pytest.mark.slow
def test_kills_at_random_moments_lose_and_double_no_row(llama, tmp_path):
    path = numbered_texts(tmp_path / "t.jsonl", 9000)
    run_with_kills(tmp_path / "v", KILLS, 0.5, llama, path, "--rows-per-part", 50)
    run(llama, path, "--rows-per-part", 50, "--out", tmp_path / "whole")
    rows, whole = rows_of(tmp_path / "v"), rows_of(tmp_path / "whole")
    assert list(rows) == list(whole) == [str(i) for i in range(9000)]
    assert all((rows[name] == whole[name]).all() for name in whole)
    assert not list((tmp_path / "v").glob(".*"))


@pytest.mark.slow
def test_two_processes_embed_as_one(llama, texts, tmp_path):
    run(llama, texts, "--rows-per-part", 4, "--out", tmp_path / "one")
    done = torchrun("embed.py", llama, texts, "--rows-per-part", 4, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("10 rows in 3 parts") == 1  # the first process alone prints
    one, two = rows_of(tmp_path / "one"), rows_of(tmp_path / "two")
    assert list(one) == list(two) and len(one) == 8
    np.testing.assert_allclose(np.stack(list(two.values())), np.stack(list(one.values())), atol=1e-5)
    again = torchrun("embed.py", llama, texts, "--rows-per-part", 4, "--out", tmp_path / "two")
    assert "10 rows in 3 parts, 10 of them before" in again.stdout
