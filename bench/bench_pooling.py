"""Pooling: our kernels beside PyTorch's ways to do the same, correctness first, then time. Needs a CUDA GPU.

    python bench/bench_pooling.py                   # every shape, forward and forward + backward: a few minutes on an H200
    python bench/bench_pooling.py --quick           # two shapes
    python bench/bench_pooling.py --json out.json   # the rows, and a JSON line at the end in any case

Shapes: batches of hidden states as Qwen3-0.6B (D 1024), Llama-3.2-1B (2048) and Mistral-7B (4096) leave them, padded with
30 % and 60 % of the places valid, and packed; a slide's bag of 100,000 patches (D 1024). All in bfloat16.

Sides: ours; PyTorch's operators as most code has them (eager); one batched matrix product (bmm); torch.compile of eager;
sentence-transformers' own pooling module, for the mean and the last token. Every side must agree with float64 before it
is timed. Times are medians of triton.testing.do_bench, which flushes the L2 cache before each call. GB/s counts the bytes
that have to move (valid values read once; backward: written once, and read once where the gradient needs them), and stands
beside a device-to-device copy of 1 GiB in the same process, counted as read plus written.
"""

import argparse
import json
import platform
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

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
KINDS = ("mean", "weighted mean", "norm + mean", "attention", "norm + attention", "query", "norm + query", "last")


def inputs(shape: tuple[int, int, int], layout: str) -> dict:
    """Values, mask or cu_seqlens, scores, weights, query, norm_weight; layout: packed, or the share of valid places."""
    b, length, d = shape
    g = torch.Generator(device="cuda").manual_seed(0)
    share = 1.0 if layout == "packed" else float(layout)
    low = max(1, int(length * max(0.0, 2 * share - 1)))
    lengths = torch.randint(low, max(low, int(length * min(1.0, 2 * share))) + 1, (b,), generator=g, device="cuda")
    if b == 1:
        lengths[:] = int(length * share)
    made = {"lengths": lengths, "layout": layout}
    if layout == "packed":
        made["cu_seqlens"] = F.pad(lengths.cumsum(0), (1, 0))
        where = (int(lengths.sum()),)
    else:
        made["mask"] = torch.arange(length, device="cuda") < lengths[:, None]
        where = (b, length)
    draw = lambda *size: torch.randn(*size, generator=g, device="cuda")  # noqa: E731
    made |= {"values": draw(*where, d).bfloat16(), "scores": draw(*where, 1), "weights": draw(*where).abs()}
    return made | {"query": draw(1, d), "norm_weight": torch.rand(d, generator=g, device="cuda").bfloat16() + 0.5}


def ours(kind: str, x: Tensor, i: dict) -> Tensor:
    layout = {"cu_seqlens": i["cu_seqlens"]} if "cu_seqlens" in i else {"mask": i["mask"]}
    layout |= {"backend": "triton"} | ({"norm_weight": i["norm_weight"]} if kind.startswith("norm") else {})
    if "mean" in kind:
        return mean_pool(x, weights=i["weights"] if kind == "weighted mean" else None, **layout)
    if "attention" in kind:
        return attention_pool(x, i["scores"], **layout)[0][:, 0]
    if "query" in kind:
        return query_pool(x, i["query"], **layout)[0][:, 0]
    return last_pool(x, **layout)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """As transformers' Llama has it: float32 inside, the result in the type of x."""
    y = x.float()
    return weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def shares(kind: str, x: Tensor, i: dict) -> Tensor:
    """(B, L) float32: what each token counts for."""
    mask = i["mask"]
    if "attention" in kind or "query" in kind:
        s = i["scores"][..., 0] if "attention" in kind else (x @ i["query"][0].to(x.dtype)).float() / x.shape[-1] ** 0.5
        return s.masked_fill(~mask, -torch.inf).softmax(1)
    w = i["weights"] * mask if kind == "weighted mean" else mask.float()
    return w / w.sum(1, keepdim=True)


def eager(kind: str, x: Tensor, i: dict) -> Tensor:
    """Multiply and sum, as in most code; packed rows are padded first, as a library without packed pooling must."""
    x, i = padded(x, i)
    x = rms_norm(x, i["norm_weight"]) if kind.startswith("norm") else x
    if kind == "last":
        return x[torch.arange(len(x), device=x.device), i["lengths"] - 1].float()
    return (x.float() * shares(kind, x, i)[..., None]).sum(1)


def bmm(kind: str, x: Tensor, i: dict) -> Tensor:
    x, i = padded(x, i)
    x = rms_norm(x, i["norm_weight"]) if kind.startswith("norm") else x
    return torch.bmm(shares(kind, x, i)[:, None].to(x.dtype), x)[:, 0].float()


def padded(x: Tensor, i: dict) -> tuple[Tensor, dict]:
    if "mask" in i:
        return x, i
    width = i["width"]
    mask = torch.arange(width, device=x.device) < i["lengths"][:, None]
    at = mask.nonzero_static(size=len(x)).unbind(1)
    spread = lambda t: t.new_zeros(*mask.shape, *t.shape[1:]).index_put(at, t)  # noqa: E731
    return spread(x), i | {"mask": mask, "scores": spread(i["scores"]), "weights": spread(i["weights"])}


def sentence_transformers_pooling(kind: str, x: Tensor, i: dict) -> Tensor:
    x, i = padded(x, i)
    features = {"token_embeddings": x, "attention_mask": i["mask"].long()}
    return i["module"](features)["sentence_embedding"]


def sides(kind: str, i: dict) -> dict:
    found = {"ours": ours, "eager": eager, "bmm": bmm, "compile": i["compiled"]}
    if kind == "last":
        found.pop("bmm")
    if kind in ("mean", "last") and i["modules"]:
        found["sentence-transformers"] = sentence_transformers_pooling
        i["module"] = i["modules"][kind]
    return found


def bytes_moved(kind: str, i: dict, backward: bool) -> int:
    tokens, d = int(i["lengths"].sum()), i["values"].shape[-1]
    one = 2 * d * (len(i["lengths"]) if kind == "last" else tokens)
    if not backward:
        return one
    needs = kind not in ("mean", "weighted mean", "last")  # the gradient of a mean does not depend on the values
    return one + 2 * d * i["values"].shape[:-1].numel() + (2 * d * tokens if needs else 0)


def check(kind: str, sides: dict, i: dict) -> dict[str, float]:
    """Largest 1 - cosine of any row against float64, for each side."""
    exact = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in i.items()}
    truth, fields = [], padded(exact["values"], exact)
    x, e = fields
    for at in range(len(x)):  # row by row: float64 of everything would not fit
        row = {k: v[at : at + 1] if isinstance(v, Tensor) and k in ("mask", "scores", "weights", "lengths") else v for k, v in e.items()}
        n = F.rms_norm(x[at : at + 1], x.shape[-1:], e["norm_weight"], 1e-6) if kind.startswith("norm") else x[at : at + 1]
        if kind == "last":
            truth.append(n[:, int(row["lengths"]) - 1])
            continue
        if "query" in kind:
            row["scores"] = (n @ e["query"][0])[..., None] / x.shape[-1] ** 0.5
        name = "attention" if "query" in kind else kind
        truth.append((n * shares(name, n, row)[..., None]).sum(1))
    truth = torch.cat(truth)
    found = {name: (1 - F.cosine_similarity(f(kind, i["values"], i).double(), truth)).max().item() for name, f in sides.items()}
    if found["ours"] > 1e-6:
        raise SystemExit(f"{kind}: ours is off by 1 - cos = {found['ours']:.1e}")
    return found


def timed(f, kind: str, i: dict, backward: bool) -> float:
    """Milliseconds, L2 flushed before each call."""
    from triton.testing import do_bench

    if not backward:
        with torch.no_grad():
            return do_bench(lambda: f(kind, i["values"], i), return_mode="median")
    x = i["values"].detach().requires_grad_()
    extra = i | {k: i[k].detach().requires_grad_() for k in ("scores", "query")}
    names = ["scores"] if "attention" in kind else ["query"] if "query" in kind else []
    leaves = [x, *(extra[n] for n in names)]
    gradient = torch.randn(len(i["lengths"]), x.shape[-1], device="cuda")
    return do_bench(lambda: torch.autograd.grad(f(kind, x, extra), leaves, gradient.to(torch.float32)), return_mode="median")


def copy_bandwidth() -> float:
    from triton.testing import do_bench

    a = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.numel() / do_bench(lambda: b.copy_(a), return_mode="median") / 1e6  # GB/s


def library_modules(d: int) -> dict:
    try:
        from sentence_transformers.sentence_transformer.modules import Pooling
    except ImportError:
        return {}
    return {"mean": Pooling(d, pooling_mode="mean"), "last": Pooling(d, pooling_mode="lasttoken")}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two shapes only")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="default: all")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="default: all")
    parser.add_argument("--json", type=Path, help="file for the rows")
    return parser


def main(args: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        print("error: no CUDA device: this benchmark measures GPU kernels", file=sys.stderr)
        sys.exit(2)
    names = args.shapes or (["qwen3-0.6b", "slide"] if args.quick else list(SHAPES))
    copy = copy_bandwidth()
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, triton {version('triton')}, Python {platform.python_version()}, {date.today()}")
    print(f"device-to-device copy of 1 GiB: {copy:,.0f} GB/s")
    head = f"{'shape':18} {'layout':>7} {'kind':16} {'pass':8} {'ours ms':>8} {'GB/s':>6} {'share':>6}"
    print(f"{head}  the others' times as multiples of ours  (1 - cos of ours)")
    rows = []
    for name in names:
        for layout in ("0.3", "0.6", "packed") if name != "slide" else ("packed",):
            i = inputs(SHAPES[name], layout)
            i["width"] = int(i["lengths"].max())
            torch.compiler.reset()
            i |= {"compiled": torch.compile(eager, dynamic=False), "modules": library_modules(SHAPES[name][2])}
            for kind in args.kinds:
                compared = sides(kind, i)
                errors = check(kind, compared, i)
                for backward in (False, True):
                    ms = {side: timed(f, kind, i, backward) for side, f in compared.items()}
                    speed = bytes_moved(kind, i, backward) / ms["ours"] / 1e6
                    what = "fwd+bwd" if backward else "fwd"
                    rows.append({"shape": name, "layout": layout, "kind": kind, "pass": what, "ms": ms, "gbs": speed, "errors": errors})
                    ratios = ", ".join(f"{s} {t / ms['ours']:.2f}" for s, t in ms.items() if s != "ours")
                    line = f"{name:18} {layout:>7} {kind:16} {what:8} {ms['ours']:8.3f} {speed:6.0f} {speed / copy:6.0%}  {ratios}"
                    print(f"{line}  ({errors['ours']:.0e})", flush=True)
            del i
            torch.cuda.empty_cache()
    record = {"device": device, "copy_gbs": copy, "torch": torch.__version__, "triton": version("triton"), "rows": rows}
    if args.json:
        args.json.write_text(json.dumps(record) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main(build_parser().parse_args())
