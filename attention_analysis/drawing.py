"""What all pictures of attention share: colours, scales, lines of shares, and files that are complete or absent."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from attention_analysis.fonts import Fonts
from attention_analysis.stored import CATEGORIES
from files.writing import write_atomic

if TYPE_CHECKING:
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

INK, MUTED = "#1b1f24", "#57606a"
# Okabe and Ito's colours, told apart by all
COLOURS = {
    "bos": "#999999",
    "prefix": "#e69f00",
    "suffix": "#d55e00",
    "content": "#0072b2",
    "function": "#56b4e9",
    "punctuation": "#009e73",
    "eos": "#cc79a7",
    "text": INK,  # its own tokens, of all three categories
}
NAMES = {
    "bos": "BOS",
    "prefix": "prompt before the text",
    "suffix": "prompt behind the text",
    "content": "content words",
    "function": "function words",
    "punctuation": "punctuation",
    "eos": "EOS",
    "text": "text in all",
}
SHORT = NAMES | {"prefix": "prompt before", "suffix": "prompt behind", "content": "content", "function": "function"}
MARKERS = {"bos": "o", "prefix": "v", "suffix": "^", "content": "s", "function": "D", "punctuation": "P", "eos": "X", "text": "*"}
SHADES = ("#ffffff", "#8db8d8", "#0b4f8a")  # none to much
DIFFERENCES = ("#a83f00", "#ffffff", "#00568a")  # less, as much, more
FORMATS = ("png", "svg")
DPI = 110
assert tuple(COLOURS) == tuple(NAMES) == tuple(MARKERS) == (*CATEGORIES, "text")


@contextmanager
def style(fonts: Fonts | None = None) -> Iterator[None]:
    """Settings under which figures are made and saved: text is text, and a figure drawn again has the same bytes."""
    import matplotlib

    matplotlib.use("agg")
    families = fonts.families if fonts else matplotlib.rcParams["font.family"]
    with matplotlib.rc_context({"text.parse_math": False, "font.family": families, "svg.hashsalt": "attention", "text.hinting": "none"}):
        yield


def save(figure: "Figure", path: Path) -> None:
    """Write a figure as `path`.png and `path`.svg, each complete or not at all, and close it."""
    import matplotlib.pyplot as plt

    if figure.get_layout_engine():  # once is enough for both files
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
    for kind in FORMATS:
        metadata = {"Date": None} if kind == "svg" else None
        options = {"format": kind, "dpi": DPI, "metadata": metadata}
        write_atomic(path.with_name(f"{path.name}.{kind}"), lambda file, options=options: figure.savefig(file, **options))
    plt.close(figure)


def shades() -> "Colormap":
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("shades", SHADES)


def differences() -> "Colormap":
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("differences", DIFFERENCES)


def percent(share: float, digits: int | None = None) -> str:
    """A share as one would say it: 31 %, 4.2 %, 0.08 %, 0 %."""
    value = 100 * share
    if digits is None:
        digits = 0 if abs(value) >= 9.95 or not round(value, 2) else 1 if abs(value) >= 0.995 else 2
    return signless(f"{value:.{digits}f}") + " %"


def tick(share: float, _: int | None = None) -> str:
    """A share beside a scale, exact: 2.5 %."""
    return signless(f"{100 * share:.3g}") + " %"


def points(difference: float, _: int | None = None) -> str:
    """A difference of shares beside a scale, in points."""
    return tick(difference).removesuffix(" %")


def signless(number: str) -> str:
    """A number with a true minus sign, and none before a zero."""
    return number.lstrip("-") if not number.strip("-0.") else number.replace("-", "\N{MINUS SIGN}")


def present(categories: Iterable[str]) -> list[str]:
    """Categories in their usual order, each once."""
    categories = set(categories)
    return [category for category in CATEGORIES if category in categories]


def legend_of(categories: Iterable[str]) -> list:
    """Handles of a legend of categories."""
    from matplotlib.patches import Patch

    return [Patch(color=COLOURS[category], label=NAMES[category]) for category in present(categories)]


def write_on(axis, values: np.ndarray, colours: "Colormap", norm, most: int = 200, size: float = 7) -> None:
    """Numbers in percent on the cells of a heat map (rows, columns), where these are few."""
    if values.size > most:
        return
    for (row, column), value in np.ndenumerate(values):
        red, green, blue, _ = colours(norm(value))
        colour = "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 else "black"
        axis.text(column, row, signless(f"{100 * value:.1f}"), ha="center", va="center", fontsize=size, color=colour)
