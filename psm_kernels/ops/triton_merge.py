"""After the pass: splits merged in fixed order, and the exact top-k out of the best cells."""

from __future__ import annotations

import triton
import triton.language as tl


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


@triton.jit
def _merge_splits(
    row, parts, neg_lse, neg_sq_lse, neg_count, neg_mean, splits, D,
    SPLITS: tl.constexpr, DPAD: tl.constexpr,
):  # fmt: skip
    # No split scales by more than 2^40: its sum is at least that far from underflow.
    local = tl.arange(0, SPLITS)
    stats = parts + (row * splits + local) * (D + 4) + D  # (SPLITS,)
    reference = tl.full((SPLITS,), -float("inf"), tl.float32)
    for first in range(0, splits, SPLITS):
        valid = first + local < splits
        at = stats + first * (D + 4)
        top = tl.load(at, mask=valid, other=-float("inf"))
        total = tl.load(at + 1, mask=valid, other=0.0)
        reference = tl.maximum(reference, tl.where(total > 0, top + tl.math.log2(total), top))
    shift = tl.max(reference, 0)
    shift = tl.where(shift == -float("inf"), 0.0, shift)

    d = tl.arange(0, DPAD)
    totals = tl.zeros((SPLITS,), tl.float32)
    squares = tl.zeros((SPLITS,), tl.float32)
    kept = tl.zeros((SPLITS,), tl.float32)
    mean = tl.zeros((DPAD,), tl.float32)
    for first in range(0, splits, SPLITS):
        valid = first + local < splits
        at = stats + first * (D + 4)
        weight = tl.math.exp2(tl.load(at, mask=valid, other=-float("inf")) - shift)
        totals += weight * tl.load(at + 1, mask=valid, other=0.0)
        squares += weight * weight * tl.load(at + 2, mask=valid, other=0.0)
        kept += tl.load(at + 3, mask=valid, other=0.0)
        part = tl.load(
            (at - D)[:, None] + d[None, :], mask=valid[:, None] & (d < D)[None, :], other=0.0
        )  # (SPLITS, D)
        mean += tl.sum(weight[:, None] * part, 0)
    LN2: tl.constexpr = 0.6931471805599453
    total = tl.sum(totals, 0)
    tl.store(neg_lse + row, (shift + tl.math.log2(total)) * LN2)
    tl.store(neg_sq_lse + row, (2 * shift + tl.math.log2(tl.sum(squares, 0))) * LN2)
    tl.store(neg_count + row, tl.sum(kept, 0))
    tl.store(neg_mean + row * D + d, mean / tl.where(total == 0, 1.0, total), mask=d < D)


@triton.jit
def _select(
    row, key, bank, size, cell_max, topk_sim, topk_index, D, cells, shift, k,
    KP: tl.constexpr, DBLOCK: tl.constexpr, CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    # The k best slots lie in the k cells with the largest maxima: were one in another cell, each
    # of the k would hold a slot that is better, or equal and smaller. Scan those cells again.
    CELL: tl.constexpr = 64  # slots that share one maximum
    MISSING: tl.constexpr = -(2**63)  # sorts below every packed value
    rank = tl.arange(0, KP)
    best = tl.full((KP,), MISSING, tl.int64)
    local = tl.arange(0, CHUNK)
    used = tl.where(size > 0, tl.cdiv(size + shift, CELL), 0)
    for first in range(0, used, CHUNK):
        cell = first + local
        maxima = tl.load(cell_max + row * cells + cell, mask=cell < used, other=0.0)
        best = _best(best, tl.where(cell < used, _pack(maxima, cell), MISSING), k, KP, MISSING)
    chosen = tl.where((best != MISSING) & (rank < k), _index(best), -1)  # (KP,)

    best = tl.full((KP,), MISSING, tl.int64)
    d = tl.arange(0, DBLOCK)
    lane = tl.arange(0, GROUP)
    for first in range(0, tl.minimum(k, used), GROUP):
        here = rank[:, None] == (first + lane)[None, :]
        cell = tl.max(tl.where(here, chosen[:, None], -1), 0)  # (GROUP,)
        slot = (cell * CELL - shift)[:, None] + tl.arange(0, CELL)[None, :]
        valid = (cell >= 0)[:, None] & (slot >= 0) & (slot < size)
        slot = tl.reshape(slot, (GROUP * CELL,))
        valid = tl.reshape(valid, (GROUP * CELL,))
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


@triton.jit(do_not_specialize=["count", "K", "cells", "splits", "k", "col_offset"])
def merge_kernel(
    parts,  # (B, splits, D + 4): mean before division; shift, sum, sum of squares, count
    neg_lse, neg_sq_lse, neg_count,  # (B,)
    neg_mean,  # (B, D)
    key,  # (B, D)
    bank,  # (K, D)
    count,  # ()
    cell_max,  # (B, cells)
    topk_sim, topk_index,  # (B, k)
    K: tl.int32, D: tl.int32, cells: tl.int32, splits: tl.int32, k: tl.int32, col_offset: tl.int64,
    MINE: tl.constexpr, SUM: tl.constexpr, SPLITS: tl.constexpr, DPAD: tl.constexpr,
    KP: tl.constexpr, DBLOCK: tl.constexpr, CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    if SUM:
        _merge_splits(
            row, parts, neg_lse, neg_sq_lse, neg_count, neg_mean, splits, D,
            SPLITS, DPAD,
        )  # fmt: skip
    if MINE:
        shift = (col_offset % 16).to(tl.int32)
        size = tl.minimum(tl.load(count), K).to(tl.int32)
        _select(
            row, key, bank, size, cell_max, topk_sim, topk_index, D, cells, shift, k,
            KP, DBLOCK, CHUNK, GROUP,
        )  # fmt: skip
