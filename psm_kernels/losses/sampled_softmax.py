"""Sampled softmax: cross entropy over a few items of a large table, corrected for how they were
drawn."""

from __future__ import annotations

import torch
from torch import Tensor

from psm_kernels import checks, ops
from psm_kernels.backends.base import Exclude
from psm_kernels.losses.common import contrast
from psm_kernels.losses.in_batch import log_sum
from psm_kernels.options import REDUCTIONS
from psm_kernels.rows import reduce, wide


def sampled_softmax_loss(
    query: Tensor,
    items: Tensor,
    target: Tensor,
    *,
    log_q: Tensor,
    ids: Tensor | None = None,
    temperature: float = 1.0,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Sampled softmax with log-q correction (Bengio and Senecal 2008; Yi et al., RecSys 2019):

        l_ij = query_i . items_j / temperature - log_q_j
        loss = log sum_j exp(l_ij) - l_i,target

    Rows are taken as they come: normalize them for cosines. Large samples take passes over their
    rows, in O((B + K) D) memory (`in_batch.fused_rows`), which have no second derivative.

    Args:
        query: (B, D) users; carries gradient.
        items: (K, D) rows of the table that were drawn, the targets among them; carries gradient.
        target: (B,) int64: the row of `items` that is query i's, in [0, K).
        log_q: (K,) constants: log of each item's expected count in the sample.
        ids: (K,) int64 names of the items: copies of a query's target are no negatives of it.
            Negative: unknown, matches nothing.
        temperature: tau > 0.
        reduction: "mean" | "sum" | "none".
        backend: "auto" or a name of `python -m psm_kernels`.

    Returns:
        The loss in fp32 (fp64 for fp64 rows): 0-d, or (B,) for reduction="none".

    Raises:
        ValueError: an argument is wrong (named in the message), or the backend cannot run here.
    """
    checks.check_matrix("query", query)
    checks.check_matrix("items", items, like="query", shape=(None, query.shape[1]))
    size, device = len(items), query.device
    for name, value, length in (("target", target, len(query)), ("log_q", log_q, size)):
        checks.check_vector(name, value, length, torch.int64 if name == "target" else None)
    if ids is not None:
        checks.check_vector("ids", ids, size, torch.int64)
    for name, value in (("items", items), ("target", target), ("log_q", log_q), ("ids", ids)):
        if value is not None:
            checks.check_device(name, value, device)
    checks.check_number("temperature", temperature, above=0)
    checks.check_option("reduction", reduction, REDUCTIONS)
    ops.check_backend(backend, items)
    with torch.autocast(device.type, enabled=False):
        query, items, bias = (x.to(wide(query)) for x in (query, items, -log_q.detach()))
        # By names, which hide a target from its own queries on either side. What is unknown to the
        # caller gets one of its own.
        names = torch.arange(size, device=device)
        names = names if ids is None else torch.where(ids < 0, names + (1 << 62), ids)
        exclude = Exclude(None, names[target], names)
        log_pos = (query * items[target]).sum(1) / temperature + bias[target]
        log_neg = log_sum(query, items.contiguous(), temperature, exclude, None, backend, bias)
        return reduce(contrast(log_pos, log_neg), reduction)
