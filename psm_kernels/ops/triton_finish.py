"""PSM's finish in one launch: loss rows, the query's gradient and statistics out of a bank pass.

The differentiable finish of `functional.py` is the general path; this one serves a loss alone."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["B", "k"])
def finish_kernel(
    query, key,  # (B, D) fp32 unit rows
    bank,  # (K, D)
    s_pos, neg_lse, neg_sq_lse, neg_count,  # (B,)
    neg_mean,  # (B, D)
    topk_index,  # (B, k)
    loss,  # (B,)
    grad_query,  # (B, D)
    stats,  # (3, B)
    B: tl.int32, D: tl.int32, k: tl.int32,
    temperature, weight_temperature, hard_weight,
    SOFT: tl.constexpr, KP: tl.constexpr, DPAD: tl.constexpr,
):  # fmt: skip
    """One row; c runs over its mined positives, plus over its key, N over its negatives."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, DPAD)
    c = tl.arange(0, KP)
    q = tl.load(query + row * D + d, mask=d < D, other=0.0)
    plus = tl.load(key + row * D + d, mask=d < D, other=0.0)
    slot = tl.load(topk_index + row * k + c, mask=c < k, other=-1)
    found = slot >= 0
    m = tl.load(
        bank + slot[:, None] * D + d[None, :], mask=found[:, None] & (d < D)[None, :], other=0.0
    ).to(tl.float32)  # (KP, D)
    s = tl.sum(m * q[None, :], 1)
    logit = tl.where(found, s / temperature, -float("inf"))
    logit_plus = tl.load(s_pos + row) / temperature
    log_n = tl.load(neg_lse + row)
    log_sq = tl.load(neg_sq_lse + row)
    count = tl.load(neg_count + row)

    weight = tl.where(found, 1.0, 0.0)
    mined = tl.maximum(tl.sum(weight), 1.0)
    if SOFT == "attention":
        score = tl.where(found, s / weight_temperature, -1e30)
        weight *= tl.exp(score - tl.max(score))
        weight /= tl.maximum(tl.sum(weight), 1e-30)
    elif SOFT == "uniform":
        weight /= mined
    pull = 1.0 + tl.sum(weight)

    top = tl.maximum(tl.maximum(logit_plus, log_n), tl.max(logit))
    log_h = tl.maximum(logit_plus, log_n)
    log_h += tl.log(tl.exp(logit_plus - log_h) + tl.exp(log_n - log_h))
    log_z = tl.exp(logit_plus - top) + tl.exp(log_n - top) + tl.sum(tl.exp(logit - top))
    log_z = top + tl.log(log_z)
    gap = tl.where(found, log_z - logit, 0.0)
    hard = log_h - logit_plus
    tl.store(loss + row, log_z - logit_plus + tl.sum(weight * gap) + hard_weight * hard)

    force = pull * tl.exp(log_h - log_z) + hard_weight  # times N / H: the pull of the negatives
    g_c = pull * tl.exp(logit - log_z) - weight
    g_plus = pull * tl.exp(logit_plus - log_z) - 1
    g_plus += hard_weight * (tl.exp(logit_plus - log_h) - 1)
    average = tl.load(neg_mean + row * D + d, mask=d < D, other=0.0)
    g_n = force * tl.exp(log_n - log_h)
    gradient = (g_plus * plus + g_n * average + tl.sum(g_c[:, None] * m, 0)) / temperature
    if SOFT == "attention":
        g_w = weight * (gap - tl.sum(weight * gap)) / weight_temperature
        gradient += tl.sum(g_w[:, None] * m, 0)
    tl.store(grad_query + row * D + d, gradient, mask=d < D)

    # g_ij = exp(s_ij / tau) force / (tau H) over the kept negatives
    log_pull = tl.log(force) - log_h - tl.log(temperature)
    kept = tl.maximum(count, 1.0)
    mean = tl.exp(log_n + log_pull) / kept
    square = tl.exp(log_sq + 2 * log_pull) / kept
    tl.store(stats + row, count)
    tl.store(stats + B + row, mean)
    tl.store(stats + 2 * B + row, tl.maximum(square - mean * mean, 0.0))


def finish(
    query: Tensor,  # (B, D) fp32 unit rows
    key: Tensor,  # (B, D) fp32 unit rows
    bank: Tensor,  # (K, D)
    s_pos: Tensor,  # (B,)
    swept: tuple[Tensor, ...],  # the six tensors of bank_pass, its sums without the mined
    *,
    temperature: float,
    soft_weights: str,
    weight_temperature: float,
    hard_weight: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """loss (B,), its gradient with respect to the unit query (B, D), and stats (3, B): the kept
    count, mean and variance of g over the kept negatives. Attention is the query's own."""
    neg_lse, neg_mean, neg_sq_lse, neg_count, _, topk_index = swept
    batch, dim = query.shape
    k = topk_index.shape[1]
    loss, grad_query = torch.empty_like(s_pos), torch.empty_like(query)
    stats = query.new_empty(3, batch)
    finish_kernel[(batch,)](
        query, key, bank, s_pos, neg_lse, neg_sq_lse, neg_count, neg_mean, topk_index,
        loss, grad_query, stats, batch, dim, k,
        float(temperature), float(weight_temperature), float(hard_weight), SOFT=soft_weights,
        KP=triton.next_power_of_2(max(k, 2)), DPAD=triton.next_power_of_2(max(dim, 16)),
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return loss, grad_query, stats
