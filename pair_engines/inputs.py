"""The texts that engines make pairs of."""

from pathlib import Path

from files.console import say
from files.reading import read_texts


def read_input(path: Path, column: str | None) -> list[tuple[str, str]]:
    """(source, text) of each row with a text; prints which column was taken."""
    texts, summary = read_texts(path, column)
    say(summary)
    return texts


def in_shard(shard: tuple[int, int] | None, number: int) -> bool:
    """Whether the text of this number, counted from 0, belongs to shard i of n, given as (i, n) and counted from 1."""
    return shard is None or number % shard[1] == shard[0] - 1
