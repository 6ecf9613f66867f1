import hashlib
import importlib.util
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import train
from encoder import Encoder
from prompts import InputError

HERE = Path(__file__).resolve().parent.parent


@pytest.fixture
def pairs(tmp_path) -> Path:
    words = ["cat", "dog", "bank", "rate", "river", "mountain", "card", "loan", "house", "tree", "car", "road"]
    rng = random.Random(0)
    rows = []
    for i in range(24):
        topic = words[i % len(words)]
        rows.append({"anchor": f"The {topic} and {rng.choice(words)} {i}.", "positive": f"About a {topic}, {rng.choice(words)} {i}."})
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def run(*flags) -> None:
    train.main(train.parse([str(f) for f in flags]))


def small(pairs, out, *more):
    return (
        "--model",
        "tiny",
        "--pairs",
        pairs,
        "--out",
        out,
        "--batch-size",
        4,
        "--lora-rank",
        2,
        "--dtype",
        "float32",
        "--steps",
        6,
        *more,
    )


# ---------------------------------------------------------------------------------------------------------- the loss


def numbers(anchors, positives, negatives=()):
    return train.Numbers(*(torch.tensor(x, dtype=torch.long) for x in (anchors, positives, negatives)))


def apart(n: int, m: int = 0) -> train.Numbers:
    """Texts of n pairs and m hard negatives, no two of them equal."""
    return numbers(range(n), range(n, 2 * n), range(2 * n, 2 * n + m))


def units(n: int, seed: int, width: int = 8) -> torch.Tensor:
    return F.normalize(torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


NONE = torch.zeros(0, 2)


def test_info_nce_by_hand():
    """Two pairs, similarities 1 and 0 at temperature 1: each direction costs -log(e / (e + 1))."""
    a = torch.eye(2)
    loss, accuracy, negatives = train.info_nce(a, a, NONE, apart(2), 1.0)
    assert loss.item() == pytest.approx(-math.log(math.e / (math.e + 1)), abs=1e-6)
    assert (accuracy, negatives) == (1, 1)
    loss, accuracy, _ = train.info_nce(a, a.flip(0), NONE, apart(2), 1.0)
    assert loss.item() == pytest.approx(-math.log(1 / (math.e + 1)), abs=1e-6)
    assert accuracy == 0


def test_a_hard_negative_stands_beside_the_positives_by_hand():
    """One that equals anchor 0 costs it -log(e / (e + 1 + e)), and anchor 1 an orthogonal one more; the way back is as before."""
    a = torch.eye(2)
    loss, _, negatives = train.info_nce(a, a, a[:1], apart(2, 1), 1.0)
    there = -math.log(math.e / (2 * math.e + 1)) - math.log(math.e / (math.e + 2))
    back = -2 * math.log(math.e / (math.e + 1))
    assert loss.item() == pytest.approx((there + back) / 4, abs=1e-6) and negatives == 2
    copies = train.info_nce(a, a, a[:1], numbers([0, 1], [2, 3], [2]), 1.0)  # it is the positive of pair 0 itself
    assert copies[2] == 1.5 and copies[0] < loss


def test_a_margin_is_taken_off_the_pair_by_hand():
    a = torch.eye(2)
    loss, accuracy, _ = train.info_nce(a, a, NONE, apart(2), 0.5, margin=0.25)
    assert accuracy == train.info_nce(a, a, NONE, apart(2), 0.5, margin=0.99)[1] == 1  # what is found, whatever the loss asks for
    assert loss.item() == pytest.approx(-math.log(math.exp(1.5) / (math.exp(1.5) + 1)), abs=1e-6)


def test_negatives_like_the_positive_are_left_out():
    """Positives 0 and 1 are near copies: with a threshold neither is the other's negative, in either direction."""
    a, p = torch.eye(3), F.normalize(torch.tensor([[1.0, 0.1, 0], [1.0, 0.0, 0], [0, 0, 1.0]]), dim=-1)
    assert train.info_nce(a, p, NONE.new_zeros(0, 3), apart(3), 1.0)[2] == 2
    found = train.info_nce(a, p, NONE.new_zeros(0, 3), apart(3), 1.0, threshold=0.9)
    assert found[2] == pytest.approx(4 / 3)
    right = torch.tensor([[p[0, 0], 0.0], [0.0, 0.0], [1.0, 0.0]])  # what is left to tell apart: the pair and pair 2, and 2 all three
    there = [torch.logsumexp(right[0], 0) - right[0, 0], torch.logsumexp(torch.tensor([0.0, 0.0]), 0), math.log(math.e + 2) - 1]
    similarity = p @ a.T
    back = [torch.logsumexp(similarity[i], 0) - similarity[i, i] for i in range(3)]  # anchors are apart: nothing is masked
    assert found[0].item() == pytest.approx(float(sum(there) + sum(back)) / 6, abs=1e-6)


def test_blocks_of_rows_change_neither_loss_nor_gradient():
    found = []
    for block in (100, 3):
        vectors = [units(10, 0).requires_grad_(), units(10, 1).requires_grad_(), units(4, 2).requires_grad_()]
        texts = numbers([0, 0, *range(1, 9)], range(20, 30), [20, 40, 41, 8])
        temperature = torch.tensor(0.1, requires_grad=True)
        loss, *rest = train.info_nce(*vectors, texts, temperature, margin=0.1, threshold=0.5, block=block)
        loss.backward()
        found.append([loss.detach(), torch.tensor(rest), temperature.grad, *(v.grad for v in vectors)])
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-12)


def test_duplicates_are_no_negatives():
    """Pairs 0 and 1 share an anchor, 2's positive is 3's anchor; 4 stands alone."""
    texts = numbers([0, 0, 1, 2, 5], [7, 8, 2, 3, 6])
    assert train.info_nce(units(5, 0), units(5, 1), units(0, 2), texts, 0.05)[2] == pytest.approx(4 - 4 / 5)
    x = units(5, 0).requires_grad_()
    loss, _, negatives = train.info_nce(x[:1].expand(2, -1), units(5, 1)[:1].expand(2, -1), units(0, 2), numbers([0, 0], [7, 8]), 0.05)
    loss.backward()
    assert negatives == 0 and x.grad.abs().max() < 1e-6  # a batch of copies has nothing to tell apart


def order(sizes, batch=3, steps=40, seed=1, held=(), weights=None, one_source=False):
    return train.Order(sizes, np.array(held, np.int64), batch, steps, seed, weights, one_source)


def test_batches_are_permutations_that_a_step_number_finds():
    first = order([10])
    found = [i for step in range(40) for i in first(step)]
    assert all(sorted(found[at : at + 10]) == list(range(10)) for at in range(0, 120, 10))
    assert found[:10] != found[10:20]
    assert [i for step in (39, 7) for i in first(step)] == [i for step in (39, 7) for i in order([10])(step)]  # out of turn, and anew
    assert order([10], seed=2)(0) != first(0)
    kept = {i for step in range(40) for i in order([6, 4], held=[2, 7])(step)}
    assert kept == set(range(10)) - {2, 7}


def test_sources_are_mixed_by_their_weights():
    drawn = [order([1000, 10], 20, 200, weights=[1, 3])(step) for step in range(200)]
    assert {len(rows) for rows in drawn} == {20}
    small = [i for rows in drawn for i in rows if i >= 1000]
    assert len(small) == pytest.approx(3000, rel=0.05)
    assert all(sorted(small[at : at + 10]) == list(range(1000, 1010)) for at in range(0, 2000, 10))  # each in permutations of its own
    assert len({sum(i >= 1000 for i in rows) for rows in drawn}) > 3  # a draw, no quota


def test_a_batch_from_one_source_is_from_one_source():
    drawn = [order([300, 100], 20, 200, one_source=True)(step) for step in range(200)]
    assert all(len({i >= 300 for i in rows}) == 1 for rows in drawn)
    assert sum(rows[0] >= 300 for rows in drawn) == pytest.approx(50, abs=20)  # by size where no weights are given
    drawn = [order([300, 100], 20, 200, weights=[1, 9], one_source=True)(step) for step in range(200)]
    assert sum(rows[0] >= 300 for rows in drawn) == pytest.approx(180, abs=15)


def test_learning_rate_rises_then_falls():
    rates = [train.learning_rate(s, 100, 1.0, 0.1) for s in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1.0 and rates[10] == 1.0
    assert all(a >= b for a, b in itertools.pairwise(rates[10:])) and rates[-1] < 0.001


# ------------------------------------------------------------------------------------------------------------ gradients


def gradients(encoder: Encoder, texts: list[str]) -> dict[str, torch.Tensor]:
    tokens = encoder.tokenise(texts)
    encoder.decoder.train()
    vectors = train.embed(encoder, tokens, list(range(len(texts))))
    n = len(texts) // 2
    train.info_nce(vectors[::2], vectors[1::2], vectors[:0], apart(n), 0.05)[0].backward()
    found = {n: p.grad.clone() for n, p in encoder.trainable().items()}
    encoder.decoder.zero_grad()
    return found


@pytest.mark.parametrize("pooling", ["last", "attention"])
def test_gradients_reach_every_adapter_and_checkpointing_changes_none(model, pooling):
    texts = ["The cat sat.", "A dog stood by the road.", "Rates rose.", "The bank raised its fees again."]
    torch.manual_seed(0)
    encoder = Encoder.load(model, prompt="cluster", pooling=pooling)
    encoder.add_adapter(2)
    with torch.no_grad():
        for parameter in encoder.trainable().values():
            parameter.normal_(std=0.1)
    plain = gradients(encoder, texts)
    assert all(g.abs().max() > 0 for g in plain.values())
    assert not any(p.grad is not None for n, p in encoder.decoder.named_parameters() if "lora_" not in n)
    encoder.decoder.gradient_checkpointing_enable({"use_reentrant": False})
    again = gradients(encoder, texts)
    for name in plain:
        torch.testing.assert_close(again[name], plain[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("every", [0, 1, 2])
def test_chunks_give_the_gradient_of_the_whole_batch(model, every):
    """Double precision, dropout on: each chunk of the cached pass must draw the masks that the whole batch drew."""
    torch.manual_seed(0)
    encoder = Encoder.load(model, prompt="cluster", pooling="last", dtype=torch.float64)
    encoder.add_adapter(2, dropout=0.3)
    encoder.share_head = False
    encoder.decoder.double().train()
    train.recompute(encoder, every)
    with torch.no_grad():
        for parameter in encoder.trainable().values():
            parameter.normal_(std=0.1)
    pairs = [train.Pair(f"The cat {i}.", f"A dog stood by road {i}, waiting.", (f"fees {i}",) * (i % 3)) for i in range(7)]
    data = train.prepare(encoder, pairs)
    parts = [
        [(data.anchors, rows), (data.positives, rows), (data.negatives, [j for i in rows for j in data.hard[i]])]
        for rows in ([0, 1, 2], [3, 4], [5, 6])
    ]
    sizes = [[7], [7], [sum(map(len, data.hard))]]

    def loss_of(a, p, n):
        texts = numbers(*([data.numbers[i][k] for i in range(7)] for k in (0, 1)), [x for i in range(7) for x in data.numbers[i][2:]])
        return train.info_nce(*(F.normalize(v, dim=-1) for v in (a, p, n)), texts, 0.05)

    torch.manual_seed(5)
    vectors = [torch.cat(kind) for kind in zip(*([train.embed(encoder, *texts) for texts in part] for part in parts), strict=True)]
    loss_of(*vectors)[0].backward()
    whole = {n: p.grad.clone() for n, p in encoder.trainable().items()}
    encoder.decoder.zero_grad()
    drawn = torch.rand(1)
    torch.manual_seed(5)
    loss, _, _ = train.backward(encoder, parts, sizes, loss_of)
    assert torch.equal(torch.rand(1), drawn)  # the generators stand where the whole batch left them
    for name, parameter in encoder.trainable().items():
        torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-6, atol=1e-9)
    assert max(g.abs().max() for g in whole.values()) > 1e-3 and loss > 0


def test_memory_that_runs_out_halves_the_chunk(pairs, tmp_path, monkeypatch, capsys):
    run(*small(pairs, tmp_path / "whole"))
    embed = train.embed

    def full(encoder, tokens, rows):
        if len(rows) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return embed(encoder, tokens, rows)

    monkeypatch.setattr(train, "embed", full)
    limit = 1
    run(*small(pairs, tmp_path / "halved"))
    told = [line.split("going on with ")[1] for line in capsys.readouterr().err.splitlines() if "out of memory" in line]
    assert told == ["--gradient-checkpointing 2", "--gradient-checkpointing 1", "--chunk-size 2", "--chunk-size 1"]
    whole, halved = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("whole", "halved"))
    for name, weight in whole.items():
        torch.testing.assert_close(halved[name], weight, rtol=1e-3, atol=3e-4)  # Adam makes much of small differences
    summary = json.loads((tmp_path / "halved" / "summary.json").read_text())
    assert (summary["chunk_size"], summary["gradient_checkpointing"]) == (1, 1)
    take_on, calls = train._take_on, []

    def full_later(*args):  # in the backward pass, as usual: the temperature's graph must not be used twice
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        take_on(*args)

    monkeypatch.setattr(train, "embed", embed)
    run(*small(pairs, tmp_path / "plain", "--learn-temperature"))
    monkeypatch.setattr(train, "_take_on", full_later)
    run(*small(pairs, tmp_path / "later", "--learn-temperature"))
    plain, later = (
        [json.loads(x)["temperature"] for x in (tmp_path / n / "metrics.jsonl").read_text().splitlines()] for n in ("plain", "later")
    )
    assert plain == pytest.approx(later, rel=1e-5)
    monkeypatch.setattr(train, "embed", full)
    limit = 0
    with pytest.raises(InputError, match="a single pair does not fit into memory"):
        run(*small(pairs, tmp_path / "never"))


def test_a_batch_that_is_begun_again_draws_the_same_masks(pairs, tmp_path, monkeypatch, capsys):
    """Memory runs out in the middle of a step, after dropout has drawn; the step is repeated with fewer layers kept."""
    flags = ("--lora-dropout", 0.3, "--steps", 2)
    run(*small(pairs, tmp_path / "whole", *flags))
    embed, calls = train.embed, []

    def full(*args):
        calls.append(embed(*args))
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return calls[-1]

    monkeypatch.setattr(train, "embed", full)
    run(*small(pairs, tmp_path / "again", *flags))
    assert "going on with --gradient-checkpointing 2" in capsys.readouterr().err
    whole, again = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("whole", "again"))
    for name, weight in whole.items():
        torch.testing.assert_close(again[name], weight, rtol=1e-3, atol=1e-5)


def test_training_and_encoding_give_the_same_vectors(model):
    encoder = Encoder.load(model, prompt="cluster")
    encoder.add_adapter(2)
    texts = ["The cat sat.", "", "A dog stood by the road, waiting.", "a"]
    vectors = train.embed(encoder, encoder.tokenise(texts), [2, 0, 3, 1]).detach().numpy()
    assert abs(vectors - encoder.encode(texts)[[2, 0, 3, 1]]).max() < 1e-6


# ---------------------------------------------------------------------------------------------------------------- runs


def test_a_run_leaves_what_it_promises(pairs, tmp_path, capsys):
    out = tmp_path / "run"
    run(*small(pairs, out, "--checkpoint-every", 4, "--lr", "3e-3"))
    promised = {"adapter_model.safetensors", "adapter_config.json", "embedding.json", "arguments.json", "metrics.jsonl", "loss.png"}
    assert {p.name for p in out.iterdir()} == promised | {"checkpoint.safetensors", "checkpoint.previous.safetensors", "summary.json"}
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6]
    assert all(0 < r["negatives"] <= 3 and r["pairs_per_second"] > 0 for r in rows)
    contract = json.loads((out / "embedding.json").read_text())
    assert contract["base"] == "tiny" and contract["data"]["name"] == "pairs.jsonl" and len(contract["data"]["sha256"]) == 64
    arguments = json.loads((out / "arguments.json").read_text())
    assert arguments["arguments"]["batch_size"] == 4 and arguments["versions"]["torch"]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    encoder = Encoder.load(str(out))
    assert encoder.fingerprint == json.loads((out / "summary.json").read_text())["fingerprint"]
    assert encoder.fingerprint in capsys.readouterr().out
    assert abs(encoder.encode(["The cat."]) - encoder.untuned().encode(["The cat."])).max() > 1e-3  # it has learned something
    with pytest.raises(InputError, match="already holds a run"):
        run(*small(pairs, out))
    run(*small(pairs, out, "--lr", "3e-3", "--resume"))
    assert "is finished" in capsys.readouterr().out


def test_copies_in_a_batch_are_told_apart_from_negatives(tmp_path):
    """One anchor with four positives: nobody is a negative of anybody, there is nothing to learn."""
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"anchor": "The cat.", "positive": f"A cat {i}."}) + "\n" for i in range(4)))
    run(*small(path, tmp_path / "run", "--steps", 1))
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert row["negatives"] == 0 and row["loss"] == 0 and row["accuracy"] == 1


def test_seeds_give_different_runs_and_one_seed_the_same(pairs, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(*small(pairs, tmp_path / name, "--steps", 2, "--seed", seed))
    prints = [Encoder.load(str(tmp_path / n)).fingerprint for n in "abc"]
    assert prints[0] == prints[1] != prints[2]


def test_resuming_changes_nothing(pairs, tmp_path, monkeypatch):
    """Stopped by a signal after step 3 and resumed: the adapter is the uninterrupted one to the bit, dropout included."""
    flags = ("--lora-dropout", "0.2")
    run(*small(pairs, tmp_path / "whole", *flags))
    step = train.learning_rate

    def interrupt(number, *rest):
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(number, *rest)

    monkeypatch.setattr(train, "learning_rate", interrupt)
    with pytest.raises(SystemExit) as stopped:
        run(*small(pairs, tmp_path / "parts", *flags))
    assert stopped.value.code == 128 + signal.SIGTERM
    assert len((tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()) == 3
    Encoder.load(str(tmp_path / "parts"))  # usable as it is
    monkeypatch.setattr(train, "learning_rate", step)
    with pytest.raises(InputError, match=r"seed was 0, is 5"):
        run("--out", tmp_path / "parts", "--resume", "--seed", 5)
    with open(tmp_path / "parts" / "metrics.jsonl", "a") as f:
        f.write('{"step": 4, "lo')  # as a kill may leave it
    run("--out", tmp_path / "parts", "--resume")  # everything else is taken from the run
    whole, parts = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("whole", "parts"))
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
    losses = [[json.loads(x)["loss"] for x in (tmp_path / n / "metrics.jsonl").read_text().splitlines()] for n in ("whole", "parts")]
    assert losses[0] == losses[1]
    summaries = [json.loads((tmp_path / n / "summary.json").read_text()) for n in ("whole", "parts")]
    assert summaries[0]["fingerprint"] == summaries[1]["fingerprint"] == Encoder.load(str(tmp_path / "parts")).fingerprint


def test_a_run_cut_off_before_its_summary_is_finished_by_resuming(pairs, tmp_path):
    run(*small(pairs, tmp_path / "run", "--steps", 2))
    whole = (tmp_path / "run" / "summary.json").read_text()
    (tmp_path / "run" / "summary.json").unlink()
    run("--out", tmp_path / "run", "--resume")
    again = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert again["fingerprint"] == json.loads(whole)["fingerprint"] == Encoder.load(str(tmp_path / "run")).fingerprint
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


def test_resume_never_trains_over_what_is_there(pairs, tmp_path):
    run(*small(pairs, tmp_path / "run", "--steps", 1))
    (tmp_path / "run" / "checkpoint.safetensors").unlink()
    assert not (tmp_path / "run" / "checkpoint.previous.safetensors").exists()
    before = (tmp_path / "run" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(InputError, match=r"no checkpoint\.safetensors: it cannot go on"):
        run(*small(pairs, tmp_path / "run", "--steps", 1, "--resume"))
    assert (tmp_path / "run" / "adapter_model.safetensors").read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    for more in ((), ("--resume",)):
        with pytest.raises(InputError, match=r"mine (already holds files|holds thesis\.txt)"):
            run(*small(pairs, tmp_path / "mine", *more))
    with pytest.raises(InputError, match="is a file"):
        run(*small(pairs, tmp_path / "mine" / "thesis.txt", "--resume"))
    run(*small(pairs, tmp_path / "other", "--steps", 1))
    (tmp_path / "other" / "arguments.json").write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        run("--out", tmp_path / "other", "--resume")


def test_a_diverging_run_ends_with_an_error_and_saves_nothing(pairs, tmp_path):
    with pytest.raises(InputError, match=r"step 4: the loss is .*third time in a row: lower --lr"):
        run(*small(pairs, tmp_path / "run", "--lr", "1e30"))
    labelled = tmp_path / "labelled.jsonl"
    labelled.write_text('{"text": "a cat", "label": 1}\n{"text": "rates rose", "label": 2}\n')
    with pytest.raises(InputError, match="the probe's vectors are not finite"):
        run(*small(pairs, tmp_path / "probed", "--lr", "1e30", "--probe", labelled, "--probe-every", 1))
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_resume_needs_the_base_and_the_probe_that_the_run_began_with(pairs, llama, tmp_path):
    base, labelled = shutil.copytree(llama, tmp_path / "base"), tmp_path / "labelled.jsonl"
    labelled.write_text('{"text": "a cat", "label": 1}\n{"text": "rates rose", "label": 2}\n')
    run(*small(pairs, tmp_path / "run", "--steps", 1, "--model", base, "--probe", labelled))
    (tmp_path / "run" / "summary.json").unlink()
    labelled.write_text(labelled.read_text() + '{"text": "a dog", "label": 1}\n')
    with pytest.raises(InputError, match="probe_sha256 was"):
        run("--out", tmp_path / "run", "--resume")
    labelled.write_text("".join(labelled.read_text().splitlines(True)[:2]))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    with pytest.raises(InputError, match="base was"):
        run("--out", tmp_path / "run", "--resume")


def test_resume_clears_what_a_kill_left_in_the_middle_of_writing(pairs, tmp_path):
    """Before the first checkpoint was whole: it begins anew."""
    run(*small(pairs, tmp_path / "run", "--steps", 1))
    for path in (tmp_path / "run").iterdir():
        if path.name not in ("arguments.json", "metrics.jsonl"):
            path.unlink()
    (tmp_path / "run" / train.NEW).write_bytes(b"half")
    (tmp_path / "run" / ".adapter.tmp").mkdir()
    run(*small(pairs, tmp_path / "run", "--steps", 1, "--resume"))
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 1
    assert not list((tmp_path / "run").glob(".*"))


def test_resume_starts_afresh_where_there_is_nothing(pairs, tmp_path):
    run(*small(pairs, tmp_path / "new", "--steps", 1, "--resume"))
    assert (tmp_path / "new" / "summary.json").is_file()


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "holds 0 pairs"),
        (b'{"anchor": "a", "positive": "b"}\n', "holds 1 pairs"),
        (b'{"anchor": "a"}\n', "line 1: needs the texts 'anchor' and 'positive'"),
        (b'{"anchor": "a", "positive": "b", "negatives": 0}\n', "line 1: 'negative' must be a text"),
        (b'{"anchor": "a", "positive": "b", "x": ' + b"9" * 5000 + b"}\n", "line 1: cannot be read"),
        (b"[" * 200_000, "line 1: cannot be read"),
        (b'{"anchor": "a", "positive": "b"}\nnot json\n', "line 2: not JSON"),
        (b'["a", "b"]\n', "line 1: needs"),
        (b'{"anchor": "\xff", "positive": "b"}\n', "not UTF-8"),
        (b'{"anchor": "c", "positive": "d"}\n{"anchor": "\\ud800", "positive": "b"}\n' * 2, "line 2: half a surrogate pair"),
    ],
)
def test_bad_pairs(tmp_path, content, message):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        run(*small(path, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_bad_arguments(pairs, tmp_path):
    for flags, message in (
        (("--batch-size", 1), "must be 2 or more"),
        (("--batch-size", 100), "more than the 24 pairs"),
        (("--lr", 0), "--lr must be above 0"),
        (("--steps", 0), "--steps must be 1 or more"),
        (("--dtype", "float16"), "cannot train"),
        (("--lr", "nan"), "--lr must be above 0"),
        (("--temperature", "inf"), "--temperature must be above 0"),
        (("--warmup", 5), "--warmup must be 0 or more and below 1"),
        (("--lora-dropout", 1.5), "--lora-dropout must be 0 or more and below 1"),
        (("--lora-alpha", 0), "--lora-alpha must be above 0"),
        (("--seed", -1), "--seed must be 0 or more"),
        (("--patience", 0), "--patience must be 1 or more"),
        (("--patience", 2), "--patience needs a probe, and 24 pairs are too few"),
        (("--steps", 10**12), "more than 10 million"),
        (("--learn-temperature", "--temperature", 0.005), "starts from 0.01 or above"),
        (("--hold-out", -1), "--hold-out must be 0 or more"),
        (("--probe", tmp_path / "none.jsonl"), "no file .*none.jsonl: --probe takes"),
        (("--chunk-size", 0), "--chunk-size must be 1 or more"),
        (("--mask-above", 2), "a cosine between -1 and 1"),
        (("--matryoshka", 8, 0), "above 0"),
        (("--margin", 1), "--margin must be 0 or more and below 1"),
        (("--device", "gpu"), "unknown device 'gpu'"),
        (("--prompt", "clutser"), "unknown prompt 'clutser'"),
        (("--model", "no-such-model"), "no model 'no-such-model'"),
        (("--device", "cuda:7"), "sees no CUDA device"),
    ):
        if flags[0] == "--device" and torch.cuda.is_available():
            continue
        with pytest.raises(InputError, match=message):
            run(*small(pairs, tmp_path / "run", *flags))
    assert not (tmp_path / "run").exists()
    run(*small(pairs, tmp_path / "base", "--steps", 1))
    with pytest.raises(InputError, match="is a run: training starts from a base"):
        run(*small(pairs, tmp_path / "run", "--model", tmp_path / "base"))


def test_an_error_is_one_line_and_status_2(tmp_path):
    done = subprocess.run(
        [sys.executable, HERE / "train.py", "--pairs", tmp_path / "none.jsonl"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [f"train.py: no file {tmp_path / 'none.jsonl'}: make pairs with make_pairs.py"]


def test_hard_negatives_and_every_option_of_the_loss_reach_a_run(pairs, tmp_path):
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    path = tmp_path / "hard.jsonl"
    path.write_text(
        "".join(json.dumps(r | ({"negative": "The river."} if i % 2 else {"negatives": ["A", "B"]})) + "\n" for i, r in enumerate(rows))
    )
    more = ("--matryoshka", 8, 64, "--margin", 0.1, "--mask-above", 0.99, "--learn-temperature", "--rslora", "--dora", "--chunk-size", 2)
    more += ("--gradient-checkpointing",)
    run(*small(path, tmp_path / "run", *more))
    found = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(r["negatives"] for r in found) > 3 and found[0]["temperature"] == pytest.approx(0.05)
    assert found[-1]["temperature"] != found[0]["temperature"]
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert config["use_rslora"] and config["use_dora"]
    Encoder.load(str(tmp_path / "run"))


def test_a_step_that_is_not_finite_is_left_out_and_counted(pairs, tmp_path, monkeypatch, capsys):
    info_nce, calls = train.info_nce, []

    def broken(*args, **kwargs):
        calls.append(1)
        loss, *rest = info_nce(*args, **kwargs)
        return loss * (math.nan if len(calls) in (2, 3) else 1), *rest

    monkeypatch.setattr(train, "info_nce", broken)
    run(*small(pairs, tmp_path / "run"))
    assert capsys.readouterr().err.count("left out") == 2
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["skipped_steps"] == 2 and math.isfinite(summary["loss_last_tenth"])
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [i for i, loss in enumerate(losses) if loss is None] == [1, 2]


def test_a_damaged_checkpoint_gives_way_to_the_one_before(pairs, tmp_path, capsys):
    run(*small(pairs, tmp_path / "run", "--checkpoint-every", 2))
    whole = load_file(tmp_path / "run" / "adapter_model.safetensors")
    (tmp_path / "run" / "summary.json").unlink()
    path = tmp_path / "run" / "checkpoint.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1  # a single bit of a weight
    path.write_bytes(content)
    run("--out", tmp_path / "run", "--resume")
    told = capsys.readouterr().err
    assert "checkpoint.safetensors is damaged: going on from the one before, step 4" in told
    for name in ("checkpoint.safetensors", "checkpoint.previous.safetensors"):  # the damaged one took nobody's place
        shutil.copytree(tmp_path / "run", tmp_path / name)
        (tmp_path / name / ("checkpoint.safetensors" if "previous" in name else "checkpoint.previous.safetensors")).unlink()
        assert train.read_checkpoint(tmp_path / name)[0]["step"] in (4, 6)
    again = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert all(torch.equal(whole[k], again[k]) for k in whole)
    (tmp_path / "run" / "summary.json").unlink()
    for name in ("checkpoint.safetensors", "checkpoint.previous.safetensors"):
        (tmp_path / "run" / name).write_bytes(b"damaged")
    with pytest.raises(InputError, match="none before it is whole"):
        run("--out", tmp_path / "run", "--resume")


def test_a_full_disk_leaves_the_last_checkpoint(pairs, tmp_path, monkeypatch):
    save, calls = train.save_file, []

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise SafetensorError("No space left on device")
        return save(*args, **kwargs)

    monkeypatch.setattr(train, "save_file", full)
    with pytest.raises(InputError, match=r"No space left on device.*its last checkpoint stays"):
        run(*small(pairs, tmp_path / "run", "--checkpoint-every", 2))
    assert train.read_checkpoint(tmp_path / "run")[0]["step"] == 2
    assert not list((tmp_path / "run").glob(".*tmp*"))
    run("--out", tmp_path / "run", "--resume")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 6


def many_rows(n: int) -> list[dict]:
    return [{"anchor": f"Number {i} of the list", "positive": f"the list has {i}"} for i in range(n)]


def many(path: Path, n: int = 400) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in many_rows(n)))
    return path


def test_the_best_that_the_probe_saw_is_what_stays(tmp_path, monkeypatch, capsys):
    pairs, scores = many(tmp_path / "many.jsonl"), iter([0.1, 0.5, 0.3, 0.2, 0.9])
    monkeypatch.setattr(train.Probe, "__call__", lambda self, encoder: next(scores))
    flags = ("--probe-every", 1, "--patience", 2, "--lr", "1e-2")
    run(*small(pairs, tmp_path / "run", *flags))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["steps"], summary["best_step"], summary["probe"]) == (4, 2, {"what": "held-out accuracy", "best": 0.5, "kept": 0.5})
    assert "4 steps, kept step 2" in capsys.readouterr().out
    state, tensors = train.read_checkpoint(tmp_path / "run")
    assert {k: state[k] for k in ("step", "best", "best_step", "stale")} == {"step": 4, "best": 0.5, "best_step": 2, "stale": 2}
    encoder = Encoder.load(str(tmp_path / "run"))
    assert encoder.fingerprint == summary["fingerprint"]
    for name, weight in encoder.peft.named_parameters():
        if "lora_" in name:
            assert torch.equal(weight, tensors[f"best/{name}"])
    assert any(not torch.equal(tensors[k], tensors[k.replace("best/", "weight/")]) for k in tensors if k.startswith("best/"))
    (tmp_path / "run" / "summary.json").unlink()
    run("--out", tmp_path / "run", "--resume")  # it was over, and is not gone on with
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["fingerprint"] == summary["fingerprint"]


def test_a_run_in_bfloat16_is_probed(tmp_path):
    run(*small(many(tmp_path / "many.jsonl"), tmp_path / "run", "--dtype", "bfloat16", "--probe-every", 3))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["best_step"] in (3, 6) and 0 <= summary["probe"]["best"] <= 1


def test_the_probe_looks_at_what_is_not_trained_on(tmp_path):
    pairs = train.Pairs([many(tmp_path / "many.jsonl")])
    rows = train.hold_out(len(pairs), 256)
    assert len(rows) == len(set(rows.tolist())) == 20
    assert not len(train.hold_out(400, 0)) and not len(train.hold_out(100, 256)) and len(train.hold_out(10**6, 256)) == 256
    held = pairs[rows.tolist()]
    assert pairs.copies(rows).tolist() == rows.tolist()
    twice = tmp_path / "twice.jsonl"
    twice.write_text((tmp_path / "many.jsonl").read_text() * 2)
    assert train.Pairs([twice]).copies(rows).tolist() == [*rows, *(rows + 400)]  # neither is trained on
    assert held[0].anchor == f"Number {rows[0]} of the list"
    encoder = Encoder.load("tiny", prompt="cluster")
    accuracy = train.Probe(held, None)(encoder)
    assert 0 < accuracy <= 1 and encoder.decoder.training and encoder.n_empty == 0
    same = [train.Pair(p.anchor, p.anchor) for p in held]
    assert train.Probe(same, None)(encoder) == 1
    labelled = tmp_path / "labelled.jsonl"
    rows = [{"text": f"The {a} {i}.", "label": a} for a in ("cat sat on the mat", "bank raised its interest rate") for i in range(20)]
    labelled.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert train.Probe([], labelled)(encoder) > 0.9
    for content, message in (('{"text": "a"}', "line 1: needs 'text' and 'label'"), ('{"text": "a", "label": 1}', "two labels")):
        labelled.write_text(content + "\n")
        with pytest.raises(InputError, match=message):
            train.Probe([], labelled)


def test_files_are_read_once_and_mapped(tmp_path, monkeypatch):
    """What lies on disk under a content's hash is not read again; changed content is."""
    path, other = many(tmp_path / "many.jsonl", 50), tmp_path / "other.jsonl"
    other.write_text(
        '{"anchor": "x", "positive": "y", "negative": "z"}\n' + '{"anchor": "x", "positive": "w", "negatives": ["u", "v"]}\n' * 2
    )
    pairs = train.Pairs([path, other])
    assert (len(pairs), pairs.sizes, pairs.name) == (53, [50, 3], "many.jsonl + other.jsonl")
    assert pairs[[52, 7, 50]] == [
        train.Pair("x", "w", ("u", "v")),
        train.Pair("Number 7 of the list", "the list has 7"),
        train.Pair("x", "y", ("z",)),
    ]
    assert train.Pairs([path]).sha256 == hashlib.sha256(path.read_bytes()).hexdigest() != pairs.sha256
    read, seen = train.pair_rows, []
    monkeypatch.setattr(train, "pair_rows", lambda path: (seen.append(row) or row for row in read(path)))
    train.Pairs([path, other])
    assert len(seen) == 4  # two of each, to see that there are some
    many(path, 40)
    assert train.Pairs([path]).sizes == [40] and len(seen) > 40
    (arrow,) = Path(os.environ["HF_DATASETS_CACHE"]).glob(f"generator/*{train.Pairs([path]).sha256}*/**/*.arrow")
    content = arrow.read_bytes()
    arrow.write_bytes(content[:100])
    with pytest.raises(InputError, match=r"the cache of .*many\.jsonl is damaged .*: delete .*generator"):
        train.Pairs([path])
    arrow.write_bytes(content)
    with pytest.raises(InputError, match="the same pairs as another file"):
        train.Pairs([path, other, path])


def test_runs_on_several_files(pairs, tmp_path):
    other = many(tmp_path / "many.jsonl", 30)
    for more, message in (
        (("--weights", 1, 0), "a number above 0 for each of the 2 files"),
        (("--weights", 1), "each of the 2 files"),
        (("--same-source-batches", "--batch-size", 26), "more than the 24 pairs of the smallest file"),
    ):
        with pytest.raises(InputError, match=message):
            run(*small(pairs, tmp_path / "run", "--pairs", pairs, other, *more))
    with pytest.raises(InputError, match="needs several files"):
        run(*small(pairs, tmp_path / "run", "--same-source-batches"))
    run(*small(pairs, tmp_path / "run", "--pairs", pairs, other, "--weights", 1, 2, "--same-source-batches"))
    contract = json.loads((tmp_path / "run" / "embedding.json").read_text())
    assert contract["data"]["name"] == "pairs.jsonl + many.jsonl"
    (tmp_path / "run" / "summary.json").unlink()
    run("--out", tmp_path / "run", "--resume")
    with pytest.raises(InputError, match="weights was"):
        run("--out", tmp_path / "run", "--resume", "--weights", 1, 1)


def test_a_learned_query_is_trained_and_saved_with_the_adapter(pairs, tmp_path):
    flags = ("--pooling", "query", "--scope", "all", "--lr", "1e-2")
    run(*small(pairs, tmp_path / "run", *flags))
    query = load_file(tmp_path / "run" / "pooling.safetensors")["query"]
    assert query.shape == (1, 384) and query.abs().max() > 0.01
    encoder = Encoder.load(str(tmp_path / "run"))
    assert torch.equal(encoder.query, query)
    assert encoder.fingerprint == json.loads((tmp_path / "run" / "summary.json").read_text())["fingerprint"]
    mean = Encoder.load("tiny", prompt="cluster", pooling="mean", scope="all").encode(["The cat sat."])
    assert abs(encoder.untuned().encode(["The cat sat."]) - mean).max() < 1e-5  # nothing learned: the mean
    assert abs(encoder.encode(["The cat sat."]) - mean).max() > 1e-3
    (tmp_path / "run" / "summary.json").unlink()
    run("--out", tmp_path / "run", "--resume")
    assert torch.equal(load_file(tmp_path / "run" / "pooling.safetensors")["query"], query)
    before = encoder.fingerprint
    save_file({"query": query + 1}, tmp_path / "run" / "pooling.safetensors")
    assert Encoder.load(str(tmp_path / "run")).fingerprint != before
    (tmp_path / "run" / "pooling.safetensors").unlink()
    with pytest.raises(InputError, match=r"pooling\.safetensors is missing or damaged"):
        Encoder.load(str(tmp_path / "run"))


@pytest.mark.parametrize("bias", [False, True])
def test_the_fused_adapter_is_that_of_peft(bias):
    """Double precision, by finite differences and against peft's own layer; the base gets no gradient."""
    torch.manual_seed(0)
    base = torch.nn.Linear(6, 5, bias=bias).double()
    model = get_peft_model(torch.nn.Sequential(base), LoraConfig(r=3, lora_alpha=6, target_modules=["0"]))
    layer = model.base_model.model[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    for weight in (a, b):
        weight.data = torch.randn_like(weight, dtype=torch.float64)
    weight, offset = base.weight, base.bias
    x = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, a, b: train.LoRALinear.apply(x, weight, offset, a, b, 2.0), (x, a, b))
    expected = layer(x)
    wanted = torch.autograd.grad(expected.square().sum(), (x, a, b))
    train.fuse_adapter(types.SimpleNamespace(decoder=model))
    assert "forward" in vars(layer)
    found = layer(x)
    torch.testing.assert_close(found, expected)
    for mine, its in zip(torch.autograd.grad(found.square().sum(), (x, a, b)), wanted, strict=True):
        torch.testing.assert_close(mine, its)
    assert not weight.requires_grad
    with model.disable_adapter():
        torch.testing.assert_close(layer(x), base(x))


def test_adapters_that_are_more_than_a_product_stay_as_they_are(llama):
    for options in ({"dropout": 0.1}, {"use_dora": True}):
        encoder = Encoder.load(llama)
        encoder.add_adapter(2, **options)
        train.fuse_adapter(encoder)
        assert not any("forward" in vars(m) for m in encoder.decoder.modules())


@pytest.mark.parametrize("every", [2, 1])
def test_every_nth_layer_is_computed_again(model, every):
    encoder = Encoder.load(model, prompt="cluster")
    train.recompute(encoder, every)
    assert [b.gradient_checkpointing for b in encoder.blocks] == {2: [False, True, False], 1: [True] * 3}[every]
    train.recompute(encoder, 0)
    assert not any(b.gradient_checkpointing for b in encoder.blocks)


def test_what_is_not_installed_is_named(pairs, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in ("bitsandbytes", "wandb") else find(name, *a))
    with pytest.raises(InputError, match="quantize nf4 needs the package bitsandbytes: pip install"):
        run(*small(pairs, tmp_path / "run", "--quantize", "nf4"))
    with pytest.raises(InputError, match="--track wandb needs the package wandb: pip install wandb"):
        run(*small(pairs, tmp_path / "run", "--track", "wandb"))
    with pytest.raises(InputError, match="start them with torchrun"):
        run(*small(pairs, tmp_path / "run", "--fsdp"))
    assert not (tmp_path / "run").exists()


def test_every_step_is_tracked(pairs, tmp_path, monkeypatch):
    """With a stand-in for wandb, whose package is optional: same numbers, and a resumed run goes on under the same id."""
    seen, begun = [], []

    class Run:
        def log(self, row, step):
            seen.append((step, row["loss"]))

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **k: begun.append(k) or Run(), __spec__=1))
    run(*small(pairs, tmp_path / "run", "--track", "wandb", "--checkpoint-every", 4))
    rows = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert seen == [(row["step"], row["loss"]) for row in rows]
    os.replace(tmp_path / "run" / "checkpoint.previous.safetensors", tmp_path / "run" / "checkpoint.safetensors")
    (tmp_path / "run" / "summary.json").unlink()
    run("--out", tmp_path / "run", "--resume")
    assert [step for step, _ in seen] == [1, 2, 3, 4, 5, 6, 5, 6] and begun[0]["id"] == begun[1]["id"]
    assert begun[0]["config"]["batch_size"] == 4


def test_energy_is_counted_where_the_device_tells_it(pairs, tmp_path, monkeypatch):
    """With a stand-in for NVML, which counts in millijoules; one watt-hour is 3,600 joules."""
    assert train.joules(torch.device("cpu")) is None

    class NVMLError(Exception):
        pass

    def consumption(handle):
        if handle != "GPU-0a1b":
            raise NVMLError
        return 7_200_000

    nvml = types.SimpleNamespace(nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=str, NVMLError=NVMLError, __spec__=1)
    nvml.nvmlDeviceGetTotalEnergyConsumption = consumption
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="0a1b"))
    assert train.joules(torch.device("cuda:0")) == 7200
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="other"))
    assert train.joules(torch.device("cuda:0")) is None
    told = iter([100.0, 1000.0, 3700.0])
    monkeypatch.setattr(train, "joules", lambda device: next(told))
    run(*small(pairs, tmp_path / "run", "--steps", 2))
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["energy_wh"] == 1


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_quantised_base_is_trained_and_read_as_such(pairs, tmp_path, quantize):
    pytest.importorskip("bitsandbytes")
    run(*small(pairs, tmp_path / "run", "--quantize", quantize, "--dtype", "bfloat16"))
    encoder = Encoder.load(str(tmp_path / "run"), dtype="bfloat16")
    assert encoder.contract.quantize == quantize
    assert encoder.fingerprint == json.loads((tmp_path / "run" / "summary.json").read_text())["fingerprint"]
    plain = Encoder.load("tiny", prompt="cluster", dtype="bfloat16").encode(["The cat sat."])
    moved = 1 - (encoder.untuned().encode(["The cat sat."]) * plain).sum()
    assert 1e-6 < moved < 0.2
    assert encoder.merge() == 0 and not encoder.merged


def torchrun(*flags, n: int = 2) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n), "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, str(HERE / "train.py"), *map(str, flags)], env=environment, capture_output=True, text=True, check=False
    )


def test_of_adapters_that_cannot_be_told_apart_the_latest_stays(tmp_path, monkeypatch):
    """20 held-out pairs: an accuracy of 0.5 has a standard error of 0.11."""
    pairs, scores = many(tmp_path / "many.jsonl"), iter([0.1, 0.5, 0.4, 0.38])
    monkeypatch.setattr(train.Probe, "__call__", lambda self, encoder: next(scores))
    run(*small(pairs, tmp_path / "run", "--probe-every", 1, "--steps", 4))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["best_step"] == 3 and summary["probe"] == {"what": "held-out accuracy", "best": 0.5, "kept": 0.4}


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--fsdp", "--gradient-checkpointing", 2)])
def test_two_processes_train_as_one(pairs, tmp_path, more):
    """Hard negatives that only some pairs have, a learned query, chunks; the base whole in each process, or dealt out."""
    rows = [json.loads(line) | {"negatives": ["A river."] * (i % 3)} for i, line in enumerate(pairs.read_text().splitlines())]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows + many_rows(20)))
    flags = ("--steps", 5, "--learn-temperature", "--chunk-size", 2, "--pooling", "query", "--hold-out", 0, "--batch-size", 8)
    labelled = tmp_path / "labelled.jsonl"
    labelled.write_text(
        "".join(json.dumps({"text": f"The {a} {i}.", "label": a}) + "\n" for a in ("cat sat", "rate rose") for i in range(5))
    )
    flags += ("--probe", labelled, "--probe-every", 5)
    run(*small(pairs, tmp_path / "one", *flags))
    done = torchrun(*small(pairs, tmp_path / "two", *flags, *more))
    assert done.returncode == 0, done.stderr
    for name in ("adapter_model", "pooling"):
        one, two = (load_file(tmp_path / n / f"{name}.safetensors") for n in ("one", "two"))
        for name, weight in one.items():
            torch.testing.assert_close(two[name], weight, rtol=1e-4, atol=1e-4)  # of steps of 1e-2
    losses = [[json.loads(x)["loss"] for x in (tmp_path / n / "metrics.jsonl").read_text().splitlines()] for n in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 5
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["processes"] == 2


@pytest.mark.slow
def test_two_processes_go_on_to_the_bit(pairs, tmp_path):
    """Dropout draws other masks in each process: both generators come back."""
    flags = ("--lora-dropout", 0.3, "--checkpoint-every", 3)
    assert torchrun(*small(pairs, tmp_path / "run", *flags)).returncode == 0
    whole = load_file(tmp_path / "run" / "adapter_model.safetensors")
    os.replace(tmp_path / "run" / "checkpoint.previous.safetensors", tmp_path / "run" / "checkpoint.safetensors")
    (tmp_path / "run" / "summary.json").unlink()
    assert torchrun("--out", tmp_path / "run", "--resume").returncode == 0
    parts = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert all(torch.equal(whole[k], parts[k]) for k in whole)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_in_hand(pairs, tmp_path, number):
    """A process of its own, told to stop once it has written some steps: a usable adapter, no traceback."""
    flags = [str(f) for f in small(pairs, tmp_path / "run", "--steps", 4000, "--checkpoint-every", 5)]
    process = subprocess.Popen(
        [sys.executable, str(HERE / "train.py"), *flags], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 12:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(number)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 128 + number
    assert "Traceback" not in error and not list((tmp_path / "run").glob(".*tmp*"))
    Encoder.load(str(tmp_path / "run"))


KILLED = """
import os, runpy, signal, sys
left = int(sys.argv.pop(1))
def hook(event, arguments):  # every file that the run opens, renames or removes is a moment
    global left
    if event in ("open", "os.rename", "os.remove") and RUN in str(arguments[0]):
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
RUN = sys.argv[sys.argv.index("--out") + 1]
sys.addaudithook(hook)
sys.argv[0] = "train.py"
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_as_if_nothing_had_happened(pairs, tmp_path):
    """kill -9 at random moments, of which many lie within the writing of a checkpoint, with dropout and a learned temperature."""
    flags = [
        str(f) for f in small(pairs, tmp_path / "run", "--steps", 12, "--checkpoint-every", 2, "--lora-dropout", 0.2, "--learn-temperature")
    ]
    rng, kills = random.Random(0), 0
    moments = [*rng.sample(range(1, 26), 9), 10**9]
    for moment in moments:
        command = [sys.executable, "-c", KILLED, str(moment), str(HERE / "train.py"), *flags, "--resume"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        kills += done.returncode != 0
    assert kills >= 5
    run(*small(pairs, tmp_path / "whole", *flags[len(small(pairs, "")) :]))
    whole, parts = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("whole", "run"))
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 13))
