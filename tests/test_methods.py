"""InfoNCE, HCL, SSCL and UnReMix against fp64 formulas written here a second time."""

import copy
import math

import pytest
import torch
from conftest import problem

from psm_kernels import HCLLoss, InfoNCELoss, PSMLoss, SSCLLoss, UnReMixLoss, noise
from psm_kernels.functional import (
    hcl_loss,
    info_nce_loss,
    psm_loss,
    sscl_loss,
    unremix_loss,
)
from psm_kernels.weighted import row_ranges, weighted_pass

LOSSES = {
    "info_nce": (InfoNCELoss, info_nce_loss, {}),
    "hcl": (HCLLoss, hcl_loss, {}),
    "sscl": (SSCLLoss, sscl_loss, {"num_hard": 6}),
    "unremix": (UnReMixLoss, unremix_loss, {}),
}
each_loss = pytest.mark.parametrize("name", LOSSES)
each_form = pytest.mark.parametrize("form", ["bank", "batch"])


def data(batch=6, size=20, dim=8, dtype=torch.float64, seed=0):
    """query (B, D), key (B, D) with gradient, bank (K, D) of unit rows."""
    generator = torch.Generator().manual_seed(seed)
    query, key, bank = (
        torch.randn(n, dim, generator=generator, dtype=torch.float64) for n in (batch, batch, size)
    )
    key = query + key  # a positive that resembles its query
    bank = torch.nn.functional.normalize(bank, dim=1)
    return query.to(dtype).requires_grad_(), key.to(dtype).requires_grad_(), bank.to(dtype)


def anchors(query, key, bank, count=None):
    """(anchor, positive, negatives (n, D)) of every row, in plain loops."""
    unit = torch.nn.functional.normalize
    query, key = unit(query, dim=1), unit(key, dim=1)
    if bank is not None:
        return [(q, k, bank[:count]) for q, k in zip(query, key, strict=True)]
    rows, batch = torch.cat((query, key)), len(query)
    result = []
    for i in range(2 * batch):
        others = [j for j in range(2 * batch) if j % batch != i % batch]
        result.append((rows[i], rows[(i + batch) % (2 * batch)], rows[others]))
    return result


def expected_info_nce(query, key, bank, count=None, temperature=0.5):
    losses = []
    for anchor, positive, negatives in anchors(query, key, bank, count):
        pos, neg = ((x @ anchor / temperature).exp() for x in (positive, negatives))
        losses.append(-(pos / (pos + neg.sum())).log())
    return torch.stack(losses).mean()


def expected_hcl(
    query, key, bank, count=None, temperature=0.5, beta=1.0, tau_plus=0.1, detach_weights=False,
    made=None,
):  # fmt: skip
    losses = []
    for row, (anchor, positive, negatives) in enumerate(anchors(query, key, bank, count)):
        if made is not None:
            negatives = torch.cat((negatives, made[row].detach()))
        n = len(negatives)
        pos, x = ((v @ anchor / temperature).exp() for v in (positive, negatives))
        weight = x**beta / (x**beta).mean()
        weight = weight.detach() if detach_weights else weight
        hard = (-tau_plus * n * pos + (weight * x).sum()) / (1 - tau_plus)
        hard = hard.clamp_min(n * math.exp(-1 / temperature))
        losses.append(-(pos / (pos + hard)).log())
    return torch.stack(losses).mean()


def synthetic(query, key, bank, rng_state, num_hard, num_synthetic, mix="pair", count=None):
    """Each anchor's synthetic negatives, from the noise words as the docstring says."""
    state = torch.tensor([rng_state[0], rng_state[1] + (3 << 32)])
    result = []
    for row, (anchor, _, negatives) in enumerate(anchors(query, key, bank, count)):
        order = (negatives @ anchor).argsort(descending=True)[:num_hard]
        words = noise.philox_words(torch.tensor([row]), torch.arange(3 * num_synthetic), state)[0]
        made = []
        for u in range(num_synthetic):
            first, second, alpha = words[3 * u : 3 * u + 3].tolist()
            m1 = negatives[order[first * len(order) // 2**32]]
            m2 = negatives[order[second * len(order) // 2**32]]
            alpha = alpha / 2**32
            mixed = {
                "pair": alpha * m1 + (1 - alpha) * m2,
                "query": alpha * anchor + (1 - alpha) * m1,
                "none": m1,
            }[mix]
            made.append(mixed / mixed.norm())
        result.append(torch.stack(made))
    return result


def scaled(value):
    span = value.max() - value.min()
    return (value - value.min()) / span if span > 1e-12 else torch.ones_like(value)


def expected_unremix(query, key, bank, count=None, temperature=0.5, weights=(1 / 3,) * 3):
    losses = []
    for anchor, positive, negatives in anchors(query, key, bank, count):
        n = len(negatives)
        s_pos, s = positive @ anchor, negatives @ anchor
        with torch.no_grad():
            pi = (torch.cat((s_pos[None], s)) / temperature).softmax(0)
            alignment = torch.zeros_like(pi)
            alignment[pi.argmax()] = 1
            u = (pi - alignment).abs()[1:]
            apart = 1 - negatives @ negatives.T
            r = torch.stack(
                [apart[j][torch.arange(n) != j].sum() / max(n - 1, 1) for j in range(n)]
            )
            w = sum(c * scaled(v) for c, v in zip(weights, (s, u, r), strict=True))
        pos, x = (s_pos / temperature).exp(), (s / temperature).exp()
        losses.append(-(pos / (pos + n * (w * x).sum() / w.sum())).log())
    return torch.stack(losses).mean()


def assert_same(got, wanted, *inputs, rtol=1e-9):
    """Values and gradients agree."""
    torch.testing.assert_close(got, wanted, rtol=rtol, atol=rtol)
    for a, b in zip(
        torch.autograd.grad(got, inputs), torch.autograd.grad(wanted, inputs), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)


# --- the formulas --------------------------------------------------------------------------------


@each_form
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_info_nce_is_the_formula(form, temperature):
    query, key, bank = data()
    bank = bank if form == "bank" else None
    got = info_nce_loss(query, key, bank, temperature=temperature)
    assert_same(got, expected_info_nce(query, key, bank, temperature=temperature), query, key)


@each_form
@pytest.mark.parametrize("detach_weights", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize(("tau_plus", "temperature"), [(0.0, 0.5), (0.1, 0.5), (0.3, 0.2)])
def test_hcl_is_the_formula(form, detach_weights, beta, tau_plus, temperature):
    query, key, bank = data(seed=1)
    bank = bank if form == "bank" else None
    settings = {
        "temperature": temperature,
        "beta": beta,
        "tau_plus": tau_plus,
        "detach_weights": detach_weights,
    }
    got = hcl_loss(query, key, bank, **settings)
    assert_same(got, expected_hcl(query, key, bank, **settings), query, key)


def test_hcl_reaches_its_floor():
    """tau_plus so large that nothing is left: Ng = n exp(-1/tau) in some rows, not in all."""
    query, key, bank = data(batch=12, seed=2)
    settings = {"tau_plus": 0.25, "temperature": 0.5}
    per_row = hcl_loss(query, key, bank, reduction="none", **settings)
    s_pos = torch.cosine_similarity(query, key)
    floor = torch.log1p(len(bank) * torch.exp(-2 - 2 * s_pos))
    assert 0 < torch.isclose(per_row, floor).sum() < 12
    got = hcl_loss(query, key, bank, **settings)
    assert_same(got, expected_hcl(query, key, bank, **settings), query, key)


@each_form
@pytest.mark.parametrize("mix", ["pair", "query", "none"])
@pytest.mark.parametrize(("beta", "detach_weights"), [(0.0, False), (1.0, False), (1.0, True)])
def test_sscl_is_the_formula(form, mix, beta, detach_weights):
    query, key, bank = data(seed=3)
    bank = bank if form == "bank" else None
    state = torch.tensor([5, 7])
    made = synthetic(query, key, bank, state, 4, 3, mix)
    settings = {"beta": beta, "tau_plus": 0.05, "detach_weights": detach_weights}
    got = sscl_loss(
        query, key, bank, num_hard=4, num_synthetic=3, mix=mix, rng_state=state, **settings
    )
    assert_same(got, expected_hcl(query, key, bank, made=made, **settings), query, key)


@each_form
@pytest.mark.parametrize("temperature", [0.05, 0.5])
@pytest.mark.parametrize(
    "weights", [(1 / 3, 1 / 3, 1 / 3), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 2.0)]
)
def test_unremix_is_the_formula(form, temperature, weights):
    query, key, bank = data(seed=4)
    bank = bank if form == "bank" else None
    names = ("similarity_weight", "uncertainty_weight", "representativeness_weight")
    settings = dict(zip(names, weights, strict=True))
    got = unremix_loss(query, key, bank, temperature=temperature, **settings)
    wanted = expected_unremix(query, key, bank, temperature=temperature, weights=weights)
    assert_same(got, wanted, query, key, rtol=1e-8)


@pytest.mark.parametrize("temperature", [0.05, 0.5, 5.0])
def test_unremix_with_a_negative_as_pseudo_label(temperature):
    """Keys that point away: the likeliest entry is a negative, with pi above and below one half."""
    query, _, bank = data(batch=12, seed=5)
    key = (-query).detach().requires_grad_()
    bank = torch.cat((bank, torch.nn.functional.normalize(query[:3].detach(), dim=1)))
    got = unremix_loss(query, key, bank, temperature=temperature)
    wanted = expected_unremix(query, key, bank, temperature=temperature)
    assert_same(got, wanted, query, rtol=1e-8)


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


# --- limits --------------------------------------------------------------------------------------


@each_form
def test_hcl_without_hardness_and_debiasing_is_info_nce(form):
    query, key, bank = data(seed=8)
    bank = bank if form == "bank" else None
    got = hcl_loss(query, key, bank, beta=0.0, tau_plus=0.0, temperature=0.3)
    assert_same(got, info_nce_loss(query, key, bank, temperature=0.3), query, key)


@each_form
def test_sscl_without_synthetic_negatives_is_hcl(form):
    query, key, bank = data(seed=9)
    bank = bank if form == "bank" else None
    got = sscl_loss(query, key, bank, num_hard=99, num_synthetic=0, tau_plus=0.1)
    assert_same(got, hcl_loss(query, key, bank), query, key)


def test_psm_without_mining_is_info_nce():
    query, key, bank = data(seed=10)
    got = psm_loss(query, key, bank, topk=0, selection="all", hard_weight=0.0, temperature=0.3)
    assert_same(got, info_nce_loss(query, key, bank, temperature=0.3), query, key)


def test_equal_negatives_weigh_alike_in_unremix():
    query, key, bank = data(seed=11)
    bank = bank[:1].repeat(5, 1)
    got = unremix_loss(
        query, key, bank, temperature=0.3, uncertainty_weight=0.0, representativeness_weight=1.0
    )
    assert_same(got, info_nce_loss(query, key, bank, temperature=0.3), query, key)


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


def test_sscl_draws_anew_each_step_and_by_row_offset():
    query, key, bank = data(dtype=torch.float32)
    criterion = make("sscl", 0)
    assert criterion(query, key) != criterion(query, key)
    state = torch.tensor([1, 2])
    whole = sscl_loss(query, key, bank, num_hard=6, rng_state=state, reduction="none")
    part = sscl_loss(
        query[2:], key[2:], bank, num_hard=6, rng_state=state, row_offset=2, reduction="none"
    )
    torch.testing.assert_close(part, whole[2:])


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


# --- UnReMix's two passes on every backend -------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("batch", "size", "dim", "count"),
    [(1, 1, 8, 1), (3, 63, 20, 63), (257, 130, 128, 99), (5, 4097, 200, 4000), (2, 9, 33, 0)],
)
def test_unremix_passes_agree(backend, batch, size, dim, count, dtype):
    query, _, bank, _ = problem(batch, size, dim, dtype=dtype)
    bank[count:] = torch.nan
    generator = torch.Generator().manual_seed(1)
    alpha, beta, gamma, top, cap = torch.rand(5, batch, generator=generator) - 0.3
    rho = torch.rand(size, generator=generator)
    rho[count:] = torch.nan
    settings = {"alpha": alpha, "beta": beta, "gamma": gamma, "top": top, "cap": cap, "rho": rho}
    got, wanted = (
        (
            row_ranges(q, m, count, temperature=0.2, backend=name),
            weighted_pass(
                q, m, count, temperature=0.2, backend=name,
                **{k: v.to(sums) for k, v in settings.items()},
            ),
        )
        for q, m, name, sums in (
            (query, bank, backend, torch.float32),
            (query.to(dtype).double(), bank.double(), "reference", torch.float64),
        )
    )  # fmt: skip
    tolerance = 1e-5 if dtype is torch.float32 else 2e-3  # the second product has the bank's dtype
    for field in ("rest", "lowest", "top"):
        a, b = getattr(got[0], field), getattr(wanted[0], field)
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    for field in ("log_sum", "mean", "weight"):
        a, b = getattr(got[1], field), getattr(wanted[1], field)
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=tolerance)


def test_weighted_pass_by_hand(backend):
    """Three rows, weights 0.5 + s, capped and clamped ones among them."""
    bank = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    query = torch.tensor([[1.0, 0.0]], requires_grad=True)
    one = torch.ones(1)
    swept = weighted_pass(
        query, bank, None, temperature=1.0, alpha=0.2 * one, beta=one, gamma=one, top=one,
        cap=0.5 * one, rho=torch.tensor([0.0, 0.1, 0.3]), backend=backend,
    )  # fmt: skip
    e = [1, math.exp(-1), math.exp(-2)]
    weight = [0.2 + 1 + 0.5, 0.2 + 0 + e[1] + 0.1, max(0.2 - 1 + e[2] + 0.3, 0)]
    total = sum(w * x for w, x in zip(weight, e, strict=True))
    torch.testing.assert_close(swept.log_sum, torch.tensor([1 + math.log(total)]))
    torch.testing.assert_close(swept.weight, torch.tensor([sum(weight)]))
    mean = torch.tensor([[weight[0] * e[0], weight[1] * e[1]]]) / total
    torch.testing.assert_close(swept.mean, mean)
    torch.testing.assert_close(torch.autograd.grad(swept.log_sum.sum(), query)[0], mean)


def test_unremix_passes_pass_opcheck():
    query, _, bank, _ = problem(3, 9, 8)
    rows = [torch.rand(3) for _ in range(5)]
    query.requires_grad_()
    count = torch.tensor(7)
    ops = torch.ops.psm_kernels
    torch.library.opcheck(ops.row_ranges.default, (query.detach(), bank, count, 0.2, "reference"))
    rows.append(torch.rand(9))
    torch.library.opcheck(ops.weighted_pass.default, (query, bank, count, 0.2, *rows, "reference"))


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


def test_num_hard_beyond_the_batch():
    query, key, _ = data(batch=4, dtype=torch.float32)
    criterion = SSCLLoss(num_hard=7)
    with pytest.raises(
        ValueError, match=r"num_hard: got 7, wanted an integer from 1 to 6 .*2B - 2"
    ):
        criterion(query, key)
    assert criterion.rng_state[1] == 0


def test_the_same_words_as_psm_loss():
    """A user who changes the class changes nothing else."""
    shared = {"reduction": "sum", "bank_dtype": torch.bfloat16, "seed": 3, "backend": "reference"}
    for cls in (PSMLoss, InfoNCELoss, HCLLoss, SSCLLoss, UnReMixLoss):
        criterion = cls(0.2, (64, 8), **shared)
        query, key, _ = data(dtype=torch.float32)
        criterion(query, key, labels=torch.arange(6), update=True)
        assert criterion.memory_bank.labels[:6].tolist() == list(range(6))
