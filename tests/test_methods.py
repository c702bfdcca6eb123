"""What every method has, a row of LOSSES each; the formula of a method has a file of its own."""

import copy
import math

import pytest
import torch
from formulas import (
    assert_same,
    data,
    expected_hcl,
    expected_info_nce,
    expected_msf,
    expected_nnclr,
    expected_ressl,
    expected_supcon,
    expected_unremix,
    synthetic,
)

from psm_kernels import (
    HCLLoss,
    InfoNCELoss,
    MSFLoss,
    NNCLRLoss,
    PSMLoss,
    ReSSLLoss,
    SSCLLoss,
    SupConLoss,
    UnReMixLoss,
)
from psm_kernels.functional import (
    hcl_loss,
    info_nce_loss,
    msf_loss,
    nnclr_loss,
    ressl_loss,
    sscl_loss,
    supcon_loss,
    unremix_loss,
)

LOSSES = {
    "info_nce": (InfoNCELoss, info_nce_loss, {}),
    "hcl": (HCLLoss, hcl_loss, {}),
    "sscl": (SSCLLoss, sscl_loss, {"num_hard": 6}),
    "unremix": (UnReMixLoss, unremix_loss, {}),
    "supcon": (SupConLoss, supcon_loss, {}),
    "nnclr": (NNCLRLoss, nnclr_loss, {}),
    "ressl": (ReSSLLoss, ressl_loss, {}),
    "msf": (MSFLoss, msf_loss, {}),
}
NEED_A_BANK = ("supcon", "nnclr", "ressl", "msf")
KEY_IS_CONSTANT = ("nnclr", "ressl", "msf")
each_loss = pytest.mark.parametrize("name", LOSSES)
each_loss_in_each_form = pytest.mark.parametrize(
    ("name", "form"),
    [(n, f) for n in LOSSES for f in ("bank", "batch") if f == "bank" or n not in NEED_A_BANK],
)


def function(name, size=20, temperature=0.5, **more):
    """(query, key, bank) -> loss, with all that the method needs besides."""
    _, loss, settings = LOSSES[name]
    settings = {**settings, "temperature": temperature, **more}
    if name == "msf":
        del settings["temperature"]
    if name == "sscl":
        settings.setdefault("rng_state", torch.tensor([1, 2]))
    if name == "supcon":
        settings.setdefault("bank_labels", torch.arange(size) % 4)

    def call(query, key, bank, **given):
        if name == "supcon":
            given = {"labels": torch.arange(len(query)), **given}
        return loss(query, key, bank, **settings, **given)

    return call


def leaves(name, query, key):
    """What gets a gradient."""
    return (query,) if name in KEY_IS_CONSTANT else (query, key)


@each_loss
@pytest.mark.parametrize("count", [1, 2, 7])
def test_slots_behind_count_are_ignored(name, count):
    query, key, bank = data(seed=6)
    spoiled = bank.clone()
    spoiled[count:] = torch.nan
    got = function(name, temperature=0.3)(query, key, spoiled, count=torch.tensor(count))
    state, of_bank = torch.tensor([1, 2]), (query, key, bank)
    wanted = {
        "info_nce": lambda: expected_info_nce(*of_bank, count, 0.3),
        "hcl": lambda: expected_hcl(*of_bank, count, 0.3),
        "sscl": lambda: expected_hcl(
            *of_bank, count, 0.3, tau_plus=0.05, made=synthetic(*of_bank, state, 6, 8, count=count)
        ),
        "unremix": lambda: expected_unremix(*of_bank, count, 0.3),
        "supcon": lambda: expected_supcon(
            *of_bank, torch.arange(6), torch.arange(20) % 4, count, 0.3
        ),
        "nnclr": lambda: expected_nnclr(*of_bank, count, 0.3),
        "ressl": lambda: expected_ressl(*of_bank, count, 0.3),
        "msf": lambda: expected_msf(*of_bank, count),
    }[name]().mean()
    assert_same(got, wanted, *leaves(name, query, key), rtol=1e-8)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *((name, form) for name in ("info_nce", "hcl", "sscl") for form in ("bank", "batch")),
        *((name, "bank") for name in NEED_A_BANK),
    ],
)
def test_gradcheck(name, form):
    """Not UnReMix: a finite difference would move its weights, which are constants."""
    query, key, bank = data(batch=3, size=9, dim=4, seed=7)
    settings = {"reduction": "none"}
    if name == "sscl":  # the mined rows are constants: give finite differences none in the batch
        settings |= {"num_hard": 3}
        settings |= {"num_synthetic": 0} if form == "batch" else {}
    bank = bank if form == "bank" else None
    loss, rest = function(name, 9, **settings), (key,) if name in KEY_IS_CONSTANT else ()
    assert torch.autograd.gradcheck(lambda *x: loss(*x, *rest, bank), leaves(name, query, key))


# --- precision and odd rows ----------------------------------------------------------------------


@each_loss
@pytest.mark.parametrize("temperature", [0.01, 0.02, 0.5])
@pytest.mark.parametrize("sign", [-1, 1])
def test_confident_rows_in_fp32(name, temperature, sign):
    """Similarities near -1 or +1 at a small temperature: exp(s/tau) alone would overflow."""
    query, key, bank = data(seed=12)
    bank = torch.nn.functional.normalize(sign * query[:1].detach() + 0.05 * bank, dim=1)
    loss = function(name, temperature=temperature, reduction="none")
    wide = loss(query, key, bank)
    low = [x.detach().float().requires_grad_() for x in (query, key)]
    narrow = loss(*low, bank.float())
    # 1e-7 of a cosine is 1e-7/tau of a logit; UnReMix divides by small ranges besides.
    tolerance = 3e-6 / temperature * (20 if name == "unremix" else 1)
    torch.testing.assert_close(narrow, wide.float(), rtol=tolerance, atol=tolerance)
    grad = torch.autograd.grad(narrow.sum(), leaves(name, *low))
    assert all(g.isfinite().all() for g in grad)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "nnclr"])
def test_a_bad_row_spoils_itself_alone(name):
    """Against a bank; within the batch, and in NNCLR, every row is a negative of the others."""
    query, key, bank = data(dtype=torch.float32)
    loss = function(name, reduction="none")
    clean = loss(query, key, bank)
    with torch.no_grad():
        query[2] = torch.nan
    spoiled = loss(query, key, bank)
    others = torch.arange(6) != 2
    assert spoiled[2].isnan()
    torch.testing.assert_close(spoiled[others], clean[others])
    (grad,) = torch.autograd.grad(spoiled[others].sum(), query)
    assert grad[others].isfinite().all()


@each_loss_in_each_form
def test_zero_rows_are_finite(name, form):
    query, key, bank = data(dtype=torch.float32)
    with torch.no_grad():
        query[1], key[2], bank[3] = 0, 0, 0
    value = function(name)(query, key, bank if form == "bank" else None)
    assert value.isfinite()
    grad = torch.autograd.grad(value, leaves(name, query, key))
    assert all(g.isfinite().all() for g in grad)


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("nnclr", "msf")])
def test_an_empty_bank_gives_zero(name):
    """Not where the bank lends positives alone."""
    query, key, bank = data(dtype=torch.float32)
    value = function(name)(query, key, bank.fill_(torch.nan), count=0)
    assert value == 0
    grad = torch.autograd.grad(value, leaves(name, query, key))
    assert all((g == 0).all() for g in grad)


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
    # Which rows are the hardest depends on rounding, but for the first.
    settings = {"sscl": {"num_hard": 1}, "msf": {"topk": 2}}.get(name, {})
    loss = function(name, 100, temperature=0.2, **settings)
    wide = [x.detach().double().requires_grad_() for x in (query, key)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = loss(query, key, bank)
    assert got.dtype is torch.float32
    wanted = loss(*wide, bank.double())
    torch.testing.assert_close(got.double(), wanted, rtol=2e-2, atol=2e-2)
    (grad,) = torch.autograd.grad(got, query)
    (truth,) = torch.autograd.grad(wanted, wide[0])
    assert grad.dtype is dtype
    torch.testing.assert_close(grad.double(), truth, rtol=0.1, atol=2e-3)


@pytest.mark.parametrize("name", NEED_A_BANK)
def test_there_is_no_form_within_the_batch(name):
    query, key, _ = data()
    with pytest.raises(ValueError, match=r"^bank: got None, wanted a tensor"):
        function(name)(query, key, None)
    with pytest.raises(ValueError, match=r"^memory_bank_size: got 0, wanted"):
        LOSSES[name][0](memory_bank_size=0)


# --- modules -------------------------------------------------------------------------------------


def make(name, size=(20, 8), **settings):
    cls, _, defaults = LOSSES[name]
    settings = {"memory_bank_size": size, "temperature": 0.3, **defaults, **settings}
    if name == "msf":
        del settings["temperature"]
    return cls(**settings)


def labels(name, batch=6):
    """What a call of the module needs besides query and key."""
    return {"labels": torch.arange(batch) % 4} if name == "supcon" else {}


@each_loss
def test_module_is_the_twin_then_an_enqueue(name):
    query, key, _ = data(dtype=torch.float32)
    criterion, given = make(name), labels(name)
    for _ in range(2):
        criterion(query, key, **given)
    memory = criterion.memory_bank
    bank, count = memory.bank.clone(), memory.count.clone()
    state = {"sscl": {"rng_state": criterion.rng_state.clone()}}
    state |= {"supcon": {"bank_labels": memory.labels.clone()}}
    loss = function(name, temperature=0.3, **state.get(name, {}))
    wanted = loss(query, key, bank, count=count, **given)
    assert count == 12
    torch.testing.assert_close(criterion(query, key, **given), wanted, rtol=0, atol=0)
    assert criterion.memory_bank.count == 18
    assert criterion.rng_state[1] == 3
    criterion.eval()
    criterion(query, key, **given)
    criterion(query, key, update=True, **given)
    assert criterion.memory_bank.ptr == 4


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in NEED_A_BANK])
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


@each_loss_in_each_form
def test_resumed_is_uninterrupted(name, form):
    size = (20, 8) if form == "bank" else 0
    query, key, _ = data(dtype=torch.float32)
    first, given = make(name, size, seed=3), labels(name)
    for _ in range(3):
        first(query, key, **given)
    second = make(name, size, seed=4)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for _ in range(3):
        assert torch.equal(first(query, key, **given), second(query, key, **given))


@each_loss_in_each_form
def test_compiles_without_a_graph_break(name, form):
    query, key, _ = data(dtype=torch.float32)
    eager, given = make(name, (20, 8) if form == "bank" else 0), labels(name)
    if form == "bank":
        eager.enqueue(data(batch=9, seed=1)[0], torch.arange(9) % 4)
    compiled = copy.deepcopy(eager)
    step = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for _ in range(2):  # the bank fills: count changes between forward and backward
        got, wanted = step(query, key, **given), eager(query, key, **given)
        assert_same(got, wanted, *leaves(name, query, key), rtol=1e-5)
    for a, b in zip(compiled.state_dict().values(), eager.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", NEED_A_BANK)
def test_a_compiled_backward_reads_the_bank_of_its_forward(name):
    """With the partitioner of inductor, which computes again in the backward what is cheap: the
    enqueue has overwritten the whole bank by then."""
    query, key, bank = data(batch=8, size=8, dtype=torch.float32)
    eager, given = make(name, (8, 8)), labels(name, 8)
    eager.enqueue(bank, torch.arange(8) % 4, ids=torch.arange(8))
    compiled = copy.deepcopy(eager)
    step = torch.compile(compiled, fullgraph=True, backend="aot_eager_decomp_partition")
    given |= {"ids": torch.arange(8) % 5}
    got, wanted = step(query, key, **given), eager(query, key, **given)
    assert_same(got, wanted, *leaves(name, query, key), rtol=1e-5)


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
        ("supcon", {"temperature": 0.0}, "temperature"),
        ("nnclr", {"temperature": -1.0}, "temperature"),
        ("ressl", {"teacher_temperature": 0.0}, "teacher_temperature"),
        ("msf", {"topk": 0}, "topk"),
        ("msf", {"topk": 22}, "topk"),
    ],
)
def test_bad_settings(name, settings, match):
    with pytest.raises(ValueError, match=match):
        make(name, **settings)


@each_loss
def test_bad_input_leaves_the_state_alone(name):
    query, key, _ = data(dtype=torch.float32)
    criterion, given = make(name), labels(name)
    criterion(query, key, **given)
    before = copy.deepcopy(criterion.state_dict())
    for bad in (
        lambda: criterion(query[:, :4], key[:, :4], **given),
        lambda: criterion(query, key[:3], **given),
        lambda: criterion(query.long(), key, **given),
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
    for cls in (PSMLoss, *(cls for cls, _, _ in LOSSES.values())):
        first = () if cls is MSFLoss else (0.2,)
        criterion = cls(*first, (64, 8), **shared)
        query, key, _ = data(dtype=torch.float32)
        criterion(query, key, labels=torch.arange(6), update=True)
        assert criterion.memory_bank.labels[:6].tolist() == list(range(6))
