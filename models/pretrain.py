"""Pre-train a small decoder-only language model, tokenizer included, from plain text: how `models/tiny` was made.

    python models/pretrain.py --out x/ --minutes 2                             # docstrings of the installed packages
    python models/pretrain.py --out x/ --texts FOLDER --minutes 120 --compile  # and a folder of .txt.gz
    python models/pretrain.py --out x/ --resume                                # go on after an interruption
    python models/pretrain.py --out x/ --texts FOLDER --pack-only              # tokenise here, then train elsewhere:
    python models/pretrain.py --out y/ --tokens x/training/tokens.safetensors --steps 5000
    python models/pretrain.py --score models/tiny x/ --tokens x/training/tokens.safetensors    # bits per byte, side by side

Text files are UTF-8, documents separated by a blank line; `name_00.txt.gz` and `name_01.txt.gz` are one domain, `name`.
Every domain holds out whole documents. What the embedded evaluation tasks use (`tasks/*.jsonl.gz`), and the texts of any
--exclude file, stay out: their modules, and any document with a sentence of theirs.

Leaves behind, in --out:

    config.json, model*.safetensors, tokenizer*       a Llama or Qwen3 for AutoModelForCausalLM, bfloat16, when finished
    training/tokens.safetensors                       the text: packed uint16 ids; tokenizer, held-out text, counts as metadata
    training/arguments.json, metrics.jsonl            what was asked for, with versions; one line a step
    training/checkpoint.safetensors                   weights, optimiser states, step, to go on from
    training/summary.json                             tokens, time, held-out bits per byte; there once the run is finished

With --steps a run that is killed and resumed ends with the same weights; with --minutes the clock decides the schedule.
Nothing beyond torch, transformers, tokenizers, safetensors and numpy is imported, and nothing of this project.
"""

import argparse
import ast
import gzip
import itertools
import json
import math
import os
import platform
import random
import re
import signal
import sys
import sysconfig
import time
import warnings
import zlib
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config

TASKS = Path(__file__).resolve().parent.parent / "tasks"
BOS, EOS = "<s>", "</s>"
NOT_LIBRARIES = {"pip", "setuptools", "pkg_resources", "wheel", "ensurepip", "site-packages", "lib2to3", "idlelib"}
TOKENIZER_BYTES = 60_000_000  # of training text that the tokenizer is learned from
PIECE = 600  # characters of held-out text that are scored at a time, from a fresh start


class InputError(ValueError):
    """What the user gave cannot work; the message says what, where and what to do."""


def write_atomic(path: Path, write) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------- documents


def key(text: str) -> str:
    """What two texts share when they differ in case, digits and punctuation only."""
    return re.sub(r"[\W\d_]+", " ", text.lower()).strip()


def read_excluded(paths: list[Path]) -> tuple[set[str], set[str]]:
    """Modules, and keys of the texts, of JSONL files with a `text` and perhaps a `module` column."""
    modules, keys = set(), set()
    for path in paths:
        opener = gzip.open if path.suffix == ".gz" else open
        try:
            with opener(path, "rt", encoding="utf-8") as f:
                for row in map(json.loads, filter(str.strip, f)):
                    modules |= {row["module"]} if "module" in row else set()
                    keys.add(key(row["text"]))
        except (ValueError, KeyError, TypeError, AttributeError, EOFError, zlib.error) as error:
            raise InputError(f"{path} is not JSONL with a column 'text' ({type(error).__name__}: {error})") from None
    return modules, keys - {""}


def holds(document: str, keys: set[str]) -> bool:
    """Whether a line or a sentence of the document, or two sentences in a row, is one of the texts."""
    for line in document.split("\n"):
        sentences = [key(s) for s in re.split(r"(?<=[.!?])\s+", line)]
        if key(line) in keys or any(s in keys or f"{s} {t}" in keys for s, t in itertools.pairwise([*sentences, ""])):
            return True
    return " ".join(key(document).split()) in keys


def read_file(path: Path, keys: set[str]) -> list[str]:
    """The documents of one text file, without those that hold an excluded text."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as f:
            documents = [d.strip() for d in re.split(r"\n\s*\n", f.read())]
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 ({error.reason}): convert it first, for example with iconv -t utf-8") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path} is damaged: {error}") from None
    return [d for d in documents if d and not holds(d, keys)]


def read_module(job: tuple[Path, Path], modules: set[str], keys: set[str]) -> list[str]:
    """The docstrings of one source file, which is parsed and not imported."""
    root, path = job
    module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
    if module in modules:
        return []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError, RecursionError):  # Python 2 leftovers, templates
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return [d.strip() for d in found if d and d.strip() and not holds(re.sub(r"[ \t]*\n(?!\s*\n)[ \t]*", " ", d), keys)]


def source_files() -> list[tuple[Path, Path]]:
    """(root, file) of every library module: installed packages, then the standard library; tests are not libraries."""
    jobs = []
    for root in (Path(sysconfig.get_paths()["purelib"]), Path(sysconfig.get_paths()["stdlib"])):
        for folder, children, names in os.walk(root):
            children[:] = sorted(c for c in children if c.isidentifier() and not c.startswith("test") and c not in NOT_LIBRARIES)
            jobs += [(root, Path(folder) / n) for n in sorted(names) if n.endswith(".py") and not n.startswith("test")]
    return jobs


def read_domains(folder: Path | None, docstrings: bool, excluded: list[Path]) -> dict[str, list[str]]:
    """Domain -> its distinct documents, in the order of the files."""
    modules, keys = read_excluded(excluded)
    domains: dict[str, list[str]] = {}
    with ProcessPoolExecutor() as pool:
        if folder is not None:
            files = sorted(f for f in folder.iterdir() if f.name.endswith((".txt", ".txt.gz"))) if folder.is_dir() else []
            if not files:
                raise InputError(f"{folder} holds no .txt.gz or .txt file")
            for file, documents in zip(files, pool.map(partial(read_file, keys=keys), files), strict=True):
                domains.setdefault(re.sub(r"_\d+$", "", file.name.split(".txt")[0]), []).extend(documents)
        if docstrings:
            found = pool.map(partial(read_module, modules=modules, keys=keys), source_files(), chunksize=64)
            domains["docstrings"] = list(itertools.chain.from_iterable(found))
    domains = {name: list(dict.fromkeys(documents)) for name, documents in domains.items()}
    for name, documents in domains.items():
        if len(documents) < 2:
            raise InputError(
                f"domain {name} has {len(documents)} documents: one is held out, so that two are needed (blank lines separate them)"
            )
    return domains


def cut(text: str, size: int) -> list[str]:
    """The text in pieces of at most `size` characters, cut before a space where there is one."""
    pieces = []
    while len(text) > size:
        at = text.rfind(" ", 1, size) if " " in text[1:size] else size
        pieces.append(text[:at])
        text = text[at:]
    return [*pieces, text]


# ---------------------------------------------------------------------------------------- tokenizer and packed tokens


def train_tokenizer(documents: list[str], vocabulary: int) -> Tokenizer:
    """Byte-level BPE (Radford et al. 2019) with single digits; the first ids are BOS and EOS. No text is unknown to it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False)
    size = itertools.accumulate(len(d) for d in documents)
    tokenizer.train_from_iterator((d for d, n in zip(documents, size, strict=True) if n < TOKENIZER_BYTES), trainer)
    return tokenizer


def pack(args: argparse.Namespace, path: Path) -> None:
    """Texts to one file: `ids` (N,) uint16, BOS document EOS BOS document EOS ..., documents of all domains shuffled."""
    rng = random.Random(args.seed)
    domains = read_domains(args.texts, not args.no_docstrings, [*sorted(TASKS.glob("*.jsonl.gz")), *args.exclude])
    held_out, counts, documents = {}, {}, []
    for name, found in domains.items():
        rng.shuffle(found)
        sizes = list(itertools.accumulate(len(d) for d in found))
        n = next((i for i, size in enumerate(sizes, 1) if size > args.hold_out), len(found))  # documents that hold that many characters
        n = min(n, max(1, len(found) // 10))
        held_out[name] = [p for d in found[:n] for p in cut(d, PIECE)][: max(1, args.hold_out // PIECE)]
        counts[name] = {"documents": len(found) - n, "bytes": sum(len(d.encode()) for d in found[n:])}
        documents += found[n:]
    rng.shuffle(documents)
    total = sum(c["bytes"] for c in counts.values())
    print(f"{len(documents):,} documents, {total / 1e6:.1f} MB: " + ", ".join(f"{k} {c['bytes'] / 1e6:.1f}" for k, c in counts.items()))
    tokenizer = train_tokenizer(documents, args.vocabulary)
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    packed = []
    for at in range(0, len(documents), 4096):
        for e in tokenizer.encode_batch_fast(documents[at : at + 4096], add_special_tokens=False):
            packed.append(np.array([bos, *e.ids, eos], np.uint16))
    ids = np.concatenate(packed)
    print(f"{len(ids):,} tokens, {total / len(ids):.2f} bytes each")
    metadata = {"tokenizer": tokenizer.to_str(), "held_out": json.dumps(held_out), "counts": json.dumps(counts)}
    write_atomic(path, lambda temporary: save_arrays({"ids": ids}, temporary, metadata=metadata))


def read_packed(path: Path) -> tuple[Tensor, dict]:
    """-> ids (N,) int32 and {"tokenizer": str, "held_out": {domain: [text]}, "counts": {domain: {"documents", "bytes"}}}."""
    try:
        with safe_open(path, framework="np") as f:
            ids, metadata = f.get_tensor("ids"), f.metadata()
        rest = {k: json.loads(metadata[k]) for k in ("held_out", "counts")}
        return torch.from_numpy(ids.astype(np.int32)), {"tokenizer": metadata["tokenizer"], **rest}
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is not a packed file of this script ({error}): make one with --pack-only") from None
    except FileNotFoundError:
        raise InputError(f"no file {path}: make one with --pack-only") from None


def hub_tokenizer(text: str, positions: int) -> PreTrainedTokenizerFast:
    """The tokenizer as others load it; it puts BOS before a text, as every document in training began with it."""
    tokenizer = Tokenizer.from_str(text)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=EOS, model_max_length=positions)


# ------------------------------------------------------------------------------------------------- model and training


def build_model(args: argparse.Namespace, vocabulary: int) -> torch.nn.Module:
    """A Llama or Qwen3 with fresh weights, from the seed."""
    torch.manual_seed(args.seed)
    make = {"llama": LlamaConfig, "qwen3": Qwen3Config}[args.architecture]
    config = make(
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
    # compiled for a CPU, plain matrix products beat the fused kernel, whose backward is slow there
    eager = args.compile and args.device.type == "cpu"
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager" if eager else "sdpa").to(args.device)


def build_optimizers(model: torch.nn.Module, args: argparse.Namespace) -> dict[str, torch.optim.Optimizer]:
    """Muon (Jordan 2024; step size matched to AdamW's as in Liu et al. 2025, arXiv 2502.16982) for the layers' matrices,
    AdamW for embeddings and norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in n)]
    return {
        "muon": torch.optim.Muon(matrices, lr=args.lr, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw"),
        "adamw": torch.optim.AdamW(others, lr=args.lr, weight_decay=0.0, betas=(0.9, 0.95)),
    }


def rate(progress: float, decay: float, warmup: float = 0.02) -> float:
    """Share of the peak learning rate at this share of the run: up, flat, and linearly down to zero at the end."""
    return min(1.0, (progress + 1e-3) / warmup, (1 - progress) / decay)


def windows(ids: Tensor, size: int, batch: int, step: int, seed: int) -> Tensor:
    """(batch, size + 1) of a step. An epoch is a permutation of windows, drawn with their offset from (seed, epoch)."""
    per_epoch = max(1, ((len(ids) - 1) // size - 1) // batch)
    epoch, at = divmod(step, per_epoch)
    draw = torch.Generator().manual_seed(seed * 100_003 + epoch)
    offset = int(torch.randint(size, (1,), generator=draw))
    order = torch.randperm((len(ids) - 1 - offset) // size, generator=draw)
    starts = offset + size * order[at * batch : (at + 1) * batch]
    return ids[starts[:, None] + torch.arange(size + 1)].long()


def token_losses(head: torch.nn.Module, states: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats of each of the (T, D) states against (T,) targets, logits in float32."""
    return F.cross_entropy(head(states).float(), targets, reduction="none")


def step_gradients(model: torch.nn.Module, losses, batch: Tensor, args: argparse.Namespace) -> float:
    """Gradients of the mean next-token loss; logits exist for --chunk tokens at a time, a vocabulary's are most of the memory."""
    batch = batch.to(args.device)
    with autocast(args):
        states = model.model(input_ids=batch[:, :-1], use_cache=False).last_hidden_state.flatten(0, 1)  # (T, D)
        targets, leaf = batch[:, 1:].flatten(), states.detach().requires_grad_()
        total = 0.0
        for s, t in zip(leaf.split(args.chunk), targets.split(args.chunk), strict=True):
            loss = losses(s, t).sum() / len(targets)
            loss.backward()
            total += loss.item()
    states.backward(leaf.grad)
    return total


def autocast(args: argparse.Namespace):
    return torch.autocast(args.device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")


@torch.inference_mode()
def bits_per_byte(model: torch.nn.Module, tokenizer, held_out: dict[str, list[str]], batch_tokens: int = 8192) -> dict[str, float]:
    """Domain -> bits that the model needs for a byte of its held-out pieces, each given BOS alone."""
    model.eval()
    device, found = model.device, {}
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    for domain, pieces in held_out.items():
        rows = sorted(tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"], key=len)
        nats = 0.0
        while rows:
            n = max(1, batch_tokens // len(rows[-1]))
            chosen, rows = rows[-n:], rows[:-n]
            longest = max(map(len, chosen))
            batch = torch.tensor([[start, *r] + [-1] * (longest - len(r)) for r in chosen], device=device)
            inputs = batch[:, :-1].clamp(min=0)  # right padding: causal attention keeps it from the rest
            states = model.model(input_ids=inputs, use_cache=False).last_hidden_state
            real = batch[:, 1:] >= 0
            for s, t in zip(states[real].split(2048), batch[:, 1:][real].split(2048), strict=True):
                nats += token_losses(model.lm_head, s, t).sum().item()
        found[domain] = nats / math.log(2) / sum(len(p.encode()) for p in pieces)
    model.train()
    return found


# ----------------------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(path: Path, model: torch.nn.Module, optimizers: dict[str, torch.optim.Optimizer], state: dict) -> None:
    tensors = {f"weight/{n}": p.detach() for n, p in model.named_parameters()}
    for name, optimizer in optimizers.items():
        for i, values in optimizer.state_dict()["state"].items():
            tensors |= {f"{name}/{i}/{k}": v for k, v in values.items()}
    tensors = {k: v.cpu().contiguous() for k, v in tensors.items()}
    write_atomic(path, lambda temporary: save_file(tensors, temporary, metadata={"state": json.dumps(state)}))


def load_checkpoint(path: Path, model: torch.nn.Module, optimizers: dict[str, torch.optim.Optimizer]) -> dict:
    try:
        with safe_open(path, framework="pt") as f:
            state, tensors = json.loads(f.metadata()["state"]), {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118, not a dict
    except SafetensorError as error:
        raise InputError(f"{path} is damaged ({error}): start afresh in another --out") from None
    for name, parameter in model.named_parameters():
        parameter.data.copy_(tensors[f"weight/{name}"])
    for name, optimizer in optimizers.items():
        found: dict[int, dict] = {}
        for k, v in tensors.items():
            if k.startswith(f"{name}/"):
                _, i, what = k.split("/")
                found.setdefault(int(i), {})[what] = v
        optimizer.load_state_dict({"state": found, "param_groups": optimizer.state_dict()["param_groups"]})
    return state


# ------------------------------------------------------------------------------------------------------------- main


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, help="folder of the model")
    # text
    add("--texts", type=Path, help="folder of .txt.gz or .txt files, added to the docstrings (default: docstrings alone)")
    add("--no-docstrings", action="store_true", help="leave the docstrings of the installed packages out")
    add("--exclude", type=Path, nargs="*", default=[], help="JSONL files whose texts must not be trained on, besides tasks/")
    add("--hold-out", type=int, default=60_000, help="characters of each domain that are held out, a tenth at most (default 60000)")
    add("--vocabulary", type=int, default=16384, help="size of the tokenizer, 65536 at most (default 16384)")
    add("--tokens", type=Path, help="packed file of an earlier run, instead of texts")
    add("--pack-only", action="store_true", help="write the packed file and stop")
    # shape
    add("--architecture", choices=("llama", "qwen3"), default="llama", help="default llama")
    add("--hidden", type=int, default=384, help="default 384")
    add("--layers", type=int, default=5, help="default 5")
    add("--heads", type=int, default=6, help="default 6")
    add("--kv-heads", type=int, help="default: as many as --heads")
    add("--mlp", type=int, default=1024, help="default 1024")
    add("--positions", type=int, default=512, help="length of the windows, and of what the model can read (default 512)")
    add("--untie", action="store_true", help="an output matrix of its own")
    # training
    add("--steps", type=int, help="length of training")
    add("--minutes", type=float, help="length of training, instead of --steps")
    add("--batch-tokens", type=int, default=16384, help="tokens a step (default 16384)")
    add("--lr", type=float, default=6e-3, help="peak learning rate (default 6e-3)")
    add("--weight-decay", type=float, default=0.1, help="of the layers' matrices (default 0.1)")
    add("--decay", type=float, default=0.6, help="share of the run in which the rate falls to zero (default 0.6)")
    add("--seed", type=int, default=0, help="of weights, held-out documents and order (default 0)")
    # the machine
    add("--device", help="default cuda where there is one, else cpu")
    add("--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="of autocast (default auto: bfloat16 where it is fast)")
    add("--compile", action="store_true", help="torch.compile, which needs a C++ compiler: 1.6 to 2 times as fast on a CPU")
    add("--chunk", type=int, default=2048, help="tokens whose logits exist at a time (default 2048)")
    add("--checkpoint-every", type=int, default=100, help="steps (default 100)")
    add("--evaluate-every", type=int, default=500, help="steps between held-out measurements, 0 for the end only (default 500)")
    add("--max-shard-mb", type=int, default=50, help="size of a weight file (default 50)")
    add("--resume", action="store_true", help="go on from the checkpoint in --out; what is not given is taken from the run")
    add("--score", nargs="+", metavar="MODEL", help="only measure these models on the held-out text of --tokens")
    return parser


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; with --resume, what is not given there is taken from the run."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.resume and args.out and (path := args.out / "training" / "arguments.json").is_file():
        try:
            found = json.loads(path.read_text())["arguments"]
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path} is damaged: give the run's own arguments and delete it, or start afresh in another --out") from None
        paths = {k: Path(v) for k, v in found.items() if k in ("texts", "tokens") and v}
        fixed = {k: v for k, v in found.items() if k not in ("resume", "out", "device", "exclude")}
        parser.set_defaults(**fixed | paths | {"exclude": [Path(p) for p in found["exclude"]]})
        args = parser.parse_args(argv)
    return args


def resolve(args: argparse.Namespace) -> None:
    args.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if args.dtype == "auto":
        fast = args.device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        args.dtype = "bfloat16" if fast else "float32"
    if args.score:
        if args.tokens is None:
            raise InputError("--score needs --tokens: the packed file whose held-out text is measured")
        return
    if args.out is None:
        raise InputError("--out is missing: the folder to put the model into")
    if (args.steps is None) == (args.minutes is None) and not args.pack_only:
        raise InputError("give either --steps or --minutes")
    for name in ("steps", "minutes", "batch_tokens", "hidden", "layers", "heads", "kv_heads", "mlp", "positions", "lr", "decay", "chunk"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            raise InputError(f"--{name.replace('_', '-')} must be above 0: {getattr(args, name)}")
    if args.hidden % (2 * args.heads) or args.heads % (args.kv_heads or args.heads):
        raise InputError(f"--hidden {args.hidden} must be an even multiple of --heads {args.heads}, and heads a multiple of --kv-heads")
    if not 300 <= args.vocabulary <= 65536:
        raise InputError(f"--vocabulary must be from 300 to 65536: {args.vocabulary}")
    if args.batch_tokens % args.positions:
        raise InputError(f"--batch-tokens {args.batch_tokens} must be a multiple of --positions {args.positions}")
    missing = [str(p) for p in (args.tokens, *args.exclude) if p is not None and not p.is_file()]
    if missing:
        raise InputError(f"no file {missing[0]}")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())) and not args.resume:
        raise InputError(f"{args.out} is there already: choose another --out, or go on with --resume")


def train(args: argparse.Namespace) -> None:
    folder = args.out / "training"
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "summary.json").is_file():
        print(f"{args.out} is finished: nothing to do")
        return
    source = args.tokens or folder / "tokens.safetensors"
    if not source.is_file():
        if (folder / "checkpoint.safetensors").is_file():  # packages may have changed since, and their docstrings with them
            raise InputError(f"no file {source}: the run cannot go on without the text that it began with")
        pack(args, source)
    if args.pack_only:
        print(f"{source}: {source.stat().st_size / 1e6:.1f} MB")
        return
    ids, text = read_packed(source)
    tokenizer = hub_tokenizer(text["tokenizer"], args.positions)
    batch_size = args.batch_tokens // args.positions
    if len(ids) < (batch_size + 2) * args.positions:
        raise InputError(f"{source} has {len(ids):,} tokens: too few for one step of {args.batch_tokens}; lower --batch-tokens")
    model = build_model(args, len(tokenizer))
    optimizers = build_optimizers(model, args)
    checkpoint, metrics = folder / "checkpoint.safetensors", folder / "metrics.jsonl"
    state = {"step": 0, "seconds": 0.0}
    if args.resume and checkpoint.is_file():
        state = load_checkpoint(checkpoint, model, optimizers)
    rows = [json.loads(line) for line in metrics.read_text().splitlines() if line.endswith("}")] if metrics.is_file() else []
    rows = [r for r in rows if r["step"] <= state["step"]]
    record = {"arguments": {k: v if isinstance(v, int | float | bool | None) else str(v) for k, v in vars(args).items()}}
    record["arguments"]["exclude"] = [str(p) for p in args.exclude]
    record["versions"] = {p: version(p) for p in ("torch", "transformers", "tokenizers")} | {"python": platform.python_version()}
    write_atomic(folder / "arguments.json", lambda path: path.write_text(json.dumps(record, indent=2) + "\n"))
    write_atomic(metrics, lambda path: path.write_text("".join(json.dumps(r) + "\n" for r in rows)))
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{args.architecture}, {parameters:,} parameters, {args.dtype}, {args.device}; {len(ids):,} tokens; from step {state['step']}",
        flush=True,
    )

    losses = partial(token_losses, model.lm_head)
    if args.compile:
        model.model.compile()  # in place: names and weights stay
        losses = torch.compile(losses)
    stop = []
    for number in (signal.SIGINT, signal.SIGTERM):  # the first one ends the step in hand, a second one kills
        signal.signal(number, lambda received, _: (stop.append(received), signal.signal(received, signal.SIG_DFL)))
    model.train()
    if args.compile:  # before the clock starts; the gradients of this batch are thrown away
        print("compiling", flush=True)
        step_gradients(model, losses, windows(ids, args.positions, batch_size, 0, args.seed), args)
        model.zero_grad(set_to_none=True)
    began = time.perf_counter()
    with open(metrics, "a", encoding="utf-8") as log:
        while not (stop or finished(args, state)):
            tick = time.perf_counter()
            share = rate(state["step"] / args.steps if args.steps else state["seconds"] / 60 / args.minutes, args.decay)
            for group in itertools.chain.from_iterable(o.param_groups for o in optimizers.values()):
                group["lr"] = args.lr * share
            loss = step_gradients(model, losses, windows(ids, args.positions, batch_size, state["step"], args.seed), args)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if not math.isfinite(loss):
                raise InputError(f"step {state['step'] + 1}: the loss is {loss}: lower --lr")
            for optimizer in optimizers.values():
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            seconds = time.perf_counter() - tick
            state = {"step": state["step"] + 1, "seconds": state["seconds"] + seconds}
            row = {**state, "loss": loss, "lr": args.lr * share, "tokens_per_second": args.batch_tokens / seconds}
            if args.evaluate_every and state["step"] % args.evaluate_every == 0:
                with autocast(args):
                    row["bits_per_byte"] = bits_per_byte(model, tokenizer, text["held_out"])
            log.write(json.dumps(row) + "\n")
            log.flush()
            if state["step"] % 20 == 0 or "bits_per_byte" in row:
                line = f"step {state['step']}, {state['seconds'] / 60:.1f} min: loss {loss:.3f}, {row['tokens_per_second']:,.0f} tokens/s"
                held = f", held out {np.mean(list(row['bits_per_byte'].values())):.3f} bits per byte" if "bits_per_byte" in row else ""
                print(line + held, flush=True)
            if stop or finished(args, state) or state["step"] % args.checkpoint_every == 0:
                save_checkpoint(checkpoint, model, optimizers, state)
    if stop and not finished(args, state):
        print(f"stopped after step {state['step']}: go on with --resume", file=sys.stderr)
        sys.exit(128 + stop[0])
    finish(args, model, tokenizer, text, state, time.perf_counter() - began)


def finished(args: argparse.Namespace, state: dict) -> bool:
    return state["step"] >= args.steps if args.steps else state["seconds"] >= 60 * args.minutes


def finish(args: argparse.Namespace, model: torch.nn.Module, tokenizer, text: dict, state: dict, wall: float) -> None:
    """The model in bfloat16 as others load it, then the summary: bits per byte of what lies on disk."""
    model.to(torch.bfloat16).save_pretrained(args.out, max_shard_size=f"{args.max_shard_mb}MB")
    tokenizer.save_pretrained(args.out)
    found = score(args.out, text, args)
    summary = {**state, "tokens": state["step"] * args.batch_tokens, "parameters": sum(p.numel() for p in model.parameters())}
    summary |= {"bits_per_byte": found, "text": text["counts"], "wall_seconds_since_start_or_resume": round(wall, 1)}
    write_atomic(args.out / "training" / "summary.json", lambda path: path.write_text(json.dumps(summary, indent=2) + "\n"))
    print_scores({str(args.out): found})


def score(folder: Path | str, text: dict, args: argparse.Namespace) -> dict[str, float]:
    if not Path(folder).is_dir():
        raise InputError(f"no folder {folder}")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).to(args.device)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    with autocast(args):
        return bits_per_byte(model, tokenizer, text["held_out"])


def print_scores(scores: dict[str, dict[str, float]]) -> None:
    width = max(map(len, ["held-out bits per byte", *next(iter(scores.values()))]))
    print(f"{'held-out bits per byte':{width}}  " + "  ".join(f"{name:>12}" for name in scores))
    for domain in [*next(iter(scores.values())), "mean"]:
        values = [np.mean(list(s.values())) if domain == "mean" else s[domain] for s in scores.values()]
        print(f"{domain:{width}}  " + "  ".join(f"{v:{max(12, len(n))}.3f}" for n, v in zip(scores, values, strict=True)))


def main(args: argparse.Namespace) -> None:
    resolve(args)
    if args.score:
        _, text = read_packed(args.tokens)
        print_scores({folder: score(folder, text, args) for folder in args.score})
    else:
        train(args)


if __name__ == "__main__":
    try:
        main(parse())
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
