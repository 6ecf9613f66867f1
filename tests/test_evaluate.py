"""evaluate.py as a whole: its flags, its errors, several processes."""

import json
import os
import runpy
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_run
from launch import torchrun
from short_evaluations import (
    choose,
    labelled,
    offline,  # noqa: F401, a fixture that every test uses
    run,
    write_csv,
)
from transformers import BertConfig

import attention
from encoder import Encoder, base_models
from evaluation import scores
from files.console import InputError

ROOT = Path(__file__).resolve().parent.parent


def test_errors_in_the_flags_come_before_anything_is_scored(llama, tmp_path, capsys):
    path = labelled(tmp_path / "mine.csv")
    model = make_run(llama, tmp_path / "runs" / "mine", prompt="cluster")
    for flags, message in (
        (("--model", "tiny", "typo"), "no model 'typo'"),
        (("--model", "tiny", model, "--pooling", "mean"), "pooling is 'last'"),
        (("--model", "tiny", model, "--layers", "-2"), "layers is"),
        (("--model", "tiny", "--prompt", "clutser"), "unknown prompt"),
        (("--model", "tiny", "--keep-bos"), "--keep-bos works with --scope all"),
        (("--model", "tiny", "--dtype", "float8"), "unknown dtype 'float8': take auto, float32, bfloat16, float16"),
        (("--model", "tiny", "--dims", "0"), "--dims must be 1 or more, not 0"),
        (("--model", "tiny", "--query-prompt", "none"), "give --prompt as well"),
        (("--model", "tiny", model, "--prompt", "none", "classify"), r"^prompt is 'cluster' in \S*mine, \['none', 'classify'\] were"),
    ):
        with pytest.raises(InputError, match=message):
            run("--data", path, *flags)
        assert "v_measure" not in capsys.readouterr().err


def test_what_a_config_shows_is_said_before_anything_is_scored(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(scores, "score", lambda *_: pytest.fail("a model was scored"))
    path, base = labelled(tmp_path / "mine.csv"), shutil.copytree(llama, tmp_path / "base")
    trained = make_run(str(base), tmp_path / "run")
    BertConfig().save_pretrained(base)
    for spec in (base, trained):
        with pytest.raises(InputError, match="of type 'bert', no decoder"):
            run("--data", path, "--model", llama, spec)


def test_empty_and_truncated_texts_are_scored_with_one_warning_each(llama, tmp_path, capsys):
    path = labelled(tmp_path / "mine.csv")
    path.write_text(path.read_text() + ",animal\n" + "word " * 40 + ",money\n")
    run("--data", path, "--model", llama, "--prompt", "cluster", "--pooling", "mean", "last", "--max-tokens", 30)
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
    assert warnings == ["warning: 1 empty text was embedded as the prompt alone", "warning: 1 text was truncated to 30 tokens"]


def test_an_error_is_one_line_and_status_2(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--data", "no.csv", "--model", "tiny"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "evaluate.py"), run_name="__main__")
    assert (end.value.code, capsys.readouterr().err) == (2, "evaluate.py: no file or folder no.csv\n")


@pytest.mark.parametrize(
    "script, flags, status, message",
    [
        ("evaluate.py", ("--model", "typo"), 2, "evaluate.py: no model 'typo'"),
        ("evaluate.py", ("--model", "tiny", "--data", "no.csv"), 2, "evaluate.py: no file or folder no.csv"),
        ("evaluate.py", ("--model", "tiny", "--out", "."), 2, "evaluate.py: --out . is a folder"),
        ("evaluate.py", ("--model", "tiny", "--bundled"), 130, ""),
        ("attention.py", ("--text", "a", "--model", "typo"), 2, "attention.py: no model 'typo'"),
        ("attention.py", ("--model", "tiny"), 2, "attention.py: no text"),
        ("search.py", ("--model", "tiny", "--input", "no.csv", "--query", "a"), 2, "search.py: no file no.csv"),
        ("attention.py", ("--model", "tiny", "--text", "a", "--out", "new"), 130, ""),
    ],
)
def test_errors_come_before_the_slow_imports_and_ctrl_c_during_these_is_quiet(tmp_path, script, flags, status, message):
    for package in ("torch", "mteb", "transformers"):
        (tmp_path / f"{package}.py").write_text("raise KeyboardInterrupt\n")
    process = subprocess.run(
        [sys.executable, ROOT / script, *flags],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (process.returncode, process.stdout) == (status, "")
    assert process.stderr.startswith(message) and process.stderr.count("\n") == (status == 2)


def test_local_models_and_data_never_ask_the_network(llama, tmp_path, monkeypatch):
    """Whatever the environment says: neither this project nor the libraries behind it."""
    import datasets.config
    import huggingface_hub.constants

    def refuse(*_, **__):
        pytest.fail("the network was asked")

    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    for module in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    for owner, name in ((base_models, "hub_answers"), (socket, "getaddrinfo"), (socket.socket, "connect")):
        monkeypatch.setattr(owner, name, refuse)
    model = make_run(llama, tmp_path / "mine", prompt="cluster")
    assert Encoder.load("tiny").encode(["a"]).shape == (1, 384)
    run(
        "--data",
        labelled(tmp_path / "mine.csv"),
        "--model",
        "tiny",
        llama,
        model,
        "--prompt",
        "none",
        "--pooling",
        "mean",
        "--override-contract",
    )
    run("--task", "docstrings-by-module", "--model", llama)
    assert len(choose("--bundled")) == 2
    attention.main(attention.build_parser().parse_args(["--model", model, "--text", "a", "--out", str(tmp_path / "out")]))


def test_a_second_process_prints_and_writes_nothing(llama, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    path, out, streams = labelled(tmp_path / "mine.csv", 6), tmp_path / "r.json", (sys.stdout, sys.stderr)
    path.write_text(path.read_text() + ",animal\n")
    run("--data", path, "--model", llama, "--out", out)
    assert capsys.readouterr() == ("", "") and not out.exists()
    assert (sys.stdout, sys.stderr) == streams  # an error after this can still be seen


@pytest.mark.slow
def test_two_processes_print_one_table_with_the_scores_of_one(llama, tmp_path):
    words = ["cat", "dog", "car", "road", "bank", "rate", "fee"]
    pairs = [(f"the {words[i % 7]} and the {words[i % 5]} {i}", f"a {words[i % 3]} {i * i}", i % 6) for i in range(240)]  # two batches
    flags = ("--data", write_csv(tmp_path / "sts.csv", "text1,text2,score", pairs), "--model", llama, "--prompt", "none", "cluster")
    run(*flags, "--out", tmp_path / "one.json")
    process = torchrun("evaluate.py", *flags, "--out", tmp_path / "two.json")
    assert process.returncode == 0, process.stderr
    one, two = (json.loads((tmp_path / f"{name}.json").read_text())["results"] for name in ("one", "two"))
    assert [cell["fingerprint"] for cell in two] == [cell["fingerprint"] for cell in one]
    assert [cell["score"] for cell in two] == pytest.approx([cell["score"] for cell in one], abs=1e-4)
    assert [line.split()[0] for line in process.stdout.splitlines()].count("model") == 1
    assert process.stdout.count(one[0]["fingerprint"]) == 1 and process.stdout.count("2 scores") == 1
    assert process.stderr.count("sts, llama, none, mean: cosine_spearman") == 1


FAILS_IN_THE_SECOND_PROCESS = """
import os
import evaluate
from files.console import run_script

def fail(*args):
    raise RuntimeError("this process alone failed")

if os.environ["RANK"] == "1":
    evaluate.check_model = fail
run_script(lambda: evaluate.main(evaluate.build_parser().parse_args()))
"""


@pytest.mark.slow
def test_an_error_in_the_second_process_alone_is_visible(llama, tmp_path):
    script = tmp_path / "fails.py"
    script.write_text(FAILS_IN_THE_SECOND_PROCESS)
    process = torchrun(script, "--data", labelled(tmp_path / "mine.csv"), "--model", llama)
    assert process.returncode != 0
    assert "Traceback" in process.stderr and "RuntimeError: this process alone failed" in process.stderr
