"""Probes on features, their scores, and intervals that redraw patients.

kNN (k = 20, cosine) and logistic regression are scikit-learn's, as are the scores: balanced accuracy, and AUROC (of several classes the
mean of one against the rest). The regularization of the logistic probe is chosen by validation patients. Patches of a patient are alike,
so an interval redraws patients, not patches, and the same patients for all rows that are compared.

Legend: N rows (patches or slides), D features, C classes, R redraws, P patients.
"""

from collections.abc import Sequence

import numpy as np

K = 20
STRENGTHS = (0.001, 0.01, 0.1, 1.0)  # C of scikit-learn's LogisticRegression, from much to little regularization
REDRAWS = 1000
FEW_PATIENTS = 10  # of which redraws are too much alike: their intervals are too narrow
HISTOGRAM_BINS = 8  # of each of R, G and B


def colour_histogram(pixels: np.ndarray) -> np.ndarray:
    """Square roots of the shares of 8 x 8 x 8 colours: uint8 (N, S, S, 3) -> float32 (N, 512). The baseline that sees no structure."""
    codes = (pixels // (256 // HISTOGRAM_BINS)).reshape(len(pixels), -1, 3) @ np.array([HISTOGRAM_BINS**2, HISTOGRAM_BINS, 1])
    offset = codes + np.arange(len(pixels))[:, None] * HISTOGRAM_BINS**3
    counts = np.bincount(offset.ravel(), minlength=len(pixels) * HISTOGRAM_BINS**3).reshape(len(pixels), -1)
    return np.sqrt(counts / codes.shape[1]).astype(np.float32)


# ------------------------------------------------------------------------------------------------------------- probes


def knn_probe(features: np.ndarray, labels: np.ndarray, k: int = K):
    """A fitted scikit-learn classifier: the share of each class among the k nearest by cosine. features (N, D), labels (N,)."""
    from sklearn.neighbors import KNeighborsClassifier

    return KNeighborsClassifier(min(k, len(labels)), metric="cosine").fit(features, labels)


def logistic_probe(features: np.ndarray, labels: np.ndarray, validation: np.ndarray, validation_labels: np.ndarray):
    """A fitted scikit-learn pipeline, classes weighted alike, with the one of STRENGTHS of the highest AUROC on validation."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    best = None
    for strength in STRENGTHS:
        regression = LogisticRegression(C=strength, class_weight="balanced", max_iter=1000)
        probe = make_pipeline(StandardScaler(), regression).fit(features, labels)
        score = auroc(validation_labels, probe.predict_proba(validation), probe.classes_)
        if best is None or score > best[0]:
            best = score, probe
    return best[1]


def knn_balanced_accuracy(features: np.ndarray, labels: np.ndarray, queries: np.ndarray, query_labels: np.ndarray, k: int = K) -> float:
    """Of the queries (n, D), by kNN among the features (N, D)."""
    probe = knn_probe(features, labels, k)
    return balanced_accuracy(query_labels, probe.predict_proba(queries), probe.classes_)


# ------------------------------------------------------------------------------------------------------------- scores


def balanced_accuracy(labels: np.ndarray, shares: np.ndarray, classes: Sequence[str]) -> float:
    """Mean over classes of the share of their rows that are classified rightly. shares (N, C)."""
    from sklearn.metrics import balanced_accuracy_score

    return float(balanced_accuracy_score(labels, np.asarray(classes)[shares.argmax(1)]))


def auroc(labels: np.ndarray, shares: np.ndarray, classes: Sequence[str]) -> float:
    """Area under the ROC curve; of more than two classes the mean of one against the rest. NaN where only one class is there."""
    from sklearn.metrics import roc_auc_score

    truth = np.asarray(labels)[:, None] == np.asarray(classes)  # (N, C)
    columns = scored_classes(truth)
    return float(np.mean([roc_auc_score(truth[:, c], shares[:, c]) for c in columns])) if columns else float("nan")


def scored_classes(truth: np.ndarray) -> list[int]:
    """Columns of truth (N, C) that have rows and are not all rows; of two classes the second alone."""
    some = [c for c in range(truth.shape[1]) if 0 < truth[:, c].sum() < len(truth)]
    return some[-1:] if truth.shape[1] == 2 else some


# ---------------------------------------------------------------------------------------------------------- intervals


def patient_redraws(patients: np.ndarray, redraws: int = REDRAWS, seed: int = 0) -> dict[str, np.ndarray]:
    """How often each patient is drawn in each of R redraws with replacement, (R,) by patient. Whom a row lacks counts nothing there."""
    unique = np.unique(patients)
    drawn = np.random.default_rng(seed).multinomial(len(unique), np.full(len(unique), 1 / len(unique)), size=redraws)
    return dict(zip(unique.tolist(), drawn.T, strict=True))


def redrawn_balanced_accuracy(labels: np.ndarray, shares: np.ndarray, classes: Sequence[str], weights: np.ndarray) -> np.ndarray:
    """`balanced_accuracy` of rows that count `weights` (N, R) times -> (R,). Classes that a redraw lacks are left out of its mean."""
    right = np.asarray(classes)[shares.argmax(1)] == labels
    of_class = [labels == label for label in np.unique(labels)]
    total = np.stack([weights[rows].sum(0) for rows in of_class]).astype(float)
    hits = np.stack([weights[rows & right].sum(0) for rows in of_class])
    recalls = np.divide(hits, total, out=np.zeros_like(total), where=total > 0).sum(0)
    n_classes = (total > 0).sum(0)
    return np.divide(recalls, n_classes, out=np.full_like(recalls, np.nan), where=n_classes > 0)


def redrawn_auroc(labels: np.ndarray, shares: np.ndarray, classes: Sequence[str], weights: np.ndarray) -> np.ndarray:
    """`auroc` of rows that count `weights` (N, R) times -> (R,). NaN in a redraw that has one class alone."""
    truth = np.asarray(labels)[:, None] == np.asarray(classes)
    return np.mean([redrawn_binary_auroc(truth[:, c], shares[:, c], weights) for c in scored_classes(truth)], axis=0)


def redrawn_binary_auroc(truth: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """AUROC as the share of pairs in the right order, ties counting half. truth (N,) bool, scores (N,), weights (N, R) -> (R,)."""
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], np.diff(scores[order]) > 0]))
    positive, negative = (np.add.reduceat(weights[order] * rows[order, None], starts, axis=0) for rows in (truth, ~truth))
    below = np.cumsum(negative, axis=0) - negative / 2
    pairs = positive.sum(0) * negative.sum(0)
    return np.divide((positive * below).sum(0), pairs, out=np.full(weights.shape[1], np.nan), where=pairs > 0)


def interval(redrawn: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of redraws (R,)."""
    low, high = np.nanquantile(redrawn, [0.025, 0.975])
    return float(low), float(high)
