"""The form within the batch (SimCLR): no bank, both views carry gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


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
