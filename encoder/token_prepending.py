"""Token prepending (Fu et al. 2024, arXiv 2412.11556): the tokens of a causal model see the whole text, without training.

A placeholder stands before the text, and as in the paper before the quotation mark that opens it. After each layer from `first` to
`last` it is given the state of the sequence's last token, which has seen all, and in the next layer every token of the text attends to
it. The paper's range for Llama 2 7B, of 32 layers, is 1 to 6, its vector the last token's state in layer 27. Its placeholder is a new
token with a random embedding; ours is a copy of the last token, so that nothing is random and the tokenizer stays as it is.

Legend: B sequences of a batch, T tokens of its row, D hidden size.
"""

import contextlib
from collections.abc import Iterator

import numpy as np
from torch import Tensor, nn

from encoder.contract import Layer
from encoder.packing import PackedBatch
from encoder.runtime import to_device
from encoder.states import check_layer
from files.console import InputError


def replaced_layers(ends: tuple[Layer, Layer], n_layers: int) -> range:
    """The layers of a contract's token_prepending. Raises InputError where they are not among 1 to n_layers - 1, in this order."""
    first, last = (check_layer(layer, n_layers) for layer in ends)
    if not 1 <= first <= last < n_layers:
        asked = "..".join(map(str, ends))
        raise InputError(f"token_prepending {asked}: take layers from 1 to {n_layers - 1} of this model, the first one first")
    return range(first, last + 1)


def _places(batch: PackedBatch, packed: bool) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Where in states (rows, tokens, D) the placeholders are, and where the last tokens of the same sequences."""
    lengths, at = batch.lengths, batch.placeholder
    present = lengths > at  # a sequence without a token has none
    pairs = []
    for first in (np.full_like(lengths, at), lengths - 1):
        places, positions, sequence = batch.locate(np.where(present, first, 0), np.where(present, first + 1, 0))
        index = (np.zeros_like(places), places) if packed else (sequence, positions)
        pairs.append(tuple(to_device(x, batch.ids.device) for x in index))
    return tuple(pairs)


@contextlib.contextmanager
def prepended(blocks: nn.ModuleList, layers: range, batch: PackedBatch, packed: bool) -> Iterator[None]:
    """While it is open, placeholders are given the states of last tokens in these layers. Recorded states are those from before."""
    placeholders, last = _places(batch, packed)

    def hook(_, args, kwargs):
        state = args[0] if args else kwargs["hidden_states"]
        state = state.index_put(placeholders, state[last])
        return ((state, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": state})

    hooks = [blocks[layer].register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]  # block k reads layer k's states
    try:
        yield
    finally:
        for registered in hooks:
            registered.remove()
