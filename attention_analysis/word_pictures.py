"""The words of a text shaded by weight: lines of words as they are read, the base's line above the adapter's.

Lengths are in points. The picture is laid out by hand, since matplotlib does not wrap text that is made of many pieces.
"""

import functools
import unicodedata
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from attention_analysis.drawing import COLOURS, MUTED, legend_of, percent, present, shades
from attention_analysis.fonts import Fonts
from attention_analysis.looking import Text
from attention_analysis.words import Word, words_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


MOST_LINES = 24  # of a longer text the middle is left out
MOST_CHARACTERS = 48  # of a word, as it is drawn
SIZE, WIDTH, MARGIN = 9.5, 720, 62  # of the letters, of a line, left of it for the name of the side
LINE, BETWEEN = 18, 9  # height of a line, distance of pairs of lines


class Shaded(NamedTuple):
    """A word as it is drawn."""

    text: str
    gap: str  # white space before it
    weights: list[float]  # of every side
    category: str  # "" for what stands for words that were left out
    leftwards: bool  # written from right to left


class Placed(NamedTuple):
    word: Shaded
    x: float
    width: float


def draw_words(text: Text, title: str, fonts: Fonts) -> "Figure":
    """For each side the shares of the categories as a bar, then the lines of the text with every word shaded by its weight.

    Darker is more, on one scale for all sides that ends with the heaviest word that is not BOS; BOS has its weight beside it.
    """
    import matplotlib.pyplot as plt
    from matplotlib.colors import PowerNorm

    weights = text.last_layer()  # (S, T)
    words = [_shade(word, weights, text.tokens, fonts) for word in words_of(text.tokens)]
    lines, n_left_out = cut_lines(layout(words, measure_with(fonts), WIDTH))
    if n_left_out:
        title += f"\n{n_left_out:,} words in the middle are left out here, not in attention.json"
    top = max((max(word.weights) for word in words if word.category != "bos"), default=1) or 1
    norm = PowerNorm(0.5, 0, top, clip=True)
    n_sides, n_title = len(text.sides), len(title.splitlines())
    above = 13 * n_title + 70 + 15 * n_sides
    height = above + len(lines) * (n_sides * LINE + BETWEEN)
    figure = plt.figure(figsize=((WIDTH + MARGIN + 20) / 72, height / 72))
    figure.text(12 / (WIDTH + MARGIN + 20), 1 - 8 / height, title, va="top", fontsize=9, linespacing=1.3)
    _draw_shares(figure, text, 1 - (13 * n_title + 38) / height, height)
    _draw_scale(figure, norm, 1 - (above - 8) / height, height)
    area = figure.add_axes((0, 0, 1, (height - above) / height))
    area.set(xlim=(-MARGIN, WIDTH + 20), ylim=(height - above, 0))
    area.axis("off")
    for number, line in enumerate(lines):
        for side, name in enumerate(text.sides):
            y = number * (n_sides * LINE + BETWEEN) + side * LINE
            area.text(-8, y + LINE / 2, fonts.drawable(name), ha="right", va="center_baseline", fontsize=7.5, color=MUTED)
            for placed in line:
                _draw_word(area, placed, side, y, norm)
    return figure


def cut_lines(lines: list[list["Placed"]]) -> tuple[list[list["Placed"]], int]:
    """At most MOST_LINES lines, of the beginning and the end with a note between them, and how many words it stands for."""
    half = MOST_LINES // 2
    n_left_out = sum(map(len, lines[half:-half])) if len(lines) > MOST_LINES else 0
    if not n_left_out:
        return lines, 0
    note = Shaded(f"[{n_left_out:,} words]", "", [0.0] * len(lines[0][0].word.weights), "", False)
    return [*lines[:half], [Placed(note, 0, 0)], *lines[-half:]], n_left_out


def _shade(word: Word, weights: np.ndarray, tokens: list[dict], fonts: Fonts) -> Shaded:
    sums = weights[:, word.start : word.stop].sum(1).tolist()
    drawn = fonts.drawable(word.text)
    if len(drawn) > MOST_CHARACTERS:
        drawn = drawn[: MOST_CHARACTERS - 1] + "…"
    gap = word.gap if tokens[word.start]["part"] == "text" else word.gap[:1].replace("\n", " ")
    if word.start and tokens[word.start - 1]["category"] == "bos":
        gap = " "  # its weight stands between
    return Shaded(drawn, gap, sums, word.category, _is_leftwards(word.text))


def _is_leftwards(text: str) -> bool:
    """Whether a word is of a script that is written from right to left."""
    strong = [kind for kind in map(unicodedata.bidirectional, text) if kind in ("L", "R", "AL")]
    return bool(strong) and strong[0] != "L"


def measure_with(fonts: Fonts) -> Callable[[str], float]:
    """A function that tells how wide a text is."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties

    renderer = FigureCanvasAgg(Figure(dpi=720)).get_renderer()  # in tenths of a point: at 72 dots an inch widths are rounded
    font = FontProperties(family=fonts.families, size=SIZE)
    return functools.cache(lambda text: renderer.get_text_width_height_descent(text, font, ismath=False)[0] / 10)


def layout(words: list[Shaded], measure: Callable[[str], float], width: float) -> list[list[Placed]]:
    """Lines of words, none of which ends right of `width` unless it stands alone. Words from right to left stand in that order."""
    space = measure("a a") - measure("aa")
    lines, line, x = [], [], 0.0
    for word in words:
        wide = 4 + max(measure(label) for label in {label_of(word, weight) for weight in word.weights})
        lead, breaks = 1.0, "\n" in word.gap
        if word.gap:
            lead = min(len(word.gap.rpartition("\n")[2]), 24) * space
        if line and (breaks or x + lead + wide > width):
            lines.append(_in_visual_order(line))
            line, x = [], 0.0
        if breaks or line:
            x += lead
        line.append(Placed(word, x, wide))
        x += wide
    return [*lines, _in_visual_order(line)]


def _in_visual_order(line: list[Placed]) -> list[Placed]:
    """Reverse each run of words that are written leftwards, with what stands between them."""
    i, result = 0, list(line)
    while i < len(line):
        stop = i
        for j in range(i, len(line)):
            if line[j].word.leftwards:
                stop = j + 1
            elif any(unicodedata.bidirectional(c) == "L" for c in line[j].word.text):
                break
        if line[i].word.leftwards and stop > i + 1:
            left, right = line[i].x, line[stop - 1].x + line[stop - 1].width
            result[i:stop] = [placed._replace(x=left + right - placed.x - placed.width) for placed in line[i:stop]]
        i = max(stop, i + 1) if line[i].word.leftwards else i + 1
    return result


def label_of(word: Shaded, weight: float) -> str:
    return f"{word.text} {percent(weight)}" if word.category == "bos" else word.text


def _draw_word(area, placed: Placed, side: int, y: float, norm) -> None:
    from matplotlib.patches import Rectangle

    word, weight = placed.word, placed.word.weights[side]
    ink = MUTED
    if word.category:
        ink = "white" if norm(weight) > 0.62 else "black"
        area.add_patch(Rectangle((placed.x, y + 1.5), placed.width, LINE - 3.5, facecolor=shades()(norm(weight)), edgecolor="none"))
        ends = placed.x + 0.5, placed.x + placed.width - 0.5
        area.plot(ends, [y + LINE - 2.2] * 2, color=COLOURS[word.category], linewidth=1.6, solid_capstyle="butt")
    area.text(placed.x + 2, y + LINE / 2 - 1, label_of(word, weight), va="center_baseline", fontsize=SIZE, color=ink)


def _draw_shares(figure: "Figure", text: Text, top: float, height: float) -> None:
    """Bars of the categories' shares, all together and without BOS, below a legend; `top` is a share of the height."""
    wide, tall = WIDTH + MARGIN + 20, 15 * len(text.sides)
    both = text.shares(text.last_layer()), text.shares(text.without_bos())
    categories = present(both[0])
    place = {"loc": "lower left", "bbox_to_anchor": (10 / wide, top + 11 / height), "borderaxespad": 0, "borderpad": 0}
    handles = legend_of(categories)
    figure.legend(handles=handles, ncols=len(handles), frameon=False, fontsize=8, handlelength=1.2, columnspacing=1.4, **place)
    for column, shares in enumerate(both):
        left = MARGIN + column * (WIDTH / 2 + 8)
        axis = figure.add_axes((left / wide, top - tall / height, (WIDTH / 2 - 8) / wide, tall / height))
        axis.set_title(("share of the attention", "without BOS")[column], loc="left", fontsize=8, pad=1.5, color=MUTED)
        axis.set(xlim=(0, 1), ylim=(len(text.sides) - 0.5, -0.5))
        axis.axis("off")
        for row, side in enumerate(text.sides):
            if not column:
                axis.text(-0.012, row, side, ha="right", va="center", fontsize=8, color=MUTED)
            start = 0.0
            for category in categories:
                share = shares.get(category, {}).get(side, 0)
                axis.barh(row, share, left=start, color=COLOURS[category], height=0.86)
                if share > 0.07:
                    ink = "white" if category in ("suffix", "content", "punctuation") else "black"
                    axis.text(start + share / 2, row, percent(share), ha="center", va="center", fontsize=7.5, color=ink)
                start += share


def _draw_scale(figure: "Figure", norm, y: float, height: float) -> None:
    """The scale of the shades, from nothing to the heaviest word."""
    wide = WIDTH + MARGIN + 20
    axis = figure.add_axes((MARGIN / wide, y + 8 / height, 180 / wide, 9 / height))
    axis.imshow(shades()(np.linspace(0, 1, 128))[None], aspect="auto", extent=(0, 1, 0, 1))
    marks = norm.vmax * np.array([0, 0.1, 0.4, 1])
    axis.set_xticks(norm(marks), [percent(mark) for mark in marks], fontsize=7)
    axis.set_yticks([])
    axis.tick_params(length=2, pad=1.5)
    line = "weight of a word in the last layer; the line below a word is its category"
    figure.text((MARGIN + 194) / wide, y + 12.5 / height, line, fontsize=8, va="center", color=MUTED)
