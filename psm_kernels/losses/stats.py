"""What a step says about its mining. Everything stays on the device until it is read."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
from torch import Tensor

from psm_kernels import checks
from psm_kernels.backends.base import Exclude
from psm_kernels.bank import BankView
from psm_kernels.losses.sampling import Negatives, Positives, Sampling
from psm_kernels.ops import bank_pass, bank_topk, excluded
from psm_kernels.rows import unit_rows, wide

_FALSE_NEGATIVE_SAMPLE = 1 << 17  # (row, slot) pairs looked at: 20 ms on one core, and 0.1 % off


@dataclasses.dataclass(frozen=True)
class MiningStats:
    """Detached device tensors of one loss call; None where labels or the module were not there.

    g_ij = dloss_i/ds_ij is the pull of kept negative j on query i (per unit of similarity).
    """

    kept_count: Tensor  # (B,) negatives kept per row, mined positives not among them
    kept: Tensor  # () their share of the candidates
    grad_mean: Tensor  # (B,) mean of g over the kept negatives of a row, 0 when none
    grad_var: Tensor  # (B,) its variance
    positive_similarity: Tensor  # (B,) cosine of query and key
    contrast_acc: Tensor  # () share of rows whose key outranks every candidate
    positive_purity: Tensor | None = (
        None  # () share of mined rows with the row's label; topk 0: None
    )
    false_negative_rate: Tensor | None = None  # () share of kept negatives with the row's label
    bank_fill: Tensor | None = None  # () count / K
    own_copies: Tensor | None = None  # (B,) slots with the row's own id, which it does not see
    bank_age: Tensor | None = None  # () batches since the oldest key was written

    def as_dict(self, prefix: str = "") -> dict[str, float]:
        """Batch means as floats in one copy from the device; names without a value are absent."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values = {name: v.float().mean() for name, v in values.items() if v is not None}
        floats = torch.stack(list(values.values())).tolist()
        return {prefix + name: v for name, v in zip(values, floats, strict=True)}

    def write(self, writer, step: int, prefix: str = "psm/") -> None:
        """Send every value to `writer.add_scalar`, such as TensorBoard's SummaryWriter."""
        for name, value in self.as_dict(prefix).items():
            writer.add_scalar(name, value, step)


class PSMOutput(NamedTuple):
    loss: Tensor  # () or (B,), fp32
    stats: MiningStats


@torch.no_grad()
def mining_stats(
    query: Tensor,  # (B, D)
    bank: BankView,
    pos: Positives,
    neg: Negatives,
    log_pull: Tensor,  # (B,) log of g tau / exp(s/tau), of the soft term
    sampling: Sampling,
    exclude: Exclude,
    labels: Tensor | None,
) -> MiningStats:
    options, candidates, copies = sampling.options, neg.candidates, None
    s_pos, against_bank = pos.logits[:, 0] * options.temperature, options.negatives == "bank"
    if against_bank and options.hard_weight > 0:
        log_h = torch.logaddexp(pos.logits[:, 0], neg.log_sum)
        log_pull = torch.logaddexp(log_pull, math.log(options.hard_weight) - log_h)
    log_pull = log_pull - math.log(options.temperature)
    kept = neg.count.clamp_min(1)
    grad_mean = torch.exp(neg.log_sum + log_pull) / kept
    grad_sq = torch.exp(neg.log_sq + 2 * log_pull) / kept
    if exclude.ids is not None:
        copies, empty = bank.hidden(exclude)
        if against_bank:
            candidates = candidates - (copies + empty)
    purity = missed = None
    if labels is not None and bank.labels is not None:
        purity = _purity(pos, labels, bank) if options.topk else None
        missed = _false_negative_rate(query, pos, bank, s_pos, sampling, labels, exclude)
    return MiningStats(
        kept_count=neg.count,
        kept=neg.count.sum() / candidates.sum().clamp_min(1),
        grad_mean=grad_mean,
        grad_var=(grad_sq - grad_mean.square()).clamp_min(0),
        positive_similarity=s_pos,
        contrast_acc=_contrast_accuracy(query, pos, bank, s_pos, exclude),
        positive_purity=purity,
        false_negative_rate=missed,
        bank_fill=bank.count.to(query.dtype) / len(bank),
        own_copies=copies,
    )


def _contrast_accuracy(
    query: Tensor, pos: Positives, bank: BankView, s_pos: Tensor, exclude: Exclude
) -> Tensor:
    """Share of rows whose key is nearer than every slot that was not mined."""
    similarity, index = bank.topk(query, pos.index.shape[1] + 1, exclude)
    mined = (index[:, :, None] == pos.index[:, None, :]).any(2)
    best = similarity.masked_fill(mined, -torch.inf).amax(1)
    return (s_pos > best).to(query.dtype).mean()


def _purity(pos: Positives, labels: Tensor, bank: BankView) -> Tensor:
    """Share of mined rows with the row's label; an unknown label is a miss."""
    found = pos.index >= 0
    same = found & (bank.labels_at(pos.index) == labels[:, None]) & (labels >= 0)[:, None]
    return same.sum() / found.sum().clamp_min(1)


def _false_negative_rate(
    query: Tensor,
    pos: Positives,
    bank: BankView,
    s_pos: Tensor,
    sampling: Sampling,
    labels: Tensor,
    exclude: Exclude,
) -> Tensor:
    """Share of kept negatives with the row's label; a big bank is sampled at even distances."""
    stride = -(-len(query) * len(bank) // _FALSE_NEGATIVE_SAMPLE)
    slots = torch.arange(0, len(bank), stride, device=bank.device)
    rows = bank.rows(torch.where(slots < bank.count, slots, -1), query.dtype)
    similarity = query.to(bank.bank.dtype).to(query.dtype) @ rows.T  # (B, S)
    keep = sampling.weights(similarity, s_pos, slots)
    keep = keep * bank.seen(exclude.naming(pos.index), slots)
    same = (bank.labels_at(slots) == labels[:, None]) & (labels >= 0)[:, None]
    return (keep * same).sum() / keep.sum().clamp_min(1e-12)


class RankGradientStats(NamedTuple):
    mean: Tensor  # (R,) mean over the batch of g at each rank of the negatives
    var: Tensor  # (R,) its variance
    positive_rank: Tensor  # () mean over the batch of 1 + number of negatives above the positive


@torch.no_grad()
def rank_gradient_stats(
    query: Tensor,
    key: Tensor,
    bank: Tensor,
    ranks: int = 200,
    *,
    count: Tensor | int | None = None,
    temperature: float = 0.5,
    ids: Tensor | None = None,
    bank_ids: Tensor | None = None,
    backend: str = "auto",
) -> RankGradientStats:
    """Mean and variance over the batch of the gradient at each rank of the sorted negatives.

    g = exp(s/tau) / (tau Z) with every valid slot in Z: the analysis that PSM (arXiv 2311.00358)
    and SimANS (arXiv 2210.11773, section 3) argue from. Whether PSM took norms or vectors is not
    known; for unit keys this is the norm.

    Args:
        query, key: (B, D), normalized here.
        bank: (K, D) unit rows.
        ranks: ranks wanted, at most K are returned. A rank that no row has is 0.
        count, temperature, ids, bank_ids, backend: as in `psm_kernels.functional.psm_loss`.

    Returns:
        RankGradientStats(mean (R,), var (R,), positive_rank ()), R = min(ranks, K).

    Raises:
        ValueError: as `psm_kernels.ops.bank_pass`.
    """
    checks.check_bank(bank)
    checks.check_matrix("query", query, like="the bank", shape=(None, bank.shape[1]))
    checks.check_matrix("key", key, like="query", shape=query.shape)
    checks.check_int("ranks", ranks, 1)
    sums = wide(bank)
    count = checks.as_count(count, bank)
    query, key = unit_rows(query, sums), unit_rows(key, sums)
    s_pos = (query * key).sum(1)
    exclude = excluded(None, ids, bank_ids, bank, len(query))
    options = {"exclude": exclude, "backend": backend}
    negatives = bank_pass(query, None, bank, count, s_pos, temperature=temperature, **options)
    log_z = torch.logaddexp(s_pos / temperature, negatives.neg_lse)
    ranks = min(ranks, bank.shape[0])
    similarity, index = bank_topk(query, bank, ranks, count=count, **options)
    found = (index >= 0).to(sums)
    g = torch.exp(similarity / temperature - log_z[:, None]) / temperature  # (B, R), 0 when missing
    rows = found.sum(0).clamp_min(1)
    mean = g.sum(0) / rows
    var = ((g - mean).square() * found).sum(0) / rows

    above = torch.zeros_like(s_pos)
    for start in range(0, bank.shape[0], 8192):  # slabs: never a (B, K) matrix
        rows = bank[start : start + 8192].to(sums)
        slots = torch.arange(start, start + rows.shape[0], device=bank.device)
        above += ((query @ rows.T > s_pos[:, None]) & exclude.seen(slots, count)).sum(1)
    return RankGradientStats(mean, var, 1 + above.mean())
