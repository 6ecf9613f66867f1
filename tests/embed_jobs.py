"""Jobs of embed.py in processes of their own, killed at random moments, and what they leave behind: shared by its tests."""

import contextlib
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

from short_runs import write_rows

from serving.vectors import VectorFolder

ROOT = Path(__file__).resolve().parent.parent


def rows_of(folder: Path) -> dict:
    """id -> vector of all parts; every id once."""
    opened, rows = VectorFolder.open(folder), {}
    for number in opened.numbers():
        part = opened.read(number)
        assert not set(part.ids) & set(rows) and len(part.ids) == len(part.vectors)
        rows |= dict(zip(part.ids, part.vectors, strict=True))
    return rows


def numbered_texts(path: Path, n: int) -> Path:
    return write_rows(path, [{"id": i, "text": f"number {i} of a list"} for i in range(n)])


def start_job(*arguments) -> subprocess.Popen:
    command = [sys.executable, ROOT / "embed.py", *arguments]
    return subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def run_job(*arguments) -> None:
    job = start_job(*arguments)
    _, errors = job.communicate()
    assert job.returncode == 0, errors


def run_with_kills(out: Path, kills: int, later: float, *arguments) -> None:
    """Run a job to its end, killed so many times: up to `later` seconds after it has written a part."""
    chance = random.Random(0)
    for _ in range(kills):
        done, job = len(list(out.glob("part-*.parquet"))), start_job(*arguments, "--out", out)
        while job.poll() is None and len(list(out.glob("part-*.parquet"))) == done:
            with contextlib.suppress(subprocess.TimeoutExpired):
                job.wait(0.01)
        with contextlib.suppress(subprocess.TimeoutExpired):
            job.wait(chance.uniform(0, later))
        assert job.returncode is None, f"ended before it was killed: more rows, or fewer kills ({job.communicate()[1]})"
        os.kill(job.pid, signal.SIGKILL)
        job.communicate()
    run_job(*arguments, "--out", out)
