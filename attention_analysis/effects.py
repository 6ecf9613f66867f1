"""How a share of attention goes with V-measure over the sides of several runs: Spearman's rank correlation, with 95 % intervals.

Two questions are kept apart, since a yes to one is no yes to the other. Within runs: along the training of one run, base and kept
adapters, do share and V-measure rise together? Whatever training changes at all goes with V-measure in that sense, so the same is given
for adapters alone, without the base, and with the step held constant (partial rank correlation). Between runs: among finished runs of
one prompt, have those with the larger share the higher V-measure?

Sides of one run are not independent of each other: intervals come from redrawing runs, never sides.

Legend: R runs, P sides of a run, in the order of training, M models (sides of all runs, the base once), N texts, L layers, C categories.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from attention_analysis.stored import CATEGORIES, without_bos

if TYPE_CHECKING:
    from encoder import Encoder

REDRAWS = 2000
MIN_SIDES, MIN_RUNS = 3, 3  # sides of a run that make a correlation, runs that make an interval


class Effect(NamedTuple):
    """A rank correlation over `n_runs` runs; NaN where there are too few to tell."""

    value: float
    low: float  # bounds of the 95 % interval
    high: float
    n_runs: int


class RunSides(NamedTuple):
    """The sides of a run in the order of training, the base first."""

    steps: np.ndarray  # (P,)
    shares: np.ndarray  # (P,) of attention
    scores: np.ndarray  # (P,) V-measure


def v_measure(encoder: "Encoder", texts: list[str], labels: Sequence[str], role: str = "document") -> tuple[float, float]:
    """V-measure and AMI in 0..1 of k-means on the texts' vectors, mean over the seeds of evaluation/evidence.py."""
    from evaluation.evidence import SEEDS, cluster, clustering_scores

    vectors, codes = encoder.encode(texts, role), np.unique(labels, return_inverse=True)[1]
    once = np.ones((len(codes), 1), np.int64)
    return tuple(np.mean([clustering_scores(codes, cluster(vectors, codes, seed), once)[:, 0] for seed in range(SEEDS)], 0).tolist())


def sides_of_runs(models: Sequence[dict], shares: np.ndarray, scores: np.ndarray) -> list[RunSides]:
    """Each run's sides with the base before them. models: as in shares.json; shares and scores (M,)."""
    base = [i for i, model in enumerate(models) if model["run"] is None]
    out = []
    for run in dict.fromkeys(model["run"] for model in models if model["run"] is not None):
        members = [*base, *(i for i, model in enumerate(models) if model["run"] == run)]
        steps = np.array([np.nan if models[i]["step"] is None else models[i]["step"] for i in members], float)
        out.append(RunSides(steps, shares[members], scores[members]))
    return out


def content_effects(models: Sequence[dict], by_layer: np.ndarray, scores: np.ndarray) -> list[dict]:
    """How content words' share in the last layer goes with the scores (M,), with and without BOS. by_layer (M, N, L, C)."""
    content, rows = CATEGORIES.index("content"), []
    for bos in (True, False):
        shares = (by_layer if bos else without_bos(by_layer))[:, :, -1, content].mean(1, dtype=np.float64)
        runs = sides_of_runs(models, shares, scores)
        adapters = [RunSides(*(values[1:] for values in run)) for run in runs]
        of = {"within": within_runs(runs), "within_adapters": within_runs(adapters)}
        of |= {"within_given_step": within_runs(runs, given_step=True), "between": between_runs([runs])}
        rows.append({"category": "content", "bos": bos} | {name: as_json(effect) for name, effect in of.items()})
    return rows


def as_json(effect: Effect) -> dict:
    """NaN, which JSON has not, as None."""
    return {name: None if np.isnan(value) else value for name, value in effect._asdict().items()}


def lines(rows: list[dict]) -> list[str]:
    """What `content_effects` returned, in words."""
    names = {
        "within": "within runs, over base and adapters",
        "within_adapters": "within runs, over adapters alone",
        "within_given_step": "within runs, with the step held constant",
        "between": "between runs, over final adapters",
    }
    text = ["Spearman correlation of content words' share in the last layer with V-measure (95 % intervals over runs, rough below ten)"]
    for row in rows:
        for name, label in names.items():
            effect = Effect(*(np.nan if value is None else value for value in row[name].values()))
            text.append(f"  {label}, {'all tokens' if row['bos'] else 'BOS left out'}: {show(effect)}")
    return text


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation, ties at their mean rank; NaN where one of both does not vary."""
    from scipy.stats import rankdata

    return _correlation(rankdata(a), rankdata(b))


def partial_spearman(a: Sequence[float], b: Sequence[float], given: Sequence[float]) -> float:
    """Rank correlation of a and b with `given` held constant; NaN where that is not known, or nothing is left that varies."""
    if np.isnan(given).any():
        return np.nan
    ab, ac, bc = spearman(a, b), spearman(a, given), spearman(b, given)
    left = (1 - ac**2) * (1 - bc**2)
    return float((ab - ac * bc) / np.sqrt(left)) if left > 1e-9 else np.nan


def within_runs(runs: Sequence[RunSides], given_step: bool = False) -> Effect:
    """The mean over runs of the correlation among a run's sides; runs of fewer than MIN_SIDES sides are left out.

    given_step    with the step held constant
    """
    long = [run for run in runs if len(run.steps) >= MIN_SIDES]
    each = [partial_spearman(r.shares, r.scores, r.steps) if given_step else spearman(r.shares, r.scores) for r in long]
    each = np.array([value for value in each if np.isfinite(value)])
    return _over_redraws(len(each), lambda drawn: float(each[drawn].mean()))


def between_runs(groups: Sequence[Sequence[RunSides]]) -> Effect:
    """The correlation among the last sides of runs, mean over groups of runs that may be compared, such as those of one prompt."""
    groups = [group for group in groups if len(group) >= MIN_RUNS]
    ends = [np.array([(run.shares[-1], run.scores[-1]) for run in group]) for group in groups]
    of_group = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    number = np.concatenate([np.arange(len(group)) for group in groups]) if groups else np.zeros(0, int)

    def value(drawn: np.ndarray) -> float:
        each = [spearman(*ends[g][number[drawn[of_group[drawn] == g]]].T) for g in np.unique(of_group)]
        return float(np.mean(each))

    return _over_redraws(len(number), value, of_group)


def _over_redraws(n: int, value: Callable[[np.ndarray], float], groups: np.ndarray | None = None) -> Effect:
    """`value` of n runs by their numbers, with the interval of the middle 95 % of its redraws; each group is redrawn by itself.

    Redraws that are all alike, as of runs that all have a correlation of 1, say nothing of other runs: no interval.
    """
    if n < 1:
        return Effect(np.nan, np.nan, np.nan, n)
    if n < MIN_RUNS:
        return Effect(value(np.arange(n)), np.nan, np.nan, n)
    groups, rng = np.zeros(n, int) if groups is None else groups, np.random.default_rng(0)
    members = [np.flatnonzero(groups == g) for g in np.unique(groups)]
    redrawn = np.array([value(np.concatenate([rng.choice(some, len(some)) for some in members])) for _ in range(REDRAWS)])
    redrawn = redrawn[np.isfinite(redrawn)]  # the same run throughout has no correlation
    low, high = np.quantile(redrawn, [0.025, 0.975]) if len(set(redrawn.tolist())) > 1 else (np.nan, np.nan)
    return Effect(value(np.arange(n)), float(low), float(high), n)


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    norm = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm > 0 else np.nan


def show(effect: Effect) -> str:
    if np.isnan(effect.value):
        return "cannot be told"
    interval = "no interval" if np.isnan(effect.low) else f"{effect.low:+.2f} to {effect.high:+.2f}"
    return f"{effect.value:+.2f} ({interval}; {effect.n_runs} run{'s' * (effect.n_runs != 1)})"
