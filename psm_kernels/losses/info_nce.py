"""InfoNCE: MoCo against a bank, SimCLR within the batch."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from torch import Tensor

from psm_kernels.backends.base import Exclude
from psm_kernels.bank import BankView
from psm_kernels.losses.base import BankLoss
from psm_kernels.losses.common import contrast, loss_function
from psm_kernels.losses.in_batch import Views
from psm_kernels.options import ContrastiveOptions, PassOptions, PSMOptions


@dataclass(frozen=True)
class InfoNCEOptions(ContrastiveOptions):
    temperature: float = 0.2  # MoCo v2


@functools.lru_cache(maxsize=16)
def _limit(options: InfoNCEOptions) -> PSMOptions:
    """The PSM that mines nothing."""
    return PSMOptions(
        options.temperature, topk=0, selection="all", hard_weight=0.0, reduction=options.reduction
    )


@loss_function(InfoNCEOptions, limit=_limit)
def info_nce_loss(
    query: Tensor,
    key: Tensor,
    bank: BankView | Views,
    exclude: Exclude,
    options: InfoNCEOptions,
) -> Tensor:
    """InfoNCE: log(exp(s+/tau) + sum_j exp(s_j/tau)) - s+/tau, cosines s, temperature tau.

    With a bank the negatives are its rows (MoCo, arXiv 1911.05722; solo-learn and lightly agree).
    Without one they are the 2B - 2 views of other samples and both views are anchors (NT-Xent of
    SimCLR, arXiv 2002.05709); rows are then the mean of a sample's two anchors. Large batches take
    passes over their rows, in O(B D) memory (`in_batch.fused_rows`), which have no second
    derivative; a backend that is named takes them at any size, and "reference" the matrix.

    Args:
        query: (B, D), carries gradient.
        key: (B, D), the other view; carries gradient too where it requires it.
        bank: (K, D) unit rows, contiguous, fp32 / bf16 / fp16 (fp64 on "reference"), or None; or a
            rank's `psm_kernels.bank.Shard` of it, which makes the call collective; or a BankView,
            which has `count`, `bank_ids` and `backend` with it.
        count: valid slots [0, count): 0-d int64 tensor on the device, int, or None for K. With an
            empty bank the loss is 0.
        ids: (B,) int64 names of the samples: a slot that holds a row's own id is no negative of it,
            however many copies there are. Negative: unknown, matches nothing.
        bank_ids: (K,) int64 names of what the slots hold, -1 unknown, -2 nothing; or a Shard.
        backend: "auto" or a name of `python -m psm_kernels`.
        options: the settings below as an object.
        temperature: tau > 0 (0.2: MoCo v2; v1 has 0.07: facebookresearch/moco, main_moco.py).
        reduction: "mean" | "sum" | "none".

    Returns:
        The loss in fp32 (fp64 for an fp64 bank): 0-d, or (B,) for reduction="none".

    Raises:
        ValueError: an argument is wrong (named in the message), or the backend cannot run here.
    """
    tau = options.temperature
    if isinstance(bank, Views):
        return bank.fold(contrast(bank.positive / tau, bank.log_sum(tau)))
    s_pos = (query * key).sum(1)
    return contrast(s_pos / tau, bank.scan(query, None, s_pos, PassOptions(tau), exclude).neg_lse)


class InfoNCELoss(BankLoss):
    """InfoNCE: MoCo with a bank (arXiv 1911.05722), NT-Xent of SimCLR without (arXiv 2002.05709).

    Formula: `psm_kernels.functional.info_nce_loss`.

    Args:
        temperature: tau > 0 (0.2: MoCo v2).
        memory_bank_size: (rows K, columns D), or 0 for the in-batch form ((65536, 128): MoCo).
        reduction, bank_dtype, indexed_bank, gather_distributed, shard_bank, process_group, seed,
            backend: as in `PSMLoss`, with its defaults; all that concerns the bank needs one.
    """

    Options, function = InfoNCEOptions, staticmethod(info_nce_loss)
    memory_bank_size = (65536, 128)
