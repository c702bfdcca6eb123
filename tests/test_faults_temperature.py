"""At temperatures down to 0.001 exp(s/tau) spans 10^868: values and gradients stay right."""

import mpmath
import pytest
import torch
from conftest import problem

from psm_kernels import functional

TEMPERATURES = (0.001, 0.002, 0.005, 0.02)
each_temperature = pytest.mark.parametrize("temperature", TEMPERATURES)
each_form = pytest.mark.parametrize("form", ["bank", "batch"])


def data(size=96, dim=16, near=0.0, batch=24):
    """Query, key, bank; `near`: how much of the query is in its key."""
    query, key, bank, _ = problem(batch, size, dim, seed=3)
    key = torch.nn.functional.normalize(near * query + (1 - near) * key, dim=1)
    return query, key, bank


def sides(query, key, bank):
    """Anchors (R, D), similarity to the positive (R,), to all columns (R, S), and which of those
    are negatives, in float64 and differentiable by `query`."""
    if bank is not None:
        similarity = query @ bank.T
        return (query * key).sum(1), similarity, torch.ones_like(similarity, dtype=torch.bool)
    rows = torch.cat((query, key))
    other = ~torch.eye(len(query), dtype=torch.bool).repeat(2, 2)
    return (query * key).sum(1).repeat(2), rows @ rows.T, other


def fold(loss, bank):
    return loss if bank is not None else loss.view(2, -1).mean(0)


def log_sum(logits, among):
    return logits.masked_fill(~among, -torch.inf).logsumexp(1)


def expected_info_nce(query, key, bank, tau):
    s_pos, s, among = sides(query, key, bank)
    return fold(torch.nn.functional.softplus(log_sum(s / tau, among) - s_pos / tau), bank)


def expected_hcl(query, key, bank, tau, beta=1.0, tau_plus=0.1):
    s_pos, s, among = sides(query, key, bank)
    log_n = among.sum(1).double().log()
    log_r = log_n + log_sum((beta + 1) * s / tau, among) - log_sum(beta * s / tau, among)
    # (R - tau_plus n x+) / (1 - tau_plus), divided by R
    share = 1 - torch.exp(torch.tensor(tau_plus).log() + log_n + s_pos / tau - log_r)
    log_ng = log_r + share.clamp_min(1e-300).log() - torch.tensor(1 - tau_plus).log()
    log_ng = torch.where(share > 0, log_ng, -torch.inf)
    log_ng = torch.maximum(log_ng, log_n - 1 / tau)
    return fold(torch.logaddexp(log_ng - s_pos / tau, torch.zeros(())), bank)


def unremix_weights(s_pos, s, inner, tau):
    """w of one anchor's negatives with 60 digits, as the docstring of unremix_loss has it."""

    def scaled(values, size=1):
        low, high = min(values), max(values)
        if high - low <= 1e-6 * size:
            return [mpmath.mpf(1)] * len(values)
        return [(v - low) / (high - low) for v in values]

    n = len(s)
    x = [mpmath.exp(mpmath.mpf(v) / tau) for v in (s_pos, *s)]
    pi = [v / mpmath.fsum(x) for v in x]
    label = max(range(n + 1), key=lambda j: pi[j])
    u = [*pi[:label], mpmath.fsum(pi[:label] + pi[label + 1 :]), *pi[label + 1 :]][1:]
    r = [1 - (sum(inner[j]) - inner[j][j]) / max(n - 1, 1) for j in range(n)]
    u = scaled(u, max(1, 0.5 / tau) * max(u))
    return [float(sum(w) / 3) for w in zip(scaled(s), u, scaled(r), strict=True)]


def expected_unremix(query, key, bank, tau):
    s_pos, s, among = sides(query, key, bank)
    rows = bank if bank is not None else torch.cat((query, key))
    inner = (rows @ rows.T).detach()
    weights = torch.zeros_like(s)
    with mpmath.workdps(60):
        for i in range(len(s)):
            cut = inner[among[i]][:, among[i]].tolist()
            w = unremix_weights(s_pos[i].item(), s[i][among[i]].tolist(), cut, tau)
            weights[i, among[i]] = torch.tensor(w, dtype=torch.float64)
    log_mean = weights.sum(1).log() - among.sum(1).log()
    log_r = log_sum(s / tau + weights.log(), among) - log_mean
    return fold(torch.logaddexp(log_r - s_pos / tau, torch.zeros(())), bank)


def expected_psm(query, key, bank, tau, topk=5):
    """selection="all", soft_weights="uniform"."""
    s_pos, s, _ = sides(query, key, bank)
    mined = (key @ bank.T).topk(topk).indices
    pulls = torch.cat((s_pos[:, None], s.gather(1, mined)), 1) / tau  # (B, 1 + k)
    negative = torch.ones_like(s, dtype=torch.bool).scatter(1, mined, False)
    log_n = log_sum(s / tau, negative)
    log_z = torch.logaddexp(pulls.logsumexp(1), log_n)
    weights = torch.tensor([1.0] + [1 / topk] * topk, dtype=torch.float64)
    hard = torch.nn.functional.softplus(log_n - pulls[:, 0])
    return (weights * (log_z[:, None] - pulls)).sum(1) + hard


def check(loss, expected, query, key, bank, tau, **settings):
    """Rows and gradients within the rounding of a cosine in fp32, which is 1e-7/tau of a logit."""
    wide = query.double().requires_grad_()
    wanted = expected(wide, key.double(), None if bank is None else bank.double(), tau)
    narrow = query.clone().requires_grad_()
    got = loss(narrow, key, bank, temperature=tau, reduction="none", **settings)
    (gradient,), (through,) = (
        torch.autograd.grad(x.sum(), q) for x, q in ((got, narrow), (wanted, wide))
    )
    # The loss normalizes its query: nothing is left of the part along it.
    through = through - (through * wide).sum(1, keepdim=True) * wide
    assert_close(got[:, None], wanted[:, None], 1e-6 / tau)
    assert_close(gradient, through, 1e-5 / tau)


def assert_close(got, wanted, tolerance):
    """Each row to a share of its size."""
    assert got.isfinite().all()
    size = wanted.norm(dim=1, keepdim=True) + 1e-30
    assert ((got - wanted).abs() / size).max() < tolerance


@each_temperature
@each_form
@pytest.mark.parametrize("near", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("name", ["info_nce", "hcl", "unremix"])
def test_in_batch_and_with_a_bank(backend, name, form, near, temperature):
    query, key, bank = data(near=near)
    loss, expected = getattr(functional, f"{name}_loss"), globals()[f"expected_{name}"]
    rows = bank if form == "bank" else None
    check(loss, expected, query, key, rows, temperature, backend=backend)


@pytest.mark.parametrize("temperature", [1e-3, 0.1])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_unremix_with_few_negatives(backend, size, temperature):
    check(functional.unremix_loss, expected_unremix, *data(size), temperature, backend=backend)


@each_temperature
@pytest.mark.parametrize("near", [0.0, 0.5, 0.95])
def test_psm(backend, near, temperature):
    check(
        functional.psm_loss, expected_psm, *data(near=near), temperature, backend=backend,
        selection="all", soft_weights="uniform",
    )  # fmt: skip


@each_temperature
@each_form
def test_sscl_is_its_float64(backend, form, temperature):
    """Its synthetic negatives are tested elsewhere; here that they stay right when it is cold."""
    query, key, bank = data()
    settings = {"temperature": temperature, "reduction": "none", "rng_state": torch.tensor([1, 2])}
    results = []
    for dtype, name in ((torch.float32, backend), (torch.float64, "reference")):
        q, k, b = (t.to(dtype) for t in (query, key, bank))
        q.requires_grad_()
        loss = functional.sscl_loss(q, k, b if form == "bank" else None, backend=name, **settings)
        results.append((loss, *torch.autograd.grad(loss.sum(), q)))
    (got, gradient), (wanted, through) = results
    assert_close(got[:, None], wanted[:, None], 1e-6 / temperature)
    assert_close(gradient, through, 1e-5 / temperature)
