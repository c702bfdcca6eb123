"""ReSSL: the query is to resemble the bank's rows as the key does."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from psm_kernels import checks
from psm_kernels.backends.base import Exclude
from psm_kernels.bank import BankView
from psm_kernels.losses.base import BankLoss
from psm_kernels.losses.common import loss_function
from psm_kernels.options import ContrastiveOptions, PassOptions


@dataclass(frozen=True)
class ReSSLOptions(ContrastiveOptions):
    temperature: float = 0.1
    teacher_temperature: float = 0.04

    def __post_init__(self):
        super().__post_init__()
        checks.check_number("teacher_temperature", self.teacher_temperature, above=0)


@loss_function(ReSSLOptions, needs_bank=True)
def ressl_loss(
    query: Tensor,
    key: Tensor,
    bank: BankView,
    exclude: Exclude,
    options: ReSSLOptions,
) -> Tensor:
    """ReSSL: cross entropy between the key's and the query's relations (arXiv 2107.09282).

    With y = softmax_j(key . m_j / teacher_temperature) over the bank's rows m, without gradient,

        loss = - sum_j y_j log softmax_j(query . m_j / tau)
             = log sum_j exp(query . m_j / tau) - query . (sum_j y_j m_j) / tau

    The key is not among the rows. The last sum is the mean of a pass of the key: two passes over
    the bank and a dot product.

    Args:
        query, key, bank, count: as in `info_nce_loss`, but `key` gets no gradient; there is no form
            without a bank. With an empty bank the loss is 0.
        ids, bank_ids: as in `info_nce_loss`: what holds a row's own id is in neither softmax.
        temperature: tau > 0 (0.1: KyleZheng1997/ReSSL).
        teacher_temperature: > 0 (0.04: the same); below tau, so that the target is the sharper one.
        reduction, backend, options: as in `info_nce_loss`.

    Returns, raises: as `info_nce_loss`.
    """
    tau, nowhere = options.temperature, query.new_zeros(len(query))  # no positive to select by
    teacher = PassOptions(options.teacher_temperature)
    target = bank.scan(key.detach(), None, nowhere, teacher, exclude).neg_mean  # (B, D)
    log_sum = bank.scan(query, None, nowhere, PassOptions(tau), exclude).neg_lse  # (B,)
    return torch.where(log_sum == -torch.inf, 0.0, log_sum - (query * target).sum(1) / tau)


class ReSSLLoss(BankLoss):
    """ReSSL: relations to the bank's rows, those of the key as target (arXiv 2107.09282).

    Formula: `psm_kernels.functional.ressl_loss`. Defaults: KyleZheng1997/ReSSL.

    Args:
        temperature: tau > 0.
        memory_bank_size: (rows K, columns D).
        teacher_temperature: see there.
        All else: as in `InfoNCELoss`.
    """

    Options, function = ReSSLOptions, staticmethod(ressl_loss)
    memory_bank_size = (131072, 512)
    _has_in_batch_form = False
