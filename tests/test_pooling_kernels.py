"""Kernels and reference against float64: on a GPU as they are, elsewhere under Triton's interpreter (conftest.py)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import pooling_kernels
from pooling_kernels import attention_pool, last_pool, mean_pool, query_pool

HERE = Path(__file__).resolve().parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["torch", "triton"]
KINDS = ["mean", "weighted mean", "attention", "query", "last"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# lengths of the rows, D, H: one token, odd sizes, a row longer than one block, a bag; the kernels' blocks are powers of two
SIZES = {
    "one": ((1,), 1, 1),
    "odd": ((3, 0, 1, 7), 3, 2),
    "wide": ((5, 0, 2), 65, 3),
    "blocks": ((90, 0, 1), 100, 1),
    "bag": ((700,), 24, 5),
}


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Memory that nobody wrote holds NaN."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def problem(lengths, width, heads, layout, dtype, seed=0):
    """-> inputs by name, layout keywords; NaN wherever nothing may look. `layout`: left, right, holes or packed."""
    g = torch.Generator().manual_seed(seed)
    n, longest = len(lengths), max(lengths) + 2
    mask = torch.zeros(n, longest, dtype=torch.bool)
    for b, length in enumerate(lengths):
        at = (
            torch.randperm(longest, generator=g)
            if layout == "holes"
            else torch.arange(longest) - (longest - length if layout == "left" else 0)
        )
        mask[b] = (at >= 0) & (at < length)
    shapes = {"values": (width,), "weights": (), "scores": (heads,)}
    made = {k: torch.randn(n, longest, *s, generator=g, dtype=torch.float64) for k, s in shapes.items()}
    made["weights"] = made["weights"].abs()
    made["weights"][:, ::3] = 0
    made["scores"][:, ::4, 0] = -torch.inf
    if layout == "packed":
        made = {k: v[mask] for k, v in made.items()}
        keywords = {"cu_seqlens": torch.tensor([0, *lengths]).cumsum(0)}
    else:
        made = {k: v.masked_fill(~mask.view(*mask.shape, *[1] * (v.dim() - 2)), torch.nan) for k, v in made.items()}
        keywords = {"mask": mask}
    made["query"] = torch.randn(heads, width, generator=g, dtype=torch.float64)
    made["norm_weight"] = torch.rand(width, generator=g, dtype=torch.float64) + 0.5
    return {k: v.to(DEVICE, dtype) for k, v in made.items()}, {k: v.to(DEVICE) for k, v in keywords.items()}


def call(kind, inputs, keywords):
    """-> every output of one pooling, the ones that are no number left out of log-sum-exp."""
    values = inputs["values"]
    if kind == "mean":
        return (mean_pool(values, **keywords),)
    if kind == "weighted mean":
        return (mean_pool(values, weights=inputs["weights"], **keywords),)
    if kind == "last":
        return (last_pool(values, **keywords),)
    out, lse = (
        attention_pool(values, inputs["scores"], **keywords) if kind == "attention" else query_pool(values, inputs["query"], **keywords)
    )
    return out, lse


def used(kind, norm):
    extra = {"weighted mean": ["weights"], "attention": ["scores"], "query": ["query"]}.get(kind, [])
    return ["values", *extra, *(["norm_weight"] if norm else [])]


def results(kind, inputs, keywords, norm, normalize, backend):
    """Outputs and gradients of a fixed scalar of them."""
    inputs = {k: inputs[k].detach().clone().requires_grad_() for k in used(kind, norm)}
    keywords = keywords | {"normalize": normalize, "backend": backend} | ({"norm_weight": inputs["norm_weight"]} if norm else {})
    outputs = call(kind, inputs, keywords)
    weigh = lambda o: torch.linspace(0.5, 1.5, o.numel(), dtype=o.dtype, device=o.device).view_as(o)  # noqa: E731
    sum((o.masked_fill(o == -torch.inf, 0) * weigh(o)).sum() for o in outputs).backward()
    return {f"output {i}": o.detach() for i, o in enumerate(outputs)} | {f"gradient of {k}": v.grad for k, v in inputs.items()}


# ---------------------------------------------------------------------------------------------------- by hand, by loop


@pytest.mark.parametrize("backend", BACKENDS)
def test_three_tokens_by_hand(backend):
    values = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [6.0, 3.0]]], device=DEVICE)
    kw = {"mask": torch.ones(1, 3, dtype=torch.bool, device=DEVICE), "backend": backend}
    assert mean_pool(values, **kw).tolist() == [[3.0, 1.0]]
    assert mean_pool(values, weights=torch.tensor([[1.0, 2.0, 1.0]], device=DEVICE), **kw).tolist() == [[2.75, 0.75]]
    assert last_pool(values, **kw).tolist() == [[6.0, 3.0]]
    # scores log 1, log 2, log 1 are weights 1/4, 1/2, 1/4; the second head looks at the first token alone
    scores = torch.tensor([[[1.0, 1.0], [2.0, 0.0], [1.0, 0.0]]], device=DEVICE).log()
    out, lse = attention_pool(values, scores, **kw)
    torch.testing.assert_close(out, torch.tensor([[[2.75, 0.75], [1.0, 0.0]]], device=DEVICE))
    torch.testing.assert_close(lse, torch.tensor([[4.0, 1.0]], device=DEVICE).log())
    # a query (sqrt(2) log 2, 0) scores the tokens log 2, 2 log 2, 6 log 2: weights 2, 4, 64 of 70
    query = torch.tensor([[2.0**0.5, 0.0]], device=DEVICE) * torch.tensor(2.0).log()
    out, lse = query_pool(values, query, **kw)
    torch.testing.assert_close(out, torch.tensor([[[(2 + 8 + 384) / 70, 192 / 70]]], device=DEVICE))
    torch.testing.assert_close(lse, torch.tensor([[70.0]], device=DEVICE).log())
    # (6, 3) has a mean square of 22.5; of norm 1 it is (2, 1) / sqrt(5)
    normed = last_pool(values, norm_weight=torch.tensor([1.0, 2.0], device=DEVICE), eps=0, **kw)
    torch.testing.assert_close(normed, torch.tensor([[6.0, 6.0]], device=DEVICE) / 22.5**0.5)
    torch.testing.assert_close(last_pool(values, normalize=True, **kw), torch.tensor([[2.0, 1.0]], device=DEVICE) / 5**0.5)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("layout", ["left", "right", "holes", "packed"])
def test_the_reference_equals_a_loop(layout, norm):
    """Each row by itself, with torch's own functions: no masks, no tricks."""
    inputs, kw = problem((3, 0, 1, 7), 5, 2, layout, torch.float64)
    mask = kw.get("mask")
    rows = [slice(*kw["cu_seqlens"][b : b + 2].tolist()) for b in range(4)] if mask is None else [(b, mask[b]) for b in range(4)]
    for kind in KINDS:
        found = results(kind, inputs, kw, norm, False, "torch")
        for b, at in enumerate(rows):
            x, w, s = (inputs[k][at] for k in ("values", "weights", "scores"))
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
            torch.testing.assert_close(found["output 0"][b], expected, rtol=0, atol=1e-12, msg=f"{kind}, row {b}")
            if kind in ("attention", "query"):
                torch.testing.assert_close(found["output 1"][b], s.logsumexp(0), msg=f"{kind}, row {b}")


# ------------------------------------------------------------------------------------------- kernels against float64


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["left", "right", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_equal_float64(kind, layout, dtype):
    """Values and gradients of every size class, with and without norm and L2 norm; errors at most twice those of the reference
    in the same type, or a rounding of the output's type."""
    for size, (lengths, width, heads) in SIZES.items():
        for norm, normalize in ((False, False), (True, size != "blocks")):
            inputs, kw = problem(lengths, width, heads, layout, dtype)
            exact = results(kind, {k: v.double() for k, v in inputs.items()}, kw, norm, normalize, "torch")
            plain, ours = (results(kind, inputs, kw, norm, normalize, backend) for backend in BACKENDS)
            for name, expected in exact.items():
                found = ours[name]
                assert found.dtype == (torch.float32 if "output" in name else dtype)
                both = expected == found  # infinities too
                allowed = 2 * (plain[name].double() - expected).abs() + 2e-6 * (1 + expected.abs())
                if found.dtype != torch.float32:
                    allowed = allowed + 2 * torch.finfo(dtype).eps * expected.abs() + 1e-4 * (dtype == torch.float16)
                close = both | ((found.double() - expected).abs() <= allowed)
                assert close.all(), f"{size}, norm {norm}, {name}: {found[~close][:3]} instead of {expected[~close][:3]}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_by_finite_differences(kind, backend):
    for layout, norm, normalize in (("left", False, False), ("packed", True, False), ("holes", True, True)):
        inputs, kw = problem((3, 0, 1), 3, 2, layout, torch.float64)
        inputs = {k: v.nan_to_num(0.5) for k, v in inputs.items()}
        inputs["scores"] = inputs["scores"].clamp(min=-5)
        inputs["weights"] = inputs["weights"] + 0.1
        names = used(kind, norm)

        def scalar_free(*tensors, names=names, kw=kw, normalize=normalize, norm=norm):
            given = dict(zip(names, tensors, strict=True))
            more = {"norm_weight": given["norm_weight"]} if norm else {}
            outputs = call(kind, given, kw | more | {"normalize": normalize, "backend": backend})
            return tuple(o.masked_fill(o == -torch.inf, 0) for o in outputs)

        assert torch.autograd.gradcheck(scalar_free, [inputs[n].requires_grad_() for n in names], fast_mode=True)


@settings(max_examples=15, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])  # shrinking would take minutes
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    width=st.integers(1, 40),
    heads=st.integers(1, 6),
    layout=st.sampled_from(["left", "right", "holes", "packed"]),
    kind=st.sampled_from(KINDS),
    norm=st.booleans(),
    parts=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_any_ragged_shape(lengths, width, heads, layout, kind, norm, parts, seed):
    inputs, kw = problem(lengths, width, heads, layout, torch.float64, seed)
    expected = results(kind, inputs, kw, norm, False, "torch")
    plan = pooling_kernels._plan
    try:
        pooling_kernels._plan = lambda *a: (4, plan(*a)[1], parts, 4)
        found = results(kind, inputs, kw, norm, False, "triton")
    finally:
        pooling_kernels._plan = plan
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


# ------------------------------------------------------------------------------------------------------- semantics


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_count_leaves_no_trace(kind, backend):
    """NaN at masked places, under weight 0 and score -inf; rows without anything; gradients there are zero."""
    inputs, kw = problem((3, 0, 1, 7), 5, 1, "right", torch.float32)
    nothing = {"weighted mean": inputs["weights"] == 0, "attention": inputs["scores"][..., 0] == -torch.inf}.get(kind)
    if nothing is not None:
        inputs["values"][nothing] = torch.nan
    for norm in (False, True):
        found = results(kind, inputs, kw, norm, True, backend)
        assert all(not v.isnan().any() for v in found.values()), {k: v.isnan().sum() for k, v in found.items()}
        assert found["output 0"][1].eq(0).all() and found["gradient of values"][1].eq(0).all()
        assert found["gradient of values"][~kw["mask"]].eq(0).all()
        if kind in ("attention", "query"):
            assert found["output 1"][1].eq(-torch.inf).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_and_no_tokens(backend):
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
def test_tokens_behind_the_last_row_get_a_zero_gradient(backend):
    """On a GPU nobody looks whether cu_seqlens ends at T: it would have to wait for the device."""
    values = torch.randn(9, 3, generator=torch.Generator().manual_seed(0)).to(DEVICE).requires_grad_()
    cu_seqlens = torch.tensor([0, 2, 5], device=DEVICE)
    out, _ = pooling_kernels._pool(values, None, None, None, cu_seqlens, "mean", None, 1e-6, False, backend)
    torch.testing.assert_close(out[:, 0], torch.stack([values[:2].mean(0), values[2:5].mean(0)]))
    out.sum().backward()
    assert values.grad[5:].eq(0).all() and values.grad[:5].gt(0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_any_strides(kind):
    """Transposed, cut out and broadcast values: read where they are."""
    inputs, kw = problem((3, 0, 6), 9, 2, "left", torch.float64)
    expected = results(kind, inputs, kw, True, False, "torch")
    values = inputs["values"]
    views = {
        "transposed": values.transpose(0, 1).contiguous().transpose(0, 1),
        "feature by feature": values.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "every other": torch.stack([values, values * torch.nan], -1)[..., 0],
    }
    for name, view in views.items():
        assert not view.is_contiguous()
        leaf = view.detach().requires_grad_()
        more = {"norm_weight": inputs["norm_weight"], "backend": "triton"}
        out = call(kind, inputs | {"values": leaf}, kw | more)[0]
        torch.testing.assert_close(out, expected["output 0"], msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_run_in_float32(dtype, backend):
    """A mean over 8,192 bfloat16 tokens, added up in bfloat16, is off by 1 - cos of about 0.1."""
    x = (torch.randn(1, 8192, 16, generator=torch.Generator().manual_seed(0)) + 1).to(DEVICE, dtype)
    exact = x.double().mean(1)
    kw = {"mask": torch.ones(1, 8192, dtype=torch.bool, device=DEVICE), "backend": backend}
    scores = torch.zeros(1, 8192, 1, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):  # as in training
        vectors = (
            mean_pool(x, **kw),
            attention_pool(x, scores, **kw)[0][:, 0],
            query_pool(x, torch.zeros(1, 16, device=DEVICE), **kw)[0][:, 0],
        )
    for found in vectors:
        assert found.dtype == torch.float32
        assert 1 - torch.cosine_similarity(found.double(), exact).item() < 1e-6


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
    with pytest.raises(ValueError, match=r"query must be \(H, 4\)"):
        query_pool(x, torch.zeros(4), mask=ones)
    with pytest.raises(ValueError, match=r"norm_weight must be \(4,\)"):
        mean_pool(x, mask=ones, norm_weight=torch.ones(3))
    with pytest.raises(ValueError, match="unknown backend"):
        mean_pool(x, mask=ones, backend="cuda")
    with pytest.raises(ValueError, match="floating-point"):
        mean_pool(x.long(), mask=ones)


def test_triton_is_refused_where_it_cannot_run(monkeypatch):
    x, ones = torch.zeros(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)
    monkeypatch.setattr(pooling_kernels, "_interpreted", lambda: False)
    with pytest.raises(ValueError, match="values are on cpu: the kernels need a GPU"):
        mean_pool(x, mask=ones, backend="triton")
    monkeypatch.setattr(pooling_kernels, "triton", None)
    with pytest.raises(ValueError, match="Triton is not installed"):
        mean_pool(x, mask=ones, backend="triton")
    assert mean_pool(x, mask=ones).shape == (2, 4)


# ------------------------------------------------------------------------------------------- torch.library, compiling


def test_registered_operators():
    """Schema, fake tensors and dispatch of both operators, as torch.library.opcheck sees them."""
    inputs, kw = problem((3, 0, 5), 6, 2, "left", torch.float32)
    packed, packed_kw = problem((3, 0, 5), 6, 2, "packed", torch.float32)
    query = inputs["query"]
    for i, mask, cu in ((inputs, kw["mask"], None), (packed, None, packed_kw["cu_seqlens"])):
        for mode, aux, q in (("mean", None, None), ("attention", i["scores"], None), ("query", None, query), ("last", None, None)):
            for norm, normalize in ((None, False), (i["norm_weight"], True)):
                arguments = (i["values"], aux, q, norm, mask, cu, mode, normalize, 1e-6)
                torch.library.opcheck(torch.ops.pooling.forward, arguments)
            heads = 2 if mode in ("attention", "query") else 1
            lse, g, delta = torch.zeros(3, heads), torch.ones(3, heads, 6), torch.zeros(3, heads)
            arguments = (i["values"], aux, q, mask, cu, *(t.to(DEVICE) for t in (lse + 1, g, delta)), mode, True, 1e-6)
            torch.library.opcheck(torch.ops.pooling.backward, (*arguments, True, aux is not None, q is not None))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["left", "packed"])
def test_compiles_without_a_graph_break(layout, backend):
    inputs, kw = problem((3, 1, 5), 6, 2, layout, torch.float32)
    inputs = {k: v.nan_to_num(0) for k, v in inputs.items()}

    def step(values, scores, query):
        with torch.autocast(DEVICE, torch.bfloat16):
            a = mean_pool(values, norm_weight=inputs["norm_weight"], backend=backend, **kw)
            b = attention_pool(values, scores, backend=backend, **kw)[0].sum(1)
            return (
                a
                + b
                + query_pool(values, query, normalize=True, backend=backend, **kw)[0].sum(1)
                + last_pool(values, backend=backend, **kw)
            )

    arguments = [inputs[k].clamp(-3, 3).requires_grad_() for k in ("values", "scores", "query")]
    expected = torch.autograd.grad(step(*arguments).square().sum(), arguments)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*arguments).square().sum(), arguments)
    for e, f in zip(expected, found, strict=True):
        torch.testing.assert_close(f, e)


# --------------------------------------------------------------------------------------- compiled ahead of time


@pytest.fixture(scope="module")
def compiled():
    """Every kernel, compiled for GPUs that need not be here, by a process without the interpreter."""
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, str(HERE / "tests" / "compile_kernels.py")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_compiles_for_every_target(compiled):
    targets = {r["target"] for r in compiled}
    assert targets == {"cuda:80", "cuda:90", "cuda:100", "hip:gfx942"}
    for target in targets:
        assert {r["kernel"] for r in compiled if r["target"] == target} == {"_pool_fwd_kernel", "_merge_kernel", "_pool_bwd_kernel"}


def test_compiled_kernels_read_16_bytes_and_do_not_spill(compiled):
    """Two programs at least fit a multiprocessor's 65,536 registers; one where a token has more than 4,096 features."""
    for r in compiled:
        assert r["spills"] == 0, r
        assert r["shared"] <= 48 * 1024, r
        if r["target"].startswith("cuda"):
            assert r["values_load"] == 128, r
            assert r["registers"] * r["warps"] * 32 <= 65536 // (1 if r["BLOCK_D"] > 4096 else 2), r


# ------------------------------------------------------------------------------------------------- large, on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_more_than_two_to_the_31_elements(kind):
    """Tokens beyond element 2^31 are found, forward and backward: three of them, behind 600,000 that do not count."""
    n, d = 600_000, 4096
    values = torch.zeros(1, n, d, dtype=torch.bfloat16, device="cuda")
    values[0, -3:] = torch.randn(3, d, generator=torch.Generator().manual_seed(0)).to(values)
    mask = torch.zeros(1, n, dtype=torch.bool, device="cuda")
    mask[0, -3:] = True
    more = {
        "weights": torch.rand(1, n, device="cuda"),
        "scores": torch.randn(1, n, 1, device="cuda"),
        "query": torch.randn(1, d, device="cuda"),
    }
    large = results(kind, {"values": values, **more}, {"mask": mask}, False, False, "triton")
    cut = {k: (v if k == "query" else v[:, -3:]) for k, v in more.items()} | {"values": values[:, -3:]}
    small = results(kind, {k: v.double() for k, v in cut.items()}, {"mask": mask[:, -3:]}, False, False, "torch")
    torch.testing.assert_close(large["output 0"].double(), small["output 0"], rtol=1e-5, atol=1e-5)
    gradient = large["gradient of values"]
    assert gradient[:, :-3].eq(0).all()
    torch.testing.assert_close(gradient[:, -3:].double(), small["gradient of values"], rtol=1e-2, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["left", "right", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_large_shapes(kind, layout):
    """Batches as large models leave them, and a bag of 100,000, against float64."""
    lengths = {"bag": (100_000,), "batch": tuple(torch.randint(1, 512, (32,), generator=torch.Generator().manual_seed(0)).tolist())}
    for name, width in (("bag", 1024), ("batch", 4096), ("batch", 5120)):
        for norm in (False, True):
            inputs, kw = problem(lengths[name], width, 1, layout, torch.bfloat16)
            exact = results(kind, {k: v.double() for k, v in inputs.items()}, kw, norm, True, "torch")
            found = results(kind, inputs, kw, norm, True, "triton")
            for key, expected in exact.items():
                rtol = 2e-2 if "gradient" in key else 1e-4
                torch.testing.assert_close(
                    found[key].double(), expected, rtol=rtol, atol=1e-4, msg=lambda m, at=f"{name} {key}": f"{at}: {m}"
                )
