"""What hiding tokens costs, and how shares of attention go with V-measure."""

import numpy as np
import pytest
from conftest import TEXTS
from scipy.stats import spearmanr

from attention_analysis import interventions
from attention_analysis.effects import MIN_RUNS, RunSides, between_runs, partial_spearman, show, spearman, within_runs
from attention_analysis.interventions import costs, hidden_tokens, hides, lines
from encoder import Encoder
from encoder.attention_masks import hiding
from files.console import InputError

CATEGORIES = ["bos", "prefix", "prefix", "content", "function", "content", "punctuation", "suffix", "suffix"]


def test_hidden_are_the_tokens_of_a_category_but_never_the_last():
    assert np.flatnonzero(hidden_tokens(CATEGORIES, "content")).tolist() == [3, 5]
    assert np.flatnonzero(hidden_tokens(CATEGORIES, "suffix")).tolist() == [7]
    assert not hidden_tokens([], "content").any() and not hidden_tokens(["content"], "content").any()


def test_the_control_hides_as_many_others():
    draws = [hidden_tokens(CATEGORIES, "content", number) for number in range(200)]
    often = np.mean(draws, 0)
    assert {int(draw.sum()) for draw in draws} == {2}
    assert often[3:7].min() > 0.3 and not often[[0, 1, 2, 7, 8]].any()  # each token of the text, none of the prompt
    # of the prompt the same tokens in every text, and others than those of the category; BOS and the last token never
    assert {tuple(np.flatnonzero(hidden_tokens(CATEGORIES, "prefix", number))) for number in range(20)} == {(7,)}
    (of_bos,) = {tuple(np.flatnonzero(hidden_tokens(CATEGORIES, "bos", number))) for number in range(20)}
    assert len(of_bos) == 1 and of_bos[0] in (1, 2, 7)
    assert not hidden_tokens(["content", "content"], "bos", 0).any()


def by_kind(encoder: Encoder, texts: list[str]) -> list[list[str]]:
    """Made-up categories: of the text's tokens the first is a function word, the others are content."""
    out = []
    for ids, (start, end) in zip(*encoder.tokenize(texts)[:2], strict=True):
        names = ["prefix"] * start + ["function"] * min(1, end - start) + ["content"] * max(0, end - start - 1)
        out.append((names + ["suffix"] * (len(ids) - end))[: len(ids)])
    return out


def test_texts_are_known_by_their_tokens(llama):
    encoder = Encoder.load(llama, prompt="cluster", pooling="last")
    texts = [*TEXTS, TEXTS[0]]
    hide, n_hidden = hides(encoder, texts, by_kind(encoder, texts), "content")
    spans = encoder.tokenize(texts).spans
    for ids, span in zip(encoder.tokenize(texts).ids, spans, strict=True):
        assert np.flatnonzero(hide(ids, span)).tolist() == list(range(span[0] + 1, span[1]))
    assert n_hidden == np.mean([max(0, end - start - 1) for start, end in spans])
    masked = hiding(encoder, hide).encode(texts)
    assert np.abs(masked - encoder.encode(texts)).max() > 1e-3


def test_hiding_what_tells_labels_apart_costs_more_than_hiding_others(llama, monkeypatch):
    """Vectors that are made up: two directions, one a label, lost where content words are hidden."""
    encoder = Encoder.load(llama, prompt="cluster", pooling="last")
    texts, labels = [f"text {i}" for i in range(120)], np.arange(120) % 2
    rng = np.random.default_rng(0)
    clear = np.stack([labels, 1 - labels], 1) + 0.05 * rng.normal(size=(120, 2))
    lost = 0.05 * rng.normal(size=(120, 2))

    def encode(self, texts, role):
        hides_content = self.attention_mask and self.attention_mask.hides(CATEGORIES, (3, 7))[3]
        return (lost if hides_content else clear).astype(np.float32)

    def hide_all_of(encoder, texts, categories, category, role, *, control=False):
        return lambda ids, span: hidden_tokens(ids, "function" if control else category), 2.0

    monkeypatch.setattr(Encoder, "encode", encode)
    monkeypatch.setattr(interventions, "hides", hide_all_of)
    content, function = costs(encoder, texts, labels, [CATEGORIES] * 120, ["content", "function"])
    assert content.less_all.verdict == content.less_control.verdict == "worse" and content.less_all.value < -0.8
    assert content.control.verdict == function.less_all.verdict == "cannot tell"
    table = lines("made up", [content, function])
    assert table[0].split("  ")[0] == "made up" and "worse" in table[1] and "worse" not in table[2]


def test_what_cannot_be_hidden_is_refused(llama):
    encoder = Encoder.load(llama, prompt="cluster", pooling="last")
    with pytest.raises(InputError, match="--mask verbs: take one or more of bos, prefix"):
        costs(encoder, ["a"], ["x"], [["content"]], ["verbs"])
    for changes in ({"pooling": "mean"}, {"scope": "text"}):  # of the latter the text's last token is read, and would lose nothing
        with pytest.raises(InputError, match="reads others: take one of pooling last, scope all"):
            costs(encoder.with_contract(**changes), ["a"], ["x"], [["content"]], ["content"])
    with pytest.raises(InputError, match="take one prompt"):
        costs(Encoder.load(llama, prompt="cluster || classify", pooling="last"), ["a"], ["x"], [["content"]], ["content"])


# ------------------------------------------------------------------------------------------------------------- effects


def sides(shares, scores) -> RunSides:
    return RunSides(np.arange(len(shares)) * 10.0, np.array(shares, float), np.array(scores, float))


def test_rank_correlations_are_those_of_scipy():
    rng = np.random.default_rng(0)
    a, b, c = rng.integers(0, 6, (3, 30)).astype(float)
    assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)
    # with ranks of c taken out of both by least squares, what is left is correlated
    ranks = [np.argsort(np.argsort(x + 1e-6 * np.arange(30))).astype(float) for x in (a, b, c)]
    left = [x - np.polyval(np.polyfit(ranks[2], x, 1), ranks[2]) for x in ranks[:2]]
    assert partial_spearman(*ranks) == pytest.approx(np.corrcoef(*left)[0, 1])
    assert np.isnan(spearman([1, 1, 1], [1, 2, 3]))


def test_both_questions_are_answered_apart():
    """In each run share and score rise together; a run with larger shares has lower scores."""
    runs = [sides([i + 0.1, i + 0.2, i + 0.4], [-i + 0.1, -i + 0.3, -i + 0.5]) for i in range(6)]
    within, between = within_runs(runs), between_runs([runs])
    assert show(within) == "+1.00 (no interval; 6 runs)" and show(between) == "-1.00 (no interval; 6 runs)"
    assert np.isnan(within_runs(runs, given_step=True).value)  # the step explains everything


def test_an_effect_beyond_the_step_is_seen():
    rng = np.random.default_rng(0)
    runs = []
    for _ in range(8):
        swing = rng.normal(size=9)
        runs.append(sides(np.arange(9) + 3 * swing, np.arange(9) + 3 * swing + 0.3 * rng.normal(size=9)))
    assert within_runs(runs, given_step=True).low > 0.9


def test_runs_are_redrawn_and_not_sides():
    """Two kinds of runs, as unlike as can be: many sides do not make the interval narrow."""
    up, down = sides(range(9), range(9)), sides(range(9), range(9)[::-1])
    effect = within_runs([up, down, up, down])
    assert effect.value == 0 and effect.low == -1 and effect.high == 1


def test_groups_of_runs_are_not_mixed():
    """Of each prompt the larger share has the higher score; the prompts differ the other way round."""
    groups = [[sides([0, 0, share + 10 * g], [0, 0, share - 10 * g]) for share in range(5)] for g in range(2)]
    assert between_runs(groups).value == 1
    assert between_runs([groups[0][: MIN_RUNS - 1]]).n_runs == 0


def test_too_few_runs_have_no_interval():
    run = sides([1, 2, 3], [1, 2, 3])
    assert show(within_runs([run])) == "+1.00 (no interval; 1 run)"
    assert show(within_runs([])) == show(between_runs([[run]])) == "cannot be told"
    assert within_runs([sides([1, 2], [1, 2])]).n_runs == 0
