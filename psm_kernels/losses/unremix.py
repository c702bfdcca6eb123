"""UnReMix: negatives weighed by similarity, uncertainty and representativeness."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from psm_kernels import checks
from psm_kernels.backends.base import EMPTY, Exclude
from psm_kernels.bank import BankView
from psm_kernels.losses.base import BankLoss
from psm_kernels.losses.common import contrast, log_sum, loss_function
from psm_kernels.losses.in_batch import Views
from psm_kernels.ops import snapshot
from psm_kernels.options import ContrastiveOptions, PassOptions

_EQUAL = 1e-6  # indicators whose range is below this share of their size do not tell rows apart
_COLD = 0.5  # below this temperature the rounding of s/tau blurs u in proportion to 1 / tau
_FAR = -60.0  # log of (1 - pi)/pi where the pseudo-label outweighs all else beyond any rounding


@dataclass(frozen=True)
class UnReMixOptions(ContrastiveOptions):
    similarity_weight: float = 1 / 3
    uncertainty_weight: float = 1 / 3
    representativeness_weight: float = 1 / 3

    def __post_init__(self):
        super().__post_init__()
        names = ("similarity_weight", "uncertainty_weight", "representativeness_weight")
        for name in names:
            checks.check_number(name, getattr(self, name), least=0)
        if not any(getattr(self, name) for name in names):
            raise ValueError("similarity_weight: got 0 as for the two others, wanted one above 0")


@loss_function(UnReMixOptions)
def unremix_loss(
    query: Tensor,
    key: Tensor,
    bank: BankView | Views,
    exclude: Exclude,
    options: UnReMixOptions,
) -> Tensor:
    """UnReMix: importance weights of three indicators (after arXiv 2206.01197).

    That the importance of a negative interpolates anchor similarity, model uncertainty and
    representativeness is the paper's. Every formula and coefficient below is INFERRED, because
    neither its body nor its code could be read. Over the n negatives of anchor i, with x =
    exp(s/tau), pi the softmax over positive and negatives, y its largest entry (the pseudo-label):

        s_ij = cosine                                        anchor similarity
        u_ij = |pi_ij - [j = y]|                             norm of the last layer's gradient
        r_ij = mean over the other negatives l of 1 - cosine(m_j, m_l)
        w_ij = sum of the three, each scaled to [0, 1] over the row's negatives, times its weight
        R    = n sum_j w_ij x_ij / sum_j w_ij                w without gradient
        loss = log(x+ + R) - log x+

    An indicator that is equal for all negatives of a row, to 1e-6 of its size (u, which is an
    exponential of s/tau: to 1e-6 max(1, 0.5/tau)), counts 1 for each. Only the ratio of the three
    weights matters.

    Args:
        query, key, bank, count: as in `info_nce_loss`, but no Shard; the paper has no bank.
        temperature: tau > 0 (0.5, inferred: that of HCL and SSCL).
        similarity_weight, uncertainty_weight, representativeness_weight: >= 0, not all 0 (1/3
            each, inferred).
        ids, bank_ids, reduction, backend, options: as in `info_nce_loss`. r_ij is the slot's alone:
            its mean runs over all other slots, a row's own copies among them.

    Returns, raises: as `info_nce_loss`.
    """
    if isinstance(bank, Views):
        log_neg = _view_negatives(bank, options)
        return bank.fold(contrast(bank.positive / options.temperature, log_neg))
    log_pos = (query * key).sum(1) / options.temperature
    return contrast(log_pos, _bank_negatives(query, log_pos, bank, exclude, options))


class _Range(NamedTuple):
    """An indicator's least value and 1 / (its range), per row; slope 0 where all are equal."""

    least: Tensor
    slope: Tensor
    equal: Tensor  # 1 where all are equal, else 0

    @classmethod
    def of(cls, least: Tensor, most: Tensor, size: Tensor | float) -> _Range:
        span = most - least
        equal = ~(span > _EQUAL * size)  # NaN, as from inf - inf of an empty row, is equal too
        slope = torch.where(equal, 0.0, 1 / torch.where(equal, 1.0, span))
        return cls(torch.where(equal, 0.0, least), slope, equal.to(span.dtype))

    def scale(self, value: Tensor) -> Tensor:
        return (value - self.least) * self.slope + self.equal


# --- within the batch ----------------------------------------------------------------------------


def _view_negatives(views: Views, options: UnReMixOptions) -> Tensor:
    """log R (2B,), the formulas as they stand: the matrix is 2B x 2B."""
    temperature, similarity, candidate = options.temperature, views.similarity, views.candidate
    logits = torch.where(candidate, similarity / temperature, -torch.inf)
    with torch.no_grad():
        # u / pi_top, all in logarithms: at small temperatures every pi but one may underflow.
        top, at = logits.max(1, keepdim=True)  # (2B, 1)
        gap, gap_pos = logits - top, (views.positive / temperature)[:, None] - top
        rest = torch.logsumexp(gap.scatter(1, at, gap_pos), 1, keepdim=True)  # log of (1 - pi)/pi
        rest = torch.where(gap_pos < 0, rest, 0.0)  # of the top, where it is the pseudo-label
        unit = rest.clamp_max(0)
        uncertainty = torch.exp((gap - unit).scatter(1, at, rest - unit))

        # Negatives of anchor i: all views but itself and its other view, half the rows away.
        others = similarity.sum(0) - similarity - similarity.diagonal()
        others = others - similarity.roll(len(similarity) // 2, 0)
        distance = 1 - others / max(views.count - 1, 1)

        blur = max(1.0, _COLD / temperature)
        weight = torch.zeros_like(logits)
        for part, value, size in (
            (options.similarity_weight, similarity, torch.ones_like(top)),
            (options.uncertainty_weight, uncertainty, blur * uncertainty.amax(1, keepdim=True)),
            (options.representativeness_weight, distance, torch.ones_like(top)),
        ):
            least = value.masked_fill(~candidate, torch.inf).amin(1, keepdim=True)
            most = value.masked_fill(~candidate, -torch.inf).amax(1, keepdim=True)
            weight = weight + part * _Range.of(least, most, size).scale(value)
        weight = torch.where(candidate, weight, 0.0)
        weight = views.count * weight / weight.sum(1, keepdim=True).clamp_min(1e-30)
    return torch.logsumexp(logits + weight.log(), 1)


# --- against the bank ----------------------------------------------------------------------------


def _bank_negatives(
    query: Tensor, log_pos: Tensor, bank: BankView, exclude: Exclude, options: UnReMixOptions
) -> Tensor:
    """log R (B,) in two passes: extremes and softmax of each row, then the weighted sum.

    Scaled to [0, 1], u is affine in x for all but a negative that is the pseudo-label. Where that
    one's pi exceeds its 1 - pi, u is x up to a cap; where not, what it lacks is added apart. Where
    1 - pi is next to nothing, the others weigh by u only in the sum of the weights: also apart.
    """
    temperature = options.temperature
    with torch.no_grad():
        count = snapshot(bank.count)
        ranges = bank.row_ranges(query, temperature, exclude)
        empty, single = ranges.index[:, 0] < 0, ranges.index[:, 1] < 0
        number = count if exclude.ids is None else count - sum(bank.hidden(exclude))
        top = torch.where(empty, 0.0, ranges.top[:, 0])  # (B,)
        low = torch.where(empty, 0.0, ranges.lowest)

        # Logarithms of u / pi_top: of the others together, the least, the top.
        others, least = ranges.rest - top / temperature, (low - top) / temperature
        gap_pos = log_pos - top / temperature
        pseudo = (gap_pos < 0) & ~empty  # a negative is the pseudo-label
        most = torch.where(pseudo, torch.logaddexp(gap_pos, others), 0.0)
        most = torch.where(single, least, most)  # a single negative: nothing to tell
        far = most < _FAR
        unit = torch.where(far, most, 0.0)
        u_low, u_most = torch.exp(least - unit), torch.exp(most - unit)
        similar = _Range.of(low, top, 1.0)
        uncertain = _Range.of(u_low, u_most, u_most * max(1.0, _COLD / temperature))

        extra = torch.where(far, 1 - uncertain.equal, 1 - uncertain.scale(torch.ones_like(top)))
        extra = options.uncertainty_weight * torch.where(pseudo, extra.clamp_min(0), 0.0)
        beyond = (torch.exp(others - unit) - (number - 1) * u_low) * uncertain.slope
        beyond = torch.where(far, options.uncertainty_weight * beyond.clamp_min(0), 0.0)
        least = torch.where(far, uncertain.equal, uncertain.scale(torch.zeros_like(top)))
        alpha = (
            options.similarity_weight * similar.scale(torch.zeros_like(top))
            + options.uncertainty_weight * least
        )
    result = bank.weighted_pass(
        query,
        temperature,
        alpha=alpha,
        beta=options.similarity_weight * similar.slope,
        gamma=torch.where(far, 0.0, options.uncertainty_weight * uncertain.slope),
        top=top,
        cap=u_most.clamp_max(1),
        rho=options.representativeness_weight * _representativeness(bank, count, exclude),
        exclude=exclude,
    )
    label = bank.rows(ranges.index[:, :1], query.dtype)[:, 0]  # (B, D)
    apart = (query * label).sum(1) / temperature + extra.log()
    total = log_sum(result.log_sum, apart)
    weight = (result.weight + extra + beyond) / number.clamp_min(1)  # mean of w
    return torch.where(empty, -torch.inf, total - torch.where(empty, 1.0, weight).log())


def _representativeness(bank: BankView, count: Tensor, exclude: Exclude) -> Tensor:
    """r (K,) scaled to [0, 1]: 1 - m_j . (sum of the others) / (n - 1), in O(K D)."""
    rows = bank.bank
    origin = torch.zeros_like(rows[:1])  # similarity 0 to all: its mean is that of the valid rows
    valid = torch.arange(len(rows), device=rows.device) < count
    if exclude.bank_ids is not None:
        exclude = exclude._replace(ids=exclude.ids.new_full((1,), EMPTY))
        valid = valid & (exclude.bank_ids != EMPTY)
    mean = bank.scan(origin, None, origin[:, 0], PassOptions(1.0), exclude).neg_mean[0]
    number = valid.sum()
    square = torch.linalg.vector_norm(rows, dim=1, dtype=mean.dtype).square()
    others = rows.to(mean.dtype) @ (number * mean) - square
    distance = 1 - torch.where(valid, others, 0.0) / (number - 1).clamp_min(1)
    least = distance.masked_fill(~valid, torch.inf).amin()
    most = distance.masked_fill(~valid, -torch.inf).amax()
    return _Range.of(least, most, 1.0).scale(distance)


class UnReMixLoss(BankLoss):
    """UnReMix: negatives weighed by three indicators of importance (after arXiv 2206.01197).

    The structure is the paper's; every formula and coefficient is inferred, because neither its
    body nor its code could be read: see `psm_kernels.functional.unremix_loss`.

    Args:
        temperature: tau > 0.
        memory_bank_size: (rows K, columns D), or 0 for the in-batch form, the paper's.
        similarity_weight, uncertainty_weight, representativeness_weight: see there.
        All else: as in `InfoNCELoss`.
    """

    Options, function = UnReMixOptions, staticmethod(unremix_loss)
    _can_shard = False
