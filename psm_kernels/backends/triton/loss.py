"""PSM's loss rows and the query's gradient out of a bank pass, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from psm_kernels.backends.base import BankPass
from psm_kernels.backends.triton import config
from psm_kernels.options import PSMOptions


@triton.jit
def softplus(x):
    """log(1 + e^x), small ones to their last digits; -inf gives 0."""
    # log(1 + y) = 2 artanh(y / (2 + y)) for y <= 1, by its series: logarithms of what is rounded to
    # 1 + y, or approximated near 1 as some chips do, have no digits of a small y left.
    y = tl.exp(-tl.abs(x))
    z = y / (2.0 + y)
    zz = z * z
    series = 1 / 7 + zz * (1 / 9 + zz * (1 / 11 + zz * (1 / 13)))
    series = zz * (1 / 3 + zz * (1 / 5 + zz * series))
    return tl.maximum(x, 0.0) + 2.0 * (z + z * series)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit(do_not_specialize=["k"])
def loss_kernel(
    query, norms,  # (B, D) fp32 unit rows, (B,) what they were divided by
    key,  # (B, D) fp32 unit rows
    bank,  # (K, D)
    s_pos, neg_lse,  # (B,)
    neg_mean,  # (B, D)
    topk_index,  # (B, k)
    loss,  # (B,)
    gradient,  # (B, D)
    D: tl.int32, k: tl.int32, temperature, weight_temperature, hard_weight, share,
    SOFT: tl.constexpr, KP: tl.constexpr, DPAD: tl.constexpr,
):  # fmt: skip
    """One row; m are its mined rows, r logits relative to the key's. n stands for the negatives,
    h for the key with them, z for all."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, DPAD)
    c = tl.arange(0, KP)
    q = tl.load(query + row * D + d, mask=d < D, other=0.0)
    plus = tl.load(key + row * D + d, mask=d < D, other=0.0)
    average = tl.load(neg_mean + row * D + d, mask=d < D, other=0.0)
    slot = tl.load(topk_index + row * k + c, mask=c < k, other=-1)
    found = slot >= 0
    m = tl.load(
        bank + slot[:, None] * D + d[None, :], mask=found[:, None] & (d < D)[None, :], other=0.0
    ).to(tl.float32)  # (KP, D)
    s = tl.sum(m * q[None, :], 1)
    logit_plus = tl.load(s_pos + row) / temperature
    r = tl.where(found, s / temperature - logit_plus, -float("inf"))
    r_n = tl.load(neg_lse + row) - logit_plus

    weight = tl.where(found, 1.0, 0.0)
    if SOFT == "attention":
        score = tl.where(found, s / weight_temperature, -1e30)
        weight *= tl.exp(score - tl.max(score))
    if SOFT != "binary":
        weight /= tl.maximum(tl.sum(weight), 1e-30)
    mined = tl.sum(weight)

    # The logarithms of Z and H are never formed: the losses may be smaller than their last digits.
    top = tl.maximum(tl.maximum(r_n, tl.max(r)), -1e30)  # finite
    others = top + tl.log(tl.exp(r_n - top) + tl.sum(tl.exp(r - top)))  # log of Z without the key
    log_z = softplus(others)  # relative to the key's logit, as all here
    gap = tl.where(found, log_z - r, 0.0)
    soft = log_z + tl.sum(weight * gap)
    tl.store(loss + row, soft + hard_weight * softplus(r_n))

    pull = 1.0 + mined
    share_n = sigmoid(r_n)  # of the negatives in H
    g_plus = mined * sigmoid(-others) - sigmoid(others) - hard_weight * share_n
    g_n = pull * tl.exp(r_n - log_z) + hard_weight * share_n
    g_m = (pull * tl.exp(r - log_z) - weight) / temperature
    if SOFT == "attention":
        g_m += weight * (gap - tl.sum(weight * gap)) / weight_temperature
    g = (g_plus * plus + g_n * average) / temperature + tl.sum(g_m[:, None] * m, 0)
    # Through the normalization: what lies along the row does nothing, the rest counts per length.
    g = share * (g - tl.sum(g * q) * q) / tl.load(norms + row)
    tl.store(gradient + row * D + d, g, mask=d < D)


def loss_and_gradient(
    query: Tensor, norms: Tensor, key: Tensor, bank: Tensor, s_pos: Tensor, result: BankPass,
    options: PSMOptions,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Loss (B,) and gradient (B, D) of the losses' sum, or of their mean, in fp32. `result`: the
    negatives' sums, without what was mined."""
    (batch, dim), k = query.shape, result.topk_index.shape[1]
    loss, gradient = config.new(query, batch), config.new(query, batch, dim)
    share = 1.0 / batch if options.reduction == "mean" else 1.0
    loss_kernel[(batch,)](
        query, norms, key, bank, s_pos, result.neg_lse, result.neg_mean, result.topk_index,
        loss, gradient, dim, k, float(options.temperature), float(options.weight_temperature),
        float(options.hard_weight), share, SOFT=options.soft_weights, KP=config.power_of_2(k, 2),
        DPAD=config.power_of_2(dim, 16), num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return loss, gradient
