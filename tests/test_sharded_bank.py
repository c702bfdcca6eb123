"""A bank divided over 1, 2 and 4 processes against one process with the whole batch and bank."""

import pytest
import torch
from ranks import BATCH, DIM, WORLDS, At, few_bits, filled, joined, step, unit, whole_batch

from psm_kernels import (
    HCLLoss,
    InfoNCELoss,
    MSFLoss,
    NNCLRLoss,
    PSMLoss,
    ReSSLLoss,
    SSCLLoss,
    SupConLoss,
)
from psm_kernels.bank import Shard, view_of
from psm_kernels.ops import BankPass, bank_pass
from psm_kernels.options import PassOptions


def sharded_steps(at, size, settings, state, steps):
    criterion = PSMLoss(
        0.2,
        (size, DIM),
        bank_dtype=torch.float64,
        shard_bank=True,
        process_group=at.group,
        **settings,
    )
    criterion.load_state_dict(state)
    batch = [at.own(x) for x in whole_batch()]
    return [step(criterion, *batch) for _ in range(steps)]


@pytest.mark.parametrize("count", [0, 3, 101], ids=["empty", "partly", "full"])
@pytest.mark.parametrize("topk", [0, 5])
@pytest.mark.parametrize("selection", ["bernoulli", "expected", "all"])
@pytest.mark.parametrize("world", WORLDS)
def test_sharded_loss_and_gradient_equal_one_process(pool, world, selection, topk, count):
    """101 slots: no world size divides them. The second step has read the first one's writes,
    which wrap around when the bank is full."""
    settings = {"selection": selection, "topk": topk, "reduction": "none", "b": 0.1, "a": 2.0}
    single = filled(count, 101, **settings)
    state = single.state_dict()
    got = pool.run(sharded_steps, world, 101, settings, state, 2)
    for i, results in enumerate(zip(*got, strict=True)):
        expected = step(single, *whole_batch())
        for name, value in joined(results, world).items():
            tolerance = {"rtol": 1e-10, "atol": 1e-12}
            torch.testing.assert_close(
                value, expected[name], **tolerance, msg=lambda m, n=name, i=i: f"step {i} {n}: {m}"
            )


@pytest.mark.parametrize("settings", [{"soft_weights": "uniform"}, {"soft_weights": "binary"}])
@pytest.mark.parametrize("world", [2, 4])
def test_other_weights(pool, world, settings):
    settings = settings | {"reduction": "none", "hard_weight": 0.5}
    single = filled(60, 64, **settings)
    got = pool.run(sharded_steps, world, 64, settings, single.state_dict(), 1)
    expected = step(single, *whole_batch())
    for name, value in joined([r[0] for r in got], world).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-12)


KIN = {
    "info_nce": (InfoNCELoss, {"temperature": 0.2}),
    "hcl": (HCLLoss, {"temperature": 0.2, "beta": 0.5}),
    "sscl": (SSCLLoss, {"temperature": 0.2, "num_hard": 6}),
    "supcon": (SupConLoss, {"temperature": 0.2}),
    "ressl": (ReSSLLoss, {"temperature": 0.2, "teacher_temperature": 0.1}),
    "msf": (MSFLoss, {"topk": 4}),
    "nnclr": (NNCLRLoss, {"temperature": 0.2}),
}
each_way = pytest.mark.parametrize(
    "options", [{"shard_bank": True}, {"gather_distributed": True}], ids=str
)


def make_kin(name, state, **options):
    cls, settings = KIN[name]
    settings = {"memory_bank_size": (40, DIM), "bank_dtype": torch.float64, **settings}
    criterion = cls(**settings, **options)
    criterion.load_state_dict(state)
    return criterion


def kin_steps(at, name, options, state, steps):
    criterion, results = make_kin(name, state, process_group=at.group, **options), []
    for _ in range(steps):
        query, key, _, labels = (at.own(x) for x in whole_batch())
        query = query.clone().requires_grad_()
        loss = criterion(query, key, labels=labels)
        loss.backward()
        results.append((loss.detach(), query.grad / at.world))
    return results


def kin_state(name):
    cls, settings = KIN[name]
    single = cls(memory_bank_size=(40, DIM), bank_dtype=torch.float64, **settings)
    single.enqueue(unit(30, seed=7), torch.arange(30) % 4)
    return single.state_dict()


@each_way
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", [name for name in KIN if name != "nnclr"])
def test_kin_equal_one_process(pool, name, world, options):
    state = kin_state(name)
    got = pool.run(kin_steps, world, name, options, state, 2)
    expected = kin_steps(At(0, 1, None), name, {}, state, 2)
    for ranks, (loss, grad) in zip(zip(*got, strict=True), expected, strict=True):
        torch.testing.assert_close(sum(r[0] for r in ranks) / world, loss, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(torch.cat([r[1] for r in ranks]), grad, rtol=1e-10, atol=1e-12)


@each_way
@pytest.mark.parametrize("world", WORLDS)
def test_nnclr_compares_the_queries_of_its_own_rank(pool, world, options):
    """Neighbors come from all slots; the batch is one process's."""
    state = kin_state("nnclr")
    got = pool.run(kin_steps, world, "nnclr", options, state, 2)
    single = make_kin("nnclr", state)
    query, key, *_ = whole_batch()
    for ranks in zip(*got, strict=True):
        for rank, (loss, grad) in enumerate(ranks):
            at = At(rank, world, None)
            leaf = at.own(query).clone().requires_grad_()
            want = single(leaf, at.own(key), update=False)
            want.backward()
            torch.testing.assert_close(loss, want.detach(), rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(grad, leaf.grad / world, rtol=1e-10, atol=1e-12)
        single.enqueue(key)


@each_way
def test_kin_that_cannot_be_distributed(pool, options):
    errors = pool.refused(kin_without_bank, 2, options)
    assert all("memory_bank_size: got 0" in error for error in errors)


def kin_without_bank(at, options):
    HCLLoss(process_group=at.group, **options)


def sharded_operators(at, query, key, bank, labels, count, settings):
    rows = torch.zeros(-(-len(bank) // at.world) + 1, *bank.shape[1:], dtype=bank.dtype)
    shard = Shard(rows, len(bank), at.group)
    own = bank[shard.start :][: shard.per_rank]
    rows[: len(own)] = own
    rows[len(own) :] = torch.nan  # neither the scrap row nor slots beyond K may matter
    label_rows = labels.new_full((len(rows),), -7)
    label_rows[: len(own)] = labels[shard.start :][: shard.per_rank]
    query, key = at.own(query), at.own(key)
    settings = dict(settings, row_offset=at.rank * len(query))
    rng_state, view = settings.pop("rng_state"), view_of(shard, count)
    s_pos = (query * key).sum(1)
    found = view.scan(query, key, s_pos, PassOptions(**settings), rng_state=rng_state)
    index = found.topk_index.clamp_min(0)
    label_shard = Shard(label_rows, len(bank), at.group)
    nearest = view.topk(query, 3)
    return tuple(found), nearest, shard[index], label_shard[index]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("size", "count"), [(90, 90), (90, 50), (5, 5), (3, 1)])
def test_mined_slots_rows_and_counts_are_exact(pool, world, dtype, size, count):
    """Exact products, many ties and duplicates: every mask bit and index must agree. Of 3 slots on
    4 ranks the last rank has none; 20 mined exceed most shards, 5 and 3 even the whole bank."""
    query, key, bank = few_bits(BATCH, 1), few_bits(BATCH, 2), few_bits(size, 3).to(dtype)
    bank[size // 2 :] = bank[: size - size // 2].clone()
    labels, count = torch.arange(size) % 5, torch.tensor(count)
    settings = {
        "temperature": 0.1,
        "selection": "bernoulli",
        "topk": 20,
        "rng_state": torch.tensor([3, 4]),
    }
    got = pool.run(sharded_operators, world, query, key, bank, labels, count, settings)
    expected = bank_pass(query, key, bank, count, (query * key).sum(1), **settings)
    whole = BankPass(*(torch.cat(parts) for parts in zip(*(g[0] for g in got), strict=True)))
    for name in ("neg_count", "topk_sim", "topk_index"):
        assert torch.equal(getattr(whole, name), getattr(expected, name)), name
    # Kernels round the softmax to a bfloat16 bank's dtype before the second product.
    loose = {"rtol": 2**-8, "atol": 2**-10} if dtype is torch.bfloat16 else {}
    for name in ("neg_lse", "neg_mean", "neg_sq_lse"):
        torch.testing.assert_close(getattr(whole, name), getattr(expected, name), **loose)
    similarity, index = bank_pass(
        query, query, bank, count, (query * key).sum(1), **settings | {"topk": 3}
    )[4:]
    assert torch.equal(torch.cat([g[1][0] for g in got]), similarity)
    assert torch.equal(torch.cat([g[1][1] for g in got]), index)
    there = expected.topk_index >= 0
    index = expected.topk_index[there]
    assert torch.equal(torch.cat([g[2] for g in got])[there], bank[index])
    assert torch.equal(torch.cat([g[3] for g in got])[there], labels[index])


def spoiled_step(at, query, key, state):
    criterion = PSMLoss(0.2, (40, DIM), reduction="none", shard_bank=True, process_group=at.group)
    criterion.load_state_dict(state)
    return criterion(at.own(query), at.own(key), update=False).detach()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_row_spoils_itself_alone(pool, value):
    single = PSMLoss(0.2, (40, DIM), reduction="none")
    single.enqueue(unit(40, 7).float())
    query, key = unit(BATCH, 1).float(), unit(BATCH, 2).float()
    query[2], key[5] = value, value
    loss = torch.cat(pool.run(spoiled_step, 4, query, key, single.state_dict()))
    good = torch.tensor([i not in (2, 5) for i in range(BATCH)])
    assert loss[~good].isnan().all()
    torch.testing.assert_close(loss[good], single(query, key, update=False)[good])


def neighbors(at, state):
    criterion = PSMLoss(
        0.2,
        (20, DIM),
        negatives="neighbors",
        bank_dtype=torch.float64,
        shard_bank=True,
        process_group=at.group,
    )
    criterion.load_state_dict(state)
    query, key, *_ = whole_batch()
    return criterion(at.own(query), at.own(key), update=False).item()


def test_neighbors_mine_from_all_shards(pool):
    """Their negatives are the rank's own batch, as in the released code."""
    single = filled(20, 20, negatives="neighbors")
    query, key, *_ = whole_batch()
    for rank, loss in enumerate(pool.run(neighbors, 2, single.state_dict())):
        half = slice(4 * rank, 4 * rank + 4)
        expected = single_neighbors(single, query[half], key[half], row_offset=4 * rank)
        assert loss == pytest.approx(expected.item(), rel=1e-10)


def single_neighbors(criterion, query, key, row_offset):
    from psm_kernels.functional import psm_loss

    return psm_loss(
        query,
        key,
        criterion.memory_bank.bank,
        temperature=0.2,
        rng_state=criterion.rng_state,
        row_offset=row_offset,
        **criterion.settings,
    )
