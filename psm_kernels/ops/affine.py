"""A bank pass whose weights are affine in the similarity and its exponential: UnReMix's second."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from psm_kernels import _checks as checks
from psm_kernels import backends

_SLAB = 1 << 20  # similarities held at a time: 4 MB in fp32, near a core's cache


class AffinePass(NamedTuple):
    """Only `log_sum` carries a gradient, to `query`; the weights are constants."""

    log_sum: Tensor  # (B,) log sum_j w exp(s/tau), -inf when nothing weighs
    mean: Tensor  # (B, D) mean of the rows under w exp(s/tau), 0 when nothing weighs
    weight: Tensor  # (B,) sum_j w


def weighted_pass(
    query: Tensor,
    bank: Tensor,
    count: Tensor | int | None,
    *,
    temperature: float,
    alpha: Tensor,
    beta: Tensor,
    gamma: Tensor,
    top: Tensor,
    cap: Tensor,
    rho: Tensor,
    backend: str = "auto",
) -> AffinePass:
    """Weighted log-sum-exp over the bank, its gradient and the sum of the weights, in one read.

        e_ij = exp((s_ij - top_i)/tau)
        w_ij = max(alpha_i + beta_i s_ij + gamma_i min(e_ij, cap_i) + rho_j, 0)

    Args:
        query: (B, D) unit rows; rounded to the bank's dtype inside, its gradient is not.
        bank: (K, D) unit rows, contiguous; fp32, bf16, fp16, or fp64 on "reference".
        count: number of valid slots: 0-d int64 tensor on the bank's device, int, or None for K.
        temperature: tau > 0.
        alpha, beta, gamma: (B,).
        top: (B,) the row's largest similarity, so that no exponential exceeds 1.
        cap: (B,).
        rho: (K,); like `bank`, whatever lies behind `count` is not looked at.
        backend: "auto" or a name of `python -m psm_kernels`. A backend without a kernel for it
            runs slabs of the bank in plain torch.

    Raises:
        ValueError: an argument is wrong, or the named backend cannot run here.
    """
    checks.check_bank(bank)
    checks.check_matrix("query", query, like="the bank", shape=(None, bank.shape[1]))
    checks.check_number("temperature", temperature, above=0)
    rows = {"alpha": alpha, "beta": beta, "gamma": gamma, "top": top, "cap": cap}
    for name, value in (("query", query), *rows.items(), ("rho", rho)):
        if name != "query":
            checks.check_vector(name, value, len(bank if name == "rho" else query))
        checks.check_device(name, value, bank.device)
    args = (
        query,
        bank.detach(),
        checks.as_count(count, bank),
        float(temperature),
        *(value.detach() for value in rows.values()),
        rho.detach(),
        backend,
    )
    log_sum, mean, weight = torch.ops.psm_kernels.weighted_pass(*args)
    return AffinePass(log_sum, mean.detach(), weight.detach())


def valid_slabs(bank: Tensor, count: Tensor, columns: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(first slot, valid (S,), rows (S, D)) of parts of the bank that give at most _SLAB numbers
    with `columns` columns; rows in fp32 (fp64 stays), zeros where slots hold nothing."""
    step = max(1, _SLAB // columns)
    wide = torch.float64 if bank.dtype is torch.float64 else torch.float32
    for start in range(0, len(bank), step):
        rows = bank[start : start + step].to(wide)
        valid = torch.arange(start, start + len(rows), device=bank.device) < count
        yield start, valid, torch.where(valid[:, None], rows, 0.0)


def _slabs(query, bank, count, temperature, *vectors) -> tuple[Tensor, ...]:
    """The pass in plain torch, never a (B, K) matrix."""
    *rows, rho = vectors
    alpha, beta, gamma, top, cap = (value[:, None] for value in rows)
    total, weight = rho.new_zeros(len(query)), rho.new_zeros(len(query))
    mean = rho.new_zeros(query.shape)
    for start, valid, rows in valid_slabs(bank, count, len(query)):
        similarity = query.to(rows.dtype) @ rows.T  # (B, S)
        pull = torch.exp((similarity - top) / temperature)
        share = rho[start : start + len(rows)]
        bent = gamma * torch.minimum(pull, cap)
        w = (alpha + beta * similarity + bent + share).clamp_min(0)
        w = torch.where(valid, w, 0.0)
        weight += w.sum(1)
        w *= pull
        total += w.sum(1)
        mean.addmm_(w, rows)
    some = torch.where(total == 0, 1.0, total)
    return top[:, 0] / temperature + total.log(), mean / some[:, None], weight


# --- registration --------------------------------------------------------------------------------


@torch.library.custom_op("psm_kernels::weighted_pass", mutates_args=())
def _weighted_pass(
    query: Tensor,
    bank: Tensor,
    count: Tensor,
    temperature: float,
    alpha: Tensor,
    beta: Tensor,
    gamma: Tensor,
    top: Tensor,
    cap: Tensor,
    rho: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    run = getattr(backends.choose(backend, bank), "weighted_pass", _slabs)
    sums = torch.float64 if bank.dtype is torch.float64 else torch.float32
    with torch.autocast(bank.device.type, enabled=False):
        query = query.to(bank.dtype).contiguous()
        vectors = (v.to(sums).contiguous() for v in (alpha, beta, gamma, top, cap, rho))
        return run(query, bank, count, temperature, *vectors)


@_weighted_pass.register_fake
def _(query, bank, *unused):
    sums = torch.float64 if bank.dtype is torch.float64 else torch.float32
    rows = [query.new_empty(len(query), dtype=sums) for _ in range(2)]
    return rows[0], query.new_empty(query.shape, dtype=sums), rows[1]


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(output[1])
    ctx.temperature, ctx.dtype = inputs[3], inputs[0].dtype


def _backward(ctx, grad, *unused):
    (mean,) = ctx.saved_tensors
    return (grad[:, None] * mean / ctx.temperature).to(ctx.dtype), *[None] * 10


_weighted_pass.register_autograd(_backward, setup_context=_setup_context)
