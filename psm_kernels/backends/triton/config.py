"""How launches are cut: chip, tile sizes, splits. Host code alone; imports no Triton."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from psm_kernels.backends.base import Exclude

MAX_SLOTS = 2**31 - 128  # slots are counted in 32 bits, with a tile to spare
CELL = 64  # slots that share one maximum in mining, where few are mined
FEW = 8  # most slots per row that are mined in rounds of one each
TURN = 128 << 20  # bytes of scratch that grows with rows: more rows take turns
LOG2E = 1.4426950408889634


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


@functools.cache
def chip(device: torch.device) -> str:
    """ "hopper" has warp-group products and TMA; Blackwell's are others, and count as "cuda"."""
    if device.type == "cuda" and torch.version.hip is None:
        return "hopper" if torch.cuda.get_device_capability(device)[0] == 9 else "cuda"
    return "hip" if device.type == "cuda" else device.type


@functools.cache
def multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return 2
    if device.type == "xpu":
        return torch.xpu.get_device_properties(device).gpu_subslice_count
    return torch.cuda.get_device_properties(device).multi_processor_count


class Tile(NamedTuple):
    rows: int  # of queries
    cols: int  # of bank slots
    warps: int
    stages: int  # bank tiles in flight
    resident: int  # programs on one multiprocessor, for the number of splits
    columns: int  # of a block in score products

    def constants(self, padded: int) -> dict[str, int]:
        """What kernels over bank tiles are compiled for."""
        return {
            "BM": self.rows, "BN": self.cols, "DPAD": padded, "DBLOCK": self.columns,
            "STAGES": self.stages,
        }  # fmt: skip


@functools.cache
def tile(dtype: torch.dtype, padded: int, chip: str, sums: bool = True) -> Tile:
    """Block sizes without spills and with few instructions per element: `benchmarks/sass.py`."""
    if dtype is torch.float32:  # true fp32 products run on the vector units
        if not sums:
            return Tile(64, 64, 4, 1, 2, 16)
        return Tile(32 if padded <= 128 else 16, 16, 4, 1, 2, 16)
    if not sums and padded > (256 if chip == "hopper" else 128):  # a product, column by column
        return Tile(128, 128, 8, {"hopper": 4, "hip": 2}.get(chip, 3), 1, 64)
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
        return Tile(128, 64, 4, 2, 2, padded)
    if padded <= 64:
        return Tile(64, 64, 4, 2, 2, padded)
    if padded <= 128:  # 64 columns spill where listed slots are left out
        return Tile(128, 32, 8, 2, 1, padded)
    return Tile(64, 64, 8, 2, 1, 64)


def tile_of(bank: Tensor, sums: bool) -> Tile:
    return tile(bank.dtype, power_of_2(bank.shape[1], 16), chip(bank.device), sums)


def cell(wanted: int, slots: int, dim: int, element: int) -> int:
    """Slots of a cell, of which `wanted` are read again for each row. A cell's maximum costs about
    20 bytes (written once, read about four times, in time that its arithmetic doubles)."""
    again = wanted * (dim * element + 16)
    return min((16, 32, 64), key=lambda c: 20 * slots / c + again * c)


def turns(rows: int, bytes_each: int, unit: int = 16) -> Iterator[slice]:
    """Rows in whole units, as many at a time as scratch has room for."""
    step = max(TURN // bytes_each // unit * unit, unit)
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))


class Cut(NamedTuple):
    """One launch over all blocks of rows and all splits of the bank."""

    grid: tuple[int]
    splits: int
    descriptor: object | None  # of the bank's tiles
    options: dict  # the kernel's constants and the compiler's options


def cut(query: Tensor, bank: Tensor, sums: bool = True) -> Cut:
    if len(bank) > MAX_SLOTS:
        raise ValueError(f"bank: got {len(bank)} rows, backend 'triton' takes at most {MAX_SLOTS}")
    padded = power_of_2(bank.shape[1], 16)
    block = tile_of(bank, sums)
    blocks = -(-query.shape[0] // block.rows)
    unit = block.cols if sums else max(block.cols, CELL)
    at_once = multiprocessors(bank.device) * block.resident
    parts = splits(blocks, -(-bank.shape[0] // unit), at_once, 2.4 / unit if sums else 0.0)
    options = block.constants(padded) | {"num_warps": block.warps, "enable_fp_fusion": True}
    return Cut((blocks * parts,), parts, _descriptor(bank, block.cols, padded), options)


@functools.cache
def splits(blocks: int, tiles: int, at_once: int, merge: float) -> int:
    """Parts of the bank, the fewest that end within 1 % of the earliest. In times of a tile: a
    program takes its tiles and one for its begin and end, `at_once` of them run side by side, and
    the sums of a block's part are merged in `merge`: 8 rows D bytes at 5 TB/s of L2 against
    4 rows cols D operations at 6 TFLOP/s of a Hopper's multiprocessor are 2.4 / cols."""

    def end(parts: int) -> float:
        return -(-blocks * parts // at_once) * (-(-tiles // parts) + 1) + merge * blocks * parts

    ends = [end(parts) for parts in range(1, max(1, min(tiles, 4 * at_once // blocks)) + 1)]
    late = 1.01 * min(ends)
    return 1 + next(i for i, time in enumerate(ends) if time <= late)


def _descriptor(bank: Tensor, rows: int, padded: int) -> object | None:
    """A tensor descriptor of the bank for TMA, whose rows must be multiples of 16 bytes."""
    if chip(bank.device) != "hopper":
        return None
    if bank.stride(0) * bank.element_size() % 16 or bank.data_ptr() % 16 or padded > 256:
        return None
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(bank, [rows, padded])


def new(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def listed(exclude: Exclude) -> int:
    """How many slots are named for each row."""
    return 0 if exclude.slots is None else exclude.slots.shape[1]


def current(tensor: Tensor) -> torch.accelerator.device_index:
    """Triton launches on the current device, which need not be the tensor's."""
    device = tensor.device
    return torch.accelerator.device_index(None if device.type == "cpu" else device.index)


def power_of_2(n: int, least: int) -> int:
    return max(least, 1 << (n - 1).bit_length()) if n else least
