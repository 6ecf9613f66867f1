"""Make positive pairs: two texts that mean the same thing, for contrastive training.

    python make_pairs.py auto --input texts.csv --out pairs/mine             # your own texts and a teacher for them: start here
    python make_pairs.py docstrings                                  # from the packages installed here, offline, a minute
    python make_pairs.py crop --input texts.csv --out pairs/mine.jsonl       # two spans of each document
    python make_pairs.py noise --input texts.txt --out pairs/mine.jsonl      # a text and its damaged copy
    python make_pairs.py llm --input texts.csv --chat-model Qwen/Qwen3-4B --out pairs/mine.jsonl    # a chat model rewrites
    python make_pairs.py mine --pairs pairs/mine.jsonl --model runs/mine --out pairs/hard.jsonl # hard negatives for pairs

Leaves behind one JSONL file with a pair a line:

    {"anchor": str, "positive": str, "engine": "docstrings" | "crop" | "noise" | "llm",
     "source": module or FILE:ROW that the anchor comes from, "template": name of the instruction ("llm" only)}

`auto` writes a folder instead, which train.py --pairs takes (training/own_texts.py).
`mine` adds {"negatives": [str], "scores": cosines of the anchor to the positive and to each of the negatives}.

--input and --corpus take txt (a text a line), csv, tsv, jsonl or json, each also gzipped, parquet, or `-` for standard input: JSONL
where it begins with {, csv where its first line names a known column, else a text a line. --pairs takes the same, with columns
anchor,positive and perhaps negative. Of a text, crop and noise take the first 2,048 words; in scripts without spaces a character is a word.

Docstrings are read from the source files; no code is imported or run. The modules behind the bundled evaluation tasks
(`tasks/*.jsonl.gz`) are left out, and so is any docstring that shares a sentence with them.
"""

import argparse
import json
from pathlib import Path

from files.console import InputError, run_script, say
from files.writing import check_absent, write_new
from pair_engines.chat import TEMPLATES, llm_pairs, partial_file
from pair_engines.docstring_pairs import docstring_pairs
from pair_engines.mining import mined_pairs
from pair_engines.spans import crop_pairs, noise_pairs
from pair_engines.teacher import auto

HERE = Path(__file__).resolve().parent
# adding an engine: a function from the arguments to the pairs, a line here, and its flags below
ENGINES = {"docstrings": docstring_pairs, "crop": crop_pairs, "noise": noise_pairs, "llm": llm_pairs, "mine": mined_pairs}


def probability(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def positive_int(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return int(text)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default auto: bfloat16 where it is fast)")
    parser.add_argument("--device", help="device of the model (default: cuda where there is one, else cpu)")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    engines = parser.add_subparsers(dest="engine", required=True, metavar="ENGINE", help="how the pairs are made:")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--seed", type=int, default=0, help="seed of all random choices (default 0)")
    common.add_argument("--limit", type=positive_int, help="make at most this many pairs (default: all)")
    table = argparse.ArgumentParser(add_help=False)
    table.add_argument(
        "--input", type=Path, required=True, help="file of texts: txt, csv, tsv, jsonl (also .gz), parquet, or - for standard input"
    )
    table.add_argument("--column", help="column that holds the text (default: guessed, and printed)")
    table.add_argument("--out", type=Path, required=True, help="JSONL file to write")

    docs = engines.add_parser("docstrings", parents=[common], help="a docstring's first sentence and the prose after it")
    docs.add_argument(
        "--out", type=Path, default=HERE / "pairs" / "docstrings.jsonl", help="JSONL file to write (default pairs/docstrings.jsonl)"
    )
    auto = engines.add_parser("auto", parents=[common, table], help="your own texts with a teacher that needs no label: see README")
    auto.add_argument(
        "--model",
        default="tiny",
        help="model whose vectors are part of the teacher, best the one to train: run, preset, folder, hub id, or none (default tiny)",
    )
    auto.add_argument(
        "--general", type=Path, help="file of pairs that keep general knowledge, or none (default: docstrings of the installed packages)"
    )
    add_model_flags(auto)
    crop = engines.add_parser("crop", parents=[common, table], help="two spans of one document")
    crop.add_argument("--min-words", type=positive_int, default=8, help="leave documents of fewer words out (default 8)")
    noise = engines.add_parser("noise", parents=[common, table], help="a text and its damaged copy")
    for name, what in (
        ("delete", "deleting a word"),
        ("swap", "swapping a word with the next"),
        ("chars", "swapping two letters of a word"),
    ):
        noise.add_argument(f"--{name}", type=probability, default=0.1, help=f"probability of {what} (default 0.1)")
    llm = engines.add_parser("llm", parents=[common, table], help="a local chat model rewrites each text")
    llm.add_argument("--chat-model", required=True, help="hub id or folder of the chat model")
    llm.add_argument(
        "--templates", nargs="+", choices=TEMPLATES, default=list(TEMPLATES), help="instructions to draw from (default: all five)"
    )
    llm.add_argument("--batch-size", type=positive_int, default=8, help="texts in a batch (default 8)")
    llm.add_argument("--max-new-tokens", type=positive_int, default=100, help="longest answer, in tokens (default 100)")
    llm.add_argument("--temperature", type=float, default=0.6, help="sampling temperature; 0 takes the likeliest token (default 0.6)")
    llm.add_argument("--top-p", type=float, default=0.9, help="share of the probability mass to sample from (default 0.9)")
    llm.add_argument("--repetition-penalty", type=float, default=1.0, help="penalty on repeated tokens; 1 is none (default 1.0)")
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


def main(args: argparse.Namespace) -> None:
    if args.engine == "auto":  # writes a folder, not a file of pairs
        auto(args)
        return
    check_absent(args.out)
    if not args.out.name.endswith((".jsonl", ".jsonl.gz")):
        raise InputError(f"--out {args.out}: pairs are written as JSONL, take a name that ends in .jsonl or .jsonl.gz")
    pairs = ENGINES[args.engine](args)[: args.limit]
    if not pairs:
        why = "every answer was empty or repeated its text" if args.engine == "llm" else "no docstring has two sentences that fit"
        raise InputError(f"no pairs were made: {why}")
    lines = (json.dumps(pair, ensure_ascii=False, default=str) + "\n" for pair in pairs)
    write_new(args.out, "".join(lines).encode(errors="backslashreplace"))  # half a surrogate pair is written as JSON's escape
    partial_file(args.out).unlink(missing_ok=True)
    say(f"{args.out}: {len(pairs)} pairs, for example")
    for pair in pairs[:2]:
        say(f"  {pair['anchor'][:90]!r}\n  {pair['positive'][:90]!r}")


if __name__ == "__main__":
    run_script(lambda: main(build_parser().parse_args()))
