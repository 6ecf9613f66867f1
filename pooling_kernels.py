"""From token states to one vector: the poolings that texts and slides share, in PyTorch and as Triton kernels.

    mean_pool       y_b  = sum_t w_t n_t / sum_t w_t                                   (B, D)
    attention_pool  y_bh = sum_t softmax_t(s_th) n_t, and log sum_t exp(s_th)          (B, H, D), (B, H)
    query_pool      the same with s_th = n_t . q_h / sqrt(D), a learned query          (B, H, D), (B, H)
    last_pool       y_b  = n at the last token that counts                             (B, D)

n_t is the value x_t, or, where `norm_weight` g (D,) is given, RMSNorm(x_t) = g x_t / sqrt(mean(x_t^2) + eps): states are
read before the model's final norm, and the normalised ones are never written. `normalize=True` divides y by its L2 norm.

Values are packed rows (T, D) with `cu_seqlens` (B+1,), the running sum of the rows' lengths that starts at 0, or padded
(B, L, D) with a boolean `mask` (B, L), True where a token counts, on either side or with holes. Sums run in float32
(float64 for float64 input) whatever the input's type, and so does the output. Gradients reach values, weights, scores,
query and norm_weight.

A row without tokens, without weight or with scores of -inf alone gives zeros and a zero gradient (log-sum-exp: -inf),
never NaN. What stands at a masked position, NaN included, or under weight 0, has no influence on values or gradients.
Addresses are 64 bits wide: values may have more than 2^31 elements, any strides and any D.

`backend="auto"` takes the kernels on a GPU and the PyTorch reference elsewhere, "torch" the reference, "triton" the kernels
or a ValueError. Forward, one kernel reads the values once, each program a part of one row's tokens for a block of features
(all of them where a norm or a query needs them), and a second kernel merges the parts (online softmax: Milakov and
Gimelshein 2018, arXiv 1805.02867; split along the tokens as in Flash-Decoding, Dao et al. 2023). Backward, one kernel passes
once over the tokens, each by itself. Nothing is atomic: results repeat to the bit.

Legend: B rows (texts, slides), L padded length, T packed tokens, D features, H heads, S parts of a row.
"""

import math
import os

import torch
from torch import Tensor

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # a*b+c in one rounding; Triton 3.10 will change what unset means
try:
    import triton
    import triton.language as tl
except ImportError:  # a platform without Triton: the reference serves
    triton = None

# ----------------------------------------------------------------------------------------------------- the reference


def _accumulator(values: Tensor) -> torch.dtype:
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def _owners(values: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, int]:
    """Which row each token belongs to (T,), B for none, and B; no shape depends on what the tensors hold."""
    if cu_seqlens is None:
        b = len(mask)
        return torch.where(mask.bool(), torch.arange(b, device=mask.device)[:, None], b).flatten(), b
    tokens = torch.arange(len(values), device=values.device)
    return torch.bucketize(tokens, cu_seqlens[1:].to(tokens.dtype), right=True), len(cu_seqlens) - 1


def _reference(values, aux, query, mask, cu_seqlens, mode, norm, eps):
    """-> pooled (B, H, D), log-sum-exp (B, H), in plain differentiable PyTorch over flat tokens. `norm`: of x / rms(x)."""
    dtype, width = _accumulator(values), values.shape[-1]
    row, n_rows = _owners(values, mask, cu_seqlens)
    alive = row < n_rows  # (T,)
    if aux is not None:
        aux = aux.to(dtype).flatten(0, -2)  # (T, H) weights or scores
        nothing = -torch.inf if mode == "attention" else 0
        alive = alive & (aux != nothing).any(-1)
        aux = aux.masked_fill(~alive[:, None], nothing)
    x = values.reshape(-1, width).masked_fill(~alive[:, None], 0).to(dtype)  # (T, D)
    if norm:
        x = x * torch.rsqrt(torch.where(alive, x.square().mean(-1) + eps, 1))[:, None]
    if mode == "query":
        aux = (x @ query.T).masked_fill(~alive[:, None], -torch.inf)
    if mode == "last":
        order = torch.arange(1, len(row) + 1, device=row.device) * alive
        last = order.new_zeros(n_rows + 1).scatter_reduce(0, row, order, "amax")
        aux = (alive & (order == last[row])).to(dtype)[:, None]
    if mode == "mean" and aux is None:
        aux = alive.to(dtype)[:, None]
    soft, top = mode in ("attention", "query"), aux.new_zeros(n_rows + 1, aux.shape[1])
    if soft:
        top = torch.full_like(top, -torch.inf).scatter_reduce(0, row[:, None].expand_as(aux), aux.detach(), "amax")
        top = torch.where(top == -torch.inf, 0, top)  # a row of -inf alone must not become inf - inf
        aux = torch.exp(aux - top[row])
    mass = torch.zeros_like(top).index_add(0, row, aux)[:n_rows]  # (B, H)
    parts = [x.new_zeros(n_rows + 1, width).index_add(0, row, aux[:, h : h + 1] * x)[:n_rows] for h in range(aux.shape[1])]
    safe = torch.where(mass > 0, mass, 1)
    lse = torch.where(mass > 0, safe.log() + top[:n_rows], -torch.inf)
    return torch.stack(parts, 1) / safe[:, :, None], lse


# ------------------------------------------------------------------------------------------------------- the kernels

if triton is not None:

    @triton.jit
    def _span(cu_ptr, mask_ptr, mask_stride_l, b, L, PACKED: tl.constexpr, MASKED: tl.constexpr, LAST: tl.constexpr):
        """First and one past the last token of row b; with LAST, just its last token that counts."""
        first = tl.full((), 0, tl.int64)
        end = first + L
        if PACKED:
            first = tl.load(cu_ptr + b).to(tl.int64)
            end = tl.load(cu_ptr + b + 1).to(tl.int64)
        if LAST:
            if MASKED:
                last = tl.full((), -1, tl.int64)
                for t0 in range(0, L, 1024):
                    t = t0 + tl.arange(0, 1024)
                    counts = tl.load(mask_ptr + t.to(tl.int64) * mask_stride_l, mask=t < L, other=0) != 0
                    last = tl.maximum(last, tl.max(tl.where(counts, t, -1), 0).to(tl.int64))
                end = last + 1
            first = tl.maximum(first, end - 1)
        return first, end

    @triton.jit
    def _pool_fwd_kernel(
        x_ptr, aux_ptr, query_ptr, mask_ptr, cu_ptr,
        pooled_ptr, top_ptr, mass_ptr,  # of each part: (B, S, H, D), (B, S, H), (B, S, H)
        L, D, H, S, eps,
        x_stride_b, x_stride_l, x_stride_d, aux_stride_b, aux_stride_l, aux_stride_h, mask_stride_b, mask_stride_l,
        MODE: tl.constexpr, WEIGHTED: tl.constexpr, PACKED: tl.constexpr, MASKED: tl.constexpr, NORM: tl.constexpr,
        ACC: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr,
    ):  # fmt: skip
        b, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
        n_blocks = tl.cdiv(D, BLOCK_D)
        h = tl.program_id(2) // n_blocks * BLOCK_H + tl.arange(0, BLOCK_H)
        d = tl.program_id(2) % n_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
        SOFT: tl.constexpr = (MODE == "attention") or (MODE == "query")
        if MASKED:
            mask_ptr += b * mask_stride_b
        first, end = _span(cu_ptr, mask_ptr, mask_stride_l, b, L, PACKED, MASKED, MODE == "last")
        size = tl.cdiv(tl.cdiv(end - first, S), BLOCK_T) * BLOCK_T  # tokens of a part, whole blocks
        start = first + part * size
        stop = tl.minimum(start + size, end)
        x_ptr += b * x_stride_b + d[None, :].to(tl.int64) * x_stride_d
        aux_ptr += b * aux_stride_b + h[None, :].to(tl.int64) * aux_stride_h

        if MODE == "query":
            query = tl.load(query_ptr + tl.sum(h, 0) * D + d, mask=d < D, other=0)  # one head a program
        top = tl.full((BLOCK_H,), float("-inf"), ACC)
        mass = tl.zeros((BLOCK_H,), ACC)
        pooled = tl.zeros((BLOCK_H, BLOCK_D), ACC)
        for t0 in range(start, stop, BLOCK_T):
            t = t0 + tl.arange(0, BLOCK_T).to(tl.int64)
            alive = t < stop
            if MASKED:
                alive = alive & (tl.load(mask_ptr + t * mask_stride_l, mask=alive, other=0) != 0)
            if MODE == "attention":
                aux_ok = alive[:, None] & (h < H)[None, :]
                s = tl.load(aux_ptr + t[:, None] * aux_stride_l, mask=aux_ok, other=float("-inf")).to(ACC)
                alive = tl.max((s != float("-inf")).to(tl.int32), 1) != 0
            elif WEIGHTED:
                p = tl.load(aux_ptr + t[:, None] * aux_stride_l, mask=alive[:, None], other=0).to(ACC)
                alive = tl.max((p != 0).to(tl.int32), 1) != 0
            else:
                p = tl.broadcast_to(alive.to(ACC)[:, None], (BLOCK_T, BLOCK_H))
            x = tl.load(x_ptr + t[:, None] * x_stride_l, mask=alive[:, None] & (d < D)[None, :], other=0).to(ACC)
            if NORM:
                x *= tl.rsqrt(tl.where(alive, tl.sum(x * x, 1) / D + eps, 1))[:, None]
            if MODE == "query":
                s = tl.where(alive, tl.sum(x * query[None, :], 1), float("-inf"))[:, None]
            if SOFT:
                new = tl.maximum(top, tl.max(s, 0))
                safe = tl.where(new == float("-inf"), 0, new)  # nothing has counted yet: not inf - inf
                p = tl.exp(s - safe[None, :])
                shrink = tl.exp(top - safe)
                mass *= shrink
                pooled *= shrink[:, None]
                top = new
            mass += tl.sum(p, 0)
            if BLOCK_H == 1:
                pooled += tl.sum(p * x, 0)[None, :]
            else:
                pooled += tl.sum(p[:, :, None] * x[:, None, :], 0)
        at = (b * S + part) * H + h  # (BLOCK_H,)
        tl.store(pooled_ptr + at[:, None] * D + d[None, :], pooled, mask=(h < H)[:, None] & (d < D)[None, :])
        if tl.program_id(2) % n_blocks == 0:
            tl.store(top_ptr + at, top, mask=h < H)
            tl.store(mass_ptr + at, mass, mask=h < H)

    @triton.jit
    def _merge_kernel(
        part_ptr, top_ptr, mass_ptr, norm_weight_ptr,
        out_ptr, pooled_ptr, lse_ptr,  # (B, H, D), the same before norm weight and L2 norm, (B, H): of a mean the mass
        D, H, S,
        SOFT: tl.constexpr, NORM: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        b, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
        d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
        ACC: tl.constexpr = part_ptr.dtype.element_ty
        best = tl.full((), float("-inf"), ACC)
        if SOFT:
            for s0 in range(0, S, BLOCK_S):
                s = s0 + tl.arange(0, BLOCK_S)
                best = tl.maximum(best, tl.max(tl.load(top_ptr + (b * S + s) * H + h, mask=s < S, other=float("-inf")), 0))
        safe = tl.where(best == float("-inf"), 0, best)
        mass = tl.full((), 0, ACC)
        pooled = tl.zeros((BLOCK_D,), ACC)
        for s0 in range(0, S, BLOCK_S):
            s = s0 + tl.arange(0, BLOCK_S)
            at = (b * S + s) * H + h
            grow = (s < S).to(ACC)
            if SOFT:
                grow = tl.exp(tl.load(top_ptr + at, mask=s < S, other=float("-inf")) - safe)
            mass += tl.sum(grow * tl.load(mass_ptr + at, mask=s < S, other=0), 0)
            part = tl.load(part_ptr + at[:, None] * D + d[None, :], mask=(s < S)[:, None] & (d < D)[None, :], other=0)
            pooled += tl.sum(grow[:, None] * part, 0)
        pooled /= tl.where(mass > 0, mass, 1)
        at = (b * H + h) * D + d
        tl.store(pooled_ptr + at, pooled, mask=d < D)
        if NORM:
            pooled *= tl.load(norm_weight_ptr + d, mask=d < D, other=0).to(ACC)
        if NORMALIZE:
            pooled /= tl.maximum(tl.sqrt(tl.sum(pooled * pooled, 0)), 1e-12)
        if NORM or NORMALIZE:
            tl.store(out_ptr + at, pooled, mask=d < D)
        if tl.program_id(2) == 0:
            if SOFT:
                mass = tl.where(mass > 0, tl.log(tl.where(mass > 0, mass, 1)) + safe, float("-inf"))
            tl.store(lse_ptr + b * H + h, mass)

    @triton.jit
    def _pool_bwd_kernel(
        x_ptr, aux_ptr, query_ptr, mask_ptr, cu_ptr, lse_ptr,
        dpooled_ptr, delta_ptr,  # (B, H, D) gradient; (B, H) dpooled . pooled - dlse
        dx_ptr, daux_ptr, dquery_ptr,  # like x, contiguous; (B, L, H) or (T, H); (B, S, H, D)
        B, L, T, D, H, S, eps,
        x_stride_b, x_stride_l, x_stride_d, aux_stride_b, aux_stride_l, aux_stride_h, mask_stride_b, mask_stride_l,
        MODE: tl.constexpr, WEIGHTED: tl.constexpr, PACKED: tl.constexpr, MASKED: tl.constexpr, NORM: tl.constexpr,
        DX: tl.constexpr, DAUX: tl.constexpr, DQUERY: tl.constexpr, ONE_HEAD: tl.constexpr,
        ACC: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        b, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
        d = tl.arange(0, BLOCK_D)
        SOFT: tl.constexpr = (MODE == "attention") or (MODE == "query")
        READ: tl.constexpr = NORM or DAUX or MODE == "query"  # else the gradient does not depend on the values
        if MASKED:
            mask_ptr += b * mask_stride_b
        first, end = _span(cu_ptr, mask_ptr, mask_stride_l, b, L, PACKED, False, False)
        chosen, past = _span(cu_ptr, mask_ptr, mask_stride_l, b, L, PACKED, MASKED, MODE == "last")
        if PACKED:
            end = tl.where(b == B - 1, T, end)  # tokens behind the last row get their zero too
        size = tl.cdiv(tl.cdiv(end - first, S), BLOCK_T) * BLOCK_T
        start = first + part * size
        stop = tl.minimum(start + size, end)
        x_ptr += b * x_stride_b + d[None, :].to(tl.int64) * x_stride_d
        aux_ptr += b * aux_stride_b
        base = b * L  # of the contiguous gradients; L is 0 for packed rows
        dquery = tl.zeros((BLOCK_D,), ACC)
        for t0 in range(start, stop, BLOCK_T):
            t = t0 + tl.arange(0, BLOCK_T).to(tl.int64)
            alive = (t >= chosen) & (t < past) & (t < stop)
            if MASKED:
                alive = alive & (tl.load(mask_ptr + t * mask_stride_l, mask=alive, other=0) != 0)
            if READ:
                x = tl.load(x_ptr + t[:, None] * x_stride_l, mask=alive[:, None] & (d < D)[None, :], other=0).to(ACC)
            if NORM:
                rstd = tl.rsqrt(tl.where(alive, tl.sum(x * x, 1) / D + eps, 1))
                x *= rstd[:, None]
            dx = tl.zeros((BLOCK_T, BLOCK_D), ACC)
            used = tl.zeros((BLOCK_T,), tl.int1)
            for h in range(H):
                g = tl.load(dpooled_ptr + (b * H + h) * D + d, mask=d < D, other=0)  # (BLOCK_D,)
                lse = tl.load(lse_ptr + b * H + h)
                if MODE == "query":
                    query = tl.load(query_ptr + h * D + d, mask=d < D, other=0)
                    s = tl.sum(x * query[None, :], 1)
                    weight = tl.where(alive, tl.exp(s - lse), 0)
                elif MODE == "attention":
                    s = tl.load(aux_ptr + t * aux_stride_l + h * aux_stride_h, mask=alive, other=float("-inf")).to(ACC)
                    weight = tl.where(s == float("-inf"), 0, tl.exp(s - lse))
                elif WEIGHTED:
                    w = tl.load(aux_ptr + t * aux_stride_l, mask=alive, other=0).to(ACC)
                    weight = tl.where(w == 0, 0, w / lse)  # of a mean, the mass
                else:
                    weight = tl.where(alive, 1 / lse, 0)
                dx += weight[:, None] * g[None, :]
                used = used | (weight != 0)
                if DAUX or MODE == "query":
                    ds = tl.sum(x * g[None, :], 1) - tl.load(delta_ptr + b * H + h)
                    ds = tl.where(weight == 0, 0, (weight if SOFT else 1 / lse) * ds)
                if DAUX:
                    tl.store(daux_ptr + (base + t) * H + h, ds, mask=t < stop)
                if MODE == "query":
                    dx += ds[:, None] * query[None, :]
                    if DQUERY:
                        if ONE_HEAD:
                            dquery += tl.sum(tl.where(used[:, None], ds[:, None] * x, 0), 0)
                        else:  # every thread adds to its own features
                            at = dquery_ptr + ((b * S + part) * H + h) * D + d
                            more = tl.sum(tl.where(used[:, None], ds[:, None] * x, 0), 0)
                            tl.store(at, tl.load(at, mask=d < D, other=0) + more, mask=d < D)
            if NORM:
                dx = rstd[:, None] * (dx - x * (tl.sum(x * dx, 1) / D)[:, None])
            if DX:
                dx = tl.where(used[:, None], dx, 0)
                tl.store(dx_ptr + (base + t[:, None]) * D + d[None, :], dx, mask=(t < stop)[:, None] & (d < D)[None, :])
        if DQUERY and ONE_HEAD:
            tl.store(dquery_ptr + (b * S + part) * D + d, dquery, mask=d < D)


# -------------------------------------------------------------------------------------------------------- launching

TILE = 4096  # elements of the values that a program holds at a time, twice that where it only reads whole tokens
PROGRAMS = 528  # that fill a GPU, 4 for each of the 132 multiprocessors of an H100 or H200


def _plan(rows: int, mean_length: int, width: int, whole: bool, tile: int = TILE) -> tuple[int, int, int, int]:
    """-> BLOCK_T, BLOCK_D, parts S of a row, warps; `whole`: a program needs all features of a token."""
    block_d = triton.next_power_of_2(width) if whole else min(triton.next_power_of_2(width), 256)
    block_t = max(1, tile // block_d)
    programs = rows * triton.cdiv(width, block_d)
    parts = min(triton.cdiv(PROGRAMS, max(1, programs)), triton.cdiv(max(1, mean_length), 4 * block_t))
    return block_t, block_d, min(parts, 65535), max(4, min(16, max(block_d // 512, tile // 1024)))


def _strides(values: Tensor, aux: Tensor | None, mask: Tensor | None) -> tuple[int, ...]:
    """Of values and aux by row, token, last axis, of the mask by row, token; a packed tensor has no row stride."""
    value = values.stride() if values.dim() == 3 else (0, *values.stride())
    extra = (0, 0, 0) if aux is None else aux.stride() if aux.dim() == 3 else (0, *aux.stride())
    return (*value, *extra, *(mask.stride() if mask is not None else (0, 0)))


@torch.library.custom_op("pooling::forward", mutates_args=())
def _forward(
    values: Tensor,
    aux: Tensor | None,
    query: Tensor | None,
    norm_weight: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    mode: str,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> out (B, H, D), pooled: the same before norm weight and L2 norm (empty where there is neither), log-sum-exp (B, H)."""
    packed, width = mask is None, values.shape[-1]
    rows, length = (len(cu_seqlens) - 1, 0) if packed else mask.shape
    heads = aux.shape[-1] if mode == "attention" else len(query) if mode == "query" else 1
    out, pooled, lse = _empty_forward(values, aux, query, norm_weight, mask, cu_seqlens, mode, normalize, eps)
    if rows == 0 or width == 0 or heads == 0:
        return out, pooled, lse
    block_h = min(triton.next_power_of_2(heads), 4) if mode == "attention" else 1
    mean_length = 1 if mode == "last" else triton.cdiv(len(values), rows) if packed else length
    whole = norm_weight is not None or mode == "query"
    block_t, block_d, parts, warps = _plan(rows, mean_length, width, whole, 2 * TILE if whole else TILE // block_h)
    dtype = out.dtype
    part = torch.empty(rows, parts, heads, width, dtype=dtype, device=values.device)
    top, mass = (torch.empty(rows, parts, heads, dtype=dtype, device=values.device) for _ in range(2))
    acc = tl.float64 if dtype == torch.float64 else tl.float32
    grid = (rows, parts, triton.cdiv(width, block_d) * triton.cdiv(heads, block_h))
    optional = (values if t is None else t for t in (aux, query, mask, cu_seqlens))
    with torch.cuda.device_of(values):  # Triton launches on the current device, not on that of the values
        _pool_fwd_kernel[grid](
            values, *optional, part, top, mass, length, width, heads, parts, eps, *_strides(values, aux, mask),
            MODE=mode, WEIGHTED=mode == "mean" and aux is not None, PACKED=packed, MASKED=not packed, NORM=norm_weight is not None,
            ACC=acc, BLOCK_T=block_t, BLOCK_D=block_d, BLOCK_H=block_h, num_warps=warps,
        )  # fmt: skip
        _, block_d, _, warps = _plan(rows, parts, width, normalize)
        _merge_kernel[(rows, heads, triton.cdiv(width, block_d))](
            part, top, mass, values if norm_weight is None else norm_weight,
            out, pooled if pooled.numel() else out, lse, width, heads, parts,
            SOFT=mode in ("attention", "query"), NORM=norm_weight is not None, NORMALIZE=normalize,
            BLOCK_S=min(triton.next_power_of_2(parts), max(1, TILE // block_d)), BLOCK_D=block_d, num_warps=warps,
        )  # fmt: skip
    return out, pooled, lse


@_forward.register_fake
def _empty_forward(values, aux, query, norm_weight, mask, cu_seqlens, mode, normalize, eps):
    rows = len(cu_seqlens) - 1 if mask is None else len(mask)
    heads = aux.shape[-1] if mode == "attention" else len(query) if mode == "query" else 1
    out = values.new_empty(rows, heads, values.shape[-1], dtype=_accumulator(values))
    pooled = torch.empty_like(out) if norm_weight is not None or normalize else out.new_empty(0)
    return out, pooled, out.new_empty(rows, heads)


@torch.library.custom_op("pooling::backward", mutates_args=())
def _backward(
    values: Tensor,
    aux: Tensor | None,
    query: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    lse: Tensor,
    dpooled: Tensor,
    delta: Tensor,
    mode: str,
    norm: bool,
    eps: float,
    need_values: bool,
    need_aux: bool,
    need_query: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of values, aux and query; an empty tensor for each that is not needed."""
    packed, width = mask is None, values.shape[-1]
    rows, length = (len(cu_seqlens) - 1, 0) if packed else mask.shape
    heads = dpooled.shape[1]
    dvalues, daux, dquery = _empty_backward(
        values, aux, query, mask, cu_seqlens, lse, dpooled, delta, mode, norm, eps, need_values, need_aux, need_query
    )
    if rows == 0 or width == 0 or heads == 0:
        return dvalues.zero_(), daux.zero_(), dquery.zero_()
    block_t, block_d, parts, warps = _plan(rows, triton.cdiv(len(values), rows) if packed else length, width, True)
    dparts = dquery.new_zeros(rows, parts, heads, width) if need_query else dquery
    optional = (values if t is None else t for t in (aux, query, mask, cu_seqlens))
    with torch.cuda.device_of(values):
        _pool_bwd_kernel[(rows, parts)](
            values, *optional, lse, dpooled, delta, dvalues, daux, dparts,
            rows, length, len(values), width, heads, parts, eps, *_strides(values, aux, mask),
            MODE=mode, WEIGHTED=mode == "mean" and aux is not None, PACKED=packed, MASKED=not packed, NORM=norm,
            DX=need_values, DAUX=need_aux, DQUERY=need_query, ONE_HEAD=heads == 1,
            ACC=tl.float64 if lse.dtype == torch.float64 else tl.float32, BLOCK_T=block_t, BLOCK_D=block_d, num_warps=warps,
        )  # fmt: skip
    return dvalues, daux, dparts.sum((0, 1)) if need_query else dquery


@_backward.register_fake
def _empty_backward(values, aux, query, mask, cu_seqlens, lse, dpooled, delta, mode, norm, eps, need_values, need_aux, need_query):
    dvalues = torch.empty_like(values, memory_format=torch.contiguous_format) if need_values else values.new_empty(0)
    daux = torch.empty_like(aux, dtype=lse.dtype, memory_format=torch.contiguous_format) if need_aux else lse.new_empty(0)
    return dvalues, daux, torch.empty_like(query) if need_query else lse.new_empty(0)


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, aux, query, norm_weight, mask, cu_seqlens, mode, normalize, eps):
        out, pooled, lse = torch.ops.pooling.forward(values, aux, query, norm_weight, mask, cu_seqlens, mode, normalize, eps)
        ctx.save_for_backward(values, aux, query, norm_weight, mask, cu_seqlens, out, pooled, lse)
        ctx.settings = mode, normalize, eps
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout, dlse):
        values, aux, query, norm_weight, mask, cu_seqlens, out, pooled, lse = ctx.saved_tensors
        mode, normalize, eps = ctx.settings
        if normalize:  # y = z / |z|
            z = pooled if norm_weight is None else pooled * norm_weight.to(out.dtype)
            size = z.norm(dim=-1, keepdim=True)
            dout = (dout - out * (out * dout).sum(-1, keepdim=True)) / torch.where(size > 0, size, 1)
        dweight = None
        if norm_weight is not None:  # z = g pooled
            dweight = (dout * pooled).sum((0, 1)).to(norm_weight.dtype)
            dout = dout * norm_weight.to(out.dtype)
        delta = (dout * (pooled if pooled.numel() else out)).sum(-1)
        if mode in ("attention", "query"):
            delta = delta - torch.where(lse == -torch.inf, 0, dlse)
        need = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[2])
        dvalues, daux, dquery = torch.ops.pooling.backward(
            values, aux, query, mask, cu_seqlens, lse, dout.contiguous(), delta, mode, norm_weight is not None, eps, *need
        )
        return (
            dvalues if need[0] else None,
            daux.to(aux.dtype) if need[1] else None,
            dquery if need[2] else None,
            dweight if ctx.needs_input_grad[3] else None,
            *(None,) * 5,
        )


# ------------------------------------------------------------------------------------------------ what others call


def _check(values: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, aux: Tensor | None, aux_dims: int) -> None:
    if (mask is None) == (cu_seqlens is None):
        raise ValueError("give either mask (B, L) for padded values or cu_seqlens (B+1,) for packed ones")
    if not values.is_floating_point():
        raise ValueError(f"values must be floating-point numbers, not {values.dtype}")
    if mask is not None:
        if values.dim() != 3 or mask.shape != values.shape[:2]:
            raise ValueError(f"padded values (B, L, D) need mask (B, L): got {tuple(values.shape)} and {tuple(mask.shape)}")
        if aux is not None and (aux.dim() != aux_dims + 1 or aux.shape[:2] != mask.shape):
            raise ValueError(f"weights and scores follow the mask {tuple(mask.shape)}: got {tuple(aux.shape)}")
        return
    if values.dim() != 2 or cu_seqlens.dim() != 1 or len(cu_seqlens) < 1:
        raise ValueError(f"packed values (T, D) need cu_seqlens (B+1,): got {tuple(values.shape)} and {tuple(cu_seqlens.shape)}")
    look = cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling()  # elsewhere it would wait for the device
    if look and (cu_seqlens[0] != 0 or int(cu_seqlens[-1]) != len(values) or (cu_seqlens.diff() < 0).any()):
        raise ValueError(f"cu_seqlens must rise from 0 and end at T = {len(values)}: got {cu_seqlens.tolist()[:8]} ...")
    if aux is not None and (aux.dim() != aux_dims or len(aux) != len(values)):
        raise ValueError(f"weights and scores need {len(values)} rows like the values: got {tuple(aux.shape)}")


def _interpreted() -> bool:
    return not isinstance(_pool_fwd_kernel, triton.JITFunction)


def _pool(values, aux, query, mask, cu_seqlens, mode, norm_weight, eps, normalize, backend) -> tuple[Tensor, Tensor]:
    """-> (B, H, D), log-sum-exp (B, H)."""
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"unknown backend {backend!r}: take auto, torch or triton")
    if norm_weight is not None and norm_weight.shape != values.shape[-1:]:
        raise ValueError(f"norm_weight must be ({values.shape[-1]},) like the features: got {tuple(norm_weight.shape)}")
    if backend == "triton" and (triton is None or not (values.is_cuda or _interpreted())):
        where = "Triton is not installed" if triton is None else f"values are on {values.device}: the kernels need a GPU"
        raise ValueError(f"backend triton cannot run here ({where}): take auto or torch")
    dtype = _accumulator(values)
    with torch.autocast(values.device.type, enabled=False):  # else training would pool in bfloat16
        if mode == "query":
            query = query.to(dtype) / math.sqrt(max(1, values.shape[-1]))
            query = (query if norm_weight is None else query * norm_weight.to(dtype)).contiguous()
        if backend == "triton" or (backend == "auto" and triton is not None and values.is_cuda):
            return _Pool.apply(values, aux, query, norm_weight, mask, cu_seqlens, mode, normalize, eps)
        out, lse = _reference(values, aux, query, mask, cu_seqlens, mode, norm_weight is not None, eps)
        if norm_weight is not None:
            out = out * norm_weight.to(dtype)
        if normalize:
            square = out.square().sum(-1, keepdim=True)
            out = out * torch.rsqrt(torch.where(square > 0, square, 1))
        return out, lse


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
    """Mean over each row's tokens, weighted where `weights` (B, L) or (T,), any non-negative numbers, are given -> (B, D)."""
    _check(values, mask, cu_seqlens, weights, 1)
    aux = None if weights is None else weights[..., None]
    return _pool(values, aux, None, mask, cu_seqlens, "mean", norm_weight, eps, normalize, backend)[0][:, 0]


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
    """Softmax of `scores` (B, L, H) or (T, H) over each row's tokens, applied to the values -> (B, H, D), log-sum-exp (B, H)."""
    _check(values, mask, cu_seqlens, scores, 2)
    return _pool(values, scores, None, mask, cu_seqlens, "attention", norm_weight, eps, normalize, backend)


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
    """Attention pooling whose scores are values @ query / sqrt(D), `query` (H, D) -> (B, H, D), log-sum-exp (B, H)."""
    _check(values, mask, cu_seqlens, None, 0)
    if query.dim() != 2 or query.shape[1] != values.shape[-1]:
        raise ValueError(f"query must be (H, {values.shape[-1]}): got {tuple(query.shape)}")
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
    """The last token of each row that the mask lets through -> (B, D)."""
    _check(values, mask, cu_seqlens, None, 0)
    return _pool(values, None, None, mask, cu_seqlens, "last", norm_weight, eps, normalize, backend)[0][:, 0]
