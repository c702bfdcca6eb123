"""InfoNCE without state: MoCo against a bank, SimCLR within the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from psm_kernels import checks
from psm_kernels.distributed import Shard, bank_pass
from psm_kernels.functional import common


def info_nce_loss(
    query: Tensor,
    key: Tensor,
    bank: Tensor | Shard | None = None,
    *,
    count: Tensor | int | None = None,
    temperature: float = 0.2,
    ids: Tensor | None = None,
    bank_ids: Tensor | Shard | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """InfoNCE: log(exp(s+/tau) + sum_j exp(s_j/tau)) - s+/tau, cosines s, temperature tau.

    With a bank the negatives are its rows (MoCo, arXiv 1911.05722; solo-learn and lightly agree).
    Without one they are the 2B - 2 views of other samples and both views are anchors (NT-Xent of
    SimCLR, arXiv 2002.05709); rows are then the mean of a sample's two anchors.

    Args:
        query: (B, D), carries gradient.
        key: (B, D), the other view; carries gradient too where it requires it.
        bank: (K, D) unit rows, contiguous, fp32 / bf16 / fp16 (fp64 on "reference"), or None; or a
            rank's `psm_kernels.distributed.Shard` of it, which makes the call collective.
        count: valid slots [0, count): 0-d int64 tensor on the device, int, or None for K. With an
            empty bank the loss is 0.
        temperature: tau > 0 (0.2: MoCo v2; v1 has 0.07: facebookresearch/moco, main_moco.py).
        ids: (B,) int64 names of the samples: a slot that holds a row's own id is no negative of it,
            however many copies there are. Negative: unknown, matches nothing.
        bank_ids: (K,) int64 names of what the slots hold, -1 unknown, -2 nothing; or a Shard.
        reduction: "mean" | "sum" | "none".
        backend: "auto" or a name of `python -m psm_kernels`.

    Returns:
        The loss in fp32 (fp64 for an fp64 bank): 0-d, or (B,) for reduction="none".

    Raises:
        ValueError: an argument is wrong (named in the message), or the backend cannot run here.
    """
    common.check_pair(query, key, bank)
    common.check_pair_settings(temperature=temperature, reduction=reduction)
    exclude = common.own_copies(query, bank, ids, bank_ids)
    with torch.autocast(query.device.type, enabled=False):
        query, key = common.unit(query, bank), common.unit(key, bank)
        if bank is None:
            views = common.views(query, key)
            log_neg = common.masked_lse(views.similarity / temperature, views.candidate)
            loss = views.fold(common.contrast(views.positive / temperature, log_neg))
        else:
            count = checks.as_count(count, bank)
            s_pos = (query * key).sum(1)
            options = {"temperature": temperature, "exclude": exclude, "backend": backend}
            log_neg = bank_pass(query, None, bank, count, s_pos, **options).neg_lse
            loss = common.contrast(s_pos / temperature, log_neg)
        return common.reduce(loss, reduction)
