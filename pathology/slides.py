"""A slide file: its resolution, its thumbnail, and tiles read by several workers, in order and in bounded memory.

Positions are in pixels of level 0, the finest one; a level's downsample is how many of these make one of its own.
"""

import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from files.console import InputError
from pathology.blocks import JpegBlocks
from pathology.files import require

if TYPE_CHECKING:
    from openslide import OpenSlide
    from PIL.Image import Image

# Micrometres per pixel that a slide scanner or a pyramid can have: scanners make 0.1 to 1, micro-CT and macroscopes up to 10.
FINEST_MPP, COARSEST_MPP = 0.05, 20.0
THUMBNAIL_SIDE = 2048  # pixels of the longer side: 10 um each for a whole slide of 20 mm
SMALLEST_PIECE = 16  # pixels of a thumbnail: a damaged block is halved down to these
READ_SIDE = 4096  # the largest region read at once for a thumbnail: 64 MiB
CACHE_BYTES = 256 << 20  # of decoded blocks, for all workers: a row of blocks of a slide 100,000 pixels wide, so that none is decoded twice
ENLARGEMENT = 1.02  # tiles may be finer than level 0 by this much: 0.2525 um is sold as 0.25

Box = tuple[int, int, int, int]  # x, y, width, height


@dataclass(frozen=True)
class Geometry:
    """How a tile is read.

    size          pixels of its edge when it is done
    size_level0   the same edge in pixels of level 0
    level, read   the level, and pixels of the edge there
    """

    size: int
    size_level0: int
    level: int
    read: int


def openslide_errors() -> tuple[type[Exception], ...]:
    """What OpenSlide raises for a damaged file."""
    from openslide import OpenSlideError

    return OpenSlideError, OSError, ValueError


@contextmanager
def open_slide(path: Path) -> Iterator["OpenSlide"]:
    """A slide. Raises InputError where there is none, or OpenSlide cannot read it."""
    require("openslide")
    import openslide

    if not path.exists():
        raise InputError(f"no slide {path}")
    try:
        slide = openslide.OpenSlide(path)
    except openslide_errors() as error:
        kind = (
            "is cut off, or of no kind that OpenSlide reads"
            if isinstance(error, openslide.OpenSlideUnsupportedFormatError)
            else f"is damaged ({error})"
        )
        raise InputError(f"{path} {kind}") from None
    try:
        yield slide
    finally:
        slide.close()


def resolution(slide: "OpenSlide", assume_mpp: float | None) -> float:
    """Micrometres per pixel of level 0: what the slide stores, else `assume_mpp`.

    Raises InputError where neither is there, and where the slide stores a number that no scanner makes, or two that differ.
    """
    values = [slide.properties.get(f"openslide.mpp-{axis}") for axis in "xy"]
    if None in values:
        what = "it stores no resolution"
    else:
        x, y = map(float, values)
        if all(FINEST_MPP <= value <= COARSEST_MPP for value in (x, y)) and abs(x - y) <= 0.05 * max(x, y):
            return (x + y) / 2
        what = f"it stores {x:g} x {y:g} um per pixel, which no scanner makes"
    if assume_mpp is None:
        raise InputError(f"{what}: give micrometres per pixel with --assume-mpp")
    return assume_mpp


def geometry(downsamples: Iterable[float], mpp_level0: float, mpp: float, size: int) -> Geometry:
    """How tiles of `size` pixels at `mpp` are read: from the nearest level that is at least as fine. Raises InputError.

    downsamples   of the slide's levels, the finest first
    """
    wanted = mpp / mpp_level0
    if wanted * ENLARGEMENT < 1:
        raise InputError(
            f"its finest level has {mpp_level0:g} um per pixel, --mpp {mpp:g} is finer: tiles would be enlarged, take a larger --mpp"
        )
    size_level0 = max(size, round(size * wanted)) if wanted < 1 else round(size * wanted)
    fine = [(downsample, level) for level, downsample in enumerate(downsamples) if downsample <= 1.01 * wanted]
    downsample, level = max(fine, default=(1.0, 0))
    return Geometry(size, size_level0, level, round(size_level0 / downsample))


def grid(width: int, height: int, step: int) -> np.ndarray:
    """Corners of all tiles that lie inside the slide, row by row -> (N, 2) int32; `step` is the tile's edge, all in pixels of level 0."""
    x, y = np.meshgrid(np.arange(width // step) * step, np.arange(height // step) * step)
    return np.stack([x.ravel(), y.ravel()], 1).astype(np.int32)


def read_rgb(slide: "OpenSlide", location: tuple[int, int], level: int, size: tuple[int, int]) -> "Image":
    """A region as RGB; what was never scanned is white."""
    from PIL import Image

    image = slide.read_region(location, level, size)
    if image.getchannel("A").getextrema()[0] == 255:
        return image.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def made_smaller(pixels: np.ndarray, size: int) -> np.ndarray:
    """(n, n, 3) uint8 -> (size, size, 3). A whole number of pixels makes one by their mean, others by a bilinear filter as wide."""
    from PIL import Image

    if len(pixels) == size:
        return pixels
    image = Image.fromarray(pixels)
    if len(pixels) % size == 0:
        return np.asarray(image.reduce(len(pixels) // size))
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class SlideReader:
    """A slide and threads that read it, each by a handle of its own: OpenSlide works outside Python's lock.

    Blocks that were decoded are kept in one cache for all. A damaged part leaves a handle unusable: it is opened anew.
    """

    def __init__(self, path: Path, workers: int | None = None):
        require("openslide")
        from openslide import OpenSlideCache

        self.path, self.workers = path, workers or usable_cores()
        self._cache, self._local, self._handles = OpenSlideCache(CACHE_BYTES), threading.local(), []
        self._blocks: JpegBlocks | None = None
        with open_slide(path) as slide:
            self.width, self.height = slide.dimensions
            self.downsamples = slide.level_downsamples
            self.properties = dict(slide.properties)
        self._pool = ThreadPoolExecutor(self.workers)

    def __enter__(self) -> "SlideReader":
        return self

    def __exit__(self, *_) -> None:
        self._pool.shutdown(cancel_futures=True)
        for handle in self._handles:
            handle.close()
        if self._blocks is not None:
            self._blocks.close()

    def _handle(self, *, renew: bool = False) -> "OpenSlide":
        from openslide import OpenSlide

        if renew or not hasattr(self._local, "slide"):
            self._local.slide = OpenSlide(self.path)
            self._local.slide.set_cache(self._cache)
            self._handles.append(self._local.slide)
        return self._local.slide

    def _guarded(self, read: Callable, item: object) -> np.ndarray | None:
        """What `read(slide, item)` gives; None where that part of the slide is damaged."""
        try:
            return read(self._handle(), item)
        except openslide_errors():
            self._handle(renew=True)
            return None

    def ordered(self, read: Callable, items: Iterable) -> Iterator[np.ndarray | None]:
        """`read(slide, item)` for every item, in order, None for what is damaged. At most 4 results a worker wait to be taken."""
        waiting: deque = deque()
        for item in items:
            waiting.append(self._pool.submit(self._guarded, read, item))
            if len(waiting) >= 4 * self.workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def tiles(self, coords: np.ndarray, how: Geometry) -> Iterator[np.ndarray | None]:
        """The tiles at `coords` (N, 2), in order: (size, size, 3) uint8, None for a damaged one."""
        if self._blocks is None:
            with open_slide(self.path) as slide:
                self._blocks = JpegBlocks(self.path, slide)
        blocks = self._blocks

        def read(slide: "OpenSlide", corner: np.ndarray) -> np.ndarray:
            x, y = map(int, corner)
            pixels = blocks.region(x, y, how.level, how.read)
            if pixels is None:
                pixels = np.asarray(read_rgb(slide, (x, y), how.level, (how.read, how.read)))
            return made_smaller(pixels, how.size)

        return self.ordered(read, coords)

    def thumbnail(self) -> np.ndarray:
        """The whole slide -> (h, w, 3) uint8, THUMBNAIL_SIDE on the longer side, or smaller where the slide is.

        Read in blocks, so that a slide without coarse levels takes no more memory. Of a block that is damaged the quarters are tried,
        and theirs; what is left is white. Raises InputError where all is damaged.
        """
        factor = thumbnail_factor(self.width, self.height)
        level = max((d, i) for i, d in enumerate(self.downsamples) if d <= 1.01 * factor)[1]
        per_pixel = factor / self.downsamples[level]
        block = max(1, int(READ_SIDE / per_pixel))  # pixels of the thumbnail
        w, h = round(self.width / factor), round(self.height / factor)

        def read(slide: "OpenSlide", box: Box) -> np.ndarray:
            x, y, bw, bh = box
            size = (max(1, round(bw * per_pixel)), max(1, round(bh * per_pixel)))
            return np.asarray(read_rgb(slide, (round(x * factor), round(y * factor)), level, size).resize((bw, bh), 4))  # 4: box filter

        thumbnail = np.full((h, w, 3), 255, np.uint8)
        boxes, n_damaged = pieces((0, 0, w, h), block), 0
        while boxes:
            damaged: list[Box] = []
            for box, part in zip(boxes, self.ordered(read, boxes), strict=True):
                x, y, bw, bh = box
                if part is not None:
                    thumbnail[y : y + bh, x : x + bw] = part
                elif max(bw, bh) > SMALLEST_PIECE:
                    damaged += pieces(box, max(bw + 1, bh + 1) // 2)
                else:
                    n_damaged += bw * bh
            boxes = damaged
        if n_damaged == w * h:
            raise InputError("it is damaged: no part of it can be read")
        return thumbnail


def pieces(box: Box, edge: int) -> list[Box]:
    """A box x, y, width, height in boxes of at most `edge` pixels, row by row."""
    x, y, w, h = box
    return [(x + i, y + j, min(edge, w - i), min(edge, h - j)) for j in range(0, h, edge) for i in range(0, w, edge)]


def thumbnail_factor(width: int, height: int) -> float:
    """Pixels of level 0 in one of the thumbnail, along an edge."""
    return max(1.0, max(width, height) / THUMBNAIL_SIDE)


def batches(tiles: Iterable[np.ndarray | None], coords: np.ndarray, n: int) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Tiles in batches of at most `n` -> coords (k, 2), pixels (k, size, size, 3), and how many more were damaged and left out.

    A batch whose tiles are all damaged has k = 0.
    """
    tiles = iter(tiles)
    for start in range(0, len(coords), n):
        corners = coords[start : start + n]
        some = list(itertools.islice(tiles, n))
        good = np.array([tile is not None for tile in some])
        pixels = [tile for tile in some if tile is not None]
        yield corners[good], np.stack(pixels) if pixels else np.empty((0, 0, 0, 3), np.uint8), int((~good).sum())
