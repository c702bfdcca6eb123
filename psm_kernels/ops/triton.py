"""The `triton` backend: every GPU that Triton supports, and its interpreter on the CPU."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import NamedTuple

import torch
from torch import Tensor

MAX_K = 1024
CELL = 64
LOG2E = 1.4426950408889634


def unavailable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if _interpreted():
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
    sums = (s_pos, LOG2E / temperature, selection, -a * LOG2E, b, rng_state, row_offset)
    return _run(query, key, bank, count, topk, sums, col_offset)


def bank_topk(query: Tensor, bank: Tensor, k: int, count: Tensor) -> tuple[Tensor, Tensor]:
    _check("k", k)
    return _run(None, query, bank, count, k, None, 0)[4:]


class Tile(NamedTuple):
    rows: int  # of queries
    cols: int  # of bank slots
    warps: int
    stages: int  # bank tiles in flight
    resident: int  # programs on one multiprocessor, for the number of splits


def tile(dtype: torch.dtype, padded: int) -> Tile:
    """Block sizes: no spills and the fewest instructions per element in `benchmarks/sass.py`."""
    if dtype is torch.float32:  # true fp32 products run on the vector units
        return Tile(32, 32, 4, 2, 3)
    if padded <= 128:
        return Tile(64, 64, 4, 3, 2)
    return Tile(64, 64, 8, 2, 1)


def _run(query, key, bank, count, k, sums, col_offset) -> tuple[Tensor, ...]:
    from psm_kernels.ops.triton_kernels import bank_pass_kernel
    from psm_kernels.ops.triton_merge import merge_kernel

    size, dim = bank.shape
    batch = (key if query is None else query).shape[0]
    padded = _power_of_2(dim, 16)
    rows, cols, warps, stages, resident = tile(bank.dtype, padded)
    cells = -(-(size + 15) // CELL)
    blocks = -(-batch // rows)
    splits = _splits(blocks, cells, resident, bank.device)
    s_pos, scale, selection, decay, b, rng_state, row_offset = sums or (
        None, 0.0, "all", 0.0, 0.0, None, 0,
    )  # fmt: skip

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=bank.device)

    cell_max = new(batch, cells) if k else None
    part_stats = new(batch, 4, splits) if sums else None
    part_mean = new(batch, splits, dim) if sums else None
    neg_lse, neg_sq_lse, neg_count = new(3, batch) if sums else [None] * 3
    neg_mean = new(batch, dim) if sums else None
    topk_sim, topk_index = new(batch, k), new(batch, k, dtype=torch.int64)

    # Two sets of rows and their bank tile do not fit beside each other for wide rows.
    together = bool(sums and k) and padded <= 256
    for mine, total in [(True, True)] if together else [(True, False), (False, True)]:
        if (mine and not k) or (total and not sums):
            continue
        bank_pass_kernel[(blocks * splits,)](
            query, key, bank, None, count, s_pos, rng_state, cell_max, part_stats, part_mean,
            batch, size, dim, cells, splits, scale, decay, b, row_offset, col_offset,
            SELECTION=selection if total else "all", MINE=mine, SUM=total,
            FAST=bank.dtype is not torch.float16,  # unshifted weights leave its range
            BM=rows, BN=cols, DPAD=padded, DBLOCK=padded, STAGES=stages, num_warps=warps,
        )  # fmt: skip
    kp = _power_of_2(k, 2)
    merge_kernel[(batch,)](
        part_stats, part_mean, neg_lse, neg_sq_lse, neg_count, neg_mean,
        key, bank, count, cell_max, topk_sim, topk_index, size, dim, cells, splits, k, col_offset,
        MINE=k > 0, SUM=sums is not None, SPLITS=32 if padded <= 128 else 16, DPAD=padded,
        KP=kp, DBLOCK=min(padded, 64), CHUNK=max(1024, kp),
        GROUP=max(4, kp // CELL), num_warps=4,
    )  # fmt: skip
    return neg_lse, neg_mean, neg_sq_lse, neg_count, topk_sim, topk_index


def _splits(blocks: int, tiles: int, resident: int, device: torch.device) -> int:
    """Parts of the bank, so that all programs are resident at once and none has under 4 tiles."""
    return max(1, min(_multiprocessors(device) * resident // blocks, tiles // 4))


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


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")
