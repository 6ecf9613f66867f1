"""Show where a slide model looks: attention over the slide, as a picture, as objects for QuPath, and the patches it weighs most.

    python -m pathology.heatmap feats/demo-002.h5 --model runs/mil --out heatmaps/         # one slide
    python -m pathology.heatmap feats/ --model runs/mil --out heatmaps/                    # all of them

Leaves behind, in --out:

    SLIDE.geojson     a square a tile in pixels of level 0, with its attention: drop it onto the slide in QuPath 0.4 or newer
    SLIDE.png         the slide at thumbnail resolution beside its attention, on one scale from the least to the most
    SLIDE.top.png     the patches of most attention, the first at the upper left

Attention is the softmax of a gated-attention model (evaluate_slides.py) over the tiles of the slide, averaged over heads: it sums to 1. It
says what the model's answer rests on, and not which class a place belongs to. The level of full resolution is never read as a whole.
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from files.arguments import positive_int
from files.console import InputError, run_script, say, warn
from files.writing import WriteError, check_absent, errors_of_writing, write_atomic, write_text
from pathology.files import Features, h5_files, read_features, require
from pathology.slides import SlideReader, geometry, thumbnail_factor

if TYPE_CHECKING:
    import torch

SHEET_COLUMNS, SHEET_PATCH = 6, 192  # of SLIDE.top.png: patches in a row, pixels of one
COLOURS = "inferno"
SUFFIXES = (".geojson", ".png", ".top.png")  # of the files of a slide


def attention_of(model: "torch.nn.Module", features: Features) -> np.ndarray:
    """Attention of each tile (N,), summing to 1, in float64. Raises InputError where the model has none, or is of other features."""
    import torch

    expected, fingerprint = model.config["features"], features.attributes["fingerprint"]
    if not len(features.features) or not np.isfinite(features.features).all():
        what = "its features are not finite" if len(features.features) else "it holds no patches"
        raise InputError(f"{features.path}: {what}: make it again")
    if features.features.shape[1] != model.config["dim"] or expected["fingerprint"] != fingerprint:
        made = f"{features.attributes['model']} ({fingerprint})"
        raise InputError(
            f"{features.path} holds features of {made}, the model learned from {expected['model']} ({expected['fingerprint']})"
        )
    values = torch.from_numpy(features.features.astype(np.float32))
    with torch.inference_mode():
        _, scores = model(values, torch.tensor([0, len(values)], dtype=torch.int32))
    if scores is None:
        raise InputError(f"the aggregator {model.config['aggregator']} has no attention to show: train one with --aggregator gated")
    return scores.double().reshape(len(values), -1).softmax(0).mean(1).numpy()


def heat(attention: np.ndarray, features: Features) -> np.ndarray:
    """Attention (N,) on the thumbnail's pixels -> (h, w) float64, NaN where there is no tile."""
    attributes = features.attributes
    factor = thumbnail_factor(attributes["width"], attributes["height"])
    grid = np.full((round(attributes["height"] / factor), round(attributes["width"] / factor)), np.nan)
    corners = features.coords / factor
    ends = (features.coords + attributes["size_level0"]) / factor
    for (x0, y0), (x1, y1), value in zip(corners.round().astype(int), ends.round().astype(int), attention, strict=True):
        grid[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)] = value
    return grid


def geojson(attention: np.ndarray, features: Features, origin: tuple[int, int] = (0, 0)) -> dict:
    """Tiles as detections of QuPath: squares in pixels of level 0, with the attention and its rank (1 is the most) as measurements.

    origin   of the scanned area, see `scanned_from`
    """
    size = int(features.attributes["size_level0"])
    ranks = np.empty(len(attention), int)
    ranks[np.argsort(-attention, kind="stable")] = np.arange(1, len(attention) + 1)
    objects = []
    for (x, y), value, rank in zip((features.coords - np.array(origin)).tolist(), attention.tolist(), ranks.tolist(), strict=True):
        ring = [[x, y], [x + size, y], [x + size, y + size], [x, y + size], [x, y]]
        properties = {"objectType": "detection", "measurements": {"attention": value, "attention rank": rank}}
        objects.append({"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": properties})
    return {"type": "FeatureCollection", "features": objects}


def scanned_from(properties: dict) -> tuple[int, int]:
    """Where the scanned area begins, from which QuPath counts pixels: MIRAX slides store it, others begin at 0, 0."""
    return tuple(int(properties.get(f"openslide.bounds-{axis}", 0)) for axis in "xy")


def draw(thumbnail: np.ndarray, grid: np.ndarray, title: str, path: Path) -> None:
    """The slide (h, w, 3), beside it the same with attention (h, w) over it, and a scale."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    h, w = grid.shape
    with plt.rc_context({"text.parse_math": False}):
        figure, (left, right) = plt.subplots(1, 2, figsize=(13, 1.5 + 6 * h / w), layout="constrained")
        left.imshow(thumbnail)
        right.imshow(thumbnail)
        image = right.imshow(np.ma.masked_invalid(grid), cmap=COLOURS, alpha=0.7, interpolation="nearest")
        for axis in (left, right):
            axis.axis("off")
        left.set_title("slide", fontsize=9)
        right.set_title("attention", fontsize=9)
        figure.colorbar(image, ax=right, shrink=0.8, label="attention: share of the slide's sum of 1")
        figure.suptitle(title, fontsize=10)
        figure.savefig(path, format="png", dpi=110)
        plt.close(figure)


def draw_sheet(patches: list[tuple[np.ndarray, float]], path: Path) -> None:
    """Patches and their attention in rows, the most attention first."""
    from PIL import Image, ImageDraw

    columns, rows = min(SHEET_COLUMNS, len(patches)), -(-len(patches) // SHEET_COLUMNS)
    cell = SHEET_PATCH + 16
    sheet = Image.new("RGB", (columns * cell, rows * (cell + 12)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (pixels, value) in enumerate(patches):
        x, y = i % columns * cell + 8, i // columns * (cell + 12) + 18
        sheet.paste(Image.fromarray(pixels).resize((SHEET_PATCH, SHEET_PATCH)), (x, y))
        pen.text((x, y - 14), f"{i + 1}. attention {value:.3g}", fill="black")
    sheet.save(path, "PNG")


def show(features: Features, attention: np.ndarray, args: argparse.Namespace) -> str:
    """Write the three files of a slide -> a line about it. Raises InputError where the slide is gone or damaged."""
    attributes, name = features.attributes, features.name
    top = np.argsort(-attention, kind="stable")[: args.top]
    with SlideReader(Path(attributes["slide"]), args.workers) as reader:
        if (reader.width, reader.height) != (attributes["width"], attributes["height"]):
            raise InputError(f"{attributes['slide']} has another size than when it was tiled: tile it again")
        thumbnail, origin = reader.thumbnail(), scanned_from(reader.properties)
        how = geometry(reader.downsamples, attributes["mpp_level0"], attributes["mpp"], attributes["size"])
        pixels = list(reader.tiles(features.coords[top], how))
    write_text(args.out / f"{name}.geojson", json.dumps(geojson(attention, features, origin)) + "\n")
    title = f"{name}: attention of {args.model}, not a class\n{len(attention):,} tiles, features of {attributes['model']}"
    write_atomic(args.out / f"{name}.png", lambda path: draw(thumbnail, heat(attention, features), title, path))
    patches = [(tile, float(attention[i])) for i, tile in zip(top, pixels, strict=True) if tile is not None]
    if patches:
        write_atomic(args.out / f"{name}.top.png", lambda path: draw_sheet(patches, path))
    x, y = features.coords[top[0]].tolist()
    tenth = 100 * np.sort(attention)[-max(1, len(attention) // 10) :].sum()
    return f"{name}: most attention at {x}, {y} of level 0, {tenth:.0f} % of it on a tenth of the {len(attention):,} tiles"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pathology.heatmap", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("features", type=Path, help="SLIDE.h5 of extract.py, or a folder of them")
    add("--model", type=Path, required=True, help="a folder that evaluate_slides.py --aggregator gated wrote")
    add("--out", type=Path, required=True, help="a folder; files that are there already are not overwritten")
    add("--top", type=positive_int, default=24, help="patches on the sheet (default 24)")
    add("--workers", type=positive_int, help="threads that read slides (default: one a core)")
    return parser


def main(args: argparse.Namespace) -> None:
    for module in ("openslide", "h5py"):
        require(module)
    paths = h5_files(args.features, "features")
    for path in paths:
        for suffix in SUFFIXES:
            check_absent(args.out / f"{path.stem}{suffix}")
    from pathology.mil import load_mil

    model = load_mil(args.model)
    with errors_of_writing(args.out):
        args.out.mkdir(parents=True, exist_ok=True)
    n_skipped = 0
    for path in paths:
        try:
            features = read_features(path)
            say(show(features, attention_of(model, features), args))
        except InputError as error:
            if len(paths) == 1 or isinstance(error, WriteError):
                raise
            n_skipped += 1
            warn(f"{path.stem} is skipped: {error}")
    n = len(paths) - n_skipped
    if not n:
        raise InputError(f"{args.features}: none of the {len(paths)} slides could be shown, see the warnings")
    say(f"{args.out}: attention of {n} slide{'s' * (n != 1)}" + f", {n_skipped} skipped" * bool(n_skipped))


if __name__ == "__main__":
    run_script(lambda: main(build_parser().parse_args()))
