"""Sample identity: a query never meets its own older copies, and banks whose slots are samples."""

import copy

import pytest
import torch
from conftest import problem

from psm_kernels import (
    HCLLoss,
    InfoNCELoss,
    MemoryBank,
    MSFLoss,
    NNCLRLoss,
    PSMLoss,
    ReSSLLoss,
    SSCLLoss,
    SupConLoss,
    UnReMixLoss,
    functional,
)
from psm_kernels.ops import bank_pass, bank_topk
from psm_kernels.rows import unit_rows

LOSSES = {
    "psm": (PSMLoss, {"temperature": 0.1, "topk": 3}),
    "info_nce": (InfoNCELoss, {"temperature": 0.1}),
    "hcl": (HCLLoss, {"temperature": 0.1, "beta": 0.7, "tau_plus": 0.05}),
    "sscl": (SSCLLoss, {"temperature": 0.1, "num_hard": 4, "num_synthetic": 3}),
    "unremix": (UnReMixLoss, {"temperature": 0.1}),
    "supcon": (SupConLoss, {"temperature": 0.1}),
    "nnclr": (NNCLRLoss, {"temperature": 0.1}),
    "ressl": (ReSSLLoss, {"temperature": 0.1}),
    "msf": (MSFLoss, {"topk": 4}),
}
DRAWS = ("psm", "sscl")
LENDS_POSITIVES = ("nnclr", "msf")  # the bank does, alone: an empty one leaves a loss


def keys(batch=6, dim=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, batch, dim, generator=g).unbind()


def without(bank, bank_ids, own, size):
    """What a row sees of the bank, as a bank of its own."""
    seen = (bank_ids != own) | (bank_ids < 0)
    return bank[:size][seen[:size]].contiguous()


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("unremix", "nnclr")])
def test_hidden_slots_are_as_if_they_were_not_there(backend, name):
    """Row by row against a bank without its own copies. PSM: without noise."""
    query, key, bank, _ = problem(5, 60, 16)
    ids = torch.tensor([7, 3, -1, 9, 7])  # unknown; in no slot; twice in the batch
    bank_ids = torch.randint(-1, 9, (60,), generator=torch.Generator().manual_seed(1))
    bank_ids[50:] = 7  # beyond count
    labels, bank_labels = torch.arange(5) % 3, torch.arange(60) % 3
    loss = getattr(functional, f"{name}_loss")
    _, settings = LOSSES[name]
    settings = settings | ({"rng_state": torch.tensor([3, 4])} if name in DRAWS else {})
    settings |= {"selection": "all"} if name == "psm" else {}
    given = {"labels": labels, "bank_labels": bank_labels} if name == "supcon" else {}
    leaf = query.clone().requires_grad_()
    rows = loss(
        leaf, key, bank, count=50, ids=ids, bank_ids=bank_ids, reduction="none",
        backend=backend, **settings, **given,
    )  # fmt: skip
    rows.sum().backward()
    for i in range(5):
        one = query[i : i + 1].clone().requires_grad_()
        name_i = int(ids[i]) if ids[i] >= 0 else -9
        own = without(bank, bank_ids, name_i, 50)
        here = settings | ({"row_offset": i} if name in DRAWS else {})
        if given:
            of_own = without(bank_labels, bank_ids, name_i, 50)
            here |= {"labels": labels[i : i + 1], "bank_labels": of_own}
        want = loss(one, key[i : i + 1], own, reduction="none", backend="reference", **here)
        want.sum().backward()
        torch.testing.assert_close(rows[i : i + 1], want, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(leaf.grad[i : i + 1], one.grad, atol=1e-5, rtol=1e-4)


def test_unremix_weighs_what_a_row_sees(backend):
    """With one row all indicators are of what it sees; representativeness is the slot's alone."""
    query, key, bank, _ = problem(5, 60, 16)
    ids, bank_ids = torch.tensor([7, 3, -1, 9, 7]), torch.arange(60) % 9
    settings = {"representativeness_weight": 0.0, "temperature": 0.1, "reduction": "none"}
    leaf = query.clone().requires_grad_()
    rows = functional.unremix_loss(
        leaf, key, bank, ids=ids, bank_ids=bank_ids, backend=backend, **settings
    )
    rows.sum().backward()
    for i in range(5):
        one = query[i : i + 1].clone().requires_grad_()
        own = without(bank, bank_ids, int(ids[i]) if ids[i] >= 0 else -9, 60)
        want = functional.unremix_loss(one, key[i : i + 1], own, backend="reference", **settings)
        want.sum().backward()
        torch.testing.assert_close(rows[i : i + 1], want, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(leaf.grad[i : i + 1], one.grad, atol=1e-5, rtol=1e-4)
    both = functional.unremix_loss(query, key, bank, ids=ids, bank_ids=bank_ids, backend=backend)
    alike = functional.unremix_loss(
        query.double(), key.double(), bank.double(), ids=ids, bank_ids=bank_ids, backend="reference"
    )
    torch.testing.assert_close(both, alike.float())


@pytest.mark.parametrize("temperature", [0.05, 0.003])
def test_unremix_when_the_hidden_are_the_nearest(backend, temperature):
    """Exact copies of the queries: their exponentials, relative to what is seen, overflow."""
    query, key, bank, _ = problem(4, 90, 16)
    ids, bank_ids = torch.arange(4), torch.full((90,), -1)
    for slot, row in ((5, 0), (70, 1), (71, 1)):
        bank[slot], bank_ids[slot] = query[row], row
    found = []
    for dtype, own in ((torch.float64, "reference"), (torch.float32, backend)):
        leaf = query.to(dtype).requires_grad_()
        rows = functional.unremix_loss(
            leaf, key.to(dtype), bank.to(dtype), ids=ids, bank_ids=bank_ids,
            temperature=temperature, reduction="none", backend=own,
        )  # fmt: skip
        rows.sum().backward()
        found.append((rows.detach().float(), leaf.grad.float()))
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in LENDS_POSITIVES])
def test_a_bank_of_nothing_but_own_copies_is_an_empty_bank(backend, name):
    make, settings = LOSSES[name]
    criterion = make(memory_bank_size=(12, 8), backend=backend, **settings)
    query, key = keys()
    same = torch.full((6,), 5)
    for _ in range(3):
        leaf = query.clone().requires_grad_()
        loss = criterion(leaf, key, ids=same, labels=same)
        assert float(loss) == pytest.approx(0, abs=1e-6)
        loss.backward()
        assert leaf.grad.isfinite().all()
    other = criterion(query, key, ids=same + 1, labels=same)
    assert float(other) > 0.1


@pytest.mark.parametrize("negatives", ["bank", "neighbors"])
def test_own_copies_are_neither_mined_nor_negatives(backend, negatives):
    criterion = PSMLoss(0.1, (12, 8), topk=3, negatives=negatives, backend=backend)
    query, key = keys()
    ids = torch.tensor([0, 1, 2, 3, 4, -1])
    criterion(query, key, ids=ids)
    out = criterion(query, key, ids=ids, return_stats=True, labels=torch.arange(6), update=False)
    blind = criterion(query, key, return_stats=True, labels=torch.arange(6), update=False)
    assert out.stats.own_copies.tolist() == [1, 1, 1, 1, 1, 0]
    assert float(blind.stats.contrast_acc) <= float(out.stats.contrast_acc)
    assert float(out.loss) != float(blind.loss)


def test_mined_slots_and_lists(backend):
    """`exclude` in any order, twice, outside the bank; -1 names nothing."""
    query, key, bank, s_pos = problem(4, 90, 16)
    _, first = bank_topk(key, bank, 4, backend=backend)
    exclude = torch.tensor([[-1, -1, -1], [0, 0, 5], [90, 1000, -7], [89, 1, 89]])
    exclude[0, 1] = first[0, 0]
    _, index = bank_topk(key, bank, 90, exclude=exclude, backend=backend)
    for i in range(4):
        hidden = {int(j) for j in exclude[i] if 0 <= j < 90}
        found = [int(j) for j in index[i] if j >= 0]
        assert sorted(found) == [j for j in range(90) if j not in hidden]
    got = bank_pass(
        query, key, bank, None, s_pos, temperature=0.1, topk=4, exclude=exclude,
        exclude_mined=True, backend=backend,
    )  # fmt: skip
    want = bank_pass(
        query.double(), key.double(), bank.double(), None, s_pos, temperature=0.1, topk=4,
        exclude=exclude, exclude_mined=True, backend="reference",
    )  # fmt: skip
    assert int(first[0, 0]) not in got.topk_index[0].tolist()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b.double(), atol=1e-5, rtol=1e-5)
    assert got.neg_count.tolist() == [90 - 4 - 1, 90 - 4 - 2, 90 - 4, 90 - 4 - 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exclude": torch.zeros(4, 65, dtype=torch.int64)}, "exclude: got 65 .* at most 64"),
        ({"exclude": torch.zeros(3, 2, dtype=torch.int64)}, "exclude: got"),
        ({"exclude": torch.zeros(4, 2)}, "exclude: got dtype"),
        ({"exclude": [1, 2]}, "exclude: got list"),
        ({"ids": torch.arange(4)}, "bank_ids: got None"),
        ({"ids": torch.arange(5), "bank_ids": torch.arange(90)}, "ids: got"),
        ({"ids": torch.arange(4), "bank_ids": torch.arange(9)}, "bank_ids: got"),
        ({"ids": torch.ones(4), "bank_ids": torch.arange(90)}, "ids: got dtype"),
        ({"exclude_mined": "yes"}, "exclude_mined: got 'yes'"),
    ],
)
def test_bad_exclusions(change, message):
    query, _, bank, s_pos = problem(4, 90, 16)
    with pytest.raises(ValueError, match=f"^{message}"):
        bank_pass(query, None, bank, None, s_pos, temperature=0.1, **change)


# --- the bank ------------------------------------------------------------------------------------


def test_the_ring_keeps_ids():
    bank = MemoryBank(5, 4)
    bank.enqueue(torch.randn(3, 4), ids=torch.tensor([10, -3, 12]))
    bank.enqueue(torch.randn(1, 4))
    bank.enqueue(torch.randn(2, 4), ids=torch.tensor([20, 21]))
    assert bank.ids.tolist() == [21, -1, 12, -1, 20]


def test_a_checkpoint_without_ids_loads(backend):
    """Of version 0.1: what it holds is of unknown samples."""
    old = PSMLoss(0.2, (12, 8), topk=3, backend=backend)
    for seed in range(3):
        old(*keys(seed=seed), ids=torch.arange(6))
    state = {name: x for name, x in old.state_dict().items() if not name.endswith(".ids")}
    new = PSMLoss(0.2, (12, 8), topk=3, backend=backend)
    new.load_state_dict(state)
    assert new.memory_bank.ids.tolist() == [-1] * 12
    assert torch.equal(new.memory_bank.bank, old.memory_bank.bank)
    assert new(*keys(), ids=torch.arange(6)).isfinite()


def test_an_indexed_bank_holds_each_sample_once():
    bank = MemoryBank(6, 4, indexed=True)
    rows = torch.randn(4, 4)
    bank.enqueue(rows, torch.tensor([1, 2, 3, 4]), ids=torch.tensor([5, 0, 5, 2]))
    unit = unit_rows(rows)
    assert torch.equal(bank.bank[[5, 0, 2]], unit[[2, 1, 3]])  # of two with one id the last
    assert bank.ids.tolist() == [0, -2, 2, -2, -2, 5]
    assert bank.labels.tolist() == [2, -1, 4, -1, -1, 3]
    assert int(bank.count) == 3
    bank.enqueue(rows[:1], ids=torch.tensor([0]))
    assert int(bank.count) == 3
    assert torch.equal(bank.bank[0], unit[0])
    assert bank.labels[0] == -1
    bank.reset()
    assert (int(bank.count), bank.ids.tolist()) == (0, [-2] * 6)


def test_an_indexed_row_may_move_slowly():
    bank = MemoryBank(3, 4, indexed=True, momentum=0.75)
    old, new = unit_rows(torch.randn(2, 4))
    bank.enqueue(old[None], ids=torch.tensor([1]))
    torch.testing.assert_close(bank.bank[1], old)  # nothing to mix the first key with
    bank.enqueue(new[None], ids=torch.tensor([1]))
    torch.testing.assert_close(bank.bank[1], unit_rows(0.75 * old[None] + 0.25 * new)[0])


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (None, "ids: got None"),
        (torch.tensor([0, 6]), "ids: got 6, wanted 0 to 5"),
        (torch.tensor([-1, 2]), "ids: got -1, wanted 0 to 5"),
        (torch.tensor([1]), "ids: got"),
        (torch.tensor([1, 2], dtype=torch.int32), "ids: got dtype"),
    ],
)
def test_wrong_ids_are_refused_with_the_state_untouched(ids, message):
    criterion = PSMLoss(0.2, (6, 8), topk=2, indexed_bank=True)
    query, key = keys(2)
    criterion(query, key, ids=torch.tensor([3, 4]))
    before = {name: value.clone() for name, value in criterion.state_dict().items()}
    for call in (lambda: criterion(query, key, ids=ids), lambda: criterion.enqueue(key, ids=ids)):
        with pytest.raises(ValueError, match=f"^{message}"):
            call()
    for name, value in criterion.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("name", LOSSES)
def test_an_indexed_bank_with_holes_is_what_it_holds(backend, name):
    """Slots that hold nothing are not there, whatever the order of writing."""
    make, settings = LOSSES[name]
    settings = settings | ({"selection": "all"} if name == "psm" else {})
    query, key = keys()
    labels = torch.arange(6) % 3
    criterion = make(memory_bank_size=(40, 8), indexed_bank=True, backend=backend, **settings)
    nothing = float(criterion(query, key, labels=labels, update=False))
    assert nothing == pytest.approx(0, abs=1e-6) or name in LENDS_POSITIVES
    for seed in (1, 2):
        order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
        criterion.enqueue(keys(12, seed=seed)[1], torch.arange(12) % 3, ids=order[:12])
    bank = criterion.memory_bank
    there = bank.ids >= 0
    assert int(bank.count) == int(there.sum()) < 24
    more = {"rng_state": criterion.rng_state.clone()} if name in DRAWS else {}
    more |= {"labels": labels, "bank_labels": bank.labels[there]} if name == "supcon" else {}
    got = criterion(query, key, ids=torch.arange(6) + 100, labels=labels, update=False)
    want = getattr(functional, f"{name}_loss")(
        query, key, bank.bank[there].contiguous(), backend=backend, **settings, **more
    )
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


def test_an_indexed_run_resumes_bit_for_bit(backend):
    def make():
        return PSMLoss(0.2, (20, 8), topk=3, indexed_bank=True, backend=backend)

    run, resumed = make(), make()
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    steps = [(*keys(seed=n), order[5 * n % 15 :][:6]) for n in range(6)]
    for query, key, ids in steps[:3]:
        run(query, key, ids=ids[: len(query)])
    resumed.load_state_dict(copy.deepcopy(run.state_dict()))
    for query, key, ids in steps[3:]:
        a, b = (one(query[: len(ids)], key[: len(ids)], ids=ids) for one in (run, resumed))
        assert torch.equal(a, b)
    for name, value in run.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_the_two_kinds_of_banks_do_not_load_each_other():
    ring, indexed = MemoryBank(4, 2), MemoryBank(4, 2, indexed=True)
    ring.enqueue(torch.randn(3, 2), ids=torch.tensor([9, 8, 7]))
    indexed.enqueue(torch.randn(1, 2), ids=torch.tensor([2]))
    with pytest.raises(ValueError, match=r"^ids: .*of a ring"):
        indexed.load_state_dict(ring.state_dict())
    with pytest.raises(ValueError, match=r"^ids: .*indexed"):
        ring.load_state_dict(indexed.state_dict())
    assert ring.ids.tolist() == [9, 8, 7, -1]


@pytest.mark.parametrize("indexed", [False, True])
def test_compiles_whole_with_ids(backend, indexed):
    """No graph break means no host synchronization; the ring of 20 wraps in the third batch."""
    settings = {"topk": 3, "indexed_bank": indexed, "backend": backend}
    eager, module = (PSMLoss(0.2, (20, 8), **settings) for _ in range(2))
    compiled = torch.compile(module, fullgraph=True)
    for seed in range(4):
        query, key = keys(9, seed=seed)
        ids = torch.randint(0, 20, (9,), generator=torch.Generator().manual_seed(seed))
        a, b = query.clone().requires_grad_(), query.clone().requires_grad_()
        x, y = eager(a, key, ids=ids), compiled(b, key, ids=ids)
        torch.testing.assert_close(x, y)
        x.backward()
        y.backward()
        torch.testing.assert_close(a.grad, b.grad)
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(value, module.state_dict()[name])


def test_without_a_bank_there_are_no_ids():
    with pytest.raises(ValueError, match=r"^ids: got a tensor, wanted None"):
        InfoNCELoss(0.2, 0)(*keys(), ids=torch.arange(6))
    with pytest.raises(ValueError, match=r"indexed_bank"):
        InfoNCELoss(0.2, 0, indexed_bank=True)


def test_memory_stays_far_below_batch_times_bank(backend):
    """B K bytes = 16 MB; every id is in the bank 64 times."""
    if backend == "reference":
        pytest.skip("the oracle writes B x K matrices on purpose")
    from torch.profiler import ProfilerActivity, profile

    query, key, bank, _ = problem(256, 65536, 16)
    ids, bank_ids = torch.arange(256), torch.arange(65536) % 1024
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        functional.psm_loss(query, key, bank, ids=ids, bank_ids=bank_ids, backend=backend)
    largest = max(event.cpu_memory_usage for event in trace.events())
    assert largest < 6 << 20
