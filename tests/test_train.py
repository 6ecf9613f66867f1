import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

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


def test_info_nce_by_hand():
    """Two pairs, similarities 1 and 0 at temperature 1: each direction costs -log(e / (e + 1))."""
    a = torch.eye(2)
    loss, accuracy = train.info_nce(a, a, torch.zeros(2, 2, dtype=torch.bool), 1.0)
    assert loss.item() == pytest.approx(-torch.tensor(torch.e / (torch.e + 1)).log().item(), abs=1e-6)
    assert accuracy == 1
    loss, accuracy = train.info_nce(a, a.flip(0), torch.zeros(2, 2, dtype=torch.bool), 1.0)
    assert loss.item() == pytest.approx(-torch.tensor(1 / (torch.e + 1)).log().item(), abs=1e-6)
    assert accuracy == 0


def test_duplicates_are_no_negatives():
    """Pairs 0 and 1 share an anchor, 2's positive is 3's anchor; 4 stands alone."""
    same = train.shared_texts(torch.tensor([0, 0, 1, 2, 5]), torch.tensor([7, 8, 2, 3, 6]))
    expected = torch.zeros(5, 5, dtype=torch.bool)
    expected[0, 1] = expected[1, 0] = expected[2, 3] = expected[3, 2] = True
    assert torch.equal(same, expected)
    x = F.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)), dim=-1).requires_grad_()
    p = F.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(1)), dim=-1)
    train.info_nce(x[:1].expand(2, -1), torch.stack([p[0], p[0]]), torch.tensor([[False, True], [True, False]]), 0.05)[0].backward()
    assert x.grad.abs().max() < 1e-6  # a batch of copies has nothing to tell apart


def test_batches_are_permutations_that_a_step_number_finds():
    first = [train.batch_rows(10, 3, step, seed=1) for step in range(3)]
    assert len({i for rows in first for i in rows}) == 9
    assert [train.batch_rows(10, 3, step, seed=1) for step in range(3)] == first
    assert train.batch_rows(10, 3, 3, seed=1) != first[0]  # the next epoch
    assert train.batch_rows(10, 3, 0, seed=2) != first[0]


def test_learning_rate_rises_then_falls():
    rates = [train.learning_rate(s, 100, 1.0, 0.1) for s in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1.0 and rates[10] == 1.0
    assert all(a >= b for a, b in itertools.pairwise(rates[10:])) and rates[-1] < 0.001


# ------------------------------------------------------------------------------------------------------------ gradients


def gradients(encoder: Encoder, texts: list[str]) -> dict[str, torch.Tensor]:
    tokens = encoder.tokenise(texts)
    encoder.decoder.train()
    vectors = train.embed(encoder, tokens, list(range(len(texts))))
    loss, _ = train.info_nce(vectors[::2], vectors[1::2], torch.zeros(len(texts) // 2, len(texts) // 2, dtype=torch.bool), 0.05)
    loss.backward()
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
    assert {p.name for p in out.iterdir()} == promised | {"checkpoint.safetensors", "summary.json"}
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
    with pytest.raises(InputError, match=r"step \d: the loss is .*lower --lr"):
        run(*small(pairs, tmp_path / "run", "--lr", "1e30"))
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_resume_starts_afresh_where_there_is_nothing(pairs, tmp_path):
    run(*small(pairs, tmp_path / "new", "--steps", 1, "--resume"))
    assert (tmp_path / "new" / "summary.json").is_file()


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "holds 0 pairs"),
        (b'{"anchor": "a", "positive": "b"}\n', "holds 1 pairs"),
        (b'{"anchor": "a"}\n', "line 1: needs the texts 'anchor' and 'positive'"),
        (b'{"anchor": "a", "positive": "b"}\nnot json\n', "line 2: not JSON"),
        (b'["a", "b"]\n', "line 1: needs"),
        (b'{"anchor": "\xff", "positive": "b"}\n', "not UTF-8"),
        (b'{"anchor": "\\ud800", "positive": "b"}\n{"anchor": "c", "positive": "d"}\n' * 2, "text 0 holds half a surrogate pair"),
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


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_killed_run_leaves_a_usable_adapter_and_goes_on(pairs, tmp_path, number):
    """A process of its own, killed once it has written some steps; then resumed to the end, equal to the whole run."""
    flags = [str(f) for f in small(pairs, tmp_path / "run", "--steps", 40, "--checkpoint-every", 5)]
    process = subprocess.Popen(
        [sys.executable, str(HERE / "train.py"), *flags], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 12:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(number)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    assert "Traceback" not in error
    assert not list((tmp_path / "run").glob(".*tmp*")) or number == signal.SIGKILL
    Encoder.load(str(tmp_path / "run"))
    subprocess.run([sys.executable, str(HERE / "train.py"), *flags, "--resume"], check=True, capture_output=True)
    run(*small(pairs, tmp_path / "whole", "--steps", 40, "--checkpoint-every", 5))
    whole, parts = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("whole", "run"))
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, 41))
