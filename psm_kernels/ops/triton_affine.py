"""UnReMix's weighted pass in Triton; the splits are merged by the pass's own merge kernel."""

from __future__ import annotations

import triton
import triton.language as tl

from psm_kernels.ops.triton_tiles import (
    add_weighted_rows,
    columns_of,
    listed,
    own,
    partial_sum,
    products,
    store_part,
)


@triton.jit(do_not_specialize=["count", "slots", "ids", "bank_ids", "B", "K", "splits", "length"])
def weighted_pass_kernel(
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
    row_blocks = tl.cdiv(B, BM)
    split = tl.program_id(0) // row_blocks
    rows = (tl.program_id(0) % row_blocks * BM + tl.arange(0, BM)).to(tl.int64)
    row_valid = rows < B
    d = tl.arange(0, DPAD)
    d_valid = d < D
    local = tl.arange(0, BN)

    alpha = tl.load(affine + rows, mask=row_valid, other=0.0)[:, None]
    beta = tl.load(affine + B + rows, mask=row_valid, other=0.0)[:, None]
    gamma = tl.load(affine + 2 * B + rows, mask=row_valid, other=0.0)[:, None]
    top = tl.load(affine + 3 * B + rows, mask=row_valid, other=0.0)
    cap = tl.load(affine + 4 * B + rows, mask=row_valid, other=0.0)[:, None]
    query_rows = query + rows[:, None] * D
    q = 0.0
    if DBLOCK == DPAD:
        q = tl.load(
            query_rows + d[None, :], mask=row_valid[:, None] & d_valid[None, :], other=0.0
        )  # (BM, D)

    size = tl.minimum(tl.load(count), K).to(tl.int32)
    tiles = tl.cdiv(size, BN)
    per_split = tl.cdiv(tiles, splits)
    first = tl.minimum(split * per_split, tiles)
    total = tl.zeros((BM, 8), tl.float32)
    weight = tl.zeros((BM, 8), tl.float32)
    mean = tl.zeros((BM, DPAD), tl.float32)
    for tile in tl.range(first, tl.minimum(first + per_split, tiles), num_stages=STAGES):
        slot = tile * BN + local
        slot_valid = slot < size
        bank_rows = bank + slot.to(tl.int64)[:, None] * D
        m = tl.load(
            bank_rows + d[None, :], mask=slot_valid[:, None] & d_valid[None, :], other=0.0
        )  # (BN, D)
        s = products(
            q, query_rows, row_valid[:, None], m, bank_rows, slot_valid[:, None],
            D, BM, BN, DPAD, DBLOCK,
        )  # (BM, BN)  # fmt: skip
        seen = tl.broadcast_to(slot_valid[None, :], (BM, BN))
        if slots is not None:
            lists = slots + tl.minimum(rows, B - 1) * length
            bits, _ = listed(lists, length, tile * BN, BN)
            seen = seen & ~columns_of(bits, BN)
        if ids is not None:
            held = tl.load(bank_ids + slot, mask=slot_valid, other=0)
            seen = seen & ~own(tl.load(ids + rows, mask=row_valid, other=0), held)
        e = tl.math.exp2((s - top[:, None]) * scale)
        e = tl.where(seen, e, 0.0)  # what is hidden may be larger than the top, and overflow
        line = alpha + beta * s + tl.load(rho + slot, mask=slot_valid, other=0.0)[None, :]
        w = tl.maximum(line + gamma * tl.minimum(e, cap), 0.0)
        w = tl.where(seen, w, 0.0)
        weight += partial_sum(w, BM, BN)
        w *= e
        total += partial_sum(w, BM, BN)
        mean = add_weighted_rows(mean, w, m, True)  # rho may be as small or large as it likes

    # Nobody asks for the squares, so that the sum may stand for them.
    store_part(parts, rows, row_valid, splits, split, d, D, mean, top * scale, total, total, weight)
