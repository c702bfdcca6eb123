"""Other libraries: their calls, with the bank as theirs. All are optional."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch

from benchmarks.cases import Case, Problem
from benchmarks.eager import in_batch
from benchmarks.measure import available_memory
from benchmarks.provider import OTHER_JOB, Provider, Run, refuse_matrices, step


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
    if p.case.operation == "nnclr":
        return make_lightly_nnclr(p)
    from lightly.loss import NTXentLoss

    # Its loss clones the bank and enqueues the keys afterwards; the work is counted.
    criterion = NTXentLoss(0.2, (p.case.size, p.case.dim)).to(p.bank.device)
    criterion.memory_bank.bank.copy_(p.bank)
    return step(p, lambda: criterion(p.query, p.key))


def make_lightly_nnclr(p: Problem) -> Run:
    """Its search and our lines for the rest: its loss has the batch's other view besides."""
    from lightly.models.modules import NNMemoryBankModule

    search = NNMemoryBankModule((p.case.size, p.case.dim)).to(p.bank.device)
    search.bank.copy_(p.bank)
    return step(p, lambda: in_batch(search(p.key), torch.nn.functional.normalize(p.query), tau=0.2))


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


PEERS = {
    "lightly": Provider(
        "NTXentLoss with a bank, NNMemoryBankModule",
        peer("lightly", "info_nce", "nnclr"),
        make_lightly,
    ),
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
