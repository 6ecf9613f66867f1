"""Features of tiles: each class and rule, pixels kept or read again, damage, resumption; attention of a slide in the right place."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pathology_slides import damage, one_slide, run
from PIL import Image
from short_runs import ROOT
from transformers import BeitConfig, Dinov2Config, Dinov2WithRegistersConfig, ResNetConfig, ViTConfig

from files.console import InputError
from files.writing import WriteError
from pathology.files import Features, read_features, read_labels
from pathology.heatmap import attention_of, geojson, heat, scanned_from
from pathology.models import PRESETS, find_model, load_model, model_class, normalized, write_embedding

SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 28, "patch_size": 14}
CONFIGS = {
    "dinov2": Dinov2Config(**SMALL),
    "dinov2_with_registers": Dinov2WithRegistersConfig(**SMALL),
    "vit": ViTConfig(**SMALL),
    "beit": BeitConfig(**SMALL, use_relative_position_bias=True),
    "resnet": ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
}


@pytest.fixture
def folder(request, tmp_path):
    """The folder of a small random model of a class."""
    torch.manual_seed(0)
    kind = getattr(request, "param", "dinov2")
    model_class(kind)(CONFIGS[kind]).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def pictures(n: int = 3, size: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


# ------------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("folder", CONFIGS, indirect=True)
@pytest.mark.parametrize("rule", ["cls", "mean", "cls+mean", "pool"])
def test_vectors_are_those_of_the_class(folder, rule, request):
    """Beside transformers' own output, of an input larger than the model's grid of positions."""
    kind = request.node.callspec.params["folder"]
    write_embedding(folder, rule=rule, input_size=42, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    if kind == "resnet" and rule != "pool":
        with pytest.raises(InputError, match="a ResNet has no tokens"):
            load_model(str(folder))
        return
    model = load_model(str(folder))
    module = model_class(kind).from_pretrained(folder).eval()
    images = normalized(torch.from_numpy(pictures()), 42, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    options = {"interpolate_pos_encoding": True} if kind in ("vit", "beit") else {}
    with torch.no_grad():
        output = module(images, **options)
    states = output.last_hidden_state
    if rule == "pool":
        expected = output.pooler_output.flatten(1)
    else:
        first = 5 if kind == "dinov2_with_registers" else 1
        both = {"cls": states[:, 0], "mean": states[:, first:].mean(1)}
        expected = torch.cat([both[part] for part in rule.split("+")], 1)
    vectors = model.embed(pictures())
    assert vectors.shape == (3, model.dim) and vectors.dtype == torch.float32
    assert torch.allclose(vectors, expected, atol=1e-5)


def test_a_picture_of_the_input_size_is_only_normalized():
    pixels = torch.from_numpy(pictures(2, 8))
    expected = (pixels.permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
    assert torch.allclose(normalized(pixels, 8, (0.5,) * 3, (0.25,) * 3), expected, atol=1e-6)


def test_random_weights_repeat_and_the_fingerprint_tells_them_apart(folder):
    random = f"random:{folder}"
    one, same, other, stored = load_model(random, seed=1), load_model(random, seed=1), load_model(random, seed=2), load_model(str(folder))
    assert one.fingerprint == same.fingerprint and torch.equal(one.embed(pictures()), same.embed(pictures()))
    assert len({one.fingerprint, other.fingerprint, stored.fingerprint}) == 3
    write_embedding(folder, rule="mean", input_size=28, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert load_model(str(folder)).fingerprint != stored.fingerprint


def test_presets_have_the_shape_of_the_published_models():
    parameters = {}
    for name in ("dinov2-small", "phikon-v2", "resnet50", "dinov2-giant"):
        preset = PRESETS[name]
        with torch.device("meta"):
            module = model_class(preset.model_type)(model_class(preset.model_type).config_class(**preset.config))
        parameters[name] = round(sum(p.numel() for p in module.parameters()) / 1e6)
    assert parameters == {"dinov2-small": 22, "phikon-v2": 303, "resnet50": 24, "dinov2-giant": 1136}


@pytest.mark.parametrize("spec", ["nothing", "./nothing", "a/b/c", "", "random:"])
def test_what_is_no_model_is_one_clear_line(spec):
    with pytest.raises(InputError, match=r"^no model '"):
        find_model(spec)


def test_damaged_models_are_one_clear_line(folder, tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text/config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match="no patch model of a known class"):
        load_model(str(tmp_path / "text"))
    (folder / "embedding.json").write_text('{"rule": "median", "input_size": 28, "mean": [0, 0, 0], "std": [1, 1, 1]}')
    with pytest.raises(InputError, match="no rule 'median'"):
        load_model(str(folder))
    (folder / "embedding.json").unlink()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(str(folder))
    weights.unlink()
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": "big"}, "weights cannot be loaded"),
        ({"patch_size": 0}, "weights cannot be loaded"),
        ({"hidden_size": 48}, "of its weights have another shape than config.json says, such as "),
    ],
)
def test_a_config_that_cannot_be_is_one_clear_line(folder, change, message):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError, match=message):
        load_model(str(folder))
    if "weights have" not in message:
        with pytest.raises(InputError, match=r"its config.json makes no model"):
            load_model(f"random:{folder}")


def test_channels_may_have_one_number_and_no_nan(folder):
    (folder / "preprocessor_config.json").write_text('{"image_mean": 0.5, "image_std": [0.5, 0.5, 0.5], "size": 28}')
    assert load_model(str(folder)).mean == (0.5,) * 3
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, NaN, 0.5]}')
    with pytest.raises(InputError, match="mean and std must be three numbers each"):
        load_model(str(folder))


@pytest.mark.parametrize("script", ["synthetic", "extract", "finetune", "evaluate_patches", "evaluate_slides"])
def test_seeds_that_cannot_be_are_refused(script, capsys):
    parser = importlib.import_module(f"pathology.{script}").build_parser()
    flag = "--split-seed" if script == "evaluate_patches" else "--seed"
    for value in (-1, 2**32):
        with pytest.raises(SystemExit, match="2"):
            parser.parse_args([f"{flag}={value}"])
        assert f"{value} is not between 0 and 4294967295" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ extract


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two slides, tiled with their pixels in `kept` and without in `read`. Their packages are those of make test-pathology."""
    for package in ("openslide", "h5py", "imagecodecs"):
        pytest.importorskip(package, reason=f"{package} is missing: make test-pathology installs it")
    folder = tmp_path_factory.mktemp("made")
    (folder / "slides").mkdir()
    for i in range(2):
        one_slide(folder / f"slides/slide-{i}.tiff", seed=i)
    for out, flags in (("kept", ["--save-pixels"]), ("read", [])):
        run("tile", folder / "slides", "--out", folder / out, "--mpp", 0.5, "--size", 128, *flags)
    return folder


@pytest.fixture
def tiled(made, tmp_path):
    """A copy of them that a test may damage."""
    import h5py

    for name in ("slides", "kept", "read"):
        shutil.copytree(made / name, tmp_path / name)
    for path in tmp_path.glob("*/*.h5"):
        with h5py.File(path, "r+") as file:
            file.attrs["slide"] = str(tmp_path / "slides" / f"{path.stem}.tiff")
    return tmp_path


def extract(tiled, folder, tiles: str, out: str, *flags) -> dict:
    run("extract", tiled / tiles, "--model", folder, "--out", tiled / out, "--batch-size", 7, *flags)
    return json.loads((tiled / out / "features.json").read_text())


def test_features_are_those_of_the_pixels_kept_or_read_again(tiled, folder):
    for out in ("kept", "read"):
        extract(tiled, folder, out, f"f-{out}", "--dtype", "float32")
    from pathology.files import read_pixels

    model = load_model(str(folder))
    for name in ("slide-0", "slide-1"):
        kept, read = (read_features(tiled / f"f-{out}/{name}.h5") for out in ("kept", "read"))
        pixels = read_pixels(tiled / f"kept/{name}.h5")
        assert kept.features.dtype == np.float32 and kept.attributes["fingerprint"] == model.fingerprint
        assert np.allclose(kept.features, model.embed(pixels).numpy(), atol=1e-5)
        assert (kept.features == read.features).all() and (kept.coords == read.coords).all()
    assert not (read_features(tiled / "f-kept/slide-0.h5").features == read_features(tiled / "f-kept/slide-1.h5").features).all()


def test_half_precision_is_stored_as_such(tiled, folder):
    extract(tiled, folder, "kept", "half", "--dtype", "bfloat16")
    extract(tiled, folder, "kept", "full", "--dtype", "float32")
    half, full = (read_features(tiled / f"{out}/slide-0.h5").features for out in ("half", "full"))
    assert half.dtype == np.float16 and np.abs(half - full).max() < 0.05


def test_damaged_tiles_are_left_out_and_counted_and_slides_that_are_gone_skipped(tiled, folder, capsys):
    damage(tiled / "slides/slide-0.tiff", block=9 * 2 + 3)
    (tiled / "slides/slide-1.tiff").unlink()
    summary = extract(tiled, folder, "read", "features")
    assert summary["slides"] == {"slide-0": {"tiles": 44, "damaged": 4}}  # four tiles of 128 in a block of 256
    assert "no slide" in summary["skipped"]["slide-1"] and "4 damaged tiles left out, 1 slide skipped" in capsys.readouterr().out
    assert len(read_features(tiled / "features/slide-0.h5").coords) == 44


def test_a_damaged_file_of_tiles_loses_only_what_is_damaged(tiled, folder):
    import h5py

    with h5py.File(tiled / "kept/slide-0.h5") as file:
        offset = file["pixels"].id.get_chunk_info(5).byte_offset
    with open(tiled / "kept/slide-0.h5", "r+b") as file:
        file.seek(offset + 100)
        file.write(b"\xff" * 50)
    (tiled / "kept/slide-1.h5").write_bytes(b"no HDF5")
    summary = extract(tiled, folder, "kept", "features")
    assert summary["slides"] == {"slide-0": {"tiles": 47, "damaged": 1}} and "damaged" in summary["skipped"]["slide-1"]


def test_an_interrupted_call_goes_on_to_the_same_files(tiled, folder):
    extract(tiled, folder, "kept", "whole")
    extract(tiled, folder, "kept", "cut")
    (tiled / "cut/slide-1.h5").unlink()
    written = (tiled / "cut/slide-0.h5").stat().st_mtime_ns
    extract(tiled, folder, "kept", "cut")
    assert (tiled / "cut/slide-0.h5").stat().st_mtime_ns == written
    for name in ("slide-0.h5", "slide-1.h5", "features.json"):
        assert (tiled / "whole" / name).read_bytes() == (tiled / "cut" / name).read_bytes()
    with pytest.raises(InputError, match="choose another --out"):
        run("extract", tiled / "kept", "--model", f"random:{folder}", "--out", tiled / "cut")


def test_features_of_other_tiles_are_not_taken_for_these(tiled, folder):
    """Slides cut again at another resolution, and another slide of the same name."""
    extract(tiled, folder, "kept", "features")
    run("tile", tiled / "slides", "--out", tiled / "coarse", "--mpp", 1, "--size", 128)
    with pytest.raises(InputError, match=r"was made with other arguments \(tiles .*'mpp': 0.5.*, not .*'mpp': 1.0"):
        extract(tiled, folder, "coarse", "features")
    (tiled / "others").mkdir()
    one_slide(tiled / "others/slide-1.tiff", seed=5)
    run("tile", tiled / "others", "--out", tiled / "more", "--mpp", 0.5, "--size", 128, "--save-pixels")
    with pytest.raises(InputError, match=r"slide-1.h5 was made from .*slides/slide-1.tiff, not from .*others/slide-1.tiff"):
        extract(tiled, folder, "more", "features")


# ------------------------------------------------------------------------------------------------------------- labels


def test_labels(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("slide,label,patient,cohort\na.svs,1,p,in\nb.c,0,q,out\n")
    labels = read_labels(path)
    assert labels.keys() == {"a", "b.c"} and labels["a"].label == "1" and labels["b.c"].cohort == "out"
    path.write_text("slide,label,patient\na,1,p\na.svs,0,p\n")
    with pytest.raises(InputError, match=r"labels.csv, line 3: slide a was named before"):
        read_labels(path)
    path.write_text("slide,label\na,1\n")
    with pytest.raises(InputError, match="no column patient"):
        read_labels(path)
    path.write_text("slide,label,patient\na,,p\n")
    with pytest.raises(InputError, match="line 2: label is empty"):
        read_labels(path)


# ----------------------------------------------------------------------------------------------------------- heat maps


def bag(coords: list, **attributes) -> Features:
    values = {"slide": "s.svs", "size": 256, "mpp": 1.0, "size_level0": 512, "width": 8192, "height": 4096, "mpp_level0": 0.5}
    values |= {"model": "m", "fingerprint": "f"} | attributes
    return Features(Path("s.h5"), np.eye(len(coords), 4, dtype=np.float32), np.array(coords, np.int32), values)


class FirstFeature(torch.nn.Module):
    """A slide model that looks at the tiles whose first feature is large."""

    config = {"features": {"model": "m", "fingerprint": "f"}, "dim": 4, "aggregator": "gated"}  # noqa: RUF012

    def forward(self, features, cu_seqlens):
        assert cu_seqlens.tolist() == [0, len(features)]
        return torch.zeros(1, 2), 5 * features[:, :1]


def test_attention_sums_to_one_and_its_pixel_is_the_right_one():
    features = bag([[1024, 512], [0, 0], [7680, 3584]])
    attention = attention_of(FirstFeature(), features)
    assert attention.sum() == pytest.approx(1) and attention[0] == pytest.approx(np.exp(5) / (np.exp(5) + 2))
    grid = heat(attention, features)  # 4 pixels of level 0 in one
    assert grid.shape == (1024, 2048) and np.isnan(grid).sum() == grid.size - 3 * 128**2
    y, x = np.nonzero(grid == np.nanmax(grid))
    assert (x.min(), x.max(), y.min(), y.max()) == (256, 383, 128, 255)


def test_objects_for_qupath_are_in_pixels_of_level_0():
    features = bag([[1024, 512], [0, 0]])
    objects = json.loads(json.dumps(geojson(np.array([0.75, 0.25]), features)))["features"]
    assert objects[0]["geometry"]["coordinates"] == [[[1024, 512], [1536, 512], [1536, 1024], [1024, 1024], [1024, 512]]]
    assert objects[0]["properties"] == {"objectType": "detection", "measurements": {"attention": 0.75, "attention rank": 1}}
    assert objects[1]["properties"]["measurements"]["attention rank"] == 2
    origin = scanned_from({"openslide.bounds-x": "1000", "openslide.bounds-y": "500"})  # of a MIRAX slide, which QuPath crops
    assert geojson(np.array([0.75, 0.25]), features, origin)["features"][0]["geometry"]["coordinates"][0][0] == [24, 12]
    assert scanned_from({}) == (0, 0)


def test_features_of_another_model_are_refused():
    with pytest.raises(InputError, match="the model learned from m"):
        attention_of(FirstFeature(), bag([[0, 0]], fingerprint="other"))


def test_a_heat_map_is_drawn(tiled, folder, monkeypatch):
    extract(tiled, folder, "read", "features", "--dtype", "float32")
    features = read_features(tiled / "features/slide-0.h5")

    class OneTile(torch.nn.Module):
        config = {"features": {"model": "m", "fingerprint": features.attributes["fingerprint"]}, "dim": 24, "aggregator": "gated"}  # noqa: RUF012

        def forward(self, values, cu_seqlens):
            scores = torch.zeros(len(values), 1)
            scores[11] = 9
            return torch.zeros(1, 2), scores

    monkeypatch.setattr("pathology.mil.load_mil", lambda folder: OneTile())
    run("heatmap", tiled / "features/slide-0.h5", "--model", tiled / "mil", "--out", tiled / "maps", "--top", 5)
    objects = json.loads((tiled / "maps/slide-0.geojson").read_text())["features"]
    most = max(objects, key=lambda item: item["properties"]["measurements"]["attention"])
    assert most["geometry"]["coordinates"][0][0] == features.coords[11].tolist()
    assert Image.open(tiled / "maps/slide-0.png").width > 1000 and Image.open(tiled / "maps/slide-0.top.png").width == 5 * 208
    with pytest.raises(InputError, match="exists already"):
        run("heatmap", tiled / "features/slide-0.h5", "--model", tiled / "mil", "--out", tiled / "maps")
    (tiled / "maps/slide-0.geojson").unlink()  # the pictures are no less
    with pytest.raises(InputError, match=r"slide-0.png exists already"):
        run("heatmap", tiled / "features/slide-0.h5", "--model", tiled / "mil", "--out", tiled / "maps")


def test_a_damaged_bag_is_skipped_and_none_left_is_an_error(tiled, folder, monkeypatch, capsys):
    extract(tiled, folder, "read", "features", "--dtype", "float32")
    fingerprint = read_features(tiled / "features/slide-0.h5").attributes["fingerprint"]
    model = FirstFeature()
    model.config = {"features": {"model": "m", "fingerprint": fingerprint}, "dim": 24, "aggregator": "gated"}
    monkeypatch.setattr("pathology.mil.load_mil", lambda folder: model)
    (tiled / "features/slide-0.h5").write_bytes(b"damaged")
    run("heatmap", tiled / "features", "--model", tiled / "mil", "--out", tiled / "maps")
    captured = capsys.readouterr()
    assert "slide-0 is skipped" in captured.err and "maps: attention of 1 slide, 1 skipped" in captured.out
    (tiled / "features/slide-1.h5").write_bytes(b"damaged")
    with pytest.raises(InputError, match="none of the 2 slides could be shown"):
        run("heatmap", tiled / "features", "--model", tiled / "mil", "--out", tiled / "others")


def test_a_full_disk_ends_the_call_in_one_line(tiled):
    """Not a warning a slide, and no traceback of HDF5; a file may not grow beyond 20 KB here."""
    limited = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); sys.argv = sys.argv[1:]; "
        "runpy.run_module('pathology.tile', run_name='__main__')"
    )
    command = [sys.executable, "-c", limited, "tile.py", "slides", "--save-pixels", "--size", "128", "--mpp", "0.5", "--out", "out"]
    done = subprocess.run(command, cwd=tiled, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "tile.py: out/slide-0.h5 cannot be written: File too large\n"
    assert not list((tiled / "out").glob("*.h5")) and not list((tiled / "out").glob(".*"))


def test_features_that_cannot_be_written_end_the_call(tiled, folder, monkeypatch):
    def fail(*_):
        raise WriteError("no space")

    monkeypatch.setattr("pathology.extract.write_features", fail)
    with pytest.raises(WriteError, match="no space"):
        extract(tiled, folder, "kept", "features")
