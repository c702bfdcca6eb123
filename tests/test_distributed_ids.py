"""Sample ids and indexed banks over processes against one process, and noise that got apart."""

import pytest
import torch
from ranks import BATCH, DIM, At, unit, whole_batch

from psm_kernels import (
    HCLLoss,
    InfoNCELoss,
    MSFLoss,
    PSMLoss,
    ReSSLLoss,
    SSCLLoss,
    SupConLoss,
)

SIZE = 41  # no world size divides it
LOSSES = {
    "psm": (PSMLoss, {"temperature": 0.1, "topk": 4, "a": 2.0}),
    "neighbors": (PSMLoss, {"temperature": 0.1, "topk": 3, "negatives": "neighbors"}),
    "info_nce": (InfoNCELoss, {"temperature": 0.1}),
    "hcl": (HCLLoss, {"temperature": 0.1, "beta": 0.5}),
    "sscl": (SSCLLoss, {"temperature": 0.1, "num_hard": 6}),
    "supcon": (SupConLoss, {"temperature": 0.1}),
    "ressl": (ReSSLLoss, {"temperature": 0.1}),
    "msf": (MSFLoss, {"topk": 4}),
}


def make(at, name, **options):
    cls, settings = LOSSES[name]
    fixed = {"bank_dtype": torch.float64, "reduction": "none", "process_group": at.group}
    return cls(memory_bank_size=(SIZE, DIM), **fixed, **settings, **options)


def ids_of(number):
    """Samples come again, also within a batch; two are unknown in the ring."""
    return (torch.arange(BATCH) * 3 + 5 * number) % 17


def steps(at, name, options, state, number=3):
    criterion = make(at, name, **options)
    criterion.load_state_dict(state)
    query, key = (at.own(x) for x in whole_batch()[:2])
    results = []
    for n in range(number):
        leaf = query.clone().requires_grad_()
        ids = ids_of(n) if options.get("indexed_bank") else ids_of(n).where(ids_of(n) > 2, -1)
        own = at.own(ids)
        copies = criterion.memory_bank.copies(own)
        loss = criterion(leaf, key, ids=own, labels=at.own(ids_of(n) % 3))
        loss.mean().backward()
        results.append({"loss": loss.detach(), "grad": leaf.grad, "copies": copies})
    count = criterion.memory_bank.count.clone()
    return results, count


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("flag", ["shard_bank", "gather_distributed"])
@pytest.mark.parametrize("name", [name for name in LOSSES if name != "neighbors"])
def test_equal_to_one_process(pool, name, flag, indexed):
    alone = At(0, 1, None)
    single = make(alone, name, indexed_bank=indexed)
    first = torch.arange(20) if indexed else torch.arange(20) % 7
    single.enqueue(unit(20, seed=7), first % 3, ids=first)
    state = single.state_dict()
    worlds = (2, 4) if name in ("psm", "supcon") else (2,)
    want, count = steps(alone, name, {"indexed_bank": indexed}, state)
    assert sum(int(row["copies"].sum()) for row in want) > 10
    for world in worlds:
        got = pool.run(steps, world, name, {flag: True, "indexed_bank": indexed}, state)
        assert all(int(c) == int(count) for _, c in got)
        for n in range(len(want)):
            ranks = [results[n] for results, _ in got]
            whole = {key: torch.cat([rank[key] for rank in ranks]) for key in ranks[0]}
            whole["grad"] = whole["grad"] / world
            for key, value in whole.items():
                torch.testing.assert_close(
                    value, want[n][key], rtol=1e-10, atol=1e-12,
                    msg=lambda m, k=key, n=n: f"step {n} {k}: {m}",
                )  # fmt: skip


def statistics(at, state, options):
    criterion = PSMLoss(
        0.2, (SIZE, DIM), bank_dtype=torch.float64, reduction="none", process_group=at.group,
        **options,
    )  # fmt: skip
    criterion.load_state_dict(state)
    query, key, projection, labels = (at.own(x) for x in whole_batch())
    out = criterion(
        query, key, projection=projection, labels=labels, ids=at.own(ids_of(0)),
        return_stats=True,
    )  # fmt: skip
    stats = vars(out.stats)
    return {n: stats[n] for n in ("kept_count", "grad_mean", "grad_var", "own_copies")}


def test_statistics_of_a_shard(pool):
    alone = At(0, 1, None)
    single = PSMLoss(0.2, (SIZE, DIM), bank_dtype=torch.float64)
    single.enqueue(unit(30, seed=7), ids=torch.arange(30) % 9)
    state = single.state_dict()
    want = statistics(alone, state, {})
    got = pool.run(statistics, 2, state, {"shard_bank": True})
    for name, value in want.items():
        torch.testing.assert_close(torch.cat([rank[name] for rank in got]), value)


def save_and_load(at, state, indexed):
    criterion = make(at, "psm", shard_bank=True, indexed_bank=indexed)
    criterion.load_state_dict(state)
    again = make(at, "psm", shard_bank=True, indexed_bank=indexed)
    again.load_state_dict(criterion.state_dict())
    return again.memory_bank.ids[torch.arange(SIZE)]


@pytest.mark.parametrize("indexed", [False, True])
def test_ids_are_saved_and_loaded_by_shards(pool, indexed):
    single = make(At(0, 1, None), "psm", indexed_bank=indexed)
    single.enqueue(unit(9, seed=7), ids=torch.arange(9) * 4)
    for held in pool.run(save_and_load, 2, single.state_dict(), indexed):
        assert torch.equal(held, single.memory_bank.ids)


def one_rank_brings_ids(at):
    criterion = make(at, "psm", shard_bank=True)
    query, key = (at.own(x) for x in whole_batch()[:2])
    criterion(query, key, ids=torch.arange(len(key)) if at.rank else None)


def test_ids_on_some_ranks_are_refused_on_all(pool):
    for error in pool.refused(one_rank_brings_ids, 2):
        assert "ids given: got [False, True]" in error


def validate_alone(at, flag, evaluate):
    """Rank 0 calls once more; then all go on."""
    criterion = make(at, "psm", **{flag: True})
    batch = [at.own(x) for x in whole_batch()[:2]]
    criterion(*batch)
    if at.rank == 0:
        criterion.train(not evaluate)
        criterion(*batch, update=False)
        criterion.train()
    return criterion(*batch)


def test_a_rank_that_validates_alone_leaves_nobody_behind(pool):
    apart = torch.cat(pool.run(validate_alone, 2, "gather_distributed", True))
    together = validate_alone(At(0, 1, None), "gather_distributed", True)
    torch.testing.assert_close(apart, together)


def test_a_rank_that_trains_alone_is_noticed(pool):
    for error in pool.refused(validate_alone, 2, "gather_distributed", False):
        assert "calls so far: got [2, 1]" in error


def both_directions(at, state, options):
    criterion = make(at, "psm", **options)
    criterion.load_state_dict(state)
    q1, k2, q2, _ = (at.own(x) for x in (*whole_batch()[:3], whole_batch()[0]))
    losses = criterion.symmetric(q1, k2, q2, k2, ids=at.own(ids_of(0)))
    return losses, criterion.memory_bank.count.clone()


@pytest.mark.parametrize("flag", ["shard_bank", "gather_distributed"])
def test_both_directions_equal_one_process(pool, flag):
    single = make(At(0, 1, None), "psm")
    single.enqueue(unit(20, seed=7), ids=torch.arange(20) % 7)
    state = single.state_dict()
    want, count = both_directions(At(0, 1, None), state, {})
    for world in (2, 4):
        got = pool.run(both_directions, world, state, {flag: True})
        torch.testing.assert_close(torch.cat([x for x, _ in got]), want, rtol=1e-10, atol=1e-12)
        assert all(int(c) == int(count) for _, c in got)


def one_rank_brings_a_wrong_id(at, flag):
    criterion = make(at, "psm", **{flag: True, "indexed_bank": True})
    q1, k2 = (at.own(x) for x in whole_batch()[:2])
    ids = torch.arange(len(q1)) + (SIZE if at.rank else 0)
    criterion.symmetric(q1, k2, q1, k2, ids=ids)


@pytest.mark.parametrize("flag", ["shard_bank", "gather_distributed"])
def test_a_wrong_id_in_both_directions_is_refused_on_all(pool, flag):
    for error in pool.refused(one_rank_brings_a_wrong_id, 2, flag):
        assert "ids: got 41, wanted 0 to 40" in error
