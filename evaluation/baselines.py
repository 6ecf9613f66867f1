"""Rows of the table that are no decoder of ours: TF-IDF, and models of sentence-transformers."""

from pathlib import Path

import numpy as np

from evaluation.mteb_model import MtebModel
from files.console import InputError


def tfidf(texts: list[str], role: str) -> np.ndarray:
    """TF-IDF reduced to 100 dimensions by SVD, fitted on `texts` themselves (scikit-learn's defaults otherwise)."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    try:
        counts = TfidfVectorizer().fit_transform(texts)
    except ValueError:
        raise InputError("--baselines tfidf finds no words of two letters or more in these texts: leave it out") from None
    return TruncatedSVD(min(100, *(n - 1 for n in counts.shape)), random_state=0).fit_transform(counts).astype(np.float32)


def baseline(name: str) -> MtebModel:
    """`tfidf`, or a sentence-transformers model by its folder or hub id, with that model's own settings."""
    if name == "tfidf":
        return MtebModel("TF-IDF, SVD 100", "tfidf-svd-100", None, tfidf)
    from sentence_transformers import SentenceTransformer

    from encoder.base_models import hub_answers

    try:
        model = SentenceTransformer(name, local_files_only=not (Path(name).is_dir() or hub_answers()))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:150]
        raise InputError(f"--baselines: {name!r} is neither tfidf nor a sentence-transformers model that loads ({reason})") from None
    return MtebModel(name, f"sentence-transformers:{name}", None, lambda texts, role: model.encode(texts, show_progress_bar=False))
