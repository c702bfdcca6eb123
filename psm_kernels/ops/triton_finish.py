"""PSM's finish in one launch: loss rows, the query's gradient and statistics out of a bank pass.

The differentiable finish of `functional.py` is the general path; this one serves a loss alone."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from psm_kernels.ops.triton import sharpness_of
from psm_kernels.ops.triton_noise import is_drawn, keep_center, keep_probability, noise_words


@triton.jit
def _less(log_sum, logits, keep, none):
    """log(exp(log_sum) - sum keep exp(logits)), -inf where nothing is left."""
    shift = tl.where(log_sum == -float("inf"), 0.0, log_sum)
    rest = tl.exp(log_sum - shift) - tl.sum(tl.where(keep > 0, keep * tl.exp(logits - shift), 0.0))
    none = none | (rest <= 0)
    return tl.where(none, -float("inf"), shift + tl.log(tl.where(none, 1.0, rest)))


@triton.jit(do_not_specialize=["B", "k", "row_offset"])
def finish_kernel(
    query, key,  # (B, D) fp32 unit rows
    bank,  # (K, D)
    s_pos, neg_lse, neg_sq_lse, neg_count,  # (B,)
    neg_mean,  # (B, D)
    topk_index,  # (B, k)
    rng_state,  # (2,)
    loss,  # (B,)
    grad_query,  # (B, D)
    stats,  # (3, B)
    B: tl.int32, D: tl.int32, k: tl.int32,
    temperature, weight_temperature, hard_weight, sharpness, b, row_offset: tl.int64,
    SELECTION: tl.constexpr, SOFT: tl.constexpr, KP: tl.constexpr, DPAD: tl.constexpr,
):  # fmt: skip
    """One row; c runs over its mined positives, plus over its key, N over its negatives."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, DPAD)
    c = tl.arange(0, KP)
    q = tl.load(query + row * D + d, mask=d < D, other=0.0)
    plus = tl.load(key + row * D + d, mask=d < D, other=0.0)
    slot = tl.load(topk_index + row * k + c, mask=c < k, other=-1)
    found = slot >= 0
    rows = tl.load(
        bank + slot[:, None] * D + d[None, :], mask=found[:, None] & (d < D)[None, :], other=0.0
    )
    seen = q.to(rows.dtype).to(tl.float32)  # as the pass rounds it
    m = rows.to(tl.float32)  # (KP, D)
    s = tl.sum(m * seen[None, :], 1)
    s_plus = tl.load(s_pos + row)
    logit = tl.where(found, s / temperature, -float("inf"))
    logit_plus = s_plus / temperature

    keep = tl.where(found, 1.0, 0.0)
    if SELECTION != "all":
        p = keep_probability(s, keep_center(s_plus, b, sharpness), sharpness)  # (KP,)
        if SELECTION == "bernoulli":
            seed, offset = tl.load(rng_state), tl.load(rng_state + 1)
            p = tl.where(
                is_drawn(noise_words(0, slot, row + row_offset, seed, offset), p), 1.0, 0.0
            )
        keep = tl.where(found, p, 0.0)
    count = tl.load(neg_count + row) - tl.sum(keep)
    none = (count <= 0) & (SELECTION != "expected")
    lse = tl.load(neg_lse + row)
    log_n = _less(lse, logit, keep, none)
    log_sq = _less(tl.load(neg_sq_lse + row), 2 * logit, keep, none)
    count = tl.maximum(count, 0.0)

    weight = tl.where(found, 1.0, 0.0)
    mined = tl.maximum(tl.sum(weight), 1.0)
    if SOFT == "attention":
        score = tl.where(found, tl.sum(m * q[None, :], 1) / weight_temperature, -1e30)
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

    # d N / d q = (sum of all kept - kept mined) / tau, both over Z (soft) and H (hard)
    left = tl.where(log_n == -float("inf"), 0.0, 1.0)
    force = pull * tl.exp(-log_z + log_h) + hard_weight  # times exp(s/tau) / H
    g_c = pull * tl.exp(logit - log_z) - weight
    g_c -= left * tl.where(keep > 0, keep * force * tl.exp(logit - log_h), 0.0)
    g_plus = pull * tl.exp(logit_plus - log_z) - 1
    g_plus += hard_weight * (tl.exp(logit_plus - log_h) - 1)
    average = tl.load(neg_mean + row * D + d, mask=d < D, other=0.0)
    g_n = left * force * tl.where(left > 0, tl.exp(lse - log_h), 0.0)
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
    swept: tuple[Tensor, ...],  # the six tensors of bank_pass
    *,
    temperature: float,
    selection: str,
    a: float,
    b: float,
    soft_weights: str,
    weight_temperature: float,
    hard_weight: float,
    rng_state: Tensor | None,  # (2,)
    row_offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """loss (B,), its gradient with respect to the unit query (B, D), and stats (3, B): the kept
    count, mean and variance of g over the kept negatives. Attention is the query's own."""
    neg_lse, neg_mean, neg_sq_lse, neg_count, _, topk_index = swept
    batch, dim = query.shape
    k = topk_index.shape[1]
    loss, grad_query = torch.empty_like(s_pos), torch.empty_like(query)
    stats = query.new_empty(3, batch)
    finish_kernel[(batch,)](
        query, key, bank, s_pos, neg_lse, neg_sq_lse, neg_count, neg_mean, topk_index, rng_state,
        loss, grad_query, stats, batch, dim, k,
        float(temperature), float(weight_temperature), float(hard_weight),
        sharpness_of(a), float(b), row_offset,
        SELECTION=selection, SOFT=soft_weights,
        KP=triton.next_power_of_2(max(k, 2)), DPAD=triton.next_power_of_2(max(dim, 16)),
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return loss, grad_query, stats
