"""Show where the last token looks: its attention in the last layer, base and adapter side by side.

    python attention.py --text "My card was swallowed by the machine."       # newest run, else the bundled model
    python attention.py --model runs/mine --input texts.txt --out attention/mine

Leaves behind, in --out (default attention/MODEL):

    attention.json      {"model", "fingerprint", "normalization", "texts": [{"text", "shares": {part: {side: share}},
                        "tokens": [{"piece", "part": "bos" | "prompt" | "text" | "eos", "base": weight, "adapter": weight}]}]}
    text-001.png ...    one picture a text (at most --pictures), a bar a token

Weights are the softmax over all tokens of the sequence, averaged over the heads, so that each side sums to 1.
"""

import argparse
import warnings
from pathlib import Path

from encoder import Encoder, EncodingReport, TokenAttention
from encoder.base_models import PRESETS, is_run, newest_run
from files.console import InputError, run_script, say, warn
from files.reading import read_texts
from files.writing import check_absent, write_atomic, write_json
from prompts import PROMPTS

ROOT = Path(__file__).resolve().parent
NORMALIZATION = "softmax over all tokens of the sequence, mean over heads"
COLOURS = {"bos": "tab:gray", "prompt": "tab:orange", "text": "tab:blue", "eos": "tab:purple"}


def summarize(text: str, sides: dict[str, TokenAttention]) -> dict:
    """One text of the report: its tokens with the weight of each side, and each part's share of the attention."""
    base = sides["base"]
    if not base.pieces:
        raise InputError("an empty text without a prompt has no tokens to look at")
    weights = {side: attention.weights.mean(1).tolist() for side, attention in sides.items()}
    tokens = [
        {"piece": piece, "part": part} | {side: weights[side][i] for side in sides}
        for i, (piece, part) in enumerate(zip(base.pieces, base.parts, strict=True))
    ]
    present = [part for part in COLOURS if part in base.parts]
    shares = {part: {side: sum(token[side] for token in tokens if token["part"] == part) for side in sides} for part in present}
    return {"text": text, "shares": shares, "tokens": tokens}


def draw(item: dict, model: str, path: Path) -> None:
    """One panel a side on a common scale, a bar a token, coloured by its part."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    tokens = item["tokens"]
    sides = [side for side in ("base", "adapter") if side in tokens[0]]
    width = min(40, max(7, 0.28 * len(tokens) + 1.5))
    with plt.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a script that the font lacks is drawn as boxes
        size = (width, 2.2 * len(sides) + 1.2)
        figure, axes = plt.subplots(len(sides), 1, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained")
        for axis, side in zip(axes[:, 0], sides, strict=True):
            axis.bar(range(len(tokens)), [token[side] for token in tokens], color=[COLOURS[token["part"]] for token in tokens])
            shares = ", ".join(f"{part} {100 * share[side]:.0f} %" for part, share in item["shares"].items())
            axis.set_title(f"{side}: {shares}", fontsize=9, loc="left")
            axis.set_ylabel("weight")
            axis.margins(x=0.01)
        labels = [token["piece"].strip() or "␣" for token in tokens]
        axes[-1, 0].set_xticks(range(len(tokens)), labels, rotation=90, fontsize=8)
        axes[0, 0].legend(handles=[Patch(color=COLOURS[part], label=part) for part in item["shares"]], fontsize=8)
        figure.suptitle(f"{model}: attention of the last token in the last layer\n({NORMALIZATION})", fontsize=10)
        figure.savefig(path, format="png", dpi=120)
        plt.close(figure)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", help=f"a run, a folder, a hub id or {', '.join(PRESETS)} (default: newest run, else tiny)")
    add("--text", action="append", help="a text; may be repeated")
    add("--input", type=Path, help="a file of texts: txt (a text a line), csv, tsv, jsonl (also .gz), parquet, or - for standard input")
    add("--column", help="the column of --input with the text (default: guessed, and printed)")
    add("--prompt", help=f"{', '.join(PROMPTS)}, or a string with {{text}}; a run has its own (default cluster)")
    add("--pictures", type=int, default=8, help="draw at most this many texts (default 8)")
    add("--out", type=Path, help="a folder (default attention/MODEL)")
    add("--dtype", help="auto, float32, bfloat16 (default float32 on a CPU, bfloat16 elsewhere)")
    add("--device", help="default cuda where there is one, else cpu")
    add("--override-contract", action="store_true", help="let --prompt contradict a run's contract")
    add("--trust-remote-code", action="store_true", help="run code that comes with a hub model (default: never)")
    return parser


def collect_texts(args: argparse.Namespace) -> list[str]:
    texts = list(args.text or [])
    if args.input:
        rows, summary = read_texts(args.input, args.column)
        say(summary)
        texts += [text for _, text in rows]
    if not texts:
        raise InputError("no text: give --text or --input")
    return texts


def main(args: argparse.Namespace) -> None:
    texts = collect_texts(args)
    model = args.model or str(newest_run(ROOT / "runs") or "tiny")
    name = Path(model).name
    out = args.out or ROOT / "attention" / name
    if args.pictures < 0:
        raise InputError(f"--pictures must be 0 or more, not {args.pictures}")
    check_absent(out)
    encoder = Encoder.load(
        model,
        prompt=args.prompt or (None if is_run(model) else "cluster"),
        dtype=args.dtype,
        device=args.device,
        override_contract=args.override_contract,
        trust_remote_code=args.trust_remote_code,
    )
    report = EncodingReport()
    sides = {"base": encoder.untuned().last_token_attention(texts, report=report)}
    if encoder.peft:
        sides["adapter"] = encoder.last_token_attention(texts)
    items = [summarize(text, {side: attention[i] for side, attention in sides.items()}) for i, text in enumerate(texts)]
    for line in encoder.notes + report.warnings():
        warn(line)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.mkdir()
    result = {"model": name, "fingerprint": encoder.fingerprint, "normalization": NORMALIZATION, "texts": items}
    write_json(out / "attention.json", result, indent=1)
    for i, item in enumerate(items[: args.pictures], 1):
        write_atomic(out / f"text-{i:03d}.png", lambda path, item=item: draw(item, name, path))
    say(f"model {name}, fingerprint {encoder.fingerprint}; {NORMALIZATION}")
    parts = [part for part in COLOURS if any(part in item["shares"] for item in items)]
    for side in sides:
        means = (sum(item["shares"].get(part, {}).get(side, 0) for item in items) / len(items) for part in parts)
        say(f"{side:>8}: " + ", ".join(f"{part} {100 * mean:.1f} %" for part, mean in zip(parts, means, strict=True)))
    say(f"{out}: attention.json and {min(len(items), args.pictures)} pictures")


if __name__ == "__main__":
    run_script(lambda: main(build_parser().parse_args()))
