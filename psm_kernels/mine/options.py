"""What `mine_negatives` is told and what it gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from psm_kernels import checks


class MinedNegatives(NamedTuple):
    similarity: Tensor  # (Q, n) fp32; missing: -inf
    index: Tensor  # (Q, n) int64 rows of the corpus; missing: -1


@dataclass(frozen=True, kw_only=True)
class MiningOptions:
    """See `mine_negatives`."""

    max_similarity: float | None = None
    margin: float | None = None
    sample: str | None = None
    num: int | None = None
    a: float = 0.5
    b: float = 0.0
    seed: int = 0
    normalize: bool = True
    chunk: int | None = None

    def __post_init__(self):
        for name in ("max_similarity", "margin"):
            if getattr(self, name) is not None:
                checks.check_number(name, getattr(self, name))
        if self.sample is None and self.num is not None:
            raise ValueError(f'num: got {self.num!r} without a sample, wanted sample="simans"')
        if self.sample is not None:
            checks.check_option("sample", self.sample, ("simans",))
            checks.check_int("num", self.num, 1)
        checks.check_number("a", self.a, least=0)
        checks.check_number("b", self.b)
        checks.check_int("seed", self.seed, -(2**63), 2**63 - 1)
        checks.check_option("normalize", self.normalize, (False, True))
        if self.chunk is not None:
            checks.check_int("chunk", self.chunk, 1)

    @property
    def relative(self) -> str | None:
        """The setting that wants every query's positive."""
        return "margin" if self.margin is not None else self.sample and "sample"
