"""Stain normalisation by Macenko et al. (2009), "A method for normalizing histology slides for quantitative analysis".

A colour is an optical density (OD), -log((I + 1) / 240) for a channel I of 0 to 255, and a mixture of two stains: OD = c @ vectors, with
concentrations c (2,) and `vectors` (2, 3), hematoxylin first. A slide's own vectors and its largest concentrations are estimated and
exchanged for the reference's: each tile is then one product with a 3 x 3 matrix.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from files.console import InputError

WHITE = 240.0  # light that passes through the glass, by the published code
TRANSPARENT = 0.15  # OD below which a pixel is glass, and
OUTLIERS = 1.0  # per cent of the angles at either end that are left out: both as published
LEAST_PIXELS = 500  # to estimate a slide's stains from


@dataclass(frozen=True)
class Stains:
    """`vectors` (2, 3): OD of hematoxylin and eosin, of length 1; `strongest` (2,): the 99th percentile of their concentrations."""

    vectors: np.ndarray
    strongest: np.ndarray


# the target image of the published code, as its authors give it
REFERENCE = Stains(np.array([[0.5626, 0.7201, 0.4062], [0.2159, 0.8012, 0.5581]]), np.array([1.9705, 1.0308]))


def optical_density(rgb: np.ndarray) -> np.ndarray:
    """(..., 3) uint8 -> float32 of the same shape."""
    return (-np.log((np.arange(256) + 1) / WHITE)).astype(np.float32)[rgb]


def estimate(rgb: np.ndarray) -> Stains:
    """The stains of pixels (n, 3) uint8. Raises InputError where there is too little tissue, or only one colour."""
    density = optical_density(rgb.reshape(-1, 3)).astype(np.float64)
    density = density[(density >= TRANSPARENT).all(1)]
    if len(density) < LEAST_PIXELS:
        raise InputError(f"{len(density)} stained pixels are too few to estimate stains from, {LEAST_PIXELS} are needed")
    _, plane = np.linalg.eigh(np.cov(density.T))
    plane = plane[:, 1:]  # the two directions that vary most
    plane = plane * np.where(plane.sum(0) < 0, -1, 1)
    flat = density @ plane
    low, high = np.percentile(np.arctan2(flat[:, 1], flat[:, 0]), [OUTLIERS, 100 - OUTLIERS])
    vectors = np.stack([plane @ (np.cos(angle), np.sin(angle)) for angle in (low, high)])
    vectors = vectors[np.argsort(-vectors[:, 0])]  # hematoxylin takes more of the red light
    if np.linalg.cond(vectors) > 100:
        raise InputError("its pixels have one colour: two stains cannot be told apart")
    return Stains(vectors, np.percentile(density @ np.linalg.pinv(vectors), 99, axis=0))


def conversion(slide: Stains, reference: Stains = REFERENCE) -> np.ndarray:
    """The matrix (3, 3) that takes OD of a slide to OD under the reference's stains."""
    return np.linalg.pinv(slide.vectors) @ np.diag(reference.strongest / slide.strongest) @ reference.vectors


def normalise(rgb: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Pixels (..., 3) uint8 under the reference's stains; `matrix` as of `conversion`."""
    return np.clip(WHITE * np.exp(-optical_density(rgb) @ matrix.astype(np.float32)), 0, 255).astype(np.uint8)


def read_reference(path: Path) -> Stains:
    """The stains of a picture. Raises InputError."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return estimate(np.asarray(image.convert("RGB")))
    except FileNotFoundError:
        raise InputError(f"no file {path}") from None
    except (UnidentifiedImageError, OSError):
        raise InputError(f"{path} is no picture that can be read: take a PNG or JPEG file") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
