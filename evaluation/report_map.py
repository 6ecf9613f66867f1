"""The texts of a task in two dimensions, under two rows of the table, and which of its classes each row confuses.

Texts and vectors are those that the scores were computed from: they are kept while rows are scored, so that nothing is encoded again.
Of each task two rows are kept, as a table may have hundreds: the first, and the best of the others by the score of this task.

The plane is UMAP's where that is installed (umap-learn), else t-SNE's, of the vectors' first 50 principal components, from which it also
starts (Kobak and Berens 2019, The art of using t-SNE for single-cell transcriptomics). Two planes of one kind may still be turned against
each other: the second is turned, mirrored and scaled to lie on the first.

Legend: N texts, D numbers of a vector, K neighbours.
"""

from typing import NamedTuple

import numpy as np

from evaluation.baselines import is_baseline
from evaluation.mteb_model import is_collapsed
from evaluation.observing import Sample

MOST_POINTS = 20_000  # of all maps of a page together
COMPONENTS = 50
FEWEST = 10  # texts that have neighbours worth arranging; fewer lie by their principal components
MANY = 8000  # texts that t-SNE takes longer than half a minute to arrange on one core
NEIGHBOURS = 10
MOST_CLUSTERS = 12
PAIRS, EXAMPLES = 12, 2  # pairs of classes that are shown, and of texts of each
WITH_LABELS = ("Clustering", "Classification")
TEXTS = "texts without labels"  # in place of a task's name


class View(NamedTuple):
    """A row of the table that is kept for a map."""

    cell: dict
    sample: Sample

    @property
    def untuned(self) -> bool:
        return self.cell["contract"] is not None and not self.cell["contract"].get("data")


class KeptVectors:
    """Of each task with labels: the vectors of the first row and of the best of the others; baselines are left out.

    types     of the tasks: those with labels share MOST_POINTS. Of a task with more texts so many are drawn at random, the same in
              every row.
    """

    def __init__(self, types: list[str]):
        n_tasks = sum(task_type in WITH_LABELS for task_type in types)
        self.most, self.views = MOST_POINTS // max(1, n_tasks), {}

    def wants(self, cell: dict) -> bool:
        """Whether the vectors behind this cell would be kept."""
        views = self.views.get((cell["task"], cell["type"]), [])
        if is_baseline(cell["fingerprint"]) or cell["type"] not in WITH_LABELS:
            return False
        return len(views) < 2 or cell["score"] > views[1].cell["score"]

    def add(self, cell: dict, sample: Sample) -> None:
        """Keep `sample` where it is wanted."""
        if not self.wants(cell):
            return
        views = self.views.setdefault((cell["task"], cell["type"]), [])
        chosen = np.sort(np.random.default_rng(0).permutation(len(sample.texts))[: self.most])
        labels = sample.labels and [sample.labels[i] for i in chosen]
        vectors = np.asarray(sample.vectors[chosen], np.float32)
        views[1:] = []
        views.append(View(cell, Sample([sample.texts[i] for i in chosen], labels, vectors, len(sample.texts))))

    def pairs(self) -> list[list[View]]:
        """One or two views of each task, an untuned base before a run."""
        return [sorted(views, key=lambda view: not view.untuned) for views in self.views.values()]


def plane(vectors: np.ndarray) -> tuple[np.ndarray, str]:
    """Vectors (N, D) in two dimensions, float64 (N, 2), and how they came there."""
    from sklearn.decomposition import PCA

    n = len(vectors)
    if not np.ptp(vectors, axis=0).max() > 1e-7:
        return np.zeros((n, 2)), "PCA"
    reduced = PCA(min(COMPONENTS, n, vectors.shape[1]), random_state=0).fit_transform(vectors).astype(np.float64)
    reduced = np.pad(reduced, ((0, 0), (0, max(0, 2 - reduced.shape[1]))))
    if n < FEWEST:
        return reduced[:, :2], "PCA"
    spread = reduced[:, 0].std()
    try:
        from umap import UMAP
    except ImportError:
        from sklearn.manifold import TSNE

        model = TSNE(perplexity=min(30, (n - 1) / 3), init="pca", random_state=0)
        return model.fit_transform(reduced / spread).astype(np.float64), "t-SNE"
    return UMAP(n_neighbors=min(15, n - 1), random_state=0).fit_transform(reduced / spread).astype(np.float64), "UMAP"


def laid_on(points: np.ndarray, others: np.ndarray) -> np.ndarray:
    """`points` (N, 2) turned, mirrored and scaled to lie on `others` (N, 2): distances among them keep their proportions."""
    from scipy.linalg import orthogonal_procrustes

    points, others = points - points.mean(0), others - others.mean(0)
    size, other_size = np.linalg.norm(points), np.linalg.norm(others)
    if not size or not other_size:
        return points
    return points @ orthogonal_procrustes(points, others)[0] * (other_size / size)


def clusters(texts: list[str], vectors: np.ndarray) -> list[str]:
    """For texts without labels: k-means of their vectors (N, D), each cluster named by the three words that set it apart most."""
    from sklearn.cluster import KMeans
    from sklearn.feature_extraction.text import TfidfVectorizer

    k = max(1, min(MOST_CLUSTERS, len({row.tobytes() for row in vectors}) // 5))
    numbers = KMeans(k, n_init=3, random_state=0).fit_predict(vectors)
    names = [f"cluster {i + 1}" for i in range(k)]
    try:
        vectorizer = TfidfVectorizer(stop_words="english", min_df=2, token_pattern=r"[^\W\d_]{2,}")
        counted = vectorizer.fit_transform(texts)
    except ValueError:  # no words that two texts share
        return [names[number] for number in numbers]
    words, overall = vectorizer.get_feature_names_out(), np.asarray(counted.mean(0)).ravel()
    for i in range(k):
        excess = np.asarray(counted[numbers == i].mean(0)).ravel() - overall
        names[i] += ": " + ", ".join(words[j] for j in np.argsort(-excess)[:3] if excess[j] > 0)
    return [names[number] for number in numbers]


# ------------------------------------------------------------------------------------------------------ confused classes


class Confused(NamedTuple):
    """Two classes whose texts are near each other."""

    classes: tuple[str, str]
    shares: list[float]  # of the neighbours, for each view
    examples: list[tuple[str, str]]  # the nearest texts, one of each class


class Neighbours(NamedTuple):
    """The K nearest of each of N texts."""

    numbers: np.ndarray  # (N, K)
    distances: np.ndarray  # (N, K)


def neighbours(vectors: np.ndarray) -> Neighbours | None:
    """The nearest other texts of each by the cosine of unit vectors (N, D); None of a single one."""
    from sklearn.neighbors import NearestNeighbors

    if len(vectors) < 2:
        return None
    distances, numbers = NearestNeighbors(n_neighbors=min(NEIGHBOURS, len(vectors) - 1), algorithm="brute").fit(vectors).kneighbors()
    return Neighbours(numbers, distances)


def shares(near: Neighbours, codes: np.ndarray, n_classes: int) -> dict[tuple[int, int], float]:
    """For pairs of classes: the share of the neighbours of the texts of both that are of the other class. `codes` (N,) are the classes."""
    one, other = np.broadcast_to(codes[:, None], near.numbers.shape), codes[near.numbers]
    unlike = one != other
    pairs = np.minimum(one, other)[unlike].astype(np.int64) * n_classes + np.maximum(one, other)[unlike]
    keys, counts = np.unique(pairs, return_counts=True)
    sizes, k = np.bincount(codes, minlength=n_classes), near.numbers.shape[1]
    both = [(int(key // n_classes), int(key % n_classes)) for key in keys]
    return {(a, b): float(count / (k * (sizes[a] + sizes[b]))) for (a, b), count in zip(both, counts, strict=True)}


def confused(views: list[View]) -> list[Confused]:
    """The pairs of classes that the last view confuses most, with what the others make of them."""
    texts, labels = views[-1].sample.texts, views[-1].sample.labels
    names, codes = np.unique(np.array(labels, object), return_inverse=True)
    near = [neighbours(view.sample.vectors) for view in views]
    if len(names) < 2 or near[-1] is None:
        return []
    of_views = [shares(found, codes, len(names)) for found in near]
    worst = sorted(of_views[-1].items(), key=lambda item: (-item[1], item[0]))[:PAIRS]
    return [
        Confused((names[a], names[b]), [found.get((a, b), 0.0) for found in of_views], examples(near[-1], codes, texts, a, b))
        for (a, b), _ in worst
    ]


def examples(near: Neighbours, codes: np.ndarray, texts: list[str], a: int, b: int) -> list[tuple[str, str]]:
    """The nearest pairs of a text of class `a` and one of class `b`."""
    here = np.flatnonzero((codes == a) | (codes == b))
    found = []
    for i in here:
        for j, distance in zip(near.numbers[i], near.distances[i], strict=True):
            if codes[j] != codes[i] and codes[j] in (a, b):
                found.append((float(distance), *((i, j) if codes[i] == a else (j, i))))
    nearest = dict.fromkeys((texts[i], texts[j]) for _, i, j in sorted(found))
    return list(nearest)[:EXAMPLES]


# --------------------------------------------------------------------------------------------------------------- the map


def map_of(views: list[View], say) -> dict:
    """What the page draws of a task: points and classes of each view. `say` is called with what takes its time."""
    texts, labels = views[-1].sample.texts, views[-1].sample.labels
    kind = "label" if labels else "cluster"
    labels = labels or clusters(texts, views[-1].sample.vectors)
    panels, method = [], ""
    for view in views:
        patience = ", which takes minutes" if len(texts) > MANY else ""
        say(f"{view.cell['task']}: arranging {len(texts):,} texts by the vectors of {view.cell['model']}{patience}")
        points, method = plane(view.sample.vectors)
        if panels:
            points = laid_on(points, panels[0]["points"])
        panels.append({"cell": view.cell, "points": points, "collapsed": is_collapsed(view.sample.vectors)})
    return {"texts": texts, "labels": labels, "of": views[-1].sample.of, "kind": kind, "method": method, "panels": panels}
