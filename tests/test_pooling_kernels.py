"""Pooling kernels and their PyTorch reference against float64. Without a GPU the kernels run in Triton's interpreter (conftest.py)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import pooling_kernels
from pooling_kernels import attention_mean_pool, attention_pool, last_pool, max_pool, mean_pool, query_pool

HERE = Path(__file__).resolve().parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["torch", "triton"]
KINDS = ["mean", "weighted mean", "attention", "query", "last"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# name: row lengths, D, H. The kernels' blocks are powers of two, so most of these sizes end within a block.
SIZES = {
    "one token": ((1,), 1, 1),
    "odd": ((3, 0, 1, 7), 3, 2),
    "two blocks of features": ((5, 2), 300, 3),
    "many blocks of tokens": ((90, 1), 100, 1),
    "several splits and five heads": ((700,), 24, 5),
}
# Kernels under the interpreter are slow. Each size is tested packed and padded, and each side of the padding with several sizes.
# The type of the values changes loads and roundings, not the indexing, so two sizes are enough for float16 and bfloat16.
SIZES_OF_LAYOUT = {
    "left": ("one token", "odd", "two blocks of features"),
    "right": ("odd", "many blocks of tokens", "several splits and five heads"),
    "packed": tuple(SIZES),
}
HALF_PRECISION_NORMS = {"odd": (True, True), "many blocks of tokens": (False, False)}  # size: norm, normalize


@pytest.fixture(autouse=True)
def fill_new_memory_with_nan(monkeypatch):
    """An output that a kernel forgets to write shows as NaN."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def make_inputs(lengths, width, heads, layout, dtype, seed=0):
    """-> tensors by name; mask or cu_seqlens. Masked places hold NaN. `layout` says where the padding is: left, right, holes
    (anywhere) or packed (none)."""
    g = torch.Generator().manual_seed(seed)
    n, longest = len(lengths), max(lengths) + 2
    mask = torch.zeros(n, longest, dtype=torch.bool)
    for b, length in enumerate(lengths):
        position = torch.arange(longest) - (longest - length if layout == "left" else 0)
        if layout == "holes":
            position = torch.randperm(longest, generator=g)
        mask[b] = (position >= 0) & (position < length)
    shapes = {"values": (width,), "weights": (), "scores": (heads,)}
    tensors = {k: torch.randn(n, longest, *s, generator=g, dtype=torch.float64) for k, s in shapes.items()}
    tensors["weights"] = tensors["weights"].abs()
    tensors["weights"][:, ::3] = 0
    tensors["scores"][:, ::4, 0] = -torch.inf
    if layout == "packed":
        tensors = {k: v[mask] for k, v in tensors.items()}
        layout_keywords = {"cu_seqlens": torch.tensor([0, *lengths]).cumsum(0)}
    else:
        tensors = {k: v.masked_fill(~mask.view(*mask.shape, *[1] * (v.dim() - 2)), torch.nan) for k, v in tensors.items()}
        layout_keywords = {"mask": mask}
    tensors["query"] = torch.randn(heads, width, generator=g, dtype=torch.float64)
    tensors["norm_weight"] = torch.rand(width, generator=g, dtype=torch.float64) + 0.5
    return {k: v.to(DEVICE, dtype) for k, v in tensors.items()}, {k: v.to(DEVICE) for k, v in layout_keywords.items()}


def pool(kind, inputs, keywords):
    """-> (pooled,), or (pooled, log-sum-exp) for attention and query."""
    values = inputs["values"]
    if kind == "mean":
        return (mean_pool(values, **keywords),)
    if kind == "weighted mean":
        return (mean_pool(values, weights=inputs["weights"], **keywords),)
    if kind == "last":
        return (last_pool(values, **keywords),)
    if kind == "attention":
        return attention_pool(values, inputs["scores"], **keywords)
    return query_pool(values, inputs["query"], **keywords)


def names_of_inputs(kind, norm):
    extra = {"weighted mean": ["weights"], "attention": ["scores"], "query": ["query"]}.get(kind, [])
    return ["values", *extra, *(["norm_weight"] if norm else [])]


def outputs_and_gradients(kind, inputs, keywords, norm, normalize, backend):
    """Outputs of one pooling, and the gradients of a weighted sum of them, by name. A log-sum-exp of -inf is left out of the sum."""
    inputs = {k: inputs[k].detach().clone().requires_grad_() for k in names_of_inputs(kind, norm)}
    keywords = keywords | {"normalize": normalize, "backend": backend} | ({"norm_weight": inputs["norm_weight"]} if norm else {})
    outputs = pool(kind, inputs, keywords)
    coefficients = lambda o: torch.linspace(0.5, 1.5, o.numel(), dtype=o.dtype, device=o.device).view_as(o)  # noqa: E731
    sum((o.masked_fill(o == -torch.inf, 0) * coefficients(o)).sum() for o in outputs).backward()
    return {f"output {i}": o.detach() for i, o in enumerate(outputs)} | {f"gradient of {k}": v.grad for k, v in inputs.items()}


# ----------------------------------------------------------------------------------- against results known by other means


@pytest.mark.parametrize("backend", BACKENDS)
def test_three_tokens_by_hand(backend):
    values = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [6.0, 3.0]]], device=DEVICE)
    kw = {"mask": torch.ones(1, 3, dtype=torch.bool, device=DEVICE), "backend": backend}
    assert mean_pool(values, **kw).tolist() == [[3.0, 1.0]]
    assert mean_pool(values, weights=torch.tensor([[1.0, 2.0, 1.0]], device=DEVICE), **kw).tolist() == [[2.75, 0.75]]
    assert last_pool(values, **kw).tolist() == [[6.0, 3.0]]
    # The first head's scores log 1, log 2, log 1 give the weights 1/4, 1/2, 1/4. The second head looks at the first token only.
    scores = torch.tensor([[[1.0, 1.0], [2.0, 0.0], [1.0, 0.0]]], device=DEVICE).log()
    out, lse = attention_pool(values, scores, **kw)
    torch.testing.assert_close(out, torch.tensor([[[2.75, 0.75], [1.0, 0.0]]], device=DEVICE))
    torch.testing.assert_close(lse, torch.tensor([[4.0, 1.0]], device=DEVICE).log())
    # The query (sqrt(2) log 2, 0) gives the scores log 2, 2 log 2, 6 log 2, so the weights are 2, 4 and 64 of 70.
    query = torch.tensor([[2.0**0.5, 0.0]], device=DEVICE) * torch.tensor(2.0).log()
    out, lse = query_pool(values, query, **kw)
    torch.testing.assert_close(out, torch.tensor([[[(2 + 8 + 384) / 70, 192 / 70]]], device=DEVICE))
    torch.testing.assert_close(lse, torch.tensor([[70.0]], device=DEVICE).log())
    # (6, 3) has a mean square of 22.5. Divided by its L2 norm it is (2, 1) / sqrt(5).
    after_norm = last_pool(values, norm_weight=torch.tensor([1.0, 2.0], device=DEVICE), eps=0, **kw)
    torch.testing.assert_close(after_norm, torch.tensor([[6.0, 6.0]], device=DEVICE) / 22.5**0.5)
    torch.testing.assert_close(last_pool(values, normalize=True, **kw), torch.tensor([[2.0, 1.0]], device=DEVICE) / 5**0.5)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("layout", ["left", "right", "holes", "packed"])
def test_the_reference_equals_a_loop_over_rows(layout, norm):
    """Each row by itself, with torch's own functions and without masks."""
    inputs, kw = make_inputs((3, 0, 1, 7), 5, 2, layout, torch.float64)
    mask = kw.get("mask")
    rows = [slice(*kw["cu_seqlens"][b : b + 2].tolist()) for b in range(4)] if mask is None else [(b, mask[b]) for b in range(4)]
    for kind in KINDS:
        pooled = outputs_and_gradients(kind, inputs, kw, norm, False, "torch")
        for b, row in enumerate(rows):
            x, w, s = (inputs[k][row] for k in ("values", "weights", "scores"))
            if norm:
                x = torch.nn.functional.rms_norm(x, (5,), inputs["norm_weight"], 1e-6)
            if kind == "query":
                s = x @ inputs["query"].T / 5**0.5
            zero = x.new_zeros(5)
            expected = {
                "mean": x.mean(0) if len(x) else zero,
                "weighted mean": (w / w.sum().clamp(min=1e-300)) @ x,
                "last": x[-1] if len(x) else zero,
            }.get(kind, s.softmax(0).nan_to_num(0).T @ x)
            torch.testing.assert_close(pooled["output 0"][b], expected, rtol=0, atol=1e-12, msg=f"{kind}, row {b}")
            if kind in ("attention", "query"):
                torch.testing.assert_close(pooled["output 1"][b], s.logsumexp(0), msg=f"{kind}, row {b}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["left", "right", "packed"])
@pytest.mark.parametrize(("kind", "mode"), [("mean", "mean"), ("position-weighted mean", "weightedmean"), ("last", "lasttoken")])
def test_poolings_equal_those_of_sentence_transformers(kind, mode, layout, backend):
    """Row lengths from 1 to the full width. The padding holds ordinary numbers, because their module multiplies it by 0."""
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    g = torch.Generator().manual_seed(0)
    lengths = torch.tensor([1, 6, 9, 4], device=DEVICE)
    values = torch.randn(4, 9, 24, generator=g).to(DEVICE)
    mask = torch.arange(9, device=DEVICE) < lengths[:, None]
    if layout == "left":
        mask = mask.flip(1)
    weights = mask.cumsum(1).float()  # 1 for a row's first token, 2 for the next: SGPT, Muennighoff 2022, arXiv 2202.08904
    features, kw = {"token_embeddings": values, "attention_mask": mask.long()}, {"mask": mask}
    if layout == "packed":
        kw = {"cu_seqlens": torch.nn.functional.pad(lengths.cumsum(0), (1, 0))}
        values, weights = values[mask], weights[mask]
        features = {"token_embeddings": values[None], "cu_seq_lens_q": kw["cu_seqlens"]}
    expected = modules.Pooling(24, pooling_mode=mode)(features)["sentence_embedding"]
    if kind == "last":
        pooled = last_pool(values, backend=backend, **kw)
    else:
        pooled = mean_pool(values, weights=None if kind == "mean" else weights, backend=backend, **kw)
    torch.testing.assert_close(pooled, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("layout", ["left", "right", "holes", "packed"])
def test_the_largest_numbers_of_each_row(layout):
    """Also of a row without a token, beside NaN where nothing counts, in half precision, with a gradient to the largest alone."""
    inputs, kw = make_inputs([3, 0, 5, 1], 6, 1, layout, torch.bfloat16)
    values = inputs["values"].requires_grad_()
    rows = values.split([3, 0, 5, 1]) if layout == "packed" else [x[m] for x, m in zip(values, kw["mask"], strict=True)]
    expected = torch.stack([row.float().amax(0) if len(row) else torch.zeros(6, device=DEVICE) for row in rows])
    out = max_pool(values, **kw)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(out.sum(), values)
    assert gradient.isfinite().all() and gradient.float().sum().item() == 18 and (gradient != 0).sum().item() == 18


# ------------------------------------------------------------------------------------------- kernels against float64


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["left", "right", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_equal_float64(kind, layout, dtype):
    """Outputs and gradients, with and without RMSNorm and L2 norm. The error may be twice that of the reference in the same
    type, or a rounding of the output's type."""
    if dtype == torch.float32:
        cases = [(size, norms) for size in SIZES_OF_LAYOUT[layout] for norms in ((False, False), (True, size != "many blocks of tokens"))]
    else:
        cases = HALF_PRECISION_NORMS.items()
    for size, (norm, normalize) in cases:
        inputs, kw = make_inputs(*SIZES[size], layout, dtype)
        exact = outputs_and_gradients(kind, {k: v.double() for k, v in inputs.items()}, kw, norm, normalize, "torch")
        reference, kernels = (outputs_and_gradients(kind, inputs, kw, norm, normalize, backend) for backend in BACKENDS)
        for name, expected in exact.items():
            result = kernels[name]
            assert result.dtype == (torch.float32 if "output" in name else dtype)
            allowed = 2 * (reference[name].double() - expected).abs() + 2e-6 * (1 + expected.abs())
            if result.dtype != torch.float32:
                allowed = allowed + 2 * torch.finfo(dtype).eps * expected.abs() + 1e-4 * (dtype == torch.float16)
            close = (expected == result) | ((result.double() - expected).abs() <= allowed)  # == is for infinities
            assert close.all(), f"{size}, norm {norm}, {name}: {result[~close][:3]} instead of {expected[~close][:3]}"


# layout, norm, normalize. The kernels get one case only: test_any_ragged_shape compares them with the reference in all others.
GRADIENT_CASES = {
    "torch": [("left", False, False), ("packed", True, False), ("holes", True, True)],
    "triton": [("holes", True, False)],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_finite_differences(kind, backend):
    for layout, norm, normalize in GRADIENT_CASES[backend]:
        inputs, kw = make_inputs((3, 1), 3, 2, layout, torch.float64)
        inputs = {k: v.nan_to_num(0.5) for k, v in inputs.items()}
        inputs["scores"] = inputs["scores"].clamp(min=-5)
        inputs["weights"] = inputs["weights"] + 0.1
        names = names_of_inputs(kind, norm)

        def finite_outputs(*tensors, names=names, kw=kw, normalize=normalize, norm=norm):
            inputs = dict(zip(names, tensors, strict=True))
            norm_weight = {"norm_weight": inputs["norm_weight"]} if norm else {}
            outputs = pool(kind, inputs, kw | norm_weight | {"normalize": normalize, "backend": backend})
            return tuple(o.masked_fill(o == -torch.inf, 0) for o in outputs)

        assert torch.autograd.gradcheck(finite_outputs, [inputs[n].requires_grad_() for n in names], fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=6, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])  # shrinking would take minutes
@given(
    lengths=st.lists(st.integers(0, 25), min_size=1, max_size=3),
    width=st.integers(1, 40),
    heads=st.sampled_from([1, 2, 5]),  # 5 are more than one block of heads
    layout=st.sampled_from(["left", "right", "holes", "packed"]),
    norm=st.booleans(),
    normalize=st.booleans(),
    splits=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_any_ragged_shape(kind, lengths, width, heads, layout, norm, normalize, splits, seed):
    """With two tokens in most blocks and up to `splits` splits of a row, so that even rows this short have several."""
    inputs, kw = make_inputs(lengths, width, heads, layout, torch.float64, seed)
    expected = outputs_and_gradients(kind, inputs, kw, norm, normalize, "torch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pooling_kernels, "TILE", 2 << (width - 1).bit_length())
        patch.setattr(pooling_kernels, "PROGRAMS", splits * len(lengths))
        results = outputs_and_gradients(kind, inputs, kw, norm, normalize, "triton")
    for name in expected:
        torch.testing.assert_close(results[name], expected[name], rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


# ------------------------------------------------------------------------------------------------------- semantics


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_ignored_tokens_leave_no_trace(kind, backend):
    """NaN at masked places, under weight 0 and under score -inf changes nothing. An empty row gives zeros. Their gradients are 0."""
    inputs, kw = make_inputs((3, 0, 1, 7), 5, 1, "right", torch.float32)
    ignored = {"weighted mean": inputs["weights"] == 0, "attention": inputs["scores"][..., 0] == -torch.inf}.get(kind)
    if ignored is not None:
        inputs["values"][ignored] = torch.nan
    for norm in (False, True):
        results = outputs_and_gradients(kind, inputs, kw, norm, True, backend)
        assert all(not v.isnan().any() for v in results.values()), {k: v.isnan().sum() for k, v in results.items()}
        assert results["output 0"][1].eq(0).all() and results["gradient of values"][1].eq(0).all()
        assert results["gradient of values"][~kw["mask"]].eq(0).all()
        if kind in ("attention", "query"):
            assert results["output 1"][1].eq(-torch.inf).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["holes", "packed"])
def test_the_mean_over_heads_is_that_of_attention_pooling(layout, backend):
    inputs, kw = make_inputs((3, 0, 1, 7), 5, 3, layout, torch.float32)
    inputs["scores"][-1] = -torch.inf  # of the last row, or its last token
    results = []
    for pooled in (lambda v, s: attention_mean_pool(v, s, **kw, backend=backend), lambda v, s: attention_pool(v, s, **kw)[0].mean(1)):
        values, scores = (inputs[name].clone().requires_grad_() for name in ("values", "scores"))
        out = pooled(values, scores)
        out.square().sum().backward()
        results.append((out, values.grad, scores.grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_or_no_tokens_give_empty_or_zero_outputs(backend):
    for kw, shape in (
        ({"mask": torch.zeros(0, 4, dtype=torch.bool)}, (0, 4, 3)),
        ({"mask": torch.zeros(2, 0, dtype=torch.bool)}, (2, 0, 3)),
        ({"cu_seqlens": torch.tensor([0])}, (0, 3)),
        ({"cu_seqlens": torch.tensor([0, 0, 0])}, (0, 3)),
    ):
        values = torch.zeros(shape, device=DEVICE, requires_grad=True)
        kw = {k: v.to(DEVICE) for k, v in kw.items()} | {"backend": backend}
        rows = shape[0] if "mask" in kw else len(kw["cu_seqlens"]) - 1
        scores = torch.zeros(*shape[:-1], 2, device=DEVICE)
        outputs = mean_pool(values, **kw), last_pool(values, **kw), *attention_pool(values, scores, **kw)
        assert [tuple(o.shape) for o in outputs] == [(rows, 3), (rows, 3), (rows, 2, 3), (rows, 2)]
        assert all(o.eq(0).all() for o in outputs[:3]) and outputs[3].eq(-torch.inf).all()
        sum(o.sum() for o in outputs[:3]).backward()
        assert values.grad.shape == shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_after_the_last_row_get_a_zero_gradient(backend, monkeypatch):
    """A cu_seqlens that ends before T is refused on the CPU only: checking it on a GPU, or in torch.compile, would be too slow."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    values = torch.randn(9, 3, generator=torch.Generator().manual_seed(0)).to(DEVICE).requires_grad_()
    out = mean_pool(values, cu_seqlens=torch.tensor([0, 2, 5], device=DEVICE), backend=backend)
    torch.testing.assert_close(out, torch.stack([values[:2].mean(0), values[2:5].mean(0)]))
    out.sum().backward()
    assert values.grad[5:].eq(0).all() and values.grad[:5].gt(0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_values_may_have_any_strides(kind):
    """Transposed values and slices of larger tensors are read where they lie."""
    inputs, kw = make_inputs((3, 0, 6), 9, 2, "left", torch.float64)
    expected = outputs_and_gradients(kind, inputs, kw, True, False, "torch")
    values = inputs["values"]
    views = {
        "rows and tokens transposed": values.transpose(0, 1).contiguous().transpose(0, 1),
        "feature by feature": values.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "every other number": torch.stack([values, values * torch.nan], -1)[..., 0],
    }
    for name, view in views.items():
        assert not view.is_contiguous()
        out = pool(kind, inputs | {"values": view}, kw | {"norm_weight": inputs["norm_weight"], "backend": "triton"})[0]
        torch.testing.assert_close(out, expected["output 0"], msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_run_in_float32(dtype, backend):
    """A mean over 8,192 bfloat16 tokens that is added up in bfloat16 has an error of about 0.1 in 1 - cos."""
    x = (torch.randn(1, 8192, 16, generator=torch.Generator().manual_seed(0)) + 1).to(DEVICE, dtype)
    exact = x.double().mean(1)
    kw = {"mask": torch.ones(1, 8192, dtype=torch.bool, device=DEVICE), "backend": backend}
    scores = torch.zeros(1, 8192, 1, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):  # training pools under autocast
        vectors = (
            mean_pool(x, **kw),
            attention_pool(x, scores, **kw)[0][:, 0],
            query_pool(x, torch.zeros(1, 16, device=DEVICE), **kw)[0][:, 0],
        )
    for vector in vectors:
        assert vector.dtype == torch.float32
        assert 1 - torch.cosine_similarity(vector.double(), exact).item() < 1e-6


def test_wrong_shapes_are_refused():
    x, ones = torch.zeros(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="either mask"):
        mean_pool(x)
    with pytest.raises(ValueError, match=r"mask \(B, L\)"):
        mean_pool(x, mask=torch.ones(2, 4))
    for bad in ([0, 2], [1, 3], [0, 4, 3]):
        with pytest.raises(ValueError, match="rise from 0 and end at T = 3"):
            last_pool(x[0], cu_seqlens=torch.tensor(bad))
    with pytest.raises(ValueError, match="weights and scores"):
        attention_pool(x, torch.zeros(2, 4, 1), mask=ones)
    with pytest.raises(ValueError, match="weights and scores"):
        mean_pool(x[0], weights=torch.ones(2), cu_seqlens=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"query must have shape \(H, 4\)"):
        query_pool(x, torch.zeros(4), mask=ones)
    with pytest.raises(ValueError, match=r"norm_weight must have shape \(4,\)"):
        mean_pool(x, mask=ones, norm_weight=torch.ones(3))
    with pytest.raises(ValueError, match="unknown backend"):
        mean_pool(x, mask=ones, backend="cuda")
    with pytest.raises(ValueError, match="floating-point"):
        mean_pool(x.long(), mask=ones)


def test_the_triton_backend_is_refused_where_it_cannot_run(monkeypatch):
    x, ones = torch.zeros(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)
    monkeypatch.setattr(pooling_kernels, "INTERPRETED", False)
    with pytest.raises(ValueError, match="values are on cpu: the kernels need a GPU"):
        mean_pool(x, mask=ones, backend="triton")
    monkeypatch.setattr(pooling_kernels, "triton", None)
    with pytest.raises(ValueError, match="Triton is not installed"):
        mean_pool(x, mask=ones, backend="triton")
    assert mean_pool(x, mask=ones).shape == (2, 4)


# ------------------------------------------------------------------------------------------- torch.library, torch.compile


@pytest.mark.parametrize("mode", ["mean", "attention", "query", "last"])
def test_operators_are_registered_correctly(mode):
    """Schema, fake tensors and dispatch of both operators, as torch.library.opcheck tests them; each layout with each norm once."""
    for layout, normalize in (("left", mode in ("mean", "query")), ("packed", mode in ("attention", "last"))):
        inputs, kw = make_inputs((3, 0, 5), 6, 2, layout, torch.float32)
        layout_arguments = kw.get("mask"), kw.get("cu_seqlens")
        scores, query = (inputs[name] if mode == of else None for name, of in (("scores", "attention"), ("query", "query")))
        norm_weight = inputs["norm_weight"] if normalize else None
        arguments = (inputs["values"], scores, query, norm_weight, *layout_arguments, mode, normalize, 1e-6)
        torch.library.opcheck(torch.ops.pooling.forward, arguments)
    heads = 2 if mode in ("attention", "query") else 1
    normalizer, dpooled, delta = (t.to(DEVICE) for t in (torch.ones(3, heads), torch.ones(3, heads, 6), torch.zeros(3, heads)))
    need = (True, scores is not None, query is not None)
    arguments = (inputs["values"], scores, query, *layout_arguments, normalizer, dpooled, delta, mode, True, 1e-6, *need)
    torch.library.opcheck(torch.ops.pooling.backward, arguments)


@pytest.mark.parametrize(("layout", "backend"), [("left", "torch"), ("packed", "torch"), ("packed", "triton")])
def test_poolings_compile_without_a_graph_break(layout, backend):
    inputs, kw = make_inputs((3, 1, 5), 6, 2, layout, torch.float32)
    inputs = {k: v.nan_to_num(0) for k, v in inputs.items()}
    kw = kw | {"backend": backend}

    def sum_of_poolings(values, scores, query):
        with torch.autocast(DEVICE, torch.bfloat16):
            mean = mean_pool(values, norm_weight=inputs["norm_weight"], **kw)
            attention = attention_pool(values, scores, **kw)[0].sum(1)
            by_query = query_pool(values, query, normalize=True, **kw)[0].sum(1)
            return mean + attention + by_query + last_pool(values, **kw)

    arguments = [inputs[k].clamp(-3, 3).requires_grad_() for k in ("values", "scores", "query")]
    expected = torch.autograd.grad(sum_of_poolings(*arguments).square().sum(), arguments)
    compiled = torch.compile(sum_of_poolings, fullgraph=True, backend="aot_eager")
    gradients = torch.autograd.grad(compiled(*arguments).square().sum(), arguments)
    for gradient, eager in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, eager)


# --------------------------------------------------------------------------------------- compiled ahead of time


@pytest.fixture(scope="module", autouse=True)
def compiler(request):
    """The process that compiles the kernels, started beside the other tests of this file; None if no test asks for its result."""
    if pooling_kernels.triton is None or not any("compiled" in item.fixturenames for item in request.session.items):
        yield None
        return
    command = [sys.executable, str(HERE / "compile_kernels.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


@pytest.fixture(scope="module")
def compiled(compiler):
    """One dict for every compiled kernel variant, by a process without the interpreter. Needs no GPU."""
    if compiler is None:
        pytest.skip("Triton is not installed")
    lines, errors = compiler.communicate()
    assert compiler.returncode == 0, errors[-2000:]
    return [json.loads(line) for line in lines.splitlines()]


def test_every_kernel_compiles_for_every_target(compiled):
    targets = {r["target"] for r in compiled}
    assert targets == {"cuda:80", "cuda:90", "cuda:100", "hip:gfx942"}
    for target in targets:
        assert {r["kernel"] for r in compiled if r["target"] == target} == {"_pool_fwd_kernel", "_merge_kernel", "_pool_bwd_kernel"}


def test_kernels_are_not_compiled_again_for_the_sizes_of_every_batch(compiled):
    """Specialized are what the values are made of, and what wide loads need: the width of vectors, heads and strides."""
    fixed = {"D", "H", *(f"{name}_stride_{axis}" for name in ("x", "scores", "mask") for axis in "bldh")} - {
        "mask_stride_b",
        "scores_stride_b",
    }
    assert all(set(row["specialized"]) <= fixed and "D" in row["specialized"] for row in compiled)


def test_compiled_kernels_load_16_bytes_and_do_not_spill(compiled):
    """At least two programs fit into a multiprocessor's 65,536 registers, or one if a token has more than 4,096 features."""
    for r in compiled:
        assert r["spills"] == 0, r
        assert r["shared"] <= 48 * 1024, r
        if r["target"].startswith("cuda"):
            assert r["values_load"] == 128, r
            assert r["registers"] * r["warps"] * 32 <= 65536 // (1 if r["BLOCK_D"] > 4096 else 2), r


# ------------------------------------------------------------------------------------------------- large, on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_values_may_have_more_than_two_to_the_31_elements(kind):
    """Only the last three of 600,000 tokens are valid, and they lie beyond element 2^31. Forward and backward must reach them."""
    n, d = 600_000, 4096
    values = torch.zeros(1, n, d, dtype=torch.bfloat16, device="cuda")
    values[0, -3:] = torch.randn(3, d, generator=torch.Generator().manual_seed(0)).to(values)
    mask = torch.zeros(1, n, dtype=torch.bool, device="cuda")
    mask[0, -3:] = True
    others = {
        "weights": torch.rand(1, n, device="cuda"),
        "scores": torch.randn(1, n, 1, device="cuda"),
        "query": torch.randn(1, d, device="cuda"),
    }
    large = outputs_and_gradients(kind, {"values": values, **others}, {"mask": mask}, False, False, "triton")
    last_three = {k: (v if k == "query" else v[:, -3:]) for k, v in others.items()} | {"values": values[:, -3:]}
    in_double = {k: v.double() for k, v in last_three.items()}
    small = outputs_and_gradients(kind, in_double, {"mask": mask[:, -3:]}, False, False, "torch")
    torch.testing.assert_close(large["output 0"].double(), small["output 0"], rtol=1e-5, atol=1e-5)
    gradient = large["gradient of values"]
    assert gradient[:, :-3].eq(0).all()
    torch.testing.assert_close(gradient[:, -3:].double(), small["gradient of values"], rtol=1e-2, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["left", "right", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_large_shapes_equal_float64(kind, layout):
    """Batches of the sizes that large models produce, and a bag of 100,000 tokens."""
    lengths = {"bag": (100_000,), "batch": tuple(torch.randint(1, 512, (32,), generator=torch.Generator().manual_seed(0)).tolist())}
    for name, width in (("bag", 1024), ("batch", 4096), ("batch", 5120)):
        for norm in (False, True):
            inputs, kw = make_inputs(lengths[name], width, 1, layout, torch.bfloat16)
            exact = outputs_and_gradients(kind, {k: v.double() for k, v in inputs.items()}, kw, norm, True, "torch")
            results = outputs_and_gradients(kind, inputs, kw, norm, True, "triton")
            for key, expected in exact.items():
                rtol = 2e-2 if "gradient" in key else 1e-4
                torch.testing.assert_close(
                    results[key].double(), expected, rtol=rtol, atol=1e-4, msg=lambda m, key=key, name=name: f"{name} {key}: {m}"
                )


def test_a_gpu_without_a_c_compiler_takes_the_reference_and_says_so_once(monkeypatch):
    """Triton compiles its driver at the first launch; images made to run programs have no compiler."""

    class Driver:
        @property
        def active(self):
            raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    monkeypatch.setattr(pooling_kernels.triton.runtime, "driver", Driver())
    pooling_kernels.can_launch.cache_clear()
    with pytest.warns(RuntimeWarning, match="pooling runs in PyTorch: .*Failed to find C compiler") as said:
        assert not pooling_kernels.can_launch() and not pooling_kernels.can_launch()
    assert len(said) == 1
    pooling_kernels.can_launch.cache_clear()
