"""The losses of a batch as functions of its vectors.

Pairs: symmetric InfoNCE, where each anchor must find its positive among all positives and hard negatives, and each positive its
anchor. Texts for which a teacher has vectors: distillation, where the cosines among them shall become those of the teacher.

Legend: B pairs of a batch, M hard negatives of all its pairs, D numbers of a vector, b rows of similarities at a time.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from encoder.runtime import to_device
from training.pair_data import PairBatch, rows_by_prompt

LossOfVectors = Callable[[Tensor, Tensor, Tensor], "LossResult"]  # anchors (B, D), positives (B, D), hard negatives (M, D)

# Of `distillation`, by trial: the temperature of both softmaxes, better than 0.05 and 0.2; the weight of the squared error, where 100
# and 1,000 are little worse, and no error at all or no softmax cost 10 points of V-measure on SNIPS
TEACHER_TEMPERATURE, COSINE_WEIGHT = 0.1, 300.0


class TextIds(NamedTuple):
    """Which text each vector of a batch belongs to: equal ids, equal texts."""

    anchors: Tensor  # (B,)
    positives: Tensor  # (B,)
    negatives: Tensor  # (M,)


class LossResult(NamedTuple):
    loss: Tensor  # scalar, in nats
    accuracy: float  # share of anchors whose positive is the nearest candidate
    n_negatives: float  # mean number of negatives of an anchor
    spread: float  # see `spread`
    divergence: float | None = None  # of `distillation`, where some texts have a teacher


@dataclass(frozen=True)
class LossSettings:
    """temperature, margin and mask_above are those of `info_nce`; there, mask_above is `threshold`.

    matryoshka    the first so many numbers of a vector must do as vectors of their own (Kusupati et al. 2022, arXiv 2205.13147)
    """

    temperature: float = 0.05
    margin: float = 0.0
    mask_above: float | None = None
    matryoshka: tuple[int, ...] = ()


def info_nce(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor,
    text_ids: TextIds,
    temperature: Tensor | float,
    *,
    margin: float = 0.0,
    threshold: float | None = None,
    rows_at_a_time: int | None = None,
) -> LossResult:
    """Symmetric InfoNCE (van den Oord et al. 2018, arXiv 1807.03748; both directions as in CLIP, arXiv 2103.00020).

    anchors, positives (B, D) and negatives (M, D), all of norm 1. An anchor has to find its positive among all positives and
    all hard negatives, a positive its anchor among all anchors. A candidate that shares a text with the pair is left out.

    margin            subtracted from the cosine of each pair (additive margin: Yang et al. 2019, arXiv 1902.08564)
    threshold         also leave out candidates whose cosine to the right answer is above this
    rows_at_a_time    rows of the similarity matrix that exist at a time, in the backward pass too, so that memory grows with B
                      and not with its square (default: 64 MiB of them)
    """
    candidates, n = torch.cat([positives, negatives]), len(anchors)
    rows_at_a_time = rows_at_a_time or max(64, 2**24 // len(candidates))
    anchor_ids, positive_ids, negative_ids = text_ids

    def one_direction(queries: Tensor, candidates: Tensor, answers: Tensor, left_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (b, D), the rows of their right answers (b,), what to leave out (b, C): summed cross-entropy, hits, negatives."""
        if threshold is not None:
            with torch.no_grad():
                left_out = left_out | (candidates[answers] @ candidates.T > threshold)
        left_out = left_out.scatter(1, answers[:, None], False)
        similarity = queries @ candidates.T
        hits = (similarity.detach().masked_fill(left_out, -torch.inf).argmax(1) == answers).sum()
        if margin:
            similarity = similarity - margin * F.one_hot(answers, len(candidates))
        similarity = (similarity / temperature).masked_fill(left_out, -torch.inf)
        return F.cross_entropy(similarity, answers, reduction="sum"), hits, (~left_out).sum() - len(answers)

    def both_directions(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, p = anchor_ids[rows, None], positive_ids[rows, None]
        same_pair = (a == anchor_ids) | (p == positive_ids) | (a == positive_ids) | (p == anchor_ids)  # (b, B)
        same_negative = (negative_ids == a) | (negative_ids == p)  # (b, M)
        forth, hits, n_negatives = one_direction(anchors[rows], candidates, rows, torch.cat([same_pair, same_negative], 1))
        back, _, _ = one_direction(positives[rows], anchors, rows, same_pair)
        return forth + back, hits, n_negatives

    slices = torch.arange(n, device=anchors.device).split(rows_at_a_time)
    compute = both_directions if len(slices) == 1 else functools.partial(checkpoint, both_directions, use_reentrant=False)
    loss, hits, n_negatives = (torch.stack(values).sum() for values in zip(*map(compute, slices), strict=True))
    return LossResult(loss / (2 * n), hits.item() / n, n_negatives.item() / n, spread(anchors, positives))


@torch.no_grad()
def spread(anchors: Tensor, positives: Tensor) -> float:
    """Mean squared distance of vectors from their mean, of anchors or of positives, whichever lie closer together.

    For vectors (B, D) of norm 1 that is 1 - their mean cosine to each other, about. 0: all are the same.
    """
    return min((v - v.mean(0)).square().sum(1).mean().item() for v in (anchors, positives))


def distillation(vectors: Tensor, teacher: Tensor, text_ids: Tensor) -> LossResult:
    """How far the cosines among the texts of a batch are from a teacher's: their order near each text, and their size everywhere.

    The first is the Kullback-Leibler divergence of each text's softmax over all others, known for images as SEED (Fang et al. 2021,
    arXiv 2101.04731) and for a sparse teacher of a dense model as SPAR (Chen et al. 2021, arXiv 2110.06918); it hardly sees whether two
    texts are far or very far from each other, which decides about large clusters. The second is the mean squared error of the cosines,
    COSINE_WEIGHT times (similarity-preserving distillation, Tung and Mori 2019, arXiv 1907.09682).

    vectors     (n, D) of norm 1
    teacher     (n, E) of norm 1, vectors of the same texts
    text_ids    (n,); copies of a text do not count as others
    The accuracy is the share of texts whose nearest other is the same for both.
    """
    same = text_ids[:, None] == text_ids
    student, target = vectors @ vectors.T, teacher @ teacher.T
    n_others = (~same).sum()
    error = (student - target).masked_fill(same, 0).square().sum() / n_others.clamp(min=1)
    student, target = ((cosines / TEACHER_TEMPERATURE).masked_fill(same, -1e9) for cosines in (student, target))
    divergence = F.kl_div(student.log_softmax(1), target.log_softmax(1), log_target=True, reduction="batchmean")
    agreement = (student.argmax(1) == target.argmax(1)).float().mean().item()
    loss = divergence + COSINE_WEIGHT * error
    return LossResult(loss, agreement, n_others.item() / len(same), spread(vectors, vectors), divergence.item())


def over_prompts(results: list[LossResult], n_pairs: list[int]) -> LossResult:
    """The mean over all pairs, from that over the pairs of each prompt; the spread is the smallest of several pairs."""
    if len(results) == 1:
        return results[0]
    shares = [n / sum(n_pairs) for n in n_pairs]
    means = (
        sum(getattr(r, name) * share for r, share in zip(results, shares, strict=True)) for name in ("loss", "accuracy", "n_negatives")
    )
    spreads = [result.spread for result, n in zip(results, n_pairs, strict=True) if n > 1]
    return LossResult(*means, min(spreads, default=max(result.spread for result in results)))


def batch_loss(batch: PairBatch, device: torch.device, settings: LossSettings, log_temperature: Tensor | None = None) -> LossOfVectors:
    """The loss of a batch as a function of its vectors; with Matryoshka the mean over the shortened vectors and the whole ones.

    Pairs whose texts have a teacher's vectors are learned by distillation, the others by InfoNCE; the loss is the sum of both. Of
    pairs with prompts of their own only those of one prompt are each other's negatives: vectors under different prompts are never
    compared in use, the prompt alone would tell them apart, and a text that is near under one may be far under the other.

    log_temperature    of a learned temperature; None: settings.temperature
    """

    def on_device(numbers: list[int]) -> Tensor:
        return to_device(np.array(numbers, np.int64), device)

    taught = set(batch.taught)
    plain = [row for row in range(batch.n_pairs) if row not in taught]
    of_prompt = [[plain[i] for i in rows] for rows in rows_by_prompt([batch.prompts[row] for row in plain]).values()]
    parts = []  # for pairs of one prompt, last for those with a teacher: rows of anchors and positives, those of negatives, text ids
    for rows in (*of_prompt, batch.taught):
        ids = [batch.text_ids[row] for row in rows]
        columns = [pair[0] for pair in ids], [pair[1] for pair in ids], [i for pair in ids for i in pair[2:]]
        negatives = [number for row in rows for number in batch.negative_rows[row]]
        parts.append((on_device(rows), on_device(negatives), TextIds(*map(on_device, columns))))
    *of_prompt, of_taught = parts
    teacher = to_device(batch.teacher, device) if batch.taught else None

    def loss_of(*vectors: Tensor) -> LossResult:
        temperature = settings.temperature if log_temperature is None else log_temperature.exp()
        results = []
        for dims in (*settings.matryoshka, None):
            unit = [F.normalize(v.float()[:, :dims], dim=-1) for v in vectors]
            both, contrasted = [], []
            for rows, negatives, ids in of_prompt:
                texts = unit if len(rows) == batch.n_pairs else (unit[0][rows], unit[1][rows], unit[2][negatives])
                contrasted.append(info_nce(*texts, ids, temperature, margin=settings.margin, threshold=settings.mask_above))
            if plain:
                both.append(over_prompts(contrasted, [len(rows) for rows, *_ in of_prompt]))
            if batch.taught:
                rows, negatives, ids = of_taught
                both.append(distillation(torch.cat([unit[0][rows], unit[1][rows], unit[2][negatives]]), teacher, torch.cat(ids)))
            loss, spreads = sum(result.loss for result in both), [result.spread for result in both]
            results.append(both[0]._replace(loss=loss, spread=min(spreads), divergence=both[-1].divergence))
        return results[-1]._replace(loss=torch.stack([result.loss for result in results]).mean())

    return loss_of
