"""Mining in Triton: the maximum of each row's cells of 16 to 64 slots, then the exact top-k out of
the best cells."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from psm_kernels.backends.base import Exclude
from psm_kernels.backends.triton import config, tiles
from psm_kernels.backends.triton.few import select_few
from psm_kernels.backends.triton.many import select_many


@triton.jit
def _scan(
    running, block, bank, bank_tiles, ids, bank_ids, cell_max, first, last, size, D, cells,
    GENERAL: tl.constexpr, CELL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    DPAD: tl.constexpr, DBLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write the cell maxima of tiles [first, last), partly valid ones if GENERAL; `running` is that
    of a cell of several tiles, so far."""
    CELL_TILES: tl.constexpr = (CELL - 1 + BN) // BN
    rows, row_valid = block[0], block[1]
    WIDE: tl.constexpr = DBLOCK != DPAD  # then the pipeline is that of the columns
    for tile in tl.range(first, last, num_stages=1 if WIDE else STAGES):
        start = tile * BN
        slot_valid = start + tl.arange(0, BN) < size
        if WIDE:
            s = tiles.products(block, bank, start, slot_valid, D, BM, BN, DBLOCK, STAGES)
        else:
            _, s = tiles.scores(
                block, bank, bank_tiles, start, slot_valid, D, GENERAL, BM, BN, DPAD, DBLOCK
            )
        if GENERAL:
            s = tl.where(slot_valid[None, :], s, -float("inf"))
        if ids is not None:
            s = tl.where(tiles.own(ids, bank_ids, start, slot_valid, BN), -float("inf"), s)
        if BN > CELL:
            cell = tile * (BN // CELL) + tl.arange(0, BN // CELL)[None, :]
            maxima = tl.max(tl.reshape(s, (BM, BN // CELL, CELL)), 2)
            out = cell_max + rows[:, None] * cells + cell
            tl.store(out, maxima, mask=row_valid[:, None] & (cell < cells))
        else:
            running = tl.where(tile % CELL_TILES == 0, -float("inf"), running)
            running = tl.maximum(running, tl.max(s, 1))
            tl.store(cell_max + rows * cells + tile // CELL_TILES, running, mask=row_valid)
    return running


# Neither a size of 1 nor one divisible by 16 is worth a compilation of its own, in any kernel.
@triton.jit(do_not_specialize=["count", "ids", "bank_ids", "B", "K", "cells", "splits"])
def mine_kernel(
    key,  # (B, D)
    bank,  # (K, D)
    bank_tiles,  # its tensor descriptor, or None
    count,  # ()
    ids, bank_ids,  # (B,) and (K,), or None
    cell_max,  # (B, cells)
    B: tl.int32, K: tl.int32, D: tl.int32, cells: tl.int32, splits: tl.int32,
    CELL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DPAD: tl.constexpr,
    DBLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One block of rows against one split of the bank."""
    split, block = tiles.block_of_rows(key, B, D, BM, DPAD, DBLOCK)
    row_ids = None
    if ids is not None:
        row_ids = tiles.per_row(ids, block)
    size = tl.minimum(tl.load(count), K).to(tl.int32)
    CELL_TILES: tl.constexpr = (CELL - 1 + BN) // BN
    first, last = tiles.tiles_of_split(tl.cdiv(size, BN), split, splits, CELL_TILES)
    full = tl.maximum(tl.minimum(size // BN, last), first)  # tiles [first, full)
    running = tl.full((BM,), -float("inf"), tl.float32)
    running = _scan(
        running, block, bank, bank_tiles, row_ids, bank_ids, cell_max,
        first, full, size, D, cells, False, CELL, BM, BN, DPAD, DBLOCK, STAGES,
    )  # fmt: skip
    _scan(
        running, block, bank, bank_tiles, row_ids, bank_ids, cell_max,
        full, last, size, D, cells, True, CELL, BM, BN, DPAD, DBLOCK, 1,
    )  # fmt: skip


def mine(
    key: Tensor, bank: Tensor, k: int, count: Tensor, exclude: Exclude
) -> tuple[Tensor, Tensor]:
    """Similarity and slot (B, k) of the rows nearest to `key`."""
    batch, (size, dim) = key.shape[0], bank.shape
    topk_sim = config.new(bank, batch, k)
    topk_index = config.new(bank, batch, k, dtype=torch.int64)
    if k == 0:
        return topk_sim, topk_index
    wanted = k + config.listed(exclude)
    few = wanted <= config.FEW
    cell = config.CELL if few else config.cell(wanted, size, dim, bank.element_size())
    cells = -(-size // cell)
    unit = config.tile_of(bank, sums=False).rows
    for rows in config.turns(batch, 4 * cells, unit):
        part, hidden = key[rows], exclude.of(rows)
        cell_max = config.new(bank, len(part), cells)
        cut = config.cut(part, bank, sums=False)
        mine_kernel[cut.grid](
            part, bank, cut.descriptor, count, hidden.ids, hidden.bank_ids, cell_max,
            len(part), size, dim, cells, cut.splits, CELL=cell, **cut.options,
        )  # fmt: skip
        select = select_few if few else select_many
        select(part, bank, count, hidden, cell_max, cell, topk_sim[rows], topk_index[rows])
    return topk_sim, topk_index
