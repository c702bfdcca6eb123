"""The `triton` backend: every GPU that Triton supports, and its interpreter on the CPU.

One file holds a kernel and, below it, what launches it. Methods import those files, so that this
one can be imported, and asked what it supports, where there is no Triton.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from psm_kernels.backends.base import NOTHING, Backend, BankPass, Exclude
from psm_kernels.backends.triton import config
from psm_kernels.options import PassOptions, PSMOptions
from psm_kernels.rows import reduce, unit_rows, unit_rows_and_norms


class Triton(Backend):
    name = "triton"
    what = "Triton kernels (cpu: interpreter only)"
    devices = ("cuda", "xpu", "cpu")
    max_dim = 512
    max_topk_dim = 512
    max_topk = 1024
    max_step_topk = 32  # one program of the loss holds the (topk, D) mined rows in registers

    @functools.cache  # noqa: B019, there is one instance
    def unavailable(self) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if config.interpreted() or torch.cuda.is_available() or torch.xpu.is_available():
            return None
        return "no GPU was found, and TRITON_INTERPRET=1 is not set"

    def supports(
        self, device: str, dtype: torch.dtype, dim: int, topk: int = 0, *, sums: bool = True
    ) -> str | None:
        reason = super().supports(device, dtype, dim, topk, sums=sums)
        if reason is None and device == "cpu" and not config.interpreted():
            return "runs on cpu in its interpreter alone, with TRITON_INTERPRET=1"
        return reason

    def bank_pass(
        self, query: Tensor, key: Tensor | None, bank: Tensor, count: Tensor, s_pos: Tensor,
        options: PassOptions, exclude: Exclude = NOTHING, rng_state: Tensor | None = None,
    ) -> BankPass:  # fmt: skip
        """Mined first, so that the sums can leave out what was mined."""
        from psm_kernels.backends.triton.sums import sums

        mined = self.bank_topk(query if key is None else key, bank, options.topk, count, exclude)
        if options.exclude_mined and options.topk:
            exclude = exclude.naming(mined[1])
        with config.current(bank):
            result = sums(query, bank, count, s_pos, options, exclude, rng_state)
        return BankPass(*result, *mined)

    def bank_topk(
        self, query: Tensor, bank: Tensor, k: int, count: Tensor, exclude: Exclude = NOTHING
    ) -> tuple[Tensor, Tensor]:
        from psm_kernels.backends.triton.mine import mine

        with config.current(bank):
            return mine(query, bank, k, count, exclude)

    def weighted_pass(
        self, query: Tensor, bank: Tensor, count: Tensor, temperature: float, affine: Tensor,
        rho: Tensor, exclude: Exclude = NOTHING,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        from psm_kernels.backends.triton.weighted import weighted_sums

        with config.current(bank):
            return weighted_sums(query, bank, count, temperature, affine, rho, exclude)

    def psm_step(
        self, query: Tensor, key: Tensor, bank: Tensor, count: Tensor, options: PSMOptions,
        exclude: Exclude = NOTHING, rng_state: Tensor | None = None, row_offset: int = 0,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        from psm_kernels.backends.triton.loss import loss_and_gradient

        with config.current(bank), torch.autocast(bank.device.type, enabled=False):
            unit, norms = unit_rows_and_norms(query.contiguous())
            key = unit_rows(key.contiguous())
            s_pos = (unit * key).sum(1)
            miner = key.to(bank.dtype) if options.topk else None
            mining = options.mining_pass(row_offset)
            rest = (bank, count, s_pos, mining, exclude, rng_state)
            result = self.bank_pass(unit.to(bank.dtype), miner, *rest)
            loss, gradient = loss_and_gradient(unit, norms, key, bank, s_pos, result, options)
            return reduce(loss, options.reduction), gradient
