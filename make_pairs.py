"""Make positive pairs: two texts that mean the same thing, for contrastive training.

    python make_pairs.py auto --input texts.csv --out pairs/mine             # your own texts and a teacher for them: start here
    python make_pairs.py docstrings                                  # from the packages installed here, offline, a minute
    python make_pairs.py columns --input faq.csv --columns question answer --out pairs/faq.jsonl    # what a table holds already
    python make_pairs.py crop --input texts.csv --out pairs/mine.jsonl       # two spans of each document
    python make_pairs.py noise --input texts.txt --out pairs/mine.jsonl      # a text and its damaged copy
    python make_pairs.py same --input texts.txt --out pairs/mine.jsonl       # a text twice, for training with dropout
    python make_pairs.py llm --input texts.csv --chat-model Qwen/Qwen3-4B --out pairs/mine.jsonl    # a chat model rewrites
    python make_pairs.py server --input texts.csv --url http://localhost:8000/v1 --chat-model NAME --out pairs/mine.jsonl
    python make_pairs.py backtranslate --input texts.csv --pivot fr --out pairs/mine.jsonl     # into French and back
    python make_pairs.py mine --pairs pairs/mine.jsonl --model runs/mine --out pairs/hard.jsonl # hard negatives for pairs
    python make_pairs.py merge pairs/1.jsonl pairs/2.jsonl --out pairs/mine.jsonl   # the files of --shard 1/2 and --shard 2/2

Leaves behind one JSONL file with a pair a line:

    {"anchor": str, "positive": str, "engine": "docstrings", "columns", "crop", …,
     "source": module or FILE:ROW that the text comes from, "template": name of the instruction ("llm" and "server" only)}

`auto` writes a folder instead, which train.py --pairs takes (training/own_texts.py).
`mine` adds {"negatives": [str], "scores": cosines of the anchor to the positive and to each of the negatives}.

Beside the pairs of a user's texts stand OUT.report.json (what the quality gate left out and why, histograms, samples), from 1,000 pairs
on OUT.report.png, and where there are any OUT.questions.jsonl (follow-up questions, which are no paraphrases: the question is the
anchor) and OUT.failed.jsonl (texts on which the model failed, with the error). OUT.partial is what an unfinished job of `llm`, `server` and
`backtranslate` has done: the same command goes on with it.

--input and --corpus take txt (a text a line), csv, tsv, jsonl or json, each also gzipped, parquet, or `-` for standard input: JSONL
where it begins with {, csv where its first line names a known column, else a text a line; texts of --input are read one at a time.
--pairs takes the same, with columns anchor,positive and perhaps negative. Of a text, crop and noise take the first 2,048 words; in
scripts without spaces a character is a word.

Docstrings are read from the source files; no code is imported or run. The modules behind the bundled evaluation tasks
(`tasks/*.jsonl.gz`) are left out, and so is any docstring that shares a sentence with them.
"""

import argparse
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from files.arguments import count, not_negative, positive_int, probability, seconds, seed, shard
from files.console import InputError, run_script, say, warn
from pair_engines.chat_model import llm_pairs
from pair_engines.chat_server import server_pairs
from pair_engines.docstring_pairs import docstring_pairs
from pair_engines.gate import ALL_CHECKS, Gate
from pair_engines.merging import has_questions_apart, merged_rows
from pair_engines.mining import mined_pairs
from pair_engines.outputs import RowFiles, check_out, companion, partial_file
from pair_engines.report import PICTURE_FROM, Tally
from pair_engines.spans import column_pairs, crop_pairs, noise_pairs, same_pairs
from pair_engines.teacher import MAX_TEXTS, auto
from pair_engines.templates import TEMPLATES, chosen_templates, is_question
from pair_engines.translation import translated_pairs

HERE = Path(__file__).resolve().parent


class Engine(NamedTuple):
    make: Callable[[argparse.Namespace], Iterable[dict]]  # the arguments -> the pairs
    checks: tuple[str, ...] | None  # of the gate, see `pair_engines/gate.py`; None: no gate, and no report


# adding an engine: a function, a line here, and its flags below
ENGINES = {
    "docstrings": Engine(docstring_pairs, None),  # it has rules of its own
    "columns": Engine(column_pairs, ("copy", "duplicate")),  # a title may be much shorter than its text
    "crop": Engine(crop_pairs, ("copy", "duplicate")),
    "noise": Engine(noise_pairs, ("duplicate",)),  # a damaged copy is nearly a copy
    "same": Engine(same_pairs, ("duplicate",)),
    "llm": Engine(llm_pairs, ALL_CHECKS),
    "server": Engine(server_pairs, ALL_CHECKS),
    "backtranslate": Engine(translated_pairs, ("copy", "length", "script", "language", "loop", "duplicate")),  # these models do not chat
    "mine": Engine(mined_pairs, None),
    "merge": Engine(merged_rows, ("duplicate",)),  # the shards have passed the others
}


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default auto: bfloat16 where it is fast)")
    parser.add_argument("--device", help="device of the model (default: cuda where there is one, else cpu)")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    engines = parser.add_subparsers(dest="engine", required=True, metavar="ENGINE", help="how the pairs are made:")
    seeded = argparse.ArgumentParser(add_help=False)
    seeded.add_argument("--seed", type=seed, default=0, help="seed of all random choices (default 0)")
    common = argparse.ArgumentParser(add_help=False, parents=[seeded])
    common.add_argument("--limit", type=positive_int, help="make at most this many pairs (default: all)")
    file = argparse.ArgumentParser(add_help=False)
    file.add_argument(
        "--input", type=Path, required=True, help="file of texts: txt, csv, tsv, jsonl (also .gz), parquet, or - for standard input"
    )
    column = argparse.ArgumentParser(add_help=False)
    column.add_argument("--column", help="column that holds the text (default: guessed, and printed)")
    rows = argparse.ArgumentParser(add_help=False, parents=[file])
    rows.add_argument("--out", type=Path, required=True, help="JSONL file to write")
    table = argparse.ArgumentParser(add_help=False, parents=[rows, column])
    gated = argparse.ArgumentParser(add_help=False)
    gated.add_argument(
        "--shard",
        type=shard,
        metavar="I/N",
        help="of the texts only every N-th, from the I-th on; join the files with merge (default: all)",
    )
    gated.add_argument("--no-gate", action="store_true", help="keep every pair that is not empty (default: the engine's checks)")
    gated.add_argument("--judge", metavar="MODEL", help="keep pairs whose cosine under this model is in the window (default: no judge)")
    gated.add_argument(
        "--judge-window", type=float, nargs=2, default=[0.4, 0.98], metavar=("LOW", "HIGH"), help="of cosines (default 0.4 0.98)"
    )
    gated.add_argument("--review", type=count, default=0, metavar="N", help="print N accepted and N rejected pairs (default 0)")

    docs = engines.add_parser("docstrings", parents=[common], help="a docstring's first sentence and the prose after it")
    docs.add_argument(
        "--out", type=Path, default=HERE / "pairs" / "docstrings.jsonl", help="JSONL file to write (default pairs/docstrings.jsonl)"
    )
    auto = engines.add_parser(
        "auto", parents=[seeded, file, column], help="your own texts with a teacher that needs no label (pair_engines/README.md)"
    )
    auto.add_argument("--out", type=Path, required=True, help="folder to write, which train.py --pairs takes")
    auto.add_argument(
        "--limit", type=positive_int, help=f"teach at most this many texts, drawn at random (default {MAX_TEXTS:,}, the largest number)"
    )
    auto.add_argument(
        "--model",
        nargs="+",
        default=["tiny"],
        help="models whose vectors are part of the teacher, best the one to train and a run of it on general pairs; or none (default tiny)",
    )
    auto.add_argument(
        "--general", type=Path, help="file of pairs that keep general knowledge, or none (default: docstrings of the installed packages)"
    )
    add_model_flags(auto)
    columns = engines.add_parser("columns", parents=[common, rows, gated], help="two columns, such as title and text, question and answer")
    columns.add_argument("--columns", nargs=2, required=True, metavar=("ANCHOR", "POSITIVE"), help="columns of the two texts of a pair")
    crop = engines.add_parser("crop", parents=[common, table, gated], help="two spans of one document")
    crop.add_argument("--min-words", type=positive_int, default=8, help="leave documents of fewer words out (default 8)")
    noise = engines.add_parser("noise", parents=[common, table, gated], help="a text and its damaged copy")
    for name, what in (
        ("delete", "deleting a word"),
        ("swap", "swapping a word with the next"),
        ("chars", "swapping two letters of a word"),
    ):
        noise.add_argument(f"--{name}", type=probability, default=0.1, help=f"probability of {what} (default 0.1)")
    engines.add_parser("same", parents=[common, table, gated], help="a text twice, for training with dropout")
    chat = argparse.ArgumentParser(add_help=False)
    chat.add_argument("--templates", nargs="+", choices=TEMPLATES, help="instructions to draw from (default: all five)")
    chat.add_argument(
        "--template-file", type=Path, metavar="FILE", help="your own: an instruction with {text} in it, or JSON of names and instructions"
    )
    chat.add_argument("--max-new-tokens", type=positive_int, default=100, help="longest answer, in tokens (default 100)")
    chat.add_argument("--temperature", type=not_negative, default=0.6, help="of sampling; 0 takes the likeliest token (default 0.6)")
    chat.add_argument("--top-p", type=probability, default=0.9, help="share of the probability mass to sample from (default 0.9)")
    llm = engines.add_parser("llm", parents=[common, table, gated, chat], help="a chat model on this machine rewrites each text")
    llm.add_argument("--chat-model", required=True, help="hub id or folder of the chat model")
    llm.add_argument("--batch-size", type=positive_int, default=64, help="texts in a batch, halved where memory runs out (default 64)")
    llm.add_argument("--repetition-penalty", type=float, default=1.0, help="penalty on repeated tokens; 1 is none (default 1.0)")
    llm.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default auto: bfloat16 where it is fast)")
    server = engines.add_parser("server", parents=[common, table, gated, chat], help="a chat model behind a server does so")
    server.add_argument("--url", required=True, help="address of an OpenAI-compatible server, such as http://localhost:8000/v1")
    server.add_argument("--chat-model", required=True, help="the model's name on the server; the key is taken from OPENAI_API_KEY")
    server.add_argument("--concurrency", type=positive_int, default=8, help="requests at once (default 8)")
    server.add_argument("--retries", type=count, default=5, help="how often a request that failed is tried again (default 5)")
    server.add_argument("--timeout", type=seconds, default=120.0, help="seconds to wait for an answer (default 120)")
    back = engines.add_parser("backtranslate", parents=[common, table, gated], help="a text and its translation there and back")
    back.add_argument("--pivot", default="de", help="the other language, for texts in English (default de)")
    back.add_argument("--to-pivot", metavar="MODEL", help="Marian model that translates there (default Helsinki-NLP/opus-mt-en-PIVOT)")
    back.add_argument("--from-pivot", metavar="MODEL", help="Marian model that translates back (default Helsinki-NLP/opus-mt-PIVOT-en)")
    back.add_argument("--batch-size", type=positive_int, default=32, help="texts in a batch, halved where memory runs out (default 32)")
    merge = engines.add_parser("merge", parents=[gated], help="join the files of shards, or of several inputs")
    merge.add_argument("files", type=Path, nargs="+", metavar="FILE", help="files of pairs, each with what stands beside it")
    merge.add_argument("--out", type=Path, required=True, help="JSONL file to write")
    merge.set_defaults(seed=0)
    mine = engines.add_parser("mine", help="hard negatives for pairs, chosen by a model's own mistakes")
    mine.add_argument("--pairs", type=Path, required=True, help="file of pairs, such as another engine's")
    mine.add_argument(
        "--model", default="tiny", help="run, preset, folder or hub id; the run trained so far is best (default tiny, the bundled model)"
    )
    mine.add_argument(
        "--corpus", type=Path, help="file to take negatives from, of the kinds that --input takes elsewhere (default: the positives)"
    )
    mine.add_argument("--column", help="column of --corpus that holds the text (default: guessed, and printed)")
    mine.add_argument("--negatives", type=positive_int, default=4, help="negatives of each pair (default 4)")
    mine.add_argument(
        "--below", type=probability, default=0.95, help="largest cosine of a negative, as a share of the positive's (default 0.95)"
    )
    mine.add_argument("--limit", type=positive_int, help="use at most this many pairs (default: all)")
    add_model_flags(mine)
    mine.add_argument("--out", type=Path, required=True, help="JSONL file to write")
    return parser


def load_gate(args: argparse.Namespace, checks: tuple[str, ...]) -> Gate:
    """The gate of an engine with these checks, with the judge where one is asked for."""
    low, high = args.judge_window
    if not -1 <= low < high <= 1:
        raise InputError(f"--judge-window {low:g} {high:g}: needs the lowest and then the highest cosine, both between -1 and 1")
    judge = None
    if args.judge:
        from encoder import Encoder

        judge = Encoder.load(args.judge)
        judge.merge()
        say(f"judge: {args.judge}, fingerprint {judge.fingerprint}, window {low:g} to {high:g}")
    return Gate(() if args.no_gate else checks, judge, (low, high))


def write_gated(args: argparse.Namespace, engine: Engine, files: RowFiles) -> Tally:
    """Write the pairs that pass the gate to OUT, and what failed beside it. Raises InputError where no pair is left.

    A shard may be without pairs, as merge has to know that it was made.
    """
    gate, tally, last_error = load_gate(args, engine.checks), Tally(args.seed, args.review), ""

    def pairs() -> Iterator[dict]:
        nonlocal last_error
        for row in engine.make(args):
            if "error" in row:
                tally.failed, last_error = tally.failed + 1, row["error"]
                files.write(companion(args.out, "failed.jsonl"), row)
            else:
                yield row

    apart = keeps_questions_apart(args)
    for verdict in gate.sort(pairs()):
        tally.add(verdict)
        if verdict.reason:
            continue
        if is_question(verdict.pair.get("template", "")):
            question = verdict.pair | {"anchor": verdict.pair["positive"], "positive": verdict.pair["anchor"]}
            files.write(companion(args.out, "questions.jsonl") if apart else args.out, question)
        else:
            files.write(args.out, verdict.pair)
    if tally.made:
        say(tally.reason_line())
    if args.review:
        tally.show(args.review)
    if tally.failed and not tally.made:
        again = f"delete {partial_file(args.out)} to try again"
        raise InputError(f"no pairs were made: every text failed, {tally.failed} in all, the last with {last_error}; {again}")
    if not tally.kept:
        why = "read some with --review 5, or keep them with --no-gate" if tally.made else "no text was left to make one of"
        if not getattr(args, "shard", None):
            raise InputError(f"no pairs were made: {why}")
        warn(f"no pairs were made of this shard: {why}; its file is empty, and merge needs it")
    if tally.failed:
        warn(f"{tally.failed} failed, the last with {last_error}: see {companion(args.out, 'failed.jsonl')}")
    files.open(args.out)  # also where it stays empty: all pairs are questions, or a shard has none
    return tally


def keeps_questions_apart(args: argparse.Namespace) -> bool:
    """Whether questions go to a file of their own: where they are asked for among other things, or lie apart already."""
    if args.engine == "merge":
        return has_questions_apart(args.files)
    return hasattr(args, "templates") and not all(map(is_question, chosen_templates(args)))


def write_report(args: argparse.Namespace, tally: Tally, files: RowFiles) -> None:
    """OUT.report.json, and from PICTURE_FROM pairs on its histograms as OUT.report.png."""
    arguments = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items() if name != "files"}
    report = json.dumps(tally.as_json(arguments), indent=2, ensure_ascii=False, default=str) + "\n"
    files.open(companion(args.out, "report.json")).write(report.encode(errors="backslashreplace"))
    if tally.made >= PICTURE_FROM:
        tally.draw(files.open(companion(args.out, "report.png")))


def main(args: argparse.Namespace) -> None:
    if args.engine == "auto":  # writes a folder, not a file of pairs
        auto(args)
        return
    check_out(args.out)
    engine = ENGINES[args.engine]
    with RowFiles(args.out) as files:
        if engine.checks is None:
            for pair in itertools.islice(engine.make(args), args.limit):
                files.write(args.out, pair)
            if not files.counts[args.out]:
                raise InputError("no pairs were made: no docstring has two sentences that fit")
        else:
            write_report(args, write_gated(args, engine, files), files)
    partial_file(args.out).unlink(missing_ok=True)
    if n_questions := files.counts[companion(args.out, "questions.jsonl")]:
        say(f"{companion(args.out, 'questions.jsonl')}: {n_questions} questions, each with its text: no paraphrase, and so kept apart")
    say(f"{args.out}: {files.counts[args.out]} pairs{', for example' * bool(files.first)}")
    for pair in files.first:
        say(f"  {pair['anchor'][:90]!r}\n  {pair['positive'][:90]!r}")


if __name__ == "__main__":
    run_script(lambda: main(build_parser().parse_args()))
