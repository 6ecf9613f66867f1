"""Find the texts of a file that are nearest to a question.

    python search.py --input texts.csv --query "Why did the machine keep my card?"      # newest run, else the bundled model
    python search.py --model runs/mine --input texts.csv --query "lost card" --query "interest rates" -k 10
    python search.py --model tiny --input texts.csv --query "lost card" --prompt none --query-prompt "question: {text}"

Prints, for each --query, the -k texts with the highest cosine to it: cosine, FILE:ROW, text. Of equally near texts the first comes
first. The file may be csv, tsv, txt (a text a line), jsonl, json or parquet.

A question and a text have prompts of their own under `retrieve`, the default of an untuned base, and with --query-prompt. A run has
the prompt that it was trained with; under one like `cluster`, which is the same for both, a question is embedded like any text.
"""

import argparse
from pathlib import Path

from encoder.names import DTYPES, PRESETS, base_of, check_dtype, check_prompts, find_base, is_run, newest_run
from files.console import InputError, run_script, say, warn
from files.reading import excerpt, read_texts
from prompts import PROMPTS, prompt_label

RUNS = Path(__file__).resolve().parent / "runs"
SHOWN = 200  # characters of a text


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--input", type=Path, help="the texts: txt (a text a line), csv, tsv, jsonl, json (also .gz), parquet, or - for standard input")
    add("--column", help="the column of --input with the text (default: guessed, and printed)")
    add("--query", action="append", metavar="TEXT", help="what to look for; may be repeated (no default)")
    add("-k", type=int, default=5, help="texts to show for each query (default 5)")
    add("--model", help=f"a run, a folder, a hub id or {', '.join(PRESETS)} (default: newest run, else tiny)")
    add("--prompt", help=f"{', '.join(PROMPTS)}, or a string with {{text}} (default: a run's own, else retrieve)")
    add("--query-prompt", metavar="PROMPT", help="of queries, beside --prompt for the texts (default: that of --prompt)")
    add("--dtype", help=f"auto, {', '.join(DTYPES)} (default float32 on a CPU, bfloat16 elsewhere)")
    add("--device", help="cpu, cuda or cuda:N (default cuda where there is one, else cpu)")
    add("--override-contract", action="store_true", help="let --prompt contradict a run's contract (default: never)")
    add("--trust-remote-code", action="store_true", help="run code that comes with a hub model (default: never)")
    return parser


def check_flags(args: argparse.Namespace, model: str) -> None:
    """Raise InputError for what the flags and a run's contract show: it costs no slow import."""
    if not args.input:
        raise InputError("no texts: give --input")
    if not args.query or not all(query.strip() for query in args.query):
        raise InputError("nothing to look for: give --query with some words")
    if args.k < 1:
        raise InputError(f"-k must be 1 or more, not {args.k}")
    check_dtype(args.dtype)
    check_prompts(model, args.prompt, args.query_prompt, override_contract=args.override_contract)
    find_base(base_of(model))


def main(args: argparse.Namespace) -> None:
    model = args.model or str(newest_run(RUNS) or "tiny")
    check_flags(args, model)
    rows, summary = read_texts(args.input, args.column)
    say(summary, error=True)
    from encoder import Encoder, EncodingReport  # slow, so that errors of the flags come first

    encoder = Encoder.load(
        model,
        prompt=args.prompt or (None if is_run(model) else "retrieve"),
        query_prompt=args.query_prompt,
        dtype=args.dtype,
        device=args.device,
        override_contract=args.override_contract,
        trust_remote_code=args.trust_remote_code,
    )
    encoder.merge()
    prompts = encoder.contract.prompts
    say(f"{model}, fingerprint {encoder.fingerprint}, prompt {prompt_label(prompts)}", error=True)
    if prompts["query"] == prompts["document"]:
        say("this prompt is the same for queries and texts: a query is embedded like any text", error=True)
    report = EncodingReport()
    numbers, cosines = encoder.nearest(args.query, [text for _, text in rows], args.k, progress=True, report=report)
    for line in encoder.notes + report.warnings():
        warn(line)
    if cosines.shape[1] > 1 and (cosines.max(1) - cosines.min(1) < 1e-4).all():
        warn("the nearest texts are all equally near: are they copies, or have the vectors collapsed to a point?")
    for query, places, values in zip(args.query, numbers.tolist(), cosines.tolist(), strict=True):
        say(excerpt(query, SHOWN))
        for number, cosine in zip(places, values, strict=True):
            source, text = rows[number]
            say(f"  {cosine:.3f}  {source}  {excerpt(text, SHOWN)}")


if __name__ == "__main__":
    run_script(lambda: main(build_parser().parse_args()))
