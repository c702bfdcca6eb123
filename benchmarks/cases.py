"""What is measured: operations, shapes, inputs, and what the mathematics costs at least."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from psm_kernels.memory_bank import MemoryBank, unit_rows

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Products of 2 B K D operations that cannot be avoided: similarity, gradient, mining where the key
# mines and not the query.
PRODUCTS = {
    "psm_forward": 2,
    "psm": 3,
    "info_nce": 2,
    "hcl": 2,
    "sscl": 2,
    "unremix": 2,
    "bank_topk": 1,
    "enqueue": 0,
}
BANKS = ("random", "clustered", "sorted", "duplicated")


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
    def flops(self) -> float:
        return 2.0 * PRODUCTS[self.operation] * self.batch * self.size * self.dim

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

    @property
    def bank(self) -> Tensor:  # (K, D)
        return self.memory.bank


def make_problem(case: Case, device: str) -> Problem:
    generator = torch.Generator(device).manual_seed(0)

    def rows(count: int) -> Tensor:
        return torch.randn(count, case.dim, generator=generator, device=device)

    query = rows(case.batch)
    key = query + 0.5 * rows(case.batch)
    memory = MemoryBank(case.size, case.dim, dtype=DTYPES[case.dtype], device=device)
    if case.bank == "clustered":
        which = torch.randint(100, (case.size,), generator=generator, device=device)
        memory.enqueue(rows(100)[which] + 0.3 * rows(case.size))
    elif case.bank == "duplicated":
        memory.enqueue(rows(-(-case.size // 16)).repeat(16, 1)[: case.size])
    elif case.bank == "sorted":  # the best slot last: the worst order for a running maximum
        found = unit_rows(rows(case.size))
        memory.enqueue(found[(found @ unit_rows(key)[0]).argsort()])
    else:
        for start in range(0, case.size, 65_536):  # at once would need the bank's memory four times
            memory.enqueue(rows(min(65_536, case.size - start)))
    rng_state = torch.tensor([1, 2], device=device)
    return Problem(case, query.requires_grad_(), key, memory, rng_state)


# --- which cases ---------------------------------------------------------------------------------


def default_cases(device: str) -> list[Case]:
    """What a plain `pytest benchmarks/` runs: MoCo's and PSM's bank, and small ones, where a plain
    product may win. Shapes of a GPU are larger."""
    big = 65_536 if device == "cpu" else 262_144
    cases = [
        Case("psm_forward", 256, 16_384, 128, 5),
        Case("psm", 64, 1_024, 128, 5),
        Case("psm", 256, 16_384, 128, 5),
        Case("psm", 256, big, 128, 5),
        Case("psm", 256, big, 128, 5, "bf16"),
        Case("info_nce", 64, 1_024, 128),
        Case("info_nce", 256, 16_384, 128),
        Case("info_nce", 256, big, 128),
        Case("hcl", 256, 16_384, 128),
        Case("sscl", 256, 16_384, 128, 32),
        Case("unremix", 256, 16_384, 128),
        Case("bank_topk", 64, 1_024, 128, 5),
        Case("bank_topk", 256, 65_536, 128, 5),
        Case("bank_topk", 1_000, 50_000, 512, 200),  # kNN evaluation
        Case("enqueue", 256, 65_536, 128),
        Case("enqueue", 256, 65_536, 128, 0, "bf16"),
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


def sweep_cases(name: str) -> Iterator[Case]:
    """One variable at a time around (256, 65536, 128, 5)."""
    base = Case("psm", 256, 65_536, 128, 5)
    if name == "K":
        for power in range(12, 25, 2):
            for operation, topk in (("psm", 5), ("info_nce", 0), ("bank_topk", 5)):
                yield Case(operation, 256, 1 << power, 128, topk, "fp32")
    elif name == "B":
        yield from (dataclasses.replace(base, batch=1 << power) for power in range(6, 13))
    elif name == "D":
        yield from (dataclasses.replace(base, dim=1 << power) for power in range(6, 11))
    elif name == "k":
        for topk in (0, 1, 5, 16, 32, 64):
            yield dataclasses.replace(base, topk=topk)
            if topk:
                yield Case("bank_topk", 256, 65_536, 128, topk)
    else:
        for kind in BANKS:
            yield dataclasses.replace(base, bank=kind)
            yield Case("bank_topk", 256, 65_536, 128, 5, bank=kind)


def tiny(case: Case) -> Case:
    """The same kind of work in milliseconds: does everything run?"""
    topk = min(case.topk, 16)
    return dataclasses.replace(case, batch=min(case.batch, 16), size=512, dim=64, topk=topk)
