"""Labelled data as mteb tasks: a user's files, and the bundled clustering tasks that lie in this folder.

A table with columns text,label is a clustering or a classification task, one with text1,text2,score an STS task, and a folder with
corpus.jsonl, queries.jsonl and qrels.tsv a retrieval task. mteb's classes compute the scores; this module only supplies the data.
"""

import hashlib
import json
import random
import uuid
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

from files.console import InputError, warn
from files.docstrings import bundled_task_files
from files.reading import STDIN, as_label, as_number, as_text, display_name, excerpt, read_rows

METRICS = {"Clustering": "v_measure", "Classification": "accuracy", "STS": "cosine_spearman", "Retrieval": "ndcg_at_10"}
# mteb's names for what is compared with what: texts with categories, or texts with texts
CATEGORIES = {"Clustering": "t2c", "Classification": "t2c", "STS": "t2t", "Retrieval": "t2t"}


FEW = 50  # texts, pairs or queries; fewer are scored with a warning


def bundled_tasks() -> dict[str, Path]:
    """Name and file of every bundled clustering task, sorted by name; `local_task(path, "Clustering")` makes one a task."""
    return {path.name.removesuffix(".jsonl.gz"): path for path in bundled_task_files()}


# ------------------------------------------------------------------------------------------------------ from files


def local_task(path: Path, task_type: str | None = None):
    """A file or folder as one mteb task, see `tasks_of`."""
    return tasks_of(path, [task_type])[0]


def tasks_of(path: Path, types: list[str | None]) -> list:
    """A file, standard input or a folder as an mteb task of each of `types`, named after it.

    types     "Clustering", "Classification", "STS" or "Retrieval"; None: the first one that the columns allow
    Raises InputError for what cannot be read, columns that are missing, values that cannot be scored, and a type that the columns
    do not allow.
    """
    if path.is_dir():
        name, columns = path.resolve().name, None
        possible, shape = ("Retrieval",), "a folder"
    elif path.exists() or path == STDIN:
        name = "stdin" if path == STDIN else path.name.removesuffix(".gz").rsplit(".", 1)[0]
        columns = Columns(path, ("text", "label", "text1", "text2", "score"))
        if {"text1", "text2", "score"} <= set(columns.names):
            possible, shape = ("STS",), "columns text1,text2,score"
        elif {"text", "label"} <= set(columns.names):
            possible, shape = ("Clustering", "Classification"), "columns text,label"
        else:
            has = excerpt(", ".join(columns.names), 200)
            raise InputError(f"{display_name(path)}: needs columns text,label or text1,text2,score; it has {has}")
    else:
        raise InputError(f"no file or folder {path}")
    tasks, warnings, shown = [], [], display_name(path)
    for task_type in (asked or possible[0] for asked in types):
        if task_type not in possible:
            raise InputError(f"{shown}: {shape}, data for {' or '.join(possible)}, --task asks for {task_type}")
        if task_type == "Retrieval":
            data = retrieval_data(path)
        else:
            data = sts_data(columns, shown) if task_type == "STS" else labelled_data(columns, shown, task_type)
        warnings += [doubt for doubt in doubts(data, task_type) if doubt not in warnings]
        tasks.append(make_task(name, task_type, data))
    for doubt in warnings:
        warn(f"{shown}: {doubt}")
    return tasks


def doubts(data: dict, task_type: str) -> list[str]:
    """Why the scores of data that can be scored may mean little."""
    if task_type == "Retrieval":
        n, what, texts, labels = len(data["queries"]["id"]), "queries", data["corpus"]["text"], []
    elif task_type == "STS":
        n, what, texts, labels = len(data["score"]), "pairs", [], []
    else:
        texts, labels = data.values()
        n, what = len(texts), "texts"
    lines, copies = [], len(texts) - len(set(texts))
    if n < FEW:
        lines.append(f"only {n} {what}: with fewer than {FEW}, scores vary widely")
    if copies >= max(2, len(texts) / 10):
        lines.append(f"{copies} of {len(texts)} texts are copies of others")
    if task_type == "Clustering" and len(set(labels)) > n / 2:
        lines.append(f"{len(set(labels))} labels for {n} texts: any clustering has a high v-measure, go by the AMI")
    return lines


def local_tasks(paths: list[Path], types: list[str | None]) -> list:
    """Every file or folder as a task of each of `types`, see `tasks_of`. Raises InputError for two tasks of one name and type."""
    tasks = [task for path in paths for task in tasks_of(path, types)]
    for (name, task_type), count in Counter((task.metadata.name, task.metadata.type) for task in tasks).items():
        if count > 1:
            raise InputError(f"two --data files make a {task_type} task called {name!r}: rename one, the table could not tell them apart")
    return tasks


class Columns:
    """Some columns of a file, which is read once, and of whose rows nothing else is kept: a million rows are a few lists of strings.

    names    all columns of the file, in order of appearance: objects of JSONL need not have the same ones
    Raises InputError for what cannot be read.
    """

    def __init__(self, path: Path, wanted: tuple[str, ...]):
        self.names, self.values, self.numbers, self.head = {}, {name: [] for name in wanted}, array("q"), ""
        known = {}  # labels are few: each is kept once
        for place, cells in read_rows(path):
            self.names.update(dict.fromkeys(cells))
            self.head, _, number = place.rpartition(" ")
            self.numbers.append(int(number))
            for name, values in self.values.items():
                value = cells.get(name)
                values.append(known.setdefault(value, value) if name == "label" and isinstance(value, str) else value)
        self.names = list(self.names)

    def get(self, name: str, convert: Callable[[object], str | float]) -> list:
        """One column through `as_text`, `as_label` or `as_number`. Raises InputError with the place and the column."""
        converted = []
        for number, value in zip(self.numbers, self.values[name], strict=True):
            try:
                converted.append(convert(value))
            except ValueError as error:
                raise InputError(f"{self.head} {number}: {name} {error}") from None
        return converted


def labelled_data(columns: Columns, path: str, task_type: str) -> dict:
    """Columns text,label under the names that mteb's clustering or classification tasks expect."""
    texts, labels = columns.get("text", as_text), columns.get("label", as_label)
    if len(set(labels)) < 2:
        raise InputError(f"{path}: one class only ({labels[0]!r}), there is nothing to tell apart")
    if task_type == "Clustering" and len(set(labels)) == len(labels):
        raise InputError(f"{path}: {len(labels)} texts have {len(labels)} labels, there is nothing to group: give related texts one label")
    if task_type == "Classification" and len(set(labels)) == len(labels):
        raise InputError(f"{path}: every class has one row only, classification needs two rows of a class")
    names = ("sentences", "labels") if task_type == "Clustering" else ("text", "label")
    return dict(zip(names, (texts, labels), strict=True))


def sts_data(columns: Columns, path: str) -> dict:
    """Columns text1,text2,score under the names that mteb's STS tasks expect."""
    scores = columns.get("score", as_number)
    if len(set(scores)) < 2:
        raise InputError(f"{path}: all scores are {scores[0]}, there is nothing to correlate with")
    return {"sentence1": columns.get("text1", as_text), "sentence2": columns.get("text2", as_text), "score": scores}


def retrieval_data(folder: Path) -> dict:
    """A folder of retrieval data, as {"corpus": columns, "queries": columns, "relevant": {query id: {document id: grade}}}.

    The files, each also as .gz: corpus.jsonl and queries.jsonl with `_id`, `text` and perhaps `title`; qrels.tsv with a first line
    query-id, corpus-id, score. Queries without a judgement are left out. Raises InputError for files that are missing or do not agree.
    """
    paths = {}
    for name in ("corpus.jsonl", "queries.jsonl", "qrels.tsv"):
        paths[name] = next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)
        if paths[name] is None:
            raise InputError(f"{folder} has no {name}: a retrieval task needs corpus.jsonl, queries.jsonl and qrels.tsv")
    corpus, queries = retrieval_texts(paths["corpus.jsonl"]), retrieval_texts(paths["queries.jsonl"])
    relevant = relevance_judgements(paths["qrels.tsv"], set(queries["id"]), set(corpus["id"]))
    judged = [i for i, query in enumerate(queries["id"]) if query in relevant]
    return {
        "corpus": corpus,
        "queries": {name: [values[i] for i in judged] for name, values in queries.items()},
        "relevant": relevant,
    }


def retrieval_texts(path: Path) -> dict[str, list[str]]:
    """Columns id, text and, where the file has it, title of a corpus or of queries; every id is unique."""
    file = Columns(path, ("_id", "text", "title"))
    if not {"_id", "text"} <= set(file.names):
        raise InputError(f"{path}: needs _id and text, has {excerpt(', '.join(file.names), 200)}")
    columns = {"id": file.get("_id", as_label), "text": file.get("text", as_text)}
    if "title" in file.names:  # not every document has one
        columns["title"] = file.get("title", lambda title: "" if title is None else as_text(title))
    repeated = [number for number, count in Counter(columns["id"]).items() if count > 1]
    if repeated:
        raise InputError(f"{path}: _id {repeated[0]!r} occurs more than once")
    return columns


def relevance_judgements(path: Path, queries: set[str], documents: set[str]) -> dict[str, dict[str, int]]:
    """Relevance judgements {query id: {document id: grade}}; the ids have to be in `queries` and `documents`."""
    file = Columns(path, ("query-id", "corpus-id", "score"))
    if not {"query-id", "corpus-id", "score"} <= set(file.names):
        raise InputError(f"{path}: needs a first line with query-id, corpus-id and score, has {excerpt(', '.join(file.names), 200)}")
    columns = [file.get("query-id", as_label), file.get("corpus-id", as_label), file.get("score", as_number)]
    relevant = defaultdict(dict)
    for number, query, document, score in zip(file.numbers, *columns, strict=True):
        if query not in queries or document not in documents:
            raise InputError(f"{file.head} {number}: query {query!r} or document {document!r} is not in the other files")
        if score != int(score):
            raise InputError(f"{file.head} {number}: score is {score}, but mteb grades relevance in whole numbers")
        relevant[query][document] = int(score)
    if not any(grade > 0 for grades in relevant.values() for grade in grades.values()):
        raise InputError(f"{path}: no document is relevant to any query")
    return dict(relevant)


# -------------------------------------------------------------------------------------------------------- to tasks


def digest(data: dict) -> str:
    """Tells the data of tasks apart, 16 hex digits; without a copy of it all."""
    known = hashlib.sha256()
    for part in json.JSONEncoder(sort_keys=True).iterencode(data):
        known.update(part.encode())
    return known.hexdigest()[:16]


def task_metadata(name: str, task_type: str, data: dict):
    """What mteb has to know about a task; the hash of the data is its revision."""
    from mteb import TaskMetadata

    unknown = ("reference", "date", "domains", "task_subtypes", "license", "annotations_creators", "dialect", "sample_creation")
    return TaskMetadata(
        name=name,
        description=f"{name}, local data",
        type=task_type,
        category=CATEGORIES[task_type],
        modalities=["text"],
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score=METRICS[task_type],
        dataset={"path": f"local/{name}", "revision": digest(data)},
        **dict.fromkeys(unknown),
        bibtex_citation=None,
    )


def make_task(name: str, task_type: str, data: dict):
    """An mteb task of the class for `task_type`, whose data is in memory already. The scores are mteb's."""
    from datasets import DatasetDict
    from mteb.abstasks import AbsTaskClassification, AbsTaskClustering, AbsTaskRetrieval, AbsTaskSTS

    class InMemory:
        metadata = task_metadata(name, task_type, data)

        def load_data(self, **_) -> None:
            self.data_loaded = True

    if task_type == "Clustering":

        class InMemoryClustering(InMemory, AbsTaskClustering):
            max_fraction_of_documents_to_embed = None  # mteb's default embeds 4 % of the rows, and few rows give too high a score
            max_documents_per_cluster = min(2048, len(data["labels"]))  # drawn with replacement: more would only repeat rows

        task = InMemoryClustering()
        task.dataset = DatasetDict(test=in_memory(data))
    elif task_type == "Classification":
        task = type("InMemoryClassification", (InMemory, AbsTaskClassification), {})()
        task.dataset = split_by_class(data)
    elif task_type == "STS":
        bounds = {"min_score": min(data["score"]), "max_score": max(data["score"])}
        task = type("InMemorySTS", (InMemory, AbsTaskSTS), bounds)()
        task.dataset = DatasetDict(test=in_memory(data))
    else:
        task = type("InMemoryRetrieval", (InMemory, AbsTaskRetrieval), {})()
        corpus, queries = in_memory(data["corpus"]), in_memory(data["queries"])
        task.dataset = {"default": {"test": {"corpus": corpus, "queries": queries, "relevant_docs": data["relevant"], "top_ranked": None}}}
    task.data_loaded = True
    return task


def in_memory(columns: dict[str, list]):
    """Columns as a data set. datasets would make a fingerprint of all bytes, copied twice over; nothing is kept by this one."""
    import pyarrow as pa
    from datasets import Dataset

    return Dataset(pa.table(columns), fingerprint=uuid.uuid4().hex[:16])


def split_by_class(data: dict):
    """Half of each class for training and half for testing, drawn with a fixed seed; a class of one row is in training only."""
    from datasets import DatasetDict

    rows_of_class, rng = defaultdict(list), random.Random(0)
    for i, label in enumerate(data["label"]):
        rows_of_class[label].append(i)
    splits = {"train": [], "test": []}
    for rows in rows_of_class.values():
        rng.shuffle(rows)
        half = (len(rows) + 1) // 2
        splits["train"] += rows[:half]
        splits["test"] += rows[half:]
    return DatasetDict(
        {split: in_memory({column: [values[i] for i in sorted(rows)] for column, values in data.items()}) for split, rows in splits.items()}
    )
