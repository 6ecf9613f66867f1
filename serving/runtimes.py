"""Vectors of an exported folder by the runtimes that serve it, each in a fresh process."""

import contextlib
import json
import os
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


def environment() -> dict[str, str]:
    return os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def last_words(text: str) -> str:
    """The last line of a runtime's output that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


def sentence_transformers_vectors(folder: Path, texts: list[str]) -> dict[str, np.ndarray]:
    """Way of encoding -> vectors (N, D) by `SentenceTransformer(folder)`. Raises RuntimeFailed."""
    with tempfile.TemporaryDirectory() as scratch:
        given, out = Path(scratch) / "texts.json", Path(scratch) / "vectors.npz"
        given.write_text(json.dumps(texts), encoding="utf-8")
        code = str(int((folder / f"{CODE}.py").exists()))
        command = [sys.executable, HERE / "sentence_transformers_worker.py", folder, given, out, code]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment(), check=False)
        if done.returncode:
            raise RuntimeFailed(f"sentence-transformers cannot load {folder}: {last_words(done.stderr)}")
        with np.load(out) as arrays:
            return dict(arrays)


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
                if server.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    errors = [line for line in log if "Error" in line] or ["it did not answer"]
                    raise RuntimeFailed(f"vLLM cannot serve {folder}: {last_words(errors[-1])}")
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
