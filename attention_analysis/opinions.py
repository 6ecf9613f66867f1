"""Second opinions beside the last token's attention: of every token of single texts, by name.

Legend: T tokens of all texts, S sides, L layers, H heads, C categories.
"""

from typing import TYPE_CHECKING

import numpy as np

from attention_analysis.stored import ALSO, CATEGORIES

if TYPE_CHECKING:
    from encoder import Encoder


def second_opinions(encoder: "Encoder", texts: list[str], role: str, names: list[str]) -> dict[str, np.ndarray]:
    """One side's values of every token, one text behind the other: (T, L, H) of "received", else (T,). names: of ALSO."""
    from attention_analysis.gradients import gradient_times_input
    from attention_analysis.received import received_attention
    from attention_analysis.rollout import attention_rollout

    ways = {"received": received_attention, "rollout": attention_rollout, "gradient": gradient_times_input}
    return {name: np.concatenate(ways[name](encoder, texts, role)) for name in names}


def opinion_shares(name: str, values: np.ndarray, tokens: list[dict]) -> dict[str, float]:
    """Each category's share of one side's values of a text, of "received" in the last layer, of "gradient" by absolute value.

    values    (n, L, H) or (n,)
    """
    of_token = values[:, -1].mean(1) if name == "received" else np.abs(values)
    total = of_token.sum() or 1
    categories = np.array([token["category"] for token in tokens])
    return {c: float(of_token[categories == c].sum() / total) for c in CATEGORIES if c in categories}


def opinion_lines(about: dict, starts: np.ndarray, also: dict[str, np.ndarray]) -> list[str]:
    """Mean shares over texts for every second opinion and side. about: of attention.json; also: arrays (S, T, ...)."""
    lines = []
    for name, values in also.items():
        lines.append(f"{name}: {ALSO[name]}")
        for side, of_side in zip(about["sides"], values, strict=True):
            shares = [opinion_shares(name, of_side[starts[i] : starts[i + 1]], text["tokens"]) for i, text in enumerate(about["texts"])]
            means = {c: np.mean([of_text.get(c, 0) for of_text in shares]) for c in CATEGORIES if any(c in of_text for of_text in shares)}
            lines.append(f"{side['name']:>11}: " + ", ".join(f"{c} {100 * mean:.1f} %" for c, mean in means.items()))
    return lines
