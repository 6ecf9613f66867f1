"""From token states to one vector: the poolings that texts and slides share.

Values are packed rows (T, D) with `cu_seqlens` (B+1,), the running sum of the rows' lengths that starts at 0, or padded
(B, L, D) with a boolean `mask` (B, L), True where a token counts, on either side or with holes. Sums run in float32
(float64 for float64 input) whatever the input's type, and so does the output.

    mean_pool       y_b = sum_t w_t x_t / sum_t w_t                            (B, D)
    attention_pool  y_bh = sum_t softmax_t(s_th) x_t, and log sum_t exp(s_th)  (B, H, D), (B, H)
    last_pool       y_b = x at the last row that counts                        (B, D)

A row without tokens, without weight or with scores of -inf alone gives zeros and a zero gradient (log-sum-exp: -inf),
never NaN. What stands at a masked position, NaN included, has no influence on values or gradients.

These are the PyTorch references. They run on every device and are differentiable.

Legend: B rows (texts, slides), L padded length, T packed tokens, D features, H heads.
"""

import torch
from torch import Tensor


def _accumulator(values: Tensor) -> torch.dtype:
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def _padded(values: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, *per_token: Tensor | None):
    """Bring both layouts to padded rows -> values (B, L, D), 0 where masked, mask (B, L), then each of `per_token`."""
    if (mask is None) == (cu_seqlens is None):
        raise ValueError("give either mask (B, L) for padded values or cu_seqlens (B+1,) for packed ones")
    if cu_seqlens is not None:
        if values.dim() != 2 or cu_seqlens.dim() != 1 or int(cu_seqlens[-1]) != len(values):
            raise ValueError(
                f"packed values (T, D) need cu_seqlens (B+1,) that ends at T: got {tuple(values.shape)} and {cu_seqlens.tolist()[-1:]}"
            )
        for extra in per_token:
            if extra is not None and len(extra) != len(values):
                raise ValueError(f"weights and scores need {len(values)} rows like the values: got {tuple(extra.shape)}")
        lengths = cu_seqlens.diff()
        width = int(lengths.max()) if len(lengths) else 0
        mask = torch.arange(width, device=values.device) < lengths[:, None]
        values, *per_token = (None if x is None else _unpack(x, mask) for x in (values, *per_token))
        return values, mask, *per_token
    if values.dim() != 3 or mask.shape != values.shape[:2]:
        raise ValueError(f"padded values (B, L, D) need mask (B, L): got {tuple(values.shape)} and {tuple(mask.shape)}")
    for extra in per_token:
        if extra is not None and extra.shape[:2] != mask.shape:
            raise ValueError(f"weights and scores follow the mask {tuple(mask.shape)}: got {tuple(extra.shape)}")
    mask = mask.bool()
    return values.masked_fill(~mask[:, :, None], 0), mask, *per_token


def _unpack(x: Tensor, mask: Tensor) -> Tensor:
    """Packed (T, ...) -> padded (B, L, ...), 0 in the padding; differentiable."""
    return x.new_zeros(*mask.shape, *x.shape[1:]).index_put((mask.nonzero(as_tuple=True)), x)


def mean_pool(values: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
    """Mean over each row's tokens, weighted where `weights` (B, L) or (T,), any non-negative numbers, are given -> (B, D)."""
    x, mask, w = _padded(values, mask, cu_seqlens, weights)
    x = x.to(_accumulator(values))
    w = mask.to(x.dtype) if w is None else w.to(x.dtype).masked_fill(~mask, 0)
    mass = w.sum(1, keepdim=True)  # (B, 1)
    with torch.autocast(x.device.type, enabled=False):  # else training would pool in bfloat16
        return torch.einsum("bl,bld->bd", w, x) / torch.where(mass > 0, mass, 1)


def attention_pool(
    values: Tensor, scores: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax of `scores` (B, L, H) or (T, H) over each row's tokens, applied to the values -> (B, H, D), log-sum-exp (B, H)."""
    x, mask, s = _padded(values, mask, cu_seqlens, scores)
    x = x.to(_accumulator(values))
    s = s.to(x.dtype).masked_fill(~mask[:, :, None], -torch.inf)
    top = s.detach().amax(1, keepdim=True) if s.shape[1] else s.new_zeros(len(s), 1, s.shape[2])
    top = torch.where(top.isfinite(), top, 0)  # (B, 1, H): a row of -inf alone must not become inf - inf
    e = torch.exp(s - top)
    mass = e.sum(1)  # (B, H)
    safe = torch.where(mass > 0, mass, 1)
    lse = torch.where(mass > 0, safe.log() + top[:, 0], -torch.inf)
    with torch.autocast(x.device.type, enabled=False):
        return torch.einsum("blh,bld->bhd", e, x) / safe[:, :, None], lse


def last_pool(values: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
    """The last token of each row that the mask lets through -> (B, D)."""
    x, mask = _padded(values, mask, cu_seqlens)
    if x.shape[1] == 0:
        return torch.zeros(x.shape[0], x.shape[2], dtype=_accumulator(values), device=x.device)
    position = torch.arange(1, x.shape[1] + 1, device=x.device) * mask
    return x[torch.arange(len(x), device=x.device), position.argmax(1)].to(_accumulator(values))
