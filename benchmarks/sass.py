"""Registers, stack and instructions per element of the Triton pass, without a GPU.

    python benchmarks/sass.py [--kinds] [sm_90 sm_80 gfx942 ...]

compiles the pass ahead of time and disassembles its inner loop. An element is one (row, slot)
pair, an instruction one per thread. "serial" counts waits for a single warp-group product."""

from __future__ import annotations

import argparse
import collections
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from psm_kernels.ops.triton import launches, tile
from psm_kernels.ops.triton_kernels import bank_pass_kernel

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARGUMENTS = {
    "count": "*i64", "s_pos": "*fp32", "rng_state": "*i64", "cell_max": "*fp32",
    "parts": "*fp32", "scale": "fp32", "sharpness": "fp32", "b": "fp32",
    "row_offset": "i64", "col_offset": "i64",
}  # fmt: skip
INTEGERS = ("B", "K", "D", "cells", "splits")
UNUSED_BY_MINING = ("query", "s_pos", "rng_state", "parts")
UNUSED_BY_SUMS = ("key", "cell_max")


class Report(NamedTuple):
    registers: int
    stack: int  # bytes, spills included
    spills: int  # loads and stores of the inner loop
    shared: int  # bytes
    per_element: float  # instructions of the inner loop
    kinds: dict[str, float]
    serial: int


def chip(arch: str) -> str:
    return "hip" if arch.startswith("gfx") else {"sm_90": "hopper"}.get(arch, "cuda")


def compile_pass(arch: str, dtype: torch.dtype, dim: int, mine=True, total=True, selection=None):
    """The compiled kernel of one launch, as the launcher of `ops/triton.py` sets it up."""
    block = tile(dtype, dim, chip(arch), total)
    name = TYPES[dtype]
    types = dict.fromkeys(("query", "key", "bank"), f"*{name}") | ARGUMENTS
    types |= dict.fromkeys(INTEGERS, "i32")
    values = {
        "SELECTION": (selection or "bernoulli") if total else "all",
        "MINE": mine, "SUM": total, "FAST": dtype is not torch.float16,
        "BM": block.rows, "BN": block.cols, "DPAD": dim, "DBLOCK": block.columns,
        "STAGES": block.stages,
    }  # fmt: skip
    if arch == "sm_90" and dim <= 256:
        types["bank_tiles"] = f"tensordesc<{name}[{block.cols}, {dim}]>"
    else:
        values["bank_tiles"] = None
    values |= dict.fromkeys(() if total else UNUSED_BY_MINING)
    values |= dict.fromkeys(() if mine else UNUSED_BY_SUMS)
    names = bank_pass_kernel.arg_names
    signature = {n: "constexpr" if n in values else types[n] for n in names}
    aligned = [["tt.divisibility", 16]]
    source = ASTSource(
        bank_pass_kernel,
        signature,
        constexprs={(names.index(n),): value for n, value in values.items()},
        attrs={
            (i,): aligned for i, n in enumerate(names) if signature[n].startswith("*") or n == "D"
        },
    )
    target = (
        GPUTarget("hip", arch, 64)
        if arch.startswith("gfx")
        else GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    )
    options = {"num_warps": block.warps, "enable_fp_fusion": True}
    return triton.compile(source, target=target, options=options), block


def nvidia_report(kernel, block) -> Report:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", cubin)
        sass = _tool("nvdisasm", "-c", cubin)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    loop = _inner_loop(sass)
    elements = block.rows * block.cols / (32 * block.warps)
    kinds = collections.Counter(".".join(op.split(".")[: 2 if "WIDE" in op else 1]) for op in loop)
    products = sum(op.startswith("HGMMA") for op in loop)
    waits = sum(op.startswith("WARPGROUP.DEPBAR") for op in loop)
    return Report(
        registers,
        stack,
        sum(op.startswith(("LDL", "STL")) for op in loop),
        kernel.metadata.shared,
        len(loop) / elements,
        {kind: n / elements for kind, n in kinds.most_common()},
        waits if products and waits > products // 2 else 0,
    )


def amd_report(kernel) -> dict[str, int]:
    """From the kernel's metadata: vector registers, spills, stack."""
    fields = ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    text = kernel.asm["amdgcn"]
    return {name: int(re.search(rf"\.{name}:\s+(\d+)", text)[1]) for name in fields}


def _tool(name: str, *arguments) -> str:
    return subprocess.run(
        [TOOLS / name, *arguments], capture_output=True, text=True, check=True
    ).stdout


def _inner_loop(sass: str) -> list[str]:
    """Instructions of the first loop with tensor-core or FMA products, the loop over full tiles."""
    ops, labels, loops = [], {}, []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(ops)
        elif text := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\S+)(.*);", line):
            ops.append(text[1])
            jump = re.search(r"`\((\.L_\w+)\)", text[2])
            if text[1].startswith("BRA") and jump and labels.get(jump[1], len(ops)) < len(ops) - 40:
                loops.append((labels[jump[1]], len(ops)))
    first, last = min(
        loop for loop in loops if any("MMA" in op or op == "FFMA" for op in ops[slice(*loop)])
    )
    return ops[first:last]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("arch", nargs="*", default=["sm_90", "sm_80", "gfx942"])
    parser.add_argument("--kinds", action="store_true", help="instructions by kind")
    arguments = parser.parse_args()
    os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp())
    for arch in arguments.arch:
        for dim in (64, 128, 256):
            fused = tile(torch.bfloat16, dim, chip(arch)).fused
            for mine, total in launches(fused, True, True):
                kernel, block = compile_pass(arch, torch.bfloat16, dim, mine, total)
                title = f"{arch} bf16 D={dim} mine={mine:d} sum={total:d} {tuple(block[:4])}"
                if arch.startswith("gfx"):
                    print(title, amd_report(kernel))
                    continue
                *numbers, kinds, serial = nvidia_report(kernel, block)
                words = "registers {} stack {} spills {} shared {} per element {:.1f} serial {}"
                print(title, words.format(*numbers, serial))
                if arguments.kinds:
                    print("   ", ", ".join(f"{kind} {n:.2f}" for kind, n in kinds.items()))


if __name__ == "__main__":
    main()
