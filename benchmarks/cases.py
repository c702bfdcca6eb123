"""What is measured: operations, shapes, inputs, and what the mathematics costs at least."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from psm_kernels import MemoryBank
from psm_kernels.rows import unit_rows

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Products of 2 B K D operations that cannot be avoided: similarity, gradient, and that of the key
# where it mines or is the target.
PRODUCTS = {
    "psm_forward": 2,
    "psm": 3,
    "info_nce": 2,
    "hcl": 2,
    "sscl": 2,
    "unremix": 2,
    "nnclr": 1,
    "supcon": 2,
    "ressl": 3,
    "msf": 1,
    "bank_topk": 1,
    "enqueue": 0,
}
CLASSES = 100
BANKS = ("random", "clustered", "sorted", "duplicated", "collapsed")


@dataclasses.dataclass(frozen=True)
class Case:
    operation: str
    batch: int
    size: int
    dim: int
    topk: int = 0
    dtype: str = "fp32"
    bank: str = "random"

    def __str__(self) -> str:
        kind = "" if self.bank == "random" else f"-{self.bank}"
        k = f"-k{self.topk}" if self.topk else ""
        return f"{self.operation}-B{self.batch}-K{self.size}-D{self.dim}{k}-{self.dtype}{kind}"

    @property
    def elements(self) -> int:
        """What time grows with."""
        return self.batch * self.size * self.dim

    @property
    def flops(self) -> float:
        return 2.0 * PRODUCTS[self.operation] * self.elements

    @property
    def bank_bytes(self) -> int:
        return self.size * self.dim * DTYPES[self.dtype].itemsize

    @property
    def traffic(self) -> float:
        """Bytes at least: the bank read once; of an enqueue the keys read and their slots written.
        A float, so that it can be divided by a rate."""
        if self.operation == "enqueue":
            return self.batch * self.dim * (4.0 + DTYPES[self.dtype].itemsize)
        return float(self.bank_bytes)


@dataclasses.dataclass
class Problem:
    """The inputs of a case: the only set-up there is, for time and for memory."""

    case: Case
    query: Tensor  # (B, D) fp32, carries gradient
    key: Tensor  # (B, D) fp32
    memory: MemoryBank
    rng_state: Tensor  # (2,)
    labels: Tensor  # (B,) int64
    bank_labels: Tensor  # (K,) int64

    @property
    def bank(self) -> Tensor:  # (K, D)
        return self.memory.bank


def make_problem(case: Case, device: str) -> Problem:
    inputs = _inputs(dataclasses.replace(case, operation="", topk=0), device)
    labels = (torch.arange(n, device=device) % CLASSES for n in (case.batch, case.size))
    return Problem(case, *inputs, *labels)


@functools.lru_cache(1)  # three operations want the same bank of 16 M rows
def _inputs(case: Case, device: str) -> tuple[Tensor, Tensor, MemoryBank, Tensor]:
    generator = torch.Generator(device).manual_seed(0)

    def rows(count: int) -> Tensor:
        return torch.randn(count, case.dim, generator=generator, device=device)

    def some(centers: Tensor, count: int) -> Tensor:
        which = torch.randint(len(centers), (count,), generator=generator, device=device)
        return centers[which] + 0.3 * rows(count)

    memory = MemoryBank(case.size, case.dim, dtype=DTYPES[case.dtype], device=device)
    query = rows(case.batch)
    if case.bank == "clustered":  # a hundred slots in ten thousand are nearly as good as the best
        centers = rows(100)
        query = some(centers, case.batch)
        memory.enqueue(some(centers, case.size))
    elif case.bank == "sorted":  # all rows look one way and each slot is better than those before
        axis = 10 * rows(1)
        query = axis + rows(case.batch)
        found = unit_rows(rows(case.size))
        memory.enqueue(found[(found @ axis[0]).argsort()])
    elif case.bank == "duplicated":  # each row sixteen times
        memory.enqueue(rows(-(-case.size // 16)).repeat(16, 1)[: case.size])
    elif case.bank == "collapsed":  # one row: nothing tells the best slot from another
        memory.enqueue(rows(1).expand(case.size, -1))
    else:  # drawing 16 M rows takes more than a minute: a part, and the same with rotated columns
        drawn = unit_rows(rows(min(case.size, 262_144)))
        for turn, part in enumerate(memory.bank.split(len(drawn))):
            part.copy_(drawn.roll(turn, 1)[: len(part)])
        memory.count.fill_(case.size)
    key = query + 0.5 * rows(case.batch)
    return query.requires_grad_(), key, memory, torch.tensor([1, 2], device=device)


# --- which cases ---------------------------------------------------------------------------------


def default_cases(device: str) -> list[Case]:
    """What a plain `pytest benchmarks/` runs: MoCo's and PSM's bank, and small ones, where a plain
    product may win. Shapes of a GPU are larger."""
    big = 65_536 if device == "cpu" else 262_144
    cases = [
        Case("psm_forward", 256, big, 128, 5),
        Case("psm", 64, 1_024, 128, 5),
        Case("psm", 256, 16_384, 128, 5),
        Case("psm", 256, big, 128, 5),
        Case("psm", 256, big, 128, 5, "bf16"),
        Case("info_nce", 1, 256, 128),
        Case("info_nce", 64, 1_024, 128),
        Case("info_nce", 256, big, 128),
        Case("hcl", 256, big, 128),
        Case("sscl", 256, big, 128, 32),
        Case("unremix", 256, big, 128),
        Case("nnclr", 256, big, 128),
        Case("supcon", 256, big, 128),
        Case("ressl", 256, big, 128),
        Case("msf", 256, big, 128, 5),
        Case("bank_topk", 1, big, 128, 5),
        Case("bank_topk", 64, 1_024, 128, 5),
        Case("bank_topk", 256, big, 128, 5),
        Case("bank_topk", 1_000, 50_000, 512, 200),  # kNN evaluation
        Case("enqueue", 16, 1_024, 128),
        Case("enqueue", 256, big, 128),
        Case("enqueue", 256, big, 128, 0, "bf16"),
    ]
    if device != "cpu":
        cases += [
            Case("psm", 1_024, 1 << 20, 128, 5, "bf16"),
            Case("psm", 256, big, 128, 5, "fp16"),
            Case("info_nce", 256, big, 128, 0, "bf16"),
            Case("bank_topk", 256, big, 128, 5, "bf16"),
        ]
    return cases


SWEEPS = ("K", "B", "D", "k", "bank")


def sweep_cases(names: list[str]) -> list[Case]:
    """One variable at a time around (256, 65536, 128, 5). The smallest first: they tell how long
    the larger ones would take, and those are lost when the time is over."""
    found = dict.fromkeys(case for name in names for case in _sweep(name))
    return sorted(found, key=lambda case: (case.elements, case.bank, case.dim))


def _sweep(name: str) -> Iterator[Case]:
    base, topk = Case("psm", 256, 65_536, 128, 5), Case("bank_topk", 256, 65_536, 128, 5)
    if name == "K":
        for power in range(12, 25, 2):
            for case in (base, Case("info_nce", 256, 65_536, 128), topk):
                yield dataclasses.replace(case, size=1 << power)
    elif name == "B":
        yield from (dataclasses.replace(base, batch=1 << power) for power in range(6, 13))
    elif name == "D":
        yield from (dataclasses.replace(base, dim=1 << power) for power in range(6, 11))
    elif name == "k":
        yield dataclasses.replace(base, topk=0)
        for k in (1, 5, 16, 32, 64):
            yield dataclasses.replace(base, topk=k)
            yield dataclasses.replace(topk, topk=k)
    else:
        for kind in BANKS:
            yield dataclasses.replace(base, bank=kind)
            yield dataclasses.replace(topk, bank=kind)


def tiny(case: Case) -> Case:
    """The same kind of work in milliseconds: does everything run?"""
    topk = min(case.topk, 16)
    return dataclasses.replace(case, batch=min(case.batch, 16), size=512, dim=64, topk=topk)
