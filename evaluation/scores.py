"""The scores of the table's rows, by mteb's own task classes, and the table and file that they are shown in."""

import argparse
import contextlib
import copy
import platform
import time
import warnings
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from evaluation import differences
from evaluation.baselines import is_baseline
from evaluation.differences import Row, Table
from evaluation.failures import others_go_on
from evaluation.finished import FinishedCells, partial
from evaluation.hub_data import loaded
from evaluation.mteb_model import MtebModel
from evaluation.observing import observed
from evaluation.report_map import KeptVectors
from evaluation.rows import check_baselines, table_rows
from evaluation.stored import StoredResults
from files.console import InputError, say
from files.writing import check_absent, check_writable, write_json

if TYPE_CHECKING:
    from mteb.results import TaskResult


class Stores(NamedTuple):
    """Where cells are kept besides the table.

    finished    for the same call, should this one be interrupted
    results     for any other call
    vectors     for the page; None: there is none
    """

    finished: FinishedCells = FinishedCells(None)
    results: StoredResults = StoredResults(None)
    vectors: KeptVectors | None = None

    def want_vectors(self, cell: dict) -> bool:
        """Whether the vectors behind a known cell have to be computed again: they are in no file."""
        return self.vectors is not None and self.vectors.wants(cell)


NOWHERE = Stores()


class Scores:
    """The table's cells, and what is known of their rows."""

    def __init__(self):
        self.cells: list[dict] = []
        self.evidence: Table = {}

    def tasks(self) -> list[str]:
        return list(dict.fromkeys(cell["task"] for cell in self.cells))

    def compare(self) -> list[str]:
        """Lines on which rows differ."""
        return differences.lines(self.evidence, self.tasks())

    def remarks(self) -> list[str]:
        """Those of them that are sentences."""
        return differences.remarks(self.evidence, self.tasks())


def score(task, model: MtebModel, evidence: Table | None = None, stores: Stores = NOWHERE) -> dict:
    """One cell of the table. mteb runs a fresh copy of the task, so that every row sees the same bootstrap samples.

    What is known of the rows behind the score is put into `evidence`, and all of it into the results and the vectors of `stores`.
    """
    import mteb

    began, about, pace = time.perf_counter(), task.metadata, (model.pace.texts, model.pace.seconds)
    fresh = copy.deepcopy(task)
    with warnings.catch_warnings(), observed(fresh) as seen:
        warnings.simplefilter("ignore")
        result = mteb.evaluate(model, fresh, cache=None, co2_tracker=False, show_progress_bar=False).task_results[0]
    cell = cell_of(task, model, result)
    n_texts, a_second = model.pace.since(*pace)
    seconds = round(time.perf_counter() - began, 2)
    cell |= {"rests_on": seen.rests_on(), "seconds": seconds, "texts": n_texts, "texts_per_second": a_second}
    known = seen.evidence()
    if evidence is not None and known:
        evidence.setdefault(row_of(model), {})[about.name] = known
    stores.results.add(task, model, result, cell, known)
    if stores.vectors is not None and seen.sample:
        stores.vectors.add(cell, seen.sample)
    model.texts = []  # they may be many
    return cell


def cell_of(task, model: MtebModel, result: "TaskResult") -> dict:
    """The cell of a result of mteb."""
    about = task.metadata
    subsets = [scores for split in result.scores.values() for scores in split]
    return {
        "task": about.name,
        "type": about.type,
        "metric": about.main_score,
        "score": float(result.get_score()),
        "splits": {name: float(np.mean([scores["main_score"] for scores in split])) for name, split in result.scores.items()},
        "bootstrap_scores": None,
        "std": None,
        "rests_on": "",
        "model": model.label,
        "fingerprint": model.fingerprint,
        "contract": model.contract,
        "computed": model.computed,
        "seconds": result.evaluation_time or 0.0,
        "texts": 0,
        "texts_per_second": None,
    } | repetitions(subsets, about.main_score)


def row_of(model: MtebModel) -> Row:
    return Row(model.label, model.fingerprint, model.grid, is_baseline(model.fingerprint))


def repetitions(subsets: list[dict], metric: str) -> dict:
    """Fields of a cell that mteb's repetitions of a score give: "bootstrap_scores", "std", and of clustering "ami"."""
    bootstraps, fields = [], {}  # a list for each subset and level
    if all("v_measures" in scores for scores in subsets):
        levels = [scores["v_measures"] for scores in subsets]
        bootstraps = [values for of_subset in levels for values in (of_subset.values() if isinstance(of_subset, dict) else [of_subset])]
    elif all("scores_per_experiment" in scores for scores in subsets):
        bootstraps = [[run[metric] for run in scores["scores_per_experiment"] if metric in run] for scores in subsets]
    if subsets and all("ami" in scores for scores in subsets):
        fields["ami"] = float(np.mean([scores["ami"] for scores in subsets]))
    if any(bootstraps):
        fields["bootstrap_scores"] = [value for values in bootstraps for value in values]
    if bootstraps and all(len(values) > 1 for values in bootstraps):
        fields["std"] = float(np.mean([np.std(values, ddof=1) for values in bootstraps]))
    return fields


def score_all(
    args: argparse.Namespace,
    tasks: list,
    failures: list[str],
    scores: Scores,
    stores: Stores = NOWHERE,
) -> None:
    """Fill `scores`, one type of task after the other; each cell is announced on standard error as soon as it is there.

    What is in `stores` is not computed again. Why a cell is missing is added to `failures`.
    """
    tasks_of_type, unreadable = defaultdict(list), set()
    for task in tasks:
        tasks_of_type[task.metadata.type].append(task)
    check_baselines(args, tasks_of_type)
    alone = len(tasks) == 1 and len(args.model or []) < 2 and not args.paper
    for task_type, same_type in tasks_of_type.items():
        for rows in table_rows(args, task_type, failures):
            n_before = len(scores.cells)
            for task in same_type:
                if task.metadata.name not in unreadable and not score_task(task, rows, failures, scores, stores, alone):
                    unreadable.add(task.metadata.name)
            keep_better(scores, n_before, {model.fingerprint for model in rows if model.better_of})


def score_task(task, rows: list[MtebModel], failures: list[str], scores: Scores, stores: Stores, alone: bool) -> bool:
    """Add a task's cells of these rows to `scores`. False where its data cannot be loaded, which then is known of all rows."""
    name = task.metadata.name
    with contextlib.ExitStack() as data:
        is_loaded = False
        for model in rows:
            with others_go_on(failures, f"{name}, {model.label}", alone=alone):
                cell = known_cell(task, model, scores.evidence, stores)
                if cell is None or stores.want_vectors(cell):
                    with others_go_on(failures, name, alone=alone):
                        if not is_loaded:
                            data.enter_context(loaded(task))
                            is_loaded = True
                    if not is_loaded:
                        return False
                    if cell is None:
                        cell = score(task, model, scores.evidence, stores)
                        stores.finished.add(task, cell, row_of(model), scores.evidence.get(row_of(model), {}).get(name))
                    else:
                        score(task, model, stores=Stores(vectors=stores.vectors))
                scores.cells.append(cell)
                say("{task}, {model}: {metric} {percent:.1f} ({seconds:.0f} s)".format(percent=100 * cell["score"], **cell), error=True)
    return True


def known_cell(task, model: MtebModel, evidence: Table, stores: Stores) -> dict | None:
    """A cell of an earlier call: of this table, or of another one with the same --results; else None."""
    if known := stores.finished.get(task, model):
        cell, row, of_rows = known
    elif known := stores.results.get(task, model):
        result, cell, of_rows = known
        row = row_of(model)
        cell = (cell or cell_of(task, model, result)) | {"model": model.label}
    else:
        return None
    if of_rows:
        evidence.setdefault(row, {})[cell["task"]] = of_rows
    return cell


def keep_better(scores: Scores, start: int, settings: set[str]) -> None:
    """Of the cells from `start` on, leave those of the better of these settings of one baseline (fingerprints), and say of what it is."""
    means = {fingerprint: [c["score"] for c in scores.cells[start:] if c["fingerprint"] == fingerprint] for fingerprint in settings}
    means = {fingerprint: float(np.mean(values)) for fingerprint, values in means.items() if values}
    if len(means) < 2:
        return
    best = max(sorted(means), key=means.get)
    labels = {cell["fingerprint"]: cell["model"] for cell in scores.cells[start:]}
    kept = [cell for cell in scores.cells[start:] if cell["fingerprint"] == best]
    for cell in kept:
        cell["better_than"] = {labels[other]: means[other] for other in means if other != best}
    scores.cells[start:] = kept
    for row in [row for row in scores.evidence if row.fingerprint in set(means) - {best}]:
        del scores.evidence[row]


def table(cells: list[dict]) -> str:
    """Rows are models, columns tasks, then their mean; scores times 100 ± standard deviation, in brackets AMI for clustering."""
    tasks = list(dict.fromkeys(cell["task"] for cell in cells))
    models = list(dict.fromkeys((cell["model"], cell["fingerprint"]) for cell in cells))
    by_place = {(cell["model"], cell["fingerprint"], cell["task"]): cell for cell in cells}
    metrics = {cell["task"]: cell["metric"].replace("_", "-") + (" (AMI)" if "ami" in cell else "") for cell in cells}
    rests_on = {cell["task"]: cell["rests_on"] for cell in cells}
    lines = [["model", *tasks, "mean", "fingerprint"], ["", *(metrics[task] for task in tasks), "", ""]]
    lines += [["", *(rests_on[task] for task in tasks), "", ""]] if any(rests_on.values()) else []
    n_head = len(lines)
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
    return "\n".join([*text[:n_head], "-" * max(map(len, text)), *text[n_head:], *notes(cells)])


def show(cell: dict | None) -> str:
    if cell is None:
        return "-"
    spread = "" if cell["std"] is None else f" ± {100 * cell['std']:.1f}"
    return f"{100 * cell['score']:.1f}{spread}" + (f" ({100 * cell['ami']:.1f})" if "ami" in cell else "")


def notes(cells: list[dict]) -> list[str]:
    """Lines below the table."""
    computed = ", ".join(dict.fromkeys(cell["computed"] for cell in cells if cell["computed"]))
    lines = [f"vectors computed in {computed}"] * bool(computed)
    lines += ["±: standard deviation over mteb's bootstraps or repetitions"] * any(cell["std"] is not None for cell in cells)
    better = {cell["model"]: cell["better_than"] for cell in cells if "better_than" in cell}
    lines.append(f"time by task (texts encoded a second): {', '.join(times(cells))}")
    for model, others in better.items():
        lines.append(f"{model}: chosen by these scores, " + ", ".join(f"{other} has {100 * mean:.1f}" for other, mean in others.items()))
    return lines


def times(cells: list[dict]) -> list[str]:
    """Such as "STS12 12 s (1,520)" for each task: seconds of all its rows, and texts encoded a second where any were."""
    lines = []
    for task in dict.fromkeys(cell["task"] for cell in cells):
        of_task = [cell for cell in cells if cell["task"] == task]
        encoded = [(cell["texts"], cell["texts_per_second"]) for cell in of_task if cell.get("texts_per_second")]
        pace = f" ({sum(n for n, _ in encoded) / sum(n / a_second for n, a_second in encoded):,.0f})" if encoded else ""
        lines.append(f"{task} {sum(cell['seconds'] for cell in of_task):,.0f} s{pace}")
    return lines


def check_out(path: Path, flag: str = "--out") -> None:
    """Raise InputError unless a new file can be written there. Nothing is made yet."""
    if path.is_dir():
        name = "results.json" if flag == "--out" else "report.html"
        raise InputError(f"{flag} {path} is a folder: name a file, such as {path / name}")
    check_absent(path, flag)
    if flag == "--out":
        FinishedCells(partial(path), writes=False)
    check_writable(path, flag)


def versions() -> dict[str, str]:
    """Of what computes scores."""
    packages = ("mteb", "torch", "transformers", "peft", "scikit-learn", "numpy")
    return {package: version(package) for package in packages} | {"python": platform.python_version()}


def as_json(scores: Scores) -> dict:
    """Every cell, what was compared, and the versions of what computed it, in the format described at the top of evaluate.py."""
    return {"results": scores.cells, **differences.as_json(scores.evidence, scores.tasks()), "versions": versions()}


def write_results(results: dict, path: Path) -> None:
    """Write what `as_json` gives, and perhaps more fields."""
    write_json(path, results, indent=1)
    say(f"{path}: {len(results['results'])} scores")
