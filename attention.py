"""Show where the last token looks: its attention in the last layer, base and adapter side by side.

    python attention.py --text "My card was swallowed by the machine."       # newest run, else the bundled model
    python attention.py --model runs/mine --input texts.txt --out attention/mine
    python attention.py --model runs/mine --text "What swallows cards?" --role query      # under the prompt of queries

Leaves behind, in --out (default attention/MODEL):

    attention.json      {"model", "prompt", "role", "fingerprint", "normalization", "texts": [{"text", "shares": {part: {side: share}},
                        "tokens": [{"piece", "part": "bos" | "prefix" | "text" | "suffix" | "eos", "base": weight, "adapter": weight}]}]}
    text-001.png ...    one picture a text (at most --pictures), a bar a token, in rows; of more than 480 tokens the middle is left out

Weights are the softmax over all tokens of the sequence, averaged over the heads, so that each side sums to 1.
"""

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from encoder.names import DTYPES, PACKED_TYPES, PRESETS, base_of, check_dtype, check_prompts, find_base, is_run, newest_run
from files.console import InputError, run_script, say, warn
from files.reading import read_texts
from files.writing import check_absent, write_atomic, write_json
from prompts import PROMPTS, ROLES, prompt_label

if TYPE_CHECKING:  # torch and transformers are imported where they are used: what is wrong with the flags is said at once
    from encoder import Encoder, TokenAttention

ROOT = Path(__file__).resolve().parent
NORMALIZATION = "softmax over all tokens of the sequence, mean over heads"
COLOURS = {"bos": "tab:gray", "prefix": "tab:orange", "suffix": "tab:red", "text": "tab:blue", "eos": "tab:purple"}
PER_ROW, MOST_ROWS = 60, 8  # tokens of a row of a picture


def summarize(text: str, sides: "dict[str, TokenAttention]") -> dict:
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


def choose_fonts(text: str) -> tuple[list[str], set[str]]:
    """The default font, installed ones with the characters of `text` that it lacks, and the characters that none of them has."""
    from matplotlib import font_manager

    default = font_manager.FontProperties().get_name()
    names = sorted({font.name for font in font_manager.fontManager.ttflist} - {default})
    chosen, missing = [default], {character for character in text if character.isprintable()}
    for name in (default, *names):
        if not missing or "last resort" in name.lower().replace("lastresort", "last resort"):  # whose characters are all boxes
            continue
        try:
            charmap = font_manager.get_font(font_manager.findfont(name)).get_charmap()
        except (OSError, RuntimeError):  # a file that is no font after all
            continue
        drawable = {character for character in missing if ord(character) in charmap}
        chosen += [name] * bool(drawable)
        missing -= drawable
    return list(dict.fromkeys(chosen)), missing


def drawable(text: str, missing: set[str]) -> str:
    """`text` with codes in place of the characters that cannot be drawn."""
    return "".join(c if c.isprintable() and c not in missing else c.encode("unicode_escape").decode() for c in text)


def label(piece: str, missing: set[str]) -> str:
    """A token below its bar; · is one that ends a character that another one began."""
    return drawable(piece.strip(), missing) or ("␣" if piece else "·")


def draw(item: dict, title: str, path: Path, fonts: list[str], missing: set[str]) -> None:
    """Rows of tokens, in each a panel a side on a common scale, a bar a token, coloured by its part.

    A bar of BOS that is more than twice as long as any other is cut off, with its weight beside it: others could not be seen.
    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    tokens, most = item["tokens"], PER_ROW * MOST_ROWS
    if n_left_out := max(0, len(tokens) - most):
        tokens = tokens[: most // 2] + tokens[-most // 2 :]
        title += f"\n{n_left_out} tokens in the middle are left out here, not in attention.json"
    sides = [side for side in ("base", "adapter") if side in tokens[0]]
    rows = [tokens[start : start + PER_ROW] for start in range(0, len(tokens), PER_ROW)]
    per_row, n_panels = len(rows[0]), len(rows) * len(sides)
    others = max((token[side] for token in tokens for side in sides if token["part"] != "bos"), default=1)
    longest = max(token[side] for token in tokens for side in sides)
    top = 1.1 * (others if longest > 2 * others else longest)
    height = (2.2 if len(rows) == 1 else 1.2) * n_panels + 0.5 * len(rows) + 1
    with plt.rc_context({"text.parse_math": False, "font.family": fonts}):
        size = (max(7, 0.26 * per_row + 1.5), height)
        figure, axes = plt.subplots(n_panels, 1, figsize=size, squeeze=False, layout="constrained")
        for number, axis in enumerate(axes[:, 0]):
            row, side = rows[number // len(sides)], sides[number % len(sides)]
            axis.bar(range(len(row)), [token[side] for token in row], color=[COLOURS[token["part"]] for token in row])
            axis.set(xlim=(-0.6, per_row - 0.4), ylim=(0, top), ylabel=side)
            for i, token in enumerate(row):
                if token[side] > top:
                    axis.annotate(f"{token[side]:.2f}", (i + 0.5, 0.85 * top), fontsize=7)
            if number < len(sides):
                shares = ", ".join(f"{part} {100 * share[side]:.0f} %" for part, share in item["shares"].items())
                axis.set_title(f"{side}: {shares}", fontsize=9, loc="left")
            is_last = side == sides[-1]
            labels = [label(token["piece"], missing) for token in row] if is_last else []
            axis.set_xticks(range(len(labels)), labels, rotation=90, fontsize=8)
        axes[0, 0].legend(handles=[Patch(color=COLOURS[part], label=part) for part in item["shares"]], fontsize=8)
        figure.suptitle("\n".join(drawable(line, missing) for line in title.splitlines()), fontsize=10)
        figure.savefig(path, format="png", dpi=110)
        plt.close(figure)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", help=f"a run, a folder, a hub id or {', '.join(PRESETS)} (default: newest run, else tiny)")
    add("--text", action="append", help="a text; may be repeated (default: those of --input)")
    add(
        "--input",
        type=Path,
        help="a file of texts: txt (a text a line), csv, tsv, jsonl (also .gz), parquet, or - for standard input (default: none)",
    )
    add("--column", help="the column of --input with the text (default: guessed, and printed)")
    add("--prompt", help=f"{', '.join(PROMPTS)}, or a string with {{text}} (default: a run's own, else cluster)")
    add("--query-prompt", metavar="PROMPT", help="of search queries, beside --prompt for documents (default: that of --prompt)")
    add("--role", choices=ROLES, default="document", help="under which of the two prompts (default document)")
    add("--pictures", type=int, default=8, help="draw at most this many texts (default 8)")
    add("--out", type=Path, help="a folder (default attention/MODEL beside attention.py)")
    add("--dtype", help=f"auto, {', '.join(DTYPES)} (default float32 on a CPU, bfloat16 elsewhere)")
    add("--device", help="cpu, cuda or cuda:N (default cuda where there is one, else cpu)")
    add("--override-contract", action="store_true", help="let --prompt contradict a run's contract (default: never)")
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


def check_flags(args: argparse.Namespace, model: str, out: Path) -> None:
    """Raise InputError for what the flags and the files of the model's folder show. For a local model it costs no slow import."""
    check_dtype(args.dtype)
    if args.pictures < 0:
        raise InputError(f"--pictures must be 0 or more, not {args.pictures}")
    check_prompts(model, args.prompt, args.query_prompt, override_contract=args.override_contract)
    check_absent(out)
    folder = next(folder for folder in out.absolute().parents if folder.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"--out {out}: {folder} {'may not be written to' if folder.is_dir() else 'is a file'}, choose another place")
    check_attention_is_read(model, args.trust_remote_code)


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


def look(encoder: "Encoder", texts: list[str], role: str) -> tuple[dict[str, list], list[str]]:
    """Every text's attention for each side, and the warnings."""
    from encoder import EncodingReport

    report, of_adapter = EncodingReport(), EncodingReport()
    sides = {"base": encoder.untuned().last_token_attention(texts, role, report=report)}
    if encoder.peft:
        sides["adapter"] = encoder.last_token_attention(texts, role, report=of_adapter)
    return sides, list(dict.fromkeys([*encoder.notes, *report.warnings(), *of_adapter.notes]))


def main(args: argparse.Namespace) -> None:
    model = args.model or str(newest_run(ROOT / "runs") or "tiny")
    name = Path(model).resolve().name
    out = args.out or ROOT / "attention" / name
    check_flags(args, model, out)
    texts = collect_texts(args)
    from encoder import Encoder

    encoder = Encoder.load(
        model,
        prompt=args.prompt or (None if is_run(model) else "cluster"),
        query_prompt=args.query_prompt,
        dtype=args.dtype,
        device=args.device,
        override_contract=args.override_contract,
        trust_remote_code=args.trust_remote_code,
    )
    sides, warnings = look(encoder, texts, args.role)
    items = [summarize(text, {side: attention[i] for side, attention in sides.items()}) for i, text in enumerate(texts)]
    for line in warnings:
        warn(line)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.mkdir()
    prompt = prompt_label(encoder.contract.prompts)
    result = {"model": name, "prompt": prompt, "role": args.role, "fingerprint": encoder.fingerprint, "normalization": NORMALIZATION}
    write_json(out / "attention.json", result | {"texts": items}, indent=1)
    shown = prompt if len(prompt) <= 100 else prompt[:99] + "…"
    title = f"{name}, fingerprint {encoder.fingerprint}, prompt {shown}, {args.role}"
    title += f"\nattention of the last token in the last layer: {NORMALIZATION}"
    draw_all(items[: args.pictures], title, out)
    say(f"model {name}, fingerprint {encoder.fingerprint}; {NORMALIZATION}")
    parts = [part for part in COLOURS if any(part in item["shares"] for item in items)]
    for side in sides:
        means = (sum(item["shares"].get(part, {}).get(side, 0) for item in items) / len(items) for part in parts)
        say(f"{side:>8}: " + ", ".join(f"{part} {100 * mean:.1f} %" for part, mean in zip(parts, means, strict=True)))
    n_pictures = min(len(items), args.pictures)
    say(f"{out}: attention.json and {n_pictures} picture{'s' * (n_pictures != 1)}")


def draw_all(items: list[dict], title: str, out: Path) -> None:
    """A picture of each text. Characters that no installed font has are drawn as codes, and a line says so once."""
    if not items:
        return
    fonts, missing = choose_fonts(title + "".join(token["piece"] for item in items for token in item["tokens"]))
    if missing:
        some = " ".join(sorted(missing)[:10])
        warn(f"no installed font has {len(missing)} of the characters ({some}): they are drawn as codes; install a font such as Noto")
    for i, item in enumerate(items, 1):
        write_atomic(out / f"text-{i:03d}.png", lambda path, item=item: draw(item, title, path, fonts, missing))


if __name__ == "__main__":
    run_script(lambda: main(build_parser().parse_args()))
