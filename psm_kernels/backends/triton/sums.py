"""Sums over the bank in Triton: scores, noise and sums of one tile at a time."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from psm_kernels.backends.base import Exclude
from psm_kernels.backends.triton import config, noise, tiles
from psm_kernels.backends.triton.merge import merge
from psm_kernels.options import PassOptions


@triton.jit
def _nothing(BM: tl.constexpr, DPAD: tl.constexpr):
    """State of a block: shift of exponents; sums of weights, squares, kept slots, weighted rows."""
    zeros = tl.zeros((BM, 8), tl.float32)
    top = tl.full((BM,), -float("inf"), tl.float32)
    return top, zeros, zeros, zeros, tl.zeros((BM, DPAD), tl.float32)


@triton.jit
def _scan(
    state, block, bank, bank_tiles, slot_bias, lists, length, ids, bank_ids, rule, sample,
    first, last, size, shift, scale, D,
    SELECTION: tl.constexpr, GENERAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    DPAD: tl.constexpr, DBLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Add tiles [first, last) of the bank to the state.

    GENERAL takes partly valid tiles and shifts exponents by a running maximum, as in attention.
    Without it tiles are full and the shift is 0, which costs fewer instructions.
    """
    top, total, squares, kept, mean = state
    center, sharpness = rule
    row_words, group, seed, offset = sample
    next_listed = first  # the next tile with listed slots; the first one may have none
    # Hoisting what little is invariant takes 20 to 40 registers, and spills at D = 256.
    for tile in tl.range(first, last, num_stages=STAGES, disable_licm=True):
        start = tile * BN - shift
        slot = start + tl.arange(0, BN)
        slot_valid = (slot >= 0) & (slot < size)
        m, s = tiles.scores(
            block, bank, bank_tiles, start, slot_valid, D, GENERAL, BM, BN, DPAD, DBLOCK
        )
        x = s * scale  # base 2
        p = s
        if slot_bias is not None:
            LOG2E: tl.constexpr = 1.4426950408889634
            x += LOG2E * tl.load(slot_bias + slot, mask=slot_valid, other=0.0)[None, :]
            p = x
        if SELECTION != "all":
            p = noise.keep_probability(s, center[:, None], sharpness)  # (BM, BN)
        # A branch around s or x would hide from Triton that the first product feeds the second.
        NEVER: tl.constexpr = -float("inf") if SELECTION == "all" else 0.0
        if lists is not None:  # noqa: SIM102, this one at compile time
            if tile == next_listed:
                bits, ahead = tiles.listed(lists, length, start, BN)
                p = tl.where(tiles.columns_of(bits, BN), NEVER, p)
                next_listed = tile + tl.min(ahead, 0) // BN
        if ids is not None:
            p = tl.where(tiles.own(ids, bank_ids, start, slot_valid, BN), NEVER, p)
        if SELECTION == "bernoulli":
            column = tl.arange(0, BN)[None, :]
            tile_group = (group + tile * (BN // 16)).to(tl.uint32)
            words = noise.noise_words(tile_group, column, row_words[:, None], seed, offset)
            keep = words < (p * 4294967296.0).to(tl.uint32)
        elif SELECTION == "expected" or not (lists is None and ids is None and slot_bias is None):
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
            squares += tiles.partial_sum(p * e * e, BM, BN)
            kept += tiles.partial_sum(p, BM, BN)
            e = p * e
        else:
            squares += tiles.partial_sum(e * e, BM, BN)
            kept += tiles.partial_sum(tl.where(keep, 1.0, 0.0), BM, BN)
        total += tiles.partial_sum(e, BM, BN)
        mean = tiles.add_weighted_rows(mean, e, m, SELECTION == "expected")
    return top, total, squares, kept, mean


@triton.jit(do_not_specialize=[
    "count", "s_pos", "rng_state", "slot_bias", "slots", "ids", "bank_ids",
    "B", "K", "splits", "length", "row_offset", "col_offset",
])  # fmt: skip
def sum_kernel(
    query,  # (B, D)
    bank,  # (K, D)
    bank_tiles,  # its tensor descriptor, or None
    count,  # ()
    s_pos,  # (B,)
    rng_state,  # (2,)
    slot_bias,  # (K,), or None
    slots,  # (B, length), or None
    ids, bank_ids,  # (B,) and (K,), or None
    parts,  # (B, splits, D + 4): mean before division; shift, sum, sum of squares, count
    B: tl.int32, K: tl.int32, D: tl.int32, splits: tl.int32, length: tl.int32,
    scale, sharpness, b, row_offset: tl.int64, col_offset: tl.int64,
    SELECTION: tl.constexpr, FAST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    DPAD: tl.constexpr, DBLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One block of rows against one split of the bank."""
    split, block = tiles.block_of_rows(query, B, D, BM, DPAD, DBLOCK)
    rows, row_valid = block[0], block[1]
    lists, row_ids = None, None
    if slots is not None:
        lists = tiles.lists_of(slots, block, B, length)
    if ids is not None:
        row_ids = tiles.per_row(ids, block)
    rule = -1.0 * (tiles.per_row(s_pos, block) + b) * sharpness, sharpness
    seed, offset = 0, 0
    if SELECTION == "bernoulli":
        seed, offset = tl.load(rng_state), tl.load(rng_state + 1)
    sample = (rows + row_offset).to(tl.uint32), col_offset // 16, seed, offset

    # Tiles begin at multiples of 16 global slots, where the noise counters do.
    shift = (col_offset % 16).to(tl.int32)
    size = tl.minimum(tl.load(count), K).to(tl.int32)
    all_tiles = tl.where(size > 0, tl.cdiv(size + shift, BN), 0)
    first, last = tiles.tiles_of_split(all_tiles, split, splits, 1)
    state = _nothing(BM, DPAD)
    if FAST:
        full = tl.where(first * BN < shift, first, (size + shift) // BN)  # tiles [first, full)
        full = tl.maximum(tl.minimum(full, last), first)
        # The branch keeps a split without full tiles out of the loop's exit: where that path joins
        # it before the wait for the last product, ptxas 12.8 and 12.9 (Triton 3.7, 3.8) serialize
        # all products of the loop (C7515).
        if full > first:
            state = _scan(
                state, block, bank, bank_tiles, slot_bias, lists, length, row_ids, bank_ids, rule,
                sample, first, full, size, shift, scale, D,
                SELECTION, False, BM, BN, DPAD, DBLOCK, STAGES,
            )  # fmt: skip
        first = full
        # The shift 0 serves unit rows down to a temperature of about 0.03, and saves a maximum,
        # D / BN multiplications and a wait per element. Where it does not, start again.
        # Sums of squares inside these bounds have lost nothing to underflow or overflow.
        TINY: tl.constexpr = 2.0**-80
        HUGE: tl.constexpr = 2.0**120
        top, total, squares, kept, mean = state
        row_squares = tl.sum(squares, 1)
        any_kept = tl.sum(kept, 1) != 0.0
        sound = ((row_squares > TINY) & (row_squares < HUGE)) | (not any_kept)
        state = tl.where(any_kept, 0.0, top), total, squares, kept, mean
        if tl.min((sound | (not row_valid)).to(tl.int32)) == 0:
            first = tiles.tiles_of_split(all_tiles, split, splits, 1)[0]
            state = _nothing(BM, DPAD)
    top, total, squares, kept, mean = _scan(
        state, block, bank, bank_tiles, slot_bias, lists, length, row_ids, bank_ids, rule, sample,
        first, last, size, shift, scale, D,
        SELECTION, True, BM, BN, DPAD, DBLOCK, 1 if FAST else STAGES,
    )  # fmt: skip
    tiles.store_part(parts, block, splits, split, D, mean, top, total, squares, kept, DPAD)


def sums(
    query: Tensor, bank: Tensor, count: Tensor, s_pos: Tensor, options: PassOptions,
    exclude: Exclude, rng_state: Tensor | None, slot_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Log-sum-exp, mean, log-sum of the squares and count of what each row keeps."""
    batch, (size, dim) = query.shape[0], bank.shape
    cut = config.cut(query, bank)
    parts = config.new(bank, batch, cut.splits, dim + 4)
    sum_kernel[cut.grid](
        query, bank, cut.descriptor, count, s_pos, rng_state, slot_bias,
        exclude.slots, exclude.ids, exclude.bank_ids, parts,
        batch, size, dim, cut.splits, config.listed(exclude),
        config.LOG2E / options.temperature, sharpness_of(options.a), float(options.b),
        options.row_offset, options.col_offset, SELECTION=options.selection,
        FAST=query.dtype is not torch.float16,  # which unshifted weights overflow
        **cut.options,
    )  # fmt: skip
    return merge(parts)


def sharpness_of(a: float) -> float:
    """r of p = 2^-(r s - r (s_pos + b))^2, which takes one FFMA and one FMUL. Only a very sharp p
    could tell that r (s_pos + b) is rounded; there r is a power of two, and nothing is."""
    sharpness = math.sqrt(a * config.LOG2E)
    return 2.0 ** min(round(math.log2(sharpness)), 60) if sharpness > 2**20 else sharpness
