"""`export.py --to gguf`: what llama.cpp's converter is given, and that llama.cpp gives our vectors where it is installed.

Tests of llama.cpp itself need LLAMA_CPP, the folder of its source, and LLAMA_PYTHON, a Python with llama-cpp-python and what the converter
imports, in the environment; without these they are skipped. `make test-llama-cpp` builds both and runs these.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_run
from exported import QUERY, TOKEN_FAULTS, Exported, assert_named, edit_json, with_truncation
from safetensors.torch import load_file

import export
from encoder import Encoder
from files.console import InputError
from serving import gguf_folder, runtimes
from serving.card import how_to_load
from serving.folder import check_expressible, runtimes_for
from serving.gguf_folder import context_tokens, convert, plain_text_note, write_causal_model
from serving.verification import sample_texts, text_lengths

LLAMA_CPP, LLAMA_PYTHON = os.environ.get("LLAMA_CPP"), os.environ.get("LLAMA_PYTHON")
needs_llama_cpp = pytest.mark.skipif(not (LLAMA_CPP and LLAMA_PYTHON), reason="LLAMA_CPP and LLAMA_PYTHON are not set")


def run(*flags) -> None:
    export.main(export.build_parser().parse_args([str(flag) for flag in flags]))


# ------------------------------------------------------------------------------------------------- without llama.cpp


@pytest.mark.parametrize(
    ("contract", "message"),
    [
        ({"pooling": "position-mean", "scope": "all"}, "gguf cannot serve pooling position-mean.*: it has last and mean over all tokens"),
        ({"pooling": "mean", "scope": "text"}, "gguf cannot serve pooling mean over some of the tokens"),
        ({"pooling": "last", "dims": 12}, "gguf cannot serve vectors cut to 12 numbers: it has whole vectors; .*onnx can serve it"),
        ({"pooling": "last", "attention": "bidirectional"}, "gguf cannot serve bidirectional attention"),
    ],
)
def test_what_llama_cpp_cannot_express_is_refused(llama, contract, message):
    contract = Encoder.load(llama, prompt="cluster", **contract).contract
    assert "gguf" not in runtimes_for(contract)
    with pytest.raises(InputError, match=message):
        check_expressible(contract, "gguf")


def test_bad_arguments(llama, tmp_path):
    (tmp_path / "llama.cpp").mkdir()
    for flags, message in (
        (("--to", "gguf"), "--to gguf needs --llama-cpp DIR, .* and --llama-python PATH"),
        (("--to", "gguf", "--llama-cpp", tmp_path / "llama.cpp", "--llama-python", sys.executable), "no convert_hf_to_gguf.py there"),
        (("--to", "gguf", "--merge-dtype", "float16"), "--merge-dtype: weights of a GGUF are stored by --gguf-type"),
        (("--gguf-type", "q8_0"), "--gguf-type belongs to --to gguf"),
        (("--to", "onnx", "--llama-cpp", tmp_path), "--llama-cpp belongs to --to gguf"),
    ):
        with pytest.raises(InputError, match=message):
            run(llama, "--out", tmp_path / "out", *flags)
    (tmp_path / "llama.cpp" / gguf_folder.CONVERTER).touch()
    with pytest.raises(InputError, match="--llama-python no-python: no such program"):
        run(llama, "--out", tmp_path / "out", "--to", "gguf", "--llama-cpp", tmp_path / "llama.cpp", "--llama-python", "no-python")
    with pytest.raises(InputError, match=r"--llama-python .*: no llama_cpp and no sentencepiece there"):
        run(llama, "--out", tmp_path / "out", "--to", "gguf", "--llama-cpp", tmp_path / "llama.cpp", "--llama-python", sys.executable)
    assert [path.name for path in tmp_path.iterdir()] == ["llama.cpp"]


@pytest.mark.parametrize(
    ("architecture", "prefix", "tied"), [("llama", "model", False), ("gemma3", "model", True), ("gpt-neox", "gpt_neox", False)]
)
def test_the_converter_gets_a_causal_model(models_dir, tmp_path, architecture, prefix, tied):
    """The adapter's sum under the names of the class with a head; the head is zeros, unless it is the embedding."""
    source = make_run(models_dir[architecture], tmp_path / "run", prompt="cluster", pooling="last")
    encoder = Encoder.load(source, dtype="float32")
    encoder.merge()
    write_causal_model(encoder, tmp_path / "out")
    written, base = load_file(tmp_path / "out" / "model.safetensors"), load_file(Path(models_dir[architecture]) / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"][0].endswith("ForCausalLM")
    heads = [name for name in written if not name.startswith(prefix)]
    assert bool(heads) != tied and not any(written[name].any() for name in heads)
    changed = [name for name in written if name not in heads and not torch.equal(written[name], base[name])]
    assert set(written) - set(heads) <= set(base) and changed and not any("norm" in name for name in changed)
    template = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["post_processor"]
    assert template == json.loads((Path(models_dir[architecture]) / "tokenizer.json").read_text())["post_processor"]


FAKE_CONVERTER = """
import json, sys
from conversion.base import TextModel

def main():
    folder, out, kind = sys.argv[1], sys.argv[3], sys.argv[5]
    model = TextModel(folder)
    if "unknown" in folder:
        print("ERROR:hf-to-gguf:Model NewForCausalLM is not supported", file=sys.stderr)
        sys.exit(1)
    model.prepare_metadata(vocab_only=False)
    del model.gguf_writer.kv_data
    rotary = model.hparams.get("rotary_pct")
    json.dump({"type": kind, "pre": model.get_vocab_base_pre(None), "rotary": rotary, **model.gguf_writer.__dict__}, open(out, "w"))
"""
FAKE_BASE = """
import json

class Writer:
    def __init__(self): self.kv_data = [{"fake.block_count": 3}]
    def add_pooling_type(self, value): self.pooling = value
    def add_add_bos_token(self, value): self.bos = value
    def add_add_eos_token(self, value): self.eos = value

class ModelBase:
    @staticmethod
    def load_hparams(folder): return json.load(open(folder + "/config.json"))

class TextModel(ModelBase):
    def __init__(self, folder): self.gguf_writer, self.hparams = Writer(), ModelBase.load_hparams(folder)
    def prepare_metadata(self, vocab_only): pass
    def get_vocab_base_pre(self, tokenizer): raise NotImplementedError("BPE pre-tokenizer was not recognized")
"""


@pytest.fixture
def fake_convert(tmp_path, llama):
    """Called with a config: what the converter's driver adds to it, by modules of the names that the converter has."""
    folder = tmp_path / "llama.cpp"
    (folder / "conversion").mkdir(parents=True)
    (folder / gguf_folder.CONVERTER).write_text(FAKE_CONVERTER)
    (folder / "conversion" / "__init__.py").touch()
    (folder / "conversion" / "base.py").write_text(FAKE_BASE)
    (folder / "gguf.py").write_text("PoolingType = {'MEAN': 1, 'LAST': 3}\n")
    encoder = Encoder.load(llama, prompt="none", pooling="last", max_tokens=29)

    def fake_convert(config: dict, name: str = "source") -> dict:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        convert(encoder, tmp_path / name, tmp_path / "out.gguf", "q8_0", folder, sys.executable)
        return json.loads((tmp_path / "out.gguf").read_text())

    return fake_convert


def test_the_metadata_say_pooling_and_tokens(fake_convert):
    metadata = {"type": "q8_0", "pre": "default", "pooling": 3, "bos": True, "eos": False}
    assert fake_convert({"rope_parameters": {"partial_rotary_factor": 0.25}}) == metadata | {"rotary": 0.25}


def test_a_class_that_the_converter_does_not_know_is_one_line(fake_convert):
    with pytest.raises(runtimes.RuntimeFailed, match=r"llama.cpp's converter cannot write q8_0: .*Model NewForCausalLM is not supported$"):
        fake_convert({}, "unknown")


def test_a_sliding_window_that_would_be_left_out_is_refused(fake_convert):
    """30 tokens with BOS fit into a window of 30."""
    assert fake_convert({"sliding_window": 30}, "fits")["pooling"] == 3
    assert fake_convert({"sliding_window": 12, "use_sliding_window": False}, "unused")["pooling"] == 3
    with pytest.raises(
        runtimes.RuntimeFailed, match=r"leaves out the sliding window of 29 tokens that this class has, and 30 have to be read"
    ):
        fake_convert({"sliding_window": 29}, "short")


CRASHING = """#!{python}
import os, signal, sys
import numpy as np
if sys.argv[6] == "0" or {always}:
    os.kill(os.getpid(), signal.SIGSEGV)
np.savez(sys.argv[4], **{{"one at a time": np.ones((2, 3)), "same tokens": np.array([True, False])}})
"""


@pytest.mark.parametrize("always", [False, True])
def test_a_crash_over_repacked_weights_is_gone_around_and_said(tmp_path, always):
    script = tmp_path / "python"
    script.write_text(CRASHING.format(python=sys.executable, always=always))
    script.chmod(0o755)
    if always:
        with pytest.raises(runtimes.RuntimeFailed, match=r"llama.cpp cannot run .*: it crashed \(SIGSEGV\)"):
            runtimes.llama_cpp_vectors(str(script), tmp_path, ["a", "b"], 256)
        return
    vectors, same, as_stored = runtimes.llama_cpp_vectors(str(script), tmp_path, ["a", "b"], 256)
    assert set(vectors) == {"one at a time"} and same.tolist() == [True, False] and as_stored


def test_what_the_card_says_of_plain_text(llama):
    encoder = Encoder.load(llama, prompt="none", pooling="last", max_tokens=30)
    texts = sample_texts(encoder)
    short = text_lengths(encoder, texts) <= 30
    assert (~short).any() and "send text or ids" in plain_text_note(encoder, texts, short)  # what is too long need not be the same
    same = short.copy()
    same[0] = False
    assert f"(of 1 of {short.sum()} texts): send ids" in plain_text_note(encoder, texts, same)


def test_the_command_that_serves_a_folder(llama):
    encoder = Encoder.load(llama, prompt="cluster", pooling="last", max_tokens=200)
    assert context_tokens(encoder) == 256
    line = "llama-server -m 'my folder/model.gguf' --embedding -np 4 --kv-unified -c 1024 -b 256 -ub 256"
    assert how_to_load("gguf", encoder, "document", "my folder", "f16") == line


# ---------------------------------------------------------------------------------------------------- with llama.cpp


def exported_folder(run: str, folder: Path, kind: str, **contract) -> Exported:
    def write(encoder: Encoder, folder: Path, kind: str):
        return gguf_folder.write_gguf_folder(encoder, folder, kind, Path(LLAMA_CPP), LLAMA_PYTHON)

    def vectors(folder: Path, texts: list[str]) -> dict[str, np.ndarray]:
        return runtimes.llama_cpp_vectors(LLAMA_PYTHON, folder, texts, 256)[0]

    return Exported(run, folder, kind, write, vectors, **contract)


CONTRACTS = [
    {"prompt": "cluster", "pooling": "last"},
    {"prompt": "cluster", "pooling": "mean", "scope": "all", "keep_bos": True},
    {"prompt": "none", "pooling": "last", "normalize": False},
    {"prompt": "prompt-eol", "query_prompt": QUERY, "pooling": "last", "max_tokens": 20, "eos": True},
]


@needs_llama_cpp
@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda c: " ".join(map(str, c.values())))
def test_every_contract_gives_our_vectors(llama, tmp_path, contract):
    source = make_run(llama, tmp_path / "run", **({"max_tokens": 60} | contract))
    assert min(exported_folder(source, tmp_path / "out", "f32").verify()) > 1 - 1e-5


@needs_llama_cpp
@pytest.mark.parametrize("architecture", ["mistral", "qwen3", "gpt-neox"])
def test_every_class_gives_our_vectors(models_dir, tmp_path, architecture):
    base = tmp_path / "base"
    shutil.copytree(models_dir[architecture], base)
    edit_json(base / "config.json", lambda config: config | {"sliding_window": 256} if "sliding_window" in config else config)
    source = make_run(str(base), tmp_path / "run", prompt="cluster", pooling="last", max_tokens=60)
    assert min(exported_folder(source, tmp_path / "out", "f32").verify()) > 1 - 1e-5


def with_pooling_mean(exported: Exported) -> None:
    """The metadata name another pooling: a file of the same weights."""
    with_model_of(exported, exported.run, pooling="mean", scope="all", keep_bos=True, override_contract=True)


def without_adapter(exported: Exported) -> None:
    encoder = exported.truth.encoder
    with_model_of(exported, encoder.source, prompt="cluster", query_prompt=QUERY, pooling="last", max_tokens=60)


def with_model_of(exported: Exported, spec: str, **contract) -> None:
    other = exported.folder.with_name("other")
    encoder = Encoder.load(spec, dtype="float32", **contract)
    encoder.merge()
    gguf_folder.write_gguf_folder(encoder, other, exported.dtype, Path(LLAMA_CPP), LLAMA_PYTHON)
    shutil.copy(other / "model.gguf", exported.folder)


FAULTS = {
    **TOKEN_FAULTS,
    "low limit": (with_truncation(45), "cut: long texts are cut at another limit"),
    "pooling": (with_pooling_mean, "pooling: it is mean over all tokens"),
    "adapter": (without_adapter, "weights: they are those of the untuned base"),
}


@needs_llama_cpp
@pytest.mark.parametrize("kind", ["f32", "q8_0"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(llama, tmp_path, fault, kind):
    """Both by the folder's tokenizer, where it is one of tokens, and by the runtime's vectors alone."""
    inject, name = FAULTS[fault]
    source = make_run(llama, tmp_path / "run", prompt="cluster", query_prompt=QUERY, pooling="last", max_tokens=60)
    exported = exported_folder(source, tmp_path / "out", kind)
    assert_named(exported, inject, name)


@needs_llama_cpp
def test_a_folder_holds_what_it_promises(llama, tmp_path, capsys):
    source = make_run(llama, tmp_path / "run", prompt="cluster", query_prompt=QUERY, pooling="last", max_tokens=20)
    run(source, "--to", "gguf", "--llama-cpp", LLAMA_CPP, "--llama-python", LLAMA_PYTHON, "--out", tmp_path / "out")
    out, said = tmp_path / "out", capsys.readouterr().out
    files = {"model.gguf", "tokenizer.json", "embedding.json", "verification.json", "README.md"}
    assert {path.name for path in out.iterdir()} == {*files, "query"} and {path.name for path in (out / "query").iterdir()} == files
    assert (out / "model.gguf").stat().st_ino == (out / "query" / "model.gguf").stat().st_ino
    assert said.count("llama.cpp, f16, ") == 4 and "(needs 0.995)" in said and "llama-server -m" in said
    card = (out / "README.md").read_text()
    assert "send ids" in card and "n_ctx=size" in card and "(needs 0.995)" in card and "scope all, named in the file's metadata" in card
