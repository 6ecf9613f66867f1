"""Our pooling kernels beside PyTorch's ways to do the same: first whether they agree, then how long they take. Needs a CUDA GPU.

    python bench/bench_pooling.py --quick           # two shapes
    python bench/bench_pooling.py                   # every shape, forward and forward + backward
    python bench/bench_pooling.py --json out.json   # also writes the results to a file

Shapes: batches of hidden states with the sizes of Qwen3-0.6B (D 1024), Llama-3.2-1B (2048) and Mistral-7B (4096), packed, or
padded with 30 % or 60 % valid tokens; and a slide's bag of 100,000 patches (D 1024). All values are bfloat16.

Implementations: our kernels; multiply and sum, as most code does (eager); one batched matrix product (bmm); torch.compile of
eager; and sentence-transformers' own pooling module, which has the mean and the last token. Each one is compared with float64
before it is timed. Times are medians of triton.testing.do_bench, which flushes the L2 cache before each call. GB/s counts the
bytes that have to move: forward, the valid values are read once; backward, their gradient is written once, and the values are
read once more where the gradient depends on them. "share" relates this to a copy of 1 GiB within the GPU's memory, measured in
the same process and counted as read plus written. The last line of output is the whole record in JSON.
"""

import argparse
import json
import platform
import sys
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from files.console import InputError, run_script
from files.writing import write_text
from pooling_kernels import attention_pool, last_pool, mean_pool, query_pool

# name: B, L, D
SHAPES = {
    "qwen3-0.6b, short": (256, 64, 1024),
    "qwen3-0.6b": (64, 512, 1024),
    "llama-3.2-1b": (64, 512, 2048),
    "mistral-7b": (32, 512, 4096),
    "mistral-7b, long": (8, 4096, 4096),
    "slide": (1, 100_000, 1024),
}
QUICK_SHAPES = ["qwen3-0.6b", "slide"]
KINDS = ("mean", "weighted mean", "norm + mean", "attention", "norm + attention", "query", "norm + query", "last")
Implementation = Callable[[str, Tensor, dict], Tensor]  # (kind, values, the other inputs) -> (B, D)


def make_inputs(shape: tuple[int, int, int], layout: str) -> dict:
    """-> values, mask or cu_seqlens, lengths, scores, weights, query, norm_weight. `layout`: packed, or the share of valid tokens."""
    b, length, d = shape
    g = torch.Generator(device="cuda").manual_seed(0)
    valid_share = 1.0 if layout == "packed" else float(layout)
    shortest = max(1, int(length * max(0.0, 2 * valid_share - 1)))
    longest = max(shortest, int(length * min(1.0, 2 * valid_share)))
    lengths = torch.randint(shortest, longest + 1, (b,), generator=g, device="cuda")
    if b == 1:
        lengths[:] = int(length * valid_share)
    inputs = {"lengths": lengths, "longest": int(lengths.max())}
    if layout == "packed":
        inputs["cu_seqlens"] = F.pad(lengths.cumsum(0), (1, 0))
        tokens = (int(lengths.sum()),)
    else:
        inputs["mask"] = torch.arange(length, device="cuda") < lengths[:, None]
        tokens = (b, length)
    draw = lambda *size: torch.randn(*size, generator=g, device="cuda")  # noqa: E731
    inputs |= {"values": draw(*tokens, d).bfloat16(), "scores": draw(*tokens, 1), "weights": draw(*tokens).abs()}
    return inputs | {"query": draw(1, d), "norm_weight": torch.rand(d, generator=g, device="cuda").bfloat16() + 0.5}


# ------------------------------------------------------------------------------------------------- implementations


def ours(kind: str, values: Tensor, inputs: dict) -> Tensor:
    keywords = {"cu_seqlens": inputs["cu_seqlens"]} if "cu_seqlens" in inputs else {"mask": inputs["mask"]}
    keywords |= {"backend": "triton"} | ({"norm_weight": inputs["norm_weight"]} if kind.startswith("norm") else {})
    if "mean" in kind:
        return mean_pool(values, weights=inputs["weights"] if kind == "weighted mean" else None, **keywords)
    if "attention" in kind:
        return attention_pool(values, inputs["scores"], **keywords)[0][:, 0]
    if "query" in kind:
        return query_pool(values, inputs["query"], **keywords)[0][:, 0]
    return last_pool(values, **keywords)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """The RMSNorm of transformers' Llama: float32 inside, the result in the type of x."""
    y = x.float()
    return weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def token_weights(kind: str, x: Tensor, inputs: dict) -> Tensor:
    """Weight of each token in its row's mean (B, L), float32; the weights of a row sum to 1. `x` has passed the norm."""
    mask = inputs["mask"]
    if "attention" in kind or "query" in kind:
        scores = inputs["scores"][..., 0] if "attention" in kind else (x @ inputs["query"][0].to(x.dtype)).float() / x.shape[-1] ** 0.5
        return scores.masked_fill(~mask, -torch.inf).softmax(1)
    weights = inputs["weights"] * mask if kind == "weighted mean" else mask.float()
    return weights / weights.sum(1, keepdim=True)


def pad(values: Tensor, inputs: dict) -> tuple[Tensor, dict]:
    """Packed rows -> padded ones, because the other implementations know no packed rows; padded rows stay as they are."""
    if "mask" in inputs:
        return values, inputs
    mask = torch.arange(inputs["longest"], device=values.device) < inputs["lengths"][:, None]
    places = mask.nonzero_static(size=len(values)).unbind(1)
    scatter = lambda t: t.new_zeros(*mask.shape, *t.shape[1:]).index_put(places, t)  # noqa: E731
    return scatter(values), inputs | {"mask": mask, "scores": scatter(inputs["scores"]), "weights": scatter(inputs["weights"])}


def eager(kind: str, values: Tensor, inputs: dict) -> Tensor:
    """Multiply and sum, as in most code."""
    x, inputs = pad(values, inputs)
    x = rms_norm(x, inputs["norm_weight"]) if kind.startswith("norm") else x
    if kind == "last":
        return x[torch.arange(len(x), device=x.device), inputs["lengths"] - 1].float()
    return (x.float() * token_weights(kind, x, inputs)[..., None]).sum(1)


def bmm(kind: str, values: Tensor, inputs: dict) -> Tensor:
    """One batched matrix product of the token weights (B, 1, L) and the values."""
    x, inputs = pad(values, inputs)
    x = rms_norm(x, inputs["norm_weight"]) if kind.startswith("norm") else x
    return torch.bmm(token_weights(kind, x, inputs)[:, None].to(x.dtype), x)[:, 0].float()


def sentence_transformers(d: int) -> dict[str, Implementation]:
    """Kind -> implementation; empty if sentence-transformers is not installed."""
    try:
        from sentence_transformers.sentence_transformer.modules import Pooling
    except ImportError:
        return {}

    def implementation(module: Pooling) -> Implementation:
        def pool(kind: str, values: Tensor, inputs: dict) -> Tensor:
            values, inputs = pad(values, inputs)
            return module({"token_embeddings": values, "attention_mask": inputs["mask"].long()})["sentence_embedding"]

        return pool

    modes = {"mean": "mean", "last": "lasttoken"}
    return {kind: implementation(Pooling(d, pooling_mode=mode)) for kind, mode in modes.items()}


def implementations_of(kind: str, compiled: Implementation, library: dict[str, Implementation]) -> dict[str, Implementation]:
    """Name -> implementation of this kind of pooling. The last token needs no product, so it has no bmm."""
    implementations = {"ours": ours, "eager": eager} | ({} if kind == "last" else {"bmm": bmm}) | {"compile": compiled}
    return implementations | ({"sentence-transformers": library[kind]} if kind in library else {})


# --------------------------------------------------------------------------------------------------- measurements


def bytes_moved(kind: str, inputs: dict, backward: bool) -> int:
    """The least that has to be read and written, for bfloat16 values."""
    tokens, d = int(inputs["lengths"].sum()), inputs["values"].shape[-1]
    forward = 2 * d * (len(inputs["lengths"]) if kind == "last" else tokens)
    if not backward:
        return forward
    reads_values = kind not in ("mean", "weighted mean", "last")  # the gradient of a mean does not depend on the values
    return forward + 2 * d * inputs["values"].shape[:-1].numel() + (2 * d * tokens if reads_values else 0)


def pool_in_float64(kind: str, inputs: dict) -> Tensor:
    """-> (B, D) float64. One row at a time: the whole batch would not fit into memory in float64."""
    doubles = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    values, doubles = pad(doubles["values"], doubles)
    rows = []
    for b in range(len(values)):
        row = doubles | {k: doubles[k][b : b + 1] for k in ("mask", "scores", "weights", "lengths")}
        x = values[b : b + 1]
        if kind.startswith("norm"):
            x = F.rms_norm(x, x.shape[-1:], doubles["norm_weight"], 1e-6)
        if kind == "last":
            rows.append(x[:, int(row["lengths"]) - 1])
            continue
        if "query" in kind:  # token_weights would round the scores to float32
            row["scores"] = (x @ doubles["query"][0])[..., None] / x.shape[-1] ** 0.5
        weights = token_weights("attention" if "query" in kind else kind, x, row)
        rows.append((x * weights[..., None]).sum(1))
    return torch.cat(rows)


def largest_errors(kind: str, implementations: dict[str, Implementation], inputs: dict) -> dict[str, float]:
    """Largest 1 - cosine of any row against float64, for each implementation. Ends the benchmark if ours is wrong."""
    exact = pool_in_float64(kind, inputs)
    error = lambda pooled: (1 - F.cosine_similarity(pooled.double(), exact)).max().item()  # noqa: E731
    errors = {name: error(pool(kind, inputs["values"], inputs)) for name, pool in implementations.items()}
    if errors["ours"] > 1e-6:
        raise SystemExit(f"{kind}: our result differs from float64 by 1 - cos = {errors['ours']:.1e}")
    return errors


def milliseconds(pool: Implementation, kind: str, inputs: dict, backward: bool) -> float:
    """Median time of one call, forward or forward + backward."""
    from triton.testing import do_bench

    if not backward:
        with torch.no_grad():
            return do_bench(lambda: pool(kind, inputs["values"], inputs), return_mode="median")
    values = inputs["values"].detach().requires_grad_()
    differentiable = inputs | {name: inputs[name].detach().requires_grad_() for name in ("scores", "query")}
    names = ["scores"] if "attention" in kind else ["query"] if "query" in kind else []
    leaves = [values, *(differentiable[name] for name in names)]
    gradient = torch.randn(len(inputs["lengths"]), values.shape[-1], device="cuda")
    return do_bench(lambda: torch.autograd.grad(pool(kind, values, differentiable), leaves, gradient), return_mode="median")


def copy_bandwidth() -> float:
    """GB/s of a copy within the GPU's memory, read plus written."""
    from triton.testing import do_bench

    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / do_bench(lambda: target.copy_(source), return_mode="median") / 1e6


def measure(shape: str, layout: str, kinds: list[str], copy_gbs: float) -> list[dict]:
    """Check and time every kind of pooling on one batch; print a line for each pass and return the rows."""
    inputs = make_inputs(SHAPES[shape], layout)
    torch.compiler.reset()
    compiled, library = torch.compile(eager, dynamic=False), sentence_transformers(SHAPES[shape][2])
    rows = []
    for kind in kinds:
        implementations = implementations_of(kind, compiled, library)
        errors = largest_errors(kind, implementations, inputs)
        for backward in (False, True):
            ms = {name: milliseconds(pool, kind, inputs, backward) for name, pool in implementations.items()}
            gbs = bytes_moved(kind, inputs, backward) / ms["ours"] / 1e6
            what = "fwd+bwd" if backward else "fwd"
            rows.append({"shape": shape, "layout": layout, "kind": kind, "pass": what, "ms": ms, "gbs": gbs, "errors": errors})
            ratios = ", ".join(f"{name} {t / ms['ours']:.2f}" for name, t in ms.items() if name != "ours")
            line = f"{shape:18} {layout:>7} {kind:16} {what:8} {ms['ours']:8.3f} {gbs:6.0f} {gbs / copy_gbs:6.0%}  {ratios}"
            print(f"{line}  ({errors['ours']:.0e})", flush=True)
    return rows


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two shapes only")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="shapes to measure (default: all)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="kinds of pooling to measure (default: all)")
    parser.add_argument("--json", type=Path, help="also write the record to this file (default: none)")
    return parser


def main(args: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        raise InputError("no CUDA device: this benchmark measures GPU kernels")
    shapes = args.shapes or (QUICK_SHAPES if args.quick else list(SHAPES))
    copy_gbs = copy_bandwidth()
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, triton {version('triton')}, Python {platform.python_version()}, {date.today()}")
    print(f"copy of 1 GiB within the GPU's memory: {copy_gbs:,.0f} GB/s")
    columns = f"{'shape':18} {'layout':>7} {'kind':16} {'pass':8} {'ours ms':>8} {'GB/s':>6} {'share':>6}"
    print(f"{columns}  times of the others as multiples of ours  (1 - cos of ours)")
    rows = []
    for shape in shapes:
        for layout in ("packed",) if shape == "slide" else ("0.3", "0.6", "packed"):
            rows += measure(shape, layout, args.kinds, copy_gbs)
            torch.cuda.empty_cache()
    record = {"device": device, "copy_gbs": copy_gbs, "torch": torch.__version__, "triton": version("triton"), "rows": rows}
    if args.json:
        write_text(args.json, json.dumps(record) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    run_script(lambda: main(build_parser().parse_args()))
