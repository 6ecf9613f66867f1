"""JPEG blocks of a slide decoded directly, without OpenSlide: the same pixels, several times as fast.

OpenSlide takes four fifths of its time for other things than decoding. Where a slide is a TIFF file of JPEG blocks (Aperio's, and
plain pyramids), tifffile tells where its blocks are, and imagecodecs decodes them. Nothing is taken on trust: a block of each level is
first compared with what OpenSlide makes of it, and what is less simple is left to OpenSlide: positions between two pixels of a level,
missing and damaged blocks, other compressions and vendors.
"""

import os
import struct
import threading
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from openslide import OpenSlide

VENDORS = ("aperio", "generic-tiff")  # whose levels are pages of one TIFF file, without offsets or overlap
JPEG, RGB, YCBCR = 7, 2, 6  # TIFF's numbers of a compression and of photometric interpretations
# what tifffile and imagecodecs raise for damaged data; the errors of codecs are RuntimeErrors
DAMAGE = (RuntimeError, ValueError, KeyError, IndexError, OSError, struct.error)
CACHE_BYTES = 128 << 20  # of decoded blocks: a row of those of a slide 100,000 pixels wide, which the next row of tiles may need again


class JpegBlocks:
    """The levels of one slide whose blocks can be decoded directly. Threads may share it."""

    def __init__(self, path: Path, slide: "OpenSlide"):
        self._pages: dict = {}  # tifffile's page of each level that OpenSlide agrees with
        self._downsamples = slide.level_downsamples
        self._cache: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._bytes, self._lock, self._file = 0, threading.Lock(), -1
        if slide.properties.get("openslide.vendor") not in VENDORS:
            return
        try:
            import imagecodecs  # noqa: F401  (tifffile decodes with it)
            import tifffile
        except ImportError:
            return
        self._file = os.open(path, os.O_RDONLY)
        try:
            with tifffile.TiffFile(path) as tiff:
                pages = {(page.imagewidth, page.imagelength): page for page in tiff.pages if is_jpeg(page)}
                for page in pages.values():
                    _ = page.decode, page.jpegtables, page.dataoffsets  # tifffile reads them when they are first asked for
        except (tifffile.TiffFileError, *DAMAGE):  # OpenSlide decides what can be read
            pages = {}
        for level, size in enumerate(slide.level_dimensions):
            if size in pages:
                self._pages[level] = pages[size]
                if not self._agrees(level, slide):
                    del self._pages[level]

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._file, self._pages = -1, {}
        self._cache.clear()

    def _agrees(self, level: int, slide: "OpenSlide") -> bool:
        """Whether OpenSlide makes the same of the block in the middle of the level."""
        page, downsample = self._pages[level], self._downsamples[level]
        x = page.imagewidth // 2 // page.tilewidth * page.tilewidth
        y = page.imagelength // 2 // page.tilelength * page.tilelength
        corner = (round(x * downsample), round(y * downsample))
        edge = min(page.tilewidth, page.tilelength, page.imagewidth - x, page.imagelength - y)
        ours = self.region(*corner, level, edge)
        if ours is None:  # this corner lies between two pixels: the upper left block does not
            corner, ours = (0, 0), self.region(0, 0, level, edge)
        return ours is not None and bool((np.asarray(slide.read_region(corner, level, (edge, edge)))[..., :3] == ours).all())

    def region(self, x: int, y: int, level: int, edge: int) -> np.ndarray | None:
        """A square of `edge` pixels of a level at x, y of level 0 -> (edge, edge, 3) uint8; None where OpenSlide has to read it."""
        page = self._pages.get(level)
        if page is None:
            return None
        left, top = x / self._downsamples[level], y / self._downsamples[level]
        if left != int(left) or top != int(top) or left + edge > page.imagewidth or top + edge > page.imagelength:
            return None
        left, top, w, h = int(left), int(top), page.tilewidth, page.tilelength
        across, square = -(-page.imagewidth // w), np.empty((edge, edge, 3), np.uint8)
        for row in range(top // h, (top + edge - 1) // h + 1):
            for column in range(left // w, (left + edge - 1) // w + 1):
                block = self._block(level, row * across + column)
                if block is None:
                    return None
                x0, x1 = max(left, column * w), min(left + edge, (column + 1) * w)
                y0, y1 = max(top, row * h), min(top + edge, (row + 1) * h)
                square[y0 - top : y1 - top, x0 - left : x1 - left] = block[y0 - row * h : y1 - row * h, x0 - column * w : x1 - column * w]
        return square

    def _block(self, level: int, index: int) -> np.ndarray | None:
        """A decoded block (h, w, 3), kept for the next; None where it is missing or damaged."""
        with self._lock:
            if (block := self._cache.get((level, index))) is not None:
                self._cache.move_to_end((level, index))
                return block
        page = self._pages[level]
        data = os.pread(self._file, page.databytecounts[index], page.dataoffsets[index])
        try:
            block = page.decode(data, index, jpegtables=page.jpegtables)[0] if data else None
        except DAMAGE:
            return None
        if block is None:
            return None
        block = block.reshape(block.shape[-3:])
        with self._lock:
            self._cache[level, index] = block
            self._bytes += block.nbytes
            while self._bytes > CACHE_BYTES:
                self._bytes -= self._cache.popitem(last=False)[1].nbytes
        return block


def is_jpeg(page) -> bool:
    """Whether a page of tifffile holds 8-bit colours in JPEG blocks."""
    simple = page.is_tiled and page.compression == JPEG and page.photometric in (RGB, YCBCR) and page.imagedepth == 1
    return simple and page.samplesperpixel == 3 and page.bitspersample == 8
