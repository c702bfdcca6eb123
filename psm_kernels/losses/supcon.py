"""SupCon against a bank (SupMoCo): what has a row's label is its positive."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from psm_kernels import checks
from psm_kernels.backends.base import Exclude
from psm_kernels.bank import BankView, Shard
from psm_kernels.losses.base import BankLoss
from psm_kernels.losses.common import bank_of, contrast, loss_of
from psm_kernels.options import ContrastiveOptions, PassOptions, takes


@dataclass(frozen=True)
class SupConOptions(ContrastiveOptions):
    temperature: float = 0.1


@takes(SupConOptions)
def supcon_loss(
    query: Tensor,
    key: Tensor,
    bank: Tensor | Shard | BankView,
    *,
    labels: Tensor | None = None,
    bank_labels: Tensor | Shard | None = None,
    count: Tensor | int | None = None,
    ids: Tensor | None = None,
    bank_ids: Tensor | Shard | None = None,
    backend: str = "auto",
    options: SupConOptions | None = None,
    **settings,
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

    Returns:
        The loss in fp32 (fp64 for an fp64 bank): 0-d, or (B,) for reduction="none".

    Raises:
        ValueError: an argument is wrong (named in the message), or the backend cannot run here.
    """
    options = SupConOptions.of(options, settings)
    bank = bank_of(bank, count, bank_ids, bank_labels, backend, needed=True)
    return loss_of(_rows, query, key, bank, ids, options, labels)


def _rows(
    query: Tensor,
    key: Tensor,
    bank: BankView,
    exclude: Exclude,
    options: SupConOptions,
    labels: Tensor | None,
) -> Tensor:
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

    Raises:
        ValueError: an argument is wrong; bank and noise state are as before.
    """

    Options, function = SupConOptions, staticmethod(supcon_loss)
    memory_bank_size = (8192, 128)
    _has_in_batch_form = False

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        *,
        labels: Tensor | None = None,
        ids: Tensor | None = None,
        update: bool | None = None,
    ) -> Tensor:
        """Loss of query (B, D) against key (B, D) and the bank; then the keys are enqueued.

        Args:
            labels: (B,) int64, needed: they say which rows of the bank are positives, now and, kept
                with the keys, later. Negative: unknown, which matches nothing.
            All else: as in `InfoNCELoss`.

        Returns:
            The loss, fp32: 0-d, or (B,) for reduction="none".
        """
        return self._step(query, key, labels, ids, update, {"labels": labels})
