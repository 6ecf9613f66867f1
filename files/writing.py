"""Files that are complete or absent: everything is written under a temporary name and renamed."""

import gzip
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from files.console import InputError, reason, short_path


class WriteError(InputError):
    """A file cannot be written, as on a full disk."""


@contextmanager
def errors_of_writing(path: Path) -> Iterator[None]:
    """Turns an OSError into a WriteError that names the file, and not a temporary one."""
    try:
        yield
    except OSError as error:
        raise WriteError(f"{path} cannot be written: {reason(error)}") from None


def write_atomic(path: Path, write: Callable[[Path], object], temporary: Path | None = None) -> None:
    """Call `write(temporary_path)` in the target's folder, then rename: the file is complete or absent.

    Its permissions are those of any new file (umask), also where `write` puts a private temporary file of its own in place.
    Raises WriteError.
    """
    temporary = temporary or path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with errors_of_writing(path):
        try:
            temporary.touch()
            mode = temporary.stat().st_mode
            write(temporary)
            temporary.chmod(mode)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def append_line(path: Path, line: str) -> None:
    """Add a line to a UTF-8 file. Raises WriteError."""
    with errors_of_writing(path), open(path, "a", encoding="utf-8") as f:
        f.write(line + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file, complete or not at all."""
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: object, indent: int = 2) -> None:
    """Write a JSON file, complete or not at all."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def check_absent(path: Path, flag: str = "--out") -> None:
    """Raise InputError where there is something already: nothing is overwritten. `flag` is what named the path."""
    if path.exists():
        advice = f"choose another {flag}" + ("" if path.is_dir() and any(path.iterdir()) else ", or delete it first")
        raise InputError(f"{path} exists already{' and is a folder' * path.is_dir()}: {advice}")


def check_writable(path: Path, flag: str = "--out") -> None:
    """Raise InputError unless something can be made there, or below where it is a folder. Nothing is made yet."""
    folder = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        why = "may not be written to" if folder.is_dir() else "is a file"
        raise InputError(f"{flag} {path}: {short_path(folder)} {why}, choose another place")


def write_new(path: Path, data: bytes) -> None:
    """Write a file that does not exist yet, and its folder; gzipped where its name ends in .gz."""
    check_absent(path)
    with errors_of_writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        data = gzip.compress(data, mtime=0)
    write_atomic(path, lambda temporary: temporary.write_bytes(data))
