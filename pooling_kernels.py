"""Pool token states into one vector per row. Texts and slides share these poolings, in PyTorch and as Triton kernels.

    mean_pool       y_b  = sum_t w_t n_t / sum_t w_t                                   (B, D)
    attention_pool  y_bh = sum_t softmax_t(s_th) n_t, and log sum_t exp(s_th)          (B, H, D), (B, H)
    attention_mean_pool   the mean of that over the heads                              (B, D)
    query_pool      the same with s_th = n_t . q_h / sqrt(D), where q is learned       (B, H, D), (B, H)
    last_pool       y_b  = n_t of the last valid token t                               (B, D)
    max_pool        y_bd = max_t x_td, in PyTorch alone                                (B, D)

n_t is the value x_t. With `norm_weight` g (D,) it is RMSNorm(x_t) = g x_t / sqrt(mean(x_t^2) + eps) (Zhang and Sennrich 2019,
arXiv 1910.07467). Pass the states before the model's final norm then: the normalized states are never written to memory.
`normalize=True` divides y by its L2 norm.

Values come in one of two layouts. Packed: rows (T, D) one after the other, with `cu_seqlens` (B+1,), the running sum of the row
lengths, which starts at 0. Padded: (B, L, D) with a boolean `mask` (B, L) that is True at valid tokens. The padding may be on
the left, on the right or in between. Sums and outputs are float32 whatever the type of the input, or float64 for float64 input.
Gradients reach values, weights, scores, query and norm_weight.

A row gives zeros and a zero gradient, never NaN, if it has no tokens, if all its weights are 0 or if all its scores are -inf.
Its log-sum-exp is -inf. A masked token, or one of weight 0 or score -inf, has no influence on outputs or gradients, even if it
holds NaN. Addresses have 64 bits: values may have more than 2^31 elements, any strides and any D.

`backend="auto"` uses the kernels on a GPU where Triton can launch them, and the PyTorch reference elsewhere. "torch" forces the
reference, "triton" the kernels. Wrong shapes, an unknown backend, or "triton" where the kernels cannot run raise a ValueError.

How the kernels work. Forward, each row's tokens are cut into splits. One kernel reads the values once: each program takes one
split and a block of features, or all features where a norm or a query needs whole tokens. A second kernel merges the splits.
The softmax is computed online (Milakov and Gimelshein 2018, arXiv 1805.02867) and split along the tokens as in Flash-Decoding
(Dao et al. 2023). Backward, one kernel passes once over the tokens. There are no atomic operations: results repeat to the bit.

Legend: B rows (texts, slides), L padded length, T packed tokens, D features, H heads, S splits of a row.
scores      (B, L, H) or (T, H): attention scores; in mode "mean" the weights of a weighted mean, with H = 1
row_max     largest score of a row and head, or of a split while the splits are not merged
denominator sum over a row's (or split's) tokens of exp(score - row_max), or of the weights in modes "mean" and "last"
normalizer  (B, H): log-sum-exp of the scores in modes "attention" and "query", the denominator in modes "mean" and "last"
"""

import functools
import math
import os
import subprocess
import warnings

import torch
from torch import Tensor

# 1 rounds a * b + c once, as the kernels were tested. It is the default today, but Triton 3.10 will change the default.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton for this platform: the reference is used
    triton = None

INTERPRETED = triton is not None and triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: the kernels run on a CPU, for tests

# ----------------------------------------------------------------------------------------------------- the reference


def _accumulator(values: Tensor) -> torch.dtype:
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def _row_of_each_token(values: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, int]:
    """-> row of each token (T,), B for a token of no row; and B. No shape depends on the contents: torch.compile needs that."""
    if cu_seqlens is None:
        n_rows = len(mask)
        return torch.where(mask.bool(), torch.arange(n_rows, device=mask.device)[:, None], n_rows).flatten(), n_rows
    tokens = torch.arange(len(values), device=values.device)
    return torch.bucketize(tokens, cu_seqlens[1:].to(tokens.dtype), right=True), len(cu_seqlens) - 1


def _reference(values, scores, query, mask, cu_seqlens, mode, norm, eps, mean_of_heads):
    """-> pooled (B, H, D), normalizer (B, H), in plain differentiable PyTorch. `norm` divides x by its root mean square.

    With `mean_of_heads` pooled is (B, 1, D): the weights' mean is taken, so that the values are read once and not for every head.
    """
    dtype, width = _accumulator(values), values.shape[-1]
    row, n_rows = _row_of_each_token(values, mask, cu_seqlens)
    softmax = mode in ("attention", "query")
    valid = row < n_rows  # (T,)
    if scores is not None:
        no_influence = -torch.inf if softmax else 0
        scores = scores.to(dtype).flatten(0, -2)  # (T, H)
        valid = valid & (scores != no_influence).any(-1)
        scores = scores.masked_fill(~valid[:, None], no_influence)
        row = torch.where(valid, row, n_rows)
    # sums of tokens without influence go to a row of their own, which is cut off: no copy of all values to set theirs to 0
    x = values.reshape(-1, width).to(dtype)  # (T, D)
    if norm or mode == "query":  # where whole tokens are read, as are the values in the query's gradient
        x = x.masked_fill(~valid[:, None], 0)
    if norm:
        x = x * torch.rsqrt(torch.where(valid, x.square().mean(-1) + eps, 1))[:, None]
    if mode == "query":
        scores = (x @ query.T).masked_fill(~valid[:, None], -torch.inf)
    if mode == "last":
        position = torch.arange(1, len(row) + 1, device=row.device) * valid
        last = position.new_zeros(n_rows + 1).scatter_reduce(0, row, position, "amax")
        scores = (valid & (position == last[row])).to(dtype)[:, None]
    weights = valid.to(dtype)[:, None] if scores is None else scores
    if softmax:
        row_max = scores.new_full((n_rows + 1, scores.shape[1]), -torch.inf)
        row_max = row_max.scatter_reduce(0, row[:, None].expand_as(scores), scores.detach(), "amax")
        row_max = torch.where(row_max == -torch.inf, 0, row_max)  # if all scores are -inf, the next line would compute inf - inf
        weights = torch.exp(scores - row_max[row])
    denominator = x.new_zeros(n_rows + 1, weights.shape[1]).index_add(0, row, weights)  # (B + 1, H)
    divisor = torch.where(denominator > 0, denominator, 1)
    normalizer = torch.where(denominator > 0, divisor.log() + row_max, -torch.inf) if softmax else denominator
    if mean_of_heads:
        weights, divisor = (weights / divisor[row]).mean(1, keepdim=True), divisor.new_ones(n_rows + 1, 1)
    weighted = [x] if scores is None else (weights[:, h : h + 1] * x for h in range(weights.shape[1]))
    sums = [x.new_zeros(n_rows + 1, width).index_add(0, row, tokens)[:n_rows] for tokens in weighted]
    return torch.stack(sums, 1) / divisor[:n_rows, :, None], normalizer[:n_rows]


# ------------------------------------------------------------------------------------------------------- the kernels

if triton is not None:
    # What changes from batch to batch: Triton would compile a kernel again for sizes of 1, for multiples of 16 and for others.
    BATCH_SIZES = ["B", "L", "T", "S", "scores_stride_b", "mask_stride_b"]

    @triton.jit
    def _token_range(cu_seqlens_ptr, mask_ptr, mask_stride_l, b, L, PACKED: tl.constexpr, MASKED: tl.constexpr, LAST: tl.constexpr):
        """First token of row b and the one after its last token. With LAST the range holds only the row's last valid token."""
        first = tl.full((), 0, tl.int64)
        end = first + L
        if PACKED:
            first = tl.load(cu_seqlens_ptr + b).to(tl.int64)
            end = tl.load(cu_seqlens_ptr + b + 1).to(tl.int64)
        if LAST:
            if MASKED:
                last = tl.full((), -1, tl.int64)
                for t0 in range(0, L, 1024):
                    t = t0 + tl.arange(0, 1024)
                    valid = tl.load(mask_ptr + t.to(tl.int64) * mask_stride_l, mask=t < L, other=0) != 0
                    last = tl.maximum(last, tl.max(tl.where(valid, t, -1), 0).to(tl.int64))
                end = last + 1
            first = tl.maximum(first, end - 1)
        return first, end

    @triton.jit(do_not_specialize=BATCH_SIZES)
    def _pool_fwd_kernel(
        x_ptr, scores_ptr, query_ptr, mask_ptr, cu_seqlens_ptr,
        split_pooled_ptr, split_max_ptr, split_denominator_ptr,  # (B, S, H, D), (B, S, H), (B, S, H)
        L, D, H, S, eps,
        x_stride_b, x_stride_l, x_stride_d, scores_stride_b, scores_stride_l, scores_stride_h, mask_stride_b, mask_stride_l,
        MODE: tl.constexpr, WEIGHTED: tl.constexpr, PACKED: tl.constexpr, MASKED: tl.constexpr, NORM: tl.constexpr,
        ACC: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr,
    ):  # fmt: skip
        """Weighted sum of one split's tokens, not yet divided. One function, though long: a single loop reads the values once."""
        b, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
        # The block numbers below are constants where possible: as run-time values they would occupy registers throughout the loop,
        # and the mean after RMSNorm would then spill registers on sm_90.
        ALL_FEATURES: tl.constexpr = NORM or (MODE == "query")  # one block of features holds whole tokens
        ONE_HEAD: tl.constexpr = (MODE == "mean") or (MODE == "last")
        d_blocks = tl.cdiv(D, BLOCK_D)
        h = (0 if ONE_HEAD else tl.program_id(2) // d_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
        d = (0 if ALL_FEATURES else tl.program_id(2) % d_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
        SOFTMAX: tl.constexpr = (MODE == "attention") or (MODE == "query")
        if MASKED:
            mask_ptr += b * mask_stride_b
        first, end = _token_range(cu_seqlens_ptr, mask_ptr, mask_stride_l, b, L, PACKED, MASKED, MODE == "last")
        split_length = tl.cdiv(tl.cdiv(end - first, S), BLOCK_T) * BLOCK_T  # in tokens, a multiple of BLOCK_T
        start = first + split * split_length
        stop = tl.minimum(start + split_length, end)
        x_ptr += b * x_stride_b + d[None, :].to(tl.int64) * x_stride_d
        scores_ptr += b * scores_stride_b + h[None, :].to(tl.int64) * scores_stride_h
        if MODE == "query":
            query = tl.load(query_ptr + tl.sum(h, 0) * D + d, mask=d < D, other=0)  # BLOCK_H is 1: the sum makes h a scalar
        row_max = tl.full((BLOCK_H,), float("-inf"), ACC)
        denominator = tl.zeros((BLOCK_H,), ACC)
        pooled = tl.zeros((BLOCK_H, BLOCK_D), ACC)
        for t0 in range(start, stop, BLOCK_T):
            t = t0 + tl.arange(0, BLOCK_T).to(tl.int64)
            valid = t < stop
            if MASKED:
                valid = valid & (tl.load(mask_ptr + t * mask_stride_l, mask=valid, other=0) != 0)
            if MODE == "attention":
                readable = valid[:, None] & (h < H)[None, :]
                score = tl.load(scores_ptr + t[:, None] * scores_stride_l, mask=readable, other=float("-inf")).to(ACC)
                valid = tl.max((score != float("-inf")).to(tl.int32), 1) != 0
            elif WEIGHTED:
                weight = tl.load(scores_ptr + t[:, None] * scores_stride_l, mask=valid[:, None], other=0).to(ACC)
                valid = tl.max((weight != 0).to(tl.int32), 1) != 0
            else:
                weight = tl.broadcast_to(valid.to(ACC)[:, None], (BLOCK_T, BLOCK_H))
            x = tl.load(x_ptr + t[:, None] * x_stride_l, mask=valid[:, None] & (d < D)[None, :], other=0).to(ACC)
            if NORM:
                x *= tl.rsqrt(tl.where(valid, tl.sum(x * x, 1) / D + eps, 1))[:, None]
            if MODE == "query":
                score = tl.where(valid, tl.sum(x * query[None, :], 1), float("-inf"))[:, None]
            if SOFTMAX:
                new_max = tl.maximum(row_max, tl.max(score, 0))
                shift = tl.where(new_max == float("-inf"), 0, new_max)  # no valid token so far: avoid inf - inf
                weight = tl.exp(score - shift[None, :])
                rescale = tl.exp(row_max - shift)
                denominator *= rescale
                pooled *= rescale[:, None]
                row_max = new_max
            denominator += tl.sum(weight, 0)
            if BLOCK_H == 1:
                pooled += tl.sum(weight * x, 0)[None, :]
            else:
                pooled += tl.sum(weight[:, :, None] * x[:, None, :], 0)
        out = (b * S + split) * H + h  # (BLOCK_H,)
        tl.store(split_pooled_ptr + out[:, None] * D + d[None, :], pooled, mask=(h < H)[:, None] & (d < D)[None, :])
        if tl.program_id(2) % d_blocks == 0:
            tl.store(split_max_ptr + out, row_max, mask=h < H)
            tl.store(split_denominator_ptr + out, denominator, mask=h < H)

    @triton.jit(do_not_specialize=BATCH_SIZES)
    def _merge_kernel(
        split_pooled_ptr, split_max_ptr, split_denominator_ptr, norm_weight_ptr,
        out_ptr, pooled_ptr, normalizer_ptr,  # (B, H, D), the same before norm weight and L2 norm, (B, H)
        D, H, S,
        SOFTMAX: tl.constexpr, NORM: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        """Add up a row's splits, divide by the denominator, then apply the norm weight and the L2 norm."""
        b, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
        d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
        ACC: tl.constexpr = split_pooled_ptr.dtype.element_ty
        row_max = tl.full((), float("-inf"), ACC)
        if SOFTMAX:
            for s0 in range(0, S, BLOCK_S):
                s = s0 + tl.arange(0, BLOCK_S)
                split_max = tl.load(split_max_ptr + (b * S + s) * H + h, mask=s < S, other=float("-inf"))
                row_max = tl.maximum(row_max, tl.max(split_max, 0))
        shift = tl.where(row_max == float("-inf"), 0, row_max)  # no valid token in the row: avoid inf - inf
        denominator = tl.full((), 0, ACC)
        pooled = tl.zeros((BLOCK_D,), ACC)
        for s0 in range(0, S, BLOCK_S):
            s = s0 + tl.arange(0, BLOCK_S)
            at = (b * S + s) * H + h
            rescale = (s < S).to(ACC)
            if SOFTMAX:
                rescale = tl.exp(tl.load(split_max_ptr + at, mask=s < S, other=float("-inf")) - shift)
            denominator += tl.sum(rescale * tl.load(split_denominator_ptr + at, mask=s < S, other=0), 0)
            split_pooled = tl.load(split_pooled_ptr + at[:, None] * D + d[None, :], mask=(s < S)[:, None] & (d < D)[None, :], other=0)
            pooled += tl.sum(rescale[:, None] * split_pooled, 0)
        pooled /= tl.where(denominator > 0, denominator, 1)
        at = (b * H + h) * D + d
        tl.store(pooled_ptr + at, pooled, mask=d < D)
        if NORM:
            pooled *= tl.load(norm_weight_ptr + d, mask=d < D, other=0).to(ACC)
        if NORMALIZE:
            pooled /= tl.maximum(tl.sqrt(tl.sum(pooled * pooled, 0)), 1e-12)
        if NORM or NORMALIZE:
            tl.store(out_ptr + at, pooled, mask=d < D)
        if tl.program_id(2) == 0:
            normalizer = denominator
            if SOFTMAX:
                normalizer = tl.where(denominator > 0, tl.log(tl.where(denominator > 0, denominator, 1)) + shift, float("-inf"))
            tl.store(normalizer_ptr + b * H + h, normalizer)

    @triton.jit(do_not_specialize=BATCH_SIZES)
    def _pool_bwd_kernel(
        x_ptr, scores_ptr, query_ptr, mask_ptr, cu_seqlens_ptr, normalizer_ptr,
        dpooled_ptr, delta_ptr,  # (B, H, D) gradient; (B, H) dpooled . pooled - gradient of the log-sum-exp
        dx_ptr, dscores_ptr, dquery_ptr,  # shape of x, contiguous; (B, L, H) or (T, H); (B, S, H, D)
        B, L, T, D, H, S, eps,
        x_stride_b, x_stride_l, x_stride_d, scores_stride_b, scores_stride_l, scores_stride_h, mask_stride_b, mask_stride_l,
        MODE: tl.constexpr, WEIGHTED: tl.constexpr, PACKED: tl.constexpr, MASKED: tl.constexpr, NORM: tl.constexpr,
        DX: tl.constexpr, DSCORES: tl.constexpr, DQUERY: tl.constexpr, ONE_HEAD: tl.constexpr,
        ACC: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        """Every gradient of one split's tokens. One function, though long: all gradients come from one read of the values."""
        b, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
        d = tl.arange(0, BLOCK_D)
        SOFTMAX: tl.constexpr = (MODE == "attention") or (MODE == "query")
        READ_X: tl.constexpr = NORM or DSCORES or MODE == "query"  # otherwise the gradient does not depend on the values
        if MASKED:
            mask_ptr += b * mask_stride_b
        # Every token's gradient is written, but only the pooled tokens have one: with mode "last" that is a single token.
        first, end = _token_range(cu_seqlens_ptr, mask_ptr, mask_stride_l, b, L, PACKED, False, False)
        pooled_first, pooled_end = _token_range(cu_seqlens_ptr, mask_ptr, mask_stride_l, b, L, PACKED, MASKED, MODE == "last")
        if PACKED:
            end = tl.where(b == B - 1, T, end)  # tokens after the last row need their zero gradient too
        split_length = tl.cdiv(tl.cdiv(end - first, S), BLOCK_T) * BLOCK_T
        start = first + split * split_length
        stop = tl.minimum(start + split_length, end)
        x_ptr += b * x_stride_b + d[None, :].to(tl.int64) * x_stride_d
        scores_ptr += b * scores_stride_b
        row_start = b * L  # in the contiguous gradients; the launcher passes L = 0 for packed rows
        dquery = tl.zeros((BLOCK_D,), ACC)
        for t0 in range(start, stop, BLOCK_T):
            t = t0 + tl.arange(0, BLOCK_T).to(tl.int64)
            valid = (t >= pooled_first) & (t < pooled_end) & (t < stop)
            if MASKED:
                valid = valid & (tl.load(mask_ptr + t * mask_stride_l, mask=valid, other=0) != 0)
            if READ_X:
                x = tl.load(x_ptr + t[:, None] * x_stride_l, mask=valid[:, None] & (d < D)[None, :], other=0).to(ACC)
            if NORM:
                rstd = tl.rsqrt(tl.where(valid, tl.sum(x * x, 1) / D + eps, 1))
                x *= rstd[:, None]
            dx = tl.zeros((BLOCK_T, BLOCK_D), ACC)
            has_weight = tl.zeros((BLOCK_T,), tl.int1)
            for h in range(H):
                dpooled = tl.load(dpooled_ptr + (b * H + h) * D + d, mask=d < D, other=0)  # (BLOCK_D,)
                normalizer = tl.load(normalizer_ptr + b * H + h)
                if MODE == "query":
                    query = tl.load(query_ptr + h * D + d, mask=d < D, other=0)
                    score = tl.sum(x * query[None, :], 1)
                    weight = tl.where(valid, tl.exp(score - normalizer), 0)
                elif MODE == "attention":
                    score = tl.load(scores_ptr + t * scores_stride_l + h * scores_stride_h, mask=valid, other=float("-inf")).to(ACC)
                    weight = tl.where(score == float("-inf"), 0, tl.exp(score - normalizer))
                elif WEIGHTED:
                    mean_weight = tl.load(scores_ptr + t * scores_stride_l, mask=valid, other=0).to(ACC)
                    weight = tl.where(mean_weight == 0, 0, mean_weight / normalizer)
                else:
                    weight = tl.where(valid, 1 / normalizer, 0)
                dx += weight[:, None] * dpooled[None, :]
                has_weight = has_weight | (weight != 0)
                if DSCORES or MODE == "query":
                    dscore = tl.sum(x * dpooled[None, :], 1) - tl.load(delta_ptr + b * H + h)
                    dscore = tl.where(weight == 0, 0, (weight if SOFTMAX else 1 / normalizer) * dscore)
                if DSCORES:
                    tl.store(dscores_ptr + (row_start + t) * H + h, dscore, mask=t < stop)
                if MODE == "query":
                    dx += dscore[:, None] * query[None, :]
                    if DQUERY:
                        if ONE_HEAD:
                            dquery += tl.sum(tl.where(has_weight[:, None], dscore[:, None] * x, 0), 0)
                        else:  # no race: a program has its own slice, and each thread adds to its own features of it
                            at = dquery_ptr + ((b * S + split) * H + h) * D + d
                            tile_dquery = tl.sum(tl.where(has_weight[:, None], dscore[:, None] * x, 0), 0)
                            tl.store(at, tl.load(at, mask=d < D, other=0) + tile_dquery, mask=d < D)
            if NORM:
                dx = rstd[:, None] * (dx - x * (tl.sum(x * dx, 1) / D)[:, None])
            if DX:
                dx = tl.where(has_weight[:, None], dx, 0)
                tl.store(dx_ptr + (row_start + t[:, None]) * D + d[None, :], dx, mask=(t < stop)[:, None] & (d < D)[None, :])
        if DQUERY and ONE_HEAD:
            tl.store(dquery_ptr + (b * S + split) * D + d, dquery, mask=d < D)


# -------------------------------------------------------------------------------------------------------- launching

TILE = 4096  # values that a program holds at a time; twice as many in a forward program that reads whole tokens
PROGRAMS = 528  # enough to fill a GPU: 4 for each of the 132 multiprocessors of an H100 or H200


def _launch_plan(rows: int, mean_length: int, width: int, all_features: bool, tile: int) -> tuple[int, int, int, int]:
    """-> BLOCK_T, BLOCK_D, splits of a row, warps. `all_features`: a program needs all features of a token."""
    block_d = triton.next_power_of_2(width) if all_features else min(triton.next_power_of_2(width), 256)
    block_t = max(1, tile // block_d)
    programs = rows * triton.cdiv(width, block_d)
    splits = min(triton.cdiv(PROGRAMS, max(1, programs)), triton.cdiv(max(1, mean_length), 4 * block_t))
    return block_t, block_d, min(splits, 65535), max(4, min(16, max(block_d // 512, tile // 1024)))


def _strides(values: Tensor, scores: Tensor | None, mask: Tensor | None) -> tuple[int, ...]:
    """Strides of values and scores by row, token and last axis, then of the mask by row and token. Packed tensors: 0 by row."""
    values_strides = values.stride() if values.dim() == 3 else (0, *values.stride())
    scores_strides = (0, 0, 0) if scores is None else scores.stride() if scores.dim() == 3 else (0, *scores.stride())
    return (*values_strides, *scores_strides, *(mask.stride() if mask is not None else (0, 0)))


@torch.library.custom_op("pooling::forward", mutates_args=())
def _forward(
    values: Tensor,
    scores: Tensor | None,
    query: Tensor | None,
    norm_weight: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    mode: str,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> out (B, H, D); pooled, the same before norm weight and L2 norm (empty if there is neither); normalizer (B, H)."""
    packed, width = mask is None, values.shape[-1]
    rows, length = (len(cu_seqlens) - 1, 0) if packed else mask.shape
    out, pooled, normalizer = _empty_forward(values, scores, query, norm_weight, mask, cu_seqlens, mode, normalize, eps)
    heads = out.shape[1]
    if rows == 0 or width == 0 or heads == 0:
        return out, pooled, normalizer
    block_h = min(triton.next_power_of_2(heads), 4) if mode == "attention" else 1
    mean_length = 1 if mode == "last" else triton.cdiv(len(values), rows) if packed else length
    all_features = norm_weight is not None or mode == "query"
    tile = 2 * TILE if all_features else TILE // block_h
    block_t, block_d, splits, warps = _launch_plan(rows, mean_length, width, all_features, tile)
    split_pooled = out.new_empty(rows, splits, heads, width)
    split_max, split_denominator = out.new_empty(rows, splits, heads), out.new_empty(rows, splits, heads)
    grid = (rows, splits, triton.cdiv(width, block_d) * triton.cdiv(heads, block_h))
    pointers = (values if t is None else t for t in (scores, query, mask, cu_seqlens))  # any pointer will do for an unused one
    with torch.cuda.device_of(values):  # Triton launches on the current device, which may not be that of the values
        _pool_fwd_kernel[grid](
            values, *pointers, split_pooled, split_max, split_denominator, length, width, heads, splits, eps,
            *_strides(values, scores, mask), MODE=mode, WEIGHTED=mode == "mean" and scores is not None, PACKED=packed, MASKED=not packed,
            NORM=norm_weight is not None, ACC=tl.float64 if out.dtype == torch.float64 else tl.float32,
            BLOCK_T=block_t, BLOCK_D=block_d, BLOCK_H=block_h, num_warps=warps,
        )  # fmt: skip
        _, block_d, _, warps = _launch_plan(rows, splits, width, normalize, TILE)
        _merge_kernel[(rows, heads, triton.cdiv(width, block_d))](
            split_pooled, split_max, split_denominator, values if norm_weight is None else norm_weight,
            out, pooled if pooled.numel() else out, normalizer, width, heads, splits,
            SOFTMAX=mode in ("attention", "query"), NORM=norm_weight is not None, NORMALIZE=normalize,
            BLOCK_S=min(triton.next_power_of_2(splits), max(1, TILE // block_d)), BLOCK_D=block_d, num_warps=warps,
        )  # fmt: skip
    return out, pooled, normalizer


@_forward.register_fake
def _empty_forward(values, scores, query, norm_weight, mask, cu_seqlens, mode, normalize, eps):
    rows = len(cu_seqlens) - 1 if mask is None else len(mask)
    heads = scores.shape[-1] if mode == "attention" else len(query) if mode == "query" else 1
    out = values.new_empty(rows, heads, values.shape[-1], dtype=_accumulator(values))
    pooled = torch.empty_like(out) if norm_weight is not None or normalize else out.new_empty(0)
    return out, pooled, out.new_empty(rows, heads)


@torch.library.custom_op("pooling::backward", mutates_args=())
def _backward(
    values: Tensor,
    scores: Tensor | None,
    query: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    normalizer: Tensor,
    dpooled: Tensor,
    delta: Tensor,
    mode: str,
    norm: bool,
    eps: float,
    need_values: bool,
    need_scores: bool,
    need_query: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of values, scores and query; an empty tensor for each one that is not needed."""
    packed, width = mask is None, values.shape[-1]
    rows, length = (len(cu_seqlens) - 1, 0) if packed else mask.shape
    heads = dpooled.shape[1]
    dvalues, dscores, dquery = _empty_backward(
        values, scores, query, mask, cu_seqlens, normalizer, dpooled, delta, mode, norm, eps, need_values, need_scores, need_query
    )
    if rows == 0 or width == 0 or heads == 0:
        return dvalues.zero_(), dscores.zero_(), dquery.zero_()
    mean_length = triton.cdiv(len(values), rows) if packed else length
    block_t, block_d, splits, warps = _launch_plan(rows, mean_length, width, True, TILE)
    split_dquery = dquery.new_zeros(rows, splits, heads, width) if need_query else dquery
    pointers = (values if t is None else t for t in (scores, query, mask, cu_seqlens))
    with torch.cuda.device_of(values):
        _pool_bwd_kernel[(rows, splits)](
            values, *pointers, normalizer, dpooled, delta, dvalues, dscores, split_dquery,
            rows, length, len(values), width, heads, splits, eps, *_strides(values, scores, mask),
            MODE=mode, WEIGHTED=mode == "mean" and scores is not None, PACKED=packed, MASKED=not packed, NORM=norm,
            DX=need_values, DSCORES=need_scores, DQUERY=need_query, ONE_HEAD=heads == 1,
            ACC=tl.float64 if normalizer.dtype == torch.float64 else tl.float32, BLOCK_T=block_t, BLOCK_D=block_d, num_warps=warps,
        )  # fmt: skip
    return dvalues, dscores, split_dquery.sum((0, 1)) if need_query else dquery


@_backward.register_fake
def _empty_backward(
    values, scores, query, mask, cu_seqlens, normalizer, dpooled, delta, mode, norm, eps, need_values, need_scores, need_query
):
    dvalues = torch.empty_like(values, memory_format=torch.contiguous_format) if need_values else values.new_empty(0)
    dscores = normalizer.new_empty(0)
    if need_scores:
        dscores = torch.empty_like(scores, dtype=normalizer.dtype, memory_format=torch.contiguous_format)
    return dvalues, dscores, torch.empty_like(query) if need_query else normalizer.new_empty(0)


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, scores, query, norm_weight, mask, cu_seqlens, mode, normalize, eps):
        out, pooled, normalizer = torch.ops.pooling.forward(values, scores, query, norm_weight, mask, cu_seqlens, mode, normalize, eps)
        ctx.save_for_backward(values, scores, query, norm_weight, mask, cu_seqlens, out, pooled, normalizer)
        ctx.settings = mode, normalize, eps
        return out, normalizer

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout, dnormalizer):
        values, scores, query, norm_weight, mask, cu_seqlens, out, pooled, normalizer = ctx.saved_tensors
        mode, normalize, eps = ctx.settings
        if normalize:  # out = z / |z|
            z = pooled if norm_weight is None else pooled * norm_weight.to(out.dtype)
            length = z.norm(dim=-1, keepdim=True)
            dout = (dout - out * (out * dout).sum(-1, keepdim=True)) / torch.where(length > 0, length, 1)
        dnorm_weight = None
        if norm_weight is not None:  # z = g pooled
            dnorm_weight = (dout * pooled).sum((0, 1)).to(norm_weight.dtype)
            dout = dout * norm_weight.to(out.dtype)
        delta = (dout * (pooled if pooled.numel() else out)).sum(-1)
        if mode in ("attention", "query"):
            delta = delta - torch.where(normalizer == -torch.inf, 0, dnormalizer)
        need = ctx.needs_input_grad[:3]
        dvalues, dscores, dquery = torch.ops.pooling.backward(
            values, scores, query, mask, cu_seqlens, normalizer, dout.contiguous(), delta, mode, norm_weight is not None, eps, *need
        )
        return (
            dvalues if need[0] else None,
            dscores.to(scores.dtype) if need[1] else None,
            dquery if need[2] else None,
            dnorm_weight if ctx.needs_input_grad[3] else None,
            *(None,) * 5,
        )


# ---------------------------------------------------------------------------------------------- the public functions


def _check_shapes(values: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, scores: Tensor | None, scores_dims: int) -> None:
    """`scores` are attention scores or weights as the caller gave them; packed ones have `scores_dims` axes, padded ones one more."""
    if (mask is None) == (cu_seqlens is None):
        raise ValueError("give either mask (B, L) for padded values or cu_seqlens (B+1,) for packed values")
    if not values.is_floating_point():
        raise ValueError(f"values must be floating-point numbers, not {values.dtype}")
    if mask is not None:
        if values.dim() != 3 or mask.shape != values.shape[:2]:
            raise ValueError(f"padded values (B, L, D) need a mask (B, L): got {tuple(values.shape)} and {tuple(mask.shape)}")
        if scores is not None and (scores.dim() != scores_dims + 1 or scores.shape[:2] != mask.shape):
            raise ValueError(f"weights and scores must have the shape of the mask {tuple(mask.shape)}: got {tuple(scores.shape)}")
        return
    if values.dim() != 2 or cu_seqlens.dim() != 1 or len(cu_seqlens) < 1:
        raise ValueError(f"packed values (T, D) need cu_seqlens (B+1,): got {tuple(values.shape)} and {tuple(cu_seqlens.shape)}")
    # On a GPU, reading the contents would make the CPU wait for the device; torch.compile cannot trace it.
    contents_readable = cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling()
    if contents_readable and (cu_seqlens[0] != 0 or int(cu_seqlens[-1]) != len(values) or (cu_seqlens.diff() < 0).any()):
        raise ValueError(f"cu_seqlens must rise from 0 and end at T = {len(values)}: got {cu_seqlens.tolist()[:8]} ...")
    if scores is not None and (scores.dim() != scores_dims or len(scores) != len(values)):
        raise ValueError(f"weights and scores need one entry for each of the {len(values)} tokens: got {tuple(scores.shape)}")


@functools.cache
def can_launch() -> bool:
    """Whether Triton can launch kernels here: its first launch compiles a driver, with a C compiler and Python's headers."""
    try:
        return bool(triton.runtime.driver.active)
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        reason = " ".join(str(error).split())[:200]
        warnings.warn(f"pooling runs in PyTorch: Triton cannot compile its driver on this machine ({reason})", RuntimeWarning, stacklevel=4)
        return False


def _pool(
    values, scores, query, mask, cu_seqlens, mode, norm_weight, eps, normalize, backend, mean_of_heads=False
) -> tuple[Tensor, Tensor]:
    """-> pooled (B, H, D), normalizer (B, H); with `mean_of_heads`, which nothing normalizes, pooled is (B, 1, D)."""
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"unknown backend {backend!r}: choose auto, torch or triton")
    if norm_weight is not None and norm_weight.shape != values.shape[-1:]:
        raise ValueError(f"norm_weight must have shape ({values.shape[-1]},), one number per feature: got {tuple(norm_weight.shape)}")
    if backend == "triton" and (triton is None or not (values.is_cuda or INTERPRETED)):
        reason = "Triton is not installed" if triton is None else f"values are on {values.device}: the kernels need a GPU"
        raise ValueError(f"backend triton cannot run here ({reason}): choose auto or torch")
    dtype = _accumulator(values)
    with torch.autocast(values.device.type, enabled=False):  # autocast would pool in bfloat16
        if mode == "query":
            query = query.to(dtype) / math.sqrt(max(1, values.shape[-1]))
            query = (query if norm_weight is None else query * norm_weight.to(dtype)).contiguous()
        if backend == "triton" or (backend == "auto" and triton is not None and values.is_cuda and can_launch()):
            out, normalizer = _Pool.apply(values, scores, query, norm_weight, mask, cu_seqlens, mode, normalize, eps)
            return out.mean(1, keepdim=True) if mean_of_heads else out, normalizer
        out, normalizer = _reference(values, scores, query, mask, cu_seqlens, mode, norm_weight is not None, eps, mean_of_heads)
        if norm_weight is not None:
            out = out * norm_weight.to(dtype)
        if normalize:
            square = out.square().sum(-1, keepdim=True)
            out = out * torch.rsqrt(torch.where(square > 0, square, 1))
        return out, normalizer


def mean_pool(
    values: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    weights: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    normalize: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Mean over each row's valid tokens -> (B, D). `weights` (B, L) or (T,), non-negative, make it a weighted mean."""
    _check_shapes(values, mask, cu_seqlens, weights, 1)
    scores = None if weights is None else weights[..., None]
    return _pool(values, scores, None, mask, cu_seqlens, "mean", norm_weight, eps, normalize, backend)[0][:, 0]


def attention_pool(
    values: Tensor,
    scores: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    normalize: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Mean weighted by the softmax of `scores` (B, L, H) or (T, H) over each row -> (B, H, D), log-sum-exp of the scores (B, H)."""
    _check_shapes(values, mask, cu_seqlens, scores, 2)
    return _pool(values, scores, None, mask, cu_seqlens, "attention", norm_weight, eps, normalize, backend)


def attention_mean_pool(
    values: Tensor, scores: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """The mean over the heads of `attention_pool` -> (B, D)."""
    _check_shapes(values, mask, cu_seqlens, scores, 2)
    return _pool(values, scores, None, mask, cu_seqlens, "attention", None, 0.0, False, backend, mean_of_heads=True)[0][:, 0]


def query_pool(
    values: Tensor,
    query: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    normalize: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention pooling with scores n @ query / sqrt(D), `query` (H, D) -> (B, H, D), log-sum-exp of the scores (B, H)."""
    _check_shapes(values, mask, cu_seqlens, None, 0)
    if query.dim() != 2 or query.shape[1] != values.shape[-1]:
        raise ValueError(f"query must have shape (H, {values.shape[-1]}): got {tuple(query.shape)}")
    return _pool(values, None, query, mask, cu_seqlens, "query", norm_weight, eps, normalize, backend)


def last_pool(
    values: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    normalize: bool = False,
    backend: str = "auto",
) -> Tensor:
    """The last valid token of each row -> (B, D)."""
    _check_shapes(values, mask, cu_seqlens, None, 0)
    return _pool(values, None, None, mask, cu_seqlens, "last", norm_weight, eps, normalize, backend)[0][:, 0]


def max_pool(values: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
    """The largest number of each feature over each row's valid tokens -> (B, D); zeros for a row without a token."""
    _check_shapes(values, mask, cu_seqlens, None, 0)
    values = values.to(_accumulator(values))
    if cu_seqlens is None:
        lengths = mask.sum(1) if mask is not None else values.new_full(values.shape[:1], values.shape[1])
        out = (values if mask is None else values.masked_fill(~mask[..., None], -torch.inf)).amax(1)
    else:
        lengths = cu_seqlens.diff()
        out = torch.segment_reduce(values, "max", lengths=lengths.long(), axis=0, unsafe=True, initial=-torch.inf)
    return out.masked_fill(lengths[:, None] == 0, 0)
