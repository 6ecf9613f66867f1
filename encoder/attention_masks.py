"""Hide tokens from a sequence's last token, in some layers: what does its vector lose without them?

Only what the last token itself attends to is changed. Other tokens still see the hidden ones, and what they took from them reaches the
last token all the same.

Legend: B sequences of a batch, n tokens of a sequence.
"""

import copy
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch import Tensor

from encoder.packing import PackedBatch
from encoder.runtime import to_device
from files.console import InputError

if TYPE_CHECKING:
    from encoder.encoder import Encoder

Hides = Callable[[list[int], tuple[int, int]], np.ndarray]


class AttentionMask(NamedTuple):
    """Which tokens are hidden from the last token of every sequence, and in which layers.

    hides     token ids of a sequence (n) and where its text starts and ends -> bool (n,), true where a token is hidden. What it says of
              the last token is not obeyed: attention has to go somewhere.
    layers    counted from 0
    """

    hides: Hides
    layers: frozenset[int]

    def of(self, batch: PackedBatch) -> dict[int, Tensor]:
        """Of each layer the hidden tokens of a batch: bool (B, longest) by their position in the sequence."""
        lengths = batch.lengths
        hidden = np.zeros((len(lengths), int(lengths.max(initial=0))), bool)
        ids, places = batch.ids.cpu().numpy(), batch.locate(np.zeros_like(lengths), lengths)[0]
        for row, (sequence, span) in enumerate(zip(np.split(ids[places], np.cumsum(lengths)[:-1]), batch.spans, strict=True)):
            chosen = self.hides(sequence.tolist(), tuple(span.tolist()))
            hidden[row, : len(sequence) - 1] = chosen[: len(sequence) - 1] if len(sequence) else ()
        return dict.fromkeys(self.layers, to_device(hidden, batch.ids.device))


def hiding(encoder: "Encoder", hides: Hides, layers: Iterable[int] | None = None) -> "Encoder":
    """The same weights in memory, read with tokens hidden from every sequence's last token. `encoder` itself stays as it was.

    hides     see `AttentionMask`
    layers    blocks, counted from 0 (default: all)
    The result's fingerprint is that of `encoder`, although its vectors are others: it is for looking, not for storing.
    Raises InputError for a class of models that is padded, and for layers that do not exist.
    """
    n_layers = len(encoder.blocks)
    layers = frozenset(range(n_layers) if layers is None else layers)
    if not encoder.packed:
        raise InputError(f"{type(encoder.decoder).__name__} does not let its attention be changed: take a class that is packed")
    if not layers <= set(range(n_layers)):
        raise InputError(f"layers {sorted(layer + 1 for layer in layers)}: this model has layers 1 to {n_layers}")
    other = copy.copy(encoder)
    other.attention_mask = AttentionMask(hides, layers)
    other.share_prefix = False  # the last token of a text that is empty may lie in the prefix, which other texts share
    return other
