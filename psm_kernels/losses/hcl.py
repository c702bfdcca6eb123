"""Reweighted and debiased negatives: HCL and DCL.

With x_j = exp(s_j/tau) the reweighted sum R = n sum x^(beta + 1) / sum x^beta is two log-sum-exps
of the same rows at temperatures tau/(beta + 1) and tau/beta: two passes, one for beta = 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from psm_kernels import checks
from psm_kernels.backends.base import Exclude
from psm_kernels.bank import BankView
from psm_kernels.losses.base import BankLoss
from psm_kernels.losses.common import contrast, loss_function
from psm_kernels.losses.in_batch import Views
from psm_kernels.options import ContrastiveOptions, PassOptions


@dataclass(frozen=True)
class HCLOptions(ContrastiveOptions):
    beta: float = 1.0
    tau_plus: float = 0.1
    detach_weights: bool = False

    def __post_init__(self):
        super().__post_init__()
        checks.check_number("beta", self.beta, least=0)
        checks.check_number("tau_plus", self.tau_plus, least=0, below=1)
        checks.check_option("detach_weights", self.detach_weights, (False, True))


@loss_function(HCLOptions)
def hcl_loss(
    query: Tensor,
    key: Tensor,
    bank: BankView | Views,
    exclude: Exclude,
    options: HCLOptions,
) -> Tensor:
    """HCL: hard negatives weigh more, false ones are subtracted (arXiv 2010.04592).

    Over the n negatives of a row, with x = exp(s/tau) and x+ of the positive,

        R    = n sum_j x_j^(beta + 1) / sum_j x_j^beta
        Ng   = max((R - tau_plus n x+) / (1 - tau_plus), n exp(-1/tau))
        loss = log(x+ + Ng) - log x+

    beta = 0 is the debiased loss DCL (arXiv 2007.00224; lightly's DCLLoss is another one, the
    decoupled loss); tau_plus = 0 besides is InfoNCE.

    Args:
        query, key, bank, count: as in `info_nce_loss`; the papers have no bank.
        temperature: tau > 0 (0.5: joshr17/HCL, image/main.py).
        beta: concentration on hard negatives, >= 0 (1: the same).
        tau_plus: share of false negatives, in [0, 1) (0.1: the same).
        detach_weights: no gradient through the weights n x^beta / sum x^beta. The released code
            lets it flow, and so attracts negatives with x_j < beta R / ((beta + 1) n).
        ids, bank_ids, reduction, backend, options: as in `info_nce_loss`.

    Returns, raises: as `info_nce_loss`.
    """
    if isinstance(bank, Views):
        return bank.fold(loss_rows(view_sums(bank, options), options))
    return loss_rows(bank_sums(query, key, bank, exclude, options)[0], options)


class Sums(NamedTuple):
    """What the loss needs of R anchors. The two sums share the negatives."""

    log_pos: Tensor  # (R,) log x+
    hot: Tensor  # (R,) log sum x^(beta + 1)
    base: Tensor  # (R,) log sum x^beta
    count: Tensor  # (R,) or () how many negatives


def bank_sums(
    query: Tensor,
    key: Tensor,
    bank: BankView,
    exclude: Exclude,
    options: HCLOptions,
    topk: int = 0,
) -> tuple[Sums, Tensor]:
    """And the `topk` slots (B, topk) nearest to each query."""
    tau, beta, s_pos = options.temperature, options.beta, (query * key).sum(1)
    hot = PassOptions(tau / (beta + 1), topk=topk)
    result = bank.scan(query, query if topk else None, s_pos, hot, exclude)
    base = result.neg_count.log()
    if beta:
        base = bank.scan(query, None, s_pos, PassOptions(tau / beta), exclude).neg_lse
    return Sums(s_pos / tau, result.neg_lse, base, result.neg_count), result.topk_index


def view_sums(views: Views, options: HCLOptions) -> Sums:
    tau, beta = options.temperature, options.beta
    count = views.positive.new_full((), views.count)
    base = views.log_sum(tau / beta) if beta else count.log()
    return Sums(views.positive / tau, views.log_sum(tau / (beta + 1)), base, count)


def loss_rows(sums: Sums, options: HCLOptions) -> Tensor:
    if options.detach_weights:  # d log sum x^(beta + 1) is beta + 1 times that of constant weights
        beta = options.beta
        hot = sums.hot / (beta + 1) + (sums.hot * (beta / (beta + 1))).detach()
        sums = sums._replace(hot=hot, base=sums.base.detach())
    return contrast(sums.log_pos, _log_negatives(sums, options.temperature, options.tau_plus))


def _log_negatives(sums: Sums, temperature: float, tau_plus: float) -> Tensor:
    """log Ng (R,), all of it in logarithms: exp(1/tau) overflows fp32 below tau = 0.0113."""
    empty = sums.hot == -torch.inf
    hot, base = (torch.where(empty, 0.0, total) for total in (sums.hot, sums.base))
    log_n = sums.count.clamp_min(1).log()
    log_neg, floor = log_n + hot - base, log_n - 1 / temperature
    above = log_neg > floor
    if tau_plus:
        gap = math.log(tau_plus) + log_n + sums.log_pos - log_neg
        left = gap < 0
        log_neg = log_neg + torch.log(-torch.expm1(torch.where(left, gap, -1.0)))
        log_neg = log_neg - math.log1p(-tau_plus)
        above = left & (log_neg > floor)
    return torch.where(empty, -torch.inf, torch.where(above, log_neg, floor))


class HCLLoss(BankLoss):
    """HCL: negatives reweighted by hardness and debiased (arXiv 2010.04592); beta = 0 is DCL.

    Formula: `psm_kernels.functional.hcl_loss`. Defaults: joshr17/HCL, image/main.py.

    Args:
        temperature: tau > 0.
        memory_bank_size: (rows K, columns D), or 0 for the in-batch form, the paper's.
        beta, tau_plus, detach_weights: see there.
        All else: as in `InfoNCELoss`.
    """

    Options, function = HCLOptions, staticmethod(hcl_loss)
