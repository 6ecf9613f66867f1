"""Intervals over texts and over runs, against cases that can be worked out by hand."""

import numpy as np
import pytest

from attention_analysis.intervals import drawn_runs, of_sides, pairs_of_sides, resampled_means, share_rows
from attention_analysis.stored import CATEGORIES, without_bos

BASE = {"side": "base", "run": None}


def model(side: str, run: str) -> dict:
    return {"side": side, "run": run}


def shares(content: np.ndarray, bos: float = 0.5) -> np.ndarray:
    """(N,) -> (N, 1, C): a share of BOS, this one of content, the rest the prefix's."""
    out = np.zeros((len(content), 1, len(CATEGORIES)), np.float32)
    out[:, 0, CATEGORIES.index("bos")], out[:, 0, CATEGORIES.index("content")] = bos, content
    out[:, 0, CATEGORIES.index("prefix")] = 1 - bos - content
    return out


def find(rows: list[dict], **wanted) -> dict:
    (row,) = (row for row in rows if wanted.items() <= row.items())
    return row


def test_without_bos_the_others_sum_to_one():
    np.testing.assert_allclose(without_bos(np.array([0.5, 0.1, 0, 0.3, 0, 0.1, 0])), [0, 0.2, 0, 0.6, 0, 0.2, 0])
    assert without_bos(np.array([1.0, 0, 0, 0, 0, 0, 0])).tolist() == [0] * 7  # and not NaN


def test_the_interval_of_a_mean_is_that_of_its_standard_error():
    values = np.random.default_rng(0).random((1, 400, 1))
    means = resampled_means(values, redraws=4000)[0, :, 0]
    assert means[0] == pytest.approx(values.mean())
    assert means[1:].std() == pytest.approx(values.std() / 20, rel=0.05)


def test_models_are_paired_text_by_text():
    """A difference that is the same in every text has no interval, however much the texts differ."""
    content = np.random.default_rng(0).random(200) * 0.3
    rows, differences = share_rows(np.stack([shares(content), shares(content + 0.1)]), [BASE, model("adapter", "a")])
    row = find(rows, side="base", layer=1, category="content", bos=True)
    assert row["high"] - row["low"] > 0.01 and row["n_seeds"] == 0
    row = find(differences, side="adapter", less="base", layer=1, category="content", bos=True)
    assert (row["mean"], row["low"], row["high"], row["n_seeds"]) == (*[pytest.approx(0.1, abs=1e-5)] * 3, 1)
    row = find(differences, side="adapter", less="base", layer="all", category="text", bos=False)
    assert row["mean"] == pytest.approx(0.2, abs=1e-5)  # half of the attention is on BOS


def test_several_runs_widen_the_interval_by_their_own_spread():
    """Texts that are all alike: what is left is the spread of five runs, whose standard error it must give."""
    of_runs = np.array([0.1, 0.14, 0.2, 0.22, 0.3])
    stacked = np.stack([shares(np.zeros(50)), *(shares(np.full(50, x)) for x in of_runs)])
    models = [BASE, *(model("adapter", str(i)) for i in range(5))]
    means = of_sides(resampled_means(stacked), models)["adapter"][:, 0, CATEGORIES.index("content")]
    assert means[0] == pytest.approx(of_runs.mean())
    assert means[1:].std() == pytest.approx(of_runs.std(ddof=1) / np.sqrt(5), rel=0.06)
    assert drawn_runs(1).tolist() == [[1]] * 1001 and np.allclose(drawn_runs(4).sum(1), 1)


def test_runs_are_paired_between_sides():
    """Each run ends as much higher as it was on the way: the difference does not depend on which runs are drawn."""
    sides = [("step 2", 0.0), ("adapter", 0.05)]
    of_runs = [shares(np.full(50, x + more)) for side, more in sides for x in (0.1, 0.2, 0.4)]
    models = [BASE, *(model(side, run) for side, _ in sides for run in "abc")]
    models[4:] = models[:3:-1]  # in another order, as files may have them
    stacked = np.stack([shares(np.zeros(50)), *of_runs[:3], *of_runs[:2:-1]])
    _, differences = share_rows(stacked, models)
    row = find(differences, side="adapter", less="step 2", layer=1, category="content", bos=True)
    assert (row["mean"], row["low"], row["high"]) == (*[pytest.approx(0.05, abs=1e-5)] * 3,)
    row = find(differences, side="adapter", less="base", layer=1, category="content", bos=True)
    assert row["high"] - row["low"] > 0.1


def test_which_sides_are_compared():
    assert pairs_of_sides(["base", "step 2", "adapter"]) == [("step 2", "base"), ("adapter", "base"), ("adapter", "step 2")]
    assert pairs_of_sides(["base"]) == []
