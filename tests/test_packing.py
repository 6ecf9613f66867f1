"""The fast paths of the encoder against the plain one: packed rows, a shared prefix, a trimmed last layer; streams and memory."""

import itertools
import json

import numpy as np
import pytest
import torch
from conftest import GQA, SMALL, TEXTS, make_tokenizer, randomize_adapter
from launch import torchrun
from transformers import AutoModelForCausalLM, StableLmConfig

from encoder import Encoder, EncodingReport, PoolingConfig, packing, streaming
from encoder.contract import POOLINGS, SCOPES
from encoder.encoder import BACKWARD_COST
from encoder.processes import Distributed
from files.console import InputError

MANY = [*TEXTS, "the mat", "rates", "Interest " * 30, "be not to", "a cat", "The bank sat.", "b"]
LONG = "The cat sat on the mat and the bank raised its fees again this month: {text}, that is the question"  # past the windows of 12
ALL_POOLINGS = [PoolingConfig(p, s, layers) for p in POOLINGS for s in SCOPES for layers in ((-1,), (2,))]


def both(model, texts=MANY, poolings=None, implementation="auto", **settings):
    """Vectors one text at a time, every execution option off, and in one batch with all of them on."""
    settings = {"prompt": LONG, "max_tokens": 20} | settings
    plain, fast = Encoder.load(model, **settings), Encoder.load(model, **settings)
    plain.share_prefix = plain.trim_last_layer = False
    fast.attention_implementation = implementation
    for encoder in (plain, fast):
        encoder.query.data.normal_(generator=torch.Generator().manual_seed(0))
    poolings = poolings or [fast.contract.pooling_config()]
    one_by_one = zip(*(plain.encode([t], poolings=poolings) for t in texts), strict=True)
    return [np.concatenate(vectors) for vectors in one_by_one], fast.encode(texts, poolings=poolings)


def test_a_prefix_computed_once_changes_nothing(model):
    encoder = Encoder.load(model, prompt=LONG, max_tokens=20)
    batch = encoder.collate(encoder.tokenize(MANY), list(range(len(MANY))))
    assert batch.prefix_length > 12 and len(batch.ids) == batch.prefix_length + sum(batch.lengths - batch.prefix_length)
    for config, a, b in zip(ALL_POOLINGS, *both(model, poolings=ALL_POOLINGS), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5, err_msg=str(config))


@pytest.mark.parametrize("prompt", [LONG, "This sentence: {text}", "none"])
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_a_trimmed_last_layer_changes_nothing(model, prompt, attention, monkeypatch):
    settings = {"prompt": prompt, "attention": attention, "pooling": "last", "scope": "all", "bos": False}
    seen, forward = [], Encoder.forward
    monkeypatch.setattr(Encoder, "forward", lambda self, *args: seen.append(states := forward(self, *args)) or states)
    (expected,), (vectors,) = both(model, [t for t in MANY if t], **settings)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    assert seen[-1].last_only and len(seen[-1].layers[-1]) == len(MANY) - 1 and not seen[0].last_only


def test_sequences_of_like_length_are_stacked():
    lengths = np.array([100, 90, 66, 64, 20, 20, 13, 12, 0])
    assert [lengths[rows].tolist() for rows in packing.like_lengths(lengths)] == [[100, 90, 66], [64], [20, 20, 13], [12], [0]]
    assert packing.like_lengths(np.array([3, 100, 3])) == [slice(0, 3)]  # not sorted
    assert packing.like_lengths(np.array([], int)) == [slice(0, 0)]


def test_attention_pads_short_sequences_by_little(llama, monkeypatch):
    """Of a long text and many short ones, the short ones are not padded to the long one."""
    padded, attend = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda q, *a, **k: padded.append(q) or attend(q, *a, **k))
    encoder = Encoder.load(llama, prompt="none", pooling="mean")
    ((_, batch),) = encoder.batches(encoder.tokenize(["be " * 60, *["a cat"] * 30]), list(range(31)))
    encoder.forward(batch)
    n_layers = len(encoder.blocks)
    assert len(padded) == 2 * n_layers and sum(q.shape[0] * q.shape[2] for q in padded) == n_layers * len(batch.ids)


def test_nothing_but_the_prompt(model):
    """Texts without a token of their own, alone and together, where nothing stands behind them; and no token at all."""
    settings = {"prompt": LONG.removesuffix(", that is the question"), "max_tokens": 20}
    for pooling in POOLINGS:
        encoder = Encoder.load(model, pooling=pooling, scope="all", **settings)
        one, three = encoder.encode([""]), encoder.encode(["", "", ""])
        np.testing.assert_allclose(three, np.repeat(one, 3, 0), atol=1e-5)
        assert encoder.encode(["a", ""])[1] == pytest.approx(one[0], abs=1e-5)
        bare = Encoder.load(model, pooling=pooling, scope="all", bos=False)
        batch = bare.collate(bare.tokenize(["a cat", "", "b"]), [0, 1, 2])  # training may meet it
        vectors = bare.pool(bare.forward(batch), batch).detach().numpy()
        np.testing.assert_allclose(vectors, bare.encode(["a cat", "", "b"]), atol=1e-5)


def test_limits_and_cuts_hold_on_every_path(llama):
    for settings in ({"max_tokens": 1}, {"dims": 8}, {"normalize": False}, {"layers": (0,)}, {"layers": (-1, 1), "dims": 5}):
        for pooling in ("last", "mean"):
            (expected,), (vectors,) = both(llama, pooling=pooling, scope="all", **settings)
            np.testing.assert_allclose(vectors, expected, atol=2e-5, err_msg=str(settings))


def test_states_of_last_tokens_are_not_pooled_otherwise(llama):
    encoder = Encoder.load(llama, prompt=LONG, pooling="last", max_tokens=20)
    batch = encoder.collate(encoder.tokenize(MANY), list(range(len(MANY))))
    with pytest.raises(ValueError, match="those of last tokens"):
        encoder.pool(encoder.forward(batch), batch, PoolingConfig("mean", "all"))


def test_the_last_layer_is_whole_where_more_is_read(llama):
    """The last token of the text itself, with a prompt behind it, is not the end of the sequence."""
    (expected,), (vectors,) = both(llama, pooling="last", scope="text")
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


def plain_varlen(query, key, value, cu_query, cu_key, max_query, max_key, *, scale, window_size, **newer):
    """What `torch.nn.attention.varlen.varlen_attn` documents, a sequence at a time, in double precision."""
    back, ahead = window_size
    out = torch.zeros_like(query)
    told = {"enable_gqa": True, "num_splits": 1} if packing.VARLEN_TAKES_SPLITS else {"enable_gqa": True}
    assert newer == (told if "enable_gqa" in packing.VARLEN_PARAMETERS else {})
    assert max_query > 1 or torch.is_grad_enabled() or ahead < 0 or back >= 0  # else the faster kernel for one query is missed
    assert cu_query.dtype == cu_key.dtype == torch.int32 and len(cu_query) == len(cu_key)
    assert cu_query[-1] == len(query) and cu_key[-1] == len(key) == len(value)
    assert max_query >= cu_query.diff().max() and max_key >= cu_key.diff().max()
    for q0, q1, k0, k1 in zip(cu_query, cu_query[1:], cu_key, cu_key[1:], strict=False):
        k, v = (x[k0:k1].double().repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
        distance = (torch.arange(q1 - q0) + (k1 - k0) - (q1 - q0))[:, None] - torch.arange(k1 - k0)
        hidden = ((distance > back) & (back >= 0)) | ((-distance > ahead) & (ahead >= 0))
        weights = (torch.einsum("qhd,khd->hqk", query[q0:q1].double(), k) * scale).masked_fill(hidden, -torch.inf).softmax(-1)
        out[q0:q1] = torch.einsum("hqk,khd->qhd", weights, v)
    return out


@pytest.mark.parametrize("release", ["2.13", "2.12", "2.11"])
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_one_call_for_all_lengths_equals_sequences_under_each_other(model, attention, release, monkeypatch):
    """The path that GPUs take, with the documented meaning of its arguments in place of the kernel."""
    if release == "2.11":
        monkeypatch.setattr(packing, "VARLEN_PARAMETERS", {"scale": None, "window_size": None})
    monkeypatch.setattr(packing, "VARLEN_TAKES_SPLITS", release == "2.13")
    groups = set()
    monkeypatch.setattr(packing, "varlen_attn", lambda q, k, *a, **b: groups.add(q.shape[1] // k.shape[1]) or plain_varlen(q, k, *a, **b))
    poolings = [PoolingConfig("mean", "all"), PoolingConfig("attention", "text"), PoolingConfig("last", "all")]
    for chosen in (poolings, poolings[2:]):
        expected, vectors = both(model, poolings=chosen, implementation="varlen", attention=attention, bos=False)
        for config, a, b in zip(chosen, expected, vectors, strict=True):
            np.testing.assert_allclose(b, a, atol=1e-5, err_msg=str(config))
    assert groups == {1 if model.endswith("gpt-neox") else 2}  # grouped heads are not copied


def test_bfloat16_costs_no_more_on_the_fast_path_than_on_the_plain_one(model):
    for settings in ({"pooling": "mean", "scope": "text"}, {"pooling": "last"}):
        (exact,), _ = both(model, **settings)
        (plain,), (fast,) = both(model, dtype="bfloat16", **settings)
        assert (plain * fast).sum(1).min() > 0.9999
        assert (exact * fast).sum(1).min() > (exact * plain).sum(1).min() - 5e-5


def gradients(encoder, texts) -> dict:
    batches = encoder.batches(encoder.tokenize(texts), list(range(len(texts))))
    vectors = [encoder.pool(encoder.forward(batch), batch) for _, batch in batches]
    target = torch.linspace(-1, 1, vectors[0].shape[1], dtype=vectors[0].dtype)
    torch.cat([(v @ target).square() for v in vectors]).sum().backward()
    return {n: p.grad.clone() for n, p in encoder.trainable().items()}


@pytest.mark.parametrize("path", ["stacked", "varlen", "checkpointing"])
@pytest.mark.parametrize("pooling", ["last", "position-mean", "attention"])
def test_gradients_flow_through_the_shared_prefix(model, pooling, path, monkeypatch):
    monkeypatch.setattr(packing, "varlen_attn", plain_varlen)
    plain_and_fast = []
    for fast in (False, True):
        encoder = Encoder.load(model, prompt=LONG, pooling=pooling, scope="all", max_tokens=20)
        torch.manual_seed(0)
        encoder.add_adapter(2)
        randomize_adapter(encoder, 0.05)
        encoder.share_prefix = encoder.trim_last_layer = fast
        encoder.attention_implementation = "varlen" if fast and path == "varlen" else "stacked"
        if fast and path == "checkpointing":
            encoder.decoder.gradient_checkpointing_enable({"use_reentrant": False})
            encoder.decoder.train()
        plain_and_fast.append(gradients(encoder, MANY))
        if pooling == "last":
            tokens = encoder.tokenize(MANY)
            states = encoder.forward(encoder.collate(tokens, list(range(len(MANY)))))
            assert states.last_only == (fast and path != "checkpointing")  # a layer that is computed again is not trimmed
    for name, plain in plain_and_fast[0].items():
        scale = max(1e-3, plain.abs().max())
        assert (plain_and_fast[1][name] - plain).abs().max() < 1e-4 * scale, name
    assert max(g.abs().max() for g in plain_and_fast[0].values()) > 1e-3


# ------------------------------------------------------------------------------------- models that cannot be packed


@pytest.fixture(scope="session")
def stablelm(tmp_path_factory) -> str:
    """A decoder that nothing here was written for."""
    folder = tmp_path_factory.mktemp("other") / "stablelm"
    torch.manual_seed(0)
    small = {k: v for k, v in GQA.items() if k != "head_dim"}
    AutoModelForCausalLM.from_config(StableLmConfig(**SMALL, **small, bos_token_id=1, eos_token_id=2)).save_pretrained(folder)
    make_tokenizer("bytes", bos=True).save_pretrained(folder)
    return str(folder)


def test_an_unknown_decoder_is_padded_and_says_so(stablelm):
    encoder = Encoder.load(stablelm, prompt="cluster", max_tokens=20)
    poolings = [config for config in ALL_POOLINGS if config.pooling != "attention"]
    alone = [np.concatenate(a) for a in zip(*(encoder.encode([t], poolings=poolings) for t in MANY), strict=True)]
    for config, a, b in zip(poolings, alone, encoder.encode(MANY, poolings=poolings, batch_tokens=60), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5, err_msg=str(config))
    assert encoder.notes == ["stablelm models are not packed: texts are padded, which is slower"]
    with pytest.raises(InputError, match="does not let its attention be read"):
        Encoder.load(stablelm, pooling="attention")
    with pytest.raises(InputError, match="does not let its attention be read"):
        Encoder.load(stablelm).last_token_attention(["a"])
    with pytest.raises(InputError, match="bidirectional attention is not tested"):
        Encoder.load(stablelm, attention="bidirectional")


# ------------------------------------------------------------------------------------------- streams, memory, devices


def test_a_stream_is_read_as_it_is_embedded(llama, monkeypatch):
    monkeypatch.setattr(streaming, "WINDOW", 4)
    encoder, read = Encoder.load(llama), []
    blocks = encoder.stream(read.append(text) or text for text in MANY * 5)
    windows = [next(blocks)[0]]
    assert len(windows[0]) == 4 and len(read) <= 3 * 4  # these, the next, and one more that may have been begun
    windows += [window for (window,) in blocks]
    np.testing.assert_allclose(np.concatenate(windows), np.tile(Encoder.load(llama).encode(MANY), (5, 1)), atol=1e-6)
    with pytest.raises(InputError, match="text 6 is int 7, not a string"):
        encoder.encode([*"abcdef", 7])


def test_batches_are_filled_to_the_budget(llama):
    encoder = Encoder.load(llama, prompt=LONG, max_tokens=20)
    tokens = encoder.tokenize(MANY * 9)
    plan = encoder.plan(tokens, list(range(len(MANY) * 9)), 100)
    sizes = [sum(encoder.costs(tokens, rows).values()) for rows in plan]
    assert sorted(itertools.chain(*plan)) == list(range(len(MANY) * 9))
    assert max(sizes) <= 100 and np.mean(sizes) > 80 and min(sizes[:-1]) > 70
    assert encoder.plan(tokens, [0, 1], 1) in ([[0], [1]], [[1], [0]])  # a text longer than the budget goes alone


def test_a_sequence_costs_more_where_a_gpu_computes_gradients(llama):
    encoder = Encoder.load(llama)
    tokens = encoder.tokenize(MANY)
    plain = encoder.costs(tokens, [0, 1])
    encoder.device = torch.device("cuda")
    assert encoder.costs(tokens, [0, 1]) == plain
    encoder.decoder.train()
    assert encoder.costs(tokens, [0, 1]) == {row: cost + BACKWARD_COST for row, cost in plain.items()}


def test_what_does_not_fit_into_memory_is_halved(llama, monkeypatch):
    expected = Encoder.load(llama).encode(MANY)
    encoder, forward, first, second = Encoder.load(llama), Encoder.forward, EncodingReport(), EncodingReport()

    def full(self, batch, *args):
        if len(batch.ids) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, batch, *args)

    monkeypatch.setattr(Encoder, "forward", full)
    limit = 70
    np.testing.assert_allclose(encoder.encode(MANY, report=first), expected, atol=1e-6)
    assert 0 < len(first.notes) < 4 and "batches were halved to" in first.notes[0] and first.notes[0] in first.warnings()
    encoder.encode(MANY, report=second)
    assert not second.notes  # the size that was too much is remembered
    limit = 3
    with pytest.raises(InputError, match="does not fit into memory: lower max_tokens"):
        encoder.encode(MANY)


def test_processes_with_different_memory_still_share_one_plan(llama, monkeypatch):
    """One of two halves its batches, the other does not: every text is embedded exactly once."""
    expected, shares = Encoder.load(llama).encode(MANY * 3), []
    for rank, limit in ((0, 20), (1, 10**9)):
        encoder = Encoder.load(llama)
        encoder.memory_limit = limit
        monkeypatch.setattr("encoder.encoder.distributed", lambda rank=rank: Distributed(rank, 2, None))
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)
        shares.append(encoder.encode(MANY * 3, batch_tokens=60))
    assert not ((shares[0] != 0).any(1) & (shares[1] != 0).any(1)).any()
    np.testing.assert_allclose(shares[0] + shares[1], expected, atol=1e-6)


def test_a_stream_may_be_left_or_fail(llama, monkeypatch):
    monkeypatch.setattr(streaming, "WINDOW", 3)
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
    monkeypatch.setattr(streaming, "WINDOW_CHARACTERS", 50)
    monkeypatch.setattr(streaming, "WINDOW", 1000)
    assert [len(window) for (window,) in encoder.stream(["x" * 30] * 5)] == [2, 2, 1]


SHARD = """
import json, os, sys
import numpy as np
from encoder import Encoder, streaming
streaming.WINDOW = 8
texts = json.loads(sys.argv[2])
forward, mine = Encoder.forward, []
Encoder.forward = lambda self, batch, *args: mine.append(len(batch.spans)) or forward(self, batch, *args)
vectors = Encoder.load(sys.argv[1], prompt="cluster").encode(texts, batch_tokens=60)
np.savez("{}/{RANK}-of-{WORLD_SIZE}.npz".format(sys.argv[3], **os.environ), vectors=vectors, mine=np.array(sum(mine)))
"""


@pytest.mark.slow
def test_two_processes_share_the_work_and_get_the_vectors_of_one(llama, tmp_path):
    (tmp_path / "shard.py").write_text(SHARD)
    for n in (1, 2):
        done = torchrun(tmp_path / "shard.py", llama, json.dumps(MANY * 4), tmp_path, n=n)
        assert done.returncode == 0, done.stderr
    alone, first, second = (np.load(tmp_path / f"{name}.npz") for name in ("0-of-1", "0-of-2", "1-of-2"))
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
