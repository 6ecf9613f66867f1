"""Differences between rows of the table: their arithmetic against scikit-learn, what is called better, and what the table says of it."""

import json

import numpy as np
import pytest
from scipy.stats import spearmanr
from short_evaluations import (
    labelled,
    offline,  # noqa: F401, a fixture that every test uses
    run,
    write_csv,
)
from sklearn.metrics import adjusted_mutual_info_score, average_precision_score, v_measure_score

from evaluation import differences, evidence, scores
from evaluation.differences import Row
from evaluation.evidence import Evidence
from evaluation.mteb_model import MtebModel
from evaluation.observing import observed
from tasks.mteb_tasks import local_task


def topics(n: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Vectors (n, 6) about four centres, and which centre each belongs to."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(4, size=n)
    return (np.eye(6)[labels] + noise * np.random.default_rng(seed + 1).normal(size=(n, 6))).astype(np.float32), labels


def of(noise: float, n: int = 200, rows: str = "same") -> Evidence:
    return evidence.of_clustering(*topics(n, noise), rows)


def test_scores_of_redrawn_rows_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    labels, clusters = np.array(list("abcde"))[rng.integers(5, size=60)], rng.integers(7, size=60) - 1
    drawn = rng.multinomial(60, np.full(60, 1 / 60), size=8).T
    found = evidence.clustering_scores(labels, clusters, np.column_stack([np.ones(60, int), drawn]))
    for i, counts in enumerate([np.ones(60, int), *drawn.T]):
        rows = np.repeat(np.arange(60), counts)
        assert found[0, i] == pytest.approx(v_measure_score(labels[rows], clusters[rows]), abs=1e-12)
        assert found[1, i] == pytest.approx(adjusted_mutual_info_score(labels[rows], clusters[rows]), abs=0.06)  # chance as undrawn
    assert found[1, 0] == pytest.approx(adjusted_mutual_info_score(labels, clusters), abs=1e-12)


@pytest.mark.parametrize("clusters", [[0, 0, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 2, 3]])
def test_scores_of_plain_cases_are_those_of_scikit_learn(clusters):
    for labels in ([0, 0, 1, 1], [5, 5, 5, 5]):
        v_measure, ami = evidence.clustering_scores(np.array(labels), np.array(clusters), np.ones((4, 1), int))[:, 0]
        assert v_measure == pytest.approx(v_measure_score(labels, clusters), abs=1e-12)
        assert ami == pytest.approx(adjusted_mutual_info_score(labels, clusters), abs=1e-12)


def test_correlation_of_redrawn_pairs_is_that_of_scipy():
    rng = np.random.default_rng(0)
    gold, near = rng.integers(5, size=40).astype(float), rng.normal(size=40)
    found = evidence.of_correlation(near, gold, "rows")
    assert found.scores[0, 0] == pytest.approx(spearmanr(near, gold)[0])
    drawn = np.random.default_rng(0).integers(40, size=(evidence.REDRAWS, 40))
    assert found.redrawn[0, 0, :3] == pytest.approx([spearmanr(near[rows], gold[rows])[0] for rows in drawn[:3]])


def test_all_rows_of_the_table_are_redrawn_and_halved_alike():
    first, again = of(0.5), of(0.5)
    for field in ("scores", "redrawn", "halves"):
        np.testing.assert_array_equal(getattr(first, field), getattr(again, field))
    assert first.scores.shape == (2, evidence.SEEDS) and first.redrawn.shape == (2, evidence.SEEDS, evidence.REDRAWS)
    assert first.halves.shape == (2, evidence.SPLITS, 2, 2)
    for one, other in evidence.halves(9):
        assert sorted([*one, *other]) == list(range(9)) and abs(len(one) - len(other)) == 1
    assert differences.difference(first, again)[:5] == (0, 0, 0, 0, 0)


def test_a_clear_difference_is_called_and_none_is_not():
    clear, blurred = of(0.2), of(0.8)
    better, worse = differences.difference(clear, blurred), differences.difference(blurred, clear)
    assert (better.verdict, worse.verdict) == ("better", "worse") and better.low < better.value < better.high
    assert (better.value, better.low) == pytest.approx((-worse.value, -worse.high))
    assert better.rows > 0 and better.value == pytest.approx(clear.scores[0].mean() - blurred.scores[0].mean())
    wide = np.hypot(better.rows, better.algorithm)
    assert better.high - better.value >= 1.9 * wide
    alike = differences.difference(of(0.8), evidence.of_clustering(topics(200, 0.8)[0][:, ::-1], topics(200, 0.8)[1], "same"))
    assert alike.verdict == "cannot tell"


def test_rows_that_are_not_the_same_are_not_compared():
    assert differences.difference(of(0.5), of(0.5, rows="other")) is None


def test_redraws_vary_as_the_root_of_the_number_of_rows():
    wide, narrow = (of(0.5, n).redrawn[0].std(1).mean() for n in (100, 900))
    assert 2.2 < wide / narrow < 4


def test_what_other_rows_do_to_the_clusters_widens_the_interval():
    """Two seeds that agree on what differs between halves: that comes from the rows. Where they contradict each other, from the seeds."""
    one, other = of(0.5), of(0.6)
    narrow = differences.difference(one, other).rows
    signs = np.array([[1, 1], [-1, -1]])
    rows, seeds = (one._replace(halves=other.halves + 0.2 * pattern) for pattern in (signs, signs * [1, -1]))
    assert differences.difference(rows, other).rows == pytest.approx(0.2)
    assert differences.difference(seeds, other).rows <= narrow


def test_the_mean_is_of_these_tasks_unless_they_are_many():
    """Ten tasks without a common difference: what each shows well does not hold for tasks like them."""
    of_task = [differences.interval(value, 0.01, 0.0) for value in (0.1, -0.1, 0.3, -0.2)]
    few = differences.over_tasks(of_task)
    assert few.value == pytest.approx(0.025) and few.rows == pytest.approx(0.005) and few.verdict == "better"
    assert differences.over_tasks([*of_task, *of_task, *of_task]).verdict == "cannot tell"
    steady = differences.over_tasks([differences.interval(0.1 + 0.001 * i, 0.01, 0.0) for i in range(8)])
    assert steady.verdict == "better"
    assert differences.over_tasks([*of_task, None]) is None and differences.over_tasks([]) is None


def made_up(means: list[float], swing: float) -> dict:
    """A grid whose settings have these scores; on halves each is `swing` more on one and less on the other."""
    table = {}
    for i, mean in enumerate(means):
        sides = np.tile([[mean + swing * (-1) ** i], [mean - swing * (-1) ** i]], (2, evidence.SPLITS, 1, 2))
        row = Row(f"setting {i}", str(i), grid="base")
        found = Evidence("rows", 100, np.full((2, 3), mean), np.full((2, 3, 5), mean) + np.arange(5) / 1000, sides)
        table[row] = {"task": found}
    return table


def test_the_best_of_a_grid_is_chosen_on_one_half_and_scored_on_the_other():
    (choice,) = differences.chosen_on_halves(made_up([0.5, 0.5, 0.4], 0.1), ["task"])
    assert choice["chosen"] == {"setting 0": evidence.SPLITS, "setting 1": evidence.SPLITS} and choice["settings"] == 3
    assert (choice["score_where_chosen"], choice["score"], choice["first"]) == pytest.approx((0.6, 0.4, 0.5))
    assert differences.chosen_on_halves(made_up([0.5, 0.5], 0.1), ["task"]) == []
    line = differences.show_choice(choice)
    assert "the best of 3 settings on one half of the rows has 40.0 on the other half, 60.0 on its own" in line


def test_the_first_row_that_is_no_baseline_is_what_the_others_are_compared_with():
    table = made_up([0.5, 0.7, 0.6], 0.0)
    table = {Row("TF-IDF", "t", baseline=True): next(iter(table.values()))} | table
    labels = [(row.label, other.label) for row, other in differences.pairs_worth_comparing(table, ["task"])]
    assert labels == [("TF-IDF", "setting 0"), ("setting 1", "setting 0"), ("setting 2", "setting 0"), ("setting 1", "setting 2")]


def test_a_task_that_could_not_be_seen_does_not_cost_the_others_their_intervals():
    table = made_up([0.5, 0.7], 0.0)
    written = differences.as_json(table, ["task", "summarization"])["differences"]
    assert [(d["task"], d["verdict"]) for d in written] == [("task", "better"), ("mean", "better"), ("mean AMI", "better")]
    assert differences.lines(table, ["summarization"]) == [] == differences.lines(dict(list(table.items())[:1]), ["task"])
    table[Row("late", "l")] = {}  # failed on this task
    assert any(line.split() == ["late", "no", "interval", "no", "interval"] for line in differences.lines(table, ["task"]))


def test_average_precision_of_redrawn_pairs_is_that_of_scikit_learn():
    """Also where similarities are equal, and the best of several."""
    rng = np.random.default_rng(0)
    positive = rng.random(60) < 0.3
    near = np.round(rng.normal(size=60) + positive, 1)
    seen = evidence.of_average_precision([near, near, -near], positive, "rows")
    assert seen.scores[0, 0] == pytest.approx(average_precision_score(positive, near), abs=1e-12)
    drawn = np.random.default_rng(0).integers(60, size=(evidence.REDRAWS, 60))
    expected = [max(average_precision_score(positive[rows], side[rows]) for side in (near, -near)) for rows in drawn]
    assert seen.redrawn[0, 0] == pytest.approx(np.array(expected), abs=1e-12)
    assert evidence.of_average_precision([near], np.zeros(60, bool), "rows").scores == 0  # no positive at all


@pytest.mark.parametrize("kind", ["Clustering", "Classification", "STS", "Retrieval"])
def test_what_is_seen_of_a_task_gives_its_score(kind, tmp_path):
    """Every type's evidence has the score that mteb computes, or, of k-means on other draws, one like it."""
    if kind == "Retrieval":
        words = ["cat", "dog", "car", "road"]
        for name, suffix in (("corpus", "document"), ("queries", "question")):
            rows = [{"_id": f"{name[0]}{i}", "text": f"{word} {suffix}"} for i, word in enumerate(words * 3)]
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(f"q{i}\tc{i}\t1\n" for i in range(12)))
        task = local_task(tmp_path)
    elif kind == "STS":
        rng = np.random.default_rng(0)
        task = local_task(write_csv(tmp_path / "sts.csv", "text1,text2,score", [(i, i * 7 % 11, rng.integers(5)) for i in range(60)]))
    else:
        task = local_task(labelled(tmp_path / "mine.csv"), kind)

    def vectors(texts, role):
        return np.stack([np.random.default_rng(sum(map(ord, text))).normal(size=8) for text in texts]).astype(np.float32)

    kept, model = {}, MtebModel("noise", "f" * 16, None, vectors)
    cell = scores.score(task, model, kept)
    found = kept[Row("noise", "f" * 16)][task.metadata.name]
    assert found.scores[0].mean() == pytest.approx(cell["score"], abs=0.15 if kind == "Clustering" else 1e-4)
    assert found.redrawn[0].std() > 0 and found.n == (12 if kind == "Retrieval" else 30 if kind == "Classification" else 60)
    unit = {"STS": "pairs", "Retrieval": "queries"}.get(kind, "texts")
    assert cell["rests_on"] == f"{found.n} {unit}"


def test_a_sample_of_mteb_is_said_to_be_one(tmp_path):
    """As its tasks on the published tracks take it; the labels are those of the sample."""
    task = local_task(labelled(tmp_path / "mine.csv", 90))
    task.max_fraction_of_documents_to_embed = 0.5
    model = MtebModel("first words", "f" * 16, None, lambda texts, role: np.array([[float(t[0] == c) for c in "tia"] for t in texts]))
    kept = {}
    cell = scores.score(task, model, kept)
    assert cell["rests_on"] == "45 of 90 texts" and "  45 of 90 texts" in scores.table([cell])
    (found,) = next(iter(kept.values())).values()
    assert found.n == 45 and found.scores == pytest.approx(1)


def test_mteb_is_left_as_it_was(tmp_path):
    import mteb.abstasks.clustering as clustering

    before, task = clustering._evaluate_clustering_bootstrapped, local_task(labelled(tmp_path / "mine.csv"))
    with pytest.raises(KeyError), observed(task):
        assert clustering._evaluate_clustering_bootstrapped is not before
        raise KeyError
    assert clustering._evaluate_clustering_bootstrapped is before


def test_a_task_with_many_rows_is_compared_on_some():
    found = evidence.of_clustering(*topics(200, 0.3), "same", most=50)
    assert found.n == 50 and found.scores[0].mean() > 0.5  # labels went with their vectors


def test_the_script_prints_differences_and_writes_them(llama, tmp_path, capsys):
    """One call: a grid of three, TF-IDF at its better setting, and side by side."""
    flags = ("--model", llama, "--prompt", "none", "--pooling", "mean", "last", "max", "--baselines", "tfidf", "side-by-side")
    run("--data", labelled(tmp_path / "mine.csv"), *flags[:5], "mean", "last", "position-mean", *flags[8:], "--out", tmp_path / "r.json")
    out = capsys.readouterr().out
    written = json.loads((tmp_path / "r.json").read_text())
    models = [cell["model"] for cell in written["results"]]
    assert len(models) == 5 and models[0].startswith("TF-IDF") and "+ TF-IDF" in models[-1] and "better_than" in written["results"][0]
    assert f"{models[0]}: chosen by these scores, TF-IDF" in out and "less llama, none, mean" in out
    assert f"the best, {models[0]}, less the second best, " in out or "the best, " in out
    assert "llama, the best of 3 settings on one half of the rows has " in out
    of_task = [d for d in written["differences"] if d["task"] == "mine"]
    assert {d["less"] for d in of_task} >= {"llama, none, mean"} and len(of_task) >= 4
    assert all(d["interval"][0] <= d["difference"] <= d["interval"][1] for d in written["differences"])
    assert all(d["verdict"] in ("better", "worse", "cannot tell") and d["sd_rows"] >= 0 <= d["sd_algorithm"] for d in of_task)
    assert {d["task"] for d in written["differences"]} == {"mine", "mean", "mean AMI"} and len(written["chosen_on_halves"]) == 1
