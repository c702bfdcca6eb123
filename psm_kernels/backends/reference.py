"""The two operators as the paper writes them, B x K matrices and all: the oracle of the tests. Any
device, fp32 and fp64; never optimized."""

from __future__ import annotations

import torch
from torch import Tensor

from psm_kernels import noise
from psm_kernels.backends.base import NOTHING, Backend, BankPass, Exclude
from psm_kernels.options import PassOptions


class Reference(Backend):
    name = "reference"
    what = "plain torch, B x K matrices"
    dtypes = (*Backend.dtypes, torch.float64)
    differentiable = True  # as often as one likes

    def bank_pass(
        self, query: Tensor, key: Tensor | None, bank: Tensor, count: Tensor, s_pos: Tensor,
        options: PassOptions, exclude: Exclude = NOTHING, rng_state: Tensor | None = None,
        slot_bias: Tensor | None = None,
    ) -> BankPass:  # fmt: skip
        tau, o = options.temperature, options
        rows = _valid_rows(bank, count)
        similarity = query.to(rows.dtype) @ rows.T  # (B, K)
        miner = query.detach() if key is None else key
        topk_sim, topk_index = self.bank_topk(miner, bank, o.topk, count, exclude)
        if o.exclude_mined:
            exclude = exclude.naming(topk_index)
        seen = exclude.seen(torch.arange(bank.shape[0], device=bank.device), count)  # (B, K)
        given = similarity.detach()  # by the choice: no gradient flows through the sampling
        words = None
        if o.selection == "bernoulli":
            words = noise.philox_block(o.row_offset, *given.shape, o.col_offset, rng_state)
        weight = noise.keep_weight(given, s_pos[:, None], words, o.selection, o.a, o.b) * seen

        logits = similarity / tau
        if slot_bias is not None:
            logits = logits + slot_bias
            weight = weight * (slot_bias != -torch.inf)

        bad = seen & logits.isnan()
        kept = (weight > 0) | bad  # what is not a number stays one, in the gradient too
        log_weight = torch.where(bad, 0.0, weight).log()
        log_terms = torch.where(kept, logits + log_weight, -torch.inf)
        empty = ~kept.any(1)
        # The inner zeros: all of a row at -inf would have NaN for a second derivative.
        neg_lse = torch.logsumexp(torch.where(empty[:, None], 0.0, log_terms), 1)
        neg_lse = torch.where(empty, -torch.inf, neg_lse)
        with torch.no_grad():
            softmax = torch.exp(log_terms - torch.where(empty, 0.0, neg_lse)[:, None])  # (B, K)
            neg_mean = softmax @ rows
            neg_sq_lse = torch.logsumexp(torch.where(kept, log_terms + logits, -torch.inf), 1)
        return BankPass(neg_lse, neg_mean, neg_sq_lse, weight.sum(1), topk_sim, topk_index)

    def bank_topk(
        self, query: Tensor, bank: Tensor, k: int, count: Tensor, exclude: Exclude = NOTHING
    ) -> tuple[Tensor, Tensor]:
        rows = _valid_rows(bank, count)
        batch, size = query.shape[0], bank.shape[0]
        similarity = rows.new_full((batch, k), -torch.inf)
        index = torch.full((batch, k), -1, dtype=torch.int64, device=bank.device)
        if k == 0:
            return similarity, index
        scores = query.to(rows.dtype) @ rows.T  # (B, K)
        seen = exclude.seen(torch.arange(size, device=bank.device), count)
        scores = scores.masked_fill(~seen, -torch.inf)
        found = min(k, size)
        best, where = scores.topk(min(k + 1, size))
        tied = (best[:, 1:] == best[:, :-1]) & best[:, 1:].isfinite()
        if tied.any():  # topk leaves the order of equal values open; a stable sort does not
            best, where = scores.sort(dim=1, descending=True, stable=True)
        similarity[:, :found] = best[:, :found]
        index[:, :found] = torch.where(best[:, :found] == -torch.inf, -1, where[:, :found])
        return similarity, index


def _valid_rows(bank: Tensor, count: Tensor) -> Tensor:
    """The bank in fp32 (fp64 stays), with zeros where slots hold nothing: 0 * NaN would be NaN."""
    rows = bank if bank.dtype is torch.float64 else bank.float()
    empty = torch.arange(bank.shape[0], device=bank.device) >= count
    return rows.masked_fill(empty[:, None], 0.0)
