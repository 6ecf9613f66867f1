"""One role of an embedding contract as a folder that llama.cpp reads.

    model.gguf        the base with the adapter added to it, the pooling in its metadata
    tokenizer.json    BOS, prompt and EOS as the template around every text, and the limit
    embedding.json    the contract

llama.cpp puts no prompt around a text and cuts nothing, but takes ids for texts: those of tokenizer.json. Where queries have another
prompt, `query/` holds their tokenizer; its model is a hard link.
"""

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from encoder.contract import CONTRACT_FILE
from files.console import InputError
from files.writing import write_json, write_text
from serving.folder import built_in_pooling, folders_of, token_limit, write_tokenizer_file
from serving.runtimes import HERE, check_python, run_program
from serving.verification import text_lengths

if TYPE_CHECKING:
    from encoder import Encoder

GGUF_TYPES = ("f32", "f16", "bf16", "q8_0")
CONVERTER = "convert_hf_to_gguf.py"
MODULES = ("llama_cpp", "tokenizers", "torch", "transformers", "sentencepiece")  # of the worker and of the converter
REPACK_NOTE = "Where this was verified, llama.cpp crashed with weights that it repacks for the CPU, and ran without: `--no-repack`."
SEQUENCES = 256  # llama.cpp's most of one batch: a context of another multiple crashes its mean pooling


def check_gguf(llama_cpp: Path | None, python: str | None) -> None:
    """Raise InputError where the converter or the Python that runs it is missing."""
    if llama_cpp is None or python is None:
        source = f"--llama-cpp DIR, llama.cpp's source with {CONVERTER}"
        raise InputError(
            f"--to gguf needs {source}, and --llama-python PATH, a Python with llama-cpp-python and what the converter imports"
        )
    if not (llama_cpp / CONVERTER).is_file():
        raise InputError(f"--llama-cpp {llama_cpp}: no {CONVERTER} there: give the folder of llama.cpp's source")
    check_python("--llama-python", python, MODULES)


def longest_sequence(encoder: "Encoder") -> int:
    """Tokens of the longest text with its prompt."""
    return max(token_limit(encoder, role) for role in encoder.contract.prompts)


def context_tokens(encoder: "Encoder") -> int:
    """Tokens that a context of llama.cpp has to hold."""
    return -(-longest_sequence(encoder) // SEQUENCES) * SEQUENCES


def llama_server_flags(n_tokens: int, slots: int = 4) -> list[str]:
    """What serves a folder as it is: each slot has room for the longest text, and no text is divided.

    A cache that is not shared by the slots would divide texts of one batch, and a mean would be that of a text's end.
    """
    size = str(n_tokens)
    return ["--embedding", "-np", str(slots), "--kv-unified", "-c", str(slots * n_tokens), "-b", size, "-ub", size]


def write_causal_model(encoder: "Encoder", folder: Path) -> None:
    """Write decoder, config and the base's own tokenizer as the causal language model that the converter knows, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    if encoder.peft is not None:
        encoder.peft.unload()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(encoder.decoder.config)
    prefix, head = model.base_model_prefix, model.get_output_embeddings()
    weights = {f"{prefix}.{name}": w for name, w in encoder.decoder.state_dict().items()}
    if not model.config.tie_word_embeddings:  # no vector depends on it, but llama.cpp loads some classes only with one
        name = next(name for name, module in model.named_modules() if module is head)
        weights |= {f"{name}.{part}": torch.zeros(w.shape) for part, w in head.state_dict().items()}
    setattr(model, prefix, encoder.decoder)
    model.save_pretrained(folder, state_dict=weights)
    encoder.tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    write_json(path, config)  # the name that transformers 4 knows too
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    if (model_file := Path(encoder.source) / "tokenizer.model").is_file():  # of SentencePiece, which the converter reads where it is
        shutil.copy(model_file, folder)


def convert(encoder: "Encoder", source: Path, out: Path, kind: str, llama_cpp: Path, python: str) -> None:
    """Write a causal language model as GGUF, by llama.cpp's converter. Raises RuntimeFailed with its message."""
    contract = encoder.contract
    pooling = {"mean": "mean", "lasttoken": "last"}[built_in_pooling(contract)]
    tokens = (int(contract.bos), int(contract.eos), longest_sequence(encoder))
    command = [python, HERE / "gguf_converter.py", llama_cpp.resolve(), source, out, kind, pooling, *tokens]
    run_program(command, f"llama.cpp's converter cannot write {kind}")


def write_gguf_folder(encoder: "Encoder", folder: Path, kind: str, llama_cpp: Path, python: str) -> list[tuple[str, Path]]:
    """Write the folder of an encoder whose adapter is merged, and of its queries where they differ -> each role and its folder.

    kind    of the weights, one of GGUF_TYPES
    Raises RuntimeFailed.
    """
    source, folders = folder / ".transformers", folders_of(encoder.contract, folder)
    write_causal_model(encoder, source)
    convert(encoder, source, folder / "model.gguf", kind, llama_cpp, python)
    shutil.rmtree(source)
    for role, path in folders:
        path.mkdir(exist_ok=True)
        if path != folder:
            os.link(folder / "model.gguf", path / "model.gguf")
        write_tokenizer_file(encoder, role, path, pad=False)
        write_text(path / CONTRACT_FILE, encoder.contract.to_json())
    return folders


def plain_text_note(encoder: "Encoder", texts: list[str], same: np.ndarray) -> str:
    """What the card says of text sent without ids. same: for each text whether llama.cpp makes the same ids of it by itself (N,)."""
    same = same[text_lengths(encoder, texts) <= encoder.contract.max_tokens]  # it cuts nothing, so that longer ones must differ
    if same.all():
        return f"llama-server makes the same tokens of plain text (checked on {len(same)} texts), which it does not cut: send text or ids."
    return f"llama-server makes other tokens of plain text (of {(~same).sum()} of {len(same)} texts): send ids, as above."
