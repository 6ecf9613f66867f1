"""The texts that engines make pairs of."""

from pathlib import Path

from files.console import say
from files.reading import TextStream


def read_input(path: Path, column: str | None) -> list[tuple[str, str]]:
    """(source, text) of each row with a text; prints which column was taken, and which others hold text."""
    stream = TextStream(path, column)
    texts = list(stream)
    say(stream.summary())
    if stream.others:
        say(f"more columns of texts: {', '.join(stream.others)}; make_pairs.py columns makes pairs of two, --column takes another")
    return texts


def in_shard(shard: tuple[int, int] | None, number: int) -> bool:
    """Whether the text of this number, counted from 0, belongs to shard i of n, given as (i, n) and counted from 1."""
    return shard is None or number % shard[1] == shard[0] - 1
