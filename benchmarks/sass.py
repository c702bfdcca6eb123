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

from psm_kernels.backends.triton.config import CELL, tile
from psm_kernels.backends.triton.many import cells_kernel, order_kernel
from psm_kernels.backends.triton.mine import mine_kernel
from psm_kernels.backends.triton.sums import sum_kernel

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
MAX_DIM = 512  # of the sums
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARGUMENTS = {
    "count": "*i64", "s_pos": "*fp32", "rng_state": "*i64", "cell_max": "*fp32",
    "parts": "*fp32", "scale": "fp32", "sharpness": "fp32", "b": "fp32",
    "row_offset": "i64", "col_offset": "i64", "slots": "*i64", "ids": "*i64", "bank_ids": "*i64",
    "scratch": "*i64", "chosen": "*i32", "entries": "*i64", "topk_sim": "*fp32",
    "topk_index": "*i64",
    "slot_bias": "*fp32",
}  # fmt: skip
INTEGERS = ("B", "K", "D", "cells", "splits", "length", "wanted", "n", "k")
ALIGNED = (  # by 16: what a launch relies on
    "query", "key", "bank", "cell_max", "parts", "D",
    "scratch", "chosen", "entries", "topk_sim", "topk_index",
)  # fmt: skip


class Report(NamedTuple):
    registers: int
    stack: int  # bytes, spills included
    spills: int  # loads and stores of the inner loop
    shared: int  # bytes
    per_element: float  # instructions of the inner loop
    rare: float  # that only tiles with listed slots take, each counted once
    kinds: dict[str, float]
    serial: int


def chip(arch: str) -> str:
    return "hip" if arch.startswith("gfx") else {"sm_90": "hopper"}.get(arch, "cuda")


def compile_pass(
    arch: str,
    dtype: torch.dtype,
    dim: int,
    sums: bool,
    selection: str = "bernoulli",
    lists: bool | None = None,
    ids: bool = False,
    cell: int = CELL,
    bias: bool = False,
):
    """The compiled kernel of one launch, mining or sums, as the backend makes it. `lists`: rows
    have listed slots to leave out of the sums, by default the mined ones."""
    kernel = sum_kernel if sums else mine_kernel
    block = tile(dtype, dim, chip(arch), sums)
    name = TYPES[dtype]
    types = dict.fromkeys(("query", "key", "bank"), f"*{name}") | ARGUMENTS
    types |= dict.fromkeys(INTEGERS, "i32")
    values = block.constants(dim)
    if sums:
        values |= {"SELECTION": selection, "FAST": dtype is not torch.float16}
        values |= {} if lists is None or lists else {"slots": None}
        values |= {} if bias else {"slot_bias": None}
    else:
        values["CELL"] = cell
    if arch == "sm_90" and dim <= 256:
        types["bank_tiles"] = f"tensordesc<{name}[{block.cols}, {dim}]>"
    else:
        values["bank_tiles"] = None
    values |= {} if ids else {"ids": None, "bank_ids": None}
    return _compile(arch, kernel, types, values, block.warps), block


def compile_many(arch: str, chunk: int) -> list:
    """The two kernels that put the best of many in order: cells, and their slots."""
    types = ARGUMENTS | dict.fromkeys(INTEGERS, "i32")
    warps = min(16, chunk // 256)
    return [
        _compile(arch, kernel, types, {"CHUNK": chunk} | cell, warps)
        for kernel, cell in ((cells_kernel, {"CELL": 16}), (order_kernel, {}))
    ]


def _compile(arch: str, kernel, types: dict[str, str], values: dict, warps: int):
    names = kernel.arg_names
    signature = {n: "constexpr" if n in values else types[n] for n in names}
    aligned = [["tt.divisibility", 16]]
    source = ASTSource(
        kernel,
        signature,
        constexprs={(names.index(n),): value for n, value in values.items()},
        attrs={(i,): aligned for i, n in enumerate(names) if n in ALIGNED},
    )
    target = (
        GPUTarget("hip", arch, 64)
        if arch.startswith("gfx")
        else GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    )
    options = {"num_warps": warps, "enable_fp_fusion": True}
    return triton.compile(source, target=target, options=options)


def nvidia_report(kernel, block) -> Report:
    registers, stack = usage(kernel)
    sass = _tool(kernel, "nvdisasm", "-c")
    loop, rare = _inner_loop(sass)
    elements = block.rows * block.cols / (32 * block.warps)
    kinds = collections.Counter(".".join(op.split(".")[: 2 if "WIDE" in op else 1]) for op in loop)
    products = sum(op.startswith("HGMMA") for op in loop)
    waits = sum(op.startswith("WARPGROUP.DEPBAR") for op in loop)
    return Report(
        registers,
        stack,
        sum(op.startswith(("LDL", "STL")) for op in loop + rare),
        kernel.metadata.shared,
        len(loop) / elements,
        len(rare) / elements,
        {kind: n / elements for kind, n in kinds.most_common()},
        waits if products and waits > products // 2 else 0,
    )


def amd_report(kernel) -> dict[str, int]:
    """From the kernel's metadata: vector registers, spills, stack."""
    fields = ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    text = kernel.asm["amdgcn"]
    return {name: int(re.search(rf"\.{name}:\s+(\d+)", text)[1]) for name in fields}


def usage(kernel) -> tuple[int, int]:
    """Registers of a thread and bytes of its stack."""
    text = _tool(kernel, "cuobjdump", "-res-usage")
    return tuple(map(int, re.search(r"REG:(\d+) STACK:(\d+)", text).groups()))


def _tool(kernel, name: str, *arguments: str) -> str:
    """What a tool says of the kernel's machine code."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        command = [TOOLS / name, *arguments, cubin]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _inner_loop(sass: str) -> tuple[list[str], list[str]]:
    """Instructions of the first loop with tensor-core or FMA products, the loop over full tiles:
    those of every tile, and those that a branch keeps for a few, with listed slots."""
    ops, labels, jumps = [], {}, {}
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(ops)
        elif text := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\S+)(.*);", line):
            if text[1] == "BRA" and (target := re.search(r"`\((\.L_\w+)\)", text[2])):
                jumps[len(ops)] = target[1]
            ops.append(text[1])
    jumps = {at: labels[name] for at, name in jumps.items()}
    first, last = min(
        (target, at)
        for at, target in jumps.items()
        if target < at - 40 and any("MMA" in op or op == "FFMA" for op in ops[target:at])
    )
    always, rarely, here = [], [], first
    while here <= last:
        always.append(ops[here])
        there = jumps.get(here, 0)
        if not here < there <= last or any("MMA" in op for op in ops[here:there]):
            there = here + 1
        rarely += ops[here + 1 : there]
        here = there
    return always, rarely


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("arch", nargs="*", default=["sm_90", "sm_80", "gfx942"])
    parser.add_argument("--kinds", action="store_true", help="instructions by kind")
    arguments = parser.parse_args()
    os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp())
    for arch in arguments.arch:
        for dim in (64, 128, 256, 1024):
            for sums in (False, True)[: 1 if dim > MAX_DIM else 2]:
                kernel, block = compile_pass(arch, torch.bfloat16, dim, sums)
                title = f"{arch} bf16 D={dim} {'sums' if sums else 'mining'} {tuple(block[:4])}"
                if arch.startswith("gfx"):
                    print(title, amd_report(kernel))
                    continue
                *numbers, kinds, serial = nvidia_report(kernel, block)
                words = (
                    "registers {} stack {} spills {} shared {} per element {:.1f} rare {:.1f} "
                    "serial {}"
                )
                print(title, words.format(*numbers, serial))
                if arguments.kinds:
                    print("   ", ", ".join(f"{kind} {n:.2f}" for kind, n in kinds.items()))


if __name__ == "__main__":
    main()
