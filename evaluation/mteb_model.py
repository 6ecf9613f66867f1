"""A row of the table as mteb sees it.

Legend: N texts, D numbers of a vector.
"""

import contextlib
import functools
import itertools
import re
import time
from collections.abc import Callable, Iterator

import numpy as np

from files.console import warn

EncodeTexts = Callable[[list[str], str], np.ndarray]  # texts and "query" or "document" -> vectors (N, D)
COLLAPSED_OF = 10_000  # different texts say whether vectors have collapsed
COLLAPSED = 1e-4  # 1 - cosine to the mean vector, below which vectors are one point


class Pace:
    """How many texts were encoded, and in how many seconds."""

    def __init__(self):
        self.texts, self.seconds = 0, 0.0

    @contextlib.contextmanager
    def timing(self, n: int) -> Iterator[None]:
        """`n` texts are encoded inside."""
        began = time.perf_counter()
        yield
        self.texts += n
        self.seconds += time.perf_counter() - began

    def since(self, texts: int, seconds: float) -> tuple[int, float | None]:
        """Texts encoded since the counts were these, and how many a second; None where all vectors were there already."""
        texts, seconds = self.texts - texts, self.seconds - seconds
        return texts, round(texts / seconds, 1) if texts and seconds else None


class MtebModel:
    """One row of the table: a label, an identity, and a way to encode. This is what mteb sees of a model.

    label, fingerprint     together they tell rows apart
    contract               the embedding contract as JSON values; None for baselines and sentence-transformers models
    encode_texts           how the row's vectors are made
    computed               dtype and device of the vectors, None where unknown
    grid                   rows with the same are settings of one untuned base; None for others
    better_of              of rows with the same the table shows the one with the better mean; None for others
    name                   as mteb has names, "organisation/model"; None: "local/" and the last part of the label
    pace                   where rows share forward passes, what counts these; None: every call of encode_texts is counted
    """

    def __init__(
        self,
        label: str,
        fingerprint: str,
        contract: dict | None,
        encode_texts: EncodeTexts,
        computed: str | None = None,
        *,
        grid: str | None = None,
        better_of: str | None = None,
        name: str | None = None,
        pace: Pace | None = None,
    ):
        from mteb.models.model_meta import ModelMeta
        from mteb.similarity_functions import cos_sim, pairwise_cos_sim

        self.label, self.fingerprint, self.contract = label, fingerprint, contract
        self.encode_texts, self.computed = encode_texts, computed
        self.grid, self.better_of = grid, better_of
        self.texts: list[str] = []  # the latest that were encoded
        self.similarity, self.similarity_pairwise = cos_sim, pairwise_cos_sim
        self.pace, self.counted = pace or Pace(), pace is not None
        name = name or "local/" + (re.sub(r"[^\w.+-]+", "-", label.rstrip("/").rpartition("/")[2]).strip("-.") or "model")
        revision = f"{fingerprint}-{computed.split()[0]}" if computed else fingerprint
        self.mteb_model_meta = ModelMeta.create_empty({"name": name, "revision": revision})

    def encode(self, inputs, *, prompt_type=None, **_) -> np.ndarray:
        """mteb's batches of texts -> vectors of norm 1 (N, D); a vector of zeros stays as it is."""
        self.texts = texts = [text for batch in inputs for text in batch["text"]]
        role = "query" if prompt_type is not None and prompt_type.value == "query" else "document"
        with contextlib.nullcontext() if self.counted else self.pace.timing(len(texts)):
            vectors = self.encode_texts(texts, role)
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        norms[norms == 0] = 1
        if np.abs(norms - 1).max(initial=0) > 1e-6:  # else they are not copied: a million vectors take gigabytes
            vectors = vectors / norms
        different = list(itertools.islice({text: i for i, text in enumerate(texts)}.values(), COLLAPSED_OF))
        if is_collapsed(vectors[different]):
            warn_once(f"{self.label}: different texts have nearly the same vector (cosine above {1 - COLLAPSED}): its scores mean little")
        return vectors


def is_collapsed(vectors: np.ndarray) -> bool:
    """Whether unit vectors (N, D) point one way, but for a hundredth of them, or are all zero."""
    if len(vectors) < 2:
        return False
    center = vectors.mean(0, dtype=np.float64)
    return not vectors.any() or bool(np.quantile(vectors @ center, 0.01) > (1 - COLLAPSED) * np.linalg.norm(center) > 0)


@functools.cache
def warn_once(text: str) -> None:
    """A base is loaded anew for each prompt and type of task; what is to be known of it is said once."""
    warn(text)
