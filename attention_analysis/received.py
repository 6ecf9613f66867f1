"""The attention that each token receives: column means of a sequence's attention, for vectors that are means over tokens.

Where the last token is pooled, its own row of attention says what it reads. A mean over all tokens has no such row: what counts there is
how much a token is read by all the others. Received attention of token j is the mean over the n queries i of a sequence of A[i, j], for
every layer and head, so that it sums to 1 over the tokens. Under causal attention early tokens are seen by more queries than late ones, and
receive more for that reason alone.

Attention is computed again from the queries and keys of the ordinary forward pass, some queries at a time: memory grows with the tokens
of a batch, never with their square.

Legend: B sequences of a batch, T tokens of its row, M tokens of its sequences, S the longest sequence, Q queries at a time, H heads,
K heads of keys, d numbers of a head, L layers.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from encoder.contract import PoolingConfig
from encoder.packing import PackedAttention, PackedBatch
from encoder.runtime import to_device
from encoder.streaming import computed_batches
from encoder.token_attention import check_looked_at

if TYPE_CHECKING:
    from encoder.encoder import Encoder

BLOCK = 2**21  # weights in memory at a time, 8 MiB in float32
POOLING = [PoolingConfig("mean")]  # a forward pass has to be told one; its vectors are not made


def received_attention(encoder: "Encoder", texts: list[str], role: str = "document") -> list[np.ndarray]:
    """What each token of each text receives: float32 (n, L, H), in the order given. A text without a token has (0, L, H).

    Raises InputError as `check_looked_at` does.
    """
    n_layers, n_heads = len(encoder.blocks), encoder.decoder.config.num_attention_heads

    def compute(batch: PackedBatch) -> list[np.ndarray]:
        whole, layers = Sequences(batch), {}

        def observe(attention: PackedAttention, layer: int, query: Tensor, key: Tensor, scale: float, window: int | None) -> None:
            even = whole.lengths.reciprocal().expand(len(whole.token), whole.token.shape[1])
            layers[layer] = whole.flat(column_sums(whole, query, key, scale, window, attention.causal, even)).cpu()  # (M, H)

        encoder.forward(batch, POOLING, observe)
        per_token = torch.stack([layers[i] for i in range(n_layers)], 1)
        return [of_text.numpy() for of_text in per_token.split(batch.lengths.tolist())]

    return of_each_text(encoder, texts, role, compute, np.zeros((0, n_layers, n_heads), np.float32))


class Sequences:
    """The sequences of a packed batch under each other, the shared prefix repeated for each.

    token      (B, S) which token of the row lies at each place; behind a sequence's end any
    inside     (B, S) whether the place belongs to the sequence
    lengths    (B, 1) tokens of each sequence, float32
    """

    def __init__(self, batch: PackedBatch):
        lengths, device = batch.lengths, batch.ids.device
        places, positions, sequence = batch.locate(np.zeros_like(lengths), lengths)
        token = np.zeros((len(lengths), int(lengths.max())), np.int64)
        token[sequence, positions] = places
        self.token = to_device(token, device)
        self.inside = to_device(np.arange(token.shape[1]) < lengths[:, None], device)
        self.lengths = to_device(lengths.astype(np.float32)[:, None], device)

    def of(self, rows: Tensor) -> Tensor:
        """Rows of tokens (T, ...) -> (B, S, ...)."""
        return rows[self.token]

    def flat(self, stacked: Tensor) -> Tensor:
        """(B, S, ...) -> (M, ...), one sequence behind the other."""
        return stacked[self.inside]


def column_sums(
    whole: Sequences, query: Tensor, key: Tensor, scale: float, window: int | None, causal: bool, row_weights: Tensor, block: int = BLOCK
) -> Tensor:
    """For each token and head the sum over queries of the query's weight times its attention to the token: float32 (B, S, H).

    query (T, H, d) and key (T, K, d) of a layer, as `PackedAttention` has them; row_weights (B, S), those behind a sequence's end do
    not count. At most `block` weights, or those of one query a sequence, are in memory at a time.
    """
    row_weights = torch.where(whole.inside, row_weights, 0)
    n_heads, (n_rows, width) = query.shape[1], whole.token.shape
    per_query = max(1, n_heads * width)
    n_rows_at_once = max(1, min(n_rows, block // per_query))
    n_queries = max(1, block // (per_query * n_rows_at_once))
    out = torch.zeros(n_rows, width, n_heads, device=query.device)
    for rows in torch.arange(n_rows).split(n_rows_at_once):
        rows = slice(int(rows[0]), int(rows[-1]) + 1)
        keys = key[whole.token[rows]].float()  # (B, S, K, d)
        for start in range(0, width, n_queries):
            queries = slice(start, min(start + n_queries, width))
            first = max(0, start - window + 1) if causal and window is not None else 0
            seen = slice(first, queries.stop if causal else width)
            visible = _visible(queries, seen, window, causal, whole.inside[rows])
            q = query[whole.token[rows, queries]].float()
            out[rows, seen] += _block_sums(q, keys[:, seen], scale, visible, row_weights[rows, queries])
    return out


def _visible(queries: slice, seen: slice, window: int | None, causal: bool, inside: Tensor) -> Tensor:
    """Which of the keys each query sees: bool (B or 1, Q, S), as `PackedAttention` and transformers have it."""
    positions = torch.arange(inside.shape[1], device=inside.device)
    distance = positions[queries, None] - positions[seen]
    if causal:
        return (distance >= 0 if window is None else (distance >= 0) & (distance < window))[None]
    near = inside[:, None, seen] & (distance.abs() <= (inside.shape[1] if window is None else window))
    return near | (distance == 0)  # a place behind the end must see something, or it is NaN


def _block_sums(query: Tensor, key: Tensor, scale: float, visible: Tensor, weights: Tensor) -> Tensor:
    """(B, Q, H, d), (B, S, K, d), (B or 1, Q, S), (B, Q) -> (B, S, H)."""
    query = query.unflatten(2, (key.shape[2], -1))  # (B, Q, K, H/K, d)
    with torch.autocast(query.device.type, enabled=False):
        scores = torch.einsum("bqkgd,bskd->bkgqs", query, key) * scale
        attention = scores.masked_fill_(~visible[:, None, None], -torch.inf).softmax(-1)
        return torch.einsum("bkgqs,bq->bskg", attention, weights).flatten(2)


def of_each_text(
    encoder: "Encoder",
    texts: list[str],
    role: str,
    compute: Callable[[PackedBatch], list[np.ndarray]],
    empty: np.ndarray,
    *,
    batch_tokens: int | None = None,
    grad: bool = False,
) -> list[np.ndarray]:
    """What `compute` returns for each text of a batch, in the order of the texts; `empty` for a text without a token.

    grad    whether `compute` needs gradients
    Raises InputError as `check_looked_at` does.
    """
    check_looked_at(encoder, role)
    out = [empty] * len(texts)
    with torch.set_grad_enabled(grad):
        for n_before, _, rows, values in computed_batches(encoder, texts, role, compute, batch_tokens=batch_tokens):
            for row, of_text in zip(rows, values, strict=True):
                out[n_before + row] = of_text
    return out
