"""`export.py`: the exported folder gives our vectors, what cannot be expressed is refused, and every fault is named."""

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_run, randomize_adapter
from exported import CONTRACTS, QUERY, TOKEN_FAULTS, Exported, assert_named, edit_json
from safetensors.torch import load_file, save_file

import export
from encoder import Encoder
from encoder.contract import Contract
from files.console import InputError
from serving import folder as folders
from serving import runtimes, verification
from serving.card import how_to_load, licence_of_base, score_facts
from serving.folder import check_expressible, runtimes_for, write_folder
from serving.verification import Truth, VerificationFailed, cosines, embed_sequences, known_fault, sample_texts, token_faults

ROOT = Path(__file__).resolve().parent.parent
WORKER = runtimes.sentence_transformers_vectors  # in a fresh process


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """sentence-transformers takes seconds to import: only the tests of fresh processes start some."""
    from sentence_transformers import SentenceTransformer

    def vectors(folder: Path, texts: list[str]) -> dict[str, np.ndarray]:
        model = SentenceTransformer(str(folder), device="cpu", trust_remote_code=(folder / "contract_pooling.py").exists())
        return {"one at a time": np.concatenate([model.encode([text]) for text in texts]), "in batches": model.encode(texts, batch_size=8)}

    monkeypatch.setattr(runtimes, "sentence_transformers_vectors", vectors)


def run(*flags) -> None:
    export.main(export.build_parser().parse_args([str(flag) for flag in flags]))


def exported_folder(run: str, folder: Path, dtype: str = "float32", **contract) -> Exported:
    return Exported(run, folder, dtype, write_folder, lambda *given: runtimes.sentence_transformers_vectors(*given), **contract)


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda c: " ".join(map(str, c.values())))
def test_an_exported_folder_gives_our_vectors(model, tmp_path, contract):
    exported = exported_folder(make_run(model, tmp_path / "run", **contract), tmp_path / "out")
    assert min(exported.verify()) > 1 - 1e-5


def test_a_folder_holds_what_it_promises(llama, tmp_path, capsys):
    source = make_run(llama, tmp_path / "run", prompt="cluster", query_prompt=QUERY, pooling="last", max_tokens=20)
    run(source, "--out", tmp_path / "out", "--merge-dtype", "bfloat16")
    said = capsys.readouterr().out
    assert "document, our encoder, adapter merged, float32: smallest cosine 1.0" in said and "query, sentence-transformers" in said
    out, query = tmp_path / "out", tmp_path / "out" / "query"
    assert (out / "model.safetensors").stat().st_ino == (query / "model.safetensors").stat().st_ino
    assert load_file(out / "model.safetensors")["embed_tokens.weight"].dtype == torch.bfloat16
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert Contract.read(out) == Contract.read(source)
    record = json.loads((out / "verification.json").read_text())
    assert len(record["texts"]) == 32 and {check["role"] for check in record["checks"]} == {"query", "document"}
    card = (out / "README.md").read_text()
    assert "SentenceTransformer" in card and "trust_remote_code" not in card and "folder `query/`" in card
    assert f'SentenceTransformer("{out}")' in said and not (out / "contract_pooling.py").exists()
    assert not list(tmp_path.glob(".*"))


def test_the_weights_keep_the_dtype_of_the_base(llama, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(llama, base)
    save_file({name: w.half() for name, w in load_file(base / "model.safetensors").items()}, base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text()) | {"dtype": "float16"}
    (base / "config.json").write_text(json.dumps(config))
    run(base, "--prompt", "cluster", "--out", tmp_path / "out", "--no-verify")
    assert load_file(tmp_path / "out" / "model.safetensors")["norm.weight"].dtype == torch.float16


def test_vectors_are_cut_to_what_the_run_was_trained_for(llama, tmp_path):
    source = make_run(llama, tmp_path / "run", prompt="cluster", pooling="last")
    (tmp_path / "run" / "arguments.json").write_text(json.dumps({"arguments": {"matryoshka": [8, 16]}}))
    run(source, "--out", tmp_path / "out", "--dims", 16, "--no-verify")
    assert Contract.read(tmp_path / "out").dims == 16
    with pytest.raises(InputError, match=r"--dims 7: this run was trained for 8, 16 numbers: leave the flag out"):
        run(source, "--out", tmp_path / "seven", "--dims", 7)


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("contract", "runtime", "message"),
    [
        ({"pooling": "attention"}, "sentence-transformers", "cannot serve pooling attention: it has poolings mean, last, position-mean"),
        ({"pooling": "mean", "layers": (-2,)}, "sentence-transformers", r"cannot serve layers -2: it has the last layer"),
        ({"pooling": "mean", "attention": "bidirectional"}, "vllm", "cannot serve bidirectional attention"),
        (
            {"pooling": "position-mean", "scope": "all"},
            "vllm",
            "it has last and mean over all tokens; sentence-transformers and onnx can serve",
        ),
        ({"pooling": "mean", "scope": "text"}, "tei", "cannot serve pooling mean over some of the tokens"),
    ],
)
def test_what_a_runtime_cannot_express_is_refused(llama, contract, runtime, message):
    contract = Encoder.load(llama, prompt="cluster", **contract).contract
    assert runtime not in runtimes_for(contract)
    with pytest.raises(InputError, match=message):
        check_expressible(contract, runtime)


def test_bad_arguments(llama, tmp_path, monkeypatch):
    source = make_run(llama, tmp_path / "run", prompt="cluster", pooling="last")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    before = sorted(tmp_path.rglob("*"))
    for flags, message in (
        ((source, "--out", tmp_path / "full"), "full exists already"),
        ((source, "--prompt", "none", "--out", tmp_path / "new"), "--prompt: a run is exported under the contract"),
        ((source, "--vllm-python", sys.executable, "--out", tmp_path / "new"), "takes part in the verification of --to vllm"),
        ((source, "--to", "vllm", "--vllm-python", "no-python", "--out", tmp_path / "new"), "--vllm-python no-python: no such program"),
        ((tmp_path / "none", "--out", tmp_path / "new"), "no model"),
        ((source, "--dims", 7, "--out", tmp_path / "new"), "--dims 7: this run was trained for whole vectors, without --matryoshka"),
        ((source, "--to", "vllm", "--vllm-python", "/bin/false", "--out", tmp_path / "new"), "/bin/false: this is no Python that runs"),
        ((source, "--to", "vllm", "--vllm-python", sys.executable, "--out", tmp_path / "new"), "python.*: no vllm there: install"),
    ):
        with pytest.raises(InputError, match=message):
            run(*flags)
        assert sorted(tmp_path.rglob("*")) == before

    def fails(*_):
        raise runtimes.RuntimeFailed("it does not start")

    monkeypatch.setattr(runtimes, "sentence_transformers_vectors", fails)
    with pytest.raises(InputError, match="it does not start"):
        run(source, "--out", tmp_path / "new")
    assert sorted(tmp_path.rglob("*")) == before


# ------------------------------------------------------------------------------------------------------------- faults


def without_adapter(exported: Exported) -> None:
    base = load_file(Path(exported.truth.encoder.source) / "model.safetensors")
    weights = {name.removeprefix("model."): w for name, w in base.items() if name.startswith("model.")}
    save_file(weights, exported.folder / "model.safetensors", {"format": "pt"})


def with_mean(exported: Exported) -> None:
    def change(config):
        config |= {"pooling_mode_lasttoken": False, "pooling_mode_mean_tokens": True}

    edit_json(exported.folder / "1_Pooling" / "config.json", change)


def without_normalization(exported: Exported) -> None:
    edit_json(exported.folder / "modules.json", lambda modules: [m for m in modules if not m["type"].endswith("Normalize")])


def with_limit(limit: int):
    def change(exported: Exported) -> None:
        for name, key in (("sentence_bert_config.json", "max_seq_length"), ("tokenizer_config.json", "model_max_length")):
            edit_json(exported.folder / name, lambda config, key=key: config | {key: limit})

    return change


FAULTS = {
    **TOKEN_FAULTS,
    "adapter": (without_adapter, "weights: they are those of the untuned base"),
    "pooling": (with_mean, "pooling: it is mean over all tokens"),
    "normalization": (without_normalization, "normalization: vectors are"),
    "low limit": (with_limit(45), "cut: long texts are cut at another limit"),
    "high limit": (with_limit(150), "cut: long texts are cut at another limit"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(llama, tmp_path, fault):
    """Both by the folder's tokenizer, where it is one of tokens, and by the runtime's vectors alone."""
    inject, name = FAULTS[fault]
    source = make_run(llama, tmp_path / "run", prompt="cluster", query_prompt=QUERY, pooling="last", max_tokens=60)
    exported = exported_folder(source, tmp_path / "out")
    assert min(exported.verify()) > 1 - 1e-5
    assert_named(exported, inject, name)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])  # with BOS, and without
def test_every_known_fault_is_told_from_the_others(models_dir, tmp_path, architecture):
    contract = {"prompt": "cluster", "query_prompt": QUERY, "pooling": "last", "max_tokens": 60, "eos": True}
    encoder = Encoder.load(make_run(models_dir[architecture], tmp_path / "run", **contract), dtype="float32")
    encoder.tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    texts, names = sample_texts(encoder), []
    assert any(len(ids) > 60 for ids in encoder.tokenizer(texts)["input_ids"])
    for name, sequences in token_faults(encoder, "document", texts):
        vectors = embed_sequences(encoder, sequences)
        assert known_fault(encoder, "document", texts, vectors, None, verification.SAME) == name
        names.append(name)
    parts = {name.partition(":")[0] for name in names}
    assert parts == {"prompt", "BOS", "EOS", "cut"} and len(names) >= 11


def test_half_precision_of_a_large_adapter_is_noticed(llama, tmp_path):
    encoder = Encoder.load(llama, prompt="cluster", pooling="last", max_tokens=60)
    torch.manual_seed(0)
    encoder.add_adapter(4)
    randomize_adapter(encoder, 1.0)
    encoder.save(tmp_path / "run")
    assert min(exported_folder(str(tmp_path / "run"), tmp_path / "exact").verify()) > 1 - 1e-4
    with pytest.raises(VerificationFailed, match="bfloat16 may be too coarse for this adapter"):
        exported_folder(str(tmp_path / "run"), tmp_path / "half", "bfloat16").verify()


def test_an_adapter_that_changes_nothing_is_refused(llama, tmp_path):
    encoder = Encoder.load(llama, prompt="cluster")
    encoder.add_adapter(4)
    encoder.save(tmp_path / "run")
    with pytest.raises(VerificationFailed, match="the adapter changes nothing"):
        run(tmp_path / "run", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["short", "limit"])
def test_what_no_known_fault_explains_is_said_as_far_as_it_is_known(llama, name):
    truth = Truth(Encoder.load(llama, prompt="cluster"), ["document"])
    vectors = truth.vectors["document"].copy()
    wrong = [5, 7] if name == "short" else [-1, -2]
    vectors[wrong] = vectors[wrong][:, ::-1]
    message = "tokens: 2 of 32 texts differ, the first is 'a cat sleeps" if name == "short" else "cut: long texts are cut at another limit"
    with pytest.raises(VerificationFailed, match=message):
        truth.check("document", "a server", vectors, "float32")
    with pytest.raises(VerificationFailed, match="weights: every text differs"):
        truth.check("document", "a server", -truth.vectors["document"], "float32")


def test_a_failed_verification_leaves_nothing(llama, tmp_path, monkeypatch):
    source = make_run(llama, tmp_path / "run", prompt="cluster", pooling="last")
    monkeypatch.setattr(folders, "BUILT_IN", {"last": "mean"})
    with pytest.raises(VerificationFailed, match=r"document, sentence-transformers.*pooling: it is mean over all tokens"):
        run(source, "--out", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_runtime_may_refuse_empty_texts_alone(llama):
    truth = Truth(Encoder.load(llama, prompt="cluster"), ["document"])
    vectors = truth.vectors["document"].copy()
    vectors[0] = np.nan
    check = truth.check("document", "a server", vectors, "float32")
    assert check.n_refused == 1 and check.line().endswith("smallest cosine 1.000000 (needs 0.999), 1 empty text refused")
    vectors[4] = np.nan
    with pytest.raises(VerificationFailed, match="a server: 1 texts are refused, the first is 'Cat'"):
        truth.check("document", "a server", vectors, "float32")


def test_cosines_of_zeros():
    a, b = np.array([[0.0, 0], [3, 0], [0, 1]]), np.array([[0.0, 0], [1, 0], [0, 0]])
    assert cosines(a, b).tolist() == [1, 1, 0]


def test_the_commands_that_serve_a_folder(llama):
    encoder = Encoder.load(llama, prompt="cluster", pooling="last", max_tokens=60)
    limit = folders.token_limit(encoder, "document")
    assert how_to_load("vllm", encoder, "document", "my folder", "float32") == (
        f"vllm serve 'my folder' --runner pooling --dtype float32 --max-model-len {limit}"
    )
    assert "--pooling last-token" in how_to_load("tei", encoder, "document", "out", "float16")
    skipped = encoder.with_contract(pooling="mean")
    assert how_to_load("sentence-transformers", skipped, "document", "out", "float32").startswith('SentenceTransformer("out", trust_remote')


class FakeServer:
    """What vLLM's server answers, in this process: it refuses the text "" and gives each text its length."""

    def __init__(self):
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append(body)
                if "" in body["input"]:
                    self.send_response(400)
                    self.end_headers()
                    return
                rows = [{"index": i, "embedding": [float(len(text)), 1.0]} for i, text in enumerate(body["input"])]
                self.send_response(200)
                self.end_headers()
                self.wfile.write(json.dumps({"data": rows[::-1]}).encode())

            def log_message(self, *_):
                pass

        self.asked = []
        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"


def test_vectors_of_vllm_come_in_order_and_refused_texts_are_nan(monkeypatch, tmp_path):
    fake = FakeServer()
    monkeypatch.setattr(runtimes, "vllm_server", lambda *_: contextlib.nullcontext(fake.url))
    vectors = runtimes.vllm_vectors("python", tmp_path, ["abc", "", *("x" * n for n in range(1, 12))], "float32", 9)
    fake.server.shutdown()
    for way in ("one at a time", "in batches"):
        assert np.isnan(vectors[way][1]).all() and vectors[way][[0, *range(2, 13)], 0].tolist() == [3, *range(1, 12)]
    assert all(body["truncate_prompt_tokens"] == -1 for body in fake.asked) and len(fake.asked) == 13 + 2


@pytest.mark.parametrize(
    ("program", "seconds", "message"),
    [
        ("import sys; sys.exit('ValueError: no such pooling')", 60, "ValueError: no such pooling"),
        ("print('WARNING this may cause OSError: too many files')", 60, "it did not answer$"),
        ("import time; time.sleep(60)", 0, "it did not answer within 0 seconds"),
    ],
)
def test_a_server_that_does_not_start_is_one_line(monkeypatch, tmp_path, program, seconds, message):
    monkeypatch.setattr(runtimes, "START_SECONDS", seconds)
    script = tmp_path / "python"
    script.write_text(f"#!{sys.executable}\n{program}\n")
    script.chmod(0o755)
    with pytest.raises(runtimes.RuntimeFailed, match=f"vLLM cannot serve .*: {message}"):
        runtimes.vllm_vectors(str(script), tmp_path, ["a"], "float32", 9)


@pytest.mark.slow
def test_the_folder_is_verified_in_a_fresh_process(llama, tmp_path):
    source = make_run(llama, tmp_path / "run", prompt="cluster", pooling="position-mean", scope="all")
    command = [sys.executable, ROOT / "export.py", source, "--out", tmp_path / "out"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.count("sentence-transformers, float32, ") == 2, done.stderr
    assert (tmp_path / "out" / "contract_pooling.py").is_file() and "trust_remote_code=True" in done.stdout
    edit_json(tmp_path / "out" / "1_Pooling" / "config.json", lambda config: config | {"pooling": "no such"} | {"unknown": 1})
    with pytest.raises(runtimes.RuntimeFailed, match="sentence-transformers cannot load"):
        WORKER(tmp_path / "out", ["a"])


# ------------------------------------------------------------------------------------------- what is left, what is said


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_quantized_base_is_refused_by_every_runtime(llama, quantize):
    contract = replace(Encoder.load(llama, prompt="cluster", pooling="last").contract, quantize=quantize)
    assert not runtimes_for(contract)
    for runtime in folders.RUNTIMES:
        with pytest.raises(
            InputError, match=f"{runtime} cannot serve a base in {quantize}, .*: it has runs on a base that is not quantized$"
        ):
            check_expressible(contract, runtime)


def test_what_a_killed_export_left_goes_with_the_next_one(llama, tmp_path):
    """Of the same folder alone, and not while the other process runs."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    gone = tmp_path / f".out.{dead.pid}.tmp"
    kept = [tmp_path / name for name in (f".out.{os.getppid()}.tmp", f".other.{dead.pid}.tmp", f".out.more.{dead.pid}.tmp", ".out.x.tmp")]
    for folder in (gone, *kept):
        (folder / "query").mkdir(parents=True)
    run(llama, "--prompt", "cluster", "--out", tmp_path / "out", "--no-verify")
    assert not gone.exists() and all(folder.exists() for folder in kept)


def test_the_card_says_scores_and_licence(llama, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(llama, base)
    source = make_run(str(base), tmp_path / "run", prompt="cluster", pooling="last")
    against = {"against": "its base", "ratio": 1.256, "low": 1.1, "high": 1.4, "verdict": "better"}
    summary = {"validation": {"what": "V-measure", "best": 0.7, "kept": 0.6543}, "without_labels": against}
    (Path(source) / "summary.json").write_text(json.dumps(summary))
    run(source, "--out", tmp_path / "plain", "--no-verify")
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A base\n")
    run(source, "--out", tmp_path / "out", "--no-verify")
    card, plain = ((tmp_path / name / "README.md").read_text() for name in ("out", "plain"))
    assert "Validation during training: V-measure 0.654." in card
    assert "Against its base, measured without labels: better (ratio 1.26, 95 % interval 1.10 to 1.40)." in card
    (Path(source) / "summary.json").write_text(json.dumps({"without_labels": against | {"against": "runs/first"}}))
    assert score_facts(source) == [
        "Against the run that training went on with, measured without labels: better (ratio 1.26, 95 % interval 1.10 to 1.40)."
    ]
    assert "\nlicense: apache-2.0\n" in card and "The base's licence is apache-2.0" in card
    assert "license:" not in plain and "The licence is that of the base and of the data." in plain


@pytest.mark.parametrize("header", ["---\nlicense: [broken\n---\n", "---\n- a list\n---\n", "no header", "---\nlicense: 3\n---\n"])
def test_a_base_without_a_readable_licence_has_none(llama, tmp_path, header):
    shutil.copytree(llama, tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text(header)
    assert licence_of_base(Encoder.load(str(tmp_path / "base"))) is None


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_one_line_before_anything_is_loaded(tmp_path, monkeypatch, missing):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == missing else object())
    with pytest.raises(InputError, match=rf"^--to onnx needs the package {missing}: pip install -r requirements-extras.txt$"):
        run(tmp_path / "no model", "--to", "onnx", "--out", tmp_path / "out")
    assert not list(tmp_path.iterdir())
