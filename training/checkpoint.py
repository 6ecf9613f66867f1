"""What a run needs to resume: its state, the adapter, the optimizer's moments and the states of the random generators."""

import secrets
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from encoder import Encoder
from encoder.processes import distributed
from encoder.runtime import random_state, set_random_state
from files.console import InputError
from training.checkpoint_files import read_checkpoint, write_checkpoint
from training.run_record import has_checkpoint


@dataclass
class TrainingState:
    """How far a run is and what it has seen. It goes into every checkpoint.

    chunk_size, gradient_checkpointing    as now in use: both change when memory runs out
    step                                  steps that are done
    seconds                               spent in training, over all resumptions
    joules                                used by the device of one process; None where that is not known
    skipped_steps                         steps without an update, as their loss or gradient was not finite
    n_empty, n_truncated                  texts that were empty, or longer than the contract allows
    best_score                            the highest validation score
    kept_score, kept_step                 validation score and step of the weights that the run will leave; step 0: none yet
    validations_without_improvement       since the last one that raised best_score
    run_id                                names the run for a tracker
    """

    chunk_size: int
    gradient_checkpointing: int
    step: int = 0
    seconds: float = 0.0
    joules: float | None = 0.0
    skipped_steps: int = 0
    n_empty: int = 0
    n_truncated: int = 0
    best_score: float | None = None
    kept_score: float | None = None
    kept_step: int = 0
    validations_without_improvement: int = 0
    run_id: str = field(default_factory=lambda: secrets.token_hex(4))


def gather_random_states(device: torch.device) -> list[list[Tensor]]:
    """The states of the random generators of every process."""
    _, world_size, group = distributed()
    states = [random_state(device)] * world_size
    if world_size > 1:
        torch.distributed.all_gather_object(states, random_state(device), group=group)
    return states


def save_checkpoint(
    folder: Path,
    encoder: Encoder,
    trained: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    state: TrainingState,
    best: dict[str, Tensor],
    random_states: list[list[Tensor]],
) -> None:
    """Write a checkpoint and keep the one before it; then write the adapter, as evaluation reads it.

    trained          the trained parameters by name
    best             the weights with the best validation score; empty where there was no validation yet
    random_states    see `gather_random_states`
    Raises InputError where a weight is not finite, and WriteError where the folder cannot be written; the last checkpoint stays.
    """
    if not all(parameter.isfinite().all() for parameter in trained.values()):
        stays = ", the last checkpoint stays" if has_checkpoint(folder) else ""
        raise InputError(f"step {state.step}: the adapter's weights are not finite any more{stays}: lower --lr")
    tensors = {f"rng/{process}/{i}": s for process, states in enumerate(random_states) for i, s in enumerate(states)}
    for name, parameter in trained.items():
        moments = optimizer.state[parameter]
        tensors |= {f"weight/{name}": parameter.detach().cpu()} | {f"{key}/{name}": value.cpu() for key, value in moments.items()}
    tensors |= {f"best/{name}": weight for name, weight in best.items()}
    write_checkpoint(folder, tensors, state)
    encoder.save(folder)  # should the process be killed before this, `load_checkpoint` makes up for it


def load_checkpoint(
    folder: Path, encoder: Encoder, trained: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> tuple[TrainingState, dict[str, Tensor]]:
    """Put weights, moments and random generators back in place -> the state and the best weights, as they were saved."""
    state, tensors = read_checkpoint(folder, TrainingState)
    for name, parameter in trained.items():
        parameter.data.copy_(tensors[f"weight/{name}"])
        if f"step/{name}" in tensors:
            moments = {key: tensors[f"{key}/{name}"].to(encoder.device) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": tensors[f"step/{name}"], **moments}
    rank = distributed().rank
    if rank == 0:
        encoder.save(folder)  # the adapter of this very step, should the process have been killed before it was saved
    states = [tensors[name] for i in range(2) if (name := f"rng/{rank}/{i}") in tensors]
    if states:  # there are none where the run was saved by fewer processes
        set_random_state(states, encoder.device)
    return state, {name.removeprefix("best/"): weight for name, weight in tensors.items() if name.startswith("best/")}
