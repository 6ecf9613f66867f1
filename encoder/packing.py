"""From tokenized texts to batches without padding, and the attention of such a batch.

A batch is one row of tokens: the prefix that all its sequences share, once, and behind it the rest of each sequence. Positions
start again behind the prefix for each. A causal model sees exactly what it would see of each sequence alone: the prefix, and the
sequence's own tokens up to the present one.

Legend: B sequences of a batch, T tokens of its row, L the longest rest of a sequence, H attention heads, K heads of keys and
values, d numbers of a head, M tokens chosen, D hidden size.
"""

import contextlib
import functools
import inspect
import itertools
from collections.abc import Callable, Collection
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from encoder.contract import PoolingConfig
from encoder.runtime import to_device
from encoder.tokenization import TokenizedTexts

try:
    from torch.nn.attention.varlen import varlen_attn

    VARLEN_PARAMETERS = inspect.signature(varlen_attn).parameters  # they change from release to release
except ImportError:
    VARLEN_PARAMETERS = {}
# Without splits a text's bits do not depend on its neighbours. The kernel of torch 2.12 refuses the argument that its signature has,
# unless FlashAttention 3 is installed besides; ROCm has no splits and refuses to be told so.
VARLEN_TAKES_SPLITS = torch.__version__ >= (2, 13) and not torch.version.hip

MIN_SHARED_PREFIX = 4  # tokens that must be shared before sharing them pays
SHORTEST_IN_STACK = 0.65  # as a share of the longest sequence that is stacked with it; measured in bench/README.md

# ------------------------------------------------------------------------------------------------------------- batches


class PackedBatch(NamedTuple):
    """Sequences in one row: [shared prefix | rest of the first sequence | rest of the second | ...]."""

    ids: Tensor  # (T,)
    positions: Tensor  # (T,) of each token in its sequence, prefix included
    prefix_length: int  # tokens of the shared prefix; 0 where nothing is shared
    starts: np.ndarray  # (B+1,) where in the row each sequence's rest starts, and T
    spans: np.ndarray  # (B, 2) where in its sequence each text starts and ends
    bos: int  # 1 where sequences begin with BOS
    placeholder: int | None = None  # where in its sequence the placeholder of token prepending stands
    more: tuple["PackedBatch", ...] = ()  # the same texts under the other prompts of their role

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence (B,), shared prefix included."""
        return self.prefix_length + np.diff(self.starts)

    def pooled_range(self, pooling: PoolingConfig) -> tuple[np.ndarray, np.ndarray]:
        """First, and one past the last, token of each sequence that takes part in pooling: (B,), (B,).

        For an empty text that is its prompt, and for a sequence without a prompt BOS.
        """
        end = self.lengths
        first = np.full_like(end, 0 if pooling.keep_bos else self.bos)
        if pooling.scope == "text":
            start, stop = self.spans.T
            first, end = np.where(start < stop, start, first), np.where(start < stop, stop, end)
        return np.where(first < end, first, 0), end

    def locate(self, first: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens [first, end) of every sequence -> their places in the row, positions and sequence numbers, (M,) each."""
        size = end - first
        sequence = np.repeat(np.arange(len(size)), size)
        positions = np.arange(len(sequence)) + (first - np.cumsum(size) + size)[sequence]
        in_rest = positions - self.prefix_length + self.starts[sequence]
        return np.where(positions < self.prefix_length, positions, in_rest), positions, sequence


def collate(tokenized: TokenizedTexts, rows: list[int], prefix_length: int, bos: bool, device: torch.device) -> PackedBatch:
    """The chosen texts, under one prompt, as one batch on the device; `prefix_length` tokens at their beginning are shared."""
    rests = [tokenized.ids[i][prefix_length:] for i in rows]
    sizes = np.array([len(rest) for rest in rests])
    starts = prefix_length + np.concatenate([[0], np.cumsum(sizes)])
    ids = np.fromiter(itertools.chain(tokenized.ids[rows[0]][:prefix_length], *rests), np.int64, starts[-1])
    positions = np.arange(len(ids))
    positions[prefix_length:] += prefix_length - np.repeat(starts[:-1], sizes)
    on_device = (to_device(x, device) for x in (ids, positions))
    spans = np.array([tokenized.spans[i] for i in rows])
    return PackedBatch(*on_device, prefix_length, starts, spans, int(bos), tokenized.placeholder)


def plan_batches(cost: dict[int, int], budget: int, padded: bool) -> list[list[int]]:
    """Rows with their cost in tokens -> batches of rows of like length, longest first, of at most `budget` tokens each.

    padded     every row of a batch costs as much as its longest
    """
    order = sorted(cost, key=lambda row: -cost[row])
    total, batches, room = sum(cost.values()), [], 0
    even = total / max(1, -(-total // budget))  # as many batches as it takes, of about the same size
    for row in order:
        size = cost[batches[-1][0] if padded and batches else row]
        if not batches or size > room or budget - room >= even:
            batches.append([])
            size, room = cost[row], budget
        batches[-1].append(row)
        room -= size
    return batches


def pad(batch: PackedBatch) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
    """For a model that cannot be packed: padded inputs (B, longest), and where in them each token of the row stands."""
    lengths = batch.lengths
    _, positions, sequence = batch.locate(np.zeros_like(lengths), lengths)
    places = tuple(to_device(x, batch.ids.device) for x in (sequence, positions))
    ids, mask = (torch.zeros(len(lengths), int(lengths.max()), dtype=torch.long, device=batch.ids.device) for _ in range(2))
    ids[places], mask[places] = batch.ids, 1
    return {"input_ids": ids, "attention_mask": mask}, places


# ----------------------------------------------------------------------------------------- the attention of packed rows


def varlen_supports(query: Tensor) -> bool:
    """Half precision on a GPU of Ampere or later, torch 2.11 or later, heads of a size that flash attention takes."""
    if not query.is_cuda or "window_size" not in VARLEN_PARAMETERS or query.dtype not in (torch.float16, torch.bfloat16):
        return False
    return (
        query.shape[-1] % 8 == 0
        and (torch.version.hip or torch.cuda.get_device_capability(query.device) >= (8, 0))
        and _flash_takes_heads(query.shape[-1], query.dtype, query.device, query.requires_grad)
    )


@functools.cache
def _flash_takes_heads(size: int, dtype: torch.dtype, device: torch.device, backward: bool) -> bool:
    """PyTorch's rule for the size of heads, which is narrower for the backward pass on consumer GPUs."""
    x = torch.empty(1, 1, 1, size, dtype=dtype, device=device, requires_grad=backward)
    return torch.backends.cuda.can_use_flash_attention(torch.backends.cuda.SDPAParams(x, x, x, None, 0.0, True, False))


def select_tokens(values: Tensor, prefix_length: int, places: np.ndarray, positions: np.ndarray, sequence: np.ndarray) -> Tensor:
    """Rows of `values` (T, ...) for the tokens that `PackedBatch.locate` returned -> (M, ...).

    Every sequence takes the shared prefix. Where gradients are wanted it is first copied for each, by `expand`: the gradients of
    the copies are then added up in one reduction, in float32, and every row is taken once. `index_select` alone would add them
    one after the other in the type of the values, in bfloat16 with an error of percents, and on a GPU in any order.
    """
    device = values.device
    if not (prefix_length and values.requires_grad and torch.is_grad_enabled()):
        return values.index_select(0, to_device(places, device))
    prefix, n = values[:prefix_length], int(sequence.max(initial=-1)) + 1
    copies = prefix.expand(n, *prefix.shape).flatten(0, 1)
    rows = np.where(positions < prefix_length, sequence * prefix_length + positions, (n - 1) * prefix_length + places)
    return torch.cat([copies, values[prefix_length:]]).index_select(0, to_device(rows, device))


# what `PackedAttention` shows the queries and keys of every layer to: layer (from 0), query (T, H, d), key (T, K, d), scale, window
ReadLayer = Callable[["PackedAttention", int, Tensor, Tensor, float, int | None], None]


class KeysReady(Exception):
    """The trimmed layer's keys and values are stored; the rest of this pass through the layer is not needed."""


class PackedAttention:
    """Attention in a packed row: a sequence sees the shared prefix and itself. One object travels with every forward pass.

    Two implementations give the same numbers. "varlen" is one call of flash attention for sequences of any length, on a GPU in
    half precision. "stacked" lays sequences of like length, which sorting brings together, under each other for PyTorch's
    SDPA. "auto" takes the first where the device supports it.

    scored_layers    the layers whose keys, and whose queries of each sequence's last token, are kept for `scores`
    trimmed_layer    the layer that computes each sequence's last token only, see `trim_hook`
    read             is shown queries and keys of every layer before they are used; for passes without a trimmed layer
    hidden           in some layers (from 0) the tokens that a sequence's last token does not see: bool (B, longest) by position in
                     the sequence, see `encoder/attention_masks.py`
    """

    def __init__(
        self,
        batch: PackedBatch,
        causal: bool,
        scored_layers: Collection[int] = (),
        trimmed_layer: int | None = None,
        implementation: str = "auto",
        read: ReadLayer | None = None,
        hidden: dict[int, Tensor] | None = None,
    ):
        self.batch, self.causal, self.scored_layers, self.trimmed_layer = batch, causal, scored_layers, trimmed_layer
        self.implementation, self.read, self.hidden = implementation, read, hidden or {}
        self.prefix_length, self.device = batch.prefix_length, batch.ids.device
        self.trimmed_keys: tuple[Tensor, Tensor] | None = None  # keys and values of the trimmed layer
        self.scored: dict[int, tuple[Tensor, Tensor, float, int | None]] = {}  # of a layer: last queries, keys, scale, window
        self.released = False

    def release(self) -> None:
        """Forget the stored keys and queries, once states have been pooled or the forward pass has failed.

        With gradient checkpointing they hold a graph whose frames hold this object: a cycle through C++ that Python cannot see,
        so that neither would ever be freed.
        """
        self.released, self.scored, self.trimmed_keys = True, {}, None

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, dropout: float) -> Tensor:
        """query (T, H, d), key and value (T, K, d) -> (T, H, d); in a trimmed layer B instead of T."""
        if self.read is not None:
            self.read(self, layer, query, key, scale, window)
        if layer in self.scored_layers:
            scored = query[self.last_places], key, scale, window
            if not self.released:  # gradient checkpointing comes here again, and must do the same
                self.scored[layer] = scored
        if trimmed := layer == self.trimmed_layer:
            if self.trimmed_keys is None:
                self.trimmed_keys = key, value
                raise KeysReady
            key, value = self.trimmed_keys
        implementation = self.implementation
        if implementation == "auto":
            implementation = "varlen" if varlen_supports(query) and not dropout else "stacked"
        attend = self.varlen if implementation == "varlen" else self.stacked
        out = attend(query, key, value, scale, window, dropout, trimmed)
        if layer not in self.hidden:
            return out
        last = self.stacked(query if trimmed else query[self.last_places], key, value, scale, window, dropout, True, self.hidden[layer])
        return last if trimmed else out.index_copy(0, self.last_places, last)

    def _on_device(self, array: np.ndarray) -> Tensor:
        return to_device(array, self.device)

    @functools.cached_property
    def last_places(self) -> Tensor:
        """Place in the row of each sequence's last token (B,)."""
        lengths = self.batch.lengths
        return self._on_device(self.batch.locate(lengths - 1, lengths)[0])

    def scores(self, layer: int, places: np.ndarray, positions: np.ndarray, sequence: np.ndarray) -> Tensor:
        """Scores (M, H) in a layer, before the softmax, that each sequence's last token gives to the tokens of `PackedBatch.locate`."""
        return self.last_scores(*self.scored[layer], places, positions, sequence)

    def last_scores(
        self, query: Tensor, key: Tensor, scale: float, window: int | None, places: np.ndarray, positions: np.ndarray, sequence: np.ndarray
    ) -> Tensor:
        """The same from the queries of the last tokens (B, H, d) and all keys (T, K, d)."""
        query = query.unflatten(1, (key.shape[1], -1))  # (B, K, H/K, d)
        beyond = 0 if window is None else self.batch.lengths[sequence] - 1 - positions - window + self.causal  # above 0: out of the window
        chunks = zip(self._on_device(places).split(8192), self._on_device(sequence).split(8192), strict=True)  # (M, H, d) is large
        with torch.autocast(self.device.type, enabled=False):
            scores = [(query[b].float() * key[t].float()[:, :, None]).sum(-1).flatten(1) * scale for t, b in chunks]
        hidden = self._on_device(np.broadcast_to(beyond, places.shape) > 0)[:, None]
        return torch.cat(scores).masked_fill(hidden, -torch.inf)

    # varlen: all sequences in one call

    @functools.cached_property
    def _varlen_layout(self) -> tuple[Tensor, Tensor, int]:
        """The prefix as a sequence by itself, then every whole sequence: cu_seqlens of queries, of keys, the longest sequence."""
        lengths = self.batch.lengths
        key_ends = np.cumsum([0, self.prefix_length, *lengths]) if self.prefix_length else np.cumsum([0, *lengths])
        query_ends = [0, *self.batch.starts] if self.prefix_length else self.batch.starts
        cu_seqlens = (self._on_device(np.asarray(ends, np.int32)) for ends in (query_ends, key_ends))
        return *cu_seqlens, int(lengths.max())

    def varlen(self, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, _: float, trimmed: bool) -> Tensor:
        cu_query, cu_key, longest = self._varlen_layout
        prefix, lengths = self.prefix_length, self.batch.lengths
        if prefix:
            places, positions, sequence = self.batch.locate(np.zeros_like(lengths), lengths)
            if trimmed:  # no query is a token of the prefix
                cu_key = cu_key[1:] - prefix
            else:
                alone = np.arange(prefix)
                places, positions = (np.concatenate([alone, x]) for x in (places, positions))
                sequence = np.concatenate([np.full(prefix, len(lengths)), sequence])
            key, value = (select_tokens(x, prefix, places, positions, sequence) for x in (key, value))
        longest_query = 1 if trimmed else longest
        if trimmed:
            cu_query = torch.arange(len(query) + 1, dtype=torch.int32, device=self.device)
        # every release takes keys with fewer heads than queries; newer ones want to be told
        extra = {"enable_gqa": True} | ({"num_splits": 1} if VARLEN_TAKES_SPLITS else {})
        back = -1 if window is None else window - 1 if self.causal else window
        ahead = 0 if self.causal else back  # the last query is aligned with the last key, however many keys there are
        if trimmed and back < 0 and not torch.is_grad_enabled():
            ahead = -1  # nothing is behind the last token anyway, and for one query without a window there is a faster kernel
        return varlen_attn(
            query, key, value, cu_query, cu_key, longest_query, longest, scale=scale, window_size=(back, ahead),
            **{name: value for name, value in extra.items() if name in VARLEN_PARAMETERS},
        )  # fmt: skip

    # stacked: sequences of like length under each other

    @functools.cached_property
    def _stacks(self) -> list["Stack"]:
        return [Stack(self.batch, self.causal, rows) for rows in like_lengths(np.diff(self.batch.starts))]

    def stacked(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None,
        dropout: float,
        trimmed: bool,
        hidden: Tensor | None = None,
    ) -> Tensor:
        def attend(q, k, v, visible, causal=False):  # (B, L, H, d) and (B, S, K, d) -> (B, L, H, d)
            settings = {"attn_mask": visible, "is_causal": causal, "scale": scale, "dropout_p": dropout}
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, **settings, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)

        prefix, stacks = self.prefix_length, self._stacks
        sizes = [prefix, *(stack.n_tokens for stack in stacks)]
        (first_key, *keys), (first_value, *values) = key.split(sizes), value.split(sizes)  # those of the prefix first
        first_query, *queries = query.split([0, *(stack.shape[0] for stack in stacks)] if trimmed else sizes)
        out = []
        if prefix and not trimmed:
            place = torch.arange(prefix, device=self.device)
            near = (place[:, None] - place < window).tril() if window is not None and window < prefix else None
            out.append(attend(first_query[None], first_key[None], first_value[None], near, near is None)[0])
        for stack, q, *keys_and_values in zip(stacks, queries, keys, values, strict=True):
            if not len(q):  # sequences that are nothing but the prefix
                continue
            k, v = (stack.lay(x, first) for x, first in zip(keys_and_values, (first_key, first_value), strict=True))
            visible = stack.visible(window, trimmed)
            if not trimmed:
                out.append(stack.pick(attend(stack.lay(q), k, v, visible, self.causal and visible is None)))
                continue
            if hidden is not None:
                visible = visible & ~hidden[stack.rows, None, None, : k.shape[1]]
            out.append(attend(q[:, None], k, v, visible)[:, 0])
        return out[0] if len(out) == 1 else torch.cat(out)


def like_lengths(lengths: np.ndarray) -> list[slice]:
    """Sequences sorted by length, longest first -> ranges of which none is padded by much; all in one where they are not sorted.

    A batch of training has short texts beside long ones. Attention's time grows with the square of the padded length, a range
    costs a few small operations in each layer.
    """
    if len(lengths) == 0 or (np.diff(lengths) > 0).any():
        return [slice(0, len(lengths))]
    first = [0]
    for row, length in enumerate(lengths):
        if length < SHORTEST_IN_STACK * lengths[first[-1]]:
            first.append(row)
    return [slice(a, b) for a, b in itertools.pairwise([*first, len(lengths)])]


class Stack:
    """Neighbouring sequences of a batch, the rests of which are laid under each other: B sequences here, L tokens the longest.

    rows    which sequences of the batch
    """

    def __init__(self, batch: PackedBatch, causal: bool, rows: slice):
        self.rows, self.causal, self.prefix_length, self.device = rows, causal, batch.prefix_length, batch.ids.device
        self.starts = batch.starts[rows.start : rows.stop + 1] - batch.starts[rows.start]
        self.lengths, rests = batch.lengths[rows], np.diff(self.starts)
        self.n_tokens, self.shape = int(self.starts[-1]), (len(rests), int(rests.max(initial=0)))
        self.equal_lengths = bool((rests == self.shape[1]).all())
        self._masks: dict[tuple, Tensor] = {}

    @functools.cached_property
    def _layout(self) -> tuple[Tensor, Tensor]:
        """Which token lies at each place of (B, L), flattened; at which place each token lies."""
        inside = np.arange(self.shape[1]) < np.diff(self.starts)[:, None]
        token = np.where(inside, self.starts[:-1, None] + np.arange(self.shape[1]), 0)
        return to_device(token.ravel(), self.device), to_device(np.flatnonzero(inside), self.device)

    def lay(self, x: Tensor, prefix: Tensor | None = None) -> Tensor:
        """(n, H, d) -> (B, L, H, d), or (B, prefix + L, H, d) with the states of the shared prefix (prefix, H, d) before each."""
        x = x if self.equal_lengths else x.flatten(1).index_select(0, self._layout[0]).unflatten(1, x.shape[1:])
        x = x.unflatten(0, self.shape)
        return x if prefix is None or not len(prefix) else torch.cat([prefix.expand(len(x), *prefix.shape), x], 1)

    def pick(self, x: Tensor) -> Tensor:
        """(B, L, H, d) -> (n, H, d)"""
        x = x.flatten(0, 1)
        return x if self.equal_lengths else x.index_select(0, self._layout[1])

    def visible(self, window: int | None, trimmed: bool) -> Tensor | None:
        """Which keys (prefix + L) a query of each sequence sees: bool (B or 1, 1, L or 1, prefix + L); None: plainly causal, or all."""
        prefix, width = self.prefix_length, self.shape[1]
        if not trimmed and (self.equal_lengths or self.causal) and not prefix and (window is None or window >= width):
            return None
        if (window, trimmed) not in self._masks:
            lengths = to_device(self.lengths, self.device)[:, None, None]
            key = torch.arange(prefix + width, device=self.device)
            query = lengths - 1 if trimmed else prefix + torch.arange(width, device=self.device)[None, :, None]
            distance = query - key  # (B or 1, L, prefix + L)
            reach = prefix + width if window is None else window
            if self.causal:
                visible = (distance >= 0) & (distance < reach)
            else:
                visible = (key < lengths) & (distance.abs() <= reach)
                visible = visible | (distance + key >= lengths)  # a query behind its sequence's end must see something, or it is NaN
            self._masks[window, trimmed] = visible[:, None]
        return self._masks[window, trimmed]


def trim_hook(packed: PackedAttention):
    """A hook before the last layer: once all keys and values are stored, only each sequence's last token goes through it."""

    def hook(block, args, kwargs):
        with contextlib.suppress(KeysReady):
            block.forward(*args, **kwargs)
        kwargs |= {"position_embeddings": tuple(x[:, packed.last_places] for x in kwargs["position_embeddings"])}
        return (args[0][:, packed.last_places], *args[1:]), kwargs

    return hook


@torch.compiler.disable  # also where hooks on layers take effect: compiled code does not see them change
def _packed_attention(
    module, query, key, value, attention_mask, packed: PackedAttention, scaling=None, dropout=0.0, sliding_window=None, **_
):
    """What the model's layers call: query (1, H, T, d), key and value (1, K, T, d) -> (1, T, H, d)."""
    width, n = query.shape[2], len(packed.batch.ids)  # the row may have been filled up
    query, key, value = (x[0].transpose(0, 1)[:n] for x in (query, key, value))
    out = packed(module.layer_idx, query, key, value, scaling, sliding_window, dropout)
    return F.pad(out, (0, 0, 0, 0, 0, width - len(out)))[None], None


# No mask function is registered under this name, so transformers makes no mask: `packed` knows which tokens see each other.
AttentionInterface.register("packed", _packed_attention)
