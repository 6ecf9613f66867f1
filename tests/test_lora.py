"""The adapter: which layers it reaches, merging, and the fused layer against peft's own."""

import numpy as np
import pytest
import torch
from conftest import TEXTS, randomize_adapter
from peft import LoraConfig, get_peft_model

from encoder import Encoder
from encoder.lora import LoRALinear, fuse_adapter
from files.console import InputError


def test_every_linear_layer_of_every_block_is_adapted(model):
    encoder = Encoder.load(model)
    encoder.add_adapter(2)
    linear = {
        n for n, m in encoder.decoder.named_modules() if type(m).__name__ == "Linear" and "layers" in n and not n.endswith("base_layer")
    }
    adapted = {n.split(".lora_")[0] for n, _ in encoder.decoder.named_parameters() if ".lora_A" in n}
    assert len(adapted) >= 3 * 4 and not any(n for n in linear if ".lora_" not in n and n not in adapted)
    assert all("lora_" in name for name in encoder.trainable())


def test_merging_costs_no_accuracy_in_float32(model, tmp_path):
    encoder = Encoder.load(model, prompt="cluster")
    encoder.add_adapter(4)
    randomize_adapter(encoder)
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
    assert torch.autograd.gradcheck(lambda x, a, b: LoRALinear.apply(x, weight, offset, a, b, 2.0), (x, a, b))
    expected = layer(x)
    gradients = torch.autograd.grad(expected.square().sum(), (x, a, b))
    fuse_adapter(model)
    assert "forward" in vars(layer)
    fused = layer(x)
    torch.testing.assert_close(fused, expected)
    for ours, theirs in zip(torch.autograd.grad(fused.square().sum(), (x, a, b)), gradients, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not weight.requires_grad
    with model.disable_adapter():
        torch.testing.assert_close(layer(x), base(x))


def test_adapters_that_are_more_than_a_product_stay_as_they_are(llama):
    for options in ({"dropout": 0.1}, {"use_dora": True}):
        encoder = Encoder.load(llama)
        encoder.add_adapter(2, **options)
        fuse_adapter(encoder.decoder)
        assert not any("forward" in vars(m) for m in encoder.decoder.modules())


@pytest.mark.parametrize("every", [2, 1])
def test_every_nth_layer_is_computed_again_in_the_backward_pass(model, every):
    encoder = Encoder.load(model, prompt="cluster")
    encoder.set_gradient_checkpointing(every)
    assert [b.gradient_checkpointing for b in encoder.blocks] == {2: [False, True, False], 1: [True] * 3}[every]
    encoder.set_gradient_checkpointing(0)
    assert not any(b.gradient_checkpointing for b in encoder.blocks)
