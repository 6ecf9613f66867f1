"""evaluate.py --facets: do vectors follow the prompt? Each facet of the texts is a column of --data, with a prompt that names it.

V[i, j] is the V-measure (Rosenberg and Hirschberg 2007) of the clusters of the vectors under the prompt of facet i, as many as facet j has
labels, against these labels. One more prompt is neutral: --prompt, else what a model has without facets, `cluster` or a run's own.

    diagonal        mean over facets j of V[j, j]: every facet under its prompt
    over neutral    mean over j of V[j, j] - V[neutral, j]
    selectivity     mean over j of V[j, j] - the mean of V[i, j] over the other facets i: the gain over a wrong prompt. It is the
                    diagonal less the rest as well, since every prompt is wrong for every other facet

Intervals hold both uncertainties of `evidence.py`; rows are redrawn in all cells alike, k-means seeds are shared, and the mean is of these
facets alone. Each prompt is one forward pass, for all facets and poolings. Nothing is kept of an interrupted call.

--out: {"facets": {facet: {"prompt", "labels": how many}}, "texts", "nested": [[facet, in facet]], "models": [{"model", "contract" and
"fingerprint" by prompt, "computed", "matrix": [{"prompt": facet or "neutral", "facet", "v_measure", "ami"}], STATISTIC: {"value",
"interval", "sd_rows", "sd_algorithm", "verdict"}, ..., "by_facet": {facet: {"over neutral", "selectivity"}}, "less_first": {STATISTIC}}]}

Legend: N texts.
"""

import argparse
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from encoder.names import is_run, newest_run
from evaluation import evidence
from evaluation import rows as rows_of_table
from evaluation.differences import Difference, aligned, difference, show
from evaluation.evidence import MAX_ROWS, Evidence
from evaluation.mteb_model import MtebModel
from evaluation.observing import digest
from evaluation.rows import changes_to_run, model_rows, other_rows_go_on
from evaluation.sentence_transformer import is_sentence_transformer
from files.console import InputError, say
from files.reading import STDIN, as_label, as_text, column_names, display_name, excerpt, read_column, read_rows
from prompts import TASK_PROMPTS, each_prompt, get_prompt

NEUTRAL = "neutral"
STATISTICS = ("diagonal", "selectivity", "over neutral")
Cells = dict[tuple[str, str], Evidence]  # (facet of the prompt or NEUTRAL, facet of the labels)
Weights = dict[tuple[str, str], float]  # of cells: a statistic is their weighted sum


class Labelled(NamedTuple):
    name: str  # of the file
    texts: list[str]  # (N)
    labels: dict[str, np.ndarray]  # facet -> numbers (N,)


class Model(NamedTuple):
    label: str
    rows: dict[str, MtebModel]  # by prompt
    cells: Cells


# --------------------------------------------------------------------------------------------------------- what is asked for


def facet(text: str) -> tuple[str, str]:
    """ "intent=PROMPT" -> ("intent", "PROMPT"). Raises argparse.ArgumentTypeError."""
    column, _, prompt = text.partition("=")
    if not column or not prompt:
        raise argparse.ArgumentTypeError(f"{text!r} is no FACET=PROMPT: a column of --data, and a prompt that names what it holds")
    return column, prompt


def prompts_of(args: argparse.Namespace) -> dict[str, str | None]:
    """The prompt of each facet, and the neutral one; None: what a model has without facets."""
    return dict(args.facets) | {NEUTRAL: args.prompt[0] if args.prompt else None}


def under(args: argparse.Namespace, prompt: str | None, spec: str | None) -> argparse.Namespace:
    """The flags for one model (None: the newest run) and one prompt."""
    return argparse.Namespace(**vars(args) | {"prompt": prompt and [prompt], "model": spec and [spec], "pooling": pooling_of(args, spec)})


def pooling_of(args: argparse.Namespace, spec: str | None) -> list[str] | None:
    """--pooling, else one default for all prompts of an untuned base, so that nothing but the prompt tells them apart; None for a run."""
    if args.pooling or (is_run(spec) if spec else newest_run(rows_of_table.RUNS)):
        return args.pooling
    roles = [get_prompt(prompt or TASK_PROMPTS["Clustering"]).roles()["document"] for prompt in prompts_of(args).values()]
    return ["last" if any(prompt["suffix"] for role in roles for prompt in each_prompt(role)) else "mean"]


def check_facets(args: argparse.Namespace) -> None:
    """Raise InputError for what the flags alone and the contracts of runs show."""
    columns = [column for column, _ in args.facets]
    unused = [name for name in ("task", "texts", "benchmark", "bundled", "baselines", "query_prompt") if getattr(args, name)]
    if unused:
        raise InputError(f"--facets scores models under prompts on --data: leave --{unused[0].replace('_', '-')} out")
    if others := [spec for spec in args.model or [] if is_sentence_transformer(spec)]:
        raise InputError(f"--facets scores models under prompts, and {others[0]} keeps its own settings: leave it out")
    if len(args.data or []) != 1 or args.data[0].is_dir():
        raise InputError("--facets needs one file of --data, with the column text and a column for each facet")
    if len(set(columns)) < len(columns) or len(columns) < 2 or {"text", NEUTRAL} & set(columns):
        raise InputError(f"--facets takes two columns or more, each once, not text or {NEUTRAL}: got {', '.join(columns)}")
    for flag in ("prompt", "scope"):
        if len(getattr(args, flag) or []) > 1:
            raise InputError(f"--facets takes one --{flag}" + ", the neutral one" * (flag == "prompt"))
    roles = {name: get_prompt(prompt or TASK_PROMPTS["Clustering"]).roles() for name, prompt in prompts_of(args).items()}
    for one, other in itertools.combinations(roles, 2):
        if roles[one] == roles[other]:
            raise InputError(f"--facets: {one} and {other} have the same prompt")
    for spec, prompt in itertools.product(filter(is_run, args.model or []), prompts_of(args).values()):
        changes_to_run(spec, under(args, prompt, spec))


def read_labelled(args: argparse.Namespace) -> Labelled:
    """Texts and labels of --data, of more than MAX_ROWS rows so many, drawn at random. Raises InputError for what cannot be scored."""
    path, facets = args.data[0], [column for column, _ in args.facets]
    if path != STDIN and not path.exists():
        raise InputError(f"no file {path}")
    shown, rows = display_name(path), list(read_rows(path))
    if missing := [column for column in ("text", *facets) if column not in column_names(rows)]:
        raise InputError(f"{shown} has no column {missing[0]!r}: it has {excerpt(', '.join(column_names(rows)), 200)}")
    n_all = len(rows)
    if n_all > MAX_ROWS:
        rows = [rows[i] for i in np.sort(np.random.default_rng(0).permutation(n_all)[:MAX_ROWS])]
    texts, labels = read_column(rows, "text", as_text), {}
    for name in facets:
        values, labels[name] = np.unique(read_column(rows, name, as_label), return_inverse=True)
        if len(values) < 2:
            raise InputError(f"{shown}: column {name} holds one label only ({str(values[0])!r}), there is nothing to tell apart")
        if len(values) == len(rows):
            raise InputError(f"{shown}: column {name} has a label of its own for each of {len(rows)} texts, there is nothing to group")
    of_all = f" of {n_all:,}, drawn at random" if n_all > len(rows) else ""
    counts = ", ".join(f"{name} {len(set(values.tolist()))} labels" for name, values in labels.items())
    say(f"{shown}: {len(rows):,} texts{of_all}; {counts}")
    for one, other in nested(labels):
        say(f"{one} decides {other}: vectors that follow one of them serve the other as well")
    return Labelled(shown, texts, labels)


def nested(labels: dict[str, np.ndarray]) -> list[tuple[str, str]]:
    """Pairs of facets where the first decides the second."""
    sizes = {names: len(set(zip(*(labels[name].tolist() for name in names), strict=True))) for names in itertools.permutations(labels, 2)}
    return [(one, other) for (one, other), n in sizes.items() if n == len(set(labels[one].tolist()))]


# ------------------------------------------------------------------------------------------------------------------- scores


def score_facets(args: argparse.Namespace, data: Labelled, failures: list[str]) -> dict:
    """Print matrices and statistics of all models, and return them for --out. Why a model is missing is added to `failures`."""
    models = []
    for spec in args.model or [None]:
        with other_rows_go_on(args, failures):
            models += scored(args, spec, data, failures)
    if not models:
        raise InputError("; ".join(failures))
    facets = list(data.labels)
    results = [statistics(model.cells, facets) for model in models]
    for line in lines(models, results, facets):
        say(line)
    prompts = {name: {"prompt": prompt, "labels": int(data.labels[name].max()) + 1} for name, prompt in args.facets}
    rows = [as_json(model, of_model, results[0], facets) for model, of_model in zip(models, results, strict=True)]
    return {"data": data.name, "texts": len(data.texts), "facets": prompts, "nested": nested(data.labels), "models": rows}


def scored(args: argparse.Namespace, spec: str | None, data: Labelled, failures: list[str]) -> list[Model]:
    """One model under all prompts; several where there are several poolings or layers."""
    models: list[Model] = []
    for name, prompt in prompts_of(args).items():
        rows = (row for group in model_rows(under(args, prompt, spec), "Clustering", failures) for row in group)
        for i, row in enumerate(rows):
            if i == len(models):
                models.append(Model(row.label.replace(f", {prompt}", "", 1) if row.grid else row.label, {}, {}))
            models[i].rows[name] = row
            models[i].cells.update(((name, label), cell) for label, cell in cells_of(row, data))
            say(f"{models[i].label}, prompt {name}: scored", error=True)
    return models


def cells_of(row: MtebModel, data: Labelled) -> Iterator[tuple[str, Evidence]]:
    """What is known of the vectors of a row of the table, for each facet."""
    vectors, rows = row.encode([{"text": data.texts}]), digest(data.texts)
    for name, labels in data.labels.items():
        yield name, evidence.of_clustering(vectors, labels, rows)


def weights_of(facets: list[str]) -> dict[str, dict[str, Weights]]:
    """The cells that make up each statistic of each facet."""
    by_facet = {}
    for j in facets:
        wrong = {(i, j): -1 / (len(facets) - 1) for i in facets if i != j}
        by_facet[j] = {"diagonal": {(j, j): 1}, "selectivity": {(j, j): 1} | wrong, "over neutral": {(j, j): 1, (NEUTRAL, j): -1}}
    return by_facet


def combined(cells: Cells, weights: Weights) -> Evidence:
    """The evidence of a weighted sum of cells: they rest on the same rows, redraws, splits and seeds."""
    first = next(iter(cells.values()))
    return first._replace(
        **{name: sum(w * getattr(cells[at], name) for at, w in weights.items()) for name in ("scores", "redrawn", "halves")}
    )


def statistics(cells: Cells, facets: list[str]) -> dict[str, dict[str, Evidence]]:
    """The statistics of each facet, and under "mean" those over facets."""
    by_facet = {j: {name: combined(cells, weights) for name, weights in of.items()} for j, of in weights_of(facets).items()}
    mean = {name: evidence.joined([by_facet[j][name] for j in facets]) for name in STATISTICS}
    return {**by_facet, "mean": mean}


def against_zero(one: Evidence) -> Difference:
    """A statistic with its interval."""
    nothing = one._replace(**{name: np.zeros_like(getattr(one, name)) for name in ("scores", "redrawn", "halves")})
    return difference(one, nothing)


# -------------------------------------------------------------------------------------------------------------------- shown


def lines(models: list[Model], results: list[dict], facets: list[str]) -> list[str]:
    """What is printed: the matrix of each model, its statistics over facets and by facet, and those less the first model's."""
    matrix, means = [["model", "prompt", *facets]], [["model", *STATISTICS]]
    of_facets, less = [["model", "facet", *STATISTICS[1:]]], [[f"less {models[0].label}", *STATISTICS]]
    for model, of_model in zip(models, results, strict=True):
        for name in (*facets, NEUTRAL):
            cells = [model.cells[name, j].scores.mean(1) for j in facets]
            matrix.append([model.label, name, *(f"{100 * v_measure:.1f} ({100 * ami:.1f})" for v_measure, ami in cells)])
        diagonal, *gains = (against_zero(of_model["mean"][name]) for name in STATISTICS)
        means.append([model.label, show(diagonal, verdict=False).lstrip("+"), *map(show, gains)])
        of_facets += ([model.label, j, *(show(against_zero(of_model[j][name])) for name in STATISTICS[1:])] for j in facets)
        less.append([model.label, *(show(difference(of_model["mean"][name], results[0]["mean"][name])) for name in STATISTICS)])
    tables = [matrix, means, of_facets, *([[less[0], *less[2:]]] if len(models) > 1 else [])]
    text = [line for table in tables for line in (*ruled(table), "")]
    return [*text, "V-measure x 100 (AMI) by facet of the labels; 95 % intervals hold rows and k-means seeds, of these facets alone"]


def ruled(table: list[list[str]]) -> list[str]:
    text = aligned(table)
    return [text[0], "-" * max(map(len, text)), *text[1:]]


def as_json(model: Model, of_model: dict, first: dict, facets: list[str]) -> dict:
    def of(d: Difference) -> dict:
        return {"value": d.value, "interval": [d.low, d.high], "sd_rows": d.rows, "sd_algorithm": d.algorithm, "verdict": d.verdict}

    matrix = []
    for (name, j), cell in model.cells.items():
        v_measure, ami = cell.scores.mean(1).tolist()
        matrix.append({"prompt": name, "facet": j, "v_measure": v_measure, "ami": ami})
    return {
        "model": model.label,
        "fingerprint": {name: row.fingerprint for name, row in model.rows.items()},
        "contract": {name: row.contract for name, row in model.rows.items()},
        "computed": model.rows[NEUTRAL].computed,
        "matrix": matrix,
        **{name: of(against_zero(of_model["mean"][name])) for name in STATISTICS},
        "by_facet": {j: {name: of(against_zero(of_model[j][name])) for name in STATISTICS[1:]} for j in facets},
        "less_first": {name: of(difference(of_model["mean"][name], first["mean"][name])) for name in STATISTICS},
    }
