"""The machine: device, dtype, free memory, random numbers, and the processes that torchrun starts."""

import functools
import os
from datetime import timedelta
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from encoder.names import check_dtype
from files.console import InputError


def local_rank() -> int:
    """Number of this process on its machine under torchrun, which is the number of its GPU; 0 without torchrun."""
    return int(os.environ.get("LOCAL_RANK", 0))


def pick_device(device: str | None = None) -> torch.device:
    """None: the GPU of this process (LOCAL_RANK under torchrun) where there is one, else the CPU. Raises InputError."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{local_rank()}"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"device {device!r} was asked for, but this PyTorch sees no CUDA device: leave it out or take cpu")
    try:
        picked = torch.device(device)
    except RuntimeError:
        raise InputError(f"unknown device {device!r}: take cpu, cuda or cuda:N") from None
    if picked.type == "cuda" and (picked.index or 0) >= torch.cuda.device_count():
        n = torch.cuda.device_count()
        hint = f"start at most {n} processes" if "LOCAL_RANK" in os.environ else f"take cuda:0 to cuda:{n - 1}" if n > 1 else "take cuda:0"
        raise InputError(f"device {device!r} was asked for, but this machine has {n} CUDA device{'s' * (n > 1)}: {hint}, or take cpu")
    return picked


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy of the array on the device. A GPU takes it from pinned memory, so that neither waits for the other."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def emulates_bfloat16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 only by way of float32: NVIDIA GPUs below compute capability 8.0 (T4, RTX 20xx, V100)."""
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0)


def pick_dtype(dtype: str | torch.dtype | None, device: torch.device, *, training: bool = False) -> torch.dtype:
    """None: float32 on a CPU, half precision elsewhere. "auto": bfloat16 also on CPUs with bfloat16 instructions.

    Half precision is bfloat16. A GPU that emulates it takes float16 for encoding, and float32 for training, where the gradients of
    float16 would underflow.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype in (None, "auto") and emulates_bfloat16(device):
        return torch.float32 if training else torch.float16
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if dtype == "auto":
        has_bf16 = device.type != "cpu" or torch.cpu.get_capabilities().get("avx512_bf16", False)
        return torch.bfloat16 if has_bf16 else torch.float32
    check_dtype(dtype)
    return getattr(torch, dtype)


# -------------------------------------------------------------------------------------------------------------- memory


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on the device, None where the system does not tell."""
    if device.type == "cuda":  # memory that PyTorch has reserved and does not use is free as well
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        with open("/proc/meminfo") as f:
            return next(1024 * int(line.split()[1]) for line in f if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None


def default_batch_tokens(device: torch.device) -> int:
    """Tokens of a batch that keep the device busy: larger batches are slower on a CPU, smaller ones on a GPU (bench/README.md)."""
    return 2048 if device.type == "cpu" else 32768


def memory_budget(config, dtype: torch.dtype, device: torch.device) -> int:
    """Tokens of a batch in inference: the default, or fewer where memory is short; the same in all processes.

    config    of the model, for its sizes
    """
    mlp = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    # an estimate of what one layer holds of a token, with the norms' float32 copies; half of the free memory is left alone
    bytes_per_token = torch.empty(0, dtype=dtype).element_size() * (16 * config.hidden_size + 4 * mlp)
    free, default = free_memory(device), default_batch_tokens(device)
    return all_reduce_number(default if free is None else max(256, min(default, int(0.5 * free / bytes_per_token))), "min")


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether memory ran out. Only PyTorch's allocator says so by a class; CUDA, cuBLAS, cuDNN, Triton and the CPU say so in words."""
    signs = ("out of memory", "alloc_failed", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error).lower() for sign in signs)


def empty_cache(device: torch.device) -> None:
    """Give memory that PyTorch has reserved and does not use back to the GPU; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------------------ random numbers


def random_state(device: torch.device) -> list[Tensor]:
    """State of PyTorch's random generators: the CPU's, and the device's where that is a GPU."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def set_random_state(states: list[Tensor], device: torch.device) -> None:
    """Set the generators to what `random_state` returned."""
    torch.set_rng_state(states[0])
    if len(states) > 1 and device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


# ----------------------------------------------------------------------------------------------------------- processes


class Distributed(NamedTuple):
    rank: int
    world_size: int
    group: object | None  # a gloo group for tensors on the CPU; None for a single process


@functools.cache
def distributed() -> Distributed:
    """Rank and number of the processes that torchrun started; sets up their communication at the first call."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return Distributed(0, 1, None)
    process_groups, timeout = torch.distributed, timedelta(days=7)  # one process may work alone for long, the others wait
    if not process_groups.is_initialized():
        if torch.cuda.is_available() and local_rank() < torch.cuda.device_count():  # else pick_device says what is wrong
            device = torch.device("cuda", local_rank())
            torch.cuda.set_device(device)  # NCCL and FSDP work on the current device, which is the first one in every process
            process_groups.init_process_group("cpu:gloo,cuda:nccl", timeout=timeout, device_id=device)
        else:
            process_groups.init_process_group("gloo", timeout=timeout)
    group = process_groups.new_group(backend="gloo", timeout=timeout)
    return Distributed(process_groups.get_rank(), process_groups.get_world_size(), group)


def end_distributed() -> None:
    """Leave the group of processes, at the end of a script that has succeeded."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def all_reduce_number(number: float, how: str) -> float:
    """The "min", "max" or "sum" of a number over all processes, of the type of the number given."""
    if distributed().world_size == 1:
        return number
    tensor = torch.tensor(number, dtype=torch.float64)
    torch.distributed.all_reduce(tensor, getattr(torch.distributed.ReduceOp, how.upper()), group=distributed().group)
    return type(number)(tensor)


def shard_model(model: nn.Module, blocks: nn.ModuleList, device: torch.device) -> None:
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
