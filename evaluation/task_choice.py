"""Which tasks evaluate.py runs: those of a benchmark, the bundled ones, or a user's files."""

import argparse
from pathlib import Path

from files.console import InputError, say
from tasks.mteb_tasks import bundled_tasks, local_task, local_tasks

BENCHMARK = "MTEB(eng, v2)"
TYPES = {  # as --task calls them: as mteb calls them
    "clustering": "Clustering",
    "classification": "Classification",
    "sts": "STS",
    "retrieval": "Retrieval",
    "reranking": "Reranking",
    "pair-classification": "PairClassification",
    "summarization": "Summarization",
}


def in_cache(task) -> bool:
    """Whether the data of an mteb task was downloaded to this machine before."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return (Path(HF_HUB_CACHE) / f"datasets--{task.metadata.dataset['path'].replace('/', '--')}").is_dir()


def choose_tasks(args: argparse.Namespace) -> list:
    """What --task, --benchmark, --data and --bundled ask for, as mteb tasks that have not been run yet.

    Raises InputError for flags that exclude each other, unknown names, and data that is not available.
    """
    asked = args.task or ([] if args.benchmark else ["clustering"])
    bundled = bundled_tasks()
    types = [TYPES[name.lower()] for name in asked if name.lower() in TYPES]
    chosen = [name for name in asked if name in bundled]
    names = [name for name in asked if name.lower() not in TYPES and name not in bundled]
    if args.data:
        if names or chosen:
            raise InputError(f"--data is scored by its columns, --task {(names or chosen)[0]!r} names another task: leave one of them out")
        return local_tasks(args.data, types if args.task else [None])
    if args.bundled:
        if names or types != ["Clustering"]:
            raise InputError("--bundled runs clustering tasks: leave --task out beside it")
        chosen = list(bundled)
    local = [local_task(bundled[name], "Clustering") for name in chosen]
    if args.bundled or (local and not types and not names):
        return local

    from encoder.base_models import go_offline, hub_answers

    tasks = listed_tasks(names, types, args.benchmark or BENCHMARK, whole_benchmark=not asked)
    online = hub_answers()
    available = tasks if online else [task for task in tasks if in_cache(task)]
    if available:
        if not online:
            go_offline()
            say(f"no network: running the {len(available)} of {len(tasks)} tasks whose data is in the cache", error=True)
        return local + available
    what = ", ".join([*names, *types] or ["all tasks"]) + (f" of {args.benchmark or BENCHMARK}" if types or not asked else "")
    missing = f"the data of {what} is not available (no network, nothing in the cache)"
    if types == ["Clustering"] and not names and not args.benchmark:
        say(f"{missing}: scoring the bundled clustering tasks instead")
        return [local_task(path, "Clustering") for path in bundled.values()]
    raise InputError(f"{missing}: score your own with --data")


def listed_tasks(names: list[str], types: list[str], benchmark: str, *, whole_benchmark: bool) -> list:
    """mteb's tasks by name, and those of a benchmark that are of one of `types`, or all of it."""
    import mteb

    try:
        tasks = list(mteb.get_tasks(tasks=names, languages=["eng"])) if names else []
        if types or whole_benchmark:
            tasks += [task for task in mteb.get_benchmark(benchmark).tasks if whole_benchmark or task.metadata.type in types]
    except (KeyError, ValueError) as error:
        hint = f"types are {', '.join(TYPES)}; bundled tasks {', '.join(bundled_tasks())}"
        raise InputError(
            f"{' '.join(str(error.args[0]).split()).removeprefix('KeyError: ')[:200]} ({hint}; or a task name of mteb)"
        ) from None
    return tasks
