import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, TEXTS, make_model, make_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, ModernBertConfig

from encoder import POOLINGS, PRESETS, SCOPES, Contract, Encoder, View
from prompts import InputError

VIEWS = [View(p, s, layers) for p in POOLINGS for s in SCOPES for layers in ((-1,), (2,), (0, -2))]


def plain(model: str, encoder: Encoder, text: str, view: View) -> np.ndarray:
    """One text, no padding, eager attention, the pooling written out: what `encode` must equal."""
    lm = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").eval()
    tokens = encoder.tokenise([text])
    ids, (start, end) = tokens.ids[0], tokens.text[0]
    raw = {}
    blocks = lm.base_model.layers
    for i, block in enumerate(blocks):
        block.register_forward_hook(lambda _, __, out, i=i: raw.__setitem__(i + 1, out[0] if isinstance(out, tuple) else out))
    blocks[0].register_forward_pre_hook(lambda _, args: raw.__setitem__(0, args[0]))
    with torch.no_grad():
        out = lm.base_model(torch.tensor([ids]), output_attentions=True)
    raw[-1], raw[-2] = out.last_hidden_state, raw[len(blocks) - 1]
    x = torch.stack([raw[i][0] for i in view.layers]).double().mean(0)
    bos = int(encoder.contract.bos)
    chosen = list(range(start, end)) if view.scope == "text" and end > start else list(range(bos, len(ids))) or [0]
    if view.pooling == "mean":
        y = x[chosen].mean(0)
    elif view.pooling == "position-mean":
        w = torch.arange(1, len(chosen) + 1).double()
        y = (w[:, None] * x[chosen]).sum(0) / w.sum()
    elif view.pooling == "last":
        y = x[chosen[-1]]
    elif view.pooling == "query":
        y = (x[chosen] @ encoder.query[0].double() / x.shape[1] ** 0.5).softmax(0) @ x[chosen]
    else:
        w = out.attentions[-1][0, :, -1, chosen].double()  # (H, n)
        y = (w / w.sum(1, keepdim=True)).mean(0) @ x[chosen]
    return (y / y.norm()).numpy()


def test_every_reading_equals_a_plain_forward_pass(model):
    encoder = Encoder.load(model, prompt="cluster", dtype="float32")
    encoder.query.data.normal_(generator=torch.Generator().manual_seed(0))
    found = encoder.encode(TEXTS[:3], views=VIEWS)
    for view, vectors in zip(VIEWS, found, strict=True):
        for text, vector in zip(TEXTS, vectors, strict=False):
            np.testing.assert_allclose(vector, plain(model, encoder, text, view), atol=1e-5, err_msg=f"{view}, {text!r}")


def test_sliding_windows_reach_the_attention_pooling(models_dir):
    """A last layer that sees 12 tokens gives nothing to what lies further back."""
    for name, expected in (("mistral", True), ("gemma3", True), ("llama", False)):
        encoder = Encoder.load(models_dir[name], dtype="float32")
        batch = encoder.collate(encoder.tokenise([TEXTS[2]]), [0])
        states = encoder.run(batch, [View("attention")])
        scores = states.attention.scores(*batch.locate(np.zeros_like(batch.lengths), batch.lengths))
        assert len(scores) > 14
        assert bool(scores[:-12].isneginf().all()) == expected, name


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_a_vector_does_not_depend_on_its_batch(model, attention):
    """Alone, in a batch, with any neighbours, in any order: the same to 1e-5."""
    encoder = Encoder.load(model, prompt="cluster", attention=attention)
    encoder.query.data.normal_(generator=torch.Generator().manual_seed(0))
    views = [View(p, s) for p in POOLINGS for s in SCOPES]
    alone = [np.concatenate(arrays) for arrays in zip(*(encoder.encode([t], views=views) for t in TEXTS), strict=True)]
    for order in (range(len(TEXTS)), reversed(range(len(TEXTS)))):
        order = list(order)
        for budget in (4096, 40):
            together = encoder.encode([TEXTS[i] for i in order], views=views, batch_tokens=budget)
            for view, a, b in zip(views, alone, together, strict=True):
                np.testing.assert_allclose(b, a[order], atol=1e-5, err_msg=f"{view} {budget}")


def test_bidirectional_attention_changes_the_vectors(model):
    causal, both = (Encoder.load(model, attention=a, bos=False).encode(TEXTS[:3]) for a in ("causal", "bidirectional"))
    assert np.abs(causal[2] - both[2]).max() > 1e-3
    np.testing.assert_allclose(causal[1], both[1], atol=1e-5)  # a single token has nothing else to see


def test_bidirectional_vectors_are_those_that_transformers_gives(model):
    """With config.is_causal off, by its own masks, sliding windows included."""
    encoder = Encoder.load(model, attention="bidirectional", pooling="mean", scope="all")
    lm = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").eval()
    lm.base_model.config.is_causal = False
    ids = torch.tensor(encoder.tokenise([TEXTS[2]]).ids)
    with torch.no_grad():
        states = lm.base_model(ids).last_hidden_state[0]
    expected = states[int(encoder.contract.bos) :].mean(0)
    found = encoder.encode([TEXTS[2], TEXTS[0], ""])[0]  # beside shorter ones
    np.testing.assert_allclose(found, (expected / expected.norm()).numpy(), atol=1e-5)


def test_a_base_that_reads_both_ways_by_itself_is_refused(models_dir, tmp_path):
    folder = shutil.copytree(models_dir["gemma3"], tmp_path / "both")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"use_bidirectional_attention": True}))
    with pytest.raises(InputError, match="trained to read in both directions"):
        Encoder.load(str(folder))


def test_bfloat16_stays_close():
    reference = Encoder.load("tiny", prompt="cluster").encode(TEXTS)
    rounded = Encoder.load("tiny", prompt="cluster", dtype="bfloat16").encode(TEXTS)
    assert rounded.dtype == np.float32
    assert (reference * rounded).sum(1).min() > 0.995


# ----------------------------------------------------------------------------------------------------- tokens


def test_prefix_text_and_suffix_are_tokenised_apart(model):
    encoder = Encoder.load(model, prompt="cluster", max_tokens=5)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens = encoder.tokenise(TEXTS)
    prefix, suffix = (
        tokenizer(s, add_special_tokens=False)["input_ids"] for s in ('This sentence: "', '" belongs to the following cluster:')
    )
    head = [tokenizer.bos_token_id] * encoder.contract.bos + prefix
    for text, ids, span in zip(TEXTS, tokens.ids, tokens.text, strict=True):
        own = tokenizer(text, add_special_tokens=False)["input_ids"][:5]
        assert ids == head + own + suffix
        assert ids[slice(*span)] == own
    assert (tokens.n_cut, tokens.n_empty) == (3, 1)
    assert encoder.warnings(clear=True) == ["1 empty texts were embedded as the prompt alone", "3 texts were cut to 5 tokens"]
    assert encoder.warnings() == []


def test_bos_and_eos_follow_the_models_own_tokenizer(models_dir, tmp_path):
    for name in ARCHITECTURES:
        assert Encoder.load(models_dir[name]).contract.bos == (name in ("llama", "mistral", "gemma3"))
    with_eos = make_model(tmp_path / "eos", "qwen3", eos=True)
    encoder = Encoder.load(with_eos, prompt="cluster")
    assert encoder.contract.eos and encoder.tokenise(["a"]).ids[0][-1] == 2
    assert Encoder.load(with_eos, eos=False).tokenise(["a"]).ids[0][-1] != 2


def test_roles_have_their_own_prompts(llama):
    encoder = Encoder.load(llama, prompt="retrieve")
    query, document = (encoder.tokenise(["cat"], role).ids[0] for role in ("query", "document"))
    assert query != document
    with pytest.raises(InputError, match="unknown role 'passage'"):
        encoder.encode(["cat"], "passage")


def test_empty_texts(models_dir):
    prompted = Encoder.load(models_dir["qwen3"], prompt="cluster", pooling="mean", scope="text")
    everything = Encoder.load(models_dir["qwen3"], prompt="cluster", pooling="mean", scope="all")
    np.testing.assert_allclose(prompted.encode([""]), everything.encode([""]), atol=1e-6)  # the prompt alone
    bare = Encoder.load(models_dir["qwen3"]).encode(["", "cat", ""])
    assert np.all(bare[[0, 2]] == 0) and np.linalg.norm(bare[1]) == pytest.approx(1, abs=1e-5)
    only_bos = Encoder.load(models_dir["llama"]).encode([""])
    assert np.linalg.norm(only_bos) == pytest.approx(1, abs=1e-5)
    assert Encoder.load(models_dir["llama"]).encode([]).shape == (0, 32)


def test_what_is_no_text_is_refused_by_its_number(llama):
    with pytest.raises(InputError, match="text 1 is NoneType"):
        Encoder.load(llama).encode(["a", None])
    with pytest.raises(InputError, match="put a single text in brackets"):
        Encoder.load(llama).encode("a text")


def test_bos_takes_part_only_when_asked(llama):
    without = Encoder.load(llama, pooling="mean", scope="all").encode(["cat"])
    with_bos = Encoder.load(llama, pooling="mean", scope="all", keep_bos=True).encode(["cat"])
    assert np.abs(without - with_bos).max() > 1e-3
    with pytest.raises(InputError, match="keep_bos"):
        Encoder.load(llama, pooling="mean", scope="text", keep_bos=True)


def test_layers_dims_and_normalisation(llama):
    raw = Encoder.load(llama, normalize=False).encode(TEXTS[:2])
    cut = Encoder.load(llama, dims=8).encode(TEXTS[:2])
    assert cut.shape == (2, 8)
    np.testing.assert_allclose(cut, raw[:, :8] / np.linalg.norm(raw[:, :8], axis=1, keepdims=True), atol=1e-6)
    np.testing.assert_allclose(Encoder.load(llama, layers=(-4,)).encode(TEXTS), Encoder.load(llama, layers=(0,)).encode(TEXTS))
    for layer in (4, -5):
        with pytest.raises(InputError, match=f"layer {layer} does not exist"):
            Encoder.load(llama, layers=(layer,))
    with pytest.raises(InputError, match="dims 33 is more than the 32"):
        Encoder.load(llama, dims=33)


def test_a_prompt_or_limit_that_does_not_fit_is_refused(llama):
    with pytest.raises(InputError, match="take at most"):
        Encoder.load(llama, prompt="cluster", max_tokens=250)
    with pytest.raises(InputError, match="take a shorter prompt"):
        Encoder.load(llama, prompt="cat " * 300 + "{text}")


# --------------------------------------------------------------------------------------------- contract and identity


def test_contract_survives_json_and_refuses_what_it_does_not_know(llama):
    contract = Encoder.load(llama, prompt="cluster", layers=(-1, -2)).contract
    assert Contract.from_json(contract.to_json()) == contract
    found = json.loads(contract.to_json())
    with pytest.raises(InputError, match=r"unknown fields \['colour'\]"):
        Contract.from_json(json.dumps(found | {"colour": 1}))
    found.pop("pooling")
    with pytest.raises(InputError, match=r"missing fields \['pooling'\]"):
        Contract.from_json(json.dumps(found))
    with pytest.raises(InputError, match="not valid JSON"):
        Contract.from_json("{")
    wrong = [
        ("pooling", "max"),
        ("scope", "prompt"),
        ("version", 2),
        ("max_tokens", 0),
        ("max_tokens", True),
        ("layers", ()),
        ("layers", None),
    ]
    wrong += [
        ("attention", "both"),
        ("bos", "yes"),
        ("normalize", 1),
        ("dims", "8"),
        ("data", "x"),
        ("prompts", None),
        ("prompts", {"query": {}}),
    ]
    for field, value in wrong:
        with pytest.raises(InputError, match=field):
            replace(contract, **{field: value})


def trained(model: str, folder, seed: int = 0, **contract) -> str:
    """A run whose adapter is random but not zero."""
    encoder = Encoder.load(model, **contract)
    torch.manual_seed(seed)
    encoder.add_adapter(4)
    with torch.no_grad():
        for parameter in encoder.trainable().values():
            parameter.normal_(std=0.1)
    encoder.save(folder)
    return str(folder)


def test_a_run_loads_as_it_was_saved(model, tmp_path):
    encoder = Encoder.load(model, prompt="cluster", pooling="attention", scope="text", max_tokens=9)
    base = encoder.encode(TEXTS)
    encoder.add_adapter(4)
    with torch.no_grad():
        for parameter in encoder.trainable().values():
            parameter.normal_(std=0.1)
    encoder.save(tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["adapter_config.json", "adapter_model.safetensors", "embedding.json"]
    again = Encoder.load(str(tmp_path / "run"))
    assert again.contract == encoder.contract and again.fingerprint == encoder.fingerprint
    np.testing.assert_allclose(again.encode(TEXTS), encoder.encode(TEXTS), atol=1e-6)
    assert np.abs(again.encode(TEXTS) - base).max() > 1e-2
    np.testing.assert_allclose(again.untuned().encode(TEXTS), base, atol=1e-6)
    assert np.abs(again.encode(TEXTS) - base).max() > 1e-2


def test_every_linear_layer_of_every_block_is_adapted(model):
    encoder = Encoder.load(model)
    encoder.add_adapter(2)
    linear = {
        n for n, m in encoder.decoder.named_modules() if type(m).__name__ == "Linear" and "layers" in n and not n.endswith("base_layer")
    }
    adapted = {n.split(".lora_")[0] for n, _ in encoder.decoder.named_parameters() if ".lora_A" in n}
    assert len(adapted) >= 3 * 4 and not any(n for n in linear if ".lora_" not in n and n not in adapted)
    assert all("lora_" in name for name in encoder.trainable())


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
        Encoder.load(trained(llama, tmp_path / "a", seed=0, prompt="cluster")),
        Encoder.load(trained(llama, tmp_path / "b", seed=1, prompt="cluster")),
    ]
    assert len({first.fingerprint} | {e.fingerprint for e in others}) == 6
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 99}))
    assert Encoder.load(str(tmp_path / "a")).fingerprint not in {e.fingerprint for e in others}
    assert Encoder.load(str(tmp_path / "b")).untuned().fingerprint == first.fingerprint


def test_a_base_folder_may_have_a_presets_name(llama, tmp_path):
    for name in ("tiny", "qwen3-0.6b"):
        base = shutil.copytree(llama, tmp_path / name)
        run = trained(str(base), tmp_path / "runs" / name)
        np.testing.assert_allclose(Encoder.load(run).untuned().encode(TEXTS), Encoder.load(llama).encode(TEXTS), atol=1e-6)


def test_a_run_of_a_presets_name_does_not_hide_the_preset(tmp_path, monkeypatch):
    trained("tiny", tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    assert Encoder.load("tiny").peft is None and Encoder.load("./tiny").peft is not None


def test_what_is_no_decoder_is_refused(llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "other")
    for config, message in (
        (ModernBertConfig(), "of type 'modernbert', no decoder"),
        (GPT2Config(n_layer=1), "whose layers cannot be found"),
    ):
        config.save_pretrained(folder)
        if config.model_type == "gpt2":
            AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        with pytest.raises(InputError, match=message):
            Encoder.load(str(folder))


def test_a_flag_that_contradicts_a_run_shows_both_values(llama, tmp_path):
    run = trained(llama, tmp_path / "run", prompt="cluster")
    Encoder.load(run, prompt="cluster", pooling="last")  # says the same
    with pytest.raises(InputError, match=r"pooling is 'last' in the run, 'mean' was asked for.*--override-contract"):
        Encoder.load(run, pooling="mean")
    with pytest.raises(InputError, match=r"prompts is .*following cluster.* was asked for"):
        Encoder.load(run, prompt="none")
    assert Encoder.load(run, pooling="mean", override_contract=True).contract.pooling == "mean"
    with pytest.raises(InputError, match=r"unknown settings \['colour'\]"):
        Encoder.load(run, colour=1)


def test_damaged_or_changed_runs_are_refused(llama, tmp_path):
    base = shutil.copytree(llama, tmp_path / "base")
    run = tmp_path / "run"
    trained(str(base), run)
    make_model(base, "llama", seed=5)
    with pytest.raises(InputError, match="bring the old weights back"):
        Encoder.load(str(run))
    shutil.rmtree(base)
    with pytest.raises(InputError, match="is not there any more"):
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
def test_a_model_that_is_neither_here_nor_reachable(spec, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=r"no model|cannot load"):
        Encoder.load(spec)


def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(InputError, match=r"neither embedding\.json"):
        Encoder.load(str(tmp_path))


def test_a_model_with_missing_weights_is_not_filled_with_random_ones(llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    lost = weights.pop("model.layers.1.self_attn.k_proj.weight")
    assert lost.dim() == 2
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


def test_presets_name_supported_classes():
    """Each preset's architecture is one that these tests run, by what the hub says of it (config.model_type)."""
    known = {"tiny": "llama", "smollm2-135m": "llama", "pythia-160m": "gpt-neox", "qwen3-0.6b": "qwen3", "gemma-3-1b": "gemma3"}
    known |= {"llama-3.2-1b": "llama", "qwen3-4b": "qwen3", "mistral-7b": "mistral"}
    assert set(known) == set(PRESETS)
    assert set(known.values()) <= set(ARCHITECTURES)


def test_stored_vectors_of_the_bundled_model_are_still_what_they_were():
    """First five numbers of three readings, fp32, written down when the contract was: any path must reproduce them."""
    stored = json.loads((Path(__file__).parent / "stored_vectors.json").read_text())
    for item in stored["readings"]:
        vectors = Encoder.load("tiny", **item["settings"]).encode(stored["texts"])
        np.testing.assert_allclose(vectors[:, :5], item["vectors"], atol=1e-5, err_msg=str(item["settings"]))


HUB_SCRIPT = """
import sys
from encoder import Encoder
encoder = Encoder.load("org/llama", prompt="cluster")
print(encoder.contract.base, encoder.contract.revision, encoder.fingerprint)
encoder.add_adapter(2)
encoder.save(__import__("pathlib").Path(sys.argv[1]))
again = Encoder.load(sys.argv[1])
print(again.contract.base, again.contract.revision, again.fingerprint == encoder.fingerprint)
"""


def test_a_model_in_the_hub_cache_loads_without_network(llama, tmp_path):
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
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", HUB_SCRIPT, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.strip().splitlines()
    assert first.startswith(f"org/llama {commit} ") and second == f"org/llama {commit} True"
