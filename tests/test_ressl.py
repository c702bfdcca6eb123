"""ReSSL against its formula."""

import pytest
import torch
from formulas import assert_same, data, expected_ressl

from psm_kernels.functional import ressl_loss

IDS = torch.tensor([4, 2, -1, 4, 0, -1])


@pytest.mark.parametrize("given", [False, True], ids=["no ids", "ids"])
@pytest.mark.parametrize("temperatures", [(0.1, 0.04), (0.5, 0.5), (0.04, 0.1)])
@pytest.mark.parametrize("count", [None, 7, 1])
def test_ressl_is_the_formula(count, temperatures, given):
    query, key, bank = data()
    ids = {"ids": IDS, "bank_ids": torch.arange(20) % 6 - 1} if given else {}
    names = ("temperature", "teacher_temperature")
    settings = {"count": count, **ids, **dict(zip(names, temperatures, strict=True))}
    got = ressl_loss(query, key, bank, reduction="none", **settings)
    want = expected_ressl(query, key, bank, **settings)
    torch.testing.assert_close(got, want)
    assert_same(got.mean(), want.mean(), query)


def test_the_key_gets_no_gradient():
    query, key, bank = data(dtype=torch.float32)
    ressl_loss(query, key, bank).backward()
    assert query.grad.abs().sum() > 0
    assert key.grad is None


def test_equal_sides_leave_the_entropy(backend):
    """Where query and key agree, at one temperature, nothing pulls."""
    query, _, bank = data(dtype=torch.float32)
    got = ressl_loss(
        query, query.detach(), bank, temperature=0.2, teacher_temperature=0.2, backend=backend
    )
    p = (torch.nn.functional.normalize(query.detach()) @ bank.T / 0.2).softmax(1)
    torch.testing.assert_close(got, -(p * p.log()).sum(1).mean())
    (grad,) = torch.autograd.grad(got, query)
    torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-6)


def test_what_sees_nothing_has_no_loss(backend):
    """An empty bank, and rows whose own copies are all there is."""
    query, key, bank = data(dtype=torch.float32)
    empty = ressl_loss(query, key, bank, count=0, backend=backend)
    own = ressl_loss(
        query, key, bank, ids=torch.zeros(6, dtype=torch.int64),
        bank_ids=torch.zeros(20, dtype=torch.int64), backend=backend,
    )  # fmt: skip
    for value in (empty, own):
        assert value == 0
        assert (torch.autograd.grad(value, query)[0] == 0).all()
