"""Where on a slide there is tissue: a mask of its thumbnail.

Glass is grey or white and tissue is stained, so that Otsu's threshold on the saturation of colours (Otsu 1979, "A threshold selection
method from gray-level histograms") parts them, as in CLAM (Lu et al. 2021, arXiv 2004.09666). Ink of pens is stained as well: it is
told by its hue, see `ink`.
"""

import numpy as np

# Otsu cuts every picture in two, glass alone and tissue alone as well: the threshold stays between these saturations (0 to 1). Glass with
# dust and vignetting stays below 0.05; pale eosin lies above 0.1.
LOWEST, HIGHEST = 0.05, 0.15
DARK = 70  # of 255: in a thumbnail tissue is brighter, black ink and the edge of the glass are darker
SMALLEST_TISSUE, LARGEST_HOLE = 0.02, 0.1  # mm2: dust is smaller; glands, vessels and fat have holes up to the area of a tile or two
SMALLEST_INK = 0.05  # mm2: a stroke is larger, single coloured pixels are noise of JPEG


def otsu(values: np.ndarray, bins: int = 256) -> float:
    """The threshold that parts numbers in [0, 1] into two classes with the largest variance between them."""
    counts, edges = np.histogram(values, bins, (0, 1))
    centres = (edges[:-1] + edges[1:]) / 2
    below, total = np.cumsum(counts), counts.sum()
    sums = np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = (sums[-1] * below / total - sums) ** 2 / (below * (total - below))
    return float(edges[1:][np.nanargmax(variance)]) if np.isfinite(variance).any() else 1.0


def ink(rgb: np.ndarray, saturation: np.ndarray) -> np.ndarray:
    """Pixels in the colours of pens -> bool (h, w), by channels: hematoxylin, eosin and DAB never look like this.

    green       green is the strongest channel: in tissue it is the weakest, or between
    blue        blue is the strongest and red the weakest: hematoxylin is violet, with more red than green
    red         nearly pure red; eosin has blue in it
    black       dark
    """
    red, green, blue = (rgb[..., i].astype(np.int32) for i in range(3))
    coloured = saturation > 0.25
    is_green = coloured & (green > 1.05 * red) & (green >= blue)
    is_blue = coloured & (saturation > 0.4) & (blue > green) & (green > 1.15 * red)
    is_red = (saturation > 0.75) & (red > 120) & (red > 3 * green) & (red > 3 * blue)
    return is_green | is_blue | is_red | (rgb.max(2) < DARK)


def areas(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Connected parts -> the number of its part at every pixel (0 outside), pixels of each part (part 0 counted as 0)."""
    from scipy import ndimage

    parts, _ = ndimage.label(mask)
    counts = np.bincount(parts.ravel())
    counts[0] = 0
    return parts, counts


def tissue_mask(rgb: np.ndarray, mpp: float) -> np.ndarray:
    """Thumbnail (h, w, 3) uint8 with `mpp` micrometres per pixel -> bool (h, w), True at tissue."""
    from PIL import Image, ImageFilter
    from scipy import ndimage

    per_mm2 = 1e6 / mpp**2  # pixels
    smooth = np.asarray(Image.fromarray(rgb).filter(ImageFilter.MedianFilter(3)))
    brightest = smooth.max(2).astype(np.float32)
    saturation = np.where(brightest > 0, (brightest - smooth.min(2)) / np.maximum(brightest, 1), 0)
    marks = ink(smooth, saturation)
    parts, counts = areas(marks)
    marks = (counts >= max(4, SMALLEST_INK * per_mm2))[parts]
    marks = ndimage.binary_dilation(marks, iterations=3)  # the stroke's pale edge
    candidates = saturation[~marks]
    threshold = float(np.clip(otsu(candidates), LOWEST, HIGHEST)) if candidates.size else 1.0
    tissue = (saturation > threshold) & ~marks & (brightest >= DARK)
    parts, counts = areas(tissue)
    tissue = (counts >= max(4, SMALLEST_TISSUE * per_mm2))[parts]
    parts, counts = areas(~tissue)
    counts[0] = LARGEST_HOLE * per_mm2 + 1  # tissue is no hole
    edge = np.concatenate([parts[0], parts[-1], parts[:, 0], parts[:, -1]])
    counts[edge] = LARGEST_HOLE * per_mm2 + 1  # what reaches the border is glass
    return tissue | ((counts <= LARGEST_HOLE * per_mm2)[parts] & ~marks)


def tissue_share(mask: np.ndarray, coords: np.ndarray, size_level0: int, factor: float) -> np.ndarray:
    """Share of each tile's area that is tissue -> (N,) in [0, 1], exact to a part of a mask's pixel.

    coords   (N, 2) corners and `size_level0` the edge, in pixels of level 0, `factor` of which make one of the mask
    """
    h, w = mask.shape
    integral = np.zeros((h + 1, w + 1))
    integral[1:, 1:] = mask.cumsum(0).cumsum(1)

    def at(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """The integral at points between pixels, by bilinear interpolation."""
        x, y = np.clip(x, 0, w), np.clip(y, 0, h)
        x0, y0 = np.minimum(x.astype(int), w - 1), np.minimum(y.astype(int), h - 1)
        fx, fy = x - x0, y - y0
        top = integral[y0, x0] * (1 - fx) + integral[y0, x0 + 1] * fx
        return top * (1 - fy) + (integral[y0 + 1, x0] * (1 - fx) + integral[y0 + 1, x0 + 1] * fx) * fy

    x, y, edge = coords[:, 0] / factor, coords[:, 1] / factor, size_level0 / factor
    inside = at(x + edge, y + edge) - at(x, y + edge) - at(x + edge, y) + at(x, y)
    return inside / edge**2
