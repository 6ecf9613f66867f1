"""The hidden states that a forward pass leaves, and their way to one vector for each sequence.

Legend: B sequences of a batch, T tokens of its row, M tokens chosen, D hidden size.
"""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from encoder.contract import POOLINGS, PoolingConfig
from encoder.packing import PackedAttention, PackedBatch, select_tokens
from encoder.runtime import to_device
from files.console import InputError
from pooling_kernels import attention_pool, last_pool, mean_pool, query_pool


class HiddenStates(NamedTuple):
    """What a forward pass leaves for pooling."""

    layers: dict[int, Tensor]  # layer number -> (T, D), a state for each token of the row
    attention: PackedAttention  # has kept what the attention scores of the last layer are computed from
    last_only: bool = False  # the states are those of each sequence's last token alone, (B, D)


def check_layer(index: int, n_layers: int) -> int:
    """Layer number of a contract -> 0..n_layers for raw residual states, -1 for the state after the final norm."""
    resolved = index if index >= -1 else n_layers + 1 + index
    if (index < -1 and resolved < 0) or resolved > n_layers:
        raise InputError(f"layer {index} does not exist: this model has blocks 1 to {n_layers}, 0 (embeddings) and -1 (final norm)")
    return resolved


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


def pool(states: HiddenStates, batch: PackedBatch, config: PoolingConfig, query: Tensor, device: torch.device) -> Tensor:
    """States -> (B, D) float32, neither cut nor normalized."""
    first, end = batch.pooled_range(config)
    if states.last_only and config.pooling != "last":
        raise ValueError(f"these states are those of last tokens only: give {config} to `forward` as well")
    if config.pooling == "last":
        first = np.maximum(end - 1, 0)
    places, positions, sequence = chosen = batch.locate(first, end)
    cu_seqlens = to_device(np.concatenate([[0], np.cumsum(end - first)]), device)
    takes_all = states.last_only or (len(places) == len(batch.ids) and not batch.prefix_length)
    layers = [states.layers[i] if takes_all else select_tokens(states.layers[i], batch.prefix_length, *chosen) for i in config.layers]
    values = layers[0] if len(layers) == 1 else torch.stack([x.float() for x in layers]).mean(0)  # (M, D)
    if config.pooling == "mean":
        return mean_pool(values, cu_seqlens=cu_seqlens)
    if config.pooling == "position-mean":  # weight i for the i-th token of the scope: SGPT, Muennighoff 2022, arXiv 2202.08904
        weights = to_device((positions - first[sequence] + 1).astype(np.float32), device)
        return mean_pool(values, cu_seqlens=cu_seqlens, weights=weights)
    if config.pooling == "last":
        return last_pool(values, cu_seqlens=cu_seqlens)
    if config.pooling == "attention":
        return attention_pool(values, states.attention.scores(*chosen), cu_seqlens=cu_seqlens)[0].mean(1)
    if config.pooling == "query":
        return query_pool(values, query, cu_seqlens=cu_seqlens)[0][:, 0]
    raise InputError(f"unknown pooling {config.pooling!r}: take one of {', '.join(POOLINGS)}")
