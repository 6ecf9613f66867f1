"""Which of two models suits one's texts better, without a label: do the words that a model sees tell which it does not see?

Half of the words that texts share are hidden from the model. It clusters the texts by what is left, and the score of a text is how much
its hidden words resemble those of the other texts of its cluster, compared with those of all texts: 1 is chance, and the higher the more
a cluster is about one thing. No pair engine makes such pairs. A model that has learned which texts share words gains nothing from
words that it does not see, though it does from having learned which words go together. Of scripts without spaces each letter counts as
a word. How often the measure agrees with labels is known for English alone.

Legend: N texts, n of them that have words of both kinds, D numbers of a vector.
"""

import re
from collections import Counter
from typing import NamedTuple

import numpy as np

# A word, or a letter of a script without spaces: Thai to Myanmar, Khmer, kana and CJK
UNSPACED = "\u0e00-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff"
WORD = re.compile(rf"[^\W{UNSPACED}]+|[{UNSPACED}]")
MAX_TEXTS = 5000  # that are compared; more make the interval narrower and take longer
MIN_TEXTS = 100  # fewer tell nothing
MIN_TEXTS_OF_WORD, MAX_SHARE = 3, 0.1  # texts that a word which can be hidden stands in, and share of all texts
ADVICE = "advice, not proof: bench/README.md says how often it agreed with labels"
SPLITS, KMEANS_SEEDS, RESAMPLES = 3, 3, 2000


class HiddenWords(NamedTuple):
    """A split of the vocabulary."""

    texts: list[str]  # (n) without the hidden words
    hidden: object  # (n, words) sparse TF-IDF of the hidden words, rows of norm 1
    numbers: np.ndarray  # (n,) which of the N texts these are


class Comparison(NamedTuple):
    ratio: float  # of the mean scores, the second model's to the first's
    low: float  # bounds of its 95 % interval, by a bootstrap over texts
    high: float

    @property
    def verdict(self) -> str:
        return "better" if self.low > 1 else "worse" if self.high < 1 else "cannot tell"


def hide_words(texts: list[str], n_splits: int = SPLITS) -> list[HiddenWords]:
    """Splits that each hide a random half of the words that some of N texts share; [] where too few texts have such words."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    words_of = [WORD.findall(text.casefold()) for text in texts]
    counts = Counter(word for words in words_of for word in set(words))
    shared = sorted(word for word, n in counts.items() if MIN_TEXTS_OF_WORD <= n <= max(MIN_TEXTS_OF_WORD, MAX_SHARE * len(texts)))
    splits = []
    for seed in range(n_splits):
        drawn = np.random.default_rng(seed).random(len(shared)) < 0.5
        hidden = {word for word, is_hidden in zip(shared, drawn.tolist(), strict=True) if is_hidden}
        numbers = [i for i, words in enumerate(words_of) if 0 < sum(word in hidden for word in words) < len(words)]
        if len(numbers) < MIN_TEXTS:
            return []
        left = [" ".join(word for word in words_of[i] if word not in hidden) for i in numbers]
        rest = [" ".join(word for word in words_of[i] if word in hidden) for i in numbers]
        counted = TfidfVectorizer(sublinear_tf=True, token_pattern=r"\S+").fit_transform(rest)
        splits.append(HiddenWords(left, counted, np.array(numbers)))
    return splits


def scores(vectors: np.ndarray, split: HiddenWords) -> np.ndarray:
    """Score of each text (n,), from the vectors (n, D) of `split.texts`: the mean over k-means seeds."""
    from sklearn.cluster import MiniBatchKMeans

    hidden, n, results = split.hidden, len(split.texts), []
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    expected = (np.square(hidden.sum(0)).sum() - n) / (n * (n - 1))  # mean cosine of two texts' hidden words
    for seed in range(KMEANS_SEEDS):
        k = max(2, round(n**0.5))
        clusters = MiniBatchKMeans(k, batch_size=500, n_init=3, random_state=seed).fit_predict(vectors)
        sizes, to_others = np.bincount(clusters, minlength=k)[clusters], np.empty(n)
        for members in (np.flatnonzero(clusters == c) for c in range(k)):
            of_cluster = hidden[members]
            to_others[members] = of_cluster @ np.asarray(of_cluster.sum(0)).ravel() - 1
        results.append(np.where(sizes > 1, to_others / np.maximum(sizes - 1, 1) / expected, 1))
    return np.mean(results, axis=0)


def compare(first: list[np.ndarray], second: list[np.ndarray], splits: list[HiddenWords]) -> Comparison:
    """Compare the scores of two models, an array for each split."""
    n = 1 + max(split.numbers.max() for split in splits)
    totals = np.zeros((2, n))
    for a, b, split in zip(first, second, splits, strict=True):
        totals[:, split.numbers] += np.stack([a, b])
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=RESAMPLES).astype(np.float32)  # how often each text
    sums = drawn @ totals.T  # (RESAMPLES, 2)
    return Comparison(float(totals[1].sum() / totals[0].sum()), *np.quantile(sums[:, 1] / sums[:, 0], [0.025, 0.975]).tolist())
