"""The pass over the bank in Triton: scores, noise, sums and cell maxima of one tile at a time."""

from __future__ import annotations

import triton
import triton.language as tl

from psm_kernels.ops.triton_noise import is_drawn, keep_center, keep_probability, noise_words
from psm_kernels.ops.triton_tiles import add_weighted_rows, partial_sum, products, store_part

# Neither a size of 1 nor one divisible by 16 is worth a compilation of its own.
RUNTIME = ["count", "s_pos", "rng_state", "B", "K", "cells", "splits", "row_offset", "col_offset"]


@triton.jit
def _scan(
    held, top, total, squares, kept, mean,  # running state of a block of rows
    q, k, query, key, bank, bank_tiles, cell_max, first, last, size, shift,
    d, d_valid, D, rows, row_valid, cells, center, scale, sharpness, row_words,
    group, seed, offset,
    SELECTION: tl.constexpr, MINE: tl.constexpr, SUM: tl.constexpr, GENERAL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, DPAD: tl.constexpr, DBLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Add tiles [first, last) of the bank to the state, and write their cell maxima.

    GENERAL takes partly valid tiles and shifts exponents by a running maximum, as in attention.
    Without it tiles are full and the shift is 0, which costs fewer instructions.
    """
    CELL_TILES: tl.constexpr = (63 + BN) // BN
    local = tl.arange(0, BN)
    in_tile = local[:, None] * D + d[None, :]  # offsets within a tile fit 32 bits
    # Hoisting what little is invariant takes 20 to 40 registers, and spills at D = 256.
    for tile in tl.range(first, last, num_stages=STAGES, disable_licm=SUM):
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
            mined = products(
                k, key + rows[:, None] * D, row_valid[:, None],
                m, tile_rows + local[:, None] * D, slot_valid[:, None], D, BM, BN, DPAD, DBLOCK,
            )  # (BM, BN)  # fmt: skip
            if GENERAL:
                mined = tl.where(slot_valid[None, :], mined, -float("inf"))
            if BN > 64:
                cell = tile * (BN // 64) + tl.arange(0, BN // 64)[None, :]
                maxima = tl.max(tl.reshape(mined, (BM, BN // 64, 64)), 2)
                out = cell_max + rows[:, None] * cells + cell
                tl.store(out, maxima, mask=row_valid[:, None] & (cell < cells))
            else:
                held = tl.where(tile % CELL_TILES == 0, -float("inf"), held)
                held = tl.maximum(held, tl.max(mined, 1))
                tl.store(cell_max + rows * cells + tile // CELL_TILES, held, mask=row_valid)
        if SUM:
            s = products(
                q, query + rows[:, None] * D, row_valid[:, None],
                m, tile_rows + local[:, None] * D, slot_valid[:, None], D, BM, BN, DPAD, DBLOCK,
            )  # (BM, BN)  # fmt: skip
            if SELECTION != "all":
                p = keep_probability(s, center[:, None], sharpness)  # (BM, BN)
            if SELECTION == "bernoulli":
                tile_group = (group + tile * (BN // 16)).to(tl.uint32)
                words = noise_words(tile_group, local[None, :], row_words[:, None], seed, offset)
                keep = is_drawn(words, p)
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
                squares += partial_sum(p * e * e, BM, BN)
                kept += partial_sum(p, BM, BN)
                e = p * e
            else:
                squares += partial_sum(e * e, BM, BN)
                kept += partial_sum(tl.where(keep, 1.0, 0.0), BM, BN)
            total += partial_sum(e, BM, BN)
            mean = add_weighted_rows(mean, e, m, SELECTION == "expected")
    return held, top, total, squares, kept, mean


@triton.jit(do_not_specialize=RUNTIME)
def bank_pass_kernel(
    query, key,  # (B, D)
    bank,  # (K, D)
    bank_tiles,  # its tensor descriptor, or None
    count,  # ()
    s_pos,  # (B,)
    rng_state,  # (2,)
    cell_max,  # (B, cells)
    parts,  # (B, splits, D + 4): mean before division; shift, sum, sum of squares, count
    B: tl.int32, K: tl.int32, D: tl.int32, cells: tl.int32, splits: tl.int32,
    scale, sharpness, b, row_offset: tl.int64, col_offset: tl.int64,
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
    CELL_TILES: tl.constexpr = (63 + BN) // BN
    per_split = tl.cdiv(tl.cdiv(tiles, CELL_TILES), splits) * CELL_TILES  # whole cells
    first = tl.minimum(split * per_split, tiles)
    last = tl.minimum(first + per_split, tiles)

    row_words = (rows + row_offset).to(tl.uint32)
    group = col_offset // 16
    q, k, center = 0.0, 0.0, 0.0
    seed, offset = 0, 0
    if SUM and DBLOCK == DPAD:
        q = tl.load(query + rows[:, None] * D + d[None, :], mask=valid, other=0.0)
    if SUM:
        center = keep_center(tl.load(s_pos + rows, mask=row_valid, other=0.0), b, sharpness)
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
        # The branch keeps a split without full tiles out of the loop's exit: where that path joins
        # it before the wait for the last product, ptxas 12.8 and 12.9 (Triton 3.7, 3.8) serialize
        # all products of the loop (C7515).
        if full > first:
            held, top, total, squares, kept, mean = _scan(
                held, top, total, squares, kept, mean,
                q, k, query, key, bank, bank_tiles, cell_max, first, full, size, shift,
                d, d_valid, D, rows, row_valid, cells, center, scale, sharpness, row_words,
                group, seed, offset, SELECTION, MINE, SUM, False, BM, BN, DPAD, DBLOCK, STAGES,
            )  # fmt: skip
        first = full
        if SUM:
            # The shift 0 serves unit rows down to a temperature of about 0.03, and saves a maximum,
            # D / BN multiplications and a wait per element. Where it does not, start again.
            # Sums of squares inside these bounds have lost nothing to underflow or overflow.
            TINY: tl.constexpr = 2.0**-80
            HUGE: tl.constexpr = 2.0**120
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
        d, d_valid, D, rows, row_valid, cells, center, scale, sharpness, row_words,
        group, seed, offset, SELECTION, MINE, SUM, True, BM, BN, DPAD, DBLOCK,
        1 if FAST else STAGES,
    )  # fmt: skip
    if SUM:
        store_part(parts, rows, row_valid, splits, split, d, D, mean, top, total, squares, kept)
