"""How well do patch features tell the classes of slides? Multiple-instance learning on bags, patients in folds, an external cohort.

    python -m pathology.evaluate_slides feats/ --labels labels.csv
    python -m pathology.evaluate_slides feats/ --labels labels.csv --aggregator gated mean transformer --folds 5 --out runs/mil
    python -m pathology.evaluate_slides feats-mine/ --labels labels.csv --external CPTAC --against feats-frozen/

Reads feats/SLIDE.h5 of extract.py, and a csv with columns slide, label, patient and perhaps cohort. All slides of a patient are in one
fold. In every fold a model learns from the other folds, less a sixth of their patients, whose loss says when to stop. AUROC is that of
the slides of all folds together; of several classes it is the mean of one against the rest. Intervals are of 95 %, and redraw patients.
Slides of the cohorts in --external are never learned from: the model that is trained on all others scores them. With --against, the
same is done with other features of the same slides, and the differences are shown, paired by patient.

Leaves behind, in --out (default: nothing): the model of the first aggregator that is trained on all slides but the external ones
(model.safetensors, config.json; heatmap.py reads it), and results.json with all scores and the class shares of every slide.
"""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from files.arguments import not_negative, positive_int, seed
from files.console import InputError, Progress, run_script, say, warn
from files.writing import check_absent, check_writable, errors_of_writing, write_json
from pathology.files import FEATURE_ATTRIBUTES, h5_files, read_features, read_labels

if TYPE_CHECKING:
    import numpy as np
    import torch

    from pathology.mil import Mil

AGGREGATORS = ("gated", "mean", "transformer")
IN_MEMORY = 8 * 2**30  # bytes of features
HELD_OUT = 6  # one in so many training patients says when to stop


# ------------------------------------------------------------------------------------------------------- the command line


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pathology.evaluate_slides", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("features", type=Path, help="folder of extract.py: a file of features a slide")
    add("--labels", type=Path, required=True, help="csv: slide, label, patient and perhaps cohort")
    add("--against", type=Path, help="features of the same slides by another model, to be compared with (default: none)")
    add("--external", nargs="+", default=[], metavar="COHORT", help="cohorts that are scored only (default: none)")
    add("--aggregator", nargs="+", choices=AGGREGATORS, default=["gated", "mean"], help="one or several (default gated mean)")
    add("--folds", type=positive_int, default=5, help="of patients (default 5)")
    add("--hidden", type=positive_int, default=256, help="width behind the features (default 256)")
    add("--epochs", type=positive_int, default=50, help="passes over the bags at most (default 50)")
    add("--patience", type=positive_int, default=10, help="end after so many passes without a lower held-out loss (default 10)")
    add("--bags", type=positive_int, default=8, help="slides of a step (default 8)")
    add("--lr", type=not_negative, default=2e-4, help="learning rate (default 2e-4)")
    add("--weight-decay", type=not_negative, default=1e-3, help="of AdamW (default 1e-3)")
    add("--seed", type=seed, default=0, help="of folds, weights and order (default 0)")
    add("--device", help="cpu, cuda or cuda:N (default: cuda if there is a GPU, else cpu)")
    add("--out", type=Path, help="folder for the model and results.json (default: print the table only)")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    if args.folds < 2:
        raise InputError(f"--folds {args.folds}: take 2 or more")
    if args.hidden % 4:
        raise InputError(f"--hidden {args.hidden}: take a multiple of 4, the heads of the transformer")
    if args.out:
        check_absent(args.out)
        check_writable(args.out)


# ---------------------------------------------------------------------------------------------------------------- bags


class Bags(NamedTuple):
    """S slides with features and label."""

    slides: "np.ndarray"  # (S,) names
    labels: "np.ndarray"  # (S,)
    patients: "np.ndarray"  # (S,)
    cohorts: "np.ndarray"  # (S,)
    features: "BagFiles"  # S times (n, D), as they were stored
    source: dict  # model and fingerprint

    @property
    def classes(self) -> list[str]:
        return sorted(set(self.labels.tolist()))


class BagFiles:
    """The features (n, D) of S slides: kept in memory up to IN_MEMORY bytes, and read again beyond."""

    def __init__(self):
        self.paths, self.lengths, self.kept, self.size = [], [], {}, 0

    def add(self, path: Path, features: "np.ndarray") -> None:
        if self.size + features.nbytes <= IN_MEMORY:
            self.kept[len(self.paths)] = features
            self.size += features.nbytes
        self.paths.append(path)
        self.lengths.append(len(features))

    def __getitem__(self, i: int) -> "torch.Tensor":
        import torch

        return torch.from_numpy(self.kept[i] if i in self.kept else read_features(self.paths[i]).features)


def read_bags(folder: Path, labels: Path) -> Bags:
    """The slides of a folder that `labels` names; damaged and empty ones are left out and counted. Raises InputError."""
    import numpy as np

    known, rows, bags, sources, unnamed, left_out = read_labels(labels), [], BagFiles(), {}, [], {}
    for path in h5_files(folder, "features"):
        if path.stem not in known:
            unnamed.append(path.stem)
            continue
        try:
            bag = read_features(path)
        except InputError as error:
            left_out[path.stem] = str(error)
            continue
        if not len(bag.features) or not np.isfinite(bag.features).all():
            left_out[path.stem] = "its features are not finite" if len(bag.features) else "it has no patches"
            continue
        rows.append(known[path.stem])
        bags.add(path, bag.features)
        sources[(*(bag.attributes[name] for name in FEATURE_ATTRIBUTES[:2]), bag.features.shape[1])] = path.name
    if unnamed:
        warn(f"{folder}: {len(unnamed)} left out that {labels} does not name, such as {unnamed[0]}")
    if left_out:
        name, why = next(iter(left_out.items()))
        warn(f"{folder}: {len(left_out)} left out, such as {name}: {why}")
    if absent := [name for name in known if name not in left_out and name not in {row.slide for row in rows}]:
        warn(f"{folder}: no features of {len(absent)} of {len(known)} slides in {labels}, such as {absent[0]}")
    if not rows:
        raise InputError(f"{folder}: no slide of {labels} has features there")
    if len(sources) > 1:
        (one, two), *_ = zip(sources.values(), list(sources.values())[1:], strict=False)
        raise InputError(f"{folder}: {one} and {two} were made by different models: extract all slides by one")
    (model, fingerprint, _), *_ = sources
    columns = (np.array([getattr(row, name) for row in rows]) for name in ("slide", "label", "patient", "cohort"))
    return Bags(*columns, bags, {"model": model, "fingerprint": fingerprint})


def folds_of(bags: Bags, internal: "np.ndarray", n_folds: int, seed: int) -> "np.ndarray":
    """Number of the fold (S,) of each slide, -1 of external ones: patients stay together, classes are spread.

    Raises InputError where there are too few classes or patients.
    """
    import numpy as np
    from sklearn.model_selection import StratifiedGroupKFold

    rows = np.flatnonzero(internal)
    if len(bags.classes) < 2:
        raise InputError(f"all slides with features have the label {bags.classes[0]!r}: a model needs two classes")
    for label in bags.classes:
        n = len(set(bags.patients[rows][bags.labels[rows] == label]))
        if n < n_folds:
            raise InputError(f"class {label!r} has {n} patient{'s' * (n != 1)} in the internal cohorts: fewer than --folds {n_folds}")
    folds = np.full(len(bags.slides), -1)
    splitter = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
    for i, (_, held_out) in enumerate(splitter.split(rows, bags.labels[rows], bags.patients[rows])):
        folds[rows[held_out]] = i
    for i in range(n_folds):
        _, held_out = hold_out(bags, np.flatnonzero((folds >= 0) & (folds != i)), seed)
        if not len(held_out):
            raise InputError(f"--folds {n_folds}: fold {i + 1} leaves one patient a class, none to hold out: take more folds or patients")
    return folds


# ------------------------------------------------------------------------------------------------------------ learning


def fit(bags: Bags, rows: "np.ndarray", aggregator: str, args: argparse.Namespace) -> "Mil":
    """A model trained on these slides; a sixth of their patients are held out, and their loss says which pass is kept."""
    import copy

    import numpy as np
    import torch
    from torch.nn import functional

    from encoder.runtime import pick_device
    from pathology.mil import FORMAT, Mil

    device, rng = pick_device(args.device), np.random.default_rng(args.seed)
    torch.manual_seed(args.seed)
    learned, held_out = hold_out(bags, rows, args.seed)
    config = {"format": FORMAT, "aggregator": aggregator, "dim": bags.features[0].shape[1], "hidden": args.hidden}
    model = Mil(config | {"classes": bags.classes, "features": bags.source})
    model.standardize_by(bags.features[i] for i in learned)
    model.to(device)
    codes = torch.tensor(np.searchsorted(bags.classes, bags.labels), device=device)
    weights = len(learned) / (len(bags.classes) * torch.bincount(codes[learned], minlength=len(bags.classes)).clamp(min=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    best, kept, since = float("inf"), copy.deepcopy(model.state_dict()), 0
    for _ in range(args.epochs):
        model.train()
        order = rng.permutation(learned)
        for start in range(0, len(order), args.bags):
            learn(model, optimizer, bags, order[start : start + args.bags], codes, weights)
        with torch.no_grad():
            loss = functional.cross_entropy(logits_of(model, bags, held_out), codes[held_out], weights).item()
        since = 0 if loss < best else since + 1
        if loss < best:
            best, kept = loss, copy.deepcopy(model.state_dict())
        if since == args.patience:
            break
    model.load_state_dict(kept)
    return model.eval()


def learn(model: "Mil", optimizer, bags: Bags, batch: "np.ndarray", codes: "torch.Tensor", weights: "torch.Tensor") -> None:
    """One step on these slides. The loss is cross entropy, classes weighted alike; large bags go through memory one after the other."""
    from torch.nn import functional

    from pathology.mil import groups_of, pack

    optimizer.zero_grad()
    for group in groups_of(bags.features.lengths[i] for i in batch):
        features, cu_seqlens = pack([bags.features[batch[i]] for i in group])
        logits, _ = model(features.to(codes.device), cu_seqlens.to(codes.device))
        loss = functional.cross_entropy(logits, codes[batch[group]], weights, reduction="sum") / weights[codes[batch]].sum()
        loss.backward()
    optimizer.step()


def hold_out(bags: Bags, rows: "np.ndarray", seed: int) -> tuple["np.ndarray", "np.ndarray"]:
    """Slides to learn from, and those of a sixth of the patients, of every class where it has two patients.

    Who has slides of several classes counts for each of them: otherwise none of few patients may be left to learn from.
    """
    import numpy as np

    rng, chosen = np.random.default_rng(seed), set()
    for label in bags.classes:
        patients = np.unique(bags.patients[rows][bags.labels[rows] == label])
        if len(patients) > 1:
            others = [patient for patient in rng.permutation(patients).tolist() if patient not in chosen]
            chosen |= set(others[: max(0, max(1, len(patients) // HELD_OUT) - (len(patients) - len(others)))])
    held_out = np.isin(bags.patients[rows], list(chosen))
    return rows[~held_out], rows[held_out]


def logits_of(model: "Mil", bags: Bags, rows: "np.ndarray") -> "torch.Tensor":
    """(n, C) by the model in eval mode, a slide at a time."""
    import torch

    from pathology.mil import pack

    model.eval()
    device = model.mean.device
    with torch.no_grad():
        packed = (pack([bags.features[i]]) for i in rows)
        return torch.cat([model(features.to(device), cu_seqlens.to(device))[0] for features, cu_seqlens in packed])


def shares_of(bags: Bags, folds: "np.ndarray", aggregator: str, args: argparse.Namespace) -> tuple["np.ndarray", "Mil"]:
    """Class shares (S, C) of every slide by a model that has not seen its patient, and the model trained on all internal slides."""
    import numpy as np
    import torch

    shares = np.zeros((len(bags.slides), len(bags.classes)))
    with Progress(args.folds + 1, aggregator, "model") as progress:
        for fold in range(args.folds):
            model = fit(bags, np.flatnonzero((folds >= 0) & (folds != fold)), aggregator, args)
            rows = np.flatnonzero(folds == fold)
            shares[rows] = torch.softmax(logits_of(model, bags, rows), 1).cpu().numpy()
            progress.update()
        model = fit(bags, np.flatnonzero(folds >= 0), aggregator, args)
        if len(rows := np.flatnonzero(folds < 0)):
            shares[rows] = torch.softmax(logits_of(model, bags, rows), 1).cpu().numpy()
    return shares, model


# --------------------------------------------------------------------------------------------------------------- table


def scores_of(bags: Bags, rows: "np.ndarray", shares: "np.ndarray") -> dict | None:
    """AUROC of these slides, its redraws (R,) and their interval; None where they have one class alone."""
    import numpy as np

    from pathology.scores import auroc, interval, patient_redraws, redrawn_auroc

    labels = bags.labels[rows]
    if len(set(labels)) < 2:
        return None
    drawn = patient_redraws(bags.patients[rows])
    weights = np.stack([drawn[patient] for patient in bags.patients[rows]])
    redrawn = redrawn_auroc(labels, shares[rows], bags.classes, weights)
    return {"auroc": auroc(labels, shares[rows], bags.classes), "interval": interval(redrawn), "redrawn": redrawn}


def table_of(bags: Bags, folds: "np.ndarray", shares: dict[str, "np.ndarray"], external: list[str]) -> dict[str, dict[str, dict]]:
    """Scores by row and by where: "folds" and every external cohort that has two classes."""
    import numpy as np

    places = {"folds": np.flatnonzero(folds >= 0)} | {name: np.flatnonzero(bags.cohorts == name) for name in external}
    table = {row: {where: scores_of(bags, rows, values) for where, rows in places.items()} for row, values in shares.items()}
    for where in external:
        if any(scores[where] is None for scores in table.values()):
            warn(f"cohort {where} has slides of one class alone: no AUROC")
    return {row: {where: score for where, score in scores.items() if score} for row, scores in table.items()}


def warn_of_few_patients(bags: Bags, folds: "np.ndarray", external: list[str]) -> None:
    from pathology.scores import FEW_PATIENTS

    for where, rows in {"folds": folds >= 0, **{name: bags.cohorts == name for name in external}}.items():
        if (n := len(set(bags.patients[rows]))) < FEW_PATIENTS:
            warn(f"{where}: {n} patient{'s' * (n != 1)}, too few for an interval to rely on")


def print_table(table: dict[str, dict[str, dict]], against: dict[str, dict[str, dict]] | None) -> None:
    from pathology.scores import interval

    places, width = list(next(iter(table.values()))), max(map(len, table)) + 2
    say("AUROC".ljust(width) + "".join(where.ljust(58 if against else 26) for where in places).rstrip())
    for row, scores in table.items():
        line = row.ljust(width)
        for where, score in scores.items():
            text = f"{score['auroc']:.3f} ({score['interval'][0]:.3f} to {score['interval'][1]:.3f})"
            if against:
                other = against[row][where]
                low, high = interval(score["redrawn"] - other["redrawn"])
                score["difference"], score["difference_interval"] = score["auroc"] - other["auroc"], (low, high)
                text += f" {score['difference']:+.3f} ({low:+.3f} to {high:+.3f})"
            line += text.ljust(58 if against else 26)
        say(line.rstrip())


def same_slides(bags: Bags, others: Bags, folder: Path) -> None:
    if bags.slides.tolist() != others.slides.tolist():
        differing = sorted(set(bags.slides.tolist()) ^ set(others.slides.tolist()))
        raise InputError(f"--against {folder}: other slides than in the first folder, such as {differing[0]}: compare the same ones")


def main(args: argparse.Namespace) -> None:
    check_arguments(args)
    began = time.perf_counter()
    import numpy as np

    bags = read_bags(args.features, args.labels)
    others = read_bags(args.against, args.labels) if args.against else None
    if others:
        same_slides(bags, others, args.against)
    if unknown := sorted(set(args.external) - set(bags.cohorts)):
        raise InputError(f"--external {unknown[0]}: {args.labels} has no such cohort with features")
    check_cohorts(bags, args.external)
    folds = folds_of(bags, ~np.isin(bags.cohorts, args.external), args.folds, args.seed)
    n = bags.features.lengths
    say(f"{len(n)} slides of {len(set(bags.patients))} patients, {min(n):,} to {max(n):,} patches, classes {', '.join(bags.classes)}")
    fitted = {aggregator: shares_of(bags, folds, aggregator, args) for aggregator in args.aggregator}
    table = table_of(bags, folds, {name: shares for name, (shares, _) in fitted.items()}, args.external)
    against = None
    if others:
        shares = {name: shares_of(others, folds, name, args)[0] for name in args.aggregator}
        against = table_of(others, folds, shares, args.external)
    print_table(table, against)
    warn_of_few_patients(bags, folds, args.external)
    say(f"{args.folds} folds, 95 % intervals by redrawing patients" + ("; differences: less --against" if against else ""))
    if args.out:
        write_results(args, bags, folds, fitted, table, time.perf_counter() - began)


def check_cohorts(bags: Bags, external: list[str]) -> None:
    """Raise InputError for a patient who is in an external cohort and elsewhere."""
    outside = {patient for patient, cohort in zip(bags.patients, bags.cohorts, strict=True) if cohort in external}
    inside = {patient for patient, cohort in zip(bags.patients, bags.cohorts, strict=True) if cohort not in external}
    if both := sorted(outside & inside):
        raise InputError(f"patient {both[0]} is in an external cohort and in another one: give each patient one cohort")


def write_results(args, bags: Bags, folds: "np.ndarray", fitted: dict, table: dict, elapsed: float) -> None:
    """The model of the first aggregator, and results.json."""
    from pathology.mil import save_mil

    with errors_of_writing(args.out):
        args.out.mkdir(parents=True)
    save_mil(fitted[args.aggregator[0]][1], args.out)
    scores = {row: {w: {k: v for k, v in s.items() if k != "redrawn"} for w, s in where.items()} for row, where in table.items()}
    rows = zip(bags.slides, bags.labels, bags.patients, bags.cohorts, folds, strict=True)
    slides = [
        {"slide": str(slide), "label": str(label), "patient": str(patient), "cohort": str(cohort), "fold": int(fold)}
        | {name: shares[i].round(6).tolist() for name, (shares, _) in fitted.items()}
        for i, (slide, label, patient, cohort, fold) in enumerate(rows)
    ]
    arguments = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    result = {"arguments": arguments, "features": bags.source, "classes": bags.classes, "seconds": round(elapsed, 1)}
    write_json(args.out / "results.json", result | {"scores": scores, "slides": slides})
    say(f"{args.out}: the {args.aggregator[0]} model of all internal slides, and results.json")


if __name__ == "__main__":
    run_script(lambda: main(build_parser().parse_args()))
