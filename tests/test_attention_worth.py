"""attention.py with second opinions, interventions and V-measure: its files and lines, on small random models."""

import json

import numpy as np
import pytest
from conftest import make_run

import attention
from attention_analysis.received import received_attention
from attention_analysis.stored import read_corpus, read_texts
from encoder import Encoder
from encoder.names import KEPT_FOLDER
from evaluation import evidence
from files.console import InputError

WORDS = {"cat": ("The cat sat on the mat", "a cat is on that mat"), "bank": ("The bank raised its rates", "interest and fees of a bank")}


def run(*flags) -> None:
    attention.main(attention.build_parser().parse_args([str(f) for f in flags]))


@pytest.fixture
def labelled(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "SEEDS", 3)  # of k-means: what is tested here are files and lines
    monkeypatch.setattr(evidence, "SPLITS", 2)
    rows = [{"text": f"{WORDS[label][i % 2]} {i}", "label": label} for i in range(15) for label in WORDS]
    (tmp_path / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "labelled.jsonl"


def test_second_opinions_stand_beside_the_attention(llama, tmp_path, capsys):
    model = make_run(llama, tmp_path / "mine", prompt="cluster", pooling="last")
    texts = ["The cat sat on the mat.", "A bank."]
    flags = [flag for text in texts for flag in ("--text", text)]
    run("--model", model, *flags, "--also", "received", "rollout", "gradient", "--pictures", 0, "--out", tmp_path / "out")
    printed = capsys.readouterr().out
    assert "rollout: attention rollout (Abnar and Zuidema 2020)" in printed and "gradient: gradient x input of the cosine" in printed
    stored = read_texts(tmp_path / "out")
    assert list(stored.about["also"]) == ["received", "rollout", "gradient"]
    with np.load(tmp_path / "out" / "attention.npz") as arrays:
        assert arrays["received"].shape == arrays["weights"].shape and arrays["rollout"].shape == arrays["gradient"].shape
        np.testing.assert_allclose(np.add.reduceat(arrays["rollout"], stored.starts[:-1], 1), 1, atol=1e-5)
        encoder = Encoder.load(model)
        for side, of_side in zip((encoder.untuned(), encoder), arrays["received"], strict=True):
            np.testing.assert_array_equal(of_side, np.concatenate(received_attention(side, texts)))


def test_v_measure_and_what_hiding_costs(llama, tmp_path, labelled, capsys):
    models = [make_run(llama, tmp_path / f"seed{i}", seed=i, prompt="cluster", pooling="last") for i in range(3)]
    for i in range(3):
        make_run(llama, tmp_path / f"seed{i}" / KEPT_FOLDER / "step-000010", seed=10 + i, prompt="cluster", pooling="last")
    flags = ("--v-measure", "--mask", "content", "prefix", "--mask-layers", 2, 3)
    run("--model", *models, "--data", labelled, *flags, "--out", tmp_path / "out")
    printed = capsys.readouterr().out
    assert "within runs, over base and adapters, BOS left out" in printed and "between runs, over final adapters, all tokens" in printed
    assert "less as many others" in printed and "layers 2 to 3" in printed
    about = read_corpus(tmp_path / "out").about
    assert len(about["v_measure"]) == len(about["models"]) == 7 and all(0 <= score <= 1 for score in about["v_measure"])
    assert [row["bos"] for row in about["effects"]] == [True, False] and about["effects"][0]["within"]["n_runs"] == 3
    assert [len(row["costs"]) for row in about["costs"]] == [2] * 4
    content, prefix = about["costs"][0]["costs"]
    assert content["n_hidden"] > 1 and prefix["less_all"]["interval"][0] <= prefix["less_all"]["difference"]


def test_vectors_are_the_same_after_looking(llama, tmp_path, labelled):
    model = make_run(llama, tmp_path / "mine", prompt="cluster", pooling="last")
    before = Encoder.load(model).encode(["The cat sat."])
    run("--model", model, "--data", labelled, "--mask", "bos", "--out", tmp_path / "out")
    assert np.array_equal(Encoder.load(model).encode(["The cat sat."]), before)


def test_bad_input(llama, tmp_path, labelled):
    mean = make_run(llama, tmp_path / "mean", prompt="cluster", pooling="mean")
    bare, one = tmp_path / "bare.txt", tmp_path / "one.jsonl"
    bare.write_text("a text\n" * 30)
    one.write_text('{"text": "a", "label": "x"}\n' * 30)
    for flags, message in (
        (("--text", "a", "--mask", "content"), "need labelled texts: give --data"),
        (("--text", "a", "--v-measure"), "need labelled texts: give --data"),
        (("--data", labelled, "--also", "rollout"), "--also shows single texts"),
        (("--data", labelled, "--mask-layers", 1, 2), "in which --mask hides"),
        (("--data", labelled, "--mask", "bos", "--mask-layers", 3, 2), "takes the first and the last layer"),
        (("--data", labelled, "--mask", "bos", "--mask-layers", 2, 9), "this model has layers 1 to 3"),
        (("--data", bare, "--v-measure"), "need columns text,label"),
        (("--data", one, "--v-measure"), "V-measure needs two labels or more, and fewer than texts; 30 texts have 1"),
        (("--data", labelled, "--mask", "bos", "--model", mean), "pooling mean, scope text reads others: take one of pooling last"),
    ):
        with pytest.raises(InputError, match=message):
            run("--model", llama, "--out", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()
