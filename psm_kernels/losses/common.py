"""What every loss function shares: checks before, unit rows, reduction after, a few logarithms."""

from __future__ import annotations

import functools
from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from psm_kernels import checks
from psm_kernels._autograd import refuse_tracing
from psm_kernels.backends.base import NOTHING, Exclude
from psm_kernels.bank import BankView, Shard, view_of
from psm_kernels.losses.in_batch import views
from psm_kernels.options import LossOptions, PSMOptions, with_fields
from psm_kernels.rows import reduce, unit_rows, wide


def bank_of(
    bank: Tensor | Shard | BankView | None,
    count: Tensor | int | None = None,
    ids: Tensor | Shard | None = None,
    labels: Tensor | Shard | None = None,
    backend: str = "auto",
    *,
    needed: bool = False,
) -> BankView | None:
    """What a loss function got of a bank, checked; None is the form within the batch, which a
    method whose bank is `needed` does not have."""
    if isinstance(bank, BankView):
        if backend != "auto" or not (count is ids is labels is None):
            raise ValueError(
                "bank: got a BankView, which has count, bank_ids, bank_labels and backend with it, "
                "and another of these besides"
            )
        return bank
    if bank is None and needed:
        raise ValueError("bank: got None, wanted a tensor: there is no form within the batch")
    if bank is None:
        if ids is not None:
            raise ValueError("bank_ids: got a tensor, wanted None where there is no bank")
        return None
    view = view_of(bank, count, ids, labels, backend)
    view.check()
    return view


def check_pair(
    query: Tensor, key: Tensor, bank: BankView | None, projection: Tensor | None = None
) -> None:
    """query, key, projection are (B, D), on the bank's device and with its D where there is one."""
    refuse_tracing()
    shape = () if bank is None else (None, bank.dim)
    checks.check_matrix("query", query, like="the bank", shape=shape)
    device = query.device if bank is None else bank.device
    checks.check_device("query", query, device)
    for name, value in (("key", key), ("projection", projection)):
        if value is not None or name == "key":
            checks.check_matrix(name, value, like="query", shape=query.shape)
            checks.check_device(name, value, device)


def own_copies(query: Tensor, bank: BankView | None, ids: Tensor | None) -> Exclude:
    """What the rows of `query` must not see of the bank: the slots that hold their own ids."""
    if bank is not None:
        return bank.own_copies(query, ids)
    if ids is not None:
        raise ValueError("ids: got a tensor, wanted None where there is no bank")
    return NOTHING


def loss_function(
    kind: type[LossOptions],
    *,
    needs_bank: bool = False,
    limit: Callable[[Any], PSMOptions] | None = None,
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Makes a method, rows(query, key, bank, exclude, options) -> losses (B,), a function of the
    library. The method gets unit rows in fp32 or better whatever autocast says, a BankView or the
    batch's own Views, and what rows must not see of it; checks and the reduction are done here.

    Args:
        kind: its options.
        needs_bank: there is no form within the batch.
        limit: the PSM that its options stand for, which a backend can compute in one call.

    What a method takes by keyword beside those (`labels`, `rng_state`), its function takes too.
    """

    def make(rows: Callable[..., Tensor]) -> Callable[..., Tensor]:
        more = [p for p in signature(rows).parameters.values() if p.kind is p.KEYWORD_ONLY]
        if "labels" in {p.name for p in more}:
            more.append(more[0].replace(name="bank_labels"))

        @functools.wraps(rows)
        def loss(
            query: Tensor,
            key: Tensor,
            bank: Tensor | Shard | BankView | None = None,
            *,
            count: Tensor | int | None = None,
            ids: Tensor | None = None,
            bank_ids: Tensor | Shard | None = None,
            backend: str = "auto",
            options: LossOptions | None = None,
            **settings,
        ) -> Tensor:
            own = {p.name: settings.pop(p.name, p.default) for p in more}
            options = kind.of(options, settings)
            labels = own.pop("bank_labels", None)
            bank = bank_of(bank, count, bank_ids, labels, backend, needed=needs_bank)
            check_pair(query, key, bank)
            exclude = own_copies(query, bank, ids)
            if bank is not None:
                options.check_size(len(bank))
            fusible = bank is not None and not (key.requires_grad or is_compiling())
            if limit is not None and fusible:
                fused = bank.psm_step(query, key, limit(options), exclude)
                if fused is not None:
                    return fused
            with torch.autocast(query.device.type, enabled=False):
                query, key = unit(query, bank), unit(key, bank)
                others = views(query, key, backend) if bank is None else bank
                found = rows(query, key, others, exclude, options, **own)
                return reduce(found, options.reduction)

        plain = signature(loss, follow_wrapped=False)
        loss.__signature__ = with_fields(plain, kind, tuple(more))
        return loss

    return make


def unit(x: Tensor, bank: BankView | None) -> Tensor:
    """Unit rows in the dtype of the sums: that of the bank, without one that of x."""
    return unit_rows(x, wide(x if bank is None else bank.bank))


def contrast(log_pos: Tensor, log_neg: Tensor) -> Tensor:
    """-log(pos / (pos + neg)), 0 where there is no negative; small losses keep their digits."""
    gap = log_neg - log_pos
    return torch.logaddexp(gap, torch.zeros_like(gap))


def log_sum(a: Tensor, b: Tensor) -> Tensor:
    """log(exp a + exp b); where both are -inf the gradient is 0, not torch.logaddexp's NaN."""
    nothing = (a == -torch.inf) & (b == -torch.inf)
    a, b = torch.where(nothing, 0.0, a), torch.where(nothing, 0.0, b)
    return torch.where(nothing, -torch.inf, torch.logaddexp(a, b))


def sampling_state(rng_state: Tensor | None, device: torch.device) -> Tensor:
    """The state of the canonical noise: the caller's, or one from torch's default generator."""
    if rng_state is None:
        return torch.randint(0, 1 << 62, (2,), device=device)
    checks.check_rng_state(rng_state, device)
    return rng_state
