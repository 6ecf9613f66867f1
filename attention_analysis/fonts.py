"""Fonts for the characters of any script, and codes for those that no installed font has: a box would say nothing."""

from typing import TYPE_CHECKING, NamedTuple

from files.console import warn

if TYPE_CHECKING:
    from matplotlib.font_manager import FontEntry


LONGEST = 24  # characters of a token on an axis


class Fonts(NamedTuple):
    """families: the default and those that stand in for it; missing: characters that none of them has."""

    families: list[str]
    missing: set[str]

    def drawable(self, text: str) -> str:
        """`text` with codes in place of the characters that cannot be drawn."""
        return "".join(c if c.isprintable() and c not in self.missing else c.encode("unicode_escape").decode() for c in text)

    def label(self, piece: str) -> str:
        """A token on an axis; · is one that ends a character that another one began."""
        drawn = self.drawable(piece.strip()) or ("␣" if piece else "·")
        return drawn if len(drawn) <= LONGEST else drawn[: LONGEST - 1] + "…"


def choose_fonts(text: str) -> Fonts:
    """The default font, installed ones with the characters of `text` that it lacks, and the characters that none of them has."""
    from matplotlib import font_manager

    default = font_manager.FontProperties().get_name()
    files = {font.name: font.fname for font in sorted(font_manager.fontManager.ttflist, key=_likeness_to_plain)}
    chosen, missing = [default], {character for character in text if character.isprintable()}
    for name in (default, *sorted(files.keys() - {default})):
        if not missing or "last resort" in name.lower().replace("lastresort", "last resort"):  # whose characters are all boxes
            continue
        try:
            charmap = font_manager.get_font(files[name]).get_charmap()
        except (OSError, RuntimeError, KeyError):  # a file that is no font after all
            continue
        drawable = {character for character in missing if ord(character) in charmap}
        chosen += [name] * bool(drawable)
        missing -= drawable
    return Fonts(list(dict.fromkeys(chosen)), missing)


def _likeness_to_plain(font: "FontEntry") -> bool:
    """Sorts the upright face of ordinary weight behind the others of its family."""
    return font.style == "normal" and font.weight in (400, "normal", "regular", "book")


def warn_of_missing(fonts: Fonts) -> None:
    """Say once which characters are drawn as codes."""
    if fonts.missing:
        some, n = " ".join(sorted(fonts.missing)[:10]), len(fonts.missing)
        warn(f"no installed font has {n} of the characters ({some}): they are drawn as codes; install a font such as Noto")
