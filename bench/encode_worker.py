"""Another runtime as a side of bench_encode.py, in a process and an environment of its own.

    VLLM_PYTHON bench/encode_worker.py vllm FOLDER DTYPE [compiled]            # vLLM's offline engine
    LLAMA_PYTHON bench/encode_worker.py llama.cpp MODEL.gguf THREADS           # its library, given token ids

Reads lines of JSON, {"texts": [...]} or {"ids": [[...], ...]}, with "out": a path, to which it writes the vectors as an array (N, D);
answers each with a line.
"""

import ctypes
import json
import os
import sys

import numpy as np


def vllm(folder: str, dtype: str, compiled: str = ""):
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    from vllm import LLM

    settings = {"max_num_batched_tokens": 8192, "max_num_seqs": 512, "disable_log_stats": True}
    model = LLM(folder, runner="pooling", dtype=dtype, enforce_eager=not compiled, **settings)
    return lambda job: [row.outputs.embedding for row in model.embed(job["texts"], use_tqdm=False)]


def llama_cpp(path: str, threads: str, sequences: int = 64, tokens: int = 2048):
    import llama_cpp

    settings = {"n_ctx": tokens, "n_batch": tokens, "n_ubatch": tokens, "n_threads": int(threads), "n_threads_batch": int(threads)}
    model = llama_cpp.Llama(path, embedding=True, n_seq_max=sequences, kv_unified=True, verbose=False, **settings)
    width = model.n_embd()

    def embed(job: dict) -> list:
        rows, order = [None] * len(job["ids"]), sorted(range(len(job["ids"])), key=lambda i: -len(job["ids"][i]))
        while order:
            some, used = [], 0
            while order and len(some) < sequences and used + len(job["ids"][order[0]]) <= tokens:
                some.append(order.pop(0))
                used += len(job["ids"][some[-1]])
            model._batch.reset()
            for number, row in enumerate(some):
                model._batch.add_sequence(job["ids"][row], number, False)
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(model._ctx.ctx), True)
            model._ctx.decode(model._batch)
            for number, row in enumerate(some):
                pointer = llama_cpp.llama_get_embeddings_seq(model._ctx.ctx, number)
                rows[row] = np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), (width,)).copy()
        return rows

    return embed


def main(engine: str, *arguments: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what engines print is no answer
    embed = {"vllm": vllm, "llama.cpp": llama_cpp}[engine](*arguments)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        np.save(job["out"], np.asarray(embed(job), np.float32))
        print("done", file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
