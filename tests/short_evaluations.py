"""Calls of evaluate.py on small labelled files, and vectors whose right scores are known: shared by the tests of evaluation."""

import gzip
from pathlib import Path

import numpy as np
import pytest

import evaluate
from encoder import base_models
from evaluation import rows, scores
from evaluation.mteb_model import MtebModel
from evaluation.task_choice import choose_tasks
from tasks.mteb_tasks import local_task


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(base_models, "hub_answers", lambda: False)
    monkeypatch.setattr(rows, "RUNS", tmp_path / "runs")


def parse(*flags):
    return evaluate.build_parser().parse_args([str(flag) for flag in flags])


def run(*flags) -> None:
    evaluate.main(parse(*flags))


def choose(*flags) -> list:
    return choose_tasks(parse(*flags), [])


def write_csv(path: Path, header: str, rows) -> Path:
    text = header + "\n" + "".join(",".join(map(str, r)) + "\n" for r in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def labelled(path: Path, n: int = 60) -> Path:
    topics = {"animal": "the cat chased a dog", "money": "interest rates at the bank", "road": "a car stood on the road"}
    return write_csv(path, "text,label", [(f"{text} {i}", label) for i in range(n // 3) for label, text in topics.items()])


class Oracle:
    """Vectors that say which word a text begins with: the right clusters, and the right scores, are known beforehand."""

    def __init__(self):
        self.calls = []

    def __call__(self, texts, role):
        self.calls.append((role, list(texts)))
        out = np.zeros((len(texts), 40), dtype=np.float32)
        for i, text in enumerate(texts):
            out[i, sum(map(ord, text.split(" ")[0])) % 40] = 1.0 + i * i  # of very different norms: they must not matter
        return out


def oracle_score(path: Path, task_type: str | None = None):
    oracle = Oracle()
    return scores.score(local_task(path, task_type), MtebModel("oracle", "f" * 16, None, oracle)), oracle
