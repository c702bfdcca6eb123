"""The strong competitor: no kernel of one's own, and still no B x K matrix.

A product into a slab of at most 8 MB, pointwise work that torch.compile fuses, `torch.topk` of the
slab, and a merge. A user can write this in an afternoon.
"""

from __future__ import annotations

import functools

import torch

from psm_kernels.backends.base import NOTHING, Backend, BankPass
from psm_kernels.noise import keep_probability

SLAB = 8 << 20  # bytes; 2 to 32 MB are as fast, smaller ones are slower to mine


@functools.cache
def _weigh(selection: str):
    def weigh(scores, noise, s_pos, temperature, a, b):  # scores, noise (B, S)
        logits = scores / temperature
        if selection == "bernoulli":
            p = keep_probability(scores, s_pos[:, None], a, b)
            logits = torch.where(noise < p, logits, -torch.inf)
        top = logits.amax(1, keepdim=True).clamp_min(-1e30)
        weights = torch.exp(logits - top)
        kept = (weights > 0).sum(1).float()
        return weights, top[:, 0], weights.sum(1), weights.square().sum(1), kept

    return torch.compile(weigh, dynamic=False)


class Slab(Backend):
    """Keeps no order among equal similarities and samples by torch's generator."""

    name, what = "slab", "slabs of 8 MB, fused pointwise"

    def bank_pass(self, query, key, bank, count, s_pos, options, exclude=NOTHING, rng_state=None):
        o, weigh = options, _weigh(options.selection)
        mined = self.bank_topk(query if key is None else key, bank, o.topk, count)
        parts, start = [], 0
        for rows in bank.split(_rows(len(query))):
            scores = (query @ rows.T).float()
            if o.exclude_mined:
                local = mined[1] - start
                row, place = ((local >= 0) & (local < len(rows))).nonzero(as_tuple=True)
                scores[row, local[row, place]] = -torch.inf
            start += len(rows)
            # Drawn out here: Inductor's own generator is several times slower on a CPU.
            noise = torch.rand_like(scores) if o.selection == "bernoulli" else None
            weights, *sums = weigh(scores, noise, s_pos, o.temperature, o.a, o.b)
            parts.append((*sums, (weights.to(bank.dtype) @ rows).float()))
        top, total, squares, kept, mean = (torch.stack(part) for part in zip(*parts, strict=True))
        shift = top.amax(0)
        scale = torch.exp(top - shift)  # (slabs, B)
        total = (total * scale).sum(0)
        return BankPass(
            shift + total.log(),
            (mean * scale[..., None]).sum(0) / total[:, None],
            2 * shift + (squares * scale.square()).sum(0).log(),
            kept.sum(0),
            *mined,
        )

    def bank_topk(self, query, bank, k, count, exclude=NOTHING):
        if k == 0:
            empty = query.new_empty((len(query), 0), dtype=torch.float32)
            return empty, empty.long()
        start, best, where = 0, [], []
        for rows in bank.split(_rows(len(query))):
            found = (query @ rows.T).float().topk(min(k, len(rows)), 1)
            best.append(found.values)
            where.append(found.indices + start)
            start += len(rows)
        found = torch.cat(best, 1).topk(k, 1)
        return found.values, torch.cat(where, 1).gather(1, found.indices)


def _rows(batch: int) -> int:
    return max(1, SLAB // (4 * batch))
