"""MSF against its formula, and the one loss without a temperature."""

import inspect

import pytest
import torch
from formulas import assert_same, data, expected_msf

from psm_kernels import MSFLoss
from psm_kernels.functional import msf_loss

IDS = torch.tensor([4, 2, -1, 4, 0, -1])


@pytest.mark.parametrize("given", [False, True], ids=["no ids", "ids"])
@pytest.mark.parametrize("topk", [1, 2, 5, 21])
@pytest.mark.parametrize("count", [None, 7, 3, 0])
def test_msf_is_the_formula(count, topk, given):
    """Also with fewer rows than it wants, or none."""
    query, key, bank = data()
    ids = {"ids": IDS, "bank_ids": torch.arange(20) % 6 - 1} if given else {}
    settings = {"count": count, "topk": topk, **ids}
    got = msf_loss(query, key, bank, reduction="none", **settings)
    want = expected_msf(query, key, bank, **settings)
    torch.testing.assert_close(got, want)
    assert_same(got.mean(), want.mean(), query)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_every_backend(backend, dtype):
    query, key, bank = data(size=90, dtype=torch.float32)
    low = bank.to(dtype)
    wide = [x.detach().double().requires_grad_() for x in (query, key.to(dtype))]
    got = msf_loss(query, key.detach(), low, backend=backend)
    want = expected_msf(*wide, torch.nn.functional.normalize(low.double())).mean()
    torch.testing.assert_close(got.double(), want, rtol=1e-2, atol=1e-2)


def test_the_key_gets_no_gradient():
    query, key, bank = data(dtype=torch.float32)
    msf_loss(query, key, bank).backward()
    assert query.grad.abs().sum() > 0
    assert key.grad is None


def test_there_is_no_temperature():
    assert "temperature" not in inspect.signature(MSFLoss).parameters
    assert "temperature" not in inspect.signature(msf_loss).parameters
    criterion = MSFLoss((20, 8), topk=3)
    assert criterion.settings == {"topk": 3}
    with pytest.raises(AttributeError, match="temperature"):
        _ = criterion.temperature
    with pytest.raises(TypeError, match="temperature"):
        MSFLoss((20, 8), temperature=0.2)
    with pytest.raises(TypeError):
        MSFLoss(0.2, (20, 8))


@pytest.mark.parametrize("topk", [0, 22, 2.0])
def test_a_wrong_topk_is_refused(topk):
    query, key, bank = data(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"^topk: got"):
        MSFLoss((20, 8), topk=topk)
    with pytest.raises(ValueError, match=r"^topk: got"):
        msf_loss(query, key, bank, topk=topk)
    assert MSFLoss((20, 8), topk=21).topk == 21
