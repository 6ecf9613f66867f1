"""One role of an embedding contract as a folder that ONNX Runtime and the package `tokenizers` read, with nothing else.

    model.onnx        token ids and mask -> vectors, pooled, cut and normalized by the contract
    model.onnx.data   the weights, where they are too large for one file
    tokenizer.json    BOS, prompt and EOS as the template around every text, limit and padding
    embedding.json    the contract

Where queries have another prompt, `query/` holds their tokenizer, and their model where it counts the prompt's tokens, else a hard link.
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from encoder.contract import CONTRACT_FILE
from files.console import InputError
from files.writing import write_text
from serving.folder import CODE, folders_of, pooling_modules, write_folder, write_tokenizer_file
from serving.runtimes import HERE, run_program

if TYPE_CHECKING:
    from encoder import Encoder

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
ONNX_DTYPES = ("float32", "float16")  # ONNX Runtime has no bfloat16 on a CPU


def check_onnx(dtype: str | None) -> None:
    """Raise InputError where a package is missing or the dtype of the weights is one that ONNX Runtime lacks; None: the default."""
    for name in PACKAGES:
        if importlib.util.find_spec(name) is None:
            raise InputError(f"--to onnx needs the package {name}: pip install -r requirements-extras.txt")
    if dtype not in (None, *ONNX_DTYPES):
        raise InputError(f"--merge-dtype {dtype}: ONNX Runtime does not compute in it on a CPU, take {' or '.join(ONNX_DTYPES)}")


def convert(source: Path, out: Path) -> None:
    """Write a folder of sentence-transformers as an ONNX model, in a fresh process. Raises RuntimeFailed."""
    code = str(int((source / f"{CODE}.py").exists()))
    run_program([sys.executable, HERE / "onnx_converter.py", source, out, code], "the model cannot be exported to ONNX")


def write_onnx_folder(encoder: "Encoder", folder: Path, dtype: str) -> list[tuple[str, Path]]:
    """Write the folder of an encoder whose adapter is merged, and of its queries where they differ -> each role and its folder.

    dtype    of the weights, one of ONNX_DTYPES
    Raises RuntimeFailed.
    """
    source, folders = folder / ".sentence-transformers", folders_of(encoder.contract, folder)
    graphs = {}  # modules behind the decoder -> the folder that has them
    for (role, path), (_, source_path) in zip(folders, write_folder(encoder, source, dtype), strict=True):
        path.mkdir(exist_ok=True)
        width = encoder.decoder.config.hidden_size
        graph = str(pooling_modules(encoder.contract, role, width, encoder.prompt_tokenizer.around(role)))
        if graph in graphs:
            for file in graphs[graph].glob("model.onnx*"):
                os.link(file, path / file.name)
        else:
            convert(source_path, path / "model.onnx")
            graphs[graph] = path
        write_tokenizer_file(encoder, role, path, pad=True)
        write_text(path / CONTRACT_FILE, encoder.contract.to_json())
    shutil.rmtree(source)
    return folders
