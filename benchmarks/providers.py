"""Who does the work: our backends, the baselines, and other libraries.

A provider says why it sits out a case, or makes from a problem a function without arguments that
does the work once and returns the loss (or the top-k similarities), so that all can be compared.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import eager
from benchmarks.cases import DTYPES, Case, Problem
from benchmarks.measure import available_memory
from benchmarks.slab import Slab
from psm_kernels import functional, ops
from psm_kernels.backends import registry
from psm_kernels.backends.base import Backend

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


# --- ours ----------------------------------------------------------------------------------------


def our_loss(p: Problem, backend: str | Backend) -> Tensor:
    name = p.case.operation.removesuffix("_forward")
    settings = {
        "psm": {"topk": p.case.topk, "rng_state": p.rng_state},
        "sscl": {"num_hard": p.case.topk, "rng_state": p.rng_state},
    }.get(name, {})
    loss = getattr(functional, f"{name}_loss")
    return loss(p.query, p.key, p.bank, backend=backend, **settings)


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


def refuse_matrices(case: Case, device: str) -> str | None:
    wanted = 4.0 * eager.MATRICES.get(case.operation, 0) * case.batch * case.size
    left = 0.8 * available_memory(device)
    if wanted > left:
        return f"would take {wanted / 1e9:.0f} GB of {left / 1e9:.0f} GB that are free"
    return None


def make_eager(p: Problem, wrap=lambda call: call) -> Run:
    if p.case.operation == "enqueue":
        return make_slice_copy(p)
    call = wrap(lambda: eager.STEPS[p.case.operation](p))
    return call if p.case.operation == "bank_topk" else step(p, call)


def make_slice_copy(p: Problem) -> Run:
    """MoCo's enqueue, facebookresearch/moco, moco/builder.py, where K is a multiple of B."""
    queue = torch.empty(p.case.dim, p.case.size, dtype=p.bank.dtype, device=p.bank.device)
    pointer = torch.zeros(1, dtype=torch.int64, device=p.bank.device)

    def run():
        start = int(pointer)
        queue[:, start : start + len(p.key)] = torch.nn.functional.normalize(p.key).T
        pointer[0] = (start + len(p.key)) % p.case.size

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


# --- other libraries -----------------------------------------------------------------------------


def peer(
    module: str, *operations: str, reads: tuple[str, ...] = ("fp32",), device: str | None = None
) -> Callable[[Case, str], str | None]:
    def refuse(case: Case, on: str) -> str | None:
        if case.operation not in operations:
            return OTHER_JOB
        if case.dtype not in reads:
            return f"takes {' and '.join(reads)} banks alone"
        if device not in (None, on):
            return f"its kernels run on {device} alone"
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
        if case.bank_bytes > 0.4 * available_memory(on):
            return "keeps the bank twice, which does not fit"
        return refuse_matrices(case, on) if operations != ("bank_topk",) else None

    return refuse


def make_lightly(p: Problem) -> Run:
    """Its loss clones the bank and enqueues the keys afterwards; the work is counted."""
    from lightly.loss import NTXentLoss

    criterion = NTXentLoss(0.2, (p.case.size, p.case.dim)).to(p.bank.device)
    criterion.memory_bank.bank.copy_(p.bank)
    return step(p, lambda: criterion(p.query, p.key))


def refuse_metric_learning(case: Case, device: str) -> str | None:
    reason = peer("pytorch_metric_learning", "info_nce")(case, device)
    if reason is None and case.batch * case.size >= 1 << 20:
        return "makes a list of all pairs: half a minute a call at 256 x 16,384, 24 GB at 65,536"
    return reason


def make_metric_learning(p: Problem) -> Run:
    """Its memory enqueues the keys first, so a batch's other keys are negatives too."""
    from pytorch_metric_learning.losses import CrossBatchMemory, NTXentLoss

    device, batch = p.bank.device, p.case.batch
    criterion = CrossBatchMemory(NTXentLoss(0.2), p.case.dim, p.case.size)
    criterion.embedding_memory = p.bank.clone()
    criterion.label_memory = torch.full((p.case.size,), -1, device=device)
    criterion.has_been_filled = True
    rows = torch.arange(batch, device=device)
    labels = torch.cat((rows, rows))
    is_key = torch.arange(2 * batch, device=device) >= batch

    def loss():
        # An older batch's keys under the same labels would count as positives.
        criterion.label_memory.fill_(-1)
        return criterion(torch.cat((p.query, p.key)), labels, enqueue_mask=is_key)

    return step(p, loss)


def make_liger(p: Problem) -> Run:
    """The bank as the weight of a linear layer, a slot of it as the target: InfoNCE's work, but the
    positive is a row of the bank and not the key."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    criterion = LigerFusedLinearCrossEntropyLoss()
    target = torch.arange(p.case.batch, device=p.bank.device) % p.case.size

    def loss():
        query = torch.nn.functional.normalize(p.query) / 0.2
        return criterion(p.bank, query.to(p.bank.dtype), target)

    return step(p, loss)


def make_faiss(p: Problem) -> Run:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(p.case.dim)
    index.add(p.bank.numpy())
    query = p.query.detach().numpy()
    return lambda: torch.from_numpy(index.search(query, p.case.topk)[0])


PROVIDERS = {
    **{name: ours(name) for name in registry.TABLE if name != "reference"},
    "eager": Provider("plain torch with B x K matrices", refuse_matrices, make_eager),
    "compile": Provider(
        "torch.compile of eager",
        refuse_compiled,
        functools.partial(make_eager, wrap=functools.partial(torch.compile, dynamic=False)),
    ),
    "slab": Provider(Slab.what, refuse_slab, functools.partial(make_on, backend=Slab())),
    "matmul": Provider("one query @ bank.T, nothing else", refuse_product, make_product, False),
    "lightly": Provider("NTXentLoss with a bank", peer("lightly", "info_nce"), make_lightly),
    "metric-learning": Provider(
        "CrossBatchMemory(NTXentLoss)",
        refuse_metric_learning,
        make_metric_learning,
    ),
    "liger": Provider(
        "LigerFusedLinearCrossEntropyLoss, the bank as its weight",
        peer("liger_kernel", "info_nce", reads=("fp32", "bf16", "fp16"), device="cuda"),
        make_liger,
        False,
    ),
    "faiss": Provider("IndexFlatIP", peer("faiss", "bank_topk", device="cpu"), make_faiss),
}
