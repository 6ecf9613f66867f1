"""The data of mteb's tasks in the hub's cache on this machine: whether it is there, how tasks read it, how --prefetch brings it.

Without network a set is read from the snapshot of the very commit that its task names. The libraries' own way without network takes
whichever version of the set was prepared last, and mteb's two English tracks name different versions of some.
"""

import argparse
import contextlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from evaluation.failures import others_go_on, reason, task_errors
from files.console import InputError, say

CARDS = ("README.md", ".gitattributes")  # they come with the first question to the hub, before any data


def parts(task) -> list:
    """The tasks that have data: those that an aggregate consists of, else the task itself."""
    return list(task.metadata.tasks) if task.is_aggregate else [task]


def snapshot(task) -> Path | None:
    """Where the data of a task lies in the hub's cache, in the version that the task names; None where it is not there."""
    from huggingface_hub.constants import HF_HUB_CACHE

    about = task.metadata.dataset
    folder = Path(HF_HUB_CACHE) / f"datasets--{about['path'].replace('/', '--')}" / "snapshots" / str(about.get("revision"))
    return folder if any(path.is_file() and path.name not in CARDS for path in folder.rglob("*")) else None


def in_cache(task) -> bool:
    """Whether the data of a task was downloaded to this machine before."""
    return all(snapshot(part) for part in parts(task))


def load(task) -> None:
    """Load the data of a task that is no aggregate: from the hub's cache, else as mteb does. Raises one of `task_errors`."""
    from encoder.base_models import hub_answers

    published, folder = task.metadata, snapshot(task)
    if folder:
        try:
            task.metadata = published.model_copy(update={"dataset": published.dataset | {"path": str(folder)}})
            task.load_data()
            return
        except task_errors():  # a part of a set, which other programs have downloaded
            if not hub_answers():
                raise
        finally:
            task.metadata = published
    task.load_data()


@contextlib.contextmanager
def loaded(task) -> Iterator[None]:
    """Have the data of a task in memory: once for all rows of the table, and no longer than needed. Raises one of `task_errors`."""
    import datasets

    begun = [part for part in parts(task) if not part.data_loaded]
    datasets.disable_progress_bars()
    try:
        for part in begun:
            load(part)
        yield
    finally:
        for part in begun:
            if part.data_loaded:
                part.unload_data()


def prefetch(args: argparse.Namespace, tasks: list, failures: list[str]) -> None:
    """Bring the data of `tasks` and the hub's models among --model into the cache, and read the data once, as a run will.

    What is missing is added to `failures`.
    """
    from evaluation.rows import fetch_model

    users = defaultdict(list)
    for part in (part for task in tasks for part in parts(task)):
        users[part.metadata.dataset["path"], part.metadata.dataset.get("revision")].append(part)
    n_before, n_sets, n_models = len(failures), 0, 0
    for (path, revision), of_set in users.items():
        names = ", ".join(task.metadata.name for task in of_set)
        try:
            size = fetch_dataset(path, revision)
        except InputError as error:
            failures.append(f"{names}: {error}")
            continue
        say(f"{names}: {path}, {size / 2**20:,.1f} MiB")
        n_sets += 1
        for task in of_set:
            with others_go_on(failures, task.metadata.name), loaded(task):
                pass
    for spec in args.model or []:
        try:
            if folder := fetch_model(spec, args):
                say(f"{spec}: {folder}")
                n_models += 1
        except InputError as error:
            failures.append(str(error))
    state = "without network now" if len(failures) == n_before else "without what is missing"
    say(f"{n_sets} data sets, {n_models} models of the hub: the same command with --prefetch left out runs {state}")


def fetch_dataset(path: str, revision: str | None) -> int:
    """Download all files of a data set that are not in the cache. Returns their bytes. Raises InputError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError

    from encoder.base_models import hub_answers

    try:
        folder = Path(snapshot_download(path, repo_type="dataset", revision=revision, local_files_only=not hub_answers()))
    except (HTTPError, OSError, ValueError) as error:
        why = reason(error).split(". ")[0] if hub_answers() else "it is not in this machine's cache, and the hub does not answer"
        raise InputError(f"{path}: {why}") from None
    files = [file for file in folder.rglob("*") if file.is_file()]
    if not [file for file in files if file.name not in CARDS]:
        raise InputError(f"{path}: no data in this machine's cache" + ("" if hub_answers() else ", and the hub does not answer"))
    return sum(file.stat().st_size for file in files)
