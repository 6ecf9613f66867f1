"""Another runtime as a side of bench_encode.py, in a process and an environment of its own.

    VLLM_PYTHON bench/encode_worker.py vllm FOLDER DTYPE [compiled]       # vLLM's offline engine, on what export.py --to vllm writes
    LLAMA_PYTHON bench/encode_worker.py llama.cpp FOLDER N_TOKENS         # llama.cpp's library, on what export.py --to gguf writes

Reads lines of JSON, {"texts": [...], "out": a path}, writes the vectors to that path as an array (N, D), and answers each with a line.
"""

import json
import os
import sys

import numpy as np


def vllm(folder: str, dtype: str, compiled: str = ""):
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    from vllm import LLM

    settings = {"max_num_batched_tokens": 8192, "max_num_seqs": 512, "disable_log_stats": True}
    model = LLM(folder, runner="pooling", dtype=dtype, enforce_eager=not compiled, **settings)
    return lambda texts: [row.outputs.embedding for row in model.embed(texts, use_tqdm=False)]


def llama_cpp(folder: str, n_tokens: str):
    import llama_cpp

    sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, "serving"))
    from llama_cpp_worker import FileTokenizer, read_weights_as_stored

    read_weights_as_stored()  # it crashes with repacked weights where a CPU has AMX
    threads = len(os.sched_getaffinity(0))
    size = dict.fromkeys(("n_ctx", "n_batch", "n_ubatch"), int(n_tokens)) | dict.fromkeys(("n_threads", "n_threads_batch"), threads)
    tokenizer = FileTokenizer(f"{folder}/tokenizer.json")
    model = llama_cpp.Llama(f"{folder}/model.gguf", embedding=True, tokenizer=tokenizer, verbose=False, **size)

    def embed(texts: list[str]) -> list[list[float]]:
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        rows = model.embed([texts[i] for i in order])
        return [row for _, row in sorted(zip(order, rows, strict=True), key=lambda pair: pair[0])]

    return embed


def main(engine: str, *arguments: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what engines print is no answer
    embed = {"vllm": vllm, "llama.cpp": llama_cpp}[engine](*arguments)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        np.save(job["out"], np.asarray(embed(job["texts"]), np.float32))
        print("done", file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
