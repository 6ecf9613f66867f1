"""The files of a job: OUT and what stands beside it, complete or absent, and nothing overwritten."""

import gzip
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import IO

from files.console import InputError
from files.writing import check_absent, check_writable, errors_of_writing

# what may stand beside OUT, by the end of its name
COMPANIONS = ("questions.jsonl", "failed.jsonl", "report.json", "report.png")


def companion(out: Path, end: str) -> Path:
    """The file beside OUT whose name is OUT's and this end."""
    return out.with_name(f"{out.name}.{end}")


def partial_file(out: Path) -> Path:
    """Where an unfinished job keeps its answers, see `durable.py`."""
    return companion(out, "partial")


def check_out(out: Path) -> None:
    """Raise InputError where OUT is no name for pairs or cannot be written, or where it or a file beside it exists.

    What stands beside the answers of an unfinished job is that job's.
    """
    check_absent(out)
    if not out.name.endswith((".jsonl", ".jsonl.gz")):
        raise InputError(f"--out {out}: pairs are written as JSONL, take a name that ends in .jsonl or .jsonl.gz")
    check_writable(out)
    if not partial_file(out).exists():
        for end in COMPANIONS:
            check_absent(companion(out, end))


class RowFiles:
    """Files that are written together, most of them rows of JSON: under temporary names, and renamed at the end, OUT last.

    The names are always the same, so that what a killed job has left is written over by the next.

    counts     rows of each file
    first      the first two rows of OUT
    """

    def __init__(self, out: Path):
        self.out, self.counts, self.first, self._files = out, Counter(), [], {}

    def __enter__(self) -> "RowFiles":
        return self

    def open(self, path: Path) -> IO[bytes]:
        """The file that will be OUT, or one beside it; empty so far, or what was written before."""
        with errors_of_writing(path):
            if path not in self._files:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._files[path] = open_new(self._temporary(path), path.suffix == ".gz")
            return self._files[path]

    def write(self, path: Path, row: dict) -> None:
        """Add a row to OUT or to a file beside it. Half a surrogate pair is written as JSON's escape."""
        self.counts[path] += 1
        if path == self.out and len(self.first) < 2:
            self.first.append(row)
        line = json.dumps(row, ensure_ascii=False, default=str) + "\n"
        with errors_of_writing(path):
            self.open(path).write(line.encode(errors="backslashreplace"))

    @staticmethod
    def _temporary(path: Path) -> Path:
        return path.with_name(f".{path.name}.tmp")

    def __exit__(self, kind, *_) -> None:
        for path in sorted(self._files, key=lambda path: path == self.out):
            temporary = self._temporary(path)
            try:
                with errors_of_writing(path):
                    self._files[path].close()
                    if kind is None:
                        os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)


def open_new(path: Path, gzipped: bool) -> IO[bytes]:
    """An empty file that this process alone writes. Raises InputError where another one does."""
    raw = open(path, "ab")  # noqa: SIM115, closed by `RowFiles`
    lock(raw, path)
    raw.truncate(0)
    return GzippedRows(raw) if gzipped else raw


def lock(file: IO, path: Path) -> None:
    """Keep a file for this process until it is closed. Raises InputError where another one has it."""
    if sys.platform == "win32":
        return
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"another job writes {path}: wait until it has ended, or choose another --out") from None
    except OSError:  # a file system without locks
        pass


class GzippedRows(gzip.GzipFile):
    """A gzipped file without a name or time in it, which closes the file below it."""

    def __init__(self, raw: IO[bytes]):
        super().__init__("", "wb", fileobj=raw, mtime=0)
        self._raw = raw

    def close(self) -> None:
        super().close()
        self._raw.close()
