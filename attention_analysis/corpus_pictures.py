"""Pictures of a corpus: shares by step of training, layers x categories, differences, each with BOS and without, and heads.

Points and bands are the means and 95 % intervals of shares.json, over texts and, with several runs, over their seeds.
"""

from typing import TYPE_CHECKING

import numpy as np

from attention_analysis.drawing import COLOURS, INK, MARKERS, MUTED, NAMES, SHORT, differences, shades, signless, write_on
from attention_analysis.looking import Corpus
from attention_analysis.text_pictures import head_grid, number_ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WITH_BOS = {True: "all tokens", False: "without BOS"}
LINES = {True: "-", False: "--"}


def draw_training(corpus: Corpus, title: str) -> "Figure":
    """The training curve of attention: shares by side, in the last layer and as mean over layers. Thin lines are single runs."""
    import matplotlib.pyplot as plt

    layers = [corpus.n_layers, "all"]
    size = (max(9.5, 1.1 * len(corpus.sides) + 5), 7.6)
    figure, axes = plt.subplots(2, 2, figsize=size, sharex=True, squeeze=False, layout="constrained")
    for axis, (layer, bos) in zip(axes.flat, [(layer, bos) for layer in layers for bos in (True, False)], strict=True):
        for category in corpus.kinds(bos):
            _curve(axis, corpus, layer, bos, category)
        axis.set_title(f"{corpus.layer_name(layer)}, {WITH_BOS[bos]}", fontsize=9, loc="left")
        axis.set_ylabel("share of the attention, %", fontsize=8)
        axis.set_ylim(0)
        axis.grid(axis="y", color="#e8ebee", linewidth=0.8)
        axis.set_axisbelow(True)
        turned = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if len(corpus.sides) > 6 else {}
        axis.set_xticks(range(len(corpus.sides)), corpus.sides, fontsize=8, **turned)
        axis.tick_params(axis="y", labelsize=8)
    _head(figure, f"{title}\n{corpus.stored.about['note']}", corpus)
    return figure


def _curve(axis, corpus: Corpus, layer: int | str, bos: bool, category: str) -> None:
    rows = [corpus.shares.get((side, layer, category, bos)) for side in corpus.sides]
    at = [i for i, row in enumerate(rows) if row]
    mean, low, high = (np.array([100 * rows[i][name] for i in at]) for name in ("mean", "low", "high"))
    line = {"color": COLOURS[category], "marker": MARKERS[category], "markersize": 4.5, "linewidth": 1.8}
    if len(at) > 1:
        axis.fill_between(at, low, high, color=COLOURS[category], alpha=0.2, linewidth=0)
    else:
        axis.errorbar(at, mean, [mean - low, high - mean], color=COLOURS[category], capsize=3)
    axis.plot(at, mean, **line)
    for run in corpus.runs(layer, bos, category):
        axis.plot(*run, color=COLOURS[category], linewidth=0.6, alpha=0.6)


def draw_layers(corpus: Corpus, title: str) -> "Figure":
    """Layers x categories: the first side, the last, and their difference, with BOS above and without below."""
    import matplotlib.pyplot as plt
    from matplotlib.colors import Normalize

    first, last = corpus.ends
    names = [first] if first == last else [first, last, f"{last} less {first} in points"]
    wide, tall = 0.5 * len(corpus.categories(True)) + 1.4, max(1.5, min(0.28 * corpus.n_layers, 9))
    size = (max(6, len(names) * wide), 2 * tall + 3)
    figure, axes = plt.subplots(2, len(names), figsize=size, squeeze=False, layout="constrained")
    for line, bos in zip(axes, (True, False), strict=True):
        categories = corpus.categories(bos)
        grids = [corpus.grid(side, bos, categories) for side in dict.fromkeys((first, last))]
        top = max(float(grid.max()) for grid in grids) or 1
        panels = [(grid, shades(), Normalize(0, top)) for grid in grids]
        if len(grids) > 1:
            less = grids[1] - grids[0]
            most = float(np.abs(less).max()) or 1
            panels.append((less, differences(), Normalize(-most, most)))
        for axis, (values, colours, norm), name in zip(line, panels, names, strict=True):
            axis.imshow(values, cmap=colours, norm=norm, aspect="auto", origin="lower", interpolation="nearest")
            axis.set_title(f"{name}, {WITH_BOS[bos]}", fontsize=9, loc="left")
            axis.set_ylabel("layer", fontsize=8)
            axis.set_xticks(range(len(categories)), [SHORT[category] for category in categories], rotation=45, ha="right", fontsize=8)
            number_ticks(axis.yaxis, corpus.n_layers)
            write_on(axis, values, colours, norm, most=1000)
    figure.suptitle(f"{title}\nmean share of the attention in each layer, in %", fontsize=9, x=0.01, ha="left")
    return figure


def draw_differences(corpus: Corpus, title: str) -> "Figure":
    """The last side less the first, a line a category, in the last layer and as mean over layers, with intervals in figures."""
    import matplotlib.pyplot as plt

    categories = corpus.kinds(True)
    figure, axes = plt.subplots(1, 2, figsize=(12, 0.62 * len(categories) + 1.9), sharex=True, sharey=True, layout="constrained")
    for axis, bos in zip(axes, (True, False), strict=True):
        for place, category in enumerate(categories):
            if category not in corpus.kinds(bos):
                continue
            for offset, layer in ((-0.17, corpus.n_layers), (0.17, "all")):
                if row := corpus.differences.get((layer, category, bos)):
                    _interval(axis, row, place + offset, category, filled=layer != "all")
        axis.axvline(0, color=MUTED, linewidth=0.8)
        axis.set_ylim(len(categories) - 0.5, -0.5)
        axis.set_yticks(range(len(categories)), [NAMES[category] for category in categories], fontsize=8)
        axis.set_xlabel("difference of the shares, points", fontsize=8)
        axis.tick_params(axis="x", labelsize=8)
        axis.set_title(WITH_BOS[bos], fontsize=9, loc="left")
    first, last = corpus.ends
    marks = f"●  {corpus.layer_name(corpus.n_layers)}   □  {corpus.layer_name('all')}; {corpus.stored.about['note']}"
    figure.suptitle(f"{title}\n{last} less {first}: {marks}", fontsize=9, x=0.01, ha="left")
    return figure


def _interval(axis, row: dict, y: float, category: str, *, filled: bool) -> None:
    """A point with its interval, and both in figures at the right."""
    mean, low, high = (100 * row[name] for name in ("mean", "low", "high"))
    colour, marker = COLOURS[category], "o" if filled else "s"
    axis.plot([low, high], [y, y], color=colour, linewidth=1.6, marker="|", markersize=7)
    axis.plot(mean, y, color=colour, marker=marker, markersize=6, markerfacecolor=colour if filled else "white")
    line = f"{signless(f'{mean:+.1f}')} ({signless(f'{low:.1f}')} to {signless(f'{high:.1f}')})"
    axis.text(1.02, y, line, fontsize=7.5, va="center", transform=axis.get_yaxis_transform())


def draw_differences_by_layer(corpus: Corpus, title: str) -> "Figure":
    """The last side less the first in every layer, a panel a category: a line with BOS, a dashed one without."""
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    categories = corpus.kinds(True)
    n_columns = min(4, len(categories))
    n_rows = -(-len(categories) // n_columns)
    size = (3 * n_columns + 0.6, 2.2 * n_rows + 1.2)
    figure, axes = plt.subplots(n_rows, n_columns, figsize=size, sharey=True, squeeze=False, layout="constrained")
    layers = range(1, corpus.n_layers + 1)
    for axis, category in zip(axes.flat, categories, strict=False):
        for bos, line in LINES.items():
            if category not in corpus.kinds(bos):
                continue
            rows = [corpus.differences.get((layer, category, bos)) for layer in layers]
            at = [layer for layer, row in zip(layers, rows, strict=True) if row]
            mean, low, high = ([100 * row[name] for row in rows if row] for name in ("mean", "low", "high"))
            colour = COLOURS[category] if bos else MUTED if category == "text" else INK
            axis.fill_between(at, low, high, color=colour, alpha=0.2, linewidth=0)
            axis.plot(at, mean, line, color=colour, marker=".")
        axis.axhline(0, color=MUTED, linewidth=0.8)
        axis.set_title(NAMES[category], fontsize=9, loc="left")
        axis.set_xlabel("layer", fontsize=8)
        axis.set_xlim(0.6, corpus.n_layers + 0.4)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.tick_params(labelsize=8)
    for axis in axes.flat[len(categories) :]:
        axis.axis("off")
    handles = [Line2D([], [], color=INK, linestyle=line, marker=".", label=WITH_BOS[bos]) for bos, line in LINES.items()]
    figure.legend(handles=handles, loc="outside lower left", ncols=2, fontsize=8, frameon=False)
    figure.supylabel("difference of the shares, points", fontsize=8)
    first, last = corpus.ends
    figure.suptitle(
        f"{title}\n{last} less {first} in every layer, mean over heads; {corpus.stored.about['note']}", fontsize=9, x=0.01, ha="left"
    )
    return figure


def draw_heads(corpus: Corpus, title: str) -> "Figure":
    """Layers x heads: mean share of the content words for the first and the last side, and the difference."""
    names = list(dict.fromkeys(corpus.ends))
    grids = np.stack([corpus.heads(side, "content") for side in names])
    title = title.removesuffix(", mean over heads")  # that of the other pictures; here each head is by itself
    return head_grid(grids, names, f"{title}\nshare of the content words in the attention of each head, BOS included, in %")


def _head(figure: "Figure", title: str, corpus: Corpus) -> None:
    """Title at the left, legend of the categories with their markers at the bottom."""
    from matplotlib.lines import Line2D

    figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    categories = corpus.kinds(True)
    handles = [Line2D([], [], color=COLOURS[category], marker=MARKERS[category], label=NAMES[category]) for category in categories]
    figure.legend(handles=handles, loc="outside lower left", ncols=len(handles), fontsize=8, frameon=False)
