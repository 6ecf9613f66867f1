"""Vectors of an exported folder by the runtimes that serve it, each in a fresh process."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from files.console import InputError
from serving.folder import CODE

HERE = Path(__file__).resolve().parent
START_SECONDS, ANSWER_SECONDS = 600, 300  # that a server may take to load a model, and to answer


class RuntimeFailed(InputError):
    """A runtime did not start, or gave no vectors."""


class RuntimeCrashed(RuntimeFailed):
    """A signal ended its process: a fault of the runtime, or of how it was built for this machine."""


def environment() -> dict[str, str]:
    return os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def last_words(text: str) -> str:
    """The last line of a runtime's output that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


def run_program(command: list, failure: str) -> None:
    """Run a program to its end. Raises RuntimeFailed, in which the program's last words follow `failure`."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, errors="replace", env=environment(), check=False)
    if done.returncode < 0:
        raise RuntimeCrashed(f"{failure}: it crashed ({signal.Signals(-done.returncode).name})")
    if done.returncode:
        raise RuntimeFailed(f"{failure}: {last_words(done.stderr)}")


def check_python(flag: str, python: str, modules: tuple[str, ...]) -> None:
    """Raise InputError where the Python that a flag names is no program, or lacks a module that it would be used for."""
    code = "import importlib.util, sys; print(*(name for name in sys.argv[1:] if importlib.util.find_spec(name) is None))"
    try:
        done = subprocess.run([python, "-c", code, *modules], capture_output=True, text=True, errors="replace", check=False)
    except OSError:
        raise InputError(f"{flag} {python}: no such program") from None
    if done.returncode:
        raise InputError(f"{flag} {python}: this is no Python that runs ({last_words(done.stderr)})")
    if missing := done.stdout.split():
        raise InputError(f"{flag} {python}: no {' and no '.join(missing)} there: install what is missing, or name another Python")


def worker_arrays(python: str, worker: str, folder: Path, texts: list[str], failure: str, *more: str) -> dict[str, np.ndarray]:
    """What a worker of this folder says of the texts, in a fresh process of a Python. Raises RuntimeFailed.

    more    what the worker takes behind folder, file of texts and file to write
    """
    with tempfile.TemporaryDirectory() as scratch:
        given, out = Path(scratch) / "texts.json", Path(scratch) / "arrays.npz"
        given.write_text(json.dumps(texts), encoding="utf-8")
        run_program([python, HERE / worker, folder, given, out, *more], failure)
        with np.load(out) as arrays:
            return dict(arrays)


def sentence_transformers_vectors(folder: Path, texts: list[str]) -> dict[str, np.ndarray]:
    """Way of encoding -> vectors (N, D) by `SentenceTransformer(folder)`. Raises RuntimeFailed."""
    code = str(int((folder / f"{CODE}.py").exists()))
    failure = f"sentence-transformers cannot load {folder}"
    return worker_arrays(sys.executable, "sentence_transformers_worker.py", folder, texts, failure, code)


def onnx_vectors(folder: Path, texts: list[str]) -> dict[str, np.ndarray]:
    """Way of encoding -> vectors (N, D) by ONNX Runtime and `tokenizers` alone. Raises RuntimeFailed."""
    return worker_arrays(sys.executable, "onnx_worker.py", folder, texts, f"ONNX Runtime cannot run {folder}")


def llama_cpp_vectors(python: str, folder: Path, texts: list[str], n_tokens: int) -> tuple[dict[str, np.ndarray], np.ndarray, bool]:
    """Vectors of a folder by llama.cpp, through the package llama-cpp-python of a Python, from the ids of tokenizer.json.

    n_tokens    that the context holds, see `gguf_folder.context_tokens`
    Returns     way of encoding -> vectors (N, D); for each text whether llama.cpp makes the same ids of it by itself (N,); whether the
                weights were read as they are in the file, because llama.cpp crashes on this machine with those that it repacks
    Raises RuntimeFailed.
    """
    for as_stored in (False, True):
        try:
            failure = f"llama.cpp cannot run {folder}"
            arrays = worker_arrays(python, "llama_cpp_worker.py", folder, texts, failure, str(n_tokens), str(int(as_stored)))
        except RuntimeCrashed:
            if as_stored:
                raise
            continue
        same = arrays.pop("same tokens")
        return arrays, same, as_stored
    raise AssertionError("unreachable")


def vllm_flags(dtype: str, limit: int) -> list[str]:
    """What serves a folder in vLLM as it is. Longer texts are rejected unless a request asks for truncation."""
    return ["--runner", "pooling", "--dtype", dtype, "--max-model-len", str(limit)]


@contextlib.contextmanager
def vllm_server(python: str, folder: Path, dtype: str, limit: int) -> Iterator[str]:
    """Starts vLLM's server of another environment's Python on the loopback address -> its URL. Raises RuntimeFailed."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    # what `vllm serve FOLDER` starts, which the package for CPUs cannot
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), *vllm_flags(dtype, limit), "--enforce-eager"]
    with tempfile.TemporaryFile("w+") as log:
        flags = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "exported"]
        server = subprocess.Popen([*command, *flags], stdout=log, stderr=log, env=environment() | {"VLLM_CPU_KVCACHE_SPACE": "1"})
        try:
            url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
            while True:
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"{url}/health", timeout=5).close()
                    break
                if server.poll() is not None:
                    log.seek(0)  # warnings name errors that might come
                    errors = [line for line in log if "Error" in line and "WARNING" not in line] or ["it did not answer"]
                    raise RuntimeFailed(f"vLLM cannot serve {folder}: {last_words(errors[-1])}")
                if time.monotonic() > deadline:
                    raise RuntimeFailed(f"vLLM cannot serve {folder}: it did not answer within {START_SECONDS} seconds")
                time.sleep(0.5)
            yield url
        finally:
            server.terminate()
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()


def vllm_vectors(python: str, folder: Path, texts: list[str], dtype: str, limit: int) -> dict[str, np.ndarray]:
    """Way of asking -> vectors (N, D) by vLLM's server; a text that it refuses is NaN. Raises RuntimeFailed."""

    def ask(url: str, batch: list[str]) -> list[list[float]] | None:
        body = {"model": "exported", "input": batch, "encoding_format": "float", "truncate_prompt_tokens": -1}
        request = urllib.request.Request(f"{url}/v1/embeddings", json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as response:
                rows = json.load(response)["data"]
        except urllib.error.HTTPError as error:
            if len(batch) > 1:
                raise RuntimeFailed(f"vLLM refuses a batch: {error.read().decode(errors='replace')[:300]}") from None
            return None
        return [row["embedding"] for row in sorted(rows, key=lambda row: row["index"])]

    with vllm_server(python, folder, dtype, limit) as url:
        single = [ask(url, [text]) for text in texts]
        taken = [i for i, rows in enumerate(single) if rows]
        if not taken:
            raise RuntimeFailed("vLLM refuses every text")
        vectors = {name: np.full((len(texts), len(single[taken[0]][0])), np.nan, np.float32) for name in ("one at a time", "in batches")}
        for i in taken:
            vectors["one at a time"][i] = single[i][0]
        for start in range(0, len(taken), 8):
            some = taken[start : start + 8]
            vectors["in batches"][some] = ask(url, [texts[i] for i in some])
    return vectors
