"""The files that `attention.py` leaves behind, written once and read by whatever draws them. No torch here.

A folder holds one of two kinds, each a JSON file for people and an .npz file of arrays.

texts (`--text`, `--input`)

    attention.json  {"model", "prompt", "role", "normalization", "how": how words were told apart,
                     "sides": [{"name": "base" | "step 20" | "adapter", "step", "fingerprint"}], "layers": L, "heads": H,
                     "texts": [{"text", "shares": {category: {side: share}}, "shares_without_bos": the same, of the last layer,
                                "tokens": [{"piece", "part", "category", "base": weight, "adapter": weight}]}]}
                    weights in "tokens" are those of the last layer, mean over heads; "adapter" only where there is one
    attention.npz   starts int64 (N+1,), where in the T tokens of all texts each text begins;
                    weights float32 (S, T, L, H) of every side, token, layer and head; a text's weights sum to 1;
                    with --also "received" float32 (S, T, L, H), "rollout" and "gradient" float32 (S, T), which "also" in
                    attention.json names and explains, see ALSO

corpus (`--data`)

    shares.json     {"data", "n_texts", "prompt", "role", "normalization", "how", "categories": [C], "layers": L, "heads": H, "note",
                     "models": [{"name", "run", "side", "seed", "step", "fingerprint"}],    # M of them; the base once, its run null
                     "shares": [{"side", "layer", "category", "bos", "mean", "low", "high", "n_seeds"}],
                     "differences": the same with "less", the side that is subtracted}
                    "layer" 1 to L, or "all" for the mean over layers; "bos" false: BOS left out and the rest renormalized;
                    "low" and "high" end a 95 % interval; "category" may also be "text", the sum of those in OF_TEXT
    shares.npz      by_layer float32 (M, N, L, C) shares of the categories, mean over heads, for every model and text;
                    by_head float32 (M, L, H, C) mean over texts

Legend: N texts, T tokens, S sides, M models, L layers, H heads, C categories. Layers and heads are counted from 1 where people read
them, and from 0 in arrays.
"""

import json
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from files.console import InputError
from files.writing import write_atomic, write_json

# what a token may be; "prefix" and "suffix" are the prompt before and behind the text, a token of the text is one of the next three
CATEGORIES = ("bos", "prefix", "suffix", "content", "function", "punctuation", "eos")
OF_TEXT = ("content", "function", "punctuation")
HIDEABLE = CATEGORIES[:-1]  # from the last token, which EOS is
# second opinions on single texts, named as what they are
ALSO = {
    "received": "attention received, the mean over all queries, for mean pooling (last layer, mean over heads)",
    "rollout": "attention rollout (Abnar and Zuidema 2020), product over layers of 0.5 A + 0.5 I, heads averaged",
    "gradient": "gradient x input of the cosine to the vector of an empty text under the same prompt (absolute values)",
}
TEXTS, CORPUS = "attention", "shares"  # names of the files, without .json and .npz
INTERVAL = 0.95


class StoredTexts(NamedTuple):
    about: dict  # what attention.json holds
    starts: np.ndarray  # (N+1,) int64
    weights: np.ndarray  # (S, T, L, H) float32


class StoredCorpus(NamedTuple):
    about: dict  # what shares.json holds
    by_layer: np.ndarray  # (M, N, L, C) float32
    by_head: np.ndarray  # (M, L, H, C) float32


def write_texts(folder: Path, stored: StoredTexts, also: dict[str, np.ndarray] | None = None) -> None:
    """Write attention.npz and attention.json into an existing folder, each complete or not at all.

    also    second opinions by name, (S, T, L, H) or (S, T)
    """
    arrays = {name: values.astype(np.float32) for name, values in (also or {}).items()}
    _write(folder, TEXTS, stored.about, starts=stored.starts.astype(np.int64), weights=stored.weights.astype(np.float32), **arrays)


def write_corpus(folder: Path, stored: StoredCorpus) -> None:
    """Write shares.npz and shares.json into an existing folder, each complete or not at all."""
    _write(folder, CORPUS, stored.about, by_layer=stored.by_layer.astype(np.float32), by_head=stored.by_head.astype(np.float32))


def read_texts(folder: Path) -> StoredTexts:
    """What `write_texts` wrote. Raises InputError for a file that is missing, damaged or does not fit the other."""
    about, arrays = _read(folder, TEXTS, ("starts", "weights"))
    starts, weights = arrays
    n_tokens = [len(text["tokens"]) for text in _listed(folder, TEXTS, about, "texts", ("text", "shares", "tokens"))]
    expected = (len(_listed(folder, TEXTS, about, "sides", ("name",))), sum(n_tokens), about.get("layers"), about.get("heads"))
    if weights.shape != expected or not np.array_equal(starts, np.cumsum([0, *n_tokens])):
        raise _unfit(folder, TEXTS)
    return StoredTexts(about, starts, weights)


def read_corpus(folder: Path) -> StoredCorpus:
    """What `write_corpus` wrote. Raises InputError for a file that is missing, damaged or does not fit the other."""
    about, arrays = _read(folder, CORPUS, ("by_layer", "by_head"))
    by_layer, by_head = arrays
    n_models = len(_listed(folder, CORPUS, about, "models", ("name", "side")))
    for name in ("shares", "differences"):
        _listed(folder, CORPUS, about, name, ("side", "layer", "category", "bos", "mean", "low", "high"))
    n_layers, n_heads, n_categories = about.get("layers"), about.get("heads"), len(about.get("categories", ()))
    fits = by_layer.shape == (n_models, about.get("n_texts"), n_layers, n_categories)
    if not fits or by_head.shape != (n_models, n_layers, n_heads, n_categories):
        raise _unfit(folder, CORPUS)
    return StoredCorpus(about, by_layer, by_head)


def kind_of(folder: Path) -> str:
    """TEXTS or CORPUS, by the JSON file in the folder. Raises InputError where there is neither."""
    for kind in (TEXTS, CORPUS):
        if (folder / f"{kind}.json").is_file():
            return kind
    raise InputError(f"{folder} holds neither {TEXTS}.json nor {CORPUS}.json: name a folder that attention.py wrote")


def without_bos(shares: np.ndarray, categories: list[str] | tuple[str, ...] = CATEGORIES) -> np.ndarray:
    """Shares (..., C) -> the same with BOS at 0 and the others divided by their sum; all 0 where that is 0."""
    others = np.where(np.asarray(categories) == "bos", 0, shares)
    total = others.sum(-1, keepdims=True)
    return np.divide(others, total, out=np.zeros_like(others), where=total > 0)


def _write(folder: Path, kind: str, about: dict, **arrays: np.ndarray) -> None:
    def write(path: Path) -> None:
        with open(path, "wb") as f:  # numpy would add .npz to the temporary name
            np.savez(f, **arrays)

    write_atomic(folder / f"{kind}.npz", write)
    write_json(folder / f"{kind}.json", about, indent=1)


def _read(folder: Path, kind: str, names: tuple[str, ...]) -> tuple[dict, list[np.ndarray]]:
    path = folder / f"{kind}.json"
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(about, dict):
            raise ValueError
        path = folder / f"{kind}.npz"
        with np.load(path, allow_pickle=False) as stored:
            return about, [stored[name] for name in names]
    except FileNotFoundError:
        raise InputError(f"{path} is missing: measure again into another folder") from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        raise InputError(f"{path} is damaged: measure again into another folder") from None


def _listed(folder: Path, kind: str, about: dict, name: str, keys: tuple[str, ...]) -> list[dict]:
    """A list of objects with these keys. Raises InputError for what is none."""
    rows = about.get(name)
    if not isinstance(rows, list) or not all(isinstance(row, dict) and set(keys) <= set(row) for row in rows):
        raise InputError(f"{folder / kind}.json is damaged ({name}): measure again into another folder")
    return rows


def _unfit(folder: Path, kind: str) -> InputError:
    return InputError(f"{folder / kind}.json and {kind}.npz do not belong together: measure again into another folder")
