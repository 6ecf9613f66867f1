"""Rows of the table that are fitted on the texts: TF-IDF, alone and beside a model's vectors.

TF-IDF has two settings, and neither is the better one everywhere: without stop words it is on the bundled tasks and Cooking StackExchange,
with all words on SNIPS. What evaluate.py --texts measures without labels did not tell on these which, and so labels choose: both are
scored, and the table shows the one with the better mean over its tasks, by its name, and says what the other has. It flatters the
baseline a little.

Legend: N texts, D numbers of a vector.
"""

import numpy as np

from evaluation.mteb_model import EncodeTexts, MtebModel
from files.console import InputError

DIMENSIONS = 100  # of TF-IDF after SVD
SETTINGS = {"TF-IDF": {}, "TF-IDF without stop words": {"stop_words": "english", "min_df": 2}}  # name -> what differs from scikit-learn's
FITTED = ("tfidf", "side-by-side")  # baselines that are fitted on the texts that they embed, and so can score clustering alone


def tfidf(texts: list[str], setting: str = "TF-IDF") -> np.ndarray:
    """TF-IDF reduced to 100 dimensions by SVD, fitted on N `texts` themselves: vectors (N, D).

    Where the setting leaves fewer than two different words, all words count. Raises InputError where these are too few as well.
    """
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    try:
        counts = TfidfVectorizer(**SETTINGS[setting]).fit_transform(texts)
    except ValueError:  # no words
        counts = None
    if counts is None or counts.shape[1] < 2:
        if SETTINGS[setting]:
            return tfidf(texts)
        raise InputError("--baselines tfidf needs two different words of two letters or more in the texts: leave it out")
    return TruncatedSVD(max(1, min(DIMENSIONS, *(n - 1 for n in counts.shape))), random_state=0).fit_transform(counts).astype(np.float32)


def beside(encode_texts: EncodeTexts, setting: str) -> EncodeTexts:
    """Model and TF-IDF side by side: each centred, of norm 1, and concatenated, so that both have the same say in every cosine."""
    from encoder.nearest import unit

    def encode(texts: list[str], role: str) -> np.ndarray:
        return np.hstack([unit(vectors - vectors.mean(0)) for vectors in (encode_texts(texts, role), tfidf(texts, setting))])

    return encode


def side_by_side(row: MtebModel) -> list[MtebModel]:
    """A row's vectors beside TF-IDF, one row for each setting of it, of which the table shows the better."""
    return [
        MtebModel(
            f"{row.label} + {setting}",
            f"{row.fingerprint}+{slug(setting)}",
            None,
            beside(row.encode_texts, setting),
            row.computed,
            better_of=f"{row.fingerprint}+tfidf",
        )
        for setting in SETTINGS
    ]


def is_baseline(fingerprint: str) -> bool:
    """Whether a row is one of these: all other fingerprints are hexadecimal."""
    return "tfidf" in fingerprint


def slug(setting: str) -> str:
    return setting.lower().replace("tf-idf", "tfidf").replace(" ", "-")


def baseline() -> list[MtebModel]:
    """TF-IDF alone, one row for each setting."""
    return [
        MtebModel(
            f"{setting}, SVD {DIMENSIONS}",
            f"{slug(setting)}-svd-{DIMENSIONS}",
            None,
            lambda texts, role, setting=setting: tfidf(texts, setting),
            better_of="tfidf",
        )
        for setting in SETTINGS
    ]
