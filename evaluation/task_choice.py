"""Which tasks evaluate.py runs: those of a benchmark, the bundled ones, or a user's files."""

import argparse
from collections import Counter

from evaluation.hub_data import in_cache
from files.console import InputError, say
from tasks.mteb_tasks import bundled_tasks, local_task, local_tasks

BENCHMARK, FORMER = "MTEB(eng, v2)", "MTEB(eng, v1)"
TYPES = {  # as --task calls them: as mteb calls them; all that the two benchmarks have
    "clustering": "Clustering",
    "classification": "Classification",
    "sts": "STS",
    "retrieval": "Retrieval",
    "reranking": "Reranking",
    "pair-classification": "PairClassification",
    "summarization": "Summarization",
}


def choose_tasks(args: argparse.Namespace, failures: list[str]) -> list:
    """What --task, --benchmark, --data, --bundled and --paper ask for, as mteb tasks that have not been run yet.

    Without network, tasks whose data is not in the cache are added to `failures`, unless they are all that was asked for.
    Raises InputError for flags that exclude each other, unknown names, and data that is not available.
    """
    asked = args.task or ([] if args.benchmark or args.paper else ["clustering"])
    bundled = bundled_tasks()
    types = [TYPES[name.lower()] for name in asked if name.lower() in TYPES]
    chosen = [name for name in asked if name in bundled]
    names = [name for name in asked if name.lower() not in TYPES and name not in bundled]
    if args.data:
        if names or chosen:
            raise InputError(f"--data is scored by its columns, --task {(names or chosen)[0]!r} names another task: leave one of them out")
        return apart(local_tasks(args.data, types if args.task else [None]))
    if args.bundled:
        if names or types != ["Clustering"]:
            raise InputError("--bundled runs clustering tasks: leave --task out beside it")
        chosen = list(bundled)
    local = [local_task(bundled[name], "Clustering") for name in chosen]
    if args.bundled or (local and not types and not names):
        return local
    if args.paper:
        tasks = [task for benchmark in (FORMER, BENCHMARK) for task in listed_tasks([], ["Clustering"], benchmark)]
    else:
        tasks = listed_tasks(names, types, args.benchmark or BENCHMARK, whole_benchmark=not asked)
    if args.prefetch:
        return tasks
    available = here(tasks, failures)
    if available or args.paper:
        return local + available
    what = ", ".join([*names, *types] or ["all tasks"]) + (f" of {args.benchmark or BENCHMARK}" if types or not asked else "")
    missing = f"the data of {what} is not available (no network, nothing in the cache)"
    failures.clear()
    if types == ["Clustering"] and not names and not args.benchmark:
        say(f"{missing}: scoring the bundled clustering tasks instead")
        return [local_task(path, "Clustering") for path in bundled.values()]
    raise InputError(f"{missing}: --prefetch fetches it where there is a network, and --data scores your own")


def apart(tasks: list) -> list:
    """The tasks of the user's files; where several have one name, as those of two types of one file, the type stands behind it."""
    counts = Counter(task.metadata.name for task in tasks)
    for task in tasks:
        if counts[name := task.metadata.name] > 1:
            task.metadata = task.metadata.model_copy(update={"name": f"{name}-{task.metadata.type.lower()}"})
    return tasks


def here(tasks: list, failures: list[str]) -> list:
    """The tasks that can be run now: all where the hub answers, else those whose data is in the cache."""
    from encoder.base_models import go_offline, hub_answers

    if hub_answers():
        return tasks
    available = [task for task in tasks if in_cache(task)]
    if available:
        go_offline()
        say(f"no network: running the {len(available)} of {len(tasks)} tasks whose data is in the cache", error=True)
    names = {task.metadata.name for task in available}
    missing = [task.metadata.name for task in tasks if task.metadata.name not in names]
    failures += [f"{name}: its data is not in the cache, and the hub does not answer" for name in missing]
    return available


def listed_tasks(names: list[str], types: list[str], benchmark: str, *, whole_benchmark: bool = False) -> list:
    """mteb's tasks by name, and those of a benchmark that are of one of `types`, or all of it.

    A name is first looked up in the benchmark and in the two English ones: of a task of several languages these have the English part.
    """
    import mteb

    try:
        tasks = [task for task in mteb.get_benchmark(benchmark).tasks if whole_benchmark or task.metadata.type in types]
    except KeyError as error:
        raise InputError(f"--benchmark: {error.args[0]} (the English ones are {BENCHMARK} and {FORMER})") from None
    return list({task.metadata.name: task for task in [*(task_by_name(name, benchmark) for name in names), *tasks]}.values())


def task_by_name(name: str, benchmark: str):
    """A task of mteb. Raises InputError for what is none."""
    import mteb

    for of_benchmark in (mteb.get_benchmark(b).tasks for b in (benchmark, BENCHMARK, FORMER)):
        for task in of_benchmark:
            if task.metadata.name == name:
                return task
    try:
        return mteb.get_task(name, languages=["eng"])
    except (KeyError, ValueError) as error:
        reason = " ".join(str(error.args[0]).split()).removeprefix("KeyError: ")[:200]
        hint = f"types are {', '.join(TYPES)}; bundled tasks {', '.join(bundled_tasks())}"
        raise InputError(f"--task: {reason} ({hint}; or a task name of mteb)") from None
