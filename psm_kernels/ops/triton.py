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

from psm_kernels.ops import NOTHING, Exclude

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
    exclude: Exclude = NOTHING,
    exclude_mined: bool = False,
) -> tuple[Tensor, ...]:
    """See `psm_kernels.ops.bank_pass`: mined first, so that sums can leave out what was mined."""
    _check("topk", topk, bank)
    mined = bank_topk(query if key is None else key, bank, topk, count, exclude)
    if exclude_mined and topk:
        lists = [t for t in (exclude.slots, mined[1]) if t is not None]
        exclude = exclude._replace(slots=lists[0] if len(lists) == 1 else torch.cat(lists, 1))
    args = (LOG2E / temperature, selection, sharpness_of(a), b, rng_state, row_offset, col_offset)
    with _device_of(bank):
        return *_sums(query, bank, count, s_pos, exclude, *args), *mined


def bank_topk(
    query: Tensor, bank: Tensor, k: int, count: Tensor, exclude: Exclude = NOTHING
) -> tuple[Tensor, Tensor]:
    """See `psm_kernels.ops.bank_topk`."""
    _check("k", k, bank)
    with _device_of(bank):
        return _mine(query, bank, k, count, exclude)


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
    columns: int  # of a block in score products


@functools.cache
def tile(dtype: torch.dtype, padded: int, chip: str, sums: bool = True) -> Tile:
    """Block sizes without spills and with few instructions per element: `benchmarks/sass.py`."""
    if dtype is torch.float32:  # true fp32 products run on the vector units
        return Tile(32 if padded <= 128 else 16, 16, 4, 1, 2, 16)
    if padded > 256:
        return Tile(64, 32, 8, 1, 1, 64)
    if chip == "hopper":
        if not sums:  # the sums' registers hold a wider tile
            return Tile(128, 128, 8, 2, 1, padded)
        if padded > 128:
            return Tile(128, 64, 8, 2, 1, padded)
        return Tile(64, 64, 4, 3, 2, padded)
    if chip == "hip":
        return Tile(64, 64 if padded <= 128 else 32, 4, 2, 2, padded)
    if not sums:
        return Tile(128, 64, 4, 2, 2, padded if padded <= 128 else 64)
    if padded <= 64:
        return Tile(64, 64, 4, 2, 2, padded)
    if padded <= 128:  # 64 columns spill where listed slots are left out
        return Tile(128, 32, 8, 2, 1, padded)
    return Tile(64, 64, 8, 2, 1, 64)


def _mine(key, bank, k, count, exclude) -> tuple[Tensor, Tensor]:
    from psm_kernels.ops.triton_mine import mine_kernel, select_kernel

    batch, (size, dim) = key.shape[0], bank.shape
    topk_sim, topk_index = _new(bank, batch, k), _new(bank, batch, k, dtype=torch.int64)
    if k == 0:
        return topk_sim, topk_index
    padded, chip, cells = _power_of_2(dim, 16), _chip(bank.device), -(-size // CELL)
    cell_max = _new(bank, batch, cells)
    rows, cols, warps, stages, resident, columns = tile(bank.dtype, padded, chip, False)
    blocks = -(-batch // rows)
    splits = _splits(blocks, cells, resident, bank.device)
    mine_kernel[(blocks * splits,)](
        key, bank, _descriptor(bank, cols, padded), count, exclude.ids, exclude.bank_ids, cell_max,
        batch, size, dim, cells, splits,
        BM=rows, BN=cols, DPAD=padded, DBLOCK=columns, STAGES=stages,
        num_warps=warps, enable_fp_fusion=True,
    )  # fmt: skip
    length = _length(exclude)
    chosen = _power_of_2(k + length, 2)
    select_kernel[(batch,)](
        key, bank, count, exclude.slots, exclude.ids, exclude.bank_ids, cell_max,
        topk_sim, topk_index, size, dim, cells, k, length,
        KP=chosen, DBLOCK=min(padded, 64), CHUNK=max(1024, chosen),
        GROUP=max(4, _power_of_2(k, 2) // CELL), num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return topk_sim, topk_index


def _sums(
    query, bank, count, s_pos, exclude,
    scale, selection, sharpness, b, rng_state, row_offset, col_offset,
) -> tuple[Tensor, ...]:  # fmt: skip
    from psm_kernels.ops.triton_sums import sum_kernel

    batch, (size, dim) = query.shape[0], bank.shape
    padded = _power_of_2(dim, 16)
    rows, cols, warps, stages, resident, columns = tile(bank.dtype, padded, _chip(bank.device))
    blocks = -(-batch // rows)
    splits = _splits(blocks, -(-size // CELL), resident, bank.device)
    parts = _new(bank, batch, splits, dim + 4)
    sum_kernel[(blocks * splits,)](
        query, bank, _descriptor(bank, cols, padded), count, s_pos, rng_state,
        exclude.slots, exclude.ids, exclude.bank_ids, parts,
        batch, size, dim, splits, _length(exclude), scale, sharpness, b, row_offset, col_offset,
        SELECTION=selection, FAST=bank.dtype is not torch.float16,  # unshifted weights overflow it
        BM=rows, BN=cols, DPAD=padded, DBLOCK=columns, STAGES=stages,
        num_warps=warps, enable_fp_fusion=True,
    )  # fmt: skip
    return _merge(parts)


def _merge(parts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-sum-exp, mean, log-sum of the squares and count of all splits."""
    from psm_kernels.ops.triton_sums import merge_kernel

    (batch, splits, _), dim = parts.shape, parts.shape[2] - 4
    # Three tensors, not views of one: outputs of a registered operator may not alias.
    lse, sq_lse, count = (_new(parts, batch) for _ in range(3))
    mean = _new(parts, batch, dim)
    padded = _power_of_2(dim, 16)
    merge_kernel[(batch,)](
        parts, lse, sq_lse, count, mean, splits, dim,
        SPLITS=32 if padded <= 128 else 16, DPAD=padded, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return lse, mean, sq_lse, count


def weighted_pass(
    query: Tensor,  # (B, D)
    bank: Tensor,  # (K, D)
    count: Tensor,  # ()
    temperature: float,
    affine: Tensor,  # (5, B)
    rho: Tensor,  # (K,)
    exclude: Exclude = NOTHING,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `psm_kernels.ops.affine.weighted_pass`."""
    from psm_kernels.ops.triton_affine import weighted_pass_kernel

    (batch, dim), size = query.shape, len(bank)
    padded = _power_of_2(dim, 16)
    rows, cols, warps, stages, resident, columns = tile(bank.dtype, padded, _chip(bank.device))
    blocks = -(-batch // rows)
    splits = _splits(blocks, -(-size // CELL), resident, bank.device)
    parts = _new(bank, batch, splits, dim + 4)
    with _device_of(bank):
        weighted_pass_kernel[(blocks * splits,)](
            query, bank, count, affine, rho, exclude.slots, exclude.ids, exclude.bank_ids, parts,
            batch, size, dim, splits, _length(exclude), LOG2E / temperature,
            BM=rows, BN=cols, DPAD=padded, DBLOCK=columns, STAGES=stages,
            num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
        log_sum, mean, _, weight = _merge(parts)
    return log_sum, mean, weight


def _new(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def _length(exclude: Exclude) -> int:
    return 0 if exclude.slots is None else exclude.slots.shape[1]


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
    if _chip(bank.device) != "hopper":
        return None
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


def _check(name: str, k: int, bank: Tensor) -> None:
    if k > MAX_K:
        raise ValueError(
            f"{name}: got {k}, the triton backend takes at most {MAX_K}; 'cpp' and 'reference' "
            "take more"
        )
    if (size := bank.shape[0]) > MAX_SIZE:
        raise ValueError(f"bank: got {size} rows, the triton backend takes at most {MAX_SIZE}")


def _power_of_2(n: int, least: int) -> int:
    return max(least, 1 << (n - 1).bit_length()) if n else least


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")
