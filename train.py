"""Train a LoRA adapter that turns a language model into a text-embedding model, by contrast over positive pairs.

    python train.py                                              # the bundled model on docstring pairs, minutes on a CPU
    python train.py --pairs pairs/mine.jsonl --out runs/mine     # on your own pairs (see make_pairs.py)
    python train.py --model mistral-7b --pairs pairs/mine.jsonl  # one 24 GB GPU
    python train.py --out runs/mine --resume                     # go on after an interruption

Symmetric InfoNCE over the batch: each anchor must find its positive among all positives of the batch, and each positive
its anchor; other copies of either text do not count as negatives. Gradients reach the adapter alone.

Leaves behind, in --out (default runs/MODEL):

    adapter_model.safetensors, adapter_config.json    the adapter, as peft writes it
    embedding.json                                    the embedding contract (encoder.py)
    arguments.json                                    resolved arguments, versions, commit
    metrics.jsonl, loss.png                           one line a step; the curve
    checkpoint.safetensors                            adapter, optimiser and generator states, to go on from
    summary.json                                      steps, pairs, seconds since start or resume; there once the run is finished
"""

import argparse
import contextlib
import gzip
import hashlib
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
import zlib
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from encoder import POOLINGS, PRESETS, SCOPES, Encoder, Tokens, is_run, write_atomic
from prompts import PROMPTS, InputError

HERE = Path(__file__).resolve().parent
DEFAULT_PAIRS = HERE / "pairs" / "docstrings.jsonl"
CHECKPOINT, ARGUMENTS, METRICS, SUMMARY = "checkpoint.safetensors", "arguments.json", "metrics.jsonl", "summary.json"


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """(anchor, positive) of every line of a JSONL file, which may be gzipped. Raises InputError with the line."""
    if not path.is_file():
        raise InputError(f"no file {path}: make pairs with make_pairs.py")
    opener = gzip.open if path.suffix == ".gz" else open
    pairs = []
    try:
        with opener(path, "rt", encoding="utf-8-sig") as f:
            for number, line in enumerate(f, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                pair = (row.get("anchor"), row.get("positive")) if isinstance(row, dict) else (None, None)
                if not all(isinstance(t, str) for t in pair):
                    raise InputError(f"{path}, line {number}: needs the texts 'anchor' and 'positive', has {str(row)[:80]}")
                pairs.append(pair)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {number}: not JSON ({error.msg}): a pair a line, see make_pairs.py") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 ({error.reason}): convert it first, for example with iconv -t utf-8") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path} is damaged: {error}") from None
    if len(pairs) < 2:
        raise InputError(f"{path} holds {len(pairs)} pairs: contrast needs two at least")
    return pairs


def info_nce(anchors: Tensor, positives: Tensor, same: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Symmetric InfoNCE (van den Oord et al. 2018, arXiv 1807.03748; both directions as in CLIP, arXiv 2103.00020).

    anchors, positives (B, D) of norm 1; same (B, B): True off the diagonal where i and j share a text and j is
    therefore no negative of i. Returns the loss, and the share of anchors whose own positive comes first.
    """
    similarity = (anchors @ positives.T / temperature).masked_fill(same, -torch.inf)  # (B, B)
    target = torch.arange(len(similarity), device=similarity.device)
    loss = (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)) / 2
    return loss, (similarity.argmax(1) == target).float().mean()


def shared_texts(anchor_ids: Tensor, positive_ids: Tensor) -> Tensor:
    """(B, B) bool, False on the diagonal: pairs i and j have a text in common. Ids number the distinct texts."""
    a, p = anchor_ids[:, None], positive_ids[:, None]
    same = (a == a.T) | (p == p.T) | (a == p.T) | (p == a.T)
    return same.fill_diagonal_(False)


def batch_rows(n_pairs: int, batch_size: int, step: int, seed: int) -> list[int]:
    """The pairs of a step: epochs are permutations drawn from (seed, epoch), so that a position is a step number."""
    per_epoch = max(1, n_pairs // batch_size)
    epoch, at = divmod(step, per_epoch)
    order = torch.randperm(n_pairs, generator=torch.Generator().manual_seed(seed * 100_003 + epoch))
    return order[at * batch_size : (at + 1) * batch_size].tolist()


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear up over the first `warmup` share of the steps, cosine down to zero."""
    up = max(1, round(steps * warmup))
    if step < up:
        return peak * (step + 1) / up
    return peak * 0.5 * (1 + math.cos(math.pi * (step - up) / max(1, steps - up)))


def embed(encoder: Encoder, tokens: Tokens, rows: list[int]) -> Tensor:
    """Vectors (len(rows), D) with gradients, through the encoder's own way; batches of like length save padding."""
    parts, order = [], []
    for chosen, batch in encoder.batches(tokens, rows):
        parts.append(encoder.pool(encoder.run(batch), batch))
        order += chosen
    position = {row: i for i, row in enumerate(order)}
    return torch.cat(parts)[torch.tensor([position[r] for r in rows], device=encoder.device)]


def attention_kernel(encoder: Encoder):
    """On a CPU the fused kernel's backward is the slowest part of a step with short texts; plain matrix products are not."""
    return sdpa_kernel(SDPBackend.MATH) if encoder.device.type == "cpu" else contextlib.nullcontext()


# ---------------------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(folder: Path, encoder: Encoder, optimizer: torch.optim.Optimizer, step: int) -> None:
    """The adapter as evaluation reads it, then everything needed to go on, in one file that is complete or absent."""
    encoder.save(folder)
    tensors = {"rng/cpu": torch.get_rng_state()}
    if encoder.device.type == "cuda":
        tensors["rng/cuda"] = torch.cuda.get_rng_state(encoder.device)
    for name, parameter in encoder.trainable().items():
        state = optimizer.state[parameter]
        tensors |= {f"weight/{name}": parameter.detach().cpu()} | {f"{k}/{name}": state[k].cpu() for k in ("step", "exp_avg", "exp_avg_sq")}
    tensors = {k: v.contiguous() for k, v in tensors.items()}
    write_atomic(folder / CHECKPOINT, lambda path: save_file(tensors, path, metadata={"step": str(step)}))


def load_checkpoint(folder: Path, encoder: Encoder, optimizer: torch.optim.Optimizer) -> int:
    """Put everything back in place and return the number of steps done."""
    try:
        with safe_open(folder / CHECKPOINT, framework="pt") as f:
            step, tensors = int(f.metadata()["step"]), {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118, not a dict
    except SafetensorError as error:
        raise InputError(f"{folder / CHECKPOINT} is damaged ({error}): start afresh in another --out") from None
    for name, parameter in encoder.trainable().items():
        parameter.data.copy_(tensors[f"weight/{name}"])
        moments = {k: tensors[f"{k}/{name}"].to(encoder.device) for k in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": tensors[f"step/{name}"], **moments}
    encoder.save(folder)  # the files of this very step, should the last save have been cut off between the two
    torch.set_rng_state(tensors["rng/cpu"])
    if "rng/cuda" in tensors and encoder.device.type == "cuda":
        torch.cuda.set_rng_state(tensors["rng/cuda"], encoder.device)
    return step


def check_arguments(found: dict, args: argparse.Namespace, pairs_hash: str, path: Path) -> None:
    """A run goes on under the arguments it began with, or not at all."""
    now = comparable(args) | {"pairs_sha256": pairs_hash}
    before = found["arguments"] | {"pairs_sha256": found["pairs_sha256"]}
    free = {"resume", "checkpoint_every", "out", "device", "pairs"}
    differing = [f"{k} was {before.get(k)!r}, is {v!r}" for k, v in now.items() if k not in free and before.get(k) != v]
    if differing:
        raise InputError(f"{path}: the run began otherwise: {'; '.join(differing)}. Repeat its arguments, or start another --out")


def comparable(args: argparse.Namespace) -> dict:
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}


def commit() -> str | None:
    done = subprocess.run(["git", "-C", str(HERE), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def draw_curve(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    steps = [r["step"] for r in rows]
    axis.plot(steps, [r["loss"] for r in rows], color="tab:blue", linewidth=1)
    axis.set(xlabel="step", ylabel="InfoNCE loss, nats", title=f"{path.parent.name}: training loss and in-batch accuracy")
    right = axis.twinx()
    right.plot(steps, [r["accuracy"] for r in rows], color="tab:orange", linewidth=1)
    right.set(ylabel="anchors whose positive comes first", ylim=(0, 1))
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
    plt.close(figure)


# ----------------------------------------------------------------------------------------------------------- main


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    # what is trained, on what
    add("--model", default="tiny", help=f"{', '.join(PRESETS)}, a folder or a hub id (default tiny)")
    add("--pairs", type=Path, help="JSONL of make_pairs.py, may be gzipped (default pairs/docstrings.jsonl, made if missing)")
    add("--out", type=Path, help="folder of the run (default runs/MODEL)")
    # the embedding contract
    add("--prompt", default="cluster", help=f"{', '.join(PROMPTS)}, or a string with {{text}} (default cluster)")
    add("--pooling", choices=POOLINGS, help="default: last for a prompt that ends behind the text, else mean")
    add("--scope", choices=SCOPES, help="tokens that are pooled (default: all for last, else text)")
    add("--keep-bos", action="store_true", default=None, help="let BOS take part in pooling with --scope all")
    add("--max-tokens", type=int, help="a text is cut to this many tokens (default 512, or what the model holds)")
    add("--attention", choices=("causal", "bidirectional"), help="default causal")
    # optimisation
    add("--batch-size", type=int, help="pairs a step (default: the preset's, 120 for other models)")
    add("--steps", type=int, help="length of training (default: --epochs)")
    add("--epochs", type=float, default=1, help="passes over the pairs, where --steps is not given (default 1)")
    add("--lr", type=float, help="peak learning rate (default: the preset's, 1e-4 for other models)")
    add("--warmup", type=float, default=0.1, help="share of the steps with a rising learning rate (default 0.1)")
    add("--temperature", type=float, default=0.05, help="of InfoNCE (default 0.05)")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient (default 1.0)")
    add("--weight-decay", type=float, default=0.0, help="of AdamW (default 0)")
    add("--lora-rank", type=int, help="default: the preset's, 64 for other models")
    add("--lora-alpha", type=int, help="default: the rank")
    add("--lora-dropout", type=float, default=0.0, help="default 0")
    add("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=None, help="less memory, slower (default: the preset's)")
    add("--seed", type=int, default=0, help="of the adapter's start, the order of pairs and dropout (default 0)")
    # the machine
    add("--dtype", default="auto", help="auto, float32, bfloat16: of the base and of autocast (default auto: bfloat16 where it is fast)")
    add("--device", help="default cuda where there is one, else cpu")
    add("--checkpoint-every", type=int, default=50, help="steps (default 50)")
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
        return {"arguments": dict(found["arguments"]), "pairs_sha256": found["pairs_sha256"]}
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path} is damaged: the run cannot go on, start another --out") from None


def resolve(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in what the preset decides, and refuse what cannot work, before anything is loaded."""
    preset = PRESETS.get(args.model)
    defaults = {"batch_size": 120, "lr": 1e-4, "lora_rank": 64, "gradient_checkpointing": False}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, getattr(preset, name) if preset else value)
    args.lora_alpha = args.lora_rank if args.lora_alpha is None else args.lora_alpha
    args.out = default_out(args)
    ranges = dict.fromkeys(("lr", "temperature", "epochs", "clip", "checkpoint_every", "lora_rank", "lora_alpha"), (0, math.inf))
    ranges |= {"weight_decay": (-1e-9, math.inf), "warmup": (-1e-9, 1), "lora_dropout": (-1e-9, 1), "seed": (-1, 2**32)}
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
    if args.dtype == "float16":
        raise InputError("--dtype float16 cannot train (its gradients underflow): take bfloat16 or float32")
    if is_run(args.model):
        raise InputError(f"{args.model} is a run: training starts from a base, give the one it was trained on")
    check_out(args.out, args.resume)
    if args.pairs is None:
        args.pairs = DEFAULT_PAIRS
        if not args.pairs.exists():
            print(f"{args.pairs} is not there yet: making it from the docstrings of the installed packages")
            subprocess.run([sys.executable, str(HERE / "make_pairs.py"), "docstrings", "--out", str(args.pairs)], check=True)
    return args


def check_out(out: Path, resume: bool) -> None:
    """A run is begun in a folder of its own, or gone on with where there is a checkpoint; nothing is overwritten."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: choose another --out")
    found = {p.name for p in out.iterdir()} if out.is_dir() else set()
    if found and not resume:
        what = "a run" if ARGUMENTS in found else "files"
        raise InputError(f"{out} already holds {what}: choose another --out" + (", or go on with --resume" if what == "a run" else ""))
    if found - {ARGUMENTS, METRICS} and CHECKPOINT not in found:  # those two may stand there before the first checkpoint
        raise InputError(f"{out} holds {', '.join(sorted(found)[:3])} but no {CHECKPOINT}: it cannot go on, choose another --out")


def kept_metrics(path: Path, done: int) -> list[dict]:
    """The lines up to the checkpoint; one cut short by a kill is no line."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return [r for r in rows if r["step"] <= done]


def main(args: argparse.Namespace) -> None:
    args = resolve(args)
    pairs = read_pairs(args.pairs)
    pairs_hash = hashlib.sha256(args.pairs.read_bytes()).hexdigest()
    if args.batch_size > len(pairs):
        raise InputError(f"--batch-size {args.batch_size} is more than the {len(pairs)} pairs of {args.pairs}")
    steps = args.steps or max(1, round(args.epochs * (len(pairs) // args.batch_size)))
    resuming = args.resume and (args.out / CHECKPOINT).is_file()
    if resuming:
        check_arguments(read_record(args.out / ARGUMENTS), args, pairs_hash, args.out)
        if (args.out / SUMMARY).is_file():
            print(f"{args.out} is finished: nothing to do")
            return

    torch.manual_seed(args.seed)
    encoder = Encoder.load(
        args.model,
        dtype=args.dtype,
        device=args.device,
        trust_remote_code=args.trust_remote_code,
        **{k: getattr(args, k) for k in ("prompt", "pooling", "scope", "keep_bos", "max_tokens", "attention")},
        data={"name": args.pairs.name, "sha256": pairs_hash},
    )
    n_trained = encoder.add_adapter(args.lora_rank, args.lora_alpha, args.lora_dropout)
    encoder.share_head = args.lora_dropout == 0  # else every text draws its own mask for the prompt
    if args.gradient_checkpointing:
        encoder.decoder.gradient_checkpointing_enable({"use_reentrant": False})
    if encoder.dtype == torch.bfloat16:  # peft casts each adapter's input up to its weights' float32, autocast casts it down again
        for module in encoder.decoder.modules():
            if hasattr(module, "cast_input_dtype_enabled"):
                module.cast_input_dtype_enabled = False
    parameters = list(encoder.trainable().values())
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=args.weight_decay)

    anchors = encoder.tokenise([a for a, _ in pairs], "query")
    positives = encoder.tokenise([p for _, p in pairs], "document")
    numbers: dict[str, int] = {}
    text_ids = torch.tensor([[numbers.setdefault(t, len(numbers)) for t in pair] for pair in pairs])  # (N, 2)

    args.out.mkdir(parents=True, exist_ok=True)
    done, rows = 0, []
    if resuming:
        done = load_checkpoint(args.out, encoder, optimizer)
        rows = kept_metrics(args.out / METRICS, done)
    versions = {p: version(p) for p in ("torch", "transformers", "peft", "numpy")} | {"python": platform.python_version()}
    record = {"arguments": comparable(args), "pairs_sha256": pairs_hash, "versions": versions, "commit": commit(), "command": sys.argv}
    write_atomic(args.out / ARGUMENTS, lambda path: path.write_text(json.dumps(record, indent=2) + "\n"))
    c = encoder.contract
    base = encoder.untuned().fingerprint
    print(f"model {args.model}, {n_trained:,} trained parameters, {encoder.dtype}, {encoder.device}; untuned fingerprint {base}")
    print(f"prompt {c.prompts['document']['prefix']!r} ... {c.prompts['document']['suffix']!r}, pooling {c.pooling}, scope {c.scope}")
    print(f"{len(pairs):,} pairs from {args.pairs}, {steps} steps of {args.batch_size}" + (f", going on after step {done}" if done else ""))
    for line in encoder.warnings():
        print(f"warning: {line}")

    stop = []
    for number in (signal.SIGINT, signal.SIGTERM):  # the first one ends the step in hand, a second one kills
        signal.signal(number, lambda received, _: (stop.append(received), signal.signal(received, signal.SIG_DFL)))

    write_atomic(args.out / METRICS, lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in rows)))
    encoder.decoder.train()
    began = time.perf_counter()
    with open(args.out / METRICS, "a", encoding="utf-8") as log, tqdm(total=steps, initial=done, unit="step", file=sys.stderr) as bar:
        for step in range(done, steps):
            tick = time.perf_counter()
            chosen = batch_rows(len(pairs), args.batch_size, step, args.seed)
            same = shared_texts(text_ids[chosen, 0], text_ids[chosen, 1]).to(encoder.device)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, args.lr, args.warmup)
            with torch.autocast(encoder.device.type, torch.bfloat16, enabled=encoder.dtype == torch.bfloat16), attention_kernel(encoder):
                a, p = embed(encoder, anchors, chosen), embed(encoder, positives, chosen)
            loss, accuracy = info_nce(F.normalize(a.float(), dim=-1), F.normalize(p.float(), dim=-1), same, args.temperature)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip)
            if not (loss.isfinite() and norm.isfinite()):
                raise InputError(f"step {step + 1}: the loss is {loss.item()}, the gradient's norm {norm.item()}: lower --lr")
            optimizer.step()

            negatives = (~same).float().sum(1).mean().item() - 1
            row = {"step": step + 1, "loss": loss.item(), "accuracy": accuracy.item(), "lr": optimizer.param_groups[0]["lr"]}
            row |= {"grad_norm": norm.item(), "negatives": negatives, "pairs_per_second": len(chosen) / (time.perf_counter() - tick)}
            rows.append(row)
            log.write(json.dumps(row) + "\n")
            log.flush()
            speed = f"{row['pairs_per_second']:.0f} pairs/s, {negatives:.0f} negatives"
            bar.set_postfix_str(f"loss {row['loss']:.3f}, acc {row['accuracy']:.2f}, {speed}")
            bar.update()
            if stop or step + 1 == steps or (step + 1) % args.checkpoint_every == 0:
                save_checkpoint(args.out, encoder, optimizer, step + 1)
            if stop and step + 1 < steps:
                break
    draw_curve(rows, args.out / "loss.png")
    if stop and step + 1 < steps:
        print(f"stopped after step {step + 1} of {steps}: {args.out} holds a usable adapter; go on with --resume", file=sys.stderr)
        sys.exit(128 + stop[0])
    tail = rows[-max(1, len(rows) // 10) :]
    summary = {
        "steps": steps,
        "pairs": steps * args.batch_size,
        "seconds": round(time.perf_counter() - began, 1),
        "loss_last_tenth": sum(r["loss"] for r in tail) / len(tail),
        "accuracy_last_tenth": sum(r["accuracy"] for r in tail) / len(tail),
        "fingerprint": encoder.fingerprint,
    }
    if encoder.device.type == "cuda":
        summary["peak_memory_gib"] = round(torch.cuda.max_memory_allocated(encoder.device) / 2**30, 2)
    write_atomic(args.out / SUMMARY, lambda path: path.write_text(json.dumps(summary, indent=2) + "\n"))
    print(f"{args.out}: {steps} steps in {summary['seconds']:.0f} s, fingerprint {encoder.fingerprint}")
    print(f"python evaluate.py --task clustering --model {os.path.relpath(args.out)}")


if __name__ == "__main__":
    try:
        main(parse())
    except (InputError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
    except subprocess.CalledProcessError as error:  # make_pairs.py has said why
        sys.exit(error.returncode)
    except KeyboardInterrupt:  # before the first step; later the loop ends in its own way
        sys.exit(130)
