"""Short runs of train.py on a small random model, and what they leave behind: shared by the tests of training."""

import json
import random
from pathlib import Path

import torch
from safetensors.torch import load_file

import train

ROOT = Path(__file__).resolve().parent.parent
ADAPTER = "adapter_model.safetensors"


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def numbered_rows(n: int) -> list[dict]:
    return [{"anchor": f"Number {i} of the list", "positive": f"the list has {i}"} for i in range(n)]


def word_rows() -> list[dict]:
    """24 pairs that share a word each."""
    words = ["cat", "dog", "bank", "rate", "river", "mountain", "card", "loan", "house", "tree", "car", "road"]
    other, rows = random.Random(0), []
    for i in range(24):
        word = words[i % len(words)]
        rows.append({"anchor": f"The {word} and {other.choice(words)} {i}.", "positive": f"About a {word}, {other.choice(words)} {i}."})
    return rows


def write_labelled(path: Path) -> Path:
    topics = ("the cat sat on the mat", "the bank raised its interest rates")
    return write_rows(path, [{"text": f"{topic} {i}", "label": topic} for topic in topics for i in range(5)])


class ShortRuns:
    """Called with a name and flags: the command line of three steps on 24 pairs, for a run in the folder of that name."""

    def __init__(self, model: str, folder: Path):
        self.model, self.folder, self.pairs = model, folder, write_rows(folder / "pairs.jsonl", word_rows())

    def __call__(self, name: str, *more) -> list[str]:
        flags = ("--model", self.model, "--pairs", self.pairs, "--out", self.folder / name)
        return [str(x) for x in (*flags, "--batch-size", 4, "--lora-rank", 2, "--dtype", "float32", "--steps", 3, *more)]


def run(*flags) -> None:
    train.main(train.parse([str(flag) for flag in flags]))


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def summary(out: Path) -> dict:
    return json.loads((out / "summary.json").read_text())


def assert_same_adapter(one: Path, other: Path) -> None:
    torch.testing.assert_close(load_file(one / ADAPTER), load_file(other / ADAPTER), rtol=0, atol=0)
