"""UnReMix against its formula, and its two passes on every backend."""

import math

import pytest
import torch
from conftest import problem
from formulas import assert_same, data, each_form, expected_unremix

from psm_kernels.functional import info_nce_loss, unremix_loss
from psm_kernels.weighted import row_ranges, weighted_pass


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


def test_equal_negatives_weigh_alike_in_unremix():
    query, key, bank = data(seed=11)
    bank = bank[:1].repeat(5, 1)
    got = unremix_loss(
        query, key, bank, temperature=0.3, uncertainty_weight=0.0, representativeness_weight=1.0
    )
    assert_same(got, info_nce_loss(query, key, bank, temperature=0.3), query, key)


# --- its two passes ------------------------------------------------------------------------------


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
