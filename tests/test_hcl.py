"""HCL against its formula, its floor and its limit."""

import pytest
import torch
from formulas import assert_same, data, each_form, expected_hcl

from psm_kernels.functional import hcl_loss, info_nce_loss


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
def test_hcl_without_hardness_and_debiasing_is_info_nce(form):
    query, key, bank = data(seed=8)
    bank = bank if form == "bank" else None
    got = hcl_loss(query, key, bank, beta=0.0, tau_plus=0.0, temperature=0.3)
    assert_same(got, info_nce_loss(query, key, bank, temperature=0.3), query, key)
