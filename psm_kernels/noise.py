"""Canonical noise: one 32-bit word per (row, slot), the same on every backend and world size.

Philox4x32-10 (Salmon et al., SC 2011; Random123) keyed by the seed. The four words of one counter
go to slots 16 n + 2 c + {0, 1, 8, 9}: the elements that one thread of a tensor-core accumulator
owns, so that a GPU kernel wastes no output and moves none between threads.
"""

from __future__ import annotations

import enum

import torch
from torch import Tensor

P_MAX = 0.999  # cap of the keep probability (dhkdhk/PSM, src/model/psm.py)

_M0, _M1 = 0xD2511F53, 0xCD9E8D57  # round multipliers
_W0, _W1 = 0x9E3779B9, 0xBB67AE85  # key increments
_MASK = 0xFFFFFFFF


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]):
    """Philox4x32-10. Tensors are int64 holding uint32 values and broadcast; four words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # Products wrap modulo 2^64, which keeps bits 32..63: shift, drop the sign's copies.
        product0, product1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _MASK) ^ c1 ^ k0,
            product1 & _MASK,
            ((product0 >> 32) & _MASK) ^ c3 ^ k1,
            product0 & _MASK,
        )
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def _philox_at(rows: Tensor, counters: Tensor, rng_state: Tensor) -> tuple[Tensor, ...]:
    seed, offset = rng_state[0], rng_state[1]
    key = (seed & _MASK, (seed >> 32) & _MASK)
    counter = (counters & _MASK, rows & _MASK, offset & _MASK, (offset >> 32) & _MASK)
    return philox4x32(counter, key)


def philox_words(rows: Tensor, slots: Tensor, rng_state: Tensor) -> Tensor:
    """Noise words of the given rows and slots.

    Args:
        rows: int64 global row indices. With `slots` both one-dimensional, (R,) and (S,) give the
            words of every pair (R, S); otherwise the two are broadcast against each other.
        slots: int64 global slot indices.
        rng_state: int64 (2,), [seed, offset].

    Returns:
        int64 in [0, 2^32).
    """
    if rows.ndim == 1 and slots.ndim == 1:
        rows = rows[:, None]
    counters = 4 * (slots // 16) + slots % 8 // 2
    words = torch.stack(torch.broadcast_tensors(*_philox_at(rows, counters, rng_state)), -1)
    lane = 2 * (slots % 16 // 8) + slots % 2
    return words.gather(-1, lane.expand(words.shape[:-1])[..., None])[..., 0]


def philox_block(row: int, rows: int, slots: int, slot: int, rng_state: Tensor) -> Tensor:
    """Words of `rows` rows from `row` and `slots` slots from `slot` on, (rows, slots) int64.

    A quarter of the work of `philox_words`, because all four words of a counter are used.
    """
    device = rng_state.device
    first = slot // 16
    groups = (slot + slots + 15) // 16 - first
    counters = torch.arange(4 * first, 4 * (first + groups), device=device)
    row_index = torch.arange(row, row + rows, device=device)[:, None]
    words = torch.stack(_philox_at(row_index, counters, rng_state), -1)  # (rows, 4 groups, 4)
    # Slot 16 n + 8 hi + 2 c + lo takes word 2 hi + lo of counter 4 n + c.
    words = words.view(rows, groups, 4, 2, 2).transpose(2, 3).reshape(rows, 16 * groups)
    return words[:, slot - 16 * first :][:, :slots]


def keep_probability(similarity: Tensor, s_pos: Tensor, a: float, b: float) -> Tensor:
    """PNSM's chance to keep a negative: exp(-a (s - s_pos - b)^2), capped at 0.999."""
    return torch.exp(-a * (similarity - s_pos - b).square()).clamp_max(P_MAX)


def keep_weight(
    similarity: Tensor, s_pos: Tensor, words: Tensor | None, selection: str, a: float, b: float
) -> Tensor:
    """Weight of each negative under `selection`; `words` serve "bernoulli" alone.

    Bernoulli keeps where word < floor(p 2^32), with p in fp32 so that the scaling is exact.
    """
    if selection == "all":
        return torch.ones_like(similarity)
    p = keep_probability(similarity, s_pos, a, b)
    if selection == "expected":
        return p
    return (words < (p.float().double() * 2.0**32).long()).to(similarity.dtype)


class Stream(enum.IntEnum):
    """Noise of its own for what samples beside a pass over a bank."""

    PASS = 0
    SOFT = 1  # PSM's negatives="neighbors": the soft term, the hard term
    HARD = 2
    MIX = 3  # SSCL's synthetic negatives
    MINE = 4  # mine_negatives: which of the mined rows are drawn


def stream_state(rng_state: Tensor, stream: Stream) -> Tensor:
    """The state of a stream: its number added to the offset's high half."""
    if stream is Stream.PASS:
        return rng_state
    return torch.stack((rng_state[0], rng_state[1] + (int(stream) << 32)))
