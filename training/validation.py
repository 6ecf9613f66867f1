"""Validation during training: how good is the adapter on data that it is not trained on?"""

import math
from pathlib import Path

import numpy as np
import torch

from encoder import Encoder
from encoder.checks import NonFiniteError
from encoder.processes import all_reduce_number, distributed
from files.console import InputError
from files.reading import as_label, as_text, column_names, excerpt, read_column, read_rows
from tasks import unlabelled
from training.gradients import autocast
from training.pair_data import Pair, rows_by_prompt, under_prompt

MAX_LABELLED = 2048  # texts of a labelled file that are clustered


class Validation:
    """Scores the encoder: by the V-measure of labelled texts where there are some, else by its accuracy on held-out pairs.

    Accuracy is the share of held-out anchors whose positive is the nearest of all held-out positives of its prompt. V-measure is that of
    mini-batch k-means as mteb runs it. Both lie between 0 and 1. Without texts and pairs the object is false.

    pairs       held-out pairs
    labelled    a file, see `read_labelled`
    """

    def __init__(self, pairs: list[Pair], labelled: Path | None):
        self.pairs, self.texts, self.labels = pairs, [], []
        if labelled is not None:
            self.texts, self.labels = read_labelled(labelled)
        self.name = "V-measure" if labelled else "held-out accuracy"

    def __bool__(self) -> bool:
        return bool(self.pairs or self.texts)

    def standard_error(self, score: float) -> float:
        """Standard error of an accuracy; 0 for V-measure, for which there is no formula.

        Of adapters within one standard error of the best, the latest is kept: the learning rate falls, so that of two that
        cannot be told apart the later one is the better guess (Breiman et al. 1984, Classification and Regression Trees,
        3.4.3, choose by the same rule).
        """
        return math.sqrt(score * (1 - score) / len(self.pairs)) if self.pairs else 0.0

    def __call__(self, encoder: Encoder) -> float:
        """The score; under torchrun the first process's, to the last bit, in all of them. Leaves the decoder in training mode."""
        with autocast(encoder):
            score = float(self._v_measure(encoder) if self.texts else self._accuracy(encoder))
        encoder.decoder.train()
        return all_reduce_number(0.0 if distributed().rank else score, "sum")

    def _accuracy(self, encoder: Encoder) -> float:
        hits = 0
        for prompt, rows in rows_by_prompt([pair.prompt for pair in self.pairs]).items():
            pairs, prompted = [self.pairs[row] for row in rows], under_prompt(encoder, prompt)
            positives = [pair.positive for pair in pairs]
            similarity = _encode(prompted, [pair.anchor for pair in pairs], "query") @ _encode(prompted, positives).T
            hits += sum(positives[j] == p for j, p in zip(similarity.argmax(1), positives, strict=True))
        return hits / len(self.pairs)

    def _v_measure(self, encoder: Encoder) -> float:
        from sklearn.cluster import MiniBatchKMeans
        from sklearn.metrics import v_measure_score

        k_means = MiniBatchKMeans(len(set(self.labels)), batch_size=500, n_init="auto", random_state=0)
        return v_measure_score(self.labels, k_means.fit_predict(_encode(encoder, self.texts)))


def compare_with_start(encoder: Encoder, before: dict[str, torch.Tensor], texts: list[str]) -> unlabelled.Comparison | None:
    """What training did to these texts, without labels (tasks/unlabelled.py): the run against what it began with.

    before     weights of the run that was trained on, by their names in `encoder.trainable()`; {}: the untuned base was trained
    None where too few texts share words. Leaves the decoder in evaluation mode.
    """
    splits = unlabelled.hide_words(list(dict.fromkeys(texts)), n_splits=2)
    if not splits:
        return None

    def scores(model: Encoder) -> list[np.ndarray]:
        with autocast(encoder):  # which adapters with dropout or DoRA need here, see `keep_input_dtype`
            return [unlabelled.scores(model.encode(split.texts), split) for split in splits]

    def exchange(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Put these weights into the encoder, and return those that were there."""
        parameters = encoder.trainable()
        there = {name: parameters[name].detach().clone() for name in weights}
        for name, values in weights.items():
            parameters[name].data.copy_(values)
        return there

    after = exchange(before)
    at_start = scores(encoder if before else encoder.untuned())
    exchange(after)
    return unlabelled.compare(at_start, scores(encoder), splits)


def _encode(encoder: Encoder, texts: list[str], role: str = "document") -> np.ndarray:
    try:
        return encoder.encode(texts, role)
    except NonFiniteError:
        raise InputError("the vectors of the validation are not finite any more: lower --lr") from None


def read_labelled(path: Path) -> tuple[list[str], list[str]]:
    """Texts and labels of a file with columns `text` and `label`: the first MAX_LABELLED rows of a fixed shuffle.

    Raises InputError with the place for a row that lacks one of them, and for a file with fewer than two labels.
    """
    rows = list(read_rows(path))
    if not {"text", "label"} <= set(columns := column_names(rows)):
        raise InputError(f"{path}: needs columns text and label, has {excerpt(', '.join(columns), 200)}")
    texts, labels = read_column(rows, "text", as_text), read_column(rows, "label", as_label)
    if len(set(labels)) < 2:
        raise InputError(f"{path}: V-measure needs at least two labels")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()[:MAX_LABELLED]
    return [texts[i] for i in order], [labels[i] for i in order]
