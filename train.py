"""Train a LoRA adapter that turns a language model into a text-embedding model, by contrast over positive pairs.

    python train.py                                              # the bundled model on docstring pairs, minutes on a CPU
    python train.py --pairs pairs/mine.jsonl --out runs/mine     # on your own pairs (see make_pairs.py)
    python train.py --model mistral-7b --pairs pairs/mine.jsonl  # one 24 GB GPU
    python train.py --pairs a.jsonl b.jsonl --weights 2 1        # two sources, two thirds of each batch from the first
    python train.py --out runs/mine --resume                     # go on after an interruption
    torchrun --nproc-per-node 8 train.py --batch-size 4096       # several GPUs share every batch

Symmetric InfoNCE over the batch: each anchor must find its positive among all positives (and hard negatives) of the batch,
and each positive its anchor; other copies of either text do not count as negatives. Gradients reach the adapter alone. A
batch that does not fit is run in chunks, twice, with the same gradient (GradCache). Pairs stay on disk, in files of any size.

Leaves behind, in --out (default runs/MODEL):

    adapter_model.safetensors, adapter_config.json    the adapter, as peft writes it; pooling.safetensors with pooling `query`
    embedding.json                                    the embedding contract (encoder.py)
    arguments.json                                    resolved arguments, versions, commit
    metrics.jsonl, loss.png                           one line a step; the curve
    checkpoint.safetensors, checkpoint.previous...    adapter, optimiser and generator states, to go on from; the two last
    summary.json                                      steps, the best of them, pairs, tokens, what it cost; there once it is finished

Some pairs are held out, and every so often a probe counts how many of their anchors find their positives (or, with --probe,
how well labelled texts cluster). The adapter that is left in --out is the best that the probe has seen, or the latest of
those that cannot be told from it.
"""

import argparse
import contextlib
import functools
import gzip
import hashlib
import importlib.util
import itertools
import json
import math
import os
import platform
import secrets
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from encoder import POOLINGS, PRESETS, QUANTIZATIONS, SCOPES, Encoder, Tokens, agree, is_run, out_of_memory, processes, write_atomic
from prompts import PROMPTS, InputError

HERE = Path(__file__).resolve().parent
DEFAULT_PAIRS = HERE / "pairs" / "docstrings.jsonl"
CHECKPOINT, PREVIOUS, NEW = "checkpoint.safetensors", "checkpoint.previous.safetensors", ".checkpoint.safetensors.tmp"
COLDEST = 0.01  # that a temperature is learned down to: as in CLIP, arXiv 2103.00020, 2.5
ARGUMENTS, METRICS, SUMMARY = "arguments.json", "metrics.jsonl", "summary.json"


class Pair(NamedTuple):
    anchor: str
    positive: str
    negatives: tuple[str, ...] = ()


def pair_rows(path: str) -> Iterator[dict]:
    """The pairs of a JSONL file, which may be gzipped: the texts anchor and positive, perhaps negative or a list negatives."""
    opener, number = gzip.open if path.endswith(".gz") else open, 0
    try:
        with opener(path, "rt", encoding="utf-8-sig") as f:
            for number, line in enumerate(f, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                row = row if isinstance(row, dict) else {}
                one, hard = row.get("negative"), row.get("negatives")
                hard = [] if hard is None else hard if isinstance(hard, list) else [None]
                pair = Pair(row.get("anchor"), row.get("positive"), (*([] if one is None else [one]), *hard))
                if not all(isinstance(t, str) for t in (pair.anchor, pair.positive)):
                    raise InputError(f"{path}, line {number}: needs the texts 'anchor' and 'positive', has {line.strip()[:80]}")
                if not all(isinstance(t, str) for t in pair.negatives):
                    raise InputError(f"{path}, line {number}: 'negative' must be a text, 'negatives' a list, has {line.strip()[:80]}")
                "".join((pair.anchor, pair.positive, *pair.negatives)).encode()
                yield pair._asdict()
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {number}: not JSON ({error.msg}): a pair a line, see make_pairs.py") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 ({error.reason}): convert it first, for example with iconv -t utf-8") from None
    except UnicodeEncodeError:
        raise InputError(f"{path}, line {number}: half a surrogate pair, which cannot be written as UTF-8") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path} is damaged: {error}") from None
    except InputError:
        raise
    except (ValueError, RecursionError) as error:  # JSON of thousands of digits or brackets
        raise InputError(f"{path}, line {number}: cannot be read ({str(error)[:80]})") from None


class Pairs:
    """The pairs of some files, on disk: read once into the cache of `datasets` and mapped into memory from there."""

    def __init__(self, paths: list[Path]):
        import datasets

        for path in paths:
            if not path.is_file():
                raise InputError(f"no file {path}: make pairs with make_pairs.py")
        datasets.disable_progress_bars()
        columns = {"anchor": datasets.Value("string"), "positive": datasets.Value("string")}
        columns["negatives"] = datasets.List(datasets.Value("string"))
        hashes, parts = [], []
        for path in paths:
            with open(path, "rb") as f:
                hashes.append(hashlib.file_digest(f, "sha256").hexdigest())
            if len(set(hashes)) < len(hashes):
                raise InputError(f"{path} holds the same pairs as another file of --pairs: give it once")
            found = len(list(itertools.islice(pair_rows(str(path)), 2)))
            if found < 2:
                raise InputError(f"{path} holds {found} pairs: contrast needs two at least")
            kept = {"features": datasets.Features(columns), "fingerprint": f"pairs-1-{hashes[-1]}"}
            try:
                parts.append(datasets.Dataset.from_generator(pair_rows, gen_kwargs={"path": str(path)}, **kept))
            except datasets.exceptions.DatasetGenerationError as error:
                raise error.__cause__ from None
            except ValueError as error:  # Arrow's
                where = Path(datasets.config.HF_DATASETS_CACHE) / "generator"
                raise InputError(f"the cache of {path} is damaged ({str(error)[:80]}): delete {where}") from None
        self.sizes, self.name = [len(part) for part in parts], " + ".join(path.name for path in paths)
        self.sha256 = hashes[0] if len(paths) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
        self._rows = datasets.concatenate_datasets(parts)

    def __len__(self) -> int:
        return sum(self.sizes)

    def copies(self, rows: np.ndarray) -> np.ndarray:
        """The rows of all pairs that are found among these, themselves included, sorted."""
        import pyarrow as pa
        from pyarrow.compute import is_in

        found = self._rows[rows.tolist()]
        table = self._rows.data
        same = [is_in(table.column(name), value_set=pa.array(found[name], pa.string())).to_numpy() for name in ("anchor", "positive")]
        return np.flatnonzero(same[0] & same[1])

    def __getitem__(self, rows: list[int]) -> list[Pair]:
        found = self._rows[rows]
        columns = zip(found["anchor"], found["positive"], found["negatives"], strict=True)
        return [Pair(anchor, positive, tuple(negatives)) for anchor, positive, negatives in columns]


def hold_out(size: int, n: int) -> np.ndarray:
    """The rows of n pairs that are not trained on, a twentieth at most, sorted; none where that makes fewer than 16."""
    n = min(n, size // 20)
    return np.sort(np.random.default_rng(0).choice(size, n if n >= 16 else 0, replace=False))


class Order:
    """Which pairs each step takes: a function of the step's number alone, so that a run can go on from anywhere.

    Every source is gone through in permutations, each of them drawn from (seed, source, number of the permutation). A batch
    is filled from all sources, or from one if `one_source`, drawn in the shares of `weights`; without weights and with mixed
    batches all files are one source.

    sizes     pairs of each file
    held      rows that are left out, counted over all files
    """

    def __init__(
        self, sizes: list[int], held: np.ndarray, batch_size: int, steps: int, seed: int, weights: list[float] | None, one_source: bool
    ):
        ends = np.cumsum([0, *sizes])
        whole = [np.arange(a, b) for a, b in itertools.pairwise(ends if weights or one_source else ends[[0, -1]])]
        self.sources, self.seed = [np.setdiff1d(rows, held, assume_unique=True) for rows in whole], seed
        shares = np.asarray(weights or [len(rows) for rows in self.sources], float)
        draw = np.random.default_rng(seed)
        draws = (1, batch_size) if one_source else (batch_size, 1)
        counts = draws[1] * draw.multinomial(draws[0], shares / shares.sum(), size=steps)
        self.taken = np.concatenate([np.zeros((1, len(self.sources)), np.int64), counts.cumsum(0)])  # of each source, before each step
        self.permutation = functools.lru_cache(2 * len(self.sources))(self._permutation)

    def _permutation(self, source: int, number: int) -> np.ndarray:
        return np.random.default_rng((self.seed, source, number)).permutation(self.sources[source])

    def __call__(self, step: int) -> list[int]:
        found = []
        for source, (first, end) in enumerate(self.taken[step : step + 2].T.tolist()):
            size = len(self.sources[source])
            for number in range(first // size, -(-end // size)):
                found += self.permutation(source, number)[max(first - number * size, 0) : end - number * size].tolist()
        return found


class Numbers(NamedTuple):
    """Which text each vector of a batch is: equal numbers, equal texts."""

    anchors: Tensor  # (B,)
    positives: Tensor  # (B,)
    negatives: Tensor  # (M,) hard negatives of all the pairs


def info_nce(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor,
    numbers: Numbers,
    temperature: Tensor | float,
    *,
    margin: float = 0.0,
    threshold: float | None = None,
    block: int | None = None,
) -> tuple[Tensor, float, float]:
    """Symmetric InfoNCE (van den Oord et al. 2018, arXiv 1807.03748; both directions as in CLIP, arXiv 2103.00020).

    anchors, positives (B, D) and negatives (M, D), all of norm 1. An anchor has to find its positive among all positives and
    all hard negatives, a positive its anchor among all anchors. Candidates that share a text with the pair are left out;
    with `threshold` also those whose cosine to what is to be found is above it. `margin` is taken off the cosine of each
    pair (additive margin: Yang et al. 2019, arXiv 1902.08564). Similarities exist `block` rows at a time (default: 64 MiB of
    them), in the backward pass too, so that memory grows with B and not with its square.

    Returns the loss in nats, the share of anchors whose positive comes first, and the mean number of negatives of an anchor.
    """
    candidates, n = torch.cat([positives, negatives]), len(anchors)
    block = block or max(64, 2**24 // len(candidates))
    x, y, z = numbers

    def side(queries: Tensor, candidates: Tensor, at: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropy of a block of rows, summed; hits; negatives. out (b, C): True where a candidate is left out."""
        own = torch.arange(len(at), device=at.device), at
        if threshold is not None:
            with torch.no_grad():
                out = out | (candidates[at] @ candidates.T > threshold)
        out[own] = False
        similarity = queries @ candidates.T
        hits = (similarity.detach().masked_fill(out, -torch.inf).argmax(1) == at).sum()
        if margin:
            similarity = similarity - margin * F.one_hot(at, len(candidates))
        similarity = (similarity / temperature).masked_fill(out, -torch.inf)
        return F.cross_entropy(similarity, at, reduction="sum"), hits, (~out).sum() - len(at)

    def rows(at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, p = x[at, None], y[at, None]
        same = (a == x) | (p == y) | (a == y) | (p == x)  # (b, B)
        there, hits, found = side(anchors[at], candidates, at, torch.cat([same, (z == a) | (z == p)], 1))
        back, _, _ = side(positives[at], anchors, at, same.clone())
        return there + back, hits, found

    blocks = torch.arange(n, device=anchors.device).split(block)
    run = rows if len(blocks) == 1 else functools.partial(checkpoint, rows, use_reentrant=False)
    loss, hits, found = (torch.stack(parts).sum() for parts in zip(*map(run, blocks), strict=True))
    return loss / (2 * n), hits.item() / n, found.item() / n


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear up over the first `warmup` share of the steps, cosine down to zero."""
    up = max(1, round(steps * warmup))
    if step < up:
        return peak * (step + 1) / up
    return peak * 0.5 * (1 + math.cos(math.pi * (step - up) / max(1, steps - up)))


def autocast(encoder: Encoder):
    return torch.autocast(encoder.device.type, torch.bfloat16, enabled=encoder.dtype == torch.bfloat16)


Part = list[tuple[Tokens, list[int]]]  # texts of some pairs: anchors, positives and hard negatives, as tokens and their rows


def embed(encoder: Encoder, tokens: Tokens, rows: list[int]) -> Tensor:
    """Vectors (len(rows), D) with gradients, through the encoder's own way."""
    plan = list(encoder.batches(tokens, rows, 4096 if encoder.device.type == "cpu" else None))  # bench/README.md
    # where the base is dealt out, all processes run equally many batches, forwards and backwards: one too many counts nothing
    missing = agree(len(plan), "max") - len(plan) if encoder.sharded else 0
    with autocast(encoder):
        parts = [encoder.pool(encoder.run(batch), batch) for _, batch in plan]
        for _ in range(missing):
            batch = encoder.collate(tokens, [0])
            parts.append(encoder.pool(encoder.run(batch), batch)[:0])
    if not parts:
        return torch.zeros(0, encoder.contract.dims or encoder.decoder.config.hidden_size, device=encoder.device)
    position = {row: i for i, row in enumerate(itertools.chain(*(chosen for chosen, _ in plan)))}
    return torch.cat(parts)[torch.tensor([position[r] for r in rows], dtype=torch.long, device=encoder.device)]


def random_state(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def set_random_state(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1 and device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def gather(vectors: Tensor, sizes: list[int]) -> Tensor:
    """The vectors of all processes under each other, without a graph; sizes: how many each process has."""
    if len(sizes) == 1:
        return vectors
    mine = F.pad(vectors, (0, 0, 0, max(sizes) - len(vectors))).contiguous()
    found = [torch.empty_like(mine) for _ in sizes]
    torch.distributed.all_gather(found, mine)
    return torch.cat([part[:size] for part, size in zip(found, sizes, strict=True)])


def backward(encoder: Encoder, parts: list[Part], sizes: list[list[int]], loss_of: Callable) -> tuple:
    """Gradients of a loss over the vectors of all parts and all processes, in the memory of one part -> what loss_of returned.

    One part is run once, with its graph. Several are run without a graph first; the loss over all vectors then gives each
    its gradient; and each part is run again, with the same random numbers, to take its vectors' gradients on to the
    adapter (GradCache: Gao et al. 2021, arXiv 2101.06983). Under torchrun the vectors are gathered and every process
    computes the whole loss, but takes on only the gradients of its own vectors: their sum over the processes is the
    gradient itself, without a factor.

    parts     (anchors, positives, hard negatives) of some pairs each: tokens and rows
    sizes     of each of the three, how many vectors each process has
    loss_of   vectors of anchors (B, D), positives (B, D), negatives (M, D) of all processes -> the loss, and anything else
    """
    states, vectors = [], []
    for part in parts:
        states.append(random_state(encoder.device))
        with contextlib.nullcontext() if len(parts) == 1 else torch.no_grad():
            vectors.append([embed(encoder, *texts) for texts in part])
    kinds = [torch.cat(kind) for kind in zip(*vectors, strict=True)]
    leaves = [gather(kind.detach(), size).requires_grad_() for kind, size in zip(kinds, sizes, strict=True)]
    found = loss_of(*leaves)
    found[0].backward()
    rank = processes()[0]
    gradients = [leaf.grad[sum(size[:rank]) :][: size[rank]] for leaf, size in zip(leaves, sizes, strict=True)]
    if len(parts) == 1:
        _take_on(kinds, gradients)
        return found
    after = random_state(encoder.device)
    at = [0, 0, 0]
    for part, state in zip(parts, states, strict=True):
        set_random_state(state, encoder.device)
        again = [embed(encoder, *texts) for texts in part]
        _take_on(again, [g[i : i + len(v)] for g, i, v in zip(gradients, at, again, strict=True)])
        at = [i + len(v) for i, v in zip(at, again, strict=True)]
    set_random_state(after, encoder.device)
    return found


def _take_on(vectors: list[Tensor], gradients: list[Tensor]) -> None:
    pairs = [(v, g) for v, g in zip(vectors, gradients, strict=True) if v.requires_grad]  # no hard negatives: nothing to do
    torch.autograd.backward([v for v, _ in pairs], [g for _, g in pairs])


class Data(NamedTuple):
    """The pairs of a batch as tokens."""

    anchors: Tokens
    positives: Tokens
    negatives: Tokens
    hard: list[list[int]]  # where in `negatives` each pair's own stand
    numbers: list[list[int]]  # of each pair's texts: equal numbers, equal texts


def prepare(encoder: Encoder, pairs: list[Pair]) -> Data:
    ends = itertools.accumulate((len(pair.negatives) for pair in pairs), initial=0)
    known: dict[str, int] = {}
    return Data(
        encoder.tokenise([pair.anchor for pair in pairs], "query"),
        encoder.tokenise([pair.positive for pair in pairs], "document"),
        encoder.tokenise([text for pair in pairs for text in pair.negatives], "document"),
        [list(range(*span)) for span in itertools.pairwise(ends)],
        [[known.setdefault(t, len(known)) for t in (pair.anchor, pair.positive, *pair.negatives)] for pair in pairs],
    )


def coming(encoder: Encoder, pairs: Pairs, order: Order, steps: range) -> Iterator[Data]:
    """The batches of these steps, each read and tokenised in a thread while the one before it is trained on."""

    def batch(step: int) -> Data:
        return prepare(encoder, pairs[order(step)])

    with ThreadPoolExecutor(1) as pool:
        waiting = [pool.submit(batch, step) for step in steps[:1]]
        for step in steps:
            data = waiting.pop().result()
            waiting += [pool.submit(batch, step + 1)] if step + 1 in steps else []
            yield data


def batch_loss(data: Data, device: torch.device, learned: Tensor | None, args: argparse.Namespace) -> Callable:
    """The loss of a batch as a function of its vectors; with --matryoshka the mean over the shortened vectors and the whole.

    learned     logarithm of the temperature, where it is not args.temperature
    """
    columns = ([n[0] for n in data.numbers], [n[1] for n in data.numbers], [x for n in data.numbers for x in n[2:]])
    numbers = Numbers(*(torch.tensor(c, dtype=torch.long, device=device) for c in columns))

    def loss_of(*vectors: Tensor) -> tuple[Tensor, float, float]:
        temperature, found = args.temperature if learned is None else learned.exp(), []
        for dims in (*(args.matryoshka or []), None):
            unit = [F.normalize(v.float()[:, :dims], dim=-1) for v in vectors]
            found.append(info_nce(*unit, numbers, temperature, margin=args.margin, threshold=args.mask_above))
        return torch.stack([loss for loss, _, _ in found]).mean(), *found[-1][1:]

    return loss_of


def recompute(encoder: Encoder, every: int) -> None:
    """Gradient checkpointing: compute every n-th layer, the last one last, again in the backward pass; 0: keep them all."""
    if every:
        encoder.decoder.gradient_checkpointing_enable({"use_reentrant": False})
    for i, block in enumerate(reversed(encoder.blocks), 1):
        block.gradient_checkpointing = every > 0 and i % every == 0


def spare(encoder: Encoder, state: dict, pairs: int) -> None:
    """Memory ran out: take the next slower way. Every second layer again, then every one, then half the pairs at a time."""
    if state["recompute"] != 1:
        state["recompute"] = 1 if state["recompute"] else 2
        recompute(encoder, state["recompute"])
        told = f"--gradient-checkpointing {state['recompute']}"
    elif state["chunk"] == 1:
        raise InputError("a single pair does not fit into memory: lower --max-tokens")
    else:
        state["chunk"] = min(state["chunk"], pairs) // 2
        told = f"--chunk-size {state['chunk']}"
    print(f"out of memory: going on with {told}", file=sys.stderr)


def step_gradients(encoder: Encoder, data: Data, state: dict, loss_of: Callable, optimizer: torch.optim.Optimizer) -> tuple:
    """One batch's gradients, this process taking its share of it, state["chunk"] pairs at a time -> what loss_of returned.

    When memory runs out, `spare` finds another way and the batch is begun again with the same random numbers.
    """
    rank, world, _ = processes()
    n = len(data.hard)
    shares = [range(n * r // world, n * (r + 1) // world) for r in range(world)]
    sizes = [[len(s) for s in shares], [len(s) for s in shares], [sum(len(data.hard[i]) for i in s) for s in shares]]
    drawn = random_state(encoder.device)
    while True:
        parts = []
        for at in range(0, len(shares[rank]), state["chunk"]):
            rows = list(shares[rank][at : at + state["chunk"]])
            parts.append([(data.anchors, rows), (data.positives, rows), (data.negatives, [j for i in rows for j in data.hard[i]])])
        try:
            return backward(encoder, parts, sizes, loss_of)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        if world > 1:  # the others are waiting in the middle of the step
            told = "out of memory: add --chunk-size, or --gradient-checkpointing 2 or 1"
            if rank:  # its other words are not shown
                print(f"train.py, process {rank}: {told}", file=sys.__stderr__)
            raise InputError(told)
        optimizer.zero_grad(set_to_none=True)
        if encoder.device.type == "cuda":
            torch.cuda.empty_cache()
        set_random_state(drawn, encoder.device)
        spare(encoder, state, n)


def sum_gradients(parameters: list[Tensor]) -> None:
    """Add up the gradients of all processes, in one message."""
    if processes()[1] == 1:
        return
    whole = torch.cat([p.grad.flatten() for p in parameters])
    torch.distributed.all_reduce(whole)
    for parameter, part in zip(parameters, whole.split([p.numel() for p in parameters]), strict=True):
        parameter.grad.copy_(part.view_as(parameter))


def gather_states(device: torch.device) -> list[list[Tensor]]:
    """The states of the random generators of all processes."""
    _, world, group = processes()
    found = [random_state(device)] * world
    if world > 1:
        torch.distributed.all_gather_object(found, random_state(device), group=group)
    return found


class LoRALinear(torch.autograd.Function):
    """x W' + bias + scale (x A') B' in three matrix products forwards and five backwards, with nothing between them.

    peft's layer takes the same products and passes over the whole output twice more in each direction, to scale and to add
    (bench/README.md has what that costs). x (..., in), weight (out, in), a (rank, in), b (out, rank);
    computed in the dtype of `weight`, which gets no gradient.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1]).to(weight.dtype)
        a, b = a.to(weight.dtype), (scale * b).to(weight.dtype)
        inner = flat @ a.T
        out = F.linear(flat, weight, bias).addmm_(inner, b.T)
        ctx.save_for_backward(flat, weight, a, b, inner)
        ctx.scale, ctx.shape, ctx.dtype = scale, x.shape, x.dtype
        return out.view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple:
        flat, weight, a, b, inner = ctx.saved_tensors
        gradient = gradient.reshape(-1, len(weight)).to(weight.dtype)
        back = gradient @ b
        dx = (gradient @ weight).addmm_(back, a).view(ctx.shape).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        return dx, None, None, back.T @ flat, ctx.scale * (gradient.T @ inner), None


def fuse_adapter(encoder: Encoder) -> None:
    """Let every plain LoRA layer of peft's compute through `LoRALinear`; others (DoRA, dropout, quantised) stay as they are."""
    from peft.tuners.lora import Linear

    def forward(layer, x: Tensor, *_, **__) -> Tensor:
        base = layer.base_layer
        if layer.disable_adapters or layer.merged:
            return base(x)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        return LoRALinear.apply(x, base.weight, base.bias, a, b, layer.scaling["default"])

    for layer in encoder.decoder.modules():
        plain = type(layer) is Linear and type(layer.base_layer) is nn.Linear and not layer.use_dora["default"]
        if plain and isinstance(layer.lora_dropout["default"], nn.Identity):
            layer.forward = functools.partial(forward, layer)


def make_encoder(args: argparse.Namespace, pairs: Pairs) -> Encoder:
    """The base with a fresh adapter, in the state in which it is trained."""
    encoder = Encoder.load(
        args.model,
        dtype=args.dtype,
        device=args.device,
        trust_remote_code=args.trust_remote_code,
        shard=args.fsdp,
        **{k: getattr(args, k) for k in ("prompt", "pooling", "scope", "keep_bos", "max_tokens", "attention", "quantize")},
        data={"name": pairs.name, "sha256": pairs.sha256},
    )
    encoder.add_adapter(args.lora_rank, args.lora_alpha, args.lora_dropout, use_rslora=args.rslora, use_dora=args.dora)
    encoder.share_head = args.lora_dropout == 0  # else every text draws its own mask for the prompt
    if encoder.dtype == torch.bfloat16:  # peft casts each adapter's input up to its weights' float32, autocast casts it down again
        for module in encoder.decoder.modules():
            if hasattr(module, "cast_input_dtype_enabled"):
                module.cast_input_dtype_enabled = False
    fuse_adapter(encoder)
    if args.fsdp:
        encoder.shard()
    recompute(encoder, args.gradient_checkpointing)
    return encoder


@contextlib.contextmanager
def attention_kernel(encoder: Encoder) -> Iterator[None]:
    """On a CPU the fused kernel's backward is the slowest part of a step with short texts; plain matrix products are not.

    They stay in bfloat16 where the model is: PyTorch would otherwise compute them in float32. Forward and backward belong
    inside: gradient checkpointing computes a layer again, and must do it the same way.
    """
    if encoder.device.type != "cpu":
        yield
        return
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()  # not of CUDA alone, whatever its name
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)


# ---------------------------------------------------------------------------------------------------- checkpoints


def content_hash(tensors: dict[str, Tensor], state: dict) -> str:
    digest = hashlib.sha256(json.dumps(state, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def save_checkpoint(
    folder: Path,
    encoder: Encoder,
    trained: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    state: dict,
    best: dict[str, Tensor],
    generators: list[list[Tensor]],
) -> None:
    """Everything needed to go on, in one file, the one before it being kept; then the adapter as evaluation reads it.

    state         step, what the probe has seen, what it has cost
    best          the weights with which the probe saw the best
    generators    the states of every process's random generators
    """
    if not all(p.isfinite().all() for p in trained.values()):
        raise InputError(f"step {state['step']}: the adapter's weights are not finite any more, the last checkpoint stays: lower --lr")
    tensors = {f"rng/{process}/{i}": found for process, states in enumerate(generators) for i, found in enumerate(states)}
    for name, parameter in trained.items():
        moments = optimizer.state[parameter]
        tensors |= {f"weight/{name}": parameter.detach().cpu()} | {f"{k}/{name}": v.cpu() for k, v in moments.items()}
    tensors |= {f"best/{name}": weight for name, weight in best.items()}
    tensors = {k: v.contiguous() for k, v in tensors.items()}
    metadata = {"state": json.dumps(state), "sha256": content_hash(tensors, state)}
    try:
        save_file(tensors, folder / NEW, metadata=metadata)
        if (folder / CHECKPOINT).is_file():
            os.replace(folder / CHECKPOINT, folder / PREVIOUS)
        os.replace(folder / NEW, folder / CHECKPOINT)
        encoder.save(folder)  # cut off before it, `load_checkpoint` does it
    except SafetensorError as error:  # a full disk
        (folder / NEW).unlink(missing_ok=True)
        raise InputError(f"{folder} cannot be written ({error}): its last checkpoint stays, go on with --resume") from None


def read_checkpoint(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """State and tensors of the newest checkpoint that is whole."""
    damaged = []
    for path in (folder / CHECKPOINT, folder / PREVIOUS):
        if not path.is_file():
            continue
        try:
            with safe_open(path, framework="pt") as f:
                metadata, tensors = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118, not a dict
            state = json.loads(metadata["state"])
            if content_hash(tensors, state) == metadata["sha256"]:
                if damaged:
                    print(f"warning: {damaged[0]} is damaged: going on from the one before, step {state['step']}", file=sys.stderr)
                    if not processes()[0]:  # or it would take the good one's place
                        damaged[0].unlink()
                return state, tensors
        except (SafetensorError, ValueError, KeyError, TypeError):
            pass
        damaged.append(path)
    raise InputError(f"{damaged[0]} is damaged, and none before it is whole: start afresh in another --out")


def load_checkpoint(
    folder: Path, encoder: Encoder, trained: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> tuple[dict, dict[str, Tensor]]:
    """Put everything back in place -> state and best weights, as `save_checkpoint` was given them."""
    state, tensors = read_checkpoint(folder)
    for name, parameter in trained.items():
        parameter.data.copy_(tensors[f"weight/{name}"])
        if f"step/{name}" in tensors:
            moments = {k: tensors[f"{k}/{name}"].to(encoder.device) for k in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": tensors[f"step/{name}"], **moments}
    if not processes()[0]:
        encoder.save(folder)  # the files of this very step, should the last save have been cut off between the two
    own = [tensors[name] for i in range(2) if (name := f"rng/{processes()[0]}/{i}") in tensors]
    if own:  # else the run began with fewer processes
        set_random_state(own, encoder.device)
    return state, {k.removeprefix("best/"): v for k, v in tensors.items() if k.startswith("best/")}


# ---------------------------------------------------------------------------------------------------------- the probe


class Probe:
    """What is looked at every so often, on data that is not trained on: is the adapter still getting better?"""

    def __init__(self, pairs: list[Pair], labelled: Path | None):
        self.pairs, self.texts, self.labels = pairs, [], []
        if labelled is not None:
            self.texts, self.labels = read_labelled(labelled)
        self.name = "V-measure" if labelled else "held-out accuracy"

    def __bool__(self) -> bool:
        return bool(self.pairs or self.texts)

    def noise(self, score: float) -> float:
        """Standard error of an accuracy. A later adapter no more than this below the best one seen is kept in its place:
        the learning rate falls, so of two that cannot be told apart the later one is the better guess (Breiman et al. 1984,
        Classification and Regression Trees, 3.4.3, choose by the same rule). V-measure has none to be had: the best is kept.
        """
        return math.sqrt(score * (1 - score) / len(self.pairs)) if self.pairs else 0.0

    def __call__(self, encoder: Encoder) -> float:
        """V-measure of the labelled texts, or the share of held-out anchors whose own positive is the nearest."""
        with autocast(encoder):
            score = self._score(encoder)
        encoder.decoder.train()
        return float(score)

    def _score(self, encoder: Encoder) -> float:
        def encode(texts: list[str], role: str = "document") -> np.ndarray:
            vectors = encoder.encode(texts, role)
            if not np.isfinite(vectors).all():
                raise InputError("the probe's vectors are not finite any more, the last checkpoint stays: lower --lr")
            return vectors

        if self.texts:
            from sklearn.cluster import MiniBatchKMeans
            from sklearn.metrics import v_measure_score

            clusters = MiniBatchKMeans(len(set(self.labels)), batch_size=500, n_init="auto", random_state=0)  # as mteb's
            return v_measure_score(self.labels, clusters.fit_predict(encode(self.texts)))
        positives = [pair.positive for pair in self.pairs]
        similarity = encode([pair.anchor for pair in self.pairs], "query") @ encode(positives).T
        return sum(positives[j] == p for j, p in zip(similarity.argmax(1), positives, strict=True)) / len(positives)


def read_labelled(path: Path) -> tuple[list[str], list[str]]:
    """Texts and labels of a JSONL file with the columns text and label, the first 2,048 of a fixed shuffle."""
    rows, number = [], 0
    try:
        with open(path, encoding="utf-8-sig") as f:
            for line in f:
                number += 1
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row["text"], str) or row["label"] is None:
                    raise TypeError(f"text is {str(row['text'])[:40]!r}, label {row['label']!r}")
                rows.append((row["text"], str(row["label"])))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}, line {number}: needs 'text' and 'label' ({type(error).__name__}: {error})") from None
    if len({label for _, label in rows}) < 2:
        raise InputError(f"{path}: V-measure needs two labels at least")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()[:2048]
    return [rows[i][0] for i in order], [rows[i][1] for i in order]


# --------------------------------------------------------------------------------------------------------- what it costs


def joules(device: torch.device) -> float | None:
    """What the device has used since a moment of its own (NVML, through the package nvidia-ml-py), None where it does not tell."""
    if device.type != "cuda" or importlib.util.find_spec("pynvml") is None:
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
    except pynvml.NVMLError:  # older devices do not count
        return None


def peak_memory(device: torch.device) -> float | None:
    """GiB: what PyTorch held of a GPU at most, or what the process was resident with; None where the system does not tell."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, 2)


def tracker(kind: str | None, args: argparse.Namespace, state: dict) -> Callable[[dict], None]:
    """Where every step's numbers go besides metrics.jsonl: nowhere, into TensorBoard's files in --out, or to Weights & Biases."""
    if kind == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(args.out / "tensorboard"), purge_step=state["step"] + 1)

        def track(row):
            for name in row.keys() - {"step"}:
                if row[name] is not None:
                    writer.add_scalar(name, row[name], row["step"])
            writer.flush()

        return track
    if kind == "wandb":
        import wandb

        run = wandb.init(name=args.out.name, dir=str(args.out), id=state["id"], resume="allow", config=comparable(args))
        return lambda row: run.log(row, step=row["step"])
    return lambda row: None


# ------------------------------------------------------------------------------------------------------------ the run


def check_arguments(found: dict, record: dict, path: Path) -> None:
    """A run goes on under the arguments, on the data and the base that it began with, or not at all."""
    now, before = ({k: v for k, v in (r | r["arguments"]).items() if k != "arguments"} for r in (record, found))
    free = {"resume", "checkpoint_every", "out", "device", "pairs", "probe", "track", "versions", "commit", "command"}
    differing = [f"{k} was {before.get(k)!r}, is {v!r}" for k, v in now.items() if k not in free and before.get(k, v) != v]
    if differing:
        raise InputError(f"{path}: the run began otherwise: {'; '.join(differing)}. Repeat its arguments, or start another --out")


def comparable(args: argparse.Namespace) -> dict:
    def plain(value):
        return [plain(x) for x in value] if isinstance(value, list) else str(value.resolve()) if isinstance(value, Path) else value

    return {k: plain(v) for k, v in vars(args).items()}


def commit() -> str | None:
    done = subprocess.run(["git", "-C", str(HERE), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def draw_curve(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    steps = [r["step"] for r in rows]
    axis.plot(steps, [math.nan if r["loss"] is None else r["loss"] for r in rows], color="tab:blue", linewidth=1)
    axis.set(xlabel="step", ylabel="InfoNCE loss, nats")
    axis.set_title(f"{path.parent.name}: training loss and in-batch accuracy", parse_math=False)
    right = axis.twinx()
    right.plot(steps, [r["accuracy"] for r in rows], color="tab:orange", linewidth=1)
    probed = [(r["step"], r["probe"]) for r in rows if "probe" in r]
    if probed:
        right.plot(*zip(*probed, strict=True), color="tab:green", marker="o", linewidth=1, label="probe")
        right.legend(loc="lower right")
    right.set(ylabel="anchors whose positive comes first; probe", ylim=(0, 1))
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
    plt.close(figure)


# ----------------------------------------------------------------------------------------------------------- main


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    # what is trained, on what
    add("--model", default="tiny", help=f"{', '.join(PRESETS)}, a folder or a hub id (default tiny)")
    add("--pairs", type=Path, nargs="+", help="JSONL of make_pairs.py, may be gzipped (default pairs/docstrings.jsonl, made if missing)")
    add("--weights", type=float, nargs="+", help="share of each file of --pairs (default: all pairs alike)")
    add("--same-source-batches", action="store_true", help="every batch from one file of --pairs: negatives that are harder to tell")
    add("--out", type=Path, help="folder of the run (default runs/MODEL)")
    # the embedding contract
    add("--prompt", default="cluster", help=f"{', '.join(PROMPTS)}, or a string with {{text}} (default cluster)")
    add("--pooling", choices=POOLINGS, help="default: last for a prompt that ends behind the text, else mean")
    add("--scope", choices=SCOPES, help="tokens that are pooled (default: all for last, else text)")
    add("--keep-bos", action="store_true", default=None, help="let BOS take part in pooling with --scope all")
    add("--max-tokens", type=int, help="a text is cut to this many tokens (default 512, or what the model holds)")
    add("--attention", choices=("causal", "bidirectional"), help="default causal")
    add("--quantize", choices=QUANTIZATIONS, help="hold the base's weights in 4 or 8 bits (needs bitsandbytes)")
    # optimisation
    add("--batch-size", type=int, help="pairs a step (default: the preset's, 120 for other models)")
    add("--steps", type=int, help="length of training (default: --epochs)")
    add("--epochs", type=float, default=1, help="passes over the pairs, where --steps is not given (default 1)")
    add("--lr", type=float, help="peak learning rate (default: the preset's, 1e-4 for other models)")
    add("--warmup", type=float, default=0.1, help="share of the steps with a rising learning rate (default 0.1)")
    add("--chunk-size", type=int, help="pairs in memory at a time (default: the whole batch, halved when memory runs out)")
    add("--temperature", type=float, default=0.05, help="of InfoNCE (default 0.05)")
    add("--learn-temperature", action="store_true", help="let it be learned, from there")
    add("--margin", type=float, default=0.0, help="taken off the cosine of each pair (default 0)")
    add("--mask-above", type=float, help="a negative whose cosine to the positive is above this is left out (default: none is)")
    add("--matryoshka", type=int, nargs="+", metavar="DIMS", help="the first DIMS numbers of a vector must do alone, too")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient (default 1.0)")
    add("--weight-decay", type=float, default=0.0, help="of AdamW (default 0)")
    add("--lora-rank", type=int, help="default: the preset's, 64 for other models")
    add("--lora-alpha", type=int, help="default: the rank")
    add("--rslora", action="store_true", help="scale by alpha / sqrt(rank) (Kalajdzievski 2023, arXiv 2312.03732)")
    add("--dora", action="store_true", help="magnitude and direction apart (Liu et al. 2024, arXiv 2402.09353)")
    add("--lora-dropout", type=float, default=0.0, help="default 0")
    add(
        "--gradient-checkpointing",
        type=int,
        nargs="?",
        const=1,
        metavar="N",
        help="compute every N-th layer again, 1: all, 0: none (default: the preset's; more when memory runs out)",
    )
    add("--fsdp", action="store_true", help="under torchrun: each process holds a part of the base (FSDP2)")
    add("--seed", type=int, default=0, help="of the adapter's start, the order of pairs and dropout (default 0)")
    # the machine
    add("--dtype", default="auto", help="auto, float32, bfloat16: of the base and of autocast (default auto: bfloat16 where it is fast)")
    add("--device", help="default cuda where there is one, else cpu")
    add("--hold-out", type=int, default=256, help="pairs that are not trained on but probed, a twentieth at most (default 256; 0: none)")
    add("--probe", type=Path, help="JSONL with text and label: probe its V-measure instead, with labels that training never sees")
    add("--probe-every", type=int, default=50, help="steps between two probes (default 50)")
    add("--patience", type=int, help="end after so many probes without a better one (default: go on to the last step)")
    add("--checkpoint-every", type=int, default=50, help="steps (default 50)")
    add("--track", choices=("tensorboard", "wandb"), help="write every step's numbers there as well (default: nowhere)")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out; starts afresh where there is none")
    add("--trust-remote-code", action="store_true", help="run code that comes with a hub model (off)")
    return parser


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; with --resume, what is not given there is taken from the run."""
    parser = build_parser()
    args = parser.parse_args(argv)
    record = default_out(args) / ARGUMENTS
    if args.resume and record.is_file():
        parser.set_defaults(**{k: v for k, v in read_record(record)["arguments"].items() if k not in ("resume", "out", "device")})
        args = parser.parse_args(argv)
    return args


def default_out(args: argparse.Namespace) -> Path:
    return args.out or HERE / "runs" / Path(args.model).name


def read_record(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found | {"arguments": dict(found["arguments"])}
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path} is damaged: the run cannot go on, start another --out") from None


def resolve(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in what the preset decides, and refuse what cannot work, before anything is loaded."""
    preset = PRESETS.get(args.model)
    defaults = {"batch_size": 120, "lr": 1e-4, "lora_rank": 64, "gradient_checkpointing": 0}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, getattr(preset, name) if preset else value)
    args.lora_alpha = args.lora_rank if args.lora_alpha is None else args.lora_alpha
    args.out = default_out(args)
    ranges = dict.fromkeys(("lr", "temperature", "epochs", "clip", "checkpoint_every", "lora_rank", "lora_alpha"), (0, math.inf))
    ranges |= {
        "weight_decay": (-1e-9, math.inf),
        "margin": (-1e-9, 1),
        "warmup": (-1e-9, 1),
        "lora_dropout": (-1e-9, 1),
        "seed": (-1, 2**32),
    }
    for name, (low, high) in ranges.items():
        if not low < getattr(args, name) < high:
            above = f"above {max(low, 0):g}" if low >= 0 else "0 or more"
            raise InputError(
                f"--{name.replace('_', '-')} must be {above}{f' and below {high:g}' if high < math.inf else ''}: {getattr(args, name)}"
            )
    if args.steps is not None and args.steps < 1:
        raise InputError(f"--steps must be 1 or more, not {args.steps}")
    if args.batch_size < 2:
        raise InputError("--batch-size must be 2 or more: a pair's negatives are the others of its batch")
    for name, least in (("hold_out", 0), ("probe_every", 1), ("patience", 1), ("gradient_checkpointing", 0)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise InputError(f"--{name.replace('_', '-')} must be {least} or more, not {getattr(args, name)}")
    if args.probe is not None and not args.probe.is_file():
        raise InputError(f"no file {args.probe}: --probe takes JSONL with text and label")
    if args.chunk_size is not None and args.chunk_size < 1:
        raise InputError(f"--chunk-size must be 1 or more, not {args.chunk_size}")
    if args.mask_above is not None and not -1 < args.mask_above < 1:
        raise InputError(f"--mask-above is a cosine between -1 and 1, not {args.mask_above}")
    if any(d < 1 for d in args.matryoshka or []):
        raise InputError(f"--matryoshka takes numbers of dimensions above 0, not {args.matryoshka}")
    if args.learn_temperature and args.temperature < COLDEST:
        raise InputError(f"--learn-temperature starts from {COLDEST} or above, --temperature is {args.temperature}")
    if args.steps and args.steps > 10**7:
        raise InputError(f"--steps {args.steps} is more than 10 million")
    if args.weights and (len(args.weights) != len(args.pairs or [0]) or not all(0 < w < math.inf for w in args.weights)):
        raise InputError(f"--weights takes a number above 0 for each of the {len(args.pairs or [0])} files of --pairs, not {args.weights}")
    if args.same_source_batches and len(args.pairs or []) < 2:
        raise InputError("--same-source-batches needs several files of --pairs, one for each source")
    if args.fsdp and (processes()[1] == 1 or args.quantize):
        raise InputError("--fsdp deals an unquantised base out to several processes: start them with torchrun, without --quantize")
    if args.track and importlib.util.find_spec(args.track) is None:
        raise InputError(f"--track {args.track} needs the package {args.track}: pip install {args.track}")
    if args.batch_size % processes()[1]:
        raise InputError(f"--batch-size {args.batch_size} must be a multiple of the {processes()[1]} processes")
    if args.dtype == "float16":
        raise InputError("--dtype float16 cannot train (its gradients underflow): take bfloat16 or float32")
    if is_run(args.model):
        raise InputError(f"{args.model} is a run: training starts from a base, give the one it was trained on")
    first = not processes()[0]
    if first:
        check_out(args.out, args.resume)
    args.pairs = [Path(path) for path in args.pairs or [DEFAULT_PAIRS]]
    if args.pairs == [DEFAULT_PAIRS] and not DEFAULT_PAIRS.exists() and first:
        print(f"{DEFAULT_PAIRS} is not there yet: making it from the docstrings of the installed packages")
        subprocess.run([sys.executable, str(HERE / "make_pairs.py"), "docstrings", "--out", str(DEFAULT_PAIRS)], check=True)
    if processes()[1] > 1:
        torch.distributed.barrier()
    return args


def check_out(out: Path, resume: bool) -> None:
    """A run is begun in a folder of its own, or gone on with where there is a checkpoint; nothing is overwritten."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: choose another --out")
    for left in out.glob(".*.tmp") if resume else ():  # by a kill in the middle of writing
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    found = {p.name for p in out.iterdir() if not p.name.startswith(".")} if out.is_dir() else set()
    if found and not resume:
        what = "a run" if ARGUMENTS in found else "files"
        raise InputError(f"{out} already holds {what}: choose another --out" + (", or go on with --resume" if what == "a run" else ""))
    early = {ARGUMENTS, METRICS, "tensorboard", "wandb"}  # may stand there before the first checkpoint
    if found - early and not found & {CHECKPOINT, PREVIOUS}:
        raise InputError(f"{out} holds {', '.join(sorted(found)[:3])} but no {CHECKPOINT}: it cannot go on, choose another --out")


def kept_metrics(path: Path, done: int) -> list[dict]:
    """The lines up to the checkpoint; one cut short by a kill is no line."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return [r for r in rows if r["step"] <= done]


def main(args: argparse.Namespace) -> None:
    rank, world, _ = processes()
    if rank:  # torchrun: all work, and the first one speaks and writes
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115, for good
    args = resolve(args)
    if rank:  # the first process reads the files, the others find them read
        torch.distributed.barrier()
    pairs = Pairs(args.pairs)
    if world > 1 and not rank:
        torch.distributed.barrier()
    held = hold_out(len(pairs), 0 if args.probe else args.hold_out)
    probe = Probe(pairs[held.tolist()] if len(held) else [], args.probe)
    if args.patience and not probe:
        raise InputError(f"--patience needs a probe, and {len(pairs)} pairs are too few to hold any out: give --probe labelled.jsonl")
    held = pairs.copies(held) if len(held) else held
    n_pairs = len(pairs) - len(held)
    if args.batch_size > n_pairs:
        raise InputError(f"--batch-size {args.batch_size} is more than the {n_pairs} pairs of {pairs.name}")
    steps = args.steps or max(1, round(args.epochs * (n_pairs // args.batch_size)))
    order = Order(pairs.sizes, held, args.batch_size, steps, args.seed, args.weights, args.same_source_batches)
    if args.batch_size > (smallest := min(map(len, order.sources))) and args.same_source_batches:
        raise InputError(f"--batch-size {args.batch_size} is more than the {smallest} pairs of the smallest file of --pairs")
    versions = {p: version(p) for p in ("torch", "transformers", "peft", "numpy")} | {"python": platform.python_version()}
    record = {"arguments": comparable(args), "pairs_sha256": pairs.sha256, "versions": versions, "commit": commit(), "command": sys.argv}
    record |= {"probe_sha256": hashlib.sha256(args.probe.read_bytes()).hexdigest() if args.probe else None}
    resuming = args.resume and any((args.out / name).is_file() for name in (CHECKPOINT, PREVIOUS))
    if resuming:
        check_arguments(read_record(args.out / ARGUMENTS), record, args.out)
        if (args.out / SUMMARY).is_file():
            print(f"{args.out} is finished: nothing to do")
            return

    torch.manual_seed(args.seed)
    encoder = make_encoder(args, pairs)
    record |= {"base": encoder.untuned().fingerprint, "computed_in": str(encoder.dtype)}
    if resuming:
        check_arguments(read_record(args.out / ARGUMENTS), record, args.out)
    trained = encoder.trainable()
    if args.learn_temperature:
        trained["temperature"] = nn.Parameter(torch.tensor(math.log(args.temperature), device=encoder.device))
    groups = [{"params": [p for n, p in trained.items() if n != "temperature"]}]
    groups += [{"params": [trained["temperature"]], "weight_decay": 0.0}] if args.learn_temperature else []
    optimizer = torch.optim.AdamW(groups, lr=args.lr, weight_decay=args.weight_decay)
    width = encoder.decoder.config.hidden_size
    if any(d > width for d in args.matryoshka or []):
        raise InputError(f"--matryoshka {args.matryoshka}: a vector of this model has {width} numbers")

    torch.manual_seed(args.seed + rank)  # dropout differs between processes
    if not rank:
        args.out.mkdir(parents=True, exist_ok=True)
    rows, best = [], {}
    state = {"step": 0, "seconds": 0.0, "joules": 0.0, "skipped": 0, "n_empty": 0, "n_cut": 0}  # goes into every checkpoint
    state |= {"best": None, "kept": None, "best_step": 0, "stale": 0}  # what the probe has seen
    state |= {"chunk": args.chunk_size or args.batch_size, "recompute": args.gradient_checkpointing, "id": secrets.token_hex(4)}
    if resuming:
        found, best = load_checkpoint(args.out, encoder, trained, optimizer)
        state |= found
        rows = kept_metrics(args.out / METRICS, state["step"])
        recompute(encoder, state["recompute"])
    done = state["step"]
    if not rank:
        write_atomic(args.out / ARGUMENTS, lambda path: path.write_text(json.dumps(record, indent=2) + "\n"))
        write_atomic(args.out / METRICS, lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in rows)))
    c = encoder.contract
    n_trained = sum(p.numel() for p in trained.values())
    print(f"model {args.model}, {n_trained:,} trained parameters, {encoder.dtype}, {encoder.device}; untuned fingerprint {record['base']}")
    print(f"prompt {c.prompts['document']['prefix']!r} ... {c.prompts['document']['suffix']!r}, pooling {c.pooling}, scope {c.scope}")
    told = f"{n_pairs:,} pairs from {', '.join(map(str, args.pairs))}, {steps} steps of {args.batch_size}"
    print(told + (f", going on after step {done}" if done else ""))
    for line in encoder.warnings():
        print(f"warning: {line}")

    stop = []
    for number in (signal.SIGINT, signal.SIGTERM):  # the first one ends the step in hand, a second one kills
        signal.signal(number, lambda received, _: (stop.append(received), signal.signal(received, signal.SIG_DFL)))

    encoder.decoder.train()
    began, used, before, bad = time.perf_counter(), joules(encoder.device), dict(state), 0
    halt, last = False, True
    track = tracker(None if rank else args.track, args, state)
    with (
        open(os.devnull if rank else args.out / METRICS, "a", encoding="utf-8") as log,
        tqdm(total=steps, initial=done, unit="step", file=sys.stderr) as bar,
    ):
        over = args.patience is not None and state["stale"] >= args.patience  # it was cut off before its summary
        todo = range(steps if over else done, steps)
        for step, data in zip(todo, coming(encoder, pairs, order, todo), strict=True):
            tick = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, args.lr, args.warmup)
            optimizer.zero_grad(set_to_none=True)
            loss_of = batch_loss(data, encoder.device, trained.get("temperature"), args)
            with attention_kernel(encoder):
                loss, accuracy, negatives = step_gradients(encoder, data, state, loss_of, optimizer)
            sum_gradients([p for n, p in trained.items() if n != "temperature"])  # every process has the whole of that one
            norm = torch.nn.utils.clip_grad_norm_(trained.values(), args.clip)
            row = {"step": step + 1, "loss": loss.item(), "accuracy": accuracy, "lr": optimizer.param_groups[0]["lr"]}
            row |= {"grad_norm": norm.item(), "negatives": negatives, "pairs_per_second": args.batch_size / (time.perf_counter() - tick)}
            row["tokens"] = sum(len(ids) for texts in data[:3] for ids in texts.ids)
            state["n_empty"] += sum(texts.n_empty for texts in data[:3])
            state["n_cut"] += sum(texts.n_cut for texts in data[:3])
            if args.learn_temperature:
                row["temperature"] = trained["temperature"].exp().item()
            if loss.isfinite() and norm.isfinite():
                optimizer.step()
                if args.learn_temperature:
                    trained["temperature"].data.clamp_(min=math.log(COLDEST))
                bad = 0
            else:
                bad, state["skipped"] = bad + 1, state["skipped"] + 1
                told = f"step {step + 1}: the loss is {row['loss']}, the gradient's norm {row['grad_norm']}"
                if bad == 3:
                    raise InputError(f"{told}, for the third time in a row: lower --lr")
                print(f"warning: {told}: left out", file=sys.stderr)
                row |= {"loss": None, "grad_norm": None}
            speed = f"{row['pairs_per_second']:.0f} pairs/s, {negatives:.0f} negatives"
            bar.set_postfix_str(f"loss {loss.item():.3f}, acc {accuracy:.2f}, {speed}")
            bar.update()
            state["step"] = step + 1
            last = step + 1 == steps
            if probe and (last or (step + 1) % args.probe_every == 0):
                score = probe(encoder)
                row["probe"] = agree(0.0 if rank else score, "sum")  # one score for all, to the last bit
                better = state["best"] is None or row["probe"] > state["best"]
                state |= {"best": row["probe"], "stale": 0} if better else {"stale": state["stale"] + 1}
                if row["probe"] >= state["best"] - probe.noise(state["best"]):
                    state |= {"kept": row["probe"], "best_step": step + 1}
                    best = {n: p.detach().cpu().clone() for n, p in trained.items()}
                last = last or (args.patience is not None and state["stale"] >= args.patience)
            rows.append(row)
            log.write(json.dumps(row) + "\n")
            log.flush()
            track(row)
            halt = agree(int(bool(stop)), "max") > 0
            state["seconds"] = before["seconds"] + time.perf_counter() - began
            state["joules"] = None if used is None else (before["joules"] or 0) + joules(encoder.device) - used
            if halt or last or (step + 1) % args.checkpoint_every == 0:
                generators = gather_states(encoder.device)
                if not rank:
                    save_checkpoint(args.out, encoder, trained, optimizer, state, best, generators)
            if halt or last:
                break
    energy = agree(state["joules"] or 0.0, "sum")
    if rank:
        return
    draw_curve(rows, args.out / "loss.png")
    if halt and not last:
        print(f"stopped after step {state['step']} of {steps}: {args.out} holds a usable adapter; go on with --resume", file=sys.stderr)
        sys.exit(128 + (stop or [signal.SIGTERM])[0])
    if best:
        for name, parameter in trained.items():
            parameter.data.copy_(best[name])
        encoder.save(args.out)
    tail = [r for r in rows[-max(1, len(rows) // 10) :] if r["loss"] is not None]
    summary = {
        "steps": state["step"],
        "best_step": state["best_step"] or state["step"],
        "probe": {"what": probe.name, "best": state["best"], "kept": state["kept"]} if probe else None,
        "pairs": state["step"] * args.batch_size,
        "tokens": sum(r.get("tokens", 0) for r in rows),
        "seconds": round(state["seconds"], 1),
        "gpu_hours": round(state["seconds"] * world / 3600, 4) if encoder.device.type == "cuda" else 0,
        "energy_wh": None if used is None else round(energy / 3600, 2),
        "peak_memory_gib": peak_memory(encoder.device),
        "texts_empty": state["n_empty"],
        "texts_cut": state["n_cut"],
        "skipped_steps": state["skipped"],
        "processes": world,
        "chunk_size": state["chunk"],
        "gradient_checkpointing": state["recompute"],
        "loss_last_tenth": sum(r["loss"] for r in tail) / max(1, len(tail)),
        "accuracy_last_tenth": sum(r["accuracy"] for r in tail) / max(1, len(tail)),
        "fingerprint": encoder.fingerprint,
    }
    for n, what in ((state["n_empty"], "were empty"), (state["n_cut"], f"were cut to {c.max_tokens} tokens")):
        if n:
            print(f"warning: {n} texts {what}")
    write_atomic(args.out / SUMMARY, lambda path: path.write_text(json.dumps(summary, indent=2) + "\n"))
    seen = f", kept step {state['best_step']} ({probe.name} {state['kept']:.3f}, the best was {state['best']:.3f})" if probe else ""
    print(f"{args.out}: {state['step']} steps{seen}, in {summary['seconds']:.0f} s, fingerprint {encoder.fingerprint}")
    print(f"python evaluate.py --task clustering --model {os.path.relpath(args.out)}")


if __name__ == "__main__":
    try:
        main(parse())
    except (InputError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
    except subprocess.CalledProcessError as error:  # make_pairs.py has said why
        sys.exit(error.returncode)
    except Exception:
        sys.stderr = sys.__stderr__  # of whichever process
        raise
    except KeyboardInterrupt:  # before the first step; later the loop ends in its own way
        sys.exit(130)
