"""Slide models on made-up bags: one planted patch decides; order, packing and the company of other bags change nothing."""

import csv
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from files.console import InputError
from pathology import evaluate_slides, mil

DIM = 16


def make_bag(rng, positive: bool, n: int) -> tuple[np.ndarray, int]:
    """Noise (n, DIM), and the row of the one patch that makes the bag positive (-1: none)."""
    bag, at = rng.normal(size=(n, DIM)).astype(np.float32), -1
    if positive:
        at = int(rng.integers(n))
        bag[at, :4] += 6
    return bag, at


def model_of(aggregator: str, seed: int = 0) -> mil.Mil:
    torch.manual_seed(seed)
    features = {"model": "m", "fingerprint": "f"}
    config = {"format": 1, "aggregator": aggregator, "dim": DIM, "hidden": 32, "classes": ["a", "b"], "features": features}
    return mil.Mil(config).eval()


@pytest.mark.parametrize("aggregator", mil.AGGREGATORS)
def test_a_bag_has_its_logits_in_any_company_and_order(aggregator):
    model, rng = model_of(aggregator), np.random.default_rng(0)
    bags = [torch.from_numpy(make_bag(rng, False, n)[0]) for n in (1, 7, 300)]
    alone = torch.cat([model(*mil.pack([bag]))[0] for bag in bags])
    together, scores = model(*mil.pack(bags))
    shuffled, _ = model(*mil.pack([bag[torch.randperm(len(bag))] for bag in reversed(bags)]))
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(shuffled.flip(0), alone, rtol=1e-5, atol=1e-5)
    assert (scores is None) == (aggregator != "gated")


@pytest.mark.parametrize("aggregator", mil.AGGREGATORS)
def test_a_bag_of_100_000_patches_goes_through(aggregator):
    logits, _ = model_of(aggregator)(torch.randn(100_001, DIM), torch.tensor([0, 1, 100_001], dtype=torch.int32))
    assert logits.shape == (2, 2) and logits.isfinite().all()


def test_gated_attention_is_the_formula():
    model, bag = model_of("gated"), torch.randn(5, DIM)
    logits, scores = model(*mil.pack([bag]))
    hidden = torch.relu(model.project[0](bag))
    expected = model.score(torch.tanh(model.tanh(hidden)) * torch.sigmoid(model.sigmoid(hidden)))
    torch.testing.assert_close(scores, expected)
    torch.testing.assert_close(logits, model.classify(scores.softmax(0).T @ hidden))


def test_standardizing_counts_patches_alike():
    bags = [torch.randn(3, DIM) * 5 + 2, torch.randn(50, DIM)]
    model = model_of("mean")
    model.standardize_by(iter(bags))
    torch.testing.assert_close(model.mean, torch.cat(bags).mean(0))
    torch.testing.assert_close(model.scale, torch.cat(bags).std(0, correction=0))


def test_a_saved_model_gives_the_same_logits_and_what_is_none_is_refused(tmp_path):
    model, bag = model_of("gated"), torch.randn(5, DIM)
    with pytest.raises(InputError, match="holds no slide model"):
        mil.load_mil(tmp_path)
    mil.save_mil(model, tmp_path)
    loaded = mil.load_mil(tmp_path)
    torch.testing.assert_close(loaded(*mil.pack([bag]))[0], model(*mil.pack([bag]))[0], rtol=0, atol=0)
    assert loaded.config == model.config
    for tensors in ({**model.state_dict(), "mean": torch.full((DIM,), torch.nan)}, {"mean": torch.zeros(DIM)}):
        save_file(tensors, tmp_path / mil.WEIGHTS)
        with pytest.raises(InputError, match=r"model.safetensors is damaged, or does not belong to the config.json beside it"):
            mil.load_mil(tmp_path)
    (tmp_path / mil.WEIGHTS).write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"model.safetensors is damaged"):
        mil.load_mil(tmp_path)
    without = {name: value for name, value in model.config.items() if name != "features"}
    for config in (model.config | {"format": 9}, model.config | {"features": {}}, without, {"model_type": "dinov2"}, []):
        (tmp_path / mil.CONFIG).write_text(json.dumps(config))
        with pytest.raises(InputError, match=r"holds a model of another kind, no slide model by its config.json: make one"):
            mil.load_mil(tmp_path)
    (tmp_path / mil.CONFIG).write_text("{")
    with pytest.raises(InputError, match=r"config.json is damaged: make one with evaluate_slides.py"):
        mil.load_mil(tmp_path)


def test_large_bags_go_through_memory_apart_with_the_same_step(monkeypatch):
    assert mil.groups_of([3, 4, 9, 1, 1], most=8) == [[0, 1], [2], [3, 4]]
    rng = np.random.default_rng(0)
    bags = evaluate_slides.Bags(*[np.array(["x"] * 5)] * 4, evaluate_slides.BagFiles(), {})
    for n in (3, 4, 9, 1, 1):
        bags.features.add(None, make_bag(rng, False, n)[0])
    steps = []
    for most in (8, 100):
        monkeypatch.setattr(mil.groups_of, "__defaults__", (most,))
        model = model_of("gated")
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        evaluate_slides.learn(model, optimizer, bags, np.arange(5), torch.tensor([0, 1, 0, 1, 1]), torch.tensor([0.3, 1.7]))
        steps.append(model.state_dict())
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-5, atol=1e-6)
    assert not torch.equal(steps[0]["classify.weight"], model_of("gated").classify.weight)


def test_the_names_of_aggregators_are_those_of_the_models():
    assert evaluate_slides.AGGREGATORS == mil.AGGREGATORS


# ---------------------------------------------------------------------------------------------------------- the script


def write_cohort(folder, rng, n: int = 60, cohort=lambda i: "", lengths=(5, 60), signal: bool = True) -> dict[str, int]:
    """n slides of n / 2 patients, every other one positive -> the planted patch of each slide."""
    pytest.importorskip("h5py", reason="files of features need h5py (pathology/requirements.txt)")
    from pathology.files import write_features

    folder.mkdir()
    planted, rows = {}, []
    attributes = {"model": "m", "fingerprint": "f", "slide": "s", "mpp": 1.0, "size": 8, "size_level0": 8}
    attributes |= {"width": 9, "height": 9, "mpp_level0": 1.0}
    for i in range(n):
        bag, planted[f"s{i:03}"] = make_bag(rng, signal and i // 2 % 2 == 1, int(rng.integers(*lengths)))
        write_features(folder / f"s{i:03}.h5", bag, np.zeros((len(bag), 2)), attributes)
        rows.append([f"s{i:03}.svs", "tumour" if i // 2 % 2 else "normal", f"p{i // 2}", cohort(i)])
    with open(folder / "labels.csv", "w", newline="") as f:
        csv.writer(f).writerows([["slide", "label", "patient", "cohort"], *([c or "one" for c in row] for row in rows)])
    return planted


def run(*flags) -> None:
    evaluate_slides.main(evaluate_slides.build_parser().parse_args([str(flag) for flag in flags]))


FAST = ("--folds", 3, "--hidden", 32, "--epochs", 25, "--lr", "3e-3")


def test_one_planted_patch_is_learned_and_attention_peaks_there(tmp_path, capsys):
    """AUROC of the folds and of a cohort that was never learned from is near 1, and the planted patch has the highest score."""
    from pathology.files import read_features

    planted = write_cohort(tmp_path / "feats", np.random.default_rng(0), cohort=lambda i: "two" if i >= 44 else "one")
    labels = tmp_path / "feats" / "labels.csv"
    run(tmp_path / "feats", "--labels", labels, "--aggregator", "gated", "--external", "two", *FAST, "--out", tmp_path / "mil")
    result = json.loads((tmp_path / "mil" / "results.json").read_text())
    assert result["scores"]["gated"]["folds"]["auroc"] > 0.97 and result["scores"]["gated"]["two"]["auroc"] > 0.97
    low, high = result["scores"]["gated"]["folds"]["interval"]
    assert low <= result["scores"]["gated"]["folds"]["auroc"] <= high
    folds = {}
    for slide in result["slides"]:
        assert folds.setdefault(slide["patient"], slide["fold"]) == slide["fold"]
        assert (slide["fold"] == -1) == (slide["cohort"] == "two")
    model, peaks = mil.load_mil(tmp_path / "mil"), []
    for slide, at in planted.items():
        if at >= 0:
            _, scores = model(*mil.pack([torch.from_numpy(read_features(tmp_path / "feats" / f"{slide}.h5").features)]))
            peaks.append(scores.argmax().item() == at)
    assert len(peaks) > 20 and np.mean(peaks) > 0.95
    assert "60 slides of 30 patients" in capsys.readouterr().out


def test_without_a_signal_auroc_is_that_of_chance_and_differences_are_paired(tmp_path, capsys):
    rng = np.random.default_rng(1)
    write_cohort(tmp_path / "feats", rng)
    write_cohort(tmp_path / "noise", rng, signal=False)
    labels = tmp_path / "feats" / "labels.csv"
    flags = ("--labels", labels, "--aggregator", "gated", *FAST)
    run(tmp_path / "feats", "--against", tmp_path / "noise", *flags, "--out", tmp_path / "mil")
    score = json.loads((tmp_path / "mil" / "results.json").read_text())["scores"]["gated"]["folds"]
    assert 0.25 < score["difference"] < 0.75 and score["difference_interval"][0] > 0
    run(tmp_path / "feats", "--against", tmp_path / "feats", *flags)
    assert "+0.000 (+0.000 to +0.000)" in capsys.readouterr().out


def test_what_does_not_fit_is_one_clear_line(tmp_path, capsys):
    write_cohort(tmp_path / "feats", np.random.default_rng(0), n=12)
    labels = tmp_path / "feats" / "labels.csv"
    with pytest.raises(InputError, match="class 'normal' has 3 patients in the internal cohorts: fewer than --folds 5"):
        run(tmp_path / "feats", "--labels", labels)
    with pytest.raises(InputError, match="no such cohort"):
        run(tmp_path / "feats", "--labels", labels, "--external", "two")
    with pytest.raises(InputError, match="exists already"):
        run(tmp_path / "feats", "--labels", labels, "--out", tmp_path / "feats")
    with pytest.raises(InputError, match=r"labels\.csv is a file, choose another place"):
        run(tmp_path / "feats", "--labels", labels, "--out", labels / "mil")
    (tmp_path / "feats" / "s000.h5").write_bytes(b"damaged")
    run(tmp_path / "feats", "--labels", labels, "--aggregator", "mean", "--folds", 2, "--epochs", 1)
    err = capsys.readouterr().err
    assert "feats: 1 left out, such as s000" in err and "folds: 6 patients, too few for an interval" in err
    text = labels.read_text().replace("s002.svs,tumour,p1,one", "s002.svs,tumour,p1,two")
    labels.write_text(text)
    with pytest.raises(InputError, match="patient p1 is in an external cohort and in another one"):
        run(tmp_path / "feats", "--labels", labels, "--external", "two")
    assert not list(tmp_path.glob("mil*"))


def test_labels_that_teach_nothing_are_refused_before_training(tmp_path, capsys):
    """One class alone; too few patients to hold one out; slides that only one of labels and features has are counted."""
    write_cohort(tmp_path / "feats", np.random.default_rng(0), n=8)
    labels = tmp_path / "labels.csv"

    def learn(rows: list[tuple[str, str, str]]) -> None:
        labels.write_text("slide,label,patient\n" + "".join(f"{','.join(row)}\n" for row in rows))
        run(tmp_path / "feats", "--labels", labels, "--folds", 2, "--epochs", 1, "--aggregator", "mean", "--out", tmp_path / "mil")

    with pytest.raises(InputError, match="all slides with features have the label 'a': a model needs two classes"):
        learn([(f"s00{i}", "a", f"p{i}") for i in range(8)])
    with pytest.raises(InputError, match="--folds 2: fold 1 leaves one patient a class, none to hold out"):
        learn([(f"s00{i}", "ab"[i % 2], f"p{i}") for i in range(4)])
    assert not (tmp_path / "mil").exists()
    capsys.readouterr()
    learn([(f"s00{i}", "ab"[i % 2], f"p{i}") for i in range(1, 7)] + [("s999", "a", "p9")])
    err = capsys.readouterr().err
    assert f"feats: 2 left out that {labels} does not name, such as s000" in err
    assert f"feats: no features of 1 of 7 slides in {labels}, such as s999" in err


@pytest.mark.parametrize("seed", range(4))
def test_patients_with_slides_of_both_classes_are_not_all_held_out(seed):
    labels, patients = np.array(list("abab")), np.array(["p0", "p0", "p1", "p1"])
    bags = evaluate_slides.Bags(np.arange(4), labels, patients, patients, None, {})
    learned, held_out = evaluate_slides.hold_out(bags, np.arange(4), seed)
    assert len(learned) == len(held_out) == 2


def test_features_that_do_not_fit_together_are_told(tmp_path, capsys):
    write_cohort(tmp_path / "feats", np.random.default_rng(0), n=20)
    import h5py

    def replace(number: int, name: str, change) -> None:
        with h5py.File(tmp_path / f"feats/s00{number}.h5", "r+") as file:
            values = file[name][:]
            del file[name]
            file[name] = change(values)

    flags = (tmp_path / "feats", "--labels", tmp_path / "feats/labels.csv", "--aggregator", "mean", "--folds", 2, "--epochs", 1)
    replace(0, "features", lambda values: np.full(values.shape, b"x"))
    replace(1, "features", lambda values: values[:, :0])
    replace(2, "coords", lambda values: values.astype(float))
    with h5py.File(tmp_path / "feats/s003.h5", "r+") as file:
        del file["features"]
        file.create_group("features")
    run(*flags)
    assert "feats: 4 left out, such as s000" in capsys.readouterr().err
    replace(5, "features", lambda values: values[:, :3])
    with pytest.raises(InputError, match=r"s019.h5 and s005.h5 were made by different models"):
        run(*flags)
    with pytest.raises(InputError, match=r"labels.csv is no file of features: name a folder of features, or one SLIDE.h5"):
        run(tmp_path / "feats/labels.csv", *flags[1:])


@pytest.mark.parametrize("leading", [(), (1,)], ids=["CLAM", "TRIDENT"])
def test_features_of_other_tools_are_told_as_such(tmp_path, leading, capsys):
    """Both write features and coords, the latter with a leading 1, and none of the attributes that tie them to a slide and a model."""
    h5py = pytest.importorskip("h5py", reason="files of features need h5py (pathology/requirements.txt)")

    with h5py.File(tmp_path / "s000.h5", "w") as file:
        file["features"] = np.ones((*leading, 3, 4), np.float32)
        file["coords"] = np.zeros((*leading, 3, 2), np.int64)
        file["coords"].attrs["patch_size_level0"] = 512
    labels = tmp_path / "labels.csv"
    labels.write_text("slide,label,patient\ns000,a,p\n")
    with pytest.raises(InputError, match=r"no slide of .*labels\.csv has features there"):
        run(tmp_path, "--labels", labels)
    assert "s000.h5 was not written by extract.py (it has no attribute model): files of other tools" in capsys.readouterr().err
