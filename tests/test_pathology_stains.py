"""Macenko's stains: those of a mixture are recovered, and two slides of one tissue look alike after it."""

import numpy as np
import pytest
from PIL import Image

from files.console import InputError
from pathology.stains import REFERENCE, WHITE, conversion, estimate, normalise, read_reference


def mixture(vectors: np.ndarray, strength: float, n: int = 20000) -> np.ndarray:
    """Pixels (n, 3) uint8 with random amounts of two stains."""
    rng = np.random.default_rng(0)
    amounts = rng.uniform(0, 1, (n, 2)) * strength
    amounts[: n // 4, 0] = 0  # pure stains are needed to see both
    amounts[n // 4 : n // 2, 1] = 0
    return np.clip(WHITE * np.exp(-amounts @ vectors), 0, 255).astype(np.uint8)


def unit(*rows) -> np.ndarray:
    return np.array(rows) / np.linalg.norm(rows, axis=1, keepdims=True)


def test_the_stains_of_a_mixture_are_recovered():
    vectors = unit((0.65, 0.70, 0.29), (0.15, 0.92, 0.35))
    stains = estimate(mixture(vectors, 1.2))
    assert (stains.vectors * vectors).sum(1) == pytest.approx([1, 1], abs=0.005)
    assert stains.strongest == pytest.approx([1.2, 1.2], abs=0.06)


def test_two_slides_of_one_tissue_look_alike_afterwards():
    one = mixture(unit((0.65, 0.70, 0.29), (0.15, 0.92, 0.35)), 1.0)
    other = mixture(unit((0.55, 0.75, 0.36), (0.25, 0.90, 0.36)), 1.5)
    before = np.abs(one.astype(int) - other).mean()
    same = [normalise(pixels, conversion(estimate(pixels))) for pixels in (one, other)]
    assert before > 15 and np.abs(same[0].astype(int) - same[1]).mean() < before / 4


def test_the_reference_is_left_as_it_is():
    pixels = mixture(REFERENCE.vectors, 0.8)
    assert np.abs(normalise(pixels, conversion(REFERENCE)).astype(int) - pixels).max() <= 2


def test_too_little_tissue_and_one_colour_are_refused(tmp_path):
    with pytest.raises(InputError, match="too few"):
        estimate(np.full((1000, 3), 240, np.uint8))
    with pytest.raises(InputError, match="one colour"):
        estimate(np.full((1000, 3), (120, 60, 130), np.uint8))
    with pytest.raises(InputError, match="no file"):
        read_reference(tmp_path / "nothing.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(InputError, match="no picture"):
        read_reference(tmp_path / "text.png")
    Image.fromarray(mixture(REFERENCE.vectors, 1.0).reshape(100, 200, 3)).save(tmp_path / "good.png")
    assert read_reference(tmp_path / "good.png").vectors.shape == (2, 3)
