"""Received attention, rollout and gradient x input against the plain way: transformers' whole matrices, one text at a time."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TEXTS, make_run
from test_packing import LONG, MANY
from transformers import AutoModelForCausalLM

from attention_analysis import received
from attention_analysis.gradients import gradient_times_input
from attention_analysis.received import received_attention
from attention_analysis.rollout import attention_rollout
from encoder import Encoder
from files.console import InputError


def matrices(model: str, ids: list[int]) -> torch.Tensor:
    """Attention (L, H, n, n) by transformers' eager implementation."""
    lm = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").eval()
    with torch.no_grad():
        return torch.cat(lm.base_model(torch.tensor([ids]), output_attentions=True).attentions)


@pytest.mark.parametrize("block", [1, 300, 2**21])
@pytest.mark.parametrize("prompt", [LONG, "none"])
def test_received_attention_is_the_mean_of_columns(model, prompt, block, monkeypatch):
    monkeypatch.setattr(received.column_sums, "__defaults__", (block,))
    encoder = Encoder.load(model, prompt=prompt, pooling="mean", max_tokens=40)
    texts = [text for text in TEXTS if text]
    for ids, values in zip(encoder.tokenize(texts).ids, received_attention(encoder, texts), strict=True):
        expected = matrices(model, ids).mean(2).permute(2, 0, 1)  # (n, L, H)
        np.testing.assert_allclose(values, expected, atol=1e-6)


def test_received_attention_of_both_directions_sees_all(llama):
    encoder = Encoder.load(llama, prompt="cluster", pooling="mean", attention="bidirectional")
    one_by_one = [received_attention(encoder, [text])[0] for text in MANY]
    for alone, values, ids in zip(one_by_one, received_attention(encoder, MANY), encoder.tokenize(MANY).ids, strict=True):
        np.testing.assert_allclose(values, alone, atol=1e-6)
        np.testing.assert_allclose(values.sum(0), 1, atol=1e-5)
        assert len(values) == len(ids) and values[-1].min() > 0


def test_rollout_is_the_last_row_of_the_product_of_the_layers(model):
    encoder = Encoder.load(model, prompt=LONG, max_tokens=20)
    for ids, values in zip(encoder.tokenize(TEXTS).ids, attention_rollout(encoder, TEXTS), strict=True):
        product = torch.eye(len(ids))
        for layer in matrices(model, ids).mean(1):
            product = (0.5 * layer + 0.5 * torch.eye(len(ids))) @ product
        np.testing.assert_allclose(values, product[-1], atol=1e-6)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_gradient_times_input_is_that_of_one_text_alone(model, pooling):
    encoder = Encoder.load(model, prompt="cluster", pooling=pooling, scope="all")
    lm = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").eval()
    reference = torch.from_numpy(encoder.encode([""])[0])
    first = int(encoder.contract.bos)
    for ids, values in zip(encoder.tokenize(TEXTS).ids, gradient_times_input(encoder, TEXTS), strict=True):
        embedded = lm.get_input_embeddings()(torch.tensor([ids])).detach().requires_grad_()
        states = lm.base_model(inputs_embeds=embedded).last_hidden_state[0]
        vector = states[-1] if pooling == "last" else states[first:].mean(0)
        (gradient,) = torch.autograd.grad(F.cosine_similarity(vector, reference, dim=0), embedded)
        np.testing.assert_allclose(values, (gradient * embedded).sum(-1)[0].detach(), atol=2e-5, rtol=1e-3)


def test_looking_leaves_the_model_as_it_was(llama, tmp_path):
    encoder = Encoder.load(make_run(llama, tmp_path / "run", prompt="cluster", pooling="last"))
    before = encoder.encode(MANY)
    for look in (received_attention, attention_rollout, gradient_times_input):
        sides = look(encoder, MANY), look(encoder.untuned(), MANY)
        assert max(np.abs(a - b).max() for a, b in zip(*sides, strict=True)) > 1e-4  # the adapter shows
        assert np.array_equal(encoder.encode(MANY), before)
    assert all(parameter.grad is None for parameter in encoder.decoder.parameters())


def test_a_text_without_a_token(models_dir):
    encoder = Encoder.load(models_dir["qwen3"], prompt="none", pooling="mean")
    assert [len(values) for values in received_attention(encoder, ["", "a"])] == [0, 1]
    assert [values.tolist() for values in attention_rollout(encoder, ["", "a"])] == [[], [1.0]]
    with pytest.raises(InputError, match="has no token here: take a prompt"):
        gradient_times_input(encoder, ["a"])


def test_several_prompts_and_padded_classes_are_refused(llama, tmp_path):
    from test_classes import make

    encoder = Encoder.load(llama, prompt="cluster || classify")
    gpt2 = Encoder.load(make(tmp_path / "gpt2", "gpt2"), prompt="cluster")
    for look in (received_attention, attention_rollout, gradient_times_input):
        with pytest.raises(InputError, match="take one prompt"):
            look(encoder, ["a"])
        with pytest.raises(InputError, match="does not let its attention be read"):
            look(gpt2, ["a"])
