"""Backend `cpp`: hands addresses of tensors to psm_kernels._C. The kernels are in csrc/cpu."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch import Tensor

from psm_kernels.backends import compiled
from psm_kernels.backends.base import NOTHING, Exclude
from psm_kernels.backends.compiled import Compiled, pass_struct
from psm_kernels.options import PassOptions


class Cpp(Compiled):
    name = "cpp"
    what = "C++ kernels: AVX-512, AVX2, portable"
    devices = ("cpu",)
    max_dim = max_topk_dim = 4096
    max_step_topk = 1024

    def unavailable(self) -> str | None:
        return compiled.unavailable()

    def notes(self) -> list[str]:
        if self.unavailable():
            return []
        from psm_kernels import _C

        isa = instruction_set()
        why = "set by PSM_CPU_ISA" if os.environ.get("PSM_CPU_ISA") else _C.processor().why
        tiles = f"tiles for {_C.l2_bytes() >> 10} KB of L2"
        return [f"cpp: {isa} ({why}): {_C.products(isa)}, {tiles}"]

    def run(self, function: str, args: Any, bank: Tensor) -> None:
        from psm_kernels import _C

        getattr(_C, function)(args, instruction_set(), torch.get_num_threads())

    def row_ranges(
        self, query: Tensor, bank: Tensor, count: Tensor, temperature: float,
        exclude: Exclude = NOTHING,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        options = pass_struct(PassOptions(temperature, topk=1))
        s_pos = query.new_empty(len(query), dtype=torch.float32)  # not read
        found = self._pass(
            options, query, -query, bank, count, exclude, mean=False, s_pos=s_pos.data_ptr()
        )
        return found.neg_lse, -found.topk_sim[:, 0]


def instruction_set() -> str:
    """PSM_CPU_ISA, or what is fastest on this processor: by the table in
    csrc/cpu/driver/processor.cpp, else by a measurement of some milliseconds at first use.

    It decides the last bits of a result and, of a bf16 bank, whether the weights of its mean are
    rounded to bf16. Equal processors of the table give equal bits; on others, set PSM_CPU_ISA.

    Raises:
        ValueError: PSM_CPU_ISA names none that this machine runs.
    """
    return _instruction_set(os.environ.get("PSM_CPU_ISA"))


@functools.cache
def _instruction_set(forced: str | None) -> str:
    from psm_kernels import _C

    if not forced:
        return _C.processor().isa
    able = _C.instruction_sets()
    if forced in able:
        return forced
    raise ValueError(f"PSM_CPU_ISA: got {forced!r}, wanted one that this machine runs: {able}")
