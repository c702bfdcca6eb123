"""What passes over bank tiles share: products, row sums, what rows must not see, and the partial
result of one split."""

from __future__ import annotations

import triton
import triton.language as tl

from psm_kernels.ops.triton import interpreted


@triton.jit
def partial_sum(x, BM: tl.constexpr, BN: tl.constexpr):
    """Row sums but for the last 8: (BM, BN) to (BM, 8), inside each thread, without shuffles."""
    return tl.sum(tl.reshape(x, (BM, BN // 8, 8)), 1)


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
    x, x_rows, x_valid, m, m_rows, m_valid, D,
    BM: tl.constexpr, BN: tl.constexpr, DPAD: tl.constexpr, DBLOCK: tl.constexpr,
):  # fmt: skip
    """x . m, (BM, BN), of the tiles at hand, or of column blocks loaded again where both tiles do
    not fit beside each other (wide rows) or unroll into too many FMAs (fp32)."""
    if DBLOCK == DPAD:
        return dot(x, tl.trans(m))
    s = tl.zeros((BM, BN), tl.float32)
    for d0 in tl.range(0, D, DBLOCK, num_stages=1):
        d = d0 + tl.arange(0, DBLOCK)
        x_block = tl.load(x_rows + d[None, :], mask=x_valid & (d < D)[None, :], other=0.0)
        m_block = tl.load(m_rows + d[None, :], mask=m_valid & (d < D)[None, :], other=0.0)
        s = dot(x_block, tl.trans(m_block), s)
    return s


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
def own(ids, held):
    """(BM, BN) bool: a slot holds the row's id, or nothing. ids: (BM,), held: (BN,)."""
    EMPTY: tl.constexpr = -2
    return (held[None, :] == ids[:, None]) | (held == EMPTY)[None, :]


@triton.jit
def store_part(
    parts, rows, row_valid, splits, split, d, D,
    mean, top, total, squares, weight,  # (BM, D), (BM,), the rest (BM, 8)
):  # fmt: skip
    out = parts + (rows * splits + split) * (D + 4)
    tl.store(out[:, None] + d[None, :], mean, mask=row_valid[:, None] & (d < D)[None, :])
    tl.store(out + D, top, mask=row_valid)
    tl.store(out + D + 1, tl.sum(total, 1), mask=row_valid)
    tl.store(out + D + 2, tl.sum(squares, 1), mask=row_valid)
    tl.store(out + D + 3, tl.sum(weight, 1), mask=row_valid)
