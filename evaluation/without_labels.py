"""evaluate.py --texts: the table's rows compared on texts without labels, see tasks/unlabelled.py."""

import argparse

import numpy as np

from evaluation.baselines import is_baseline
from evaluation.observing import Sample
from evaluation.report_map import TEXTS, KeptVectors
from evaluation.rows import table_rows
from files.console import InputError, say
from files.reading import read_texts
from tasks import unlabelled


def read_unlabelled(args: argparse.Namespace) -> tuple[list[str], list[unlabelled.HiddenWords]]:
    """The texts of --texts, copies left out, and the same with words hidden. Raises InputError where they are too few."""
    texts, summary = read_texts(args.texts, args.column)
    say(summary)
    different = list(dict.fromkeys(text for _, text in texts))
    chosen = np.random.default_rng(0).permutation(len(different))[: unlabelled.MAX_TEXTS]
    drawn = [different[i] for i in np.sort(chosen)]
    splits = unlabelled.hide_words(drawn)
    if not splits:
        raise InputError(f"{args.texts}: fewer than {unlabelled.MIN_TEXTS} of {len(different)} texts share words with others: too few")
    return drawn, splits


def compare_on_texts(
    args: argparse.Namespace, splits: list[unlabelled.HiddenWords], failures: list[str], texts: list[str], kept: KeptVectors | None
) -> list[dict]:
    """Print a table of the rows' scores and what each is against the first, and return it. Raises InputError.

    A run stands below its untuned base under the same contract; a row that is there already is not repeated. Where `kept` wants a row,
    the whole `texts` are encoded by it as well.
    """
    rows, scores = [], {}
    for models in table_rows(args, "Clustering", failures):
        for model in models:
            if model.fingerprint in scores or (model.better_of and model is not models[0]):
                continue  # which setting of a baseline is the better one labels would tell
            scores[model.fingerprint] = [unlabelled.scores(model.encode_texts(split.texts, "document"), split) for split in splits]
            row = {"model": model.label, "fingerprint": model.fingerprint, "contract": model.contract, "computed": model.computed}
            rows.append(row | {"score": float(np.mean(np.concatenate(scores[model.fingerprint])))})
            cell = rows[-1] | {"task": TEXTS, "type": "Clustering"}
            if kept is not None and kept.wants(cell):
                kept.add(cell, Sample(texts, None, model.encode([{"text": texts}]), len(texts)))
    if not rows:
        raise InputError("; ".join(failures))
    rows.sort(key=lambda row: is_baseline(row["fingerprint"]))  # baselines last: the first row is what the others are compared with
    for row in rows[1:]:
        result = unlabelled.compare(*(scores[r["fingerprint"]] for r in (rows[0], row)), splits)
        row |= {"ratio": result.ratio, "interval": [result.low, result.high], "verdict": result.verdict}
    width = max(len(row["model"]) for row in rows)
    say(f"{'model'.ljust(width)}   score   against the first (95 % interval)")
    for row in rows:
        against = ""
        if "ratio" in row:
            low, high = row["interval"]
            against = f"{row['ratio']:.3f} ({low:.3f} to {high:.3f}): {row['verdict']}"
        say(f"{row['model'].ljust(width)}  {row['score']:6.2f}   {against}".rstrip())
    say(f"score: likeness of hidden words in a cluster, 1 is chance; {unlabelled.ADVICE}")
    return rows
