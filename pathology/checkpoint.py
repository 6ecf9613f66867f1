"""What a self-supervised run needs to resume to the bit: student, teacher, the optimizer's moments, and how far it is.

Random numbers need no place here: those of a step follow from the seed and the number of the step. A checkpoint is one safetensors
file with a hash over its content; the one before it is kept, so that a damaged file costs some steps and not the run.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from files.console import InputError, warn
from files.writing import write_atomic
from training.run_record import CHECKPOINT, PREVIOUS_CHECKPOINT


@dataclass
class State:
    """How far a run is.

    steps                    of the whole run
    step                     steps that are done
    seconds                  spent in training, over all resumptions
    first_score              of the probe before the first step; None: there is no probe
    best_score, best_step    of the weights in the folder; None: no probe yet
    first_variance           of the teacher's features in the first step (dino.variance)
    collapsed                whether the alarm has been given
    """

    steps: int
    step: int = 0
    seconds: float = 0.0
    first_score: float | None = None
    best_score: float | None = None
    best_step: int = 0
    first_variance: float | None = None
    collapsed: bool = False


def content_hash(tensors: dict[str, Tensor], state: State) -> str:
    digest = hashlib.sha256(json.dumps(asdict(state), sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def save_checkpoint(folder: Path, student: nn.Module, teacher: nn.Module, optimizer: torch.optim.Optimizer, state: State) -> None:
    """Write a checkpoint and keep the one before it. Raises InputError where a weight is not finite, WriteError where it cannot."""
    tensors = {f"teacher/{name}": p for name, p in teacher.named_parameters()}
    for name, parameter in student.named_parameters():
        tensors[f"student/{name}"] = parameter
        tensors |= {f"{key}/{name}": value for key, value in optimizer.state.get(parameter, {}).items()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if not all(t.isfinite().all() for t in tensors.values()):
        raise InputError(f"step {state.step}: the weights are not finite any more: lower --lr")
    metadata = {"state": json.dumps(asdict(state)), "sha256": content_hash(tensors, state)}

    def write(temporary: Path) -> None:
        save_file(tensors, temporary, metadata)
        if (folder / CHECKPOINT).is_file():
            os.replace(folder / CHECKPOINT, folder / PREVIOUS_CHECKPOINT)

    write_atomic(folder / CHECKPOINT, write)


def read_checkpoint(folder: Path) -> tuple[State, dict[str, Tensor]]:
    """State and tensors of the newest undamaged checkpoint. Raises InputError where there is none."""
    damaged = []
    for path in (folder / CHECKPOINT, folder / PREVIOUS_CHECKPOINT):
        if not path.is_file():
            continue
        try:
            with safe_open(path, framework="pt") as f:
                metadata, tensors = f.metadata(), {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118, not a dict
            state = State(**json.loads(metadata["state"]))
            if content_hash(tensors, state) == metadata["sha256"]:
                if damaged:
                    warn(f"{damaged[0]} is damaged: going on from {path.name}, step {state.step}")
                return state, tensors
        except (SafetensorError, ValueError, KeyError, TypeError):
            pass
        damaged.append(path)
    raise InputError(f"{damaged[0] if damaged else folder / CHECKPOINT} is missing or damaged: start again in another --out")


def load_checkpoint(folder: Path, student: nn.Module, teacher: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """Put weights and moments back in place -> the state. Raises InputError where no checkpoint is whole."""
    state, tensors = read_checkpoint(folder)
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            parameter.copy_(tensors[f"teacher/{name}"])
        for name, parameter in student.named_parameters():
            parameter.copy_(tensors[f"student/{name}"])
            if f"step/{name}" in tensors:
                moments = {key: tensors[f"{key}/{name}"].to(parameter.device) for key in ("exp_avg", "exp_avg_sq")}
                optimizer.state[parameter] = {"step": tensors[f"step/{name}"], **moments}
    return state
