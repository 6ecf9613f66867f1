"""Pictures of a text's tokens: bars, the bars of training, layers x tokens, heads.

Weights are the softmax over all tokens of the sequence, so that each side, layer and head sums to 1. Legend: S sides, T tokens, L layers,
H heads.
"""

from typing import TYPE_CHECKING

import numpy as np

from attention_analysis.drawing import COLOURS, MUTED, NAMES, differences, legend_of, percent, points, present, shades, tick, write_on
from attention_analysis.fonts import Fonts
from attention_analysis.looking import Text
from attention_analysis.stored import OF_TEXT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PER_ROW, MOST_PANELS = 60, 16  # tokens of a row of bars, panels of a picture
MOST_COLUMNS = 120  # tokens of a heat map


def cut_middle(text: Text, most: int) -> tuple[Text, int]:
    """At most so many tokens, of the beginning and the end, and how many between them were left out."""
    n = len(text.tokens)
    if n <= most:
        return text, 0
    keep = [*range(most // 2), *range(n - most // 2, n)]
    return text._replace(tokens=[text.tokens[i] for i in keep], weights=text.weights[:, keep]), n - len(keep)


def left_out(n: int) -> str:
    return f"\n{n:,} tokens in the middle, at the dashed line, are left out here, not in attention.json" if n else ""


def mark_cut(axis, place: int) -> None:
    """A dashed line before the token at this place of the axis, where others were left out."""
    axis.axvline(place - 0.5, color=MUTED, linewidth=1, linestyle="--")


def share_line(shares: dict[str, dict[str, float]], side: str) -> str:
    return ", ".join(f"{NAMES[category]} {percent(by_side[side])}" for category, by_side in shares.items())


# ------------------------------------------------------------------------------------------------------------------ bars


def draw_bars(text: Text, title: str, fonts: Fonts) -> "Figure":
    """Rows of tokens, in each a panel a side on a common scale, a bar a token, coloured by its category.

    A bar of BOS that is more than twice as long as any other is cut off, with its weight beside it: others could not be seen.
    """
    shares = text.shares(text.last_layer())
    titles = [f"{side}: {share_line(shares, side)}" for side in text.sides]
    return _bars(text, title, titles, fonts)


def draw_training(text: Text, title: str, fonts: Fonts) -> "Figure":
    """The paper's figure (arXiv 2507.22729, whose notebook shows prompt only, 100 and 20,000 steps): a panel a side, BOS not drawn.

    The weights are still those of the softmax over all tokens; what BOS takes, and the shares of the rest, stand above each panel.
    """
    shares, rest = text.shares(text.last_layer()), text.shares(text.without_bos())
    titles = []
    for side in text.sides:
        bos = shares.get("bos", {}).get(side)
        own = sum(by_side[side] for category, by_side in rest.items() if category in OF_TEXT)
        content = rest["content"][side] if "content" in rest else 0
        beside = "" if bos is None else f" BOS, not drawn, has {percent(bos)};"
        titles.append(f"{side}:{beside} of the rest the text has {percent(own)}, its content words {percent(content)}")
    keep = [i for i, category in enumerate(text.categories) if category != "bos"]
    text = text._replace(tokens=[text.tokens[i] for i in keep], weights=text.weights[:, keep])
    return _bars(text, title, titles, fonts)


def _bars(text: Text, title: str, titles: list[str], fonts: Fonts) -> "Figure":
    import matplotlib.pyplot as plt

    n_sides = len(text.sides)
    text, n_left_out = cut_middle(text, PER_ROW * (MOST_PANELS // n_sides))
    weights, n_tokens = text.last_layer(), len(text.tokens)
    rows = [range(start, min(start + PER_ROW, n_tokens)) for start in range(0, n_tokens, PER_ROW)] or [range(0)]
    per_row, n_panels = max(len(rows[0]), 1), len(rows) * n_sides
    top = _top(weights, text.categories)
    size = (max(9, 0.26 * per_row + 1.5), (1.7 if len(rows) == 1 else 1.2) * n_panels + 0.5 * len(rows) + 1.2)
    figure, axes = plt.subplots(n_panels, 1, figsize=size, squeeze=False, layout="constrained")
    for number, axis in enumerate(axes[:, 0]):
        row, side = rows[number // n_sides], number % n_sides
        axis.bar(range(len(row)), weights[side, row], color=[COLOURS[text.tokens[i]["category"]] for i in row])
        axis.set(xlim=(-0.6, per_row - 0.4), ylim=(0, top), ylabel=fonts.drawable(text.sides[side]))
        axis.yaxis.set_major_formatter(tick)
        axis.tick_params(axis="y", labelsize=8)
        for place, i in enumerate(row):
            if weights[side, i] > top:
                axis.annotate(percent(weights[side, i]), (place + 0.5, 0.85 * top), fontsize=7)
        if n_left_out and n_tokens // 2 in row:
            mark_cut(axis, row.index(n_tokens // 2))
        if number < n_sides:
            axis.set_title(titles[side], fontsize=9, loc="left")
        labels = [fonts.label(text.tokens[i]["piece"]) for i in row] if side == n_sides - 1 else []
        axis.set_xticks(range(len(labels)), labels, rotation=90, fontsize=8)
    _head(figure, title + left_out(n_left_out), text.categories)
    return figure


def _top(weights: np.ndarray, categories: list[str]) -> float:
    """The upper end of the scale of bars: that of the longest bar, unless BOS has it by far."""
    others = weights[:, np.array(categories) != "bos"].max(initial=0) or 1
    longest = weights.max(initial=0) or 1
    return 1.1 * float(others if longest > 2 * others else longest)


def _head(figure: "Figure", title: str, categories: list[str]) -> None:
    """Title at the left, legend of the categories at the bottom."""
    figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    handles = legend_of(categories)
    figure.legend(handles=handles, loc="outside lower left", ncols=len(handles), fontsize=8, frameon=False, handlelength=1.2)


# -------------------------------------------------------------------------------------------------------------- heat maps


def draw_layers(text: Text, title: str, fonts: Fonts) -> "Figure":
    """Layers x tokens, mean over heads: a panel a side on one scale, and the adapter's less the base's. BOS may lie beyond the scale."""
    import matplotlib.pyplot as plt
    from matplotlib.colors import PowerNorm

    text, n_left_out = cut_middle(text, MOST_COLUMNS)
    maps = text.weights.mean(-1).transpose(0, 2, 1)  # (S, L, T)
    n_layers, n_tokens = maps.shape[1:]
    top = maps[:, :, np.array(text.categories) != "bos"].max(initial=0) or 1
    scales = [(shades(), PowerNorm(0.5, 0, top))] * len(maps)
    names = list(text.sides)
    if len(maps) > 1:
        scales.append(_difference_scale(maps[-1] - maps[0], text.categories))
        maps, names = np.concatenate([maps, maps[-1:] - maps[:1]]), [*names, f"{names[-1]} less {names[0]}, in points"]
    tall = max(1.1, min(0.2 * n_layers, 6))
    size = (max(9, 0.17 * n_tokens + 2), len(maps) * (tall + 0.3) + 2.1)
    heights = [0.12, *[tall] * len(maps)]
    figure, axes = plt.subplots(len(heights), 1, figsize=size, height_ratios=heights, squeeze=False, layout="constrained")
    _strip(axes[0, 0], text.categories)
    for axis, values, name, (colours, norm) in zip(axes[1:, 0], maps, names, scales, strict=True):
        image = axis.imshow(values, cmap=colours, norm=norm, aspect="auto", origin="lower", interpolation="nearest")
        axis.set_title(fonts.drawable(name), fontsize=9, loc="left")
        axis.set_ylabel("layer", fontsize=8)
        number_ticks(axis.yaxis, n_layers)
        axis.set_xticks([])
        if n_left_out:
            mark_cut(axis, n_tokens // 2)
        beyond = values.min(initial=0) < norm.vmin, values.max(initial=0) > norm.vmax
        ends = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}
        bar = figure.colorbar(image, ax=axis, pad=0.01, aspect=12, format=points if norm.vmin else tick, extend=ends[beyond])
        bar.ax.tick_params(labelsize=7)
    labels = [fonts.label(token["piece"]) for token in text.tokens]
    axes[-1, 0].set_xticks(range(n_tokens), labels, rotation=90, fontsize=7)
    _head(figure, title + left_out(n_left_out), text.categories)
    return figure


def _difference_scale(values: np.ndarray, categories: list[str]) -> tuple:
    from matplotlib.colors import Normalize

    most = np.abs(values[:, np.array(categories) != "bos"]).max(initial=0) or 1
    return differences(), Normalize(-most, most)


def _strip(axis, categories: list[str]) -> None:
    """A line of cells in the categories' colours above a heat map."""
    from matplotlib.colors import ListedColormap

    names = present(categories)
    axis.imshow([[names.index(category) for category in categories]], cmap=ListedColormap([COLOURS[name] for name in names]), aspect="auto",
                interpolation="nearest", vmin=-0.5, vmax=len(names) - 0.5)  # fmt: skip
    axis.axis("off")


def number_ticks(axis, n: int) -> None:
    """Ticks from 1 to n, a dozen or so, the last among them and none crowded against it."""
    step = -(-n // 12)
    places = [*range(0, n - 1 - step // 2, step), n - 1]
    axis.set_ticks(places, [str(place + 1) for place in places], fontsize=8)


def draw_heads(text: Text, title: str, fonts: Fonts) -> "Figure":
    """Layers x heads: the share of the content words (of the text where it has none), a panel a side, and the difference."""
    categories = np.array(text.categories)
    chosen, of = categories == "content", NAMES["content"]
    if not chosen.any():
        chosen, of = np.isin(categories, OF_TEXT), "text"
    grids = text.weights[:, chosen].sum(1)  # (S, L, H)
    return head_grid(
        grids, [fonts.drawable(side) for side in text.sides], f"{title}\nshare of the {of} in the attention of each head, in %"
    )


def head_grid(grids: np.ndarray, names: list[str], title: str) -> "Figure":
    """Grids (S, L, H) of shares, beside each other on one scale, and the last less the first."""
    import matplotlib.pyplot as plt
    from matplotlib.colors import Normalize

    n_layers, n_heads = grids.shape[1:]
    panels = [(grid, name, shades(), Normalize(0, float(grids.max()) or 1)) for grid, name in zip(grids, names, strict=True)]
    if len(grids) > 1:
        less = grids[-1] - grids[0]
        most = float(np.abs(less).max()) or 1
        panels.append((less, f"{names[-1]} less {names[0]}, in points", differences(), Normalize(-most, most)))
    wide, tall = max(2.6, min(0.42 * n_heads, 8)), max(1.8, min(0.34 * n_layers, 9))
    size = (max(9, len(panels) * (wide + 0.9)), tall + 1.4)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    for axis, (values, name, colours, norm) in zip(axes[0], panels, strict=True):
        image = axis.imshow(values, cmap=colours, norm=norm, aspect="auto", origin="lower", interpolation="nearest")
        axis.set_title(name, fontsize=9, loc="left")
        axis.set_xlabel("head", fontsize=8)
        axis.set_ylabel("layer", fontsize=8)
        number_ticks(axis.xaxis, n_heads)
        number_ticks(axis.yaxis, n_layers)
        write_on(axis, values, colours, norm)
        bar = figure.colorbar(image, ax=axis, pad=0.02, format=points if norm.vmin else tick)
        bar.ax.tick_params(labelsize=7)
    figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    return figure
