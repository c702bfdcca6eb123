"""Unit rows, in fp32 or better whatever comes in."""

from __future__ import annotations

import torch
from torch import Tensor


def unit_rows(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of x (N, D) divided by their norm, in `dtype`; zero rows stay zero, gradient finite.

    No eps: fp16 cannot hold the usual 1e-12, and the sum is in fp32 or better whatever comes in.
    """
    return unit_rows_and_norms(x, dtype)[0]


def unit_rows_and_norms(x: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """`unit_rows` (N, D) and what it divided by (N, 1): the norms, 1 for a row of zeros."""
    x = x.to(dtype)
    norms = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    norms = norms.masked_fill(norms == 0, 1.0)
    return x / norms, norms
