"""Pre-train a small decoder-only language model and its tokenizer from plain text. `models/tiny` was made with this script.

    python models/pretrain.py --out x/ --minutes 2                             # docstrings of the installed packages
    python models/pretrain.py --out x/ --texts FOLDER --minutes 120 --compile  # and a folder of .txt.gz
    python models/pretrain.py --out x/ --resume                                # continue after an interruption
    python models/pretrain.py --out x/ --texts FOLDER --pack-only              # tokenize here, then train elsewhere:
    python models/pretrain.py --out y/ --tokens x/training/tokens.safetensors.gz --steps 5000
    python models/pretrain.py --out z/ --init models/tiny --texts FOLDER --minutes 9 --lr 2e-3     # go on from a model, with its tokenizer
    python models/pretrain.py --score models/tiny x/ --tokens x/training/tokens.safetensors.gz     # bits per byte, side by side

Text files are UTF-8, documents separated by a blank line; `name_00.txt.gz` and `name_01.txt.gz` are one domain, `name`.
Some documents of each domain are held out and not trained on. Texts of the bundled evaluation tasks (`tasks/*.jsonl.gz`) and of
--exclude files are left out, too: docstrings of the modules that they name, and documents that contain one of their sentences.

Leaves behind, in --out:

    config.json, model*.safetensors, tokenizer*       a Llama or Qwen3 for AutoModelForCausalLM, bfloat16, when finished
    training/tokens.safetensors.gz                    the text: packed uint16 ids; tokenizer, held-out text, counts as metadata
    training/arguments.json, metrics.jsonl            resolved arguments and versions; one line for each step
    training/checkpoint.safetensors                   weights, optimizer states and step, to resume from
    training/summary.json                             tokens, time, held-out bits per byte; written when the run is finished

With --steps, a run that was killed and resumed ends with the same weights as one that was not. With --minutes, the learning
rate follows the clock. Needs neither `datasets` nor mteb.
"""

import argparse
import json
import math
import platform
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from files.console import InputError, run_script, say
from files.writing import write_atomic, write_json, write_text
from models.packed_text import TOKENS_FILE, PackedText, hub_tokenizer, load_tokenizer, pack, read_packed

transformers_logging.disable_progress_bar()

# B: sequences, L: tokens of a sequence, T: tokens of a batch, D: hidden size, N: tokens of the whole text


# ------------------------------------------------------------------------------------------------- model and measurement


def build_model(args: argparse.Namespace, vocabulary: int) -> torch.nn.Module:
    """A Llama or Qwen3 in float32: the one in --init, or with random weights drawn from --seed."""
    # compiled for a CPU, plain matrix products are faster than the fused kernel, whose backward is slow there
    attention = "eager" if args.compile and args.device.type == "cpu" else "sdpa"
    if args.init:
        settings = {"dtype": torch.float32, "attn_implementation": attention, "local_files_only": True, "use_safetensors": True}
        return AutoModelForCausalLM.from_pretrained(args.init, **settings).to(args.device)
    torch.manual_seed(args.seed)
    config_class = {"llama": LlamaConfig, "qwen3": Qwen3Config}[args.architecture]
    config = config_class(
        vocab_size=vocabulary,
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads or args.heads,
        head_dim=args.hidden // args.heads,
        intermediate_size=args.mlp,
        max_position_embeddings=args.positions,
        tie_word_embeddings=not args.untie,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(args.device)


def build_optimizers(model: torch.nn.Module, args: argparse.Namespace) -> dict[str, torch.optim.Optimizer]:
    """AdamW, but Muon for the layers' matrices (Jordan 2024; step size matched to AdamW's: Liu et al. 2025, arXiv 2502.16982)."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in n)]
    return {
        "muon": torch.optim.Muon(matrices, lr=args.lr, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw"),
        "adamw": torch.optim.AdamW(others, lr=args.lr, weight_decay=0.0, betas=(0.9, 0.95)),
    }


def schedule(progress: float, decay: float, warmup: float = 0.02) -> float:
    """Learning rate at this share of the run, as a share of the peak: a linear rise, constant, then linearly down to zero."""
    return min(1.0, (progress + 1e-3) / warmup, (1 - progress) / decay)


def windows(ids: Tensor, size: int, batch_size: int, step: int, seed: int) -> Tensor:
    """The batch of a step, (B, size + 1): windows of `size` input tokens and the token after them. An epoch reads each window
    of the text once, from a random offset and in a random order."""
    steps_per_epoch = max(1, ((len(ids) - 1) // size - 1) // batch_size)
    epoch, step_of_epoch = divmod(step, steps_per_epoch)
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    offset = int(torch.randint(size, (1,), generator=generator))
    order = torch.randperm((len(ids) - 1 - offset) // size, generator=generator)
    starts = offset + size * order[step_of_epoch * batch_size : (step_of_epoch + 1) * batch_size]
    return ids[starts[:, None] + torch.arange(size + 1)].long()


def token_losses(lm_head: torch.nn.Module, states: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats (T,) of states (T, D) and next tokens (T,), with logits in float32."""
    return F.cross_entropy(lm_head(states).float(), targets, reduction="none")


def step_gradients(model: torch.nn.Module, losses: Callable[[Tensor, Tensor], Tensor], batch: Tensor, args: argparse.Namespace) -> float:
    """Add the gradients of the mean next-token loss of a batch (B, L + 1), and return that loss.

    The logits of a large vocabulary would take most of the memory, so they are computed for --chunk tokens at a time.
    A GPU is waited for once, at the end.
    """
    batch = batch.to(args.device)
    with autocast(args):
        states = model.model(input_ids=batch[:, :-1], use_cache=False).last_hidden_state.flatten(0, 1)  # (T, D)
        targets, detached = batch[:, 1:].flatten(), states.detach().requires_grad_()
        total = torch.zeros((), device=args.device)
        for chunk, chunk_targets in zip(detached.split(args.chunk), targets.split(args.chunk), strict=True):
            loss = losses(chunk, chunk_targets).sum() / len(targets)
            loss.backward()
            total += loss.detach()
    states.backward(detached.grad)
    return total.item()


def autocast(args: argparse.Namespace) -> torch.autocast:
    return torch.autocast(args.device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")


@torch.inference_mode()
def bits_per_byte(model: torch.nn.Module, tokenizer, held_out: dict[str, list[str]], batch_tokens: int = 8192) -> dict[str, float]:
    """Domain -> bits that the model needs for each byte of its held-out pieces, each of which it reads after BOS alone."""
    model.eval()
    device, bits = model.device, {}
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    for domain, pieces in held_out.items():
        rows = sorted(tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"], key=len)
        nats = 0.0
        while rows:
            n = max(1, batch_tokens // len(rows[-1]))
            chosen, rows = rows[-n:], rows[:-n]
            longest = max(map(len, chosen))
            batch = torch.tensor([[bos, *row] + [-1] * (longest - len(row)) for row in chosen], device=device)
            inputs = batch[:, :-1].clamp(min=0)  # padding is on the right, where causal attention hides it from the text
            states = model.model(input_ids=inputs, use_cache=False).last_hidden_state
            valid = batch[:, 1:] >= 0
            for chunk, targets in zip(states[valid].split(2048), batch[:, 1:][valid].split(2048), strict=True):
                nats += token_losses(model.lm_head, chunk, targets).sum().item()
        bits[domain] = nats / math.log(2) / sum(len(p.encode()) for p in pieces)
    model.train()
    return bits


def score(folder: Path | str, held_out: dict[str, list[str]], args: argparse.Namespace) -> dict[str, float]:
    """Bits per byte of the model in a folder, by domain."""
    if not Path(folder).is_dir():
        raise InputError(f"no folder {folder}")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).to(args.device)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    with autocast(args):
        return bits_per_byte(model, tokenizer, held_out)


def print_scores(scores: dict[str, dict[str, float]]) -> None:
    """A table of bits per byte: a line for each domain and their mean, a column for each model."""
    domains = list(next(iter(scores.values())))
    width = max(map(len, ["held-out bits per byte", *domains]))
    say(f"{'held-out bits per byte':{width}}  " + "  ".join(f"{name:>12}" for name in scores))
    for domain in [*domains, "mean"]:
        values = [np.mean(list(s.values())) if domain == "mean" else s[domain] for s in scores.values()]
        say(f"{domain:{width}}  " + "  ".join(f"{v:{max(12, len(n))}.3f}" for n, v in zip(scores, values, strict=True)))


class TrainingState(NamedTuple):
    step: int = 0
    seconds: float = 0.0  # of training, without evaluation and checkpoints


def save_checkpoint(path: Path, model: torch.nn.Module, optimizers: dict[str, torch.optim.Optimizer], state: TrainingState) -> None:
    """Write weights, optimizer states and training state; a killed process leaves the previous checkpoint."""
    tensors = {f"weight/{n}": p.detach() for n, p in model.named_parameters()}
    for name, optimizer in optimizers.items():
        for i, values in optimizer.state_dict()["state"].items():
            tensors |= {f"{name}/{i}/{k}": v for k, v in values.items()}
    tensors = {k: v.cpu().contiguous() for k, v in tensors.items()}
    write_atomic(path, lambda temporary: save_file(tensors, temporary, metadata={"state": json.dumps(state._asdict())}))


def load_checkpoint(path: Path, model: torch.nn.Module, optimizers: dict[str, torch.optim.Optimizer]) -> TrainingState:
    """Read what `save_checkpoint` wrote into model and optimizers. Raises InputError for a damaged file."""
    try:
        with safe_open(path, framework="pt") as f:
            state, tensors = json.loads(f.metadata()["state"]), {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118, not a dict
    except SafetensorError as error:
        raise InputError(f"{path} is damaged ({error}): start again in another --out") from None
    for name, parameter in model.named_parameters():
        parameter.data.copy_(tensors[f"weight/{name}"])
    for name, optimizer in optimizers.items():
        states: dict[int, dict] = {}
        for key, tensor in tensors.items():
            if key.startswith(f"{name}/"):
                _, i, field = key.split("/")
                states.setdefault(int(i), {})[field] = tensor
        optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    return TrainingState(**state)


# ------------------------------------------------------------------------------------------------------------ training


@dataclass
class Run:
    """A run of training in memory."""

    args: argparse.Namespace
    text: PackedText
    tokenizer: PreTrainedTokenizerFast
    model: torch.nn.Module
    optimizers: dict[str, torch.optim.Optimizer]
    losses: Callable[[Tensor, Tensor], Tensor]  # `token_losses` of the model, perhaps compiled
    state: TrainingState

    def progress(self) -> float:
        """Share of the run that is done; 1 or more when it is finished."""
        return self.state.step / self.args.steps if self.args.steps else self.state.seconds / 60 / self.args.minutes

    def batch(self) -> Tensor:
        """The batch of the next step, (B, L + 1)."""
        size, batch_size = self.args.positions, self.args.batch_tokens // self.args.positions
        return windows(self.text.ids, size, batch_size, self.state.step, self.args.seed)


def train(args: argparse.Namespace) -> None:
    """Pack the text if need be, train, and save the model."""
    folder = args.out / "training"
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "summary.json").is_file():
        say(f"{args.out} is finished: nothing to do")
        return
    tokens = args.tokens or folder / TOKENS_FILE
    if not tokens.is_file():
        if (folder / "checkpoint.safetensors").is_file():  # other packages may be installed now, with other docstrings
            raise InputError(f"no file {tokens}: the run cannot be resumed without the text that it began with")
        pack(args, tokens)
    if args.pack_only:
        say(f"{tokens}: {tokens.stat().st_size / 1e6:.1f} MB")
        return
    run = start_run(args, tokens)
    stop_signals = catch_stop_signals()
    if args.compile:
        compile_run(run)
    began = time.perf_counter()
    run_steps(run, stop_signals)
    if stop_signals and run.progress() < 1:
        say(f"stopped after step {run.state.step}: continue with --resume", error=True)
        sys.exit(128 + stop_signals[0])
    finish(run, time.perf_counter() - began)


def start_run(args: argparse.Namespace, tokens: Path) -> Run:
    """A new run, or with --resume the one in --out; writes its arguments and removes metrics after its last checkpoint."""
    text = read_packed(tokens)
    if len(text.ids) < args.batch_tokens + 2 * args.positions:
        raise InputError(f"{tokens} has {len(text.ids):,} tokens: too few for one step of {args.batch_tokens}; lower --batch-tokens")
    tokenizer = load_tokenizer(args.init) if args.init else hub_tokenizer(text.tokenizer, args.positions)
    if json.loads(tokenizer.backend_tokenizer.to_str())["model"] != json.loads(text.tokenizer)["model"]:
        raise InputError(f"{tokens} was packed with another tokenizer than that of {args.init}: pack the text with --init")
    model = build_model(args, len(tokenizer))
    optimizers = build_optimizers(model, args)
    folder, state = args.out / "training", TrainingState()
    if args.resume and (folder / "checkpoint.safetensors").is_file():
        state = load_checkpoint(folder / "checkpoint.safetensors", model, optimizers)
    arguments = {k: v if isinstance(v, int | float | bool | None) else str(v) for k, v in vars(args).items()}
    arguments["exclude"] = [str(path) for path in args.exclude]
    versions = {p: version(p) for p in ("torch", "transformers", "tokenizers")} | {"python": platform.python_version()}
    write_json(folder / "arguments.json", {"arguments": arguments, "versions": versions})
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.is_file() else []  # the last one may be cut short by a kill
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    write_text(metrics, "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= state.step))
    size = f"{sum(p.numel() for p in model.parameters()):,} parameters"
    say(f"{model.config.model_type}, {size}, {args.dtype}, {args.device}; {len(text.ids):,} tokens; from step {state.step}")
    model.train()
    return Run(args, text, tokenizer, model, optimizers, partial(token_losses, model.lm_head), state)


def catch_stop_signals() -> list[int]:
    """A list that SIGINT and SIGTERM are added to. The first one ends training after the current step, a second one kills."""
    received: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, _: (received.append(n), signal.signal(n, signal.SIG_DFL)))
    return received


def compile_run(run: Run) -> None:
    """Compile the model and the loss, and run one batch, so that no step's time includes compilation."""
    say("compiling")
    run.model.model.compile()  # in place: names and weights stay as they are
    run.losses = torch.compile(run.losses)
    step_gradients(run.model, run.losses, run.batch(), run.args)
    run.model.zero_grad(set_to_none=True)


def run_steps(run: Run, stop_signals: list[int]) -> None:
    """Train until the run is finished or a signal came."""
    args, folder = run.args, run.args.out / "training"
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as log:
        while run.progress() < 1 and not stop_signals:
            began = time.perf_counter()
            loss = step_gradients(run.model, run.losses, run.batch(), args)
            lr = update(run, loss)
            seconds = time.perf_counter() - began
            run.state = TrainingState(run.state.step + 1, run.state.seconds + seconds)
            row = {**run.state._asdict(), "loss": loss, "lr": lr, "tokens_per_second": args.batch_tokens / seconds}
            if args.evaluate_every and run.state.step % args.evaluate_every == 0:
                with autocast(args):
                    row["bits_per_byte"] = bits_per_byte(run.model, run.tokenizer, run.text.held_out)
            log_step(log, row)
            if stop_signals or run.progress() >= 1 or run.state.step % args.checkpoint_every == 0:
                save_checkpoint(folder / "checkpoint.safetensors", run.model, run.optimizers, run.state)


def update(run: Run, loss: float) -> float:
    """One step of the optimizers with clipped gradients; returns its learning rate. Raises InputError for a loss that diverged."""
    lr = run.args.lr * schedule(run.progress(), run.args.decay)
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    if not math.isfinite(loss):
        raise InputError(f"step {run.state.step + 1}: the loss is {loss}: lower --lr")
    for optimizer in run.optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return lr


def log_step(log: IO[str], row: dict) -> None:
    """Append a step to the metrics; print every 20th, and every one with a held-out measurement."""
    log.write(json.dumps(row) + "\n")
    log.flush()
    if row["step"] % 20 == 0 or "bits_per_byte" in row:
        line = f"step {row['step']}, {row['seconds'] / 60:.1f} min: loss {row['loss']:.3f}, {row['tokens_per_second']:,.0f} tokens/s"
        if "bits_per_byte" in row:
            line += f", held out {np.mean(list(row['bits_per_byte'].values())):.3f} bits per byte"
        say(line)


def finish(run: Run, wall_seconds: float) -> None:
    """Save the model in bfloat16 for AutoModelForCausalLM, then the summary with the bits per byte of the saved files."""
    args = run.args
    run.model.to(torch.bfloat16).save_pretrained(args.out, max_shard_size=f"{args.max_shard_mb}MB")
    run.tokenizer.save_pretrained(args.out)
    bits = score(args.out, run.text.held_out, args)
    summary = {
        **run.state._asdict(),
        "tokens": run.state.step * args.batch_tokens,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "bits_per_byte": bits,
        "text": run.text.counts,
        "wall_seconds_since_start_or_resume": round(wall_seconds, 1),
    }
    write_json(args.out / "training" / "summary.json", summary)
    before = {str(args.init): score(args.init, run.text.held_out, args)} if args.init else {}
    print_scores(before | {str(args.out): bits})


# ------------------------------------------------------------------------------------------------------------- main


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, help="folder to write the model into")
    # text
    add("--texts", type=Path, help="folder of .txt.gz or .txt files, used besides the docstrings (default: docstrings only)")
    add("--no-docstrings", action="store_true", help="do not use the docstrings of the installed packages")
    add("--exclude", type=Path, nargs="*", default=[], help="files with a column text that must not be trained on, besides those of tasks/")
    add("--hold-out", type=int, default=60_000, help="characters to hold out of each domain, at most a tenth of it (default 60000)")
    add("--init", type=Path, metavar="MODEL", help="go on from the Llama or Qwen3 in this folder, with its tokenizer (default: a new one)")
    add("--vocabulary", type=int, default=16384, help="tokens of the tokenizer, 300 to 65536 (default 16384)")
    add("--tokens", type=Path, help="packed file of an earlier run, instead of texts (default: pack --texts)")
    add("--pack-only", action="store_true", help="write the packed file and stop (default: train)")
    # shape
    add("--architecture", choices=("llama", "qwen3"), default="llama", help="architecture (default llama)")
    add("--hidden", type=int, default=384, help="hidden size (default 384)")
    add("--layers", type=int, default=5, help="number of layers (default 5)")
    add("--heads", type=int, default=6, help="number of attention heads (default 6)")
    add("--kv-heads", type=int, help="number of key and value heads (default: as many as --heads)")
    add("--mlp", type=int, default=1024, help="inner size of the MLP (default 1024)")
    add("--positions", type=int, default=512, help="longest input of the model, and tokens of a training window (default 512)")
    add("--untie", action="store_true", help="give the output layer a matrix that is not the input embedding")
    # training
    add("--steps", type=int, help="length of training in steps")
    add("--minutes", type=float, help="length of training in minutes, instead of --steps")
    add("--batch-tokens", type=int, default=16384, help="tokens in a step (default 16384)")
    add("--lr", type=float, default=6e-3, help="peak learning rate (default 6e-3)")
    add("--weight-decay", type=float, default=0.1, help="weight decay of the matrices of the layers (default 0.1)")
    add("--decay", type=float, default=0.6, help="last share of the run, in which the learning rate falls to zero (default 0.6)")
    add("--seed", type=int, default=0, help="seed of weights, held-out documents and order (default 0)")
    # the machine
    add("--device", help="device to train on (default: cuda where there is one, else cpu)")
    add("--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="autocast dtype (default auto: bfloat16 where it is fast)")
    add("--compile", action="store_true", help="use torch.compile, which needs a C++ compiler: 1.6 to 2 times as fast on a CPU")
    add("--chunk", type=int, default=2048, help="tokens whose logits are in memory at a time (default 2048)")
    add("--checkpoint-every", type=int, default=100, help="steps between checkpoints (default 100)")
    add("--evaluate-every", type=int, default=500, help="steps between held-out measurements, 0 for the end only (default 500)")
    add("--max-shard-mb", type=int, default=50, help="largest weight file, in MB (default 50)")
    add("--resume", action="store_true", help="continue from the checkpoint in --out; arguments not given are those of the run")
    add("--score", nargs="+", metavar="MODEL", help="only measure these models on the held-out text of --tokens")
    return parser


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; with --resume, arguments not given there are those of the run."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.resume and args.out and (path := args.out / "training" / "arguments.json").is_file():
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))["arguments"]
            paths = {"exclude": [Path(p) for p in saved["exclude"]]} | {
                k: Path(saved[k]) for k in ("texts", "tokens", "init") if saved.get(k)
            }
            others = {k: v for k, v in saved.items() if k not in ("resume", "out", "device", *paths)}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{path} is damaged: delete it and give the arguments of the run, or start again in another --out") from None
        parser.set_defaults(**others, **paths)
        args = parser.parse_args(argv)
    return args


def resolve(args: argparse.Namespace) -> None:
    """Replace device and dtype by what they stand for. Raises InputError for arguments that cannot work."""
    args.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if args.dtype == "auto":
        fast = args.device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        args.dtype = "bfloat16" if fast else "float32"
    if args.score:
        if args.tokens is None:
            raise InputError("--score needs --tokens: the packed file whose held-out text is measured")
        return
    if args.out is None:
        raise InputError("--out is missing: the folder to write the model into")
    if (args.steps is None) == (args.minutes is None) and not args.pack_only:
        raise InputError("give either --steps or --minutes")
    for name in ("steps", "minutes", "batch_tokens", "hidden", "layers", "heads", "kv_heads", "mlp", "positions", "lr", "decay", "chunk"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            raise InputError(f"--{name.replace('_', '-')} must be above 0: {getattr(args, name)}")
    if args.init:
        check_init(args)
    if args.hidden % (2 * args.heads) or args.heads % (args.kv_heads or args.heads):
        raise InputError(f"--hidden {args.hidden} must be an even multiple of --heads {args.heads}, and --heads a multiple of --kv-heads")
    if not 300 <= args.vocabulary <= 65536:
        raise InputError(f"--vocabulary must be from 300 to 65536: {args.vocabulary}")
    if args.batch_tokens % args.positions:
        raise InputError(f"--batch-tokens {args.batch_tokens} must be a multiple of --positions {args.positions}")
    for path in filter(None, (args.tokens, *args.exclude)):
        if not path.is_file():
            raise InputError(f"no file {path}")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())) and not args.resume:
        raise InputError(f"{args.out} exists already: choose another --out, or continue that run with --resume")


def check_init(args: argparse.Namespace) -> None:
    """Raise InputError where the folder of --init holds no model that can be gone on from, or other flags contradict it."""
    try:
        config = AutoConfig.from_pretrained(args.init, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(f"--init {args.init} holds no model: {' '.join(str(error).split())[:150]}") from None
    if config.model_type not in ("llama", "qwen3"):
        raise InputError(f"--init {args.init} is a {config.model_type}: this script trains Llama and Qwen3")
    parser = build_parser()
    for name in ("architecture", "vocabulary", "hidden", "layers", "heads", "kv_heads", "mlp", "untie"):
        if getattr(args, name) != parser.get_default(name):
            raise InputError(f"--init {args.init} has a shape already: leave --{name.replace('_', '-')} out")
    if args.positions > config.max_position_embeddings:
        raise InputError(f"--positions {args.positions} is more than the {config.max_position_embeddings} of {args.init}")


def main(args: argparse.Namespace) -> None:
    resolve(args)
    if args.score:
        held_out = read_packed(args.tokens).held_out
        print_scores({folder: score(folder, held_out, args) for folder in args.score})
    else:
        train(args)


if __name__ == "__main__":
    run_script(lambda: main(parse()))
