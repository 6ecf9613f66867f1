import gzip
import json
import math
import os
import runpy
import shutil
import socket
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_run
from safetensors.torch import load_file, save_file
from transformers import BertConfig

import attention
import evaluate
from encoder import Encoder, base_models
from evaluate import MtebModel
from files.console import InputError
from tasks.mteb_tasks import local_task

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(base_models, "hub_answers", lambda: False)
    monkeypatch.setattr(evaluate, "RUNS", tmp_path / "runs")


def parse(*flags):
    return evaluate.build_parser().parse_args([str(flag) for flag in flags])


def run(*flags) -> None:
    evaluate.main(parse(*flags))


def choose(*flags) -> list:
    return evaluate.choose_tasks(parse(*flags))


def write_csv(path: Path, header: str, rows) -> Path:
    text = header + "\n" + "".join(",".join(map(str, r)) + "\n" for r in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def labelled(path: Path, n: int = 60) -> Path:
    topics = {"animal": "the cat chased a dog", "money": "interest rates at the bank", "road": "a car stood on the road"}
    return write_csv(path, "text,label", [(f"{text} {i}", label) for i in range(n // 3) for label, text in topics.items()])


class Oracle:
    """Vectors that say which word a text begins with: the right clusters, and the right scores, are known beforehand."""

    def __init__(self):
        self.calls = []

    def __call__(self, texts, role):
        self.calls.append((role, list(texts)))
        out = np.zeros((len(texts), 40), dtype=np.float32)
        for i, text in enumerate(texts):
            out[i, sum(map(ord, text.split(" ")[0])) % 40] = 1.0 + i * i  # of very different norms: they must not matter
        return out


def oracle_score(path: Path, task_type: str | None = None):
    oracle = Oracle()
    return evaluate.score(local_task(path, task_type), MtebModel("oracle", "f" * 16, None, oracle)), oracle


# ----------------------------------------------------------------------------------------------- tasks from a user's files


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
    assert evaluate.score(task, constant)["score"] == pytest.approx(0, abs=1e-6)


def test_a_gzipped_file_is_the_same_task(tmp_path):
    plain, gzipped = (local_task(labelled(tmp_path / name)) for name in ("mine.csv", "mine.csv.gz"))
    assert plain.metadata.name == gzipped.metadata.name == "mine"
    assert plain.metadata.dataset == gzipped.metadata.dataset  # the hash of the data is in it
    assert plain.dataset["test"][:] == gzipped.dataset["test"][:]


def test_every_row_of_the_table_sees_the_same_samples(tmp_path):
    task = local_task(labelled(tmp_path / "mine.csv"))
    noise = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    models = [MtebModel("noise", f"{i}", None, lambda texts, role: noise) for i in range(2)]
    first, second = (evaluate.score(task, model) for model in models)
    assert first["bootstrap_scores"] == second["bootstrap_scores"] and len(set(first["bootstrap_scores"])) > 1
    spread = statistics.stdev(first["bootstrap_scores"])
    assert first["std"] == pytest.approx(spread) and spread > 0.005
    score, ami = 100 * first["score"], 100 * first["ami"]
    assert f"  {score:.1f} ± {100 * spread:.1f} ({ami:.1f})   {score:.1f}  0\n" in evaluate.table([first])


def test_the_spread_is_that_within_a_subset(monkeypatch):
    """Subsets and levels of unlike difficulty are no spread; what has no repetitions has none."""
    import mteb

    def of(**scores):
        about = SimpleNamespace(name="t", type="Clustering", main_score="v_measure")
        subsets = [{"main_score": 0.5, "ami": 0.5} | scores]
        result = SimpleNamespace(scores={"test": subsets}, get_score=lambda: 0.5)
        monkeypatch.setattr(mteb, "evaluate", lambda *_, **__: SimpleNamespace(task_results=[result]))
        return evaluate.score(SimpleNamespace(metadata=about), MtebModel("m", "f" * 16, None, None))

    cell = of(v_measures={"level 0": [0.1, 0.2], "level 1": [0.8, 0.9]})
    assert cell["bootstrap_scores"] == [0.1, 0.2, 0.8, 0.9] and cell["std"] == pytest.approx(0.1 / math.sqrt(2))
    cell = of()
    assert cell["bootstrap_scores"] is None and cell["std"] is None and "±" not in evaluate.table([cell])


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
    assert clustering.metadata.name == "stdin" == classification.metadata.name


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


def test_vectors_that_are_one_point_are_noticed(capsys):
    """Also where a text or two stand apart; not where the texts are the same, and not where vectors are merely close."""

    def encode(vectors, texts=None):
        texts = texts or [f"text {i}" for i in range(len(vectors))]
        MtebModel("mine", "f" * 16, None, lambda *_: np.array(vectors, np.float32)).encode([{"text": texts}])
        return capsys.readouterr().err

    evaluate.warn_once.cache_clear()
    assert encode([[1, 0]]) == encode([[1, 0]] * 9, ["same"] * 9) == encode([[1, 0.03], [1, -0.03]] * 9) == ""
    for vectors in ([[1, 0.001], [2, 0]] * 100 + [[0, 0]], [[0, 0]] * 9):
        evaluate.warn_once.cache_clear()
        assert encode(vectors) == (
            "warning: mine: different texts have nearly the same vector (cosine above 0.9999): its scores mean little\n"
        )
    assert encode([[1, 0]] * 9) == ""  # said once


def test_a_class_needs_two_rows_for_classification(tmp_path):
    path = write_csv(tmp_path / "mine.csv", "text,label", [("a", "x"), ("b", "y")])
    with pytest.raises(InputError, match=r"mine\.csv: every class has one row only"):
        local_task(path, "Classification")


def test_a_baseline_that_cannot_score_the_task_is_an_error(tmp_path):
    """TF-IDF fitted on each side of a pair by itself gives numbers that mean nothing."""
    path = write_csv(tmp_path / "sts.csv", "text1,text2,score", [("cat a", "cat b", 5), ("cat a", "dog b", 0)])
    with pytest.raises(InputError, match="can score clustering, not STS"):
        run("--data", path, "--model", "tiny", "--baselines", "tfidf")
    with pytest.raises(InputError, match="neither tfidf nor a sentence-transformers model") as error:
        run("--data", labelled(tmp_path / "mine.csv"), "--model", "tiny", "--baselines", "no/such")
    assert "\n" not in str(error.value)


def test_two_files_of_one_name_are_an_error(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with pytest.raises(InputError, match="two --data files make a Clustering task called 'mine'"):
        choose("--data", labelled(tmp_path / "a" / "mine.csv"), labelled(tmp_path / "b" / "mine.csv"))


def test_errors_in_the_flags_come_before_anything_is_scored(llama, tmp_path, capsys):
    path = labelled(tmp_path / "mine.csv")
    model = make_run(llama, tmp_path / "runs" / "mine", prompt="cluster")
    for flags, message in (
        (("--model", "tiny", "typo"), "no model 'typo'"),
        (("--model", "tiny", model, "--pooling", "mean"), "pooling is 'last'"),
        (("--model", "tiny", model, "--layers", "-2"), "layers is"),
        (("--model", "tiny", "--prompt", "clutser"), "unknown prompt"),
        (("--model", "tiny", "--keep-bos"), "--keep-bos works with --scope all"),
        (("--model", "tiny", "--dtype", "float8"), "unknown dtype 'float8': take auto, float32, bfloat16, float16"),
        (("--model", "tiny", "--dims", "0"), "--dims must be 1 or more, not 0"),
        (("--model", "tiny", "--query-prompt", "none"), "give --prompt as well"),
        (("--model", "tiny", model, "--prompt", "none", "classify"), r"^prompt is 'cluster' in \S*mine, \['none', 'classify'\] were"),
    ):
        with pytest.raises(InputError, match=message):
            run("--data", path, *flags)
        assert "v_measure" not in capsys.readouterr().err


def test_a_place_for_the_scores_is_refused_before_anything_is_scored(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "r.json.partial").write_text("old")
    for out, message in (
        (tmp_path, rf"--out {tmp_path} is a folder: name a file, such as {tmp_path}/results.json"),
        (tmp_path / "file", "file exists already"),
        (tmp_path / "r.json", r"r\.json\.partial exists already"),
        (tmp_path / "file" / "r.json", "file is a file, choose another place"),
    ):
        with pytest.raises(InputError, match=message):
            run("--model", "tiny", "--out", out)
    monkeypatch.setattr(evaluate.os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(InputError, match=rf"{tmp_path} may not be written to"):
        run("--model", "tiny", "--out", tmp_path / "new" / "r.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "r.json.partial"]


def test_scores_are_kept_when_a_later_row_fails(llama, tmp_path, capsys, monkeypatch):
    path, calls = labelled(tmp_path / "mine.csv"), []
    score = evaluate.score

    def failing(task, model):
        calls.append(model)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return score(task, model)

    monkeypatch.setattr(evaluate, "score", failing)
    with pytest.raises(KeyboardInterrupt):
        run("--data", path, "--model", llama, "--prompt", "none", "cluster", "--out", tmp_path / "r.json")
    assert "(incomplete)" in capsys.readouterr().out and not (tmp_path / "r.json").exists()
    assert len(json.loads((tmp_path / "r.json.partial").read_text())["results"]) == 1


def test_a_model_that_fails_does_not_cost_the_rows_of_the_others(llama, tmp_path, capsys, monkeypatch):
    """Weights are read late. The table and the file have the other rows; the exit is that of an error."""
    path, damaged = labelled(tmp_path / "mine.csv"), shutil.copytree(llama, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"damaged")
    infinite = make_run(llama, tmp_path / "infinite")
    weights = load_file(f"{infinite}/adapter_model.safetensors")
    save_file({name: weight * torch.inf for name, weight in weights.items()}, f"{infinite}/adapter_model.safetensors")
    with pytest.raises(InputError, match=r"the table lacks .*: \S*damaged does not hold a whole model.*; .*not finite"):
        run("--data", path, "--model", damaged, infinite, llama, "--out", tmp_path / "r.json")
    printed = capsys.readouterr()
    assert "llama, cluster, last" in printed.out and printed.err.count("warning: ") == 2
    assert [cell["model"] for cell in json.loads((tmp_path / "r.json").read_text())["results"]] == ["llama, cluster, last, all"]
    with pytest.raises(InputError, match=r"^\S*damaged does not hold a whole model"):
        run("--data", path, "--model", damaged)


def test_what_a_config_shows_is_said_before_anything_is_scored(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "score", lambda *_: pytest.fail("a model was scored"))
    path, base = labelled(tmp_path / "mine.csv"), shutil.copytree(llama, tmp_path / "base")
    trained = make_run(str(base), tmp_path / "run")
    BertConfig().save_pretrained(base)
    for spec in (base, trained):
        with pytest.raises(InputError, match="of type 'bert', no decoder"):
            run("--data", path, "--model", llama, spec)


def test_bos_is_pooled_in_the_rows_of_scope_all_only(llama):
    rows = evaluate.base_rows(llama, "none", parse("--pooling", "mean", "--scope", "all", "text", "--keep-bos"))
    assert [(row.contract["scope"], row.contract["keep_bos"]) for row in rows] == [("all", True), ("text", False)]
    texts = ["The cat sat.", "a"]
    expected = Encoder.load(llama, pooling="mean", scope="all", keep_bos=True).encode(texts)
    np.testing.assert_allclose(rows[0].encode([{"text": texts}]), expected, atol=1e-6)


def test_columns_and_task_must_agree(tmp_path):
    path = labelled(tmp_path / "mine.csv")
    with pytest.raises(InputError, match="columns text,label, data for Clustering or Classification, --task asks for STS"):
        run("--data", path, "--task", "sts", "--model", "tiny")
    both = choose("--data", path, "--task", "clustering", "classification")
    assert [t.metadata.type for t in both] == ["Clustering", "Classification"]


def test_words_that_mean_nothing_elsewhere_are_texts_and_labels(tmp_path):
    path = write_csv(tmp_path / "mine.csv", "text,label", [("NA", "None"), ("null", "None"), ("nan", "01"), ("007", "1")])
    data = local_task(path).dataset["test"]
    assert data["sentences"][:] == ["NA", "null", "nan", "007"] and data["labels"][:] == ["None", "None", "01", "1"]


def test_empty_and_truncated_texts_are_scored_with_one_warning_each(llama, tmp_path, capsys):
    path = labelled(tmp_path / "mine.csv")
    path.write_text(path.read_text() + ",animal\n" + "word " * 40 + ",money\n")
    run("--data", path, "--model", llama, "--prompt", "cluster", "--pooling", "mean", "last", "--max-tokens", 30)
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
    assert warnings == ["warning: 1 empty texts were embedded as the prompt alone", "warning: 1 texts were truncated to 30 tokens"]


# ----------------------------------------------------------------------------------------------------- tables and files


def test_a_grid_beside_a_run_and_the_json(llama, tmp_path, capsys):
    path, out = labelled(tmp_path / "mine.csv"), tmp_path / "results" / "a.json"
    model = make_run(llama, tmp_path / "runs" / "mine", prompt="cluster")
    grid = ("--prompt", "none", "cluster", "--pooling", "mean", "last", "--scope", "all", "text")
    run("--data", path, "--model", llama, model, "--baselines", "tfidf", *grid, "--out", out)
    written = json.loads(out.read_text())
    results = written["results"]
    labels = [c["model"] for c in results]
    grid_rows = [f"llama, cluster, {p}, {s}" for p in ("mean", "last") for s in ("all", "text")]
    assert labels[:-1] == ["TF-IDF, SVD 100", "llama, none, mean", "llama, none, last", *grid_rows]
    keys = {"task", "type", "metric", "score", "ami", "splits", "bootstrap_scores", "std"}
    keys |= {"model", "fingerprint", "contract", "computed", "seconds"}
    assert all(set(c) == keys and 0 <= c["score"] <= 1 for c in results)
    assert len({c["fingerprint"] for c in results}) == len(labels)
    assert results[-1]["fingerprint"] == Encoder.load(model).fingerprint
    assert results[-1]["contract"]["pooling"] == "last"
    assert [c["computed"] for c in results] == [None] + ["float32 on cpu"] * (len(labels) - 1)
    assert {"mteb", "torch", "python"} <= set(written["versions"])
    printed, errors = capsys.readouterr()
    assert "vectors computed in float32 on cpu" in printed and "adapter merged into the base" in errors
    assert printed.count("llama, ") == 6 and f"{100 * results[0]['score']:.1f}" in printed
    with pytest.raises(InputError, match="exists already"):
        run("--data", path, "--model", llama, "--out", out)
    with pytest.raises(InputError, match=r"pooling is 'last' in .*'mean', 'position-mean'.* were asked for"):
        run("--data", path, "--model", model, "--pooling", "mean", "position-mean")
    with pytest.raises(InputError, match=r"scope is 'all' in the run, 'text' was asked for.*--override-contract"):
        run("--data", path, "--model", model, "--scope", "text")
    run("--data", path, "--model", model, "--scope", "text", "--override-contract")
    (tmp_path / "runs" / "mine" / "arguments.json").write_text('{"arguments": {"matryoshka": [8]}}')
    run("--data", path, "--model", model, "--dims", 8, "--out", tmp_path / "b.json")
    assert json.loads((tmp_path / "b.json").read_text())["results"][0]["contract"]["dims"] == 8
    with pytest.raises(InputError, match=r"dims is None in the run \(which was trained for 8 as well\), 9 was asked for"):
        run("--data", path, "--model", model, "--dims", 9)


def test_queries_may_have_a_prompt_of_their_own(llama, tmp_path):
    flags = ("--prompt", "none", "--query-prompt", "query: {text}")
    (row,) = evaluate.base_rows(llama, "none", parse(*flags))
    assert row.contract["prompts"] == {"query": {"prefix": "query: ", "suffix": ""}, "document": {"prefix": "", "suffix": ""}}
    assert row.label == "llama, none / query: {text}, mean, text"
    model = make_run(llama, tmp_path / "mine", prompt="none", query_prompt="query: {text}")
    assert evaluate.changes_to_run(model, parse(*flags)) == {}
    with pytest.raises(InputError, match=r"prompt is '{text} \(queries: query: {text}\)' in the run, 'none' was asked for"):
        evaluate.changes_to_run(model, parse("--prompt", "none"))
    changes = evaluate.changes_to_run(model, parse("--prompt", "none", "--query-prompt", "q {text}", "--override-contract"))
    assert Encoder.load(model, override_contract=True, **changes).contract.prompts["query"]["prefix"] == "q "
    with pytest.raises(InputError, match="give prompt as well"):
        Encoder.load(llama, query_prompt="q {text}")


def test_rows_that_share_forward_passes_equal_separate_ones(llama, monkeypatch):
    rows = evaluate.base_rows(llama, "cluster", parse("--pooling", "mean", "last", "attention", "--scope", "all", "text"))
    texts, calls, encode = ["The cat sat.", "a", "Rates rose again."], [], Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda self, *args, **options: calls.append(args) or encode(self, *args, **options))
    vectors = [row.encode([{"text": texts}]) for row in rows]
    assert len(rows) == 6 and calls == [(texts, "document")]
    for row, shared in zip(rows, vectors, strict=True):
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
    evaluate.warn_once.cache_clear()
    for task_type in ("Clustering", "STS"):
        assert len(list(evaluate.table_rows(parse("--model", llama, "--prompt", "none", "cluster"), task_type, []))) == 2
    assert capsys.readouterr().err == "warning: llama: texts are padded\n"


def test_a_run_that_was_changed_after_training_is_scored_with_a_warning(llama, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = make_run(llama, tmp_path / "runs" / "mine")
    (tmp_path / "runs" / "mine" / "summary.json").write_text('{"fingerprint": "0123456789abcdef"}')
    evaluate.warn_once.cache_clear()
    assert len(list(evaluate.table_rows(parse("--model", model), "Clustering", []))) == 1
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


# ------------------------------------------------------------------------------------------------------ which tasks


def test_without_network_clustering_falls_back_to_the_bundled_tasks(capsys):
    tasks = choose("--task", "clustering")
    assert [t.metadata.name for t in tasks] == ["docstrings-by-module", "docstrings-by-package"]
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 1 and "bundled clustering tasks" in lines[0]
    for name in ("classification", "sts", "retrieval", "reranking", "pair-classification", "STSBenchmark"):
        with pytest.raises(InputError, match=r"is not available.*--data"):
            choose("--task", name)
    assert [t.metadata.name for t in choose("--task", "docstrings-by-module")] == ["docstrings-by-module"]
    with pytest.raises(InputError, match="types are clustering"):
        choose("--task", "no-such-task")
    assert [t.metadata.name for t in choose("--bundled")] == ["docstrings-by-module", "docstrings-by-package"]
    with pytest.raises(InputError, match="leave --task out"):
        choose("--bundled", "--task", "sts")


def test_without_network_tasks_in_the_cache_run_and_the_libraries_go_offline(tmp_path, capsys, monkeypatch):
    """The libraries read the environment when they are imported, long before the network is found to be missing."""
    import datasets.config
    import huggingface_hub
    from huggingface_hub.errors import OfflineModeIsEnabled

    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "0")
    for module in (huggingface_hub.constants, datasets.config):  # monkeypatch brings the present state back
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "datasets--mteb--sts12-sts").mkdir()
    assert [task.metadata.name for task in choose("--task", "sts")] == ["STS12"]
    assert "no network: running the 1 of 9 tasks whose data is in the cache" in capsys.readouterr().err
    assert huggingface_hub.is_offline_mode() and datasets.config.HF_HUB_OFFLINE
    assert os.environ["HF_HUB_OFFLINE"] == os.environ["HF_DATASETS_OFFLINE"] == "1"
    with pytest.raises(OfflineModeIsEnabled):
        huggingface_hub.get_session().get("https://huggingface.co")


def test_with_network_the_track_of_the_benchmark_is_chosen(monkeypatch):
    monkeypatch.setattr(base_models, "hub_answers", lambda: True)
    names = [t.metadata.name for t in choose("--task", "clustering")]
    assert "TwentyNewsgroupsClustering.v2" in names and len(names) == 8
    assert len(choose("--task", "clustering", "docstrings-by-module")) == 9
    assert {t.metadata.type for t in choose("--task", "sts", "reranking")} == {"STS", "Reranking"}
    assert len(choose("--benchmark")) == 41
    assert [t.metadata.name for t in choose("--task", "STSBenchmark")] == ["STSBenchmark"]


# ------------------------------------------------------------------------------------------------ the script as a whole


def test_an_error_is_one_line_and_status_2(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--data", "no.csv", "--model", "tiny"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "evaluate.py"), run_name="__main__")
    assert (end.value.code, capsys.readouterr().err) == (2, "evaluate.py: no file or folder no.csv\n")


@pytest.mark.parametrize(
    "script, flags, status, message",
    [
        ("evaluate.py", ("--model", "typo"), 2, "evaluate.py: no model 'typo'"),
        ("evaluate.py", ("--model", "tiny", "--data", "no.csv"), 2, "evaluate.py: no file or folder no.csv"),
        ("evaluate.py", ("--model", "tiny", "--out", "."), 2, "evaluate.py: --out . is a folder"),
        ("evaluate.py", ("--model", "tiny", "--bundled"), 130, ""),
        ("attention.py", ("--text", "a", "--model", "typo"), 2, "attention.py: no model 'typo'"),
        ("attention.py", ("--model", "tiny"), 2, "attention.py: no text"),
        ("search.py", ("--model", "tiny", "--input", "no.csv", "--query", "a"), 2, "search.py: no file no.csv"),
        ("attention.py", ("--model", "tiny", "--text", "a", "--out", "new"), 130, ""),
    ],
)
def test_errors_come_before_the_slow_imports_and_ctrl_c_during_these_is_quiet(tmp_path, script, flags, status, message):
    for package in ("torch", "mteb", "transformers"):
        (tmp_path / f"{package}.py").write_text("raise KeyboardInterrupt\n")
    process = subprocess.run(
        [sys.executable, ROOT / script, *flags],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (process.returncode, process.stdout) == (status, "")
    assert process.stderr.startswith(message) and process.stderr.count("\n") == (status == 2)


def test_local_models_and_data_never_ask_the_network(llama, tmp_path, monkeypatch):
    """Whatever the environment says: neither this project nor the libraries behind it."""
    import datasets.config
    import huggingface_hub.constants

    def refuse(*_, **__):
        pytest.fail("the network was asked")

    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    for module in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    for owner, name in ((base_models, "hub_answers"), (socket, "getaddrinfo"), (socket.socket, "connect")):
        monkeypatch.setattr(owner, name, refuse)
    model = make_run(llama, tmp_path / "mine", prompt="cluster")
    assert Encoder.load("tiny").encode(["a"]).shape == (1, 384)
    run(
        "--data",
        labelled(tmp_path / "mine.csv"),
        "--model",
        "tiny",
        llama,
        model,
        "--prompt",
        "none",
        "--pooling",
        "mean",
        "--override-contract",
    )
    run("--task", "docstrings-by-module", "--model", llama)
    assert len(choose("--bundled")) == 2
    attention.main(attention.build_parser().parse_args(["--model", model, "--text", "a", "--out", str(tmp_path / "out")]))


def test_a_second_process_prints_and_writes_nothing(llama, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    path, out, streams = labelled(tmp_path / "mine.csv", 6), tmp_path / "r.json", (sys.stdout, sys.stderr)
    path.write_text(path.read_text() + ",animal\n")
    run("--data", path, "--model", llama, "--out", out)
    assert capsys.readouterr() == ("", "") and not out.exists()
    assert (sys.stdout, sys.stderr) == streams  # an error after this can still be seen


def torchrun(script: Path, *flags) -> subprocess.CompletedProcess:
    """`script` in two processes, with the project on the path."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", script, *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([str(word) for word in command], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_two_processes_print_one_table_with_the_scores_of_one(llama, tmp_path):
    words = ["cat", "dog", "car", "road", "bank", "rate", "fee"]
    pairs = [(f"the {words[i % 7]} and the {words[i % 5]} {i}", f"a {words[i % 3]} {i * i}", i % 6) for i in range(240)]  # two batches
    flags = ("--data", write_csv(tmp_path / "sts.csv", "text1,text2,score", pairs), "--model", llama, "--prompt", "none", "cluster")
    run(*flags, "--out", tmp_path / "one.json")
    process = torchrun(ROOT / "evaluate.py", *flags, "--out", tmp_path / "two.json")
    assert process.returncode == 0, process.stderr
    one, two = (json.loads((tmp_path / f"{name}.json").read_text())["results"] for name in ("one", "two"))
    assert [cell["fingerprint"] for cell in two] == [cell["fingerprint"] for cell in one]
    assert [cell["score"] for cell in two] == pytest.approx([cell["score"] for cell in one], abs=1e-4)
    assert [line.split()[0] for line in process.stdout.splitlines()].count("model") == 1
    assert process.stdout.count(one[0]["fingerprint"]) == 1 and process.stdout.count("2 scores") == 1
    assert process.stderr.count("sts, llama, none, mean: cosine_spearman") == 1


FAILS_IN_THE_SECOND_PROCESS = """
import os
import evaluate
from files.console import run_script

def fail(args):
    raise RuntimeError("this process alone failed")

if os.environ["RANK"] == "1":
    evaluate.check_models = fail
run_script(lambda: evaluate.main(evaluate.build_parser().parse_args()))
"""


@pytest.mark.slow
def test_an_error_in_the_second_process_alone_is_visible(llama, tmp_path):
    script = tmp_path / "fails.py"
    script.write_text(FAILS_IN_THE_SECOND_PROCESS)
    process = torchrun(script, "--data", labelled(tmp_path / "mine.csv"), "--model", llama)
    assert process.returncode != 0
    assert "Traceback" in process.stderr and "RuntimeError: this process alone failed" in process.stderr
