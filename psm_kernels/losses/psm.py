"""PSM: one pass over the bank, then B x (1 + k) numbers in plain torch, or all of it fused."""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from torch import Tensor

from psm_kernels import checks, noise
from psm_kernels.backends.base import EMPTY, Exclude
from psm_kernels.bank import BankView, Shard
from psm_kernels.losses.base import BankLoss, alternate
from psm_kernels.losses.common import (
    bank_of,
    check_pair,
    contrast,
    own_copies,
    sampling_state,
    unit,
)
from psm_kernels.losses.in_batch import views
from psm_kernels.losses.sampling import Negatives, Positives, Sampling
from psm_kernels.losses.stats import MiningStats, PSMOutput, mining_stats
from psm_kernels.ops import snapshot
from psm_kernels.options import PSMOptions, takes
from psm_kernels.rows import reduce


@takes(PSMOptions)
def psm_loss(
    query: Tensor,
    key: Tensor,
    bank: Tensor | Shard | BankView,
    *,
    count: Tensor | int | None = None,
    projection: Tensor | None = None,
    rng_state: Tensor | None = None,
    row_offset: int = 0,
    ids: Tensor | None = None,
    bank_ids: Tensor | Shard | None = None,
    labels: Tensor | None = None,
    bank_labels: Tensor | Shard | None = None,
    return_stats: bool = False,
    backend: str = "auto",
    options: PSMOptions | None = None,
    **settings,
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
            rank's `psm_kernels.bank.Shard` of it, which makes the call collective; or a BankView,
            which has `count`, `bank_ids`, `bank_labels` and `backend` with it.
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
        options: the settings as an object.

    Returns:
        The loss in fp32 (fp64 for an fp64 bank): 0-d, or (B,) for reduction="none".

    Raises:
        ValueError: an argument is wrong (named in the message), or the backend cannot run here.
    """
    options = PSMOptions.of(options, settings)
    bank = bank_of(bank, count, bank_ids, bank_labels, backend, needed=True)
    options.check_size(len(bank))
    check_pair(query, key, bank, projection)
    if labels is not None:
        checks.check_vector("labels", labels, len(query), torch.int64)
        checks.check_device("labels", labels, bank.device)
    exclude = own_copies(query, bank, ids)
    if rng_state is not None or options.selection == "bernoulli":
        rng_state = snapshot(sampling_state(rng_state, bank.device))
    plain = options.negatives == "bank" and projection is None and not return_stats
    if plain and not key.requires_grad:
        loss = bank.psm_step(query, key, options, exclude, rng_state, row_offset)
        if loss is not None:
            return loss

    sampling = Sampling(options, rng_state, row_offset)
    with torch.autocast(bank.device.type, enabled=False):
        query, key = unit(query, bank), unit(key, bank)
        projection = query if projection is None else unit(projection, bank)
        against = _against_bank if options.negatives == "bank" else _against_neighbors
        pos, neg, hard = against(query, key, bank, exclude, sampling)
        weights = _soft_weights(projection, pos, options)  # (B, 1 + k)
        log_z = torch.logsumexp(torch.cat((pos.logits, neg.log_sum[:, None]), 1), 1)  # (B,)
        soft = (weights * torch.where(weights > 0, log_z[:, None] - pos.logits, 0.0)).sum(1)
        loss = reduce(soft + options.hard_weight * hard, options.reduction)
        if not return_stats:
            return loss
        log_pull = weights.sum(1).log() - log_z  # (B,) log of g tau / exp(s/tau), of the soft term
        stats = mining_stats(query, bank, pos, neg, log_pull, sampling, exclude, labels)
    return PSMOutput(loss, stats if ids is not None else replace(stats, own_copies=None))


# --- positives and negatives ---------------------------------------------------------------------


def _positives(
    query: Tensor, key: Tensor, bank: BankView, index: Tensor, temperature: float
) -> Positives:
    rows = bank.rows(index, query.dtype)  # (B, k, D)
    similarity = torch.cat(((query * key).sum(1, keepdim=True), (query[:, None] * rows).sum(2)), 1)
    found = torch.nn.functional.pad(index >= 0, (1, 0), value=True)
    return Positives(torch.where(found, similarity / temperature, -torch.inf), rows, index)


def _against_bank(
    query: Tensor, key: Tensor, bank: BankView, exclude: Exclude, sampling: Sampling
) -> tuple[Positives, Negatives, Tensor]:
    """Both sides, and the hard term (B,)."""
    s_pos, options = (query * key).sum(1).detach(), sampling.options
    mining = options.mining_pass(sampling.row_offset)
    result = bank.scan(query, key, s_pos, mining, exclude, sampling.rng_state)
    pos = _positives(query, key, bank, result.topk_index, options.temperature)
    candidates = bank.count - (result.topk_index >= 0).sum(1)
    sums = (result.neg_lse, result.neg_sq_lse, result.neg_count)
    neg = Negatives(*sums, candidates.to(query.dtype))
    return pos, neg, contrast(pos.logits[:, 0], neg.log_sum)


def _soft_weights(projection: Tensor, pos: Positives, options: PSMOptions) -> Tensor:
    """W (B, 1 + k): 1 for the key, then the mined rows'; missing: 0."""
    found = (pos.index >= 0).to(projection.dtype)
    if options.soft_weights == "attention":
        scores = (projection[:, None] * pos.rows).sum(2) / options.weight_temperature  # (B, k)
        lowest = torch.finfo(scores.dtype).min  # not -inf: a row may have nothing mined
        mined = torch.where(found > 0, scores, lowest).softmax(1) * found
    elif options.soft_weights == "uniform":
        mined = found / found.sum(1, keepdim=True).clamp_min(1)
    else:
        mined = found
    return torch.nn.functional.pad(mined, (1, 0), value=1.0)


# --- as released (dhkdhk/PSM, src/model/psm.py): candidates from the batch and its neighbors ------


def _against_neighbors(
    query: Tensor, key: Tensor, bank: BankView, exclude: Exclude, sampling: Sampling
) -> tuple[Positives, Negatives, Tensor]:
    """Negatives of row i: the other rows' keys and their mined rows, (B - 1)(1 + k) columns. The
    hard term is over the 2B views, the mean of the query's and the key's row."""
    options, batch = sampling.options, len(query)
    _, index = bank.topk(key, options.topk, exclude)  # (B, k)
    pos = _positives(query, key, bank, index, options.temperature)
    columns = torch.cat((key[:, None], pos.rows), 1).flatten(0, 1)  # (B (1 + k), D)
    there = torch.nn.functional.pad(index >= 0, (1, 0), value=True).flatten()
    own = torch.eye(batch, dtype=torch.bool, device=query.device)
    own = own.repeat_interleave(1 + options.topk, 1)
    if exclude.ids is not None:  # a neighbor of another row may be a copy of this one
        ids = exclude.ids[:, None]
        held = torch.cat((ids, bank.ids_at(index)), 1).flatten()
        own = own | ((held == ids) & (ids != EMPTY))
    s_pos = pos.logits[:, 0] * options.temperature
    neg = sampling.sums(query @ columns.T, there & ~own, s_pos, noise.Stream.SOFT)

    both = views(query, key)
    sampling = sampling._replace(row_offset=2 * sampling.row_offset)
    of_views = sampling.sums(both.similarity, both.candidate, both.positive, noise.Stream.HARD)
    hard = contrast(both.positive / options.temperature, of_views.log_sum)
    return pos, neg, both.fold(hard)


class PSMLoss(BankLoss):
    """PSM with its own memory bank (arXiv 2311.00358); not the stereo-matching loss of that name.

    Arguments of the mining and the formula: `psm_kernels.functional.psm_loss`. They are attributes
    that may change between calls, as a scheduled `criterion.temperature = 0.1`.

    Args:
        temperature: tau > 0.
        memory_bank_size: (rows K, columns D).
        topk, a, b, selection, soft_weights, weight_temperature, hard_weight, negatives: see there.
        reduction: "mean" | "sum" | "none".
        bank_dtype: fp32, bf16 or fp16; bf16 halves the bank and its reading time. Sums are fp32.
        indexed_bank: slot i holds sample i and is rewritten when its key comes again: the bank of a
            whole data set, each image once. Every call that enqueues then needs `ids` in [0, K).
        gather_distributed: enqueue the keys of all ranks in rank order; every rank holds the same
            bank. Calls that enqueue need the same batch size everywhere (drop_last=True). DDP's
            mean of the gradients is that of the whole batch's mean loss: scale nothing.
        shard_bank: each rank holds 1/world of the slots and all search all of them, so that every
            call runs on all ranks. Loss and gradient are those of one process with the whole batch.
        process_group: of both, None for the default group. Without torch.distributed
            `gather_distributed` does nothing, `shard_bank` is refused.
        seed: of the canonical noise, the same on all ranks; its state [seed, offset] is
            `rng_state`. Two losses with one seed draw the same noise: give each its own. Setting
            it starts the noise again.
        backend: "auto" or a name of `python -m psm_kernels`.

    Example:
        >>> criterion = PSMLoss(0.2, (65536, 128))
        >>> loss = criterion(query, key)  # reads the bank, then enqueues the keys

    Raises:
        ValueError: an argument is wrong; bank and noise state are as before.
    """

    Options, function = PSMOptions, staticmethod(psm_loss)
    memory_bank_size = (16384, 128)
    _has_in_batch_form = False  # it mines its positives from a bank
    _samples = True

    def _rows_are_apart(self) -> bool:
        return self.negatives == "bank"

    def _joined(self, results: list[Tensor | PSMOutput]) -> Tensor | PSMOutput:
        if isinstance(results[0], Tensor):
            return super()._joined(results)
        both = [[getattr(r.stats, f.name) for r in results] for f in fields(MiningStats)]
        stats = [
            None if pair[0] is None else alternate(pair) if pair[0].ndim else sum(pair) / 2
            for pair in both
        ]
        return PSMOutput(super()._joined([r.loss for r in results]), MiningStats(*stats))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        *,
        projection: Tensor | None = None,
        labels: Tensor | None = None,
        ids: Tensor | None = None,
        update: bool | None = None,
        return_stats: bool = False,
    ) -> Tensor | PSMOutput:
        """Loss of query (B, D) against key (B, D) and the bank; then the keys are enqueued.

        Args:
            query: carries gradient; key: from the momentum encoder.
            projection: (B, D) for the attention weights, default `query`.
            labels: (B,) int64, kept with the keys and used by statistics alone.
            ids: (B,) int64 names of the samples, kept with the keys: a slot that holds a row's own
                id is neither mined nor a negative of it. Negative: unknown.
            update: whether to enqueue; None: when training and grad mode is on.
            return_stats: return PSMOutput(loss, stats).

        Returns:
            The loss, fp32: 0-d, or (B,) for reduction="none".
        """
        more = {"projection": projection, "return_stats": return_stats}
        if not return_stats:
            return self._step(query, key, labels, ids, update, more)
        bank = self.memory_bank
        written = bank.count.float()  # before the keys of this call
        result = self._step(query, key, labels, ids, update, more | {"labels": labels})
        _, world = self._rank_and_world()
        more = {"bank_fill": written / bank.size, "bank_age": written / (world * len(key))}
        return result._replace(stats=replace(result.stats, **more))
