"""The machine: devices, dtypes, memory errors and processes, with stand-ins where there is no GPU."""

import ctypes
import gc
import os
import subprocess
import sys
import types
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TEXTS, make_run, randomize_adapter
from launch import torchrun

from encoder import Encoder, processes, runtime
from encoder.checks import NonFiniteError
from encoder.packing import PackedAttention, select_tokens
from encoder.runtime import free_memory, is_out_of_memory, pick_device, pick_dtype
from files.console import InputError
from training.gradients import embed

HERE = Path(__file__).resolve().parents[1]


@pytest.fixture
def two_gpus(monkeypatch):
    """What PyTorch says on a machine with two GPUs of compute capability 7.5."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))


@pytest.mark.parametrize(
    ("folder", "limit", "used", "cached"),
    [
        ("", "memory.max", "memory.current", "inactive_file"),  # cgroup v2
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),  # v1
    ],
)
def test_the_memory_limit_of_a_container_counts(tmp_path, monkeypatch, folder, limit, used, cached):
    cpu, group = torch.device("cpu"), tmp_path / folder
    monkeypatch.setattr(runtime, "CGROUP", tmp_path)
    of_host = free_memory(cpu)  # no such files
    group.mkdir(exist_ok=True)
    for name, content in ((limit, "1000000\n"), (used, "700000\n"), ("memory.stat", f"anon 5\n{cached} 200000\n")):
        (group / name).write_text(content)
    assert free_memory(cpu) == 500_000
    (group / used).write_text("1300000")
    assert free_memory(cpu) == 0
    (group / limit).write_text("max" if not folder else str(2**63 - 4096))
    assert free_memory(cpu) > 2**20 and of_host > 2**20


KEPT_MEMORY = """
import ctypes, os, torch
from encoder.runtime import keep_freed_memory

class MallocInfo(ctypes.Structure):
    _fields_ = (("before", ctypes.c_size_t * 3), ("hblks", ctypes.c_size_t), ("behind", ctypes.c_size_t * 6))

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = MallocInfo

def is_mapped():
    before = libc.mallinfo2().hblks
    tensor = torch.empty(2**20)  # 4 MiB
    return libc.mallinfo2().hblks > before and tensor.numel() > 0

libc.mallopt(-3, 2**17)  # M_MMAP_THRESHOLD, as a process begins
assert is_mapped()
os.environ["MALLOC_ARENA_MAX"] = "1"  # somebody has set it up already
keep_freed_memory.__wrapped__()
assert is_mapped()
del os.environ["MALLOC_ARENA_MAX"]
keep_freed_memory.__wrapped__()
assert not is_mapped()
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="asks glibc where memory comes from")
def test_memory_of_large_tensors_is_not_mapped_anew():
    """In a process of its own: where other tests have left memory free, no tensor of this size would be mapped."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    subprocess.run([sys.executable, "-c", KEPT_MEMORY], cwd=HERE, env=clean, check=True)


def test_the_gpu_of_a_process_is_that_of_its_local_rank(two_gpus, monkeypatch):
    assert pick_device() == pick_device("cuda") == torch.device("cuda:0")
    with pytest.raises(InputError, match="this machine has 2 CUDA devices: take cuda:0 to cuda:1, or take cpu"):
        pick_device("cuda:7")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device() == torch.device("cuda:1") and pick_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="'cuda:2' was asked for, but this machine has 2 CUDA devices: start at most 2 processes"):
        pick_device()


def test_the_device_is_set_before_the_processes_meet(two_gpus, monkeypatch):
    """NCCL and FSDP work on the current device: it must be this process's before the group is made."""
    calls = []
    group = types.SimpleNamespace(
        is_initialized=lambda: False,
        init_process_group=lambda backend, **options: calls.append((backend, options.get("device_id"))),
        new_group=lambda **_: "gloo group",
        get_rank=lambda: 1,
        get_world_size=lambda: 2,
    )
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(device))
    monkeypatch.setattr(torch, "distributed", group)
    monkeypatch.setattr(processes.atexit, "register", lambda function: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for local_rank, expected in (
        ("1", [torch.device("cuda:1"), ("cpu:gloo,cuda:nccl", torch.device("cuda:1"))]),
        ("2", [("gloo", None)]),  # no GPU of its own: --device cpu may still be asked for
    ):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        processes.distributed.cache_clear()
        calls.clear()
        assert processes.distributed() == (1, 2, "gloo group") and calls == expected
    processes.distributed.cache_clear()


def test_gpus_without_bfloat16_take_float16_to_encode_and_float32_to_train(two_gpus):
    gpu, cpu = torch.device("cuda:0"), torch.device("cpu")
    assert {pick_dtype(dtype, gpu) for dtype in (None, "auto")} == {torch.float16}
    assert {pick_dtype(dtype, gpu, training=True) for dtype in (None, "auto")} == {torch.float32}
    assert pick_dtype("bfloat16", gpu) == torch.bfloat16 and pick_dtype(None, cpu) == torch.float32


def test_a_gpu_without_bfloat16_is_noted_unless_the_type_was_asked_for(llama, monkeypatch):
    monkeypatch.setattr("encoder.encoder.emulates_bfloat16", lambda device: True)
    assert Encoder.load(llama).notes == ["this GPU has no bfloat16 instructions: computing in float32"]
    assert Encoder.load(llama, dtype="float32").notes == []


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",  # AcceleratorError
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "Triton Error [CUDA]: out of memory",
        "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.",
    ],
)
def test_every_way_to_say_that_memory_ran_out_is_understood(message):
    assert is_out_of_memory(RuntimeError(message))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_the_allocator_may_grow_its_segments_unless_the_user_says_otherwise():
    program = "import os, encoder; print(os.environ.get('PYTORCH_ALLOC_CONF'))"
    clean = {k: v for k, v in os.environ.items() if "ALLOC_CONF" not in k}
    for extra, expected in (
        ({}, "expandable_segments:True"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "x:1"}, "None"),
        ({"PYTORCH_ALLOC_CONF": "y:1"}, "y:1"),
    ):
        done = subprocess.run([sys.executable, "-c", program], env=clean | extra, capture_output=True, text=True, cwd=HERE, check=True)
        assert done.stdout.strip() == expected


# ------------------------------------------------------------------------------------------------------- failed attempts


@pytest.mark.parametrize("every", [0, 1, 2])
@pytest.mark.parametrize("pooling", ["last", "attention"])
def test_an_attempt_that_ran_out_of_memory_is_freed(llama, pooling, every, monkeypatch):
    """Frames of gradient checkpointing hold the packed attention; keys stored in it would hold their graph, beyond Python's reach."""
    seen, create = [], PackedAttention.__init__

    def watched(self, *args, **kwargs):
        create(self, *args, **kwargs)
        seen.append(weakref.ref(self))

    monkeypatch.setattr(PackedAttention, "__init__", watched)
    encoder = Encoder.load(llama, prompt="cluster", pooling=pooling, scope="all")
    encoder.add_adapter(2)
    encoder.set_gradient_checkpointing(every)
    encoder.decoder.train()
    tokenized = encoder.tokenize(TEXTS)

    def attempt():
        first, second = embed(encoder, tokenized, [0, 1]), embed(encoder, tokenized, [2, 3])
        assert first.requires_grad and second.requires_grad
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        attempt()
    gc.collect()
    assert len(seen) == 2 and not any(reference() for reference in seen)


# ------------------------------------------------------------------------------------------------ numbers that go wrong


def test_gradients_of_the_shared_prefix_are_one_reduction_and_no_row_is_taken_twice(llama, monkeypatch):
    """In bfloat16 a sum of many terms, one after the other, is off by percents; collisions are summed in any order on a GPU."""
    encoder = Encoder.load(llama, prompt="cluster", pooling="mean", scope="all", max_tokens=20)
    texts = [f"{text} {i}" for i in range(25) for text in TEXTS]
    batch = encoder.collate(encoder.tokenize(texts), list(range(len(texts))))
    tokens = batch.locate(np.zeros_like(batch.lengths), batch.lengths)
    assert batch.prefix_length > 4
    select, gradients = torch.Tensor.index_select, {}

    def unique_only(self, dim, index):
        assert not self.requires_grad or len(index.unique()) == len(index)
        return select(self, dim, index)

    monkeypatch.setattr(torch.Tensor, "index_select", unique_only)
    weights = torch.randn(len(tokens[0]), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for dtype in (torch.float64, torch.bfloat16):
        values = torch.ones(len(batch.ids), 3, dtype=dtype, requires_grad=True)
        (select_tokens(values, batch.prefix_length, *tokens) * weights.to(dtype)).sum().backward()
        gradients[dtype] = values.grad.double()
    expected = torch.zeros(len(batch.ids), 3, dtype=torch.float64).index_add_(0, torch.from_numpy(tokens[0]), weights)
    torch.testing.assert_close(gradients[torch.float64], expected)
    prefix = slice(0, batch.prefix_length)
    error = (gradients[torch.bfloat16] - expected)[prefix].norm() / expected[prefix].norm()
    assert error < 5e-3  # the rounding of the weights and of one result, and no more


def test_vectors_that_are_not_finite_are_an_error_that_names_the_text(llama):
    encoder = Encoder.load(llama, pooling="mean")
    with torch.no_grad():
        encoder.decoder.embed_tokens.weight[encoder.tokenize(["Interest"]).ids[0][-1]] = torch.inf
    encoder.encode(["The cat", "a"])
    with pytest.raises(NonFiniteError, match="the vector of text 2 has numbers that are not finite, in float32"):
        encoder.encode(["The cat", "a", "Interest", "To be"])


def test_a_run_is_encoded_through_the_fused_layer_in_the_type_of_its_base(llama, tmp_path):
    """peft's own layer would cast every input to the adapter's float32, and its output back."""
    encoder = Encoder.load(make_run(llama, tmp_path / "run", prompt="cluster"), dtype="bfloat16")
    types_seen = set()
    for name, module in encoder.decoder.named_modules():
        if name.endswith(("lora_A.default", "lora_B.default")):
            module.register_forward_hook(lambda module, args, output: types_seen.add((args[0].dtype, output.dtype)))
    vectors = encoder.encode(TEXTS)
    assert types_seen == set()  # peft's products are not called at all
    exact = Encoder.load(str(tmp_path / "run"), dtype="float32").encode(TEXTS)
    assert (vectors * exact).sum(1).min() > 0.995


def test_the_fused_layer_gives_way_when_the_adapter_is_off(llama):
    encoder = Encoder.load(llama, prompt="cluster")
    base = encoder.encode(TEXTS)
    encoder.add_adapter(2)
    randomize_adapter(encoder)
    assert np.abs(encoder.encode(TEXTS) - base).max() > 1e-3
    np.testing.assert_allclose(encoder.untuned().encode(TEXTS), base, atol=1e-6)


GATHERS_LAST = """
import atexit, os, pathlib, sys, torch
from encoder.processes import distributed

def threads():
    return sum(path.read_text() == "pt_gloo_runloop\\n" for path in pathlib.Path("/proc/self/task").glob("*/comm"))

results = pathlib.Path(sys.argv[1], os.environ["RANK"])
atexit.register(lambda: results.write_text(f"{before} {threads()}"))  # runs after what is registered later
torch.distributed.all_gather_object([None, None], "a", group=distributed().group)
before = threads()
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="reads the names of threads as Linux shows them")
def test_a_users_script_ends_without_threads_that_hold_tensors(tmp_path):
    """One in two that ended right after a gather was aborted: a thread let go of a tensor while Python finalized."""
    (tmp_path / "gathers.py").write_text(GATHERS_LAST)
    done = torchrun(tmp_path / "gathers.py", tmp_path)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["4 2"] * 2  # those of the default group have had no work
