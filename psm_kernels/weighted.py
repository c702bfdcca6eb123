"""The two passes of UnReMix: what each row's similarities range over, then sums whose weights are
affine in the similarity and its exponential."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from psm_kernels import checks
from psm_kernels._autograd import backward, refuse_transforms, remember, with_gradient
from psm_kernels.backends import registry
from psm_kernels.backends.base import NOTHING, Exclude
from psm_kernels.ops import check_queries, contiguous, run_topk, seen_query, without_autocast
from psm_kernels.rows import wide


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
    """Log-sum-exp and extremes of each row's similarities; arguments as in `weighted_pass`."""
    refuse_transforms(query, bank)
    count = _checked(query, bank, count, temperature)
    args = (query.detach(), bank.detach(), count, float(temperature), backend, *exclude)
    compiling = torch.compiler.is_compiling()
    return RowRanges(*(torch.ops.psm_kernels.row_ranges if compiling else _run_row_ranges)(*args))


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
    count = _checked(query, bank, count, temperature)
    rows = {"alpha": alpha, "beta": beta, "gamma": gamma, "top": top, "cap": cap}
    for name, value in (*rows.items(), ("rho", rho)):
        checks.check_vector(name, value, len(bank if name == "rho" else query))
        checks.check_device(name, value, bank.device)
    rows, rho = [value.detach() for value in rows.values()], rho.detach()
    args = (query, bank.detach(), count, float(temperature), *rows, rho, backend, *exclude)
    if torch.compiler.is_compiling():
        log_sum, mean, weight = torch.ops.psm_kernels.weighted_pass(*args)
        return WeightedPass(log_sum, mean.detach(), weight.detach())
    log_sum, mean, weight = _run_weighted_pass(*args)
    if not log_sum.requires_grad:  # by autograd itself
        log_sum = with_gradient(log_sum, mean, query, temperature)
    return WeightedPass(log_sum, mean.detach(), weight.detach())


def _checked(query: Tensor, bank: Tensor, count, temperature: float) -> Tensor:
    checks.check_bank(bank)
    check_queries("query", query, bank)
    checks.check_number("temperature", temperature, above=0)
    return checks.as_count(count, bank)


# --- registration --------------------------------------------------------------------------------


def _run_row_ranges(
    query: Tensor,
    bank: Tensor,
    count: Tensor,
    temperature: float,
    backend: str,
    slots: Tensor | None = None,
    ids: Tensor | None = None,
    bank_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.no_grad(), without_autocast(bank.device.type):
        query = query.to(bank.dtype).contiguous()
        exclude = Exclude(*contiguous(slots, ids, bank_ids))
        top, index = run_topk(query, bank, 2, count, exclude, backend)
        # Left out of the sum, not subtracted from it: 1 - pi of the largest is what matters.
        named = exclude.naming(index[:, :1])
        exclude = named._replace(slots=named.slots.contiguous())
        chosen = registry.choose(backend, bank, 1)
        rest, lowest = chosen.row_ranges(query, bank, count, temperature, exclude)
        lowest = torch.where(index[:, 0] < 0, torch.inf, torch.minimum(lowest, top[:, 0]))
        return rest, lowest, top, index


_row_ranges = torch.library.custom_op("psm_kernels::row_ranges", _run_row_ranges, mutates_args=())


@_row_ranges.register_fake
def _(query, bank, *unused):
    sums, batch = wide(bank), len(query)
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
    chosen, sums = registry.choose(backend, bank), wide(bank)
    with without_autocast(bank.device.type):
        query = seen_query(query, bank, chosen.differentiable)
        affine = torch.stack((alpha, beta, gamma, top, cap)).to(sums)
        rho, exclude = rho.to(sums).contiguous(), Exclude(*contiguous(slots, ids, bank_ids))
        return chosen.weighted_pass(query, bank, count, temperature, affine, rho, exclude)


_weighted_pass = torch.library.custom_op(
    "psm_kernels::weighted_pass", _run_weighted_pass, mutates_args=()
)


@_weighted_pass.register_fake
def _(query, bank, *unused):
    sums = wide(bank)
    rows = [query.new_empty(len(query), dtype=sums) for _ in range(2)]
    return rows[0], query.new_empty(query.shape, dtype=sums), rows[1]


def _setup_context(ctx, inputs, output):
    query, _, _, temperature, *others = inputs
    _, mean, _ = output
    remember(ctx, query, mean, temperature, inputs=4 + len(others))


_weighted_pass.register_autograd(backward, setup_context=_setup_context)
