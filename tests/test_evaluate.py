import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_encoder import trained

import encoder as encoder_module
import evaluate
from encoder import Encoder
from prompts import InputError

HERE = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate, "hub_answers", lambda: False)
    monkeypatch.setattr(evaluate, "RUNS", tmp_path / "runs")


def run(*flags) -> None:
    evaluate.main(evaluate.build_parser().parse_args([str(f) for f in flags]))


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
        self.texts = []

    def __call__(self, texts, role):
        self.texts.append((role, list(texts)))
        out = np.zeros((len(texts), 40), dtype=np.float32)
        for i, text in enumerate(texts):
            out[i, sum(map(ord, text.split(" ")[0])) % 40] = 1.0 + i * i  # of very different norms: they must not matter
        return out


def oracle_score(path: Path, task_type: str | None = None, like=None):
    oracle = like or Oracle()
    return evaluate.score(evaluate.local_task(path, task_type), evaluate.Scored("oracle", "f" * 16, None, oracle)), oracle


# --------------------------------------------------------------------------------------------------- tasks of one's own


@pytest.mark.parametrize("name", ["mine.csv", "mine.csv.gz"])
def test_clustering_scores_every_row_with_mteb(tmp_path, name):
    path = labelled(tmp_path / name)
    task = evaluate.local_task(path, None)
    from mteb.abstasks import AbsTaskClustering

    assert isinstance(task, AbsTaskClustering) and task.max_fraction_of_documents_to_embed is None
    cell, oracle = oracle_score(path)
    assert len(oracle.texts) == 1 and len(oracle.texts[0][1]) == 60 and oracle.texts[0][0] == "document"
    assert cell["task"] == "mine" and cell["metric"] == "v_measure"
    assert cell["score"] == pytest.approx(1) and cell["ami"] == pytest.approx(1) and cell["splits"] == {"test": pytest.approx(1)}
    assert len(cell["bootstrap_scores"]) == 10
    constant = evaluate.Scored("constant", "c" * 16, None, lambda texts, role: np.ones((len(texts), 4), np.float32))
    assert evaluate.score(task, constant)["score"] == pytest.approx(0, abs=1e-6)


def test_every_row_of_the_table_sees_the_same_samples(tmp_path):
    task = evaluate.local_task(labelled(tmp_path / "mine.csv"), None)
    noise = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    scored = [evaluate.Scored("noise", f"{i}", None, lambda texts, role: noise) for i in range(2)]
    first, second = (evaluate.score(task, s) for s in scored)
    assert first["bootstrap_scores"] == second["bootstrap_scores"] and len(set(first["bootstrap_scores"])) > 1


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
    roles = dict(oracle.texts)
    assert all("question" in t for t in roles["query"]) and all("document" in t for t in roles["document"])
    qrels.write_text("query-id\tcorpus-id\tscore\nq0\td9\t1\n")
    with pytest.raises(InputError, match="row 1: query 'q0' or document 'd9' is not in the other files"):
        evaluate.local_task(folder, None)
    qrels.unlink()
    with pytest.raises(InputError, match=r"has no qrels\.tsv"):
        evaluate.local_task(folder, None)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "mine.csv.*(is empty|No columns)"),
        (b"text,label\n", "is empty"),
        (b"text,topic\na,b\n", "needs columns text,label or text1,text2,score; it has text, topic"),
        (b"text,label\na,x\nb,x\n", "one class only"),
        (b"text,label\na,x\nb,\n", "row 2: label is empty"),
        (b"text1,text2,score\na,b,3\nc,d,high\n", "row 2: score is 'high', which is no number"),
        (b"text1,text2,score\na,b,3\nc,d,3\n", "nothing to correlate"),
        (b"text,label\ncaf\xe9 \xff,x\n", "not UTF-8"),
    ],
)
def test_bad_data_is_one_line(tmp_path, content, message):
    path = tmp_path / "mine.csv"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        run("--data", path, "--model", "tiny")
    assert "\n" not in str(error.value)


def test_baselines_beside_other_tasks(tmp_path):
    """TF-IDF fitted on each side of a pair by itself gives numbers that mean nothing."""
    path = write_csv(tmp_path / "sts.csv", "text1,text2,score", [("cat a", "cat b", 5), ("cat a", "dog b", 0)])
    with pytest.raises(InputError, match="can score clustering, not STS"):
        run("--data", path, "--model", "tiny", "--baselines", "tfidf")
    with pytest.raises(InputError, match="neither tfidf nor a sentence-transformers model") as error:
        run("--data", labelled(tmp_path / "mine.csv"), "--model", "tiny", "--baselines", "no/such")
    assert "\n" not in str(error.value)


def test_two_files_of_one_name_are_not_merged(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with pytest.raises(InputError, match="two --data files make a Clustering task called 'mine'"):
        choose("--data", labelled(tmp_path / "a" / "mine.csv"), labelled(tmp_path / "b" / "mine.csv"))


def test_what_is_wrong_is_told_before_anything_is_scored(llama, tmp_path, capsys):
    path = labelled(tmp_path / "mine.csv")
    model = trained(llama, tmp_path / "runs" / "mine", prompt="cluster")
    for flags, message in (
        (("--model", "tiny", "typo"), "no model 'typo'"),
        (("--model", "tiny", model, "--pooling", "mean"), "pooling is 'last'"),
        (("--model", "tiny", model, "--layers", "-2"), "layers is"),
        (("--model", "tiny", "--prompt", "clutser"), "unknown prompt"),
        (("--model", "tiny", "--keep-bos"), "--keep-bos works with --scope all"),
    ):
        with pytest.raises(InputError, match=message):
            run("--data", path, *flags)
        assert "v_measure" not in capsys.readouterr().err


def test_what_was_scored_is_kept_when_a_later_row_fails(llama, tmp_path, capsys, monkeypatch):
    path, calls = labelled(tmp_path / "mine.csv"), []
    score = evaluate.score

    def failing(task, row):
        calls.append(row)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return score(task, row)

    monkeypatch.setattr(evaluate, "score", failing)
    with pytest.raises(KeyboardInterrupt):
        run("--data", path, "--model", llama, "--prompt", "none", "cluster", "--out", tmp_path / "r.json")
    assert "(incomplete)" in capsys.readouterr().out and not (tmp_path / "r.json").exists()
    assert len(json.loads((tmp_path / "r.json.partial").read_text())["results"]) == 1


def test_bos_in_a_grid(llama):
    args = evaluate.build_parser().parse_args(["--pooling", "mean", "--scope", "all", "text", "--keep-bos"])
    rows = evaluate.base_rows(llama, "none", args, {})
    assert [(r.contract["scope"], r.contract["keep_bos"]) for r in rows] == [("all", True), ("text", False)]
    texts = ["The cat sat.", "a"]
    expected = Encoder.load(llama, pooling="mean", scope="all", keep_bos=True).encode(texts)
    np.testing.assert_allclose(rows[0].encode([{"text": texts}]), expected, atol=1e-6)


def test_columns_and_task_must_agree(tmp_path):
    path = labelled(tmp_path / "mine.csv")
    with pytest.raises(InputError, match="columns text,label make a task of type Clustering or Classification, --task asks for STS"):
        run("--data", path, "--task", "sts", "--model", "tiny")
    both = choose("--data", path, "--task", "clustering", "classification")
    assert [t.metadata.type for t in both] == ["Clustering", "Classification"]


def test_words_that_mean_nothing_elsewhere_are_texts_and_labels(tmp_path):
    path = write_csv(tmp_path / "mine.csv", "text,label", [("NA", "None"), ("null", "None"), ("nan", "01"), ("007", "1")])
    data = evaluate.local_task(path, None).dataset["test"]
    assert data["sentences"][:] == ["NA", "null", "nan", "007"] and data["labels"][:] == ["None", "None", "01", "1"]


def test_an_empty_text_is_scored_and_told(tmp_path, capsys):
    path = labelled(tmp_path / "mine.csv")
    path.write_text(path.read_text() + ",animal\n")
    run("--data", path, "--model", "tiny")
    assert "1 empty texts were embedded as the prompt alone" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------- tables and files


def test_a_grid_beside_a_run_and_the_json(llama, tmp_path, capsys):
    path, out = labelled(tmp_path / "mine.csv"), tmp_path / "results" / "a.json"
    model = trained(llama, tmp_path / "runs" / "mine", prompt="cluster")
    grid = ("--prompt", "none", "cluster", "--pooling", "mean", "last", "--scope", "all", "text")
    run("--data", path, "--model", llama, model, "--baselines", "tfidf", *grid, "--out", out)
    found = json.loads(out.read_text())
    labels = [c["model"] for c in found["results"]]
    grid_rows = [f"llama, cluster, {p}, {s}" for p in ("mean", "last") for s in ("all", "text")]
    assert labels[:-1] == ["TF-IDF, SVD 100", "llama, none, mean", "llama, none, last", *grid_rows]
    wanted = {"task", "type", "metric", "score", "splits", "bootstrap_scores", "model", "fingerprint", "contract", "computed", "seconds"}
    wanted |= {"ami"}
    assert all(set(c) == wanted and 0 <= c["score"] <= 1 for c in found["results"])
    assert len({c["fingerprint"] for c in found["results"]}) == len(labels)
    assert found["results"][-1]["fingerprint"] == Encoder.load(model).fingerprint
    assert found["results"][-1]["contract"]["pooling"] == "last"
    assert [c["computed"] for c in found["results"]] == [None] + ["float32 on cpu"] * (len(labels) - 1)
    assert {"mteb", "torch", "python"} <= set(found["versions"])
    printed, told = capsys.readouterr()
    assert "vectors computed in float32 on cpu" in printed and "adapter merged into the base" in told
    assert printed.count("llama, ") == 6 and f"{100 * found['results'][0]['score']:.1f}" in printed
    with pytest.raises(InputError, match="exists already"):
        run("--data", path, "--model", "tiny", "--out", out)
    with pytest.raises(InputError, match=r"pooling is 'last' in .*'mean', 'position-mean'.* were asked for"):
        run("--data", path, "--model", model, "--pooling", "mean", "position-mean")
    with pytest.raises(InputError, match=r"scope is 'all' in the run, 'text' was asked for.*--override-contract"):
        run("--data", path, "--model", model, "--scope", "text")
    run("--data", path, "--model", model, "--scope", "text", "--override-contract")


def test_grid_rows_from_shared_passes_equal_separate_ones(llama):
    args = evaluate.build_parser().parse_args(["--pooling", "mean", "last", "attention", "--scope", "all", "text"])
    rows = evaluate.base_rows(llama, "cluster", args, {})
    texts = ["The cat sat.", "a", "Rates rose again."]
    for row in rows:
        c = row.contract
        alone = Encoder.load(llama, prompt="cluster", pooling=c["pooling"], scope=c["scope"])
        assert row.fingerprint == alone.fingerprint
        np.testing.assert_allclose(row.encode([{"text": texts}]), alone.encode(texts), atol=1e-6)
    assert len(rows) == 6


def test_without_a_model_the_newest_run_beside_its_base(tmp_path, capsys, monkeypatch):
    path = labelled(tmp_path / "mine.csv")
    monkeypatch.chdir(tmp_path)
    run("--data", path)
    assert "tiny, cluster, last, all" in capsys.readouterr().out
    trained("tiny", tmp_path / "runs" / "old")
    newest = tmp_path / "runs" / "new"
    trained("tiny", newest, prompt="prompt-eol", pooling="mean", scope="text")
    import os

    os.utime(tmp_path / "runs" / "old" / "embedding.json", (1, 1))
    run("--data", path, "--out", tmp_path / "r.json")
    found = json.loads((tmp_path / "r.json").read_text())["results"]
    assert [c["model"] for c in found] == ["tiny, untuned, same contract", "runs/new"]
    base, ours = (c["contract"] for c in found)
    assert {k for k in ours if ours[k] != base[k]} <= {"data"} and base["prompts"] == ours["prompts"]
    assert found[0]["fingerprint"] != found[1]["fingerprint"]


# ------------------------------------------------------------------------------------------------------ which tasks


def choose(*flags):
    return evaluate.choose_tasks(evaluate.build_parser().parse_args([str(f) for f in flags]))


def test_without_network_clustering_falls_back_to_the_embedded_tasks(capsys):
    tasks = choose("--task", "clustering")
    assert [t.metadata.name for t in tasks] == ["docstrings-by-module", "docstrings-by-package"]
    told = capsys.readouterr().out.strip().splitlines()
    assert len(told) == 1 and "embedded clustering tasks" in told[0]
    for name in ("classification", "sts", "retrieval", "reranking", "pair-classification"):
        with pytest.raises(InputError, match=r"cannot be had.*--data"):
            choose("--task", name)
    with pytest.raises(InputError, match=r"cannot be had.*--data"):
        choose("--task", "STSBenchmark")
    assert [t.metadata.name for t in choose("--task", "docstrings-by-module")] == ["docstrings-by-module"]
    with pytest.raises(InputError, match="types are clustering"):
        choose("--task", "no-such-task")
    with pytest.raises(InputError, match="leave --task out"):
        choose("--embedded", "--task", "sts")


def test_with_network_the_track_of_the_benchmark_is_chosen(monkeypatch):
    monkeypatch.setattr(evaluate, "hub_answers", lambda: True)
    names = [t.metadata.name for t in choose("--task", "clustering")]
    assert "TwentyNewsgroupsClustering.v2" in names and len(names) == 8
    assert len(choose("--task", "clustering", "docstrings-by-module")) == 9
    assert {t.metadata.type for t in choose("--task", "sts", "reranking")} == {"STS", "Reranking"}
    assert len(choose("--benchmark")) == 41
    assert [t.metadata.name for t in choose("--task", "STSBenchmark")] == ["STSBenchmark"]


def test_the_hub_is_asked_once_and_not_for_long(monkeypatch):
    """A network that swallows packets: the answer is no after the limit, and is remembered."""
    import threading

    never, asked = threading.Event(), []

    def swallow(*_, **__):
        asked.append(1)
        never.wait()
        raise OSError

    monkeypatch.setattr(encoder_module.socket, "create_connection", swallow)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    encoder_module.hub_answers.cache_clear()
    assert not encoder_module.hub_answers(0.05) and not encoder_module.hub_answers(0.05)
    assert len(asked) == 1
    never.set()
    encoder_module.hub_answers.cache_clear()


def test_an_error_is_one_line_and_status_2():
    command = [sys.executable, HERE / "evaluate.py", "--data", "no.csv", "--model", "tiny"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "evaluate.py: no file or folder no.csv\n")
