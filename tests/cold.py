"""Problems at low temperatures whose mined rows are the largest terms by far, and their answers.

Entries are +-1/8 at D = 64: unit rows that are exact in every dtype, as are their products, so that
the rounding of inputs hides nothing. The answers are float64, written anew from the formulas.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from psm_kernels import noise
from psm_kernels.backends.base import NOTHING, Backend
from psm_kernels.options import PSMOptions

DIM = 64
TEMPERATURES = [0.2, 0.05, 0.03, 0.02, 0.01]
RNG_STATE = torch.tensor([2**40 + 7, 5])
# relative to the largest entry: of the loss, of the gradient
TOLERANCE = {
    torch.float32: (1e-4, 1e-3),
    torch.bfloat16: (1e-3, 2e-2),
    torch.float16: (1e-3, 5e-3),
}


class Problem(NamedTuple):
    query: Tensor  # (B, D) fp32 unit rows
    key: Tensor  # (B, D)
    bank: Tensor  # (K, D) fp32, exact in 16 bits


def flipped(row: Tensor, places: Tensor) -> Tensor:
    """Row (D,) with the signs at some places turned: similarity 1 - len / 32 to it."""
    row = row.clone()
    row[places] *= -1
    return row


def problem(*, batch: int = 6, size: int = 700, nearer: bool = True, seed: int = 0) -> Problem:
    """Each query's positive has similarity 0.5. Its five mined rows are 0.09 to 0.41 nearer to it,
    or farther by 0.06 to 0.19; all else is random."""
    g = torch.Generator().manual_seed(seed)
    query, bank = (
        (torch.randint(0, 2, (n, DIM), generator=g) * 2.0 - 1) / 8 for n in (batch, size)
    )
    order = torch.randperm(size, generator=g).tolist()
    key = query.clone()
    for i in range(batch):
        places = torch.randperm(DIM, generator=g)
        away, others = places[:16], places[16:]
        key[i] = flipped(query[i], away)
        for n in (3, 5, 8, 11, 13) if nearer else (1, 2, 2, 3, 3):
            place = away[:n] if nearer else torch.cat((away, others[:n]))
            others = others[n:]
            bank[order.pop()] = flipped(query[i], place)
    return Problem(query, key, bank)


def answer(
    p: Problem,
    *,
    temperature: float,
    topk: int = 5,
    selection: str = "bernoulli",
    soft_weights: str = "attention",
    a: float = 0.5,
    b: float = 0.0,
    hard_weight: float = 1.0,
    unseen: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """PSM's loss rows (B,) and the gradient of their sum by the query (B, D), in float64.
    `unseen` (B, K) bool: slots that a row does not see."""
    query, key, bank = (x.double() for x in p)
    query = query.requires_grad_()
    unit = query / query.norm(dim=1, keepdim=True)
    s, s_pos = unit @ bank.T, (unit * key).sum(1)
    unseen = torch.zeros_like(s, dtype=torch.bool) if unseen is None else unseen

    found = (~unseen).sum(1).clamp_max(topk)
    near = (key @ bank.T).masked_fill(unseen, -torch.inf)
    index = near.sort(dim=1, descending=True, stable=True).indices[:, :topk]
    there = torch.arange(index.shape[1]) < found[:, None]
    mined = torch.zeros_like(unseen).scatter_(1, index, there)

    p_keep = torch.exp(-a * (s - s_pos[:, None] - b).square()).clamp_max(0.999).detach()
    rows, slots = torch.arange(len(query)), torch.arange(len(bank))
    words = noise.philox_words(rows, slots, RNG_STATE)
    drawn = words < (p_keep.float().double() * 2.0**32).long()
    weight = {"bernoulli": drawn.double(), "expected": p_keep, "all": torch.ones_like(s)}[selection]
    weight = weight * ~(mined | unseen)
    # All exponents are relative to the largest logit of a row: nothing overflows.
    top = torch.maximum(s.amax(1), s_pos).detach()
    e = torch.exp((s - top[:, None]) / temperature)
    plus = (s_pos - top) / temperature
    n = (weight * e).sum(1)
    h = plus.exp() + n
    log_z = torch.log(h + (mined * e).sum(1))

    logits = (s.gather(1, index) - top[:, None]) / temperature
    if soft_weights == "attention":
        w = s.gather(1, index).masked_fill(~there, -1e30).softmax(1) * there
    else:
        w = there.double() if soft_weights == "binary" else there / found[:, None].clamp_min(1)
    soft = log_z - plus + (w * (log_z[:, None] - logits)).sum(1)
    loss = soft + hard_weight * (h.log() - plus)
    (gradient,) = torch.autograd.grad(loss.sum(), query)
    return loss.detach(), gradient


def step(backend: Backend, p: Problem, dtype: torch.dtype, **settings) -> tuple[Tensor, Tensor]:
    """Loss rows (B,) and the gradient of their sum (B, D) by a backend's own step."""
    bank, options = p.bank.to(dtype), PSMOptions(reduction="none", **settings)
    return backend.psm_step(
        p.query, p.key, bank, torch.tensor(len(bank)), options, NOTHING, RNG_STATE
    )


def assert_step(
    got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], dtype: torch.dtype
) -> None:
    for name, a, b, tolerance in zip(
        ("loss", "gradient"), got, want, TOLERANCE[dtype], strict=True
    ):
        assert_close(name, a, b, tolerance)


def assert_close(name: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    """Each row within `tolerance` of its largest entry."""
    got, want = (x.detach().double().cpu().reshape(len(want), -1) for x in (got, want))
    worst = ((got - want).abs().amax(1) / want.abs().amax(1).clamp_min(1e-30)).max()
    assert worst <= tolerance, f"{name}: off by {worst:.2e} of its size, wanted {tolerance:.0e}"
