"""The files of checkpoints, of text and vision runs alike: the last one, and the one before it.

A checkpoint is one safetensors file with a hash over its content. The one before it is kept beside it, so that a damaged file
costs some steps and not the run.
"""

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from encoder.lora import save_tensors
from encoder.processes import distributed
from files.console import InputError, warn
from files.writing import write_atomic
from training.run_record import CHECKPOINT, PREVIOUS_CHECKPOINT

State = TypeVar("State")  # a dataclass of JSON values: how far a run is


def content_hash(tensors: dict[str, Tensor], state: object) -> str:
    """sha256 over the state, and the names and bytes of the tensors."""
    digest = hashlib.sha256(json.dumps(asdict(state), sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def write_checkpoint(folder: Path, tensors: dict[str, Tensor], state: object) -> None:
    """Write tensors of the CPU and a state, and keep the checkpoint before. Raises WriteError where it cannot; the last one stays."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    metadata = {"state": json.dumps(asdict(state)), "sha256": content_hash(tensors, state)}

    def write(temporary: Path) -> None:
        save_tensors(tensors, temporary, metadata)
        if (folder / CHECKPOINT).is_file():
            os.replace(folder / CHECKPOINT, folder / PREVIOUS_CHECKPOINT)

    write_atomic(folder / CHECKPOINT, write)


def read_checkpoint(folder: Path, kind: type[State]) -> tuple[State, dict[str, Tensor]]:
    """State, of the class `kind`, and tensors of the newest undamaged checkpoint.

    A newer one that is damaged is deleted with a warning. Raises InputError where none is whole.
    """
    damaged = []
    for path in (folder / CHECKPOINT, folder / PREVIOUS_CHECKPOINT):
        if not path.is_file():
            continue
        try:
            with safe_open(path, framework="pt") as f:
                metadata, tensors = f.metadata(), {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118, not a dict
            state = kind(**json.loads(metadata["state"]))
            if content_hash(tensors, state) == metadata["sha256"]:
                if damaged:
                    warn(f"{damaged[0]} is damaged and deleted: going on from {path.name}, step {state.step}")
                    if distributed().rank == 0:  # the next save would move it over the good one
                        damaged[0].unlink()
                return state, tensors
        except (SafetensorError, ValueError, KeyError, TypeError):
            pass
        damaged.append(path)
    if not damaged:
        raise InputError(f"{folder / CHECKPOINT} is missing: start again in another --out")
    raise InputError(
        f"{damaged[0]} is damaged or of another version of this project, and no older checkpoint is whole: start again in another --out"
    )
