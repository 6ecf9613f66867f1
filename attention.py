"""Show where the last token looks: base, kept adapters and final adapter of a run, in one text or over a corpus.

    python attention.py --text "My card was swallowed by the machine."       # newest run, else the bundled model
    python attention.py --model runs/mine --input texts.txt --out attention/mine
    python attention.py --model runs/mine --text "What swallows cards?" --role query      # under the prompt of queries
    python attention.py --model runs/mine --data texts.csv --limit 1000      # shares over a corpus, with intervals
    python attention.py --model runs/seed0 runs/seed1 runs/seed2 --data texts.csv         # over seeds of training as well
    python attention.py --redraw attention/mine                              # pictures and page again, without the model
    python attention.py --model runs/mine --data labelled.csv --v-measure --mask prefix content    # does it matter? (columns text,label)

Leaves behind, in --out (default attention/MODEL; of a corpus attention/MODEL-DATA), in formats that attention_analysis/stored.py describes:

    attention.json, attention.npz    of texts: every token's weight in every layer and head, on every side of the model
    shares.json, shares.npz          of a corpus: shares by category of token, layer and head, and their differences, with intervals
    *.png, *.svg, page.html          pictures of these numbers, and a page to look through them; --redraw FOLDER makes them again

Weights are the softmax over all tokens of the sequence. Shares are printed twice: of all tokens, and with BOS left out and the rest
renormalized, as much attention rests on BOS in models that were trained with it.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from attention_analysis.categories import WAYS
from attention_analysis.sides import check_runs, common_sides, sides_of
from attention_analysis.stored import ALSO, HIDEABLE
from encoder.names import DTYPES, PACKED_TYPES, PRESETS, base_of, check_dtype, check_prompts, find_base, is_run, newest_run
from files.arguments import count, positive_int
from files.console import InputError, run_script, say, warn
from files.reading import STDIN, as_label, as_text, column_names, read_column, read_rows, read_texts
from files.writing import check_absent, check_writable
from prompts import PROMPTS, ROLES

ROOT = Path(__file__).resolve().parent
MIN_TEXTS = 20  # of a corpus: of fewer an interval over texts means nothing


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_input_arguments(parser.add_argument_group("model and texts").add_argument)
    add_reading_arguments(parser.add_argument_group("how they are read").add_argument)
    add_label_arguments(parser.add_argument_group("whether it matters, of --data with labels").add_argument)
    return parser


def add_input_arguments(add) -> None:
    add(
        "--model",
        nargs="+",
        help=f"a run, a folder, a hub id or {', '.join(PRESETS)}; with --data several runs of one base (default: newest run, else tiny)",
    )
    add("--text", action="append", help="a text; may be repeated (default: those of --input)")
    kinds = "txt (a text a line), csv, tsv, jsonl (also .gz), parquet, or - for standard input"
    add("--input", type=Path, help=f"a file of texts: {kinds} (default: none)")
    add("--data", type=Path, help="a file of the same kinds, of which shares over all texts are measured (default: none)")
    add("--column", help="the column of --input or --data with the text (default: guessed, and printed)")
    add("--limit", type=positive_int, help="draw this many texts of --data at random (default: all)")
    add("--out", type=Path, help="a folder (default attention/MODEL, or attention/MODEL-DATA, beside attention.py)")
    add("--pictures", type=count, default=8, help="draw at most this many texts (default 8)")
    add("--redraw", type=Path, metavar="FOLDER", help="draw the pictures and the page of a folder again, from its numbers alone")


def add_reading_arguments(add) -> None:
    add("--prompt", help=f"{', '.join(PROMPTS)}, or a string with {{text}} (default: a run's own, else cluster)")
    add("--query-prompt", metavar="PROMPT", help="of search queries, beside --prompt for documents (default: that of --prompt)")
    add("--role", choices=ROLES, default="document", help="under which of the two prompts (default document)")
    add(
        "--function-words",
        choices=WAYS,
        help="by a list of English stop words, or by their frequency in these texts (default: the list where the texts are English)",
    )
    add("--also", nargs="+", choices=ALSO, default=[], help="second opinions on single texts, beside the attention (default: none)")
    add("--dtype", help=f"auto, {', '.join(DTYPES)} (default float32 on a CPU, bfloat16 elsewhere)")
    add("--device", help="cpu, cuda or cuda:N (default cuda where there is one, else cpu)")
    add("--override-contract", action="store_true", help="let --prompt contradict a run's contract (default: never)")
    add("--trust-remote-code", action="store_true", help="run code that comes with a hub model (default: never)")


def add_label_arguments(add) -> None:
    add("--v-measure", action="store_true", help="cluster the vectors of every side; how does content words' share go with it?")
    add(
        "--mask",
        nargs="+",
        choices=HIDEABLE,
        metavar="CATEGORY",
        help=f"what does it cost to hide these tokens from the last token, of base and final adapters: {', '.join(HIDEABLE)}",
    )
    add("--mask-layers", nargs=2, type=positive_int, metavar=("FIRST", "LAST"), help="hide them in these layers (default: all)")


# ---------------------------------------------------------------------------------------- checks before anything is loaded


def default_out(models: list[str], data: Path | None) -> Path:
    name = Path(models[0]).resolve().name + (f"-and-{len(models) - 1}-more" if len(models) > 1 else "")
    of_data = "" if data is None else "-stdin" if data == STDIN else f"-{data.name.partition('.')[0]}"
    return ROOT / "attention" / f"{name}{of_data}"


def check_flags(args: argparse.Namespace, models: list[str], out: Path) -> None:
    """Raise InputError for what the flags and the files of the models' folders show. For local models it costs no slow import."""
    check_dtype(args.dtype)
    if args.data is not None and (args.text or args.input):
        raise InputError("--data measures a corpus, --text and --input show single texts: take one of them")
    if args.data is None and len(models) > 1:
        raise InputError(f"--model names {len(models)} models: a text is shown for one, several are for --data")
    if args.data is None and args.limit is not None:
        raise InputError("--limit draws from the texts of --data: leave it out")
    if args.data is None and (args.mask or args.v_measure):
        raise InputError("--mask and --v-measure need labelled texts: give --data, a file with columns text,label")
    if args.data is not None and args.also:
        raise InputError("--also shows single texts: give --text or --input in place of --data")
    if args.mask_layers and not (args.mask and args.mask_layers[0] <= args.mask_layers[1]):
        raise InputError("--mask-layers takes the first and the last layer in which --mask hides tokens")
    for model in models:
        check_prompts(model, args.prompt, args.query_prompt, override_contract=args.override_contract)
    check_absent(out)
    check_writable(out)
    check_runs(models)
    check_attention_is_read(models[0], args.trust_remote_code)


def check_attention_is_read(model: str, trust_remote_code: bool) -> None:
    """Raise InputError for a class of models whose attention cannot be read, by its config alone."""
    _, source, revision = find_base(base_of(model))
    folder = Path(source)
    if not folder.is_dir():
        from encoder.base_models import fetch

        folder = fetch(source, revision, trust_remote_code, ("config.json",))
    try:
        model_type = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # damaged: loading says how
    if model_type not in PACKED_TYPES:
        raise InputError(f"{model}: the attention of {model_type} models cannot be read, take a class like {', '.join(PACKED_TYPES[:5])}")


# ------------------------------------------------------------------------------------------------------ texts and corpora


def collect_texts(args: argparse.Namespace) -> list[str]:
    """The texts of --text and --input."""
    texts = list(args.text or [])
    if args.input:
        rows, summary = read_texts(args.input, args.column)
        say(summary)
        texts += [text for _, text in rows]
    if not texts:
        raise InputError("no text: give --text or --input, or --data for shares over a corpus")
    return texts


def read_corpus(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The texts of --data, or --limit of them, drawn at random and left in order, and their labels, if those are needed."""
    labels = []
    if args.mask or args.v_measure:
        texts, labels = read_labelled(args.data, args.column)
    else:
        rows, summary = read_texts(args.data, args.column)
        say(summary)
        texts = [text for _, text in rows]
    if args.limit is not None and args.limit < len(texts):
        chosen = np.sort(np.random.default_rng(0).choice(len(texts), args.limit, replace=False))
        say(f"{args.limit:,} of {len(texts):,} texts are drawn at random")
        texts, labels = [texts[i] for i in chosen], [labels[i] for i in chosen if labels]
    if len(texts) < MIN_TEXTS:
        raise InputError(
            f"--data {args.data}: too few texts for intervals, {len(texts)} where {MIN_TEXTS} are the least; --input shows single texts"
        )
    if labels and not 1 < len(set(labels)) < len(labels):
        raise InputError(
            f"--data {args.data}: V-measure needs two labels or more, and fewer than texts; {len(labels)} texts have {len(set(labels))}"
        )
    return texts, labels


def read_labelled(path: Path, column: str | None) -> tuple[list[str], list[str]]:
    """All texts and labels of a file. Raises InputError with the place for a row that lacks one of them."""
    rows, text = list(read_rows(path)), column or "text"
    if not {text, "label"} <= set(columns := column_names(rows)):
        raise InputError(f"--data {path}: --mask and --v-measure need columns {text},label, it has {', '.join(columns)[:200]}")
    return read_column(rows, text, as_text), read_column(rows, "label", as_label)


def make_folder(out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.mkdir()


def show_texts(args: argparse.Namespace, model: str, out: Path, settings: dict) -> None:
    """Look at every text, store tokens and weights, then draw."""
    texts = collect_texts(args)
    from attention_analysis.opinions import opinion_lines
    from attention_analysis.pictures import draw_folder
    from attention_analysis.printed import text_lines
    from attention_analysis.stored import write_texts
    from attention_analysis.texts import look

    stored, also, warnings = look(sides_of(model), texts, args.function_words, args.role, settings, args.also)
    stored = stored._replace(about={"model": Path(model).resolve().name} | stored.about)
    for line in warnings:
        warn(line)
    make_folder(out)
    write_texts(out, stored, also)
    made = draw_folder(out, args.pictures)
    about = stored.about
    say(f"model {about['model']}, fingerprint {about['sides'][-1]['fingerprint']}; last layer, {about['normalization']}; {about['how']}")
    for line in [*text_lines(about), *opinion_lines(about, stored.starts, also)]:
        say(line)
    say(f"{out}: attention.json, attention.npz, {made}")


def measure_corpus(args: argparse.Namespace, models: list[str], out: Path, settings: dict) -> None:
    """Measure every side of every run on the corpus, store the shares, then draw."""
    texts, labels = read_corpus(args)
    sides, left_out = common_sides(models)
    from attention_analysis.pictures import draw_folder
    from attention_analysis.printed import corpus_lines
    from attention_analysis.shares import make_corpus, measure_sides
    from attention_analysis.stored import write_corpus
    from attention_analysis.worth import costs_of_sides, lines_of_worth, scores_of_sides

    if left_out:
        warn(f"not all runs have {', '.join(left_out)}: left out")
    masked = costs_of_sides(sides, texts, labels, args.mask, args.mask_layers, args.function_words, args.role, settings)
    about, by_layer, by_head, warnings = measure_sides(sides, texts, args.function_words, args.role, settings)
    scored = scores_of_sides(sides, texts, labels, about["models"], by_layer, args.role, settings) if args.v_measure else {}
    stored = make_corpus({"data": args.data.name} | about | masked | scored, by_layer, by_head)
    for line in warnings:
        warn(line)
    make_folder(out)
    write_corpus(out, stored)
    about = stored.about
    say(f"{about['n_texts']:,} texts of {about['data']}, prompt {about['prompt']}, {about['role']}; {about['normalization']}")
    say(about["how"])
    for line in [*corpus_lines(about), *lines_of_worth(about)]:
        say(line)
    made = draw_folder(out)
    say(f"{out}: shares.json, shares.npz, {made}")


def redraw(args: argparse.Namespace) -> None:
    """Draw a folder again. Raises InputError for flags that have no say in that, so that none is thought to have had one."""
    unset = vars(build_parser().parse_args([]))
    unused = [name for name, value in vars(args).items() if name not in ("redraw", "pictures") and value != unset[name]]
    if unused:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
        raise InputError(f"--redraw draws what its folder holds: leave out {names}")
    from attention_analysis.pictures import draw_folder

    say(f"{args.redraw}: {draw_folder(args.redraw, args.pictures)}")


def main(args: argparse.Namespace) -> None:
    if args.redraw is not None:
        redraw(args)
        return
    models = args.model or [str(newest_run(ROOT / "runs") or "tiny")]
    out = args.out or default_out(models, args.data)
    check_flags(args, models, out)
    settings = {
        "prompt": args.prompt or (None if is_run(models[0]) else "cluster"),
        "query_prompt": args.query_prompt,
        "dtype": args.dtype,
        "device": args.device,
        "override_contract": args.override_contract,
        "trust_remote_code": args.trust_remote_code,
    }
    if args.data is None:
        show_texts(args, models[0], out, settings)
    else:
        measure_corpus(args, models, out, settings)


if __name__ == "__main__":
    run_script(lambda: main(build_parser().parse_args()))
