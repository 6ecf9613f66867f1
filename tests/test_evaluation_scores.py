"""Scores, the table and the file of results."""

import json
import math
import shutil
import statistics
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_run
from safetensors.torch import load_file, save_file
from short_evaluations import (
    labelled,
    offline,  # noqa: F401, a fixture that every test uses
    run,
)

from encoder import Encoder
from evaluation import scores
from evaluation.mteb_model import MtebModel
from files.console import InputError
from tasks.mteb_tasks import local_task


def test_every_row_of_the_table_sees_the_same_samples(tmp_path):
    task = local_task(labelled(tmp_path / "mine.csv"))
    noise = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    models = [MtebModel("noise", f"{i}", None, lambda texts, role: noise) for i in range(2)]
    first, second = (scores.score(task, model) for model in models)
    assert first["bootstrap_scores"] == second["bootstrap_scores"] and len(set(first["bootstrap_scores"])) > 1
    spread = statistics.stdev(first["bootstrap_scores"])
    assert first["std"] == pytest.approx(spread) and spread > 0.005
    score, ami = 100 * first["score"], 100 * first["ami"]
    assert f"  {score:.1f} ± {100 * spread:.1f} ({ami:.1f})   {score:.1f}  0\n" in scores.table([first])


def test_the_spread_is_that_within_a_subset(monkeypatch):
    """Subsets and levels of unlike difficulty are no spread; what has no repetitions has none."""
    import mteb

    def of(**measured):
        about = SimpleNamespace(name="t", type="Clustering", main_score="v_measure")
        subsets = [{"main_score": 0.5, "ami": 0.5} | measured]
        result = SimpleNamespace(scores={"test": subsets}, get_score=lambda: 0.5, evaluation_time=1.0)
        monkeypatch.setattr(mteb, "evaluate", lambda *_, **__: SimpleNamespace(task_results=[result]))
        return scores.score(SimpleNamespace(metadata=about), MtebModel("m", "f" * 16, None, None))

    cell = of(v_measures={"level 0": [0.1, 0.2], "level 1": [0.8, 0.9]})
    assert cell["bootstrap_scores"] == [0.1, 0.2, 0.8, 0.9] and cell["std"] == pytest.approx(0.1 / math.sqrt(2))
    assert of(v_measures=[0.1, 0.3])["std"] == pytest.approx(0.2 / math.sqrt(2))  # as the tasks of MTEB(eng, v1) have it
    cell = of()
    assert cell["bootstrap_scores"] is None and cell["std"] is None and "±" not in scores.table([cell])


def test_a_place_for_the_scores_is_refused_before_anything_is_scored(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "r.json.partial").write_text("old\n")
    for out, message in (
        (tmp_path, rf"--out {tmp_path} is a folder: name a file, such as {tmp_path}/results.json"),
        (tmp_path / "file", "file exists already"),
        (tmp_path / "r.json", r"r\.json\.partial exists already and holds no cells of a table: move it away"),
        (tmp_path / "file" / "r.json", "file is a file, choose another place"),
    ):
        with pytest.raises(InputError, match=message):
            run("--model", "tiny", "--out", out)
    monkeypatch.setattr("files.writing.os.access", lambda path, mode: path != tmp_path)
    with pytest.raises(InputError, match=rf"{tmp_path} may not be written to"):
        run("--model", "tiny", "--out", tmp_path / "new" / "r.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "r.json.partial"]


def test_a_folder_that_the_system_does_not_make_is_one_line(tmp_path, monkeypatch):
    path, mkdir = labelled(tmp_path / "mine.csv"), Path.mkdir

    def refuse(folder, *args, **options):
        if folder == tmp_path / "new":
            raise PermissionError(13, "Permission denied")
        mkdir(folder, *args, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)  # as in /proc, of which only the system knows that nothing can be made there
    with pytest.raises(InputError, match=f"^{tmp_path}/new/r.json cannot be written: "):
        run("--data", path, "--model", "tiny", "--out", tmp_path / "new" / "r.json")


def test_scores_are_kept_when_a_later_row_fails(llama, tmp_path, capsys, monkeypatch):
    path, calls = labelled(tmp_path / "mine.csv"), []
    score = scores.score

    def failing(task, model, *more):
        calls.append(model)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return score(task, model, *more)

    monkeypatch.setattr(scores, "score", failing)
    with pytest.raises(KeyboardInterrupt):
        run("--data", path, "--model", llama, "--prompt", "none", "cluster", "--out", tmp_path / "r.json")
    assert "(incomplete)" in capsys.readouterr().out and not (tmp_path / "r.json").exists()
    assert len((tmp_path / "r.json.partial").read_text().splitlines()) == 1


def test_a_model_that_fails_does_not_cost_the_rows_of_the_others(llama, tmp_path, capsys, monkeypatch):
    """Weights are read late. The table and the file have the other rows; the exit status is 1."""
    path, damaged = labelled(tmp_path / "mine.csv"), shutil.copytree(llama, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"damaged")
    infinite = make_run(llama, tmp_path / "infinite")
    weights = load_file(f"{infinite}/adapter_model.safetensors")
    save_file({name: weight * torch.inf for name, weight in weights.items()}, f"{infinite}/adapter_model.safetensors")
    with pytest.raises(SystemExit) as end:
        run("--data", path, "--model", damaged, infinite, llama, "--out", tmp_path / "r.json")
    printed = capsys.readouterr()
    assert end.value.code == 1
    lines = printed.err.partition("could not be computed:\n")[2].splitlines()
    assert len(lines) == 2 and "damaged does not hold a whole model" in lines[0] and "not finite" in lines[1]
    assert "llama, cluster, last" in printed.out and printed.err.count("warning: ") == 2
    assert [cell["model"] for cell in json.loads((tmp_path / "r.json").read_text())["results"]] == ["llama, cluster, last, all"]
    with pytest.raises(InputError, match=r"^\S*damaged does not hold a whole model"):
        run("--data", path, "--model", damaged)


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
    keys = {"task", "type", "metric", "score", "ami", "splits", "bootstrap_scores", "std", "rests_on"}
    keys |= {"model", "fingerprint", "contract", "computed", "seconds", "texts", "texts_per_second"}
    assert all(set(c) == keys | ({"better_than"} if c["contract"] is None else set()) and 0 <= c["score"] <= 1 for c in results)
    assert len({c["fingerprint"] for c in results}) == len(labels)
    assert results[-1]["fingerprint"] == Encoder.load(model).fingerprint
    assert results[-1]["contract"]["pooling"] == "last"
    assert [c["computed"] for c in results] == [None] + ["float32 on cpu"] * (len(labels) - 1)
    assert {"mteb", "torch", "python"} <= set(written["versions"])
    printed, errors = capsys.readouterr()
    assert "vectors computed in float32 on cpu" in printed and "adapter merged into the base" in errors
    assert (
        sum(line.startswith("llama, ") for line in printed.split("±: ")[0].splitlines()) == 6
        and f"{100 * results[0]['score']:.1f}" in printed
    )
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
