"""The folder of a run: whether it may be used, the arguments that a resumed run has to share, the numbers of every step."""

import argparse
import contextlib
import json
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from files.console import InputError
from training.checkpoint import CHECKPOINT, has_checkpoint

ARGUMENTS, METRICS, SUMMARY = "arguments.json", "metrics.jsonl", "summary.json"

# these may differ between a run and its resumption; everything else must be the same
FREE_ON_RESUME = {"resume", "checkpoint_every", "out", "device", "pairs", "validation", "track", "versions", "commit", "command"}


def check_out(out: Path, resume: bool) -> None:
    """Raise InputError unless `out` is new, or a run that can be resumed: nothing is overwritten."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: choose another --out")
    names = {path.name for path in out.iterdir() if not path.name.startswith(".")} if out.is_dir() else set()
    if names and not resume:
        advice = "choose another --out, or go on with --resume" if ARGUMENTS in names else "choose another --out"
        raise InputError(f"{out} already holds {'a run' if ARGUMENTS in names else 'files'}: {advice}")
    before_a_checkpoint = {ARGUMENTS, METRICS, "tensorboard", "wandb"}
    if names - before_a_checkpoint and not has_checkpoint(out):
        raise InputError(f"{out} holds {', '.join(sorted(names)[:3])} but no {CHECKPOINT}: it cannot be resumed, choose another --out")


def plain_arguments(args: argparse.Namespace) -> dict:
    """The arguments as JSON can hold them, with absolute paths."""

    def plain(value):
        return [plain(x) for x in value] if isinstance(value, list) else str(value.resolve()) if isinstance(value, Path) else value

    return {name: plain(value) for name, value in vars(args).items()}


def make_record(args: argparse.Namespace, **data: str | None) -> dict:
    """Arguments, versions and commit for arguments.json. data: what else the results depend on, such as hashes of files."""
    root = Path(__file__).resolve().parent.parent
    describe = subprocess.run(["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return {
        "arguments": plain_arguments(args),
        **data,
        "versions": {p: version(p) for p in ("torch", "transformers", "peft", "numpy")} | {"python": platform.python_version()},
        "commit": describe.stdout.strip() or None,
        "command": sys.argv,
    }


def read_record(path: Path) -> dict:
    """Read arguments.json. Raises InputError where it is damaged."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return record | {"arguments": dict(record["arguments"])}
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path} is damaged: the run cannot be resumed, start another --out") from None


def check_record(path: Path, record: dict) -> None:
    """Raise InputError unless arguments, data and base are those of the saved run."""
    now, saved = ({k: v for k, v in (r | r["arguments"]).items() if k != "arguments"} for r in (record, read_record(path)))
    differing = [f"{k} was {saved[k]!r}, is {v!r}" for k, v in now.items() if k not in FREE_ON_RESUME and saved.get(k, v) != v]
    if differing:
        raise InputError(
            f"{path.parent}: arguments differ from the saved run: {'; '.join(differing)}. Repeat its arguments, or start another --out"
        )


def read_metrics(path: Path, last_step: int) -> list[dict]:
    """The lines of metrics.jsonl up to a checkpoint's step. A line that a kill cut short is skipped."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return [row for row in rows if row["step"] <= last_step]
