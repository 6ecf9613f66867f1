"""Shares of the last token's attention by category of token, over a corpus: a batch at a time, of the weights only their sums are kept.

Legend: M models, N texts, B texts of a batch, L layers, H heads, C categories.
"""

from typing import TYPE_CHECKING

import numpy as np

from attention_analysis.categories import Categories, categorize
from attention_analysis.intervals import share_rows
from attention_analysis.sides import Side, load_sides, seed_of, warn_of_pooling
from attention_analysis.stored import CATEGORIES, StoredCorpus
from files.console import Progress
from prompts import prompt_label

if TYPE_CHECKING:
    from encoder import Encoder, EncodingReport

NORMALIZATION = "softmax over all tokens of the sequence, mean over heads"


def measure(
    encoder: "Encoder", texts: list[str], categories: Categories, role: str, report: "EncodingReport", progress: Progress
) -> tuple[np.ndarray, np.ndarray]:
    """Shares (N, L, C), mean over heads, and (L, H, C), mean over texts; a text without a token has none.

    One forward pass; memory grows with the texts by L x C numbers each.
    """
    import torch

    from encoder.token_attention import attention_rows

    n_layers, n_heads, n = len(encoder.blocks), encoder.decoder.config.num_attention_heads, len(CATEGORIES)
    by_layer, by_head = np.zeros((len(texts), n_layers, n), np.float32), np.zeros((n_layers, n_heads, n))
    for batch in attention_rows(encoder, texts, role, report=report):
        of_tokens = [
            categories.of_sequence(number, encoder.prompt_tokenizer.parts(len(ids), span)) + n * i
            for i, (number, ids, span) in enumerate(zip(batch.numbers, batch.ids, batch.spans, strict=True))
        ]
        index = torch.from_numpy(np.concatenate(of_tokens)).to(batch.weights.device)
        sums = batch.weights.new_zeros(len(of_tokens) * n, n_layers * n_heads).index_add_(0, index, batch.weights.flatten(1))
        sums = sums.view(len(of_tokens), n, n_layers, n_heads).permute(0, 2, 3, 1)  # (B, L, H, C)
        by_layer[batch.numbers] = sums.mean(2).cpu().numpy()
        by_head += sums.double().sum(0).cpu().numpy()
        progress.update(len(of_tokens))
    return by_layer, by_head / len(texts)


def measure_sides(
    sides: list[Side], texts: list[str], way: str | None, role: str, settings: dict
) -> tuple[dict, np.ndarray, np.ndarray, list[str]]:
    """What shares.json says of the models, by_layer (M, N, L, C), by_head (M, L, H, C), and the warnings.

    way         how content words are told from function words, see `categorize`
    settings    of `Encoder.load`
    """
    from encoder import EncodingReport

    models, measured, warnings, categories = [], [], [], None
    with Progress(len(sides) * len(texts), "reading attention", "text") as progress:
        for side, encoder in load_sides(sides, **settings):
            categories = categories or categorize(encoder.tokenizer.backend_tokenizer, texts, way)
            report, prompt = EncodingReport(), prompt_label(encoder.contract.prompts)
            measured.append(measure(encoder, texts, categories, role, report, progress))
            name = side.name if side.run is None else f"{side.run}, {side.name}"
            known = {"seed": seed_of(side.run) if side.run else None, "step": side.step, "fingerprint": encoder.fingerprint}
            models.append({"name": name, "run": side.run, "side": side.name} | known)
            warnings += [*encoder.notes, *warn_of_pooling(encoder.contract), *report.warnings()]
            del encoder  # before the next one is loaded
    n_layers, n_heads = measured[0][1].shape[:2]
    about = {"prompt": prompt, "role": role, "how": categories.how, "layers": n_layers, "heads": n_heads, "models": models}
    return about, *(np.stack(arrays) for arrays in zip(*measured, strict=True)), list(dict.fromkeys(warnings))


def note_on_intervals(n_runs: int) -> str:
    """Over what the intervals are. n_runs: 0 for a base alone."""
    if n_runs < 2:
        return "95 % intervals over texts only" + ": one run says nothing about another training" * n_runs
    return f"95 % intervals over texts and over {n_runs} runs" + ", rough ones as the runs are few" * (n_runs < 5)


def make_corpus(about: dict, by_layer: np.ndarray, by_head: np.ndarray) -> StoredCorpus:
    """All that is stored, intervals included. about: what `measure_sides` returned, and "data"."""
    n_runs = len({model["run"] for model in about["models"]} - {None})
    shares, differences = share_rows(by_layer, about["models"])
    more = {"n_texts": by_layer.shape[1], "normalization": NORMALIZATION, "categories": list(CATEGORIES), "note": note_on_intervals(n_runs)}
    return StoredCorpus(about | more | {"shares": shares, "differences": differences}, by_layer, by_head)
