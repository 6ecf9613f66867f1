"""Vectors: every pooling against a plain forward pass, isolation in a batch, prompts, BOS and EOS, empty texts, threads."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ARCHITECTURES, TEXTS, make_model, make_run
from transformers import AutoModelForCausalLM, AutoTokenizer

from encoder import Encoder, EncodingReport, PoolingConfig
from encoder.contract import POOLINGS, SCOPES
from files.console import InputError

ALL_POOLINGS = [PoolingConfig(p, s, layers) for p in POOLINGS for s in SCOPES for layers in ((-1,), (2,), (0, -2))]
ALL_POOLINGS += [PoolingConfig("attention", s, attention_layer=layer) for s in SCOPES for layer in (1, "60%", -2)]


def plain(model: str, encoder: Encoder, text: str, config: PoolingConfig) -> np.ndarray:
    """One text, no padding, eager attention, the pooling written out: what `encode` must equal."""
    lm = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").eval()
    tokenized = encoder.tokenize([text])
    ids, (start, end) = tokenized.ids[0], tokenized.spans[0]
    raw = {}
    blocks = lm.base_model.layers
    for i, block in enumerate(blocks):
        block.register_forward_hook(lambda _, __, out, i=i: raw.__setitem__(i + 1, out[0] if isinstance(out, tuple) else out))
    blocks[0].register_forward_pre_hook(lambda _, args: raw.__setitem__(0, args[0]))
    with torch.no_grad():
        out = lm.base_model(torch.tensor([ids]), output_attentions=True)
    raw[-1], raw[-2] = out.last_hidden_state, raw[len(blocks) - 1]
    x = torch.stack([raw[i][0] for i in config.layers]).double().mean(0)
    bos = int(encoder.contract.bos)
    chosen = list(range(start, end)) if config.scope == "text" and end > start else list(range(bos, len(ids))) or [0]
    if config.pooling == "mean":
        y = x[chosen].mean(0)
    elif config.pooling == "position-mean":
        w = torch.arange(1, len(chosen) + 1).double()
        y = (w[:, None] * x[chosen]).sum(0) / w.sum()
    elif config.pooling == "last":
        y = x[chosen[-1]]
    elif config.pooling == "max":
        y = x[chosen].max(0).values
    elif config.pooling == "last+mean":
        y = torch.cat([F.normalize(part, dim=0) for part in (x[chosen[-1]], x[chosen].mean(0))])
    elif config.pooling == "query":
        y = (x[chosen] @ encoder.query[0].double() / x.shape[1] ** 0.5).softmax(0) @ x[chosen]
    else:
        block = {-1: len(blocks) - 1, -2: len(blocks) - 2, 1: 0, "60%": round(0.6 * len(blocks)) - 1}[config.attention_layer]
        w = out.attentions[block][0, :, -1, chosen].double()  # (H, n)
        y = (w / w.sum(1, keepdim=True)).mean(0) @ x[chosen]
    return (y / y.norm()).numpy()


def test_every_pooling_equals_a_plain_forward_pass(model):
    encoder = Encoder.load(model, prompt="cluster", dtype="float32")
    encoder.query.data.normal_(generator=torch.Generator().manual_seed(0))
    by_pooling = encoder.encode(TEXTS[:3], poolings=ALL_POOLINGS)
    for config, vectors in zip(ALL_POOLINGS, by_pooling, strict=True):
        for text, vector in zip(TEXTS, vectors, strict=False):
            np.testing.assert_allclose(vector, plain(model, encoder, text, config), atol=1e-5, err_msg=f"{config}, {text!r}")


def test_sliding_windows_reach_the_attention_that_is_read(models_dir):
    """A last layer that sees 12 tokens gives nothing to those further back."""
    for name, expected in (("mistral", True), ("gemma3", True), ("llama", False)):
        (attention,) = Encoder.load(models_dir[name], dtype="float32").last_token_attention([TEXTS[2]])
        assert len(attention.weights) > 14
        assert bool((attention.weights[:-12] == 0).all()) == expected, name


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_a_vector_does_not_depend_on_its_batch(model, attention):
    """Alone, in a batch, with any neighbours, in any order: the same to 1e-5."""
    encoder = Encoder.load(model, prompt="cluster", attention=attention)
    encoder.query.data.normal_(generator=torch.Generator().manual_seed(0))
    poolings = [PoolingConfig(p, s) for p in POOLINGS for s in SCOPES]
    alone = [np.concatenate(arrays) for arrays in zip(*(encoder.encode([t], poolings=poolings) for t in TEXTS), strict=True)]
    for order in (range(len(TEXTS)), reversed(range(len(TEXTS)))):
        order = list(order)
        for budget in (4096, 40):
            together = encoder.encode([TEXTS[i] for i in order], poolings=poolings, batch_tokens=budget)
            for config, a, b in zip(poolings, alone, together, strict=True):
                np.testing.assert_allclose(b, a[order], atol=1e-5, err_msg=f"{config} {budget}")


def test_bidirectional_attention_changes_the_vectors(model):
    causal, both = (Encoder.load(model, attention=a, bos=False).encode(TEXTS[:3]) for a in ("causal", "bidirectional"))
    assert np.abs(causal[2] - both[2]).max() > 1e-3
    np.testing.assert_allclose(causal[1], both[1], atol=1e-5)  # a single token has nothing else to see


def test_bidirectional_vectors_are_those_that_transformers_gives(model):
    """With config.is_causal off, by its own masks, sliding windows included."""
    encoder = Encoder.load(model, attention="bidirectional", pooling="mean", scope="all")
    lm = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").eval()
    lm.base_model.config.is_causal = False
    ids = torch.tensor(encoder.tokenize([TEXTS[2]]).ids)
    with torch.no_grad():
        states = lm.base_model(ids).last_hidden_state[0]
    expected = states[int(encoder.contract.bos) :].mean(0)
    vector = encoder.encode([TEXTS[2], TEXTS[0], ""])[0]  # beside shorter ones
    np.testing.assert_allclose(vector, (expected / expected.norm()).numpy(), atol=1e-5)


def test_bfloat16_stays_close():
    reference = Encoder.load("tiny", prompt="cluster").encode(TEXTS)
    rounded = Encoder.load("tiny", prompt="cluster", dtype="bfloat16").encode(TEXTS)
    assert rounded.dtype == np.float32
    assert (reference * rounded).sum(1).min() > 0.995


# ----------------------------------------------------------------------------------------------------- tokens


def test_of_a_text_given_twice_the_second_is_read(model, tmp_path):
    """As Springer et al. 2024: its tokens see the whole first copy. In every pooling, batched, by a run as by its base."""
    encoder = Encoder.load(model, prompt="echo", max_tokens=5)
    assert (encoder.contract.pooling, encoder.contract.scope) == ("mean", "text")
    tokenizer = AutoTokenizer.from_pretrained(model)
    parts = [
        tokenizer(s, add_special_tokens=False)["input_ids"] for s in ("Rewrite the sentence: ", "\nThe rewritten sentence: ", TEXTS[2])
    ]
    first, middle, text = parts[0], parts[1], parts[2][:5]
    ids = [tokenizer.bos_token_id] * encoder.contract.bos + first + text + middle + text
    tokenized = encoder.tokenize([TEXTS[2]])
    assert tokenized.ids == [ids] and tokenized.spans == [(len(ids) - len(text), len(ids))] and tokenized.n_truncated == 1
    poolings = [PoolingConfig(p, s) for p in POOLINGS for s in SCOPES]
    for config, vectors in zip(poolings, encoder.encode(TEXTS, poolings=poolings), strict=True):
        for text, vector in zip(TEXTS[:3], vectors, strict=False):
            np.testing.assert_allclose(vector, plain(model, encoder, text, config), atol=1e-5, err_msg=f"{config}, {text!r}")
    run = make_run(model, tmp_path / "run", prompt="echo", max_tokens=5)
    assert Encoder.load(run).untuned().fingerprint == encoder.fingerprint
    with pytest.raises(InputError, match=r"2 x max_tokens 200 \+ \d+ tokens of prompt do not fit .*: take at most \d\d"):
        Encoder.load(model, prompt="echo", max_tokens=200)


def test_prefix_text_and_suffix_are_tokenized_apart(model):
    encoder = Encoder.load(model, prompt="cluster", max_tokens=5)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenized = encoder.tokenize(TEXTS)
    prefix, suffix = (
        tokenizer(s, add_special_tokens=False)["input_ids"] for s in ('This sentence: "', '" belongs to the following cluster:')
    )
    before = [tokenizer.bos_token_id] * encoder.contract.bos + prefix
    for text, ids, span in zip(TEXTS, tokenized.ids, tokenized.spans, strict=True):
        text_ids = tokenizer(text, add_special_tokens=False)["input_ids"][:5]
        assert ids == before + text_ids + suffix
        assert ids[slice(*span)] == text_ids
    assert tokenized.prefix_length == len(before)
    assert (tokenized.n_truncated, tokenized.n_empty) == (3, 1)


def test_a_report_counts_what_happened_to_the_texts_of_its_calls(llama):
    encoder, report, other = Encoder.load(llama, max_tokens=5), EncodingReport(), EncodingReport()
    encoder.encode(TEXTS, report=report)
    encoder.encode(TEXTS)  # its texts are counted nowhere
    encoder.encode(["a"], report=other)
    expected = ["1 empty text was embedded as the prompt alone", "3 texts were truncated to 5 tokens"]
    assert report.warnings() == expected and other.warnings() == []
    encoder.last_token_attention(TEXTS, report=report)
    assert (report.n_empty, report.n_truncated) == (2, 6)


def test_threads_that_encode_at_once_get_the_vectors_of_one_after_the_other(model, tmp_path, monkeypatch):
    """Different poolings, layers and contracts, the adapter on and off, windows with and without a thread of their own."""
    monkeypatch.setattr("encoder.streaming.WINDOW", 7)
    tuned = Encoder.load(make_run(model, tmp_path / "run", prompt="cluster"))
    others = [tuned, tuned.untuned(), tuned.with_contract(pooling="attention", scope="text"), tuned.with_contract(layers=(1, -2))]
    texts = [f"{text} {i}" for i in range(4) for text in TEXTS]
    calls = [(encoder, texts[k:]) for k in range(3) for encoder in others]
    one_by_one = [encoder.encode(some) for encoder, some in calls]
    reports = [EncodingReport() for _ in calls]
    with ThreadPoolExecutor(6) as pool:
        at_once = list(pool.map(lambda call, report: call[0].encode(call[1], report=report), calls, reports))
    for a, b in zip(one_by_one, at_once, strict=True):
        np.testing.assert_array_equal(a, b)
    assert all(report.warnings() == [] for report in reports)


def test_bos_and_eos_follow_the_models_own_tokenizer(models_dir, tmp_path):
    for name in ARCHITECTURES:
        assert Encoder.load(models_dir[name]).contract.bos == (name in ("llama", "mistral", "gemma3"))
    with_eos = make_model(tmp_path / "eos", "qwen3", eos=True)
    encoder = Encoder.load(with_eos, prompt="cluster")
    assert encoder.contract.eos and encoder.tokenize(["a"]).ids[0][-1] == 2
    assert Encoder.load(with_eos, eos=False).tokenize(["a"]).ids[0][-1] != 2


def test_roles_have_their_own_prompts(llama):
    encoder = Encoder.load(llama, prompt="retrieve")
    query, document = (encoder.tokenize(["cat"], role).ids[0] for role in ("query", "document"))
    assert query != document
    with pytest.raises(InputError, match="unknown role 'passage'"):
        encoder.encode(["cat"], "passage")


def test_empty_texts(models_dir):
    prompted = Encoder.load(models_dir["qwen3"], prompt="cluster", pooling="mean", scope="text")
    everything = Encoder.load(models_dir["qwen3"], prompt="cluster", pooling="mean", scope="all")
    np.testing.assert_allclose(prompted.encode([""]), everything.encode([""]), atol=1e-6)  # the prompt alone
    bare = Encoder.load(models_dir["qwen3"]).encode(["", "cat", ""])
    assert np.all(bare[[0, 2]] == 0) and np.linalg.norm(bare[1]) == pytest.approx(1, abs=1e-5)
    only_bos = Encoder.load(models_dir["llama"]).encode([""])
    assert np.linalg.norm(only_bos) == pytest.approx(1, abs=1e-5)
    assert Encoder.load(models_dir["llama"]).encode([]).shape == (0, 32)


def test_what_is_no_text_is_refused_by_its_number(llama):
    with pytest.raises(InputError, match="text 1 is NoneType"):
        Encoder.load(llama).encode(["a", None])
    with pytest.raises(InputError, match="put a single text in brackets"):
        Encoder.load(llama).encode("a text")


def test_bos_takes_part_only_when_asked(llama):
    without = Encoder.load(llama, pooling="mean", scope="all").encode(["cat"])
    with_bos = Encoder.load(llama, pooling="mean", scope="all", keep_bos=True).encode(["cat"])
    assert np.abs(without - with_bos).max() > 1e-3
    with pytest.raises(InputError, match="keep_bos"):
        Encoder.load(llama, pooling="mean", scope="text", keep_bos=True)


def test_layers_dims_and_normalization(llama):
    raw = Encoder.load(llama, normalize=False).encode(TEXTS[:2])
    cut = Encoder.load(llama, dims=8).encode(TEXTS[:2])
    assert cut.shape == (2, 8)
    np.testing.assert_allclose(cut, raw[:, :8] / np.linalg.norm(raw[:, :8], axis=1, keepdims=True), atol=1e-6)
    np.testing.assert_allclose(Encoder.load(llama, layers=(-4,)).encode(TEXTS), Encoder.load(llama, layers=(0,)).encode(TEXTS))
    for layer in (4, -5):
        with pytest.raises(InputError, match=f"layer {layer} does not exist"):
            Encoder.load(llama, layers=(layer,))
    with pytest.raises(InputError, match="dims 33 is more than the 32"):
        Encoder.load(llama, dims=33)


def test_a_prompt_or_limit_that_does_not_fit_is_refused(llama):
    with pytest.raises(InputError, match="take at most"):
        Encoder.load(llama, prompt="cluster", max_tokens=250)
    with pytest.raises(InputError, match="take a shorter prompt"):
        Encoder.load(llama, prompt="cat " * 300 + "{text}")


def test_stored_vectors_of_the_bundled_model_are_still_what_they_were():
    """First five numbers of each vector, fp32, written down when the contract was: any path must reproduce them."""
    stored = json.loads((Path(__file__).parent / "stored_vectors.json").read_text())
    for item in stored["readings"]:
        vectors = Encoder.load("tiny", **item["settings"]).encode(stored["texts"])
        np.testing.assert_allclose(vectors[:, :5], item["vectors"], atol=1e-5, err_msg=str(item["settings"]))


def test_an_argument_of_sentence_transformers_is_refused_with_its_name_here(llama):
    encoder = Encoder.load(llama)
    for name, hint in (("batch_size", "batch_tokens"), ("normalize", "normalize=False"), ("show_progress_bar", "progress=True")):
        with pytest.raises(TypeError, match=f"encode takes no {name}: .*{hint}"):
            encoder.encode(["a"], **{name: 1})
    with pytest.raises(TypeError, match=r"encode takes no colour$"):
        encoder.encode(["a"], colour=1)
