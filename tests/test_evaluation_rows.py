"""The rows of the table: runs, bases, baselines."""

import json
import os

import numpy as np
import pytest
from conftest import make_run
from short_evaluations import (
    labelled,
    offline,  # noqa: F401, a fixture that every test uses
    parse,
    run,
    write_csv,
)

from encoder import Encoder
from evaluation import mteb_model, rows
from evaluation.mteb_model import MtebModel
from files.console import InputError


def test_vectors_that_are_one_point_are_noticed(capsys):
    """Also where a text or two stand apart; not where the texts are the same, and not where vectors are merely close."""

    def encode(vectors, texts=None):
        texts = texts or [f"text {i}" for i in range(len(vectors))]
        MtebModel("mine", "f" * 16, None, lambda *_: np.array(vectors, np.float32)).encode([{"text": texts}])
        return capsys.readouterr().err

    mteb_model.warn_once.cache_clear()
    assert encode([[1, 0]]) == encode([[1, 0]] * 9, ["same"] * 9) == encode([[1, 0.03], [1, -0.03]] * 9) == ""
    for vectors in ([[1, 0.001], [2, 0]] * 100 + [[0, 0]], [[0, 0]] * 9):
        mteb_model.warn_once.cache_clear()
        assert encode(vectors) == (
            "warning: mine: different texts have nearly the same vector (cosine above 0.9999): its scores mean little\n"
        )
    assert encode([[1, 0]] * 9) == ""  # said once


def test_a_baseline_that_cannot_score_the_task_is_an_error(tmp_path):
    """TF-IDF fitted on each side of a pair by itself gives numbers that mean nothing."""
    path = write_csv(tmp_path / "sts.csv", "text1,text2,score", [("cat a", "cat b", 5), ("cat a", "dog b", 0)])
    with pytest.raises(InputError, match="can score clustering, not STS"):
        run("--data", path, "--model", "tiny", "--baselines", "tfidf")
    with pytest.raises(InputError, match="a sentence-transformers model is a row of --model: st:no/such"):
        run("--data", labelled(tmp_path / "mine.csv"), "--model", "tiny", "--baselines", "no/such")


def test_bos_is_pooled_in_the_rows_of_scope_all_only(llama):
    made = rows.base_rows(llama, "none", parse("--pooling", "mean", "--scope", "all", "text", "--keep-bos"))
    assert [(row.contract["scope"], row.contract["keep_bos"]) for row in made] == [("all", True), ("text", False)]
    texts = ["The cat sat.", "a"]
    expected = Encoder.load(llama, pooling="mean", scope="all", keep_bos=True).encode(texts)
    np.testing.assert_allclose(made[0].encode([{"text": texts}]), expected, atol=1e-6)


def test_queries_may_have_a_prompt_of_their_own(llama, tmp_path):
    flags = ("--prompt", "none", "--query-prompt", "query: {text}")
    (row,) = rows.base_rows(llama, "none", parse(*flags))
    assert row.contract["prompts"] == {"query": {"prefix": "query: ", "suffix": ""}, "document": {"prefix": "", "suffix": ""}}
    assert row.label == "llama, none / query: {text}, mean, text"
    model = make_run(llama, tmp_path / "mine", prompt="none", query_prompt="query: {text}")
    assert rows.changes_to_run(model, parse(*flags)) == {}
    with pytest.raises(InputError, match=r"prompt is '{text} \(queries: query: {text}\)' in the run, 'none' was asked for"):
        rows.changes_to_run(model, parse("--prompt", "none"))
    changes = rows.changes_to_run(model, parse("--prompt", "none", "--query-prompt", "q {text}", "--override-contract"))
    assert Encoder.load(model, override_contract=True, **changes).contract.prompts["query"]["prefix"] == "q "
    with pytest.raises(InputError, match="give prompt as well"):
        Encoder.load(llama, query_prompt="q {text}")


def test_rows_that_share_forward_passes_equal_separate_ones(llama, monkeypatch):
    made = rows.base_rows(llama, "cluster", parse("--pooling", "mean", "last", "attention", "--scope", "all", "text"))
    texts, calls, stream = ["The cat sat.", "a", "Rates rose again."], [], Encoder.stream
    monkeypatch.setattr(Encoder, "stream", lambda self, *args, **options: calls.append(args) or stream(self, *args, **options))
    vectors = [row.encode([{"text": texts}]) for row in made]
    assert len(made) == 6 and calls == [(texts, "document")]
    for row, shared in zip(made, vectors, strict=True):
        alone = Encoder.load(llama, prompt="cluster", pooling=row.contract["pooling"], scope=row.contract["scope"])
        assert row.fingerprint == alone.fingerprint
        np.testing.assert_allclose(shared, alone.encode(texts), atol=1e-6)


def test_a_note_on_a_base_is_printed_once(llama, capsys, monkeypatch):
    """The base is loaded for each prompt, and for each type of task."""
    load = Encoder.load

    def load_with_note(*args, **options):
        encoder = load(*args, **options)
        encoder.notes = ["texts are padded"]
        return encoder

    monkeypatch.setattr(Encoder, "load", load_with_note)
    mteb_model.warn_once.cache_clear()
    for task_type in ("Clustering", "STS"):
        assert len(list(rows.table_rows(parse("--model", llama, "--prompt", "none", "cluster"), task_type, []))) == 2
    assert capsys.readouterr().err == "warning: llama: texts are padded\n"


def test_a_run_that_was_changed_after_training_is_scored_with_a_warning(llama, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = make_run(llama, tmp_path / "runs" / "mine")
    (tmp_path / "runs" / "mine" / "summary.json").write_text('{"fingerprint": "0123456789abcdef"}')
    mteb_model.warn_once.cache_clear()
    assert len(list(rows.table_rows(parse("--model", model), "Clustering", []))) == 1
    warned = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
    changed = "warning: runs/mine: embedding.json or the adapter was changed after training"
    assert warned == [f"{changed}: fingerprint {Encoder.load(model).fingerprint}, summary.json has 0123456789abcdef"]


def test_without_a_model_the_newest_run_beside_its_base(llama, tmp_path, capsys, monkeypatch):
    path = labelled(tmp_path / "mine.csv")
    monkeypatch.chdir(tmp_path)
    run("--data", path)
    assert "tiny, cluster, last, all" in capsys.readouterr().out
    make_run(llama, tmp_path / "runs" / "old")
    make_run(llama, tmp_path / "runs" / "new", prompt="prompt-eol", pooling="mean", scope="text")
    os.utime(tmp_path / "runs" / "old" / "embedding.json", (1, 1))
    run("--data", path, "--out", tmp_path / "r.json")
    results = json.loads((tmp_path / "r.json").read_text())["results"]
    assert [cell["model"] for cell in results] == ["llama, untuned, same contract", "runs/new"]
    base, tuned = (cell["contract"] for cell in results)
    assert {k for k in tuned if tuned[k] != base[k]} <= {"data"} and base["prompts"] == tuned["prompts"]
    assert results[0]["fingerprint"] != results[1]["fingerprint"]
