"""Self-supervised learning in the manner of DINOv2 (Oquab et al. 2023, arXiv 2304.07193): networks, losses, schedules.

A student sees two global views of a patch, parts of them masked, and several local ones; a teacher sees the global views whole. The
teacher's weights are a moving average of the student's (EMA). The loss has three parts:

    DINO    the student's class token of every view predicts the teacher's of the other global views, as shares of K prototypes
    iBOT    the student's masked tokens predict the teacher's tokens at these places
    KoLeo   class tokens of a batch keep apart

Shares of the teacher are centred by Sinkhorn-Knopp, so that all prototypes are used equally: without it every patch could get the same.
The numbers below are those of DINOv2's code (`dinov2/configs/ssl_default_config.yaml`) unless a comment says otherwise.

Legend: B patches, V views, M masked tokens, N tokens of a view, D features, K prototypes.
"""

import copy
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from encoder.processes import distributed
from files.console import InputError
from pathology.crops import Views

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEAD_HIDDEN, HEAD_BOTTLENECK = 2048, 256
STUDENT_TEMPERATURE, TEACHER_TEMPERATURE = 0.1, (0.04, 0.07)
TEACHER_WARMUP = 0.3  # share of the steps in which the teacher's temperature rises
FROZEN_PROTOTYPES = 0.01  # share of the steps in which they stand still at first
PATCH_LR = 0.2  # factor of the learning rate of the patch embedding
SINKHORN_ITERATIONS = 3
TRAINABLE = ("dinov2", "dinov2_with_registers", "vit")  # classes of transformers with tokens, a mask token and a grid that can be resized


class Network(nn.Module):
    """A backbone with its two heads; student and teacher are one each."""

    def __init__(self, backbone: "PreTrainedModel", prototypes: int):
        super().__init__()
        self.backbone = backbone
        self.dino_head, self.ibot_head = (Head(backbone.config.hidden_size, prototypes) for _ in range(2))


class Head(nn.Module):
    """Three layers, then the cosines with K prototypes. (..., D) -> (..., K)."""

    def __init__(self, dim: int, prototypes: int):
        super().__init__()
        hidden, bottleneck = HEAD_HIDDEN, HEAD_BOTTLENECK
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck))
        for layer in self.mlp[::2]:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.prototypes = nn.Parameter(torch.randn(prototypes, bottleneck))

    def forward(self, x: Tensor) -> Tensor:
        return functional.normalize(self.mlp(x), dim=-1, eps=1e-6) @ functional.normalize(self.prototypes, dim=-1).T


def check_backbone(model: "PreTrainedModel", sizes: tuple[int, ...]) -> None:
    """Raise InputError unless the model is of a class in TRAINABLE, and views of these sizes are whole numbers of its patches."""
    kind = model.config.model_type
    if kind not in TRAINABLE:
        raise InputError(f"--init: a model of type {kind} cannot be trained here: take one of type {', '.join(TRAINABLE)}")
    patch = model.config.patch_size
    for size in sizes:
        if size % patch:
            below = max(patch, size // patch * patch)
            raise InputError(f"a view of {size} pixels is no whole number of patches of {patch}: take {below} or {below + patch}")


def resized(model: "PreTrainedModel", size: int) -> "PreTrainedModel":
    """The same model, with its grid of positions interpolated to pictures of `size` pixels (bicubic, as transformers does)."""
    new = copy.deepcopy(model)
    new.config.image_size, embeddings = size, new.embeddings
    n_tokens, width = (size // new.config.patch_size) ** 2, new.config.hidden_size
    with torch.no_grad():
        positions = embeddings.interpolate_pos_encoding(torch.empty(1, n_tokens + 1, width), size, size)
    embeddings.position_embeddings = nn.Parameter(positions.clone())
    embeddings.patch_embeddings.image_size, embeddings.patch_embeddings.num_patches = (size, size), n_tokens
    embeddings.image_size = (size, size)  # a ViT compares it with its pictures
    if embeddings.mask_token is None:  # a ViT that was loaded without one
        embeddings.mask_token = nn.Parameter(torch.zeros(1, 1, width))
    return new


def tokens(backbone: "PreTrainedModel", views: Tensor, masks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Class tokens (V, D) and patch tokens (V, N, D) of views (V, 3, S, S), of which `masks` (V, N) bool hides some."""
    more = {"interpolate_pos_encoding": True} if backbone.config.model_type == "vit" else {}
    states = backbone(views, bool_masked_pos=masks, **more).last_hidden_state
    first = 1 + getattr(backbone.config, "num_register_tokens", 0)
    return states[:, 0], states[:, first:]


# ------------------------------------------------------------------------------------------------------------- losses


@torch.no_grad()
def sinkhorn(cosines: Tensor, temperature: float, iterations: int = SINKHORN_ITERATIONS) -> Tensor:
    """Shares (R, K) of rows (R, K) that sum to 1 in each row, and nearly R / K in each prototype, over the rows of all processes.

    Caron et al. 2020 (SwAV, arXiv 2006.09882), as DINOv2 uses it. All processes must call it, with any number of rows, 0 included.
    """
    _, world_size, _ = distributed()

    def total(x: Tensor) -> Tensor:
        if world_size > 1:
            torch.distributed.all_reduce(x)
        return x

    shares = torch.exp(cosines.float() / temperature)
    n_rows = total(torch.tensor(float(len(shares)), device=shares.device))
    if n_rows == 0:
        return shares
    shares = shares / total(shares.sum())
    for _ in range(iterations):
        columns = total(shares.sum(0))
        shares = shares / (columns.clamp(min=1e-30) * shares.shape[1])
        shares = shares / (shares.sum(1, keepdim=True).clamp(min=1e-30) * n_rows)
    return shares * n_rows


def cross_entropy(targets: Tensor, cosines: Tensor) -> Tensor:
    """Of each row (..., K) -> (...)."""
    return -(targets * functional.log_softmax(cosines.float() / STUDENT_TEMPERATURE, -1)).sum(-1)


def dino_loss(targets: Tensor, large: Tensor, small: Tensor) -> Tensor:
    """Mean over all pairs of a student's view and a teacher's view that differ.

    targets    (2, B, K) shares by the teacher, of its two global views
    large      (2, B, K) the student's cosines of these views; small (V, B, K) of the local views
    """
    losses = [cross_entropy(targets[0], large[1]), cross_entropy(targets[1], large[0])]
    losses += [cross_entropy(target, view) for view in small for target in targets]
    return torch.stack(losses).mean()


def ibot_loss(targets: Tensor, cosines: Tensor, view: Tensor, n_views: int) -> Tensor:
    """Mean over the views' masked tokens, then over all views; a view without a mask counts as 0.

    targets, cosines    (M, K); view (M,) the number of the view that each masked token belongs to
    """
    if not len(view):
        return cosines.sum() * 0
    per_view = torch.bincount(view, minlength=n_views)
    return (cross_entropy(targets, cosines) / per_view[view]).sum() / n_views


def koleo_loss(x: Tensor) -> Tensor:
    """Kozachenko-Leonenko: - mean log of the distance of each vector (B, D) to its nearest neighbour, on the unit sphere.

    Sablayrolles et al. 2019, arXiv 1806.03198.
    """
    x = functional.normalize(x.float(), dim=-1, eps=1e-8)
    if len(x) < 2:
        return x.sum() * 0
    with torch.no_grad():
        cosines = x @ x.T
        nearest = cosines.fill_diagonal_(-2).argmax(1)
    return -torch.log(functional.pairwise_distance(x, x[nearest], eps=1e-8) + 1e-8).mean()


class Losses(NamedTuple):
    total: Tensor
    dino: Tensor
    ibot: Tensor
    koleo: Tensor
    variance: float  # of the teacher's class tokens, see `variance`


def compute_losses(student: Network, teacher: Network, views: Views, masks: Tensor, temperature: float, koleo_weight: float) -> Losses:
    """The loss of a batch, with its graph. masks (2 B, N) bool, of the global views; temperature: the teacher's."""
    view, place = masks.nonzero(as_tuple=True)  # (M,) each
    n = len(masks) // 2
    with torch.no_grad():
        teacher_class, teacher_patches = tokens(teacher.backbone, views.large)
        targets = sinkhorn(teacher.dino_head(teacher_class), temperature).view(2, n, -1)
        masked_targets = sinkhorn(teacher.ibot_head(teacher_patches[view, place]), temperature)
    large_class, large_patches = tokens(student.backbone, views.large, masks)
    large = student.dino_head(large_class).view(2, n, -1)
    small = large[:0]
    if len(views.small):
        small = student.dino_head(tokens(student.backbone, views.small)[0]).view(-1, n, large.shape[-1])
    dino = dino_loss(targets, large, small)
    ibot = ibot_loss(masked_targets, student.ibot_head(large_patches[view, place]), view, len(masks))
    koleo = sum(koleo_loss(half) for half in large_class.chunk(2))
    return Losses(dino + ibot + koleo_weight * koleo, dino.detach(), ibot.detach(), koleo.detach(), variance(teacher_class))


def variance(x: Tensor) -> float:
    """Variance of vectors (B, D) on the unit sphere, 0 to 1: 1 less the squared length of their mean. 0: all are the same."""
    return 1 - functional.normalize(x.float(), dim=-1).mean(0).square().sum().item()


# ------------------------------------------------------------------------------------------------ schedules, optimizer


@torch.no_grad()
def update_teacher(teacher: Network, student: Network, momentum: float) -> None:
    """teacher = momentum teacher + (1 - momentum) student."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)


def cosine(step: int, steps: int, start: float, end: float) -> float:
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * step / max(1, steps)))


def teacher_temperature(step: int, steps: int) -> float:
    low, high = TEACHER_TEMPERATURE
    return low + (high - low) * min(1, step / max(1, TEACHER_WARMUP * steps))


def depth_of(name: str, n_layers: int) -> int:
    """0 for the embeddings, 1 to n for the layers, n + 1 for what follows, by the name of a parameter of the backbone."""
    if name.startswith("embeddings."):
        return 0
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return numbers[0] + 1 if numbers else n_layers + 1


def parameter_groups(student: Network, layer_decay: float) -> list[dict]:
    """Groups for AdamW, each with `factor` of the learning rate and whether it decays (`decays`).

    The factor is layer_decay to the power of the layers above (Clark et al. 2020, arXiv 2003.10555); biases, norms and scales of
    layers do not decay. The prototypes are a group of their own: they stand still at first.
    """
    n_layers, groups = student.backbone.config.num_hidden_layers, {}
    for name, parameter in trained_parameters(student):
        inner, factor = name.partition(".")[2], 1.0
        if name.startswith("backbone."):
            factor = layer_decay ** (n_layers + 1 - depth_of(inner, n_layers))
            factor *= PATCH_LR if "patch_embeddings" in inner else 1
        key = (factor, parameter.ndim > 1 and not name.endswith("_token"), name.endswith(".prototypes"))
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "factor": factor, "decays": decays, "prototypes": prototypes}
        for (factor, decays, prototypes), parameters in groups.items()
    ]


def trained_parameters(student: Network) -> Iterator[tuple[str, nn.Parameter]]:
    """All but what no loss reaches: a pooler behind the last layer."""
    return ((name, p) for name, p in student.named_parameters() if not name.startswith("backbone.pooler."))


def set_rates(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float, frozen_prototypes: bool) -> None:
    for group in optimizer.param_groups:
        group["lr"] = 0.0 if group["prototypes"] and frozen_prototypes else lr * group["factor"]
        group["weight_decay"] = weight_decay if group["decays"] else 0.0


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Over the processes that torchrun started."""
    world_size = distributed().world_size
    if world_size == 1:
        return
    flat = torch.cat([p.grad.reshape(-1) for p in parameters])
    torch.distributed.all_reduce(flat)
    for parameter, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad.copy_(gradient.view_as(parameter) / world_size)
