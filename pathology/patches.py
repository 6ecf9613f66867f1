"""Patches with their labels and patients, from a folder or zip of pictures or from tiles; and their splits by patient.

    patches.zip, patches/    PNG, JPEG or TIFF pictures. Labels and patients come from a CSV (--labels: columns file, label, patient and
                             perhaps split) or from the file names (--pattern: a regular expression with the groups label and patient)
    tiles/                   SLIDE.h5 with pixels (tile.py --save-pixels); labels from a CSV with columns slide, label, patient

A patient never is in two splits: patches of one slide are alike, and a probe that has seen the patient looks better than it is.
"""

import io
import re
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from files.console import InputError, Progress, warn
from files.reading import as_label, column_names, read_column, read_rows
from pathology.files import h5_files, read_labels, read_pixels, read_tiles, require

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
SPLITS = ("train", "validation", "test")
SHARES, DRAWS = (0.6, 0.2, 0.2), 100  # of the patients
IN_MEMORY = 2 * 2**30  # bytes of pixels; more go to a temporary file


class Origin(NamedTuple):
    """What is known of a picture beside its pixels. label and split are "" where they are not known."""

    label: str
    patient: str
    split: str


@dataclass
class Patches:
    """N patches, all of one size, in the order of their names.

    pixels      what `pixels[numbers]` returns: uint8 (n, S, S, 3), RGB
    names       (N,) file names, or SLIDE/NUMBER of a tile
    labels      (N,) strings, "" where there is no label
    patients    (N,) strings
    splits      (N,) of SPLITS, or None where the file of labels has no column split
    damaged     names of files that could not be read and were left out
    """

    pixels: "np.ndarray | TilePixels"
    names: np.ndarray
    labels: np.ndarray
    patients: np.ndarray
    splits: np.ndarray | None
    damaged: list[str]

    def __len__(self) -> int:
        return len(self.names)

    @property
    def labelled(self) -> bool:
        return bool(len(self)) and all(self.labels)

    @property
    def size(self) -> int:
        """Pixels of an edge."""
        return self.pixels[np.arange(1)].shape[1]

    def split(self, seed: int) -> np.ndarray:
        """Which of SPLITS each patch is in (N,): as the labels say, else by `split_patients`. Raises InputError."""
        if self.splits is None:
            return split_patients(self.patients, self.labels, seed)
        check_splits(self.patients, self.splits)
        return self.splits


# ------------------------------------------------------------------------------------------------------------- splits


def split_patients(patients: np.ndarray, labels: np.ndarray, seed: int, shares: Sequence[float] = SHARES) -> np.ndarray:
    """Draw the patients of each split at random, again where a split lacks a class that another has -> (N,) of SPLITS.

    Raises InputError where there are fewer than three patients. Where no draw of DRAWS has all classes, the last one stays.
    """
    unique = np.unique(patients)
    if len(unique) < len(SPLITS):
        raise InputError(f"{len(unique)} patient{'s' * (len(unique) != 1)}: training, validation and test need one each")
    rng, classes = np.random.default_rng(seed), set(labels.tolist())
    n_test, n_validation = (max(1, round(len(unique) * share)) for share in (shares[2], shares[1]))
    for _ in range(DRAWS):
        order, of_patient = rng.permutation(len(unique)), np.full(len(unique), SPLITS[0], dtype=object)
        of_patient[order[:n_test]], of_patient[order[n_test : n_test + n_validation]] = SPLITS[2], SPLITS[1]
        split = of_patient[np.searchsorted(unique, patients)].astype(str)
        if all(set(labels[split == name].tolist()) == classes for name in SPLITS):
            break
    return split


def check_splits(patients: np.ndarray, splits: np.ndarray) -> None:
    """Raise InputError for an unknown split, an empty one, and a patient who is in two."""
    if unknown := sorted(set(splits.tolist()) - set(SPLITS)):
        raise InputError(f"split {unknown[0]!r} is none of {', '.join(SPLITS)}")
    if empty := [name for name in SPLITS if name not in splits]:
        raise InputError(f"no patch is in split {empty[0]}: name all of {', '.join(SPLITS)}")
    pairs = sorted(set(zip(patients, splits, strict=True)))
    several = [patient for patient, n in Counter(patient for patient, _ in pairs).items() if n > 1]
    if several:
        where = " and ".join(split for patient, split in pairs if patient == several[0])
        others = f", as are {len(several) - 1} others" if len(several) > 1 else ""
        raise InputError(f"patient {several[0]} is in {where}{others}: give each patient one split")


# ------------------------------------------------------------------------------------------------------------ reading


def read_patches(source: Path, labels: Path | None = None, pattern: str | None = None) -> Patches:
    """Read the patches of a folder, a zip or tiles, see the top of this module. Raises InputError.

    Without labels and pattern every label is "", and each tile's patient is its slide, each picture's its file.
    """
    if not source.exists():
        raise InputError(f"no file or folder {source}")
    if source.suffix == ".h5" or (source.is_dir() and any(source.glob("*.h5"))):
        if pattern:
            raise InputError(f"--pattern is for pictures, and {source} holds tiles: name labels and patients of their slides with --labels")
        return read_tile_patches(source, labels)
    return read_pictures(source, labels, pattern)


def read_tile_patches(source: Path, labels: Path | None) -> Patches:
    """The tiles of slides whose files hold pixels. Slides without a row in `labels` are left out, and counted in a warning."""
    paths = h5_files(source, "tiles")
    known = read_labels(labels) if labels else None
    kept, damaged = [], []
    for path in paths:
        if known is not None and path.stem not in known:
            continue
        try:
            tiles = read_tiles(path)
        except InputError:
            damaged.append(path.name)
            continue
        if not tiles.has_pixels:
            raise InputError(f"{path} holds no pixels: run tile.py with --save-pixels")
        kept.append(tiles)
    if not kept:
        raise InputError(f"none of the {len(paths)} files of tiles in {source} is whole" + f" and named in {labels}" * bool(labels))
    if damaged:
        warn(f"{len(damaged):,} of {len(paths):,} files of tiles are damaged and left out, such as {damaged[0]}")
    if known is not None and (n := len(paths) - len(kept) - len(damaged)):
        warn(f"{labels} does not name {n} of {len(paths)} slides: left out")
    counts = [len(tiles.coords) for tiles in kept]
    slides = np.repeat([tiles.name for tiles in kept], counts)
    rows = {tiles.name: known[tiles.name] if known else None for tiles in kept}
    return Patches(
        pixels=TilePixels([tiles.path for tiles in kept], counts),
        names=np.array([f"{slide}/{i}" for slide, n in zip(rows, counts, strict=True) for i in range(n)]),
        labels=np.array([rows[slide].label if rows[slide] else "" for slide in slides]),
        patients=np.array([rows[slide].patient if rows[slide] else slide for slide in slides]),
        splits=None,
        damaged=damaged,
    )


class TilePixels:
    """The pixels of many SLIDE.h5 as one array that is read where it is indexed."""

    def __init__(self, paths: list[Path], counts: list[int]):
        require("h5py")
        self.paths, self.starts = paths, np.concatenate([[0], np.cumsum(counts)])
        self._file = lru_cache(maxsize=64)(self._open)

    def _open(self, number: int):
        import h5py

        return h5py.File(self.paths[number], "r")["pixels"]

    def __len__(self) -> int:
        return int(self.starts[-1])

    @cached_property
    def _edge(self) -> int:
        return read_pixels(self.paths[0], 0, 1).shape[1]

    def __getitem__(self, numbers: np.ndarray) -> np.ndarray:
        """uint8 (n, S, S, 3) of these tiles. Raises InputError for a tile that cannot be read."""
        out = np.empty((len(numbers), self._edge, self._edge, 3), np.uint8)
        slides = np.searchsorted(self.starts, numbers, side="right") - 1
        for at in np.argsort(numbers, kind="stable"):  # a file at a time, in the order in which it was written
            path = self.paths[slides[at]]
            try:
                out[at] = self._file(int(slides[at]))[numbers[at] - self.starts[slides[at]]]
            except (OSError, KeyError, ValueError) as error:
                raise InputError(
                    f"{path}, tile {numbers[at] - self.starts[slides[at]]}: {str(error).splitlines()[0]}: delete that file and tile again"
                ) from None
        return out


def read_pictures(source: Path, labels: Path | None, pattern: str | None) -> Patches:
    """The pictures of a folder (and the folders in it) or of a zip, decoded, at the size of the first; damaged ones are left out."""
    files = dict(picture_files(source))
    if not files:
        raise InputError(f"{source} holds no pictures ({', '.join(PICTURES)}) and no tiles (SLIDE.h5)")
    origins = read_origins(labels, list(files)) if labels else match_origins(pattern, list(files))
    names = sorted(origins)
    pixels, kept, damaged = decode(names, files)
    if not kept:
        raise InputError(f"none of the {len(names)} pictures in {source} can be read")
    labels_of, patients, splits = (np.array(column) for column in zip(*(origins[name] for name in kept), strict=True))
    return Patches(pixels, np.array(kept), labels_of, patients, splits if any(splits) else None, damaged)


def picture_files(source: Path) -> Iterator[tuple[str, object]]:
    """Name of each picture, relative to the source, and a function that reads its bytes."""
    if source.is_dir():
        for path in sorted(source.rglob("*")):
            if path.suffix.lower() in PICTURES and not path.name.startswith("."):
                yield str(path.relative_to(source)), path.read_bytes
        return
    try:
        archive = zipfile.ZipFile(source)
    except (zipfile.BadZipFile, OSError):
        raise InputError(f"{source} is neither a folder nor a zip: take one of these, or a folder of tiles") from None
    for name in sorted(archive.namelist()):
        if Path(name).suffix.lower() in PICTURES and not Path(name).name.startswith("."):
            yield name, lambda name=name: archive.read(name)


def read_origins(path: Path, files: list[str]) -> dict[str, Origin]:
    """Label, patient and split by picture. `file` is the path inside the folder or zip, or the file name where that is unique."""
    rows = list(read_rows(path))
    columns = column_names(rows)
    if missing := [name for name in ("file", "label", "patient") if name not in columns]:
        raise InputError(f"{path}: no column {' and '.join(missing)}: needs file, label, patient and, if there are splits, split")
    cells = [read_column(rows, name, as_label) for name in ("file", "label", "patient")]
    splits = read_column(rows, "split", as_label) if "split" in columns else [""] * len(rows)
    short = Counter(Path(name).name for name in files)
    full = {Path(name).name: name for name in files if short[Path(name).name] == 1} | {name: name for name in files}
    origins: dict[str, Origin] = {}
    for (place, _), name, label, patient, split in zip(rows, *cells, splits, strict=True):
        if name not in full:
            raise InputError(f"{place}: no picture {name}")
        if full[name] in origins:
            raise InputError(f"{place}: {name} was named before: give each picture one row")
        origins[full[name]] = Origin(label, patient, split)
    if len(origins) < len(files):
        warn(f"{path} does not name {len(files) - len(origins):,} of {len(files):,} pictures: left out")
    return origins


def match_origins(pattern: str | None, files: list[str]) -> dict[str, Origin]:
    """Label and patient by picture, from the names of the files. Raises InputError for a name that the pattern does not fit."""
    if pattern is None:
        return {name: Origin("", name, "") for name in files}
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise InputError(f"--pattern {pattern!r} is no regular expression: {error}") from None
    if missing := {"label", "patient"} - set(regex.groupindex):
        raise InputError(f"--pattern {pattern!r} has no group {' and '.join(sorted(missing))}: write (?P<{min(missing)}>...)")
    origins = {}
    for name in files:
        if not (match := regex.search(name)):
            raise InputError(f"--pattern {pattern!r} does not fit the file name {name}")
        if empty := [group for group in ("label", "patient") if not match[group]]:
            raise InputError(f"--pattern {pattern!r} finds no {' and no '.join(empty)} in the file name {name}")
        origins[name] = Origin(match["label"], match["patient"], "")
    return origins


def decode(names: list[str], files: dict) -> tuple[np.ndarray, list[str], list[str]]:
    """-> pixels (n, S, S, 3), names of these, names of damaged ones. S is the shorter edge of the first picture; others are resized."""
    from PIL import Image

    pixels, kept, damaged = None, [], []
    with Progress(len(names), "reading", "picture") as progress:
        for name in names:
            progress.update()
            try:
                with Image.open(io.BytesIO(files[name]())) as picture:
                    picture = picture.convert("RGB")
            except (OSError, ValueError, SyntaxError, zipfile.BadZipFile, Image.DecompressionBombError):
                damaged.append(name)
                continue
            if pixels is None:
                pixels = empty_pixels(len(names), min(picture.size))
            if picture.size != pixels.shape[1:3]:
                picture = picture.resize(pixels.shape[1:3], Image.Resampling.BICUBIC)
            pixels[len(kept)] = np.asarray(picture)
            kept.append(name)
    if damaged:
        warn(f"{len(damaged):,} of {len(names):,} pictures are damaged and left out, such as {damaged[0]}")
    return (pixels if pixels is None else pixels[: len(kept)]), kept, damaged


def empty_pixels(n: int, size: int) -> np.ndarray:
    shape = (n, size, size, 3)
    if np.prod(shape) <= IN_MEMORY:
        return np.empty(shape, np.uint8)
    return np.memmap(tempfile.TemporaryFile(), np.uint8, "w+", shape=shape)  # a file without a name: gone with the process
