"""The two passes of UnReMix: what each row's similarities range over, then sums whose weights are
affine in the similarity and its exponential."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from psm_kernels import checks
from psm_kernels import backends
from psm_kernels._autograd import once, refuse_transforms
from psm_kernels.ops import NOTHING, Exclude, bank_pass, bank_topk, differentiable, seen_query

_SLAB = 1 << 20  # similarities held at a time: 4 MB in fp32, near a core's cache


class RowRanges(NamedTuple):
    """All of it without gradient."""

    rest: Tensor  # (B,) log of sum_j exp(s/tau) without the largest, -inf when there is no other
    lowest: Tensor  # (B,) the smallest similarity, +inf in an empty bank
    top: Tensor  # (B, 2) the two largest, descending; missing: -inf
    index: Tensor  # (B, 2) their slots; missing: -1


class WeightedPass(NamedTuple):
    """Only `log_sum` carries a gradient, to `query`; the weights are constants."""

    log_sum: Tensor  # (B,) log sum_j w exp(s/tau), -inf when nothing weighs
    mean: Tensor  # (B, D) mean of the rows under w exp(s/tau), 0 when nothing weighs
    weight: Tensor  # (B,) sum_j w


def row_ranges(
    query: Tensor,
    bank: Tensor,
    count: Tensor | int | None,
    *,
    temperature: float,
    exclude: Exclude = NOTHING,
    backend: str = "auto",
) -> RowRanges:
    """Log-sum-exp and extremes of each row's similarities; arguments as in `weighted_pass`.

    A backend may define `row_ranges(query, bank, count, temperature, exclude)` that gives the
    log-sum-exp and the lowest similarity in one read."""
    refuse_transforms(query, bank)
    _check(query, bank, temperature)
    count = checks.as_count(count, bank)
    args = (query.detach(), bank.detach(), count, float(temperature), backend, *exclude)
    return RowRanges(*torch.ops.psm_kernels.row_ranges(*args))


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
    exclude: Exclude = NOTHING,
    backend: str = "auto",
) -> WeightedPass:
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
        exclude: slots that a row must not see, as `psm_kernels.ops.excluded` makes it.
        backend: "auto" or a name of `python -m psm_kernels`. A backend without a kernel for it
            runs slabs of the bank in plain torch.

    Raises:
        ValueError: an argument is wrong, or the named backend cannot run here.
    """
    refuse_transforms(query, bank, alpha, beta, gamma, top, cap, rho)
    _check(query, bank, temperature)
    rows = {"alpha": alpha, "beta": beta, "gamma": gamma, "top": top, "cap": cap}
    for name, value in (*rows.items(), ("rho", rho)):
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
        *exclude,
    )
    run = torch.ops.psm_kernels.weighted_pass
    if not torch.compiler.is_compiling() and differentiable(backend, bank):
        run = _run_weighted_pass
    log_sum, mean, weight = run(*args)
    return WeightedPass(log_sum, mean.detach(), weight.detach())


def _check(query: Tensor, bank: Tensor, temperature: float) -> None:
    checks.check_bank(bank)
    checks.check_matrix("query", query, like="the bank", shape=(None, bank.shape[1]))
    checks.check_device("query", query, bank.device)
    checks.check_number("temperature", temperature, above=0)


def _slabs(query, bank, count, temperature, affine, rho, exclude) -> tuple[Tensor, ...]:
    """The weighted pass in plain torch, never a (B, K) matrix; `affine` is (5, B)."""
    alpha, beta, gamma, top, cap = affine[:, :, None]
    total, weight = rho.new_zeros(len(query)), rho.new_zeros(len(query))
    mean = rho.new_zeros(query.shape)
    step = max(1, _SLAB // len(query))
    for start in range(0, len(bank), step):
        rows = bank[start : start + step].to(rho.dtype)
        slots = torch.arange(start, start + len(rows), device=bank.device)
        rows = torch.where((slots < count)[:, None], rows, 0.0)
        seen = exclude.seen(slots, count)  # (B, S) or (1, S)
        similarity = query.to(rho.dtype) @ rows.T  # (B, S)
        # What is not seen may be nearer than the top: its exponential would be infinite.
        pull = torch.exp(torch.where(seen, similarity - top, -torch.inf) / temperature)
        line = alpha + beta * similarity.detach() + rho[start : start + step]
        w = (line + gamma * torch.minimum(pull.detach(), cap)).clamp_min(0)
        w = torch.where(seen, w, 0.0)
        weight += w.sum(1)
        w = w * pull
        total = total + w.sum(1)
        mean.addmm_(w.detach(), rows)
    none = total == 0
    some = torch.where(none, 1.0, total)
    log_sum = top[:, 0] / temperature + torch.where(none, -torch.inf, some.log())
    return log_sum, mean / some.detach()[:, None], weight


# --- registration --------------------------------------------------------------------------------


@torch.library.custom_op("psm_kernels::row_ranges", mutates_args=())
def _row_ranges(
    query: Tensor,
    bank: Tensor,
    count: Tensor,
    temperature: float,
    backend: str,
    slots: Tensor | None = None,
    ids: Tensor | None = None,
    bank_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    own = getattr(backends.choose(backend, bank), "row_ranges", None)
    with torch.autocast(bank.device.type, enabled=False):
        query = query.to(bank.dtype).contiguous()
        exclude = Exclude(slots, ids, bank_ids)
        top, index = bank_topk(query, bank, 2, count=count, exclude=exclude, backend=backend)
        # Left out of the sum, not subtracted from it: 1 - pi of the largest is what matters.
        named = exclude.naming(index[:, :1])
        exclude = named._replace(slots=named.slots.contiguous())
        if own is not None:
            rest, lowest = own(query, bank, count, temperature, exclude)
        else:
            swept = bank_pass(
                query,
                -query,
                bank,
                count,
                query.new_zeros(len(query)),
                temperature=temperature,
                topk=1,
                exclude=exclude,
                backend=backend,
            )
            rest, lowest = swept.neg_lse, -swept.topk_sim[:, 0]
        lowest = torch.where(index[:, 0] < 0, torch.inf, torch.minimum(lowest, top[:, 0]))
        return rest, lowest, top, index


@_row_ranges.register_fake
def _(query, bank, *unused):
    sums = torch.float64 if bank.dtype is torch.float64 else torch.float32
    batch = len(query)
    rows = [query.new_empty(batch, dtype=sums) for _ in range(2)]
    index = query.new_empty((batch, 2), dtype=torch.int64)
    return *rows, query.new_empty((batch, 2), dtype=sums), index


def _run_weighted_pass(
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
    slots: Tensor | None = None,
    ids: Tensor | None = None,
    bank_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    run = getattr(backends.choose(backend, bank), "weighted_pass", _slabs)
    sums = torch.float64 if bank.dtype is torch.float64 else torch.float32
    with torch.autocast(bank.device.type, enabled=False):
        query = seen_query(query, bank, backend)
        affine = torch.stack((alpha, beta, gamma, top, cap)).to(sums)
        rho = rho.to(sums).contiguous()
        exclude = Exclude(slots, ids, bank_ids)
        return tuple(run(query, bank, count, temperature, affine, rho, exclude))


_weighted_pass = torch.library.custom_op(
    "psm_kernels::weighted_pass", _run_weighted_pass, mutates_args=()
)


@_weighted_pass.register_fake
def _(query, bank, *unused):
    sums = torch.float64 if bank.dtype is torch.float64 else torch.float32
    rows = [query.new_empty(len(query), dtype=sums) for _ in range(2)]
    return rows[0], query.new_empty(query.shape, dtype=sums), rows[1]


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(output[1])
    ctx.query, ctx.temperature = inputs[0], inputs[3]


def _backward(ctx, grad, *unused):
    mean = once(*ctx.saved_tensors, ctx.query)
    return (grad[:, None] * mean / ctx.temperature).to(ctx.query.dtype), *[None] * 13


_weighted_pass.register_autograd(_backward, setup_context=_setup_context)
