"""The scores of the table's rows, by mteb's own task classes, and the table and file that they are shown in."""

import argparse
import copy
import itertools
import os
import platform
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np

from evaluation.mteb_model import MtebModel
from evaluation.rows import other_rows_go_on, table_rows
from files.console import InputError, say
from files.writing import check_absent, write_json


def score(task, model: MtebModel) -> dict:
    """One cell of the table. mteb runs a fresh copy of the task, so that every row sees the same bootstrap samples."""
    import mteb

    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = mteb.evaluate(model, copy.deepcopy(task), cache=None, co2_tracker=False, show_progress_bar=False).task_results[0]
    about = task.metadata
    subsets = [scores for split in result.scores.values() for scores in split]
    cell = {
        "task": about.name,
        "type": about.type,
        "metric": about.main_score,
        "score": float(result.get_score()),
        "splits": {name: float(np.mean([scores["main_score"] for scores in split])) for name, split in result.scores.items()},
        "bootstrap_scores": None,
        "std": None,
        "model": model.label,
        "fingerprint": model.fingerprint,
        "contract": model.contract,
        "computed": model.computed,
        "seconds": round(time.perf_counter() - began, 2),
    }
    bootstraps = []  # a list for each subset and level
    if all("v_measures" in scores for scores in subsets):
        bootstraps = [level for scores in subsets for level in scores["v_measures"].values()]
        cell["ami"] = float(np.mean([scores["ami"] for scores in subsets]))
    elif all("scores_per_experiment" in scores for scores in subsets):
        name = about.main_score
        bootstraps = [[run[name] for run in scores["scores_per_experiment"] if name in run] for scores in subsets]
    if any(bootstraps):
        cell["bootstrap_scores"] = [value for values in bootstraps for value in values]
    if bootstraps and all(len(values) > 1 for values in bootstraps):
        cell["std"] = float(np.mean([np.std(values, ddof=1) for values in bootstraps]))
    return cell


def score_all(args: argparse.Namespace, tasks: list, failures: list[str]) -> Iterator[dict]:
    """The table's cells, one type of task after the other, each announced on standard error as soon as it is there.

    Why a cell is missing is added to `failures`.
    """
    tasks_of_type = defaultdict(list)
    for task in tasks:
        tasks_of_type[task.metadata.type].append(task)
    for task_type, same_type in tasks_of_type.items():
        for rows in table_rows(args, task_type, failures):
            for task, model in itertools.product(same_type, rows):
                cell = None
                with other_rows_go_on(args, failures):
                    cell = score(task, model)
                if cell is None:
                    continue
                say("{task}, {model}: {metric} {percent:.1f} ({seconds:.0f} s)".format(percent=100 * cell["score"], **cell), error=True)
                yield cell


def table(cells: list[dict]) -> str:
    """Rows are models, columns tasks, then their mean; scores times 100 ± standard deviation, in brackets AMI for clustering."""
    tasks = list(dict.fromkeys(cell["task"] for cell in cells))
    models = list(dict.fromkeys((cell["model"], cell["fingerprint"]) for cell in cells))
    by_place = {(cell["model"], cell["fingerprint"], cell["task"]): cell for cell in cells}
    metrics = {cell["task"]: cell["metric"].replace("_", "-") + (" (AMI)" if "ami" in cell else "") for cell in cells}

    def show(cell: dict | None) -> str:
        if cell is None:
            return "-"
        spread = "" if cell["std"] is None else f" ± {100 * cell['std']:.1f}"
        return f"{100 * cell['score']:.1f}{spread}" + (f" ({100 * cell['ami']:.1f})" if "ami" in cell else "")

    lines = [["model", *tasks, "mean", "fingerprint"], ["", *(metrics[task] for task in tasks), "", ""]]
    for model, fingerprint in models:
        row = [by_place.get((model, fingerprint, task)) for task in tasks]
        mean = f"{100 * np.mean([cell['score'] for cell in row]):.1f}" if all(row) else "-"
        lines.append([model, *map(show, row), mean, fingerprint])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = (0, len(widths) - 1)
    aligned = [
        [value.ljust(width) if i in left else value.rjust(width) for i, (value, width) in enumerate(zip(line, widths, strict=True))]
        for line in lines
    ]
    text = ["  ".join(line).rstrip() for line in aligned]
    computed = ", ".join(dict.fromkeys(cell["computed"] for cell in cells if cell["computed"]))
    notes = [f"vectors computed in {computed}"] * bool(computed)
    notes += ["±: standard deviation over mteb's bootstraps or repetitions"] * any(cell["std"] is not None for cell in cells)
    return "\n".join([*text[:2], "-" * max(map(len, text)), *text[2:], *notes])


def check_out(path: Path) -> None:
    """Raise InputError unless a new file can be written there. Nothing is made yet."""
    if path.is_dir():
        raise InputError(f"--out {path} is a folder: name a file, such as {path / 'results.json'}")
    check_absent(path)
    check_absent(partial(path))
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        why = "may not be written to" if folder.is_dir() else "is a file"
        raise InputError(f"--out {path}: {folder} {why}, choose another place")


def partial(out: Path) -> Path:
    """Where the scores of a run that fails are kept."""
    return out.with_name(out.name + ".partial")


def write_results(cells: list[dict], path: Path) -> None:
    """Write every cell and the versions of what computed it, in the format described at the top."""
    packages = ("mteb", "torch", "transformers", "peft", "scikit-learn", "numpy")
    versions = {package: version(package) for package in packages} | {"python": platform.python_version()}
    write_json(path, {"results": cells, "versions": versions}, indent=1)
    say(f"{path}: {len(cells)} scores")
