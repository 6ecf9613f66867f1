"""What the last token of each text attends to, in every layer and head, read out of the ordinary packed forward pass.

A softmax row needs one query and all keys. Each layer's rows are computed when the layer comes by, from the queries and keys that
the model itself is about to use, so that no matrix of all pairs of tokens is ever made: memory grows with the tokens, and the model
computes what it always computes.

Legend: B sequences of a batch, M tokens of all of them with the shared prefix in each, n tokens of one, L layers read, H heads.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from encoder.contract import PoolingConfig
from encoder.packing import PackedAttention, PackedBatch
from encoder.runtime import to_device
from encoder.states import scored_block
from encoder.streaming import EncodingReport, computed_batches
from encoder.tokenization import check_list, readable_pieces
from files.console import InputError

if TYPE_CHECKING:
    from encoder.encoder import Encoder


class TokenAttention(NamedTuple):
    """What the last token of a sequence attends to."""

    pieces: list[str]  # each token as readable text, see `readable_pieces`
    parts: list[str]  # the part of the sequence that each token belongs to, one of `tokenization.PARTS`
    weights: np.ndarray  # (n, L, H) float32, softmax over all tokens of the sequence: each head's weights sum to 1


class AttentionRows(NamedTuple):
    """The rows of one batch of texts."""

    numbers: list[int]  # of the texts, counted over all of them
    ids: list[list[int]]  # of each, prompt included
    spans: list[tuple[int, int]]  # where in them the text is
    weights: Tensor  # (M, L, H) float32 on the device, one sequence behind the other


class AllRead(Exception):
    """All that was asked for has been read; the rest of the forward pass is not needed."""


def read_rows(encoder: "Encoder", batch: PackedBatch, blocks: Sequence[int]) -> Tensor:
    """One forward pass, as far as it is needed -> the softmax rows (M, L, H) of the blocks, counted from 0, a sequence behind the other."""
    located = batch.locate(np.zeros_like(batch.lengths), batch.lengths)
    sequence = to_device(located[2], batch.ids.device)
    rows: dict[int, Tensor] = {}

    def read(attention: PackedAttention, layer: int, query: Tensor, key: Tensor, scale: float, window: int | None) -> None:
        if layer in blocks:
            scores = attention.last_scores(query[attention.last_places], key, scale, window, *located)
            rows[layer] = softmax_rows(scores, sequence, len(batch.lengths))
        if len(rows) == len(set(blocks)) and not encoder.sharded:  # where weights are sharded, all processes finish every pass
            raise AllRead

    with contextlib.suppress(AllRead):
        encoder.forward(batch, [PoolingConfig("mean")], read)
    return torch.stack([rows[block] for block in blocks], 1)


def softmax_rows(scores: Tensor, sequence: Tensor, n_sequences: int) -> Tensor:
    """Scores (M, H), and the sequence that each belongs to (M,) -> their softmax (M, H) over each sequence, summed in float64."""
    index = sequence[:, None].expand_as(scores)
    highest = scores.new_zeros(n_sequences, scores.shape[1]).scatter_reduce_(0, index, scores, "amax", include_self=False)
    weights = (scores - highest[sequence]).exp_()
    totals = torch.zeros_like(highest, dtype=torch.float64).index_add_(0, sequence, weights.double())
    return weights / totals.float()[sequence]


def check_looked_at(encoder: "Encoder", role: str) -> None:
    """Raise InputError where a text has several sequences, and for a class of models whose attention cannot be read."""
    if len(encoder.contract.prompts_of(role)) > 1:
        raise InputError("under several prompts a text has several last tokens: take one prompt to look at its attention")
    if not encoder.packed:
        raise InputError(f"{type(encoder.decoder).__name__} does not let its attention be read: take a class that is packed")


def attention_rows(
    encoder: "Encoder", texts: Iterable[str], role: str, layers: Sequence[int] | None = None, report: EncodingReport | None = None
) -> Iterator[AttentionRows]:
    """The rows of every text that has a token, a batch at a time, longest first within a window of texts.

    layers    as in contracts, 1 for the first block, -1 for the last; None: all
    Raises InputError for a layer that does not exist, and as `check_looked_at` does.
    """
    blocks = range(len(encoder.blocks)) if layers is None else [scored_block(layer, len(encoder.blocks)) for layer in layers]
    check_looked_at(encoder, role)
    compute = torch.no_grad()(lambda batch: read_rows(encoder, batch, blocks))
    for n_before, tokenized, rows, weights in computed_batches(encoder, texts, role, compute, report):
        ids, spans = ([values[i] for i in rows] for values in (tokenized.ids, tokenized.spans))
        yield AttentionRows([n_before + i for i in rows], ids, spans, weights)


def last_token_attention(
    encoder: "Encoder", texts: Iterable[str], role: str, layers: Sequence[int], report: EncodingReport | None
) -> list[TokenAttention]:
    """Pieces, parts and rows of every text, in the order given; see `attention_rows`. A text without a token has no weights."""
    texts, decode = list(check_list(texts)), encoder.tokenizer.decode
    empty = np.zeros((0, len(layers), encoder.decoder.config.num_attention_heads), np.float32)
    out = [TokenAttention([], [], empty)] * len(texts)
    for batch in attention_rows(encoder, texts, role, layers, report):
        of_each = batch.weights.cpu().split(list(map(len, batch.ids)))
        for number, ids, span, weights in zip(batch.numbers, batch.ids, batch.spans, of_each, strict=True):
            parts = encoder.prompt_tokenizer.parts(len(ids), span)
            out[number] = TokenAttention(readable_pieces(decode, ids), parts, weights.numpy())
    return out
