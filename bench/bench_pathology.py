"""Patches per second of pathology/: tiles beside a plain OpenSlide loop, features beside the bare model, and memory over many slides.

    .pathology/bin/python bench/bench_pathology.py                               # on a CPU: the three parts
    .pathology/bin/python bench/bench_pathology.py --parts tile --rounds 5
    python bench/bench_pathology.py --device cuda                                # ViT-S and ViT-g shapes, random weights; no slides

tile       the same tiles, read and written to HDF5 by one loop (read_region of the same level, convert, resize) and as tile.py does
extract    features of a slide's tiles, read from the slide, and the model alone on the same pixels in memory
memory     resident memory after each of 50 slides, tiled with pixels and extracted
--device   pictures per second of each shape, extracted and fine-tuned, and the share of a 8,192-square product's speed in the same
           process; operations are counted with those that gradient checkpointing repeats

Time is that of the clock and that of the processor: on a machine with other work only the latter says something.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

SHAPES = ("random:dinov2-small", "random:dinov2-giant")
TILE_SIZE = 256
SMALL_VIEWS = ["--prototypes", "64", "--global-crop", "56", "--local-crop", "28"]  # of a dry run


def measure(sides: dict[str, Callable[[], object]], n: int, rounds: int) -> dict[str, dict[str, float]]:
    """Of each side, patches per second by the clock and the processor's milliseconds a patch: medians; the sides alternate A B B A."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for i in range(rounds):
        for name in list(sides) if i % 2 == 0 else list(sides)[::-1]:
            began, cpu = time.perf_counter(), time.process_time()
            sides[name]()
            times[name].append((time.perf_counter() - began, time.process_time() - cpu))
    clock, processor = ({name: statistics.median(pair[i] for pair in pairs) for name, pairs in times.items()} for i in (0, 1))
    return {name: {"patches/s": n / clock[name], "processor ms a patch": 1e3 * processor[name] / n} for name in sides}


# --------------------------------------------------------------------------------------------------------------- slides


def big_slide(folder: Path, width: int, height: int) -> Path:
    from pathology.synthetic import make_slide

    path = folder / f"slide-{width}.tiff"
    make_slide(path, [(0, 0, width, height)], width=width, height=height)
    return path


def bench_tile(folder: Path, args: argparse.Namespace) -> dict:
    """Tiles at the resolution of a level, and between two levels, where they have to be made smaller."""
    import h5py
    import openslide
    from PIL import Image

    from pathology.files import TILE_ATTRIBUTES, read_pixels, write_tiles
    from pathology.slides import SlideReader, batches, geometry, grid

    path, results = big_slide(folder, args.width, args.width // 2), {}
    for mpp in (0.5, 0.8):
        with SlideReader(path, args.workers) as reader:
            how = geometry(reader.downsamples, 0.5, mpp, TILE_SIZE)
            coords = grid(reader.width, reader.height, how.size_level0)
        attributes = dict.fromkeys(TILE_ATTRIBUTES, 0) | {"size": TILE_SIZE}

        def plain(coords=coords, how=how) -> None:
            slide = openslide.OpenSlide(path)

            def tiles():
                for x, y in coords.tolist():
                    tile = slide.read_region((x, y), how.level, (how.read, how.read)).convert("RGB")
                    yield np.asarray(tile if how.read == TILE_SIZE else tile.resize((TILE_SIZE, TILE_SIZE), Image.Resampling.BILINEAR))

            with h5py.File(folder / "plain.h5", "w") as file:
                shape = (len(coords), TILE_SIZE, TILE_SIZE, 3)
                pixels = file.create_dataset("pixels", shape, "u1", chunks=(1, *shape[1:]), compression="lzf", fletcher32=True)
                for i, tile in enumerate(tiles()):
                    pixels[i] = tile

        def ours(coords=coords, how=how, attributes=attributes) -> None:
            with SlideReader(path, args.workers) as reader:
                write_tiles(folder / "ours.h5", coords, attributes, batches(reader.tiles(coords, how), coords, 32))

        plain(), ours()
        assert (read_pixels(folder / "plain.h5", 0, 50) == read_pixels(folder / "ours.h5", 0, 50)).all()
        row = measure({"plain loop": plain, "tile.py": ours}, len(coords), args.rounds)
        row["ratio"] = row["tile.py"]["patches/s"] / row["plain loop"]["patches/s"]
        results[f"mpp {mpp}, {len(coords)} tiles"] = row
    return results


def bench_extract(folder: Path, args: argparse.Namespace) -> dict:
    """The share of the bare model's speed that extract.py keeps, with pixels from the slide."""
    from pathology.extract import embed_slide, slide_pixels
    from pathology.files import Tiles
    from pathology.models import load_model

    path = big_slide(folder, 4096, 4096)
    coords = np.stack(np.meshgrid(np.arange(16), np.arange(16)), 2).reshape(-1, 2).astype(np.int32) * 256
    attributes = {"slide": str(path), "mpp": 0.5, "size": 256, "size_level0": 256, "width": 4096, "height": 4096, "mpp_level0": 0.5}
    tiles, model = Tiles(Path("t.h5"), coords, attributes, False), load_model(args.model, dtype="auto")
    pixels = [batch for _, batch, _ in slide_pixels(tiles, args.batch_size, args.workers)]
    values, _, _ = embed_slide(model, slide_pixels(tiles, args.batch_size, args.workers), False)
    assert np.allclose(values, np.concatenate([model.embed(batch).numpy() for batch in pixels]), atol=1e-6)
    sides = {
        "bare model": lambda: [model.embed(batch) for batch in pixels],
        "extract.py": lambda: embed_slide(model, slide_pixels(tiles, args.batch_size, args.workers), False),
    }
    row = measure(sides, len(coords), args.rounds)
    row["share of the bare model's speed"] = row["extract.py"]["patches/s"] / row["bare model"]["patches/s"]
    return row


def resident() -> float:
    """MiB that this process occupies."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def bench_memory(folder: Path, args: argparse.Namespace) -> dict:
    from pathology.extract import embed_slide, kept_pixels
    from pathology.files import read_tiles
    from pathology.models import load_model
    from pathology.synthetic import make_slide
    from pathology.tile import build_parser, tile_slide

    (out := folder / "tiles").mkdir()
    flags = build_parser().parse_args([str(folder), "--out", str(out), "--save-pixels", "--mpp", "0.5"])
    model, after = load_model(args.model, dtype="auto"), []
    path = folder / "same.tiff"
    make_slide(path, [(0, 0, 1536, 1024)], width=2048, height=1536)
    for _ in range(args.slides):
        tile_slide(path, out, flags, None)
        embed_slide(model, kept_pixels(read_tiles(out / "same.h5"), 16), False)
        after.append(resident())
    third = max(1, args.slides // 5)
    return {"slides": args.slides, "MiB after the first fifth": max(after[:third]), "MiB at the end": after[-1], "most": max(after)}


# ------------------------------------------------------------------------------------------------------------------ a GPU


def flops(work: Callable[[], object]) -> int:
    """Multiplications and additions of matrix products and attention, as PyTorch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def training_step(name: str, n: int, device: str, small: bool) -> Callable[[], object]:
    """One step of finetune.py on `n` pictures of noise, with its defaults; ViT-g computes its layers again in the backward pass."""
    import torch

    from pathology import finetune
    from pathology.models import load_model

    flags = [".", "--init", name, "--batch", str(n), *(SMALL_VIEWS if small else [])]
    args = finetune.build_parser().parse_args([*flags, *(["--gradient-checkpointing"] if "giant" in name else [])])
    pixels = np.random.default_rng(0).integers(0, 256, (2 * n, TILE_SIZE, TILE_SIZE, 3), dtype=np.uint8)
    train, none = np.arange(2 * n), np.arange(0)
    model = load_model(name, device="cpu", dtype="float32")
    run = finetune.Run(args, SimpleNamespace(pixels=pixels), train, none, none, model, torch.device(device), torch.bfloat16)
    finetune.set_up(run, steps=1000)
    return lambda: finetune.take_step(run)


def bench_shapes(args: argparse.Namespace) -> dict:
    """Pictures per second of each shape in extract.py and finetune.py, and the share of a large matrix product's speed."""
    import torch

    from pathology.models import load_model

    small = bool(os.environ.get("EMBEDDING_DRY_RUN"))
    device = "cpu" if small else args.device
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    square = torch.randn(256 if small else 8192, 256 if small else 8192, device=device, dtype=torch.bfloat16)

    def seconds(work: Callable[[], object]) -> float:
        times = []
        for _ in range(2 + args.rounds):
            wait()
            began = time.perf_counter()
            work()
            wait()
            times.append(time.perf_counter() - began)
        return statistics.median(times[2:])

    def speed(work: Callable[[], object], n: int) -> dict:
        if not small:
            torch.cuda.reset_peak_memory_stats()
        per_call = seconds(work)
        row = {"pictures/s": n / per_call, "share of peak": flops(work) / per_call / peak, "batch": n}
        return row | ({} if small else {"GiB": torch.cuda.max_memory_allocated() / 2**30})

    peak, results = 2 * len(square) ** 3 / seconds(lambda: square @ square), {}
    for name in SHAPES[: 1 if small else 2]:
        n = 2 if small else args.batch_size
        model = load_model(name, device=device, dtype="bfloat16")
        pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (n, TILE_SIZE, TILE_SIZE, 3), dtype=np.uint8))
        pixels = pixels if small else pixels.pin_memory()
        results[f"{name}, extract"] = speed(lambda model=model, pixels=pixels: model.embed(pixels), n)
        del model
        n = 2 if small else min(n, 256 if "small" in name else 32)
        results[f"{name}, finetune"] = speed(training_step(name, n, device, small), n)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=("tile", "extract", "memory"), default=["tile", "extract", "memory"])
    parser.add_argument("--device", help="cuda: the shapes on a GPU alone (default: the parts on a CPU)")
    parser.add_argument("--model", default="random:dinov2-small", help="of extract and memory (default random:dinov2-small)")
    parser.add_argument("--rounds", type=int, default=5, help="(default 5)")
    parser.add_argument("--width", type=int, default=8192, help="pixels of the slide that is tiled (default 8192)")
    parser.add_argument("--slides", type=int, default=50, help="of part memory (default 50)")
    parser.add_argument("--workers", type=int, help="threads that read (default: one a core)")
    parser.add_argument("--batch-size", type=int, help="(default 32; 256 with --device)")
    args = parser.parse_args()
    args.batch_size = args.batch_size or (256 if args.device else 32)
    if args.device:
        results = {"shapes": bench_shapes(args)}
    else:
        with tempfile.TemporaryDirectory() as folder:
            parts = {"tile": bench_tile, "extract": bench_extract, "memory": bench_memory}
            results = {}
            for part in args.parts:
                (own := Path(folder) / part).mkdir()
                results[part] = parts[part](own, args)
                print(f"{part}: {results[part]}", flush=True)
    about = {"python": platform.python_version(), "cores": os.cpu_count()} | {name: version(name) for name in ("torch", "transformers")}
    print(json.dumps(results | about))


if __name__ == "__main__":
    main()
