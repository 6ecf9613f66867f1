import gzip
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
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from encoder import Encoder

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE / "models"))
import pretrain  # noqa: E402, a script beside its model

WORDS = ["bank", "river", "loan", "money", "boat", "water", "rate", "stream", "the", "a", "of", "to", "flows", "pays", "7", "naïve"]


def document(rng: random.Random) -> str:
    sentences = (" ".join(rng.choices(WORDS, k=rng.randint(4, 12))).capitalize() + "." for _ in range(rng.randint(2, 6)))
    return "\n".join(sentences)


@pytest.fixture
def texts(tmp_path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    rng = random.Random(0)
    for name in ("news_00", "news_01", "talk_00"):
        with gzip.open(folder / f"{name}.txt.gz", "wt", encoding="utf-8") as f:
            f.write("\n\n".join(document(rng) for _ in range(120)) + "\n")
    return folder


def small(texts, out, *more) -> list[str]:
    flags = {"--vocabulary": 300, "--hidden": 32, "--layers": 2, "--heads": 2, "--mlp": 48, "--positions": 256, "--batch-tokens": 512}
    flags |= {
        "--texts": texts,
        "--out": out,
        "--steps": 6,
        "--checkpoint-every": 2,
        "--evaluate-every": 4,
        "--hold-out": 2000,
        "--chunk": 64,
    }
    return [str(x) for pair in flags.items() for x in pair] + ["--no-docstrings", *map(str, more)]


def run(*flags) -> None:
    pretrain.main(pretrain.parse([str(f) for f in flags]))


def documents(path: Path) -> list[str]:
    with gzip.open(path, "rt", encoding="utf-8") as f:
        return f.read().strip().split("\n\n")


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------------- text


def test_a_text_that_is_kept_out_is_found_by_line_sentence_or_whole():
    keys = {pretrain.key(t) for t in ("Return the mean of x.", "one two three", "Is it? Yes it is.")}
    for held in (
        "return the mean of X",
        "First. Return the mean of x. Last.",
        "a\nOne, two - three!\nb",
        "No.\nIs it? Yes it is. More.",
        "one\ntwo\nthree",
    ):
        assert pretrain.holds(held, keys), held
    for free in ("Return the mean of x and y.", "one two", "", "Yes it is."):
        assert not pretrain.holds(free, keys), free


def test_pieces_are_the_text():
    text = "some words of a text " * 9 + "x" * 75
    pieces = pretrain.cut(text, 50)
    assert "".join(pieces) == text and all(0 < len(p) <= 50 for p in pieces)
    assert pretrain.cut("", 50) == [""] and pretrain.cut(" " + "y" * 60, 50)[0] == " " + "y" * 49


def test_packing_holds_out_whole_documents_of_every_domain(texts, tmp_path):
    excluded = tmp_path / "evaluation.jsonl"
    first = documents(texts / "news_00.txt.gz")[0]
    excluded.write_text(json.dumps({"text": first.split("\n")[1].upper()}) + "\n")
    run(*small(texts, tmp_path / "out", "--pack-only", "--exclude", excluded))
    ids, text = pretrain.read_packed(tmp_path / "out" / "training" / "tokens.safetensors")
    tokenizer = pretrain.hub_tokenizer(text["tokenizer"], 256)
    trained = tokenizer.decode(ids.tolist()).replace("</s>", "").split("<s>")[1:]
    assert set(text["counts"]) == set(text["held_out"]) == {"news", "talk"}
    assert sum(c["documents"] for c in text["counts"].values()) == len(trained)
    assert sum(c["bytes"] for c in text["counts"].values()) == sum(len(t.encode()) for t in trained)
    every = {d for f in texts.iterdir() for d in documents(f)}
    assert set(trained) < every and first not in trained
    joined = "\n\n".join(trained)
    for pieces in text["held_out"].values():
        assert pieces and not any(p in joined for p in pieces)
        assert sum(map(len, pieces)) <= 2000 + pretrain.PIECE


def test_the_tokenizer_reads_everything_and_splits_numbers():
    tokenizer = pretrain.train_tokenizer(["the bank pays 2024 dollars"] * 50, 300)
    assert [tokenizer.token_to_id(t) for t in ("<s>", "</s>")] == [0, 1]
    for text in ("naïve 北京 \U0001f600\t\n", "2024", " x"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert len(tokenizer.encode("2024").ids) == 4


def test_docstrings_leave_the_evaluation_modules_out(tmp_path, monkeypatch):
    (tmp_path / "pkg" / "tests").mkdir(parents=True)
    for name, doc in (
        ("kept", "Kept as it is."),
        ("task", "Of a task's module."),
        ("tests/no", "A test."),
        ("quotes", "First. The sentence of a task. Last."),
    ):
        (tmp_path / "pkg" / f"{name}.py").write_text(f'"""{doc}"""\nraise RuntimeError("must not be run")\n')
    (tmp_path / "pkg" / "broken.py").write_text("def (")
    excluded = tmp_path / "task.jsonl"
    excluded.write_text(json.dumps({"text": "The sentence of a task.", "module": "pkg.task"}) + "\n")
    monkeypatch.setattr(pretrain.sysconfig, "get_paths", lambda: {"purelib": str(tmp_path), "stdlib": str(tmp_path / "none")})
    modules, keys = pretrain.read_excluded([excluded])
    found = [d for job in pretrain.source_files() for d in pretrain.read_module(job, modules, keys)]
    assert found == ["Kept as it is."]


# --------------------------------------------------------------------------------------------------------- training


def test_an_epoch_reads_each_window_once():
    ids = torch.arange(1000, dtype=torch.int32)
    per_epoch = ((len(ids) - 1) // 10 - 1) // 4
    for epoch in (0, 3):
        batches = [pretrain.windows(ids, 10, 4, step, 0) for step in range(epoch * per_epoch, (epoch + 1) * per_epoch)]
        assert all(b.shape == (4, 11) for b in batches)
        rows = torch.cat(batches)
        assert torch.equal(rows.diff(dim=1), torch.ones(len(rows), 10, dtype=torch.long))
        assert rows[:, :-1].unique().numel() == rows[:, :-1].numel() >= 900
    assert not torch.equal(pretrain.windows(ids, 10, 4, 0, 0), pretrain.windows(ids, 10, 4, per_epoch, 0))
    assert not torch.equal(pretrain.windows(ids, 10, 4, 0, 0), pretrain.windows(ids, 10, 4, 0, 1))


def test_the_rate_rises_stays_and_ends_at_zero():
    shares = [pretrain.rate(p / 1000, 0.6) for p in range(1001)]
    assert 0 < shares[0] < 0.1 and shares[30] == shares[399] == 1 and shares[-1] == 0
    assert all(a >= b for a, b in itertools.pairwise(shares[20:]))


@pytest.mark.parametrize("chunk", [7, 16, 1000])
def test_gradients_are_those_of_the_whole_batch(chunk):
    args = pretrain.parse(["--hidden", "32", "--layers", "2", "--heads", "2", "--mlp", "48", "--positions", "16", "--chunk", str(chunk)])
    args.device, args.dtype = torch.device("cpu"), "float32"
    model = pretrain.build_model(args, 300).double()
    batch = torch.randint(300, (3, 17), generator=torch.Generator().manual_seed(0))
    logits = model(input_ids=batch[:, :-1]).logits  # the library's own loss is in float32
    loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    losses = lambda s, t: F.cross_entropy(model.lm_head(s), t, reduction="none")  # noqa: E731, in float64
    assert math.isclose(pretrain.step_gradients(model, losses, batch, args), loss.item(), rel_tol=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-12)


def test_bits_per_byte_of_a_model_that_knows_nothing(texts, tmp_path):
    """Equal logits cost log2(vocabulary) bits a token, whatever the batch's padding."""
    run(*small(texts, tmp_path / "out", "--steps", 1))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    held_out = {"a": ["the bank pays", "naïve"], "b": ["a river " * 30]}
    alone = {k: pretrain.bits_per_byte(model, tokenizer, {k: v})[k] for k, v in held_out.items()}
    one_by_one = pretrain.bits_per_byte(model, tokenizer, held_out, batch_tokens=1)
    assert alone == pytest.approx(one_by_one, rel=1e-5) and pretrain.bits_per_byte(model, tokenizer, held_out) == pytest.approx(
        alone, rel=1e-5
    )
    ids = tokenizer(held_out["b"][0])["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == 0
    logits = model(torch.tensor([ids])).logits[0, :-1]
    by_hand = F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum").item() / math.log(2) / len(held_out["b"][0])
    assert alone["b"] == pytest.approx(by_hand, rel=1e-5)
    model.lm_head.weight.data.zero_()
    for name, pieces in held_out.items():
        tokens = sum(len(tokenizer(p, add_special_tokens=False)["input_ids"]) for p in pieces)
        expected = tokens * math.log2(300) / sum(len(p.encode()) for p in pieces)
        assert pretrain.bits_per_byte(model, tokenizer, held_out)[name] == pytest.approx(expected, rel=1e-6)


def test_training_learns_and_leaves_a_standard_model(texts, tmp_path, capsys):
    out = tmp_path / "out"
    run(*small(texts, out, "--architecture", "qwen3", "--kv-heads", 1, "--untie", "--steps", 30, "--lr", 0.01, "--max-shard-mb", 1))
    rows = lines(out / "training" / "metrics.jsonl")
    assert [r["step"] for r in rows] == list(range(1, 31)) and rows[-1]["loss"] < rows[0]["loss"] - 0.5
    assert set(rows[3]["bits_per_byte"]) == {"news", "talk"} and "bits_per_byte" not in rows[4]
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16 and model.config.model_type == "qwen3" and not model.config.tie_word_embeddings
    summary = json.loads((out / "training" / "summary.json").read_text())
    assert summary["tokens"] == 30 * 512 and summary["parameters"] == sum(p.numel() for p in model.parameters())
    assert summary["bits_per_byte"]["news"] < rows[3]["bits_per_byte"]["news"]
    vectors = Encoder.load(str(out), prompt="cluster", pooling="last").encode(["the bank", "a river"])
    assert vectors.shape == (2, 32)
    run("--score", out, "--tokens", out / "training" / "tokens.safetensors")
    assert f"{summary['bits_per_byte']['news']:.3f}" in capsys.readouterr().out


def test_weights_come_in_shards_when_asked(texts, tmp_path):
    flags = ("--hidden", 256, "--mlp", 512, "--steps", 1, "--max-shard-mb", 1)
    run(*small(texts, tmp_path / "out", *flags))
    shards = list((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 1 and all(s.stat().st_size < 1.2e6 for s in shards)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert Encoder.load(str(tmp_path / "out")).encode(["x"]).shape == (1, 256)


def test_a_resumed_run_ends_with_the_same_weights(texts, tmp_path, monkeypatch):
    run(*small(texts, tmp_path / "whole", "--pack-only"))
    tokens = tmp_path / "whole" / "training" / "tokens.safetensors"
    flags = ("--tokens", tokens)
    run(*small(texts, tmp_path / "one", *flags))
    save = pretrain.save_checkpoint

    def interrupted(path, *rest):
        save(path, *rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrain, "save_checkpoint", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(*small(texts, tmp_path / "two", *flags))
    monkeypatch.setattr(pretrain, "save_checkpoint", save)
    with open(tmp_path / "two" / "training" / "metrics.jsonl", "a") as f:
        f.write('{"step": 3, "lo')  # as a kill may leave it
    run("--out", tmp_path / "two", "--resume")
    one, two = (load_file(tmp_path / n / "training" / "checkpoint.safetensors") for n in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert any(k.startswith("muon/") for k in one) and any(k.startswith("adamw/") for k in one)
    losses = [[r["loss"] for r in lines(tmp_path / n / "training" / "metrics.jsonl")] for n in ("one", "two")]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    before = (tmp_path / "one" / "model.safetensors").read_bytes()
    assert before == (tmp_path / "two" / "model.safetensors").read_bytes()
    run("--out", tmp_path / "one", "--resume")  # nothing to do
    assert before == (tmp_path / "one" / "model.safetensors").read_bytes()
    (tmp_path / "one" / "training" / "arguments.json").write_text("{")
    with pytest.raises(pretrain.InputError, match=r"arguments\.json is damaged"):
        run("--out", tmp_path / "one", "--resume")
    shutil.copytree(tmp_path / "two" / "training", tmp_path / "three" / "training")
    for name in ("summary.json", "arguments.json"):
        (tmp_path / "three" / "training" / name).unlink()
    with pytest.raises(pretrain.InputError, match="cannot go on without the text"):
        run(*small(texts, tmp_path / "three", "--resume"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--out", "{tmp}/x"), "either --steps or --minutes"),
        (("--steps", 1), "--out is missing"),
        (("--out", "{tmp}/x", "--steps", 1, "--texts", "{tmp}"), "holds no .txt.gz"),
        (("--out", "{tmp}/x", "--steps", 1, "--tokens", "{tmp}/no"), "no file"),
        (("--out", "{tmp}/texts", "--steps", 1), "is there already"),
        (("--out", "{tmp}/x", "--steps", 1, "--hidden", 100, "--heads", 3), "must be an even multiple"),
        (("--out", "{tmp}/x", "--steps", 1, "--vocabulary", 70000), "from 300 to 65536"),
        (("--out", "{tmp}/x", "--steps", 1, "--lr", -1), "--lr must be above 0"),
        (("--out", "{tmp}/x", "--steps", 1, "--batch-tokens", 1000), "a multiple of --positions"),
        (("--out", "{tmp}/x", "--steps", 1, "--tokens", "{tmp}/bad.safetensors"), "is not a packed file"),
        (("--out", "{tmp}/x", "--steps", 1, "--texts", "{tmp}/damaged", "--no-docstrings"), "is damaged"),
        (("--score", "{tmp}/no", "--tokens", "{tmp}/bad.safetensors"), "is not a packed file"),
        (("--score", "models/tiny"), "--score needs --tokens"),
        (("--out", "{tmp}/x", "--steps", 1, "--exclude", "{tmp}/bad.safetensors"), "is not JSONL with a column 'text'"),
    ],
)
def test_bad_input_is_named(texts, tmp_path, flags, message):
    (tmp_path / "bad.safetensors").write_text("nothing of the kind")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "a_00.txt.gz").write_bytes((texts / "news_00.txt.gz").read_bytes()[:200])
    with pytest.raises(pretrain.InputError, match=message):
        run(*(f.format(tmp=tmp_path) if isinstance(f, str) else f for f in flags))
    assert not list((tmp_path / "x").glob("**/tokens*")) if (tmp_path / "x").exists() else True


@pytest.mark.slow
def test_a_killed_run_goes_on(texts, tmp_path):
    """A process of its own, killed with -9 once it has written some steps; resumed to the end, equal to the whole run."""
    flags = small(texts, tmp_path / "run", "--steps", 60, "--checkpoint-every", 5)
    command = [sys.executable, str(HERE / "models" / "pretrain.py")]
    process = subprocess.Popen([*command, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
    metrics = tmp_path / "run" / "training" / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 13:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    subprocess.run([*command, "--out", str(tmp_path / "run"), "--resume"], check=True, capture_output=True)
    run(*small(texts, tmp_path / "whole", "--steps", 60, "--checkpoint-every", 7))
    one, two = (load_file(tmp_path / n / "training" / "checkpoint.safetensors") for n in ("whole", "run"))
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert [r["step"] for r in lines(metrics)] == list(range(1, 61))


@pytest.mark.slow
def test_bad_input_exits_with_2_and_one_line(tmp_path):
    done = subprocess.run([sys.executable, str(HERE / "models" / "pretrain.py"), "--out", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: give either") and done.stderr.count("\n") == 1
