"""The adapter: LoRA on every linear layer of every block, or on those asked for, through peft, with a fused layer in place of peft's own.

peft inserts its layers into the model in place. What peft returns is the handle by which the adapter is saved, switched off
and merged.
"""

import functools
import inspect
import json
import os
import re
import tempfile
import warnings
from pathlib import Path
from unittest import mock

import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from encoder.contract import ADAPTER_CONFIG, ADAPTER_FILE
from files.console import InputError
from files.writing import errors_of_writing, write_atomic


def _wrap(model: nn.Module, config):
    from peft import get_peft_model
    from peft.utils import transformers_weight_conversion as conversion

    # peft would take `down_proj` among the targets for the experts' weights of that name, and leave out linear layers of that name
    keep_targets = mock.patch.object(conversion, "convert_peft_config_for_transformers", lambda *_, **__: None)
    with keep_targets, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 asks transformers 5.23 by a name that it is about to drop
        # a hub model is loaded from its snapshot, and `save_lora` writes its hub id; for Conv1D peft sets fan_in_fan_out itself
        warnings.simplefilter("ignore", UserWarning)
        return get_peft_model(model, config)


def _is_linear(module: nn.Module) -> bool:
    """Routers of experts may be linear layers by class, but return more than a product."""
    return isinstance(module, (nn.Linear, Conv1D)) and not type(module).__name__.endswith("Router")


def add_lora(
    model: nn.Module, blocks: nn.ModuleList, rank: int, alpha: int | None, dropout: float, targets: list[str] | None = None, **options
):
    """Insert a fresh adapter of float32 weights -> its peft handle.

    alpha       the output is scaled by alpha / rank; default: the rank
    targets     last names of the linear layers that get one, such as q_proj; default: all
    options     peft's own, such as use_rslora and use_dora
    Raises InputError for a target that does not exist.
    """
    from peft import LoraConfig

    _check_reachable(blocks)
    layers = {name.split(".")[-1] for name, module in blocks.named_modules() if _is_linear(module)}
    if unknown := [name for name in targets or [] if name not in layers]:
        raise InputError(f"--lora-targets: no linear layer is called {', '.join(unknown)}: there are {', '.join(sorted(layers))}")
    chosen = set(targets or layers)
    linear = {module for name, module in blocks.named_modules() if _is_linear(module) and name.split(".")[-1] in chosen}
    paths = {name: module in linear for name, module in model.named_modules()}
    names = {path.split(".")[-1] for path, is_target in paths.items() if is_target}
    if any(not is_target and path.split(".")[-1] in names for path, is_target in paths.items()):  # such as "0", in a sequence of layers
        names = {path for path, is_target in paths.items() if is_target}
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha or rank,
        lora_dropout=dropout,
        target_modules=sorted(names),
        bias="none",
        **options,
    )
    handle = _wrap(model, config)
    fuse_adapter(model)
    return handle


def unreached(blocks: nn.ModuleList) -> list[str]:
    """Names of the modules whose matrices are in no linear layer, such as a mixture's experts."""
    names = set()
    for name, module in blocks.named_modules():
        is_known = _is_linear(module) or isinstance(module, nn.Conv1d)
        if not is_known and any(p.squeeze().dim() > 1 for p in module.parameters(recurse=False)):
            names.add(name.partition(".")[2])
    return sorted(names)


def _check_reachable(blocks: nn.ModuleList) -> None:
    """Raise InputError for state-space layers whose fused kernels take the weights of linear layers, past any adapter."""
    for module in blocks.modules():
        children = dict(module.named_children())
        if any(isinstance(child, nn.Conv1d) for child in children.values()):
            source = inspect.getsource(type(module))
            if any(isinstance(child, nn.Linear) and f"self.{name}.weight" in source for name, child in children.items()):
                raise InputError(f"{type(module).__name__} reads weights of linear layers past an adapter: it cannot be trained")


def load_lora(model: nn.Module, run: Path):
    """Insert the adapter in the folder of a run, frozen -> its peft handle. Raises InputError where it is missing or does not fit."""
    from peft import LoraConfig, set_peft_model_state_dict

    path = run / ADAPTER_FILE
    if not path.is_file():
        raise InputError(f"{run} has a contract but no {ADAPTER_FILE}: its training was stopped before the first checkpoint")
    try:
        handle = _wrap(model, LoraConfig.from_pretrained(run))
        report = set_peft_model_state_dict(handle, load_file(path))
    except (SafetensorError, json.JSONDecodeError, RuntimeError, ValueError, TypeError) as error:
        raise InputError(f"the adapter in {run} is damaged or does not fit its base: {' '.join(str(error).split())[:200]}") from None
    missing = [name for name in report.missing_keys if "lora_" in name]
    if report.unexpected_keys or missing:
        raise InputError(f"{path} does not fit its base: missing {missing[:3]}, unexpected {report.unexpected_keys[:3]}")
    handle.requires_grad_(False).eval()
    fuse_adapter(model)
    return handle


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file; what goes wrong is an OSError."""
    try:
        save_file(tensors, path, metadata=metadata or {"format": "pt"})
    except SafetensorError as error:  # "Error while serializing: I/O error: No space left on device (os error 28)"
        raise OSError(re.sub(r"^.*I/O error: |\s*\(os error \d+\)", "", str(error))) from None


def unfreeze(handle, dropout: float) -> None:
    """Let a loaded adapter be trained on, with this dropout on its inputs."""
    handle.peft_config["default"].lora_dropout = dropout
    for module in handle.modules():
        if "default" in getattr(module, "lora_dropout", ()):
            module.lora_dropout["default"] = nn.Dropout(dropout) if dropout else nn.Identity()
            vars(module).pop("forward", None)
    for name, parameter in handle.named_parameters():
        parameter.requires_grad_("lora_" in name)
    fuse_adapter(handle)


def save_lora(handle, folder: Path, base: str, revision: str | None) -> None:
    """Write the adapter and its config, each file complete or not at all.

    base, revision    what the config names: a hub id and its commit, or a folder and None
    """
    from peft import get_peft_model_state_dict

    weights = {name: weight.detach().cpu().contiguous() for name, weight in get_peft_model_state_dict(handle).items()}
    write_atomic(folder / ADAPTER_FILE, lambda path: save_tensors(weights, path))
    with errors_of_writing(folder / ADAPTER_CONFIG), tempfile.TemporaryDirectory(dir=folder, prefix=".", suffix=".tmp") as scratch:
        config = handle.peft_config["default"]
        config.base_model_name_or_path, config.revision = base, revision
        config.task_type = "FEATURE_EXTRACTION"  # by which AutoPeftModelForFeatureExtraction knows it for its own
        config.save_pretrained(scratch)
        os.replace(Path(scratch) / ADAPTER_CONFIG, folder / ADAPTER_CONFIG)


def is_merged(model: nn.Module) -> bool:
    """Whether the adapter is added to the base's weights."""
    layer = next((module for module in model.modules() if hasattr(module, "merged")), None)
    return layer is not None and layer.merged


# ------------------------------------------------------------------------------------------------------ the fused layer


class LoRALinear(Function):
    """x W' + bias + scale (x A') B' in three matrix products forwards and five backwards, with nothing between them.

    peft's layer takes the same products, and passes over the whole output twice more in each direction, to scale and to add
    (bench/README.md has what that costs). x (..., in), weight (out, in), a (rank, in), b (out, rank);
    computed in the dtype of `weight`, which gets no gradient.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1]).to(weight.dtype)
        a, b = a.to(weight.dtype), (scale * b).to(weight.dtype)
        inner = flat @ a.T
        out = F.linear(flat.view(x.shape), weight, bias)  # in its final shape: a view could not be changed in place, as OLMo does
        out.view(-1, len(weight)).addmm_(inner, b.T)
        ctx.save_for_backward(flat, weight, a, b, inner)
        ctx.scale, ctx.shape, ctx.dtype = scale, x.shape, x.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple:
        flat, weight, a, b, inner = ctx.saved_tensors
        gradient = gradient.reshape(-1, len(weight)).to(weight.dtype)
        back = gradient @ b
        dx = (gradient @ weight).addmm_(back, a).view(ctx.shape).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        return dx, None, None, back.T @ flat, ctx.scale * (gradient.T @ inner), None


def fuse_adapter(model: nn.Module) -> None:
    """Let every plain LoRA layer of peft's compute through `LoRALinear`; others (DoRA, dropout, quantized) stay as they are."""
    from peft.tuners.lora import Linear

    def forward(layer, x: Tensor, *_, **__) -> Tensor:
        base = layer.base_layer
        if layer.disable_adapters or layer.merged:
            return base(x)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        return LoRALinear.apply(x, base.weight, base.bias, a, b, layer.scaling["default"])

    for layer in model.modules():
        is_plain = type(layer) is Linear and type(layer.base_layer) is nn.Linear and not layer.use_dora["default"]
        if is_plain and isinstance(layer.lora_dropout["default"], nn.Identity):
            layer.forward = functools.partial(forward, layer)


def keep_input_dtype(model: nn.Module) -> None:
    """Under autocast, stop peft from casting each adapter's input to float32: autocast would cast it straight back."""
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False
