"""Patches, their labels, patients and splits; probes, scores and intervals; shifts of colour."""

import csv
import zipfile

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from files.console import InputError
from pathology import patches, scores, shifts

PATTERN = r"(?P<patient>p\d+)_.*class(?P<label>\d)"


def write_pictures(folder, n: int = 12, size: int = 10) -> list[str]:
    folder.mkdir(exist_ok=True)
    names = [f"p{i // 3}_{i}_class{i % 2}.png" for i in range(n)]
    for i, name in enumerate(names):
        Image.new("RGB", (size, size), (10 * i, 20, 30)).save(folder / name)
    return sorted(names)


def write_csv(path, rows, header=("file", "label", "patient")):
    with open(path, "w", newline="") as f:
        csv.writer(f).writerows([header, *rows])
    return path


def test_a_folder_and_a_zip_of_it_hold_the_same_patches(tmp_path):
    names = write_pictures(tmp_path / "a")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in names:
            archive.write(tmp_path / "a" / name, name)
    one, other = (patches.read_patches(tmp_path / name, None, PATTERN) for name in ("a", "a.zip"))
    assert one.names.tolist() == other.names.tolist() == names and one.size == 10 and one.labelled
    np.testing.assert_array_equal(one.pixels, other.pixels)
    assert [tuple(pixel) for pixel in one.pixels[:, 0, 0]] == [(10 * int(name.split("_")[1]), 20, 30) for name in names]
    assert one.patients.tolist() == [name.split("_")[0] for name in names]
    unlabelled = patches.read_patches(tmp_path / "a")
    assert not unlabelled.labelled and len(set(unlabelled.patients)) == 12


def test_damaged_pictures_are_left_out_and_odd_sizes_resized(tmp_path, capsys):
    write_pictures(tmp_path / "a")
    (tmp_path / "a" / "p1_4_class0.png").write_bytes((tmp_path / "a" / "p1_4_class0.png").read_bytes()[:40])
    Image.new("RGB", (7, 10)).save(tmp_path / "a" / "p1_5_class1.png")
    read = patches.read_patches(tmp_path / "a", None, PATTERN)
    assert len(read) == 11 and read.damaged == ["p1_4_class0.png"] and read.pixels.shape == (11, 10, 10, 3)
    assert "1 of 12 pictures are damaged and left out, such as p1_4_class0.png" in capsys.readouterr().err


def test_labels_from_a_file_name_what_is_wrong_and_where(tmp_path, capsys):
    names = write_pictures(tmp_path / "a")
    labels = write_csv(tmp_path / "l.csv", [(name, "x", "p") for name in names[:5]])
    assert len(patches.read_patches(tmp_path / "a", labels)) == 5
    assert "does not name 7 of 12 pictures" in capsys.readouterr().err
    for rows, message in (
        ([("none.png", "x", "p")], r"line 2: no picture none.png"),
        ([(names[0], "x", "p")] * 2, r"line 3: .* was named before"),
        ([(names[0], "", "p")], r"line 2: label is empty"),
    ):
        with pytest.raises(InputError, match=message):
            patches.read_patches(tmp_path / "a", write_csv(tmp_path / "wrong.csv", rows))
    with pytest.raises(InputError, match="no column patient"):
        patches.read_patches(tmp_path / "a", write_csv(tmp_path / "wrong.csv", [(names[0], "x")], ("file", "label")))
    for pattern, message in (
        (r"(?P<label>x", "is no regular expression"),
        (r"(?P<label>\d)", "no group patient"),
        (PATTERN + "z", "does not fit"),
        (r"(?P<patient>q\d)?.*(?P<label>class\d)", "finds no patient in the file name p0_0_class0.png"),
        (r"(?P<patient>p\d).*(?P<label>z*)", "finds no label in the file name"),
    ):
        with pytest.raises(InputError, match=message):
            patches.read_patches(tmp_path / "a", None, pattern)
    with pytest.raises(InputError, match="neither a folder nor a zip"):
        patches.read_patches(tmp_path / "l.csv")


def test_tiles_of_slides_are_patches_of_their_patients(tmp_path, capsys):
    for package in ("h5py", "imagecodecs"):
        pytest.importorskip(package, reason=f"tiles need {package} (pathology/requirements.txt)")
    from pathology.files import write_tiles

    attributes = {"mpp": 1.0, "size": 4, "size_level0": 4, "width": 9, "height": 9, "mpp_level0": 1.0}
    for slide, n in (("a", 3), ("b", 2), ("c", 1)):
        pixels = np.arange(n)[:, None, None, None] + np.zeros((n, 4, 4, 3), int) + 10 * (ord(slide) - 96)
        batch = (np.zeros((n, 2)), pixels.astype(np.uint8), 0)
        write_tiles(tmp_path / f"{slide}.h5", np.zeros((n, 2)), attributes | {"slide": slide}, [batch])
    labels = write_csv(tmp_path / "l.csv", [("a.svs", "x", "p1"), ("c.svs", "y", "p2")], ("slide", "label", "patient"))
    read = patches.read_patches(tmp_path, labels)
    assert read.names.tolist() == ["a/0", "a/1", "a/2", "c/0"] and read.patients.tolist() == ["p1"] * 3 + ["p2"] and read.size == 4
    assert read.pixels[np.array([3, 0, 2])][:, 0, 0, 0].tolist() == [30, 10, 12]
    assert patches.read_patches(tmp_path).patients.tolist() == ["a"] * 3 + ["b"] * 2 + ["c"]
    with pytest.raises(InputError, match="--pattern is for pictures"):
        patches.read_patches(tmp_path, None, PATTERN)
    (tmp_path / "b.h5").write_bytes(b"damaged")
    assert patches.read_patches(tmp_path).damaged == ["b.h5"]
    assert "1 of 3 files of tiles are damaged and left out, such as b.h5" in capsys.readouterr().err
    for slide in "ac":
        (tmp_path / f"{slide}.h5").unlink()
    with pytest.raises(InputError, match=r"none of the 1 files of tiles in .* is whole$"):
        patches.read_patches(tmp_path)


def test_pixels_come_back_whether_they_can_be_compressed_or_not(tmp_path):
    for package in ("h5py", "imagecodecs"):
        pytest.importorskip(package, reason=f"tiles need {package} (pathology/requirements.txt)")
    import h5py

    from pathology.files import read_pixels, write_tiles

    attributes = {"slide": "a", "mpp": 1.0, "size": 32, "size_level0": 32, "width": 99, "height": 99, "mpp_level0": 1.0}
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    pixels = np.stack([noise, np.full_like(noise, 200), noise // 64, noise.swapaxes(0, 1)])
    write_tiles(tmp_path / "a.h5", np.zeros((4, 2)), attributes, [(np.zeros((4, 2)), pixels, 0)], workers=2)
    assert (read_pixels(tmp_path / "a.h5") == pixels).all()
    with h5py.File(tmp_path / "a.h5") as file:
        stored = [file["pixels"].id.read_direct_chunk((i, 0, 0, 0)) for i in range(4)]
    assert [skipped for skipped, _ in stored] == [1, 0, 0, 1] and len(stored[1][1]) < 200


# -------------------------------------------------------------------------------------------------------------- splits


def test_patients_are_whole_in_a_split_and_the_seed_draws_them():
    patients = np.repeat([f"p{i}" for i in range(20)], 5)
    labels = np.array(["a", "b"] * 50)
    split = patches.split_patients(patients, labels, 0)
    assert {name: len(set(patients[split == name])) for name in patches.SPLITS} == {"train": 12, "validation": 4, "test": 4}
    patches.check_splits(patients, split)
    assert (split == patches.split_patients(patients, labels, 0)).all()
    assert (split != patches.split_patients(patients, labels, 1)).any()
    with pytest.raises(InputError, match="2 patients: training, validation and test need one each"):
        patches.split_patients(np.array(["a", "b"]), labels[:2], 0)


def test_every_split_has_all_classes_where_that_can_be():
    """Three of 20 patients have class b: one in each split."""
    patients = np.repeat([f"p{i:02}" for i in range(20)], 5)
    labels = np.where(np.isin(patients, ["p00", "p07", "p11"]), "b", "a")
    for seed in range(5):
        split = patches.split_patients(patients, labels, seed)
        assert all(set(labels[split == name]) == {"a", "b"} for name in patches.SPLITS)
    labels[patients == "p00"] = "c"  # it cannot be: no error here, evaluate_patches says what is missing
    patches.check_splits(patients, patches.split_patients(patients, labels, 0))


def test_a_patient_in_two_splits_is_an_error(tmp_path):
    names = write_pictures(tmp_path / "a")
    rows = [(name, "x", name[:2], {"p0": "train", "p1": "validation"}.get(name[:2], "test")) for name in names]
    header = ("file", "label", "patient", "split")
    assert patches.read_patches(tmp_path / "a", write_csv(tmp_path / "l.csv", rows, header)).split(5).tolist() == [row[3] for row in rows]
    rows[0] = (names[0], "x", "p0", "test")
    with pytest.raises(InputError, match="patient p0 is in test and train: give each patient one split"):
        patches.read_patches(tmp_path / "a", write_csv(tmp_path / "l.csv", rows, header)).split(5)
    rows[0] = (names[0], "x", "p0", "dev")
    with pytest.raises(InputError, match="split 'dev' is none of train, validation, test"):
        patches.read_patches(tmp_path / "a", write_csv(tmp_path / "l.csv", rows, header)).split(5)


# ------------------------------------------------------------------------------------------------- scores and intervals


@pytest.mark.parametrize("n_classes", [2, 3])
def test_redrawn_scores_are_those_of_scikit_learn_with_weights(n_classes):
    rng = np.random.default_rng(0)
    classes = [f"c{i}" for i in range(n_classes)]
    labels = np.array(classes)[rng.integers(n_classes, size=60)]
    shares = rng.integers(0, 5, size=(60, n_classes)) / 20  # many ties, as kNN has
    weights = rng.integers(0, 3, size=(60, 7))
    accuracy = scores.redrawn_balanced_accuracy(labels, shares, classes, weights)
    area = scores.redrawn_auroc(labels, shares, classes, weights)
    columns = [1] if n_classes == 2 else range(n_classes)
    for r in range(7):
        w = weights[:, r]
        expected = balanced_accuracy_score(labels, np.array(classes)[shares.argmax(1)], sample_weight=w)
        assert accuracy[r] == pytest.approx(expected)
        assert area[r] == pytest.approx(np.mean([roc_auc_score(labels == classes[c], shares[:, c], sample_weight=w) for c in columns]))
    once = np.ones((60, 1), int)
    assert scores.redrawn_auroc(labels, shares, classes, once)[0] == pytest.approx(scores.auroc(labels, shares, classes))
    assert scores.redrawn_balanced_accuracy(labels, shares, classes, once)[0] == pytest.approx(
        scores.balanced_accuracy(labels, shares, classes)
    )


def test_a_redraw_with_one_class_alone_has_no_auroc():
    area = scores.redrawn_auroc(np.array(["a", "b"]), np.array([[0.2, 0.8], [0.4, 0.6]]), ["a", "b"], np.array([[1, 2], [1, 0]]))
    assert area[0] == 0 and np.isnan(area[1])
    assert scores.interval(area) == (0, 0)


def test_redraws_take_as_many_patients_as_there_are_and_repeat():
    drawn = scores.patient_redraws(np.repeat(["a", "b", "c"], 4), redraws=50)
    assert set(drawn) == {"a", "b", "c"} and (sum(drawn.values()) == 3).all()
    again = scores.patient_redraws(np.array(["c", "a", "b"]), redraws=50)
    assert all((drawn[name] == again[name]).all() for name in drawn)


def test_intervals_are_wider_where_patches_of_a_patient_are_alike():
    """What redrawing patches would hide: 200 patches of 10 patients say no more than 10 patches."""
    rng = np.random.default_rng(0)
    right = rng.random(10) < 0.7
    labels, shares = np.array(["a"] * 200), np.repeat(np.where(right[:, None], [[1.0, 0.0]], [[0.0, 1.0]]), 20, axis=0)
    widths = []
    for patients in (np.repeat(np.arange(10), 20), np.arange(200)):
        drawn = scores.patient_redraws(patients)
        weights = np.stack([drawn[p] for p in patients])
        low, high = scores.interval(scores.redrawn_balanced_accuracy(labels, shares, ["a", "b"], weights))
        widths.append(high - low)
    assert widths[0] > 3 * widths[1] > 0


def test_probes_tell_classes_that_lie_apart_and_colour_alone_can():
    rng = np.random.default_rng(0)
    labels = np.array(["a", "b"])[np.arange(80) % 2]
    pixels = rng.integers(0, 120, size=(80, 6, 6, 3)).astype(np.uint8)
    pixels[labels == "b", :, :, 0] += 100
    features = scores.colour_histogram(pixels)
    assert features.shape == (80, 512)
    np.testing.assert_allclose((features**2).sum(1), 1, rtol=1e-5)
    assert scores.knn_balanced_accuracy(features[:60], labels[:60], features[60:], labels[60:]) == 1
    probe = scores.logistic_probe(features[:40], labels[:40], features[40:60], labels[40:60])
    assert scores.auroc(labels[60:], probe.predict_proba(features[60:]), probe.classes_) == 1


# -------------------------------------------------------------------------------------------------------------- shifts


def test_a_stain_shift_changes_the_density_of_each_stain_by_its_factor():
    stains = shifts.STAINS / np.linalg.norm(shifts.STAINS, axis=1, keepdims=True)
    for stain, factor in ((0, 1.25), (1, 0.75)):
        picture = np.rint(255 * 10 ** -(0.5 * stains[stain]))[None, None, None].astype(np.uint8)
        expected = 255 * 10 ** -(0.5 * factor * stains[stain])
        np.testing.assert_allclose(shifts.stain_shift(picture)[0, 0, 0], expected, atol=2)
    white = np.full((1, 2, 2, 3), 255, np.uint8)
    np.testing.assert_array_equal(shifts.stain_shift(white), white)


def test_grey_has_no_colour():
    grey = shifts.grey(np.random.default_rng(0).integers(0, 256, size=(2, 3, 3, 3), dtype=np.uint8))
    assert grey.dtype == np.uint8 and (grey == grey[..., :1]).all()
    assert shifts.grey(np.array([[[[255, 0, 0]]]], np.uint8))[0, 0, 0, 0] == 76
