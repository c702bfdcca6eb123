"""PSM's loss rows and their gradient in two launches, on a backend that has a finish of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from psm_kernels import backends
from psm_kernels._autograd import once, refuse_transforms
from psm_kernels.ops import bank_pass
from psm_kernels.rows import unit_rows, unit_rows_and_norms


def psm_rows(
    query: Tensor, key: Tensor, bank: Tensor, count: Tensor, sweep: dict, finish: dict
) -> Tensor | None:
    """Loss rows (B,), differentiable by `query`; None where no backend has this.

    A backend that has it defines

        MAX_FINISH_TOPK  # more mined rows than that take the differentiable torch code instead
        psm_finish(query, key, bank, s_pos, swept, *, temperature, soft_weights,
                   weight_temperature, hard_weight)

    on contiguous fp32 unit rows and what `bank_pass` made of them with `exclude_mined`, so that its
    sums are those of the negatives. It returns the losses (B,), the
    gradient of their sum by the unit query (B, D), and (3, B): the count of kept negatives, mean
    and variance of g over them (`MiningStats`). It may define what lies around them as well:

        unit_pair(query, key)  # as `_unit_pair` below
        through_norm(gradient, unit, norms)  # as `_through_norm` below

    Args:
        query, key: (B, D), any length of row; `key` carries no gradient.
        bank, count: as in `psm_kernels.ops.bank_pass`.
        sweep: its keyword arguments.
        finish: soft_weights, weight_temperature and hard_weight of `functional.psm_loss`.
    """
    if torch.compiler.is_compiling() or not isinstance(bank, Tensor):
        return None
    refuse_transforms(query, key, bank)
    backend = backends.choose(sweep["backend"], bank)
    if sweep["topk"] > getattr(backend, "MAX_FINISH_TOPK", -1):
        return None
    return _PSMRows.apply(query, key, bank, count, sweep, finish)


def _unit_pair(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unit rows of contiguous query and key in fp32, the query's norms (B, 1), similarity (B,)."""
    query, norms = unit_rows_and_norms(query)
    key = unit_rows(key)
    return query, key, norms, (query * key).sum(1)


def _through_norm(gradient: Tensor, unit: Tensor, norms: Tensor) -> Tensor:
    """The gradient by the rows before their normalization; may write in place. The part along a row
    does nothing, the rest counts per length."""
    return gradient.addcmul_((gradient * unit).sum(1, keepdim=True), unit, value=-1).div_(norms)


class _PSMRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, bank, count, sweep, finish):
        backend = backends.choose(sweep["backend"], bank)
        unit_pair = getattr(backend, "unit_pair", _unit_pair)
        rows, key, norms, s_pos = unit_pair(query.contiguous(), key.contiguous())
        swept = bank_pass(rows, key if sweep["topk"] else None, bank, count, s_pos, **sweep)
        loss, gradient, _ = backend.psm_finish(
            rows, key, bank, s_pos, swept, temperature=sweep["temperature"], **finish
        )
        through_norm = getattr(backend, "through_norm", _through_norm)
        ctx.save_for_backward(through_norm(gradient, rows, norms))
        ctx.query = query
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        gradient = once(*ctx.saved_tensors, ctx.query)
        return (grad_loss[:, None] * gradient).to(ctx.query.dtype), *[None] * 5
