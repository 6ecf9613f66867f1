"""Score embeddings on MTEB tasks, on bundled tasks that need no network, or on your own labelled data.

    python evaluate.py                                         # the newest run beside its untuned base, clustering
    python evaluate.py --model tiny runs/tiny --baselines tfidf        # side by side
    python evaluate.py --model tiny --prompt none cluster --pooling mean last --scope all text    # a grid for a base
    python evaluate.py --model tiny --sweep pooling=mean,last,max layers=-1,80%,-2..-3 prompt=none,cluster    # the same, layers too
    python evaluate.py --model tiny --sweep prompt=cluster,meta-eol token-prepending=none,1..20% --remove-mean texts.csv    # and more
    python evaluate.py --data mine.csv                         # columns text,label (or text1,text2,score; or a folder)
    python evaluate.py --data mine.csv --report mine.html      # and a page to look at: scores, a map of the texts, confused classes
    python evaluate.py --model runs/mine --texts mine.txt      # without labels: is the run better than its base, or worse?
    python evaluate.py --model tiny --data mine.csv --facets 'topic=The topic of "{text}" is:' 'tone=The tone of "{text}" is:'
    python evaluate.py --task clustering classification --model runs/mine --out results/mine.json
    torchrun --nproc-per-node 8 evaluate.py --model mistral-7b         # every process encodes its share
    python evaluate.py --benchmark "MTEB(eng, v1)" --task clustering --model qwen3-0.6b st:org/name --prefetch    # data and models
    python evaluate.py --benchmark "MTEB(eng, v1)" --task clustering --model qwen3-0.6b st:org/name --results mteb    # no network
    python evaluate.py --paper --results mteb                          # the paper's grid beside published figures

Every score is computed by mteb's own task classes. --task runs the tasks of that type in MTEB(eng, v2), where their data is
available. Without network, clustering falls back to the two bundled tasks in tasks/: first sentences of docstrings, by package and
by module, none of which is in the docstring pairs. Vectors are normalized before they are clustered.

--data takes csv, tsv, jsonl, json (each also .gz), parquet, or `-` for JSONL from standard input, with `text,label` (clustering, or
--task classification) or `text1,text2,score` (STS), or a folder with corpus.jsonl, queries.jsonl (`_id`, `text`) and qrels.tsv (retrieval).

--out FILE.json: {"results": [{"task", "type", "metric", "score" in 0..1, "splits": {split: score}, "ami" (clustering),
"bootstrap_scores": [...] or null, "std" of these or null, "rests_on": texts behind the score, "model", "fingerprint", "contract" or null,
"computed": dtype and device, "seconds", "texts" encoded for it, "texts_per_second" or null where all vectors were there}],
"differences": [{"model" "less" another, "task" (or the mean), "difference", "interval", "sd_rows", "sd_algorithm", "verdict"}],
"chosen_on_halves": [...], "versions": {...}}; evaluation/differences.py says what they mean. --paper adds "published": the figures with
their sources. The files of --texts and --facets are lists and objects of their own (evaluation/without_labels.py, evaluation/facets.py).

--results DIR keeps the scores of mteb's tasks for later tables, and for mteb itself (evaluation/stored.py). The exit status is 2 where a
flag or a file is refused, 1 where a task or a model failed and the others went on, each with its reason in the last lines.

Legend: N texts, D numbers of a vector.
"""

import argparse
import logging
import sys
from pathlib import Path
from typing import NoReturn

from encoder.contract import POOLING_PRESETS, QUANTIZATIONS, SCOPES
from encoder.names import DTYPES, PRESETS, base_of, check_dtype, find_base, is_run
from evaluation import paper, sentence_transformer
from evaluation.facets import check_facets, facet, read_labelled, score_facets
from evaluation.finished import FinishedCells, partial
from evaluation.hub_data import prefetch
from evaluation.report import check_report, write_report
from evaluation.report_map import KeptVectors
from evaluation.rows import changes_to_run, check_baselines, check_model, read_mean_texts
from evaluation.scores import Scores, Stores, as_json, check_out, score_all, table, write_results
from evaluation.stored import StoredResults
from evaluation.sweep import AXES, UNTUNED, axis, spread
from evaluation.task_choice import BENCHMARK, TYPES, choose_tasks
from evaluation.without_labels import compare_on_texts, read_unlabelled
from files.arguments import layer, layer_range, share
from files.console import InputError, process_rank, run_script, say
from files.writing import check_writable, errors_of_writing, write_json
from prompts import PROMPTS, get_prompt

# flags of our encoder, which rows of sentence-transformers do not obey
OF_OURS = (
    *("sweep", "prompt", "pooling", "scope", "layers", "attention_layer", "embed_filter", "token_prepending", "remove_mean"),
    *("keep_bos", "max_tokens", "dims", "quantize", "override_contract", "compile"),
)


def check_flags(args: argparse.Namespace) -> None:
    """Raise InputError for what the flags alone, the names of the models and the contracts of runs show. It costs no slow import."""
    if args.paper:
        paper.fill(args)
    check_sources(args)
    check_dtype(args.dtype)
    if args.facets:
        check_facets(args)
    check_baselines(args, ())
    check_reading(args)
    check_flags_of_models(args)


def check_reading(args: argparse.Namespace) -> None:
    """Raise InputError for flags that say how texts become vectors, and that no model could obey."""
    if args.query_prompt and not args.prompt:
        raise InputError("--query-prompt stands beside the prompt of the documents: give --prompt as well, none if there is none")
    for prompt in args.prompt or []:
        get_prompt(prompt, args.query_prompt)
    if args.keep_bos and "all" not in (args.scope or []):
        raise InputError("--keep-bos works with --scope all: scope text is the text's own tokens")
    presets = [POOLING_PRESETS.get(name, {}) for name in args.pooling or []]
    if presets and (args.layers or args.layer_sets != [None]) and all("layers" in preset for preset in presets):
        raise InputError(f"--pooling {args.pooling[0]} has its own layers: leave --layers out")
    if presets and args.scope and not any(preset.get("scope", scope) == scope for preset in presets for scope in args.scope):
        raise InputError(f"--pooling {args.pooling[0]} has --scope {presets[0]['scope']}: leave --scope out")
    for flag, value in (("--max-tokens", args.max_tokens), ("--dims", args.dims)):
        if value is not None and value < 1:
            raise InputError(f"{flag} must be 1 or more, not {value}")


def check_flags_of_models(args: argparse.Namespace) -> None:
    """Raise InputError for flags that contradict the kinds of models: runs, sentence-transformers models, untuned bases."""
    models = args.model or []
    others = [spec for spec in models if sentence_transformer.is_sentence_transformer(spec)]
    runs = [spec for spec in models if is_run(spec)]
    if args.layer_sets != [None] and models and len(runs) == len(models):
        raise InputError("--sweep layers is a grid of untuned bases, and every --model is a run: add its base, or leave it out")
    if args.attention_layer is not None and not runs and "attention" not in (args.pooling or []):
        raise InputError("--attention-layer works with --pooling attention: add that, or leave it out")
    for spec in runs:
        changes_to_run(spec, args)
    for spec in others:
        sentence_transformer.check_spec(spec)
    if others and len(others) == len(models) and (given := [name for name in OF_OURS if getattr(args, name)]):
        flag = given[0].replace("_", "-")
        raise InputError(f"--{flag} is for our encoder, and every --model is one of sentence-transformers: leave it out")
    for spec in models:
        if spec not in others:
            find_base(base_of(spec))


def check_sources(args: argparse.Namespace) -> None:
    """Raise InputError for flags that say what is scored, where one of them would not be obeyed."""
    if args.texts and (args.task or args.data or args.bundled or args.benchmark):
        raise InputError("--texts compares models without labels: leave --task, --data, --bundled and --benchmark out")
    if args.column and not args.texts and not args.remove_mean:
        raise InputError("--column names the column of --texts and --remove-mean: of --data the columns are text and label")
    own = [flag for flag, given in (("--data", args.data), ("--bundled", args.bundled), ("--texts", args.texts)) if given]
    if len(own) > 1:
        raise InputError(f"{own[0]} and {own[1]} are scored in tables of their own: leave one of them out")
    for flag, given in (("--benchmark", args.benchmark), ("--results", args.results), ("--prefetch", args.prefetch)):
        if own and given:
            raise InputError(f"{flag} concerns mteb's tasks, not {own[0]}: leave one of them out")
    for flag, given in (("--out", args.out), ("--report", args.report)):
        if args.prefetch and given:
            raise InputError(f"--prefetch scores nothing that {flag} could hold: leave one of them out")
    if args.facets and args.report:
        raise InputError("--report has no page for --facets: leave one of them out")


def refuse(message: str) -> NoReturn:
    """What argparse has to say, in one line as every other error."""
    raise InputError(f"{message} (--help lists the flags)")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = refuse
    add = parser.add_argument_group("what is scored").add_argument
    models = f"runs, folders, hub ids, {', '.join(PRESETS)}, or st:PATH for a sentence-transformers model, by folder or hub id"
    add("--model", nargs="+", help=f"{models} (default: the newest run and its base, else tiny)")
    add("--baselines", nargs="+", metavar="NAME", help="reference rows: tfidf, side-by-side (each model beside TF-IDF) (default: none)")
    add("--task", nargs="+", help=f"{', '.join(TYPES)}, or names of mteb's tasks or of those in tasks/ (default: clustering)")
    add("--benchmark", nargs="?", const=BENCHMARK, help=f"an mteb benchmark; without --task all its tasks (default: {BENCHMARK})")
    add(
        "--paper",
        action="store_true",
        help="the paper's models, or --model, on both clustering tracks, beside published figures (default: off)",
    )
    add("--prefetch", action="store_true", help="download the tasks' data and the models instead of scoring (default: off)")
    add("--bundled", action="store_true", help="run the bundled clustering tasks, without trying the network first (default: off)")
    labelled = "your own files with columns text,label or text1,text2,score, or folders with corpus, queries and qrels (default: off)"
    add("--data", nargs="+", type=Path, metavar="PATH", help=labelled)
    add("--texts", type=Path, metavar="FILE", help="compare the models on texts without labels, see tasks/unlabelled.py (default: off)")
    add("--column", help="column of --texts and --remove-mean that holds the text (default: guessed, and printed)")
    add(
        "--facets",
        nargs="+",
        type=facet,
        metavar="FACET=PROMPT",
        help="columns of --data, each with a prompt that names it: do vectors follow the prompt? --prompt is the neutral one, see "
        "evaluation/facets.py (default: off)",
    )
    add = parser.add_argument_group("how texts become vectors: for untuned bases, as a run has its contract").add_argument
    add("--prompt", nargs="+", help=f"{', '.join(PROMPTS)}, or strings with {{text}} in them; 'A || B' averages both (default: by type)")
    add("--query-prompt", metavar="PROMPT", help="of search queries, beside --prompt for documents (default: that of --prompt)")
    add(
        "--pooling",
        nargs="+",
        choices=UNTUNED,
        help="how tokens become a vector (default: last for a prompt that continues after the text, else mean)",
    )
    add("--scope", nargs="+", choices=SCOPES, help="which tokens are pooled (default: all for last, else text)")
    add("--layers", nargs="+", type=layer, help="layers to average: -1 (after the final norm), 9 (after block 9), 80%% (default: -1)")
    add("--attention-layer", type=layer, metavar="LAYER", help="of --pooling attention: whose attention weighs the tokens (default: -1)")
    add("--embed-filter", type=share, metavar="SHARE", help="drop this share of the unembedding matrix's directions (default: none)")
    add(
        "--token-prepending",
        nargs="+",
        type=layer_range,
        metavar="RANGE",
        help="give a placeholder before the text the last token's state in layers such as 1..20%%, or none (default: none)",
    )
    add(
        "--remove-mean",
        type=Path,
        metavar="FILE",
        help="beside each row of our encoder one without the mean direction of these texts (default: none)",
    )
    add(
        "--sweep",
        nargs="+",
        type=axis,
        metavar="AXIS=VALUES",
        help=f"a grid of untuned bases: {', '.join(AXES)}, each with values between commas, such as layers=-1,80%%,-2..-5 (default: none)",
    )
    add("--keep-bos", action="store_true", help="pool the BOS token as well, with --scope all (default: off)")
    add("--max-tokens", type=int, help="longer texts are truncated to this many tokens (default: 512, or what the model allows)")
    add("--dims", type=int, help="keep the first so many numbers of a vector; of a run, those of its --matryoshka (default: all)")
    add("--quantize", choices=QUANTIZATIONS, help="load the weights of untuned bases in 4 or 8 bits, needs bitsandbytes (default: off)")
    add("--override-contract", action="store_true", help="let the flags above change a run's contract (default: off)")
    add = parser.add_argument_group("on which machine").add_argument
    add("--dtype", help=f"auto, {', '.join(DTYPES)} (default: float32 on a CPU, bfloat16 elsewhere)")
    add("--device", help="cpu, cuda or cuda:N (default: cuda where there is one, else cpu)")
    add("--compile", action="store_true", help="torch.compile the model, for many texts; on a CPU it needs a C++ compiler (default: off)")
    add("--trust-remote-code", action="store_true", help="run code that comes with a hub model (default: off)")
    add = parser.add_argument_group("where results go").add_argument
    add("--results", type=Path, metavar="DIR", help="keep mteb's scores in its own layout, and take those from there (default: off)")
    add("--out", type=Path, metavar="FILE.json", help="write every score to this JSON file (default: off)")
    add("--report", type=Path, metavar="FILE.html", help="write a page of scores, grid, map and confused classes (default: off)")
    return parser


def main(args: argparse.Namespace) -> None:
    # under torchrun all processes have the same scores, and the first one writes them
    out, report = (args.out, args.report) if process_rank() == 0 else (None, None)
    if out:
        check_out(out)
    if args.results:
        check_writable(args.results, "--results")
    if report:
        check_report(report, out)
    spread(args)
    check_flags(args)
    for name in ("mteb", "datasets", "sentence_transformers"):  # they announce every step
        logging.getLogger(name).setLevel(logging.ERROR)
    failures = []
    tasks = [] if args.texts or args.facets else choose_tasks(args, failures)
    texts, splits = read_unlabelled(args) if args.texts else ([], [])
    args.mean_texts = read_mean_texts(args.remove_mean, args.column) if args.remove_mean else None
    labelled = read_labelled(args) if args.facets else None
    if args.prefetch:
        prefetch(args, tasks, failures)
        end_with(failures)
        return
    if not args.paper:  # which goes on without the models that are missing
        for spec in args.model or []:  # before the first one is scored
            check_model(spec, args.trust_remote_code)
    for path in filter(None, (out, report)):
        with errors_of_writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
    kept = KeptVectors([task.metadata.type for task in tasks]) if args.report else None
    if args.texts or args.facets:
        results = score_facets(args, labelled, failures) if args.facets else compare_on_texts(args, splits, failures, texts, kept)
        if out:
            write_json(out, results)
        if report:
            write_report(report, results, [], kept, failures)
    else:
        fill_table(args, tasks, failures, out, report, kept)
    end_with(failures)


def fill_table(
    args: argparse.Namespace, tasks: list, failures: list[str], out: Path | None, report: Path | None, kept: KeptVectors | None
) -> None:
    """Score `tasks` for every row, print the table, write it and its page. Why a cell or a row is missing is added to `failures`."""
    scores = Scores()
    finished = FinishedCells(partial(args.out) if args.out else None, writes=out is not None)
    stores = Stores(finished, StoredResults(args.results, writes=process_rank() == 0), kept)
    if finished.known:
        say(f"{finished.path}: {len(finished.known)} cells were finished before", error=True)
    try:
        for grid in paper.grids(args, failures) if args.paper else [args]:
            score_all(grid, tasks, failures, scores, stores)
    except BaseException:  # Ctrl-C, or a disk that is full
        if scores.cells:
            say(table(scores.cells) + "\n(incomplete)" + (f": the same command goes on with {finished.path}" if out else ""))
        raise
    if scores.cells:
        say(table(scores.cells))
        for line in scores.compare():
            say(line)
    for line in paper.table(scores.cells) if args.paper else ():
        say(line)
    if not scores.cells:
        for path in filter(None, (out, report)):
            say(f"{path} is not written: there is no score", error=True)
        return
    published = {"published": [entry._asdict() for entry in paper.PUBLISHED]} if args.paper else {}
    results = as_json(scores) | published if out or report else {}
    if out:
        write_results(results, out)
        finished.remove()
    if report:
        write_report(report, results, scores.remarks(), kept, failures)


def end_with(failures: list[str]) -> None:
    """End the script, with status 1 and the reasons where something could not be computed."""
    from encoder.processes import end_distributed

    if not failures:
        return end_distributed()
    say("could not be computed:", error=True)
    for line in failures:
        say(f"  {line}", error=True)
    sys.exit(1)


if __name__ == "__main__":
    run_script(lambda: main(build_parser().parse_args()))
