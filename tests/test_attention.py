import json

import pytest
import torch
from conftest import TEXTS, make_run
from transformers import AutoModelForCausalLM

import attention
from encoder import Encoder
from files.console import InputError


def run(*flags) -> None:
    attention.main(attention.build_parser().parse_args([str(f) for f in flags]))


def test_weights_are_those_of_eager_attention(model):
    encoder = Encoder.load(model, prompt="cluster")
    lm = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").eval()
    tokenized = encoder.tokenize(TEXTS)
    batched = encoder.last_token_attention(TEXTS)
    for ids, token_attention in zip(tokenized.ids, batched, strict=True):
        with torch.no_grad():
            expected = lm.base_model(torch.tensor([ids]), output_attentions=True).attentions[-1][0, :, -1].T  # (L, H)
        torch.testing.assert_close(torch.from_numpy(token_attention.weights), expected, rtol=0, atol=1e-5)


def test_parts_cover_the_sequence(llama):
    encoder = Encoder.load(llama, prompt="cluster", eos=True)
    (token_attention,) = encoder.last_token_attention(["The cat sat."])
    order = [part for i, part in enumerate(token_attention.parts) if i == 0 or part != token_attention.parts[i - 1]]
    assert order == ["bos", "prompt", "text", "prompt", "eos"]
    text = "".join(piece for piece, part in zip(token_attention.pieces, token_attention.parts, strict=True) if part == "text")
    assert text.replace(" ", "") == "Thecatsat."


def test_a_text_without_a_token_has_no_weights(models_dir):
    empty, other = Encoder.load(models_dir["qwen3"]).last_token_attention(["", "a"])
    assert empty.pieces == empty.parts == [] and len(empty.weights) == 0 and len(other.weights) == 1


def test_numbers_and_pictures(llama, tmp_path, capsys):
    model = make_run(llama, tmp_path / "runs" / "mine", prompt="cluster")
    (tmp_path / "texts.txt").write_text("The cat sat on $x_1$.\n\nA dog — 犬.\n")
    run("--model", model, "--text", "a", "--input", tmp_path / "texts.txt", "--out", tmp_path / "out", "--pictures", 2)
    printed, warned = capsys.readouterr()
    assert "2 texts in column 'text'" in printed and "adapter: bos" in printed and warned.count("truncated") == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["attention.json", "text-001.png", "text-002.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in (tmp_path / "out").glob("*.png"))
    report = json.loads((tmp_path / "out" / "attention.json").read_text())
    assert report["fingerprint"] == Encoder.load(model).fingerprint and "softmax" in report["normalization"]
    assert [t["text"] for t in report["texts"]] == ["a", "The cat sat on $x_1$.", "A dog — 犬."]
    for item in report["texts"]:
        for side in ("base", "adapter"):
            assert sum(t[side] for t in item["tokens"]) == pytest.approx(1, abs=1e-5)
            assert sum(s[side] for s in item["shares"].values()) == pytest.approx(1, abs=1e-5)
        assert item["tokens"][0]["base"] != item["tokens"][0]["adapter"]
        assert set(item["shares"]) == {"bos", "prompt", "text"}
    with pytest.raises(InputError, match="exists already"):
        run("--model", model, "--text", "a", "--out", tmp_path / "out")


def test_an_untuned_base_has_one_side(llama, tmp_path):
    run("--model", llama, "--text", "The cat.", "--out", tmp_path / "out")
    token = json.loads((tmp_path / "out" / "attention.json").read_text())["texts"][0]["tokens"][0]
    assert set(token) == {"piece", "part", "base"}


def test_bad_input(llama, tmp_path):
    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.write_text("\n")
    latin.write_bytes(b"caf\xe9\n")
    for flags, message in (
        ((), "give --text or --input"),
        (("--input", empty), "holds no text"),
        (("--input", latin), "not UTF-8"),
        (("--text", "a", "--model", "no-such"), "no model"),
    ):
        with pytest.raises(InputError, match=message):
            run(*flags, "--out", tmp_path / "out")
    run_folder = make_run(llama, tmp_path / "runs" / "mine", prompt="cluster")
    with pytest.raises(InputError, match="--override-contract"):
        run("--model", run_folder, "--prompt", "none", "--text", "a", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
