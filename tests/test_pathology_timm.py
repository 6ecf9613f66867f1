"""Patch models of timm: vectors, presets, and what cannot be loaded. `make test-pathology` runs it in an environment of its own."""

import json
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from files.console import InputError
from pathology import timm_models
from pathology.dino import check_backbone
from pathology.models import PRESETS, load_model, normalized, write_embedding

if find_spec("timm") is None:
    pytest.skip("timm is missing (pathology/requirements-timm.txt)", allow_module_level=True)
import timm

VIT = {"img_size": 28, "patch_size": 14, "embed_dim": 24, "depth": 2, "num_heads": 2, "reg_tokens": 3, "dynamic_img_size": True}
PICTURES = np.random.default_rng(0).integers(0, 256, (3, 40, 40, 3), dtype=np.uint8)


def save(folder, architecture: str = "vit_tiny_patch16_224", **arguments):
    """A folder as timm saves its models, with a classifier -> the model."""
    torch.manual_seed(0)
    model = timm.create_model(architecture, **arguments).eval()
    folder.mkdir()
    timm.models.save_for_hf(model, folder, model_args=arguments, safe_serialization=True)
    return model


def test_vectors_are_those_that_timm_pools(tmp_path):
    plain = save(tmp_path / "vit", **VIT)
    model = load_model(str(tmp_path / "vit"))
    assert (model.rule, model.dim) == ("pool", 24)
    cfg = plain.pretrained_cfg
    images = normalized(torch.from_numpy(PICTURES), model.input_size, cfg["mean"], cfg["std"])
    with torch.no_grad():
        expected = plain.forward_head(plain.forward_features(images), pre_logits=True)
    torch.testing.assert_close(model.embed(PICTURES), expected)


@pytest.mark.parametrize(("pool", "rule"), [("", "cls"), ("token", "pool"), ("avg", "pool")])
def test_the_rule_follows_from_what_the_model_pools(tmp_path, pool, rule):
    save(tmp_path / "vit", **VIT, global_pool=pool)
    assert load_model(str(tmp_path / "vit")).rule == rule


def test_class_token_and_mean_leave_registers_out(tmp_path):
    plain = save(tmp_path / "vit", **VIT, global_pool="")
    write_embedding(tmp_path / "vit", rule="cls+mean", input_size=42, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    model = load_model(str(tmp_path / "vit"))
    with torch.no_grad():
        states = plain.forward_features(normalized(torch.from_numpy(PICTURES), 42, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)))
    assert states.shape[1] == 1 + 3 + 9 and model.dim == 48
    torch.testing.assert_close(model.embed(PICTURES), torch.cat([states[:, 0], states[:, 4:].mean(1)], 1))


def test_a_network_without_tokens_has_what_it_pools(tmp_path):
    plain = save(tmp_path / "resnet", "resnet10t")
    model = load_model(str(tmp_path / "resnet"))
    images = normalized(torch.from_numpy(PICTURES), model.input_size, model.mean, model.std)
    with torch.no_grad():
        torch.testing.assert_close(model.embed(PICTURES), plain.forward_head(plain.forward_features(images), pre_logits=True))
    write_embedding(tmp_path / "resnet", rule="cls", input_size=64, mean=(0.5,) * 3, std=(0.5,) * 3)
    with pytest.raises(InputError, match="a ResNet has no tokens"):
        load_model(str(tmp_path / "resnet"))


# millions of parameters, by the models' cards
@pytest.mark.parametrize(
    ("name", "parameters", "dim", "registers"),
    [
        ("uni", 303, 1024, 0),
        ("uni2-h", 681, 1536, 8),
        ("virchow2", 631, 2560, 4),
        ("h-optimus-0", 1135, 1536, 4),
        ("gigapath", 1135, 1536, 0),
    ],
)
def test_presets_have_the_published_shapes(name, parameters, dim, registers):
    preset = PRESETS[name]
    with torch.device("meta"):
        module = timm_models.load(preset.config, None)
    assert round(sum(p.numel() for p in module.parameters()) / 1e6) == parameters
    assert module.config.hidden_size * (1 + (preset.embedding.rule == "cls+mean")) == dim
    assert module.config.num_register_tokens == registers and module.config.pools == (name != "virchow2")


def test_random_weights_follow_from_the_seed(tmp_path):
    save(tmp_path / "vit", **VIT)
    name = f"random:{tmp_path / 'vit'}"
    one, same, other, stored = load_model(name), load_model(name), load_model(name, seed=1), load_model(name.removeprefix("random:"))
    assert one.fingerprint == same.fingerprint and len({one.fingerprint, other.fingerprint, stored.fingerprint}) == 3
    assert one.rule == stored.rule and one.mean == stored.mean


def test_layers_that_json_cannot_hold_are_named(tmp_path):
    save(tmp_path / "vit", **VIT)
    config = json.loads((tmp_path / "vit" / "config.json").read_text())
    config["model_args"] |= timm_models.SWIGLU
    (tmp_path / "vit" / "config.json").write_text(json.dumps(config))
    module = load_model(f"random:{tmp_path / 'vit'}").module
    assert type(module.timm.blocks[0].mlp).__name__ == "GluMlp" and isinstance(module.timm.blocks[0].mlp.act, torch.nn.SiLU)


def test_what_cannot_be_loaded_is_said_in_a_line(tmp_path):
    save(tmp_path / "vit", **VIT)
    config = tmp_path / "vit" / "config.json"
    text = config.read_text()
    for content, message in (
        (text.replace('"depth": 2', '"depth": 3'), "lacks 12 weights, such as blocks.2"),
        (text.replace('"depth": 2', '"depth": 1'), "weights of another model, such as blocks.1"),
        (text.replace('"embed_dim": 24', '"embed_dim": 48'), "cannot be loaded .*size mismatch"),
        (text.replace("vit_tiny_patch16_224", "vit_none"), "cannot be loaded"),
        (text.replace('"depth": 2', '"size": 3'), "cannot be loaded"),
    ):
        config.write_text(content)
        with pytest.raises(InputError, match=message) as error:
            load_model(str(tmp_path / "vit"))
        assert "\n" not in str(error.value)
    config.write_text(text)
    write_embedding(tmp_path / "vit", rule="cls", input_size=7, mean=(0.5,) * 3, std=(0.5,) * 3)
    with pytest.raises(InputError, match="smaller than one patch"):
        load_model(str(tmp_path / "vit"))
    (tmp_path / "vit" / "model.safetensors").rename(tmp_path / "vit" / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"no model.safetensors, and pickled weights are not read"):
        load_model(str(tmp_path / "vit"))


def test_a_pool_that_is_not_there_is_refused(tmp_path):
    save(tmp_path / "vit", **VIT, global_pool="")
    write_embedding(tmp_path / "vit", rule="pool", input_size=28, mean=(0.5,) * 3, std=(0.5,) * 3)
    with pytest.raises(InputError, match="pools nothing itself"):
        load_model(str(tmp_path / "vit"))


def test_fine_tuning_refuses_it(tmp_path):
    save(tmp_path / "vit", **VIT)
    with pytest.raises(InputError, match="a model of type timm cannot be trained here"):
        check_backbone(load_model(str(tmp_path / "vit")).module, (28,))
