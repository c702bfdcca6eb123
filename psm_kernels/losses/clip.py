"""CLIP: symmetric cross entropy between two towers."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from psm_kernels import checks, ops
from psm_kernels.backends import registry
from psm_kernels.backends.base import Exclude
from psm_kernels.bank.collectives import agree, gather, gather_rows, rank_and_world
from psm_kernels.losses.common import check_pair, contrast, unit
from psm_kernels.losses.in_batch import log_sum, masked_matrix, passes
from psm_kernels.options import REDUCTIONS
from psm_kernels.rows import reduce


def clip_loss(
    query: Tensor,
    key: Tensor,
    *,
    logit_scale: Tensor | float,
    ids: Tensor | None = None,
    reduction: str = "mean",
    gather_distributed: bool = False,
    process_group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    """CLIP: the mean of the cross entropies of queries among keys and of keys among queries.

        loss_i = (lse_j scale s_ij + lse_j scale s_ji) / 2 - scale s_ii,   s cosines

    (arXiv 2103.00020, figure 3; OpenCLIP, loss.py.) Large batches take passes over the rows of the
    other tower, in O(B D) memory (`in_batch.fused_rows`), which have no second derivative;
    backend="reference" has the (B, B) matrix at any size.

    Args:
        query, key: (B, D), such as images and their texts; both carry gradient.
        logit_scale: 1 / tau > 0; a 0-d tensor, as OpenCLIP's model gives it, gets a gradient.
        ids: (B,) int64: pairs of the same id are no negatives of each other, such as one image with
            several captions. Negative: unknown, matches nothing.
        reduction: "mean" | "sum" | "none".
        gather_distributed: the rows of all ranks are negatives; the loss is of this rank's B pairs,
            and DDP's mean of the gradients is that of one process with the whole batch: scale
            nothing. Every rank brings the same B (drop_last=True).
        process_group: of it, None for the default group.
        backend: "auto" or a name of `python -m psm_kernels`.

    Returns:
        The loss in fp32 (fp64 for fp64 rows): 0-d, or (B,) for reduction="none".

    Raises:
        ValueError: an argument is wrong (named in the message), or the backend cannot run here.
    """

    def check() -> dict[str, object]:
        check_pair(query, key, None)
        _check_scale(logit_scale, query.device)
        checks.check_option("reduction", reduction, REDUCTIONS)
        ops.check_backend(backend, query)
        if ids is not None:
            checks.check_vector("ids", ids, len(query), torch.int64)
            checks.check_device("ids", ids, query.device)
        names = {"batch size": len(query), "columns": query.shape[1], "ids": ids is not None}
        return names | {"dtypes": f"{query.dtype}, {key.dtype}"}

    group = process_group
    rank, world = rank_and_world(group) if gather_distributed else (0, 1)
    if world > 1:
        agree(group, check)
    else:
        check()
    with torch.autocast(query.device.type, enabled=False):
        query, key = unit(query, None), unit(key, None)
        queries, keys, names = query, key, ids
        if world > 1:
            queries, keys = gather_rows(query, group), gather_rows(key, group)
            names = None if ids is None else gather(ids, group)
        exclude, transposed = _own(len(query), rank, world, ids, names, query.device)
        scale = torch.as_tensor(logit_scale, dtype=query.dtype, device=query.device)
        s_pos = scale * (query * key).sum(1)
        if world > 1 or passes(keys, backend):
            rest = (1.0, exclude, transposed, backend)
            of_query, of_key = (
                log_sum(scale * q, k, *rest) for q, k in ((query, keys), (key, queries))
            )
        else:  # one matrix is both
            logits = masked_matrix(scale * query, key, exclude)
            of_query, of_key = (torch.logsumexp(logits, dim) for dim in (1, 0))
        return reduce((contrast(s_pos, of_query) + contrast(s_pos, of_key)) / 2, reduction)


def _check_scale(scale: Tensor | float, device: torch.device) -> None:
    if not isinstance(scale, Tensor):
        return checks.check_number("logit_scale", scale, above=0)
    if scale.ndim or not scale.is_floating_point():
        got = f"shape {tuple(scale.shape)}, dtype {scale.dtype}"
        raise ValueError(f"logit_scale: got {got}, wanted a number or a 0-d floating tensor")
    checks.check_device("logit_scale", scale, device)


def _own(
    batch: int,
    rank: int,
    world: int,
    ids: Tensor | None,
    names: Tensor | None,
    device: torch.device,
) -> tuple[Exclude, Tensor]:
    """What this rank's rows must not see of the other tower's: their own pair and pairs of the same
    id; and its lists seen from there."""
    index = torch.arange(batch, device=device)
    seen_from = torch.full((world * batch,), -1, device=device)
    seen_from[rank * batch : (rank + 1) * batch] = index
    own = (index + rank * batch)[:, None]
    if names is None:
        return Exclude(own), seen_from[:, None]
    return Exclude(own, ops.known(ids, batch, device), names.clamp_min(-1)), seen_from[:, None]


class CLIPLoss(nn.Module):
    """CLIP's symmetric cross entropy, in the place of OpenCLIP's ClipLoss (arXiv 2103.00020).

    Formula and arguments: `psm_kernels.functional.clip_loss`.

    Example:
        >>> criterion = CLIPLoss(gather_distributed=True)
        >>> loss = criterion(image_features, text_features, model.logit_scale.exp())
    """

    def __init__(
        self,
        *,
        reduction: str = "mean",
        gather_distributed: bool = False,
        process_group: dist.ProcessGroup | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        checks.check_option("reduction", reduction, REDUCTIONS)
        registry.require(backend)
        if gather_distributed:
            rank_and_world(process_group)  # refuses a group that this rank is not in
        self.reduction, self.backend = reduction, backend
        self.gather_distributed, self.process_group = gather_distributed, process_group

    def forward(
        self, query: Tensor, key: Tensor, logit_scale: Tensor | float, *, ids: Tensor | None = None
    ) -> Tensor:
        """See `psm_kernels.functional.clip_loss`; OpenCLIP's order of arguments."""
        return clip_loss(query, key, logit_scale=logit_scale, ids=ids, **self._settings())

    def _settings(self) -> dict[str, object]:
        names = ("reduction", "gather_distributed", "process_group", "backend")
        return {name: getattr(self, name) for name in names}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._settings().items())
