import json

import matplotlib.pyplot as plt
import pytest
import torch
from conftest import TEXTS, make_run
from matplotlib import font_manager
from test_classes import make
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
    assert order == ["bos", "prefix", "text", "suffix", "eos"]
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
    assert warned.count("they are drawn as codes") <= 1
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["attention.json", "text-001.png", "text-002.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in (tmp_path / "out").glob("*.png"))
    report = json.loads((tmp_path / "out" / "attention.json").read_text())
    assert report["fingerprint"] == Encoder.load(model).fingerprint and "softmax" in report["normalization"]
    assert (report["prompt"], report["role"]) == ("cluster", "document")
    assert [t["text"] for t in report["texts"]] == ["a", "The cat sat on $x_1$.", "A dog — 犬."]
    for item in report["texts"]:
        for side in ("base", "adapter"):
            assert sum(t[side] for t in item["tokens"]) == pytest.approx(1, abs=1e-5)
            assert sum(s[side] for s in item["shares"].values()) == pytest.approx(1, abs=1e-5)
        assert item["tokens"][0]["base"] != item["tokens"][0]["adapter"]
        assert set(item["shares"]) == {"bos", "prefix", "text", "suffix"}
    with pytest.raises(InputError, match="exists already"):
        run("--model", model, "--text", "a", "--out", tmp_path / "out")


def test_an_untuned_base_has_one_side(llama, tmp_path):
    run("--model", llama, "--text", "The cat.", "--out", tmp_path / "out")
    token = json.loads((tmp_path / "out" / "attention.json").read_text())["texts"][0]["tokens"][0]
    assert set(token) == {"piece", "part", "base"}


def test_a_truncated_text_is_counted_once_for_both_sides(llama, tmp_path, capsys):
    model = make_run(llama, tmp_path / "mine", max_tokens=5)
    run("--model", model, "--text", "a cat " * 9, "--pictures", 0, "--out", tmp_path / "out")
    assert capsys.readouterr().err == "warning: 1 texts were truncated to 5 tokens\n"


def test_a_run_that_was_changed_after_training_is_looked_at_with_a_warning(llama, tmp_path, capsys):
    model = make_run(llama, tmp_path / "mine")
    (tmp_path / "mine" / "summary.json").write_text('{"fingerprint": "0123456789abcdef"}')
    run("--model", model, "--text", "a", "--pictures", 0, "--out", tmp_path / "out")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"fingerprint {Encoder.load(model).fingerprint}, summary.json has 0123456789abcdef")


def test_a_query_is_looked_at_under_its_own_prompt(llama, tmp_path):
    flags = ("--model", llama, "--text", "a", "--prompt", "none", "--query-prompt", "query: {text}", "--pictures", 0)
    for role in ("query", "document"):
        run(*flags, "--role", role, "--out", tmp_path / role)
    pieces = {
        role: "".join(token["piece"] for token in json.loads((tmp_path / role / "attention.json").read_text())["texts"][0]["tokens"])
        for role in ("query", "document")
    }
    assert "query" in pieces["query"] and "query" not in pieces["document"]


def picture(tmp_path, tokens: list[dict], **options) -> tuple[int, int]:
    """Width and height of the picture of an item with these tokens."""
    parts = dict.fromkeys(token["part"] for token in tokens)
    shares = {part: dict.fromkeys(("base", "adapter"), 0.5) for part in parts}
    attention.draw({"tokens": tokens, "shares": shares}, "title\nbelow", tmp_path / "p.png", ["DejaVu Sans"], set(), **options)
    height, width = plt.imread(tmp_path / "p.png").shape[:2]
    return width, height


def test_long_texts_are_drawn_in_rows(tmp_path, monkeypatch):
    axes, subplots = [], plt.subplots
    monkeypatch.setattr(plt, "subplots", lambda *args, **options: axes.append(made := subplots(*args, **options)) or made)
    tokens = [{"piece": f"t{i}", "part": "text", "base": 0.001, "adapter": 0.002} for i in range(2000)]
    for n, rows in ((1, 1), (60, 1), (61, 2), (384, 7), (2000, 8)):
        width, height = picture(tmp_path, tokens[:n])
        assert 500 < width < 2000 and height < 3000
        panels = axes[-1][1][:, 0]
        labels = [tick.get_text() for panel in panels for tick in panel.get_xticklabels()]
        assert len(panels) == 2 * rows
        kept = tokens[:n] if n <= 480 else tokens[:240] + tokens[n - 240 : n]
        assert labels == [token["piece"] for token in kept]
        title = axes[-1][0].get_suptitle()
        assert ("1520 tokens in the middle are left out" in title) == (n == 2000) and title.startswith("title\nbelow")


def test_a_bar_of_bos_does_not_hide_the_others(tmp_path, monkeypatch):
    axes, subplots = [], plt.subplots
    monkeypatch.setattr(plt, "subplots", lambda *args, **options: axes.append(made := subplots(*args, **options)) or made)
    tokens = [{"piece": "<s>", "part": "bos", "base": 0.96}, *({"piece": "t", "part": "text", "base": 0.02} for _ in range(2))]
    picture(tmp_path, tokens)
    (panel,) = axes[0][1][:, 0]
    assert panel.get_ylim()[1] == pytest.approx(0.022) and [text.get_text() for text in panel.texts] == ["0.96"]


def test_characters_that_the_font_lacks_come_from_another_or_become_codes(monkeypatch):
    (default,) = [f for f in font_manager.fontManager.ttflist if f.fname.endswith("matplotlib/mpl-data/fonts/ttf/DejaVuSans.ttf")]
    (other,) = [f for f in font_manager.fontManager.ttflist if f.fname.endswith("matplotlib/mpl-data/fonts/ttf/STIXGeneral.ttf")]
    charmaps = [set(font_manager.get_font(font.fname).get_charmap()) for font in (default, other)]
    elsewhere, nowhere = chr(min(charmaps[1] - charmaps[0])), "犬"
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [default, other])
    assert attention.choose_fonts("a") == (["DejaVu Sans"], set())
    assert attention.choose_fonts(f"a{elsewhere}{nowhere}\n") == (["DejaVu Sans", "STIXGeneral"], {nowhere})
    assert [attention.label(piece, {nowhere}) for piece in (" cat", " ", "", "犬", "a\nb")] == ["cat", "␣", "·", "\\u72ac", "a\\nb"]


def test_the_bytes_of_a_character_are_one_piece(models_dir):
    (attended,) = Encoder.load(models_dir["qwen3"], prompt="none").last_token_attention(["a 犬é𝄞 b"])
    assert "".join(attended.pieces) == "a 犬é𝄞 b" and len(attended.pieces) == len(attended.weights)
    assert {"犬", "𝄞", ""} <= set(attended.pieces)


def test_a_class_whose_attention_cannot_be_read_is_refused_before_it_is_loaded(tmp_path, llama, monkeypatch):
    model = make(tmp_path / "gpt2", "gpt2")
    monkeypatch.setattr(Encoder, "load", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(InputError, match="gpt2: the attention of gpt2 models cannot be read, take a class like llama, mistral"):
        run("--model", model, "--text", "a", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_input(llama, tmp_path):
    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.write_text("\n")
    latin.write_bytes(b"caf\xe9\n")
    for flags, message in (
        ((), "give --text or --input"),
        (("--input", empty), "holds no text"),
        (("--input", latin), "not UTF-8"),
        (("--text", "a", "--model", "no-such"), "no model"),
        (("--text", "a", "--pictures", "-1"), "--pictures must be 0 or more"),
        (("--text", "a", "--dtype", "int4"), "unknown dtype"),
        (("--text", "a", "--query-prompt", "none"), "give --prompt as well"),
        (("--text", "a", "--out", empty / "out"), r"empty\.txt is a file, choose another place"),
    ):
        with pytest.raises(InputError, match=message):
            run("--out", tmp_path / "out", *flags)
    run_folder = make_run(llama, tmp_path / "runs" / "mine", prompt="cluster")
    with pytest.raises(InputError, match="--override-contract"):
        run("--model", run_folder, "--prompt", "none", "--text", "a", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
