"""Reweighted and debiased negatives without state: DCL and HCL, and SSCL that adds synthetic ones.

With x_j = exp(s_j/tau) the reweighted sum R = n sum x^(beta + 1) / sum x^beta is two log-sum-exps
of the same rows at temperatures tau/(beta + 1) and tau/beta: two fused passes, one for beta = 0.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from psm_kernels import checks
from psm_kernels import noise
from psm_kernels.distributed import Shard, bank_pass, bank_rows
from psm_kernels.functional import common
from psm_kernels.ops import snapshot
from psm_kernels.rows import unit_rows

MIXES = ("pair", "query", "none")

_TAG_MIX = 3  # noise stream of the synthetic negatives; psm.py has 1 and 2


def hcl_loss(
    query: Tensor,
    key: Tensor,
    bank: Tensor | Shard | None = None,
    *,
    count: Tensor | int | None = None,
    temperature: float = 0.5,
    beta: float = 1.0,
    tau_plus: float = 0.1,
    detach_weights: bool = False,
    ids: Tensor | None = None,
    bank_ids: Tensor | Shard | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """HCL: hard negatives weigh more, false ones are subtracted (arXiv 2010.04592).

    Over the n negatives of a row, with x = exp(s/tau) and x+ of the positive,

        R    = n sum_j x_j^(beta + 1) / sum_j x_j^beta
        Ng   = max((R - tau_plus n x+) / (1 - tau_plus), n exp(-1/tau))
        loss = log(x+ + Ng) - log x+

    beta = 0 is the debiased loss DCL (arXiv 2007.00224; lightly's DCLLoss is another one, the
    decoupled loss); tau_plus = 0 besides is InfoNCE.

    Args:
        query, key, bank, count: as in `info_nce_loss`; the papers have no bank.
        temperature: tau > 0 (0.5: joshr17/HCL, image/main.py).
        beta: concentration on hard negatives, >= 0 (1: the same).
        tau_plus: share of false negatives, in [0, 1) (0.1: the same).
        detach_weights: no gradient through the weights n x^beta / sum x^beta. The released code
            lets it flow, and so attracts negatives with x_j < beta R / ((beta + 1) n).
        ids, bank_ids, reduction, backend: as in `info_nce_loss`.

    Returns:
        The loss in fp32 (fp64 for an fp64 bank): 0-d, or (B,) for reduction="none".

    Raises:
        ValueError: an argument is wrong (named in the message), or the backend cannot run here.
    """
    return _loss(
        query,
        key,
        bank,
        count,
        temperature,
        beta,
        tau_plus,
        detach_weights,
        None,
        common.own_copies(query, bank, ids, bank_ids),
        reduction,
        backend,
    )


def sscl_loss(
    query: Tensor,
    key: Tensor,
    bank: Tensor | Shard | None = None,
    *,
    count: Tensor | int | None = None,
    temperature: float = 0.5,
    num_hard: int = 32,
    num_synthetic: int = 8,
    beta: float = 1.0,
    tau_plus: float = 0.05,
    mix: str = "pair",
    detach_weights: bool = False,
    rng_state: Tensor | None = None,
    row_offset: int = 0,
    ids: Tensor | None = None,
    bank_ids: Tensor | Shard | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """SSCL: HCL with synthetic negatives among the n (arXiv 2304.02971).

    Each anchor gets `num_synthetic` rows made of two draws m_1, m_2 from its `num_hard` nearest
    negatives and alpha from U(0, 1), all of it without gradient:

        "pair"   unit(alpha m_1 + (1 - alpha) m_2)      the paper's mixing
        "query"  unit(alpha query + (1 - alpha) m_1)
        "none"   m_1, a hard negative counted again     what the released code runs

    Args:
        query, key, bank, count: as in `info_nce_loss`; the paper has no bank. While the bank holds
            fewer than `num_hard` rows, the draws are from those it holds.
        temperature: tau > 0 (0.5: dhkdhk/SSCL, config.conf).
        num_hard: 1 to K, or to 2B - 2 without a bank (32: config.conf).
        num_synthetic: 0 is HCL (8: config.conf).
        beta, tau_plus, detach_weights: as in `hcl_loss` (1 and 0.05, config.conf, whose comment
            has tau_plus 0.1 for CIFAR10; gradient through the weights as in the released code).
        mix: "pair" | "query" | "none".
        rng_state: int64 (2,) [seed, offset] of the canonical noise, on the device. None draws both
            from torch's default generator.
        row_offset: global index of row 0, so that ranks of a distributed run draw different noise.
        ids, bank_ids, reduction, backend: as in `info_nce_loss`.

    Returns:
        The loss in fp32 (fp64 for an fp64 bank): 0-d, or (B,) for reduction="none".

    Raises:
        ValueError: an argument is wrong (named in the message), or the backend cannot run here.
    """
    check_sscl_settings(num_hard=num_hard, num_synthetic=num_synthetic, mix=mix)
    mixer = None
    if num_synthetic:
        if rng_state is None and isinstance(query, Tensor):
            rng_state = torch.randint(0, 1 << 62, (2,), device=query.device)
        mixer = _Mixer(num_hard, num_synthetic, mix, rng_state, row_offset)
    return _loss(
        query,
        key,
        bank,
        count,
        temperature,
        beta,
        tau_plus,
        detach_weights,
        mixer,
        common.own_copies(query, bank, ids, bank_ids),
        reduction,
        backend,
    )


def check_hcl_settings(
    *, temperature: float, beta: float, tau_plus: float, detach_weights: bool, reduction: str
) -> None:
    """Raise the ValueError of the first wrong setting."""
    common.check_pair_settings(temperature=temperature, reduction=reduction)
    checks.check_number("beta", beta, least=0)
    checks.check_number("tau_plus", tau_plus, least=0, below=1)
    checks.check_option("detach_weights", detach_weights, (False, True))


def check_sscl_settings(
    *, num_hard: int, num_synthetic: int, mix: str, size: int | None = None
) -> None:
    """Raise the ValueError of the first wrong setting of SSCL's own; `size` is the bank's K."""
    checks.check_int("num_hard", num_hard, 1, size, "the bank's rows" if size else "")
    checks.check_int("num_synthetic", num_synthetic, 0)
    checks.check_option("mix", mix, MIXES)


# --- sums over the negatives ---------------------------------------------------------------------


class _Sums(NamedTuple):
    """What the finish needs of R anchors. The two sums share the negatives."""

    log_pos: Tensor  # (R,) log x+
    hot: Tensor  # (R,) log sum x^(beta + 1)
    base: Tensor  # (R,) log sum x^beta
    count: Tensor  # (R,) or () how many negatives


def _loss(
    query, key, bank, count, temperature, beta, tau_plus, detach_weights, mixer, exclude, reduction,
    backend,
) -> Tensor:  # fmt: skip
    common.check_pair(query, key, bank)
    check_hcl_settings(
        temperature=temperature,
        beta=beta,
        tau_plus=tau_plus,
        detach_weights=detach_weights,
        reduction=reduction,
    )
    available = 2 * len(query) - 2 if bank is None else len(bank)
    if mixer is not None:
        why = "the batch's 2B - 2 negatives" if bank is None else "the bank's rows"
        checks.check_int("num_hard", mixer.num_hard, 1, available, why)
        checks.check_rng_state(mixer.rng_state, query.device)
    with torch.autocast(query.device.type, enabled=False):
        query, key = common.unit(query, bank), common.unit(key, bank)
        if bank is None:
            views = common.views(query, key)
            sums = _view_sums(views, temperature, beta, mixer)
        else:
            options = {"exclude": exclude, "backend": backend}
            sums = _bank_sums(query, key, bank, count, temperature, beta, mixer, options)
        if detach_weights:  # d log sum x^(beta + 1) is beta + 1 times that of constant weights
            hot = sums.hot / (beta + 1) + (sums.hot * (beta / (beta + 1))).detach()
            sums = sums._replace(hot=hot, base=sums.base.detach())
        loss = common.contrast(sums.log_pos, _log_negatives(sums, temperature, tau_plus))
        return common.reduce(views.fold(loss) if bank is None else loss, reduction)


def _bank_sums(
    query: Tensor,
    key: Tensor,
    bank: Tensor | Shard,
    count: Tensor | int | None,
    temperature: float,
    beta: float,
    mixer: _Mixer | None,
    options: dict,
) -> _Sums:
    count = snapshot(checks.as_count(count, bank))
    s_pos = (query * key).sum(1)
    mined = {} if mixer is None else {"topk": mixer.num_hard}
    swept = bank_pass(
        query,
        None if mixer is None else query.detach(),
        bank,
        count,
        s_pos,
        temperature=temperature / (beta + 1),
        **mined,
        **options,
    )
    hot, base = swept.neg_lse, swept.neg_count.log()
    if beta:
        base = bank_pass(
            query, None, bank, count, s_pos, temperature=temperature / beta, **options
        ).neg_lse
    sums = _Sums(s_pos / temperature, hot, base, swept.neg_count)
    if mixer is None:
        return sums
    return mixer.extend(sums, query, bank, swept.topk_index, temperature, beta)


def _view_sums(views: common.Views, temperature: float, beta: float, mixer: _Mixer | None) -> _Sums:
    logits = views.similarity / temperature
    sums = _Sums(
        views.positive / temperature,
        common.masked_lse((beta + 1) * logits, views.candidate),
        common.masked_lse(beta * logits, views.candidate),
        logits.new_full((), views.count),
    )
    if mixer is None:
        return sums
    hardest = views.similarity.detach().masked_fill(~views.candidate, -torch.inf)
    index = hardest.topk(mixer.num_hard).indices
    mixer = mixer._replace(row_offset=2 * mixer.row_offset)
    return mixer.extend(sums, views.rows, views.rows.detach(), index, temperature, beta)


def _log_negatives(sums: _Sums, temperature: float, tau_plus: float) -> Tensor:
    """log Ng (R,), all of it in logarithms: exp(1/tau) overflows fp32 below tau = 0.0113."""
    empty = sums.hot == -torch.inf
    hot, base = (torch.where(empty, 0.0, total) for total in (sums.hot, sums.base))
    log_n = sums.count.clamp_min(1).log()
    log_neg, floor = log_n + hot - base, log_n - 1 / temperature
    above = log_neg > floor
    if tau_plus:
        gap = math.log(tau_plus) + log_n + sums.log_pos - log_neg
        left = gap < 0
        log_neg = log_neg + torch.log(-torch.expm1(torch.where(left, gap, -1.0)))
        log_neg = log_neg - math.log1p(-tau_plus)
        above = left & (log_neg > floor)
    return torch.where(empty, -torch.inf, torch.where(above, log_neg, floor))


# --- SSCL: synthetic negatives -------------------------------------------------------------------


class _Mixer(NamedTuple):
    """How synthetic negatives are made."""

    num_hard: int
    num_synthetic: int
    mix: str
    rng_state: Tensor
    row_offset: int

    def extend(
        self,
        sums: _Sums,
        anchors: Tensor,  # (R, D)
        rows: Tensor | Shard,  # (N, D) what `index` points into
        index: Tensor,  # (R, num_hard) hardest first; missing: -1
        temperature: float,
        beta: float,
    ) -> _Sums:
        """The sums with the synthetic negatives among them; a row without negatives gets none."""
        with torch.no_grad():  # as a decorator of the method Python 3.10 could not compile it
            made = self.synthesize(anchors.detach(), rows, index)  # (R, num_synthetic, D)
        logits = (anchors[:, None] * made).sum(2) / temperature
        some = index[:, :1] >= 0
        return _Sums(
            sums.log_pos,
            common.log_sum(sums.hot, common.masked_lse((beta + 1) * logits, some)),
            common.log_sum(sums.base, common.masked_lse(beta * logits, some)),
            sums.count + self.num_synthetic * some[:, 0],
        )

    def synthesize(self, anchors: Tensor, rows: Tensor | Shard, index: Tensor) -> Tensor:
        """Row r's draw u takes the noise words 3u, 3u + 1 (which two) and 3u + 2 (alpha)."""
        batch, made = len(index), self.num_synthetic
        row = torch.arange(batch, device=index.device) + self.row_offset
        word = torch.arange(3 * made, device=index.device)
        state = noise.tagged(snapshot(self.rng_state), _TAG_MIX)
        words = noise.philox_words(row, word, state)
        words = words.view(batch, made, 3)
        found = (index >= 0).sum(1)[:, None, None]  # below num_hard while the bank fills
        drawn = ((words[..., :2] * found) >> 32).flatten(1)  # uniform in [0, found)
        slots = index.gather(1, drawn)  # (R, 2 made)
        mined = bank_rows(rows, slots, anchors.dtype).view(batch, made, 2, -1)
        first, second = mined[:, :, 0], mined[:, :, 1]  # (R, made, D)
        if self.mix == "none":
            return first
        alpha = words[..., 2:].to(anchors.dtype) * 2.0**-32
        if self.mix == "pair":
            mixed = alpha * first + (1 - alpha) * second
        else:
            mixed = alpha * anchors[:, None] + (1 - alpha) * first
        return unit_rows(mixed.flatten(0, 1), anchors.dtype).view_as(first)
