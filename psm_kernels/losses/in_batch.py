"""Within the batch: no bank, both sides of a similarity carry gradient. Large batches take a pass
over their rows, as over a bank; small ones the matrix, which is faster there."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from psm_kernels import checks, ops
from psm_kernels.backends import registry
from psm_kernels.backends.base import Exclude
from psm_kernels.options import PassOptions

# Rows whose matrix takes 1 GB in fp32.
LARGE = 16_384


def fused_rows(device: torch.device, dim: int) -> int:
    """From how many rows on "auto" takes passes, which read no matrix but make four products where
    the matrix takes three. On CPUs up to 256 columns they are faster from here on
    (benchmarks/README.md); of wider rows, and on GPUs, where no one has measured yet, they save
    memory."""
    return max(1024, 8 * dim) if device.type == "cpu" and dim <= 256 else LARGE


def passes(rows: Tensor, backend: str) -> bool:
    """Whether sums over `rows` (S, D) are passes of `backend`."""
    if backend == "auto" and len(rows) < fused_rows(rows.device, rows.shape[1]):
        return False
    if torch.compiler.is_compiling():  # the table imports modules, which no graph can hold
        return backend != "reference"
    return not registry.choose(backend, rows).differentiable  # that one has the matrix itself


def log_sum(
    query: Tensor,  # (R, D)
    rows: Tensor,  # (S, D)
    temperature: float,
    exclude: Exclude,  # its lists without -1
    transposed: Tensor | None,  # (S, E) its lists seen from the rows, see `ops.bank_pass`
    backend: str,
    bias: Tensor | None = None,  # (S,) of the rows, in the dtype of the sums
) -> Tensor:
    """(R,): log-sum-exp of query . rows / temperature + bias over what a query sees, -inf when that
    is nothing. Gradient to both sides."""
    if not passes(rows, backend):
        return torch.logsumexp(masked_matrix(query / temperature, rows, exclude, bias), 1)
    s_pos = query.new_zeros(len(query))  # of no use to a pass that keeps all
    options, more = PassOptions(temperature), {"slot_bias": bias, "exclude_transposed": transposed}
    rest = (checks.as_count(None, rows), s_pos, options, exclude, None, backend)
    return ops.run_pass(query, None, rows, *rest, **more).neg_lse


def masked_matrix(
    query: Tensor, rows: Tensor, exclude: Exclude, bias: Tensor | None = None
) -> Tensor:
    """query . rows + bias (R, S), -inf where a query does not see a row."""
    logits = query @ rows.T
    if bias is not None:
        logits = logits + bias
    if exclude.slots is not None:  # by place: a mask would cost as much as the products
        logits = logits.scatter_(1, exclude.slots, -torch.inf)
    if exclude.bank_ids is not None:
        named, count = torch.arange(len(rows), device=rows.device), checks.as_count(None, rows)
        seen = exclude._replace(slots=None).seen(named, count)
        logits = torch.where(seen, logits, -torch.inf)
    return logits


def masked_lse(logits: Tensor, candidate: Tensor) -> Tensor:
    """(R, S) -> (R,): log-sum-exp of the candidates, -inf when there are none."""
    return torch.logsumexp(torch.where(candidate, logits, -torch.inf), 1)


class Views(NamedTuple):
    """The in-batch form (SimCLR): 2B anchors, each against the 2B - 2 views of other samples."""

    rows: Tensor  # (2B, D) queries, then keys; both carry gradient
    own: Tensor  # (2B, 2) of a row: itself and its other view, so the same seen from the other side
    positive: Tensor  # (2B,) similarity to the other view
    backend: str

    @property
    def count(self) -> int:
        return len(self.rows) - 2

    def log_sum(self, temperature: float) -> Tensor:
        """(2B,) log-sum-exp of s / temperature over the negatives."""
        exclude = Exclude(self.own)
        return log_sum(self.rows, self.rows, temperature, exclude, self.own, self.backend)

    def hardest(self, k: int) -> Tensor:
        """(2B, k) the most similar negatives, descending."""
        rows = self.rows.detach()
        if not passes(rows, self.backend):
            negatives = self.similarity.detach().masked_fill(~self.candidate, -torch.inf)
            return negatives.topk(k).indices
        count, exclude = checks.as_count(None, rows), Exclude(self.own)
        return ops.run_topk(rows, rows, k, count, exclude, self.backend)[1]

    @property
    def similarity(self) -> Tensor:
        """(2B, 2B)"""
        return self.rows @ self.rows.T

    @property
    def candidate(self) -> Tensor:
        """(2B, 2B) bool: a negative of the row."""
        other = ~torch.eye(len(self.rows) // 2, dtype=torch.bool, device=self.rows.device)
        return other.repeat(2, 2)

    def fold(self, loss: Tensor) -> Tensor:
        """(2B,) -> (B,): the mean of a sample's two anchors, so that means stay means."""
        return loss.view(2, -1).mean(0)


def views(query: Tensor, key: Tensor, backend: str = "auto") -> Views:
    index = torch.arange(2 * len(query), device=query.device)
    own = torch.stack((index, index.roll(len(query))), 1)
    return Views(torch.cat((query, key)), own, (query * key).sum(1).repeat(2), backend)
