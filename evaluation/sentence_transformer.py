"""`--model st:PATH`: a sentence-transformers model as a row of the table, under its own settings.

PATH is a folder or a hub id. What evaluate.py's flags say of untuned bases does not concern it; dtype and device do.

Legend: N texts, D numbers of a vector.
"""

import argparse
import hashlib
from pathlib import Path

import numpy as np

from encoder.contract import file_hash
from evaluation.mteb_model import MtebModel
from files.console import InputError

PREFIX = "st:"
# of such a model; weights in other formats are pickles or of other runtimes
FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.py")
SEARCHES = ("Retrieval", "Reranking", "InstructionRetrieval", "InstructionReranking")  # types of task with queries and documents


def is_sentence_transformer(spec: str) -> bool:
    return spec.startswith(PREFIX)


def check_spec(spec: str) -> None:
    """Raise InputError for what is neither a folder of such a model nor a hub id."""
    source = spec.removeprefix(PREFIX)
    folder = Path(source).expanduser()
    if not source or not folder.is_dir():
        if source.startswith((".", "/", "~")) or source.count("/") != 1:
            raise InputError(f"--model {spec}: no folder {source!r}, and no hub id like org/name")
    elif not (folder / "modules.json").is_file():
        raise InputError(f"--model {spec}: a folder without modules.json, which sentence-transformers models have")


def find_folder(spec: str, trust_remote_code: bool, files: tuple[str, ...] = FILES) -> Path:
    """The model's folder, in the hub's cache for a hub id, downloaded where the hub answers; code only if trusted. Raises InputError."""
    from encoder.base_models import fetch

    check_spec(spec)
    source = spec.removeprefix(PREFIX)
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    name, _, revision = source.partition("@")
    return fetch(name, revision or None, trust_remote_code, files)


def fingerprint(folder: Path) -> str:
    """16 hex digits over every file that decides a vector: weights, configs, tokenizer, code."""
    files = sorted({file for pattern in FILES for file in folder.rglob(pattern) if file.is_file()})
    return hashlib.sha256("".join(f"{file.relative_to(folder)} {file_hash(file)}\n" for file in files).encode()).hexdigest()[:16]


def row(spec: str, args: argparse.Namespace, task_type: str) -> MtebModel:
    """The model as a row of the table. For tasks with queries and documents it takes its prompts for these, if it has any.

    Raises InputError where it cannot be loaded. Its code is run with --trust-remote-code alone, and pickled weights are refused.
    """
    from safetensors import SafetensorError
    from sentence_transformers import SentenceTransformer

    from encoder.runtime import pick_device, pick_dtype

    folder, device = find_folder(spec, args.trust_remote_code), pick_device(args.device)
    if pickles := [file for file in folder.rglob("pytorch_model*.bin") if not any(file.parent.glob("*.safetensors"))]:
        raise InputError(f"--model {spec}: {pickles[0]} is a pickle, which can run code: save the weights as safetensors")
    dtype = pick_dtype(args.dtype, device)
    try:
        model = SentenceTransformer(
            str(folder),
            device=str(device),
            local_files_only=True,
            trust_remote_code=args.trust_remote_code,
            model_kwargs={"dtype": dtype, "use_safetensors": True},
        )
    except (OSError, ValueError, RuntimeError, TypeError, LookupError, ImportError, AttributeError, SafetensorError) as error:
        raise InputError(f"--model {spec} does not load with sentence-transformers: {' '.join(str(error).split())[:200]}") from None

    def encode(texts: list[str], role: str) -> np.ndarray:
        search = {"query": model.encode_query, "document": model.encode_document}[role]
        return (search if task_type in SEARCHES else model.encode)(texts, show_progress_bar=False).astype(np.float32)

    source = spec.removeprefix(PREFIX)
    name = None if Path(source).expanduser().is_dir() else source.partition("@")[0]
    return MtebModel(spec, fingerprint(folder), None, encode, f"{str(dtype).removeprefix('torch.')} on {device.type}", name=name)
