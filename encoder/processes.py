"""The processes that torchrun starts. PyTorch is imported where there are several: one process alone need not wait for it."""

import atexit
import functools
import os
import sys
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import nn


def local_rank() -> int:
    """Number of this process on its machine under torchrun, which is the number of its GPU; 0 without torchrun."""
    return int(os.environ.get("LOCAL_RANK", 0))


class Distributed(NamedTuple):
    rank: int
    world_size: int
    group: object | None  # a gloo group for tensors on the CPU; None for a single process


@functools.cache
def distributed() -> Distributed:
    """Rank and number of the processes that torchrun started; sets up their communication at the first call."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return Distributed(0, 1, None)
    import torch

    process_groups, timeout = torch.distributed, timedelta(days=7)  # one process may work alone for long, the others wait
    if not process_groups.is_initialized():
        if torch.cuda.is_available() and local_rank() < torch.cuda.device_count():  # else pick_device says what is wrong
            device = torch.device("cuda", local_rank())
            torch.cuda.set_device(device)  # NCCL and FSDP work on the current device, which is the first one in every process
            process_groups.init_process_group("cpu:gloo,cuda:nccl", timeout=timeout, device_id=device)
        else:
            process_groups.init_process_group("gloo", timeout=timeout)
    group = process_groups.new_group(backend="gloo", timeout=timeout)
    atexit.register(close_group)
    return Distributed(process_groups.get_rank(), process_groups.get_world_size(), group)


def close_group() -> None:
    """End the threads of the gloo group, which end with its last reference.

    One that lets go of its last tensor while Python finalizes would abort a process whose work has gone well.
    """
    import torch

    group = distributed().group
    distributed.cache_clear()
    if torch.distributed.is_initialized():  # a script may have destroyed all groups at its end
        torch.distributed.destroy_process_group(group)


def wait_for_all() -> None:
    """Return when all processes have come here."""
    if distributed().world_size > 1:
        import torch

        torch.distributed.barrier()


def end_distributed() -> None:
    """Where torchrun started several processes, end this one with status 0, when all have come here; else do nothing.

    Python's own finalization is left out: the default group has threads too, which may be at work still (see `close_group`).
    """
    if distributed().world_size == 1:
        return
    import torch

    wait_for_all()
    atexit._run_exitfuncs()  # such as `close_group`, and those of a tracker
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def all_reduce_number(number: float, how: str) -> float:
    """The "min", "max" or "sum" of a number over all processes, of the type of the number given."""
    if distributed().world_size == 1:
        return number
    import torch

    tensor = torch.tensor(number, dtype=torch.float64)
    torch.distributed.all_reduce(tensor, getattr(torch.distributed.ReduceOp, how.upper()), group=distributed().group)
    return type(number)(tensor)


def shard_model(model: "nn.Module", blocks: "nn.ModuleList", device: "torch.device") -> None:
    """Divide the frozen weights among torchrun's processes, a block at a time (FSDP2); trained weights stay whole in each.

    From then on all processes must run equally many forward passes: each gathers a block's weights from all of them.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    trained = {p for p in model.parameters() if p.requires_grad}
    for parameter in trained:
        parameter.data = parameter.data.to(device)
    mesh = init_device_mesh(device.type, (distributed().world_size,))
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh, ignored_params=trained)
