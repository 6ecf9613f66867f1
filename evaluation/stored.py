"""--results DIR: scores of mteb's tasks in mteb's own layout, for mteb to read and for other tables to use again.

    DIR/results/{name}/{revision}/{Task}.json, model_meta.json        # mteb.ResultCache(DIR)

mteb's key is the name and the revision of a model, which know nothing of prompt and pooling: the revision is therefore our fingerprint with
the dtype behind it. The file is a TaskResult of mteb with one more field, `evaluate`, which mteb passes over: {"cell": as in the file of
--out, "evidence": what intervals are made of, or null}. A score is used again where fingerprint, dtype and the revision of the task's data
are the same; a file of other data is replaced.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from evaluation.evidence import Evidence
from evaluation.finished import pack, unpack
from evaluation.mteb_model import MtebModel
from files.console import warn
from files.writing import errors_of_writing, write_atomic, write_text

if TYPE_CHECKING:
    from mteb.results import TaskResult


def is_published(task) -> bool:
    """Whether a task is one of mteb's, with data of the hub: a user's file and the bundled tasks are known to nobody else."""
    return not task.metadata.dataset["path"].startswith("local/")


class StoredResults:
    """Results of mteb's tasks in a folder. folder None: nothing is read or written; writes: under torchrun one process does."""

    def __init__(self, folder: Path | None, *, writes: bool = True):
        self.folder, self.writes = folder, writes

    def path(self, task, model: MtebModel) -> Path | None:
        """Where a score belongs; None for a task or a row that is not kept. A row chosen by scores of the table is none by itself."""
        if self.folder is None or model.better_of or not is_published(task):
            return None
        about = model.mteb_model_meta
        return self.folder / "results" / about.model_name_as_path() / about.revision / f"{task.metadata.name}.json"

    def get(self, task, model: MtebModel) -> "tuple[TaskResult, dict | None, Evidence | None] | None":
        """A result that may be used again, its cell and what is known of its rows, which results of mteb alone lack; else None."""
        from encoder.processes import all_reduce_number

        path, found = self.path(task, model), None
        if path is not None and path.is_file():
            found = self.read(path, task)
        if path is None or not all_reduce_number(found is not None, "min"):
            return None
        return found

    def read(self, path: Path, task) -> "tuple[TaskResult, dict | None, Evidence | None] | None":
        from mteb.results import TaskResult

        try:
            result = TaskResult.from_disk(path)
            ours = json.loads(path.read_text(encoding="utf-8")).get("evaluate") or {}
            evidence = unpack(ours["evidence"]) if ours.get("evidence") else None
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            warn(f"{path} is damaged: its score is computed again")
            return None
        same = result.task_name == task.metadata.name and result.dataset_revision == task.metadata.revision
        return (result, ours.get("cell"), evidence) if same and not result.get_missing_evaluations(task) else None

    def add(self, task, model: MtebModel, result: "TaskResult", cell: dict, evidence: Evidence | None) -> None:
        """Keep a score. Raises WriteError."""
        path = self.path(task, model)
        if path is None or not self.writes:
            return
        with errors_of_writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        about = path.with_name("model_meta.json")
        if not about.exists():
            write_text(about, json.dumps(model.mteb_model_meta.to_dict(), default=str, indent=2) + "\n")

        def write(temporary: Path) -> None:
            result.to_disk(temporary)
            whole = json.loads(temporary.read_text(encoding="utf-8"))
            whole["evaluate"] = {"cell": cell, "evidence": evidence and pack(evidence)}
            temporary.write_text(json.dumps(whole, indent=1), encoding="utf-8")

        write_atomic(path, write)
