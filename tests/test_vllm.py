"""vLLM on exported folders, for real: by its server and offline, each in a fresh process. `make test-vllm` installs it and runs these.

VLLM_PYTHON is the Python of an environment with vLLM. The bundled model stands for all: vLLM's attention on CPUs takes no heads of fewer
than 32 numbers, and the small random models of the other tests have smaller ones; their classes are in bench/bench_parity.py.
"""

import json
import os
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from conftest import make_run

import export
from encoder import Encoder
from serving.folder import roles_of, token_limit, write_folder
from serving.runtimes import vllm_server
from serving.verification import Truth, VerificationFailed

PYTHON = os.environ.get("VLLM_PYTHON")
pytestmark = pytest.mark.skipif(not PYTHON, reason="VLLM_PYTHON names no environment with vLLM (make test-vllm)")
LIMIT = 24
# as the README has it; vLLM reads pooling and limit from the folder
OFFLINE = """
import json, sys
from vllm import LLM

folder, given, out, dtype = sys.argv[1:]
model = LLM(model=folder, runner="pooling", dtype=dtype, enforce_eager=True)
outputs = model.embed(json.load(open(given)), tokenization_kwargs={"truncate_prompt_tokens": -1}, use_tqdm=False)
json.dump([output.outputs.embedding for output in outputs], open(out, "w"))
"""


class Exported:
    """A run of the bundled model with a random adapter, its truth and its folders."""

    def __init__(self, folder: Path, dtype: str, **contract):
        encoder = Encoder.load(make_run("tiny", folder / "run", max_tokens=LIMIT, **contract), dtype="float32")
        self.truth, self.dtype = Truth(encoder, roles_of(encoder.contract)), dtype
        self.limits = {role: token_limit(encoder, role) for role in roles_of(encoder.contract)}
        encoder.merge()
        self.folders = dict(write_folder(encoder, folder / "exported", dtype))


def embed_offline(exported: Exported, role: str, scratch: Path) -> np.ndarray:
    """Vectors (N, D) of the texts of the verification by `LLM(...).embed`."""
    given, out = scratch / "texts.json", scratch / "vectors.json"
    given.write_text(json.dumps(exported.truth.texts))
    command = [PYTHON, "-c", OFFLINE, exported.folders[role], given, out, exported.dtype]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return np.array(json.loads(out.read_text()), np.float32)


@pytest.mark.parametrize(
    ("dtype", "contract"),
    [
        ("float32", {"prompt": "knowledge", "pooling": "last"}),
        ("float32", {"prompt": "cluster", "pooling": "mean", "scope": "all", "keep_bos": True, "dims": 64}),
        ("bfloat16", {"prompt": "none", "pooling": "last"}),
    ],
    ids=["long-last", "short-mean-64", "none-last-bfloat16"],
)
def test_offline_vectors_are_ours(tmp_path, dtype, contract):
    exported = Exported(tmp_path, dtype, **contract)
    assert max(map(len, exported.truth.encoder.tokenizer(exported.truth.texts)["input_ids"])) > 2 * LIMIT
    check = exported.truth.check("document", "vLLM offline", embed_offline(exported, "document", tmp_path), dtype)
    assert check.cosine > (1 - 1e-5 if dtype == "float32" else 0.999) and not check.n_refused


def test_offline_a_fault_is_named(tmp_path):
    """The folder of the queries in place of that of the documents: the tests above can fail."""
    exported = Exported(tmp_path, "float32", prompt="cluster", query_prompt="question: {text}", pooling="last")
    vectors = embed_offline(exported, "query", tmp_path)
    assert exported.truth.check("query", "vLLM offline", vectors, "float32").cosine > 1 - 1e-5
    with pytest.raises(VerificationFailed, match="prompt: it is that of a query"):
        exported.truth.check("document", "vLLM offline", vectors, "float32")


@pytest.mark.parametrize(
    ("dtype", "contract"),
    [
        ("float32", {"prompt": "cluster", "pooling": "last"}),
        ("bfloat16", {"prompt": "none", "pooling": "mean", "scope": "all", "keep_bos": True}),
    ],
    ids=["short-last", "none-mean-bfloat16"],
)
def test_export_verifies_in_the_server(tmp_path, dtype, contract, capsys):
    source = make_run("tiny", tmp_path / "run", max_tokens=LIMIT, **contract)
    flags = [source, "--to", "vllm", "--vllm-python", PYTHON, "--merge-dtype", dtype, "--out", tmp_path / "out"]
    export.main(export.build_parser().parse_args(list(map(str, flags))))
    checks = json.loads((tmp_path / "out" / "verification.json").read_text())["checks"]
    of_vllm = {check["what"]: check["cosine"] for check in checks if "vLLM" in check["what"]}
    assert len(of_vllm) == 2 and min(of_vllm.values()) > (1 - 1e-5 if dtype == "float32" else 0.999), checks
    assert "not verified" not in capsys.readouterr().err


def test_the_server_refuses_long_texts_unless_asked_to_cut_them(tmp_path):
    exported = Exported(tmp_path, "float32", prompt="cluster", pooling="last")
    text = "the bank raised its rates " * 20

    def ask(url: str, **more) -> list[float]:
        body = json.dumps({"model": "exported", "input": text, **more}).encode()
        request = urllib.request.Request(f"{url}/v1/embeddings", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=300) as response:
            return json.load(response)["data"][0]["embedding"]

    with vllm_server(PYTHON, exported.folders["document"], "float32", exported.limits["document"]) as url:
        with pytest.raises(urllib.error.HTTPError) as error:
            ask(url)
        assert error.value.code == 400
        vector = ask(url, truncate_prompt_tokens=-1)
    np.testing.assert_allclose([vector], exported.truth.encoder.encode([text]), atol=1e-4)
