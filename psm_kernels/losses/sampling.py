"""PSM's positives and negatives of a batch, and how negatives are sampled beside a pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from psm_kernels import noise
from psm_kernels.options import PSMOptions


class Positives(NamedTuple):
    logits: Tensor  # (B, 1 + k) s/tau of the key, then of the mined rows; missing: -inf
    rows: Tensor  # (B, k, D) the mined rows; missing: 0
    index: Tensor  # (B, k) their slots; missing: -1


class Negatives(NamedTuple):
    log_sum: Tensor  # (B,) log sum keep exp(s/tau), mined positives not among them
    log_sq: Tensor  # (B,) log sum keep exp(2 s/tau)
    count: Tensor  # (B,) sum keep
    candidates: Tensor  # (B,) how many there were to keep, hidden slots of a bank among them


class Sampling(NamedTuple):
    """How PSM's negatives are selected where a loss does it itself."""

    options: PSMOptions
    rng_state: Tensor | None
    row_offset: int

    def weights(
        self,
        similarity: Tensor,  # (B, S)
        s_pos: Tensor,  # (B,)
        slots: Tensor,  # (S,) or (B, S)
        stream: noise.Stream = noise.Stream.PASS,
    ) -> Tensor:
        """keep (B, S), detached."""
        o, words = self.options, None
        if o.selection == "bernoulli":
            rows = torch.arange(len(s_pos), device=slots.device)[:, None] + self.row_offset
            words = noise.philox_words(rows, slots, noise.stream_state(self.rng_state, stream))
        given, s_pos = similarity.detach(), s_pos.detach()[:, None]
        return noise.keep_weight(given, s_pos, words, o.selection, o.a, o.b)

    def sums(
        self,
        similarity: Tensor,  # (R, S)
        candidate: Tensor,  # (R, S) bool
        s_pos: Tensor,  # (R,)
        stream: noise.Stream,
    ) -> Negatives:
        slots = torch.arange(similarity.shape[1], device=similarity.device)
        keep = self.weights(similarity, s_pos, slots, stream) * candidate
        scaled = similarity / self.options.temperature
        logits = torch.where(keep > 0, scaled + keep.log(), -torch.inf)
        return Negatives(
            torch.logsumexp(logits, 1),
            torch.logsumexp(logits + scaled, 1).detach(),
            keep.sum(1),
            candidate.sum(1).to(similarity.dtype),
        )
