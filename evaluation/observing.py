"""What mteb's tasks do not tell: the rows behind a score, seen while mteb computes it.

Every type of the English tracks is watched: clustering (labels and vectors of the sample that mteb drew), classification by accuracy
(right or wrong, for each test text and draw of training texts), STS by Spearman's correlation and pair classification by average precision
(similarities of each pair), retrieval and reranking (score of each query), and summarization (score of each article). A cell of another
type or measure, or of a task that mteb puts together from others, has no evidence, and so no interval.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from evaluation import evidence
from evaluation.evidence import Evidence

UNITS = {
    "Clustering": "texts",
    "Classification": "texts",
    "STS": "pairs",
    "PairClassification": "pairs",
    "Retrieval": "queries",
    "Reranking": "queries",
    "Summarization": "articles",
}


MERGED = "max_over_subqueries_"  # of a measure: the parts of a query are merged before they are scored
# of pair classification: the similarities that mteb computes, 1 where larger is more alike, -1 where smaller is
SIMILARITIES = {"similarity_scores": 1, "cosine_scores": 1, "manhattan_distances": -1, "euclidean_distances": -1, "dot_scores": 1}


class Sample(NamedTuple):
    """Texts of a task and the vectors by which a row of the table was scored; of clustering those of the first subset."""

    texts: list[str]  # (N)
    labels: list[str] | None  # (N) of the first level; None where there are none
    vectors: np.ndarray  # (N, D) of norm 1
    of: int  # texts that these were drawn from


class Observation:
    """What was seen of one cell: its parts, how many rows of how many its score rests on, and texts with labels."""

    def __init__(self, unit: str):
        self.unit, self.parts = unit, []
        self.sample: Sample | None = None
        self.used = self.whole = 0

    def evidence(self) -> Evidence | None:
        return evidence.joined(self.parts)

    def rests_on(self) -> str:
        """Such as "960 texts" or "81 of 2,048 texts"; "" where it was not seen."""
        if not self.used:
            return ""
        return f"{self.used:,} {self.unit}" if self.used >= self.whole else f"{self.used:,} of {self.whole:,} {self.unit}"


def digest(*values) -> str:
    """Tells rows of a task apart."""
    return hashlib.sha256(json.dumps(values, default=str).encode()).hexdigest()[:16]


@contextlib.contextmanager
def observed(task) -> Iterator[Observation]:
    """Watch `task`, which must be a copy that runs once, while mteb scores a row of the table with it."""
    import mteb.abstasks.clustering as clustering
    from mteb.abstasks import AbsTaskClassification, AbsTaskClustering, AbsTaskPairClassification, AbsTaskRetrieval, AbsTaskSTS
    from mteb.abstasks.clustering_legacy import AbsTaskClusteringLegacy
    from mteb.abstasks.text.summarization import AbsTaskSummarization

    seen, metric = Observation(UNITS.get(task.metadata.type, "rows")), task.metadata.main_score
    original = clustering._evaluate_clustering_bootstrapped
    if isinstance(task, AbsTaskClustering):
        watch_clustering(task, seen, clustering, original)
    elif isinstance(task, AbsTaskClusteringLegacy):
        watch_clustering_of_sets(task, seen)
    elif isinstance(task, AbsTaskClassification) and metric == "accuracy":
        watch_classification(task, seen)
    elif isinstance(task, AbsTaskSTS) and metric == "cosine_spearman":
        watch_sts(task, seen)
    elif isinstance(task, AbsTaskPairClassification) and metric == "max_ap":
        watch_pair_classification(task, seen)
    elif isinstance(task, AbsTaskSummarization) and metric == "cosine_spearman":
        watch_summarization(task, seen)
    elif isinstance(task, AbsTaskRetrieval) and metric.removeprefix(MERGED).startswith(("ndcg_at_", "map_at_")):
        watch_retrieval(task, seen, metric.replace("_at_", "_cut_"))
    try:
        yield seen
    finally:
        clustering._evaluate_clustering_bootstrapped = original


def watch_clustering(task, seen: Observation, module, bootstrapped) -> None:
    evaluate_subset = task._evaluate_subset

    models = []

    def subset(model, data_split, **options):
        seen.whole += len(data_split)
        models.append(model)
        return evaluate_subset(model, data_split, **options)

    def cluster(embeddings, labels, *, max_depth, **options):
        seen.used += len(labels)
        seen.sample = seen.sample or Sample(models[-1].texts, [str(row[0]) for row in labels], np.asarray(embeddings), len(labels))
        for level in range(min(max(map(len, labels)), max_depth or len(embeddings))):
            of_level = [row[level] if len(row) > level else -1 for row in labels]
            there = np.array([label != -1 for label in of_level])
            values = np.array([str(label) for label in of_level])[there]
            seen.parts.append(evidence.of_clustering(np.asarray(embeddings)[there], values, digest(values.tolist())))
        return bootstrapped(embeddings, labels, max_depth=max_depth, **options)

    task._evaluate_subset, module._evaluate_clustering_bootstrapped = subset, cluster


def watch_clustering_of_sets(task, seen: Observation) -> None:
    """Tasks of mteb's first track: the score is a mean over sets of texts, each clustered by itself."""
    evaluate_subset, evaluator = task._evaluate_subset, task.evaluator
    kept: list[Evidence] = []  # of the sets with several labels, in order

    class Watched(evaluator):
        def __call__(self, model, **options):
            encode = model.encode

            def watched(*args, **encode_options):
                vectors = encode(*args, **encode_options)
                labels = [str(label) for label in self.dataset[task.label_column_name]]
                seen.sample = seen.sample or Sample(model.texts, labels, vectors, len(labels))
                kept.append(evidence.of_clustering(vectors, np.array(labels), digest(labels), Watched.most))
                return vectors

            model.encode = watched
            try:
                return super().__call__(model, **options)
            finally:
                del model.encode

    def subset(model, data_split, **options):
        sets = data_split[task.label_column_name]
        n = sum(map(len, sets))
        seen.used, seen.whole = seen.used + n, seen.whole + n
        Watched.most = max(evidence.MIN_OF_SET, evidence.MAX_ROWS // len(sets))
        kept.clear()
        scores = evaluate_subset(model, data_split, **options)
        of_sets = iter(kept)
        seen.parts.append(
            evidence.joined([next(of_sets) if len(set(one)) > 1 else evidence.of_one_label(digest(len(one))) for one in sets])
        )
        return scores

    task._evaluate_subset, task.evaluator = subset, Watched


def watch_classification(task, seen: Observation) -> None:
    run_experiment, evaluate_subset = task._run_experiment, task._evaluate_subset
    right, tested = [], []

    def experiment(train_split, eval_split, *vectors, **options):
        scores, predicted = run_experiment(train_split, eval_split, *vectors, **options)
        answers = eval_split[task.label_column_name]
        if seen.sample is None and isinstance(task.input_column_name, str):
            texts = list(eval_split[task.input_column_name])
            seen.sample = Sample(texts, [str(answer) for answer in answers], np.asarray(vectors[1]), len(texts))
        right.append(np.array([a == b for a, b in zip(answers, predicted, strict=True)], np.float64))
        tested.append(list(answers))
        return scores, predicted

    def subset(*args, **options):
        right.clear(), tested.clear()
        scores = evaluate_subset(*args, **options)
        seen.used += len(right[0])
        seen.parts.append(evidence.of_means(np.stack(right), digest(tested[0])))
        return scores

    task._run_experiment, task._evaluate_subset = experiment, subset


def watch_sts(task, seen: Observation) -> None:
    calculate = task._calculate_scores

    def scores(similarities, gold):
        seen.used += len(gold)
        seen.parts.append(evidence.of_correlation(np.asarray(similarities["cosine_scores"]), np.asarray(gold), digest(list(gold))))
        return calculate(similarities, gold)

    task._calculate_scores = scores


def watch_pair_classification(task, seen: Observation) -> None:
    compute = task._compute_metrics

    def metrics(similarities, labels):
        """The similarities are those of five functions, and the score is that of the best."""
        values = [sign * np.asarray(similarities[name]) for name, sign in SIMILARITIES.items()]
        seen.used += len(labels)
        seen.parts.append(evidence.of_average_precision(values, np.asarray(labels) == 1, digest(list(labels))))
        return compute(similarities, labels)

    task._compute_metrics = metrics


def watch_summarization(task, seen: Observation) -> None:
    from scipy.stats import spearmanr

    class Watched(task.evaluator):
        def _calculate_metrics(self, distances):
            by_article = list(zip(distances["human_scores"], distances["cosine_scores"], strict=True))
            seen.used += len(by_article)
            correlations = np.array([[spearmanr(human, cosines).statistic for human, cosines in by_article]])
            seen.parts.append(evidence.of_means(correlations, digest(distances["human_scores"])))
            return super()._calculate_metrics(distances)

    task.evaluator = Watched


def watch_retrieval(task, seen: Observation, metric: str) -> None:
    """The scores of queries, or, where mteb merges the parts of a query and scores these (MIND), of merged ones."""
    specific_scores, of_parts = task.task_specific_scores, not metric.startswith(MERGED)

    def scores(of_query, *args, **options):
        merged: list[dict] = []
        with merged_scores(merged):
            result = specific_scores(of_query, *args, **options)
        of_query = of_query if of_parts else merged[0]
        ids = sorted(of_query)
        seen.used += len(ids)
        seen.parts.append(evidence.of_means(np.array([[of_query[i][metric.removeprefix(MERGED)] for i in ids]]), digest(ids)))
        return result

    task.task_specific_scores = scores


@contextlib.contextmanager
def merged_scores(merged: list[dict]) -> Iterator[None]:
    """While it is open, the scores of each query that mteb computes of merged parts are appended to `merged`."""
    import mteb._evaluators.retrieval_metrics as module

    calculate = module.calculate_retrieval_scores

    def calculated(*args, **options):
        result = calculate(*args, **options)
        merged.append(result[0])
        return result

    module.calculate_retrieval_scores = calculated
    try:
        yield
    finally:
        module.calculate_retrieval_scores = calculate
