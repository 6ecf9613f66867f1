"""Short jobs of make_pairs.py: shared by the tests of its engines."""

import json
from pathlib import Path

import make_pairs

SCRIPT = Path(make_pairs.__file__).resolve()


def run(*flags) -> None:
    make_pairs.main(make_pairs.build_parser().parse_args([str(f) for f in flags]))


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_texts(path: Path, n: int) -> Path:
    path.write_text("".join(f"The cat number {i} sat on the mat{' of the house' * (i % 4)}.\n" for i in range(n)))
    return path


def llm(texts: Path, model: str) -> tuple:
    return ("llm", "--input", texts, "--chat-model", model, "--dtype", "float32")
