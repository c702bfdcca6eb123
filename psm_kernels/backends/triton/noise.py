"""Canonical noise and the keep rule in Triton.

Constants are written in place, here and in the other kernels: a launch compares every global that
its kernel uses with the value it was compiled for, at 3 us each.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _multiply(a, b: tl.constexpr):
    """The halves of a 32 x 32 bit product: one IMAD.WIDE."""
    product = a.to(tl.uint64) * b
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def noise_words(group, j, row, seed, offset):
    """Canonical noise of slots 16 group + j, uint32, by Philox4x32-10; j and row broadcast.

    Written per element although four share a counter: in the accumulator layout of the tensor
    cores the four are registers of one thread, and the compiler merges their equal expressions. So
    a word costs a quarter of a Philox and none moves. (tl.join of four words on a (BM, BN / 4) grid
    goes through shared memory instead.)
    """
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    c0 = 4 * (group + (j // 16).to(tl.uint32)) + (j % 8 // 2).to(tl.uint32)
    c1 = row.to(tl.uint32)
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
def keep_probability(s, center, sharpness):
    """p = min(2^-(sharpness s + center)^2, 0.999): see `sums.sharpness_of`."""
    distance = s * sharpness + center  # one FFMA; s - s_pos - b first would cost one more
    return tl.minimum(tl.math.exp2(-1.0 * (distance * distance)), 0.999)
