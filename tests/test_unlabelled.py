"""The comparison of models on texts without labels."""

import json
import random

import numpy as np
import pytest
from conftest import make_run

import evaluate
from files.console import InputError
from tasks import unlabelled

TOPICS = [[f"{name}{chr(97 + i)}" for i in range(24)] for name in ("kitchen", "garden", "music")]


def topic_texts(n: int = 100) -> tuple[list[str], np.ndarray]:
    """n texts of five words of each topic, and the number of each text's topic."""
    chance = random.Random(0)
    texts = [" ".join(chance.sample(words, 5)) + f" t{topic}n{i}" for topic, words in enumerate(TOPICS) for i in range(n)]
    return texts, np.repeat(np.arange(3), n)


def vectors_of(split: unlabelled.HiddenWords, topics: np.ndarray, noise: float, seed: int = 0) -> np.ndarray:
    """Vectors that know the topic of a text, as far as noise allows."""
    return np.eye(3)[topics[split.numbers]] + noise * np.random.default_rng(seed).normal(size=(len(split.numbers), 3))


def test_no_hidden_word_is_seen_and_every_text_has_words_of_both_kinds():
    texts, _ = topic_texts()
    for split in unlabelled.hide_words(texts):
        assert len(split.texts) == split.hidden.shape[0] == len(split.numbers) > 200
        for text, number, row in zip(split.texts, split.numbers, split.hidden, strict=True):
            seen, all_words = set(text.split()), set(texts[number].split())
            assert seen < all_words and row.nnz == len(all_words - seen)


def test_scores_by_hand(monkeypatch):
    """Two clusters, of texts 0, 1 and of 2, 3. Hidden: a, a, b, c. Of six couples one is alike."""
    from scipy.sparse import csr_matrix

    monkeypatch.setattr("sklearn.cluster.MiniBatchKMeans.fit_predict", lambda self, vectors: np.array([0, 0, 1, 1]))
    hidden = csr_matrix(np.eye(3)[[0, 0, 1, 2]])
    split = unlabelled.HiddenWords(["x"] * 4, hidden, np.arange(4))
    assert unlabelled.scores(np.eye(4), split) == pytest.approx([6, 6, 0, 0])


def test_the_model_that_knows_the_topics_is_better_and_chance_scores_one():
    texts, topics = topic_texts()
    splits = unlabelled.hide_words(texts)
    good, bad, again = (
        [unlabelled.scores(vectors_of(s, topics, noise, seed), s) for s in splits] for noise, seed in ((0.3, 0), (50, 0), (50, 1))
    )
    assert np.mean(bad[0]) == pytest.approx(1, abs=0.15) and np.mean(good[0]) > 1.5
    better, worse, alike = (
        unlabelled.compare(bad, good, splits),
        unlabelled.compare(good, bad, splits),
        unlabelled.compare(bad, again, splits),
    )
    assert (better.verdict, worse.verdict, alike.verdict) == ("better", "worse", "cannot tell")
    assert better.low < better.ratio < better.high and better.ratio == pytest.approx(1 / worse.ratio)
    assert unlabelled.compare(good, good, splits)[:3] == (1, 1, 1)


def test_letters_of_scripts_without_spaces_are_words():
    letters, chance = [[chr(start + i) for i in range(24)] for start in (0x4E00, 0x5E00, 0x6E00)], random.Random(0)
    texts = ["".join(chance.sample(topic, 5)) + f"v{i}，" for topic in letters for i in range(100)]
    splits = unlabelled.hide_words(texts)
    seen = {word for text in splits[0].texts for word in text.split()}
    assert seen <= {*letters[0], *letters[1], *letters[2], *(f"v{i}" for i in range(100))}
    good, bad = ([unlabelled.scores(vectors_of(s, np.repeat(np.arange(3), 100), noise), s) for s in splits] for noise in (0.3, 50))
    assert unlabelled.compare(bad, good, splits).verdict == "better"


def test_few_texts_or_none_that_share_words_cannot_be_compared():
    assert unlabelled.hide_words(topic_texts(20)[0]) == []
    assert unlabelled.hide_words([f"word{i} other{i}" for i in range(500)]) == []


def test_evaluate_compares_a_run_with_its_base(llama, tmp_path, capsys):
    make_run(llama, tmp_path / "run")
    (tmp_path / "texts.txt").write_text("\n".join(topic_texts()[0]))
    flags = [
        "--model",
        str(tmp_path / "run"),
        "--baselines",
        "tfidf",
        "--texts",
        str(tmp_path / "texts.txt"),
        "--out",
        str(tmp_path / "out.json"),
    ]
    evaluate.main(evaluate.build_parser().parse_args(flags))
    out = capsys.readouterr().out
    assert "untuned, same contract" in out and "TF-IDF" in out and out.count("%") >= 1 and "advice" in out
    rows = json.loads((tmp_path / "out.json").read_text())
    assert len(rows) == 3 and "verdict" not in rows[0] and rows[1]["verdict"] in ("better", "worse", "cannot tell")
    (tmp_path / "few.txt").write_text("\n".join(topic_texts(20)[0]))
    with pytest.raises(InputError, match=r"few\.txt: fewer than 100 of 60 texts"):
        evaluate.main(evaluate.build_parser().parse_args(["--model", llama, "--texts", str(tmp_path / "few.txt")]))
    with pytest.raises(InputError, match="--texts compares models without labels"):
        evaluate.main(evaluate.build_parser().parse_args(["--model", llama, "--texts", str(tmp_path / "few.txt"), "--bundled"]))
