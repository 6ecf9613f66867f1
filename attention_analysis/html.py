"""`page.html`: attention to look through, one page that needs nothing else (files/page.py); html.js moves and draws what is on it.

    texts    a text's words shaded by weight, the first side above another; sliders over layer, head and side; shares by side; heads
    corpus   shares by side with their intervals, layers x categories, differences, heads; sliders over layer and side

Both can be seen without BOS. Weights go into the page as 16-bit numbers (`packed`), so that 24 MB hold all layers and heads of many texts.
What does not fit is left out, and the page says so.
"""

import base64
from pathlib import Path

import numpy as np

from attention_analysis.drawing import COLOURS, DIFFERENCES, NAMES, SHADES, SHORT, present
from attention_analysis.looking import Corpus, Text, corpus_of, text_of
from attention_analysis.stored import TEXTS, StoredTexts, kind_of, read_corpus, read_texts
from attention_analysis.words import Word, words_of
from files.page import escape, page, plain, tag
from files.writing import write_text

NAME = "page.html"
MOST_TEXTS, MOST_TOKENS = 200, 2000  # of a longer text the middle is left out
MOST_BYTES = 24_000_000  # of weights in a page
OF_HEADS = "The share of the content words in the attention of each head"
BOTH = {"true": True, "false": False}  # whether BOS counts, as html.js names it
MOST_BYTES_OF_TEXT = 6_000_000  # a text that takes more with all heads has their mean alone


def write_page(folder: Path) -> Path:
    """Write page.html into a folder that attention.py wrote -> its path. An older page is replaced.

    Raises InputError where the numbers are missing or damaged, or plotly is not installed.
    """
    title, body, data = texts_page(read_texts(folder)) if kind_of(folder) == TEXTS else corpus_page(corpus_of(read_corpus(folder)))
    here = Path(__file__)
    style, script = (here.with_suffix(suffix).read_text(encoding="utf-8") for suffix in (".css", ".js"))
    names = {name: {"name": NAMES[name], "short": SHORT[name], "colour": colour} for name, colour in COLOURS.items()}
    data |= {"categories": names, "shades": SHADES, "differences": DIFFERENCES}
    write_text(folder / NAME, page(title, f"<style>\n{style}</style>\n{body}", data, script))
    return folder / NAME


def packed(weights: np.ndarray) -> str:
    """Weights from 0 to 1 as base64 of 16-bit square roots: small weights keep three digits, and none is off by more than 0.00002."""
    roots = np.sqrt(np.clip(weights, 0, 1)) * 65535
    return base64.b64encode(roots.round().astype("<u2").tobytes()).decode()


# ----------------------------------------------------------------------------------------------------------------- texts


def texts_page(stored: StoredTexts) -> tuple[str, str, dict]:
    """Title, body and data of the page of some texts."""
    about = stored.about
    texts, room = [], MOST_BYTES
    for number in range(min(len(about["texts"]), MOST_TEXTS)):
        item = text_data(text_of(stored, number), about["texts"][number]["text"])
        room -= len(item["weights"])
        if room < 0 and texts:
            break
        texts.append(item)
    n = len(about["texts"])
    left_out = f"This page has the first {len(texts):,} of {n:,} texts: more would make it too large. attention.json has all."
    line = f"fingerprint {about['sides'][-1].get('fingerprint', '')}, {settings(about)}"
    sides = [plain(side["name"], 60) for side in about["sides"]]
    title = f"What the last token looks at: {plain(about.get('model', ''), 60)}"
    body = [
        tag("h1", escape(title)),
        tag("p", escape(line, 900), "aside"),
        tag("p", left_out, "left-out") if len(texts) < n else "",
        controls(("text",), {"layer": about["layers"], "head": about["heads"], "side": len(sides) - 1}),
        '<div id="looks"></div><div id="scale"></div><p id="note" class="aside"></p>',
        section("shares", "Shares by side" if len(sides) > 1 else "Shares", "In the layer and head chosen above."),
        section("heads", "Layers and heads", f"{OF_HEADS}. Click on one to see it above."),
    ]
    return title, "\n".join(body), {"kind": "texts", "sides": sides, "layers": about["layers"], "texts": texts}


def text_data(text: Text, whole: str) -> dict:
    """What html.js needs of a text. weights: (S, L, H, T), H 1 where there is no room for the heads."""
    text, n_left_out = fold_middle(text)
    weights = text.weights
    heads = weights.shape[3] if weights.size * 8 / 3 <= MOST_BYTES_OF_TEXT else 1
    if heads == 1:
        weights = weights.mean(3, keepdims=True)
    notes = [f"{n_left_out:,} tokens in the middle are left out here, and stand together by category."] * bool(n_left_out)
    notes += ["All heads would not fit into this page: their mean is shown."] * (heads < text.weights.shape[3])
    return {
        "title": plain(whole, 90) or "(empty)",
        "note": " ".join(notes),
        "pieces": [visible(token["piece"]) for token in text.tokens],
        "categories": [token["category"] for token in text.tokens],
        "folded": [token.get("folded", False) for token in text.tokens],
        "words": [word_data(text, word) for word in words_of(text.tokens)],
        "heads": heads,
        "weights": packed(weights.transpose(0, 2, 3, 1)),
    }


def fold_middle(text: Text) -> tuple[Text, int]:
    """A text whose middle tokens, where there are too many, stand together as one for each category, and how many these are."""
    n = len(text.tokens)
    if n <= MOST_TOKENS:
        return text, 0
    half = MOST_TOKENS // 2
    middle = np.array(text.categories[half : n - half])
    tokens, weights = text.tokens[:half], [text.weights[:, :half]]
    for category in present(middle):
        chosen = middle == category
        piece = f"\n[{chosen.sum():,} tokens: {NAMES[category]}]"
        tokens = [*tokens, {"piece": piece, "part": f"folded {category}", "category": category, "folded": True}]
        weights.append(text.weights[:, half : n - half][:, chosen].sum(1, keepdims=True))
    tokens = [*tokens, {**text.tokens[n - half], "piece": "\n" + text.tokens[n - half]["piece"]}, *text.tokens[n - half + 1 :]]
    return text._replace(tokens=tokens, weights=np.concatenate([*weights, text.weights[:, n - half :]], 1)), len(middle)


def visible(text: str) -> str:
    """A piece of text that can be seen: code points where it is made of what cannot."""
    if text.strip() and not any(c.isprintable() for c in text):
        return " ".join(f"U+{ord(c):04X}" for c in text.strip()[:4])
    return plain(text, 60)


def word_data(text: Text, word: Word) -> list:
    """First token, the one behind the last, white space before it, category, and the word as the page shows it."""
    after_bos = word.start > 0 and text.tokens[word.start - 1]["category"] == "bos"
    return [word.start, word.stop, gap(word.gap) or " " * after_bos, word.category, visible(word.text)]


def gap(space: str) -> str:
    """White space before a word as the page keeps it: line breaks and indentation, in measure."""
    if "\n" not in space:
        return " " * bool(space)
    return "\n" * min(space.count("\n"), 2) + " " * min(len(space.rpartition("\n")[2]), 24)


def controls(choices: tuple[str, ...], sliders: dict[str, int]) -> str:
    """A list for each choice, a slider for each name up to its number, and the switch of BOS. Of one side there is nothing to choose."""
    parts = [f'<label>{name} <select id="{name}"></select></label>' for name in choices]
    for name, most in sliders.items():
        least = 1 if name == "side" else 0
        parts.append(f'<label>{name} <input type="range" id="{name}" min="{least}" max="{most}" value="{most}"> <output></output></label>')
    parts = [part for part in parts if 'max="0"' not in part]
    return tag("div", "\n".join([*parts, '<label><input type="checkbox" id="without-bos"> without BOS</label>']), "controls")


def section(name: str, heading: str, text: str) -> str:
    """A heading, a line, and the place where html.js draws a picture of this name."""
    return f'{tag("h2", heading)}\n{tag("p", text, "aside")}\n<div id="{name}"></div>'


def settings(about: dict) -> str:
    """Prompt, role, normalization and how words were told apart."""
    prompt = f"prompt {plain(about.get('prompt', ''), 100)}, {about.get('role', '')}"
    parts = [prompt, about.get("normalization"), about.get("how"), about.get("note")]
    return "; ".join(filter(None, parts))


# ---------------------------------------------------------------------------------------------------------------- corpus


def corpus_page(corpus: Corpus) -> tuple[str, str, dict]:
    """Title, body and data of the page of a corpus."""
    about = corpus.stored.about
    n_runs = len({model["run"] for model in about["models"]} - {None})
    title = f"What the last token looks at in {about['n_texts']:,} texts of {plain(about['data'], 60)}"
    body = [
        tag("h1", escape(title)),
        tag("p", escape(f"{n_runs} run{'s' * (n_runs != 1)}; {settings(about)}", 900), "aside"),
        controls((), {"layer": corpus.n_layers, "side": len(corpus.sides) - 1}),
        section("shares", "Shares by side", "Means with intervals of 95 %, in the layer chosen above."),
        section("layers", "Layers and categories", "Means over heads, at the side chosen above, and its difference from the first."),
        section("heads", "Layers and heads", f"{OF_HEADS}, BOS included, at the first side and the one chosen above."),
    ]
    data = {
        "kind": "corpus",
        "sides": [plain(side, 60) for side in corpus.sides],
        "layers": corpus.n_layers,
        "shown": {name: corpus.kinds(bos) for name, bos in BOTH.items()},
        "heads": [corpus.heads(side, "content").round(5).tolist() for side in corpus.sides],
        "shares": {name: table(corpus, corpus.shares, bos) for name, bos in BOTH.items()},
        "less": {name: table(corpus, differences_of(corpus), bos) for name, bos in BOTH.items()},
    }
    return title, "\n".join(body), data


def table(corpus: Corpus, rows: dict, bos: bool) -> list:
    """Mean and interval in percent by side, layer (first the mean over layers) and category; null where there is none."""
    layers = ["all", *range(1, corpus.n_layers + 1)]
    return [[[cell(rows.get((side, at, name, bos))) for name in corpus.kinds(bos)] for at in layers] for side in corpus.sides]


def differences_of(corpus: Corpus) -> dict:
    """Rows of shares.json of every side less the first."""
    rows = [row for row in corpus.stored.about["differences"] if row.get("less") == corpus.sides[0]]
    return {(row["side"], row["layer"], row["category"], row["bos"]): row for row in rows}


def cell(row: dict | None) -> list[float] | None:
    """Mean and interval in percent."""
    return row and [round(100 * row[name], 3) for name in ("mean", "low", "high")]
