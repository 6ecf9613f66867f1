"""Vectors of a folder by llama.cpp, from the ids of tokenizer.json: python llama_cpp_worker.py FOLDER TEXTS.json OUT.npz N_TOKENS AS_STORED

TEXTS.json    a list of strings
N_TOKENS      that the context holds
AS_STORED     1: do not repack the weights for this CPU
Writes the arrays "one at a time" and "in batches", (N, D) each, and "same tokens" (N,): whether llama.cpp's own tokenizer, as its server
uses it, gives the ids of tokenizer.json. Runs in an environment that has llama-cpp-python, tokenizers and numpy.
"""

import json
import os
import sys

import llama_cpp
import numpy as np
from llama_cpp.llama_tokenizer import BaseLlamaTokenizer, LlamaTokenizer
from tokenizers import Tokenizer


class FileTokenizer(BaseLlamaTokenizer):
    """Ids by tokenizer.json: prompt and limit included."""

    def __init__(self, path: str):
        self.tokenizer = Tokenizer.from_file(path)

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = True) -> list[int]:
        return self.tokenizer.encode(text.decode()).ids

    def detokenize(self, tokens: list[int], prev_tokens: list[int] | None = None, special: bool = False) -> bytes:
        return self.tokenizer.decode(tokens).encode()


def read_weights_as_stored() -> None:
    """Let llama.cpp load models without its repacked weights, for which `Llama` has no argument."""
    bindings = llama_cpp.llama_cpp  # the module in which `Llama` looks for it
    default_params = bindings.llama_model_default_params

    def params():
        changed = default_params()
        changed.use_extra_bufts = False
        return changed

    bindings.llama_model_default_params = params


def main(folder: str, texts: str, out: str, n_tokens: str, as_stored: str) -> None:
    with open(texts, encoding="utf-8") as f:
        texts = json.load(f)
    with open(f"{folder}/embedding.json", encoding="utf-8") as f:
        normalize = json.load(f)["normalize"]
    if as_stored == "1":
        read_weights_as_stored()
    tokenizer = FileTokenizer(f"{folder}/tokenizer.json")
    threads = int(os.environ.get("OMP_NUM_THREADS", 0)) or None
    size = dict.fromkeys(("n_ctx", "n_batch", "n_ubatch"), int(n_tokens)) | dict.fromkeys(("n_threads", "n_threads_batch"), threads)
    model = llama_cpp.Llama(f"{folder}/model.gguf", embedding=True, tokenizer=tokenizer, verbose=False, **size)
    own = LlamaTokenizer(model)
    same = [own.tokenize(text.encode()) == tokenizer.tokenize(text.encode()) for text in texts]
    single = [model.embed(text, normalize=normalize) for text in texts]
    batches = [vector for i in range(0, len(texts), 8) for vector in model.embed(texts[i : i + 8], normalize=normalize)]
    arrays = {"one at a time": np.array(single, np.float32), "in batches": np.array(batches, np.float32), "same tokens": np.array(same)}
    np.savez(out, **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
