"""PSM's loss rows and their gradient in two launches, on a backend that has a finish of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from psm_kernels import backends
from psm_kernels.ops import bank_pass

MAX_TOPK = 32  # one program holds the (k, D) mined rows in registers


def psm_rows(
    query: Tensor, key: Tensor, bank: Tensor, count: Tensor, sweep: dict, finish: dict
) -> Tensor | None:
    """Loss rows (B,) of unit queries, differentiable by `query`; None where no backend has this.

    Args:
        query, key: (B, D) fp32 unit rows; `key` carries no gradient.
        bank, count: as in `psm_kernels.ops.bank_pass`.
        sweep: its keyword arguments.
        finish: soft_weights, weight_temperature and hard_weight of `functional.psm_loss`.
    """
    if torch.compiler.is_compiling() or not isinstance(bank, Tensor) or sweep["topk"] > MAX_TOPK:
        return None
    if not hasattr(backends.choose(sweep["backend"], bank), "psm_finish"):
        return None
    return _PSMRows.apply(query, key, bank, count, sweep, finish)


class _PSMRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, bank, count, sweep, finish):
        s_pos = (query * key).sum(1)
        swept = bank_pass(query, key if sweep["topk"] else None, bank, count, s_pos, **sweep)
        backend = backends.choose(sweep["backend"], bank)
        names = ("temperature", "selection", "a", "b", "rng_state", "row_offset")
        draw = {name: sweep[name] for name in names}
        rows, grad_query, _ = backend.psm_finish(query, key, bank, s_pos, swept, **draw, **finish)
        ctx.save_for_backward(grad_query)
        return rows

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_rows):
        (grad_query,) = ctx.saved_tensors
        return grad_rows[:, None] * grad_query, None, None, None, None, None
