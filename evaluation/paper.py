"""--paper: the grid of the paper, Llama-3.2-1B and Qwen3-0.6B without a prompt, under the clustering prompt and tuned, on both tracks.

Published and measured figures stand in columns of their own: the former were computed by other programs, on samples of rows drawn
otherwise, and the paper does not say on which of mteb's two English tracks.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np

from encoder.contract import CONTRACT_FILE, Contract
from encoder.names import find_base, is_run
from evaluation import rows
from evaluation.sentence_transformer import PREFIX, is_sentence_transformer
from evaluation.task_choice import BENCHMARK, FORMER
from files.console import InputError, short_path, warn
from prompts import ROTH, prompt_label

MODELS = ("llama-3.2-1b", "qwen3-0.6b")
OF_OTHER_GRIDS = (
    *(
        "task",
        "benchmark",
        "data",
        "bundled",
        "texts",
        "facets",
        "sweep",
        "prompt",
        "query_prompt",
        "pooling",
        "scope",
        "layers",
        "keep_bos",
    ),
    *("attention_layer", "embed_filter", "token_prepending", "dims"),  # a base's row would stand beside figures of other vectors
)
PROMPTS, POOLING = ("none", "cluster"), "last"  # what the paper compares; its vectors are the last token's
QWEN = "Zhang et al. 2025, arXiv 2506.05176"


class Published(NamedTuple):
    """Mean V-measure x 100 of an English clustering track, as its source has it. prompt: of a row that --paper measures, else ""."""

    model: str
    setting: str
    v_measure: float
    track: str
    source: str
    prompt: str = ""


PUBLISHED = (
    Published("meta-llama/Llama-3.2-1B", "untuned, last token", 33.2, "not stated", ROTH, "none"),
    Published("meta-llama/Llama-3.2-1B", "untuned, clustering prompt", 46.8, "not stated", ROTH, "cluster"),
    Published("Qwen/Qwen3-Embedding-0.6B", "as published", 54.05, BENCHMARK, QWEN),
    Published("Qwen/Qwen3-Embedding-4B", "as published", 57.51, BENCHMARK, QWEN),
    Published("Qwen/Qwen3-Embedding-8B", "as published", 58.57, BENCHMARK, QWEN),
    Published("GritLM/GritLM-7B", "as published", 50.82, BENCHMARK, QWEN),
    Published("nvidia/NV-Embed-v2", "as published", 47.66, BENCHMARK, QWEN),
)


def fill(args: argparse.Namespace) -> None:
    """Take the paper's models where no others are named. Raises InputError for flags that would make it another grid."""
    if given := [name for name in OF_OTHER_GRIDS if getattr(args, name)]:
        raise InputError(f"--paper has its own tasks, prompts and pooling: leave --{given[0].replace('_', '-')} out")
    args.model = args.model or list(MODELS)


def grids(args: argparse.Namespace, failures: list[str]) -> list[argparse.Namespace]:
    """The flags of the grid's two parts: the bases under both prompts, then what keeps its contract or settings: runs and
    sentence-transformers models among --model, and the runs trained from the bases.

    Models that are not here, and cannot be fetched, are left out; why is added to `failures`.
    """
    bases, others = [], []
    for spec in args.model:
        try:
            rows.check_model(spec, args.trust_remote_code)
            (others if is_run(spec) or is_sentence_transformer(spec) else bases).append(spec)
        except InputError as error:
            failures.append(str(error))
    named = {Path(spec).resolve() for spec in others}
    others += [run for run in runs_of({find_base(spec)[0] for spec in bases}) if Path(run).resolve() not in named]
    untuned = {"model": bases, "prompt": list(PROMPTS), "pooling": [POOLING]}
    once = [name for name in args.baselines or [] if name != "tfidf" or not bases]
    parts = [untuned, {"model": others, "baselines": once}]
    return [argparse.Namespace(**vars(args) | part) for part in parts if part["model"]]


def runs_of(bases: set[str]) -> list[str]:
    """The runs in runs/ that were trained from one of these bases, named as contracts name them."""
    runs = []
    for path in sorted(rows.RUNS.glob(f"*/{CONTRACT_FILE}")):
        try:
            if Contract.read(path.parent).base in bases:
                runs.append(str(path.parent))
        except InputError as error:
            warn(str(error))
    return runs


def measured(cells: list[dict], tracks: dict[str, list[str]]) -> list[dict]:
    """A row for each model and setting: its label, its base, its prompt, and {track: (mean V-measure x 100, tasks)}."""
    by_row = {}
    for cell in cells:
        by_row.setdefault((cell["model"], cell["fingerprint"]), []).append(cell)
    lines = []
    for (label, _), of_row in by_row.items():
        contract = of_row[0]["contract"]
        means = {}
        for track, tasks in tracks.items():
            scores = [100 * cell["score"] for cell in of_row if cell["task"] in tasks]
            means[track] = (float(np.mean(scores)), len(scores)) if scores else None
        untuned = contract is not None and contract["data"] is None and not label.startswith(short_path(rows.RUNS))
        prompt = prompt_label(contract["prompts"]) if untuned else ""
        base = contract["base"] if contract else label.removeprefix(PREFIX)  # one of sentence-transformers is what was published
        lines.append({"label": label, "base": base, "prompt": prompt, "means": means})
    return lines


def table(cells: list[dict]) -> list[str]:
    """What was measured beside what was published: lines of text. A mean names its tasks where it lacks some."""
    import mteb

    tracks = {
        track: [task.metadata.name for task in mteb.get_benchmark(track).tasks if task.metadata.type == "Clustering"]
        for track in (FORMER, BENCHMARK)
    }
    lines = [["mean V-measure, clustering", *(f"{track}, measured" for track in tracks), "published", "on", "source"]]
    left = list(PUBLISHED)
    for row in measured(cells, tracks):
        beside = next((p for p in left if (p.model, p.prompt) == (row["base"], row["prompt"])), None)
        if beside:
            left.remove(beside)
        values = [shown(mean, len(tracks[track])) for track, mean in row["means"].items()]
        lines.append([row["label"], *values, *(of_published(beside) if beside else ("-", "", ""))])
    lines += [[f"{p.model}, {p.setting}", *("-" for _ in tracks), *of_published(p)] for p in left]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(value.ljust(width) for value, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return [text[0], "-" * max(map(len, text)), *text[1:]]


def of_published(published: Published) -> tuple[str, str, str]:
    return f"{published.v_measure:.2f}".removesuffix("0"), published.track, published.source


def shown(mean: tuple[float, int] | None, n_tasks: int) -> str:
    if mean is None:
        return "-"
    return f"{mean[0]:.1f}" + (f" ({mean[1]} of {n_tasks} tasks)" if mean[1] < n_tasks else "")
