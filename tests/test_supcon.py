"""SupCon against its formula: positives are what has the label, and never a row's own copy."""

import copy

import pytest
import torch
from formulas import assert_same, data, expected_supcon

from psm_kernels import SupConLoss
from psm_kernels.functional import info_nce_loss, supcon_loss

LABELS = torch.tensor([1, 0, -1, 1, 7, 2])  # unknown; in no slot
IDS = torch.tensor([4, 2, -1, 4, 0, -1])


@pytest.mark.parametrize("given", [False, True], ids=["no ids", "ids"])
@pytest.mark.parametrize("temperature", [0.05, 0.5])
@pytest.mark.parametrize("count", [None, 7, 0])
def test_supcon_is_the_formula(count, temperature, given):
    query, key, bank = data()
    ids = {"ids": IDS, "bank_ids": torch.arange(20) % 6 - 1} if given else {}
    settings = {"count": count, "temperature": temperature, **ids}
    settings |= {"labels": LABELS, "bank_labels": torch.arange(20) % 4 - 1}
    got = supcon_loss(query, key, bank, reduction="none", **settings)
    want = expected_supcon(query, key, bank, **settings)
    torch.testing.assert_close(got, want)
    assert_same(got.mean(), want.mean(), query, key)


@pytest.mark.parametrize("temperature", [0.02, 0.5])
def test_a_key_alone_is_info_nce(backend, temperature):
    """To the bit: small losses keep their digits."""
    query, key, bank = data(dtype=torch.float32)
    settings = {"temperature": temperature, "backend": backend, "reduction": "none"}
    for labels in (torch.full((6,), -1), torch.arange(6) + 90):
        got = supcon_loss(
            query, key, bank, labels=labels, bank_labels=torch.arange(20) - 1, **settings
        )
        want = info_nce_loss(query, key, bank, **settings)
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_many_positives_in_a_low_bank(backend):
    """3000 of 6000 rows are positives; the sums of their label are of the rows as stored."""
    query, key, bank = data(size=6000, dtype=torch.float32)
    bank_labels = torch.arange(6000) % 2
    settings = {"labels": torch.arange(6) % 2, "bank_labels": bank_labels}
    low = bank.to(torch.bfloat16)
    wide = [x.detach().double().requires_grad_() for x in (query, key)]
    got = supcon_loss(query, key, low, temperature=0.2, backend=backend, **settings)
    want = expected_supcon(*wide, low.double(), temperature=0.2, **settings).mean()
    torch.testing.assert_close(got.double(), want, rtol=2e-3, atol=2e-3)
    (a,), (b,) = torch.autograd.grad(got, query), torch.autograd.grad(want, wide[0])
    torch.testing.assert_close(a.double(), b, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize(
    "labels", [None, [1] * 6, torch.zeros(5, dtype=torch.int64), torch.zeros(6)], ids=type
)
def test_calls_need_labels(labels):
    query, key, bank = data(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"^labels: got"):
        supcon_loss(query, key, bank, labels=labels, bank_labels=torch.arange(20))
    criterion = SupConLoss(memory_bank_size=(20, 8))
    criterion(query, key, labels=torch.arange(6))
    before = copy.deepcopy(criterion.state_dict())
    for call in (criterion, lambda *pair, **more: criterion.symmetric(*pair, *pair, **more)):
        with pytest.raises(ValueError, match=r"^labels: got"):
            call(query, key, labels=labels)
    for name, value in criterion.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_function_needs_the_labels_of_its_bank():
    query, key, bank = data(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"^bank_labels: got None"):
        supcon_loss(query, key, bank, labels=torch.arange(6))
    with pytest.raises(ValueError, match=r"^bank_labels: got"):
        supcon_loss(query, key, bank, labels=torch.arange(6), bank_labels=torch.arange(19))


def test_memory_stays_far_below_batch_times_bank(backend):
    """B K bytes = 16 MB; each row has 6554 positives."""
    if backend == "reference":
        pytest.skip("the oracle writes B x K matrices on purpose")
    from torch.profiler import ProfilerActivity, profile

    query, key, bank = data(batch=256, size=65536, dtype=torch.float32)
    settings = {"labels": torch.arange(256) % 10, "bank_labels": torch.arange(65536) % 10}
    settings |= {"ids": torch.arange(256), "bank_ids": torch.arange(65536) % 1024}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        supcon_loss(query, key, bank, backend=backend, **settings)
    assert max(event.cpu_memory_usage for event in trace.events()) < 6 << 20
