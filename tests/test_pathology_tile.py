"""Tiles of slides made on the spot: the grid, the tissue, resolutions, damage, and the same files after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from pathology_slides import HEIGHT, TISSUE, WIDTH, damage, one_slide, run
from PIL import Image

from files.console import InputError
from pathology.blocks import JpegBlocks
from pathology.files import read_pixels, read_tiles
from pathology.slides import SlideReader, geometry, grid, open_slide
from pathology.tile import finished
from pathology.tissue import tissue_mask, tissue_share

for package in ("openslide", "h5py", "imagecodecs"):
    pytest.importorskip(package, reason=f"{package} is missing: make test-pathology installs it")

ROOT = Path(__file__).resolve().parents[1]


def expected_grid(step: int) -> list[tuple[int, int]]:
    """Tiles at least half of whose area is the tissue rectangle, by hand: row by row, inside the slide."""
    (x0, y0, w, h), corners = TISSUE[0], []
    for y in range(0, HEIGHT - step + 1, step):
        for x in range(0, WIDTH - step + 1, step):
            wide, high = (max(0, min(a + step, b + c) - max(a, b)) for a, b, c in ((x, x0, w), (y, y0, h)))
            if wide * high >= 0.5 * step**2:
                corners.append((x, y))
    return corners


@pytest.mark.parametrize(("mpp", "size", "step"), [(0.5, 256, 256), (1.0, 128, 256), (1.0, 64, 128), (2.0, 32, 128), (0.8, 100, 160)])
def test_the_grid_is_exact_at_every_resolution(tmp_path, mpp, size, step):
    slide = one_slide(tmp_path / "slide.tiff")
    run("tile", slide, "--mpp", mpp, "--size", size, "--out", tmp_path / "tiles")
    tiles = read_tiles(tmp_path / "tiles/slide.h5")
    assert [tuple(corner) for corner in tiles.coords.tolist()] == expected_grid(step)
    wanted = {"slide": str(slide), "mpp": mpp, "size": size, "size_level0": step, "width": WIDTH, "height": HEIGHT, "mpp_level0": 0.5}
    assert tiles.attributes == wanted | {"damaged": 0} and not tiles.has_pixels


def test_pixels_are_those_of_the_slide(tmp_path):
    """At the resolution of level 0, pixel for pixel; at half of it, those of level 1."""
    slide = one_slide(tmp_path / "slide.tiff")
    for mpp, level in ((0.5, 0), (1.0, 1)):
        out = tmp_path / f"tiles-{level}"
        run("tile", slide, "--mpp", mpp, "--size", 128, "--out", out, "--save-pixels")
        pixels, tiles = read_pixels(out / "slide.h5"), read_tiles(out / "slide.h5")
        assert pixels.shape == (len(tiles.coords), 128, 128, 3)
        with SlideReader(slide) as reader:
            (x, y), handle = map(int, tiles.coords[3]), reader._handle()
            plain = np.asarray(handle.read_region((x, y), level, (128, 128)).convert("RGB"))
        assert (pixels[3] == plain).all()


def read_all(slide: Path, how, coords: np.ndarray) -> tuple[list, list]:
    """Tiles as they are read, and by OpenSlide alone."""
    with SlideReader(slide, 2) as reader:
        ours = list(reader.tiles(coords, how))
    with SlideReader(slide, 2) as reader, open_slide(slide) as handle:
        reader._blocks = JpegBlocks(slide, handle)
        reader._blocks._pages = {}
        return ours, list(reader.tiles(coords, how))


@pytest.mark.parametrize(("mpp", "size"), [(0.5, 256), (0.5, 100), (0.8, 128), (1.0, 130), (2.0, 64)])
def test_blocks_decoded_directly_are_those_of_openslide(tmp_path, mpp, size):
    slide = one_slide(tmp_path / "slide.tiff")
    with open_slide(slide) as handle:
        how = geometry(handle.level_downsamples, 0.5, mpp, size)
        assert JpegBlocks(slide, handle).region(0, 0, how.level, how.read) is not None
    ours, theirs = read_all(slide, how, grid(WIDTH, HEIGHT, how.size_level0))
    assert len(ours) > 3 and all((a == b).all() for a, b in zip(ours, theirs, strict=True))


def test_what_openslide_sees_otherwise_is_left_to_it(tmp_path, monkeypatch):
    """A block that decodes to other pixels: the level is not read directly. A position between two pixels is not either."""
    slide = one_slide(tmp_path / "slide.tiff")
    with open_slide(slide) as handle:
        assert JpegBlocks(slide, handle).region(1, 0, 1, 64) is None
        assert JpegBlocks(slide, handle).region(2, 0, 1, 64) is not None
        assert JpegBlocks(slide, handle).region(WIDTH - 32, 0, 0, 64) is None
        decoded = JpegBlocks._block
        monkeypatch.setattr(JpegBlocks, "_block", lambda self, level, index: decoded(self, level, index) ^ (level == 0))
        assert set(JpegBlocks(slide, handle)._pages) == {1, 2}


def test_few_blocks_are_kept(tmp_path, monkeypatch):
    slide = one_slide(tmp_path / "slide.tiff")
    monkeypatch.setattr("pathology.blocks.CACHE_BYTES", 3 * 256 * 256 * 3)
    with open_slide(slide) as handle:
        blocks = JpegBlocks(slide, handle)
        for x in range(0, 1792, 256):
            assert blocks.region(x, 256, 0, 256) is not None
            assert len(blocks._cache) <= 3


def test_the_nearest_level_is_read():
    downsamples = (1.0, 2.0, 4.016)
    assert geometry(downsamples, 0.5, 0.5, 256) == geometry(downsamples, 0.504, 0.5, 256)
    assert [geometry(downsamples, 0.5, mpp, 256).level for mpp in (0.5, 0.9, 1.0, 1.9, 2.0, 8.0)] == [0, 0, 1, 1, 2, 2]
    assert geometry(downsamples, 0.25, 1.0, 256).size_level0 == 1024
    with pytest.raises(InputError, match="would be enlarged"):
        geometry(downsamples, 0.5, 0.25, 256)


def test_tiles_stay_inside_the_slide():
    assert grid(1000, 300, 256).tolist() == [[0, 0], [256, 0], [512, 0]]
    assert grid(100, 300, 256).shape == (0, 2)


def test_share_of_tissue_is_exact():
    mask = np.zeros((10, 10), bool)
    mask[2:6, 2:6] = True
    shares = tissue_share(mask, np.array([[0, 0], [20, 20], [15, 20]]), 40, 10.0)
    assert shares == pytest.approx([4 / 16, 1.0, 14 / 16])


def test_ink_holes_and_dust_are_no_tissue_or_tissue():
    """At 8 um a pixel: a pen mark and a speck are left out, a small hole is tissue, a large one is not."""
    picture = np.full((400, 400, 3), 243, np.uint8)
    picture[50:250, 50:350] = (205, 130, 180)
    picture[80:90, 80:90] = 243  # 0.006 mm2
    picture[120:200, 200:300] = 243  # 0.5 mm2
    picture[300:320, 50:350] = (40, 70, 190)  # blue ink
    picture[340:350, 50:350] = (30, 30, 32)  # black ink
    picture[370:390, 50:350] = (60, 160, 80)  # green ink
    picture[10:13, 10:13] = (205, 130, 180)  # dust
    mask = tissue_mask(picture, 8.0)
    assert mask[55:240, 55:190].all() and mask[85, 85]
    assert not mask[130:190, 210:290].any()
    assert not mask[260:].any() and not mask[:40].any()


def test_glass_alone_is_no_tissue_and_tissue_alone_is_all_tissue():
    rng = np.random.default_rng(0)
    noise = rng.integers(-4, 5, (200, 200, 3))
    assert not tissue_mask((noise + 240).astype(np.uint8), 8.0).any()
    assert tissue_mask((noise + np.array([215, 150, 190])).astype(np.uint8), 8.0).mean() > 0.99


def test_a_slide_without_resolution_is_skipped_unless_one_is_assumed(tmp_path, capsys):
    (tmp_path / "slides").mkdir()
    one_slide(tmp_path / "slides/without.tiff", mpp=None)
    one_slide(tmp_path / "slides/with.tiff")
    run("tile", tmp_path / "slides", "--out", tmp_path / "tiles")
    assert "stores no resolution: give micrometres per pixel with --assume-mpp" in capsys.readouterr().err
    assert json.loads((tmp_path / "tiles/tiles.json").read_text())["skipped"].keys() == {"without"}
    run("tile", tmp_path / "slides", "--out", tmp_path / "assumed", "--assume-mpp", 0.4)
    assert read_tiles(tmp_path / "assumed/without.h5").attributes["mpp_level0"] == 0.4
    assert read_tiles(tmp_path / "assumed/with.h5").attributes["mpp_level0"] == 0.5  # its own counts


def test_an_absurd_resolution_is_refused(tmp_path):
    one_slide(tmp_path / "slide.tiff", mpp=353.0)
    with pytest.raises(InputError, match="353 x 353 um per pixel, which no scanner makes"):
        run("tile", tmp_path / "slide.tiff", "--out", tmp_path / "tiles")


@pytest.mark.parametrize("value", ["0", "-1", "1000", "nan"])
def test_an_absurd_mpp_is_refused(tmp_path, value, capsys):
    with pytest.raises(SystemExit):
        run("tile", tmp_path, "--out", tmp_path / "tiles", "--assume-mpp", value)
    assert "--assume-mpp" in capsys.readouterr().err


def test_a_damaged_tile_is_left_out_and_counted(tmp_path, capsys):
    slide = one_slide(tmp_path / "slide.tiff")
    corner = damage(slide, block=9 * 2 + 3)  # 9 blocks a row: the tile at 768, 512
    run("tile", slide, "--mpp", 0.5, "--size", 256, "--out", tmp_path / "tiles", "--save-pixels", "--workers", 2)
    tiles = read_tiles(tmp_path / "tiles/slide.h5")
    assert [tuple(c) for c in tiles.coords.tolist()] == [c for c in expected_grid(256) if c != corner]
    assert tiles.attributes["damaged"] == 1 and "1 damaged tile left out" in capsys.readouterr().out
    assert len(read_pixels(tiles.path)) == len(tiles.coords) and read_pixels(tiles.path).min(axis=(1, 2, 3)).min() > 0


def test_damaged_and_empty_slides_are_skipped(tmp_path, capsys):
    (tmp_path / "slides").mkdir()
    one_slide(tmp_path / "slides/good.tiff")
    one_slide(tmp_path / "slides/empty.tiff", tissue=[])
    (tmp_path / "slides/cut.tiff").write_bytes((tmp_path / "slides/good.tiff").read_bytes()[:5000])
    (tmp_path / "slides/text.svs").write_text("no slide")
    run("tile", tmp_path / "slides", "--out", tmp_path / "tiles")
    summary = json.loads((tmp_path / "tiles/tiles.json").read_text())
    assert summary["slides"].keys() == {"good"} and summary["skipped"].keys() == {"empty", "cut", "text"}
    assert "3 slides skipped" in capsys.readouterr().out


def test_what_cannot_be_tiled_is_one_clear_line(tmp_path):
    with pytest.raises(InputError, match="no file or folder"):
        run("tile", tmp_path / "nothing", "--out", tmp_path / "tiles")
    (tmp_path / "a").mkdir()
    with pytest.raises(InputError, match="holds no slide"):
        run("tile", tmp_path / "a", "--out", tmp_path / "tiles")
    one_slide(tmp_path / "a/slide.tiff", tissue=[])
    (tmp_path / "b").mkdir()
    (tmp_path / "b/slide.svs").write_text("x")
    with pytest.raises(InputError, match="have one name"):
        run("tile", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "tiles")
    with pytest.raises(InputError, match="give --save-pixels as well"):
        run("tile", tmp_path / "a", "--out", tmp_path / "tiles", "--macenko")
    assert not (tmp_path / "tiles").exists()
    with pytest.raises(InputError, match="no slide gave tiles"):
        run("tile", tmp_path / "a", "--out", tmp_path / "tiles")
    with pytest.raises(InputError, match=r"takes 2,000 pixels of level 0, the slide has 2,100 x 1,300: take a smaller --size or --mpp"):
        run("tile", tmp_path / "a/slide.tiff", tmp_path / "b/../a", "--out", tmp_path / "tiles", "--size", 1000)
    with pytest.raises(InputError, match=r"slide.svs is cut off, or of no kind that OpenSlide reads"):
        run("tile", tmp_path / "b", "--out", tmp_path / "others")


def test_other_arguments_are_refused_and_the_same_go_on(tmp_path):
    one_slide(tmp_path / "slide.tiff")
    run("tile", tmp_path / "slide.tiff", "--out", tmp_path / "tiles")
    written = (tmp_path / "tiles/slide.h5").stat().st_mtime_ns
    with pytest.raises(InputError, match="made with other arguments"):
        run("tile", tmp_path / "slide.tiff", "--out", tmp_path / "tiles", "--mpp", 2)
    run("tile", tmp_path / "slide.tiff", "--out", tmp_path / "tiles")
    assert (tmp_path / "tiles/slide.h5").stat().st_mtime_ns == written
    (tmp_path / "tiles/slide.h5").write_bytes(b"damaged")
    assert finished(tmp_path / "tiles/slide.h5", tmp_path / "slide.tiff") is None
    run("tile", tmp_path / "slide.tiff", "--out", tmp_path / "tiles")
    assert len(read_tiles(tmp_path / "tiles/slide.h5").coords)


def test_slides_of_one_name_in_two_calls_are_told_apart(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        one_slide(tmp_path / folder / "slide.tiff")
    one_slide(tmp_path / "b/other.tiff")
    out = tmp_path / "tiles"
    run("tile", tmp_path / "a", "--out", out)
    with pytest.raises(InputError, match=r"slide.h5 was made from .*a/slide.tiff, not from .*b/slide.tiff: rename one"):
        run("tile", tmp_path / "b", "--out", out)
    assert not (out / "other.h5").exists()
    (tmp_path / "a/slide.tiff").rename(tmp_path / "slide.tiff")
    run("tile", tmp_path / "slide.tiff", "--out", out)
    assert read_tiles(out / "slide.h5").attributes["slide"] == str(tmp_path / "slide.tiff")
    run("tile", tmp_path / "b/other.tiff", "--out", out)
    assert list(json.loads((out / "tiles.json").read_text())["slides"]) == ["other", "slide"]


def test_a_thumbnail_is_read_in_blocks(tmp_path, monkeypatch):
    """Also of a slide without coarse levels: no region is larger than READ_SIDE, and the picture is the same."""
    slide = one_slide(tmp_path / "slide.tiff")
    monkeypatch.setattr("pathology.slides.THUMBNAIL_SIDE", 256)
    with SlideReader(slide) as reader:
        whole = reader.thumbnail()
        monkeypatch.setattr("pathology.slides.READ_SIDE", 300)
        sizes = []
        monkeypatch.setattr(reader, "downsamples", (1.0,))
        ordered = reader.ordered
        monkeypatch.setattr(reader, "ordered", lambda read, boxes: (sizes.extend(boxes), ordered(read, boxes))[1])
        blocks = reader.thumbnail()
    assert len(sizes) > 20 and whole.shape == blocks.shape == (158, 256, 3)
    assert np.abs(whole.astype(int) - blocks).mean() < 6


def test_the_mask_is_saved_as_a_picture(tmp_path):
    run("tile", one_slide(tmp_path / "slide.tiff"), "--out", tmp_path / "tiles")
    mask = np.asarray(Image.open(tmp_path / "tiles/slide.mask.png"))
    x, y, w, h = (value * mask.shape[1] / WIDTH for value in TISSUE[0])
    assert mask.mean() == pytest.approx(w * h / mask.size, rel=0.02)
    assert mask[int(y + h / 2), int(x + w / 2)] and not mask[int(y / 2), int(x / 2)]


@pytest.mark.slow
def test_a_killed_call_goes_on_to_the_same_files(tmp_path):
    (tmp_path / "slides").mkdir()
    for i in range(3):
        one_slide(tmp_path / f"slides/slide-{i}.tiff", seed=i)
    flags = ["--mpp", "0.5", "--size", "128", "--save-pixels"]
    run("tile", tmp_path / "slides", "--out", tmp_path / "whole", *flags)
    command = [sys.executable, "-m", "pathology.tile", str(tmp_path / "slides"), "--out", str(tmp_path / "killed"), *flags]
    job = subprocess.Popen(command, cwd=ROOT)
    while not list((tmp_path / "killed").glob(".slide-1.h5.tmp")):
        assert job.poll() is None, "it ended before it could be killed"
        time.sleep(0.002)
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    assert not (tmp_path / "killed/slide-2.h5").exists()
    subprocess.run(command, cwd=ROOT, check=True)
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "killed").iterdir())
    assert all((tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes() for name in names)


REAL = Path(os.environ.get("PATHOLOGY_SLIDES", "/nowhere"))


@pytest.mark.skipif(not REAL.is_dir(), reason="no real slides: set PATHOLOGY_SLIDES to a folder of them")
def test_real_slides(tmp_path, capsys):
    """Those of public test sets: one with a resolution, one without (JPEG 2000), one absurd, one too small, one damaged."""
    run("tile", REAL, "--out", tmp_path / "tiles")
    summary = json.loads((tmp_path / "tiles/tiles.json").read_text())
    assert summary["slides"].keys() == {"cmu_small_region"} and summary["slides"]["cmu_small_region"]["tiles"] == 6
    reasons = {"boxes": "352.778", "tcga-cr-7395-01a-01-ts1": "no resolution", "unreadable": "16 x 16", "small": "16 x 16"}
    assert all(reason in summary["skipped"][name] for name, reason in reasons.items())
    with pytest.raises(InputError, match="damaged"):
        run("tile", REAL / "unreadable.svs", "--size", 8, "--out", tmp_path / "none")
    run("tile", REAL, "--out", tmp_path / "pixels", "--assume-mpp", 0.5, "--save-pixels", "--macenko")
    tiles = read_tiles(tmp_path / "pixels/tcga-cr-7395-01a-01-ts1.h5")
    assert len(tiles.coords) == 35 and read_pixels(tiles.path).std() > 20
    run("extract", tmp_path / "tiles", "--model", "random:resnet50", "--out", tmp_path / "features")
