"""The pass over the bank in Triton: scores, noise, sums and cell maxima of one tile at a time."""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LN2 = tl.constexpr(0.6931471805599453)
P_MAX = tl.constexpr(0.999)
# Sums of squares inside these bounds have lost nothing to underflow or overflow.
TINY = tl.constexpr(2.0**-80)
HUGE = tl.constexpr(2.0**120)


@triton.jit
def _multiply(a, b: tl.constexpr):
    """The halves of a 32 x 32 bit product: one IMAD.WIDE."""
    product = a.to(tl.uint64) * b
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def _noise(group, row, seed, offset, BM: tl.constexpr, BN: tl.constexpr):
    """Canonical noise of a tile, (BM, BN) uint32, by Philox4x32-10.

    Written per element although four share a counter: in the accumulator layout of the tensor
    cores the four are registers of one thread, and the compiler merges their equal expressions. So
    a word costs a quarter of a Philox and none moves. (tl.join of four words on a (BM, BN / 4) grid
    goes through shared memory instead.)
    """
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    j = tl.arange(0, BN)[None, :]
    c0 = 4 * (group + (j // 16).to(tl.uint32)) + (j % 8 // 2).to(tl.uint32)  # (1, BN)
    c1 = row[:, None]  # (BM, 1)
    c2, c3 = offset.to(tl.uint32), (offset >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        high0, low0 = _multiply(c0, 0xD2511F53)
        high1, low1 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    even = j % 2 == 0
    return tl.where(j % 16 < 8, tl.where(even, c0, c1), tl.where(even, c2, c3))


@triton.jit
def _partial_sum(x, BM: tl.constexpr, BN: tl.constexpr):
    """Row sums but for the last 8: (BM, BN) to (BM, 8), inside each thread, without shuffles."""
    return tl.sum(tl.reshape(x, (BM, BN // 8, 8)), 1)


@triton.jit
def _dot(x, y, acc=None):
    if INTERPRETED:  # which multiplies the bits of bf16
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, acc, input_precision="ieee")


@triton.jit
def _products(
    x, x_rows, x_valid, m, m_rows, m_valid, D,
    BM: tl.constexpr, BN: tl.constexpr, DPAD: tl.constexpr, DBLOCK: tl.constexpr,
):  # fmt: skip
    """x . m, (BM, BN), of the tiles at hand, or of column blocks loaded again where both tiles do
    not fit beside each other (wide rows) or unroll into too many FMAs (fp32)."""
    if DBLOCK == DPAD:
        return _dot(x, tl.trans(m))
    s = tl.zeros((BM, BN), tl.float32)
    for d0 in tl.range(0, D, DBLOCK, num_stages=1):
        d = d0 + tl.arange(0, DBLOCK)
        x_block = tl.load(x_rows + d[None, :], mask=x_valid & (d < D)[None, :], other=0.0)
        m_block = tl.load(m_rows + d[None, :], mask=m_valid & (d < D)[None, :], other=0.0)
        s = _dot(x_block, tl.trans(m_block), s)
    return s


@triton.jit
def _scan(
    held, top, total, squares, kept, mean,  # running state of a block of rows
    q, k, query, key, bank, bank_tiles, cell_max, first, last, size, shift,
    d, d_valid, D, rows, row_valid, cells, center, scale, decay, row_words, group, seed, offset,
    SELECTION: tl.constexpr, MINE: tl.constexpr, SUM: tl.constexpr, GENERAL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, DPAD: tl.constexpr, DBLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Add tiles [first, last) of the bank to the state, and write their cell maxima.

    GENERAL takes partly valid tiles and shifts exponents by a running maximum, as in attention.
    Without it tiles are full and the shift is 0, which costs fewer instructions.
    """
    CELL_TILES: tl.constexpr = 64 // BN
    local = tl.arange(0, BN)
    in_tile = local[:, None] * D + d[None, :]  # offsets within a tile fit 32 bits
    for tile in tl.range(first, last, num_stages=STAGES, disable_licm=SUM and DPAD > 128):
        start = tile * BN - shift
        slot_valid = (start + local >= 0) & (start + local < size)
        tile_rows = bank + start.to(tl.int64) * D
        if GENERAL:
            m = tl.load(
                tile_rows + in_tile, mask=slot_valid[:, None] & d_valid[None, :], other=0.0
            )  # (BN, D)
        elif bank_tiles is not None:
            m = bank_tiles.load([start, 0])
        else:
            m = tl.load(tile_rows + in_tile, mask=d_valid[None, :], other=0.0)
        if MINE:
            mined = _products(
                k, key + rows[:, None] * D, row_valid[:, None],
                m, tile_rows + local[:, None] * D, slot_valid[:, None], D, BM, BN, DPAD, DBLOCK,
            )  # (BM, BN)  # fmt: skip
            if GENERAL:
                mined = tl.where(slot_valid[None, :], mined, -float("inf"))
            held = tl.where(tile % CELL_TILES == 0, -float("inf"), held)
            held = tl.maximum(held, tl.max(mined, 1))
            tl.store(cell_max + rows * cells + tile // CELL_TILES, held, mask=row_valid)
        if SUM:
            s = _products(
                q, query + rows[:, None] * D, row_valid[:, None],
                m, tile_rows + local[:, None] * D, slot_valid[:, None], D, BM, BN, DPAD, DBLOCK,
            )  # (BM, BN)  # fmt: skip
            if SELECTION != "all":
                distance = s - center[:, None]
                p = tl.minimum(tl.math.exp2(distance * decay * distance), P_MAX)
            if SELECTION == "bernoulli":
                tile_group = (group + tile * (BN // 16)).to(tl.uint32)
                words = _noise(tile_group, row_words, seed, offset, BM, BN)
                keep = words < (p * 4294967296.0).to(tl.uint32)
            elif SELECTION == "expected":
                keep = p > 0.0
            else:
                keep = tl.full((BM, BN), 1, tl.int1)
            x = s * scale  # base 2
            if GENERAL:
                keep = keep & slot_valid[None, :]
                x = tl.where(keep, x, -float("inf"))
                new_top = tl.maximum(top, tl.max(x, 1))
                safe_top = tl.where(new_top == -float("inf"), 0.0, new_top)
                shrink = tl.math.exp2(top - safe_top)
                total *= shrink[:, None]
                squares *= (shrink * shrink)[:, None]
                mean *= shrink[:, None]
                top = new_top
                e = tl.math.exp2(x - safe_top[:, None])
            else:
                e = tl.where(keep, tl.math.exp2(x), 0.0)
            if SELECTION == "expected":
                p = tl.where(keep, p, 0.0)
                squares += _partial_sum(p * e * e, BM, BN)
                kept += _partial_sum(p, BM, BN)
                e = p * e
            else:
                squares += _partial_sum(e * e, BM, BN)
                kept += _partial_sum(tl.where(keep, 1.0, 0.0), BM, BN)
            total += _partial_sum(e, BM, BN)
            mean = _dot(e.to(m.dtype), m, mean)
    return held, top, total, squares, kept, mean


@triton.jit(do_not_specialize=["B", "K", "cells", "splits", "row_offset", "col_offset"])
def bank_pass_kernel(
    query, key,  # (B, D)
    bank,  # (K, D)
    bank_tiles,  # its tensor descriptor, or None
    count,  # ()
    s_pos,  # (B,)
    rng_state,  # (2,)
    cell_max,  # (B, cells)
    part_stats,  # (B, 4, splits): shift, sum, sum of squares, count
    part_mean,  # (B, splits, D)
    B, K, D, cells, splits, scale, decay, b, row_offset, col_offset,
    SELECTION: tl.constexpr, MINE: tl.constexpr, SUM: tl.constexpr, FAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, DPAD: tl.constexpr, DBLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One block of rows against one split of the bank. Programs of a split are neighbors, so that
    its rows come from memory once and from L2 after that."""
    row_blocks = tl.cdiv(B, BM)
    split = tl.program_id(0) // row_blocks
    rows = (tl.program_id(0) % row_blocks * BM + tl.arange(0, BM)).to(tl.int64)
    row_valid = rows < B
    d = tl.arange(0, DPAD)
    d_valid = d < D
    valid = row_valid[:, None] & d_valid[None, :]

    # Tiles begin at multiples of 16 global slots, where the noise counters do.
    shift = (col_offset % 16).to(tl.int32)
    size = tl.minimum(tl.load(count), K).to(tl.int32)
    tiles = tl.where(size > 0, tl.cdiv(size + shift, BN), 0)
    per_split = tl.cdiv(tl.cdiv(tiles, 64 // BN), splits) * (64 // BN)  # whole cells
    first = tl.minimum(split * per_split, tiles)
    last = tl.minimum(first + per_split, tiles)

    row_words = (rows + row_offset).to(tl.uint32)
    group = col_offset // 16
    q, k, center = 0.0, 0.0, 0.0
    seed, offset = 0, 0
    if SUM and DBLOCK == DPAD:
        q = tl.load(query + rows[:, None] * D + d[None, :], mask=valid, other=0.0)
    if SUM:
        center = tl.load(s_pos + rows, mask=row_valid, other=0.0) + b
    if MINE and DBLOCK == DPAD:
        k = tl.load(key + rows[:, None] * D + d[None, :], mask=valid, other=0.0)
    if SELECTION == "bernoulli":
        seed, offset = tl.load(rng_state), tl.load(rng_state + 1)

    held = tl.full((BM,), -float("inf"), tl.float32)
    top = tl.full((BM,), -float("inf"), tl.float32)
    total = tl.zeros((BM, 8), tl.float32)
    squares = tl.zeros((BM, 8), tl.float32)
    kept = tl.zeros((BM, 8), tl.float32)
    mean = tl.zeros((BM, DPAD), tl.float32)
    if FAST:
        full = tl.where(first * BN < shift, first, (size + shift) // BN)  # tiles [first, full)
        full = tl.maximum(tl.minimum(full, last), first)
        held, top, total, squares, kept, mean = _scan(
            held, top, total, squares, kept, mean,
            q, k, query, key, bank, bank_tiles, cell_max, first, full, size, shift,
            d, d_valid, D, rows, row_valid, cells, center, scale, decay, row_words,
            group, seed, offset, SELECTION, MINE, SUM, False, BM, BN, DPAD, DBLOCK, STAGES,
        )  # fmt: skip
        first = full
        if SUM:
            # The shift 0 serves unit rows down to a temperature of about 0.03, and saves a maximum,
            # D / BN multiplications and a wait per element. Where it does not, start again.
            row_squares = tl.sum(squares, 1)
            any_kept = tl.sum(kept, 1) != 0.0
            sound = ((row_squares > TINY) & (row_squares < HUGE)) | (not any_kept)
            top = tl.where(any_kept, 0.0, top)
            if tl.min((sound | (not row_valid)).to(tl.int32)) == 0:
                first = tl.minimum(split * per_split, tiles)
                top = tl.full((BM,), -float("inf"), tl.float32)
                total = tl.zeros((BM, 8), tl.float32)
                squares = tl.zeros((BM, 8), tl.float32)
                kept = tl.zeros((BM, 8), tl.float32)
                mean = tl.zeros((BM, DPAD), tl.float32)
    held, top, total, squares, kept, mean = _scan(
        held, top, total, squares, kept, mean,
        q, k, query, key, bank, bank_tiles, cell_max, first, last, size, shift,
        d, d_valid, D, rows, row_valid, cells, center, scale, decay, row_words, group, seed, offset,
        SELECTION, MINE, SUM, True, BM, BN, DPAD, DBLOCK, 1 if FAST else STAGES,
    )  # fmt: skip
    if SUM:
        stats = part_stats + rows * 4 * splits + split
        tl.store(stats, top, mask=row_valid)
        tl.store(stats + splits, tl.sum(total, 1), mask=row_valid)
        tl.store(stats + 2 * splits, tl.sum(squares, 1), mask=row_valid)
        tl.store(stats + 3 * splits, tl.sum(kept, 1), mask=row_valid)
        out = part_mean + (rows * splits + split)[:, None] * D + d[None, :]
        tl.store(out, mean, mask=valid)
