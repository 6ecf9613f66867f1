"""Slides from bags of patch features: gated attention, the mean, or a small transformer; on packed bags, without padding.

    gated          tanh(V x) * sigmoid(U x) -> a score of every patch; the bag's vector is the softmax-weighted mean of its patches
                   (Ilse, Tomczak and Welling 2018, arXiv 1802.04712), by pooling_kernels.attention_pool
    mean           the mean of the patches, by pooling_kernels.mean_pool
    transformer    two layers in which the patches of a bag see each other and a class token, whose state is the bag's vector

Behind each stands a linear layer to the classes. A bag may hold 1 to 100,000 patches; the transformer, whose time grows with the square
of them, takes MAX_TOKENS at even steps of a larger one.

The folder of a model, see `save_mil`: model.safetensors and config.json
    {"format": 1, "aggregator", "dim", "hidden", "classes": [...], "features": {"model", "fingerprint"}}

Legend: B bags, T patches of all bags, D features, E hidden width, C classes.
"""

import itertools
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from files.console import InputError
from files.writing import write_atomic, write_json
from pooling_kernels import attention_pool, mean_pool

FORMAT = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
AGGREGATORS = ("gated", "mean", "transformer")
DROPOUT = 0.25  # as CLAM (Lu et al. 2021, arXiv 2004.09666)
LAYERS, HEADS, MAX_TOKENS = 2, 4, 4096  # of the transformer
MAX_PATCHES = 65536  # in memory at a time


class Mil(nn.Module):
    """A bag's logits. config: as in the folder of a model. Features are standardized by mean and scale of the training patches."""

    def __init__(self, config: dict):
        super().__init__()
        self.config = config
        dim, hidden = config["dim"], config["hidden"]
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))
        self.project = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Dropout(DROPOUT))
        if config["aggregator"] == "gated":
            self.tanh, self.sigmoid, self.score = nn.Linear(hidden, hidden // 2), nn.Linear(hidden, hidden // 2), nn.Linear(hidden // 2, 1)
        elif config["aggregator"] == "transformer":
            self.class_token = nn.Parameter(torch.zeros(1, 1, hidden))
            layer = nn.TransformerEncoderLayer(hidden, HEADS, 2 * hidden, DROPOUT, batch_first=True, norm_first=True)
            self.encoder = nn.TransformerEncoder(layer, LAYERS, nn.LayerNorm(hidden), enable_nested_tensor=False)
        self.classify = nn.Linear(hidden, len(config["classes"]))

    def forward(self, features: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features (T, D) of packed bags, running sum of their lengths (B + 1,) -> logits (B, C), scores (T, 1) or None.

        The scores are those before the softmax over a bag; the mean and the transformer have none. An empty bag has the vector 0.
        """
        if features.ndim != 2 or features.shape[1] != self.config["dim"]:
            raise ValueError(f"features must be (T, {self.config['dim']}), they are {tuple(features.shape)}")
        x = self.project((features.float() - self.mean) / self.scale)
        if self.config["aggregator"] == "mean":
            return self.classify(mean_pool(x, cu_seqlens=cu_seqlens)), None
        if self.config["aggregator"] == "transformer":
            bounds = cu_seqlens.tolist()
            bags = [self.encode(x[start:end]) for start, end in itertools.pairwise(bounds)]
            return self.classify(torch.stack(bags)), None
        scores = self.score(torch.tanh(self.tanh(x)) * torch.sigmoid(self.sigmoid(x)))  # (T, 1)
        pooled, _ = attention_pool(x, scores, cu_seqlens=cu_seqlens)
        return self.classify(pooled[:, 0]), scores

    def encode(self, bag: Tensor) -> Tensor:
        """The class token's last state (E,) beside the patches (n, E) of one bag."""
        if len(bag) > MAX_TOKENS:
            bag = bag[torch.linspace(0, len(bag) - 1, MAX_TOKENS, device=bag.device).long()]
        return self.encoder(torch.cat([self.class_token, bag[None]], 1))[0, 0]

    def standardize_by(self, bags: Iterable[Tensor]) -> None:
        """Take mean and scale of features from these bags (n, D), which pass by once; each patch counts alike."""
        n, total, squares = 0, 0.0, 0.0
        for bag in bags:
            n, total, squares = n + len(bag), total + bag.double().sum(0), squares + bag.double().square().sum(0)
        variance = squares / n - (total / n) ** 2
        self.mean.copy_(total / n)
        self.scale.copy_(torch.where(variance > 1e-12, variance.sqrt(), 1))


def pack(bags: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Bags (n_b, D) -> features (T, D) and cu_seqlens (B + 1,) int32."""
    lengths = torch.tensor([0, *(len(bag) for bag in bags)])
    return torch.cat(bags), lengths.cumsum(0).int()


def groups_of(lengths: Iterable[int], most: int = MAX_PATCHES) -> list[list[int]]:
    """Numbers of the bags that go through memory together: at most `most` patches, or a single larger bag."""
    groups, size = [], 0
    for number, length in enumerate(lengths):
        if not groups or size + length > most:
            groups.append([])
            size = 0
        groups[-1].append(number)
        size += length
    return groups


def save_mil(model: Mil, folder: Path) -> None:
    """Write the weights, then config.json, without which the folder is no model. Raises WriteError."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_atomic(folder / WEIGHTS, lambda temporary: save_file(tensors, temporary, {"format": "pt"}))
    write_json(folder / CONFIG, model.config)


def load_mil(folder: Path) -> Mil:
    """The model of a folder, in eval mode on the CPU. Raises InputError where there is none, or it is damaged."""
    folder, advice = Path(folder), "make one with evaluate_slides.py --out"
    if not all((folder / name).is_file() for name in (CONFIG, WEIGHTS)):
        raise InputError(f"{folder} holds no slide model ({CONFIG}, {WEIGHTS}): {advice}")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (ValueError, OSError):
        raise InputError(f"{folder / CONFIG} is damaged: {advice}") from None
    if not is_config(config):
        raise InputError(f"{folder} holds a model of another kind, no slide model by its {CONFIG}: {advice}")
    try:
        tensors = load_file(folder / WEIGHTS)
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise ValueError("not finite")
        model = Mil(config)
        model.load_state_dict(tensors)
    except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError, OSError):
        raise InputError(f"{folder / WEIGHTS} is damaged, or does not belong to the {CONFIG} beside it: {advice}") from None
    return model.eval()


def is_config(config: object) -> bool:
    """Whether an object of JSON is the config of a slide model that this version can read."""
    if not isinstance(config, dict) or config.get("format") != FORMAT or config.get("aggregator") not in AGGREGATORS:
        return False
    sizes = all(isinstance(config.get(name), int) and config[name] > 0 for name in ("dim", "hidden"))
    features = config.get("features")
    return sizes and isinstance(config.get("classes"), list) and isinstance(features, dict) and {"model", "fingerprint"} <= set(features)
