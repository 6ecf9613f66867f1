"""Slides made up for the tests, and the scripts run on them in this process."""

import importlib
from pathlib import Path

from pathology.synthetic import make_slide

TISSUE = [(512, 256, 1024, 768)]  # x, y, width, height in pixels of level 0
WIDTH, HEIGHT = 2100, 1300  # no multiple of a tile: the edges are cut


def one_slide(path: Path, **options) -> Path:
    """A slide of 2100 x 1300 pixels of 0.5 um with tissue in TISSUE."""
    options = {"tissue": TISSUE, "width": WIDTH, "height": HEIGHT} | options
    make_slide(path, **options)
    return path


def run(script: str, *arguments: object) -> None:
    """Run a script's `main` in this process."""
    module = importlib.import_module(f"pathology.{script}")
    module.main(module.build_parser().parse_args(list(map(str, arguments))))


def damage(path: Path, block: int = 0, level: int = 0) -> tuple[int, int]:
    """Overwrite one block of a slide -> x, y of its corner in pixels of that level."""
    import tifffile

    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[level]
        offset, count, across = page.dataoffsets[block], page.databytecounts[block], -(-page.imagewidth // page.tilewidth)
        corner = block % across * page.tilewidth, block // across * page.tilelength
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(b"\0" * count)
    return corner
