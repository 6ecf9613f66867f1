"""Make slides up, with tissue in known rectangles and a planted tumour in half of them, so that everything can be tried and tested.

    python -m pathology.synthetic slides/demo                   # 32 slides of 16 patients, 4096 x 3072 pixels of 0.5 um, in a minute

Leaves behind, in the folder:

    demo-000.tiff ...   pyramids of three levels in JPEG blocks, as scanners write them
    labels.csv          slide, label (tumour or normal), patient, cohort: the last quarter of the patients is the cohort "external"
    truth.json          {slide: {"tissue": [[x, y, width, height], ...], "tumour": [...]}} in pixels of level 0

Tissue is pink with violet nuclei; in a tumour they are darker, larger and five times as dense. Hue and strength of the stain differ from
slide to slide.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from files.arguments import positive_int, seed
from files.console import InputError, Progress, run_script, say
from files.writing import errors_of_writing, write_atomic, write_text
from pathology.files import require

WIDTH, HEIGHT, MPP, TILE = 4096, 3072, 0.5, 512  # TILE: 256 um, the tile of `tile.py --mpp 1.0 --size 256`
BLOCK = 256  # pixels of the file's blocks
GLASS, EOSIN, NUCLEI, TUMOUR_NUCLEI = (243, 241, 243), (226, 163, 196), (128, 84, 158), (84, 46, 122)
NUCLEI_PER_TILE, TUMOUR_NUCLEI_PER_TILE = 120, 600
Rectangle = tuple[int, int, int, int]  # x, y, width, height in pixels of level 0


def paint(width: int, height: int, tissue: list[Rectangle], tumour: list[Rectangle], rng: np.random.Generator) -> "np.ndarray":
    """The slide's pixels (height, width, 3) uint8. Nuclei stay inside their rectangle, so that its edge is exact."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (width, height), GLASS)
    draw = ImageDraw.Draw(image)
    shift = rng.integers(-8, 9, 3)
    for kind, rectangles in (("tissue", tissue), ("tumour", tumour)):
        per_tile, colour, radius = (NUCLEI_PER_TILE, NUCLEI, 7) if kind == "tissue" else (TUMOUR_NUCLEI_PER_TILE, TUMOUR_NUCLEI, 11)
        for x, y, w, h in rectangles:
            draw.rectangle((x, y, x + w - 1, y + h - 1), tuple(map(int, np.add(EOSIN, shift))))
            n = int(per_tile * w * h / TILE**2)
            centres = rng.uniform((x + 16, y + 16), (x + w - 17, y + h - 17), (n, 2))
            for (cx, cy), size in zip(centres, radius * rng.uniform(0.7, 1.3, n), strict=True):
                draw.ellipse((cx - size, cy - size, cx + size, cy + size), tuple(map(int, np.add(colour, shift))))
    pixels = np.asarray(image).astype(np.int16)
    noise = rng.integers(-6, 7, (height, width, 1), dtype=np.int16)  # grey: it leaves the colours as they are
    return np.clip(pixels + noise, 0, 255).astype(np.uint8)


def write_pyramid(path: Path, pixels: "np.ndarray", mpp: float | None, levels: int = 3) -> None:
    """A tiled pyramid TIFF that OpenSlide reads. `mpp` None: a file that stores no resolution."""
    import tifffile
    from PIL import Image

    def write(temporary: Path) -> None:
        level = pixels
        with tifffile.TiffWriter(temporary) as tiff:
            for i in range(levels):
                tiff.write(
                    level,
                    tile=(BLOCK, BLOCK),
                    compression="jpeg",
                    compressionargs={"level": 85},
                    photometric="rgb",
                    subfiletype=int(i > 0),
                    resolution=None if mpp is None else (1e4 / mpp / 2**i,) * 2,
                    resolutionunit=None if mpp is None else "CENTIMETER",
                    metadata=None,
                    software=False,
                )
                level = np.asarray(Image.fromarray(level).reduce(2))

    write_atomic(path, write)


def make_slide(
    path: Path, tissue: list[Rectangle], tumour: list[Rectangle] = (), *, width=WIDTH, height=HEIGHT, mpp: float | None = MPP, seed=0
) -> None:
    """Write one slide with these rectangles; `mpp` None: without a resolution. The same arguments give the same bytes."""
    write_pyramid(path, paint(width, height, list(tissue), list(tumour), np.random.default_rng(seed)), mpp)


def draw_rectangles(rng: np.random.Generator, *, positive: bool) -> tuple[list[Rectangle], list[Rectangle]]:
    """Tissue of 4 x 3 to 6 x 4 tiles somewhere on the slide; in a positive slide 2 x 2 tiles of it are tumour, on the grid of tiles."""
    w, h = int(rng.integers(4, 7)), int(rng.integers(3, 5))
    x, y = int(rng.integers(0, WIDTH // TILE - w + 1)), int(rng.integers(0, HEIGHT // TILE - h + 1))
    tumour = []
    if positive:
        i, j = int(rng.integers(0, w - 1)), int(rng.integers(0, h - 1))
        tumour = [((x + i) * TILE, (y + j) * TILE, 2 * TILE, 2 * TILE)]
    return [(x * TILE, y * TILE, w * TILE, h * TILE)], tumour


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pathology.synthetic", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("out", type=Path, help="a folder to write to, new or empty")
    add("--patients", type=positive_int, default=16, help="two slides each, every other patient with a tumour (default 16)")
    add("--seed", type=seed, default=0, help="(default 0)")
    return parser


def main(args: argparse.Namespace) -> None:
    for module in ("tifffile", "imagecodecs"):
        require(module)
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise InputError(f"{args.out} exists already: choose another folder, or delete it first")
    with errors_of_writing(args.out):
        args.out.mkdir(parents=True, exist_ok=True)
    lines, truth = ["slide,label,patient,cohort"], {}
    with Progress(2 * args.patients, "slides", "slide") as progress:
        for number in range(2 * args.patients):
            patient = number // 2
            rng = np.random.default_rng((args.seed, number))
            tissue, tumour = draw_rectangles(rng, positive=patient % 2 == 1)
            name = f"demo-{number:03d}"
            write_pyramid(args.out / f"{name}.tiff", paint(WIDTH, HEIGHT, tissue, tumour, rng), MPP)
            cohort = "external" if patient >= args.patients - args.patients // 4 else "internal"
            lines.append(f"{name},{'tumour' if tumour else 'normal'},patient-{patient:02d},{cohort}")
            truth[name] = {"tissue": tissue, "tumour": tumour}
            progress.update()
    write_text(args.out / "truth.json", json.dumps(truth, indent=1) + "\n")
    write_text(args.out / "labels.csv", "\n".join(lines) + "\n")
    say(f"{args.out}: {2 * args.patients} slides of {args.patients} patients, labels.csv, truth.json")


if __name__ == "__main__":
    run_script(lambda: main(build_parser().parse_args()))
