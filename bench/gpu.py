"""Half an hour on a borrowed GPU: the tests that need one, then the benchmarks, the most telling first.

    python bench/gpu.py --out rows.jsonl --dry-run        # everything small, on a CPU, in two minutes: does it run at all?
    python bench/gpu.py --out rows.jsonl                  # nine minutes; repeat it until it says that nothing is left
    python bench/gpu.py --out rows.jsonl --table          # what the file holds, as Markdown for bench/README.md
    python bench/gpu.py --out rows.jsonl --tokens x/training/tokens.safetensors.gz    # in the time left, pre-train models/tiny further

Every step is a process of its own, and a line of the file as soon as it has ended:

    {"step", "status": "passed" | "failed" | "out of memory" | "timed out", "seconds", "output": last lines, "result": numbers}

A call that is cut off loses at most the step it was at, and the next call goes on from there: steps in the file are skipped, so
delete a line to repeat its step. A step that has not ended with the call's time is killed and left out of the file; one that
takes longer than its own limit is a row "timed out". The exit status is 1 where a step has failed or timed out.

Runs from a copy of the tree, without git, and without datasets, mteb and sentence-transformers. With Triton 3.6 the dry run needs
NumPy below 2.4, for Triton's interpreter; a GPU does not.

The tokens for --tokens are made elsewhere: python models/pretrain.py --init models/tiny --texts FOLDER --out x/ --pack-only. The
model goes to the folder `pretrained` beside --out, in files of 15 MB.
"""

import argparse
import ast
import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from files.console import InputError, run_script

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests" / "test_gpu.py"
LAST_LINES, LINE_WIDTH = 40, 400  # of a step's output that its row keeps
TEST_SECONDS, BENCH_SECONDS = 240, 510  # limits of a step; a call of nine minutes has time for any of them
DRY_SECONDS = 1800  # of a step of a dry run, where nothing is measured: a slow processor is no fault
# the rate is a third of the bundled model's first one; --minutes is filled in when the step begins
PRETRAIN_FLAGS = ["--lr", "2e-3", "--batch-tokens", "65536", "--decay", "0.9", "--max-shard-mb", "15", "--minutes", "MINUTES"]
PRETRAIN_SECONDS = 60  # that loading, measuring and saving take besides
OUT_OF_MEMORY = re.compile(
    r"^(E +|FAILED .* - )?(torch\.\S*OutOfMemoryError|\S*Error: .*(CUDA error: out of memory|ALLOC_FAILED|does not fit into (the )?memory))"
    r"|^ours: out of memory",
    re.MULTILINE,
)
FURTHER_SHAPES = ("mistral-7b", "llama-3.2-1b", "mistral-7b, long", "qwen3-0.6b, short")  # of bench_pooling.py, beside those of --quick
# a step, its script and flags, and its flags in a dry run
BENCHMARKS = (
    ("pooling, two shapes", "bench_pooling.py --quick", "--help"),
    ("profile of one batch, qwen3-0.6b", "gpu.py --step profile", "--step profile"),
    (
        "encoding, qwen3-0.6b",
        'bench_encode.py --models qwen3-0.6b --workloads short long --prompts none "30 tokens" --texts 2048 --rounds 3 --ablate',
        "--models tiny --workloads short --prompts none --texts 8 --rounds 1 --batch-sizes 8 --dtype bfloat16",
    ),
    (
        "encoding, llama-3.2-1b",
        'bench_encode.py --models llama-3.2-1b --workloads short --prompts none "30 tokens" --texts 2048 --rounds 3',
        "--help",
    ),
    (
        "training, llama-3.2-1b",
        'bench_train.py --models llama-3.2-1b --sides ours "ours, LoRA through peft\'s layers" "ours, 8192 tokens a batch" "plain loop"',
        "--models tiny --sides ours --batch-size 4 --steps 1 --rounds 1 --dtype bfloat16",
    ),
    (
        "training, mistral-7b in 24 GiB with recomputation",
        "bench_train.py --cap 24 --models mistral-7b --gradient-checkpointing --sides ours",
        "--help",
    ),
    ("patch models, ViT-S and ViT-g", "bench_pathology.py --device cuda", "--device cuda --rounds 1"),
    # a step each: every shape is compiled anew for each kind and pass, and all of them would not end within the limit of a step
    *((f"pooling, {shape}", f"bench_pooling.py --shapes '{shape}'", "--help") for shape in FURTHER_SHAPES),
)


@dataclass(frozen=True)
class Step:
    name: str
    command: list[str]
    limit: int  # seconds


# ------------------------------------------------------------------------------------------- steps that are made of nothing else


def versions() -> dict:
    """Versions of everything, the device, the signature of `varlen_attn`, and what Triton needs to compile its driver."""
    import inspect
    import platform
    import shutil
    import sysconfig
    from importlib.metadata import PackageNotFoundError, version

    import torch

    result: dict = {"python": platform.python_version(), "cuda": torch.version.cuda, "device": "CPU", "varlen_attn": None}
    packages = ("torch", "triton", "transformers", "peft", "tokenizers", "numpy", "pytest", "datasets", "mteb", "sentence-transformers")
    for package in packages:
        try:
            result[package] = version(package)
        except PackageNotFoundError:
            result[package] = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        result |= {"device": properties.name, "gib": properties.total_memory / 2**30}
        result["compute capability"] = f"{properties.major}.{properties.minor}"
    with contextlib.suppress(ImportError):
        from torch.nn.attention.varlen import varlen_attn

        result["varlen_attn"] = str(inspect.signature(varlen_attn))
    compilers = filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")))
    result["compiler"] = Path(next(compilers, "")).name or None
    return result | {"python headers": (Path(sysconfig.get_path("include")) / "Python.h").is_file()}


def tiny() -> dict:
    """The bundled model encoded in float32 and bfloat16, the cosine between both, and two losses with a training step between."""
    import math

    import torch

    from encoder import Encoder
    from training.checkpoint import TrainingState
    from training.gradients import attention_kernel, batch_gradients
    from training.losses import LossSettings, batch_loss
    from training.pair_data import Pair, tokenize_pairs

    texts = ["A cat sleeps.", "Interest rates rose again this month.", "def add(a, b): return a + b", ""]
    exact, rounded = (Encoder.load("tiny", prompt="cluster", dtype=dtype).encode(texts) for dtype in ("float32", "bfloat16"))
    cosine = float((exact * rounded).sum(1).min())
    encoder = Encoder.load("tiny", prompt="cluster", dtype="bfloat16")
    torch.manual_seed(0)
    encoder.add_adapter(8)
    encoder.decoder.train()
    optimizer = torch.optim.AdamW(encoder.trainable().values(), lr=1e-3)
    batch = tokenize_pairs(encoder, [Pair(f"Bank {i} raised its fees.", f"Money costs more at bank {i}.") for i in range(16)])
    losses = []
    for _ in range(2):
        optimizer.zero_grad(set_to_none=True)
        loss_of = batch_loss(batch, encoder.device, LossSettings())
        with attention_kernel(encoder):
            losses.append(batch_gradients(encoder, batch, TrainingState(16, 0), loss_of, optimizer).loss.item())
        optimizer.step()
    result = {"cosine": cosine, "loss before": losses[0], "loss after": losses[1]}
    if not (cosine > 0.999 and all(map(math.isfinite, losses)) and losses[1] < losses[0]):
        raise SystemExit(f"the cosine must be above 0.999 and the loss must fall: {result}")
    return result


def profile() -> dict:
    """Where the time of one batch goes: 256 texts behind the 30-token prompt, in the Qwen3-0.6B shape (dry run: the bundled model)."""
    import torch
    from bench_encode import PROMPTS, make_model, make_texts
    from torch.profiler import ProfilerActivity

    from encoder import Encoder

    on_gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        name = "qwen3-0.6b" if on_gpu else "tiny"
        source = make_model(name, Path(folder), torch.device("cuda" if on_gpu else "cpu"))
        encoder = Encoder.load(source, prompt=PROMPTS["30 tokens"], pooling="last", dtype="bfloat16")
    texts = make_texts(encoder.tokenizer, "short", 256 if on_gpu else 8)
    tokenized = encoder.tokenize(texts)

    def run() -> float:
        began = time.perf_counter()
        with torch.no_grad():
            encoder.embed(encoder.collate(tokenized, list(range(len(texts)))))[0].cpu()
        return time.perf_counter() - began

    seconds = [run() for _ in range(6)][1:]
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        run()
    sort_by = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=sort_by, row_limit=25, max_name_column_width=60))
    return {"model": name, "texts": len(texts), "tokens": sum(map(len, tokenized.ids)), "milliseconds": 1000 * sorted(seconds)[2]}


def pretrain() -> dict:
    """One step of pre-training the bundled model further, on the paragraphs of the README files."""
    from models import pretrain

    with tempfile.TemporaryDirectory() as folder:
        texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "bench/README.md")]
        (Path(folder) / "text.txt").write_text("\n\n".join(texts), encoding="utf-8")
        flags = f"--init {ROOT}/models/tiny --texts {folder} --no-docstrings --out {folder}/model --steps 1 --batch-tokens 512 --lr 1e-3"
        pretrain.main(pretrain.parse(shlex.split(flags)))
        return json.loads(Path(folder, "model", "training", "summary.json").read_text())["bits_per_byte"]


OWN_STEPS: dict[str, Callable[[], dict]] = {"versions": versions, "tiny": tiny, "profile": profile, "pretrain": pretrain}


# ------------------------------------------------------------------------------------------------------------------- steps


def make_steps(args: argparse.Namespace) -> list[Step]:
    """All steps, in their order."""
    dry_run = args.dry_run
    test_seconds, bench_seconds = (DRY_SECONDS, DRY_SECONDS) if dry_run else (TEST_SECONDS, BENCH_SECONDS)

    def script(line: str) -> list[str]:
        name, *flags = shlex.split(line)
        return [sys.executable, str(ROOT / "bench" / name), *flags]

    steps = [Step(name, script(f"gpu.py --step {name}"), test_seconds) for name in ("versions", "tiny")]
    nodes = ast.parse(TESTS.read_text(encoding="utf-8")).body
    tests = [node.name for node in nodes if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    # a process takes longer to start than these tests take on small shapes: a dry run starts two
    groups = {tests[0]: tests[:1], "the other tests": tests[1:]} if dry_run else {test: [test] for test in tests}
    pytest = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "-m", "gpu"]
    steps += [Step(name, pytest + [f"{TESTS}::{test}" for test in group], test_seconds) for name, group in groups.items()]
    for name, line, dry_flags in BENCHMARKS:
        steps.append(Step(name, script(f"{line.split()[0]} {dry_flags}" if dry_run else line), bench_seconds))
    if dry_run:
        steps.append(Step("pre-training further", script("gpu.py --step pretrain"), test_seconds))
    elif args.tokens:
        flags = ["--init", ROOT / "models" / "tiny", "--tokens", args.tokens, "--out", args.out.parent / "pretrained", *PRETRAIN_FLAGS]
        steps.append(Step("pre-training further", [sys.executable, str(ROOT / "models" / "pretrain.py"), *map(str, flags)], 3600))
    return steps


@contextlib.contextmanager
def started(step: Step, dry_run: bool, output) -> Iterator[subprocess.Popen]:
    """The process of a step; it and all that it has started are killed at the end."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}  # unbuffered: a step that is killed leaves its lines
    if dry_run:
        environment |= {"EMBEDDING_DRY_RUN": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(step.command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_step(step: Step, seconds_left: float, dry_run: bool) -> dict | None:
    """Run a step -> its row; None where the call's time was over first."""
    began = time.monotonic()
    if "MINUTES" in step.command:
        minutes = (seconds_left - PRETRAIN_SECONDS) / 60
        if minutes < 1:
            return None
        step = replace(step, command=[f"{minutes:.2f}" if word == "MINUTES" else word for word in step.command])
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        with started(step, dry_run, output) as process:
            try:
                code = process.wait(min(step.limit, seconds_left))
            except subprocess.TimeoutExpired:
                if seconds_left < step.limit:
                    return None
                code = None
        output.seek(0)
        lines, result = separate(output.read().splitlines())
    text = "\n".join(lines)
    if OUT_OF_MEMORY.search(text) and (code or "\nours: out of memory" in f"\n{text}"):
        status = "out of memory"
    else:
        status = "timed out" if code is None else "failed" if code else "passed"
    last = [line[:LINE_WIDTH] for line in lines[-LAST_LINES:]]
    seconds = round(time.monotonic() - began, 1)
    return {"step": step.name, "status": status, "seconds": seconds, "output": last, "result": result} | (
        {"dry_run": True} if dry_run else {}
    )


def separate(lines: list[str]) -> tuple[list[str], dict]:
    """Lines of output -> those that are text, and what all those that are JSON objects hold together."""
    text, result = [], {}
    for line in lines:
        try:
            values = json.loads(line) if line.startswith("{") else None
        except json.JSONDecodeError:
            values = None
        if isinstance(values, dict):
            result |= values
        elif line.strip(".s \t"):  # dots of pytest's progress tell nothing
            text.append(line)
    if text and (skipped := re.search(r"\b(\d+) skipped", text[-1])):
        result["skipped"] = int(skipped[1])
    return text, result


# -------------------------------------------------------------------------------------------------------------------- rows


def read_rows(path: Path, dry_run: bool) -> list[dict]:
    """The rows of the file, without a line that was cut off. A dry run sees its own rows alone, and other calls do not see them."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return [row for row in rows if row.get("dry_run", False) == dry_run]


def append_row(path: Path, row: dict) -> None:
    """Write the row to the disk, on a line of its own even where the line before was cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as f:
        f.seek(0, os.SEEK_END)
        if f.tell():
            f.seek(-1, os.SEEK_END)
            if f.read(1) != b"\n":
                f.write(b"\n")
        f.write(json.dumps(row).encode() + b"\n")
        f.flush()
        os.fsync(f.fileno())


def as_cell(value) -> str:
    """A value in a table; of many numbers the lowest and the highest."""
    if isinstance(value, dict):
        numbers = [v for v in value.values() if isinstance(v, int | float)]
        if len(value) > 6 and len(numbers) == len(value):
            return f"{len(numbers)} numbers, {as_cell(min(numbers))} to {as_cell(max(numbers))}"
        return ", ".join(f"{name} {as_cell(v)}" for name, v in value.items())
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.5g}"
    return str(value).replace("|", "\\|")


def markdown(rows: list[dict]) -> str:
    """A table of all steps, and one for each benchmark with rows of its own; the profile as it was printed."""
    lines = ["| step | result | seconds | numbers |", "|---|---|---|---|"]
    for row in rows:
        numbers = {k: v for k, v in row["result"].items() if k not in ("rows", "versions", "date") and v is not None}
        lines.append(f"| {row['step'].replace('_', ' ')} | {row['status']} | {row['seconds']:.0f} | {as_cell(numbers)} |")
    for row in rows:
        table = row["result"].get("rows")
        if table:
            names = list(max(table, key=len))  # the row of a side that failed has its name alone
            lines += ["", f"{row['step']}:", "", f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
            lines += [f"| {' | '.join(as_cell(cells.get(name, '')) for name in names)} |" for cells in table]
        elif row["step"].startswith("profile"):
            start = next((i for i, line in enumerate(row["output"]) if line.startswith("---")), 0)
            lines += ["", f"{row['step']}:", "", "```", *row["output"][start:], "```"]
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------------------------- main


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, metavar="ROWS.jsonl", help="file of the rows; steps that it holds are not run again")
    add("--minutes", type=float, default=9.0, help="time of this call (default 9)")
    add("--dry-run", action="store_true", help="everything on the CPU with tiny shapes (default: the GPU)")
    add("--table", action="store_true", help="run nothing, print what --out holds as Markdown (default: run)")
    add("--tokens", type=Path, metavar="FILE", help="packed text for further pre-training in the time left (default: none)")
    add("--step", choices=OWN_STEPS, help="run this one step in this process, without --out (default: all steps)")
    return parser


def check_device() -> None:
    """Raise InputError where there is no GPU: every test would be skipped. In a process of its own, as nothing here loads torch."""
    if subprocess.run(
        [sys.executable, "-c", "import torch; assert torch.cuda.is_available()"], capture_output=True, check=False
    ).returncode:
        raise InputError("this PyTorch sees no CUDA device: --dry-run runs everything on a CPU")


def report(row: dict) -> None:
    print(f"{row['status']:13} {row['seconds']:6.1f} s  {row['step']}", flush=True)
    for line in row["output"][-12:] if row["status"] != "passed" else []:
        print(f"    {line}", flush=True)


def main(args: argparse.Namespace) -> None:
    if args.step:
        print(json.dumps(OWN_STEPS[args.step]()))
        return
    if args.out is None:
        raise InputError("--out is missing: give a file for the rows, for example results/gpu.jsonl")
    if args.table:
        print(markdown(read_rows(args.out, args.dry_run)))
        return
    if args.tokens and not args.tokens.is_file():
        raise InputError(f"no file {args.tokens}: pack text with models/pretrain.py --pack-only")
    if not args.dry_run:
        check_device()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the process of a step is killed as well
    end = time.monotonic() + 60 * args.minutes
    done, steps = {row["step"] for row in read_rows(args.out, args.dry_run)}, make_steps(args)
    for step in steps:
        seconds_left = end - time.monotonic()
        if step.name in done:
            continue
        row = run_step(step, seconds_left, args.dry_run) if seconds_left > 0 else None
        if row is None:
            print(f"the {args.minutes:g} minutes are over before the end of: {step.name}", flush=True)
            break
        append_row(args.out, row)
        report(row)
    rows = read_rows(args.out, args.dry_run)
    left = len({step.name for step in steps} - {row["step"] for row in rows})
    bad = [row["step"] for row in rows if row["status"] in ("failed", "timed out")]
    print(f"{len(rows)} steps in {args.out}, {len(bad)} of them failed or timed out, {left} left" + ": repeat the command" * bool(left))
    sys.exit(bool(bad))


if __name__ == "__main__":
    run_script(lambda: main(build_parser().parse_args()))
