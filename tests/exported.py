"""Exported folders, and the faults that are put into them on purpose: shared by the tests of `export.py`."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from encoder import Encoder
from serving.folder import roles_of
from serving.verification import Truth, VerificationFailed

QUERY = "question: {text}"
CONTRACTS = [
    {"prompt": "cluster", "pooling": "last"},
    {"prompt": "cluster", "pooling": "mean", "scope": "all", "keep_bos": True},
    {"prompt": "none", "pooling": "mean", "scope": "text"},
    {"prompt": "cluster", "pooling": "position-mean", "scope": "all"},
    {"prompt": "cluster", "pooling": "position-mean", "scope": "text", "max_tokens": 9},
    {"prompt": "cluster", "pooling": "last", "scope": "text", "normalize": False, "bos": False},
    {"prompt": "prompt-eol", "query_prompt": QUERY, "pooling": "last", "dims": 12, "max_tokens": 20, "eos": True},
]


class Exported:
    """A run, what its vectors must be, and its exported folder.

    write      (encoder, folder, dtype) -> each role and its folder
    vectors    (folder, texts) -> way of encoding: vectors
    """

    def __init__(self, run: str, folder: Path, dtype: str, write: Callable, vectors: Callable, **contract):
        encoder = Encoder.load(run, dtype="float32", **contract)
        self.truth, self.dtype, self.run, self.folder = Truth(encoder, roles_of(encoder.contract)), dtype, run, folder
        self.vectors = vectors
        encoder.merge()
        self.folders = write(encoder, folder, dtype)

    def verify(self) -> list[float]:
        """The smallest cosine of each role and way."""
        lowest = []
        for role, path in self.folders:
            self.truth.check_tokens(role, path)
            for way, vectors in self.vectors(path, self.truth.texts).items():
                lowest.append(self.truth.check(role, way, vectors, self.dtype).cosine)
        return lowest


def assert_named(exported: Exported, inject: Callable, name: str) -> None:
    """A fault is named, by the folder's tokenizer where it is one of tokens, and by the runtime's vectors alone."""
    inject(exported)
    with pytest.raises(VerificationFailed, match=re.escape(name)):
        exported.verify()
    exported.truth.check_tokens = lambda *_: None
    with pytest.raises(VerificationFailed, match=re.escape(name)):
        exported.verify()


def edit_json(path: Path, change: Callable) -> None:
    value = json.loads(path.read_text())
    path.write_text(json.dumps(change(value) or value))


def template(change: Callable) -> Callable[[Exported], None]:
    """Changes the template around every text in tokenizer.json."""
    return lambda exported: edit_json(exported.folder / "tokenizer.json", lambda t: change(t["post_processor"]))


def without_suffix(processor: dict) -> None:
    processor["single"] = [part for part in processor["single"] if part.get("SpecialToken", {}).get("id") != "<after>"]


def without_bos(processor: dict) -> None:
    for name in ("ids", "tokens"):
        del processor["special_tokens"]["<before>"][name][0]


def with_two_bos(processor: dict) -> None:
    for name in ("ids", "tokens"):
        processor["special_tokens"]["<before>"][name].insert(0, processor["special_tokens"]["<before>"][name][0])


def with_queries_prompt(exported: Exported) -> None:
    shutil.copy(exported.folder / "query" / "tokenizer.json", exported.folder)


def with_truncation(limit: int) -> Callable[[Exported], None]:
    """Changes the limit in tokenizer.json."""

    def change(tokenizer: dict) -> None:
        tokenizer["truncation"]["max_length"] = limit

    return lambda exported: edit_json(exported.folder / "tokenizer.json", change)


# of tokenizer.json: for every runtime, with the name of the part that differs
TOKEN_FAULTS = {
    "suffix": (template(without_suffix), "prompt: its suffix is missing"),
    "BOS dropped": (template(without_bos), "BOS: it is missing"),
    "BOS doubled": (template(with_two_bos), "BOS: it stands there twice"),
    "query": (with_queries_prompt, "prompt: it is that of a query"),
}
