"""What kernels over bank tiles share: which part is a program's, scores of a tile, row sums, what
rows must not see, and the result of one split."""

from __future__ import annotations

import triton
import triton.language as tl

from psm_kernels.backends.triton.config import interpreted


@triton.jit
def block_of_rows(x, B, D, BM: tl.constexpr, DPAD: tl.constexpr, DBLOCK: tl.constexpr):
    """The program's split, and its block of rows of x (B, D): their indices (BM,), which are valid,
    x, and the rows (BM, DPAD), or 0 where `scores` loads them in blocks of columns. Programs of a
    split are neighbors, so that its slots come from memory once and from L2 after that."""
    row_blocks = tl.cdiv(B, BM)
    split = tl.program_id(0) // row_blocks
    rows = (tl.program_id(0) % row_blocks * BM + tl.arange(0, BM)).to(tl.int64)
    row_valid = rows < B
    whole = 0.0
    if DBLOCK == DPAD:
        d = tl.arange(0, DPAD)[None, :]
        whole = tl.load(x + rows[:, None] * D + d, mask=row_valid[:, None] & (d < D), other=0.0)
    return split, (rows, row_valid, x, whole)


@triton.jit
def tiles_of_split(tiles, split, splits, UNIT: tl.constexpr):
    """[first, last), in whole units of UNIT tiles."""
    per_split = tl.cdiv(tl.cdiv(tiles, UNIT), splits) * UNIT
    first = tl.minimum(split * per_split, tiles)
    return first, tl.minimum(first + per_split, tiles)


@triton.jit
def per_row(x, block):
    """The rows' entries (BM,) of x (B,)."""
    return tl.load(x + block[0], mask=block[1], other=0)


@triton.jit
def lists_of(slots, block, B, length):
    """Addresses (BM,) of the rows' lists; rows behind the last read its list."""
    return slots + tl.minimum(block[0], B - 1) * length


if interpreted():

    @triton.jit
    def dot(x, y, acc=None):  # the interpreter would multiply the bits of bf16
        return tl.dot(x.to(tl.float32), y.to(tl.float32), acc, input_precision="ieee")

else:

    @triton.jit
    def dot(x, y, acc=None):
        return tl.dot(x, y, acc, input_precision="ieee")


@triton.jit
def products(
    block, bank, start, slot_valid, D,
    BM: tl.constexpr, BN: tl.constexpr, DBLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Of the block with the slots from `start` on (BM, BN), in blocks of columns."""
    rows, row_valid, x, _ = block
    local = tl.arange(0, BN)
    tile_rows = bank + start.to(tl.int64) * D
    s = tl.zeros((BM, BN), tl.float32)
    for first in tl.range(0, D, DBLOCK, num_stages=STAGES):
        c = first + tl.arange(0, DBLOCK)[None, :]
        x_valid, m_valid = row_valid[:, None] & (c < D), slot_valid[:, None] & (c < D)
        x_block = tl.load(x + rows[:, None] * D + c, mask=x_valid, other=0.0)
        m_block = tl.load(tile_rows + local[:, None] * D + c, mask=m_valid, other=0.0)
        s = dot(x_block, tl.trans(m_block), s)
    return s


@triton.jit
def scores(
    block, bank, bank_tiles, start, slot_valid, D,
    GENERAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DPAD: tl.constexpr,
    DBLOCK: tl.constexpr,
):  # fmt: skip
    """The bank's tile from slot `start` on (BN, DPAD), and its products with the block (BM, BN).
    Without GENERAL all of its slots (BN,) are valid."""
    whole = block[3]
    local = tl.arange(0, BN)
    d = tl.arange(0, DPAD)
    tile_rows = bank + start.to(tl.int64) * D
    in_tile = local[:, None] * D + d[None, :]  # offsets within a tile fit 32 bits
    if GENERAL:
        valid = slot_valid[:, None] & (d < D)[None, :]
        m = tl.load(tile_rows + in_tile, mask=valid, other=0.0)
    elif bank_tiles is not None:
        m = bank_tiles.load([start, 0])
    else:
        m = tl.load(tile_rows + in_tile, mask=(d < D)[None, :], other=0.0)
    if DBLOCK == DPAD:
        s = dot(whole, tl.trans(m))
    else:  # both would not fit beside each other (wide rows), or unroll into too many FMAs (fp32)
        s = products(block, bank, start, slot_valid, D, BM, BN, DBLOCK, 1)
    return m, s


@triton.jit
def partial_sum(x, BM: tl.constexpr, BN: tl.constexpr):
    """Row sums but for the last 8: (BM, BN) to (BM, 8), inside each thread, without shuffles."""
    return tl.sum(tl.reshape(x, (BM, BN // 8, 8)), 1)


@triton.jit
def add_weighted_rows(mean, weight, m, SMALL: tl.constexpr):
    """mean + weight . m. SMALL: a whole row of weights may be below the range of fp16, 6e-5, where
    they lose bits; then its largest becomes 1 for the product."""
    if SMALL and m.dtype == tl.float16:
        largest = tl.maximum(tl.max(weight, 1), 1e-37)[:, None]
        return mean + largest * dot((weight / largest).to(m.dtype), m)
    return dot(weight.to(m.dtype), m, mean)


@triton.jit
def listed(slots, length, first, WIDTH: tl.constexpr):
    """Of each list, a bit for every slot of [first, first + WIDTH) that it names, (N,) int64; and
    how far behind `first` the next slot that it names is, (N,). slots: (N,) addresses of lists,
    all `length` long; first: a scalar or (N,)."""
    bits = tl.zeros(slots.shape, tl.int64)
    FAR: tl.constexpr = 2**31 - 1
    ahead = tl.full(slots.shape, FAR, tl.int32)
    for entry in range(0, length):
        at = tl.load(slots + entry) - first
        bits |= tl.where((at >= 0) & (at < WIDTH), 1 << at, 0)
        ahead = tl.minimum(ahead, tl.where((at >= WIDTH) & (at < FAR), at.to(tl.int32), FAR))
    return bits, ahead


@triton.jit
def columns_of(bits, BN: tl.constexpr):
    """(BM, BN) bool: the bit of each column, BN <= 64, in the row's `bits` (BM,)."""
    # Halves of 32 bits: in a register the half and the mask of its column are constants.
    column = tl.arange(0, BN)[None, :]
    low, high = bits.to(tl.uint32)[:, None], (bits >> 32).to(tl.uint32)[:, None]
    return (tl.where(column < 32, low, high) & (1 << (column % 32).to(tl.uint32))) != 0


@triton.jit
def own(ids, bank_ids, start, slot_valid, BN: tl.constexpr):
    """(BM, BN) bool: a slot of the tile holds the row's id, or nothing. ids: (BM,)."""
    EMPTY: tl.constexpr = -2
    held = tl.load(bank_ids + start + tl.arange(0, BN), mask=slot_valid, other=0)
    return (held[None, :] == ids[:, None]) | (held == EMPTY)[None, :]


@triton.jit
def store_part(
    parts, block, splits, split, D,
    mean, top, total, squares, weight,  # (BM, D), (BM,), the rest (BM, 8)
    DPAD: tl.constexpr,
):  # fmt: skip
    rows, row_valid = block[0], block[1]
    d = tl.arange(0, DPAD)[None, :]
    out = parts + (rows * splits + split) * (D + 4)
    tl.store(out[:, None] + d, mean, mask=row_valid[:, None] & (d < D))
    tl.store(out + D, top, mask=row_valid)
    tl.store(out + D + 1, tl.sum(total, 1), mask=row_valid)
    tl.store(out + D + 2, tl.sum(squares, 1), mask=row_valid)
    tl.store(out + D + 3, tl.sum(weight, 1), mask=row_valid)
