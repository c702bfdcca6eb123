"""The splits of a pass into one result."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from psm_kernels.backends.triton import config


@triton.jit(do_not_specialize=["splits"])
def merge_kernel(
    parts,  # (B, splits, D + 4), as `tiles.store_part` leaves them
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


def merge(parts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-sum-exp (B,), mean (B, D), log-sum of the squares (B,) and count (B,) of all splits."""
    (batch, splits, _), dim = parts.shape, parts.shape[2] - 4
    # Tensors of their own, not views of one: outputs of a registered operator may not alias.
    lse, sq_lse, count = (config.new(parts, batch) for _ in range(3))
    mean = config.new(parts, batch, dim)
    padded = config.power_of_2(dim, 16)
    merge_kernel[(batch,)](
        parts, lse, sq_lse, count, mean, splits, dim,
        SPLITS=32 if padded <= 128 else 16, DPAD=padded, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return lse, mean, sq_lse, count
