"""InfoNCE against its formula, and PSM as far as it is InfoNCE."""

import pytest
from formulas import assert_same, data, each_form, expected_info_nce

from psm_kernels.functional import info_nce_loss, psm_loss


@each_form
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_info_nce_is_the_formula(form, temperature):
    query, key, bank = data()
    bank = bank if form == "bank" else None
    got = info_nce_loss(query, key, bank, temperature=temperature)
    assert_same(got, expected_info_nce(query, key, bank, temperature=temperature), query, key)


def test_psm_without_mining_is_info_nce():
    query, key, bank = data(seed=10)
    got = psm_loss(query, key, bank, topk=0, selection="all", hard_weight=0.0, temperature=0.3)
    assert_same(got, info_nce_loss(query, key, bank, temperature=0.3), query, key)
