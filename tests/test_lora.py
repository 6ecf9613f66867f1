"""The adapter: which layers it reaches, merging, and the fused layer against peft's own."""

import json

import numpy as np
import pytest
import torch
from conftest import TEXTS, make_run, randomize_adapter
from peft import AutoPeftModelForFeatureExtraction, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModel

from encoder import Encoder
from encoder.lora import LoRALinear, fuse_adapter
from encoder.names import read_lora_settings
from encoder.tokenization import TokenizedTexts
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


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["o_proj"]])
def test_an_adapter_on_chosen_layers(llama, targets, tmp_path):
    encoder = Encoder.load(llama)
    encoder.add_adapter(2, targets=targets)
    adapted = {name.split(".lora_")[0].split(".")[-1] for name in encoder.trainable()}
    assert adapted == set(targets) and len(encoder.trainable()) == 2 * 3 * len(targets)
    randomize_adapter(encoder)
    encoder.save(tmp_path)
    np.testing.assert_allclose(Encoder.load(str(tmp_path)).encode(TEXTS), encoder.encode(TEXTS), atol=1e-6)
    assert sorted(read_lora_settings(tmp_path)["lora_targets"]) == sorted(targets)
    with pytest.raises(InputError, match="no linear layer is called q, up: there are down_proj, gate_proj, k_proj, o_proj, q_proj"):
        Encoder.load(llama).add_adapter(2, targets=["q", "q_proj", "up"])


@pytest.mark.parametrize("options", [{}, {"use_dora": True, "use_rslora": True}])
def test_plain_peft_reads_a_run_as_we_do(model, options, tmp_path):
    """The same last hidden states, with the base that the config names and with one that is given."""
    encoder = Encoder.load(model)
    encoder.add_adapter(4, 16, **options)
    randomize_adapter(encoder)
    encoder.save(tmp_path)
    ours = Encoder.load(str(tmp_path))
    ids = ours.tokenizer(TEXTS[2], return_tensors="pt")["input_ids"]
    batch = ours.collate(TokenizedTexts([ids[0].tolist()], [(0, len(ids[0]))], 0, 0, 0), [0])
    with torch.no_grad():
        states = ours.forward(batch).layers[-1]
        for plain in (
            AutoPeftModelForFeatureExtraction.from_pretrained(tmp_path),
            PeftModel.from_pretrained(AutoModel.from_pretrained(model), tmp_path),
        ):
            torch.testing.assert_close(plain(input_ids=ids).last_hidden_state[0], states, rtol=1e-4, atol=1e-4)
            merged = plain.merge_and_unload()
            torch.testing.assert_close(merged(input_ids=ids).last_hidden_state[0], states, rtol=1e-4, atol=1e-4)
        assert (AutoModel.from_pretrained(model)(input_ids=ids).last_hidden_state[0] - states).abs().max() > 0.1


def test_a_run_whose_bundled_base_lies_elsewhere_is_loaded(tmp_path):
    """As on another machine, where the folder in the adapter's config does not exist."""
    run = make_run("tiny", tmp_path)
    whole = Encoder.load(run).fingerprint
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/elsewhere/models/tiny"}))
    assert Encoder.load(run).fingerprint == whole


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_loaded_adapter_can_be_trained_on(llama, tmp_path, dropout):
    run = make_run(llama, tmp_path, pooling="query")
    encoder = Encoder.load(run)
    assert not encoder.trainable()
    encoder.unfreeze_adapter(dropout)
    fresh = Encoder.load(llama, pooling="query")
    fresh.add_adapter(4, dropout=dropout)
    assert set(encoder.trainable()) == set(fresh.trainable())
    for ours, theirs in zip(encoder.decoder.modules(), fresh.decoder.modules(), strict=True):
        assert type(ours) is type(theirs) and ("forward" in vars(ours)) == ("forward" in vars(theirs))
    np.testing.assert_allclose(encoder.encode(TEXTS), Encoder.load(run).encode(TEXTS), atol=1e-6)


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
