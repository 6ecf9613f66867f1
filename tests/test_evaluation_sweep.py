"""The grid of `--sweep`: its axes, its rows from shared forward passes, and how it goes on after an interruption."""

import argparse
import json
import re

import numpy as np
import pytest
from conftest import make_run
from short_evaluations import (
    labelled,
    offline,  # noqa: F401, a fixture that every test uses
    parse,
    run,
)

from encoder import Encoder, runtime
from evaluation import rows, scores
from evaluation.finished import FinishedCells
from evaluation.sweep import axis, spread
from files.console import InputError

SWEEP = ("--sweep", "prompt=none,cluster", "pooling=mean,last,eos,first-last,max,last+mean", "layers=-1,60%,-2..-3")


def test_axes_and_their_values():
    assert axis("layers=-1,80%,-2..-4,0..1") == ("layers", [-1, "80%", -2, -3, -4, 0, 1])
    assert axis("pooling=mean,eos") == ("pooling", ["mean", "eos"])
    for text, message in (
        ("depth=1", "'depth=1' is not one of prompt=VALUES, pooling=VALUES"),
        ("pooling=", "is not one of"),
        ("pooling=mean,median", "pooling 'median': take of mean, last"),
        ("layers=-1,200%", "^200% is no share of the depth: take 1% to 100%"),
        ("layers=last", "layers 'last': take numbers, shares such as 80%, or A..B"),
    ):
        with pytest.raises(argparse.ArgumentTypeError, match=message):
            axis(text)


def test_an_axis_stands_in_one_place(llama):
    for flags in (("pooling=mean", "pooling=last"), ("pooling=mean", "--pooling", "last"), ("layers=1", "--layers", "1")):
        with pytest.raises(InputError, match=f"--sweep {flags[0].partition('=')[0]} is given twice, or beside --"):
            run("--model", llama, "--bundled", "--sweep", *flags)
    with pytest.raises(InputError, match="pooling 'median': take of mean"):
        parse("--sweep", "pooling=median")


def test_what_would_change_nothing_is_refused(llama, tmp_path):
    source = make_run(llama, tmp_path / "run", prompt="cluster")
    with pytest.raises(InputError, match="--sweep layers is a grid of untuned bases, and every --model is a run"):
        run("--model", source, "--bundled", "--sweep", "layers=1,2")
    with pytest.raises(InputError, match="--attention-layer works with --pooling attention"):
        run("--model", llama, "--bundled", "--attention-layer", 1)
    for flags, message in (
        (("--pooling", "first-last", "--layers", "2"), "--pooling first-last has its own layers: leave --layers out"),
        (("--sweep", "pooling=first-last", "layers=1,2"), "--pooling first-last has its own layers"),
        (("--pooling", "eos", "--scope", "text"), "--pooling eos has --scope all: leave --scope out"),
    ):
        with pytest.raises(InputError, match=message):
            run("--model", llama, "--bundled", *flags)
    with pytest.raises(InputError, match="eos is False in the run, True was asked for"):
        run("--model", source, "--bundled", "--pooling", "eos")


def test_what_is_given_twice_is_scored_once(llama, tmp_path):
    args = parse("--model", llama, llama, "--sweep", "prompt=none,cluster,none", "token-prepending=1,none,1")
    spread(args)
    assert (args.model, args.prompt, args.token_prepending, args.task) == ([llama], ["none", "cluster"], [(1, 1), None], None)


def test_rows_of_a_grid_are_those_of_single_calls(llama):
    args = parse(*SWEEP)
    spread(args)
    made = [row for prompt in args.prompt for ending in (None, "eos") for row in rows.base_rows(llama, prompt, args, ending)]
    texts = ["The cat sat.", "a", "rates rose again"]
    by_label = {row.label: row.encode([{"text": texts}]) for row in made}
    assert len(by_label) == len(made) == 2 * (4 * 4 + 1 + 4)
    for label, settings in (
        ("llama, none, mean, layer -2", {"layers": [-2]}),
        ("llama, none, max, layer 60%", {"pooling": "max", "layers": ["60%"]}),
        ("llama, cluster, first-last, text", {"prompt": "cluster", "pooling": "first-last"}),
        ("llama, cluster, eos, all", {"prompt": "cluster", "pooling": "eos"}),
        ("llama, cluster, eos, all, layer -3", {"prompt": "cluster", "pooling": "eos", "layers": [-3]}),
        ("llama, cluster, last+mean, all", {"prompt": "cluster", "pooling": "last+mean"}),
    ):
        alone = Encoder.load(llama, **settings)
        vectors = alone.encode(texts)
        expected = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        np.testing.assert_allclose(by_label[label], expected, atol=1e-5, err_msg=label)
        assert alone.fingerprint == next(row.fingerprint for row in made if row.label == label)


def test_flags_that_change_vectors_are_in_the_label(llama):
    args = parse("--pooling", "attention", "mean", "--attention-layer", 1, "--embed-filter", 0.5)
    spread(args)
    made = rows.base_rows(llama, "none", args)
    assert [row.label for row in made] == [
        "llama, none, attention, attention of layer 1, embed filter 0.5",
        "llama, none, mean, embed filter 0.5",
    ]
    alone = Encoder.load(llama, pooling="attention", attention_layer=1, embed_filter=0.5)
    assert made[0].fingerprint == alone.fingerprint
    np.testing.assert_allclose(made[0].encode([{"text": ["a cat"]}]), alone.encode(["a cat"]), atol=1e-5)


def test_one_forward_pass_gives_every_pooling_and_layer_of_a_prompt(llama, tmp_path, monkeypatch):
    calls, stream = [], Encoder.stream
    monkeypatch.setattr(Encoder, "stream", lambda self, texts, *a, **k: calls.append(len(k["poolings"])) or stream(self, texts, *a, **k))
    path = labelled(tmp_path / "mine.csv")
    run("--data", path, "--model", llama, "--sweep", "prompt=none,cluster", "pooling=mean,last,max", "layers=-1,1..2")
    assert calls == [9, 9]


def test_vectors_go_to_disk_where_memory_is_short(llama, monkeypatch, capsys):
    args = parse("--prompt", "cluster", "--pooling", "mean", "last+mean")
    spread(args)
    texts = ["The cat sat.", "a", "rates rose again"]
    in_memory = [row.encode([{"text": texts}]) for row in rows.base_rows(llama, "cluster", args)]
    monkeypatch.setattr(runtime, "free_memory", lambda device: 1)
    made = rows.base_rows(llama, "cluster", args)
    on_disk = [row.encode([{"text": texts}]) for row in made]
    assert "GiB of vectors go to" in capsys.readouterr().err
    for a, b in zip(in_memory, on_disk, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture
def interrupt(monkeypatch):
    """Interrupts the scoring of the n-th cell -> the labels of the rows whose cells were begun."""

    def at(n: int) -> list[str]:
        begun, score = [], scores.score

        def failing(task, model, *more):
            begun.append(model.label)
            if len(begun) == n:
                raise KeyboardInterrupt
            return score(task, model, *more)

        monkeypatch.setattr(scores, "score", failing)
        return begun

    return at


def test_an_interrupted_grid_goes_on_and_ends_the_same(llama, tmp_path, capsys, interrupt):
    path, flags = labelled(tmp_path / "mine.csv"), ("--model", llama, "--sweep", "prompt=none,cluster", "pooling=mean,max")
    run("--data", path, *flags, "--out", tmp_path / "whole.json")
    whole, begun = capsys.readouterr().out, interrupt(3)
    with pytest.raises(KeyboardInterrupt):
        run("--data", path, *flags, "--out", tmp_path / "r.json")
    partial = tmp_path / "r.json.partial"
    assert len(partial.read_text().splitlines()) == 2 and "the same command goes on" in capsys.readouterr().out
    with open(partial, "a") as f:
        f.write('{"cell": {"task"')  # killed while it wrote
    run("--data", path, *flags, "--out", tmp_path / "r.json")
    assert begun[3:] == ["llama, cluster, mean, text", "llama, cluster, max, text"]
    outputs = [re.sub("time by task.*", "", text) for text in (whole, capsys.readouterr().out.replace("r.json", "whole.json"))]
    assert outputs[0] == outputs[1] and "v-measure" in outputs[0] and not partial.exists()
    results = [json.loads((tmp_path / name).read_text()) for name in ("whole.json", "r.json")]
    for result in results:
        for cell in result["results"]:
            del cell["seconds"], cell["texts"], cell["texts_per_second"]
    assert results[0] == results[1]


def test_a_cell_of_other_data_is_computed_again(llama, tmp_path, interrupt):
    path, flags = labelled(tmp_path / "mine.csv"), ("--model", llama, "--prompt", "none", "cluster", "--out", tmp_path / "r.json")
    begun = interrupt(2)
    with pytest.raises(KeyboardInterrupt):
        run("--data", path, *flags)
    labelled(path, 90)
    run("--data", path, *flags)
    assert len(begun) == 4
    assert {cell["rests_on"] for cell in json.loads((tmp_path / "r.json").read_text())["results"]} == {"90 texts"}


@pytest.mark.parametrize("text", ["", "{", '{"cell": {"task": "mi'])
def test_a_job_killed_in_its_first_line_begins_again(tmp_path, text):
    path = tmp_path / "r.json.partial"
    path.write_text(text)
    assert FinishedCells(path).known == {} and path.read_text() == ""


@pytest.mark.parametrize("text", ["mine", "{}\n", '{"results": []}', "a\nb"])
def test_a_file_that_holds_something_else_is_left_alone(tmp_path, text):
    path = tmp_path / "r.json.partial"
    path.write_text(text)
    with pytest.raises(InputError, match=r"r\.json\.partial exists already and holds no cells of a table: move it away"):
        FinishedCells(path)
    assert path.read_text() == text
