"""What embed.py does with each part of a file, in this process or in many: read it, embed its texts, write its vectors.

Legend: N rows of a part, D numbers of a vector.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from encoder.processes import distributed
from files.console import InputError
from files.reading import file_kind, parquet_length, read_rows
from serving.vectors import Part, read_parts

if TYPE_CHECKING:
    from encoder import Encoder, EncodingReport


@dataclass(frozen=True)
class Source:
    """The file of a job, and how its rows are read."""

    path: Path
    column: str
    id_column: str | None
    rows_per_part: int

    def parts(self, first: int = 0) -> Iterator[Part]:
        """The parts from number `first` on. What lies before is not even read of a parquet, and read in vain of any other file."""
        rows = read_rows(self.path, start=first * self.rows_per_part)
        return read_parts(rows, self.column, self.id_column, self.rows_per_part, first)

    def length(self) -> int:
        """Rows of the file: a parquet says it, any other is read. Raises InputError for a row that cannot be read."""
        return parquet_length(self.path) if self.jumps else sum(1 for _ in read_rows(self.path))

    @property
    def jumps(self) -> bool:
        """Whether a part is reached without reading those before it."""
        return file_kind(self.path) == "parquet"


@dataclass(frozen=True)
class Model:
    """Which model embeds, and how: the arguments of `Encoder.load`."""

    name: str
    dtype: str | None
    device: str | None
    trust_remote_code: bool

    def load(self) -> "Encoder":
        """The encoder with its adapter merged."""
        from encoder import Encoder

        encoder = Encoder.load(self.name, dtype=self.dtype, device=self.device, trust_remote_code=self.trust_remote_code)
        encoder.merge()
        return encoder


def describe(encoder: "Encoder") -> dict:
    """What of an encoder decides the vectors of a folder."""
    return {"fingerprint": encoder.fingerprint, "width": encoder.width, "dtype": str(encoder.dtype)}


def vectors_of(
    encoder: "Encoder", part: Part, role: str, report: "EncodingReport", done: Callable[[int], object] | None = None
) -> tuple[Part, np.ndarray]:
    """The part with the texts that cannot be embedded set aside, and the vectors (N, D) float32 of the others.

    done       is called with a number of texts whenever so many more have been through the model
    Raises InputError for such a text where torchrun has started several processes.
    """
    failed = []

    def encode(rows: list[int]) -> tuple[list[int], list[np.ndarray]]:
        try:
            texts = [part.texts[i] for i in rows]
            return rows, [vectors for (vectors,) in encoder.stream(texts, role, report=report, done=done)]
        except InputError as error:
            if distributed().world_size > 1:  # the others could not follow
                raise
            if len(rows) == 1:
                failed.append({"row": part.rows[rows[0]], "id": part.ids[rows[0]], "error": str(error)})
                return [], []
            halves = [encode(half) for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :])]
            return halves[0][0] + halves[1][0], halves[0][1] + halves[1][1]

    places, blocks = encode(list(range(len(part.texts))))
    return part.take(places, failed), np.concatenate([np.empty((0, encoder.width), np.float32), *blocks])
