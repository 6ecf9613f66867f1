"""`export.py --to onnx`: ONNX Runtime and `tokenizers` alone give our vectors, and every fault is named.

Skipped without the packages of requirements-extras.txt. The model is made and run in this process, but for the tests marked slow.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import make_run
from exported import CONTRACTS, QUERY, TOKEN_FAULTS, Exported, assert_named, with_truncation

import export
from encoder import Encoder
from files.console import InputError
from serving import onnx_folder, runtimes
from serving.folder import pooling_modules

for package in onnx_folder.PACKAGES:
    pytest.importorskip(package)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch, tmp_path, request):
    if request.node.get_closest_marker("slow"):
        return

    from serving import onnx_converter, onnx_worker

    def vectors(folder: Path, texts: list[str]) -> dict[str, np.ndarray]:
        given, out = tmp_path / "texts.json", tmp_path / "arrays.npz"
        given.write_text(json.dumps(texts))
        onnx_worker.main(str(folder), str(given), str(out))
        with np.load(out) as arrays:
            return dict(arrays)

    def convert(source: Path, out: Path) -> None:
        onnx_converter.main(str(source), str(out), str(int((source / "contract_pooling.py").exists())))

    monkeypatch.setattr(runtimes, "onnx_vectors", vectors)
    monkeypatch.setattr(onnx_folder, "convert", convert)


def exported_folder(run: str, folder: Path, dtype: str = "float32", **contract) -> Exported:
    return Exported(run, folder, dtype, onnx_folder.write_onnx_folder, lambda *given: runtimes.onnx_vectors(*given), **contract)


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda c: " ".join(map(str, c.values())))
def test_every_contract_gives_our_vectors(llama, tmp_path, contract):
    assert min(exported_folder(make_run(llama, tmp_path / "run", **contract), tmp_path / "out").verify()) > 1 - 1e-5


@pytest.mark.parametrize("architecture", ["mistral", "qwen3", "gemma3", "gpt-neox"])
def test_every_class_gives_our_vectors(models_dir, tmp_path, architecture):
    """Past the sliding windows of those that have one; without BOS where the class has none."""
    source = make_run(models_dir[architecture], tmp_path / "run", prompt="cluster", pooling="position-mean", scope="all")
    assert min(exported_folder(source, tmp_path / "out").verify()) > 1 - 1e-5


def test_half_precision(llama, tmp_path):
    source = make_run(llama, tmp_path / "run", prompt="cluster", pooling="mean")
    assert 1 - 1e-3 < min(exported_folder(source, tmp_path / "out", "float16").verify()) < 1 - 1e-9


def test_the_folder_is_read_by_the_lines_of_its_card(llama, tmp_path, capsys, monkeypatch):
    source = make_run(llama, tmp_path / "run", prompt="cluster", query_prompt=QUERY, pooling="last", max_tokens=20)
    monkeypatch.chdir(tmp_path)
    export.main(export.build_parser().parse_args([source, "--to", "onnx", "--out", "out"]))
    out, said = tmp_path / "out", capsys.readouterr().out
    files = {"model.onnx", "tokenizer.json", "embedding.json", "verification.json", "README.md"}
    assert {path.name for path in out.iterdir()} == {*files, "query"} and {path.name for path in (out / "query").iterdir()} == files
    assert (out / "model.onnx").stat().st_ino == (out / "query" / "model.onnx").stat().st_ino
    assert said.count("ONNX Runtime, float32, ") == 4 and "(needs 0.999)" in said
    encoder, texts = Encoder.load(source, dtype="float32"), ["a cat", "the bank raised its rates " * 20]
    for role, folder in (("document", out), ("query", out / "query")):
        code = re.search(r"```\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL).group(1)
        exec(code, scope := {"texts": texts})
        np.testing.assert_allclose(scope["vectors"], encoder.encode(texts, role), atol=1e-5)


def test_queries_have_a_graph_of_their_own_where_it_counts_their_prompt(llama, tmp_path):
    source = make_run(llama, tmp_path / "run", prompt="cluster", query_prompt=QUERY, pooling="mean", scope="text")
    exported = exported_folder(source, tmp_path / "out")
    encoder = exported.truth.encoder
    documents, queries = (pooling_modules(encoder.contract, r, 32, encoder.prompt_tokenizer.around(r)) for r in ("document", "query"))
    assert documents != queries and min(exported.verify()) > 1 - 1e-5


def test_large_weights_lie_beside_the_graph(llama, tmp_path, monkeypatch):
    monkeypatch.setattr("serving.onnx_converter.ONE_FILE_BYTES", 1000)
    source = make_run(llama, tmp_path / "run", prompt="cluster", query_prompt=QUERY, pooling="last")
    exported = exported_folder(source, tmp_path / "out")
    assert (tmp_path / "out" / "model.onnx.data").stat().st_size > 50_000 > (tmp_path / "out" / "model.onnx").stat().st_size / 10
    assert (tmp_path / "out" / "query" / "model.onnx.data").is_file() and min(exported.verify()) > 1 - 1e-5


# ------------------------------------------------------------------------------------------------------------- faults


def with_other(name: str, **contract):
    """The same folder with the model of another contract, or of the base alone."""

    def change(exported: Exported) -> None:
        source = exported.truth.encoder
        spec = source.source if name == "base" else exported.run
        kept = {"prompt": "cluster", "query_prompt": QUERY, "max_tokens": 60} if name == "base" else {"override_contract": True}
        encoder = Encoder.load(spec, dtype="float32", **({"pooling": "last"} | kept | contract))
        encoder.merge()
        onnx_folder.write_onnx_folder(encoder, exported.folder.with_name("other"), "float32")
        shutil.copy(exported.folder.with_name("other") / "model.onnx", exported.folder)

    return change


FAULTS = {
    **TOKEN_FAULTS,
    "low limit": (with_truncation(45), "cut: long texts are cut at another limit"),
    "adapter": (with_other("base"), "weights: they are those of the untuned base"),
    "pooling": (with_other("run", pooling="mean", scope="all", keep_bos=True), "pooling: it is mean over all tokens"),
    "normalization": (with_other("run", normalize=False), "normalization: vectors are"),
}


@pytest.fixture(scope="module")
def faultless(models_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")
    contract = {"prompt": "cluster", "query_prompt": QUERY, "pooling": "last", "max_tokens": 60}
    return make_run(models_dir["llama"], folder / "run", **contract)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(faultless, tmp_path, fault):
    """Both by the folder's tokenizer, where it is one of tokens, and by the runtime's vectors alone."""
    inject, name = FAULTS[fault]
    exported = exported_folder(faultless, tmp_path / "out")
    assert_named(exported, inject, name)


def test_bfloat16_is_refused(llama, tmp_path):
    with pytest.raises(InputError, match="--merge-dtype bfloat16: ONNX Runtime does not compute in it on a CPU, take float32 or float16"):
        export.main(export.build_parser().parse_args([llama, "--to", "onnx", "--merge-dtype", "bfloat16", "--out", str(tmp_path / "out")]))


@pytest.mark.slow
def test_the_folder_is_made_and_verified_in_fresh_processes(llama, tmp_path):
    source = make_run(llama, tmp_path / "run", prompt="cluster", pooling="position-mean", scope="text")
    command = [sys.executable, ROOT / "export.py", source, "--to", "onnx", "--out", tmp_path / "out"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.count("ONNX Runtime, float32, ") == 2, done.stderr
    assert not done.stderr and [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    (tmp_path / "out" / "model.onnx").write_bytes(b"no model")
    with pytest.raises(runtimes.RuntimeFailed, match=r"ONNX Runtime cannot run .*out: .*"):
        runtimes.onnx_vectors(tmp_path / "out", ["a"])


@pytest.mark.slow
def test_the_worker_needs_neither_torch_nor_transformers(tmp_path):
    program = "import sys; sys.modules |= dict.fromkeys(('torch', 'transformers', 'sentence_transformers')); import serving.onnx_worker"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
