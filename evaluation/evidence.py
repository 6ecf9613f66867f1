"""What is kept of a cell of the table, so that two rows can be compared on the same texts: the score under other draws of the rows.

Two uncertainties are kept apart. The algorithm's: k-means from several seeds, which all rows of the table share; of classification,
the draws of training texts. The rows': clusters stay as they are and the rows are redrawn, the same in every row of the table. Other
rows would also have given other clusters, and that no redraw of finished clusters shows: k-means therefore runs again on halves of the
rows as well. Halves, because rows drawn with replacement are copies of each other, and copies are clustered together; from two seeds, as
two runs have in common what comes from the rows, and not what comes from the seed.

Legend: N rows, R redraws, S seeds (1 where nothing is random), H splits into halves, M measures (V-measure and AMI, or one).
"""

import functools
from typing import NamedTuple

import numpy as np

SEEDS, REDRAWS, SPLITS = 10, 1000, 6
MIN_START = 500  # rows that k-means draws its first centres from, at least
MAX_ROWS = 5000  # of a task that are compared; more would make the interval narrower and k-means long
MIN_OF_SET = 1000  # of each set where a task has many: they share MAX_ROWS


class Evidence(NamedTuple):
    """Scores of one row of the table on one task, in 0..1."""

    rows: str  # tells whether two rows of the table had the same rows of the task, in the same order
    n: int  # of these
    scores: np.ndarray  # (M, S)
    redrawn: np.ndarray  # (M, S, R)
    halves: np.ndarray | None  # (M, H, 2, 2) both halves of a split, refit from two seeds; None where nothing is fitted


@functools.lru_cache(maxsize=4)
def redraws(n: int) -> np.ndarray:
    """How often each of N rows is drawn in each redraw (N, R); the same for all rows of the table."""
    return np.ascontiguousarray(np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=REDRAWS).T)


def halves(n: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Splits of N rows into two halves at random; the same for all rows of the table."""
    rng = np.random.default_rng(1)
    return [tuple(np.sort(half) for half in np.array_split(rng.permutation(n), 2)) for _ in range(SPLITS)]


def entropy(codes: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Entropy in nats (R,) of the partition of N rows given by `codes` (N,), `drawn` (N, R) saying how often each row is drawn."""
    from scipy.sparse import csr_array
    from scipy.special import xlogy

    n, (cells, cell) = len(codes), np.unique(codes, return_inverse=True)
    sizes = csr_array((np.ones(n, drawn.dtype), (cell, np.arange(n))), shape=(len(cells), n)) @ drawn  # (cells, R)
    total = drawn.sum(0)
    return np.log(total) - xlogy(sizes, sizes).sum(0) / total


def clustering_scores(labels: np.ndarray, clusters: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """V-measure and adjusted mutual information (2, R) of N rows drawn `drawn` (N, R) times, as scikit-learn computes them.

    The mutual information that chance alone would give, which AMI takes off, is that of the N rows each drawn once: it hardly changes
    from one redraw to the next, and would take most of the time.
    """
    from sklearn.metrics.cluster import contingency_matrix, expected_mutual_information

    labels, clusters = (np.unique(values, return_inverse=True)[1] for values in (labels, clusters))
    of_labels, of_clusters = entropy(labels, drawn), entropy(clusters, drawn)
    mutual = of_labels + of_clusters - entropy(labels * (clusters.max() + 1) + clusters, drawn)
    mean = (of_labels + of_clusters) / 2
    by_chance = expected_mutual_information(contingency_matrix(labels, clusters, sparse=True), len(labels))
    v_measure = np.divide(mutual, mean, out=np.ones_like(mean), where=mean > 1e-12)  # one class and one cluster agree
    ami = np.divide(mutual - by_chance, mean - by_chance, out=np.ones_like(mean), where=np.abs(mean - by_chance) > 1e-12)
    return np.stack([v_measure, ami])


def first_centres(vectors: np.ndarray, k: int, random_state: np.random.RandomState) -> np.ndarray:
    """k-means++ on some of the vectors (N, D), as mini-batch k-means has it: on all it would take most of the time. Centres (k, D)."""
    from sklearn.cluster import kmeans_plusplus

    some = random_state.permutation(len(vectors))[: max(MIN_START, 10 * k)]
    return kmeans_plusplus(vectors[some], k, random_state=random_state)[0]


def cluster(vectors: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
    """k-means of vectors (N, D) into as many clusters as there are labels: the cluster of each row (N,)."""
    from sklearn.cluster import KMeans

    return KMeans(len(np.unique(labels)), init=first_centres, n_init=1, random_state=seed).fit_predict(vectors)


def refit_scores(vectors: np.ndarray, labels: np.ndarray, split: int) -> np.ndarray:
    """V-measure and AMI of half of the rows, clustered by themselves from two seeds: (seed, measure)."""
    once = np.ones((len(labels), 1), np.int64)
    seeds = (SEEDS + 2 * split, SEEDS + 2 * split + 1)
    return np.stack([clustering_scores(labels, cluster(vectors, labels, seed), once)[:, 0] for seed in seeds])


def of_clustering(vectors: np.ndarray, labels: np.ndarray, rows: str, most: int = MAX_ROWS) -> Evidence:
    """Evidence of vectors (N, D) and their labels (N,); of more than `most` rows so many, drawn at random."""
    labels = np.unique(labels, return_inverse=True)[1]
    if len(labels) > most:
        chosen = np.sort(np.random.default_rng(2).permutation(len(labels))[:most])
        vectors, labels = vectors[chosen], labels[chosen]
    once = np.ones((len(labels), 1), np.int64)
    scores, redrawn = [], []
    for seed in range(SEEDS):
        clusters = cluster(vectors, labels, seed)
        scores.append(clustering_scores(labels, clusters, once)[:, 0])
        redrawn.append(clustering_scores(labels, clusters, redraws(len(labels))))
    refit = np.array([[refit_scores(vectors[half], labels[half], i) for half in split] for i, split in enumerate(halves(len(labels)))])
    return Evidence(rows, len(labels), np.stack(scores, 1), np.stack(redrawn, 1), np.moveaxis(refit, 3, 0))


def of_one_label(rows: str) -> Evidence:
    """Evidence of texts that all have one label: V-measure and AMI are 1, whatever the clusters."""
    return Evidence(rows, 0, np.ones((2, SEEDS)), np.ones((2, SEEDS, REDRAWS)), np.ones((2, SPLITS, 2, 2)))


def of_means(row_scores: np.ndarray, rows: str) -> Evidence:
    """Evidence where the score is the mean over rows of a score of each: `row_scores` (S, N), as of queries, or of right answers."""
    n = row_scores.shape[1]
    return Evidence(rows, n, row_scores.mean(1)[None], (row_scores @ redraws(n) / n)[None], None)


def of_correlation(similarities: np.ndarray, gold: np.ndarray, rows: str) -> Evidence:
    """Evidence where the score is Spearman's correlation of `similarities` (N,) with `gold` (N,)."""
    from scipy.stats import rankdata

    n, rng = len(gold), np.random.default_rng(0)
    drawn = rng.integers(n, size=(REDRAWS, n))

    def correlation(number: np.ndarray) -> np.ndarray:  # rows by their numbers (R, N) -> (R,)
        a, b = (rankdata(values[number], axis=1) for values in (similarities, gold))
        a, b = (ranks - ranks.mean(1, keepdims=True) for ranks in (a, b))
        return (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))

    everything = correlation(np.arange(n)[None])
    redrawn = np.concatenate([correlation(part) for part in np.array_split(drawn, 20)])
    return Evidence(rows, n, everything[None], redrawn[None, None], None)


def of_average_precision(similarities: list[np.ndarray], positive: np.ndarray, rows: str) -> Evidence:
    """Evidence where the score is the best average precision of `positive` (N,) when ranked by one of several `similarities` (N,)."""
    n, rng = len(positive), np.random.default_rng(0)
    ranked = []  # order of the rows and the last of each group of equals
    for values in {values.tobytes(): values for values in similarities}.values():  # of vectors of norm 1 some are the same
        order = np.argsort(-values, kind="stable")
        ranked.append((order, np.flatnonzero(np.append(np.diff(values[order]) != 0, True))))

    def precision(drawn: np.ndarray) -> np.ndarray:  # how often each row is drawn (N, R) -> (R,)
        best = np.zeros(drawn.shape[1])
        for order, ends in ranked:
            total, hits = (np.cumsum(drawn[order] * weight, 0)[ends] for weight in (1, positive[order, None]))
            steps = np.diff(hits, axis=0, prepend=0)
            of_all = np.divide(steps * hits, total, out=np.zeros(hits.shape), where=total > 0).sum(0)
            best = np.maximum(best, np.divide(of_all, hits[-1], out=np.zeros(len(of_all)), where=hits[-1] > 0))
        return best

    drawn = (np.stack([np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(REDRAWS // 50)], 1) for _ in range(50))
    redrawn = np.concatenate([precision(some) for some in drawn])
    return Evidence(rows, n, precision(np.ones((n, 1), int))[None], redrawn[None, None], None)


def joined(parts: list[Evidence]) -> Evidence | None:
    """One evidence for a cell of several parts (levels, subsets, splits), whose score is their mean; None without parts."""
    if not parts:
        return None
    mean = [np.mean([getattr(part, field) for part in parts], axis=0) for field in ("scores", "redrawn")]
    refit = None if parts[0].halves is None else np.mean([part.halves for part in parts], axis=0)
    return Evidence("".join(part.rows for part in parts), sum(part.n for part in parts), *mean, refit)
