"""Did the adaptation help? Probes on patch features of held-out patients, beside the baselines that a model has to beat.

    python -m pathology.evaluate_patches patches.zip --pattern '(?P<patient>[0-9]+)_.*class(?P<label>[01])' --model runs/mine
    python -m pathology.evaluate_patches tiles/ --labels labels.csv --model runs/mine dinov2-small --out results.json
    python -m pathology.evaluate_patches --summary seed0.json seed1.json seed2.json      # several splits in one table

Reads what finetune.py reads. Patients are divided as there (--split-seed, or the column split of --labels): probes learn from training
patients, validation patients choose the regularization, test patients give the scores; a patient in two splits is an error. Three
baselines are always shown:

    colour histogram    512 numbers that see no structure at all
    random              the architecture of the first model with random weights
    frozen              the model that each run of --model began with

Every row is scored on the test patches as they are, with their stains shifted (haematoxylin times 1.25, eosin times 0.75), and in grey
(pathology/shifts.py); the probes know the unchanged ones alone. Intervals are of 95 %, and redraw patients, the same in every row.

Leaves behind, in --out (default: nothing): the scores of every row, and labels, patients and class shares of every test patch, from
which --summary pools seeds: each split has a run of its own, trained on its training patients.
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from encoder.contract import ARGUMENTS_FILE
from files.arguments import positive_int, seed
from files.console import InputError, Progress, run_script, say, warn
from files.writing import check_absent, check_writable, errors_of_writing, write_json

if TYPE_CHECKING:
    import numpy as np

    from pathology.models import PatchModel
    from pathology.patches import Patches

HISTOGRAM, RANDOM, FROZEN, TUNED = "colour histogram", "random", "frozen", "fine-tuned"
PROBES = ("kNN", "logistic")
RANDOM_SEED = 1_000_003  # of the random baseline: not one that a run would begin with


# ------------------------------------------------------------------------------------------------------- the command line


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pathology.evaluate_patches", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("source", type=Path, nargs="?", help="tiles with pixels (tile.py --save-pixels), or a folder or zip of pictures")
    add("--model", nargs="+", default=[], help="runs of finetune.py, presets, folders, hub ids")
    add("--revision", help="of a hub model (default: the newest)")
    add("--labels", type=Path, help="csv: slide, label, patient of tiles; file, label, patient and perhaps split of pictures")
    add("--pattern", help="regular expression with groups label and patient that fits the names of pictures, in place of --labels")
    add("--split-seed", type=seed, default=0, help="draws the patients of training, validation and test (default 0)")
    add("--batch", type=positive_int, default=128, help="patches per forward pass (default 128)")
    add("--dtype", default="auto", help="auto, float32 or bfloat16 (default auto: bfloat16 where it is fast)")
    add("--device", help="cpu, cuda or cuda:N (default: cuda if there is a GPU, else cpu)")
    add("--out", type=Path, help="a JSON file with scores and class shares (default: print the table only)")
    add("--summary", type=Path, nargs="+", metavar="FILE", help="pool the files that --out left of several splits, and evaluate nothing")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    if args.summary:
        return
    if args.source is None or not args.model:
        raise InputError("name the patches and a --model, or files of earlier results with --summary")
    if not args.labels and not args.pattern:
        raise InputError("say where labels and patients come from: --labels FILE or --pattern REGEX")
    if args.labels and args.pattern:
        raise InputError("--labels and --pattern both name labels: take one of them")
    for flag, path in (("source", args.source), ("--labels", args.labels)):
        if path and not path.exists():
            raise InputError(f"{flag}: no file or folder {path}")
    if args.out:
        check_absent(args.out)
        check_writable(args.out)


# ---------------------------------------------------------------------------------------------------------------- rows


class Model(NamedTuple):
    """What `load_model` is given; the seed counts where weights are random."""

    name: str
    seed: int = 0


def arguments_of(model: str) -> dict | None:
    """The arguments of a run of finetune.py; None of another model. Raises InputError."""
    record = Path(model) / ARGUMENTS_FILE
    if not record.is_file():
        return None
    try:
        arguments = json.loads(record.read_text(encoding="utf-8"))["arguments"]
        if not (isinstance(arguments["init"], str) and isinstance(arguments["seed"], int)):
            raise TypeError
        return arguments
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{record} is damaged: the model that the run began with is not known") from None


def base_of(model: str) -> Model | None:
    """What a run of finetune.py began with; None of another model. Raises InputError."""
    arguments = arguments_of(model)
    return arguments and Model(arguments["init"], arguments["seed"] if arguments["init"].startswith("random:") else 0)


def check_division(args: argparse.Namespace, patches: "Patches") -> None:
    """Raise InputError for a run that learned from these patches by another division: it has seen patients that would be tested."""
    for model in args.model:
        run = arguments_of(model)
        if run is None or run.get("source") != str(args.source.resolve()):
            continue
        if not run.get("labels") and not run.get("pattern"):
            warn(f"{model} learned without labels from all patches of {args.source}: it has seen those of test patients")
        elif patches.splits is None and (drawn := run.get("split_seed", 0)) != args.split_seed:
            raise InputError(f"{model} learned by --split-seed {drawn}, {args.split_seed} would test patients it has seen: take {drawn}")


def rows_of(models: list[str]) -> dict[str, Model | None]:
    """Name of each row -> its model; None for the histogram. Baselines first; a base that several runs share stands there once."""
    runs = {model: base_of(model) for model in dict.fromkeys(models)}
    bases = list(dict.fromkeys(base for base in runs.values() if base))
    rows = {HISTOGRAM: None, RANDOM: Model(f"random:{models[0].removeprefix('random:')}", RANDOM_SEED)}
    rows |= {FROZEN if len(bases) == 1 else f"{FROZEN} {base.name}": base for base in bases}
    kinds = Counter(bool(base) for base in runs.values())
    for model, base in runs.items():
        if Model(model) in bases:
            continue
        name = TUNED if base else FROZEN
        rows[name if kinds[bool(base)] == 1 and name not in rows else f"{name} {Path(model).name}"] = Model(model)
    return rows


def load(model: Model, args: argparse.Namespace) -> "PatchModel":
    from pathology.models import load_model

    return load_model(model.name, revision=args.revision, device=args.device, dtype=args.dtype, seed=model.seed)


def features_of(patches: "Patches", numbers: "np.ndarray", model: "PatchModel | None", shift: str, batch: int) -> "np.ndarray":
    """Features (n, D) float32 of these patches under a shift; the colour histogram without a model."""
    import numpy as np

    from pathology.scores import colour_histogram
    from pathology.shifts import SHIFTS

    parts = []
    for start in range(0, len(numbers), batch):
        pixels = SHIFTS[shift](patches.pixels[numbers[start : start + batch]])
        parts.append(colour_histogram(pixels) if model is None else model.embed(pixels).cpu().numpy())
    features = np.concatenate(parts).astype(np.float32)
    if not np.isfinite(features).all():
        raise InputError(f"{model.name} gives numbers that are not finite: take --dtype float32, or make or fetch the model again")
    return features


def class_shares(patches: "Patches", split: "np.ndarray", model: "PatchModel | None", batch: int) -> dict[str, dict[str, list]]:
    """Class shares of the test patches by shift and probe: {shift: {probe: (n, C) as lists}}."""
    import numpy as np

    from pathology.scores import knn_probe, logistic_probe
    from pathology.shifts import SHIFTS

    numbers = {name: np.flatnonzero(split == name) for name in ("train", "validation", "test")}
    known = {name: features_of(patches, numbers[name], model, "clean", batch) for name in ("train", "validation")}
    labels = {name: patches.labels[rows] for name, rows in numbers.items()}
    probes = {
        PROBES[0]: knn_probe(known["train"], labels["train"]),
        PROBES[1]: logistic_probe(known["train"], labels["train"], known["validation"], labels["validation"]),
    }
    shares = {}
    for shift in SHIFTS:
        features = features_of(patches, numbers["test"], model, shift, batch)
        shares[shift] = {name: np.round(probe.predict_proba(features), 6).tolist() for name, probe in probes.items()}
    return shares


def evaluate(args: argparse.Namespace) -> dict:
    """What --out holds. Raises InputError where labels, patients or classes do not allow it."""
    import numpy as np

    from pathology.patches import read_patches

    patches = read_patches(args.source, args.labels, args.pattern)
    check_division(args, patches)
    split = patches.split(args.split_seed)
    check_classes(patches, split)
    test = np.flatnonzero(split == "test")
    rows = rows_of(args.model)
    result = {
        "source": str(args.source),
        "split_seed": args.split_seed,
        "models": {name: model and model._asdict() for name, model in rows.items()},
        "damaged": len(patches.damaged),
    }
    result["patches"] = {name: int((split == name).sum()) for name in ("train", "validation", "test")}
    result["patients"] = {name: len(set(patches.patients[split == name])) for name in ("train", "validation", "test")}
    result["test"] = {"labels": patches.labels[test].tolist(), "patients": patches.patients[test].tolist()}
    result["all_patients"] = sorted(set(patches.patients.tolist()))
    result["classes"] = sorted(set(patches.labels.tolist()))
    result["shares"] = {}
    with Progress(len(rows), "evaluating", "row") as progress:
        for name, model in rows.items():
            result["shares"][name] = class_shares(patches, split, load(model, args) if model else None, args.batch)
            progress.update(note=name)
    return result


def check_classes(patches: "Patches", split: "np.ndarray") -> None:
    """Raise InputError unless every patch has a label, and every split all classes."""
    if not patches.labelled:
        raise InputError("some patches have no label")
    classes = set(patches.labels.tolist())
    if len(classes) < 2:
        raise InputError(f"all patches have the label {min(classes)!r}: probes need two classes")
    for name in ("train", "validation", "test"):
        if missing := classes - set(patches.labels[split == name].tolist()):
            raise InputError(
                f"no {name} patient has a patch of class {min(missing)!r}: try another --split-seed, or name splits in --labels"
            )


# --------------------------------------------------------------------------------------------------------------- table


def redraws_of(results: list[dict], measure: str) -> dict[tuple[str, str, str], tuple["np.ndarray", "np.ndarray"]]:
    """By row, shift and probe: the score of each file (S,), and redrawn scores (R,), the mean over files.

    A redraw takes patients with replacement, the same for all rows and files; of several files it takes these with replacement as
    well, as other splits and seeds of training would have come out differently.
    """
    import numpy as np

    from pathology import scores

    point = {"balanced accuracy": scores.balanced_accuracy, "AUROC": scores.auroc}[measure]
    redrawn = {"balanced accuracy": scores.redrawn_balanced_accuracy, "AUROC": scores.redrawn_auroc}[measure]
    drawn = scores.patient_redraws(np.array(sorted({p for result in results for p in result["all_patients"]})))
    files = np.random.default_rng(1).multinomial(len(results), np.full(len(results), 1 / len(results)), size=scores.REDRAWS)  # (R, S)
    table = {}
    for row, shift, probe in cells(results):
        values, parts = [], []
        for result in results:
            labels, shares = np.array(result["test"]["labels"]), np.array(result["shares"][row][shift][probe])
            weights = np.stack([drawn[patient] for patient in result["test"]["patients"]])  # (n, R)
            values.append(point(labels, shares, result["classes"]))
            parts.append(redrawn(labels, shares, result["classes"], weights))
        table[row, shift, probe] = np.array(values), (np.stack(parts, 1) * files).sum(1) / len(results)
    return table


def cells(results: list[dict]) -> list[tuple[str, str, str]]:
    """Row, shift and probe of what all files have. Raises InputError where rows, classes or patients differ."""
    rows = [list(result["shares"]) for result in results]
    if any(names != rows[0] for names in rows):
        raise InputError(f"the files have different rows: {', '.join(rows[0])} and {', '.join(next(n for n in rows if n != rows[0]))}")
    if other := next((result["classes"] for result in results if result["classes"] != results[0]["classes"]), None):
        raise InputError(f"the files have different classes: {', '.join(results[0]['classes'])} and {', '.join(other)}")
    if any(result["all_patients"] != results[0]["all_patients"] for result in results):
        raise InputError("the files are of different patients: pool splits of one data set")
    return [(row, shift, probe) for row in rows[0] for shift in results[0]["shares"][row] for probe in PROBES]


def compared_with(row: str, rows: list[str]) -> str | None:
    """The row that a row is less of in the second table: a fine-tuned model its frozen one, others the colour histogram."""
    frozen = [name for name in rows if name.startswith(FROZEN)]
    return None if row == HISTOGRAM else frozen[0] if row.startswith(TUNED) and frozen else HISTOGRAM


def print_tables(results: list[dict]) -> dict:
    """Print scores and differences -> the same by shift, row, and probe and measure."""
    from pathology.scores import FEW_PATIENTS

    tables = {measure: redraws_of(results, measure) for measure in ("balanced accuracy", "AUROC")}
    rows, summary = list(results[0]["shares"]), {}
    width = max(map(len, rows)) + 2
    for shift in results[0]["shares"][rows[0]]:
        say(f"\n{shift:<{width}}" + "".join(f"{f'{probe} {measure}':<36}" for probe in PROBES for measure in tables))
        for row in rows:
            cells = {f"{probe} {measure}": cell(table, row, shift, probe, rows) for probe in PROBES for measure, table in tables.items()}
            summary.setdefault(shift, {})[row] = cells
            say(f"{row:<{width}}{''.join(f'{shown(value):<36}' for value in cells.values())}".rstrip())
    n = len({patient for result in results for patient in result["test"]["patients"]})
    redrawn = "patients and splits" if len(results) > 1 else "patients"
    if n < FEW_PATIENTS:
        warn(f"{n} test patient{'s' * (n != 1)}: too few for intervals, + and - prove nothing")
    say(f"\n{len(results)} split{'s' * (len(results) > 1)}, {n} test patients; 95 % intervals, by redrawing {redrawn}")
    say("behind a score: less the frozen model (fine-tuned) or the colour histogram (others), + better, - worse, = cannot tell")
    return summary


def cell(table: dict, row: str, shift: str, probe: str, rows: list[str]) -> dict:
    """A score, its interval, and how far it is from the row that it is compared with."""
    from pathology.scores import interval

    values, redrawn = table[row, shift, probe]
    result = {"score": float(values.mean()), "interval": interval(redrawn), "by_split": values.tolist()}
    if other := compared_with(row, rows):
        base, base_redrawn = table[other, shift, probe]
        result |= {"less": other, "difference": float((values - base).mean()), "difference_interval": interval(redrawn - base_redrawn)}
    return result


def shown(cell: dict) -> str:
    """Such as 0.842 (0.811 to 0.870) +0.013 +."""
    text = f"{cell['score']:.3f} ({cell['interval'][0]:.3f} to {cell['interval'][1]:.3f})"
    return f"{text} {cell['difference']:+.3f} {verdict(cell['difference_interval'])}" if "less" in cell else text


def verdict(bounds: tuple[float, float]) -> str:
    return "+" if bounds[0] > 0 else "-" if bounds[1] < 0 else "="


def read_result(path: Path) -> dict:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        assert {"shares", "test", "classes", "all_patients"} <= set(result)
        return result
    except (ValueError, TypeError, AssertionError):
        raise InputError(f"{path} is no result of evaluate_patches.py --out") from None


def main(args: argparse.Namespace) -> None:
    check_arguments(args)
    if args.summary:
        print_tables([read_result(path) for path in args.summary])
        return
    result = evaluate(args)
    say(", ".join(f"{n:,} {name} patches of {result['patients'][name]} patients" for name, n in result["patches"].items()))
    summary = print_tables([result])
    if args.out:
        with errors_of_writing(args.out):
            args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.out, result | {"scores": summary}, indent=0)


if __name__ == "__main__":
    run_script(lambda: main(build_parser().parse_args()))
