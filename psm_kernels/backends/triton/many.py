"""The best many slots of each row in Triton: the cells with the largest maxima, the scores of
their slots, the best of those. `few.py` does the same for a few, in rounds that take one each.

An entry is a value and an index, packed so that all are distinct and the order is total."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from psm_kernels.backends.base import Exclude
from psm_kernels.backends.triton import config
from psm_kernels.backends.triton.few import dots, index_of, pack, seen_by, store_best


@triton.jit
def _load(x, at, n):
    """Entries `at` of n, 0 behind the last. x: packed, or fp32 values that lie at their index."""
    if x.dtype.element_ty == tl.float32:
        packed = tl.where(at < n, pack(tl.load(x + at, mask=at < n, other=0.0), at), 0)
    else:
        packed = tl.load(x + at, mask=at < n, other=0).to(tl.uint64, bitcast=True)
    return packed


@triton.jit
def _collect(x, n, bound, out, CHUNK: tl.constexpr):
    """Write the first CHUNK of the entries >= bound to `out`; how many there are in all."""
    lane = tl.arange(0, CHUNK)
    found = 0
    for first in range(0, n, CHUNK):
        entry = _load(x, first + lane, n)
        take = (entry >= bound) & (entry != 0)
        place = found + tl.cumsum(take.to(tl.int32), 0) - 1
        tl.store(out + place, entry.to(tl.int64, bitcast=True), mask=take & (place < CHUNK))
        found += tl.sum(take.to(tl.int32), 0)
    tl.debug_barrier()  # other threads read what these wrote
    return found


@triton.jit
def _kth(x, n, k, CHUNK: tl.constexpr):
    """The k-th largest of n entries, bit by bit from above; 0 where there are fewer."""
    lane = tl.arange(0, CHUNK)
    kth = tl.full((), 0, tl.uint64)
    bit = tl.full((), 1 << 63, tl.uint64)
    for _ in range(64):
        higher = kth | bit
        reach = tl.zeros((CHUNK,), tl.int32)
        for first in range(0, n, CHUNK):
            reach += (_load(x, first + lane, n) >= higher).to(tl.int32)
        kth = tl.where(tl.sum(reach, 0) >= k, higher, kth)
        bit = bit >> 1
    return kth


@triton.jit
def _sorted(entry, n, SIZE: tl.constexpr):
    """Descending; what is behind the n-th is 0. Batcher's bitonic network, as a loop: unrolled, as
    tl.sort has it, 2,048 entries compile for minutes."""
    i = tl.arange(0, SIZE)
    run = 2
    while run < 2 * n:
        stride = run // 2
        while stride > 0:
            other = tl.gather(entry, i ^ stride, 0)
            larger = ((i & stride) == 0) == ((i & run) == 0)
            entry = tl.where((entry > other) == larger, entry, other)
            stride = stride // 2
        run *= 2
    return entry


@triton.jit
def _largest(x, n, k, scratch, CHUNK: tl.constexpr):
    """The k largest of n entries, descending, in the first k of (CHUNK,). scratch: (CHUNK,)

    Lane i holds the maximum of entries i, i + CHUNK and so on. k lanes reach the k-th largest of
    these maxima, so the k best entries do, and of others few: with k = 0.6 CHUNK in random order
    0.92 CHUNK entries do. Those are sorted. Where more than CHUNK do, because values tie or the
    best share lanes, the bound is searched among all entries instead."""
    lane = tl.arange(0, CHUNK)
    top = tl.zeros((CHUNK,), tl.uint64)
    for first in range(0, n, CHUNK):
        top = tl.maximum(top, _load(x, first + lane, n))
    top = (top >> 32).to(tl.uint32)  # the value alone
    bound = tl.full((), 0, tl.uint32)
    bit = tl.full((), 1 << 31, tl.uint32)
    for _ in range(32):
        higher = bound | bit
        bound = tl.where(tl.sum((top >= higher).to(tl.int32), 0) >= k, higher, bound)
        bit = bit >> 1
    found = _collect(x, n, bound.to(tl.uint64) << 32, scratch, CHUNK)
    if found > CHUNK:
        found = _collect(x, n, _kth(x, n, k, CHUNK), scratch, CHUNK)
    return _sorted(_load(scratch, lane, found), found, CHUNK)


@triton.jit(do_not_specialize=["count", "K", "cells", "wanted"])
def cells_kernel(
    count,  # ()
    cell_max,  # (B, cells)
    scratch,  # (B, CHUNK)
    chosen,  # (B, wanted) cells by their maxima, descending; -1 where there are fewer
    K: tl.int32, cells: tl.int32, wanted: tl.int32, CELL: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    used = tl.cdiv(tl.minimum(tl.load(count), K).to(tl.int32), CELL)
    best = _largest(cell_max + row * cells, used, wanted, scratch + row * CHUNK, CHUNK)
    rank = tl.arange(0, CHUNK)
    tl.store(chosen + row * wanted + rank, index_of(best), mask=rank < wanted)


@triton.jit(do_not_specialize=["count", "slots", "length", "ids", "bank_ids", "K", "wanted"])
def rescan_kernel(
    key,  # (B, D)
    bank,  # (K, D)
    count,  # ()
    slots,  # (B, length), or None
    ids, bank_ids,  # (B,) and (K,), or None
    chosen,  # (B, wanted)
    entries,  # (B, wanted CELL) packed scores and slots; 0 where the row sees none
    K: tl.int32, D: tl.int32, wanted: tl.int32, length: tl.int32,
    CELL: tl.constexpr, GROUP: tl.constexpr, DBLOCK: tl.constexpr,
):  # fmt: skip
    """GROUP chosen cells of one row."""
    groups = tl.cdiv(wanted, GROUP)
    row = (tl.program_id(0) // groups).to(tl.int64)
    lane = tl.program_id(0) % groups * GROUP + tl.arange(0, GROUP)
    size = tl.minimum(tl.load(count), K).to(tl.int32)
    cell = tl.load(chosen + row * wanted + lane, mask=lane < wanted, other=-1)
    slot = cell[:, None] * CELL + tl.arange(0, CELL)[None, :]
    valid = (cell >= 0)[:, None] & (slot < size)
    if slots is not None:
        for entry in range(0, length):
            valid = valid & (slot != tl.load(slots + row * length + entry))
    slot = tl.reshape(slot, (GROUP * CELL,))
    valid = seen_by(ids, bank_ids, row, slot, tl.reshape(valid, (GROUP * CELL,)))
    score = dots(key, bank, row, slot, valid, D, GROUP * CELL, DBLOCK)
    entry = tl.where(valid, pack(score, slot), 0).to(tl.int64, bitcast=True)
    out = tl.program_id(0) % groups * (GROUP * CELL) + tl.arange(0, GROUP * CELL)
    tl.store(entries + row * wanted * CELL + out, entry, mask=out < wanted * CELL)


@triton.jit(do_not_specialize=["n", "k"])
def order_kernel(
    entries,  # (B, n)
    scratch,  # (B, CHUNK)
    topk_sim, topk_index,  # (B, k)
    n: tl.int32, k: tl.int32, CHUNK: tl.constexpr,
):  # fmt: skip
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    best = _largest(entries + row * n, n, k, scratch + row * CHUNK, CHUNK)
    store_best(best, topk_sim, topk_index, row, k, CHUNK)


def select_many(
    key: Tensor, bank: Tensor, count: Tensor, exclude: Exclude, cell_max: Tensor, cell: int,
    topk_sim: Tensor, topk_index: Tensor,
) -> None:  # fmt: skip
    (size, dim), cells, k = bank.shape, cell_max.shape[1], topk_sim.shape[1]
    length = config.listed(exclude)
    wanted = min(k + length, cells)
    chunk = config.power_of_2(5 * max(wanted, k) // 3, 1024)
    group = 64 // cell
    warps = {"num_warps": min(16, chunk // 256), "enable_fp_fusion": True}
    for rows in config.turns(len(key), 8 * (wanted * cell + chunk)):
        part, hidden = key[rows], exclude.of(rows)
        batch = len(part)
        scratch = config.new(bank, batch, chunk, dtype=torch.int64)
        chosen = config.new(bank, batch, wanted, dtype=torch.int32)
        entries = config.new(bank, batch, wanted * cell, dtype=torch.int64)
        cells_kernel[(batch,)](
            count, cell_max[rows], scratch, chosen, size, cells, wanted,
            CELL=cell, CHUNK=chunk, **warps,
        )  # fmt: skip
        rescan_kernel[(batch * -(-wanted // group),)](
            part, bank, count, hidden.slots, hidden.ids, hidden.bank_ids, chosen, entries,
            size, dim, wanted, length, CELL=cell, GROUP=group,
            DBLOCK=min(config.power_of_2(dim, 16), 64), num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        order_kernel[(batch,)](
            entries, scratch, topk_sim[rows], topk_index[rows], wanted * cell, k,
            CHUNK=chunk, **warps,
        )  # fmt: skip
