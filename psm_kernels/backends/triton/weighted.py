"""UnReMix's weighted pass in Triton: sums whose weights are affine in the similarity."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from psm_kernels.backends.base import Exclude
from psm_kernels.backends.triton import config, tiles
from psm_kernels.backends.triton.merge import merge


@triton.jit(do_not_specialize=["count", "slots", "ids", "bank_ids", "B", "K", "splits", "length"])
def weighted_kernel(
    query,  # (B, D)
    bank,  # (K, D)
    count,  # ()
    affine,  # (5, B): alpha, beta, gamma, top, cap
    rho,  # (K,)
    slots,  # (B, length), or None
    ids, bank_ids,  # (B,) and (K,), or None
    parts,  # (B, splits, D + 4): mean before division; shift, sum, sum of squares, of weights
    B: tl.int32, K: tl.int32, D: tl.int32, splits: tl.int32, length: tl.int32, scale,
    BM: tl.constexpr, BN: tl.constexpr, DPAD: tl.constexpr, DBLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One block of rows against one split of the bank. The row's top is known, so it is the shift
    of all exponents and nothing is scaled again."""
    split, block = tiles.block_of_rows(query, B, D, BM, DPAD, DBLOCK)
    alpha = tiles.per_row(affine, block)[:, None]
    beta = tiles.per_row(affine + B, block)[:, None]
    gamma = tiles.per_row(affine + 2 * B, block)[:, None]
    top = tiles.per_row(affine + 3 * B, block)
    cap = tiles.per_row(affine + 4 * B, block)[:, None]
    lists, row_ids = None, None
    if slots is not None:
        lists = tiles.lists_of(slots, block, B, length)
    if ids is not None:
        row_ids = tiles.per_row(ids, block)

    size = tl.minimum(tl.load(count), K).to(tl.int32)
    first, last = tiles.tiles_of_split(tl.cdiv(size, BN), split, splits, 1)
    total = tl.zeros((BM, 8), tl.float32)
    weight = tl.zeros((BM, 8), tl.float32)
    mean = tl.zeros((BM, DPAD), tl.float32)
    for tile in tl.range(first, last, num_stages=STAGES):
        start = tile * BN
        slot = start + tl.arange(0, BN)
        slot_valid = slot < size
        m, s = tiles.scores(block, bank, None, start, slot_valid, D, True, BM, BN, DPAD, DBLOCK)
        seen = tl.broadcast_to(slot_valid[None, :], (BM, BN))
        if lists is not None:
            bits, _ = tiles.listed(lists, length, start, BN)
            seen = seen & ~tiles.columns_of(bits, BN)
        if row_ids is not None:
            seen = seen & ~tiles.own(row_ids, bank_ids, start, slot_valid, BN)
        e = tl.math.exp2((s - top[:, None]) * scale)
        e = tl.where(seen, e, 0.0)  # what is hidden may be larger than the top, and overflow
        offset = tl.load(rho + slot, mask=slot_valid, other=0.0)[None, :]
        w = tl.maximum(alpha + beta * s + offset + gamma * tl.minimum(e, cap), 0.0)
        w = tl.where(seen, w, 0.0)
        weight += tiles.partial_sum(w, BM, BN)
        w *= e
        total += tiles.partial_sum(w, BM, BN)
        mean = tiles.add_weighted_rows(mean, w, m, True)  # rho may be as small or large as it likes

    # Nobody asks for the squares, so that the sum may stand for them.
    top *= scale
    tiles.store_part(parts, block, splits, split, D, mean, top, total, total, weight, DPAD)


def weighted_sums(
    query: Tensor, bank: Tensor, count: Tensor, temperature: float, affine: Tensor, rho: Tensor,
    exclude: Exclude,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Log of the weighted sum, weighted mean, sum of the weights."""
    batch, (size, dim) = query.shape[0], bank.shape
    cut = config.cut(query, bank)
    parts = config.new(bank, batch, cut.splits, dim + 4)
    weighted_kernel[cut.grid](
        query, bank, count, affine, rho, exclude.slots, exclude.ids, exclude.bank_ids, parts,
        batch, size, dim, cut.splits, config.listed(exclude), config.LOG2E / temperature,
        **cut.options,
    )  # fmt: skip
    log_sum, mean, _, weight = merge(parts)
    return log_sum, mean, weight
