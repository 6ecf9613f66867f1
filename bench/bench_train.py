"""Training speed and memory: ours, sentence-transformers' trainer and a plain loop, on the same pairs, LoRA and batch.

    python bench/bench_train.py                                           # on a CPU: the bundled model
    python bench/bench_train.py --models llama-3.2-1b mistral-7b --gradient-checkpointing          # for a GPU, random weights
    python bench/bench_train.py --cap 24 --models mistral-7b --gradient-checkpointing --sides ours    # in 24 GiB of a larger GPU

Sides: ours with the defaults of `train.py`; sentence-transformers 6 with its plain and its cached loss, both symmetric, and with
PyTorch's fused and its plain attention, the fastest of which is its best; a plain loop as in published code
(`AutoModelForCausalLM`, padding, logits computed, every hidden state kept). Every side is a process. On a CPU they keep their models
throughout and alternate, A B C C B A, with only one at work at a time. On a GPU one model is in memory at a time: A A B B C C.
Losses on the first batch have to agree. A ratio is the median of the rounds' ratios; a side that runs out of memory is a row that
says so. A step's time runs from the end of the step before to its own end, so that it includes tokenizing. Memory is the peak
of what was allocated on a GPU, or resident on a CPU, after loading.

Pairs are drawn from the sentences of the bundled tasks, each text 20 to 100 tokens long, inside the clustering prompt; with --short 0.75,
three quarters of them have texts of 4 to 12 tokens, as a batch of short texts of one's own has beside general pairs.
"""

import argparse
import gc
import json
import multiprocessing
import platform
import sys
import tempfile
import time
from contextlib import nullcontext, suppress
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from bench_encode import LENGTHS, SHAPES, make_model, make_texts
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from encoder import packing
from encoder.runtime import is_out_of_memory, pick_device, pick_dtype
from prompts import get_prompt
from training.checkpoint import TrainingState
from training.gradients import attention_kernel, batch_gradients
from training.losses import LossSettings, batch_loss
from training.pair_data import Pair, PairSampler, prefetch, read_pairs
from training.plan import make_encoder

PROMPT = get_prompt("cluster").roles()["document"]
TEMPERATURE, RANK, LR = 0.05, 64, 1e-4


def lora_config(model: nn.Module):
    from peft import LoraConfig

    targets = sorted({n.split(".")[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in n})
    return LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, lora_dropout=0.0, bias="none")


def pairs_in_prompts(pairs: str) -> list[dict]:
    """The pairs with the prompt around each text, for sides that cannot put anything after a text."""
    rows = map(json.loads, Path(pairs).read_text().splitlines())
    return [{k: PROMPT["prefix"] + v + PROMPT["suffix"] for k, v in row.items()} for row in rows]


class PairsInMemory(list):
    """What training takes for a `PairDataset`, which needs the package datasets."""

    name, sha256 = "pairs", ""

    def __getitem__(self, rows: list[int]) -> list[Pair]:
        return [super(PairsInMemory, self).__getitem__(row) for row in rows]


class Ours:
    def __init__(self, folder, pairs, args, device, dtype, fused=True, tokens=None, trim=True, like=packing.SHORTEST_IN_STACK):
        flags = ["--model", folder, "--pairs", pairs, "--batch-size", args.batch_size, "--lora-rank", RANK, "--lr", LR, "--dtype", dtype]
        flags += [
            "--temperature",
            TEMPERATURE,
            "--device",
            device,
            *(["--gradient-checkpointing", 1] if args.gradient_checkpointing else []),
        ]
        self.args = train.parse([str(f) for f in flags])
        train.complete_arguments(self.args)
        self.args.gradient_checkpointing, self.args.lora_alpha = int(args.gradient_checkpointing), RANK
        self.pairs = PairsInMemory(read_pairs(Path(pairs)))
        self.encoder = make_encoder(self.args, self.pairs)
        if not fused:
            for module in self.encoder.decoder.modules():
                vars(module).pop("forward", None)
        if tokens:
            batches = self.encoder.batches
            self.encoder.batches = lambda tokenized, rows, _: batches(tokenized, rows, tokens)
        self.encoder.trim_last_layer, packing.SHORTEST_IN_STACK = trim, like
        self.trained = self.encoder.trainable()
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=LR)
        self.state = TrainingState(args.batch_size, self.args.gradient_checkpointing)
        self.encoder.decoder.train()

    def steps(self, n: int, rows: int) -> tuple[float, float]:
        sampler = PairSampler([rows], np.array([], int), self.args.batch_size, n, seed=0)
        losses, ends = [], []
        for batch in prefetch(self.encoder, self.pairs, sampler, range(n)):
            self.optimizer.zero_grad(set_to_none=True)
            loss_of = batch_loss(batch, self.encoder.device, LossSettings(TEMPERATURE))
            with attention_kernel(self.encoder):
                loss = batch_gradients(self.encoder, batch, self.state, loss_of, self.optimizer).loss
            nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
            self.optimizer.step()
            losses.append(loss.item())
            ends.append(time.perf_counter())
        return ends[-1] - ends[0], losses[0]


class SentenceTransformers:
    def __init__(self, folder, pairs, args, device, dtype, cached=None, attention="sdpa"):
        from datasets import Dataset
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer import losses
        from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

        body = Transformer(folder, max_seq_length=1024, model_kwargs={"dtype": dtype, "attn_implementation": attention})
        pool = Pooling(body.get_embedding_dimension(), pooling_mode="lasttoken")
        self.model, self.args, self.device, self.dtype = SentenceTransformer(modules=[body, pool], device=device), args, device, dtype
        self.model.add_adapter(lora_config(body.model))
        if args.gradient_checkpointing:
            body.model.gradient_checkpointing_enable({"use_reentrant": False})
        settings = {"scale": 1 / TEMPERATURE, "directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
        if cached:
            self.loss = losses.CachedMultipleNegativesRankingLoss(self.model, mini_batch_size=cached, **settings)
        else:
            self.loss = losses.MultipleNegativesRankingLoss(self.model, **settings)
        self.data = Dataset.from_list(pairs_in_prompts(pairs))
        self.scratch = tempfile.TemporaryDirectory()

    def steps(self, n: int, rows: int) -> tuple[float, float]:
        from sentence_transformers.sentence_transformer.trainer import SentenceTransformerTrainer
        from sentence_transformers.sentence_transformer.training_args import SentenceTransformerTrainingArguments

        ends, losses = [], []

        class Clock(TrainerCallback):
            def on_step_end(self, *_, **__):
                ends.append(time.perf_counter())

        settings = {"max_steps": n, "per_device_train_batch_size": self.args.batch_size, "bf16": self.dtype == "bfloat16"}
        quiet = {"save_strategy": "no", "logging_strategy": "no", "report_to": "none", "disable_tqdm": True}
        trainer = SentenceTransformerTrainer(
            model=self.model,
            args=SentenceTransformerTrainingArguments(
                output_dir=self.scratch.name, learning_rate=LR, use_cpu=self.device == "cpu", **settings, **quiet
            ),
            train_dataset=self.data.select(range(rows)),
            loss=self.loss,
            callbacks=[Clock()],
        )
        hook = self.loss.register_forward_hook(lambda _, __, out: losses.append((out["loss"] if isinstance(out, dict) else out).item()))
        trainer.train()
        hook.remove()
        return ends[-1] - ends[0], losses[0]


class PlainLoop:
    def __init__(self, folder, pairs, args, device, dtype):
        from peft import get_peft_model

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self.model, self.args, self.device, self.dtype = get_peft_model(model, lora_config(model)).to(device), args, device, dtype
        if args.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=LR)
        self.rows = pairs_in_prompts(pairs)
        self.model.train()

    def vectors(self, texts):
        inputs = self.tokenizer(texts, padding=True, return_tensors="pt").to(self.device)
        with torch.autocast(self.device.split(":")[0], torch.bfloat16) if self.dtype == "bfloat16" else nullcontext():
            return F.normalize(self.model(**inputs, output_hidden_states=True).hidden_states[-1][:, -1].float(), dim=-1)

    def steps(self, n: int, rows: int) -> tuple[float, float]:
        losses, ends, size = [], [], self.args.batch_size
        order = np.concatenate([np.random.default_rng(i).permutation(rows) for i in range(-(-n * size // rows))])
        for step in range(n):
            chosen = [self.rows[i] for i in order[step * size : (step + 1) * size]]
            similarity = self.vectors([r["anchor"] for r in chosen]) @ self.vectors([r["positive"] for r in chosen]).T / TEMPERATURE
            at = torch.arange(size, device=similarity.device)
            loss = (F.cross_entropy(similarity, at) + F.cross_entropy(similarity.T, at)) / 2
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            losses.append(loss.item())
            ends.append(time.perf_counter())
        return ends[-1] - ends[0], losses[0]


SIDES = {
    "ours": (Ours, {}),
    "ours, LoRA through peft's layers": (Ours, {"fused": False}),
    "ours, whole last layer": (Ours, {"trim": False}),
    "ours, a batch in one stack": (Ours, {"like": 0.0}),
    "ours, 2048 tokens a batch": (Ours, {"tokens": 2048}),
    "ours, 8192 tokens a batch": (Ours, {"tokens": 8192}),
    "sentence-transformers, sdpa": (SentenceTransformers, {}),
    "sentence-transformers, eager": (SentenceTransformers, {"attention": "eager"}),
    "sentence-transformers, cached loss, 32 a chunk": (SentenceTransformers, {"cached": 32}),
    "plain loop": (PlainLoop, {}),
}


def work(name: str, pipe, folder: str, pairs: str, args: argparse.Namespace, device: str, dtype: str) -> None:
    """A side in its own process: takes (steps, rows of the pairs) from the pipe, and sends back seconds, first loss and memory."""
    torch.manual_seed(0)
    if args.cap and device != "cpu":
        torch.cuda.set_per_process_memory_fraction(args.cap * 2**30 / torch.cuda.mem_get_info(device)[1])
    make, settings = SIDES[name]
    try:
        side = make(folder, pairs, args, device, dtype, **settings)
        reset_peak_memory(device)
        while (request := pipe.recv()) is not None:
            pipe.send((*side.steps(*request), peak_memory(device)))
            if device == "cpu":
                gc.collect()
            else:
                torch.cuda.empty_cache()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        pipe.send(f"out of memory: {str(error).split('.')[0]}")


class Workers:
    """The processes of all sides, each started when it is first asked. One that fails is reported and not asked again.

    alive    how many may be alive at a time
    """

    def __init__(self, alive: int, *work_args):
        self.alive, self.work_args, self.context = alive, work_args, multiprocessing.get_context("spawn")
        self.pipes, self.processes, self.failed = {}, {}, {}

    def ask(self, side: str, steps: int, rows: int) -> tuple[float, float, float] | None:
        """Seconds, first loss and peak memory in GiB; None where the side has failed."""
        if side in self.failed:
            return None
        if side not in self.pipes:
            while len(self.pipes) >= self.alive:
                self.close(next(iter(self.pipes)))
            self.pipes[side], other_end = self.context.Pipe()
            self.processes[side] = self.context.Process(target=work, args=(side, other_end, *self.work_args), daemon=True)
            self.processes[side].start()
            other_end.close()
        try:
            self.pipes[side].send((steps, rows))
            answer = self.pipes[side].recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            answer = "failed, see above"
        if isinstance(answer, str):
            print(f"{side}: {answer}", flush=True)
            self.failed[side] = answer
            self.close(side)
            return None
        return answer

    def close(self, side: str) -> None:
        """End a side's process, which gives its memory back."""
        with suppress(BrokenPipeError, ConnectionResetError):
            self.pipes[side].send(None)
        del self.pipes[side]
        self.processes[side].join(30)

    def close_all(self) -> None:
        for side in list(self.pipes):
            self.close(side)


def reset_peak_memory(device: str) -> None:
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")
    else:
        torch.cuda.reset_peak_memory_stats()


def peak_memory(device: str) -> float:
    """GiB."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


def write_pairs(path: Path, tokenizer, n: int, short: float) -> None:
    LENGTHS.update(pairs=(20, 100), titles=(4, 12))
    long_texts, short_texts = (make_texts(tokenizer, workload, 2 * n) for workload in ("pairs", "titles"))
    is_short = np.random.default_rng(0).random(n) < short
    texts = [(short_texts if is_short[i // 2] else long_texts)[i] for i in range(2 * n)]
    rows = [{"anchor": a, "positive": b} for a, b in zip(texts[::2], texts[1::2], strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def check_losses(losses: dict[str, float]) -> None:
    """Losses may differ by 2 %: tokenized together with its prompt, one text in eight has a token fewer than ours."""
    for side, loss in losses.items():
        if abs(loss - losses["ours"]) > 0.02 * losses["ours"]:
            raise SystemExit(f"{side} has a loss of {loss:.4f} on the first batch, ours is {losses['ours']:.4f}")


def compare(model: str, args: argparse.Namespace, device: str, dtype: str) -> list[dict]:
    """Time all sides on one model: a row for each."""
    print(model, flush=True)
    on_cpu, n_pairs, sides = device == "cpu", 20 * args.batch_size, args.sides
    turns = [side for r in range(args.rounds) for side in (sides if r % 2 == 0 else reversed(sides))]
    requests = [(side, 1, args.batch_size) for side in sides] + [(side, args.steps + 1, n_pairs) for side in turns]
    if not on_cpu:
        requests.sort(key=lambda request: sides.index(request[0]))
    with tempfile.TemporaryDirectory() as scratch:
        folder, pairs = make_model(model, Path(scratch) / "model", torch.device(device)), Path(scratch) / "pairs.jsonl"
        write_pairs(pairs, AutoTokenizer.from_pretrained(folder), n_pairs, args.short)
        workers = Workers(len(sides) if on_cpu else 1, folder, str(pairs), args, device, dtype)
        losses, times, memory = {}, {side: [] for side in sides}, {}
        for side, steps, rows in requests:
            if not (answer := workers.ask(side, steps, rows)):
                continue
            if side not in losses:
                losses[side] = answer[1]
                if "ours" in losses:
                    check_losses(losses)
            else:
                times[side].append(answer[0] / args.steps)
                memory[side] = answer[2]
        workers.close_all()
    return [report(model, side, workers.failed.get(side), times, memory, args.batch_size) for side in sides]


def report(model: str, side: str, failure: str | None, times: dict[str, list[float]], memory: dict[str, float], batch_size: int) -> dict:
    """Print and return the row of a side."""
    row = {"model": model, "side": side}
    if failure:
        return row | {"side": f"{side}: {failure}"}
    row["pairs_per_second"], row["peak_gib"] = batch_size / float(np.median(times[side])), memory[side]
    line = f"  {side:48} {row['pairs_per_second']:8.1f} pairs/s {memory[side]:6.2f} GiB"
    if "ours" in memory and len(times["ours"]) == len(times[side]):
        row["times_ours"] = float(np.median(np.array(times[side]) / np.array(times["ours"])))
        line += f"  ours is {row['times_ours']:5.2f} x, takes {memory['ours'] / memory[side]:4.0%}"
    print(line, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--models", nargs="+", choices=("tiny", *SHAPES), help="default: tiny on a CPU, else llama-3.2-1b and mistral-7b")
    rivals = [side for side in SIDES if not side.startswith("ours,")]
    add("--sides", nargs="+", choices=tuple(SIDES), default=rivals, help="default: ours with its defaults, and all others")
    add("--batch-size", type=int, default=120, help="pairs per step (default 120)")
    add("--short", type=float, default=0.0, help="share of the pairs whose texts are short (default 0)")
    add("--steps", type=int, default=3, help="timed steps of each side in a round, after one that is not timed (default 3)")
    add("--rounds", type=int, default=3, help="rounds, in alternating order of the sides (default 3)")
    add("--gradient-checkpointing", action="store_true", help="compute every layer again in the backward pass, on all sides")
    add("--cap", type=float, help="GiB of the GPU that a process may use (default: all)")
    add("--dtype", help="float32 or bfloat16 (default auto: bfloat16 where it is fast)")
    add("--device", help="cpu, cuda or cuda:N (default: cuda if there is a GPU, else cpu)")
    add("--json", type=Path, help="write the last line, indented, to this file too (default: do not)")
    args = parser.parse_args()
    device = pick_device(args.device)
    dtype = str(pick_dtype(args.dtype or "auto", device)).removeprefix("torch.")
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    versions = {p: version(p) for p in ("torch", "transformers", "peft")} | {"python": platform.python_version()}
    about = {"date": str(date.today()), "device": where, "dtype": dtype, "batch_size": args.batch_size, "versions": versions}
    print(json.dumps(about))
    if "ours" not in args.sides:
        args.sides.insert(0, "ours")
    models = args.models or (["tiny"] if device.type == "cpu" else ["llama-3.2-1b", "mistral-7b"])
    result = about | {"rows": [row for name in models for row in compare(name, args, str(device), dtype)]}
    print(json.dumps(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
