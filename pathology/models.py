"""Patch models: transformers' vision classes, and the rule by which one vector is read from each.

    load_model("phikon-v2")                  a preset; also a local folder, or a hub id (org/name or org/name@revision)
    load_model("random:dinov2-small", seed=1)   the same shape with random weights: the baseline that every other model has to beat

Classes: Dinov2, Dinov2-with-registers, ViT, BEiT, ResNet; those of timm where it is installed (timm_models.py). A folder may hold
embedding.json, as `finetune.py` writes it:

    {"rule": "cls" | "mean" | "cls+mean" | "pool", "input_size": 224, "mean": [3 numbers], "std": [3 numbers]}

    cls        the first token of the last layer         mean    the mean of its patch tokens: neither first token nor registers
    cls+mean   both, one after the other                 pool    what the class itself pools: ResNet's average over the picture

Other folders are read by their preprocessor_config.json, and by the class's usual rule. Nothing here needs torchvision: pictures are
resized by torch (bicubic, anti-aliased), and the whole tile is seen, none of it cropped. Torch is imported where it is used.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from files.console import InputError
from files.writing import write_json
from pathology import timm_models

if TYPE_CHECKING:
    import numpy as np
    import torch

EMBEDDING_FILE = "embedding.json"
RULES = ("cls", "mean", "cls+mean", "pool")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HUB_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json", "preprocessor_config.json", EMBEDDING_FILE)
# a config's model_type -> the class, and the rule where nothing else is said
CLASSES = {
    "dinov2": ("Dinov2Model", "cls"),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", "cls"),
    "vit": ("ViTModel", "cls"),
    "beit": ("BeitModel", "pool"),
    "resnet": ("ResNetModel", "pool"),
}


@dataclass(frozen=True)
class Embedding:
    """How a vector is read: the rule, pixels of the model's input, and the mean and standard deviation of its channels (0 to 1)."""

    rule: str
    input_size: int = 224
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


@dataclass(frozen=True)
class Preset:
    """A published model. `config` is its shape, so that random weights need no download."""

    source: str
    model_type: str
    embedding: Embedding
    config: dict = field(default_factory=dict)


SMALL = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "image_size": 518, "patch_size": 14}
GIANT = {"hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24, "use_swiglu_ffn": True, "patch_size": 14}
LARGE_16 = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 224, "patch_size": 16}
# rules, sizes and normalisation are those of the models' cards
PRESETS = {
    "dinov2-small": Preset("facebook/dinov2-small", "dinov2", Embedding("cls"), SMALL),
    "dinov2-giant": Preset("facebook/dinov2-giant", "dinov2", Embedding("cls"), GIANT | {"image_size": 518}),
    "resnet50": Preset("microsoft/resnet-50", "resnet", Embedding("pool")),
    "phikon-v2": Preset("owkin/phikon-v2", "dinov2", Embedding("cls"), LARGE_16),
    "midnight": Preset("kaiko-ai/midnight", "dinov2", Embedding("cls+mean", 224, (0.5,) * 3, (0.5,) * 3), GIANT | {"image_size": 224}),
}
OPTIMUS_MEAN, OPTIMUS_STD = (0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517)
TIMM_SOURCES = {
    "uni": ("MahmoodLab/UNI", Embedding("cls")),
    "uni2-h": ("MahmoodLab/UNI2-h", Embedding("cls")),
    "virchow2": ("paige-ai/Virchow2", Embedding("cls+mean")),
    "h-optimus-0": ("bioptimus/H-optimus-0", Embedding("cls", 224, OPTIMUS_MEAN, OPTIMUS_STD)),
    "gigapath": ("prov-gigapath/prov-gigapath", Embedding("cls")),
}
PRESETS |= {
    name: Preset(source, timm_models.MODEL_TYPE, embedding, timm_models.CONFIGS[name]) for name, (source, embedding) in TIMM_SOURCES.items()
}


# ------------------------------------------------------------------------------------------------------ what is meant


@dataclass(frozen=True)
class Source:
    """What a name stands for: a preset, a folder or a hub id, and whether its weights are random. Nothing is loaded for it."""

    name: str
    preset: Preset | None
    folder: Path | None
    hub: str | None
    revision: str | None
    random: bool


def find_model(spec: str, revision: str | None = None) -> Source:
    """The source behind what a user typed. Raises InputError for what is none; needs neither torch nor a network."""
    random = spec.startswith("random:")
    name = spec.removeprefix("random:")
    preset = PRESETS.get(name)
    if preset is not None:
        return Source(spec, preset, None, None if random else preset.source, revision, random)
    path = Path(name).expanduser()
    if name and path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"{name}: a folder without config.json is no model")
        return Source(spec, None, path, None, None, random)
    hub, _, named = name.partition("@")
    if name.startswith((".", "/", "~")) or hub.count("/") != 1:
        raise InputError(f"no model {name!r}: give a folder that exists, a hub id like org/name, or one of {', '.join(PRESETS)}")
    return Source(spec, None, None, hub, revision or named or None, random)


def read_json(path: Path) -> dict:
    """The object of a JSON file, {} where there is no such file. Raises InputError for what is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        raise InputError(f"{path} cannot be read as JSON: mend it, or fetch the model again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object: mend it, or fetch the model again")
    return value


def write_embedding(folder: Path, *, rule: str, input_size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Write embedding.json beside a model's config and weights: `load_model` reads its vectors by it."""
    write_json(folder / EMBEDDING_FILE, asdict(checked_embedding(folder, Embedding(rule, input_size, tuple(mean), tuple(std)))))


def checked_embedding(folder: Path, embedding: Embedding) -> Embedding:
    """The same; raises InputError for values that cannot be."""
    if embedding.rule not in RULES:
        raise InputError(f"{folder}: no rule {embedding.rule!r} of embedding, take one of {', '.join(RULES)}")
    channels = (embedding.mean, embedding.std)
    numbers = all(len(values) == 3 and all(isinstance(v, (int, float)) and math.isfinite(v) for v in values) for values in channels)
    if not numbers or min(embedding.std) <= 0:
        raise InputError(f"{folder}: mean and std must be three numbers each, the latter above 0")
    if not (isinstance(embedding.input_size, int) and embedding.input_size > 0):
        raise InputError(f"{folder}: input_size must be a number of pixels, not {embedding.input_size!r}")
    return embedding


def read_embedding(folder: Path, model_type: str, config: dict) -> Embedding:
    """How vectors are read from the model in a folder: by its embedding.json, else its preprocessor_config.json, else its class."""
    if stored := read_json(folder / EMBEDDING_FILE):
        try:
            values = {
                "rule": stored["rule"],
                "input_size": stored["input_size"],
                "mean": tuple(stored["mean"]),
                "std": tuple(stored["std"]),
            }
        except (KeyError, TypeError):
            raise InputError(f"{folder / EMBEDDING_FILE} needs rule, input_size, mean and std") from None
        return checked_embedding(folder, Embedding(**values))
    if model_type == timm_models.MODEL_TYPE:
        return checked_embedding(folder, Embedding(**timm_models.embedding_values(config, "pool")))
    stored = read_json(folder / "preprocessor_config.json")
    size = stored.get("crop_size") or stored.get("size") or config.get("image_size", 224)
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge") or 224
    size = size[0] if isinstance(size, list) else size
    values = (stored.get(f"image_{name}", usual) for name, usual in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)))
    mean, std = (tuple(value) if isinstance(value, (list, tuple)) else (value,) * 3 for value in values)  # one number: of all channels
    return checked_embedding(folder, Embedding(CLASSES[model_type][1], size, mean, std))


# --------------------------------------------------------------------------------------------------------- the model


class PatchModel:
    """A vision model and the rule for its vectors.

    module        transformers' model, in eval mode
    dim           numbers of a vector
    fingerprint   of weights and rule, 16 hexadecimal digits: vectors of two fingerprints do not belong together
    """

    def __init__(self, name: str, module: "torch.nn.Module", embedding: Embedding, fingerprint: str):
        self.name, self.module, self.embedding, self.fingerprint = name, module, embedding, fingerprint
        config = module.config
        width = config.hidden_sizes[-1] if config.model_type == "resnet" else config.hidden_size
        self.dim = 2 * width if embedding.rule == "cls+mean" else width

    rule = property(lambda self: self.embedding.rule)
    input_size = property(lambda self: self.embedding.input_size)
    mean = property(lambda self: self.embedding.mean)
    std = property(lambda self: self.embedding.std)
    device = property(lambda self: next(self.module.parameters()).device)
    dtype = property(lambda self: next(self.module.parameters()).dtype)

    def embed(self, pixels: "torch.Tensor | np.ndarray") -> "torch.Tensor":
        """Pictures (B, H, W, 3) uint8 of any size -> vectors (B, dim) float32, on the model's device."""
        import torch

        if not isinstance(pixels, torch.Tensor):
            pixels = torch.from_numpy(pixels)
        with torch.inference_mode():
            images = normalized(pixels.to(self.device, non_blocking=True), self.input_size, self.mean, self.std)
            return pooled(self.module, images.to(self.dtype), self.rule).float()


def normalized(pixels: "torch.Tensor", size: int, mean: tuple, std: tuple) -> "torch.Tensor":
    """Pictures (B, H, W, 3) uint8 -> (B, 3, size, size) float32: resized (bicubic, anti-aliased), less `mean`, over `std`."""
    import torch

    images = pixels.permute(0, 3, 1, 2).float()
    if images.shape[2:] != (size, size):
        images = torch.nn.functional.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp_(0, 255)
    mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (mean, std))
    return images.div_(255).sub_(mean).div_(std)


def pooled(module: "torch.nn.Module", images: "torch.Tensor", rule: str) -> "torch.Tensor":
    """Images (B, 3, S, S) -> vectors (B, D) by `rule`. Grids of positions are interpolated where S is not the config's."""
    import torch

    kind = module.config.model_type
    options = {"interpolate_pos_encoding": True} if kind in ("vit", "beit") and images.shape[-1] != image_size(module.config) else {}
    output = module(images, **options)
    if rule == "pool":
        return output.pooler_output.flatten(1)
    states = output.last_hidden_state  # (B, 1 + registers + patches, D)
    if rule == "cls":
        return states[:, 0]
    patches = states[:, 1 + getattr(module.config, "num_register_tokens", 0) :].mean(1)
    return patches if rule == "mean" else torch.cat([states[:, 0], patches], 1)


def image_size(config: Any) -> int:
    size = config.image_size
    return size if isinstance(size, int) else size[0]


def fingerprint_of(module: "torch.nn.Module", embedding: Embedding) -> str:
    """16 hexadecimal digits of a model's weights as they were loaded, of its config, and of the rule."""
    import torch

    digest = hashlib.sha256(json.dumps(asdict(embedding), sort_keys=True).encode())
    ignored = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")
    config = {key: value for key, value in module.config.to_dict().items() if key not in ignored}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def model_class(model_type: str) -> type:
    import transformers

    return getattr(transformers, CLASSES[model_type][0])


def pooling_option(model_type: str, rule: str) -> dict:
    """ViT and BEiT have a pooling layer that other rules leave out, and that checkpoints often lack."""
    return {"add_pooling_layer": rule == "pool"} if model_type in ("vit", "beit") else {}


def load_model(spec: str, revision: str | None = None, device: str | None = None, dtype: Any = None, seed: int = 0) -> PatchModel:
    """A patch model, ready to embed. Raises InputError for what is no model, or cannot be loaded.

    spec      see the top of this module
    revision  of a hub id; the newest where None
    device    "cpu", "cuda", "cuda:N"; None: a GPU where there is one
    dtype     None: float32 on a CPU, bfloat16 on a GPU; "auto": bfloat16 also on CPUs with instructions for it
    seed      of random weights
    """
    import torch

    from encoder.runtime import pick_device, pick_dtype

    source = find_model(spec, revision)
    device = pick_device(device)
    dtype = pick_dtype(dtype, device)
    module, embedding = random_model(source, seed) if source.random else stored_model(source)
    fingerprint = fingerprint_of(module, embedding)
    check_input_size(module, embedding, spec)
    with torch.no_grad():
        module = module.to(device=device, dtype=dtype).eval()
    return PatchModel(spec, module, embedding, fingerprint)


def check_input_size(module: "torch.nn.Module", embedding: Embedding, spec: str) -> None:
    patch = getattr(module.config, "patch_size", None)
    patch = patch[0] if isinstance(patch, (list, tuple)) else patch
    if patch and embedding.input_size < patch:
        raise InputError(f"{spec}: an input of {embedding.input_size} pixels is smaller than one patch of {patch}")
    tokens = getattr(module.config, "has_tokens", module.config.model_type != "resnet")
    if not tokens and embedding.rule != "pool":
        raise InputError(f"{spec}: a ResNet has no tokens, its rule is pool, not {embedding.rule}")
    if embedding.rule == "pool" and not getattr(module.config, "pools", True):
        raise InputError(f"{spec}: this model pools nothing itself, its rule is cls, mean or cls+mean")


def checked_config(folder: Path, spec: str) -> dict:
    """config.json of a folder, "model_type" of timm's filled in. Raises InputError for a class that is not among CLASSES."""
    config = read_json(folder / "config.json")
    if timm_models.is_timm(config):
        return config | {"model_type": timm_models.MODEL_TYPE}
    if config.get("model_type") not in CLASSES:
        raise InputError(f"{spec}: no patch model of a known class ({config.get('model_type')}), take one of {', '.join(CLASSES)}")
    return config


def random_model(source: Source, seed: int) -> tuple["torch.nn.Module", Embedding]:
    """A model in the shape of a preset or of a folder's config.json with random weights, the same for the same seed."""
    import torch
    import transformers

    if source.preset is not None:
        kind, config, embedding = source.preset.model_type, source.preset.config, source.preset.embedding
    else:
        folder = source.folder or fetched(source)
        config = checked_config(folder, source.name)
        kind, embedding = config["model_type"], read_embedding(folder, config["model_type"], config)
    with errors_of_building(f"{source.name}: its config.json makes no model"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == timm_models.MODEL_TYPE:
            return timm_models.load(config if source.preset else timm_models.arguments_of(config), None), embedding
        config = transformers.CONFIG_MAPPING[kind](**{key: value for key, value in config.items() if key != "model_type"})
        return model_class(kind)(config, **pooling_option(kind, embedding.rule)), embedding


@contextmanager
def errors_of_building(what: str) -> Iterator[None]:
    """Turns what transformers raises for damaged weights, and for numbers in a config that cannot be, into an InputError."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, ArithmeticError, SafetensorError, StrictDataclassError) as error:
        raise InputError(f"{what} ({' '.join(str(error).split())[:200]})") from None


def fetched(source: Source) -> Path:
    """The folder of a hub model, from the cache or the hub. Raises InputError."""
    from encoder.base_models import fetch

    return fetch(source.hub, source.revision, False, HUB_FILES)


def stored_model(source: Source) -> tuple["torch.nn.Module", Embedding]:
    """A model from its folder, which is fetched where `source` is on the hub."""
    from transformers.utils import logging

    folder = source.folder or fetched(source)
    config = checked_config(folder, source.name)
    kind = config["model_type"]
    embedding = source.preset.embedding if source.preset else read_embedding(folder, kind, config)
    if kind == timm_models.MODEL_TYPE:
        arguments = source.preset.config if source.preset else timm_models.arguments_of(config)
        return timm_models.load(arguments, timm_models.checked_weights(folder, source.name)), embedding
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the pooling layer or a head are left over, as expected
    logging.disable_progress_bar()
    options = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        with errors_of_building(f"{source.name}: its weights cannot be loaded"):
            module, report = model_class(kind).from_pretrained(folder, **options, **pooling_option(kind, embedding.rule))
    finally:
        logging.set_verbosity(verbosity)
    if other := sorted(str(name) for name, *_ in report["mismatched_keys"]):
        raise InputError(f"{source.name}: {len(other)} of its weights have another shape than config.json says, such as {other[0]}")
    if missing := sorted(report["missing_keys"]):
        raise InputError(f"{source.name}: {len(missing)} of its weights are missing, such as {missing[0]}: they would be random")
    return module, embedding
