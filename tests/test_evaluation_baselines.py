"""TF-IDF at its better setting, and beside a model's vectors."""

import numpy as np
import pytest

from evaluation import baselines, scores
from evaluation.differences import Row
from evaluation.mteb_model import MtebModel
from files.console import InputError

TEXTS = ["the cat and the dog", "a cat and a dog", "the bank of the river", "a bank by the river", "interest rates"]


def test_stop_words_count_in_one_setting_only():
    every, without = (baselines.tfidf(TEXTS[:4] * 3, setting) for setting in baselines.SETTINGS)
    assert without[0] @ without[1] == pytest.approx(1, abs=1e-5) and every[0] @ every[1] < 0.99
    rare = ["one two", "three four", "five six"]  # no word twice: the setting would leave none
    np.testing.assert_array_equal(baselines.tfidf(rare, "TF-IDF without stop words"), baselines.tfidf(rare))
    for texts in (["1", "2"], ["same", "same"]):
        for setting in baselines.SETTINGS:
            with pytest.raises(InputError, match="needs two different words of two letters"):
                baselines.tfidf(texts, setting)
    one_left = ["the bank", "a bank", "by the bank"]  # without stop words
    np.testing.assert_array_equal(baselines.tfidf(one_left, "TF-IDF without stop words"), baselines.tfidf(one_left))


def test_side_by_side_both_have_the_same_say():
    large = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32) * 1000 + 5000
    row = MtebModel("mine", "f" * 16, None, lambda texts, role: large, "float32 on cpu")
    rows = baselines.side_by_side(row)
    assert [r.label for r in rows] == ["mine + TF-IDF", "mine + TF-IDF without stop words"] and len({r.better_of for r in rows}) == 1
    both = rows[0].encode_texts(TEXTS, "document")
    assert np.linalg.norm(both[:, :3], axis=1) == pytest.approx(1) and np.linalg.norm(both[:, 3:], axis=1) == pytest.approx(1)
    centred = large - large.mean(0)
    np.testing.assert_allclose(both[:, :3], centred / np.linalg.norm(centred, axis=1, keepdims=True), atol=1e-5)


def cell(model: str, task: str, score: float) -> dict:
    return {"model": model, "fingerprint": model, "task": task, "score": score}


def test_the_setting_with_the_better_mean_stays_and_the_other_is_named():
    kept = scores.Scores()
    kept.cells = [
        cell("other", "a", 0.9),
        *(cell(m, t, s) for m, t, s in (("x", "a", 0.6), ("y", "a", 0.3), ("x", "b", 0.2), ("y", "b", 0.7))),
    ]
    kept.evidence = {Row("x", "x"): {}, Row("y", "y"): {}, Row("other", "other"): {}}
    scores.keep_better(kept, 1, {"x", "y"})
    assert [c["model"] for c in kept.cells] == ["other", "y", "y"] and [row.label for row in kept.evidence] == ["y", "other"]
    assert kept.cells[1]["better_than"] == {"x": pytest.approx(0.4)}
    scores.keep_better(kept, 0, {"other"})
    assert len(kept.cells) == 3 and "better_than" not in kept.cells[0]
