"""evaluate.py --report: the page's numbers, its map and confused classes, and texts of any kind. Browsers: test_report_page.py."""

import base64
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import make_run
from report_pages import BARE, CLUSTER, HOSTILE, clouds, contract, data_of, hostile_rows, make_page, write_rows
from short_evaluations import (
    labelled,
    offline,  # noqa: F401, a fixture that every test uses
    run,
    write_csv,
)

pytest.importorskip("plotly", reason="plotly (requirements.txt) is not installed")

from encoder import Encoder
from evaluation import report, report_map, scores
from evaluation.observing import Sample
from evaluation.report_grid import heat_map
from evaluation.report_map import KeptVectors, View, clusters, confused, laid_on, plane
from files.console import InputError
from files.page import as_script, escape, page, plain, typed


def decoded(array: dict) -> np.ndarray:
    return np.frombuffer(base64.b64decode(array["bdata"]), {"f4": "<f4", "i4": "<i4"}[array["dtype"]])


def own_part(html: str) -> str:
    """The page without plotly's script."""
    return re.sub(r"<script>/\*\*.*?</script>", "", html, count=1, flags=re.DOTALL)


def without_scripts(html: str) -> str:
    return re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL)


# ------------------------------------------------------------------------------------------------------------- the whole


def test_the_page_has_the_numbers_of_out_and_encodes_nothing_again(llama, tmp_path, monkeypatch, capsys):
    calls, stream = [], Encoder.stream
    monkeypatch.setattr(Encoder, "stream", lambda self, texts, *a, **k: calls.append(len(texts)) or stream(self, texts, *a, **k))
    paths = [labelled(tmp_path / "mine.csv"), labelled(tmp_path / "others.csv", 45)]
    trained, out, html = make_run(llama, tmp_path / "run", prompt="cluster"), tmp_path / "r.json", tmp_path / "new" / "r.html"
    flags = ("--sweep", "prompt=none,cluster", "pooling=mean,last", "--baselines", "tfidf")
    run("--data", *paths, "--model", llama, trained, *flags, "--out", out, "--report", html)
    assert sorted(n for n in calls if n > 9) == [45] * 3 + [60] * 3  # the few are looked at when the adapter is merged
    results, text = json.loads(out.read_text()), own_part(html.read_text())
    for cell in results["results"]:
        assert escape(scores.show(cell)) in text and cell["fingerprint"] in text and escape(cell["model"]) in text
    against = [d for d in results["differences"] if d["less"] == "llama, none, mean"]
    assert len(against) == 5 * 4
    for d in against:
        if d["task"] != "mean AMI":
            low, high = (100 * bound for bound in d["interval"])
            assert f"{100 * d['difference']:+.1f} ({low:.1f} to {high:.1f}) {d['verdict']}" in text
    printed = capsys.readouterr().out
    assert next(line for line in printed.splitlines() if line.startswith("the best, ")) in text
    data = data_of(html)
    assert len(data["maps"]) == 2 and [len(panel["x"]["bdata"]) for panel in data["maps"][0]["panels"]] == [320, 320]
    assert data["maps"][0]["panels"][0]["title"].startswith("llama, none, mean: v-measure ")
    assert data["maps"][0]["texts"][:2] == ["the cat chased a dog 0", "interest rates at the bank 0"]
    assert (
        data["grid"]["shown"]["mean"][0][0]
        == f"{100 * np.mean([c['score'] for c in results['results'] if c['model'] == 'llama, none, mean']):.1f}"
    )
    assert "python " in text and results["versions"]["torch"] in text


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    """A page of texts and labels that hold anything."""
    folder = tmp_path_factory.mktemp("hostile")
    make_page(folder / "r.html", hostile_rows(folder / "mine.jsonl"), (0.5, 1.0))
    return folder / "r.html"


def test_a_page_asks_nobody_for_anything(hostile):
    html = hostile.read_text("utf-8")
    assert html.count("plotly.js v") == 1 and "default-src 'none'" in html
    assert not re.findall(
        r"https?://|<link|<iframe|@import|<[^>]*\s(?:src|href)=", re.sub(r'<script type="application/json".*?</script>', "", own_part(html))
    )


def test_texts_and_labels_may_hold_anything(hostile):
    html = hostile.read_text("utf-8")
    assert html.lower().count("</script") == html.count("<script") == 3
    body = without_scripts(html)
    tags = set(re.findall(r"</?([a-zA-Z!][a-zA-Z0-9]*)", body))
    assert not tags & {"img", "a", "i", "script"} and "&lt;img" in body
    assert not re.search(
        r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL)
    )
    found = data_of(hostile)["maps"][0]
    assert len(found["texts"]) == 63 and max(map(len, found["texts"])) == 160
    assert found["texts"][0] == f"0 {HOSTILE[0]}" and "�" in found["texts"][2] and "\u202e" not in found["texts"][3]


def test_nothing_is_overwritten_and_errors_come_first(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(scores, "score", lambda *_: pytest.fail("a model was scored"))
    path, old = labelled(tmp_path / "mine.csv"), tmp_path / "old.html"
    old.write_text("mine")
    for flags, message in (
        (("--report", old), r"old\.html exists already: choose another --report, or delete it first"),
        (("--report", tmp_path), r"--report \S+ is a folder: name a file, such as \S+report\.html"),
        (("--report", path / "r.html"), r"--report \S+: \S+mine\.csv is a file, choose another place"),
        (("--report", tmp_path / "r", "--out", tmp_path / "r"), "--report and --out are both"),
    ):
        with pytest.raises(InputError, match=message):
            run("--data", path, "--model", llama, *flags)
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="--report needs plotly: pip install -r requirements"):
        run("--data", path, "--model", llama, "--report", tmp_path / "r.html")
    assert old.read_text() == "mine"


def test_tasks_without_labels_have_a_table_and_no_map(llama, tmp_path):
    path = write_csv(tmp_path / "sts.csv", "text1,text2,score", [(f"cat {i}", f"dog {i * i}", i % 6) for i in range(20)])
    run("--data", path, "--model", llama, "--prompt", "none", "cluster", "--report", tmp_path / "r.html")
    html = (tmp_path / "r.html").read_text()
    assert report.NO_MAP in html and data_of(tmp_path / "r.html") == {"grid": None, "maps": []} and "cosine-spearman" in html


def test_classification_has_a_map_of_its_test_texts(llama, tmp_path):
    run("--data", labelled(tmp_path / "a.csv"), "--task", "classification", "--model", llama, "--report", tmp_path / "r.html")
    (found,) = data_of(tmp_path / "r.html")["maps"]
    assert len(found["texts"]) == 30 and len(found["panels"]) == 1 and found["names"][0] == "animal (10)"


def test_texts_without_labels_are_drawn_by_cluster(llama, tmp_path):
    topics = ["cats and dogs chase mice at home", "interest rates and fees at banks", "cars and trucks on roads at night"]
    words = [f"{a}{b}" for a in "klmnp" for b in "aeiou"]
    texts = [f"{topics[i % 3]} x{words[i % 25]} y{words[i % 23]} z{words[i % 19]} {i}" for i in range(150)]
    (tmp_path / "mine.txt").write_text("\n".join(texts))
    trained = make_run(llama, tmp_path / "run", prompt="cluster")
    run("--texts", tmp_path / "mine.txt", "--model", trained, "--report", tmp_path / "r.html")
    (found,) = data_of(tmp_path / "r.html")["maps"]
    assert found["kind"] == "cluster" and sorted(found["texts"]) == sorted(texts) and len(found["panels"]) == 2
    assert found["panels"][0]["title"].startswith("llama, untuned, same contract: ")
    assert "likeness of hidden words" in (tmp_path / "r.html").read_text() and "Most confused" not in (tmp_path / "r.html").read_text()


def test_what_was_finished_before_is_on_the_map_as_well(llama, tmp_path, monkeypatch):
    path, begun, score = labelled(tmp_path / "mine.csv"), [], scores.score

    def failing(task, model, *rest, **options):
        begun.append(model.label)
        if len(begun) == 2:
            raise KeyboardInterrupt
        return score(task, model, *rest, **options)

    monkeypatch.setattr(scores, "score", failing)
    flags = ("--data", path, "--model", llama, "--prompt", "none", "cluster", "--out", tmp_path / "r.json", "--report", tmp_path / "r.html")
    with pytest.raises(KeyboardInterrupt):
        run(*flags)
    assert not (tmp_path / "r.html").exists()
    run(*flags)
    (found,) = data_of(tmp_path / "r.html")["maps"]
    assert [panel["title"].split(":")[0] for panel in found["panels"]] == ["llama, none, mean", "llama, cluster, last, all"]


def test_a_second_process_writes_no_page(llama, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    run("--data", labelled(tmp_path / "mine.csv"), "--model", llama, "--report", tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


# --------------------------------------------------------------------------------------------------------- rows on a map


def view(label: str, score: float, n: int = 30, labels: list[str] | None = None, vectors=None, **fields) -> tuple[dict, Sample]:
    vectors = np.zeros((n, 2), np.float32) if vectors is None else vectors
    texts = [f"text {i}" for i in range(n)]
    cell = {"task": "t", "type": "Clustering", "model": label, "fingerprint": label, "score": score, "contract": contract(**fields)}
    return cell, Sample(texts, labels or ["a", "b", "c"] * (n // 3), vectors, n)


def kept_labels(*views: tuple[dict, Sample]) -> list[str]:
    kept = KeptVectors(["Clustering"])
    for cell, sample in views:
        kept.add(cell, sample)
    return [view.cell["model"] for views in kept.pairs() for view in views]


def test_the_first_row_and_the_best_of_the_others_are_kept():
    assert kept_labels(view("first", 0.9), view("b", 0.2), view("c", 0.4), view("d", 0.3)) == ["first", "c"]
    assert kept_labels(view("run", 0.9, data={}), view("base", 0.2)) == ["run", "base"]
    assert kept_labels(view("run", 0.9, data={"name": "pairs"}), view("base", 0.2)) == ["base", "run"]
    baseline, sample = view("tfidf", 0.9)
    assert kept_labels((baseline | {"contract": None}, sample), view("only", 0.1)) == ["only"]
    assert kept_labels((view("sts", 0.9)[0] | {"type": "STS"}, sample)) == []


def test_of_many_texts_so_many_are_drawn_and_this_is_said(monkeypatch):
    monkeypatch.setattr(report_map, "plane", lambda vectors: (vectors.astype(float), "t-SNE"))
    kept = KeptVectors(["Clustering"])
    vectors = np.arange(100_000, dtype=np.float32).reshape(50_000, 2)
    labels = [f"label {i % 200}" for i in range(50_000)]
    for name, score in (("first", 0.1), ("second", 0.2)):
        kept.add(*view(name, score, 50_000, labels, vectors))
    (pair,) = kept.pairs()
    assert pair[0].sample.texts == pair[1].sample.texts and len(pair[0].sample.texts) == 20_000
    assert all(text == f"text {int(row[0]) // 2}" for text, row in zip(pair[0].sample.texts, pair[0].sample.vectors, strict=True))
    shown = report.for_script(report_map.map_of(pair, lambda line: None))
    assert shown["note"].startswith("20,000 of 50,000 texts, drawn at random, coloured by label (200)")
    assert len(shown["names"]) == 200 and decoded(shown["codes"]).max() == 199
    assert KeptVectors(["Clustering", "STS", "Classification"]).most == 10_000


@pytest.mark.parametrize("n", [1, 2, 3, 12, 60])
@pytest.mark.parametrize("kind", ["clouds", "one point", "zeros", "copies", "one number"])
def test_every_kind_of_vectors_has_a_plane(n, kind):
    vectors = clouds(["a", "b", "c"] * (n // 3) + ["a"] * (n % 3), 3.0)
    vectors = {
        "clouds": vectors,
        "one point": np.tile(vectors[:1], (n, 1)),
        "zeros": np.zeros_like(vectors),
        "copies": vectors[np.arange(n) % 2],
        "one number": vectors[:, :1],
    }[kind]
    points, _ = plane(vectors)
    assert points.shape == (n, 2) and np.isfinite(points).all() and np.isfinite(laid_on(points, points)).all()
    if kind == "clouds" and n > 2:
        assert len({point.tobytes() for point in points}) == n


def test_a_plane_keeps_what_is_near(tmp_path):
    labels = np.array(["a", "b", "c"] * 40)
    points, method = plane(clouds(labels, 8.0))
    assert method in ("t-SNE", "UMAP")
    distances = np.linalg.norm(points[:, None] - points[None], axis=2) + np.where(np.eye(120), np.inf, 0)
    assert (labels[distances.argmin(1)] == labels).mean() > 0.95


def test_the_second_plane_is_laid_on_the_first():
    points = np.random.default_rng(0).normal(size=(20, 2))
    turned = 3 * points @ np.array([[0.6, 0.8], [0.8, -0.6]]) + 5
    np.testing.assert_allclose(laid_on(turned, points), points - points.mean(0), atol=1e-9)


def test_clusters_are_named_by_their_words():
    texts, noise = [f"{word} {i}" for i in range(20) for word in ("banana", "rocket")], np.random.default_rng(0).normal(size=(40, 2))
    names = clusters(texts, (np.tile([[1, 0], [0, 1]], (20, 1)) + noise / 50).astype(np.float32))
    assert len(set(names)) > 1 and all(name.endswith(": " + text.split()[0]) for text, name in zip(texts, names, strict=True))
    assert clusters(["", "x"], np.zeros((2, 3), np.float32)) == ["cluster 1"] * 2


# ------------------------------------------------------------------------------------------------------ confused classes


def test_shares_of_confused_classes_by_hand(monkeypatch):
    """On a line lie a a b | b b b | c c, and each looks at its nearest one."""
    monkeypatch.setattr(report_map, "NEIGHBOURS", 1)
    places = [0.0, 1.0, 1.9, 10.0, 11.0, 12.5, 50.0, 51.0]
    vectors = np.array([[place, 0.0] for place in places], np.float32)
    pair = [View(*view("mine", 0.5, 8, list("aabbbbcc"), vectors))]
    (found,) = confused(pair)
    assert found.classes == ("a", "b") and found.shares == [2 / 6] and found.examples == [("text 1", "text 2")]


def test_one_class_and_many_classes():
    for labels, n_pairs in ((["same"] * 400, 0), ([f"class {i % 200}" for i in range(400)], 12), ([""] * 200 + ["b"] * 200, 1)):
        found = confused([View(*view("mine", 0.5, 400, labels, clouds(labels, 0.1)))])
        assert len(found) == n_pairs and all(pair.examples for pair in found)
    assert confused([View(*view("mine", 0.5, 1, ["a"], np.ones((1, 2), np.float32)))]) == []


# -------------------------------------------------------------------------------------------------------------- the grid


def cells_of(**settings: dict) -> list[dict]:
    return [
        {"model": name, "fingerprint": name, "contract": about, "task": "t", "metric": "v_measure", "score": i / 10, "std": None}
        for i, (name, about) in enumerate(settings.items())
    ]


def test_a_grid_has_prompts_and_layers_down_and_poolings_across():
    grid = heat_map(
        cells_of(
            a=contract(),
            b=contract(layers=["80%"]),
            c=contract(prompts=CLUSTER),
            d=contract(prompts=CLUSTER, scope="all"),
            e=contract(prompts=CLUSTER, layers=[1, -1]),
            f=contract(prompts=CLUSTER, pooling="last", scope="all", eos=True),
        )
    )
    assert grid["rows"] == ["none, layer -1", "none, layer 80%", "cluster, layer -1", "cluster, its own layers"]
    assert grid["columns"] == ["mean, all", "mean, text", "first-last, text", "eos, all"]
    assert grid["shown"]["t"] == [["0.0", "0.0", "", ""], ["10.0", "10.0", "", ""], ["30.0", "20.0", "", "50.0"], ["", "", "40.0", ""]]
    assert list(grid["values"]) == ["t"] and grid["values"]["t"][2][1] == pytest.approx(20)


def test_several_prompts_at_once_are_one_line_of_the_grid():
    several = {role: [CLUSTER[role], BARE[role]] for role in BARE}
    grid = heat_map(cells_of(a=contract(), b=contract(prompts=CLUSTER), c=contract(prompts=several)))
    assert grid["rows"][:2] == ["none", "cluster"] and grid["shown"]["t"] == [["0.0"], ["10.0"], ["20.0"]]
    twice_bare = {role: [BARE[role]] * 2 for role in BARE}
    grid = heat_map(cells_of(a=contract(prompts=CLUSTER, scope="all"), b=contract(prompts=twice_bare), c=contract(prompts=CLUSTER)))
    assert grid["columns"] == ["mean, all", "mean, text"] and grid["shown"]["t"] == [["0.0", "20.0"], ["10.0", "10.0"]]


def test_fields_that_vary_and_prompts_that_look_alike_stay_apart():
    long = {role: {"prefix": "x" * 90, "suffix": ""} for role in BARE}
    grid = heat_map(cells_of(a=contract(prompts=long), b=contract(prompts=BARE | {"document": long["document"]}), c=contract(dims=8)))
    assert len(set(grid["rows"])) == 3 and grid["columns"] == ["mean", "mean, dims 8"]


def test_a_score_that_is_not_defined_leaves_its_place_empty():
    cells = cells_of(a=contract(), b=contract(layers=[1]), c=contract(layers=[2]))
    cells[1]["score"] = math.nan
    grid = heat_map(cells)
    assert grid["values"]["t"][1] == [None] and grid["shown"]["t"] == [["0.0"], [""], ["20.0"]] and as_script(grid)


def test_two_settings_and_runs_are_no_grid():
    assert heat_map(cells_of(a=contract(), b=contract(prompts=CLUSTER), c=contract(data={"name": "pairs"}), d=None)) is None


# -------------------------------------------------------------------------------------------------------------- the page


@pytest.mark.parametrize(
    "value, expected",
    [
        ("  two\n\t words ", "two words"),
        ("a\x00b\ud800", "a�b�"),
        ("x" * 160, "x" * 160),
        ("x" * 161, "x" * 159 + "…"),
        ("a\u202eb\u2069", "ab"),
        ("", ""),
        (" " * 5000 + "late", "…"),
        (7, "7"),
    ],
)
def test_plain_lines(value, expected):
    assert plain(value) == expected


def test_twenty_thousand_long_texts_stay_below_15_megabytes():
    for character in ("中", "<", "\x01", "😀"):
        text = plain(character * 5000)
        assert len(as_script(text).encode()) <= 405 and text.endswith("…")
    points, texts = typed(np.zeros(20_000)), [text] * 20_000
    assert len(page("t", "", [texts, *[points] * 5], "").encode()) < 15e6


def test_typed_arrays_are_those_of_plotly():
    assert typed(np.array([1.5, -2.0])) == {"dtype": "f4", "bdata": base64.b64encode(np.float32([1.5, -2]).tobytes()).decode()}
    assert decoded(typed(np.array([3, 70000]))).tolist() == [3, 70000]


def test_three_texts_have_a_page(tmp_path):
    make_page(tmp_path / "r.html", write_rows(tmp_path / "mine.jsonl", ["a", "b", "c"], ["x", "x", "y"]))
    assert len(data_of(tmp_path / "r.html")["maps"][0]["texts"]) == 3
