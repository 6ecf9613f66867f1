"""Several prompts, whose vectors are averaged: the arithmetic, the contract, training, and what is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TEXTS, make_run, randomize_adapter
from short_runs import ShortRuns, metrics, run

from encoder import Contract, Encoder, PoolingConfig
from encoder.contract import POOLINGS, SCOPES
from files.console import InputError
from prompts import META_EOL, get_prompt, prompt_label
from serving.folder import check_expressible, serving_note
from training.gradients import embed

THREE = 'This sentence: "{text}" belongs to the following cluster: || {text} || The cat: {text} sat {text}, that is'
CONFIGS = [PoolingConfig(pooling, scope) for pooling in POOLINGS for scope in SCOPES]


def normalized(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def test_a_vector_is_the_mean_of_those_under_each_prompt(model):
    """Of the states as they are pooled: normalized is only their mean."""
    several = Encoder.load(model, prompt=THREE, max_tokens=40)
    single = [Encoder.load(model, prompt=prompt, max_tokens=40, normalize=False) for prompt in THREE.split(" || ")]
    each = [encoder.encode(TEXTS, poolings=CONFIGS) for encoder in single]
    together = several.encode(TEXTS, poolings=CONFIGS)
    alone = [np.concatenate(of) for of in zip(*(several.encode([text], poolings=CONFIGS) for text in TEXTS), strict=True)]
    for config, expected, a, b in zip(CONFIGS, zip(*each, strict=True), alone, together, strict=True):
        np.testing.assert_allclose(b, normalized(np.mean(expected, axis=0)), atol=1e-5, err_msg=str(config))
        np.testing.assert_allclose(b, a, atol=1e-5, err_msg=str(config))
    small_batches = several.encode(TEXTS, batch_tokens=40, poolings=CONFIGS)
    np.testing.assert_allclose(np.hstack(small_batches), np.hstack(together), atol=1e-5)


def test_each_role_has_its_prompts(llama):
    encoder = Encoder.load(llama, prompt="cluster || classify", query_prompt="{text} asks || {text}: || about {text}", pooling="last")
    roles = encoder.contract.prompts
    assert [len(roles[role]) for role in ("query", "document")] == [3, 2]
    single = [
        Encoder.load(llama, prompt=p, pooling="last", scope="all", normalize=False) for p in ("{text} asks", "{text}:", "about {text}")
    ]
    expected = np.mean([other.encode(TEXTS) for other in single], axis=0)
    np.testing.assert_allclose(encoder.encode(TEXTS, "query"), normalized(expected), atol=1e-5)
    assert np.abs(encoder.encode(TEXTS, "query") - encoder.encode(TEXTS)).max() > 1e-2
    one = Encoder.load(llama, prompt="cluster || classify", query_prompt="cluster", pooling="last")
    np.testing.assert_allclose(one.encode(TEXTS, "query"), Encoder.load(llama, prompt="cluster").encode(TEXTS), atol=1e-5)


def test_a_text_without_a_token_under_one_of_them(llama):
    encoder = Encoder.load(llama, prompt="{text} || a {text}", bos=False, pooling="mean")
    vectors, alone = encoder.encode(["", "cat", ""]), encoder.encode([""])[0]
    np.testing.assert_allclose(vectors, np.stack([alone, encoder.encode(["cat"])[0], alone]), atol=1e-6)
    assert np.linalg.norm(alone) == pytest.approx(1)  # of the second prompt
    assert not Encoder.load(llama, prompt="{text} || {text}", bos=False).encode([""]).any()


def test_batches_are_filled_by_the_longest_prompt_and_in_training_by_all(llama):
    encoder = Encoder.load(llama, prompt="{text} || {text} and the cat")
    tokenized = encoder.tokenize(TEXTS)
    short, long = len(tokenized.ids[0]), len(tokenized.more[0].ids[0])
    assert encoder.costs(tokenized, [0]) == {0: long}
    encoder.decoder.train()
    assert encoder.costs(tokenized, [0]) == {0: short + long}


def test_token_prepending_works_under_each(llama):
    settings = {"pooling": "last", "token_prepending": (1, 2)}
    several = Encoder.load(llama, prompt="cluster || classify", **settings).encode(TEXTS)
    each = [Encoder.load(llama, prompt=prompt, normalize=False, **settings).encode(TEXTS) for prompt in ("cluster", "classify")]
    np.testing.assert_allclose(several, normalized(np.mean(each, axis=0)), atol=1e-5)


def test_metaeol_is_a_preset():
    assert len(META_EOL) == 8 and all(prompt.endswith(":") for prompt in META_EOL)
    encoder = Encoder.load("tiny", prompt="meta-eol")
    assert encoder.contract.pooling == "last" and prompt_label(encoder.contract.prompts) == "meta-eol"
    each = [Encoder.load("tiny", prompt=prompt, normalize=False).encode(TEXTS) for prompt in META_EOL]
    np.testing.assert_allclose(encoder.encode(TEXTS), normalized(np.mean(each, axis=0)), atol=1e-5)


def test_the_contract_keeps_them_and_their_order(llama, tmp_path):
    encoder = Encoder.load(llama, prompt=THREE)
    again = Contract.from_json(encoder.contract.to_json())
    assert again == encoder.contract and prompt_label(again.prompts) == THREE
    other = " || ".join(reversed(THREE.split(" || ")))
    assert len({Encoder.load(llama, prompt=prompt).fingerprint for prompt in (THREE, other, "cluster")}) == 3
    loaded = make_run(llama, tmp_path / "run", prompt=THREE)
    Encoder.load(loaded, prompt=THREE)
    with pytest.raises(InputError, match=r"prompt is .* in the run, 'cluster' was asked for"):
        Encoder.load(loaded, prompt="cluster")
    one = encoder.contract.prompts["document"][0]
    for wrong in ([], [one], [one, {"prefix": ""}], [one, [one, one]], "a || b"):
        with pytest.raises(InputError, match="prompts must be a prefix, a suffix and perhaps a middle, or a list of several"):
            replace(encoder.contract, prompts={"query": one, "document": wrong})


def test_presets_and_templates_may_be_mixed():
    roles = get_prompt("retrieve || {text}").roles()
    assert roles["query"] == [get_prompt("retrieve").roles()["query"], {"prefix": "", "suffix": ""}]
    assert roles["document"] == [get_prompt("retrieve").roles()["document"], {"prefix": "", "suffix": ""}]
    assert get_prompt("meta-eol || cluster").roles()["query"] == [
        *get_prompt("meta-eol").roles()["query"],
        get_prompt("cluster").roles()["query"],
    ]
    assert get_prompt("{text} a||b {text}").roles() == get_prompt("{text} a || b {text}").roles()  # and no text given twice
    for wrong in ("cluster || ", "cluster || Cluster", "a || b", " || {text}"):
        with pytest.raises(InputError, match="unknown prompt"):
            get_prompt(wrong)


@pytest.mark.parametrize("checkpointing", [0, 1])
def test_gradients_are_those_of_the_mean(llama, checkpointing):
    several, first, second = (
        Encoder.load(llama, prompt=prompt, pooling="mean", normalize=False) for prompt in ("cluster || classify", "cluster", "classify")
    )
    gradients = []
    for group in ([several], [first, second]):
        for encoder in group:
            torch.manual_seed(0)
            encoder.add_adapter(2)
            randomize_adapter(encoder)
            encoder.set_gradient_checkpointing(checkpointing)
            encoder.decoder.train()
        vectors = torch.stack([embed(encoder, encoder.tokenize(TEXTS), list(range(len(TEXTS)))) for encoder in group]).mean(0)
        (vectors @ torch.linspace(-1, 1, 32)).square().sum().backward()
        gradients.append([sum(of) for of in zip(*([p.grad for p in encoder.trainable().values()] for encoder in group), strict=True)])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_run_is_trained_and_read_under_several_prompts(llama, tmp_path):
    runs = ShortRuns(llama, tmp_path)
    run(*runs("two", "--prompt", "cluster || classify"))
    run(*runs("one", "--prompt", "cluster"))
    run(*runs("other", "--prompt", "classify"))
    contract = json.loads((tmp_path / "two" / "embedding.json").read_text())
    assert len(contract["prompts"]["document"]) == 2
    one, other, two = (metrics(tmp_path / name)[0]["tokens"] for name in ("one", "other", "two"))
    assert two == one + other  # every sequence of a text counts
    encoder = Encoder.load(str(tmp_path / "two"))
    assert np.abs(encoder.encode(TEXTS) - encoder.untuned().encode(TEXTS)).max() > 1e-4
    assert encoder.merge() < 1e-5


def test_what_cannot_have_them_refuses_them(llama, tmp_path):
    encoder = Encoder.load(llama, prompt=THREE)
    with pytest.raises(InputError, match="under several prompts a text has several last tokens: take one prompt"):
        encoder.last_token_attention(["a"])
    for runtime in ("sentence-transformers", "vllm", "tei", "onnx", "gguf"):
        with pytest.raises(InputError, match=f"^{runtime} cannot serve the mean of several prompts: it has one prompt$"):
            check_expressible(encoder.contract, runtime)
    assert serving_note(encoder.contract).startswith("no serving runtime has")
    with pytest.raises(InputError, match=r"tokens of prompt do not fit the model's 256 positions"):
        Encoder.load(llama, prompt="{text} || " + "cat " * 100 + "{text}", max_tokens=200)
