"""EmbedFilter (Wu et al. 2026, arXiv 2606.07502): leave out what the unembedding matrix writes frequent tokens with. No data is needed.

The right singular vectors of the unembedding matrix (V, D) with the largest and with the smallest singular values are dropped, as many
of either. The paper keeps the coordinates in the others; we keep the projection onto them, D numbers with the same cosines, because the
signs of singular vectors differ between machines.

Legend: V tokens of the vocabulary, D numbers of a state.
"""

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from files.console import InputError

HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")  # what decoders call the matrix where it is not the embeddings
ROWS = 8192  # of the matrix in double precision at a time


def unembedding(folder: Path, decoder: nn.Module) -> Tensor:
    """The matrix (V, D) that turns states into scores of tokens: the embeddings where they are tied, else from the base's files.

    Raises InputError where it is not found.
    """
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in HEADS:
                if name in file.keys():  # noqa: SIM118, it is no dict
                    return file.get_tensor(name)
    if getattr(decoder.config, "tie_word_embeddings", False):
        return decoder.get_input_embeddings().weight.detach()
    raise InputError(f"{folder} holds no unembedding matrix ({', '.join(HEADS)}), which embed_filter needs: leave it out")


def projection(matrix: Tensor, share: float) -> Tensor:
    """The symmetric matrix (D, D), float32, that drops this share of the directions, half of them at either end."""
    gram = sum(rows.double().T @ rows.double() for rows in matrix.split(ROWS))
    _, vectors = torch.linalg.eigh(gram)  # columns, those of the smallest singular values first
    n_dropped = round(share / 2 * len(gram))
    kept = vectors[:, n_dropped : len(gram) - n_dropped]
    return (kept @ kept.T).float()
