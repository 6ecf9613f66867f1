"""Multi-crop augmentation and masks for self-supervised training, on whole batches, on the device of the pixels.

The views are those of DINOv2 (Oquab et al. 2023, arXiv 2304.07193; its code, `dinov2/data/augmentations.py`) with vertical flips added,
as tissue has no upright: random crop, flips, colour jitter, grey, blur, and solarization of the second global view. All numbers come
from a generator on the CPU: the same seed gives the same views on every device.

Two differences from DINOv2, so that a batch is a few operations: the jitter's steps come in one order, and its hue is a rotation in
YIQ; sigma of the blur is in proportion to the size of the view, so that small views are not wiped out.

Legend: B pictures, S edge of a picture in pixels, V edge of a view, g tokens along an edge of a view.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn import functional

GLOBAL_SCALE, LOCAL_SCALE = (0.32, 1.0), (0.05, 0.32)  # share of the picture's area that a view shows
BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.4, 0.4, 0.2, 0.1
P_JITTER, P_GREY, P_SOLARIZE = 0.8, 0.2, 0.2
P_BLUR_GLOBAL, P_BLUR_LOCAL = (1.0, 0.1), 0.5
BLUR_TAPS, BLUR_SIGMA, BLUR_SIZE = 9, (0.1, 2.0), 224  # sigma in pixels of a view of BLUR_SIZE
P_MASK, MASK_RATIO = 0.5, (0.1, 0.5)  # pictures that are masked at all; share of their tokens
GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601
TO_YIQ = ((0.299, 0.587, 0.114), (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135))


class Views(NamedTuple):
    """The views of B pictures, normalized, view by view: rows 0 to B-1 are the first view of all pictures."""

    large: Tensor  # (2 B, 3, V, V)
    small: Tensor  # (n_local B, 3, v, v)


def uniform(shape: tuple[int, ...], low: float, high: float, generator: Generator, device: torch.device) -> Tensor:
    return (torch.rand(shape, generator=generator) * (high - low) + low).to(device)


def chance(n: int, probability: float, generator: Generator, device: torch.device) -> Tensor:
    """(n, 1, 1, 1) bool."""
    return (torch.rand((n, 1, 1, 1), generator=generator) < probability).to(device)


def crop_and_flip(pictures: Tensor, size: int, scale: tuple[float, float], generator: Generator) -> Tensor:
    """A random part of each picture (B, 3, S, S), flipped both ways half of the time -> (B, 3, size, size), bilinear.

    Area and aspect ratio (3/4 to 4/3, uniform in its logarithm) are drawn as torchvision's RandomResizedCrop does.
    """
    n, device = len(pictures), pictures.device
    area = uniform((n,), *scale, generator, device)
    ratio = uniform((n,), math.log(3 / 4), math.log(4 / 3), generator, device).exp()
    edges = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], 1).clamp(max=1)  # (B, 2): width, height; 1 is the whole
    centre = uniform((n, 2), -1, 1, generator, device) * (1 - edges)
    flip = uniform((n, 2), 0, 1, generator, device).round() * 2 - 1
    theta = torch.cat([torch.diag_embed(edges * flip), centre[:, :, None]], 2)  # (B, 2, 3)
    grid = functional.affine_grid(theta, [n, 3, size, size], align_corners=False)
    return functional.grid_sample(pictures, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def jitter(views: Tensor, generator: Generator) -> Tensor:
    """Change brightness, contrast, saturation and hue of P_JITTER of the views (B, 3, V, V) in 0..1, and make P_GREY of them grey."""
    n, device = len(views), views.device
    grey = torch.tensor(GREY, device=device)
    brightness, contrast, saturation = (uniform((n, 1, 1, 1), 1 - x, 1 + x, generator, device) for x in (BRIGHTNESS, CONTRAST, SATURATION))
    angle = uniform((n,), -HUE, HUE, generator, device) * 2 * math.pi
    is_jittered, is_grey = (chance(n, p, generator, device) for p in (P_JITTER, P_GREY))
    changed = views * brightness
    mean = (changed.mean((2, 3)) @ grey)[:, None, None, None]
    changed = contrast * changed + (1 - contrast) * mean
    changed = saturation * changed + (1 - saturation) * luminance(changed)
    changed = torch.einsum("bij,bjhw->bihw", hue_matrices(angle), changed).clamp(0, 1)
    views = torch.where(is_jittered, changed, views)
    return torch.where(is_grey, luminance(views).expand_as(views), views)


def luminance(views: Tensor) -> Tensor:
    """(B, 3, V, V) -> (B, 1, V, V)."""
    return torch.einsum("i,bihw->bhw", torch.tensor(GREY, device=views.device), views)[:, None]


def hue_matrices(angle: Tensor) -> Tensor:
    """Rotation of RGB colours around the grey axis, by way of YIQ. (B,) radians -> (B, 3, 3)."""
    to_yiq = torch.tensor(TO_YIQ, device=angle.device)
    zero, one = torch.zeros_like(angle), torch.ones_like(angle)
    rotation = torch.stack([one, zero, zero, zero, angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos()], 1).view(-1, 3, 3)
    return torch.linalg.inv(to_yiq) @ rotation @ to_yiq


def blur(views: Tensor, probability: float, generator: Generator) -> Tensor:
    """Blur a share of the views (B, 3, V, V) by a Gaussian, each by its sigma."""
    n, channels, height, width = views.shape
    sigma = uniform((n, 1), *BLUR_SIGMA, generator, views.device) * height / BLUR_SIZE
    is_blurred = chance(n, probability, generator, views.device)
    offsets = torch.arange(BLUR_TAPS, device=views.device) - BLUR_TAPS // 2
    taps = torch.exp(-0.5 * (offsets / sigma) ** 2)
    taps = (taps / taps.sum(1, keepdim=True)).repeat_interleave(channels, 0)  # (B 3, taps)
    padding = BLUR_TAPS // 2
    flat = functional.pad(views, [padding] * 4, mode="replicate").reshape(1, n * channels, height + 2 * padding, width + 2 * padding)
    flat = functional.conv2d(flat, taps[:, None, :, None], groups=n * channels)
    flat = functional.conv2d(flat, taps[:, None, None, :], groups=n * channels)
    return torch.where(is_blurred, flat.view_as(views), views)


def solarize(views: Tensor, probability: float, generator: Generator) -> Tensor:
    """Invert what is brighter than the middle, in a share of the views."""
    is_solarized = chance(len(views), probability, generator, views.device)
    return torch.where(is_solarized & (views >= 0.5), 1 - views, views)


def make_views(pixels: Tensor, large: int, small: int, n_small: int, mean: Tensor, std: Tensor, generator: Generator) -> Views:
    """Two global and `n_small` local views of each picture.

    pixels          uint8 (B, S, S, 3)
    large, small    edges of the views in pixels
    mean, std       (3,) of the model's input, for values in 0..1
    """
    pictures = pixels.permute(0, 3, 1, 2).float() / 255

    def normalized(views: Tensor) -> Tensor:
        return (views - mean[:, None, None]) / std[:, None, None]

    global_views = []
    for p_blur, p_solarize in zip(P_BLUR_GLOBAL, (0.0, P_SOLARIZE), strict=True):
        views = blur(jitter(crop_and_flip(pictures, large, GLOBAL_SCALE, generator), generator), p_blur, generator)
        global_views.append(normalized(solarize(views, p_solarize, generator)))
    local_views = [
        normalized(blur(jitter(crop_and_flip(pictures, small, LOCAL_SCALE, generator), generator), P_BLUR_LOCAL, generator))
        for _ in range(n_small)
    ]
    return Views(torch.cat(global_views), torch.cat(local_views) if local_views else global_views[0][:0])


# -------------------------------------------------------------------------------------------------------------- masks


def block_mask(grid: int, n_masked: int, rng: np.random.Generator) -> np.ndarray:
    """A mask (g, g) bool of rectangles, `n_masked` tokens or fewer by the last rectangle's size (BEiT, Bao et al. 2021, appendix)."""
    mask = np.zeros((grid, grid), bool)
    for _ in range(10 * grid):  # a rectangle may not fit any more
        missing = n_masked - int(mask.sum())
        if missing <= 0:
            break
        area, ratio = rng.uniform(min(4, missing), missing + 1e-6), math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        height, width = (max(1, min(grid, round(edge))) for edge in (math.sqrt(area * ratio), math.sqrt(area / ratio)))
        top, left = rng.integers(grid - height + 1), rng.integers(grid - width + 1)
        if 0 < (~mask[top : top + height, left : left + width]).sum() <= missing:
            mask[top : top + height, left : left + width] = True
    return mask


def draw_masks(n: int, grid: int, rng: np.random.Generator) -> Tensor:
    """Masks (n, g g) bool of global views. P_MASK of the views have one, whose shares are spread over MASK_RATIO, as in DINOv2."""
    masks = np.zeros((n, grid * grid), bool)
    n_with = round(n * P_MASK)
    edges = np.linspace(*MASK_RATIO, n_with + 1)
    for row, low, high in zip(rng.permutation(n)[:n_with], edges, edges[1:], strict=False):
        masks[row] = block_mask(grid, max(1, round(rng.uniform(low, high) * grid * grid)), rng).ravel()
    return torch.from_numpy(masks)
