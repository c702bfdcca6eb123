"""PSM's kin, forward and backward, against what a user writes: pytest -s benchmarks/test_methods.py

Each line is a median over interleaved rounds in milliseconds and the ratio to ours; the second test
is the memory. TARGETS are the project's for two cores with AVX-512.
"""

import json
import statistics
import subprocess
import sys
import time

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from psm_kernels import functional

BATCH, SIZE, DIM, ROUNDS = 256, 65_536, 128, 7
TARGETS = {
    "info_nce": {"eager": 4, "compile": 2, "lightly": 10},
    "hcl": {"eager": 4},
    "sscl": {"eager": 4},
    "unremix": {"eager": 4},
}
OURS = {name: getattr(functional, f"{name}_loss") for name in TARGETS}


# --- what a user writes --------------------------------------------------------------------------


def eager_info_nce(query, key, bank, temperature=0.2):
    query, key = normalize(query), normalize(key)
    positive = torch.einsum("nc,nc->n", query, key)[:, None]
    logits = torch.cat((positive, query @ bank.T), 1) / temperature
    return cross_entropy(logits, torch.zeros(len(query), dtype=torch.long))


def reweighted(pos, neg, temperature, beta=1.0, tau_plus=0.1):
    """HCL's image/main.py in its variables: pos (B,), neg (B, N), both exponentials."""
    count = neg.shape[1]
    importance = (beta * neg.log()).exp()
    total = (importance * neg).sum(1) / importance.mean(1)
    hard = (-tau_plus * count * pos + total) / (1 - tau_plus)
    hard = hard.clamp_min(count * torch.e ** (-1 / temperature))
    return -(pos / (pos + hard)).log().mean()


def eager_hcl(query, key, bank, temperature=0.5):
    query, key = normalize(query), normalize(key)
    pos, neg = ((query * key).sum(1) / temperature).exp(), (query @ bank.T / temperature).exp()
    return reweighted(pos, neg, temperature)


def eager_sscl(query, key, bank, temperature=0.5, num_hard=32, num_synthetic=8):
    query, key = normalize(query), normalize(key)
    pos, neg = ((query * key).sum(1) / temperature).exp(), (query @ bank.T / temperature).exp()
    hardest = neg.detach().topk(num_hard, 1).indices
    first, second = (
        bank[hardest.gather(1, torch.randint(num_hard, (len(query), num_synthetic)))]
        for _ in range(2)
    )
    alpha = torch.rand(len(query), num_synthetic, 1)
    made = normalize(alpha * first + (1 - alpha) * second, dim=2)
    made = (torch.einsum("bd,bsd->bs", query, made) / temperature).exp()
    return reweighted(pos, torch.cat((neg, made), 1), temperature, tau_plus=0.05)


def eager_unremix(query, key, bank, temperature=0.5):
    def scaled(x):
        least, most = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        return (x - least) / (most - least)

    query, key = normalize(query), normalize(key)
    similarity = query @ bank.T
    logits = torch.cat(((query * key).sum(1, keepdim=True), similarity), 1) / temperature
    with torch.no_grad():
        pi = logits.softmax(1)
        label = pi.argmax(1, keepdim=True)
        pi.scatter_add_(1, label, pi.new_full(label.shape, -1.0))
        distance = 1 - (bank @ bank.sum(0) - 1) / (len(bank) - 1)
        weight = scaled(similarity) + scaled(pi.abs_()[:, 1:]) + scaled(distance)
    x = logits.exp()
    hard = len(bank) * (weight * x[:, 1:]).sum(1) / weight.sum(1)
    return -(x[:, 0] / (x[:, 0] + hard)).log().mean()


EAGER = {
    "info_nce": eager_info_nce,
    "hcl": eager_hcl,
    "sscl": eager_sscl,
    "unremix": eager_unremix,
}


# --- time ----------------------------------------------------------------------------------------


def problem(batch, size):
    generator = torch.Generator().manual_seed(0)
    query, bank = (torch.randn(n, DIM, generator=generator) for n in (batch, size))
    key = query + 0.5 * torch.randn(batch, DIM, generator=generator)
    return query.requires_grad_(), key, normalize(bank)


def medians(steps: dict) -> dict[str, float]:
    """Milliseconds of each step; rounds are interleaved, the first is thrown away."""
    times = {name: [] for name in steps}
    for _ in range(ROUNDS + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}


@pytest.mark.parametrize("name", TARGETS)
def test_time(name):
    query, key, bank = problem(BATCH, SIZE)

    def backward(loss, *args):
        return lambda: torch.autograd.grad(loss(query, key, *args), query)

    steps = {"ours": backward(OURS[name], bank), "eager": backward(EAGER[name], bank)}
    if name != "sscl":  # its random draws break the graph
        steps["compile"] = backward(torch.compile(EAGER[name]), bank)
    if name == "info_nce":
        lightly = pytest.importorskip("lightly.loss").NTXentLoss(0.2, (SIZE, DIM))
        lightly.memory_bank.bank.copy_(bank)
        steps["lightly"] = backward(lightly)
    taken = medians(steps)
    ratios = {other: value / taken["ours"] for other, value in taken.items() if other != "ours"}
    text = ", ".join(f"{n} {taken[n]:.0f} ms ({r:.1f}x)" for n, r in ratios.items())
    print(f"\n{name}: ours {taken['ours']:.0f} ms, {text}")
    for other, target in TARGETS[name].items():
        assert ratios[other] >= target, f"{name}: {ratios[other]:.2f}x {other}, wanted {target}x"


# --- memory --------------------------------------------------------------------------------------

GROWTH = """
import json, resource, sys
import torch
sys.path.insert(0, sys.argv[1])
from test_methods import OURS, problem

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

def step(name, size):
    query, key, bank = problem(2048, size)
    before = peak()
    torch.autograd.grad(OURS[name](query, key, bank), query)
    return peak() - before

for name in OURS:
    step(name, 64)
print(json.dumps({name: step(name, 65_536) for name in OURS}))
"""


def test_memory():
    """Growth of the peak at B = 2,048, where one B x K matrix has 512 MB."""
    folder = __file__.rpartition("/")[0]
    command = [sys.executable, "-c", GROWTH, folder]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    grown = json.loads(done.stdout)
    print("\n" + ", ".join(f"{name} {megabytes:.0f} MB" for name, megabytes in grown.items()))
    assert max(grown.values()) < 128
