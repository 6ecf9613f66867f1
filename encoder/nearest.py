"""The nearest of any number of vectors, by cosine, a block at a time.

Legend: Q queries, N vectors, n of a block, D numbers of a vector.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from files.console import InputError

COSINES_AT_ONCE = 2**22  # 16 MiB of float32
DECIMALS = 6  # to which cosines are compared: beyond these the size of a block shows


class Nearest(NamedTuple):
    """The nearest vectors of each query, nearest first."""

    numbers: np.ndarray  # (Q, min(k, N)) int64, counted from 0
    cosines: np.ndarray  # (Q, min(k, N)) float32, rounded to `DECIMALS`


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors (n, D) of norm 1 in float32; zeros stay zeros."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(norms > 0, norms, 1)).astype(np.float32)


def nearest(queries: np.ndarray, blocks: Iterable[np.ndarray], k: int) -> Nearest:
    """The k vectors of `blocks`, arrays (n, D), with the highest cosine to each of `queries` (Q, D).

    Of equally near ones the first comes first. Memory holds one block and `COSINES_AT_ONCE`, whatever N is.
    Raises InputError where k is below 1.
    """
    if k < 1:
        raise InputError(f"the number of nearest texts must be 1 or more, not {k}")
    queries = unit(queries)
    numbers, cosines = np.empty((len(queries), 0), np.int64), np.empty((len(queries), 0), np.float32)
    step, n_seen = max(1, COSINES_AT_ONCE // max(1, len(queries))), 0
    for block in blocks:
        for start in range(0, len(block), step):
            part = unit(block[start : start + step])
            places = np.broadcast_to(np.arange(n_seen, n_seen + len(part)), (len(queries), len(part)))
            numbers = np.concatenate([numbers, places], axis=1)
            cosines = np.concatenate([cosines, np.round(queries @ part.T, DECIMALS)], axis=1)
            order = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
            numbers, cosines = (np.take_along_axis(values, order, axis=1) for values in (numbers, cosines))
            n_seen += len(part)
    return Nearest(numbers, cosines)
