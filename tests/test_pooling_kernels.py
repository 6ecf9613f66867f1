import pytest
import torch

from pooling_kernels import attention_pool, last_pool, mean_pool

LENGTHS = (3, 0, 1, 7)


def padded(side: str, dtype=torch.float64, poison=float("nan")):
    """Values (B, L, D) with NaN in the padding, mask, and the same rows packed with cu_seqlens."""
    g = torch.Generator().manual_seed(0)
    rows = [torch.randn(n, 5, generator=g, dtype=torch.float64).to(dtype) for n in LENGTHS]
    width = max(LENGTHS) + 1
    values, mask = torch.full((len(rows), width, 5), poison, dtype=dtype), torch.zeros(len(rows), width, dtype=torch.bool)
    for b, row in enumerate(rows):
        at = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        values[b, at], mask[b, at] = row, True
    return values, mask, torch.cat(rows), torch.tensor((0, *LENGTHS)).cumsum(0)


def test_three_tokens_by_hand():
    values = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [6.0, 3.0]]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert mean_pool(values, mask=mask).tolist() == [[3.0, 1.0]]
    assert mean_pool(values, mask=mask, weights=torch.tensor([[1.0, 2.0, 1.0]])).tolist() == [[2.75, 0.75]]
    assert last_pool(values, mask=mask).tolist() == [[6.0, 3.0]]
    # scores log 1, log 2, log 1 are weights 1/4, 1/2, 1/4; the second head looks at the first token alone
    scores = torch.tensor([[[0.0, 0.0], [2.0, 0.0], [1.0, 0.0]]]).log()
    scores[0, :, 0] = torch.tensor([1.0, 2.0, 1.0]).log()
    scores[0, :, 1] = torch.tensor([0.0, -torch.inf, -torch.inf])
    out, lse = attention_pool(values, scores, mask=mask)
    assert torch.allclose(out, torch.tensor([[[2.75, 0.75], [1.0, 0.0]]]))
    assert torch.allclose(lse, torch.tensor([[4.0, 1.0]]).log())


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_equals_packed_equals_a_loop(side):
    values, mask, packed, cu = padded(side)
    scores = torch.randn(*mask.shape, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weights = scores[..., 0].exp()
    scores[~mask] = weights[~mask] = torch.nan
    loop = {"mean": [], "weighted": [], "last": [], "attention": []}
    for b in range(len(LENGTHS)):
        x, s, w = values[b, mask[b]], scores[b, mask[b]], weights[b, mask[b]]
        zero = torch.zeros(5, dtype=torch.float64)
        loop["mean"].append(x.mean(0) if len(x) else zero)
        loop["weighted"].append((w[:, None] * x).sum(0) / w.sum() if len(x) else zero)
        loop["last"].append(x[-1] if len(x) else zero)
        loop["attention"].append(s.softmax(0).T @ x if len(x) else zero.expand(3, 5))
    expected = {k: torch.stack(v) for k, v in loop.items()}
    for layout in ({"mask": mask}, {"cu_seqlens": cu}):
        x, s, w = (values, scores, weights) if "mask" in layout else (packed, scores[mask], weights[mask])
        found = {
            "mean": mean_pool(x, **layout),
            "weighted": mean_pool(x, weights=w, **layout),
            "last": last_pool(x, **layout),
            "attention": attention_pool(x, s, **layout)[0],
        }
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-12, msg=f"{name}, {list(layout)}")
        lse = attention_pool(x, s, **layout)[1]
        assert lse[1].eq(-torch.inf).all()
        torch.testing.assert_close(lse[3], scores[3, mask[3]].logsumexp(0))


@pytest.mark.parametrize("side", ["left", "right"])
def test_gradients(side):
    values, mask, packed, cu = padded(side, poison=0.5)
    scores = torch.randn(*mask.shape, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    values.requires_grad_()
    scores.requires_grad_()
    check = torch.autograd.gradcheck
    assert check(lambda x: mean_pool(x, mask=mask, weights=scores[..., 0].detach().exp()), values)
    assert check(lambda x: last_pool(x, mask=mask), values)
    assert check(lambda x, s: attention_pool(x, s, mask=mask)[0], (values, scores))
    assert check(lambda x, s: attention_pool(x, s, mask=mask)[1][LENGTHS.index(7)], (values, scores))
    packed.requires_grad_()
    assert check(lambda x, s: attention_pool(x, s, cu_seqlens=cu)[0], (packed, scores[mask].detach().requires_grad_()))


def test_masked_nan_never_leaks_into_gradients():
    values, mask, _, _ = padded("right")
    values.requires_grad_()
    scores = torch.zeros(*mask.shape, 1, dtype=torch.float64).masked_fill(~mask[..., None], torch.nan).requires_grad_()
    out = mean_pool(values, mask=mask).sum() + last_pool(values, mask=mask).sum() + attention_pool(values, scores, mask=mask)[0].sum()
    out.backward()
    assert out.isfinite()
    assert values.grad.isfinite().all() and scores.grad.isfinite().all()
    assert values.grad[~mask].eq(0).all() and values.grad[1].eq(0).all()


def test_all_scores_minus_infinity_give_zeros():
    values, scores = torch.ones(1, 3, 2, requires_grad=True), torch.full((1, 3, 1), -torch.inf, requires_grad=True)
    out, lse = attention_pool(values, scores, mask=torch.ones(1, 3, dtype=torch.bool))
    out.sum().backward()
    assert out.eq(0).all() and lse.eq(-torch.inf).all()
    assert values.grad.eq(0).all() and scores.grad.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_run_in_float32(dtype):
    """A mean over 8,192 bfloat16 tokens, added up in bfloat16, is off by 1 - cos of about 0.1."""
    x = (torch.randn(1, 8192, 64, generator=torch.Generator().manual_seed(0)) + 1).to(dtype)
    exact = x.double().mean(1)
    mask, scores = torch.ones(1, 8192), torch.zeros(1, 8192, 1)
    with torch.autocast("cpu", torch.bfloat16):  # as in training
        vectors = mean_pool(x, mask=mask), attention_pool(x, scores, mask=mask)[0][:, 0]
    for found in (*vectors, mean_pool(x, mask=mask), attention_pool(x, scores, mask=mask)[0][:, 0]):
        assert found.dtype == torch.float32
        assert 1 - torch.cosine_similarity(found.double(), exact).item() < 1e-6


def test_wrong_shapes_are_refused():
    x = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match="either mask"):
        mean_pool(x)
    with pytest.raises(ValueError, match=r"mask \(B, L\)"):
        mean_pool(x, mask=torch.ones(2, 4))
    with pytest.raises(ValueError, match="ends at T"):
        last_pool(x[0], cu_seqlens=torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="weights and scores"):
        attention_pool(x, torch.zeros(2, 4, 1), mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match="weights and scores"):
        mean_pool(x[0], weights=torch.ones(2), cu_seqlens=torch.tensor([0, 3]))
