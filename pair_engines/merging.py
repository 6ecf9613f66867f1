"""Files of pairs that were made in shards, or of several inputs, joined to one."""

import argparse
import heapq
import json
from collections.abc import Iterator
from pathlib import Path

from files.console import InputError, say
from files.reading import excerpt, read_lines, read_rows
from pair_engines.outputs import companion
from pair_engines.templates import is_question
from training.pair_data import validate_pair

# arguments of a job that may differ between its shards
MAY_DIFFER = {"shard", "out", "review", "batch_size", "concurrency", "retries", "timeout", "url"}


def merged_rows(args: argparse.Namespace) -> Iterator[dict]:
    """The rows of all files and of those beside them (questions, failures), in the order of the texts that they were made of.

    Raises InputError where a text is in two files, where a file is no file of pairs of texts, and where the reports beside the files
    show that a shard is missing, given twice, or of another job.
    """
    besides = [companion(path, end) for path in args.files for end in ("questions.jsonl", "failed.jsonl")]
    files = [path for path in args.files if path not in besides]  # `merge *.jsonl` names them, too
    check_shards(files)
    paths = [path for path in files if not is_empty(path)]
    paths += [path for path in besides if path.exists()]
    previous = {}  # source -> file, of the rows that have the same number
    last = None
    for number, path, row in heapq.merge(*map(numbered_rows, paths), key=lambda numbered: numbered[0]):
        if number != last:
            previous, last = {}, number
        if row["source"] in previous:
            raise InputError(f"{row['source']} is in {previous[row['source']]} and in {path}: a text may be in one file only")
        previous[row["source"]] = path
        yield row


def numbered_rows(path: Path) -> Iterator[tuple[int, Path, dict]]:
    """The rows of a file as the gate takes them, with the number of the text's row. Raises InputError where they are not in its order."""
    last = 0
    for place, row in read_rows(path):
        if "error" not in row:
            validate_pair(row, place)
        name, _, number = str(row.get("source", "")).rpartition(":")
        if not name or not number.isdecimal():
            raise InputError(f"{place}: needs a 'source' such as texts.csv:7, has {excerpt(row.get('source'))!r}")
        if int(number) < last:
            raise InputError(f"{place}: comes after a later text, row {last}: these are not pairs as make_pairs.py writes them")
        last = int(number)
        if is_question(row.get("template", "")) and "error" not in row:
            row |= {"anchor": row["positive"], "positive": row["anchor"]}
        yield last, path, row


def is_empty(path: Path) -> bool:
    """Whether a file of make_pairs.py is without pairs: its shard has none, or they are all questions."""
    return companion(path, "report.json").exists() and next(read_lines(path), None) is None


def has_questions_apart(files: list[Path]) -> bool:
    """Whether the questions of one of these files lie beside it."""
    return any(companion(path, "questions.jsonl").exists() for path in files)


def check_shards(files: list[Path]) -> None:
    """Compare the reports beside the files; prints what could not be checked. Raises InputError, see `merged_rows`."""
    if len({path.resolve() for path in files}) < len(files):
        raise InputError("a file is given twice")
    reports = {path: read_report(path) for path in files}
    without = [str(path) for path, report in reports.items() if report is None]
    if without:
        say(f"no report beside {excerpt(', '.join(without), 200)}: whether a shard is missing was not checked")
        return
    shards = {path: tuple(report.get("shard") or ()) for path, report in reports.items()}
    if not any(shards.values()):
        say("these files are no shards: whether one is missing was not checked")
        return
    settings = {path: {name: value for name, value in report.items() if name not in MAY_DIFFER} for path, report in reports.items()}
    for path in files[1:]:
        different = sorted(n for n in settings[path].keys() | settings[files[0]] if settings[path].get(n) != settings[files[0]].get(n))
        if different or not shards[path] or shards[path][1] != shards[files[0]][1]:
            how = f"--{different[0].replace('_', '-')}" if different else "--shard"
            raise InputError(f"{path} is no shard of the job that made {files[0]}: {how} is another")
    n = shards[files[0]][1]
    given = [i for i, _ in shards.values()]
    twice, missing = sorted({i for i in given if given.count(i) > 1}), sorted(set(range(1, n + 1)) - set(given))
    if twice or missing:
        raise InputError(f"shard {(twice or missing)[0]}/{n} is {'given twice' if twice else 'missing'}")


def read_report(path: Path) -> dict | None:
    """The arguments that a file was made with, None where no report is beside it."""
    report = companion(path, "report.json")
    if not report.exists():
        return None
    try:
        arguments = json.loads(report.read_text(encoding="utf-8"))["arguments"]
        return arguments | {"input": Path(arguments["input"]).name}  # machines may keep it in different folders
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{report} is no report of make_pairs.py: move it away") from None
