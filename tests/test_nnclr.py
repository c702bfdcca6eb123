"""NNCLR against its formula, and what its bank and its batch are to it."""

import pytest
import torch
from formulas import assert_same, data, expected_nnclr

from psm_kernels import NNCLRLoss
from psm_kernels.functional import nnclr_loss

IDS = torch.tensor([4, 2, -1, 4, 0, -1])  # one sample twice, two unknown


@pytest.mark.parametrize("given", [False, True], ids=["no ids", "ids"])
@pytest.mark.parametrize("temperature", [0.05, 0.5])
@pytest.mark.parametrize("count", [None, 7, 0])
def test_nnclr_is_the_formula(count, temperature, given):
    query, key, bank = data()
    ids = {"ids": IDS, "bank_ids": torch.arange(20) % 6 - 1} if given else {}
    settings = {"count": count, "temperature": temperature, **ids}
    got = nnclr_loss(query, key, bank, reduction="none", backend="reference", **settings)
    want = expected_nnclr(query, key, bank, **settings)
    torch.testing.assert_close(got, want)
    for a, b in zip(got, want, strict=True):  # each row has a gradient to all queries
        (a,), (b,) = (torch.autograd.grad(x, query, retain_graph=True) for x in (a, b))
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_neighbors_and_keys_get_no_gradient():
    query, key, bank = data(dtype=torch.float32)
    bank.requires_grad_()
    nnclr_loss(query, key, bank, count=0).backward()
    nnclr_loss(query, key, bank).backward()
    assert query.grad.abs().sum() > 0
    assert key.grad is None
    assert bank.grad is None


def test_an_empty_bank_leaves_the_keys_themselves():
    query, key, bank = data()
    unit = torch.nn.functional.normalize
    logits = unit(key.detach()) @ unit(query).T / 0.2
    want = torch.nn.functional.cross_entropy(logits, torch.arange(6))
    assert_same(nnclr_loss(query, key, bank.fill_(torch.nan), count=0), want, query)


def test_a_batch_of_one_and_a_batch_of_one_sample_have_no_negatives(backend):
    query, key, bank = data(dtype=torch.float32)
    same = torch.full((6,), 3)
    one = nnclr_loss(query[:1], key[:1], bank, backend=backend)
    copies = nnclr_loss(query, key, bank, ids=same, bank_ids=torch.arange(20), backend=backend)
    for value in (one, copies):
        assert value == 0
        assert (torch.autograd.grad(value, query)[0] == 0).all()


def test_both_directions_are_two_batches():
    """A row's negatives are the queries of its own direction."""
    criterion = NNCLRLoss(0.2, (40, 8), reduction="none")
    query, key, bank = (x.detach() for x in data(dtype=torch.float32))
    criterion.enqueue(bank)
    one, two = (criterion(q, k, update=False) for q, k in ((query, key), (key, query)))
    both = criterion.symmetric(query, key, key, query)
    torch.testing.assert_close(both, torch.stack((one, two), 1).flatten())
