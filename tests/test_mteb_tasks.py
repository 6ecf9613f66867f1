"""Files of labelled texts as tasks of mteb: the right scores, and bad data in one line."""

import gzip
import json
import math
import sys
import tracemalloc

import numpy as np
import pytest
from short_evaluations import (
    choose,
    labelled,
    offline,  # noqa: F401, a fixture that every test uses
    oracle_score,
    run,
    write_csv,
)

from evaluation import scores
from evaluation.mteb_model import MtebModel
from files.console import InputError
from tasks import mteb_tasks
from tasks.mteb_tasks import local_task


def test_clustering_scores_every_row_with_mteb(tmp_path):
    from mteb.abstasks import AbsTaskClustering

    path = labelled(tmp_path / "mine.csv")
    task = local_task(path)
    assert isinstance(task, AbsTaskClustering) and task.max_fraction_of_documents_to_embed is None
    cell, oracle = oracle_score(path)
    assert len(oracle.calls) == 1 and len(oracle.calls[0][1]) == 60 and oracle.calls[0][0] == "document"
    assert cell["task"] == "mine" and cell["metric"] == "v_measure"
    assert cell["score"] == pytest.approx(1) and cell["ami"] == pytest.approx(1) and cell["splits"] == {"test": pytest.approx(1)}
    assert len(cell["bootstrap_scores"]) == 10 and cell["std"] == pytest.approx(0, abs=1e-6)
    constant = MtebModel("constant", "c" * 16, None, lambda texts, role: np.ones((len(texts), 4), np.float32))
    assert scores.score(task, constant)["score"] == pytest.approx(0, abs=1e-6)


def test_a_gzipped_file_is_the_same_task(tmp_path):
    plain, gzipped = (local_task(labelled(tmp_path / name)) for name in ("mine.csv", "mine.csv.gz"))
    assert plain.metadata.name == gzipped.metadata.name == "mine"
    assert plain.metadata.dataset == gzipped.metadata.dataset  # the hash of the data is in it
    assert plain.dataset["test"][:] == gzipped.dataset["test"][:]


def test_classification_sts_and_retrieval(tmp_path):
    cell, _ = oracle_score(labelled(tmp_path / "mine.csv"), "Classification")
    assert (cell["type"], cell["metric"], cell["score"]) == ("Classification", "accuracy", pytest.approx(1))
    assert len(cell["bootstrap_scores"]) == 10

    pairs = [("cat a", "cat b", 5), ("cat a", "dog b", 0), ("car a", "car c", 4), ("road a", "cat c", 1)]
    cell, _ = oracle_score(write_csv(tmp_path / "sts.csv", "text1,text2,score", pairs))
    assert (cell["type"], cell["metric"]) == ("STS", "cosine_spearman") and cell["score"] > 0.8

    folder = tmp_path / "search"
    folder.mkdir()
    words = ["cat", "dog", "car", "road"]
    corpus = "".join(json.dumps({"_id": f"d{i}", "text": f"{w} document", "title": ""}) + "\n" for i, w in enumerate(words))
    (folder / "corpus.jsonl.gz").write_bytes(gzip.compress(corpus.encode()))
    (folder / "queries.jsonl").write_text(
        "".join(json.dumps({"_id": f"q{i}", "text": f"{w} question"}) + "\n" for i, w in enumerate(words))
    )
    qrels = folder / "qrels.tsv"
    qrels.write_text("query-id\tcorpus-id\tscore\n" + "".join(f"q{i}\td{i}\t1\n" for i in range(4)))
    cell, oracle = oracle_score(folder)
    assert (cell["type"], cell["metric"], cell["score"]) == ("Retrieval", "ndcg_at_10", pytest.approx(1))
    roles = dict(oracle.calls)
    assert all("question" in t for t in roles["query"]) and all("document" in t for t in roles["document"])
    qrels.write_text("query-id\tcorpus-id\tscore\nq0\td9\t1\n")
    with pytest.raises(InputError, match=r"qrels\.tsv, line 2: query 'q0' or document 'd9' is not in the other files"):
        local_task(folder)
    qrels.unlink()
    with pytest.raises(InputError, match=r"has no qrels\.tsv"):
        local_task(folder)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", r"mine\.csv is empty$"),
        (b"text,label\n", "is empty"),
        (b"text,topic\na,b\n", "needs columns text,label or text1,text2,score; it has text, topic"),
        (b"text,label\na,x\nb,x\n", "one class only"),
        (b"text,label\na,x\nb,y\nc,z\n", "mine.csv: 3 texts have 3 labels, there is nothing to group"),
        (b"text,label\na,x\nb,\n", "line 3: label is empty"),
        (b"text1,text2,score\na,b,3\nc,d,high\n", "line 3: score is 'high', which is not a number"),
        (b"text1,text2,score\na,b,3\nc,d,3\n", "nothing to correlate"),
        (b"text,label\ncaf\xe9 \xff,x\n", "not UTF-8"),
        (b'text,label\na,x\n"b,y\nc,x\n', r"mine\.csv, line 3: a quote in this row is never closed"),
        (b"text;label\na;x\nb\n", r"mine\.csv, line 3: has 1 of the header's 2 cells"),
    ],
)
def test_bad_data_is_one_line(tmp_path, content, message):
    path = tmp_path / "mine.csv"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        run("--data", path, "--model", "tiny")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"text": 7, "label": "x"}, "text is a number, not a string"),
        ({"text": None, "label": "x"}, "text is missing, not a string"),
        ({"text": ["a"], "label": "x"}, "text is a list, not a string"),
        ({"text": "a", "label": {"b": 1}}, "label is an object, not a string"),
        ({"text": "a", "label": math.inf}, "label is inf"),
        ({"text": "a"}, "label is empty"),
        ({"text1": "a", "text2": 1, "score": 1}, "text2 is a number, not a string"),
    ],
)
def test_a_cell_of_another_type_is_no_text_and_no_label(tmp_path, row, message):
    first = {"text1": "a", "text2": "b", "score": 2} if "text1" in row else {"text": "a", "label": 1}
    (tmp_path / "mine.jsonl").write_text(json.dumps(first) + "\n\n" + json.dumps(row) + "\n")
    with pytest.raises(InputError, match=rf"mine\.jsonl, line 3: {message}"):
        local_task(tmp_path / "mine.jsonl")


def test_labels_are_strings_numbers_or_booleans_and_rows_may_come_from_standard_input(tmp_path, monkeypatch):
    rows = [{"text": "", "label": label} for label in ("a", 1, 1.5, True, "1")]
    (tmp_path / "rows").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with open(tmp_path / "rows") as f:
        monkeypatch.setattr(sys, "stdin", f)
        clustering, classification = choose("--data", "-", "--task", "clustering", "classification")  # read once for both
    assert clustering.dataset["test"]["labels"][:] == ["a", "1", "1.5", "True", "1"]
    assert (clustering.metadata.name, classification.metadata.name) == ("stdin-clustering", "stdin-classification")


def test_data_whose_scores_mean_little_is_scored_with_a_warning(tmp_path, capsys):
    path = labelled(tmp_path / "mine.csv")
    local_task(path)
    assert capsys.readouterr().err == ""
    path.write_text("text,label\n" + "".join(f"{text},{i}\n" for i in range(3) for text in ("a", "b", "c", "d", "a")[: 5 - i]))
    choose("--data", path, "--task", "clustering", "classification")
    few, copies = "only 12 texts: with fewer than 50, scores vary widely", "8 of 12 texts are copies of others"
    assert capsys.readouterr().err == f"warning: {path}: {few}\nwarning: {path}: {copies}\n"  # once for both tasks
    write_csv(path, "text,label", [(i, i // 2 if i < 20 else i) for i in range(60)])
    local_task(path)
    assert capsys.readouterr().err == f"warning: {path}: 50 labels for 60 texts: any clustering has a high v-measure, go by the AMI\n"
    local_task(write_csv(path, "text1,text2,score", [("a", "b", i) for i in range(7)]))
    assert "only 7 pairs" in capsys.readouterr().err


def test_a_class_needs_two_rows_for_classification(tmp_path):
    path = write_csv(tmp_path / "mine.csv", "text,label", [("a", "x"), ("b", "y")])
    with pytest.raises(InputError, match=r"mine\.csv: every class has one row only"):
        local_task(path, "Classification")


def test_words_that_mean_nothing_elsewhere_are_texts_and_labels(tmp_path):
    path = write_csv(tmp_path / "mine.csv", "text,label", [("NA", "None"), ("null", "None"), ("nan", "01"), ("007", "1")])
    data = local_task(path).dataset["test"]
    assert data["sentences"][:] == ["NA", "null", "nan", "007"] and data["labels"][:] == ["None", "None", "01", "1"]


def test_a_large_file_is_read_once_and_its_rows_are_not_kept(tmp_path, monkeypatch):
    """For two tasks of one file: at no time more than its texts as strings, and the tasks' tables of them."""
    path = write_csv(tmp_path / "large.csv", "text,label,note", [(f"{i} " + "word " * 40, i % 9, "note " * 40) for i in range(4000)])
    local_task(labelled(tmp_path / "mine.csv"))  # imports
    reads, read_rows = [], mteb_tasks.read_rows
    monkeypatch.setattr(mteb_tasks, "read_rows", lambda path: reads.append(path) or read_rows(path))
    tracemalloc.start()
    tasks = mteb_tasks.tasks_of(path, ["Clustering", "Classification"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert reads == [path] and len(tasks) == 2
    assert peak < 2.5 * 4000 * 250  # bytes of the texts as strings; the tables are in memory of Arrow, which is not traced
