"""The best slots of a bank that are not too near, from top-k lists alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from psm_kernels.backends.base import Exclude
from psm_kernels.bank.collectives import merge_topk

Lists = tuple[Tensor, Tensor]  # similarity (B, k), index (B, k); missing: -inf, -1
TopK = Callable[[Tensor, Tensor, int, Exclude], Lists]  # of query, bank, k and what is hidden

LONGEST = 1024  # list that is asked for where a limit hides what is best


def topk_within(
    topk: TopK,
    query: Tensor,
    bank: Tensor,
    k: int,
    limit: Tensor | None,
    hidden: Exclude,
    asked: int | None = None,
) -> Lists:
    """The k best slots of a bank with similarity <= limit (B,), exactly; None: no limit.

    Of lists of `asked`, by default k, which hold what is above the limit too, and first. Rows whose
    list is full without k below it are asked for again: a list of twice the length, from LONGEST on
    both halves of the bank.
    """
    if limit is None:
        return topk(query, bank, k, hidden)
    asked = asked or k
    similarity, index = topk(query, bank, asked, hidden)
    above = (similarity > limit[:, None]).sum(1)
    short = (above + k > asked) & (similarity[:, -1] > -torch.inf)
    columns = above[:, None] + torch.arange(k, device=above.device)
    beyond = columns >= asked
    columns = columns.clamp_max(asked - 1)
    similarity = similarity.gather(1, columns).masked_fill(beyond, -torch.inf)
    index = index.gather(1, columns).masked_fill(beyond, -1)
    rows = short.nonzero()[:, 0]
    if len(rows) and asked < len(bank):
        query, limit, hidden = query[rows], limit[rows], _of_rows(hidden, rows)
        if 2 * asked <= LONGEST:
            again = topk_within(topk, query, bank, k, limit, hidden, 2 * asked)
        else:
            middle, halves = len(bank) // 2, []
            for start, stop in ((0, middle), (middle, len(bank))):
                of_half = bank[start:stop], k, limit, _of_slots(hidden, start, stop), asked
                found, slots = topk_within(topk, query, *of_half)
                halves.append((found, torch.where(slots < 0, -1, slots + start)))
            again = merge_topk(*map(torch.stack, zip(*halves, strict=True)))
        similarity[rows], index[rows] = again
    return similarity, index


def _of_rows(hidden: Exclude, rows: Tensor) -> Exclude:
    slots, ids = (None if x is None else x[rows] for x in hidden[:2])
    return Exclude(slots, ids, hidden.bank_ids)


def _of_slots(hidden: Exclude, start: int, stop: int) -> Exclude:
    slots = None if hidden.slots is None else hidden.slots - start
    bank_ids = None if hidden.bank_ids is None else hidden.bank_ids[start:stop]
    return Exclude(slots, hidden.ids, bank_ids)
