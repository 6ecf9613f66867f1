"""The folder of a run: whether it may be used, the arguments that a resumed run has to share, the numbers of every step, the summary."""

import argparse
import contextlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import IO, TYPE_CHECKING

from encoder.contract import ARGUMENTS_FILE
from encoder.names import KEPT_FOLDER, kept_adapters
from encoder.processes import distributed
from files.console import InputError, reason, say
from files.writing import errors_of_writing
from training.monitoring import peak_memory

if TYPE_CHECKING:
    from encoder import Encoder
    from training.plan import Run

METRICS, LOCK = "metrics.jsonl", ".lock"
CHECKPOINT, PREVIOUS_CHECKPOINT = "checkpoint.safetensors", "checkpoint.previous.safetensors"
BEFORE_A_CHECKPOINT = {ARGUMENTS_FILE, METRICS, KEPT_FOLDER, "tensorboard", "wandb"}  # what a run writes before its first checkpoint

# these may differ between a run and its resumption; everything else must be the same
FREE_ON_RESUME = {
    *("resume", "checkpoint_every", "keep_adapters", "out", "device"),
    *("pairs", "validation", "track", "versions", "commit", "command"),
}


def _lock(out: Path) -> IO:
    """The locked file in `out`, a folder that is made where it does not exist. A process that has ended holds no lock."""
    if sys.platform != "win32":
        import fcntl
    for attempts_left in range(99, -1, -1):
        try:
            out.mkdir(parents=True, exist_ok=True)
            lock = open(out / LOCK, "a")  # noqa: SIM115, closed by `reserve`
        except OSError as error:
            if isinstance(error, FileNotFoundError) and attempts_left:  # another process has just removed the folder
                continue
            raise InputError(f"{out} cannot be made: {reason(error)}; choose another --out") from None
        if sys.platform == "win32":
            return lock
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(lock.fileno()).st_ino == (out / LOCK).stat().st_ino:  # not one that has been removed meanwhile
                return lock
        except BlockingIOError:
            lock.close()
            raise InputError(f"another training is at work in {out}: wait until it has ended, or choose another --out") from None
        except FileNotFoundError:
            pass
        except OSError:  # a file system without locks
            return lock
        lock.close()
    raise InputError(f"{out} is made and removed by other processes again and again: choose another --out")


@contextlib.contextmanager
def reserve(out: Path) -> Iterator[None]:
    """Keep `out` from other processes while this one works in it, by a lock in a file that is removed at the end.

    A folder that is new and still empty at the end is removed. Raises InputError where another process is at work in it.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: choose another --out")
    new = [folder for folder in (out, *out.parents) if not folder.exists()]
    lock = _lock(out)
    try:
        yield
    finally:
        (out / LOCK).unlink(missing_ok=True)  # before another process can have the lock
        lock.close()
        with contextlib.suppress(OSError):  # not empty
            for folder in new:
                folder.rmdir()


def has_checkpoint(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (CHECKPOINT, PREVIOUS_CHECKPOINT))


def after_a_failed_write(folder: Path) -> str:
    """What a user can do whose run could not be written any further."""
    return "its last checkpoint stays, go on with --resume" if has_checkpoint(folder) else "there was no checkpoint yet, start it again"


def kept_steps(n_steps: int, n_adapters: int | None) -> set[int]:
    """At which steps the adapter is kept: `n_adapters` evenly spaced ones, without the last, whose adapter is the run's."""
    return {round(i * n_steps / n_adapters) for i in range(1, n_adapters or 1)} - {0, n_steps}


def keep_adapter(folder: Path, encoder: "Encoder", step: int) -> None:
    """Write the adapter as it is after a step, with its config and contract, complete or not at all. Raises WriteError."""
    kept, temporary = folder / KEPT_FOLDER / f"step-{step:06d}", folder / f".step-{step:06d}.tmp"
    try:
        encoder.save(temporary)
        with errors_of_writing(kept):
            kept.parent.mkdir(exist_ok=True)
            temporary.rename(kept)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def forget_adapters(folder: Path, after: int) -> None:
    """Delete the kept adapters of later steps than the one that a run goes on from: it will come there again."""
    for step, kept in kept_adapters(folder).items():
        if step > after:
            shutil.rmtree(kept)


def check_out(out: Path, resume: bool) -> None:
    """Raise InputError unless `out` is new, or a run that can be resumed or begins again: nothing is overwritten."""
    names = {path.name for path in out.iterdir() if not path.name.startswith(".")} if out.is_dir() else set()
    if ARGUMENTS_FILE in names and names <= BEFORE_A_CHECKPOINT:
        say(f"{out} holds a run that ended before its first checkpoint, nothing to keep: it begins again")
        return
    if names and not resume:
        advice = "choose another --out, or go on with --resume" if ARGUMENTS_FILE in names else "choose another --out"
        raise InputError(f"{out} already holds {'a run' if ARGUMENTS_FILE in names else 'files'}: {advice}")
    if names and not has_checkpoint(out):
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
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        raise InputError(f"{path} is missing or damaged: the run cannot be resumed, start another --out") from None


def check_record(path: Path, record: dict) -> None:
    """Raise InputError unless arguments, data and base are those of the saved run."""
    now, saved = ({k: v for k, v in (r | r["arguments"]).items() if k != "arguments"} for r in (record, read_record(path)))
    differing = [f"{k} was {saved[k]!r}, is {v!r}" for k, v in now.items() if k not in FREE_ON_RESUME and saved.get(k, v) != v]
    for name in ("pairs_sha256", "validation_sha256"):
        if name in now and saved.get(name, now[name]) != now[name]:
            what = name.partition("_")[0]
            raise InputError(f"{path.parent}: the file of --{what} was changed since: bring the old one back, or start another --out")
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


def summarize(run: "Run", joules: float) -> dict:
    """What summary.json holds. joules: of all processes, NaN where they are not known."""
    state, encoder, validation = run.state, run.encoder, run.data.validation
    world_size = distributed().world_size
    last_tenth = [row for row in run.rows[-max(1, len(run.rows) // 10) :] if row["loss"] is not None]
    scores = {"what": validation.name, "best": state.best_score, "kept": state.kept_score} if validation else None
    return {
        "steps": state.step,
        "best_step": state.kept_step or state.step,
        "validation": scores,
        "pairs": state.step * run.args.batch_size,
        "tokens": sum(row["tokens"] for row in run.rows),
        "seconds": round(state.seconds, 1),
        "gpu_hours": round(state.seconds * world_size / 3600, 4) if encoder.device.type == "cuda" else 0,
        "energy_wh": None if math.isnan(joules) else round(joules / 3600, 2),
        "peak_memory_gib": peak_memory(encoder.device),
        "texts_empty": state.n_empty,
        "texts_truncated": state.n_truncated,
        "skipped_steps": state.skipped_steps,
        "started_from": run.started_from,
        "processes": world_size,
        "chunk_size": state.chunk_size,
        "gradient_checkpointing": state.gradient_checkpointing,
        "loss_last_tenth": sum(row["loss"] for row in last_tenth) / max(1, len(last_tenth)),
        "accuracy_last_tenth": sum(row["accuracy"] for row in last_tenth) / max(1, len(last_tenth)),
        "fingerprint": encoder.fingerprint,
    }
