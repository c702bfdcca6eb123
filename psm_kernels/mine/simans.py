"""SimANS, a sample of what was mined (arXiv 2210.11773, eq. 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from psm_kernels import noise
from psm_kernels.mine.options import MinedNegatives, MiningOptions


def draw(
    found: MinedNegatives, s_pos: Tensor, options: MiningOptions, first: int = 0
) -> MinedNegatives:
    """`num` different ones of each row, in the order of the draw; those of query `first` and of
    the ones after it, with similarities s_pos (B,) to their positives.

    With probability proportional to exp(-a (s - s+ - b)^2) and without replacement: the largest of
    log weight + Gumbel noise (Gumbel top-k, arXiv 1903.06059).
    """
    o, (similarity, index) = options, found
    state = torch.tensor([o.seed, 0], device=index.device)
    query = torch.arange(first, first + len(index), device=index.device)[:, None]
    state = noise.stream_state(state, noise.Stream.MINE)
    words = noise.philox_words(query, index.clamp_min(0), state)
    uniform = (words.double() + 0.5) / 2.0**32  # never 0 or 1
    distance = similarity.double() - s_pos[:, None].double() - o.b
    key = -o.a * distance.square() - torch.log(-torch.log(uniform))
    key = key.masked_fill(index < 0, -torch.inf)
    order = key.sort(dim=1, descending=True, stable=True).indices[:, : o.num]
    return MinedNegatives(similarity.gather(1, order), index.gather(1, order))
