"""The fast paths of the encoder against the plain one: packed rows, the head computed once, the last layer cut short."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GQA, SMALL, TEXTS, make_tokenizer
from transformers import AutoModelForCausalLM, Qwen2Config

import encoder as encoder_module
from encoder import POOLINGS, SCOPES, Encoder, View
from prompts import InputError

HERE = Path(__file__).resolve().parents[1]
MANY = [*TEXTS, "the mat", "rates", "Interest " * 30, "be not to", "a cat", "The bank sat.", "b"]
LONG = "The cat sat on the mat and the bank raised its fees again this month: {text}, that is the question"  # past the windows of 12
VIEWS = [View(p, s, layers) for p in POOLINGS for s in SCOPES for layers in ((-1,), (2,))]


def both(model, texts=MANY, views=None, changes=None, **settings):
    """Vectors one text at a time without any trick, and in one batch with all of them."""
    settings = {"prompt": LONG, "max_tokens": 20} | settings
    plain, fast = Encoder.load(model, **settings), Encoder.load(model, **settings)
    plain.share_head = plain.trim = False
    for encoder in (plain, fast):
        encoder.query.data.normal_(generator=torch.Generator().manual_seed(0))
    for name, value in (changes or {}).items():
        setattr(fast, name, value)
    views = views or [fast.contract.view()]
    return [np.concatenate(a) for a in zip(*(plain.encode([t], views=views) for t in texts), strict=True)], fast.encode(texts, views=views)


def test_a_head_computed_once_changes_nothing(model):
    encoder = Encoder.load(model, prompt=LONG, max_tokens=20)
    batch = encoder.collate(encoder.tokenise(MANY), list(range(len(MANY))))
    assert batch.head > 12 and len(batch.ids) == batch.head + sum(batch.lengths - batch.head)
    for view, a, b in zip(VIEWS, *both(model, views=VIEWS), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5, err_msg=str(view))


@pytest.mark.parametrize("prompt", [LONG, "This sentence: {text}", "none"])
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_the_last_layer_cut_short_changes_nothing(model, prompt, attention, monkeypatch):
    settings = {"prompt": prompt, "attention": attention, "pooling": "last", "scope": "all", "bos": False}
    rows, run = [], Encoder.run
    monkeypatch.setattr(Encoder, "run", lambda self, batch, views=None: rows.append(states := run(self, batch, views)) or states)
    (expected,), (found,) = both(model, [t for t in MANY if t], **settings)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert rows[-1].last_only and len(rows[-1].layers[-1]) == len(MANY) - 1 and not rows[0].last_only


def test_nothing_but_the_prompt(model):
    """Texts without a token of their own, alone and together, where nothing stands behind them; and no token at all."""
    settings = {"prompt": LONG.removesuffix(", that is the question"), "max_tokens": 20}
    for pooling in POOLINGS:
        encoder = Encoder.load(model, pooling=pooling, scope="all", **settings)
        one, three = encoder.encode([""]), encoder.encode(["", "", ""])
        np.testing.assert_allclose(three, np.repeat(one, 3, 0), atol=1e-5)
        assert encoder.encode(["a", ""])[1] == pytest.approx(one[0], abs=1e-5)
        bare = Encoder.load(model, pooling=pooling, scope="all", bos=False)
        batch = bare.collate(bare.tokenise(["a cat", "", "b"]), [0, 1, 2])  # training may meet it
        vectors = bare.pool(bare.run(batch), batch).detach().numpy()
        np.testing.assert_allclose(vectors, bare.encode(["a cat", "", "b"]), atol=1e-5)


def test_limits_and_cuts_hold_on_every_path(llama):
    for settings in ({"max_tokens": 1}, {"dims": 8}, {"normalize": False}, {"layers": (0,)}, {"layers": (-1, 1), "dims": 5}):
        for pooling in ("last", "mean"):
            (expected,), (found,) = both(llama, pooling=pooling, scope="all", **settings)
            np.testing.assert_allclose(found, expected, atol=2e-5, err_msg=str(settings))


def test_states_of_last_tokens_are_not_read_otherwise(llama):
    encoder = Encoder.load(llama, prompt=LONG, pooling="last", max_tokens=20)
    batch = encoder.collate(encoder.tokenise(MANY), list(range(len(MANY))))
    with pytest.raises(ValueError, match="those of last tokens"):
        encoder.pool(encoder.run(batch), batch, View("mean", "all"))


def test_other_readings_keep_the_whole_last_layer(llama):
    """The last token of the text itself, with a prompt behind it, is not the end of the sequence."""
    (expected,), (found,) = both(llama, pooling="last", scope="text")
    np.testing.assert_allclose(found, expected, atol=1e-5)


def plain_varlen(query, key, value, cu_query, cu_key, max_query, max_key, *, scale, window_size, enable_gqa):
    """What `torch.nn.attention.varlen.varlen_attn` documents, a sequence at a time, in double precision."""
    back, ahead = window_size
    out = torch.zeros_like(query)
    assert enable_gqa and cu_query.dtype == cu_key.dtype == torch.int32 and len(cu_query) == len(cu_key)
    assert cu_query[-1] == len(query) and cu_key[-1] == len(key) == len(value)
    assert max_query >= cu_query.diff().max() and max_key >= cu_key.diff().max()
    for q0, q1, k0, k1 in zip(cu_query, cu_query[1:], cu_key, cu_key[1:], strict=False):
        k, v = (x[k0:k1].double().repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
        distance = (torch.arange(q1 - q0) + (k1 - k0) - (q1 - q0))[:, None] - torch.arange(k1 - k0)
        hidden = ((distance > back) & (back >= 0)) | ((-distance > ahead) & (ahead >= 0))
        weights = (torch.einsum("qhd,khd->hqk", query[q0:q1].double(), k) * scale).masked_fill(hidden, -torch.inf).softmax(-1)
        out[q0:q1] = torch.einsum("hqk,khd->qhd", weights, v)
    return out


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_one_call_for_all_lengths_equals_sequences_under_each_other(model, attention, monkeypatch):
    """The path that GPUs take, with the documented meaning of its arguments in place of the kernel."""
    views = [View("mean", "all"), View("attention", "text"), View("last", "all")]
    for chosen in (views, views[2:]):
        expected, _ = both(model, views=chosen, attention=attention, bos=False)
        with monkeypatch.context() as patched:
            patched.setattr(encoder_module, "varlen_attn", plain_varlen)
            patched.setattr(encoder_module._Attention, "stacked", encoder_module._Attention.flash)
            _, found = both(model, views=chosen, attention=attention, bos=False)
        for view, a, b in zip(chosen, expected, found, strict=True):
            np.testing.assert_allclose(b, a, atol=1e-5, err_msg=str(view))


def test_bfloat16_costs_no_more_on_the_fast_path_than_on_the_plain_one(model):
    for settings in ({"pooling": "mean", "scope": "text"}, {"pooling": "last"}):
        (exact,), _ = both(model, **settings)
        (plain,), (fast,) = both(model, dtype="bfloat16", **settings)
        assert (plain * fast).sum(1).min() > 0.9999
        assert (exact * fast).sum(1).min() > (exact * plain).sum(1).min() - 5e-5


def gradients(encoder, texts) -> dict:
    tokens = encoder.tokenise(texts)
    vectors = [encoder.pool(encoder.run(batch), batch) for _, batch in encoder.batches(tokens, list(range(len(texts))))]
    target = torch.linspace(-1, 1, vectors[0].shape[1], dtype=vectors[0].dtype)
    torch.cat([(v @ target).square() for v in vectors]).sum().backward()
    return {n: p.grad.clone() for n, p in encoder.trainable().items()}


@pytest.mark.parametrize("path", ["stacked", "flash", "checkpointing"])
@pytest.mark.parametrize("pooling", ["last", "position-mean", "attention"])
def test_gradients_flow_through_the_shared_head(model, pooling, path, monkeypatch):
    found = []
    for tricks in (False, True):
        if tricks and path == "flash":
            monkeypatch.setattr(encoder_module, "varlen_attn", plain_varlen)
            monkeypatch.setattr(encoder_module._Attention, "stacked", encoder_module._Attention.flash)
        encoder = Encoder.load(model, prompt=LONG, pooling=pooling, scope="all", max_tokens=20)
        torch.manual_seed(0)
        encoder.add_adapter(2)
        with torch.no_grad():
            for parameter in encoder.trainable().values():
                parameter.normal_(std=0.05)
        encoder.share_head = encoder.trim = tricks
        if tricks and path == "checkpointing":
            encoder.decoder.gradient_checkpointing_enable({"use_reentrant": False})
            encoder.decoder.train()
        found.append(gradients(encoder, MANY))
        if pooling == "last":
            tokens = encoder.tokenise(MANY)
            states = encoder.run(encoder.collate(tokens, list(range(len(MANY)))))
            assert states.last_only == (tricks and path != "checkpointing")  # a layer computed again would not be cut short again
    for name, plain in found[0].items():
        scale = max(1e-3, plain.abs().max())
        assert (found[1][name] - plain).abs().max() < 1e-4 * scale, name
    assert max(g.abs().max() for g in found[0].values()) > 1e-3


# ------------------------------------------------------------------------------------- models that cannot be packed


@pytest.fixture(scope="session")
def qwen2(tmp_path_factory) -> str:
    """A decoder that nothing here was written for."""
    folder = tmp_path_factory.mktemp("other") / "qwen2"
    torch.manual_seed(0)
    small = {k: v for k, v in GQA.items() if k != "head_dim"}
    AutoModelForCausalLM.from_config(Qwen2Config(**SMALL, **small, bos_token_id=1, eos_token_id=2)).save_pretrained(folder)
    make_tokenizer("bytes", bos=True).save_pretrained(folder)
    return str(folder)


def test_an_unknown_decoder_is_padded_and_says_so(qwen2):
    encoder = Encoder.load(qwen2, prompt="cluster", max_tokens=20)
    views = [v for v in VIEWS if v.pooling != "attention"]
    alone = [np.concatenate(a) for a in zip(*(encoder.encode([t], views=views) for t in MANY), strict=True)]
    for view, a, b in zip(views, alone, encoder.encode(MANY, views=views, batch_tokens=60), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5, err_msg=str(view))
    assert "qwen2 models are not packed: texts are padded, which is slower" in encoder.warnings(clear=True)
    assert not any("packed" in line for line in encoder.warnings())
    with pytest.raises(InputError, match="does not let its attention be read"):
        Encoder.load(qwen2, pooling="attention").encode(["a"])
    with pytest.raises(InputError, match="bidirectional attention is not tested"):
        Encoder.load(qwen2, attention="bidirectional")


# ------------------------------------------------------------------------------------------- streams, memory, devices


def test_a_stream_is_read_as_it_is_embedded(llama, monkeypatch):
    monkeypatch.setattr(encoder_module, "WINDOW", 4)
    encoder, read = Encoder.load(llama), []
    blocks = encoder.stream(read.append(text) or text for text in MANY * 5)
    found = [next(blocks)[0]]
    assert len(found[0]) == 4 and len(read) <= 3 * 4  # these, the next, and one more that may have been begun
    found += [block for (block,) in blocks]
    np.testing.assert_allclose(np.concatenate(found), np.tile(Encoder.load(llama).encode(MANY), (5, 1)), atol=1e-6)
    with pytest.raises(InputError, match="text 6 is int 7, not a string"):
        encoder.encode([*"abcdef", 7])


def test_batches_are_filled_to_the_budget(llama):
    encoder = Encoder.load(llama, prompt=LONG, max_tokens=20)
    tokens = encoder.tokenise(MANY * 9)
    plan = encoder._plan(tokens, list(range(len(MANY) * 9)), 100)
    sizes = [sum(encoder._cost(tokens, i) for i in rows) for rows in plan]
    assert sorted(itertools.chain(*plan)) == list(range(len(MANY) * 9))
    assert max(sizes) <= 100 and np.mean(sizes) > 80 and min(sizes[:-1]) > 70
    assert encoder._plan(tokens, [0, 1], 1) in ([[0], [1]], [[1], [0]])  # a text longer than the budget goes alone


def test_what_does_not_fit_into_memory_is_halved(llama, monkeypatch):
    expected = Encoder.load(llama).encode(MANY)
    encoder, run = Encoder.load(llama), Encoder.run

    def full(self, batch, views=None):
        if len(batch.ids) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(self, batch, views)

    monkeypatch.setattr(Encoder, "run", full)
    limit = 70
    np.testing.assert_allclose(encoder.encode(MANY), expected, atol=1e-6)
    told = [line for line in encoder.warnings(clear=True) if "out of memory" in line]
    assert told and len(told) < 4 and "batches were halved to" in told[0]
    encoder.encode(MANY)
    assert not any("memory" in line for line in encoder.warnings())  # what was too much is remembered
    limit = 3
    with pytest.raises(InputError, match="does not fit into memory: lower max_tokens"):
        encoder.encode(MANY)


def test_processes_with_different_memory_still_share_one_plan(llama, monkeypatch):
    """One of two halves its batches, the other does not: every text is embedded exactly once."""
    expected, found = Encoder.load(llama).encode(MANY * 3), []
    for rank, held in ((0, 20), (1, 10**9)):
        encoder = Encoder.load(llama)
        encoder.held = held
        monkeypatch.setattr(encoder_module, "processes", lambda rank=rank: (rank, 2, None))
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)
        found.append(encoder.encode(MANY * 3, batch_tokens=60))
    assert not ((found[0] != 0).any(1) & (found[1] != 0).any(1)).any()
    np.testing.assert_allclose(found[0] + found[1], expected, atol=1e-6)


def test_a_stream_may_be_left_or_fail(llama, monkeypatch):
    monkeypatch.setattr(encoder_module, "WINDOW", 3)
    encoder, read = Encoder.load(llama), []
    blocks = encoder.stream(read.append(text) or text for text in MANY * 20)
    next(blocks)
    blocks.close()
    assert len(read) < 12

    def broken():
        yield from MANY
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(encoder.stream(broken()))
    monkeypatch.setattr(encoder_module, "WINDOW_CHARACTERS", 50)
    monkeypatch.setattr(encoder_module, "WINDOW", 1000)
    assert [len(block) for (block,) in encoder.stream(["x" * 30] * 5)] == [2, 2, 1]


def test_merging_costs_no_accuracy_in_float32(model, tmp_path):
    encoder = Encoder.load(model, prompt="cluster")
    encoder.add_adapter(4)
    with torch.no_grad():
        for parameter in encoder.trainable().values():
            parameter.normal_(std=0.1)
    encoder.save(tmp_path)
    merged = Encoder.load(str(tmp_path))
    assert 0 <= merged.merge() < 1e-6 and merged.merge() == 0
    np.testing.assert_allclose(merged.encode(TEXTS), encoder.encode(TEXTS), atol=1e-5)
    assert merged.fingerprint == encoder.fingerprint
    with pytest.raises(InputError, match="the adapter is merged"):
        merged.untuned()
    again = Encoder.load(str(tmp_path))
    base = again.untuned()
    again.merge()
    with pytest.raises(InputError, match="was merged into the base meanwhile"):
        base.encode(["a"])
    rounded = Encoder.load(str(tmp_path), dtype="bfloat16")
    assert 0 < rounded.merge() < 0.05
    assert Encoder.load(model).merge() == 0


SHARD = """
import json, os, sys
import numpy as np
import encoder
encoder.WINDOW = 8
texts = json.loads(sys.argv[2])
run, mine = encoder.Encoder.run, []
encoder.Encoder.run = lambda self, batch, views=None: mine.append(len(batch.spans)) or run(self, batch, views)
vectors = encoder.Encoder.load(sys.argv[1], prompt="cluster").encode(texts, batch_tokens=60)
np.savez(f"{sys.argv[3]}{os.environ.get('RANK', 'alone')}.npz", vectors=vectors, mine=np.array(sum(mine)))
"""


@pytest.mark.slow
def test_two_processes_share_the_work_and_get_the_vectors_of_one(llama, tmp_path):
    (tmp_path / "shard.py").write_text(SHARD)
    arguments = [str(tmp_path / "shard.py"), llama, json.dumps(MANY * 4), f"{tmp_path}/"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    for command in ([], ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29591"]):
        subprocess.run([sys.executable, *command, *arguments], check=True, env=environment, capture_output=True)
    alone, first, second = (np.load(tmp_path / f"{name}.npz") for name in ("alone", "0", "1"))
    assert (alone["vectors"] == first["vectors"]).all() and (alone["vectors"] == second["vectors"]).all()
    assert first["mine"] + second["mine"] == alone["mine"] == len(MANY) * 4 and min(first["mine"], second["mine"]) > 10


def test_compiling_without_a_compiler_is_refused(llama, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match=r"needs a C\+\+ compiler"):
        Encoder.load(llama).compile()


@pytest.mark.slow
def test_compiled_layers_give_the_same_vectors(models_dir):
    for name, more in (
        ("llama", {"pooling": "mean"}),
        ("gpt-neox", {"pooling": "last"}),
        ("llama", {"pooling": "mean", "layers": (-1, 1)}),
    ):
        settings = {"prompt": LONG, "max_tokens": 20, "scope": "all"} | more
        expected = Encoder.load(models_dir[name], **settings).encode(MANY)
        compiled = Encoder.load(models_dir[name], **settings)
        compiled.compile()
        for budget in (60, 100, 4096):
            np.testing.assert_allclose(compiled.encode(MANY, batch_tokens=budget), expected, atol=1e-5)
