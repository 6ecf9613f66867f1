"""Vectors of a folder by sentence-transformers alone: python sentence_transformers_worker.py FOLDER TEXTS.json OUT.npz CODE

TEXTS.json    a list of strings
CODE          1: the folder holds a module of its own, and is trusted to run it
Writes the arrays "one at a time" and "in batches", (N, D) each.
"""

import json
import sys
from pathlib import Path

import numpy as np
from sentence_transformers import SentenceTransformer


def main(folder: str, texts: str, out: str, code: str) -> None:
    texts = json.loads(Path(texts).read_text(encoding="utf-8"))
    model = SentenceTransformer(folder, trust_remote_code=code == "1", local_files_only=True)
    np.savez(
        out, **{"one at a time": np.concatenate([model.encode([text]) for text in texts]), "in batches": model.encode(texts, batch_size=8)}
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
