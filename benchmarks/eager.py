"""The baseline: what a user writes with plain torch, B x K matrices and all.

PSM's is the package's own reference with torch's generator and ties left open; it computes its
gradient itself, which is kinder than autograd. Its kin are written out with autograd, which is
leaner than the reference. `Problem` in, scalar loss (or top-k similarities) out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from benchmarks.cases import Problem
from psm_kernels.functional import hcl, info_nce, psm, psm_loss
from psm_kernels.ops import BankPass, reference


@contextlib.contextmanager
def another_pass(bank_pass: Callable[..., BankPass]) -> Iterator[None]:
    """The losses of `psm_kernels.functional` on `bank_pass` instead of the library's."""
    modules = (psm, info_nce, hcl)
    theirs = [module.bank_pass for module in modules]
    for module in modules:
        module.bank_pass = bank_pass
    try:
        yield
    finally:
        for module, own in zip(modules, theirs, strict=True):
            module.bank_pass = own


def carry(query: Tensor, swept: BankPass, temperature: float) -> BankPass:
    """Adds zero and carries the gradient: d neg_lse / d query = neg_mean / tau."""
    carrier = ((query - query.detach()) * swept.neg_mean).sum(1) / temperature
    return swept._replace(neg_lse=swept.neg_lse + carrier)


def naive_pass(
    query, key, bank, count, s_pos, *, temperature, selection="all", a=0.5, b=0.0, topk=0,
    exclude_mined=False, **unused,
) -> BankPass:  # fmt: skip
    with torch.no_grad():
        seen = query.to(bank.dtype)
        mine = None if key is None else key.to(bank.dtype)
        swept = reference.bank_pass(
            seen, mine, bank, count, s_pos, temperature, selection, a, b, topk, None, 0, 0,
            exclude_mined=exclude_mined, noise="torch", exact_ties=False,
        )  # fmt: skip
    return carry(query, BankPass(*swept), temperature)


def psm_step(p: Problem) -> Tensor:
    """To be run under `another_pass(naive_pass)`, outside of what torch.compile traces."""
    return psm_loss(
        p.query, p.key, p.bank, topk=p.case.topk, rng_state=p.rng_state, backend="reference"
    )


def similarity(rows: Tensor, bank: Tensor) -> Tensor:  # (B, K)
    return (rows.to(bank.dtype) @ bank.T).float()


def info_nce_step(p: Problem, temperature: float = 0.2) -> Tensor:
    """The lines of facebookresearch/moco, moco/builder.py."""
    query, key = normalize(p.query), normalize(p.key)
    positive = torch.einsum("nc,nc->n", query, key)[:, None]
    logits = torch.cat((positive, similarity(query, p.bank)), 1) / temperature
    return cross_entropy(logits, torch.zeros(len(query), dtype=torch.long, device=query.device))


def reweighted(pos, neg, temperature, beta=1.0, tau_plus=0.1) -> Tensor:
    """HCL's image/main.py in its variables: pos (B,), neg (B, N), both exponentials."""
    count = neg.shape[1]
    importance = (beta * neg.log()).exp()
    total = (importance * neg).sum(1) / importance.mean(1)
    hard = (-tau_plus * count * pos + total) / (1 - tau_plus)
    hard = hard.clamp_min(count * torch.e ** (-1 / temperature))
    return -(pos / (pos + hard)).log().mean()


def hcl_step(p: Problem, temperature: float = 0.5) -> Tensor:
    query, key = normalize(p.query), normalize(p.key)
    pos = ((query * key).sum(1) / temperature).exp()
    return reweighted(pos, (similarity(query, p.bank) / temperature).exp(), temperature)


def sscl_step(p: Problem, temperature: float = 0.5, num_synthetic: int = 8) -> Tensor:
    query, key, bank, num_hard = normalize(p.query), normalize(p.key), p.bank, p.case.topk
    pos = ((query * key).sum(1) / temperature).exp()
    neg = (similarity(query, bank) / temperature).exp()
    hardest = neg.detach().topk(num_hard, 1).indices
    drawn = torch.randint(num_hard, (2, len(query), num_synthetic), device=query.device)
    first, second = (bank[hardest.gather(1, which)].float() for which in drawn)
    alpha = torch.rand(len(query), num_synthetic, 1, device=query.device)
    made = normalize(alpha * first + (1 - alpha) * second, dim=2)
    made = (torch.einsum("bd,bsd->bs", query, made) / temperature).exp()
    return reweighted(pos, torch.cat((neg, made), 1), temperature, tau_plus=0.05)


def unremix_step(p: Problem, temperature: float = 0.5) -> Tensor:
    def scaled(x):
        least, most = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        return (x - least) / (most - least)

    query, key, bank = normalize(p.query), normalize(p.key), p.bank
    found = similarity(query, bank)
    logits = torch.cat(((query * key).sum(1, keepdim=True), found), 1) / temperature
    with torch.no_grad():
        pi = logits.softmax(1)
        label = pi.argmax(1, keepdim=True)
        pi.scatter_add_(1, label, pi.new_full(label.shape, -1.0))
        to_all = similarity(bank.float().sum(0, keepdim=True), bank)[0]  # (K,)
        distance = 1 - (to_all - 1) / (len(bank) - 1)
        weight = scaled(found) + scaled(pi.abs_()[:, 1:]) + scaled(distance)
    x = logits.exp()
    hard = len(bank) * (weight * x[:, 1:]).sum(1) / weight.sum(1)
    return -(x[:, 0] / (x[:, 0] + hard)).log().mean()


def topk_step(p: Problem) -> Tensor:
    query = p.query.detach().to(p.bank.dtype)
    return reference.bank_topk(query, p.bank, p.case.topk, p.memory.count, exact_ties=False)[0]


STEPS: dict[str, Callable[[Problem], Tensor]] = {
    "psm_forward": psm_step,
    "psm": psm_step,
    "info_nce": info_nce_step,
    "hcl": hcl_step,
    "sscl": sscl_step,
    "unremix": unremix_step,
    "bank_topk": topk_step,
}

# B x K matrices of 4 bytes that live at once at the worst moment, rounded up from measured peaks.
MATRICES = {
    "psm_forward": 9,
    "psm": 9,
    "info_nce": 6,
    "hcl": 9,
    "sscl": 9,
    "unremix": 14,
    "bank_topk": 4,
}
