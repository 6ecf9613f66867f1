import json

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, TEXTS, make_run
from test_classes import CONFIGS, make
from transformers import AutoModel

import attention
from attention_analysis.stored import CORPUS, kind_of, read_corpus, read_texts, without_bos
from encoder import Encoder
from encoder.names import PACKED_TYPES
from files.console import InputError


def run(*flags) -> None:
    attention.main(attention.build_parser().parse_args([str(f) for f in flags]))


def classes(models_dir, tmp_path, name: str) -> str:
    """A small model of a packed class; Cohere's query and key norms keep scores as small as those of the others, see `make`."""
    if name in models_dir:
        return models_dir[name]
    return make(tmp_path / name, name, **({"use_qk_norm": False} if name == "cohere" else {}))


@pytest.mark.parametrize("name", [*ARCHITECTURES, *(name for name in CONFIGS if name in PACKED_TYPES)])
def test_weights_are_those_of_eager_attention(name, models_dir, tmp_path):
    """In every layer and head of every packed class, windows and grouped heads included, in a batch and alone."""
    encoder = Encoder.load(classes(models_dir, tmp_path, name), prompt="cluster", max_tokens=30)
    lm = AutoModel.from_pretrained(encoder.folder, attn_implementation="eager").eval()
    ids, every = encoder.tokenize(TEXTS).ids, range(1, len(encoder.blocks) + 1)
    with torch.no_grad():
        expected = [torch.stack(lm(torch.tensor([i]), output_attentions=True).attentions)[:, 0, :, -1].permute(2, 0, 1) for i in ids]
    together = encoder.last_token_attention(TEXTS, layers=every)
    alone = [encoder.last_token_attention([text], layers=every)[0] for text in TEXTS]
    for a, b, rows in zip(together, alone, expected, strict=True):
        assert rows.shape == (len(a.pieces), 3, 4)
        for got in (a, b):
            torch.testing.assert_close(torch.from_numpy(got.weights), rows, rtol=0, atol=1e-6)
    if (
        getattr(lm.config, "sliding_window", None) == 12
        and getattr(lm.config, "layer_types", ["sliding_attention"])[0] == "sliding_attention"
    ):
        assert (expected[2][0, 0] == 0).all()  # the longest text is longer than the window: otherwise this would have tested nothing


def test_some_layers_are_those_of_all(llama):
    encoder = Encoder.load(llama, prompt="cluster")
    (whole,), (some,) = (encoder.last_token_attention(["The cat."], layers=layers) for layers in (range(1, 4), (-1, 1)))
    np.testing.assert_array_equal(some.weights, whole.weights[:, [2, 0]])
    (last,) = encoder.last_token_attention(["The cat."])
    np.testing.assert_array_equal(last.weights, whole.weights[:, 2])
    with pytest.raises(InputError, match="layer 9 does not exist"):
        encoder.last_token_attention(["The cat."], layers=[9])


@pytest.mark.parametrize("pooling", ["last", "attention"])
def test_looking_leaves_the_model_as_it_was(llama, tmp_path, pooling):
    encoder = Encoder.load(make_run(llama, tmp_path / "mine", prompt="cluster", pooling=pooling))
    state = {name: value.clone() for name, value in encoder.decoder.state_dict().items()}
    before, base = encoder.encode(TEXTS), encoder.untuned().encode(TEXTS)
    for which in (encoder, encoder.untuned()):
        which.last_token_attention(TEXTS, layers=[1, 3])
    np.testing.assert_array_equal(encoder.encode(TEXTS), before)
    np.testing.assert_array_equal(encoder.untuned().encode(TEXTS), base)
    assert all(torch.equal(value, state[name]) for name, value in encoder.decoder.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in encoder.blocks)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_classes_that_cap_scores_or_have_attention_sinks_are_refused(name, tmp_path):
    """Their softmax is not over the scores of the tokens alone."""
    with pytest.raises(InputError, match="does not let its attention be read"):
        Encoder.load(make(tmp_path / name, name)).last_token_attention(["a"])


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
    model = with_kept_adapter(make_run(llama, tmp_path / "runs" / "mine", prompt="cluster"), llama)
    (tmp_path / "texts.txt").write_text("The cat sat on $x_1$.\n\nA dog — 犬.\n")
    out = tmp_path / "out"
    run("--model", model, "--text", "a", "--input", tmp_path / "texts.txt", "--out", out, "--pictures", 1)
    printed, warned = capsys.readouterr()
    assert "2 texts in its lines" in printed and "adapter: bos" in printed and warned.count("truncated") == 0
    assert printed.count("without BOS: prefix") == 3 and "step 2: bos" in printed
    assert warned.count("they are drawn as codes") <= 1
    names = {path.name for path in out.iterdir()}
    assert {"attention.json", "attention.npz", "text-001.png"} <= names and "text-002.png" not in names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in out.glob("*.png"))
    about, starts, weights = read_texts(out)
    fingerprints = [Encoder.load(str(folder)).fingerprint for folder in (tmp_path / "runs/mine/adapters/step-000002", model)]
    assert [side["name"] for side in about["sides"]] == ["base", "step 2", "adapter"]
    assert [side["fingerprint"] for side in about["sides"]][1:] == fingerprints and "softmax" in about["normalization"]
    assert (about["model"], about["prompt"], about["role"], about["layers"], about["heads"]) == ("mine", "cluster", "document", 3, 4)
    assert [text["text"] for text in about["texts"]] == ["a", "The cat sat on $x_1$.", "A dog — 犬."]
    np.testing.assert_allclose(np.add.reduceat(weights, starts[:-1], axis=1), 1, atol=1e-5)
    for i, item in enumerate(about["texts"]):
        last = weights[:, starts[i] : starts[i + 1], -1].mean(2)
        for number, side in enumerate(("base", "step 2", "adapter")):
            if side != "step 2":
                np.testing.assert_allclose([token[side] for token in item["tokens"]], last[number], atol=1e-7)
            for category in item["shares"]:
                own = [token["category"] == category for token in item["tokens"]]
                assert item["shares"][category][side] == pytest.approx(last[number][own].sum(), abs=1e-6)
            assert sum(share[side] for share in item["shares_without_bos"].values()) == pytest.approx(1, abs=1e-5)
        assert "bos" in item["shares"] and "bos" not in item["shares_without_bos"]
    of_last = [token["category"] for token in about["texts"][1]["tokens"] if token["part"] == "text"]
    assert (of_last[0], of_last[-1]) == ("function", "punctuation") and "content" in of_last
    with pytest.raises(InputError, match="exists already"):
        run("--model", model, "--text", "a", "--out", out)


def with_kept_adapter(run_folder: str, base: str) -> str:
    """A run as train.py --keep-adapters leaves it."""
    make_run(base, f"{run_folder}/adapters/step-000002", seed=5, prompt="cluster")
    return run_folder


def test_an_untuned_base_has_one_side(llama, tmp_path):
    run("--model", llama, "--text", "The cat.", "--pictures", 0, "--out", tmp_path / "out")
    token = json.loads((tmp_path / "out" / "attention.json").read_text())["texts"][0]["tokens"][0]
    assert set(token) == {"piece", "part", "category", "base"}


def test_a_truncated_text_is_counted_once_for_both_sides(llama, tmp_path, capsys):
    model = make_run(llama, tmp_path / "mine", max_tokens=5, pooling="last")
    run("--model", model, "--text", "a cat " * 9, "--pictures", 0, "--out", tmp_path / "out")
    assert capsys.readouterr().err == "warning: 1 text was truncated to 5 tokens\n"


def test_vectors_that_are_not_read_from_the_last_token_are_named(llama, tmp_path, corpus, capsys, monkeypatch):
    monkeypatch.setattr("attention_analysis.pictures.draw_corpus", lambda _: 0)
    for name, contract in (("mean", {"pooling": "mean"}), ("inside", {"pooling": "last", "scope": "text"}), ("last", {"pooling": "last"})):
        model = make_run(llama, tmp_path / name, prompt="cluster", **contract)
        for i, flags in enumerate((("--text", "a", "--pictures", 0), ("--data", corpus))):
            run("--model", model, *flags, "--out", tmp_path / f"{name}-{i}")
            warned = capsys.readouterr().err
            assert ("are not read from the sequence's last token, whose attention this is" in warned) == (name != "last")


def test_a_run_that_was_changed_after_training_is_looked_at_with_a_warning(llama, tmp_path, capsys):
    model = make_run(llama, tmp_path / "mine", pooling="last")
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
    few = tmp_path / "few.txt"
    empty.write_text("\n")
    few.write_text("a\nb\n")
    latin.write_bytes(b"caf\xe9\n")
    for flags, message in (
        ((), "give --text or --input"),
        (("--input", empty), "holds no text"),
        (("--input", latin), "not UTF-8"),
        (("--text", "a", "--model", "no-such"), "no model"),
        (("--text", "a", "--limit", 3), "--limit draws from the texts of --data"),
        (("--text", "a", "--model", "tiny", llama), "a text is shown for one"),
        (("--text", "a", "--data", empty), "take one of them"),
        (("--data", empty), "holds no text"),
        (("--data", tmp_path), "is a folder"),
        (("--data", few, "--model", "tiny"), "too few texts for intervals, 2 where 20 are the least"),
        (("--input", few, "--model", "tiny", "--function-words", "frequency"), "needs 100 texts or more, there are 2"),
        (("--data", few, "--model", "tiny", llama), "tiny: several models must be runs of one base"),
        (("--text", "a", "--dtype", "int4"), "unknown dtype"),
        (("--text", "a", "--query-prompt", "none"), "give --prompt as well"),
        (("--model", llama, "--prompt", "none || cluster", "--text", "a"), "take one prompt to look at its attention"),
        (("--text", "a", "--out", empty / "out"), r"empty\.txt is a file, choose another place"),
    ):
        with pytest.raises(InputError, match=message):
            run("--out", tmp_path / "out", *flags)
    run_folder = make_run(llama, tmp_path / "runs" / "mine", prompt="cluster")
    with pytest.raises(InputError, match="--override-contract"):
        run("--model", run_folder, "--prompt", "none", "--text", "a", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------- a corpus


@pytest.fixture
def corpus(tmp_path):
    """24 texts of one to seven words."""
    path = tmp_path / "texts.csv"
    words = ["the", "cat", "sat", "on", "the", "mat", "today"]
    path.write_text("text,other\n" + "".join(f'"{" ".join(words[i % 5 : 1 + i % 5 + i % 3])}{"." * (i % 2)} {i}",x\n' for i in range(24)))
    return path


def two_runs(base: str, folder, **contract) -> list[str]:
    runs = [make_run(base, folder / f"seed{seed}", seed=seed, **({"prompt": "cluster"} | contract)) for seed in (0, 1)]
    for seed, name in enumerate(runs):
        with_kept_adapter(name, base)
        (folder / f"seed{seed}" / "arguments.json").write_text(json.dumps({"arguments": {"seed": seed}}))
        (folder / f"seed{seed}" / "summary.json").write_text(json.dumps({"best_step": 4}))
    return runs


def test_shares_over_a_corpus_and_seeds(llama, tmp_path, corpus, capsys, monkeypatch):
    runs, out, drawn = two_runs(llama, tmp_path), tmp_path / "out", []
    monkeypatch.setattr("attention_analysis.pictures.draw_corpus", lambda folder: drawn.append(kind_of(folder)) or 5)
    run("--model", *runs, "--data", corpus, "--out", out)
    printed = capsys.readouterr().out
    assert "95 % intervals over texts and over 2 runs, rough ones as the runs are few" in printed
    for layer in ("last layer (3)", "mean over layers"):
        for tokens in ("all tokens", "BOS left out, the rest renormalized"):
            assert f"{layer}, {tokens}" in printed
    assert drawn == [CORPUS] and "shares.npz, 5 pictures and page.html" in printed
    about, by_layer, by_head = read_corpus(out)
    assert [(model["side"], model["run"], model["seed"], model["step"]) for model in about["models"]] == [
        ("base", None, None, 0),
        *((side, runs[seed], seed, step) for seed in (0, 1) for side, step in (("step 2", 2), ("adapter", 4))),
    ]
    assert (about["data"], about["n_texts"], about["layers"], about["heads"]) == ("texts.csv", 24, 3, 4)
    np.testing.assert_allclose(by_layer.sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(by_head.sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(by_head.mean(2), by_layer.mean(1), atol=1e-5)

    run("--model", runs[1], "--input", corpus, "--pictures", 0, "--out", tmp_path / "texts")  # text by text, the same
    texts = read_texts(tmp_path / "texts").about["texts"]
    for model, side in ((0, "base"), (4, "adapter")):
        expected = [[text["shares"].get(category, {}).get(side, 0) for category in about["categories"]] for text in texts]
        np.testing.assert_allclose(by_layer[model, :, -1], expected, atol=1e-5)

    adapters = by_layer[[2, 4]].astype(float)
    others = without_bos(adapters)
    for values, bos in ((adapters, True), (others, False)):
        row = find(about["shares"], side="adapter", layer=3, category="content", bos=bos)
        assert row["mean"] == pytest.approx(values[:, :, 2, 3].mean(), abs=1e-5) and row["low"] < row["mean"] < row["high"]
        row = find(about["shares"], side="adapter", layer="all", category="text", bos=bos)
        assert row["mean"] == pytest.approx(values[..., 3:6].sum(-1).mean(), abs=1e-5) and row["n_seeds"] == 2
    row = find(about["differences"], side="adapter", less="base", layer=1, category="prefix", bos=True)
    assert row["mean"] == pytest.approx(adapters[:, :, 0, 1].mean() - by_layer[0, :, 0, 1].mean(), abs=1e-5)
    assert find(about["differences"], side="adapter", less="step 2", layer=1, category="prefix", bos=False)


def find(rows: list[dict], **wanted) -> dict:
    (row,) = (row for row in rows if wanted.items() <= row.items())
    return row


def test_one_run_has_intervals_over_texts_only(llama, tmp_path, corpus, capsys, monkeypatch):
    monkeypatch.setattr("attention_analysis.pictures.draw_corpus", lambda _: 0)
    run("--model", two_runs(llama, tmp_path)[0], "--data", corpus, "--limit", 20, "--out", tmp_path / "out")
    printed = capsys.readouterr().out
    assert "20 of 24 texts are drawn at random" in printed
    assert "95 % intervals over texts only: one run says nothing about another training" in printed
    assert read_corpus(tmp_path / "out").by_layer.shape == (3, 20, 3, 7)


def test_a_model_without_bos_has_no_second_table(models_dir, tmp_path, corpus, capsys, monkeypatch):
    monkeypatch.setattr("attention_analysis.pictures.draw_corpus", lambda _: 0)
    run("--model", models_dir["qwen3"], "--data", corpus, "--out", tmp_path / "out")
    run("--model", models_dir["qwen3"], "--text", "a cat", "--pictures", 0, "--out", tmp_path / "texts")
    printed = capsys.readouterr().out
    assert "last layer (3), all tokens, there is no BOS" in printed and "BOS left out" not in printed and "without BOS" not in printed


def test_runs_that_cannot_be_compared_are_refused(llama, models_dir, tmp_path, corpus, monkeypatch):
    runs = two_runs(llama, tmp_path)
    other_prompt = make_run(llama, tmp_path / "none", prompt="none")
    other_base = make_run(models_dir["mistral"], tmp_path / "mistral", prompt="cluster")
    monkeypatch.setattr(Encoder, "load", lambda *_, **__: pytest.fail("it was loaded"))
    for models, message in (
        ((runs[0], runs[0]), "seed0 twice"),
        ((runs[0], other_prompt), "differ in prompts"),
        ((runs[0], other_base), "differ in base"),
        ((runs[0], "tiny"), "tiny: several models must be runs"),
    ):
        with pytest.raises(InputError, match=message):
            run("--model", *models, "--data", corpus, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sides_that_a_run_lacks_are_left_out(llama, tmp_path, corpus, capsys, monkeypatch):
    monkeypatch.setattr("attention_analysis.pictures.draw_corpus", lambda _: 0)
    runs = two_runs(llama, tmp_path)
    make_run(llama, tmp_path / "seed0/adapters/step-000003", seed=3, prompt="cluster")
    run("--model", *runs, "--data", corpus, "--out", tmp_path / "out")
    assert "not all runs have step 3: left out" in capsys.readouterr().err
    assert {model["side"] for model in read_corpus(tmp_path / "out").about["models"]} == {"base", "step 2", "adapter"}


# --------------------------------------------------------------------------------------------------------- stored files


@pytest.mark.parametrize("kind", ["attention", "shares"])
def test_damaged_files_are_one_line(llama, tmp_path, corpus, kind, monkeypatch):
    monkeypatch.setattr("attention_analysis.pictures.draw_corpus", lambda _: 0)
    out, read = tmp_path / "out", read_texts if kind == "attention" else read_corpus
    flags = ("--text", "a cat") if kind == "attention" else ("--data", corpus)
    run("--model", llama, *flags, "--pictures", 0, "--out", out)
    whole = {path: path.read_bytes() for path in out.iterdir()}
    about, arrays = out / f"{kind}.json", out / f"{kind}.npz"
    changed = json.loads(about.read_text()) | {"layers": 7}
    for path, content, message in (
        (about, None, f"{kind}.json is missing"),
        (arrays, None, f"{kind}.npz is missing"),
        (about, b"{", f"{kind}.json is damaged"),
        (about, b"[]", f"{kind}.json is damaged"),
        (about, b"{}", f"{kind}.json is damaged"),
        (arrays, whole[arrays][:40], f"{kind}.npz is damaged"),
        (about, json.dumps(changed).encode(), "do not belong together"),
    ):
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            read(out)
        path.write_bytes(whole[path])
    read(out)
    with pytest.raises(InputError, match="holds neither"):
        kind_of(tmp_path)
