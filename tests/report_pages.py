"""Pages of evaluate.py --report made from vectors that are known beforehand: shared by the tests of the page and those in a browser."""

import json
import re
from pathlib import Path

import numpy as np

from evaluation.mteb_model import MtebModel
from evaluation.report import write_report
from evaluation.report_map import KeptVectors
from evaluation.scores import Scores, Stores, as_json, score
from tasks.mteb_tasks import local_task

BARE = {role: {"prefix": "", "suffix": ""} for role in ("query", "document")}
CLUSTER = {role: {"prefix": 'This sentence: "', "suffix": '" belongs to the following cluster:'} for role in ("query", "document")}
HOSTILE = [
    "</script><img src=x onerror=\"window.harmed='text'\">",
    "<b>bold</b> &amp; <a href='javascript:window.harmed=1'>link</a> %{x} $x^2$",
    "control \x00\x07\x1b[31m characters",
    "\u202eright to left \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "long " * 2000,
    "one_word" * 500,
    "{{ template }} ${window.harmed} \\u003c \u2028 line",
]


def contract(**fields) -> dict:
    return {"base": "tiny", "prompts": BARE, "pooling": "mean", "scope": "text", "layers": [-1], "eos": False, "data": None} | fields


def write_rows(path: Path, texts: list[str], labels: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": t, "label": k}) + "\n" for t, k in zip(texts, labels, strict=True)))
    return path


def hostile_rows(path: Path, n: int = 63) -> Path:
    """n texts that hold anything, in three classes whose names do as well."""
    texts = [f"{HOSTILE[i % len(HOSTILE)]} {i}" if i % 2 else f"{i} {HOSTILE[i % len(HOSTILE)]}" for i in range(n)]
    return write_rows(path, texts, [f"{HOSTILE[i % 3][:300]}" for i in range(n)])


def clouds(labels: list[str], apart: float, seed: int = 0) -> np.ndarray:
    """Vectors (N, 8) of classes whose centres are `apart` times as far from each other as their texts are wide."""
    rng = np.random.default_rng(seed)
    codes = np.unique(labels, return_inverse=True)[1]
    return (apart * rng.normal(size=(codes.max() + 1, 8))[codes] + rng.normal(size=(len(codes), 8))).astype(np.float32)


def make_page(path: Path, rows: Path, apart: tuple[float, ...] = (0.5, 3.0)) -> dict:
    """A page of a row for each of `apart`, the last one a run -> what --out would hold."""
    scores, kept = Scores(), KeptVectors(["Clustering"])
    labels = [json.loads(line)["label"] for line in rows.read_text().splitlines()]
    task = local_task(rows, "Clustering")
    for i, distance in enumerate(apart):
        vectors = clouds(labels, distance)
        about = contract(data={"name": "pairs"} if i == len(apart) - 1 else None)
        model = MtebModel(f"row {i} </script><i>", f"{i}" * 16, about, lambda texts, role, vectors=vectors: vectors, "float32 on cpu")
        scores.cells.append(score(task, model, scores.evidence, Stores(vectors=kept)))
    results = as_json(scores)
    write_report(path, results, scores.remarks(), kept, [])
    return results


def data_of(path: Path) -> dict:
    """What the page's script draws."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text("utf-8"), re.DOTALL)[1])
