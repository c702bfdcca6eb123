"""Mining in Triton: the maximum of each row's cells of 64 slots, then the exact top-k out of the
best cells."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from psm_kernels.backends.base import Exclude
from psm_kernels.backends.triton import config, tiles


@triton.jit
def _scan(
    running, block, bank, bank_tiles, ids, bank_ids, cell_max, first, last, size, D, cells,
    GENERAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DPAD: tl.constexpr,
    DBLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write the cell maxima of tiles [first, last), partly valid ones if GENERAL; `running` is that
    of a cell of several tiles, so far."""
    CELL_TILES: tl.constexpr = (63 + BN) // BN
    rows, row_valid = block[0], block[1]
    for tile in tl.range(first, last, num_stages=STAGES):
        start = tile * BN
        slot_valid = start + tl.arange(0, BN) < size
        _, s = tiles.scores(
            block, bank, bank_tiles, start, slot_valid, D, GENERAL, BM, BN, DPAD, DBLOCK
        )
        if GENERAL:
            s = tl.where(slot_valid[None, :], s, -float("inf"))
        if ids is not None:
            s = tl.where(tiles.own(ids, bank_ids, start, slot_valid, BN), -float("inf"), s)
        if BN > 64:
            cell = tile * (BN // 64) + tl.arange(0, BN // 64)[None, :]
            maxima = tl.max(tl.reshape(s, (BM, BN // 64, 64)), 2)
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
    BM: tl.constexpr, BN: tl.constexpr, DPAD: tl.constexpr, DBLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One block of rows against one split of the bank."""
    split, block = tiles.block_of_rows(key, B, D, BM, DPAD, DBLOCK)
    row_ids = None
    if ids is not None:
        row_ids = tiles.per_row(ids, block)
    size = tl.minimum(tl.load(count), K).to(tl.int32)
    CELL_TILES: tl.constexpr = (63 + BN) // BN
    first, last = tiles.tiles_of_split(tl.cdiv(size, BN), split, splits, CELL_TILES)
    full = tl.maximum(tl.minimum(size // BN, last), first)  # tiles [first, full)
    running = tl.full((BM,), -float("inf"), tl.float32)
    running = _scan(
        running, block, bank, bank_tiles, row_ids, bank_ids, cell_max,
        first, full, size, D, cells, False, BM, BN, DPAD, DBLOCK, STAGES,
    )  # fmt: skip
    _scan(
        running, block, bank, bank_tiles, row_ids, bank_ids, cell_max,
        full, last, size, D, cells, True, BM, BN, DPAD, DBLOCK, 1,
    )  # fmt: skip


@triton.jit
def _pack(value, index):
    """(value, index) as int64 that sorts by value; equal values, -0 and 0 too, smaller index first.
    NaN counts as the largest value, as in torch.topk."""
    value = tl.where(value == 0.0, 0.0, value)
    bits = value.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    bits = tl.where(value != value, 0x7FC00000, bits)
    return (bits.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def _index(packed):
    return 0x7FFFFFFF - (packed & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def _value(packed):
    bits = (packed >> 32).to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def _best(best, new, k, KP: tl.constexpr, MISSING: tl.constexpr):
    """The k largest of both, descending, in KP >= k entries. (tl.topk would take k = 200 in fewer
    steps, and minutes to compile.)"""
    rank = tl.arange(0, KP)
    merged = tl.full((KP,), MISSING, tl.int64)
    for r in range(0, k):  # each round takes the largest; packed values are distinct
        largest = tl.maximum(tl.max(best, 0), tl.max(new, 0))
        merged = tl.where(rank == r, largest, merged)
        best = tl.where(best == largest, MISSING, best)
        new = tl.where(new == largest, MISSING, new)
    return merged


@triton.jit(do_not_specialize=["count", "slots", "length", "ids", "bank_ids", "K", "cells", "k"])
def select_kernel(
    key,  # (B, D)
    bank,  # (K, D)
    count,  # ()
    slots,  # (B, length), or None
    ids, bank_ids,  # (B,) and (K,), or None
    cell_max,  # (B, cells)
    topk_sim, topk_index,  # (B, k)
    K: tl.int32, D: tl.int32, cells: tl.int32, k: tl.int32, length: tl.int32,
    KP: tl.constexpr, DBLOCK: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One row.

    Were nothing hidden, the k best slots would lie in the k cells with the largest maxima: were
    one in another cell, each of the k would hold a slot that is better, or equal and smaller. Of
    k + length cells at most `length` have their maximum in a listed slot, so k others are left of
    which the same holds. (The maxima know of ids.) Scan those cells again.
    """
    CELL: tl.constexpr = 64  # slots that share one maximum
    MISSING: tl.constexpr = -(2**63)  # sorts below every packed value
    row = tl.program_id(0).to(tl.int64)
    size = tl.minimum(tl.load(count), K).to(tl.int32)
    used = tl.cdiv(size, CELL)
    wanted = k + length
    rank = tl.arange(0, KP)
    best = tl.full((KP,), MISSING, tl.int64)
    for first in range(0, used, CHUNK):
        cell = first + tl.arange(0, CHUNK)
        maxima = tl.load(cell_max + row * cells + cell, mask=cell < used, other=0.0)
        new = tl.where(cell < used, _pack(maxima, cell), MISSING)
        best = _best(best, new, wanted, KP, MISSING)
    chosen = tl.where(best != MISSING, _index(best), -1)  # (KP,)
    hidden = tl.zeros((KP,), tl.int64)  # a bit for each slot of the cell
    if slots is not None:
        lists = slots + row * length + tl.zeros((KP,), tl.int32)
        hidden, _ = tiles.listed(lists, length, chosen.to(tl.int64) * CELL, CELL)

    best = tl.full((KP,), MISSING, tl.int64)
    d = tl.arange(0, DBLOCK)
    lane = tl.arange(0, GROUP)
    in_cell = tl.arange(0, CELL)[None, :]
    for first in range(0, tl.minimum(wanted, used), GROUP):
        here = rank[:, None] == (first + lane)[None, :]
        cell = tl.max(tl.where(here, chosen[:, None], -1), 0)  # (GROUP,)
        bits = tl.sum(tl.where(here, hidden[:, None], 0), 0)
        slot = cell[:, None] * CELL + in_cell
        valid = (cell >= 0)[:, None] & (slot < size) & (((bits[:, None] >> in_cell) & 1) == 0)
        slot = tl.reshape(slot, (GROUP * CELL,))
        valid = tl.reshape(valid, (GROUP * CELL,))
        if ids is not None:
            EMPTY: tl.constexpr = -2
            held = tl.load(bank_ids + slot, mask=valid, other=EMPTY)
            valid = valid & (held != EMPTY) & (held != tl.load(ids + row))
        score = tl.zeros((GROUP * CELL,), tl.float32)
        for d0 in range(0, D, DBLOCK):
            d_valid = d0 + d < D
            m = tl.load(
                bank + slot.to(tl.int64)[:, None] * D + (d0 + d)[None, :],
                mask=valid[:, None] & d_valid[None, :],
                other=0.0,
            )  # (GROUP * CELL, DBLOCK)
            q = tl.load(key + row * D + d0 + d, mask=d_valid, other=0.0)
            score += tl.sum(m.to(tl.float32) * q.to(tl.float32)[None, :], 1)
        best = _best(best, tl.where(valid, _pack(score, slot), MISSING), k, KP, MISSING)
    found = best != MISSING
    out = row * k + rank
    tl.store(topk_sim + out, tl.where(found, _value(best), -float("inf")), mask=rank < k)
    tl.store(topk_index + out, tl.where(found, _index(best), -1).to(tl.int64), mask=rank < k)


def mine(
    key: Tensor, bank: Tensor, k: int, count: Tensor, exclude: Exclude
) -> tuple[Tensor, Tensor]:
    """Similarity and slot (B, k) of the rows nearest to `key`."""
    batch, (size, dim) = key.shape[0], bank.shape
    topk_sim = config.new(bank, batch, k)
    topk_index = config.new(bank, batch, k, dtype=torch.int64)
    if k == 0:
        return topk_sim, topk_index
    cells = -(-size // config.CELL)
    cell_max = config.new(bank, batch, cells)
    cut = config.cut(key, bank, sums=False)
    mine_kernel[cut.grid](
        key, bank, cut.descriptor, count, exclude.ids, exclude.bank_ids, cell_max,
        batch, size, dim, cells, cut.splits, **cut.options,
    )  # fmt: skip
    length = config.listed(exclude)
    chosen = config.power_of_2(k + length, 2)
    select_kernel[(batch,)](
        key, bank, count, exclude.slots, exclude.ids, exclude.bank_ids, cell_max,
        topk_sim, topk_index, size, dim, cells, k, length,
        KP=chosen, DBLOCK=min(config.power_of_2(dim, 16), 64), CHUNK=max(1024, chosen),
        GROUP=max(4, config.power_of_2(k, 2) // config.CELL), num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return topk_sim, topk_index
