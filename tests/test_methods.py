"""What every method has, a row of LOSSES each; the formula of a method has a file of its own."""

import copy
import math

import pytest
import torch
from formulas import (
    assert_same,
    data,
    each_form,
    expected_hcl,
    expected_info_nce,
    expected_unremix,
    synthetic,
)

from psm_kernels import HCLLoss, InfoNCELoss, PSMLoss, SSCLLoss, UnReMixLoss
from psm_kernels.functional import hcl_loss, info_nce_loss, sscl_loss, unremix_loss

LOSSES = {
    "info_nce": (InfoNCELoss, info_nce_loss, {}),
    "hcl": (HCLLoss, hcl_loss, {}),
    "sscl": (SSCLLoss, sscl_loss, {"num_hard": 6}),
    "unremix": (UnReMixLoss, unremix_loss, {}),
}
each_loss = pytest.mark.parametrize("name", LOSSES)


@each_loss
@pytest.mark.parametrize("count", [1, 2, 7])
def test_slots_behind_count_are_ignored(name, count):
    query, key, bank = data(seed=6)
    _, loss, settings = LOSSES[name]
    if name == "sscl":
        settings = {**settings, "rng_state": torch.tensor([1, 2])}
    spoiled = bank.clone()
    spoiled[count:] = torch.nan
    got = loss(query, key, spoiled, count=torch.tensor(count), temperature=0.3, **settings)
    state = torch.tensor([1, 2])
    wanted = {
        "info_nce": lambda: expected_info_nce(query, key, bank, count, 0.3),
        "hcl": lambda: expected_hcl(query, key, bank, count, 0.3),
        "sscl": lambda: expected_hcl(
            query, key, bank, count, 0.3, tau_plus=0.05,
            made=synthetic(query, key, bank, state, 6, 8, count=count),
        ),
        "unremix": lambda: expected_unremix(query, key, bank, count, 0.3),
    }[name]()  # fmt: skip
    assert_same(got, wanted, query, key, rtol=1e-8)


@each_form
@pytest.mark.parametrize("name", ["info_nce", "hcl", "sscl"])
def test_gradcheck(name, form):
    """Not UnReMix: a finite difference would move its weights, which are constants."""
    query, key, bank = data(batch=3, size=9, dim=4, seed=7)
    _, loss, settings = LOSSES[name]
    settings = {**settings, "reduction": "none"}
    if name == "sscl":  # the mined rows are constants: give finite differences none in the batch
        settings |= {"num_hard": 3, "rng_state": torch.tensor([1, 2])}
        settings |= {"num_synthetic": 0} if form == "batch" else {}
    bank = bank if form == "bank" else None
    assert torch.autograd.gradcheck(lambda q, k: loss(q, k, bank, **settings), (query, key))


# --- precision and odd rows ----------------------------------------------------------------------


@each_loss
@pytest.mark.parametrize("temperature", [0.01, 0.02, 0.5])
@pytest.mark.parametrize("sign", [-1, 1])
def test_confident_rows_in_fp32(name, temperature, sign):
    """Similarities near -1 or +1 at a small temperature: exp(s/tau) alone would overflow."""
    query, key, bank = data(seed=12)
    bank = torch.nn.functional.normalize(sign * query[:1].detach() + 0.05 * bank, dim=1)
    _, loss, settings = LOSSES[name]
    if name == "sscl":
        settings = {**settings, "rng_state": torch.tensor([1, 2])}
    wide = loss(query, key, bank, temperature=temperature, reduction="none", **settings)
    low = [x.detach().float().requires_grad_() for x in (query, key)]
    narrow = loss(*low, bank.float(), temperature=temperature, reduction="none", **settings)
    # 1e-7 of a cosine is 1e-7/tau of a logit; UnReMix divides by small ranges besides.
    tolerance = 3e-6 / temperature * (20 if name == "unremix" else 1)
    torch.testing.assert_close(narrow, wide.float(), rtol=tolerance, atol=tolerance)
    grad = torch.autograd.grad(narrow.sum(), low)
    assert all(g.isfinite().all() for g in grad)


@each_loss
def test_a_bad_row_spoils_itself_alone(name):
    """Against a bank; within the batch every row is a negative of the others."""
    query, key, bank = data(dtype=torch.float32)
    _, loss, settings = LOSSES[name]
    if name == "sscl":
        settings = {**settings, "rng_state": torch.tensor([1, 2])}
    clean = loss(query, key, bank, reduction="none", **settings)
    with torch.no_grad():
        query[2] = torch.nan
    spoiled = loss(query, key, bank, reduction="none", **settings)
    others = torch.arange(6) != 2
    assert spoiled[2].isnan()
    torch.testing.assert_close(spoiled[others], clean[others])
    (grad,) = torch.autograd.grad(spoiled[others].sum(), query)
    assert grad[others].isfinite().all()


@each_form
@each_loss
def test_zero_rows_are_finite(name, form):
    query, key, bank = data(dtype=torch.float32)
    with torch.no_grad():
        query[1], key[2], bank[3] = 0, 0, 0
    _, loss, settings = LOSSES[name]
    value = loss(query, key, bank if form == "bank" else None, **settings)
    assert value.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(value, (query, key)))


@each_loss
def test_an_empty_bank_gives_zero(name):
    query, key, bank = data(dtype=torch.float32)
    _, loss, settings = LOSSES[name]
    value = loss(query, key, bank.fill_(torch.nan), count=0, **settings)
    assert value == 0
    assert all((g == 0).all() for g in torch.autograd.grad(value, (query, key)))


@pytest.mark.parametrize("name", ["info_nce", "hcl", "unremix"])
def test_a_batch_of_one_has_no_negatives(name):
    query, key, _ = data(batch=1, dtype=torch.float32)
    value = LOSSES[name][1](query, key)
    assert value == 0
    assert all((g == 0).all() for g in torch.autograd.grad(value, (query, key)))


@each_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(name, dtype):
    query, key, bank = data(batch=16, size=100, dim=32, dtype=dtype)
    _, loss, settings = LOSSES[name]
    if name == "sscl":  # which rows are the hardest depends on rounding, but for the first
        settings = {"num_hard": 1, "rng_state": torch.tensor([1, 2])}
    wide = [x.detach().double().requires_grad_() for x in (query, key)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = loss(query, key, bank, temperature=0.2, **settings)
    assert got.dtype is torch.float32
    wanted = loss(*wide, bank.double(), temperature=0.2, **settings)
    torch.testing.assert_close(got.double(), wanted, rtol=2e-2, atol=2e-2)
    (grad,) = torch.autograd.grad(got, query)
    (truth,) = torch.autograd.grad(wanted, wide[0])
    assert grad.dtype is dtype
    torch.testing.assert_close(grad.double(), truth, rtol=0.1, atol=2e-3)


# --- modules -------------------------------------------------------------------------------------


def make(name, size=(20, 8), **settings):
    cls, _, defaults = LOSSES[name]
    return cls(0.3, size, **{**defaults, **settings})


@each_loss
def test_module_is_the_twin_then_an_enqueue(name):
    query, key, _ = data(dtype=torch.float32)
    criterion = make(name)
    for _ in range(2):
        criterion(query, key)
    bank, count = criterion.memory_bank.bank.clone(), criterion.memory_bank.count.clone()
    _, loss, settings = LOSSES[name]
    if name == "sscl":
        settings = {**settings, "rng_state": criterion.rng_state.clone()}
    wanted = loss(query, key, bank, count=count, temperature=0.3, **settings)
    assert count == 12
    torch.testing.assert_close(criterion(query, key), wanted, rtol=0, atol=0)
    assert criterion.memory_bank.count == 18
    assert criterion.rng_state[1] == 3
    criterion.eval()
    criterion(query, key)
    criterion(query, key, update=True)
    assert criterion.memory_bank.ptr == 4


@each_loss
def test_module_within_the_batch(name):
    query, key, _ = data(dtype=torch.float32)
    criterion = make(name, 0)
    value = criterion(query, key)
    assert criterion.memory_bank is None
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(value, (query, key)))
    assert list(criterion.state_dict()) == ["rng_state"]
    with pytest.raises(ValueError, match="update"):
        criterion(query, key, update=True)
    with pytest.raises(ValueError, match="memory_bank_size"):
        criterion.enqueue(key)


@each_form
@each_loss
def test_resumed_is_uninterrupted(name, form):
    size = (20, 8) if form == "bank" else 0
    query, key, _ = data(dtype=torch.float32)
    first = make(name, size, seed=3)
    for _ in range(3):
        first(query, key)
    second = make(name, size, seed=4)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for _ in range(3):
        assert torch.equal(first(query, key), second(query, key))


@each_loss
@each_form
def test_compiles_without_a_graph_break(name, form):
    query, key, _ = data(dtype=torch.float32)
    eager = make(name, (20, 8) if form == "bank" else 0)
    if form == "bank":
        eager.enqueue(data(batch=9, seed=1)[0])
    compiled = copy.deepcopy(eager)
    step = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for _ in range(2):  # the bank fills: count changes between forward and backward
        got, wanted = step(query, key), eager(query, key)
        assert_same(got, wanted, query, key, rtol=1e-5)
    for a, b in zip(compiled.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(a, b)


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "match"),
    [
        ("hcl", {"beta": -0.1}, "beta"),
        ("hcl", {"tau_plus": 1.0}, "tau_plus"),
        ("hcl", {"tau_plus": -0.1}, "tau_plus"),
        ("hcl", {"detach_weights": "yes"}, "detach_weights"),
        ("sscl", {"num_hard": 21}, "num_hard"),
        ("sscl", {"num_hard": 0}, "num_hard"),
        ("sscl", {"num_synthetic": -1}, "num_synthetic"),
        ("sscl", {"mix": "all"}, "mix"),
        ("sscl", {"beta": math.nan}, "beta"),
        ("unremix", {"similarity_weight": -1.0}, "similarity_weight"),
        ("unremix", {"representativeness_weight": math.inf}, "representativeness_weight"),
        (
            "unremix",
            dict.fromkeys(
                ("similarity_weight", "uncertainty_weight", "representativeness_weight"), 0
            ),
            "similarity_weight",
        ),
        ("info_nce", {"reduction": "max"}, "reduction"),
        ("info_nce", {"size": 4096}, "memory_bank_size"),
        ("info_nce", {"bank_dtype": torch.int8}, "dtype"),
    ],
)
def test_bad_settings(name, settings, match):
    with pytest.raises(ValueError, match=match):
        make(name, **settings)


@each_loss
def test_bad_input_leaves_the_state_alone(name):
    query, key, _ = data(dtype=torch.float32)
    criterion = make(name)
    criterion(query, key)
    before = copy.deepcopy(criterion.state_dict())
    for bad in (
        lambda: criterion(query[:, :4], key[:, :4]),
        lambda: criterion(query, key[:3]),
        lambda: criterion(query.long(), key),
        lambda: criterion(query, key, labels=torch.zeros(6)),
        lambda: criterion(query, key, labels=torch.zeros(5, dtype=torch.int64)),
    ):
        with pytest.raises(ValueError, match=r"query|key|labels"):
            bad()
    for entry, value in criterion.state_dict().items():
        assert torch.equal(value, before[entry]), entry


def test_the_same_words_as_psm_loss():
    """A user who changes the class changes nothing else."""
    shared = {"reduction": "sum", "bank_dtype": torch.bfloat16, "seed": 3, "backend": "reference"}
    for cls in (PSMLoss, InfoNCELoss, HCLLoss, SSCLLoss, UnReMixLoss):
        criterion = cls(0.2, (64, 8), **shared)
        query, key, _ = data(dtype=torch.float32)
        criterion(query, key, labels=torch.arange(6), update=True)
        assert criterion.memory_bank.labels[:6].tolist() == list(range(6))
