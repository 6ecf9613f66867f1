import json

import pytest
import torch
from conftest import TEXTS
from test_encoder import trained
from transformers import AutoModelForCausalLM

import attention
from encoder import Encoder
from prompts import InputError


def run(*flags) -> None:
    attention.main(attention.build_parser().parse_args([str(f) for f in flags]))


def test_weights_are_those_of_eager_attention(model):
    encoder = Encoder.load(model, prompt="cluster")
    lm = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").eval()
    for text in TEXTS:
        ids = torch.tensor(encoder.tokenise([text]).ids)
        with torch.no_grad():
            expected = lm.base_model(ids, output_attentions=True).attentions[-1][0, :, -1].mean(0)
        found = torch.tensor(attention.last_token_attention(encoder, text))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert found.sum().item() == pytest.approx(1, abs=1e-5)


def test_parts_cover_the_sequence(llama):
    encoder = Encoder.load(llama, prompt="cluster", eos=True)
    pieces, parts = attention.parts_of(encoder, "The cat sat.")
    order = [p for i, p in enumerate(parts) if i == 0 or p != parts[i - 1]]
    assert order == ["bos", "prompt", "text", "prompt", "eos"]
    own = "".join(piece for piece, part in zip(pieces, parts, strict=True) if part == "text")
    assert own.replace(" ", "") == "Thecatsat."


def test_numbers_and_pictures(llama, tmp_path, capsys):
    model = trained(llama, tmp_path / "runs" / "mine", prompt="cluster")
    (tmp_path / "texts.txt").write_text("The cat sat on $x_1$.\n\nA dog — 犬.\n")
    run("--model", model, "--text", "a", "--input", tmp_path / "texts.txt", "--out", tmp_path / "out", "--pictures", 2)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["attention.json", "text-001.png", "text-002.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in (tmp_path / "out").glob("*.png"))
    found = json.loads((tmp_path / "out" / "attention.json").read_text())
    assert found["fingerprint"] == Encoder.load(model).fingerprint and "softmax" in found["normalisation"]
    assert [t["text"] for t in found["texts"]] == ["a", "The cat sat on $x_1$.", "A dog — 犬."]
    for item in found["texts"]:
        for side in ("base", "adapter"):
            assert sum(t[side] for t in item["tokens"]) == pytest.approx(1, abs=1e-5)
            assert sum(s[side] for s in item["shares"].values()) == pytest.approx(1, abs=1e-5)
        assert item["tokens"][0]["base"] != item["tokens"][0]["adapter"]
        assert set(item["shares"]) == {"bos", "prompt", "text"}
    assert "adapter: bos" in capsys.readouterr().out
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
        (("--input", empty), "is empty"),
        (("--input", latin), "not UTF-8"),
        (("--text", "a", "--model", "no-such"), "no model"),
    ):
        with pytest.raises(InputError, match=message):
            run(*flags, "--out", tmp_path / "out")
    run_folder = trained(llama, tmp_path / "runs" / "mine", prompt="cluster")
    with pytest.raises(InputError, match="--override-contract"):
        run("--model", run_folder, "--prompt", "none", "--text", "a", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
