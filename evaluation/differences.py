"""Which rows of the table differ, and by how much: differences of scores on the same rows of a task, with 95 % intervals.

A difference has two standard deviations, kept apart: the rows' (of clusters, the larger of that with the clusters as they are and that
with k-means run again on halves) and the algorithm's (`evidence.py`). Its interval is normal and holds both, and a row is called better
or worse where it leaves zero out. It is centred on the difference itself and not on that of the redraws: rows that are drawn twice raise
every V-measure a little. bench/bench_intervals.py shows how often rows are called different that are not.

Every interval is at 95 % by itself: of twenty rows that do not differ from the first, one will seem to. For the best against the second
best that is no fault, as the first two of many equal rows are nearer to each other than any two are (Gutmann and Maymin 1987, Is the
selected population the best?). The best row's own score is flattering all the same, since luck has helped it to be best:
`chosen_on_halves` chooses on one half of the rows and scores on the other.
"""

import itertools
from collections import Counter, defaultdict
from typing import NamedTuple

import numpy as np

from evaluation.evidence import Evidence

MANY_TASKS = 5  # from here on the mean is of tasks like these: fewer cannot stand for others
COLUMNS = 3  # tasks that are shown one by one


class Row(NamedTuple):
    """A row of the table, and what tells it apart."""

    label: str
    fingerprint: str
    grid: str | None = None  # rows with the same are settings of one untuned base; None for runs and baselines
    baseline: bool = False


class Difference(NamedTuple):
    """A row of the table less another, in scores of 0..1."""

    value: float
    low: float  # bounds of the 95 % interval
    high: float
    rows: float  # standard deviations
    algorithm: float

    @property
    def verdict(self) -> str:
        return "better" if self.low > 0 else "worse" if self.high < 0 else "cannot tell"


Table = dict[Row, dict[str, Evidence]]  # task -> evidence, of the tasks that have one


def difference(one: Evidence, other: Evidence, measure: int = 0) -> Difference | None:
    """One row of the table less another on one task; None where they were not scored on the same rows, or on no two of them.

    measure    0 is the table's; 1, of clustering, is AMI
    """
    if one.rows != other.rows or one.n < 2:
        return None
    seeds = one.scores[measure] - other.scores[measure]
    redrawn = one.redrawn[measure].mean(0) - other.redrawn[measure].mean(0)
    rows = np.var(redrawn, ddof=1)
    if one.halves is not None:
        halves = one.halves[measure] - other.halves[measure]  # (splits, 2 halves, 2 seeds)
        unlike = (halves[:, 0] - halves[:, 1]) / 2  # half the distance of two halves varies as much as a mean of both
        rows = max(rows, (unlike[:, 0] * unlike[:, 1]).mean())
    algorithm = float(np.std(seeds, ddof=1) / np.sqrt(len(seeds))) if len(seeds) > 1 else 0.0
    return interval(float(seeds.mean()), float(np.sqrt(rows)), algorithm)


def interval(value: float, rows: float, algorithm: float) -> Difference:
    half = 1.96 * float(np.hypot(rows, algorithm))
    return Difference(value, value - half, value + half, rows, algorithm)


def over_tasks(of_task: list[Difference | None]) -> Difference | None:
    """The mean over tasks; None where one is missing.

    Of fewer than MANY_TASKS tasks it is that of these tasks. Of more, it is that of tasks like these: Student's interval over tasks,
    each of whose differences varies with its rows and seeds already, and never narrower than these make it. (Drawing tasks and then
    their rows counts the rows twice: of five tasks without a difference 1 % were called different.)
    """
    from scipy.stats import t

    if None in of_task or not of_task:
        return None
    values, rows, algorithm = (np.array([getattr(d, field) for d in of_task]) for field in ("value", "rows", "algorithm"))
    n = len(values)
    value, *within = float(values.mean()), *(float(np.sqrt((deviations**2).sum()) / n) for deviations in (rows, algorithm))
    if n < MANY_TASKS:
        return interval(value, *within)
    half = float(t.ppf(0.975, n - 1) * max(values.std(ddof=1) / np.sqrt(n), np.hypot(*within)))
    return Difference(value, value - half, value + half, *within)


def compared(one: dict[str, Evidence], other: dict[str, Evidence], tasks: list[str]) -> dict[str, Difference | None]:
    """Differences by task; under "mean" and "mean AMI" those over all of `tasks`."""
    both = {task: (one[task], other[task]) if task in one and task in other else None for task in tasks}
    found = {task: pair and difference(*pair) for task, pair in both.items()}
    ami = [difference(*pair, 1) if pair and len(pair[0].scores) > 1 else None for pair in both.values()]
    return found | {"mean": over_tasks(list(found.values())), "mean AMI": over_tasks(ami)}


def with_evidence(table: Table, tasks: list[str]) -> list[str]:
    return [task for task in tasks if any(task in cells for cells in table.values())]


def reference(table: Table) -> Row:
    """The row that the others are compared with: the first that is no baseline."""
    return next((row for row in table if not row.baseline), next(iter(table)))


def best_two(table: Table, tasks: list[str]) -> tuple[Row, Row] | None:
    """The best row and the second best by the mean over tasks, among those that have evidence on all."""
    means = {row: np.mean([cells[task].scores[0].mean() for task in tasks]) for row, cells in table.items() if set(tasks) <= set(cells)}
    return tuple(sorted(means, key=means.get, reverse=True)[:2]) if len(means) > 1 else None


def pairs_worth_comparing(table: Table, tasks: list[str]) -> list[tuple[Row, Row]]:
    """Every row with the reference, and the best row with the second best where that is another pair."""
    first = reference(table)
    pairs = [(row, first) for row in table if row != first]
    best = best_two(table, tasks)
    return pairs + ([best] if best and set(best) not in map(set, pairs) else [])


def chosen_on_halves(table: Table, tasks: list[str]) -> list[dict]:
    """For each grid of more than two settings: the best on one half of the rows, scored on the other half, over all splits.

    Both halves have as many rows, on which k-means ran by itself, so that the scores can be compared with each other, though not with
    those of all rows. "chosen" counts which setting won how often, "score" is the winner's on the other half, "score_where_chosen" on
    its own, "first" that of the grid's first setting, and "settings" how many there are.
    """
    grids = defaultdict(list)
    for row, cells in table.items():
        if row.grid and all(task in cells and cells[task].halves is not None for task in tasks):
            grids[row.grid].append(row)
    results = []
    for grid, rows in grids.items():
        if len(rows) < 3 or not tasks:
            continue
        scores = np.array([np.mean([table[row][task].halves[0].mean(2) for task in tasks], axis=0) for row in rows])  # (rows, splits, 2)
        best = scores.argmax(0)
        other, splits = scores[:, :, ::-1], np.arange(scores.shape[1])[:, None]
        result = {
            "grid": grid,
            "settings": len(rows),
            "chosen": {rows[i].label: count for i, count in Counter(best.ravel().tolist()).most_common()},
            "score": float(other[best, splits, [0, 1]].mean()),
            "score_where_chosen": float(scores.max(0).mean()),
            "first": float(scores[0].mean()),
        }
        results.append(result)
    return results


# -------------------------------------------------------------------------------------------------------------- shown


def show(found: Difference | None, verdict: bool = True) -> str:
    if found is None:
        return "no interval"
    value, low, high = (100 * number for number in found[:3])
    return f"{value:+.1f} ({low:.1f} to {high:.1f})" + f" {found.verdict}" * verdict


def aligned(lines: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def lines(table: Table, tasks: list[str]) -> list[str]:
    """What is printed below the table; [] where there is nothing to compare."""
    tasks = with_evidence(table, tasks)
    if len(table) < 2 or not tasks:
        return []
    first = reference(table)
    found = {pair: compared(table[pair[0]], table[pair[1]], tasks) for pair in pairs_worth_comparing(table, tasks)}
    shown = [*(tasks if len(tasks) <= COLUMNS else []), *(["mean", "mean AMI"] if len(tasks) > 1 else ["mean AMI"])]
    shown = [column for column in shown if column != "mean AMI" or any(d[column] for d in found.values())]
    head = [f"less {first.label}", *("AMI" if column == "mean AMI" and len(tasks) == 1 else column for column in shown)]
    rows = [[row.label, *(show(d[c], c != "mean AMI") for c in shown)] for (row, other), d in found.items() if other == first]
    text = aligned([head, *rows])
    text.insert(1, "-" * max(map(len, text)))
    return [*text, *remarks(table, tasks)]


def remarks(table: Table, tasks: list[str]) -> list[str]:
    """What is said of the best row, and how differences are to be read; [] where there is nothing to compare."""
    tasks = with_evidence(table, tasks)
    if len(table) < 2 or not tasks:
        return []
    found = {pair: compared(table[pair[0]], table[pair[1]], tasks) for pair in pairs_worth_comparing(table, tasks)}
    best, text = best_two(table, tasks), []
    if best:
        d = found.get(best) or compared(table[best[0]], table[best[1]], tasks)
        text.append(f"the best, {best[0].label}, less the second best, {best[1].label}: {show(d['mean'])}{spread(d['mean'])}")
    return [*text, *notes(list(found.values()), tasks), *map(show_choice, chosen_on_halves(table, tasks))]


def spread(found: Difference | None) -> str:
    """The two uncertainties apart."""
    return f"; standard deviation {100 * found.rows:.1f} from rows, {100 * found.algorithm:.1f} from seeds" if found else ""


def notes(found: list[dict[str, Difference | None]], tasks: list[str]) -> list[str]:
    """How the differences are to be read."""
    every = [d for pair in found for task, d in pair.items() if d and task in tasks]
    if not every:
        return []
    ranges = (f"{100 * min(values):.1f} to {100 * max(values):.1f}" for values in zip(*((d.rows, d.algorithm) for d in every), strict=True))
    text = "differences on the same rows, with 95 % intervals; standard deviation {} from the rows, {} from seeds, by task".format(*ranges)
    of = "of these tasks alone" if len(tasks) < MANY_TASKS else "of tasks like these"
    return [text + (f"; mean: {of}" if len(tasks) > 1 else "")]


def show_choice(choice: dict) -> str:
    chosen = ", ".join(f"{label} ({count})" for label, count in itertools.islice(choice["chosen"].items(), 3))
    score, where_chosen, first = (f"{100 * choice[field]:.1f}" for field in ("score", "score_where_chosen", "first"))
    return (
        f"{choice['grid']}, the best of {choice['settings']} settings on one half of the rows has {score} on the other half, "
        f"{where_chosen} on its own, the first setting {first}; chosen: {chosen}"
    )


def as_json(table: Table, tasks: list[str]) -> dict:
    """Everything that was compared, for --out."""
    tasks = with_evidence(table, tasks)
    if len(table) < 2:
        return {"differences": [], "chosen_on_halves": []}
    differences = [
        {"model": row.label, "fingerprint": row.fingerprint, "less": other.label, "less_fingerprint": other.fingerprint, "task": task}
        | {"difference": d.value, "interval": [d.low, d.high], "sd_rows": d.rows, "sd_algorithm": d.algorithm, "verdict": d.verdict}
        for row, other in pairs_worth_comparing(table, tasks)
        for task, d in compared(table[row], table[other], tasks).items()
        if d
    ]
    return {"differences": differences, "chosen_on_halves": chosen_on_halves(table, tasks)}
