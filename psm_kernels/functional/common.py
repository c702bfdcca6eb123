"""What every loss shares: argument checks, unit rows, the in-batch form, reductions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from psm_kernels import checks
from psm_kernels._autograd import refuse_tracing
from psm_kernels.distributed import Shard
from psm_kernels.ops import NOTHING, Exclude, excluded
from psm_kernels.rows import unit_rows

REDUCTIONS = ("mean", "sum", "none")


def check_pair(
    query: Tensor, key: Tensor, bank: Tensor | None, projection: Tensor | None = None
) -> None:
    """query, key, projection are (B, D), on the bank's device and with its D where there is one."""
    refuse_tracing()
    if bank is None:
        checks.check_matrix("query", query)
    else:
        checks.check_bank(getattr(bank, "rows", bank))  # of a Shard: this rank's rows
        checks.check_matrix("query", query, like="the bank", shape=(None, bank.shape[1]))
    checks.check_matrix("key", key, like="query", shape=query.shape)
    rows = {"query": query, "key": key}
    if projection is not None:
        checks.check_matrix("projection", projection, like="query", shape=query.shape)
        rows["projection"] = projection
    for name, value in rows.items():
        checks.check_device(name, value, (query if bank is None else bank).device)


def check_pair_settings(*, temperature: float, reduction: str) -> None:
    """Raise the ValueError of the first wrong setting; every loss has these two."""
    checks.check_number("temperature", temperature, above=0)
    checks.check_option("reduction", reduction, REDUCTIONS)


def own_copies(
    query: Tensor, bank: Tensor | Shard | None, ids: Tensor | None, bank_ids: Tensor | Shard | None
) -> Exclude:
    """What the rows of `query` must not see of the bank: the slots that hold their own ids."""
    if bank is None:
        for name, value in (("ids", ids), ("bank_ids", bank_ids)):
            if value is not None:
                raise ValueError(f"{name}: got a tensor, wanted None where there is no bank")
        return NOTHING
    return excluded(None, ids, bank_ids, bank, len(query))


def reduce(rows: Tensor, reduction: str) -> Tensor:
    return rows if reduction == "none" else getattr(rows, reduction)()


def unit(x: Tensor, bank: Tensor | None) -> Tensor:
    """Unit rows in the dtype of the sums: fp32, or fp64 as the bank (without one: as x)."""
    like = x if bank is None else bank
    return unit_rows(x, torch.float64 if like.dtype is torch.float64 else torch.float32)


def contrast(log_pos: Tensor, log_neg: Tensor) -> Tensor:
    """-log(pos / (pos + neg)), 0 where there is no negative; small losses keep their digits."""
    gap = log_neg - log_pos
    return torch.logaddexp(gap, torch.zeros_like(gap))


class Views(NamedTuple):
    """The in-batch form (SimCLR): 2B anchors, each against the 2B - 2 views of other samples."""

    rows: Tensor  # (2B, D) queries, then keys; both carry gradient
    similarity: Tensor  # (2B, 2B)
    candidate: Tensor  # (2B, 2B) bool: a negative of the row
    positive: Tensor  # (2B,) similarity to the sample's other view

    @property
    def count(self) -> int:
        return len(self.rows) - 2

    def fold(self, loss: Tensor) -> Tensor:
        """(2B,) -> (B,): the mean of a sample's two anchors, so that means stay means."""
        return loss.view(2, -1).mean(0)


def views(query: Tensor, key: Tensor) -> Views:
    rows = torch.cat((query, key))
    other = ~torch.eye(len(query), dtype=torch.bool, device=query.device).repeat(2, 2)
    return Views(rows, rows @ rows.T, other, (query * key).sum(1).repeat(2))


def masked_lse(logits: Tensor, candidate: Tensor) -> Tensor:
    """(R, S) -> (R,): log-sum-exp of the candidates, -inf when there are none."""
    return torch.logsumexp(torch.where(candidate, logits, -torch.inf), 1)


def log_sum(a: Tensor, b: Tensor) -> Tensor:
    """log(exp a + exp b); where both are -inf the gradient is 0, not torch.logaddexp's NaN."""
    nothing = (a == -torch.inf) & (b == -torch.inf)
    a, b = torch.where(nothing, 0.0, a), torch.where(nothing, 0.0, b)
    return torch.where(nothing, -torch.inf, torch.logaddexp(a, b))
