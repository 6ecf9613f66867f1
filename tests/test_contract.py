"""The contract's file, and the fingerprint that names contract, base and adapter."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import make_model, make_run, make_tokenizer

from encoder import Contract, Encoder
from encoder.contract import LATER_FIELDS
from files.console import InputError


def test_contract_survives_json_and_refuses_unknown_and_missing_fields(llama):
    contract = Encoder.load(llama, prompt="cluster", layers=(-1, -2)).contract
    assert Contract.from_json(contract.to_json()) == contract
    fields = json.loads(contract.to_json())
    with pytest.raises(InputError, match="unknown fields colour: restore it"):
        Contract.from_json(json.dumps(fields | {"colour": 1}))
    fields.pop("quantize")
    assert Contract.from_json(json.dumps(fields)) == contract  # runs saved before this field existed
    fields.pop("pooling")
    with pytest.raises(InputError, match="missing fields pooling: restore it"):
        Contract.from_json(json.dumps(fields))
    with pytest.raises(InputError, match="not valid JSON"):
        Contract.from_json("{")


@pytest.mark.parametrize(
    "field, value",
    [
        ("pooling", "median"),
        ("scope", "prompt"),
        ("version", 2),
        ("max_tokens", 0),
        ("max_tokens", True),
        ("layers", ()),
        ("layers", None),
        ("attention", "both"),
        ("bos", "yes"),
        ("normalize", 1),
        ("dims", "8"),
        ("data", "x"),
        ("prompts", None),
        ("prompts", {"query": {}}),
        ("quantize", "int3"),
        ("layers", ("0%",)),
        ("layers", ("101%",)),
        ("layers", ("half",)),
        ("attention_layer", 2),  # the pooling is mean
    ],
)
def test_impossible_values_are_refused_by_their_field(field, value):
    text = {"prefix": "", "suffix": ""}
    contract = Contract("base", "sha256:0", {"query": text, "document": text}, True, False, 9, "mean", "text")
    with pytest.raises(InputError, match=field):
        replace(contract, **{field: value})


def test_reading_a_contract_needs_no_torch():
    program = "import sys, encoder.contract; assert not {'torch', 'transformers'} & set(sys.modules), 'torch was imported'"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[1])


def test_a_flag_that_contradicts_a_run_shows_both_values(llama, tmp_path):
    run = make_run(llama, tmp_path / "run", prompt="cluster")
    Encoder.load(run, prompt="cluster", pooling="last")  # says the same
    with pytest.raises(InputError, match=r"pooling is 'last' in the run, 'mean' was asked for.*--override-contract"):
        Encoder.load(run, pooling="mean")
    with pytest.raises(InputError, match=r"^prompt is 'cluster' in the run, 'none' was asked for\. Leave"):
        Encoder.load(run, prompt="none")
    assert Encoder.load(run, pooling="mean", override_contract=True).contract.pooling == "mean"
    with pytest.raises(InputError, match=r"unknown settings \['colour'\]"):
        Encoder.load(run, colour=1)


def test_a_run_may_be_cut_to_the_dims_that_it_was_trained_for(llama, tmp_path):
    run = make_run(llama, tmp_path / "run")
    with pytest.raises(InputError, match=r"dims is None in the run, 16 was asked for.*--override-contract"):
        Encoder.load(run, dims=16)
    (tmp_path / "run" / "arguments.json").write_text('{"arguments": {"matryoshka": [8, 16]}}')
    whole, cut = Encoder.load(run), Encoder.load(run, dims=16)
    expected = whole.encode(["a cat"])[:, :16]
    np.testing.assert_allclose(cut.encode(["a cat"]), expected / np.linalg.norm(expected), atol=1e-6)
    assert cut.fingerprint != whole.fingerprint
    with pytest.raises(InputError, match=r"dims is None in the run \(which was trained for 8, 16 as well\), 12 was asked for"):
        Encoder.load(run, dims=12)
    (tmp_path / "run" / "arguments.json").write_text('{"arguments": {"matryoshka": null}}')
    with pytest.raises(InputError, match="dims is None"):
        Encoder.load(run, dims=16)


def test_a_contract_that_was_changed_after_training_is_noticed(llama, tmp_path):
    run, folder = make_run(llama, tmp_path / "run", prompt="cluster"), tmp_path / "run"
    before = Encoder.load(run)
    assert before.notes == []  # a run that train.py has not made
    (folder / "arguments.json").write_text("{}")
    assert Encoder.load(run).notes == ["the training of this run has not ended: its last checkpoint is taken"]
    (folder / "arguments.json").unlink()
    (folder / "summary.json").write_text(json.dumps({"fingerprint": before.fingerprint}))
    assert Encoder.load(run).notes == Encoder.load(run, pooling="mean", override_contract=True).notes == []
    contract = folder / "embedding.json"
    contract.write_text(contract.read_text().replace("following cluster", "following class"))
    after = Encoder.load(run)
    changed = "embedding.json or the adapter was changed after training"
    assert after.notes == [f"{changed}: fingerprint {after.fingerprint}, summary.json has {before.fingerprint}"]
    assert len(Encoder.load(run, pooling="mean", override_contract=True).notes) == 1
    (folder / "summary.json").write_text("{")  # damaged: it says nothing
    assert Encoder.load(run).notes == []


def test_fingerprint_names_contract_base_and_adapter_and_nothing_else(llama, tmp_path):
    first = Encoder.load(llama, prompt="cluster")
    moved = shutil.copytree(llama, tmp_path / "elsewhere" / "renamed")
    same = [Encoder.load(llama, prompt="cluster", dtype="bfloat16"), Encoder.load(str(moved), prompt="cluster")]
    assert {e.fingerprint for e in same} == {first.fingerprint}
    other_seed = make_model(tmp_path / "seed1" / "llama", "llama", seed=1)
    make_tokenizer("metaspace", bos=True).save_pretrained(tmp_path / "seed1" / "llama")
    others = [
        Encoder.load(llama, prompt="none"),
        Encoder.load(llama, prompt="cluster", pooling="mean"),
        Encoder.load(other_seed, prompt="cluster"),
        Encoder.load(make_run(llama, tmp_path / "a", seed=0, prompt="cluster")),
        Encoder.load(make_run(llama, tmp_path / "b", seed=1, prompt="cluster")),
    ]
    assert len({first.fingerprint} | {e.fingerprint for e in others}) == 6
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 99}))
    assert Encoder.load(str(tmp_path / "a")).fingerprint not in {e.fingerprint for e in others}
    assert Encoder.load(str(tmp_path / "b")).untuned().fingerprint == first.fingerprint


def test_fingerprints_of_the_bundled_model_are_those_that_were_published():
    """README prints them; a run's contract must go on naming the same vectors."""
    assert Encoder.load("tiny").fingerprint == "5eaac07dfdfa2aff"
    assert Encoder.load("tiny", prompt="cluster", pooling="last", scope="all").fingerprint == "68b0fabec87bb8a9"
    assert Encoder.load("tiny", prompt="cluster", pooling="position-mean", scope="text").fingerprint == "893b39797aaf851f"


def test_names_of_poolings_stand_for_fields_of_the_contract(llama):
    eos = Encoder.load(llama, prompt="cluster", pooling="eos")
    assert (eos.contract.pooling, eos.contract.scope, eos.contract.eos) == ("last", "all", True)
    assert eos.fingerprint == Encoder.load(llama, prompt="cluster", pooling="last", scope="all", eos=True).fingerprint
    assert Encoder.load(llama, pooling="first-last").contract.layers == (1, -1)
    assert Encoder.load(llama, pooling="first-last", layers=[1, -1]).contract.pooling == "mean"
    with pytest.raises(InputError, match=r"pooling eos means scope 'all', not 'text': leave one of them out"):
        Encoder.load(llama, pooling="eos", scope="text")


def test_a_run_from_before_a_field_existed_keeps_its_fingerprint(llama, tmp_path):
    run = make_run(llama, tmp_path / "run", prompt="cluster")
    before, path = Encoder.load(run).fingerprint, tmp_path / "run" / "embedding.json"
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name not in LATER_FIELDS}))
    assert Encoder.load(run).fingerprint == before
    settings = {"prompt": "cluster", "pooling": "attention"}
    one, other = (Encoder.load(llama, **settings, attention_layer=layer) for layer in (-1, 1))
    assert one.fingerprint != other.fingerprint


def test_a_share_of_the_depth_is_a_layer(llama):
    """Of three blocks."""
    by_share = [Encoder.load(llama, layers=[f"{share}%"]).encode(["a cat"]) for share in (1, 49, 60, 100)]
    by_number = [Encoder.load(llama, layers=[number]).encode(["a cat"]) for number in (1, 1, 2, 3)]
    np.testing.assert_array_equal(by_share, by_number)
    with pytest.raises(InputError, match="attention_layer 0 is the embeddings, which have no attention"):
        Encoder.load(llama, pooling="attention", attention_layer=0)
    assert Encoder.load(llama, pooling="last+mean").encode(["a cat"]).shape == (1, 64)
    assert Encoder.load(llama, pooling="last+mean", dims=40).encode(["a cat"]).shape == (1, 40)
    with pytest.raises(InputError, match="dims 65 is more than the 64 numbers"):
        Encoder.load(llama, pooling="last+mean", dims=65)
