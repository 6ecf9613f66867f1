"""What each option of training brings: every option with several seeds, on 7,680 pairs or 8,192, scored on labelled texts.

    python bench/bench_options.py --data labelled/*.jsonl.gz --out options --jobs 2
    python bench/bench_options.py --data labelled/*.jsonl.gz --out options --only base "batch 32" --seeds 0 1

--data   JSONL files with the field text and one or both of label and domain; each field of labels makes a set of its own, of the
         first 2,048 rows of a fixed shuffle (scored by V-measure x 100, as in evaluate.py --data)
--mix    files of pairs for the options that mix several sources; without it those options are left out

All runs train the bundled model on the docstring pairs, with the learning rate scaled by the square root of the batch size.
Runs and scores that exist in --out are not made again, so that an interrupted call can be repeated. The table is printed after
every run, from what there is.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from files.reading import read_rows

ROOT = Path(__file__).resolve().parent.parent
ROWS, PAIRS, BATCH, LR = 2048, 7680, 96, 2e-3
# option -> flags in addition to those of the base: batch 96, temperature 0.05, prompt cluster, position-mean, the last step kept
OPTIONS = {
    "base": [],
    "batch 32": ["--batch-size", "32"],
    "batch 512": ["--batch-size", "512", "--chunk-size", "128"],
    "batch 2048": ["--batch-size", "2048", "--chunk-size", "128"],
    "temperature 0.02": ["--temperature", "0.02"],
    "temperature 0.1": ["--temperature", "0.1"],
    "temperature learned": ["--learn-temperature"],
    "prompt none": ["--prompt", "none"],
    "pooling last": ["--pooling", "last"],
    "pooling mean": ["--pooling", "mean"],
    "one hard negative": ["--pairs", "MINED"],
    "matryoshka 64 128": ["--matryoshka", "64", "128"],
    "best of validations": ["--hold-out", "256", "--validate-every", "10"],
    "patience 2": ["--hold-out", "256", "--validate-every", "10", "--patience", "2"],
    "pooling query": ["--pooling", "query"],
    "mixed sources": ["--pairs", "MIX"],
    "mixed sources, one a batch": ["--pairs", "MIX", "--same-source-batches"],
}
DIMS = {"base": 64, "matryoshka 64 128": 64}  # these are also scored on the first numbers of their vectors


def call(script: str, *flags, log: Path) -> None:
    with open(log, "a") as f:
        subprocess.run([sys.executable, ROOT / script, *map(str, flags)], check=True, stdout=f, stderr=f)


def labelled_sets(args: argparse.Namespace) -> list[Path]:
    """Write the labelled sets as evaluate.py reads them: text and label, one file each."""
    files = []
    for path in sorted(args.data):
        rows = [row for _, row in read_rows(path)]
        random.Random(0).shuffle(rows)
        for column in (c for c in ("label", "domain") if c in rows[0]):
            files.append(args.out / "sets" / f"{path.name.split('.')[0]}-{column}.jsonl")
            files[-1].parent.mkdir(parents=True, exist_ok=True)
            files[-1].write_text("".join(json.dumps({"text": r["text"], "label": r[column]}) + "\n" for r in rows[:ROWS]))
    return files


def write_mixed_sources(args: argparse.Namespace) -> None:
    """Write 6,000 random pairs of each file of --mix, with texts cut to 64 words: long ones would take most of the time."""
    for path in args.mix:
        rows = [row for _, row in read_rows(path)]
        rows = random.Random(0).sample(rows, min(6000, len(rows)))
        cut = [{k: " ".join(row[k].split()[:64]) for k in ("anchor", "positive")} for row in rows]
        out = args.out / "mix" / f"{path.name.split('.')[0]}.jsonl"
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("".join(json.dumps(row) + "\n" for row in cut))


def train_and_score(args: argparse.Namespace, files: list[Path], option: str, seed: int) -> None:
    """Train with one option and score the run on all labelled sets, unless that was done before."""
    name = f"{option.replace(' ', '-')}-{seed}"
    run, log = args.out / name, args.out / f"{name}.log"
    files_of = {"MINED": [args.out / "mined.jsonl"], "MIX": sorted((args.out / "mix").glob("*.jsonl"))}
    flags = [str(x) for flag in OPTIONS[option] for x in files_of.get(flag, [flag])]
    batch = int(flags[flags.index("--batch-size") + 1]) if "--batch-size" in flags else BATCH
    base = ["--model", "tiny", "--pairs", args.out / "pairs.jsonl", "--batch-size", batch, "--lr", LR * (batch / BATCH) ** 0.5]
    base += ["--steps", round(PAIRS / batch), "--pooling", "position-mean", "--scope", "all", "--hold-out", 0, "--seed", seed]
    if not (run / "summary.json").exists():
        call("train.py", *base, *flags, "--out", run, "--resume", log=log)
    for dims in (None, DIMS.get(option)):
        scores = args.out / (f"{name}.json" if dims is None else f"{name}-dims{dims}.json")
        if not scores.exists():
            more = ["--dims", dims, "--override-contract"] if dims else []
            call("evaluate.py", "--model", run, "--data", *files, "--dtype", "auto", *more, "--out", scores, log=log)


def read_scores(args: argparse.Namespace, option: str, suffix: str = "") -> dict[int, float]:
    """Seed -> mean V-measure x 100 over the labelled sets, of the runs that were scored."""
    scores = {}
    for seed in args.seeds:
        path = args.out / f"{option.replace(' ', '-')}-{seed}{suffix}.json"
        if path.exists():
            scores[seed] = 100 * statistics.mean(cell["score"] for cell in json.loads(path.read_text())["results"])
    return scores


def with_deviation(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def table(args: argparse.Namespace) -> str:
    lines = ["| option | mean V-measure | against base, by seed | seconds of training | seeds |", "|---|---|---|---|---|"]
    base = read_scores(args, "base")
    for option in OPTIONS:
        for dims in (None, *([DIMS[option]] if option in DIMS else [])):
            scores = read_scores(args, option, f"-dims{dims}" if dims else "")
            if not scores:
                continue
            differences = [scores[seed] - base[seed] for seed in scores if seed in base]
            change = with_deviation(differences) if differences and (option, dims) != ("base", None) else ""
            summaries = [args.out / f"{option.replace(' ', '-')}-{seed}" / "summary.json" for seed in scores]
            seconds = statistics.mean(json.loads(path.read_text())["seconds"] for path in summaries)
            name = f"{option}, first {dims} numbers" if dims else option
            lines.append(f"| {name} | {with_deviation(list(scores.values()))} | {change} | {seconds:.0f} | {len(scores)} |")
    return "\n".join(lines)


def main(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // args.jobs))  # more threads than cores spin
    options = args.only or [option for option, flags in OPTIONS.items() if args.mix or "MIX" not in flags]
    if not args.mix and any("MIX" in OPTIONS[option] for option in options):
        sys.exit("bench_options.py: the options with mixed sources need --mix")
    files = labelled_sets(args)
    write_mixed_sources(args)
    pairs, mined = args.out / "pairs.jsonl", args.out / "mined.jsonl"
    if not pairs.exists():
        call("make_pairs.py", "docstrings", "--out", pairs, log=args.out / "pairs.log")
    if any("MINED" in OPTIONS[o] for o in options) and not mined.exists():
        train_and_score(args, files, "base", args.seeds[0])
        source = ["--pairs", pairs, "--model", args.out / f"base-{args.seeds[0]}", "--negatives", 1]
        call("make_pairs.py", "mine", *source, "--out", mined, log=args.out / "pairs.log")
    with ThreadPoolExecutor(args.jobs) as pool:
        for done in [pool.submit(train_and_score, args, files, option, seed) for seed in args.seeds for option in options]:
            done.result()
            print(table(args), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", nargs="+", type=Path, required=True, help="labelled JSONL files, may be gzipped")
    parser.add_argument("--mix", nargs="+", type=Path, default=[], help="files of pairs from different sources (default: none)")
    parser.add_argument("--out", type=Path, required=True, help="a folder for runs and scores")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds of every option (default 0 1 2)")
    parser.add_argument("--only", nargs="+", choices=OPTIONS, help="default: all options")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time (default 1)")
    main(parser.parse_args())
