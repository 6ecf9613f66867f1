"""mteb's own tasks, on stand-ins for their data in the hub's cache: every type, results in mteb's layout, --prefetch, failures, --paper."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import hub_standins
import mteb
import numpy as np
import pytest
import torch
from conftest import make_run
from datasets import Dataset
from report_pages import data_of
from short_evaluations import (
    choose,
    labelled,
    offline,  # noqa: F401, a fixture that every test uses
    parse,
    run,
)

from encoder import Encoder
from evaluation import hub_data, paper, rows, scores
from evaluation.mteb_model import MtebModel
from evaluation.task_choice import TYPES
from files.console import InputError
from files.reading import read_rows
from prompts import TASK_PROMPTS, get_prompt
from tasks.mteb_tasks import bundled_tasks, local_task

ROOT = Path(__file__).resolve().parents[1]
NAMES = [name for name in hub_standins.DATASETS if name != "TwentyNewsgroupsClustering"]  # which shares its set with its second version
FLAGS = ("--prompt", "none", "--pooling", "mean")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub's cache, and a function that puts the stand-ins for tasks into it."""
    import datasets.config
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "prepared")
    for module in (huggingface_hub.constants, datasets.config):  # monkeypatch brings the present state back
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")

    def put(*names: str) -> Path:
        for name in names:
            hub_standins.dataset_in_cache(tmp_path / "hub", name, tmp_path / "scratch")
        return tmp_path / "hub"

    return put


def failed(*flags) -> None:
    """A call of evaluate.py that ends with status 1."""
    with pytest.raises(SystemExit) as end:
        run(*flags)
    assert end.value.code == 1


# --------------------------------------------------------------------------------------------------------------- tasks


def test_the_types_are_those_of_the_two_english_benchmarks():
    of_both = {task.metadata.type for name in ("MTEB(eng, v1)", "MTEB(eng, v2)") for task in mteb.get_benchmark(name).tasks}
    assert set(TYPES.values()) == of_both <= set(TASK_PROMPTS)


def test_every_task_of_the_benchmarks_is_known_by_name(hub):
    every = [task for name in ("MTEB(eng, v2)", "MTEB(eng, v1)") for task in mteb.get_benchmark(name).tasks]
    names = list(dict.fromkeys(task.metadata.name for task in every))
    assert [task.metadata.name for task in choose("--prefetch", "--task", *names)] == names
    assert len(choose("--prefetch", "--benchmark", "MTEB(eng, v1)", "--task", "clustering")) == 11
    (english,) = choose("--prefetch", "--task", "STS17")
    assert english.hf_subsets == ["en-en"]  # and not all sets with English on one side


@pytest.mark.parametrize("name", NAMES)
def test_every_type_of_task_runs_without_network_under_its_prompts(name, hub, llama, monkeypatch):
    """Queries and documents have prompts of their own where the type of task has queries; the data is that of the hub's cache."""
    hub(name)
    texts_of, stream = {}, Encoder.stream
    monkeypatch.setattr(
        Encoder, "stream", lambda self, texts, role, **o: texts_of.setdefault(role, texts) and stream(self, texts, role, **o)
    )
    (task,), kept = choose("--task", name), scores.Scores()
    scores.score_all(parse("--task", name, "--model", llama), [task], [], kept)
    (cell,) = kept.cells
    searches = cell["type"] in ("Retrieval", "Reranking")
    assert set(texts_of) == ({"query", "document"} if searches else {"document"})
    assert not searches or all("question" in text for text in texts_of["query"])
    assert cell["contract"]["prompts"] == get_prompt(TASK_PROMPTS[cell["type"]]).roles() and -1 <= cell["score"] <= 1
    if cell["type"] == "Clustering":
        assert cell["rests_on"] == {"RedditClustering": "120 texts"}.get(name, "2 of 60 texts")
    assert cell["metric"] == task.metadata.main_score and not task.data_loaded and cell["texts_per_second"] > 0
    (known,) = (of_row[name] for of_row in kept.evidence.values())  # so that rows can be compared
    if cell["type"] != "Clustering":  # whose k-means starts from other seeds
        assert known.scores[0].mean() == pytest.approx(cell["score"], abs=1e-4) and known.redrawn.shape[2] == 1000


def test_tasks_of_many_sets_have_intervals(hub, llama):
    hub("RedditClustering")
    (task,), kept = choose("--task", "RedditClustering"), scores.Scores()
    flags = ("--model", llama, "--prompt", "none", "cluster", "--pooling", "mean")
    scores.score_all(parse("--task", "RedditClustering", *flags), [task], [], kept)
    assert [one["RedditClustering"].n for one in kept.evidence.values()] == [120, 120]
    assert "no interval" not in "\n".join(kept.compare())


def test_a_set_of_one_label_counts_as_mteb_counts_it():
    """The clusters of one set are those of its labels, those of another say nothing, and the third has nothing to tell apart."""
    labels = [["a", "b"] * 20, ["a", "a", "b", "b"] * 10, ["a"] * 40]
    sentences = [[f"{number % 2} {number} {label}" for number, label in enumerate(one)] for one in labels]
    task = mteb.get_task("RedditClustering")
    task.dataset, task.data_loaded = {"default": {"test": Dataset.from_dict({"sentences": sentences, "labels": labels})}}, True
    model = MtebModel("parity", "f" * 16, None, lambda texts, role: np.array([[float(text[0]), 1 - float(text[0])] for text in texts]))
    kept = {}
    cell = scores.score(task, model, kept)
    (known,) = (one["RedditClustering"] for one in kept.values())
    assert cell["score"] == pytest.approx(2 / 3) and known.n == 80 and model.encode == MtebModel.encode.__get__(model)
    np.testing.assert_allclose(known.scores[0], 2 / 3)
    assert np.ptp(known.redrawn[0, 0]) > 0.001  # of the second set


def test_an_aggregate_needs_the_data_of_all_its_parts(hub, llama, monkeypatch):
    task = next(task for task in mteb.get_benchmark("MTEB(eng, v1)").tasks if task.is_aggregate)
    for part in (parts := hub_data.parts(task)):
        monkeypatch.setitem(hub_standins.DATASETS, part.metadata.name, hub_standins.retrieval())
        monkeypatch.setattr(hub_standins, "task_of", lambda name: next(part for part in parts if part.metadata.name == name))
        assert not hub_data.in_cache(task)
        hub(part.metadata.name)
    assert hub_data.in_cache(task)
    kept, failures = scores.Scores(), []
    scores.score_all(parse("--model", llama, *FLAGS), [task], failures, kept)
    assert failures == [] and kept.cells[0]["task"] == "CQADupstackRetrieval" and not any(part.data_loaded for part in parts)


def test_data_of_another_version_is_not_taken(hub, capsys):
    home = hub("STS12") / "datasets--mteb--sts12-sts" / "snapshots"
    assert len(choose("--task", "STS12")) == 1
    next(home.iterdir()).rename(home / hub_standins.COMMIT)
    with pytest.raises(InputError, match="the data of STS12 is not available"):
        choose("--task", "STS12")


# ------------------------------------------------------------------------------------------------------------- results


def test_results_are_in_the_layout_of_mteb_and_are_used_again(hub, llama, tmp_path, capsys, monkeypatch):
    hub("STS12", "Banking77Classification")
    flags = ("--task", "STS12", "Banking77Classification", "--model", llama, *FLAGS, "--results", tmp_path / "kept")
    run(*flags, "--out", tmp_path / "one.json")
    one = json.loads((tmp_path / "one.json").read_text())["results"]
    cache = mteb.ResultCache(tmp_path / "kept")
    revision = f"{one[0]['fingerprint']}-float32"
    assert cache.get_models() == [("local__llama", revision)]
    for cell in one:
        assert cache.load_task_result(cell["task"], "local/llama", revision).get_score() == pytest.approx(cell["score"], abs=1e-5)
    whole = cache.load_results(tasks=["STS12", "Banking77Classification"]).to_dataframe()
    assert sorted(whole["task_name"]) == ["Banking77Classification", "STS12"] and "local/llama" in whole.columns
    files = {path: path.read_bytes() for path in (tmp_path / "kept").rglob("*") if path.is_file()}
    assert {path.name for path in files} == {"STS12.json", "Banking77Classification.json", "model_meta.json"}
    capsys.readouterr()

    monkeypatch.setattr(scores, "score", lambda *_: pytest.fail("a score was computed again"))
    shutil.rmtree(tmp_path / "hub" / "datasets--mteb--banking77")  # not even its data is needed, but for choosing
    monkeypatch.setattr("evaluation.task_choice.in_cache", lambda task: True)
    run(*flags, "--out", tmp_path / "two.json")
    assert json.loads((tmp_path / "two.json").read_text())["results"] == one
    assert {path: path.read_bytes() for path in files} == files


def test_results_under_another_prompt_dtype_or_version_of_the_data_are_others(hub, llama, tmp_path):
    hub("STS12")
    flags = ("--task", "STS12", "--model", llama, "--results", tmp_path / "kept")
    run(*flags, *FLAGS)
    run(*flags, "--prompt", "cluster")
    run(*flags, *FLAGS, "--dtype", "bfloat16")
    paths = sorted((tmp_path / "kept" / "results").rglob("STS12.json"))
    assert len(paths) == 3 and sum(path.parent.name.endswith("-bfloat16") for path in paths) == 1
    (of_first,) = [path for path in paths if path.parent.name == f"{Encoder.load(llama, pooling='mean').fingerprint}-float32"]
    result = json.loads(of_first.read_text())
    for changed in ({"dataset_revision": "of another day"}, {"scores": {}}, None):
        of_first.write_text("{damaged" if changed is None else json.dumps(result | changed))
        run(*flags, *FLAGS)
        again = json.loads(of_first.read_text())
        assert again["dataset_revision"] == result["dataset_revision"] and again["scores"] == result["scores"]


def test_a_result_that_mteb_wrote_is_taken_without_intervals(hub, llama, tmp_path):
    hub("STS12")
    flags = ("--task", "STS12", "--model", llama, *FLAGS, "--results", tmp_path / "kept")
    run(*flags)
    (path,) = (tmp_path / "kept").rglob("STS12.json")
    result = json.loads(path.read_text())
    result.pop("evaluate")
    result["scores"]["test"][0]["main_score"] = 0.25
    path.write_text(json.dumps(result))
    run(*flags, "--out", tmp_path / "r.json")
    (cell,) = json.loads((tmp_path / "r.json").read_text())["results"]
    assert (cell["score"], cell["texts_per_second"], cell["model"]) == (0.25, None, "llama, none, mean")


def test_a_table_with_kept_results_has_the_intervals_of_the_first(hub, llama, tmp_path, capsys):
    hub("STS12")
    flags = ("--task", "STS12", "--model", llama, "--prompt", "none", "cluster", "--pooling", "mean", "--results", tmp_path / "kept")
    printed = []
    for _ in range(2):
        run(*flags)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and "less llama, none, mean" in printed[0]


def test_only_tasks_of_mteb_are_kept(llama, tmp_path):
    for flags in (("--data", labelled(tmp_path / "mine.csv")), ("--bundled",)):
        with pytest.raises(InputError, match=f"--results concerns mteb's tasks, not {flags[0]}"):
            run("--model", llama, *flags, "--results", tmp_path / "kept")
    run("--model", llama, *FLAGS, "--task", "docstrings-by-module", "--results", tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--results \S*file/kept: \S*file is a file"):
        run("--model", llama, "--task", "STS12", "--results", tmp_path / "file" / "kept")


# ------------------------------------------------------------------------------------------------------------ failures


def test_a_task_that_fails_is_reported_and_the_others_go_on(hub, llama, tmp_path, capsys):
    cache = hub("STS12", "Banking77Classification", "ArguAna")
    for file in (cache / "datasets--mteb--banking77" / "blobs").iterdir():
        if file.read_bytes()[:4] == b"PAR1":
            file.write_bytes(b"no parquet at all")
    failed("--task", "Banking77Classification", "STS12", "STS13", "--model", llama, *FLAGS, "--out", tmp_path / "r.json")
    printed = capsys.readouterr()
    lines = printed.err.partition("could not be computed:\n")[2].splitlines()
    assert len(lines) == 2 and lines[0] == "  STS13: its data is not in the cache, and the hub does not answer"
    assert lines[1].startswith("  Banking77Classification: ") and len(lines[1]) < 400
    assert [cell["task"] for cell in json.loads((tmp_path / "r.json").read_text())["results"]] == ["STS12"]
    assert "time by task (texts encoded a second): STS12 " in printed.out
    failed("--task", "Banking77Classification", "--model", llama, *FLAGS, "--out", tmp_path / "none.json")
    assert not (tmp_path / "none.json").exists() and capsys.readouterr().out == ""


def test_a_task_whose_scores_fail_costs_its_own_cells(hub, llama, capsys, monkeypatch):
    hub("STS12", "ArguAna")
    compute, calls = mteb.evaluate, []

    def fail_once(model, task, **options):
        calls.append(task.metadata.name)
        if calls.count("STS12") == 1 and calls[-1] == "STS12":
            raise KeyError("sentence1")
        return compute(model, task, **options)

    monkeypatch.setattr(mteb, "evaluate", fail_once)
    failed("--task", "STS12", "ArguAna", "--model", llama, "--prompt", "none", "cluster", "--pooling", "mean")
    printed = capsys.readouterr()
    assert printed.err.endswith("could not be computed:\n  STS12, llama, none, mean: KeyError: 'sentence1'\n")
    assert len(calls) == 4 and "llama, cluster, mean, text" in printed.out


def test_texts_a_second_are_those_of_the_rows_that_encoded():
    cells = [
        {"task": "a", "seconds": 4.0, "texts": 100, "texts_per_second": 50.0},
        {"task": "a", "seconds": 1.0, "texts": 0, "texts_per_second": None},  # its vectors were there already
        {"task": "a", "seconds": 9.0, "texts": 100, "texts_per_second": 12.5},
        {"task": "b", "seconds": 2.0},  # of a table begun before paces were kept
    ]
    assert scores.times(cells) == ["a 14 s (20)", "b 2 s"]


# ------------------------------------------------------------------------------------------- sentence-transformers


def make_sentence_transformer(base: str, folder: Path, normalize: bool = True) -> str:
    """The same weights as sentence-transformers has them: mean over all tokens, no prompt."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Normalize, Pooling, Transformer

    transformer = Transformer(base, max_seq_length=512)
    transformer.tokenizer.pad_token = transformer.tokenizer.eos_token
    modules = [transformer, Pooling(transformer.get_embedding_dimension(), "mean"), *[Normalize()] * normalize]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder))
    return str(folder)


@pytest.fixture(scope="session")
def sentence_transformer(models_dir, tmp_path_factory) -> str:
    return make_sentence_transformer(models_dir["llama"], tmp_path_factory.mktemp("st") / "llama-st")


def test_a_sentence_transformers_model_is_a_row(hub, llama, sentence_transformer, tmp_path, capsys):
    hub("STS12", "ArguAna")
    flags = ("--task", "STS12", "ArguAna", "--model", llama, f"st:{sentence_transformer}", "--keep-bos", "--scope", "all", *FLAGS)
    run(*flags, "--results", tmp_path / "kept", "--out", tmp_path / "r.json")
    cells = json.loads((tmp_path / "r.json").read_text())["results"]
    ours, theirs = ([cell for cell in cells if cell["model"].startswith(start)] for start in ("llama", "st:"))
    assert [cell["score"] for cell in theirs] == pytest.approx([cell["score"] for cell in ours], abs=1e-3)
    assert {cell["computed"] for cell in cells} == {"float32 on cpu"} and theirs[0]["contract"] is None
    assert {name for name, _ in mteb.ResultCache(tmp_path / "kept").get_models()} == {"local__llama", "local__llama-st"}
    copy = shutil.copytree(sentence_transformer, tmp_path / "copy")
    (copy / "1_Pooling" / "config.json").write_text((copy / "1_Pooling" / "config.json").read_text().replace("}", "} "))
    args = parse("--dtype", "bfloat16")
    other, same = (rows.sentence_transformer.row(f"st:{path}", args, "STS") for path in (copy, sentence_transformer))
    assert same.fingerprint == theirs[0]["fingerprint"] != other.fingerprint and other.computed == "bfloat16 on cpu"


def test_prompts_of_a_sentence_transformers_model_are_those_of_searches(sentence_transformer, tmp_path):
    folder = shutil.copytree(sentence_transformer, tmp_path / "prompted")
    settings = json.loads((folder / "config_sentence_transformers.json").read_text())
    settings["prompts"] = {"query": "a question: ", "document": "a text: "}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    search, sts, plain = (
        rows.sentence_transformer.row(f"st:{path}", parse(), kind)
        for path, kind in ((folder, "Retrieval"), (folder, "STS"), (sentence_transformer, "STS"))
    )
    for role, prompt in (("query", "a question: "), ("document", "a text: ")):
        np.testing.assert_allclose(search.encode_texts(["cat"], role), plain.encode_texts([prompt + "cat"], role), atol=1e-5)
        np.testing.assert_allclose(sts.encode_texts(["cat"], role), plain.encode_texts(["cat"], role), atol=1e-6)


def test_what_is_no_sentence_transformers_model_is_refused(llama, sentence_transformer, tmp_path):
    path = labelled(tmp_path / "mine.csv")
    damaged = shutil.copytree(sentence_transformer, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"damaged")
    pickled = shutil.copytree(sentence_transformer, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    for spec, message in (
        (f"st:{llama}", "a folder without modules.json"),
        ("st:/no/such", "no folder '/no/such'"),
        ("st:org/name", "cannot load 'org/name'.*the hub does not answer"),
        (f"st:{damaged}", "does not load with sentence-transformers"),
        (f"st:{pickled}", "is a pickle"),
    ):
        with pytest.raises(InputError, match=message):
            run("--data", path, "--model", spec)
    texts = tmp_path / "texts.txt"
    texts.write_text("one text\nanother text\n")
    for flags in (
        ("--pooling", "mean"),
        ("--sweep", "pooling=mean,last"),
        ("--token-prepending", "1..20%"),
        ("--remove-mean", str(texts)),
        ("--override-contract",),
    ):
        with pytest.raises(InputError, match=f"{flags[0]} is for our encoder, and every --model is one of sentence-transformers"):
            run("--data", path, "--model", f"st:{sentence_transformer}", *flags)


def test_a_sentence_transformers_model_is_no_baseline(llama, sentence_transformer, tmp_path, capsys):
    """Where it is the first model the others are compared with it, and the map of a page has it."""
    path, html, spec = labelled(tmp_path / "mine.csv"), tmp_path / "page.html", f"st:{sentence_transformer}"
    run("--data", path, "--model", spec, llama, "--baselines", "tfidf", "--report", html)
    assert f"less {spec} " in capsys.readouterr().out
    titles = [panel["title"] for panel in data_of(html)["maps"][0]["panels"]]
    assert titles[0].startswith("llama, cluster") and titles[1].startswith("st:")
    text = html.read_text()
    assert "a sentence-transformers model under its own settings" in text and text.count(": a baseline</p>") == 1


# ------------------------------------------------------------------------------------------------------------ prefetch


def test_prefetch_without_network_says_what_is_missing(hub, llama, tmp_path, capsys):
    hub("STS12")
    hub_standins.put_into_cache(tmp_path / "hub", Path(llama), "org/llama", hub_standins.COMMIT, "models")
    flags = ("--task", "STS12", "STS13", "--model", llama, "org/llama", "org/other")
    failed(*flags, "--prefetch")
    printed = capsys.readouterr()
    assert printed.out.startswith("STS12: mteb/sts12-sts, ") and "org/llama: " in printed.out
    lines = printed.err.partition("could not be computed:\n")[2].splitlines()
    assert lines[0] == "  STS13: mteb/sts13-sts: it is not in this machine's cache, and the hub does not answer"
    assert len(lines) == 2 and lines[1].startswith("  cannot load 'org/other'")
    run("--task", "STS12", "--model", llama, "org/llama", "--prefetch")
    assert "1 data sets, 1 models of the hub: the same command with --prefetch left out runs without network now" in capsys.readouterr().out


@pytest.mark.slow
def test_what_prefetch_has_fetched_runs_with_the_network_off(llama, tmp_path):
    """From a hub on this machine, which is then closed; both calls as a user makes them."""
    names, commits = ("STS12", "MTOPDomainClassification", "ArguAna"), {"org/llama": hub_standins.COMMIT}
    for name in names:
        about = hub_standins.task_of(name).metadata.dataset
        commits[about["path"]] = about["revision"]
        hub_standins.write_repository(tmp_path / "served" / "datasets" / about["path"], hub_standins.DATASETS[name])
    shutil.copytree(llama, tmp_path / "served" / "models" / "org" / "llama")
    server = hub_standins.Hub(tmp_path / "served", commits)
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower() and not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}

    def call(*flags) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / "evaluate.py"), "--task", *names, *flags]
        return subprocess.run([*command, "--model", "org/llama", *FLAGS], env=environment, capture_output=True, text=True, check=False)

    fetched = call("STS13", "--prefetch")
    assert fetched.returncode == 1, fetched.stderr
    missing = fetched.stderr.partition("could not be computed:\n")[2].splitlines()
    assert len(missing) == 1 and missing[0].startswith("  STS13: mteb/sts13-sts: RepositoryNotFoundError")
    assert "3 data sets, 1 models of the hub: " in fetched.stdout and fetched.stdout.count("mteb/") == 3
    server.shutdown()
    server.server_close()
    scored = call("--out", str(tmp_path / "r.json"))
    assert scored.returncode == 0, scored.stderr
    assert {cell["task"] for cell in json.loads((tmp_path / "r.json").read_text())["results"]} == set(names)


# --------------------------------------------------------------------------------------------------------------- paper


def test_the_grid_of_the_paper_beside_published_figures(hub, llama, tmp_path, capsys, monkeypatch):
    hub("TwentyNewsgroupsClustering.v2", "RedditClustering")
    spec = shutil.copytree(llama, tmp_path / "Llama-3.2-1B")
    tuned = make_run(str(spec), tmp_path / "runs" / "tuned", prompt="prompt-eol", pooling="mean", scope="text")
    make_run(llama, tmp_path / "runs" / "of-another-base")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(paper, "PUBLISHED", (paper.PUBLISHED[0]._replace(model="Llama-3.2-1B"), *paper.PUBLISHED[1:]))
    failed("--paper", "--model", spec, "no/such", "--out", "r.json")
    printed = capsys.readouterr()
    written = json.loads((tmp_path / "r.json").read_text())
    assert {cell["model"] for cell in written["results"]} == {"Llama-3.2-1B, none, last", "Llama-3.2-1B, cluster, last, all", "runs/tuned"}
    assert written["results"][-1]["fingerprint"] == Encoder.load(tuned).fingerprint
    assert [entry["v_measure"] for entry in written["published"]] == [33.2, 46.8, 54.05, 57.51, 58.57, 50.82, 47.66]
    lines = printed.out[printed.out.index("mean V-measure, clustering") :].splitlines()
    head = lines[0]
    column = {name: head.index(name) for name in ("MTEB(eng, v1), measured", "MTEB(eng, v2), measured", "published", "on  ", "source")}
    of_base = next(line for line in lines if line.startswith("Llama-3.2-1B, none, last"))
    assert of_base[column["published"] :].startswith("33.2 ") and "not stated" in of_base and "2507.22729" in of_base
    assert "(2 of 11 tasks)" in of_base and "(1 of 8 tasks)" in of_base  # both versions of one set have the same revision
    of_cluster = next(line for line in lines if line.startswith("Llama-3.2-1B, cluster"))
    assert of_cluster[column["published"] :].startswith("-")  # published of meta-llama/Llama-3.2-1B, which is another model
    qwen = next(line for line in lines if line.startswith("Qwen/Qwen3-Embedding-0.6B"))
    assert qwen[column["MTEB(eng, v2), measured"] :].startswith("- ") and qwen[column["published"] :].startswith("54.05")
    assert next(line for line in lines if line.startswith("runs/tuned"))[column["published"] :].startswith("-")
    missing = printed.err.partition("could not be computed:\n")[2].splitlines()
    assert len(missing) == 11 + 8 - 3 + 1 and sum("no/such" in line for line in missing) == 1


def test_the_paper_without_models_and_data_shows_what_was_published(hub, capsys):
    failed("--paper")
    printed = capsys.readouterr()
    assert "46.8" in printed.out and "58.57" in printed.out and "V-measure" in printed.out
    missing = printed.err.partition("could not be computed:\n")[2].splitlines()
    assert len(missing) == 19 + 2 and sum("meta-llama/Llama-3.2-1B" in line or "Qwen/Qwen3-0.6B" in line for line in missing) == 2


def test_runs_and_sentence_transformers_models_are_rows_of_the_paper(hub, llama, sentence_transformer, tmp_path, capsys, monkeypatch):
    """A run is scored once, under its contract; a model that was published stands beside the figure of its name."""
    hub("TwentyNewsgroupsClustering.v2")
    tuned = make_run(llama, tmp_path / "runs" / "tuned", prompt="prompt-eol", pooling="mean", scope="text")
    monkeypatch.chdir(tmp_path)
    named = paper.PUBLISHED[2]._replace(model=sentence_transformer)
    monkeypatch.setattr(paper, "PUBLISHED", (*paper.PUBLISHED[:2], named, *paper.PUBLISHED[3:]))
    mean = labelled(tmp_path / "mine.csv")
    failed("--paper", "--model", tuned, llama, f"st:{sentence_transformer}", "--remove-mean", mean, "--column", "text", "--out", "r.json")
    printed, cells = capsys.readouterr(), json.loads((tmp_path / "r.json").read_text())["results"]
    missing = printed.err.partition("could not be computed:\n")[2].splitlines()
    assert len(missing) == 11 + 8 - 2 and all("its data is not in the cache" in line for line in missing)
    assert {cell["task"] for cell in cells} == {"TwentyNewsgroupsClustering", "TwentyNewsgroupsClustering.v2"}  # of one revision
    labels = [cell["model"] for cell in cells if cell["task"] == "TwentyNewsgroupsClustering"]
    assert [label for label in labels if label.startswith("runs/")] == ["runs/tuned", "runs/tuned, mean of mine.csv removed"]
    assert len(labels) == 2 * 2 + 2 + 1
    lines = printed.out[printed.out.index("mean V-measure, clustering") :].splitlines()
    assert "54.05" in next(line for line in lines if line.startswith("st:")) and sum("54.05" in line for line in lines) == 1
    failed("--paper", "--model", tuned, "--baselines", "side-by-side", "--report", "r.html")  # no base among the models
    assert f"{Path('runs/tuned')} + TF-IDF" in capsys.readouterr().out
    page = (tmp_path / "r.html").read_text()
    assert "Published figures" in page and "<bdi>46.8</bdi></td><td><bdi>not stated</bdi>" in page


def test_nothing_is_written_of_no_score_and_the_last_lines_say_so(hub, llama, tmp_path, capsys):
    failed("--paper", "--model", llama, "--out", tmp_path / "r.json", "--report", tmp_path / "r.html")
    said = capsys.readouterr().err
    assert "r.json is not written: there is no score" in said and "r.html is not written" in said
    assert not list(tmp_path.glob("r.*"))


def test_the_paper_has_its_own_grid(llama):
    other = (("--embed-filter", "0.5"), ("--token-prepending", "1..20%"), ("--dims", "8"), ("--facets", "a=x {text}", "b=y {text}"))
    for flags in (("--task", "sts"), ("--pooling", "mean"), ("--bundled",), ("--sweep", "pooling=mean"), *other):
        with pytest.raises(InputError, match="--paper has its own tasks, prompts and pooling: leave --"):
            run("--paper", "--model", llama, *flags)


# ------------------------------------------------------------------------------- the same as mteb's own way, on real text


def real_data(kind: str, tmp_path: Path) -> Path:
    """Bundled sentences as data for a task of this type: clusters, classes, pairs of more or less like ones, questions and answers."""
    bundled = [row for _, row in read_rows(bundled_tasks()["docstrings-by-module"])]
    rows = [row for row in bundled if row["label"] in sorted({row["label"] for row in bundled})[:3]]
    rows = list({row["text"].lower(): row for row in rows}.values())  # equal documents would be ranked by chance
    if kind in ("Clustering", "Classification"):
        path = tmp_path / "mine.jsonl"
        path.write_text("".join(json.dumps({"text": row["text"], "label": row["label"]}) + "\n" for row in rows))
        return path
    if kind == "STS":
        path = tmp_path / "pairs.jsonl"
        pairs = [(row, rows[(i * 7 + 1) % len(rows)]) for i, row in enumerate(rows)]
        like = [len({*a["text"].lower().split()} & {*b["text"].lower().split()}) + 2 * (a["label"] == b["label"]) for a, b in pairs]
        lines = [{"text1": a["text"], "text2": b["text"], "score": score} for (a, b), score in zip(pairs, like, strict=True)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path
    folder = tmp_path / "search"
    folder.mkdir()
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"_id": f"d{i}", "text": row["text"]}) + "\n" for i, row in enumerate(rows)))
    asked = [(i, " ".join(row["text"].split()[::2])) for i, row in enumerate(rows)]
    (folder / "queries.jsonl").write_text("".join(json.dumps({"_id": f"q{i}", "text": text}) + "\n" for i, text in asked))
    (folder / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(f"q{i}\td{i}\t1\n" for i, _ in asked))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Clustering", "Classification", "STS", "Retrieval"])
def test_scores_are_those_of_mteb_through_sentence_transformers(kind, tmp_path_factory, tmp_path):
    """The bundled weights in float32, mean over all tokens, no prompt: by our encoder, by mteb's own wrapper, and by a row st:PATH."""
    from sentence_transformers import SentenceTransformer

    bundled = str(ROOT / "models" / "tiny")
    folder = make_sentence_transformer(bundled, tmp_path_factory.mktemp("st") / "tiny")
    data = real_data(kind, tmp_path)
    flags = ("--data", data, "--task", kind.lower(), "--model", "tiny", f"st:{folder}", "--keep-bos", "--scope", "all", *FLAGS)
    run(*flags, "--dtype", "float32", "--device", "cpu", "--out", tmp_path / "r.json")
    ours, row = (cell["score"] for cell in json.loads((tmp_path / "r.json").read_text())["results"])
    theirs = SentenceTransformer(folder, device="cpu", model_kwargs={"dtype": torch.float32})  # the file has bfloat16
    result = mteb.evaluate(theirs, local_task(data, kind), cache=None, co2_tracker=False, show_progress_bar=False).task_results[0]
    assert ours == pytest.approx(result.get_score(), abs=1e-4) and row == pytest.approx(ours, abs=1e-4)
    assert 0.1 < ours < 0.999  # a score that would move, were the vectors others
