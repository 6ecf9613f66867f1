"""The mean direction that is taken out of vectors: the arithmetic, the contract, the run's file, evaluate.py's rows, refusals."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import TEXTS, make_run
from safetensors.torch import load_file, save_file
from short_evaluations import (
    labelled,
    offline,  # noqa: F401, a fixture that every test uses
    write_csv,
)
from short_evaluations import run as evaluate
from short_runs import ShortRuns
from short_runs import run as train

from encoder import Contract, Encoder, PoolingConfig
from encoder.contract import LATER_FIELDS, MEAN_FILE, fingerprint
from encoder.mean_direction import mean_directions, project_off
from files.console import InputError
from prompts import get_prompt
from serving.folder import check_expressible

OTHERS = ["A dog ran.", "Rates fell.", "A dog ran.", "What is the question?", "", "The bank closed."]


def normalized(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def test_projection_by_hand():
    direction = torch.tensor([0.6, 0.8])
    torch.testing.assert_close(project_off(torch.tensor([[1.0, 0.0], [0.6, 0.8]]), direction), torch.tensor([[0.64, -0.48], [0.0, 0.0]]))


@pytest.mark.parametrize(
    "settings",
    [
        {"pooling": "mean"},
        {"pooling": "position-mean", "prompt": "cluster", "scope": "all", "dims": 20, "embed_filter": 0.5},
        {"pooling": "last+mean", "prompt": "cluster || classify"},
        {"pooling": "last", "prompt": "retrieve", "token_prepending": (1, 2)},
        {"pooling": "mean", "normalize": False},
    ],
)
def test_vectors_lose_the_direction_of_the_mean_and_are_then_normalized(llama, settings):
    plain = Encoder.load(llama, **settings)
    encoder = plain.remove_mean(OTHERS, "others.csv")
    mean = normalized(plain.encode(OTHERS).astype(np.float64)).mean(0)
    direction = mean / np.linalg.norm(mean)
    for role in ("document", "query"):
        vectors = plain.encode(TEXTS, role).astype(np.float64)
        expected = vectors - np.outer(vectors @ direction, direction)
        expected = expected if settings.get("normalize") is False else normalized(expected)
        together = encoder.encode(TEXTS, role)
        np.testing.assert_allclose(together, expected, atol=1e-5)
        np.testing.assert_allclose(np.concatenate([encoder.encode([text], role) for text in TEXTS]), together, atol=1e-5)
    assert plain.contract.mean_removed is None and np.abs(plain.encode(TEXTS) - encoder.encode(TEXTS)).max() > 1e-2


def test_fingerprints_written_down_before_stay_valid():
    """Of contracts as they were when prompts were one a role, and nothing was prepended or removed."""
    for name, expected in (("cluster", "d2b9fa44c33b75d0"), ("retrieve", "e88aaa5e2d3bc6a2"), ("echo", "2b11bab7fc17951f")):
        contract = Contract("base", "sha256:0", get_prompt(name).roles(), True, False, 384, "mean", "text")
        assert fingerprint(contract, "x", "y") == expected
        values = json.loads(contract.to_json())
        older = {k: v for k, v in values.items() if k not in ("token_prepending", "mean_removed")}
        assert set(values) - set(older) <= set(LATER_FIELDS) and Contract.from_json(json.dumps(older)) == contract


def test_it_is_part_of_the_contract(llama):
    plain = Encoder.load(llama, pooling="mean")
    one, same, other = plain.remove_mean(OTHERS), plain.remove_mean(OTHERS), plain.remove_mean(TEXTS)
    assert one.fingerprint == same.fingerprint and len({plain.fingerprint, one.fingerprint, other.fingerprint}) == 3
    assert Contract.from_json(one.contract.to_json()) == one.contract
    again = one.with_contract(pooling="last")  # the mean was that of other vectors
    assert again.contract.mean_removed is None and again.fingerprint == plain.with_contract(pooling="last").fingerprint
    before = one.encode(TEXTS)
    plain.with_contract(dims=16).remove_mean(OTHERS)  # other vectors have another mean
    np.testing.assert_array_equal(one.encode(TEXTS), before)
    for wrong in (lambda: Encoder.load(llama, mean_removed={"name": "a", "sha256": "b"}), lambda: plain.with_contract(mean_removed="a")):
        with pytest.raises(InputError, match=r"unknown settings \['mean_removed'\]|mean_removed must be name and sha256"):
            wrong()


def test_poolings_share_forward_passes(llama, monkeypatch):
    encoder, calls, forward = Encoder.load(llama), [], Encoder.forward
    monkeypatch.setattr(Encoder, "forward", lambda self, *a: calls.append(1) or forward(self, *a))
    directions = mean_directions(encoder, OTHERS, [PoolingConfig("mean", "text"), PoolingConfig("last", "all", (1,))])
    assert len(calls) == 1 and len(directions) == 2
    for pooling, direction in directions.items():
        mean = normalized(encoder.encode(OTHERS, poolings=[pooling])[0]).mean(0)
        np.testing.assert_allclose(direction, mean / np.linalg.norm(mean), atol=1e-5)


# --------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture
def without_mean(llama, tmp_path) -> Encoder:
    """A run, loaded, whose mean is removed, and which is saved in tmp_path / "less"."""
    encoder = Encoder.load(make_run(llama, tmp_path / "run", prompt="cluster", pooling="mean")).remove_mean(OTHERS, "others.csv")
    encoder.save(tmp_path / "less")
    return encoder


def test_a_finished_run_keeps_its_direction(without_mean, tmp_path):
    again = Encoder.load(str(tmp_path / "less"))
    np.testing.assert_array_equal(again.encode(TEXTS), without_mean.encode(TEXTS))
    assert again.fingerprint == without_mean.fingerprint and again.contract.mean_removed["name"] == "others.csv"
    assert again.merge() < 1e-5 and again.notes == []
    assert again.nearest(["a dog"], OTHERS, 1).numbers.shape == (1, 1)
    base = again.with_contract()  # the run as it was
    np.testing.assert_allclose(base.encode(TEXTS), Encoder.load(str(tmp_path / "run")).encode(TEXTS), atol=1e-5)
    assert Encoder.load(str(tmp_path / "less")).untuned().contract.mean_removed is None


def test_another_direction_is_another_fingerprint(without_mean, tmp_path):
    save_file({"direction": torch.nn.functional.normalize(torch.ones(32), dim=0)}, tmp_path / "less" / MEAN_FILE)
    assert Encoder.load(str(tmp_path / "less")).fingerprint != without_mean.fingerprint


@pytest.mark.parametrize("damage", ["missing", "cut", "renamed", "shorter", "longer", "nan"])
def test_a_damaged_direction_is_refused(without_mean, tmp_path, damage):
    path = tmp_path / "less" / MEAN_FILE
    direction = load_file(path)["direction"]
    changed = {
        "renamed": {"mean": direction},
        "shorter": {"direction": direction[:16].contiguous()},
        "longer": {"direction": 2 * direction},
        "nan": {"direction": direction * torch.nan},
    }
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:50])
    else:
        save_file(changed[damage], path)
    with pytest.raises(InputError, match=r"mean\.safetensors is (missing or damaged|damaged: it holds no unit vector of 32 numbers)"):
        Encoder.load(str(tmp_path / "less"))


def test_what_cannot_be_is_refused(without_mean, llama, tmp_path):
    run = str(tmp_path / "less")
    with pytest.raises(InputError, match=r"less: the mean that it removes is that of its vectors as they are: let its contract be"):
        Encoder.load(run, pooling="last", override_contract=True)
    with pytest.raises(InputError, match=r"the mean of others\.csv is removed already: load the run that it was made from"):
        Encoder.load(run).remove_mean(TEXTS)
    with pytest.raises(InputError, match="mean_removed belongs to a finished run: train on the run that it was made from"):
        train("--model", run, "--pairs", ShortRuns(run, tmp_path).pairs, "--out", tmp_path / "on")
    assert not (tmp_path / "on").exists()
    with pytest.raises(InputError, match="run holds a run already, which it would no longer be: name a new folder"):
        without_mean.save(str(tmp_path / "run"))
    base = Encoder.load(llama)
    with pytest.raises(InputError, match="an untuned base has no adapter to save"):
        base.remove_mean(OTHERS).save(tmp_path / "base")
    for texts, message in (
        (["a", "a"], "a mean needs two different texts or more, and 1 was given"),
        ([], "and 0 was given"),
        ("a text", "put a single text in brackets"),
        (["a", 3], "text 1 is int 3, not a string"),
    ):
        with pytest.raises(InputError, match=message):
            base.remove_mean(texts)
    for runtime in ("sentence-transformers", "vllm", "tei", "onnx", "gguf"):
        with pytest.raises(InputError, match=f"^{runtime} cannot serve vectors whose mean is removed"):
            check_expressible(without_mean.contract, runtime)


def test_a_mean_without_a_direction_is_refused(llama, monkeypatch):
    def opposites(self, texts, **_):
        yield [np.array([[1.0, 0.0], [-1.0, 0.0]], dtype=np.float32)]

    monkeypatch.setattr(Encoder, "stream", opposites)
    monkeypatch.setattr(Encoder, "width_of", lambda self, pooling: 2)
    with pytest.raises(InputError, match="the mean of these texts' vectors is zero"):
        Encoder.load(llama).remove_mean(["a", "b"])


# -------------------------------------------------------------------------------------------------------- evaluate.py


def rows_of(path) -> dict[str, dict]:
    return {cell["model"]: cell for cell in json.loads(path.read_text())["results"]}


def test_a_row_beside_every_row(llama, tmp_path, capsys):
    texts = write_csv(tmp_path / "others.csv", "text,label", [(f"{text} {i}", "secret") for i in range(40) for text in OTHERS if text])
    run = make_run(llama, tmp_path / "run", prompt="cluster", pooling="mean")
    flags = ("--pooling", "mean", "last", "--prompt", "cluster", "--token-prepending", "none", "1..2", "--remove-mean", texts)
    evaluate("--model", llama, run, "--data", labelled(tmp_path / "mine.csv"), *flags, "--out", tmp_path / "r.json")
    assert "others.csv: 200 texts in column 'text' (guessed); their mean is removed" in capsys.readouterr().err
    found = rows_of(tmp_path / "r.json")
    removed = ", mean of others.csv removed"
    plain = ["llama, cluster, mean, text", "llama, cluster, last, all"]
    prepended = [f"{label}, token prepending 1..2" for label in plain]
    assert list(found) == [*plain, *(x + removed for x in plain), *prepended, *(x + removed for x in prepended), run, run + removed]
    given = [line.split(",")[0] for line in texts.read_text().splitlines()[1:]]
    for label, encoder in (
        (plain[0] + removed, Encoder.load(llama, prompt="cluster", pooling="mean")),
        (prepended[1] + removed, Encoder.load(llama, prompt="cluster", pooling="last", token_prepending=(1, 2))),
        (run + removed, Encoder.load(run)),
    ):
        assert encoder.remove_mean(given, "others.csv").fingerprint == found[label]["fingerprint"]
        assert found[label]["contract"]["mean_removed"]["name"] == "others.csv"


def test_rows_hold_the_vectors_of_the_encoder(llama, tmp_path):
    from short_evaluations import parse

    from evaluation import rows
    from evaluation.sweep import spread

    args = parse("--pooling", "mean", "max", "--remove-mean", tmp_path / "others.csv")
    spread(args)
    args.mean_texts = "others.csv", OTHERS
    made = rows.base_rows(llama, "cluster", args)
    for row, pooling in zip(made[2:], ("mean", "max"), strict=True):
        expected = Encoder.load(llama, prompt="cluster", pooling=pooling).remove_mean(OTHERS, "others.csv")
        np.testing.assert_allclose(row.encode([{"text": TEXTS}]), expected.encode(TEXTS), atol=1e-5)
        assert row.fingerprint == expected.fingerprint


def test_bad_input_is_one_line(without_mean, llama, tmp_path, capsys):
    data = labelled(tmp_path / "mine.csv")
    with pytest.raises(InputError, match=r"less is without the mean of others\.csv already: leave it or --remove-mean out"):
        evaluate("--model", tmp_path / "less", "--data", data, "--remove-mean", data)
    with pytest.raises(InputError, match=r"nowhere\.csv"):
        evaluate("--model", llama, "--data", data, "--remove-mean", tmp_path / "nowhere.csv")
    with pytest.raises(InputError, match=r"others\.csv: no column that is plainly the text; it has a, b: name one with --column"):
        evaluate("--model", llama, "--data", data, "--remove-mean", write_csv(tmp_path / "others.csv", "a,b", [("x y", "z w")] * 3))
    with pytest.raises(InputError, match=r"token_prepending is None in the run, \(1, 2\) was asked for"):
        evaluate("--model", tmp_path / "run", "--data", data, "--token-prepending", "1..2")
    with pytest.raises(InputError, match=r"'one': take layers such as 1\.\.20%, or none"):
        evaluate("--model", llama, "--data", data, "--token-prepending", "one")
    with pytest.raises(InputError, match=r"same\.csv holds one text over and over: a mean needs different ones"):
        evaluate("--model", llama, "--data", data, "--remove-mean", write_csv(tmp_path / "same.csv", "text", [("a",)] * 3))
    few = write_csv(tmp_path / "few.csv", "a,b", [(text, "c") for text in OTHERS if text])
    evaluate("--model", tmp_path / "run", "--data", data, "--remove-mean", few, "--column", "a")
    assert "the mean of 5 texts says as much of them as of the model" in capsys.readouterr().err


def test_a_run_without_its_mean_stands_beside_its_base(without_mean, tmp_path):
    data = labelled(tmp_path / "mine.csv", 90)
    shutil.copytree(tmp_path / "less", tmp_path / "runs" / "less")  # where the newest run is looked for
    evaluate("--data", data, "--out", tmp_path / "r.json")
    labels = list(rows_of(tmp_path / "r.json"))
    assert labels[0] == "llama, untuned, same contract, mean kept" and labels[1].endswith("less")
