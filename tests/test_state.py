"""The state of a loss: on the meta device, averaged, broadcast, copied, changed later."""

import copy
import pickle

import pytest
import torch
from torch import nn

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
)

LOSSES = [
    *(PSMLoss, InfoNCELoss, HCLLoss, SSCLLoss, UnReMixLoss),
    *(NNCLRLoss, SupConLoss, ReSSLLoss, MSFLoss),
]


def keys(batch=6, dim=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, batch, dim, generator=g).unbind()


def make(kind=PSMLoss, size=40, **settings):
    temperature = {} if kind is MSFLoss else {"temperature": 0.2}
    return kind(memory_bank_size=(size, 8), **temperature, **settings)


def trained(kind=PSMLoss, steps=3, **settings):
    criterion = make(kind, **settings)
    for seed in range(steps):
        criterion(*keys(seed=seed), labels=torch.arange(6), ids=torch.arange(6) + 10 * seed)
    return criterion


def assert_equal(a: nn.Module, b: nn.Module):
    for (name, x), (_, y) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("kind", LOSSES)
def test_meta_device_then_reset_parameters_is_fresh(kind, indexed):
    """The convention of FSDP2 and torchtitan: to_empty, then reset_parameters of each."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8), make(kind, seed=5, indexed_bank=indexed))
    assert all(value.is_meta for value in model.state_dict().values())
    model.to_empty(device="cpu")
    for value in model.state_dict().values():
        value.fill_(3)  # whatever the memory held
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert_equal(model[1], make(kind, seed=5, indexed_bank=indexed))


def test_reset_parameters_of_a_trained_loss_is_fresh():
    criterion = trained(seed=5)
    criterion.reset_parameters()
    assert_equal(criterion, make(seed=5))


def test_averaged_copies_leave_the_bank_alone():
    """As Lightning averages: parameters and buffers."""
    model = nn.Sequential(nn.Linear(8, 8), trained())
    averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    for seed in range(5, 9):
        model[1](*keys(seed=seed))
        averaged.update_parameters(model)
    assert_equal(averaged.module[1], trained())


def test_nobody_finds_the_bank_among_buffers():
    """DDP broadcasts buffers, AveragedModel averages them."""
    for criterion in (trained(), trained(SSCLLoss)):
        assert not list(criterion.buffers())
        assert set(criterion.state_dict()) == {
            "rng_state", *(f"memory_bank.{n}" for n in ("bank", "labels", "ids", "ptr", "count"))
        }  # fmt: skip


def test_a_state_dict_averaged_by_hand_is_refused():
    a, b = trained().state_dict(), trained(steps=4).state_dict()
    mean = {name: (a[name] + b[name]) / 2 for name in a}
    criterion = make()
    with pytest.raises(RuntimeError, match="a bank cannot be averaged"):
        criterion.load_state_dict(mean)
    assert_equal(criterion, make())


def test_copies_moves_and_pickles():
    criterion = trained()
    again = pickle.loads(pickle.dumps(criterion))
    for twin in (copy.deepcopy(criterion), again, copy.deepcopy(criterion).to("cpu")):
        assert_equal(twin, criterion)
        assert twin.memory_bank.bank.data_ptr() != criterion.memory_bank.bank.data_ptr()
    low = copy.deepcopy(criterion).to(torch.bfloat16)
    assert low.memory_bank.bank.dtype is torch.bfloat16
    assert low.memory_bank.ids.dtype is torch.int64


def test_a_meta_bank_is_assigned():
    with torch.device("meta"):
        bank = MemoryBank(40, 8)
    bank.load_state_dict(trained().memory_bank.state_dict(), assign=True)
    assert_equal(bank, trained().memory_bank)


def test_a_missing_key_is_named():
    state = trained().state_dict()
    del state["memory_bank.count"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"memory_bank\.count"'):
        make().load_state_dict(state)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"memory_bank\.more"'):
        make().load_state_dict(trained().state_dict() | {"memory_bank.more": torch.ones(1)})


# --- evaluation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [PSMLoss, SSCLLoss])
def test_evaluation_leaves_the_run_as_it_was(kind):
    run, other = trained(kind), trained(kind)
    run.eval()
    with torch.no_grad():
        first, second = (run(*keys(seed=9)) for _ in range(2))
    assert torch.equal(first, second)
    run.train()
    assert_equal(run, other)
    assert torch.equal(run(*keys(seed=4)), other(*keys(seed=4)))
    assert run.rng_state.tolist() == [0, 4]


def test_a_micro_batch_draws_anew():
    criterion = trained()
    first, second = (criterion(*keys(seed=9), update=False) for _ in range(2))
    assert float(first) != float(second)


# --- settings that change ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0.1), ("topk", 1), ("a", 9.0), ("b", 0.3), ("selection", "all"),
        ("soft_weights", "binary"), ("weight_temperature", 0.1), ("hard_weight", 0.0),
        ("negatives", "neighbors"), ("reduction", "sum"), ("seed", 7), ("backend", "reference"),
    ],
)  # fmt: skip
def test_what_is_set_later_is_as_if_it_had_been_given(name, value):
    late, early = make(), make(**({} if name == "temperature" else {name: value}))
    if name == "temperature":
        early = PSMLoss(value, (40, 8))
    setattr(late, name, value)
    for criterion in (late, early):
        for seed in range(2):
            criterion.enqueue(keys(seed=seed)[1])
    assert torch.equal(late(*keys(seed=5)), early(*keys(seed=5)))
    assert getattr(late, name) == value
    assert repr(late) == repr(early)


def test_a_new_seed_starts_the_noise_again():
    criterion = trained()
    criterion.seed = 8
    assert criterion.rng_state.tolist() == [8, 0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0.0),
        ("temperature", torch.tensor(0.1)),
        ("temperature", nn.Parameter(torch.tensor(0.1))),
        ("topk", 41),
        ("selection", "x"),
        ("reduction", "x"),
        ("seed", 0.5),
        ("backend", "x"),
        ("bank_dtype", torch.float16),
        ("memory_bank_size", (3, 8)),
        ("shard_bank", True),
        ("gather_distributed", True),
        ("indexed_bank", True),
        ("process_group", 3),
    ],
)
def test_what_cannot_be_set_is_refused(name, value):
    criterion = trained()
    text = repr(criterion)
    with pytest.raises(ValueError, match=f"^{name}: got .*wanted"):
        setattr(criterion, name, value)
    assert repr(criterion) == text
    assert_equal(criterion, trained())
    assert not list(criterion.parameters())


# --- both directions -----------------------------------------------------------------------------


@pytest.mark.parametrize("negatives", ["bank", "neighbors"])
@pytest.mark.parametrize("kind", LOSSES)
def test_both_directions_see_the_bank_as_it_was(kind, negatives):
    settings = {"selection": "all", "negatives": negatives} if kind is PSMLoss else {}
    criterion = trained(kind, **settings)
    before = copy.deepcopy(criterion.state_dict())
    q1, k2 = keys(seed=7)
    q2, k1 = keys(seed=8)
    ids, labels = torch.arange(6), torch.arange(6)
    one, two = (criterion(q, k, labels=labels, update=False) for q, k in ((q1, k2), (q2, k1)))
    criterion.load_state_dict(before)
    leaf = q1.clone().requires_grad_()
    got = criterion.symmetric(leaf, k2, q2, k1, ids=ids + 90, labels=labels)
    if kind is not SSCLLoss:  # the noise of a row is that of its place
        torch.testing.assert_close(got, (one + two) / 2)
    got.backward()
    assert leaf.grad.abs().sum() > 0
    bank = criterion.memory_bank
    assert int(bank.count) == 24
    torch.testing.assert_close(bank.bank[18:24], nn.functional.normalize(k2))
    assert bank.ids[18:24].tolist() == (ids + 90).tolist()


def test_symmetric_options():
    criterion = trained(reduction="none")
    q1, k2 = keys(seed=7)
    q2, k1 = keys(seed=8)
    out = criterion.symmetric(q1, k2, q2, k1, projection=(q2, q1), return_stats=True)
    assert out.loss.shape == out.stats.kept_count.shape == (12,)
    criterion.symmetric(q1, k2, q2, k1, enqueue_both=True)
    torch.testing.assert_close(criterion.memory_bank.bank[24:30], nn.functional.normalize(k2))
    torch.testing.assert_close(criterion.memory_bank.bank[30:36], nn.functional.normalize(k1))
    calm = trained(reduction="none", selection="all")
    one, two = (calm(q, k, update=False) for q, k in ((q1, k2), (q2, k1)))
    both = calm.symmetric(q1, k2, q2, k1)
    torch.testing.assert_close(both, torch.stack((one, two), 1).flatten())
    criterion.symmetric(q1, k2, q2, k1, update=False)
    with torch.no_grad():
        criterion.symmetric(q1, k2, q2, k1)
    assert int(criterion.memory_bank.count) == 36
    neighbors = trained(negatives="neighbors")
    out = neighbors.symmetric(q1, k2, q2, k1, return_stats=True, update=False)
    assert out.loss.ndim == 0
    assert out.stats.kept_count.shape == (12,)


def test_symmetric_within_the_batch():
    criterion = InfoNCELoss(0.2, 0)
    q1, k2 = keys(seed=7)
    q2, k1 = keys(seed=8)
    torch.testing.assert_close(
        criterion.symmetric(q1, k2, q2, k1), (criterion(q1, k2) + criterion(q2, k1)) / 2
    )
    with pytest.raises(ValueError, match=r"^update: got True"):
        criterion.symmetric(q1, k2, q2, k1, update=True)


def test_a_symmetric_call_that_fails_changes_nothing():
    criterion = make(indexed_bank=True)
    criterion(*keys(), ids=torch.arange(6))
    before = copy.deepcopy(criterion)
    q1, k2 = keys(seed=7)
    with pytest.raises(ValueError, match=r"^ids: got 40"):
        criterion.symmetric(q1, k2, q1, k2, ids=torch.arange(35, 41))
    assert_equal(criterion, before)
