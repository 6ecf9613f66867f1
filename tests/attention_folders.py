"""Folders as attention.py leaves them, of made-up numbers: shared by the tests of its pictures and of its page."""

import itertools
from pathlib import Path

import numpy as np

from attention_analysis.stored import CATEGORIES, StoredCorpus, StoredTexts, without_bos, write_corpus, write_texts

SIDES = ("base", "step 10", "adapter")
NORMALIZATION = "softmax over all tokens of the sequence, mean over heads"
SENTENCE = [
    *[("<s>", "bos", "bos"), ("See", "prefix", "prefix"), (":", "prefix", "prefix"), (" the", "text", "function")],
    *[(" swallow", "text", "content"), ("ed", "text", "content"), (" card", "text", "content"), (".", "text", "punctuation")],
    (" belongs", "suffix", "suffix"),
]
HOSTILE = [
    *["</script><img", " src=x onerror=\"window.harmed='text'\">", " \x07\x1b[31m", " \u202eabc", " שלום", " مرحبا", " $x_1$", " %{x}"],
    *[" <b>&amp;", "\n\n    return", " 犬", "", " 😀", "{{x}}", " ${window.harmed}", "\u2028", "\u200b", " 'quoted'", "x" * 300],
]


def described(piece: str, part: str, category: str) -> dict:
    return {"piece": piece, "part": part, "category": category}


def sentence() -> list[dict]:
    return [described(*token) for token in SENTENCE]


def hostile() -> list[dict]:
    own = [described(piece, "text", ("content", "function", "punctuation")[i % 3]) for i, piece in enumerate(HOSTILE)]
    return [described("<s>", "bos", "bos"), *own, described(":", "suffix", "suffix")]


def long_text(n: int) -> list[dict]:
    """n tokens: BOS, words, a suffix of one."""
    own = [described(f" w{i}", "text", "content" if i % 2 else "function") for i in range(n - 2)]
    return [described("<s>", "bos", "bos"), *own, described(":", "suffix", "suffix")]


def random_weights(n_sides: int, n_tokens: int, n_layers: int, n_heads: int, seed: int = 0) -> np.ndarray:
    """(S, T, L, H) that sum to 1 over the tokens; the first token has much."""
    weights = np.random.default_rng(seed).gamma(0.5, size=(n_sides, n_tokens, n_layers, n_heads))
    weights[:, 0] += n_tokens
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def make_texts(folder: Path, texts: list[list[dict]], sides: tuple[str, ...] = SIDES, n_layers: int = 3, n_heads: int = 4) -> StoredTexts:
    """Write attention.json and attention.npz of texts given as tokens."""
    starts = np.cumsum([0, *map(len, texts)])
    weights = random_weights(len(sides), int(starts[-1]), n_layers, n_heads)
    for start, stop in itertools.pairwise(starts):
        weights[:, start:stop] = random_weights(len(sides), int(stop - start), n_layers, n_heads, seed=int(start))
    items = [{"text": "".join(t["piece"] for t in tokens if t["part"] == "text"), "shares": {}, "tokens": tokens} for tokens in texts]
    about = {"model": "mine </script>", "prompt": "cluster", "role": "document", "normalization": NORMALIZATION, "how": "stop words"}
    about["sides"] = [{"name": name, "step": 10 * i, "fingerprint": "0" * 16} for i, name in enumerate(sides)]
    about |= {"layers": n_layers, "heads": n_heads, "texts": items}
    folder.mkdir(exist_ok=True)
    stored = StoredTexts(about, starts, weights)
    write_texts(folder, stored)
    return stored


def make_corpus(folder: Path, sides: tuple[str, ...] = SIDES, seeds: int = 2, n_texts: int = 20) -> StoredCorpus:
    """Write shares.json and shares.npz of `seeds` runs; no text has EOS."""
    rng, names = np.random.default_rng(0), [("base", None), *((side, seed) for seed in range(seeds) for side in sides[1:])]
    by_layer = rng.dirichlet(np.arange(1, 7), (len(names), n_texts, 3))
    by_layer = np.concatenate([by_layer, np.zeros((*by_layer.shape[:-1], 1))], -1).astype(np.float32)
    by_head = rng.dirichlet(np.ones(len(CATEGORIES)), (len(names), 3, 4)).astype(np.float32)
    runs = [None if seed is None else f"runs/{seed}" for _, seed in names]
    models = [{"name": side, "run": run, "side": side, "step": 10 * sides.index(side)} for (side, _), run in zip(names, runs, strict=True)]
    shares, differences = [], []
    for bos in (True, False):
        values = by_layer if bos else without_bos(by_layer)
        for layer in ("all", 1, 2, 3):
            means = values.mean((1, 2)) if layer == "all" else values[:, :, layer - 1].mean(1)  # (M, C)
            for side in sides:
                of_side = means[[name == side for name, _ in names]].mean(0)
                for category, mean, less in zip(CATEGORIES, of_side.tolist(), (of_side - means[0]).tolist(), strict=True):
                    row = {"side": side, "layer": layer, "category": category, "bos": bos, "n_seeds": seeds}
                    shares.append(row | {"mean": mean, "low": mean - 0.01, "high": mean + 0.02})
                    if side != "base":
                        differences.append(row | {"less": "base", "mean": less, "low": less - 0.01, "high": less + 0.02})
    about = {"data": "texts.csv", "n_texts": n_texts, "prompt": "cluster", "role": "document", "normalization": NORMALIZATION}
    about |= {"how": "stop words", "categories": list(CATEGORIES), "layers": 3, "heads": 4, "note": "", "models": models}
    about |= {"shares": shares, "differences": differences}
    folder.mkdir(exist_ok=True)
    stored = StoredCorpus(about, by_layer, by_head)
    write_corpus(folder, stored)
    return stored
