"""SSCL against its formula, its limit, and the noise of its mixing."""

import pytest
import torch
from formulas import assert_same, data, each_form, expected_hcl, synthetic

from psm_kernels import SSCLLoss
from psm_kernels.functional import hcl_loss, sscl_loss


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
def test_sscl_without_synthetic_negatives_is_hcl(form):
    query, key, bank = data(seed=9)
    bank = bank if form == "bank" else None
    got = sscl_loss(query, key, bank, num_hard=99, num_synthetic=0, tau_plus=0.1)
    assert_same(got, hcl_loss(query, key, bank), query, key)


def test_sscl_draws_anew_each_step_and_by_row_offset():
    query, key, bank = data(dtype=torch.float32)
    criterion = SSCLLoss(0.3, 0, num_hard=6)
    assert criterion(query, key) != criterion(query, key)
    state = torch.tensor([1, 2])
    whole = sscl_loss(query, key, bank, num_hard=6, rng_state=state, reduction="none")
    part = sscl_loss(
        query[2:], key[2:], bank, num_hard=6, rng_state=state, row_offset=2, reduction="none"
    )
    torch.testing.assert_close(part, whole[2:])


def test_num_hard_beyond_the_batch():
    query, key, _ = data(batch=4, dtype=torch.float32)
    criterion = SSCLLoss(num_hard=7)
    with pytest.raises(
        ValueError, match=r"num_hard: got 7, wanted an integer from 1 to 6 .*2B - 2"
    ):
        criterion(query, key)
    assert criterion.rng_state[1] == 0
