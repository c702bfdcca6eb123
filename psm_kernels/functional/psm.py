"""PSM without state: one pass over the bank, a finish on B x (1 + k) numbers in plain torch."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
from torch import Tensor

from psm_kernels import checks
from psm_kernels import noise
from psm_kernels.distributed import Shard, bank_pass, bank_rows, bank_topk, hidden
from psm_kernels.functional.common import (
    check_pair,
    check_pair_settings,
    contrast,
    own_copies,
    reduce,
    unit,
    views,
)
from psm_kernels.ops import EMPTY, SELECTIONS, Exclude, check_backend, snapshot
from psm_kernels.ops.fused import psm_rows
from psm_kernels.stats import MiningStats, PSMOutput

SOFT_WEIGHTS = ("attention", "uniform", "binary")
NEGATIVES = ("bank", "neighbors")

_TAG_SOFT, _TAG_HARD = 1, 2  # noise streams of negatives="neighbors"
_FALSE_NEGATIVE_SAMPLE = 1 << 20  # (row, slot) pairs looked at: some 50 ms on one core


def psm_loss(
    query: Tensor,
    key: Tensor,
    bank: Tensor | Shard,
    *,
    count: Tensor | int | None = None,
    temperature: float = 0.5,
    topk: int = 5,
    a: float = 0.5,
    b: float = 0.0,
    selection: str = "bernoulli",
    soft_weights: str = "attention",
    weight_temperature: float = 1.0,
    hard_weight: float = 1.0,
    negatives: str = "bank",
    projection: Tensor | None = None,
    rng_state: Tensor | None = None,
    row_offset: int = 0,
    ids: Tensor | None = None,
    bank_ids: Tensor | Shard | None = None,
    reduction: str = "mean",
    labels: Tensor | None = None,
    bank_labels: Tensor | None = None,
    return_stats: bool = False,
    backend: str = "auto",
) -> Tensor | PSMOutput:
    """PSM: potential-sample mining of positives (PPSM) and negatives (PNSM), arXiv 2311.00358.

    Mined positives P are the `topk` bank rows nearest to `key`. Every other row j is a negative
    with the weight keep_j that `selection` gives it. With cosines s and the temperature tau,

        Z    = exp(s+/tau) + sum_P exp(s/tau) + N,     N = sum_j keep_j exp(s_j/tau)
        soft = sum over [key, P] of W (log Z - s/tau)
        hard = log(exp(s+/tau) + N) - s+/tau
        loss = soft + hard_weight hard

    No gradient flows through the choice of P, the keep probabilities or the draws.

    Args:
        query: (B, D), the online network's output; carries gradient.
        key: (B, D), the momentum network's output for the other view.
        bank: (K, D) unit rows, contiguous, fp32 / bf16 / fp16 (fp64 on "reference"); or this
            rank's `psm_kernels.distributed.Shard` of it, which makes the call collective.
        count: valid slots [0, count): 0-d int64 tensor on the device, int, or None for K. With an
            empty bank the loss is 0.
        temperature: tau > 0 (0.5: dhkdhk/PSM, config.conf).
        topk: mined positives per row, 0 to K (5: config.conf).
        a, b: p_j = min(exp(-a (s_j - s+ - b)^2), 0.999), (0.5, 0: the released defaults). The peak
            is at s+ + b, as in the SimANS paper; its released code has the opposite sign of b.
        selection: "bernoulli" keeps with probability p, "expected" weighs by p, "all" keeps all.
        soft_weights: W of the mined positives: "attention", the softmax of projection . positive /
            weight_temperature; "uniform", 1 / number mined; "binary", 1 (what the released code
            runs). The key always weighs 1.
        weight_temperature: of the attention (1: the released code).
        hard_weight: factor of the second term (1: config.conf).
        negatives: "bank", or "neighbors" for the released code's candidates: soft term against the
            batch's other keys and their mined rows, hard term against its other 2B - 2 views.
        projection: (B, D) projector output before the predictor, for "attention"; None is `query`.
        rng_state: int64 (2,) [seed, offset] of the canonical noise, on the bank's device. None
            draws both from torch's default generator.
        row_offset: global index of row 0, so that ranks of a distributed run draw different noise.
        ids: (B,) int64 names of the samples: a slot that holds a row's own id is neither mined nor
            a negative of it, however many copies there are. Negative: unknown, matches nothing.
        bank_ids: (K,) int64 names of what the slots hold, -1 unknown, -2 nothing; or a Shard.
        reduction: "mean" | "sum" | "none".
        labels: (B,) int64, for statistics alone; -1 is unknown.
        bank_labels: (K,) int64, for statistics alone; -1 is unknown.
        return_stats: return PSMOutput(loss, stats) instead of the loss.
        backend: "auto" or a name of `python -m psm_kernels`.

    Returns:
        The loss in fp32 (fp64 for an fp64 bank): 0-d, or (B,) for reduction="none".

    Raises:
        ValueError: an argument is wrong (named in the message), or the backend cannot run here.
    """
    checks.check_bank(getattr(bank, "rows", bank))  # of a Shard: this rank's rows
    check_psm_settings(
        temperature=temperature,
        topk=topk,
        a=a,
        b=b,
        selection=selection,
        soft_weights=soft_weights,
        weight_temperature=weight_temperature,
        hard_weight=hard_weight,
        negatives=negatives,
        reduction=reduction,
        size=bank.shape[0],
    )
    check_pair(query, key, bank, projection)
    batch = query.shape[0]
    for name, value, size in (("labels", labels, batch), ("bank_labels", bank_labels, len(bank))):
        if value is not None and not isinstance(value, Shard):
            checks.check_vector(name, value, size, torch.int64)
            checks.check_device(name, value, bank.device)
    exclude = own_copies(query, bank, ids, bank_ids)
    check_backend(backend, bank)
    count = checks.as_count(count, bank)
    if rng_state is not None:
        checks.check_rng_state(rng_state, bank.device)
    elif selection == "bernoulli":
        rng_state = torch.randint(0, 1 << 62, (2,), device=bank.device)

    draw = _Draw(selection, a, b, None if rng_state is None else snapshot(rng_state), row_offset)

    with torch.autocast(bank.device.type, enabled=False):
        mining = {"topk": topk, "exclude": exclude, "exclude_mined": True, "backend": backend}
        sweep = draw._asdict() | {"temperature": temperature} | mining
        if negatives == "bank" and projection is None and not (return_stats or key.requires_grad):
            weighting = {
                "soft_weights": soft_weights,
                "weight_temperature": weight_temperature,
                "hard_weight": hard_weight,
            }
            rows = psm_rows(query, key, bank, count, sweep, weighting)
            if rows is not None:
                return reduce(rows, reduction)
        query, key = unit(query, bank), unit(key, bank)
        projection = query if projection is None else unit(projection, bank)
        if negatives == "bank":
            pos, neg = _bank_sides(query, key, bank, count, sweep)
            log_h = torch.logaddexp(pos.logits[:, 0], neg.log_sum)
            hard = log_h - pos.logits[:, 0]
        else:
            options = {"count": count, "exclude": exclude, "backend": backend}
            _, index = bank_topk(key, bank, topk, **options)
            pos, neg = _neighbor_sides(query, key, bank, index, draw, temperature, exclude)
            log_h, hard = None, _view_loss(query, key, draw, temperature)
        weights = _soft_weights(projection, pos, soft_weights, weight_temperature)  # (B, 1 + k)
        log_z = torch.logsumexp(torch.cat((pos.logits, neg.log_sum[:, None]), 1), 1)  # (B,)
        soft = (weights * torch.where(weights > 0, log_z[:, None] - pos.logits, 0.0)).sum(1)
        loss = reduce(soft + hard_weight * hard, reduction)
        if not return_stats:
            return loss

        with torch.no_grad():
            log_pull = weights.sum(1).log() - log_z  # (B,) log of g tau / exp(s/tau)
            if log_h is not None and hard_weight > 0:
                log_pull = torch.logaddexp(log_pull, math.log(hard_weight) - log_h)
            log_pull = log_pull - math.log(temperature)
            kept = neg.count.clamp_min(1)
            grad_mean = torch.exp(neg.log_sum + log_pull) / kept
            grad_sq = torch.exp(neg.log_sq + 2 * log_pull) / kept
            candidates, copies = neg.candidates, None
            if exclude.ids is not None:
                copies, empty = hidden(exclude, count)
                if negatives == "bank":
                    candidates = candidates - (copies + empty)
            stats = MiningStats(
                kept_count=neg.count,
                kept=neg.count.sum() / candidates.sum().clamp_min(1),
                grad_mean=grad_mean,
                grad_var=(grad_sq - grad_mean.square()).clamp_min(0),
                positive_similarity=pos.logits[:, 0] * temperature,
                contrast_acc=_contrast_accuracy(
                    query, pos, bank, count, temperature, exclude, backend
                ),
                bank_fill=count.to(query.dtype) / len(bank),
                own_copies=None if ids is None else copies,
            )
            if labels is not None and bank_labels is not None:
                stats = dataclasses.replace(
                    stats,
                    positive_purity=_purity(pos, labels, bank_labels) if topk else None,
                    false_negative_rate=_false_negative_rate(
                        query, pos, bank, count, draw, temperature, labels, bank_labels, exclude
                    ),
                )
    return PSMOutput(loss, stats)


# --- PSM: settings, positives, negatives ---------------------------------------------------------


def check_psm_settings(
    *,
    temperature: float,
    topk: int,
    a: float,
    b: float,
    selection: str,
    soft_weights: str,
    weight_temperature: float,
    hard_weight: float,
    negatives: str,
    reduction: str,
    size: int,
) -> None:
    """Raise the ValueError of the first wrong setting; `size` is the bank's K."""
    check_pair_settings(temperature=temperature, reduction=reduction)
    checks.check_int("topk", topk, 0, size, "the bank's rows")
    checks.check_number("a", a, least=0)
    checks.check_number("b", b)
    checks.check_option("selection", selection, SELECTIONS)
    checks.check_option("soft_weights", soft_weights, SOFT_WEIGHTS)
    checks.check_number("weight_temperature", weight_temperature, above=0)
    checks.check_number("hard_weight", hard_weight, least=0)
    checks.check_option("negatives", negatives, NEGATIVES)


class _Draw(NamedTuple):
    """How negatives are selected."""

    selection: str
    a: float
    b: float
    rng_state: Tensor | None
    row_offset: int

    def weights(self, similarity: Tensor, s_pos: Tensor, slots: Tensor, tag: int = 0) -> Tensor:
        """keep (B, S), detached, for slots (S,) or (B, S) with their `similarity` (B, S)."""
        words = None
        if self.selection == "bernoulli":
            rows = torch.arange(len(s_pos), device=slots.device)[:, None] + self.row_offset
            rng_state = noise.tagged(self.rng_state, tag) if tag else self.rng_state
            words = noise.philox_words(rows, slots, rng_state)
        return noise.keep_weight(
            similarity.detach(), s_pos.detach()[:, None], words, self.selection, self.a, self.b
        )


class _Positives(NamedTuple):
    logits: Tensor  # (B, 1 + k) s/tau of the key, then of the mined rows; missing: -inf
    rows: Tensor  # (B, k, D) the mined rows; missing: 0
    index: Tensor  # (B, k) their slots; missing: -1


class _Negatives(NamedTuple):
    log_sum: Tensor  # (B,) log sum keep exp(s/tau), mined positives not among them
    log_sq: Tensor  # (B,) log sum keep exp(2 s/tau)
    count: Tensor  # (B,) sum keep
    candidates: Tensor  # (B,) how many there were to keep, hidden slots of a bank among them


def _positives(
    query: Tensor, key: Tensor, bank: Tensor | Shard, index: Tensor, temperature: float
) -> _Positives:
    found = index >= 0
    rows = bank_rows(bank, index, query.dtype)  # (B, k, D)
    similarity = torch.cat(((query * key).sum(1, keepdim=True), (query[:, None] * rows).sum(2)), 1)
    found = torch.nn.functional.pad(found, (1, 0), value=True)
    return _Positives(torch.where(found, similarity / temperature, -torch.inf), rows, index)


def _bank_sides(
    query: Tensor, key: Tensor, bank: Tensor | Shard, count: Tensor, sweep: dict
) -> tuple[_Positives, _Negatives]:
    s_pos = (query * key).sum(1).detach()
    swept = bank_pass(query, key if sweep["topk"] else None, bank, count, s_pos, **sweep)
    pos = _positives(query, key, bank, swept.topk_index, sweep["temperature"])
    candidates = count - (swept.topk_index >= 0).sum(1)
    sums = (swept.neg_lse, swept.neg_sq_lse, swept.neg_count)
    return pos, _Negatives(*sums, candidates.to(query.dtype))


def _soft_weights(
    projection: Tensor, pos: _Positives, soft_weights: str, weight_temperature: float
) -> Tensor:
    """W (B, 1 + k): 1 for the key, then the mined rows'; missing: 0."""
    found = (pos.index >= 0).to(projection.dtype)
    if soft_weights == "attention":
        scores = (projection[:, None] * pos.rows).sum(2) / weight_temperature  # (B, k)
        lowest = torch.finfo(scores.dtype).min  # not -inf: a row may have nothing mined
        mined = torch.where(found > 0, scores, lowest).softmax(1) * found
    elif soft_weights == "uniform":
        mined = found / found.sum(1, keepdim=True).clamp_min(1)
    else:
        mined = found
    return torch.nn.functional.pad(mined, (1, 0), value=1.0)


# --- PSM as released: candidates from the batch and its neighbors --------------------------------


def _neighbor_sides(
    query: Tensor,
    key: Tensor,
    bank: Tensor | Shard,
    index: Tensor,  # (B, k) mined slots; missing: -1
    draw: _Draw,
    temperature: float,
    exclude: Exclude,
) -> tuple[_Positives, _Negatives]:
    """Negatives of row i: the other rows' keys and their mined rows, (B - 1)(1 + k) columns
    (dhkdhk/PSM, src/model/psm.py)."""
    batch, topk = index.shape
    pos = _positives(query, key, bank, index, temperature)
    columns = torch.cat((key[:, None], pos.rows), 1).flatten(0, 1)  # (B (1 + k), D)
    there = torch.nn.functional.pad(index >= 0, (1, 0), value=True).flatten()
    own = torch.eye(batch, dtype=torch.bool, device=query.device).repeat_interleave(1 + topk, 1)
    if exclude.ids is not None:  # a neighbor of another row may be a copy of this one
        ids = exclude.ids[:, None]
        held = torch.cat((ids, exclude.bank_ids[index.clamp_min(0)]), 1).flatten()
        own = own | ((held == ids) & (ids != EMPTY))
    similarity = query @ columns.T
    return pos, _in_batch(similarity, there & ~own, pos.logits[:, 0], draw, temperature, _TAG_SOFT)


def _view_loss(query: Tensor, key: Tensor, draw: _Draw, temperature: float) -> Tensor:
    """The hard term over the 2B views, (B,): the mean of the query's and the key's row."""
    both = views(query, key)
    positive = both.positive / temperature  # (2B,)
    draw = draw._replace(row_offset=2 * draw.row_offset)
    neg = _in_batch(both.similarity, both.candidate, positive, draw, temperature, _TAG_HARD)
    return both.fold(contrast(positive, neg.log_sum))


def _in_batch(
    similarity: Tensor,  # (R, S)
    candidate: Tensor,  # (R, S) bool
    pos_logit: Tensor,  # (R,)
    draw: _Draw,
    temperature: float,
    tag: int,
) -> _Negatives:
    slots = torch.arange(similarity.shape[1], device=similarity.device)
    keep = draw.weights(similarity, pos_logit * temperature, slots, tag) * candidate
    logits = torch.where(keep > 0, similarity / temperature + keep.log(), -torch.inf)
    return _Negatives(
        torch.logsumexp(logits, 1),
        torch.logsumexp(logits + similarity / temperature, 1).detach(),
        keep.sum(1),
        candidate.sum(1).to(similarity.dtype),
    )


# --- PSM: statistics -----------------------------------------------------------------------------


def _contrast_accuracy(query, pos, bank, count, temperature, exclude, backend) -> Tensor:
    """Share of rows whose key is nearer than every slot that was not mined."""
    k = pos.index.shape[1] + 1
    options = {"count": count, "exclude": exclude, "backend": backend}
    similarity, index = bank_topk(query, bank, k, **options)
    mined = (index[:, :, None] == pos.index[:, None, :]).any(2)
    best = similarity.masked_fill(mined, -torch.inf).amax(1)
    return (pos.logits[:, 0] * temperature > best).to(query.dtype).mean()


def _purity(pos: _Positives, labels: Tensor, bank_labels: Tensor) -> Tensor:
    """Share of mined rows with the row's label; an unknown label is a miss."""
    found = pos.index >= 0
    same = found & (bank_labels[pos.index.clamp_min(0)] == labels[:, None]) & (labels >= 0)[:, None]
    return same.sum() / found.sum().clamp_min(1)


def _false_negative_rate(
    query, pos, bank, count, draw, temperature, labels, bank_labels, exclude
) -> Tensor:
    """Share of kept negatives with the row's label; a big bank is sampled at even distances."""
    stride = -(-len(query) * len(bank) // _FALSE_NEGATIVE_SAMPLE)
    slots = torch.arange(0, len(bank), stride, device=bank.device)
    rows = torch.where((slots < count)[:, None], bank[slots].to(query.dtype), 0.0)
    similarity = query.to(bank.dtype).to(query.dtype) @ rows.T  # (B, S)
    keep = draw.weights(similarity, pos.logits[:, 0] * temperature, slots)
    keep = keep * exclude.naming(pos.index).seen(slots, count)
    same = (bank_labels[slots] == labels[:, None]) & (labels >= 0)[:, None]
    return (keep * same).sum() / keep.sum().clamp_min(1e-12)
