"""The machine: device, dtype, free memory, random numbers."""

import contextlib
import ctypes
import functools
import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from encoder.names import check_dtype
from encoder.processes import all_reduce_number, local_rank
from files.console import InputError

CGROUP = Path("/sys/fs/cgroup")  # in a container its root is the container's group


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
            available = next(1024 * int(line.split()[1]) for line in f if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None
    return min(available, room_in_container())


def room_in_container() -> float:
    """Bytes that the container's memory limit leaves (cgroup v2 or v1), cached files not counted that can be dropped; inf without a limit.

    /proc/meminfo is the host's in a container too.
    """
    v1 = CGROUP / "memory"
    for folder, limit, used in (CGROUP, "memory.max", "memory.current"), (v1, "memory.limit_in_bytes", "memory.usage_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # no such file, or no limit: "max"
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            dropped = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
            return max(0, int((folder / limit).read_text()) - int((folder / used).read_text()) + dropped)
    return float("inf")


@functools.cache
def keep_freed_memory() -> None:
    """Let glibc keep what tensors on a CPU have freed, up to 256 MiB, for the next ones; nothing where there is another allocator.

    By default it maps each tensor of 128 KiB to 32 MiB anew, whose pages the kernel then has to clear, for every layer of every batch:
    a fifth of the time of short texts (bench/README.md).
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        map_from, keep_up_to = -3, -1  # M_MMAP_THRESHOLD, which is 32 MiB at most, and M_TRIM_THRESHOLD
        libc.mallopt(map_from, 32 * 2**20)
        libc.mallopt(keep_up_to, 256 * 2**20)


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
