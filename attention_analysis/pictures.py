"""All pictures of a folder that attention.py wrote, from its stored numbers alone: no model, no torch.

    texts    for each of the first texts text-001.png (its words, shaded), text-001-bars (a bar a token), text-001-training (the paper's
             figure: a panel for the base, steps of training and the adapter), text-001-layers (layers x tokens), text-001-heads
    corpus   shares-training (by step), shares-layers (layers x categories), shares-heads, differences, differences-by-layer

Each as .png and .svg. A picture that exists is drawn again.
"""

from collections.abc import Callable
from pathlib import Path

from attention_analysis import corpus_pictures
from attention_analysis.drawing import save, style
from attention_analysis.fonts import choose_fonts, warn_of_missing
from attention_analysis.html import write_page
from attention_analysis.looking import corpus_of, ends, spread, text_of
from attention_analysis.stored import TEXTS, StoredTexts, kind_of, read_corpus, read_texts
from attention_analysis.text_pictures import draw_bars, draw_heads, draw_layers, draw_training
from attention_analysis.word_pictures import draw_words

MOST_SIDES = 5  # panels of the picture of training


def draw_folder(folder: Path, most: int = 8) -> str:
    """All pictures, of at most so many texts, and the page -> what was made, in words.

    Raises InputError where the folder has no numbers, or they are damaged.
    """
    if kind_of(folder) == TEXTS:
        n = draw_texts(folder, most)
        made = f"pictures of {n} text{'s' * (n != 1)}"
    else:
        made = f"{draw_corpus(folder)} pictures"
    return f"{made} and {write_page(folder).name}"


def draw_texts(folder: Path, most: int = 8) -> int:
    """Draw the first `most` texts of a folder with attention.json and attention.npz -> how many were drawn.

    Raises InputError where the numbers are missing or damaged.
    """
    stored = read_texts(folder)
    n = min(most, len(stored.about["texts"]))
    if not n:
        return 0
    title = title_of(stored)
    texts = [text_of(stored, number) for number in range(n)]
    with style():
        fonts = choose_fonts("".join([title, *stored_names(stored), *(token["piece"] for text in texts for token in text.tokens)]))
    warn_of_missing(fonts)
    title = "\n".join(fonts.drawable(line) for line in title.splitlines())
    with style(fonts):
        for number, text in enumerate(texts, 1):
            for suffix, (draw, sides, what) in kinds(text.sides).items():
                save(draw(text.of_sides(sides), f"{title}\n{what}", fonts), folder / f"text-{number:03d}{suffix}")
    return n


def kinds(sides: list[str]) -> dict[str, tuple[Callable[..., object], list[str], str]]:
    """What is drawn of a text: end of the file's name, function, sides, and the last line of the title."""
    last, softmax = "attention of the last token in the last layer", "softmax over all tokens of the sequence, mean over heads"
    several = spread(sides, MOST_SIDES)
    fewer = f" ({len(several)} of {len(sides)} sides)" * (len(several) < len(sides))
    return {
        "": (draw_words, ends(sides), f"{last}: {softmax}"),
        "-bars": (draw_bars, ends(sides), f"{last}: {softmax}"),
        "-training": (draw_training, several, f"{last}: {softmax}; BOS is left out of the picture{fewer}"),
        "-layers": (draw_layers, ends(sides), f"attention of the last token in every layer: {softmax}"),
        "-heads": (draw_heads, ends(sides), "attention of the last token in every layer and head: softmax over all tokens of the sequence"),
    }


def stored_names(stored: StoredTexts) -> list[str]:
    return [side["name"] for side in stored.about["sides"]]


def title_of(stored: StoredTexts) -> str:
    """Model, fingerprint, prompt and role."""
    about = stored.about
    prompt = about.get("prompt", "")
    shown = prompt if len(prompt) <= 100 else prompt[:99] + "…"
    fingerprint = about["sides"][-1].get("fingerprint", "")
    return f"{about.get('model', '')}, fingerprint {fingerprint}, prompt {shown}, {about.get('role', '')}"


def draw_corpus(folder: Path) -> int:
    """Draw the corpus of a folder with shares.json and shares.npz -> how many pictures were drawn.

    Raises InputError where the numbers are missing or damaged.
    """
    stored = read_corpus(folder)
    corpus, about = corpus_of(stored), stored.about
    n_runs = len({model["run"] for model in about["models"]} - {None})
    title = f"{about['n_texts']:,} texts of {about['data']}, prompt {about.get('prompt', '')}, {about.get('role', '')}"
    title += f", {n_runs} run{'s' * (n_runs != 1)}" * bool(n_runs)
    with style():
        fonts = choose_fonts(title)
    warn_of_missing(fonts)
    title = f"{fonts.drawable(title)}\nattention of the last token: {about['normalization']}"
    pictures = {"shares-training": corpus_pictures.draw_training, "shares-layers": corpus_pictures.draw_layers}
    pictures["shares-heads"] = corpus_pictures.draw_heads
    if corpus.differences:
        pictures["differences"] = corpus_pictures.draw_differences
        pictures["differences-by-layer"] = corpus_pictures.draw_differences_by_layer
    with style(fonts):
        for name, draw in pictures.items():
            save(draw(corpus, title), folder / name)
    return len(pictures)
