"""Hard negatives for pairs, chosen by a model's own mistakes."""

import argparse
from collections import defaultdict

from files.console import InputError, say, warn
from pair_engines.inputs import read_input

SIMILARITIES_AT_ONCE = 2**26  # entries of the similarity matrix of one step of mining: 256 MiB in float32


def mined_pairs(args: argparse.Namespace) -> list[dict]:
    """The pairs with hard negatives: for each anchor the most similar texts of a corpus that are probably wrong answers.

    Never taken are the anchor's text itself, the positives of all anchors with that text, and any text whose cosine to the
    anchor is above `--below` times the positive's cosine, because it may be a right answer
    (TopK-PercPos: de Souza Moreira et al. 2024, arXiv 2407.15831).
    Raises InputError where pairs bring prompts of their own.
    """
    import torch
    import torch.nn.functional as F

    from encoder import Encoder, EncodingReport
    from training.pair_data import read_pair_rows

    pairs = [row for _, row in read_pair_rows(args.pairs)][: args.limit]
    if any(pair.get("prompt") for pair in pairs):
        raise InputError(
            f"{args.pairs}: pairs with prompts of their own are not mined, as what is near depends on the prompt: leave it out"
        )
    candidates = [text for _, text in read_input(args.corpus, args.column)] if args.corpus else [pair["positive"] for pair in pairs]
    corpus = list(dict.fromkeys(candidates))
    encoder, report = Encoder.load(args.model, dtype=args.dtype, device=args.device), EncodingReport()
    encoder.merge()

    def embed(texts: list[str], role: str) -> torch.Tensor:
        vectors = encoder.encode(texts, role, progress=True, report=report)
        return F.normalize(torch.from_numpy(vectors).to(encoder.device), dim=-1)  # (N, D)

    anchors = embed([pair["anchor"] for pair in pairs], "query")
    positives = embed([pair["positive"] for pair in pairs], "document")
    add_negatives(pairs, anchors, positives, corpus, embed(corpus, "document"), args.negatives, args.below)
    for line in [*encoder.notes, *report.warnings()]:
        warn(line)
    n_short = sum(len(pair["negatives"]) < args.negatives for pair in pairs)
    say(
        f"{len(corpus)} candidates, fingerprint {encoder.fingerprint}; "
        f"{n_short} of {len(pairs)} pairs have fewer than {args.negatives} negatives"
    )
    return pairs


def add_negatives(pairs: list[dict], anchors, positives, corpus: list[str], candidates, n_negatives: int, below: float) -> None:
    """Write "negatives" and "scores" into each pair.

    anchors, positives   (N, D) unit vectors of the pairs' texts
    candidates           (C, D) unit vectors of the texts of `corpus`
    """
    import torch

    number_of = {text: i for i, text in enumerate(corpus)}
    not_negative = defaultdict(set)  # anchor text -> numbers of the corpus texts that are right answers to it
    for pair in pairs:
        not_negative[pair["anchor"]] |= {number_of[text] for text in (pair["anchor"], pair["positive"]) if text in number_of}
    positive_cosines = (anchors * positives).sum(1)  # (N,)
    n_best, step = min(n_negatives, len(corpus)), max(1, SIMILARITIES_AT_ONCE // len(corpus))
    for start in range(0, len(pairs), step):
        rows = slice(start, start + step)
        similarity = anchors[rows] @ candidates.T  # (rows, C)
        similarity[similarity > below * positive_cosines[rows, None]] = -torch.inf
        for i, pair in enumerate(pairs[rows]):
            similarity[i, list(not_negative[pair["anchor"]])] = -torch.inf
        best, numbers = (x.tolist() for x in similarity.topk(n_best, dim=1))
        for i, pair in enumerate(pairs[rows]):
            negatives = [(corpus[n], cosine) for n, cosine in zip(numbers[i], best[i], strict=True) if cosine > -torch.inf]
            pair["negatives"] = [text for text, _ in negatives]
            pair["scores"] = [round(cosine, 4) for cosine in (positive_cosines[start + i].item(), *(c for _, c in negatives))]
