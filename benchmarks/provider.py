"""What a provider is: who does the work of a case.

It says why it sits out a case, or makes from a problem a function without arguments that does the
work once and returns the loss (or the top-k similarities), so that all can be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import eager
from benchmarks.cases import Case, Problem
from benchmarks.measure import available_memory

Run = Callable[[], Tensor]
OTHER_JOB = "does another job"  # of a provider that was never meant for the operation


class Provider(NamedTuple):
    what: str
    refuse: Callable[[Case, str], str | None]  # (case, device) -> why not
    make: Callable[[Problem], Run]
    same_job: bool = True  # False: a yardstick, not a competitor


def step(p: Problem, loss: Callable[[], Tensor]) -> Run:
    """Forward alone or with the gradient of the queries, as the operation has it."""
    if p.case.operation == "psm_forward":
        return torch.no_grad()(loss)

    def run():
        p.query.grad = None
        value = loss()
        value.backward()
        return value.detach()

    return run


def refuse_matrices(case: Case, device: str) -> str | None:
    wanted = 4.0 * eager.MATRICES.get(case.operation, 0) * case.batch * case.size
    left = 0.8 * available_memory(device)
    if wanted > left:
        return f"would take {wanted / 1e9:.1f} GB of {left / 1e9:.1f} GB that are free"
    return None
