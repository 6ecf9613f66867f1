"""Attention rollout (Abnar and Zuidema 2020, arXiv 2005.00928): where the last token's state comes from, through all layers.

A second opinion beside the attention of one layer, and no more than that: it takes attention for the only way that information goes,
counts the residual connection as much as attention, and leaves out values, the layers between and the norms. The rollout is the
product over the layers, the first on the right, of 0.5 A + 0.5 I, with A the mean over the heads. Only its last row is wanted, so one row
is taken from the last layer to the first, and no matrix is kept: a row times 0.5 A + 0.5 I is half of itself and half of the sums of A's
columns weighted by it. The queries and keys of all layers are held meanwhile; memory grows with the tokens of a batch and with the layers.

Legend: B sequences of a batch, T tokens of its row, S the longest sequence, n tokens of a sequence, H heads, K heads of keys, d numbers
of a head.
"""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from attention_analysis.received import POOLING, Sequences, column_sums, of_each_text
from encoder.packing import PackedAttention, PackedBatch
from encoder.runtime import memory_budget

if TYPE_CHECKING:
    from encoder.encoder import Encoder

RESIDUAL = 0.5  # the residual connection's share in each layer, as in the paper


def attention_rollout(encoder: "Encoder", texts: list[str], role: str = "document") -> list[np.ndarray]:
    """The last row of the rollout over all layers: float32 (n,) for each text, which sums to 1. A text without a token has (0,).

    Raises InputError as `check_looked_at` does.
    """
    n_layers = len(encoder.blocks)

    def compute(batch: PackedBatch) -> list[np.ndarray]:
        kept: dict[int, tuple[Tensor, Tensor, float, int | None, bool]] = {}

        def keep(attention: PackedAttention, layer: int, query: Tensor, key: Tensor, scale: float, window: int | None) -> None:
            kept[layer] = query, key, scale, window, attention.causal

        encoder.forward(batch, POOLING, keep)
        whole = Sequences(batch)
        row = torch.zeros(whole.token.shape, device=whole.token.device)  # (B, S)
        row[torch.arange(len(row)), whole.lengths[:, 0].long() - 1] = 1
        for layer in reversed(range(n_layers)):
            attended = column_sums(whole, *kept.pop(layer), row).mean(-1)
            row = RESIDUAL * row + (1 - RESIDUAL) * attended
        return [of_text.numpy() for of_text in whole.flat(row).cpu().split(batch.lengths.tolist())]

    # a batch holds the queries and keys of all layers
    batch_tokens = max(256, memory_budget(encoder.decoder.config, encoder.dtype, encoder.device) // n_layers)
    return of_each_text(encoder, texts, role, compute, np.zeros(0, np.float32), batch_tokens=batch_tokens)
