"""MSF: the query moves to the mean of its key's nearest neighbors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from psm_kernels import checks
from psm_kernels.backends.base import Exclude
from psm_kernels.bank import BankView
from psm_kernels.losses.base import BankLoss
from psm_kernels.losses.common import loss_function
from psm_kernels.options import LossOptions


@dataclass(frozen=True)
class MSFOptions(LossOptions):
    topk: int = 5

    def __post_init__(self):
        super().__post_init__()
        checks.check_int("topk", self.topk, 1)

    def check_size(self, size: int) -> None:
        checks.check_int("topk", self.topk, 1, size + 1, "the key and the bank's rows")


@loss_function(MSFOptions, needs_bank=True)
def msf_loss(
    query: Tensor,
    key: Tensor,
    bank: BankView,
    exclude: Exclude,
    options: MSFOptions,
) -> Tensor:
    """MSF: mean shift, the squared distance to the key's nearest neighbors (arXiv 2105.07269).

    The neighbors of a key are itself and the `topk` - 1 rows of the bank nearest to it, n in all:

        loss = (1/n) sum over neighbors m of |query - m|^2,     |query - m|^2 = 2 - 2 query . m

    There is no temperature: nothing is pushed away. n is smaller while the bank has too few rows;
    with an empty bank, and with topk = 1, the loss is BYOL's.

    Args:
        query, key, bank, count: as in `info_nce_loss`, but `key` gets no gradient; there is no form
            without a bank.
        ids, bank_ids: as in `info_nce_loss`: what holds a row's own id is no neighbor.
        topk: neighbors, the key among them, 1 to K + 1 (5: UMBCvision/MSF, train_msf.py).
        reduction, backend, options: as in `info_nce_loss`.

    Returns, raises: as `info_nce_loss`.
    """
    _, index = bank.topk(key, options.topk - 1, exclude)  # (B, topk - 1); missing: -1
    total = (key + bank.rows(index, query.dtype).sum(1)).detach()  # (B, D)
    number = 1 + (index >= 0).sum(1)
    return 2 - 2 * (query * total).sum(1) / number


class MSFLoss(BankLoss):
    """MSF: mean shift towards the key's nearest neighbors (arXiv 2105.07269), without temperature.

    Formula: `psm_kernels.functional.msf_loss`. Defaults: UMBCvision/MSF, train_msf.py, whose D is a
    quarter of the encoder's features, 512 for a ResNet-50.

    Args:
        memory_bank_size: (rows K, columns D).
        topk: see there.
        All else: as in `InfoNCELoss`.
    """

    Options, function = MSFOptions, staticmethod(msf_loss)
    memory_bank_size = (128000, 512)
    _has_in_batch_form = False

    def __init__(self, memory_bank_size: tuple[int, int] = memory_bank_size, **settings):
        super().__init__(memory_bank_size=memory_bank_size, **settings)
