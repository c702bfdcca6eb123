"""Unit rows, the one rule of fp32 and fp64, and what becomes of a loss per row."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> torch.dtype:
    """Of sums, norms and losses over x: fp32, or fp64 where x is."""
    return torch.promote_types(x.dtype, torch.float32)


def reduce(rows: Tensor, reduction: str) -> Tensor:
    """(B,) to "mean", "sum" or "none"."""
    return rows if reduction == "none" else getattr(rows, reduction)()


def unit_rows(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of x (N, D) divided by their norm, in `dtype`; zero rows stay zero, gradient finite.

    No eps: fp16 cannot hold the usual 1e-12, and all is in fp32 or better whatever comes in.
    """
    return unit_rows_and_norms(x, dtype)[0]


def unit_rows_and_norms(x: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """`unit_rows` (N, D) and what it divided by (N, 1): the norms, 1 for a row of zeros."""
    x = x.to(dtype)
    # In fp64, where squares of 1e30 and of 1e-30 are still numbers.
    norms = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float64)
    # Below the normal numbers 1 / norm, hence the gradient, would be infinite: as zeros.
    norms = norms.masked_fill(norms < torch.finfo(dtype).tiny, 1.0).to(dtype)
    return x / norms, norms
