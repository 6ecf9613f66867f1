"""The cells of a table that is not finished: a line of JSON each, beside the place for the results, until that is written.

    {"cell": as in the results, "revision": of the task's data, "row": [label, fingerprint, grid, baseline], "evidence": base64 or null}

The same command goes on where it was interrupted: a cell of the same task, data, fingerprint, dtype and device is not computed again.
"""

import base64
import io
import json
from pathlib import Path

import numpy as np

from evaluation.differences import Row
from evaluation.evidence import Evidence
from evaluation.mteb_model import MtebModel
from files.console import InputError
from files.writing import append_line, write_text


def partial(out: Path) -> Path:
    """Where the finished cells of a table are kept until it is complete."""
    return out.with_name(out.name + ".partial")


BEGINNING = '{"cell": {'  # of a line


class FinishedCells:
    """Cells by task, data and row. Raises InputError for a file that holds something else.

    path       None: nothing is read or written
    writes     under torchrun one process writes, and all of them read
    """

    def __init__(self, path: Path | None, *, writes: bool = True):
        self.path, self.writes, self.known = path, writes, {}
        if path is None or not path.exists():
            return
        text = path.read_text(encoding="utf-8", errors="replace")
        whole = text[: text.rfind("\n") + 1]
        begun = text[len(whole) :]  # by a process that was killed while it wrote
        if begun and begun[: len(BEGINNING)] == BEGINNING[: len(begun)]:
            if writes:
                write_text(path, whole)
            begun = ""
        for line in [*whole.splitlines(), *([begun] if begun else [])]:
            try:
                known = json.loads(line)
                cell = known["cell"]
                self.known[cell["task"], known["revision"], cell["fingerprint"], cell["computed"]] = known
            except (ValueError, KeyError, TypeError):
                raise InputError(f"{path} exists already and holds no cells of a table: move it away") from None

    def get(self, task, model: MtebModel) -> tuple[dict, Row, Evidence | None] | None:
        """A cell, its row and what is known of the rows behind it; None where it is not finished."""
        known = self.known.get((task.metadata.name, revision(task), model.fingerprint, model.computed))
        if known is None:
            return None
        return known["cell"], Row(*known["row"]), known["evidence"] and unpack(known["evidence"])

    def add(self, task, cell: dict, row: Row, evidence: Evidence | None) -> None:
        if self.path is not None and self.writes:
            line = {"cell": cell, "revision": revision(task), "row": row, "evidence": evidence and pack(evidence)}
            append_line(self.path, json.dumps(line))

    def remove(self) -> None:
        """The results have been written."""
        if self.path is not None and self.writes:
            self.path.unlink(missing_ok=True)


def revision(task) -> str:
    return str(task.metadata.dataset.get("revision"))


def pack(evidence: Evidence) -> str:
    file = io.BytesIO()
    arrays = {name: value for name, value in evidence._asdict().items() if isinstance(value, np.ndarray)}
    np.savez_compressed(file, rows=evidence.rows, n=evidence.n, **arrays)
    return base64.b64encode(file.getvalue()).decode()


def unpack(text: str) -> Evidence:
    with np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False) as file:
        return Evidence(str(file["rows"]), int(file["n"]), file["scores"], file["redrawn"], file.get("halves"))
