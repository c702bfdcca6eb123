"""The two operators as the paper writes them, B x K matrices and all: the oracle of the tests and
the naive baseline of the benchmarks. Any device, fp32 and fp64; never optimized."""

from __future__ import annotations

import torch
from torch import Tensor

from psm_kernels import noise as canonical
from psm_kernels.ops import NOTHING, Exclude

DIFFERENTIABLE = True  # autograd differentiates neg_lse by the query, as often as one likes


def unavailable() -> str | None:
    return None


def bank_pass(
    query: Tensor,  # (B, D)
    key: Tensor | None,  # (B, D)
    bank: Tensor,  # (K, D)
    count: Tensor,  # ()
    s_pos: Tensor,  # (B,)
    temperature: float,
    selection: str,
    a: float,
    b: float,
    topk: int,
    rng_state: Tensor | None,  # (2,)
    row_offset: int,
    col_offset: int,
    exclude: Exclude = NOTHING,
    exclude_mined: bool = False,
    *,
    noise: str = "philox",
    exact_ties: bool = True,
) -> tuple[Tensor, ...]:
    """See `psm_kernels.ops.bank_pass`. The last two flags exist for benchmarks, whose baseline is
    what a user would write: noise="torch" draws from torch's generator instead of the canonical
    words, exact_ties=False leaves ties of the top-k to `torch.topk`."""
    rows = _valid_rows(bank, count)
    similarity = query.to(rows.dtype) @ rows.T  # (B, K)
    topk_sim, topk_index = bank_topk(
        query.detach() if key is None else key, bank, topk, count, exclude, exact_ties=exact_ties
    )
    if exclude_mined:
        exclude = exclude.naming(topk_index)
    seen = exclude.seen(torch.arange(bank.shape[0], device=bank.device), count)  # (B, K)
    given = similarity.detach()  # by the choice: no gradient flows through the draws
    if selection == "bernoulli" and noise == "torch":
        p = canonical.keep_probability(given, s_pos[:, None], a, b)
        weight = (torch.rand_like(p) < p).to(p.dtype)
    else:
        words = None
        if selection == "bernoulli":
            words = canonical.philox_block(row_offset, *similarity.shape, col_offset, rng_state)
        weight = canonical.keep_weight(given, s_pos[:, None], words, selection, a, b)
    weight = weight * seen

    bad = seen & similarity.isnan()
    kept = (weight > 0) | bad  # what is not a number stays one, in the gradient too
    log_weight = torch.where(bad, 0.0, weight).log()
    logits = torch.where(kept, similarity / temperature + log_weight, -torch.inf)
    empty = ~kept.any(1)
    # The inner zeros: all of a row at -inf would have NaN for a second derivative.
    neg_lse = torch.logsumexp(torch.where(empty[:, None], 0.0, logits), 1)
    neg_lse = torch.where(empty, -torch.inf, neg_lse)
    with torch.no_grad():
        softmax = torch.exp(logits - torch.where(empty, 0.0, neg_lse)[:, None])  # (B, K)
        neg_mean = softmax @ rows
        neg_sq_lse = torch.logsumexp(logits + similarity / temperature, 1)
    return neg_lse, neg_mean, neg_sq_lse, weight.sum(1), topk_sim, topk_index


def bank_topk(
    query: Tensor,
    bank: Tensor,
    k: int,
    count: Tensor,
    exclude: Exclude = NOTHING,
    *,
    exact_ties: bool = True,
) -> tuple[Tensor, Tensor]:
    """See `psm_kernels.ops.bank_topk`."""
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
    if exact_ties:
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
