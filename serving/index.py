"""An index beside the vectors of a folder, by which FAISS finds the nearest without comparing all of them.

    index.faiss    inverted lists (IVF) by inner product of vectors of norm 1, in float16, or in 8 bits where the folder has 8 or fewer
    index.json     the job and the parts that it covers: what was written later makes it stale

How many lists a search reads is found out when the index is made: the fewest that find `RECALL` of the ten nearest of some of its own
vectors. The index is made in memory (2 bytes a number, or 1) and read from the file as it is searched.

Legend: Q queries, N vectors, D numbers of a vector.
"""

import json
import math
import os

import numpy as np

from encoder.nearest import DECIMALS, Nearest, unit
from files.console import InputError, Progress, short_path, warn
from files.reading import excerpt
from files.writing import write_atomic, write_json
from serving.vectors import VectorFolder

INDEX_FILE, COVERED_FILE = "index.faiss", "index.json"
CODES = {"float32": "SQfp16", "float16": "SQfp16", "int8": "SQ8", "binary": "SQ8"}
LISTS = 4  # times the square root of N, as FAISS's own guidelines have it
TRAINED_ON = 64  # vectors for each list
RECALL, TRIED = 0.99, 256  # measured on so many of its vectors


class Index:
    """The index of a folder, opened with `open_index`."""

    def __init__(self, faiss_index):
        self.faiss_index = faiss_index

    def nearest(self, queries: np.ndarray, k: int) -> Nearest:
        """What `encoder.nearest.nearest` gives for queries (Q, D), but for those that are missed; numbers count over all parts."""
        queries, k = unit(queries), min(k, self.faiss_index.ntotal)
        cosines, numbers = self.faiss_index.search(queries, k)
        if (numbers < 0).any():  # the lists that were read hold fewer than k
            self.faiss_index.nprobe = self.faiss_index.nlist
            cosines, numbers = self.faiss_index.search(queries, k)
        return Nearest(numbers, np.round(cosines, DECIMALS))


def import_faiss():
    """FAISS. Raises InputError where it is not installed."""
    try:
        import faiss
    except ImportError:
        raise InputError("an index needs FAISS: pip install -r requirements-extras.txt") from None
    return faiss


def covered(folder: VectorFolder) -> dict:
    """What an index made now covers: the job, and the parts with their lengths."""
    return {"job": folder.job, "parts": [[number, folder.length(number)] for number in folder.numbers()]}


def recorded(folder: VectorFolder) -> dict | None:
    """What the folder's index covers; None where it has none."""
    try:
        return json.loads((folder.folder / COVERED_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def open_index(folder: VectorFolder) -> Index | None:
    """The folder's index; None, with a warning, where it is stale or damaged, and without one where there is none."""
    if not (folder.folder / INDEX_FILE).is_file():
        return None
    renew = f"comparing with every vector; to renew it: python embed.py index {short_path(folder.folder)}"
    if recorded(folder) != covered(folder):
        warn(f"{INDEX_FILE} does not cover the parts that are here now: {renew}")
        return None
    faiss = import_faiss()
    try:
        return Index(faiss.read_index(os.fspath(folder.folder / INDEX_FILE), faiss.IO_FLAG_MMAP))
    except RuntimeError as error:
        warn(f"{INDEX_FILE} cannot be read ({excerpt(error)}): {renew}")
        return None


def build_index(folder: VectorFolder) -> str:
    """Write the folder's index, unless there is one that covers all parts; a line that says what was done.

    Raises InputError for a folder without vectors.
    """
    faiss, cover = import_faiss(), covered(folder)
    path, n = folder.folder / INDEX_FILE, sum(length for _, length in cover["parts"])
    if not n:
        raise InputError(f"{folder.folder} holds no vector yet: embed.py has to finish a part first")
    if path.is_file() and recorded(folder) == cover:
        return f"{path} covers all {n:,} vectors already"
    n_lists = max(1, min(round(LISTS * math.sqrt(n)), n // TRAINED_ON))
    sample = draw(folder, min(n, n_lists * TRAINED_ON) / n)
    index = faiss.index_factory(folder.job["width"], f"IVF{n_lists},{CODES[folder.job['store']]}", faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid = 1  # else FAISS prints advice
    index.train(sample)
    with Progress(n, "indexed", "vector") as progress:
        for number, length in cover["parts"]:
            index.add(unit(folder.read(number).vectors))
            progress.update(length)
    recall = set_probes(index, sample[:: -(-len(sample) // TRIED)])
    write_atomic(path, lambda temporary: faiss.write_index(index, os.fspath(temporary)))
    write_json(folder.folder / COVERED_FILE, cover, indent=None)
    size = f"{path.stat().st_size / 2**20:,.0f} MiB"
    found = f"a search reads {index.nprobe:,} of them and finds {recall:.1%} of the ten nearest"
    return f"{path}: {n:,} vectors in {n_lists:,} lists, {size}; {found}"


def draw(folder: VectorFolder, share: float) -> np.ndarray:
    """This share of all vectors, at equal distances, as float32 (n, D) of norm 1; at least one of each part that holds any."""
    parts = []
    for number in folder.numbers():
        vectors = folder.read(number).vectors
        places = np.linspace(0, len(vectors) - 1, math.ceil(len(vectors) * share)).astype(int)
        parts.append(unit(vectors[places]))
    return np.concatenate(parts)


def set_probes(index, queries: np.ndarray) -> float:
    """Set how many lists a search reads, doubling it up to `RECALL`; the share of the ten nearest that these queries then find.

    A vector that is as near as the tenth counts as found: copies are equally near. Each of the queries is itself in the index and
    is left out.
    """
    k = min(11, index.ntotal)
    index.nprobe = index.nlist
    least = index.search(queries, k)[0][:, -1:] - 1e-6
    index.nprobe = 1
    while True:
        n_found = (index.search(queries, k)[0] >= least).sum(1)
        recall = float(np.maximum(n_found - 1, 0).mean() / max(1, k - 1)) if k > 1 else 1.0
        if recall >= RECALL or index.nprobe == index.nlist:
            return recall
        index.nprobe = min(2 * index.nprobe, index.nlist)
