"""Which tasks run, with and without network."""

import json
import os

import hub_standins
import pytest
from short_evaluations import (
    choose,
    labelled,
    offline,  # noqa: F401, a fixture that every test uses
    run,
)

from encoder import base_models
from files.console import InputError


def test_two_files_of_one_name_are_an_error(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with pytest.raises(InputError, match="two --data files make a Clustering task called 'mine'"):
        choose("--data", labelled(tmp_path / "a" / "mine.csv"), labelled(tmp_path / "b" / "mine.csv"))


def test_columns_and_task_must_agree(tmp_path):
    path = labelled(tmp_path / "mine.csv")
    with pytest.raises(InputError, match="columns text,label, data for Clustering or Classification, --task asks for STS"):
        run("--data", path, "--task", "sts", "--model", "tiny")


def test_a_file_of_two_types_of_task_has_a_column_for_each(tmp_path):
    """Under one prompt both are cells of one row: with one name, the table, its differences and a resumed call would mix them up."""
    path, out = labelled(tmp_path / "mine.csv"), tmp_path / "r.json"
    both = choose("--data", path, "--task", "clustering", "classification")
    assert [t.metadata.type for t in both] == ["Clustering", "Classification"]
    run("--data", path, "--task", "clustering", "classification", "--model", "tiny", "--prompt", "cluster", "--out", out)
    cells = json.loads(out.read_text())["results"]
    assert [(c["task"], c["metric"]) for c in cells] == [("mine-clustering", "v_measure"), ("mine-classification", "accuracy")]
    (alone,) = choose("--data", path)
    assert alone.metadata.name == "mine"


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
    hub_standins.dataset_in_cache(tmp_path, "STS12", tmp_path / "scratch")
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
