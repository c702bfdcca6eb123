"""Sums over the bank in Triton: scores, noise and sums of one tile at a time, then the splits."""

from __future__ import annotations

import triton
import triton.language as tl

from psm_kernels.ops.triton_noise import is_drawn, keep_center, keep_probability, noise_words
from psm_kernels.ops.triton_tiles import (
    add_weighted_rows,
    columns_of,
    listed,
    own,
    partial_sum,
    products,
    store_part,
)

# Neither a size of 1 nor one divisible by 16 is worth a compilation of its own.
RUNTIME = [
    "count", "s_pos", "rng_state", "slots", "ids", "bank_ids",
    "B", "K", "splits", "length", "row_offset", "col_offset",
]  # fmt: skip


@triton.jit
def _scan(
    top, total, squares, kept, mean,  # running state of a block of rows
    q, query, bank, bank_tiles, slots, length, ids, bank_ids, first, last, size, shift,
    d, d_valid, D, rows, row_valid, center, scale, sharpness, row_words, group, seed, offset,
    SELECTION: tl.constexpr, GENERAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    DPAD: tl.constexpr, DBLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Add tiles [first, last) of the bank to the state.

    GENERAL takes partly valid tiles and shifts exponents by a running maximum, as in attention.
    Without it tiles are full and the shift is 0, which costs fewer instructions.
    """
    next_listed = first  # the next tile with listed slots; the first one may have none
    local = tl.arange(0, BN)
    in_tile = local[:, None] * D + d[None, :]  # offsets within a tile fit 32 bits
    # Hoisting what little is invariant takes 20 to 40 registers, and spills at D = 256.
    for tile in tl.range(first, last, num_stages=STAGES, disable_licm=True):
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
        s = products(
            q, query + rows[:, None] * D, row_valid[:, None],
            m, tile_rows + local[:, None] * D, slot_valid[:, None], D, BM, BN, DPAD, DBLOCK,
        )  # (BM, BN)  # fmt: skip
        x = s * scale  # base 2
        p = s
        if SELECTION != "all":
            p = keep_probability(s, center[:, None], sharpness)  # (BM, BN)
        # A branch around s or x would hide from Triton that the first product feeds the second.
        NEVER: tl.constexpr = -float("inf") if SELECTION == "all" else 0.0
        if slots is not None:  # noqa: SIM102, this one at compile time
            if tile == next_listed:
                bits, ahead = listed(slots, length, start, BN)
                p = tl.where(columns_of(bits, BN), NEVER, p)
                next_listed = tile + tl.min(ahead, 0) // BN
        if ids is not None:
            held = tl.load(bank_ids + start + local, mask=slot_valid, other=0)
            p = tl.where(own(ids, held), NEVER, p)
        if SELECTION == "bernoulli":
            tile_group = (group + tile * (BN // 16)).to(tl.uint32)
            words = noise_words(tile_group, local[None, :], row_words[:, None], seed, offset)
            keep = is_drawn(words, p)
        elif SELECTION == "expected" or slots is not None or ids is not None:
            keep = p != NEVER
        else:
            keep = tl.full((BM, BN), 1, tl.int1)
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
    return top, total, squares, kept, mean


@triton.jit(do_not_specialize=RUNTIME)
def sum_kernel(
    query,  # (B, D)
    bank,  # (K, D)
    bank_tiles,  # its tensor descriptor, or None
    count,  # ()
    s_pos,  # (B,)
    rng_state,  # (2,)
    slots,  # (B, length), or None
    ids, bank_ids,  # (B,) and (K,), or None
    parts,  # (B, splits, D + 4): mean before division; shift, sum, sum of squares, count
    B: tl.int32, K: tl.int32, D: tl.int32, splits: tl.int32, length: tl.int32,
    scale, sharpness, b, row_offset: tl.int64, col_offset: tl.int64,
    SELECTION: tl.constexpr, FAST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    DPAD: tl.constexpr, DBLOCK: tl.constexpr, STAGES: tl.constexpr,
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
    per_split = tl.cdiv(tiles, splits)
    first = tl.minimum(split * per_split, tiles)
    last = tl.minimum(first + per_split, tiles)

    row_words = (rows + row_offset).to(tl.uint32)
    group = col_offset // 16
    q = 0.0
    seed, offset = 0, 0
    if DBLOCK == DPAD:
        q = tl.load(query + rows[:, None] * D + d[None, :], mask=valid, other=0.0)
    center = keep_center(tl.load(s_pos + rows, mask=row_valid, other=0.0), b, sharpness)
    if SELECTION == "bernoulli":
        seed, offset = tl.load(rng_state), tl.load(rng_state + 1)
    lists, row_ids = None, None
    if slots is not None:
        lists = slots + tl.minimum(rows, B - 1) * length
    if ids is not None:
        row_ids = tl.load(ids + rows, mask=row_valid, other=0)

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
            top, total, squares, kept, mean = _scan(
                top, total, squares, kept, mean,
                q, query, bank, bank_tiles, lists, length, row_ids, bank_ids, first, full, size,
                shift, d, d_valid, D, rows, row_valid, center, scale, sharpness, row_words, group,
                seed, offset, SELECTION, False, BM, BN, DPAD, DBLOCK, STAGES,
            )  # fmt: skip
        first = full
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
    top, total, squares, kept, mean = _scan(
        top, total, squares, kept, mean,
        q, query, bank, bank_tiles, lists, length, row_ids, bank_ids, first, last, size, shift,
        d, d_valid, D, rows, row_valid, center, scale, sharpness, row_words, group, seed,
        offset, SELECTION, True, BM, BN, DPAD, DBLOCK,
        1 if FAST else STAGES,
    )  # fmt: skip
    store_part(parts, rows, row_valid, splits, split, d, D, mean, top, total, squares, kept)


@triton.jit(do_not_specialize=["splits"])
def merge_kernel(
    parts,  # (B, splits, D + 4), as `sum_kernel` leaves them
    neg_lse, neg_sq_lse, neg_count,  # (B,)
    neg_mean,  # (B, D)
    splits: tl.int32, D: tl.int32, SPLITS: tl.constexpr, DPAD: tl.constexpr,
):  # fmt: skip
    """One row; its splits in fixed order."""
    row = tl.program_id(0).to(tl.int64)
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
