"""What a sweep costs beside encoding once: every pooling and layer of a prompt from one forward pass.

    python bench/bench_sweep.py --model tiny --texts 2000

One side encodes the texts under each of four prompts, with the pooling and layer that the prompt has by default; the other gives eight
poolings of three layers under each prompt, as `evaluate.py --sweep` does. The sweep's vectors of the default are compared with the first
side's before anything is timed. Sides alternate; the ratio is the median of the rounds' ratios. Scoring is not part of it. On a CPU
processor time is taken, which other work on the machine does not lengthen, elsewhere the time that passes.
"""

import argparse
import itertools
import json
import platform
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from encoder import Encoder, PoolingConfig
from encoder.contract import default_scope
from files.reading import read_rows

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ("none", "cluster", "prompt-eol", "knowledge")
POOLINGS = [
    *(("mean", scope) for scope in ("text", "all")),
    *(("position-mean", scope) for scope in ("text", "all")),
    ("last", "all"),
    ("max", "all"),
    ("last+mean", "all"),
    ("attention", "all"),
]
LAYERS = ((-1,), ("80%",), (-2,))


def bundled_texts(n: int) -> list[str]:
    texts = [row["text"] for path in sorted((ROOT / "tasks").glob("*.jsonl.gz")) for _, row in read_rows(path)]
    return [texts[i % len(texts)] for i in range(n)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", default="tiny")
    add("--texts", type=int, default=2000)
    add("--rounds", type=int, default=5)
    add("--dtype", default="auto")
    args = parser.parse_args()
    texts = bundled_texts(args.texts)
    encoders = [Encoder.load(args.model, prompt=prompt, dtype=args.dtype) for prompt in PROMPTS]
    grid = [PoolingConfig(pooling, scope, layers) for (pooling, scope), layers in itertools.product(POOLINGS, LAYERS)]

    def once() -> list[np.ndarray]:
        return [encoder.encode(texts) for encoder in encoders]

    def sweep() -> list[list[np.ndarray]]:
        return [encoder.encode(texts, poolings=grid) for encoder in encoders]

    for encoder, alone, together in zip(encoders, once(), sweep(), strict=True):
        pooling = encoder.contract.pooling
        same = together[grid.index(PoolingConfig(pooling, default_scope(pooling)))]
        if (cosine := float((alone * same).sum(1).min())) < 0.999:
            raise SystemExit(f"the sweep's vectors are others: cosine {cosine:.6f}")
    clock, times = time.process_time if encoders[0].device.type == "cpu" else time.perf_counter, {once: [], sweep: []}
    for number in range(args.rounds):
        for side in (once, sweep) if number % 2 == 0 else (sweep, once):
            began = clock()
            side()
            times[side].append(clock() - began)
    ratio = float(np.median(np.array(times[sweep]) / np.array(times[once])))
    once_seconds, sweep_seconds = (float(np.median(times[side])) for side in (once, sweep))
    print(
        f"{len(PROMPTS)} prompts once: {once_seconds:.2f} s; with {len(POOLINGS)} poolings of {len(LAYERS)} layers: {sweep_seconds:.2f} s"
    )
    print(f"ratio {ratio:.2f}")
    versions = {name: version(name) for name in ("torch", "transformers")} | {"python": platform.python_version()}
    about = {"date": str(date.today()), "model": args.model, "texts": args.texts, "dtype": str(encoders[0].dtype), "versions": versions}
    print(json.dumps(about | {"once": times[once], "sweep": times[sweep], "ratio": ratio}))


if __name__ == "__main__":
    main()
