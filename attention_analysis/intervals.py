"""Intervals of shares and of their differences, by redrawing texts and, of several runs, the runs.

The bootstrap has two levels: runs are drawn with replacement, then texts, the same texts in every model and the same runs on both sides
of a difference, so that what all models share cancels. Deviations between runs are widened by sqrt(K / (K - 1)), as K draws out of K
vary by that much less than K new runs would (for bootstraps of hierarchical data see Davison & Hinkley 1997, Bootstrap Methods and their
Application, section 3.8). From few runs an interval over them stays a rough one.

Legend: M models, N texts, L layers, C categories, K runs, R redraws.
"""

from collections.abc import Iterator

import numpy as np

from attention_analysis.stored import CATEGORIES, INTERVAL, OF_TEXT, without_bos

REDRAWS = 1000
AT_ONCE = 2**24  # numbers of a block of redraws


def resampled_means(values: np.ndarray, seed: int = 0, redraws: int = REDRAWS) -> np.ndarray:
    """values (M, N, ...) -> their means over texts (M, 1 + R, ...) float64: of the texts as they are, then of each redraw.

    The redraws are the same for all models, and for every call with as many texts.
    """
    n, rng = values.shape[1], np.random.default_rng(seed)
    flat = values.reshape(*values.shape[:2], -1)
    means = np.empty((len(values), 1 + redraws, flat.shape[2]))
    means[:, 0] = flat.mean(1, dtype=np.float64)
    step = max(1, AT_ONCE // n)
    for first in range(0, redraws, step):
        size = min(step, redraws - first)
        counts = rng.multinomial(n, np.full(n, 1 / n), size=size).astype(np.float32)  # (size, N)
        for model, of_model in enumerate(flat):
            means[model, 1 + first : 1 + first + size] = counts @ of_model / n
    return means.reshape(*means.shape[:2], *values.shape[2:])


def drawn_runs(n_runs: int, seed: int = 0, redraws: int = REDRAWS) -> np.ndarray:
    """How much each run counts (1 + R, K) in the mean of a redraw: all alike in the first, then drawn with replacement, widened."""
    even = np.full(n_runs, 1 / n_runs)
    if n_runs == 1:
        return np.ones((1 + redraws, 1))
    drawn = np.random.default_rng(seed + 1).multinomial(n_runs, even, size=redraws) / n_runs
    widened = even + (drawn - even) * np.sqrt(n_runs / (n_runs - 1))
    return np.concatenate([even[None], widened])


def of_sides(means: np.ndarray, models: list[dict]) -> dict[str, np.ndarray]:
    """Means of models (M, 1 + R, ...) -> of each side (1 + R, ...), over its runs. models: what shares.json holds of each."""
    runs = list(dict.fromkeys(model["run"] for model in models if model["run"] is not None))
    sides: dict[str, np.ndarray] = {}
    for name in dict.fromkeys(model["side"] for model in models):
        members = [i for i, model in enumerate(models) if model["side"] == name]
        if models[members[0]]["run"] is None:
            sides[name] = means[members[0]]
        else:
            members.sort(key=lambda i: runs.index(models[i]["run"]))
            sides[name] = np.einsum("rk,kr...->r...", drawn_runs(len(members)), means[members])
    return sides


def pairs_of_sides(names: list[str]) -> list[tuple[str, str]]:
    """(side, the side that is subtracted): each less the base, and the final adapter less each that was kept before it."""
    return [(name, "base") for name in names if name != "base"] + [
        ("adapter", name) for name in names if name not in ("base", "adapter") and "adapter" in names
    ]


def share_rows(by_layer: np.ndarray, models: list[dict]) -> tuple[list[dict], list[dict]]:
    """by_layer (M, N, L, C) -> "shares" and "differences" of shares.json, with and without BOS."""
    shares, differences = [], []
    for bos in (True, False):
        values = by_layer if bos else without_bos(by_layer)
        sides = of_sides(with_all_layers(resampled_means(values)), models)
        for name, means in sides.items():
            shares += rows({"side": name}, means, bos, n_runs(models, name))
        for name, less in pairs_of_sides(list(sides)):
            differences += rows({"side": name, "less": less}, sides[name] - sides[less], bos, n_runs(models, name))
    return shares, differences


def n_runs(models: list[dict], side: str) -> int:
    """Runs behind a side; 0 for the base, which no training has touched."""
    return sum(model["side"] == side and model["run"] is not None for model in models)


def with_all_layers(means: np.ndarray) -> np.ndarray:
    """(..., L, C) -> (..., L + 1, C), the mean over layers behind them."""
    return np.concatenate([means, means.mean(-2, keepdims=True)], -2)


def rows(names: dict, means: np.ndarray, bos: bool, n_seeds: int) -> Iterator[dict]:
    """A row for each layer, and each category and "text", of means (1 + R, L + 1, C), the first of which is the estimate."""
    of_text = [CATEGORIES.index(category) for category in OF_TEXT]
    means = np.concatenate([means, means[..., of_text].sum(-1, keepdims=True)], -1)
    low, high = np.quantile(means[1:], [(1 - INTERVAL) / 2, (1 + INTERVAL) / 2], axis=0)
    n_layers = means.shape[1] - 1
    for layer in range(n_layers + 1):
        for c, category in enumerate((*CATEGORIES, "text")):
            if category != "bos" or bos:
                numbers = {"mean": means[0, layer, c], "low": low[layer, c], "high": high[layer, c]}
                where = {"layer": "all" if layer == n_layers else layer + 1, "category": category, "bos": bos}
                yield names | where | {name: round(float(x), 6) for name, x in numbers.items()} | {"n_seeds": n_seeds}
