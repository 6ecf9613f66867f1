"""What looking at attention costs, and what the last token's attention has to do with the quality of vectors.

    python bench/bench_attention.py memory                       # a text of 32,768 tokens: peak memory beside the plain forward pass
    python bench/bench_attention.py time                         # 10,000 short texts: all layers and heads beside encoding
    python bench/bench_attention.py experiment --runs runs/*-last --data labelled/*.jsonl.gz --out attention.jsonl
    python bench/bench_attention.py table --out attention.jsonl  # the tables of bench/README.md, from what there is

memory      a random Llama of four layers with long positions; every way of looking in a fresh process. Peak resident
            memory, and what of it came after the model was loaded
time        texts of the bundled tasks; rounds of encoding (pooling last) and reading alternate; the ratio of processor time is the
            median of the rounds'
experiment  runs of train.py --pooling last --keep-adapters N, of one base, several seeds and prompts. For every side of every run (base,
            kept adapters, final adapter) and labelled set: the categories' shares in the last token's attention, and V-measure. For
            bases and final adapters also what hiding each category costs (attention_analysis/interventions.py). A line of --out each; a
            call that is repeated goes on where it was interrupted
table       shares and V-measure by side, interventions, and how content's share goes with V-measure (attention_analysis/effects.py)

The first --limit rows of a fixed shuffle of each set are taken. Ends with a JSON line (memory, time).
"""

import argparse
import gzip
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from attention_analysis.sides import Side, load_sides, seed_of, sides_of
from encoder.contract import Contract
from files.console import Progress
from files.reading import read_rows
from files.writing import append_line, write_atomic
from prompts import prompt_label

if TYPE_CHECKING:
    import numpy as np

    from encoder import Encoder

HERE = Path(__file__).resolve().parent.parent
HIDDEN = ("bos", "prefix", "suffix", "content", "function")
WAYS = ("encode", "attention", "received", "rollout", "gradient")
LONG = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}


# ----------------------------------------------------------------------------------------------------------- memory and time


def long_model(folder: Path, n_tokens: int) -> None:
    """A random Llama with room for a text of `n_tokens` tokens, and the bundled tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(HERE / "models" / "tiny")
    config = LlamaConfig(**LONG, vocab_size=len(tokenizer), max_position_embeddings=n_tokens + 64, bos_token_id=0, eos_token_id=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def look_once(way: str, folder: str, n_tokens: int) -> None:
    """In a fresh process: one text of `n_tokens` tokens, one way of looking. Prints peak memory as JSON, in MiB."""
    from encoder import Encoder
    from training.monitoring import peak_memory

    encoder = Encoder.load(folder, prompt="none", pooling="last", max_tokens=n_tokens)
    text = "the cat sat on the mat and looked at the dog " * (n_tokens // 8)
    encoder.encode(["a"])
    loaded, began = peak_memory(encoder.device), time.perf_counter()
    if way == "encode":
        encoder.encode([text])
    elif way == "attention":
        encoder.last_token_attention([text], layers=range(1, len(encoder.blocks) + 1))
    else:
        from attention_analysis.gradients import gradient_times_input
        from attention_analysis.received import received_attention
        from attention_analysis.rollout import attention_rollout

        {"received": received_attention, "rollout": attention_rollout, "gradient": gradient_times_input}[way](encoder, [text])
    seconds = time.perf_counter() - began
    print(json.dumps({"way": way, "loaded": loaded, "peak": peak_memory(encoder.device), "seconds": round(seconds, 1)}))


def memory(args: argparse.Namespace) -> None:
    """One way after the other, each in a fresh process."""
    if args.worker:
        look_once(*args.worker, args.tokens)
        return
    with tempfile.TemporaryDirectory() as folder:
        long_model(Path(folder), args.tokens)
        rows = []
        for way in args.ways:
            command = [sys.executable, __file__, "memory", "--worker", way, folder, "--tokens", str(args.tokens)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
    plain = next((row for row in rows if row["way"] == "encode"), rows[0])
    print("| one text, in a fresh process | seconds | peak GiB | of encoding's | above the loaded model GiB | of encoding's |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        above, of_plain = row["peak"] - row["loaded"], plain["peak"] - plain["loaded"]
        cells = (row["way"], row["seconds"], row["peak"], f"{row['peak'] / plain['peak']:.2f}", f"{above:.2f}", f"{above / of_plain:.2f}")
        print(f"| {' | '.join(map(str, cells))} |")
    print(json.dumps({"tokens": args.tokens, "shape": LONG, "rows": rows} | conditions()))


def short_texts(n: int) -> list[str]:
    """Texts of the bundled tasks, over and over."""
    texts = []
    for path in sorted((HERE / "tasks").glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as f:
            texts += [json.loads(line)["text"] for line in f]
    return [texts[i % len(texts)] for i in range(n)]


def speed(args: argparse.Namespace) -> None:
    from encoder import Encoder
    from encoder.token_attention import attention_rows

    encoder, texts = Encoder.load(args.model, prompt="cluster", pooling="last"), short_texts(args.texts)

    def encode() -> None:
        encoder.encode(texts)

    def read() -> None:
        for batch in attention_rows(encoder, texts, "document"):
            batch.weights.cpu()

    times: dict[str, list[float]] = {"encode": [], "read": []}
    for number in range(args.rounds + 1):  # the first warms up
        for name, call in (("encode", encode), ("read", read))[:: 1 if number % 2 else -1]:
            began = time.process_time()  # of the processor: other work on the machine does not count
            call()
            if number:
                times[name].append(time.process_time() - began)
    ratios = [read / encode for encode, read in zip(times["encode"], times["read"], strict=True)]
    row = {"texts": args.texts, "model": args.model} | {name: [round(s, 1) for s in seconds] for name, seconds in times.items()}
    print(json.dumps(row | {"ratio": round(statistics.median(ratios), 2), "ratios": [round(r, 2) for r in ratios]} | conditions()))


def conditions() -> dict:
    return {"date": str(date.today()), "machine": platform.machine(), "cores": os.cpu_count()} | {
        name: version(name) for name in ("torch", "transformers")
    }


# ------------------------------------------------------------------------------------------------------------ the experiment


class Job(NamedTuple):
    """A line of --out: one side of one run on one labelled set, its shares and score, or what hiding tokens costs it."""

    what: str  # "shares" or "costs"
    data: Path
    side: Side
    prompt: str  # of the run, or of the run whose base it is
    seed: int | None

    @property
    def key(self) -> dict:
        run = None if self.side.run is None else Path(self.side.run).name
        return {"what": self.what, "set": set_name(self.data), "prompt": self.prompt, "run": run, "side": self.side.name}


def set_name(path: Path) -> str:
    return path.name.split(".")[0]


def jobs(runs: list[str], files: list[Path], steps: list[int] | None) -> list[Job]:
    """All lines, the ones that matter most first: bases and final adapters, then seed by seed what hiding costs, and kept adapters."""
    found, bases = [], set()
    for run in runs:
        prompt, seed = prompt_label(Contract.read(run).prompts), seed_of(run)
        for side in sides_of(run):
            if side.run is None and prompt in bases:
                continue
            bases.add(prompt)
            kept = side.name not in ("base", "adapter")
            if kept and steps and side.step not in steps:
                continue
            for path in files:
                found.append(((1 if kept else 0, seed, side.step), Job("shares", path, side, prompt, seed)))
                if not kept:
                    found.append(((1, -1 if side.run is None else seed, 0), Job("costs", path, side, prompt, seed)))
    return [job for _, job in sorted(found, key=lambda pair: (pair[0][0], pair[0][1], pair[1].what, pair[0][2] or 0))]


def labelled(path: Path, limit: int) -> tuple[list[str], list[str]]:
    """Texts and labels of the first `limit` rows of a fixed shuffle."""
    rows = [row for _, row in read_rows(path)]
    random.Random(0).shuffle(rows)
    return [row["text"] for row in rows[:limit]], [str(row["label"]) for row in rows[:limit]]


def shares_of(encoder: "Encoder", texts: list[str], labels: list[str], path: Path) -> dict:
    """V-measure, and how words were told apart; the shares of every text and layer are left in an .npz file."""
    import numpy as np

    from attention_analysis.categories import categorize
    from attention_analysis.effects import v_measure
    from attention_analysis.shares import measure
    from encoder import EncodingReport

    categories = categorize(encoder.tokenizer.backend_tokenizer, texts)
    by_layer, _ = measure(encoder, texts, categories, "document", EncodingReport(), Progress(0, "", "text", disable=True))

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as f:
            np.savez(f, by_layer=by_layer)

    write_atomic(path, write)
    score, ami = v_measure(encoder, texts, labels)
    return {"shares": path.name, "v_measure": score, "ami": ami, "how": categories.how, "fingerprint": encoder.fingerprint}


def costs_of(encoder: "Encoder", texts: list[str], labels: list[str]) -> dict:
    from attention_analysis.categories import categorize
    from attention_analysis.interventions import as_json, costs, names_of_tokens

    categories = categorize(encoder.tokenizer.backend_tokenizer, texts)
    found = costs(encoder, texts, labels, names_of_tokens(encoder, texts, categories), HIDDEN)
    return {"costs": as_json(found), "fingerprint": encoder.fingerprint}


def experiment(args: argparse.Namespace) -> None:
    done = [{name: row[name] for name in ("what", "set", "prompt", "run", "side")} for row in read_lines(args.out)]
    todo = [job for job in jobs(args.runs, args.data, args.kept) if job.key not in done and job.what in args.what]
    arrays = args.out.with_suffix(".shares")
    arrays.mkdir(parents=True, exist_ok=True)
    for number, job in enumerate(todo, 1):
        began = time.perf_counter()
        ((side, encoder),) = load_sides([job.side], dtype=args.dtype)
        texts, labels = labelled(job.data, args.limit)
        path = arrays / f"{set_name(job.data)}-{encoder.fingerprint}.npz"
        result = shares_of(encoder, texts, labels, path) if job.what == "shares" else costs_of(encoder, texts, labels)
        row = job.key | {"seed": job.seed, "step": side.step, "n_texts": len(texts)} | result
        append_line(args.out, json.dumps(row | {"seconds": round(time.perf_counter() - began), "date": str(date.today())}))
        print(f"{number} of {len(todo)}: {job.key}, {time.perf_counter() - began:.0f} s", flush=True)


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


# ---------------------------------------------------------------------------------------------------------------- the tables


def tables(args: argparse.Namespace) -> None:
    """All tables of what --out holds, in Markdown."""
    rows, folder = read_lines(args.out), args.out.with_suffix(".shares")
    shares, costs = ([row for row in rows if row["what"] == what] for what in ("shares", "costs"))
    places = list(dict.fromkeys((row["prompt"], row["set"]) for row in rows))
    print_shares(shares, places, folder)
    print_costs(costs, places)
    print_effects(shares, places, folder)


def print_rows(head: list[str], rows: list[list[str]]) -> None:
    print()
    for row in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(map(str, row))} |")


def of_place(rows: list[dict], place: tuple[str, str], folder: Path) -> tuple[list[dict], "np.ndarray"]:
    """Sides of one prompt on one set as `intervals.share_rows` takes them, in order of training, and shares (M, N, L, C).

    Only sides that as many runs have as have a final adapter.
    """
    import numpy as np

    here = [row for row in rows if (row["prompt"], row["set"]) == place]
    n_runs = sum(row["side"] == "adapter" for row in here)
    order = {"base": -1, "adapter": 10**9}
    here.sort(key=lambda row: (order.get(row["side"], row["step"]), row["seed"]))
    here = [row for row in here if row["side"] == "base" or sum(other["side"] == row["side"] for other in here) == n_runs]
    return here, np.stack([np.load(folder / row["shares"])["by_layer"] for row in here])


def print_shares(rows: list[dict], places: list[tuple[str, str]], folder: Path) -> None:
    """Shares in the last layer of base and final adapter, then content words' share and V-measure along the training.

    Shares in percent, with 95 % intervals over texts and runs; V-measure x 100, with its standard deviation over runs.
    """
    from attention_analysis.intervals import share_rows

    categories = ("bos", "prefix", "suffix", "content", "function", "punctuation")
    ends, curves = [], {}
    for place in places:
        models, by_layer = of_place(rows, place, folder)
        found = [row for row in share_rows(by_layer, models)[0] if row["layer"] == by_layer.shape[2]]
        curve = curves.setdefault(place, {})
        for side in dict.fromkeys(model["side"] for model in models):
            cells = {(row["category"], row["bos"]): row for row in found if row["side"] == side}
            scores = [100 * model["v_measure"] for model in models if model["side"] == side]
            score = f"{statistics.mean(scores):.1f}" + (f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else "")
            curve[side] = f"{100 * cells['content', True]['mean']:.1f}; {score}"
            if side in ("base", "adapter"):
                shown = [with_interval(cells[category, True]) for category in categories]
                ends.append([*place, side, len(scores), *shown, with_interval(cells["content", False])])
    print_rows(["prompt", "set", "side", "runs", *categories, "content, BOS left out"], ends)
    sides = list(dict.fromkeys(side for curve in curves.values() for side in curve))
    print_rows(["prompt", "set", *sides], [[*place, *(curve.get(side, "") for side in sides)] for place, curve in curves.items()])


def with_interval(row: dict) -> str:
    return "{:.1f} ({:.1f} to {:.1f})".format(*(100 * row[name] for name in ("mean", "low", "high")))


def print_costs(rows: list[dict], places: list[tuple[str, str]]) -> None:
    """What hiding costs in V-measure x 100, of runs their mean; intervals hold texts, k-means and the spread over runs."""
    for field, what in (("less_all", "less nothing hidden"), ("less_control", "less as many others hidden")):
        lines = []
        for prompt, name in places:
            for side in ("base", "adapter"):
                here = [row["costs"] for row in rows if (row["prompt"], row["set"], row["side"]) == (prompt, name, side)]
                cells = [mean_over_runs([cost[field] for cost in of_category]) for of_category in zip(*here, strict=True)]
                lines += [[prompt, name, side, len(here), *cells]] if here else []
        print_rows(["prompt", "set", "side", "runs", *(f"{name}, {what}" for name in HIDDEN)], lines)


def mean_over_runs(each: list[dict]) -> str:
    """The mean of one difference over runs, bold where its interval leaves zero out.

    All runs share the texts: their part of the interval does not shrink with more runs.
    """
    import numpy as np

    from evaluation.differences import interval, show

    values, texts, algorithm = (np.array([d[name] for d in each]) for name in ("difference", "sd_rows", "sd_algorithm"))
    over_runs = values.var(ddof=1) / len(values) if len(values) > 1 else 0
    found = interval(values.mean(), np.sqrt((texts**2).mean()), np.sqrt((algorithm**2).mean() / len(values) + over_runs))
    return show(found, verdict=False) if found.verdict == "cannot tell" else f"**{show(found, verdict=False)}**"


def print_effects(rows: list[dict], places: list[tuple[str, str]], folder: Path) -> None:
    """Spearman's correlation of content words' share in the last layer with V-measure, by prompt and set."""
    import numpy as np

    from attention_analysis.effects import Effect, content_effects, show

    lines = []
    for place in places:
        models, by_layer = of_place(rows, place, folder)
        for row in content_effects(models, by_layer, np.array([model["v_measure"] for model in models])):
            cells = (
                show(Effect(*(np.nan if value is None else value for value in row[name].values())))
                for name in ("within", "within_adapters", "within_given_step", "between")
            )
            lines.append([*place, "all tokens" if row["bos"] else "BOS left out", *cells])
    print_rows(["prompt", "set", "share of", "within runs", "adapters alone", "the step held constant", "between runs"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    add = commands.add_parser("memory").add_argument
    add("--tokens", type=int, default=32768, help="of the text (default 32768)")
    add("--ways", nargs="+", choices=WAYS, default=WAYS, help="ways of looking (default: all)")
    add("--worker", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    timing = commands.add_parser("time").add_argument
    timing("--model", default="tiny", help="a model (default tiny)")
    timing("--texts", type=int, default=10_000, help="how many (default 10000)")
    timing("--rounds", type=int, default=3, help="how often (default 3)")
    trial = commands.add_parser("experiment").add_argument
    trial("--runs", nargs="+", required=True, help="folders of runs")
    trial("--data", type=Path, nargs="+", required=True, help="files with the fields text and label")
    trial("--limit", type=int, default=1000, help="texts of each file (default 1000)")
    trial("--what", nargs="+", choices=("shares", "costs"), default=("shares", "costs"), help="default: both")
    trial("--dtype", default="auto", help="of the model (default auto: bfloat16 where it is fast)")
    trial("--kept", type=int, nargs="+", help="steps whose kept adapters are looked at (default: all)")
    trial("--out", type=Path, required=True, help="a JSONL file, appended to")
    commands.add_parser("table").add_argument("--out", type=Path, required=True, help="what experiment wrote")
    for name, call in (("memory", memory), ("time", speed), ("experiment", experiment), ("table", tables)):
        commands.choices[name].set_defaults(call=call)
    args = parser.parse_args()
    args.call(args)


if __name__ == "__main__":
    main()
