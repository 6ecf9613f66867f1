"""The hidden states that a forward pass leaves, and their way to one vector for each sequence.

Legend: B sequences of a batch, T tokens of its row, M tokens chosen, D hidden size.
"""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encoder.contract import POOLINGS, Layer, PoolingConfig
from encoder.packing import PackedAttention, PackedBatch, select_tokens
from encoder.runtime import to_device
from files.console import InputError
from pooling_kernels import attention_mean_pool, last_pool, max_pool, mean_pool, query_pool


class HiddenStates(NamedTuple):
    """What a forward pass leaves for pooling."""

    layers: dict[Layer, Tensor]  # layer -> (T, D), a state for each token of the row
    attention: PackedAttention  # has kept what the attention scores of the layers asked for are computed from
    last_only: bool  # the states are those of each sequence's last token alone, (B, D)
    shared: dict  # what several poolings need, computed once: chosen tokens, attention scores, pooled vectors


class ChosenTokens(NamedTuple):
    """The tokens that take part in a pooling, and their states."""

    first: np.ndarray  # (B,) of each sequence, its first
    located: tuple[np.ndarray, np.ndarray, np.ndarray]  # what `PackedBatch.locate` returned, (M,) each
    cu_seqlens: Tensor  # (B+1,)
    values: Tensor  # (M, D)


def check_layer(index: Layer, n_layers: int) -> int:
    """Layer of a contract -> 0..n_layers for raw residual states, -1 for the state after the final norm."""
    if isinstance(index, str):
        return max(1, round(int(index.removesuffix("%")) / 100 * n_layers))
    resolved = index if index >= -1 else n_layers + 1 + index
    if (index < -1 and resolved < 0) or resolved > n_layers:
        raise InputError(f"layer {index} does not exist: this model has blocks 1 to {n_layers}, 0 (embeddings) and -1 (final norm)")
    return resolved


def scored_block(index: Layer, n_layers: int) -> int:
    """Number of the block, from 0, whose attention belongs to a layer of a contract. Raises InputError for the embeddings."""
    layer = check_layer(index, n_layers)
    if layer == 0:
        raise InputError("attention_layer 0 is the embeddings, which have no attention: take 1 or more")
    return n_layers - 1 if layer == -1 else layer - 1


@contextlib.contextmanager
def recorded_states(blocks: nn.ModuleList, numbers: set[int]) -> Iterator[dict[int, Tensor]]:
    """While it is open, a forward pass leaves the residual states of these layers (-1 excepted) in the dict that is yielded."""
    states: dict[int, Tensor] = {}

    def recorder(number: int):
        def hook(_, args, kwargs, output=None):
            state = output if output is not None else args[0] if args else kwargs["hidden_states"]
            states[number] = state[0] if isinstance(state, (tuple, list)) else state

        return hook

    hooks = []
    for number in numbers - {-1}:
        block = blocks[max(number - 1, 0)]
        register = block.register_forward_hook if number else block.register_forward_pre_hook
        hooks.append(register(recorder(number), with_kwargs=True))
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def pooled_width(pooling: str, width: int) -> int:
    """Numbers of a vector before it is cut, of states of `width` numbers."""
    return 2 * width if pooling == "last+mean" else width


def choose(states: HiddenStates, batch: PackedBatch, config: PoolingConfig, device: torch.device) -> ChosenTokens:
    """The tokens that a pooling takes, from the layers that it reads; the same for all poolings of these tokens and layers."""
    key = config.pooling == "last", config.scope, config.keep_bos, config.layers
    if key not in states.shared:
        first, end = batch.pooled_range(config)
        if config.pooling == "last":
            first = np.maximum(end - 1, 0)
        located = batch.locate(first, end)
        takes_all = states.last_only or (len(located[0]) == len(batch.ids) and not batch.prefix_length)
        layers = [states.layers[i] if takes_all else select_tokens(states.layers[i], batch.prefix_length, *located) for i in config.layers]
        values = layers[0] if len(layers) == 1 else torch.stack([x.float() for x in layers]).mean(0)
        if not values.requires_grad and not values.is_cuda:
            values = values.to(torch.promote_types(values.dtype, torch.float32))  # once, not in every pooling; a GPU's kernels read any
        cu_seqlens = to_device(np.concatenate([[0], np.cumsum(end - first)]), device)
        states.shared[key] = ChosenTokens(first, located, cu_seqlens, values)
    return states.shared[key]


def pool(states: HiddenStates, batch: PackedBatch, config: PoolingConfig, query: Tensor, n_layers: int, device: torch.device) -> Tensor:
    """States -> (B, `pooled_width`) float32, neither cut nor normalized; the same tensor for all rows of a sweep that need it."""
    config = config._replace(mean_removed=None)  # which is taken out afterwards
    if config not in states.shared:
        states.shared[config] = _pool(states, batch, config, query, n_layers, device)
    return states.shared[config]


def _pool(states: HiddenStates, batch: PackedBatch, config: PoolingConfig, query: Tensor, n_layers: int, device: torch.device) -> Tensor:
    if config.pooling == "last+mean":
        parts = [pool(states, batch, config._replace(pooling=part), query, n_layers, device) for part in ("last", "mean")]
        return torch.cat([F.normalize(part, dim=-1) for part in parts], -1)
    if states.last_only and config.pooling != "last":
        raise ValueError(f"these states are those of last tokens only: give {config} to `forward` as well")
    first, located, cu_seqlens, values = choose(states, batch, config, device)
    if config.pooling == "mean" or not len(values):  # without any token all are zeros
        return mean_pool(values, cu_seqlens=cu_seqlens)
    if config.pooling == "position-mean":  # weight i for the i-th token of the scope: SGPT, Muennighoff 2022, arXiv 2202.08904
        _, positions, sequence = located
        weights = to_device((positions - first[sequence] + 1).astype(np.float32), device)
        return mean_pool(values, cu_seqlens=cu_seqlens, weights=weights)
    if config.pooling == "last":
        return last_pool(values, cu_seqlens=cu_seqlens)
    if config.pooling == "attention":
        block = scored_block(config.attention_layer, n_layers)
        key = block, config.scope, config.keep_bos  # whichever layers the values come from
        if key not in states.shared:
            states.shared[key] = states.attention.scores(block, *located)
        return attention_mean_pool(values, states.shared[key], cu_seqlens=cu_seqlens)
    if config.pooling == "max":
        return max_pool(values, cu_seqlens=cu_seqlens)
    if config.pooling == "query":
        return query_pool(values, query, cu_seqlens=cu_seqlens)[0][:, 0]
    raise InputError(f"unknown pooling {config.pooling!r}: take one of {', '.join(POOLINGS)}")
