"""Whole runs of train.py, in this process: what they leave behind, what goes wrong, what validation chooses."""

import importlib.util
import itertools
import json
import math
import os
import random
import runpy
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_run, randomize_adapter
from safetensors.torch import load_file, save_file
from short_runs import ADAPTER, ROOT, ShortRuns, metrics, numbered_rows, run, summary, word_rows, write_labelled, write_rows

import train
from encoder import Encoder
from encoder.names import PRESETS
from files.console import InputError
from training import gradients, monitoring
from training.checkpoint import TrainingState
from training.checkpoint_files import read_checkpoint
from training.gradients import embed
from training.losses import TextIds, info_nce
from training.monitoring import ALIKE
from training.pair_data import Pair, PairDataset, hold_out, tokenize_pairs
from training.plan import decide_length, make_encoder, prepare_data
from training.run_record import CHECKPOINT, PREVIOUS_CHECKPOINT
from training.validation import Validation


@pytest.fixture
def many_pairs(tmp_path) -> Path:
    """Enough to hold some out: 20 of 400."""
    return write_rows(tmp_path / "many.jsonl", numbered_rows(400))


@pytest.fixture
def small(llama, tmp_path) -> ShortRuns:
    return ShortRuns(llama, tmp_path)


# ------------------------------------------------------------------------------------------------------- a run, start to end


def test_a_run_leaves_what_it_promises(small, tmp_path, capsys):
    out = tmp_path / "run"
    run(*small("run", "--checkpoint-every", 2, "--lr", "3e-3"))
    promised = {ADAPTER, "adapter_config.json", "embedding.json", "arguments.json", "metrics.jsonl", "loss.png", "summary.json"}
    assert {path.name for path in out.iterdir()} == promised | {CHECKPOINT, PREVIOUS_CHECKPOINT}
    assert [row["step"] for row in metrics(out)] == [1, 2, 3]
    assert [row["lr"] for row in metrics(out)] == [train.learning_rate(step, 3, 3e-3, 0.1) for step in range(3)]
    assert all(0 < row["negatives"] <= 3 and row["pairs_per_second"] > 0 and row["tokens"] > 0 for row in metrics(out))
    contract = json.loads((out / "embedding.json").read_text())
    assert contract["base"] == "llama" and contract["data"]["name"] == "pairs.jsonl" and len(contract["data"]["sha256"]) == 64
    arguments = json.loads((out / "arguments.json").read_text())
    assert arguments["arguments"]["batch_size"] == 4 and arguments["versions"]["torch"]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    encoder = Encoder.load(str(out))
    assert encoder.fingerprint == summary(out)["fingerprint"] and encoder.fingerprint in capsys.readouterr().out
    assert (summary(out)["steps"], summary(out)["best_step"], summary(out)["pairs"], summary(out)["validation"]) == (3, 3, 12, None)
    assert abs(encoder.encode(["The cat."]) - encoder.untuned().encode(["The cat."])).max() > 1e-3  # it has learned something
    with pytest.raises(InputError, match="already holds a run"):
        run(*small("run"))
    run(*small("run", "--lr", "3e-3", "--resume"))
    assert "is finished" in capsys.readouterr().out


def test_the_bundled_model_is_trained_with_its_presets_defaults(tmp_path):
    pairs = write_rows(tmp_path / "pairs.jsonl", word_rows())
    run("--model", "tiny", "--pairs", pairs, "--out", tmp_path / "run", "--batch-size", 4, "--steps", 1)
    arguments = json.loads((tmp_path / "run" / "arguments.json").read_text())["arguments"]
    assert (arguments["lr"], arguments["lora_rank"], arguments["lora_alpha"]) == (2e-3, 64, 64)
    assert json.loads((tmp_path / "run" / "embedding.json").read_text())["base"] == "tiny"


def test_training_lowers_the_loss_on_held_out_pairs(models_dir, tmp_path):
    """Pairs of a code and its name: what is learned on 80 of the combinations helps with the 20 others."""
    codes = ["ab", "cd", "ef", "gh", "ij", "kl", "mn", "op", "qr", "st"]
    names = ["red", "sun", "map", "pig", "ten", "cup", "fog", "jet", "oak", "wax"]
    rows = [
        {"anchor": f"{codes[i]} {codes[j]}", "positive": f"{names[i]} {names[j]}"}
        for i, j in random.Random(0).sample(list(itertools.product(range(10), repeat=2)), 100)
    ]
    flags = ("--model", models_dir["mistral"], "--pairs", write_rows(tmp_path / "codes.jsonl", rows[20:]), "--batch-size", 20)
    run(*flags, "--out", tmp_path / "run", "--steps", 60, "--lr", 1e-2, "--lora-rank", 8, "--dtype", "float32", "--hold-out", 0)
    encoder, ids = Encoder.load(str(tmp_path / "run")), torch.arange(20)

    def held_out_loss(encoder: Encoder) -> float:
        anchors = torch.from_numpy(encoder.encode([row["anchor"] for row in rows[:20]], "query"))
        positives = torch.from_numpy(encoder.encode([row["positive"] for row in rows[:20]]))
        return info_nce(anchors, positives, anchors[:0], TextIds(ids, ids + 20, ids[:0]), 0.05).loss.item()

    assert held_out_loss(encoder) < 0.7 * held_out_loss(encoder.untuned())


@pytest.mark.parametrize(
    ("size", "flags", "batch", "epochs"),
    [
        (300_000, (), 120, 1),
        (7680, (), 120, 1),
        (7680, ("--batch-size", 4000), 4000, 1),
        (7679, (), 120, 1),
        (1000, (), 118, 2.5),  # 950 pairs, 8 steps each time
        (293, (), 34, 2.5),
        (293, ("--batch-size", 96), 96, 3),  # 2 steps each time
        (293, ("--epochs", 2), 34, 2),
        (293, ("--steps", 5), 34, None),
        (24, (), 8, 3),
        (3, (), 3, 3),
    ],
)
def test_defaults_for_few_pairs_make_enough_steps(size, flags, batch, epochs, capsys):
    args = train.parse(["--model", "qwen3-0.6b", *map(str, flags)])
    n_pairs = size - len(hold_out(size, 256))
    decide_length(args, size, n_pairs, n_pairs, 120)
    assert (args.batch_size, args.epochs) == (batch, epochs)
    changed = (batch < 120 and "--batch-size" not in flags) or ((epochs or 1) > 1 and "--epochs" not in flags)
    assert ("pairs are few" in capsys.readouterr().out) == changed


@pytest.mark.parametrize(
    ("size", "flags", "every"), [(100, (), 4), (100, ("--validate-every", 7), 7), (319, ("--steps", 400), 50), (320, (), 50)]
)
def test_a_short_run_on_a_small_set_is_validated_five_times(small, tmp_path, size, flags, every):
    args = train.parse(["--model", small.model, "--pairs", str(write_rows(tmp_path / "p.jsonl", numbered_rows(size))), *map(str, flags)])
    train.complete_arguments(args)
    data = prepare_data(args, 120)
    assert args.validate_every == every and len(data.validation.pairs) == (10 if size == 100 else 16)


def test_few_pairs_are_few_in_words_too(small, tmp_path, capsys):
    pairs = write_rows(tmp_path / "few.jsonl", numbered_rows(90))
    flags = ("--model", small.model, "--pairs", pairs, "--lora-rank", 2)
    run(*flags, "--out", tmp_path / "run", "--epochs", 0.3)
    out, err = capsys.readouterr()
    assert "90 pairs are few: batches of 10 instead of 120; more pairs would help most" in out
    assert "81 pairs from" in out and "2 steps of 10, 0.247 epochs" in out
    assert "only 2 steps: more --epochs, a smaller --batch-size or more pairs may help" in err
    run(*small("none", "--steps", 1))
    assert "fewer than 8 of 24 pairs could be held out, so none are" in capsys.readouterr().out
    run("--out", tmp_path / "run", "--resume")  # batch size and epochs are those of the run
    assert "is finished" in capsys.readouterr().out


def test_a_text_twice_needs_dropout(small, tmp_path, capsys):
    pairs = write_rows(tmp_path / "same.jsonl", [{"anchor": row["anchor"], "positive": row["anchor"]} for row in word_rows()])
    run(*small("plain", "--pairs", pairs))
    assert "without dropout they teach next to nothing" in capsys.readouterr().err
    run(*small("dropout", "--pairs", pairs, "--lora-dropout", 0.1))
    assert "without dropout" not in capsys.readouterr().err
    for name, dropout in (("plain", 0.0), ("dropout", 0.1)):
        encoder = Encoder.load(str(tmp_path / name))
        encoder.unfreeze_adapter(dropout)
        randomize_adapter(encoder)
        encoder.share_prefix = not dropout
        encoder.decoder.train()
        one, other = embed(encoder, encoder.tokenize(["The cat sat."] * 2), [0, 1])
        assert ((one - other).abs().max() > 1e-3) == bool(dropout)  # each copy of a text draws masks of its own


def test_learning_rate_rises_then_falls():
    rates = [train.learning_rate(step, 100, 1.0, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1.0 and rates[10] == 1.0
    assert all(a >= b for a, b in itertools.pairwise(rates[10:])) and rates[-1] < 0.001


def test_gradients_are_clipped(small, tmp_path):
    """To a norm so small that Adam's epsilon swallows them: the adapter stays what it was."""
    run(*small("run", "--max-grad-norm", "1e-15", "--lr", "1e-2"))
    encoder = Encoder.load(str(tmp_path / "run"))
    assert abs(encoder.encode(["The cat."]) - encoder.untuned().encode(["The cat."])).max() < 1e-5


def test_a_learned_temperature_neither_decays_nor_falls_below_its_minimum(small, tmp_path):
    run(*small("run", "--learn-temperature", "--weight-decay", 10, "--lr", "1e-3", "--steps", 2))
    first, second = (row["temperature"] for row in metrics(tmp_path / "run"))
    assert abs(math.log(second / first)) == pytest.approx(1e-3, rel=0.01)  # Adam's first step, and nothing else
    texts = ("the cat", "interest rates rose", "the bank", "a month")
    equal = write_rows(tmp_path / "equal.jsonl", [{"anchor": text, "positive": text} for text in texts])
    run(*small("cold", "--pairs", equal, "--learn-temperature", "--temperature", 0.015, "--lr", 0.5, "--steps", 2))
    assert [row["temperature"] for row in metrics(tmp_path / "cold")] == pytest.approx([0.015, 0.01], rel=1e-5)


def encoder_for(flags: list[str]) -> Encoder:
    args = train.parse(flags)
    train.complete_arguments(args)
    return make_encoder(args, PairDataset(args.pairs))


def test_a_prompt_is_shared_unless_each_text_draws_a_mask_of_its_own(small):
    assert encoder_for(small("run")).share_prefix
    assert not encoder_for(small("run", "--lora-dropout", 0.1)).share_prefix


def test_layers_are_computed_again_as_asked(small):
    for every, layers in ((0, [False] * 3), (1, [True] * 3), (2, [False, True, False])):
        encoder = encoder_for(small("run", "--gradient-checkpointing", every))
        assert [block.gradient_checkpointing for block in encoder.blocks] == layers


def test_peft_casts_no_inputs_in_bfloat16(small):
    for dtype, casts in (("bfloat16", False), ("float32", True)):
        layers = [m for m in encoder_for(small("run", "--dtype", dtype)).decoder.modules() if hasattr(m, "cast_input_dtype_enabled")]
        assert layers and all(layer.cast_input_dtype_enabled == casts for layer in layers)


def test_copies_in_a_batch_are_told_apart_from_negatives(small, tmp_path):
    """One anchor with four positives: none is a negative of another, and there is nothing to learn."""
    path = write_rows(tmp_path / "copies.jsonl", [{"anchor": "The cat.", "positive": f"A cat {i}."} for i in range(4)])
    run(*small("run", "--pairs", path, "--steps", 1))
    (row,) = metrics(tmp_path / "run")
    assert row["negatives"] == 0 and row["loss"] == 0 and row["accuracy"] == 1


def test_anchors_may_have_a_prompt_of_their_own(small, tmp_path, capsys):
    run(*small("run", "--prompt", "text: {text}", "--query-prompt", "question: {text}"))
    assert "prompt text: {text} (queries: question: {text}), pooling" in capsys.readouterr().out
    encoder = Encoder.load(str(tmp_path / "run"))
    assert {role: prompt["prefix"] for role, prompt in encoder.contract.prompts.items()} == {"document": "text: ", "query": "question: "}
    anchors = tokenize_pairs(encoder, [Pair("a cat", "a dog")]).anchors
    assert anchors.ids == encoder.tokenize(["a cat"], "query").ids != encoder.tokenize(["a cat"]).ids


def test_a_run_is_trained_on(small, llama, tmp_path, capsys):
    """With its contract and its adapter's settings, whatever the new command leaves out."""
    first, second = tmp_path / "first", tmp_path / "second"
    settings = ("--pooling", "query", "--scope", "all", "--rslora", "--lora-alpha", 3, "--lora-targets", "q_proj", "v_proj")
    run(*small("first", *settings, "--prompt", "a: {text} b", "--lr", "1e-2"))
    other = write_rows(tmp_path / "other.jsonl", numbered_rows(30))
    go_on = ("--model", first, "--pairs", other, "--batch-size", 4, "--steps", 2, "--dtype", "float32")
    before = Encoder.load(str(first))
    for more, message in (
        (("--lora-rank", 3), "--lora-rank 3: the adapter of .*first was made with 2. Leave the flag out"),
        (("--dora",), "--dora True: the adapter of .*first was made with False"),
        (("--lora-targets", "q_proj"), "--lora-targets .* was made with"),
        (("--pooling", "last"), "pooling is 'query' in the run, 'last' was asked for. Leave the flag out, or add --override-contract"),
        (("--prompt", "cluster"), "prompt is 'a: {text} b' in the run, 'cluster' was asked for"),
    ):
        with pytest.raises(InputError, match=message):
            run(*go_on, "--out", second, *more)
        assert not second.exists()
    run(*go_on, "--out", second, "--lr", "1e-30", "--lora-targets", "v_proj", "q_proj")  # so little that the adapter stays what it was
    assert f"going on from the adapter of {first}, fingerprint {before.fingerprint}" in capsys.readouterr().out
    torch.testing.assert_close(load_file(second / ADAPTER), load_file(first / ADAPTER), rtol=0, atol=1e-20)
    after = Encoder.load(str(second))
    changed = {k: v for k, v in vars(after.contract).items() if v != getattr(before.contract, k)}
    assert set(changed) == {"data"} and changed["data"]["name"] == "other.jsonl" and after.contract.base == "llama"
    arguments = json.loads((second / "arguments.json").read_text())
    started_from = {"run": str(first), "fingerprint": before.fingerprint}
    assert arguments["started_from"] == summary(second)["started_from"] == started_from
    assert (arguments["arguments"]["lora_rank"], arguments["arguments"]["lora_alpha"], arguments["arguments"]["rslora"]) == (2, 3, True)
    run(*go_on, "--out", tmp_path / "third", "--lr", "1e-2", "--lora-dropout", 0.1)
    assert all((a != b).any() for a, b in zip(*(load_file(tmp_path / n / ADAPTER).values() for n in ("first", "third")), strict=True))
    run(*go_on, "--out", tmp_path / "last", "--pooling", "last", "--override-contract")
    assert json.loads((tmp_path / "last" / "embedding.json").read_text())["pooling"] == "last"
    (second / "summary.json").unlink()
    run("--out", second, "--resume")
    assert summary(second)["fingerprint"] == after.fingerprint
    assert train.default_out(train.parse(["--model", str(first)])).name == "first-on"
    assert train.preset_of(make_run("tiny", tmp_path / "tiny")) is PRESETS["tiny"]


def test_a_closed_standard_output_ends_no_training(small, tmp_path, monkeypatch):
    """As after `| head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        run(*small("run"))
    assert summary(tmp_path / "run")["steps"] == 3


def test_the_next_commands_are_the_users_own(small, llama, tmp_path, capsys):
    run(*small("run", "--steps", 1))
    said = capsys.readouterr().out
    assert "pooling last, scope all: can be exported to sentence-transformers, vllm, tei, onnx, gguf\n" in said
    *_, first, second, third = said.splitlines()
    command = f"python evaluate.py --model {tmp_path / 'run'} {llama}"
    assert f"{command} --data labelled.csv" in first and f"{command} --texts texts.csv" in second
    assert f"python export.py {tmp_path / 'run'} --out exported" in third


def test_a_collapse_is_said_once_and_again_at_the_end(small, tmp_path, capsys):
    run(*small("run", "--lr", "1e9", "--steps", 8, "--checkpoint-every", 4))
    err = capsys.readouterr().err
    assert err.count("all texts have the same vector, and the loss is that of chance (1.39): lower --lr") == 2
    assert err.count("this run has learned little or nothing") == 1
    assert "same vector" in summary(tmp_path / "run")["collapse"]
    copies = write_rows(tmp_path / "copies.jsonl", [{"anchor": "The cat.", "positive": f"A cat {i}."} for i in range(4)])
    run(*small("copies", "--pairs", copies, "--steps", 4))
    assert capsys.readouterr().err.count("no text has a negative") == 2


def test_an_ordinary_run_has_not_collapsed(model, tmp_path, capsys):
    pairs = write_rows(tmp_path / "pairs.jsonl", word_rows())
    run("--model", model, "--pairs", pairs, "--out", tmp_path / "run", "--steps", 8, "--batch-size", 12, "--lora-rank", 4)
    assert "same vector" not in capsys.readouterr().err and summary(tmp_path / "run")["collapse"] is None
    assert min(row["spread"] for row in metrics(tmp_path / "run")) > 10 * ALIKE


def test_seeds_give_different_runs_and_one_seed_the_same(small, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(*small(name, "--steps", 2, "--seed", seed))
    fingerprints = [summary(tmp_path / name)["fingerprint"] for name in "abc"]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_hard_negatives_and_every_option_of_the_loss_reach_a_run(small, tmp_path):
    rows = word_rows()
    hard = [{"negative": "The river."} if i % 2 else {"negatives": ["The mat.", "a month"]} for i in range(len(rows))]
    path = write_rows(tmp_path / "hard.jsonl", [row | more for row, more in zip(rows, hard, strict=True)])
    options = ("--matryoshka", 8, 16, "--margin", 0.1, "--mask-above", 0.99, "--learn-temperature", "--rslora", "--dora")
    run(*small("run", "--pairs", path, *options, "--chunk-size", 2, "--gradient-checkpointing"))
    steps = metrics(tmp_path / "run")
    assert max(row["negatives"] for row in steps) > 3
    assert steps[0]["temperature"] == pytest.approx(0.05) and steps[-1]["temperature"] != steps[0]["temperature"]
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert config["use_rslora"] and config["use_dora"]
    assert (summary(tmp_path / "run")["chunk_size"], summary(tmp_path / "run")["gradient_checkpointing"]) == (2, 1)
    for option in (options[:3], options[3:5], ("--mask-above", 0.5), ("--temperature", 0.1)):  # each changes the first loss
        run(*small(option[0][2:], "--pairs", path, *option, "--steps", 1))
    run(*small("plain", "--pairs", path, "--steps", 1))
    losses = [metrics(out.parent)[0]["loss"] for out in tmp_path.glob("*/summary.json")]
    assert len(losses) == len(set(losses)) == 6


def test_a_learned_query_is_trained_and_saved_with_the_adapter(small, llama, tmp_path):
    out = tmp_path / "run"
    run(*small("run", "--pooling", "query", "--scope", "all", "--lr", "1e-2"))
    query = load_file(out / "pooling.safetensors")["query"]
    assert query.shape == (1, 32) and query.abs().max() > 0.01
    encoder = Encoder.load(str(out))
    assert torch.equal(encoder.query, query) and encoder.fingerprint == summary(out)["fingerprint"]
    mean = Encoder.load(llama, prompt="cluster", pooling="mean", scope="all").encode(["The cat sat."])
    assert abs(encoder.untuned().encode(["The cat sat."]) - mean).max() < 1e-5  # nothing is learned: the query is the mean
    assert abs(encoder.encode(["The cat sat."]) - mean).max() > 1e-3
    (out / "summary.json").unlink()
    run("--out", out, "--resume")
    assert torch.equal(load_file(out / "pooling.safetensors")["query"], query)
    save_file({"query": query + 1}, out / "pooling.safetensors")
    assert Encoder.load(str(out)).fingerprint != encoder.fingerprint
    (out / "pooling.safetensors").unlink()
    with pytest.raises(InputError, match=r"pooling\.safetensors is missing or damaged"):
        Encoder.load(str(out))


def test_runs_on_several_files(small, tmp_path):
    pairs, other = small.pairs, write_rows(tmp_path / "other.jsonl", numbered_rows(30))
    for more, message in (
        (("--weights", 1, 0), "a number above 0 for each of the 2 files"),
        (("--weights", 1), "each of the 2 files"),
        (("--same-source-batches", "--batch-size", 26), "more than the 24 pairs of the smallest file"),
    ):
        with pytest.raises(InputError, match=message):
            run(*small("run", "--pairs", pairs, other, *more))
    with pytest.raises(InputError, match="needs several files"):
        run(*small("run", "--same-source-batches"))
    run(*small("run", "--pairs", pairs, other, "--weights", 1, 2, "--same-source-batches"))
    contract = json.loads((tmp_path / "run" / "embedding.json").read_text())
    assert contract["data"]["name"] == "pairs.jsonl + other.jsonl"
    (tmp_path / "run" / "summary.json").unlink()
    run("--out", tmp_path / "run", "--resume")
    with pytest.raises(InputError, match="weights was"):
        run("--out", tmp_path / "run", "--resume", "--weights", 1, 1)


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_quantized_base_is_trained_and_loaded_as_such(tmp_path, quantize):
    pytest.importorskip("bitsandbytes")
    pairs = write_rows(tmp_path / "pairs.jsonl", word_rows())
    flags = ("--model", "tiny", "--pairs", pairs, "--batch-size", 4, "--lora-rank", 2, "--steps", 3)
    run(*flags, "--out", tmp_path / "run", "--quantize", quantize, "--dtype", "bfloat16")
    encoder = Encoder.load(str(tmp_path / "run"), dtype="bfloat16")
    assert encoder.contract.quantize == quantize and encoder.fingerprint == summary(tmp_path / "run")["fingerprint"]
    plain = Encoder.load("tiny", prompt="cluster", dtype="bfloat16").encode(["The cat sat."])
    moved = 1 - (encoder.untuned().encode(["The cat sat."]) * plain).sum()
    assert 1e-6 < moved < 0.2
    assert encoder.merge() == 0 and not encoder.merged


# ------------------------------------------------------------------------------------------------- when something goes wrong


def test_a_run_goes_on_in_smaller_chunks_when_memory_runs_out(small, tmp_path, monkeypatch):
    run(*small("whole"))

    def too_large(encoder, tokenized, rows):
        if len(rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return embed(encoder, tokenized, rows)

    monkeypatch.setattr(gradients, "embed", too_large)
    run(*small("chunks"))
    whole, chunks = summary(tmp_path / "whole"), summary(tmp_path / "chunks")
    assert (whole["chunk_size"], whole["gradient_checkpointing"]) == (4, 0)
    assert (chunks["chunk_size"], chunks["gradient_checkpointing"]) == (2, 1)
    losses = [[row["loss"] for row in metrics(tmp_path / name)] for name in ("whole", "chunks")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def break_losses(monkeypatch, *broken_steps: int) -> None:
    """Make the loss NaN at these steps, counted from 1."""
    step = itertools.count(1)

    def broken(*args, **kwargs):
        result = info_nce(*args, **kwargs)
        return result._replace(loss=result.loss * (math.nan if next(step) in broken_steps else 1))

    monkeypatch.setattr("training.losses.info_nce", broken)


def test_a_step_that_is_not_finite_is_skipped_and_counted(small, tmp_path, monkeypatch, capsys):
    break_losses(monkeypatch, 2, 3)
    run(*small("run", "--steps", 5))
    assert capsys.readouterr().err.count("the step is skipped") == 2
    assert summary(tmp_path / "run")["skipped_steps"] == 2 and math.isfinite(summary(tmp_path / "run")["loss_last_tenth"])
    assert [row["step"] for row in metrics(tmp_path / "run") if row["loss"] is None] == [2, 3]


def test_a_skipped_step_changes_no_weight(small, tmp_path, monkeypatch):
    break_losses(monkeypatch, 3)
    run(*small("longer", "--steps", 3, "--checkpoint-every", 2))
    before, after = (load_file(tmp_path / "longer" / name) for name in (PREVIOUS_CHECKPOINT, CHECKPOINT))
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith(("weight/", "exp_avg/")))


def test_a_diverging_run_ends_with_an_error_and_saves_nothing(small, tmp_path):
    with pytest.raises(InputError, match=r"step 4: the loss is .*third time in a row: lower --lr"):
        run(*small("run", "--lr", "1e30", "--steps", 6))
    with pytest.raises(InputError, match="the vectors of the validation are not finite"):
        run(*small("validated", "--lr", "1e30", "--validation", write_labelled(tmp_path / "labelled.jsonl"), "--validate-every", 1))
    assert not (tmp_path / "run" / ADAPTER).exists()
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_training_goes_on_when_the_gpu_no_longer_tells_its_energy(small, tmp_path, monkeypatch):
    """It is asked at the start and at each of two checkpoints, and not at every step: the answer may take longer than a short step."""
    answers = {"run": [100.0, 1000.0, 3700.0], "silent": [100.0, 1000.0, None], "cpu": [None] * 3}
    for name in answers:
        answer = iter(answers[name])
        monkeypatch.setattr(monitoring, "joules", lambda device, answer=answer: next(answer))
        run(*small(name, "--checkpoint-every", 2))
        assert not list(answer)
    assert [summary(tmp_path / name)["energy_wh"] for name in answers] == [1, None, None]
    assert all(summary(tmp_path / name)["steps"] == 3 for name in answers)


def test_bad_arguments(small, tmp_path):
    for flags, message in (
        (("--batch-size", 1), "must be 2 or more"),
        (("--keep-adapters", 1), "--keep-adapters must be 2 or more"),
        (("--batch-size", 100), "more than the 24 pairs"),
        (("--lr", 0), "--lr must be above 0"),
        (("--steps", 0), "--steps must be between 1 and 10 million"),
        (("--steps", 10**12), "--steps must be between 1 and 10 million"),
        (("--dtype", "float16"), "cannot train"),
        (("--lr", "nan"), "--lr must be above 0"),
        (("--temperature", "inf"), "--temperature must be above 0"),
        (("--max-grad-norm", 0), "--max-grad-norm must be above 0"),
        (("--weight-decay", -1), "--weight-decay must be 0 or more"),
        (("--warmup-ratio", 5), "--warmup-ratio must be 0 or more and below 1"),
        (("--lora-dropout", 1.5), "--lora-dropout must be 0 or more and below 1"),
        (("--lora-alpha", 0), "--lora-alpha must be 1 or more"),
        (("--seed", -1), "--seed must be 0 or more"),
        (("--patience", 0), "--patience must be 1 or more"),
        (("--patience", 2), "--patience needs validation, and none of 24 pairs are held out"),
        (("--learn-temperature", "--temperature", 0.005), "start at 0.01 or above"),
        (("--hold-out", -1), "--hold-out must be 0 or more"),
        (("--validate-every", 0), "--validate-every must be 1 or more"),
        (("--checkpoint-every", 0), "--checkpoint-every must be 1 or more"),
        (("--validation", tmp_path / "none.jsonl"), r"no file .*none\.jsonl"),
        (("--chunk-size", 0), "--chunk-size must be 1 or more"),
        (("--mask-above", 2), "a cosine between -1 and 1"),
        (("--matryoshka", 8, 0), "--matryoshka must be numbers above 0"),
        (("--matryoshka", 8, 33), "a vector of this model has 32 numbers"),
        (("--margin", 1), "--margin must be 0 or more and below 1"),
        (("--device", "gpu"), "unknown device 'gpu'"),
        (("--prompt", "clutser"), "unknown prompt 'clutser'"),
        (("--model", "no-such-model"), "no model 'no-such-model'"),
        (("--device", "cuda:7"), "sees no CUDA device"),
        (("--fsdp",), "start them with torchrun"),
        (("--lora-targets", "query", "q_proj"), "no linear layer is called query: there are down_proj, gate_proj, k_proj"),
    ):
        if flags[0] == "--device" and torch.cuda.is_available():
            continue
        with pytest.raises(InputError, match=message):
            run(*small("run", *flags))
    assert not (tmp_path / "run").exists()


def test_what_can_be_known_before_the_pairs_are_read_is_refused_before(small, monkeypatch):
    monkeypatch.setattr("training.plan.prepare_data", None)
    for flags, message in (
        (("--model", "no-such-model"), "no model"),
        (("--model", small.folder), r"with neither embedding\.json"),
        (("--prompt", "clutser"), "unknown prompt 'clutser'"),
        (("--query-prompt", "clutser"), "unknown prompt 'clutser'"),
        (("--dtype", "int3"), "unknown dtype 'int3'"),
        (("--device", "gpu"), "unknown device 'gpu'"),
    ):
        with pytest.raises(InputError, match=message):
            run(*small("run", *flags))


def test_bad_pairs_are_refused_before_a_run_begins(small, tmp_path):
    small.pairs.write_text(small.pairs.read_text() + '{"anchor": "a"}\n')
    with pytest.raises(InputError, match="line 25: needs the texts 'anchor' and 'positive'"):
        run(*small("run"))
    assert not (tmp_path / "run").exists()


def test_what_is_not_installed_is_named(small, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in ("bitsandbytes", "wandb") else find(name, *a))
    with pytest.raises(InputError, match="quantize nf4 needs the package bitsandbytes: pip install"):
        run(*small("run", "--quantize", "nf4"))
    with pytest.raises(InputError, match="--track wandb needs the package wandb: pip install wandb"):
        run(*small("run", "--track", "wandb"))
    assert not (tmp_path / "run").exists()


def test_an_error_is_one_line_and_status_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--pairs", str(tmp_path / "none.jsonl"), "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines() == [f"train.py: no file {tmp_path / 'none.jsonl'}: make pairs with make_pairs.py"]


def test_only_the_first_process_prints_but_every_one_shows_its_errors(small, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    streams = sys.stdout, sys.stderr
    run(*small("run", "--steps", 1))
    assert capsys.readouterr().out == "" and (sys.stdout, sys.stderr) == streams
    monkeypatch.setattr(sys, "argv", ["train.py", *small("run")])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    assert "train.py, process 1: " in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------------- validation


def test_held_out_pairs_and_their_copies_are_not_trained_on(small, many_pairs):
    many_pairs.write_text(many_pairs.read_text() * 2)
    args = train.parse(small("run", "--pairs", many_pairs))
    train.complete_arguments(args)
    data = prepare_data(args, 120)
    (rows,) = data.sampler.sources
    assert len(data.validation.pairs) == 40 and not set(data.validation.pairs) & set(data.pairs[rows.tolist()])
    assert len(rows) == data.n_pairs == 800 - 2 * len(set(data.validation.pairs))


def set_scores(monkeypatch, *scores: float) -> None:
    score = iter(scores)
    monkeypatch.setattr(Validation, "__call__", lambda self, encoder: next(score))


def test_the_best_that_validation_has_seen_is_what_stays(small, many_pairs, tmp_path, monkeypatch, capsys):
    set_scores(monkeypatch, 0.1, 0.5, 0.3, 0.2, 0.9)
    out = tmp_path / "run"
    run(*small("run", "--pairs", many_pairs, "--validate-every", 1, "--patience", 2, "--lr", "1e-2", "--steps", 6))
    result = summary(out)
    assert (result["steps"], result["best_step"]) == (4, 2)
    assert result["validation"] == {"what": "held-out accuracy", "best": 0.5, "kept": 0.5}
    assert "4 steps, kept step 2" in capsys.readouterr().out
    assert [row["validation"] for row in metrics(out)] == [0.1, 0.5, 0.3, 0.2]
    state, tensors = read_checkpoint(out, TrainingState)
    assert (state.step, state.best_score, state.kept_step, state.validations_without_improvement) == (4, 0.5, 2, 2)
    encoder = Encoder.load(str(out))
    assert encoder.fingerprint == result["fingerprint"]
    for name, weight in encoder.peft.named_parameters():
        if "lora_" in name:
            assert torch.equal(weight, tensors[f"best/{name}"])
    assert any(not torch.equal(tensors[k], tensors[k.replace("best/", "weight/")]) for k in tensors if k.startswith("best/"))
    (out / "summary.json").unlink()
    run("--out", out, "--resume")  # patience had run out: no step is added
    assert summary(out)["fingerprint"] == result["fingerprint"] and len(metrics(out)) == 4


def test_of_adapters_within_one_standard_error_the_latest_stays(small, many_pairs, tmp_path, monkeypatch):
    """20 held-out pairs: an accuracy of 0.5 has a standard error of 0.11."""
    set_scores(monkeypatch, 0.1, 0.5, 0.4, 0.38)
    run(*small("run", "--pairs", many_pairs, "--validate-every", 1, "--steps", 4))
    result = summary(tmp_path / "run")
    assert result["best_step"] == 3 and result["validation"] == {"what": "held-out accuracy", "best": 0.5, "kept": 0.4}


def test_a_run_in_bfloat16_is_validated(small, many_pairs, tmp_path):
    run(*small("run", "--pairs", many_pairs, "--dtype", "bfloat16", "--validate-every", 2))
    assert [row["step"] for row in metrics(tmp_path / "run") if "validation" in row] == [2, 3]  # the last step is validated always
    assert summary(tmp_path / "run")["best_step"] in (2, 3) and 0 <= summary(tmp_path / "run")["validation"]["best"] <= 1
