"""Compile every pooling kernel for GPUs that need not be here, and print what came out: one JSON line each.

    python tests/compile_kernels.py     # Ampere, Hopper and Blackwell through ptxas, MI300 through LLVM; half a minute

The launch settings are those that `pooling_kernels` takes for values (B, L, D) in bfloat16, contiguous, D = 4096 (and 5120, the
widest that is benchmarked, for Hopper): registers, spills and shared memory in bytes, bits of the widest load from the values.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import pooling_kernels
from pooling_kernels import TILE, _plan

POINTERS = {"x_ptr": "*bf16", "dx_ptr": "*bf16", "norm_weight_ptr": "*bf16", "aux_ptr": "*fp32", "mask_ptr": "*i1", "cu_ptr": "*i64"}
ALIGNED = ("x_stride_b", "x_stride_l", "D", "T")  # what the launcher finds to be divisible by 16


def jobs(target: GPUTarget):
    """(kernel, constants, warps) as the launcher would set them."""
    for width in (4096, 5120) if target.arch == 90 else (4096,):
        for mode in ("mean", "attention", "query", "last"):
            for norm in (False, True):
                for packed in (False, True):
                    layout = {"MODE": mode, "WEIGHTED": False, "PACKED": packed, "MASKED": not packed, "NORM": norm, "ACC": tl.float32}
                    layout["x_stride_d"] = 1
                    whole = norm or mode == "query"
                    block_t, block_d, _, warps = _plan(32, 512, width, whole, 2 * TILE if whole else TILE)
                    sizes = {"BLOCK_T": block_t, "BLOCK_D": block_d, "BLOCK_H": 1}
                    yield pooling_kernels._pool_fwd_kernel, layout | sizes, warps
                    if mode != "last" and not packed:
                        block_t, block_d, _, warps = _plan(32, 512, width, True)
                        needs = {"DX": True, "DAUX": mode == "attention", "DQUERY": mode == "query", "ONE_HEAD": True}
                        yield pooling_kernels._pool_bwd_kernel, layout | needs | {"BLOCK_T": block_t, "BLOCK_D": block_d}, warps
        for normalize in (False, True):
            _, block_d, _, warps = _plan(32, 8, width, normalize)
            flags = {"SOFT": True, "NORM": True, "NORMALIZE": normalize, "BLOCK_S": max(1, 4096 // block_d), "BLOCK_D": block_d}
            yield pooling_kernels._merge_kernel, flags, warps


def compile_one(kernel, constants: dict, warps: int, target: GPUTarget):
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else "fp32" if name == "eps" else "i32"
        if name.endswith("_ptr"):
            signature[name] = POINTERS.get(name, "*fp32")
        if name.endswith("_ptr") or name in ALIGNED:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(k),): v for k, v in constants.items()}, attributes)
    return triton.compile(source, target=target, options={"num_warps": warps})


def measure_cuda(binary, arch: int) -> dict:
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(binary.asm["ptx"])
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={sm_arch_from_capability(arch)}", str(path), "-o", os.devnull]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    loads = re.findall(r"ld\.global[.\w]*?(?:\.v(\d))?\.b(\d+)", binary.asm["ptx"])
    found = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", told)
    return {
        "registers": int(re.search(r"Used (\d+) registers", told)[1]),
        "spills": int(found[1]) + int(found[2]),
        "values_load": max(int(v or 1) * int(b) for v, b in loads),
    }


def measure_hip(binary) -> dict:
    text = binary.asm["amdgcn"]
    number = lambda name: int(re.search(rf"\.{name}:\s+(\d+)", text)[1])  # noqa: E731
    return {"registers": number("vgpr_count"), "spills": number("vgpr_spill_count") + number("sgpr_spill_count")}


def main() -> None:
    for target in (*(GPUTarget("cuda", arch, 32) for arch in (80, 90, 100)), GPUTarget("hip", "gfx942", 64)):
        for kernel, constants, warps in jobs(target):
            binary = compile_one(kernel, constants, warps, target)
            row = {"target": f"{target.backend}:{target.arch}", "kernel": kernel.__name__, "shared": binary.metadata.shared, "warps": warps}
            row |= measure_cuda(binary, target.arch) if target.backend == "cuda" else measure_hip(binary)
            print(json.dumps(row | {k: v for k, v in constants.items() if k != "ACC"}), flush=True)


if __name__ == "__main__":
    main()
