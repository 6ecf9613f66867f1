"""What a self-supervised run needs to resume to the bit: student, teacher, the optimizer's moments, and how far it is.

Random numbers need no place here: those of a step follow from the seed and the number of the step.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from files.console import InputError
from training.checkpoint_files import read_checkpoint, write_checkpoint


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


def save_checkpoint(folder: Path, student: nn.Module, teacher: nn.Module, optimizer: torch.optim.Optimizer, state: State) -> None:
    """Write a checkpoint and keep the one before it. Raises InputError where a weight is not finite, WriteError where it cannot."""
    tensors = {f"teacher/{name}": p for name, p in teacher.named_parameters()}
    for name, parameter in student.named_parameters():
        tensors[f"student/{name}"] = parameter
        tensors |= {f"{key}/{name}": value for key, value in optimizer.state.get(parameter, {}).items()}
    tensors = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    if not all(t.isfinite().all() for t in tensors.values()):
        why = "are not finite any more: lower --lr" if state.step else "of --init are not finite: make or fetch that model again"
        raise InputError(f"step {state.step}: the weights {why}")
    write_checkpoint(folder, tensors, state)


def load_checkpoint(folder: Path, student: nn.Module, teacher: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """Put weights and moments back in place -> the state. Raises InputError where no checkpoint is whole."""
    state, tensors = read_checkpoint(folder, State)
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            parameter.copy_(tensors[f"teacher/{name}"])
        for name, parameter in student.named_parameters():
            parameter.copy_(tensors[f"student/{name}"])
            if f"step/{name}" in tensors:
                moments = {key: tensors[f"{key}/{name}"].to(parameter.device) for key in ("exp_avg", "exp_avg_sq")}
                optimizer.state[parameter] = {"step": tensors[f"step/{name}"], **moments}
    return state
