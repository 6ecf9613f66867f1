"""Score embeddings on MTEB tasks, on tasks that need no network, or on your own labelled data.

    python evaluate.py                                         # newest run beside its untuned base, clustering
    python evaluate.py --model tiny runs/tiny --baselines tfidf        # side by side
    python evaluate.py --model tiny --prompt none cluster --pooling mean last --scope all text    # a grid for a base
    python evaluate.py --data mine.csv                         # columns text,label (or text1,text2,score; or a folder)
    python evaluate.py --task clustering classification --model runs/mine --out results/mine.json
    torchrun --nproc-per-node 8 evaluate.py --model mistral-7b         # every process encodes its share

Every score is computed by mteb's own task classes. Where the data of MTEB(eng, v2) can be had, --task runs its track;
without network, clustering falls back to two tasks that lie in tasks/: first sentences of docstrings by package and by
module, none of them in the docstring pairs. Vectors are normalised before they are clustered.

--data takes csv, tsv, jsonl (also .gz) or parquet with `text,label` (clustering, or --task classification) or
`text1,text2,score` (STS), or a folder with corpus.jsonl, queries.jsonl (`_id`, `text`) and qrels.tsv (retrieval).

--out FILE.json: {"results": [{"task", "type", "metric", "score" in 0..1, "splits": {split: score}, "ami" (clustering),
"bootstrap_scores": [...] or null, "model", "fingerprint", "contract", "computed": dtype and device, "seconds"}],
"versions": {...}}
"""

import argparse
import copy
import csv
import gzip
import hashlib
import itertools
import json
import logging
import math
import os
import platform
import random
import sys
import time
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np

from encoder import (
    CONTRACT_FILE,
    POOLINGS,
    PRESETS,
    QUANTIZATIONS,
    SCOPES,
    Contract,
    Encoder,
    View,
    default_scope,
    find_base,
    hub_answers,
    is_run,
    processes,
    write_atomic,
)
from prompts import PROMPTS, TASK_PROMPTS, InputError, get_prompt

HERE = Path(__file__).resolve().parent
TASKS, RUNS = HERE / "tasks", HERE / "runs"
BENCHMARK = "MTEB(eng, v2)"
TYPES = {
    "clustering": "Clustering",
    "classification": "Classification",
    "sts": "STS",
    "retrieval": "Retrieval",
    "reranking": "Reranking",
    "pair-classification": "PairClassification",
    "summarization": "Summarization",
}
METRICS = {"Clustering": "v_measure", "Classification": "accuracy", "STS": "cosine_spearman", "Retrieval": "ndcg_at_10"}
CATEGORIES = {"Clustering": "t2c", "Classification": "t2c", "STS": "t2t", "Retrieval": "t2t"}


# ------------------------------------------------------------------------------------------------- data of one's own


def read_table(path: Path) -> list[dict]:
    """Rows of a csv, tsv, jsonl (also .gz) or parquet file, through `datasets`; cells of csv and tsv are strings as they stand.

    Raises InputError for what cannot be read.
    """
    from datasets import Features, Value, load_dataset
    from datasets.exceptions import DatasetGenerationError

    suffix = "".join(s for s in path.suffixes[-2:] if s != ".gz").lower().rpartition(".")[2]
    kinds = {"csv": "csv", "tsv": "csv", "json": "json", "jsonl": "json", "parquet": "parquet"}
    if suffix not in kinds:
        raise InputError(f"{path}: unknown kind of file, take one of .{', .'.join(kinds)} (csv and jsonl may be gzipped)")
    options = {}
    try:
        if kinds[suffix] == "csv":  # "NA" is a text and "007" a label: nothing is guessed
            sep = "\t" if suffix == "tsv" else ","
            with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig", newline="") as f:
                header = next(csv.reader(f, delimiter=sep), [])
            options = {
                "sep": sep,
                "keep_default_na": False,
                "encoding": "utf-8-sig",
                "features": Features({c: Value("string") for c in header}),
            }
        rows = list(load_dataset(kinds[suffix], data_files=str(path), split="train", streaming=True, **options))
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.start}): convert it first, for example with iconv -t utf-8") from None
    except (DatasetGenerationError, ValueError, OSError, EOFError, StopIteration, zlib.error) as error:
        raise InputError(f"cannot read {path}: {' '.join(str(error).split())[:200] or 'it is empty'}") from None
    if not rows:
        raise InputError(f"{path} is empty")
    return rows


def column(rows: list[dict], name: str, path: Path, kind: type) -> list:
    """One column as str or float. Only a text may be empty. Raises InputError naming the row."""
    values = []
    for i, cells in enumerate(rows, 1):
        value = "" if cells.get(name) is None else cells[name]
        if value == "" and not name.startswith(("text", "title")):
            raise InputError(f"{path}, row {i}: {name} is empty")
        try:
            values.append(kind(value))
        except (ValueError, TypeError):
            raise InputError(f"{path}, row {i}: {name} is {value!r}, which is no number") from None
        if kind is float and not math.isfinite(values[-1]):
            raise InputError(f"{path}, row {i}: {name} is {value!r}, which is no number to compare")
    return values


def local_task(path: Path, task_type: str | None):
    """A file or folder of the user's -> an mteb task. `task_type`: what --task asked for, to tell a text,label file's use."""
    if not path.exists():
        raise InputError(f"no file or folder {path}")
    name = path.name.removesuffix(".gz").rsplit(".", 1)[0] if path.is_file() else path.resolve().name
    rows = [] if path.is_dir() else read_table(path)
    columns = set(rows[0]) if rows else set()
    if path.is_dir():
        fits, shape = ("Retrieval",), "a folder"
    elif {"text1", "text2", "score"} <= columns:
        fits, shape = ("STS",), "columns text1,text2,score"
    elif {"text", "label"} <= columns:
        fits, shape = ("Clustering", "Classification"), "columns text,label"
    else:
        raise InputError(f"{path}: needs columns text,label or text1,text2,score; it has {', '.join(sorted(columns))}")
    kind = task_type or fits[0]
    if kind not in fits:
        raise InputError(f"{path}: {shape} make a task of type {' or '.join(fits)}, --task asks for {kind}")
    if kind == "Retrieval":
        return make_task(name, kind, retrieval_data(path))
    if kind == "STS":
        scores = column(rows, "score", path, float)
        if len(set(scores)) < 2:
            raise InputError(f"{path}: all scores are {scores[0]}, there is nothing to correlate with")
        return make_task(
            name, kind, {"sentence1": column(rows, "text1", path, str), "sentence2": column(rows, "text2", path, str), "score": scores}
        )
    texts, labels = column(rows, "text", path, str), column(rows, "label", path, str)
    if len(set(labels)) < 2:
        raise InputError(f"{path}: one class only ({labels[0]!r}), there is nothing to tell apart")
    names = ("sentences", "labels") if kind == "Clustering" else ("text", "label")
    return make_task(name, kind, dict(zip(names, (texts, labels), strict=True)))


def retrieval_data(folder: Path) -> dict:
    """corpus.jsonl, queries.jsonl (`_id`, `text`, maybe `title`), qrels.tsv (query-id, corpus-id, score), each maybe .gz."""
    found = {}
    for stem in ("corpus.jsonl", "queries.jsonl", "qrels.tsv"):
        path = next((p for p in (folder / stem, folder / (stem + ".gz")) if p.is_file()), None)
        if path is None:
            raise InputError(f"{folder} has no {stem}: a retrieval task needs corpus.jsonl, queries.jsonl and qrels.tsv")
        found[stem] = (path, read_table(path))
    out = {}
    for stem in ("corpus.jsonl", "queries.jsonl"):
        path, rows = found[stem]
        if not {"_id", "text"} <= set(rows[0]):
            raise InputError(f"{path}: needs _id and text, has {', '.join(rows[0])}")
        out[stem] = {"id": column(rows, "_id", path, str), "text": column(rows, "text", path, str)}
        if "title" in rows[0]:
            out[stem]["title"] = column(rows, "title", path, str)
        twice = [i for i, n in Counter(out[stem]["id"]).items() if n > 1]
        if twice:
            raise InputError(f"{path}: _id {twice[0]!r} stands there more than once")
    path, rows = found["qrels.tsv"]
    if not {"query-id", "corpus-id", "score"} <= set(rows[0]):
        raise InputError(f"{path}: needs a first line with query-id, corpus-id and score, has {', '.join(map(str, rows[0]))}")
    queries, documents = set(out["queries.jsonl"]["id"]), set(out["corpus.jsonl"]["id"])
    relevant = defaultdict(dict)
    scores = column(rows, "score", path, float)
    for i, (query, document, score) in enumerate(
        zip(column(rows, "query-id", path, str), column(rows, "corpus-id", path, str), scores, strict=True), 1
    ):
        if query not in queries or document not in documents:
            raise InputError(f"{path}, row {i}: query {query!r} or document {document!r} is not in the other files")
        if score != int(score):
            raise InputError(f"{path}, row {i}: score is {score}, mteb grades relevance in whole numbers")
        relevant[query][document] = int(score)
    if not any(score > 0 for grades in relevant.values() for score in grades.values()):
        raise InputError(f"{path}: no document is relevant to any query")
    kept = [i for i, query in enumerate(out["queries.jsonl"]["id"]) if query in relevant]
    asked = {name: [values[i] for i in kept] for name, values in out["queries.jsonl"].items()}
    return {"corpus": out["corpus.jsonl"], "queries": asked, "relevant": dict(relevant)}


def make_task(name: str, task_type: str, data: dict):
    """An mteb task of the right class whose data is here already. Scores are mteb's; only `load_data` is ours."""
    import datasets
    from mteb import TaskMetadata
    from mteb.abstasks import AbsTaskClassification, AbsTaskClustering, AbsTaskRetrieval, AbsTaskSTS

    digest = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]
    about = TaskMetadata(
        name=name,
        description=f"{name}, local data",
        type=task_type,
        category=CATEGORIES[task_type],
        modalities=["text"],
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score=METRICS[task_type],
        dataset={"path": f"local/{name}", "revision": digest},
        **dict.fromkeys(("reference", "date", "domains", "task_subtypes", "license", "annotations_creators", "dialect", "sample_creation")),
        bibtex_citation=None,
    )

    class Local:
        metadata = about

        def load_data(self, **_) -> None:
            self.data_loaded = True

    if task_type == "Clustering":

        class LocalClustering(Local, AbsTaskClustering):
            max_fraction_of_documents_to_embed = None  # the default scores 4 % of the rows, and flatters
            max_documents_per_cluster = min(2048, len(data["labels"]))  # drawn with replacement: more would only repeat rows

        task = LocalClustering()
        task.dataset = datasets.DatasetDict(test=datasets.Dataset.from_dict(data))
    elif task_type == "Classification":
        task = type("LocalClassification", (Local, AbsTaskClassification), {})()
        task.dataset = split_by_class(data)
    elif task_type == "STS":
        bounds = {"min_score": min(data["score"]), "max_score": max(data["score"])}
        task = type("LocalSTS", (Local, AbsTaskSTS), bounds)()
        task.dataset = datasets.DatasetDict(test=datasets.Dataset.from_dict(data))
    else:
        task = type("LocalRetrieval", (Local, AbsTaskRetrieval), {})()
        corpus, queries = datasets.Dataset.from_dict(data["corpus"]), datasets.Dataset.from_dict(data["queries"])
        task.dataset = {"default": {"test": {"corpus": corpus, "queries": queries, "relevant_docs": data["relevant"], "top_ranked": None}}}
    return task


def split_by_class(data: dict):
    """Half of each class for training, half for testing, drawn with a fixed seed; a class of one row only trains."""
    import datasets

    rows, rng = defaultdict(list), random.Random(0)
    for i, label in enumerate(data["label"]):
        rows[label].append(i)
    parts = {"train": [], "test": []}
    for indices in rows.values():
        rng.shuffle(indices)
        half = (len(indices) + 1) // 2
        parts["train"] += indices[:half]
        parts["test"] += indices[half:]
    if not parts["test"]:
        raise InputError("every class has one row only: classification needs two a class")
    return datasets.DatasetDict(
        {k: datasets.Dataset.from_dict({c: [data[c][i] for i in sorted(v)] for c in data}) for k, v in parts.items()}
    )


# ------------------------------------------------------------------------------------------------------ which tasks


def in_cache(task) -> bool:
    from huggingface_hub.constants import HF_HUB_CACHE

    return (Path(HF_HUB_CACHE) / f"datasets--{task.metadata.dataset['path'].replace('/', '--')}").is_dir()


def choose_tasks(args: argparse.Namespace) -> list:
    """What --task, --benchmark and --data ask for, as mteb tasks that have not been run yet."""
    named = args.task or ([] if args.benchmark else ["clustering"])
    types = [TYPES[t.lower()] for t in named if t.lower() in TYPES]
    embedded = {p.name.removesuffix(".jsonl.gz"): p for p in sorted(TASKS.glob("*.jsonl.gz"))}
    local = [local_task(embedded[t], "Clustering") for t in named if t in embedded]
    names = [t for t in named if t.lower() not in TYPES and t not in embedded]
    if args.data:
        if names or local:
            raise InputError(f"--data is scored by its columns, --task {(names or named)[0]!r} names another task: leave one out")
        tasks = [local_task(path, kind) for path in args.data for kind in (types if args.task else [None])]
        for (name, kind), n in Counter((t.metadata.name, t.metadata.type) for t in tasks).items():
            if n > 1:
                raise InputError(f"two --data files make a {kind} task called {name!r}: rename one, the table could not tell them apart")
        return tasks
    if args.embedded:
        if names or types != ["Clustering"]:
            raise InputError("--embedded are clustering tasks: leave --task out beside it")
        return [local_task(path, "Clustering") for path in embedded.values()]
    if local and not types and not names:
        return local

    import mteb

    try:
        tasks = list(mteb.get_tasks(tasks=names, languages=["eng"])) if names else []
        track = mteb.get_benchmark(args.benchmark or BENCHMARK).tasks if types or not named else []
        tasks += [t for t in track if not named or t.metadata.type in types]
    except (KeyError, ValueError) as error:
        hint = f"types are {', '.join(TYPES)}; embedded tasks {', '.join(embedded)}"
        raise InputError(f"{' '.join(str(error).split())[:200]} ({hint}; or a task name of mteb)") from None
    online = hub_answers()
    available = tasks if online else [t for t in tasks if in_cache(t)]
    if available:
        if not online:
            os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
            print(f"no network: running the {len(available)} of {len(tasks)} tasks whose data is in the cache", file=sys.stderr)
        return local + available
    what = ", ".join([*names, *types] or ["all tasks"]) + (f" of {args.benchmark or BENCHMARK}" if types or not named else "")
    if types == ["Clustering"] and not names and not args.benchmark:
        print(f"the data of {what} cannot be had (no network, nothing in the cache): scoring the embedded clustering tasks instead")
        return [local_task(path, "Clustering") for path in embedded.values()]
    raise InputError(f"the data of {what} cannot be had (no network, nothing in the cache): score your own with --data")


# --------------------------------------------------------------------------------------------------------- models


class Scored:
    """One row of the table: a name, an identity, and a way to encode. What mteb sees of a model."""

    def __init__(self, label: str, fingerprint: str, contract: dict | None, encode, computed: str | None = None):
        from mteb.models.model_meta import ModelMeta
        from mteb.similarity_functions import cos_sim, pairwise_cos_sim

        self.label, self.fingerprint, self.contract, self._encode = label, fingerprint, contract, encode
        self.computed = computed  # in which dtype, on what
        self.similarity, self.similarity_pairwise = cos_sim, pairwise_cos_sim
        self.mteb_model_meta = ModelMeta.create_empty({"name": f"local/{fingerprint}", "revision": fingerprint})

    def encode(self, inputs, *, prompt_type=None, **_) -> np.ndarray:
        texts = [text for batch in inputs for text in batch["text"]]
        vectors = self._encode(texts, "query" if prompt_type is not None and prompt_type.value == "query" else "document")
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors / np.where(norms > 0, norms, 1)


class SharedPasses:
    """Several readings of one model over the same texts cost one pass: the last texts of each role are remembered."""

    def __init__(self, encoder: Encoder):
        self.encoder, self.views, self.memory = encoder, [], {}

    def reader(self, view: View):
        self.views.append(view)

        def encode(texts: list[str], role: str) -> np.ndarray:
            seen = hashlib.sha256(json.dumps(texts).encode()).digest()
            if self.memory.get(role, (None,))[0] != seen:
                arrays = self.encoder.encode(texts, role, views=self.views, progress=sys.stderr.isatty())
                self.memory[role] = (seen, dict(zip(self.views, arrays, strict=True)))
                for line in self.encoder.warnings(clear=True):
                    print(f"warning: {line}", file=sys.stderr)
            return self.memory[role][1][view]

        return encode


def scored_row(passes: SharedPasses, encoder: Encoder, label: str) -> Scored:
    c = encoder.contract
    computed = f"{str(encoder.dtype).removeprefix('torch.')} on {encoder.device.type}"
    return Scored(label, encoder.fingerprint, json.loads(c.to_json()), passes.reader(c.view()), computed)


def tfidf(texts: list[str], role: str) -> np.ndarray:
    """TF-IDF reduced to 100 dimensions by SVD, fitted on the texts it is given (scikit-learn's defaults otherwise)."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    try:
        counts = TfidfVectorizer().fit_transform(texts)
    except ValueError:
        raise InputError("--baselines tfidf finds no words of two letters or more in these texts: leave it out") from None
    return TruncatedSVD(min(100, *(n - 1 for n in counts.shape)), random_state=0).fit_transform(counts).astype(np.float32)


def baseline(name: str) -> Scored:
    """`tfidf`, or a sentence-transformers model by its folder or hub id, at that model's own settings."""
    if name == "tfidf":
        return Scored("TF-IDF, SVD 100", "tfidf-svd-100", None, tfidf)
    from sentence_transformers import SentenceTransformer

    try:
        model = SentenceTransformer(name, local_files_only=not (Path(name).is_dir() or hub_answers()))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:150]
        raise InputError(f"--baselines: {name!r} is neither tfidf nor a sentence-transformers model that loads ({reason})") from None
    return Scored(name, f"sentence-transformers:{name}", None, lambda texts, role: model.encode(texts, show_progress_bar=False))


def newest_run() -> Path | None:
    runs = [p.parent for p in RUNS.glob(f"*/{CONTRACT_FILE}")]
    return max(runs, key=lambda p: (p / CONTRACT_FILE).stat().st_mtime) if runs else None


def rows_of(args: argparse.Namespace, task_type: str) -> Iterator[list[Scored]]:
    """The table's rows for a type of task, in groups that share one model in memory, each group loaded when it is asked for."""
    if args.baselines:
        if task_type != "Clustering" and "tfidf" in args.baselines:
            raise InputError(f"--baselines tfidf is fitted on the texts that it is given at once: it can score clustering, not {task_type}")
        yield from ([baseline(name)] for name in args.baselines)
    machine = {"dtype": args.dtype, "device": args.device, "trust_remote_code": args.trust_remote_code}
    flags = {"max_tokens": args.max_tokens, "dims": args.dims, "layers": args.layers, "quantize": args.quantize}
    run = None if args.model else newest_run()
    for spec in args.model or ([str(run)] if run else ["tiny"]):
        if not is_run(spec):
            for prompt in args.prompt or [TASK_PROMPTS.get(task_type, "none")]:
                yield base_rows(spec, prompt, args, machine | flags)
            continue
        chosen = flags_for_run(spec, args)
        encoder = Encoder.load(spec, override_contract=args.override_contract, **machine, **flags, **chosen)
        if run:  # the base under the run's own contract: the difference is what training brought
            base = encoder.untuned()
            yield [scored_row(SharedPasses(base), base, f"{base.contract.base}, untuned, same contract")]
        drift = encoder.merge()
        told = f"merged into the base, 1 - cosine {drift:.0e} at most" if encoder.merged else "beside its quantised base, not merged"
        print(f"{os.path.relpath(spec)}: adapter {told}", file=sys.stderr)
        if args.compile:
            encoder.compile()
        yield [scored_row(SharedPasses(encoder), encoder, os.path.relpath(spec))]


def flags_for_run(spec: str, args: argparse.Namespace) -> dict:
    """A run keeps its own prompt, pooling and scope where they are among those given; another single value is passed on."""
    contract = Contract.read(spec)
    chosen = {"keep_bos": True} if args.keep_bos else {}
    for name in ("prompt", "pooling", "scope"):
        given = getattr(args, name) or []
        own = contract.prompts if name == "prompt" else getattr(contract, name)
        if given and own not in ([get_prompt(v).roles() for v in given] if name == "prompt" else given):
            if len(given) > 1:
                raise InputError(
                    f"{name} is {own!r} in {spec}, {given} were asked for: add the run's own, or give one with --override-contract"
                )
            chosen[name] = given[0]
    flags = {k: getattr(args, k) for k in ("max_tokens", "dims", "layers") if getattr(args, k) is not None}
    if "prompt" in chosen:
        flags["prompts"] = get_prompt(chosen["prompt"]).roles()
    contract.override(flags | {k: v for k, v in chosen.items() if k != "prompt"}, force=args.override_contract)
    return chosen


def check_models(args: argparse.Namespace) -> None:
    """Find what is wrong with the models that were asked for before the first one is scored."""
    for prompt in args.prompt or []:
        get_prompt(prompt)
    for spec in args.model or []:
        if is_run(spec):
            flags_for_run(spec, args)
        else:
            find_base(spec)
    if args.keep_bos and "all" not in (args.scope or []):
        raise InputError("--keep-bos works with --scope all: scope text is the text's own tokens")


def base_rows(spec: str, prompt: str, args: argparse.Namespace, settings: dict) -> list[Scored]:
    """An untuned base under one prompt and every --pooling x --scope."""
    encoder = Encoder.load(spec, prompt=prompt, **settings)
    if args.compile:
        encoder.compile()
    passes, rows = SharedPasses(encoder), {}
    for pooling, scope in itertools.product(args.pooling or [encoder.contract.pooling], args.scope or [None]):
        scope = scope or default_scope(pooling)
        keep_bos = bool(args.keep_bos and scope == "all")
        if encoder.contract.bare() and not keep_bos:
            scope = "text"  # nothing stands around the text: both scopes are the same tokens
        reading = encoder.reread(pooling=pooling, scope=scope, keep_bos=keep_bos)
        label = f"{encoder.contract.base}, {prompt}, {pooling}" + ("" if scope == "text" and reading.contract.bare() else f", {scope}")
        rows.setdefault(reading.fingerprint, (reading, label + (" with BOS" if keep_bos else "")))
    return [scored_row(passes, reading, label) for reading, label in rows.values()]


# ----------------------------------------------------------------------------------------------------------- main


def score(task, scored: Scored) -> dict:
    """One cell: run a fresh copy of the task, so that every row sees the same bootstrap samples."""
    import mteb

    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = mteb.evaluate(scored, copy.deepcopy(task), cache=None, co2_tracker=False, show_progress_bar=False).task_results[0]
    about = task.metadata
    parts = [part for split in found.scores.values() for part in split]
    cell = {
        "task": about.name,
        "type": about.type,
        "metric": about.main_score,
        "score": float(found.get_score()),
        "splits": {name: float(np.mean([part["main_score"] for part in split])) for name, split in found.scores.items()},
        "bootstrap_scores": None,
        "model": scored.label,
        "fingerprint": scored.fingerprint,
        "contract": scored.contract,
        "computed": scored.computed,
        "seconds": round(time.perf_counter() - began, 2),
    }
    if all("v_measures" in part for part in parts):
        cell["bootstrap_scores"] = [v for part in parts for level in part["v_measures"].values() for v in level]
        cell["ami"] = float(np.mean([part["ami"] for part in parts]))
    elif all("scores_per_experiment" in part for part in parts):
        cell["bootstrap_scores"] = [e[about.main_score] for part in parts for e in part["scores_per_experiment"] if about.main_score in e]
    return cell


def table(cells: list[dict]) -> str:
    """Rows are models, columns tasks, the last column their mean; scores times 100, AMI in brackets for clustering."""
    tasks = list(dict.fromkeys(c["task"] for c in cells))
    models = list(dict.fromkeys((c["model"], c["fingerprint"]) for c in cells))
    by_cell = {(c["model"], c["fingerprint"], c["task"]): c for c in cells}
    metrics = {c["task"]: c["metric"].replace("_", "-") + (" (AMI)" if "ami" in c else "") for c in cells}

    def show(c):
        return f"{100 * c['score']:.1f}" + (f" ({100 * c['ami']:.1f})" if "ami" in c else "") if c else "-"

    lines = [["model", *tasks, "mean", "fingerprint"], ["", *(metrics[t] for t in tasks), "", ""]]
    for model, fingerprint in models:
        found = [by_cell.get((model, fingerprint, t)) for t in tasks]
        mean = f"{100 * np.mean([c['score'] for c in found]):.1f}" if all(found) else "-"
        lines.append([model, *map(show, found), mean, fingerprint])
    widths = [max(map(len, col)) for col in zip(*lines, strict=True)]
    left = (0, len(widths) - 1)
    text = [
        "  ".join(x.ljust(w) if i in left else x.rjust(w) for i, (x, w) in enumerate(zip(line, widths, strict=True))).rstrip()
        for line in lines
    ]
    computed = ", ".join(dict.fromkeys(c["computed"] for c in cells if c["computed"]))
    return "\n".join([*text[:2], "-" * max(map(len, text)), *text[2:], *([f"vectors computed in {computed}"] if computed else [])])


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    # what is scored, on what
    add("--model", nargs="+", help=f"runs, folders, hub ids or {', '.join(PRESETS)} (default: newest run and its base, else tiny)")
    add("--baselines", nargs="+", metavar="NAME", help="reference rows: tfidf, or a sentence-transformers model (default: none)")
    add("--task", nargs="+", help=f"{', '.join(TYPES)}, or task names of mteb or of tasks/ (default clustering)")
    add("--benchmark", nargs="?", const=BENCHMARK, help=f"an mteb benchmark; alone: all its tasks (default {BENCHMARK})")
    add("--embedded", action="store_true", help="the embedded clustering tasks, without asking for the network first")
    add("--data", nargs="+", type=Path, metavar="PATH", help="your own labelled files or folders, see above")
    # how untuned bases are read; runs have a contract
    add("--prompt", nargs="+", help=f"{', '.join(PROMPTS)}, or strings with {{text}} (default: by type of task)")
    add(
        "--pooling",
        nargs="+",
        choices=[p for p in POOLINGS if p != "query"],
        help="default: last for a prompt that ends behind the text, else mean",
    )
    add("--scope", nargs="+", choices=SCOPES, help="tokens that are pooled (default: all for last, else text)")
    add("--layers", nargs="+", type=int, help="layers that are averaged: -1 after the final norm, k after block k (default -1)")
    add("--keep-bos", action="store_true", help="let BOS take part in pooling with --scope all")
    add("--max-tokens", type=int, help="a text is cut to this many tokens (default 512, or what the model holds)")
    add("--dims", type=int, help="keep the first so many numbers of a vector (default: all)")
    add("--quantize", choices=QUANTIZATIONS, help="hold the weights of untuned bases in 4 or 8 bits (needs bitsandbytes)")
    add("--override-contract", action="store_true", help="let flags contradict a run's contract")
    # the machine
    add("--dtype", help="auto, float32, bfloat16 (default float32 on a CPU, bfloat16 elsewhere)")
    add("--device", help="default cuda where there is one, else cpu")
    add("--compile", action="store_true", help="torch.compile the model: pays for many texts, on a CPU needs a C++ compiler")
    add("--trust-remote-code", action="store_true", help="run code that comes with a hub model (off)")
    add("--out", type=Path, help="write every score as JSON")
    return parser


def main(args: argparse.Namespace) -> None:
    if processes()[0]:  # torchrun: all encode, each its share, and the first one speaks
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115, for good
        args.out = None
    if args.out and args.out.exists():
        raise InputError(f"{args.out} exists already: choose another --out, or delete it first")
    for name in ("mteb", "datasets", "sentence_transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    tasks = defaultdict(list)
    for task in choose_tasks(args):
        tasks[task.metadata.type].append(task)
    check_models(args)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    cells = []
    try:
        for task_type, group in tasks.items():
            for rows in rows_of(args, task_type):
                for task, scored in itertools.product(group, rows):
                    cell = score(task, scored)
                    cells.append(cell)
                    told = f"{cell['metric']} {100 * cell['score']:.1f} ({cell['seconds']:.0f} s)"
                    print(f"{cell['task']}, {cell['model']}: {told}", file=sys.stderr)
    except BaseException:  # an interruption, or the 40th task's data: what is scored is kept, and the error goes on its way
        if cells:
            print(table(cells) + "\n(incomplete)")
            if args.out:
                write_results(cells, args.out.with_name(args.out.name + ".partial"))
        raise
    print(table(cells))
    if args.out:
        write_results(cells, args.out)


def write_results(cells: list[dict], path: Path) -> None:
    packages = ("mteb", "torch", "transformers", "peft", "scikit-learn", "numpy")
    versions = {p: version(p) for p in packages} | {"python": platform.python_version()}
    text = json.dumps({"results": cells, "versions": versions}, indent=1) + "\n"
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    print(f"{path}: {len(cells)} scores")


if __name__ == "__main__":
    try:
        main(build_parser().parse_args())
    except (InputError, OSError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
