"""The texts that engines make pairs of."""

from pathlib import Path

from files.console import say
from files.reading import read_texts


def read_input(path: Path, column: str | None) -> list[tuple[str, str]]:
    """(source, text) of each row with a text; prints which column was taken."""
    texts, summary = read_texts(path, column)
    say(summary)
    return texts
