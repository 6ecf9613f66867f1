"""A folder of vectors: parts of a fixed number of rows of the input, each complete or absent.

    job.json                   what the folder was begun with: nothing else continues it
    part-00000.parquet         columns id, vector, with --store int8 also scale, with --keep-text also text
    part-00000.npy, .ids.json  the same as an array (rows, D), --format npy; --store int8: .scales.npy
    part-00000.failed.jsonl    rows without a vector: {"row", "id", "error"}

    index.faiss, index.json    where embed.py index has made them: see serving/index.py

Part k holds the rows from k * rows_per_part on, so that a killed job, or another shard, knows which parts are missing. Several jobs may
write into a folder at the same time as long as each writes parts of its own.

Legend: N rows of a part, D numbers of a vector.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from files.console import InputError
from files.reading import Row, as_text, excerpt
from files.writing import write_atomic, write_json, write_text

JOB_FILE = "job.json"
READ_FROM_JOB = ("fingerprint", "width", "model", "store", "format", "keep_text")  # without which a folder cannot be read
STORES = ("float32", "float16", "int8", "binary")
FORMATS = ("parquet", "npy")
ID_COLUMNS = ("id", "_id")
PART = re.compile(r"part-(\d+)\.(parquet|npy)")


class Part(NamedTuple):
    """Rows of the input that belong together."""

    number: int
    rows: list[int]  # of those with a text, counted from 1
    ids: list
    texts: list[str]
    failed: list[dict]  # {"row", "id", "error"} of the others

    def take(self, places: list[int], failed: list[dict]) -> "Part":
        """The rows at these places, and more that failed."""
        rows, ids, texts = ([values[i] for i in places] for values in (self.rows, self.ids, self.texts))
        return Part(self.number, rows, ids, texts, [*self.failed, *failed])

    @property
    def size(self) -> int:
        return len(self.rows) + len(self.failed)

    @property
    def digest(self) -> str:
        """Of ids and texts."""
        return hashlib.sha256(json.dumps([self.ids, self.texts]).encode()).hexdigest()[:16]


class StoredVectors(NamedTuple):
    ids: list
    vectors: np.ndarray  # (N, D) float32
    texts: list[str] | None


def read_parts(rows: Iterable[Row], column: str, id_column: str | None, rows_per_part: int, first: int = 0) -> Iterator[Part]:
    """Rows, which begin with part `first`, part by part. Texts without the space around them, as every script has them.

    Without a column of ids a row's id is its number, counted from 1.
    """
    part = Part(first, [], [], [], [])
    for row, (_, cells) in enumerate(rows, first * rows_per_part + 1):
        identity = row if id_column is None else str(cells.get(id_column))
        try:
            value = cells.get(column)
            text, error = ("" if value is None else as_text(value).strip()), "no text"
        except ValueError as wrong:
            text, error = "", str(wrong)
        if text:
            for values, value in zip((part.rows, part.ids, part.texts), (row, identity, text), strict=True):
                values.append(value)
        else:
            part.failed.append({"row": row, "id": identity, "error": error})
        if part.size == rows_per_part:
            yield part
            part = Part(part.number + 1, [], [], [], [])
    if part.size:
        yield part


def quantize(vectors: np.ndarray, store: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Vectors (N, D) as they are stored, and for int8 the scale (N,) that brings each back; binary keeps a bit a number."""
    if store == "int8":
        scales = np.maximum(np.abs(vectors).max(1), 1e-30) / 127
        return np.rint(vectors / scales[:, None]).astype(np.int8), scales.astype(np.float32)
    if store == "binary":
        return np.packbits(vectors > 0, axis=1), None
    return vectors.astype(store), None


def restore(stored: np.ndarray, scales: np.ndarray | None, store: str, width: int) -> np.ndarray:
    """What `quantize` gave as float32 (N, D); bits as 1 and -1."""
    if store == "binary":
        return np.unpackbits(stored, axis=1, count=width).astype(np.float32) * 2 - 1
    return stored.astype(np.float32) if scales is None else stored * scales[:, None]


class VectorFolder:
    """job: what `job.json` holds. Raises InputError where the folder was begun with something else, or is none."""

    def __init__(self, folder: Path, job: dict):
        self.folder, self.job = folder, job

    @classmethod
    def begin(cls, folder: Path, job: dict) -> "VectorFolder":
        """A new folder, or one that the same job has begun. Where its model lies now does not matter: the fingerprint says which it is."""
        if (folder / JOB_FILE).is_file():
            known = cls.open(folder).job
            if differing := [name for name in {**known, **job} if name != "model" and known.get(name) != job.get(name)]:
                name = differing[0]
                raise InputError(
                    f"{folder} was begun with {name} {excerpt(known.get(name))}, not {excerpt(job.get(name))}: choose another --out"
                )
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"{folder} exists already and holds no vectors: choose another --out")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / JOB_FILE, job)
        return cls(folder, job)

    @classmethod
    def open(cls, folder: Path) -> "VectorFolder":
        try:
            job = json.loads((folder / JOB_FILE).read_text(encoding="utf-8"))
            missing = [name for name in READ_FROM_JOB if name not in dict(job)]
        except (OSError, ValueError, TypeError):
            missing = [JOB_FILE]
        if missing:
            raise InputError(f"{folder} holds no vectors: {JOB_FILE} is missing or damaged")
        return cls(folder, job)

    def path(self, number: int, end: str) -> Path:
        return self.folder / f"part-{number:05d}.{end}"

    def has(self, number: int) -> bool:
        return self.path(number, self.job["format"]).is_file()

    def numbers(self) -> list[int]:
        """Parts that are there, in order."""
        found = (PART.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match and match[2] == self.job["format"])

    def write(self, part: Part, vectors: np.ndarray) -> None:
        """Write a part; the vectors come last, and make it complete."""
        for leftover in self.folder.glob(f".part-{part.number:05d}.*.tmp"):  # of a killed job
            leftover.unlink(missing_ok=True)
        stored, scales = quantize(vectors, self.job["store"])
        if part.failed:
            write_text(self.path(part.number, "failed.jsonl"), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part.failed))
        texts = part.texts if self.job["keep_text"] else None
        path = self.path(part.number, self.job["format"])
        if self.job["format"] == "parquet":
            write_atomic(path, lambda temporary: write_parquet(temporary, part.ids, stored, scales, texts))
            return
        write_json(self.path(part.number, "ids.json"), {"ids": part.ids, "texts": texts}, indent=None)
        if scales is not None:
            write_atomic(self.path(part.number, "scales.npy"), lambda temporary: save_array(temporary, scales))
        write_atomic(path, lambda temporary: save_array(temporary, stored))

    @contextlib.contextmanager
    def errors_of(self, number: int) -> Iterator[Path]:
        """A part's path; turns what can go wrong while it is read into InputError."""
        path = self.path(number, self.job["format"])
        try:
            yield path
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{path} is damaged ({str(error)[:80]}): delete it and run the same command again") from None

    def read(self, number: int) -> StoredVectors:
        """Raises InputError where a file is damaged or missing."""
        with self.errors_of(number) as path:
            if self.job["format"] == "parquet":
                ids, stored, scales, texts = read_parquet(path)
            else:
                stored = np.load(path, allow_pickle=False)
                ids, texts = self._read_beside(number)
                scales = np.load(self.path(number, "scales.npy"), allow_pickle=False) if self.job["store"] == "int8" else None
            return StoredVectors(ids, restore(stored, scales, self.job["store"], self.job["width"]), texts)

    def read_names(self, number: int) -> tuple[list, list[str] | None]:
        """Ids and texts of a part without its vectors. Raises InputError like `read`."""
        with self.errors_of(number) as path:
            if self.job["format"] == "npy":
                return self._read_beside(number)
            columns = ["id", "text"] if self.job["keep_text"] else ["id"]
            ids, *texts = (column.to_pylist() for column in open_parquet(path, columns).itercolumns())
            return ids, texts[0] if texts else None

    def _read_beside(self, number: int) -> tuple[list, list[str] | None]:
        beside = json.loads(self.path(number, "ids.json").read_text(encoding="utf-8"))
        return beside["ids"], beside["texts"]

    def length(self, number: int) -> int:
        """Vectors of a part, without reading them. Raises InputError like `read`."""
        with self.errors_of(number) as path:
            if self.job["format"] == "npy":
                return len(np.load(path, mmap_mode="r", allow_pickle=False))
            from pyarrow.parquet import read_metadata

            return read_metadata(os.fspath(path)).num_rows


def save_array(path: Path, array: np.ndarray) -> None:
    with open(path, "wb") as f:  # a name would be given the end .npy
        np.save(f, array)


def write_parquet(path: Path, ids: list, stored: np.ndarray, scales: np.ndarray | None, texts: list[str] | None) -> None:
    import pyarrow as pa
    from pyarrow.parquet import write_table

    vectors = pa.FixedSizeListArray.from_arrays(pa.array(stored.reshape(-1)), stored.shape[1])
    columns = {"id": pa.array(ids, pa.int64() if all(isinstance(i, int) for i in ids) else pa.string()), "vector": vectors}
    if scales is not None:
        columns["scale"] = pa.array(scales)
    if texts is not None:
        columns["text"] = pa.array(texts, pa.string())
    # a dictionary makes a byte of an 8-bit number, which parquet would store in four; floating-point numbers it makes slow, and no smaller
    write_table(pa.table(columns), os.fspath(path), use_dictionary=stored.dtype.kind in "iu")


def open_parquet(path: Path, columns: list[str] | None = None):
    """A part as a table, or some columns of it in this order."""
    import pyarrow as pa
    from pyarrow.parquet import read_table

    try:
        return read_table(os.fspath(path), columns=columns).combine_chunks()
    except pa.ArrowException as error:
        raise ValueError(str(error)) from None


def read_parquet(path: Path) -> tuple[list, np.ndarray, np.ndarray | None, list[str] | None]:
    table = open_parquet(path)
    vectors = table["vector"].combine_chunks()
    stored = vectors.values.to_numpy().reshape(len(table), vectors.type.list_size)
    scales = table["scale"].to_numpy() if "scale" in table.column_names else None
    return table["id"].to_pylist(), stored, scales, table["text"].to_pylist() if "text" in table.column_names else None
