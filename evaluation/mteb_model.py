"""A row of the table as mteb sees it.

Legend: N texts, D numbers of a vector.
"""

import functools
from collections.abc import Callable

import numpy as np

from files.console import warn

EncodeTexts = Callable[[list[str], str], np.ndarray]  # texts and "query" or "document" -> vectors (N, D)
COLLAPSED = 1e-4  # 1 - cosine to the mean vector, below which vectors are one point


class MtebModel:
    """One row of the table: a label, an identity, and a way to encode. This is what mteb sees of a model.

    label, fingerprint     together they tell rows apart
    contract               the embedding contract as JSON values; None for baselines
    encode_texts           how the row's vectors are made
    computed               dtype and device of the vectors, None where unknown
    grid                   rows with the same are settings of one untuned base; None for others
    better_of              of rows with the same the table shows the one with the better mean; None for others
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
    ):
        from mteb.models.model_meta import ModelMeta
        from mteb.similarity_functions import cos_sim, pairwise_cos_sim

        self.label, self.fingerprint, self.contract = label, fingerprint, contract
        self.encode_texts, self.computed = encode_texts, computed
        self.grid, self.better_of = grid, better_of
        self.similarity, self.similarity_pairwise = cos_sim, pairwise_cos_sim
        self.mteb_model_meta = ModelMeta.create_empty({"name": f"local/{fingerprint}", "revision": fingerprint})

    def encode(self, inputs, *, prompt_type=None, **_) -> np.ndarray:
        """mteb's batches of texts -> vectors of norm 1 (N, D); a vector of zeros stays as it is."""
        texts = [text for batch in inputs for text in batch["text"]]
        vectors = self.encode_texts(texts, "query" if prompt_type is not None and prompt_type.value == "query" else "document")
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors = vectors / np.where(norms > 0, norms, 1)
        if is_collapsed(vectors[list({text: i for i, text in enumerate(texts)}.values())]):
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
