"""Tokens hidden from the last token, against transformers' eager attention with the same places closed."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TEXTS
from test_packing import LONG, MANY, plain_varlen
from transformers import AutoModelForCausalLM

from encoder import Encoder, packing
from encoder.attention_masks import hiding
from files.console import InputError


def every_third(ids: list[int], span: tuple[int, int]) -> np.ndarray:
    """Also the last token, where it falls on it: that is not obeyed."""
    return np.arange(len(ids)) % 3 == 0


def dense(model: str, ids: list[int], layers: set[int]) -> torch.Tensor:
    """The last token's state after the final norm, with every third token hidden from it in these layers."""
    lm = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").eval()
    hidden = np.flatnonzero(every_third(ids, (0, 0))[:-1])

    def close(_, args, kwargs):
        mask = kwargs["attention_mask"].clone()
        mask[..., -1, hidden] = -torch.inf
        return args, kwargs | {"attention_mask": mask}

    for layer in layers:
        lm.base_model.layers[layer].register_forward_pre_hook(close, with_kwargs=True)
    with torch.no_grad():
        return lm.base_model(torch.tensor([ids])).last_hidden_state[0, -1]


def load(model: str, **settings) -> Encoder:
    return Encoder.load(model, prompt=LONG, pooling="last", max_tokens=20, **settings)


@pytest.mark.parametrize("layers", [None, {0}, {1, 2}])
@pytest.mark.parametrize("trims", [True, False])
def test_vectors_are_those_of_attention_with_these_places_closed(model, layers, trims):
    encoder = load(model)
    encoder.trim_last_layer = trims
    vectors = hiding(encoder, every_third, layers).encode(TEXTS)
    expected = [dense(model, ids, layers or {0, 1, 2}) for ids in encoder.tokenize(TEXTS).ids]
    np.testing.assert_allclose(vectors, F.normalize(torch.stack(expected), dim=-1), atol=2e-5)
    assert np.abs(vectors - encoder.encode(TEXTS)).max() > 1e-3


def test_flash_attention_is_changed_alike(model, monkeypatch):
    encoder = load(model)
    expected = hiding(encoder, every_third).encode(MANY)
    monkeypatch.setattr(packing, "varlen_attn", plain_varlen, raising=False)
    encoder.attention_implementation = "varlen"
    np.testing.assert_allclose(hiding(encoder, every_third).encode(MANY), expected, atol=1e-5)


def test_the_encoder_stays_as_it_was(llama):
    encoder = load(llama)
    before = encoder.encode(MANY)
    hidden = hiding(encoder, every_third)
    assert not np.array_equal(hidden.encode(MANY), before)
    assert np.array_equal(encoder.encode(MANY), before) and encoder.attention_mask is None
    # nothing hidden: the last row is computed once more, by another order of sums
    np.testing.assert_allclose(hiding(encoder, lambda ids, _: np.zeros(len(ids), bool)).encode(MANY), before, atol=1e-5)


def test_everything_may_be_hidden_but_the_last_token_itself(llama):
    encoder, texts = Encoder.load(llama, prompt="none", pooling="last"), ["The cat sat.", "", "a"]
    vectors = hiding(encoder, lambda ids, _: np.ones(len(ids), bool), {2}).encode(texts)
    assert np.isfinite(vectors).all()
    assert np.array_equal(hiding(encoder, lambda ids, _: np.arange(len(ids)) < len(ids) - 1, {2}).encode(texts), vectors)


def test_a_layer_that_does_not_exist_is_refused(llama):
    with pytest.raises(InputError, match=r"layers \[2, 7\]: this model has layers 1 to 3"):
        hiding(load(llama), every_third, {1, 6})


def test_a_padded_class_is_refused(tmp_path):
    from test_classes import make

    with pytest.raises(InputError, match="does not let its attention be changed"):
        hiding(Encoder.load(make(tmp_path / "gpt2", "gpt2"), prompt="cluster", pooling="last"), every_third)
