"""`evaluate.py --report FILE.html`: the scores with their intervals, a grid's heat map, a map of the texts, confused classes, what was run.

One page that needs nothing else (files/page.py); report.js draws its pictures. Every score and interval is that of the results that --out
writes. What the map and the confused classes show is described in report_map.py.
"""

import datetime
import importlib.util
import json
import os
import shlex
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import numpy as np

from evaluation import report_map
from evaluation.baselines import is_baseline
from evaluation.differences import Difference
from evaluation.differences import show as show_difference
from evaluation.report_grid import heat_map, mean_score, of_rows
from evaluation.report_map import TEXTS, Confused, KeptVectors, View, map_of
from evaluation.scores import check_out, notes, show, versions
from files.console import InputError, say, short_path
from files.page import escape, page, plain, tag, typed
from files.writing import write_text
from tasks.unlabelled import ADVICE

MARKS = {"better": "▲", "worse": "▼", "cannot tell": "≈"}
NO_MAP = "None: it needs a clustering or classification task, and a row that is no baseline."


def check_report(path: Path, out: Path | None) -> None:
    """Raise InputError unless a page can be made and written there. Nothing is made yet."""
    check_out(path, "--report")
    if out and path.absolute() == out.absolute():
        raise InputError(f"--report and --out are both {path}: name two files")
    if importlib.util.find_spec("plotly") is None:
        raise InputError("--report needs plotly: pip install -r requirements.txt -c constraints.txt")


def write_report(path: Path, results: dict | list[dict], remarks: list[str], kept: KeptVectors, missing: list[str]) -> None:
    """Write the page.

    results     what --out writes: a dict, with --texts a list of rows
    remarks     sentences that are printed below the table, first that on the best row
    missing     why rows are missing
    """
    with_labels = isinstance(results, dict)
    cells = results["results"] if with_labels else results
    views = kept.pairs()
    maps = [map_of(pair, lambda line: say(line, error=True)) for pair in views]
    grid = heat_map(cells) if with_labels else None
    tasks = list(dict.fromkeys(cell.get("task", TEXTS) for cell in cells))
    title = f"Embeddings compared on {', '.join(tasks[:4])}{' and others' * (len(tasks) > 4)}"
    sections = [
        tag("h1", escape(title)),
        tag("p", escape(summary(cells)), "aside"),
        *[tag("p", f"<b>Rows are missing:</b> {escape(reason, 300)}") for reason in missing],
        tag("h2", "Scores"),
        *[tag("p", escape(line, 600), "best") for line in remarks[:1]],
        tag("div", scores_table(results) if with_labels else texts_table(results), "scrolls"),
        *[tag("p", escape(line, 600), "aside") for line in [*reading(results), *remarks[1:]]],
        published_section(results["published"]) if with_labels and "published" in results else "",
        '<h2>Grid</h2><div id="grid"></div>' if grid else "",
        map_section(maps),
        *[confused_section(pair) for pair in views if pair[-1].sample.labels],
        run_section(cells, results["versions"] if with_labels else versions()),
    ]
    script = Path(__file__).with_suffix(".js").read_text(encoding="utf-8")
    data = {"grid": grid, "maps": [for_script(found) for found in maps]}
    write_text(path, page(title, "\n".join(filter(None, sections)), data, script))
    say(f"{path}: a page of {path.stat().st_size / 1e6:.1f} MB")


def summary(cells: list[dict]) -> str:
    """When this was, and what the scores rest on."""
    date = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M")
    n = len({(cell["model"], cell["fingerprint"]) for cell in cells})
    rests_on = {cell["task"]: cell["rests_on"] for cell in cells if cell.get("rests_on")}
    return ", ".join([date, f"{n} rows", *(f"{task}: {count}" for task, count in list(rests_on.items())[:6])])


# ------------------------------------------------------------------------------------------------------------- the table


def scores_table(results: dict) -> str:
    """A row for each model: its scores as the table has them, and below each the difference from the first model with its interval."""
    cells, found = results["results"], results["differences"]
    tasks = list(dict.fromkeys(cell["task"] for cell in cells))
    first = (found[0]["less"], found[0]["less_fingerprint"]) if found else None
    less = {(d["model"], d["fingerprint"], d["task"]): d for d in found if (d["less"], d["less_fingerprint"]) == first}
    columns = [*tasks, "mean"] if len(tasks) > 1 else tasks
    lines = [table_head(cells, columns)]
    for row, by_task in of_rows(cells).items():
        mean = mean_score(by_task, tasks)
        above = [*(show(by_task.get(task)) for task in tasks), "-" if mean is None else f"{100 * mean:.1f}"][: len(columns)]
        below = [difference(less.get((*row, column))) for column in columns]
        if row == first:
            below = ["the others are compared with this row", *[""] * (len(columns) - 1)]
        numbers = "".join(tag("td", tag("b", escape(a)) + tag("span", b, "aside"), "number") for a, b in zip(above, below, strict=True))
        lines.append(tag("tr", tag("td", name_of(row)) + numbers))
    return "\n".join(["<table>", *lines, "</table>"])


def table_head(cells: list[dict], columns: list[str]) -> str:
    """Tasks with their metric and what their scores rest on, and perhaps their mean."""
    about = {cell["task"]: cell["metric"].replace("_", "-") + " (AMI)" * ("ami" in cell) for cell in cells}
    about |= {cell["task"]: f"{about[cell['task']]}, {cell['rests_on']}" for cell in cells if cell["rests_on"]}
    names = [tag("th", escape(column) + tag("span", escape(about.get(column, "")), "aside"), "number") for column in columns]
    return tag("thead", tag("tr", "".join([tag("th", "model"), *names])))


def name_of(row: tuple[str, str]) -> str:
    return escape(row[0]) + tag("span", tag("code", escape(row[1])), "aside")


def difference(found: dict | None) -> str:
    if found is None:
        return ""
    shown = Difference(found["difference"], *found["interval"], found["sd_rows"], found["sd_algorithm"])
    return verdict(show_difference(shown), found["verdict"])


def verdict(text: str, word: str) -> str:
    return tag("span", f"{MARKS[word]} {escape(text)}", word.replace(" ", "-"))


def published_section(published: list[dict]) -> str:
    """The figures of --paper that others have published, in a table of their own."""
    text = "Mean V-measure x 100 by other programs, which draw other samples of the tasks' texts: none of it was measured here."
    lines = [tag("thead", tag("tr", "".join(tag("th", name) for name in ("model", "setting", "v-measure", "track", "source"))))]
    for entry in published:
        cells = (entry["model"], entry["setting"], f"{entry['v_measure']:g}", entry["track"], entry["source"])
        lines.append(tag("tr", "".join(tag("td", escape(cell)) for cell in cells)))
    return "\n".join([tag("h2", "Published figures"), tag("p", text), '<div class="scrolls"><table>', *lines, "</table></div>"])


def texts_table(rows: list[dict]) -> str:
    """The table of --texts: scores without labels, and how they compare with the first row's."""
    head = [tag("th", "model"), tag("th", "score", "number"), tag("th", "against the first (95 % interval)")]
    lines = [tag("thead", tag("tr", "".join(head)))]
    for row in rows:
        against = ""
        if "ratio" in row:
            low, high = row["interval"]
            against = verdict(f"{row['ratio']:.3f} ({low:.3f} to {high:.3f}): {row['verdict']}", row["verdict"])
        score = tag("td", tag("b", f"{row['score']:.2f}"), "number")
        lines.append(tag("tr", tag("td", name_of((row["model"], row["fingerprint"]))) + score + tag("td", against)))
    return "\n".join(["<table>", *lines, "</table>"])


def reading(results: dict | list[dict]) -> list[str]:
    """How the numbers of the table are to be read."""
    if isinstance(results, list):
        return [f"score: likeness of hidden words in a cluster, 1 is chance; {ADVICE}"]
    return notes(results["results"])


# --------------------------------------------------------------------------------------------------------------- the map


def for_script(found: dict) -> dict:
    """What report.js needs of a map; the largest class comes first."""
    sizes = Counter(found["labels"])
    codes = {name: i for i, name in enumerate(sorted(sizes, key=lambda name: (-sizes[name], name)))}
    panels = []
    for panel in found["panels"]:
        cell, points = panel["cell"], panel["points"]
        score = f": {cell['metric'].replace('_', '-')} {show(cell)}" if "metric" in cell else f": {cell['score']:.2f}"
        panels.append({"title": plain(cell["model"], 80) + score, "x": typed(points[:, 0]), "y": typed(points[:, 1])})
    return {
        "note": map_note(found, len(codes)),
        "kind": found["kind"],
        "texts": [plain(text) or "(empty)" for text in found["texts"]],
        "names": [f"{plain(name, 60) or '(no label)'} ({sizes[name]:,})" for name in codes],
        "codes": typed(np.array([codes[label] for label in found["labels"]], np.int32)),
        "panels": panels,
    }


def map_note(found: dict, n_classes: int) -> str:
    """How a map came about."""
    n, of = len(found["texts"]), found["of"]
    drawn = f"{n:,} of {of:,} texts, drawn at random" if n < of else f"{n:,} texts"
    by = f"coloured by {found['kind']} ({n_classes:,})"
    if found["kind"] == "cluster":
        by += ", by k-means of the vectors on the right"
    line = f"{drawn}, {by}; {found['method']} of the vectors: near texts stay near, while far distances and sizes of groups mean little."
    for panel in found["panels"]:
        if panel["collapsed"]:
            line += f" The vectors of {plain(panel['cell']['model'], 80)} are nearly one point: what is seen of them means nothing."
    return line


def map_section(maps: list[dict]) -> str:
    if not maps:
        return tag("h2", "Map of the texts") + tag("p", NO_MAP)
    tasks = [escape(found["panels"][0]["cell"]["task"], 60) for found in maps]
    options = "".join(f'<option value="{i}">{task}</option>' for i, task in enumerate(tasks))
    hidden = " hidden" * (len(maps) < 2)
    return f"""<h2>Map of the texts</h2>
<p>Each point is a text: point at one to read it, and a ring shows where it lies on the other side. Choose a class to see where its texts
lie.</p>
<div class="controls"><label{hidden}>task <select id="task">{options}</select></label>
<label>show <select id="class"></select></label></div>
<div id="map"></div><div id="legend" class="legend"></div><p id="map-note" class="aside"></p>"""


def confused_section(views: list[View]) -> str:
    """A table of the pairs of classes that the better row confuses most."""
    head, pairs = tag("h2", f"Most confused classes of {escape(views[-1].cell['task'], 60)}"), report_map.confused(views)
    if not pairs:
        return head + tag("p", "None: no text has a text of another class among its nearest.")
    text = f"Of the {report_map.NEIGHBOURS} nearest texts (by cosine) of every text of both classes, the share that is of the other class."
    columns = [tag("th", escape(view.cell["model"], 60), "number") for view in views]
    lines = [tag("thead", tag("tr", "".join([tag("th", "classes"), *columns, tag("th", "nearest texts of both")])))]
    lines += [confused_row(pair) for pair in pairs]
    return "\n".join([head, tag("p", text), '<div class="scrolls"><table>', *lines, "</table></div>"])


def confused_row(pair: Confused) -> str:
    names = tag("td", "<br>".join(escape(name or "(no label)", 60) for name in pair.classes))
    numbers = [tag("td", tag("b", f"{100 * share:.1f} %"), "number") for share in pair.shares]
    texts = "".join(tag("div", f"{escape(a, 110)} <b>|</b> {escape(b, 110)}") for a, b in pair.examples)
    return tag("tr", "".join([names, *numbers, tag("td", texts)]))


# ---------------------------------------------------------------------------------------------------------- what was run


def run_section(cells: list[dict], numbers: dict[str, str]) -> str:
    """Command, versions, and the contract of each row."""
    command = shlex.join(["python", short_path(sys.argv[0]), *sys.argv[1:]])
    processes = int(os.environ.get("WORLD_SIZE", 1))
    computed = ", ".join(dict.fromkeys(cell["computed"] for cell in cells if cell.get("computed")))
    numbers = numbers | {"plotly": version("plotly")}
    lines = [tag("h2", "What was run"), tag("pre", escape(command, 2000))]
    lines += [tag("p", f"In {processes} processes.")] * (processes > 1) + [tag("p", escape(", ".join(map(" ".join, numbers.items())), 600))]
    lines += [tag("p", f"Vectors computed in {escape(computed)}.")] * bool(computed)
    contracts = {(cell["model"], cell["fingerprint"]): cell["contract"] for cell in cells}
    for (model, fingerprint), contract in contracts.items():
        name = f"{escape(model)} {tag('code', escape(fingerprint))}"
        if contract is None:
            what = "a baseline" if is_baseline(fingerprint) else "a sentence-transformers model under its own settings"
            lines.append(tag("p", f"{name}: {what}"))
        else:
            text = json.dumps(contract, indent=1, ensure_ascii=False).splitlines()
            text = "\n".join(" " * (len(line) - len(line.lstrip())) + escape(line, 1000) for line in text)
            lines.append(tag("details", tag("summary", f"{name}: what decides its vectors") + tag("pre", text)))
    return "\n".join(lines)
