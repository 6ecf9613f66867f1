"""How a share of attention goes with V-measure over the sides of several runs: Spearman's rank correlation, with 95 % intervals.

Two questions are kept apart, since a yes to one is no yes to the other. Within runs: along the training of one run, base and kept
adapters, do share and V-measure rise together? Whatever changes steadily in training goes with V-measure in that sense, so the same
is given with the step held constant as well (partial rank correlation). Between runs: among finished runs of one prompt, have those with
the larger share the higher V-measure?

Sides of one run are not independent of each other: intervals come from redrawing runs, never sides.

Legend: R runs, P sides of a run, in the order of training.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

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


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation, ties at their mean rank; NaN where one of both does not vary."""
    from scipy.stats import rankdata

    return _correlation(rankdata(a), rankdata(b))


def partial_spearman(a: Sequence[float], b: Sequence[float], given: Sequence[float]) -> float:
    """Rank correlation of a and b with `given` held constant; NaN where nothing is left that varies."""
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
    """`value` of n runs by their numbers, with the interval of the middle 95 % of its redraws; each group is redrawn by itself."""
    if n < 1:
        return Effect(np.nan, np.nan, np.nan, n)
    if n < MIN_RUNS:
        return Effect(value(np.arange(n)), np.nan, np.nan, n)
    groups, rng = np.zeros(n, int) if groups is None else groups, np.random.default_rng(0)
    members = [np.flatnonzero(groups == g) for g in np.unique(groups)]
    redrawn = np.array([value(np.concatenate([rng.choice(some, len(some)) for some in members])) for _ in range(REDRAWS)])
    redrawn = redrawn[np.isfinite(redrawn)]  # the same run throughout has no correlation
    low, high = np.quantile(redrawn, [0.025, 0.975]) if len(redrawn) else (np.nan, np.nan)
    return Effect(value(np.arange(n)), float(low), float(high), n)


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    norm = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm > 0 else np.nan


def show(effect: Effect) -> str:
    if np.isnan(effect.value):
        return "cannot be told"
    interval = "no interval" if np.isnan(effect.low) else f"{effect.low:+.2f} to {effect.high:+.2f}"
    return f"{effect.value:+.2f} ({interval}; {effect.n_runs} run{"s" * (effect.n_runs != 1)})"
