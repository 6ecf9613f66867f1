"""Vectors of a folder by ONNX Runtime and tokenizers alone: python onnx_worker.py FOLDER TEXTS.json OUT.npz

TEXTS.json    a list of strings
Writes the arrays "one at a time" and "in batches", (N, D) each.
"""

import json
import sys

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


def main(folder: str, texts: str, out: str) -> None:
    with open(texts, encoding="utf-8") as f:
        texts = json.load(f)
    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    model = onnxruntime.InferenceSession(f"{folder}/model.onnx", providers=["CPUExecutionProvider"])

    def encode(size: int) -> np.ndarray:
        vectors = []
        for start in range(0, len(texts), size):
            encodings = tokenizer.encode_batch(texts[start : start + size])
            inputs = {name: np.array([getattr(e, field) for e in encodings], np.int64) for name, field in INPUTS.items()}
            vectors.append(model.run(None, inputs)[0])
        return np.concatenate(vectors)

    np.savez(out, **{"one at a time": encode(1), "in batches": encode(8)})


INPUTS = {"input_ids": "ids", "attention_mask": "attention_mask"}  # of the model: field of an encoding

if __name__ == "__main__":
    main(*sys.argv[1:])
