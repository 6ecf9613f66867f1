"""Turn the tiles of every slide into vectors of a foundation model: one bag of features a slide.

    python -m pathology.extract tiles/ --model random:dinov2-small --out feats/random      # offline: the baseline of every other model
    python -m pathology.extract tiles/ --model dinov2-small --out feats/dinov2-small
    python -m pathology.extract tiles/ --model runs/adapted --out feats/adapted            # a folder that finetune.py wrote

Leaves behind, in --out, whose formats pathology/files.py describes:

    SLIDE.h5          features (N, D), coords (N, 2); attributes: model, its fingerprint, and those of the tiles
    features.json     the arguments, each slide's tiles, and the slides that were skipped, with the reason

Pixels come from tiles/SLIDE.h5 where tile.py kept them, else from the slide. Damaged tiles are left out and counted, slides that are gone
or damaged are skipped and reported. Features are float32, or float16 where the model computes in half precision. The same command goes on
where it was interrupted, and the files are the same as if it had not been.
"""

import argparse
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from files.arguments import positive_int, seed
from files.console import InputError, Progress, run_script, say, warn
from files.writing import WriteError
from pathology.files import (
    TILES_SUMMARY,
    Batches,
    Tiles,
    check_sources,
    h5_files,
    open_h5,
    read_features,
    read_json_object,
    read_tiles,
    require,
    reserve,
    say_totals,
    source_of,
    write_features,
    write_summary,
)
from pathology.models import PRESETS, find_model
from pathology.slides import SlideReader, batches, geometry

if TYPE_CHECKING:
    from pathology.models import PatchModel

SUMMARY = "features.json"
DTYPES = ("auto", "float32", "bfloat16", "float16")
AHEAD = 3  # batches that are read while the model works


# ------------------------------------------------------------------------------------------------------------- pixels


def kept_pixels(tiles: Tiles, n: int) -> Batches:
    """Pixels that tile.py kept, in batches of at most `n` -> coords, pixels, how many tiles were damaged."""
    with open_h5(tiles.path) as file:
        pixels = file["pixels"]
        for start in range(0, len(tiles.coords), n):
            coords = tiles.coords[start : start + n]
            try:
                yield coords, pixels[start : start + len(coords)], 0
            except OSError:  # a checksum is wrong: which tile is it?
                yield from batches((one_kept(pixels, start + i) for i in range(len(coords))), coords, n)


def one_kept(pixels, index: int) -> np.ndarray | None:
    try:
        return pixels[index]
    except OSError:
        return None


def slide_pixels(tiles: Tiles, n: int, workers: int | None) -> Batches:
    """Pixels read from the slide, in the same form. Raises InputError where the slide is gone, or another one."""
    attributes = tiles.attributes
    with SlideReader(Path(attributes["slide"]), workers) as reader:
        if (reader.width, reader.height) != (attributes["width"], attributes["height"]):
            raise InputError(
                f"{attributes['slide']} is {reader.width} x {reader.height} pixels and was not when it was tiled: tile it again"
            )
        how = geometry(reader.downsamples, attributes["mpp_level0"], attributes["mpp"], attributes["size"])
        yield from batches(reader.tiles(tiles.coords, how), tiles.coords, n)


def ahead(some: Batches) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """The same batches, read by a thread while the caller works, at most AHEAD of them. What goes wrong there is raised here."""
    from queue import Full, Queue
    from threading import Event, Thread

    queue: Queue = Queue(AHEAD)
    stop = Event()

    def put(item: object) -> None:
        while not stop.is_set():
            with suppress(Full):
                queue.put(item, timeout=0.1)
                break

    def read() -> None:
        try:
            with closing(some):
                for batch in some:
                    put(batch)
                    if stop.is_set():
                        return
            put(None)
        except Exception as error:
            put(error)

    thread = Thread(target=read, daemon=True)
    thread.start()
    try:
        while (item := queue.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()


# ----------------------------------------------------------------------------------------------------------- features


def embed_slide(model: "PatchModel", some: Batches, half: bool) -> tuple[np.ndarray, np.ndarray, int]:
    """Features (N, D), coords (N, 2) and the number of damaged tiles. Raises InputError for numbers that are not finite."""
    features, coords, damaged = [np.empty((0, model.dim), np.float32)], [np.empty((0, 2), np.int32)], 0
    with closing(ahead(some)) as read_ahead:
        for corners, pixels, n_damaged in read_ahead:
            damaged += n_damaged
            if len(corners):
                features.append(model.embed(pixels).cpu().numpy())
                coords.append(corners)
    values = np.concatenate(features)
    if not np.isfinite(values).all():
        raise InputError(f"{model.name} gives numbers that are not finite: take --dtype float32, or make or fetch the model again")
    if half and np.abs(values).max(initial=0) < np.finfo(np.float16).max:
        values = values.astype(np.float16)
    return values, np.concatenate(coords), damaged


def extract_slide(model: "PatchModel", path: Path, out: Path, args: argparse.Namespace) -> dict:
    """Write the features of one slide -> its entry of features.json. Raises InputError where the slide has to be skipped."""
    tiles = read_tiles(path)
    some = kept_pixels(tiles, args.batch_size) if tiles.has_pixels else slide_pixels(tiles, args.batch_size, args.workers)
    features, coords, damaged = embed_slide(model, some, model.dtype.itemsize == 2)
    if not len(features):
        raise InputError("all of its tiles are damaged" if damaged else "it has no tiles")
    damaged += int(tiles.attributes.get("damaged", 0))
    about = tiles.attributes | {"model": model.name, "fingerprint": model.fingerprint, "damaged": damaged}
    write_features(out / path.name, features, coords, about)
    return {"tiles": len(features), "damaged": damaged}


def finished(path: Path, fingerprint: str, slide: Path | None) -> dict | None:
    """The entry of a slide whose features an earlier call has written; None where there are none of it by this model."""
    try:
        features = read_features(path)
    except InputError:
        return None
    if features.attributes["fingerprint"] != fingerprint or (slide and Path(features.attributes["slide"]).resolve() != slide.resolve()):
        return None
    return {"tiles": len(features.features), "damaged": int(features.attributes.get("damaged", 0))}


# ---------------------------------------------------------------------------------------------------------- the script


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pathology.extract", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("tiles", type=Path, help="a folder that tile.py wrote, or one SLIDE.h5 of it")
    add("--model", required=True, help=f"{', '.join(PRESETS)}, a folder, a hub id, or random:PRESET for random weights")
    add("--revision", help="of a hub model: a branch, tag or commit (default: the newest)")
    add("--seed", type=seed, default=0, help="of random weights (default 0)")
    add("--out", type=Path, required=True, help="the folder of the features; with the same arguments an interrupted call goes on")
    add("--batch-size", type=positive_int, default=64, help="tiles a forward pass (default 64)")
    add("--dtype", choices=DTYPES, default="auto", help="auto: bfloat16 where the machine has instructions for it (default auto)")
    add("--device", help="cpu, cuda or cuda:N (default cuda where there is one, else cpu)")
    add("--workers", type=positive_int, help="threads that read slides (default: one a core)")
    return parser


def tile_arguments(tiles: Path) -> dict | None:
    """What the tiles of a folder, or of the folder of a file, were cut by; None where tile.py left no note of it there."""
    summary = read_json_object((tiles if tiles.is_dir() else tiles.parent) / TILES_SUMMARY)
    return summary and summary.get("arguments")


def main(args: argparse.Namespace) -> None:
    require("h5py")
    find_model(args.model, args.revision)
    paths = h5_files(args.tiles, "tiles")
    slides = {path.stem: slide for path in paths if (slide := source_of(path))}
    check_sources(args.out, slides)
    from pathology.models import load_model

    model = load_model(args.model, args.revision, args.device, args.dtype, args.seed)
    dtype = str(model.dtype).removeprefix("torch.")
    # on what the numbers depend: a batch of another size may round in another way
    arguments = {"model": args.model, "fingerprint": model.fingerprint, "dtype": dtype, "batch_size": args.batch_size}
    arguments["tiles"] = tile_arguments(args.tiles)
    reserve(args.out, SUMMARY, arguments)
    say(f"{args.model}: {model.dim} numbers a tile, {model.rule} at {model.input_size} pixels, {dtype} on {model.device.type}")
    done: dict[str, dict] = {}
    skipped: dict[str, str] = {}
    with Progress(len(paths), "features", "slide") as progress:
        for path in paths:
            try:
                entry = finished(args.out / path.name, model.fingerprint, slides.get(path.stem))
                done[path.stem] = entry or extract_slide(model, path, args.out, args)
            except WriteError:  # the disk is full: no other slide would do better
                raise
            except InputError as error:
                skipped[path.stem] = str(error)
                warn(f"{path.stem} is skipped: {error}")
            progress.update(note=f"{sum(entry['tiles'] for entry in done.values()):,} tiles")
    write_summary(args.out, SUMMARY, arguments, done, skipped)
    say_totals(args.out, "features", done, skipped)


if __name__ == "__main__":
    run_script(lambda: main(build_parser().parse_args()))
