"""Pictures as another laboratory or scanner would have made them, to see how far a model depends on colour.

Stains are told apart in optical density, - log10 of the light that passes, by the colours of haematoxylin, eosin and DAB of Ruifrok and
Johnston 2001 (scikit-image has the same matrix). `stain_shift` makes haematoxylin stronger and eosin weaker by a quarter, `grey` takes
colour away. Both are the same for every picture: it is the laboratory that changes, not the slide.
"""

from collections.abc import Callable

import numpy as np

STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])  # rows: haematoxylin, eosin, DAB in RGB
STRENGTHS = np.array([1.25, 0.75, 1.0])
GREY = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601


def stain_shift(pixels: np.ndarray) -> np.ndarray:
    """uint8 (B, S, S, 3) -> the same with haematoxylin times 1.25, eosin times 0.75."""
    stains = STAINS / np.linalg.norm(STAINS, axis=1, keepdims=True)
    change = np.linalg.inv(stains) @ np.diag(STRENGTHS) @ stains
    densities = -np.log10(np.maximum(pixels, 1) / 255)
    return np.rint(np.clip(255 * 10 ** -(densities @ change), 0, 255)).astype(np.uint8)


def grey(pixels: np.ndarray) -> np.ndarray:
    """uint8 (B, S, S, 3) -> the same without colour, in three equal channels."""
    return np.repeat(np.rint(pixels @ GREY).astype(np.uint8)[..., None], 3, axis=-1)


SHIFTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"clean": lambda pixels: pixels, "stain shift": stain_shift, "grey": grey}
