"""The `triton` backend: every GPU that Triton supports, and its interpreter on the CPU."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
from typing import NamedTuple

import torch
from torch import Tensor

MAX_K = 1024
MAX_SIZE = 2**31 - 128  # slots are counted in 32 bits, with a tile to spare
MAX_FINISH_TOPK = 32  # one program of psm_finish holds the (topk, D) mined rows in registers
CELL = 64
LOG2E = 1.4426950408889634


def unavailable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if interpreted():
        return None
    if not (torch.cuda.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available())):
        return "no GPU was found, and TRITON_INTERPRET=1 is not set"
    return None


def bank_pass(
    query: Tensor,  # (B, D) in the bank's dtype
    key: Tensor | None,  # (B, D)
    bank: Tensor,  # (K, D)
    count: Tensor,  # ()
    s_pos: Tensor,  # (B,)
    temperature: float,
    selection: str,
    a: float,
    b: float,
    topk: int,
    rng_state: Tensor | None,  # (2,)
    row_offset: int,
    col_offset: int,
) -> tuple[Tensor, ...]:
    _check("topk", topk)
    sums = (s_pos, LOG2E / temperature, selection, sharpness_of(a), b, rng_state, row_offset)
    with _device_of(bank):
        return _run(query, key, bank, count, topk, sums, col_offset)


def bank_topk(query: Tensor, bank: Tensor, k: int, count: Tensor) -> tuple[Tensor, Tensor]:
    _check("k", k)
    with _device_of(bank):
        return _run(None, query, bank, count, k, None, 0)[4:]


def psm_finish(query: Tensor, *args, **settings) -> tuple[Tensor, Tensor, Tensor]:
    """Loss rows, their gradient by the unit query, statistics: `triton_finish.finish`."""
    from psm_kernels.ops.triton_finish import finish

    with _device_of(query):
        return finish(query, *args, **settings)


def sharpness_of(a: float) -> float:
    """r of p = 2^-(r s - r (s_pos + b))^2, which takes one FFMA and one FMUL. Only a very sharp p
    could tell that r (s_pos + b) is rounded; there r is a power of two, and nothing is."""
    sharpness = math.sqrt(a * LOG2E)
    return 2.0 ** min(round(math.log2(sharpness)), 60) if sharpness > 2**20 else sharpness


class Tile(NamedTuple):
    rows: int  # of queries
    cols: int  # of bank slots
    warps: int
    stages: int  # bank tiles in flight
    resident: int  # programs on one multiprocessor, for the number of splits
    fused: bool  # mining and sums in one pass over the bank
    columns: int  # of a block in score products


@functools.cache
def tile(dtype: torch.dtype, padded: int, chip: str, sums: bool = True) -> Tile:
    """Block sizes without spills and with few instructions per element: `benchmarks/sass.py`."""
    if not sums and chip == "hopper" and dtype is not torch.float32 and padded <= 256:
        return Tile(128, 128, 8, 2, 1, False, padded)  # the sums' registers hold a wider tile
    if dtype is torch.float32:  # true fp32 products run on the vector units
        return Tile(32 if padded <= 128 else 16, 16, 4, 1, 2, padded <= 256, 16)
    if padded > 256:
        return Tile(64, 32, 8, 1, 1, False, 64)
    if chip == "hopper":
        if padded > 128:
            return Tile(128, 64, 8, 2, 1, False, padded)
        return Tile(64, 64, 4, 3, 2, True, padded)
    if chip == "hip" or padded <= 64:
        return Tile(64, 64 if padded <= 128 else 32, 4, 2, 2, padded <= 128, padded)
    if padded > 128 and sums:
        return Tile(64, 64, 8, 2, 1, False, 64)
    if padded > 128:
        return Tile(64, 64, 4, 2, 2, False, 64)  # 7.4 instructions, 9.9 with 8 warps
    return Tile(128, 64, 8, 2, 1, False, padded)


def launches(fused: bool, mine: bool, total: bool) -> list[tuple[bool, bool]]:
    """What each launch of the pass does: (mine, sum)."""
    if fused and mine and total:
        return [(True, True)]
    return [(True, False)] * mine + [(False, True)] * total


def _run(query, key, bank, count, k, sums, col_offset) -> tuple[Tensor, ...]:
    from psm_kernels.ops.triton_kernels import bank_pass_kernel
    from psm_kernels.ops.triton_merge import merge_kernel

    size, dim = bank.shape
    if size > MAX_SIZE:
        raise ValueError(f"bank: got {size} rows, the triton backend takes at most {MAX_SIZE}")
    batch = (key if query is None else query).shape[0]
    padded = _power_of_2(dim, 16)
    chip = _chip(bank.device)
    cells = -(-(size + 15) // CELL)
    block = tile(bank.dtype, padded, chip)
    s_pos, scale, selection, sharpness, b, rng_state, row_offset = sums or (
        None, 0.0, "all", 0.0, 0.0, None, 0,
    )  # fmt: skip

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=bank.device)

    cell_max = new(batch, cells) if k else None
    parts = None
    # Three tensors, not views of one: outputs of a registered operator may not alias.
    neg_lse, neg_sq_lse, neg_count = (new(batch) if sums else None for _ in range(3))
    neg_mean = new(batch, dim) if sums else None
    topk_sim, topk_index = new(batch, k), new(batch, k, dtype=torch.int64)

    for mine, total in launches(block.fused, k > 0, sums is not None):
        rows, cols, warps, stages, resident, _, columns = tile(bank.dtype, padded, chip, total)
        blocks = -(-batch // rows)
        splits = _splits(blocks, cells, resident, bank.device)
        if total:
            parts = new(batch, splits, dim + 4)
        descriptor = _descriptor(bank, cols, padded) if chip == "hopper" else None
        # What a launch does not use is None, so that every mining launch is one compilation.
        bank_pass_kernel[(blocks * splits,)](
            query if total else None, key if mine else None, bank, descriptor, count,
            s_pos if total else None, rng_state if total else None,
            cell_max if mine else None, parts,
            batch, size, dim, cells, splits, scale, sharpness, b, row_offset, col_offset,
            SELECTION=selection if total else "all", MINE=mine, SUM=total,
            FAST=bank.dtype is not torch.float16,  # unshifted weights leave its range
            BM=rows, BN=cols, DPAD=padded, DBLOCK=columns, STAGES=stages,
            num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
    kp = _power_of_2(k, 2)
    merge_kernel[(batch,)](
        parts, neg_lse, neg_sq_lse, neg_count, neg_mean,
        key, bank, count, cell_max, topk_sim, topk_index, size, dim, cells, splits, k, col_offset,
        MINE=k > 0, SUM=sums is not None, SPLITS=32 if padded <= 128 else 16, DPAD=padded,
        KP=kp, DBLOCK=min(padded, 64), CHUNK=max(1024, kp),
        GROUP=max(4, kp // CELL), num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return neg_lse, neg_mean, neg_sq_lse, neg_count, topk_sim, topk_index


def weighted_pass(
    query: Tensor,  # (B, D)
    bank: Tensor,  # (K, D)
    count: Tensor,  # ()
    temperature: float,
    affine: Tensor,  # (5, B)
    rho: Tensor,  # (K,)
) -> tuple[Tensor, Tensor, Tensor]:
    """See `psm_kernels.ops.affine.weighted_pass`."""
    from psm_kernels.ops.triton_affine import weighted_pass_kernel
    from psm_kernels.ops.triton_merge import merge_kernel

    (batch, dim), size = query.shape, len(bank)
    padded = _power_of_2(dim, 16)
    rows, cols, warps, stages, resident, _, columns = tile(bank.dtype, padded, _chip(bank.device))
    blocks = -(-batch // rows)
    splits = _splits(blocks, -(-size // CELL), resident, bank.device)
    parts = torch.empty(batch, splits, dim + 4, device=bank.device)
    log_sum, unused, weight = (torch.empty(batch, device=bank.device) for _ in range(3))
    mean = torch.empty(batch, dim, device=bank.device)
    with _device_of(bank):
        weighted_pass_kernel[(blocks * splits,)](
            query, bank, count, affine, rho, parts,
            batch, size, dim, splits, LOG2E / temperature,
            BM=rows, BN=cols, DPAD=padded, DBLOCK=columns, STAGES=stages,
            num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
        merge_kernel[(batch,)](
            parts, log_sum, unused, weight, mean,
            None, bank, count, None, None, None, size, dim, 0, splits, 0, 0,
            MINE=False, SUM=True, SPLITS=32 if padded <= 128 else 16, DPAD=padded,
            KP=2, DBLOCK=min(padded, 64), CHUNK=1024, GROUP=4, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return log_sum, mean, weight


def _device_of(tensor: Tensor):
    """Triton launches on the current device, which need not be the tensor's."""
    index = tensor.device.index
    if tensor.device.type == "cpu" or index == torch.accelerator.current_device_index():
        return contextlib.nullcontext()
    return torch.accelerator.device_index(index)


def _splits(blocks: int, tiles: int, resident: int, device: torch.device) -> int:
    """Parts of the bank, so that all programs are resident at once and none has under 4 tiles."""
    return max(1, min(_multiprocessors(device) * resident // blocks, tiles // 4))


@functools.cache
def _chip(device: torch.device) -> str:
    """ "hopper" has warp-group products and TMA; Blackwell's are others, and count as "cuda"."""
    if device.type == "cuda" and torch.version.hip is None:
        return "hopper" if torch.cuda.get_device_capability(device)[0] == 9 else "cuda"
    return "hip" if device.type == "cuda" else device.type


def _descriptor(bank: Tensor, rows: int, padded: int):
    """A tensor descriptor of the bank for TMA, whose rows must be multiples of 16 bytes."""
    if bank.stride(0) * bank.element_size() % 16 or bank.data_ptr() % 16 or padded > 256:
        return None
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(bank, [rows, padded])


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return 2
    if device.type == "xpu":
        return torch.xpu.get_device_properties(device).gpu_subslice_count
    return torch.cuda.get_device_properties(device).multi_processor_count


def _check(name: str, k: int) -> None:
    if k > MAX_K:
        raise ValueError(
            f"{name}: got {k}, the triton backend takes at most {MAX_K}; 'cpp' and 'reference' "
            "take more"
        )


def _power_of_2(n: int, least: int) -> int:
    return max(least, 1 << (n - 1).bit_length()) if n else least


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")
