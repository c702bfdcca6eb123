"""SupCon against a bank (SupMoCo): what has a row's label is its positive."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from psm_kernels import checks
from psm_kernels.backends.base import Exclude
from psm_kernels.bank import BankView
from psm_kernels.losses.base import BankLoss
from psm_kernels.losses.common import contrast, loss_function
from psm_kernels.options import ContrastiveOptions, PassOptions


@dataclass(frozen=True)
class SupConOptions(ContrastiveOptions):
    temperature: float = 0.1


@loss_function(SupConOptions, needs_bank=True)
def supcon_loss(
    query: Tensor,
    key: Tensor,
    bank: BankView,
    exclude: Exclude,
    options: SupConOptions,
    *,
    labels: Tensor | None = None,
) -> Tensor:
    """SupCon, L_out of arXiv 2004.11362 (eq. 2), with a bank as in its section 4.1 (SupMoCo).

    Positives of a row are its key and the bank's rows with its label, n of them:

        Z    = exp(s+/tau) + sum_j exp(s_j/tau), over all slots
        loss = log Z - (s+ + sum over same-label j of s_j) / (tau (1 + n))

    A row without label has its key alone, which is InfoNCE. The positives' mean is a segment sum of
    the bank, O(K D) for any number of them.

    Args:
        query, key, bank, count: as in `info_nce_loss`; there is no form without a bank.
        labels, bank_labels: (B,) and (K,) int64, needed; negative: unknown, which matches nothing.
            A Shard has a Shard of them, a BankView has bank_labels with it.
        ids, bank_ids: as in `info_nce_loss`: a slot that holds a row's own id is neither in Z nor
            among the positives.
        temperature: tau > 0 (0.1: section 4.5, and HobbitLong/SupContrast, README.md).
        reduction, backend, options: as in `info_nce_loss`.

    Returns, raises: as `info_nce_loss`.
    """
    checks.check_vector("labels", labels, len(query), torch.int64)
    checks.check_device("labels", labels, bank.device)
    if bank.labels is None:
        raise ValueError("bank_labels: got None, wanted a (K,) int64 tensor")
    tau, s_pos = options.temperature, (query * key).sum(1)
    negatives = bank.scan(query, None, s_pos, PassOptions(tau), exclude).neg_lse
    total, number = bank.label_sums(labels, exclude)  # (B, D), (B,)
    # log Z - s+/tau, then s+ less the mean of the positives: 0 where the key is alone.
    beside = (number * s_pos - (query * total).sum(1)) / (1 + number)
    return contrast(s_pos / tau, negatives) + beside / tau


class SupConLoss(BankLoss):
    """SupCon with a bank of labeled keys, SupMoCo (arXiv 2004.11362): calls need `labels`.

    Formula: `psm_kernels.functional.supcon_loss`.

    Args:
        temperature: tau > 0.
        memory_bank_size: (rows K, columns D) ((8192, 128): arXiv 2004.11362, section 4.1).
        All else: as in `InfoNCELoss`.
    """

    Options, function = SupConOptions, staticmethod(supcon_loss)
    memory_bank_size = (8192, 128)
    _has_in_batch_form = False
    _learns_from_labels = True
