"""From a name to a model in memory: presets, folders, runs, the hub's cache; and what is refused."""

import hashlib
import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
import transformers.core_model_loading
from conftest import ARCHITECTURES, TEXTS, make_model, make_run, randomize_adapter
from safetensors.torch import load_file, save_file
from transformers import BartConfig, BertConfig, ModernBertConfig

from encoder import Encoder, base_models
from encoder.base_models import PRESETS, check_base, load_pretrained
from files.console import InputError


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(base_models, "hub_answers", lambda: False)


def test_a_run_loads_as_it_was_saved(model, tmp_path):
    encoder = Encoder.load(model, prompt="cluster", pooling="attention", scope="text", max_tokens=9)
    base = encoder.encode(TEXTS)
    encoder.add_adapter(4)
    randomize_adapter(encoder)
    encoder.save(tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["adapter_config.json", "adapter_model.safetensors", "embedding.json"]
    again = Encoder.load(str(tmp_path / "run"))
    assert again.contract == encoder.contract and again.fingerprint == encoder.fingerprint
    np.testing.assert_allclose(again.encode(TEXTS), encoder.encode(TEXTS), atol=1e-6)
    assert np.abs(again.encode(TEXTS) - base).max() > 1e-2
    np.testing.assert_allclose(again.untuned().encode(TEXTS), base, atol=1e-6)
    assert np.abs(again.encode(TEXTS) - base).max() > 1e-2  # reading the base left the adapter on


def test_a_base_folder_may_have_the_name_of_a_preset(llama, tmp_path):
    for name in ("tiny", "qwen3-0.6b"):
        base = shutil.copytree(llama, tmp_path / name)
        run = make_run(str(base), tmp_path / "runs" / name)
        np.testing.assert_allclose(Encoder.load(run).untuned().encode(TEXTS), Encoder.load(llama).encode(TEXTS), atol=1e-6)


def test_a_run_with_the_name_of_a_preset_does_not_hide_the_preset(llama, tmp_path, monkeypatch):
    make_run(llama, tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    assert Encoder.load("tiny").peft is None and Encoder.load("./tiny").peft is not None


def test_presets_name_supported_classes():
    """Each preset's architecture is one that these tests run, by what the hub says of it (config.model_type)."""
    known = {"tiny": "llama", "smollm2-135m": "llama", "pythia-160m": "gpt-neox", "qwen3-0.6b": "qwen3", "gemma-3-1b": "gemma3"}
    known |= {"llama-3.2-1b": "llama", "qwen3-4b": "qwen3", "mistral-7b": "mistral"}
    assert set(known) == set(PRESETS)
    assert set(known.values()) <= set(ARCHITECTURES)


def test_a_model_in_the_hub_cache_loads_without_network(llama, tmp_path, offline, monkeypatch):
    """The cache's own layout: files named by hash under blobs/, links to them in the snapshot of a commit."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    home = tmp_path / "hub" / "models--org--llama"
    snapshot = home / "snapshots" / commit
    for folder in (snapshot, home / "blobs", home / "refs"):
        folder.mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    for file in Path(llama).iterdir():
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, home / "blobs" / digest)
        (snapshot / file.name).symlink_to(home / "blobs" / digest)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    check_base("org/llama", trust_remote_code=False)
    encoder = Encoder.load("org/llama", prompt="cluster")
    assert (encoder.contract.base, encoder.contract.revision) == ("org/llama", commit)
    encoder.add_adapter(2)
    encoder.save(tmp_path / "run")
    again = Encoder.load(str(tmp_path / "run"))
    assert (again.contract.base, again.contract.revision) == ("org/llama", commit) and again.fingerprint == encoder.fingerprint
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/llama", commit)


# ----------------------------------------------------------------------------------------------------- what is refused


def test_what_is_no_decoder_is_refused(llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "other")
    for config in (ModernBertConfig(), BertConfig(is_decoder=True), BartConfig()):
        config.save_pretrained(folder)
        for load in (Encoder.load, lambda spec: check_base(spec, False)):
            with pytest.raises(InputError, match=f"of type '{config.model_type}', no decoder"):
                load(str(folder))


def test_a_base_trained_to_read_in_both_directions_is_refused(models_dir, tmp_path):
    folder = shutil.copytree(models_dir["gemma3"], tmp_path / "both")
    config = json.loads((folder / "config.json").read_text())
    for setting in ({"use_bidirectional_attention": True}, {"is_causal": False}):
        (folder / "config.json").write_text(json.dumps(config | setting))
        with pytest.raises(InputError, match="trained to read in both directions"):
            Encoder.load(str(folder))


def test_damaged_or_changed_runs_are_refused(llama, tmp_path):
    base = shutil.copytree(llama, tmp_path / "base")
    run = tmp_path / "run"
    make_run(str(base), run)
    make_model(base, "llama", seed=5)
    with pytest.raises(InputError, match="bring the old weights back"):
        Encoder.load(str(run))
    shutil.rmtree(base)
    with pytest.raises(InputError, match="is no longer there"):
        Encoder.load(str(run))
    shutil.copytree(llama, base)
    weights = (run / "adapter_model.safetensors").read_bytes()
    (run / "adapter_model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(InputError, match="damaged or does not fit"):
        Encoder.load(str(run))
    (run / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no adapter_model\.safetensors"):
        Encoder.load(str(run))


@pytest.mark.parametrize("spec", ["no-such-model", "./no/such/folder", "/no/such/folder", "org/no-such-model"])
def test_a_model_that_is_neither_here_nor_reachable(spec, offline):
    with pytest.raises(InputError, match=r"no model|cannot load"):
        Encoder.load(spec)


def test_a_folder_that_is_missing_is_said_before_the_hub(offline, tmp_path, monkeypatch):
    """`runs/demo` may be a hub id as well. A preset's name is no folder."""
    monkeypatch.chdir(tmp_path)  # where no demo has run
    with pytest.raises(InputError, match=r"^cannot load 'runs/demo': there is no such folder here, and .* the hub does not answer"):
        Encoder.load("runs/demo")
    with pytest.raises(InputError, match=r"^cannot load 'Qwen/Qwen3-0.6B': it is not in this machine's cache"):
        check_base("qwen3-0.6b", trust_remote_code=False)


def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(InputError, match=r"neither embedding\.json"):
        Encoder.load(str(tmp_path))


def test_a_model_with_missing_weights_is_not_filled_with_random_ones(llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    removed = weights.pop("model.layers.1.self_attn.k_proj.weight")
    assert removed.dim() == 2
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"no weights for \['layers\.1\.self_attn\.k_proj\.weight'\]"):
        Encoder.load(str(folder))
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match="does not hold a whole model"):
        Encoder.load(str(folder))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": "three"}))
    with pytest.raises(InputError, match="does not hold a whole model"):
        Encoder.load(str(folder))


def test_weights_go_straight_to_the_device(llama):
    """Not by way of the CPU's memory, of which a machine with a large GPU may have little."""
    model, _ = load_pretrained(Path(llama), False, torch.bfloat16, torch.device("meta"), "causal", None)
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}


def test_weights_of_the_type_asked_for_are_mapped_from_the_file(llama):
    """So the processes of a machine share one copy of them."""
    model, _ = load_pretrained(Path(llama), False, torch.float32, torch.device("cpu"), "causal", None)
    mapped = {line.split("-")[0] for line in Path("/proc/self/maps").read_text().splitlines() if f"{llama}/model.safetensors" in line}
    starts = sorted(int(start, 16) for start in mapped)
    assert starts and all(starts[0] <= weight.data_ptr() < starts[-1] + 2**21 for weight in model.parameters())


def test_a_model_that_does_not_fit_into_memory_is_one_line_that_says_what_to_take(llama, monkeypatch):
    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(transformers.core_model_loading, "_materialize_copy", out_of_memory)
    with pytest.raises(InputError, match="llama does not fit into the memory of cpu: take --quantize nf4, or a smaller model"):
        Encoder.load(llama)


# --------------------------------------------------------------------------------------------------------- the network


def test_the_hub_is_asked_once_and_not_for_long(monkeypatch):
    """A network that swallows packets: the answer is no after the limit, and is remembered."""
    import threading

    never, attempts = threading.Event(), []

    def swallow(*_, **__):
        attempts.append(1)
        never.wait()
        raise OSError

    monkeypatch.setattr(base_models.socket, "create_connection", swallow)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    base_models.hub_answers.cache_clear()
    assert not base_models.hub_answers(0.05) and not base_models.hub_answers(0.05)
    assert len(attempts) == 1
    never.set()
    base_models.hub_answers.cache_clear()


def test_going_offline_takes_effect_on_libraries_that_are_imported_already(monkeypatch):
    import datasets.config

    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "0")  # restored after the test
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    assert not huggingface_hub.is_offline_mode()
    base_models.go_offline()
    assert huggingface_hub.is_offline_mode() and datasets.config.HF_HUB_OFFLINE
