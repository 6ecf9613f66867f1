"""Whether the intervals of evaluate.py keep their word: how often settings without a difference are called different, and with one.

    python bench/bench_intervals.py --draws 200 --jobs 2      # minutes an entry on two cores; --only NAME ... for some

Texts are drawn as labels, and two settings as vectors: a centre of the label, what both settings share of a text, and noise of each
setting's own. With as much noise in both there is no difference between them, whatever one draw of texts shows; with more in one there
is. Every draw is new texts, new vectors and new centres, and goes through the same functions as a row of the table. So the share of draws
that are called different should be 5 %, and the standard deviation of the differences that which the intervals state.

    clustering    texts / labels; "skewed": the i-th label is 1/i as frequent as the first
    power         the same with more noise in one setting; the difference is the mean of all draws
    best of 6     six settings without a difference: how often the best is called better than the second best
    mean of T     differences of T tasks, drawn as normal numbers about a mean of 0 (from 5 tasks on, with a spread among tasks)
    retrieval, STS    scores of queries, and similarities of pairs, with and without rows in common

Ends with a JSON line.
"""

import argparse
import itertools
import json
import os
import platform
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from encoder.nearest import unit
from evaluation import differences, evidence
from evaluation.differences import Difference, Row


class Clustering(NamedTuple):
    """How texts are drawn, and the noise of two settings."""

    texts: int
    labels: int
    centres: float = 0.9  # standard deviation of the labels' centres, in that of the texts of a label
    noise: float = 0.5
    other_noise: float = 0.5
    skewed: bool = False
    settings: int = 2


ENTRIES = {
    "clustering, 300 / 5": Clustering(300, 5, 1.0, 1.0, 1.0),
    "clustering, 300 / 10": Clustering(300, 10, 1.2),
    "clustering, 500 / 10, skewed": Clustering(500, 10, skewed=True),
    "clustering, 500 / 25": Clustering(500, 25),
    "clustering, 1000 / 10": Clustering(1000, 10, 0.8),
    "power, 500 / 10": Clustering(500, 10, 0.9, 0.5, 0.7),
    "power, 1000 / 10": Clustering(1000, 10, 0.8, 0.5, 0.7),
    "best of 6, 300 / 5": Clustering(300, 5, 1.0, 1.0, 1.0, settings=6),
}
CHEAP = ("mean of 2", "mean of 5", "mean of 8", "mean of 12", "retrieval, 100 queries", "STS, 200 pairs")
DIMENSIONS = 16


def draw(entry: Clustering, rng: np.random.Generator) -> list[evidence.Evidence]:
    """Evidence of every setting on one draw of texts."""
    frequent = 1 / np.arange(1, entry.labels + 1) if entry.skewed else np.ones(entry.labels)
    labels = rng.choice(entry.labels, size=entry.texts, p=frequent / frequent.sum())
    shared = rng.normal(size=(entry.labels, DIMENSIONS))[labels] * entry.centres + rng.normal(size=(entry.texts, DIMENSIONS))
    noises = [entry.noise] * (entry.settings - 1) + [entry.other_noise]
    return [evidence.of_clustering(unit(shared + noise * rng.normal(size=shared.shape)), labels, "rows") for noise in noises]


def clustering(entry: Clustering, seed: int) -> Difference:
    warnings.simplefilter("ignore")
    found = draw(entry, np.random.default_rng([seed, entry.texts, entry.labels, entry.settings]))
    if entry.settings > 2:
        table = {Row(f"{i}", f"{i}"): {"task": of_setting} for i, of_setting in enumerate(found)}
        best, second = differences.best_two(table, ["task"])
        return differences.difference(table[best]["task"], table[second]["task"])
    return differences.difference(*found)


def cheap(name: str, seed: int) -> Difference:
    """Differences that cost next to nothing: means over tasks, queries, pairs."""
    rng, n = np.random.default_rng(seed), int(name.split()[2 if name.startswith("mean") else 1])
    if name.startswith("mean"):
        deviations = rng.uniform(0.005, 0.02, size=(n, 2))
        effects = rng.normal(size=n) * 0.02 * (n >= differences.MANY_TASKS)
        values = effects + np.hypot(*deviations.T) * rng.normal(size=n)
        return differences.over_tasks([differences.interval(v, *d) for v, d in zip(values.tolist(), deviations, strict=True)])
    shared = rng.normal(size=n)
    if name.startswith("retrieval"):
        settings = [np.clip(0.5 + 0.3 * (shared + rng.normal(size=n)), 0, 1)[None] for _ in range(2)]
        return differences.difference(*(evidence.of_means(values, "rows") for values in settings))
    gold = np.round(2.5 + shared)
    return differences.difference(*(evidence.of_correlation(shared + rng.normal(size=n), gold, "rows") for _ in range(2)))


def measure(name: str, draws: int, pool: ProcessPoolExecutor) -> dict:
    """One line of the table."""
    began = time.perf_counter()
    if name in ENTRIES:
        found = list(pool.map(clustering, itertools.repeat(ENTRIES[name], draws), range(draws)))
    else:
        draws *= 5
        found = list(pool.map(cheap, itertools.repeat(name, draws), range(draws), chunksize=20))
    value, rows, algorithm = (np.array([getattr(d, field) for d in found]) for field in ("value", "rows", "algorithm"))
    called = float(np.mean([d.verdict != "cannot tell" for d in found]))
    return {
        "entry": name,
        "draws": draws,
        "difference": round(100 * float(value.mean()), 2),
        "sd": round(100 * float(value.std(ddof=1)), 2),
        "sd_rows": round(100 * float(np.sqrt((rows**2).mean())), 2),
        "sd_algorithm": round(100 * float(np.sqrt((algorithm**2).mean())), 2),
        "called": round(called, 3),
        "standard_error": round(float(np.sqrt(called * (1 - called) / draws)), 3),
        "seconds": round(time.perf_counter() - began),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--draws", type=int, default=200, help="of each entry, five times as many of those that cost little (default 200)")
    parser.add_argument("--only", nargs="+", choices=[*ENTRIES, *CHEAP], metavar="NAME", help="entries (default: all)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default 2)")
    args = parser.parse_args()
    print("| draws of | n | difference x 100 | its spread | stated: rows | stated: seeds | called different |")
    print("|---|---|---|---|---|---|---|")
    results = []
    with ProcessPoolExecutor(args.jobs) as pool:
        for name in args.only or [*ENTRIES, *CHEAP]:
            results.append(row := measure(name, args.draws, pool))
            share = f"{100 * row['called']:.1f} % ± {100 * row['standard_error']:.1f}"
            cells = (name, row["draws"], row["difference"], row["sd"], row["sd_rows"], row["sd_algorithm"], share)
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
    versions = {name: version(name) for name in ("numpy", "scipy", "scikit-learn")} | {"python": platform.python_version()}
    print(json.dumps({"results": results, "versions": versions}))


if __name__ == "__main__":
    main()
