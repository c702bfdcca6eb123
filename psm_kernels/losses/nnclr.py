"""NNCLR: the nearest row of the bank stands in for the key."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from psm_kernels.backends.base import EMPTY, Exclude
from psm_kernels.bank import BankView
from psm_kernels.losses.base import BankLoss
from psm_kernels.losses.common import contrast, loss_function
from psm_kernels.losses.in_batch import masked_lse
from psm_kernels.options import ContrastiveOptions


@dataclass(frozen=True)
class NNCLROptions(ContrastiveOptions):
    temperature: float = 0.2  # solo-learn


@loss_function(NNCLROptions, needs_bank=True)
def nnclr_loss(
    query: Tensor,
    key: Tensor,
    bank: BankView,
    exclude: Exclude,
    options: NNCLROptions,
) -> Tensor:
    """NNCLR: a key's nearest neighbor among the batch's queries (arXiv 2104.14548).

    With nn_i the bank row nearest to key i, or key i itself where its row sees none,

        loss_i = log sum_j exp(nn_i . query_j / tau) - nn_i . query_i / tau

    The columns are the queries of the call, all of which get a gradient; neighbors and keys get
    none. The bank lends positives alone, so that the loss of an empty one is InfoNCE's in-batch.

    Args:
        query, key, bank, count: as in `info_nce_loss`; there is no form without a bank.
        ids, bank_ids: as in `info_nce_loss`: a slot that holds a row's own id is no neighbor of it;
            nor is another query of the batch with that id a negative.
        temperature: tau > 0 (0.2: vturrisi/solo-learn, solo/methods/nnclr.py).
        reduction, backend, options: as in `info_nce_loss`.

    Returns, raises: as `info_nce_loss`.
    """
    _, index = bank.topk(key, 1, exclude)  # (B, 1)
    nearest = torch.where(index >= 0, bank.rows(index, query.dtype)[:, 0], key)  # (B, D)
    logits = nearest.detach() @ query.T / options.temperature  # (B, B)
    same = torch.eye(len(query), dtype=torch.bool, device=query.device)
    if exclude.ids is not None:
        ids = exclude.ids[:, None]
        same = same | ((ids == ids.T) & (ids != EMPTY))
    return contrast(logits.diagonal(), masked_lse(logits, ~same))


class NNCLRLoss(BankLoss):
    """NNCLR: a key's nearest row of the bank against the batch's queries (arXiv 2104.14548).

    Formula: `psm_kernels.functional.nnclr_loss`. The queries it compares are this process's own,
    also where banks are gathered or sharded.

    Args:
        temperature: tau > 0.
        memory_bank_size: (rows K, columns D) ((65536, 256): solo-learn, solo/methods/nnclr.py).
        All else: as in `InfoNCELoss`.
    """

    Options, function = NNCLROptions, staticmethod(nnclr_loss)
    memory_bank_size = (65536, 256)
    _has_in_batch_form = False

    def _rows_are_apart(self) -> bool:
        return False
