"""Who does the work: our backends, the baselines, and the other libraries of peers.py."""

from __future__ import annotations

import copy
import functools

import torch
from torch import Tensor

from benchmarks import eager
from benchmarks.cases import DTYPES, Case, Problem
from benchmarks.measure import available_memory
from benchmarks.peers import PEERS
from benchmarks.provider import OTHER_JOB, Provider, Run, refuse_matrices, step
from benchmarks.slab import Slab
from psm_kernels import functional, ops
from psm_kernels.backends import registry
from psm_kernels.backends.base import Backend

# --- ours ----------------------------------------------------------------------------------------


def our_loss(p: Problem, backend: str | Backend, **more) -> Tensor:
    name = p.case.operation.removesuffix("_forward")
    settings = {
        "psm": {"topk": p.case.topk, "rng_state": p.rng_state},
        "sscl": {"num_hard": p.case.topk, "rng_state": p.rng_state},
        "msf": {"topk": p.case.topk},
        "supcon": {"labels": p.labels, "bank_labels": p.bank_labels},
    }.get(name, {})
    loss = getattr(functional, f"{name}_loss")
    return loss(p.query, p.key, p.bank, backend=backend, **settings, **more)


def make_on(p: Problem, backend: str | Backend) -> Run:
    if p.case.operation == "bank_topk":
        return lambda: ops.bank_topk(p.query, p.bank, p.case.topk, backend=backend)[0]
    return step(p, lambda: our_loss(p, backend))


def ours(backend: str) -> Provider:
    table = registry.TABLE[backend]

    def refuse(case: Case, device: str) -> str | None:
        if table.devices is not None and device not in table.devices:
            return OTHER_JOB
        if (backend, device) == ("triton", "cpu"):
            return f"runs on {device} in tests alone"
        sums = case.operation != "bank_topk"
        reason = table.supports(device, DTYPES[case.dtype], case.dim, case.topk, sums=sums)
        if reason:
            return reason
        if case.operation == "enqueue" and backend != our_name(device):
            return "the enqueue is the same for every backend"
        return None

    def make(p: Problem) -> Run:
        if p.case.operation == "enqueue":
            memory = copy.deepcopy(p.memory)  # other cases read this bank
            return lambda: memory.enqueue(p.key)
        return make_on(p, backend)

    return Provider(f"psm_kernels, {table.what}", refuse, make)


def our_name(device: str) -> str:
    """The backend that `auto` picks."""
    probe = torch.empty(1, 128, device=device)
    return registry.choose("auto", probe).name


# --- what a user writes --------------------------------------------------------------------------


def make_eager(p: Problem, wrap=lambda call: call) -> Run:
    if p.case.operation == "enqueue":
        return make_slice_copy(p)
    call = wrap(lambda: eager.STEPS[p.case.operation](p))
    return call if p.case.operation == "bank_topk" else step(p, call)


def make_slice_copy(p: Problem) -> Run:
    """MoCo's enqueue where K is a multiple of B, with rows for its columns and a Python number for
    its pointer: that one leaves neither device nor interpreter."""
    queue, size, start = torch.empty_like(p.bank), p.case.size, 0

    def run():
        nonlocal start
        queue[start : start + len(p.key)] = torch.nn.functional.normalize(p.key)
        start = (start + len(p.key)) % size

    return run


def refuse_compiled(case: Case, device: str) -> str | None:
    return OTHER_JOB if case.operation == "enqueue" else refuse_matrices(case, device)


def refuse_slab(case: Case, device: str) -> str | None:
    if case.operation == "unremix":
        return "not written for UnReMix, whose weights need a pass of their own"
    return OTHER_JOB if case.operation == "enqueue" else None


def refuse_product(case: Case, device: str) -> str | None:
    if case.operation == "enqueue":
        return OTHER_JOB
    if 4.0 * case.batch * case.size > 0.8 * available_memory(device):
        return "the product does not fit"
    return None


def make_product(p: Problem) -> Run:
    query = p.query.detach().to(p.bank.dtype)
    return lambda: query @ p.bank.T


def compiled(call):
    """Inductor's own generator is several times slower than torch's on a CPU. fullgraph: an error
    where it would give up and run eager's code instead."""
    return torch.compile(call, dynamic=False, fullgraph=True, options={"fallback_random": True})


PROVIDERS = {
    **{name: ours(name) for name in registry.TABLE if name != "reference"},
    "eager": Provider("plain torch with B x K matrices", refuse_matrices, make_eager),
    "compile": Provider(
        "torch.compile of eager",
        refuse_compiled,
        functools.partial(make_eager, wrap=compiled),
    ),
    "slab": Provider(Slab.what, refuse_slab, functools.partial(make_on, backend=Slab())),
    "matmul": Provider("one query @ bank.T, nothing else", refuse_product, make_product, False),
    **PEERS,
}
