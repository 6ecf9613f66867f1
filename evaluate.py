"""Score embeddings on MTEB tasks, on bundled tasks that need no network, or on your own labelled data.

    python evaluate.py                                         # the newest run beside its untuned base, clustering
    python evaluate.py --model tiny runs/tiny --baselines tfidf        # side by side
    python evaluate.py --model tiny --prompt none cluster --pooling mean last --scope all text    # a grid for a base
    python evaluate.py --data mine.csv                         # columns text,label (or text1,text2,score; or a folder)
    python evaluate.py --model runs/mine --texts mine.txt      # without labels: is the run better than its base, or worse?
    python evaluate.py --task clustering classification --model runs/mine --out results/mine.json
    torchrun --nproc-per-node 8 evaluate.py --model mistral-7b         # every process encodes its share

Every score is computed by mteb's own task classes. --task runs the tasks of that type in MTEB(eng, v2), where their data is
available. Without network, clustering falls back to the two bundled tasks in tasks/: first sentences of docstrings, by package and
by module, none of which is in the docstring pairs. Vectors are normalized before they are clustered.

--data takes csv, tsv, jsonl, json (each also .gz), parquet, or `-` for JSONL from standard input, with `text,label` (clustering, or
--task classification) or `text1,text2,score` (STS), or a folder with corpus.jsonl, queries.jsonl (`_id`, `text`) and qrels.tsv (retrieval).

--out FILE.json: {"results": [{"task", "type", "metric", "score" in 0..1, "splits": {split: score}, "ami" (clustering),
"bootstrap_scores": [...] or null, "std" of these or null, "model", "fingerprint", "contract", "computed": dtype and device, "seconds"}],
"versions": {...}}

Legend: N texts, D numbers of a vector.
"""

import argparse
import contextlib
import copy
import functools
import hashlib
import itertools
import json
import logging
import os
import platform
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from encoder.contract import POOLINGS, QUANTIZATIONS, SCOPES, Contract, default_scope, trained_dims
from encoder.names import DTYPES, PRESETS, base_of, check_dtype, find_base, is_run, newest_run
from files.console import InputError, process_rank, run_script, say, short_path, warn
from files.reading import read_texts
from files.writing import check_absent, write_json
from prompts import PROMPTS, TASK_PROMPTS, get_prompt, prompt_label
from tasks import unlabelled
from tasks.mteb_tasks import bundled_tasks, local_task, local_tasks

if TYPE_CHECKING:  # torch, transformers and mteb are imported where they are used: what is wrong with the flags is said at once
    from encoder import Encoder

RUNS = Path(__file__).resolve().parent / "runs"
BENCHMARK = "MTEB(eng, v2)"
EncodeTexts = Callable[[list[str], str], np.ndarray]  # texts and "query" or "document" -> vectors (N, D)
COLLAPSED = 1e-4  # 1 - cosine to the mean vector, below which vectors are one point
TYPES = {  # as --task calls them: as mteb calls them
    "clustering": "Clustering",
    "classification": "Classification",
    "sts": "STS",
    "retrieval": "Retrieval",
    "reranking": "Reranking",
    "pair-classification": "PairClassification",
    "summarization": "Summarization",
}


# ---------------------------------------------------------------------------------------------------- which tasks


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


# --------------------------------------------------------------------------------------------- rows of the table


class MtebModel:
    """One row of the table: a label, an identity, and a way to encode. This is what mteb sees of a model.

    label, fingerprint     together they tell rows apart
    contract               the embedding contract as JSON values; None for baselines
    encode_texts           how the row's vectors are made
    computed               dtype and device of the vectors, None where unknown
    """

    def __init__(self, label: str, fingerprint: str, contract: dict | None, encode_texts: EncodeTexts, computed: str | None = None):
        from mteb.models.model_meta import ModelMeta
        from mteb.similarity_functions import cos_sim, pairwise_cos_sim

        self.label, self.fingerprint, self.contract = label, fingerprint, contract
        self.encode_texts, self.computed = encode_texts, computed
        self.similarity, self.similarity_pairwise = cos_sim, pairwise_cos_sim
        self.mteb_model_meta = ModelMeta.create_empty({"name": f"local/{fingerprint}", "revision": fingerprint})

    def encode(self, inputs, *, prompt_type=None, **_) -> np.ndarray:
        """mteb's batches of texts -> vectors of norm 1 (N, D); a vector of zeros stays as it is."""
        texts = [text for batch in inputs for text in batch["text"]]
        vectors = self.encode_texts(texts, "query" if prompt_type is not None and prompt_type.value == "query" else "document")
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors = vectors / np.where(norms > 0, norms, 1)
        if is_collapsed(vectors[list({text: i for i, text in enumerate(texts)}.values())]):
            warn_once(f"{self.label}: different texts have nearly the same vector (cosine above {1 - COLLAPSED}): its scores mean little")
        return vectors


def is_collapsed(vectors: np.ndarray) -> bool:
    """Whether unit vectors (N, D) point one way, but for a hundredth of them, or are all zero."""
    if len(vectors) < 2:
        return False
    center = vectors.mean(0, dtype=np.float64)
    return not vectors.any() or bool(np.quantile(vectors @ center, 0.01) > (1 - COLLAPSED) * np.linalg.norm(center) > 0)


class EncodingCache:
    """Rows that differ in pooling alone share the forward passes of one model.

    Each list of texts is encoded once, for the pooling configurations of all rows. The vectors of the last list of each role are kept:
    mteb scores one row after the other on the same texts. All rows have to be made before the first one is scored.
    """

    def __init__(self, encoder: "Encoder"):
        self.encoder, self.poolings, self.vectors = encoder, [], {}

    def row(self, label: str, encoder: "Encoder | None" = None) -> MtebModel:
        """A row for this model, or for `encoder`: the same weights under a contract with another pooling configuration."""
        encoder = encoder or self.encoder
        contract, pooling = json.loads(encoder.contract.to_json()), encoder.contract.pooling_config()
        self.poolings.append(pooling)
        computed = f"{str(encoder.dtype).removeprefix('torch.')} on {encoder.device.type}"
        return MtebModel(label, encoder.fingerprint, contract, lambda texts, role: self.encode(texts, role)[pooling], computed)

    def encode(self, texts: list[str], role: str) -> dict:
        """Vectors (N, D) for each pooling configuration."""
        from encoder import EncodingReport

        digest = hashlib.sha256(json.dumps(texts).encode()).digest()
        if self.vectors.get(role, (None,))[0] != digest:
            report = EncodingReport()
            arrays = self.encoder.encode(texts, role, poolings=self.poolings, progress=True, report=report)
            self.vectors[role] = digest, dict(zip(self.poolings, arrays, strict=True))
            for line in report.warnings():
                warn(line)
        return self.vectors[role][1]


def tfidf(texts: list[str], role: str) -> np.ndarray:
    """TF-IDF reduced to 100 dimensions by SVD, fitted on `texts` themselves (scikit-learn's defaults otherwise)."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    try:
        counts = TfidfVectorizer().fit_transform(texts)
    except ValueError:
        raise InputError("--baselines tfidf finds no words of two letters or more in these texts: leave it out") from None
    return TruncatedSVD(min(100, *(n - 1 for n in counts.shape)), random_state=0).fit_transform(counts).astype(np.float32)


def baseline(name: str) -> MtebModel:
    """`tfidf`, or a sentence-transformers model by its folder or hub id, with that model's own settings."""
    if name == "tfidf":
        return MtebModel("TF-IDF, SVD 100", "tfidf-svd-100", None, tfidf)
    from sentence_transformers import SentenceTransformer

    from encoder.base_models import hub_answers

    try:
        model = SentenceTransformer(name, local_files_only=not (Path(name).is_dir() or hub_answers()))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:150]
        raise InputError(f"--baselines: {name!r} is neither tfidf nor a sentence-transformers model that loads ({reason})") from None
    return MtebModel(name, f"sentence-transformers:{name}", None, lambda texts, role: model.encode(texts, show_progress_bar=False))


@functools.cache
def warn_once(text: str) -> None:
    """A base is loaded anew for each prompt and type of task; what is to be known of it is said once."""
    warn(text)


def load_encoder(spec: str, args: argparse.Namespace, **contract_fields) -> "Encoder":
    """A run, or a base under the given contract fields, on the machine that the flags describe."""
    from encoder import Encoder

    machine = {"dtype": args.dtype, "device": args.device, "trust_remote_code": args.trust_remote_code}
    encoder = Encoder.load(spec, override_contract=args.override_contract, **machine, **contract_fields)
    for note in encoder.notes:
        warn_once(f"{short_path(spec) if is_run(spec) else encoder.contract.base}: {note}")
    return encoder


@contextlib.contextmanager
def other_rows_go_on(args: argparse.Namespace, failures: list[str]) -> Iterator[None]:
    """Of several models, let one that fails not cost the scores of the others: its InputError is printed and added to `failures`.

    Not under torchrun: a process that fails alone would no longer meet the others, which would wait for it.
    """
    try:
        yield
    except InputError as error:
        if len(args.model or []) < 2 or int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise
        if str(error) not in failures:
            failures.append(str(error))
            warn(str(error))


def table_rows(args: argparse.Namespace, task_type: str, failures: list[str]) -> Iterator[list[MtebModel]]:
    """The table's rows for a type of task, in groups that share one model in memory; a group is loaded when it is asked for.

    Why a model could not be loaded is added to `failures`.
    """
    if args.baselines:
        if task_type != "Clustering" and "tfidf" in args.baselines:
            raise InputError(f"--baselines tfidf is fitted on the texts that it embeds: it can score clustering, not {task_type}")
        yield from ([baseline(name)] for name in args.baselines)
    newest = None if args.model else newest_run(RUNS)
    beside_its_base = newest is not None or args.texts is not None
    for spec in args.model or [str(newest or "tiny")]:
        for prompt in [None] if is_run(spec) else args.prompt or [TASK_PROMPTS.get(task_type, "none")]:
            with other_rows_go_on(args, failures):
                if prompt is None:
                    yield from run_rows(spec, args, beside_its_base=beside_its_base)
                else:
                    yield base_rows(spec, prompt, args)


def run_rows(spec: str, args: argparse.Namespace, *, beside_its_base: bool = False) -> Iterator[list[MtebModel]]:
    """The row of a run; before it, if asked for, that of its untuned base under the same contract: the difference is the training."""
    encoder = load_encoder(spec, args, **changes_to_run(spec, args))
    if beside_its_base:
        base = encoder.untuned()
        yield [EncodingCache(base).row(f"{base.contract.base}, untuned, same contract")]
    drift = encoder.merge()
    how = f"merged into the base, 1 - cosine {drift:.0e} at most" if encoder.merged else "not merged, because its base is quantized"
    (warn if drift > 1e-2 else functools.partial(say, error=True))(f"{short_path(spec)}: adapter {how}")
    if args.compile:
        encoder.compile()
    yield [EncodingCache(encoder).row(short_path(spec))]


def base_rows(spec: str, prompt: str, args: argparse.Namespace) -> list[MtebModel]:
    """Rows of an untuned base under one prompt, for every --pooling x --scope. Combinations that pool the same tokens are one row."""
    fields = {name: getattr(args, name) for name in ("max_tokens", "dims", "layers", "quantize")}
    encoder = load_encoder(spec, args, prompt=prompt, query_prompt=args.query_prompt, **fields)
    if args.compile:
        encoder.compile()
    cache, variants = EncodingCache(encoder), {}
    for pooling, scope in itertools.product(args.pooling or [encoder.contract.pooling], args.scope or [None]):
        scope, bare = scope or default_scope(pooling), encoder.contract.is_bare()
        keep_bos = bool(args.keep_bos and scope == "all")
        if bare and not keep_bos:
            scope = "text"  # nothing stands around the text: both scopes are the same tokens
        variant = encoder.with_contract(pooling=pooling, scope=scope, keep_bos=keep_bos)
        queries = f" / {args.query_prompt}" if args.query_prompt else ""
        label = f"{encoder.contract.base}, {prompt}{queries}, {pooling}" + ("" if bare and scope == "text" else f", {scope}")
        variants.setdefault(variant.fingerprint, (label + (" with BOS" if keep_bos else ""), variant))
    return [cache.row(label, variant) for label, variant in variants.values()]


def changes_to_run(spec: str, args: argparse.Namespace) -> dict:
    """What the flags change in a run's contract, as fields for `Encoder.load`.

    A run keeps its prompt, pooling and scope where they are among the values of the flag, so that it can stand beside a grid of bases.
    A single other value is a change. Raises InputError for several other values, and for a change without --override-contract.
    """
    contract = Contract.read(spec)
    changes = {name: getattr(args, name) for name in ("max_tokens", "dims", "layers", "quantize") if getattr(args, name) is not None}
    if args.keep_bos:
        changes["keep_bos"] = True
    fields = dict(changes)
    for flag, name in (("prompt", "prompts"), ("pooling", "pooling"), ("scope", "scope")):
        values, of_run = getattr(args, flag) or [], getattr(contract, name)
        meanings = [get_prompt(value, args.query_prompt).roles() for value in values] if flag == "prompt" else values
        if values and of_run not in meanings:
            if len(values) > 1:
                hint = f"add the run's {flag} to them, or give one value with --override-contract"
                shown = prompt_label(of_run)[:80] if flag == "prompt" else of_run
                raise InputError(f"{flag} is {shown!r} in {spec}, {values} were asked for: {hint}")
            changes[flag], fields[name] = values[0], meanings[0]
            if flag == "prompt":
                changes["query_prompt"] = args.query_prompt
    contract.override(fields, force=args.override_contract, trained_dims=trained_dims(spec))
    return changes


def check_flags(args: argparse.Namespace) -> None:
    """Raise InputError for what the flags alone, the names of the models and the contracts of runs show. It costs no slow import."""
    if args.texts and (args.task or args.data or args.bundled or args.benchmark):
        raise InputError("--texts compares models without labels: leave --task, --data, --bundled and --benchmark out")
    if args.column and not args.texts:
        raise InputError("--column names the column of --texts: of --data the columns are text and label")
    check_dtype(args.dtype)
    if args.query_prompt and not args.prompt:
        raise InputError("--query-prompt stands beside the prompt of the documents: give --prompt as well, none if there is none")
    for prompt in args.prompt or []:
        get_prompt(prompt, args.query_prompt)
    if args.keep_bos and "all" not in (args.scope or []):
        raise InputError("--keep-bos works with --scope all: scope text is the text's own tokens")
    for flag, value in (("--max-tokens", args.max_tokens), ("--dims", args.dims)):
        if value is not None and value < 1:
            raise InputError(f"{flag} must be 1 or more, not {value}")
    for spec in args.model or []:
        if is_run(spec):
            changes_to_run(spec, args)
        find_base(base_of(spec))


def check_models(args: argparse.Namespace) -> None:
    """Raise InputError for models whose config alone shows that they cannot be loaded, before the first one is scored."""
    from encoder.base_models import check_base

    for spec in args.model or []:
        check_base(base_of(spec), args.trust_remote_code)


def check_out(path: Path) -> None:
    """Raise InputError unless a new file can be written there. Nothing is made yet."""
    if path.is_dir():
        raise InputError(f"--out {path} is a folder: name a file, such as {path / 'results.json'}")
    check_absent(path)
    check_absent(partial(path))
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        why = "may not be written to" if folder.is_dir() else "is a file"
        raise InputError(f"--out {path}: {folder} {why}, choose another place")


def partial(out: Path) -> Path:
    """Where the scores of a run that fails are kept."""
    return out.with_name(out.name + ".partial")


# ------------------------------------------------------------------------------------------- scores and the table


def score(task, model: MtebModel) -> dict:
    """One cell of the table. mteb runs a fresh copy of the task, so that every row sees the same bootstrap samples."""
    import mteb

    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = mteb.evaluate(model, copy.deepcopy(task), cache=None, co2_tracker=False, show_progress_bar=False).task_results[0]
    about = task.metadata
    subsets = [scores for split in result.scores.values() for scores in split]
    cell = {
        "task": about.name,
        "type": about.type,
        "metric": about.main_score,
        "score": float(result.get_score()),
        "splits": {name: float(np.mean([scores["main_score"] for scores in split])) for name, split in result.scores.items()},
        "bootstrap_scores": None,
        "std": None,
        "model": model.label,
        "fingerprint": model.fingerprint,
        "contract": model.contract,
        "computed": model.computed,
        "seconds": round(time.perf_counter() - began, 2),
    }
    bootstraps = []  # a list for each subset and level
    if all("v_measures" in scores for scores in subsets):
        bootstraps = [level for scores in subsets for level in scores["v_measures"].values()]
        cell["ami"] = float(np.mean([scores["ami"] for scores in subsets]))
    elif all("scores_per_experiment" in scores for scores in subsets):
        name = about.main_score
        bootstraps = [[run[name] for run in scores["scores_per_experiment"] if name in run] for scores in subsets]
    if any(bootstraps):
        cell["bootstrap_scores"] = [value for values in bootstraps for value in values]
    if bootstraps and all(len(values) > 1 for values in bootstraps):
        cell["std"] = float(np.mean([np.std(values, ddof=1) for values in bootstraps]))
    return cell


def score_all(args: argparse.Namespace, tasks: list, failures: list[str]) -> Iterator[dict]:
    """The table's cells, one type of task after the other, each announced on standard error as soon as it is there.

    Why a cell is missing is added to `failures`.
    """
    tasks_of_type = defaultdict(list)
    for task in tasks:
        tasks_of_type[task.metadata.type].append(task)
    for task_type, same_type in tasks_of_type.items():
        for rows in table_rows(args, task_type, failures):
            for task, model in itertools.product(same_type, rows):
                cell = None
                with other_rows_go_on(args, failures):
                    cell = score(task, model)
                if cell is None:
                    continue
                say("{task}, {model}: {metric} {percent:.1f} ({seconds:.0f} s)".format(percent=100 * cell["score"], **cell), error=True)
                yield cell


def table(cells: list[dict]) -> str:
    """Rows are models, columns tasks, then their mean; scores times 100 ± standard deviation, in brackets AMI for clustering."""
    tasks = list(dict.fromkeys(cell["task"] for cell in cells))
    models = list(dict.fromkeys((cell["model"], cell["fingerprint"]) for cell in cells))
    by_place = {(cell["model"], cell["fingerprint"], cell["task"]): cell for cell in cells}
    metrics = {cell["task"]: cell["metric"].replace("_", "-") + (" (AMI)" if "ami" in cell else "") for cell in cells}

    def show(cell: dict | None) -> str:
        if cell is None:
            return "-"
        spread = "" if cell["std"] is None else f" ± {100 * cell['std']:.1f}"
        return f"{100 * cell['score']:.1f}{spread}" + (f" ({100 * cell['ami']:.1f})" if "ami" in cell else "")

    lines = [["model", *tasks, "mean", "fingerprint"], ["", *(metrics[task] for task in tasks), "", ""]]
    for model, fingerprint in models:
        row = [by_place.get((model, fingerprint, task)) for task in tasks]
        mean = f"{100 * np.mean([cell['score'] for cell in row]):.1f}" if all(row) else "-"
        lines.append([model, *map(show, row), mean, fingerprint])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = (0, len(widths) - 1)
    aligned = [
        [value.ljust(width) if i in left else value.rjust(width) for i, (value, width) in enumerate(zip(line, widths, strict=True))]
        for line in lines
    ]
    text = ["  ".join(line).rstrip() for line in aligned]
    computed = ", ".join(dict.fromkeys(cell["computed"] for cell in cells if cell["computed"]))
    notes = [f"vectors computed in {computed}"] * bool(computed)
    notes += ["±: standard deviation over mteb's bootstraps or repetitions"] * any(cell["std"] is not None for cell in cells)
    return "\n".join([*text[:2], "-" * max(map(len, text)), *text[2:], *notes])


# ---------------------------------------------------------------------------------------------- texts without labels


def read_unlabelled(args: argparse.Namespace) -> list[unlabelled.HiddenWords]:
    """The texts of --texts, copies left out, with words hidden. Raises InputError where they are too few."""
    texts, summary = read_texts(args.texts, args.column)
    say(summary)
    different = list(dict.fromkeys(text for _, text in texts))
    chosen = np.random.default_rng(0).permutation(len(different))[: unlabelled.MAX_TEXTS]
    splits = unlabelled.hide_words([different[i] for i in np.sort(chosen)])
    if not splits:
        raise InputError(f"{args.texts}: fewer than {unlabelled.MIN_TEXTS} of {len(different)} texts share words with others: too few")
    return splits


def compare_on_texts(args: argparse.Namespace, splits: list[unlabelled.HiddenWords], failures: list[str]) -> list[dict]:
    """Print a table of the rows' scores and what each is against the first, and return it. Raises InputError.

    A run stands below its untuned base under the same contract; a row that is there already is not repeated.
    """
    rows, scores = [], {}
    for models in table_rows(args, "Clustering", failures):
        for model in models:
            if model.fingerprint in scores:
                continue
            scores[model.fingerprint] = [unlabelled.scores(model.encode_texts(split.texts, "document"), split) for split in splits]
            row = {"model": model.label, "fingerprint": model.fingerprint, "contract": model.contract, "computed": model.computed}
            rows.append(row | {"score": float(np.mean(np.concatenate(scores[model.fingerprint])))})
    if not rows:
        raise InputError("; ".join(failures))
    rows.sort(key=lambda row: row["contract"] is None)  # baselines last: the first row is what the others are compared with
    for row in rows[1:]:
        result = unlabelled.compare(*(scores[r["fingerprint"]] for r in (rows[0], row)), splits)
        row |= {"ratio": result.ratio, "interval": [result.low, result.high], "verdict": result.verdict}
    width = max(len(row["model"]) for row in rows)
    say(f"{'model'.ljust(width)}   score   against the first (95 % interval)")
    for row in rows:
        against = ""
        if "ratio" in row:
            low, high = row["interval"]
            against = f"{row['ratio']:.3f} ({low:.3f} to {high:.3f}): {row['verdict']}"
        say(f"{row['model'].ljust(width)}  {row['score']:6.2f}   {against}".rstrip())
    say(f"score: likeness of hidden words in a cluster, 1 is chance; {unlabelled.ADVICE}")
    return rows


def write_results(cells: list[dict], path: Path) -> None:
    """Write every cell and the versions of what computed it, in the format described at the top."""
    packages = ("mteb", "torch", "transformers", "peft", "scikit-learn", "numpy")
    versions = {package: version(package) for package in packages} | {"python": platform.python_version()}
    write_json(path, {"results": cells, "versions": versions}, indent=1)
    say(f"{path}: {len(cells)} scores")


# ------------------------------------------------------------------------------------------------------------ main


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    # what is scored, on what
    add("--model", nargs="+", help=f"runs, folders, hub ids or {', '.join(PRESETS)} (default: the newest run and its base, else tiny)")
    add("--baselines", nargs="+", metavar="NAME", help="reference rows: tfidf, or a sentence-transformers model (default: none)")
    add("--task", nargs="+", help=f"{', '.join(TYPES)}, or names of mteb's tasks or of those in tasks/ (default: clustering)")
    add("--benchmark", nargs="?", const=BENCHMARK, help=f"an mteb benchmark; without --task all its tasks (default: {BENCHMARK})")
    add("--bundled", action="store_true", help="run the bundled clustering tasks, without trying the network first (default: off)")
    add(
        "--data",
        nargs="+",
        type=Path,
        metavar="PATH",
        help="your own labelled files or folders, see evaluate.py's first lines (default: off)",
    )
    add("--texts", type=Path, metavar="FILE", help="compare the models on texts without labels, see tasks/unlabelled.py (default: off)")
    add("--column", help="column of --texts that holds the text (default: guessed, and printed)")
    # how texts become vectors: for untuned bases; a run has its contract
    add("--prompt", nargs="+", help=f"{', '.join(PROMPTS)}, or strings with {{text}} in them (default: by type of task)")
    poolings = [p for p in POOLINGS if p != "query"]  # which is learned: an untuned base has none
    add("--query-prompt", metavar="PROMPT", help="of search queries, beside --prompt for documents (default: that of --prompt)")
    add(
        "--pooling",
        nargs="+",
        choices=poolings,
        help="how tokens become a vector (default: last for a prompt that continues after the text, else mean)",
    )
    add("--scope", nargs="+", choices=SCOPES, help="which tokens are pooled (default: all for last, else text)")
    add("--layers", nargs="+", type=int, help="layers to average: -1 is after the final norm, k after block k (default: -1)")
    add("--keep-bos", action="store_true", help="pool the BOS token as well, with --scope all (default: off)")
    add("--max-tokens", type=int, help="longer texts are truncated to this many tokens (default: 512, or what the model allows)")
    add("--dims", type=int, help="keep the first so many numbers of a vector; of a run, those of its --matryoshka (default: all)")
    add("--quantize", choices=QUANTIZATIONS, help="load the weights of untuned bases in 4 or 8 bits, needs bitsandbytes (default: off)")
    add("--override-contract", action="store_true", help="let the flags above change a run's contract (default: off)")
    # the machine
    add("--dtype", help=f"auto, {', '.join(DTYPES)} (default: float32 on a CPU, bfloat16 elsewhere)")
    add("--device", help="cpu, cuda or cuda:N (default: cuda where there is one, else cpu)")
    add("--compile", action="store_true", help="torch.compile the model, for many texts; on a CPU it needs a C++ compiler (default: off)")
    add("--trust-remote-code", action="store_true", help="run code that comes with a hub model (default: off)")
    add("--out", type=Path, help="write every score to this JSON file (default: off)")
    return parser


def main(args: argparse.Namespace) -> None:
    out = args.out if process_rank() == 0 else None  # under torchrun all processes have the same scores, and the first one writes them
    if out:
        check_out(out)
    check_flags(args)
    for name in ("mteb", "datasets", "sentence_transformers"):  # they announce every step
        logging.getLogger(name).setLevel(logging.ERROR)
    tasks = [] if args.texts else choose_tasks(args)
    splits = read_unlabelled(args) if args.texts else []
    check_models(args)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
    cells, failures = [], []
    if args.texts:
        rows = compare_on_texts(args, splits, failures)
        if out:
            write_json(out, rows)
        end_with(failures)
        return
    try:
        for cell in score_all(args, tasks, failures):
            cells.append(cell)
    except BaseException:  # Ctrl-C, or a task whose download fails after hours: the scores so far are kept
        if cells:
            say(table(cells) + "\n(incomplete)")
            if out:
                write_results(cells, partial(out))
        raise
    if not cells:
        raise InputError("; ".join(failures))
    say(table(cells))
    if out:
        write_results(cells, out)
    end_with(failures)


def end_with(failures: list[str]) -> None:
    """End the script: raise InputError where rows are missing."""
    from encoder.processes import end_distributed

    if failures:
        raise InputError(f"the table lacks what could not be computed: {'; '.join(failures)}")
    end_distributed()


if __name__ == "__main__":
    run_script(lambda: main(build_parser().parse_args()))
