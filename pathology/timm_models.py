"""Patch models of timm: UNI, UNI2-h, Virchow2, H-optimus-0, GigaPath, and any folder or hub id with timm's config.json. An optional extra.

    pip install -r pathology/requirements-timm.txt
    python -m pathology.extract tiles/ --model virchow2 --out feats/virchow2

timm needs torchvision, which has to fit the build of PyTorch. `load` gives a module with the two things that models.py reads from
transformers' classes: `config`, and outputs with `last_hidden_state` and `pooler_output`. Such models cannot be fine-tuned here.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from files.console import InputError
from pathology.files import require

if TYPE_CHECKING:
    import torch

MODEL_TYPE = "timm"  # stands where transformers' configs have the name of a class
WEIGHTS = "model.safetensors"
SWIGLU = {"mlp_layer": "SwiGLUPacked", "act_layer": "SiLU"}  # classes of timm.layers and torch.nn, which JSON cannot hold
GIANT = {"img_size": 224, "embed_dim": 1536, "num_heads": 24, "init_values": 1e-5}
# of models whose config.json says too little: architecture and arguments by their cards
CONFIGS = {
    "uni": {"architecture": "vit_large_patch16_224", "img_size": 224, "init_values": 1e-5, "dynamic_img_size": True},
    "uni2-h": {"architecture": "vit_giant_patch14_224", "depth": 24, "mlp_ratio": 2.66667 * 2, "no_embed_class": True, "reg_tokens": 8}
    | GIANT
    | SWIGLU
    | {"dynamic_img_size": True},
    "virchow2": {"architecture": "vit_huge_patch14_224", "img_size": 224, "init_values": 1e-5, "mlp_ratio": 5.3375, "reg_tokens": 4}
    | SWIGLU
    | {"global_pool": "", "dynamic_img_size": True},
    "h-optimus-0": {"architecture": "vit_giant_patch14_reg4_dinov2", "img_size": 224, "init_values": 1e-5, "dynamic_img_size": False},
    "gigapath": {"architecture": "vit_giant_patch14_dinov2", "patch_size": 16, "depth": 40, "mlp_ratio": 5.33334} | GIANT,
}


def is_timm(config: dict) -> bool:
    """Whether a config.json is one that timm wrote."""
    return "architecture" in config and "model_type" not in config


def embedding_values(config: dict, rule: str) -> dict:
    """Rule, input_size, mean and std of a folder's config.json: "pool", what timm itself pools, unless the model pools nothing."""
    about = config.get("pretrained_cfg", config)
    arguments = arguments_of(config)
    size = arguments.get("img_size") or about.get("input_size", (3, 224, 224))[-1]
    size = size if isinstance(size, int) else size[0]
    values = {"rule": "cls" if arguments.get("global_pool") == "" else rule, "input_size": size}
    return values | {name: tuple(about[name]) for name in ("mean", "std") if name in about}


def arguments_of(config: dict) -> dict:
    """Architecture and arguments of `timm.create_model`, as CONFIGS has them, of a config.json."""
    names = ("global_pool", "img_size")
    return {"architecture": config["architecture"]} | {n: config[n] for n in names if n in config} | config.get("model_args", {})


def load(config: dict, weights: Path | None) -> "torch.nn.Module":
    """A model without its classifier. config: as in CONFIGS; weights: its model.safetensors, None for random ones. Raises InputError."""
    require("timm", "pathology/requirements-timm.txt")
    import torch
    from safetensors import SafetensorError

    try:
        import timm
    except (RuntimeError, ImportError) as error:  # a torchvision of another build of PyTorch raises a RuntimeError
        raise InputError(f"timm cannot be imported ({error}): install the torchvision that fits PyTorch {torch.__version__}") from None
    options = {key: value for key, value in config.items() if key != "architecture"} | {"num_classes": 0}
    for name, layers in (("mlp_layer", timm.layers), ("act_layer", torch.nn)):
        if name in options:
            options[name] = getattr(layers, options[name], options[name])
    try:
        model = timm.create_model(config["architecture"], **options)
        if weights is not None:
            load_weights(model, weights)
    except (OSError, RuntimeError, ValueError, TypeError, AttributeError, SafetensorError) as error:
        raise InputError(f"{config['architecture']} of timm cannot be loaded ({' '.join(str(error).split())[:200]})") from None
    return wrapped(model, config)


def load_weights(model: "torch.nn.Module", weights: Path) -> None:
    """Fill a model that has no classifier. Raises InputError for weights that do not fit: timm's own loading would leave some random."""
    from safetensors.torch import load_file

    missing, unexpected = model.load_state_dict(load_file(weights), strict=False)
    classifiers = model.default_cfg.get("classifier") or ()
    classifiers = tuple(f"{name}." for name in ([classifiers] if isinstance(classifiers, str) else classifiers))
    unexpected = [name for name in unexpected if not name.startswith(classifiers)]
    if missing:
        raise InputError(f"{weights} lacks {len(missing)} weights, such as {missing[0]}: config.json does not describe it")
    if unexpected:
        raise InputError(f"{weights} holds weights of another model, such as {unexpected[0]}: config.json does not describe it")


def checked_weights(folder: Path, name: str) -> Path:
    """model.safetensors of a folder. Raises InputError where there is none: pickles are not read."""
    if not (folder / WEIGHTS).is_file():
        raise InputError(
            f"{name} has no {WEIGHTS}, and pickled weights are not read: if you trust its pytorch_model.bin, put {WEIGHTS} beside "
            "config.json in a folder, made by safetensors.torch.save_file(torch.load('pytorch_model.bin', weights_only=True), "
            "'model.safetensors')"
        )
    return folder / WEIGHTS


def wrapped(model: "torch.nn.Module", config: dict) -> "torch.nn.Module":
    """A model of timm behind the names that models.py reads."""
    import torch

    class TimmModel(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.timm, self.config = model, TimmConfig(model, config)

        def forward(self, images: "torch.Tensor") -> SimpleNamespace:
            states = self.timm.forward_features(images)
            return SimpleNamespace(last_hidden_state=states, pooler_output=self.timm.forward_head(states, pre_logits=True))

    return TimmModel()


class TimmConfig(SimpleNamespace):
    """What models.py reads from a config of transformers."""

    def __init__(self, model: "torch.nn.Module", config: dict):
        tokens = getattr(model, "num_prefix_tokens", 0)  # the class token and registers
        super().__init__(model_type=MODEL_TYPE, hidden_size=model.num_features, num_register_tokens=tokens - 1, arguments=config)
        self.has_tokens, self.pools = tokens > 0, getattr(model, "global_pool", None) != ""
        if patch_embed := getattr(model, "patch_embed", None):
            self.patch_size = patch_embed.patch_size

    def to_dict(self) -> dict:
        return json.loads(json.dumps(self.arguments))
