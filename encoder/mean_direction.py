"""The mean direction taken out of vectors: variant R2 of Ren et al. 2025, arXiv 2511.11041.

Vectors of one model share a component that hardly depends on the text. Each is projected off the direction of the mean vector of some
texts, which were embedded as documents. Queries are projected off the same direction, so that both stay in one space.

Legend: N texts, D numbers of a vector.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from encoder.contract import PoolingConfig
from encoder.lora import save_tensors
from encoder.nearest import unit
from encoder.tokenization import check_list
from files.console import InputError, Progress
from files.writing import write_atomic

if TYPE_CHECKING:
    from encoder.encoder import Encoder

NAME = "direction"  # of the tensor in the file
SHORTEST = 1e-6  # mean of unit vectors below which it has no direction


def identity(texts: list[str], name: str) -> dict[str, str]:
    """What the contract says of the texts: their file's name and a hash of the texts themselves."""
    return {"name": name, "sha256": hashlib.sha256(json.dumps(texts).encode()).hexdigest()}


def mean_directions(
    encoder: "Encoder", texts: Iterable[str], poolings: list[PoolingConfig], *, progress: bool = False
) -> dict[PoolingConfig, Tensor]:
    """The unit vector (D,) float32 along the mean of the texts' unit vectors, for each pooling, from the same forward passes.

    Raises InputError where there are fewer than two different texts, and where their mean is zero.
    """
    texts = list(check_list(texts))
    if len(set(texts)) < 2:
        raise InputError(f"a mean needs two different texts or more, and {len(set(texts))} was given")
    sums = [np.zeros(encoder.width_of(pooling.pooling)) for pooling in poolings]
    with Progress(len(texts), "measuring the mean", "text", disable=not progress) as bar:
        for arrays in encoder.stream(texts, poolings=poolings, done=bar.update):
            for total, vectors in zip(sums, arrays, strict=True):
                total += unit(vectors).sum(0, dtype=np.float64)
    norms = [float(np.linalg.norm(total)) for total in sums]
    if min(norms) < SHORTEST * len(texts):
        raise InputError("the mean of these texts' vectors is zero: it has no direction to remove")
    directions = [torch.from_numpy((total / norm).astype(np.float32)) for total, norm in zip(sums, norms, strict=True)]
    return {pooling: direction.to(encoder.device) for pooling, direction in zip(poolings, directions, strict=True)}


def project_off(vectors: Tensor, direction: Tensor) -> Tensor:
    """Vectors (N, D) less what lies along the unit vector (D,)."""
    return vectors - (vectors @ direction)[:, None] * direction


def save_direction(direction: Tensor, path: Path) -> None:
    write_atomic(path, lambda temporary: save_tensors({NAME: direction.cpu()}, temporary))


def load_direction(path: Path, width: int) -> Tensor:
    """The direction (width,) of a file. Raises InputError where it is missing or no unit vector of that size."""
    try:
        direction = load_file(path)[NAME].float()
    except (OSError, SafetensorError, KeyError) as error:
        raise InputError(f"{path} is missing or damaged ({' '.join(str(error).split())[:100]})") from None
    if direction.shape != (width,) or not abs(float(direction.norm()) - 1) < 1e-3:  # not where one is NaN
        raise InputError(f"{path} is damaged: it holds no unit vector of {width} numbers")
    return direction
