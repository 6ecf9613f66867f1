"""The optimizer and its learning rate."""

import argparse
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

TEMPERATURE = "temperature"  # name of the logarithm of the learned temperature among the trained parameters
MIN_TEMPERATURE = 0.01  # it goes no lower, as in CLIP (Radford et al. 2021, arXiv 2103.00020, 2.5)


def make_optimizer(trained: dict[str, "nn.Parameter"], args: argparse.Namespace) -> "torch.optim.Optimizer":
    """AdamW; a learned temperature does not decay."""
    import torch

    groups = [{"params": [p for name, p in trained.items() if name != TEMPERATURE]}]
    if TEMPERATURE in trained:
        groups.append({"params": [trained[TEMPERATURE]], "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=args.lr, weight_decay=args.weight_decay)


def n_warmup_steps(steps: int, warmup_ratio: float) -> int:
    return max(1, round(steps * warmup_ratio))


def learning_rate(step: int, steps: int, peak: float, warmup_ratio: float) -> float:
    """Linear warm-up over the first `warmup_ratio` of the steps, then a cosine down to zero."""
    warmup_steps = n_warmup_steps(steps, warmup_ratio)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))
