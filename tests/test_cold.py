"""Nothing is subtracted from a sum that it dominates: losses and gradients at low temperatures,
with mined rows that outweigh all negatives together. Triton's interpreter runs this file too."""

import cold
import pytest
import torch

from psm_kernels import functional

LOW = [torch.float32, torch.bfloat16, torch.float16]


def run(p, dtype, backend, *, temperature, **settings):
    query = p.query.clone().requires_grad_()
    bank = p.bank.to(dtype)
    loss = functional.psm_loss(
        query,
        p.key,
        bank,
        temperature=temperature,
        rng_state=cold.RNG_STATE,
        reduction="none",
        backend=backend,
        **settings,
    )
    loss.sum().backward()
    return loss, query.grad


def check(p, dtype, backend, temperature, unseen=None, given=(), **settings):
    got = run(p, dtype, backend, temperature=temperature, **settings, **dict(given))
    want = cold.answer(p, temperature=temperature, unseen=unseen, **settings)
    cold.assert_step(got, want, dtype)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("temperature", cold.TEMPERATURES)
@pytest.mark.parametrize("selection", ["bernoulli", "expected", "all"])
@pytest.mark.parametrize("nearer", [True, False], ids=["nearer", "farther"])
def test_loss_and_gradient(backend, nearer, selection, temperature, dtype):
    check(cold.problem(nearer=nearer), dtype, backend, temperature, selection=selection)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("selection", ["bernoulli", "expected", "all"])
@pytest.mark.parametrize("size", [6, 31, 40])  # 30 rows are some query's mined ones
def test_many_of_few_are_mined(backend, size, selection, dtype):
    """K < topk, everything mined, one slot left over."""
    p = cold.problem()
    near = (p.key @ p.bank.T).amax(0).argsort(descending=True)[:size]
    p = p._replace(bank=p.bank[near].contiguous())
    check(p, dtype, backend, 0.02, selection=selection, topk=min(30, size))


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_other_settings(backend, dtype):
    p = cold.problem(seed=3)
    check(p, dtype, backend, 0.02, soft_weights="uniform", a=4.0, b=0.1, hard_weight=0.5)
    check(p, dtype, backend, 0.01, topk=1, a=0.0)
    check(p, dtype, backend, 0.02, topk=20, selection="expected", a=20.0)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_own_copies_do_not_count(backend, dtype):
    """Three older copies of each query outweigh everything at tau = 0.02; seen, they would be all
    that is mined."""
    p = cold.problem()
    batch, size = len(p.query), len(p.bank)
    ids, bank_ids = torch.arange(batch) + 100, torch.full((size,), -1)
    ids[2] = -1  # unknown: matches nothing, least of all the slots that are unknown
    free = (p.key @ p.bank.T).amax(0).argsort()
    unseen = torch.zeros(batch, size, dtype=torch.bool)
    for i in range(batch):
        for slot in free[3 * i : 3 * i + 3]:
            p.bank[slot] = cold.flipped(p.query[i], torch.tensor([int(slot) % 64]))
            bank_ids[slot] = 100 + i
            unseen[i, slot] = i != 2
    given = {"ids": ids, "bank_ids": bank_ids}
    for selection in ("bernoulli", "expected", "all"):
        check(p, dtype, backend, 0.02, unseen, given, selection=selection)


def test_more_copies_than_a_list_holds(backend):
    """Every third slot of 700 is a copy of row 0's sample, and half of them nobody may see."""
    p = cold.problem()
    bank_ids = torch.arange(len(p.bank)) % 3
    bank_ids[len(p.bank) // 2 :] = -2
    ids = torch.tensor([0, 0, 1, -1, 7, 2])
    unseen = (bank_ids == ids[:, None]) & (ids >= 0)[:, None] | (bank_ids == -2)
    check(p, torch.float32, backend, 0.05, unseen, {"ids": ids, "bank_ids": bank_ids})
