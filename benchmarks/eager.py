"""The baseline: the leanest lines that a user would write with plain torch, B x K matrices and all,
gradients by autograd. `Problem` in, scalar loss (or top-k similarities) out.

Lean: tau divides the (B, D) queries and not the (B, K) logits; exponentials are summed as they
are, which is safe at these temperatures and saves logsumexp's passes; nothing is concatenated to a
(B, K) matrix; what has no gradient is written in place. `tests/test_benchmarks.py` holds that
values and gradients are those of the formulas.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.linalg import vecdot
from torch.nn.functional import cross_entropy, normalize

from benchmarks.cases import CLASSES, Problem


def psm_step(p: Problem, tau: float = 0.5, a: float = 0.5) -> Tensor:
    query, key = normalize(p.query), normalize(p.key)
    pos, logits = scaled_logits(query, key, p.bank, tau)
    with torch.no_grad():
        mined = similarity(key, p.bank).topk(p.case.topk).indices
        chance = (logits - pos[:, None]).square_().mul_(-a * tau**2).exp_().clamp_max_(0.999)
        keep = torch.rand_like(chance).lt_(chance).scatter_(1, mined, 0.0)  # 0 and 1 in fp32
    near = torch.cat((pos[:, None], logits.gather(1, mined)), 1)  # (B, 1 + k)
    weight = torch.cat((torch.ones_like(near[:, :1]), (tau * near[:, 1:]).softmax(1)), 1)
    negatives = vecdot(logits.exp(), keep)
    log_z = (near.exp().sum(1) + negatives).log()
    soft = (weight * (log_z[:, None] - near)).sum(1)
    return (soft + (pos.exp() + negatives).log() - pos).mean()


def similarity(rows: Tensor, bank: Tensor) -> Tensor:  # (B, K), of the bank's dtype
    return rows.to(bank.dtype) @ bank.T


def scaled_logits(query: Tensor, key: Tensor, bank: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """(B,) of the positives, (B, K) of the bank, in fp32."""
    query = query / tau
    return (query * key).sum(1), similarity(query, bank).float()


def info_nce_step(p: Problem, tau: float = 0.2) -> Tensor:
    pos, logits = scaled_logits(normalize(p.query), normalize(p.key), p.bank, tau)
    return ((pos.exp() + logits.exp().sum(1)).log() - pos).mean()


def hcl_step(p: Problem, tau: float = 0.5) -> Tensor:
    pos, logits = scaled_logits(normalize(p.query), normalize(p.key), p.bank, tau)
    neg = logits.exp()
    return reweighted(pos, neg.sum(1), squares(neg), neg.shape[1], tau)


def squares(x: Tensor) -> Tensor:  # (B, K) -> (B,); `norm` writes one matrix less than `square`
    return torch.linalg.vector_norm(x, dim=1).square()


def reweighted(pos, total, squared, count: int, tau: float, tau_plus: float = 0.1) -> Tensor:
    """HCL's objective at beta 1, where a negative's importance is its own exponential: all that is
    needed of them is their sum and that of their squares."""
    hard = (count * squared / total - tau_plus * count * pos.exp()) / (1 - tau_plus)
    hard = hard.clamp_min(count * torch.e ** (-1 / tau))
    return ((pos.exp() + hard).log() - pos).mean()


def sscl_step(p: Problem, tau: float = 0.5, num_synthetic: int = 8) -> Tensor:
    query, bank, num_hard = normalize(p.query), p.bank, p.case.topk
    pos, logits = scaled_logits(query, normalize(p.key), bank, tau)
    neg = logits.exp()
    with torch.no_grad():
        hardest = logits.topk(num_hard).indices
        drawn = torch.randint(num_hard, (2, len(query), num_synthetic), device=query.device)
        first, second = (bank[hardest.gather(1, which)].float() for which in drawn)
        alpha = torch.rand(len(query), num_synthetic, 1, device=query.device)
        made = normalize(alpha * first + (1 - alpha) * second, dim=2)
    made = (made @ query[:, :, None])[:, :, 0].div(tau).exp()  # (B, num_synthetic)
    total, squared = neg.sum(1) + made.sum(1), squares(neg) + squares(made)
    return reweighted(pos, total, squared, neg.shape[1] + num_synthetic, tau, tau_plus=0.05)


def unremix_step(p: Problem, tau: float = 0.5) -> Tensor:
    bank = p.bank
    pos, logits = scaled_logits(normalize(p.query), normalize(p.key), bank, tau)
    neg = logits.exp()
    with torch.no_grad():
        # The three weights, each scaled to [0, 1]: similarity, |softmax - label|, distance to all.
        weight = (logits - logits.amin(1, keepdim=True)).div_(spread(logits))
        top, label = neg.max(1, keepdim=True)
        off = neg / (pos.exp() + neg.sum(1))[:, None]
        off.scatter_add_(1, label, -(top > pos.exp()[:, None]).float()).abs_()
        weight.addcmul_(off, 1 / spread(off)).sub_(off.amin(1, keepdim=True) / spread(off))
        far = -similarity(bank.sum(0, keepdim=True, dtype=torch.float32), bank).float()
        weight += (far - far.min()) / spread(far)
    hard = len(bank) * vecdot(neg, weight) / weight.sum(1)
    return ((pos.exp() + hard).log() - pos).mean()


def spread(x: Tensor) -> Tensor:  # (B, K) -> (B, 1)
    return x.amax(1, keepdim=True) - x.amin(1, keepdim=True)


def nnclr_step(p: Problem, tau: float = 0.2) -> Tensor:
    query = normalize(p.query)
    nearest = p.bank[similarity(normalize(p.key), p.bank).argmax(1)].float()
    return in_batch(nearest, query, tau)


def in_batch(nearest: Tensor, query: Tensor, tau: float) -> Tensor:
    return cross_entropy(nearest @ (query / tau).T, torch.arange(len(query), device=query.device))


def supcon_step(p: Problem, tau: float = 0.1) -> Tensor:
    query, key = normalize(p.query), normalize(p.key)
    pos, logits = scaled_logits(query, key, p.bank, tau)
    total = (pos.exp() + logits.exp().sum(1)).log()
    # The classes' sums: no (B, K) mask of equal labels.
    by_class = p.bank.new_zeros(CLASSES, p.case.dim, dtype=torch.float32)
    by_class.index_add_(0, p.bank_labels, p.bank.float())
    number = 1 + p.bank_labels.bincount(minlength=CLASSES)[p.labels]
    return (total - (query * (key + by_class[p.labels])).sum(1) / (tau * number)).mean()


def ressl_step(p: Problem, tau: float = 0.1, teacher: float = 0.04) -> Tensor:
    target = similarity(normalize(p.key) / teacher, p.bank).softmax(1, dtype=torch.float32)
    logits = similarity(normalize(p.query) / tau, p.bank).float()
    return (logits.exp().sum(1).log() - vecdot(logits, target)).mean()


def msf_step(p: Problem) -> Tensor:
    query, key = normalize(p.query), normalize(p.key)
    near = p.bank[similarity(key, p.bank).topk(p.case.topk - 1).indices].float()  # (B, k - 1, D)
    mean = (key + near.sum(1)) / p.case.topk
    return (2 - 2 * (query * mean).sum(1)).mean()


def topk_step(p: Problem) -> Tensor:
    return similarity(p.query.detach(), p.bank).topk(p.case.topk).values


STEPS: dict[str, Callable[[Problem], Tensor]] = {
    "psm_forward": psm_step,
    "psm": psm_step,
    "info_nce": info_nce_step,
    "hcl": hcl_step,
    "sscl": sscl_step,
    "unremix": unremix_step,
    "nnclr": nnclr_step,
    "supcon": supcon_step,
    "ressl": ressl_step,
    "msf": msf_step,
    "bank_topk": topk_step,
}

# B x K matrices of 4 bytes that live at once at the worst moment, measured and rounded up: more for
# the other libraries, which have not been made lean.
MATRICES = {
    "psm_forward": 6,
    "psm": 6,
    "info_nce": 6,
    "hcl": 4,
    "sscl": 4,
    "unremix": 6,
    "nnclr": 4,
    "supcon": 4,
    "ressl": 5,
    "msf": 2,
    "bank_topk": 2,
}
