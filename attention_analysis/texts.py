"""Single texts: what the last token attends to, token by token, in every layer and head of every side."""

from collections.abc import Sequence

import numpy as np

from attention_analysis.categories import categorize
from attention_analysis.opinions import second_opinions
from attention_analysis.sides import Side, load_sides, warn_of_pooling
from attention_analysis.stored import ALSO, CATEGORIES, StoredTexts, without_bos
from files.console import InputError
from prompts import prompt_label

NORMALIZATION = "softmax over all tokens of the sequence, mean over heads"
MOST_NUMBERS = 2**29  # that are kept of all texts: 2 GiB
IN_JSON = ("base", "adapter")  # the sides whose weights of the last layer are beside each token; all are in the .npz


def look(
    sides: list[Side], texts: list[str], way: str | None, role: str, settings: dict, also: Sequence[str] = ()
) -> tuple[StoredTexts, dict[str, np.ndarray], list[str]]:
    """Every text's tokens and weights, the second opinions by name, and the warnings.

    way         how content words are told from function words, see `categorize`
    settings    of `Encoder.load`
    also        second opinions, names of ALSO
    Raises InputError for a text without a token, and for more texts than can be kept whole.
    """
    from encoder import EncodingReport

    described, weights, opinions, warnings, tokens = [], [], [], [], None
    for side, encoder in load_sides(sides, **settings):
        report, layers = EncodingReport(), range(1, len(encoder.blocks) + 1)
        check_size(encoder, texts, role, len(sides))
        rows = encoder.last_token_attention(texts, role, layers=layers, report=report)
        if tokens is None:
            categories = categorize(encoder.tokenizer.backend_tokenizer, texts, way)
            tokens = [(row.pieces, row.parts, categories.of_sequence(i, row.parts)) for i, row in enumerate(rows)]
        if not all(row.pieces for row in rows):
            raise InputError("an empty text without a prompt has no tokens to look at")
        weights.append(np.concatenate([row.weights for row in rows]))
        opinions.append(second_opinions(encoder, texts, role, also))
        described.append({"name": side.name, "step": side.step, "fingerprint": encoder.fingerprint})
        warnings += [*encoder.notes, *warn_of_pooling(encoder.contract), *report.warnings()]
        prompt = prompt_label(encoder.contract.prompts)
        del encoder  # before the next one is loaded
    stacked = np.stack(weights)  # (S, T, L, H)
    starts = np.cumsum([0, *(len(pieces) for pieces, _, _ in tokens)])
    names = [side.name for side in sides]
    items = [describe(text, *tokens[i], stacked[:, starts[i] : starts[i + 1], -1].mean(2), names) for i, text in enumerate(texts)]
    about = {"prompt": prompt, "role": role, "normalization": NORMALIZATION, "how": categories.how, "sides": described}
    about |= {"layers": stacked.shape[2], "heads": stacked.shape[3], "texts": items}
    if also:
        about["also"] = {name: ALSO[name] for name in also}
    arrays = {name: np.stack([of_side[name] for of_side in opinions]) for name in also}
    return StoredTexts(about, starts, stacked), arrays, list(dict.fromkeys(warnings))


def check_size(encoder, texts: list[str], role: str, n_sides: int) -> None:
    """Raise InputError where the weights of all texts would be more than MOST_NUMBERS."""
    n_tokens = sum(map(len, encoder.tokenize(texts, role).ids))
    if n_tokens * len(encoder.blocks) * encoder.decoder.config.num_attention_heads * n_sides > MOST_NUMBERS:
        raise InputError(
            f"{n_tokens:,} tokens in every layer and head are too many to keep: give fewer texts, or measure shares with --data"
        )


def describe(text: str, pieces: list[str], parts: list[str], categories: np.ndarray, last: np.ndarray, names: list[str]) -> dict:
    """A text of attention.json. last: weights (S, n) of the last layer, mean over heads."""
    shares = np.stack([np.bincount(categories, of_side, len(CATEGORIES)) for of_side in last])  # (S, C)
    present = [c for c in range(len(CATEGORIES)) if (categories == c).any()]

    def named(values: np.ndarray) -> dict:
        return {CATEGORIES[c]: dict(zip(names, values[:, c].tolist(), strict=True)) for c in present}

    others = named(without_bos(shares))
    others.pop("bos", None)
    kept = [(name, row.tolist()) for name, row in zip(names, last, strict=True) if name in IN_JSON]
    tokens = [
        {"piece": piece, "part": part, "category": CATEGORIES[category]} | {name: row[i] for name, row in kept}
        for i, (piece, part, category) in enumerate(zip(pieces, parts, categories, strict=True))
    ]
    return {"text": text, "shares": named(shares), "shares_without_bos": others, "tokens": tokens}
