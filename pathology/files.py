"""The files that the scripts of this folder hand to each other, read and written in one place.

    tiles/SLIDE.h5          coords (N, 2) int32: x, y of each tile's upper left corner, in pixels of level 0
                            pixels (N, size, size, 3) uint8, RGB, a chunk a tile: only with `tile.py --save-pixels`
                            attributes: those of TILE_ATTRIBUTES
    tiles/SLIDE.mask.png    the slide's tissue mask at the resolution of the thumbnail: 255 is tissue
    tiles/tiles.json        {"arguments", "slides": {name: {"tiles", ...}}, "skipped": {name: reason}}
    feats/SLIDE.h5          features (N, D) float32 or float16, coords (N, 2) int32
                            attributes: model, fingerprint, and those of the tiles
    feats/features.json     {"arguments", "slides": {name: {"tiles", "damaged"}}, "skipped": {name: reason}}
    labels.csv              columns slide, label, patient and, where there is an external cohort, cohort

SLIDE is the slide's file name without its last suffix. Every file is complete or absent. The same content gives the same bytes.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from files.console import InputError, say
from files.reading import as_label, column_names, read_column, read_rows
from files.writing import errors_of_writing, write_atomic, write_json

if TYPE_CHECKING:
    import h5py

TILES_SUMMARY = "tiles.json"
REQUIREMENTS = "pathology/requirements.txt"
# of a file of tiles. slide: its path. mpp: micrometres per pixel of a tile; size: pixels of its edge at mpp; size_level0: the same edge in
# pixels of level 0; width, height: of level 0; mpp_level0: micrometres per pixel there
TILE_ATTRIBUTES = ("slide", "mpp", "size", "size_level0", "width", "height", "mpp_level0")
Batches = Iterable[tuple[np.ndarray, np.ndarray, int]]
# of the formats that OpenSlide reads and that are one file a slide
SLIDE_SUFFIXES = (".svs", ".tif", ".tiff", ".ndpi", ".vms", ".scn", ".mrxs", ".svslide", ".bif", ".czi", ".dcm")
FEATURE_ATTRIBUTES = ("model", "fingerprint", *TILE_ATTRIBUTES)


def require(module: str, requirements: str = REQUIREMENTS) -> None:
    """Raise InputError where a package of a file of requirements is missing."""
    from importlib.util import find_spec

    if find_spec(module) is None:
        built = ", or run it in .pathology (make pathology)" * (requirements == REQUIREMENTS)
        raise InputError(f"the package {module} is missing: pip install -r {requirements}{built}")


@dataclass(frozen=True)
class Tiles:
    """The tiles of one slide, without their pixels."""

    path: Path
    coords: np.ndarray  # (N, 2) int32
    attributes: dict
    has_pixels: bool

    @property
    def name(self) -> str:
        return self.path.stem


@dataclass(frozen=True)
class Features:
    """The features of one slide's tiles: one bag."""

    path: Path
    features: np.ndarray  # (N, D) float32 or float16
    coords: np.ndarray  # (N, 2) int32
    attributes: dict

    @property
    def name(self) -> str:
        return self.path.stem


@dataclass(frozen=True)
class SlideLabel:
    """A row of labels.csv; `cohort` is "" where the file has no such column."""

    slide: str
    label: str
    patient: str
    cohort: str


# ----------------------------------------------------------------------------------------------------------- HDF5


@contextmanager
def open_h5(path: Path) -> Iterator["h5py.File"]:
    """An HDF5 file for reading. Raises InputError where it is missing, damaged, or lacks what is read from it."""
    require("h5py")
    import h5py

    if not path.is_file():
        raise InputError(f"no file {path}")
    try:
        with h5py.File(path, "r") as file:
            yield file
    except InputError:
        raise
    except (OSError, KeyError, ValueError, TypeError) as error:  # h5py raises all four for damaged files and for groups of other names
        raise InputError(
            f"{path} is damaged, or not what this script reads ({str(error).splitlines()[0]}): name another, or make it again"
        ) from None


def write_h5(path: Path, attributes: dict, write: Callable[["h5py.File"], None]) -> None:
    """Write an HDF5 file with these attributes and what `write(file)` adds; it is complete or absent, and repeats to the byte."""
    require("h5py")
    import h5py

    def write_all(temporary: Path) -> None:
        try:
            with h5py.File(temporary, "w") as file:
                write(file)
                for name, value in attributes.items():
                    file.attrs[name] = value
        except (OSError, RuntimeError) as error:  # h5py raises either on a full disk, with a report of many lines
            if number := re.search(r"errno = (\d+)", str(error)):
                raise OSError(int(number[1]), os.strerror(int(number[1]))) from None
            raise

    write_atomic(path, write_all, path.with_name(f".{path.name}.tmp"))  # one name: a run that goes on replaces what a killed one left


def checked_attributes(file: "h5py.File", path: Path, names: tuple[str, ...]) -> dict:
    missing = [name for name in names if name not in file.attrs]
    if missing:
        script = "extract.py" if names == FEATURE_ATTRIBUTES else "tile.py"
        raise InputError(f"{path} was not written by {script} (it has no attribute {missing[0]}): files of other tools are not read")
    return {name: value.item() if hasattr(value, "item") else value for name, value in file.attrs.items()}


def checked_coords(file: "h5py.File", path: Path) -> np.ndarray:
    coords = file["coords"][:]
    if coords.ndim != 2 or coords.shape[1] != 2 or coords.dtype.kind not in "iu":
        raise InputError(f"{path}: coords must be whole numbers of shape (N, 2), they are {coords.dtype} {coords.shape}: make it again")
    return coords


# ---------------------------------------------------------------------------------------------------------- tiles


def write_tiles(path: Path, coords: np.ndarray, attributes: dict, batches: Batches | None = None, workers: int | None = None) -> int:
    """Write tiles/SLIDE.h5 with coords (N, 2) and TILE_ATTRIBUTES -> the number of damaged tiles, an attribute as well. Raises WriteError.

    batches   coords (k, 2), pixels (k, size, size, 3) and how many tiles beside them were damaged, in order: only these tiles are
              written, with their pixels, as they come, so that memory stays small. None: all coords, and no pixels
    workers   threads that compress pixels
    """
    assert set(attributes) >= set(TILE_ATTRIBUTES), attributes
    size, n_damaged = attributes["size"], 0
    attributes = dict(attributes)

    def write(file: "h5py.File") -> None:
        nonlocal coords, n_damaged
        if batches is not None:
            # LZF costs a tenth of gzip's time; of photographs gzip would hardly save more. The checksum finds what a disk has damaged
            shape, whole = (len(coords), size, size, 3), (None, size, size, 3)
            options = {"chunks": (1, size, size, 3), "compression": "lzf", "fletcher32": True, "track_times": False}
            pixels = file.create_dataset("pixels", shape, "u1", maxshape=whole, **options)
            good = []
            n = 0
            with ThreadPoolExecutor(workers) as threads:
                for corners, tiles, damaged in batches:
                    for i, (skipped, data) in enumerate(threads.map(stored_chunk, tiles), n):
                        pixels.id.write_direct_chunk((i, 0, 0, 0), data, skipped)
                    good.append(corners)
                    n, n_damaged = n + len(corners), n_damaged + damaged
            pixels.resize(n, 0)
            coords = good[0][:0] if not n else np.concatenate(good)
        attributes["damaged"] = n_damaged
        file.create_dataset("coords", data=coords.astype(np.int32).reshape(-1, 2), track_times=False)

    write_h5(path, attributes, write)
    return n_damaged


def stored_chunk(tile: np.ndarray) -> tuple[int, bytes]:
    """What HDF5's filters LZF and Fletcher-32 may store of a tile (size, size, 3) uint8 -> 1 where LZF is left out, else 0, and the bytes.

    HDF5 itself compresses one chunk at a time, holds Python's lock meanwhile, and takes twice as long for one.
    """
    import imagecodecs

    tile = np.ascontiguousarray(tile)
    packed = imagecodecs.lzf_encode(tile)
    skipped = len(packed) >= tile.nbytes
    data = tile.tobytes() if skipped else bytes(packed)
    return int(skipped), data + imagecodecs.h5checksum_fletcher32(data).to_bytes(4, "little")


def read_tiles(path: Path) -> Tiles:
    """The tiles of tiles/SLIDE.h5. Raises InputError where the file is missing or damaged."""
    with open_h5(path) as file:
        attributes = checked_attributes(file, path, TILE_ATTRIBUTES)
        return Tiles(path, checked_coords(file, path), attributes, "pixels" in file)


def read_pixels(path: Path, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Pixels (n, size, size, 3) uint8 of tiles start to stop. Raises InputError where they were not kept or are damaged."""
    with open_h5(path) as file:
        if "pixels" not in file:
            raise InputError(f"{path} holds no pixels: run tile.py with --save-pixels")
        return file["pixels"][start:stop]


# ------------------------------------------------------------------------------------------------------- features


def write_features(path: Path, features: np.ndarray, coords: np.ndarray, attributes: dict) -> None:
    """Write feats/SLIDE.h5: features (N, D), coords (N, 2), FEATURE_ATTRIBUTES and further ones. Raises WriteError."""
    assert set(attributes) >= set(FEATURE_ATTRIBUTES), attributes

    def write(file: "h5py.File") -> None:
        file.create_dataset("features", data=features, track_times=False)
        file.create_dataset("coords", data=coords.astype(np.int32), track_times=False)

    write_h5(path, attributes, write)


def read_features(path: Path) -> Features:
    """The bag of feats/SLIDE.h5. Raises InputError where the file is missing, damaged, or inconsistent."""
    with open_h5(path) as file:
        attributes = checked_attributes(file, path, FEATURE_ATTRIBUTES)
        features, coords = file["features"][:], checked_coords(file, path)
    if features.ndim != 2 or not features.shape[1] or features.dtype.kind != "f":
        raise InputError(f"{path}: features must be float32 or float16 (N, D), they are {features.dtype} {features.shape}: make it again")
    if len(features) != len(coords):
        raise InputError(f"{path}: features {features.shape} and coords {coords.shape} do not fit together: make it again")
    return Features(path, features, coords, attributes)


# ------------------------------------------------------------------------------------------------- folders, labels


def read_json_object(path: Path) -> dict | None:
    """The object of a JSON file that one of these scripts wrote, None where there is none. Raises InputError for a damaged one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise InputError(f"{path} is damaged: delete it, and give the same arguments as before")
    return value


def h5_files(folder: Path, what: str) -> list[Path]:
    """SLIDE.h5 of a folder by name, or the file itself. Raises InputError where there is none; `what` names them: tiles, features."""
    if folder.is_file():
        if folder.suffix != ".h5":
            raise InputError(f"{folder} is no file of {what}: name a folder of {what}, or one SLIDE.h5 of it")
        return [folder]
    if not folder.is_dir():
        raise InputError(f"{folder} does not exist: name a folder of {what}, or one of its files")
    paths = sorted(path for path in folder.glob("*.h5") if not path.name.startswith("."))
    if not paths:
        raise InputError(f"{folder} holds no {what} (SLIDE.h5)")
    return paths


def reserve(out: Path, summary: str, arguments: dict) -> None:
    """Make a folder of tiles or features, and write down in `summary` with what arguments; a call with the same ones goes on.

    Raises InputError where it holds files that were made with others, or other things.
    """
    before = read_json_object(out / summary)
    if before is None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists already and holds no {summary}: choose another --out")
    earlier = before and before.get("arguments")
    if before is not None and earlier == arguments:
        return
    if before is not None and any(out.glob("*.h5")):  # where nothing came of them the arguments may be corrected
        earlier = earlier if isinstance(earlier, dict) else {}
        names = [name for name in {**arguments, **earlier} if arguments.get(name) != earlier.get(name)]
        differing = ", ".join(f"{name} {earlier.get(name)}, not {arguments.get(name)}" for name in names)
        raise InputError(f"{out} was made with other arguments ({differing}): choose another --out, or give the same")
    with errors_of_writing(out):
        out.mkdir(parents=True, exist_ok=True)
    write_json(out / summary, {"arguments": arguments, "slides": {}, "skipped": {}})


def source_of(path: Path) -> Path | None:
    """The slide that a file of tiles or features was made from; None where the file is missing or damaged."""
    try:
        with open_h5(path) as file:
            return Path(file.attrs["slide"])
    except InputError:
        return None


def check_sources(out: Path, slides: dict[str, Path]) -> None:
    """Raise InputError where out/SLIDE.h5 was made from another slide of that name: it would be taken for finished."""
    for name, slide in slides.items():
        source = source_of(out / f"{name}.h5")
        if source and source.exists() and source.resolve() != slide.resolve():
            raise InputError(f"{out / name}.h5 was made from {source}, not from {slide}: rename one of the two, or choose another --out")


def write_summary(out: Path, summary: str, arguments: dict, done: dict[str, dict], skipped: dict[str, str]) -> None:
    """Write tiles.json or features.json; slides of earlier calls with the same arguments stay in it."""
    earlier = read_json_object(out / summary) or {}
    slides = {name: entry for name, entry in earlier.get("slides", {}).items() if (out / f"{name}.h5").is_file()} | done
    reasons = {name: reason for name, reason in (earlier.get("skipped", {}) | skipped).items() if name not in slides}
    write_json(out / summary, {"arguments": arguments, "slides": dict(sorted(slides.items())), "skipped": dict(sorted(reasons.items()))})


def say_totals(out: Path, what: str, done: dict[str, dict], skipped: dict[str, str]) -> None:
    """The last line of a script that has worked through slides. Raises InputError where all had to be skipped.

    what      tiles or features: what the slides were to give
    done      by name: {"tiles", "damaged"}; skipped: the reasons by name
    """
    if not done:
        raise InputError(f"no slide gave {what}, {len(skipped)} skipped, the first because: {next(iter(skipped.values()))}")
    n, damaged = (sum(entry[key] for entry in done.values()) for key in ("tiles", "damaged"))
    rest = f", {damaged:,} damaged tile{'s' * (damaged != 1)} left out" * (damaged > 0)
    rest += f", {len(skipped)} slide{'s' * (len(skipped) != 1)} skipped" * bool(skipped)
    of = "features of " * (what == "features")
    say(f"{out}: {of}{n:,} tiles of {len(done)} slide{'s' * (len(done) != 1)}{rest}")


def read_labels(path: Path) -> dict[str, SlideLabel]:
    """labels.csv by slide. A suffix such as .svs in column slide is left out. Raises InputError with the place of what is wrong."""
    rows = list(read_rows(path))
    missing = [column for column in ("slide", "label", "patient") if column not in column_names(rows)]
    if missing:
        raise InputError(f"{path}: no column {', '.join(missing)}: needs slide, label, patient and, if there is one, cohort")
    columns = [read_column(rows, name, as_label) for name in ("slide", "label", "patient")]
    cohorts = read_column(rows, "cohort", as_label) if "cohort" in column_names(rows) else [""] * len(rows)
    labels: dict[str, SlideLabel] = {}
    for (place, _), slide, label, patient, cohort in zip(rows, *columns, cohorts, strict=True):
        name = slide_name(slide)
        if name in labels:
            raise InputError(f"{place}: slide {name} was named before: give each slide one row")
        labels[name] = SlideLabel(name, label, patient, cohort)
    return labels


def slide_name(path: str | Path) -> str:
    """SLIDE: the file's name without its suffix, where that is the suffix of a slide."""
    path = Path(path)
    return path.stem if path.suffix.lower() in SLIDE_SUFFIXES else path.name
