import gzip
import itertools
import json
import math
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from encoder import Encoder
from files.console import InputError
from models import packed_text

HERE = Path(__file__).resolve().parent.parent
SCRIPT = HERE / "models" / "pretrain.py"
sys.path.insert(0, str(SCRIPT.parent))
import pretrain  # noqa: E402, a script beside its model

WORDS = ["bank", "river", "loan", "money", "boat", "water", "rate", "stream", "the", "a", "of", "to", "flows", "pays", "7", "naïve"]


def make_document(rng: random.Random) -> str:
    sentences = (" ".join(rng.choices(WORDS, k=rng.randint(4, 12))).capitalize() + "." for _ in range(rng.randint(2, 6)))
    return "\n".join(sentences)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """A folder with three files of two domains."""
    folder = tmp_path_factory.mktemp("texts")
    rng = random.Random(0)
    for name in ("news_00", "news_01", "talk_00"):
        with gzip.open(folder / f"{name}.txt.gz", "wt", encoding="utf-8") as f:
            f.write("\n\n".join(make_document(rng) for _ in range(120)) + "\n")
    return folder


@pytest.fixture(scope="module")
def tokens(texts, tmp_path_factory) -> Path:
    """The packed file of `texts`."""
    out = tmp_path_factory.mktemp("packed")
    run(*small("--texts", texts, "--out", out, "--pack-only"))
    return out / "training" / packed_text.TOKENS_FILE


def small(*flags) -> list[str]:
    """Flags of a small model and a short run, then the flags given."""
    defaults = {"--vocabulary": 300, "--hidden": 32, "--layers": 2, "--heads": 2, "--mlp": 48, "--positions": 256, "--batch-tokens": 512}
    defaults |= {"--steps": 6, "--checkpoint-every": 2, "--evaluate-every": 4, "--hold-out": 2000, "--chunk": 64}
    return [str(x) for pair in defaults.items() for x in pair] + ["--no-docstrings", *map(str, flags)]


def run(*flags) -> None:
    pretrain.main(pretrain.parse([str(f) for f in flags]))


def read_documents(path: Path) -> list[str]:
    with gzip.open(path, "rt", encoding="utf-8") as f:
        return f.read().strip().split("\n\n")


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def same_tensors(one: Path, other: Path) -> bool:
    one, other = load_file(one), load_file(other)
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


# ------------------------------------------------------------------------------------------------------------- text


def test_pieces_together_are_the_text():
    text = "some words of a text " * 9 + "x" * 75
    pieces = packed_text.cut_pieces(text, 50)
    assert "".join(pieces) == text and all(0 < len(p) <= 50 for p in pieces)
    assert packed_text.cut_pieces("", 50) == [""] and packed_text.cut_pieces(" " + "y" * 60, 50)[0] == " " + "y" * 49


def test_held_out_documents_have_about_as_many_characters_as_asked():
    documents = [c * 300 for c in "abcdefghijklmnopqrstuvwxyzABCD"]
    assert packed_text.hold_out(documents, 500) == (documents[:1], documents[2:])  # one piece is enough; the rest is not used
    assert packed_text.hold_out(documents, 10_000) == (documents[:3], documents[3:])  # a tenth of the documents at most
    assert packed_text.hold_out(documents[:2], 10_000) == (documents[:1], documents[1:2])  # one document at least
    assert packed_text.hold_out(["x" * 10_000, "y"], 1300) == (["x" * 600] * 2, ["y"])


def test_packing_holds_out_whole_documents_of_every_domain(texts, tmp_path):
    excluded = tmp_path / "evaluation.jsonl"
    first = read_documents(texts / "news_00.txt.gz")[0]
    excluded.write_text(json.dumps({"text": first.split("\n")[1].upper()}) + "\n")
    run(*small("--texts", texts, "--out", tmp_path / "out", "--pack-only", "--exclude", excluded))
    packed = packed_text.read_packed(tmp_path / "out" / "training" / packed_text.TOKENS_FILE)
    tokenizer = packed_text.hub_tokenizer(packed.tokenizer, 256)
    decoded = tokenizer.decode(packed.ids.tolist())
    assert decoded.startswith("<s>") and decoded.endswith("</s>") and decoded.count("<s>") == decoded.count("</s><s>") + 1
    trained = decoded.removeprefix("<s>").removesuffix("</s>").split("</s><s>")
    assert set(packed.counts) == set(packed.held_out) == {"news", "talk"}
    assert sum(c["documents"] for c in packed.counts.values()) == len(trained)
    assert sum(c["bytes"] for c in packed.counts.values()) == sum(len(t.encode()) for t in trained)
    documents = {d for f in texts.iterdir() for d in read_documents(f)}
    assert set(trained) < documents and first not in trained
    joined = "\n\n".join(trained)
    for pieces in packed.held_out.values():
        assert pieces and not any(p in joined for p in pieces)
        assert sum(map(len, pieces)) <= 2000 + packed_text.PIECE_CHARACTERS


def test_the_tokenizer_encodes_everything_and_splits_numbers():
    tokenizer = packed_text.train_tokenizer(["the bank pays 2024 dollars"] * 50, 300)
    assert [tokenizer.token_to_id(t) for t in ("<s>", "</s>")] == [0, 1]
    for text in ("naïve 北京 \U0001f600\t\n", "2024", " x"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert len(tokenizer.encode("2024").ids) == 4


def test_docstrings_of_the_installed_packages_are_a_domain_without_excluded_modules(tmp_path, monkeypatch):
    (tmp_path / "pkg").mkdir()
    for name, docstring in (("kept", "Kept as it is."), ("task", "In a module of a task."), ("other", "Kept, too.\n\n    And whole.")):
        (tmp_path / "pkg" / f"{name}.py").write_text(f'"""{docstring}"""\nraise RuntimeError("must not be run")\n')
    excluded = tmp_path / "task.jsonl"
    excluded.write_text(json.dumps({"text": "The sentence of a task.", "module": "pkg.task"}) + "\n")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"purelib": str(tmp_path), "stdlib": str(tmp_path / "none")})
    assert packed_text.read_domains(None, True, [excluded]) == {"docstrings": ["Kept as it is.", "Kept, too.\n\nAnd whole."]}
    (tmp_path / "pkg" / "other.py").unlink()
    with pytest.raises(InputError, match="domain docstrings has 1 documents"):
        packed_text.read_domains(None, True, [excluded])


# --------------------------------------------------------------------------------------------------------- training


def test_an_epoch_reads_each_window_once():
    ids = torch.arange(1000, dtype=torch.int32)
    per_epoch = ((len(ids) - 1) // 10 - 1) // 4
    for epoch in (0, 3):
        batches = [pretrain.windows(ids, 10, 4, step, 0) for step in range(epoch * per_epoch, (epoch + 1) * per_epoch)]
        assert all(b.shape == (4, 11) for b in batches)
        sequences = torch.cat(batches)
        assert torch.equal(sequences.diff(dim=1), torch.ones(len(sequences), 10, dtype=torch.long))
        assert sequences[:, :-1].unique().numel() == sequences[:, :-1].numel() >= 900
    assert not torch.equal(pretrain.windows(ids, 10, 4, 0, 0), pretrain.windows(ids, 10, 4, per_epoch, 0))
    assert not torch.equal(pretrain.windows(ids, 10, 4, 0, 0), pretrain.windows(ids, 10, 4, 0, 1))


def test_the_learning_rate_rises_stays_and_ends_at_zero():
    shares = [pretrain.schedule(p / 1000, 0.6) for p in range(1001)]
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


def test_bits_per_byte_of_a_model_that_knows_nothing(tokens):
    """Equal logits cost log2(vocabulary) bits for each token, whatever the batch's padding."""
    args = pretrain.parse(small())
    args.device = torch.device("cpu")
    model, tokenizer = pretrain.build_model(args, 300), packed_text.hub_tokenizer(packed_text.read_packed(tokens).tokenizer, 256)
    held_out = {"a": ["the bank pays", "naïve"], "b": ["a river " * 30]}
    alone = {k: pretrain.bits_per_byte(model, tokenizer, {k: v})[k] for k, v in held_out.items()}
    one_by_one, together = (pretrain.bits_per_byte(model, tokenizer, held_out, batch_tokens=n) for n in (1, 8192))
    assert alone == pytest.approx(one_by_one, rel=1e-5) and alone == pytest.approx(together, rel=1e-5)
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


def test_training_learns_and_leaves_a_standard_model(tokens, tmp_path, capsys):
    out = tmp_path / "out"
    shape = ("--architecture", "qwen3", "--kv-heads", 1, "--untie")
    run(*small("--tokens", tokens, "--out", out, *shape, "--steps", 24, "--lr", 0.01))
    rows = read_rows(out / "training" / "metrics.jsonl")
    assert [r["step"] for r in rows] == list(range(1, 25)) and rows[-1]["loss"] < rows[0]["loss"] - 0.5
    assert set(rows[3]["bits_per_byte"]) == {"news", "talk"} and "bits_per_byte" not in rows[4]
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16 and model.config.model_type == "qwen3" and not model.config.tie_word_embeddings
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (2, 1)
    summary = json.loads((out / "training" / "summary.json").read_text())
    assert summary["tokens"] == 24 * 512 and summary["parameters"] == sum(p.numel() for p in model.parameters())
    assert summary["bits_per_byte"]["news"] < rows[3]["bits_per_byte"]["news"]
    assert AutoTokenizer.from_pretrained(out)("the bank")["input_ids"][0] == 0
    vectors = Encoder.load(str(out), prompt="cluster", pooling="last").encode(["the bank", "a river"])
    assert vectors.shape == (2, 32)
    capsys.readouterr()
    run("--score", out, "--tokens", tokens)
    assert f"{summary['bits_per_byte']['news']:.3f}" in capsys.readouterr().out


def test_weights_come_in_shards_when_asked(tokens, tmp_path):
    size = ("--hidden", 256, "--mlp", 512, "--max-shard-mb", 1)
    run(*small("--tokens", tokens, "--out", tmp_path / "out", "--steps", 1, *size))
    shards = list((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 1 and all(s.stat().st_size < 1.2e6 for s in shards)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert Encoder.load(str(tmp_path / "out")).encode(["x"]).shape == (1, 256)


@pytest.fixture(scope="module")
def whole_run(tokens, tmp_path_factory) -> Path:
    """A run of six steps that nothing has interrupted. Tests leave it as it is."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run(*small("--tokens", tokens, "--out", out))
    return out


def test_a_resumed_run_ends_with_the_same_weights(whole_run, tokens, tmp_path, monkeypatch):
    out = tmp_path / "out"
    save = pretrain.save_checkpoint

    def interrupted(path, *rest):
        save(path, *rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrain, "save_checkpoint", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(*small("--tokens", tokens, "--out", out))
    monkeypatch.setattr(pretrain, "save_checkpoint", save)
    with open(out / "training" / "metrics.jsonl", "a") as f:
        f.write('{"step": 3, "loss": 0.0}\n{"step": 4, "lo')  # a kill may leave steps that no checkpoint has
    run("--out", out, "--resume")
    checkpoint = Path("training", "checkpoint.safetensors")
    assert same_tensors(whole_run / checkpoint, out / checkpoint)
    names = set(load_file(out / checkpoint))
    assert any(k.startswith("muon/") for k in names) and any(k.startswith("adamw/") for k in names)
    losses = [[r["loss"] for r in read_rows(folder / "training" / "metrics.jsonl")] for folder in (whole_run, out)]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    assert (whole_run / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_a_signal_stops_a_run_after_the_step_at_hand(whole_run, tokens, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    update = pretrain.update
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def signalled(run, loss):
        if run.state.step == 2:
            signal.raise_signal(signal.SIGTERM)
        return update(run, loss)

    monkeypatch.setattr(pretrain, "update", signalled)
    try:
        with pytest.raises(SystemExit) as exit_error:
            run(*small("--tokens", tokens, "--out", out))
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # a second one would kill
        assert exit_error.value.code == 128 + signal.SIGTERM
        assert "stopped after step 3: continue with --resume" in capsys.readouterr().err
        monkeypatch.setattr(pretrain, "update", update)
        run("--out", out, "--resume")
        assert "from step 3\n" in capsys.readouterr().out
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert (whole_run / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_a_finished_run_stays_as_it_is(whole_run, capsys):
    before = (whole_run / "model.safetensors").read_bytes()
    run("--out", whole_run, "--resume")
    assert "nothing to do" in capsys.readouterr().out and before == (whole_run / "model.safetensors").read_bytes()


def test_a_run_whose_files_are_missing_or_damaged_is_named(whole_run, texts, tmp_path):
    out = tmp_path / "out"
    training = out / "training"
    shutil.copytree(whole_run / "training", training)
    (training / "summary.json").unlink()
    (training / "checkpoint.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(InputError, match=r"checkpoint\.safetensors is damaged"):
        run("--out", out, "--resume")
    for content in ("{", "[]", '{"arguments": []}'):
        (training / "arguments.json").write_text(content)
        with pytest.raises(InputError, match=r"arguments\.json is damaged"):
            run("--out", out, "--resume")
    (training / "arguments.json").unlink()
    with pytest.raises(InputError, match="cannot be resumed without the text"):
        run(*small("--texts", texts, "--out", out, "--resume"))


INIT = ("--no-docstrings", "--positions", 256, "--batch-tokens", 512, "--steps", 4, "--hold-out", 2000, "--checkpoint-every", 2)


def test_a_model_is_gone_on_from_with_its_tokenizer(tokens, texts, tmp_path, capsys, monkeypatch):
    run(*small("--tokens", tokens, "--out", tmp_path / "one", "--lr", 0.01))
    run(*INIT, "--init", tmp_path / "one", "--texts", texts, "--out", tmp_path / "same", "--lr", 1e-12)
    assert same_tensors(tmp_path / "one" / "model.safetensors", tmp_path / "same" / "model.safetensors")
    packed, again = (packed_text.read_packed(path) for path in (tokens, tmp_path / "same" / "training" / packed_text.TOKENS_FILE))
    assert torch.equal(packed.ids, again.ids) and packed.held_out == again.held_out  # the same text, seed and tokenizer
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "same")("a bank").input_ids
        == AutoTokenizer.from_pretrained(tmp_path / "one")("a bank").input_ids
    )
    capsys.readouterr()
    run(*INIT, "--init", tmp_path / "one", "--tokens", tokens, "--out", tmp_path / "two", "--lr", 0.01)
    before, after = (json.loads((tmp_path / n / "training" / "summary.json").read_text())["bits_per_byte"]["news"] for n in ("one", "two"))
    assert after < before and f"{before:.3f}" in capsys.readouterr().out  # the table shows both


def test_an_interrupted_run_from_a_model_is_resumed(tokens, tmp_path, monkeypatch):
    run(*small("--tokens", tokens, "--out", tmp_path / "one"))
    run(*INIT, "--init", tmp_path / "one", "--tokens", tokens, "--out", tmp_path / "whole")
    update = pretrain.update
    monkeypatch.setattr(
        pretrain, "update", lambda run, loss: update(run, loss) if run.state.step < 3 else (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        run(*INIT, "--init", tmp_path / "one", "--tokens", tokens, "--out", tmp_path / "cut")
    monkeypatch.setattr(pretrain, "update", update)
    run("--out", tmp_path / "cut", "--resume")
    assert same_tensors(*(tmp_path / name / "model.safetensors" for name in ("whole", "cut")))


def test_what_contradicts_the_model_that_is_gone_on_from_is_refused(tokens, texts, tmp_path):
    run(*small("--tokens", tokens, "--out", tmp_path / "one"))
    other = tmp_path / "other"
    run(*small("--texts", texts, "--out", other, "--pack-only", "--vocabulary", 320))
    GPT2Config(n_embd=8, n_layer=1, n_head=1).save_pretrained(tmp_path / "gpt2")
    for flags, message in (
        (("--init", tmp_path / "one", "--hidden", 64, "--tokens", tokens), "has a shape already: leave --hidden out"),
        (("--init", tmp_path / "one", "--positions", 512, "--tokens", tokens), "--positions 512 is more than the 256 of"),
        (("--init", tmp_path / "one", "--tokens", other / "training" / packed_text.TOKENS_FILE), "packed with another tokenizer"),
        (("--init", tmp_path / "gpt2", "--tokens", tokens), "is a gpt2: this script trains Llama and Qwen3"),
        (("--init", tmp_path / "none", "--tokens", tokens), "holds no model"),
    ):
        with pytest.raises(InputError, match=message):
            run(*INIT, "--out", tmp_path / "x", *flags)
        shutil.rmtree(tmp_path / "x", ignore_errors=True)


def test_every_step_takes_the_scheduled_learning_rate_in_both_optimizers(tokens, tmp_path, monkeypatch):
    update, rates = pretrain.update, []

    def recorded(run, loss):
        lr = update(run, loss)
        rates.append({group["lr"] for optimizer in run.optimizers.values() for group in optimizer.param_groups})
        return lr

    monkeypatch.setattr(pretrain, "update", recorded)
    run(*small("--tokens", tokens, "--out", tmp_path / "out", "--lr", 0.01))
    expected = [0.01 * pretrain.schedule(step / 6, 0.6) for step in range(6)]
    assert rates == [{lr} for lr in expected] and [r["lr"] for r in read_rows(tmp_path / "out" / "training" / "metrics.jsonl")] == expected


def test_a_loss_that_diverges_ends_the_run_and_names_the_remedy(tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "step_gradients", lambda *_: math.nan)
    with pytest.raises(InputError, match="step 1: the loss is nan: lower --lr"):
        run(*small("--tokens", tokens, "--out", tmp_path / "out"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--out", "{tmp}/x"), "either --steps or --minutes"),
        (("--steps", 1), "--out is missing"),
        (("--out", "{tmp}/x", "--steps", 1, "--texts", "{tmp}"), "holds no .txt.gz"),
        (("--out", "{tmp}/x", "--steps", 1, "--tokens", "{tmp}/no"), "no file"),
        (("--out", "{tmp}/damaged", "--steps", 1), "exists already"),
        (("--out", "{tmp}/x", "--steps", 1, "--hidden", 100, "--heads", 3), "must be an even multiple"),
        (("--out", "{tmp}/x", "--steps", 1, "--vocabulary", 70000), "from 300 to 65536"),
        (("--out", "{tmp}/x", "--steps", 1, "--lr", -1), "--lr must be above 0"),
        (("--out", "{tmp}/x", "--steps", 1, "--batch-tokens", 1000), "a multiple of --positions"),
        (("--out", "{tmp}/x", "--steps", 1, "--tokens", "{tmp}/bad.safetensors"), "is not a packed file"),
        (("--out", "{tmp}/x", "--steps", 1, "--texts", "{tmp}/damaged", "--no-docstrings"), "is damaged"),
        (("--score", "{tmp}/no", "--tokens", "{tmp}/bad.safetensors"), "is not a packed file"),
        (("--score", "models/tiny"), "--score needs --tokens"),
        (("--out", "{tmp}/x", "--steps", 1, "--exclude", "{tmp}/bad.safetensors"), "unknown kind of file"),
    ],
)
def test_bad_input_is_named(texts, tmp_path, flags, message):
    (tmp_path / "bad.safetensors").write_text("nothing of the kind")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "a_00.txt.gz").write_bytes((texts / "news_00.txt.gz").read_bytes()[:200])
    with pytest.raises(InputError, match=message):
        run(*(f.format(tmp=tmp_path) if isinstance(f, str) else f for f in flags))
    assert not list((tmp_path / "x").glob("**/tokens*")) if (tmp_path / "x").exists() else True


# runs a script in a process that cannot import `datasets` and mteb
BARE = """
import runpy, sys
sys.modules |= {"datasets": None, "mteb": None}
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_a_killed_run_is_resumed_and_needs_neither_datasets_nor_mteb(tokens, tmp_path):
    """A process that is killed with SIGKILL after some steps, resumed to the end, ends as a run that nothing has interrupted."""
    flags = small("--tokens", tokens, "--out", tmp_path / "run", "--steps", 60, "--checkpoint-every", 5, "--evaluate-every", 13)
    command, env = [sys.executable, "-c", BARE, str(SCRIPT)], os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, text=True, start_new_session=True, env=env)
    assert any(line.startswith("step 13,") for line in process.stdout)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    subprocess.run([*command, "--out", str(tmp_path / "run"), "--resume"], check=True, capture_output=True, env=env)
    run(*small("--tokens", tokens, "--out", tmp_path / "whole", "--steps", 60, "--checkpoint-every", 7, "--evaluate-every", 13))
    assert same_tensors(*(tmp_path / name / "training" / "checkpoint.safetensors" for name in ("whole", "run")))
    assert [r["step"] for r in read_rows(tmp_path / "run" / "training" / "metrics.jsonl")] == list(range(1, 61))


def test_the_script_ends_with_one_line_and_status_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as exit_error:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert (exit_error.value.code, *capsys.readouterr()) == (2, "", "pretrain.py: give either --steps or --minutes\n")
