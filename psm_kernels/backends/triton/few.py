"""The best few slots of each row in Triton: rounds that take one each, out of the maxima of cells
and then out of the slots of the best cells, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from psm_kernels.backends.base import Exclude
from psm_kernels.backends.triton import config, tiles


@triton.jit
def pack(value, index):
    """(value, index) as uint64 that sorts by value; equal values, -0 and 0 too, smaller index
    first. NaN counts as the largest value, as in torch.topk. 0 is less than all: nothing."""
    value = tl.where(value == 0.0, 0.0, value)
    bits = value.to(tl.uint32, bitcast=True)
    bits = tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    bits = tl.where(value != value, 0xFFC00000, bits)
    return (bits.to(tl.uint64) << 32) | (0x7FFFFFFF - index).to(tl.uint64)


@triton.jit
def index_of(packed):
    """-1 for nothing."""
    return tl.where(packed == 0, -1, 0x7FFFFFFF - (packed & 0x7FFFFFFF).to(tl.int32))


@triton.jit
def value_of(packed):
    """-inf for nothing."""
    bits = (packed >> 32).to(tl.uint32)
    bits = tl.where(bits >= 0x80000000, bits & 0x7FFFFFFF, bits ^ 0xFFFFFFFF)
    return tl.where(packed == 0, -float("inf"), bits.to(tl.float32, bitcast=True))


@triton.jit
def store_best(best, topk_sim, topk_index, row, k, KP: tl.constexpr):
    """The first k of `best` (KP,), packed and descending, as a row of the result."""
    rank = tl.arange(0, KP)
    out = row * k + rank
    tl.store(topk_sim + out, value_of(best), mask=rank < k)
    tl.store(topk_index + out, index_of(best).to(tl.int64), mask=rank < k)


@triton.jit
def _best(best, new, k, KP: tl.constexpr):
    """The k largest of both, descending, in KP >= k entries."""
    rank = tl.arange(0, KP)
    merged = tl.zeros((KP,), tl.uint64)
    for r in range(0, k):  # each round takes the largest; packed values are distinct
        largest = tl.maximum(tl.max(best, 0), tl.max(new, 0))
        merged = tl.where(rank == r, largest, merged)
        best = tl.where(best == largest, 0, best)
        new = tl.where(new == largest, 0, new)
    return merged


@triton.jit
def seen_by(ids, bank_ids, row, slot, valid):
    """Which of the valid slots hold neither nothing nor the row's own id."""
    if ids is not None:
        EMPTY: tl.constexpr = -2
        held = tl.load(bank_ids + slot, mask=valid, other=EMPTY)
        valid = valid & (held != EMPTY) & (held != tl.load(ids + row))
    return valid


@triton.jit
def dots(key, bank, row, slot, valid, D, SLOTS: tl.constexpr, DBLOCK: tl.constexpr):
    """Products (SLOTS,) of a row of `key` with slots of the bank, in fp32."""
    d = tl.arange(0, DBLOCK)
    products = tl.zeros((SLOTS, DBLOCK), tl.float32)
    for d0 in range(0, D, DBLOCK):
        inside = d0 + d < D
        m = tl.load(
            bank + slot.to(tl.int64)[:, None] * D + (d0 + d)[None, :],
            mask=valid[:, None] & inside[None, :],
            other=0.0,
        )  # (SLOTS, DBLOCK)
        q = tl.load(key + row * D + d0 + d, mask=inside, other=0.0)
        products += m.to(tl.float32) * q.to(tl.float32)[None, :]
    return tl.sum(products, 1)


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
    CELL: tl.constexpr, KP: tl.constexpr, DBLOCK: tl.constexpr, CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """One row.

    Were nothing hidden, the k best slots would lie in the k cells with the largest maxima: were
    one in another cell, each of the k would hold a slot that is better, or equal and smaller. Of
    k + length cells at most `length` have their maximum in a listed slot, so k others are left of
    which the same holds. (The maxima know of ids.) Scan those cells again.
    """
    row = tl.program_id(0).to(tl.int64)
    size = tl.minimum(tl.load(count), K).to(tl.int32)
    used = tl.cdiv(size, CELL)
    wanted = k + length
    rank = tl.arange(0, KP)
    best = tl.zeros((KP,), tl.uint64)
    for first in range(0, used, CHUNK):
        cell = first + tl.arange(0, CHUNK)
        maxima = tl.load(cell_max + row * cells + cell, mask=cell < used, other=0.0)
        best = _best(best, tl.where(cell < used, pack(maxima, cell), 0), wanted, KP)
    chosen = index_of(best)  # (KP,)
    hidden = tl.zeros((KP,), tl.int64)  # a bit for each slot of the cell
    if slots is not None:
        lists = slots + row * length + tl.zeros((KP,), tl.int32)
        hidden, _ = tiles.listed(lists, length, chosen.to(tl.int64) * CELL, CELL)

    best = tl.zeros((KP,), tl.uint64)
    lane = tl.arange(0, GROUP)
    in_cell = tl.arange(0, CELL)[None, :]
    for first in range(0, tl.minimum(wanted, used), GROUP):
        here = rank[:, None] == (first + lane)[None, :]
        cell = tl.max(tl.where(here, chosen[:, None], -1), 0)  # (GROUP,)
        bits = tl.sum(tl.where(here, hidden[:, None], 0), 0)
        slot = cell[:, None] * CELL + in_cell
        valid = (cell >= 0)[:, None] & (slot < size) & (((bits[:, None] >> in_cell) & 1) == 0)
        slot = tl.reshape(slot, (GROUP * CELL,))
        valid = seen_by(ids, bank_ids, row, slot, tl.reshape(valid, (GROUP * CELL,)))
        score = dots(key, bank, row, slot, valid, D, GROUP * CELL, DBLOCK)
        best = _best(best, tl.where(valid, pack(score, slot), 0), k, KP)
    store_best(best, topk_sim, topk_index, row, k, KP)


def select_few(
    key: Tensor, bank: Tensor, count: Tensor, exclude: Exclude, cell_max: Tensor, cell: int,
    topk_sim: Tensor, topk_index: Tensor,
) -> None:  # fmt: skip
    (size, dim), k, length = bank.shape, topk_sim.shape[1], config.listed(exclude)
    select_kernel[(len(key),)](
        key, bank, count, exclude.slots, exclude.ids, exclude.bank_ids, cell_max,
        topk_sim, topk_index, size, dim, cell_max.shape[1], k, length, CELL=cell,
        KP=config.power_of_2(k + length, 2), DBLOCK=min(config.power_of_2(dim, 16), 32),
        CHUNK=1024, GROUP=4, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
