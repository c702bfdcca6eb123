"""SSCL: HCL with synthetic negatives among the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from psm_kernels import checks, noise
from psm_kernels.backends.base import Exclude
from psm_kernels.bank import BankView
from psm_kernels.losses.base import BankLoss
from psm_kernels.losses.common import log_sum, loss_function, sampling_state
from psm_kernels.losses.hcl import HCLOptions, Sums, bank_sums, loss_rows, view_sums
from psm_kernels.losses.in_batch import Views, masked_lse
from psm_kernels.ops import bank_rows, snapshot
from psm_kernels.rows import unit_rows

MIXES = ("pair", "query", "none")


@dataclass(frozen=True)
class SSCLOptions(HCLOptions):
    tau_plus: float = 0.05
    num_hard: int = 32
    num_synthetic: int = 8
    mix: str = "pair"

    def __post_init__(self):
        super().__post_init__()
        checks.check_int("num_hard", self.num_hard, 1)
        checks.check_int("num_synthetic", self.num_synthetic, 0)
        checks.check_option("mix", self.mix, MIXES)

    def check_size(self, size: int, why: str = "the bank's rows") -> None:
        if self.num_synthetic:
            checks.check_int("num_hard", self.num_hard, 1, size, why)


@loss_function(SSCLOptions)
def sscl_loss(
    query: Tensor,
    key: Tensor,
    bank: BankView | Views,
    exclude: Exclude,
    options: SSCLOptions,
    *,
    rng_state: Tensor | None = None,
    row_offset: int = 0,
) -> Tensor:
    """SSCL: HCL with synthetic negatives among the n (arXiv 2304.02971).

    Each anchor gets `num_synthetic` rows made of two samples m_1, m_2 from its `num_hard` nearest
    negatives and alpha from U(0, 1), all of it without gradient:

        "pair"   unit(alpha m_1 + (1 - alpha) m_2)      the paper's mixing
        "query"  unit(alpha query + (1 - alpha) m_1)
        "none"   m_1, a hard negative counted again     what the released code runs

    Args:
        query, key, bank, count: as in `info_nce_loss`; the paper has no bank. While the bank holds
            fewer than `num_hard` rows, they are from those it holds.
        temperature: tau > 0 (0.5: dhkdhk/SSCL, config.conf).
        num_hard: 1 to K, or to 2B - 2 without a bank (32: config.conf).
        num_synthetic: 0 is HCL (8: config.conf).
        beta, tau_plus, detach_weights: as in `hcl_loss` (1 and 0.05, config.conf, whose comment
            has tau_plus 0.1 for CIFAR10; gradient through the weights as in the released code).
        mix: "pair" | "query" | "none".
        rng_state: int64 (2,) [seed, offset] of the canonical noise, on the device. None draws both
            from torch's default generator.
        row_offset: global index of row 0, so that ranks of a distributed run draw different noise.
        ids, bank_ids, reduction, backend, options: as in `info_nce_loss`.

    Returns, raises: as `info_nce_loss`.
    """
    mined = options.num_hard if options.num_synthetic else 0
    if mined:
        rng_state = sampling_state(rng_state, query.device)
    if not isinstance(bank, Views):
        sums, index = bank_sums(query, key, bank, exclude, options, mined)
        if mined:
            mixer = _Mixer(options, bank.rows, rng_state, row_offset)
            sums = mixer.extend(sums, query, index)
        return loss_rows(sums, options)
    sums = view_sums(bank, options)
    if mined:
        options.check_size(bank.count, "the batch's 2B - 2 negatives")
        rows = bank.rows.detach()
        mixer = _Mixer(options, lambda *args: bank_rows(rows, *args), rng_state, 2 * row_offset)
        sums = mixer.extend(sums, bank.rows, bank.hardest(mined))
    return bank.fold(loss_rows(sums, options))


class _Mixer(NamedTuple):
    """How synthetic negatives are made."""

    options: SSCLOptions
    rows: Callable[[Tensor, torch.dtype], Tensor]  # what an index points into
    rng_state: Tensor
    row_offset: int

    def extend(
        self,
        sums: Sums,
        anchors: Tensor,  # (R, D)
        index: Tensor,  # (R, num_hard) hardest first; missing: -1
    ) -> Sums:
        """The sums with the synthetic negatives among them; a row without negatives gets none."""
        with torch.no_grad():  # as a decorator of the method Python 3.10 could not compile it
            made = self.synthesize(anchors.detach(), index)  # (R, num_synthetic, D)
        beta = self.options.beta
        logits = (anchors[:, None] * made).sum(2) / self.options.temperature
        some = index[:, :1] >= 0
        return Sums(
            sums.log_pos,
            log_sum(sums.hot, masked_lse((beta + 1) * logits, some)),
            log_sum(sums.base, masked_lse(beta * logits, some)),
            sums.count + self.options.num_synthetic * some[:, 0],
        )

    def synthesize(self, anchors: Tensor, index: Tensor) -> Tensor:
        """Row r's sample u takes the noise words 3u, 3u + 1 (which two) and 3u + 2 (alpha)."""
        batch, made, mix = len(index), self.options.num_synthetic, self.options.mix
        row = torch.arange(batch, device=index.device) + self.row_offset
        word = torch.arange(3 * made, device=index.device)
        state = noise.stream_state(snapshot(self.rng_state), noise.Stream.MIX)
        words = noise.philox_words(row, word, state)
        words = words.view(batch, made, 3)
        found = (index >= 0).sum(1)[:, None, None]  # below num_hard while the bank fills
        chosen = ((words[..., :2] * found) >> 32).flatten(1)  # uniform in [0, found)
        slots = index.gather(1, chosen)  # (R, 2 made)
        mined = self.rows(slots, anchors.dtype).view(batch, made, 2, -1)
        first, second = mined[:, :, 0], mined[:, :, 1]  # (R, made, D)
        if mix == "none":
            return first
        alpha = words[..., 2:].to(anchors.dtype) * 2.0**-32
        if mix == "pair":
            mixed = alpha * first + (1 - alpha) * second
        else:
            mixed = alpha * anchors[:, None] + (1 - alpha) * first
        return unit_rows(mixed.flatten(0, 1), anchors.dtype).view_as(first)


class SSCLLoss(BankLoss):
    """SSCL: HCL with synthetic negatives mixed from each anchor's hardest (arXiv 2304.02971).

    Formula: `psm_kernels.functional.sscl_loss`. Defaults: dhkdhk/SSCL, config.conf.

    Args:
        temperature: tau > 0.
        memory_bank_size: (rows K, columns D), or 0 for the in-batch form, the paper's.
        num_hard, num_synthetic, beta, tau_plus, mix, detach_weights: see there.
        seed: of the canonical noise; the state [seed, offset] is the buffer `rng_state`.
        All else: as in `InfoNCELoss`.
    """

    Options, function = SSCLOptions, staticmethod(sscl_loss)
    _samples = True
