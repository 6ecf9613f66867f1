"""Files that are complete or absent: everything is written under a temporary name and renamed."""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

from files.console import InputError


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary_path)` in the target's folder, then rename: the file is complete or absent."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file, complete or not at all."""
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: object, indent: int = 2) -> None:
    """Write a JSON file, complete or not at all."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def check_absent(path: Path) -> None:
    """Raise InputError where there is something already: nothing is overwritten."""
    if path.exists():
        raise InputError(f"{path} exists already: choose another --out, or delete it first")


def write_new(path: Path, data: bytes) -> None:
    """Write a file that does not exist yet, and its folder; gzipped where its name ends in .gz."""
    check_absent(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        data = gzip.compress(data, mtime=0)
    write_atomic(path, lambda temporary: temporary.write_bytes(data))
