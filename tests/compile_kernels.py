"""Compile every pooling kernel for GPUs that this machine need not have, and print one JSON line for each.

    python tests/compile_kernels.py     # Ampere, Hopper and Blackwell through ptxas, MI300 through LLVM; half a minute

The launch settings are those that `pooling_kernels` chooses for contiguous bfloat16 values (B, L, D) with D = 4096, and for
Hopper also D = 5120, the widest that is benchmarked. Each line gives the registers of a thread, the bytes of registers spilled
to memory, the bytes of shared memory, the bits of the widest load from the values, and the numbers for whose values (1, a multiple of
16, any other) a launch would compile it again.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import pooling_kernels
from pooling_kernels import TILE, _launch_plan

POINTERS = {
    "x_ptr": "*bf16",
    "dx_ptr": "*bf16",
    "norm_weight_ptr": "*bf16",
    "scores_ptr": "*fp32",
    "mask_ptr": "*i1",
    "cu_seqlens_ptr": "*i64",
}
DIVISIBLE_BY_16 = ("x_stride_b", "x_stride_l", "D")  # the launcher sees that these are, and Triton can then use wide loads


def variants(target: GPUTarget):
    """(kernel, constants, warps) of each variant, as the launcher sets them."""
    for width in (4096, 5120) if target.arch == 90 else (4096,):
        for mode in ("mean", "attention", "query", "last"):
            for norm in (False, True):
                for packed in (False, True):
                    layout = {"MODE": mode, "WEIGHTED": False, "PACKED": packed, "MASKED": not packed, "NORM": norm, "ACC": tl.float32}
                    layout["x_stride_d"] = 1
                    all_features = norm or mode == "query"
                    block_t, block_d, _, warps = _launch_plan(32, 512, width, all_features, 2 * TILE if all_features else TILE)
                    sizes = {"BLOCK_T": block_t, "BLOCK_D": block_d, "BLOCK_H": 1}
                    yield pooling_kernels._pool_fwd_kernel, layout | sizes, warps
                    if mode != "last" and not packed:
                        block_t, block_d, _, warps = _launch_plan(32, 512, width, True, TILE)
                        needs = {"DX": True, "DSCORES": mode == "attention", "DQUERY": mode == "query", "ONE_HEAD": True}
                        yield pooling_kernels._pool_bwd_kernel, layout | needs | {"BLOCK_T": block_t, "BLOCK_D": block_d}, warps
        for normalize in (False, True):
            _, block_d, _, warps = _launch_plan(32, 8, width, normalize, TILE)
            flags = {"SOFTMAX": True, "NORM": True, "NORMALIZE": normalize, "BLOCK_S": max(1, TILE // block_d), "BLOCK_D": block_d}
            yield pooling_kernels._merge_kernel, flags, warps


def compile_variant(kernel, constants: dict, warps: int, target: GPUTarget):
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else "fp32" if name == "eps" else "i32"
        if name.endswith("_ptr"):
            signature[name] = POINTERS.get(name, "*fp32")
        if name.endswith("_ptr") or name in DIVISIBLE_BY_16:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(k),): v for k, v in constants.items()}, attributes)
    return triton.compile(source, target=target, options={"num_warps": warps})


def measure_cuda(binary) -> dict:
    """What the finished binary needs: registers that did not fit are spilled to the stack, which is empty otherwise."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    loads = re.findall(r"ld\.global[.\w]*?(?:\.v(\d))?\.b(\d+)", binary.asm["ptx"])
    return {
        "registers": int(registers),
        "spills": int(stack),
        "values_load": max(int(vector or 1) * int(bits) for vector, bits in loads),
    }


def measure_hip(binary) -> dict:
    assembly = binary.asm["amdgcn"]
    count = lambda name: int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])  # noqa: E731
    return {"registers": count("vgpr_count"), "spills": count("vgpr_spill_count") + count("sgpr_spill_count")}


def main() -> None:
    for target in (*(GPUTarget("cuda", arch, 32) for arch in (80, 90, 100)), GPUTarget("hip", "gfx942", 64)):
        for kernel, constants, warps in variants(target):
            binary = compile_variant(kernel, constants, warps, target)
            row = {"target": f"{target.backend}:{target.arch}", "kernel": kernel.__name__, "shared": binary.metadata.shared, "warps": warps}
            numbers = [p for p in kernel.params if not (p.is_constexpr or p.name.endswith("_ptr") or p.name == "eps")]
            row["specialized"] = [p.name for p in numbers if not p.do_not_specialize]
            row |= measure_cuda(binary) if target.backend == "cuda" else measure_hip(binary)
            print(json.dumps(row | {k: v for k, v in constants.items() if k != "ACC"}), flush=True)


if __name__ == "__main__":
    main()
