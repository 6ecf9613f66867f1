"""Show where the last token looks: its attention in the last layer, base and adapter side by side.

    python attention.py --text "My card was swallowed by the machine."       # newest run, else the bundled model
    python attention.py --model runs/mine --input texts.txt --out attention/mine

Leaves behind, in --out (default attention/MODEL):

    attention.json      {"model", "fingerprint", "normalisation", "texts": [{"text", "shares": {part: {side: share}},
                        "tokens": [{"piece", "part": "bos" | "prompt" | "text" | "eos", "base": weight, "adapter": weight}]}]}
    text-001.png ...    one picture a text (at most --pictures), a bar a token

Weights are the softmax over all tokens of the sequence, averaged over the heads, so that each side sums to 1.
"""

import argparse
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import torch

from encoder import CONTRACT_FILE, PRESETS, Encoder, View, is_run, write_atomic
from prompts import PROMPTS, InputError

HERE = Path(__file__).resolve().parent
NORMALISATION = "softmax over all tokens of the sequence, mean over heads"
COLOURS = {"bos": "tab:gray", "prompt": "tab:orange", "text": "tab:blue", "eos": "tab:purple"}


@torch.no_grad()
def last_token_attention(encoder: Encoder, text: str) -> list[float]:
    """Weights (L,) that the sequence's last token gives to every token in the last layer, mean over heads, sum 1."""
    batch = encoder.collate(encoder.tokenise([text]), [0])
    states = encoder.run(batch, [View("attention", keep_bos=True)])
    scores = states.attention.scores(*batch.locate(np.zeros_like(batch.lengths), batch.lengths))  # (T, H)
    return scores.softmax(0).mean(1).tolist()


def parts_of(encoder: Encoder, text: str) -> tuple[list[str], list[str]]:
    """Each token as readable text, and which part of the sequence it belongs to."""
    tokens = encoder.tokenise([text])
    ids, (start, end) = tokens.ids[0], tokens.text[0]
    parts = ["text" if start <= i < end else "prompt" for i in range(len(ids))]
    if encoder.contract.bos:
        parts[0] = "bos"
    if encoder.contract.eos:
        parts[-1] = "eos"
    return [encoder.tokenizer.decode([i]) for i in ids], parts


def measure(encoder: Encoder, text: str) -> dict:
    pieces, parts = parts_of(encoder, text)
    if not pieces:
        raise InputError("an empty text without a prompt has no tokens to look at")
    sides = {"base": last_token_attention(encoder.untuned(), text)}
    if encoder.peft:
        sides["adapter"] = last_token_attention(encoder, text)
    tokens = [
        {"piece": piece, "part": part} | {s: w[i] for s, w in sides.items()}
        for i, (piece, part) in enumerate(zip(pieces, parts, strict=True))
    ]
    present = [p for p in COLOURS if p in parts]
    shares = {p: {s: sum(t[s] for t in tokens if t["part"] == p) for s in sides} for p in present}
    return {"text": text, "shares": shares, "tokens": tokens}


def draw(found: dict, model: str, path: Path) -> None:
    """One panel a side on a common scale, a bar a token, its part by colour."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    tokens = found["tokens"]
    sides = [s for s in ("base", "adapter") if s in tokens[0]]
    width = min(40, max(7, 0.28 * len(tokens) + 1.5))
    with plt.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a script the font lacks shows as boxes
        size = (width, 2.2 * len(sides) + 1.2)
        figure, axes = plt.subplots(len(sides), 1, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained")
        for axis, side in zip(axes[:, 0], sides, strict=True):
            axis.bar(range(len(tokens)), [t[side] for t in tokens], color=[COLOURS[t["part"]] for t in tokens])
            shares = ", ".join(f"{part} {100 * share[side]:.0f} %" for part, share in found["shares"].items())
            axis.set_title(f"{side}: {shares}", fontsize=9, loc="left")
            axis.set_ylabel("weight")
            axis.margins(x=0.01)
        labels = [t["piece"].strip() or "␣" for t in tokens]
        axes[-1, 0].set_xticks(range(len(tokens)), labels, rotation=90, fontsize=8)
        axes[0, 0].legend(handles=[Patch(color=COLOURS[p], label=p) for p in found["shares"]], fontsize=8)
        figure.suptitle(f"{model}: attention of the last token in the last layer\n({NORMALISATION})", fontsize=10)
        figure.savefig(path, format="png", dpi=120)
        plt.close(figure)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", help=f"a run, a folder, a hub id or {', '.join(PRESETS)} (default: newest run, else tiny)")
    add("--text", action="append", help="a text; may be repeated")
    add("--input", type=Path, help="a file with a text a line")
    add("--prompt", help=f"{', '.join(PROMPTS)}, or a string with {{text}}; a run has its own (default cluster)")
    add("--pictures", type=int, default=8, help="draw at most this many texts (default 8)")
    add("--out", type=Path, help="a folder (default attention/MODEL)")
    add("--dtype", help="auto, float32, bfloat16 (default float32 on a CPU, bfloat16 elsewhere)")
    add("--device", help="default cuda where there is one, else cpu")
    add("--override-contract", action="store_true", help="let --prompt contradict a run's contract")
    add("--trust-remote-code", action="store_true", help="run code that comes with a hub model (off)")
    return parser


def read_texts(args: argparse.Namespace) -> list[str]:
    texts = list(args.text or [])
    if args.input:
        try:
            texts += [line for line in args.input.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise InputError(f"{args.input} is not UTF-8 (byte {error.start}): convert it first, for example with iconv -t utf-8") from None
    if not texts:
        raise InputError(f"{args.input} is empty" if args.input else "no text: give --text or --input")
    return texts


def main(args: argparse.Namespace) -> None:
    texts = read_texts(args)
    runs = sorted((p.parent for p in (HERE / "runs").glob(f"*/{CONTRACT_FILE}")), key=lambda p: (p / CONTRACT_FILE).stat().st_mtime)
    model = args.model or (str(runs[-1]) if runs else "tiny")
    out = args.out or HERE / "attention" / Path(model).name
    if args.pictures < 0:
        raise InputError(f"--pictures must be 0 or more, not {args.pictures}")
    if out.exists():
        raise InputError(f"{out} exists already: choose another --out, or delete it first")
    prompt = args.prompt or (None if is_run(model) else "cluster")
    encoder = Encoder.load(
        model,
        prompt=prompt,
        dtype=args.dtype,
        device=args.device,
        override_contract=args.override_contract,
        trust_remote_code=args.trust_remote_code,
    )
    found = [measure(encoder, text) for text in texts]
    for line in encoder.warnings():
        print(f"warning: {line}", file=sys.stderr)
    name = Path(model).name
    report = {"model": name, "fingerprint": encoder.fingerprint, "normalisation": NORMALISATION, "texts": found}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.mkdir()
    write_atomic(
        out / "attention.json", lambda path: path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    )
    for i, item in enumerate(found[: args.pictures], 1):
        write_atomic(out / f"text-{i:03d}.png", lambda path, item=item: draw(item, name, path))
    print(f"model {name}, fingerprint {encoder.fingerprint}; {NORMALISATION}")
    parts = [p for p in COLOURS if any(p in item["shares"] for item in found)]
    for side in [s for s in ("base", "adapter") if s in found[0]["tokens"][0]]:
        means = (sum(item["shares"].get(p, {}).get(side, 0) for item in found) / len(found) for p in parts)
        print(f"{side:>8}: " + ", ".join(f"{part} {100 * mean:.1f} %" for part, mean in zip(parts, means, strict=True)))
    print(f"{out}: attention.json and {min(len(found), args.pictures)} pictures")


if __name__ == "__main__":
    try:
        main(build_parser().parse_args())
    except (InputError, OSError) as error:
        print(f"attention.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
