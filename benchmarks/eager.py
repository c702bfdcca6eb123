"""The baseline: the leanest lines that a user would write with plain torch, B x K matrices and all,
gradients by autograd. `Problem` in, scalar loss (or top-k similarities) out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from benchmarks.cases import Problem


def psm_step(p: Problem, temperature: float = 0.5, a: float = 0.5) -> Tensor:
    query, key, topk = normalize(p.query), normalize(p.key), p.case.topk
    found, pos = similarity(query, p.bank), (query * key).sum(1, keepdim=True)
    with torch.no_grad():
        mined = similarity(key, p.bank).topk(topk).indices
        keep = torch.rand_like(found) < torch.exp(-a * (found - pos) ** 2).clamp_max(0.999)
        keep.scatter_(1, mined, False)
    near = torch.cat((pos, found.gather(1, mined)), 1)  # (B, 1 + k)
    weight = torch.cat((torch.ones_like(pos), near[:, 1:].softmax(1)), 1)
    negatives = (torch.exp(found / temperature) * keep).sum(1)
    log_z = (torch.exp(near / temperature).sum(1) + negatives).log()
    log_h = (torch.exp(pos[:, 0] / temperature) + negatives).log()
    soft = (weight * (log_z[:, None] - near / temperature)).sum(1)
    return (soft + log_h - pos[:, 0] / temperature).mean()


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
    return similarity(p.query.detach(), p.bank).topk(p.case.topk).values


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
