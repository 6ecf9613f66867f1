"""Cut slides into tiles of tissue: which squares, at which resolution, and on request their pixels.

    python -m pathology.tile slides/ --mpp 1.0 --size 256 --out tiles/                     # positions alone: seconds a slide
    python -m pathology.tile slides/ --mpp 0.5 --size 224 --out tiles/ --save-pixels       # for fine-tuning

Leaves behind, in --out, whose formats pathology/files.py describes:

    SLIDE.h5          coords (N, 2) of the tiles in pixels of level 0, row by row; attributes; with --save-pixels the pixels
    SLIDE.mask.png    where tissue was seen, at thumbnail resolution: look at it before you trust the rest
    tiles.json        the arguments, each slide's tiles, and the slides that were skipped, with the reason

Tissue is told from glass on the thumbnail (pathology/tissue.py). The grid begins at the slide's upper left corner; only tiles that lie
inside the slide are taken. A slide that is damaged, empty, or whose resolution is unknown is skipped and reported, as are its damaged
tiles. The same command goes on where it was interrupted, and the files are the same as if it had not been.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from files.arguments import positive_int, share
from files.console import InputError, Progress, run_script, warn
from files.writing import WriteError, write_atomic
from pathology.files import (
    SLIDE_SUFFIXES,
    TILES_SUMMARY,
    Batches,
    check_sources,
    read_tiles,
    require,
    reserve,
    say_totals,
    slide_name,
    write_summary,
    write_tiles,
)
from pathology.slides import COARSEST_MPP, FINEST_MPP, Geometry, SlideReader, batches, geometry, grid, resolution, thumbnail_factor
from pathology.stains import REFERENCE, Stains, conversion, estimate, normalise, read_reference
from pathology.tissue import tissue_mask, tissue_share

BATCH = 32  # tiles written at once
STAIN_TILES = 32  # tiles, evenly spread, that a slide's stains are estimated from


def find_slides(paths: list[Path]) -> dict[str, Path]:
    """Slides by name, of files and folders with what is below them. Raises InputError for none, and for two of one name."""
    slides: dict[str, Path] = {}
    for path in paths:
        if not path.exists():
            raise InputError(f"no file or folder {path}")
        inside = [path]
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SLIDE_SUFFIXES and not p.name.startswith("."))
        if not inside:
            raise InputError(f"{path} holds no slide ({', '.join(SLIDE_SUFFIXES)})")
        for slide in inside:
            other = slides.setdefault(slide_name(slide), slide)
            if other.resolve() != slide.resolve():
                raise InputError(f"{other} and {slide} have one name, which names their tiles: rename one of them")
    return slides


# ------------------------------------------------------------------------------------------------------------ a slide


def normalised(some: Batches, matrix: np.ndarray | None) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Batches with their stains converted by `matrix` (3, 3); None leaves them."""
    for coords, pixels, damaged in some:
        yield coords, pixels if matrix is None or not len(coords) else normalise(pixels, matrix), damaged


def stain_matrix(reader: SlideReader, coords: np.ndarray, how: Geometry, reference: Stains) -> np.ndarray:
    """The conversion from a slide's stains, estimated from tiles spread over it. Raises InputError where that cannot be done."""
    some = coords[np.unique(np.linspace(0, len(coords) - 1, STAIN_TILES).astype(int))]
    tiles = [tile[::2, ::2].reshape(-1, 3) for tile in reader.tiles(some, how) if tile is not None]
    if not tiles:
        raise InputError("all of its tiles are damaged")
    return conversion(estimate(np.concatenate(tiles)), reference)


def tile_slide(path: Path, out: Path, args: argparse.Namespace, reference: Stains | None) -> dict:
    """Write the tiles and the mask of one slide -> its entry of tiles.json. Raises InputError where the slide has to be skipped."""
    from PIL import Image

    with SlideReader(path, args.workers) as reader:
        mpp_level0 = resolution(reader, args.assume_mpp)
        how = geometry(reader.downsamples, mpp_level0, args.mpp, args.size)
        if how.size_level0 > min(reader.width, reader.height):
            what = f"a tile of {args.size} pixels at {args.mpp:g} um takes {how.size_level0:,} pixels of level 0"
            raise InputError(f"{what}, the slide has {reader.width:,} x {reader.height:,}: take a smaller --size or --mpp")
        factor = thumbnail_factor(reader.width, reader.height)
        mask = tissue_mask(reader.thumbnail(), mpp_level0 * factor)
        coords = grid(reader.width, reader.height, how.size_level0)
        coords = coords[tissue_share(mask, coords, how.size_level0, factor) >= args.min_tissue]
        write_atomic(out / f"{slide_name(path)}.mask.png", lambda file: Image.fromarray(mask).save(file, "PNG"))
        if not len(coords):
            raise InputError(f"no tile holds {100 * args.min_tissue:g} % tissue, see {slide_name(path)}.mask.png")
        attributes = {"slide": str(path), "mpp": args.mpp, "size": args.size, "size_level0": how.size_level0}
        attributes |= {"width": reader.width, "height": reader.height, "mpp_level0": mpp_level0}
        pixels = None
        if args.save_pixels:
            matrix = stain_matrix(reader, coords, how, reference) if reference else None
            pixels = normalised(batches(reader.tiles(coords, how), coords, BATCH), matrix)
        damaged = write_tiles(out / f"{slide_name(path)}.h5", coords, attributes, pixels, reader.workers)
    if damaged == len(coords):
        (out / f"{slide_name(path)}.h5").unlink()
        raise InputError("all of its tiles are damaged")
    return {"tiles": len(coords) - damaged, "damaged": damaged, "mpp_level0": mpp_level0}


def finished(path: Path, slide: Path) -> dict | None:
    """The entry of a slide whose tiles an earlier call has written; None where there are none of it that can be read."""
    try:
        tiles = read_tiles(path)
    except InputError:
        return None
    if Path(tiles.attributes["slide"]).resolve() != slide.resolve():  # the slide was moved: extract.py would look for it in vain
        return None
    return {"tiles": len(tiles.coords), "damaged": tiles.attributes.get("damaged", 0), "mpp_level0": tiles.attributes["mpp_level0"]}


# ----------------------------------------------------------------------------------------------------------- the script


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pathology.tile", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("slides", nargs="+", type=Path, help=f"slides, or folders of them: {', '.join(SLIDE_SUFFIXES)}")
    add("--out", type=Path, required=True, help="the folder of the tiles; with the same arguments an interrupted call goes on")
    add("--mpp", type=mpp, default=1.0, help="micrometres per pixel of a tile (default 1.0, about 10x)")
    add("--size", type=positive_int, default=256, help="pixels of a tile's edge (default 256)")
    add("--min-tissue", type=share, default=0.5, help="share of a tile that has to be tissue (default 0.5)")
    add("--assume-mpp", type=mpp, help="of level 0, for slides that store no resolution or an absurd one (default: skip them)")
    add("--save-pixels", action="store_true", help="keep the pixels in SLIDE.h5, up to 200 KB a tile (default: read them from the slide)")
    add(
        "--macenko",
        nargs="?",
        const="reference",
        metavar="PICTURE",
        help="normalise stains, needs --save-pixels: to the published\
 reference, or to a picture (default: leave them)",
    )
    add("--workers", type=positive_int, help="threads that read and compress (default: one a core)")
    return parser


def mpp(text: str) -> float:
    value = float(text)
    if not FINEST_MPP <= value <= COARSEST_MPP:
        raise argparse.ArgumentTypeError(f"{text} micrometres per pixel is no slide's: take {FINEST_MPP:g} to {COARSEST_MPP:g}")
    return value


def main(args: argparse.Namespace) -> None:
    for module in ("openslide", "h5py", "imagecodecs"):
        require(module)
    if args.macenko and not args.save_pixels:
        raise InputError("--macenko changes pixels: give --save-pixels as well")
    reference = None
    if args.macenko:
        reference = REFERENCE if args.macenko == "reference" else read_reference(Path(args.macenko))
    slides = find_slides(args.slides)
    names = ("mpp", "size", "min_tissue", "assume_mpp", "save_pixels", "macenko")
    arguments = {name: getattr(args, name) for name in names}
    check_sources(args.out, slides)
    reserve(args.out, TILES_SUMMARY, arguments)
    done: dict[str, dict] = {}
    skipped: dict[str, str] = {}
    with Progress(len(slides), "slides", "slide") as progress:
        for name, path in slides.items():
            try:
                done[name] = finished(args.out / f"{name}.h5", path) or tile_slide(path, args.out, args, reference)
            except WriteError:  # the disk is full: no other slide would do better
                raise
            except InputError as error:
                skipped[name] = str(error)
                warn(f"{name} is skipped: {error}")
            progress.update(note=f"{sum(entry['tiles'] for entry in done.values()):,} tiles")
    write_summary(args.out, TILES_SUMMARY, arguments, done, skipped)
    say_totals(args.out, "tiles", done, skipped)


if __name__ == "__main__":
    run_script(lambda: main(build_parser().parse_args()))
