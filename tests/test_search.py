"""Nearest texts: `nearest`, `Encoder.nearest`, search.py."""

import numpy as np
import pytest
from conftest import TEXTS, make_run

import search
from encoder import Encoder, EncodingReport, nearest, streaming
from files.console import InputError


def run(*flags) -> None:
    search.main(search.build_parser().parse_args([str(flag) for flag in flags]))


def test_three_vectors_that_can_be_checked_by_hand():
    vectors = np.array([[0, 1], [3, 3], [2, 0], [5, 0]], np.float32)
    result = nearest.nearest(np.array([[1, 0], [0, 0]], np.float32), [vectors], 3)
    assert result.numbers.tolist() == [[2, 3, 1], [0, 1, 2]]  # of equally near ones the first; a vector of zeros is near to none
    np.testing.assert_allclose(result.cosines, [[1, 1, 0.5**0.5], [0, 0, 0]], atol=1e-6)


def test_what_rounding_alone_tells_apart_is_equally_near():
    """Copies of a text have vectors that differ in the last bits where their batches differ."""
    vectors = np.array([[0.6, 0.8], [0.6000002, 0.8]], np.float32)
    query = np.array([[1, 0]], np.float32)
    assert (nearest.unit(vectors) @ query.T)[1] > (nearest.unit(vectors) @ query.T)[0]
    assert nearest.nearest(query, [vectors], 2).numbers.tolist() == [[0, 1]]


def test_blocks_change_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    queries, vectors = rng.normal(size=(5, 8)).astype(np.float32), rng.normal(size=(90, 8)).astype(np.float32)
    vectors[[3, 40, 88]] = vectors[17]  # copies, in several blocks
    expected = np.argsort(-np.round(nearest.unit(queries) @ nearest.unit(vectors).T, 6), axis=1, kind="stable")
    for block, at_once in ((90, 2**22), (7, 2**22), (90, 5), (11, 15)):
        monkeypatch.setattr(nearest, "COSINES_AT_ONCE", at_once)
        result = nearest.nearest(queries, (vectors[i : i + block] for i in range(0, 90, block)), 20)
        assert result.numbers.tolist() == expected[:, :20].tolist() and result.cosines.dtype == np.float32


def test_fewer_texts_than_asked_for_and_none():
    vectors = np.eye(3, dtype=np.float32)
    assert nearest.nearest(vectors[:1], [vectors], 9).numbers.tolist() == [[0, 1, 2]]
    assert nearest.nearest(vectors[:2], [], 9).numbers.shape == (2, 0)
    assert nearest.nearest(vectors[:0], [vectors], 2).cosines.shape == (0, 2)
    with pytest.raises(InputError, match="must be 1 or more, not 0"):
        nearest.nearest(vectors, [vectors], 0)


def test_texts_vectors_and_windows_agree(llama, monkeypatch):
    """Also without normalization in the contract; queries have their own prompt."""
    encoder = Encoder.load(llama, prompt="retrieve", normalize=False)
    texts = [*TEXTS, *reversed(TEXTS)]
    queries = encoder.encode(TEXTS[:2], "query")
    cosines = nearest.unit(queries) @ nearest.unit(encoder.encode(texts)).T
    report = EncodingReport()
    whole = encoder.nearest(TEXTS[:2], texts, 3, report=report)
    np.testing.assert_allclose(whole.cosines, -np.sort(-cosines, axis=1)[:, :3], atol=1e-5)
    assert report.n_empty == 2
    assert np.abs(nearest.unit(encoder.encode(TEXTS[:2])) @ nearest.unit(encoder.encode(texts)).T - cosines).max() > 1e-3
    assert encoder.nearest(TEXTS[:2], encoder.encode(texts), 3).numbers.tolist() == whole.numbers.tolist()
    monkeypatch.setattr(streaming, "WINDOW", 3)
    assert encoder.nearest(TEXTS[:2], iter(texts), 3).numbers.tolist() == whole.numbers.tolist()
    for texts, k, message in (
        (np.zeros((4, 3)), 3, r"must be \(N, 32\), not \(4, 3\)"),
        (TEXTS, 0, "k must be 1 or more"),
        ("a", 1, "list"),
    ):
        with pytest.raises(InputError, match=message):
            encoder.nearest(["a"], texts, k)


def test_the_script_prints_the_nearest_texts_of_every_query(llama, tmp_path, capsys):
    path = tmp_path / "texts.csv"
    path.write_text("id,text\n" + "".join(f'{i},"{text}"\n' for i, text in enumerate(TEXTS)))
    model = make_run(llama, tmp_path / "mine", prompt="cluster")
    run("--model", model, "--input", path, "--query", TEXTS[0], "--query", TEXTS[2], "-k", 2)
    printed, errors = capsys.readouterr()
    lines = printed.splitlines()
    assert [lines[0], lines[3]] == [TEXTS[0], TEXTS[2]] and len(lines) == 6
    assert (
        lines[1] == f"  1.000  texts.csv:1  {TEXTS[0]}" and lines[4] == f"  1.000  texts.csv:3  {TEXTS[2]}"
    )  # cluster: one prompt for both
    assert "this prompt is the same for queries and texts" in errors and Encoder.load(model).fingerprint in errors
    run("--model", llama, "--input", path, "--query", "cat")
    printed, errors = capsys.readouterr()
    assert len(printed.splitlines()) == 5 and "prompt retrieve" in errors and "the same for queries" not in errors  # TEXTS has an empty one
    run("--model", llama, "--input", path, "--query", "cat", "--prompt", "none", "--query-prompt", "question: {text}")
    assert "prompt {text} (queries: question: {text})" in capsys.readouterr().err


def test_bad_flags_are_one_line(llama, tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("a\n")
    model = make_run(llama, tmp_path / "mine", prompt="cluster")
    for flags, message in (
        (("--query", "a"), "give --input"),
        (("--input", path), "give --query"),
        (("--input", path, "--query", " "), "give --query"),
        (("--input", path, "--query", "a", "-k", 0), "-k must be 1 or more, not 0"),
        (("--input", path, "--query", "a", "--dtype", "int4"), "unknown dtype"),
        (("--input", path, "--query", "a", "--query-prompt", "none"), "give --prompt as well"),
        (("--input", path, "--query", "a", "--model", "typo"), "no model 'typo'"),
        (("--input", path, "--query", "a", "--model", model, "--prompt", "none"), "prompt is 'cluster' in the run, 'none' was asked for"),
        (("--input", tmp_path / "no.csv", "--query", "a"), "no file"),
    ):
        with pytest.raises(InputError, match=message):
            run(*flags)


def test_texts_that_are_all_equally_near_are_noticed(llama, tmp_path, capsys):
    path = tmp_path / "texts.txt"
    path.write_text("a cat\na cat\na cat\n")
    run("--model", llama, "--input", path, "--query", "a dog", "-k", 2)
    assert "warning: the nearest texts are all equally near" in capsys.readouterr().err
