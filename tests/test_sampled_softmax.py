"""Sampled softmax with log-q correction against cross entropy in float64."""

import pytest
import torch

from psm_kernels.functional import sampled_softmax_loss


def drawn(batch, size, dim, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, dim, generator=g)
    items = torch.randn(size, dim, generator=g) * 2
    target = torch.randint(0, size, (batch,), generator=g)
    log_q = torch.randn(size, generator=g) * 3 - 5
    return [x.to(dtype).requires_grad_() for x in (query, items)], target, log_q


def expected(query, items, target, log_q, ids=None, temperature=1.0):
    logits = query @ items.T / temperature - log_q
    if ids is not None:
        copies = (ids == ids[target][:, None]) & (ids >= 0)
        copies[torch.arange(len(target)), target] = False
        logits = logits.masked_fill(copies, -torch.inf)
    return torch.nn.functional.cross_entropy(logits, target, reduction="none")


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.1])
@pytest.mark.parametrize(("batch", "size", "dim"), [(1, 1, 4), (3, 50, 8), (70, 33, 20)])
def test_the_formula_and_both_gradients(backend, batch, size, dim, temperature, with_ids):
    """More queries than items: several have one target."""
    wide, target, log_q = drawn(batch, size, dim)
    ids = torch.arange(size) // 3 - 2 if with_ids else None
    want = expected(*wide, target, log_q.double(), ids, temperature).mean()
    rows = [x.detach().float().requires_grad_() for x in wide]
    settings = {"log_q": log_q, "ids": ids, "temperature": temperature, "backend": backend}
    got = sampled_softmax_loss(*rows, target, **settings)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad(got, rows), torch.autograd.grad(want, wide)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=2e-5 * max(1, b.abs().max()))


def test_reductions_and_float64():
    rows, target, log_q = drawn(5, 9, 4)
    got = sampled_softmax_loss(*rows, target, log_q=log_q, reduction="none")
    torch.testing.assert_close(got, expected(*rows, target, log_q.double()))
    total = sampled_softmax_loss(*rows, target, log_q=log_q, reduction="sum")
    torch.testing.assert_close(total, got.sum())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"items": torch.zeros(6, 3)}, r"^items: got"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, r"^target: got"),
        ({"target": torch.zeros(4)}, r"^target: got dtype"),
        ({"log_q": torch.zeros(5)}, r"^log_q: got"),
        ({"ids": torch.zeros(6)}, r"^ids: got dtype"),
        ({"temperature": 0.0}, r"^temperature: got 0.0"),
        ({"reduction": "most"}, r"^reduction: got 'most'"),
        ({"backend": "fast"}, r"^backend: got 'fast'"),
    ],
)
def test_bad_input(change, message):
    arguments = {
        "query": torch.zeros(4, 5),
        "items": torch.zeros(6, 5),
        "target": torch.zeros(4, dtype=torch.int64),
        "log_q": torch.zeros(6),
    } | change
    with pytest.raises(ValueError, match=message):
        sampled_softmax_loss(**arguments)
